//! Next-token prediction: what pretraining, supervised fine-tuning and perplexity share.

use burn::tensor::Tensor;
use rlflow_api::StageResult;
use rlflow_model::{Decoder, Group, PackedBatch, TokenTargets, parameters::host, ranks::Take};

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

/// Where the tokens of the inputs stand among the sums of [`backward`].
pub const TOKENS: usize = 4;

/// Sum of cross-entropies over counted tokens, of which there is one at least; gradients are handed to `take`. Returns sums for
/// [`metrics`].
pub fn backward(model: &Decoder, micro: &LanguageBatch, checkpointing: bool, take: Take<'_>) -> Sums {
    model.backward(
        &micro.batch,
        checkpointing,
        |head| {
            let stats = head.token_stats(micro.targets.clone());
            let tokens = micro.batch.tokens() as f64;
            let sums = vec![-sum(&stats.logprobs), sum(&stats.entropies), micro.counted() as f64, sum(&stats.correct), tokens];
            (stats.logprobs.sum().neg(), sums)
        },
        take,
    )
}

/// Metrics of a step whose passes gave `sums`, over `counted` tokens.
pub fn metrics(sums: &Sums, counted: f64) -> Vec<(&'static str, f64)> {
    vec![
        ("loss", sums[0] / counted),
        ("entropy", sums[1] / counted),
        ("mean_token_accuracy", sums[3] / counted),
        ("num_tokens", sums[TOKENS]),
    ]
}

/// Sum of a tensor's elements, in order, in f64.
pub fn sum(tensor: &Tensor<1>) -> f64 {
    host(tensor).into_iter().map(f64::from).sum()
}

/// Mean cross-entropy over all counted tokens of `batches`.
///
/// # Errors
/// If a rank fails.
pub fn mean_loss(model: &Group, batches: &[LanguageBatch]) -> StageResult<Option<f64>> {
    let counted: Vec<&LanguageBatch> = batches.iter().filter(|micro| micro.counted() > 0).collect();
    let losses = model
        .map(&counted, |decoder, micro| decoder.evaluate(&micro.batch, |head| -sum(&head.token_stats(micro.targets.clone()).logprobs)))?;
    let count: usize = counted.iter().map(|micro| micro.counted()).sum();
    Ok((count > 0).then(|| losses.into_iter().sum::<f64>() / count as f64))
}
