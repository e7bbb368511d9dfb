use std::collections::BTreeMap;

use rlflow_store::{ActionRecord, Digest, LeaseHolder, Provenance, Store};
use serde_json::json;
use tempfile::TempDir;

/// A folder in memory where there is one: processes that are killed leave it as they would leave a disk, and fsync is free.
pub fn fast_folder() -> TempDir {
    let builder = || tempfile::Builder::new();
    builder().tempdir_in("/dev/shm").or_else(|_| builder().tempdir()).unwrap()
}

/// A store in a folder that goes away with the test. The name has a space and a non-ASCII letter, as users' paths do.
pub fn new_store() -> (TempDir, Store) {
    let folder = tempfile::Builder::new().prefix("rlflow störe ").tempdir().unwrap();
    let store = Store::open(&folder.path().join(".rlflow")).unwrap();
    (folder, store)
}

/// Like [`new_store`], in memory where possible.
pub fn fast_store() -> (TempDir, Store) {
    let folder = fast_folder();
    let store = Store::open(&folder.path().join("störe 1")).unwrap();
    (folder, store)
}

pub fn key(name: &str) -> Digest {
    Digest::of(name.as_bytes())
}

pub fn action(name: &str, outputs: &[(&str, Digest)]) -> ActionRecord {
    ActionRecord {
        format: ActionRecord::FORMAT,
        key: key(name),
        full_key: json!({"kind": "sft", "name": name}),
        outputs: outputs.iter().map(|(port, digest)| ((*port).to_owned(), *digest)).collect(),
        metrics: BTreeMap::from([("loss".into(), 0.5), ("ev".into(), f64::INFINITY)]),
        records: BTreeMap::new(),
        provenance: Provenance { stage: name.into(), kind: "sft".into(), workflow: "a.toml".into(), ..Provenance::default() },
    }
}

pub fn holder(stage: &str) -> LeaseHolder {
    LeaseHolder { host: "here".into(), pid: std::process::id(), run_id: "r".into(), stage: stage.into(), since: 0.0 }
}
