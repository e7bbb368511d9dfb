//! A manifest whose name fits its content, by `Store::open_artifact`.

use std::{fs, sync::LazyLock};

use rlflow_store::{Digest, Store};

use super::folder::FOLDER;

static STORE: LazyLock<Store> = LazyLock::new(|| {
    let store = Store::open(FOLDER.path()).expect("a store can be made");
    // The blob that the seeds name, and the empty one.
    store.put_blob(b"rlflow").expect("a blob can be written");
    store.put_blob(b"").expect("a blob can be written");
    store
});

/// Fails on a panic.
pub fn check(input: &[u8]) {
    let store = &*STORE;
    let digest = Digest::of(input);
    let folder = FOLDER.path().join(format!("manifests/{:02x}", digest.as_bytes()[0]));
    fs::create_dir_all(&folder).expect("a folder can be made");
    let path = folder.join(digest.to_string());
    fs::write(&path, input).expect("a file can be written");
    if let Ok(Some(artifact)) = store.open_artifact(digest) {
        let manifest = artifact.manifest();
        assert_eq!(manifest.entries.iter().map(|entry| entry.size_bytes).sum::<u64>(), manifest.size_bytes());
        for entry in &manifest.entries {
            assert!(entry.name.split('/').all(|part| !matches!(part, "" | "." | "..")), "{} leaves its artifact", entry.name);
            drop(artifact.read(&entry.name));
        }
    }
    drop(fs::remove_file(&path));
}
