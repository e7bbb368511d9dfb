use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{ModelConfig, RowTokens};

/// What an artifact is; the type of an edge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ArtifactType {
    /// Raw documents.
    Text,
    /// A tokenizer with its chat template.
    Tokenizer,
    /// Token sequences.
    Tokens,
    /// Conversations with a loss mask.
    Conversations,
    /// Prompts with better and worse answers.
    Preferences,
    /// Prompts, perhaps with reference answers.
    Prompts,
    /// A language model.
    Policy,
    /// A model that scores a whole answer.
    Reward,
    /// A model that predicts the return at every token.
    Critic,
    /// A text encoder.
    Encoder,
    /// Sampled answers with their log-probabilities.
    Rollouts,
    /// Results of an evaluation.
    Evaluation,
}

impl ArtifactType {
    /// The name used in files and messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Tokenizer => "tokenizer",
            Self::Tokens => "tokens",
            Self::Conversations => "conversations",
            Self::Preferences => "preferences",
            Self::Prompts => "prompts",
            Self::Policy => "policy",
            Self::Reward => "reward",
            Self::Critic => "critic",
            Self::Encoder => "encoder",
            Self::Rollouts => "rollouts",
            Self::Evaluation => "evaluation",
        }
    }
}

impl fmt::Display for ArtifactType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Where something was first made: stage and port. Two artifacts whose tokenizers have different origins cannot
/// meet in one stage; planning compares origins, running compares digests.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Origin {
    /// Stage name.
    pub stage: String,
    /// Output port.
    pub port: String,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.stage, self.port)
    }
}

/// What planning knows of an artifact before it exists. Unknown is `None`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ArtifactMeta {
    /// Its type.
    pub artifact_type: ArtifactType,
    /// Shape of the network, for models.
    pub model: Option<ModelConfig>,
    /// The tokenizer its ids belong to.
    pub tokenizer: Option<Origin>,
    /// Number of tokens in that tokenizer (an upper bound where it is trained).
    pub vocab_size: Option<u64>,
    /// Longest sequence.
    pub context: Option<u64>,
    /// Rows (documents, conversations, pairs, prompts).
    pub rows: Option<u64>,
    /// Tokens.
    pub tokens: Option<u64>,
    /// How long rows are, once they are there.
    pub row_tokens: Option<RowTokens>,
    /// Size when stored.
    pub size_bytes: Option<u64>,
}

impl ArtifactMeta {
    /// Only the type known.
    pub const fn new(artifact_type: ArtifactType) -> Self {
        Self {
            artifact_type,
            model: None,
            tokenizer: None,
            vocab_size: None,
            context: None,
            rows: None,
            tokens: None,
            row_tokens: None,
            size_bytes: None,
        }
    }
}
