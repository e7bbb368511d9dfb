use tokenizers::{
    AddedToken, Model, TokenizerImpl,
    models::bpe::{BPE, BpeTrainer},
    normalizers::NormalizerWrapper,
    pre_tokenizers::{PreTokenizerWrapper, byte_level::ByteLevel, digits::Digits, sequence::Sequence},
    processors::PostProcessorWrapper,
};

use crate::{TextError, tokenizer::TOKENIZER_ENTRY};

/// How a tokenizer is trained.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BpeOptions {
    /// Most tokens: special ones, 256 bytes, and merges.
    pub vocab_size: usize,
    /// Least number of occurrences of a pair that is merged.
    pub min_frequency: u64,
    /// Whether every digit is a token of its own, which makes arithmetic easier to learn.
    pub split_digits: bool,
    /// Special tokens: they get the first ids, in this order.
    pub special_tokens: Vec<String>,
}

/// Trains byte-level BPE (as GPT-2: any text can be encoded, and decodes to itself) and returns the content of
/// `tokenizer.json`. The same documents and options give the same bytes, on any number of threads: words are counted,
/// the alphabet is sorted, and equal pairs are merged in order of their ids.
pub fn train_bpe<'a>(documents: impl Iterator<Item = &'a str> + Send, options: &BpeOptions) -> Result<Vec<u8>, TextError> {
    let bad = |error: tokenizers::Error| TextError::Tokenizer { file: TOKENIZER_ENTRY, message: error.to_string() };
    let byte_level = ByteLevel::new(false, true, true);
    let mut parts: Vec<PreTokenizerWrapper> = Vec::new();
    if options.split_digits {
        parts.push(Digits::new(true).into());
    }
    parts.push(byte_level.into());
    let mut tokenizer: TokenizerImpl<BPE, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, ByteLevel> =
        TokenizerImpl::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(Sequence::new(parts))).with_decoder(Some(byte_level));
    let special = options.special_tokens.iter().map(|token| AddedToken::from(token.clone(), true)).collect();
    let mut trainer = BpeTrainer::builder()
        .show_progress(false)
        .vocab_size(options.vocab_size)
        .min_frequency(options.min_frequency)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(special)
        .build();
    tokenizer.train(&mut trainer, documents).map_err(bad)?;
    debug_assert!(tokenizer.get_model().get_vocab_size() <= options.vocab_size.max(256 + options.special_tokens.len()));
    tokenizer.to_string(false).map(String::into_bytes).map_err(bad)
}
