//! `reward_model`: a model with a scalar head that scores whole answers, trained on pairs (Bradley-Terry).

use std::{collections::BTreeMap, sync::Arc};

use burn::tensor::{Tensor, TensorData};
use rlflow_api::{
    Artifact, ArtifactType, DescribeContext, Description, Execution, InputPort, OutputPort, Problem, RunContext, Snapshot, StageKind,
    StageResult,
};
use rlflow_model::{Decoder, Group, Head, LoraSettings, PackedBatch, Schedule, parameters::host, ranks::Take};
use rlflow_text::{PreferenceDataset, Split};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    lora,
    losses::pairwise_reward_loss,
    models::{self, LoadedModel},
    pairs::{Answered, Pair, Pairs, TooLong},
    train::{self, Memory, RowOrder, Sharding, Sums, Task, TrainDefaults, TrainExecution, TrainPlan, TrainSettings},
};

/// See the module.
#[derive(Debug, Clone, PartialEq)]
pub struct RewardModel;

impl TrainDefaults for RewardModel {
    const EPOCHS: f64 = 1.0;
    const BATCH_SIZE: usize = 16;
    const LR: f64 = 1e-4;
    const SCHEDULE: Schedule = Schedule::Linear;
    const WEIGHT_DECAY: f64 = 0.0;
}

/// Settings of `reward_model`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RewardModelConfig {
    /// Training. `batch_size` counts pairs.
    #[serde(default)]
    pub train: TrainSettings<RewardModel>,
    /// Whether the margins of the data are subtracted from the difference of scores.
    #[serde(default)]
    pub margin: bool,
    /// Coefficient of `(chosen + rejected)^2`, which keeps scores around 0; 0.01 is usual.
    #[serde(default)]
    #[schemars(range(min = 0.0))]
    pub center_rewards_coefficient: f64,
    /// Trains low-rank adapters instead of the weights, which are shared with the model below: `lora = { rank = 8 }`. Without it all
    /// weights are trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraSettings>,
    /// Execution.
    #[serde(flatten)]
    pub execution: TrainExecution,
}

impl StageKind for RewardModel {
    type Config = RewardModelConfig;

    const NAME: &'static str = "reward_model";
    const VERSION: u32 = 1;
    const SUMMARY: &'static str = "Trains a scalar head on a model to score preferred answers higher (pairwise Bradley-Terry loss).";
    const INPUTS: &'static [InputPort] = &[
        InputPort::one("model", &[ArtifactType::Policy, ArtifactType::Reward], "Model to start from; a policy gets a fresh scalar head."),
        InputPort::one("data", &[ArtifactType::Preferences], "Preference rows; K ranked answers give all their pairs."),
    ];
    const OUTPUTS: &'static [OutputPort] = &[OutputPort { name: "model", types: &[ArtifactType::Reward], doc: "The reward model." }];
    const METRICS: &'static [(&'static str, &'static str)] = &[
        ("loss", "mean loss per pair"),
        ("accuracy", "share of pairs ranked right"),
        ("margin", "mean of chosen minus rejected score"),
        ("min_reward", "least score"),
        ("mean_reward", "mean score"),
        ("max_reward", "greatest score"),
        ("num_tokens", "tokens of the step"),
        ("dropped_pairs", "pairs longer than the context, not trained on"),
        ("grad_norm", "gradient norm before clipping"),
        ("learning_rate", "learning rate of the step"),
        ("eval/loss", "mean loss on held-out pairs"),
        ("eval/accuracy", "share of held-out pairs ranked right"),
        ("tokens_per_s", "tokens trained on per second"),
        ("memory/peak_bytes", "bytes of the rank that held most, at its peak"),
        (
            "memory/<device>/<rank>/peak_bytes",
            "bytes of each rank at its peak; likewise parameters_bytes, gradients_bytes, optimizer_bytes, activations_bytes and buffers_bytes then, and now_bytes at the end",
        ),
    ];
    const DRAWS: bool = true;
    const ON_RANKS: bool = true;

    fn normalise(config: &mut RewardModelConfig) {
        config.train.normalise();
        lora::normalise(&mut config.lora);
    }

    fn check(config: &RewardModelConfig) -> Vec<Problem> {
        [config.train.check("train"), lora::check(config.lora.as_ref())].concat()
    }

    fn describe(config: &RewardModelConfig, context: &DescribeContext<'_>) -> Result<Description, Vec<Problem>> {
        lora::check_model(config.lora.as_ref(), context)?;
        models::describe_from(context, "model", "model", ArtifactType::Reward, |meta| {
            let Some(model) = &meta.model else { return Default::default() };
            let plan = config.train.plan(context.input("data").and_then(|data| data.meta.rows).unwrap_or(0) as usize);
            let total = 2 * plan.steps * (plan.batch_size * model.context) as u64;
            let tokens = train::tokens_of_rows(context, "data", 2 * plan.micro_batch_size, model.context, plan.shuffle);
            let pass = plan.pass(Head::Score, tokens, &config.execution);
            train::training_needs(model, config.lora.as_ref(), pass, Sharding::of(context), total)
        })
    }

    fn execution(config: &RewardModelConfig) -> Option<&Execution> {
        Some(&config.execution.placement)
    }

    fn horizon(config: &RewardModelConfig) -> Vec<&'static str> {
        config.train.horizon()
    }

    fn can_continue(config: &RewardModelConfig, snapshot: &Snapshot) -> bool {
        config.train.can_continue(snapshot)
    }

    fn run(config: &RewardModelConfig, context: &RunContext<'_>) -> StageResult<BTreeMap<String, Artifact>> {
        models::check_same_tokenizer(context, &["model", "data"])?;
        let memory = Memory::of(context.processes);
        let LoadedModel { mut model, info, artifact } =
            models::load(context, "model", Head::Score, config.execution.precision, config.lora.as_ref(), &memory)?;
        let data = &context.input("data")?.artifact;
        let length = model.config().context;
        let train = Pairs::from_rows(&PreferenceDataset::load(data, Split::Train)?, length, TooLong::Drop);
        context.metrics(0, &[("dropped_pairs", train.dropped as f64)]);
        train.tell_losses(context, length)?;
        let pairs = train.pairs;
        let heldout = Pairs::from_rows(&PreferenceDataset::load(data, Split::HeldOut)?, length, TooLong::Drop).pairs;
        let plan = config.train.plan(pairs.len());
        let order = RowOrder::new(context.seed, "reward_model/order", pairs.len(), plan.shuffle);
        let dropout = lora::Dropout::of(config.lora.as_ref(), context.seed);
        let mut task = RewardTask { pairs, heldout, order, plan: plan.clone(), config: config.clone(), dropout };
        context.phase("training");
        train::train(context, &plan, &config.execution, &mut model, &mut task)?;
        memory.report(context)?;
        let artifact = models::publish(context, ArtifactType::Reward, &model, Head::Score, &info, &artifact)?;
        Ok(BTreeMap::from([("model".into(), artifact)]))
    }
}

/// Whole sequences of one pass, with the rows at which they end.
pub struct ScoredBatch {
    /// Inputs.
    pub batch: PackedBatch,
    /// Last row of each sequence, where its score is read.
    pub last_rows: Arc<[u32]>,
}

impl ScoredBatch {
    /// From whole sequences.
    pub fn new<'a>(sequences: impl IntoIterator<Item = &'a [u32]>) -> Self {
        let batch = PackedBatch::new(sequences);
        let last_rows = (0..batch.layout.sequences()).map(|index| batch.layout.range(index).end as u32 - 1).collect();
        Self { batch, last_rows }
    }

    /// Scores by `model`, one per sequence.
    pub fn scores(&self, model: &Decoder) -> Vec<f64> {
        let scores = model.evaluate(&self.batch, |head| head.scores(self.last_rows.clone()));
        host(&scores).into_iter().map(f64::from).collect()
    }
}

/// Pairs of one pass: all chosen sequences, then all rejected ones.
struct PairBatch {
    scored: ScoredBatch,
    margins: Vec<f32>,
}

impl PairBatch {
    fn new(pairs: &[&Pair], use_margins: bool) -> Self {
        let sequences = |of: fn(&Pair) -> &Answered| pairs.iter().map(move |pair| of(pair).ids.as_slice());
        let scored = ScoredBatch::new(sequences(|pair| &pair.chosen).chain(sequences(|pair| &pair.rejected)));
        let margins = pairs.iter().map(|pair| if use_margins { pair.margin } else { 0.0 }).collect();
        Self { scored, margins }
    }

    fn losses(&self, scores: Tensor<1>, centering: f64) -> Tensor<1> {
        let pairs = self.margins.len();
        let margins = Tensor::from_data(TensorData::new(self.margins.clone(), [pairs]), &scores.device());
        pairwise_reward_loss(scores.clone().narrow(0, 0, pairs), scores.narrow(0, pairs, pairs), margins, centering)
    }

    /// Loss, accuracy, margin, scores, tokens: summed; then the least and the greatest score.
    fn statistics(&self, losses: &Tensor<1>, scores: &Tensor<1>) -> Sums {
        let (losses, scores) = (host(losses), host(scores));
        let (chosen, rejected) = scores.split_at(losses.len());
        let sum = |values: &mut dyn Iterator<Item = f64>| values.sum::<f64>();
        let both = || chosen.iter().zip(rejected);
        vec![
            sum(&mut losses.iter().map(|loss| f64::from(*loss))),
            sum(&mut both().map(|(c, r)| f64::from(u8::from(c > r)))),
            sum(&mut both().map(|(c, r)| f64::from(c - r))),
            sum(&mut scores.iter().map(|score| f64::from(*score))),
            self.scored.batch.tokens() as f64,
            scores.iter().map(|score| f64::from(*score)).fold(f64::INFINITY, f64::min),
            scores.iter().map(|score| f64::from(*score)).fold(f64::NEG_INFINITY, f64::max),
        ]
    }
}

/// Where the sums end and the least score stands, then the greatest.
const LEAST: usize = 5;

struct RewardTask {
    pairs: Vec<Pair>,
    heldout: Vec<Pair>,
    order: RowOrder,
    plan: TrainPlan,
    config: RewardModelConfig,
    dropout: lora::Dropout,
}

impl Task for RewardTask {
    type MicroBatch = PairBatch;

    fn micro_batches(&mut self, step: u64) -> StageResult<Vec<PairBatch>> {
        let rows = self.order.batch(step, self.plan.batch_size);
        let batch = |rows: &[usize]| PairBatch::new(&rows.iter().map(|row| &self.pairs[*row]).collect::<Vec<_>>(), self.config.margin);
        let size = self.plan.micro_batch_size;
        let dropped = |(number, mut batch): (usize, PairBatch)| {
            let packed = batch.scored.batch.clone();
            batch.scored.batch = self.dropout.of_batch(packed, step, lora::pair_numbers(number * size, batch.margins.len()));
            batch
        };
        Ok(rows.chunks(size).map(batch).enumerate().map(dropped).collect())
    }

    fn denominator(&self, micro_batches: &[PairBatch]) -> f64 {
        micro_batches.iter().map(|batch| batch.margins.len()).sum::<usize>() as f64
    }

    fn tokens(&self, micro_batch: &PairBatch) -> u64 {
        micro_batch.scored.batch.tokens() as u64
    }

    fn backward(&self, model: &Decoder, micro_batch: &PairBatch, checkpointing: bool, take: Take<'_>) -> Sums {
        model.backward(
            &micro_batch.scored.batch,
            checkpointing,
            |head| {
                let scores = head.scores(micro_batch.scored.last_rows.clone());
                let losses = micro_batch.losses(scores.clone(), self.config.center_rewards_coefficient);
                let sums = micro_batch.statistics(&losses, &scores);
                (losses.sum(), sums)
            },
            take,
        )
    }

    fn merge(&self, sums: &mut Sums, next: &Sums) {
        sums[..LEAST].iter_mut().zip(next).for_each(|(sum, value)| *sum += value);
        sums[LEAST] = sums[LEAST].min(next[LEAST]);
        sums[LEAST + 1] = sums[LEAST + 1].max(next[LEAST + 1]);
    }

    fn metrics(&self, sums: &Sums, pairs: f64) -> Vec<(&'static str, f64)> {
        vec![
            ("loss", sums[0] / pairs),
            ("accuracy", sums[1] / pairs),
            ("margin", sums[2] / pairs),
            ("min_reward", sums[LEAST]),
            ("mean_reward", sums[3] / (2.0 * pairs)),
            ("max_reward", sums[LEAST + 1]),
            ("num_tokens", sums[4]),
        ]
    }

    fn evaluate(&self, model: &Group) -> StageResult<Vec<(&'static str, f64)>> {
        if self.heldout.is_empty() {
            return Ok(Vec::new());
        }
        let batch = |pairs: &[Pair]| PairBatch::new(&pairs.iter().collect::<Vec<_>>(), self.config.margin);
        let batches: Vec<PairBatch> = self.heldout.chunks(self.plan.micro_batch_size).map(batch).collect();
        let each = model.map(&batches, |decoder, batch| {
            let scores = decoder.evaluate(&batch.scored.batch, |head| head.scores(batch.scored.last_rows.clone()));
            let losses = batch.losses(scores.clone(), self.config.center_rewards_coefficient);
            batch.statistics(&losses, &scores)
        })?;
        let mut each = each.into_iter();
        let mut sums = each.next().unwrap_or_default();
        each.for_each(|next| self.merge(&mut sums, &next));
        let pairs = self.heldout.len() as f64;
        Ok(vec![("eval/loss", sums[0] / pairs), ("eval/accuracy", sums[1] / pairs)])
    }
}
