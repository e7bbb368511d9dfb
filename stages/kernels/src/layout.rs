//! Where sequences stand in a packed batch.

/// Sequences laid end to end, without padding. `true` neighbours are in the same sequence; attention never crosses a start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SequenceLayout {
    starts: Vec<usize>,
    positions: Vec<u32>,
}

impl SequenceLayout {
    /// From the sequences' lengths, each at least 1. Positions count from 0 in each.
    pub fn from_lengths(lengths: impl IntoIterator<Item = usize>) -> Self {
        let mut layout = Self { starts: vec![0], positions: Vec::new() };
        for length in lengths {
            layout.positions.extend(0..length as u32);
            layout.starts.push(layout.positions.len());
        }
        layout
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.positions.len()
    }

    /// Number of sequences.
    pub fn sequences(&self) -> usize {
        self.starts.len() - 1
    }

    /// Token range of sequence `index`.
    pub fn range(&self, index: usize) -> std::ops::Range<usize> {
        self.starts[index]..self.starts[index + 1]
    }

    /// Position of each token in its sequence.
    pub fn positions(&self) -> &[u32] {
        &self.positions
    }

    /// Length of the longest sequence.
    pub fn longest(&self) -> usize {
        self.starts.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0)
    }
}
