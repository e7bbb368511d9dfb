//! Runs a workflow again whenever it or its data change.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        mpsc::{self, Receiver},
    },
    thread,
    time::{Duration, Instant},
};

use notify::{RecommendedWatcher, RecursiveMode, Watcher};

use rlflow_api::CancelToken;
use rlflow_store::{Digest, Store};

use crate::{
    EngineError, Host, Plan, Result, RunOptions, Summary,
    event::{Event, Events, Sink},
    interest::Interest,
    run,
    workflow::{Workflow, WorkflowErrors},
};

/// Writing has settled when nothing changed for this long.
const SETTLE: Duration = Duration::from_millis(300);
/// How often a stop that the user asked for is looked for.
const TICK: Duration = Duration::from_millis(100);
/// How often a broken workflow is read again without a change that was noticed.
const RETRY: Duration = Duration::from_secs(2);

/// What a watch tells its caller between runs.
pub enum Watched<'a> {
    /// The workflow is wrong; the watch waits for the next change.
    Broken(&'a EngineError),
    /// A run ended; the watch waits for the next change.
    Ran(&'a Workflow, &'a Summary),
    /// Something changed.
    Changed(&'a Path),
    /// A running stage is stopped because what it reads changed.
    Cancelling(&'a str),
}

/// Everything that a watch needs from outside.
pub struct Watch<'a> {
    /// Reads the workflow anew.
    pub load: &'a (dyn Fn() -> Result<Workflow, WorkflowErrors> + Sync),
    /// Sinks for the events of one run.
    pub sinks: &'a (dyn Fn() -> Vec<Box<dyn Sink>> + Sync),
    /// Told what happens.
    pub tell: &'a (dyn Fn(Watched<'_>) + Sync),
    /// The store.
    pub store: &'a Store,
    /// The machine.
    pub host: &'a Host,
    /// How to run.
    pub options: &'a RunOptions,
    /// Ends the watch, and what it runs.
    pub stop: &'a CancelToken,
}

/// Keys of the stages that run now, by name.
#[derive(Clone, Default)]
struct Running(Arc<Mutex<BTreeMap<String, Digest>>>);

impl Running {
    fn stages(&self) -> BTreeMap<String, Digest> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone()
    }
}

impl Sink for Running {
    fn event(&mut self, _time: f64, event: &Event) {
        let mut running = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        match event {
            Event::StageStarted { stage, key, .. } => _ = running.insert(stage.clone(), *key),
            Event::StageFinished(outcome) => _ = running.remove(&outcome.name),
            _ => {}
        }
    }
}

impl Watch<'_> {
    /// Runs, waits for changes, and runs again, until stopped. `path` is watched while the workflow cannot be read.
    pub fn run(&self, path: &Path) -> Result<()> {
        let (sender, receiver) = mpsc::channel();
        let notify = move |event: notify::Result<notify::Event>| {
            let paths = match event {
                Ok(event) if event.kind.is_access() => Vec::new(),
                // What was lost when too much happened at once, or to an error, may have been anything.
                Ok(event) if event.need_rescan() => vec![PathBuf::new()],
                Ok(event) => event.paths,
                Err(_) => vec![PathBuf::new()],
            };
            for path in paths {
                // Nobody listens any more: the watch is ending.
                let _ = sender.send(path);
            }
        };
        let mut watcher = notify::recommended_watcher(notify).map_err(watch_error)?;
        let changes = Changes { receiver, own: self.store.folder().to_owned() };
        let mut interest = Interest::in_file(path);
        let mut told = String::new();
        follow(&mut watcher, &interest);
        while !self.stop.is_cancelled() {
            match (self.load)() {
                Ok(workflow) => {
                    let known: Vec<PathBuf> = interest.folders().map(|(folder, _)| folder.to_owned()).collect();
                    interest = Interest::of(&workflow);
                    follow(&mut watcher, &interest);
                    told.clear();
                    // What is read from a folder before it is watched may have been edited in between: it is read again.
                    if interest.folders().any(|(folder, _)| !known.iter().any(|known| known == folder)) {
                        continue;
                    }
                    if !self.one_run(&workflow, &changes, &interest)? {
                        self.settle(&changes, &interest, None, None);
                    }
                }
                Err(errors) => {
                    let text = errors.to_string();
                    if told != text {
                        (self.tell)(Watched::Broken(&errors.into()));
                        told = text;
                    }
                    // What a broken workflow would read is not known, so it cannot all be watched.
                    self.settle(&changes, &interest, None, Some(RETRY));
                    follow(&mut watcher, &interest);
                }
            }
        }
        Ok(())
    }

    /// Runs once. True if something changed meanwhile, so that another run is due at once.
    fn one_run(&self, workflow: &Workflow, changes: &Changes, interest: &Interest) -> Result<bool> {
        let cancel = CancelToken::default();
        let running = Running::default();
        let mut sinks = (self.sinks)();
        sinks.push(Box::new(running.clone()));
        let events = Events::new(sinks);
        thread::scope(|scope| {
            let run = scope.spawn(|| run(workflow, self.store, self.host, self.options, &events, &cancel));
            let mut changed = false;
            let mut examined = BTreeMap::new();
            while !run.is_finished() {
                if self.stop.is_cancelled() {
                    cancel.cancel();
                }
                let change = changes.next(TICK, interest);
                let is_new = change.is_some();
                if is_new {
                    changed |= self.settle(changes, interest, change, None);
                }
                // After a change, what starts later may have been decided before it, too.
                let now = running.stages();
                if changed && !cancel.is_cancelled() && (is_new || now != examined) {
                    if let Some(stage) = self.overtaken(&now) {
                        (self.tell)(Watched::Cancelling(&stage));
                        cancel.cancel();
                    }
                    examined = now;
                }
            }
            let ended = run.join().unwrap_or_else(|payload| std::panic::resume_unwind(payload));
            match &ended {
                Ok(summary) => (self.tell)(Watched::Ran(workflow, summary)),
                Err(error) => (self.tell)(Watched::Broken(error)),
            }
            Ok(changed)
        })
    }

    /// A running stage that would be made of something else if it started now.
    fn overtaken(&self, running: &BTreeMap<String, Digest>) -> Option<String> {
        let workflow = (self.load)().ok()?;
        let plan = Plan::new(&workflow, self.store, self.host, &self.options.request).ok()?;
        let same = |name: &str, key: Digest| {
            let stage = plan.stages.iter().find(|planned| workflow.stages[planned.stage].name == name);
            // A stage that has just ended is cached, and was not overtaken.
            stage.is_some_and(|planned| planned.key == Some(key))
        };
        running.iter().find(|(name, key)| !same(name, **key)).map(|(name, _)| name.clone())
    }

    /// Waits for a change (unless one is `pending`) and then until writing has settled. False if stopped, or if nothing
    /// changed for as long as it was to wait.
    fn settle(&self, changes: &Changes, interest: &Interest, pending: Option<PathBuf>, at_most: Option<Duration>) -> bool {
        let started = Instant::now();
        let mut first = pending;
        while !self.stop.is_cancelled() {
            match (changes.next(if first.is_some() { SETTLE } else { TICK }, interest), &first) {
                (Some(path), None) => first = Some(path),
                (Some(_), Some(_)) => {}
                (None, Some(path)) => {
                    (self.tell)(Watched::Changed(path));
                    return true;
                }
                (None, None) if at_most.is_some_and(|at_most| started.elapsed() >= at_most) => return false,
                (None, None) => {}
            }
        }
        false
    }
}

/// Paths that changed, as the operating system tells them.
struct Changes {
    receiver: Receiver<PathBuf>,
    /// Where we write ourselves.
    own: PathBuf,
}

impl Changes {
    /// The next change that concerns us within `time`. Others do not prolong the wait.
    fn next(&self, time: Duration, interest: &Interest) -> Option<PathBuf> {
        let until = Instant::now() + time;
        loop {
            let path = self.receiver.recv_timeout(until.saturating_duration_since(Instant::now())).ok()?;
            if !path.starts_with(&self.own) && interest.concerns(&path) {
                return Some(path);
            }
        }
    }
}

/// Watches the folders, also those that are watched already: a folder that was replaced is another one.
fn follow(watcher: &mut RecommendedWatcher, interest: &Interest) {
    for (folder, deep) in interest.folders().filter(|(folder, _)| folder.is_dir()) {
        let mode = if deep { RecursiveMode::Recursive } else { RecursiveMode::NonRecursive };
        if let Err(error) = watcher.watch(folder, mode) {
            tracing::warn!(folder = %folder.display(), %error, "changes in this folder will not be noticed");
        }
    }
}

fn watch_error(error: notify::Error) -> EngineError {
    EngineError::Io { operation: "watch files".into(), source: std::io::Error::other(error) }
}
