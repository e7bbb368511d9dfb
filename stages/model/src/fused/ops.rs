use std::sync::Arc;

use rlflow_kernels::{
    Affine, AttentionGrads, AttentionSaved, AttentionWeights, Dropout, MlpGrads, MlpSaved, MlpWeights, Positional, Weight, attention_block,
    embedding,
    matmul::Arithmetic,
    memory::zeros,
    mlp_block, norm, reads_narrow_weights,
    token_head::{self, TokenStatistics},
};

use super::{AttentionContext, Extras, MlpContext, TokenTargets, slice_op::SliceOp};
use crate::dropout::BlockDropout;

#[derive(Debug, Clone)]
pub struct EmbedOp {
    pub ids: Arc<[u32]>,
    pub hidden: usize,
}

impl SliceOp<1> for EmbedOp {
    type Saved = ();

    fn saved_elements(_: &()) -> usize {
        0
    }

    fn forward(&self, [weight]: [Weight<'_>; 1]) -> (Vec<f32>, [usize; 2], ()) {
        (embedding::embed(weight, &self.ids, self.hidden), [self.ids.len(), self.hidden], ())
    }

    fn reads_narrow(&self) -> bool {
        true
    }

    fn backward(&self, [weight]: [Weight<'_>; 1], (): &(), gradient: &[f32], _: [bool; 1]) -> [Vec<f32>; 1] {
        let mut dweight = zeros(weight.len());
        embedding::embed_backward(&mut dweight, gradient, &self.ids, self.hidden);
        [dweight]
    }
}

/// Cuts `extras`, which lie end to end, into slices of the given lengths.
fn cut<const N: usize>(extras: &[f32], lengths: [usize; N]) -> [&[f32]; N] {
    let mut rest = extras;
    lengths.map(|length| {
        let (head, tail) = rest.split_at(length);
        rest = tail;
        head
    })
}

/// The inverse of [`cut`].
fn join<const N: usize>(parts: [Option<&Vec<f32>>; N]) -> Vec<f32> {
    parts.into_iter().flatten().flatten().copied().collect()
}

#[derive(Debug, Clone)]
pub struct AttentionOp {
    pub context: AttentionContext,
    pub extras: Extras<15>,
}

impl AttentionOp {
    fn needs(&self) -> [usize; 2] {
        let AttentionContext { layout, shape, .. } = &self.context;
        // Gradients of biases and factors need rows; those of norms do not.
        let as_rows = [&self.extras.lengths[1..5], &self.extras.lengths[7..]].concat().iter().any(|length| *length > 0);
        attention_block::workspace(layout.tokens(), *shape, as_rows)
    }

    fn positional(&self) -> Positional<'_> {
        match &self.context.rope {
            Some(table) => Positional::Rope(table),
            None if self.context.slopes.is_empty() => Positional::Embedded,
            None => Positional::Alibi(&self.context.slopes),
        }
    }

    fn weights<'a>(&self, [norm, q, k, v, o]: [Weight<'a>; 5], extras: &'a [f32]) -> AttentionWeights<'a> {
        let Extras { lengths, scale } = self.extras;
        let [norm_bias, q_bias, k_bias, v_bias, o_bias, q_norm, k_norm, qa, qb, ka, kb, va, vb, oa, ob] = cut(extras, lengths);
        let there = |slice: &'a [f32]| (!slice.is_empty()).then_some(Weight::F32(slice));
        AttentionWeights {
            norm: Affine::new(norm, there(norm_bias)),
            q: Affine::of_slices(q, q_bias, [qa, qb], scale),
            k: Affine::of_slices(k, k_bias, [ka, kb], scale),
            v: Affine::of_slices(v, v_bias, [va, vb], scale),
            o: Affine::of_slices(o, o_bias, [oa, ob], scale),
            q_norm: there(q_norm),
            k_norm: there(k_norm),
        }
    }

    fn run(&self, x: &[f32], weights: AttentionWeights<'_>) -> (Vec<f32>, [usize; 2], AttentionSaved) {
        let AttentionContext { shape, layout, dropout, .. } = &self.context;
        let (y, saved) = with_dropout(dropout, |dropout| attention_block::forward(x, weights, self.positional(), *shape, layout, dropout));
        (y, [layout.tokens(), shape.hidden], saved)
    }

    fn run_back(&self, gradient: &[f32], x: &[f32], saved: &AttentionSaved, weights: AttentionWeights<'_>, frozen: bool) -> AttentionGrads {
        let AttentionContext { shape, layout, dropout, .. } = &self.context;
        with_dropout(dropout, |dropout| {
            attention_block::backward(gradient, x, saved, weights, self.positional(), *shape, layout, dropout, frozen)
        })
    }
}

/// Gives `run` what `dropout` drops, as kernels take it.
fn with_dropout<T>(dropout: &Option<BlockDropout>, run: impl FnOnce(Dropout<'_>) -> T) -> T {
    match dropout {
        Some(dropout) => run(Some(&|projection, rows: &mut [f32]| dropout.apply(projection, rows))),
        None => run(None),
    }
}

/// Llama's attention half.
impl SliceOp<6> for AttentionOp {
    type Saved = AttentionSaved;

    fn saved_elements(saved: &AttentionSaved) -> usize {
        saved.size_bytes() / 4
    }

    fn workspace(&self, _: [Weight<'_>; 6]) -> [usize; 2] {
        self.needs()
    }

    fn reads_narrow(&self) -> bool {
        reads_narrow_weights(self.context.shape.arithmetic)
    }

    fn forward(&self, [x, norm, q, k, v, o]: [Weight<'_>; 6]) -> (Vec<f32>, [usize; 2], AttentionSaved) {
        self.run(&x.wide(), self.weights([norm, q, k, v, o], &[]))
    }

    fn backward(
        &self,
        [x, norm, q, k, v, o]: [Weight<'_>; 6],
        saved: &AttentionSaved,
        gradient: &[f32],
        wanted: [bool; 6],
    ) -> [Vec<f32>; 6] {
        let frozen = !wanted[2..].contains(&true);
        let AttentionGrads { x, weights } = self.run_back(gradient, &x.wide(), saved, self.weights([norm, q, k, v, o], &[]), frozen);
        [x, weights.norm.weight, weights.q.weight, weights.k.weight, weights.v.weight, weights.o.weight]
    }
}

/// Any family's, and adapters': what Llama has not comes last, end to end.
impl SliceOp<7> for AttentionOp {
    type Saved = AttentionSaved;

    fn saved_elements(saved: &AttentionSaved) -> usize {
        saved.size_bytes() / 4
    }

    fn workspace(&self, _: [Weight<'_>; 7]) -> [usize; 2] {
        self.needs()
    }

    fn reads_narrow(&self) -> bool {
        reads_narrow_weights(self.context.shape.arithmetic)
    }

    fn forward(&self, [x, norm, q, k, v, o, extras]: [Weight<'_>; 7]) -> (Vec<f32>, [usize; 2], AttentionSaved) {
        self.run(&x.wide(), self.weights([norm, q, k, v, o], &extras.wide()))
    }

    fn backward(
        &self,
        [x, norm, q, k, v, o, extras]: [Weight<'_>; 7],
        saved: &AttentionSaved,
        gradient: &[f32],
        wanted: [bool; 7],
    ) -> [Vec<f32>; 7] {
        let frozen = !wanted[2..6].contains(&true);
        let AttentionGrads { x, weights } =
            self.run_back(gradient, &x.wide(), saved, self.weights([norm, q, k, v, o], &extras.wide()), frozen);
        let extras = join(weights.extras());
        [x, weights.norm.weight, weights.q.weight, weights.k.weight, weights.v.weight, weights.o.weight, extras]
    }
}

#[derive(Debug, Clone)]
pub struct MlpOp {
    pub context: MlpContext,
    pub extras: Extras<10>,
    pub gated: bool,
}

impl MlpOp {
    fn needs(&self, x: Weight<'_>, norm: Weight<'_>, up: Weight<'_>) -> [usize; 2] {
        let (hidden, tokens) = (norm.len(), x.len() / norm.len());
        let as_rows = self.extras.lengths[1..].iter().any(|length| *length > 0);
        mlp_block::workspace(tokens, hidden, up.len() / hidden, self.gated, as_rows, self.context.arithmetic)
    }

    fn weights<'a>(&self, [norm, gate, up, down]: [Weight<'a>; 4], extras: &'a [f32]) -> MlpWeights<'a> {
        let Extras { lengths, scale } = self.extras;
        let [norm_bias, gate_bias, up_bias, down_bias, gate_a, gate_b, up_a, up_b, down_a, down_b] = cut(extras, lengths);
        MlpWeights {
            norm: Affine::new(norm, (!norm_bias.is_empty()).then_some(Weight::F32(norm_bias))),
            gate: self.gated.then(|| Affine::of_slices(gate, gate_bias, [gate_a, gate_b], scale)),
            up: Affine::of_slices(up, up_bias, [up_a, up_b], scale),
            down: Affine::of_slices(down, down_bias, [down_a, down_b], scale),
        }
    }

    fn run(&self, x: &[f32], weights: MlpWeights<'_>) -> (Vec<f32>, [usize; 2], MlpSaved) {
        let hidden = weights.norm.weight.len();
        let MlpContext { eps, arithmetic, dropout } = &self.context;
        let (y, saved) = with_dropout(dropout, |dropout| mlp_block::forward(x, weights, *eps, *arithmetic, dropout));
        let tokens = y.len() / hidden;
        (y, [tokens, hidden], saved)
    }

    fn run_back(&self, gradient: &[f32], x: &[f32], saved: &MlpSaved, weights: MlpWeights<'_>, frozen: bool) -> MlpGrads {
        let MlpContext { eps, arithmetic, dropout } = &self.context;
        with_dropout(dropout, |dropout| mlp_block::backward(gradient, x, saved, weights, *eps, *arithmetic, dropout, frozen))
    }
}

/// Llama's feed-forward half.
impl SliceOp<5> for MlpOp {
    type Saved = MlpSaved;

    fn saved_elements(saved: &MlpSaved) -> usize {
        saved.size_bytes() / 4
    }

    fn workspace(&self, inputs: [Weight<'_>; 5]) -> [usize; 2] {
        self.needs(inputs[0], inputs[1], inputs[3])
    }

    fn reads_narrow(&self) -> bool {
        reads_narrow_weights(self.context.arithmetic)
    }

    fn forward(&self, [x, norm, gate, up, down]: [Weight<'_>; 5]) -> (Vec<f32>, [usize; 2], MlpSaved) {
        self.run(&x.wide(), self.weights([norm, gate, up, down], &[]))
    }

    fn backward(&self, [x, norm, gate, up, down]: [Weight<'_>; 5], saved: &MlpSaved, gradient: &[f32], wanted: [bool; 5]) -> [Vec<f32>; 5] {
        let frozen = !wanted[2..].contains(&true);
        let MlpGrads { x, weights } = self.run_back(gradient, &x.wide(), saved, self.weights([norm, gate, up, down], &[]), frozen);
        let gate = weights.gate.map(|gate| gate.weight).unwrap_or_default();
        [x, weights.norm.weight, gate, weights.up.weight, weights.down.weight]
    }
}

/// Any family's, and adapters': what Llama has not comes last, end to end. What stands in the place of a gate that is not there gets no gradient.
impl SliceOp<6> for MlpOp {
    type Saved = MlpSaved;

    fn saved_elements(saved: &MlpSaved) -> usize {
        saved.size_bytes() / 4
    }

    fn workspace(&self, inputs: [Weight<'_>; 6]) -> [usize; 2] {
        self.needs(inputs[0], inputs[1], inputs[3])
    }

    fn reads_narrow(&self) -> bool {
        reads_narrow_weights(self.context.arithmetic)
    }

    fn forward(&self, [x, norm, gate, up, down, extras]: [Weight<'_>; 6]) -> (Vec<f32>, [usize; 2], MlpSaved) {
        self.run(&x.wide(), self.weights([norm, gate, up, down], &extras.wide()))
    }

    fn backward(
        &self,
        [x, norm, gate, up, down, extras]: [Weight<'_>; 6],
        saved: &MlpSaved,
        gradient: &[f32],
        wanted: [bool; 6],
    ) -> [Vec<f32>; 6] {
        let frozen = !wanted[2..5].contains(&true);
        let MlpGrads { x, weights } =
            self.run_back(gradient, &x.wide(), saved, self.weights([norm, gate, up, down], &extras.wide()), frozen);
        let extras = join(weights.extras());
        let gate = weights.gate.map_or_else(|| zeros(gate.len()), |gate| gate.weight);
        [x, weights.norm.weight, gate, weights.up.weight, weights.down.weight, extras]
    }
}

#[derive(Debug, Clone)]
pub struct NormOp {
    pub eps: f32,
}

impl NormOp {
    fn run(&self, x: &[f32], part: Affine<&[f32]>) -> (Vec<f32>, [usize; 2], Vec<f32>) {
        let (hidden, tokens) = (part.weight.len(), x.len() / part.weight.len());
        let (mut out, mut inverse) = (zeros(x.len()), zeros(tokens));
        norm::norm(&mut out, &mut inverse, x, part, self.eps);
        (out, [tokens, hidden], inverse)
    }
}

/// RMSNorm.
impl SliceOp<2> for NormOp {
    type Saved = Vec<f32>;

    fn saved_elements(saved: &Vec<f32>) -> usize {
        saved.len()
    }

    fn forward(&self, [x, weight]: [Weight<'_>; 2]) -> (Vec<f32>, [usize; 2], Vec<f32>) {
        self.run(&x.wide(), Affine::plain(&weight.wide()))
    }

    fn backward(&self, [x, weight]: [Weight<'_>; 2], inverse: &Vec<f32>, gradient: &[f32], _: [bool; 2]) -> [Vec<f32>; 2] {
        let mut dx = zeros(x.len());
        let grads = norm::norm_backward(&mut dx, gradient, &x.wide(), inverse, Affine::plain(&weight.wide()));
        [dx, grads.weight]
    }
}

/// LayerNorm.
impl SliceOp<3> for NormOp {
    type Saved = Vec<f32>;

    fn saved_elements(saved: &Vec<f32>) -> usize {
        saved.len()
    }

    fn forward(&self, [x, weight, bias]: [Weight<'_>; 3]) -> (Vec<f32>, [usize; 2], Vec<f32>) {
        self.run(&x.wide(), Affine::new(&weight.wide(), Some(&bias.wide())))
    }

    fn backward(&self, [x, weight, bias]: [Weight<'_>; 3], inverse: &Vec<f32>, gradient: &[f32], _: [bool; 3]) -> [Vec<f32>; 3] {
        let mut dx = zeros(x.len());
        let grads = norm::norm_backward(&mut dx, gradient, &x.wide(), inverse, Affine::new(&weight.wide(), Some(&bias.wide())));
        [dx, grads.weight, grads.bias.unwrap_or_default()]
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
    pub arithmetic: Arithmetic,
}

#[derive(Debug)]
pub struct TokenHeadSaved {
    entropies: Vec<f32>,
    log_sum_exp: Vec<f32>,
}

impl SliceOp<2> for TokenHeadOp {
    type Saved = TokenHeadSaved;

    fn saved_elements(saved: &TokenHeadSaved) -> usize {
        saved.entropies.len() + saved.log_sum_exp.len()
    }

    fn workspace(&self, [_, weight]: [Weight<'_>; 2]) -> [usize; 2] {
        let (rows, vocab) = (self.targets.rows.len(), weight.len() / self.width);
        let logits = token_head::held_logits(rows, vocab);
        [rows * self.width + logits, 2 * rows * self.width + logits]
    }

    fn reads_narrow(&self) -> bool {
        reads_narrow_weights(self.arithmetic)
    }

    fn forward(&self, [hidden, weight]: [Weight<'_>; 2]) -> (Vec<f32>, [usize; 2], TokenHeadSaved) {
        let TokenTargets { rows, targets, scale } = &self.targets;
        let gathered = gather(&hidden.wide(), rows, self.width);
        let count = rows.len();
        let (mut out, mut log_sum_exp) = (zeros(4 * count), zeros(count));
        let (logprobs, rest) = out.split_at_mut(count);
        let (entropies, rest) = rest.split_at_mut(count);
        let (correct, mean_logits) = rest.split_at_mut(count);
        let statistics = TokenStatistics { logprobs, entropies, log_sum_exp: &mut log_sum_exp, correct, mean_logits };
        token_head::forward(statistics, &gathered, weight, targets, *scale, self.arithmetic);
        let entropies = out[count..2 * count].to_vec();
        (out, [4, count], TokenHeadSaved { entropies, log_sum_exp })
    }

    fn backward(&self, [hidden, weight]: [Weight<'_>; 2], saved: &TokenHeadSaved, gradient: &[f32], wanted: [bool; 2]) -> [Vec<f32>; 2] {
        let TokenTargets { rows, targets, scale } = &self.targets;
        let gathered = gather(&hidden.wide(), rows, self.width);
        // The other rows are only looked at.
        let (dlogprobs, rest) = gradient.split_at(rows.len());
        let dentropies = &rest[..rows.len()];
        let (mut drows, mut dweight) = (zeros(gathered.len()), zeros(if wanted[1] { weight.len() } else { 0 }));
        let TokenHeadSaved { entropies, log_sum_exp } = saved;
        token_head::backward(
            &mut drows,
            wanted[1].then_some(&mut dweight),
            dlogprobs,
            dentropies,
            entropies,
            log_sum_exp,
            &gathered,
            weight,
            targets,
            *scale,
            self.arithmetic,
        );
        [scatter(&drows, rows, hidden.len(), self.width), dweight]
    }
}

/// The inverse of [`gather`], adding rows that stand twice in order.
fn scatter(rows_data: &[f32], rows: &[u32], len: usize, width: usize) -> Vec<f32> {
    let mut out = zeros(len);
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

    fn saved_elements(_: &()) -> usize {
        0
    }

    fn forward(&self, [hidden, weight]: [Weight<'_>; 2]) -> (Vec<f32>, [usize; 2], ()) {
        let (width, hidden, weight) = (weight.len(), hidden.wide(), weight.wide());
        let scores = self.rows.iter().map(|row| norm::dot(&hidden[*row as usize * width..][..width], &weight)).collect();
        (scores, [1, self.rows.len()], ())
    }

    fn backward(&self, [hidden, weight]: [Weight<'_>; 2], (): &(), gradient: &[f32], _: [bool; 2]) -> [Vec<f32>; 2] {
        let (width, hidden, weight) = (weight.len(), hidden.wide(), weight.wide());
        let (mut dhidden, mut dweight) = (zeros(hidden.len()), zeros(width));
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
