use std::ops::Range;

use rlflow_api::ModelConfig;

use crate::{Head, ParameterSpec, parameters::specs};

/// Elements of a weight that `rank` of `ranks` owns: whole rows along the first dimension (of a vector, elements), in the
/// order of ranks. Shares differ by one row at most; with fewer rows than ranks some are empty.
pub fn share(spec: &ParameterSpec, rank: usize, ranks: usize) -> Range<usize> {
    let rows = spec.shape.first().copied().unwrap_or(1);
    let width = spec.row_width();
    let first = |rank: usize| rank * rows / ranks * width;
    first(rank)..first(rank + 1)
}

/// Elements that the rank with the largest share of a model owns: the last one.
pub fn largest_share(config: &ModelConfig, head: Head, ranks: usize) -> u64 {
    specs(config, head).0.iter().map(|spec| share(spec, ranks - 1, ranks).len() as u64).sum()
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
