use std::{
    collections::{HashMap, HashSet},
    path::{Path, PathBuf},
    sync::OnceLock,
};

use rlflow_store::{ActionRecord, Digest, Store, Use};

use crate::{Result, memo::MEMO, workflow::Workflow};

/// What the runs of a workflow reached: what `gc` keeps for it, and what a rerun is compared with.
pub(crate) struct Reach<'a> {
    store: &'a Store,
    /// The workflow file.
    path: PathBuf,
    /// Newest first; read when the first stage misses.
    states: OnceLock<Vec<State>>,
}

/// What of an earlier run stays noted beside what this one reached.
#[derive(Clone, Copy)]
pub(crate) enum Beside<'a> {
    /// Nothing: this run came to every stage.
    Nothing,
    /// Everything: this run only begins.
    Everything,
    /// What stages of these names had: this run did not come to them, which says nothing about their results.
    Stages(&'a dyn Fn(&str) -> bool),
}

/// What one run reached.
struct State {
    /// Sorted.
    keys: Vec<Digest>,
    /// Keys by the stage name and kind in their records, read when asked for.
    by_stage: OnceLock<HashMap<(String, String), Digest>>,
}

impl State {
    fn contains(&self, key: Digest) -> bool {
        self.keys.binary_search(&key).is_ok()
    }

    fn find(&self, store: &Store, stage: &str, kind: &str) -> Option<Digest> {
        let by_stage = self.by_stage.get_or_init(|| {
            // A record that cannot be read is no result to compare with.
            let made = self.keys.iter().filter_map(|key| Some((store.action(*key).ok()??.provenance, *key)));
            made.map(|(provenance, key)| ((provenance.stage, provenance.kind), key)).collect()
        });
        by_stage.get(&(stage.to_owned(), kind.to_owned())).copied()
    }
}

impl<'a> Reach<'a> {
    pub fn new(workflow: &Workflow, store: &'a Store) -> Self {
        let path = workflow.path.canonicalize().unwrap_or_else(|_| workflow.path.clone());
        Self { store, path, states: OnceLock::new() }
    }

    /// The result that the workflow's stage had last: of the newest run that reached one, whether that run made it or
    /// found it. `workflow` is how records name the workflow.
    pub fn last_result(&self, workflow: &str, stage: &str, kind: &str) -> Result<Option<ActionRecord>> {
        let Some(made) = self.store.last_action(workflow, stage, kind)? else { return Ok(None) };
        let states = match self.states.get() {
            Some(states) => states,
            None => {
                let read = read(self.store, &self.name())?.into_iter().map(|used| State { keys: used.keys, by_stage: OnceLock::new() });
                self.states.get_or_init(|| read.collect())
            }
        };
        let is_newest = states.first().is_some_and(|newest| newest.contains(made.key));
        // What no run says that it reached was made by one that was killed, after all others.
        if is_newest || !states.iter().any(|state| state.contains(made.key)) {
            return Ok(Some(made));
        }
        let used = states.iter().find_map(|state| state.find(self.store, stage, kind)).filter(|key| *key != made.key);
        match used {
            Some(key) => Ok(self.store.action(key)?.or(Some(made))),
            None => Ok(Some(made)),
        }
    }

    /// Notes what a run reached, with what an earlier one reached beside it.
    pub fn record(&self, keys: &[Digest], beside: Beside<'_>) -> Result<()> {
        let name = self.name();
        let earlier = match beside {
            Beside::Nothing => Vec::new(),
            _ => read(self.store, &name)?.into_iter().next().map(|newest| newest.keys).unwrap_or_default(),
        };
        if !earlier.is_empty() && keys.iter().all(|key| earlier.binary_search(key).is_ok()) {
            return Ok(());
        }
        let reached: HashSet<Digest> = keys.iter().copied().collect();
        let stays = |key: &Digest| match beside {
            // Keys of snapshots name no stage.
            Beside::Stages(stays) if !reached.contains(key) => {
                self.store.action(*key).ok().flatten().is_none_or(|record| stays(&record.provenance.stage))
            }
            _ => true,
        };
        let all: Vec<Digest> = earlier.into_iter().filter(stays).chain(keys.iter().copied()).collect();
        Ok(self.store.record_use(&name, &all)?)
    }

    /// Notes which intermediate results a run used. Stages that were cached did not ask for theirs again, so what was
    /// noted of stages that `still_uses` stays.
    pub fn record_memos(&self, keys: &[Digest], still_uses: impl Fn(&str) -> bool) -> Result<()> {
        let name = self.memo_name();
        let before = read(self.store, &name)?.into_iter().next().map(|newest| newest.keys).unwrap_or_default();
        let fresh: HashSet<Digest> = keys.iter().copied().collect();
        let stays = |key: &Digest| {
            let record = if fresh.contains(key) { None } else { self.store.action(*key).ok().flatten() };
            record.is_some_and(|record| record.provenance.kind == MEMO && still_uses(&record.provenance.stage))
        };
        let stay: Vec<Digest> = before.iter().copied().filter(stays).collect();
        if stay.is_empty() && keys.is_empty() && before.is_empty() {
            return Ok(());
        }
        Ok(self.store.record_use(&name, &[&stay[..], keys].concat())?)
    }

    fn name(&self) -> String {
        self.path.to_string_lossy().into_owned()
    }

    /// Intermediate results are noted apart, so that a run in which everything is cached, and which learns nothing of
    /// them, need not read what was noted before. It is the same file under another spelling, because the store
    /// forgets what is noted of files that are gone.
    fn memo_name(&self) -> String {
        let (folder, file) = (self.path.parent().unwrap_or(Path::new("/")), self.path.file_name().unwrap_or_default());
        folder.join(".").join(file).to_string_lossy().into_owned()
    }
}

/// What was noted under a name, newest first.
fn read(store: &Store, name: &str) -> Result<Vec<Use>> {
    let named = |states: &Vec<Use>| states.first().is_some_and(|newest| newest.workflow == name);
    Ok(store.uses()?.into_iter().find(named).unwrap_or_default())
}
