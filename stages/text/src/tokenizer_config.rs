use serde_json::{Map, Value, json};

use crate::{TextError, tokenizer::CONFIG_ENTRY};

/// Keys of `tokenizer_config.json` that name a special token.
pub(crate) const TOKEN_KEYS: &[&str] = &["bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token"];

/// `tokenizer_config.json` in Hugging Face's layout, as far as rlflow reads it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TokenizerConfig(Map<String, Value>);

impl TokenizerConfig {
    /// Config of a tokenizer made here.
    pub fn trained() -> Self {
        let mut config = Self::default();
        config.set("tokenizer_class", "PreTrainedTokenizerFast");
        config
    }

    /// From a file's content.
    pub fn parse(content: &[u8]) -> Result<Self, TextError> {
        let bad = |message: String| TextError::Tokenizer { file: CONFIG_ENTRY, message };
        serde_json::from_slice(content).map(Self).map_err(|error| bad(format!("not a JSON object: {error}")))
    }

    /// Sets a key.
    pub fn set(&mut self, key: &str, value: &str) {
        self.0.insert(key.to_owned(), json!(value));
    }

    /// A token, written as its name or as an object with `content`.
    fn token(&self, key: &str) -> Option<&str> {
        let value = self.0.get(key)?;
        value.as_str().or_else(|| value.get("content")?.as_str())
    }

    /// Fills rows.
    pub fn pad_token(&self) -> Option<&str> {
        self.token("pad_token")
    }

    /// Ends a turn.
    pub fn eos_token(&self) -> Option<&str> {
        self.token("eos_token")
    }

    /// Special tokens by the name under which templates know them.
    pub fn special_tokens(&self) -> Vec<(String, String)> {
        TOKEN_KEYS.iter().filter_map(|key| Some(((*key).to_owned(), self.token(key)?.to_owned()))).collect()
    }

    /// The template; of several the one called `default`.
    pub fn chat_template(&self) -> Option<&str> {
        match self.0.get("chat_template")? {
            Value::String(template) => Some(template),
            Value::Array(named) => {
                named.iter().find(|entry| entry.get("name").and_then(Value::as_str) == Some("default"))?.get("template")?.as_str()
            }
            _ => None,
        }
    }

    /// The file's content.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec_pretty(&self.0).expect("a JSON object can be written")
    }
}
