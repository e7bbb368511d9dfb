//! A weight with the bias that some families give it, and the weights of a block's two halves.

use crate::{
    low_rank::{self, Dropout, LowRank, Projection},
    matmul::{Arithmetic, Into, MatrixRef},
    memory::zeros,
};

/// Rows per partial sum of a bias's gradient.
const ROW_BLOCK: usize = 32;

/// A weight and perhaps a bias: a projection, or a norm.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Affine<T> {
    /// `[out, in]` of a projection, `[hidden]` of a norm.
    pub weight: T,
    /// `[out]` or `[hidden]`. A norm with a bias is LayerNorm, one without is RMSNorm.
    pub bias: Option<T>,
    /// What is added to a projection; norms have none.
    pub low_rank: Option<LowRank<T>>,
}

impl<T> Affine<T> {
    /// With nothing added to it.
    pub const fn new(weight: T, bias: Option<T>) -> Self {
        Self { weight, bias, low_rank: None }
    }

    /// Without a bias.
    pub const fn plain(weight: T) -> Self {
        Self { weight, bias: None, low_rank: None }
    }

    /// The same parts of another kind.
    pub fn map<'t, U>(&'t self, mut f: impl FnMut(&'t T) -> U) -> Affine<U> {
        Affine {
            weight: f(&self.weight),
            bias: self.bias.as_ref().map(&mut f),
            low_rank: self.low_rank.as_ref().map(|part| part.map(&mut f)),
        }
    }

    /// The factors of what is added.
    fn factors(&self) -> [Option<&T>; 2] {
        [self.low_rank.as_ref().map(|part| &part.a), self.low_rank.as_ref().map(|part| &part.b)]
    }
}

impl<'a> Affine<&'a [f32]> {
    /// Of slices, where one that is not there is empty.
    pub fn of_slices(weight: &'a [f32], bias: &'a [f32], [a, b]: [&'a [f32]; 2], scale: f32) -> Self {
        let there = |slice: &'a [f32]| (!slice.is_empty()).then_some(slice);
        Self { weight, bias: there(bias), low_rank: there(a).map(|a| LowRank { a, b, scale }) }
    }
}

/// Weights of the attention half of a block: slots, tensors, slices or gradients of them.
#[derive(Debug, Clone, Copy, PartialEq)]
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
    pub fn map<'t, U>(&'t self, mut f: impl FnMut(&'t T) -> U) -> AttentionParts<U> {
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

    /// What Llama has not and the factors of low-rank additions, in a fixed order.
    pub fn extras(&self) -> [Option<&T>; 15] {
        let ([qa, qb], [ka, kb], [va, vb], [oa, ob]) = (self.q.factors(), self.k.factors(), self.v.factors(), self.o.factors());
        [
            self.norm.bias.as_ref(),
            self.q.bias.as_ref(),
            self.k.bias.as_ref(),
            self.v.bias.as_ref(),
            self.o.bias.as_ref(),
            self.q_norm.as_ref(),
            self.k_norm.as_ref(),
            qa,
            qb,
            ka,
            kb,
            va,
            vb,
            oa,
            ob,
        ]
    }

    /// Factor on all low-rank additions, which share it.
    pub fn low_rank_scale(&self) -> Option<f32> {
        [&self.q, &self.k, &self.v, &self.o].into_iter().find_map(|part| part.low_rank.as_ref()).map(|part| part.scale)
    }
}

/// Weights of the feed-forward half of a block.
#[derive(Debug, Clone, Copy, PartialEq)]
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
    pub fn map<'t, U>(&'t self, mut f: impl FnMut(&'t T) -> U) -> MlpParts<U> {
        MlpParts {
            norm: self.norm.map(&mut f),
            gate: self.gate.as_ref().map(|gate| gate.map(&mut f)),
            up: self.up.map(&mut f),
            down: self.down.map(&mut f),
        }
    }

    /// The biases that are there and the factors of low-rank additions, in a fixed order.
    pub fn extras(&self) -> [Option<&T>; 10] {
        let [gate_a, gate_b] = self.gate.as_ref().map_or([None, None], Affine::factors);
        let ([up_a, up_b], [down_a, down_b]) = (self.up.factors(), self.down.factors());
        let gate_bias = self.gate.as_ref().and_then(|gate| gate.bias.as_ref());
        [self.norm.bias.as_ref(), gate_bias, self.up.bias.as_ref(), self.down.bias.as_ref(), gate_a, gate_b, up_a, up_b, down_a, down_b]
    }

    /// Factor on all low-rank additions, which share it.
    pub fn low_rank_scale(&self) -> Option<f32> {
        let parts = [self.gate.as_ref(), Some(&self.up), Some(&self.down)];
        parts.into_iter().flatten().find_map(|part| part.low_rank.as_ref()).map(|part| part.scale)
    }
}

/// How a projection computes.
#[derive(Clone, Copy)]
pub struct Projecting<'a> {
    /// Format of the operands.
    pub arithmetic: Arithmetic,
    /// Which projection it is, for `dropout`.
    pub projection: Projection,
    /// What is dropped of the input of its low-rank addition.
    pub dropout: Dropout<'a>,
}

impl Projecting<'_> {
    /// `out = x weight^T + bias` (or `out += ..`) and the low-rank addition.
    ///
    /// # Shapes
    /// - x: `[rows, columns]`; out: `[rows, width]`; weight: `[width, columns]`; bias: `[width]`
    pub fn forward(self, out: &mut [f32], into: Into, x: &[f32], part: Affine<&[f32]>, rows: usize) {
        let Self { arithmetic, projection, dropout } = self;
        let (width, columns) = (out.len() / rows.max(1), x.len() / rows.max(1));
        let (input, weight) = (MatrixRef::new(x, rows, columns), MatrixRef::new(part.weight, width, columns).t());
        match into {
            Into::Overwrite => arithmetic.matmul(out, input, weight),
            Into::Add => arithmetic.matmul_add(out, input, weight),
        }
        add_bias(out, part.bias);
        if let Some(part) = part.low_rank {
            low_rank::add(out, x, part, rows, arithmetic, projection, dropout);
        }
    }

    /// The gradient of `x` for the gradient `dout` of [`Self::forward`]'s result, written or added to `dx`.
    ///
    /// # Shapes
    /// - dx: `[rows, columns]`; dout: `[rows, width]`
    pub fn backward_input(self, dx: &mut [f32], into: Into, dout: &[f32], part: Affine<&[f32]>, rows: usize) {
        let Self { arithmetic, projection, dropout } = self;
        let (width, columns) = (dout.len() / rows.max(1), dx.len() / rows.max(1));
        let (upstream, weight) = (MatrixRef::new(dout, rows, width), MatrixRef::new(part.weight, width, columns));
        match into {
            Into::Overwrite => arithmetic.matmul(dx, upstream, weight),
            Into::Add => arithmetic.matmul_add(dx, upstream, weight),
        }
        if let Some(part) = part.low_rank {
            low_rank::backward_input(dx, dout, part, rows, arithmetic, projection, dropout);
        }
    }

    /// Gradients of a projection's parts for the gradient `dout` of [`Self::forward`]'s result. With `frozen` the weight gets
    /// none, but an empty vector: that product is the largest.
    ///
    /// # Shapes
    /// - x: `[rows, columns]`; dout: `[rows, width]`
    pub fn backward_parts(self, dout: &[f32], x: &[f32], part: Affine<&[f32]>, rows: usize, frozen: bool) -> Affine<Vec<f32>> {
        let Self { arithmetic, projection, dropout } = self;
        let (width, columns) = (dout.len() / rows.max(1), x.len() / rows.max(1));
        let mut weight = zeros(if frozen { 0 } else { width * columns });
        if !frozen {
            arithmetic.matmul(&mut weight, MatrixRef::new(dout, rows, width).t(), MatrixRef::new(x, rows, columns));
        }
        let low_rank = part.low_rank.map(|part| low_rank::backward_factors(dout, x, part, rows, arithmetic, projection, dropout));
        Affine { weight, bias: part.bias.map(|_| column_sums(dout, width)), low_rank }
    }
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
