use std::{
    fs,
    path::{Path, PathBuf},
};

use rlflow_api::{DataFile, Digest, StageError, StageResult};
use rlflow_hf::{
    Checkpoint, HfConfig, HfError, Role, WantedTensor, WeightFile, WeightFiles,
    config::CONFIG,
    is_pickle, lone_adapter,
    names::file_tensors,
    peft::{ADAPTER_CONFIG, ADAPTER_MODEL},
};
use rlflow_model::{Head, parameters::specs};
use rlflow_text::read_file;

/// Endings of the files that belong to a checkpoint: nothing else in its directory is looked at.
pub const ENDINGS: &[&str] = &[
    // generation_config.json, tokenizer_config.json and adapter_config.json too.
    "config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    ".safetensors",
    ".safetensors.index.json",
];

/// A checkpoint directory whose config and tensors have been checked against each other.
#[derive(Debug)]
pub struct Directory {
    /// What `config.json` says.
    pub config: HfConfig,
    /// The weights' files.
    pub checkpoint: Checkpoint,
    /// Number of weights.
    pub weights: usize,
    /// Digests of the weights' files, where they are known.
    pub digests: Vec<Digest>,
    files: Vec<Source>,
    shown: String,
}

/// A file of the directory, with its digest once it is hashed.
#[derive(Debug, Clone)]
pub(super) struct Source {
    pub name: String,
    pub path: PathBuf,
    pub hashed: Option<DataFile>,
}

impl Source {
    pub fn of(path: &Path, hashed: Option<&DataFile>) -> Self {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        Self { name, path: path.to_owned(), hashed: hashed.cloned() }
    }
}

impl Directory {
    /// From the files as planning knows them. `shown` names the directory in messages.
    ///
    /// # Errors
    /// Everything that is wrong with the config; else the first thing that is wrong with the weights.
    pub fn at(files: &[PathBuf], shown: &str, context: Option<usize>) -> Result<Self, Vec<StageError>> {
        Self::open(files.iter().map(|path| Source::of(path, None)).collect(), shown, context)
    }

    /// From the files as running knows them: what is read must be what was hashed.
    ///
    /// # Errors
    /// As [`Self::at`].
    pub fn of(files: &[DataFile], shown: &str, context: Option<usize>) -> Result<Self, Vec<StageError>> {
        Self::open(files.iter().map(|file| Source::of(&file.path, Some(file))).collect(), shown, context)
    }

    fn open(files: Vec<Source>, shown: &str, context: Option<usize>) -> Result<Self, Vec<StageError>> {
        let one = |error: StageError| vec![error];
        let in_directory =
            |error: HfError| StageError::from(HfError { file: format!("{}/{}", shown.trim_end_matches('/'), error.file), ..error });
        let there = |name: &str| files.iter().any(|file| file.name == name);
        if !there(CONFIG) && there(ADAPTER_CONFIG) {
            return Err(one(lone_adapter(shown).into()));
        }
        let config = read(&files, CONFIG, shown).map_err(one)?;
        let config = HfConfig::parse(&config, context).map_err(|errors| errors.into_iter().map(in_directory).collect::<Vec<_>>())?;
        let mut names: Vec<String> = files.iter().map(|file| file.name.clone()).collect();
        names.extend(pickles_beside(&files));
        let weight_files = WeightFiles::find(&names, shown, |name| read(&files, name, shown)).map_err(one)?;
        let (specs, _) = specs(&config.model, head_of(config.role));
        let wanted: Vec<WantedTensor> = specs
            .into_iter()
            .map(|spec| WantedTensor { name: spec.name, shape: spec.shape.into_iter().map(|size| size as u64).collect() })
            .collect();
        let weights = wanted.len();
        let tensors = file_tensors(config.model.architecture, &wanted);
        let sources: Vec<&Source> = weight_files.files.iter().filter_map(|name| files.iter().find(|file| file.name == *name)).collect();
        let digests = sources.iter().filter_map(|source| source.hashed.as_ref()).map(|file| file.digest).collect();
        let sources = sources
            .into_iter()
            .map(|source| {
                let shown = format!("{}/{}", shown.trim_end_matches('/'), source.name);
                WeightFile { name: source.name.clone(), shown, path: source.path.clone() }
            })
            .collect();
        let model = &config.model;
        let (index, tied) = (weight_files.index.as_ref(), model.tie_embeddings);
        let checkpoint = Checkpoint::open(sources, index, model.architecture, tensors, tied, CONFIG, shown).map_err(one)?;
        Ok(Self { checkpoint, config, weights, digests, files, shown: shown.to_owned() })
    }

    /// What stands on top.
    pub fn head(&self) -> Head {
        head_of(self.config.role)
    }

    /// Whether there is a file called `name`.
    ///
    /// # Errors
    /// If there is none.
    pub fn check_there(&self, name: &str) -> StageResult<()> {
        find(&self.files, name, &self.shown).map(drop)
    }

    /// Content of the file called `name`.
    ///
    /// # Errors
    /// If it is not there or cannot be read.
    pub fn read(&self, name: &str) -> StageResult<Vec<u8>> {
        read(&self.files, name, &self.shown)
    }

    /// The same of a file that need not be there.
    pub fn read_optional(&self, name: &str) -> StageResult<Option<Vec<u8>>> {
        if self.files.iter().any(|file| file.name == name) { self.read(name).map(Some) } else { Ok(None) }
    }
}

/// What stands on top of a model of this role.
pub(crate) const fn head_of(role: Role) -> Head {
    match role {
        Role::Policy => Head::Language,
        Role::Reward | Role::Critic => Head::Score,
    }
}

pub(super) fn find<'a>(files: &'a [Source], name: &str, shown: &str) -> StageResult<&'a Source> {
    files.iter().find(|file| file.name == name).ok_or_else(|| {
        let hint = match name {
            "tokenizer.json" => {
                "a tokenizer without it is converted by `AutoTokenizer.from_pretrained(DIR).save_pretrained(NEW)` in Python"
            }
            ADAPTER_CONFIG | ADAPTER_MODEL => {
                "with `inputs.model` the directory is that of an adapter as PEFT saves it; without it that of a whole model"
            }
            _ => "a checkpoint directory holds config.json, model.safetensors and tokenizer.json",
        };
        HfError::new(shown, format!("there is no `{name}`")).hint(hint).into()
    })
}

pub(super) fn read(files: &[Source], name: &str, shown: &str) -> StageResult<Vec<u8>> {
    let file = find(files, name, shown)?;
    match &file.hashed {
        Some(hashed) => read_file(hashed),
        None => fs::read(&file.path).map_err(|source| StageError::Io { operation: format!("read {}", file.path.display()), source }),
    }
}

/// Names of pickles in the directory: they are never read, but it must be said why.
pub(super) fn pickles_beside(files: &[Source]) -> Vec<String> {
    let entries = files.first().and_then(|file| fs::read_dir(file.path.parent()?).ok());
    let names = entries.into_iter().flatten().flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut names: Vec<String> = names.filter(|name| is_pickle(name)).collect();
    names.sort();
    names
}
