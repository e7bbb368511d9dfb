//! Stage kinds with settings of every shape that real kinds have: numbers with bounds, words, tables, lists of tables, values that are one
//! of several types, paths, and the settings of execution. They never run.

use std::collections::BTreeMap;

use rlflow_api::{
    Artifact, ArtifactMeta, ArtifactType, DataSource, DescribeContext, Description, Execution, InputPort, Kind, Needs, OutputPort, Problem,
    RunContext, StageError, StageKind, StageResult,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Every kind.
pub fn all() -> Vec<&'static dyn Kind> {
    vec![&Corpus, &Tokenizer, &Pretrain, &Eval]
}

fn described(port: &str, artifact_type: ArtifactType) -> Result<Description, Vec<Problem>> {
    Ok(Description::new(BTreeMap::from([(port.to_owned(), ArtifactMeta::new(artifact_type))]), Needs::default()))
}

fn never() -> StageResult<BTreeMap<String, Artifact>> {
    Err(StageError::invalid("fuzzing runs nothing"))
}

macro_rules! kind {
    ($kind:ident, $config:ty, $name:literal, $inputs:expr, $port:literal: $output:ident, { $($more:tt)* }) => {
        /// A kind.
        pub struct $kind;

        impl StageKind for $kind {
            type Config = $config;
            const NAME: &'static str = $name;
            const VERSION: u32 = 1;
            const SUMMARY: &'static str = "A kind.";
            const INPUTS: &'static [InputPort] = $inputs;
            const OUTPUTS: &'static [OutputPort] = &[OutputPort { name: $port, types: &[ArtifactType::$output], doc: "An output." }];
            const METRICS: &'static [(&'static str, &'static str)] = &[];
            const DRAWS: bool = true;

            fn describe(_: &$config, _: &DescribeContext<'_>) -> Result<Description, Vec<Problem>> {
                described($port, ArtifactType::$output)
            }

            fn run(_: &$config, _: &RunContext<'_>) -> StageResult<BTreeMap<String, Artifact>> {
                never()
            }

            $($more)*
        }
    };
}

/// A file.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// Path or glob.
    #[schemars(extend("x-setting" = "path"))]
    path: String,
    /// Part of the mixture.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0))]
    weight: Option<f64>,
}

/// Settings of `corpus`.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CorpusConfig {
    /// What to read.
    #[schemars(length(min = 1))]
    sources: Vec<Source>,
    /// Share held out.
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 1.0))]
    heldout: f64,
}

kind!(Corpus, CorpusConfig, "corpus", &[], "text": Text, {
    fn data_sources(config: &CorpusConfig) -> Vec<DataSource> {
        let source = |(at, source): (usize, &Source)| DataSource {
            setting: format!("sources[{at}].path"),
            pattern: source.path.clone(),
            directory: false,
            endings: &[],
        };
        config.sources.iter().enumerate().map(source).collect()
    }
});

/// Settings of `tokenizer`.
#[derive(Serialize, Deserialize, JsonSchema, Default)]
#[serde(deny_unknown_fields, default)]
pub struct TokenizerConfig {
    /// Entries.
    #[schemars(range(min = 1, max = 1_000_000))]
    vocab_size: u64,
    /// Names.
    special_tokens: Vec<String>,
}

kind!(
    Tokenizer,
    TokenizerConfig,
    "tokenizer",
    &[InputPort::one("corpus", &[ArtifactType::Text], "Documents.").optional()],
    "tokenizer": Tokenizer,
    {}
);

/// A schedule: a word, or a table.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Schedule {
    /// By name.
    Named(Name),
    /// With its parts.
    Wsd {
        /// Share of the steps that decay.
        #[schemars(range(min = 0.0, max = 1.0))]
        decay: f64,
    },
}

/// Names of schedules.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Name {
    /// No change.
    Constant,
    /// Half a cosine.
    Cosine,
}

/// How to train.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Train {
    /// Steps.
    #[schemars(range(min = 1))]
    steps: Option<u64>,
    /// Rate.
    lr: f64,
    /// Over time.
    schedule: Schedule,
    /// Decay of the moments.
    betas: (f64, f64),
}

impl Default for Train {
    fn default() -> Self {
        Self { steps: None, lr: 1e-3, schedule: Schedule::Named(Name::Cosine), betas: (0.9, 0.95) }
    }
}

/// Settings of `pretrain`.
#[derive(Serialize, Deserialize, JsonSchema, Default)]
#[serde(default)]
pub struct PretrainConfig {
    /// Training.
    train: Train,
    /// Whether to shuffle.
    shuffle: bool,
    /// Sizes by name.
    sizes: BTreeMap<String, i64>,
    #[serde(flatten)]
    execution: Execution,
}

kind!(
    Pretrain,
    PretrainConfig,
    "pretrain",
    &[
        InputPort::one("corpus", &[ArtifactType::Text], "Documents."),
        InputPort::one("tokenizer", &[ArtifactType::Tokenizer], "Tokenizer.").optional(),
        InputPort::one("model", &[ArtifactType::Policy], "Checkpoint.").optional(),
    ],
    "model": Policy,
    {
        fn execution(config: &PretrainConfig) -> Option<&Execution> {
            Some(&config.execution)
        }
    }
);

/// Settings of `eval`.
#[derive(Serialize, Deserialize, JsonSchema, Default)]
#[serde(deny_unknown_fields, default)]
pub struct EvalConfig {
    /// Tokens.
    max_new_tokens: u32,
}

kind!(
    Eval,
    EvalConfig,
    "eval",
    &[InputPort::one("models", &[ArtifactType::Policy], "Checkpoints.").many()],
    "evaluation": Evaluation,
    {}
);
