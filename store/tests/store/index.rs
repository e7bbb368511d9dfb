//! The index is a cache: damaged, deleted or held by another process, the answers stay the same.

use std::{
    fs,
    path::{Path, PathBuf},
};

use rlflow_store::{Digest, Store};
use tempfile::TempDir;

use crate::support::{action, key, new_store};

const STAGES: usize = 40;

/// A store whose index knows everything.
fn filled() -> (TempDir, PathBuf) {
    let (folder, store) = new_store();
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
    for _ in 0..2 {
        answers(&path, true);
    }
    (folder, path)
}

/// Everything that lookups say.
fn answers(path: &Path, with_index: bool) -> Vec<(Option<Digest>, bool, Option<Digest>)> {
    let store = Store::open(path).unwrap();
    if with_index {
        store.expect_lookups(100_000);
    }
    (0..STAGES + 1)
        .map(|n| {
            let output = store.outputs(key(&format!("stage {n}"))).unwrap().map(|outputs| outputs["model"]);
            let present = output.is_some_and(|output| store.contains_artifact(output));
            let last = store.last_action("a.toml", &format!("stage {n}"), "sft").unwrap();
            (output, present, last.map(|record| record.key))
        })
        .collect()
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

#[test]
fn damage_to_any_of_its_files_changes_no_answer() {
    let (folder, path) = filled();
    let expected = answers(&path, false);
    assert!(expected[..STAGES].iter().all(|(output, present, last)| output.is_some() && *present && last.is_some()));
    let index = path.join("index");
    let good = folder.path().join("good index");
    copy(&index, &good);
    let names: Vec<PathBuf> = files(&good).iter().map(|file| file.strip_prefix(&good).unwrap().to_owned()).collect();
    assert!(names.len() >= 3, "{names:?}");
    let trials: u64 = std::env::var("RLFLOW_INDEX_TRIALS").ok().and_then(|text| text.parse().ok()).unwrap_or(5);
    for name in &names {
        for damage in ["truncated", "zeroed page", "flipped byte", "deleted"] {
            // Without a seal, as a killed process leaves it, sled's own checks have to do.
            for sealed in [true, false] {
                for trial in 0..trials {
                    let _ = fs::remove_dir_all(&index);
                    copy(&good, &index);
                    if !sealed {
                        let _ = fs::remove_file(index.join("SEAL"));
                    }
                    let file = index.join(name);
                    let Ok(mut bytes) = fs::read(&file) else { continue };
                    let mut state = trial;
                    let at = random(&mut state) % bytes.len().max(1);
                    match damage {
                        "truncated" => bytes.truncate(at),
                        "zeroed page" => {
                            let start = at & !4095;
                            let end = (start + 4096).min(bytes.len());
                            bytes[start..end].fill(0);
                        }
                        "flipped byte" if !bytes.is_empty() => bytes[at] ^= 1 << (random(&mut state) % 8),
                        _ => {}
                    }
                    if damage == "deleted" {
                        fs::remove_file(&file).unwrap()
                    } else {
                        fs::write(&file, &bytes).unwrap()
                    }
                    let found = answers(&path, true);
                    assert_eq!(found, expected, "{} {damage}, trial {trial}, sealed {sealed}", name.display());
                }
            }
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
    let store = Store::open(&path).unwrap();
    store.expect_lookups(100_000);
    let other = Store::open(&path).unwrap();
    // The other store object finds the index taken, and writes past it.
    other.expect_lookups(100_000);
    let replaced = action("stage 3", &[("model", key("another artifact"))]);
    other.put_action(&replaced).unwrap();
    assert_eq!(store.outputs(key("stage 3")).unwrap(), Some(replaced.outputs));
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
    let (folder, store) = new_store();
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
