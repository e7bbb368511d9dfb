use rlflow_api::StageResult;
use rlflow_model::{Decoder, Draws, Gathering, Sampling, parameters::host};

use super::{Run, config::KlPlacement};
use crate::{
    losses::{explained_variance, gae, mean, whiten, whiten_keeping_mean},
    pairs::{Answered, AnsweredBatch},
    reward_model::ScoredBatch,
};

/// One sampled answer with all that the updates need; every vector has one value per token of the answer.
pub struct AnswerSample {
    /// Number in the rollout.
    pub number: u64,
    /// Row of the prompts.
    pub prompt: usize,
    /// Prompt and answer.
    pub answered: Answered,
    /// Whether it ended by itself.
    pub ended: bool,
    /// Score of the reward model, after the missing-EOS penalty.
    pub score: f64,
    /// What it became in the reward: normalised and clipped, if so set, after the same penalty.
    pub reward_score: f64,
    /// Log-probabilities by the sampler.
    pub sampler_logprobs: Vec<f32>,
    /// Log-probabilities by the training forward before any update.
    pub old_logprobs: Vec<f32>,
    /// Entropies of the policy, in nats.
    pub entropies: Vec<f32>,
    /// Log-probabilities by the reference.
    pub ref_logprobs: Vec<f32>,
    /// Values by the critic before any update.
    pub values: Vec<f32>,
    /// KL penalty, and the score on the last token.
    pub rewards: Vec<f64>,
    /// Whitened, if so set.
    pub advantages: Vec<f64>,
    /// Advantages before whitening plus values.
    pub returns: Vec<f64>,
    /// Sum of the KL penalty.
    pub non_score_reward: f64,
}

impl AnswerSample {
    /// Summed log-ratio of policy to reference.
    pub fn kl(&self) -> f64 {
        self.old_logprobs.iter().zip(&self.ref_logprobs).map(|(p, q)| f64::from(*p) - f64::from(*q)).sum()
    }
}

/// The answers of one rollout, in the order in which the first epoch visits them.
pub struct Experience {
    /// All answers.
    pub samples: Vec<AnswerSample>,
}

impl Experience {
    /// Samples, scores and estimates.
    pub fn collect(run: &mut Run<'_>, step: u64) -> StageResult<Self> {
        let (config, context) = (run.config, run.context);
        context.phase("rollout");
        let rows: Vec<usize> = run.order.batch(step, config.batch_size).into_iter().map(|row| run.usable[row]).collect();
        let prompts: Vec<&[u32]> = rows.iter().map(|row| run.prompts.row(*row).ids.as_slice()).collect();
        let sampling = Sampling {
            temperature: config.temperature,
            top_k: config.top_k,
            top_p: config.top_p,
            max_new_tokens: config.max_new_tokens,
            stop_ids: run.tokenizer.stop_ids(),
        };
        let draws = Draws { seed: context.seed, purpose: "ppo/rollout", step };
        let gathering = Gathering::of(config.gather_for_generation);
        let completions = run.actor.model.generate(&prompts, &sampling, draws, gathering, |_, _| !context.cancel.is_cancelled())?;
        context.check_cancelled()?;
        let mut samples: Vec<AnswerSample> = rows
            .iter()
            .zip(&prompts)
            .zip(completions)
            .zip(0..)
            .map(|(((row, prompt), completion), number)| AnswerSample {
                number,
                prompt: *row,
                answered: Answered { ids: [prompt, completion.ids.as_slice()].concat(), prompt_len: prompt.len() },
                ended: completion.ended,
                score: 0.0,
                reward_score: 0.0,
                sampler_logprobs: completion.logprobs,
                old_logprobs: vec![],
                entropies: vec![],
                ref_logprobs: vec![],
                values: vec![],
                rewards: vec![],
                advantages: vec![],
                returns: vec![],
                non_score_reward: 0.0,
            })
            .collect();

        context.phase("scoring");
        let micro = run.actor.train.micro_batch_size;
        let kl_coef = run.kl_coef;
        let groups: Vec<_> =
            mini_batches(samples.len(), config.num_mini_batches).into_iter().flat_map(|range| chunks(range, micro)).collect();
        let in_group = |group: &std::ops::Range<usize>| samples[group.clone()].iter().map(|sample| &sample.answered);
        let answered_batch = |group: &std::ops::Range<usize>| {
            let AnsweredBatch { batch, targets, answer_lens, target_lens } = AnsweredBatch::new(in_group(group), config.temperature);
            let batch = run.dropout.of_batch(batch, step, samples[group.clone()].iter().map(|sample| sample.number));
            AnsweredBatch { batch, targets, answer_lens, target_lens }
        };
        let answered: Vec<AnsweredBatch> = groups.iter().map(answered_batch).collect();
        let whole: Vec<ScoredBatch> =
            groups.iter().map(|group| ScoredBatch::new(in_group(group).map(|answered| answered.ids.as_slice()))).collect();
        let policy = run.actor.model.map(&answered, token_values)?;
        let references = run.reference.map(&answered, token_values)?;
        let critic = run.critic.as_ref().map_or(&run.actor.model, |critic| &critic.model);
        let values = critic.map(&answered, scores_at_targets)?;
        let scores = run.reward.map(&whole, |decoder, whole| whole.scores(decoder))?;
        let raw_scores = scores.concat();
        for (number, (group, batch)) in groups.into_iter().zip(&answered).enumerate() {
            let ((logprobs, entropies), (ref_logprobs, _), values) = (&policy[number], &references[number], &values[number]);
            let mut start = 0;
            for (sample, len) in samples[group].iter_mut().zip(&batch.answer_lens) {
                let range = start..start + len;
                start += len;
                sample.old_logprobs = logprobs[range.clone()].to_vec();
                sample.entropies = entropies[range.clone()].to_vec();
                sample.ref_logprobs = ref_logprobs[range.clone()].to_vec();
                sample.values = values[range].to_vec();
            }
        }
        run.score_moments.update(&raw_scores);
        for (sample, score) in samples.iter_mut().zip(raw_scores) {
            let penalty = if sample.ended { 0.0 } else { config.missing_eos_penalty };
            sample.score = score - penalty;
            sample.reward_score = run.score_moments.apply(score, config) - penalty;
        }
        // What the loss penalises is not in the reward as well.
        let reward_kl_coef = if config.kl_in == KlPlacement::Reward { kl_coef } else { 0.0 };
        for sample in &mut samples {
            let pairs = sample.old_logprobs.iter().zip(&sample.ref_logprobs);
            sample.rewards = pairs.map(|(p, q)| -reward_kl_coef * config.kl_estimator.estimate(f64::from(*p), f64::from(*q))).collect();
            sample.non_score_reward = sample.rewards.iter().sum();
            if let Some(last) = sample.rewards.last_mut() {
                *last += sample.reward_score;
            }
        }
        if config.whiten_rewards {
            over_all(&mut samples, |sample| &mut sample.rewards, whiten_keeping_mean);
        }
        for sample in &mut samples {
            let values: Vec<f64> = sample.values.iter().map(|value| f64::from(*value)).collect();
            sample.advantages = gae(&sample.rewards, &values, config.gamma, config.gae_lambda);
            sample.returns = sample.advantages.iter().zip(&values).map(|(advantage, value)| advantage + value).collect();
        }
        if config.whiten_advantages {
            over_all(&mut samples, |sample| &mut sample.advantages, whiten);
        }
        Ok(Self { samples })
    }

    /// Tokens of all answers.
    pub fn response_tokens(&self) -> usize {
        self.samples.iter().map(|sample| sample.old_logprobs.len()).sum()
    }

    /// Mean score.
    pub fn mean_score(&self) -> f64 {
        mean(&self.samples.iter().map(|sample| sample.score).collect::<Vec<_>>())
    }

    /// Mean over answers of the summed log-ratio to the reference.
    pub fn mean_kl(&self) -> f64 {
        mean(&self.samples.iter().map(AnswerSample::kl).collect::<Vec<_>>())
    }

    /// Metrics of the rollout.
    pub fn metrics(&self, kl_coef: f64) -> Vec<(&'static str, f64)> {
        let per_sample = |value: &dyn Fn(&AnswerSample) -> f64| mean(&self.samples.iter().map(value).collect::<Vec<_>>());
        let tokens = |values: fn(&AnswerSample) -> Vec<f64>| self.samples.iter().flat_map(values).collect::<Vec<f64>>();
        let gaps = tokens(|s| s.sampler_logprobs.iter().zip(&s.old_logprobs).map(|(a, b)| f64::from((a - b).abs())).collect());
        let values = tokens(|s| s.values.iter().map(|value| f64::from(*value)).collect());
        let returns = tokens(|s| s.returns.clone());
        vec![
            ("objective/scores", self.mean_score()),
            ("objective/kl", self.mean_kl()),
            ("objective/entropy", mean(&tokens(|s| s.entropies.iter().map(|entropy| f64::from(*entropy)).collect()))),
            ("objective/non_score_reward", per_sample(&|s| s.non_score_reward)),
            ("objective/rlhf_reward", per_sample(&|s| s.non_score_reward + s.reward_score)),
            ("objective/kl_coef", kl_coef),
            ("val/explained_variance", explained_variance(&values, &returns)),
            ("val/num_eos_tokens", self.samples.iter().filter(|sample| sample.ended).count() as f64),
            ("response_length/mean", per_sample(&|s| s.old_logprobs.len() as f64)),
            ("response_length/max", self.samples.iter().map(|s| s.old_logprobs.len()).max().unwrap_or(0) as f64),
            ("sampler/logprob_gap_mean", mean(&gaps)),
            ("sampler/logprob_gap_max", gaps.iter().copied().fold(0.0, f64::max)),
        ]
    }
}

/// Cuts `count` samples into minibatches whose sizes differ by one at most.
pub fn mini_batches(count: usize, parts: usize) -> Vec<std::ops::Range<usize>> {
    (0..parts).map(|part| part * count / parts..(part + 1) * count / parts).collect()
}

/// Cuts a range into pieces of `size`, the last perhaps shorter.
pub fn chunks(range: std::ops::Range<usize>, size: usize) -> Vec<std::ops::Range<usize>> {
    range.clone().step_by(size).map(|first| first..(first + size).min(range.end)).collect()
}

fn token_values(model: &Decoder, batch: &AnsweredBatch) -> (Vec<f32>, Vec<f32>) {
    let stats = model.evaluate(&batch.batch, |head| head.token_stats(batch.targets.clone()));
    (host(&stats.logprobs), host(&stats.entropies))
}

/// Values at the rows that predict answer tokens: before each token is seen.
fn scores_at_targets(model: &Decoder, batch: &AnsweredBatch) -> Vec<f32> {
    host(&model.evaluate(&batch.batch, |head| head.scores(batch.targets.rows.clone())))
}

/// Applies `change` to one field of all samples as if it were one sequence.
fn over_all(samples: &mut [AnswerSample], field: fn(&mut AnswerSample) -> &mut Vec<f64>, change: fn(&mut [f64])) {
    let mut all: Vec<f64> = samples.iter_mut().flat_map(|sample| field(sample).clone()).collect();
    change(&mut all);
    let mut rest = all.as_slice();
    for sample in samples {
        let values = field(sample);
        let (own, tail) = rest.split_at(values.len());
        values.copy_from_slice(own);
        rest = tail;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn minibatches_cover_everything_once() {
        assert_eq!(mini_batches(10, 4), [0..2, 2..5, 5..7, 7..10]);
        assert_eq!(chunks(2..7, 2), [2..4, 4..6, 6..7]);
    }
}
