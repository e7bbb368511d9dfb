//! The `model` table: shape of a network trained from scratch.

use rlflow_api::{Architecture, ModelConfig, Positions, Problem};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Shape of a network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ModelSettings {
    /// Family: `llama` (pre-norm decoder with RMSNorm and SwiGLU), `mistral` (the same), `qwen2` (with biases on queries, keys and
    /// values), `qwen3` (with RMSNorm on the queries and keys of each head) or `gpt2` (LayerNorm, GELU, biases, learned positions).
    #[serde(default)]
    pub architecture: Architecture,
    /// Width of the residual stream.
    #[schemars(range(min = 2, max = 100_000))]
    pub hidden_size: usize,
    /// Decoder blocks.
    #[schemars(range(min = 1, max = 1_000))]
    pub layers: usize,
    /// Query heads; must divide `hidden_size`.
    #[schemars(range(min = 1, max = 1_000))]
    pub heads: usize,
    /// Key and value heads: as many as `heads` (multi-head), fewer (grouped) or 1 (multi-query). Default: `heads`.
    #[serde(default)]
    #[schemars(range(min = 1, max = 1_000))]
    pub kv_heads: Option<usize>,
    /// Width of the feed-forward layer. Default: 8/3 of `hidden_size`, rounded up to 64; with `gpt2` 4 times `hidden_size`.
    #[serde(default)]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub intermediate_size: Option<usize>,
    /// Longest sequence.
    #[schemars(extend("x-unit" = "tokens"), range(min = 8, max = 1_000_000))]
    pub context: usize,
    /// How positions enter: `rope`, `alibi` or `learned`. Default: `rope`, with `gpt2` `learned`.
    #[serde(default)]
    pub positions: Option<Positions>,
    /// Base of the rotary frequencies.
    #[serde(default = "rope_theta")]
    #[schemars(range(min = 1.0))]
    pub rope_theta: f64,
    /// Epsilon of the norms.
    #[serde(default = "norm_eps")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub norm_eps: f64,
    /// Whether the output projection is the embedding.
    #[serde(default)]
    pub tie_embeddings: bool,
    /// Standard deviation of the initial weights; output projections of both halves of a block get it divided by
    /// `sqrt(2 layers)`.
    #[serde(default = "init_std")]
    #[schemars(range(min = 0.0, max = 10.0))]
    pub init_std: f64,
}

fn rope_theta() -> f64 {
    10_000.0
}

fn norm_eps() -> f64 {
    1e-5
}

fn init_std() -> f64 {
    0.02
}

impl ModelSettings {
    /// Fills in what depends on other settings.
    pub fn normalise(&mut self) {
        self.kv_heads = Some(self.kv_heads());
        self.intermediate_size = Some(self.intermediate_size());
        self.positions = Some(self.positions());
    }

    fn kv_heads(&self) -> usize {
        self.kv_heads.unwrap_or(self.heads)
    }

    fn intermediate_size(&self) -> usize {
        self.intermediate_size.unwrap_or(match self.architecture {
            Architecture::Gpt2 => 4 * self.hidden_size,
            _ => (self.hidden_size * 8 / 3).next_multiple_of(64),
        })
    }

    fn positions(&self) -> Positions {
        self.positions.unwrap_or(match self.architecture {
            Architecture::Gpt2 => Positions::Learned,
            _ => Positions::Rope,
        })
    }

    /// Problems between settings; `prefix` is the table's name.
    pub fn check(&self, prefix: &str) -> Vec<Problem> {
        let mut problems = Vec::new();
        let Self { hidden_size, heads, .. } = *self;
        let kv_heads = self.kv_heads();
        if heads == 0 || kv_heads == 0 {
            return problems;
        }
        if hidden_size % heads != 0 {
            let message = format!("heads = {heads} does not divide hidden_size = {hidden_size}");
            let divisors: Vec<String> = (1..=hidden_size.min(256)).filter(|n| hidden_size % n == 0).map(|n| n.to_string()).collect();
            problems.push(
                Problem::new("heads_do_not_divide", format!("{prefix}.heads"), message).hint(format!("{} would", divisors.join(", "))),
            );
        } else if self.positions() == Positions::Rope && hidden_size / heads % 2 != 0 {
            let message = format!("rotary positions turn pairs, and heads of width {} are odd", hidden_size / heads);
            problems.push(Problem::new("odd_head_width", format!("{prefix}.heads"), message));
        }
        if heads % kv_heads != 0 {
            let message = format!("kv_heads = {kv_heads} does not divide heads = {heads}");
            problems.push(Problem::new("heads_do_not_divide", format!("{prefix}.kv_heads"), message));
        }
        problems
    }

    /// The config for a vocabulary.
    pub fn config(&self, vocab_size: usize) -> ModelConfig {
        ModelConfig {
            architecture: self.architecture,
            vocab_size,
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size(),
            layers: self.layers,
            heads: self.heads,
            kv_heads: self.kv_heads(),
            head_dim: self.hidden_size / self.heads.max(1),
            context: self.context,
            positions: self.positions(),
            rope_theta: self.rope_theta,
            rope_scaling: None,
            norm_eps: self.norm_eps,
            tie_embeddings: self.tie_embeddings,
            style: self.architecture.style(),
        }
    }
}
