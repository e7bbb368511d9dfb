//! Low-rank additions to projections (LoRA, arXiv:2106.09685): `scale * up(down(dropout(x)))` beside a weight that stays.
//!
//! The weight's own gradient, the largest product of a backward pass, is never computed where only the addition is trained.

use std::borrow::Cow;

use crate::{
    matmul::{Arithmetic, MatrixRef},
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

fn dropped<'a>(x: &'a [f32], projection: Projection, dropout: Dropout<'_>) -> Cow<'a, [f32]> {
    let mut x = Cow::Borrowed(x);
    if let Some(drop) = dropout {
        drop(projection, x.to_mut());
    }
    x
}

/// `scale * x a^T`, `[rows, rank]`.
fn down(x: &[f32], part: LowRank<&[f32]>, rows: usize, columns: usize, arithmetic: Arithmetic) -> Vec<f32> {
    let rank = part.a.len() / columns.max(1);
    let mut down = zeros(rows * rank);
    arithmetic.matmul(&mut down, MatrixRef::new(x, rows, columns), MatrixRef::new(part.a, rank, columns).t());
    down.iter_mut().for_each(|value| *value *= part.scale);
    down
}

/// `out += scale * (dropout(x) a^T) b^T`.
///
/// # Shapes
/// - x: `[rows, columns]`; out: `[rows, width]`
pub fn add(
    out: &mut [f32],
    x: &[f32],
    part: LowRank<&[f32]>,
    rows: usize,
    arithmetic: Arithmetic,
    projection: Projection,
    dropout: Dropout<'_>,
) {
    let (width, columns) = (out.len() / rows.max(1), x.len() / rows.max(1));
    let down = down(&dropped(x, projection, dropout), part, rows, columns, arithmetic);
    let rank = down.len() / rows.max(1);
    arithmetic.matmul_add(out, MatrixRef::new(&down, rows, rank), MatrixRef::new(part.b, width, rank).t());
}

/// `scale * dout b`, `[rows, rank]`: the gradient of what the down projection gives.
fn down_gradient(dout: &[f32], part: LowRank<&[f32]>, rows: usize, arithmetic: Arithmetic) -> Vec<f32> {
    let width = dout.len() / rows.max(1);
    let rank = part.b.len() / width.max(1);
    let mut ddown = zeros(rows * rank);
    arithmetic.matmul(&mut ddown, MatrixRef::new(dout, rows, width), MatrixRef::new(part.b, width, rank));
    ddown.iter_mut().for_each(|value| *value *= part.scale);
    ddown
}

/// Adds to `dx` the gradient of the input of [`add`] for the gradient `dout` of its result.
///
/// # Shapes
/// - dx: `[rows, columns]`; dout: `[rows, width]`
pub fn backward_input(
    dx: &mut [f32],
    dout: &[f32],
    part: LowRank<&[f32]>,
    rows: usize,
    arithmetic: Arithmetic,
    projection: Projection,
    dropout: Dropout<'_>,
) {
    let columns = dx.len() / rows.max(1);
    let ddown = down_gradient(dout, part, rows, arithmetic);
    let rank = ddown.len() / rows.max(1);
    let (ddown, factor) = (MatrixRef::new(&ddown, rows, rank), MatrixRef::new(part.a, rank, columns));
    let Some(drop) = dropout else { return arithmetic.matmul_add(dx, ddown, factor) };
    let mut more = zeros(rows * columns);
    arithmetic.matmul(&mut more, ddown, factor);
    drop(projection, &mut more);
    dx.iter_mut().zip(more).for_each(|(sum, value)| *sum += value);
}

/// Gradients of the factors of [`add`] for the gradient `dout` of its result.
///
/// # Shapes
/// - x: `[rows, columns]`; dout: `[rows, width]`
pub fn backward_factors(
    dout: &[f32],
    x: &[f32],
    part: LowRank<&[f32]>,
    rows: usize,
    arithmetic: Arithmetic,
    projection: Projection,
    dropout: Dropout<'_>,
) -> LowRank<Vec<f32>> {
    let (width, columns) = (dout.len() / rows.max(1), x.len() / rows.max(1));
    let x = dropped(x, projection, dropout);
    // Both products are of the rank's width: cheaper to compute again than to keep.
    let (down, ddown) = (down(&x, part, rows, columns, arithmetic), down_gradient(dout, part, rows, arithmetic));
    let rank = down.len() / rows.max(1);
    let (mut a, mut b) = (zeros(rank * columns), zeros(width * rank));
    arithmetic.matmul(&mut a, MatrixRef::new(&ddown, rows, rank).t(), MatrixRef::new(&x, rows, columns));
    arithmetic.matmul(&mut b, MatrixRef::new(dout, rows, width).t(), MatrixRef::new(&down, rows, rank));
    LowRank { a, b, scale: part.scale }
}
