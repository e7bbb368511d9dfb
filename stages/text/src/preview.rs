use rlflow_api::{Artifact, ArtifactType, StageResult};
use serde::Serialize;

use crate::{ChatTokenizer, ConversationDataset, PreferenceDataset, PromptDataset, Split, TextDataset, TokenDataset};

/// Longest piece of a document that is shown, in bytes.
const DOCUMENT_BYTES: usize = 2000;

/// A row of a dataset as the model sees it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PreviewRow {
    /// Entry of the split that it belongs to: `train` or `heldout`.
    pub split: &'static str,
    /// Its parts: one conversation, prompt or document; or a prompt and its answers, best first.
    pub parts: Vec<PreviewPart>,
    /// The reference answer of a prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub answer: Option<String>,
    /// By how much the first answer of a preference is better than the second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub margin: Option<f32>,
}

/// A sequence of tokens.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct PreviewPart {
    /// `conversation`, `prompt`, `chosen`, `rejected`, `answer 1`, `document`.
    pub name: String,
    /// The whole of it as text, with the names of special tokens.
    pub text: String,
    /// Names of its tokens in the vocabulary. Documents that are not tokenised yet have none.
    pub tokens: Vec<String>,
    /// Their ids.
    pub ids: Vec<u32>,
    /// Per token: true = it counts in the loss.
    pub counted: Vec<bool>,
    /// The text in pieces of tokens that all count or all do not.
    #[serde(skip)]
    pub runs: Vec<PreviewRun>,
}

/// Tokens in a row of which all count in the loss, or none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PreviewRun {
    /// Their text.
    pub text: String,
    /// How many they are.
    pub tokens: usize,
    /// Whether they count.
    pub counted: bool,
}

impl PreviewPart {
    fn new(name: impl Into<String>, tokenizer: &ChatTokenizer, ids: &[u32], counted: Vec<bool>) -> Self {
        let tokens = ids.iter().map(|id| tokenizer.token(*id)).collect();
        let mut begin = 0;
        let run = |same: &[bool]| {
            let ids = &ids[begin..begin + same.len()];
            begin += same.len();
            PreviewRun { text: tokenizer.decode_all(ids), tokens: ids.len(), counted: same[0] }
        };
        let runs = counted.chunk_by(|a, b| a == b).map(run).collect();
        Self { name: name.into(), text: tokenizer.decode_all(ids), tokens, ids: ids.to_vec(), counted, runs }
    }
}

/// Whether artifacts of this type hold rows that [`preview`] shows, and whether it takes a tokenizer to show them.
pub fn is_previewed(artifact_type: &str) -> Option<bool> {
    let all = [ArtifactType::Conversations, ArtifactType::Preferences, ArtifactType::Prompts, ArtifactType::Tokens];
    match artifact_type {
        text if text == ArtifactType::Text.name() => Some(false),
        other => all.iter().any(|known| known.name() == other).then_some(true),
    }
}

/// The first rows of a dataset, at most `limit`: of its training split, and if that has fewer, of what is held out. No rows for artifacts of
/// other types, and for those of token ids without the tokenizer that they were made with.
///
/// # Errors
/// If the artifact cannot be read.
pub fn preview(artifact: &Artifact, tokenizer: Option<&ChatTokenizer>, limit: usize) -> StageResult<Vec<PreviewRow>> {
    let mut rows = Vec::new();
    for split in [Split::Train, Split::HeldOut] {
        let left = limit.saturating_sub(rows.len());
        if left > 0 {
            rows.extend(split_preview(artifact, tokenizer, split, left)?);
        }
    }
    Ok(rows)
}

fn split_preview(artifact: &Artifact, tokenizer: Option<&ChatTokenizer>, split: Split, limit: usize) -> StageResult<Vec<PreviewRow>> {
    let row = |parts: Vec<PreviewPart>| PreviewRow { split: split.entry(), parts, answer: None, margin: None };
    let artifact_type = artifact.manifest().artifact_type.as_str();
    if artifact_type == ArtifactType::Text.name() {
        let documents = TextDataset::load(artifact, split)?;
        let document = |index| {
            let text = documents.document(index);
            let text = text[..text.floor_char_boundary(DOCUMENT_BYTES)].to_owned();
            row(vec![PreviewPart { name: "document".into(), text, ..PreviewPart::default() }])
        };
        return Ok((0..documents.len().min(limit)).map(document).collect());
    }
    let Some(tokenizer) = tokenizer else { return Ok(Vec::new()) };
    let part = |name: &str, ids: &[u32], counts: bool| PreviewPart::new(name, tokenizer, ids, vec![counts; ids.len()]);
    Ok(match artifact_type {
        name if name == ArtifactType::Conversations.name() => {
            let conversations = ConversationDataset::load(artifact, split)?;
            let shown = conversations.rows().take(limit);
            shown.map(|shown| row(vec![PreviewPart::new("conversation", tokenizer, &shown.ids, shown.mask)])).collect()
        }
        name if name == ArtifactType::Preferences.name() => {
            let preferences = PreferenceDataset::load(artifact, split)?;
            let shown = preferences.rows().take(limit).map(|shown| {
                let names = |at: usize| match (shown.answers.len(), at) {
                    (2, 0) => "chosen".to_owned(),
                    (2, _) => "rejected".to_owned(),
                    (_, at) => format!("answer {}", at + 1),
                };
                let answers = shown.answers.iter().enumerate().map(|(at, ids)| part(&names(at), ids, true));
                let parts = std::iter::once(part("prompt", &shown.prompt, false)).chain(answers).collect();
                PreviewRow { margin: shown.margin, ..row(parts) }
            });
            shown.collect()
        }
        name if name == ArtifactType::Prompts.name() => {
            let prompts = PromptDataset::load(artifact, split)?;
            let shown = prompts.rows().iter().take(limit);
            shown.map(|shown| PreviewRow { answer: shown.answer.clone(), ..row(vec![part("prompt", &shown.ids, false)]) }).collect()
        }
        name if name == ArtifactType::Tokens.name() => {
            let documents = TokenDataset::load(artifact, split)?;
            (0..documents.len().min(limit)).map(|index| row(vec![part("document", documents.document(index), true)])).collect()
        }
        _ => Vec::new(),
    })
}
