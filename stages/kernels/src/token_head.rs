//! The output projection fused with what losses need of it: the log-probability of a given token and the entropy of
//! the distribution. Logits exist for one chunk of rows at a time.

use rayon::prelude::*;

use crate::{
    matmul::{Arithmetic, MatrixRef},
    simd::{exp, fmadd, max, multiversion, sum},
};

/// Elements of logits held at once, at most (4 MiB), whatever the vocabulary.
const CHUNK_ELEMENTS: usize = 1 << 20;

/// Rows of logits per chunk: depends on the vocabulary alone.
pub fn chunk_rows(vocab: usize) -> usize {
    (CHUNK_ELEMENTS / vocab.max(1)).clamp(16, 1024)
}

/// Log-probability of `targets[r]` and entropy (nats) of `softmax(hidden[r] weight^T * scale)` for every row.
///
/// # Shapes
/// - hidden: `[rows, width]`; weight: `[vocab, width]`; targets, logprobs, entropies, log_sum_exp: `[rows]`
#[allow(clippy::too_many_arguments)]
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
    let width = hidden.len() / targets.len();
    let vocab = weight.len() / width;
    let rows = chunk_rows(vocab);
    let mut logits = vec![0.0; rows.min(targets.len()) * vocab];
    for (chunk, targets) in targets.chunks(rows).enumerate() {
        let (at, count) = (chunk * rows, targets.len());
        let logits = &mut logits[..count * vocab];
        arithmetic.matmul(logits, MatrixRef::new(&hidden[at * width..], count, width), MatrixRef::new(weight, vocab, width).t());
        logits
            .par_chunks_mut(vocab)
            .zip(targets)
            .zip(&mut logprobs[at..at + count])
            .zip(&mut entropies[at..at + count])
            .zip(&mut log_sum_exp[at..at + count])
            .for_each(|((((logits, target), logprob), entropy), lse)| {
                let target = logits[*target as usize] * scale;
                (*lse, *entropy) = statistics(logits, scale);
                *logprob = target - *lse;
            });
    }
}

multiversion!(fn statistics(logits: &mut [f32], scale: f32) -> (f32, f32) = statistics_inner);

/// Log-sum-exp and entropy of one row; the row is used as scratch.
#[inline(always)]
fn statistics_inner<const FMA: bool>(logits: &mut [f32], scale: f32) -> (f32, f32) {
    if scale != 1.0 {
        logits.iter_mut().for_each(|logit| *logit *= scale);
    }
    let largest = max(logits);
    let mut lanes = [0.0f32; crate::simd::LANES];
    let (chunks, tail) = logits.as_chunks_mut::<{ crate::simd::LANES }>();
    for chunk in chunks {
        for (lane, logit) in lanes.iter_mut().zip(chunk) {
            let shifted = *logit - largest;
            *logit = exp::<FMA>(shifted);
            *lane = fmadd::<FMA>(*logit, shifted, *lane);
        }
    }
    let mut weighted = crate::simd::lane_sum(lanes);
    for logit in tail {
        let shifted = *logit - largest;
        *logit = exp::<FMA>(shifted);
        // exp(-inf) * -inf would be NaN where a logit is -inf on purpose.
        if *logit > 0.0 || logit.is_nan() {
            weighted = fmadd::<FMA>(*logit, shifted, weighted);
        }
    }
    let total = sum(logits);
    let log_total = total.ln();
    (largest + log_total, log_total - weighted / total)
}

/// Gradients of [`forward`]: `dhidden` is overwritten, `dweight` added to where it is there (the weight may be frozen).
/// `dentropies` may be empty.
#[allow(clippy::too_many_arguments)]
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
    let vocab = weight.len() / width;
    let rows = chunk_rows(vocab);
    let mut logits = vec![0.0; rows.min(targets.len()) * vocab];
    for (chunk, targets) in targets.chunks(rows).enumerate() {
        let (at, count) = (chunk * rows, targets.len());
        let logits = &mut logits[..count * vocab];
        let hidden_rows = MatrixRef::new(&hidden[at * width..], count, width);
        arithmetic.matmul(logits, hidden_rows, MatrixRef::new(weight, vocab, width).t());
        logits.par_chunks_mut(vocab).enumerate().for_each(|(row, logits)| {
            let dentropy = dentropies.get(at + row).copied().unwrap_or(0.0);
            logit_gradient(logits, targets[row] as usize, dlogprobs[at + row], dentropy, entropies[at + row], log_sum_exp[at + row], scale);
        });
        let dlogits = MatrixRef::new(logits, count, vocab);
        arithmetic.matmul(&mut dhidden[at * width..(at + count) * width], dlogits, MatrixRef::new(weight, vocab, width));
        if let Some(dweight) = &mut dweight {
            arithmetic.matmul_add(dweight, dlogits.t(), hidden_rows);
        }
    }
}

multiversion!(fn logit_gradient(logits: &mut [f32], target: usize, dlogprob: f32, dentropy: f32, entropy: f32, log_sum_exp: f32, scale: f32) = logit_gradient_inner);

/// With `p = softmax(z)`: d logprob / dz = onehot - p, d entropy / dz = -p (log p + entropy).
#[inline(always)]
fn logit_gradient_inner<const FMA: bool>(
    logits: &mut [f32],
    target: usize,
    dlogprob: f32,
    dentropy: f32,
    entropy: f32,
    log_sum_exp: f32,
    scale: f32,
) {
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
    logits[target] += dlogprob * scale;
}
