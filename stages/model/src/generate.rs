//! Sampling over a key-value cache.
//!
//! Prompts are prefilled in one packed pass; then every sequence advances by one token per step, and those that have
//! ended leave the batch. Draws are by counter (seed, purpose, step, sample, position), so that a sample does not depend on
//! the order in which others end.

use burn_flex::FlexTensor;
use rayon::prelude::*;
use rlflow_api::CounterRng;
use rlflow_kernels::{
    AttentionShape, AttentionWeights, MlpWeights, SequenceLayout, attention_block,
    decode::{self, DecodeScratch, LayerCache},
    embedding::embed,
    matmul::{Arithmetic, MatrixRef, matmul},
    mlp_block, norm,
};

use crate::{
    Decoder,
    ledger::{Purpose, hold},
    parameters::{BlockSlots, Slots, flex_view, host},
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

/// Weights as slices, wherever the model lives.
enum Weights {
    Flex(Vec<FlexTensor>),
    Host(Vec<Vec<f32>>),
}

impl Weights {
    fn of(decoder: &Decoder) -> Self {
        let tensors = decoder.parameters().tensors();
        match tensors.iter().map(flex_view).collect() {
            Some(views) => Self::Flex(views),
            None => Self::Host(tensors.iter().map(host).collect()),
        }
    }

    fn get(&self, slot: usize) -> &[f32] {
        match self {
            Self::Flex(views) => views[slot].as_slice().expect("views are contiguous f32"),
            Self::Host(vectors) => &vectors[slot],
        }
    }

    fn attention(&self, slots: &BlockSlots) -> AttentionWeights<'_> {
        slots.attention.map(|slot| self.get(*slot))
    }

    fn mlp(&self, slots: &BlockSlots) -> MlpWeights<'_> {
        slots.mlp.map(|slot| self.get(*slot))
    }

    /// Rows of the embedding, and those of learned positions added.
    fn embed(&self, slots: &Slots, ids: &[u32], positions: &[u32], hidden: usize) -> Vec<f32> {
        let mut x = vec![0.0; ids.len() * hidden];
        embed(&mut x, self.get(slots.embed), ids, hidden);
        if let Some(table) = slots.positions {
            let mut rows = vec![0.0; x.len()];
            embed(&mut rows, self.get(table), positions, hidden);
            x.iter_mut().zip(rows).for_each(|(x, row)| *x += row);
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
    // One token at a time is bound by reading weights, which are f32.
    let shape = AttentionShape { arithmetic: Arithmetic::F32, ..decoder.attention_shape() };
    let mut completions: Vec<Completion> = prompts.iter().map(|_| Completion { ids: vec![], logprobs: vec![], ended: false }).collect();

    // Prefill.
    let layout = SequenceLayout::from_lengths(prompts.iter().map(|prompt| prompt.len()));
    let ids: Vec<u32> = prompts.concat();
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
        let (y, saved) = attention_block::forward(&x, weights.attention(slots), positional, shape, &layout, None);
        let (keys, values) = saved.keys_and_values();
        for (sequence, active) in active.iter_mut().enumerate() {
            let capacity = (active.position + sampling.max_new_tokens).min(context);
            active.caches.push(LayerCache::from_prefill(keys, values, layout.range(sequence), shape.heads.kv_width(), capacity));
        }
        x = mlp_block::forward(&y, weights.mlp(slots), shape.eps, Arithmetic::F32, None).0;
    }
    let mut last_rows: Vec<f32> = (0..prompts.len()).flat_map(|i| &x[(layout.range(i).end - 1) * hidden..][..hidden]).copied().collect();
    drop((x, prefill));
    let mut scratch = DecodeScratch::default();
    loop {
        // Next tokens of all active sequences.
        let rows = active.len();
        let (mut normed, mut inverse) = (vec![0.0; rows * hidden], vec![0.0; rows]);
        let last_norm = decoder.slots().norm.map(|slot| weights.get(*slot));
        norm::norm(&mut normed, &mut inverse, &last_rows, last_norm, shape.eps);
        let mut logits = vec![0.0; rows * vocab];
        matmul(&mut logits, MatrixRef::new(&normed, rows, hidden), MatrixRef::new(lm_head, vocab, hidden).t());
        let drawn: Vec<(u32, f32)> = logits
            .par_chunks_mut(vocab)
            .zip(&active)
            .map(|(logits, active)| {
                let mut rng = CounterRng::new(draws.seed, draws.purpose, draws.step, (active.index as u64) << 32 | active.position as u64);
                draw(logits, sampling, rng.uniform())
            })
            .collect();
        let mut go_on = true;
        for (active, (token, logprob)) in active.iter_mut().zip(&drawn) {
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
        if active.is_empty() || !go_on {
            return completions;
        }
        // One step of the network for the rest.
        let ids: Vec<u32> = active.iter().map(|active| active.last).collect();
        let positions: Vec<u32> = active.iter().map(|active| active.position as u32).collect();
        let mut x = weights.embed(decoder.slots(), &ids, &positions, hidden);
        for (layer, slots) in decoder.slots().blocks.iter().enumerate() {
            let mut caches: Vec<&mut LayerCache> = active.iter_mut().map(|active| &mut active.caches[layer]).collect();
            decode::attention_step(&mut x, &mut caches, &positions, weights.attention(slots), positional, shape, &mut scratch);
            x = mlp_block::forward(&x, weights.mlp(slots), shape.eps, Arithmetic::F32, None).0;
        }
        last_rows = x;
        active.iter_mut().for_each(|active| active.position += 1);
    }
}

/// Draws a token from logits with the uniform number `u`; returns it with its log-probability at the temperature.
fn draw(logits: &mut [f32], sampling: &Sampling, u: f64) -> (u32, f32) {
    let argmax = |logits: &[f32]| logits.iter().enumerate().fold(0, |best, (i, logit)| if *logit > logits[best] { i } else { best });
    let temperature = if sampling.temperature > 0.0 { sampling.temperature } else { 1.0 };
    logits.iter_mut().for_each(|logit| *logit = (f64::from(*logit) / temperature) as f32);
    let best = argmax(logits);
    let largest = f64::from(logits[best]);
    let log_total = logits.iter().map(|logit| (f64::from(*logit) - largest).exp()).sum::<f64>().ln();
    let logprob = |token: usize| (f64::from(logits[token]) - largest - log_total) as f32;
    if sampling.temperature <= 0.0 {
        return (best as u32, logprob(best));
    }
    let vocab = logits.len();
    let limited = sampling.top_k > 0 && sampling.top_k < vocab || sampling.top_p < 1.0;
    let mut order: Vec<u32> = (0..vocab as u32).collect();
    let mut kept = vocab;
    if limited {
        // Likeliest first; equal ones by id, so that the order is fixed.
        order.sort_unstable_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)));
        if sampling.top_k > 0 {
            kept = kept.min(sampling.top_k);
        }
        if sampling.top_p < 1.0 {
            let mut total = 0.0;
            let nucleus = order[..kept].iter().position(|token| {
                total += f64::from(logprob(*token as usize)).exp();
                total >= sampling.top_p
            });
            kept = nucleus.map_or(kept, |last| last + 1);
        }
    }
    let order = &order[..kept];
    let weight = |token: u32| (f64::from(logits[token as usize]) - largest).exp();
    let mut rest = u * order.iter().map(|token| weight(*token)).sum::<f64>();
    for token in order {
        rest -= weight(*token);
        if rest < 0.0 {
            return (*token, logprob(*token as usize));
        }
    }
    // Rounding left a sliver, or the logits were NaN.
    let last = order.iter().rev().find(|token| weight(**token) > 0.0).copied().unwrap_or(best as u32);
    (last, logprob(last as usize))
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
            let (token, logprob) = draw(&mut logits, sampling, (f64::from(i) + 0.5) / 8_000.0);
            counts[token as usize] += 1.0 / 8_000.0;
            if sampling.temperature == 1.0 {
                assert!((logprob - logits[token as usize]).abs() < 1e-6, "the log-probability ignores top-k and top-p");
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
