use std::ops::Range;

use rlflow_api::ModelConfig;

use crate::{
    Head, LoraSettings, ParameterSpec,
    lora::{is_factor, is_trained},
    parameters::specs,
};

/// Elements of a weight that `rank` of `ranks` owns: whole rows along the first dimension (of a vector, elements), in the
/// order of ranks. Shares differ by one row at most; with fewer rows than ranks some are empty.
pub fn share(spec: &ParameterSpec, rank: usize, ranks: usize) -> Range<usize> {
    let rows = spec.shape.first().copied().unwrap_or(1);
    let width = spec.row_width();
    let first = |rank: usize| rank * rows / ranks * width;
    first(rank)..first(rank + 1)
}

/// Elements that a rank owns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Shares {
    /// Of the model's weights.
    pub weights: u64,
    /// Of an adapter's factors.
    pub factors: u64,
    /// Of what is trained: all weights, or with an adapter its factors and the scalar head.
    pub trained: u64,
}

/// What the rank with the largest share of a model owns: the last one.
pub fn largest_shares(config: &ModelConfig, head: Head, lora: Option<&LoraSettings>, ranks: usize) -> Shares {
    let (mut specs, mut slots) = specs(config, head);
    if let Some(lora) = lora {
        lora.extend(&mut specs, &mut slots);
    }
    let mut all = Shares::default();
    for spec in &specs {
        let elements = share(spec, ranks - 1, ranks).len() as u64;
        *if is_factor(&spec.name) { &mut all.factors } else { &mut all.weights } += elements;
        all.trained += if lora.is_none() || is_trained(&spec.name) { elements } else { 0 };
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_whole_rows_and_cover_everything_once() {
        let spec = |shape: &[usize]| ParameterSpec { name: "w".into(), shape: shape.to_vec() };
        let shares = |shape: &[usize], ranks| (0..ranks).map(|rank| share(&spec(shape), rank, ranks)).collect::<Vec<_>>();
        assert_eq!(shares(&[5, 3], 2), [0..6, 6..15]);
        assert_eq!(shares(&[7], 3), [0..2, 2..4, 4..7]);
        assert_eq!(shares(&[1, 8], 4), [0..0, 0..0, 0..0, 0..8]);
        assert_eq!(shares(&[4, 2], 1).first(), Some(&(0..8)));
    }
}
