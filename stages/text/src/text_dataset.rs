use rlflow_api::{Artifact, ArtifactBuilder, ArtifactType, Blob, StageResult, Store};

use crate::{
    Split,
    packed::{Array, expect_type, malformed, read_bounds, read_selection, row_range, u64_bytes},
    scratch::Scratch,
};

/// Documents of a `text` artifact, read from memory-mapped files.
///
/// | entry | content |
/// |---|---|
/// | `text` | all different documents, one after another, UTF-8 |
/// | `offsets` | u64: byte at which each document begins, and the end |
/// | `train`, `heldout` | u64: document numbers in the order in which the split passes them; a document that is drawn twice is listed twice and stored once |
/// | `mixture.json` | what was read, kept and drawn, per source |
pub struct TextDataset {
    text: Blob,
    offsets: Array<u64>,
    order: Array<u64>,
}

impl TextDataset {
    /// Opens a split.
    pub fn load(artifact: &Artifact, split: Split) -> StageResult<Self> {
        expect_type(artifact, ArtifactType::Text)?;
        let text = artifact.read("text")?;
        let offsets = read_bounds(artifact, "offsets", text.len())?;
        let order = read_selection(artifact, split.entry(), offsets.len() - 1)?;
        let valid = std::str::from_utf8(&text).is_ok_and(|text| offsets.iter().all(|at| text.is_char_boundary(*at as usize)));
        if !valid {
            return Err(malformed(artifact, "`text` is not UTF-8 between its offsets"));
        }
        Ok(Self { text, offsets, order })
    }

    /// Documents in the split, counting repeated draws.
    pub fn len(&self) -> usize {
        self.order.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    /// The `index`th document of the split.
    pub fn document(&self, index: usize) -> &str {
        self.stored(self.order[index])
    }

    /// All documents of the split in order.
    pub fn documents(&self) -> impl Iterator<Item = &str> {
        (0..self.len()).map(|index| self.document(index))
    }

    /// Bytes of text in the split, counting repeated draws.
    pub fn size_bytes(&self) -> u64 {
        self.order.iter().map(|document| row_range(&self.offsets, *document).len() as u64).sum()
    }

    /// Stored documents of both splits.
    pub(crate) fn stored_len(&self) -> usize {
        self.offsets.len() - 1
    }

    /// A stored document.
    pub(crate) fn stored(&self, document: u64) -> &str {
        std::str::from_utf8(&self.text[row_range(&self.offsets, document)]).expect("checked when loading")
    }

    /// Stored documents in the order of the split.
    pub(crate) fn order(&self) -> &[u64] {
        &self.order
    }
}

/// Writes a `text` artifact: documents first, in bounded memory, then the splits.
pub struct TextWriter {
    text: Scratch,
    offsets: Vec<u64>,
}

impl TextWriter {
    /// No documents yet.
    pub fn new(store: &Store) -> StageResult<Self> {
        Ok(Self { text: Scratch::new(store)?, offsets: vec![0] })
    }

    /// Stores a document and returns its number.
    pub fn push(&mut self, document: &str) -> StageResult<u64> {
        self.text.append(document.as_bytes())?;
        self.offsets.push(self.text.len());
        Ok(self.offsets.len() as u64 - 2)
    }

    /// Length of a stored document in bytes.
    pub fn size_bytes(&self, document: u64) -> u64 {
        row_range(&self.offsets, document).len() as u64
    }

    /// Adds the entries to `builder`; `train` and `heldout` list document numbers.
    pub fn finish(self, builder: &mut ArtifactBuilder, train: &[u64], heldout: &[u64]) -> StageResult<()> {
        self.text.finish(builder, "text")?;
        builder.put("offsets", &u64_bytes(&self.offsets))?;
        builder.put(Split::Train.entry(), &u64_bytes(train))?;
        builder.put(Split::HeldOut.entry(), &u64_bytes(heldout))?;
        Ok(())
    }
}
