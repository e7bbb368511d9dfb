//! Checkpoints as artifacts: one tensor entry per weight under its Llama name, and the config in the metadata.

use burn::tensor::{Device, Tensor, TensorData};
use rlflow_api::{Artifact, ArtifactBuilder, Dtype, ModelConfig, StageError, StageResult};
use serde::{Deserialize, Serialize};

use crate::{
    Decoder, Optimizer, OptimizerSettings,
    parameters::{Head, ParameterSpec, Parameters, SCORE_WEIGHT, host, initial, specs},
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

/// Elements of the weight `spec` in `artifact`.
fn read(artifact: &Artifact, spec: &ParameterSpec) -> StageResult<Vec<f32>> {
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

/// Loads a model with `head` on top. Weights that the checkpoint lacks for that head (a scalar head on a policy) are
/// drawn from `seed`; those it has beyond it are left.
///
/// # Errors
/// If a tensor of the trunk is missing or misshapen.
pub fn load(artifact: &Artifact, head: Head, seed: u64, device: &Device) -> StageResult<(Decoder, CheckpointInfo)> {
    let info = CheckpointInfo::of(artifact)?;
    let (specs, _) = specs(&info.model, head);
    let fresh = initial(&info.model, seed, 0.02);
    let parameters = Parameters::from_data(specs, device, |spec| {
        let absent = spec.name == SCORE_WEIGHT && artifact.manifest().entry(SCORE_WEIGHT).is_none();
        if absent { Ok(fresh(spec)) } else { read(artifact, spec) }
    })?;
    Ok((Decoder::new(info.model.clone(), head, parameters, device.clone()), info))
}

/// Adds all weights of `decoder` to `builder`, and `info` as its metadata.
///
/// # Errors
/// If the store cannot be written, or a weight is not finite.
pub fn save(decoder: &Decoder, builder: &mut ArtifactBuilder, info: &CheckpointInfo) -> StageResult<()> {
    for (slot, spec) in decoder.parameters().specs().iter().enumerate() {
        let shape: Vec<u64> = spec.shape.iter().map(|size| *size as u64).collect();
        builder.put_tensor(&spec.name, Dtype::F32, &shape, &bytes(&decoder.parameters().host(slot)))?;
    }
    let info = CheckpointInfo { model: decoder.config().clone(), head: decoder.head(), ..info.clone() };
    builder.metadata(serde_json::to_value(info).map_err(|error| StageError::invalid(error.to_string()))?);
    Ok(())
}

/// Adds the state that training continues from, under names that begin with `prefix`: weights, moments, step count.
///
/// # Errors
/// If the store cannot be written.
pub fn save_state(prefix: &str, decoder: &Decoder, optimizer: &Optimizer, builder: &mut ArtifactBuilder) -> StageResult<()> {
    let (first, second, step) = optimizer.state();
    save_weights(prefix, decoder, builder)?;
    put_tensors(&format!("{prefix}.first_moments"), first, builder)?;
    put_tensors(&format!("{prefix}.second_moments"), second, builder)?;
    builder.put(&format!("{prefix}.optimizer_step"), &step.to_le_bytes())?;
    Ok(())
}

/// Adds weights that are not trained themselves (a moving average), as [`save_state`] does.
///
/// # Errors
/// If the store cannot be written.
pub fn save_weights(prefix: &str, decoder: &Decoder, builder: &mut ArtifactBuilder) -> StageResult<()> {
    put_tensors(&format!("{prefix}.weights"), decoder.parameters().tensors(), builder)
}

fn put_tensors(name: &str, tensors: &[Tensor<2>], builder: &mut ArtifactBuilder) -> StageResult<()> {
    let mut content = Vec::new();
    for tensor in tensors {
        content.extend(bytes(&host(tensor)));
    }
    Ok(builder.put(name, &content)?)
}

/// Goes back to a state that [`save_state`] stored.
///
/// # Errors
/// If the state is not one of this model.
pub fn load_state(prefix: &str, state: &Artifact, decoder: &mut Decoder, settings: OptimizerSettings) -> StageResult<Optimizer> {
    let step = state.read(&format!("{prefix}.optimizer_step"))?;
    let step = u64::from_le_bytes(step[..].try_into().map_err(|_| StageError::invalid("snapshot without a step count"))?);
    let moments = |name: &str| read_tensors(&format!("{prefix}.{name}"), state, decoder);
    let optimizer = Optimizer::restore(settings, moments("first_moments")?, moments("second_moments")?, step);
    load_weights(prefix, state, decoder)?;
    Ok(optimizer)
}

/// Goes back to weights that [`save_weights`] or [`save_state`] stored.
///
/// # Errors
/// If they are not those of this model.
pub fn load_weights(prefix: &str, state: &Artifact, decoder: &mut Decoder) -> StageResult<()> {
    let weights = read_tensors(&format!("{prefix}.weights"), state, decoder)?;
    decoder.parameters_mut().tensors_mut().iter_mut().zip(weights).for_each(|(slot, tensor)| *slot = tensor);
    Ok(())
}

/// The tensors of entry `name`, shaped like the parameters of `decoder`.
fn read_tensors(name: &str, state: &Artifact, decoder: &Decoder) -> StageResult<Vec<Tensor<2>>> {
    let content = floats(&state.read(name)?);
    let mut rest = content.as_slice();
    let specs = decoder.parameters().specs().iter();
    specs
        .map(|spec| {
            let (values, tail) = rest
                .split_at_checked(spec.len())
                .ok_or_else(|| StageError::invalid(format!("snapshot {} is not one of this model", state.digest().short())))?;
            rest = tail;
            let dims = if spec.shape.len() == 1 { [1, spec.len()] } else { [spec.shape[0], spec.shape[1]] };
            Ok(Tensor::from_data(TensorData::new(values.to_vec(), dims), decoder.device()))
        })
        .collect()
}
