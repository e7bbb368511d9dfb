use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::Digest;

/// The result of one action: which outputs its key stands for, and how they came to be.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ActionRecord {
    /// Version of this format.
    pub format: u32,
    /// The action key: digest of `full_key`'s canonical encoding.
    pub key: Digest,
    /// Everything that entered the key, so that two results can be compared.
    pub full_key: Value,
    /// Output port to manifest digest.
    pub outputs: BTreeMap<String, Digest>,
    /// Final value of each metric.
    pub metrics: BTreeMap<String, f64>,
    /// Other records of the run (metric series, samples, tables), by name: digest of a blob.
    pub records: BTreeMap<String, Digest>,
    /// Who made it, where, when and how. Never part of any key.
    pub provenance: Provenance,
}

impl ActionRecord {
    /// Current version of the format.
    pub const FORMAT: u32 = 1;
}

/// Circumstances of an action.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Provenance {
    /// Stage name in the workflow.
    pub stage: String,
    /// Stage kind; `memo` for intermediate results.
    pub kind: String,
    /// Workflow file, as given.
    pub workflow: String,
    /// Run that made it.
    pub run_id: String,
    /// Host name.
    pub host: String,
    /// Seconds since the Unix epoch at which the stage started.
    pub started_at: f64,
    /// Seconds that the stage took, over all its sessions.
    pub duration_seconds: f64,
    /// Version of rlflow.
    pub rlflow_version: String,
    /// Backend and device names it ran on.
    pub devices: Vec<String>,
    /// Numerics profile: SIMD level, kernel version, math library.
    pub numerics: String,
    /// Step it resumed or extended from, if it did.
    pub resumed_from_step: Option<u64>,
    /// Whether a person accepted an older result under this key.
    pub adopted: bool,
    /// All settings of the stage, execution settings included.
    pub settings: Value,
    /// Inputs: port to (stage, manifest digest).
    pub inputs: BTreeMap<String, Vec<(String, Digest)>>,
    /// Data files read: path as given, and digest.
    pub files: Vec<(String, Digest)>,
    /// Measured values that differ from run to run, such as `tokens_per_s`.
    pub measurements: BTreeMap<String, f64>,
}
