use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Network families. All are pre-norm decoders; [`Architecture::style`] says what their blocks have that Llama's have not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Architecture {
    /// RMSNorm, rotary positions and SwiGLU.
    #[default]
    Llama,
    /// Llama, perhaps with a sliding window.
    Mistral,
    /// Llama with biases on queries, keys and values.
    Qwen2,
    /// Llama with RMSNorm on the queries and keys of each head.
    Qwen3,
    /// LayerNorm, learned positions, GELU, and biases everywhere.
    Gpt2,
}

impl Architecture {
    /// What the family's blocks have that Llama's have not.
    pub const fn style(self) -> BlockStyle {
        match self {
            Self::Llama | Self::Mistral => BlockStyle::LLAMA,
            Self::Qwen2 => BlockStyle { qkv_bias: true, ..BlockStyle::LLAMA },
            Self::Qwen3 => BlockStyle { qk_norm: true, ..BlockStyle::LLAMA },
            Self::Gpt2 => {
                BlockStyle { layer_norm: true, plain_mlp: true, qkv_bias: true, output_bias: true, mlp_bias: true, ..BlockStyle::LLAMA }
            }
        }
    }
}

/// What a block has that Llama's has not. With this one description every family is the same decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct BlockStyle {
    /// LayerNorm with weight and bias instead of RMSNorm, in the blocks and at the end.
    pub layer_norm: bool,
    /// A feed-forward layer without a gate, `down(gelu(up(x)))` with the tanh form of GELU, instead of SwiGLU.
    pub plain_mlp: bool,
    /// Biases on the projections to queries, keys and values.
    pub qkv_bias: bool,
    /// A bias on attention's output projection.
    pub output_bias: bool,
    /// Biases in the feed-forward layer.
    pub mlp_bias: bool,
    /// RMSNorm on the queries and keys of each head, before positions enter.
    pub qk_norm: bool,
    /// A token attends to itself and to this many tokens before it, less one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sliding_window: Option<usize>,
}

impl BlockStyle {
    /// Llama's blocks.
    pub const LLAMA: Self = Self {
        layer_norm: false,
        plain_mlp: false,
        qkv_bias: false,
        output_bias: false,
        mlp_bias: false,
        qk_norm: false,
        sliding_window: None,
    };

    /// Whether blocks are Llama's: then nothing is said about them in a checkpoint.
    pub fn is_llama(&self) -> bool {
        *self == Self::LLAMA
    }
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
    /// One trained vector per position, added to the embedding (GPT-2).
    Learned,
}

/// Scaling of rotary frequencies, as `rope_scaling` of Hugging Face configs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "rope_type", rename_all = "snake_case")]
pub enum RopeScaling {
    /// All frequencies are slowed alike (arXiv:2306.15595).
    Linear {
        /// Factor by which they are slowed.
        factor: f64,
    },
    /// Llama 3: low frequencies are slowed, high ones stay, those between are blended.
    Llama3 {
        /// Factor by which low frequencies are slowed.
        factor: f64,
        /// Low-frequency bound.
        low_freq_factor: f64,
        /// High-frequency bound.
        high_freq_factor: f64,
        /// Context that the frequencies were first trained for, in tokens.
        original_max_position_embeddings: u64,
    },
    /// YaRN (arXiv:2309.00071): low frequencies are slowed, high ones stay, and attention is sharpened.
    Yarn {
        /// Factor by which low frequencies are slowed.
        factor: f64,
        /// Factor on cosines and sines.
        attention_factor: f64,
        /// Frequencies that turn more often than this in the original context stay.
        beta_fast: f64,
        /// Those that turn less often than this are slowed by `factor`.
        beta_slow: f64,
        /// Context that the frequencies were first trained for, in tokens.
        original_max_position_embeddings: u64,
        /// Whether the bounds are whole pairs.
        truncate: bool,
    },
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
    /// Epsilon of the norms.
    pub norm_eps: f64,
    /// Whether the output projection is the embedding.
    pub tie_embeddings: bool,
    /// What its blocks have that Llama's have not.
    #[serde(default, skip_serializing_if = "BlockStyle::is_llama")]
    pub style: BlockStyle,
}

impl ModelConfig {
    /// Number of trained parameters of the decoder, without any scalar head.
    pub fn parameter_count(&self) -> u64 {
        let (d, f) = (self.hidden_size as u64, self.intermediate_size as u64);
        let (q, kv) = ((self.heads * self.head_dim) as u64, (self.kv_heads * self.head_dim) as u64);
        let BlockStyle { layer_norm, plain_mlp, qkv_bias, output_bias, mlp_bias, qk_norm, .. } = self.style;
        let given = |wanted: bool, count: u64| if wanted { count } else { 0 };
        let norm = if layer_norm { 2 * d } else { d };
        let attention =
            d * (q + 2 * kv) + q * d + given(qkv_bias, q + 2 * kv) + given(output_bias, d) + given(qk_norm, 2 * self.head_dim as u64);
        let inner = if plain_mlp { 1 } else { 2 };
        let mlp = (inner + 1) * d * f + given(mlp_bias, inner * f + d);
        let positions = given(self.positions == Positions::Learned, self.context as u64 * d);
        let embeddings = self.vocab_size as u64 * d * if self.tie_embeddings { 1 } else { 2 };
        embeddings + positions + self.layers as u64 * (2 * norm + attention + mlp) + norm
    }
}
