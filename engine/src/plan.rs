use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;

use rlflow_api::{Needs, Placement, extends};
use rlflow_store::{ActionRecord, Digest, LeaseHolder, Store};

use crate::{
    Host, Rerun, Result,
    action::{Action, Actions, Decision, Request},
    decider::Decider,
    history,
    memory::Usage,
    settled,
    workflow::{Workflow, WorkflowErrors},
};

/// What would happen to a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Its result is in the store.
    Cached,
    /// It runs from the start.
    Run,
    /// It continues from where it was interrupted.
    Resume,
    /// It continues from a snapshot of a finished, shorter run.
    Extend,
    /// A stage above it runs first.
    Pending,
    /// Another process is running it.
    Running,
    /// Its last run, of today's settings and inputs, failed; it runs again.
    Failed,
}

impl Status {
    /// As in `--json`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cached => "cached",
            Self::Run => "run",
            Self::Resume => "resume",
            Self::Extend => "extend",
            Self::Pending => "pending",
            Self::Running => "running",
            Self::Failed => "failed",
        }
    }

    /// How an action starts: from a snapshot or from nothing.
    pub fn of(action: &Action) -> Self {
        match action.snapshots.first() {
            None => Self::Run,
            Some(snapshot) if extends(snapshot, Some(action.key)) => Self::Extend,
            Some(_) => Self::Resume,
        }
    }
}

/// A stage's line of a plan.
#[derive(Debug)]
pub struct PlannedStage {
    /// Index in the workflow.
    pub stage: usize,
    /// What would happen.
    pub status: Status,
    /// Action key, where the inputs are known.
    pub key: Option<Digest>,
    /// Why it is not cached.
    pub rerun: Option<Rerun>,
    /// Step of the snapshot that it continues from.
    pub continues_from_step: Option<u64>,
    /// Where it runs.
    pub placement: Placement,
    /// Memory of the device that is filled most, as the kind predicts it; zero if it does not.
    pub peak_bytes: u64,
    /// Memory of each device.
    pub usage: Usage,
    /// Whether it works where stages that it takes models of are placed (PPO's roles).
    pub holds_others: bool,
    /// Memory of a rank, by what it is for.
    pub needs: Needs,
    /// How long it may take, where history knows.
    pub estimated_seconds: Option<f64>,
    /// Who is running it.
    pub holder: Option<LeaseHolder>,
    /// What its last run died of.
    pub error: Option<String>,
}

/// What a run would do, stage by stage in topological order.
#[derive(Debug)]
pub struct Plan {
    /// The selected stages.
    pub stages: Vec<PlannedStage>,
}

impl Plan {
    /// Plans a workflow.
    pub fn new(workflow: &Workflow, store: &Store, host: &Host, request: &Request) -> Result<Self> {
        let actions = Actions::new(workflow, store, host, request)?;
        let plan = Self::of(&actions)?;
        if !actions.misplaced().is_empty() {
            plan.check_places(&actions, false)?;
        }
        Ok(plan)
    }

    /// Plans with what decides.
    pub fn of(actions: &Actions<'_>) -> Result<Self> {
        let workflow = actions.workflow;
        let mut decider = Decider::new(actions, usize::MAX);
        let mut planned: Vec<Option<PlannedStage>> = workflow.stages.iter().map(|_| None).collect();
        loop {
            for (stage, decision) in decider.decide()? {
                planned[stage] = Some(match decision {
                    Decision::Cached { key, .. } => {
                        PlannedStage { status: Status::Cached, key: Some(key), ..PlannedStage::new(actions, stage) }
                    }
                    Decision::Run(action) => PlannedStage::running(actions, stage, &action)?,
                });
            }
            if !decider.assume_made_again() {
                break;
            }
        }
        let outputs = decider.outputs();
        for index in workflow.order.iter().copied().filter(|stage| actions.is_selected(*stage)) {
            if planned[index].is_some() {
                continue;
            }
            let stage = &workflow.stages[index];
            let rerun = stage.inputs.values().flatten().find(|edge| outputs[edge.stage].is_none()).map(|edge| {
                let above = planned[edge.stage].as_ref().and_then(|above| above.rerun.as_ref());
                Rerun::depends(&workflow.stages[edge.stage].name, above)
            });
            let last = actions.reach.last_result(&actions.workflow_name, &stage.name, stage.kind.name())?;
            let estimated_seconds = last.and_then(|last| estimate(&last, &stage.identity_settings, 0));
            let pending = PlannedStage { status: Status::Pending, rerun, estimated_seconds, ..PlannedStage::new(actions, index) };
            planned[index] = Some(pending);
        }
        let mut plan = Self { stages: workflow.order.iter().filter_map(|index| planned[*index].take()).collect() };
        if plan.is_all_cached() {
            let key = |planned: &PlannedStage| Some((planned.stage, planned.key?, outputs[planned.stage].as_ref()?));
            let mut cached: Vec<_> = plan.stages.iter().filter_map(key).collect();
            cached.sort_unstable_by_key(|(stage, ..)| *stage);
            settled::note(actions, cached.into_iter(), None);
        }
        history::mark_failures(&mut plan, actions.store, &actions.workflow_name)?;
        Ok(plan)
    }

    /// Refuses what would run and cannot where it is placed; what is cached may be as large as it likes.
    pub(crate) fn check_places(&self, actions: &Actions<'_>, run: bool) -> Result<()> {
        let would_run = self.stages.iter().filter(|planned| !matches!(planned.status, Status::Cached));
        let errors: Vec<_> = would_run.filter_map(|planned| actions.placement_error(planned.stage, run)).collect();
        if errors.is_empty() { Ok(()) } else { Err(WorkflowErrors::new(errors).into()) }
    }

    /// Whether nothing would run.
    pub fn is_all_cached(&self) -> bool {
        self.stages.iter().all(|stage| stage.status == Status::Cached)
    }

    /// The plan as scripts see it, in the order of the file.
    pub fn to_json<'p>(&'p self, workflow: &'p Workflow) -> impl Serialize + 'p {
        let mut stages: Vec<&PlannedStage> = self.stages.iter().collect();
        stages.sort_unstable_by_key(|planned| planned.stage);
        PlanJson { workflow: &workflow.name, stages: stages.into_iter().map(|planned| planned.to_json(workflow)).collect() }
    }
}

/// A plan in the order of its keys. Not a tree of values: with ten thousand stages that would cost as much as planning.
#[derive(Serialize)]
struct PlanJson<'p> {
    workflow: &'p str,
    stages: Vec<StageJson<'p>>,
}

#[derive(Serialize)]
struct StageJson<'p> {
    name: &'p str,
    kind: &'static str,
    status: &'static str,
    key: Option<Digest>,
    reason: Option<Value>,
    continues_from_step: Option<u64>,
    devices: Vec<String>,
    ranks: usize,
    zero: u8,
    peak_bytes: u64,
    memory: BTreeMap<String, u64>,
    rank_bytes: RankBytes,
    estimated_seconds: Option<f64>,
    running_by: Option<&'p LeaseHolder>,
    error: Option<&'p str>,
}

#[derive(Serialize)]
struct RankBytes {
    parameters: u64,
    gradients: u64,
    optimizer: u64,
    activations: u64,
    buffers: u64,
}

/// How long a stage takes that took what `last` says and has `done` steps behind it. What says how much there is to do
/// scales the time; none where it is said in another way than last time.
fn estimate(last: &ActionRecord, settings: &Value, done: u64) -> Option<f64> {
    let mut seconds = last.provenance.duration_seconds;
    for amount in ["/train/steps", "/steps", "/train/epochs", "/epochs"] {
        let of = |settings: &Value| settings.pointer(amount).and_then(Value::as_f64).filter(|amount| *amount > 0.0);
        let (before, now) = (of(&last.full_key["settings"]), of(settings));
        let left = now.map(|now| if amount.ends_with("steps") { (now - done as f64).max(0.0) } else { now });
        match (before, left) {
            (Some(before), Some(left)) => seconds *= left / before,
            (None, None) => {}
            _ => return None,
        }
    }
    Some(seconds)
}

impl PlannedStage {
    fn new(actions: &Actions<'_>, stage: usize) -> Self {
        let usage = actions.usage(stage);
        Self {
            stage,
            status: Status::Run,
            key: None,
            rerun: None,
            continues_from_step: None,
            placement: actions.placement(stage).clone(),
            peak_bytes: usage.values().copied().max().unwrap_or(0),
            usage,
            holds_others: !actions.workflow.stages[stage].described.holds().is_empty(),
            needs: actions.rank_needs(stage),
            estimated_seconds: None,
            holder: None,
            error: None,
        }
    }

    fn running(actions: &Actions<'_>, stage: usize, action: &Action) -> Result<Self> {
        let holder = actions.store.lease_holder(action.key)?;
        let done = action.snapshots.first().map_or(0, |snapshot| snapshot.step);
        let settings = &actions.workflow.stages[stage].identity_settings;
        Ok(Self {
            status: if holder.is_some() { Status::Running } else { Status::of(action) },
            key: Some(action.key),
            rerun: Some(action.rerun.clone()),
            continues_from_step: action.snapshots.first().map(|snapshot| snapshot.step),
            estimated_seconds: action.last.as_ref().and_then(|last| estimate(last, settings, done)),
            holder,
            ..Self::new(actions, stage)
        })
    }

    fn to_json<'p>(&'p self, workflow: &'p Workflow) -> StageJson<'p> {
        let stage = &workflow.stages[self.stage];
        StageJson {
            name: &stage.name,
            kind: stage.kind.name(),
            status: self.status.name(),
            key: self.key,
            reason: self.rerun.as_ref().map(Rerun::to_json),
            continues_from_step: self.continues_from_step,
            devices: self.placement.devices.iter().map(ToString::to_string).collect(),
            ranks: self.placement.ranks(),
            zero: self.placement.zero,
            peak_bytes: self.peak_bytes,
            memory: self.usage.iter().map(|(device, bytes)| (device.to_string(), *bytes)).collect(),
            rank_bytes: RankBytes {
                parameters: self.needs.parameter_bytes,
                gradients: self.needs.gradient_bytes,
                optimizer: self.needs.optimizer_bytes,
                activations: self.needs.activation_bytes,
                buffers: self.needs.buffer_bytes,
            },
            estimated_seconds: self.estimated_seconds,
            running_by: self.holder.as_ref(),
            error: self.error.as_deref(),
        }
    }
}
