//! Artifacts with adapters: the entries of the base are shared with it, and each adapter adds its factors. Nothing of the base is stored
//! twice, and its tensors keep the element type that they were imported with.
//!
//! Adapters stack: training one on a model that has some leaves those as they are. In memory all but the one that is being trained
//! are merged into the weights.

use rlflow_api::{Artifact, ArtifactBuilder, Dtype, StageError, StageResult};
use rlflow_kernels::LowRank;

use crate::{
    CheckpointInfo, Group, Head,
    checkpoint::{bytes, floats, weight},
    lora::{LoraSettings, is_factor, merge},
    parameters::{ParameterSpec, specs},
};

/// Name of a factor's entry; adapters are counted from 0 in the order in which they were trained.
pub fn entry_name(adapter: usize, factor: &str) -> String {
    format!("adapters.{adapter}.{factor}")
}

/// The factors of adapter number `adapter` for the weight `spec`, if it adapts it.
///
/// # Errors
/// If they are missing, misshapen or cannot be read.
pub fn factors(artifact: &Artifact, adapter: usize, lora: &LoraSettings, spec: &ParameterSpec) -> StageResult<Option<LowRank<Vec<f32>>>> {
    let Some(LowRank { a, b, scale }) = lora.factors(spec) else { return Ok(None) };
    let read = |factor: &ParameterSpec| {
        let name = entry_name(adapter, &factor.name);
        let shape: Vec<u64> = factor.shape.iter().map(|size| *size as u64).collect();
        let entry = artifact.manifest().entry(&name).filter(|entry| entry.shape == shape && entry.dtype == Some(Dtype::F32));
        match entry {
            Some(_) => Ok(floats(&artifact.read(&name)?)),
            None => Err(StageError::invalid(format!("checkpoint {} has no tensor `{name}` of shape {shape:?}", artifact.digest().short()))),
        }
    };
    Ok(Some(LowRank { a: read(&a)?, b: read(&b)?, scale }))
}

/// Elements of the weight `spec` in `artifact`, with what its adapters add to it.
///
/// # Errors
/// If a tensor is missing, misshapen or cannot be read.
pub fn merged(artifact: &Artifact, adapters: &[LoraSettings], spec: &ParameterSpec) -> StageResult<Vec<f32>> {
    let mut values = weight(artifact, spec)?;
    for (adapter, lora) in adapters.iter().enumerate() {
        if let Some(LowRank { a, b, scale }) = factors(artifact, adapter, lora, spec)? {
            merge(&mut values, LowRank { a: &a, b: &b, scale }, lora.rank);
        }
    }
    Ok(values)
}

/// Adds to `builder` the weights of `model`, which was loaded from `source` and trained with an adapter, that a model with `head` has:
/// what is frozen is shared with `source`, and so are its adapters; what was trained is stored.
///
/// # Errors
/// If the store cannot be written, or `source` lacks a weight.
///
/// # Panics
/// If `model` lacks a weight for that head.
pub fn save(
    model: &Group,
    lora: &LoraSettings,
    head: Head,
    source: &Artifact,
    builder: &mut ArtifactBuilder,
    info: &CheckpointInfo,
) -> StageResult<()> {
    let by_name = model.first().parameters().by_name();
    let (mut specs, mut slots) = specs(model.config(), head);
    lora.extend(&mut specs, &mut slots);
    for spec in &specs {
        let slot = by_name[spec.name.as_str()];
        if model.first().is_frozen(slot) {
            let entry = source.manifest().entry(&spec.name).ok_or_else(|| {
                StageError::invalid(format!(
                    "checkpoint {} has no tensor `{}`, which its adapter needs",
                    source.digest().short(),
                    spec.name
                ))
            })?;
            builder.share(entry)?;
            continue;
        }
        let shape: Vec<u64> = spec.shape.iter().map(|size| *size as u64).collect();
        let name = if is_factor(&spec.name) { entry_name(info.adapters.len(), &spec.name) } else { spec.name.clone() };
        builder.put_tensor(&name, Dtype::F32, &shape, &bytes(&model.weight(slot)?))?;
    }
    share_adapters(source, builder)?;
    let adapters = [&info.adapters[..], std::slice::from_ref(lora)].concat();
    let info = CheckpointInfo { model: model.config().clone(), head, adapters, ..info.clone() };
    builder.metadata(serde_json::to_value(info).map_err(|error| StageError::invalid(error.to_string()))?);
    Ok(())
}

/// Shares the factors of all adapters of `source`.
///
/// # Errors
/// If the store cannot be written.
pub fn share_adapters(source: &Artifact, builder: &mut ArtifactBuilder) -> StageResult<()> {
    for entry in source.manifest().entries.iter().filter(|entry| is_factor(&entry.name)) {
        builder.share(entry)?;
    }
    Ok(())
}

/// Whether two artifacts hold the same weights: then one copy in memory serves both.
pub fn same_weights(one: &Artifact, other: &Artifact) -> bool {
    let tensors = |artifact: &Artifact| -> Vec<_> {
        let entries = artifact.manifest().entries.iter().filter(|entry| entry.dtype.is_some());
        entries.map(|entry| (entry.name.clone(), entry.digest, entry.dtype)).collect()
    };
    let of = |artifact: &Artifact| artifact.manifest().metadata.get("adapters").cloned();
    tensors(one) == tensors(other) && of(one) == of(other)
}
