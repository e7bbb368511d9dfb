//! Actions: what a stage would be made of, whether that is cached, and if not, why and from where it can continue.
//! `plan`, `status` and `run` all decide here, so they cannot disagree.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, OnceLock},
};

use rlflow_api::{DataFile, DescribeContext, InputMeta, Placement, data_format};
use rlflow_store::{ActionRecord, Digest, Snapshot, Store, StoreError};

use crate::{
    Host, Rerun, RerunReason, Result,
    action_key::{FullKey, KeyFile},
    reason::Current,
    workflow::{Stage, Workflow, WorkflowError, WorkflowErrors},
};

/// What is asked of a workflow.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Request {
    /// Only these stages and what they need; all if empty.
    pub stages: Vec<String>,
    /// Run these whether cached or not.
    pub force: Vec<String>,
    /// Neither look up results nor continue from snapshots. Results are stored all the same.
    pub no_cache: bool,
}

/// Digests by output port.
pub type Outputs = Arc<BTreeMap<String, Digest>>;

/// What must be done to have a stage's result.
#[derive(Debug)]
pub enum Decision {
    /// Nothing.
    Cached(Box<ActionRecord>),
    /// Run it.
    Run(Box<Action>),
}

/// A stage that must run.
#[derive(Debug)]
pub struct Action {
    /// Action key.
    pub key: Digest,
    /// Key of its snapshots.
    pub prefix_key: Digest,
    /// Why it runs.
    pub rerun: Rerun,
    /// Port to (index of the stage, digest).
    pub inputs: BTreeMap<String, Vec<(usize, Digest)>>,
    /// Snapshots that it can continue from, best first.
    pub snapshots: Vec<Snapshot>,
    /// The last result of the same stage, whatever its key.
    pub last: Option<ActionRecord>,
}

/// An input artifact that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unreadable {
    /// Stage that makes it.
    pub stage: usize,
    /// Its output port.
    pub port: String,
    /// Whether it is there but damaged.
    pub damaged: bool,
}

struct StageFiles {
    data: Vec<Vec<DataFile>>,
    key: Vec<Vec<KeyFile>>,
}

/// Decides about the stages of one workflow in one store.
pub struct Actions<'a> {
    /// The workflow.
    pub workflow: &'a Workflow,
    /// The store.
    pub store: &'a Store,
    /// The machine.
    pub host: &'a Host,
    /// How records name the workflow: its path from the folder of the store, so that moving both changes nothing.
    pub workflow_name: String,
    selected: Vec<bool>,
    forced: Vec<bool>,
    no_cache: bool,
    placements: Vec<Placement>,
    files: Vec<OnceLock<Arc<StageFiles>>>,
}

impl<'a> Actions<'a> {
    /// Checks the request: stage names, and devices of the selected stages.
    pub fn new(workflow: &'a Workflow, store: &'a Store, host: &'a Host, request: &Request) -> Result<Self> {
        let mut errors = Vec::new();
        let mut resolve = |names: &[String], what: &str| {
            let found = names.iter().map(|name| find_stages(workflow, name, what));
            found.filter_map(|found| found.map_err(|error| errors.push(error)).ok()).flatten().collect::<Vec<_>>()
        };
        let (wanted, force) = (resolve(&request.stages, "STAGE"), resolve(&request.force, "--force"));
        let count = workflow.stages.len();
        let selected = if request.stages.is_empty() { vec![true; count] } else { workflow.dag.ancestors(&wanted) };
        let mut forced = vec![false; count];
        force.into_iter().for_each(|stage| forced[stage] = true);

        let mut placements = Vec::with_capacity(count);
        for (index, stage) in workflow.stages.iter().enumerate() {
            let peak = |ranks, zero| describe(workflow, stage, ranks, zero);
            let placement = host.place(stage.kind.execution(&stage.config).as_ref(), peak);
            placements.push(placement.unwrap_or_else(|error| {
                if selected[index] {
                    let message = format!("stage `{}`: {}", stage.name, error.message);
                    errors.push(WorkflowError::new("device_unavailable", message).with_hint(error.hint));
                }
                Placement::default()
            }));
        }
        if !errors.is_empty() {
            return Err(WorkflowErrors::new(errors).into());
        }
        let files = (0..count).map(|_| OnceLock::new()).collect();
        let workflow_name = workflow_name(workflow, store);
        Ok(Self { workflow, store, host, workflow_name, selected, forced, no_cache: request.no_cache, placements, files })
    }

    /// Whether the stage was asked for, or is needed by one that was.
    pub fn is_selected(&self, stage: usize) -> bool {
        self.selected[stage]
    }

    /// Where the stage runs.
    pub fn placement(&self, stage: usize) -> &Placement {
        &self.placements[stage]
    }

    /// Whether cached results are left aside.
    pub fn no_cache(&self) -> bool {
        self.no_cache
    }

    /// Why the stage must run whatever its key is.
    pub fn forced(&self, stage: usize) -> Option<RerunReason> {
        if self.forced[stage] {
            Some(RerunReason::Forced { option: format!("--force {}", self.workflow.stages[stage].name) })
        } else if self.no_cache {
            Some(RerunReason::Forced { option: "--no-cache".into() })
        } else {
            None
        }
    }

    /// The stage's data files with their digests.
    pub fn data_files(&self, stage: usize) -> Result<Vec<Vec<DataFile>>> {
        Ok(self.files(stage)?.data.clone())
    }

    /// Decides about a stage whose inputs are all known. `must_run` is a reason to run it even if it is cached.
    pub fn decide(&self, index: usize, outputs: &[Option<Outputs>], must_run: Option<&RerunReason>) -> Result<Decision> {
        let stage = &self.workflow.stages[index];
        let files = self.files(index)?;
        let inputs = self.inputs(stage, outputs)?;
        let full_key = full_key(stage, &inputs, &files.key);
        let key = full_key.digest();
        let must_run = must_run.cloned().or_else(|| self.forced(index));
        if must_run.is_none()
            && let Some(record) = self.store.action(key)?
            && stage.described.outputs.keys().all(|port| record.outputs.contains_key(port))
        {
            return Ok(Decision::Cached(Box::new(record)));
        }
        let last = self.store.last_action(&self.workflow_name, &stage.name, stage.kind.name())?;
        let fresh = matches!(must_run, Some(RerunReason::Forced { .. }));
        let prefix_key = full_key.prefix(&stage.kind.horizon(&stage.config));
        let snapshots = if fresh { Vec::new() } else { self.snapshots(stage, prefix_key)? };
        let rerun = match must_run {
            Some(reason) => reason.into(),
            None => {
                let current = Current { key: &full_key, inputs: self.named(&inputs), files: files.named() };
                match (Rerun::find(last.as_ref(), &current), snapshots.first()) {
                    (Rerun { reason: RerunReason::NeverRan, .. }, Some(snapshot)) => RerunReason::Unfinished { step: snapshot.step }.into(),
                    (rerun, _) => rerun,
                }
            }
        };
        Ok(Decision::Run(Box::new(Action { key, prefix_key, rerun, inputs, snapshots, last })))
    }

    /// The full key of a stage whose inputs are known, as it is stored.
    pub fn full_key(&self, index: usize, inputs: &BTreeMap<String, Vec<(usize, Digest)>>) -> Result<serde_json::Value> {
        Ok(full_key(&self.workflow.stages[index], inputs, &self.files(index)?.key).to_value())
    }

    /// Input artifacts of an action that cannot be opened.
    pub fn unreadable_inputs(&self, action: &Action) -> Result<Vec<Unreadable>> {
        let mut unreadable = Vec::new();
        for (port, inputs) in &action.inputs {
            for (at, (stage, digest)) in inputs.iter().enumerate() {
                let damaged = match self.store.open_artifact(*digest) {
                    Ok(Some(_)) => continue,
                    Ok(None) | Err(StoreError::Missing { .. }) => false,
                    Err(StoreError::Damaged { .. } | StoreError::Format { .. }) => true,
                    Err(error) => return Err(error.into()),
                };
                // The port of the upstream stage, not ours. Edges and inputs are in the same order.
                let port = self.edge_port(*stage, port, at, action);
                unreadable.push(Unreadable { stage: *stage, port, damaged });
            }
        }
        Ok(unreadable)
    }

    fn edge_port(&self, stage: usize, port: &str, at: usize, action: &Action) -> String {
        let makes = |digest: Digest| move |edge: &&crate::workflow::Edge| edge.stage == stage && !digest.as_bytes().is_empty();
        let digest = action.inputs[port][at].1;
        self.workflow
            .stages
            .iter()
            .filter_map(|consumer| consumer.inputs.get(port)?.get(at))
            .find(makes(digest))
            .map_or_else(|| port.to_owned(), |edge| edge.port.clone())
    }
}
