use rlflow_api::{RunContext, StageError, StageResult};
use rlflow_text::{CHATML, ChatTokenizer, TokenizerConfig, TokenizerOptions, complete_tokenizer};
use serde_json::Value;

use super::Directory;

/// Files that say what a tokenizer's tokens are for.
const CONFIG_FILES: [&str; 3] = ["tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"];

/// The entries of a tokenizer artifact from the files of a checkpoint: what they say is kept, and what rlflow needs
/// beside it (EOS, a pad token that is another one, a chat template) is settled.
pub fn complete(directory: &Directory, template: Option<&str>, context: &RunContext<'_>) -> StageResult<(Vec<u8>, Vec<u8>)> {
    let tokenizer_json = directory.read("tokenizer.json")?;
    let mut contents = Vec::new();
    for name in CONFIG_FILES {
        contents.extend(directory.read_optional(name)?.map(|content| (name, content)));
    }
    let mut config = TokenizerConfig::of_files(contents.iter().map(|(name, content)| (*name, content.as_slice())))?;
    if config.eos_token().is_none()
        && let Some(eos) = eos_of_model(directory, &tokenizer_json)?
    {
        config.set("eos_token", &eos);
    }
    let eos = config.eos_token().map(str::to_owned);
    let mut options = TokenizerOptions { eos_token: eos.clone(), chat_template: template.map(str::to_owned), ..Default::default() };
    if config.pad_token().is_none_or(|pad| Some(pad) == eos.as_deref()) {
        // A token that the model has a row for, if there is one: nothing rlflow trains on is padded, but others pad.
        let tokens = config.special_tokens();
        let named = |key: &str| tokens.iter().find(|(name, _)| name == key).map(|(_, token)| token.clone());
        options.pad_token = named("unk_token").filter(|unk| Some(unk) != eos.as_ref() && Some(unk) != named("bos_token").as_ref());
    }
    if options.chat_template.is_none() && config.chat_template()?.is_none() {
        let eos = eos.as_deref().unwrap_or("<|im_end|>");
        context.note(format!("the checkpoint has no chat template: ChatML, whose turns end in {eos}"));
        options.chat_template = Some(CHATML.replace("<|im_end|>", &eos.replace('\\', "\\\\").replace('\'', "\\'")));
    }
    Ok(complete_tokenizer(tokenizer_json, config, &options)?)
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

/// The token that `config.json` gives as `eos_token_id`.
fn eos_of_model(directory: &Directory, tokenizer_json: &[u8]) -> StageResult<Option<String>> {
    let config: Value = serde_json::from_slice(&directory.read("config.json")?).unwrap_or_default();
    let id = &config["eos_token_id"];
    let Some(id) = id.as_u64().or_else(|| id.as_array()?.first()?.as_u64()) else { return Ok(None) };
    let tokenizer: Value = serde_json::from_slice(tokenizer_json).unwrap_or_default();
    let mut added = tokenizer["added_tokens"].as_array().into_iter().flatten();
    let found = added.find(|token| token["id"].as_u64() == Some(id)).and_then(|token| token["content"].as_str());
    Ok(found.map(str::to_owned))
}
