//! Processes that die anywhere: what is left is whole, nothing finished runs again, and what comes out in the end is
//! what a run that nobody touched gives.

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    fs::{self, File},
    io::{BufRead, BufReader, Read},
    ops::Range,
    os::unix::{fs::MetadataExt, process::ExitStatusExt},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread::sleep,
    time::{Duration, SystemTime},
};

use rlflow_api::CounterRng;
use rlflow_store::{ActionRecord, Digest, FAULT_POINTS, GcOptions, Store};
use serde_json::Value;

use crate::fixture::{Finished, Fixture};

/// Deaths in the normal test run; `RLFLOW_CRASHES=200` makes the long one.
const CRASHES: u32 = 24;
/// A signal that cannot be caught.
const SIGKILL: i32 = 9;
/// Deaths without progress after which the next lives may last longer: some stages have no snapshots.
const PATIENCE: u32 = 4;
/// Linux counts a process's time in hundredths of a second.
const TICK: Duration = Duration::from_millis(10);
/// Stages that train, and can be continued from within.
const TRAINERS: [&str; 5] = ["pretrain", "sft", "reward_model", "ppo", "dpo"];

/// How a process is made to die. Lives are processor time, so that a busy machine does not keep every death within the first stage.
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
    fn life(self) -> Duration {
        let (Self::Kill(life) | Self::Fault(_, _, life) | Self::PowerCut(life)) = self;
        life
    }
}

/// Draws that a failure's message can be repeated from.
struct Dice(CounterRng);

impl Dice {
    /// A death within `lives`, or at one of the next `writes` of the store.
    fn death(&mut self, lives: &Range<Duration>, writes: u64) -> Death {
        let life = lives.start + (lives.end - lives.start).mul_f64(self.0.below(1_000) as f64 / 1_000.0);
        match self.0.below(3) {
            0 => Death::Kill(life),
            1 => {
                let points: Vec<_> = FAULT_POINTS.iter().filter(|point| !point.starts_with("gc.")).collect();
                let point = points[self.0.below(points.len() as u64) as usize];
                // How often each is reached: for every tensor, for every snapshot, or once or twice in a stage, whose end a life may not reach.
                let (often, longer) = match point.split_once('.').map(|(part, _)| part) {
                    Some("temp" | "blob") => (writes, 2),
                    Some("snapshot" | "index") => (3.max(writes / 100), 2),
                    _ => (2, 4),
                };
                Death::Fault(point, 1 + self.0.below(often), life * longer)
            }
            _ => Death::PowerCut(life),
        }
    }
}

/// How a run ended.
enum End {
    Finished(Finished),
    Died {
        /// What did it.
        by: &'static str,
        /// The stages that were running.
        during: String,
        /// The last step that was told of.
        step: Option<u64>,
        /// Every stage that it started.
        started: BTreeSet<String>,
    },
}

/// Kills runs until enough died, each in a store until that is through; all of them must come to what an untouched run gives. How many
/// deaths each stage saw.
fn kill_runs(
    fixture: &Fixture,
    sets: &[&str],
    crashes: u32,
    lives: impl Fn(Duration) -> Range<Duration>,
    writes: u64,
) -> BTreeMap<String, u32> {
    let seed = env::var("RLFLOW_CRASH_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    let mut dice = Dice(CounterRng::new(seed, "crash", 0, 0));
    let (End::Finished(untouched), whole) = run_until(fixture, "untouched", sets, None) else { panic!("nobody killed it") };
    let (untouched, lives) = (untouched.succeeded(), lives(whole));
    println!("an untouched run took {:.0} s of processor time", whole.as_secs_f64());
    let (untouched_metrics, untouched_records) = (metrics(fixture, "untouched"), records(fixture, "untouched"));

    // Snapshots that newer ones replaced are gone at once: what `gc` would still find are the few that stand, of two models at most, each
    // with weights and two moments.
    let options = GcOptions { dry_run: true, grace: Duration::ZERO, ..GcOptions::default() };
    let left = Store::open(&fixture.path("untouched")).and_then(|store| store.gc(&options)).unwrap();
    let count =
        |what: &str, larger_than: u64| left.removed.iter().filter(|gone| gone.what == what && gone.size_bytes > larger_than).count();
    assert!(
        count("blob", 16 << 10) <= 6 * count("snapshot", 0),
        "snapshots that were replaced are left behind: {} bytes",
        left.freed_bytes
    );

    let (mut died, mut round, mut resumed) = (0, 0, BTreeSet::new());
    let (mut by_kind, mut by_stage) = (BTreeMap::<&str, u32>::new(), BTreeMap::<String, u32>::new());
    while died < crashes {
        round += 1;
        let store = format!("store{round}");
        let mut finished: BTreeSet<String> = BTreeSet::new();
        let (mut kept, mut in_vain) = (BTreeSet::new(), 0);
        loop {
            let longer = 1.5_f64.powi((in_vain / PATIENCE) as i32);
            let death = dice.death(&(lives.start.mul_f64(longer)..lives.end.mul_f64(longer)), writes);
            let context = format!("seed {seed}, crash {died}, {death:?}");
            match run_until(fixture, &store, sets, (died < crashes).then_some(death)).0 {
                End::Died { by, during, step, started } => {
                    died += 1;
                    let again: Vec<_> = started.intersection(&finished).collect();
                    assert!(again.is_empty(), "{context}: {again:?} had finished and were started again");
                    check_store(fixture, &store, &context);
                    let now = cached(fixture, &store);
                    assert!(finished.is_subset(&now), "{context}: lost {:?}", finished.difference(&now));
                    let keeps = progress(&fixture.path(&store));
                    in_vain = if keeps == kept { in_vain + 1 } else { 0 };
                    println!("{context}: {by}, in {during}, step {step:?}; {} stages finished, {in_vain} in vain", now.len());
                    *by_kind.entry(by).or_default() += 1;
                    *by_stage.entry(during).or_default() += 1;
                    (finished, kept) = (now, keeps);
                }
                End::Finished(last) => {
                    let last = last.succeeded();
                    let again: Vec<_> = last.ran().intersection(&finished).cloned().collect();
                    assert!(again.is_empty(), "{context}: {again:?} had finished and ran again");
                    resumed.extend(last.with_status(&["resumed"]));
                    assert_eq!(last.outputs(), untouched.outputs(), "{context}");
                    assert_eq!(metrics(fixture, &store), untouched_metrics, "{context}");
                    assert_eq!(records(fixture, &store), untouched_records, "{context}");
                    break;
                }
            }
        }
        println!("run {round} came through with the same digests, metrics and samples: {died} deaths so far");
        fs::remove_dir_all(fixture.path(&store)).unwrap();
    }
    println!("{died} deaths over {round} runs: {by_kind:?}; within {by_stage:?}; stages of last runs that resumed: {resumed:?}");

    // On-policy: the first minibatch of every step has ratio exactly 1.
    let ppo = &untouched_metrics["stages"]["ppo"]["series"];
    let errors = ppo["policy/first_ratio_error"].as_array().unwrap();
    assert!(!errors.is_empty() && errors.iter().all(|point| point[1] == 0.0), "{errors:?}");
    let divergence = ppo["policy/approxkl_avg"].as_array().unwrap();
    assert!(divergence.iter().any(|point| point[1].as_f64().unwrap() > 0.0), "nothing was learnt");
    by_stage
}

fn crashes(unless_told: u32) -> u32 {
    env::var("RLFLOW_CRASHES").ok().and_then(|count| count.parse().ok()).unwrap_or(unless_told)
}

#[test]
fn whatever_kills_it_the_result_is_the_same() {
    let sets = TRAINERS.map(|stage| format!("stage.{stage}.snapshot_every=1"));
    let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
    // Short lives, so that a run dies several times before it gets through.
    let lives = |whole: Duration| Duration::from_millis(20)..Duration::from_millis(20) + whole / 4;
    kill_runs(&Fixture::new(), &sets, crashes(CRASHES), lives, 10);
}

/// The same with the quickstart as users have it, over all of its run, which takes half an hour of two idle cores:
/// `RLFLOW_CRASHES=200 cargo test --release --workspace --test chain full_size -- --ignored --nocapture`.
#[test]
#[ignore = "takes half an hour"]
fn whatever_kills_the_full_size_quickstart_the_result_is_the_same() {
    let sets = [
        "stage.pretrain.snapshot_every=5",
        "stage.sft.snapshot_every=5",
        "stage.reward_model.snapshot_every=5",
        "stage.ppo.snapshot_every=1",
        "stage.dpo.snapshot_every=2",
    ];
    // Some eighty lives to a run, so that a step of PPO fits into most of them.
    let crashes = crashes(200);
    let within = kill_runs(&Fixture::full_size(), &sets, crashes, |whole| whole / 500..whole / 40, 800);
    let spared: Vec<_> = TRAINERS.iter().filter(|stage| !within.contains_key(**stage)).collect();
    assert!(crashes < 200 || spared.is_empty(), "{spared:?} never died");
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
        let mut child = fixture.command("store", &sets).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        // Its first line says that it takes signals now; before, they end it as they end any process.
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let mut stdout = Vec::new();
        out.read_until(b'\n', &mut stdout).unwrap();
        sleep(Duration::from_millis(100 * wait));
        let killed = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
        out.read_to_end(&mut stdout).unwrap();
        let finished = Finished::of(Output { status: child.wait().unwrap(), stdout, stderr: Vec::new() });
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

/// Runs until the process ends or has lived for as long as it may; how it ended, and how long it lived.
fn run_until(fixture: &Fixture, store: &str, sets: &[&str], death: Option<Death>) -> (End, Duration) {
    let mut command = fixture.command(store, sets);
    // Into files: a pipe that nobody reads would hold up a long life.
    let [out, err] = ["out", "err"].map(|name| fixture.path(name));
    command.stdout(File::create(&out).unwrap()).stderr(File::create(&err).unwrap());
    if let Some(Death::Fault(point, count, _)) = death {
        command.env("RLFLOW_FAULT", format!("{point}:{count}"));
    }
    let began = SystemTime::now();
    let mut child = command.spawn().unwrap();
    let (mut lived, mut killed) = (Duration::ZERO, false);
    let status = loop {
        lived = processor_time(&child).unwrap_or(lived);
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if death.is_some_and(|death| lived >= death.life()) {
            killed = child.kill().is_ok();
            break child.wait().unwrap();
        }
        sleep(Duration::from_millis(2));
    };
    let (stdout, stderr) = (fs::read(out).unwrap(), fs::read(err).unwrap());
    if status.signal() != Some(SIGKILL) {
        return (End::Finished(Finished::of(Output { status, stdout, stderr })), lived);
    }
    let by = match death {
        Some(Death::PowerCut(_)) => {
            cut_unsynced(&fixture.path(store), began);
            "killed and newest files cut"
        }
        _ if killed => "killed after a while",
        _ => "killed in the store's write path",
    };
    let (started, during, step) = place(&stdout);
    (End::Died { by, during, step, started }, lived)
}

/// What a process and its threads have used so far.
fn processor_time(child: &Child) -> Option<Duration> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", child.id())).ok()?;
    // The name may hold anything, so fields are counted from behind it.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks: u32 = fields.get(11..13)?.iter().filter_map(|ticks| ticks.parse::<u32>().ok()).sum();
    Some(TICK * ticks)
}

/// The stages that were started, those that were running when the events end, and the last step of them.
fn place(events: &[u8]) -> (BTreeSet<String>, String, Option<u64>) {
    let (mut started, mut running, mut step) = (BTreeSet::new(), BTreeSet::new(), None);
    for event in events.split(|&byte| byte == b'\n').filter_map(|line| serde_json::from_slice::<Value>(line).ok()) {
        let stage = event["stage"].as_str().unwrap_or_default().to_owned();
        match event["event"].as_str() {
            Some("stage_started") => (step, _, _) = (None, running.insert(stage.clone()), started.insert(stage)),
            Some("stage_finished") => drop(running.remove(&stage)),
            Some("metrics") => step = event["step"].as_u64(),
            _ => {}
        }
    }
    let stages: Vec<_> = running.into_iter().collect();
    (started, if stages.is_empty() { "between stages".to_owned() } else { stages.join(" + ") }, step)
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

/// What each stage recorded beside metrics: samples and tables.
fn records(fixture: &Fixture, store: &str) -> BTreeMap<(String, String), Digest> {
    let actions = Store::open(&fixture.path(store)).and_then(|store| store.actions()).unwrap();
    let of_stage = |action: &ActionRecord| {
        let stage = action.provenance.stage.clone();
        action.records.iter().map(move |(name, digest)| ((stage.clone(), name.clone()), *digest)).collect::<Vec<_>>()
    };
    let records: BTreeMap<_, _> = actions.iter().flat_map(of_stage).filter(|((_, name), _)| name != "series").collect();
    assert!(records.contains_key(&("ppo".to_owned(), "samples".to_owned())), "{records:?}");
    records
}
