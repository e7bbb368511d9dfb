//! The one stream of events that progress bars, JSON lines, run logs, TensorBoard files and reports are made of.

use std::{
    collections::BTreeMap,
    io::Write,
    sync::Mutex,
    time::{SystemTime, UNIX_EPOCH},
};

use serde::Serialize;
use serde_json::{Value, json};

use rlflow_api::StageEvent;
use rlflow_store::{Digest, LeaseHolder, RunLog};

use crate::{Rerun, action::Outputs};

/// How a stage ended, as in the last line of `run --json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum StageStatus {
    /// Its result was in the store.
    Cached,
    /// It ran from the start.
    Ran,
    /// It continued from where it was interrupted.
    Resumed,
    /// It continued from a snapshot of a finished, shorter run.
    Extended,
    /// It failed, or was interrupted ([`StageOutcome::interrupted`]).
    Failed,
    /// It was not started because a stage above it failed, or the run was stopped.
    Skipped,
}

impl StageStatus {
    /// As in `--json`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cached => "cached",
            Self::Ran => "ran",
            Self::Resumed => "resumed",
            Self::Extended => "extended",
            Self::Failed => "failed",
            Self::Skipped => "skipped",
        }
    }
}

/// A stage's part of a run's outcome.
#[derive(Debug, Clone, PartialEq)]
pub struct StageOutcome {
    /// Stage name.
    pub name: String,
    /// Kind.
    pub kind: String,
    /// Action key, where it was known.
    pub key: Option<Digest>,
    /// How it ended.
    pub status: StageStatus,
    /// Time in this run.
    pub seconds: f64,
    /// Why it ran.
    pub rerun: Option<Rerun>,
    /// Output port to manifest digest.
    pub outputs: Outputs,
    /// Final metrics, and measured values.
    pub metrics: BTreeMap<String, f64>,
    /// Whether it ran and gave what it had given before.
    pub same_output: bool,
    /// Whether it was stopped, rather than failing by itself: then its status is [`StageStatus::Failed`].
    pub interrupted: bool,
    /// Why it failed or was skipped.
    pub error: Option<String>,
    /// What to do about it.
    pub hint: Option<String>,
}

impl StageOutcome {
    /// Of a stage that ended so, with nothing else known of it.
    pub fn new(name: &str, kind: &str, status: StageStatus) -> Self {
        Self {
            name: name.to_owned(),
            kind: kind.to_owned(),
            key: None,
            status,
            seconds: 0.0,
            rerun: None,
            outputs: Outputs::default(),
            metrics: BTreeMap::new(),
            same_output: false,
            interrupted: false,
            error: None,
            hint: None,
        }
    }

    /// Whether it was stopped, rather than failing by itself.
    pub fn was_interrupted(&self) -> bool {
        self.interrupted
    }

    /// One word for people, who tell an interrupted stage from one that failed.
    pub fn word(&self) -> &'static str {
        if self.interrupted { "interrupted" } else { self.status.name() }
    }

    /// As scripts see it.
    pub fn to_json(&self) -> Value {
        json!({
            "name": self.name,
            "kind": self.kind,
            "key": self.key,
            "status": self.status.name(),
            "seconds": self.seconds,
            "reason": self.rerun.as_ref().map(Rerun::to_json),
            "outputs": *self.outputs,
            "metrics": self.metrics,
            "same_output": self.same_output,
            "interrupted": self.interrupted,
            "error": self.error,
            "hint": self.hint,
        })
    }
}

/// What happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A run began.
    Started {
        /// Its name.
        run_id: String,
        /// Workflow file.
        workflow: String,
        /// Stages that were asked for.
        stages: usize,
        /// Stages at once.
        jobs: usize,
    },
    /// A stage's result was found.
    Cached {
        /// Stage.
        stage: String,
        /// Action key.
        key: Digest,
        /// Whether another process made it while we waited.
        waited: bool,
    },
    /// Another process runs the stage; we wait for it.
    Waiting {
        /// Stage.
        stage: String,
        /// Who has it.
        holder: LeaseHolder,
    },
    /// A stage starts.
    StageStarted {
        /// Stage.
        stage: String,
        /// Kind.
        kind: String,
        /// Action key.
        key: Digest,
        /// Why it runs.
        rerun: Rerun,
        /// Step of the snapshot that it can continue from.
        continues_from_step: Option<u64>,
        /// One device per rank.
        devices: Vec<String>,
    },
    /// A running stage reports.
    Stage {
        /// Stage.
        stage: String,
        /// What.
        event: StageEvent,
    },
    /// A stage ended.
    StageFinished(StageOutcome),
    /// The run ended.
    Finished {
        /// Whether every stage has its result.
        ok: bool,
        /// Whether it was stopped by the user.
        interrupted: bool,
        /// How long it took.
        seconds: f64,
        /// Every stage that was asked for, in the order of the file.
        stages: Vec<StageOutcome>,
    },
}

impl Event {
    /// The event as a line of JSON shows it.
    pub fn to_json(&self, time: f64) -> Value {
        let mut value = match self {
            Self::Started { run_id, workflow, stages, jobs } => {
                json!({ "event": "started", "run_id": run_id, "workflow": workflow, "stages": stages, "jobs": jobs })
            }
            Self::Cached { stage, key, waited } => json!({ "event": "cached", "stage": stage, "key": key, "waited": waited }),
            Self::Waiting { stage, holder } => json!({ "event": "waiting", "stage": stage, "holder": holder }),
            Self::StageStarted { stage, kind, key, rerun, continues_from_step, devices } => json!({
                "event": "stage_started", "stage": stage, "kind": kind, "key": key, "reason": rerun.to_json(),
                "continues_from_step": continues_from_step, "devices": devices,
            }),
            Self::Stage { stage, event } => {
                let mut value = json!(event);
                value["stage"] = stage.as_str().into();
                value
            }
            Self::StageFinished(outcome) => {
                let mut value = outcome.to_json();
                // Events name their stage `stage`.
                if let Value::Object(fields) = &mut value {
                    fields.shift_remove("name");
                }
                value["stage"] = outcome.name.as_str().into();
                value["event"] = "stage_finished".into();
                value
            }
            Self::Finished { ok, interrupted, seconds, stages } => json!({
                "event": "finished", "ok": ok, "interrupted": interrupted, "seconds": seconds,
                "stages": stages.iter().map(StageOutcome::to_json).collect::<Vec<_>>(),
            }),
        };
        value["time"] = time.into();
        value
    }
}

/// Receives the events of a run, in order.
pub trait Sink: Send {
    /// Takes one. `time` is in seconds since the Unix epoch.
    fn event(&mut self, time: f64, event: &Event);
}

/// Hands every event to every sink.
#[derive(Default)]
pub struct Events(Mutex<Vec<Box<dyn Sink>>>);

impl Events {
    /// To `sinks`.
    pub fn new(sinks: Vec<Box<dyn Sink>>) -> Self {
        Self(Mutex::new(sinks))
    }

    /// Adds a sink.
    pub fn add(&self, sink: Box<dyn Sink>) {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(sink);
    }

    /// Hands `event` out.
    pub fn emit(&self, event: &Event) {
        let time = now();
        for sink in self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).iter_mut() {
            sink.event(time, event);
        }
    }
}

/// Seconds since the Unix epoch.
pub fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |elapsed| elapsed.as_secs_f64())
}

/// Seconds between two lines of a stage's progress: a stage may report thousands of times per second.
const PROGRESS_SECONDS: f64 = 0.5;

/// Lets through one progress event per stage and half second, and all that complete the work.
#[derive(Default)]
pub struct Throttle(BTreeMap<String, f64>);

impl Throttle {
    /// Whether `event` is to be dropped.
    pub fn drops(&mut self, time: f64, event: &Event) -> bool {
        let Event::Stage { stage, event: StageEvent::Progress { done, total, .. } } = event else { return false };
        let last = self.0.get(stage).copied().unwrap_or(f64::NEG_INFINITY);
        // A clock that was set back lets events through again.
        if done < total && (0.0..PROGRESS_SECONDS).contains(&(time - last)) {
            return true;
        }
        self.0.insert(stage.clone(), time);
        false
    }
}

/// JSON lines, for scripts.
pub struct JsonLines<W: Write> {
    out: W,
    throttle: Throttle,
}

impl<W: Write> JsonLines<W> {
    /// Writes to `out`.
    pub fn new(out: W) -> Self {
        Self { out, throttle: Throttle::default() }
    }
}

impl<W: Write + Send> Sink for JsonLines<W> {
    fn event(&mut self, time: f64, event: &Event) {
        if self.throttle.drops(time, event) {
            return;
        }
        let mut line = event.to_json(time).to_string();
        line.push('\n');
        // A reader that went away (`| head`) must not stop the run.
        let _ = self.out.write_all(line.as_bytes()).and_then(|()| self.out.flush());
    }
}

/// Cached stages that a run's log names one by one. Of more it only keeps the number: a run of 10,000 cached stages
/// writes two short lines.
pub(crate) const MAX_CACHED_LOGGED: usize = 256;

/// The last line of a run's log: `cached` counts stages that `finished` need not name.
pub(crate) fn finished_line(finished: Event, cached: usize, time: f64) -> Value {
    let mut value = finished.to_json(time);
    value["cached"] = cached.into();
    value
}

/// The run's own record, `runs/<id>/events.jsonl`. Progress is left out.
pub struct RunLogSink {
    log: std::sync::Arc<RunLog>,
    failed: bool,
}

impl RunLogSink {
    /// Writes to `log`.
    pub fn new(log: std::sync::Arc<RunLog>) -> Self {
        Self { log, failed: false }
    }
}

impl Sink for RunLogSink {
    fn event(&mut self, time: f64, event: &Event) {
        let appended = match event {
            Event::Cached { waited: false, .. } | Event::Stage { event: StageEvent::Progress { .. }, .. } => return,
            Event::Finished { ok, interrupted, seconds, stages } => {
                let is_cached = |stage: &&StageOutcome| stage.status == StageStatus::Cached;
                let cached = stages.iter().filter(is_cached).count();
                let named = stages.iter().filter(|stage| cached <= MAX_CACHED_LOGGED || !is_cached(stage)).cloned().collect();
                let finished = Event::Finished { ok: *ok, interrupted: *interrupted, seconds: *seconds, stages: named };
                self.log.append(&finished_line(finished, cached, time))
            }
            event => self.log.append(&event.to_json(time)),
        };
        if let Err(error) = appended
            && !std::mem::replace(&mut self.failed, true)
        {
            tracing::warn!(%error, "the run's log cannot be written; the run goes on without it");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(done: u64) -> Event {
        let event = StageEvent::Progress { done, total: 10, unit: "step".into(), rate: None, tokens_per_s: None, detail: String::new() };
        Event::Stage { stage: "sft".into(), event }
    }

    #[test]
    fn progress_is_throttled_but_its_end_is_not() {
        let mut throttle = Throttle::default();
        let drops: Vec<bool> =
            [(0.0, 1), (0.1, 2), (0.6, 3), (0.7, 4), (0.7, 10), (0.1, 5)].map(|(time, done)| throttle.drops(time, &progress(done))).into();
        assert_eq!(drops, [false, true, false, true, false, false]);
    }

    #[test]
    fn lines_carry_event_and_time_and_the_stage() {
        let mut out = Vec::new();
        let metrics = StageEvent::Metrics { step: 3, values: vec![("loss".into(), 0.5)] };
        JsonLines::new(&mut out).event(7.5, &Event::Stage { stage: "sft".into(), event: metrics });
        let line: Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(line, json!({ "event": "metrics", "step": 3, "values": [["loss", 0.5]], "stage": "sft", "time": 7.5 }));
        assert_eq!(out.iter().filter(|byte| **byte == b'\n').count(), 1);
    }
}
