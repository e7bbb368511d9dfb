//! Sampling over a key-value cache.
//!
//! Prompts are prefilled in one packed pass, each once however many answers it gets; then every sequence advances by one token
//! per step, and those that have ended leave the batch. Draws are by counter (seed, purpose, step, sample, position), so that a sample does not depend on
//! the order in which others end.

use std::{borrow::Cow, collections::HashMap};

use burn_flex::FlexTensor;
use rlflow_api::CounterRng;
use rlflow_kernels::{
    AttentionShape, SequenceLayout, Team, Weight, attention_block,
    decode::{self, DecodeAttention, DecodeMlp, LayerCache, norm_rows},
    embedding,
    few_rows::{self, Output},
    matmul::{Arithmetic, Into},
    mlp_block,
    simd::softmax_weights,
};

use crate::{
    Decoder,
    ledger::{self, Purpose, hold},
    parameters::{BlockSlots, Slots, flex_narrow_view, flex_view, host},
};

/// How tokens are drawn.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the likeliest token.
    pub temperature: f64,
    /// Only this many of the likeliest tokens; 0 for all.
    pub top_k: usize,
    /// Only the likeliest tokens that together have this probability; 1 for all.
    pub top_p: f64,
    /// Longest answer, in tokens.
    pub max_new_tokens: usize,
    /// Tokens that end an answer (and belong to it).
    pub stop_ids: Vec<u32>,
}

/// Coordinates of the draws.
#[derive(Debug, Clone, Copy)]
pub struct Draws<'a> {
    /// Seed of the stage.
    pub seed: u64,
    /// What is drawn.
    pub purpose: &'a str,
    /// Step of the stage.
    pub step: u64,
}

/// One sampled answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Completion {
    /// Token ids, the stop token included if there is one.
    pub ids: Vec<u32>,
    /// Log-probability of each under the model at the sampling temperature, before top-k and top-p.
    pub logprobs: Vec<f32>,
    /// Whether it ended with a stop token rather than for want of room.
    pub ended: bool,
}

/// Weights as slices, wherever the model lives, by slot.
struct Weights {
    held: Vec<Option<Held>>,
    _gathered: Option<ledger::Held>,
}

enum Held {
    F32(FlexTensor),
    Bf16(FlexTensor),
    /// A copy of what is on another device.
    Host(Vec<f32>),
}

impl Weights {
    /// All of them; where ranks hold shares, those outside of the blocks.
    fn of(decoder: &Decoder) -> Self {
        if decoder.parameters().is_shared() {
            return Self::gathered(decoder, decoder.outer_slots());
        }
        Self::gathered(decoder, 0..decoder.parameters().specs().len())
    }

    /// Those of a block, where ranks hold shares: while it works, the next block's are on their way.
    fn of_block(decoder: &Decoder, block: &BlockSlots) -> Option<Self> {
        decoder.parameters().is_shared().then(|| {
            let weights = Self::gathered(decoder, block.all());
            decoder.prefetch_after(block);
            weights
        })
    }

    fn gathered(decoder: &Decoder, slots: impl Iterator<Item = usize> + Clone) -> Self {
        let parameters = decoder.parameters();
        let gathered = parameters.hold_gathered(slots.clone());
        let mut held: Vec<Option<Held>> = (0..parameters.specs().len()).map(|_| None).collect();
        for slot in slots {
            let tensor = parameters.get(slot);
            held[slot] = Some(match (flex_view(&tensor), flex_narrow_view(&tensor)) {
                (Some(view), _) => Held::F32(view),
                (None, Some(view)) => Held::Bf16(view),
                (None, None) => Held::Host(host(&tensor)),
            });
        }
        Self { held, _gathered: gathered }
    }

    fn get(&self, slot: usize) -> Weight<'_> {
        match self.held[slot].as_ref().expect("weights are gathered before they are read") {
            Held::F32(view) => Weight::F32(view.as_slice().expect("views are contiguous f32")),
            Held::Bf16(view) => Weight::Bf16(view.as_slice().expect("narrow views are contiguous bfloat16")),
            Held::Host(elements) => Weight::F32(elements),
        }
    }

    fn attention(&self, slots: &BlockSlots) -> DecodeAttention<'_> {
        slots.attention.map(|slot| self.get(*slot))
    }

    fn mlp(&self, slots: &BlockSlots) -> DecodeMlp<'_> {
        slots.mlp.map(|slot| self.get(*slot))
    }

    /// Rows of the embedding, and those of learned positions added.
    fn embed(&self, slots: &Slots, ids: &[u32], positions: &[u32], hidden: usize) -> Vec<f32> {
        let mut x = embedding::embed(self.get(slots.embed), ids, hidden);
        if let Some(table) = slots.positions {
            let rows = embedding::embed(self.get(table), positions, hidden);
            x.iter_mut().zip(rows).for_each(|(x, value)| *x += value);
        }
        x
    }
}

/// A sequence being extended.
struct Active {
    index: usize,
    position: usize,
    last: u32,
    caches: Vec<LayerCache>,
}

/// Samples one answer per prompt. `each` sees every token as it comes (prompt index, token) and may stop everything by
/// returning false.
///
/// Prompts must not be empty and must leave room for at least one token within the model's context; an answer ends
/// at the context's end.
///
/// Where ranks hold shares of the weights, each block's are gathered just before it runs and dropped after it: the others must
/// attend ([`Decoder::attend_generate`]).
pub fn generate(
    decoder: &Decoder,
    prompts: &[&[u32]],
    sampling: &Sampling,
    draws: Draws<'_>,
    mut each: impl FnMut(usize, u32) -> bool,
) -> Vec<Completion> {
    let config = decoder.config();
    let weights = Weights::of(decoder);
    let lm_head = weights.get(decoder.slots().lm_head.expect("the model has a language head"));
    let (hidden, vocab, context) = (config.hidden_size, config.vocab_size, config.context);
    let positional = decoder.positional();
    // One token at a time is bound by reading weights, not by arithmetic.
    let shape = AttentionShape { arithmetic: Arithmetic::F32, ..decoder.attention_shape() };
    let mut completions: Vec<Completion> = prompts.iter().map(|_| Completion { ids: vec![], logprobs: vec![], ended: false }).collect();

    // Prefill.
    let mut numbers = HashMap::new();
    let mut distinct: Vec<&[u32]> = Vec::new();
    let mut numbered = Vec::with_capacity(prompts.len());
    for prompt in prompts {
        numbered.push(*numbers.entry(*prompt).or_insert(distinct.len()));
        if numbered.last() == Some(&distinct.len()) {
            distinct.push(prompt);
        }
    }
    let layout = SequenceLayout::from_lengths(distinct.iter().map(|prompt| prompt.len()));
    let ids: Vec<u32> = distinct.concat();
    // The prefill's rows of one block, and the keys and values of all answers.
    let kv_width = shape.heads.kv_width();
    let capacities: usize = prompts.iter().map(|prompt| (prompt.len() + sampling.max_new_tokens).min(context)).sum();
    let block = 3 * hidden + 2 * shape.heads.query_width() + 2 * kv_width + 3 * config.intermediate_size;
    let prefill = hold(Purpose::Buffers, ids.len() * block);
    let _caches = hold(Purpose::Buffers, 2 * config.layers * kv_width * capacities + prompts.len() * (vocab + hidden));
    let mut x = weights.embed(decoder.slots(), &ids, layout.positions(), hidden);
    let mut active: Vec<Active> = prompts
        .iter()
        .enumerate()
        .map(|(index, prompt)| Active { index, position: prompt.len(), last: 0, caches: Vec::with_capacity(config.layers) })
        .collect();
    for slots in &decoder.slots().blocks {
        let gathered = Weights::of_block(decoder, slots);
        let weights = gathered.as_ref().unwrap_or(&weights);
        let attention = weights.attention(slots).map(|weight| weight.wide());
        let mlp = weights.mlp(slots).map(|weight| weight.wide());
        let mut widened = 0;
        let mut count = |weight: &Cow<'_, [f32]>| widened += if matches!(weight, Cow::Owned(_)) { weight.len() } else { 0 };
        attention.map(&mut count);
        mlp.map(&mut count);
        let _widened = hold(Purpose::Buffers, widened);
        let (y, saved) = attention_block::forward(&x, attention.map(|weight| Weight::F32(weight)), positional, shape, &layout, None);
        let (keys, values) = saved.keys_and_values();
        let caches: Vec<LayerCache> =
            (0..distinct.len()).map(|prompt| LayerCache::from_prefill(keys, values, layout.range(prompt), shape.heads)).collect();
        active.iter_mut().for_each(|active| active.caches.push(caches[numbered[active.index]].clone()));
        x = mlp_block::forward(&y, mlp.map(|weight| Weight::F32(weight)), shape.eps, Arithmetic::F32, None).0;
    }
    let last_row = |prompt: &usize| &x[(layout.range(*prompt).end - 1) * hidden..][..hidden];
    let mut last_rows: Vec<f32> = numbered.iter().flat_map(last_row).copied().collect();
    drop((x, prefill));
    let mut logits = Vec::new();
    let last_norm = decoder.slots().norm.map(|slot| weights.get(*slot));
    Team::with(|team| {
        loop {
            // Next tokens of all active sequences.
            let rows = active.len();
            let normed = norm_rows(team, &last_rows, last_norm, shape.eps);
            logits.resize(rows * vocab, 0.0);
            few_rows::project(team, &normed, rows, [Output { out: &mut logits, into: Into::Overwrite, weight: lm_head }]);
            let mut draws: Vec<_> = logits
                .chunks_exact_mut(vocab)
                .zip(&active)
                .map(|(logits, active)| {
                    let coordinates = (active.index as u64) << 32 | active.position as u64;
                    (logits, CounterRng::new(draws.seed, draws.purpose, draws.step, coordinates), (0, 0.0))
                })
                .collect();
            team.each_item(&mut draws, |(logits, rng, drawn)| *drawn = draw(logits, sampling, rng.uniform()));
            let mut go_on = true;
            for (active, (_, _, (token, logprob))) in active.iter_mut().zip(&draws) {
                let completion = &mut completions[active.index];
                completion.ids.push(*token);
                completion.logprobs.push(*logprob);
                completion.ended = sampling.stop_ids.contains(token);
                active.last = *token;
                go_on &= each(active.index, *token);
            }
            active.retain(|active| {
                let completion = &completions[active.index];
                !completion.ended && completion.ids.len() < sampling.max_new_tokens && active.position < context
            });
            if !decoder.parameters().goes_on(Some(go_on && !active.is_empty())) {
                return;
            }
            // One step of the network for the rest.
            let ids: Vec<u32> = active.iter().map(|active| active.last).collect();
            let positions: Vec<u32> = active.iter().map(|active| active.position as u32).collect();
            last_rows = weights.embed(decoder.slots(), &ids, &positions, hidden);
            for (layer, slots) in decoder.slots().blocks.iter().enumerate() {
                let gathered = Weights::of_block(decoder, slots);
                let weights = gathered.as_ref().unwrap_or(&weights);
                let mut caches: Vec<&mut LayerCache> = active.iter_mut().map(|active| &mut active.caches[layer]).collect();
                decode::attention_step(team, &mut last_rows, &mut caches, &positions, weights.attention(slots), positional, shape);
                decode::mlp_step(team, &mut last_rows, weights.mlp(slots), ids.len(), shape.eps);
            }
            active.iter_mut().for_each(|active| active.position += 1);
        }
    });
    completions
}

/// Draws a token from logits with the uniform number `u`; returns it with its log-probability at the temperature. Logits become
/// the weights of the tokens.
fn draw(logits: &mut [f32], sampling: &Sampling, u: f64) -> (u32, f32) {
    let temperature = if sampling.temperature > 0.0 { sampling.temperature } else { 1.0 };
    let chosen = (sampling.temperature <= 0.0).then(|| likeliest(logits));
    let sums = softmax_weights(logits, (1.0 / temperature) as f32);
    let total: f64 = sums.iter().sum();
    let logprob = |weights: &[f32], token: u32| (f64::from(weights[token as usize]).ln() - total.ln()) as f32;
    if let Some(token) = chosen {
        return (token, logprob(logits, token));
    }
    let vocab = logits.len();
    let limited = sampling.top_k > 0 && sampling.top_k < vocab || sampling.top_p < 1.0;
    let token = if limited { among_likeliest(logits, sampling, total, u) } else { among_all(logits, &sums, u * total) };
    (token, logprob(logits, token))
}

/// The first of the largest.
fn likeliest(values: &[f32]) -> u32 {
    values.iter().enumerate().fold(0, |best, (i, value)| if *value > values[best] { i } else { best }) as u32
}

/// The token at which the running sum of weights passes `rest`; `sums` are those of the blocks.
fn among_all(weights: &[f32], sums: &[f64], mut rest: f64) -> u32 {
    let block_len = weights.len().div_ceil(sums.len());
    for (block, sum) in sums.iter().enumerate() {
        if rest >= *sum {
            rest -= sum;
            continue;
        }
        for (at, weight) in weights.iter().enumerate().skip(block * block_len).take(block_len) {
            rest -= f64::from(*weight);
            if rest < 0.0 {
                return at as u32;
            }
        }
    }
    // Rounding left a sliver, or the logits were NaN.
    weights.iter().rposition(|weight| *weight > 0.0).unwrap_or(0) as u32
}

/// The same over the likeliest tokens only, with `u` of their sum.
fn among_likeliest(weights: &[f32], sampling: &Sampling, total: f64, u: f64) -> u32 {
    // Likeliest first; equal ones by id, so that the order is fixed.
    let likelier = |a: &u32, b: &u32| weights[*b as usize].total_cmp(&weights[*a as usize]).then(a.cmp(b));
    let mut order: Vec<u32> = (0..weights.len() as u32).collect();
    if sampling.top_k > 0 && sampling.top_k < order.len() {
        order.select_nth_unstable_by(sampling.top_k - 1, likelier);
        order.truncate(sampling.top_k);
    }
    order.sort_unstable_by(likelier);
    let weight = |token: &u32| f64::from(weights[*token as usize]);
    if sampling.top_p < 1.0 {
        let mut mass = 0.0;
        let nucleus = order.iter().position(|token| {
            mass += weight(token) / total;
            mass >= sampling.top_p
        });
        order.truncate(nucleus.map_or(order.len(), |last| last + 1));
    }
    let mut rest = u * order.iter().map(weight).sum::<f64>();
    let passed = order.iter().find(|token| {
        rest -= weight(token);
        rest < 0.0
    });
    // Rounding left a sliver, or the logits were NaN.
    passed.or_else(|| order.iter().rev().find(|token| weight(token) > 0.0)).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampling(temperature: f64, top_k: usize, top_p: f64) -> Sampling {
        Sampling { temperature, top_k, top_p, max_new_tokens: 1, stop_ids: vec![] }
    }

    /// Probabilities 0.5, 0.25, 0.125, 0.125: shares of draws over a fine grid of `u`.
    fn shares(sampling: &Sampling) -> [f64; 4] {
        let mut counts = [0.0; 4];
        for i in 0..8_000 {
            let mut logits = [0.5f32.ln(), 0.25f32.ln(), 0.125f32.ln(), 0.125f32.ln()];
            let unlimited = logits;
            let (token, logprob) = draw(&mut logits, sampling, (f64::from(i) + 0.5) / 8_000.0);
            counts[token as usize] += 1.0 / 8_000.0;
            if sampling.temperature == 1.0 {
                assert!((logprob - unlimited[token as usize]).abs() < 1e-6, "the log-probability ignores top-k and top-p");
            }
        }
        counts
    }

    #[test]
    fn limits_keep_the_right_tokens_and_renormalise() {
        let close = |actual: [f64; 4], expected: [f64; 4]| {
            assert!(actual.iter().zip(expected).all(|(a, e)| (a - e).abs() < 1e-3), "{actual:?} against {expected:?}");
        };
        close(shares(&sampling(1.0, 0, 1.0)), [0.5, 0.25, 0.125, 0.125]);
        close(shares(&sampling(1.0, 2, 1.0)), [2.0 / 3.0, 1.0 / 3.0, 0.0, 0.0]);
        close(shares(&sampling(1.0, 0, 0.8)), [4.0 / 7.0, 2.0 / 7.0, 1.0 / 7.0, 0.0]);
        close(shares(&sampling(0.0, 0, 1.0)), [1.0, 0.0, 0.0, 0.0]);
        // Temperature 0.5 squares the odds: 16 : 4 : 1 : 1.
        close(shares(&sampling(0.5, 0, 1.0)), [16.0 / 22.0, 4.0 / 22.0, 1.0 / 22.0, 1.0 / 22.0]);
    }
}
