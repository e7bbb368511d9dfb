//! The adapters of a model artifact as a directory that PEFT loads onto the model below them.

use std::{collections::BTreeMap, fs, path::Path};

use rlflow_api::{Architecture, Artifact, StageError, StageResult};
use rlflow_hf::{
    Role,
    peft::{ADAPTER_CONFIG, ADAPTER_MODEL, AdapterConfig, module_name, module_path, tensor_name},
    safetensors::{Header, TensorInfo},
};
use rlflow_kernels::LowRank;
use rlflow_model::{
    CheckpointInfo, LoraSettings, adapter,
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
/// If it has none, or the file system refuses.
pub fn write(model: &Artifact, role: Role, folder: &Path) -> StageResult<Exported> {
    let info = CheckpointInfo::of(model)?;
    if info.adapters.is_empty() {
        return Err(StageError::invalid_with_hint(
            format!("{} has no adapter: all its weights were trained", model.digest().short()),
            "export it without `--adapter`, or train it with `lora`",
        ));
    }
    let architecture = info.model.architecture;
    let (specs, _) = specs(&info.model, head_of(role));
    let projections: Vec<&ParameterSpec> = specs.iter().filter(|spec| TargetModule::of(&spec.name).is_some()).collect();
    let path = |spec: &ParameterSpec| module_path(architecture, &spec.name);
    let modules: Vec<&[&ParameterSpec]> = projections.chunk_by(|a, b| path(a) == path(b)).collect();
    let stack = Stack::new(model, &info, &modules);
    let mut tensors: Vec<Tensor> = Vec::new();
    let mut ranks: BTreeMap<String, usize> = BTreeMap::new();
    for module in &modules {
        let Some([a, b]) = stack.factors(module)? else { continue };
        ranks.insert(module_name(architecture, &path(module[0])).to_owned(), a.1[0]);
        tensors.extend([a, b]);
    }
    for spec in specs.iter().filter(|spec| spec.name == SCORE_WEIGHT) {
        let values = checkpoint::weight(model, spec)?;
        tensors.push((tensor_name(architecture, SCORE_WEIGHT), [spec.shape[0], spec.shape[1]], values));
    }
    // The alphabet's order, as PEFT writes them.
    tensors.sort_by(|a, b| a.0.cmp(&b.0));

    let target_modules: Vec<String> = ranks.keys().cloned().collect();
    let rank = ranks.values().copied().min().unwrap_or_default();
    ranks.retain(|_, other| *other != rank);
    let config = AdapterConfig {
        role,
        rank,
        alpha: stack.alpha(rank),
        alphas: ranks.iter().map(|(module, rank)| (module.clone(), stack.alpha(*rank))).collect(),
        ranks,
        scaled_by_root: false,
        transposed: architecture == Architecture::Gpt2,
        dropout: common(info.adapters.iter().map(|lora| lora.dropout)).unwrap_or_default(),
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
    if info.adapters.len() > 1 {
        notes.push(format!("{} adapters are written as one", info.adapters.len()));
    }
    notes.push("the model below is that of the stage which the first adapter was trained on: export that one too".into());
    Ok(Exported { files: vec![ADAPTER_CONFIG.into(), ADAPTER_MODEL.into()], size_bytes: start, notes })
}

/// The adapters of a model as the one that PEFT has.
struct Stack<'m> {
    model: &'m Artifact,
    info: &'m CheckpointInfo,
    /// Of each adapter: whether projections in one module have one A in all blocks, as they have when they came from PEFT.
    one_input: Vec<bool>,
    /// The factor on what adapters add, where it is that of all; otherwise it goes into B.
    scale: Option<f64>,
}

impl<'m> Stack<'m> {
    fn new(model: &'m Artifact, info: &'m CheckpointInfo, modules: &[&[&ParameterSpec]]) -> Self {
        let has_one = |(at, lora): (usize, &LoraSettings), module: &[&ParameterSpec]| {
            let names = module.iter().filter_map(|spec| lora.factors(spec)).map(|factors| adapter::entry_name(at, &factors.a.name));
            let mut digests = names.map(|name| model.manifest().entry(&name).map(|entry| entry.digest));
            digests.next().is_none_or(|first| digests.all(|digest| digest == first))
        };
        let adapters = info.adapters.iter().enumerate();
        let one_input = adapters.map(|adapter| modules.iter().all(|module| has_one(adapter, module))).collect();
        Self { model, info, one_input, scale: common(info.adapters.iter().map(LoraSettings::scale)) }
    }

    /// The numerator, over `rank`, of the factor on what it adds.
    fn alpha(&self, rank: usize) -> f64 {
        let first = &self.info.adapters[0];
        match self.scale {
            None => rank as f64,
            Some(_) if rank == first.rank => first.alpha,
            Some(_) => first.alpha * rank as f64 / first.rank as f64,
        }
    }

    /// The factors of a module, which holds some projections one above the other. Several adapters are one whose factors lie side by side:
    /// `[A1; A2]` and `[s1 B1, s2 B2]`; so are those of several projections, each with zeros in B for the rows of the others.
    ///
    /// An adapter that leaves a module alone counts as zero, so that all modules have one rank. Those of GPT-2 differ anyway.
    fn factors(&self, module: &[&ParameterSpec]) -> StageResult<Option<[Tensor; 2]>> {
        let CheckpointInfo { adapters, model, .. } = self.info;
        let Some(names) = adapters.iter().find_map(|lora| module.iter().find_map(|spec| lora.factors(spec))) else { return Ok(None) };
        let widths: Vec<usize> = adapters
            .iter()
            .zip(&self.one_input)
            .map(|(lora, one_input)| match module.iter().filter(|spec| lora.adapts(&spec.name)).count() {
                0 if model.architecture == Architecture::Gpt2 => 0,
                _ if *one_input => lora.rank,
                count => lora.rank * count.max(1),
            })
            .collect();
        let rank: usize = widths.iter().sum();
        let out: usize = module.iter().map(|spec| spec.shape[0]).sum();
        let columns = module[0].shape[1];
        let (mut a, mut b): (Vec<f32>, Vec<f32>) = (Vec::with_capacity(rank * columns), vec![0.0; out * rank]);
        let mut first = 0;
        for (at, (lora, width)) in adapters.iter().zip(widths).enumerate() {
            let (mut column, mut rows_above) = (first, 0);
            for spec in module {
                let rows = &mut b[rows_above * rank..][..spec.shape[0] * rank];
                rows_above += spec.shape[0];
                let Some(LowRank { a: down, b: up, scale }) = adapter::factors(self.model, at, lora, spec)? else { continue };
                for (row, own) in rows.chunks_exact_mut(rank).zip(up.chunks_exact(lora.rank)) {
                    let own = own.iter().map(|value| if self.scale.is_some() { *value } else { scale * value });
                    row[column..column + lora.rank].iter_mut().zip(own).for_each(|(to, from)| *to = from);
                }
                if a.len() == column * columns {
                    a.extend(down);
                }
                column += if self.one_input[at] { 0 } else { lora.rank };
            }
            first += width;
            a.resize(first * columns, 0.0);
        }
        let name = |factor: &ParameterSpec| tensor_name(model.architecture, &factor.name);
        Ok(Some([(name(&names.a), [rank, columns], a), (name(&names.b), [out, rank], b)]))
    }
}

/// The value that all have.
fn common<T: PartialEq>(mut values: impl Iterator<Item = T>) -> Option<T> {
    let first = values.next()?;
    values.all(|value| value == first).then_some(first)
}
