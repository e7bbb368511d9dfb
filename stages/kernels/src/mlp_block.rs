//! The feed-forward half of a decoder block as one operation, with `n = norm(x)`: `x + down(silu(gate(n)) * up(n))`
//! (SwiGLU, arXiv:2002.05202), or without a gate `x + down(gelu(up(n)))`.

use rayon::prelude::*;

use crate::{
    affine::{Affine, MlpParts, Projecting},
    low_rank::{Dropout, Projection},
    matmul::{Arithmetic, Into},
    memory::{copied, zeros},
    norm::{norm, norm_backward},
    simd::{fmadd, multiversion, sigmoid},
};

/// Elements per parallel task.
const BLOCK: usize = 8_192;

/// Weights, each projection `[out, in]` row-major.
pub type MlpWeights<'a> = MlpParts<&'a [f32]>;

/// What the backward pass needs.
#[derive(Debug, Clone)]
pub struct MlpSaved {
    inverse: Vec<f32>,
    gate: Option<Vec<f32>>,
    up: Vec<f32>,
}

impl MlpSaved {
    /// Bytes held.
    pub fn size_bytes(&self) -> usize {
        4 * (self.inverse.len() + self.gate.as_ref().map_or(0, Vec::len) + self.up.len())
    }
}

/// Gradients, shaped as what they belong to.
#[allow(missing_docs)]
pub struct MlpGrads {
    pub x: Vec<f32>,
    pub weights: MlpParts<Vec<f32>>,
}

/// The block's result, `[tokens, hidden]`.
pub fn forward(x: &[f32], weights: MlpWeights<'_>, eps: f32, arithmetic: Arithmetic, dropout: Dropout<'_>) -> (Vec<f32>, MlpSaved) {
    let hidden = weights.norm.weight.len();
    let (tokens, intermediate) = (x.len() / hidden, weights.up.weight.len() / hidden);
    let (mut normed, mut inverse) = (zeros(tokens * hidden), zeros(tokens));
    norm(&mut normed, &mut inverse, x, weights.norm, eps);
    let projected = |projection: Projection, part: Affine<&[f32]>| {
        let mut out = zeros(tokens * intermediate);
        Projecting { arithmetic, projection, dropout }.forward(&mut out, Into::Overwrite, &normed, part, tokens);
        out
    };
    let (gate, up) = (weights.gate.map(|gate| projected(Projection::Gate, gate)), projected(Projection::Up, weights.up));
    let mut activated = zeros(tokens * intermediate);
    match &gate {
        Some(gate) => activated
            .par_chunks_mut(BLOCK)
            .zip(gate.par_chunks(BLOCK))
            .zip(up.par_chunks(BLOCK))
            .for_each(|((out, gate), up)| swiglu(out, gate, up)),
        None => activated.par_chunks_mut(BLOCK).zip(up.par_chunks(BLOCK)).for_each(|(out, up)| gelu(out, up)),
    }
    let mut y = copied(x);
    Projecting { arithmetic, projection: Projection::Down, dropout }.forward(&mut y, Into::Add, &activated, weights.down, tokens);
    (y, MlpSaved { inverse, gate, up })
}

/// Gradients of [`forward`] for the gradient `dy` of its result; with `frozen` none of the projections' weights.
pub fn backward(
    dy: &[f32],
    x: &[f32],
    saved: &MlpSaved,
    weights: MlpWeights<'_>,
    eps: f32,
    arithmetic: Arithmetic,
    dropout: Dropout<'_>,
    frozen: bool,
) -> MlpGrads {
    let hidden = weights.norm.weight.len();
    let (tokens, intermediate) = (x.len() / hidden, weights.up.weight.len() / hidden);
    let mut dactivated = zeros(tokens * intermediate);
    let projecting = |projection: Projection| Projecting { arithmetic, projection, dropout };
    projecting(Projection::Down).backward_input(&mut dactivated, Into::Overwrite, dy, weights.down, tokens);
    let mut activated = zeros(tokens * intermediate);
    let (mut dgate, mut dup) = (saved.gate.as_deref().map(copied), copied(&saved.up));
    match &mut dgate {
        Some(dgate) => activated
            .par_chunks_mut(BLOCK)
            .zip(dgate.par_chunks_mut(BLOCK))
            .zip(dup.par_chunks_mut(BLOCK))
            .zip(dactivated.par_chunks(BLOCK))
            .for_each(|(((activated, gate), up), dout)| swiglu_backward(activated, gate, up, dout)),
        None => activated
            .par_chunks_mut(BLOCK)
            .zip(dup.par_chunks_mut(BLOCK))
            .zip(dactivated.par_chunks(BLOCK))
            .for_each(|((activated, up), dout)| gelu_backward(activated, up, dout)),
    }
    let down = projecting(Projection::Down).backward_parts(dy, &activated, weights.down, tokens, frozen);

    let (mut normed, mut unused) = (zeros(tokens * hidden), zeros(tokens));
    norm(&mut normed, &mut unused, x, weights.norm, eps);
    let mut dnormed = zeros(tokens * hidden);
    let mut projected = |projection: Projection, dout: &[f32], part: Affine<&[f32]>| {
        projecting(projection).backward_input(&mut dnormed, Into::Add, dout, part, tokens);
        projecting(projection).backward_parts(dout, &normed, part, tokens, frozen)
    };
    let gate = dgate.zip(weights.gate).map(|(dgate, gate)| projected(Projection::Gate, &dgate, gate));
    let up = projected(Projection::Up, &dup, weights.up);
    let mut dx = copied(dy);
    let norm = norm_backward(&mut dx, &dnormed, x, &saved.inverse, weights.norm);
    MlpGrads { x: dx, weights: MlpParts { norm, gate, up, down } }
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

multiversion!(
    /// `out = gelu(x)` in its tanh form (arXiv:1606.08415), element by element.
    pub fn gelu(out: &mut [f32], x: &[f32]) = gelu_inner
);

/// `sqrt(2 / pi)`
const GELU_SCALE: f32 = 0.797_884_6;
const GELU_CUBIC: f32 = 0.044_715;

/// `(1 + tanh(u)) / 2 = sigmoid(2u)` with `u = scale (x + cubic x^3)`.
#[inline(always)]
fn gelu_gate<const FMA: bool>(x: f32) -> f32 {
    sigmoid::<FMA>(2.0 * GELU_SCALE * fmadd::<FMA>(GELU_CUBIC * x * x, x, x))
}

#[inline(always)]
fn gelu_inner<const FMA: bool>(out: &mut [f32], x: &[f32]) {
    for (out, x) in out.iter_mut().zip(x) {
        *out = x * gelu_gate::<FMA>(*x);
    }
}

multiversion!(fn gelu_backward(activated: &mut [f32], x: &mut [f32], dout: &[f32]) = gelu_backward_inner);

/// `x` becomes its gradient; `activated` is the forward result again.
#[inline(always)]
fn gelu_backward_inner<const FMA: bool>(activated: &mut [f32], x: &mut [f32], dout: &[f32]) {
    for ((activated, x), dout) in activated.iter_mut().zip(x).zip(dout) {
        let gate = gelu_gate::<FMA>(*x);
        *activated = *x * gate;
        let slope = 2.0 * GELU_SCALE * fmadd::<FMA>(3.0 * GELU_CUBIC * *x, *x, 1.0);
        *x = dout * fmadd::<FMA>(*activated * (1.0 - gate), slope, gate);
    }
}
