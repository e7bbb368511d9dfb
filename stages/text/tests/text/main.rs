//! The text side as its users meet it: data files, tokenizers, chat templates.

mod chat_templates;
mod data_files;
mod fuzz;
mod tokenizer;
