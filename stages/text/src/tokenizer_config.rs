use std::collections::BTreeMap;

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

    /// From the files of a Hugging Face directory, by their names in it, as transformers reads them: `tokenizer_config.json`; tokens that
    /// only `special_tokens_map.json` names; `chat_template.jinja`, which wins over a template in the config; and named templates in
    /// `additional_chat_templates/`. Others are passed over.
    pub fn of_files<'a>(files: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> Result<Self, TextError> {
        let files: BTreeMap<&str, &[u8]> = files.into_iter().collect();
        let mut config = files.get(CONFIG_ENTRY).map_or_else(|| Ok(Self::default()), |content| Self::parse(content))?;
        if let Some(map) = files.get("special_tokens_map.json") {
            for (key, value) in Self::parse(map)?.0.into_iter().filter(|(key, _)| TOKEN_KEYS.contains(&key.as_str())) {
                if config.token(&key).is_none() {
                    config.0.insert(key, value);
                }
            }
        }
        let mut named = Map::new();
        for (file, content) in files {
            let name = file.strip_prefix("additional_chat_templates/").and_then(|name| name.strip_suffix(".jinja"));
            if let Some(name) = name.or((file == "chat_template.jinja").then_some("default")) {
                let bad = |error| TextError::Template { message: format!("{file} is not UTF-8: {error}") };
                named.insert(name.to_owned(), std::str::from_utf8(content).map_err(bad)?.into());
            }
        }
        if !named.is_empty() {
            if let (Some(default), false) = (config.chat_template()?, named.contains_key("default")) {
                named.insert("default".into(), default.into());
            }
            let only = if named.len() == 1 { named.remove("default") } else { None };
            config.0.insert("chat_template".into(), only.unwrap_or(Value::Object(named)));
        }
        Ok(config)
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

    /// Begins a document, where the tokenizer has such a token.
    pub fn bos_token(&self) -> Option<&str> {
        self.token("bos_token")
    }

    /// Whether BOS is put before a document, where the config says so.
    pub fn add_bos_token(&self) -> Option<bool> {
        self.0.get("add_bos_token")?.as_bool()
    }

    /// The template; of several the one called `default`.
    ///
    /// # Errors
    /// If there are several and none of them has that name.
    pub fn chat_template(&self) -> Result<Option<&str>, TextError> {
        let Some(value) = self.0.get("chat_template").filter(|value| !value.is_null()) else { return Ok(None) };
        if let Some(template) = value.as_str().or_else(|| self.named_template("default")) {
            return Ok(Some(template));
        }
        let names: Vec<&str> = match value {
            Value::Array(named) => named.iter().filter_map(|entry| entry.get("name")?.as_str()).collect(),
            Value::Object(named) => named.keys().map(String::as_str).collect(),
            _ => Vec::new(),
        };
        let message = format!("`chat_template` is neither a template nor a list with one called `default` (it has: {})", names.join(", "));
        Err(TextError::Tokenizer { file: CONFIG_ENTRY, message })
    }

    /// The template for conversations with tools, where there is one apart.
    pub fn tools_template(&self) -> Option<&str> {
        self.named_template("tool_use")
    }

    /// One of several templates, which stand in a list of `name` and `template` or in an object.
    fn named_template(&self, name: &str) -> Option<&str> {
        match self.0.get("chat_template")? {
            Value::Array(named) => {
                named.iter().find(|entry| entry.get("name").and_then(Value::as_str) == Some(name))?.get("template")?.as_str()
            }
            Value::Object(named) => named.get(name)?.as_str(),
            _ => None,
        }
    }

    /// The file's content.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec_pretty(&self.0).expect("a JSON object can be written")
    }
}
