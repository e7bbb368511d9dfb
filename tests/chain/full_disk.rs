//! A disk that is full, at whatever write comes then: told, nothing lost, and the next run goes on from there.

use std::collections::BTreeSet;

use crate::{
    fixture::{Finished, Fixture},
    mounted::Mounted,
};

/// KiB by which the disk grows after every run that it was too small for.
const STEP: u64 = 256;

#[test]
fn what_a_full_disk_stops_goes_on_when_there_is_room() {
    let mut size = 16;
    let Some(disk) = Mounted::tmpfs(size << 10) else {
        return println!("skipped: no tmpfs can be mounted here (needs root)");
    };
    let fixture = Fixture::new();
    let sets = ["pretrain", "sft", "reward_model", "ppo", "dpo"].map(|stage| format!("stage.{stage}.snapshot_every=1"));
    let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
    let whole = fixture.run("whole", &sets).succeeded();
    let folder = disk.path().join("store");
    let store = folder.to_str().unwrap();
    let (mut finished, mut refused) = (BTreeSet::new(), 0);
    let last = loop {
        let run = Finished::of(fixture.command(store, &sets).output().unwrap());
        let again: Vec<_> = run.ran().intersection(&finished).cloned().collect();
        assert!(again.is_empty(), "{size} KiB: {again:?} had finished and ran again");
        finished.extend(run.with_status(&["cached", "ran", "resumed"]));
        if run.code == Some(0) {
            break run;
        }
        let told = format!("{}{}", String::from_utf8_lossy(&run.output.stdout), String::from_utf8_lossy(&run.output.stderr));
        assert!(told.contains("No space left on device"), "{size} KiB, exit {:?}: {told}", run.code);
        refused += 1;
        size += STEP;
        assert!(size < 256 << 10, "the work never fits");
        disk.remount(&format!("size={size}k"));
        if folder.join("VERSION").exists() {
            let checked = fixture.on_store(store, &["fsck"]);
            assert!(checked.status.success(), "{size} KiB: {}", String::from_utf8_lossy(&checked.stdout));
        }
    };
    assert!(refused > 3, "the disk was full only {refused} times");
    assert_eq!(last.outputs(), whole.outputs());
    println!("full {refused} times");
}
