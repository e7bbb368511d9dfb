use std::{any::Any, collections::BTreeMap, path::Path, sync::OnceLock};

use schemars::{JsonSchema, Schema};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;

use rlflow_store::{Artifact, Snapshot};

use crate::{ArtifactMeta, ArtifactType, Execution, Origin, Placement, RunContext, StageResult};

/// How many edges a port takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arity {
    /// Exactly one.
    One,
    /// One or none.
    Optional,
    /// One or more, in order.
    Many,
}

/// An input of a kind.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct InputPort {
    /// Name, as in `inputs.NAME`.
    pub name: &'static str,
    /// Artifact types it takes.
    pub types: &'static [ArtifactType],
    /// How many edges.
    pub arity: Arity,
    /// If not empty, only stages of these kinds may be connected (the PPO roles).
    pub kinds: &'static [&'static str],
    /// One sentence for the documentation.
    pub doc: &'static str,
}

impl InputPort {
    /// A port that takes exactly one artifact of `types`.
    pub const fn one(name: &'static str, types: &'static [ArtifactType], doc: &'static str) -> Self {
        Self { name, types, arity: Arity::One, kinds: &[], doc }
    }

    /// The same port, not required.
    pub const fn optional(self) -> Self {
        Self { arity: Arity::Optional, ..self }
    }

    /// The same port, taking a list.
    pub const fn many(self) -> Self {
        Self { arity: Arity::Many, ..self }
    }

    /// The same port, only for stages of these kinds.
    pub const fn from_kinds(self, kinds: &'static [&'static str]) -> Self {
        Self { kinds, ..self }
    }
}

/// An output of a kind. The first one is the main output.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OutputPort {
    /// Name, as in `stage.NAME`.
    pub name: &'static str,
    /// Artifact types it may have; `describe` says which.
    pub types: &'static [ArtifactType],
    /// One sentence for the documentation.
    pub doc: &'static str,
}

/// Something wrong with a stage's settings or inputs, found before anything runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Stable code, such as `out_of_range`.
    pub code: &'static str,
    /// Dotted path of the setting within the stage (`model.heads`, `inputs.data`), so that the report can point at it.
    pub setting: String,
    /// What is wrong, with the offending value.
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
}

impl Problem {
    /// A problem with `setting`.
    pub fn new(code: &'static str, setting: impl Into<String>, message: impl Into<String>) -> Self {
        Self { code, setting: setting.into(), message: message.into(), hint: None }
    }

    /// The same with a hint.
    pub fn hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }
}

/// Data files that a stage reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataSource {
    /// Dotted path of the setting that names them (`sources[0].path`).
    pub setting: String,
    /// Path or glob, relative to the workflow file.
    pub pattern: String,
    /// Whether the path is a directory whose files are read by name (a checkpoint), rather than files.
    pub directory: bool,
    /// In a directory: endings of the names of the files that are read. Others, and those in folders inside it, are nobody's
    /// business. None: every file at any depth. Where the path need not be a directory, endings say that it may be one.
    pub endings: &'static [&'static str],
}

/// What is known of an input when planning. The stage that makes it is known whole where the port names the kinds it takes (PPO's roles);
/// copying that for every edge would take most of the time that loading takes.
#[derive(Debug, Clone, PartialEq)]
pub struct InputMeta {
    /// Stage that makes it.
    pub stage: String,
    /// Output port of that stage.
    pub port: String,
    /// Kind of that stage.
    pub kind: String,
    /// What it is.
    pub meta: ArtifactMeta,
    /// Where that stage is placed, as in [`DescribeContext::placement`]; none in particular where it is not known.
    pub placement: Placement,
    /// Normalised settings of that stage; null where they are not known.
    pub settings: Value,
    /// Outputs that stage itself takes, in order of its ports: two roles may be of one model. Empty where they are not known.
    pub made_of: Vec<Origin>,
}

/// What `describe` may look at.
pub struct DescribeContext<'a> {
    /// Name of the stage being described: origin of what it makes.
    pub stage: &'a str,
    /// Port to inputs, in order.
    pub inputs: &'a BTreeMap<String, Vec<InputMeta>>,
    /// Resolved data files, in the order of [`Kind::data_sources`].
    pub files: &'a [Vec<std::path::PathBuf>],
    /// Where the stage will run. Before that is decided, where it asks to: what is left to planning counts as the CPU, and as level 0.
    pub placement: &'a Placement,
}

impl DescribeContext<'_> {
    /// The first input of `port`, if connected.
    pub fn input(&self, port: &str) -> Option<&InputMeta> {
        self.inputs.get(port).and_then(|inputs| inputs.first())
    }
}

/// Memory and time that a stage needs, per rank where ranks differ only in shards. Zero where unknown.
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize)]
pub struct Needs {
    /// Parameters on the device, in bytes.
    pub parameter_bytes: u64,
    /// Gradients, in bytes.
    pub gradient_bytes: u64,
    /// Optimizer state, in bytes.
    pub optimizer_bytes: u64,
    /// Activations at their peak, in bytes.
    pub activation_bytes: u64,
    /// Key and value cache and other buffers, in bytes.
    pub buffer_bytes: u64,
    /// Of the parameters, those of models that rest while another one works, in bytes: parked, they are not on the device.
    #[serde(skip)]
    pub resting_bytes: u64,
    /// Ranks that have work in every step, the first ones; 0 where all have.
    #[serde(skip)]
    pub working_ranks: u64,
    /// What each of the other ranks holds for a while, in bytes, instead of gradients, activations and buffers.
    #[serde(skip)]
    pub idle_bytes: u64,
    /// Tokens that will be processed, for time estimates.
    pub tokens: u64,
}

impl Needs {
    /// Sum of all.
    pub fn peak_bytes(&self) -> u64 {
        self.lasting_bytes() + self.passing_bytes()
    }

    /// What is held for as long as the stage runs.
    pub fn lasting_bytes(&self) -> u64 {
        self.parameter_bytes + self.optimizer_bytes
    }

    /// What is held only while the model works.
    pub fn passing_bytes(&self) -> u64 {
        self.gradient_bytes + self.activation_bytes + self.buffer_bytes
    }

    /// The same of one rank.
    pub fn passing_bytes_of(&self, rank: usize) -> u64 {
        let has_work = self.working_ranks == 0 || (rank as u64) < self.working_ranks;
        if has_work { self.passing_bytes() } else { self.idle_bytes }
    }
}

/// What `describe` says.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Description {
    /// Output port to what it will hold.
    pub outputs: BTreeMap<String, ArtifactMeta>,
    /// Memory and time, per rank.
    pub needs: Needs,
    /// Models of other stages that it holds where those are placed (PPO's roles): input port, and memory per rank.
    pub holds: Vec<(&'static str, Needs)>,
}

impl Description {
    /// Of a stage that holds nothing of others.
    pub fn new(outputs: BTreeMap<String, ArtifactMeta>, needs: Needs) -> Self {
        Self { outputs, needs, holds: Vec::new() }
    }
}

/// A stage kind, as its author writes it.
pub trait StageKind: Send + Sync + 'static {
    /// Settings. Serialising gives every setting with its default filled in: that is what enters the key.
    type Config: Serialize + DeserializeOwned + JsonSchema + Send + Sync + 'static;

    /// Name, as in `kind = "NAME"`.
    const NAME: &'static str;
    /// Raised when the meaning of the kind's results changes.
    const VERSION: u32;
    /// One sentence for the documentation.
    const SUMMARY: &'static str;
    /// Inputs.
    const INPUTS: &'static [InputPort];
    /// Outputs, the main one first.
    const OUTPUTS: &'static [OutputPort];
    /// Metrics it logs, with a few words each.
    const METRICS: &'static [(&'static str, &'static str)];
    /// Whether results depend on the seed.
    const DRAWS: bool;
    /// Whether `run` works on ranks. Where a run has several processes, all of them run such a stage together; others run at the leader
    /// alone.
    const ON_RANKS: bool = false;

    /// Defaults of an older edition where they differ from today's: settings laid under the user's.
    fn edition_defaults(edition: u32) -> Value {
        let _ = edition;
        Value::Null
    }

    /// Fills in defaults that depend on other settings (`micro_batch_size` on `batch_size`), so that spelling them
    /// out changes no key.
    fn normalise(config: &mut Self::Config) {
        let _ = config;
    }

    /// Checks between settings that the schema cannot express.
    fn check(config: &Self::Config) -> Vec<Problem> {
        let _ = config;
        Vec::new()
    }

    /// Data files it reads.
    fn data_sources(config: &Self::Config) -> Vec<DataSource> {
        let _ = config;
        Vec::new()
    }

    /// What it will make of its inputs, before any of them exists.
    fn describe(config: &Self::Config, context: &DescribeContext<'_>) -> Result<Description, Vec<Problem>>;

    /// Execution settings, for kinds that compute on devices.
    fn execution(config: &Self::Config) -> Option<&Execution> {
        let _ = config;
        None
    }

    /// Dotted names of settings that only say when to end (`train.steps`), given the others: left out of the key
    /// that snapshots are stored under, so that a longer run continues from a shorter one's.
    fn horizon(config: &Self::Config) -> Vec<&'static str> {
        let _ = config;
        Vec::new()
    }

    /// Whether a stored snapshot of the same prefix can be continued under `config`.
    fn can_continue(config: &Self::Config, snapshot: &Snapshot) -> bool {
        let _ = (config, snapshot);
        true
    }

    /// Does the work. Returns port to artifact.
    fn run(config: &Self::Config, context: &RunContext<'_>) -> StageResult<BTreeMap<String, Artifact>>;
}

/// A parsed stage of some kind: its config, opaque to the engine.
pub struct ErasedStage {
    config: Box<dyn Any + Send + Sync>,
    settings: OnceLock<Value>,
    to_settings: fn(&Self) -> Value,
}

impl ErasedStage {
    /// Every setting with defaults filled in.
    pub fn settings(&self) -> &Value {
        self.settings.get_or_init(|| (self.to_settings)(self))
    }

    /// Frees the memory of [`ErasedStage::settings`] until somebody asks for them again: few stages are asked, and of ten
    /// thousand they take more than all the rest.
    pub fn forget_settings(&mut self) {
        self.settings = OnceLock::new();
    }
}

/// [`StageKind`] without its type parameter: what the engine works with. Implemented for every `StageKind` marker type.
#[allow(missing_docs)]
pub trait Kind: Send + Sync {
    fn name(&self) -> &'static str;
    fn version(&self) -> u32;
    fn summary(&self) -> &'static str;
    fn inputs(&self) -> &'static [InputPort];
    fn outputs(&self) -> &'static [OutputPort];
    fn metrics(&self) -> &'static [(&'static str, &'static str)];
    fn draws(&self) -> bool;
    fn is_on_ranks(&self) -> bool;
    fn schema(&self) -> Schema;
    fn edition_defaults(&self, edition: u32) -> Value;
    /// Parses settings that were validated against the schema. The error is serde's message.
    fn parse(&self, settings: &Value) -> Result<ErasedStage, String>;
    fn check(&self, stage: &ErasedStage) -> Vec<Problem>;
    fn data_sources(&self, stage: &ErasedStage) -> Vec<DataSource>;
    fn describe(&self, stage: &ErasedStage, context: &DescribeContext<'_>) -> Result<Description, Vec<Problem>>;
    fn execution(&self, stage: &ErasedStage) -> Option<Execution>;
    fn horizon(&self, stage: &ErasedStage) -> Vec<&'static str>;
    fn can_continue(&self, stage: &ErasedStage, snapshot: &Snapshot) -> bool;
    fn run(&self, stage: &ErasedStage, context: &RunContext<'_>) -> StageResult<BTreeMap<String, Artifact>>;
}

fn config<K: StageKind>(stage: &ErasedStage) -> &K::Config {
    stage.config.downcast_ref().expect("a stage is only given to the kind that parsed it")
}

impl<K: StageKind> Kind for K {
    fn name(&self) -> &'static str {
        K::NAME
    }

    fn version(&self) -> u32 {
        K::VERSION
    }

    fn summary(&self) -> &'static str {
        K::SUMMARY
    }

    fn inputs(&self) -> &'static [InputPort] {
        K::INPUTS
    }

    fn outputs(&self) -> &'static [OutputPort] {
        K::OUTPUTS
    }

    fn metrics(&self) -> &'static [(&'static str, &'static str)] {
        K::METRICS
    }

    fn draws(&self) -> bool {
        K::DRAWS
    }

    fn is_on_ranks(&self) -> bool {
        K::ON_RANKS
    }

    fn schema(&self) -> Schema {
        schemars::schema_for!(K::Config)
    }

    fn edition_defaults(&self, edition: u32) -> Value {
        K::edition_defaults(edition)
    }

    fn parse(&self, settings: &Value) -> Result<ErasedStage, String> {
        let mut config = K::Config::deserialize(settings).map_err(|error| error.to_string())?;
        K::normalise(&mut config);
        let settings = serde_json::to_value(&config).map_err(|error| error.to_string())?;
        // What serialised once does so again.
        let to_settings = |stage: &ErasedStage| serde_json::to_value(self::config::<K>(stage)).unwrap_or_default();
        Ok(ErasedStage { config: Box::new(config), settings: settings.into(), to_settings })
    }

    fn check(&self, stage: &ErasedStage) -> Vec<Problem> {
        K::check(config::<K>(stage))
    }

    fn data_sources(&self, stage: &ErasedStage) -> Vec<DataSource> {
        K::data_sources(config::<K>(stage))
    }

    fn describe(&self, stage: &ErasedStage, context: &DescribeContext<'_>) -> Result<Description, Vec<Problem>> {
        K::describe(config::<K>(stage), context)
    }

    fn execution(&self, stage: &ErasedStage) -> Option<Execution> {
        K::execution(config::<K>(stage)).cloned()
    }

    fn horizon(&self, stage: &ErasedStage) -> Vec<&'static str> {
        K::horizon(config::<K>(stage))
    }

    fn can_continue(&self, stage: &ErasedStage, snapshot: &Snapshot) -> bool {
        K::can_continue(config::<K>(stage), snapshot)
    }

    fn run(&self, stage: &ErasedStage, context: &RunContext<'_>) -> StageResult<BTreeMap<String, Artifact>> {
        K::run(config::<K>(stage), context)
    }
}

/// Format of a data file by its name (`jsonl.gz`, `txt`): part of the key, unlike the rest of the path.
pub fn data_format(path: &Path) -> String {
    let name = path.file_name().map(|name| name.to_string_lossy().to_lowercase()).unwrap_or_default();
    let mut parts = name.rsplit('.');
    match (parts.next(), parts.next()) {
        (Some(packing @ ("gz" | "zst")), Some(format)) => format!("{format}.{packing}"),
        (Some(format), Some(_)) => format.to_owned(),
        _ => String::new(),
    }
}
