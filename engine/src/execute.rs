//! Runs one stage: asks for the right to, builds what it may touch, and publishes what it gives.

use std::{
    collections::BTreeMap,
    sync::Mutex,
    thread::sleep,
    time::{Duration, Instant},
};

use rlflow_api::{
    Artifact, CancelToken, Input, Processes, RunContext, Snapshots, StageError,
    panics::{self, Panic},
};
use rlflow_store::{ActionRecord, Digest, Lease, LeaseHolder, LeaseOutcome, Provenance, StoreError};

use crate::{
    EngineError, RerunReason, Result,
    action::{Action, Actions},
    event::{Event, Events, StageStatus, now},
    memo::Memos,
    record::{Reported, StageReporter},
};

/// How often a stage that another process runs is asked for.
const POLL: Duration = Duration::from_millis(50);

/// What the stages of one run share.
pub struct Session<'a> {
    /// Keys, placements, inputs.
    pub actions: &'a Actions<'a>,
    /// Where events go.
    pub events: &'a Events,
    /// Whether to stop.
    pub cancel: &'a CancelToken,
    /// Name of the run.
    pub run_id: &'a str,
    /// Name of this machine.
    pub host_name: &'a str,
    /// Keys of the intermediate results that were used.
    pub memo_keys: &'a Mutex<Vec<Digest>>,
}

/// How the attempt to have a stage's result ended.
pub enum Attempt {
    /// Another process made it while we waited.
    Found(Box<ActionRecord>),
    /// It ran.
    Ran {
        /// Its result.
        record: Box<ActionRecord>,
        /// From the start, resumed or extended.
        status: StageStatus,
        /// Time in this run.
        seconds: f64,
    },
    /// It did not give a result.
    Failed {
        /// Why.
        error: StageError,
        /// Time in this run.
        seconds: f64,
    },
}

impl Session<'_> {
    /// Has the result of `action` made, here or by whoever is at it already.
    pub fn attempt(&self, index: usize, action: &Action) -> Attempt {
        let started = Instant::now();
        self.try_attempt(index, action, started)
            .unwrap_or_else(|error| Attempt::Failed { error: to_stage_error(error), seconds: started.elapsed().as_secs_f64() })
    }

    fn try_attempt(&self, index: usize, action: &Action, mut started: Instant) -> Result<Attempt> {
        let stage = &self.actions.workflow.stages[index];
        let Some((lease, waited)) = self.lease(&stage.name, action.key)? else {
            return Ok(Attempt::Failed { error: StageError::Interrupted, seconds: started.elapsed().as_secs_f64() });
        };
        if let Some(record) = self.made_meanwhile(index, action, waited)? {
            return Ok(Attempt::Found(Box::new(record)));
        }
        if waited {
            started = Instant::now();
        }
        if matches!(action.rerun.reason, RerunReason::ArtifactDamaged { .. })
            && let Some(last) = action.last.as_ref().filter(|last| last.key == action.key)
        {
            last.outputs.values().for_each(|output| self.actions.store.set_aside_damage(*output));
        }
        // The process that we waited for may have left snapshots when it died.
        let refreshed = if waited { Some(self.actions.snapshots(index, action)?) } else { None };
        let snapshots = refreshed.as_ref().unwrap_or(&action.snapshots);
        self.events.emit(&Event::StageStarted {
            stage: stage.name.clone(),
            kind: stage.kind.name().to_owned(),
            key: action.key,
            rerun: action.rerun.clone(),
            continues_from_step: snapshots.first().map(|snapshot| snapshot.step),
            devices: self.actions.placement(index).devices.iter().map(ToString::to_string).collect(),
        });
        let snapshots = Snapshots::new(self.actions.store.snapshots(action.prefix_key), snapshots.clone()).of_action(action.key);
        let started_at = now();
        let reporter = StageReporter::new(&stage.name, self.events, &self.actions.host.numerics);
        let result = self.run(index, action, &snapshots, &reporter);
        let (failure, phase) = (reporter.not_finite(), reporter.phase());
        let reported = reporter.finish();
        let result = match (failure, result) {
            (Some(not_finite), _) => Err(not_finite),
            (None, Err(StageError::OutOfMemory { message, .. })) => Err(self.actions.out_of_memory(index, &message, phase.as_deref())),
            (None, result) => result,
        };
        let published = result.and_then(|outputs| self.publish(index, action, &outputs, &reported, started_at));
        drop(lease);
        let seconds = started.elapsed().as_secs_f64();
        Ok(match published {
            Ok(record) => {
                let status = match reported.continued {
                    None => StageStatus::Ran,
                    Some(continued) if continued.extended => StageStatus::Extended,
                    Some(_) => StageStatus::Resumed,
                };
                Attempt::Ran { record: Box::new(record), status, seconds }
            }
            Err(error) => Attempt::Failed { error, seconds },
        })
    }

    /// The right to run the stage, and whether we had to wait for it. `None` if the run was stopped meanwhile.
    fn lease(&self, stage: &str, key: Digest) -> Result<Option<(Lease, bool)>> {
        let us = LeaseHolder {
            host: self.host_name.to_owned(),
            pid: std::process::id(),
            run_id: self.run_id.to_owned(),
            stage: stage.to_owned(),
            since: now(),
        };
        let mut told: Option<LeaseHolder> = None;
        loop {
            if self.cancel.is_cancelled() {
                return Ok(None);
            }
            match self.actions.store.lease(key, &us)? {
                LeaseOutcome::Acquired(lease) => return Ok(Some((lease, told.is_some()))),
                LeaseOutcome::Held(holder) => {
                    let is_new = told.as_ref().is_none_or(|told| (told.pid, &told.run_id) != (holder.pid, &holder.run_id));
                    if is_new {
                        self.events.emit(&Event::Waiting { stage: stage.to_owned(), holder: holder.clone() });
                        told = Some(holder);
                    }
                    sleep(POLL);
                }
            }
        }
    }

    /// The result, if another process finished it between our decision and our lease.
    fn made_meanwhile(&self, index: usize, action: &Action, waited: bool) -> Result<Option<ActionRecord>> {
        let lost = matches!(action.rerun.reason, RerunReason::ArtifactMissing { .. } | RerunReason::ArtifactDamaged { .. });
        let forced = matches!(action.rerun.reason, RerunReason::Forced { .. });
        if forced || (lost && !waited) {
            return Ok(None);
        }
        let Some(record) = self.actions.store.action(action.key)? else { return Ok(None) };
        let mut ports = self.actions.workflow.stages[index].described.outputs();
        let complete = ports.all(|(port, _)| record.outputs.contains_key(port));
        let readable = |digest: &Digest| self.actions.store.contains_artifact(*digest);
        Ok((complete && (!lost || record.outputs.values().all(readable))).then_some(record))
    }

    fn run(
        &self,
        index: usize,
        action: &Action,
        snapshots: &Snapshots,
        reporter: &StageReporter<'_>,
    ) -> Result<BTreeMap<String, Artifact>, StageError> {
        let actions = self.actions;
        let stage = &actions.workflow.stages[index];
        let files = actions.data_files(index).map_err(to_stage_error)?;
        let inputs = self.open_inputs(action)?;
        let memos = Memos {
            store: actions.store,
            stage: &stage.name,
            workflow: &actions.workflow_name,
            run_id: self.run_id,
            ignore: actions.no_cache(),
            used: self.memo_keys,
        };
        let context = RunContext {
            stage: &stage.name,
            store: actions.store,
            seed: stage.seed,
            inputs: &inputs,
            files: &files,
            placement: actions.placement(index),
            processes: &Processes::alone(),
            snapshots,
            reporter,
            cancel: self.cancel,
            memos: &memos,
        };
        let span = tracing::info_span!("stage", name = %stage.name, kind = stage.kind.name());
        let crew = actions.host.crew.as_ref().filter(|_| stage.kind.is_on_ranks());
        let joint = crew.map(|crew| crew.begin(stage.kind.name(), stage.config.settings(), action.prefix_key, &context)).transpose()?;
        let context = match &joint {
            Some(joint) => RunContext { processes: &joint.processes, ..context },
            None => context,
        };
        let run = || span.in_scope(|| stage.kind.run(&stage.config, &context));
        // What a stage leaves behind when it unwinds is dropped with it: artifacts not published, snapshots whole.
        let outputs = panics::catch(run).unwrap_or_else(|panic| Err(panicked(&panic)));
        if let Some(joint) = joint {
            joint.end(&outputs);
        }
        let outputs = outputs?;
        for (port, meta) in stage.described.outputs() {
            let made = outputs.get(port).ok_or_else(|| wrong(format!("did not give its output `{port}`")))?;
            let (made, declared) = (&made.manifest().artifact_type, meta.artifact_type.name());
            if made != declared {
                return Err(wrong(format!("gave `{made}` as its output `{port}`, which is declared as `{declared}`")));
            }
        }
        for file in files.iter().flatten() {
            let now = actions.store.file_digest(&file.path)?;
            if now.digest != file.digest {
                let message = "changed while the stage was reading it; nothing was cached".into();
                let hint = Some("run again when nothing writes to it".into());
                return Err(StageError::Data { path: file.name.clone(), line: None, message, hint });
            }
        }
        Ok(outputs)
    }

    fn open_inputs(&self, action: &Action) -> Result<BTreeMap<String, Vec<Input>>, StageError> {
        let actions = self.actions;
        let mut opened = BTreeMap::new();
        for (port, inputs) in &action.inputs {
            let mut list = Vec::with_capacity(inputs.len());
            for input in inputs {
                let maker = &actions.workflow.stages[input.stage];
                let missing = || StoreError::Missing { what: "artifact", digest: input.digest };
                list.push(Input {
                    stage: maker.name.clone(),
                    port: maker.kind.outputs().first().is_none_or(|main| main.name != input.port).then(|| input.port.clone()),
                    kind: maker.kind.name().to_owned(),
                    artifact: actions.store.open_artifact(input.digest)?.ok_or_else(missing)?,
                    settings: maker.config.settings().clone(),
                    placement: actions.placement(input.stage).clone(),
                });
            }
            opened.insert(port.clone(), list);
        }
        Ok(opened)
    }

    fn publish(
        &self,
        index: usize,
        action: &Action,
        outputs: &BTreeMap<String, Artifact>,
        reported: &Reported,
        started_at: f64,
    ) -> Result<ActionRecord, StageError> {
        let actions = self.actions;
        let stage = &actions.workflow.stages[index];
        let numerics = match &reported.other_numerics {
            Some(other) => format!("{} (continued from {other})", actions.host.numerics),
            None => actions.host.numerics.clone(),
        };
        let device = |spec: &rlflow_api::DeviceSpec| match actions.host.device(*spec) {
            Some(info) if !info.name.is_empty() => format!("{spec} ({})", info.name),
            _ => spec.to_string(),
        };
        let provenance = Provenance {
            stage: stage.name.clone(),
            kind: stage.kind.name().to_owned(),
            workflow: actions.workflow_name.clone(),
            run_id: self.run_id.to_owned(),
            host: self.host_name.to_owned(),
            started_at,
            duration_seconds: reported.seconds,
            rlflow_version: env!("CARGO_PKG_VERSION").to_owned(),
            devices: actions.placement(index).devices.iter().map(device).collect(),
            numerics,
            resumed_from_step: reported.continued.map(|continued| continued.step),
            adopted: false,
            settings: stage.config.settings().clone(),
            inputs: actions.named_inputs(&action.inputs),
            files: actions.data_files(index).map_err(to_stage_error)?.into_iter().flatten().map(|file| (file.name, file.digest)).collect(),
            measurements: reported.measurements.clone(),
        };
        let record = ActionRecord {
            format: ActionRecord::FORMAT,
            key: action.key,
            full_key: actions.full_key(index, &action.inputs).map_err(to_stage_error)?,
            outputs: outputs.iter().map(|(port, artifact)| (port.clone(), artifact.digest())).collect(),
            metrics: reported.record.final_metrics(),
            records: reported.record.store(actions.store).map_err(to_stage_error)?,
            provenance,
        };
        actions.store.put_action(&record)?;
        Ok(record)
    }
}

fn to_stage_error(error: EngineError) -> StageError {
    match error {
        EngineError::Store(error) => StageError::Store(error),
        other => StageError::invalid(other.to_string()),
    }
}

fn wrong(what: String) -> StageError {
    StageError::invalid_with_hint(format!("the stage {what}"), "this is a bug in its kind; please report it with the workflow file")
}

pub(crate) fn panicked(panic: &Panic) -> StageError {
    StageError::invalid_with_hint(
        format!("the stage panicked: {panic}"),
        "this is a bug in rlflow; please report it with the workflow file, and what a run with RUST_BACKTRACE=1 prints",
    )
    .or_device_trouble()
}
