//! How long `plan` and `run` take when everything is cached, process start included, for 7, 1,000 and 10,000 stages of
//! small kinds: what the engine and the store cost without any Burn. `loaded` is what they take when they load and plan the
//! workflow, since something changed that changes nothing (a comment); else a note of what was found before answers.
//!
//! `cargo bench -p rlflow-engine --bench noop` (`-- 7 1000` leaves the large one out). The store is filled first, once
//! per size, in the folder for temporary files; `TMPDIR=/dev/shm` spares the disk. `-- --phases 10000` tells where the time
//! of a process goes, and `-- --keep DIR 10000` leaves the store there for a profiler.

#[path = "../tests/engine/kinds.rs"]
#[allow(dead_code, missing_docs)]
mod kinds;

use std::{
    env,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use rlflow_api::{CancelToken, DeviceSpec};
use rlflow_engine::{
    DeviceInfo, Host, Plan, Registry, Request, RunOptions,
    event::Events,
    run,
    settled::Settled,
    workflow::{LoadOptions, Workflow, load},
};
use rlflow_store::Store;

/// Processes of each command; the median is told.
const REPEATS: usize = 21;
/// What a child is told to do, and in which folder.
const CHILD: &str = "--child";

fn main() {
    let arguments: Vec<String> = env::args().skip(1).filter(|argument| argument != "--bench").collect();
    if let [flag, what, folder] = &arguments[..]
        && flag == CHILD
    {
        return child(what, Path::new(folder));
    }
    let keep = arguments.iter().position(|argument| argument == "--keep").and_then(|at| arguments.get(at + 1)).map(PathBuf::from);
    let phases = arguments.iter().any(|argument| argument == "--phases");
    let sizes: Vec<usize> = arguments.iter().filter_map(|argument| argument.parse().ok()).collect();
    let sizes = if sizes.is_empty() { vec![7, 1000, 10_000] } else { sizes };
    println!("{:>8} {:>12} {:>12} {:>12} {:>12} {:>12}", "stages", "fill", "run", "plan", "run loaded", "plan loaded");
    for stages in sizes {
        let owned = tempfile::TempDir::new().expect("a temporary folder");
        let folder = keep.clone().unwrap_or_else(|| owned.path().to_owned());
        fs::create_dir_all(&folder).expect("the folder is made");
        fs::write(folder.join("data.txt"), "one\ntwo\nthree\n").expect("the data is written");
        fs::write(folder.join("flow.toml"), workflow(stages)).expect("the workflow is written");
        let fill = time(|| fill(&folder));
        // The first of them leaves the note.
        let times = ["run-loaded", "plan-loaded", "run", "plan"].map(|what| median(|| process(what, &folder)));
        let [run_loaded, plan_loaded, run, plan] = times.map(milliseconds);
        println!("{stages:>8} {:>12} {run:>12} {plan:>12} {run_loaded:>12} {plan_loaded:>12}", milliseconds(fill));
        if phases {
            for what in ["plan-phases", "run-phases"] {
                process(what, &folder);
            }
        }
    }
}

/// Sweeps as people write them: a file, a trunk, and trainers on it with settings of their own, each collected.
fn workflow(stages: usize) -> String {
    let mut text = String::from("name = \"noop\"\nedition = 1\nseed = 1\n[defaults]\ndevice = \"cpu\"\n");
    text += "[stage.data]\nkind = \"lines\"\nsources = [{ path = \"data.txt\" }]\n";
    text += "[stage.trunk]\nkind = \"trainer\"\ninputs = { data = \"data\" }\ntrain = { steps = 1 }\n";
    for index in 2..stages {
        let _ = match index % 3 {
            2 => write!(text, "[stage.s{index}]\nkind = \"lines\"\nkeep = {index}\nsources = [{{ path = \"data.txt\" }}]\n"),
            0 => write!(
                text,
                "[stage.s{index}]\nkind = \"trainer\"\ninputs = {{ model = \"trunk\", data = \"s{}\" }}\nbeta = 0.{index}\n\
                 train = {{ steps = 1, lr = 0.25 }}\n",
                index - 1
            ),
            _ => write!(text, "[stage.s{index}]\nkind = \"collect\"\ninputs = {{ models = [\"trunk\", \"s{}\"] }}\n", index - 1),
        };
    }
    text
}

fn host() -> Host {
    let cpu = DeviceInfo { spec: DeviceSpec::Cpu, name: "cpu".into(), memory_bytes: 1 << 33 };
    Host { devices: vec![cpu], numerics: "bench".into(), no_gpu: None, crew: None }
}

fn store(folder: &Path) -> Store {
    Store::open(&folder.join(".rlflow")).expect("the store opens")
}

fn open(folder: &Path) -> (Workflow, Store, Host) {
    let loaded = load(&folder.join("flow.toml"), &LoadOptions::default(), &Registry::new(kinds::kinds()));
    (loaded.unwrap_or_else(|errors| panic!("{errors}")), store(folder), host())
}

fn fill(folder: &Path) {
    let (workflow, store, host) = open(folder);
    let options = RunOptions { jobs: 8, ..RunOptions::default() };
    let summary = run(&workflow, &store, &host, &options, &Events::default(), &CancelToken::default()).expect("the workflow runs");
    assert!(summary.ok(), "the workflow ran");
}

/// What `rlflow plan` and `rlflow run` do, less the reading of their arguments and the printing.
fn child(what: &str, folder: &Path) {
    let started = Instant::now();
    if matches!(what, "run" | "plan") {
        let settled = Settled::find(&folder.join("flow.toml"), &[], &store(folder), &host()).expect("a run left a note");
        assert!(what == "plan" || settled.run(&[], 1, started).is_some());
        return;
    }
    let (workflow, store, host) = open(folder);
    let opened = started.elapsed();
    let began = Instant::now();
    let cached = match what {
        "plan-loaded" | "plan-phases" => {
            Plan::new(&workflow, &store, &host, &Request::default()).expect("the workflow is planned").is_all_cached()
        }
        _ => {
            let summary = run(&workflow, &store, &host, &RunOptions::default(), &Events::default(), &CancelToken::default());
            summary.expect("the workflow runs").is_all_cached()
        }
    };
    assert!(cached, "everything is cached");
    let worked = began.elapsed();
    let began = Instant::now();
    // Commands end without taking the workflow apart, too.
    std::mem::forget(workflow);
    drop(store);
    if what.ends_with("phases") {
        let [opened, worked, dropped] = [opened, worked, began.elapsed()].map(milliseconds);
        println!("{:>8} {what}: load {opened}, work {worked}, drop {dropped}", "");
    }
}

fn process(what: &str, folder: &Path) {
    let itself = env::current_exe().expect("this program has a path");
    let status = Command::new(itself).arg(CHILD).arg(what).arg(folder).status().expect("a process starts");
    assert!(status.success(), "{what} failed");
}

fn milliseconds(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1e3)
}

fn time(work: impl FnOnce()) -> Duration {
    let started = Instant::now();
    work();
    started.elapsed()
}

fn median(work: impl Fn()) -> Duration {
    let mut times: Vec<Duration> = (0..REPEATS).map(|_| time(&work)).collect();
    times.sort_unstable();
    times[REPEATS / 2]
}
