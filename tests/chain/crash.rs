//! Processes that die anywhere: what is left is whole, nothing finished runs again, and what comes out in the end is
//! what a run that nobody touched gives.

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    fs::{self, File},
    ops::Range,
    os::unix::{fs::MetadataExt, process::ExitStatusExt},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    thread::sleep,
    time::{Duration, Instant, SystemTime},
};

use rlflow_api::CounterRng;
use rlflow_store::FAULT_POINTS;
use serde_json::Value;

use crate::fixture::{Finished, Fixture};

/// Deaths in the normal test run; `RLFLOW_CRASHES=200` makes the long one.
const CRASHES: u32 = 24;
/// A signal that cannot be caught.
const SIGKILL: i32 = 9;
/// Deaths without progress after which the next lives may last longer: a machine may be busy, and some stages have no snapshots.
const PATIENCE: u32 = 4;

/// How a process is made to die.
#[derive(Debug, Clone, Copy)]
enum Death {
    /// `kill -9` after a while.
    Kill(Duration),
    /// `kill -9` by itself when it reaches a place in the store's write path for the n-th time, or after a while.
    Fault(&'static str, u64, Duration),
    /// `kill -9` after a while, and then the newest unfinished files lose their ends, as in a power cut.
    PowerCut(Duration),
}

impl Death {
    fn name(self) -> &'static str {
        match self {
            Self::Kill(_) => "killed after a while",
            Self::Fault(..) => "killed in the store's write path",
            Self::PowerCut(_) => "killed, newest files cut",
        }
    }
}

/// Draws that a failure's message can be repeated from.
struct Dice(CounterRng);

impl Dice {
    /// A death within `lives`. A process dies at a fault point within `fault` of its writes.
    fn death(&mut self, lives: &Range<Duration>, fault: u64) -> Death {
        let moment = lives.start + (lives.end - lives.start).mul_f64(self.0.below(1_000) as f64 / 1_000.0);
        match self.0.below(3) {
            0 => Death::Kill(moment),
            1 => {
                let points: Vec<_> = FAULT_POINTS.iter().filter(|point| !point.starts_with("gc.")).collect();
                Death::Fault(points[self.0.below(points.len() as u64) as usize], 1 + self.0.below(fault), moment)
            }
            _ => Death::PowerCut(moment),
        }
    }
}

/// Kills runs until enough died, each in a store until that is through; all of them must come to what an untouched run gives.
fn kill_runs(fixture: &Fixture, sets: &[&str], crashes: u32, lives: impl Fn(Duration) -> Range<Duration>, fault: u64) {
    let seed = env::var("RLFLOW_CRASH_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    let mut dice = Dice(CounterRng::new(seed, "crash", 0, 0));
    let start = Instant::now();
    let untouched = fixture.run("untouched", sets).succeeded();
    let lives = lives(start.elapsed());
    println!("an untouched run took {:.0} s", start.elapsed().as_secs_f64());
    let untouched_metrics = metrics(fixture, "untouched");

    let (mut died, mut round, mut resumed) = (0, 0, BTreeSet::new());
    let mut by_kind: BTreeMap<&str, u32> = BTreeMap::new();
    while died < crashes {
        round += 1;
        let store = format!("store{round}");
        let mut finished: BTreeSet<String> = BTreeSet::new();
        let (mut kept, mut in_vain) = (BTreeSet::new(), 0);
        loop {
            let longer = 1.5_f64.powi((in_vain / PATIENCE) as i32);
            let death = dice.death(&(lives.start.mul_f64(longer)..lives.end.mul_f64(longer)), fault);
            let context = format!("seed {seed}, crash {died}, {death:?}");
            let ended = if died < crashes { run_until(fixture, &store, sets, death) } else { None };
            let Some(last) = ended.or_else(|| (died >= crashes).then(|| fixture.run(&store, sets))) else {
                died += 1;
                *by_kind.entry(death.name()).or_default() += 1;
                check_store(fixture, &store, &context);
                let now = cached(fixture, &store);
                assert!(finished.is_subset(&now), "{context}: lost {:?}", finished.difference(&now));
                let keeps = progress(&fixture.path(&store));
                in_vain = if keeps == kept { in_vain + 1 } else { 0 };
                println!("{context}: {} stages finished, {in_vain} in vain", now.len());
                (finished, kept) = (now, keeps);
                continue;
            };
            let last = last.succeeded();
            let again: Vec<_> = last.ran().intersection(&finished).cloned().collect();
            assert!(again.is_empty(), "{context}: {again:?} had finished and ran again");
            resumed.extend(last.with_status(&["resumed"]));
            assert_eq!(last.outputs(), untouched.outputs(), "{context}");
            assert_eq!(metrics(fixture, &store), untouched_metrics, "{context}");
            break;
        }
        println!("run {round} came through: {died} deaths so far");
        fs::remove_dir_all(fixture.path(&store)).unwrap();
    }
    println!("{died} deaths over {round} runs: {by_kind:?}; stages of last runs that resumed: {resumed:?}");

    // On-policy: the first minibatch of every step has ratio exactly 1.
    let ppo = &untouched_metrics["stages"]["ppo"]["series"];
    let errors = ppo["policy/first_ratio_error"].as_array().unwrap();
    assert!(!errors.is_empty() && errors.iter().all(|point| point[1] == 0.0), "{errors:?}");
    let divergence = ppo["policy/approxkl_avg"].as_array().unwrap();
    assert!(divergence.iter().any(|point| point[1].as_f64().unwrap() > 0.0), "nothing was learnt");
}

fn crashes(unless_told: u32) -> u32 {
    env::var("RLFLOW_CRASHES").ok().and_then(|count| count.parse().ok()).unwrap_or(unless_told)
}

#[test]
fn whatever_kills_it_the_result_is_the_same() {
    let sets = ["pretrain", "sft", "reward_model", "ppo", "dpo"].map(|stage| format!("stage.{stage}.snapshot_every=1"));
    let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
    // Short lives, so that a run dies several times before it gets through.
    let lives = |whole: Duration| Duration::from_millis(20)..Duration::from_millis(20) + whole / 4;
    kill_runs(&Fixture::new(), &sets, crashes(CRASHES), lives, 20);
}

/// The same with the quickstart as users have it, which takes an hour of two cores:
/// `RLFLOW_CRASHES=200 cargo test --release --test chain full_size -- --ignored --nocapture`.
#[test]
#[ignore = "takes an hour"]
fn whatever_kills_the_full_size_quickstart_the_result_is_the_same() {
    let sets = [
        "stage.pretrain.snapshot_every=5",
        "stage.sft.snapshot_every=5",
        "stage.reward_model.snapshot_every=5",
        "stage.ppo.snapshot_every=1",
        "stage.dpo.snapshot_every=2",
    ];
    // One to six seconds where a run takes four and a half minutes.
    kill_runs(&Fixture::full_size(), &sets, crashes(200), |whole| whole / 270..whole / 45, 300);
}

/// Ctrl-C: a snapshot, exit 130, and the same bits afterwards.
#[test]
fn an_interrupted_run_continues_to_the_same_bits() {
    let fixture = Fixture::new();
    // Snapshots by the clock only: what is continued from is the one that the signal asked for.
    let sets = ["stage.pretrain.train={ steps = 40, batch_size = 4, lr = 3e-3 }"];
    let untouched = fixture.run("untouched", &sets).succeeded();
    let mut interrupted = false;
    for wait in 1..200 {
        let child = fixture.command("store", &sets).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        sleep(Duration::from_millis(100 * wait));
        let killed = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
        let finished = Finished::of(child.wait_with_output().unwrap());
        if finished.code == Some(0) {
            break;
        }
        assert!(killed.success());
        assert_eq!(finished.code, Some(130), "{}", finished.event);
        interrupted |= !finished.with_status(&["failed"]).is_empty();
    }
    assert!(interrupted, "no stage was ever interrupted");
    assert_eq!(fixture.run("store", &sets).succeeded().outputs(), untouched.outputs());
}

/// Runs until the process dies; how it finished if it did.
fn run_until(fixture: &Fixture, store: &str, sets: &[&str], death: Death) -> Option<Finished> {
    let mut command = fixture.command(store, sets);
    // Into files: a pipe that nobody reads would hold up a long life.
    let [out, err] = ["out", "err"].map(|name| fixture.path(name));
    command.stdout(File::create(&out).unwrap()).stderr(File::create(&err).unwrap());
    if let Death::Fault(point, count, _) = death {
        command.env("RLFLOW_FAULT", format!("{point}:{count}"));
    }
    let mut child = command.spawn().unwrap();
    let began = SystemTime::now();
    let (Death::Kill(moment) | Death::Fault(_, _, moment) | Death::PowerCut(moment)) = death;
    let deadline = Instant::now() + moment;
    while Instant::now() < deadline && child.try_wait().unwrap().is_none() {
        sleep(Duration::from_millis(2));
    }
    let _ = child.kill();
    let status = child.wait().unwrap();
    if status.signal() != Some(SIGKILL) {
        return Some(Finished::of(Output { status, stdout: fs::read(out).unwrap(), stderr: fs::read(err).unwrap() }));
    }
    if let Death::PowerCut(_) = death {
        cut_unsynced(&fixture.path(store), began);
    }
    None
}

/// What a power cut may take: the ends of files that nothing had synced yet. Those under `tmp`, in the index and
/// of notes never were; of the newest snapshot the last file is cut, as if the disk had lied.
fn cut_unsynced(store: &Path, began: SystemTime) {
    let files = |folder: &str| {
        let mut files = Vec::new();
        collect(&store.join(folder), &mut files);
        files
    };
    let truncate = |path: &Path| {
        let length = fs::metadata(path).map_or(0, |metadata| metadata.len());
        // A read-only file can still lose its end.
        let _ = fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o644));
        if let Ok(file) = fs::OpenOptions::new().write(true).open(path) {
            file.set_len(length / 2).unwrap();
        }
    };
    let changed = |path: &PathBuf| fs::metadata(path).and_then(|metadata| metadata.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
    // A file with a second name was synced before it got that: it is a blob already.
    let is_open = |path: &PathBuf| fs::metadata(path).is_ok_and(|metadata| metadata.nlink() == 1);
    let unsynced = files("tmp").into_iter().filter(is_open).chain(files("index")).chain(files("settled"));
    unsynced.filter(|path| changed(path) >= began).for_each(|path| truncate(&path));
    if let Some(newest) = files("partial").iter().max_by_key(|path| changed(path)) {
        truncate(newest);
    }
}

/// What a run has come to: names of its results and snapshots.
fn progress(store: &Path) -> BTreeSet<PathBuf> {
    let mut files = Vec::new();
    collect(&store.join("partial"), &mut files);
    collect(&store.join("actions"), &mut files);
    files.into_iter().collect()
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() { collect(&path, files) } else { files.push(path) }
    }
}

/// A death leaves at most what `gc` takes and unfinished snapshots: every blob, manifest and action is whole.
fn check_store(fixture: &Fixture, store: &str, context: &str) {
    let folder = fixture.path(store);
    if !folder.join("VERSION").exists() {
        return;
    }
    let output = fixture.on_store(store, &["fsck", "--json"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let damaged: Vec<&Value> =
        report["problems"].as_array().into_iter().flatten().filter(|problem| problem["what"] != "snapshot").collect();
    assert!(damaged.is_empty(), "{context}: {damaged:?}");
}

/// Stages with a result in the store.
fn cached(fixture: &Fixture, store: &str) -> BTreeSet<String> {
    let status = fixture.json(store, &["status"], &[]);
    let stages = status["stages"].as_array().unwrap().iter();
    stages.filter(|stage| stage["status"] == "cached").map(|stage| stage["name"].as_str().unwrap().to_owned()).collect()
}

/// Final metrics and series, less what is measured rather than computed.
fn metrics(fixture: &Fixture, store: &str) -> Value {
    let mut metrics = fixture.json(store, &["metrics"], &[]);
    for stage in metrics["stages"].as_object_mut().unwrap().values_mut() {
        // What is measured differs from run to run.
        stage["final"].as_object_mut().unwrap().retain(|name, _| name != "tokens_per_s" && !name.starts_with("memory/"));
    }
    metrics
}
