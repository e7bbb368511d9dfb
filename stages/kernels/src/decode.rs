//! One token at a time over a key-value cache.

use std::sync::Arc;

use rayon::prelude::*;

use crate::{
    AttentionShape, Positional,
    affine::{Affine, AttentionParts, MlpParts},
    attention::Heads,
    attention_block::norm_heads,
    few_rows::{Output, project},
    low_rank::{self, How, LowRank},
    matmul::{Arithmetic, Into, MatrixRef},
    mlp_block::{gelu, swiglu},
    norm::norm,
    simd::{LANES, exp, fmadd, max, multiversion, sum},
    weight::Weight,
};

/// Positions of a block of the cache: a vector of scores.
const BLOCK: usize = LANES;

/// Keys (rotated) and values of one sequence in one layer, in blocks of sixteen positions.
///
/// A block has `[kv_heads, head_dim, 16]` keys, so that one load brings the same coordinate of sixteen positions, and
/// `[kv_heads, 16, head_dim]` values. Whole blocks of a prompt are shared by all its answers.
#[derive(Debug, Clone)]
pub struct LayerCache {
    prompt: Arc<Blocks>,
    own: Blocks,
    len: usize,
}

#[derive(Debug, Clone, Default)]
struct Blocks {
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl Blocks {
    fn push(&mut self, at: usize, key: &[f32], value: &[f32], heads: Heads) {
        let (block_len, lane) = (heads.kv_width() * BLOCK, at % BLOCK);
        if lane == 0 {
            self.keys.resize(self.keys.len() + block_len, 0.0);
            self.values.resize(self.values.len() + block_len, 0.0);
        }
        let start = self.keys.len() - block_len;
        for (coordinate, key) in key.iter().enumerate() {
            self.keys[start + coordinate * BLOCK + lane] = *key;
        }
        for (head, value) in value.chunks_exact(heads.head_dim).enumerate() {
            self.values[start + (head * BLOCK + lane) * heads.head_dim..][..heads.head_dim].copy_from_slice(value);
        }
    }
}

impl LayerCache {
    /// From the prompt's rows of a packed prefill.
    pub fn from_prefill(keys: &[f32], values: &[f32], rows: std::ops::Range<usize>, heads: Heads) -> Self {
        let (width, len) = (heads.kv_width(), rows.len());
        let (mut prompt, mut own) = (Blocks::default(), Blocks::default());
        let whole = len / BLOCK * BLOCK;
        for (at, row) in rows.enumerate() {
            let blocks = if at < whole { &mut prompt } else { &mut own };
            blocks.push(at, &keys[row * width..][..width], &values[row * width..][..width], heads);
        }
        Self { prompt: Arc::new(prompt), own, len }
    }

    fn push(&mut self, key: &[f32], value: &[f32], heads: Heads) {
        self.own.push(self.len, key, value, heads);
        self.len += 1;
    }

    /// Keys and values of block `index`.
    fn block(&self, index: usize, heads: Heads) -> (&[f32], &[f32]) {
        let block_len = heads.kv_width() * BLOCK;
        let of_prompt = self.prompt.keys.len() / block_len;
        let (blocks, index) = if index < of_prompt { (&*self.prompt, index) } else { (&self.own, index - of_prompt) };
        let range = index * block_len..(index + 1) * block_len;
        (&blocks.keys[range.clone()], &blocks.values[range])
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

/// Norms and biases as f32, matrices as they are held.
pub type DecodeAttention<'a> = AttentionParts<Weight<'a>>;
/// The same of a feed-forward half.
pub type DecodeMlp<'a> = MlpParts<Weight<'a>>;

/// `x += attention(norm(x))` for one new token per sequence; its key and value are added to the caches.
///
/// # Shapes
/// - x: `[sequences, hidden]`; caches, positions: `[sequences]`
pub fn attention_step(
    x: &mut [f32],
    caches: &mut [&mut LayerCache],
    positions: &[u32],
    weights: DecodeAttention<'_>,
    positional: Positional<'_>,
    shape: AttentionShape,
    scratch: &mut DecodeScratch,
) {
    let (rows, heads) = (caches.len(), shape.heads);
    let (query_width, kv_width) = (heads.query_width(), heads.kv_width());
    let DecodeScratch { normed, inverse, q, k, v, out } = scratch;
    norm_rows(normed, inverse, x, weights.norm, rows, shape.eps);
    q.resize(rows * query_width, 0.0);
    k.resize(rows * kv_width, 0.0);
    v.resize(rows * kv_width, 0.0);
    project(normed, rows, [(&mut *q, weights.q), (&mut *k, weights.k), (&mut *v, weights.v)].map(|(out, part)| written(out, part)));
    add_rest(q, normed, weights.q, rows);
    add_rest(k, normed, weights.k, rows);
    add_rest(v, normed, weights.v, rows);
    norm_heads(q, weights.q_norm.map(Weight::wide).as_deref(), shape.eps);
    norm_heads(k, weights.k_norm.map(Weight::wide).as_deref(), shape.eps);
    positional.rotate(q, positions, false);
    positional.rotate(k, positions, false);
    out.resize(rows * query_width, 0.0);
    out.par_chunks_mut(query_width)
        .zip(caches.par_iter_mut())
        .zip(q.par_chunks(query_width))
        .zip(k.par_chunks(kv_width).zip(v.par_chunks(kv_width)))
        .for_each(|(((out, cache), q), (k, v))| {
            cache.push(k, v, heads);
            attend(out, q, cache, positional.slopes(), shape);
        });
    project(out, rows, [Output { out: x, into: Into::Add, weight: weights.o.weight }]);
    add_rest(x, out, weights.o, rows);
}

/// `x += mlp(norm(x))`.
///
/// # Shapes
/// - x: `[sequences, hidden]`
pub fn mlp_step(x: &mut [f32], weights: DecodeMlp<'_>, rows: usize, eps: f32, scratch: &mut DecodeScratch) {
    let DecodeScratch { normed, inverse, q: gated, k: activated, .. } = scratch;
    norm_rows(normed, inverse, x, weights.norm, rows, eps);
    let intermediate = weights.up.weight.len() / (normed.len() / rows.max(1)).max(1);
    activated.resize(rows * intermediate, 0.0);
    match weights.gate {
        Some(gate) => {
            gated.resize(rows * intermediate, 0.0);
            project(normed, rows, [written(gated, gate), written(activated, weights.up)]);
            add_rest(gated, normed, gate, rows);
            add_rest(activated, normed, weights.up, rows);
            swiglu(activated, gated);
        }
        None => {
            project(normed, rows, [written(activated, weights.up)]);
            add_rest(activated, normed, weights.up, rows);
            gelu(activated);
        }
    }
    project(activated, rows, [Output { out: x, into: Into::Add, weight: weights.down.weight }]);
    add_rest(x, activated, weights.down, rows);
}

fn norm_rows(normed: &mut Vec<f32>, inverse: &mut Vec<f32>, x: &[f32], part: Affine<Weight<'_>>, rows: usize, eps: f32) {
    normed.resize(x.len(), 0.0);
    inverse.resize(rows, 0.0);
    let (weight, bias) = (part.weight.wide(), part.bias.map(Weight::wide));
    norm(normed, inverse, x, Affine::new(&weight, bias.as_deref()), eps);
}

fn written<'a>(out: &'a mut [f32], part: Affine<Weight<'a>>) -> Output<'a> {
    Output { out, into: Into::Overwrite, weight: part.weight }
}

/// The bias and the low-rank addition of a projection.
fn add_rest(out: &mut [f32], x: &[f32], part: Affine<Weight<'_>>, rows: usize) {
    if let Some(bias) = part.bias {
        let bias = bias.wide();
        out.chunks_exact_mut(bias.len()).for_each(|row| row.iter_mut().zip(&*bias).for_each(|(value, bias)| *value += bias));
    }
    if let Some(LowRank { a, b, scale }) = part.low_rank {
        let (a, b) = (a.wide(), b.wide());
        let (width, columns) = (out.len() / rows.max(1), x.len() / rows.max(1));
        let rank = a.len() / columns.max(1);
        let factors = LowRank { a: MatrixRef::new(&a, rank, columns), b: MatrixRef::new(&b, width, rank), scale };
        let how = How { arithmetic: Arithmetic::F32, parallel: true };
        low_rank::add(out, width, MatrixRef::new(x, rows, columns), factors, how);
    }
}

multiversion!(fn attend(out: &mut [f32], q: &[f32], cache: &LayerCache, slopes: &[f32], shape: AttentionShape) = attend_inner);

/// One query against all cached keys that it sees.
#[inline(always)]
fn attend_inner<const FMA: bool>(out: &mut [f32], q: &[f32], cache: &LayerCache, slopes: &[f32], shape: AttentionShape) {
    let heads = shape.heads;
    let head_dim = heads.head_dim;
    let scale = 1.0 / (head_dim as f32).sqrt();
    // What has left the window is kept, and not looked at.
    let first = shape.window.map_or(0, |window| cache.len.saturating_sub(window));
    let blocks = first / BLOCK..cache.len.div_ceil(BLOCK);
    let group = heads.heads / heads.kv_heads;
    let mut scores = vec![[0.0; BLOCK]; heads.heads * blocks.len()];
    // Block by block, as the cache lies in memory: it is larger than a core's own cache, and read once.
    for (number, block) in blocks.clone().enumerate() {
        let keys = cache.block(block, heads).0;
        for (head, q) in q.chunks_exact(head_dim).enumerate() {
            let scores = &mut scores[head * blocks.len() + number];
            *scores = dot_each::<FMA>(q, &keys[head / group * head_dim * BLOCK..][..head_dim * BLOCK]);
            let slope = slopes.get(head).copied().unwrap_or(0.0);
            for (lane, score) in scores.iter_mut().enumerate() {
                let position = block * BLOCK + lane;
                let seen = position >= first && position < cache.len;
                let ago = cache.len as f32 - 1.0 - position as f32;
                *score = if seen { fmadd::<FMA>(-slope, ago, *score * scale) } else { f32::NEG_INFINITY };
            }
        }
    }
    for scores in scores.chunks_exact_mut(blocks.len()) {
        let scores = scores.as_flattened_mut();
        let largest = max(scores);
        for score in scores.iter_mut() {
            *score = exp::<FMA>(*score - largest);
        }
        let inverse = 1.0 / sum(scores);
        for score in scores.iter_mut() {
            *score *= inverse;
        }
    }
    out.fill(0.0);
    for (number, block) in blocks.clone().enumerate() {
        let values = cache.block(block, heads).1;
        for (head, out) in out.chunks_exact_mut(head_dim).enumerate() {
            let scores = &scores[head * blocks.len() + number];
            add_each::<FMA>(out, scores, &values[head / group * head_dim * BLOCK..][..head_dim * BLOCK]);
        }
    }
}

/// `out += sum_i scores[i] values[i]` over sixteen rows of values.
#[inline(always)]
fn add_each<const FMA: bool>(out: &mut [f32], scores: &[f32; BLOCK], values: &[f32]) {
    let width = out.len();
    let (parts, tail) = out.as_chunks_mut::<{ 4 * LANES }>();
    let whole = parts.len() * 4 * LANES;
    for (index, part) in parts.iter_mut().enumerate() {
        // Sixty-four sums stay in registers.
        let mut sums = *part;
        for (score, values) in scores.iter().zip(values.chunks_exact(width)) {
            let Some(values) = values[index * 4 * LANES..].first_chunk::<{ 4 * LANES }>() else { continue };
            for lane in 0..4 * LANES {
                sums[lane] = fmadd::<FMA>(*score, values[lane], sums[lane]);
            }
        }
        *part = sums;
    }
    for (score, values) in scores.iter().zip(values.chunks_exact(width)) {
        for (out, value) in tail.iter_mut().zip(&values[whole..]) {
            *out = fmadd::<FMA>(*score, *value, *out);
        }
    }
}

/// Dot products of `q` with sixteen keys, each coordinate of which lies side by side.
#[inline(always)]
fn dot_each<const FMA: bool>(q: &[f32], keys: &[f32]) -> [f32; BLOCK] {
    // Four sums, so that one addition need not wait for the one before.
    let mut sums = [[0.0; BLOCK]; 4];
    let (keys, _) = keys.as_chunks::<BLOCK>();
    let ((q, q_tail), (keys, keys_tail)) = (q.as_chunks::<4>(), keys.as_chunks::<4>());
    for (q, keys) in q.iter().zip(keys) {
        for part in 0..4 {
            for lane in 0..BLOCK {
                sums[part][lane] = fmadd::<FMA>(q[part], keys[part][lane], sums[part][lane]);
            }
        }
    }
    for (q, keys) in q_tail.iter().zip(keys_tail) {
        for lane in 0..BLOCK {
            sums[0][lane] = fmadd::<FMA>(*q, keys[lane], sums[0][lane]);
        }
    }
    std::array::from_fn(|lane| (sums[0][lane] + sums[1][lane]) + (sums[2][lane] + sums[3][lane]))
}
