use std::collections::BTreeMap;

use rayon::prelude::*;
use rlflow_api::{DataFile, DataSource, Digest, Problem, RunContext, StageError, StageEvent, StageResult};
use rlflow_store::Hasher;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    Message, Split,
    data_file::{DataFormat, data_error, for_each_line, with_file},
    json_rows::read_rows,
    unusable::Unusable,
};

/// Rows that are converted at once.
const BATCH_ROWS: usize = 1024;

/// A data file, or several by a glob.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RowSource {
    /// Path or glob, relative to the workflow file: .jsonl or .json (prompts also .txt, one prompt per line), each also with .gz or .zst.
    #[schemars(extend("x-setting" = "path"))]
    pub path: String,
}

/// Settings of every stage that reads rows. Put into a config with `#[serde(flatten)]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RowSettings {
    /// Data files. The format of each row is recognised by its fields.
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
    /// Most rows to read, in the order of the sources; all if not set.
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
            };
            sources.iter().enumerate().map(source).collect::<Vec<_>>()
        };
        let mut all = named("sources", &self.sources);
        all.extend(named("heldout_sources", &self.heldout_sources));
        all
    }

    /// Files of a format that cannot be read, found before anything runs.
    pub fn check_formats(&self, files: &[Vec<std::path::PathBuf>], text: bool) -> Vec<Problem> {
        check_formats(&self.data_sources(), files, text)
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

/// Problems with the formats of `files`, in the order of `sources`.
pub fn check_formats(sources: &[DataSource], files: &[Vec<std::path::PathBuf>], text: bool) -> Vec<Problem> {
    let mut problems = Vec::new();
    for (source, files) in sources.iter().zip(files) {
        let wrong = files.iter().find_map(|file| match DataFormat::of(file) {
            Ok(DataFormat::Text) if !text => {
                Some(format!("{}: rows cannot be read from plain text; expected .jsonl or .json", file.display()))
            }
            Ok(_) => None,
            Err(message) => Some(format!("{}: {message}", file.display())),
        });
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

/// Reads all rows of the stage's files, turns each into what is stored with `convert` (in parallel, so it must depend on
/// the row only) and gives the results to `store` in order. Unusable rows are counted, shown and limited; counts are reported as metrics.
pub fn convert_rows<T: Send>(
    context: &RunContext<'_>,
    settings: &RowSettings,
    text: bool,
    convert: impl Fn(&Value) -> Result<UsableRow<T>, String> + Sync,
    mut store: impl FnMut(Split, T) -> StageResult<()>,
) -> StageResult<RowCounts> {
    context.phase("reading");
    let total: u64 = context.files.iter().flatten().map(|file| file.size_bytes).sum();
    let mut reader = Reader { context, settings, convert, store: &mut store, counts: RowCounts::default(), unusable: Unusable::default() };
    let mut done = 0;
    for (index, files) in context.files.iter().enumerate() {
        let heldout_source = index >= settings.sources.len();
        for file in files {
            reader.read(file, heldout_source, text)?;
            done += file.size_bytes;
            let (unit, detail) = ("bytes".into(), file.name.clone());
            context.reporter.report(StageEvent::Progress { done, total, unit, rate: None, tokens_per_s: None, detail });
        }
    }
    let Reader { counts, unusable, .. } = reader;
    if counts.rows == 0 {
        let path = context.files.iter().flatten().next().map_or_else(|| "sources".to_owned(), |file| file.name.clone());
        return Err(StageError::Data { path, line: None, message: "no rows to read".into(), hint: None });
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

struct Reader<'a, T, C> {
    context: &'a RunContext<'a>,
    settings: &'a RowSettings,
    convert: C,
    store: &'a mut dyn FnMut(Split, T) -> StageResult<()>,
    counts: RowCounts,
    unusable: Unusable,
}

impl<T: Send, C: Fn(&Value) -> Result<UsableRow<T>, String> + Sync> Reader<'_, T, C> {
    fn read(&mut self, file: &DataFile, heldout_source: bool, text: bool) -> StageResult<()> {
        let mut batch = Vec::with_capacity(BATCH_ROWS);
        let mut left = self.settings.max_rows.map_or(u64::MAX, |most| most.saturating_sub(self.counts.rows));
        let mut add = |reader: &mut Self, line: u64, row: Value| {
            if left == 0 {
                return Ok(());
            }
            left -= 1;
            batch.push((line, row));
            if batch.len() == BATCH_ROWS { reader.flush(file, heldout_source, &mut batch) } else { Ok(()) }
        };
        match DataFormat::of_file(file)? {
            DataFormat::Json => read_rows(file, |line, row| add(self, line, row))?,
            DataFormat::Text if text => with_file(file, |input| {
                for_each_line(file, input, |line, text| match text.trim() {
                    "" => Ok(()),
                    text => add(self, line, Value::String(text.to_owned())),
                })
            })?,
            DataFormat::Text => {
                return Err(data_error(file, None, "rows cannot be read from plain text", Some("expected .jsonl or .json")));
            }
        }
        self.flush(file, heldout_source, &mut batch)
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
                Err(reason) => {
                    self.counts.unusable += 1;
                    self.unusable.add(file, line, reason);
                }
            }
        }
        Ok(())
    }
}
