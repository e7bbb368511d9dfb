//! Products of small matrices that lie in a core's cache already: nothing is packed.
//!
//! An element's sum runs along the summed dimension in order, one fused multiply-add a term, wherever the element stands.

use crate::matmul::{Into, MatrixRef};
#[cfg(target_arch = "x86_64")]
use crate::simd;

/// `out = a b` or `out += a b` on the calling thread, `out` row-major with the given row stride. Columns of
/// `b` should lie side by side.
pub(crate) fn multiply(out: &mut [f32], out_row_stride: usize, a: MatrixRef<'_>, b: MatrixRef<'_>, into: Into) {
    #[cfg(target_arch = "x86_64")]
    if simd::level() == simd::Level::Avx512 && b.parts().2 == 1 {
        // SAFETY: the processor has the instructions.
        return unsafe { avx512::multiply(out, out_row_stride, a, b, into) };
    }
    crate::matmul::matmul_serial(out, out_row_stride, a, b, 1.0, into);
}

/// `out[c, r] = rows[r, c]`, with `out_row_stride` elements from row to row of `out`.
pub(crate) fn transpose(out: &mut [f32], out_row_stride: usize, rows: MatrixRef<'_>) {
    let (data, row_stride, column_stride) = rows.parts();
    // Sixteen rows at a time: what is written lies in one line of the cache.
    for first in (0..rows.rows()).step_by(16) {
        let count = (rows.rows() - first).min(16);
        for column in 0..rows.columns() {
            let from = &data[first * row_stride + column * column_stride..];
            let to = &mut out[column * out_row_stride + first..][..count];
            for (index, to) in to.iter_mut().enumerate() {
                *to = from[index * row_stride];
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    use crate::{
        matmul::{Into, MatrixRef},
        simd::LANES,
    };

    /// Rows and vectors of columns whose sums are in registers at once.
    const ROWS: usize = 6;
    const VECTORS: usize = 4;

    /// A part of a product.
    struct Part<'a> {
        a: &'a [f32],
        a_strides: [usize; 2],
        b: &'a [f32],
        b_stride: usize,
        depth: usize,
        /// Columns that the last vector has.
        mask: u16,
        into: Into,
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn multiply(out: &mut [f32], out_row_stride: usize, a: MatrixRef<'_>, b: MatrixRef<'_>, into: Into) {
        let (m, n, depth) = (a.rows(), b.columns(), a.columns());
        assert_eq!(depth, b.rows(), "inner dimensions differ");
        if m == 0 || n == 0 {
            return;
        }
        assert!(n <= out_row_stride && (m - 1) * out_row_stride + n <= out.len(), "result leaves its slice");
        let (a_data, row_stride, depth_stride) = a.parts();
        let (b_data, b_stride, _) = b.parts();
        for column in (0..n).step_by(VECTORS * LANES) {
            let width = (n - column).min(VECTORS * LANES);
            let vectors = width.div_ceil(LANES);
            let mask = ((1_u32 << (width - (vectors - 1) * LANES)) - 1) as u16;
            for row in (0..m).step_by(ROWS) {
                let (a, b) = (&a_data[row * row_stride..], b_data.get(column..).unwrap_or_default());
                let part = Part { a, a_strides: [row_stride, depth_stride], b, b_stride, depth, mask, into };
                let out = &mut out[row * out_row_stride + column..];
                // SAFETY: `MatrixRef` and the assertions keep all rows and columns of the part within their slices.
                unsafe {
                    match ((m - row).min(ROWS), vectors) {
                        (6, 4) => part.compute::<6, 4>(out, out_row_stride),
                        (6, 3) => part.compute::<6, 3>(out, out_row_stride),
                        (6, 2) => part.compute::<6, 2>(out, out_row_stride),
                        (6, _) => part.compute::<6, 1>(out, out_row_stride),
                        (rows, vectors) => {
                            for index in 0..rows {
                                let part = Part { a: &part.a[index * row_stride..], ..part };
                                let out = &mut out[index * out_row_stride..];
                                match vectors {
                                    4 => part.compute::<1, 4>(out, out_row_stride),
                                    3 => part.compute::<1, 3>(out, out_row_stride),
                                    2 => part.compute::<1, 2>(out, out_row_stride),
                                    _ => part.compute::<1, 1>(out, out_row_stride),
                                }
                            }
                        }
                    }
                }
            }
        }
    }

    impl Part<'_> {
        /// # Safety
        /// `a` must have `R` rows and `b` `V` vectors, the last of them masked, of this depth; `out` as many of both.
        #[target_feature(enable = "avx512f")]
        unsafe fn compute<const R: usize, const V: usize>(&self, out: &mut [f32], out_row_stride: usize) {
            let mut sums = [[_mm512_setzero_ps(); V]; R];
            let [row_stride, depth_stride] = self.a_strides;
            let (mut a, mut b) = (self.a.as_ptr(), self.b.as_ptr());
            // SAFETY: as the caller promises; the pointers leave their slices only after the last access.
            unsafe {
                for _ in 0..self.depth {
                    let mut columns = [_mm512_setzero_ps(); V];
                    for (vector, columns) in columns.iter_mut().enumerate() {
                        let mask = if vector + 1 == V { self.mask } else { !0 };
                        *columns = _mm512_maskz_loadu_ps(mask, b.add(vector * LANES));
                    }
                    for (row, sums) in sums.iter_mut().enumerate() {
                        let value = _mm512_set1_ps(*a.add(row * row_stride));
                        for (sum, columns) in sums.iter_mut().zip(columns) {
                            *sum = _mm512_fmadd_ps(value, columns, *sum);
                        }
                    }
                    a = a.wrapping_add(depth_stride);
                    b = b.wrapping_add(self.b_stride);
                }
                for (row, sums) in sums.iter().enumerate() {
                    for (vector, sum) in sums.iter().enumerate() {
                        let to = out.as_mut_ptr().add(row * out_row_stride + vector * LANES);
                        let mask = if vector + 1 == V { self.mask } else { !0 };
                        let result = match self.into {
                            Into::Overwrite => *sum,
                            Into::Add => _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), *sum),
                        };
                        _mm512_mask_storeu_ps(to, mask, result);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Small whole numbers: every sum is exact, in any order.
    fn numbers(len: usize, seed: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * 7 + seed * 3 + i / 5) % 11) as f32 - 5.0).collect()
    }

    #[test]
    fn products_are_what_their_definition_says() {
        for (m, n, k, out_stride) in [(1, 1, 1, 1), (6, 64, 5, 64), (7, 65, 3, 70), (13, 31, 17, 40), (24, 128, 64, 128), (5, 80, 2, 80)] {
            for is_transposed in [false, true] {
                let (a, b) = (numbers(m * k, 1), numbers(k * (n + 3), 2));
                let a = if is_transposed { MatrixRef::new(&a, k, m).t() } else { MatrixRef::new(&a, m, k) };
                let b = MatrixRef::strided(&b, k, n, n + 3);
                let mut out = vec![1.0; m * out_stride];
                multiply(&mut out, out_stride, a, b, Into::Add);
                let mut written = vec![7.0; m * out_stride];
                multiply(&mut written, out_stride, a, b, Into::Overwrite);
                for row in 0..m {
                    for column in 0..out_stride {
                        let sum: f32 = if column < n { (0..k).map(|i| a.get(row, i) * b.get(i, column)).sum() } else { 0.0 };
                        assert_eq!(out[row * out_stride + column], 1.0 + sum, "{m} {n} {k}: {row} {column}");
                        let expected = if column < n { sum } else { 7.0 };
                        assert_eq!(written[row * out_stride + column], expected);
                    }
                }
            }
        }
    }

    #[test]
    fn a_transpose_has_rows_for_columns() {
        let rows = numbers(19 * 5, 1);
        let mut out = vec![0.0; 3 * 20];
        transpose(&mut out, 20, MatrixRef::strided(&rows, 19, 3, 5));
        for row in 0..19 {
            for column in 0..3 {
                assert_eq!(out[column * 20 + row], rows[row * 5 + column]);
            }
        }
    }
}
