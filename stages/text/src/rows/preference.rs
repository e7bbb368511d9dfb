use std::cmp::Ordering;

use serde_json::{Map, Value};

use super::{
    transcript::{is_transcript, turns as transcript_turns},
    turns::{alpaca_prompt, content_text, context, field_names, message, messages, object, with_system},
};
use crate::{ChatContext, Message, documents::kind_of};

/// A prompt with answers.
#[derive(Debug, Clone, PartialEq)]
pub struct Preference {
    /// Name of the row's format.
    pub format: &'static str,
    /// What is answered.
    pub prompt: Vec<Message>,
    /// What comes with it: `tools`, `documents`, `chat_template_kwargs`.
    pub context: ChatContext,
    /// At least two different answers, best first.
    pub answers: Vec<Message>,
    /// By how much the first answer is better than the second, where the row says so.
    pub margin: Option<f32>,
}

/// Reads a row in the format that its fields show:
///
/// | format | fields |
/// |---|---|
/// | `pair` | `chosen` and `rejected` (text, a message, or messages) to a `prompt`, `question`, `messages`, `conversations`, or `instruction` with `input` |
/// | `conversation_pair` | `chosen` and `rejected` as whole conversations that differ in the last turn |
/// | `transcript_pair` | the same as HH-RLHF transcripts: `\n\nHuman: ..\n\nAssistant: ..` |
/// | `ranked` | `answers`, `responses` or `completions`: best first, or with `ranks` (1 = best) or `scores` (higher = better); of equals the first is kept |
///
/// `margin` may stand beside any of them; else it is the difference of `chosen_score` and `rejected_score` (or `score_chosen` and `score_rejected`).
pub fn preference(row: &Value) -> Result<Preference, String> {
    let row = object(row)?;
    let (format, prompt, answers) = match (row.get("chosen"), row.get("rejected")) {
        (Some(chosen), Some(rejected)) => pair(row, chosen, rejected)?,
        (Some(_), None) => return Err("`chosen` without `rejected`".into()),
        (None, Some(_)) => return Err("`rejected` without `chosen`".into()),
        (None, None) => ranked(row)?,
    };
    if prompt.is_empty() {
        return Err("the prompt is empty".into());
    }
    if answers.iter().any(|answer| !answer.says_something()) {
        return Err("an answer is empty".into());
    }
    if answers.windows(2).any(|pair| pair[0] == pair[1]) {
        return Err("two answers are the same".into());
    }
    Ok(Preference { format, prompt: with_system(row, prompt)?, context: context(row)?, answers, margin: margin(row)? })
}

type Parts = (&'static str, Vec<Message>, Vec<Message>);

fn margin(row: &Map<String, Value>) -> Result<Option<f32>, String> {
    let number = |name: &str| match row.get(name) {
        None | Some(Value::Null) => Ok(None),
        // Cells of CSV files are texts.
        Some(Value::String(text)) => text
            .trim()
            .parse()
            .ok()
            .filter(|number: &f64| number.is_finite())
            .map(Some)
            .ok_or_else(|| format!("`{name}` is `{text}`, expected a number")),
        Some(value) => value.as_f64().map(Some).ok_or_else(|| format!("`{name}` is {}, expected a number", kind_of(value))),
    };
    if let Some(margin) = number("margin")? {
        return Ok(Some(margin as f32));
    }
    for (chosen, rejected) in [("chosen_score", "rejected_score"), ("score_chosen", "score_rejected")] {
        if let (Some(chosen), Some(rejected)) = (number(chosen)?, number(rejected)?) {
            return Ok(Some((chosen - rejected) as f32));
        }
    }
    Ok(None)
}

/// What is answered, where the row says it apart from the answers.
pub(super) fn prompt_of(row: &Map<String, Value>) -> Result<Option<Vec<Message>>, String> {
    for name in ["prompt", "question"] {
        match row.get(name) {
            None | Some(Value::Null) => {}
            Some(list @ Value::Array(_)) => return messages(list).map(Some),
            Some(Value::String(text)) if is_transcript(text) => return Ok(Some(transcript_turns(text))),
            Some(text) => return Ok(Some(vec![Message::user(content_text(text)?)])),
        }
    }
    if let Some(list) = ["messages", "conversations", "conversation"].iter().find_map(|name| row.get(*name)) {
        return messages(list).map(Some);
    }
    if row.contains_key("instruction") { alpaca_prompt(row).map(Some) } else { Ok(None) }
}

fn pair(row: &Map<String, Value>, chosen: &Value, rejected: &Value) -> Result<Parts, String> {
    let prompt = prompt_of(row)?;
    let transcripts = [chosen, rejected].iter().all(|value| value.as_str().is_some_and(is_transcript));
    if transcripts {
        let turns = |value: &Value| transcript_turns(value.as_str().unwrap_or_default());
        return shared_prefix("transcript_pair", prompt, turns(chosen), turns(rejected));
    }
    if let (Value::Array(_), Value::Array(_)) = (chosen, rejected) {
        return shared_prefix("conversation_pair", prompt, messages(chosen)?, messages(rejected)?);
    }
    let prompt = prompt.ok_or("no prompt: expected `prompt`, `question`, `messages`, `conversations` or `instruction`")?;
    Ok(("pair", prompt, vec![answer(chosen)?, answer(rejected)?]))
}

/// An answer: text, or a message of the assistant.
fn answer(value: &Value) -> Result<Message, String> {
    let message = match value {
        Value::String(_) => Message::assistant(content_text(value)?),
        Value::Array(list) => match list.as_slice() {
            [one] => message(one)?,
            _ => return Err(format!("an answer has {} messages, expected one", list.len())),
        },
        other => message(other)?,
    };
    if message.is_assistant() { Ok(message) } else { Err(format!("an answer is of role `{}`, expected the assistant", message.role)) }
}

/// Conversations that are the same up to their last turn. A prompt given apart may be repeated in them or not.
fn shared_prefix(
    format: &'static str,
    prompt: Option<Vec<Message>>,
    chosen: Vec<Message>,
    rejected: Vec<Message>,
) -> Result<Parts, String> {
    let shared = chosen.iter().zip(&rejected).take_while(|(a, b)| a == b).count();
    if shared == chosen.len() && shared == rejected.len() {
        return Err("two answers are the same".into());
    }
    let ([.., last_chosen], [.., last_rejected]) = (chosen.as_slice(), rejected.as_slice()) else {
        return Err("an answer is empty".into());
    };
    if shared + 1 != chosen.len() || shared + 1 != rejected.len() {
        return Err("`chosen` and `rejected` differ in more than their last turn".into());
    }
    if !last_chosen.is_assistant() || !last_rejected.is_assistant() {
        return Err("the last turn is not the assistant's".into());
    }
    let shared_turns = chosen[..shared].to_vec();
    let prompt = match prompt {
        None => shared_turns,
        Some(prompt) if shared_turns.is_empty() || shared_turns == prompt => prompt,
        // The conversations say more than the prompt (a system message, earlier turns).
        Some(prompt) if shared_turns.ends_with(&prompt) => shared_turns,
        Some(prompt) if prompt.ends_with(&shared_turns) => prompt,
        Some(_) => return Err("`prompt` is not how `chosen` and `rejected` begin".into()),
    };
    Ok((format, prompt, vec![last_chosen.clone(), last_rejected.clone()]))
}

fn ranked(row: &Map<String, Value>) -> Result<Parts, String> {
    let Some((name, value)) = ["answers", "responses", "completions"].into_iter().find_map(|name| Some((name, row.get(name)?))) else {
        return Err(format!("not a known format: expected `chosen` and `rejected`, or `answers`; the row has {}", field_names(row)));
    };
    let Value::Array(list) = value else { return Err(format!("`{name}` is {}, expected a list of answers", kind_of(value))) };
    let prompt = prompt_of(row)?.ok_or("no prompt: expected `prompt`, `question`, `messages`, `conversations` or `instruction`")?;
    let mut answers: Vec<Message> = list.iter().map(answer).collect::<Result<_, _>>()?;
    for (by, sign) in [("ranks", 1.0), ("scores", -1.0)] {
        let Some(values) = row.get(by).filter(|values| !values.is_null()) else { continue };
        let numbers = values.as_array().and_then(|values| values.iter().map(Value::as_f64).collect::<Option<Vec<f64>>>());
        let numbers = numbers.ok_or_else(|| format!("`{by}` must be a list of numbers"))?;
        if numbers.len() != answers.len() {
            return Err(format!("`{by}` has {} values for {} answers", numbers.len(), answers.len()));
        }
        let mut order: Vec<(f64, Message)> = numbers.into_iter().map(|number| number * sign).zip(answers).collect();
        order.sort_by(|a, b| a.0.partial_cmp(&b.0).unwrap_or(Ordering::Equal));
        order.dedup_by(|later, kept| later.0 == kept.0);
        answers = order.into_iter().map(|(_, answer)| answer).collect();
        break;
    }
    if answers.len() < 2 {
        return Err(format!("{} answer to compare, expected at least 2", answers.len()));
    }
    Ok(("ranked", prompt, answers))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn expected(format: &'static str, prompt: &[(&str, &str)], answers: &[&str], margin: Option<f32>) -> Preference {
        let prompt = prompt.iter().map(|(role, content)| Message::new(*role, *content)).collect();
        let answers = answers.iter().map(|answer| Message::assistant(*answer)).collect();
        Preference { format, prompt, context: ChatContext::default(), answers, margin }
    }

    #[test]
    fn pairs() {
        let plain = expected("pair", &[("user", "q")], &["good", "bad"], None);
        assert_eq!(preference(&json!({"prompt": "q", "chosen": "good", "rejected": "bad"})), Ok(plain.clone()));
        let row = json!({"prompt": [{"role": "user", "content": "q"}], "chosen": {"role": "assistant", "content": "good"}, "rejected": {"role": "assistant", "content": "bad"}});
        assert_eq!(preference(&row), Ok(plain.clone()));
        let row = json!({"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "good"}, "rejected": {"from": "gpt", "value": "bad"}});
        assert_eq!(preference(&row), Ok(plain));
        let row = json!({"instruction": "do", "input": "x", "system": "S", "chosen": "good", "rejected": "bad", "margin": 0.5});
        assert_eq!(preference(&row), Ok(expected("pair", &[("system", "S"), ("user", "do\nx")], &["good", "bad"], Some(0.5))));
        let row = json!({"prompt": "q", "chosen": "good", "rejected": "bad", "score_chosen": 8.5, "score_rejected": 6});
        assert_eq!(preference(&row).unwrap().margin, Some(2.5));
    }

    #[test]
    fn whole_conversations() {
        let (user, good, bad) = (
            json!({"role": "user", "content": "q"}),
            json!({"role": "assistant", "content": "good"}),
            json!({"role": "assistant", "content": "bad"}),
        );
        let pair = expected("conversation_pair", &[("user", "q")], &["good", "bad"], None);
        assert_eq!(preference(&json!({"chosen": [user, good], "rejected": [user, bad]})), Ok(pair.clone()));
        assert_eq!(preference(&json!({"prompt": "q", "chosen": [user, good], "rejected": [user, bad]})), Ok(pair.clone()));
        assert_eq!(preference(&json!({"prompt": [user], "chosen": [good], "rejected": [bad]})), Ok(pair));
        let call = json!({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]});
        let read = preference(&json!({"chosen": [user, call], "rejected": [user, bad], "tools": [{"name": "f"}]})).unwrap();
        assert_eq!(read.answers[0].extra["tool_calls"], json!([{"function": {"name": "f", "arguments": {}}}]));
        assert_eq!(read.context.tools, [json!({"name": "f"})]);
        let other = preference(&json!({"prompt": "other", "chosen": [user, good], "rejected": [user, bad]}));
        assert!(other.unwrap_err().contains("not how `chosen` and `rejected` begin"));
        let late = preference(&json!({"chosen": [user, good, user, good], "rejected": [user, bad, user, bad]}));
        assert!(late.unwrap_err().contains("more than their last turn"));
    }

    #[test]
    fn transcripts() {
        let shared = "\n\nHuman: Hi\n\nAssistant: Hello: you?\n\nHuman: How do I\n\nboil an egg?";
        let row = json!({"chosen": format!("{shared}\n\nAssistant: In water."), "rejected": format!("{shared}\n\nAssistant: No.")});
        let prompt = [("user", "Hi"), ("assistant", "Hello: you?"), ("user", "How do I\n\nboil an egg?")];
        assert_eq!(preference(&row), Ok(expected("transcript_pair", &prompt, &["In water.", "No."], None)));
        let row = json!({"prompt": format!("{shared}\n\nAssistant:"), "chosen": "In water.", "rejected": "No."});
        assert_eq!(preference(&row), Ok(expected("pair", &prompt, &["In water.", "No."], None)));
        let row = json!({"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: b\n\nAssistant: y"});
        assert!(preference(&row).unwrap_err().contains("more than their last turn"));
        let row = json!({"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: a\n\nAssistant:"});
        assert!(preference(&row).is_err());
    }

    #[test]
    fn ranked_lists() {
        let best_first = json!({"prompt": "q", "answers": ["a", "b", "c"]});
        assert_eq!(preference(&best_first), Ok(expected("ranked", &[("user", "q")], &["a", "b", "c"], None)));
        let ranks = json!({"prompt": "q", "responses": ["a", "b", "c"], "ranks": [3, 1, 2]});
        assert_eq!(preference(&ranks), Ok(expected("ranked", &[("user", "q")], &["b", "c", "a"], None)));
        let scores = json!({"prompt": "q", "responses": ["a", "b", "c"], "scores": [0.5, 0.5, 2]});
        assert_eq!(preference(&scores), Ok(expected("ranked", &[("user", "q")], &["c", "a"], None)));
        assert!(preference(&json!({"prompt": "q", "answers": ["a"]})).unwrap_err().contains("at least 2"));
        assert!(preference(&json!({"prompt": "q", "answers": ["a", "b"], "ranks": [1]})).unwrap_err().contains("1 values for 2"));
    }

    #[test]
    fn unusable() {
        let reason = |row: Value| preference(&row).unwrap_err();
        assert!(reason(json!({"prompt": "q", "chosen": "x", "rejected": "x"})).contains("the same"));
        assert!(reason(json!({"prompt": "q", "chosen": "x", "rejected": " "})).contains("empty"));
        assert!(reason(json!({"prompt": "q", "chosen": "x"})).contains("without `rejected`"));
        assert!(reason(json!({"chosen": "x", "rejected": "y"})).contains("no prompt"));
        assert!(reason(json!({"prompt": "q", "chosen": {"from": "human", "value": "x"}, "rejected": "y"})).contains("role `user`"));
        assert!(reason(json!({"prompt": "q", "chosen": "x", "rejected": "y", "margin": "big"})).contains("`margin`"));
        assert!(reason(json!({"a": 1})).contains("the row has a"));
    }
}
