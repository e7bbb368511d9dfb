use std::marker::PhantomData;

use rlflow_api::{Problem, Snapshot};
use rlflow_model::{Head, LearningRate, OptimizerSettings, Schedule};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Pass, TrainExecution};

/// Defaults that differ from kind to kind.
pub trait TrainDefaults: Send + Sync + 'static {
    /// Passes over the data, where neither `steps` nor `epochs` is given.
    const EPOCHS: f64;
    /// Sequences per step.
    const BATCH_SIZE: usize;
    /// Peak learning rate.
    const LR: f64;
    /// Shape of the learning rate.
    const SCHEDULE: Schedule;
    /// Weight decay.
    const WEIGHT_DECAY: f64;
    /// Moments' decay rates.
    const BETAS: [f64; 2] = [0.9, 0.999];

    #[doc(hidden)]
    fn batch_size() -> usize {
        Self::BATCH_SIZE
    }
    #[doc(hidden)]
    fn lr() -> f64 {
        Self::LR
    }
    #[doc(hidden)]
    fn schedule() -> Schedule {
        Self::SCHEDULE
    }
    #[doc(hidden)]
    fn weight_decay() -> f64 {
        Self::WEIGHT_DECAY
    }
    #[doc(hidden)]
    fn betas() -> [f64; 2] {
        Self::BETAS
    }
}

fn eps() -> f64 {
    1e-8
}

fn grad_clip() -> f64 {
    1.0
}

fn yes() -> bool {
    true
}

/// The `train` table of every trainer. Optimizer: AdamW with torch's definitions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(bound = "D: TrainDefaults")]
#[schemars(bound = "D: TrainDefaults", inline)]
pub struct TrainSettings<D> {
    /// Optimizer steps. Give this or `epochs`; without either, `epochs` is 1 (sft: 3).
    #[serde(default)]
    #[schemars(extend("x-unit" = "steps"), range(min = 1))]
    pub steps: Option<u64>,
    /// Passes over the data. Give this or `steps`; without either it is 1 (sft: 3).
    #[serde(default)]
    #[schemars(extend("x-unit" = "epochs"), extend("exclusiveMinimum" = 0.0))]
    pub epochs: Option<f64>,
    /// Sequences (rows, pairs) per step.
    #[serde(default = "D::batch_size")]
    #[schemars(extend("x-unit" = "sequences"), range(min = 1, max = 1_048_576))]
    pub batch_size: usize,
    /// Sequences per forward and backward pass; a quarter of `batch_size` unless given. Part of the result's identity,
    /// because sums of floats are.
    #[serde(default)]
    #[schemars(extend("x-unit" = "sequences"), range(min = 1, max = 1_048_576))]
    pub micro_batch_size: Option<usize>,
    /// Peak learning rate.
    #[serde(default = "D::lr")]
    #[schemars(range(min = 0.0))]
    pub lr: f64,
    /// Learning rate over steps: `constant`, `linear`, `cosine` or `wsd` (warmup, stable, decay).
    #[serde(default = "D::schedule")]
    pub schedule: Schedule,
    /// Steps of linear warmup from 0.
    #[serde(default)]
    #[schemars(extend("x-unit" = "steps"))]
    pub warmup_steps: u64,
    /// Steps of decay at the end of `wsd`, which needs it.
    #[serde(default)]
    #[schemars(extend("x-unit" = "steps"))]
    pub decay_steps: u64,
    /// Learning rate at the end of a falling schedule, as a fraction of `lr`.
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub min_lr_ratio: f64,
    /// Decoupled weight decay, on matrices (not on norms).
    #[serde(default = "D::weight_decay")]
    #[schemars(range(min = 0.0))]
    pub weight_decay: f64,
    /// Decay rates of the first and of the second moment: two numbers.
    #[serde(default = "D::betas")]
    #[schemars(inner(range(min = 0.0, max = 0.999_999)))]
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    #[serde(default = "eps")]
    #[schemars(range(min = 0.0))]
    pub eps: f64,
    /// Largest global gradient norm; 0 for no clipping.
    #[serde(default = "grad_clip")]
    #[schemars(range(min = 0.0))]
    pub grad_clip: f64,
    /// Whether each epoch visits rows in a new order.
    #[serde(default = "yes")]
    pub shuffle: bool,
    /// Steps between evaluations on the held-out split; without it, only at the end.
    #[serde(default)]
    #[schemars(extend("x-unit" = "steps"), range(min = 1))]
    pub eval_every: Option<u64>,
    #[serde(skip)]
    #[schemars(skip)]
    defaults: PhantomData<fn() -> D>,
}

impl<D: TrainDefaults> Default for TrainSettings<D> {
    fn default() -> Self {
        Self {
            steps: None,
            epochs: None,
            batch_size: D::BATCH_SIZE,
            micro_batch_size: None,
            lr: D::LR,
            schedule: D::SCHEDULE,
            warmup_steps: 0,
            decay_steps: 0,
            min_lr_ratio: 0.0,
            weight_decay: D::WEIGHT_DECAY,
            betas: D::BETAS,
            eps: eps(),
            grad_clip: grad_clip(),
            shuffle: true,
            eval_every: None,
            defaults: PhantomData,
        }
    }
}

impl<D: TrainDefaults> TrainSettings<D> {
    /// Fills in what depends on other settings.
    pub fn normalise(&mut self) {
        if self.steps.is_none() && self.epochs.is_none() {
            self.epochs = Some(D::EPOCHS);
        }
        self.micro_batch_size.get_or_insert((self.batch_size / 4).max(1));
    }

    /// Problems between settings; `prefix` is the table's name.
    pub fn check(&self, prefix: &str) -> Vec<Problem> {
        let mut problems = Vec::new();
        if self.steps.is_some() && self.epochs.is_some() {
            problems.push(
                Problem::new("conflicting_settings", format!("{prefix}.epochs"), "`steps` and `epochs` are both given")
                    .hint("remove one of them"),
            );
        }
        let micro = self.micro_batch_size.unwrap_or(1);
        if micro > self.batch_size {
            let message = format!("micro_batch_size {micro} is larger than batch_size {}", self.batch_size);
            problems.push(Problem::new("out_of_range", format!("{prefix}.micro_batch_size"), message));
        }
        if let Some(steps) = self.steps
            && self.warmup_steps > steps
        {
            let message = format!("warmup_steps {} is more than steps {steps}", self.warmup_steps);
            problems.push(Problem::new("out_of_range", format!("{prefix}.warmup_steps"), message));
        }
        if let Some(steps) = self.steps
            && self.schedule == Schedule::Wsd
            && self.warmup_steps <= steps
            && self.warmup_steps.saturating_add(self.decay_steps) > steps
        {
            let message = format!("warmup_steps {} and decay_steps {} are more than steps {steps}", self.warmup_steps, self.decay_steps);
            problems.push(Problem::new("out_of_range", format!("{prefix}.decay_steps"), message));
        }
        if self.schedule == Schedule::Wsd && self.decay_steps == 0 {
            let message = "schedule `wsd` needs `decay_steps`";
            problems.push(Problem::new("missing_setting", format!("{prefix}.schedule"), message).hint("a tenth of `steps` is usual"));
        }
        problems
    }

    /// Settings that only say when to end: `steps`, where the schedule's beginning does not depend on it.
    pub fn horizon(&self) -> Vec<&'static str> {
        let independent = matches!(self.schedule, Schedule::Constant | Schedule::Wsd);
        if independent && self.steps.is_some() { vec!["train.steps"] } else { Vec::new() }
    }

    /// Whether a snapshot of the same prefix can be continued: it must not lie past the end, nor in a decay that
    /// another number of steps would have begun elsewhere.
    pub fn can_continue(&self, snapshot: &Snapshot) -> bool {
        let Some(steps) = self.steps else { return true };
        let number = |name: &str| snapshot.info.get(name).and_then(serde_json::Value::as_u64);
        let (Some(total), Some(stable)) = (number("total_steps"), number("stable_until")) else { return false };
        let ours = self.plan(steps as usize * self.batch_size).learning_rate.stable_until();
        snapshot.step <= steps && (total == steps || snapshot.step <= stable.min(ours))
    }

    /// The plan for `rows` rows of data.
    pub fn plan(&self, rows: usize) -> TrainPlan {
        let by_epochs = |epochs: f64| ((rows as f64 * epochs) / self.batch_size as f64).ceil().max(1.0) as u64;
        let steps = self.steps.unwrap_or_else(|| by_epochs(self.epochs.unwrap_or(D::EPOCHS)));
        TrainPlan {
            steps,
            batch_size: self.batch_size,
            micro_batch_size: self.micro_batch_size.unwrap_or((self.batch_size / 4).max(1)),
            shuffle: self.shuffle,
            eval_every: self.eval_every,
            learning_rate: LearningRate {
                lr: self.lr,
                schedule: self.schedule,
                warmup_steps: self.warmup_steps,
                decay_steps: self.decay_steps,
                total_steps: steps,
                min_lr_ratio: self.min_lr_ratio,
            },
            optimizer: self.optimizer(),
        }
    }

    /// The optimizer's settings.
    pub fn optimizer(&self) -> OptimizerSettings {
        OptimizerSettings { betas: self.betas, eps: self.eps, weight_decay: self.weight_decay, grad_clip: self.grad_clip }
    }
}

impl TrainPlan {
    /// The largest pass of a step, of so many tokens.
    pub fn pass(&self, head: Head, tokens: usize, execution: &TrainExecution) -> Pass {
        Pass {
            head,
            tokens: tokens as u64,
            micro_batches: self.batch_size.div_ceil(self.micro_batch_size.max(1)) as u64,
            checkpointing: execution.gradient_checkpointing,
            precision: execution.precision,
        }
    }
}

/// Settings of a run over known data.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainPlan {
    /// Optimizer steps.
    pub steps: u64,
    /// Sequences per step.
    pub batch_size: usize,
    /// Sequences per forward and backward pass.
    pub micro_batch_size: usize,
    /// Whether each epoch has a new order.
    pub shuffle: bool,
    /// Steps between evaluations.
    pub eval_every: Option<u64>,
    /// Learning rate over steps.
    pub learning_rate: LearningRate,
    /// Optimizer.
    pub optimizer: OptimizerSettings,
}
