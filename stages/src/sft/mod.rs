//! `sft`: supervised fine-tuning on conversations. Every assistant turn of a conversation counts, in one pass, and
//! nothing else does. Conversations of a batch stand end to end behind document masks, without padding.

use std::collections::BTreeMap;

use rlflow_api::{
    Artifact, ArtifactType, DescribeContext, Description, Execution, InputPort, OutputPort, Problem, RunContext, Snapshot, StageError,
    StageKind, StageResult,
};
use rlflow_model::{Decoder, Group, Head, LoraSettings, Schedule, ranks::Take};
use rlflow_text::{ConversationDataset, ConversationRow, Split};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    language::{self, LanguageBatch, LanguageBatchBuilder},
    lora,
    models::{self, LoadedModel},
    train::{self, Memory, RowOrder, Sharding, Sums, Task, TrainDefaults, TrainExecution, TrainPlan, TrainSettings},
};

/// See the module.
#[derive(Debug, Clone, PartialEq)]
pub struct Sft;

impl TrainDefaults for Sft {
    const EPOCHS: f64 = 3.0;
    const BATCH_SIZE: usize = 16;
    const LR: f64 = 2e-5;
    const SCHEDULE: Schedule = Schedule::Linear;
    const WEIGHT_DECAY: f64 = 0.0;
}

/// Settings of `sft`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct SftConfig {
    /// Training. `batch_size` counts conversations.
    #[serde(default)]
    pub train: TrainSettings<Sft>,
    /// Trains low-rank adapters instead of the weights, which are shared with the model below: `lora = { rank = 8 }`. Without it all
    /// weights are trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraSettings>,
    /// Execution.
    #[serde(flatten)]
    pub execution: TrainExecution,
}

impl StageKind for Sft {
    type Config = SftConfig;

    const NAME: &'static str = "sft";
    const VERSION: u32 = 1;
    const SUMMARY: &'static str = "Supervised fine-tuning: teaches a model to answer as the assistant turns of conversations do.";
    const INPUTS: &'static [InputPort] = &[
        InputPort::one("model", &[ArtifactType::Policy], "Model to start from."),
        InputPort::one("data", &[ArtifactType::Conversations], "Conversations."),
    ];
    const OUTPUTS: &'static [OutputPort] = &[OutputPort { name: "model", types: &[ArtifactType::Policy], doc: "The fine-tuned model." }];
    const METRICS: &'static [(&'static str, &'static str)] = &[
        ("loss", "mean cross-entropy per counted token, in nats"),
        ("entropy", "mean entropy of the predictions at counted tokens, in nats"),
        ("mean_token_accuracy", "share of counted tokens that were the most probable ones"),
        ("num_tokens", "tokens of the step's conversations"),
        ("truncated_rows", "conversations longer than the context, cut at its end"),
        ("dropped_rows", "conversations left without a counted token, not trained on"),
        ("grad_norm", "gradient norm before clipping"),
        ("learning_rate", "learning rate of the step"),
        ("eval/loss", "mean cross-entropy on held-out conversations"),
        ("tokens_per_s", "tokens trained on per second"),
        ("memory/peak_bytes", "bytes of the rank that held most, at its peak"),
        (
            "memory/<device>/<rank>/peak_bytes",
            "bytes of each rank at its peak; likewise parameters_bytes, gradients_bytes, optimizer_bytes, activations_bytes and buffers_bytes then, and now_bytes at the end",
        ),
    ];
    const DRAWS: bool = true;
    const ON_RANKS: bool = true;

    fn normalise(config: &mut SftConfig) {
        config.train.normalise();
        lora::normalise(&mut config.lora);
    }

    fn check(config: &SftConfig) -> Vec<Problem> {
        [config.train.check("train"), lora::check(config.lora.as_ref())].concat()
    }

    fn describe(config: &SftConfig, context: &DescribeContext<'_>) -> Result<Description, Vec<Problem>> {
        lora::check_model(config.lora.as_ref(), context)?;
        models::describe_from(context, "model", "model", ArtifactType::Policy, |meta| {
            let Some(model) = &meta.model else { return Default::default() };
            let plan = config.train.plan(context.input("data").and_then(|data| data.meta.rows).unwrap_or(0) as usize);
            let total = plan.steps * plan.batch_size as u64 * model.context as u64;
            let tokens = train::tokens_of_rows(context, "data", plan.micro_batch_size, model.context, plan.shuffle);
            let pass = plan.pass(Head::Language, tokens, &config.execution);
            train::training_needs(model, config.lora.as_ref(), pass, Sharding::of(context), total)
        })
    }

    fn execution(config: &SftConfig) -> Option<&Execution> {
        Some(&config.execution.placement)
    }

    fn horizon(config: &SftConfig) -> Vec<&'static str> {
        config.train.horizon()
    }

    fn can_continue(config: &SftConfig, snapshot: &Snapshot) -> bool {
        config.train.can_continue(snapshot)
    }

    fn run(config: &SftConfig, context: &RunContext<'_>) -> StageResult<BTreeMap<String, Artifact>> {
        models::check_same_tokenizer(context, &["model", "data"])?;
        let memory = Memory::of(context.processes);
        let LoadedModel { mut model, info, artifact } =
            models::load(context, "model", Head::Language, config.execution.precision, config.lora.as_ref(), &memory)?;
        let data = &context.input("data")?.artifact;
        let length = model.config().context;
        let rows = usable_rows(&ConversationDataset::load(data, Split::Train)?, length);
        context.metrics(0, &[("truncated_rows", rows.truncated as f64), ("dropped_rows", rows.dropped as f64)]);
        let all = rows.rows.len() + rows.dropped;
        if rows.truncated > 0 {
            context.warning(format!("{} of {all} conversations are cut at the context of {length} tokens", rows.truncated));
        }
        if rows.dropped > 0 {
            context
                .warning(format!("{} of {all} conversations have no counted token within {length} tokens and are left out", rows.dropped));
        }
        if all == 0 {
            return Err(StageError::invalid_with_hint(
                "there is no conversation to train on",
                "is everything held out (`heldout` of the instructions)? `rlflow show` shows what they hold",
            ));
        }
        if rows.rows.is_empty() {
            return Err(StageError::invalid_with_hint(
                "no conversation has a counted token within the context",
                "look at the rows with `rlflow show`; a longer `model.context` may help",
            ));
        }
        let heldout = usable_rows(&ConversationDataset::load(data, Split::HeldOut)?, length).rows;
        let plan = config.train.plan(rows.rows.len());
        let order = RowOrder::new(context.seed, "sft/order", rows.rows.len(), plan.shuffle);
        let dropout = lora::Dropout::of(config.lora.as_ref(), context.seed);
        let mut task = SftTask { rows: rows.rows, heldout, order, plan: plan.clone(), dropout };
        context.phase("training");
        train::train(context, &plan, &config.execution, &mut model, &mut task)?;
        memory.report(context)?;
        let artifact = models::publish(context, ArtifactType::Policy, &model, Head::Language, &info, &artifact)?;
        Ok(BTreeMap::from([("model".into(), artifact)]))
    }
}

/// Conversations that can be trained on, and how many were cut or lost.
pub(crate) struct UsableRows {
    /// Cut to the context, each with a counted token.
    pub rows: Vec<ConversationRow>,
    /// Rows longer than the context.
    pub truncated: usize,
    /// Rows without a counted token.
    pub dropped: usize,
}

/// The rows of `data` that have a counted token within `length` tokens.
pub(crate) fn usable_rows(data: &ConversationDataset, length: usize) -> UsableRows {
    let mut usable = UsableRows { rows: Vec::with_capacity(data.len()), truncated: 0, dropped: 0 };
    for mut row in data.rows() {
        usable.truncated += usize::from(row.ids.len() > length);
        row.ids.truncate(length);
        row.mask.truncate(length);
        // The first token is nobody's target.
        if row.mask.iter().skip(1).any(|counts| *counts) { usable.rows.push(row) } else { usable.dropped += 1 }
    }
    usable
}

/// Conversations as one pass: each token predicts the next one where that counts.
pub fn batch<'a>(rows: impl IntoIterator<Item = &'a ConversationRow>) -> LanguageBatch {
    let mut builder = LanguageBatchBuilder::default();
    for row in rows {
        builder.push(&row.ids[..row.ids.len() - 1], |at| row.mask[at + 1].then_some(row.ids[at + 1]));
    }
    builder.finish()
}

struct SftTask {
    rows: Vec<ConversationRow>,
    heldout: Vec<ConversationRow>,
    order: RowOrder,
    plan: TrainPlan,
    dropout: lora::Dropout,
}

impl Task for SftTask {
    type MicroBatch = LanguageBatch;

    fn micro_batches(&mut self, step: u64) -> StageResult<Vec<LanguageBatch>> {
        let rows = self.order.batch(step, self.plan.batch_size);
        let size = self.plan.micro_batch_size;
        let batches = rows.chunks(size).map(|rows| batch(rows.iter().map(|row| &self.rows[*row]))).enumerate();
        let dropped = |(number, LanguageBatch { batch, targets })| {
            let first = (number * size) as u64;
            LanguageBatch { batch: self.dropout.of_batch(batch, step, first..), targets }
        };
        Ok(batches.map(dropped).collect())
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
        let mut sums = language::backward(model, micro_batch, checkpointing, take);
        // The last of a conversation is no input.
        sums[language::TOKENS] += micro_batch.batch.layout.sequences() as f64;
        sums
    }

    fn metrics(&self, sums: &Sums, denominator: f64) -> Vec<(&'static str, f64)> {
        language::metrics(sums, denominator)
    }

    fn evaluate(&self, model: &Group) -> StageResult<Vec<(&'static str, f64)>> {
        let batches: Vec<LanguageBatch> = self.heldout.chunks(self.plan.micro_batch_size).map(batch).collect();
        Ok(language::mean_loss(model, &batches)?.map(|loss| ("eval/loss", loss)).into_iter().collect())
    }
}
