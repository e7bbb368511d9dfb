use rayon::prelude::*;
use rlflow_api::{Artifact, ArtifactType, RunContext, StageEvent, StageResult};
use serde_json::json;

use crate::{
    ChatTokenizer, Split, TextDataset,
    packed::{Array, expect_type, read_bounds, read_selection, row_range, u64_bytes},
    scratch::Scratch,
};

/// Raised when the same text and tokenizer give other ids.
const VERSION: u32 = 1;
/// Text that is encoded at once: enough to keep every core busy, little enough to hold.
const BATCH_BYTES: usize = 8 << 20;

/// Documents of a `tokens` artifact, read from memory-mapped files.
///
/// | entry | content |
/// |---|---|
/// | `ids` | u32: token ids of all documents, each with the token that ends a document |
/// | `offsets` | u64: id at which each document begins, and the end |
/// | `train`, `heldout` | u64: document numbers in the order in which the split passes them |
///
/// Metadata: `tokenizer` (its digest) and `tokens` per split.
pub struct TokenDataset {
    ids: Array<u32>,
    offsets: Array<u64>,
    order: Array<u64>,
    total_tokens: u64,
}

impl TokenDataset {
    /// Opens a split.
    pub fn load(artifact: &Artifact, split: Split) -> StageResult<Self> {
        expect_type(artifact, ArtifactType::Tokens)?;
        let ids = Array::read(artifact, "ids")?;
        let offsets = read_bounds(artifact, "offsets", ids.len())?;
        let order = read_selection(artifact, split.entry(), offsets.len() - 1)?;
        let total_tokens = order.iter().map(|document| row_range(&offsets, *document).len() as u64).sum();
        Ok(Self { ids, offsets, order, total_tokens })
    }

    /// Documents in the split, counting repeated draws.
    pub fn len(&self) -> usize {
        self.order.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    /// Ids of the `index`th document of the split, the end of document included.
    pub fn document(&self, index: usize) -> &[u32] {
        &self.ids[row_range(&self.offsets, self.order[index])]
    }

    /// Lets the system read the `index`th document ahead.
    pub fn read_ahead(&self, index: usize) {
        self.ids.read_ahead(row_range(&self.offsets, self.order[index]));
    }

    /// Tokens in the split, counting repeated draws.
    pub fn total_tokens(&self) -> u64 {
        self.total_tokens
    }
}

/// The ids of both splits of `corpus`, each document as [`ChatTokenizer::encode_document`] gives it. Kept through
/// [`RunContext::memo_of_leader`], so that a change of training settings does not encode again. Documents are encoded in
/// parallel and written in order, in bounded memory.
pub fn tokenize_corpus(context: &RunContext<'_>, corpus: &Artifact, tokenizer: &ChatTokenizer) -> StageResult<Artifact> {
    let key = json!({ "memo": "tokens", "version": VERSION, "corpus": corpus.digest(), "tokenizer": tokenizer.digest() });
    context.memo_of_leader(&key, |context| encode_documents(context, corpus, tokenizer))
}

fn encode_documents(context: &RunContext<'_>, corpus: &Artifact, tokenizer: &ChatTokenizer) -> StageResult<Artifact> {
    context.phase("tokenising");
    let (train, heldout) = (TextDataset::load(corpus, Split::Train)?, TextDataset::load(corpus, Split::HeldOut)?);
    let documents = train.stored_len() as u64;
    let mut drawn = vec![false; train.stored_len()];
    train.order().iter().chain(heldout.order()).for_each(|document| drawn[*document as usize] = true);

    let mut ids = Scratch::new(context.store)?;
    let mut offsets = vec![0u64];
    let mut next = 0;
    while next < documents {
        context.check_cancelled()?;
        let first = next;
        let mut size_bytes = 0;
        while next < documents && (next == first || size_bytes < BATCH_BYTES) {
            size_bytes += train.stored(next).len();
            next += 1;
        }
        // A document that no split passes keeps its number but has no ids.
        let encode = |document: u64| match drawn[document as usize] {
            false => Vec::new(),
            true => tokenizer.encode_document(train.stored(document)),
        };
        let encoded: Vec<Vec<u32>> = (first..next).into_par_iter().map(encode).collect();
        for document in &encoded {
            let bytes: Vec<u8> = document.iter().flat_map(|id| id.to_le_bytes()).collect();
            ids.append(&bytes)?;
            offsets.push(ids.len() / 4);
        }
        let unit = "documents".to_owned();
        let detail = String::new();
        context.reporter.report(StageEvent::Progress { done: next, total: documents, unit, rate: None, tokens_per_s: None, detail });
    }

    let count = |split: &TextDataset| split.order().iter().map(|document| row_range(&offsets, *document).len() as u64).sum::<u64>();
    let tokens = json!({ "train": count(&train), "heldout": count(&heldout) });
    let mut builder = context.output(ArtifactType::Tokens);
    ids.finish(&mut builder, "ids")?;
    builder.put("offsets", &u64_bytes(&offsets))?;
    builder.put(Split::Train.entry(), &u64_bytes(train.order()))?;
    builder.put(Split::HeldOut.entry(), &u64_bytes(heldout.order()))?;
    builder.metadata(json!({ "tokenizer": tokenizer.digest(), "tokens": tokens }));
    Ok(builder.publish()?)
}
