use burn::tensor::{Device, Tensor, TensorData};
use rlflow_api::StageResult;
use rlflow_model::{Decoder, Group, TokenStats, parameters::host, ranks::Take};

use super::{
    DpoConfig,
    loss::{Answers, DpoLoss},
};
use crate::{
    lora,
    pairs::{Answered, AnsweredBatch, Pair},
    train::{RowOrder, Sums, Task, TrainPlan},
};

/// A pair with the reference's summed log-probabilities; 0 where the loss has no reference.
#[derive(Debug, Clone)]
pub(super) struct ReferencedPair {
    pub pair: Pair,
    pub chosen: f32,
    pub rejected: f32,
}

/// The pairs of one forward and backward pass.
pub(super) struct DpoBatch {
    answered: AnsweredBatch,
    /// Reference log-probabilities: chosen, then rejected.
    reference: Vec<f32>,
    /// Multiplies the sum of the chosen side's negative log-likelihoods: the loss is their mean over the step's tokens.
    nll_scale: f64,
    /// The step's divergence from the reference, for KTO.
    kl: f64,
    /// Prompts with the answers of others, from which that divergence is estimated.
    mismatched: Vec<Answered>,
}

impl DpoBatch {
    fn pairs(&self) -> usize {
        self.reference.len() / 2
    }
}

/// All chosen sequences, then all rejected ones; those on which `scores_prompt` also predict their prompt.
pub(super) fn answered_batch<'a>(pairs: impl Iterator<Item = &'a Pair> + Clone, scores_prompt: bool) -> AnsweredBatch {
    let chosen = pairs.clone().map(move |pair| (&pair.chosen, if scores_prompt { 1 } else { pair.chosen.prompt_len }));
    let rejected = pairs.map(|pair| (&pair.rejected, pair.rejected.prompt_len));
    AnsweredBatch::from_positions(chosen.chain(rejected), 1.0)
}

/// Sums of `values` over the last `lens` of each sequence's `target_lens` values: `[sequences]`. Policy and reference add
/// in the same order, so that equal models differ by exactly 0.
pub(super) fn sums_of(values: &Tensor<1>, target_lens: &[usize], lens: &[usize]) -> Tensor<1> {
    let mut end = 0;
    let sums = target_lens.iter().zip(lens).map(|(targets, len)| {
        end += targets;
        values.clone().narrow(0, end - len, *len).sum()
    });
    Tensor::cat(sums.collect(), 0)
}

/// Summed log-probabilities of the batch's answers under a model that is not trained, on the host.
pub(super) fn frozen_logps(model: &Decoder, batch: &AnsweredBatch) -> Vec<f32> {
    let logprobs = model.evaluate(&batch.batch, |head| head.token_stats(batch.targets.clone()).logprobs);
    host(&sums_of(&logprobs, &batch.target_lens, &batch.answer_lens))
}

/// Where a sum stands in [`Sums`].
#[derive(Clone, Copy)]
enum Sum {
    Loss,
    RewardChosen,
    RewardRejected,
    Accurate,
    LogpsChosen,
    LogpsRejected,
    LogitsChosen,
    LogitsRejected,
    Entropy,
    AnswerTokens,
    /// Of tokens of chosen answers: those that were the most probable ones.
    Correct,
    ChosenTokens,
    Tokens,
    Nll,
    NllTokens,
    LogOdds,
    LogSigmoidOdds,
    /// Times the pairs.
    Kl,
}

const SUMS: usize = Sum::Kl as usize + 1;

pub(super) struct DpoTask {
    pub pairs: Vec<ReferencedPair>,
    pub heldout: Vec<ReferencedPair>,
    pub order: RowOrder,
    pub plan: TrainPlan,
    pub config: DpoConfig,
    /// Longest sequence.
    pub context: usize,
    /// The reference, where it has something to say about answers that are not in the data (KTO).
    pub reference: Option<Group>,
    /// What is dropped of what an adapter sees.
    pub dropout: lora::Dropout,
}

impl DpoTask {
    fn nll_weight(&self) -> f64 {
        self.config.nll_weight.unwrap_or(0.0)
    }

    /// Micro-batches of the pairs of one step.
    fn split(&self, pairs: &[&ReferencedPair]) -> Vec<DpoBatch> {
        let scores_prompt = self.config.loss == DpoLoss::Orpo;
        let mut batches: Vec<DpoBatch> = pairs
            .chunks(self.plan.micro_batch_size)
            .map(|pairs| DpoBatch {
                answered: answered_batch(pairs.iter().map(|pair| &pair.pair), scores_prompt),
                reference: pairs.iter().map(|pair| pair.chosen).chain(pairs.iter().map(|pair| pair.rejected)).collect(),
                nll_scale: 0.0,
                kl: 0.0,
                mismatched: Vec::new(),
            })
            .collect();
        if self.reference.is_some() {
            let mut mismatched = self.mismatched(pairs).into_iter();
            batches.iter_mut().for_each(|batch| batch.mismatched = mismatched.by_ref().take(2 * batch.pairs()).collect());
        }
        let tokens: usize = batches.iter().flat_map(|batch| &batch.answered.target_lens[..batch.pairs()]).sum();
        for batch in &mut batches {
            batch.nll_scale = self.nll_weight() * pairs.len() as f64 / tokens.max(1) as f64;
        }
        batches
    }

    /// The step's prompts with the answers one place before their own among all chosen, then all rejected (TRL's choice).
    fn mismatched(&self, pairs: &[&ReferencedPair]) -> Vec<Answered> {
        let answers: Vec<&Answered> =
            pairs.iter().map(|pair| &pair.pair.chosen).chain(pairs.iter().map(|pair| &pair.pair.rejected)).collect();
        let mismatched = answers.iter().enumerate().map(|(at, answered)| {
            let other = answers[(at + answers.len() - 1) % answers.len()];
            let mut ids = [&answered.ids[..answered.prompt_len], &other.ids[other.prompt_len..]].concat();
            ids.truncate(self.context);
            Answered { ids, prompt_len: answered.prompt_len }
        });
        mismatched.collect()
    }

    /// Losses on the graph, `[1]`, and sums for metrics.
    fn losses(&self, batch: &DpoBatch, stats: TokenStats) -> (Tensor<1>, Sums) {
        let (pairs, device) = (batch.pairs(), stats.logprobs.device());
        let answered = &batch.answered;
        let logps = sums_of(&stats.logprobs, &answered.target_lens, &answered.answer_lens);
        let constant = |values: Vec<f32>| constant(values, &device);
        let ratios = logps.clone() - constant(batch.reference.clone());
        let lens = constant(answered.answer_lens.iter().map(|len| *len as f32).collect());
        let [chosen, rejected] = [0, pairs].map(|first| {
            let half = |values: &Tensor<1>| values.clone().narrow(0, first, pairs);
            Answers { logps: half(&logps), ratios: half(&ratios), lens: half(&lens) }
        });
        let losses = self.config.preference_losses(&chosen, &rejected, batch.kl);
        let mut sums = vec![0.0; SUMS];
        let mut set = |sum: Sum, value: f64| sums[sum as usize] = value;
        let total = |values: &[f32]| values.iter().map(|value| f64::from(*value)).sum::<f64>();
        let mut loss = total(&host(&losses));
        let mut graph = losses.sum();
        if self.nll_weight() > 0.0 {
            let lens = &answered.target_lens[..pairs];
            let nll = sums_of(&stats.logprobs, lens, lens).sum().neg();
            set(Sum::Nll, total(&host(&nll)));
            set(Sum::NllTokens, lens.iter().sum::<usize>() as f64);
            loss += batch.nll_scale * total(&host(&nll));
            graph = graph + nll * batch.nll_scale;
        }
        let rewards = [&chosen, &rejected].map(|answers| host(&self.config.rewards(answers)));
        let means_per_token = !self.config.loss.has_reference();
        let [chosen_logps, rejected_logps] = [&chosen, &rejected].map(|answers| {
            let (logps, lens) = (host(&answers.logps), host(&answers.lens));
            let each = logps.iter().zip(&lens).map(|(logp, len)| f64::from(*logp) / if means_per_token { f64::from(*len) } else { 1.0 });
            each.collect::<Vec<f64>>()
        });
        set(Sum::Loss, loss);
        set(Sum::RewardChosen, total(&rewards[0]));
        set(Sum::RewardRejected, total(&rewards[1]));
        set(Sum::Accurate, rewards[0].iter().zip(&rewards[1]).filter(|(chosen, rejected)| chosen > rejected).count() as f64);
        set(Sum::LogpsChosen, chosen_logps.iter().sum());
        set(Sum::LogpsRejected, rejected_logps.iter().sum());
        set(Sum::Entropy, answered.of_answers(&host(&stats.entropies)).map(f64::from).sum());
        let chosen_tokens = answered.answer_lens[..pairs].iter().sum::<usize>();
        set(Sum::AnswerTokens, answered.answer_lens.iter().sum::<usize>() as f64);
        set(Sum::ChosenTokens, chosen_tokens as f64);
        set(Sum::Correct, answered.of_answers(&host(&stats.correct)).take(chosen_tokens).map(f64::from).sum());
        let logits: Vec<f32> = answered.of_answers(&host(&stats.mean_logits)).collect();
        set(Sum::LogitsChosen, total(&logits[..chosen_tokens]));
        set(Sum::LogitsRejected, total(&logits[chosen_tokens..]));
        // The last of a sequence is no input.
        set(Sum::Tokens, (answered.batch.tokens() + 2 * pairs) as f64);
        if self.config.loss == DpoLoss::Orpo {
            let log_odds = |logp: f64| logp - (-logp.exp()).ln_1p();
            let odds: Vec<f64> = chosen_logps.iter().zip(&rejected_logps).map(|(c, r)| log_odds(*c) - log_odds(*r)).collect();
            set(Sum::LogOdds, odds.iter().sum());
            // log sigmoid(x), without overflow for large negative x.
            set(Sum::LogSigmoidOdds, odds.iter().map(|odds| odds.min(0.0) - (-odds.abs()).exp().ln_1p()).sum());
        }
        set(Sum::Kl, batch.kl * pairs as f64);
        (graph, sums)
    }
}

fn constant(values: Vec<f32>, device: &Device) -> Tensor<1> {
    let count = values.len();
    Tensor::from_data(TensorData::new(values, [count]), device)
}

impl Task for DpoTask {
    type MicroBatch = DpoBatch;

    fn micro_batches(&mut self, step: u64) -> StageResult<Vec<DpoBatch>> {
        let rows = self.order.batch(step, self.plan.batch_size);
        let mut batches = self.split(&rows.iter().map(|row| &self.pairs[*row]).collect::<Vec<_>>());
        let mut first = 0;
        for batch in &mut batches {
            let pairs = batch.pairs();
            batch.answered.batch = self.dropout.of_batch(batch.answered.batch.clone(), step, lora::pair_numbers(first, pairs));
            first += pairs;
        }
        Ok(batches)
    }

    fn prepare(&self, model: &Group, batches: &mut [DpoBatch]) -> StageResult<()> {
        let Some(reference) = &self.reference else { return Ok(()) };
        let mismatched: Vec<AnsweredBatch> = batches.iter().map(|batch| AnsweredBatch::new(&batch.mismatched, 1.0)).collect();
        let [policy, reference] = [model, reference].map(|model| model.map(&mismatched, frozen_logps));
        let (mut total, mut count) = (0.0, 0);
        for (policy, reference) in policy?.into_iter().zip(reference?) {
            total += policy.iter().zip(&reference).map(|(policy, reference)| f64::from(policy - reference)).sum::<f64>();
            count += policy.len();
        }
        let kl = (total / count.max(1) as f64).max(0.0);
        batches.iter_mut().for_each(|batch| batch.kl = kl);
        Ok(())
    }

    fn denominator(&self, micro_batches: &[DpoBatch]) -> f64 {
        micro_batches.iter().map(DpoBatch::pairs).sum::<usize>() as f64
    }

    fn tokens(&self, micro_batch: &DpoBatch) -> u64 {
        micro_batch.answered.batch.tokens() as u64
    }

    fn backward(&self, model: &Decoder, micro_batch: &DpoBatch, checkpointing: bool, take: Take<'_>) -> Sums {
        let loss = |head: &rlflow_model::HeadView<'_>| {
            let stats = head.token_stats(micro_batch.answered.targets.clone());
            self.losses(micro_batch, stats)
        };
        model.backward(&micro_batch.answered.batch, checkpointing, loss, take)
    }

    fn metrics(&self, sums: &Sums, pairs: f64) -> Vec<(&'static str, f64)> {
        let sum = |sum: Sum| sums[sum as usize];
        let mut metrics = vec![
            ("loss", sum(Sum::Loss) / pairs),
            ("rewards/chosen", sum(Sum::RewardChosen) / pairs),
            ("rewards/rejected", sum(Sum::RewardRejected) / pairs),
            ("rewards/accuracies", sum(Sum::Accurate) / pairs),
            ("rewards/margins", (sum(Sum::RewardChosen) - sum(Sum::RewardRejected)) / pairs),
            ("logps/chosen", sum(Sum::LogpsChosen) / pairs),
            ("logps/rejected", sum(Sum::LogpsRejected) / pairs),
            ("logits/chosen", sum(Sum::LogitsChosen) / sum(Sum::ChosenTokens).max(1.0)),
            ("logits/rejected", sum(Sum::LogitsRejected) / (sum(Sum::AnswerTokens) - sum(Sum::ChosenTokens)).max(1.0)),
            ("entropy", sum(Sum::Entropy) / sum(Sum::AnswerTokens).max(1.0)),
            ("mean_token_accuracy", sum(Sum::Correct) / sum(Sum::ChosenTokens).max(1.0)),
            ("num_tokens", sum(Sum::Tokens)),
        ];
        if self.nll_weight() > 0.0 {
            metrics.push(("nll_loss", sum(Sum::Nll) / sum(Sum::NllTokens).max(1.0)));
        }
        match self.config.loss {
            DpoLoss::Orpo => {
                metrics.extend([("log_odds_chosen", sum(Sum::LogOdds) / pairs), ("log_odds_ratio", sum(Sum::LogSigmoidOdds) / pairs)])
            }
            DpoLoss::Kto => metrics.push(("kl", sum(Sum::Kl) / pairs)),
            _ => {}
        }
        metrics
    }

    fn evaluate(&self, model: &Group) -> StageResult<Vec<(&'static str, f64)>> {
        if self.heldout.is_empty() {
            return Ok(Vec::new());
        }
        let mut total = vec![0.0; SUMS];
        for pairs in self.heldout.chunks(self.plan.batch_size) {
            let mut batches = self.split(&pairs.iter().collect::<Vec<_>>());
            self.prepare(model, &mut batches)?;
            let each = model.map(&batches, |decoder, batch| {
                decoder.evaluate(&batch.answered.batch, |head| self.losses(batch, head.token_stats(batch.answered.targets.clone())).1)
            })?;
            each.into_iter().for_each(|sums| total.iter_mut().zip(sums).for_each(|(total, sum)| *total += sum));
        }
        let metrics = self.metrics(&total, self.heldout.len() as f64);
        let renamed =
            [("loss", "eval/loss"), ("rewards/accuracies", "eval/rewards/accuracies"), ("rewards/margins", "eval/rewards/margins")];
        let value = |name: &str| metrics.iter().find(|(known, _)| *known == name).map(|(_, value)| *value);
        Ok(renamed.into_iter().filter_map(|(name, eval)| Some((eval, value(name)?))).collect())
    }
}
