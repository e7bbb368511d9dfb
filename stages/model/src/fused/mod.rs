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
    tensor::Tensor,
};
use burn_flex::FlexTensor;
use rlflow_kernels::{AttentionShape, SequenceLayout, rope::RopeTable};

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
    /// `x + mlp(rms_norm(x))`: `[tokens, hidden]`.
    fn fused_mlp(
        x: FloatTensor<Self>,
        norm: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        down: FloatTensor<Self>,
        eps: f32,
    ) -> FloatTensor<Self>;
    /// RMSNorm: `[tokens, hidden]`.
    fn fused_rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f32) -> FloatTensor<Self>;
    /// Log-probabilities (row 0) and entropies (row 1) of the targets: `[2, rows]`.
    fn fused_token_head(hidden: FloatTensor<Self>, weight: FloatTensor<Self>, targets: TokenTargets) -> FloatTensor<Self>;
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
        run(&AttentionOp { context }, [x, norm, q, k, v, o])
    }

    fn fused_mlp(
        x: FloatTensor<Self>,
        norm: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        down: FloatTensor<Self>,
        eps: f32,
    ) -> FloatTensor<Self> {
        run(&MlpOp { eps }, [x, norm, gate, up, down])
    }

    fn fused_rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f32) -> FloatTensor<Self> {
        run(&NormOp { eps }, [x, weight])
    }

    fn fused_token_head(hidden: FloatTensor<Self>, weight: FloatTensor<Self>, targets: TokenTargets) -> FloatTensor<Self> {
        let width = columns(&hidden);
        run(&TokenHeadOp { targets, width }, [hidden, weight])
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
        run_recorded::<C, _, 6>(AttentionOp { context }, [x, norm, q, k, v, o])
    }

    fn fused_mlp(
        x: FloatTensor<Self>,
        norm: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        down: FloatTensor<Self>,
        eps: f32,
    ) -> FloatTensor<Self> {
        run_recorded::<C, _, 5>(MlpOp { eps }, [x, norm, gate, up, down])
    }

    fn fused_rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f32) -> FloatTensor<Self> {
        run_recorded::<C, _, 2>(NormOp { eps }, [x, weight])
    }

    fn fused_token_head(hidden: FloatTensor<Self>, weight: FloatTensor<Self>, targets: TokenTargets) -> FloatTensor<Self> {
        let width = columns(hidden.primitive());
        run_recorded::<C, _, 2>(TokenHeadOp { targets, width }, [hidden, weight])
    }

    fn fused_score(hidden: FloatTensor<Self>, weight: FloatTensor<Self>, rows: Arc<[u32]>) -> FloatTensor<Self> {
        run_recorded::<C, _, 2>(ScoreOp { rows }, [hidden, weight])
    }

    fn fused_root(output: FloatTensor<Self>, gradient: FloatTensor<Self>) -> FloatTensor<Self> {
        root::recorded::<C>(output, gradient)
    }
}

/// Weights of an attention half, each `[out, in]`; the norm is `[1, hidden]`.
#[derive(Debug, Clone)]
#[allow(missing_docs)]
pub struct AttentionTensors {
    pub norm: Tensor<2>,
    pub q: Tensor<2>,
    pub k: Tensor<2>,
    pub v: Tensor<2>,
    pub o: Tensor<2>,
}

/// Weights of a feed-forward half, each `[out, in]`; the norm is `[1, hidden]`.
#[derive(Debug, Clone)]
#[allow(missing_docs)]
pub struct MlpTensors {
    pub norm: Tensor<2>,
    pub gate: Tensor<2>,
    pub up: Tensor<2>,
    pub down: Tensor<2>,
}

/// The operations on tensors of a `Flex` device, with or without autodiff.
pub mod flex {
    use super::*;
    use burn::backend::Dispatch;

    /// Embedding rows of `ids`.
    pub fn embed(weight: Tensor<2>, ids: Arc<[u32]>) -> Tensor<2> {
        Tensor::from_dispatch(Dispatch::fused_embed(weight.into_dispatch(), ids))
    }

    /// `x + attention(rms_norm(x))`.
    pub fn attention(x: Tensor<2>, weights: AttentionTensors, context: AttentionContext) -> Tensor<2> {
        let AttentionTensors { norm, q, k, v, o } = weights;
        Tensor::from_dispatch(Dispatch::fused_attention(
            x.into_dispatch(),
            norm.into_dispatch(),
            q.into_dispatch(),
            k.into_dispatch(),
            v.into_dispatch(),
            o.into_dispatch(),
            context,
        ))
    }

    /// `x + mlp(rms_norm(x))`.
    pub fn mlp(x: Tensor<2>, weights: MlpTensors, eps: f32) -> Tensor<2> {
        let MlpTensors { norm, gate, up, down } = weights;
        Tensor::from_dispatch(Dispatch::fused_mlp(
            x.into_dispatch(),
            norm.into_dispatch(),
            gate.into_dispatch(),
            up.into_dispatch(),
            down.into_dispatch(),
            eps,
        ))
    }

    /// RMSNorm.
    pub fn rms_norm(x: Tensor<2>, weight: Tensor<2>, eps: f32) -> Tensor<2> {
        Tensor::from_dispatch(Dispatch::fused_rms_norm(x.into_dispatch(), weight.into_dispatch(), eps))
    }

    /// Log-probabilities and entropies, `[2, rows]`.
    pub fn token_head(hidden: Tensor<2>, weight: Tensor<2>, targets: TokenTargets) -> Tensor<2> {
        Tensor::from_dispatch(Dispatch::fused_token_head(hidden.into_dispatch(), weight.into_dispatch(), targets))
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
