//! Messages in the notations of OpenAI (`role`, `content`) and ShareGPT (`from`, `value`).

use serde_json::{Map, Value};
use unicode_normalization::UnicodeNormalization;

use crate::{Message, documents::kind_of};

/// Text in Unicode NFC, as in the corpus, so that the same words give the same tokens.
pub(super) fn normal(text: &str) -> String {
    text.nfc().collect()
}

/// One message in either notation.
pub(super) fn message(value: &Value) -> Result<Message, String> {
    let Value::Object(map) = value else {
        return Err(format!("a message is {}, expected an object", kind_of(value)));
    };
    match (map.get("role"), map.get("from")) {
        (Some(role), _) => openai(map, role),
        (None, Some(from)) => sharegpt(map, from),
        (None, None) => Err("a message has neither `role` nor `from`".into()),
    }
}

/// A list of messages.
pub(super) fn messages(value: &Value) -> Result<Vec<Message>, String> {
    match value {
        Value::Array(list) => list.iter().map(message).collect(),
        other => Err(format!("messages are {}, expected an array", kind_of(other))),
    }
}

fn openai(map: &Map<String, Value>, role: &Value) -> Result<Message, String> {
    let role = role.as_str().ok_or_else(|| format!("`role` is {}, expected text", kind_of(role)))?;
    let role = match role {
        "developer" => "system",
        "function" => "tool",
        other => other,
    };
    let content = match map.get("content") {
        // A turn that only calls a tool.
        None | Some(Value::Null) if map.contains_key("tool_calls") || map.contains_key("function_call") => String::new(),
        None | Some(Value::Null) => return Err(format!("a message of `{role}` has no `content`")),
        Some(content) => content_text(content)?,
    };
    let extra = map.iter().filter(|(key, _)| !matches!(key.as_str(), "role" | "content")).map(|(key, value)| (key.clone(), value.clone()));
    Ok(Message { extra: extra.collect(), ..Message::new(role, content) })
}

fn sharegpt(map: &Map<String, Value>, from: &Value) -> Result<Message, String> {
    let from = from.as_str().ok_or_else(|| format!("`from` is {}, expected text", kind_of(from)))?;
    let role = match from {
        "human" | "user" => "user",
        "gpt" | "assistant" | "model" | "chatgpt" | "bing" | "bard" | "function_call" => "assistant",
        "system" => "system",
        "tool" | "observation" | "function_response" => "tool",
        other => return Err(format!("`from` is `{other}`, expected human, gpt, system or tool")),
    };
    let value = map.get("value").or_else(|| map.get("content")).ok_or_else(|| format!("a message from `{from}` has no `value`"))?;
    Ok(Message::new(role, content_text(value)?))
}

/// Text, or OpenAI's list of parts where all are text.
pub(super) fn content_text(content: &Value) -> Result<String, String> {
    match content {
        Value::String(text) => Ok(normal(text)),
        Value::Array(parts) => {
            let mut text = String::new();
            for part in parts {
                match (part.as_str(), part.get("type").and_then(Value::as_str), part.get("text").and_then(Value::as_str)) {
                    (Some(part), ..) | (None, Some("text"), Some(part)) => text.push_str(part),
                    (None, Some(other), _) => return Err(format!("a message has a part of type `{other}`, only text can be used")),
                    _ => return Err("a message has a part that is not text".into()),
                }
            }
            Ok(normal(&text))
        }
        other => Err(format!("the content of a message is {}, expected text", kind_of(other))),
    }
}

/// A field that is text, where present and not null.
pub(super) fn text_field(row: &Map<String, Value>, name: &str) -> Result<Option<String>, String> {
    match row.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(normal(text))),
        Some(other) => Err(format!("`{name}` is {}, expected text", kind_of(other))),
    }
}

/// Puts the row's `system` text before `messages`, unless they begin with a system message.
pub(super) fn with_system(row: &Map<String, Value>, mut messages: Vec<Message>) -> Result<Vec<Message>, String> {
    let has = messages.first().is_some_and(|first| first.role == "system");
    if let Some(system) = text_field(row, "system")?.filter(|system| !system.is_empty() && !has) {
        messages.insert(0, Message::system(system));
    }
    Ok(messages)
}

/// Alpaca's prompt: system, history, and the instruction with its input on the next line.
pub(super) fn alpaca_prompt(row: &Map<String, Value>) -> Result<Vec<Message>, String> {
    let instruction = text_field(row, "instruction")?.unwrap_or_default();
    let input = text_field(row, "input")?.unwrap_or_default();
    let user = match (instruction.trim().is_empty(), input.trim().is_empty()) {
        (true, true) => return Err("`instruction` is empty".into()),
        (true, false) => input,
        (false, true) => instruction,
        (false, false) => format!("{instruction}\n{input}"),
    };
    let mut turns = Vec::new();
    match row.get("history") {
        None | Some(Value::Null) => {}
        Some(Value::Array(history)) => {
            for pair in history {
                match pair.as_array().map(Vec::as_slice) {
                    Some([Value::String(question), Value::String(answer)]) => {
                        turns.extend([Message::user(normal(question)), Message::assistant(normal(answer))]);
                    }
                    _ => return Err("`history` must be a list of [question, answer]".into()),
                }
            }
        }
        Some(other) => return Err(format!("`history` is {}, expected a list of [question, answer]", kind_of(other))),
    }
    turns.push(Message::user(user));
    with_system(row, turns)
}

/// The row as an object.
pub(super) fn object(row: &Value) -> Result<&Map<String, Value>, String> {
    match row {
        Value::Object(map) => Ok(map),
        other => Err(format!("the row is {}, expected an object", kind_of(other))),
    }
}

/// The fields of a row, for messages.
pub(super) fn field_names(row: &Map<String, Value>) -> String {
    let names: Vec<&str> = row.keys().map(String::as_str).take(8).collect();
    if names.is_empty() { "none".into() } else { names.join(", ") }
}
