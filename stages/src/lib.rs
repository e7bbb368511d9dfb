//! Stage kinds of rlflow.
//!
//! Data: [`corpus`], [`tokenizer`], [`instructions`], [`preferences`], [`prompts`]. Checkpoints from elsewhere: [`import`], and out again:
//! [`export`]. Training: [`pretrain`], [`sft`],
//! [`reward_model`], [`ppo`] with its four roles, [`dpo`]. And [`eval`]. What trainers share stands in [`train`], their maths in
//! [`losses`]. `benches/speed` measures training, generation, PPO and DPO beside PyTorch, transformers and TRL.

mod adapter_export;
pub mod chat;
pub mod corpus;
mod devices;
pub mod dpo;
pub mod eval;
pub mod export;
pub mod import;
pub mod instructions;
pub mod language;
pub mod lora;
pub mod losses;
mod model_settings;
pub mod models;
pub mod pairs;
pub mod ppo;
pub mod preferences;
pub mod pretrain;
pub mod prompts;
pub mod reward_model;
pub mod sft;
pub mod tokenizer;
pub mod train;

pub use devices::{Accelerator, accelerators, nccl};
use rlflow_api::Kind;

/// Every stage kind. A new one is a folder beside the others and a line here.
pub fn kinds() -> Vec<&'static dyn Kind> {
    vec![
        &corpus::Corpus,
        &tokenizer::Tokenizer,
        &import::Import,
        &pretrain::Pretrain,
        &instructions::Instructions,
        &preferences::Preferences,
        &prompts::Prompts,
        &sft::Sft,
        &reward_model::RewardModel,
        &ppo::ActorRole,
        &ppo::CriticRole,
        &ppo::RefRole,
        &ppo::RewardRole,
        &ppo::Ppo,
        &dpo::Dpo,
        &eval::Eval,
    ]
}
