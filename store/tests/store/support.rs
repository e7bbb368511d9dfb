use std::{
    collections::BTreeMap,
    path::Path,
    process::{Command, Stdio},
};

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

/// A file system of its own, unmounted when dropped. `None` where this user may not mount one.
pub struct Mounted(TempDir);

impl Mounted {
    pub fn tmpfs(size_bytes: u64) -> Option<Self> {
        Self::mount(&["-t", "tmpfs", "-o", &format!("size={size_bytes}"), "tmpfs"])
    }

    /// One that can make reflinks, in a sparse file that is unlinked at once.
    pub fn with_reflinks() -> Option<Self> {
        let image = tempfile::NamedTempFile::new().ok()?;
        // The smallest that both make.
        image.as_file().set_len(512 << 20).ok()?;
        let path = image.path().to_str()?;
        let made = ["mkfs.btrfs", "mkfs.xfs"].into_iter().find(|make| quiet(Command::new(make).args(["-q", path])))?;
        let kind = made.strip_prefix("mkfs.")?;
        Self::mount(&["-t", kind, "-o", "loop", path])
    }

    fn mount(arguments: &[&str]) -> Option<Self> {
        let folder = tempfile::tempdir().ok()?;
        quiet(Command::new("mount").args(arguments).arg(folder.path())).then_some(Self(folder))
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Changes its options while it is in use.
    pub fn remount(&self, options: &str) {
        assert!(
            quiet(Command::new("mount").args(["-o", &format!("remount,{options}")]).arg(self.path())),
            "remounting with {options} failed"
        );
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Lazily, so that a file that is still open does not keep it for ever.
        quiet(Command::new("umount").arg("-l").arg(self.path()));
    }
}

fn quiet(command: &mut Command) -> bool {
    command.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}
