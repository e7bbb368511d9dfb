//! Answers to "what is there to do?" where nothing was, and nothing has changed: from a note of what that depended on,
//! without reading the workflow. Whoever finds that everything is cached leaves the note ([`note`]).
//!
//! A plan in which everything is cached is a function of
//! - the program, since kinds and their versions are built into it, the machine's devices, and who asks (for what may be read);
//! - the texts of the workflow and of what it includes, and `--set`;
//! - which files each data source finds, and what is in them;
//! - the records in the store under the stages' keys, and that nothing there was set aside as damaged.
//!
//! All of it is looked at again: texts are read, data sources searched, and files and records have to look as they did (size, times,
//! inode), as everywhere in the store. What differs, or is asked in another way (`--force`, single stages), is decided
//! as if there were no note.

use std::{
    collections::BTreeMap,
    env, fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Instant,
};

use serde::{Deserialize, Serialize};

use rlflow_store::{Digest, Hasher, SettledNote, Store};

use crate::{
    Host,
    action::{Actions, Outputs, workflow_name},
    event::{Event, MAX_CACHED_LOGGED, StageOutcome, StageStatus, finished_line, now},
    run::run_header,
    workflow::Lookup,
};

/// What was found, and what it depended on besides the files that the store looks at.
#[derive(Serialize, Deserialize)]
struct Found {
    /// Of the program, the machine and who asks.
    conditions: Digest,
    /// Files that the workflow was read from.
    sources: Vec<(PathBuf, Digest)>,
    lookups: Vec<Lookup>,
    /// The workflow's name.
    name: String,
    stages: usize,
    /// What `gc` keeps for the workflow, under the name that the store has for it. A plan notes none.
    reached: Option<(String, Digest)>,
    /// Every stage, as runs log it; none if they are very many.
    cached: Vec<Cached>,
}

#[derive(Serialize, Deserialize)]
struct Cached {
    name: String,
    kind: String,
    key: Digest,
    outputs: BTreeMap<String, Digest>,
}

/// A workflow of which every stage is cached, as was found before and still is.
pub struct Settled {
    found: Found,
    path: PathBuf,
    store: Store,
    numerics: String,
}

impl Settled {
    /// Looks for a note about the workflow at `path` with these `--set` arguments, and at everything that it depends on.
    /// `None` says nothing: then the workflow must be loaded and planned.
    pub fn find(path: &Path, sets: &[String], store: &Store, host: &Host) -> Option<Self> {
        let note: SettledNote = store.settled(note_name(path, sets)?)?;
        let found: Found = serde_json::from_slice(note.content()).ok()?;
        let holds = found.conditions == conditions(host)?
            && found.sources.iter().all(|(path, digest)| has_content(path, *digest))
            && found.lookups.iter().all(Lookup::finds_the_same)
            && note.holds();
        holds.then(|| Self { found, path: path.to_owned(), store: store.clone(), numerics: host.numerics.clone() })
    }

    /// How many stages are cached.
    pub fn stages(&self) -> usize {
        self.found.stages
    }

    /// A run with nothing to do, recorded like any other; how long it took since `started`. `None` if it must be a real one, since
    /// what `gc` keeps for this workflow is not noted.
    pub fn run(&self, command: &[String], jobs: usize, started: Instant) -> Option<f64> {
        let (name, reached) = self.found.reached.as_ref()?;
        if !self.store.is_newest_use(name, *reached) {
            return None;
        }
        let header = run_header(&workflow_name(&self.path, &self.store), &self.found.name, command, &self.numerics);
        // A store that cannot be written still answers a run in which everything is cached.
        let log = self.store.begin_run(&header).ok();
        let outcome = |cached: &Cached| StageOutcome {
            key: Some(cached.key),
            outputs: Outputs::new(cached.outputs.clone()),
            ..StageOutcome::new(&cached.name, &cached.kind, StageStatus::Cached)
        };
        let stages = self.found.cached.iter().map(outcome).collect();
        let seconds = started.elapsed().as_secs_f64();
        if let Some(log) = log {
            let (run_id, workflow) = (log.id().to_owned(), self.path.display().to_string());
            let begun = Event::Started { run_id, workflow, stages: self.found.stages, jobs }.to_json(now());
            let ended = finished_line(Event::Finished { ok: true, interrupted: false, seconds, stages }, self.found.stages, now());
            if let Err(error) = log.append(&begun).and_then(|()| log.append(&ended)) {
                tracing::warn!(%error, "the run's log cannot be written");
            }
        }
        Some(seconds)
    }
}

/// Notes that every stage of a workflow was found to be cached: `cached` has them in the order of the file, with keys and
/// outputs. `reached` is what [`crate::reach::Reach::record`] gave.
pub(crate) fn note<'s>(actions: &Actions<'_>, cached: impl Iterator<Item = (usize, Digest, &'s Outputs)>, reached: Option<Digest>) {
    let workflow = actions.workflow;
    let mut keys = Vec::with_capacity(workflow.stages.len());
    let mut stages = Vec::new();
    for (index, key, outputs) in cached {
        keys.push(key);
        if workflow.stages.len() <= MAX_CACHED_LOGGED {
            let stage = &workflow.stages[index];
            stages.push(Cached { name: stage.name.clone(), kind: stage.kind.name().to_owned(), key, outputs: (**outputs).clone() });
        }
    }
    if !actions.is_plain || keys.len() != workflow.stages.len() {
        return;
    }
    let known = Settled::find(&workflow.path, &workflow.sets, actions.store, actions.host);
    if known.is_some_and(|known| reached.is_none() || reached == known.found.reached.map(|(_, reached)| reached)) {
        return;
    }
    let absolute = |path: &PathBuf| std::path::absolute(path).ok();
    let note = || {
        let digests = workflow.source_texts().map(|text| Digest::of(text.as_bytes()));
        let found = Found {
            conditions: conditions(actions.host)?,
            sources: workflow
                .sources
                .iter()
                .map(absolute)
                .zip(digests)
                .map(|(path, digest)| Some((path?, digest)))
                .collect::<Option<_>>()?,
            lookups: workflow.lookups.iter().map(Lookup::absolute).collect::<Option<_>>()?,
            name: workflow.name.clone(),
            stages: keys.len(),
            reached: reached.map(|reached| (actions.reach.results_name(), reached)),
            cached: stages,
        };
        let files = actions.seen_files();
        let files: Option<Vec<_>> = files.iter().map(|(path, digest)| Some((absolute(path)?, *digest))).collect();
        let name = note_name(&workflow.path, &workflow.sets)?;
        // A path that is not UTF-8 cannot be noted.
        let content = serde_json::to_vec(&found).ok()?;
        Some(actions.store.note_settled(name, &content, &files?, &keys, actions.began))
    };
    let noted = note().unwrap_or(false);
    tracing::debug!(noted, "nothing is to be done");
}

/// What the note about a workflow, called in this way, is named.
fn note_name(path: &Path, sets: &[String]) -> Option<Digest> {
    let path = std::path::absolute(path).ok()?;
    let mut hasher = Hasher::new();
    for text in [path.as_os_str().as_encoded_bytes()].into_iter().chain(sets.iter().map(|set| set.as_bytes())) {
        hasher.update(&(text.len() as u64).to_be_bytes()).update(text);
    }
    Some(hasher.finish())
}

/// What is known of the program, the machine and who asks. `None` for a program whose file is gone.
fn conditions(host: &Host) -> Option<Digest> {
    let program = fs::metadata(env::current_exe().ok()?).ok()?;
    let times = [program.mtime(), program.mtime_nsec(), program.ctime(), program.ctime_nsec()];
    let user = rustix::process::geteuid().as_raw();
    let text = format!("{} {} {} {times:?} {user} {host:?}", program.dev(), program.ino(), program.len());
    Some(Digest::of(text.as_bytes()))
}

fn has_content(path: &Path, digest: Digest) -> bool {
    // A pipe would be waited for.
    fs::metadata(path).is_ok_and(|metadata| metadata.is_file()) && fs::read(path).is_ok_and(|content| Digest::of(&content) == digest)
}
