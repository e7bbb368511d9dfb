use serde_json::{Map, Value};

use super::{
    preference::{preference, prompt_of},
    turns::{content_text, context, field_names, normal, object, with_system},
};
use crate::{ChatContext, Message, documents::kind_of};

/// Something to answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Prompt {
    /// Name of the row's format.
    pub format: &'static str,
    /// The turns, up to where the assistant is to speak.
    pub messages: Vec<Message>,
    /// What comes with them: `tools`, `documents`, `chat_template_kwargs`.
    pub context: ChatContext,
    /// The right answer, where the row has one.
    pub answer: Option<String>,
}

/// Where a prompt row has its reference answer.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct PromptFields {
    /// Field of the answer; without it the first of `answer`, `reference` and `solution` that is there.
    pub answer: Option<String>,
    /// Only what follows the last occurrence of this is the answer (`####` in GSM8K).
    pub answer_after: Option<String>,
}

/// Reads a row in the format that its fields show: `prompt` or `question` (text, an HH-RLHF transcript, or messages),
/// `messages`, `conversations`, `instruction` with `input`; a JSON string; or a preference row, whose answers are left out.
/// Assistant turns at the end are left out.
pub fn prompt(row: &Value, fields: &PromptFields) -> Result<Prompt, String> {
    if let Value::String(text) = row {
        return text_prompt(text);
    }
    let row = object(row)?;
    let (format, mut messages) = match prompt_of(row)? {
        Some(messages) => (format_of(row), with_system(row, messages)?),
        None if row.contains_key("chosen") => ("preference", preference(&Value::Object(row.clone()))?.prompt),
        None => {
            return Err(format!(
                "not a known format: expected `prompt`, `question`, `messages`, `conversations` or `instruction`; the row has {}",
                field_names(row)
            ));
        }
    };
    while messages.last().is_some_and(Message::is_assistant) {
        messages.pop();
    }
    if !messages.iter().any(|message| message.role == "user" && !message.content.trim().is_empty()) {
        return Err("no user turn with content".into());
    }
    Ok(Prompt { format, messages, context: context(row)?, answer: answer(row, fields)? })
}

/// A line of plain text: one user turn.
pub fn text_prompt(text: &str) -> Result<Prompt, String> {
    match text.trim() {
        "" => Err("the prompt is empty".into()),
        text => {
            let messages = vec![Message::user(normal(text))];
            Ok(Prompt { format: "text", messages, context: ChatContext::default(), answer: None })
        }
    }
}

fn format_of(row: &Map<String, Value>) -> &'static str {
    ["prompt", "question", "messages", "conversations", "conversation"]
        .into_iter()
        .find(|name| row.get(*name).is_some_and(|value| !value.is_null()))
        .unwrap_or("alpaca")
}

fn answer(row: &Map<String, Value>, fields: &PromptFields) -> Result<Option<String>, String> {
    let names = fields.answer.as_deref().map_or_else(|| vec!["answer", "reference", "solution"], |name| vec![name]);
    let Some((name, value)) = names.into_iter().find_map(|name| Some((name, row.get(name).filter(|value| !value.is_null())?))) else {
        return match &fields.answer {
            Some(name) => Err(format!("no field `{name}` (the row has {})", field_names(row))),
            None => Ok(None),
        };
    };
    let text = match value {
        Value::Number(number) => number.to_string(),
        Value::Bool(truth) => truth.to_string(),
        Value::String(_) => content_text(value)?,
        other => return Err(format!("`{name}` is {}, expected text or a number", kind_of(other))),
    };
    let text = match &fields.answer_after {
        None => text.as_str(),
        Some(marker) => text.rsplit_once(marker.as_str()).ok_or_else(|| format!("`{name}` has no `{marker}`"))?.1,
    };
    match text.trim() {
        "" => Err(format!("`{name}` is empty")),
        text => Ok(Some(text.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(row: Value) -> Result<Prompt, String> {
        prompt(&row, &PromptFields::default())
    }

    fn expected(format: &'static str, messages: &[(&str, &str)], answer: Option<&str>) -> Result<Prompt, String> {
        let messages = messages.iter().map(|(role, content)| Message::new(*role, *content)).collect();
        Ok(Prompt { format, messages, context: ChatContext::default(), answer: answer.map(str::to_owned) })
    }

    #[test]
    fn formats() {
        assert_eq!(read(json!({"prompt": "q"})), expected("prompt", &[("user", "q")], None));
        assert_eq!(read(json!({"prompt": "q", "answer": 42})), expected("prompt", &[("user", "q")], Some("42")));
        assert_eq!(read(json!({"question": "q", "solution": " s "})), expected("question", &[("user", "q")], Some("s")));
        assert_eq!(read(json!("q")), expected("text", &[("user", "q")], None));
        assert_eq!(text_prompt(" q "), expected("text", &[("user", "q")], None));
        let row = json!({"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]});
        assert_eq!(read(row), expected("messages", &[("system", "S"), ("user", "q")], None));
        let row =
            json!({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "human", "value": "c"}]});
        assert_eq!(read(row), expected("conversations", &[("user", "a"), ("assistant", "b"), ("user", "c")], None));
        let row = json!({"instruction": "do", "input": "x", "output": "not a reference"});
        assert_eq!(read(row), expected("alpaca", &[("user", "do\nx")], None));
        let row = json!({"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: a\n\nAssistant: y"});
        assert_eq!(read(row), expected("preference", &[("user", "a")], None));
    }

    #[test]
    fn answers() {
        let fields = PromptFields { answer: Some("answer".into()), answer_after: Some("####".into()) };
        let row = json!({"question": "q", "answer": "6 * 7 = 42\n#### 42"});
        assert_eq!(prompt(&row, &fields), expected("question", &[("user", "q")], Some("42")));
        assert!(prompt(&json!({"question": "q", "answer": "42"}), &fields).unwrap_err().contains("`####`"));
        assert!(prompt(&json!({"question": "q"}), &fields).unwrap_err().contains("no field `answer`"));
        assert!(read(json!({"prompt": "q", "answer": []})).unwrap_err().contains("an array"));
    }

    #[test]
    fn unusable() {
        assert!(read(json!({"prompt": " "})).unwrap_err().contains("no user turn"));
        assert!(read(json!({"messages": [{"role": "assistant", "content": "a"}]})).unwrap_err().contains("no user turn"));
        assert!(read(json!({"x": 1})).unwrap_err().contains("the row has x"));
        assert!(read(json!(3)).unwrap_err().contains("a number"));
    }
}
