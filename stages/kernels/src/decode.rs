//! One token at a time over a key-value cache.

use std::{ops::Deref, sync::Arc};

use crate::{
    AttentionShape, Positional,
    affine::{Affine, AttentionParts, MlpParts},
    attention::Heads,
    few_rows::{Output, project},
    low_rank::{self, How, LowRank},
    matmul::{Arithmetic, Into, MatrixRef},
    mlp_block::{gelu, swiglu},
    norm::{norm, rms_norm_serial},
    scratch::scratch,
    simd::{LANES, exp, fmadd, max, multiversion, sum},
    team::Team,
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

/// Norms and biases as f32, matrices as they are held.
pub type DecodeAttention<'a> = AttentionParts<Weight<'a>>;
/// The same of a feed-forward half.
pub type DecodeMlp<'a> = MlpParts<Weight<'a>>;

/// A sequence's part of a step.
struct Row<'a> {
    q: &'a mut [f32],
    k: &'a mut [f32],
    v: &'a [f32],
    out: &'a mut [f32],
    cache: &'a mut LayerCache,
    position: u32,
}

/// `x += attention(norm(x))` for one new token per sequence; its key and value are added to the caches.
///
/// # Shapes
/// - x: `[sequences, hidden]`; caches, positions: `[sequences]`
pub fn attention_step(
    team: &mut Team<'_, '_>,
    x: &mut [f32],
    caches: &mut [&mut LayerCache],
    positions: &[u32],
    weights: DecodeAttention<'_>,
    positional: Positional<'_>,
    shape: AttentionShape,
) {
    let (count, heads) = (caches.len(), shape.heads);
    assert_eq!(count, positions.len(), "a position for each sequence");
    if count == 0 {
        return;
    }
    let (query_width, kv_width) = (heads.query_width(), heads.kv_width());
    let normed = norm_rows(team, x, weights.norm, shape.eps);
    let (mut q, mut k, mut v) = (scratch(count * query_width), scratch(count * kv_width), scratch(count * kv_width));
    project(team, &normed, count, [(&mut *q, weights.q), (&mut *k, weights.k), (&mut *v, weights.v)].map(|(out, part)| written(out, part)));
    add_rest(team, &mut q, &normed, weights.q, count);
    add_rest(team, &mut k, &normed, weights.k, count);
    add_rest(team, &mut v, &normed, weights.v, count);
    let (q_norm, k_norm) = (weights.q_norm.map(Weight::wide), weights.k_norm.map(Weight::wide));
    let mut out = scratch(count * query_width);
    let sequences = caches.iter_mut().zip(positions);
    let queries = q.chunks_exact_mut(query_width).zip(out.chunks_exact_mut(query_width));
    let mut rows: Vec<Row<'_>> = (sequences.zip(queries).zip(k.chunks_exact_mut(kv_width).zip(v.chunks_exact(kv_width))))
        .map(|(((cache, position), (q, out)), (k, v))| Row { q, k, v, out, cache, position: *position })
        .collect();
    team.each_item(&mut rows, |Row { q, k, v, out, cache, position }| {
        norm_heads(q, q_norm.as_deref(), shape.eps);
        norm_heads(k, k_norm.as_deref(), shape.eps);
        positional.rotate(q, &[*position], false);
        positional.rotate(k, &[*position], false);
        cache.push(k, v, heads);
        attend(out, q, cache, positional.slopes(), shape);
    });
    project(team, &out, count, [Output { out: x, into: Into::Add, weight: weights.o.weight }]);
    add_rest(team, x, &out, weights.o, count);
}

/// `x += mlp(norm(x))`.
///
/// # Shapes
/// - x: `[rows, hidden]`
pub fn mlp_step(team: &mut Team<'_, '_>, x: &mut [f32], weights: DecodeMlp<'_>, rows: usize, eps: f32) {
    if rows == 0 {
        return;
    }
    let normed = norm_rows(team, x, weights.norm, eps);
    let intermediate = weights.up.weight.len() / (normed.len() / rows).max(1);
    let mut activated = scratch(rows * intermediate);
    match weights.gate {
        Some(gate_of) => {
            let mut gate = scratch(rows * intermediate);
            project(team, &normed, rows, [written(&mut gate, gate_of), written(&mut activated, weights.up)]);
            add_rest(team, &mut gate, &normed, gate_of, rows);
            add_rest(team, &mut activated, &normed, weights.up, rows);
            let rows = activated.chunks_exact_mut(intermediate).zip(gate.chunks_exact(intermediate));
            team.each_item(&mut rows.collect::<Vec<_>>(), |(up, gate)| swiglu(up, gate));
        }
        None => {
            project(team, &normed, rows, [written(&mut activated, weights.up)]);
            add_rest(team, &mut activated, &normed, weights.up, rows);
            team.each_item(&mut activated.chunks_exact_mut(intermediate).collect::<Vec<_>>(), |row| gelu(row));
        }
    }
    project(team, &activated, rows, [Output { out: x, into: Into::Add, weight: weights.down.weight }]);
    add_rest(team, x, &activated, weights.down, rows);
}

/// Rows that a task norms or adds to.
const TASK_ROWS: usize = 4;

/// `norm(x)`.
pub fn norm_rows(team: &mut Team<'_, '_>, x: &[f32], part: Affine<Weight<'_>>, eps: f32) -> impl Deref<Target = [f32]> + use<> {
    let (weight, bias) = (part.weight.wide(), part.bias.map(Weight::wide));
    let mut normed = scratch(x.len());
    let part_len = (TASK_ROWS * weight.len()).max(1);
    let mut parts: Vec<_> = normed.chunks_mut(part_len).zip(x.chunks(part_len)).collect();
    team.each_item(&mut parts, |(out, x)| {
        let mut inverse = [0.0; TASK_ROWS];
        norm(out, &mut inverse[..x.len() / weight.len()], x, Affine::new(&weight, bias.as_deref()), eps);
    });
    normed
}

fn written<'a>(out: &'a mut [f32], part: Affine<Weight<'a>>) -> Output<'a> {
    Output { out, into: Into::Overwrite, weight: part.weight }
}

/// The bias and the low-rank addition of a projection.
fn add_rest(team: &mut Team<'_, '_>, out: &mut [f32], x: &[f32], part: Affine<Weight<'_>>, rows: usize) {
    if part.bias.is_none() && part.low_rank.is_none() {
        return;
    }
    let (width, columns) = (out.len() / rows, x.len() / rows);
    let bias = part.bias.map(Weight::wide);
    let factors = part.low_rank.map(|LowRank { a, b, scale }| (a.wide(), b.wide(), scale));
    let mut parts: Vec<_> = out.chunks_mut(TASK_ROWS * width).zip(x.chunks(TASK_ROWS * columns)).collect();
    team.each_item(&mut parts, |(out, x)| {
        if let Some(bias) = &bias {
            out.chunks_exact_mut(width).for_each(|row| row.iter_mut().zip(&**bias).for_each(|(value, bias)| *value += bias));
        }
        if let Some((a, b, scale)) = &factors {
            let rank = a.len() / columns;
            let factors = LowRank { a: MatrixRef::new(a, rank, columns), b: MatrixRef::new(b, width, rank), scale: *scale };
            let how = How { arithmetic: Arithmetic::F32, parallel: false };
            low_rank::add(out, width, MatrixRef::new(x, x.len() / columns, columns), factors, how);
        }
    });
}

/// Norms the heads of a row, on the calling thread.
fn norm_heads(row: &mut [f32], weight: Option<&[f32]>, eps: f32) {
    if let Some(weight) = weight {
        let mut normed = scratch(weight.len());
        for head in row.chunks_exact_mut(weight.len()) {
            rms_norm_serial(&mut normed, &mut [0.0], head, weight, eps);
            head.copy_from_slice(&normed);
        }
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
    let mut scores = scratch::<[f32; BLOCK]>(heads.heads * blocks.len());
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
