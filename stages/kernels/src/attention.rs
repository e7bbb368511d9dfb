//! Causal attention over packed sequences, forward and backward, one block of query rows at a time.
//!
//! Scores exist for one block of one head only. Softmax statistics of the forward pass are kept as one
//! log-sum-exp per row and head, and the backward pass computes the probabilities again from them (as in
//! FlashAttention, arXiv:2205.14135, without its tiling over keys, which pays on a GPU but not in a core's cache).

use rayon::prelude::*;

use crate::{
    layout::SequenceLayout,
    matmul::{Into, MatrixRef},
    scratch::with_scratch,
    shared::Shared,
    simd::{dot, exp, fmadd, max, multiversion, sum},
    small::{multiply, transpose},
};

/// Query rows per block, whose scores are held.
const QUERY_BLOCK: usize = 48;
/// Rows of a part of a block, which leaves out what none of its rows sees.
const ROWS: usize = 12;

/// Sizes of the heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

impl Heads {
    /// Width of the query rows.
    pub fn query_width(self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of the key rows and of the value rows.
    pub fn kv_width(self) -> usize {
        self.kv_heads * self.head_dim
    }
}

/// ALiBi slopes for `heads` heads (arXiv:2108.12409, section 3 and the paper's code for other head counts than powers of two).
pub fn alibi_slopes(heads: usize) -> Vec<f32> {
    let powers = |count: usize| {
        let start = 2f64.powf(-8.0 / count as f64);
        (1..=count).map(move |i| start.powi(i as i32) as f32)
    };
    let below = if heads.is_power_of_two() { heads } else { heads.next_power_of_two() / 2 };
    powers(below).chain(powers(2 * below).step_by(2).take(heads - below)).collect()
}

/// First position that a query at position `query` sees.
fn first_seen(query: usize, window: Option<usize>) -> usize {
    window.map_or(0, |window| (query + 1).saturating_sub(window))
}

/// `out = softmax(q k^T / sqrt(head_dim) + bias) v` per sequence and head, causal; within `window` a token sees itself and
/// those before it.
///
/// # Shapes
/// - out, q: `[tokens, heads * head_dim]`; k, v: `[tokens, kv_heads * head_dim]`
/// - log_sum_exp: `[heads, tokens]`; slopes: `[heads]` for ALiBi, or empty
pub fn attention(
    out: &mut [f32],
    log_sum_exp: &mut [f32],
    q: &[f32],
    k: &[f32],
    v: &[f32],
    slopes: &[f32],
    heads: Heads,
    window: Option<usize>,
    layout: &SequenceLayout,
) {
    let tokens = layout.tokens();
    let (shared_out, shared_lse) = (Shared::new(out), Shared::new(log_sum_exp));
    (0..layout.sequences() * heads.heads).into_par_iter().for_each(|task| {
        let (sequence, head) = (layout.range(task / heads.heads), task % heads.heads);
        let (query_offset, kv_offset) = (head * heads.head_dim, head / (heads.heads / heads.kv_heads) * heads.head_dim);
        let length = sequence.len();
        let scale = 1.0 / (heads.head_dim as f32).sqrt();
        let keys = MatrixRef::strided(&k[sequence.start * heads.kv_width() + kv_offset..], length, heads.head_dim, heads.kv_width());
        let values = &v[sequence.start * heads.kv_width() + kv_offset..];
        with_scratch((heads.head_dim + QUERY_BLOCK) * length, |scratch| {
            let (keys_by_column, scores) = scratch.split_at_mut(heads.head_dim * length);
            transpose(keys_by_column, length, keys);
            for first in (0..length).step_by(QUERY_BLOCK) {
                let block = Block::new(first, length, window);
                let at = (sequence.start + first) * heads.query_width() + query_offset;
                let scores = &mut scores[..block.rows * block.columns];
                for part in block.parts() {
                    let queries =
                        MatrixRef::strided(&q[at + part.first * heads.query_width()..], part.rows, heads.head_dim, heads.query_width());
                    let seen = MatrixRef::strided(&keys_by_column[block.start..], heads.head_dim, part.columns, length);
                    multiply(&mut scores[part.first * block.columns..], block.columns, queries, seen, scale, Into::Overwrite);
                }
                // SAFETY: this task alone has this head's columns and this sequence's rows of both results.
                let (out, lse) = unsafe { (shared_out.from(at), shared_lse.from(head * tokens + sequence.start + first)) };
                softmax_rows(scores, &mut lse[..block.rows], first - block.start, window, slopes.get(head).copied().unwrap_or(0.0));
                for part in block.parts() {
                    let probabilities = MatrixRef::strided(&scores[part.first * block.columns..], part.rows, part.columns, block.columns);
                    let seen =
                        MatrixRef::strided(&values[block.start * heads.kv_width()..], part.columns, heads.head_dim, heads.kv_width());
                    let out = &mut out[part.first * heads.query_width()..];
                    multiply(out, heads.query_width(), probabilities, seen, 1.0, Into::Overwrite);
                }
            }
        });
    });
}

/// Some query rows of a sequence with the keys that they see: `columns` of them from `start` on.
struct Block {
    rows: usize,
    start: usize,
    columns: usize,
}

/// Rows of a block from `first` on, which see at most the first `columns` of its keys.
struct Part {
    first: usize,
    rows: usize,
    columns: usize,
}

impl Block {
    fn new(first: usize, length: usize, window: Option<usize>) -> Self {
        let rows = QUERY_BLOCK.min(length - first);
        // Keys that no row of the block sees are left out on both sides.
        let start = first_seen(first, window);
        Self { rows, start, columns: first + rows - start }
    }

    fn parts(&self) -> impl Iterator<Item = Part> {
        let &Self { rows, columns, .. } = self;
        (0..rows).step_by(ROWS).map(move |first| {
            let count = ROWS.min(rows - first);
            Part { first, rows: count, columns: columns - rows + first + count }
        })
    }
}

multiversion!(fn softmax_rows(scores: &mut [f32], log_sum_exp: &mut [f32], first: usize, window: Option<usize>, slope: f32) = softmax_rows_inner);

/// Row `i` stands at column `first + i` and sees the columns up to it, within the window.
#[inline(always)]
fn softmax_rows_inner<const FMA: bool>(scores: &mut [f32], log_sum_exp: &mut [f32], first: usize, window: Option<usize>, slope: f32) {
    let columns = scores.len() / log_sum_exp.len();
    for (row, (scores, log_sum_exp)) in scores.chunks_exact_mut(columns).zip(log_sum_exp).enumerate() {
        let (seen, hidden) = scores.split_at_mut(first + row + 1);
        let (left, seen) = seen.split_at_mut(first_seen(first + row, window));
        left.fill(0.0);
        add_bias::<FMA>(seen, slope);
        let largest = max(seen);
        for score in seen.iter_mut() {
            *score = exp::<FMA>(*score - largest);
        }
        let total = sum(seen);
        let inverse = 1.0 / total;
        for score in seen.iter_mut() {
            *score *= inverse;
        }
        hidden.fill(0.0);
        *log_sum_exp = largest + total.ln();
    }
}

/// ALiBi: minus slope times distance; the last column is the query's own position.
#[inline(always)]
fn add_bias<const FMA: bool>(seen: &mut [f32], slope: f32) {
    if slope != 0.0 {
        let own = seen.len() as f32 - 1.0;
        for (column, score) in seen.iter_mut().enumerate() {
            *score = fmadd::<FMA>(slope, column as f32 - own, *score);
        }
    }
}

/// Gradients of [`attention`]; all three results are overwritten.
///
/// # Shapes
/// - dq, dout, out, q: `[tokens, heads * head_dim]`; dk, dv, k, v: `[tokens, kv_heads * head_dim]`
#[allow(clippy::too_many_arguments)]
pub fn attention_backward(
    dq: &mut [f32],
    dk: &mut [f32],
    dv: &mut [f32],
    dout: &[f32],
    out: &[f32],
    log_sum_exp: &[f32],
    q: &[f32],
    k: &[f32],
    v: &[f32],
    slopes: &[f32],
    heads: Heads,
    window: Option<usize>,
    layout: &SequenceLayout,
) {
    let tokens = layout.tokens();
    let group = heads.heads / heads.kv_heads;
    let (query_width, kv_width, head_dim) = (heads.query_width(), heads.kv_width(), heads.head_dim);
    let scale = 1.0 / (head_dim as f32).sqrt();
    let (shared_dq, shared_dk, shared_dv) = (Shared::new(dq), Shared::new(dk), Shared::new(dv));
    (0..layout.sequences() * heads.kv_heads).into_par_iter().for_each(|task| {
        let (sequence, kv_head) = (layout.range(task / heads.kv_heads), task % heads.kv_heads);
        let length = sequence.len();
        let kv_at = sequence.start * kv_width + kv_head * head_dim;
        // SAFETY: this task alone has this KV head's columns and this sequence's rows.
        let (dk, dv) = unsafe { (shared_dk.from(kv_at), shared_dv.from(kv_at)) };
        for row in 0..length {
            dk[row * kv_width..][..head_dim].fill(0.0);
            dv[row * kv_width..][..head_dim].fill(0.0);
        }
        let [all_keys, all_values] = [k, v].map(|matrix: &[f32]| MatrixRef::strided(&matrix[kv_at..], length, head_dim, kv_width));
        with_scratch(2 * (head_dim + QUERY_BLOCK) * length, |scratch| {
            let (by_column, scores) = scratch.split_at_mut(2 * head_dim * length);
            let (keys_by_column, values_by_column) = by_column.split_at_mut(head_dim * length);
            let (scores, dscores) = scores.split_at_mut(QUERY_BLOCK * length);
            transpose(keys_by_column, length, all_keys);
            transpose(values_by_column, length, all_values);
            // Heads of the group and blocks of rows in order: one order of additions into dk and dv.
            for head in kv_head * group..(kv_head + 1) * group {
                for first in (0..length).step_by(QUERY_BLOCK) {
                    let block = Block::new(first, length, window);
                    let Block { rows, start, columns } = block;
                    let at = (sequence.start + first) * query_width + head * head_dim;
                    let (scores, dscores) = (&mut scores[..rows * columns], &mut dscores[..rows * columns]);
                    for part in block.parts() {
                        let (at, to) = (at + part.first * query_width, part.first * columns);
                        let [queries, upstream] =
                            [q, dout].map(|matrix| MatrixRef::strided(&matrix[at..], part.rows, head_dim, query_width));
                        let keys = MatrixRef::strided(&keys_by_column[start..], head_dim, part.columns, length);
                        let values = MatrixRef::strided(&values_by_column[start..], head_dim, part.columns, length);
                        multiply(&mut scores[to..], columns, queries, keys, scale, Into::Overwrite);
                        multiply(&mut dscores[to..], columns, upstream, values, 1.0, Into::Overwrite);
                    }
                    let lse = &log_sum_exp[head * tokens + sequence.start + first..][..rows];
                    softmax_backward_rows(
                        scores,
                        dscores,
                        lse,
                        &dout[at..],
                        &out[at..],
                        query_width,
                        head_dim,
                        first - start,
                        window,
                        slopes.get(head).copied().unwrap_or(0.0),
                    );
                    // SAFETY: only this task has the heads of this group.
                    let dq = unsafe { shared_dq.from(at) };
                    for part in block.parts() {
                        let of_rows = MatrixRef::strided(&dscores[part.first * columns..], part.rows, part.columns, columns);
                        let keys = MatrixRef::strided(&k[kv_at + start * kv_width..], part.columns, head_dim, kv_width);
                        multiply(&mut dq[part.first * query_width..], query_width, of_rows, keys, scale, Into::Overwrite);
                    }
                    for column in (0..columns).step_by(ROWS) {
                        let count = ROWS.min(columns - column);
                        // Rows before this see none of these keys.
                        let above = (column + start).saturating_sub(first);
                        let from = at + above * query_width;
                        let [queries, upstream] =
                            [q, dout].map(|matrix| MatrixRef::strided(&matrix[from..], rows - above, head_dim, query_width));
                        let from = above * columns + column;
                        let probabilities = MatrixRef::strided(&scores[from..], rows - above, count, columns).t();
                        let gradients = MatrixRef::strided(&dscores[from..], rows - above, count, columns).t();
                        let to = (start + column) * kv_width;
                        multiply(&mut dv[to..], kv_width, probabilities, upstream, 1.0, Into::Add);
                        multiply(&mut dk[to..], kv_width, gradients, queries, scale, Into::Add);
                    }
                }
            }
        });
    });
}

multiversion!(fn softmax_backward_rows(scores: &mut [f32], dscores: &mut [f32], log_sum_exp: &[f32], dout: &[f32], out: &[f32], stride: usize, head_dim: usize, first: usize, window: Option<usize>, slope: f32) = softmax_backward_inner);

/// Scores become probabilities, their gradients become those of the scores before softmax.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn softmax_backward_inner<const FMA: bool>(
    scores: &mut [f32],
    dscores: &mut [f32],
    log_sum_exp: &[f32],
    dout: &[f32],
    out: &[f32],
    stride: usize,
    head_dim: usize,
    first: usize,
    window: Option<usize>,
    slope: f32,
) {
    let columns = scores.len() / log_sum_exp.len();
    for (row, ((scores, dscores), log_sum_exp)) in
        scores.chunks_exact_mut(columns).zip(dscores.chunks_exact_mut(columns)).zip(log_sum_exp).enumerate()
    {
        let delta = dot::<FMA>(&dout[row * stride..][..head_dim], &out[row * stride..][..head_dim]);
        let (seen, hidden) = scores.split_at_mut(first + row + 1);
        let (dseen, dhidden) = dscores.split_at_mut(first + row + 1);
        let left_out = first_seen(first + row, window);
        let ((left, seen), (dleft, dseen)) = (seen.split_at_mut(left_out), dseen.split_at_mut(left_out));
        left.fill(0.0);
        dleft.fill(0.0);
        add_bias::<FMA>(seen, slope);
        for (score, dscore) in seen.iter_mut().zip(dseen) {
            *score = exp::<FMA>(*score - log_sum_exp);
            *dscore = *score * (*dscore - delta);
        }
        hidden.fill(0.0);
        dhidden.fill(0.0);
    }
}
