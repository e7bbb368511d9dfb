//! The attention half of a decoder block as one operation: `x + attention(rms_norm(x))`.

use crate::{
    attention::{Heads, attention, attention_backward},
    layout::SequenceLayout,
    matmul::{MatrixRef, matmul, matmul_add},
    norm::{rms_norm, rms_norm_backward},
    rope::RopeTable,
};

/// How positions enter.
#[derive(Clone, Copy)]
pub enum Positional<'a> {
    /// Rotary embedding of queries and keys.
    Rope(&'a RopeTable),
    /// ALiBi slopes, `[heads]`.
    Alibi(&'a [f32]),
}

impl<'a> Positional<'a> {
    fn slopes(self) -> &'a [f32] {
        match self {
            Self::Rope(_) => &[],
            Self::Alibi(slopes) => slopes,
        }
    }

    fn rotate(self, rows: &mut [f32], layout: &SequenceLayout, inverse: bool) {
        if let Self::Rope(table) = self {
            table.rotate(rows, layout.positions(), inverse);
        }
    }
}

/// Sizes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Heads.
    pub heads: Heads,
    /// Epsilon of the norm.
    pub eps: f32,
}

/// Weights, each `[out, in]` row-major as in Llama checkpoints.
#[derive(Clone, Copy)]
pub struct AttentionWeights<'a> {
    /// `[hidden]`
    pub norm: &'a [f32],
    /// `[heads * head_dim, hidden]`
    pub q: &'a [f32],
    /// `[kv_heads * head_dim, hidden]`
    pub k: &'a [f32],
    /// `[kv_heads * head_dim, hidden]`
    pub v: &'a [f32],
    /// `[hidden, heads * head_dim]`
    pub o: &'a [f32],
}

/// What the backward pass needs.
#[derive(Debug, Clone)]
pub struct AttentionSaved {
    inverse: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    out: Vec<f32>,
    log_sum_exp: Vec<f32>,
}

impl AttentionSaved {
    /// Keys (rotated) and values, `[tokens, kv_heads * head_dim]` each: the prompt's part of a key-value cache.
    pub fn keys_and_values(&self) -> (&[f32], &[f32]) {
        (&self.k, &self.v)
    }

    /// Bytes held.
    pub fn size_bytes(&self) -> usize {
        4 * (self.inverse.len() + self.q.len() + self.k.len() + self.v.len() + self.out.len() + self.log_sum_exp.len())
    }
}

/// Gradients, shaped as what they belong to.
#[allow(missing_docs)]
pub struct AttentionGrads {
    pub x: Vec<f32>,
    pub norm: Vec<f32>,
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
    pub o: Vec<f32>,
}

/// `x + attention(rms_norm(x))`, `[tokens, hidden]`.
pub fn forward(
    x: &[f32],
    weights: AttentionWeights<'_>,
    positional: Positional<'_>,
    shape: AttentionShape,
    layout: &SequenceLayout,
) -> (Vec<f32>, AttentionSaved) {
    let (tokens, hidden) = (layout.tokens(), shape.hidden);
    let (query_width, kv_width) = (shape.heads.query_width(), shape.heads.kv_width());
    let (mut normed, mut inverse) = (vec![0.0; tokens * hidden], vec![0.0; tokens]);
    rms_norm(&mut normed, &mut inverse, x, weights.norm, shape.eps);
    let project = |weight: &[f32], width: usize| {
        let mut out = vec![0.0; tokens * width];
        matmul(&mut out, MatrixRef::new(&normed, tokens, hidden), MatrixRef::new(weight, width, hidden).t());
        out
    };
    let (mut q, mut k, v) = (project(weights.q, query_width), project(weights.k, kv_width), project(weights.v, kv_width));
    positional.rotate(&mut q, layout, false);
    positional.rotate(&mut k, layout, false);
    let (mut out, mut log_sum_exp) = (vec![0.0; tokens * query_width], vec![0.0; shape.heads.heads * tokens]);
    attention(&mut out, &mut log_sum_exp, &q, &k, &v, positional.slopes(), shape.heads, layout);
    let mut y = x.to_vec();
    matmul_add(&mut y, MatrixRef::new(&out, tokens, query_width), MatrixRef::new(weights.o, hidden, query_width).t());
    (y, AttentionSaved { inverse, q, k, v, out, log_sum_exp })
}

/// Gradients of [`forward`] for the gradient `dy` of its result.
pub fn backward(
    dy: &[f32],
    x: &[f32],
    saved: &AttentionSaved,
    weights: AttentionWeights<'_>,
    positional: Positional<'_>,
    shape: AttentionShape,
    layout: &SequenceLayout,
) -> AttentionGrads {
    let (tokens, hidden) = (layout.tokens(), shape.hidden);
    let (query_width, kv_width) = (shape.heads.query_width(), shape.heads.kv_width());
    let dy_rows = MatrixRef::new(dy, tokens, hidden);
    let mut dout = vec![0.0; tokens * query_width];
    matmul(&mut dout, dy_rows, MatrixRef::new(weights.o, hidden, query_width));
    let mut o = vec![0.0; hidden * query_width];
    matmul(&mut o, dy_rows.t(), MatrixRef::new(&saved.out, tokens, query_width));

    let (mut dq, mut dk, mut dv) = (vec![0.0; tokens * query_width], vec![0.0; tokens * kv_width], vec![0.0; tokens * kv_width]);
    let AttentionSaved { inverse, q, k, v, out, log_sum_exp } = saved;
    attention_backward(&mut dq, &mut dk, &mut dv, &dout, out, log_sum_exp, q, k, v, positional.slopes(), shape.heads, layout);
    positional.rotate(&mut dq, layout, true);
    positional.rotate(&mut dk, layout, true);

    // The normalised input is cheaper to compute again than to keep.
    let (mut normed, mut unused) = (vec![0.0; tokens * hidden], vec![0.0; tokens]);
    rms_norm(&mut normed, &mut unused, x, weights.norm, shape.eps);
    let mut dnormed = vec![0.0; tokens * hidden];
    let mut project = |dout: &[f32], weight: &[f32], width: usize| {
        let dout = MatrixRef::new(dout, tokens, width);
        matmul_add(&mut dnormed, dout, MatrixRef::new(weight, width, hidden));
        let mut dweight = vec![0.0; width * hidden];
        matmul(&mut dweight, dout.t(), MatrixRef::new(&normed, tokens, hidden));
        dweight
    };
    let (q, k, v) = (project(&dq, weights.q, query_width), project(&dk, weights.k, kv_width), project(&dv, weights.v, kv_width));
    let (mut dx, mut norm) = (dy.to_vec(), vec![0.0; hidden]);
    rms_norm_backward(&mut dx, &mut norm, &dnormed, x, inverse, weights.norm);
    AttentionGrads { x: dx, norm, q, k, v, o }
}
