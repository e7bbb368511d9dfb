//! Products of f32 rows with a right operand that was packed once, for AVX-512.
//!
//! An element's sum runs along the summed dimension in order, one fused multiply-add a term, in parts of [`DEPTH`] terms: neither
//! the number of rows nor that of columns changes it.

use std::{arch::x86_64::*, ops::Range};

use rayon::prelude::*;

use crate::{
    matmul::{Into, MatrixRef},
    memory::Parts,
    scratch::{Scratch, scratch},
    simd::{LANES, transpose},
};

/// Vectors of columns of a panel, and rows whose sums are in registers at once.
const VECTORS: usize = 2;
pub(crate) const ROWS: usize = 12;
/// Columns of a panel.
pub(crate) const PANEL: usize = VECTORS * LANES;
/// Terms that are summed before the result is touched: a panel of them stays in the second-level cache.
const DEPTH: usize = 256;

/// A right operand in panels of [`PANEL`] columns; within one, each step of the depth has its columns side by side. Columns
/// beyond the operand are zeros.
pub(crate) struct Panels {
    data: Vec<f32>,
    depth: usize,
    columns: usize,
}

impl Panels {
    /// Packs `right` on all threads. The processor must have AVX-512.
    pub(crate) fn new(right: MatrixRef<'_>) -> Self {
        let (depth, columns) = (right.rows(), right.columns());
        let len = PANEL * depth;
        let count = columns.div_ceil(PANEL);
        let data = Parts::new(count * len);
        (0..count).into_par_iter().for_each(|panel| {
            // SAFETY: each task has a panel of its own, and the processor has the instructions.
            unsafe { pack(data.zeroed(panel * len..(panel + 1) * len), right, panel * PANEL) }
        });
        // SAFETY: all panels were written.
        Self { data: unsafe { data.finish() }, depth, columns }
    }

    /// `out = left right` or `out += left right` for the given columns and terms of the right operand, on the calling thread.
    /// `columns` begin at a multiple of [`PANEL`].
    pub(crate) fn multiply(
        &self,
        out: &mut [f32],
        out_row_stride: usize,
        left: &PackedRows,
        columns: Range<usize>,
        terms: Range<usize>,
        into: Into,
    ) {
        assert!(left.terms == terms.len() && terms.end <= self.depth && columns.end <= self.columns);
        assert!(columns.start.is_multiple_of(PANEL), "columns begin within a panel");
        if left.rows == 0 || columns.is_empty() {
            return;
        }
        assert!(
            columns.len() <= out_row_stride && (left.rows - 1) * out_row_stride + columns.len() <= out.len(),
            "result leaves its slice"
        );
        for start in (0..terms.len()).step_by(DEPTH) {
            let depth = DEPTH.min(terms.len() - start);
            let into = if start > 0 { Into::Add } else { into };
            for first in columns.clone().step_by(PANEL) {
                let width = PANEL.min(columns.end - first);
                let masks = [0, LANES].map(|skipped| ((1_u32 << width.saturating_sub(skipped).min(LANES)) - 1) as u16);
                let right = &self.data[first * self.depth + (terms.start + start) * PANEL..][..depth * PANEL];
                for row in (0..left.rows).step_by(ROWS) {
                    let rows = ROWS.min(left.rows - row);
                    let left = &left.data[row * left.terms + start * ROWS..][..depth * ROWS];
                    let out = &mut out[row * out_row_stride + first - columns.start..];
                    // SAFETY: the assertions keep rows and columns within the result; the processor has the instructions.
                    unsafe { compute(left, right, out, out_row_stride, rows, masks, into) };
                }
            }
        }
    }
}

/// Rows in groups of [`ROWS`]; within one, each step of the depth has its rows side by side. Rows beyond the operand are zeros.
pub(crate) struct PackedRows {
    data: Scratch<f32>,
    rows: usize,
    terms: usize,
}

impl PackedRows {
    /// Packs rows on the calling thread. The processor must have AVX-512.
    pub(crate) fn new(left: MatrixRef<'_>) -> Self {
        let (rows, terms) = (left.rows(), left.columns());
        let mut data = scratch(rows.div_ceil(ROWS) * ROWS * terms);
        for (group, packed) in data.chunks_exact_mut((ROWS * terms).max(1)).enumerate() {
            // SAFETY: the processor has the instructions.
            unsafe { pack_rows(packed, left, group * ROWS) };
        }
        Self { data, rows, terms }
    }
}

/// Packs the group that begins at row `first`.
#[target_feature(enable = "avx512f")]
fn pack_rows(packed: &mut [f32], left: MatrixRef<'_>, first: usize) {
    const MASK: u16 = (1 << ROWS) - 1;
    let count = ROWS.min(left.rows() - first);
    for start in (0..left.columns()).step_by(LANES) {
        let terms = LANES.min(left.columns() - start);
        let mask = ((1_u32 << terms) - 1) as u16;
        let mut lines = [_mm512_setzero_si512(); LANES];
        for (row, line) in lines.iter_mut().enumerate().take(count) {
            let from = &left.row(first + row)[start..start + terms];
            // SAFETY: the mask keeps the load within `from`.
            *line = unsafe { _mm512_maskz_loadu_epi32(mask, from.as_ptr().cast()) };
        }
        transpose(&mut lines);
        for (to, line) in packed[start * ROWS..].chunks_exact_mut(ROWS).zip(lines).take(terms) {
            // SAFETY: the mask keeps the store within `to`.
            unsafe { _mm512_mask_storeu_epi32(to.as_mut_ptr().cast(), MASK, line) };
        }
    }
}

/// Packs the panel that begins at column `first`.
#[target_feature(enable = "avx512f")]
fn pack(packed: &mut [f32], right: MatrixRef<'_>, first: usize) {
    let (data, row_stride, column_stride) = right.parts();
    let (depth, width) = (right.rows(), PANEL.min(right.columns() - first));
    if column_stride == 1 {
        for (term, packed) in packed.chunks_exact_mut(PANEL).enumerate() {
            packed[..width].copy_from_slice(&data[term * row_stride + first..][..width]);
        }
        return;
    }
    assert!(row_stride == 1, "operands are row-major or the transpose of that");
    for vector in 0..width.div_ceil(LANES) {
        let columns = (width - vector * LANES).min(LANES);
        for start in (0..depth).step_by(LANES) {
            let terms = LANES.min(depth - start);
            let mask = ((1_u32 << terms) - 1) as u16;
            let mut rows = [_mm512_setzero_si512(); LANES];
            for (column, row) in rows.iter_mut().enumerate().take(columns) {
                let from = &data[(first + vector * LANES + column) * column_stride + start..][..terms];
                // SAFETY: the mask keeps the load within `from`.
                *row = unsafe { _mm512_maskz_loadu_epi32(mask, from.as_ptr().cast()) };
            }
            transpose(&mut rows);
            for (term, row) in rows.iter().enumerate().take(terms) {
                let to = &mut packed[(start + term) * PANEL + vector * LANES..][..LANES];
                // SAFETY: sixteen numbers.
                unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), *row) };
            }
        }
    }
}

/// A group of rows by a panel; `rows` of them and the columns of `masks` are written.
///
/// # Safety
/// `out` must have these rows and columns.
#[target_feature(enable = "avx512f")]
unsafe fn compute(left: &[f32], right: &[f32], out: &mut [f32], out_row_stride: usize, rows: usize, masks: [u16; VECTORS], into: Into) {
    let mut sums = [[_mm512_setzero_ps(); VECTORS]; ROWS];
    for (left, right) in left.as_chunks::<ROWS>().0.iter().zip(right.as_chunks::<PANEL>().0) {
        // SAFETY: two vectors are a panel's columns.
        let columns = unsafe { [_mm512_loadu_ps(right.as_ptr()), _mm512_loadu_ps(right.as_ptr().add(LANES))] };
        for (sums, value) in sums.iter_mut().zip(left) {
            let value = _mm512_set1_ps(*value);
            for (sum, columns) in sums.iter_mut().zip(columns) {
                *sum = _mm512_fmadd_ps(value, columns, *sum);
            }
        }
    }
    for (row, sums) in sums.iter().enumerate().take(rows) {
        for (vector, (sum, mask)) in sums.iter().zip(masks).enumerate() {
            let to = out.as_mut_ptr().wrapping_add(row * out_row_stride + vector * LANES);
            // SAFETY: as the caller promises.
            unsafe {
                let sum = match into {
                    Into::Overwrite => *sum,
                    Into::Add => _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), *sum),
                };
                _mm512_mask_storeu_ps(to, mask, sum);
            }
        }
    }
}
