//! Causal attention over packed sequences, forward and backward, one block of query rows at a time.
//!
//! Scores exist for one block of one head only. Softmax statistics of the forward pass are kept as one
//! log-sum-exp per row and head, and the backward pass computes the probabilities again from them (as in
//! FlashAttention, arXiv:2205.14135, without its tiling over keys, which pays on a GPU but not in a core's cache).

use std::ops::Range;

use rayon::prelude::*;

use crate::{
    layout::SequenceLayout,
    matmul::{Arithmetic, Into, MatrixRef},
    operand::tile_kernel,
    scratch::{Scratch, scratch},
    shared::Shared,
    simd::{dot, exp, fmadd, max, multiversion, sum},
    small::{multiply, transpose},
    tiles::{self, Kernel},
};

/// Query rows per block in f32.
const QUERY_BLOCK: usize = 48;
/// Rows of a part of a block in f32.
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

/// The right operand of a head's products, in the cache of the core that has the head.
enum Factor<'a> {
    /// Of columns side by side.
    Rows(MatrixRef<'a>),
    Transposed(Scratch<f32>, [usize; 2]),
    Tiles(Kernel, tiles::Packed),
}

impl<'a> Factor<'a> {
    fn new(matrix: MatrixRef<'a>, kernel: Option<Kernel>) -> Self {
        let (rows, columns) = (matrix.rows(), matrix.columns());
        match kernel {
            Some(kernel) => Self::Tiles(kernel, tiles::Packed::passing_right(matrix)),
            None if matrix.parts().2 == 1 => Self::Rows(matrix),
            None => {
                let mut transposed = scratch(rows * columns);
                transpose(&mut transposed, columns, matrix.t());
                Self::Transposed(transposed, [rows, columns])
            }
        }
    }

    /// `out = left self` or `out += left self` for some rows and columns of this operand.
    fn multiply(&self, out: &mut [f32], stride: usize, left: MatrixRef<'_>, rows: Range<usize>, columns: Range<usize>, into: Into) {
        match self {
            Self::Rows(right) => multiply(out, stride, left, right.part(rows, columns), into),
            Self::Transposed(right, size) => multiply(out, stride, left, MatrixRef::new(right, size[0], size[1]).part(rows, columns), into),
            Self::Tiles(kernel, right) => right.multiply(*kernel, out, stride, &tiles::Packed::left(left), columns, rows, into),
        }
    }
}

/// How a head's rows are cut.
#[derive(Clone, Copy)]
struct Cut {
    /// Query rows per block, whose scores are held.
    block: usize,
    /// Rows of a part of a block, which leaves out what none of its rows sees.
    part: usize,
    /// What the first key of a block is a multiple of.
    grain: usize,
}

impl Cut {
    fn of(kernel: Option<Kernel>) -> Self {
        match kernel {
            None => Self { block: QUERY_BLOCK, part: ROWS, grain: 1 },
            Some(_) => Self { block: 2 * tiles::PANEL, part: tiles::PANEL, grain: tiles::PANEL },
        }
    }
}

/// `out = softmax(q k^T / sqrt(head_dim) + bias) v` per sequence and head, causal; within `window` a token sees itself and
/// those before it. In bfloat16, operands of the products are rounded; the softmax is f32 in any case.
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
    arithmetic: Arithmetic,
) {
    let tokens = layout.tokens();
    let (query_width, kv_width, head_dim) = (heads.query_width(), heads.kv_width(), heads.head_dim);
    let (kernel, scale) = (tile_kernel(arithmetic), 1.0 / (head_dim as f32).sqrt());
    let cut = Cut::of(kernel);
    let (shared_out, shared_lse) = (Shared::new(out), Shared::new(log_sum_exp));
    (0..layout.sequences() * heads.heads).into_par_iter().for_each(|task| {
        let (sequence, head) = (layout.range(task / heads.heads), task % heads.heads);
        let length = sequence.len();
        let kv_at = sequence.start * kv_width + head / (heads.heads / heads.kv_heads) * head_dim;
        let keys = Factor::new(MatrixRef::strided(&k[kv_at..], length, head_dim, kv_width).t(), kernel);
        let values = Factor::new(MatrixRef::strided(&v[kv_at..], length, head_dim, kv_width), kernel);
        let mut scores = scratch(cut.block * length);
        for first in (0..length).step_by(cut.block) {
            let block = Block::new(first, length, window, cut);
            let at = (sequence.start + first) * query_width + head * head_dim;
            let scores = &mut scores[..block.rows * block.columns];
            for part in block.parts() {
                let queries = MatrixRef::strided(&q[at + part.first * query_width..], part.rows, head_dim, query_width);
                let scores = &mut scores[part.first * block.columns..];
                keys.multiply(scores, block.columns, queries, 0..head_dim, block.keys(part.columns), Into::Overwrite);
            }
            // SAFETY: this task alone has this head's columns and this sequence's rows of both results.
            let (out, lse) = unsafe { (shared_out.from(at), shared_lse.from(head * tokens + sequence.start + first)) };
            let slope = slopes.get(head).copied().unwrap_or(0.0);
            softmax_rows(scores, &mut lse[..block.rows], scale, first - block.start, window, slope);
            for part in block.parts() {
                let probabilities = MatrixRef::strided(&scores[part.first * block.columns..], part.rows, part.columns, block.columns);
                let out = &mut out[part.first * query_width..];
                values.multiply(out, query_width, probabilities, block.keys(part.columns), 0..head_dim, Into::Overwrite);
            }
        }
    });
}

/// Some query rows of a sequence with the keys that they see: `columns` of them from `start` on.
struct Block {
    rows: usize,
    start: usize,
    columns: usize,
    part: usize,
}

/// Rows of a block from `first` on, which see at most the first `columns` of its keys.
struct Part {
    first: usize,
    rows: usize,
    columns: usize,
}

impl Block {
    fn new(first: usize, length: usize, window: Option<usize>, cut: Cut) -> Self {
        let rows = cut.block.min(length - first);
        // Keys that no row of the block sees are left out on both sides.
        let start = first_seen(first, window) / cut.grain * cut.grain;
        Self { rows, start, columns: first + rows - start, part: cut.part }
    }

    /// The first `columns` of its keys.
    fn keys(&self, columns: usize) -> Range<usize> {
        self.start..self.start + columns
    }

    fn parts(&self) -> impl Iterator<Item = Part> {
        let &Self { rows, columns, part, .. } = self;
        (0..rows).step_by(part).map(move |first| {
            let count = part.min(rows - first);
            Part { first, rows: count, columns: columns - rows + first + count }
        })
    }
}

multiversion!(fn softmax_rows(scores: &mut [f32], log_sum_exp: &mut [f32], scale: f32, first: usize, window: Option<usize>, slope: f32) = softmax_rows_inner);

/// Row `i` stands at column `first + i` and sees the columns up to it, within the window.
#[inline(always)]
fn softmax_rows_inner<const FMA: bool>(
    scores: &mut [f32],
    log_sum_exp: &mut [f32],
    scale: f32,
    first: usize,
    window: Option<usize>,
    slope: f32,
) {
    let columns = scores.len() / log_sum_exp.len();
    for (row, (scores, log_sum_exp)) in scores.chunks_exact_mut(columns).zip(log_sum_exp).enumerate() {
        let (seen, hidden) = scores.split_at_mut(first + row + 1);
        let (left, seen) = seen.split_at_mut(first_seen(first + row, window));
        left.fill(0.0);
        finish_scores::<FMA>(seen, scale, slope);
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

/// Scales, and adds ALiBi's minus slope times distance; the last column is the query's own position.
#[inline(always)]
fn finish_scores<const FMA: bool>(seen: &mut [f32], scale: f32, slope: f32) {
    for score in seen.iter_mut() {
        *score *= scale;
    }
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
    arithmetic: Arithmetic,
) {
    let tokens = layout.tokens();
    let group = heads.heads / heads.kv_heads;
    let (query_width, kv_width, head_dim) = (heads.query_width(), heads.kv_width(), heads.head_dim);
    let (kernel, scale) = (tile_kernel(arithmetic), 1.0 / (head_dim as f32).sqrt());
    let cut = Cut::of(kernel);
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
        let [keys, by_column, values_by_column] = [all_keys, all_keys.t(), all_values.t()].map(|matrix| Factor::new(matrix, kernel));
        let (mut scores, mut dscores) = (scratch(cut.block * length), scratch(cut.block * length));
        // Heads of the group and blocks of rows in order: one order of additions into dk and dv.
        for head in kv_head * group..(kv_head + 1) * group {
            for first in (0..length).step_by(cut.block) {
                let block = Block::new(first, length, window, cut);
                let Block { rows, start, columns, .. } = block;
                let at = (sequence.start + first) * query_width + head * head_dim;
                let (scores, dscores) = (&mut scores[..rows * columns], &mut dscores[..rows * columns]);
                for part in block.parts() {
                    let (at, to) = (at + part.first * query_width, part.first * columns);
                    let [queries, upstream] = [q, dout].map(|matrix| MatrixRef::strided(&matrix[at..], part.rows, head_dim, query_width));
                    by_column.multiply(&mut scores[to..], columns, queries, 0..head_dim, block.keys(part.columns), Into::Overwrite);
                    let seen = block.keys(part.columns);
                    values_by_column.multiply(&mut dscores[to..], columns, upstream, 0..head_dim, seen, Into::Overwrite);
                }
                let lse = &log_sum_exp[head * tokens + sequence.start + first..][..rows];
                let slope = slopes.get(head).copied().unwrap_or(0.0);
                let (dout_rows, out_rows) = (&dout[at..], &out[at..]);
                softmax_backward_rows(
                    scores,
                    dscores,
                    lse,
                    dout_rows,
                    out_rows,
                    query_width,
                    head_dim,
                    scale,
                    first - start,
                    window,
                    slope,
                );
                // SAFETY: only this task has the heads of this group.
                let dq = unsafe { shared_dq.from(at) };
                for part in block.parts() {
                    let of_rows = MatrixRef::strided(&dscores[part.first * columns..], part.rows, part.columns, columns);
                    let dq = &mut dq[part.first * query_width..];
                    keys.multiply(dq, query_width, of_rows, block.keys(part.columns), 0..head_dim, Into::Overwrite);
                    for row in dq.chunks_mut(query_width).take(part.rows) {
                        row[..head_dim].iter_mut().for_each(|value| *value *= scale);
                    }
                }
                let [queries, upstream] =
                    [q, dout].map(|matrix| Factor::new(MatrixRef::strided(&matrix[at..], rows, head_dim, query_width), kernel));
                let (probabilities, gradients) = (MatrixRef::new(scores, rows, columns), MatrixRef::new(dscores, rows, columns));
                // Columns at once: as many as there are rows of a part, so that rows that see none of them are left out.
                let width = if kernel.is_some() { columns } else { cut.part };
                for column in (0..columns).step_by(width) {
                    let some = column..(column + width).min(columns);
                    let above = if kernel.is_some() { 0 } else { (column + start).saturating_sub(first) };
                    let to = (start + column) * kv_width;
                    let probabilities = probabilities.part(above..rows, some.clone()).t();
                    upstream.multiply(&mut dv[to..], kv_width, probabilities, above..rows, 0..head_dim, Into::Add);
                    let gradients = gradients.part(above..rows, some).t();
                    queries.multiply(&mut dk[to..], kv_width, gradients, above..rows, 0..head_dim, Into::Add);
                }
            }
        }
        for row in 0..length {
            dk[row * kv_width..][..head_dim].iter_mut().for_each(|value| *value *= scale);
        }
    });
}

multiversion!(fn softmax_backward_rows(scores: &mut [f32], dscores: &mut [f32], log_sum_exp: &[f32], dout: &[f32], out: &[f32], stride: usize, head_dim: usize, scale: f32, first: usize, window: Option<usize>, slope: f32) = softmax_backward_inner);

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
    scale: f32,
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
        finish_scores::<FMA>(seen, scale, slope);
        for (score, dscore) in seen.iter_mut().zip(dseen) {
            *score = exp::<FMA>(*score - log_sum_exp);
            *dscore = *score * (*dscore - delta);
        }
        hidden.fill(0.0);
        dhidden.fill(0.0);
    }
}
