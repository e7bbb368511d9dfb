use rlflow_api::{ArtifactType, RunContext, StageError, StageResult};
use rlflow_model::{Group, HeadView};
use rlflow_text::{ChatTokenizer, ConversationDataset, ConversationRow, Split, TokenDataset, tokenize_corpus};

use crate::{
    language::{LanguageBatch, sum},
    pretrain::{self, Windows},
    sft,
    train::RowOrder,
};

/// Sequences on which the policy keeps predicting tokens while it is optimised (PPO-ptx, arXiv:2203.02155 eq. 2).
pub(super) struct Ptx {
    rows: Rows,
    /// Sequences per update.
    batch_size: usize,
    micro_batch_size: usize,
    coefficient: f64,
}

enum Rows {
    Conversations { rows: Vec<ConversationRow>, order: RowOrder },
    Documents(Windows),
}

impl Ptx {
    /// From the input `ptx`; `None` without one.
    ///
    /// # Errors
    /// If it has nothing to predict, or a coefficient is given without it.
    pub fn load(
        context: &RunContext<'_>,
        tokenizer: &ChatTokenizer,
        length: usize,
        coefficient: f64,
        batch_size: usize,
        micro_batch_size: usize,
    ) -> StageResult<Option<Self>> {
        let Some(input) = context.optional_input("ptx").filter(|_| coefficient > 0.0) else { return Ok(None) };
        let nothing = || StageError::invalid_with_hint("the input `ptx` has no token to predict", "look at it with `rlflow show`");
        let rows = if input.artifact.manifest().artifact_type == ArtifactType::Text.name() {
            let tokens = tokenize_corpus(context, &input.artifact, tokenizer)?;
            let tokens = TokenDataset::load(&tokens, Split::Train)?;
            if tokens.total_tokens() < 2 {
                return Err(nothing());
            }
            Rows::Documents(Windows::new(tokens, length, context.seed, true))
        } else {
            let rows = sft::usable_rows(&ConversationDataset::load(&input.artifact, Split::Train)?, length).rows;
            if rows.is_empty() {
                return Err(nothing());
            }
            Rows::Conversations { order: RowOrder::new(context.seed, "ppo/ptx", rows.len(), true), rows }
        };
        Ok(Some(Self { rows, batch_size, micro_batch_size, coefficient }))
    }

    /// Adds the gradient of this update's part of the loss to those of `model`, which will be divided by `tokens`. `update`
    /// counts updates over the whole run. Returns the mean cross-entropy.
    ///
    /// # Errors
    /// If a rank fails.
    pub fn add_gradients(&mut self, update: u64, model: &mut Group, tokens: f64, checkpointing: bool) -> StageResult<f64> {
        let batches: Vec<LanguageBatch> = match &mut self.rows {
            Rows::Conversations { rows, order } => {
                let chosen = order.batch(update, self.batch_size);
                chosen.chunks(self.micro_batch_size).map(|chosen| sft::batch(chosen.iter().map(|row| &rows[*row]))).collect()
            }
            Rows::Documents(windows) => {
                let first = update * self.batch_size as u64;
                let all: Vec<u64> = (first..first + self.batch_size as u64).collect();
                all.chunks(self.micro_batch_size).map(|rows| pretrain::batch(windows, rows.iter().copied())).collect()
            }
        };
        let counted = batches.iter().map(LanguageBatch::counted).sum::<usize>().max(1) as f64;
        let scale = self.coefficient * tokens / counted;
        let batches: Vec<&LanguageBatch> = batches.iter().filter(|batch| batch.counted() > 0).collect();
        let losses = model.backward(&batches, |decoder, batch, take| {
            let loss = |head: &HeadView<'_>| {
                let logprobs = head.token_stats(batch.targets.clone()).logprobs;
                let loss = -sum(&logprobs);
                (logprobs.sum() * -scale, loss)
            };
            decoder.backward(&batch.batch, checkpointing, loss, take)
        })?;
        Ok(losses.into_iter().sum::<f64>() / counted)
    }
}
