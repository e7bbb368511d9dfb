use std::{collections::BTreeMap, fs, path::Path};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    Digest, Result, Store, StoreError,
    canonical::to_canonical,
    durable::{WritePoints, write_durably},
    layout::{Family, digest_of_name},
    sealed::{Unsealed, check_depth, check_length, is_absent, parse, read_record, seal, unseal},
};

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
    #[serde(with = "numbers")]
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
    #[serde(with = "numbers")]
    pub measurements: BTreeMap<String, f64>,
}

/// Numbers by name. JSON has no NaN and no infinities; they are written as the texts "NaN", "inf" and "-inf".
mod numbers {
    use std::collections::BTreeMap;

    use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

    #[derive(Serialize, Deserialize)]
    #[serde(untagged)]
    enum Number {
        Finite(f64),
        Named(String),
    }

    pub fn serialize<S: Serializer>(numbers: &BTreeMap<String, f64>, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(
            numbers
                .iter()
                .map(|(name, &value)| (name, if value.is_finite() { Number::Finite(value) } else { Number::Named(value.to_string()) })),
        )
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<String, f64>, D::Error> {
        let read = |(name, number)| match number {
            Number::Finite(value) => Ok((name, value)),
            Number::Named(text) => match text.as_str() {
                "NaN" => Ok((name, f64::NAN)),
                "inf" => Ok((name, f64::INFINITY)),
                "-inf" => Ok((name, f64::NEG_INFINITY)),
                _ => Err(de::Error::custom(format!("`{text}` is not a number"))),
            },
        };
        BTreeMap::<String, Number>::deserialize(deserializer)?.into_iter().map(read).collect()
    }
}

/// Kind in the first line of an action's file.
pub(crate) const SEAL: &str = "action";

const POINTS: WritePoints = WritePoints { written: "action.written", renamed: "action.renamed", folder_synced: "action.folder_synced" };

/// What finding a stage's newest action needs, read without the rest.
#[derive(Deserialize)]
pub(crate) struct ActionHead {
    pub format: u32,
    pub key: Digest,
    pub outputs: BTreeMap<String, Digest>,
    pub provenance: ProvenanceHead,
}

/// See [`ActionHead`].
#[derive(Deserialize, Default)]
#[serde(default)]
pub(crate) struct ProvenanceHead {
    pub stage: String,
    pub kind: String,
    pub workflow: String,
    pub started_at: f64,
}

impl Store {
    /// The bytes of an action's JSON, handed to `read`, if it is there and whole. Touches nothing.
    fn with_action<T>(&self, key: Digest, read: impl FnOnce(&Path, &[u8]) -> Result<T>) -> Result<Option<T>> {
        let path = self.layout().file(Family::Action, key);
        let Some(bytes) = read_record(&path)? else { return Ok(None) };
        match unseal(SEAL, &bytes) {
            Unsealed::Intact(body) => read(&path, body).map(Some),
            Unsealed::Broken(actual) => Err(StoreError::Damaged { what: "action", digest: key, actual }),
        }
    }

    /// Reads an action. Touches nothing.
    pub(crate) fn examine_action(&self, key: Digest) -> Result<Option<ActionRecord>> {
        self.with_action(key, |path, body| {
            let record: ActionRecord = parse(path, body)?;
            check_identity(path, key, record.key, record.format)?;
            Ok(record)
        })
    }

    /// Like [`Store::examine_action`], at a fraction of the price.
    pub(crate) fn examine_action_head(&self, key: Digest) -> Result<Option<ActionHead>> {
        self.with_action(key, |path, body| {
            let head: ActionHead = parse(path, body)?;
            check_identity(path, key, head.key, head.format)?;
            Ok(head)
        })
    }

    pub(crate) fn write_action(&self, record: &ActionRecord) -> Result<()> {
        let path = self.layout().file(Family::Action, record.key);
        check_depth(&path, &record.full_key)?;
        check_depth(&path, &record.provenance.settings)?;
        let body = to_canonical(record).map_err(|error| StoreError::Format { path: path.clone(), message: error.to_string() })?;
        check_length(&path, &body)?;
        // What is damaged is evidence, which writing would replace.
        if matches!(self.with_action(record.key, |_, _| Ok(())), Err(StoreError::Damaged { .. })) {
            self.set_aside(Family::Action, record.key);
        }
        write_durably(self.layout(), &path, &seal(SEAL, &body), &POINTS)
    }

    /// Digests that name the files of a family.
    pub(crate) fn list_family(&self, family: Family) -> Result<Vec<Digest>> {
        let mut digests = Vec::new();
        for prefix in 0..=u8::MAX {
            let folder = self.layout().shard(family, prefix);
            let entries = match fs::read_dir(&folder) {
                Ok(entries) => entries,
                Err(error) if is_absent(&error) => continue,
                Err(error) => return Err(StoreError::io("list", folder)(error)),
            };
            for entry in entries {
                let path = entry.map_err(StoreError::io("list", &folder))?.path();
                digests.extend(digest_of_name(&path).filter(|digest| digest.as_bytes()[0] == prefix));
            }
        }
        Ok(digests)
    }
}

fn check_identity(path: &Path, key: Digest, found: Digest, format: u32) -> Result<()> {
    let message = if found != key {
        format!("it holds the action {found}")
    } else if format == 0 || format > ActionRecord::FORMAT {
        format!("action format {format} is not known to this rlflow (at most {})", ActionRecord::FORMAT)
    } else {
        return Ok(());
    };
    Err(StoreError::Format { path: path.to_owned(), message })
}
