//! Adapters (LoRA) in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

use rlflow_api::ModelConfig;
use serde_json::{Map, Value, json};

use crate::{HfError, Role, config::pretty, error::listed};

/// Says what an adapter is.
pub const ADAPTER_CONFIG: &str = "adapter_config.json";
/// Holds its factors.
pub const ADAPTER_MODEL: &str = "adapter_model.safetensors";
/// Widest adapter that is taken for a real one.
const MAX_RANK: u64 = 65_536;

/// What PEFT calls a trained tensor (`model.layers.0.self_attn.q_proj.lora_A.weight`, `score.weight`) of families whose files have rlflow's names.
pub fn tensor_name(name: &str) -> String {
    format!("base_model.model.{name}")
}

/// Whether PEFT's adapters of such a model are those of rlflow.
pub fn is_alike(model: &ModelConfig) -> bool {
    model.architecture != rlflow_api::Architecture::Gpt2
}

/// An adapter as its config describes it.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterConfig {
    /// What the model with it is for.
    pub role: Role,
    /// Width.
    pub rank: usize,
    /// Numerator of the factor on what is added; the denominator is the rank.
    pub alpha: f64,
    /// Dropout in training.
    pub dropout: f64,
    /// Names of the projections that have one. Read: as far as the config lists them.
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
    // Blocks are called `layers` in all families.
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
        let (mut rank, mut alpha, mut dropout, mut scaled_by_root) = (8, 8.0, 0.0, false);
        let (mut target_modules, mut layers) = (Vec::new(), None);
        for (key, value) in &object {
            match (key.as_str(), value) {
                (_, Value::Null | Value::Bool(false)) => {}
                ("peft_type", _) => {}
                ("r", value) => match value.as_u64().filter(|rank| (1..=MAX_RANK).contains(rank)) {
                    Some(found) => rank = found as usize,
                    None => problems.push(cannot(key, value)),
                },
                ("lora_alpha", value) => match value.as_f64().filter(|alpha| alpha.is_finite() && *alpha > 0.0) {
                    Some(found) => alpha = found,
                    None => problems.push(cannot(key, value)),
                },
                ("lora_dropout", value) => match value.as_f64().filter(|dropout| (0.0..1.0).contains(dropout)) {
                    Some(found) => dropout = found,
                    None => problems.push(cannot(key, value)),
                },
                ("use_rslora", Value::Bool(true)) => scaled_by_root = true,
                ("bias", Value::String(bias)) if bias == "none" => {}
                ("init_lora_weights", Value::Bool(_)) => {}
                ("init_lora_weights", Value::String(way)) if BEGINNINGS.contains(&way.as_str()) => {}
                // A pattern, or a word for all of them: which it means is seen in the file of tensors.
                ("target_modules", Value::String(_)) => {}
                ("target_modules", Value::Array(names)) => {
                    let last = |name: &Value| name.as_str().map(|name| name.rsplit('.').next().unwrap_or(name).to_owned());
                    target_modules = names.iter().filter_map(last).collect();
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
        if scaled_by_root {
            // arXiv:2312.03732: the denominator is the root of the rank.
            alpha *= (rank as f64).sqrt();
        }
        let base_model = given("base_model_name_or_path").and_then(Value::as_str).filter(|name| !name.is_empty()).map(str::to_owned);
        if problems.is_empty() { Ok(Self { role, rank, alpha, dropout, target_modules, layers, base_model }) } else { Err(problems) }
    }

    /// The content of `adapter_config.json`.
    pub fn to_json(&self) -> Vec<u8> {
        let Self { role, rank, alpha, dropout, ref target_modules, ref layers, ref base_model } = *self;
        // Where it is a whole number, as it mostly is, PEFT writes it as one.
        let alpha = if alpha.fract() == 0.0 && alpha < 1e15 { json!(alpha as u64) } else { json!(alpha) };
        let (task, saved) = match role {
            Role::Policy => ("CAUSAL_LM", Value::Null),
            // The head is trained too and stands in the file as a whole.
            Role::Reward | Role::Critic => ("SEQ_CLS", json!(HEADS)),
        };
        let config = json!({
            "base_model_name_or_path": base_model,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "layers_to_transform": layers,
            "lora_alpha": alpha,
            "lora_dropout": dropout,
            "modules_to_save": saved,
            "peft_type": "LORA",
            "r": rank,
            "target_modules": target_modules,
            "task_type": task,
            "use_dora": false,
            "use_rslora": false,
        });
        pretty(&serde_json::from_value::<Map<String, Value>>(config).unwrap_or_default())
    }
}

/// Names that PEFT has for a head which is trained beside an adapter.
const HEADS: [&str; 2] = ["classifier", "score"];
