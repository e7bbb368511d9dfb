//! Text on its way to the trainer: tokenised and packed as `pretrain` does it, then cut into batches.

use std::{
    fs::File,
    io::{BufWriter, Write as _},
    path::PathBuf,
    time::Instant,
};

use rlflow_api::{Artifact, ArtifactType, CounterRng, StageError, StageResult, testing::Bench};
use rlflow_stages::pretrain::{Windows, batch};
use rlflow_text::{
    BpeOptions, ChatTokenizer, Split, TOKENIZER_ENTRY, TextWriter, TokenDataset, TokenizerConfig, TokenizerOptions, complete_tokenizer,
    tokenize_corpus, train_bpe,
};
use tempfile::TempDir;

use super::size::Size;

const VOCAB: usize = 16_384;
/// Different words of the text.
const WORDS: usize = 60_000;
/// Words of a document, at most.
const LONGEST: u64 = 800;
/// Of how much of the text the tokenizer is trained.
const TRAINED_BYTES: usize = 4_000_000;

/// A corpus, the same text as a file with a document per line, and a tokenizer for both.
pub struct Data {
    folder: TempDir,
    bench: Bench,
    corpus: Artifact,
    tokenizer: ChatTokenizer,
    /// Bytes of the documents.
    pub size_bytes: u64,
}

impl Data {
    /// Made-up words, the more frequent ones shorter, in documents of different lengths.
    pub fn new(size_bytes: u64) -> StageResult<Self> {
        let folder = TempDir::new().map_err(io("a temporary folder"))?;
        let bench = Bench::new(folder.path())?;
        let words: Vec<String> = (0..WORDS).map(word).collect();
        let mut lines = BufWriter::new(File::create(folder.path().join("text.txt")).map_err(io("text.txt"))?);
        let mut writer = TextWriter::new(&bench.store)?;
        let (mut documents, mut sample, mut written, mut sampled) = (Vec::new(), Vec::new(), 0, 0);
        while written < size_bytes {
            let document = document(&words, documents.len() as u64);
            written += document.len() as u64;
            writeln!(lines, "{document}").map_err(io("text.txt"))?;
            documents.push(writer.push(&document)?);
            if sampled < TRAINED_BYTES {
                sampled += document.len();
                sample.push(document);
            }
        }
        lines.flush().map_err(io("text.txt"))?;
        let mut builder = bench.store.artifact(ArtifactType::Text.name());
        writer.finish(&mut builder, &documents, &[])?;
        let corpus = builder.publish()?;
        let options = TokenizerOptions::default();
        let special_tokens = options.trained_special_tokens();
        let bpe = BpeOptions { vocab_size: VOCAB, min_frequency: 2, split_digits: false, special_tokens };
        let trained = train_bpe(sample.iter().map(String::as_str), &bpe)?;
        let (json, config) = complete_tokenizer(trained, TokenizerConfig::default(), &options)?;
        std::fs::write(folder.path().join(TOKENIZER_ENTRY), &json).map_err(io(TOKENIZER_ENTRY))?;
        let tokenizer = ChatTokenizer::from_json(&json, &config)?;
        Ok(Self { folder, bench, corpus, tokenizer, size_bytes: written })
    }

    /// The text, a document per line; the tokenizer; where ids may be written.
    pub fn files(&self) -> [PathBuf; 3] {
        ["text.txt", TOKENIZER_ENTRY, "ids.bin"].map(|name| self.folder.path().join(name))
    }

    /// Id of the token that ends a document.
    pub fn document_end_id(&self) -> u32 {
        self.tokenizer.document_end_id()
    }

    /// Seconds from the corpus to packed ids in the store, and the ids.
    pub fn tokenise(&self) -> StageResult<(f64, TokenDataset)> {
        self.bench.clear_memos();
        let start = Instant::now();
        let tokens = self.bench.with_context("data", 1, &[], &[], |context| tokenize_corpus(context, &self.corpus, &self.tokenizer))?;
        let seconds = start.elapsed().as_secs_f64();
        Ok((seconds, TokenDataset::load(&tokens, Split::Train)?))
    }

    /// Seconds that a trainer of `size` needs for a batch of these ids, the mean of a thousand steps in shuffled order.
    pub fn batch_seconds(&self, size: &Size) -> StageResult<f64> {
        const STEPS: u64 = 1000;
        let mut windows = Windows::new(self.tokenise()?.1, size.length, 1, true);
        let rows = |step: u64| step * size.batch as u64..(step + 1) * size.batch as u64;
        // Orders the documents.
        batch(&mut windows, rows(0));
        let start = Instant::now();
        let tokens: usize = (1..=STEPS).map(|step| batch(&mut windows, rows(step)).batch.tokens()).sum();
        assert!(tokens > 0, "batches of real rows");
        Ok(start.elapsed().as_secs_f64() / STEPS as f64)
    }
}

fn io(what: &'static str) -> impl Fn(std::io::Error) -> StageError {
    move |source| StageError::Io { operation: what.to_owned(), source }
}

/// The `rank`th word.
fn word(rank: usize) -> String {
    const SYLLABLES: [&str; 24] = [
        "ba", "ten", "ri", "so", "al", "mi", "er", "con", "de", "lu", "na", "ist", "po", "ver", "an", "qui", "hel", "or", "tri", "est",
        "gra", "ung", "fo", "ine",
    ];
    let mut rng = CounterRng::new(1, "word", 0, rank as u64);
    let syllables = 1 + (rank + 1).ilog10() as u64 / 2 + rng.below(3);
    (0..syllables).map(|_| SYLLABLES[rng.below(SYLLABLES.len() as u64) as usize]).collect()
}

/// Words whose frequency falls with their rank (Zipf's law), with capitals, punctuation and numbers.
fn document(words: &[String], number: u64) -> String {
    let mut rng = CounterRng::new(1, "document", 0, number);
    let mut text = String::new();
    let mut sentence = 0;
    for _ in 0..20 + rng.below(LONGEST - 20) {
        if !text.is_empty() {
            text.push(' ');
        }
        let rank = (words.len() as f64).powf(rng.uniform()) as usize - 1;
        let word = &words[rank.min(words.len() - 1)];
        if sentence == 0 {
            text.extend(word.chars().take(1).flat_map(char::to_uppercase).chain(word.chars().skip(1)));
        } else if rng.below(40) == 0 {
            text += &rng.below(10_000).to_string();
        } else {
            text += word;
        }
        sentence += 1;
        match rng.below(12) {
            0 if sentence > 3 => {
                text.push('.');
                sentence = 0;
            }
            1 => text.push(','),
            _ => {}
        }
    }
    text
}
