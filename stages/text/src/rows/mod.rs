//! Row formats that users have: a JSON row in, messages out. Every function says in words why a row cannot be used.

mod conversation;
mod preference;
mod prompt;
mod transcript;
mod turns;

pub use conversation::{Conversation, conversation};
pub use preference::{Preference, preference};
pub use prompt::{Prompt, PromptFields, prompt, text_prompt};
