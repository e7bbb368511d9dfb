use std::{ops::Range, sync::Arc};

use rlflow_api::CounterRng;
use rlflow_text::TokenDataset;

/// A part of one document within a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Inputs.
    pub ids: Vec<u32>,
    /// The token that follows the last input in its document, if any.
    pub next: Option<u32>,
}

/// Rows of `length` tokens over a stream of documents: each epoch in an order of its own, end to end, every token in
/// exactly one row. The last row of an epoch may be shorter.
#[derive(Clone)]
pub struct Windows {
    tokens: Arc<TokenDataset>,
    length: usize,
    seed: u64,
    shuffle: bool,
    epoch: Option<Epoch>,
}

#[derive(Clone)]
struct Epoch {
    number: u64,
    order: Vec<u32>,
    /// Token at which each document of `order` begins, and the end.
    starts: Vec<u64>,
}

impl Windows {
    /// Over `tokens`.
    pub fn new(tokens: TokenDataset, length: usize, seed: u64, shuffle: bool) -> Self {
        Self { tokens: Arc::new(tokens), length, seed, shuffle, epoch: None }
    }

    /// Rows per epoch.
    pub fn rows(&self) -> usize {
        self.tokens.total_tokens().div_ceil(self.length as u64) as usize
    }

    /// Lets the system read ahead the documents of those `rows` that are of the epoch of the row that was cut last: from a corpus that
    /// is larger than memory, the trainer would wait for the disk.
    pub fn read_ahead(&self, rows: Range<u64>) {
        let Some(Epoch { number, order, starts }) = &self.epoch else { return };
        let of_epoch = self.rows() as u64;
        let first = (rows.start.max(number * of_epoch) - number * of_epoch) * self.length as u64;
        let last = (rows.end.saturating_sub(number * of_epoch) * self.length as u64).min(self.tokens.total_tokens());
        if first < last {
            let documents = starts.partition_point(|start| *start <= first) - 1..starts.partition_point(|start| *start < last);
            order[documents].iter().for_each(|document| self.tokens.read_ahead(*document as usize));
        }
    }

    /// The pieces of row `row`, counted over all epochs.
    pub fn row(&mut self, row: u64) -> Vec<Piece> {
        let rows = self.rows() as u64;
        let (number, at) = (row / rows, row % rows);
        if self.epoch.as_ref().is_none_or(|epoch| epoch.number != number) {
            self.epoch = Some(self.epoch(number));
        }
        let Some(Epoch { order, starts, .. }) = &self.epoch else { return Vec::new() };
        let (first, last) = (at * self.length as u64, ((at + 1) * self.length as u64).min(self.tokens.total_tokens()));
        let mut pieces = Vec::new();
        let mut document = starts.partition_point(|start| *start <= first) - 1;
        let mut token = first;
        while token < last {
            let (start, end) = (starts[document], starts[document + 1]);
            if end > token {
                let ids = self.tokens.document(order[document] as usize);
                let (from, to) = ((token - start) as usize, (end.min(last) - start) as usize);
                pieces.push(Piece { ids: ids[from..to].to_vec(), next: ids.get(to).copied() });
                token = end.min(last);
            }
            document += 1;
        }
        pieces
    }

    fn epoch(&self, number: u64) -> Epoch {
        let count = self.tokens.len();
        let order = if self.shuffle {
            CounterRng::new(self.seed, "pretrain/order", number, 0).permutation(count)
        } else {
            (0..count as u32).collect()
        };
        let mut starts = Vec::with_capacity(count + 1);
        let mut total = 0;
        for document in &order {
            starts.push(total);
            total += self.tokens.document(*document as usize).len() as u64;
        }
        starts.push(total);
        Epoch { number, order, starts }
    }
}
