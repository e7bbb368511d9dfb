use std::sync::Arc;

use rlflow_kernels::{
    AttentionSaved, AttentionWeights, MlpSaved, MlpWeights, Positional, attention_block, embedding, mlp_block, norm, token_head,
};

use super::{AttentionContext, TokenTargets, slice_op::SliceOp};

#[derive(Debug, Clone)]
pub struct EmbedOp {
    pub ids: Arc<[u32]>,
    pub hidden: usize,
}

impl SliceOp<1> for EmbedOp {
    type Saved = ();

    fn forward(&self, [weight]: [&[f32]; 1]) -> (Vec<f32>, [usize; 2], ()) {
        let mut out = vec![0.0; self.ids.len() * self.hidden];
        embedding::embed(&mut out, weight, &self.ids, self.hidden);
        (out, [self.ids.len(), self.hidden], ())
    }

    fn backward(&self, [weight]: [&[f32]; 1], (): &(), gradient: &[f32], _: [bool; 1]) -> [Vec<f32>; 1] {
        let mut dweight = vec![0.0; weight.len()];
        embedding::embed_backward(&mut dweight, gradient, &self.ids, self.hidden);
        [dweight]
    }
}

#[derive(Debug, Clone)]
pub struct AttentionOp {
    pub context: AttentionContext,
}

impl AttentionOp {
    fn positional(&self) -> Positional<'_> {
        match &self.context.rope {
            Some(table) => Positional::Rope(table),
            None => Positional::Alibi(&self.context.slopes),
        }
    }
}

impl SliceOp<6> for AttentionOp {
    type Saved = AttentionSaved;

    fn forward(&self, [x, norm, q, k, v, o]: [&[f32]; 6]) -> (Vec<f32>, [usize; 2], AttentionSaved) {
        let AttentionContext { shape, layout, .. } = &self.context;
        let (y, saved) = attention_block::forward(x, AttentionWeights { norm, q, k, v, o }, self.positional(), *shape, layout);
        (y, [layout.tokens(), shape.hidden], saved)
    }

    fn backward(&self, [x, norm, q, k, v, o]: [&[f32]; 6], saved: &AttentionSaved, gradient: &[f32], _: [bool; 6]) -> [Vec<f32>; 6] {
        let AttentionContext { shape, layout, .. } = &self.context;
        let weights = AttentionWeights { norm, q, k, v, o };
        let grads = attention_block::backward(gradient, x, saved, weights, self.positional(), *shape, layout);
        [grads.x, grads.norm, grads.q, grads.k, grads.v, grads.o]
    }
}

#[derive(Debug, Clone)]
pub struct MlpOp {
    pub eps: f32,
}

impl SliceOp<5> for MlpOp {
    type Saved = MlpSaved;

    fn forward(&self, [x, norm, gate, up, down]: [&[f32]; 5]) -> (Vec<f32>, [usize; 2], MlpSaved) {
        let (y, saved) = mlp_block::forward(x, MlpWeights { norm, gate, up, down }, self.eps);
        let hidden = norm.len();
        let tokens = y.len() / hidden;
        (y, [tokens, hidden], saved)
    }

    fn backward(&self, [x, norm, gate, up, down]: [&[f32]; 5], saved: &MlpSaved, gradient: &[f32], _: [bool; 5]) -> [Vec<f32>; 5] {
        let grads = mlp_block::backward(gradient, x, saved, MlpWeights { norm, gate, up, down }, self.eps);
        [grads.x, grads.norm, grads.gate, grads.up, grads.down]
    }
}

#[derive(Debug, Clone)]
pub struct NormOp {
    pub eps: f32,
}

impl SliceOp<2> for NormOp {
    type Saved = Vec<f32>;

    fn forward(&self, [x, weight]: [&[f32]; 2]) -> (Vec<f32>, [usize; 2], Vec<f32>) {
        let (hidden, tokens) = (weight.len(), x.len() / weight.len());
        let (mut out, mut inverse) = (vec![0.0; x.len()], vec![0.0; tokens]);
        norm::rms_norm(&mut out, &mut inverse, x, weight, self.eps);
        (out, [tokens, hidden], inverse)
    }

    fn backward(&self, [x, weight]: [&[f32]; 2], inverse: &Vec<f32>, gradient: &[f32], _: [bool; 2]) -> [Vec<f32>; 2] {
        let (mut dx, mut dweight) = (vec![0.0; x.len()], vec![0.0; weight.len()]);
        norm::rms_norm_backward(&mut dx, &mut dweight, gradient, x, inverse, weight);
        [dx, dweight]
    }
}

/// Rows of a `[tokens, width]` matrix, copied together.
fn gather(hidden: &[f32], rows: &[u32], width: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(rows.len() * width);
    for row in rows {
        out.extend_from_slice(&hidden[*row as usize * width..][..width]);
    }
    out
}

#[derive(Debug, Clone)]
pub struct TokenHeadOp {
    pub targets: TokenTargets,
    pub width: usize,
}

#[derive(Debug)]
pub struct TokenHeadSaved {
    entropies: Vec<f32>,
    log_sum_exp: Vec<f32>,
}

impl SliceOp<2> for TokenHeadOp {
    type Saved = TokenHeadSaved;

    fn forward(&self, [hidden, weight]: [&[f32]; 2]) -> (Vec<f32>, [usize; 2], TokenHeadSaved) {
        let TokenTargets { rows, targets, scale } = &self.targets;
        let gathered = gather(hidden, rows, self.width);
        let count = rows.len();
        let (mut out, mut entropies, mut log_sum_exp) = (vec![0.0; count], vec![0.0; count], vec![0.0; count]);
        token_head::forward(&mut out, &mut entropies, &mut log_sum_exp, &gathered, weight, targets, *scale);
        out.extend_from_slice(&entropies);
        (out, [2, count], TokenHeadSaved { entropies, log_sum_exp })
    }

    fn backward(&self, [hidden, weight]: [&[f32]; 2], saved: &TokenHeadSaved, gradient: &[f32], _: [bool; 2]) -> [Vec<f32>; 2] {
        let TokenTargets { rows, targets, scale } = &self.targets;
        let gathered = gather(hidden, rows, self.width);
        let (dlogprobs, dentropies) = gradient.split_at(rows.len());
        let (mut drows, mut dweight) = (vec![0.0; gathered.len()], vec![0.0; weight.len()]);
        let TokenHeadSaved { entropies, log_sum_exp } = saved;
        token_head::backward(&mut drows, &mut dweight, dlogprobs, dentropies, entropies, log_sum_exp, &gathered, weight, targets, *scale);
        [scatter(&drows, rows, hidden.len(), self.width), dweight]
    }
}

/// The inverse of [`gather`], adding rows that stand twice in order.
fn scatter(rows_data: &[f32], rows: &[u32], len: usize, width: usize) -> Vec<f32> {
    let mut out = vec![0.0; len];
    for (row, data) in rows.iter().zip(rows_data.chunks_exact(width)) {
        for (sum, value) in out[*row as usize * width..][..width].iter_mut().zip(data) {
            *sum += value;
        }
    }
    out
}

#[derive(Debug, Clone)]
pub struct ScoreOp {
    pub rows: Arc<[u32]>,
}

impl SliceOp<2> for ScoreOp {
    type Saved = ();

    fn forward(&self, [hidden, weight]: [&[f32]; 2]) -> (Vec<f32>, [usize; 2], ()) {
        let width = weight.len();
        let scores = self.rows.iter().map(|row| norm::dot(&hidden[*row as usize * width..][..width], weight)).collect();
        (scores, [1, self.rows.len()], ())
    }

    fn backward(&self, [hidden, weight]: [&[f32]; 2], (): &(), gradient: &[f32], _: [bool; 2]) -> [Vec<f32>; 2] {
        let width = weight.len();
        let (mut dhidden, mut dweight) = (vec![0.0; hidden.len()], vec![0.0; width]);
        for (row, gradient) in self.rows.iter().zip(gradient) {
            let at = *row as usize * width;
            for column in 0..width {
                dhidden[at + column] += gradient * weight[column];
                dweight[column] += gradient * hidden[at + column];
            }
        }
        [dhidden, dweight]
    }
}
