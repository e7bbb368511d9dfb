//! AdamW with clipping by the global norm.

use std::ops::Range;

use burn::{
    backend::Flex,
    tensor::{DType, Device, Tensor, TensorData},
};
use burn_flex::FlexTensor;
use rlflow_kernels::{
    bf16::round_all,
    optim::{AdamW, adamw, add_assign, row_squares},
};

use crate::{
    parameters::{ParameterSpec, Parameters, flex_view, host, is_flex, update_in_place},
    ranks::{cut, paste},
};

/// Gradients of all weights, or of one rank's share of each, summed over micro-batches in their order.
#[derive(Debug, Clone, Default)]
pub struct Gradients {
    sums: Vec<Option<Tensor<2>>>,
}

impl Gradients {
    /// No gradient for any of `count` weights.
    pub fn new(count: usize) -> Self {
        Self { sums: vec![None; count] }
    }

    /// Adds a micro-batch's gradient of the weight in `slot`, if there is one.
    pub fn add(&mut self, slot: usize, gradient: Option<Tensor<2>>) {
        let Some(gradient) = gradient else { return };
        self.change(slot, |sum| {
            Some(match sum {
                Some(sum) => accumulate(sum, gradient),
                None => gradient,
            })
        });
    }

    /// Replaces the sum for the weight in `slot` by what `change` makes of it.
    pub(crate) fn change(&mut self, slot: usize, change: impl FnOnce(Option<Tensor<2>>) -> Option<Tensor<2>>) {
        let sum = &mut self.sums[slot];
        *sum = change(sum.take());
    }

    /// The sum for the weight in `slot`.
    pub fn get(&self, slot: usize) -> Option<&Tensor<2>> {
        self.sums[slot].as_ref()
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.sums.iter_mut().for_each(|sum| *sum = None);
    }

    /// First weight whose gradient is not finite, with an offending value.
    pub fn first_non_finite(&self) -> Option<(usize, f32)> {
        self.sums.iter().enumerate().find_map(|(slot, sum)| {
            let value = host(sum.as_ref()?).into_iter().find(|value| !value.is_finite())?;
            Some((slot, value))
        })
    }
}

/// `sum + gradient`, in place where nobody else holds `sum`.
pub(crate) fn accumulate(mut sum: Tensor<2>, gradient: Tensor<2>) -> Tensor<2> {
    let view = flex_view(&gradient);
    let done = view.as_ref().is_some_and(|view| {
        let value: &[f32] = view.as_slice().expect("views are contiguous f32");
        update_in_place([&mut sum], |[sum]| add_assign(sum, value))
    });
    if done { sum } else { sum + gradient }
}

/// Sum of squares of each row of `width` elements within `range` of a tensor's elements.
fn row_squares_of(tensor: &Tensor<2>, range: Range<usize>, width: usize) -> Vec<f64> {
    if let Some(view) = flex_view(tensor) {
        return row_squares(&view.as_slice().expect("views are contiguous f32")[range], width);
    }
    let rows = range.len() / width.max(1);
    if rows == 0 {
        return Vec::new();
    }
    // Squares are summed where they are: downloading a gradient would take longer than the step.
    let [lines, columns] = tensor.dims();
    let part = tensor.clone().reshape([1, lines * columns]).narrow(1, range.start, range.len()).reshape([rows, width]);
    host(&(part.clone() * part).sum_dim(1)).into_iter().map(f64::from).collect()
}

/// Settings that stay the same over a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OptimizerSettings {
    /// Decay rates of the moments.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay, on matrices only.
    pub weight_decay: f64,
    /// Largest gradient norm; 0 for no clipping.
    pub grad_clip: f64,
}

/// AdamW (arXiv:1711.05101) with torch's definitions: moments of each weight, or of one rank's share of it.
///
/// Weights that the model holds in bfloat16, or on another device than their moments, have a master here in f32, which is
/// what is updated; the model gets a copy of it.
#[derive(Debug, Clone)]
pub struct Optimizer {
    settings: OptimizerSettings,
    masters: Vec<Option<Tensor<2>>>,
    /// Elements of each weight that are updated here.
    shares: Vec<Range<usize>>,
    first: Vec<Tensor<2>>,
    second: Vec<Tensor<2>>,
    step: u64,
}

/// Where the elements `share` of a weight stand in a tensor that holds the weight or only that share.
fn within(tensor: &Tensor<2>, share: &Range<usize>) -> Range<usize> {
    let [rows, columns] = tensor.dims();
    if rows * columns == share.len() { 0..share.len() } else { share.clone() }
}

impl Optimizer {
    /// Zero moments for all of `parameters`.
    pub fn new(parameters: &Parameters, settings: OptimizerSettings) -> Self {
        let shares = parameters.specs().iter().map(|spec| 0..spec.len()).collect();
        let masters = vec![None; parameters.specs().len()];
        Self { settings, masters, shares, first: parameters.zeros_like(), second: parameters.zeros_like(), step: 0 }
    }

    /// Zero moments on `home` for `shares`, a range of each weight's elements, with the masters of those that have one.
    pub(crate) fn of_shares(
        shares: Vec<Range<usize>>,
        masters: Vec<Option<Tensor<2>>>,
        home: &Device,
        settings: OptimizerSettings,
    ) -> Self {
        let zeros = || shares.iter().map(|share| Tensor::zeros([1, share.len()], home)).collect();
        Self { settings, masters, first: zeros(), second: zeros(), shares: shares.clone(), step: 0 }
    }

    /// The master of a weight, or of a share of it.
    pub(crate) fn master(&self, slot: usize) -> Option<&Tensor<2>> {
        self.masters[slot].as_ref()
    }

    /// All of them, to be replaced in place.
    pub(crate) fn masters_mut(&mut self) -> &mut [Option<Tensor<2>>] {
        &mut self.masters
    }

    /// First moments, second moments, steps done.
    pub fn state(&self) -> (&[Tensor<2>], &[Tensor<2>], u64) {
        (&self.first, &self.second, self.step)
    }

    /// Goes back to `step` steps done.
    pub(crate) fn set_step(&mut self, step: u64) {
        self.step = step;
    }

    /// First and second moments, to be replaced in place.
    pub(crate) fn moments_mut(&mut self) -> [&mut [Tensor<2>]; 2] {
        [&mut self.first, &mut self.second]
    }

    /// One update with gradients that are sums: each is divided by `denominator`, the batch's count, here and nowhere
    /// else. Returns the norm before clipping. Weights without a gradient stay as they are. Nothing is changed when
    /// the norm is not finite.
    pub fn step(&mut self, parameters: &mut Parameters, gradients: &Gradients, denominator: f64, lr: f64) -> f64 {
        let squares = self.row_squares(parameters.specs(), gradients);
        let norm = norm(&[squares], parameters.specs().len()) / denominator;
        self.update(parameters, gradients, norm, denominator, lr);
        norm
    }

    /// Sums of squares of the gradients' rows that are updated here, by weight.
    pub(crate) fn row_squares(&self, specs: &[ParameterSpec], gradients: &Gradients) -> Vec<Vec<f64>> {
        let of = |(slot, spec): (usize, &ParameterSpec)| match gradients.get(slot) {
            Some(gradient) => row_squares_of(gradient, within(gradient, &self.shares[slot]), spec.row_width()),
            None => Vec::new(),
        };
        specs.iter().enumerate().map(of).collect()
    }

    /// [`Optimizer::step`] with the gradients' `norm` known.
    pub(crate) fn update(&mut self, parameters: &mut Parameters, gradients: &Gradients, norm: f64, denominator: f64, lr: f64) {
        if !norm.is_finite() {
            return;
        }
        self.step += 1;
        // As torch.nn.utils.clip_grad_norm_: the small constant keeps a zero norm harmless.
        let clip = if self.settings.grad_clip > 0.0 { (self.settings.grad_clip / (norm + 1e-6)).min(1.0) } else { 1.0 };
        let matrix: Vec<bool> = parameters.specs().iter().map(|spec| spec.is_matrix()).collect();
        for (slot, parameter) in parameters.tensors_mut().iter_mut().enumerate() {
            let Some(gradient) = gradients.get(slot) else { continue };
            let settings = AdamW {
                lr: lr as f32,
                beta1: self.settings.betas[0] as f32,
                beta2: self.settings.betas[1] as f32,
                eps: self.settings.eps as f32,
                weight_decay: if matrix[slot] { self.settings.weight_decay as f32 } else { 0.0 },
                step: self.step,
                grad_scale: (clip / denominator) as f32,
            };
            let share = &self.shares[slot];
            let (ours, theirs) = (within(parameter, share), within(gradient, share));
            let (first, second) = (&mut self.first[slot], &mut self.second[slot]);
            if let Some(master) = &mut self.masters[slot] {
                if !share.is_empty() {
                    let gradient = cut(gradient, theirs).to_device(&master.device());
                    step_master(master, &gradient, first, second, settings);
                }
                // A rank that updates a part of what it holds gets the rest from others, all at once.
                if ours.len() == parameter.shape().num_elements() {
                    *parameter = copy_of(master, parameter).reshape(parameter.dims());
                }
                continue;
            }
            let view = flex_view(gradient);
            let done = view.as_ref().is_some_and(|view| {
                let gradient: &[f32] = view.as_slice().expect("views are contiguous f32");
                update_in_place([&mut *parameter, &mut *first, &mut *second], |[parameter, first, second]| {
                    adamw(&mut parameter[ours.clone()], &gradient[theirs.clone()], first, second, settings);
                })
            });
            if !done && !share.is_empty() {
                let dims = first.dims();
                let mut updated = cut(parameter, ours.clone()).reshape(dims);
                composed_adamw(&mut updated, &cut(gradient, theirs).reshape(dims), first, second, settings);
                paste(parameter, ours, &updated);
            }
        }
    }
}

/// L2 norm over `count` weights from the sums of squares of their rows: by rank, then by weight. Rows are added in their
/// order whoever holds them.
pub(crate) fn norm(squares: &[Vec<Vec<f64>>], count: usize) -> f64 {
    let of = |slot: usize| squares.iter().flat_map(|of_rank| &of_rank[slot]).sum::<f64>();
    (0..count).map(of).sum::<f64>().sqrt()
}

/// A master's copy in the format and on the device of `parameter`.
pub(crate) fn copy_of(master: &Tensor<2>, parameter: &Tensor<2>) -> Tensor<2> {
    if parameter.dtype() == DType::BF16
        && is_flex(parameter)
        && let Some(view) = flex_view(master)
    {
        let elements = round_all(view.as_slice().expect("views are contiguous f32"));
        return Tensor::from_primitive::<Flex>(FlexTensor::from_data(TensorData::new(elements, master.dims())));
    }
    let copy = master.clone().to_device(&parameter.device());
    if parameter.dtype() == copy.dtype() { copy } else { copy.cast(parameter.dtype()) }
}

/// One update of a master, which stands where its moments do.
fn step_master(master: &mut Tensor<2>, gradient: &Tensor<2>, first: &mut Tensor<2>, second: &mut Tensor<2>, settings: AdamW) {
    let view = flex_view(gradient);
    let done = view.as_ref().is_some_and(|view| {
        let gradient: &[f32] = view.as_slice().expect("views are contiguous f32");
        update_in_place([&mut *master, &mut *first, &mut *second], |[master, first, second]| {
            adamw(master, gradient, first, second, settings)
        })
    });
    if !done {
        composed_adamw(master, gradient, first, second, settings);
    }
}

/// The same update from plain tensor operations, for devices without the kernel.
fn composed_adamw(parameter: &mut Tensor<2>, gradient: &Tensor<2>, first: &mut Tensor<2>, second: &mut Tensor<2>, settings: AdamW) {
    let AdamW { lr, beta1, beta2, eps, weight_decay, step, grad_scale } = settings;
    let gradient = gradient.clone() * grad_scale;
    *first = first.clone() * beta1 + gradient.clone() * (1.0 - beta1);
    *second = second.clone() * beta2 + gradient.clone() * gradient * (1.0 - beta2);
    let correction1 = 1.0 - f64::from(beta1).powi(step as i32);
    let correction2 = (1.0 - f64::from(beta2).powi(step as i32)).sqrt();
    let denominator = second.clone().sqrt() / correction2 as f32 + eps;
    let update = first.clone() / denominator * (f64::from(lr) / correction1) as f32;
    *parameter = parameter.clone() * (1.0 - lr * weight_decay) - update;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gradients of vectors that were computed as one are slices of one storage: each is added where it stands.
    #[test]
    fn slices_of_one_storage_add_up_apart() {
        let device = Device::flex();
        let joined = |values: [f32; 4]| Tensor::<2>::from_data([values], &device);
        let mut gradients = Gradients::new(2);
        for all in [joined([1.0, 2.0, 3.0, 4.0]), joined([10.0, 20.0, 30.0, 40.0])] {
            for slot in 0..2 {
                gradients.add(slot, Some(all.clone().narrow(1, 2 * slot, 2)));
            }
        }
        assert_eq!(host(gradients.get(0).unwrap()), [11.0, 22.0]);
        assert_eq!(host(gradients.get(1).unwrap()), [33.0, 44.0]);
    }
}
