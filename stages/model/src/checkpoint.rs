//! Checkpoints as artifacts: one tensor entry per weight under its Llama name, and the config in the metadata.

use burn::tensor::Device;
use rlflow_api::{Artifact, ArtifactBuilder, Dtype, ModelConfig, StageError, StageResult};
use rlflow_kernels::matmul::Arithmetic;
use serde::{Deserialize, Serialize};

use crate::{
    Decoder, Group, Layout, LoraSettings, Use, adapter, lora,
    parameters::{Head, ParameterSpec, SCORE_WEIGHT, initial, specs},
};

/// What a model artifact says about itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CheckpointInfo {
    /// Shape of the network.
    pub model: ModelConfig,
    /// What stands on top.
    pub head: Head,
    /// Digest of the tokenizer artifact that its ids belong to.
    pub tokenizer: String,
    /// Adapters beside the weights, in the order in which they were trained ([`adapter`]).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub adapters: Vec<LoraSettings>,
    /// Settings that travel with the model to the stage that uses it (those of a PPO role).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<serde_json::Value>,
}

impl CheckpointInfo {
    /// Of a model artifact.
    ///
    /// # Errors
    /// If its metadata is not that of a model.
    pub fn of(artifact: &Artifact) -> StageResult<Self> {
        serde_json::from_value(artifact.manifest().metadata.clone())
            .map_err(|error| StageError::invalid(format!("artifact {} is not a model of this version: {error}", artifact.digest().short())))
    }
}

/// Little-endian bytes of `values`.
pub fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// Floats from little-endian bytes of an entry.
pub fn floats(content: &[u8]) -> Vec<f32> {
    content.chunks_exact(4).map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])).collect()
}

/// Elements of the weight `spec` in `artifact`, without adapters.
///
/// # Errors
/// If it is missing, misshapen or cannot be read.
pub fn weight(artifact: &Artifact, spec: &ParameterSpec) -> StageResult<Vec<f32>> {
    let entry = artifact.manifest().entry(&spec.name).ok_or_else(|| {
        StageError::invalid(format!("checkpoint {} has no tensor `{}` of shape {:?}", artifact.digest().short(), spec.name, spec.shape))
    })?;
    let shape: Vec<u64> = spec.shape.iter().map(|size| *size as u64).collect();
    match entry.dtype {
        Some(dtype @ (Dtype::F32 | Dtype::Bf16 | Dtype::F16)) if entry.shape == shape => Ok(widened(dtype, &artifact.read(&spec.name)?)),
        dtype => Err(StageError::invalid(format!(
            "tensor `{}` of checkpoint {} is {dtype:?} of {:?}; expected F32, BF16 or F16 of {shape:?}",
            spec.name,
            artifact.digest().short(),
            entry.shape
        ))),
    }
}

/// Elements of an imported tensor, which keeps the dtype of its file, as f32: exact.
fn widened(dtype: Dtype, content: &[u8]) -> Vec<f32> {
    let pairs = || content.chunks_exact(2).map(|bytes| [bytes[0], bytes[1]]);
    match dtype {
        Dtype::Bf16 => pairs().map(|bytes| half::bf16::from_le_bytes(bytes).to_f32()).collect(),
        Dtype::F16 => pairs().map(|bytes| half::f16::from_le_bytes(bytes).to_f32()).collect(),
        _ => floats(content),
    }
}

/// Loads a model with `head` on top onto the ranks of `layout`, weight by weight, its adapters merged into them. Weights that the
/// checkpoint lacks for that head (a scalar head on a policy) are drawn from `seed`; those it has beyond it are left. With `lora` a
/// fresh adapter is put on it, and only that will be trained.
///
/// # Errors
/// If a tensor of the trunk is missing or misshapen.
pub fn load_on(
    artifact: &Artifact,
    head: Head,
    seed: u64,
    layout: &Layout,
    arithmetic: Arithmetic,
    usage: Use<'_>,
) -> StageResult<(Group, CheckpointInfo)> {
    let info = CheckpointInfo::of(artifact)?;
    let fresh = initial(&info.model, seed, 0.02);
    let group = Group::new(&info.model, head, layout, arithmetic, usage, |spec| {
        if lora::is_factor(&spec.name) {
            return Ok(lora::initial(spec, seed));
        }
        let absent = spec.name == SCORE_WEIGHT && artifact.manifest().entry(SCORE_WEIGHT).is_none();
        if absent { Ok(fresh(spec)) } else { adapter::merged(artifact, &info.adapters, spec) }
    })?;
    Ok((group, info))
}

/// [`load_on`] one device, in f32.
///
/// # Errors
/// If a tensor of the trunk is missing or misshapen.
pub fn load(artifact: &Artifact, head: Head, seed: u64, device: &Device) -> StageResult<(Decoder, CheckpointInfo)> {
    let (group, info) = load_on(artifact, head, seed, &Layout::one(device.clone()), Arithmetic::F32, Use::Frozen)?;
    Ok((group.first().clone(), info))
}

/// Adds to `builder` the weights of `model`, which has no adapter, that a model with `head` has, and `info` as its metadata.
///
/// # Errors
/// If the store cannot be written.
///
/// # Panics
/// If `model` lacks a weight for that head.
pub fn save(model: &Group, head: Head, builder: &mut ArtifactBuilder, info: &CheckpointInfo) -> StageResult<()> {
    let by_name = model.first().parameters().by_name();
    for spec in specs(model.config(), head).0 {
        let shape: Vec<u64> = spec.shape.iter().map(|size| *size as u64).collect();
        builder.put_tensor(&spec.name, Dtype::F32, &shape, &bytes(&model.weight(by_name[spec.name.as_str()])?))?;
    }
    let info = CheckpointInfo { model: model.config().clone(), head, adapters: Vec::new(), ..info.clone() };
    builder.metadata(serde_json::to_value(info).map_err(|error| StageError::invalid(error.to_string()))?);
    Ok(())
}

/// Adds to `builder` the weights of `source`, a policy that `info` is about, under a fresh scalar head that is drawn from `seed`. All but that
/// head is shared.
///
/// # Errors
/// If the store cannot be written, or a weight is missing.
pub fn share_under_score_head(source: &Artifact, info: &CheckpointInfo, seed: u64, builder: &mut ArtifactBuilder) -> StageResult<()> {
    let fresh = initial(&info.model, seed, 0.02);
    for spec in specs(&info.model, Head::Score).0 {
        match source.manifest().entry(&spec.name) {
            Some(entry) => builder.share(entry)?,
            None if spec.name == SCORE_WEIGHT => {
                let shape: Vec<u64> = spec.shape.iter().map(|size| *size as u64).collect();
                builder.put_tensor(&spec.name, Dtype::F32, &shape, &bytes(&fresh(&spec)))?;
            }
            None => return Err(StageError::invalid(format!("checkpoint {} has no tensor `{}`", source.digest().short(), spec.name))),
        }
    }
    adapter::share_adapters(source, builder)
}

/// Adds the state that training continues from, under names that begin with `prefix`: weights that are not frozen, moments, step count.
///
/// # Errors
/// If the store cannot be written.
pub fn save_state(prefix: &str, model: &Group, builder: &mut ArtifactBuilder) -> StageResult<()> {
    save_weights(prefix, model, builder)?;
    for (part, name) in ["first_moments", "second_moments"].into_iter().enumerate() {
        let moments = |slot: usize| StageResult::Ok(bytes(&model.moments(slot)?[part]));
        put_elements(builder, &format!("{prefix}.{name}"), &all_slots(model, moments)?)?;
    }
    builder.put(&format!("{prefix}.optimizer_step"), &model.steps().to_le_bytes())?;
    Ok(())
}

/// Adds weights that are not trained themselves (a moving average), as [`save_state`] does.
///
/// # Errors
/// If the store cannot be written.
pub fn save_weights(prefix: &str, model: &Group, builder: &mut ArtifactBuilder) -> StageResult<()> {
    let trained = |slot: usize| StageResult::Ok(if model.first().is_frozen(slot) { Vec::new() } else { bytes(&model.weight(slot)?) });
    put_elements(builder, &format!("{prefix}.weights"), &all_slots(model, trained)?)
}

/// A tensor rather than a file: of a snapshot that a newer one replaces, the store removes tensors at once.
fn put_elements(builder: &mut ArtifactBuilder, name: &str, content: &[u8]) -> StageResult<()> {
    Ok(builder.put_tensor(name, Dtype::F32, &[content.len() as u64 / 4], content)?)
}

fn all_slots(model: &Group, of: impl Fn(usize) -> StageResult<Vec<u8>>) -> StageResult<Vec<u8>> {
    let mut all = Vec::new();
    for slot in 0..model.specs().len() {
        all.extend_from_slice(&of(slot)?);
    }
    Ok(all)
}

/// Goes back to a state that [`save_state`] stored. `model` is prepared to be trained ([`Group::train`]).
///
/// # Errors
/// If the state is not one of this model.
pub fn load_state(prefix: &str, state: &Artifact, model: &mut Group) -> StageResult<()> {
    let step = state.read(&format!("{prefix}.optimizer_step"))?;
    let step = u64::from_le_bytes(step[..].try_into().map_err(|_| StageError::invalid("snapshot without a step count"))?);
    let [first, second] = ["first_moments", "second_moments"].map(|name| state.read(&format!("{prefix}.{name}")));
    let (first, second) = (floats(&first?), floats(&second?));
    let len = |(slot, spec): (usize, &ParameterSpec)| if model.first().is_frozen(slot) { 0 } else { spec.len() };
    let trained: Vec<usize> = model.specs().iter().enumerate().map(len).collect();
    if [&first, &second].iter().any(|moments| moments.len() != trained.iter().sum::<usize>()) {
        return Err(foreign(state));
    }
    let mut start = 0;
    for (slot, len) in trained.into_iter().enumerate().filter(|(_, len)| *len > 0) {
        model.set_moments(slot, [&first[start..start + len], &second[start..start + len]]);
        start += len;
    }
    model.set_steps(step);
    load_weights(prefix, state, model)
}

/// Goes back to weights that [`save_weights`] or [`save_state`] stored.
///
/// # Errors
/// If they are not those of this model.
pub fn load_weights(prefix: &str, state: &Artifact, model: &mut Group) -> StageResult<()> {
    let content = floats(&state.read(&format!("{prefix}.weights"))?);
    let len = |(slot, spec): (usize, &ParameterSpec)| if model.first().is_frozen(slot) { 0 } else { spec.len() };
    let lens: Vec<usize> = model.specs().iter().enumerate().map(len).collect();
    if content.len() != lens.iter().sum::<usize>() {
        return Err(foreign(state));
    }
    let mut start = 0;
    for (slot, len) in lens.into_iter().enumerate().filter(|(_, len)| *len > 0) {
        model.set_weight(slot, &content[start..start + len]);
        start += len;
    }
    Ok(())
}

fn foreign(state: &Artifact) -> StageError {
    StageError::invalid(format!("snapshot {} is not one of this model", state.digest().short()))
}
