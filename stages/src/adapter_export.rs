//! The adapters of a model artifact as a directory that PEFT loads onto the model below them.

use std::{fs, path::Path};

use rlflow_api::{Artifact, StageError, StageResult};
use rlflow_hf::{
    Role,
    peft::{ADAPTER_CONFIG, ADAPTER_MODEL, AdapterConfig, is_alike, tensor_name},
    safetensors::{Header, TensorInfo},
};
use rlflow_kernels::LowRank;
use rlflow_model::{
    CheckpointInfo, adapter,
    checkpoint::{self, bytes},
    lora::TargetModule,
    parameters::{ParameterSpec, SCORE_WEIGHT, specs},
};

use crate::{
    export::{Exported, failed},
    import::head_of,
};

/// A tensor of the file: name, shape, elements.
type Tensor = (String, [usize; 2], Vec<f32>);

/// Writes the adapters of `model` into `folder`, which is there and empty.
///
/// # Errors
/// If it has none, its family's projections are not PEFT's, or the file system refuses.
pub fn write(model: &Artifact, role: Role, folder: &Path) -> StageResult<Exported> {
    let info = CheckpointInfo::of(model)?;
    if info.adapters.is_empty() {
        return Err(StageError::invalid_with_hint(
            format!("{} has no adapter: all its weights were trained", model.digest().short()),
            "export it without `--adapter`, or train it with `lora`",
        ));
    }
    if !is_alike(&info.model) {
        return Err(StageError::invalid_with_hint(
            "GPT-2's files hold queries, keys and values in one projection, for which PEFT has one adapter and rlflow three",
            "export it without `--adapter`: the weights with the adapter merged into them",
        ));
    }
    let mut tensors: Vec<Tensor> = Vec::new();
    let mut modules: Vec<TargetModule> = Vec::new();
    let (specs, _) = specs(&info.model, head_of(role));
    for spec in &specs {
        if let Some(stacked) = stacked(model, &info, spec)? {
            modules.extend(TargetModule::of(&spec.name));
            tensors.extend(stacked.into_iter().map(|(name, shape, values)| (tensor_name(&name), shape, values)));
        }
        if spec.name == SCORE_WEIGHT {
            tensors.push((tensor_name(SCORE_WEIGHT), [spec.shape[0], spec.shape[1]], checkpoint::weight(model, spec)?));
        }
    }
    modules.sort();
    modules.dedup();
    // The alphabet's order, as PEFT writes them.
    tensors.sort_by(|a, b| a.0.cmp(&b.0));

    let only = if let [lora] = &info.adapters[..] { Some(lora) } else { None };
    let rank = info.adapters.iter().map(|lora| lora.rank).sum();
    let mut target_modules: Vec<String> = modules.into_iter().map(|module| module.name().to_owned()).collect();
    target_modules.sort();
    let config = AdapterConfig {
        role,
        rank,
        alpha: only.map_or(rank as f64, |lora| lora.alpha),
        dropout: only.map_or(0.0, |lora| lora.dropout),
        target_modules,
        layers: None,
        base_model: None,
    };
    let mut start = 0;
    let infos: Vec<TensorInfo> = tensors
        .iter()
        .map(|(name, shape, values)| {
            let size_bytes = 4 * values.len() as u64;
            start += size_bytes;
            let shape = shape.iter().map(|size| *size as u64).collect();
            TensorInfo { name: name.clone(), dtype: "F32".into(), shape, start: start - size_bytes, size_bytes }
        })
        .collect();
    let mut content = Header::encode(&infos);
    tensors.iter().for_each(|(_, _, values)| content.extend(bytes(values)));
    for (name, content) in [(ADAPTER_MODEL, content), (ADAPTER_CONFIG, config.to_json())] {
        let path = folder.join(name);
        fs::write(&path, content).map_err(failed("write", &path))?;
    }
    let mut notes = Vec::new();
    if only.is_none() {
        notes.push(format!("{} adapters that were trained one after the other are written as one of rank {rank}", info.adapters.len()));
    }
    notes.push("the model below is that of the stage which the first adapter was trained on: export that one too".into());
    Ok(Exported { files: vec![ADAPTER_CONFIG.into(), ADAPTER_MODEL.into()], size_bytes: start, notes })
}

/// The factors of one weight. Several adapters are one whose factors lie side by side: `[A1; A2]` and `[s1 B1, s2 B2]`; one that leaves this
/// weight alone counts as zero, so that all have one rank.
fn stacked(model: &Artifact, info: &CheckpointInfo, spec: &ParameterSpec) -> StageResult<Option<[Tensor; 2]>> {
    let found =
        info.adapters.iter().enumerate().map(|(at, lora)| adapter::factors(model, at, lora, spec)).collect::<StageResult<Vec<_>>>()?;
    let Some(names) = info.adapters.iter().find_map(|lora| lora.factors(spec)) else { return Ok(None) };
    let (out, columns) = (spec.shape[0], spec.shape[1]);
    let rank: usize = info.adapters.iter().map(|lora| lora.rank).sum();
    let single = info.adapters.len() == 1;
    let (mut a, mut b) = (Vec::with_capacity(rank * columns), vec![0.0; out * rank]);
    let mut first = 0;
    for (lora, factors) in info.adapters.iter().zip(found) {
        let LowRank { a: down, b: up, scale } =
            factors.unwrap_or_else(|| LowRank { a: vec![0.0; lora.rank * columns], b: vec![0.0; out * lora.rank], scale: 0.0 });
        a.extend(down);
        for (row, own) in b.chunks_exact_mut(rank).zip(up.chunks_exact(lora.rank)) {
            let own = own.iter().map(|value| if single { *value } else { scale * value });
            row[first..first + lora.rank].iter_mut().zip(own).for_each(|(to, from)| *to = from);
        }
        first += lora.rank;
    }
    Ok(Some([(names.a.name, [rank, columns], a), (names.b.name, [out, rank], b)]))
}
