use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Network families.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Architecture {
    /// Pre-norm decoder with RMSNorm, rotary positions and SwiGLU (Llama).
    #[default]
    Llama,
}

/// How positions enter attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Positions {
    /// Rotary embedding (arXiv:2104.09864), half-split layout as in Llama checkpoints.
    #[default]
    Rope,
    /// Linear biases on the scores (arXiv:2108.12409).
    Alibi,
}

/// Llama-3 style frequency scaling.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RopeScaling {
    /// Factor by which low frequencies are slowed.
    pub factor: f64,
    /// Low-frequency bound.
    pub low_freq_factor: f64,
    /// High-frequency bound.
    pub high_freq_factor: f64,
    /// Context that the frequencies were first trained for, in tokens.
    pub original_max_position_embeddings: u64,
}

/// Shape of a network with every default filled in: what is stored with a checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    /// Family.
    pub architecture: Architecture,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Decoder blocks.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads: `heads` (MHA), fewer (GQA) or 1 (MQA).
    pub kv_heads: usize,
    /// Width of a head; `hidden_size / heads` unless the checkpoint says otherwise.
    pub head_dim: usize,
    /// Longest sequence, in tokens.
    pub context: usize,
    /// Positions.
    pub positions: Positions,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Frequency scaling.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<RopeScaling>,
    /// Epsilon of RMSNorm.
    pub norm_eps: f64,
    /// Whether the output projection is the embedding.
    pub tie_embeddings: bool,
}

impl ModelConfig {
    /// Number of trained parameters of the decoder, without any scalar head.
    pub fn parameter_count(&self) -> u64 {
        let (d, f) = (self.hidden_size as u64, self.intermediate_size as u64);
        let (q, kv) = ((self.heads * self.head_dim) as u64, (self.kv_heads * self.head_dim) as u64);
        let block = 2 * d + d * (q + 2 * kv) + q * d + 3 * d * f;
        let embeddings = self.vocab_size as u64 * d * if self.tie_embeddings { 1 } else { 2 };
        embeddings + self.layers as u64 * block + d
    }
}
