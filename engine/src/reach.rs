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

/// What is noted. Each has its place in the store, so that one is not read or replaced with another.
#[derive(Clone, Copy)]
enum Note {
    /// What runs reached when they ended.
    Results,
    /// What a run that has not ended reached so far. Left behind by a run that is killed, until the next one.
    Running,
    /// Intermediate results. A run in which everything is cached learns nothing of them, and need not read this note.
    Memos,
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
    /// found it. `workflow` is how records name the workflow. Another workflow's stage of the same name is another stage,
    /// unless that file is gone: then it was probably renamed to this one.
    pub fn last_result(&self, workflow: &str, stage: &str, kind: &str) -> Result<Option<ActionRecord>> {
        let Some(made) = self.store.last_action(workflow, stage, kind)? else { return Ok(None) };
        let states = match self.states.get() {
            Some(states) => states,
            None => {
                let read = self.read(Note::Results)?.into_iter().map(|used| State { keys: used.keys, by_stage: OnceLock::new() });
                self.states.get_or_init(|| read.collect())
            }
        };
        if made.provenance.workflow != workflow {
            let used = states.iter().find_map(|state| state.find(self.store, stage, kind));
            return match used.map(|key| self.store.action(key)).transpose()?.flatten() {
                Some(used) => Ok(Some(used)),
                None => Ok(Some(made).filter(|made| !self.is_there(&made.provenance.workflow))),
            };
        }
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

    /// Whether the file of a workflow that records name so is there.
    fn is_there(&self, workflow: &str) -> bool {
        let folder = self.store.folder();
        let folder = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
        folder.parent().unwrap_or(Path::new("")).join(workflow).exists()
    }

    /// What a run that was killed had reached when it noted that last; nothing after one that ended.
    pub fn left_running(&self) -> Result<Vec<Digest>> {
        self.newest(Note::Running)
    }

    /// Notes what a run has reached so far.
    pub fn record_running(&self, keys: &[Digest]) -> Result<()> {
        self.store.record_use(&self.name(Note::Running), keys)?;
        Ok(())
    }

    /// Notes what a run reached in the end. Of stages that it did not come to (`left`), what was noted before stays:
    /// that they were not asked for, or failed, says nothing about the results that they had. The digest is what the store knows
    /// this note by, among those that it has under [`Reach::results_name`].
    pub fn record(&self, keys: &[Digest], left: Option<&dyn Fn(&str) -> bool>) -> Result<Option<Digest>> {
        let Some(left) = left else { return Ok(self.store.record_use(&self.name(Note::Results), keys)?) };
        let reached: HashSet<Digest> = keys.iter().copied().collect();
        // Keys of snapshots name no stage.
        let stays = |key: &Digest| {
            !reached.contains(key) && self.store.action(*key).ok().flatten().is_none_or(|record| left(&record.provenance.stage))
        };
        let before = self.newest(Note::Results)?;
        let all: Vec<Digest> = before.into_iter().filter(stays).chain(keys.iter().copied()).collect();
        Ok(self.store.record_use(&self.name(Note::Results), &all)?)
    }

    /// Notes which intermediate results a run used. Stages that were cached did not ask for theirs again, so what was
    /// noted of stages that `still_uses` stays. So does what a run noted in `left` before it was killed.
    pub fn record_memos(&self, keys: &[Digest], left: &[Digest], still_uses: impl Fn(&str) -> bool) -> Result<()> {
        let before = [&self.newest(Note::Memos)?, left].concat();
        let fresh: HashSet<Digest> = keys.iter().copied().collect();
        let stays = |key: &Digest| {
            let record = if fresh.contains(key) { None } else { self.store.action(*key).ok().flatten() };
            record.is_some_and(|record| record.provenance.kind == MEMO && still_uses(&record.provenance.stage))
        };
        let stay: Vec<Digest> = before.iter().copied().filter(stays).collect();
        if stay.is_empty() && keys.is_empty() && before.is_empty() {
            return Ok(());
        }
        self.store.record_use(&self.name(Note::Memos), &[&stay[..], keys].concat())?;
        Ok(())
    }

    /// What the store calls the notes of [`Reach::record`].
    pub fn results_name(&self) -> String {
        self.name(Note::Results)
    }

    /// What was noted, newest first.
    fn read(&self, note: Note) -> Result<Vec<Use>> {
        let name = self.name(note);
        let named = |states: &Vec<Use>| states.first().is_some_and(|newest| newest.workflow == name);
        Ok(self.store.uses()?.into_iter().find(named).unwrap_or_default())
    }

    fn newest(&self, note: Note) -> Result<Vec<Digest>> {
        Ok(self.read(note)?.into_iter().next().map(|newest| newest.keys).unwrap_or_default())
    }

    /// The workflow file, in another spelling for each note: the store keeps what is noted of files that are there.
    fn name(&self, note: Note) -> String {
        let (folder, file) = (self.path.parent().unwrap_or(Path::new("/")), self.path.file_name().unwrap_or_default());
        let dots = match note {
            Note::Results => "",
            Note::Running => "./",
            Note::Memos => "././",
        };
        folder.join(dots).join(file).to_string_lossy().into_owned()
    }
}
