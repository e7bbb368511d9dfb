//! AdamW and the global gradient norm.

use rayon::prelude::*;

use crate::simd::multiversion;

/// Elements per parallel task and per partial sum.
const BLOCK: usize = 16_384;

/// Settings of one AdamW step (arXiv:1711.05101), with torch's definitions.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// Steps done including this one, from 1.
    pub step: u64,
    /// Factor on the gradient (loss scale and clipping).
    pub grad_scale: f32,
}

/// Updates `param` and its moments in place.
pub fn adamw(param: &mut [f32], grad: &[f32], first: &mut [f32], second: &mut [f32], settings: AdamW) {
    param
        .par_chunks_mut(BLOCK)
        .zip(grad.par_chunks(BLOCK))
        .zip(first.par_chunks_mut(BLOCK))
        .zip(second.par_chunks_mut(BLOCK))
        .for_each(|(((param, grad), first), second)| adamw_block(param, grad, first, second, settings));
}

multiversion!(fn adamw_block(param: &mut [f32], grad: &[f32], first: &mut [f32], second: &mut [f32], settings: AdamW) = adamw_inner);

#[inline(always)]
fn adamw_inner<const FMA: bool>(param: &mut [f32], grad: &[f32], first: &mut [f32], second: &mut [f32], settings: AdamW) {
    let AdamW { lr, beta1, beta2, eps, weight_decay, step, grad_scale } = settings;
    let correction1 = 1.0 - f64::from(beta1).powi(step as i32);
    let correction2 = 1.0 - f64::from(beta2).powi(step as i32);
    let step_size = (f64::from(lr) / correction1) as f32;
    let root_correction2 = correction2.sqrt() as f32;
    let decay = 1.0 - lr * weight_decay;
    for (((param, grad), first), second) in param.iter_mut().zip(grad).zip(first).zip(second) {
        let grad = grad * grad_scale;
        *first = beta1 * *first + (1.0 - beta1) * grad;
        *second = beta2 * *second + (1.0 - beta2) * grad * grad;
        let denominator = second.sqrt() / root_correction2 + eps;
        *param = *param * decay - step_size * (*first / denominator);
    }
}

/// Sum of squares of each row of `width` elements, in f64. Whoever holds whole rows gets the same sums for them.
pub fn row_squares(values: &[f32], width: usize) -> Vec<f64> {
    let width = width.max(1);
    let rows = (BLOCK / width).max(1);
    let mut sums = vec![0.0; values.len() / width];
    sums.par_chunks_mut(rows).zip(values.par_chunks(rows * width)).for_each(|(sums, values)| square_rows(sums, values, width));
    sums
}

multiversion!(fn square_rows(sums: &mut [f64], values: &[f32], width: usize) = square_rows_inner);

#[inline(always)]
fn square_rows_inner<const FMA: bool>(sums: &mut [f64], values: &[f32], width: usize) {
    for (sum, row) in sums.iter_mut().zip(values.chunks_exact(width)) {
        *sum = square_row(row);
    }
}

#[inline(always)]
fn square_row(values: &[f32]) -> f64 {
    let mut lanes = [0.0f64; 8];
    let (chunks, tail) = values.as_chunks::<8>();
    for chunk in chunks {
        for lane in 0..8 {
            lanes[lane] += f64::from(chunk[lane]) * f64::from(chunk[lane]);
        }
    }
    let tail: f64 = tail.iter().map(|value| f64::from(*value) * f64::from(*value)).sum();
    lanes.iter().sum::<f64>() + tail
}

/// `sum += value`, element by element.
pub fn add_assign(sum: &mut [f32], value: &[f32]) {
    sum.par_chunks_mut(BLOCK).zip(value.par_chunks(BLOCK)).for_each(|(sum, value)| {
        for (sum, value) in sum.iter_mut().zip(value) {
            *sum += value;
        }
    });
}
