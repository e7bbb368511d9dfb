//! Learning-rate schedules, with the definitions of `transformers.optimization`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Shape of the learning rate over steps, after the warmup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Stays at `lr`.
    Constant,
    /// Falls on a straight line to `min_lr_ratio` at the last step.
    Linear,
    /// Half a cosine down to `min_lr_ratio` at the last step.
    #[default]
    Cosine,
    /// Warmup, stable, decay: stays at `lr`, then falls on a straight line over the last `decay_steps`.
    Wsd,
}

/// A schedule with its numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LearningRate {
    /// Peak.
    pub lr: f64,
    /// Shape.
    pub schedule: Schedule,
    /// Steps of linear warmup from 0.
    pub warmup_steps: u64,
    /// Steps of decay of [`Schedule::Wsd`].
    pub decay_steps: u64,
    /// Steps in all.
    pub total_steps: u64,
    /// Fraction of `lr` at the end.
    pub min_lr_ratio: f64,
}

impl LearningRate {
    /// Learning rate of the step that follows `done` steps.
    pub fn at(&self, done: u64) -> f64 {
        self.lr * self.factor(done)
    }

    /// Steps from the start during which the rate does not depend on `total_steps`.
    pub fn stable_until(&self) -> u64 {
        match self.schedule {
            Schedule::Constant => u64::MAX,
            Schedule::Wsd => self.total_steps.saturating_sub(self.decay_steps).max(self.warmup_steps),
            Schedule::Linear | Schedule::Cosine => self.warmup_steps,
        }
    }

    fn factor(&self, done: u64) -> f64 {
        if done < self.warmup_steps {
            return done as f64 / self.warmup_steps as f64;
        }
        let fall = |from: u64, shape: fn(f64) -> f64| {
            let progress = (done - from) as f64 / (self.total_steps.saturating_sub(from)).max(1) as f64;
            self.min_lr_ratio + (1.0 - self.min_lr_ratio) * shape(progress.min(1.0))
        };
        match self.schedule {
            Schedule::Constant => 1.0,
            Schedule::Linear => fall(self.warmup_steps, |progress| 1.0 - progress),
            Schedule::Cosine => fall(self.warmup_steps, |progress| 0.5 * (1.0 + (std::f64::consts::PI * progress).cos())),
            Schedule::Wsd if done < self.stable_until() => 1.0,
            Schedule::Wsd => fall(self.stable_until(), |progress| 1.0 - progress),
        }
    }
}
