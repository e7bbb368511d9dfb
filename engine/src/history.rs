//! What past runs left behind, read from their logs.

use std::{collections::BTreeMap, fs, path::Path};

use serde::Serialize;
use serde_json::Value;

use rlflow_store::{Digest, Store};

use crate::{Result, Status, plan::Plan};

/// Runs that are looked through for a stage's last failure.
const RECENT_RUNS: usize = 50;

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
    /// How it ended; none if it did not (killed, or still running).
    pub ok: Option<bool>,
    /// Whether the user stopped it.
    pub interrupted: bool,
    /// How long it took.
    pub seconds: Option<f64>,
    /// Stages whose results were there.
    pub cached: u64,
    /// Stages that were not cached, as `run --json` shows them when they end.
    pub stages: Vec<Value>,
    /// Every stage with its key, cached ones too (unless there were very many): known once a run has ended.
    pub keys: BTreeMap<String, Digest>,
}

/// Past runs, newest first. A log that cannot be read is left out with a warning.
pub fn past_runs(store: &Store, limit: usize) -> Result<Vec<PastRun>> {
    let folders = store.runs()?;
    Ok(folders.iter().filter_map(|folder| read_run(folder)).take(limit).collect())
}

fn read_run(folder: &Path) -> Option<PastRun> {
    let id = folder.file_name()?.to_string_lossy().into_owned();
    let content = match fs::read_to_string(folder.join("events.jsonl")) {
        Ok(content) => content,
        Err(error) => {
            tracing::debug!(run = id, %error, "the run's log cannot be read");
            return None;
        }
    };
    let mut run = PastRun {
        id,
        time: 0.0,
        workflow: String::new(),
        command: Vec::new(),
        host: String::new(),
        ok: None,
        interrupted: false,
        seconds: None,
        cached: 0,
        stages: Vec::new(),
        keys: BTreeMap::new(),
    };
    // The last line of a killed run may be half written: what does not parse is not an event.
    for event in content.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
        let text = |name: &str| event[name].as_str().unwrap_or_default().to_owned();
        match event["event"].as_str() {
            Some("run") => {
                run.time = event["time"].as_f64().unwrap_or_default();
                run.workflow = text("workflow");
                run.host = text("host");
                run.command = serde_json::from_value(event["command"].clone()).unwrap_or_default();
            }
            Some("stage_finished") => run.stages.push(event),
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
    Some(run)
}

/// Marks the stages of `plan` whose last attempt under today's key failed.
pub fn mark_failures(plan: &mut Plan, store: &Store, workflow_name: &str) -> Result<()> {
    let open: Vec<usize> = (0..plan.stages.len()).filter(|at| plan.stages[*at].status != Status::Cached).collect();
    if open.is_empty() {
        return Ok(());
    }
    let runs = past_runs(store, RECENT_RUNS)?;
    let attempts = runs.iter().filter(|run| run.workflow == workflow_name).flat_map(|run| run.stages.iter().rev());
    let attempts: Vec<&Value> = attempts.filter(|stage| stage["status"] != "skipped").collect();
    for at in open {
        let planned = &mut plan.stages[at];
        let Some(key) = planned.key.filter(|_| planned.status != Status::Running) else { continue };
        let is_same = |stage: &&&Value| stage["key"].as_str().and_then(|text| text.parse::<Digest>().ok()) == Some(key);
        let Some(last) = attempts.iter().find(is_same) else { continue };
        let error = last["error"].as_str().unwrap_or_default();
        if last["status"] == "failed" && error != "interrupted" {
            planned.status = Status::Failed;
            planned.error = Some(error.to_owned());
        }
    }
    Ok(())
}
