//! Adapters (LoRA) in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

use std::collections::BTreeMap;

use rlflow_api::Architecture;
use serde_json::{Map, Value, json};

use crate::{FileTensor, HfError, Role, WantedTensor, config::pretty, error::listed, names::file_name};

/// Says what an adapter is.
pub const ADAPTER_CONFIG: &str = "adapter_config.json";
/// Holds its factors.
pub const ADAPTER_MODEL: &str = "adapter_model.safetensors";
/// Widest adapter that is taken for a real one.
const MAX_RANK: u64 = 65_536;

/// What names of tensors begin with.
pub const PREFIX: &str = "base_model.model.";

/// The module that holds a weight: `model.layers.0.self_attn.q_proj`; of GPT-2 `transformer.h.0.attn.c_attn`, which holds three.
pub fn module_path(architecture: Architecture, weight: &str) -> String {
    let name = file_name(architecture, weight);
    name.strip_suffix(".weight").map(str::to_owned).unwrap_or(name)
}

/// What a config calls the modules of all blocks that are like the one at `path`: `q_proj`; of GPT-2, whose `c_proj` are two, `attn.c_proj`.
pub fn module_name(architecture: Architecture, path: &str) -> &str {
    let parts = if architecture == Architecture::Gpt2 { 2 } else { 1 };
    path.rmatch_indices('.').nth(parts - 1).map_or(path, |(dot, _)| &path[dot + 1..])
}

/// Whether a config means the module at `path` by `name`: that is its path, or how that ends.
pub fn is_called(path: &str, name: &str) -> bool {
    path.strip_suffix(name).is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

/// What PEFT calls a trained tensor (`model.layers.0.self_attn.q_proj.lora_A.weight`, `score.weight`).
pub fn tensor_name(architecture: Architecture, name: &str) -> String {
    match name.split_once(".lora_") {
        Some((stem, factor)) => format!("{PREFIX}{}.lora_{factor}", module_path(architecture, &format!("{stem}.weight"))),
        None => format!("{PREFIX}{}", file_name(architecture, name)),
    }
}

/// The tensors of a file that hold `wanted`, trained tensors in the order of the weights. Projections in one module have one A, and their Bs
/// one above the other.
pub fn file_tensors(architecture: Architecture, wanted: &[WantedTensor]) -> Vec<FileTensor> {
    let mut tensors: Vec<FileTensor> = Vec::with_capacity(wanted.len());
    for weight in wanted {
        let name = tensor_name(architecture, &weight.name);
        match tensors.iter_mut().rev().take(2).find(|tensor| tensor.name == name) {
            Some(tensor) => {
                if name.ends_with(".lora_B.weight") {
                    tensor.shape[0] += weight.shape[0];
                }
                tensor.parts.push(weight.clone());
            }
            None => tensors.push(FileTensor { name, shape: weight.shape.clone(), transposed: false, parts: vec![weight.clone()] }),
        }
    }
    tensors
}

/// An adapter as its config describes it.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterConfig {
    /// What the model with it is for.
    pub role: Role,
    /// Width, where `ranks` says nothing else.
    pub rank: usize,
    /// Widths of modules by name.
    pub ranks: BTreeMap<String, usize>,
    /// Numerator of the factor on what is added, where `alphas` says nothing else.
    pub alpha: f64,
    /// Numerators of modules by name.
    pub alphas: BTreeMap<String, f64>,
    /// Whether the denominator is the root of the rank (arXiv:2312.03732) rather than the rank.
    pub scaled_by_root: bool,
    /// Whether the weights below are stored as `[in, out]`.
    pub transposed: bool,
    /// Dropout in training.
    pub dropout: f64,
    /// Names or paths of the modules that have one. Read: as far as the config lists them.
    pub target_modules: Vec<String>,
    /// Numbers of the blocks that have one; all of them without.
    pub layers: Option<Vec<u64>>,
    /// The model that it was trained on, as whoever trained it called that.
    pub base_model: Option<String>,
}

/// Keys that say nothing about what an adapter computes.
const HARMLESS: &[&str] = &[
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    // No family has two lists of blocks.
    "layers_pattern",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
];

/// Ways to begin that leave the weights below as they are.
const BEGINNINGS: &[&str] = &["gaussian", "eva", "orthogonal"];

impl AdapterConfig {
    /// Parses `adapter_config.json`. A key that is not known here may change what the adapter computes, so it must say that it does not.
    ///
    /// # Errors
    /// Everything in it that cannot be used.
    pub fn parse(content: &[u8]) -> Result<Self, Vec<HfError>> {
        let error = |message: String| HfError::new(ADAPTER_CONFIG, message);
        let object: Map<String, Value> =
            serde_json::from_slice(content).map_err(|problem| vec![error(format!("not a JSON object: {problem}"))])?;
        let given = |key: &str| object.get(key).filter(|value| !value.is_null());
        let mut problems = Vec::new();
        let cannot = |key: &str, value: &Value| error(format!("`{key}` is {value}, which rlflow cannot compute"));

        match given("peft_type").and_then(Value::as_str) {
            Some("LORA") => {}
            _ => problems.push(cannot("peft_type", given("peft_type").unwrap_or(&Value::Null))),
        }
        let role = match given("task_type").and_then(Value::as_str) {
            Some("SEQ_CLS") => Role::Reward,
            _ => Role::Policy,
        };
        let (mut rank, mut alpha, mut dropout, mut scaled_by_root, mut transposed) = (8, 8.0, 0.0, false, false);
        let (mut ranks, mut alphas) = (BTreeMap::new(), BTreeMap::new());
        let (mut target_modules, mut layers) = (Vec::new(), None);
        let rank_of = |value: &Value| value.as_u64().filter(|rank| (1..=MAX_RANK).contains(rank)).map(|rank| rank as usize);
        let alpha_of = |value: &Value| value.as_f64().filter(|alpha| alpha.is_finite() && *alpha > 0.0);
        for (key, value) in &object {
            match (key.as_str(), value) {
                (_, Value::Null | Value::Bool(false)) => {}
                ("peft_type", _) => {}
                ("r", value) => match rank_of(value) {
                    Some(found) => rank = found,
                    None => problems.push(cannot(key, value)),
                },
                ("lora_alpha", value) => match alpha_of(value) {
                    Some(found) => alpha = found,
                    None => problems.push(cannot(key, value)),
                },
                ("rank_pattern", Value::Object(values)) => match by_name(values, rank_of) {
                    Some(found) => ranks = found,
                    None => problems.push(cannot(key, value)),
                },
                ("alpha_pattern", Value::Object(values)) => match by_name(values, alpha_of) {
                    Some(found) => alphas = found,
                    None => problems.push(cannot(key, value)),
                },
                ("lora_dropout", value) => match value.as_f64().filter(|dropout| (0.0..1.0).contains(dropout)) {
                    Some(found) => dropout = found,
                    None => problems.push(cannot(key, value)),
                },
                ("use_rslora", Value::Bool(true)) => scaled_by_root = true,
                // PEFT looks at the model below to see whether it is so.
                ("fan_in_fan_out", Value::Bool(true)) => transposed = true,
                ("bias", Value::String(bias)) if bias == "none" => {}
                ("init_lora_weights", Value::Bool(_)) => {}
                ("init_lora_weights", Value::String(way)) if BEGINNINGS.contains(&way.as_str()) => {}
                // A pattern, or a word for all of them: which it means is seen in the file of tensors.
                ("target_modules", Value::String(_)) => {}
                ("target_modules", Value::Array(names)) => {
                    target_modules = names.iter().filter_map(Value::as_str).map(str::to_owned).collect();
                    target_modules.sort();
                    target_modules.dedup();
                }
                ("layers_to_transform", value) => {
                    let numbers = value.as_array().map_or_else(|| vec![value.as_u64()], |list| list.iter().map(Value::as_u64).collect());
                    match numbers.into_iter().collect::<Option<Vec<u64>>>() {
                        Some(numbers) => layers = Some(numbers),
                        None => problems.push(cannot(key, value)),
                    }
                }
                ("modules_to_save", Value::Array(names)) => {
                    let others: Vec<&str> =
                        names.iter().filter_map(Value::as_str).filter(|name| role == Role::Policy || !HEADS.contains(name)).collect();
                    if !others.is_empty() {
                        problems.push(error(format!("it replaces {} of the model below (`modules_to_save`)", listed(others))).hint(
                            "merge it into its base (`merge_and_unload()` in PEFT) and import the result: rlflow's adapters replace a scalar head only",
                        ));
                    }
                }
                (_, Value::Array(values)) if values.is_empty() => {}
                (_, Value::Object(values)) if values.is_empty() => {}
                (key, _) if HARMLESS.contains(&key) => {}
                (key, value) => problems.push(cannot(key, value)),
            }
        }
        let base_model = given("base_model_name_or_path").and_then(Value::as_str).filter(|name| !name.is_empty()).map(str::to_owned);
        if !problems.is_empty() {
            return Err(problems);
        }
        Ok(Self { role, rank, ranks, alpha, alphas, scaled_by_root, transposed, dropout, target_modules, layers, base_model })
    }

    /// Width of the adapter on the module at `path`, and the numerator of the factor on what it adds, whose denominator is that width.
    pub fn size(&self, path: &str) -> (usize, f64) {
        let rank = self.ranks.iter().find(|(name, _)| is_called(path, name)).map_or(self.rank, |(_, rank)| *rank);
        let alpha = self.alphas.iter().find(|(name, _)| is_called(path, name)).map_or(self.alpha, |(_, alpha)| *alpha);
        (rank, if self.scaled_by_root { alpha * (rank as f64).sqrt() } else { alpha })
    }

    /// The content of `adapter_config.json`.
    pub fn to_json(&self) -> Vec<u8> {
        // Where it is a whole number, as it mostly is, PEFT writes it as one.
        let alpha = |alpha: f64| if alpha.fract() == 0.0 && alpha < 1e15 { json!(alpha as u64) } else { json!(alpha) };
        let alphas: Map<String, Value> = self.alphas.iter().map(|(name, value)| (name.clone(), alpha(*value))).collect();
        let (task, saved) = match self.role {
            Role::Policy => ("CAUSAL_LM", Value::Null),
            // The head is trained too and stands in the file as a whole.
            Role::Reward | Role::Critic => ("SEQ_CLS", json!(HEADS)),
        };
        let config = json!({
            "alpha_pattern": alphas,
            "base_model_name_or_path": self.base_model,
            "bias": "none",
            "fan_in_fan_out": self.transposed,
            "inference_mode": true,
            "init_lora_weights": true,
            "layers_to_transform": self.layers,
            "lora_alpha": alpha(self.alpha),
            "lora_dropout": self.dropout,
            "modules_to_save": saved,
            "peft_type": "LORA",
            "r": self.rank,
            "rank_pattern": self.ranks,
            "target_modules": self.target_modules,
            "task_type": task,
            "use_dora": false,
            "use_rslora": self.scaled_by_root,
        });
        pretty(&serde_json::from_value::<Map<String, Value>>(config).unwrap_or_default())
    }
}

/// Values of modules by name. PEFT takes regular expressions and the first that fits; rlflow takes names, of which no two fit one module.
fn by_name<T>(values: &Map<String, Value>, read: impl Fn(&Value) -> Option<T>) -> Option<BTreeMap<String, T>> {
    let is_plain = |name: &str| name.chars().all(|letter| letter.is_ascii_alphanumeric() || letter == '_' || letter == '.');
    let is_alone = |name: &str| !values.keys().any(|other| other != name && is_called(other, name));
    values.iter().map(|(name, value)| Some((name.clone(), read(value).filter(|_| is_plain(name) && is_alone(name))?))).collect()
}

/// Names that PEFT has for a head which is trained beside an adapter.
const HEADS: [&str; 2] = ["classifier", "score"];
