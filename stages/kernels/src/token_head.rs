//! The output projection fused with what losses need of it: the log-probability of a given token and the entropy of
//! the distribution. Logits exist for a part of the rows and of the vocabulary at a time.

use std::ops::Range;

use rayon::prelude::*;

use crate::{
    matmul::{Arithmetic, Into, MatrixRef},
    operand::{Blocks, Left, Right, Role, finish, put},
    scratch::scratch,
    simd::{LANES, exp, fmadd, lane_sum, max, multiversion},
    weight::Weight,
};

/// Rows whose logits are held at once, at most.
const ROWS: usize = 2048;
/// Tokens of the vocabulary whose logits are held at once; a part of the order of sums.
const TOKENS: usize = 1024;

/// Elements of logits that are held at once: 8 MiB at most, whatever rows and vocabulary.
pub fn held_logits(rows: usize, vocab: usize) -> usize {
    rows.min(ROWS) * vocab.min(TOKENS)
}

/// What [`forward`] tells of the distribution `softmax(z)` of each row, `z = hidden[r] weight^T * scale`; each `[rows]`.
pub struct TokenStatistics<'a> {
    /// Log-probability of the row's target, nats.
    pub logprobs: &'a mut [f32],
    /// Entropy, nats.
    pub entropies: &'a mut [f32],
    /// `log sum exp(z)`.
    pub log_sum_exp: &'a mut [f32],
    /// 1 where no token is more probable than the target, else 0.
    pub correct: &'a mut [f32],
    /// Mean of `z` over the vocabulary.
    pub mean_logits: &'a mut [f32],
}

/// Statistics of every row's distribution and of its target.
///
/// # Shapes
/// - hidden: `[rows, width]`; weight: `[vocab, width]`; targets: `[rows]`
pub fn forward(out: TokenStatistics<'_>, hidden: &[f32], weight: Weight<'_>, targets: &[u32], scale: f32, arithmetic: Arithmetic) {
    if targets.is_empty() {
        return;
    }
    let TokenStatistics { logprobs, entropies, log_sum_exp, correct, mean_logits } = out;
    let width = hidden.len() / targets.len();
    let vocab = weight.len() / width;
    let mut statistics = vec![Statistics::NONE; targets.len()];
    for rows in ranges(targets.len(), ROWS) {
        let blocks = Blocks::new(rows.len(), arithmetic);
        let lefts = lefts(blocks, &hidden[rows.start * width..], width);
        for tokens in ranges(vocab, TOKENS) {
            let right = blocks.weight(weight.rows(&tokens, width), width, true);
            let size = blocks.block_size();
            let of_rows = statistics[rows.clone()].par_chunks_mut(size).zip(logprobs[rows.clone()].par_chunks_mut(size));
            lefts.par_iter().zip(of_rows).zip(targets[rows.clone()].par_chunks(size)).for_each(
                |((left, (statistics, logprobs)), targets)| {
                    with_logits(&right, left, tokens.len(), |logits| {
                        let of_row = statistics.par_iter_mut().zip(logprobs).zip(targets);
                        logits.par_chunks_mut(tokens.len()).zip(of_row).with_min_len(TASK).for_each(
                            |(logits, ((statistics, logprob), target))| {
                                if let Some(at) = (*target as usize).checked_sub(tokens.start).filter(|at| *at < logits.len()) {
                                    *logprob = logits[at] * scale;
                                }
                                add_to_statistics(statistics, logits, scale);
                            },
                        );
                    });
                },
            );
        }
    }
    for (row, statistics) in statistics.into_iter().enumerate() {
        let log_total = statistics.total.ln();
        entropies[row] = log_total - statistics.weighted / statistics.total;
        log_sum_exp[row] = statistics.largest + log_total;
        mean_logits[row] = statistics.sum / vocab as f32;
        // Until here, this is the target's logit.
        correct[row] = f32::from(logprobs[row] == statistics.largest);
        logprobs[row] -= log_sum_exp[row];
    }
}

/// Rows per task within a block.
const TASK: usize = 32;

/// `0..len` in ranges of `size`.
fn ranges(len: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len).step_by(size).map(move |start| start..(start + size).min(len))
}

/// Blocks of rows, ready to be multiplied.
fn lefts<'a>(blocks: Blocks, rows: &'a [f32], width: usize) -> Vec<Left<'a>> {
    blocks.map(|block| blocks.left(MatrixRef::of_rows(rows, &block, width), block.start))
}

/// Calls `f` with the logits of a block of rows for some tokens, which stay in a core's cache.
fn with_logits(right: &Right<'_>, left: &Left<'_>, tokens: usize, f: impl FnOnce(&mut [f32])) {
    let mut logits = scratch(left.rows.rows() * tokens);
    right.multiply(&mut logits, tokens, left, 0..tokens, 0..left.rows.columns(), Into::Overwrite);
    f(&mut logits);
}

/// Of the scaled logits `z` seen so far.
#[derive(Clone, Copy)]
struct Statistics {
    largest: f32,
    /// `sum z`
    sum: f32,
    /// `sum exp(z - largest)`
    total: f32,
    /// `sum exp(z - largest) (z - largest)`
    weighted: f32,
}

impl Statistics {
    const NONE: Self = Self { largest: f32::NEG_INFINITY, sum: 0.0, total: 0.0, weighted: 0.0 };
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
    let (mut sums, mut totals, mut lanes) = ([0.0f32; LANES], [0.0f32; LANES], [0.0f32; LANES]);
    let (chunks, tail) = logits.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            sums[lane] += chunk[lane];
            let shifted = chunk[lane] - statistics.largest;
            let value = exp::<FMA>(shifted);
            totals[lane] += value;
            // exp(-inf) * -inf would be NaN where a logit is -inf on purpose.
            lanes[lane] = fmadd::<FMA>(value, if value == 0.0 { 0.0 } else { shifted }, lanes[lane]);
        }
    }
    let (mut sum, mut total, mut weighted) = (lane_sum(sums), lane_sum(totals), lane_sum(lanes));
    for logit in tail {
        sum += logit;
        let shifted = *logit - statistics.largest;
        let value = exp::<FMA>(shifted);
        total += value;
        weighted = fmadd::<FMA>(value, if value == 0.0 { 0.0 } else { shifted }, weighted);
    }
    statistics.sum += sum;
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
    weight: Weight<'_>,
    targets: &[u32],
    scale: f32,
    arithmetic: Arithmetic,
) {
    if targets.is_empty() {
        return;
    }
    let width = hidden.len() / targets.len();
    for rows in ranges(targets.len(), ROWS) {
        let blocks = Blocks::new(rows.len(), arithmetic);
        let size = blocks.block_size();
        let of_rows = rows.start * width..rows.end * width;
        let (hidden, dhidden) = (&hidden[of_rows.clone()], &mut dhidden[of_rows]);
        let lefts = lefts(blocks, hidden, width);
        let inputs = dweight.is_some().then(|| {
            let keep = blocks.keep(Role::Input, width, Some(hidden), false);
            // SAFETY: each block has its own rows, and the blocks are all rows.
            unsafe {
                lefts.par_iter().for_each(|left| keep.put(left.rows, left.first_row, 0));
                keep.finish()
            }
        });
        for tokens in ranges(weight.len() / width, TOKENS) {
            let weights = weight.rows(&tokens, width);
            let (right, right_back) = (blocks.weight(weights, width, true), blocks.weight(weights, width, false));
            let into = if tokens.start == 0 { Into::Overwrite } else { Into::Add };
            let keep = dweight.is_some().then(|| blocks.keep(Role::Gradient, tokens.len(), None, false));
            lefts.par_iter().zip(dhidden.par_chunks_mut(size * width)).for_each(|(left, dhidden)| {
                with_logits(&right, left, tokens.len(), |logits| {
                    logits.par_chunks_mut(tokens.len()).enumerate().with_min_len(TASK).for_each(|(row, logits)| {
                        let row = rows.start + left.first_row + row;
                        let dentropy = dentropies.get(row).copied().unwrap_or(0.0);
                        logit_gradient(logits, dlogprobs[row], dentropy, entropies[row], log_sum_exp[row], scale);
                        if let Some(at) = (targets[row] as usize).checked_sub(tokens.start).filter(|at| *at < logits.len()) {
                            logits[at] += dlogprobs[row] * scale;
                        }
                    });
                    let dlogits = blocks.left(MatrixRef::new(logits, left.rows.rows(), tokens.len()), left.first_row);
                    right_back.multiply(dhidden, width, &dlogits, 0..width, 0..tokens.len(), into);
                    // SAFETY: each block has its own rows.
                    unsafe { put(&keep, dlogits.rows, left.first_row) };
                });
            });
            // SAFETY: the blocks are all rows.
            let dlogits = unsafe { finish(keep) };
            if let (Some(dlogits), Some(inputs), Some(dweight)) = (dlogits, &inputs, &mut dweight) {
                dlogits.product_into(&mut dweight[tokens.start * width..tokens.end * width], inputs, arithmetic, Into::Add);
            }
        }
    }
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
