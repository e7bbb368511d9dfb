//! What the store costs: `cargo bench -p rlflow-store --bench store [-- cached|publish|file]`.
//!
//! Lookups are measured as whole processes, as `rlflow plan` with everything cached is. Each number is the median and
//! the best of several runs. `RLFLOW_BENCH_BYTES` sets the size of the large file (2 GB if unset).

use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use rlflow_store::{ActionRecord, Digest, Dtype, Provenance, Store};
use serde_json::json;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, child, folder, stages, mode] = &arguments[..]
        && child == "lookups"
    {
        return lookups(Path::new(folder), stages.parse().unwrap(), mode);
    }
    if let [_, child, folder, stages] = &arguments[..]
        && child == "fill"
    {
        return fill(&Store::open(Path::new(folder)).unwrap(), stages.parse().unwrap());
    }
    let wanted = |name: &str| arguments[1..].iter().all(|argument| argument.starts_with("--") || argument == name);
    let folder = tempfile::tempdir().unwrap();
    if wanted("cached") {
        for stages in [7, 1_000, 10_000] {
            bench_lookups(&folder.path().join(stages.to_string()), stages);
        }
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

/// What planning asks of the store when everything is cached.
fn lookups(folder: &Path, stages: usize, mode: &str) {
    let store = Store::open(folder).unwrap();
    if mode == "announced" {
        store.expect_lookups(stages);
    }
    for n in 0..stages {
        let outputs = store.outputs(stage_key(n)).unwrap().expect("everything is cached");
        assert!(outputs.values().all(|output| store.contains_artifact(*output)));
    }
    if mode == "exit" {
        std::process::exit(0);
    }
}

fn bench_lookups(folder: &Path, stages: usize) {
    let store = Store::open(folder).unwrap();
    fill(&store, stages);
    // Until the folders' times are old enough to be believed.
    std::thread::sleep(Duration::from_secs(3));
    drop(store);
    for (mode, name) in
        [("announced", "index"), ("plain", "index opened when it pays"), ("exit", "same, without closing"), ("held", "files only")]
    {
        let held = (mode == "held").then(|| {
            let holder = Store::open(folder).unwrap();
            holder.expect_lookups(1 << 20);
            holder
        });
        let run = || {
            let start = Instant::now();
            let status =
                Command::new(std::env::current_exe().unwrap()).args(["lookups"]).arg(folder).args([&stages.to_string(), mode]).status();
            assert!(status.unwrap().success());
            start.elapsed()
        };
        run();
        run();
        report(&format!("{stages} cached stages, a process: {name}"), (0..11).map(|_| run()).collect());
        drop(held);
    }
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
    let rate = |name: &str, time: Duration| println!("{name:<58} {:>9.3?}  {:.2} GB/s", time, gigabytes / time.as_secs_f64());

    for _ in 0..3 {
        let start = Instant::now();
        match Command::new("b3sum").arg(&path).output() {
            Ok(output) if output.status.success() => rate("b3sum of a large file", start.elapsed()),
            _ => println!("b3sum is not installed"),
        }
        // A store object of its own each time: digests are remembered.
        let start = Instant::now();
        let other = Store::open(&other_folder).unwrap();
        other.file_digest(&path).unwrap();
        rate("file_digest of the same file, first time", start.elapsed());
        let mut builder = store.artifact("text");
        let start = Instant::now();
        builder.put_file("data", &path).unwrap();
        rate("put_file of the same file, linked", start.elapsed());
        let copy = folder.with_extension("users-own-file");
        let _ = fs::remove_file(&copy);
        fs::hard_link(&path, &copy).unwrap();
        let mut builder = store.artifact("text");
        let start = Instant::now();
        builder.put_file("data", &copy).unwrap();
        rate("put_file of a file that others may write to, copied", start.elapsed());
        fs::remove_dir_all(&other_folder).unwrap();
    }
    std::thread::sleep(Duration::from_secs(3));
    store.file_digest(&path).unwrap();
    drop(store);
    let start = Instant::now();
    Store::open(folder).unwrap().file_digest(&path).unwrap();
    rate("file_digest, remembered from an earlier process", start.elapsed());
    fs::remove_file(&path).unwrap();
}
