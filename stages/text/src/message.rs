use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// One turn of a conversation, as chat templates see it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant` or `tool`; templates may know others.
    pub role: String,
    /// What was said; empty in a turn that only calls tools.
    pub content: String,
    /// Other keys of the message, passed to the template as they are: `tool_calls` (each with a `function` of `name` and
    /// `arguments`, an object), `tool_call_id`, `name`, `reasoning_content`, ...
    #[serde(flatten, default, skip_serializing_if = "Map::is_empty")]
    pub extra: Map<String, Value>,
}

impl Message {
    /// A message without further keys.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into(), extra: Map::new() }
    }

    /// A system message.
    pub fn system(content: impl Into<String>) -> Self {
        Self::new("system", content)
    }

    /// A user turn.
    pub fn user(content: impl Into<String>) -> Self {
        Self::new("user", content)
    }

    /// An assistant turn.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self::new("assistant", content)
    }

    /// The same with a further key.
    pub fn with(mut self, key: &str, value: Value) -> Self {
        self.extra.insert(key.to_owned(), value);
        self
    }

    /// Whether anything is said, thought or called in it.
    pub fn says_something(&self) -> bool {
        let said = |key: &str| match self.extra.get(key) {
            Some(Value::String(text)) => !text.trim().is_empty(),
            Some(Value::Array(calls)) => !calls.is_empty(),
            _ => false,
        };
        !self.content.trim().is_empty() || said("tool_calls") || said("reasoning_content")
    }

    /// Whether it is an assistant turn.
    pub fn is_assistant(&self) -> bool {
        self.role == "assistant"
    }
}
