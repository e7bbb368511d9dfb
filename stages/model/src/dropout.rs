//! Dropout of what adapters see (LoRA's `dropout`), drawn by counter: a token's draws depend on the seed, the step, its
//! sequence's number in the batch, the block, the projection and its position, and not on how the batch is cut.

use std::sync::Arc;

use rayon::prelude::*;
use rlflow_api::CounterRng;
use rlflow_kernels::{Projection, SequenceLayout};

/// Which draws a training pass makes.
#[derive(Debug, Clone)]
pub struct DropoutDraws {
    /// Seed of the stage.
    pub seed: u64,
    /// Step of the stage.
    pub step: u64,
    /// Number of each sequence of the pass within the step's batch.
    pub samples: Arc<[u64]>,
}

impl DropoutDraws {
    /// For sequences with these numbers.
    pub fn new(seed: u64, step: u64, samples: impl IntoIterator<Item = u64>) -> Self {
        Self { seed, step, samples: samples.into_iter().collect() }
    }
}

/// Dropout in one block.
#[derive(Debug, Clone)]
pub struct BlockDropout {
    /// Chance that an element is dropped.
    pub probability: f64,
    /// Number of the block.
    pub block: usize,
    /// Which draws.
    pub draws: DropoutDraws,
    /// Where sequences start.
    pub layout: Arc<SequenceLayout>,
}

impl BlockDropout {
    /// Multiplies the rows of a projection's input by 0, or by `1 / (1 - probability)`, which keeps their mean.
    ///
    /// # Shapes
    /// - rows: `[tokens, width]`
    pub fn apply(&self, projection: Projection, rows: &mut [f32]) {
        let width = rows.len() / self.layout.tokens().max(1);
        let purpose = format!("lora/dropout/{}/{projection:?}", self.block);
        let threshold = (self.probability * f64::from(u32::MAX)) as u32;
        let kept = (1.0 / (1.0 - self.probability)) as f32;
        let mut rest = rows;
        let mut sequences = Vec::with_capacity(self.layout.sequences());
        for (sequence, sample) in self.draws.samples.iter().enumerate() {
            let (own, tail) = rest.split_at_mut(self.layout.range(sequence).len() * width);
            sequences.push((sample, own));
            rest = tail;
        }
        sequences.into_par_iter().for_each(|(sample, rows)| {
            let mut rng = CounterRng::new(self.draws.seed, &purpose, self.draws.step, *sample);
            for value in rows {
                *value *= if rng.next_u32() < threshold { 0.0 } else { kept };
            }
        });
    }
}
