//! AdamW with clipping by the global norm.

use burn::tensor::Tensor;
use rlflow_kernels::optim::{AdamW, adamw, add_assign, sum_of_squares};

use crate::parameters::{Parameters, flex_view, host, update_in_place};

/// Gradients of all weights, summed over micro-batches in their order.
#[derive(Debug, Clone, Default)]
pub struct Gradients {
    sums: Vec<Option<Tensor<2>>>,
}

impl Gradients {
    /// No gradient for any of `count` weights.
    pub fn new(count: usize) -> Self {
        Self { sums: vec![None; count] }
    }

    /// Adds a micro-batch's gradient of the weight in `slot`.
    pub fn add(&mut self, slot: usize, gradient: Tensor<2>) {
        let sum = &mut self.sums[slot];
        *sum = Some(match sum.take() {
            Some(sum) => accumulate(sum, gradient),
            None => gradient,
        });
    }

    /// The sum for the weight in `slot`.
    pub fn get(&self, slot: usize) -> Option<&Tensor<2>> {
        self.sums[slot].as_ref()
    }

    /// Multiplies everything by `factor`.
    pub fn scale(&mut self, factor: f32) {
        for sum in self.sums.iter_mut().flatten() {
            if !update_in_place([sum], |[sum]| sum.iter_mut().for_each(|value| *value *= factor)) {
                *sum = sum.clone() * factor;
            }
        }
    }

    /// L2 norm over all weights.
    pub fn norm(&self) -> f64 {
        self.sums.iter().flatten().map(sum_of_squares_of).sum::<f64>().sqrt()
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

fn sum_of_squares_of(tensor: &Tensor<2>) -> f64 {
    match flex_view(tensor) {
        Some(view) => sum_of_squares(view.as_slice().expect("views are contiguous f32")),
        None => sum_of_squares(&host(tensor)),
    }
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

/// AdamW (arXiv:1711.05101) with torch's definitions, one state per weight.
#[derive(Debug, Clone)]
pub struct Optimizer {
    settings: OptimizerSettings,
    first: Vec<Tensor<2>>,
    second: Vec<Tensor<2>>,
    step: u64,
}

impl Optimizer {
    /// Zero moments for `parameters`.
    pub fn new(parameters: &Parameters, settings: OptimizerSettings) -> Self {
        Self { settings, first: parameters.zeros_like(), second: parameters.zeros_like(), step: 0 }
    }

    /// Moments and step count as stored by a snapshot.
    pub fn restore(settings: OptimizerSettings, first: Vec<Tensor<2>>, second: Vec<Tensor<2>>, step: u64) -> Self {
        Self { settings, first, second, step }
    }

    /// First moments, second moments, steps done.
    pub fn state(&self) -> (&[Tensor<2>], &[Tensor<2>], u64) {
        (&self.first, &self.second, self.step)
    }

    /// One update with gradients that are sums: each is divided by `denominator`, the batch's count, here and nowhere
    /// else. Returns the norm before clipping. Weights without a gradient stay as they are. Nothing is changed when
    /// the norm is not finite.
    pub fn step(&mut self, parameters: &mut Parameters, gradients: &Gradients, denominator: f64, lr: f64) -> f64 {
        let norm = gradients.norm() / denominator;
        if !norm.is_finite() {
            return norm;
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
            let (first, second) = (&mut self.first[slot], &mut self.second[slot]);
            let view = flex_view(gradient);
            let done = view.as_ref().is_some_and(|view| {
                let gradient: &[f32] = view.as_slice().expect("views are contiguous f32");
                update_in_place([&mut *parameter, &mut *first, &mut *second], |[parameter, first, second]| {
                    adamw(parameter, gradient, first, second, settings);
                })
            });
            if !done {
                composed_adamw(parameter, gradient, first, second, settings);
            }
        }
        norm
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
