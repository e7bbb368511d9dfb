//! A model artifact as a Hugging Face checkpoint directory.
//!
//! Weights leave with the element type that they are stored in: those of an import as they came, trained ones as fp32, adapters merged into
//! them. What an
//! imported checkpoint said in `config.json` and `generation_config.json` is carried through.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use rlflow_api::{Artifact, Dtype, StageError, StageResult};
use rlflow_hf::{
    FileTensor, Role, WantedTensor, Writer,
    config::{self, CONFIG, TokenIds},
    converted,
    names::file_tensors,
};
use rlflow_model::{CheckpointInfo, ParameterSpec, adapter, checkpoint, parameters::specs};
use rlflow_text::{CONFIG_ENTRY, ChatTokenizer, TOKENIZER_ENTRY, TokenizerConfig};
use serde_json::{Map, Value, json};

use crate::{
    adapter_export,
    import::{GENERATION_CONFIG, head_of},
};

/// How to export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportOptions {
    /// Element type of all weights; as they are stored without.
    pub dtype: Option<Dtype>,
    /// Most bytes of tensors in one file.
    pub max_shard_bytes: u64,
    /// Only what adapters add, in PEFT's format, rather than the weights with that added to them.
    pub adapter: bool,
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exported {
    /// Names of the files.
    pub files: Vec<String>,
    /// Bytes of the weights.
    pub size_bytes: u64,
    /// What to know about the result.
    pub notes: Vec<String>,
}

/// Writes `model` to `folder`, which must not exist or be empty. It appears under its name when it is complete.
///
/// # Errors
/// If the artifact is not a model, no family of transformers is like it, or the file system refuses.
pub fn export(model: &Artifact, folder: &Path, options: &ExportOptions) -> StageResult<Exported> {
    let artifact_type = &model.manifest().artifact_type;
    let role = Role::of(artifact_type).ok_or_else(|| {
        StageError::invalid_with_hint(
            format!("an artifact of type `{artifact_type}` is not a model"),
            "name a stage whose output is a policy, a reward model or a critic",
        )
    })?;
    let temporary = prepare(folder)?;
    let written = match options.adapter {
        true => adapter_export::write(model, role, &temporary.0)?,
        false => write(model, role, &temporary.0, options)?,
    };
    // An empty folder of that name gives way.
    if folder.exists() {
        fs::remove_dir(folder).map_err(failed("replace", folder))?;
    }
    fs::rename(&temporary.0, folder).map_err(failed("create", folder))?;
    Ok(written)
}

/// A folder that is removed unless it has been renamed.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Makes a folder beside the one that is wanted.
fn prepare(folder: &Path) -> StageResult<Temporary> {
    if folder.symlink_metadata().is_ok() {
        let mut entries = fs::read_dir(folder).map_err(failed("look into", folder))?;
        if entries.next().is_some() {
            return Err(StageError::invalid_with_hint(format!("`{}` is not empty", folder.display()), "name a new directory"));
        }
    }
    let Some(name) = folder.file_name() else {
        return Err(StageError::invalid_with_hint(format!("`{}` names no directory", folder.display()), "name a new directory"));
    };
    let parent = folder.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(failed("create", parent))?;
    let path = parent.join(format!(".{}.export-{}", name.to_string_lossy(), std::process::id()));
    fs::create_dir(&path).map_err(failed("create", &path))?;
    Ok(Temporary(path))
}

pub(crate) fn failed(what: &str, path: &Path) -> impl FnOnce(io::Error) -> StageError {
    let operation = format!("{what} {}", path.display());
    move |source| StageError::Io { operation, source }
}

fn write(model: &Artifact, role: Role, folder: &Path, options: &ExportOptions) -> StageResult<Exported> {
    let info = CheckpointInfo::of(model)?;
    let tokenizer = ChatTokenizer::load(model)?;
    let mut notes = Vec::new();

    let (specs, _) = specs(&info.model, head_of(role));
    let wanted: Vec<WantedTensor> = specs
        .into_iter()
        .map(|spec| WantedTensor { name: spec.name, shape: spec.shape.into_iter().map(|size| size as u64).collect() })
        .collect();
    let tensors = file_tensors(info.model.architecture, &wanted)
        .into_iter()
        .map(|tensor| Ok((options.dtype.map_or_else(|| stored_dtype(model, &tensor.parts[0]), Ok)?, tensor)))
        .map(|found| found.map(|(dtype, tensor)| (tensor, dtype)))
        .collect::<StageResult<Vec<(FileTensor, Dtype)>>>()?;
    let files_before = config_files(model, role, &info, &tokenizer, &tensors, &mut notes)?;

    let writer = Writer { folder, max_shard_bytes: options.max_shard_bytes };
    let mut size_bytes = 0;
    let mut files = writer.write(&tensors, |weight, dtype| {
        let (stored, content) = content(model, &info, weight)?;
        let content = converted(content, stored, dtype);
        size_bytes += content.len() as u64;
        Ok(content)
    })?;
    for (name, content) in files_before {
        let path = folder.join(name);
        fs::write(&path, content).map_err(failed("write", &path))?;
        files.push(name.to_owned());
    }
    files.sort();
    Ok(Exported { files, size_bytes, notes })
}

/// Everything but the weights.
fn config_files(
    model: &Artifact,
    role: Role,
    info: &CheckpointInfo,
    tokenizer: &ChatTokenizer,
    tensors: &[(FileTensor, Dtype)],
    notes: &mut Vec<String>,
) -> StageResult<Vec<(&'static str, Vec<u8>)>> {
    let tokenizer_config = model.read(CONFIG_ENTRY)?;
    let known = TokenizerConfig::parse(&tokenizer_config)?;
    let rows = info.model.vocab_size as u32;
    let id =
        |key: &str| known.special_tokens().into_iter().find(|(name, _)| name == key).and_then(|(_, token)| tokenizer.token_to_id(&token));
    let ids = TokenIds { bos: id("bos_token"), eos: Some(tokenizer.eos_id()), pad: Some(tokenizer.pad_id()).filter(|id| *id < rows) };

    let mut bytes: Vec<(Dtype, u64)> = Vec::new();
    for (tensor, dtype) in tensors {
        let more = tensor.shape.iter().product::<u64>() * dtype.size_bytes();
        match bytes.iter_mut().find(|(known, _)| known == dtype) {
            Some((_, sum)) => *sum += more,
            None => bytes.push((*dtype, more)),
        }
    }
    let dtype = bytes.iter().max_by_key(|(_, sum)| *sum).map_or(Dtype::F32, |(dtype, _)| *dtype);

    let carried = |name: &str| model.manifest().entry(name).map(|_| model.read(name)).transpose();
    let carried_config = carried(CONFIG)?;
    let mut files = vec![(CONFIG, config::write(&info.model, role, dtype, &ids, carried_config.as_deref())?)];
    if role == Role::Policy {
        files.push((
            GENERATION_CONFIG,
            match carried(GENERATION_CONFIG)? {
                Some(content) => content.to_vec(),
                None => generation_config(&ids, tokenizer),
            },
        ));
    }
    files.push((TOKENIZER_ENTRY, model.read(TOKENIZER_ENTRY)?.to_vec()));
    let mut tokenizer_config: Map<String, Value> =
        serde_json::from_slice(&tokenizer_config).map_err(|error| StageError::invalid(format!("{CONFIG_ENTRY}: {error}")))?;
    if ids.pad.is_none() {
        // Other tools embed what they pad with.
        tokenizer_config.insert("pad_token".into(), tokenizer_config.get("eos_token").cloned().unwrap_or_default());
        notes.push("the model has no row for a pad token: the exported tokenizer pads with its EOS token".into());
    }
    if let Some(template) = known.chat_template()? {
        files.push(("chat_template.jinja", template.as_bytes().to_vec()));
    }
    files.push((CONFIG_ENTRY, config::pretty(&tokenizer_config)));
    Ok(files)
}

fn generation_config(ids: &TokenIds, tokenizer: &ChatTokenizer) -> Vec<u8> {
    let mut object = Map::new();
    if let Some(bos) = ids.bos {
        object.insert("bos_token_id".into(), bos.into());
    }
    object.insert("eos_token_id".into(), json!(tokenizer.stop_ids()));
    if let Some(pad) = ids.pad {
        object.insert("pad_token_id".into(), pad.into());
    }
    config::pretty(&object)
}

/// A weight's bytes and their element type: those that are stored, or in single precision where an adapter adds to them.
fn content(model: &Artifact, info: &CheckpointInfo, weight: &WantedTensor) -> StageResult<(Dtype, Vec<u8>)> {
    if !info.adapters.iter().any(|lora| lora.adapts(&weight.name)) {
        return Ok((stored_dtype(model, weight)?, model.read(&weight.name)?.to_vec()));
    }
    let spec = ParameterSpec { name: weight.name.clone(), shape: weight.shape.iter().map(|size| *size as usize).collect() };
    Ok((Dtype::F32, checkpoint::bytes(&adapter::merged(model, &info.adapters, &spec)?)))
}

fn stored_dtype(model: &Artifact, weight: &WantedTensor) -> StageResult<Dtype> {
    let entry = model.manifest().entry(&weight.name).filter(|entry| entry.shape == weight.shape);
    entry.and_then(|entry| entry.dtype).ok_or_else(|| {
        StageError::invalid(format!("checkpoint {} has no tensor `{}` of shape {:?}", model.digest().short(), weight.name, weight.shape))
    })
}
