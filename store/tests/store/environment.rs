//! Users' machines: read-only stores, strict umasks, processes killed while they hold something.

use std::{
    fs,
    os::unix::{
        fs::PermissionsExt,
        process::{CommandExt, ExitStatusExt},
    },
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use rlflow_store::{Digest, GcOptions, LeaseOutcome, Store, StoreError};
use serde_json::json;

use crate::{
    crash::verify,
    forks::{output, spawn},
    support::{action, fast_folder, holder, key},
};

/// This test binary, running one test in a child process.
fn child(test: &str, folder: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([test, "--exact", "--nocapture"]).env_remove("RLFLOW_FAULT").env("RLFLOW_TEST_FOLDER", folder);
    command
}

/// Not a test of its own: what the child of the test below runs.
#[test]
fn read_only_child() {
    let Some(folder) = std::env::var_os("RLFLOW_TEST_FOLDER") else { return };
    let store = Store::open(Path::new(&folder)).unwrap();
    assert!(store.is_read_only());
    store.expect_lookups(100_000);
    let outputs = store.outputs(key("sft")).unwrap().unwrap();
    assert!(store.contains_artifact(outputs["model"]));
    assert_eq!(&*store.open_artifact(outputs["model"]).unwrap().unwrap().read("a").unwrap(), b"content");
    assert!(store.last_action("a.toml", "sft", "sft").unwrap().is_some());
    store.record_use("a.toml", &[key("sft")]).unwrap();
    let run = store.begin_run(&json!({})).unwrap();
    run.append(&json!({})).unwrap();
    run.sync().unwrap();
    assert!(store.fsck(true).unwrap().is_clean());
    assert_eq!(store.lease_holder(key("sft")).unwrap(), None);
    for error in [
        store.put_blob(b"new").unwrap_err(),
        store.put_action(&action("new", &[])).unwrap_err(),
        store.lease(key("new"), &holder("new")).err().unwrap(),
        store.gc(&GcOptions::default()).unwrap_err(),
    ] {
        let text = error.to_string();
        assert!(matches!(error, StoreError::Io { .. }) && text.contains("ermission denied") && text.contains("cannot create"), "{text}");
    }
    println!("read-only store served");
}

#[test]
fn a_read_only_store_serves_hits() {
    let folder = fast_folder();
    let path = folder.path().join("store");
    let store = Store::open(&path).unwrap();
    let mut builder = store.artifact("text");
    builder.put("a", b"content").unwrap();
    let artifact = builder.publish().unwrap();
    store.put_action(&action("sft", &[("model", artifact.digest())])).unwrap();
    drop(store);
    fn seal(path: &Path, mode: u32) {
        for entry in fs::read_dir(path).unwrap().map(|entry| entry.unwrap()).filter(|entry| entry.path().is_dir()) {
            seal(&entry.path(), mode);
        }
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }
    seal(folder.path(), 0o555);
    let mut command = child("environment::read_only_child", &path);
    if rustix::process::geteuid().is_root() {
        // Permissions do not bind root.
        command.uid(65534).gid(65534);
    }
    match output(&mut command) {
        Ok(output) => {
            let stdout = String::from_utf8_lossy(&output.stdout);
            assert!(stdout.contains("read-only store served"), "{stdout}{}", String::from_utf8_lossy(&output.stderr));
        }
        Err(error) => println!("skipped: another user may not run this binary ({error})"),
    }
    seal(folder.path(), 0o755);
}

#[test]
fn a_strict_umask_is_obeyed_and_does_no_harm() {
    let folder = fast_folder();
    let mut command = Command::new("sh");
    command.args(["-c", "umask 077; exec \"$0\" crash::child --exact"]).arg(std::env::current_exe().unwrap());
    let output = output(command.env("RLFLOW_TEST_CHILD", folder.path()).env_remove("RLFLOW_FAULT")).unwrap();
    assert!(output.status.success());
    assert_eq!(verify(folder.path()), 3);
    let shard = fs::read_dir(folder.path().join("blobs")).unwrap().next().unwrap().unwrap().path();
    let blob = fs::read_dir(shard).unwrap().next().unwrap().unwrap();
    assert_eq!(blob.metadata().unwrap().permissions().mode() & 0o777, 0o400);
}

/// Not a test of its own: what the child of the test below runs.
#[test]
fn reading_child() {
    let Some(folder) = std::env::var_os("RLFLOW_TEST_FOLDER") else { return };
    let store = Store::open(Path::new(&folder)).unwrap();
    let blobs = [SMALL, LARGE].map(|size| store.blob(Digest::of(&vec![7; size])).unwrap().unwrap());
    fs::write(store.folder().join("tmp/read"), "").unwrap();
    while !store.folder().join("tmp/cut").exists() {
        std::thread::sleep(Duration::from_millis(1));
    }
    let sum = |blob: &[u8]| blob.iter().map(|byte| usize::from(*byte)).sum::<usize>();
    assert_eq!(sum(&blobs[0]), 7 * SMALL);
    println!("small is whole");
    println!("large is {}", sum(&blobs[1]));
}

const SMALL: usize = 1 << 20;
/// Large enough to be mapped.
const LARGE: usize = (16 << 20) + 1;

#[test]
fn truncating_what_somebody_reads_ends_that_process_at_worst_and_is_never_served() {
    let folder = fast_folder();
    let path = folder.path().join("store");
    let store = Store::open(&path).unwrap();
    let digests = [SMALL, LARGE].map(|size| store.put_blob(&vec![7; size]).unwrap());
    let process = spawn(child("environment::reading_child", &path).stdout(Stdio::piped()).stderr(Stdio::null())).unwrap();
    let start = Instant::now();
    while !path.join("tmp/read").exists() {
        assert!(start.elapsed() < Duration::from_secs(60), "the child reads nothing");
        std::thread::sleep(Duration::from_millis(1));
    }
    for digest in digests {
        let name = digest.to_string();
        let blob = path.join("blobs").join(&name[..2]).join(&name);
        fs::set_permissions(&blob, fs::Permissions::from_mode(0o644)).unwrap();
        fs::OpenOptions::new().write(true).open(&blob).unwrap().set_len(4096).unwrap();
    }
    fs::write(path.join("tmp/cut"), "").unwrap();
    let output = process.wait_with_output().unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(stdout.contains("small is whole") && !stdout.contains("large is"), "{stdout}");
    // SIGBUS is 7 on most Linux machines and 10 elsewhere.
    assert!(matches!(output.status.signal(), Some(7 | 10)), "{:?}", output.status);
    for digest in digests {
        assert!(matches!(store.blob(digest), Err(StoreError::Damaged { .. })));
        assert!(store.blob(digest).unwrap().is_none());
    }
    assert_eq!(store.put_blob(&vec![7; LARGE]).unwrap(), digests[1]);
    assert_eq!(store.blob(digests[1]).unwrap().unwrap().len(), LARGE);
}

/// Not a test of its own: what the child of the test below runs.
#[test]
fn holding_child() {
    let Some(folder) = std::env::var_os("RLFLOW_TEST_FOLDER") else { return };
    let store = Store::open(Path::new(&folder)).unwrap();
    let LeaseOutcome::Acquired(_lease) = store.lease(key("sft"), &holder("child")).unwrap() else { panic!("a free lease is held") };
    store.expect_lookups(100_000);
    fs::write(store.folder().join("tmp/held"), "").unwrap();
    std::thread::sleep(Duration::from_secs(600));
}

#[test]
fn what_a_killed_process_held_is_free_at_once() {
    let folder = fast_folder();
    let path = folder.path().join("store");
    let store = Store::open(&path).unwrap();
    let mut process = spawn(child("environment::holding_child", &path).stdout(Stdio::null()).stderr(Stdio::null())).unwrap();
    let start = Instant::now();
    while !path.join("tmp/held").exists() {
        assert!(start.elapsed() < Duration::from_secs(60) && process.try_wait().unwrap().is_none(), "the child holds nothing");
        std::thread::sleep(Duration::from_millis(5));
    }
    let LeaseOutcome::Held(found) = store.lease(key("sft"), &holder("parent")).unwrap() else { panic!("the child's lease was free") };
    assert_eq!(found.stage, "child");
    assert_eq!(store.lease_holder(key("sft")).unwrap().unwrap().stage, "child");
    process.kill().unwrap();
    process.wait().unwrap();
    assert_eq!(store.lease_holder(key("sft")).unwrap(), None);
    assert!(matches!(store.lease(key("sft"), &holder("parent")).unwrap(), LeaseOutcome::Acquired(_)));
}
