use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    path::PathBuf,
};

use rlflow_api::{
    Artifact, ArtifactMeta, ArtifactType, DataFile, Description, Digest, Dtype, InputMeta, ModelConfig, Needs, Problem, RunContext,
    StageError, StageResult,
};
use rlflow_hf::{
    Checkpoint, HfError, Piece, Role, WantedTensor, WeightFile, converted,
    peft::{ADAPTER_CONFIG, ADAPTER_MODEL, AdapterConfig, PREFIX, file_tensors, is_called, module_name, module_path},
    pickled,
    safetensors::Header,
};
use rlflow_model::{
    CheckpointInfo, LoraSettings, ParameterSpec, adapter,
    lora::{TargetModule, TargetModules},
    parameters::{SCORE_WEIGHT, specs},
};

use super::{
    ImportConfig,
    directory::{Source, find, head_of, pickles_beside, read},
    problem,
};
use crate::models;

/// An adapter in PEFT's format, checked against the model that it is put on.
struct AdapterFiles {
    config: AdapterConfig,
    /// One for each rank and alpha that it has.
    loras: Vec<LoraSettings>,
    tensors: Checkpoint,
    digest: Option<Digest>,
}

impl AdapterFiles {
    /// `shown` names the directory in messages.
    fn open(files: &[Source], shown: &str, model: &ModelConfig) -> Result<Self, Vec<StageError>> {
        let one = |error: StageError| vec![error];
        let shown = shown.trim_end_matches('/');
        let in_directory = |error: HfError| StageError::from(HfError { file: format!("{shown}/{}", error.file), ..error });
        let config = read(files, ADAPTER_CONFIG, shown).map_err(one)?;
        let config = AdapterConfig::parse(&config).map_err(|errors| errors.into_iter().map(in_directory).collect::<Vec<_>>())?;
        let pickles = pickles_beside(files);
        if find(files, ADAPTER_MODEL, shown).is_err() && !pickles.is_empty() {
            let convert = "convert it where you trust it: `PeftModel.from_pretrained(BASE, DIR).save_pretrained(NEW)` in Python";
            return Err(one(pickled(shown, pickles.iter().map(String::as_str), convert).into()));
        }
        let file = find(files, ADAPTER_MODEL, shown).map_err(one)?;
        let digest = file.hashed.as_ref().map(|file| file.digest);
        let file = WeightFile { name: file.name.clone(), shown: format!("{shown}/{}", file.name), path: file.path.clone() };
        let loras = adapters(&config, &file, model).map_err(one)?;
        let (specs, _) = specs(model, head_of(config.role));
        let mut wanted: Vec<WantedTensor> = Vec::new();
        for spec in &specs {
            if has_adapter(&config, &spec.name) {
                wanted.extend(loras.iter().filter_map(|lora| lora.factors(spec)).flat_map(|factors| [factors.a, factors.b]).map(tensor));
            }
            wanted.extend((spec.name == SCORE_WEIGHT).then(|| tensor(spec.clone())));
        }
        let wanted = file_tensors(model.architecture, &wanted);
        let tensors = Checkpoint::open(vec![file], None, model.architecture, wanted, false, ADAPTER_CONFIG, shown).map_err(one)?;
        Ok(Self { config, loras, tensors, digest })
    }

    /// The type of the model with it, given that of the model below.
    fn artifact_type(&self, below: &str, shown: &str) -> StageResult<ArtifactType> {
        match (self.config.role, Role::of(below)) {
            (Role::Policy, Some(Role::Policy)) => Ok(ArtifactType::Policy),
            (Role::Policy, _) => {
                Err(HfError::new(shown, format!("this is an adapter of a language model, and the model below is a {below}"))
                    .hint("put it on the policy that it was trained on")
                    .into())
            }
            (_, Some(Role::Critic)) => Ok(ArtifactType::Critic),
            _ => Ok(ArtifactType::Reward),
        }
    }
}

/// Whether the block of a weight has an adapter.
fn has_adapter(config: &AdapterConfig, weight: &str) -> bool {
    let block = || weight.strip_prefix("model.layers.")?.split('.').next()?.parse::<u64>().ok();
    config.layers.as_ref().is_none_or(|layers| block().is_some_and(|block| layers.contains(&block)))
}

fn tensor(spec: ParameterSpec) -> WantedTensor {
    WantedTensor { shape: spec.shape.iter().map(|size| *size as u64).collect(), name: spec.name }
}

/// Which of the adapters a factor is of, if it is one.
fn number_of(factor: &str, loras: &[LoraSettings]) -> Option<usize> {
    let (stem, _) = factor.split_once(".lora_")?;
    loras.iter().position(|lora| lora.adapts(&format!("{stem}.weight")))
}

/// The adapters on the projections that the config lists, and on those that the file has factors of: one for each rank and alpha.
fn adapters(config: &AdapterConfig, file: &WeightFile, model: &ModelConfig) -> StageResult<Vec<LoraSettings>> {
    let failed = |source| StageError::Io { operation: format!("read {}", file.shown), source };
    let mut input = File::open(&file.path).map_err(failed)?;
    let size_bytes = input.metadata().map_err(failed)?.len();
    let (header, _) = Header::read(&mut input, size_bytes, &file.shown)?;
    let found: BTreeSet<&str> =
        header.tensors.iter().filter_map(|tensor| tensor.name.strip_prefix(PREFIX)?.strip_suffix(".lora_A.weight")).collect();
    // Where PEFT has them, and what they are here: GPT-2's `c_attn` is three.
    let (specs, _) = specs(model, head_of(config.role));
    let projections: Vec<(String, TargetModule)> =
        specs.iter().filter_map(|spec| Some((module_path(model.architecture, &spec.name), TargetModule::of(&spec.name)?))).collect();
    let refused = |message: String| {
        HfError::new(&file.shown, message).hint("merge it into its base (`merge_and_unload()` in PEFT) and import the result")
    };

    let named = config.target_modules.iter().chain(config.ranks.keys()).chain(config.alphas.keys());
    for name in named {
        if !projections.iter().any(|(path, _)| is_called(path, name)) {
            let mut names: Vec<&str> = Vec::new();
            for name in projections.iter().map(|(path, _)| module_name(model.architecture, path)) {
                if !names.contains(&name) {
                    names.push(name);
                }
            }
            return Err(refused(format!("it has adapters on `{name}`; rlflow's are on {}", names.join(", "))).into());
        }
    }
    let mut groups: Vec<((usize, f64), Vec<TargetModule>)> = Vec::new();
    for module in TargetModule::ALL {
        let paths: Vec<&str> = projections.iter().filter(|(_, own)| *own == module).map(|(path, _)| path.as_str()).collect();
        let is_listed = |path: &str| config.target_modules.iter().any(|name| is_called(path, name));
        if !paths.iter().any(|path| found.contains(path) || is_listed(path)) {
            continue;
        }
        let mut sizes: Vec<(usize, f64)> = paths.iter().map(|path| config.size(path)).collect();
        sizes.dedup();
        let [size] = sizes[..] else {
            let name = module_name(model.architecture, paths[0]);
            return Err(
                refused(format!("its adapters on `{name}` have another rank or alpha in some blocks, and rlflow's are alike")).into()
            );
        };
        match groups.iter_mut().find(|(of, _)| *of == size) {
            Some((_, modules)) => modules.push(module),
            None => groups.push((size, vec![module])),
        }
    }
    if groups.is_empty() {
        return Err(HfError::new(&file.shown, "it holds no adapter: no tensor is called `...lora_A.weight`").into());
    }
    let adapter = |((rank, alpha), modules)| {
        let mut lora = LoraSettings { rank, alpha, dropout: config.dropout, target_modules: TargetModules::Named(modules) };
        lora.normalise();
        lora
    };
    Ok(groups.into_iter().map(adapter).collect())
}

/// What planning knows of the model on `below` with the adapter in a directory.
pub fn describe(config: &ImportConfig, files: &[PathBuf], below: &InputMeta) -> Result<Description, Vec<Problem>> {
    let given = [("context", config.context.is_some()), ("chat_template", config.chat_template.is_some())];
    let problems: Vec<Problem> = given
        .into_iter()
        .filter(|(_, given)| *given)
        .map(|(setting, _)| {
            let message = format!("with `inputs.model` the stage takes an adapter, whose `{setting}` is that of the model below");
            Problem::new("conflicting_settings", setting, message).hint("set it on the stage of that model")
        })
        .collect();
    if !problems.is_empty() {
        return Err(problems);
    }
    let meta = &below.meta;
    let Some(model) = &meta.model else { return Ok(Description::default()) };
    let sources: Vec<Source> = files.iter().map(|path| Source::of(path, None)).collect();
    let adapter = AdapterFiles::open(&sources, &config.path, model).map_err(|errors| errors.iter().map(problem).collect::<Vec<_>>())?;
    let artifact_type = adapter.artifact_type(meta.artifact_type.name(), &config.path).map_err(|error| vec![problem(&error)])?;
    let bytes = 4 * adapter.loras.iter().map(|lora| lora.parameter_count(model)).sum::<u64>();
    let described = ArtifactMeta { artifact_type, size_bytes: meta.size_bytes.map(|size| size + bytes), ..meta.clone() };
    let tokenizer =
        ArtifactMeta { tokenizer: meta.tokenizer.clone(), vocab_size: meta.vocab_size, ..ArtifactMeta::new(ArtifactType::Tokenizer) };
    let outputs = BTreeMap::from([("model".to_owned(), described), ("tokenizer".to_owned(), tokenizer)]);
    Ok(Description::new(outputs, Needs::default()))
}

/// Puts the adapter in `files` on the model `below`, whose tensors it shares.
pub fn run(
    config: &ImportConfig,
    files: &[DataFile],
    below: &Artifact,
    context: &RunContext<'_>,
) -> StageResult<BTreeMap<String, Artifact>> {
    let info = CheckpointInfo::of(below)?;
    let sources: Vec<Source> = files.iter().map(|file| Source::of(&file.path, Some(file))).collect();
    let adapter = AdapterFiles::open(&sources, &config.path, &info.model).map_err(super::first)?;
    let artifact_type = adapter.artifact_type(&below.manifest().artifact_type, &config.path)?;
    if let Some(name) = &adapter.config.base_model {
        context.note(format!("the adapter says that it was trained on {name}: the model below must be that one"));
    }
    context.phase("reading the adapter");
    let mut builder = context.output(artifact_type);
    models::share_files(&mut builder, below)?;
    let head = head_of(adapter.config.role);
    let number = info.adapters.len();
    let (specs, _) = specs(&info.model, head);
    for spec in specs.iter().filter(|spec| spec.name != SCORE_WEIGHT) {
        let entry = below.manifest().entry(&spec.name);
        builder.share(
            entry.ok_or_else(|| StageError::invalid(format!("checkpoint {} has no tensor `{}`", below.digest().short(), spec.name)))?,
        )?;
    }
    adapter::share_adapters(below, &mut builder)?;
    let (mut elements, mut size_bytes) = (0, 0);
    adapter.tensors.read(adapter.digest.as_slice(), |Piece { weight, dtype, content }| {
        context.check_cancelled()?;
        let own = number_of(&weight.name, &adapter.loras);
        let name = own.map_or_else(|| weight.name.clone(), |own| adapter::entry_name(number + own, &weight.name));
        let content = converted(content, dtype, Dtype::F32);
        builder.put_tensor(&name, Dtype::F32, &weight.shape, &content)?;
        elements += content.len() / 4;
        size_bytes += content.len();
        Ok(())
    })?;
    // Blocks that are left alone have an adapter that adds nothing.
    for spec in specs.iter().filter(|spec| !has_adapter(&adapter.config, &spec.name)) {
        for (own, lora) in adapter.loras.iter().enumerate() {
            for factor in lora.factors(spec).into_iter().flat_map(|factors| [factors.a, factors.b]) {
                let shape: Vec<u64> = factor.shape.iter().map(|size| *size as u64).collect();
                builder.put_tensor(&adapter::entry_name(number + own, &factor.name), Dtype::F32, &shape, &vec![0; 4 * factor.len()])?;
            }
        }
    }
    let adapters = [info.adapters, adapter.loras].concat();
    let info = CheckpointInfo { head, adapters, role: None, ..info };
    builder.metadata(serde_json::to_value(&info).map_err(|error| StageError::invalid(error.to_string()))?);
    let tokenizer = models::tokenizer(below)?;
    let values = [("parameters", elements as f64), ("size_bytes", size_bytes as f64), ("vocab_size", tokenizer.vocab_size() as f64)];
    context.metrics(0, &values);
    let tokenizer = models::publish_tokenizer(context, &tokenizer)?;
    Ok(BTreeMap::from([("model".into(), builder.publish()?), ("tokenizer".into(), tokenizer)]))
}
