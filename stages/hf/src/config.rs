//! `config.json`: read as a [`ModelConfig`] and written from one.

use rlflow_api::{Architecture, ArtifactType, BlockStyle, Dtype, ModelConfig, Positions, RopeScaling};
use serde_json::{Map, Value, json};

use crate::HfError;

/// Name of the file.
pub const CONFIG: &str = "config.json";
/// Says what a model with a scalar head is: transformers knows only one kind.
const ROLE_KEY: &str = "rlflow_type";
/// Longest context that is taken for a real one, in tokens: tables of that length are made.
const MAX_CONTEXT: u64 = 1 << 22;
/// Most blocks.
const MAX_LAYERS: u64 = 10_000;
/// Largest of all other sizes.
const MAX_SIZE: u64 = 1 << 22;

/// What a checkpoint is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// `*ForCausalLM`: next-token distribution.
    Policy,
    /// `*ForSequenceClassification` with one label: a score per sequence.
    Reward,
    /// The same, trained to predict returns.
    Critic,
}

impl Role {
    /// The artifact type of such a model.
    pub const fn artifact_type(self) -> ArtifactType {
        match self {
            Self::Policy => ArtifactType::Policy,
            Self::Reward => ArtifactType::Reward,
            Self::Critic => ArtifactType::Critic,
        }
    }

    /// The role of an artifact type, if it is one of a model.
    pub fn of(artifact_type: &str) -> Option<Self> {
        [Self::Policy, Self::Reward, Self::Critic].into_iter().find(|role| role.artifact_type().name() == artifact_type)
    }
}

/// A family: its classes in transformers, and its `model_type`.
struct Family {
    architecture: Architecture,
    model_type: &'static str,
    causal: &'static str,
    classifier: &'static str,
}

const FAMILIES: &[Family] = &[
    Family {
        architecture: Architecture::Llama,
        model_type: "llama",
        causal: "LlamaForCausalLM",
        classifier: "LlamaForSequenceClassification",
    },
    Family {
        architecture: Architecture::Mistral,
        model_type: "mistral",
        causal: "MistralForCausalLM",
        classifier: "MistralForSequenceClassification",
    },
    Family {
        architecture: Architecture::Qwen2,
        model_type: "qwen2",
        causal: "Qwen2ForCausalLM",
        classifier: "Qwen2ForSequenceClassification",
    },
    Family {
        architecture: Architecture::Qwen3,
        model_type: "qwen3",
        causal: "Qwen3ForCausalLM",
        classifier: "Qwen3ForSequenceClassification",
    },
    Family { architecture: Architecture::Gpt2, model_type: "gpt2", causal: "GPT2LMHeadModel", classifier: "GPT2ForSequenceClassification" },
];

/// A `config.json` as far as rlflow understands it.
#[derive(Debug, Clone, PartialEq)]
pub struct HfConfig {
    /// Shape of the network.
    pub model: ModelConfig,
    /// What it is for.
    pub role: Role,
}

impl HfConfig {
    /// Parses the file. `context` shortens the longest sequence.
    ///
    /// # Errors
    /// Everything in it that cannot be used.
    pub fn parse(content: &[u8], context: Option<usize>) -> Result<Self, Vec<HfError>> {
        let bad = |message: String| vec![HfError::new(CONFIG, message)];
        let value: Value = serde_json::from_slice(content).map_err(|error| bad(format!("not valid JSON: {error}")))?;
        let Value::Object(object) = value else { return Err(bad("it is not an object".into())) };
        let (family, role) = family(&object).map_err(|error| vec![error])?;
        let mut reader = Reader { object: &object, context, problems: Vec::new() };
        let mut model = match family.architecture {
            Architecture::Gpt2 => reader.gpt2(),
            architecture => reader.llama_like(architecture),
        };
        reader.head(role);
        reader.limits(&model);
        if let Some(context) = context.filter(|context| *context != model.context) {
            if context > model.context {
                let message = format!("`context` is {context} tokens, and the checkpoint is made for {}", model.context);
                reader.problems.push(HfError::new(CONFIG, message));
            } else if model.positions == Positions::Learned {
                let message = format!(
                    "the checkpoint has one trained vector for each of its {} positions: `context` cannot change that",
                    model.context
                );
                reader.problems.push(HfError::new(CONFIG, message).hint("leave `context` out"));
            }
            model.context = context;
        }
        // A window as long as the context hides nothing.
        model.style.sliding_window = model.style.sliding_window.filter(|window| *window < model.context);
        if reader.problems.is_empty() { Ok(Self { model, role }) } else { Err(reader.problems) }
    }
}

fn family(object: &Map<String, Value>) -> Result<(&'static Family, Role), HfError> {
    let known = || {
        let names: Vec<&str> = FAMILIES.iter().flat_map(|family| [family.causal, family.classifier]).collect();
        format!("rlflow knows {}", names.join(", "))
    };
    if let Some(quantisation) = object.get("quantization_config").filter(|value| !value.is_null()) {
        let method = quantisation.get("quant_method").and_then(Value::as_str).unwrap_or("an unnamed method");
        let error = HfError::new(CONFIG, format!("its weights are quantised ({method}); only fp32, bf16 and fp16 are read"));
        return Err(error.hint("import the checkpoint that it was made from"));
    }
    let critic = object.get(ROLE_KEY).and_then(Value::as_str) == Some(ArtifactType::Critic.name());
    let scalar = if critic { Role::Critic } else { Role::Reward };
    let Some(names) = object.get("architectures").and_then(Value::as_array).filter(|names| !names.is_empty()) else {
        let model_type = object.get("model_type").and_then(Value::as_str);
        let family = FAMILIES.iter().find(|family| Some(family.model_type) == model_type);
        return family.map(|family| (family, Role::Policy)).ok_or_else(|| {
            let message = match model_type {
                Some(model_type) => format!("models of type `{model_type}` are unknown"),
                None => "it says neither `architectures` nor `model_type`".into(),
            };
            HfError::new(CONFIG, message).hint(known())
        });
    };
    for name in names.iter().filter_map(Value::as_str) {
        for family in FAMILIES {
            if name == family.causal {
                return Ok((family, Role::Policy));
            }
            if name == family.classifier {
                return Ok((family, scalar));
            }
        }
    }
    let shown: Vec<String> = names.iter().map(|name| name.as_str().map_or_else(|| name.to_string(), str::to_owned)).collect();
    Err(HfError::new(CONFIG, format!("architecture `{}` is unknown", shown.join("`, `"))).hint(known()))
}

/// Reads keys and collects what is wrong with them.
struct Reader<'a> {
    object: &'a Map<String, Value>,
    /// Longest sequence that is asked for.
    context: Option<usize>,
    problems: Vec<HfError>,
}

impl Reader<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    fn problem(&mut self, message: String) {
        self.problems.push(HfError::new(CONFIG, message));
    }

    /// A size; `default` where the key is not there. Without either it is a problem.
    fn size(&mut self, key: &str, default: Option<u64>, most: u64) -> usize {
        let value = match (self.get(key), default) {
            (Some(value), _) => value.as_u64().ok_or_else(|| value.to_string()),
            (None, Some(default)) => Ok(default),
            (None, None) => {
                self.problem(format!("`{key}` is missing"));
                return 1;
            }
        };
        match value {
            Ok(size) if (1..=most).contains(&size) => size as usize,
            Ok(size) => {
                self.problem(format!("`{key}` is {size}; it must be from 1 to {most}"));
                1
            }
            Err(found) => {
                self.problem(format!("`{key}` must be a whole number, found {found}"));
                1
            }
        }
    }

    /// A number above 0.
    fn positive(&mut self, from: &Map<String, Value>, key: &str, default: Option<f64>) -> f64 {
        match (from.get(key).filter(|value| !value.is_null()), default) {
            (Some(value), _) if value.as_f64().is_some_and(|number| number.is_finite() && number > 0.0) => value.as_f64().unwrap_or(1.0),
            (Some(value), _) => {
                self.problem(format!("`{key}` must be a number above 0, found {value}"));
                1.0
            }
            (None, Some(default)) => default,
            (None, None) => {
                self.problem(format!("`{key}` is missing"));
                1.0
            }
        }
    }

    fn flag(&mut self, key: &str, default: bool) -> bool {
        match self.get(key) {
            None => default,
            Some(Value::Bool(flag)) => *flag,
            Some(value) => {
                let message = format!("`{key}` must be true or false, found {value}");
                self.problem(message);
                default
            }
        }
    }

    /// Only one value of a setting is understood.
    fn only(&mut self, key: &str, understood: &[Value]) {
        if let Some(value) = self.get(key).filter(|value| !understood.contains(value)) {
            let known: Vec<String> = understood.iter().map(Value::to_string).collect();
            let message = format!("`{key}` is {value}, which rlflow cannot compute; it knows {}", known.join(" and "));
            self.problem(message);
        }
    }

    fn llama_like(&mut self, architecture: Architecture) -> ModelConfig {
        let (hidden_size, heads) = (self.size("hidden_size", None, MAX_SIZE), self.size("num_attention_heads", None, MAX_SIZE));
        // Defaults are those of the config's class in transformers.
        let kv_default = if architecture == Architecture::Mistral && !self.object.contains_key("num_key_value_heads") { 8 } else { heads };
        let kv_heads = self.size("num_key_value_heads", Some(kv_default as u64), MAX_SIZE);
        let head_default = match architecture {
            Architecture::Qwen3 if !self.object.contains_key("head_dim") => 128,
            _ => hidden_size / heads,
        };
        let head_dim = self.size("head_dim", Some(head_default as u64), MAX_SIZE);
        if !heads.is_multiple_of(kv_heads) {
            self.problem(format!("`num_key_value_heads` = {kv_heads} does not divide `num_attention_heads` = {heads}"));
        }
        if !head_dim.is_multiple_of(2) {
            self.problem(format!("rotary positions turn pairs, and `head_dim` = {head_dim} is odd"));
        }
        self.only("hidden_act", &[json!("silu"), json!("swish")]);
        let mut style = architecture.style();
        if matches!(architecture, Architecture::Llama | Architecture::Qwen3) {
            let bias = self.flag("attention_bias", false);
            (style.qkv_bias, style.output_bias) = (bias, bias);
        }
        if architecture == Architecture::Llama {
            style.mlp_bias = self.flag("mlp_bias", false);
        }
        let context = self.size("max_position_embeddings", None, MAX_CONTEXT);
        let layers = self.size("num_hidden_layers", None, MAX_LAYERS);
        style.sliding_window = self.window(architecture, layers, context);
        let (rope_theta, rope_scaling) = self.rope();
        ModelConfig {
            architecture,
            vocab_size: self.size("vocab_size", None, MAX_SIZE),
            hidden_size,
            intermediate_size: self.size("intermediate_size", None, MAX_SIZE),
            layers,
            heads,
            kv_heads,
            head_dim,
            context,
            positions: Positions::Rope,
            rope_theta,
            rope_scaling,
            norm_eps: self.positive(self.object, "rms_norm_eps", Some(1e-6)),
            tie_embeddings: self.flag("tie_word_embeddings", false),
            style,
        }
    }

    fn gpt2(&mut self) -> ModelConfig {
        let (hidden_size, heads) = (self.size("n_embd", None, MAX_SIZE), self.size("n_head", None, MAX_SIZE));
        if hidden_size % heads != 0 {
            self.problem(format!("`n_head` = {heads} does not divide `n_embd` = {hidden_size}"));
        }
        // All three are the tanh form.
        self.only("activation_function", &[json!("gelu_new"), json!("gelu_pytorch_tanh"), json!("gelu_fast")]);
        self.only("scale_attn_weights", &[json!(true)]);
        self.only("scale_attn_by_inverse_layer_idx", &[json!(false)]);
        self.only("add_cross_attention", &[json!(false)]);
        ModelConfig {
            architecture: Architecture::Gpt2,
            vocab_size: self.size("vocab_size", None, MAX_SIZE),
            hidden_size,
            intermediate_size: self.size("n_inner", Some(4 * hidden_size as u64), MAX_SIZE),
            layers: self.size("n_layer", None, MAX_LAYERS),
            heads,
            kv_heads: heads,
            head_dim: (hidden_size / heads).max(1),
            context: self.size("n_positions", None, MAX_CONTEXT),
            positions: Positions::Learned,
            rope_theta: 10_000.0,
            rope_scaling: None,
            norm_eps: self.positive(self.object, "layer_norm_epsilon", Some(1e-5)),
            tie_embeddings: self.flag("tie_word_embeddings", true),
            style: Architecture::Gpt2.style(),
        }
    }

    /// Rotary base and scaling: `rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling` of 4.
    fn rope(&mut self) -> (f64, Option<RopeScaling>) {
        let new = self.get("rope_parameters").and_then(Value::as_object);
        let old = self.get("rope_scaling").and_then(Value::as_object);
        let empty = Map::new();
        let settings = new.or(old).unwrap_or(&empty).clone();
        let theta_from = if settings.contains_key("rope_theta") { &settings } else { self.object };
        let theta = self.positive(theta_from, "rope_theta", Some(10_000.0));
        for from in [&settings, self.object] {
            if from.get("partial_rotary_factor").and_then(Value::as_f64).is_some_and(|factor| factor != 1.0) {
                self.problem("`partial_rotary_factor` is not 1: rlflow turns whole heads only".into());
            }
        }
        let kind = settings.get("rope_type").or_else(|| settings.get("type")).and_then(Value::as_str).unwrap_or("default");
        let scaling = match kind {
            "default" if settings.values().any(Value::is_object) => {
                self.problem(
                    "its layers have different rotary frequencies (`rope_parameters` per layer type), which rlflow cannot compute".into(),
                );
                None
            }
            "yarn" => Some(self.yarn(&settings, theta)),
            "default" => None,
            // Stretches the base for what is longer than `max_position_embeddings` only, and no sequence here is.
            "dynamic" => {
                self.positive(&settings, "factor", None);
                None
            }
            "linear" => Some(RopeScaling::Linear { factor: self.positive(&settings, "factor", None) }),
            "llama3" => {
                let [factor, low_freq_factor, high_freq_factor, original] =
                    ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
                        .map(|key| self.positive(&settings, key, None));
                if original < 1.0 {
                    self.problem(format!("`original_max_position_embeddings` = {original} is less than a token"));
                }
                if low_freq_factor >= high_freq_factor {
                    self.problem(format!("`low_freq_factor` = {low_freq_factor} is not below `high_freq_factor` = {high_freq_factor}"));
                }
                Some(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings: original as u64 })
            }
            other => {
                self.problem(format!(
                    "rotary scaling of type `{other}` is unknown; rlflow knows `default`, `linear`, `dynamic`, `llama3` and `yarn`"
                ));
                None
            }
        };
        (theta, scaling)
    }

    /// YaRN, its defaults those of transformers.
    fn yarn(&mut self, settings: &Map<String, Value>, theta: f64) -> RopeScaling {
        let longest = self.get("max_position_embeddings").and_then(Value::as_f64).filter(|longest| *longest >= 1.0);
        let original = self.positive(settings, "original_max_position_embeddings", longest);
        let factor = self.positive(settings, "factor", longest.map(|longest| longest / original));
        let scale = |weight: f64| if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 };
        let given = |key: &str| settings.get(key).and_then(Value::as_f64).filter(|weight| *weight != 0.0);
        let attention_factor = match (given("mscale"), given("mscale_all_dim")) {
            (Some(mscale), Some(all)) => scale(mscale) / scale(all),
            _ => scale(1.0),
        };
        let attention_factor = self.positive(settings, "attention_factor", Some(attention_factor));
        let [beta_fast, beta_slow] =
            [("beta_fast", 32.0), ("beta_slow", 1.0)].map(|(key, default)| self.positive(settings, key, Some(default)));
        if beta_fast <= beta_slow {
            self.problem(format!("`beta_fast` = {beta_fast} is not above `beta_slow` = {beta_slow}"));
        }
        if original < 1.0 {
            self.problem(format!("`original_max_position_embeddings` = {original} is less than a token"));
        }
        if theta <= 1.0 {
            self.problem(format!("`rope_theta` = {theta} is not above 1"));
        }
        let truncate = match settings.get("truncate") {
            None | Some(Value::Null) => true,
            Some(Value::Bool(truncate)) => *truncate,
            Some(value) => {
                self.problem(format!("`truncate` must be true or false, found {value}"));
                true
            }
        };
        let original_max_position_embeddings = original as u64;
        RopeScaling::Yarn { factor, attention_factor, beta_fast, beta_slow, original_max_position_embeddings, truncate }
    }

    /// The window that all layers share, if any. Layers that differ are refused, unless the window hides nothing.
    fn window(&mut self, architecture: Architecture, layers: usize, context: usize) -> Option<usize> {
        let default = (!self.object.contains_key("sliding_window")).then_some(4096);
        match architecture {
            Architecture::Mistral => {}
            Architecture::Qwen2 | Architecture::Qwen3 if self.flag("use_sliding_window", false) => {}
            _ => return None,
        }
        let window = match (self.get("sliding_window"), default) {
            (Some(_), _) => self.size("sliding_window", None, u64::MAX >> 1),
            (None, default) => default?,
        };
        if architecture == Architecture::Mistral || window >= self.context.map_or(context, |asked| asked.min(context)) {
            return Some(window);
        }
        let full = match self.get("layer_types").and_then(Value::as_array) {
            Some(types) => types.iter().filter(|kind| kind.as_str() == Some("full_attention")).count(),
            None => self.get("max_window_layers").and_then(Value::as_u64).unwrap_or(28).min(layers as u64) as usize,
        };
        match full {
            0 => Some(window),
            full if full >= layers => None,
            _ => {
                let message =
                    format!("{full} of its {layers} layers see everything and the others {window} tokens, which rlflow cannot compute");
                self.problems.push(
                    HfError::new(CONFIG, message).hint(format!("with `context = {window}` or less on the stage the layers do not differ")),
                );
                None
            }
        }
    }

    /// A scalar head has one label.
    fn head(&mut self, role: Role) {
        if role == Role::Policy {
            return;
        }
        let named = self.get("id2label").and_then(Value::as_object).map(|labels| labels.len() as u64);
        let labels = named.or_else(|| self.get("num_labels").and_then(Value::as_u64)).unwrap_or(2);
        if labels != 1 {
            self.problems.push(
                HfError::new(CONFIG, format!("it classifies into {labels} labels; a reward model has one"))
                    .hint("see `num_labels` and `id2label`"),
            );
        }
    }

    /// Products of sizes that must stay countable.
    fn limits(&mut self, model: &ModelConfig) {
        let width = (model.heads.max(model.kv_heads) as u64).saturating_mul(model.head_dim as u64);
        if width > MAX_SIZE {
            self.problem(format!("{} heads of width {} are more than {MAX_SIZE} together", model.heads, model.head_dim));
        }
    }
}

/// Token ids that the file repeats from the tokenizer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TokenIds {
    /// Begins a text.
    pub bos: Option<u32>,
    /// Ends a turn.
    pub eos: Option<u32>,
    /// Fills rows, if the model has a row for it.
    pub pad: Option<u32>,
}

/// `config.json` for a model. `carried` is the one it was imported with, whose other keys are kept.
///
/// # Errors
/// If no family of transformers has such blocks.
pub fn write(model: &ModelConfig, role: Role, dtype: Dtype, ids: &TokenIds, carried: Option<&[u8]>) -> Result<Vec<u8>, HfError> {
    let family = FAMILIES.iter().find(|family| family.architecture == model.architecture);
    let family = family.ok_or_else(|| HfError::new(CONFIG, "the model's family has no class in transformers"))?;
    let before = carried.and_then(|content| serde_json::from_slice::<Map<String, Value>>(content).ok());
    let mut object = match &before {
        Some(object) => object.clone(),
        None => generated(family, model)?,
    };
    let class = if role == Role::Policy { family.causal } else { family.classifier };
    object.insert("architectures".into(), json!([class]));
    let dtype_key = if object.contains_key("dtype") { "dtype" } else { "torch_dtype" };
    let dtype = match dtype {
        Dtype::Bf16 => "bfloat16",
        Dtype::F16 => "float16",
        _ => "float32",
    };
    object.insert(dtype_key.into(), dtype.into());
    // What the checkpoint said stays: its lists of several EOS tokens, say.
    for (key, id) in [("bos_token_id", ids.bos), ("eos_token_id", ids.eos), ("pad_token_id", ids.pad)] {
        if let Some(id) = id
            && object.get(key).is_none_or(Value::is_null)
        {
            object.insert(key.into(), id.into());
        }
    }
    object.remove(ROLE_KEY);
    if role == Role::Policy {
        for key in ["id2label", "label2id", "num_labels"] {
            object.remove(key);
        }
    } else {
        object.insert("id2label".into(), json!({ "0": "LABEL_0" }));
        object.insert("label2id".into(), json!({ "LABEL_0": 0 }));
        object.remove("num_labels");
    }
    if role == Role::Critic {
        object.insert(ROLE_KEY.into(), role.artifact_type().name().into());
    }
    // Where nothing is to be changed, not even a number's spelling is.
    Ok(match (carried, before) {
        (Some(carried), Some(before)) if before == object => carried.to_vec(),
        _ => pretty(&object),
    })
}

/// A JSON object as transformers writes its files.
pub fn pretty(object: &Map<String, Value>) -> Vec<u8> {
    let mut content = serde_json::to_vec_pretty(object).unwrap_or_default();
    content.push(b'\n');
    content
}

/// Every key of a config, spelled as transformers 4 and 5 both read it.
fn generated(family: &Family, model: &ModelConfig) -> Result<Map<String, Value>, HfError> {
    let style = model.style;
    let expected = family.architecture.style();
    let unlike = |what: &str| {
        let message = format!("{} of transformers has no {what}: the model cannot be exported as one", family.causal);
        Err(HfError::new(CONFIG, message))
    };
    let gpt2 = family.architecture == Architecture::Gpt2;
    match model.positions {
        Positions::Alibi => return unlike("ALiBi positions"),
        Positions::Learned if !gpt2 => return unlike("learned positions"),
        Positions::Rope if gpt2 => return unlike("rotary positions"),
        _ => {}
    }
    let windowed = matches!(family.architecture, Architecture::Mistral | Architecture::Qwen2 | Architecture::Qwen3);
    if style.sliding_window.is_some() && !windowed {
        return unlike("sliding window");
    }
    let biased = matches!(family.architecture, Architecture::Llama | Architecture::Qwen3);
    let plain = BlockStyle { sliding_window: None, ..style };
    let comparable = match biased {
        true => BlockStyle { qkv_bias: expected.qkv_bias, output_bias: expected.output_bias, mlp_bias: expected.mlp_bias, ..plain },
        false => plain,
    };
    if comparable != expected
        || biased && style.qkv_bias != style.output_bias
        || style.mlp_bias && family.architecture == Architecture::Qwen3
    {
        return unlike("such blocks");
    }
    let mut object = Map::new();
    let mut set = |key: &str, value: Value| drop(object.insert(key.into(), value));
    set("model_type", family.model_type.into());
    set("vocab_size", model.vocab_size.into());
    set("tie_word_embeddings", model.tie_embeddings.into());
    if gpt2 {
        if model.kv_heads != model.heads || model.head_dim * model.heads != model.hidden_size {
            return unlike("grouped heads");
        }
        set("n_embd", model.hidden_size.into());
        set("n_inner", model.intermediate_size.into());
        set("n_layer", model.layers.into());
        set("n_head", model.heads.into());
        set("n_positions", model.context.into());
        set("layer_norm_epsilon", model.norm_eps.into());
        set("activation_function", "gelu_new".into());
        return Ok(object);
    }
    set("hidden_size", model.hidden_size.into());
    set("intermediate_size", model.intermediate_size.into());
    set("num_hidden_layers", model.layers.into());
    set("num_attention_heads", model.heads.into());
    set("num_key_value_heads", model.kv_heads.into());
    set("head_dim", model.head_dim.into());
    set("max_position_embeddings", model.context.into());
    set("rms_norm_eps", model.norm_eps.into());
    set("hidden_act", "silu".into());
    set("rope_theta", model.rope_theta.into());
    set("rope_scaling", model.rope_scaling.map_or(Value::Null, |scaling| json!(scaling)));
    if biased {
        set("attention_bias", style.qkv_bias.into());
    }
    match family.architecture {
        Architecture::Llama => set("mlp_bias", style.mlp_bias.into()),
        Architecture::Mistral => set("sliding_window", json!(style.sliding_window)),
        _ => {
            set("use_sliding_window", style.sliding_window.is_some().into());
            set("sliding_window", json!(style.sliding_window));
            set("max_window_layers", if style.sliding_window.is_some() { 0 } else { model.layers }.into());
        }
    }
    Ok(object)
}
