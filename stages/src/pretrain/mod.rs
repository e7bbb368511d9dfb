//! `pretrain`: next-token prediction on a corpus.
//!
//! Documents are laid end to end in a new order each epoch and cut into rows of the context's length, so that nothing is
//! thrown away: long documents go on in the next row, short ones share a row behind a document mask. The token after a
//! row's end is still a target.

mod windows;

use std::collections::BTreeMap;

use rlflow_api::{
    Artifact, ArtifactMeta, ArtifactType, DescribeContext, Description, Execution, InputPort, OutputPort, Problem, RunContext, Snapshot,
    StageError, StageKind, StageResult,
};
use rlflow_model::{CheckpointInfo, Decoder, Group, Head, Schedule, Use, parameters, ranks::Take};
use rlflow_text::{ChatTokenizer, Split, TokenDataset, tokenize_corpus};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use windows::Windows;

use crate::{
    language::{self, LanguageBatch, LanguageBatchBuilder},
    model_settings::ModelSettings,
    models,
    train::{self, Memory, Sharding, Sums, Task, TrainDefaults, TrainExecution, TrainPlan, TrainSettings},
};

/// See the module.
#[derive(Debug, Clone, PartialEq)]
pub struct Pretrain;

impl TrainDefaults for Pretrain {
    const EPOCHS: f64 = 1.0;
    const BATCH_SIZE: usize = 32;
    const LR: f64 = 1e-3;
    const SCHEDULE: Schedule = Schedule::Cosine;
    const WEIGHT_DECAY: f64 = 0.1;
    const BETAS: [f64; 2] = [0.9, 0.95];
}

/// Settings of `pretrain`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PretrainConfig {
    /// Shape of the network, where `inputs.model` is not connected.
    #[serde(default)]
    pub model: Option<ModelSettings>,
    /// Training. `batch_size` counts rows of the context's length.
    #[serde(default)]
    pub train: TrainSettings<Pretrain>,
    /// Execution.
    #[serde(flatten)]
    pub execution: TrainExecution,
}

impl StageKind for Pretrain {
    type Config = PretrainConfig;

    const NAME: &'static str = "pretrain";
    const VERSION: u32 = 1;
    const SUMMARY: &'static str = "Trains a decoder from scratch, or goes on with one, on next-token prediction over a corpus.";
    const INPUTS: &'static [InputPort] = &[
        InputPort::one("corpus", &[ArtifactType::Text], "Documents to learn from."),
        InputPort::one("tokenizer", &[ArtifactType::Tokenizer], "Tokenizer of the model."),
        InputPort::one("model", &[ArtifactType::Policy], "Checkpoint to go on from; `model` settings must then be absent.").optional(),
    ];
    const OUTPUTS: &'static [OutputPort] = &[OutputPort { name: "model", types: &[ArtifactType::Policy], doc: "The trained model." }];
    const METRICS: &'static [(&'static str, &'static str)] = &[
        ("loss", "mean cross-entropy per token, in nats"),
        ("entropy", "mean entropy of the predictions, in nats"),
        ("mean_token_accuracy", "share of tokens that were the most probable ones"),
        ("num_tokens", "tokens of the step"),
        ("grad_norm", "gradient norm before clipping"),
        ("learning_rate", "learning rate of the step"),
        ("eval/loss", "mean cross-entropy on held-out documents"),
        ("eval/perplexity", "exp of eval/loss"),
        ("tokens_per_s", "tokens trained on per second"),
        ("memory/peak_bytes", "bytes of the rank that held most, at its peak"),
        (
            "memory/<device>/<rank>/peak_bytes",
            "bytes of each rank at its peak; likewise parameters_bytes, gradients_bytes, optimizer_bytes, activations_bytes and buffers_bytes then, and now_bytes at the end",
        ),
    ];
    const DRAWS: bool = true;
    const ON_RANKS: bool = true;

    fn normalise(config: &mut PretrainConfig) {
        config.train.normalise();
        if let Some(model) = &mut config.model {
            model.normalise();
        }
    }

    fn check(config: &PretrainConfig) -> Vec<Problem> {
        let mut problems = config.train.check("train");
        problems.extend(config.model.iter().flat_map(|model| model.check("model")));
        problems
    }

    fn describe(config: &PretrainConfig, context: &DescribeContext<'_>) -> Result<Description, Vec<Problem>> {
        let tokenizer = context.input("tokenizer").map(|input| &input.meta);
        let input = context.input("model").map(|input| &input.meta);
        let model = match (&config.model, input) {
            (Some(_), Some(_)) => {
                let message = "the model's shape is given twice: by `model` and by `inputs.model`";
                return Err(vec![Problem::new("conflicting_settings", "model", message).hint("remove one of them")]);
            }
            (None, None) => {
                let message = "`model` is missing: the shape of the network to train";
                let hint =
                    "model = { hidden_size = 256, layers = 6, heads = 8, context = 256 }, or inputs.model to go on from a checkpoint";
                return Err(vec![Problem::new("missing_setting", "model", message).hint(hint)]);
            }
            (Some(model), None) => tokenizer.and_then(|meta| meta.vocab_size).map(|vocab| model.config(vocab as usize)),
            (None, Some(meta)) => meta.model.clone(),
        };
        let needs = model.as_ref().map(|model| {
            let plan = config.train.plan(0);
            let total = plan.steps * (plan.batch_size * model.context) as u64;
            train::training_needs(
                model,
                None,
                plan.pass(Head::Language, plan.micro_batch_size * model.context, &config.execution),
                Sharding::of(context),
                total,
            )
        });
        let meta = ArtifactMeta {
            context: model.as_ref().map(|model| model.context as u64),
            size_bytes: model.as_ref().map(|model| 4 * model.parameter_count()),
            model,
            tokenizer: tokenizer.and_then(|meta| meta.tokenizer.clone()),
            vocab_size: tokenizer.and_then(|meta| meta.vocab_size),
            ..ArtifactMeta::new(ArtifactType::Policy)
        };
        Ok(Description::new(BTreeMap::from([("model".into(), meta)]), needs.unwrap_or_default()))
    }

    fn execution(config: &PretrainConfig) -> Option<&Execution> {
        Some(&config.execution.placement)
    }

    fn horizon(config: &PretrainConfig) -> Vec<&'static str> {
        config.train.horizon()
    }

    fn can_continue(config: &PretrainConfig, snapshot: &Snapshot) -> bool {
        config.train.can_continue(snapshot)
    }

    fn run(config: &PretrainConfig, context: &RunContext<'_>) -> StageResult<BTreeMap<String, Artifact>> {
        let tokenizer_artifact = &context.input("tokenizer")?.artifact;
        let tokenizer = ChatTokenizer::load(tokenizer_artifact)?;
        models::check_same_tokenizer(context, &["tokenizer", "model"])?;
        let tokens = tokenize_corpus(context, &context.input("corpus")?.artifact, &tokenizer)?;
        let (precision, memory) = (config.execution.precision, Memory::of(context.processes));
        let mut model = match (&config.model, context.optional_input("model")) {
            (_, Some(_)) => models::load(context, "model", Head::Language, precision, None, &memory)?.model,
            (Some(settings), None) => {
                let shape = settings.config(tokenizer.vocab_size());
                let fresh = parameters::initial(&shape, context.seed, settings.init_std);
                let layout = memory.layout(context.placement)?;
                Group::new(&shape, Head::Language, &layout, precision.arithmetic(), Use::Trained(None), |spec| Ok(fresh(spec)))?
            }
            (None, None) => return Err(StageError::invalid("neither `model` settings nor `inputs.model`")),
        };
        context.phase("training");
        let train = TokenDataset::load(&tokens, Split::Train)?;
        let heldout = TokenDataset::load(&tokens, Split::HeldOut)?;
        let length = model.config().context;
        if train.total_tokens() < 2 {
            return Err(StageError::invalid_with_hint("the corpus has no text to train on", "look at it with `rlflow show`"));
        }
        let windows = Windows::new(train, length, context.seed, config.train.shuffle);
        let heldout = Windows::new(heldout, length, context.seed, false);
        let plan = config.train.plan(windows.rows());
        let mut task = PretrainTask { windows, heldout, plan: plan.clone() };
        train::train(context, &plan, &config.execution, &mut model, &mut task)?;
        memory.report(context)?;
        let digest = tokenizer.digest().to_string();
        let info =
            CheckpointInfo { model: model.config().clone(), head: Head::Language, tokenizer: digest, adapters: Vec::new(), role: None };
        let artifact = models::publish(context, ArtifactType::Policy, &model, Head::Language, &info, tokenizer_artifact)?;
        Ok(BTreeMap::from([("model".into(), artifact)]))
    }
}

struct PretrainTask {
    windows: Windows,
    heldout: Windows,
    plan: TrainPlan,
}

/// Rows of `windows` as one pass: every token predicts the next one of its document.
pub fn batch(windows: &mut Windows, rows: impl IntoIterator<Item = u64>) -> LanguageBatch {
    let mut builder = LanguageBatchBuilder::default();
    for row in rows {
        for piece in windows.row(row) {
            let next = |at: usize| piece.ids.get(at + 1).copied().or(piece.next);
            builder.push(&piece.ids, next);
        }
    }
    builder.finish()
}

impl Task for PretrainTask {
    type MicroBatch = LanguageBatch;

    fn micro_batches(&mut self, step: u64) -> StageResult<Vec<LanguageBatch>> {
        let first = step * self.plan.batch_size as u64;
        let rows: Vec<u64> = (first..first + self.plan.batch_size as u64).collect();
        let batches = rows.chunks(self.plan.micro_batch_size).map(|rows| batch(&mut self.windows, rows.iter().copied())).collect();
        let next = first + self.plan.batch_size as u64;
        self.windows.read_ahead(next..next + self.plan.batch_size as u64);
        Ok(batches)
    }

    fn denominator(&self, micro_batches: &[LanguageBatch]) -> f64 {
        micro_batches.iter().map(LanguageBatch::counted).sum::<usize>() as f64
    }

    fn counts(&self, micro_batch: &LanguageBatch) -> bool {
        micro_batch.counted() > 0
    }

    fn tokens(&self, micro_batch: &LanguageBatch) -> u64 {
        micro_batch.batch.tokens() as u64
    }

    fn backward(&self, model: &Decoder, micro_batch: &LanguageBatch, checkpointing: bool, take: Take<'_>) -> Sums {
        language::backward(model, micro_batch, checkpointing, take)
    }

    fn metrics(&self, sums: &Sums, denominator: f64) -> Vec<(&'static str, f64)> {
        language::metrics(sums, denominator)
    }

    fn evaluate(&self, model: &Group) -> StageResult<Vec<(&'static str, f64)>> {
        let rows = self.heldout.rows() as u64;
        let mut heldout = self.heldout.clone();
        let batches: Vec<LanguageBatch> = (0..rows)
            .step_by(self.plan.micro_batch_size)
            .map(|first| batch(&mut heldout, first..(first + self.plan.micro_batch_size as u64).min(rows)))
            .collect();
        let Some(loss) = language::mean_loss(model, &batches)? else { return Ok(Vec::new()) };
        Ok(vec![("eval/loss", loss), ("eval/perplexity", loss.exp())])
    }
}
