//! What past runs left behind, read from their logs.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{BufRead as _, BufReader, Read as _, Seek as _, SeekFrom},
    path::Path,
};

use serde::Serialize;
use serde_json::Value;

use rlflow_store::{Digest, Store};

use crate::{Result, Status, plan::Plan};

/// Runs that are looked through for what became of a stage.
pub(crate) const RECENT_RUNS: usize = 50;
/// How much of a log's end is read at first to find its last line.
const TAIL_BYTES: u64 = 64 << 10;

/// A past run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PastRun {
    /// Name.
    pub id: String,
    /// When it began, in seconds since the Unix epoch.
    pub time: f64,
    /// Workflow, as records name it.
    pub workflow: String,
    /// Command line.
    pub command: Vec<String>,
    /// Machine.
    pub host: String,
    /// How it ended; none if it did not.
    pub ok: Option<bool>,
    /// Whether it has not ended yet: its process is still there. Else a run without an end was killed.
    pub running: bool,
    /// Whether the user stopped it.
    pub interrupted: bool,
    /// How long it took.
    pub seconds: Option<f64>,
    /// Stages whose results were there.
    pub cached: u64,
    /// Stages that were not cached, as `run --json` shows them when they end, with the devices that they ran on. Their
    /// status is `started` if the log does not tell their end: they run, or were killed with the run.
    pub stages: Vec<Value>,
    /// Every stage with its key, cached ones too (unless there were very many): known once a run has ended.
    pub keys: BTreeMap<String, Digest>,
}

/// Past runs, newest first. A log that cannot be read is left out with a warning.
pub fn past_runs(store: &Store, limit: usize) -> Result<Vec<PastRun>> {
    let folders = store.runs()?;
    let mut runs: Vec<PastRun> = folders.iter().filter_map(|folder| read_run(folder)).take(limit).collect();
    for run in runs.iter_mut().filter(|run| run.ok.is_none()) {
        run.running = store.is_run_live(&run.id);
    }
    Ok(runs)
}

fn read_run(folder: &Path) -> Option<PastRun> {
    let mut run = PastRun {
        id: run_id(folder)?,
        time: 0.0,
        workflow: String::new(),
        command: Vec::new(),
        host: String::new(),
        ok: None,
        running: false,
        interrupted: false,
        seconds: None,
        cached: 0,
        stages: Vec::new(),
        keys: BTreeMap::new(),
    };
    let told = |line: &str| ["run", "stage_started", "stage_finished", "finished"].iter().any(|event| is_event(line, event));
    let mut started: BTreeMap<String, Value> = BTreeMap::new();
    for mut event in events(folder, told)? {
        let text = |name: &str| event[name].as_str().unwrap_or_default().to_owned();
        match event["event"].as_str() {
            Some("run") => {
                run.time = event["time"].as_f64().unwrap_or_default();
                run.workflow = text("workflow");
                run.host = text("host");
                run.command = serde_json::from_value(event["command"].clone()).unwrap_or_default();
            }
            Some("stage_started") => {
                let stage = text("stage");
                event["status"] = "started".into();
                started.insert(stage, event);
            }
            Some("stage_finished") => {
                if let Some(started) = started.remove(&text("stage")) {
                    event["devices"] = started["devices"].clone();
                }
                run.stages.push(event);
            }
            Some("finished") => {
                run.ok = event["ok"].as_bool();
                run.interrupted = event["interrupted"].as_bool().unwrap_or(false);
                run.seconds = event["seconds"].as_f64();
                run.cached = event["cached"].as_u64().unwrap_or(0);
                let key = |stage: &Value| Some((stage["name"].as_str()?.to_owned(), stage["key"].as_str()?.parse().ok()?));
                run.keys = event["stages"].as_array().into_iter().flatten().filter_map(key).collect();
            }
            _ => {}
        }
    }
    run.stages.extend(started.into_values());
    Some(run)
}

pub(crate) fn run_id(folder: &Path) -> Option<String> {
    Some(folder.file_name()?.to_string_lossy().into_owned())
}

/// Whether a line of a log may be such an event: a log is mostly metrics, and parsing them all would take a while.
pub(crate) fn is_event(line: &str, event: &str) -> bool {
    line.contains(&format!("\"event\":\"{event}\""))
}

/// The events of a run's log whose lines `wanted` takes, in order. `None` if there is no log.
pub(crate) fn events(folder: &Path, wanted: impl Fn(&str) -> bool) -> Option<Vec<Value>> {
    let content = match fs::read(folder.join("events.jsonl")) {
        Ok(content) => content,
        Err(error) => {
            tracing::debug!(run = %folder.display(), %error, "the run's log cannot be read");
            return None;
        }
    };
    let content = String::from_utf8(content).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned());
    // The last line of a killed run may be half written: what does not parse is not an event.
    Some(content.lines().filter(|line| wanted(line)).filter_map(|line| serde_json::from_str(line).ok()).collect())
}

/// Whether a run was of the workflow that records call `workflow`.
pub(crate) fn is_of_workflow(folder: &Path, workflow: &str) -> bool {
    let read = || {
        let mut line = Vec::new();
        BufReader::new(File::open(folder.join("events.jsonl")).ok()?).read_until(b'\n', &mut line).ok()?;
        serde_json::from_slice::<Value>(&line).ok()
    };
    read().is_some_and(|header| header["event"] == "run" && header["workflow"] == workflow)
}

/// What the last line of a run's log says of its end: only that line is read. `None` if the run did not end.
fn end_of(folder: &Path) -> Option<Value> {
    let mut file = File::open(folder.join("events.jsonl")).ok()?;
    let length = file.metadata().ok()?.len();
    let mut tail = TAIL_BYTES.min(length);
    loop {
        file.seek(SeekFrom::Start(length - tail)).ok()?;
        let mut bytes = Vec::with_capacity(tail as usize);
        (&mut file).take(tail).read_to_end(&mut bytes).ok()?;
        let line = bytes.strip_suffix(b"\n")?;
        match line.iter().rposition(|byte| *byte == b'\n') {
            Some(at) => return ended(&line[at + 1..]),
            None if tail == length => return ended(line),
            None => tail = (tail * 8).min(length),
        }
    }
}

fn ended(line: &[u8]) -> Option<Value> {
    serde_json::from_slice::<Value>(line).ok().filter(|event| event["event"] == "finished")
}

/// What a run says of stages that it tried, latest first.
fn attempts(folder: &Path) -> Vec<Value> {
    let mut tried = match end_of(folder) {
        Some(mut end) => match end["stages"].take() {
            Value::Array(stages) => stages,
            _ => Vec::new(),
        },
        // A stage that was started and never ended was killed with its run, which is no failure of its own.
        None => events(folder, |line| is_event(line, "stage_started") || is_event(line, "stage_finished")).unwrap_or_default(),
    };
    tried.retain(|stage| !matches!(stage["status"].as_str(), Some("skipped" | "cached")));
    tried.reverse();
    tried
}

/// Marks the stages of `plan` whose last attempt under today's key failed, with what it died of.
pub fn mark_failures(plan: &mut Plan, store: &Store, workflow_name: &str) -> Result<()> {
    let is_open = |status| !matches!(status, Status::Cached | Status::Running | Status::Pending);
    let mut open: BTreeSet<Digest> = plan.stages.iter().filter(|stage| is_open(stage.status)).filter_map(|stage| stage.key).collect();
    let mut errors: BTreeMap<Digest, String> = BTreeMap::new();
    let runs = if open.is_empty() { Vec::new() } else { store.runs()? };
    for folder in runs.iter().take(RECENT_RUNS).filter(|folder| is_of_workflow(folder, workflow_name)) {
        for stage in attempts(folder) {
            let Some(key) = stage["key"].as_str().and_then(|key| key.parse::<Digest>().ok()).filter(|key| open.remove(key)) else {
                continue;
            };
            if stage["status"] == "failed" && stage["interrupted"] != true {
                errors.insert(key, stage["error"].as_str().unwrap_or_default().to_owned());
            }
        }
        if open.is_empty() {
            break;
        }
    }
    for planned in plan.stages.iter_mut().filter(|planned| is_open(planned.status)) {
        if let Some(error) = planned.key.and_then(|key| errors.get(&key)) {
            planned.status = Status::Failed;
            planned.error = Some(error.clone());
        }
    }
    Ok(())
}
