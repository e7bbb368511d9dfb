//! Rows of a dataset as the model sees them, with what counts in the loss.

use rlflow_engine::thousands;
use rlflow_store::{Artifact, Store};
use rlflow_text::{ChatTokenizer, PreviewPart, PreviewRow, is_previewed, preview};

use crate::{
    failure::{Failure, other},
    terminal::visible,
};

/// Most tokens of a row that are printed.
const MAX_TOKENS: usize = 600;
/// Begins what counts where there is no colour, and ends it.
const MARKS: [&str; 2] = ["⟦", "⟧"];
/// Green, and back.
const COLORS: [&str; 2] = ["\u{1b}[32m", "\u{1b}[0m"];

/// What can be shown of an artifact's rows.
pub enum Rows {
    /// It has none.
    None,
    /// The first of them.
    Shown(Vec<PreviewRow>),
    /// Token ids without the tokenizer that they were made with.
    WithoutTokenizer,
}

impl Rows {
    /// Reads the first rows of `artifact`.
    pub fn read(store: &Store, artifact: &Artifact, limit: usize) -> Result<Self, Failure> {
        let Some(of_tokens) = is_previewed(&artifact.manifest().artifact_type) else { return Ok(Self::None) };
        let tokenizer = if of_tokens { tokenizer(store, artifact)? } else { None };
        match tokenizer.is_some() == of_tokens {
            true => Ok(Self::Shown(preview(artifact, tokenizer.as_ref(), limit).map_err(other)?)),
            false => Ok(Self::WithoutTokenizer),
        }
    }

    /// The rows for people; what counts is coloured, or marked.
    pub fn render(&self, color: bool) -> String {
        let rows = match self {
            Self::None => return String::new(),
            Self::WithoutTokenizer => {
                return "\n  rows: token ids; the tokenizer that they were made with is no longer in the store\n".into();
            }
            Self::Shown(rows) if rows.is_empty() => return "\n  rows: none\n".into(),
            Self::Shown(rows) => rows,
        };
        let [begin, end] = if color { COLORS } else { MARKS };
        let counts = rows.iter().flat_map(|row| &row.parts).any(|part| part.counted.contains(&true));
        let legend = if counts { format!(", {begin}what counts in the loss{end}") } else { String::new() };
        let mut out = format!("\n  rows as the model sees them{legend}:\n");
        for (at, row) in rows.iter().enumerate() {
            let margin = row.margin.map(|margin| format!(", margin {margin}")).unwrap_or_default();
            let answer =
                row.answer.as_ref().map(|answer| format!(", answer: {}", rlflow_engine::text::clip(answer, 80))).unwrap_or_default();
            out += &format!("  {}. {}{margin}{answer}\n", at + 1, row.split);
            row.parts.iter().for_each(|part| out += &shown(part, [begin, end]));
        }
        out
    }
}

/// A part with its size and its text, runs of counted tokens between `marks`.
fn shown(part: &PreviewPart, marks: [&str; 2]) -> String {
    let tokens = part.counted.len();
    let counted = part.counted.iter().filter(|counts| **counts).count();
    let size = match (tokens, counted) {
        (0, _) => String::new(),
        (tokens, 0) => format!(", {} tokens", thousands(tokens as u64)),
        (tokens, counted) => format!(", {} tokens, {} counted", thousands(tokens as u64), thousands(counted as u64)),
    };
    let mut text = String::new();
    if part.runs.is_empty() {
        text = visible(&part.text).into_owned();
    }
    let mut left = MAX_TOKENS;
    for run in &part.runs {
        if left == 0 {
            text += &format!(" … {} more tokens", thousands((tokens - MAX_TOKENS) as u64));
            break;
        }
        left = left.saturating_sub(run.tokens);
        let piece = visible(&run.text);
        text += &if run.counted { format!("{}{piece}{}", marks[0], marks[1]) } else { piece.into_owned() };
    }
    let mut out = format!("     {}{size}\n", part.name);
    text.split('\n').for_each(|line| out += &format!("       {line}\n"));
    out
}

/// The tokenizer that an artifact's rows were made with: an input of the stage that made them.
fn tokenizer(store: &Store, artifact: &Artifact) -> Result<Option<ChatTokenizer>, Failure> {
    let nodes = store.lineage(artifact.digest())?;
    let maker = nodes.first().and_then(|node| node.maker.as_ref());
    let inputs = maker.into_iter().flat_map(|maker| &maker.inputs).filter(|edge| edge.port == "tokenizer");
    for edge in inputs {
        if let Some(found) = store.open_artifact(edge.artifact)? {
            return ChatTokenizer::load(&found).map(Some).map_err(other);
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_counts_is_marked_or_coloured() {
        let text = "<u>Hi\n\u{1b}[2J<a>Yes<e>";
        let run = |text: &str, tokens: usize, counted: bool| rlflow_text::PreviewRun { text: text.into(), tokens, counted };
        let part = PreviewPart {
            name: "conversation".into(),
            text: text.into(),
            tokens: Vec::new(),
            ids: Vec::new(),
            counted: vec![false, false, false, true, true],
            runs: vec![run("<u>Hi\n\u{1b}[2J<a>", 3, false), run("Yes<e>", 2, true)],
        };
        let rows = Rows::Shown(vec![PreviewRow { split: "train", parts: vec![part], answer: None, margin: Some(0.5) }]);
        let plain = "\n  rows as the model sees them, ⟦what counts in the loss⟧:\n  1. train, margin 0.5\n     conversation, 5 tokens, 2 counted\n       <u>Hi\n       ␛[2J<a>⟦Yes<e>⟧\n";
        assert_eq!(rows.render(false), plain);
        assert_eq!(rows.render(true), plain.replace('⟦', "\u{1b}[32m").replace('⟧', "\u{1b}[0m"));
    }
}
