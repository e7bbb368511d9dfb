//! `tokenizer`: byte-level BPE trained on a corpus, or a finished one of Hugging Face, with its special tokens and chat template.

mod files;

use std::{collections::BTreeMap, path::PathBuf};

use rlflow_api::{
    Artifact, ArtifactMeta, ArtifactType, DataFile, DataSource, DescribeContext, Description, InputPort, Origin, OutputPort, Problem,
    RunContext, StageError, StageKind, StageResult,
};
use rlflow_text::{
    BpeOptions, ChatTemplate, ChatTokenizer, Message, Split, TextDataset, TextError, TokenizerConfig as TokenizerFile, TokenizerOptions,
    complete_tokenizer, read_file, train_bpe,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use self::files::Finished;
use crate::models;

/// Held-out text that is encoded to measure compression.
const MEASURED_BYTES: usize = 1 << 20;
/// Special tokens that a tokenizer read from a file may get: EOS, pad, and two of ChatML.
const MOST_ADDED: u64 = 4;

/// What a template may use.
const TEMPLATE_HINT: &str = "mend that line; a template is given `messages` (each with `role` and `content`), `tools`, `documents`, `add_generation_prompt` and the special tokens (`bos_token`, `eos_token`, ..)";

/// See the module.
pub struct Tokenizer;

/// Settings of `tokenizer`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TokenizerConfig {
    /// A `tokenizer.json` of any fast Hugging Face tokenizer, or the directory that it lies in, of which `tokenizer_config.json`,
    /// `special_tokens_map.json` and `chat_template.jinja` are read too. Relative to the workflow file. Without it one is trained on
    /// `inputs.corpus`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-setting" = "path"))]
    pub path: Option<String>,
    /// The `tokenizer_config.json` that belongs to `path` where that is a file: special tokens and chat template.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-setting" = "path"))]
    pub config: Option<String>,
    /// Most tokens of a trained tokenizer: special ones, 256 bytes, and merges. Default: 4096. Not with `path`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 264, max = 1_000_000), extend("x-unit" = "tokens"))]
    pub vocab_size: Option<usize>,
    /// How often two tokens must stand side by side in the corpus to be merged, at least. Default: 2. Not with `path`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1), extend("x-unit" = "occurrences"))]
    pub min_frequency: Option<u64>,
    /// Whether every digit is a token of its own, which makes arithmetic easier to learn. Default: true. Not with `path`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub split_digits: Option<bool>,
    /// Further special tokens.
    pub special_tokens: Vec<String>,
    /// Token that ends a turn. Default: what the tokenizer's config says, `<|im_end|>` with ChatML.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eos_token: Option<String>,
    /// Token that fills rows; never the EOS token. Default: what the tokenizer's config says, else `<|pad|>`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pad_token: Option<String>,
    /// Chat template, in Hugging Face's Jinja. Default: the tokenizer's own, else ChatML. `{% generation %}` blocks say what the
    /// assistant writes; without them it is derived by rendering turn after turn.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chat_template: Option<String>,
    /// The same in a file, relative to the workflow file.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-setting" = "path"))]
    pub chat_template_file: Option<String>,
}

/// Tokens of a trained tokenizer where nothing else is said.
const VOCAB_SIZE: usize = 4096;

impl TokenizerConfig {
    /// The settings that name files, in the order of [`StageKind::data_sources`].
    fn named_files(&self) -> impl Iterator<Item = (&'static str, &String)> {
        let all = [("path", &self.path), ("config", &self.config), ("chat_template_file", &self.chat_template_file)];
        all.into_iter().filter_map(|(setting, path)| path.as_ref().map(|path| (setting, path)))
    }

    /// What is wrong with the template in a file.
    fn bad_template_file(&self, files: &[Vec<PathBuf>]) -> Option<Problem> {
        let at = self.named_files().position(|(name, _)| name == "chat_template_file")?;
        let file = files.get(at)?.first()?;
        // What cannot be read at all is told when it is hashed.
        let error = ChatTemplate::check(&std::fs::read_to_string(file).ok()?).err()?;
        Some(Problem::new("bad_template", "chat_template_file", format!("{}: {error}", file.display())).hint(TEMPLATE_HINT))
    }

    /// The files that `setting` names.
    fn files<'a>(&self, setting: &str, files: &'a [Vec<DataFile>]) -> Option<&'a [DataFile]> {
        let at = self.named_files().position(|(name, _)| name == setting)?;
        Some(files.get(at).map(Vec::as_slice).unwrap_or_default())
    }

    /// The one file that `setting` names, if it is set.
    fn file<'a>(&self, setting: &str, files: &'a [Vec<DataFile>]) -> StageResult<Option<&'a DataFile>> {
        match self.files(setting, files) {
            None => Ok(None),
            Some([file]) => Ok(Some(file)),
            Some(found) => Err(StageError::invalid(format!("`{setting}` must name one file, found {}", found.len()))),
        }
    }
}

impl StageKind for Tokenizer {
    type Config = TokenizerConfig;

    const NAME: &'static str = "tokenizer";
    const VERSION: u32 = 1;
    const SUMMARY: &'static str =
        "Trains byte-level BPE on a corpus, or takes a Hugging Face tokenizer; settles pad and EOS token and the chat template.";
    const INPUTS: &'static [InputPort] =
        &[InputPort::one("corpus", &[ArtifactType::Text], "Documents to train on; not needed with `path`.").optional()];
    const OUTPUTS: &'static [OutputPort] =
        &[OutputPort { name: "tokenizer", types: &[ArtifactType::Tokenizer], doc: "The tokenizer with its chat template." }];
    const METRICS: &'static [(&'static str, &'static str)] =
        &[("vocab_size", "tokens"), ("bytes_per_token", "bytes of held-out text per token (of training text where none is held out)")];
    const DRAWS: bool = false;

    fn normalise(config: &mut TokenizerConfig) {
        // What a finished tokenizer has no use for is not in its key either.
        if config.path.is_none() {
            config.vocab_size.get_or_insert(VOCAB_SIZE);
            config.min_frequency.get_or_insert(2);
            config.split_digits.get_or_insert(true);
        }
    }

    fn check(config: &TokenizerConfig) -> Vec<Problem> {
        let mut problems = Vec::new();
        let given = [
            ("vocab_size", config.vocab_size.is_some()),
            ("min_frequency", config.min_frequency.is_some()),
            ("split_digits", config.split_digits.is_some()),
        ];
        for (setting, _) in given.into_iter().filter(|(_, given)| *given && config.path.is_some()) {
            let message = format!("`{setting}` is for a tokenizer that is trained, and `path` takes a finished one");
            problems.push(Problem::new("conflict", setting, message).hint(format!("remove `{setting}` or `path`")));
        }
        if config.pad_token.is_some() && config.pad_token == config.eos_token {
            let message = format!("`pad_token` and `eos_token` are both `{}`", config.pad_token.as_deref().unwrap_or_default());
            problems.push(
                Problem::new("conflict", "pad_token", message).hint("padding must differ from the token that a model learns to end with"),
            );
        }
        for (index, token) in config.special_tokens.iter().enumerate().filter(|(_, token)| token.is_empty()) {
            problems.push(Problem::new("out_of_range", format!("special_tokens[{index}]"), format!("a special token is empty: `{token}`")));
        }
        if config.config.is_some() && config.path.is_none() {
            problems.push(Problem::new("conflict", "config", "`config` belongs to the tokenizer in `path`, which is not set"));
        }
        if config.chat_template.is_some() && config.chat_template_file.is_some() {
            problems.push(Problem::new("conflict", "chat_template_file", "`chat_template` and `chat_template_file` are both set"));
        }
        if let Some(Err(error)) = config.chat_template.as_deref().map(ChatTemplate::check) {
            problems.push(Problem::new("bad_template", "chat_template", error.to_string()).hint(TEMPLATE_HINT));
        }
        problems
    }

    fn data_sources(config: &TokenizerConfig) -> Vec<DataSource> {
        config
            .named_files()
            .map(|(setting, path)| {
                let endings: &[&str] = if setting == "path" { files::ENDINGS } else { &[] };
                DataSource { setting: setting.into(), pattern: path.clone(), directory: false, endings }
            })
            .collect()
    }

    fn describe(config: &TokenizerConfig, context: &DescribeContext<'_>) -> Result<Description, Vec<Problem>> {
        if let Some(problem) = config.bad_template_file(context.files) {
            return Err(vec![problem]);
        }
        let vocab_size = match (&config.path, context.input("corpus")) {
            (None, None) => {
                let problem = Problem::new("missing_input", "inputs.corpus", "a tokenizer needs documents to train on");
                return Err(vec![
                    problem.hint("connect `inputs.corpus`, or take a finished one: `path` names a tokenizer.json or its directory"),
                ]);
            }
            (Some(_), Some(input)) => {
                let message = format!("`path` takes a finished tokenizer, so that `{}` has nothing to do", input.stage);
                return Err(vec![Problem::new("conflict", "inputs.corpus", message).hint("remove `path` or `inputs.corpus`")]);
            }
            (None, Some(_)) => Some(config.vocab_size.unwrap_or(VOCAB_SIZE) as u64),
            (Some(path), None) => {
                let files = context.files.first().map(Vec::as_slice).unwrap_or_default();
                if config.config.is_some() && files::is_directory(path, files) {
                    let message = format!("the directory `{path}` says by itself what `config` would");
                    let hint = format!("remove `config`, or name the file: path = \"{}/tokenizer.json\"", path.trim_end_matches('/'));
                    return Err(vec![Problem::new("conflict", "config", message).hint(hint)]);
                }
                let known = files::planned_tokens(path, files).map_err(|problem| vec![problem])?;
                known.map(|tokens| tokens + MOST_ADDED + config.special_tokens.len() as u64)
            }
        };
        let origin = Origin { stage: context.stage.to_owned(), port: "tokenizer".into() };
        let meta = ArtifactMeta { tokenizer: Some(origin), vocab_size, ..ArtifactMeta::new(ArtifactType::Tokenizer) };
        Ok(Description { outputs: BTreeMap::from([("tokenizer".into(), meta)]), ..Description::default() })
    }

    fn run(config: &TokenizerConfig, context: &RunContext<'_>) -> StageResult<BTreeMap<String, Artifact>> {
        let chat_template = match config.file("chat_template_file", context.files)? {
            Some(file) => Some(text(file)?),
            None => config.chat_template.clone(),
        };
        let options = TokenizerOptions {
            pad_token: config.pad_token.clone(),
            eos_token: config.eos_token.clone(),
            chat_template,
            special_tokens: config.special_tokens.clone(),
        };
        let named = config.path.as_deref().zip(config.files("path", context.files));
        let (tokenizer_json, file) = match named {
            Some((pattern, files)) => {
                let Finished { tokenizer_json, config } = Finished::read(pattern, files, config.file("config", context.files)?)?;
                (tokenizer_json, config)
            }
            None => (train(config, &options, context)?, TokenizerFile::trained()),
        };
        if let (Some(file), None) = (config.file("config", context.files)?, &options.chat_template)
            && file.path.with_file_name("chat_template.jinja").is_file()
        {
            context.warning(format!(
                "`chat_template.jinja` lies beside {} and is not used; name it with `chat_template_file`, or the directory with `path`",
                file.name
            ));
        }
        // Errors name the files as the workflow does.
        let told = |error: TextError| match (named, error) {
            (Some((path, _)), TextError::Tokenizer { message, .. }) => StageError::invalid(format!("{path}: {message}")),
            (_, error) => error.into(),
        };
        let (tokenizer_json, config_json) = complete_tokenizer(tokenizer_json, file, &options).map_err(told)?;
        let tokenizer = ChatTokenizer::from_json(&tokenizer_json, &config_json).map_err(told)?;
        let probe = [Message::user("Hello"), Message::assistant("Hello!")];
        if let Err(error) = tokenizer.encode_conversation(&probe) {
            context.warning(format!("the chat template cannot be used for training: {error}"));
        }
        measure(&tokenizer, context)?;
        Ok(BTreeMap::from([("tokenizer".into(), models::publish_tokenizer(context, &tokenizer)?)]))
    }
}

fn text(file: &DataFile) -> StageResult<String> {
    let bad = |error: std::string::FromUtf8Error| StageError::Data {
        path: file.name.clone(),
        line: None,
        message: format!("byte at offset {} is not UTF-8", error.utf8_error().valid_up_to()),
        hint: None,
    };
    String::from_utf8(read_file(file)?).map_err(bad)
}

fn train(config: &TokenizerConfig, options: &TokenizerOptions, context: &RunContext<'_>) -> StageResult<Vec<u8>> {
    let documents = TextDataset::load(&context.input("corpus")?.artifact, Split::Train)?;
    context.phase("training BPE");
    let bpe = BpeOptions {
        vocab_size: config.vocab_size.unwrap_or(VOCAB_SIZE),
        min_frequency: config.min_frequency.unwrap_or(2),
        split_digits: config.split_digits.unwrap_or(true),
        special_tokens: options.trained_special_tokens(),
    };
    // The trainer cannot be stopped; counting words is most of its work, and that reads from here.
    let read = documents.documents().take_while(|_| !context.cancel.is_cancelled());
    let trained = train_bpe(read, &bpe)?;
    context.check_cancelled()?;
    Ok(trained)
}

fn measure(tokenizer: &ChatTokenizer, context: &RunContext<'_>) -> StageResult<()> {
    let mut metrics = vec![("vocab_size", tokenizer.vocab_size() as f64)];
    if let Some(corpus) = context.optional_input("corpus") {
        let heldout = TextDataset::load(&corpus.artifact, Split::HeldOut)?;
        let documents = if heldout.is_empty() { TextDataset::load(&corpus.artifact, Split::Train)? } else { heldout };
        let (mut bytes, mut tokens) = (0, 0);
        for document in documents.documents() {
            bytes += document.len();
            tokens += tokenizer.encode(document).len();
            if bytes >= MEASURED_BYTES {
                break;
            }
        }
        metrics.push(("bytes_per_token", bytes as f64 / tokens.max(1) as f64));
    }
    context.metrics(0, &metrics);
    Ok(())
}
