use rlflow_api::Problem;
use rlflow_model::{Gathering, Head, LearningRate, OptimizerSettings, Schedule};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    losses::{KlEstimator, LossAggregation, PolicyClip},
    train::{Pass, Precision, Rollout, SnapshotSettings},
};

/// How the KL coefficient moves.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum KlController {
    /// Stays at `kl_coef`.
    #[default]
    Fixed,
    /// Moves so that the KL approaches `target` (arXiv:1909.08593 section 2.2):
    /// `coef *= 1 + clip(kl / target - 1, -0.2, 0.2) * samples / horizon`.
    Adaptive {
        /// KL per answer to approach, in nats.
        #[schemars(extend("exclusiveMinimum" = 0.0))]
        target: f64,
        /// Divides the number of samples of a step: the larger, the slower the coefficient moves.
        #[schemars(extend("exclusiveMinimum" = 0.0))]
        horizon: f64,
    },
}

impl KlController {
    /// The coefficient of the next step.
    pub fn next(self, coefficient: f64, kl: f64, samples: usize) -> f64 {
        match self {
            Self::Fixed => coefficient,
            Self::Adaptive { target, horizon } => coefficient * (1.0 + (kl / target - 1.0).clamp(-0.2, 0.2) * samples as f64 / horizon),
        }
    }
}

/// Where the KL divergence from the reference is penalised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum KlPlacement {
    /// In the reward of each token, as in TRL and InstructGPT.
    #[default]
    Reward,
    /// In the policy's loss, as in GRPO (verl's `use_kl_loss`).
    Loss,
}

/// What happens to the reward model's scores before they become rewards. Moments are those of all scores so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ScoreNormalisation {
    /// Nothing.
    #[default]
    None,
    /// Divided by their standard deviation.
    Scale,
    /// Their mean taken off, then divided by their standard deviation.
    Standardise,
}

/// Settings of `ppo`. Defaults are TRL 1.9's where it has them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PpoConfig {
    /// Steps; one is one rollout and the updates on it.
    #[schemars(extend("x-unit" = "steps"), range(min = 1))]
    pub steps: u64,
    /// Prompts per step, one answer each.
    #[serde(default = "batch_size")]
    #[schemars(extend("x-unit" = "prompts"), range(min = 1, max = 1_048_576))]
    pub batch_size: usize,
    /// Minibatches per epoch: one update each.
    #[serde(default = "one")]
    #[schemars(range(min = 1))]
    pub num_mini_batches: usize,
    /// Passes over each rollout.
    #[serde(default = "num_ppo_epochs")]
    #[schemars(range(min = 1))]
    pub num_ppo_epochs: usize,
    /// Longest answer.
    #[serde(default = "max_new_tokens")]
    #[schemars(extend("x-unit" = "tokens"), range(min = 1, max = 16_777_216))]
    pub max_new_tokens: usize,
    /// Divides the logits, when sampling and in every log-probability.
    #[serde(default = "temperature")]
    #[schemars(extend("exclusiveMinimum" = 0.0))]
    pub temperature: f64,
    /// Samples from this many of the likeliest tokens only; 0 for all.
    #[serde(default)]
    pub top_k: usize,
    /// Samples from the likeliest tokens that together have this probability; 1 for all.
    #[serde(default = "unit")]
    #[schemars(extend("exclusiveMinimum" = 0.0), range(max = 1.0))]
    pub top_p: f64,
    /// Coefficient of the per-token KL penalty.
    #[serde(default = "kl_coef")]
    #[schemars(range(min = 0.0))]
    pub kl_coef: f64,
    /// Estimator of the KL penalty: `k1`, `k2` or `k3`.
    #[serde(default)]
    pub kl_estimator: KlEstimator,
    /// Where the KL penalty stands: in the `reward` of each token, or in the policy's `loss` (then `k2` or `k3`).
    #[serde(default)]
    pub kl_in: KlPlacement,
    /// Whether the coefficient stays or follows a target: `{ type = "fixed" }` or `{ type = "adaptive", target = 6, horizon = 10000 }`.
    #[serde(default)]
    pub kl_controller: KlController,
    /// Subtracted from the score of an answer that did not end by itself.
    #[serde(default)]
    #[schemars(range(min = 0.0))]
    pub missing_eos_penalty: f64,
    /// What is done to scores before they become rewards: `none`, `scale` or `standardise`, by the moments of all scores
    /// of the run so far.
    #[serde(default)]
    pub score_normalisation: ScoreNormalisation,
    /// Scores are kept within plus and minus this, after normalisation and before the missing-EOS penalty (DeepSpeed-Chat:
    /// 5, OpenRLHF: 10). Without it they are not clipped.
    #[serde(default)]
    #[schemars(extend("exclusiveMinimum" = 0.0))]
    pub score_clip: Option<f64>,
    /// How far the policy's ratio may move.
    #[serde(default = "clip_range")]
    #[schemars(extend("exclusiveMinimum" = 0.0))]
    pub clip_range: f64,
    /// How far it may move upwards; `clip_range` unless given (DAPO: 0.28).
    #[serde(default)]
    #[schemars(extend("exclusiveMinimum" = 0.0))]
    pub clip_range_high: Option<f64>,
    /// Bounds the loss of tokens with a negative advantage A at `-A` times this (verl: 3). Without it there is no such bound.
    #[serde(default)]
    #[schemars(extend("exclusiveMinimum" = 1.0))]
    pub dual_clip: Option<f64>,
    /// How the policy losses of tokens are averaged: `token_mean`, `seq_mean_token_sum` or `seq_mean_token_mean`.
    #[serde(default)]
    pub loss_aggregation: LossAggregation,
    /// How far values may move.
    #[serde(default = "clip_range")]
    #[schemars(extend("exclusiveMinimum" = 0.0))]
    pub value_clip_range: f64,
    /// Coefficient of the value loss.
    #[serde(default = "vf_coef")]
    #[schemars(range(min = 0.0))]
    pub vf_coef: f64,
    /// Coefficient of an entropy bonus.
    #[serde(default)]
    #[schemars(range(min = 0.0))]
    pub entropy_coef: f64,
    /// Coefficient of the mean cross-entropy on the input `ptx`, which is added to each update of the policy (PPO-ptx,
    /// arXiv:2203.02155 eq. 2); as many sequences as answers. Needs that input.
    #[serde(default)]
    #[schemars(range(min = 0.0))]
    pub ptx_coef: f64,
    /// Decay per step of an exponential moving average of the policy's weights, which is the output `ema`
    /// (DeepSpeed-Chat: 0.992). Without it `ema` is the policy itself.
    #[serde(default)]
    #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1.0))]
    pub ema_decay: Option<f64>,
    /// Discount.
    #[serde(default = "unit")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub gamma: f64,
    /// Decay of generalised advantage estimation.
    #[serde(default = "gae_lambda")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub gae_lambda: f64,
    /// Whether rewards are scaled to variance 1 (their mean is kept).
    #[serde(default)]
    pub whiten_rewards: bool,
    /// Whether advantages are shifted and scaled to mean 0 and variance 1.
    #[serde(default = "yes")]
    pub whiten_advantages: bool,
    /// Puts the critic's value head on the actor's trunk: three models in memory instead of four. The critic then
    /// trains with the actor's settings and has no placement of its own.
    #[serde(default)]
    pub share_backbone: bool,
    /// Whether prompts come in a new order each pass.
    #[serde(default = "yes")]
    pub shuffle: bool,
    /// Steps between sampled texts in the record.
    #[serde(default = "sample_every")]
    #[schemars(extend("x-unit" = "steps"), range(min = 1))]
    pub sample_every: u64,
    /// Number format of the arithmetic of all four models: `fp32`, or `bf16` with fp32 master weights. Sampling is in fp32.
    #[serde(default)]
    pub precision: Precision,
    /// Whether an actor at ZeRO 3 gathers all its weights once per rollout. `false` gathers each block just before it runs, at every
    /// token: slower, for models that would not fit. At other levels, and for the answers, it makes no difference.
    #[serde(default = "yes")]
    #[schemars(extend("x-setting" = "execution"))]
    pub gather_for_generation: bool,
    /// Keeps only each block's input during the updates and computes the block again when its gradient is due: less memory, a third
    /// more work, the same bits.
    #[serde(default)]
    #[schemars(extend("x-setting" = "execution"))]
    pub gradient_checkpointing: bool,
    /// When and what to keep for an interrupted run to continue from.
    #[serde(flatten)]
    pub snapshots: SnapshotSettings,
}

fn batch_size() -> usize {
    64
}

fn one() -> usize {
    1
}

fn num_ppo_epochs() -> usize {
    4
}

fn max_new_tokens() -> usize {
    53
}

fn temperature() -> f64 {
    0.7
}

fn unit() -> f64 {
    1.0
}

fn kl_coef() -> f64 {
    0.05
}

fn clip_range() -> f64 {
    0.2
}

fn vf_coef() -> f64 {
    0.1
}

fn gae_lambda() -> f64 {
    0.95
}

fn yes() -> bool {
    true
}

fn sample_every() -> u64 {
    10
}

impl PpoConfig {
    pub(super) fn normalise(&mut self) {
        self.clip_range_high.get_or_insert(self.clip_range);
    }

    pub(super) fn check(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        if self.num_mini_batches > self.batch_size {
            let message = format!("num_mini_batches = {} is more than batch_size = {}", self.num_mini_batches, self.batch_size);
            problems.push(Problem::new("out_of_range", "num_mini_batches", message));
        }
        if self.kl_in == KlPlacement::Loss && self.kl_estimator == KlEstimator::K1 {
            let message = "kl_in = \"loss\" with kl_estimator = \"k1\" does nothing: the gradient of that estimator has mean 0";
            problems.push(Problem::new("conflicting_settings", "kl_estimator", message).hint("set kl_estimator = \"k3\" or \"k2\""));
        }
        problems
    }

    /// What is sampled at once, with so many tokens of prompts.
    pub(super) fn rollout(&self, prompt_tokens: usize) -> Rollout {
        Rollout {
            sequences: self.batch_size as u64,
            prompt_tokens: prompt_tokens as u64,
            new_tokens: self.max_new_tokens as u64,
            gathering: Gathering::of(self.gather_for_generation),
        }
    }

    /// Answers of the largest minibatch.
    pub(super) fn mini_batch_size(&self) -> usize {
        self.batch_size.div_ceil(self.num_mini_batches.max(1))
    }

    /// Where the policy loss is clipped.
    pub(super) fn clip(&self) -> PolicyClip {
        PolicyClip { low: self.clip_range, high: self.clip_range_high.unwrap_or(self.clip_range), dual: self.dual_clip }
    }
}

/// The `train` table of `ppo.actor` and `ppo.critic`. Optimizer: AdamW.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct RoleTrain {
    /// Peak learning rate.
    #[schemars(range(min = 0.0))]
    pub lr: f64,
    /// Answers per forward and backward pass.
    #[schemars(extend("x-unit" = "sequences"), range(min = 1, max = 1_048_576))]
    pub micro_batch_size: usize,
    /// Learning rate over PPO steps: `constant`, `linear` or `cosine` (not `wsd`).
    pub schedule: Schedule,
    /// PPO steps of linear warmup from 0.
    #[schemars(extend("x-unit" = "steps"))]
    pub warmup_steps: u64,
    /// Learning rate at the end of a falling schedule, as a fraction of `lr`.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub min_lr_ratio: f64,
    /// Decoupled weight decay, on matrices.
    #[schemars(range(min = 0.0))]
    pub weight_decay: f64,
    /// Decay rates of the moments.
    #[schemars(inner(range(min = 0.0, max = 0.999_999)))]
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    #[schemars(range(min = 0.0))]
    pub eps: f64,
    /// Largest global gradient norm; 0 for no clipping.
    #[schemars(range(min = 0.0))]
    pub grad_clip: f64,
}

impl Default for RoleTrain {
    fn default() -> Self {
        Self {
            lr: 3e-6,
            micro_batch_size: 16,
            schedule: Schedule::Linear,
            warmup_steps: 0,
            min_lr_ratio: 0.0,
            weight_decay: 0.0,
            betas: [0.9, 0.999],
            eps: 1e-8,
            grad_clip: 1.0,
        }
    }
}

impl RoleTrain {
    pub(super) fn normalise(&mut self) {}

    pub(super) fn check(&self) -> Vec<Problem> {
        if self.schedule != Schedule::Wsd {
            return Vec::new();
        }
        vec![
            Problem::new("out_of_range", "train.schedule", "schedule `wsd` is not for PPO's roles")
                .hint("`constant`, `linear` or `cosine`"),
        ]
    }

    /// Optimizer settings.
    pub fn optimizer(&self) -> OptimizerSettings {
        OptimizerSettings { betas: self.betas, eps: self.eps, weight_decay: self.weight_decay, grad_clip: self.grad_clip }
    }

    /// A pass over a micro-batch of so many tokens.
    pub(super) fn pass(&self, head: Head, tokens: usize, ppo: &PpoConfig) -> Pass {
        Pass {
            head,
            tokens: tokens as u64,
            micro_batches: ppo.mini_batch_size().div_ceil(self.micro_batch_size.max(1)) as u64,
            checkpointing: ppo.gradient_checkpointing,
            precision: ppo.precision,
        }
    }

    /// Learning rate over `steps` PPO steps.
    pub fn learning_rate(&self, steps: u64) -> LearningRate {
        LearningRate {
            lr: self.lr,
            schedule: self.schedule,
            warmup_steps: self.warmup_steps,
            decay_steps: 0,
            total_steps: steps,
            min_lr_ratio: self.min_lr_ratio,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Hand-worked from the formula, with both clips.
    #[test]
    fn adaptive_coefficient_moves_towards_the_target() {
        let controller = KlController::Adaptive { target: 6.0, horizon: 10_000.0 };
        assert!((controller.next(0.1, 6.6, 256) - 0.1 * (1.0 + 0.1 * 0.0256)).abs() < 1e-12);
        assert!((controller.next(0.1, 60.0, 256) - 0.1 * 1.00512).abs() < 1e-12);
        assert!((controller.next(0.1, 0.0, 256) - 0.1 * 0.99488).abs() < 1e-12);
        assert_eq!(KlController::Fixed.next(0.1, 60.0, 256), 0.1);
    }
}
