//! The index is a cache: damaged, deleted or held by another process, the answers stay the same.

use std::{
    collections::BTreeMap,
    fmt::Debug,
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use rlflow_store::{Digest, Store};
use tempfile::TempDir;
use tracing::{
    Event, Level, Metadata,
    field::Field,
    span::{Attributes, Id, Record},
};

use crate::{
    forks::no_forks,
    support::{action, fast_store, key},
};

const STAGES: usize = 40;

/// A store whose index knows everything.
fn filled() -> (TempDir, PathBuf) {
    let (folder, store) = fast_store();
    let path = store.folder().to_owned();
    for n in 0..STAGES {
        let mut builder = store.artifact("text");
        builder.put("a", format!("content {}", n / 2).as_bytes()).unwrap();
        let artifact = builder.publish().unwrap();
        let mut record = action(&format!("stage {n}"), &[("model", artifact.digest())]);
        record.provenance.started_at = n as f64;
        store.put_action(&record).unwrap();
    }
    drop(store);
    // sled writes its `snap` file when it opens what it has already written down, which takes two rounds or three.
    for _ in 0..20 {
        answers(&path, true);
        if files(&path.join("index")).iter().any(|file| file.file_name().unwrap().to_string_lossy().starts_with("snap")) {
            break;
        }
    }
    (folder, path)
}

type Answers = Vec<(Option<Digest>, bool, Option<Digest>)>;

/// Everything that lookups say.
fn answers(path: &Path, with_index: bool) -> Answers {
    ask(path, with_index).0
}

/// Everything that lookups say, and what the store found wrong with its index.
fn ask(path: &Path, with_index: bool) -> (Answers, Option<String>) {
    // A store that does not get the index's lock answers from files.
    let _alone = no_forks();
    let store = Store::open(path).unwrap();
    if with_index {
        store.expect_lookups(100_000);
    }
    let answer = |n: usize| {
        let output = store.outputs(key(&format!("stage {n}"))).unwrap().map(|outputs| outputs["model"]);
        let present = output.is_some_and(|output| store.contains_artifact(output));
        let last = store.last_action("a.toml", &format!("stage {n}"), "sft").unwrap();
        (output, present, last.map(|record| record.key))
    };
    ((0..STAGES + 1).map(answer).collect(), store.index_damage().map(str::to_owned))
}

/// Counts warnings that the index was rebuilt.
#[derive(Default, Clone)]
struct Warnings(Arc<AtomicUsize>);

impl tracing::Subscriber for Warnings {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= Level::WARN
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        event.record(&mut |_: &Field, value: &dyn Debug| {
            self.0.fetch_add(usize::from(format!("{value:?}").starts_with("index was rebuilt")), Ordering::Relaxed);
        });
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap()) {
        if entry.file_type().unwrap().is_dir() { files.extend(self::files(&entry.path())) } else { files.push(entry.path()) }
    }
    files.sort();
    files
}

fn copy(from: &Path, to: &Path) {
    for file in files(from) {
        let target = to.join(file.strip_prefix(from).unwrap());
        fs::create_dir_all(target.parent().unwrap()).unwrap();
        fs::copy(&file, &target).unwrap();
    }
}

/// SplitMix64, so that every trial can be repeated.
fn random(state: &mut u64) -> usize {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z ^ (z >> 31)) as usize
}

/// How often each damage is done to each file, with and without a seal: 100 times is `RLFLOW_INDEX_TRIALS=100`.
fn trials() -> u64 {
    std::env::var("RLFLOW_INDEX_TRIALS").ok().and_then(|text| text.parse().ok()).unwrap_or(5)
}

/// Does one damage to a file, at a place that `state` decides. False if that changed nothing.
fn harm(file: &Path, damage: &str, state: &mut u64) -> bool {
    let old = fs::read(file).unwrap();
    let mut bytes = old.clone();
    // Most of sled's file is empty; damage there would change nothing, or nothing that matters.
    let filled: Vec<usize> = (0..old.len()).filter(|at| old[*at] != 0).collect();
    let at = filled.get(random(state) % filled.len().max(1)).copied().unwrap_or(0);
    match damage {
        "truncated" => bytes.truncate(at),
        "zeroed page" => {
            let start = at & !4095;
            let end = (start + 4096).min(bytes.len());
            bytes[start..end].fill(0);
        }
        "flipped byte" if !bytes.is_empty() => bytes[at] ^= 1 << (random(state) % 8),
        "deleted" => {
            fs::remove_file(file).unwrap();
            return true;
        }
        _ => {}
    }
    fs::write(file, &bytes).unwrap();
    bytes != old
}

#[test]
fn damage_to_any_of_its_files_changes_no_answer_and_is_said_once() {
    let (folder, path) = filled();
    let expected = answers(&path, false);
    assert!(expected[..STAGES].iter().all(|(output, present, last)| output.is_some() && *present && last.is_some()));
    let index = path.join("index");
    let good = folder.path().join("good index");
    copy(&index, &good);
    let names: Vec<PathBuf> = files(&good).iter().map(|file| file.strip_prefix(&good).unwrap().to_owned()).collect();
    for needed in ["conf", "db", "SEAL"] {
        assert!(names.iter().any(|name| name == Path::new(needed)), "{names:?}");
    }
    for name in &names {
        for damage in ["truncated", "zeroed page", "flipped byte", "deleted"] {
            let (mut done, mut found) = (0, 0);
            for trial in 0..2 * trials() {
                // Without a seal, as a killed process leaves it, sled's own checks and those of the values have to do.
                let is_seal = *name == Path::new("SEAL");
                let is_sealed = trial % 2 == 0 || is_seal;
                let context = format!("{} {damage}, trial {trial}, sealed {is_sealed}", name.display());
                let _ = fs::remove_dir_all(&index);
                copy(&good, &index);
                if !is_sealed {
                    fs::remove_file(index.join("SEAL")).unwrap();
                }
                let is_harmed = harm(&index.join(name), damage, &mut (trial / 2));
                let warnings = Warnings::default();
                let (given, said) = tracing::subscriber::with_default(warnings.clone(), || ask(&path, true));
                assert_eq!(given, expected, "{context}");
                let warned = warnings.0.load(Ordering::Relaxed);
                assert_eq!(warned, usize::from(said.is_some()), "{context}: {said:?}");
                // A seal that is none any more, as a full disk leaves it, says nothing about the rest.
                assert!(said.is_some() == is_harmed || !is_sealed || is_seal, "{context}: {said:?}");
                done += u64::from(is_harmed);
                found += u64::from(said.is_some());
                if trial < 2 {
                    let (again, said) = ask(&path, true);
                    assert_eq!((again, said), (expected.clone(), None), "{context}, opened again");
                }
            }
            println!("{:<28} {damage:<12} changed it {done:>3} times, reported {found:>3} times", name.display());
        }
    }
}

#[test]
fn damage_is_set_aside_and_the_index_filled_again() {
    let (_folder, path) = filled();
    let bad = || files(&path).iter().filter(|file| file.to_string_lossy().contains("index.bad-")).count();
    assert_eq!(bad(), 0, "an intact index was set aside");
    let db = path.join("index/db");
    let mut bytes = fs::read(&db).unwrap();
    bytes[1000] ^= 1;
    fs::write(&db, bytes).unwrap();
    answers(&path, true);
    let after = bad();
    assert!(after > 0);
    answers(&path, true);
    assert_eq!(bad(), after, "the new index was set aside too");
    fs::remove_dir_all(path.join("index")).unwrap();
    assert_eq!(answers(&path, true), answers(&path, false));
}

#[test]
fn it_is_believed_only_about_the_files_that_it_was_filled_from() {
    let (_folder, path) = filled();
    let _alone = no_forks();
    let store = Store::open(&path).unwrap();
    store.expect_lookups(100_000);
    let other = Store::open(&path).unwrap();
    // The other store object finds the index taken, and writes past it.
    other.expect_lookups(100_000);
    let replaced = action("stage 3", &[("model", key("another artifact"))]);
    other.put_action(&replaced).unwrap();
    assert_eq!(store.outputs(key("stage 3")).unwrap().as_deref(), Some(&replaced.outputs));
    // What was just looked at is believed for a moment, and no longer.
    let replaced = action("stage 3", &[("model", key("a third artifact"))]);
    other.put_action(&replaced).unwrap();
    let asked = Instant::now();
    while store.outputs(key("stage 3")).unwrap().as_deref() != Some(&replaced.outputs) {
        assert!(asked.elapsed() < Duration::from_secs(10), "an action that another process wrote is never seen");
    }
    store.put_action(&action("stage 3", &[])).unwrap();
    assert_eq!(store.outputs(key("stage 3")).unwrap().as_deref(), Some(&BTreeMap::new()), "our own action is not seen at once");
    let hex = key("stage 4").to_string();
    fs::remove_file(path.join("actions").join(&hex[..2]).join(&hex)).unwrap();
    assert_eq!(store.outputs(key("stage 4")).unwrap(), None);
    let artifact = store.outputs(key("stage 6")).unwrap().unwrap()["model"];
    assert!(store.contains_artifact(artifact));
    let blob = Digest::of(b"content 3").to_string();
    fs::remove_file(path.join("blobs").join(&blob[..2]).join(&blob)).unwrap();
    assert!(!store.contains_artifact(artifact));
}

#[test]
fn file_digests_follow_the_content() {
    let (folder, store) = fast_store();
    let file = folder.path().join("data \u{e9}.txt");
    let mut content = vec![b'a'; 9 << 20];
    fs::write(&file, &content).unwrap();
    assert_eq!(store.file_digest(&file).unwrap().digest, Digest::of(&content));
    // Same size, written at once: only times could tell, and they are too young to be believed.
    content[5] = b'b';
    fs::write(&file, &content).unwrap();
    assert_eq!(store.file_digest(&file).unwrap().digest, Digest::of(&content));
    let old = std::time::SystemTime::now() - std::time::Duration::from_secs(3600);
    fs::File::options().write(true).open(&file).unwrap().set_modified(old).unwrap();
    assert_eq!(store.file_digest(&file).unwrap().digest, Digest::of(&content));
    drop(store.clone());
    let again = Store::open(store.folder()).unwrap();
    assert_eq!(again.file_digest(&file).unwrap().digest, Digest::of(&content));
    assert!(store.file_digest(folder.path()).unwrap_err().to_string().contains("directory"));
    assert!(store.file_digest(&folder.path().join("nothing")).is_err());
}
