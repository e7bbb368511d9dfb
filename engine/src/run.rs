use std::{
    collections::{BTreeMap, HashSet},
    sync::{Arc, Mutex, mpsc},
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use rlflow_api::{CancelToken, StageError, StageEvent};
use rlflow_store::{ActionRecord, Digest, Store, StoreError};

use crate::{
    Host, Plan, Result,
    action::{Action, Actions, Decision, Outputs, Request},
    decider::Decider,
    event::{Event, Events, RunLogSink, StageOutcome, StageStatus, now},
    execute::{Attempt, Session},
    settled,
    tensorboard::TensorBoard,
    workflow::Workflow,
};

/// Stack of a stage's thread. Autodiff graphs are walked recursively; the memory is only reserved, not used.
pub(crate) const STACK_BYTES: usize = 256 << 20;
/// How often a stage is tried again because its inputs or snapshots were damaged.
const RETRIES: u32 = 2;

/// How often a run notes what it has reached so far.
const NOTE_EVERY: Duration = Duration::from_secs(10);

/// How to run.
#[derive(Debug, Clone)]
pub struct RunOptions {
    /// What is asked for.
    pub request: Request,
    /// Stages at once.
    pub jobs: usize,
    /// Whether stages that do not need a failed one still start.
    pub keep_going: bool,
    /// The command line, for the run's log.
    pub command: Vec<String>,
    /// Whether the summary has the metrics of cached stages even if all are cached: reading ten thousand records takes a while.
    pub cached_metrics: bool,
}

impl Default for RunOptions {
    fn default() -> Self {
        Self { request: Request::default(), jobs: 1, keep_going: false, command: Vec::new(), cached_metrics: false }
    }
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// Name of the run.
    pub run_id: String,
    /// Every stage that was asked for, in the order of the file.
    pub stages: Vec<StageOutcome>,
    /// How long it took.
    pub seconds: f64,
    /// Whether the user stopped it.
    pub interrupted: bool,
}

impl Summary {
    /// Whether every stage has its result.
    pub fn ok(&self) -> bool {
        self.stages.iter().all(has_result)
    }

    /// Whether there was nothing to do.
    pub fn is_all_cached(&self) -> bool {
        self.stages.iter().all(|stage| stage.status == StageStatus::Cached)
    }
}

/// Runs what is not cached. A stage's failure is part of the summary; an error means that nothing more could be done.
pub fn run(
    workflow: &Workflow,
    store: &Store,
    host: &Host,
    options: &RunOptions,
    events: &Events,
    cancel: &CancelToken,
) -> Result<Summary> {
    let started = Instant::now();
    let mut actions = Actions::new(workflow, store, host, &options.request)?;
    if actions.fall_back() {
        tracing::warn!("`[devices]` declares devices that this machine does not have: `device = \"auto\"` runs on what it has");
    }
    if !actions.misplaced().is_empty() {
        Plan::of(&actions)?.check_places(&actions, true)?;
    }
    let host_name = host_name();
    let header = run_header(&actions.workflow_name, &workflow.name, &options.command, &host.numerics);
    // A store that cannot be written still answers a run in which everything is cached.
    let (log, log_error) = match store.begin_run(&header) {
        Ok(log) => (Some(Arc::new(log)), None),
        Err(error) => (None, Some(error)),
    };
    if let Some(log) = &log {
        events.add(Box::new(RunLogSink::new(log.clone())));
        events.add(Box::new(TensorBoard::new(log.folder().join("tensorboard"))));
    }
    let run_id = log.as_ref().map_or_else(String::new, |log| log.id().to_owned());
    let selected = (0..workflow.stages.len()).filter(|stage| actions.is_selected(*stage)).count();
    let workflow_path = workflow.path.display().to_string();
    events.emit(&Event::Started { run_id: run_id.clone(), workflow: workflow_path, stages: selected, jobs: options.jobs });

    let memo_keys = Mutex::default();
    let session = Session { actions: &actions, events, cancel, run_id: &run_id, host_name: &host_name, memo_keys: &memo_keys };
    let mut runner = Runner::new(&session, options, log_error);
    runner.run()?;
    let did_work = runner.attempts > 0;
    if did_work || options.cached_metrics {
        runner.add_cached_metrics();
    }
    let reached = runner.record_end();
    if !did_work {
        let found = runner.outcomes.iter().zip(runner.decider.outputs()).enumerate();
        let cached = found.filter_map(|(stage, (outcome, outputs))| Some((stage, outcome.as_ref()?.key?, outputs.as_ref()?)));
        settled::note(&actions, cached, reached);
    }
    let stages: Vec<StageOutcome> = runner.outcomes.into_iter().flatten().collect();
    let (ok, interrupted, seconds) = (stages.iter().all(has_result), cancel.is_cancelled(), started.elapsed().as_secs_f64());
    let finished = Event::Finished { ok, interrupted, seconds, stages };
    events.emit(&finished);
    let stages = match finished {
        Event::Finished { stages, .. } => stages,
        _ => Vec::new(),
    };
    let summary = Summary { run_id, stages, seconds, interrupted };
    if let Some(Err(error)) = log.filter(|_| did_work).map(|log| log.sync()) {
        tracing::warn!(%error, "the run's log may be lost in a power cut");
    }
    Ok(summary)
}

fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// First line of a run's log. `workflow` is how records name it, `name` its own name.
pub(crate) fn run_header(workflow: &str, name: &str, command: &[String], numerics: &str) -> Value {
    json!({
        "event": "run", "time": now(), "workflow": workflow, "name": name, "command": command,
        "host": host_name(), "pid": std::process::id(), "rlflow_version": env!("CARGO_PKG_VERSION"), "numerics": numerics,
    })
}

fn has_result(outcome: &StageOutcome) -> bool {
    outcome.status == StageStatus::Cached || did_run(outcome.status)
}

fn did_run(status: StageStatus) -> bool {
    matches!(status, StageStatus::Ran | StageStatus::Resumed | StageStatus::Extended)
}

/// Final metrics, and measured values.
fn all_metrics(record: &ActionRecord) -> BTreeMap<String, f64> {
    let mut metrics = record.metrics.clone();
    metrics.extend(record.provenance.measurements.clone());
    metrics
}

/// The loop of one run: decide, start, wait.
struct Runner<'a> {
    session: &'a Session<'a>,
    options: &'a RunOptions,
    decider: Decider<'a>,
    outcomes: Vec<Option<StageOutcome>>,
    ready: BTreeMap<usize, Arc<Action>>,
    retries: BTreeMap<usize, u32>,
    /// Keys of what was started and has no result, and of its snapshots.
    unfinished: BTreeMap<usize, [Digest; 2]>,
    attempts: usize,
    /// When what was reached was noted last, and with how many intermediate results.
    noted: Option<(Instant, usize)>,
    /// What a run that was killed before this one had reached.
    left: Vec<Digest>,
    stop: bool,
    /// Why nothing can be written, if so: said when something must be.
    read_only: Option<StoreError>,
}

impl<'a> Runner<'a> {
    fn new(session: &'a Session<'a>, options: &'a RunOptions, read_only: Option<StoreError>) -> Self {
        Self {
            session,
            options,
            decider: Decider::new(session.actions, options.jobs),
            outcomes: vec![None; session.actions.workflow.stages.len()],
            ready: BTreeMap::new(),
            retries: BTreeMap::new(),
            unfinished: BTreeMap::new(),
            attempts: 0,
            noted: None,
            left: Vec::new(),
            stop: false,
            read_only,
        }
    }

    fn run(&mut self) -> Result<()> {
        let session = self.session;
        let (sender, receiver) = mpsc::channel();
        thread::scope(|scope| -> Result<()> {
            loop {
                let decided = self.decide();
                if decided.is_err() {
                    // Running stages stop at their next step, with a snapshot, before the error is said.
                    session.cancel.cancel();
                    decided?;
                }
                while !self.stop && !session.cancel.is_cancelled() {
                    let (usage, capacity) = (|stage| session.actions.usage(stage), |device| session.actions.capacity(device));
                    let Some(stage) = self.decider.schedule.start(usage, capacity) else { break };
                    let Some(action) = self.ready.remove(&stage) else { continue };
                    if let Some(error) = self.read_only.take() {
                        return Err(error.into());
                    }
                    self.unfinished.insert(stage, [action.key, action.prefix_key]);
                    // A collection beside this run must know what it builds on.
                    self.record_running();
                    self.attempts += 1;
                    let sender = sender.clone();
                    let attempt = move || {
                        let attempt = session.attempt(stage, &action);
                        // The receiver lives as long as this scope.
                        let _ = sender.send((stage, action, attempt));
                    };
                    let name = session.actions.workflow.stages[stage].name.clone();
                    let spawned = thread::Builder::new().name(name).stack_size(STACK_BYTES).spawn_scoped(scope, attempt);
                    spawned.map_err(crate::EngineError::io("start a thread for a stage"))?;
                }
                if self.decider.schedule.is_idle() {
                    break;
                }
                let Ok((stage, action, attempt)) = receiver.recv() else { break };
                self.end(stage, &action, attempt)?;
            }
            Ok(())
        })?;
        let why = if session.cancel.is_cancelled() { "the run was interrupted" } else { "another stage failed" };
        for stage in self.decider.schedule.unfinished() {
            self.skip(stage, why.to_owned());
        }
        Ok(())
    }

    /// Decides about every stage whose inputs are settled.
    fn decide(&mut self) -> Result<()> {
        for (stage, decision) in self.decider.decide()? {
            match decision {
                Decision::Cached { key, outputs } => {
                    let name = self.session.actions.workflow.stages[stage].name.clone();
                    self.session.events.emit(&Event::Cached { stage: name, key, waited: false });
                    self.note(stage, outputs, StageOutcome { key: Some(key), ..self.outcome(stage, StageStatus::Cached) });
                }
                Decision::Run(action) => _ = self.ready.insert(stage, Arc::from(action)),
            }
        }
        Ok(())
    }

    /// Takes in how an attempt ended.
    fn end(&mut self, stage: usize, action: &Action, attempt: Attempt) -> Result<()> {
        match attempt {
            Attempt::Found(record) => {
                let name = self.session.actions.workflow.stages[stage].name.clone();
                self.session.events.emit(&Event::Cached { stage: name, key: record.key, waited: true });
                let outcome = StageOutcome { key: Some(record.key), ..self.outcome(stage, StageStatus::Cached) };
                self.settle(stage, record.outputs.into(), outcome);
            }
            Attempt::Ran { record, status, seconds } => {
                let outcome = StageOutcome {
                    key: Some(record.key),
                    seconds,
                    rerun: Some(action.rerun.clone()),
                    same_output: action.last.as_ref().is_some_and(|last| last.outputs == record.outputs),
                    metrics: all_metrics(&record),
                    ..self.outcome(stage, status)
                };
                self.settle(stage, record.outputs.into(), outcome);
                // Intermediate results of a stage that ended are asked for by nobody before its settings change.
                self.record_running();
            }
            Attempt::Failed { error, seconds } => {
                if !self.try_again(stage, action, &error)? {
                    self.fail(stage, action, &error, seconds);
                }
            }
        }
        Ok(())
    }

    /// Damage in the store is repaired by making the damaged thing again, a few times at most.
    fn try_again(&mut self, stage: usize, action: &Action, error: &StageError) -> Result<bool> {
        let StageError::Store(StoreError::Damaged { .. } | StoreError::Missing { .. } | StoreError::Format { .. }) = error else {
            return Ok(false);
        };
        let retries = self.retries.entry(stage).or_default();
        *retries += 1;
        if *retries > RETRIES || self.session.cancel.is_cancelled() {
            return Ok(false);
        }
        let workflow = self.session.actions.workflow;
        let name = &workflow.stages[stage].name;
        let warning = StageEvent::Warning { text: format!("{error}; trying again") };
        self.session.events.emit(&Event::Stage { stage: name.clone(), event: warning });
        let mut lost = self.session.actions.unreadable_inputs(action)?;
        for lost in &mut lost {
            // It was there when the stage started: what set it aside was the damage that was just found.
            lost.damaged = matches!(error, StageError::Store(StoreError::Damaged { .. }));
        }
        self.decider.make_again(stage, &lost);
        Ok(true)
    }

    fn settle(&mut self, stage: usize, outputs: Outputs, outcome: StageOutcome) {
        self.note(stage, outputs.clone(), outcome);
        self.decider.settle(stage, outputs);
    }

    /// Notes how a stage came to its result.
    fn note(&mut self, stage: usize, outputs: Outputs, outcome: StageOutcome) {
        let outcome = StageOutcome { outputs, ..outcome };
        if outcome.status != StageStatus::Cached {
            self.session.events.emit(&Event::StageFinished(outcome.clone()));
        }
        self.outcomes[stage] = Some(outcome);
        self.unfinished.remove(&stage);
    }

    /// Keys of everything that this run came to: results, and snapshots that longer or later runs continue from.
    fn reached(&self) -> Vec<Digest> {
        let actions = self.session.actions;
        let mut keys: Vec<Digest> = self.unfinished.values().copied().flatten().collect();
        for (stage, outcome) in self.outcomes.iter().enumerate() {
            let Some(key) = outcome.as_ref().and_then(|outcome| outcome.key) else { continue };
            keys.push(key);
            keys.extend(actions.lasting_prefix_key(stage, self.decider.outputs()).ok().flatten());
        }
        keys
    }

    /// Keys of the intermediate results that stages of this run asked for.
    fn memo_keys(&self) -> Vec<Digest> {
        self.session.memo_keys.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone()
    }

    /// Tells the store what this run builds on and made so far: it may take longer than a collection's grace.
    fn record_running(&mut self) {
        let memos = self.memo_keys();
        if self.noted.is_some_and(|(noted, count)| noted.elapsed() < NOTE_EVERY && count == memos.len()) {
            return;
        }
        let reach = &self.session.actions.reach;
        if self.noted.is_none() {
            self.left = reach.left_running().unwrap_or_default();
        }
        self.noted = Some((Instant::now(), memos.len()));
        self.warn_of(reach.record_running(&[self.reached(), memos].concat()));
    }

    /// Tells the store what this workflow reaches, so that `gc` keeps it. What the store knows that by, if it could be told.
    fn record_end(&self) -> Option<Digest> {
        let actions = self.session.actions;
        let names = |which: &dyn Fn(Option<&StageOutcome>) -> bool| -> HashSet<&str> {
            let stages = actions.workflow.stages.iter().zip(&self.outcomes);
            stages.filter(|(_, outcome)| which(outcome.as_ref())).map(|(stage, _)| stage.name.as_str()).collect()
        };
        let left = names(&|outcome| !outcome.is_some_and(has_result));
        let is_left = |stage: &str| left.contains(stage);
        let is_whole = left.is_empty();
        let reached = self.warn_of(actions.reach.record(&self.reached(), if is_whole { None } else { Some(&is_left) })).flatten();
        if self.noted.is_some() {
            let memos = self.memo_keys();
            let did_not_run = names(&|outcome| !outcome.is_some_and(|outcome| did_run(outcome.status)));
            self.warn_of(actions.reach.record_memos(&memos, &self.left, |stage| did_not_run.contains(stage)));
            self.warn_of(actions.reach.record_running(&[]));
        }
        reached
    }

    /// That something cannot be noted harms no result.
    fn warn_of<T>(&self, noted: Result<T>) -> Option<T> {
        noted.inspect_err(|error| tracing::warn!(%error, "a collection may take this workflow's results")).ok()
    }

    /// The metrics of cached stages, for the table at the end of a run that did something.
    fn add_cached_metrics(&mut self) {
        for outcome in self.outcomes.iter_mut().flatten().filter(|outcome| outcome.status == StageStatus::Cached) {
            if let Some(key) = outcome.key
                && let Ok(Some(record)) = self.session.actions.store.action(key)
            {
                outcome.metrics = all_metrics(&record);
            }
        }
    }

    fn fail(&mut self, stage: usize, action: &Action, error: &StageError, seconds: f64) {
        let outcome = StageOutcome {
            key: Some(action.key),
            seconds,
            rerun: Some(action.rerun.clone()),
            interrupted: matches!(error, StageError::Interrupted),
            error: Some(error.to_string()),
            hint: error.hint().map(str::to_owned),
            ..self.outcome(stage, StageStatus::Failed)
        };
        self.session.events.emit(&Event::StageFinished(outcome.clone()));
        self.outcomes[stage] = Some(outcome);
        let name = self.session.actions.workflow.stages[stage].name.clone();
        let why = if matches!(error, StageError::Interrupted) { "was interrupted" } else { "failed" };
        for skipped in self.decider.schedule.fail(stage) {
            self.skip(skipped, format!("{name} {why}"));
        }
        self.stop |= !self.options.keep_going;
    }

    fn skip(&mut self, stage: usize, why: String) {
        let outcome = StageOutcome { error: Some(why), ..self.outcome(stage, StageStatus::Skipped) };
        self.session.events.emit(&Event::StageFinished(outcome.clone()));
        self.outcomes[stage] = Some(outcome);
    }

    fn outcome(&self, stage: usize, status: StageStatus) -> StageOutcome {
        let stage = &self.session.actions.workflow.stages[stage];
        StageOutcome::new(&stage.name, stage.kind.name(), status)
    }
}
