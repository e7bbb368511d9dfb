use rlflow_api::{Architecture, BlockStyle, CounterRng, ModelConfig, Positions};
use serde_json::{Value, json};

/// A network and the batch that it is trained on. Both sides get exactly this.
#[derive(Debug, Clone)]
pub struct Size {
    /// What the tables call it.
    pub name: &'static str,
    /// The network.
    pub config: ModelConfig,
    /// Sequences of a training step.
    pub batch: usize,
    /// Tokens of each.
    pub length: usize,
}

impl Size {
    /// 3.7 million parameters, 16 x 128 tokens.
    pub fn small() -> Self {
        Self { name: "small", config: llama(1024, 256, 704, 4, 4, 128), batch: 16, length: 128 }
    }

    /// 58 million parameters, 4 x 512 tokens.
    pub fn large() -> Self {
        Self { name: "large", config: llama(32_000, 512, 1408, 8, 8, 512), batch: 4, length: 512 }
    }

    /// One of them by its name.
    pub fn named(name: &str) -> Option<Self> {
        [Self::small(), Self::large()].into_iter().find(|size| size.name == name)
    }

    /// Tokens of a training step.
    pub fn tokens(&self) -> usize {
        self.batch * self.length
    }

    /// For people.
    pub fn title(&self) -> String {
        format!("{} ({:.1}M)", self.name, self.config.parameter_count() as f64 / 1e6)
    }

    /// What the peers need to know to train it.
    pub fn training_request(&self, mode: &str) -> Value {
        json!({ "task": "train", "mode": mode, "model": self.config, "batch": self.batch, "length": self.length })
    }
}

fn llama(vocab_size: usize, hidden_size: usize, intermediate_size: usize, layers: usize, heads: usize, context: usize) -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Llama,
        vocab_size,
        hidden_size,
        intermediate_size,
        layers,
        heads,
        kv_heads: heads,
        head_dim: hidden_size / heads,
        context,
        positions: Positions::Rope,
        rope_theta: 10_000.0,
        rope_scaling: None,
        norm_eps: 1e-6,
        tie_embeddings: false,
        style: BlockStyle::default(),
    }
}

/// `rows` sequences of `width` random tokens, none of which is 0 or 1.
pub fn random_ids(purpose: &str, vocab_size: usize, rows: usize, width: usize) -> Vec<Vec<u32>> {
    let row = |row: usize| {
        let mut rng = CounterRng::new(1, purpose, 0, row as u64);
        (0..width).map(|_| 2 + rng.below(vocab_size as u64 - 2) as u32).collect()
    };
    (0..rows).map(row).collect()
}
