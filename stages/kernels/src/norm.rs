//! RMSNorm (arXiv:1910.07467).

use rayon::prelude::*;

use crate::simd::{dot as dot_lanes, fmadd, multiversion};

/// Rows per parallel task, and per partial sum of the weight's gradient.
const ROW_BLOCK: usize = 32;

/// `out = x / sqrt(mean(x^2) + eps) * weight`, row by row; `inverse` keeps each row's `1 / sqrt(..)`.
///
/// # Shapes
/// - x, out: `[tokens, hidden]`; weight: `[hidden]`; inverse: `[tokens]`
pub fn rms_norm(out: &mut [f32], inverse: &mut [f32], x: &[f32], weight: &[f32], eps: f32) {
    let hidden = weight.len();
    out.par_chunks_mut(ROW_BLOCK * hidden)
        .zip(inverse.par_chunks_mut(ROW_BLOCK))
        .zip(x.par_chunks(ROW_BLOCK * hidden))
        .for_each(|((out, inverse), x)| forward_rows(out, inverse, x, weight, eps));
}

multiversion!(fn forward_rows(out: &mut [f32], inverse: &mut [f32], x: &[f32], weight: &[f32], eps: f32) = forward_rows_inner);

#[inline(always)]
fn forward_rows_inner<const FMA: bool>(out: &mut [f32], inverse: &mut [f32], x: &[f32], weight: &[f32], eps: f32) {
    let hidden = weight.len();
    for ((out, inverse), x) in out.chunks_exact_mut(hidden).zip(inverse).zip(x.chunks_exact(hidden)) {
        *inverse = 1.0 / (dot_lanes::<FMA>(x, x) / hidden as f32 + eps).sqrt();
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = x * *inverse * weight;
        }
    }
}

/// Adds the gradient with respect to `x` to `dx`, and the one with respect to `weight` to `dweight`.
///
/// # Shapes
/// - dx, dout, x: `[tokens, hidden]`; dweight, weight: `[hidden]`; inverse: `[tokens]`
pub fn rms_norm_backward(dx: &mut [f32], dweight: &mut [f32], dout: &[f32], x: &[f32], inverse: &[f32], weight: &[f32]) {
    let hidden = weight.len();
    let partial: Vec<Vec<f32>> = dx
        .par_chunks_mut(ROW_BLOCK * hidden)
        .zip(dout.par_chunks(ROW_BLOCK * hidden))
        .zip(x.par_chunks(ROW_BLOCK * hidden))
        .zip(inverse.par_chunks(ROW_BLOCK))
        .map(|(((dx, dout), x), inverse)| {
            let mut partial = vec![0.0; hidden];
            backward_rows(dx, &mut partial, dout, x, inverse, weight);
            partial
        })
        .collect();
    // Blocks are added in order: the sum does not depend on which thread had which block.
    for partial in partial {
        for (sum, value) in dweight.iter_mut().zip(partial) {
            *sum += value;
        }
    }
}

multiversion!(fn backward_rows(dx: &mut [f32], dweight: &mut [f32], dout: &[f32], x: &[f32], inverse: &[f32], weight: &[f32]) = backward_rows_inner);

#[inline(always)]
fn backward_rows_inner<const FMA: bool>(dx: &mut [f32], dweight: &mut [f32], dout: &[f32], x: &[f32], inverse: &[f32], weight: &[f32]) {
    let hidden = weight.len();
    let mut scaled = vec![0.0; hidden];
    for (((dx, dout), x), inverse) in dx.chunks_exact_mut(hidden).zip(dout.chunks_exact(hidden)).zip(x.chunks_exact(hidden)).zip(inverse) {
        for (((scaled, dweight), dout), (x, weight)) in scaled.iter_mut().zip(dweight.iter_mut()).zip(dout).zip(x.iter().zip(weight)) {
            *scaled = dout * weight;
            *dweight = fmadd::<FMA>(dout * *inverse, *x, *dweight);
        }
        let shared = -dot_lanes::<FMA>(&scaled, x) * inverse * inverse * inverse / hidden as f32;
        for ((dx, scaled), x) in dx.iter_mut().zip(&scaled).zip(x) {
            *dx += fmadd::<FMA>(shared, *x, scaled * inverse);
        }
    }
}

multiversion!(
    /// Dot product of two rows of equal length.
    pub fn dot(a: &[f32], b: &[f32]) -> f32 = dot_lanes
);
