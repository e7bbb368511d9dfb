//! A weight with the bias that some families give it, and the weights of a block's two halves.

use std::ops::Range;

use crate::{
    low_rank::{self, Dropout, LowRank, Projection},
    matmul::{Arithmetic, Into, MatrixRef},
    operand::{Blocks, Keep, Kept, Left, Right, Role},
    weight::Weight,
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

impl<'a> Affine<Weight<'a>> {
    /// Of slices, where one that is not there is empty.
    pub fn of_slices(weight: Weight<'a>, bias: &'a [f32], [a, b]: [&'a [f32]; 2], scale: f32) -> Self {
        let there = |slice: &'a [f32]| (!slice.is_empty()).then_some(Weight::F32(slice));
        Self { weight, bias: there(bias), low_rank: there(a).map(|a| LowRank { a, b: b.into(), scale }) }
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
pub(crate) struct Projecting<'a> {
    /// How rows are cut.
    pub(crate) blocks: Blocks,
    rows: usize,
    /// Format of the operands.
    pub(crate) arithmetic: Arithmetic,
    /// What is dropped of the input of low-rank additions.
    pub(crate) dropout: Dropout<'a>,
    /// Whether gradients of other parts than weights need rows.
    keeps_rows: bool,
}

impl<'a> Projecting<'a> {
    /// For `rows` rows and these projections.
    pub(crate) fn new<const N: usize>(
        rows: usize,
        arithmetic: Arithmetic,
        dropout: Dropout<'a>,
        parts: [Option<&Affine<Weight<'_>>>; N],
    ) -> Self {
        let keeps_rows = parts.into_iter().flatten().any(|part| part.low_rank.is_some() || part.bias.is_some());
        Self { blocks: Blocks::new(rows, arithmetic), rows, arithmetic, dropout, keeps_rows }
    }

    /// Rows that gradients of parts need; none do where all parts are frozen.
    pub(crate) fn keep<'r>(self, role: Role, width: usize, given: Option<&'r [f32]>, frozen: bool) -> Option<Keep<'r>> {
        (self.keeps_rows || !frozen).then(|| self.blocks.keep(role, width, given, self.keeps_rows))
    }

    /// `x weight^T + bias` and the low-rank addition, of rows with this many columns.
    pub(crate) fn forward<'w>(self, projection: Projection, part: Affine<Weight<'w>>, columns: usize) -> Forward<'w> {
        let right = self.blocks.weight(part.weight, columns, true);
        Forward { right, bias: part.bias.map(Weight::plain), addition: self.addition(projection, part, columns) }
    }

    /// The gradient of the projection's input.
    pub(crate) fn backward<'w>(self, projection: Projection, part: Affine<Weight<'w>>, columns: usize) -> Backward<'w> {
        Backward { right: self.blocks.weight(part.weight, columns, false), addition: self.addition(projection, part, columns) }
    }

    fn addition<'w>(self, projection: Projection, part: Affine<Weight<'w>>, columns: usize) -> Option<Addition<'w>> {
        let factors = part.low_rank?.map(|factor| factor.plain());
        let mask = low_rank::mask(self.rows * columns, projection, self.dropout);
        Some(Addition { factors, columns, mask, how: self.blocks.small_products() })
    }

    /// Gradients of a projection's parts for the gradient `dout` of its result, where `x` is its input. With `frozen` the weight
    /// gets none, but an empty vector: that product is the largest.
    pub(crate) fn parts(
        self,
        projection: Projection,
        dout: Option<&Kept<'_>>,
        x: Option<&Kept<'_>>,
        part: Affine<Weight<'_>>,
        rows: usize,
        frozen: bool,
    ) -> Affine<Vec<f32>> {
        let Self { arithmetic, dropout, .. } = self;
        let (Some(dout), Some(x)) = (dout, x) else { return Affine::plain(Vec::new()) };
        let weight = if frozen { Vec::new() } else { dout.product(x, arithmetic) };
        let (mut low_rank, mut bias) = (None, None);
        if let (Some(dout), Some(x)) = (dout.rows(), x.rows()) {
            let factors = part.low_rank.map(|part| part.map(|factor| factor.plain()));
            low_rank = factors.map(|part| low_rank::backward_factors(dout, x, part, rows, arithmetic, projection, dropout));
            bias = part.bias.map(|bias| column_sums(dout, bias.len()));
        }
        Affine { weight, bias, low_rank }
    }
}

/// The low-rank addition to a projection.
struct Addition<'w> {
    factors: LowRank<&'w [f32]>,
    /// Of the projection's input.
    columns: usize,
    /// What dropout multiplies the input by, `[rows, columns]`.
    mask: Option<Vec<f32>>,
    how: low_rank::How,
}

impl<'w> Addition<'w> {
    /// The factors for some columns of the input and some of the result.
    fn part(&self, input: &Range<usize>, result: &Range<usize>) -> LowRank<MatrixRef<'w>> {
        let LowRank { a, b, scale } = self.factors;
        let rank = a.len() / self.columns.max(1);
        let a = MatrixRef::strided(&a[input.start..], rank, input.len(), self.columns);
        LowRank { a, b: MatrixRef::of_rows(b, result, rank), scale }
    }

    /// Rows of the input, dense, with dropout.
    fn drop(&self, rows: &mut [f32], first_row: usize, input: &Range<usize>) {
        if let Some(mask) = &self.mask {
            for (row, values) in rows.chunks_exact_mut(input.len().max(1)).enumerate() {
                let mask = &mask[(first_row + row) * self.columns..][input.clone()];
                values.iter_mut().zip(mask).for_each(|(value, mask)| *value *= mask);
            }
        }
    }
}

/// A projection of blocks of rows.
pub(crate) struct Forward<'w> {
    right: Right<'w>,
    bias: Option<&'w [f32]>,
    addition: Option<Addition<'w>>,
}

impl Forward<'_> {
    /// `out = x weight^T + bias` (or `out += ..`) and the low-rank addition, all columns of it.
    ///
    /// # Shapes
    /// - x: `[rows, columns]`; out: `[rows, width]`
    pub(crate) fn run(&self, out: &mut [f32], into: Into, x: &Left<'_>) {
        let width = out.len() / x.rows.rows().max(1);
        self.columns(out, width, into, x, 0..width, 0..x.rows.columns());
    }

    /// [`Self::run`] for some columns of the result and some terms of its sums, where `x` has those terms only. The bias comes
    /// with the first terms.
    pub(crate) fn columns(
        &self,
        out: &mut [f32],
        out_row_stride: usize,
        into: Into,
        x: &Left<'_>,
        columns: Range<usize>,
        terms: Range<usize>,
    ) {
        self.right.multiply(out, out_row_stride, x, columns.clone(), terms.clone(), into);
        if terms.start == 0
            && let Some(bias) = self.bias
        {
            for row in out.chunks_mut(out_row_stride.max(1)) {
                row.iter_mut().zip(&bias[columns.clone()]).for_each(|(value, bias)| *value += bias);
            }
        }
        if let Some(addition) = &self.addition {
            let factors = addition.part(&terms, &columns);
            if addition.mask.is_none() {
                return low_rank::add(out, out_row_stride, x.rows, factors, addition.how);
            }
            let mut rows: Vec<f32> = (0..x.rows.rows()).flat_map(|row| x.rows.row(row)).copied().collect();
            addition.drop(&mut rows, x.first_row, &terms);
            low_rank::add(out, out_row_stride, MatrixRef::new(&rows, x.rows.rows(), terms.len()), factors, addition.how);
        }
    }
}

/// The gradient of a projection's input, block by block.
pub(crate) struct Backward<'w> {
    right: Right<'w>,
    addition: Option<Addition<'w>>,
}

impl Backward<'_> {
    /// The gradient of the input for the gradient `dout` of the result, written or added to `dx`.
    ///
    /// # Shapes
    /// - dx: `[rows, columns]`; dout: `[rows, width]`
    pub(crate) fn run(&self, dx: &mut [f32], into: Into, dout: &Left<'_>) {
        let columns = dx.len() / dout.rows.rows().max(1);
        self.columns(dx, into, dout, 0..columns, 0..dout.rows.columns());
    }

    /// [`Self::run`] for some columns of the input, which are all that `dx` has, and some terms of its sums, where `dout` has
    /// those terms only.
    pub(crate) fn columns(&self, dx: &mut [f32], into: Into, dout: &Left<'_>, columns: Range<usize>, terms: Range<usize>) {
        self.right.multiply(dx, columns.len(), dout, columns.clone(), terms.clone(), into);
        if let Some(addition) = &self.addition {
            let mut more = low_rank::backward_input(dout.rows, addition.part(&columns, &terms), addition.how);
            addition.drop(&mut more, dout.first_row, &columns);
            dx.iter_mut().zip(more).for_each(|(sum, value)| *sum += value);
        }
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
