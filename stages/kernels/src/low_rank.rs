//! Low-rank additions to projections (LoRA, arXiv:2106.09685): `scale * up(down(dropout(x)))` beside a weight that stays.
//!
//! The weight's own gradient, the largest product of a backward pass, is never computed where only the addition is trained.

use std::borrow::Cow;

use crate::{
    matmul::{Arithmetic, Into, MatrixRef},
    memory::zeros,
};

/// The two factors of an addition to a projection.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LowRank<T> {
    /// Down: `[rank, in]`.
    pub a: T,
    /// Up: `[out, rank]`.
    pub b: T,
    /// Factor on the product.
    pub scale: f32,
}

impl<T> LowRank<T> {
    /// The same factors of another kind.
    pub fn map<'t, U>(&'t self, mut f: impl FnMut(&'t T) -> U) -> LowRank<U> {
        LowRank { a: f(&self.a), b: f(&self.b), scale: self.scale }
    }
}

/// The projections of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Projection {
    Query,
    Key,
    Value,
    Output,
    Gate,
    Up,
    Down,
}

/// What is dropped of the inputs of low-rank additions. It multiplies the rows of a projection's input by 0 or by
/// `1 / (1 - p)`, the same ones each time it is asked. Without it nothing is dropped.
pub type Dropout<'a> = Option<&'a (dyn Fn(Projection, &mut [f32]) + Sync)>;

/// What dropout multiplies `len` elements of a projection's input by.
pub(crate) fn mask(len: usize, projection: Projection, dropout: Dropout<'_>) -> Option<Vec<f32>> {
    dropout.map(|drop| {
        let mut mask = vec![1.0; len];
        drop(projection, &mut mask);
        mask
    })
}

fn dropped<'a>(x: &'a [f32], projection: Projection, dropout: Dropout<'_>) -> Cow<'a, [f32]> {
    let mut x = Cow::Borrowed(x);
    if let Some(drop) = dropout {
        drop(projection, x.to_mut());
    }
    x
}

/// How the small products of an addition are computed.
#[derive(Clone, Copy)]
pub(crate) struct How {
    /// Format of the operands.
    pub(crate) arithmetic: Arithmetic,
    /// On all threads, or on the calling one.
    pub(crate) parallel: bool,
}

impl How {
    /// `scale * a b`, dense.
    fn scaled(self, a: MatrixRef<'_>, b: MatrixRef<'_>, scale: f32) -> Vec<f32> {
        let mut out = zeros(a.rows() * b.columns());
        self.arithmetic.multiply(&mut out, b.columns(), a, b, Into::Overwrite, self.parallel);
        out.iter_mut().for_each(|value| *value *= scale);
        out
    }
}

/// `out += scale * (x a^T) b^T`, where dropout has been applied to `x`. The factors may be parts: some columns of `a` with as many
/// of `x`, some rows of `b` with as many columns of `out`.
///
/// # Shapes
/// - x: `[rows, columns]`; out: `[rows, width]`, rows `out_row_stride` apart
pub(crate) fn add(out: &mut [f32], out_row_stride: usize, x: MatrixRef<'_>, part: LowRank<MatrixRef<'_>>, how: How) {
    let down = how.scaled(x, part.a.t(), part.scale);
    let down = MatrixRef::new(&down, x.rows(), part.a.rows());
    how.arithmetic.multiply(out, out_row_stride, down, part.b.t(), Into::Add, how.parallel);
}

/// The gradient of the input of [`add`] (after dropout) for the gradient `dout` of its result, dense.
///
/// # Shapes
/// - dout: `[rows, width]`; result: `[rows, columns]`
pub(crate) fn backward_input(dout: MatrixRef<'_>, part: LowRank<MatrixRef<'_>>, how: How) -> Vec<f32> {
    let ddown = how.scaled(dout, part.b, part.scale);
    how.scaled(MatrixRef::new(&ddown, dout.rows(), part.a.rows()), part.a, 1.0)
}

/// Gradients of the factors of [`add`] for the gradient `dout` of its result.
///
/// # Shapes
/// - x: `[rows, columns]`; dout: `[rows, width]`
pub(crate) fn backward_factors(
    dout: &[f32],
    x: &[f32],
    part: LowRank<&[f32]>,
    rows: usize,
    arithmetic: Arithmetic,
    projection: Projection,
    dropout: Dropout<'_>,
) -> LowRank<Vec<f32>> {
    let (width, columns) = (dout.len() / rows.max(1), x.len() / rows.max(1));
    let rank = part.a.len() / columns.max(1);
    let (x, how) = (dropped(x, projection, dropout), How { arithmetic, parallel: true });
    let (x, dout) = (MatrixRef::new(&x, rows, columns), MatrixRef::new(dout, rows, width));
    // Both products are of the rank's width: cheaper to compute again than to keep.
    let down = how.scaled(x, MatrixRef::new(part.a, rank, columns).t(), part.scale);
    let ddown = how.scaled(dout, MatrixRef::new(part.b, width, rank), part.scale);
    let a = how.scaled(MatrixRef::new(&ddown, rows, rank).t(), x, 1.0);
    let b = how.scaled(dout.t(), MatrixRef::new(&down, rows, rank), 1.0);
    LowRank { a, b, scale: part.scale }
}
