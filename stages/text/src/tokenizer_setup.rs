use rlflow_api::{DataFile, StageResult};
use tokenizers::{AddedToken, Tokenizer};

use crate::{
    CHATML, TextError, TokenizerConfig,
    data_file::{read_error, with_file},
    tokenizer::{CONFIG_ENTRY, TOKENIZER_ENTRY},
};

/// Ends a document in trained tokenizers.
pub const DOCUMENT_END: &str = "<|endoftext|>";
/// Begins a turn in ChatML.
pub const TURN_START: &str = "<|im_start|>";
/// Ends a turn in ChatML.
pub const TURN_END: &str = "<|im_end|>";
/// Fills rows in trained tokenizers.
pub const PAD: &str = "<|pad|>";

/// Names that tokenizers give to the token that ends a turn, where no config says which it is.
const KNOWN_EOS: &[&str] = &[TURN_END, "<|eot_id|>", "<end_of_turn>", "<|eot|>", "<|end|>", DOCUMENT_END, "</s>", "<eos>"];
/// Names that tokenizers give to padding.
const KNOWN_PAD: &[&str] = &[PAD, "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|padding|>"];

/// What the user says about a tokenizer's tokens and template.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TokenizerOptions {
    /// Token that fills rows.
    pub pad_token: Option<String>,
    /// Token that ends a turn.
    pub eos_token: Option<String>,
    /// Source of the chat template.
    pub chat_template: Option<String>,
    /// Further special tokens.
    pub special_tokens: Vec<String>,
}

impl TokenizerOptions {
    /// Special tokens of a tokenizer that is trained, in the order of their ids.
    pub fn trained_special_tokens(&self) -> Vec<String> {
        let mut tokens = vec![DOCUMENT_END.to_owned()];
        if self.chat_template.is_none() {
            tokens.push(TURN_START.into());
        }
        tokens.push(self.eos_token.clone().unwrap_or_else(|| TURN_END.into()));
        tokens.push(self.pad_token.clone().unwrap_or_else(|| PAD.into()));
        tokens.extend(self.special_tokens.iter().cloned());
        let mut seen = std::collections::HashSet::new();
        tokens.retain(|token| seen.insert(token.clone()));
        tokens
    }
}

/// The entries of a tokenizer artifact from a `tokenizer.json`, what is known of its config, and the user's wishes: pad and EOS
/// token are settled (known names are looked for; what is missing is added as a special token) and differ; without any
/// template it is ChatML. Returns the contents of `tokenizer.json` (unchanged if nothing was added) and `tokenizer_config.json`.
pub fn complete_tokenizer(
    tokenizer_json: Vec<u8>,
    mut config: TokenizerConfig,
    options: &TokenizerOptions,
) -> Result<(Vec<u8>, Vec<u8>), TextError> {
    let bad = |message: String| TextError::Tokenizer { file: TOKENIZER_ENTRY, message };
    let mut tokenizer = Tokenizer::from_bytes(&tokenizer_json).map_err(|error| bad(error.to_string()))?;
    let known = |names: &[&str]| names.iter().find(|name| tokenizer.token_to_id(name).is_some()).map(|name| (*name).to_owned());

    let chatml = options.chat_template.is_none() && config.chat_template()?.is_none();
    let eos = options.eos_token.clone().or_else(|| if chatml { Some(TURN_END.into()) } else { config.eos_token().map(str::to_owned) });
    let eos = eos.or_else(|| known(KNOWN_EOS)).unwrap_or_else(|| TURN_END.into());
    let pad = options.pad_token.clone().or_else(|| config.pad_token().filter(|pad| *pad != eos).map(str::to_owned));
    let pad = pad.or_else(|| known(KNOWN_PAD).filter(|pad| *pad != eos)).unwrap_or_else(|| PAD.into());
    if pad == eos {
        return Err(TextError::Tokenizer { file: CONFIG_ENTRY, message: format!("pad and EOS token are both `{eos}`; they must differ") });
    }

    let mut wanted = vec![eos.clone(), pad.clone()];
    if chatml {
        wanted.push(TURN_START.to_owned());
    }
    wanted.extend(options.special_tokens.iter().cloned());
    let special = tokenizer.get_added_tokens_decoder();
    let is_special = |name: &String| special.values().any(|token| token.special && token.content == *name);
    let mut missing: Vec<AddedToken> = Vec::new();
    for name in wanted.iter().filter(|name| !is_special(name)) {
        if name.is_empty() {
            return Err(bad("a special token is empty".into()));
        }
        if !missing.iter().any(|token| token.content == *name) {
            missing.push(AddedToken::from(name.clone(), true));
        }
    }
    let tokenizer_json = if missing.is_empty() {
        tokenizer_json
    } else {
        tokenizer.add_special_tokens(&missing);
        tokenizer.to_string(false).map_err(|error| bad(error.to_string()))?.into_bytes()
    };
    config.set("pad_token", &pad);
    config.set("eos_token", &eos);
    if let Some(template) = options.chat_template.clone().or_else(|| chatml.then(|| chatml_ending_in(&eos))) {
        config.set("chat_template", &template);
    }
    Ok((tokenizer_json, config.to_json()))
}

/// ChatML whose turns end in `eos`: a model must be taught the token that stops it.
fn chatml_ending_in(eos: &str) -> String {
    CHATML.replace(TURN_END, &eos.replace('\\', "\\\\").replace('\'', "\\'"))
}

/// The whole content of a data file, which must be what was hashed when planning.
pub fn read_file(file: &DataFile) -> StageResult<Vec<u8>> {
    with_file(file, |input| {
        let mut content = Vec::new();
        input.read_to_end(&mut content).map_err(|error| read_error(file, error))?;
        Ok(content)
    })
}

/// Number of tokens that a `tokenizer.json` holds, from its text alone: enough to plan with.
pub fn count_tokens(tokenizer_json: &[u8]) -> Option<u64> {
    #[derive(serde::Deserialize)]
    struct File {
        #[serde(default)]
        added_tokens: Vec<Added>,
        model: Model,
    }
    #[derive(serde::Deserialize)]
    struct Added {
        id: u64,
    }
    #[derive(serde::Deserialize)]
    struct Model {
        vocab: Vocab,
    }
    #[derive(serde::Deserialize)]
    #[serde(untagged)]
    enum Vocab {
        Named(std::collections::HashMap<String, u64>),
        Listed(Vec<serde::de::IgnoredAny>),
    }
    let file: File = serde_json::from_slice(tokenizer_json).ok()?;
    let known = match file.model.vocab {
        Vocab::Named(tokens) => tokens.into_values().max().map_or(0, |id| id + 1),
        Vocab::Listed(tokens) => tokens.len() as u64,
    };
    Some(file.added_tokens.iter().map(|token| token.id + 1).max().unwrap_or(0).max(known))
}
