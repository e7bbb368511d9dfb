//! What the store costs: `cargo bench -p rlflow-store --bench store [-- cached|care|publish|file]`.
//!
//! Lookups are measured as whole processes, as `rlflow plan` with everything cached is, and within the process. Each number
//! is the median and the best of several runs. `RLFLOW_BENCH_BYTES` sets the size of the large file (2 GB if unset); it is
//! hashed beside `b3sum` (`cargo install b3sum`) or, without that, beside what `b3sum` calls.

use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use rlflow_store::{ActionRecord, Digest, Dtype, GcOptions, Provenance, Store};
use serde_json::json;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, child, folder, stages, mode] = &arguments[..]
        && child == "lookups"
    {
        return lookups(Path::new(folder), stages.parse().unwrap(), mode);
    }
    if let [_, child, folder, file] = &arguments[..]
        && child == "digest"
    {
        // For `perf stat`: what `b3sum FILE` is compared with.
        return println!("{}", Store::open(Path::new(folder)).unwrap().file_digest(Path::new(file)).unwrap().digest);
    }
    let wanted = |name: &str| arguments[1..].iter().all(|argument| argument.starts_with("--") || argument == name);
    let folder = tempfile::tempdir().unwrap();
    if wanted("cached") {
        for stages in [7, 1_000, 10_000] {
            bench_lookups(&folder.path().join(stages.to_string()), stages);
        }
    }
    if wanted("care") {
        bench_care(&folder.path().join("care"), 10_000);
    }
    if wanted("publish") {
        bench_publish(&folder.path().join("publish"));
    }
    if wanted("file") {
        bench_large_file(&folder.path().join("large"));
    }
}

fn report(name: &str, mut times: Vec<Duration>) {
    times.sort();
    println!("{name:<58} median {:>9.3?}  best {:>9.3?}", times[times.len() / 2], times[0]);
}

fn stage_key(n: usize) -> Digest {
    Digest::of(format!("stage {n}").as_bytes())
}

fn fill(store: &Store, stages: usize) {
    for n in 0..stages {
        let mut builder = store.artifact("text");
        builder.put("a.txt", format!("content {n}").as_bytes()).unwrap();
        builder.put("b.txt", format!("more {n}").as_bytes()).unwrap();
        builder.metadata(json!({"documents": n}));
        let artifact = builder.publish().unwrap();
        let settings = json!({"train": {"steps": 1000, "batch_size": 32, "lr": 1e-3, "betas": [0.9, 0.95]}, "n": n});
        let provenance = Provenance { stage: format!("s{n}"), kind: "sft".into(), settings: settings.clone(), ..Provenance::default() };
        let record = ActionRecord {
            format: ActionRecord::FORMAT,
            key: stage_key(n),
            full_key: settings,
            outputs: BTreeMap::from([("model".to_owned(), artifact.digest())]),
            metrics: BTreeMap::from([("loss".to_owned(), 0.1)]),
            records: BTreeMap::new(),
            provenance,
        };
        store.put_action(&record).unwrap();
    }
}

/// A store with so many stages, and as many data files beside it. Made in memory and copied, as fsync is not what is measured.
fn filled(folder: &Path, stages: usize) -> Store {
    let memory = tempfile::Builder::new().tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    fill(&Store::open(memory.path()).unwrap(), stages);
    fs::create_dir(folder).unwrap();
    assert!(Command::new("cp").arg("-r").arg(memory.path()).arg(folder.join("store")).status().unwrap().success());
    let data = folder.join("data");
    fs::create_dir(&data).unwrap();
    (0..stages).for_each(|n| fs::write(data.join(format!("{n}.txt")), format!("data {n}")).unwrap());
    // Until the times of files and folders are old enough to be believed.
    std::thread::sleep(Duration::from_secs(3));
    Store::open(&folder.join("store")).unwrap()
}

/// What planning asks of the store when everything is cached: what a stage's data file holds, and where its result is.
fn lookups(folder: &Path, stages: usize, mode: &str) {
    let start = Instant::now();
    let store = Store::open(&folder.join("store")).unwrap();
    if mode != "plain" {
        store.expect_lookups(stages);
    }
    let opened = start.elapsed();
    if mode != "outputs" {
        for n in 0..stages {
            store.file_digest(&folder.join(format!("data/{n}.txt"))).unwrap();
        }
    }
    let digested = start.elapsed();
    for n in 0..stages {
        store.outputs(stage_key(n)).unwrap().expect("everything is cached");
    }
    let found = start.elapsed();
    if mode == "artifacts" {
        for n in 0..stages {
            let outputs = store.outputs(stage_key(n)).unwrap().expect("everything is cached");
            assert!(outputs.values().all(|output| store.contains_artifact(*output)));
        }
    }
    let present = start.elapsed();
    drop(store);
    let parts = [opened, digested - opened, found - digested, present - found, start.elapsed() - present];
    println!("{}", parts.map(|part| part.as_secs_f64().to_string()).join(" "));
}

fn bench_lookups(folder: &Path, stages: usize) {
    drop(filled(folder, stages));
    for (mode, name) in [
        ("outputs", "results"),
        ("files", "data files, results"),
        ("artifacts", "data files, results, twice, with their blobs"),
        ("plain", "as \"data files, results\", not announced"),
        ("held", "the same while another process holds the index"),
    ] {
        let holder = (mode == "held").then(|| Store::open(&folder.join("store")).unwrap());
        holder.iter().for_each(|holder| holder.expect_lookups(1 << 20));
        let mut parts: Vec<Vec<f64>> = Vec::new();
        let mut run = || {
            let start = Instant::now();
            let mut command = Command::new(std::env::current_exe().unwrap());
            let output = command.arg("lookups").arg(folder).args([&stages.to_string(), mode]).output().unwrap();
            let time = start.elapsed();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            parts.push(String::from_utf8(output.stdout).unwrap().split_whitespace().map(|part| part.parse().unwrap()).collect());
            time
        };
        run();
        run();
        report(&format!("{stages} stages, a process: {name}"), (0..11).map(|_| run()).collect());
        let median = |at: usize| {
            let mut times: Vec<f64> = parts[2..].iter().map(|parts| parts[at] * 1e3).collect();
            times.sort_by(f64::total_cmp);
            times[times.len() / 2]
        };
        let [open, files, outputs, blobs, close] = [0, 1, 2, 3, 4].map(median);
        println!("    in ms: open {open:.2}, files {files:.2}, outputs {outputs:.2}, blobs {blobs:.2}, close {close:.2}");
    }
}

/// What is done now and then to a store with many actions.
fn bench_care(folder: &Path, stages: usize) {
    let store = filled(folder, stages);
    let keys: Vec<Digest> = (0..stages).map(stage_key).collect();
    let artifact = store.outputs(keys[0]).unwrap().unwrap()["model"];
    let measure = |name: &str, work: &dyn Fn(&Store)| {
        let time = |_| {
            // A process of its own would know nothing.
            let store = Store::open(store.folder()).unwrap();
            let start = Instant::now();
            work(&store);
            start.elapsed()
        };
        report(&format!("{stages} actions: {name}"), (0..5).map(time).collect());
    };
    measure("last_action of every stage", &|store| {
        (0..stages).for_each(|n| assert!(store.last_action("", &format!("s{n}"), "sft").unwrap().is_some()));
    });
    measure("record_use", &|store| assert!(store.record_use("workflow.toml", &keys).unwrap().is_some()));
    measure("begin_run", &|store| drop(store.begin_run(&json!({})).unwrap()));
    measure("all actions", &|store| assert_eq!(store.actions().unwrap().len(), stages));
    measure("lineage", &|store| assert_eq!(store.lineage(artifact).unwrap().len(), 1));
    measure("usage", &|store| assert_eq!(store.usage().unwrap().stages.len(), stages));
    measure("fsck", &|store| assert!(store.fsck(false).unwrap().is_clean()));
    let options = GcOptions { grace: Duration::ZERO, ..GcOptions::default() };
    measure("gc that keeps all", &|store| assert_eq!(store.gc(&options).unwrap().kept_blobs, 2 * stages));
}

fn bench_publish(folder: &Path) {
    let store = Store::open(folder).unwrap();
    let mut seed = 0_u64;
    let mut publish = |tensors: u64, bytes: usize| {
        let contents: Vec<Vec<u8>> = (0..tensors)
            .map(|_| {
                seed += 1;
                seed.to_le_bytes().into_iter().cycle().take(bytes).collect()
            })
            .collect();
        let start = Instant::now();
        let mut builder = store.artifact("policy");
        for (n, content) in contents.iter().enumerate() {
            builder.put_tensor(&format!("layer.{n}"), Dtype::U8, &[bytes as u64], content).unwrap();
        }
        builder.publish().unwrap();
        start.elapsed()
    };
    for (tensors, bytes) in [(1, 1 << 10), (60, 16 << 10), (200, 64 << 10), (200, 1 << 20)] {
        let times = (0..5).map(|_| publish(tensors, bytes)).collect();
        report(&format!("publish {tensors} tensors of {} KiB, durably", bytes >> 10), times);
    }
}

fn bench_large_file(folder: &Path) {
    let size: usize = std::env::var("RLFLOW_BENCH_BYTES").ok().and_then(|text| text.parse().ok()).unwrap_or(2_000_000_000);
    let store = Store::open(folder).unwrap();
    let other_folder = folder.with_extension("other");
    let (path, mut file) = store.scratch().unwrap();
    let mut block = vec![0_u8; 1 << 20];
    let mut left = size;
    let mut count = 0_u64;
    while left > 0 {
        count += 1;
        block.chunks_exact_mut(8).for_each(|chunk| chunk.copy_from_slice(&count.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()));
        let length = left.min(block.len());
        file.write_all(&block[..length]).unwrap();
        left -= length;
    }
    file.sync_all().unwrap();
    let gigabytes = size as f64 / 1e9;
    let mut times: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    let b3sum = |path: &Path| Command::new("b3sum").arg(path).output().is_ok_and(|output| output.status.success());
    let copy = folder.with_extension("users-own-file");
    fs::copy(&path, &copy).unwrap();
    for round in 0..6 {
        let mut measure = |name, work: &mut dyn FnMut()| {
            let start = Instant::now();
            work();
            // The first round reads what may not be in memory yet.
            if round > 0 {
                times.entry(name).or_default().push(start.elapsed().as_secs_f64());
            }
        };
        measure("a b3sum", &mut || {
            if !b3sum(&path) {
                std::hint::black_box(blake3::Hasher::new().update_mmap_rayon(&path).unwrap().finalize());
            }
        });
        // A store of its own each time, as digests are remembered and blobs shared.
        let other = Store::open(&other_folder).unwrap();
        measure("b file_digest", &mut || assert_eq!(other.file_digest(&path).unwrap().size_bytes, size as u64));
        let mut builder = store.artifact("text");
        measure("c put_file, linked", &mut || builder.put_file("data", &path).unwrap());
        measure("d publish after it: fsync", &mut || drop(std::mem::replace(&mut builder, other.artifact("text")).publish().unwrap()));
        measure("e put_file of a file that others may write to, reflinked or copied", &mut || builder.put_file("data", &copy).unwrap());
        drop(builder);
        drop(other);
        fs::remove_dir_all(&other_folder).unwrap();
        store.gc(&GcOptions { grace: Duration::ZERO, ..GcOptions::default() }).unwrap();
    }
    println!("hashing {gigabytes:.2} GB, beside {}", if b3sum(&path) { "b3sum" } else { "the blake3 crate (b3sum is not installed)" });
    let median = |times: &mut Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    let reference = median(times.get_mut("a b3sum").unwrap());
    for (name, times) in &mut times {
        let time = median(times);
        println!("{:<70} {:>7.1} ms  {:>5.2} GB/s  {:>4.0} % of b3sum", &name[2..], time * 1e3, gigabytes / time, reference / time * 100.0);
    }
    std::thread::sleep(Duration::from_secs(3));
    store.file_digest(&path).unwrap();
    drop(store);
    let start = Instant::now();
    Store::open(folder).unwrap().file_digest(&path).unwrap();
    println!("{:<70} {:>7.1} ms", "file_digest, remembered from an earlier process", start.elapsed().as_secs_f64() * 1e3);
    fs::remove_file(&path).unwrap();
}
