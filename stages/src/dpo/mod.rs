//! `dpo`: direct preference optimisation (arXiv:2305.18290). Reference log-probabilities are computed once and kept
//! under a key of their own, so that a change of `beta` does not compute them again.

use std::collections::BTreeMap;

use burn::tensor::{Tensor, TensorData};
use rlflow_api::{
    Artifact, ArtifactType, DescribeContext, Description, Dtype, Execution, InputPort, OutputPort, Problem, RunContext, Snapshot,
    StageError, StageKind, StageResult,
};
use rlflow_model::{Decoder, Head, Schedule, checkpoint, parameters::host};
use rlflow_text::{PreferenceDataset, Split};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{
    losses::dpo_sigmoid_loss,
    models,
    pairs::{Answered, AnsweredBatch, Pair, Pairs, TooLong},
    train::{self, RowOrder, Sums, Task, TrainDefaults, TrainExecution, TrainPlan, TrainSettings, burn_device},
};

/// See the module.
#[derive(Debug, Clone, PartialEq)]
pub struct Dpo;

impl TrainDefaults for Dpo {
    const EPOCHS: f64 = 1.0;
    const BATCH_SIZE: usize = 16;
    const LR: f64 = 1e-6;
    const SCHEDULE: Schedule = Schedule::Linear;
    const WEIGHT_DECAY: f64 = 0.0;
}

/// Settings of `dpo`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct DpoConfig {
    /// Training. `batch_size` counts pairs.
    #[serde(default)]
    pub train: TrainSettings<Dpo>,
    /// How strongly the policy is held to the reference: rewards are `beta` times the difference of log-probabilities.
    #[serde(default = "beta")]
    #[schemars(extend("exclusiveMinimum" = 0.0))]
    pub beta: f64,
    /// Probability that a label is flipped (conservative DPO); 0 for plain DPO. TRL's sigmoid loss ignores it.
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 0.5))]
    pub label_smoothing: f64,
    /// Execution.
    #[serde(flatten)]
    pub execution: TrainExecution,
}

fn beta() -> f64 {
    0.1
}

/// Raised when reference log-probabilities change their meaning.
const REFERENCE_VERSION: u32 = 1;

impl StageKind for Dpo {
    type Config = DpoConfig;

    const NAME: &'static str = "dpo";
    const VERSION: u32 = 1;
    const SUMMARY: &'static str =
        "Direct preference optimisation: raises preferred answers against a frozen reference, without a reward model.";
    const INPUTS: &'static [InputPort] = &[
        InputPort::one("model", &[ArtifactType::Policy], "Model to start from."),
        InputPort::one("data", &[ArtifactType::Preferences], "Preference rows; K ranked answers give all their pairs."),
        InputPort::one("ref", &[ArtifactType::Policy], "Reference; the model itself unless connected.").optional(),
    ];
    const OUTPUTS: &'static [OutputPort] = &[OutputPort { name: "model", types: &[ArtifactType::Policy], doc: "The optimised policy." }];
    const METRICS: &'static [(&'static str, &'static str)] = &[
        ("loss", "mean loss per pair"),
        ("rewards/chosen", "beta times log-ratio of chosen answers, mean"),
        ("rewards/rejected", "the same of rejected answers"),
        ("rewards/accuracies", "share of pairs whose chosen answer has the higher reward"),
        ("rewards/margins", "mean of chosen minus rejected reward"),
        ("logps/chosen", "mean summed log-probability of chosen answers"),
        ("logps/rejected", "the same of rejected answers"),
        ("entropy", "mean entropy of the predictions at answer tokens, in nats"),
        ("num_tokens", "tokens of the step"),
        ("truncated_pairs", "pairs longer than the context, cut at its end"),
        ("dropped_pairs", "pairs whose prompt fills the context, not trained on"),
        ("grad_norm", "gradient norm before clipping"),
        ("learning_rate", "learning rate of the step"),
        ("eval/loss", "mean loss on held-out pairs"),
        ("eval/rewards/accuracies", "share of held-out pairs ranked right"),
        ("eval/rewards/margins", "mean margin on held-out pairs"),
        ("tokens_per_s", "tokens trained on per second"),
    ];
    const DRAWS: bool = true;

    fn normalise(config: &mut DpoConfig) {
        config.train.normalise();
    }

    fn check(config: &DpoConfig) -> Vec<Problem> {
        [config.train.check("train"), train::check_placement(&config.execution.placement)].concat()
    }

    fn describe(config: &DpoConfig, context: &DescribeContext<'_>) -> Result<Description, Vec<Problem>> {
        models::describe_from(context, "model", "model", ArtifactType::Policy, |meta| {
            let Some(model) = &meta.model else { return Default::default() };
            let plan = config.train.plan(context.input("data").and_then(|data| data.meta.rows).unwrap_or(0) as usize);
            let tokens = (2 * plan.micro_batch_size * model.context) as u64;
            train::needs(model, tokens, 2 * plan.steps * (plan.batch_size * model.context) as u64, config.execution.gradient_checkpointing)
        })
    }

    fn execution(config: &DpoConfig) -> Option<&Execution> {
        Some(&config.execution.placement)
    }

    fn horizon(config: &DpoConfig) -> Vec<&'static str> {
        config.train.horizon()
    }

    fn can_continue(config: &DpoConfig, snapshot: &Snapshot) -> bool {
        config.train.can_continue(snapshot)
    }

    fn run(config: &DpoConfig, context: &RunContext<'_>) -> StageResult<BTreeMap<String, Artifact>> {
        models::check_same_tokenizer(context, &["model", "ref", "data"])?;
        let device = burn_device(&context.placement.devices)?;
        let mut model = models::load(context, "model", Head::Language, &device)?;
        let data = &context.input("data")?.artifact;
        let length = model.decoder.config().context;
        let train = Pairs::from_rows(&PreferenceDataset::load(data, Split::Train)?, length, TooLong::Truncate);
        let heldout = Pairs::from_rows(&PreferenceDataset::load(data, Split::HeldOut)?, length, TooLong::Truncate);
        context.metrics(0, &[("truncated_pairs", train.truncated as f64), ("dropped_pairs", train.dropped as f64)]);
        if train.pairs.is_empty() {
            return Err(StageError::invalid_with_hint(
                "no pair has an answer within the context",
                "a longer `model.context`, or shorter prompts",
            ));
        }
        let plan = config.train.plan(train.pairs.len());

        let reference = context.optional_input("ref").unwrap_or(context.input("model")?).artifact.clone();
        let key = json!({
            "memo": "reference_logprobs", "version": REFERENCE_VERSION, "model": reference.digest(), "data": data.digest(), "context": length,
            "micro_batch_size": plan.micro_batch_size,
        });
        let stored = context.memo(&key, || {
            let decoder = models::load_artifact(&reference, Head::Language, context.seed, &device)?.decoder;
            context.phase("reference log-probabilities");
            let mut builder = context.output(ArtifactType::Rollouts);
            for (name, pairs) in [("train", &train.pairs), ("heldout", &heldout.pairs)] {
                let logps = reference_logps(context, &decoder, pairs, plan.micro_batch_size)?;
                builder.put_tensor(name, Dtype::F32, &[logps.len() as u64], &checkpoint::bytes(&logps))?;
            }
            Ok(builder.publish()?)
        })?;
        let with_reference = |pairs: Vec<Pair>, name: &str| -> StageResult<Vec<ReferencedPair>> {
            let logps = checkpoint::floats(&stored.read(name)?);
            let pairs = pairs.into_iter().zip(logps.chunks_exact(2));
            Ok(pairs.map(|(pair, logps)| ReferencedPair { pair, chosen: logps[0], rejected: logps[1] }).collect())
        };
        let (train, heldout) = (with_reference(train.pairs, "train")?, with_reference(heldout.pairs, "heldout")?);

        let order = RowOrder::new(context.seed, "dpo/order", train.len(), plan.shuffle);
        let mut task =
            DpoTask { pairs: train, heldout, order, plan: plan.clone(), beta: config.beta, label_smoothing: config.label_smoothing };
        context.phase("training");
        train::train(context, &plan, &config.execution, &mut model.decoder, &mut task)?;
        let artifact = models::publish(context, ArtifactType::Policy, &model.decoder, &model.info, &model.artifact)?;
        Ok(BTreeMap::from([("model".into(), artifact)]))
    }
}

/// Summed log-probabilities of chosen and rejected answers, alternating.
fn reference_logps(context: &RunContext<'_>, model: &Decoder, pairs: &[Pair], micro_batch_size: usize) -> StageResult<Vec<f32>> {
    let mut logps = Vec::with_capacity(2 * pairs.len());
    for pairs in pairs.chunks(micro_batch_size) {
        context.check_cancelled()?;
        let batch = answered_batch(pairs.iter());
        let logprobs = model.evaluate(&batch.batch, |head| head.token_stats(batch.targets.clone()).logprobs);
        let sums = host(&sequence_sums(&logprobs, &batch.answer_lens));
        let (chosen, rejected) = sums.split_at(pairs.len());
        logps.extend(chosen.iter().zip(rejected).flat_map(|(c, r)| [*c, *r]));
    }
    Ok(logps)
}

/// All chosen sequences, then all rejected ones.
fn answered_batch<'a>(pairs: impl Iterator<Item = &'a Pair> + Clone) -> AnsweredBatch {
    let chosen = pairs.clone().map(|pair| &pair.chosen as &Answered);
    AnsweredBatch::new(chosen.chain(pairs.map(|pair| &pair.rejected)), 1.0)
}

/// Sums over consecutive sequences, `[sequences]`. Policy and reference add in the same order, so that equal models
/// differ by exactly 0.
fn sequence_sums(logprobs: &Tensor<1>, lens: &[usize]) -> Tensor<1> {
    let mut start = 0;
    let sums: Vec<Tensor<1>> = lens
        .iter()
        .map(|len| {
            start += len;
            logprobs.clone().narrow(0, start - len, *len).sum()
        })
        .collect();
    Tensor::cat(sums, 0)
}

/// A pair with the reference's summed log-probabilities.
#[derive(Debug, Clone)]
struct ReferencedPair {
    pair: Pair,
    chosen: f32,
    rejected: f32,
}

struct DpoBatch {
    answered: AnsweredBatch,
    /// Reference log-probabilities: chosen, then rejected.
    reference: Vec<f32>,
}

impl DpoBatch {
    fn new(pairs: &[&ReferencedPair]) -> Self {
        let answered = answered_batch(pairs.iter().map(|pair| &pair.pair));
        let reference = pairs.iter().map(|pair| pair.chosen).chain(pairs.iter().map(|pair| pair.rejected)).collect();
        Self { answered, reference }
    }

    fn pairs(&self) -> usize {
        self.reference.len() / 2
    }
}

struct DpoTask {
    pairs: Vec<ReferencedPair>,
    heldout: Vec<ReferencedPair>,
    order: RowOrder,
    plan: TrainPlan,
    beta: f64,
    label_smoothing: f64,
}

impl DpoTask {
    /// Losses per pair on the graph, and sums for metrics. `logprobs` are those of all answer tokens.
    fn losses(&self, batch: &DpoBatch, logprobs: Tensor<1>, entropy: f64) -> (Tensor<1>, Sums) {
        let (pairs, device) = (batch.pairs(), logprobs.device());
        let logps = sequence_sums(&logprobs, &batch.answered.answer_lens);
        let reference = Tensor::from_data(TensorData::new(batch.reference.clone(), [2 * pairs]), &device);
        let ratios = logps.clone() - reference;
        let deltas = ratios.clone().narrow(0, 0, pairs) - ratios.clone().narrow(0, pairs, pairs);
        let losses = dpo_sigmoid_loss(deltas, self.beta, self.label_smoothing);

        let (losses_host, logps, ratios) = (host(&losses), host(&logps), host(&ratios));
        let rewards: Vec<f64> = ratios.iter().map(|ratio| self.beta * f64::from(*ratio)).collect();
        let (chosen, rejected) = rewards.split_at(pairs);
        let total = |values: &[f32]| values.iter().map(|value| f64::from(*value)).sum::<f64>();
        let sums = vec![
            total(&losses_host),
            chosen.iter().sum(),
            rejected.iter().sum(),
            chosen.iter().zip(rejected).map(|(c, r)| f64::from(u8::from(c > r))).sum(),
            total(&logps[..pairs]),
            total(&logps[pairs..]),
            entropy,
            batch.answered.targets.rows.len() as f64,
            batch.answered.batch.tokens() as f64,
        ];
        (losses, sums)
    }
}

impl Task for DpoTask {
    type MicroBatch = DpoBatch;

    fn micro_batches(&mut self, step: u64) -> StageResult<Vec<DpoBatch>> {
        let rows = self.order.batch(step, self.plan.batch_size);
        let batch = |rows: &[usize]| DpoBatch::new(&rows.iter().map(|row| &self.pairs[*row]).collect::<Vec<_>>());
        Ok(rows.chunks(self.plan.micro_batch_size).map(batch).collect())
    }

    fn denominator(&self, micro_batches: &[DpoBatch]) -> f64 {
        micro_batches.iter().map(DpoBatch::pairs).sum::<usize>() as f64
    }

    fn tokens(&self, micro_batch: &DpoBatch) -> u64 {
        micro_batch.answered.batch.tokens() as u64
    }

    fn backward(&self, model: &Decoder, micro_batch: &DpoBatch, checkpointing: bool, take: &mut dyn FnMut(usize, Tensor<2>)) -> Sums {
        model.backward(
            &micro_batch.answered.batch,
            checkpointing,
            |head| {
                let stats = head.token_stats(micro_batch.answered.targets.clone());
                let (losses, sums) = self.losses(micro_batch, stats.logprobs, crate::language::sum(&stats.entropies));
                (losses.sum(), sums)
            },
            take,
        )
    }

    fn metrics(&self, sums: &Sums, pairs: f64) -> Vec<(&'static str, f64)> {
        vec![
            ("loss", sums[0] / pairs),
            ("rewards/chosen", sums[1] / pairs),
            ("rewards/rejected", sums[2] / pairs),
            ("rewards/accuracies", sums[3] / pairs),
            ("rewards/margins", (sums[1] - sums[2]) / pairs),
            ("logps/chosen", sums[4] / pairs),
            ("logps/rejected", sums[5] / pairs),
            ("entropy", sums[6] / sums[7].max(1.0)),
            ("num_tokens", sums[8]),
        ]
    }

    fn evaluate(&self, model: &Decoder) -> StageResult<Vec<(&'static str, f64)>> {
        if self.heldout.is_empty() {
            return Ok(Vec::new());
        }
        let mut total = [0.0; 9];
        for pairs in self.heldout.chunks(self.plan.micro_batch_size) {
            let batch = DpoBatch::new(&pairs.iter().collect::<Vec<_>>());
            let sums = model.evaluate(&batch.answered.batch, |head| {
                let logprobs = head.token_stats(batch.answered.targets.clone()).logprobs;
                self.losses(&batch, logprobs, 0.0).1
            });
            total.iter_mut().zip(sums).for_each(|(total, sum)| *total += sum);
        }
        let pairs = self.heldout.len() as f64;
        Ok(vec![
            ("eval/loss", total[0] / pairs),
            ("eval/rewards/accuracies", total[3] / pairs),
            ("eval/rewards/margins", (total[1] - total[2]) / pairs),
        ])
    }
}
