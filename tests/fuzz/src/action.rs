//! An action file, by `Store::action`. Inputs that begin with `{` are sealed first, so that what is behind the seal is reached.

use std::{fs, sync::LazyLock};

use rlflow_store::{Digest, Store};

use super::folder::FOLDER;

static STORE: LazyLock<Store> = LazyLock::new(|| Store::open(FOLDER.path()).expect("a store can be made"));

/// Fails on a panic.
pub fn check(input: &[u8]) {
    let store = &*STORE;
    // The key that the seeds have.
    let key = Digest::of(b"fuzz");
    let mut content = Vec::new();
    if input.first() == Some(&b'{') {
        content.extend(format!("rlflow-action 1 {}\n", Digest::of(input)).into_bytes());
    }
    content.extend_from_slice(input);
    let folder = FOLDER.path().join(format!("actions/{:02x}", key.as_bytes()[0]));
    fs::create_dir_all(&folder).expect("a folder can be made");
    let path = folder.join(key.to_string());
    fs::write(&path, content).expect("a file can be written");
    if let Ok(Some(record)) = store.action(key) {
        assert_eq!(record.key, key, "an action under another's name");
    }
    drop(fs::remove_file(&path));
    drop(fs::remove_dir_all(FOLDER.path().join("damaged")));
}
