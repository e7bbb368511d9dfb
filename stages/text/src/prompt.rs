use rlflow_api::{Artifact, ArtifactBuilder, ArtifactType, StageResult, Store};
use serde::{Deserialize, Serialize};

use crate::{
    ChatContext, Message, Split,
    packed::{Array, expect_type, malformed, read_bounds, read_selection, row_range, u64_bytes},
    scratch::Scratch,
};

/// Something to answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PromptRow {
    /// The rendered prompt, up to where the assistant begins to speak.
    #[serde(skip)]
    pub ids: Vec<u32>,
    /// The last user turn, for people.
    pub text: String,
    /// The right answer, where the data have one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer: Option<String>,
    /// The whole prompt as messages.
    pub messages: Vec<Message>,
    /// What comes with them.
    #[serde(flatten)]
    pub context: ChatContext,
}

/// Rows of a `prompts` artifact.
///
/// | entry | content |
/// |---|---|
/// | `ids` | u32: token ids of all prompts, up to where the assistant begins to speak |
/// | `offsets` | u64: id at which each prompt begins, and the end |
/// | `rows.jsonl` | per row: `text` (the last user turn), `answer` if there is one, `messages`, what comes with them |
/// | `train`, `heldout` | u64: row numbers of the split |
///
/// Metadata: `tokenizer` (its digest), rows, and rows with an answer.
pub struct PromptDataset {
    rows: Vec<PromptRow>,
}

impl PromptDataset {
    /// Opens a split.
    pub fn load(artifact: &Artifact, split: Split) -> StageResult<Self> {
        expect_type(artifact, ArtifactType::Prompts)?;
        let ids = Array::<u32>::read(artifact, "ids")?;
        let offsets = read_bounds(artifact, "offsets", ids.len())?;
        let order = read_selection(artifact, split.entry(), offsets.len() - 1)?;
        let texts = artifact.read("rows.jsonl")?;
        let lines: Vec<&[u8]> = texts.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).collect();
        if lines.len() != offsets.len() - 1 {
            return Err(malformed(artifact, format!("`rows.jsonl` has {} rows for {} prompts", lines.len(), offsets.len() - 1)));
        }
        let row = |row: &u64| {
            let parsed: Result<PromptRow, _> = serde_json::from_slice(lines[*row as usize]);
            let parsed = parsed.map_err(|error| malformed(artifact, format!("row {row} of `rows.jsonl`: {error}")))?;
            Ok(PromptRow { ids: ids[row_range(&offsets, *row)].to_vec(), ..parsed })
        };
        Ok(Self { rows: order.iter().map(row).collect::<StageResult<_>>()? })
    }

    /// Rows in the split.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The `index`th row of the split.
    pub fn row(&self, index: usize) -> &PromptRow {
        &self.rows[index]
    }

    /// All rows of the split in order.
    pub fn rows(&self) -> &[PromptRow] {
        &self.rows
    }
}

/// Writes the entries of a `prompts` artifact.
pub struct PromptWriter {
    ids: Scratch,
    offsets: Vec<u64>,
    texts: Scratch,
    splits: [Vec<u64>; 2],
}

impl PromptWriter {
    /// No rows yet.
    pub fn new(store: &Store) -> StageResult<Self> {
        Ok(Self { ids: Scratch::new(store)?, offsets: vec![0], texts: Scratch::new(store)?, splits: Default::default() })
    }

    /// Adds a row.
    pub fn push(&mut self, split: Split, row: &PromptRow) -> StageResult<()> {
        let ids: Vec<u8> = row.ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        self.ids.append(&ids)?;
        self.splits[split as usize].push(self.offsets.len() as u64 - 1);
        self.offsets.push(self.ids.len() / 4);
        let mut line = serde_json::to_vec(row).expect("a row is strings and JSON values");
        line.push(b'\n');
        self.texts.append(&line)
    }

    /// Rows of a split so far.
    pub fn len(&self, split: Split) -> u64 {
        self.splits[split as usize].len() as u64
    }

    /// Adds the entries to `builder`.
    pub fn finish(self, builder: &mut ArtifactBuilder) -> StageResult<()> {
        self.ids.finish(builder, "ids")?;
        builder.put("offsets", &u64_bytes(&self.offsets))?;
        self.texts.finish(builder, "rows.jsonl")?;
        for split in [Split::Train, Split::HeldOut] {
            builder.put(split.entry(), &u64_bytes(&self.splits[split as usize]))?;
        }
        Ok(())
    }
}
