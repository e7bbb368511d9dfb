use rlflow_api::{RunContext, StageError, StageResult};
use rlflow_text::{CHATML, ChatTokenizer, TokenizerConfig, TokenizerOptions, complete_tokenizer};
use serde_json::{Map, Value};

use super::Directory;

const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const TEMPLATE_FILE: &str = "chat_template.jinja";
const TOKEN_KEYS: [&str; 4] = ["bos_token", "eos_token", "pad_token", "unk_token"];

/// The entries of a tokenizer artifact from the files of a checkpoint: what they say is kept, and what rlflow needs
/// beside it (EOS, a pad token that is another one, a chat template) is settled.
pub fn complete(directory: &Directory, template: Option<&str>, context: &RunContext<'_>) -> StageResult<(Vec<u8>, Vec<u8>)> {
    let tokenizer_json = directory.read(TOKENIZER)?;
    let mut config = object(directory, TOKENIZER_CONFIG)?;
    let older = object(directory, "special_tokens_map.json")?;
    for key in TOKEN_KEYS {
        if config.get(key).is_none_or(Value::is_null)
            && let Some(token) = older.get(key)
        {
            config.insert(key.into(), token.clone());
        }
    }
    if let Some(content) = directory.read_optional(TEMPLATE_FILE)? {
        let bad = |_| StageError::Data { path: TEMPLATE_FILE.into(), line: None, message: "it is not UTF-8".into(), hint: None };
        config.insert("chat_template".into(), String::from_utf8(content).map_err(bad)?.into());
    }
    if token(&config, "eos_token").is_none()
        && let Some(eos) = eos_of_model(directory, &tokenizer_json)?
    {
        config.insert("eos_token".into(), eos.into());
    }
    let eos = token(&config, "eos_token");
    if token(&config, "pad_token").is_none_or(|pad| Some(&pad) == eos.as_ref()) {
        // A token that the model has a row for, if there is one: nothing rlflow trains on is padded, but others pad.
        let spare = token(&config, "unk_token").filter(|unk| Some(unk) != eos.as_ref() && Some(unk) != token(&config, "bos_token").as_ref());
        match spare {
            Some(spare) => config.insert("pad_token".into(), spare.into()),
            None => config.remove("pad_token"),
        };
    }
    let file = TokenizerConfig::parse(&serde_json::to_vec(&config).map_err(|error| StageError::invalid(error.to_string()))?)?;
    let chatml = || {
        let eos = eos.as_deref().unwrap_or("<|im_end|>");
        context.note(format!("the checkpoint has no chat template: ChatML, whose turns end in {eos}"));
        CHATML.replace("<|im_end|>", &eos.replace('\\', "\\\\").replace('\'', "\\'"))
    };
    let chat_template = match (template, file.chat_template()) {
        (Some(template), _) => Some(template.to_owned()),
        (None, Some(_)) => None,
        (None, None) => Some(chatml()),
    };
    let options = TokenizerOptions { chat_template, eos_token: eos, ..TokenizerOptions::default() };
    Ok(complete_tokenizer(tokenizer_json, file, &options)?)
}

/// A token that the model has no row for must never reach it. Only the pad token may be one: nothing is padded here.
pub fn check_rows(tokenizer: &ChatTokenizer, rows: usize) -> StageResult<()> {
    let pad = tokenizer.pad_id() as usize;
    let beyond = tokenizer.vocab_size().saturating_sub(rows);
    if beyond == 0 || beyond == 1 && pad + 1 == tokenizer.vocab_size() {
        return Ok(());
    }
    Err(StageError::invalid_with_hint(
        format!("the tokenizer has {} tokens, and the model rows for {rows}", tokenizer.vocab_size()),
        "the tokenizer is not this model's; or its embedding was not resized (`resize_token_embeddings` in Python)",
    ))
}

fn object(directory: &Directory, name: &str) -> StageResult<Map<String, Value>> {
    let Some(content) = directory.read_optional(name)? else { return Ok(Map::new()) };
    let bad = |error: serde_json::Error| StageError::Data {
        path: name.into(),
        line: Some(error.line() as u64),
        message: format!("not a JSON object: {error}"),
        hint: None,
    };
    serde_json::from_slice(&content).map_err(bad)
}

/// A token of the config, written as its name or as an object with `content`.
fn token(config: &Map<String, Value>, key: &str) -> Option<String> {
    let value = config.get(key)?;
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
}

/// The token that `config.json` gives as `eos_token_id`.
fn eos_of_model(directory: &Directory, tokenizer_json: &[u8]) -> StageResult<Option<String>> {
    let config = object(directory, "config.json")?;
    let id = config.get("eos_token_id").and_then(|id| id.as_u64().or_else(|| id.as_array()?.first()?.as_u64()));
    let Some(id) = id else { return Ok(None) };
    let tokenizer: Value = serde_json::from_slice(tokenizer_json).unwrap_or_default();
    let added = tokenizer["added_tokens"].as_array().into_iter().flatten();
    let found = added.into_iter().find(|token| token["id"].as_u64() == Some(id)).and_then(|token| token["content"].as_str());
    Ok(found.map(str::to_owned))
}
