//! Messages in the notations of OpenAI (`role`, `content`) and ShareGPT (`from`, `value`).

use serde_json::{Map, Value, json};
use unicode_normalization::UnicodeNormalization;

use crate::{
    ChatContext, Message,
    documents::kind_of,
    python_json::{self, Style},
};

/// Names under which a message may hold what the assistant thought; templates know the first.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

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
    let mut extra = Map::new();
    // Writers of tables fill in nulls for what a row does not have.
    for (key, value) in map.iter().filter(|(key, value)| !matches!(key.as_str(), "role" | "content") && !value.is_null()) {
        match (key.as_str(), value) {
            ("tool_calls", Value::Array(calls)) if calls.is_empty() => {}
            ("tool_calls", calls) => drop(extra.insert(key.clone(), tool_calls(calls)?)),
            ("function_call", call) => drop(extra.insert("tool_calls".into(), Value::Array(vec![tool_call(call)?]))),
            _ => drop(extra.insert(key.clone(), value.clone())),
        }
    }
    if let Some(reasoning) = REASONING.iter().find_map(|name| extra.get(*name)?.as_str()) {
        let reasoning = Value::from(normal(reasoning));
        extra.insert(REASONING[0].into(), reasoning.clone());
        // Some templates ask for it under this name.
        extra.entry("thinking").or_insert(reasoning);
    }
    let content = match map.get("content") {
        // A turn that only calls a tool.
        None | Some(Value::Null) if extra.contains_key("tool_calls") => String::new(),
        None | Some(Value::Null) => return Err(format!("a message of `{role}` has no `content`")),
        // What a tool gives back may be anything.
        Some(result @ (Value::Object(_) | Value::Number(_) | Value::Bool(_))) if role == "tool" => {
            python_json::dump(result, &Style::default())
        }
        Some(content) => content_text(content)?,
    };
    Ok(Message { role: role.to_owned(), content, extra })
}

/// OpenAI's `tool_calls`.
fn tool_calls(value: &Value) -> Result<Value, String> {
    match value {
        Value::Array(calls) => Ok(Value::Array(calls.iter().map(tool_call).collect::<Result<_, _>>()?)),
        Value::String(text) => match serde_json::from_str(text) {
            Ok(calls @ Value::Array(_)) => tool_calls(&calls),
            _ => Err("`tool_calls` is text that is not a JSON array".into()),
        },
        other => Err(format!("`tool_calls` is {}, expected an array", kind_of(other))),
    }
}

/// `{id, type, function: {name, arguments}}`, or only the function. Arguments that are JSON text become what the text says, so that the
/// two ways of writing them, both common, give the same tokens.
fn tool_call(value: &Value) -> Result<Value, String> {
    let Value::Object(call) = value else { return Err(format!("a tool call is {}, expected an object", kind_of(value))) };
    let mut call: Map<String, Value> =
        call.iter().filter(|(_, value)| !value.is_null()).map(|(key, value)| (key.clone(), value.clone())).collect();
    if !call.contains_key("function") {
        call = Map::from_iter([("type".to_owned(), "function".into()), ("function".to_owned(), Value::Object(call))]);
    }
    let Some(function) = call.get_mut("function").and_then(Value::as_object_mut) else {
        return Err("`function` of a tool call is not an object".into());
    };
    if !function.get("name").is_some_and(Value::is_string) {
        return Err("a tool call has no `name`".into());
    }
    let arguments = function.entry("arguments").or_insert_with(|| Value::Object(Map::new()));
    if let Some(text) = arguments.as_str() {
        *arguments = match serde_json::from_str(text) {
            Ok(read @ Value::Object(_)) => read,
            _ if text.trim().is_empty() => Value::Object(Map::new()),
            _ => return Err("`arguments` of a tool call is text that is not a JSON object".into()),
        };
    }
    Ok(Value::Object(call))
}

/// What comes with the turns of a row: `tools` (or `functions`, without the wrapping), a list or the JSON text of one; `documents`, which may
/// also be texts; and `chat_template_kwargs`.
pub(super) fn context(row: &Map<String, Value>) -> Result<ChatContext, String> {
    let mut tools = list(row, "tools")?;
    // Other rows than those of tools may have a field of this name.
    if tools.is_empty() {
        let wrap = |function: Value| json!({"type": "function", "function": function});
        tools = list(row, "functions").unwrap_or_default().into_iter().map(wrap).collect();
    }
    let documents = match row.get("documents") {
        Some(Value::String(text)) if !text.trim().is_empty() && list(row, "documents").is_err() => vec![json!({"text": text})],
        Some(Value::Array(texts)) if texts.iter().all(Value::is_string) => texts.iter().map(|text| json!({"text": text})).collect(),
        _ => list(row, "documents")?,
    };
    let variables = match row.get("chat_template_kwargs") {
        None | Some(Value::Null) => Map::new(),
        Some(Value::Object(variables)) => variables.clone(),
        Some(other) => return Err(format!("`chat_template_kwargs` is {}, expected an object", kind_of(other))),
    };
    Ok(ChatContext { tools, documents, variables })
}

fn list(row: &Map<String, Value>, name: &str) -> Result<Vec<Value>, String> {
    let wrong = |what: &str| format!("`{name}` is {what}, expected a list of objects");
    let list = match row.get(name) {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::String(text)) if text.trim().is_empty() => return Ok(Vec::new()),
        Some(Value::String(text)) => serde_json::from_str(text).map_err(|error| format!("`{name}` is text that is not JSON: {error}"))?,
        Some(value) => value.clone(),
    };
    let Value::Array(list) = list else { return Err(wrong(kind_of(&list))) };
    let read = |value: Value| match value {
        Value::String(text) => serde_json::from_str(&text).ok().filter(Value::is_object).ok_or_else(|| wrong("a list of texts")),
        Value::Object(_) => Ok(value),
        other => Err(wrong(&format!("a list with {}", kind_of(&other)))),
    };
    list.into_iter().map(read).collect()
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
    if from == "function_call" {
        // A call or a list of calls as JSON text; anything else is what the assistant says.
        let read: Option<Value> = value.as_str().map_or_else(|| Some(value.clone()), |text| serde_json::from_str(text).ok());
        let calls = read.and_then(|read| if read.is_array() { tool_calls(&read) } else { tool_call(&read).map(|call| json!([call])) }.ok());
        if let Some(calls) = calls {
            return Ok(Message::new(role, "").with("tool_calls", calls));
        }
    }
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
