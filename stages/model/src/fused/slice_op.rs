//! Operations on plain slices with hand-written gradients, made into Burn operations.

use std::{fmt::Debug, sync::Arc};

use burn::backend::autodiff::{
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::{
    backend::{Autodiff, Flex, tensor::FloatTensor},
    tensor::TensorData,
};
use burn_flex::FlexTensor;

/// An operation with `N` tensor inputs, all dense f32, and one output of rank 2.
pub trait SliceOp<const N: usize>: Clone + Debug + Send + Sync + 'static {
    /// What the backward pass needs besides the inputs.
    type Saved: Debug + Send + Sync + 'static;

    /// The result, its shape and what to keep.
    fn forward(&self, inputs: [&[f32]; N]) -> (Vec<f32>, [usize; 2], Self::Saved);

    /// Gradients of the inputs, in their order. Only those with `wanted` are used: the others may be empty.
    fn backward(&self, inputs: [&[f32]; N], saved: &Self::Saved, gradient: &[f32], wanted: [bool; N]) -> [Vec<f32>; N];
}

fn contiguous(tensor: FlexTensor) -> FlexTensor {
    if tensor.as_slice::<f32>().is_some() { tensor } else { tensor.to_contiguous() }
}

fn slice(tensor: &FlexTensor) -> &[f32] {
    tensor.as_slice().expect("fused operations take f32 tensors")
}

fn tensor(data: Vec<f32>, shape: impl Into<Vec<usize>>) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(data, shape.into()))
}

/// Runs the operation without recording.
pub fn run<O: SliceOp<N>, const N: usize>(op: &O, inputs: [FloatTensor<Flex>; N]) -> FloatTensor<Flex> {
    let inputs = inputs.map(contiguous);
    let (out, shape, _) = op.forward(inputs.each_ref().map(slice));
    tensor(out, shape)
}

#[derive(Debug)]
struct State<O: SliceOp<N>, const N: usize> {
    op: O,
    inputs: [FlexTensor; N],
    saved: Arc<O::Saved>,
}

// Derived, it would ask for `O::Saved: Clone`.
impl<O: SliceOp<N>, const N: usize> Clone for State<O, N> {
    fn clone(&self) -> Self {
        Self { op: self.op.clone(), inputs: self.inputs.clone(), saved: self.saved.clone() }
    }
}

#[derive(Debug)]
struct Step<O>(std::marker::PhantomData<fn() -> O>);

impl<O: SliceOp<N>, const N: usize> Backward<Flex, N> for Step<O> {
    type State = State<O, N>;

    fn backward(self, ops: Ops<Self::State, N>, grads: &mut Gradients, _: &mut Checkpointer) {
        let gradient = contiguous(grads.consume::<Flex>(&ops.node));
        let State { op, inputs, saved } = ops.state;
        let wanted = ops.parents.each_ref().map(Option::is_some);
        let results = op.backward(inputs.each_ref().map(slice), &saved, slice(&gradient), wanted);
        for ((parent, result), input) in ops.parents.into_iter().zip(results).zip(inputs) {
            if let Some(parent) = parent {
                grads.register::<Flex>(parent.id, tensor(result, input.layout().shape().to_vec()));
            }
        }
    }
}

/// Runs the operation and records its backward pass.
pub fn run_recorded<C: CheckpointStrategy, O: SliceOp<N>, const N: usize>(
    op: O,
    inputs: [FloatTensor<Autodiff<Flex, C>>; N],
) -> FloatTensor<Autodiff<Flex, C>> {
    let nodes = inputs.each_ref().map(|input| input.node());
    let inputs = inputs.map(|input| contiguous(input.into_primitive()));
    let (out, shape, saved) = op.forward(inputs.each_ref().map(slice));
    let out = tensor(out, shape);
    match Step::<O>(std::marker::PhantomData).prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(prep) => prep.finish(State { op, inputs, saved: Arc::new(saved) }, out),
        OpsKind::UnTracked(prep) => prep.finish(out),
    }
}
