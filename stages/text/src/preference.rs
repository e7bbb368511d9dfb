use rlflow_api::{Artifact, ArtifactBuilder, ArtifactType, StageResult, Store};

use crate::{
    Split,
    packed::{Array, expect_type, malformed, read_bounds, read_selection, row_range, u64_bytes},
    scratch::Scratch,
};

/// A prompt with two or more answers, as token ids.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct PreferenceRow {
    /// The rendered prompt, up to where the assistant begins to speak.
    pub prompt: Vec<u32>,
    /// At least two answers, best first, each with the token that ends its turn.
    pub answers: Vec<Vec<u32>>,
    /// By how much the first answer is better than the second, where the data say so.
    pub margin: Option<f32>,
}

/// Rows of a `preferences` artifact.
///
/// | entry | content |
/// |---|---|
/// | `ids` | u32: token ids of all sequences; a row is its prompt followed by its answers, best first |
/// | `offsets` | u64: id at which each sequence begins, and the end |
/// | `rows` | u64: sequence at which each row begins, and the end |
/// | `margins` | f32 per row; NaN = none |
/// | `train`, `heldout` | u64: row numbers of the split |
///
/// Metadata: `tokenizer` (its digest) and rows.
pub struct PreferenceDataset {
    ids: Array<u32>,
    offsets: Array<u64>,
    rows: Array<u64>,
    margins: Array<f32>,
    order: Array<u64>,
}

impl PreferenceDataset {
    /// Opens a split.
    pub fn load(artifact: &Artifact, split: Split) -> StageResult<Self> {
        expect_type(artifact, ArtifactType::Preferences)?;
        let ids = Array::read(artifact, "ids")?;
        let offsets = read_bounds(artifact, "offsets", ids.len())?;
        let rows = read_bounds(artifact, "rows", offsets.len() - 1)?;
        let margins = Array::<f32>::read(artifact, "margins")?;
        if rows.windows(2).any(|pair| pair[1] - pair[0] < 3) || margins.len() != rows.len() - 1 {
            return Err(malformed(artifact, "a row has less than a prompt and two answers"));
        }
        let order = read_selection(artifact, split.entry(), rows.len() - 1)?;
        Ok(Self { ids, offsets, rows, margins, order })
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
    pub fn row(&self, index: usize) -> PreferenceRow {
        let row = self.order[index];
        let mut sequences = row_range(&self.rows, row).map(|sequence| self.ids[row_range(&self.offsets, sequence as u64)].to_vec());
        let prompt = sequences.next().unwrap_or_default();
        let margin = Some(self.margins[row as usize]).filter(|margin| !margin.is_nan());
        PreferenceRow { prompt, answers: sequences.collect(), margin }
    }

    /// All rows of the split in order.
    pub fn rows(&self) -> impl Iterator<Item = PreferenceRow> {
        (0..self.len()).map(|index| self.row(index))
    }
}

/// Writes the entries of a `preferences` artifact.
pub struct PreferenceWriter {
    ids: Scratch,
    offsets: Vec<u64>,
    rows: Vec<u64>,
    margins: Vec<u8>,
    splits: [Vec<u64>; 2],
}

impl PreferenceWriter {
    /// No rows yet.
    pub fn new(store: &Store) -> StageResult<Self> {
        Ok(Self { ids: Scratch::new(store)?, offsets: vec![0], rows: vec![0], margins: Vec::new(), splits: Default::default() })
    }

    /// Adds a row.
    pub fn push(&mut self, split: Split, row: &PreferenceRow) -> StageResult<()> {
        for sequence in std::iter::once(&row.prompt).chain(&row.answers) {
            let bytes: Vec<u8> = sequence.iter().flat_map(|id| id.to_le_bytes()).collect();
            self.ids.append(&bytes)?;
            self.offsets.push(self.ids.len() / 4);
        }
        self.splits[split as usize].push(self.rows.len() as u64 - 1);
        self.rows.push(self.offsets.len() as u64 - 1);
        self.margins.extend(row.margin.unwrap_or(f32::NAN).to_le_bytes());
        Ok(())
    }

    /// Rows of a split so far.
    pub fn len(&self, split: Split) -> u64 {
        self.splits[split as usize].len() as u64
    }

    /// Adds the entries to `builder`.
    pub fn finish(self, builder: &mut ArtifactBuilder) -> StageResult<()> {
        self.ids.finish(builder, "ids")?;
        builder.put("offsets", &u64_bytes(&self.offsets))?;
        builder.put("rows", &u64_bytes(&self.rows))?;
        builder.put("margins", &self.margins)?;
        for split in [Split::Train, Split::HeldOut] {
            builder.put(split.entry(), &u64_bytes(&self.splits[split as usize]))?;
        }
        Ok(())
    }
}
