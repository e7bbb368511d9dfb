//! Text side of rlflow's stages: what turns files into token ids, without a tensor in sight.
//!
//! In data order: [`read_rows`] and [`read_documents`] stream data files; [`Mixture`] says which document of which
//! source comes next; [`TextDataset`] holds the documents. [`train_tokenizer`] makes a tokenizer of them and
//! [`ChatTokenizer`] is one in use, with its chat template ([`ChatTemplate`]); [`tokenize_corpus`] makes a
//! [`TokenDataset`]. Rows of conversations, preferences and prompts are recognised by [`rows`] and stored as
//! [`ConversationDataset`], [`PreferenceDataset`] and [`PromptDataset`]. [`CounterRng`] is the randomness of all of it.
//!
//! Artifacts hold results only: no names, paths or times, so that equal results have equal digests. Integers are little-endian.

mod chat_template;
mod conversation;
mod counter_rng;
mod error;
mod message;
mod packed;
mod preference;
mod prompt;
mod python_json;
mod scratch;
mod split;
mod text_dataset;
mod token_dataset;
mod tokenizer;
mod tokenizer_config;

pub use chat_template::{CHATML, ChatTemplate, Rendered};
pub use conversation::{ConversationDataset, ConversationRow, ConversationWriter};
pub use counter_rng::{CounterRng, philox4x32_10};
pub use error::TextError;
pub use message::Message;
pub use preference::{PreferenceDataset, PreferenceRow, PreferenceWriter};
pub use prompt::{PromptDataset, PromptRow, PromptWriter};
pub use split::Split;
pub use text_dataset::{TextDataset, TextWriter};
pub use token_dataset::{TokenDataset, tokenize_corpus};
pub use tokenizer::{CONFIG_ENTRY, ChatTokenizer, DecodeStream, TOKENIZER_ENTRY};
pub use tokenizer_config::TokenizerConfig;
