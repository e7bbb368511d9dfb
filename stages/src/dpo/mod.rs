//! `dpo`: direct preference optimisation (arXiv:2305.18290) and its relatives. Reference log-probabilities are computed
//! once and kept under a key of their own, so that a change of `beta` or of the loss does not compute them again.

mod loss;
mod task;

use std::collections::BTreeMap;

use rlflow_api::{
    Artifact, ArtifactType, DescribeContext, Description, Dtype, Execution, InputPort, Needs, OutputPort, Problem, RunContext, Snapshot,
    StageError, StageKind, StageResult,
};
use rlflow_model::{Group, Head, LoraSettings, Schedule, Use, checkpoint};
use rlflow_text::{PreferenceDataset, Split};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

pub use loss::{DpoLoss, IpoNorm};
use task::{DpoTask, ReferencedPair, answered_batch, frozen_logps};

use crate::{
    lora,
    models::{self, LoadedModel},
    pairs::{Pair, Pairs, TooLong},
    train::{self, Memory, RowOrder, Sharding, TrainDefaults, TrainExecution, TrainSettings},
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
    /// The loss: `sigmoid` (DPO), `robust`, `hinge`, `ipo`, `sigmoid_norm`, `simpo`, `orpo` or `kto`.
    #[serde(default)]
    pub loss: DpoLoss,
    /// How strongly the policy is held to the reference: rewards are `beta` times the difference of log-probabilities.
    /// For `simpo` the scale of mean log-probabilities, for `orpo` the weight of the odds ratio.
    #[serde(default = "beta")]
    #[schemars(extend("exclusiveMinimum" = 0.0))]
    pub beta: f64,
    /// Probability that a label is flipped: conservative DPO with `sigmoid` (TRL's ignores it there), and for `robust`
    /// and `simpo`. 0 for none.
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 0.5))]
    pub label_smoothing: f64,
    /// For `ipo`: log-ratios per `token` (the default, TRL's) or their `sum` over the answer (the paper's, OpenRLHF's).
    #[serde(default)]
    pub ipo_norm: Option<IpoNorm>,
    /// For `simpo`: the margin by which `beta` times mean log-probabilities should differ; 0.5 unless given.
    #[serde(default)]
    #[schemars(range(min = 0.0))]
    pub simpo_gamma: Option<f64>,
    /// Weight of the chosen answers' mean negative log-likelihood per token, added to the loss. Unless given it is 1 for
    /// `simpo` (TRL's `cpo_alpha`; 0 is the paper's SimPO) and for `orpo`, where prompts count too; else 0.
    #[serde(default)]
    #[schemars(range(min = 0.0))]
    pub nll_weight: Option<f64>,
    /// For `kto`: weight of chosen answers; 1 unless given.
    #[serde(default)]
    #[schemars(range(min = 0.0))]
    pub desirable_weight: Option<f64>,
    /// For `kto`: weight of rejected answers; 1 unless given.
    #[serde(default)]
    #[schemars(range(min = 0.0))]
    pub undesirable_weight: Option<f64>,
    /// Trains low-rank adapters instead of the weights, which are shared with the model below: `lora = { rank = 8 }`. Without it all
    /// weights are trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraSettings>,
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
        "Direct preference optimisation and its relatives (IPO, SimPO, ORPO, KTO ...): raises preferred answers, without a reward model.";
    const INPUTS: &'static [InputPort] = &[
        InputPort::one("model", &[ArtifactType::Policy], "Model to start from."),
        InputPort::one("data", &[ArtifactType::Preferences], "Preference rows; K ranked answers give all their pairs."),
        InputPort::one("ref", &[ArtifactType::Policy], "Reference; the model itself unless connected. Not for `simpo` and `orpo`.")
            .optional(),
    ];
    const OUTPUTS: &'static [OutputPort] = &[OutputPort { name: "model", types: &[ArtifactType::Policy], doc: "The optimised policy." }];
    const METRICS: &'static [(&'static str, &'static str)] = &[
        ("loss", "mean loss per pair"),
        ("rewards/chosen", "beta times log-ratio of chosen answers, mean; simpo and orpo: beta times mean log-probability"),
        ("rewards/rejected", "the same of rejected answers"),
        ("rewards/accuracies", "share of pairs whose chosen answer has the higher reward"),
        ("rewards/margins", "mean of chosen minus rejected reward"),
        ("logps/chosen", "mean summed log-probability of chosen answers; simpo and orpo: per token"),
        ("logps/rejected", "the same of rejected answers"),
        ("logits/chosen", "mean logit over the vocabulary and the tokens of chosen answers"),
        ("logits/rejected", "the same of rejected answers"),
        ("entropy", "mean entropy of the predictions at answer tokens, in nats"),
        ("mean_token_accuracy", "share of tokens of chosen answers that were the most probable ones"),
        ("num_tokens", "tokens of the step"),
        ("nll_loss", "negative log-likelihood of chosen answers per token, where it counts"),
        ("log_odds_chosen", "orpo: mean log odds ratio of chosen over rejected answers"),
        ("log_odds_ratio", "orpo: mean log-sigmoid of that"),
        ("kl", "kto: the batch's divergence from the reference"),
        ("truncated_pairs", "pairs longer than the context, cut at its end"),
        ("dropped_pairs", "pairs whose prompt fills the context, not trained on"),
        ("grad_norm", "gradient norm before clipping"),
        ("learning_rate", "learning rate of the step"),
        ("eval/loss", "mean loss on held-out pairs"),
        ("eval/rewards/accuracies", "share of held-out pairs ranked right"),
        ("eval/rewards/margins", "mean margin on held-out pairs"),
        ("tokens_per_s", "tokens trained on per second"),
        ("memory/peak_bytes", "bytes of the rank that held most, at its peak"),
        (
            "memory/<device>/<rank>/peak_bytes",
            "bytes of each rank at its peak; likewise parameters_bytes, gradients_bytes, optimizer_bytes, activations_bytes and buffers_bytes then, and now_bytes at the end",
        ),
    ];
    const DRAWS: bool = true;
    const ON_RANKS: bool = true;

    fn normalise(config: &mut DpoConfig) {
        config.train.normalise();
        lora::normalise(&mut config.lora);
        config.normalise_loss();
    }

    fn check(config: &DpoConfig) -> Vec<Problem> {
        [config.train.check("train"), config.check_loss(), lora::check(config.lora.as_ref())].concat()
    }

    fn describe(config: &DpoConfig, context: &DescribeContext<'_>) -> Result<Description, Vec<Problem>> {
        if !config.loss.has_reference() && context.input("ref").is_some() {
            let problem = Problem::new("conflicting_settings", "inputs.ref", "this loss has no reference");
            return Err(vec![problem.hint("remove the input `ref`, or choose another `loss`")]);
        }
        lora::check_model(config.lora.as_ref(), context)?;
        models::describe_from(context, "model", "model", ArtifactType::Policy, |meta| {
            let Some(model) = &meta.model else { return Default::default() };
            let plan = config.train.plan(context.input("data").and_then(|data| data.meta.rows).unwrap_or(0) as usize);
            let total = 2 * plan.steps * (plan.batch_size * model.context) as u64;
            let tokens = train::tokens_of_rows(context, "data", 2 * plan.micro_batch_size, model.context, plan.shuffle);
            let pass = plan.pass(Head::Language, tokens, &config.execution);
            let sharding = Sharding::of(context);
            let training = train::training_needs(model, config.lora.as_ref(), pass, sharding, total);
            if !config.loss.has_reference() {
                return training;
            }
            // Below an adapter the model that it started from is there anyway.
            let named = |port: &str| context.input(port).map(|input| (&input.stage, &input.port));
            let is_itself = named("ref").is_none_or(|reference| named("model") == Some(reference));
            let of = context.input("ref").and_then(|input| input.meta.model.as_ref()).unwrap_or(model);
            let reference = train::frozen_needs(of, pass, sharding);
            let copy = if is_itself && config.lora.is_some() { 0 } else { reference.parameter_bytes };
            // Its log-probabilities are computed first, when there is no optimizer yet; the divergence of KTO asks it again in training.
            let parameter_bytes = training.parameter_bytes + copy;
            let before = Needs { parameter_bytes, working_ranks: 0, tokens: total, ..reference };
            let after = if config.loss == DpoLoss::Kto { Needs { parameter_bytes, ..training } } else { training };
            if before.peak_bytes() > after.peak_bytes() { before } else { after }
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
        let memory = Memory::of(context.processes);
        let loaded = models::load(context, "model", Head::Language, config.execution.precision, config.lora.as_ref(), &memory)?;
        let data = &context.input("data")?.artifact;
        let length = loaded.model.config().context;
        let train = Pairs::from_rows(&PreferenceDataset::load(data, Split::Train)?, length, TooLong::Truncate);
        let heldout = Pairs::from_rows(&PreferenceDataset::load(data, Split::HeldOut)?, length, TooLong::Truncate);
        context.metrics(0, &[("truncated_pairs", train.truncated as f64), ("dropped_pairs", train.dropped as f64)]);
        train.tell_losses(context, length)?;
        let plan = config.train.plan(train.pairs.len());

        let reference = context.optional_input("ref").unwrap_or(context.input("model")?).artifact.clone();
        let precision = config.execution.precision;
        let load_reference = || {
            // Below an adapter the reference is here already.
            if let Some(base) = loaded.base_as(&reference) {
                return Ok(base);
            }
            let layout = memory.layout(context.placement)?;
            let loaded = models::load_artifact(&reference, Head::Language, context.seed, &layout, precision, Use::Frozen)?;
            Ok::<_, StageError>(loaded.model)
        };
        let (train, heldout) = if config.loss.has_reference() {
            let key = json!({
                "memo": "reference_logprobs", "version": REFERENCE_VERSION, "model": reference.digest(), "data": data.digest(),
                "context": length, "micro_batch_size": plan.micro_batch_size, "precision": precision,
            });
            let stored = context.memo(&key, || {
                let model = load_reference()?;
                context.phase("reference log-probabilities");
                let mut builder = context.output(ArtifactType::Rollouts);
                for (name, pairs) in [("train", &train.pairs), ("heldout", &heldout.pairs)] {
                    let logps = reference_logps(context, &model, pairs, plan.micro_batch_size)?;
                    builder.put_tensor(name, Dtype::F32, &[logps.len() as u64], &checkpoint::bytes(&logps))?;
                }
                context.publish(builder)
            })?;
            let logps = |name: &str| StageResult::Ok(checkpoint::floats(&stored.read(name)?));
            (with_reference(train.pairs, &logps("train")?), with_reference(heldout.pairs, &logps("heldout")?))
        } else {
            let none = |pairs: &[Pair]| vec![0.0; 2 * pairs.len()];
            let zeros = (none(&train.pairs), none(&heldout.pairs));
            (with_reference(train.pairs, &zeros.0), with_reference(heldout.pairs, &zeros.1))
        };

        let order = RowOrder::new(context.seed, "dpo/order", train.len(), plan.shuffle);
        let mut task = DpoTask {
            pairs: train,
            heldout,
            order,
            plan: plan.clone(),
            config: config.clone(),
            context: length,
            reference: if config.loss == DpoLoss::Kto { Some(load_reference()?) } else { None },
            dropout: lora::Dropout::of(config.lora.as_ref(), context.seed),
        };
        let LoadedModel { mut model, info, artifact } = loaded;
        context.phase("training");
        train::train(context, &plan, &config.execution, &mut model, &mut task)?;
        memory.report(context)?;
        let artifact = models::publish(context, ArtifactType::Policy, &model, Head::Language, &info, &artifact)?;
        Ok(BTreeMap::from([("model".into(), artifact)]))
    }
}

/// Summed log-probabilities of chosen and rejected answers, alternating.
fn reference_logps(context: &RunContext<'_>, model: &Group, pairs: &[Pair], micro_batch_size: usize) -> StageResult<Vec<f32>> {
    let mut logps = Vec::with_capacity(2 * pairs.len());
    let batches: Vec<&[Pair]> = pairs.chunks(micro_batch_size).collect();
    // In portions, so that an interrupt is not waited for long.
    for portion in batches.chunks(8 * model.world_size()) {
        context.check_cancelled()?;
        let sums = model.map(portion, |decoder, pairs| frozen_logps(decoder, &answered_batch(pairs.iter(), false)))?;
        for sums in sums {
            let (chosen, rejected) = sums.split_at(sums.len() / 2);
            logps.extend(chosen.iter().zip(rejected).flat_map(|(c, r)| [*c, *r]));
        }
    }
    Ok(logps)
}

/// Pairs with what [`reference_logps`] gave for them.
fn with_reference(pairs: Vec<Pair>, logps: &[f32]) -> Vec<ReferencedPair> {
    let pairs = pairs.into_iter().zip(logps.chunks_exact(2));
    pairs.map(|(pair, logps)| ReferencedPair { pair, chosen: logps[0], rejected: logps[1] }).collect()
}
