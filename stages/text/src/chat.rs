use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::Message;

/// What a conversation brings along besides its turns, for templates that know of it.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct ChatContext {
    /// Functions that the assistant may call, as JSON schemas: `{"type": "function", "function": {name, description, parameters}}`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tools: Vec<Value>,
    /// Documents to answer from, usually with `title` and `text`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub documents: Vec<Value>,
    /// Further variables of the template (`enable_thinking`).
    #[serde(default, rename = "chat_template_kwargs", skip_serializing_if = "Map::is_empty")]
    pub variables: Map<String, Value>,
}

/// A conversation as a template is given it. Made of plain messages by `into()`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Chat<'a> {
    /// The turns.
    pub messages: &'a [Message],
    /// What comes with them.
    pub context: Option<&'a ChatContext>,
}

impl<'a> Chat<'a> {
    /// Turns with what comes with them.
    pub fn new(messages: &'a [Message], context: &'a ChatContext) -> Self {
        Self { messages, context: Some(context) }
    }

    /// Other turns with the same context.
    pub fn with_messages<'b>(self, messages: &'b [Message]) -> Chat<'b>
    where
        'a: 'b,
    {
        Chat { messages, context: self.context }
    }
}

impl<'a> From<&'a [Message]> for Chat<'a> {
    fn from(messages: &'a [Message]) -> Self {
        Self { messages, context: None }
    }
}

impl<'a> From<&'a Vec<Message>> for Chat<'a> {
    fn from(messages: &'a Vec<Message>) -> Self {
        messages.as_slice().into()
    }
}

impl<'a, const TURNS: usize> From<&'a [Message; TURNS]> for Chat<'a> {
    fn from(messages: &'a [Message; TURNS]) -> Self {
        messages.as_slice().into()
    }
}
