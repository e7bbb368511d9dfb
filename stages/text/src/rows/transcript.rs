//! HH-RLHF transcripts: `\n\nHuman: ...\n\nAssistant: ...`.

use super::turns::normal;
use crate::Message;

const HUMAN: &str = "\n\nHuman:";
const ASSISTANT: &str = "\n\nAssistant:";

/// Whether `text` is a transcript.
pub(super) fn is_transcript(text: &str) -> bool {
    let start = text.trim_start();
    start.starts_with(HUMAN.trim_start()) || start.starts_with(ASSISTANT.trim_start())
}

/// The turns of a transcript. An assistant turn that is only announced at the end (where an answer is to follow) is left out.
pub(super) fn turns(text: &str) -> Vec<Message> {
    // Data sets differ in whether the first turn has its blank lines.
    let text = format!("\n\n{}", text.trim_start());
    let mut turns = Vec::new();
    let mut rest = text.as_str();
    while let Some((role, marker)) = marker(rest) {
        rest = &rest[marker..];
        let end = [HUMAN, ASSISTANT].iter().filter_map(|next| rest.find(next)).min().unwrap_or(rest.len());
        let content = normal(rest[..end].trim());
        rest = &rest[end..];
        if !(rest.is_empty() && content.is_empty() && role == "assistant") {
            turns.push(Message::new(role, content));
        }
    }
    turns
}

fn marker(text: &str) -> Option<(&'static str, usize)> {
    [("user", HUMAN), ("assistant", ASSISTANT)]
        .into_iter()
        .find(|(_, marker)| text.starts_with(marker))
        .map(|(role, marker)| (role, marker.len()))
}
