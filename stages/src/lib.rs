//! Stage kinds of rlflow: data, trainers, PPO, DPO, evaluation.

pub mod corpus;
pub mod instructions;
pub mod preferences;
pub mod prompts;
pub mod tokenizer;

use rlflow_api::Kind;

/// Every stage kind. A new one is a folder beside the others and a line here.
pub fn kinds() -> Vec<&'static dyn Kind> {
    vec![&corpus::Corpus, &tokenizer::Tokenizer, &instructions::Instructions, &preferences::Preferences, &prompts::Prompts]
}
