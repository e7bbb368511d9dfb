//! `corpus`: text, web pages, JSON, CSV and Parquet become deduplicated documents, a held-out part and a drawn mixture.

use std::collections::BTreeMap;

use rlflow_api::{
    Artifact, ArtifactMeta, ArtifactType, DataSource, DescribeContext, Description, InputPort, OutputPort, Problem, RunContext, StageKind,
    StageResult,
};
use rlflow_text::{CorpusOptions, CorpusSource, TextSplit, build_corpus, check_document_formats};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// See the module.
pub struct Corpus;

/// A source of documents with its part in the mixture.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// Path or glob, relative to the workflow file: .txt, .md, .html, .jsonl, .json, .csv or .tsv, each also with .gz or .zst, or .parquet.
    #[schemars(extend("x-setting" = "path"))]
    pub path: String,
    /// Probability of drawing a document from this source; the weights of all sources are normalised. Give every source a
    /// weight or none: without weights every document is taken once, in order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0))]
    pub weight: Option<f64>,
    /// Most passes over this source, fractions allowed; after them the others' weights are renormalised. Without it a source with
    /// a weight is repeated until every such source was passed once, and one without is passed once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0), extend("x-unit" = "passes"))]
    pub epochs: Option<f64>,
    /// Field or column that holds the text, in files with rows.
    #[serde(default = "default_field")]
    pub field: String,
    /// What one document of a plain text file, or of a web page's text, is: all of it, a paragraph (between blank lines), or a line.
    #[serde(default)]
    pub split: TextSplit,
}

/// A source whose documents are all held out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HeldoutSource {
    /// Path or glob, relative to the workflow file; formats as in `sources`.
    #[schemars(extend("x-setting" = "path"))]
    pub path: String,
    /// Field or column that holds the text, in files with rows.
    #[serde(default = "default_field")]
    pub field: String,
    /// What one document of a plain text file, or of a web page's text, is: all of it, a paragraph (between blank lines), or a line.
    #[serde(default)]
    pub split: TextSplit,
}

fn default_field() -> String {
    "text".into()
}

/// Settings of `corpus`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CorpusConfig {
    /// Where documents come from.
    #[schemars(length(min = 1))]
    pub sources: Vec<Source>,
    /// Share of documents held out for measuring, from 0 to 1. A document's content alone decides, so that it stays on its side
    /// when others come and go. Of two or more documents at least one is held out, unless the share is 0.
    #[serde(default = "default_heldout")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub heldout: f64,
    /// Sources whose documents are all held out, and left out of the training part if they are there too.
    #[serde(default)]
    pub heldout_sources: Vec<HeldoutSource>,
    /// Most documents to draw. With weights, sources without `epochs` are repeated until there are so many.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1), extend("x-unit" = "documents"))]
    pub max_documents: Option<u64>,
    /// Stop drawing when there is this much text. With weights, sources without `epochs` are repeated until then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1), extend("x-unit" = "bytes"))]
    pub max_bytes: Option<u64>,
    /// Documents longer than this are cut into several, after a line or a sentence where possible, so that parts of a very long one can
    /// be weighed and held out. Not cut if not set: trainers split documents to their context anyway.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 64), extend("x-unit" = "bytes"))]
    pub max_document_bytes: Option<u64>,
    /// Share of rows that may be without text, from 0 to 1; more is an error.
    #[serde(default = "default_max_unusable")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub max_unusable: f64,
}

const fn default_heldout() -> f64 {
    0.02
}

const fn default_max_unusable() -> f64 {
    0.5
}

impl StageKind for Corpus {
    type Config = CorpusConfig;

    const NAME: &'static str = "corpus";
    const VERSION: u32 = 1;
    const SUMMARY: &'static str = "Reads text, HTML, JSONL, JSON, CSV and Parquet into documents: Unicode NFC, exact duplicates left out, a held-out part, and a mixture of sources.";
    const INPUTS: &'static [InputPort] = &[];
    const OUTPUTS: &'static [OutputPort] =
        &[OutputPort { name: "text", types: &[ArtifactType::Text], doc: "The documents, with both splits." }];
    const METRICS: &'static [(&'static str, &'static str)] = &[
        ("documents", "documents read"),
        ("bytes", "bytes of text read"),
        ("duplicates", "documents that were there before"),
        ("unusable_rows", "rows without text"),
        ("train_documents", "documents drawn for training, repeated ones counted"),
        ("train_bytes", "bytes of text drawn for training"),
        ("heldout_documents", "documents held out"),
        ("heldout_bytes", "bytes of text held out"),
        ("source<i>/documents", "documents drawn from source i"),
        ("source<i>/epochs", "passes over source i"),
    ];
    const DRAWS: bool = true;

    fn check(config: &CorpusConfig) -> Vec<Problem> {
        let mut problems = Vec::new();
        let weighted = config.sources.iter().any(|source| source.weight.is_some());
        for (index, source) in config.sources.iter().enumerate() {
            if weighted && source.weight.is_none() {
                let problem = Problem::new(
                    "missing_setting",
                    format!("sources[{index}]"),
                    format!("`{}` has no weight, other sources have", source.path),
                );
                problems.push(problem.hint("give every source a `weight`, or none"));
            }
            if source.epochs == Some(0.0) {
                let problem =
                    Problem::new("out_of_range", format!("sources[{index}].epochs"), "a source that is passed 0 times is not read");
                problems.push(problem.hint("remove the source, or set `epochs` above 0"));
            }
        }
        if weighted && config.sources.iter().all(|source| source.weight.unwrap_or(0.0) == 0.0) {
            problems.push(Problem::new("out_of_range", "sources", "every weight is 0"));
        }
        problems
    }

    fn data_sources(config: &CorpusConfig) -> Vec<DataSource> {
        let source = |list: &str, index: usize, path: &str| DataSource {
            setting: format!("{list}[{index}].path"),
            pattern: path.to_owned(),
            directory: false,
            endings: &[],
        };
        let train = config.sources.iter().enumerate().map(|(index, entry)| source("sources", index, &entry.path));
        let heldout = config.heldout_sources.iter().enumerate().map(|(index, entry)| source("heldout_sources", index, &entry.path));
        train.chain(heldout).collect()
    }

    fn describe(config: &CorpusConfig, context: &DescribeContext<'_>) -> Result<Description, Vec<Problem>> {
        let problems = check_document_formats(&Self::data_sources(config), context.files);
        if !problems.is_empty() {
            return Err(problems);
        }
        let meta = ArtifactMeta { rows: config.max_documents, ..ArtifactMeta::new(ArtifactType::Text) };
        Ok(Description { outputs: BTreeMap::from([("text".into(), meta)]), ..Description::default() })
    }

    fn run(config: &CorpusConfig, context: &RunContext<'_>) -> StageResult<BTreeMap<String, Artifact>> {
        let train = config.sources.iter().map(|source| CorpusSource {
            files: &[],
            field: &source.field,
            split: source.split,
            weight: source.weight,
            epochs: source.epochs,
            heldout: false,
        });
        let heldout = config.heldout_sources.iter().map(|source| CorpusSource {
            files: &[],
            field: &source.field,
            split: source.split,
            weight: None,
            epochs: None,
            heldout: true,
        });
        let sources: Vec<CorpusSource<'_>> =
            train.chain(heldout).zip(context.files).map(|(source, files)| CorpusSource { files, ..source }).collect();
        let options = CorpusOptions {
            heldout: config.heldout,
            max_documents: config.max_documents,
            max_bytes: config.max_bytes,
            max_unusable: config.max_unusable,
            max_document_bytes: config.max_document_bytes,
        };
        Ok(BTreeMap::from([("text".into(), build_corpus(context, &sources, &options)?)]))
    }
}
