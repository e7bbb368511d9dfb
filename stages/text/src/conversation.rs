use rlflow_api::{Artifact, ArtifactBuilder, ArtifactType, Blob, StageResult, Store};

use crate::{
    Split,
    packed::{Array, expect_type, malformed, read_bounds, read_selection, row_range, u64_bytes},
    scratch::Scratch,
};

/// A conversation as token ids.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ConversationRow {
    /// The rendered conversation.
    pub ids: Vec<u32>,
    /// As long as `ids`; true = this token is a target that counts: every token of every assistant turn, the one
    /// that ends the turn included, and nothing else.
    pub mask: Vec<bool>,
}

/// Rows of a `conversations` artifact, whole: cutting them to a context is the trainer's decision.
///
/// | entry | content |
/// |---|---|
/// | `ids` | u32: token ids of all conversations |
/// | `mask` | u8 per id: 1 = a target that counts |
/// | `offsets` | u64: id at which each conversation begins, and the end |
/// | `train`, `heldout` | u64: row numbers of the split |
///
/// Metadata: `tokenizer` (its digest), rows and counted tokens.
pub struct ConversationDataset {
    ids: Array<u32>,
    mask: Blob,
    offsets: Array<u64>,
    order: Array<u64>,
}

impl ConversationDataset {
    /// Opens a split.
    pub fn load(artifact: &Artifact, split: Split) -> StageResult<Self> {
        expect_type(artifact, ArtifactType::Conversations)?;
        let ids = Array::read(artifact, "ids")?;
        let mask = artifact.read("mask")?;
        if mask.len() != ids.len() {
            return Err(malformed(artifact, format!("`mask` has {} values for {} ids", mask.len(), ids.len())));
        }
        let offsets = read_bounds(artifact, "offsets", ids.len())?;
        let order = read_selection(artifact, split.entry(), offsets.len() - 1)?;
        Ok(Self { ids, mask, offsets, order })
    }

    /// Rows in the split.
    pub fn len(&self) -> usize {
        self.order.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    /// The `index`th row of the split.
    pub fn row(&self, index: usize) -> ConversationRow {
        let range = row_range(&self.offsets, self.order[index]);
        ConversationRow { ids: self.ids[range.clone()].to_vec(), mask: self.mask[range].iter().map(|counts| *counts != 0).collect() }
    }

    /// All rows of the split in order.
    pub fn rows(&self) -> impl Iterator<Item = ConversationRow> {
        (0..self.len()).map(|index| self.row(index))
    }

    /// Number of ids of the `index`th row.
    pub fn row_len(&self, index: usize) -> usize {
        row_range(&self.offsets, self.order[index]).len()
    }
}

/// Writes the entries of a `conversations` artifact.
pub struct ConversationWriter {
    ids: Scratch,
    mask: Scratch,
    offsets: Vec<u64>,
    splits: [Vec<u64>; 2],
}

impl ConversationWriter {
    /// No rows yet.
    pub fn new(store: &Store) -> StageResult<Self> {
        Ok(Self { ids: Scratch::new(store)?, mask: Scratch::new(store)?, offsets: vec![0], splits: Default::default() })
    }

    /// Adds a row.
    pub fn push(&mut self, split: Split, row: &ConversationRow) -> StageResult<()> {
        debug_assert_eq!(row.ids.len(), row.mask.len());
        let ids: Vec<u8> = row.ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        let mask: Vec<u8> = row.mask.iter().map(|counts| u8::from(*counts)).collect();
        self.ids.append(&ids)?;
        self.mask.append(&mask)?;
        self.splits[split as usize].push(self.offsets.len() as u64 - 1);
        self.offsets.push(self.mask.len());
        Ok(())
    }

    /// Rows of a split so far.
    pub fn len(&self, split: Split) -> u64 {
        self.splits[split as usize].len() as u64
    }

    /// Adds the entries to `builder`.
    pub fn finish(self, builder: &mut ArtifactBuilder) -> StageResult<()> {
        self.ids.finish(builder, "ids")?;
        self.mask.finish(builder, "mask")?;
        builder.put("offsets", &u64_bytes(&self.offsets))?;
        for split in [Split::Train, Split::HeldOut] {
            builder.put(split.entry(), &u64_bytes(&self.splits[split as usize]))?;
        }
        Ok(())
    }
}
