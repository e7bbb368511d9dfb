//! Runs under `mpirun`, on one machine (feature `mpi`).

#[path = "chain/fixture.rs"]
#[allow(dead_code)]
mod fixture;

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    process::{Command, Stdio},
};

use fixture::{Finished, Fixture};

/// The fixture's run, by four processes.
fn four(fixture: &Fixture, store: &str, sets: &[&str]) -> Command {
    let plain = fixture.command(store, sets);
    let mut command = Command::new("mpirun");
    // Four processes on whatever this machine has; containers are root's, and allow no reading of each other's memory.
    command.args(["--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", "4"]);
    command.args(["--mca", "btl_vader_single_copy_mechanism", "none"]);
    command.arg(plain.get_program()).args(plain.get_args()).env_remove("RLFLOW_STORE").stdin(Stdio::null());
    command
}

#[test]
fn four_processes_give_the_digests_of_one() {
    let fixture = Fixture::new();
    let expected = fixture.run("one", &[]).succeeded().outputs();
    for zero in [0, 3] {
        let (store, zero) = (format!("four-{zero}"), format!("defaults.zero={zero}"));
        let finished = Finished::of(four(&fixture, &store, &[&zero]).output().unwrap()).succeeded();
        assert_eq!(finished.outputs(), expected, "{zero}");
        let pretrain = &finished.stages().find(|(name, _)| *name == "pretrain").unwrap().1["metrics"];
        assert!(pretrain["memory/cpu/rank3/peak_bytes"].as_f64().is_some_and(|bytes| bytes > 0.0), "{pretrain}");
        // The number of processes is no part of a key.
        assert!(fixture.run(&store, &[]).ran().is_empty());
    }
}

/// Id of the process with this number that works on `store`.
fn process(number: usize, store: &str) -> Option<u32> {
    let wanted = format!("OMPI_COMM_WORLD_RANK={number}");
    let has = |file: String, text: &str, whole: bool| {
        let content = fs::read(file).unwrap_or_default();
        content.split(|byte| *byte == 0).any(|part| {
            let part = String::from_utf8_lossy(part);
            if whole { part == text } else { part.ends_with(text) }
        })
    };
    let processes = fs::read_dir("/proc").ok()?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let mut ours =
        processes.filter(|id| has(format!("/proc/{id}/environ"), &wanted, true) && has(format!("/proc/{id}/cmdline"), store, false));
    ours.next()
}

/// Sends `signal` to a process of a run when it has written a snapshot; exit code, stdout and stderr of the run.
fn signalled(fixture: &Fixture, store: &str, sets: &[&str], number: usize, signal: &str) -> (Option<i32>, String, String) {
    let mut child = four(fixture, store, sets).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap());
    let mut stdout = String::new();
    while !stdout.contains("\"event\":\"snapshot\"") && lines.read_line(&mut stdout).unwrap() > 0 {}
    let id = process(number, store).expect("the process runs").to_string();
    assert!(Command::new("kill").args([signal, &id]).status().unwrap().success());
    lines.read_to_string(&mut stdout).unwrap();
    let output = child.wait_with_output().unwrap();
    (output.status.code(), stdout, String::from_utf8_lossy(&output.stderr).into_owned())
}

/// A worker that is killed ends the run with an error that names it; one process goes on from the last snapshot, to the same result. So
/// it does when the leader is told to stop.
#[test]
fn a_run_whose_worker_is_killed_is_resumed_by_one_process() {
    let fixture = Fixture::new();
    let sets = ["stage.pretrain.train.steps=300", "defaults.snapshot_every=10", "defaults.zero=3"];
    let expected = fixture.run("whole", &sets).succeeded().outputs();

    let (code, _, stderr) = signalled(&fixture, "killed", &sets, 2, "-KILL");
    assert_ne!(code, Some(0));
    assert!(stderr.contains("pretrain: failed: worker 2 (process ") && stderr.contains("is gone"), "{stderr}");
    let resumed = fixture.run("killed", &sets).succeeded();
    assert!(resumed.with_status(&["resumed"]).contains("pretrain"), "{}", resumed.event);
    assert_eq!(resumed.outputs(), expected);

    let (code, stdout, stderr) = signalled(&fixture, "stopped", &sets, 0, "-INT");
    assert_eq!(code, Some(130), "{stderr}");
    assert!(stdout.lines().last().is_some_and(|line| line.contains("\"interrupted\":true")), "{stdout}");
    assert_eq!(fixture.run("stopped", &sets).succeeded().outputs(), expected);
}

#[test]
fn a_wrong_request_is_told_once() {
    let fixture = Fixture::new();
    let output = four(&fixture, "store", &["stage.sft.nonsense=1"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(String::from_utf8_lossy(&output.stdout).matches("unknown_key").count(), 1);
}
