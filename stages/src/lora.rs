//! What trainers with a `lora` table share: checks, needs, and which draws dropout makes.

use rlflow_api::{DescribeContext, Problem};
use rlflow_model::{DropoutDraws, LoraSettings, PackedBatch};

/// Spells equal settings alike.
pub fn normalise(lora: &mut Option<LoraSettings>) {
    if let Some(lora) = lora {
        lora.normalise();
    }
}

/// What is wrong with the table by itself.
pub fn check(lora: Option<&LoraSettings>) -> Vec<Problem> {
    lora.map(|lora| lora.check("lora")).unwrap_or_default()
}

/// What is wrong with it for the model on `inputs.model`.
///
/// # Errors
/// Modules that the model has not.
pub fn check_model(lora: Option<&LoraSettings>, context: &DescribeContext<'_>) -> Result<(), Vec<Problem>> {
    let model = context.input("model").and_then(|input| input.meta.model.as_ref());
    let problems = lora.zip(model).map(|(lora, model)| lora.check_model("lora", model)).unwrap_or_default();
    if problems.is_empty() { Ok(()) } else { Err(problems) }
}

/// What training passes drop of what an adapter sees.
#[derive(Debug, Clone, Copy)]
pub struct Dropout {
    /// Absent where nothing is dropped.
    seed: Option<u64>,
}

impl Dropout {
    /// By the seed of the stage.
    pub fn of(lora: Option<&LoraSettings>, seed: u64) -> Self {
        Self { seed: lora.filter(|lora| lora.dropout > 0.0).map(|_| seed) }
    }

    /// A pass of `step`, whose sequences have `numbers` in the step's batch.
    pub fn of_batch(&self, batch: PackedBatch, step: u64, numbers: impl IntoIterator<Item = u64>) -> PackedBatch {
        let Some(seed) = self.seed else { return batch };
        let sequences = batch.layout.sequences();
        batch.with_dropout(DropoutDraws::new(seed, step, numbers.into_iter().take(sequences)))
    }
}

/// Numbers of the sequences of a pass over `pairs` pairs from pair `first` on: all chosen ones, then all rejected ones. They do not depend on
/// how many pairs a pass has.
pub fn pair_numbers(first: usize, pairs: usize) -> impl Iterator<Item = u64> {
    (0..2).flat_map(move |side| (first..first + pairs).map(move |pair| 2 * pair as u64 + side))
}
