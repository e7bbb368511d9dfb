//! A weight with the bias that some families give it, and the weights of a block's two halves.

use crate::matmul::{Arithmetic, MatrixRef};

/// Rows per partial sum of a bias's gradient.
const ROW_BLOCK: usize = 32;

/// A weight and perhaps a bias: a projection, or a norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Affine<T> {
    /// `[out, in]` of a projection, `[hidden]` of a norm.
    pub weight: T,
    /// `[out]` or `[hidden]`. A norm with a bias is LayerNorm, one without is RMSNorm.
    pub bias: Option<T>,
}

impl<T> Affine<T> {
    /// Without a bias.
    pub const fn plain(weight: T) -> Self {
        Self { weight, bias: None }
    }

    /// The same parts of another kind.
    pub fn map<U>(&self, mut f: impl FnMut(&T) -> U) -> Affine<U> {
        Affine { weight: f(&self.weight), bias: self.bias.as_ref().map(f) }
    }
}

/// Weights of the attention half of a block: slots, tensors, slices or gradients of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct AttentionParts<T> {
    pub norm: Affine<T>,
    pub q: Affine<T>,
    pub k: Affine<T>,
    pub v: Affine<T>,
    pub o: Affine<T>,
    /// RMSNorm of each head's queries, `[head_dim]`.
    pub q_norm: Option<T>,
    /// RMSNorm of each head's keys, `[head_dim]`.
    pub k_norm: Option<T>,
}

impl<T> AttentionParts<T> {
    /// The same parts of another kind, in the order of the fields.
    pub fn map<U>(&self, mut f: impl FnMut(&T) -> U) -> AttentionParts<U> {
        AttentionParts {
            norm: self.norm.map(&mut f),
            q: self.q.map(&mut f),
            k: self.k.map(&mut f),
            v: self.v.map(&mut f),
            o: self.o.map(&mut f),
            q_norm: self.q_norm.as_ref().map(&mut f),
            k_norm: self.k_norm.as_ref().map(&mut f),
        }
    }

    /// What Llama has not, in a fixed order.
    pub fn extras(&self) -> [Option<&T>; 7] {
        [
            self.norm.bias.as_ref(),
            self.q.bias.as_ref(),
            self.k.bias.as_ref(),
            self.v.bias.as_ref(),
            self.o.bias.as_ref(),
            self.q_norm.as_ref(),
            self.k_norm.as_ref(),
        ]
    }
}

/// Weights of the feed-forward half of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct MlpParts<T> {
    pub norm: Affine<T>,
    /// Of SwiGLU; without it the layer is `down(gelu(up(x)))`.
    pub gate: Option<Affine<T>>,
    pub up: Affine<T>,
    pub down: Affine<T>,
}

impl<T> MlpParts<T> {
    /// The same parts of another kind, in the order of the fields.
    pub fn map<U>(&self, mut f: impl FnMut(&T) -> U) -> MlpParts<U> {
        MlpParts {
            norm: self.norm.map(&mut f),
            gate: self.gate.as_ref().map(|gate| gate.map(&mut f)),
            up: self.up.map(&mut f),
            down: self.down.map(&mut f),
        }
    }

    /// The biases that are there, in a fixed order.
    pub fn extras(&self) -> [Option<&T>; 4] {
        [self.norm.bias.as_ref(), self.gate.as_ref().and_then(|gate| gate.bias.as_ref()), self.up.bias.as_ref(), self.down.bias.as_ref()]
    }
}

/// `out = x weight^T + bias`, `out` overwritten.
///
/// # Shapes
/// - x: `[rows, columns]`; out: `[rows, width]`; weight: `[width, columns]`; bias: `[width]`
pub fn project(out: &mut [f32], x: &[f32], part: Affine<&[f32]>, rows: usize, arithmetic: Arithmetic) {
    let (width, columns) = (out.len() / rows.max(1), x.len() / rows.max(1));
    arithmetic.matmul(out, MatrixRef::new(x, rows, columns), MatrixRef::new(part.weight, width, columns).t());
    add_bias(out, part.bias);
}

/// `out += x weight^T + bias`.
pub fn project_add(out: &mut [f32], x: &[f32], part: Affine<&[f32]>, rows: usize, arithmetic: Arithmetic) {
    let (width, columns) = (out.len() / rows.max(1), x.len() / rows.max(1));
    arithmetic.matmul_add(out, MatrixRef::new(x, rows, columns), MatrixRef::new(part.weight, width, columns).t());
    add_bias(out, part.bias);
}

/// Gradients of a projection's weight and bias for the gradient `dout` of its result.
///
/// # Shapes
/// - x: `[rows, columns]`; dout: `[rows, width]`
pub fn project_backward(dout: &[f32], x: &[f32], part: Affine<&[f32]>, rows: usize, arithmetic: Arithmetic) -> Affine<Vec<f32>> {
    let (width, columns) = (dout.len() / rows.max(1), x.len() / rows.max(1));
    let mut weight = vec![0.0; width * columns];
    arithmetic.matmul(&mut weight, MatrixRef::new(dout, rows, width).t(), MatrixRef::new(x, rows, columns));
    Affine { weight, bias: part.bias.map(|_| column_sums(dout, width)) }
}

fn add_bias(rows: &mut [f32], bias: Option<&[f32]>) {
    let Some(bias) = bias else { return };
    for row in rows.chunks_exact_mut(bias.len().max(1)) {
        row.iter_mut().zip(bias).for_each(|(value, bias)| *value += bias);
    }
}

/// Sums over rows, block by block in order.
fn column_sums(rows: &[f32], width: usize) -> Vec<f32> {
    let mut sums = vec![0.0; width];
    for block in rows.chunks((ROW_BLOCK * width).max(1)) {
        let mut partial = vec![0.0f32; width];
        for row in block.chunks_exact(width.max(1)) {
            partial.iter_mut().zip(row).for_each(|(sum, value)| *sum += value);
        }
        sums.iter_mut().zip(partial).for_each(|(sum, value)| *sum += value);
    }
    sums
}
