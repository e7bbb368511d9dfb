//! The attention half of a decoder block as one operation: `x + attention(norm(x))`.

use crate::{
    affine::{Affine, AttentionParts, Projecting},
    attention::{Heads, attention, attention_backward},
    layout::SequenceLayout,
    low_rank::{Dropout, Projection},
    matmul::{Arithmetic, Into, MatrixRef},
    memory::{Parts, copied, zeros},
    norm::{norm, norm_backward, rms_norm, rms_norm_backward, sum_of_norms},
    operand::{Blocks, Kept, Role, finish, put},
    rope::RopeTable,
    scratch::scratch,
    weight::Weight,
};

/// How positions enter.
#[derive(Clone, Copy)]
pub enum Positional<'a> {
    /// Rotary embedding of queries and keys.
    Rope(&'a RopeTable),
    /// ALiBi slopes, `[heads]`.
    Alibi(&'a [f32]),
    /// Not here: they were added to the embedding.
    Embedded,
}

impl<'a> Positional<'a> {
    pub(crate) fn slopes(self) -> &'a [f32] {
        match self {
            Self::Alibi(slopes) => slopes,
            Self::Rope(_) | Self::Embedded => &[],
        }
    }

    pub(crate) fn rotate(self, rows: &mut [f32], positions: &[u32], inverse: bool) {
        if let Self::Rope(table) = self {
            table.rotate(rows, positions, inverse);
        }
    }
}

/// Sizes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Heads.
    pub heads: Heads,
    /// Epsilon of the norms.
    pub eps: f32,
    /// A token sees itself and the `window - 1` tokens before it; all of them without a window.
    pub window: Option<usize>,
    /// Format of the products' operands.
    pub arithmetic: Arithmetic,
}

/// Weights, each projection `[out, in]` row-major as in Llama checkpoints.
pub type AttentionWeights<'a> = AttentionParts<Weight<'a>>;

/// Gradients, shaped as what they belong to.
#[allow(missing_docs)]
pub struct AttentionGrads {
    pub x: Vec<f32>,
    pub weights: AttentionParts<Vec<f32>>,
}

/// What the backward pass needs.
#[derive(Debug, Clone)]
pub struct AttentionSaved {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    out: Vec<f32>,
    log_sum_exp: Vec<f32>,
    q_norm: Option<HeadNormSaved>,
    k_norm: Option<HeadNormSaved>,
}

/// Queries or keys before their norm.
#[derive(Debug, Clone)]
struct HeadNormSaved {
    rows: Vec<f32>,
    inverse: Vec<f32>,
}

impl HeadNormSaved {
    fn size_bytes(&self) -> usize {
        4 * (self.rows.len() + self.inverse.len())
    }
}

fn head_norm(rows: &mut [f32], weight: Option<&[f32]>, eps: f32) -> Option<HeadNormSaved> {
    let weight = weight?;
    let mut saved = HeadNormSaved { rows: copied(rows), inverse: zeros(rows.len() / weight.len()) };
    rms_norm(rows, &mut saved.inverse, &saved.rows, weight, eps);
    Some(saved)
}

/// `rows`, the gradient of normed heads, becomes that of the heads before the norm. Returns the weight's.
fn head_norm_backward(rows: &mut [f32], saved: Option<&HeadNormSaved>, weight: Option<&[f32]>) -> Option<Vec<f32>> {
    let (saved, weight) = (saved?, weight?);
    let (mut before, mut dweight) = (zeros(rows.len()), zeros(weight.len()));
    rms_norm_backward(&mut before, &mut dweight, rows, &saved.rows, &saved.inverse, weight);
    rows.copy_from_slice(&before);
    Some(dweight)
}

impl AttentionSaved {
    /// Keys (rotated) and values, `[tokens, kv_heads * head_dim]` each: the prompt's part of a key-value cache.
    pub fn keys_and_values(&self) -> (&[f32], &[f32]) {
        (&self.k, &self.v)
    }

    /// Bytes held.
    pub fn size_bytes(&self) -> usize {
        let norms = [&self.q_norm, &self.k_norm].into_iter().flatten().map(HeadNormSaved::size_bytes).sum::<usize>();
        4 * (self.q.len() + self.k.len() + self.v.len() + self.out.len() + self.log_sum_exp.len()) + norms
    }
}

/// Elements of f32 that [`forward`] and [`backward`] hold while they run, beside what they get and give.
pub fn workspace(tokens: usize, shape: AttentionShape, as_rows: bool) -> [usize; 2] {
    let blocks = Blocks::new(tokens, shape.arithmetic);
    let (hidden, query, kv) = (shape.hidden, shape.heads.query_width(), shape.heads.kv_width());
    let packed = blocks.packed_size(2 * hidden * (query + kv));
    let kept = blocks.kept_size(hidden, hidden + 2 * (query + kv), as_rows);
    let gradients = tokens * 2 * (query + kv);
    [packed + blocks.working_size(hidden), packed + kept + gradients + blocks.working_size(2 * hidden)]
}

/// `x + attention(norm(x))`, `[tokens, hidden]`.
pub fn forward(
    x: &[f32],
    weights: AttentionWeights<'_>,
    positional: Positional<'_>,
    shape: AttentionShape,
    layout: &SequenceLayout,
    dropout: Dropout<'_>,
) -> (Vec<f32>, AttentionSaved) {
    let (tokens, hidden) = (layout.tokens(), shape.hidden);
    let (query_width, kv_width) = (shape.heads.query_width(), shape.heads.kv_width());
    let how = projecting(&weights, shape, tokens, dropout);
    let norm_of = weights.norm.map(|part| part.plain());
    let [of_queries, of_keys] = [weights.q_norm, weights.k_norm].map(|norm| norm.map(Weight::plain));
    let of = [
        how.forward(Projection::Query, weights.q, hidden),
        how.forward(Projection::Key, weights.k, hidden),
        how.forward(Projection::Value, weights.v, hidden),
    ];
    let widths = [query_width, kv_width, kv_width];
    let results = widths.map(|width| Parts::new(tokens * width));
    let has_head_norms = weights.q_norm.is_some() || weights.k_norm.is_some();
    how.blocks.each(|rows| {
        let x = &x[rows.start * hidden..rows.end * hidden];
        let (mut normed, mut inverse) = (scratch(x.len()), scratch(rows.len()));
        norm(&mut normed, &mut inverse, x, norm_of, shape.eps);
        let normed = how.blocks.left(MatrixRef::new(&normed, rows.len(), hidden), rows.start);
        for (index, ((of, result), width)) in of.iter().zip(&results).zip(widths).enumerate() {
            // SAFETY: each block has its own rows.
            let result = unsafe { result.zeroed(rows.start * width..rows.end * width) };
            of.run(result, Into::Overwrite, &normed);
            // Heads are normed before they are rotated.
            if index < 2 && !has_head_norms {
                positional.rotate(result, &layout.positions()[rows.clone()], false);
            }
        }
    });
    // SAFETY: the blocks are all rows.
    let [mut q, mut k, v] = results.map(|result| unsafe { result.finish() });
    let (mut q_norm, mut k_norm) = (None, None);
    if has_head_norms {
        q_norm = head_norm(&mut q, of_queries, shape.eps);
        k_norm = head_norm(&mut k, of_keys, shape.eps);
        positional.rotate(&mut q, layout.positions(), false);
        positional.rotate(&mut k, layout.positions(), false);
    }
    let (mut out, mut log_sum_exp) = (zeros(tokens * query_width), zeros(shape.heads.heads * tokens));
    attention(&mut out, &mut log_sum_exp, &q, &k, &v, positional.slopes(), shape.heads, shape.window, layout, shape.arithmetic);
    let (output, y) = (how.forward(Projection::Output, weights.o, query_width), Parts::new(tokens * hidden));
    how.blocks.each(|rows| {
        // SAFETY: each block has its own rows.
        let y = unsafe { y.copied(rows.start * hidden, &x[rows.start * hidden..rows.end * hidden]) };
        output.run(y, Into::Add, &how.blocks.left(MatrixRef::of_rows(&out, &rows, query_width), rows.start));
    });
    // SAFETY: the blocks are all rows.
    let y = unsafe { y.finish() };
    (y, AttentionSaved { q, k, v, out, log_sum_exp, q_norm, k_norm })
}

fn projecting<'a>(weights: &AttentionWeights<'_>, shape: AttentionShape, tokens: usize, dropout: Dropout<'a>) -> Projecting<'a> {
    Projecting::new(tokens, shape.arithmetic, dropout, [&weights.q, &weights.k, &weights.v, &weights.o].map(Some))
}

/// Gradients of [`forward`] for the gradient `dy` of its result; with `frozen` none of the projections' weights.
pub fn backward(
    dy: &[f32],
    x: &[f32],
    saved: &AttentionSaved,
    weights: AttentionWeights<'_>,
    positional: Positional<'_>,
    shape: AttentionShape,
    layout: &SequenceLayout,
    dropout: Dropout<'_>,
    frozen: bool,
) -> AttentionGrads {
    let (tokens, hidden) = (layout.tokens(), shape.hidden);
    let (query_width, kv_width) = (shape.heads.query_width(), shape.heads.kv_width());
    let how = projecting(&weights, shape, tokens, dropout);
    let norm_of = weights.norm.map(|part| part.plain());
    let [of_queries, of_keys] = [weights.q_norm, weights.k_norm].map(|norm| norm.map(Weight::plain));
    let (output, dout) = (how.backward(Projection::Output, weights.o, query_width), Parts::new(tokens * query_width));
    let upstream = how.keep(Role::Gradient, hidden, Some(dy), frozen);
    let heads = how.keep(Role::Input, query_width, Some(&saved.out[..]), frozen);
    how.blocks.each(|rows| {
        // SAFETY: each block has its own rows.
        let dout = unsafe { dout.zeroed(rows.start * query_width..rows.end * query_width) };
        let dy = MatrixRef::of_rows(dy, &rows, hidden);
        output.run(dout, Into::Overwrite, &how.blocks.left(dy, rows.start));
        // SAFETY: as above.
        unsafe {
            put(&upstream, dy, rows.start);
            put(&heads, MatrixRef::of_rows(&saved.out, &rows, query_width), rows.start);
        }
    });
    // SAFETY: the blocks are all rows.
    let (dout, upstream, heads) = unsafe { (dout.finish(), finish(upstream), finish(heads)) };

    let (mut dq, mut dk, mut dv) = (zeros(tokens * query_width), zeros(tokens * kv_width), zeros(tokens * kv_width));
    let AttentionSaved { q, k, v, out, log_sum_exp, .. } = saved;
    let slopes = positional.slopes();
    attention_backward(
        &mut dq,
        &mut dk,
        &mut dv,
        &dout,
        out,
        log_sum_exp,
        q,
        k,
        v,
        slopes,
        shape.heads,
        shape.window,
        layout,
        shape.arithmetic,
    );
    positional.rotate(&mut dq, layout.positions(), true);
    positional.rotate(&mut dk, layout.positions(), true);
    let q_norm = head_norm_backward(&mut dq, saved.q_norm.as_ref(), of_queries);
    let k_norm = head_norm_backward(&mut dk, saved.k_norm.as_ref(), of_keys);

    let projections = [(Projection::Query, weights.q, &dq), (Projection::Key, weights.k, &dk), (Projection::Value, weights.v, &dv)];
    let of = projections.map(|(projection, part, _)| how.backward(projection, part, hidden));
    let (dx, inputs) = (Parts::new(tokens * hidden), how.keep(Role::Input, hidden, None, frozen));
    let kept = projections.map(|(.., gradients)| how.keep(Role::Gradient, gradients.len() / tokens.max(1), Some(&gradients[..]), frozen));
    let norms = how.blocks.map(|rows| {
        let all = rows.start * hidden..rows.end * hidden;
        let (x, dy) = (&x[all.clone()], &dy[all.clone()]);
        let (mut dnormed, mut into) = (scratch(x.len()), Into::Overwrite);
        for ((of, (.., gradients)), kept) in of.iter().zip(projections).zip(&kept) {
            let width = gradients.len() / tokens.max(1);
            let gradients = MatrixRef::of_rows(gradients, &rows, width);
            of.run(&mut dnormed, into, &how.blocks.left(gradients, rows.start));
            into = Into::Add;
            // SAFETY: each block has its own rows.
            unsafe { put(kept, gradients, rows.start) };
        }
        // The normalised input is cheaper to compute again than to keep.
        let (mut normed, mut inverse) = (scratch(x.len()), scratch(rows.len()));
        norm(&mut normed, &mut inverse, x, norm_of, shape.eps);
        // SAFETY: as above.
        let dx = unsafe {
            put(&inputs, MatrixRef::new(&normed, rows.len(), hidden), rows.start);
            dx.copied(all.start, dy)
        };
        norm_backward(dx, &dnormed, x, &inverse, norm_of)
    });
    // SAFETY: the blocks are all rows.
    let (dx, inputs, kept) = unsafe { (dx.finish(), finish(inputs), kept.map(|keep| finish(keep))) };
    let parts = |(projection, part, _): (Projection, Affine<Weight<'_>>, _), dout: &Option<Kept<'_>>, x: &Option<Kept<'_>>| {
        how.parts(projection, dout.as_ref(), x.as_ref(), part, tokens, frozen)
    };
    let [query, key, value] = projections;
    let [q, k, v] = [(query, &kept[0]), (key, &kept[1]), (value, &kept[2])].map(|(projection, dout)| parts(projection, dout, &inputs));
    let o = parts((Projection::Output, weights.o, &dq), &upstream, &heads);
    AttentionGrads { x: dx, weights: AttentionParts { norm: sum_of_norms(norms), q, k, v, o, q_norm, k_norm } }
}
