//! Processes killed at every step of the write path, and disks that are full there: what is found afterwards is right.

use std::{
    os::unix::process::ExitStatusExt,
    path::Path,
    process::{Command, Output},
    time::Duration,
};

use rlflow_store::{Digest, Dtype, FAULT_POINTS, GcOptions, LeaseOutcome, Result, Retain, SnapshotLimit, Store};
use serde_json::json;

use crate::{
    forks::{output, spawn},
    support::{action, fast_folder, holder, key},
};

pub const STAGES: [&str; 3] = ["tokenizer", "base", "sft"];

/// Weights of a stage: the first tensor is shared by all stages.
fn tensors(stage: &str) -> Vec<(String, Vec<u8>)> {
    let own = |name: &str, size: usize| (name.to_owned(), stage.bytes().cycle().take(size).collect());
    vec![("embed".into(), vec![7; 4096]), own("layer.0", 300_000), own("layer.1", 10)]
}

/// What a run does, stage by stage: takes the lease, snapshots thrice, publishes, records, lets go; collects at the end.
fn work(folder: &Path) -> Result<()> {
    let store = Store::open(folder)?;
    let run = store.begin_run(&json!({"event": "started"}))?;
    let keys: Vec<Digest> = STAGES.iter().map(|stage| key(stage)).collect();
    store.record_use("a.toml", &keys)?;
    store.expect_lookups(10_000);
    for stage in STAGES {
        let is_cached = || -> Result<bool> {
            let outputs = store.outputs(key(stage))?;
            Ok(outputs.is_some_and(|outputs| outputs.values().all(|output| store.contains_artifact(*output))))
        };
        let _lease = loop {
            if is_cached()? {
                break None;
            }
            if let LeaseOutcome::Acquired(lease) = store.lease(key(stage), &holder(stage))? {
                break Some(lease);
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        // Its last owner may have finished between our looking and our taking the lease.
        if is_cached()? {
            continue;
        }
        let snapshots = store.snapshots(key(&format!("{stage} prefix")));
        for step in [10_u8, 20, 30] {
            let mut state = snapshots.builder();
            state.put_tensor("moments", Dtype::U8, &[100_000], &[step; 100_000])?;
            state.put("record.json", &[step])?;
            snapshots.save(u64::from(step), Retain::Latest, json!({"steps": 20}), state, SnapshotLimit::default())?;
        }
        let mut builder = store.artifact("policy");
        for (name, content) in tensors(stage) {
            builder.put_tensor(&name, Dtype::U8, &[content.len() as u64], &content)?;
        }
        let artifact = builder.publish()?;
        let mut record = action(stage, &[("model", artifact.digest())]);
        record.records.insert("series".into(), store.put_blob(format!("series of {stage}").as_bytes())?);
        store.put_action(&record)?;
        run.append(&json!({"event": "finished", "stage": stage}))?;
    }
    run.sync()?;
    for stage in STAGES {
        assert!(store.outputs(key(stage))?.is_some_and(|outputs| outputs.values().all(|output| store.contains_artifact(*output))));
    }
    // As a user would beside a live run; what is young stays.
    store.gc(&GcOptions { grace: Duration::from_secs(3600), ..GcOptions::default() })?;
    Ok(())
}

/// Asserts that whatever is found is right, and returns how many stages are hits.
pub fn verify(folder: &Path) -> usize {
    let store = Store::open(folder).unwrap();
    let mut hits = 0;
    for stage in STAGES {
        if let Some(record) = store.action(key(stage)).unwrap() {
            let artifact = store.open_artifact(record.outputs["model"]).unwrap().expect("an action without its artifact");
            for (name, content) in tensors(stage) {
                assert_eq!(&*artifact.read(&name).unwrap(), &*content);
            }
            assert_eq!(&*store.blob(record.records["series"]).unwrap().unwrap(), format!("series of {stage}").as_bytes());
            hits += 1;
        }
        assert_eq!(store.lease_holder(key(stage)).unwrap(), None, "a dead process holds a lease");
        let snapshots = store.snapshots(key(&format!("{stage} prefix")));
        for snapshot in snapshots.list().unwrap() {
            let state = snapshots.open(&snapshot).unwrap();
            assert_eq!(&*state.read("moments").unwrap(), &[snapshot.step as u8; 100_000]);
        }
    }
    let report = store.fsck(false).unwrap();
    assert!(report.is_clean(), "{:?}", report.problems);
    hits
}

/// Not a test of its own: what the children of the tests below run.
#[test]
fn child() {
    if let Some(folder) = std::env::var_os("RLFLOW_TEST_CHILD")
        && let Err(error) = work(Path::new(&folder))
    {
        println!("failed: {error}");
    }
}

/// Runs [`work`] in a process of its own.
pub fn run_child(folder: &Path, fault: Option<&str>) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["crash::child", "--exact", "--nocapture"]).env("RLFLOW_TEST_CHILD", folder).env_remove("RLFLOW_FAULT");
    if let Some(fault) = fault {
        command.env("RLFLOW_FAULT", fault);
    }
    output(&mut command).unwrap()
}

#[test]
fn a_process_killed_at_any_step_leaves_no_wrong_hit() {
    let mut killed = 0;
    for point in FAULT_POINTS {
        let mut struck = false;
        for count in [1, 3, 8] {
            let folder = fast_folder();
            let output = run_child(folder.path(), Some(&format!("{point}:{count}")));
            if output.status.signal() != Some(9) {
                assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
                continue;
            }
            struck = true;
            killed += 1;
            let before = verify(folder.path());
            let again = run_child(folder.path(), None);
            let stdout = String::from_utf8_lossy(&again.stdout).into_owned();
            assert!(again.status.success() && !stdout.contains("failed: "), "after {point}:{count}: {stdout}");
            assert!(before <= STAGES.len());
            assert_eq!(verify(folder.path()), STAGES.len(), "after {point}:{count}");
            let store = Store::open(folder.path()).unwrap();
            store.gc(&GcOptions { grace: Duration::ZERO, ..GcOptions::default() }).unwrap();
            assert_eq!(verify(folder.path()), STAGES.len(), "after {point}:{count} and gc");
            let left = std::fs::read_dir(folder.path().join("tmp")).unwrap().count();
            assert_eq!(left, 0, "gc left temporary files of a dead process");
            let leases = std::fs::read_dir(folder.path().join("leases")).unwrap().count();
            assert_eq!(leases, 0, "gc left leases of a dead process");
        }
        assert!(struck, "no child reached {point}");
    }
    assert!(killed > FAULT_POINTS.len());
}

#[test]
fn a_full_disk_is_an_error_and_the_next_run_continues() {
    for point in FAULT_POINTS {
        let folder = fast_folder();
        let output = run_child(folder.path(), Some(&format!("{point}:2:full")));
        let stdout = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{point}: {stdout}{}", String::from_utf8_lossy(&output.stderr));
        if let Some(message) = stdout.lines().find_map(|line| line.split_once("failed: ")) {
            assert!(message.1.starts_with("cannot ") && message.1.contains("no storage space"), "{point}: {}", message.1);
        }
        verify(folder.path());
        run_child(folder.path(), None);
        assert_eq!(verify(folder.path()), STAGES.len(), "after {point}");
    }
}

#[test]
fn processes_that_overlap_share_the_work_beside_a_collection() {
    for _ in 0..5 {
        let folder = fast_folder();
        let path = folder.path().join("store");
        let spawn = || {
            let mut command = Command::new(std::env::current_exe().unwrap());
            command.args(["crash::child", "--exact", "--nocapture"]).env("RLFLOW_TEST_CHILD", &path).env_remove("RLFLOW_FAULT");
            spawn(command.stdout(std::process::Stdio::piped())).unwrap()
        };
        let mut children: Vec<_> = (0..4).map(|_| spawn()).collect();
        while children.iter_mut().any(|child| child.try_wait().unwrap().is_none()) {
            if let Ok(store) = Store::open(&path) {
                store.gc(&GcOptions { grace: Duration::from_secs(3600), ..GcOptions::default() }).unwrap();
            }
        }
        for child in children {
            let output = child.wait_with_output().unwrap();
            let stdout = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success() && !stdout.contains("failed: "), "{stdout}");
        }
        assert_eq!(verify(&path), STAGES.len());
        let runs = Store::open(&path).unwrap().runs().unwrap();
        assert_eq!(runs.len(), 4);
        let events: String = runs.iter().map(|run| std::fs::read_to_string(run.join("events.jsonl")).unwrap()).collect();
        for stage in STAGES {
            let finished = events.matches(&format!("\"stage\":\"{stage}\"")).count();
            assert_eq!(finished, 1, "{stage} was made {finished} times");
        }
    }
}
