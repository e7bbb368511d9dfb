//! Fused operations as a Burn backend extension.
//!
//! [`FusedOps`] is the extension: one method per half of a decoder block, the token head, the norm, the embedding and the
//! scalar head. On `Flex` each runs the kernels of `rlflow-kernels`; with autodiff, [`slice_op`] registers
//! the hand-written backward pass. Every other backend gets [`crate::composed`], the same maths from plain tensor
//! operations, which is also what the tests compare with.

mod ops;
mod root;
pub mod slice_op;

use std::sync::Arc;

use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::{
    backend::{Autodiff, Backend, Flex, backend_extension, tensor::FloatTensor},
    tensor::{Tensor, TensorData},
};
use burn_flex::FlexTensor;
use rlflow_kernels::{
    Affine, AttentionParts, AttentionShape, MlpParts, SequenceLayout, embedding, matmul::Arithmetic, memory::zeros, rope::RopeTable,
};

use crate::{dropout::BlockDropout, parameters::flex_view};

use self::{
    ops::{AttentionOp, EmbedOp, MlpOp, NormOp, ScoreOp, TokenHeadOp},
    slice_op::{run, run_recorded},
};

/// What attention needs besides tensors.
#[derive(Debug, Clone)]
pub struct AttentionContext {
    /// Sizes.
    pub shape: AttentionShape,
    /// Rotary tables, unless ALiBi is used.
    pub rope: Option<Arc<RopeTable>>,
    /// ALiBi slopes `[heads]`, empty with rotary positions.
    pub slopes: Arc<[f32]>,
    /// Where sequences start.
    pub layout: Arc<SequenceLayout>,
    /// What is dropped of what adapters see.
    pub dropout: Option<BlockDropout>,
}

/// What the feed-forward layer needs besides tensors.
#[derive(Debug, Clone)]
pub struct MlpContext {
    /// Epsilon of the norm.
    pub eps: f32,
    /// Format of the products' operands.
    pub arithmetic: Arithmetic,
    /// What is dropped of what adapters see.
    pub dropout: Option<BlockDropout>,
}

/// What lies end to end in `extras`: [`AttentionParts::extras`] or [`MlpParts::extras`].
#[derive(Debug, Clone, Copy)]
pub struct Extras<const N: usize> {
    /// Elements of each, 0 where it is not there.
    pub lengths: [usize; N],
    /// Factor on low-rank additions.
    pub scale: f32,
}

impl<const N: usize> Extras<N> {
    const NONE: Self = Self { lengths: [0; N], scale: 0.0 };
}

/// Rows of the hidden states whose token is asked for.
#[derive(Debug, Clone)]
pub struct TokenTargets {
    /// Rows of the batch, ascending.
    pub rows: Arc<[u32]>,
    /// The token each row should predict.
    pub targets: Arc<[u32]>,
    /// Factor on the logits (1 / temperature).
    pub scale: f32,
}

/// The fused operations of a decoder.
#[backend_extension(Autodiff, Flex)]
pub trait FusedOps: Backend {
    /// Embedding rows of `ids`: `[tokens, hidden]`.
    fn fused_embed(weight: FloatTensor<Self>, ids: Arc<[u32]>) -> FloatTensor<Self>;
    /// `x + attention(rms_norm(x))`: `[tokens, hidden]`.
    fn fused_attention(
        x: FloatTensor<Self>,
        norm: FloatTensor<Self>,
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        o: FloatTensor<Self>,
        context: AttentionContext,
    ) -> FloatTensor<Self>;
    /// The same with what Llama has not, and with adapters: `extras` are those end to end, `[1, any]`.
    fn fused_attention_with(
        x: FloatTensor<Self>,
        norm: FloatTensor<Self>,
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        o: FloatTensor<Self>,
        extras: FloatTensor<Self>,
        context: AttentionContext,
        parts: Extras<15>,
    ) -> FloatTensor<Self>;
    /// `x + mlp(rms_norm(x))`: `[tokens, hidden]`.
    fn fused_mlp(
        x: FloatTensor<Self>,
        norm: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        down: FloatTensor<Self>,
        context: MlpContext,
    ) -> FloatTensor<Self>;
    /// The same with what Llama has not, and with adapters: `extras` are those end to end, `[1, any]`. Without a gate
    /// (`gated`), `gate` is anything.
    fn fused_mlp_with(
        x: FloatTensor<Self>,
        norm: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        down: FloatTensor<Self>,
        extras: FloatTensor<Self>,
        context: MlpContext,
        parts: Extras<10>,
        gated: bool,
    ) -> FloatTensor<Self>;
    /// RMSNorm: `[tokens, hidden]`.
    fn fused_rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f32) -> FloatTensor<Self>;
    /// LayerNorm: `[tokens, hidden]`.
    fn fused_layer_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, bias: FloatTensor<Self>, eps: f32) -> FloatTensor<Self>;
    /// Log-probabilities (row 0) of the targets, entropies (1), whether no token is more probable (2), mean logits (3): `[4, rows]`.
    /// Gradients go through the first two.
    fn fused_token_head(
        hidden: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        targets: TokenTargets,
        arithmetic: Arithmetic,
    ) -> FloatTensor<Self>;
    /// `hidden[rows] . weight`: `[1, rows]`.
    fn fused_score(hidden: FloatTensor<Self>, weight: FloatTensor<Self>, rows: Arc<[u32]>) -> FloatTensor<Self>;
    /// A scalar `[1, 1]` whose backward pass gives `output` the gradient `gradient`.
    fn fused_root(output: FloatTensor<Self>, gradient: FloatTensor<Self>) -> FloatTensor<Self>;
}

/// Width of a `[rows, columns]` tensor.
fn columns(tensor: &FlexTensor) -> usize {
    tensor.layout().shape()[1]
}

impl FusedOps for Flex {
    fn fused_embed(weight: FloatTensor<Self>, ids: Arc<[u32]>) -> FloatTensor<Self> {
        let hidden = columns(&weight);
        run(&EmbedOp { ids, hidden }, [weight])
    }

    fn fused_attention(
        x: FloatTensor<Self>,
        norm: FloatTensor<Self>,
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        o: FloatTensor<Self>,
        context: AttentionContext,
    ) -> FloatTensor<Self> {
        run::<_, 6>(&AttentionOp { context, extras: Extras::NONE }, [x, norm, q, k, v, o])
    }

    fn fused_attention_with(
        x: FloatTensor<Self>,
        norm: FloatTensor<Self>,
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        o: FloatTensor<Self>,
        extras: FloatTensor<Self>,
        context: AttentionContext,
        parts: Extras<15>,
    ) -> FloatTensor<Self> {
        run::<_, 7>(&AttentionOp { context, extras: parts }, [x, norm, q, k, v, o, extras])
    }

    fn fused_mlp(
        x: FloatTensor<Self>,
        norm: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        down: FloatTensor<Self>,
        context: MlpContext,
    ) -> FloatTensor<Self> {
        run::<_, 5>(&MlpOp { context, extras: Extras::NONE, gated: true }, [x, norm, gate, up, down])
    }

    fn fused_mlp_with(
        x: FloatTensor<Self>,
        norm: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        down: FloatTensor<Self>,
        extras: FloatTensor<Self>,
        context: MlpContext,
        parts: Extras<10>,
        gated: bool,
    ) -> FloatTensor<Self> {
        run::<_, 6>(&MlpOp { context, extras: parts, gated }, [x, norm, gate, up, down, extras])
    }

    fn fused_rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f32) -> FloatTensor<Self> {
        run::<_, 2>(&NormOp { eps }, [x, weight])
    }

    fn fused_layer_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, bias: FloatTensor<Self>, eps: f32) -> FloatTensor<Self> {
        run::<_, 3>(&NormOp { eps }, [x, weight, bias])
    }

    fn fused_token_head(
        hidden: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        targets: TokenTargets,
        arithmetic: Arithmetic,
    ) -> FloatTensor<Self> {
        let width = columns(&hidden);
        run(&TokenHeadOp { targets, width, arithmetic }, [hidden, weight])
    }

    fn fused_score(hidden: FloatTensor<Self>, weight: FloatTensor<Self>, rows: Arc<[u32]>) -> FloatTensor<Self> {
        run(&ScoreOp { rows }, [hidden, weight])
    }

    fn fused_root(_: FloatTensor<Self>, _: FloatTensor<Self>) -> FloatTensor<Self> {
        root::value()
    }
}

impl<C: CheckpointStrategy> FusedOps for Autodiff<Flex, C> {
    fn fused_embed(weight: FloatTensor<Self>, ids: Arc<[u32]>) -> FloatTensor<Self> {
        let hidden = columns(weight.primitive());
        run_recorded::<C, _, 1>(EmbedOp { ids, hidden }, [weight])
    }

    fn fused_attention(
        x: FloatTensor<Self>,
        norm: FloatTensor<Self>,
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        o: FloatTensor<Self>,
        context: AttentionContext,
    ) -> FloatTensor<Self> {
        run_recorded::<C, _, 6>(AttentionOp { context, extras: Extras::NONE }, [x, norm, q, k, v, o])
    }

    fn fused_attention_with(
        x: FloatTensor<Self>,
        norm: FloatTensor<Self>,
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        o: FloatTensor<Self>,
        extras: FloatTensor<Self>,
        context: AttentionContext,
        parts: Extras<15>,
    ) -> FloatTensor<Self> {
        run_recorded::<C, _, 7>(AttentionOp { context, extras: parts }, [x, norm, q, k, v, o, extras])
    }

    fn fused_mlp(
        x: FloatTensor<Self>,
        norm: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        down: FloatTensor<Self>,
        context: MlpContext,
    ) -> FloatTensor<Self> {
        run_recorded::<C, _, 5>(MlpOp { context, extras: Extras::NONE, gated: true }, [x, norm, gate, up, down])
    }

    fn fused_mlp_with(
        x: FloatTensor<Self>,
        norm: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        down: FloatTensor<Self>,
        extras: FloatTensor<Self>,
        context: MlpContext,
        parts: Extras<10>,
        gated: bool,
    ) -> FloatTensor<Self> {
        run_recorded::<C, _, 6>(MlpOp { context, extras: parts, gated }, [x, norm, gate, up, down, extras])
    }

    fn fused_rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f32) -> FloatTensor<Self> {
        run_recorded::<C, _, 2>(NormOp { eps }, [x, weight])
    }

    fn fused_layer_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, bias: FloatTensor<Self>, eps: f32) -> FloatTensor<Self> {
        run_recorded::<C, _, 3>(NormOp { eps }, [x, weight, bias])
    }

    fn fused_token_head(
        hidden: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        targets: TokenTargets,
        arithmetic: Arithmetic,
    ) -> FloatTensor<Self> {
        let width = columns(hidden.primitive());
        run_recorded::<C, _, 2>(TokenHeadOp { targets, width, arithmetic }, [hidden, weight])
    }

    fn fused_score(hidden: FloatTensor<Self>, weight: FloatTensor<Self>, rows: Arc<[u32]>) -> FloatTensor<Self> {
        run_recorded::<C, _, 2>(ScoreOp { rows }, [hidden, weight])
    }

    fn fused_root(output: FloatTensor<Self>, gradient: FloatTensor<Self>) -> FloatTensor<Self> {
        root::recorded::<C>(output, gradient)
    }
}

/// Weights of an attention half: projections `[out, in]`, vectors `[1, n]`.
pub type AttentionTensors = AttentionParts<Tensor<2>>;

/// Weights of a feed-forward half: projections `[out, in]`, vectors `[1, n]`.
pub type MlpTensors = MlpParts<Tensor<2>>;

/// The operations on tensors of a `Flex` device, with or without autodiff.
pub mod flex {
    use super::*;
    use burn::backend::Dispatch;

    /// Embedding rows of `ids`.
    pub fn embed(weight: Tensor<2>, ids: Arc<[u32]>) -> Tensor<2> {
        Tensor::from_dispatch(Dispatch::fused_embed(weight.into_dispatch(), ids))
    }

    /// Gradient of a table of `dims` for the gradient of its rows `ids`.
    pub fn embed_gradient(gradient: &Tensor<2>, ids: &[u32], dims: [usize; 2]) -> Tensor<2> {
        let view = flex_view(gradient).expect("gradients are f32");
        let mut table = zeros(dims[0] * dims[1]);
        embedding::embed_backward(&mut table, view.as_slice().expect("views are contiguous f32"), ids, dims[1]);
        Tensor::from_data(TensorData::new(table, dims), &gradient.device())
    }

    /// What is there, end to end, and what it is; none where nothing is.
    fn joined<const N: usize>(parts: [Option<&Tensor<2>>; N], scale: Option<f32>) -> Option<(Tensor<2>, Extras<N>)> {
        let lengths = parts.map(|part| part.map_or(0, |part| part.dims().iter().product()));
        let vectors: Vec<Tensor<2>> =
            parts.into_iter().zip(lengths).filter_map(|(part, length)| Some(part?.clone().reshape([1, length]))).collect();
        (!vectors.is_empty()).then(|| (Tensor::cat(vectors, 1), Extras { lengths, scale: scale.unwrap_or(0.0) }))
    }

    /// `x + attention(norm(x))`.
    pub fn attention(x: Tensor<2>, weights: AttentionTensors, context: AttentionContext) -> Tensor<2> {
        let extras = joined(weights.extras(), weights.low_rank_scale());
        let AttentionTensors { norm, q, k, v, o, .. } = weights;
        let [x, norm, q, k, v, o] = [x, norm.weight, q.weight, k.weight, v.weight, o.weight].map(Tensor::into_dispatch);
        Tensor::from_dispatch(match extras {
            None => Dispatch::fused_attention(x, norm, q, k, v, o, context),
            Some((extras, parts)) => Dispatch::fused_attention_with(x, norm, q, k, v, o, extras.into_dispatch(), context, parts),
        })
    }

    /// `x + mlp(norm(x))`.
    pub fn mlp(x: Tensor<2>, weights: MlpTensors, context: MlpContext) -> Tensor<2> {
        let extras = joined(weights.extras(), weights.low_rank_scale());
        let MlpTensors { norm, gate, up, down } = weights;
        let gated = gate.is_some();
        // Something must stand in its place; nothing reads it.
        let gate = gate.map_or_else(|| norm.weight.clone().detach(), |gate| gate.weight);
        let [x, norm, gate, up, down] = [x, norm.weight, gate, up.weight, down.weight].map(Tensor::into_dispatch);
        Tensor::from_dispatch(match extras {
            None => Dispatch::fused_mlp(x, norm, gate, up, down, context),
            Some((extras, parts)) => Dispatch::fused_mlp_with(x, norm, gate, up, down, extras.into_dispatch(), context, parts, gated),
        })
    }

    /// LayerNorm where there is a bias, else RMSNorm.
    pub fn norm(x: Tensor<2>, part: Affine<Tensor<2>>, eps: f32) -> Tensor<2> {
        let (x, weight) = (x.into_dispatch(), part.weight.into_dispatch());
        Tensor::from_dispatch(match part.bias {
            None => Dispatch::fused_rms_norm(x, weight, eps),
            Some(bias) => Dispatch::fused_layer_norm(x, weight, bias.into_dispatch(), eps),
        })
    }

    /// Log-probabilities and what else is known of the targets' distributions, `[4, rows]`.
    pub fn token_head(hidden: Tensor<2>, weight: Tensor<2>, targets: TokenTargets, arithmetic: Arithmetic) -> Tensor<2> {
        Tensor::from_dispatch(Dispatch::fused_token_head(hidden.into_dispatch(), weight.into_dispatch(), targets, arithmetic))
    }

    /// Scalar head, `[1, rows]`.
    pub fn score(hidden: Tensor<2>, weight: Tensor<2>, rows: Arc<[u32]>) -> Tensor<2> {
        Tensor::from_dispatch(Dispatch::fused_score(hidden.into_dispatch(), weight.into_dispatch(), rows))
    }

    /// A scalar whose backward pass gives `output` the gradient `gradient`.
    pub fn root(output: Tensor<2>, gradient: Tensor<2>) -> Tensor<2> {
        Tensor::from_dispatch(Dispatch::fused_root(output.into_dispatch(), gradient.autodiff().into_dispatch()))
    }
}
