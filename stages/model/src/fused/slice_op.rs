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
use half::bf16;
use rlflow_kernels::Weight;

use crate::ledger::{Held, Purpose, hold};

/// An operation with `N` dense tensor inputs and one output of rank 2. It sees its inputs as they are held.
pub trait SliceOp<const N: usize>: Clone + Debug + Send + Sync + 'static {
    /// What the backward pass needs besides the inputs.
    type Saved: Debug + Send + Sync + 'static;

    /// The result, its shape and what to keep.
    fn forward(&self, inputs: [Weight<'_>; N]) -> (Vec<f32>, [usize; 2], Self::Saved);

    /// Elements of what is kept.
    fn saved_elements(saved: &Self::Saved) -> usize;

    /// Elements that the forward and the backward pass need while they run, beside inputs, results and what is kept.
    fn workspace(&self, _inputs: [Weight<'_>; N]) -> [usize; 2] {
        [0, 0]
    }

    /// Whether it reads inputs in bfloat16 as they are; otherwise it widens them while it runs.
    fn reads_narrow(&self) -> bool {
        false
    }

    /// Gradients of the inputs, in their order. Only those with `wanted` are used: the others may be empty.
    fn backward(&self, inputs: [Weight<'_>; N], saved: &Self::Saved, gradient: &[f32], wanted: [bool; N]) -> [Vec<f32>; N];
}

fn contiguous(tensor: FlexTensor) -> FlexTensor {
    if tensor.as_slice::<f32>().is_some() || tensor.as_slice::<bf16>().is_some() { tensor } else { tensor.to_contiguous() }
}

fn elements(tensor: &FlexTensor) -> Weight<'_> {
    match (tensor.as_slice(), tensor.as_slice::<bf16>()) {
        (Some(elements), _) => Weight::F32(elements),
        (None, Some(narrow)) => Weight::Bf16(narrow),
        (None, None) => unreachable!("fused operations take tensors of f32 or bfloat16"),
    }
}

/// Counts what `op` widens.
fn hold_widened<O: SliceOp<N>, const N: usize>(op: &O, inputs: [Weight<'_>; N]) -> Option<Held> {
    let widened = inputs.into_iter().filter(|input| matches!(input, Weight::Bf16(_)) && !op.reads_narrow());
    hold(Purpose::Buffers, widened.map(Weight::len).sum())
}

fn tensor(data: Vec<f32>, shape: impl Into<Vec<usize>>) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(data, shape.into()))
}

/// Runs the operation without recording.
pub fn run<O: SliceOp<N>, const N: usize>(op: &O, inputs: [FloatTensor<Flex>; N]) -> FloatTensor<Flex> {
    let inputs = inputs.map(contiguous);
    let slices = inputs.each_ref().map(elements);
    let _widened = hold_widened(op, slices);
    let _workspace = hold(Purpose::Buffers, op.workspace(slices)[0]);
    let (out, shape, saved) = op.forward(slices);
    let _passing = hold(Purpose::Buffers, O::saved_elements(&saved) + out.len());
    tensor(out, shape)
}

#[derive(Debug)]
struct State<O: SliceOp<N>, const N: usize> {
    op: O,
    inputs: [FlexTensor; N],
    /// With the bytes of it and of the result, which lives as long.
    saved: Arc<(O::Saved, Option<Held>)>,
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
        let slices = inputs.each_ref().map(elements);
        let widened = hold_widened(&op, slices);
        let workspace = hold(Purpose::Buffers, op.workspace(slices)[1]);
        let results = op.backward(slices, &saved.0, &elements(&gradient).wide(), wanted);
        drop((workspace, widened));
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
    let slices = inputs.each_ref().map(elements);
    let widened = hold_widened(&op, slices);
    let workspace = hold(Purpose::Buffers, op.workspace(slices)[0]);
    let (out, shape, saved) = op.forward(slices);
    drop((workspace, widened));
    let held = hold(Purpose::Activations, O::saved_elements(&saved) + out.len());
    let out = tensor(out, shape);
    match Step::<O>(std::marker::PhantomData).prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(prep) => prep.finish(State { op, inputs, saved: Arc::new((saved, held)) }, out),
        OpsKind::UnTracked(prep) => prep.finish(out),
    }
}
