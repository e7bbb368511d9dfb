//! Text from a checkpoint, token by token: what `rlflow generate` and `rlflow chat` run.

use rlflow_api::{Artifact, ArtifactType, DeviceSpec, StageError, StageResult};
use rlflow_model::{Decoder, Draws, Head, Sampling, checkpoint, generate::generate};
use rlflow_text::{ChatTokenizer, Message};

use crate::{models, train::burn_device};

/// A policy that answers.
pub struct ChatModel {
    decoder: Decoder,
    tokenizer: ChatTokenizer,
}

/// How an answer ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Reply {
    /// The text.
    pub text: String,
    /// Tokens of it.
    pub tokens: usize,
    /// Whether it ended by itself rather than for want of room.
    pub ended: bool,
}

/// What to answer.
pub enum Prompt<'a> {
    /// Turns of a conversation, rendered with the chat template.
    Messages(&'a [Message]),
    /// Text to continue as it is.
    Text(&'a str),
}

impl ChatModel {
    /// Loads a policy artifact onto `device`.
    ///
    /// # Errors
    /// If it is not a policy, or cannot be read.
    pub fn load(artifact: &Artifact, device: DeviceSpec) -> StageResult<Self> {
        let artifact_type = &artifact.manifest().artifact_type;
        if artifact_type != ArtifactType::Policy.name() {
            return Err(StageError::invalid_with_hint(
                format!("an artifact of type `{artifact_type}` writes no text"),
                "name a stage whose main output is a policy: pretrain, sft, ppo or dpo",
            ));
        }
        let (decoder, _) = checkpoint::load(artifact, Head::Language, 0, &burn_device(device)?)?;
        Ok(Self { decoder, tokenizer: models::tokenizer(artifact)? })
    }

    /// Length of the rendered prompt, in tokens.
    ///
    /// # Errors
    /// If the chat template refuses it.
    pub fn prompt_tokens(&self, prompt: &Prompt<'_>) -> StageResult<usize> {
        Ok(self.encode(prompt)?.len())
    }

    /// Longest prompt and answer together, in tokens.
    pub fn context(&self) -> usize {
        self.decoder.config().context
    }

    fn encode(&self, prompt: &Prompt<'_>) -> StageResult<Vec<u32>> {
        match prompt {
            Prompt::Messages(messages) => self.tokenizer.encode_prompt(*messages).map_err(|error| StageError::invalid(error.to_string())),
            Prompt::Text(text) => Ok(self.tokenizer.encode(text)),
        }
    }

    /// Answers; `each` gets pieces of the text as they come and stops the answer by returning false. With temperature
    /// 0 the answer is the likeliest one; else draws depend on `seed` and `turn` alone.
    ///
    /// # Errors
    /// If the prompt fills the model's context.
    pub fn reply(
        &self,
        prompt: &Prompt<'_>,
        sampling: &Sampling,
        seed: u64,
        turn: u64,
        mut each: impl FnMut(&str) -> bool,
    ) -> StageResult<Reply> {
        let ids = self.encode(prompt)?;
        let context = self.context();
        if ids.is_empty() || ids.len() >= context {
            return Err(StageError::invalid_with_hint(
                format!("a prompt of {} tokens leaves no room in the model's context of {context}", ids.len()),
                if ids.is_empty() { "give it some text" } else { "a shorter prompt, or a new conversation" },
            ));
        }
        let sampling = Sampling { stop_ids: self.tokenizer.stop_ids(), ..sampling.clone() };
        let mut stream = self.tokenizer.decode_stream();
        let mut text = String::new();
        let draws = Draws { seed, purpose: "chat", step: turn };
        let completion = generate(&self.decoder, &[&ids], &sampling, draws, |_, token| {
            if sampling.stop_ids.contains(&token) {
                return true;
            }
            let piece = stream.push(token);
            text.push_str(&piece);
            piece.is_empty() || each(&piece)
        });
        let rest = stream.finish();
        if !rest.is_empty() {
            each(&rest);
            text.push_str(&rest);
        }
        let completion = completion.into_iter().next().map_or((0, false), |completion| (completion.ids.len(), completion.ended));
        Ok(Reply { text, tokens: completion.0, ended: completion.1 })
    }
}
