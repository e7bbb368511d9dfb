//! Runs a workflow again whenever it or its data change.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        mpsc::{self, Receiver, RecvTimeoutError},
    },
    thread,
    time::Duration,
};

use notify::{RecommendedWatcher, RecursiveMode, Watcher};

use rlflow_api::CancelToken;
use rlflow_store::{Digest, Store};

use crate::{
    EngineError, Host, Plan, Result, RunOptions, Status, Summary,
    event::{Event, Events, Sink},
    run,
    workflow::{Workflow, WorkflowErrors},
};

/// Writing has settled when nothing changed for this long.
const SETTLE: Duration = Duration::from_millis(300);
/// How often a stop that the user asked for is looked for.
const TICK: Duration = Duration::from_millis(100);

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
            // An error (an overflowed queue) means that anything may have changed.
            let paths =
                event.map(|event| if event.kind.is_access() { Vec::new() } else { event.paths }).unwrap_or_else(|_| vec![PathBuf::new()]);
            for path in paths {
                // Nobody listens any more: the watch is ending.
                let _ = sender.send(path);
            }
        };
        let mut watcher = notify::recommended_watcher(notify).map_err(watch_error)?;
        let mut watched = BTreeSet::new();
        self.follow(&mut watcher, &mut watched, [parent(path)]);
        while !self.stop.is_cancelled() {
            match (self.load)() {
                Ok(workflow) => {
                    // Watched before anything is read, so that no edit falls between.
                    self.follow(&mut watcher, &mut watched, folders(&workflow));
                    if !self.one_run(&workflow, &receiver)? {
                        self.settle(&receiver, None);
                    }
                }
                Err(errors) => {
                    (self.tell)(Watched::Broken(&errors.into()));
                    self.settle(&receiver, None);
                }
            }
        }
        Ok(())
    }

    /// Runs once. True if something changed meanwhile, so that another run is due at once.
    fn one_run(&self, workflow: &Workflow, changes: &Receiver<PathBuf>) -> Result<bool> {
        let cancel = CancelToken::default();
        let running = Running::default();
        let mut sinks = (self.sinks)();
        sinks.push(Box::new(running.clone()));
        let events = Events::new(sinks);
        thread::scope(|scope| {
            let run = scope.spawn(|| run(workflow, self.store, self.host, self.options, &events, &cancel));
            let mut changed = false;
            while !run.is_finished() {
                if self.stop.is_cancelled() {
                    cancel.cancel();
                }
                match changes.recv_timeout(TICK) {
                    Ok(path) if self.concerns(&path) => {
                        changed |= self.settle(changes, Some(path));
                        if let Some(stage) = self.overtaken(&running) {
                            (self.tell)(Watched::Cancelling(&stage));
                            cancel.cancel();
                        }
                    }
                    _ => {}
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
    fn overtaken(&self, running: &Running) -> Option<String> {
        let running = running.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone();
        let workflow = (self.load)().ok()?;
        let plan = Plan::new(&workflow, self.store, self.host, &self.options.request).ok()?;
        let same = |name: &str, key: Digest| {
            let stage = plan.stages.iter().find(|planned| workflow.stages[planned.stage].name == name);
            stage.is_some_and(|planned| planned.key == Some(key) && planned.status != Status::Cached)
        };
        running.into_iter().find(|(name, key)| !same(name, *key)).map(|(name, _)| name)
    }

    /// Waits for a change (unless one is `pending`) and then until writing has settled. False if stopped.
    fn settle(&self, changes: &Receiver<PathBuf>, pending: Option<PathBuf>) -> bool {
        let mut first = pending;
        loop {
            if self.stop.is_cancelled() {
                return false;
            }
            match changes.recv_timeout(if first.is_some() { SETTLE } else { TICK }) {
                Ok(path) if self.concerns(&path) => _ = first.get_or_insert(path),
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => {
                    if let Some(path) = &first {
                        (self.tell)(Watched::Changed(path));
                        return true;
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return false,
            }
        }
    }

    /// Our own writing does not count.
    fn concerns(&self, path: &Path) -> bool {
        !path.starts_with(self.store.folder())
    }

    fn follow(&self, watcher: &mut RecommendedWatcher, watched: &mut BTreeSet<PathBuf>, folders: impl IntoIterator<Item = PathBuf>) {
        for folder in folders {
            let folder = std::path::absolute(&folder).unwrap_or(folder);
            if !watched.insert(folder.clone()) {
                continue;
            }
            if let Err(error) = watcher.watch(&folder, RecursiveMode::NonRecursive) {
                tracing::warn!(folder = %folder.display(), %error, "changes in this folder will not be noticed");
            }
        }
    }
}

fn watch_error(error: notify::Error) -> EngineError {
    EngineError::Io { operation: "watch files".into(), source: std::io::Error::other(error) }
}

fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(folder) if folder != Path::new("") => folder.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// Folders, not files: editors replace files, and globs find new ones.
fn folders(workflow: &Workflow) -> BTreeSet<PathBuf> {
    let data = workflow.stages.iter().flat_map(|stage| stage.files.iter().flatten());
    workflow.sources.iter().chain(data).map(|path| parent(path)).collect()
}
