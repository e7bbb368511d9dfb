use rlflow_api::StageError;

/// What can be wrong with a text, a template or a tokenizer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TextError {
    /// The chat template does not parse, or refuses a conversation.
    #[error("chat template: {message}")]
    Template {
        /// What the template engine or the template itself says.
        message: String,
    },
    /// The tokens to train on cannot be found.
    #[error("cannot tell which tokens of the chat template's output the assistant wrote: {message}")]
    Mask {
        /// Why not.
        message: String,
    },
    /// A conversation without anything to learn from.
    #[error("no assistant turn")]
    NoAssistantTurn,
    /// A text that cannot be rendered safely.
    #[error("contains the noncharacter U+{code:04X}, which is reserved")]
    Reserved {
        /// Its code point.
        code: u32,
    },
    /// A text for which the tokenizer has no tokens.
    #[error("the tokenizer cannot encode it: {message}")]
    Encode {
        /// What the tokenizer says.
        message: String,
    },
    /// `tokenizer.json` or `tokenizer_config.json` cannot be used.
    #[error("{file}: {message}")]
    Tokenizer {
        /// Which of the two.
        file: &'static str,
        /// What is wrong with it.
        message: String,
    },
}

impl TextError {
    /// Whether the chat template is to blame, not the conversation that it was given.
    pub const fn is_of_template(&self) -> bool {
        matches!(self, Self::Template { .. } | Self::Mask { .. })
    }

    /// The error without the words "chat template", for messages that name the template themselves.
    pub fn of_template_text(&self) -> String {
        match self {
            Self::Template { message } => message.clone(),
            other => other.to_string(),
        }
    }

    /// What the user can do, where known.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Mask { .. } => Some("put {% generation %} and {% endgeneration %} around what the assistant writes in the chat template"),
            _ => None,
        }
    }
}

impl From<TextError> for StageError {
    fn from(error: TextError) -> Self {
        Self::Invalid { message: error.to_string(), hint: error.hint().map(str::to_owned) }
    }
}
