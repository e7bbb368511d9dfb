//! What the targets do with an input: one file each, so that the crates' own tests can take it in too and try the beginnings in
//! `seeds/` (their module `fuzz`).

/// Where targets write.
pub mod folder;
/// What the crates' tests use.
pub mod inputs;
/// Stage kinds.
pub mod kinds;
/// Data files in the folder.
pub mod scratch;

pub mod action;
pub mod data_file;
pub mod hf_config;
pub mod manifest;
pub mod parquet;
pub mod safetensors;
pub mod tokenizer;
pub mod workflow;
