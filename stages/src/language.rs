//! Next-token prediction: what pretraining, supervised fine-tuning and perplexity share.

use burn::tensor::Tensor;
use rlflow_model::{Decoder, PackedBatch, TokenTargets, parameters::host};

use crate::train::Sums;

/// Sequences of one pass, with the rows that predict a counted token.
#[derive(Debug, Clone)]
pub struct LanguageBatch {
    /// Inputs.
    pub batch: PackedBatch,
    /// Rows and the tokens they should predict.
    pub targets: TokenTargets,
}

/// Collects sequences.
#[derive(Debug, Default)]
pub struct LanguageBatchBuilder {
    sequences: Vec<Vec<u32>>,
    rows: Vec<u32>,
    targets: Vec<u32>,
    tokens: u32,
}

impl LanguageBatchBuilder {
    /// Adds a sequence; `target(i)` is the token that input `i` should predict, if it counts.
    pub fn push(&mut self, ids: &[u32], target: impl Fn(usize) -> Option<u32>) {
        for at in 0..ids.len() {
            if let Some(token) = target(at) {
                self.rows.push(self.tokens + at as u32);
                self.targets.push(token);
            }
        }
        self.tokens += ids.len() as u32;
        self.sequences.push(ids.to_vec());
    }

    /// The batch.
    pub fn finish(self) -> LanguageBatch {
        let batch = PackedBatch::new(self.sequences.iter().map(Vec::as_slice));
        LanguageBatch { batch, targets: TokenTargets { rows: self.rows.into(), targets: self.targets.into(), scale: 1.0 } }
    }
}

impl LanguageBatch {
    /// Counted tokens.
    pub fn counted(&self) -> usize {
        self.targets.rows.len()
    }
}

/// Sum of cross-entropies over counted tokens, its gradients handed to `take`. Returns loss, entropy and tokens, summed.
pub fn backward(model: &Decoder, micro: &LanguageBatch, checkpointing: bool, take: &mut dyn FnMut(usize, Tensor<2>)) -> Sums {
    if micro.counted() == 0 {
        return vec![0.0; 3];
    }
    model.backward(
        &micro.batch,
        checkpointing,
        |head| {
            let stats = head.token_stats(micro.targets.clone());
            let sums = vec![-sum(&stats.logprobs), sum(&stats.entropies), micro.counted() as f64];
            (stats.logprobs.sum().neg(), sums)
        },
        take,
    )
}

/// Sum of a tensor's elements, in order, in f64.
pub fn sum(tensor: &Tensor<1>) -> f64 {
    host(tensor).into_iter().map(f64::from).sum()
}

/// Mean cross-entropy over all counted tokens of `batches`.
pub fn mean_loss<'a>(model: &Decoder, batches: impl IntoIterator<Item = &'a LanguageBatch>) -> Option<f64> {
    let (mut total, mut count) = (0.0, 0);
    for micro in batches {
        if micro.counted() > 0 {
            total -= model.evaluate(&micro.batch, |head| sum(&head.token_stats(micro.targets.clone()).logprobs));
            count += micro.counted();
        }
    }
    (count > 0).then(|| total / count as f64)
}
