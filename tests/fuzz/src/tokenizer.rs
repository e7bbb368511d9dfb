//! What rlflow itself reads of tokenizers: the number of tokens, when planning, and `tokenizer_config.json`. Parsing `tokenizer.json` for use
//! is the crate `tokenizers`'.

use rlflow_text::{TokenizerConfig, count_tokens};

/// Fails on a panic.
pub fn check(input: &[u8]) {
    let _ = count_tokens(input);
    let Ok(mut config) = TokenizerConfig::parse(input) else { return };
    drop((config.pad_token(), config.eos_token(), config.special_tokens(), config.chat_template()));
    config.set("pad_token", "<pad>");
    assert_eq!(TokenizerConfig::parse(&config.to_json()).expect("what is written can be read"), config);
}
