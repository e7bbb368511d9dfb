//! Matrix products over the `gemm` crate.
//!
//! `gemm` splits work over threads by rows and columns of the result and never along the summed dimension, and its
//! blocking of that dimension depends on shapes alone, so results do not depend on the number of threads.

use std::ops::Range;

use gemm::Parallelism;

/// A matrix in memory: element `(i, j)` is `data[i * row_stride + j * column_stride]`.
#[derive(Clone, Copy)]
pub struct MatrixRef<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> MatrixRef<'a> {
    /// Row-major `[rows, columns]`.
    pub fn new(data: &'a [f32], rows: usize, columns: usize) -> Self {
        Self::strided(data, rows, columns, columns)
    }

    /// Row-major with `row_stride >= columns` elements from row to row.
    pub fn strided(data: &'a [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        assert!(rows == 0 || columns == 0 || (rows - 1) * row_stride + columns <= data.len(), "matrix leaves its slice");
        Self { data, rows, columns, row_stride, column_stride: 1 }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Element `(row, column)`.
    pub fn get(&self, row: usize, column: usize) -> f32 {
        self.data[row * self.row_stride + column * self.column_stride]
    }

    /// Some rows of a row-major matrix of this width.
    pub(crate) fn of_rows(data: &'a [f32], rows: &Range<usize>, width: usize) -> Self {
        Self::new(&data[rows.start * width..rows.end * width], rows.len(), width)
    }

    /// Some rows and some columns of it.
    pub(crate) fn part(self, rows: Range<usize>, columns: Range<usize>) -> Self {
        assert!(rows.start <= rows.end && rows.end <= self.rows && columns.start <= columns.end && columns.end <= self.columns);
        // A part without elements begins nowhere.
        let start =
            if rows.is_empty() || columns.is_empty() { 0 } else { rows.start * self.row_stride + columns.start * self.column_stride };
        Self { data: &self.data[start..], rows: rows.len(), columns: columns.len(), ..self }
    }

    /// A row, of elements side by side.
    pub(crate) fn row(&self, row: usize) -> &'a [f32] {
        assert!(self.column_stride == 1, "rows lie across");
        &self.data[row * self.row_stride..][..self.columns]
    }

    /// Its slice, and the elements from row to row and from column to column.
    pub(crate) fn parts(&self) -> (&'a [f32], usize, usize) {
        (self.data, self.row_stride, self.column_stride)
    }

    /// The transpose, without moving anything.
    pub fn t(self) -> Self {
        Self { rows: self.columns, columns: self.rows, row_stride: self.column_stride, column_stride: self.row_stride, ..self }
    }
}

/// The number format of a product's operands. Sums are f32 in both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Arithmetic {
    /// f32.
    #[default]
    F32,
    /// f32 rounded to bfloat16 ([`crate::bf16`]).
    Bf16,
}

impl Arithmetic {
    /// `out = a b`, `out` dense row-major, on all threads.
    pub fn matmul(self, out: &mut [f32], a: MatrixRef<'_>, b: MatrixRef<'_>) {
        self.multiply(out, b.columns, a, b, Into::Overwrite, true);
    }

    /// `out += a b`, `out` dense row-major, on all threads.
    pub fn matmul_add(self, out: &mut [f32], a: MatrixRef<'_>, b: MatrixRef<'_>) {
        self.multiply(out, b.columns, a, b, Into::Add, true);
    }

    /// `out = a b` or `out += a b`, `out` row-major with the given row stride, on all threads or the calling one.
    pub(crate) fn multiply(self, out: &mut [f32], out_row_stride: usize, a: MatrixRef<'_>, b: MatrixRef<'_>, into: Into, parallel: bool) {
        match (self, parallel) {
            (Self::F32, true) => matmul_scaled(out, out_row_stride, a, b, 1.0, into),
            (Self::F32, false) => matmul_serial(out, out_row_stride, a, b, 1.0, into),
            (Self::Bf16, _) => crate::bf16::matmul_scaled(out, out_row_stride, a, b, 1.0, into, parallel),
        }
    }
}

/// What happens to the old content of the result.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Into {
    /// Overwritten, never read.
    Overwrite,
    /// Added to.
    Add,
}

/// `out = a b * scale` or `out += a b * scale`, `out` row-major with the given row stride, on all threads.
pub fn matmul_scaled(out: &mut [f32], out_row_stride: usize, a: MatrixRef<'_>, b: MatrixRef<'_>, scale: f32, into: Into) {
    multiply(out, out_row_stride, a, b, scale, into, Parallelism::Rayon(0));
}

/// `out = a b`, `out` dense row-major, on all threads.
pub fn matmul(out: &mut [f32], a: MatrixRef<'_>, b: MatrixRef<'_>) {
    matmul_scaled(out, b.columns, a, b, 1.0, Into::Overwrite);
}

/// `out += a b`, `out` dense row-major, on all threads.
pub fn matmul_add(out: &mut [f32], a: MatrixRef<'_>, b: MatrixRef<'_>) {
    matmul_scaled(out, b.columns, a, b, 1.0, Into::Add);
}

/// [`matmul_scaled`] on the calling thread only, for use inside parallel loops.
pub fn matmul_serial(out: &mut [f32], out_row_stride: usize, a: MatrixRef<'_>, b: MatrixRef<'_>, scale: f32, into: Into) {
    multiply(out, out_row_stride, a, b, scale, into, Parallelism::None);
}

fn multiply(out: &mut [f32], out_row_stride: usize, a: MatrixRef<'_>, b: MatrixRef<'_>, scale: f32, into: Into, parallelism: Parallelism) {
    let (m, n, k) = (a.rows, b.columns, a.columns);
    assert_eq!(k, b.rows, "inner dimensions differ");
    if m == 0 || n == 0 {
        return;
    }
    assert!(n <= out_row_stride && (m - 1) * out_row_stride + n <= out.len(), "result leaves its slice");
    // SAFETY: the assertions here and in `MatrixRef` keep every access within the three slices, and `out` is not
    // aliased because it is borrowed mutably.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            out_row_stride as isize,
            into == Into::Add,
            a.data.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            1.0,
            scale,
            false,
            false,
            false,
            parallelism,
        );
    }
}
