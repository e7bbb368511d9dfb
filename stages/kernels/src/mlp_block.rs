//! The feed-forward half of a decoder block as one operation, with `n = norm(x)`: `x + down(silu(gate(n)) * up(n))`
//! (SwiGLU, arXiv:2002.05202), or without a gate `x + down(gelu(up(n)))`.

use rayon::prelude::*;

use crate::{
    affine::{Affine, Backward, Forward, MlpParts, Projecting},
    low_rank::{Dropout, Projection},
    matmul::{Arithmetic, Into, MatrixRef},
    memory::Parts,
    norm::{norm, norm_backward, sum_of_norms},
    operand::{Blocks, Keep, Kept, Role, finish},
    saved::{Saved, Saving},
    scratch::scratch,
    simd::{fmadd, multiversion, sigmoid},
    weight::Weight,
};

/// Weights, each projection `[out, in]` row-major.
pub type MlpWeights<'a> = MlpParts<Weight<'a>>;

/// What the backward pass needs.
#[derive(Debug, Clone)]
pub struct MlpSaved {
    gate: Option<Saved>,
    up: Saved,
}

impl MlpSaved {
    /// Bytes held.
    pub fn size_bytes(&self) -> usize {
        self.gate.as_ref().map_or(0, Saved::size_bytes) + self.up.size_bytes()
    }
}

/// Gradients, shaped as what they belong to.
#[allow(missing_docs)]
pub struct MlpGrads {
    pub x: Vec<f32>,
    pub weights: MlpParts<Vec<f32>>,
}

/// Elements of f32 that [`forward`] and [`backward`] hold while they run, beside what they get and give.
pub fn workspace(tokens: usize, hidden: usize, width: usize, gated: bool, as_rows: bool, arithmetic: Arithmetic) -> [usize; 2] {
    let blocks = Blocks::new(tokens, arithmetic);
    let (inner, part) = (if gated { 2 } else { 1 }, blocks.part_size(width));
    let packed = blocks.packed_size((inner + 1) * hidden * width);
    let forward = packed + blocks.working_size(hidden + inner * part);
    let kept = blocks.kept_size(hidden + (inner + 1) * width, hidden, as_rows);
    [forward, packed + kept + blocks.working_size(2 * hidden + (inner + 3) * part)]
}

/// The block's result, `[tokens, hidden]`.
pub fn forward(x: &[f32], weights: MlpWeights<'_>, eps: f32, arithmetic: Arithmetic, dropout: Dropout<'_>) -> (Vec<f32>, MlpSaved) {
    let (hidden, norm_of) = (weights.norm.weight.len(), weights.norm.map(|part| part.plain()));
    let (tokens, width) = (x.len() / hidden, weights.up.weight.len() / hidden);
    let how = Projecting::new(tokens, arithmetic, dropout, [weights.gate.as_ref(), Some(&weights.up), Some(&weights.down)]);
    let gate_of = weights.gate.map(|gate| how.forward(Projection::Gate, gate, hidden));
    let (up_of, down_of) = (how.forward(Projection::Up, weights.up, hidden), how.forward(Projection::Down, weights.down, width));
    let saving = || Saving::new(tokens * width, arithmetic);
    let (y, gate, up) = (Parts::new(tokens * hidden), gate_of.as_ref().map(|_| saving()), saving());
    how.blocks.each(|rows| {
        let all = rows.start * hidden..rows.end * hidden;
        let x = &x[all.clone()];
        // SAFETY: each block has its own rows.
        let y = unsafe { y.copied(all.start, x) };
        let (mut normed, mut inverse) = (scratch(x.len()), scratch(rows.len()));
        norm(&mut normed, &mut inverse, x, norm_of, eps);
        let normed = how.blocks.left(MatrixRef::new(&normed, rows.len(), hidden), rows.start);
        for part in how.blocks.parts(width) {
            let first = rows.start * width + part.start;
            let project = |of: &Forward<'_>, saving: &Saving| {
                let mut projected = scratch(rows.len() * part.len());
                of.columns(&mut projected, part.len(), Into::Overwrite, &normed, part.clone(), 0..hidden);
                // SAFETY: as above.
                unsafe { saving.put(&mut projected, part.len(), first, width) };
                projected
            };
            let mut activated = project(&up_of, &up);
            match gate_of.as_ref().zip(gate.as_ref()) {
                Some((gate_of, gate)) => {
                    let gate = project(gate_of, gate);
                    each_row(&mut activated, part.len()).zip(gate.par_chunks(part.len())).for_each(|(up, gate)| swiglu(up, gate));
                }
                None => each_row(&mut activated, part.len()).for_each(gelu),
            }
            let activated = how.blocks.left(MatrixRef::new(&activated, rows.len(), part.len()), rows.start);
            down_of.columns(y, hidden, Into::Add, &activated, 0..hidden, part);
        }
    });
    // SAFETY: the blocks are all rows.
    unsafe { (y.finish(), MlpSaved { gate: gate.map(|gate| gate.finish()), up: up.finish() }) }
}

/// Tasks of a block's rows.
fn each_row(rows: &mut [f32], width: usize) -> impl IndexedParallelIterator<Item = &mut [f32]> {
    rows.par_chunks_mut(width).with_min_len(32)
}

/// Gradients of [`forward`] for the gradient `dy` of its result; with `frozen` none of the projections' weights.
pub fn backward(
    dy: &[f32],
    x: &[f32],
    saved: &MlpSaved,
    weights: MlpWeights<'_>,
    eps: f32,
    arithmetic: Arithmetic,
    dropout: Dropout<'_>,
    frozen: bool,
) -> MlpGrads {
    let (hidden, norm_of) = (weights.norm.weight.len(), weights.norm.map(|part| part.plain()));
    let (tokens, width) = (x.len() / hidden, weights.up.weight.len() / hidden);
    let how = Projecting::new(tokens, arithmetic, dropout, [weights.gate.as_ref(), Some(&weights.up), Some(&weights.down)]);
    let gate_of = weights.gate.map(|gate| how.backward(Projection::Gate, gate, hidden));
    let (up_of, down_of) = (how.backward(Projection::Up, weights.up, hidden), how.backward(Projection::Down, weights.down, width));
    let keep = |role: Role, width: usize| how.keep(role, width, None, frozen);
    let upstream = how.keep(Role::Gradient, hidden, Some(dy), frozen);
    let (dx, inputs) = (Parts::new(tokens * hidden), keep(Role::Input, hidden));
    let (dgates, dups, activations) = (keep(Role::Gradient, width), keep(Role::Gradient, width), keep(Role::Input, width));
    let norms = how.blocks.map(|rows| {
        let all = rows.start * hidden..rows.end * hidden;
        let (x, dy) = (&x[all.clone()], MatrixRef::new(&dy[all.clone()], rows.len(), hidden));
        // SAFETY: each block has its own rows.
        let put = |keep: &Option<Keep<'_>>, values: MatrixRef<'_>, column: usize| unsafe {
            if let Some(keep) = keep {
                keep.put(values, rows.start, column);
            }
        };
        put(&upstream, dy, 0);
        let dout = how.blocks.left(dy, rows.start);
        let (mut dnormed, mut into) = (scratch(x.len()), Into::Overwrite);
        for part in how.blocks.parts(width) {
            let len = part.len();
            let mut dactivated = scratch(rows.len() * len);
            down_of.columns(&mut dactivated, Into::Overwrite, &dout, part.clone(), 0..hidden);
            let (mut activated, mut dup) = (scratch(rows.len() * len), scratch(rows.len() * len));
            let read = |saved: &Saved| {
                let mut values = scratch(rows.len() * len);
                each_row(&mut values, len).enumerate().for_each(|(row, to)| {
                    let first = (rows.start + row) * width + part.start;
                    saved.read(to, first..first + len);
                });
                values
            };
            let up = read(&saved.up);
            let results =
                each_row(&mut activated, len).zip(each_row(&mut dup, len)).zip(up.par_chunks(len).zip(dactivated.par_chunks(len)));
            let mut dgate = saved.gate.as_ref().map(read);
            match &mut dgate {
                Some(dgate) => results
                    .zip(each_row(dgate, len))
                    .for_each(|(((activated, dup), (up, dout)), gate)| swiglu_backward(activated, gate, dup, up, dout)),
                None => results.for_each(|((activated, dup), (up, dout))| gelu_backward(activated, dup, up, dout)),
            }
            let mut add = |of: &Backward<'_>, gradients: MatrixRef<'_>| {
                of.columns(&mut dnormed, into, &how.blocks.left(gradients, rows.start), 0..hidden, part.clone());
                into = Into::Add;
            };
            if let (Some(gate_of), Some(dgate)) = (&gate_of, &dgate) {
                let dgate = MatrixRef::new(dgate, rows.len(), len);
                add(gate_of, dgate);
                put(&dgates, dgate, part.start);
            }
            let dup = MatrixRef::new(&dup, rows.len(), len);
            add(&up_of, dup);
            put(&dups, dup, part.start);
            put(&activations, MatrixRef::new(&activated, rows.len(), len), part.start);
        }
        // The normalised input is cheaper to compute again than to keep.
        let (mut normed, mut inverse) = (scratch(x.len()), scratch(rows.len()));
        norm(&mut normed, &mut inverse, x, norm_of, eps);
        put(&inputs, MatrixRef::new(&normed, rows.len(), hidden), 0);
        // SAFETY: as above.
        let dx = unsafe { dx.copied(all.start, dy.parts().0) };
        norm_backward(dx, &dnormed, x, &inverse, norm_of)
    });
    // SAFETY: the blocks are all rows.
    let [upstream, inputs, dups, activations] = [upstream, inputs, dups, activations].map(|keep| unsafe { finish(keep) });
    let dgates = gate_of.and(dgates).map(|keep| unsafe { keep.finish() });
    let parts = |projection: Projection, dout: &Option<Kept<'_>>, x: &Option<Kept<'_>>, part: Affine<Weight<'_>>| {
        how.parts(projection, dout.as_ref(), x.as_ref(), part, tokens, frozen)
    };
    let weights = MlpParts {
        norm: sum_of_norms(norms),
        gate: weights.gate.map(|gate| parts(Projection::Gate, &dgates, &inputs, gate)),
        up: parts(Projection::Up, &dups, &inputs, weights.up),
        down: parts(Projection::Down, &upstream, &activations, weights.down),
    };
    // SAFETY: as above.
    MlpGrads { x: unsafe { dx.finish() }, weights }
}

multiversion!(
    /// `up` becomes `silu(gate) * up`, element by element.
    pub fn swiglu(up: &mut [f32], gate: &[f32]) = swiglu_inner
);

#[inline(always)]
fn swiglu_inner<const FMA: bool>(up: &mut [f32], gate: &[f32]) {
    for (up, gate) in up.iter_mut().zip(gate) {
        *up *= gate * sigmoid::<FMA>(*gate);
    }
}

multiversion!(fn swiglu_backward(activated: &mut [f32], gate: &mut [f32], dup: &mut [f32], up: &[f32], dout: &[f32]) = swiglu_backward_inner);

/// `gate` becomes its gradient; `activated` is the forward result again.
#[inline(always)]
fn swiglu_backward_inner<const FMA: bool>(activated: &mut [f32], gate: &mut [f32], dup: &mut [f32], up: &[f32], dout: &[f32]) {
    for (((activated, gate), dup), (up, dout)) in activated.iter_mut().zip(gate).zip(dup).zip(up.iter().zip(dout)) {
        let sigmoid = sigmoid::<FMA>(*gate);
        let silu = *gate * sigmoid;
        *activated = silu * *up;
        let dsilu = fmadd::<FMA>(silu, 1.0 - sigmoid, sigmoid);
        *gate = dout * *up * dsilu;
        *dup = dout * silu;
    }
}

multiversion!(
    /// `x` becomes `gelu(x)` in its tanh form (arXiv:1606.08415), element by element.
    pub fn gelu(x: &mut [f32]) = gelu_inner
);

/// `sqrt(2 / pi)`
const GELU_SCALE: f32 = 0.797_884_6;
const GELU_CUBIC: f32 = 0.044_715;

/// `(1 + tanh(u)) / 2 = sigmoid(2u)` with `u = scale (x + cubic x^3)`.
#[inline(always)]
fn gelu_gate<const FMA: bool>(x: f32) -> f32 {
    sigmoid::<FMA>(2.0 * GELU_SCALE * fmadd::<FMA>(GELU_CUBIC * x * x, x, x))
}

#[inline(always)]
fn gelu_inner<const FMA: bool>(x: &mut [f32]) {
    for x in x {
        *x *= gelu_gate::<FMA>(*x);
    }
}

multiversion!(fn gelu_backward(activated: &mut [f32], dx: &mut [f32], x: &[f32], dout: &[f32]) = gelu_backward_inner);

/// `activated` is the forward result again.
#[inline(always)]
fn gelu_backward_inner<const FMA: bool>(activated: &mut [f32], dx: &mut [f32], x: &[f32], dout: &[f32]) {
    for (((activated, dx), x), dout) in activated.iter_mut().zip(dx).zip(x).zip(dout) {
        let gate = gelu_gate::<FMA>(*x);
        *activated = *x * gate;
        let slope = 2.0 * GELU_SCALE * fmadd::<FMA>(3.0 * GELU_CUBIC * *x, *x, 1.0);
        *dx = dout * fmadd::<FMA>(*activated * (1.0 - gate), slope, gate);
    }
}
