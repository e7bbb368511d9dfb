use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use rlflow_store::{Artifact, ArtifactBuilder, Digest, Dtype, Retain, Snapshot, Store};

use crate::{ArtifactType, Placement, Processes, Reporter, Sample, Snapshots, StageError, StageEvent, StageResult};

/// Entry of a snapshot that holds the reporter's record.
const RECORD: &str = "record.json";

/// Tells running stages to stop.
#[derive(Debug, Clone, Default)]
pub struct CancelToken(Arc<AtomicBool>);

impl CancelToken {
    /// Asks for a stop.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// Whether a stop was asked for.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// An input artifact with where it came from.
#[derive(Clone)]
pub struct Input {
    /// Stage that made it.
    pub stage: String,
    /// Which of its outputs it is, where the workflow names one beside the main one.
    pub port: Option<String>,
    /// Kind of that stage.
    pub kind: String,
    /// The artifact.
    pub artifact: Artifact,
    /// All settings of that stage. Only its execution settings may be used here: they are not in the key.
    pub settings: Value,
    /// Where that stage is placed (PPO puts its roles there).
    pub placement: Placement,
}

impl Input {
    /// As the workflow names it: `stage`, or `stage.port`.
    pub fn name(&self) -> String {
        match &self.port {
            Some(port) => format!("{}.{port}", self.stage),
            None => self.stage.clone(),
        }
    }
}

/// A data file, resolved and hashed by the engine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataFile {
    /// As the workflow names it, for messages.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
    /// Digest that entered the key. What is read must hash to it.
    pub digest: Digest,
    /// Length.
    pub size_bytes: u64,
}

/// Stores and finds intermediate results by a key of their own; implemented by the engine.
pub trait MemoStore: Send + Sync {
    /// The artifact stored under `key`, if any.
    fn get(&self, key: &Value) -> StageResult<Option<Artifact>>;
    /// Stores `artifact` under `key`.
    fn put(&self, key: &Value, artifact: &Artifact) -> StageResult<()>;
}

/// All that a running stage may touch.
pub struct RunContext<'a> {
    /// Stage name, for messages only.
    pub stage: &'a str,
    /// The store.
    pub store: &'a Store,
    /// Seed of the stage.
    pub seed: u64,
    /// Port to inputs, in order.
    pub inputs: &'a BTreeMap<String, Vec<Input>>,
    /// Data files, in the order of [`crate::StageKind::data_sources`].
    pub files: &'a [Vec<DataFile>],
    /// Where to run.
    pub placement: &'a Placement,
    /// Who runs it together.
    pub processes: &'a Processes,
    /// The stage's snapshots.
    pub snapshots: &'a Snapshots,
    /// Where events go.
    pub reporter: &'a dyn Reporter,
    /// Whether to stop.
    pub cancel: &'a CancelToken,
    /// Intermediate results.
    pub memos: &'a dyn MemoStore,
}

impl RunContext<'_> {
    /// The input of a port that takes exactly one.
    pub fn input(&self, port: &str) -> StageResult<&Input> {
        self.optional_input(port).ok_or_else(|| StageError::invalid(format!("input `{port}` is not connected")))
    }

    /// The input of an optional port.
    pub fn optional_input(&self, port: &str) -> Option<&Input> {
        self.inputs.get(port).and_then(|inputs| inputs.first())
    }

    /// Starts an output. What other processes than the leader put into it is let go.
    pub fn output(&self, artifact_type: ArtifactType) -> ArtifactBuilder {
        let name = artifact_type.name();
        if self.processes.is_leader() { self.store.artifact(name) } else { self.store.no_artifact(name) }
    }

    /// Publishes an output, in all processes: the leader's.
    pub fn publish(&self, output: ArtifactBuilder) -> StageResult<Artifact> {
        self.of_leader(|| Ok(output.publish()?))
    }

    /// Stops with [`StageError::Interrupted`] if a stop was asked for. Only the leader is asked; it takes the others with it.
    pub fn check_cancelled(&self) -> StageResult<()> {
        if self.cancel.is_cancelled() { Err(StageError::Interrupted) } else { Ok(()) }
    }

    /// Whether to write a snapshot now that `step` steps are done: because it is time, or because a stop was asked for.
    pub fn is_snapshot_due(&self, step: u64) -> StageResult<bool> {
        self.processes.agree(|| Ok(self.cancel.is_cancelled() || self.snapshots.is_due(step)))
    }

    /// The intermediate result under `key`, made if it is not there. `key` must hold everything it depends on
    /// (digests of inputs, settings, a version). All processes make it together.
    pub fn memo(&self, key: &Value, make: impl FnOnce() -> StageResult<Artifact>) -> StageResult<Artifact> {
        let known = if self.processes.is_leader() { self.memos.get(key)? } else { None };
        if self.processes.agree(|| Ok(known.is_some()))? {
            return self.of_leader(|| known.ok_or_else(|| StageError::invalid("an intermediate result is gone")));
        }
        let artifact = make()?;
        if self.processes.is_leader() {
            self.memos.put(key, &artifact)?;
        }
        Ok(artifact)
    }

    /// [`RunContext::memo`] that the leader makes by itself while the others wait. `make` is given the context to do it in.
    pub fn memo_of_leader(&self, key: &Value, make: impl FnOnce(&RunContext<'_>) -> StageResult<Artifact>) -> StageResult<Artifact> {
        self.of_leader(|| {
            let alone = RunContext { processes: &Processes::alone(), ..*self };
            alone.memo(key, || make(&alone))
        })
    }

    /// The artifact that `give` returns at the leader.
    fn of_leader(&self, give: impl FnOnce() -> StageResult<Artifact>) -> StageResult<Artifact> {
        let mut given = None;
        let digest = self.processes.agree(|| Ok(given.insert(give()?).digest().to_string()))?;
        match given {
            Some(artifact) => Ok(artifact),
            None => self.open_shared(&digest),
        }
    }

    /// What the leader has under this digest.
    fn open_shared(&self, digest: &str) -> StageResult<Artifact> {
        let missing = || {
            StageError::invalid_with_hint(
                format!("{} does not have what process 0 just stored there", self.store.folder().display()),
                "all processes must see one store: is its folder on a file system that they share?",
            )
        };
        let digest: Digest = digest.parse().map_err(|_| missing())?;
        self.store.open_artifact(digest)?.ok_or_else(missing)
    }

    /// The newest usable snapshot, opened; the record of metrics and samples goes back to it. Reports the resume.
    pub fn resume(&self) -> StageResult<Option<(Snapshot, Artifact)>> {
        let mut opened = None;
        let found = self.processes.agree(|| {
            opened = self.snapshots.resume();
            let snapshot = opened.as_ref().map(|(snapshot, _)| serde_json::to_string(snapshot)).transpose();
            snapshot.map_err(|error| StageError::invalid(error.to_string()))
        })?;
        let Some(snapshot) = found.filter(|_| opened.is_none()) else {
            let Some((snapshot, state)) = opened else { return Ok(None) };
            self.reporter.restore(&state.read(RECORD)?);
            let extended = self.snapshots.extends(&snapshot);
            self.reporter.report(StageEvent::Resumed { step: snapshot.step, extended });
            return Ok(Some((snapshot, state)));
        };
        let snapshot: Snapshot = serde_json::from_str(&snapshot).map_err(|error| StageError::invalid(error.to_string()))?;
        let state = self.open_shared(&snapshot.digest.to_string())?;
        Ok(Some((snapshot, state)))
    }

    /// A builder for a snapshot's state.
    pub fn state(&self) -> ArtifactBuilder {
        if self.processes.is_leader() { self.snapshots.builder() } else { self.store.no_artifact("snapshot") }
    }

    /// Writes a snapshot of `state` with the record of metrics and samples so far. `info` is what
    /// [`crate::StageKind::can_continue`] will see.
    pub fn save_snapshot(&self, step: u64, retain: Retain, info: Value, mut state: ArtifactBuilder) -> StageResult<()> {
        if !self.processes.is_leader() {
            return Ok(());
        }
        // As a tensor, which goes as soon as a newer snapshot replaces this one: it grows with every step.
        let record = self.reporter.record();
        state.put_tensor(RECORD, Dtype::U8, &[record.len() as u64], &record)?;
        self.snapshots.save(step, retain, info, state)?;
        self.reporter.report(StageEvent::Snapshot { step });
        Ok(())
    }

    /// Reports metrics of a step: deterministic values only.
    pub fn metrics(&self, step: u64, values: &[(&str, f64)]) {
        let values = values.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect();
        self.reporter.report(StageEvent::Metrics { step, values });
    }

    /// Reports a measured value that differs from run to run.
    pub fn measurement(&self, name: &str, value: f64) {
        self.reporter.report(StageEvent::Measurement { name: name.into(), value });
    }

    /// Reports a sampled text.
    pub fn sample(&self, sample: Sample) {
        self.reporter.report(StageEvent::Sample(sample));
    }

    /// Names a phase.
    pub fn phase(&self, name: &str) {
        self.reporter.report(StageEvent::Phase { name: name.into() });
    }

    /// Says something once.
    pub fn note(&self, text: impl Into<String>) {
        self.reporter.report(StageEvent::Note { text: text.into() });
    }

    /// Warns.
    pub fn warning(&self, text: impl Into<String>) {
        self.reporter.report(StageEvent::Warning { text: text.into() });
    }
}
