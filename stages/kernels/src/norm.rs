//! RMSNorm (arXiv:1910.07467) and LayerNorm (arXiv:1607.06450).

use rayon::prelude::*;

use crate::{
    affine::Affine,
    simd::{dot as dot_lanes, fmadd, multiversion, sum},
};

/// Rows per parallel task, and per partial sum of the weight's gradient.
const ROW_BLOCK: usize = 32;

/// LayerNorm where there is a bias, else RMSNorm; `inverse` keeps what [`norm_backward`] needs.
///
/// # Shapes
/// - x, out: `[tokens, hidden]`; part: `[hidden]`; inverse: `[tokens]`
pub fn norm(out: &mut [f32], inverse: &mut [f32], x: &[f32], part: Affine<&[f32]>, eps: f32) {
    match part.bias {
        None => rms_norm(out, inverse, x, part.weight, eps),
        Some(bias) => layer_norm(out, inverse, x, part.weight, bias, eps),
    }
}

/// Adds the gradient of [`norm`] with respect to `x` to `dx`; returns those of weight and bias.
pub fn norm_backward(dx: &mut [f32], dout: &[f32], x: &[f32], inverse: &[f32], part: Affine<&[f32]>) -> Affine<Vec<f32>> {
    let mut weight = vec![0.0; part.weight.len()];
    let bias = part.bias.map(|bias| {
        let mut dbias = vec![0.0; bias.len()];
        layer_norm_backward(dx, &mut weight, &mut dbias, dout, x, inverse, part.weight);
        dbias
    });
    if bias.is_none() {
        rms_norm_backward(dx, &mut weight, dout, x, inverse, part.weight);
    }
    Affine::new(weight, bias)
}

/// Gradients of a norm's weight and bias from those of blocks of rows, added in order.
pub(crate) fn sum_of_norms(blocks: Vec<Affine<Vec<f32>>>) -> Affine<Vec<f32>> {
    let add = |mut sum: Vec<f32>, more: Vec<f32>| {
        sum.iter_mut().zip(more).for_each(|(sum, value)| *sum += value);
        sum
    };
    let sum = blocks
        .into_iter()
        .reduce(|sum, more| Affine::new(add(sum.weight, more.weight), sum.bias.zip(more.bias).map(|(sum, more)| add(sum, more))));
    sum.unwrap_or(Affine::new(Vec::new(), None))
}

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

/// [`rms_norm`] on the calling thread.
pub(crate) fn rms_norm_serial(out: &mut [f32], inverse: &mut [f32], x: &[f32], weight: &[f32], eps: f32) {
    forward_rows(out, inverse, x, weight, eps);
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

/// `out = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias`, row by row; `inverse` keeps each row's `1 / sqrt(..)`.
///
/// # Shapes
/// - x, out: `[tokens, hidden]`; weight, bias: `[hidden]`; inverse: `[tokens]`
pub fn layer_norm(out: &mut [f32], inverse: &mut [f32], x: &[f32], weight: &[f32], bias: &[f32], eps: f32) {
    let hidden = weight.len();
    out.par_chunks_mut(ROW_BLOCK * hidden)
        .zip(inverse.par_chunks_mut(ROW_BLOCK))
        .zip(x.par_chunks(ROW_BLOCK * hidden))
        .for_each(|((out, inverse), x)| layer_rows(out, inverse, x, weight, bias, eps));
}

multiversion!(fn layer_rows(out: &mut [f32], inverse: &mut [f32], x: &[f32], weight: &[f32], bias: &[f32], eps: f32) = layer_rows_inner);

#[inline(always)]
fn layer_rows_inner<const FMA: bool>(out: &mut [f32], inverse: &mut [f32], x: &[f32], weight: &[f32], bias: &[f32], eps: f32) {
    let hidden = weight.len();
    for ((out, inverse), x) in out.chunks_exact_mut(hidden).zip(inverse).zip(x.chunks_exact(hidden)) {
        let mean = sum(x) / hidden as f32;
        out.iter_mut().zip(x).for_each(|(out, x)| *out = x - mean);
        *inverse = 1.0 / (dot_lanes::<FMA>(out, out) / hidden as f32 + eps).sqrt();
        for ((out, weight), bias) in out.iter_mut().zip(weight).zip(bias) {
            *out = fmadd::<FMA>(*out * *inverse, *weight, *bias);
        }
    }
}

/// Adds the gradients with respect to `x`, `weight` and `bias` to `dx`, `dweight` and `dbias`.
///
/// # Shapes
/// - dx, dout, x: `[tokens, hidden]`; dweight, dbias, weight: `[hidden]`; inverse: `[tokens]`
pub fn layer_norm_backward(
    dx: &mut [f32],
    dweight: &mut [f32],
    dbias: &mut [f32],
    dout: &[f32],
    x: &[f32],
    inverse: &[f32],
    weight: &[f32],
) {
    let hidden = weight.len();
    let partial: Vec<[Vec<f32>; 2]> = dx
        .par_chunks_mut(ROW_BLOCK * hidden)
        .zip(dout.par_chunks(ROW_BLOCK * hidden))
        .zip(x.par_chunks(ROW_BLOCK * hidden))
        .zip(inverse.par_chunks(ROW_BLOCK))
        .map(|(((dx, dout), x), inverse)| {
            let mut partial = [vec![0.0; hidden], vec![0.0; hidden]];
            let [dweight, dbias] = &mut partial;
            layer_backward_rows(dx, dweight, dbias, dout, x, inverse, weight);
            partial
        })
        .collect();
    // Blocks are added in order, as for RMSNorm.
    for [of_weight, of_bias] in partial {
        dweight.iter_mut().zip(of_weight).for_each(|(sum, value)| *sum += value);
        dbias.iter_mut().zip(of_bias).for_each(|(sum, value)| *sum += value);
    }
}

multiversion!(fn layer_backward_rows(dx: &mut [f32], dweight: &mut [f32], dbias: &mut [f32], dout: &[f32], x: &[f32], inverse: &[f32], weight: &[f32]) = layer_backward_rows_inner);

/// With `n = (x - mean) * inverse` and `g = dout * weight`: `dx = inverse * (g - mean(g) - n * mean(g * n))`.
#[inline(always)]
fn layer_backward_rows_inner<const FMA: bool>(
    dx: &mut [f32],
    dweight: &mut [f32],
    dbias: &mut [f32],
    dout: &[f32],
    x: &[f32],
    inverse: &[f32],
    weight: &[f32],
) {
    let hidden = weight.len();
    let (mut normed, mut scaled) = (vec![0.0; hidden], vec![0.0; hidden]);
    for (((dx, dout), x), inverse) in dx.chunks_exact_mut(hidden).zip(dout.chunks_exact(hidden)).zip(x.chunks_exact(hidden)).zip(inverse) {
        let mean = sum(x) / hidden as f32;
        for column in 0..hidden {
            normed[column] = (x[column] - mean) * *inverse;
            scaled[column] = dout[column] * weight[column];
            dweight[column] = fmadd::<FMA>(dout[column], normed[column], dweight[column]);
            dbias[column] += dout[column];
        }
        let mean_gradient = sum(&scaled) / hidden as f32;
        let along = dot_lanes::<FMA>(&scaled, &normed) / hidden as f32;
        for ((dx, scaled), normed) in dx.iter_mut().zip(&scaled).zip(&normed) {
            *dx = fmadd::<FMA>(*inverse, scaled - mean_gradient - normed * along, *dx);
        }
    }
}

multiversion!(
    /// Dot product of two rows of equal length.
    pub fn dot(a: &[f32], b: &[f32]) -> f32 = dot_lanes
);
