use burn::tensor::{Device, Tensor, TensorData};
use rlflow_api::{CounterRng, Portable, StageError, StageResult};
use rlflow_model::{HeadView, PackedBatch, parameters::host};

use super::{
    Run, Trained,
    config::{KlPlacement, PpoConfig},
    experience::{AnswerSample, Experience, chunks, mini_batches},
};
use crate::{
    losses::{LossAggregation, PolicyClip, clipped_policy_loss, clipped_value_loss, mean, variance},
    pairs::AnsweredBatch,
};

/// What the updates of one step did.
#[derive(Debug, Default)]
pub struct Updated {
    approx_kl: Vec<f64>,
    clip_frac: Vec<f64>,
    entropy: Vec<f64>,
    policy_loss: Vec<f64>,
    value_loss: Vec<f64>,
    value_clip_frac: Vec<f64>,
    ratio: Vec<f64>,
    kl_loss: Vec<f64>,
    ptx_loss: Vec<f64>,
    policy_norm: Vec<f64>,
    value_norm: Vec<f64>,
    first_ratio_error: f64,
    lr: f64,
}

impl Updated {
    /// Means over minibatches.
    pub fn metrics(&self) -> Vec<(&'static str, f64)> {
        let own = [("policy/kl_loss", &self.kl_loss), ("loss/ptx_avg", &self.ptx_loss)];
        let own = own.into_iter().filter(|(_, values)| !values.is_empty()).map(|(name, values)| (name, mean(values)));
        let mut metrics = vec![
            ("policy/approxkl_avg", mean(&self.approx_kl)),
            ("policy/clipfrac_avg", mean(&self.clip_frac)),
            ("policy/entropy_avg", mean(&self.entropy)),
            ("policy/first_ratio_error", self.first_ratio_error),
            ("policy/grad_norm", mean(&self.policy_norm)),
            ("loss/policy_avg", mean(&self.policy_loss)),
            ("loss/value_avg", mean(&self.value_loss)),
            ("val/clipfrac_avg", mean(&self.value_clip_frac)),
            ("val/ratio", mean(&self.ratio)),
            ("val/ratio_var", variance(&self.ratio)),
            ("val/grad_norm", mean(&self.value_norm)),
            ("lr", self.lr),
        ];
        metrics.extend(own);
        metrics
    }
}

/// Sums over a minibatch's tokens.
#[derive(Default)]
struct PolicySums {
    loss: f64,
    entropy: f64,
    squared_logratio: f64,
    clipped: f64,
    ratio: f64,
    ratio_error: f64,
    kl: f64,
}

impl Portable for PolicySums {
    fn put(&self, out: &mut Vec<u8>) {
        let Self { loss, entropy, squared_logratio, clipped, ratio, ratio_error, kl } = *self;
        f64::put_all(&[loss, entropy, squared_logratio, clipped, ratio, ratio_error, kl], out);
    }

    fn take(from: &mut &[u8]) -> Option<Self> {
        let [loss, entropy, squared_logratio, clipped, ratio, ratio_error, kl] = f64::take_all(7, from)?.try_into().ok()?;
        Some(Self { loss, entropy, squared_logratio, clipped, ratio, ratio_error, kl })
    }
}

impl PolicySums {
    fn add(&mut self, more: &Self) {
        self.loss += more.loss;
        self.entropy += more.entropy;
        self.squared_logratio += more.squared_logratio;
        self.clipped += more.clipped;
        self.ratio += more.ratio;
        self.ratio_error = self.ratio_error.max(more.ratio_error);
        self.kl += more.kl;
    }
}

#[derive(Default)]
struct ValueSums {
    loss: f64,
    clipped: f64,
}

impl Portable for ValueSums {
    fn put(&self, out: &mut Vec<u8>) {
        (self.loss, self.clipped).put(out);
    }

    fn take(from: &mut &[u8]) -> Option<Self> {
        let (loss, clipped) = Portable::take(from)?;
        Some(Self { loss, clipped })
    }
}

impl ValueSums {
    fn add(&mut self, more: &Self) {
        self.loss += more.loss;
        self.clipped += more.clipped;
    }
}

/// Answers of one pass as constant vectors over their tokens.
struct MicroBatch {
    answered: AnsweredBatch,
    old_logprobs: Vec<f32>,
    ref_logprobs: Vec<f32>,
    advantages: Vec<f32>,
    /// What each token's policy loss weighs; empty if all weigh 1.
    weights: Vec<f32>,
    old_values: Vec<f32>,
    returns: Vec<f32>,
}

impl MicroBatch {
    /// Of a minibatch with `answers` answers and `tokens` tokens in all.
    fn new(
        samples: &[&AnswerSample],
        config: &PpoConfig,
        answers: usize,
        tokens: usize,
        dropout: impl Fn(PackedBatch) -> PackedBatch,
    ) -> Self {
        let narrow = |values: &[f64]| values.iter().map(|value| *value as f32).collect::<Vec<f32>>();
        let weights = |sample: &&AnswerSample| {
            let len = sample.old_logprobs.len();
            vec![config.loss_aggregation.weight(len, answers, tokens) as f32; len]
        };
        let answered = AnsweredBatch::new(samples.iter().map(|sample| &sample.answered), config.temperature);
        Self {
            answered: AnsweredBatch { batch: dropout(answered.batch), ..answered },
            old_logprobs: samples.iter().flat_map(|sample| sample.old_logprobs.clone()).collect(),
            ref_logprobs: samples.iter().flat_map(|sample| sample.ref_logprobs.clone()).collect(),
            weights: if config.loss_aggregation == LossAggregation::TokenMean {
                Vec::new()
            } else {
                samples.iter().flat_map(weights).collect()
            },
            advantages: samples.iter().flat_map(|sample| narrow(&sample.advantages)).collect(),
            old_values: samples.iter().flat_map(|sample| sample.values.clone()).collect(),
            returns: samples.iter().flat_map(|sample| narrow(&sample.returns)).collect(),
        }
    }

    /// Sum of the policy loss (less the entropy bonus, plus a KL term that stands in the loss) on the graph.
    fn policy_loss(&self, head: &HeadView<'_>, config: &PpoConfig, kl_coef: f64, sums: &mut PolicySums) -> Tensor<1> {
        let stats = head.token_stats(self.answered.targets.clone());
        let device = stats.logprobs.device();
        let weighted = |values: Tensor<1>| match self.weights.as_slice() {
            [] => values,
            weights => values * constant(weights, &device),
        };
        let policy_loss = |clip: PolicyClip| {
            let (old, advantages) = (constant(&self.old_logprobs, &device), constant(&self.advantages, &device));
            clipped_policy_loss(stats.logprobs.clone(), old, advantages, clip)
        };
        let losses = policy_loss(config.clip());
        for (new, old) in host(&stats.logprobs).iter().zip(&self.old_logprobs) {
            let logratio = f64::from(new - old);
            let ratio = logratio.exp();
            sums.squared_logratio += logratio * logratio;
            sums.ratio += ratio;
            sums.ratio_error = sums.ratio_error.max((ratio - 1.0).abs());
        }
        let unclipped = policy_loss(f64::from(f32::MAX).into());
        sums.clipped += host(&losses).iter().zip(host(&unclipped)).filter(|(loss, unclipped)| **loss != *unclipped).count() as f64;
        let losses = weighted(losses);
        sums.loss += crate::language::sum(&losses);
        sums.entropy += crate::language::sum(&stats.entropies);
        let mut loss = losses.sum();
        if config.entropy_coef != 0.0 {
            loss = loss - weighted(stats.entropies).sum() * config.entropy_coef;
        }
        if config.kl_in == KlPlacement::Loss {
            let kl = config.kl_estimator.estimates(stats.logprobs.clone(), constant(&self.ref_logprobs, &device));
            sums.kl += crate::language::sum(&kl);
            loss = loss + weighted(kl).sum() * kl_coef;
        }
        loss
    }

    /// Sum of the value loss times its coefficient on the graph.
    fn value_loss(&self, head: &HeadView<'_>, config: &PpoConfig, sums: &mut ValueSums) -> Tensor<1> {
        let values = head.scores(self.answered.targets.rows.clone());
        let device = values.device();
        let (old, returns) = (constant(&self.old_values, &device), constant(&self.returns, &device));
        let losses = clipped_value_loss(values.clone(), old, returns, config.value_clip_range);
        for ((value, target), loss) in host(&values).iter().zip(&self.returns).zip(host(&losses)) {
            let unclipped = 0.5 * (value - target) * (value - target);
            sums.clipped += f64::from(u8::from(loss > unclipped));
        }
        sums.loss += crate::language::sum(&losses);
        losses.sum() * config.vf_coef
    }
}

/// A constant on the graph's device.
fn constant(values: &[f32], device: &Device) -> Tensor<1> {
    Tensor::from_data(TensorData::new(values.to_vec(), [values.len()]), device)
}

impl Run<'_> {
    /// All epochs of minibatches on one rollout.
    pub(super) fn update(&mut self, experience: &Experience, step: u64) -> StageResult<Updated> {
        let (config, context) = (self.config, self.context);
        context.phase("updates");
        let count = experience.samples.len();
        let mut updated = Updated { lr: self.actor.train.learning_rate(config.steps).at(step), ..Updated::default() };
        for epoch in 0..config.num_ppo_epochs {
            // The first epoch keeps the order in which old log-probabilities were computed.
            let order: Vec<usize> = match epoch {
                0 => (0..count).collect(),
                _ => {
                    let mut rng = CounterRng::new(context.seed, "ppo/minibatches", step, epoch as u64);
                    rng.permutation(count).into_iter().map(|row| row as usize).collect()
                }
            };
            for (number, mini_batch) in mini_batches(count, config.num_mini_batches).into_iter().enumerate() {
                context.check_cancelled()?;
                let updates = (step * config.num_ppo_epochs as u64 + epoch as u64) * config.num_mini_batches as u64 + number as u64;
                let first = epoch == 0 && mini_batch.start == 0;
                let samples: Vec<&AnswerSample> = order[mini_batch].iter().map(|row| &experience.samples[*row]).collect();
                let tokens = samples.iter().map(|sample| sample.old_logprobs.len()).sum::<usize>() as f64;
                let (policy, value, ptx) = self.update_mini_batch(&samples, tokens, step, updates)?;
                updated.ptx_loss.extend(ptx);
                if config.kl_in == KlPlacement::Loss {
                    updated.kl_loss.push(policy.kl / tokens);
                }
                if first {
                    updated.first_ratio_error = policy.ratio_error;
                }
                updated.approx_kl.push(0.5 * policy.squared_logratio / tokens);
                updated.clip_frac.push(policy.clipped / tokens);
                updated.entropy.push(policy.entropy / tokens);
                updated.policy_loss.push(policy.loss / tokens);
                updated.ratio.push(policy.ratio / tokens);
                updated.value_loss.push(value.loss / tokens);
                updated.value_clip_frac.push(value.clipped / tokens);
                let (policy_norm, value_norm) = self.last_norms;
                updated.policy_norm.push(policy_norm);
                updated.value_norm.push(value_norm);
            }
        }
        Ok(updated)
    }

    /// One update of the actor and the critic; `update` counts them over the whole run. Also returns the cross-entropy on
    /// the PTX sequences, if there are any.
    fn update_mini_batch(
        &mut self,
        samples: &[&AnswerSample],
        tokens: f64,
        step: u64,
        update: u64,
    ) -> StageResult<(PolicySums, ValueSums, Option<f64>)> {
        let (config, kl_coef, dropout) = (self.config, self.kl_coef, self.dropout);
        let micro = |trained: &Trained| -> Vec<MicroBatch> {
            let pieces = chunks(0..samples.len(), trained.train.micro_batch_size);
            let micro_batch = |piece: std::ops::Range<usize>| {
                let samples_of_piece = &samples[piece];
                let numbers = samples_of_piece.iter().map(|sample| sample.number);
                let dropped = |batch: PackedBatch| dropout.of_batch(batch, step, numbers.clone());
                MicroBatch::new(samples_of_piece, config, samples.len(), tokens as usize, dropped)
            };
            pieces.into_iter().map(micro_batch).collect()
        };
        let shared = self.critic.is_none();
        let checkpointing = config.gradient_checkpointing;
        let each = self.actor.model.backward(&micro(&self.actor), |decoder, batch, take| {
            let loss = |head: &HeadView<'_>| {
                let (mut policy, mut value) = (PolicySums::default(), ValueSums::default());
                let loss = batch.policy_loss(head, config, kl_coef, &mut policy);
                let loss = if shared { loss + batch.value_loss(head, config, &mut value) } else { loss };
                (loss, (policy, value))
            };
            decoder.backward(&batch.answered.batch, checkpointing, loss, take)
        })?;
        let (mut policy, mut value) = (PolicySums::default(), ValueSums::default());
        for (more_policy, more_value) in &each {
            policy.add(more_policy);
            value.add(more_value);
        }
        let ptx = match &mut self.ptx {
            Some(ptx) => Some(ptx.add_gradients(update, &mut self.actor.model, tokens, checkpointing)?),
            None => None,
        };
        let norm = apply(&mut self.actor, tokens, config.steps, step)?;
        self.last_norms = (norm, norm);
        self.check_norm("actor", norm, step)?;
        if let Some(critic) = &mut self.critic {
            let batches = micro(critic);
            let each = critic.model.backward(&batches, |decoder, batch, take| {
                let loss = |head: &HeadView<'_>| {
                    let mut value = ValueSums::default();
                    (batch.value_loss(head, config, &mut value), value)
                };
                decoder.backward(&batch.answered.batch, checkpointing, loss, take)
            })?;
            each.iter().for_each(|more| value.add(more));
            let norm = apply(critic, tokens, config.steps, step)?;
            self.last_norms.1 = norm;
            self.check_norm("critic", norm, step)?;
        }
        Ok((policy, value, ptx))
    }

    fn check_norm(&self, role: &str, norm: f64, step: u64) -> StageResult<()> {
        if norm.is_finite() {
            return Ok(());
        }
        let last_snapshot = self.context.snapshots.last_step();
        Err(StageError::NonFinite { step: step + 1, tensor: format!("the gradient norm of the {role}"), value: norm as f32, last_snapshot })
    }
}

fn apply(trained: &mut Trained, tokens: f64, steps: u64, step: u64) -> StageResult<f64> {
    let lr = trained.train.learning_rate(steps).at(step);
    trained.model.update(tokens, lr)
}
