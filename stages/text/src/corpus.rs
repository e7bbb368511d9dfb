use std::collections::HashSet;

use rlflow_api::{Artifact, ArtifactType, DataFile, Digest, RunContext, StageError, StageEvent, StageResult};
use serde::Serialize;
use serde_json::json;
use unicode_normalization::{IsNormalized, UnicodeNormalization, is_nfc_quick};

use crate::{Mixture, SourceShare, Split, TextSplit, TextWriter, empty_files::EmptyFiles, read_documents, unusable::Unusable};

/// Documents between looks at whether to stop.
const CHECK_EVERY: u64 = 1024;

/// A source of documents.
#[derive(Debug, Clone)]
pub struct CorpusSource<'a> {
    /// Its files.
    pub files: &'a [DataFile],
    /// Field of JSON rows that holds the text.
    pub field: &'a str,
    /// What one document of a plain text file is.
    pub split: TextSplit,
    /// Probability of drawing from it.
    pub weight: Option<f64>,
    /// Most passes over it.
    pub epochs: Option<f64>,
    /// Whether all of it is held out.
    pub heldout: bool,
}

/// How documents become a corpus.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CorpusOptions {
    /// Share of documents held out.
    pub heldout: f64,
    /// Most documents to draw.
    pub max_documents: Option<u64>,
    /// Draw until there is this much text.
    pub max_bytes: Option<u64>,
    /// Share of rows that may be without text.
    pub max_unusable: f64,
    /// Longer documents are cut.
    pub max_document_bytes: Option<u64>,
}

/// Passes over a source that nobody limited, above which the user is told.
const MANY_PASSES: f64 = 20.0;

/// Cuts `text` into pieces of at most `most` bytes (at least one character each) that together are the text: after the last
/// line end of a piece's second half, else after a sentence, else after a space.
fn pieces(mut text: &str, most: usize) -> impl Iterator<Item = &str> {
    std::iter::from_fn(move || {
        let first = text.chars().next()?.len_utf8();
        let mut end = text.len();
        if end > most {
            let limit = (0..=most).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0).max(first);
            let half = (0..=limit / 2).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
            let after = |mark: &str| text[half..limit].rfind(mark).map(|at| half + at + mark.len());
            let sentence = [". ", "! ", "? ", "。", "！", "？"].iter().filter_map(|mark| after(mark)).max();
            end = after("\n").or(sentence).or_else(|| after(" ")).unwrap_or(limit);
        }
        let (piece, rest) = text.split_at(end);
        text = rest;
        Some(piece)
    })
}

/// What became of one source; `mixture.json` lists one per source.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct SourceCounts {
    /// Documents read.
    pub documents: u64,
    /// Bytes of text read.
    pub size_bytes: u64,
    /// Rows without text.
    pub unusable: u64,
    /// Documents that were there before, in this source or another.
    pub duplicates: u64,
    /// Documents held out.
    pub heldout: u64,
    /// Documents to train on.
    pub train: u64,
    /// Probability of drawing from it, normalised, while no source is spent.
    pub weight: Option<f64>,
    /// Draws.
    pub drawn: u64,
    /// Bytes of text drawn.
    pub drawn_bytes: u64,
    /// Passes over its training documents: `drawn` / `train`.
    pub epochs: f64,
}

impl SourceCounts {
    fn rows(&self) -> u64 {
        self.documents + self.unusable
    }
}

/// Reads `sources` into a `text` artifact: Unicode NFC, exact duplicates left out (held-out sources are read first, so that none
/// of their documents is trained on), a held-out part chosen by content, and the mixture drawn. Texts go to disk as they are read;
/// memory holds a few bytes per document.
pub fn build_corpus(context: &RunContext<'_>, sources: &[CorpusSource<'_>], options: &CorpusOptions) -> StageResult<Artifact> {
    let mut corpus = Corpus::new(context, sources.len())?;
    context.phase("reading");
    for heldout in [true, false] {
        for (index, source) in sources.iter().enumerate().filter(|(_, source)| source.heldout == heldout) {
            source.files.iter().try_for_each(|file| corpus.read(context, index, source, file, options))?;
        }
    }
    let rows: u64 = corpus.counts.iter().map(SourceCounts::rows).sum();
    if rows == 0 {
        return Err(corpus.empty.error("documents"));
    }
    corpus.empty.warn(context, "documents");
    corpus.unusable.settle(context, rows, options.max_unusable)?;
    corpus.hold_out_one(options.heldout);
    corpus.draw(context, sources, options)?;
    corpus.publish(context)
}

struct Corpus {
    writer: TextWriter,
    seen: HashSet<[u8; 16]>,
    /// Documents to train on, by source.
    train: Vec<Vec<u64>>,
    heldout: Vec<u64>,
    /// The training document whose content comes first in the order that holds documents out.
    first: Option<(Digest, usize, u64)>,
    drawn: Vec<u64>,
    counts: Vec<SourceCounts>,
    unusable: Unusable,
    empty: EmptyFiles,
    read_bytes: u64,
}

impl Corpus {
    fn new(context: &RunContext<'_>, sources: usize) -> StageResult<Self> {
        Ok(Self {
            writer: TextWriter::new(context.store)?,
            seen: HashSet::new(),
            train: vec![Vec::new(); sources],
            heldout: Vec::new(),
            first: None,
            drawn: Vec::new(),
            counts: vec![SourceCounts::default(); sources],
            unusable: Unusable::default(),
            empty: EmptyFiles::default(),
            read_bytes: 0,
        })
    }

    fn read(
        &mut self,
        context: &RunContext<'_>,
        index: usize,
        source: &CorpusSource<'_>,
        file: &DataFile,
        options: &CorpusOptions,
    ) -> StageResult<()> {
        let mut visited = 0u64;
        let before = self.counts[index].rows();
        read_documents(file, source.split, source.field, |line, text| {
            visited += 1;
            if visited.is_multiple_of(CHECK_EVERY) {
                context.check_cancelled()?;
            }
            match text {
                Ok(text) => {
                    let most = options.max_document_bytes.map_or(usize::MAX, |most| most.max(1) as usize);
                    pieces(text, most).try_for_each(|piece| self.add(index, source, piece, options.heldout))
                }
                Err(reason) => {
                    self.counts[index].unusable += 1;
                    self.unusable.add(file, line, reason);
                    Ok(())
                }
            }
        })?;
        context.check_cancelled()?;
        if self.counts[index].rows() == before {
            self.empty.add(file);
        }
        self.read_bytes += file.size_bytes;
        let (done, total) = (self.read_bytes, context.files.iter().flatten().map(|file| file.size_bytes).sum());
        let (unit, detail) = ("bytes".into(), file.name.clone());
        context.reporter.report(StageEvent::Progress { done, total, unit, rate: None, tokens_per_s: None, detail });
        Ok(())
    }

    fn add(&mut self, index: usize, source: &CorpusSource<'_>, text: &str, heldout: f64) -> StageResult<()> {
        if text.trim().is_empty() {
            return Ok(());
        }
        let normal;
        let text = match is_nfc_quick(text.chars()) {
            IsNormalized::Yes => text,
            _ => {
                normal = text.nfc().collect::<String>();
                &normal
            }
        };
        let counts = &mut self.counts[index];
        counts.documents += 1;
        counts.size_bytes += text.len() as u64;
        let digest = Digest::of(text.as_bytes());
        // 128 bits: among 2^40 documents a false duplicate has a chance of 2^-49.
        let short: [u8; 16] = digest.as_bytes()[..16].try_into().expect("a digest has 32 bytes");
        if !self.seen.insert(short) {
            counts.duplicates += 1;
            return Ok(());
        }
        let document = self.writer.push(text)?;
        if source.heldout || Split::of(digest, heldout) == Split::HeldOut {
            self.heldout.push(document);
            self.counts[index].heldout += 1;
        } else {
            if self.first.is_none_or(|(first, ..)| digest < first) {
                self.first = Some((digest, index, document));
            }
            self.train[index].push(document);
        }
        Ok(())
    }

    /// Few documents may all fall on one side; one is held out nevertheless if a share was asked for.
    fn hold_out_one(&mut self, heldout: f64) {
        let documents: usize = self.train.iter().map(Vec::len).sum();
        if let Some((_, index, document)) = self.first.filter(|_| heldout > 0.0 && self.heldout.is_empty() && documents > 1) {
            self.train[index].retain(|kept| *kept != document);
            self.heldout.push(document);
            self.counts[index].heldout += 1;
        }
    }

    fn draw(&mut self, context: &RunContext<'_>, sources: &[CorpusSource<'_>], options: &CorpusOptions) -> StageResult<()> {
        let shares: Vec<SourceShare> = std::iter::zip(sources, &self.train)
            .map(|(source, train)| SourceShare { documents: train.len() as u64, weight: source.weight, epochs: source.epochs })
            .collect();
        let live: f64 = shares.iter().filter(|share| share.documents > 0).filter_map(|share| share.weight).sum();
        for (counts, share) in self.counts.iter_mut().zip(&shares) {
            counts.train = share.documents;
            counts.weight = share.weight.filter(|_| share.documents > 0 && live > 0.0).map(|weight| weight / live);
        }
        let limited = options.max_documents.is_some() || options.max_bytes.is_some();
        let (most, most_bytes) = (options.max_documents.unwrap_or(u64::MAX), options.max_bytes.unwrap_or(u64::MAX));
        let mut size_bytes = 0;
        for draw in Mixture::new(&shares, context.seed, limited) {
            if self.drawn.len() as u64 >= most || size_bytes >= most_bytes {
                break;
            }
            if (self.drawn.len() as u64).is_multiple_of(CHECK_EVERY) {
                context.check_cancelled()?;
            }
            let document = self.train[draw.source][draw.document as usize];
            let length = self.writer.size_bytes(document);
            size_bytes += length;
            self.counts[draw.source].drawn += 1;
            self.counts[draw.source].drawn_bytes += length;
            self.drawn.push(document);
        }
        for counts in self.counts.iter_mut().filter(|counts| counts.train > 0) {
            counts.epochs = counts.drawn as f64 / counts.train as f64;
        }
        for (counts, source) in self.counts.iter().zip(sources).filter(|(counts, _)| counts.epochs > MANY_PASSES) {
            if let (None, Some(file)) = (source.epochs, source.files.first()) {
                context.warning(format!(
                    "{}: its {} documents are passed {:.0} times to reach its weight; set `epochs`, `max_documents` or `max_bytes` to limit that",
                    file.name, counts.train, counts.epochs
                ));
            }
        }
        if self.drawn.is_empty() {
            return Err(StageError::invalid_with_hint(
                "no document is left to train on",
                "every one is held out, a duplicate, or of a source with weight or epochs 0",
            ));
        }
        Ok(())
    }

    fn publish(self, context: &RunContext<'_>) -> StageResult<Artifact> {
        let sum = |count: fn(&SourceCounts) -> u64| self.counts.iter().map(count).sum::<u64>();
        let heldout_bytes: u64 = self.heldout.iter().map(|document| self.writer.size_bytes(*document)).sum();
        let (drawn, drawn_bytes) = (self.drawn.len() as u64, sum(|counts| counts.drawn_bytes));
        let values = [
            ("documents", sum(|counts| counts.documents)),
            ("bytes", sum(|counts| counts.size_bytes)),
            ("duplicates", sum(|counts| counts.duplicates)),
            ("unusable_rows", sum(|counts| counts.unusable)),
            ("train_documents", drawn),
            ("train_bytes", drawn_bytes),
            ("heldout_documents", self.heldout.len() as u64),
            ("heldout_bytes", heldout_bytes),
        ];
        context.metrics(0, &values.map(|(name, value)| (name, value as f64)));
        for (index, counts) in self.counts.iter().enumerate().filter(|_| self.counts.len() > 1) {
            let name = |metric: &str| format!("source{index}/{metric}");
            context.metrics(0, &[(&name("documents"), counts.drawn as f64), (&name("epochs"), counts.epochs)]);
        }
        let mixture = json!({
            "sources": self.counts,
            "train": { "documents": drawn, "size_bytes": drawn_bytes },
            "heldout": { "documents": self.heldout.len(), "size_bytes": heldout_bytes },
        });
        let mut builder = context.output(ArtifactType::Text);
        self.writer.finish(&mut builder, &self.drawn, &self.heldout)?;
        builder.put("mixture.json", &serde_json::to_vec_pretty(&mixture).expect("counts are JSON"))?;
        builder.metadata(json!({ "train": mixture["train"], "heldout": mixture["heldout"] }));
        Ok(builder.publish()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn long_documents_are_cut_where_it_hurts_least() {
        let cut = |text: &'static str, most| pieces(text, most).collect::<Vec<_>>();
        assert_eq!(cut("short", 10), ["short"]);
        assert_eq!(cut("one. two three\nfour", 17), ["one. two three\n", "four"]);
        assert_eq!(cut("It is so. And not so.", 14), ["It is so. ", "And not so."]);
        assert_eq!(cut("aaaa bbbb cccc", 10), ["aaaa bbbb ", "cccc"]);
        assert_eq!(cut("你好。世界", 10), ["你好。", "世界"]);
        assert_eq!(cut("你好", 1), ["你", "好"]);
        assert_eq!(cut("", 5), [""; 0]);
    }

    proptest! {
        #[test]
        fn pieces_are_the_text(text in "[a. \n你é]{0,80}", most in 1usize..30) {
            let cut: Vec<&str> = pieces(&text, most).collect();
            prop_assert_eq!(cut.concat(), text.as_str());
            prop_assert!(cut.iter().all(|piece| !piece.is_empty() && (piece.len() <= most || piece.chars().count() == 1)));
        }
    }
}
