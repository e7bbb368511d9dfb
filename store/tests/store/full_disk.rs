//! A disk that is really full, at whatever write comes then.

use std::process::Command;

use crate::{
    crash::{STAGES, run_child, verify},
    support::Mounted,
};

/// KiB by which the disk grows between two runs; smaller steps meet more writes.
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
        let grown = Command::new("mount").args(["-o", &format!("remount,size={size}k")]).arg(disk.path()).status();
        assert!(grown.unwrap().success());
    }
    assert_eq!(finished, STAGES.len());
    assert!(refused > 10, "the disk was full only {refused} times");
}
