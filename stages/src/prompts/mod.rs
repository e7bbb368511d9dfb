//! `prompts`: questions to answer, perhaps with reference answers.

use std::collections::BTreeMap;

use rlflow_api::{
    Artifact, ArtifactMeta, ArtifactType, DataSource, DescribeContext, Description, InputPort, OutputPort, Problem, RowLengths, RunContext,
    StageKind, StageResult,
};
use rlflow_text::{Chat, ChatTokenizer, PromptRow, PromptWriter, RowError, RowSettings, UsableRow, convert_rows, question_digest, rows};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// See the module.
pub struct Prompts;

/// Settings of `prompts`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PromptsConfig {
    /// Files and rows.
    #[serde(flatten)]
    pub rows: RowSettings,
    /// Field of the reference answer, which every row must then have. Default: the first of `answer`, `reference` and `solution` that a row has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer_field: Option<String>,
    /// Only what follows the last occurrence of this text is the reference answer (`####` in GSM8K).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer_after: Option<String>,
}

impl StageKind for Prompts {
    type Config = PromptsConfig;

    const NAME: &'static str = "prompts";
    const VERSION: u32 = 3;
    const SUMMARY: &'static str =
        "Reads prompts (text, messages, Alpaca, ShareGPT, or lines of a text file), with reference answers where there are any.";
    const INPUTS: &'static [InputPort] = &[InputPort::one("tokenizer", &[ArtifactType::Tokenizer], "Tokenizer and chat template.")];
    const OUTPUTS: &'static [OutputPort] = &[OutputPort {
        name: "prompts",
        types: &[ArtifactType::Prompts],
        doc: "Prompts as ids and as text, up to where the assistant begins to speak; both splits.",
    }];
    const METRICS: &'static [(&'static str, &'static str)] = &[
        ("rows", "rows read"),
        ("unusable_rows", "rows that cannot be used"),
        ("train_rows", "rows to train on"),
        ("heldout_rows", "rows held out"),
        ("rows/<format>", "usable rows of a format"),
        ("answers", "rows with a reference answer"),
        ("tokens", "tokens of all prompts"),
        ("longest_row", "tokens of the longest prompt"),
        ("mean_row", "mean of the same over all rows"),
        ("row_deviation", "its standard deviation"),
    ];
    const DRAWS: bool = false;

    fn check(config: &PromptsConfig) -> Vec<Problem> {
        let empty = config.answer_after.as_deref() == Some("");
        if empty { vec![Problem::new("out_of_range", "answer_after", "`answer_after` is empty")] } else { Vec::new() }
    }

    fn data_sources(config: &PromptsConfig) -> Vec<DataSource> {
        config.rows.data_sources()
    }

    fn describe(config: &PromptsConfig, context: &DescribeContext<'_>) -> Result<Description, Vec<Problem>> {
        let problems = config.rows.check_formats(context.files, true);
        if !problems.is_empty() {
            return Err(problems);
        }
        let tokenizer = context.input("tokenizer").map(|input| &input.meta);
        let meta = ArtifactMeta {
            tokenizer: tokenizer.and_then(|meta| meta.tokenizer.clone()),
            vocab_size: tokenizer.and_then(|meta| meta.vocab_size),
            rows: config.rows.max_rows,
            ..ArtifactMeta::new(ArtifactType::Prompts)
        };
        Ok(Description { outputs: BTreeMap::from([("prompts".into(), meta)]), ..Description::default() })
    }

    fn run(config: &PromptsConfig, context: &RunContext<'_>) -> StageResult<BTreeMap<String, Artifact>> {
        let tokenizer = ChatTokenizer::load(&context.input("tokenizer")?.artifact)?;
        let mut writer = PromptWriter::new(context.store)?;
        let fields = rows::PromptFields { answer: config.answer_field.clone(), answer_after: config.answer_after.clone() };
        let convert = |row: &Value| -> Result<UsableRow<PromptRow>, RowError> {
            let prompt = rows::prompt(row, &fields)?;
            let question = question_digest(&prompt.messages);
            let messages = config.rows.with_system(prompt.messages);
            let ids = tokenizer.encode_prompt(Chat::new(&messages, &prompt.context))?;
            let last = messages.iter().rev().find(|message| message.role == "user");
            let text = last.map(|message| message.content.clone()).unwrap_or_default();
            Ok(UsableRow {
                format: prompt.format,
                question,
                row: PromptRow { ids, text, answer: prompt.answer, messages, context: prompt.context },
            })
        };
        let (mut answers, mut tokens, mut lengths) = (0u64, 0u64, RowLengths::default());
        let counts = convert_rows(context, &config.rows, true, convert, |split, row| {
            answers += u64::from(row.answer.is_some());
            tokens += row.ids.len() as u64;
            lengths.add(row.ids.len() as u64);
            writer.push(split, &row)
        })?;
        context.metrics(0, &[("answers", answers as f64), ("tokens", tokens as f64)]);
        context.metrics(0, &lengths.tokens().metrics());
        let mut builder = context.output(ArtifactType::Prompts);
        writer.finish(&mut builder)?;
        builder.metadata(json!({
            "tokenizer": tokenizer.digest(),
            "rows": { "train": counts.train, "heldout": counts.heldout },
            "answers": answers,
        }));
        Ok(BTreeMap::from([("prompts".into(), builder.publish()?)]))
    }
}
