//! Adapters (LoRA) in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

use serde_json::{Map, Value, json};

use crate::{Role, config::pretty};

/// Says what an adapter is.
pub const ADAPTER_CONFIG: &str = "adapter_config.json";
/// Holds its factors.
pub const ADAPTER_MODEL: &str = "adapter_model.safetensors";

/// What PEFT calls a trained tensor (`model.layers.0.self_attn.q_proj.lora_A.weight`, `score.weight`) of families whose files have rlflow's names.
pub fn tensor_name(name: &str) -> String {
    format!("base_model.model.{name}")
}

/// An adapter as its config describes it.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterConfig<'a> {
    /// What the model below is for.
    pub role: Role,
    /// Width.
    pub rank: usize,
    /// Numerator of the factor on what is added; the denominator is the rank.
    pub alpha: f64,
    /// Dropout in training.
    pub dropout: f64,
    /// Names of the projections that have one.
    pub target_modules: Vec<&'a str>,
}

impl AdapterConfig<'_> {
    /// The content of `adapter_config.json`.
    pub fn to_json(&self) -> Vec<u8> {
        let Self { role, rank, alpha, dropout, ref target_modules } = *self;
        // Where it is a whole number, as it mostly is, PEFT writes it as one.
        let alpha = if alpha.fract() == 0.0 && alpha < 1e15 { json!(alpha as u64) } else { json!(alpha) };
        let (task, saved) = match role {
            Role::Policy => ("CAUSAL_LM", Value::Null),
            // The head is trained too and stands in the file as a whole.
            Role::Reward | Role::Critic => ("SEQ_CLS", json!(["classifier", "score"])),
        };
        let config = json!({
            "base_model_name_or_path": null,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
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
