//! Actions: what a stage would be made of, whether that is cached, and if not, why and from where it can continue.
//! `plan`, `status` and `run` all decide here, so they cannot disagree.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    panic::resume_unwind,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, OnceLock, PoisonError},
    thread,
    time::SystemTime,
};

use rlflow_api::{DataFile, DeviceChoice, DeviceSpec, Kind, Needs, Placement, Problem, RowTokens, data_format};
use rlflow_store::{ActionRecord, Digest, FileDigest, Snapshot, Store};

use crate::{
    Host, Rerun, RerunReason, Result,
    action_key::{FullKey, KeyFile},
    reach::Reach,
    reason::{Current, REQUEST},
    workflow::{Edge, Stage, Workflow, WorkflowError, WorkflowErrors},
};

/// From this many stages on, deciding about them is shared between threads.
const PARALLEL_FROM: usize = 256;

/// What is asked of a workflow.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Request {
    /// Only these stages and what they need; all if empty. Their results must be readable afterwards, not only known.
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
    Cached {
        /// Action key.
        key: Digest,
        /// Its result.
        outputs: Outputs,
    },
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
    /// Inputs.
    pub inputs: ActionInputs,
    /// Snapshots that it can continue from, best first.
    pub snapshots: Vec<Snapshot>,
    /// The last result of the same stage, whatever its key.
    pub last: Option<ActionRecord>,
}

/// Port to input artifacts, in order.
pub type ActionInputs = BTreeMap<String, Vec<ActionInput>>;

/// An input artifact of an action.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ActionInput {
    /// Index of the stage that makes it.
    pub stage: usize,
    /// Output port of that stage.
    pub port: String,
    /// Its digest.
    pub digest: Digest,
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

impl Unreadable {
    /// Why the stage that made it runs again.
    pub fn reason(&self, needed_by: &str) -> RerunReason {
        let (port, needed_by) = (self.port.clone(), needed_by.to_owned());
        if self.damaged { RerunReason::ArtifactDamaged { port, needed_by } } else { RerunReason::ArtifactMissing { port, needed_by } }
    }
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
    /// What its runs reached.
    pub(crate) reach: Reach<'a>,
    /// Asked for by name.
    named: Vec<bool>,
    selected: Vec<bool>,
    forced: Vec<bool>,
    no_cache: bool,
    placements: Vec<Placement>,
    /// The machine, with the devices that the workflow declares.
    pub(crate) planned: Host,
    files: Vec<OnceLock<Vec<Vec<KeyFile>>>>,
    /// Every data file is looked at once, so that all stages see one state of it.
    digests: Mutex<HashMap<PathBuf, FileDigest>>,
    /// Of stages that make rows and were decided about: the result's key, and how long rows are if somebody asked.
    rows_of: Mutex<HashMap<usize, (Digest, Option<RowTokens>)>>,
    /// Before anything of the store was looked at.
    pub(crate) began: SystemTime,
    /// Whether all stages were asked for, and what is cached counts.
    pub(crate) is_plain: bool,
}

impl<'a> Actions<'a> {
    /// Checks the request: stage names, and devices of the selected stages.
    pub fn new(workflow: &'a Workflow, store: &'a Store, host: &'a Host, request: &Request) -> Result<Self> {
        let began = SystemTime::now();
        let mut errors = Vec::new();
        let mut resolve = |names: &[String], what: &str| {
            let found = names.iter().map(|name| find_stages(workflow, name, what));
            found.filter_map(|found| found.map_err(|wrong| errors.extend(wrong.iter().cloned())).ok()).flatten().collect::<Vec<_>>()
        };
        let (wanted, force) = (resolve(&request.stages, "STAGE"), resolve(&request.force, "--force"));
        let count = workflow.stages.len();
        // What is forced is asked for too, even if nothing else needs it.
        let asked: Vec<usize> = wanted.iter().chain(&force).copied().collect();
        let selected = if request.stages.is_empty() { vec![true; count] } else { workflow.dag.ancestors(&asked) };
        let (mut named, mut forced) = (vec![false; count], vec![false; count]);
        wanted.into_iter().for_each(|stage| named[stage] = true);
        force.into_iter().for_each(|stage| forced[stage] = true);

        let planned = host.with_devices(&workflow.devices);
        let mut placements = Vec::with_capacity(count);
        for (index, stage) in workflow.stages.iter().enumerate() {
            let peak = |placed: &Placement| Some(workflow.describe(index, placed).ok()?.needs.peak_bytes()).filter(|peak| *peak > 0);
            let placement = planned.place(stage.kind.execution(&stage.config).as_ref(), peak);
            placements.push(placement.unwrap_or_else(|error| {
                if selected[index] {
                    let problem = Problem::new("device_unavailable", error.setting, error.message).hint(error.hint);
                    let error = workflow.error(index, &problem);
                    // One wrong default is one error, however many stages it is laid under.
                    let place = |error: &WorkflowError| (error.code, error.file.clone(), error.line, error.column);
                    if !errors.iter().any(|known| place(known) == place(&error)) {
                        errors.push(error);
                    }
                }
                Placement::default()
            }));
        }
        if !errors.is_empty() {
            return Err(WorkflowErrors::new(errors).into());
        }
        let files = (0..count).map(|_| OnceLock::new()).collect();
        store.expect_lookups(selected.iter().filter(|selected| **selected).count());
        let workflow_name = workflow_name(&workflow.path, store);
        let reach = Reach::new(workflow, store);
        let no_cache = request.no_cache;
        let mut actions = Self {
            workflow,
            store,
            host,
            workflow_name,
            reach,
            named,
            selected,
            forced,
            no_cache,
            placements,
            planned,
            files,
            digests: Mutex::default(),
            rows_of: Mutex::default(),
            began,
            is_plain: *request == Request::default(),
        };
        actions.settle_levels();
        Ok(actions)
    }

    /// Places stages that leave the choice of a device (`"auto"`) where this machine can run them, if planning chose a device that the
    /// workflow only declares. Whether there were any.
    pub(crate) fn fall_back(&mut self) -> bool {
        let is_here = |spec: &DeviceSpec| self.host.device(*spec).is_some();
        let here =
            Host { devices: self.planned.devices.iter().filter(|device| is_here(&device.spec)).cloned().collect(), ..self.host.clone() };
        let mut moved = Vec::new();
        for (index, stage) in self.workflow.stages.iter().enumerate() {
            let Some(execution) = stage.kind.execution(&stage.config) else { continue };
            let is_auto = matches!(&execution.device, DeviceChoice::One(name) if name == "auto");
            if !is_auto || self.placements[index].devices.iter().all(is_here) {
                continue;
            }
            let peak = |placed: &Placement| Some(self.workflow.describe(index, placed).ok()?.needs.peak_bytes()).filter(|peak| *peak > 0);
            moved.extend(here.place(Some(&execution), peak).ok().map(|placement| (index, placement)));
        }
        let any = moved.iter().any(|(index, _)| self.selected[*index]);
        moved.into_iter().for_each(|(index, placement)| self.placements[index] = placement);
        if any {
            self.settle_levels();
        }
        any
    }

    /// Puts a stage one ZeRO level higher.
    pub(crate) fn raise_level(&mut self, stage: usize) {
        self.placements[stage].zero += 1;
    }

    /// Whether the stage was asked for, or is needed by one that was.
    pub fn is_selected(&self, stage: usize) -> bool {
        self.selected[stage]
    }

    /// Where the stage runs.
    pub fn placement(&self, stage: usize) -> &Placement {
        &self.placements[stage]
    }

    /// Memory that a rank of the stage needs at its peak, as its kind predicts it; zeros if it does not.
    pub fn needs(&self, index: usize) -> Needs {
        let (stage, placement) = (&self.workflow.stages[index], &self.placements[index]);
        // What was described when loading is of the place that was asked for, and of rows that fill the context.
        if *placement != self.workflow.asked_placement(index) || self.knows_rows(index) {
            let described = self.workflow.describe_as(index, &stage.config, placement, &|made| self.row_tokens(made));
            return described.map_or(stage.described.needs, |described| described.needs);
        }
        stage.described.needs
    }

    /// Whether the rows that a stage reads are there, so that it is known how long they are.
    pub(crate) fn knows_rows(&self, index: usize) -> bool {
        let mut made = self.workflow.stages[index].inputs.values().flatten();
        made.any(|edge| self.row_tokens(edge.stage).is_some())
    }

    /// Tokens of the rows that a stage's result holds, once there is one.
    pub(crate) fn row_tokens(&self, index: usize) -> Option<RowTokens> {
        if !measures_rows(self.workflow.stages[index].kind) {
            return None;
        }
        let mut known = self.rows_of.lock().unwrap_or_else(PoisonError::into_inner);
        let (key, rows) = known.get_mut(&index)?;
        if rows.is_none() {
            let record = self.store.action(*key).ok()??;
            *rows = RowTokens::from_metrics(|name| record.metrics.get(name).copied());
        }
        *rows
    }

    /// Memory of a device, if it is known.
    pub fn capacity(&self, device: DeviceSpec) -> Option<u64> {
        self.planned.device(device).map(|known| known.memory_bytes).filter(|bytes| *bytes > 0)
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
        let file = |path: &PathBuf| {
            let FileDigest { digest, size_bytes } = self.file_digest(path)?;
            Ok(DataFile { name: self.file_name(path).into_owned(), path: path.clone(), digest, size_bytes })
        };
        self.workflow.stages[stage].files.iter().map(|paths| paths.iter().map(file).collect()).collect()
    }

    /// How the workflow names a data file.
    fn file_name<'p>(&self, path: &'p Path) -> Cow<'p, str> {
        path.strip_prefix(&self.workflow.folder).unwrap_or(path).to_string_lossy()
    }

    fn file_digest(&self, path: &Path) -> Result<FileDigest> {
        let known = || self.digests.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(digest) = known().get(path) {
            return Ok(*digest);
        }
        // Hashed without the lock: other stages' files need not wait for a large one.
        let digest = self.store.file_digest(path)?;
        Ok(*known().entry(path.to_owned()).or_insert(digest))
    }

    /// Every data file that was looked at, with its digest.
    pub(crate) fn seen_files(&self) -> Vec<(PathBuf, Digest)> {
        let known = self.digests.lock().unwrap_or_else(PoisonError::into_inner);
        known.iter().map(|(path, found)| (path.clone(), found.digest)).collect()
    }

    /// Decides about a stage whose inputs are all known. `must_run` is a reason to run it even if it is cached.
    pub fn decide(&self, index: usize, outputs: &[Option<Outputs>], must_run: Option<&RerunReason>) -> Result<Decision> {
        let stage = &self.workflow.stages[index];
        let files = self.files(index)?;
        let full_key = full_key(stage, self.digests_of(stage, outputs), files);
        let key = full_key.digest();
        if measures_rows(stage.kind) {
            self.rows_of.lock().unwrap_or_else(PoisonError::into_inner).insert(index, (key, None));
        }
        let mut must_run = must_run.cloned().or_else(|| self.forced(index));
        if must_run.is_none()
            && let Some(outputs) = self.store.outputs(key)?
            && stage.described.outputs().all(|(port, _)| outputs.contains_key(port))
        {
            must_run = self.set_aside(&outputs);
            if must_run.is_none() && self.named[index] {
                must_run = self.lost(index, &outputs)?;
            }
            if must_run.is_none() {
                return Ok(Decision::Cached { key, outputs });
            }
        }
        // A result under this very key is the one to compare with, whatever its stage was called.
        let under_key = if must_run.is_some() { self.store.action(key)? } else { None };
        let last = match under_key {
            Some(record) => Some(record),
            None => self.reach.last_result(&self.workflow_name, &stage.name, stage.kind.name())?,
        };
        let fresh = matches!(must_run, Some(RerunReason::Forced { .. }));
        let inputs = self.inputs(stage, outputs);
        let prefix_key = full_key.prefix(&stage.kind.horizon(&stage.config));
        let snapshots = if fresh { Vec::new() } else { self.usable_snapshots(stage, prefix_key)? };
        let rerun = match must_run {
            Some(reason) => reason.into(),
            None => {
                let has_stage = |name: &str| self.workflow.find(name).is_some();
                let is_written = |setting: &str| self.workflow.is_written(index, setting);
                let data = self.data_files(index)?;
                let data = data.iter().flatten().map(|file| (file.name.as_str(), file.digest)).collect();
                let current =
                    Current { key: &full_key, inputs: self.by_name(&inputs), files: data, is_written: &is_written, has_stage: &has_stage };
                match (Rerun::find(last.as_ref(), &current), snapshots.first()) {
                    (Rerun { reason: RerunReason::NeverRan, .. }, Some(snapshot)) => RerunReason::Unfinished { step: snapshot.step }.into(),
                    (rerun, _) => rerun,
                }
            }
        };
        Ok(Decision::Run(Box::new(Action { key, prefix_key, rerun, inputs, snapshots, last })))
    }

    /// Decides about stages of which none needs another, on several threads if they are many. `must_run` as for
    /// [`Actions::decide`].
    pub fn decide_all(
        &self,
        stages: &[usize],
        outputs: &[Option<Outputs>],
        must_run: &(dyn Fn(usize) -> Option<RerunReason> + Sync),
    ) -> Vec<Result<Decision>> {
        let decide = |stage: &usize| self.decide(*stage, outputs, must_run(*stage).as_ref());
        let threads = if stages.len() < PARALLEL_FROM { 1 } else { thread::available_parallelism().map_or(1, usize::from).min(8) };
        if threads == 1 {
            return stages.iter().map(decide).collect();
        }
        thread::scope(|scope| {
            let shares = stages.chunks(stages.len().div_ceil(threads));
            let parts: Vec<_> = shares.map(|share| scope.spawn(|| share.iter().map(decide).collect::<Vec<_>>())).collect();
            parts.into_iter().flat_map(|part| part.join().unwrap_or_else(|payload| resume_unwind(payload))).collect()
        })
    }

    /// The full key of a stage whose inputs are known, as it is stored.
    pub fn full_key(&self, index: usize, inputs: &ActionInputs) -> Result<serde_json::Value> {
        let digests = inputs.iter().map(|(port, inputs)| (port.as_str(), inputs.iter().map(|input| input.digest).collect())).collect();
        Ok(full_key(&self.workflow.stages[index], digests, self.files(index)?).to_value())
    }

    /// Input artifacts of an action that cannot be opened.
    pub fn unreadable_inputs(&self, action: &Action) -> Result<Vec<Unreadable>> {
        let mut unreadable = Vec::new();
        for input in action.inputs.values().flatten() {
            if let Some(damaged) = self.unreadable(input.digest)? {
                unreadable.push(Unreadable { stage: input.stage, port: input.port.clone(), damaged });
            }
        }
        Ok(unreadable)
    }

    /// Why a stage must run although its result is known: damage was found in it, and what was damaged is made again
    /// without waiting for somebody to miss it.
    fn set_aside(&self, outputs: &BTreeMap<String, Digest>) -> Option<RerunReason> {
        let (port, _) = outputs.iter().find(|(_, digest)| self.store.is_set_aside(**digest))?;
        Some(RerunReason::ArtifactDamaged { port: port.clone(), needed_by: String::new() })
    }

    /// Why a stage that was asked for by name must run although its result is known: that cannot be read.
    fn lost(&self, stage: usize, outputs: &BTreeMap<String, Digest>) -> Result<Option<RerunReason>> {
        for (port, digest) in outputs {
            if let Some(damaged) = self.unreadable(*digest)? {
                return Ok(Some(Unreadable { stage, port: port.clone(), damaged }.reason(REQUEST)));
            }
        }
        Ok(None)
    }

    /// Whether an artifact that cannot be opened is damaged, rather than gone. `None` if it can. Like all that decides this only looks,
    /// so that a plan that is asked for again says the same, and a run after it too.
    fn unreadable(&self, digest: Digest) -> Result<Option<bool>> {
        if self.store.contains_artifact(digest) {
            return Ok(None);
        }
        Ok(Some(self.store.shows_damage(digest)?))
    }

    /// The key of the stage's snapshots, for kinds whose snapshots outlive the run: longer runs continue from them.
    pub fn lasting_prefix_key(&self, index: usize, outputs: &[Option<Outputs>]) -> Result<Option<Digest>> {
        let stage = &self.workflow.stages[index];
        let horizon = stage.kind.horizon(&stage.config);
        if horizon.is_empty() {
            return Ok(None);
        }
        Ok(Some(full_key(stage, self.digests_of(stage, outputs), self.files(index)?).prefix(&horizon)))
    }

    /// Stage names and digests of an action's inputs, as they go into provenance.
    pub fn named_inputs(&self, inputs: &ActionInputs) -> BTreeMap<String, Vec<(String, Digest)>> {
        let name = |input: &ActionInput| (self.workflow.stages[input.stage].name.clone(), input.digest);
        inputs.iter().map(|(port, inputs)| (port.clone(), inputs.iter().map(name).collect())).collect()
    }

    fn by_name<'i>(&'i self, inputs: &'i ActionInputs) -> BTreeMap<&'i str, Vec<(&'i str, Digest)>> {
        let name = |input: &ActionInput| (self.workflow.stages[input.stage].name.as_str(), input.digest);
        inputs.iter().map(|(port, inputs)| (port.as_str(), inputs.iter().map(name).collect())).collect()
    }

    fn inputs(&self, stage: &Stage, outputs: &[Option<Outputs>]) -> ActionInputs {
        let input = |edge: &Edge| ActionInput { stage: edge.stage, port: edge.port.clone(), digest: digest_of(edge, outputs) };
        stage.inputs.iter().map(|(port, edges)| (port.clone(), edges.iter().map(input).collect())).collect()
    }

    fn digests_of<'s>(&self, stage: &'s Stage, outputs: &[Option<Outputs>]) -> BTreeMap<&'s str, Vec<Digest>> {
        let digests = |edges: &[Edge]| edges.iter().map(|edge| digest_of(edge, outputs)).collect();
        stage.inputs.iter().map(|(port, edges)| (port.as_str(), digests(edges))).collect()
    }

    /// Snapshots that an action can continue from, as they are now.
    pub fn snapshots(&self, index: usize, action: &Action) -> Result<Vec<Snapshot>> {
        let fresh = matches!(action.rerun.reason, RerunReason::Forced { .. });
        if fresh { Ok(Vec::new()) } else { self.usable_snapshots(&self.workflow.stages[index], action.prefix_key) }
    }

    fn usable_snapshots(&self, stage: &Stage, prefix_key: Digest) -> Result<Vec<Snapshot>> {
        let mut snapshots = self.store.snapshots(prefix_key).list()?;
        snapshots.retain(|snapshot| stage.kind.can_continue(&stage.config, snapshot));
        Ok(snapshots)
    }

    /// The stage's data files as they enter its key.
    fn files(&self, index: usize) -> Result<&[Vec<KeyFile>]> {
        if let Some(files) = self.files[index].get() {
            return Ok(files);
        }
        let stage = &self.workflow.stages[index];
        let mut files = Vec::with_capacity(stage.files.len());
        for (at, paths) in stage.files.iter().enumerate() {
            let pattern = stage.file_patterns.get(at).map(|source| source.pattern.as_str()).unwrap_or_default();
            let mut source = Vec::with_capacity(paths.len());
            for path in paths {
                let label = match name_inside(self.workflow, pattern, path) {
                    Some(name) => ("name", name.to_string_lossy().into_owned()),
                    None => ("format", data_format(path)),
                };
                source.push(KeyFile { label, digest: self.file_digest(path)?.digest });
            }
            files.push(source);
        }
        Ok(self.files[index].get_or_init(|| files))
    }
}

/// The name of `path` in the directory that `pattern` names, if it names one. Patterns are relative to the file that they
/// stand in, which may have been included from elsewhere: where that is must not enter a key.
fn name_inside<'p>(workflow: &Workflow, pattern: &str, path: &'p Path) -> Option<&'p Path> {
    let sources = workflow.sources.iter().filter_map(|source| source.parent());
    let inside = std::iter::once(workflow.folder.as_path()).chain(sources).find_map(|folder| path.strip_prefix(folder.join(pattern)).ok());
    inside.filter(|inside| !inside.as_os_str().is_empty())
}

fn full_key<'a>(stage: &'a Stage, inputs: BTreeMap<&'a str, Vec<Digest>>, files: &'a [Vec<KeyFile>]) -> FullKey<'a> {
    FullKey {
        kind: stage.kind.name(),
        version: stage.kind.version(),
        settings: &stage.identity_settings,
        seed: stage.kind.draws().then_some(stage.seed),
        inputs,
        files,
    }
}

/// What an edge carries. A settled stage has all of its ports; a digest of nothing would only miss the cache.
/// Whether results of the kind hold rows of tokens.
fn measures_rows(kind: &dyn Kind) -> bool {
    kind.metrics().iter().any(|(name, _)| *name == RowTokens::METRICS[0])
}

fn digest_of(edge: &Edge, outputs: &[Option<Outputs>]) -> Digest {
    let digest = outputs[edge.stage].as_ref().and_then(|outputs| outputs.get(&edge.port)).copied();
    digest.unwrap_or_else(|| Digest::of(b""))
}

/// Stages called `name`: one stage, or every point of a matrix. `what` is the option that named it.
pub fn find_stages(workflow: &Workflow, name: &str, what: &str) -> Result<Vec<usize>, WorkflowErrors> {
    if let Some(stage) = workflow.find(name) {
        return Ok(vec![stage]);
    }
    let base = name.strip_suffix("[*]").unwrap_or(name);
    let points: Vec<usize> = (0..workflow.stages.len()).filter(|index| workflow.stages[*index].base_name == base).collect();
    if !points.is_empty() {
        return Ok(points);
    }
    let error = WorkflowError::new("unknown_stage", format!("{what}: there is no stage `{name}` in {}", workflow.path.display()));
    let similarity = |stage: &&Stage| (strsim::jaro_winkler(&stage.name, name) * 1000.0) as u32;
    let hint = match workflow.stages.iter().max_by_key(similarity).filter(|stage| similarity(stage) > 750) {
        Some(stage) => format!("did you mean `{}`?", stage.name),
        None => {
            let names: Vec<&str> = workflow.stages.iter().take(12).map(|stage| stage.name.as_str()).collect();
            format!("its stages are {}{}", names.join(", "), if workflow.stages.len() > 12 { ", ..." } else { "" })
        }
    };
    Err(error.with_hint(hint).into())
}

/// The workflow's path from the folder that holds the store; absolute if it is elsewhere.
pub fn workflow_name(workflow: &Path, store: &Store) -> String {
    let absolute = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let path = absolute(workflow);
    let folder = absolute(store.folder());
    folder.parent().and_then(|parent| path.strip_prefix(parent).ok()).unwrap_or(&path).to_string_lossy().into_owned()
}
