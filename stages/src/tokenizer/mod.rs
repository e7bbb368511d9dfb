//! `tokenizer`: byte-level BPE trained on a corpus, or a `tokenizer.json`, with its special tokens and chat template.

use std::{collections::BTreeMap, path::PathBuf};

use rlflow_api::{
    Artifact, ArtifactMeta, ArtifactType, DataFile, DataSource, DescribeContext, Description, InputPort, Origin, OutputPort, Problem,
    RunContext, StageError, StageKind, StageResult,
};
use rlflow_text::{
    BpeOptions, ChatTemplate, ChatTokenizer, Message, Split, TextDataset, TokenizerConfig as TokenizerFile, TokenizerOptions,
    complete_tokenizer, count_tokens, read_file, train_bpe,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

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
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TokenizerConfig {
    /// A `tokenizer.json` of any fast Hugging Face tokenizer, relative to the workflow file. Without it one is trained on `inputs.corpus`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-setting" = "path"))]
    pub path: Option<String>,
    /// The `tokenizer_config.json` that belongs to `path`: special tokens and chat template.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-setting" = "path"))]
    pub config: Option<String>,
    /// Most tokens of a trained tokenizer: special ones, 256 bytes, and merges.
    #[schemars(range(min = 264, max = 1_000_000), extend("x-unit" = "tokens"))]
    pub vocab_size: usize,
    /// How often two tokens must stand side by side in the corpus to be merged, at least.
    #[schemars(range(min = 1), extend("x-unit" = "occurrences"))]
    pub min_frequency: u64,
    /// Whether every digit is a token of its own, which makes arithmetic easier to learn. For trained tokenizers.
    pub split_digits: bool,
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

impl Default for TokenizerConfig {
    fn default() -> Self {
        Self {
            path: None,
            config: None,
            vocab_size: 4096,
            min_frequency: 2,
            split_digits: true,
            special_tokens: Vec::new(),
            eos_token: None,
            pad_token: None,
            chat_template: None,
            chat_template_file: None,
        }
    }
}

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

    /// The one file that `setting` names, if it is set.
    fn file<'a>(&self, setting: &str, files: &'a [Vec<DataFile>]) -> StageResult<Option<&'a DataFile>> {
        let Some(at) = self.named_files().position(|(name, _)| name == setting) else { return Ok(None) };
        match files.get(at).map(Vec::as_slice) {
            Some([file]) => Ok(Some(file)),
            found => Err(StageError::invalid(format!("`{setting}` must name one file, found {}", found.map_or(0, <[_]>::len)))),
        }
    }
}

impl StageKind for Tokenizer {
    type Config = TokenizerConfig;

    const NAME: &'static str = "tokenizer";
    const VERSION: u32 = 1;
    const SUMMARY: &'static str =
        "Trains byte-level BPE on a corpus, or takes a tokenizer.json; settles pad and EOS token and the chat template.";
    const INPUTS: &'static [InputPort] =
        &[InputPort::one("corpus", &[ArtifactType::Text], "Documents to train on; not needed with `path`.").optional()];
    const OUTPUTS: &'static [OutputPort] =
        &[OutputPort { name: "tokenizer", types: &[ArtifactType::Tokenizer], doc: "The tokenizer with its chat template." }];
    const METRICS: &'static [(&'static str, &'static str)] =
        &[("vocab_size", "tokens"), ("bytes_per_token", "bytes of held-out text per token (of training text where none is held out)")];
    const DRAWS: bool = false;

    fn check(config: &TokenizerConfig) -> Vec<Problem> {
        let mut problems = Vec::new();
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
            .map(|(setting, path)| DataSource { setting: setting.into(), pattern: path.clone(), directory: false, endings: &[] })
            .collect()
    }

    fn describe(config: &TokenizerConfig, context: &DescribeContext<'_>) -> Result<Description, Vec<Problem>> {
        if let Some(problem) = config.bad_template_file(context.files) {
            return Err(vec![problem]);
        }
        let vocab_size = match (&config.path, context.input("corpus")) {
            (None, None) => {
                let problem = Problem::new("missing_input", "inputs.corpus", "a tokenizer needs documents to train on");
                return Err(vec![problem.hint("connect `inputs.corpus`, or take a finished one with `path = \"tokenizer.json\"`")]);
            }
            (Some(_), Some(input)) => {
                let message = format!("`path` takes a finished tokenizer, so that `{}` has nothing to do", input.stage);
                return Err(vec![Problem::new("conflict", "inputs.corpus", message).hint("remove `path` or `inputs.corpus`")]);
            }
            (None, Some(_)) => Some(config.vocab_size as u64),
            (Some(_), None) => {
                let file = context.files.first().and_then(|files| files.first());
                let known = file.and_then(|file| count_tokens(&std::fs::read(file).ok()?));
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
        let (tokenizer_json, file) = match config.file("path", context.files)? {
            Some(path) => {
                let file = config.file("config", context.files)?.map(read_file).transpose()?;
                (read_file(path)?, file.map_or_else(|| Ok(TokenizerFile::default()), |content| TokenizerFile::parse(&content))?)
            }
            None => (train(config, &options, context)?, TokenizerFile::trained()),
        };
        if let (Some(file), None) = (config.file("config", context.files)?, &options.chat_template)
            && file.path.with_file_name("chat_template.jinja").is_file()
        {
            context.warning(format!("`chat_template.jinja` lies beside {} and is not used; name it with `chat_template_file`", file.name));
        }
        let (tokenizer_json, config_json) = complete_tokenizer(tokenizer_json, file, &options)?;
        let tokenizer = ChatTokenizer::from_json(&tokenizer_json, &config_json)?;
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
        vocab_size: config.vocab_size,
        min_frequency: config.min_frequency,
        split_digits: config.split_digits,
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
