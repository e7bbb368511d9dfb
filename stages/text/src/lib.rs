//! Text side of rlflow's stages: what turns files into token ids, without a tensor in sight.
//!
//! In data order: [`read_rows`] and [`read_documents`] stream data files; [`Mixture`] says which document of which
//! source comes next; [`build_corpus`] stores the documents and [`TextDataset`] reads them. [`train_bpe`] makes a tokenizer of them and
//! [`ChatTokenizer`] is one in use, with its chat template ([`ChatTemplate`]); [`tokenize_corpus`] makes a
//! [`TokenDataset`]. Rows of conversations, preferences and prompts are recognised by [`rows`] and stored as
//! [`ConversationDataset`], [`PreferenceDataset`] and [`PromptDataset`]. [`preview`] shows what is in them.
//!
//! Artifacts hold results only: no names, paths or times, so that equal results have equal digests. Integers are little-endian.

mod bpe;
mod chat;
mod chat_encoder;
mod chat_template;
mod conversation;
mod corpus;
mod csv_rows;
mod data_file;
mod decode_stream;
mod dialect;
mod documents;
mod empty_files;
mod error;
mod html;
mod json_rows;
mod message;
mod mixture;
mod packed;
mod parquet;
mod preference;
mod preview;
mod prompt;
mod python_json;
mod row_file;
mod row_source;
pub mod rows;
mod scratch;
mod split;
mod text_dataset;
mod token_dataset;
mod tokenizer;
mod tokenizer_config;
mod tokenizer_setup;
mod unusable;

pub use bpe::{BpeOptions, train_bpe};
pub use chat::{Chat, ChatContext};
pub use chat_template::{CHATML, ChatTemplate, Rendered};
pub use conversation::{ConversationDataset, ConversationRow, ConversationWriter};
pub use corpus::{CorpusOptions, CorpusSource, SourceCounts, build_corpus};
pub use data_file::{DataFormat, Flow};
pub use decode_stream::DecodeStream;
pub use documents::{TextSplit, read_documents};
pub use error::TextError;
pub use message::Message;
pub use mixture::{Draw, Mixture, SourceShare};
pub use preference::{PreferenceDataset, PreferenceRow, PreferenceWriter};
pub use preview::{PreviewPart, PreviewRow, PreviewRun, is_previewed, preview};
pub use prompt::{PromptDataset, PromptRow, PromptWriter};
pub use row_file::read_rows;
pub use row_source::{RowCounts, RowError, RowSettings, RowSource, UsableRow, check_document_formats, convert_rows, question_digest};
pub use split::Split;
pub use text_dataset::{TextDataset, TextWriter};
pub use token_dataset::{TokenDataset, tokenize_corpus};
pub use tokenizer::{CONFIG_ENTRY, ChatTokenizer, TOKENIZER_ENTRY};
pub use tokenizer_config::TokenizerConfig;
pub use tokenizer_setup::{TokenizerOptions, complete_tokenizer, count_tokens, read_file};
pub use unusable::Unusable;
