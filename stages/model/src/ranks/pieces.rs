//! Parts of tensors, by ranges of their elements in row-major order. A piece is `[1, elements]` and owns its storage.

use std::{
    ops::Range,
    sync::{Mutex, PoisonError},
};

use burn::{
    backend::Flex,
    tensor::{Device, Tensor, TensorData},
};
use burn_flex::FlexTensor;
use half::bf16;
use rlflow_kernels::optim::add_assign;

use crate::parameters::{flex_narrow_view, flex_view, update_in_place};

fn flat(tensor: &Tensor<2>) -> Tensor<2> {
    let [rows, columns] = tensor.dims();
    tensor.clone().reshape([1, rows * columns])
}

/// `tensor` on `device`: from one GPU to another over NCCL where the library is there, else through the host (both are the
/// runtime's work).
///
/// Such a move is an operation on each of the two GPUs, and one waits for the other. So all threads make their moves in one order:
/// else two GPUs could each stand before an operation that the other has put behind its own.
fn moved(tensor: Tensor<2>, device: &Device) -> Tensor<2> {
    static TURN: Mutex<()> = Mutex::new(());
    let from = tensor.device();
    let host = Device::flex();
    let _turn = (from != *device && from != host && *device != host).then(|| TURN.lock().unwrap_or_else(PoisonError::into_inner));
    tensor.to_device(device)
}

fn piece(values: Vec<f32>, device: &Device) -> Tensor<2> {
    let len = values.len();
    Tensor::from_data(TensorData::new(values, [1, len]), device)
}

/// A copy of the elements in `range`.
pub fn cut(tensor: &Tensor<2>, range: Range<usize>) -> Tensor<2> {
    let device = tensor.device();
    if let Some(view) = flex_view(tensor) {
        let values: &[f32] = view.as_slice().expect("views are contiguous f32");
        return piece(values[range].to_vec(), &device);
    }
    // A narrowed tensor keeps the whole storage alive; what is assigned into is new.
    let len = range.len();
    let narrowed = flat(tensor).narrow(1, range.start, len);
    Tensor::zeros([1, len], &device).slice_assign([0..1, 0..len], narrowed)
}

/// Overwrites the elements in `range` with those of `piece`.
pub fn paste(tensor: &mut Tensor<2>, range: Range<usize>, piece: &Tensor<2>) {
    if range.is_empty() {
        return;
    }
    let view = flex_view(piece);
    let done = view.as_ref().is_some_and(|view| {
        let values: &[f32] = view.as_slice().expect("views are contiguous f32");
        update_in_place([&mut *tensor], |[elements]| elements[range.clone()].copy_from_slice(values))
    });
    if !done {
        let dims = tensor.dims();
        let piece = moved(piece.clone(), &tensor.device());
        *tensor = flat(tensor).slice_assign([0..1, range], piece).reshape(dims);
    }
}

/// `sum + part[range]`, in place where nobody else holds `sum`; without a sum, a copy of that part.
pub fn add_range(sum: Option<Tensor<2>>, part: &Tensor<2>, range: Range<usize>) -> Tensor<2> {
    let Some(mut sum) = sum else { return cut(part, range) };
    let view = flex_view(part);
    let done = view.as_ref().is_some_and(|view| {
        let values: &[f32] = view.as_slice().expect("views are contiguous f32");
        update_in_place([&mut sum], |[sum]| add_assign(sum, &values[range.clone()]))
    });
    if done {
        return sum;
    }
    let (dims, device) = (sum.dims(), sum.device());
    let added = moved(flat(part).narrow(1, range.start, range.len()), &device);
    sum + added.reshape(dims)
}

/// A tensor of `dims` from its pieces, in order.
pub fn join(pieces: &[Tensor<2>], dims: [usize; 2], device: &Device) -> Tensor<2> {
    let views: Option<Vec<_>> = pieces.iter().map(flex_view).collect();
    if let Some(views) = views {
        let mut values = Vec::with_capacity(dims[0] * dims[1]);
        for view in &views {
            values.extend_from_slice(view.as_slice::<f32>().expect("views are contiguous f32"));
        }
        return Tensor::from_data(TensorData::new(values, dims), device);
    }
    let views: Option<Vec<_>> = pieces.iter().map(flex_narrow_view).collect();
    if let Some(views) = views {
        let mut values: Vec<bf16> = Vec::with_capacity(dims[0] * dims[1]);
        for view in &views {
            values.extend_from_slice(view.as_slice().expect("views are contiguous bfloat16"));
        }
        return Tensor::from_primitive::<Flex>(FlexTensor::from_data(TensorData::new(values, dims)));
    }
    let present = pieces.iter().filter(|piece| piece.dims()[1] > 0).map(|piece| moved(piece.clone(), device));
    Tensor::cat(present.collect(), 1).reshape(dims)
}
