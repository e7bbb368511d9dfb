//! The root of a backward pass that starts from a gradient rather than from a loss.

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

#[derive(Debug)]
struct Step;

impl Backward<Flex, 1> for Step {
    type State = FlexTensor;

    fn backward(self, ops: Ops<FlexTensor, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        // The root's own gradient is one: what goes on is the given gradient, as it is.
        drop(grads.consume::<Flex>(&ops.node));
        let [parent] = ops.parents;
        if let Some(parent) = parent {
            grads.register::<Flex>(parent.id, ops.state);
        }
    }
}

/// What a root is worth: nothing reads it.
pub fn value() -> FlexTensor {
    FlexTensor::from_data(TensorData::new(vec![0.0_f32], vec![1, 1]))
}

/// A scalar whose backward pass gives `output` the gradient `gradient`. Multiplying and summing says the same in four
/// passes over the tensor; this reads nothing.
pub fn recorded<C: CheckpointStrategy>(
    output: FloatTensor<Autodiff<Flex, C>>,
    gradient: FloatTensor<Autodiff<Flex, C>>,
) -> FloatTensor<Autodiff<Flex, C>> {
    match Step.prepare::<C>([output.node()]).compute_bound().stateful() {
        OpsKind::Tracked(prep) => prep.finish(gradient.into_primitive(), value()),
        OpsKind::UnTracked(prep) => prep.finish(value()),
    }
}
