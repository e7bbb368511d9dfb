//! Stage kinds for tests: small ones whose settings, ports and descriptions use everything that the engine supports.
//! They compute nothing but a text that says what went in.

use std::{collections::BTreeMap, path::PathBuf};

use rlflow_api::{
    Architecture, Artifact, ArtifactMeta, ArtifactType, DataSource, DescribeContext, Description, Execution, InputPort, Kind, ModelConfig,
    Needs, Origin, OutputPort, Positions, Problem, RunContext, StageKind, StageResult,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::Registry;

/// Every test kind.
pub(crate) fn kinds() -> Vec<&'static dyn Kind> {
    vec![&Corpus, &Tokenizer, &Pretrain, &Preferences, &Import, &Dpo, &Actor, &Ppo, &Eval]
}

/// A registry of every test kind.
pub(crate) fn registry() -> Registry {
    Registry::new(kinds())
}

/// Writes what went in as the only entry of every output.
fn echo(kind: &str, outputs: &[OutputPort], config: Value, context: &RunContext<'_>) -> StageResult<BTreeMap<String, Artifact>> {
    context.check_cancelled()?;
    let mut made = BTreeMap::new();
    for output in outputs {
        let mut text = format!("{kind}.{} {config}\n", output.name);
        for (port, inputs) in context.inputs {
            for input in inputs {
                text += &format!("{port} {}\n", input.artifact.digest());
            }
        }
        for file in context.files.iter().flatten() {
            text += &format!("file {}\n", file.digest);
        }
        let mut artifact = context.output(output.types[0]);
        artifact.put("echo.txt", text.as_bytes())?;
        made.insert(output.name.to_owned(), artifact.publish()?);
    }
    Ok(made)
}

fn meta(artifact_type: ArtifactType, tokenizer: Option<Origin>) -> ArtifactMeta {
    ArtifactMeta { tokenizer, ..ArtifactMeta::new(artifact_type) }
}

fn describing(port: &str, meta: ArtifactMeta) -> Description {
    Description::new(BTreeMap::from([(port.to_owned(), meta)]), Needs::default())
}

/// A file to read.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub(crate) struct FileSource {
    /// Path or glob.
    #[schemars(extend("x-setting" = "path"))]
    path: String,
    /// Share of the mixture.
    #[serde(default = "one")]
    #[schemars(range(min = 0.0))]
    weight: f64,
}

fn one() -> f64 {
    1.0
}

fn sources_of(sources: &[FileSource]) -> Vec<DataSource> {
    let source = |(index, source): (usize, &FileSource)| DataSource {
        setting: format!("sources[{index}].path"),
        pattern: source.path.clone(),
        directory: false,
        endings: &[],
    };
    sources.iter().enumerate().map(source).collect()
}

pub(crate) struct Corpus;

/// Settings of `corpus`.
#[derive(Serialize, Deserialize, JsonSchema)]
pub(crate) struct CorpusConfig {
    /// What to read.
    #[schemars(length(min = 1))]
    sources: Vec<FileSource>,
    /// Share of documents held out.
    #[serde(default = "tenth")]
    #[schemars(range(min = 0.0, max = 0.5))]
    held_out: f64,
}

fn tenth() -> f64 {
    0.1
}

impl StageKind for Corpus {
    type Config = CorpusConfig;
    const NAME: &'static str = "corpus";
    const VERSION: u32 = 1;
    const SUMMARY: &'static str = "Raw documents.";
    const INPUTS: &'static [InputPort] = &[];
    const OUTPUTS: &'static [OutputPort] = &[OutputPort { name: "text", types: &[ArtifactType::Text], doc: "The documents." }];
    const METRICS: &'static [(&'static str, &'static str)] = &[("documents", "documents kept")];
    const DRAWS: bool = true;

    fn data_sources(config: &CorpusConfig) -> Vec<DataSource> {
        sources_of(&config.sources)
    }

    fn describe(_: &CorpusConfig, _: &DescribeContext<'_>) -> Result<Description, Vec<Problem>> {
        Ok(describing("text", meta(ArtifactType::Text, None)))
    }

    fn run(config: &CorpusConfig, context: &RunContext<'_>) -> StageResult<BTreeMap<String, Artifact>> {
        echo(Self::NAME, Self::OUTPUTS, json!(config.held_out), context)
    }
}

pub(crate) struct Tokenizer;

/// Settings of `tokenizer`.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub(crate) struct TokenizerConfig {
    /// Entries of the vocabulary.
    #[schemars(range(min = 259, max = 1_000_000), extend("x-unit" = "tokens"))]
    vocab_size: u32,
}

impl Default for TokenizerConfig {
    fn default() -> Self {
        Self { vocab_size: 4096 }
    }
}

impl StageKind for Tokenizer {
    type Config = TokenizerConfig;
    const NAME: &'static str = "tokenizer";
    const VERSION: u32 = 1;
    const SUMMARY: &'static str = "A vocabulary.";
    const INPUTS: &'static [InputPort] = &[InputPort::one("corpus", &[ArtifactType::Text], "Text to train on.")];
    const OUTPUTS: &'static [OutputPort] = &[OutputPort { name: "tokenizer", types: &[ArtifactType::Tokenizer], doc: "The vocabulary." }];
    const METRICS: &'static [(&'static str, &'static str)] = &[];
    const DRAWS: bool = false;

    fn describe(config: &TokenizerConfig, _: &DescribeContext<'_>) -> Result<Description, Vec<Problem>> {
        let vocab_size = Some(u64::from(config.vocab_size));
        Ok(describing("tokenizer", ArtifactMeta { vocab_size, ..ArtifactMeta::new(ArtifactType::Tokenizer) }))
    }

    fn run(config: &TokenizerConfig, context: &RunContext<'_>) -> StageResult<BTreeMap<String, Artifact>> {
        echo(Self::NAME, Self::OUTPUTS, json!(config.vocab_size), context)
    }
}

pub(crate) struct Pretrain;

/// A learning-rate schedule: a word, or a table with more to say.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub(crate) enum Schedule {
    /// By name.
    Named(ScheduleName),
    /// Warmup, stable, decay.
    Wsd {
        /// Share of the steps that decay.
        #[schemars(range(min = 0.0, max = 1.0))]
        decay: f64,
    },
}

/// Names of schedules.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ScheduleName {
    /// No change.
    Constant,
    /// Half a cosine.
    Cosine,
    /// A straight line.
    Linear,
}

/// How to train.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub(crate) struct Train {
    /// Optimizer steps.
    #[schemars(range(min = 1))]
    steps: Option<u64>,
    /// Peak learning rate.
    #[schemars(range(min = 0.0))]
    lr: f64,
    /// Sequences per step.
    #[schemars(range(min = 1), extend("x-unit" = "sequences"))]
    batch_size: u32,
    /// Learning-rate schedule.
    schedule: Schedule,
    /// Decay rates of the moments.
    betas: (f64, f64),
}

impl Default for Train {
    fn default() -> Self {
        Self { steps: None, lr: 1e-3, batch_size: 32, schedule: Schedule::Named(ScheduleName::Cosine), betas: (0.9, 0.95) }
    }
}

/// Shape of the network.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub(crate) struct Model {
    /// Width.
    #[schemars(range(min = 1, max = 65536))]
    hidden_size: usize,
    /// Attention heads.
    #[schemars(range(min = 1))]
    heads: usize,
}

impl Default for Model {
    fn default() -> Self {
        Self { hidden_size: 64, heads: 4 }
    }
}

/// Settings of `pretrain`.
#[derive(Serialize, Deserialize, JsonSchema, Default)]
#[serde(default)]
pub(crate) struct PretrainConfig {
    /// Network.
    model: Model,
    /// Training.
    train: Train,
    /// Whether to shuffle.
    shuffle: bool,
    /// Steps between log lines.
    #[schemars(range(min = 1), extend("x-setting" = "execution"))]
    log_every: u64,
    #[serde(flatten)]
    execution: Execution,
}

impl StageKind for Pretrain {
    type Config = PretrainConfig;
    const NAME: &'static str = "pretrain";
    const VERSION: u32 = 3;
    const SUMMARY: &'static str = "Next-token prediction.";
    const INPUTS: &'static [InputPort] = &[
        InputPort::one("corpus", &[ArtifactType::Text], "Text to learn."),
        InputPort::one("tokenizer", &[ArtifactType::Tokenizer], "Vocabulary."),
        InputPort::one("model", &[ArtifactType::Policy], "Checkpoint to continue from.").optional(),
    ];
    const OUTPUTS: &'static [OutputPort] = &[OutputPort { name: "model", types: &[ArtifactType::Policy], doc: "The checkpoint." }];
    const METRICS: &'static [(&'static str, &'static str)] = &[("loss", "cross-entropy")];
    const DRAWS: bool = true;

    fn edition_defaults(edition: u32) -> Value {
        // Edition 2 of the tests made the default rate smaller.
        if edition == 1 { json!({ "train": { "lr": 2e-3 } }) } else { Value::Null }
    }

    fn check(config: &PretrainConfig) -> Vec<Problem> {
        let Model { hidden_size, heads } = config.model;
        if hidden_size % heads == 0 {
            return Vec::new();
        }
        vec![
            Problem::new("indivisible", "model.heads", format!("{heads} heads do not divide hidden_size {hidden_size}"))
                .hint("use 4 heads"),
        ]
    }

    fn describe(config: &PretrainConfig, context: &DescribeContext<'_>) -> Result<Description, Vec<Problem>> {
        let tokenizer = context.input("tokenizer").and_then(|input| input.meta.tokenizer.clone());
        let model = ModelConfig {
            architecture: Architecture::Llama,
            vocab_size: 300,
            hidden_size: config.model.hidden_size,
            intermediate_size: 64,
            layers: 1,
            heads: config.model.heads,
            kv_heads: config.model.heads,
            head_dim: config.model.hidden_size / config.model.heads,
            context: 64,
            positions: Positions::Rope,
            rope_theta: 10_000.0,
            rope_scaling: None,
            norm_eps: 1e-5,
            tie_embeddings: true,
            style: Default::default(),
        };
        let mut described = describing("model", ArtifactMeta { model: Some(model), ..meta(ArtifactType::Policy, tokenizer) });
        described.needs.parameter_bytes = 1000 / context.placement.ranks() as u64;
        Ok(described)
    }

    fn execution(config: &PretrainConfig) -> Option<&Execution> {
        Some(&config.execution)
    }

    fn horizon(_: &PretrainConfig) -> Vec<&'static str> {
        vec!["train.steps"]
    }

    fn run(config: &PretrainConfig, context: &RunContext<'_>) -> StageResult<BTreeMap<String, Artifact>> {
        echo(Self::NAME, Self::OUTPUTS, json!([config.model, config.train]), context)
    }
}

pub(crate) struct Preferences;

/// Settings of `preferences`.
#[derive(Serialize, Deserialize, JsonSchema)]
pub(crate) struct PreferencesConfig {
    /// What to read.
    sources: Vec<FileSource>,
}

impl StageKind for Preferences {
    type Config = PreferencesConfig;
    const NAME: &'static str = "preferences";
    const VERSION: u32 = 1;
    const SUMMARY: &'static str = "Better and worse answers.";
    const INPUTS: &'static [InputPort] = &[InputPort::one("tokenizer", &[ArtifactType::Tokenizer], "Vocabulary.")];
    const OUTPUTS: &'static [OutputPort] = &[OutputPort { name: "data", types: &[ArtifactType::Preferences], doc: "The pairs." }];
    const METRICS: &'static [(&'static str, &'static str)] = &[];
    const DRAWS: bool = false;

    fn data_sources(config: &PreferencesConfig) -> Vec<DataSource> {
        sources_of(&config.sources)
    }

    fn describe(_: &PreferencesConfig, context: &DescribeContext<'_>) -> Result<Description, Vec<Problem>> {
        let tokenizer = context.input("tokenizer").and_then(|input| input.meta.tokenizer.clone());
        Ok(describing("data", meta(ArtifactType::Preferences, tokenizer)))
    }

    fn run(_: &PreferencesConfig, context: &RunContext<'_>) -> StageResult<BTreeMap<String, Artifact>> {
        echo(Self::NAME, Self::OUTPUTS, Value::Null, context)
    }
}

pub(crate) struct Import;

/// Settings of `import`.
#[derive(Serialize, Deserialize, JsonSchema)]
pub(crate) struct ImportConfig {
    /// Checkpoint directory.
    #[schemars(extend("x-setting" = "path"))]
    path: PathBuf,
    /// Whether it is a reward model.
    #[serde(default)]
    reward: bool,
}

impl StageKind for Import {
    type Config = ImportConfig;
    const NAME: &'static str = "import";
    const VERSION: u32 = 1;
    const SUMMARY: &'static str = "A checkpoint from elsewhere.";
    const INPUTS: &'static [InputPort] = &[];
    const OUTPUTS: &'static [OutputPort] = &[
        OutputPort { name: "model", types: &[ArtifactType::Policy, ArtifactType::Reward], doc: "The checkpoint." },
        OutputPort { name: "tokenizer", types: &[ArtifactType::Tokenizer], doc: "Its vocabulary." },
    ];
    const METRICS: &'static [(&'static str, &'static str)] = &[];
    const DRAWS: bool = false;

    fn data_sources(config: &ImportConfig) -> Vec<DataSource> {
        vec![DataSource { setting: "path".into(), pattern: config.path.to_string_lossy().into_owned(), directory: true, endings: &[] }]
    }

    fn describe(config: &ImportConfig, context: &DescribeContext<'_>) -> Result<Description, Vec<Problem>> {
        let tokenizer = Some(Origin { stage: context.stage.to_owned(), port: "tokenizer".into() });
        let artifact_type = if config.reward { ArtifactType::Reward } else { ArtifactType::Policy };
        Ok(describing("model", meta(artifact_type, tokenizer)))
    }

    fn run(_: &ImportConfig, context: &RunContext<'_>) -> StageResult<BTreeMap<String, Artifact>> {
        echo(Self::NAME, Self::OUTPUTS, Value::Null, context)
    }
}

pub(crate) struct Dpo;

/// Settings of `dpo`.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub(crate) struct DpoConfig {
    /// Strength of the pull towards the reference.
    #[schemars(range(min = 0.0, max = 10.0))]
    beta: f64,
    /// Share of labels taken as wrong.
    #[schemars(range(min = 0.0, max = 0.5))]
    label_smoothing: f64,
    /// Training.
    train: Train,
    #[serde(flatten)]
    execution: Execution,
}

impl Default for DpoConfig {
    fn default() -> Self {
        Self { beta: 0.1, label_smoothing: 0.0, train: Train::default(), execution: Execution::default() }
    }
}

fn pass_on(port: &str, artifact_type: ArtifactType, input: &str, context: &DescribeContext<'_>) -> Description {
    let tokenizer = context.input(input).and_then(|input| input.meta.tokenizer.clone());
    describing(port, meta(artifact_type, tokenizer))
}

impl StageKind for Dpo {
    type Config = DpoConfig;
    const NAME: &'static str = "dpo";
    const VERSION: u32 = 1;
    const SUMMARY: &'static str = "Preference optimisation.";
    const INPUTS: &'static [InputPort] = &[
        InputPort::one("model", &[ArtifactType::Policy], "Checkpoint to start from."),
        InputPort::one("data", &[ArtifactType::Preferences], "Pairs."),
    ];
    const OUTPUTS: &'static [OutputPort] = &[OutputPort { name: "model", types: &[ArtifactType::Policy], doc: "The checkpoint." }];
    const METRICS: &'static [(&'static str, &'static str)] = &[("loss", "the loss")];
    const DRAWS: bool = true;

    fn describe(_: &DpoConfig, context: &DescribeContext<'_>) -> Result<Description, Vec<Problem>> {
        Ok(pass_on("model", ArtifactType::Policy, "model", context))
    }

    fn execution(config: &DpoConfig) -> Option<&Execution> {
        Some(&config.execution)
    }

    fn run(config: &DpoConfig, context: &RunContext<'_>) -> StageResult<BTreeMap<String, Artifact>> {
        echo(Self::NAME, Self::OUTPUTS, json!([config.beta, config.label_smoothing, config.train]), context)
    }
}

pub(crate) struct Actor;

/// Settings of `ppo.actor`.
#[derive(Serialize, Deserialize, JsonSchema, Default)]
#[serde(default)]
pub(crate) struct ActorConfig {
    #[serde(flatten)]
    execution: Execution,
}

impl StageKind for Actor {
    type Config = ActorConfig;
    const NAME: &'static str = "ppo.actor";
    const VERSION: u32 = 1;
    const SUMMARY: &'static str = "The policy that PPO trains.";
    const INPUTS: &'static [InputPort] = &[InputPort::one("model", &[ArtifactType::Policy], "Checkpoint to start from.")];
    const OUTPUTS: &'static [OutputPort] = &[OutputPort { name: "role", types: &[ArtifactType::Policy], doc: "The role." }];
    const METRICS: &'static [(&'static str, &'static str)] = &[];
    const DRAWS: bool = false;

    fn describe(_: &ActorConfig, context: &DescribeContext<'_>) -> Result<Description, Vec<Problem>> {
        Ok(pass_on("role", ArtifactType::Policy, "model", context))
    }

    fn run(_: &ActorConfig, context: &RunContext<'_>) -> StageResult<BTreeMap<String, Artifact>> {
        echo(Self::NAME, Self::OUTPUTS, Value::Null, context)
    }
}

pub(crate) struct Ppo;

/// Settings of `ppo`.
#[derive(Serialize, Deserialize, JsonSchema)]
pub(crate) struct PpoConfig {
    /// Rollouts.
    #[schemars(range(min = 1))]
    steps: u64,
}

impl StageKind for Ppo {
    type Config = PpoConfig;
    const NAME: &'static str = "ppo";
    const VERSION: u32 = 1;
    const SUMMARY: &'static str = "Proximal policy optimisation.";
    const INPUTS: &'static [InputPort] =
        &[InputPort::one("actor", &[ArtifactType::Policy], "The policy to train.").from_kinds(&["ppo.actor"])];
    const OUTPUTS: &'static [OutputPort] = &[OutputPort { name: "model", types: &[ArtifactType::Policy], doc: "The checkpoint." }];
    const METRICS: &'static [(&'static str, &'static str)] = &[];
    const DRAWS: bool = true;

    fn describe(_: &PpoConfig, context: &DescribeContext<'_>) -> Result<Description, Vec<Problem>> {
        Ok(pass_on("model", ArtifactType::Policy, "actor", context))
    }

    fn run(config: &PpoConfig, context: &RunContext<'_>) -> StageResult<BTreeMap<String, Artifact>> {
        echo(Self::NAME, Self::OUTPUTS, json!(config.steps), context)
    }
}

pub(crate) struct Eval;

/// Settings of `eval`.
#[derive(Serialize, Deserialize, JsonSchema, Default)]
#[serde(default)]
pub(crate) struct EvalConfig {
    /// Prompts to answer at most.
    #[schemars(range(min = 1))]
    max_prompts: Option<u32>,
}

impl StageKind for Eval {
    type Config = EvalConfig;
    const NAME: &'static str = "eval";
    const VERSION: u32 = 1;
    const SUMMARY: &'static str = "Compares checkpoints.";
    const INPUTS: &'static [InputPort] = &[
        InputPort::one("models", &[ArtifactType::Policy], "Checkpoints to compare.").many(),
        InputPort::one("judge", &[ArtifactType::Reward], "Scores the answers.").optional(),
    ];
    const OUTPUTS: &'static [OutputPort] = &[OutputPort { name: "evaluation", types: &[ArtifactType::Evaluation], doc: "The table." }];
    const METRICS: &'static [(&'static str, &'static str)] = &[];
    const DRAWS: bool = true;

    fn describe(_: &EvalConfig, context: &DescribeContext<'_>) -> Result<Description, Vec<Problem>> {
        if let Some(models) = context.inputs.get("models").filter(|models| models.len() > 4) {
            let message = format!("{} models are too many to compare", models.len());
            return Err(vec![Problem::new("too_many_models", "inputs.models[4]", message)]);
        }
        Ok(describing("evaluation", meta(ArtifactType::Evaluation, None)))
    }

    fn run(config: &EvalConfig, context: &RunContext<'_>) -> StageResult<BTreeMap<String, Artifact>> {
        echo(Self::NAME, Self::OUTPUTS, json!(config.max_prompts), context)
    }
}
