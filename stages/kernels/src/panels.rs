//! Products of f32 rows with a right operand that was packed once, for AVX-512.
//!
//! An element's sum runs along the summed dimension in order, one fused multiply-add a term, in parts of [`DEPTH`] terms: neither
//! the number of rows nor that of columns changes it.

use std::{arch::x86_64::*, ops::Range};

use rayon::prelude::*;

use crate::{
    matmul::{Into, MatrixRef},
    memory::Parts,
    simd::{LANES, transpose},
};

/// Vectors of columns of a panel, and rows whose sums are in registers at once.
const VECTORS: usize = 2;
const ROWS: usize = 12;
/// Columns of a panel.
pub(crate) const PANEL: usize = VECTORS * LANES;
/// Terms that are summed before the result is touched: a panel of them stays in the second-level cache.
const DEPTH: usize = 1024;

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
    /// `columns` and `terms` begin at multiples of [`PANEL`].
    pub(crate) fn multiply(
        &self,
        out: &mut [f32],
        out_row_stride: usize,
        left: MatrixRef<'_>,
        columns: Range<usize>,
        terms: Range<usize>,
        into: Into,
    ) {
        let (data, row_stride, column_stride) = left.parts();
        assert!(column_stride == 1 && left.columns() == terms.len() && terms.end <= self.depth && columns.end <= self.columns);
        assert!(columns.start.is_multiple_of(PANEL), "columns begin within a panel");
        if left.rows() == 0 || columns.is_empty() {
            return;
        }
        assert!(
            columns.len() <= out_row_stride && (left.rows() - 1) * out_row_stride + columns.len() <= out.len(),
            "result leaves its slice"
        );
        for start in terms.clone().step_by(DEPTH) {
            let depth = DEPTH.min(terms.end - start);
            let into = if start > terms.start { Into::Add } else { into };
            for first in columns.clone().step_by(PANEL) {
                let width = PANEL.min(columns.end - first);
                let masks = [0, LANES].map(|skipped| ((1_u32 << width.saturating_sub(skipped).min(LANES)) - 1) as u16);
                let right = &self.data[first * self.depth + start * PANEL..][..depth * PANEL];
                let mut row = 0;
                while row < left.rows() {
                    let rows = left.rows() - row;
                    let part = Part { left: &data[row * row_stride + start - terms.start..], row_stride, right, depth, masks, into };
                    let out = &mut out[row * out_row_stride + first - columns.start..];
                    // SAFETY: the assertions keep rows, columns and terms within the slices; the processor has the instructions.
                    row += unsafe {
                        match rows {
                            ROWS.. => part.compute::<ROWS>(out, out_row_stride),
                            4.. => part.compute::<4>(out, out_row_stride),
                            _ => part.compute::<1>(out, out_row_stride),
                        }
                    };
                }
            }
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

/// Some rows by a panel.
struct Part<'a> {
    left: &'a [f32],
    row_stride: usize,
    right: &'a [f32],
    depth: usize,
    /// Columns that each vector has.
    masks: [u16; VECTORS],
    into: Into,
}

impl Part<'_> {
    /// Computes `R` rows, and says how many that were.
    ///
    /// # Safety
    /// `left` and `out` must have `R` rows of this depth and width.
    #[target_feature(enable = "avx512f")]
    unsafe fn compute<const R: usize>(&self, out: &mut [f32], out_row_stride: usize) -> usize {
        let mut sums = [[_mm512_setzero_ps(); VECTORS]; R];
        let (left, right) = (self.left.as_ptr(), self.right.as_ptr());
        // SAFETY: as the caller promises.
        unsafe {
            for term in 0..self.depth {
                let right = right.add(term * PANEL);
                let columns = [_mm512_loadu_ps(right), _mm512_loadu_ps(right.add(LANES))];
                for (row, sums) in sums.iter_mut().enumerate() {
                    let value = _mm512_set1_ps(*left.add(row * self.row_stride + term));
                    for (sum, columns) in sums.iter_mut().zip(columns) {
                        *sum = _mm512_fmadd_ps(value, columns, *sum);
                    }
                }
            }
            for (row, sums) in sums.iter().enumerate() {
                for (vector, (sum, mask)) in sums.iter().zip(self.masks).enumerate() {
                    let to = out.as_mut_ptr().wrapping_add(row * out_row_stride + vector * LANES);
                    let sum = match self.into {
                        Into::Overwrite => *sum,
                        Into::Add => _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), *sum),
                    };
                    _mm512_mask_storeu_ps(to, mask, sum);
                }
            }
        }
        R
    }
}
