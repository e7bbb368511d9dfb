//! The fused operations from plain tensor operations: for devices without kernels of their own, and for tests.
//!
//! Attention here materialises the scores of the whole packed batch; that is what the fused version avoids.

use std::sync::Arc;

use burn::tensor::{Bool, Device, FloatDType, Int, Tensor, TensorData, activation};

use rlflow_kernels::{Affine, Projection, matmul::Arithmetic};

use crate::{
    dropout::BlockDropout,
    fused::{AttentionContext, AttentionTensors, MlpContext, MlpTensors, TokenTargets},
    parameters::widened,
};

fn indices(rows: &[u32], device: &Device) -> Tensor<1, Int> {
    let rows: Vec<i32> = rows.iter().map(|row| *row as i32).collect();
    let count = rows.len();
    Tensor::from_data(TensorData::new(rows, [count]), &device.clone().inner())
}

/// Embedding rows of `ids`.
pub fn embed(weight: Tensor<2>, ids: Arc<[u32]>) -> Tensor<2> {
    let ids = indices(&ids, &weight.device());
    widened(weight.select(0, ids))
}

/// RMSNorm.
pub fn rms_norm(x: Tensor<2>, weight: Tensor<2>, eps: f32) -> Tensor<2> {
    let inverse = ((x.clone() * x.clone()).mean_dim(1) + eps).sqrt().recip();
    x * inverse * weight
}

/// LayerNorm where there is a bias, else RMSNorm.
pub fn norm(x: Tensor<2>, part: Affine<Tensor<2>>, eps: f32) -> Tensor<2> {
    let Some(bias) = part.bias else { return rms_norm(x, part.weight, eps) };
    let centred = x.clone() - x.mean_dim(1);
    rms_norm(centred, part.weight, eps) + bias
}

/// What a product takes of an operand.
fn rounded(x: Tensor<2>, arithmetic: Arithmetic) -> Tensor<2> {
    match arithmetic {
        Arithmetic::F32 => widened(x),
        Arithmetic::Bf16 => x.cast(FloatDType::BF16).cast(FloatDType::F32),
    }
}

/// How a half of a block projects.
struct Projecting<'a> {
    arithmetic: Arithmetic,
    dropout: Option<&'a BlockDropout>,
}

impl Projecting<'_> {
    /// `x weight^T + bias`, and the low-rank addition.
    fn project(&self, projection: Projection, x: Tensor<2>, part: Affine<Tensor<2>>) -> Tensor<2> {
        let product = |x: Tensor<2>, weight: Tensor<2>| rounded(x, self.arithmetic).matmul(rounded(weight, self.arithmetic).transpose());
        let out = product(x.clone(), part.weight);
        let out = match part.bias {
            Some(bias) => out + bias,
            None => out,
        };
        let Some(low_rank) = part.low_rank else { return out };
        let seen = match self.dropout {
            Some(dropout) => {
                let mut factors = vec![1.0; x.dims().iter().product()];
                dropout.apply(projection, &mut factors);
                let factors = Tensor::from_data(TensorData::new(factors, x.dims()), &x.device().inner());
                x.clone() * on(factors, &x.device())
            }
            None => x,
        };
        out + product(product(seen, low_rank.a) * low_rank.scale, low_rank.b)
    }
}

/// `x + attention(norm(x))`.
pub fn attention(x: Tensor<2>, weights: AttentionTensors, context: AttentionContext) -> Tensor<2> {
    let AttentionContext { shape, rope, slopes, layout, dropout } = context;
    let projecting = Projecting { arithmetic: shape.arithmetic, dropout: dropout.as_ref() };
    let (tokens, heads) = (layout.tokens(), shape.heads);
    let device = x.device();
    let normed = norm(x.clone(), weights.norm, shape.eps);
    let split = |projection: Projection, part: Affine<Tensor<2>>, head_norm: Option<Tensor<2>>, count: usize| {
        let mut rows = projecting.project(projection, normed.clone(), part);
        if let Some(weight) = head_norm {
            rows = rms_norm(rows.reshape([tokens * count, heads.head_dim]), weight, shape.eps);
        }
        rows.reshape([tokens, count, heads.head_dim]).swap_dims(0, 1)
    };
    let mut q = split(Projection::Query, weights.q, weights.q_norm, heads.heads);
    let mut k = split(Projection::Key, weights.k, weights.k_norm, heads.kv_heads);
    let v = split(Projection::Value, weights.v, None, heads.kv_heads);
    if let Some(table) = rope {
        let half = heads.head_dim / 2;
        let (cos, sin) = table.rows(layout.positions());
        let constant = |values: Vec<f32>| Tensor::<3>::from_data(TensorData::new(values, [1, tokens, half]), &device.clone().inner());
        let (cos, sin) = (on(constant(cos), &device), on(constant(sin), &device));
        let rotate = |x: Tensor<3>| {
            let (first, second) = (x.clone().narrow(2, 0, half), x.narrow(2, half, half));
            let a = first.clone() * cos.clone() - second.clone() * sin.clone();
            let b = second * cos.clone() + first * sin.clone();
            Tensor::cat(vec![a, b], 2)
        };
        (q, k) = (rotate(q), rotate(k));
    }
    let group = heads.heads / heads.kv_heads;
    let expand = |x: Tensor<3>| x.unsqueeze_dim::<4>(1).repeat_dim(1, group).reshape([heads.heads, tokens, heads.head_dim]);
    let (k, v) = (expand(k), expand(v));
    let mut scores = q.matmul(k.swap_dims(1, 2)) * (1.0 / (heads.head_dim as f32).sqrt());
    let (hidden, distance) = masks(&layout, shape.window);
    if !slopes.is_empty() {
        let mut bias = Vec::with_capacity(heads.heads * tokens * tokens);
        for slope in slopes.iter() {
            bias.extend(distance.iter().map(|distance| -slope * distance));
        }
        let bias = Tensor::<3>::from_data(TensorData::new(bias, [heads.heads, tokens, tokens]), &device.clone().inner());
        scores = scores + on(bias, &device);
    }
    let hidden = Tensor::<3, Bool>::from_data(TensorData::new(hidden, [1, tokens, tokens]), &device.clone().inner());
    let scores = scores.mask_fill(hidden.repeat_dim(0, heads.heads), f32::NEG_INFINITY);
    let out = activation::softmax(scores, 2).matmul(v);
    let out = out.swap_dims(0, 1).reshape([tokens, heads.query_width()]);
    x + projecting.project(Projection::Output, out, weights.o)
}

/// Lifts a constant onto the autodiff context of `device`.
fn on<const D: usize>(tensor: Tensor<D>, device: &Device) -> Tensor<D> {
    if device.is_autodiff() { tensor.autodiff() } else { tensor }
}

/// `[tokens, tokens]`: whether the query (row) must not see the key (column), and how far back the key stands.
fn masks(layout: &rlflow_kernels::SequenceLayout, window: Option<usize>) -> (Vec<bool>, Vec<f32>) {
    let tokens = layout.tokens();
    let (mut hidden, mut distance) = (vec![true; tokens * tokens], vec![0.0; tokens * tokens]);
    for sequence in 0..layout.sequences() {
        let range = layout.range(sequence);
        for query in range.clone() {
            let first = window.map_or(range.start, |window| range.start.max((query + 1).saturating_sub(window)));
            for key in first..=query {
                hidden[query * tokens + key] = false;
                distance[query * tokens + key] = (query - key) as f32;
            }
        }
    }
    (hidden, distance)
}

/// `x + mlp(norm(x))`.
pub fn mlp(x: Tensor<2>, weights: MlpTensors, context: MlpContext) -> Tensor<2> {
    let normed = norm(x.clone(), weights.norm, context.eps);
    let projecting = Projecting { arithmetic: context.arithmetic, dropout: context.dropout.as_ref() };
    let up = projecting.project(Projection::Up, normed.clone(), weights.up);
    let activated = match weights.gate {
        Some(gate) => activation::silu(projecting.project(Projection::Gate, normed, gate)) * up,
        None => gelu(up),
    };
    x + projecting.project(Projection::Down, activated, weights.down)
}

/// GELU in its tanh form (arXiv:1606.08415).
fn gelu(x: Tensor<2>) -> Tensor<2> {
    let inner = (x.clone() + x.clone() * x.clone() * x.clone() * 0.044_715) * (2.0 / std::f64::consts::PI).sqrt();
    x * 0.5 * (inner.tanh() + 1.0)
}

/// Log-probabilities (row 0), entropies (1), whether no token is more probable than the target (2), mean logits (3): `[4, rows]`.
pub fn token_head(hidden: Tensor<2>, weight: Tensor<2>, targets: TokenTargets, arithmetic: Arithmetic) -> Tensor<2> {
    let device = hidden.device();
    let count = targets.rows.len();
    let rows = hidden.select(0, indices(&targets.rows, &device));
    let logits = rounded(rows, arithmetic).matmul(rounded(weight, arithmetic).transpose()) * targets.scale;
    let logprobs = activation::log_softmax(logits.clone(), 1);
    let picked = logprobs.clone().gather(1, indices(&targets.targets, &device).reshape([count, 1]));
    let correct = picked.clone().detach().greater_equal(logprobs.clone().detach().max_dim(1)).float();
    let entropy = (logprobs.clone().exp() * logprobs).sum_dim(1).neg();
    Tensor::cat(vec![picked, entropy, correct, logits.detach().mean_dim(1)], 1).transpose()
}

/// Scalar head, `[1, rows]`.
pub fn score(hidden: Tensor<2>, weight: Tensor<2>, rows: Arc<[u32]>) -> Tensor<2> {
    let rows = indices(&rows, &hidden.device());
    hidden.select(0, rows).matmul(weight.transpose()).transpose()
}

/// A scalar whose backward pass gives `output` the gradient `gradient`.
pub fn root(output: Tensor<2>, gradient: Tensor<2>) -> Tensor<2> {
    (output * gradient.autodiff()).sum().unsqueeze()
}
