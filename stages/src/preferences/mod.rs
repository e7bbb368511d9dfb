//! `preferences`: rows with better and worse answers become token ids.

use std::collections::BTreeMap;

use rlflow_api::{
    Artifact, ArtifactMeta, ArtifactType, DataSource, DescribeContext, Description, InputPort, OutputPort, Problem, RowLengths, RunContext,
    StageKind, StageResult,
};
use rlflow_text::{
    Chat, ChatTokenizer, PreferenceRow, PreferenceWriter, RowError, RowSettings, UsableRow, convert_rows, question_digest, rows,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// See the module.
pub struct Preferences;

/// Settings of `preferences`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PreferencesConfig {
    /// Files and rows.
    #[serde(flatten)]
    pub rows: RowSettings,
}

impl StageKind for Preferences {
    type Config = PreferencesConfig;

    const NAME: &'static str = "preferences";
    const VERSION: u32 = 3;
    const SUMMARY: &'static str = "Reads chosen/rejected pairs, HH-RLHF transcripts and ranked lists of answers.";
    const INPUTS: &'static [InputPort] = &[InputPort::one("tokenizer", &[ArtifactType::Tokenizer], "Tokenizer and chat template.")];
    const OUTPUTS: &'static [OutputPort] = &[OutputPort {
        name: "preferences",
        types: &[ArtifactType::Preferences],
        doc: "Prompts with two or more answers each, best first, as ids; both splits.",
    }];
    const METRICS: &'static [(&'static str, &'static str)] = &[
        ("rows", "rows read"),
        ("unusable_rows", "rows that cannot be used"),
        ("train_rows", "rows to train on"),
        ("heldout_rows", "rows held out"),
        ("rows/<format>", "usable rows of a format"),
        ("answers", "answers of all rows"),
        ("margins", "rows with a margin"),
        ("tokens", "tokens of all prompts and answers"),
        ("longest_row", "tokens of the longest prompt with its longest answer"),
        ("mean_row", "mean tokens of a prompt with an answer"),
        ("row_deviation", "its standard deviation"),
    ];
    const DRAWS: bool = false;

    fn data_sources(config: &PreferencesConfig) -> Vec<DataSource> {
        config.rows.data_sources()
    }

    fn describe(config: &PreferencesConfig, context: &DescribeContext<'_>) -> Result<Description, Vec<Problem>> {
        let problems = config.rows.check_formats(context.files, false);
        if !problems.is_empty() {
            return Err(problems);
        }
        let tokenizer = context.input("tokenizer").map(|input| &input.meta);
        let meta = ArtifactMeta {
            tokenizer: tokenizer.and_then(|meta| meta.tokenizer.clone()),
            vocab_size: tokenizer.and_then(|meta| meta.vocab_size),
            rows: config.rows.max_rows,
            ..ArtifactMeta::new(ArtifactType::Preferences)
        };
        Ok(Description { outputs: BTreeMap::from([("preferences".into(), meta)]), ..Description::default() })
    }

    fn run(config: &PreferencesConfig, context: &RunContext<'_>) -> StageResult<BTreeMap<String, Artifact>> {
        let tokenizer = ChatTokenizer::load(&context.input("tokenizer")?.artifact)?;
        let mut writer = PreferenceWriter::new(context.store)?;
        let convert = |row: &Value| -> Result<UsableRow<PreferenceRow>, RowError> {
            let preference = rows::preference(row)?;
            let question = question_digest(&preference.prompt);
            let messages = config.rows.with_system(preference.prompt);
            let mut row = PreferenceRow { margin: preference.margin, ..PreferenceRow::default() };
            for answer in &preference.answers {
                let (prompt, answer) = tokenizer.encode_answer(Chat::new(&messages, &preference.context), answer)?;
                row.prompt = prompt;
                row.answers.push(answer);
            }
            Ok(UsableRow { format: preference.format, question, row })
        };
        let (mut answers, mut margins, mut tokens, mut rows) = (0u64, 0u64, 0u64, RowLengths::default());
        let counts = convert_rows(context, &config.rows, false, convert, |split, row| {
            let lengths = row.answers.iter().map(|answer| answer.len() as u64);
            answers += row.answers.len() as u64;
            margins += u64::from(row.margin.is_some());
            tokens += row.prompt.len() as u64 + lengths.clone().sum::<u64>();
            lengths.for_each(|answer| rows.add(row.prompt.len() as u64 + answer));
            writer.push(split, &row)
        })?;
        let metrics = [("answers", answers), ("margins", margins), ("tokens", tokens)];
        context.metrics(0, &metrics.map(|(name, value)| (name, value as f64)));
        context.metrics(0, &rows.tokens().metrics());
        let mut builder = context.output(ArtifactType::Preferences);
        writer.finish(&mut builder)?;
        builder.metadata(json!({
            "tokenizer": tokenizer.digest(),
            "rows": { "train": counts.train, "heldout": counts.heldout },
            "answers": answers,
            "margins": margins,
        }));
        Ok(BTreeMap::from([("preferences".into(), builder.publish()?)]))
    }
}
