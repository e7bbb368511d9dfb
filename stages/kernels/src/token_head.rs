//! The output projection fused with what losses need of it: the log-probability of a given token and the entropy of
//! the distribution. Logits exist for a part of the rows and of the vocabulary at a time.

use std::ops::Range;

use rayon::prelude::*;

use crate::{
    matmul::{Arithmetic, MatrixRef},
    memory::zeros,
    simd::{LANES, exp, fmadd, lane_sum, max, multiversion},
};

/// Rows of logits held at once, at most.
const ROWS: usize = 1024;
/// Tokens of the vocabulary whose logits are held at once; a part of the order of sums.
const TOKENS: usize = 1024;

/// Elements of logits that are held at once: 4 MiB at most, whatever rows and vocabulary.
pub fn held_logits(rows: usize, vocab: usize) -> usize {
    rows.min(ROWS) * vocab.min(TOKENS)
}

/// Log-probability of `targets[r]` and entropy (nats) of `softmax(hidden[r] weight^T * scale)` for every row.
///
/// # Shapes
/// - hidden: `[rows, width]`; weight: `[vocab, width]`; targets, logprobs, entropies, log_sum_exp: `[rows]`
pub fn forward(
    logprobs: &mut [f32],
    entropies: &mut [f32],
    log_sum_exp: &mut [f32],
    hidden: &[f32],
    weight: &[f32],
    targets: &[u32],
    scale: f32,
    arithmetic: Arithmetic,
) {
    if targets.is_empty() {
        return;
    }
    let mut statistics = vec![Statistics::NONE; targets.len()];
    each_chunk(hidden, weight, targets, arithmetic, |chunk, logits| {
        let targets = &targets[chunk.rows.clone()];
        logits
            .par_chunks_mut(chunk.tokens.len())
            .zip(&mut statistics[chunk.rows.clone()])
            .zip(targets)
            .zip(&mut logprobs[chunk.rows])
            .for_each(|(((logits, statistics), target), logprob)| {
                if let Some(at) = (*target as usize).checked_sub(chunk.tokens.start).filter(|at| *at < logits.len()) {
                    *logprob = logits[at] * scale;
                }
                add_to_statistics(statistics, logits, scale);
            });
    });
    for ((statistics, logprob), (entropy, lse)) in statistics.iter().zip(logprobs).zip(entropies.iter_mut().zip(log_sum_exp)) {
        let log_total = statistics.total.ln();
        (*lse, *entropy) = (statistics.largest + log_total, log_total - statistics.weighted / statistics.total);
        *logprob -= *lse;
    }
}

/// A part of the logits.
struct Chunk {
    rows: Range<usize>,
    tokens: Range<usize>,
}

/// Calls `f` with the logits `hidden weight^T` of each part. Each weight is read once for all rows of a part: a few rows at
/// a time would wait for memory.
fn each_chunk(hidden: &[f32], weight: &[f32], targets: &[u32], arithmetic: Arithmetic, mut f: impl FnMut(Chunk, &mut [f32])) {
    let width = hidden.len() / targets.len();
    let vocab = weight.len() / width;
    let mut logits = zeros(held_logits(targets.len(), vocab));
    for first_row in (0..targets.len()).step_by(ROWS) {
        let rows = first_row..(first_row + ROWS).min(targets.len());
        let input = MatrixRef::new(&hidden[rows.start * width..], rows.len(), width);
        for first_token in (0..vocab).step_by(TOKENS) {
            let tokens = first_token..(first_token + TOKENS).min(vocab);
            let logits = &mut logits[..rows.len() * tokens.len()];
            arithmetic.matmul(logits, input, MatrixRef::new(&weight[tokens.start * width..], tokens.len(), width).t());
            f(Chunk { rows: rows.clone(), tokens }, logits);
        }
    }
}

/// Of the scaled logits `z` seen so far.
#[derive(Clone, Copy)]
struct Statistics {
    largest: f32,
    /// `sum exp(z - largest)`
    total: f32,
    /// `sum exp(z - largest) (z - largest)`
    weighted: f32,
}

impl Statistics {
    const NONE: Self = Self { largest: f32::NEG_INFINITY, total: 0.0, weighted: 0.0 };
}

multiversion!(fn add_to_statistics(statistics: &mut Statistics, logits: &mut [f32], scale: f32) = add_to_statistics_inner);

/// Logits are used as scratch.
#[inline(always)]
fn add_to_statistics_inner<const FMA: bool>(statistics: &mut Statistics, logits: &mut [f32], scale: f32) {
    if scale != 1.0 {
        logits.iter_mut().for_each(|logit| *logit *= scale);
    }
    let largest = max(logits);
    if largest > statistics.largest {
        let shift = statistics.largest - largest;
        // The first logits have nothing to shift, and 0 * -inf would be NaN.
        if statistics.total > 0.0 {
            let factor = exp::<FMA>(shift);
            statistics.weighted = (statistics.weighted + statistics.total * shift) * factor;
            statistics.total *= factor;
        }
        statistics.largest = largest;
    }
    let (mut totals, mut lanes) = ([0.0f32; LANES], [0.0f32; LANES]);
    let (chunks, tail) = logits.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            let shifted = chunk[lane] - statistics.largest;
            let value = exp::<FMA>(shifted);
            totals[lane] += value;
            // exp(-inf) * -inf would be NaN where a logit is -inf on purpose.
            lanes[lane] = fmadd::<FMA>(value, if value == 0.0 { 0.0 } else { shifted }, lanes[lane]);
        }
    }
    let (mut total, mut weighted) = (lane_sum(totals), lane_sum(lanes));
    for logit in tail {
        let shifted = *logit - statistics.largest;
        let value = exp::<FMA>(shifted);
        total += value;
        weighted = fmadd::<FMA>(value, if value == 0.0 { 0.0 } else { shifted }, weighted);
    }
    statistics.total += total;
    statistics.weighted += weighted;
}

/// Gradients of [`forward`]: `dhidden` is overwritten, `dweight` added to where it is there (the weight may be frozen).
/// `dentropies` may be empty.
pub fn backward(
    dhidden: &mut [f32],
    mut dweight: Option<&mut [f32]>,
    dlogprobs: &[f32],
    dentropies: &[f32],
    entropies: &[f32],
    log_sum_exp: &[f32],
    hidden: &[f32],
    weight: &[f32],
    targets: &[u32],
    scale: f32,
    arithmetic: Arithmetic,
) {
    if targets.is_empty() {
        return;
    }
    let width = hidden.len() / targets.len();
    each_chunk(hidden, weight, targets, arithmetic, |Chunk { rows, tokens }, logits| {
        logits.par_chunks_mut(tokens.len()).zip(rows.clone()).for_each(|(logits, row)| {
            let dentropy = dentropies.get(row).copied().unwrap_or(0.0);
            logit_gradient(logits, dlogprobs[row], dentropy, entropies[row], log_sum_exp[row], scale);
            if let Some(at) = (targets[row] as usize).checked_sub(tokens.start).filter(|at| *at < logits.len()) {
                logits[at] += dlogprobs[row] * scale;
            }
        });
        let dlogits = MatrixRef::new(logits, rows.len(), tokens.len());
        let weights = MatrixRef::new(&weight[tokens.start * width..], tokens.len(), width);
        let dhidden = &mut dhidden[rows.start * width..rows.end * width];
        match tokens.start {
            0 => arithmetic.matmul(dhidden, dlogits, weights),
            _ => arithmetic.matmul_add(dhidden, dlogits, weights),
        }
        if let Some(dweight) = &mut dweight {
            let input = MatrixRef::new(&hidden[rows.start * width..], rows.len(), width);
            arithmetic.matmul_add(&mut dweight[tokens.start * width..tokens.end * width], dlogits.t(), input);
        }
    });
}

multiversion!(fn logit_gradient(logits: &mut [f32], dlogprob: f32, dentropy: f32, entropy: f32, log_sum_exp: f32, scale: f32) = logit_gradient_inner);

/// With `p = softmax(z)`: d logprob / dz = onehot - p (all but `onehot`, which the caller adds), d entropy / dz = -p (log p + entropy).
#[inline(always)]
fn logit_gradient_inner<const FMA: bool>(logits: &mut [f32], dlogprob: f32, dentropy: f32, entropy: f32, log_sum_exp: f32, scale: f32) {
    if dentropy == 0.0 {
        let factor = -dlogprob * scale;
        for logit in logits.iter_mut() {
            *logit = factor * exp::<FMA>(fmadd::<FMA>(*logit, scale, -log_sum_exp));
        }
    } else {
        for logit in logits.iter_mut() {
            let logprob = fmadd::<FMA>(*logit, scale, -log_sum_exp);
            let probability = exp::<FMA>(logprob);
            *logit = -scale * probability * (dlogprob + dentropy * (logprob + entropy));
        }
    }
}
