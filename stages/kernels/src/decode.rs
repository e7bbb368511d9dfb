//! One token at a time over a key-value cache.

use rayon::prelude::*;

use crate::{
    AttentionShape, AttentionWeights, Positional,
    affine::{Affine, Projecting},
    attention::Heads,
    attention_block::norm_heads,
    low_rank::Projection,
    matmul::Into,
    norm::norm,
    simd::{dot, exp, fmadd, max, multiversion, sum},
};

/// Keys (rotated) and values of one sequence in one layer, `[capacity, kv_heads * head_dim]` each.
#[derive(Debug, Clone)]
pub struct LayerCache {
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl LayerCache {
    /// From the prompt's part of a packed prefill; room for `capacity` tokens is reserved at once.
    pub fn from_prefill(keys: &[f32], values: &[f32], rows: std::ops::Range<usize>, width: usize, capacity: usize) -> Self {
        let copy = |all: &[f32]| {
            let mut out = Vec::with_capacity(capacity.max(rows.len()) * width);
            out.extend_from_slice(&all[rows.start * width..rows.end * width]);
            out
        };
        Self { keys: copy(keys), values: copy(values) }
    }
}

/// Buffers that are used again at every step.
#[derive(Debug, Default)]
pub struct DecodeScratch {
    normed: Vec<f32>,
    inverse: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    out: Vec<f32>,
}

/// `x += attention(norm(x))` for one new token per sequence; its key and value are added to the caches.
///
/// # Shapes
/// - x: `[sequences, hidden]`; caches, positions: `[sequences]`
pub fn attention_step(
    x: &mut [f32],
    caches: &mut [&mut LayerCache],
    positions: &[u32],
    weights: AttentionWeights<'_>,
    positional: Positional<'_>,
    shape: AttentionShape,
    scratch: &mut DecodeScratch,
) {
    let (rows, hidden) = (caches.len(), shape.hidden);
    let (query_width, kv_width) = (shape.heads.query_width(), shape.heads.kv_width());
    let DecodeScratch { normed, inverse, q, k, v, out } = scratch;
    normed.resize(rows * hidden, 0.0);
    inverse.resize(rows, 0.0);
    norm(normed, inverse, x, weights.norm, shape.eps);
    let projecting = |projection: Projection| Projecting { arithmetic: shape.arithmetic, projection, dropout: None };
    let projected = |projection: Projection, out: &mut Vec<f32>, part: Affine<&[f32]>, width: usize| {
        out.resize(rows * width, 0.0);
        projecting(projection).forward(out, Into::Overwrite, normed, part, rows);
    };
    projected(Projection::Query, q, weights.q, query_width);
    projected(Projection::Key, k, weights.k, kv_width);
    projected(Projection::Value, v, weights.v, kv_width);
    norm_heads(q, weights.q_norm, shape.eps);
    norm_heads(k, weights.k_norm, shape.eps);
    positional.rotate(q, positions, false);
    positional.rotate(k, positions, false);
    let slopes = positional.slopes();
    out.resize(rows * query_width, 0.0);
    out.par_chunks_mut(query_width)
        .zip(caches.par_iter_mut())
        .zip(q.par_chunks(query_width))
        .zip(k.par_chunks(kv_width).zip(v.par_chunks(kv_width)))
        .for_each(|(((out, cache), q), (k, v))| {
            cache.keys.extend_from_slice(k);
            cache.values.extend_from_slice(v);
            // What has left the window is kept, and not looked at.
            let hidden = shape.window.map_or(0, |window| cache.keys.len().saturating_sub(window * kv_width));
            attend(out, q, &cache.keys[hidden..], &cache.values[hidden..], slopes, shape.heads);
        });
    projecting(Projection::Output).forward(x, Into::Add, out, weights.o, rows);
}

multiversion!(fn attend(out: &mut [f32], q: &[f32], keys: &[f32], values: &[f32], slopes: &[f32], heads: Heads) = attend_inner);

/// One query against all cached keys.
#[inline(always)]
fn attend_inner<const FMA: bool>(out: &mut [f32], q: &[f32], keys: &[f32], values: &[f32], slopes: &[f32], heads: Heads) {
    let (head_dim, width) = (heads.head_dim, heads.kv_width());
    let group = heads.heads / heads.kv_heads;
    let scale = 1.0 / (head_dim as f32).sqrt();
    let length = keys.len() / width;
    let mut scores = vec![0.0; length];
    for (head, (out, q)) in out.chunks_exact_mut(head_dim).zip(q.chunks_exact(head_dim)).enumerate() {
        let offset = head / group * head_dim;
        let slope = slopes.get(head).copied().unwrap_or(0.0);
        for (position, (score, key)) in scores.iter_mut().zip(keys.chunks_exact(width)).enumerate() {
            *score = dot::<FMA>(q, &key[offset..offset + head_dim]) * scale - slope * (length - 1 - position) as f32;
        }
        let largest = max(&scores);
        scores.iter_mut().for_each(|score| *score = exp::<FMA>(*score - largest));
        let inverse = 1.0 / sum(&scores);
        out.fill(0.0);
        for (score, value) in scores.iter().zip(values.chunks_exact(width)) {
            let weight = score * inverse;
            for (out, value) in out.iter_mut().zip(&value[offset..offset + head_dim]) {
                *out = fmadd::<FMA>(weight, *value, *out);
            }
        }
    }
}
