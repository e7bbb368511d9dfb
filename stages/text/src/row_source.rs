use std::{collections::BTreeMap, path::PathBuf};

use rayon::prelude::*;
use rlflow_api::{DataFile, DataSource, Digest, Problem, RunContext, StageError, StageEvent, StageResult};
use rlflow_store::Hasher;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    Message, Split, TextError,
    data_file::{DataFormat, Flow},
    empty_files::EmptyFiles,
    read_rows,
    unusable::Unusable,
};

/// Rows that are converted at once.
const BATCH_ROWS: usize = 1024;

/// A data file, or several by a glob.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RowSource {
    /// Path or glob, relative to the workflow file: .jsonl, .json, .csv or .tsv (prompts also .txt, one prompt per line), each also
    /// with .gz or .zst, or .parquet.
    #[schemars(extend("x-setting" = "path"))]
    pub path: String,
}

/// Settings of every stage that reads rows. Put into a config with `#[serde(flatten)]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RowSettings {
    /// Data files. The format of each row is recognised by its fields. What stands beside the turns in `tools`, `documents` and
    /// `chat_template_kwargs` reaches the chat template.
    #[schemars(length(min = 1))]
    pub sources: Vec<RowSource>,
    /// Share of rows held out for measuring, from 0 to 1. A row's question alone decides (by its digest), so that one question
    /// is on the same side in every stage that holds out the same share.
    #[serde(default = "default_heldout")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub heldout: f64,
    /// Data files whose rows are all held out.
    #[serde(default)]
    pub heldout_sources: Vec<RowSource>,
    /// Share of rows that may be unusable, from 0 to 1; more is an error.
    #[serde(default = "default_max_unusable")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub max_unusable: f64,
    /// Most rows to train on: `sources` are read, in their order, until there are so many. Rows that are held out do not count, and
    /// `heldout_sources` are read whole. All if not set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1), extend("x-unit" = "rows"))]
    pub max_rows: Option<u64>,
    /// System message for rows that have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system: Option<String>,
}

const fn default_heldout() -> f64 {
    0.05
}

const fn default_max_unusable() -> f64 {
    0.5
}

impl RowSettings {
    /// The files that the settings name.
    pub fn data_sources(&self) -> Vec<DataSource> {
        let named = |setting: &'static str, sources: &[RowSource]| {
            let source = |(index, source): (usize, &RowSource)| DataSource {
                setting: format!("{setting}[{index}].path"),
                pattern: source.path.clone(),
                directory: false,
                endings: &[],
            };
            sources.iter().enumerate().map(source).collect::<Vec<_>>()
        };
        let mut all = named("sources", &self.sources);
        all.extend(named("heldout_sources", &self.heldout_sources));
        all
    }

    /// Files of a format that cannot be read, found before anything runs. `lines` = a line of plain text is a row too.
    pub fn check_formats(&self, files: &[Vec<PathBuf>], lines: bool) -> Vec<Problem> {
        check_formats(&self.data_sources(), files, |format| format.no_rows(lines))
    }

    /// `messages` with the stage's system message if they have none.
    pub fn with_system(&self, mut messages: Vec<Message>) -> Vec<Message> {
        let has = messages.first().is_some_and(|first| first.role == "system");
        if let Some(system) = self.system.as_ref().filter(|_| !has) {
            messages.insert(0, Message::system(system));
        }
        messages
    }
}

/// Files of a format in which no documents are, found before anything runs; `files` in the order of `sources`.
pub fn check_document_formats(sources: &[DataSource], files: &[Vec<PathBuf>]) -> Vec<Problem> {
    check_formats(sources, files, |_| None)
}

fn check_formats(sources: &[DataSource], files: &[Vec<PathBuf>], unfit: impl Fn(DataFormat) -> Option<String>) -> Vec<Problem> {
    let mut problems = Vec::new();
    for (source, files) in sources.iter().zip(files) {
        let reason = |file: &PathBuf| DataFormat::of(file).map_or_else(Some, &unfit);
        let wrong = files.iter().find_map(|file| Some(format!("{}: {}", file.display(), reason(file)?)));
        problems.extend(wrong.map(|message| Problem::new("unsupported_format", &source.setting, message)));
    }
    problems
}

/// A row that can be used.
pub struct UsableRow<T> {
    /// Name of its format.
    pub format: &'static str,
    /// Digest of its question ([`question_digest`]), which decides the split.
    pub question: Digest,
    /// What it became.
    pub row: T,
}

/// Digest of the first user turn: what a row is about.
pub fn question_digest(messages: &[Message]) -> Digest {
    let question = messages.iter().find(|message| message.role == "user").or(messages.first());
    Hasher::new().update(b"rlflow question\0").update(question.map_or("", |message| message.content.trim()).as_bytes()).finish()
}

/// What was read.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RowCounts {
    /// All rows.
    pub rows: u64,
    /// Rows that cannot be used.
    pub unusable: u64,
    /// Usable rows by split.
    pub train: u64,
    /// Usable rows held out.
    pub heldout: u64,
    /// Usable rows by format.
    pub formats: BTreeMap<&'static str, u64>,
}

/// Why a row cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RowError {
    /// What is wrong with the row.
    #[error("{0}")]
    Row(String),
    /// What tokenizer or chat template say of it.
    #[error(transparent)]
    Text(#[from] TextError),
}

impl From<String> for RowError {
    fn from(reason: String) -> Self {
        Self::Row(reason)
    }
}

impl RowError {
    /// What the chat template says, if it is to blame.
    fn of_template(self) -> Option<TextError> {
        match self {
            Self::Text(error) if error.is_of_template() => Some(error),
            _ => None,
        }
    }
}

/// Reads all rows of the stage's files, turns each into what is stored with `convert` (in parallel, so it must depend on
/// the row only) and gives the results to `store` in order. `lines` = a line of plain text is a row too.
/// Unusable rows are counted, shown and limited; counts are reported as metrics. A chat template that takes no conversation at all is an error
/// of its own, before any row is read.
pub fn convert_rows<T: Send>(
    context: &RunContext<'_>,
    settings: &RowSettings,
    lines: bool,
    convert: impl Fn(&Value) -> Result<UsableRow<T>, RowError> + Sync,
    mut store: impl FnMut(Split, T) -> StageResult<()>,
) -> StageResult<RowCounts> {
    if let Some(error) = refuses_all(&convert) {
        return Err(template_error(context, settings, "cannot be used", &error));
    }
    context.phase("reading");
    let total: u64 = context.files.iter().flatten().map(|file| file.size_bytes).sum();
    let mut reader = Reader {
        context,
        settings,
        convert,
        store: &mut store,
        counts: RowCounts::default(),
        unusable: Unusable::default(),
        refused: 0,
        refusal: None,
        empty: EmptyFiles::default(),
    };
    let mut done = 0;
    for (index, files) in context.files.iter().enumerate() {
        let heldout_source = index >= settings.sources.len();
        for file in files {
            reader.read(file, heldout_source, lines)?;
            done += file.size_bytes;
            let (unit, detail) = ("bytes".into(), file.name.clone());
            context.reporter.report(StageEvent::Progress { done, total, unit, rate: None, tokens_per_s: None, detail });
        }
    }
    let Reader { counts, unusable, refused, refusal, empty, .. } = reader;
    if counts.rows == 0 {
        return Err(empty.error("rows"));
    }
    empty.warn(context, "rows");
    if let Some(error) = refusal.filter(|_| refused == counts.rows) {
        return Err(template_error(context, settings, &format!("refuses all of {refused} rows"), &error));
    }
    unusable.settle(context, counts.rows, settings.max_unusable)?;
    if counts.train == 0 && counts.heldout == 0 {
        return Err(StageError::invalid("no row can be used"));
    }
    if counts.heldout == 0 && settings.heldout > 0.0 {
        context.warning(format!(
            "none of {} rows was held out; raise `heldout` or name `heldout_sources` to measure on unseen rows",
            counts.train
        ));
    }
    let mut metrics = vec![
        ("rows".to_owned(), counts.rows),
        ("unusable_rows".to_owned(), counts.unusable),
        ("train_rows".to_owned(), counts.train),
        ("heldout_rows".to_owned(), counts.heldout),
    ];
    metrics.extend(counts.formats.iter().map(|(format, rows)| (format!("rows/{format}"), *rows)));
    let metrics: Vec<(&str, f64)> = metrics.iter().map(|(name, value)| (name.as_str(), *value as f64)).collect();
    context.metrics(0, &metrics);
    Ok(counts)
}

/// What the chat template says if it takes none of the plainest rows, with and without a system message. Every kind of rows knows their format.
fn refuses_all<T>(convert: impl Fn(&Value) -> Result<UsableRow<T>, RowError>) -> Option<TextError> {
    let plain = json!({ "prompt": "Hello", "completion": "Hi!", "chosen": "Hi!", "rejected": "No." });
    let mut with_system = plain.clone();
    with_system["system"] = "Be brief.".into();
    let refusal = convert(&plain).err()?.of_template()?;
    convert(&with_system).err()?.of_template()?;
    Some(refusal)
}

fn template_error(context: &RunContext<'_>, settings: &RowSettings, what: &str, error: &TextError) -> StageError {
    let stage = context.optional_input("tokenizer").map_or("tokenizer", |input| input.stage.as_str());
    let mend = format!("mend the chat template that comes with `{stage}` (`chat_template` or `chat_template_file` of a `tokenizer` stage)");
    let mut hint = error.hint().map_or(mend, str::to_owned);
    if settings.system.is_some() {
        hint += "; or remove `system` from this stage, if the template takes no system message";
    }
    StageError::invalid_with_hint(format!("the chat template of `{stage}` {what}: {}", error.of_template_text()), hint)
}

struct Reader<'a, T, C> {
    context: &'a RunContext<'a>,
    settings: &'a RowSettings,
    convert: C,
    store: &'a mut dyn FnMut(Split, T) -> StageResult<()>,
    counts: RowCounts,
    unusable: Unusable,
    /// Rows that the chat template refused, and what it said first.
    refused: u64,
    refusal: Option<TextError>,
    empty: EmptyFiles,
}

impl<T: Send, C: Fn(&Value) -> Result<UsableRow<T>, RowError> + Sync> Reader<'_, T, C> {
    fn read(&mut self, file: &DataFile, heldout_source: bool, lines: bool) -> StageResult<()> {
        if self.is_full(heldout_source) {
            return Ok(());
        }
        let before = self.counts.rows;
        let mut batch = Vec::with_capacity(BATCH_ROWS);
        read_rows(file, lines, |line, row| {
            batch.push((line, row));
            // Never more than are wanted: what follows the last of them is not looked at.
            let wanted = if heldout_source { u64::MAX } else { self.wanted() };
            if batch.len() == BATCH_ROWS || batch.len() as u64 >= wanted {
                self.flush(file, heldout_source, &mut batch)?;
            }
            Ok(if self.is_full(heldout_source) { Flow::Break(()) } else { Flow::Continue(()) })
        })?;
        self.flush(file, heldout_source, &mut batch)?;
        if self.counts.rows == before {
            self.empty.add(file);
        }
        Ok(())
    }

    /// Rows to train on that may still come.
    fn wanted(&self) -> u64 {
        self.settings.max_rows.map_or(u64::MAX, |most| most.saturating_sub(self.counts.train))
    }

    /// Whether there are as many rows to train on as are wanted.
    fn is_full(&self, heldout_source: bool) -> bool {
        !heldout_source && self.wanted() == 0
    }

    fn flush(&mut self, file: &DataFile, heldout_source: bool, batch: &mut Vec<(u64, Value)>) -> StageResult<()> {
        self.context.check_cancelled()?;
        let converted: Vec<_> = batch.par_drain(..).map(|(line, row)| (line, (self.convert)(&row))).collect();
        for (line, row) in converted {
            self.counts.rows += 1;
            match row {
                Ok(UsableRow { format, question, row }) => {
                    let split = if heldout_source { Split::HeldOut } else { Split::of(question, self.settings.heldout) };
                    *self.counts.formats.entry(format).or_default() += 1;
                    match split {
                        Split::Train => self.counts.train += 1,
                        Split::HeldOut => self.counts.heldout += 1,
                    }
                    (self.store)(split, row)?;
                }
                Err(error) => {
                    self.counts.unusable += 1;
                    self.unusable.add(file, line, error.to_string());
                    if let Some(error) = error.of_template() {
                        self.refused += 1;
                        self.refusal.get_or_insert(error);
                    }
                }
            }
        }
        Ok(())
    }
}
