use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use serde_json::Value;

use rlflow_store::{Digest, Store};

use crate::{
    Result,
    history::{RECENT_RUNS, events, is_event, is_of_workflow, run_id},
    record::Series,
};

/// An attempt at a stage that has not ended, or that was interrupted or failed, as the logs of its runs tell it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Unfinished {
    /// The newest run that tried.
    pub run_id: String,
    /// Action key.
    pub key: Digest,
    /// When that run started the stage, in seconds since the Unix epoch.
    pub began: f64,
    /// The last step that anything was measured at.
    pub step: u64,
    /// Measured values.
    pub measurements: BTreeMap<String, f64>,
    /// Whether it ended, without a result. If not it runs, or was killed.
    pub ended: bool,
}

/// What one run did of a stage.
struct Session {
    attempt: Unfinished,
    /// Step that it continued from.
    from_step: Option<u64>,
    has_result: bool,
    points: Vec<(String, u64, f64)>,
}

/// The newest attempt at each of `stages` that gave no result, with its metrics: those of the sessions that it
/// continues too. `workflow` is how records name the workflow.
pub fn unfinished(store: &Store, workflow: &str, stages: &BTreeSet<&str>) -> Result<BTreeMap<String, (Unfinished, Series)>> {
    let mut open = stages.clone();
    // Newest first.
    let mut sessions: BTreeMap<String, Vec<Session>> = BTreeMap::new();
    let runs = if open.is_empty() { Vec::new() } else { store.runs()? };
    for folder in runs.iter().take(RECENT_RUNS).filter(|folder| is_of_workflow(folder, workflow)) {
        for (stage, session) in sessions_of(folder, &open) {
            let known = sessions.entry(stage.clone()).or_default();
            let continued = known.last().is_none_or(|newer| newer.attempt.key == session.attempt.key);
            if !continued || session.has_result || session.from_step.is_none() {
                open.remove(stage.as_str());
            }
            if continued {
                known.push(session);
            }
        }
        if open.is_empty() {
            break;
        }
    }
    let told = sessions.into_iter().filter_map(|(stage, sessions)| Some((stage, joined(sessions)?)));
    Ok(told.collect())
}

/// The newest session with the series of all: each continues at a step of the one before it.
fn joined(sessions: Vec<Session>) -> Option<(Unfinished, Series)> {
    if sessions.first()?.has_result {
        return None;
    }
    let mut series: BTreeMap<String, BTreeMap<u64, f64>> = BTreeMap::new();
    for session in sessions.iter().rev() {
        match session.from_step {
            None => series.clear(),
            Some(step) => series.values_mut().for_each(|points| points.retain(|at, _| *at <= step)),
        }
        for (name, step, value) in &session.points {
            series.entry(name.clone()).or_default().insert(*step, *value);
        }
    }
    let series = series.into_iter().map(|(name, points)| (name, points.into_iter().collect())).collect();
    Some((sessions.into_iter().next()?.attempt, series))
}

/// What a run did of some stages, each once: of a stage that was tried again, the last time.
fn sessions_of(folder: &std::path::Path, stages: &BTreeSet<&str>) -> BTreeMap<String, Session> {
    let kinds = ["stage_started", "resumed", "metrics", "measurement", "stage_finished"];
    let quoted: Vec<String> = stages.iter().map(|stage| format!("\"stage\":{}", Value::from(*stage))).collect();
    let wanted = |line: &str| kinds.iter().any(|kind| is_event(line, kind)) && quoted.iter().any(|stage| line.contains(stage));
    let run_id = run_id(folder).unwrap_or_default();
    let mut found: BTreeMap<String, Session> = BTreeMap::new();
    for event in events(folder, wanted).unwrap_or_default() {
        let Some(stage) = event["stage"].as_str() else { continue };
        let (kind, step) = (event["event"].as_str().unwrap_or_default(), event["step"].as_u64());
        if kind == "stage_started" {
            let Some(key) = event["key"].as_str().and_then(|key| key.parse().ok()) else { continue };
            let began = event["time"].as_f64().unwrap_or_default();
            let attempt = Unfinished { run_id: run_id.clone(), key, began, step: 0, measurements: BTreeMap::new(), ended: false };
            found.insert(stage.to_owned(), Session { attempt, from_step: None, has_result: false, points: Vec::new() });
            continue;
        }
        let Some(session) = found.get_mut(stage) else { continue };
        match (kind, step) {
            ("resumed", Some(step)) => {
                session.from_step = Some(step);
                session.attempt.step = step;
            }
            ("metrics", Some(step)) => {
                session.attempt.step = step;
                let values: Vec<(String, f64)> = serde_json::from_value(event["values"].clone()).unwrap_or_default();
                session.points.extend(values.into_iter().map(|(name, value)| (name, step, value)));
            }
            ("measurement", _) => {
                if let (Some(name), Some(value)) = (event["name"].as_str(), event["value"].as_f64()) {
                    session.attempt.measurements.insert(name.to_owned(), value);
                }
            }
            ("stage_finished", _) => {
                session.attempt.ended = true;
                session.has_result = !matches!(event["status"].as_str(), Some("failed" | "skipped"));
            }
            _ => {}
        }
    }
    found
}
