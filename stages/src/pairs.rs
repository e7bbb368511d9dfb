//! Pairs of a better and a worse answer, from preference rows.

use rlflow_api::{RunContext, StageError, StageResult};
use rlflow_model::{PackedBatch, TokenTargets};
use rlflow_text::PreferenceDataset;

/// A prompt with an answer, as one sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct Answered {
    /// Prompt, then answer.
    pub ids: Vec<u32>,
    /// Length of the prompt.
    pub prompt_len: usize,
}

impl Answered {
    /// Tokens of the answer.
    pub fn answer_len(&self) -> usize {
        self.ids.len() - self.prompt_len
    }
}

/// A better and a worse answer to one prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct Pair {
    /// The better one.
    pub chosen: Answered,
    /// The worse one.
    pub rejected: Answered,
    /// By how much, where the data say so; else 0.
    pub margin: f32,
}

/// What happens to sequences longer than the context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TooLong {
    /// The pair is dropped (a reward model scores whole answers).
    Drop,
    /// Cut at the context's end; dropped if no token of an answer is left.
    Truncate,
}

/// Pairs, and how many were lost.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Pairs {
    /// In the order of the rows; K answers, best first, give their K (K - 1) / 2 pairs.
    pub pairs: Vec<Pair>,
    /// Pairs with a truncated sequence.
    pub truncated: usize,
    /// Pairs dropped.
    pub dropped: usize,
}

impl Pairs {
    /// All pairs of `data` that fit `context` tokens.
    pub fn from_rows(data: &PreferenceDataset, context: usize, too_long: TooLong) -> Self {
        let mut result = Self::default();
        for row in data.rows() {
            for better in 0..row.answers.len() {
                for worse in better + 1..row.answers.len() {
                    let answered = |answer: &[u32]| Answered { ids: [&row.prompt, answer].concat(), prompt_len: row.prompt.len() };
                    let (mut chosen, mut rejected) = (answered(&row.answers[better]), answered(&row.answers[worse]));
                    if chosen.ids.len().max(rejected.ids.len()) > context {
                        if too_long == TooLong::Drop || row.prompt.len() >= context {
                            result.dropped += 1;
                            continue;
                        }
                        result.truncated += 1;
                        chosen.ids.truncate(context);
                        rejected.ids.truncate(context);
                    }
                    result.pairs.push(Pair { chosen, rejected, margin: row.margin.unwrap_or(0.0) });
                }
            }
        }
        result
    }
}

impl Pairs {
    /// Warns of what was cut and dropped to fit `length` tokens.
    ///
    /// # Errors
    /// If nothing is left.
    pub fn tell_losses(&self, context: &RunContext<'_>, length: usize) -> StageResult<()> {
        let all = self.pairs.len() + self.dropped;
        if all == 0 {
            return Err(StageError::invalid_with_hint(
                "there is no preference pair to train on",
                "is everything held out (`heldout` of the preferences)? `rlflow show` shows what they hold",
            ));
        }
        if self.pairs.is_empty() {
            return Err(StageError::invalid_with_hint(
                format!("none of {all} pairs fits the context of {length} tokens"),
                "a longer `model.context`, or shorter prompts and answers",
            ));
        }
        if self.dropped > 0 {
            context.warning(format!("{} of {all} pairs do not fit the context of {length} tokens and are left out", self.dropped));
        }
        if self.truncated > 0 {
            context.warning(format!("{} of {all} pairs are cut at the context of {length} tokens", self.truncated));
        }
        Ok(())
    }
}

/// Sequences of one pass, with the rows whose prediction is a token of an answer.
#[derive(Debug, Clone)]
pub struct AnsweredBatch {
    /// Inputs: every sequence without its last token, which predicts nothing.
    pub batch: PackedBatch,
    /// Rows that predict answer tokens, sequence by sequence.
    pub targets: TokenTargets,
    /// Answer tokens of each sequence.
    pub answer_lens: Vec<usize>,
    /// Targets of each sequence; the last of them are the answer's.
    pub target_lens: Vec<usize>,
}

impl AnsweredBatch {
    /// From sequences in order; `temperature` divides the logits.
    pub fn new<'a>(sequences: impl IntoIterator<Item = &'a Answered>, temperature: f64) -> Self {
        Self::from_positions(sequences.into_iter().map(|sequence| (sequence, sequence.prompt_len)), temperature)
    }

    /// From sequences, each with the position of its first target: that of the answer, or an earlier one (not 0).
    pub fn from_positions<'a>(sequences: impl IntoIterator<Item = (&'a Answered, usize)>, temperature: f64) -> Self {
        let (mut inputs, mut rows, mut targets, mut start) = (Vec::new(), Vec::new(), Vec::new(), 0);
        let (mut answer_lens, mut target_lens) = (Vec::new(), Vec::new());
        for (sequence, first) in sequences {
            let input = &sequence.ids[..sequence.ids.len() - 1];
            for at in first..sequence.ids.len() {
                rows.push((start + at - 1) as u32);
                targets.push(sequence.ids[at]);
            }
            answer_lens.push(sequence.answer_len());
            target_lens.push(sequence.ids.len() - first);
            start += input.len();
            inputs.push(input);
        }
        let targets = TokenTargets { rows: rows.into(), targets: targets.into(), scale: (1.0 / temperature) as f32 };
        Self { batch: PackedBatch::new(inputs), targets, answer_lens, target_lens }
    }

    /// Those of `values`, one per target, that belong to answers.
    pub fn of_answers<'a>(&'a self, values: &'a [f32]) -> impl Iterator<Item = f32> + 'a {
        let mut end = 0;
        self.target_lens.iter().zip(&self.answer_lens).flat_map(move |(targets, len)| {
            end += targets;
            values[end - len..end].iter().copied()
        })
    }
}
