//! `instructions`: rows of conversations in the usual formats become token ids with a mask of what the assistant says.

use std::collections::BTreeMap;

use rlflow_api::{
    Artifact, ArtifactMeta, ArtifactType, DataSource, DescribeContext, Description, InputPort, OutputPort, Problem, RowLengths, RunContext,
    StageKind, StageResult,
};
use rlflow_text::{
    Chat, ChatTokenizer, ConversationRow, ConversationWriter, RowError, RowSettings, UsableRow, convert_rows, question_digest, rows,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// See the module.
pub struct Instructions;

/// Settings of `instructions`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct InstructionsConfig {
    /// Files and rows.
    #[serde(flatten)]
    pub rows: RowSettings,
}

impl StageKind for Instructions {
    type Config = InstructionsConfig;

    const NAME: &'static str = "instructions";
    const VERSION: u32 = 3;
    const SUMMARY: &'static str = "Reads Alpaca, OpenAI messages, ShareGPT and prompt/completion rows into conversations with a loss mask.";
    const INPUTS: &'static [InputPort] = &[InputPort::one("tokenizer", &[ArtifactType::Tokenizer], "Tokenizer and chat template.")];
    const OUTPUTS: &'static [OutputPort] = &[OutputPort {
        name: "conversations",
        types: &[ArtifactType::Conversations],
        doc: "Whole conversations as ids, with a mask of what the assistant says; both splits.",
    }];
    const METRICS: &'static [(&'static str, &'static str)] = &[
        ("rows", "rows read"),
        ("unusable_rows", "rows that cannot be used"),
        ("train_rows", "rows to train on"),
        ("heldout_rows", "rows held out"),
        ("rows/<format>", "usable rows of a format"),
        ("tokens", "tokens of all conversations"),
        ("counted_tokens", "tokens that are targets"),
        ("longest_row", "tokens of the longest conversation"),
        ("mean_row", "mean of the same over all rows"),
        ("row_deviation", "its standard deviation"),
    ];
    const DRAWS: bool = false;

    fn data_sources(config: &InstructionsConfig) -> Vec<DataSource> {
        config.rows.data_sources()
    }

    fn describe(config: &InstructionsConfig, context: &DescribeContext<'_>) -> Result<Description, Vec<Problem>> {
        let problems = config.rows.check_formats(context.files, false);
        if !problems.is_empty() {
            return Err(problems);
        }
        let tokenizer = context.input("tokenizer").map(|input| &input.meta);
        let meta = ArtifactMeta {
            tokenizer: tokenizer.and_then(|meta| meta.tokenizer.clone()),
            vocab_size: tokenizer.and_then(|meta| meta.vocab_size),
            rows: config.rows.max_rows,
            ..ArtifactMeta::new(ArtifactType::Conversations)
        };
        Ok(Description { outputs: BTreeMap::from([("conversations".into(), meta)]), ..Description::default() })
    }

    fn run(config: &InstructionsConfig, context: &RunContext<'_>) -> StageResult<BTreeMap<String, Artifact>> {
        let tokenizer = ChatTokenizer::load(&context.input("tokenizer")?.artifact)?;
        let mut writer = ConversationWriter::new(context.store)?;
        let convert = |row: &Value| -> Result<UsableRow<ConversationRow>, RowError> {
            let conversation = rows::conversation(row)?;
            let question = question_digest(&conversation.messages);
            let messages = config.rows.with_system(conversation.messages);
            let row = tokenizer.encode_conversation(Chat::new(&messages, &conversation.context))?;
            Ok(UsableRow { format: conversation.format, question, row })
        };
        let (mut tokens, mut counted, mut lengths) = (0u64, 0u64, RowLengths::default());
        let counts = convert_rows(context, &config.rows, false, convert, |split, row| {
            tokens += row.ids.len() as u64;
            counted += row.mask.iter().filter(|counts| **counts).count() as u64;
            lengths.add(row.ids.len() as u64);
            writer.push(split, &row)
        })?;
        context.metrics(0, &[("tokens", tokens as f64), ("counted_tokens", counted as f64)]);
        context.metrics(0, &lengths.tokens().metrics());
        let mut builder = context.output(ArtifactType::Conversations);
        writer.finish(&mut builder)?;
        builder.metadata(json!({
            "tokenizer": tokenizer.digest(),
            "rows": { "train": counts.train, "heldout": counts.heldout },
            "tokens": tokens,
            "counted_tokens": counted,
        }));
        Ok(BTreeMap::from([("conversations".into(), builder.publish()?)]))
    }
}
