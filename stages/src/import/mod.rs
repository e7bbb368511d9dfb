//! `import`: a Hugging Face checkpoint directory as a model and a tokenizer; or an adapter in PEFT's format on a model that another stage
//! gives.
//!
//! Weights keep the element type of their files, so that exporting gives the same bytes back; training widens them to fp32.
//! Tensors stream from the files into the store one by one.

mod adapter;
mod directory;
mod tokenizer_files;

use std::collections::BTreeMap;

use rlflow_api::{
    Artifact, ArtifactMeta, ArtifactType, DataSource, DescribeContext, Description, InputPort, Needs, Origin, OutputPort, Problem,
    RunContext, StageError, StageEvent, StageKind, StageResult,
};
use rlflow_hf::{Piece, config::CONFIG};
use rlflow_model::CheckpointInfo;
use rlflow_text::{ChatTemplate, ChatTokenizer, read_file};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub(crate) use directory::head_of;
pub use directory::{Directory, ENDINGS};

use crate::models;

/// Name of the file with sampling defaults, carried through to exports.
pub const GENERATION_CONFIG: &str = "generation_config.json";

/// See the module.
pub struct Import;

/// Settings of `import`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ImportConfig {
    /// Directory with `config.json`, `model.safetensors` (or several and their index) and `tokenizer.json`, relative to the workflow file.
    /// With `inputs.model`: with PEFT's `adapter_config.json` and `adapter_model.safetensors`.
    #[schemars(extend("x-setting" = "path"))]
    pub path: String,
    /// Longest sequence. Default: the checkpoint's `max_position_embeddings`. What training needs grows with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-unit" = "tokens"), range(min = 8, max = 4_194_304))]
    pub context: Option<usize>,
    /// Chat template, in Hugging Face's Jinja. Default: the checkpoint's own, else ChatML whose turns end in its EOS token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chat_template: Option<String>,
}

impl StageKind for Import {
    type Config = ImportConfig;

    const NAME: &'static str = "import";
    const VERSION: u32 = 1;
    const SUMMARY: &'static str = "Takes a Hugging Face checkpoint: Llama 2 and 3, Mistral, Qwen2, Qwen3, GPT-2; language models, and reward models with one label. Or an adapter (LoRA) of PEFT.";
    const INPUTS: &'static [InputPort] = &[InputPort::one(
        "model",
        &[ArtifactType::Policy, ArtifactType::Reward, ArtifactType::Critic],
        "The model that the adapter in the directory was trained on; without it the directory holds a whole model.",
    )
    .optional()];
    const OUTPUTS: &'static [OutputPort] = &[
        OutputPort {
            name: "model",
            types: &[ArtifactType::Policy, ArtifactType::Reward, ArtifactType::Critic],
            doc: "The model: a policy, or a reward model or critic if config.json says so.",
        },
        OutputPort { name: "tokenizer", types: &[ArtifactType::Tokenizer], doc: "Its tokenizer with the chat template." },
    ];
    const METRICS: &'static [(&'static str, &'static str)] =
        &[("parameters", "weights"), ("size_bytes", "bytes of the weights"), ("vocab_size", "tokens of the tokenizer")];
    const DRAWS: bool = false;

    fn check(config: &ImportConfig) -> Vec<Problem> {
        let template = config.chat_template.as_deref().map(ChatTemplate::check);
        let Some(Err(error)) = template else { return Vec::new() };
        vec![Problem::new("bad_template", "chat_template", error.to_string())]
    }

    fn data_sources(config: &ImportConfig) -> Vec<DataSource> {
        vec![DataSource { setting: "path".into(), pattern: config.path.clone(), directory: true, endings: ENDINGS }]
    }

    fn describe(config: &ImportConfig, context: &DescribeContext<'_>) -> Result<Description, Vec<Problem>> {
        let Some(files) = context.files.first().filter(|files| !files.is_empty()) else { return Ok(Description::default()) };
        if let Some(below) = context.input("model") {
            return adapter::describe(config, files, below);
        }
        let directory =
            Directory::at(files, &config.path, config.context).map_err(|errors| errors.iter().map(problem).collect::<Vec<_>>())?;
        let model = &directory.config.model;
        directory.check_there("tokenizer.json").map_err(|error| vec![problem(&error)])?;
        let origin = Some(Origin { stage: context.stage.to_owned(), port: "tokenizer".into() });
        // The tokenizer has at most as many tokens as the model has rows; counting them would take longer than all the rest.
        let tokens = Some(model.vocab_size as u64);
        let tokenizer = ArtifactMeta { tokenizer: origin.clone(), vocab_size: tokens, ..ArtifactMeta::new(ArtifactType::Tokenizer) };
        let described = ArtifactMeta {
            model: Some(model.clone()),
            tokenizer: origin,
            vocab_size: tokens,
            context: Some(model.context as u64),
            size_bytes: Some(directory.checkpoint.dtypes().iter().map(|(_, bytes)| bytes).sum()),
            ..ArtifactMeta::new(directory.config.role.artifact_type())
        };
        let outputs = BTreeMap::from([("model".to_owned(), described), ("tokenizer".to_owned(), tokenizer)]);
        Ok(Description::new(outputs, Needs::default()))
    }

    fn run(config: &ImportConfig, context: &RunContext<'_>) -> StageResult<BTreeMap<String, Artifact>> {
        let files = context.files.first().map(Vec::as_slice).unwrap_or_default();
        if let Some(below) = context.optional_input("model") {
            return adapter::run(config, files, &below.artifact, context);
        }
        let directory = Directory::of(files, &config.path, config.context).map_err(first)?;
        let model = directory.config.model.clone();
        let (tokenizer_json, tokenizer_config) = tokenizer_files::complete(&directory, config.chat_template.as_deref(), context)?;
        let tokenizer = ChatTokenizer::from_json(&tokenizer_json, &tokenizer_config)?;
        tokenizer_files::check_rows(&tokenizer, model.vocab_size)?;

        context.phase("reading the weights");
        let info =
            CheckpointInfo { head: directory.head(), model, tokenizer: tokenizer.digest().to_string(), adapters: Vec::new(), role: None };
        let mut builder = context.output(directory.config.role.artifact_type());
        tokenizer.store(&mut builder)?;
        for name in [CONFIG, GENERATION_CONFIG] {
            if let Some(file) = files.iter().find(|file| file.path.file_name().is_some_and(|found| found == name)) {
                builder.put(name, &read_file(file)?)?;
            }
        }
        let metadata = serde_json::to_value(&info).map_err(|error| StageError::invalid(error.to_string()))?;
        let (total, digests) = (directory.weights as u64, directory.digests.clone());
        let (mut done, mut elements, mut size_bytes) = (0, 0, 0);
        directory.checkpoint.read(&digests, |Piece { weight, dtype, content }| {
            context.check_cancelled()?;
            builder.put_tensor(&weight.name, dtype, &weight.shape, &content)?;
            done += 1;
            elements += content.len() as u64 / dtype.size_bytes();
            size_bytes += content.len() as u64;
            let detail = weight.name;
            context.reporter.report(StageEvent::Progress { done, total, unit: "tensors".into(), rate: None, tokens_per_s: None, detail });
            Ok(())
        })?;
        builder.metadata(metadata);
        let values = [("parameters", elements as f64), ("size_bytes", size_bytes as f64), ("vocab_size", tokenizer.vocab_size() as f64)];
        context.metrics(0, &values);
        let tokenizer = models::publish_tokenizer(context, &tokenizer)?;
        Ok(BTreeMap::from([("model".into(), builder.publish()?), ("tokenizer".into(), tokenizer)]))
    }
}

/// A stage's error as a problem with the setting that names the directory.
fn problem(error: &StageError) -> Problem {
    let found = Problem::new("bad_checkpoint", "path", error.to_string());
    match error.hint() {
        Some(hint) => found.hint(hint),
        None => found,
    }
}

fn first(errors: Vec<StageError>) -> StageError {
    errors.into_iter().next().unwrap_or_else(|| StageError::invalid("the checkpoint cannot be read"))
}
