//! Disks that are really full, at whatever write comes then, or really read-only.

use rlflow_store::{Store, StoreError};

use crate::{
    crash::{STAGES, run_child, verify},
    mounted::Mounted,
};

/// KiB by which the disk grows between two runs; smaller steps meet more writes, but the record of each run takes 4.
fn step() -> u64 {
    std::env::var("RLFLOW_FULL_DISK_STEP").ok().and_then(|text| text.parse().ok()).unwrap_or(32)
}

#[test]
fn each_run_on_a_full_disk_keeps_what_it_finished_and_says_why_it_stopped() {
    let mut size = 8;
    let Some(disk) = Mounted::tmpfs(size << 10) else {
        return println!("skipped: no tmpfs can be mounted here (needs root)");
    };
    let store = disk.path().join("store");
    let (mut finished, mut refused) = (0, 0);
    loop {
        let output = run_child(&store, None);
        let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{size} KiB: {stdout}{stderr}");
        let failure = stdout.lines().find_map(|line| line.split_once("failed: ")).map(|(_, message)| message.to_owned());
        if let Some(message) = &failure {
            assert!(message.starts_with("cannot ") && message.contains("No space left on device"), "{size} KiB: {message}");
            refused += 1;
        }
        if store.join("VERSION").exists() {
            let found = verify(&store);
            assert!(found >= finished, "{size} KiB: a finished result was lost");
            finished = found;
            let left = store.join("tmp").read_dir().map_or(0, Iterator::count);
            assert_eq!(left, 0, "{size} KiB: temporary files take up room");
            let set_aside = store.read_dir().unwrap().filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().contains("bad"));
            assert_eq!(set_aside.count(), 0, "{size} KiB: a full disk was taken for a damaged index");
        }
        if failure.is_none() {
            break;
        }
        size += step();
        assert!(size < 32 << 10, "the work never fits");
        disk.remount(&format!("size={size}k"));
    }
    assert_eq!(finished, STAGES.len());
    assert!(refused > 10, "the disk was full only {refused} times");
}

#[test]
fn a_read_only_file_system_serves_hits_and_refuses_the_rest() {
    let Some(disk) = Mounted::tmpfs(16 << 20) else {
        return println!("skipped: no tmpfs can be mounted here (needs root)");
    };
    let path = disk.path().join("store");
    assert!(run_child(&path, None).status.success());
    disk.remount("ro");
    assert_eq!(verify(&path), STAGES.len());
    let store = Store::open(&path).unwrap();
    assert!(store.is_read_only());
    store.expect_lookups(100_000);
    assert_eq!(store.index_damage(), None);
    let errors = [store.put_blob(b"new").unwrap_err(), Store::open(&disk.path().join("another")).err().unwrap()];
    for error in errors {
        assert!(matches!(error, StoreError::Io { .. }) && error.to_string().contains("Read-only file system"), "{error}");
    }
}
