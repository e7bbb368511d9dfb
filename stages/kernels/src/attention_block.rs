//! The attention half of a decoder block as one operation: `x + attention(norm(x))`.

use crate::{
    affine::{Affine, AttentionParts, Projecting},
    attention::{Heads, attention, attention_backward},
    layout::SequenceLayout,
    low_rank::{Dropout, Projection},
    matmul::{Arithmetic, Into},
    memory::{copied, zeros},
    norm::{norm, norm_backward, rms_norm, rms_norm_backward},
    rope::RopeTable,
};

/// How positions enter.
#[derive(Clone, Copy)]
pub enum Positional<'a> {
    /// Rotary embedding of queries and keys.
    Rope(&'a RopeTable),
    /// ALiBi slopes, `[heads]`.
    Alibi(&'a [f32]),
    /// Not here: they were added to the embedding.
    Embedded,
}

impl<'a> Positional<'a> {
    pub(crate) fn slopes(self) -> &'a [f32] {
        match self {
            Self::Alibi(slopes) => slopes,
            Self::Rope(_) | Self::Embedded => &[],
        }
    }

    pub(crate) fn rotate(self, rows: &mut [f32], positions: &[u32], inverse: bool) {
        if let Self::Rope(table) = self {
            table.rotate(rows, positions, inverse);
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
    /// Epsilon of the norms.
    pub eps: f32,
    /// A token sees itself and the `window - 1` tokens before it; all of them without a window.
    pub window: Option<usize>,
    /// Format of the projections' operands; scores and their gradients are f32 throughout.
    pub arithmetic: Arithmetic,
}

/// Weights, each projection `[out, in]` row-major as in Llama checkpoints.
pub type AttentionWeights<'a> = AttentionParts<&'a [f32]>;

/// Gradients, shaped as what they belong to.
#[allow(missing_docs)]
pub struct AttentionGrads {
    pub x: Vec<f32>,
    pub weights: AttentionParts<Vec<f32>>,
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
    q_norm: Option<HeadNormSaved>,
    k_norm: Option<HeadNormSaved>,
}

/// Queries or keys before their norm.
#[derive(Debug, Clone)]
struct HeadNormSaved {
    rows: Vec<f32>,
    inverse: Vec<f32>,
}

impl HeadNormSaved {
    fn size_bytes(&self) -> usize {
        4 * (self.rows.len() + self.inverse.len())
    }
}

/// RMSNorm of every head of `rows`, in place, where `weight` is there.
pub(crate) fn norm_heads(rows: &mut [f32], weight: Option<&[f32]>, eps: f32) {
    head_norm(rows, weight, eps);
}

fn head_norm(rows: &mut [f32], weight: Option<&[f32]>, eps: f32) -> Option<HeadNormSaved> {
    let weight = weight?;
    let mut saved = HeadNormSaved { rows: copied(rows), inverse: zeros(rows.len() / weight.len()) };
    rms_norm(rows, &mut saved.inverse, &saved.rows, weight, eps);
    Some(saved)
}

/// `rows`, the gradient of normed heads, becomes that of the heads before the norm. Returns the weight's.
fn head_norm_backward(rows: &mut [f32], saved: Option<&HeadNormSaved>, weight: Option<&[f32]>) -> Option<Vec<f32>> {
    let (saved, weight) = (saved?, weight?);
    let (mut before, mut dweight) = (zeros(rows.len()), zeros(weight.len()));
    rms_norm_backward(&mut before, &mut dweight, rows, &saved.rows, &saved.inverse, weight);
    rows.copy_from_slice(&before);
    Some(dweight)
}

impl AttentionSaved {
    /// Keys (rotated) and values, `[tokens, kv_heads * head_dim]` each: the prompt's part of a key-value cache.
    pub fn keys_and_values(&self) -> (&[f32], &[f32]) {
        (&self.k, &self.v)
    }

    /// Bytes held.
    pub fn size_bytes(&self) -> usize {
        let norms = [&self.q_norm, &self.k_norm].into_iter().flatten().map(HeadNormSaved::size_bytes).sum::<usize>();
        4 * (self.inverse.len() + self.q.len() + self.k.len() + self.v.len() + self.out.len() + self.log_sum_exp.len()) + norms
    }
}

/// `x + attention(norm(x))`, `[tokens, hidden]`.
pub fn forward(
    x: &[f32],
    weights: AttentionWeights<'_>,
    positional: Positional<'_>,
    shape: AttentionShape,
    layout: &SequenceLayout,
    dropout: Dropout<'_>,
) -> (Vec<f32>, AttentionSaved) {
    let (tokens, hidden) = (layout.tokens(), shape.hidden);
    let (query_width, kv_width) = (shape.heads.query_width(), shape.heads.kv_width());
    let (mut normed, mut inverse) = (zeros(tokens * hidden), zeros(tokens));
    norm(&mut normed, &mut inverse, x, weights.norm, shape.eps);
    let arithmetic = shape.arithmetic;
    let projected = |projection: Projection, part: Affine<&[f32]>, width: usize| {
        let mut out = zeros(tokens * width);
        Projecting { arithmetic, projection, dropout }.forward(&mut out, Into::Overwrite, &normed, part, tokens);
        out
    };
    let mut q = projected(Projection::Query, weights.q, query_width);
    let mut k = projected(Projection::Key, weights.k, kv_width);
    let v = projected(Projection::Value, weights.v, kv_width);
    let q_norm = head_norm(&mut q, weights.q_norm, shape.eps);
    let k_norm = head_norm(&mut k, weights.k_norm, shape.eps);
    positional.rotate(&mut q, layout.positions(), false);
    positional.rotate(&mut k, layout.positions(), false);
    let (mut out, mut log_sum_exp) = (zeros(tokens * query_width), zeros(shape.heads.heads * tokens));
    attention(&mut out, &mut log_sum_exp, &q, &k, &v, positional.slopes(), shape.heads, shape.window, layout);
    let mut y = copied(x);
    Projecting { arithmetic, projection: Projection::Output, dropout }.forward(&mut y, Into::Add, &out, weights.o, tokens);
    (y, AttentionSaved { inverse, q, k, v, out, log_sum_exp, q_norm, k_norm })
}

/// Gradients of [`forward`] for the gradient `dy` of its result; with `frozen` none of the projections' weights.
pub fn backward(
    dy: &[f32],
    x: &[f32],
    saved: &AttentionSaved,
    weights: AttentionWeights<'_>,
    positional: Positional<'_>,
    shape: AttentionShape,
    layout: &SequenceLayout,
    dropout: Dropout<'_>,
    frozen: bool,
) -> AttentionGrads {
    let (tokens, hidden) = (layout.tokens(), shape.hidden);
    let (query_width, kv_width) = (shape.heads.query_width(), shape.heads.kv_width());
    let mut dout = zeros(tokens * query_width);
    let projecting = |projection: Projection| Projecting { arithmetic: shape.arithmetic, projection, dropout };
    let output = projecting(Projection::Output);
    output.backward_input(&mut dout, Into::Overwrite, dy, weights.o, tokens);
    let o = output.backward_parts(dy, &saved.out, weights.o, tokens, frozen);

    let (mut dq, mut dk, mut dv) = (zeros(tokens * query_width), zeros(tokens * kv_width), zeros(tokens * kv_width));
    let AttentionSaved { inverse, q, k, v, out, log_sum_exp, .. } = saved;
    let slopes = positional.slopes();
    attention_backward(&mut dq, &mut dk, &mut dv, &dout, out, log_sum_exp, q, k, v, slopes, shape.heads, shape.window, layout);
    positional.rotate(&mut dq, layout.positions(), true);
    positional.rotate(&mut dk, layout.positions(), true);
    let q_norm = head_norm_backward(&mut dq, saved.q_norm.as_ref(), weights.q_norm);
    let k_norm = head_norm_backward(&mut dk, saved.k_norm.as_ref(), weights.k_norm);

    // The normalised input is cheaper to compute again than to keep.
    let (mut normed, mut unused) = (zeros(tokens * hidden), zeros(tokens));
    norm(&mut normed, &mut unused, x, weights.norm, shape.eps);
    let mut dnormed = zeros(tokens * hidden);
    let mut projected = |projection: Projection, dout: &[f32], part: Affine<&[f32]>| {
        projecting(projection).backward_input(&mut dnormed, Into::Add, dout, part, tokens);
        projecting(projection).backward_parts(dout, &normed, part, tokens, frozen)
    };
    let q = projected(Projection::Query, &dq, weights.q);
    let k = projected(Projection::Key, &dk, weights.k);
    let v = projected(Projection::Value, &dv, weights.v);
    let mut dx = copied(dy);
    let norm = norm_backward(&mut dx, &dnormed, x, inverse, weights.norm);
    AttentionGrads { x: dx, weights: AttentionParts { norm, q, k, v, o, q_norm, k_norm } }
}
