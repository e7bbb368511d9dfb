//! Names, shapes and storage of a model's weights. Names and layouts are those of Llama checkpoints.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use burn_flex::FlexTensor;
use rlflow_api::{CounterRng, ModelConfig, Positions};
use rlflow_kernels::{Affine, AttentionParts, MlpParts, matmul::Arithmetic};

use crate::{
    ledger::{Held, Purpose, hold_bytes},
    ranks::{Collective, Pending, join},
};

/// What stands on top of the decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Head {
    /// Next-token distribution (a policy).
    Language,
    /// One number per token (a reward model or a critic).
    Score,
    /// Both, on one trunk (PPO with `share_backbone`).
    LanguageAndScore,
}

impl Head {
    /// Whether there is an output projection.
    pub const fn has_language(self) -> bool {
        matches!(self, Self::Language | Self::LanguageAndScore)
    }

    /// Whether there is a scalar head.
    pub const fn has_score(self) -> bool {
        matches!(self, Self::Score | Self::LanguageAndScore)
    }
}

/// Name and shape of one weight.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParameterSpec {
    /// Name in the checkpoint.
    pub name: String,
    /// Shape in the checkpoint.
    pub shape: Vec<usize>,
}

impl ParameterSpec {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Norm weights and biases are vectors; weight decay leaves them alone.
    pub fn is_matrix(&self) -> bool {
        self.shape.len() > 1
    }

    /// In what format it is held by a model that computes with `arithmetic`: bfloat16 for the matrices of one that multiplies
    /// such numbers. Scalar heads and adapters are small: they, and their gradients, stay f32.
    pub(crate) fn stored_in(&self, arithmetic: Arithmetic) -> FloatDType {
        let is_product = self.is_matrix() && self.name != SCORE_WEIGHT && !crate::lora::is_factor(&self.name);
        if arithmetic == Arithmetic::Bf16 && is_product { FloatDType::BF16 } else { FloatDType::F32 }
    }

    /// Elements of a row along the first dimension; 1 for vectors.
    pub fn row_width(&self) -> usize {
        self.shape.iter().skip(1).product()
    }

    /// Shape of the tensor that holds it: vectors are one row.
    pub(crate) fn dims(&self) -> [usize; 2] {
        match self.shape[..] {
            [columns] => [1, columns],
            [rows, columns] => [rows, columns],
            _ => unreachable!("weights of a decoder are vectors and matrices"),
        }
    }
}

/// Weights of one block, as indices into [`Parameters`].
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs)]
pub struct BlockSlots {
    /// Number of the block.
    pub index: usize,
    pub attention: AttentionParts<usize>,
    pub mlp: MlpParts<usize>,
}

impl BlockSlots {
    /// All of them, in the order in which the block asks for its weights and hands over their gradients.
    pub fn all(&self) -> impl Iterator<Item = usize> + Clone + use<> {
        let mut slots = Vec::with_capacity(16);
        self.attention.map(|slot| slots.push(*slot));
        self.mlp.map(|slot| slots.push(*slot));
        slots.into_iter()
    }
}

/// Where each weight stands.
#[derive(Debug, Clone)]
pub struct Slots {
    /// `[vocab, hidden]`
    pub embed: usize,
    /// `[context, hidden]`, of learned positions.
    pub positions: Option<usize>,
    /// Blocks, first to last.
    pub blocks: Vec<BlockSlots>,
    /// `[hidden]`
    pub norm: Affine<usize>,
    /// `[vocab, hidden]`; the embedding when tied, absent without a language head.
    pub lm_head: Option<usize>,
    /// `[1, hidden]`
    pub score: Option<usize>,
}

/// Name of the scalar head's weight, as in `LlamaForSequenceClassification`.
pub const SCORE_WEIGHT: &str = "score.weight";
const LM_HEAD: &str = "lm_head.weight";

/// All weights of a decoder with `head`, in the order in which gradients and optimizer state stand.
pub fn specs(config: &ModelConfig, head: Head) -> (Vec<ParameterSpec>, Slots) {
    let mut specs = SpecList(Vec::new());
    let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
    let (query, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    let style = config.style;
    let embed = specs.add("model.embed_tokens.weight".into(), &[config.vocab_size, hidden]);
    let learned = config.positions == Positions::Learned;
    let positions = learned.then(|| specs.add("model.embed_positions.weight".into(), &[config.context, hidden]));
    let blocks = (0..config.layers)
        .map(|layer| {
            let name = |part: &str| format!("model.layers.{layer}.{part}");
            BlockSlots {
                index: layer,
                attention: AttentionParts {
                    norm: specs.affine(name("input_layernorm"), &[hidden], style.layer_norm),
                    q: specs.affine(name("self_attn.q_proj"), &[query, hidden], style.qkv_bias),
                    k: specs.affine(name("self_attn.k_proj"), &[kv, hidden], style.qkv_bias),
                    v: specs.affine(name("self_attn.v_proj"), &[kv, hidden], style.qkv_bias),
                    o: specs.affine(name("self_attn.o_proj"), &[hidden, query], style.output_bias),
                    q_norm: style.qk_norm.then(|| specs.add(name("self_attn.q_norm.weight"), &[config.head_dim])),
                    k_norm: style.qk_norm.then(|| specs.add(name("self_attn.k_norm.weight"), &[config.head_dim])),
                },
                mlp: MlpParts {
                    norm: specs.affine(name("post_attention_layernorm"), &[hidden], style.layer_norm),
                    gate: (!style.plain_mlp).then(|| specs.affine(name("mlp.gate_proj"), &[intermediate, hidden], style.mlp_bias)),
                    up: specs.affine(name("mlp.up_proj"), &[intermediate, hidden], style.mlp_bias),
                    down: specs.affine(name("mlp.down_proj"), &[hidden, intermediate], style.mlp_bias),
                },
            }
        })
        .collect();
    let norm = specs.affine("model.norm".into(), &[hidden], style.layer_norm);
    let lm_head = match (head.has_language(), config.tie_embeddings) {
        (false, _) => None,
        (true, true) => Some(embed),
        (true, false) => Some(specs.add(LM_HEAD.into(), &[config.vocab_size, hidden])),
    };
    let score = head.has_score().then(|| specs.add(SCORE_WEIGHT.into(), &[1, hidden]));
    (specs.0, Slots { embed, positions, blocks, norm, lm_head, score })
}

/// Specs being listed; adding gives the slot.
struct SpecList(Vec<ParameterSpec>);

impl SpecList {
    fn add(&mut self, name: String, shape: &[usize]) -> usize {
        self.0.push(ParameterSpec { name, shape: shape.to_vec() });
        self.0.len() - 1
    }

    fn affine(&mut self, name: String, shape: &[usize], bias: bool) -> Affine<usize> {
        let weight = self.add(format!("{name}.weight"), shape);
        Affine::new(weight, bias.then(|| self.add(format!("{name}.bias"), &shape[..1])))
    }
}

/// Weights on a device, all of rank 2 (vectors as one row), without autodiff; or one rank's share of each.
#[derive(Debug, Clone)]
pub struct Parameters {
    specs: Vec<ParameterSpec>,
    tensors: Vec<Tensor<2>>,
    /// With whom the weights are shared, where they are.
    shared_with: Option<Arc<dyn Collective>>,
    /// Weights that are being gathered, in the order in which they will be asked for.
    coming: Arc<Mutex<VecDeque<Coming>>>,
}

/// A weight that is being gathered.
#[derive(Debug)]
struct Coming {
    slot: usize,
    pieces: Pending,
    _held: Option<Held>,
}

impl Parameters {
    /// From `data`, which gives each weight's elements.
    ///
    /// # Errors
    /// What `data` returns.
    pub fn from_data<E>(
        specs: Vec<ParameterSpec>,
        device: &Device,
        mut data: impl FnMut(&ParameterSpec) -> Result<Vec<f32>, E>,
    ) -> Result<Self, E> {
        let tensors =
            specs.iter().map(|spec| Ok(Tensor::from_data(TensorData::new(data(spec)?, spec.dims()), device))).collect::<Result<_, E>>()?;
        Ok(Self::from_tensors(specs, tensors, None))
    }

    /// Without all but the first `count` weights.
    pub(crate) fn truncated(&self, count: usize) -> Self {
        let Self { specs, tensors, shared_with, .. } = self;
        Self::from_tensors(specs[..count].to_vec(), tensors[..count].to_vec(), shared_with.clone())
    }

    /// Around tensors that are there: whole weights, or, with `shared_with`, this rank's share of each (`[1, elements]`).
    pub(crate) fn from_tensors(specs: Vec<ParameterSpec>, tensors: Vec<Tensor<2>>, shared_with: Option<Arc<dyn Collective>>) -> Self {
        Self { specs, tensors, shared_with, coming: Arc::default() }
    }

    /// Whether this is one rank's share.
    pub fn is_shared(&self) -> bool {
        self.shared_with.is_some()
    }

    /// Moves everything to `device`.
    pub(crate) fn move_to(&mut self, device: &Device) {
        self.tensors.iter_mut().for_each(|tensor| *tensor = tensor.clone().to_device(device));
    }

    /// Zeros of the same shapes, on the same device.
    pub fn zeros_like(&self) -> Vec<Tensor<2>> {
        self.tensors.iter().map(Tensor::zeros_like).collect()
    }

    /// Names and shapes.
    pub fn specs(&self) -> &[ParameterSpec] {
        &self.specs
    }

    /// The weight in `slot`, in the format that it is held in, gathered from all ranks where each holds a share: then all must ask for the same weights
    /// in the same order.
    pub fn get(&self, slot: usize) -> Tensor<2> {
        match &self.shared_with {
            None => self.tensors[slot].clone(),
            Some(world) => join(&self.pieces(world.as_ref(), slot), self.specs[slot].dims(), &self.tensors[slot].device()),
        }
    }

    /// Takes part in other ranks' [`Parameters::get`].
    pub(crate) fn attend(&self, slot: usize) {
        if let Some(world) = &self.shared_with {
            self.pieces(world.as_ref(), slot);
        }
    }

    fn pieces(&self, world: &dyn Collective, slot: usize) -> Vec<Tensor<2>> {
        let coming = self.coming().pop_front_if(|coming| coming.slot == slot);
        coming.map_or_else(|| world.all_gather(self.tensors[slot].clone()), |coming| coming.pieces.wait())
    }

    /// Whether work goes on that all ranks take part in: the one that knows gives it, the others learn it. Where weights are here
    /// whole, nobody takes part.
    pub(crate) fn goes_on(&self, known: Option<bool>) -> bool {
        let Some(world) = &self.shared_with else { return known == Some(true) };
        let said = world.all_gather_values(known.map(|goes_on| f64::from(u8::from(goes_on))).into_iter().collect());
        said.concat().contains(&1.0)
    }

    /// Starts to gather weights that will be asked for next, in this order; nothing where they are here anyway.
    pub(crate) fn prefetch(&self, slots: impl Iterator<Item = usize>) {
        let Some(world) = &self.shared_with else { return };
        for slot in slots {
            let held = self.hold_gathered(std::iter::once(slot));
            let coming = Coming { slot, pieces: world.start_all_gather(self.tensors[slot].clone()), _held: held };
            self.coming().push_back(coming);
        }
    }

    fn coming(&self) -> MutexGuard<'_, VecDeque<Coming>> {
        self.coming.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts weights that are about to be gathered; none where they are here anyway.
    pub(crate) fn hold_gathered(&self, slots: impl Iterator<Item = usize>) -> Option<Held> {
        if !self.is_shared() {
            return None;
        }
        hold_bytes(Purpose::Buffers, slots.map(|slot| self.specs[slot].len() * self.tensors[slot].dtype().size()).sum())
    }

    /// What is held of all weights.
    pub fn tensors(&self) -> &[Tensor<2>] {
        &self.tensors
    }

    /// What is held of all weights, to be replaced in place.
    pub fn tensors_mut(&mut self) -> &mut [Tensor<2>] {
        &mut self.tensors
    }

    /// Number of elements of all weights.
    pub fn count(&self) -> usize {
        self.specs.iter().map(ParameterSpec::len).sum()
    }

    /// What is held of one weight, on the host.
    pub fn host(&self, slot: usize) -> Vec<f32> {
        host(&self.tensors[slot])
    }

    /// Elements by name.
    pub fn by_name(&self) -> BTreeMap<&str, usize> {
        self.specs.iter().enumerate().map(|(slot, spec)| (spec.name.as_str(), slot)).collect()
    }
}

/// The same numbers as f32.
pub(crate) fn widened(tensor: Tensor<2>) -> Tensor<2> {
    if tensor.dtype() == DType::F32 { tensor } else { tensor.cast(FloatDType::F32) }
}

/// Elements of a tensor on the host.
pub fn host<const D: usize>(tensor: &Tensor<D>) -> Vec<f32> {
    tensor.to_data().convert::<f32>().try_to_vec().expect("float tensors convert to f32")
}

/// Whether a tensor lives on `Flex`, the CPU.
pub fn is_flex<const D: usize>(tensor: &Tensor<D>) -> bool {
    tensor.clone().try_into_primitive::<burn::backend::Flex>().is_ok()
}

/// Reads an f32 tensor on `Flex` in place; `None` for other formats and on other devices.
pub fn flex_view<const D: usize>(tensor: &Tensor<D>) -> Option<FlexTensor> {
    if tensor.dtype() != DType::F32 {
        return None;
    }
    let tensor = tensor.clone().try_into_primitive::<burn::backend::Flex>().ok()?;
    Some(if tensor.as_slice::<f32>().is_some() { tensor } else { tensor.to_contiguous() })
}

/// The same for bfloat16.
pub(crate) fn flex_narrow_view<const D: usize>(tensor: &Tensor<D>) -> Option<FlexTensor> {
    if tensor.dtype() != DType::BF16 {
        return None;
    }
    let tensor = tensor.clone().try_into_primitive::<burn::backend::Flex>().ok()?;
    Some(if tensor.as_slice::<half::bf16>().is_some() { tensor } else { tensor.to_contiguous() })
}

/// Changes the elements of f32 tensors on `Flex` in place, without a copy where nobody else holds them. False for others.
pub fn update_in_place<const N: usize>(tensors: [&mut Tensor<2>; N], update: impl FnOnce([&mut [f32]; N])) -> bool {
    let mut views = Vec::with_capacity(N);
    for tensor in &tensors {
        // Placeholders keep no reference to the storage, so that it is unique while it is changed.
        match flex_view(tensor) {
            // A slice of a larger storage, such as one gradient of several that were computed as one, must not be taken for all of it.
            Some(view) if view.storage::<f32>().len() == tensor.shape().num_elements() => views.push(view),
            Some(view) => views.push(view.to_contiguous()),
            None => return false,
        }
    }
    let device = tensors[0].device();
    for tensor in tensors.iter() {
        debug_assert_eq!(tensor.device(), device);
    }
    let mut tensors = tensors;
    for tensor in &mut tensors {
        **tensor = Tensor::zeros([1, 1], &device);
    }
    let mut views: [FlexTensor; N] = views.try_into().unwrap_or_else(|_| unreachable!("one view per tensor"));
    update(views.each_mut().map(|view| view.storage_mut::<f32>()));
    for (tensor, view) in tensors.into_iter().zip(views) {
        *tensor = Tensor::from_primitive::<burn::backend::Flex>(view);
    }
    true
}

/// Fresh weights: normal with standard deviation `std`, output projections of both halves scaled by
/// `1 / sqrt(2 layers)` (GPT-2), norms one, biases zero, the scalar head normal with variance `1 / (hidden + 1)`.
pub fn initial(config: &ModelConfig, seed: u64, std: f64) -> impl Fn(&ParameterSpec) -> Vec<f32> + use<> {
    let residual = std / (2.0 * config.layers as f64).sqrt();
    let score = 1.0 / (config.hidden_size as f64 + 1.0).sqrt();
    move |spec| {
        let std = match spec.name.as_str() {
            SCORE_WEIGHT => score,
            name if name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight") => residual,
            _ => std,
        };
        if !spec.is_matrix() {
            return vec![if spec.name.ends_with(".bias") { 0.0 } else { 1.0 }; spec.len()];
        }
        // One stream per weight, named after it: a weight's draw does not depend on the others.
        let mut rng = CounterRng::new(seed, &format!("init/{}", spec.name), 0, 0);
        (0..spec.len()).map(|_| (rng.normal() * std) as f32).collect()
    }
}
