use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A sampled text with its scores, so that a number that rises while the text rots is visible.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Step it was drawn at.
    pub step: u64,
    /// The prompt, as text.
    pub prompt: String,
    /// The answer, as text.
    pub response: String,
    /// Named scores.
    pub scores: Vec<(String, f64)>,
}

/// A small table for the terminal and the report.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Table {
    /// Heading.
    pub title: String,
    /// Column names.
    pub columns: Vec<String>,
    /// Cells, already formatted.
    pub rows: Vec<Vec<String>>,
}

/// What a running stage reports.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum StageEvent {
    /// A phase began ("tokenising", "rollout").
    Phase { name: String },
    /// Work done of work planned; `rate` in units per second where known.
    Progress { done: u64, total: u64, unit: String, rate: Option<f64>, tokens_per_s: Option<f64>, detail: String },
    /// Metrics of a step. These are part of the stage's record and equal on every run.
    Metrics { step: u64, values: Vec<(String, f64)> },
    /// A measured value that differs from run to run (`tokens_per_s`, `peak_bytes`).
    Measurement { name: String, value: f64 },
    /// A sampled text.
    Sample(Sample),
    /// A table.
    Table(Table),
    /// Something worth saying once.
    Note { text: String },
    /// Something worth worrying about.
    Warning { text: String },
    /// A snapshot was written.
    Snapshot { step: u64 },
    /// The stage continues from a snapshot.
    Resumed { step: u64, extended: bool },
    /// Anything else for the record: name and value.
    Record { name: String, value: Value },
}

/// Receives a stage's events. Called from the stage's thread.
pub trait Reporter: Send + Sync {
    /// Takes one event.
    fn report(&self, event: StageEvent);

    /// The metrics, samples and tables reported so far, encoded: kept in snapshots, so that a resumed stage's
    /// record equals an uninterrupted one's.
    fn record(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Goes back to a record that [`Reporter::record`] gave.
    fn restore(&self, record: &[u8]) {
        let _ = record;
    }
}
