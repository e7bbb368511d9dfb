//! LoRA (arXiv:2106.09685): instead of a projection's weight W, two narrow matrices are trained, and the projection is
//! `x W^T + alpha / rank * dropout(x) A^T B^T`. Names and defaults are PEFT's.

use rlflow_api::{CounterRng, ModelConfig, Problem};
use rlflow_kernels::{
    LowRank,
    matmul::{Into, MatrixRef, matmul_scaled},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parameters::{ParameterSpec, SCORE_WEIGHT, Slots};

/// A projection of every block, as Llama checkpoints name it. GPT-2's `c_attn` is the first three, its `c_proj` are `o_proj` and
/// `down_proj`, and its `c_fc` is `up_proj`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum TargetModule {
    QProj,
    KProj,
    VProj,
    OProj,
    GateProj,
    UpProj,
    DownProj,
}

impl TargetModule {
    /// All of them.
    pub const ALL: [Self; 7] = [Self::QProj, Self::KProj, Self::VProj, Self::OProj, Self::GateProj, Self::UpProj, Self::DownProj];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::QProj => "q_proj",
            Self::KProj => "k_proj",
            Self::VProj => "v_proj",
            Self::OProj => "o_proj",
            Self::GateProj => "gate_proj",
            Self::UpProj => "up_proj",
            Self::DownProj => "down_proj",
        }
    }

    /// The module that a weight (`model.layers.0.self_attn.q_proj.weight`) belongs to.
    pub fn of(weight: &str) -> Option<Self> {
        let stem = weight.strip_suffix(".weight")?.rsplit_once('.')?.1;
        Self::ALL.into_iter().find(|module| module.name() == stem)
    }

    /// Whether models of this shape have it.
    pub const fn is_in(self, config: &ModelConfig) -> bool {
        !(matches!(self, Self::GateProj) && config.style.plain_mlp)
    }
}

/// The word `all-linear`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum AllLinear {
    /// Every projection of every block.
    #[serde(rename = "all-linear")]
    AllLinear,
}

/// Which projections get an adapter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum TargetModules {
    /// Every one.
    All(AllLinear),
    /// Those named.
    Named(Vec<TargetModule>),
}

impl TargetModules {
    /// Every projection.
    pub const ALL: Self = Self::All(AllLinear::AllLinear);
}

impl Default for TargetModules {
    /// PEFT's for Llama, Mistral and Qwen.
    fn default() -> Self {
        Self::Named(vec![TargetModule::QProj, TargetModule::VProj])
    }
}

/// The `lora` table of a trainer: low-rank adapters are trained beside weights that stay as they are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LoraSettings {
    /// Width of the adapters (PEFT's `r`).
    #[schemars(range(min = 1, max = 65_536))]
    pub rank: usize,
    /// What adapters add counts `alpha / rank` times.
    #[schemars(extend("exclusiveMinimum" = 0.0))]
    pub alpha: f64,
    /// Chance that an element of what an adapter sees is dropped in training. The model below has none.
    #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1.0))]
    pub dropout: f64,
    /// Projections that get one: a list of `q_proj`, `k_proj`, `v_proj`, `o_proj`, `gate_proj`, `up_proj` and `down_proj`, or
    /// `"all-linear"` for all of them.
    pub target_modules: TargetModules,
}

impl Default for LoraSettings {
    fn default() -> Self {
        Self { rank: 8, alpha: 8.0, dropout: 0.0, target_modules: TargetModules::default() }
    }
}

impl LoraSettings {
    /// Spells lists of the same modules alike.
    pub fn normalise(&mut self) {
        if let TargetModules::Named(modules) = &mut self.target_modules {
            modules.sort();
            modules.dedup();
            if modules.len() == TargetModule::ALL.len() {
                self.target_modules = TargetModules::ALL;
            }
        }
    }

    /// What is wrong with it by itself; `prefix` is the table's name.
    pub fn check(&self, prefix: &str) -> Vec<Problem> {
        match &self.target_modules {
            TargetModules::Named(modules) if modules.is_empty() => {
                let message = "`target_modules` is empty: nothing would be trained";
                vec![
                    Problem::new("out_of_range", format!("{prefix}.target_modules"), message)
                        .hint("PEFT's default: [\"q_proj\", \"v_proj\"]"),
                ]
            }
            _ => Vec::new(),
        }
    }

    /// What is wrong with it for a model of this shape.
    pub fn check_model(&self, prefix: &str, config: &ModelConfig) -> Vec<Problem> {
        let TargetModules::Named(modules) = &self.target_modules else { return Vec::new() };
        let missing = modules.iter().filter(|module| !module.is_in(config));
        missing
            .map(|module| {
                let known: Vec<&str> =
                    TargetModule::ALL.into_iter().filter(|module| module.is_in(config)).map(TargetModule::name).collect();
                let message = format!("the model has no `{}`", module.name());
                Problem::new("unknown_module", format!("{prefix}.target_modules"), message).hint(format!("it has {}", known.join(", ")))
            })
            .collect()
    }

    /// The projections that get an adapter in a model of this shape.
    pub fn targets(&self, config: &ModelConfig) -> Vec<TargetModule> {
        let there = |module: &TargetModule| module.is_in(config);
        match &self.target_modules {
            TargetModules::All(_) => TargetModule::ALL.into_iter().filter(there).collect(),
            TargetModules::Named(modules) => modules.iter().copied().filter(there).collect(),
        }
    }

    /// Whether the weight called `name` gets an adapter.
    pub fn adapts(&self, name: &str) -> bool {
        let Some(module) = TargetModule::of(name) else { return false };
        match &self.target_modules {
            TargetModules::All(_) => true,
            TargetModules::Named(modules) => modules.contains(&module),
        }
    }

    /// Factor on what adapters add.
    pub fn scale(&self) -> f64 {
        self.alpha / self.rank as f64
    }

    /// Names and shapes of the two factors for the weight `spec`, if it gets an adapter: A `[rank, in]` and B `[out, rank]`.
    pub fn factors(&self, spec: &ParameterSpec) -> Option<LowRank<ParameterSpec>> {
        let stem = spec.name.strip_suffix(".weight").filter(|_| self.adapts(&spec.name))?;
        let [out, columns] = spec.shape[..] else { return None };
        let factor = |name: &str, shape: [usize; 2]| ParameterSpec { name: format!("{stem}.{name}.weight"), shape: shape.to_vec() };
        Some(LowRank { a: factor(FACTOR_A, [self.rank, columns]), b: factor(FACTOR_B, [out, self.rank]), scale: self.scale() as f32 })
    }

    /// The factors of all weights in `specs`, in their order, A before B; `slots` learns where they will stand when they
    /// follow `specs`.
    pub fn extend(&self, specs: &mut Vec<ParameterSpec>, slots: &mut Slots) {
        let bare = specs.clone();
        let mut add = |weight: usize| {
            let factors = self.factors(&bare[weight])?;
            Some(factors.map(|spec| {
                specs.push(spec.clone());
                specs.len() - 1
            }))
        };
        for block in &mut slots.blocks {
            let (attention, mlp) = (&mut block.attention, &mut block.mlp);
            let projections = [&mut attention.q, &mut attention.k, &mut attention.v, &mut attention.o].into_iter();
            for part in projections.chain(mlp.gate.as_mut()).chain([&mut mlp.up, &mut mlp.down]) {
                part.low_rank = add(part.weight);
            }
        }
    }

    /// Number of elements of all adapters of a model of this shape.
    pub fn parameter_count(&self, config: &ModelConfig) -> u64 {
        let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
        let (query, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let width = |module: &TargetModule| match module {
            TargetModule::QProj | TargetModule::OProj => hidden + query,
            TargetModule::KProj | TargetModule::VProj => hidden + kv,
            TargetModule::GateProj | TargetModule::UpProj | TargetModule::DownProj => hidden + intermediate,
        };
        let widths: usize = self.targets(config).iter().map(width).sum();
        (config.layers * self.rank) as u64 * widths as u64
    }
}

const FACTOR_A: &str = "lora_A";
const FACTOR_B: &str = "lora_B";

/// Whether a weight is a factor of an adapter.
pub fn is_factor(name: &str) -> bool {
    [FACTOR_A, FACTOR_B].iter().any(|factor| name.strip_suffix(".weight").is_some_and(|stem| stem.ends_with(factor)))
}

/// Whether a weight is trained where there is an adapter: a factor of it, or the scalar head, which PEFT trains too.
pub fn is_trained(name: &str) -> bool {
    is_factor(name) || name == SCORE_WEIGHT
}

/// A fresh factor, as PEFT begins: A uniform within `1 / sqrt(in)` (Kaiming's with `a = sqrt(5)`), B zero, so that the model
/// begins as it is. One stream of draws per factor, named after it.
pub fn initial(spec: &ParameterSpec, seed: u64) -> Vec<f32> {
    if !spec.name.ends_with("lora_A.weight") {
        return vec![0.0; spec.len()];
    }
    let bound = 1.0 / (spec.shape[1] as f64).sqrt();
    let mut rng = CounterRng::new(seed, &format!("init/{}", spec.name), 0, 0);
    (0..spec.len()).map(|_| ((2.0 * rng.uniform() - 1.0) * bound) as f32).collect()
}

/// `weight += scale * b a`.
///
/// # Shapes
/// - weight: `[out, in]`; a: `[rank, in]`; b: `[out, rank]`
pub fn merge(weight: &mut [f32], factors: LowRank<&[f32]>, rank: usize) {
    let (out, columns) = (factors.b.len() / rank, factors.a.len() / rank);
    let (a, b) = (MatrixRef::new(factors.a, rank, columns), MatrixRef::new(factors.b, out, rank));
    matmul_scaled(weight, columns, b, a, factors.scale, Into::Add);
}
