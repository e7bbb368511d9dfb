//! The feed-forward half of a decoder block as one operation: `x + down(silu(gate(n)) * up(n))` with `n = rms_norm(x)`
//! (SwiGLU, arXiv:2002.05202).

use rayon::prelude::*;

use crate::{
    matmul::{MatrixRef, matmul, matmul_add},
    norm::{rms_norm, rms_norm_backward},
    simd::{fmadd, multiversion, sigmoid},
};

/// Elements per parallel task.
const BLOCK: usize = 8_192;

/// Weights, each `[out, in]` row-major.
#[derive(Clone, Copy)]
pub struct MlpWeights<'a> {
    /// `[hidden]`
    pub norm: &'a [f32],
    /// `[intermediate, hidden]`
    pub gate: &'a [f32],
    /// `[intermediate, hidden]`
    pub up: &'a [f32],
    /// `[hidden, intermediate]`
    pub down: &'a [f32],
}

/// What the backward pass needs.
#[derive(Debug, Clone)]
pub struct MlpSaved {
    inverse: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
}

impl MlpSaved {
    /// Bytes held.
    pub fn size_bytes(&self) -> usize {
        4 * (self.inverse.len() + self.gate.len() + self.up.len())
    }
}

/// Gradients, shaped as what they belong to.
#[allow(missing_docs)]
pub struct MlpGrads {
    pub x: Vec<f32>,
    pub norm: Vec<f32>,
    pub gate: Vec<f32>,
    pub up: Vec<f32>,
    pub down: Vec<f32>,
}

/// The block's result, `[tokens, hidden]`.
pub fn forward(x: &[f32], weights: MlpWeights<'_>, eps: f32) -> (Vec<f32>, MlpSaved) {
    let hidden = weights.norm.len();
    let (tokens, intermediate) = (x.len() / hidden, weights.gate.len() / hidden);
    let (mut normed, mut inverse) = (vec![0.0; tokens * hidden], vec![0.0; tokens]);
    rms_norm(&mut normed, &mut inverse, x, weights.norm, eps);
    let project = |weight: &[f32]| {
        let mut out = vec![0.0; tokens * intermediate];
        matmul(&mut out, MatrixRef::new(&normed, tokens, hidden), MatrixRef::new(weight, intermediate, hidden).t());
        out
    };
    let (gate, up) = (project(weights.gate), project(weights.up));
    let mut activated = vec![0.0; tokens * intermediate];
    activated
        .par_chunks_mut(BLOCK)
        .zip(gate.par_chunks(BLOCK))
        .zip(up.par_chunks(BLOCK))
        .for_each(|((out, gate), up)| swiglu(out, gate, up));
    let mut y = x.to_vec();
    matmul_add(&mut y, MatrixRef::new(&activated, tokens, intermediate), MatrixRef::new(weights.down, hidden, intermediate).t());
    (y, MlpSaved { inverse, gate, up })
}

/// Gradients of [`forward`] for the gradient `dy` of its result.
pub fn backward(dy: &[f32], x: &[f32], saved: &MlpSaved, weights: MlpWeights<'_>, eps: f32) -> MlpGrads {
    let hidden = weights.norm.len();
    let (tokens, intermediate) = (x.len() / hidden, weights.gate.len() / hidden);
    let dy_rows = MatrixRef::new(dy, tokens, hidden);
    let mut dactivated = vec![0.0; tokens * intermediate];
    matmul(&mut dactivated, dy_rows, MatrixRef::new(weights.down, hidden, intermediate));
    let mut activated = vec![0.0; tokens * intermediate];
    let (mut dgate, mut dup) = (saved.gate.clone(), saved.up.clone());
    activated
        .par_chunks_mut(BLOCK)
        .zip(dgate.par_chunks_mut(BLOCK))
        .zip(dup.par_chunks_mut(BLOCK))
        .zip(dactivated.par_chunks(BLOCK))
        .for_each(|(((activated, gate), up), dout)| swiglu_backward(activated, gate, up, dout));
    let mut down = vec![0.0; hidden * intermediate];
    matmul(&mut down, dy_rows.t(), MatrixRef::new(&activated, tokens, intermediate));

    let (mut normed, mut unused) = (vec![0.0; tokens * hidden], vec![0.0; tokens]);
    rms_norm(&mut normed, &mut unused, x, weights.norm, eps);
    let mut dnormed = vec![0.0; tokens * hidden];
    let mut project = |dout: &[f32], weight: &[f32]| {
        let dout = MatrixRef::new(dout, tokens, intermediate);
        matmul_add(&mut dnormed, dout, MatrixRef::new(weight, intermediate, hidden));
        let mut dweight = vec![0.0; intermediate * hidden];
        matmul(&mut dweight, dout.t(), MatrixRef::new(&normed, tokens, hidden));
        dweight
    };
    let (gate, up) = (project(&dgate, weights.gate), project(&dup, weights.up));
    let (mut dx, mut norm) = (dy.to_vec(), vec![0.0; hidden]);
    rms_norm_backward(&mut dx, &mut norm, &dnormed, x, &saved.inverse, weights.norm);
    MlpGrads { x: dx, norm, gate, up, down }
}

multiversion!(
    /// `out = silu(gate) * up`, element by element.
    pub fn swiglu(out: &mut [f32], gate: &[f32], up: &[f32]) = swiglu_inner
);

#[inline(always)]
fn swiglu_inner<const FMA: bool>(out: &mut [f32], gate: &[f32], up: &[f32]) {
    for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
        *out = gate * sigmoid::<FMA>(*gate) * up;
    }
}

multiversion!(fn swiglu_backward(activated: &mut [f32], gate: &mut [f32], up: &mut [f32], dout: &[f32]) = swiglu_backward_inner);

/// `gate` and `up` become their gradients; `activated` is the forward result again.
#[inline(always)]
fn swiglu_backward_inner<const FMA: bool>(activated: &mut [f32], gate: &mut [f32], up: &mut [f32], dout: &[f32]) {
    for (((activated, gate), up), dout) in activated.iter_mut().zip(gate).zip(up).zip(dout) {
        let sigmoid = sigmoid::<FMA>(*gate);
        let silu = *gate * sigmoid;
        *activated = silu * *up;
        let dsilu = fmadd::<FMA>(silu, 1.0 - sigmoid, sigmoid);
        *gate = dout * *up * dsilu;
        *up = dout * silu;
    }
}
