//! What names a result.
//!
//! `ActionKey = BLAKE3(canonical JSON of the full key)`. The full key, and nothing but it, decides whether two stages
//! have the same result:
//!
//! | field | value | why it is in |
//! |---|---|---|
//! | `schema` | [`SCHEMA`] | a change of this table must not meet old keys |
//! | `kind` | kind's name | |
//! | `version` | [`Kind::version`] | raised when the meaning of the kind's results changes |
//! | `settings` | every identity setting, defaults filled in, in the config type's own spelling | they change the result; so do `micro_batch_size` and `precision`, which are identity settings of every trainer |
//! | `seed` | the stage's seed, only where [`Kind::draws`] | a kind that draws nothing has the same result under any seed |
//! | `inputs` | port -> digests of the artifacts, in order | content, not who made it: this is what gives early cutoff |
//! | `files` | per source, in order: format and content digest; the name inside the directory for directories | the format decides how bytes are read (`.csv`, `.jsonl`), the rest of the path does not |
//!
//! Which settings of which kind are identity settings and which are not is said by the kinds' schemas; the table of all
//! of them is [`crate::docs::key_table`], written out in the kinds' documentation.
//!
//! What must never be in it, and is therefore kept out by type (the builder has no field for it):
//!
//! | value | where it goes instead |
//! |---|---|
//! | paths, workflow name, stage names, input stage names | provenance of the action |
//! | times, host, run id, rlflow's version | provenance |
//! | devices, backend, ranks, ZeRO level, offload, gradient checkpointing | `execution` settings; devices and numerics profile in the provenance |
//! | `snapshot_every`, `log_every`, `--jobs` | `execution` settings; nowhere |
//! | order and comments of the TOML, defaults left out or spelled out | lost when settings are normalised |
//! | `edition` | it only fixes defaults, which are in `settings` by value |
//! | paths of data files (settings marked `path`) | `files`, by content |
//!
//! The *prefix key*, under which snapshots are kept, is the same with the settings that only say when to end
//! ([`Kind::horizon`]) taken out and their names put in, so that a longer run finds a shorter one's snapshots.
//!
//! [`Kind::version`]: rlflow_api::Kind::version
//! [`Kind::draws`]: rlflow_api::Kind::draws
//! [`Kind::horizon`]: rlflow_api::Kind::horizon

use std::collections::BTreeMap;

use serde_json::{Value, json};

use rlflow_store::Digest;

use crate::{canonical, workflow::IdentitySettings};

/// Version of the table above.
pub const SCHEMA: u32 = 1;

/// A data file, as it enters the key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyFile {
    /// `format` with the file's format, or `name` with its name inside a directory source.
    pub label: (&'static str, String),
    /// Digest of its content.
    pub digest: Digest,
}

/// Everything that enters an action key, borrowed from the workflow.
#[derive(Debug, Clone, PartialEq)]
pub struct FullKey<'a> {
    /// Kind.
    pub kind: &'a str,
    /// The kind's implementation version.
    pub version: u32,
    /// Identity settings, normalised.
    pub settings: &'a IdentitySettings,
    /// Seed, for kinds that draw.
    pub seed: Option<u64>,
    /// Port to digests of the artifacts connected to it.
    pub inputs: BTreeMap<&'a str, Vec<Digest>>,
    /// Data files per source.
    pub files: &'a [Vec<KeyFile>],
}

impl FullKey<'_> {
    /// The action key.
    pub fn digest(&self) -> Digest {
        Digest::of(&self.encode(None))
    }

    /// The key of the stage's snapshots: without the settings called `horizon`.
    pub fn prefix(&self, horizon: &[&str]) -> Digest {
        Digest::of(&self.encode(Some(horizon)))
    }

    /// The canonical encoding of `to_value`, without building it: members in sorted order. With a horizon its settings
    /// are left out and their names put in.
    fn encode(&self, horizon: Option<&[&str]>) -> Vec<u8> {
        let mut out = Vec::with_capacity(1024);
        out.extend_from_slice(b"{\"files\":");
        canonical::list(self.files, &mut out, |source, out| {
            canonical::list(source, out, |file, out| {
                out.extend_from_slice(b"{\"digest\":");
                digest(&file.digest, out);
                out.push(b',');
                canonical::string(file.label.0, out);
                out.push(b':');
                canonical::string(&file.label.1, out);
                out.push(b'}');
            });
        });
        if let Some(horizon) = horizon {
            out.extend_from_slice(b",\"horizon\":");
            canonical::list(horizon, &mut out, |name, out| canonical::string(name, out));
        }
        out.extend_from_slice(b",\"inputs\":{");
        for (at, (port, digests)) in self.inputs.iter().enumerate() {
            canonical::separate(at, &mut out);
            canonical::string(port, &mut out);
            out.push(b':');
            canonical::list(digests, &mut out, digest);
        }
        out.extend_from_slice(b"},\"kind\":");
        canonical::string(self.kind, &mut out);
        out.extend_from_slice(b",\"schema\":");
        canonical::write(&json!(SCHEMA), &mut out);
        if let Some(seed) = self.seed {
            out.extend_from_slice(b",\"seed\":");
            canonical::write(&json!(seed), &mut out);
        }
        out.extend_from_slice(b",\"settings\":");
        match horizon {
            None => out.extend_from_slice(self.settings.canonical()),
            Some(horizon) => self.settings.write_without(horizon, &mut out),
        }
        out.extend_from_slice(b",\"version\":");
        canonical::write(&json!(self.version), &mut out);
        out.push(b'}');
        out
    }

    /// The full key as JSON, kept with the result so that any two can be compared.
    pub fn to_value(&self) -> Value {
        let files: Vec<Vec<Value>> = self
            .files
            .iter()
            .map(|source| source.iter().map(|file| json!({ "digest": file.digest, (file.label.0): file.label.1 })).collect())
            .collect();
        let mut key = json!({
            "schema": SCHEMA,
            "kind": self.kind,
            "version": self.version,
            "settings": **self.settings,
            "inputs": self.inputs,
            "files": files,
        });
        if let Some(seed) = self.seed {
            key["seed"] = json!(seed);
        }
        key
    }
}

fn digest(digest: &Digest, out: &mut Vec<u8>) {
    out.push(b'"');
    out.extend_from_slice(&digest.digits());
    out.push(b'"');
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key<'a>(settings: &'a IdentitySettings, files: &'a [Vec<KeyFile>]) -> FullKey<'a> {
        let inputs = BTreeMap::from([("model", vec![Digest::of(b"model")]), ("data", vec![Digest::of(b"a"), Digest::of(b"b")])]);
        FullKey { kind: "sft", version: 3, settings, seed: Some(42), inputs, files }
    }

    fn settings() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            (-1e9f64..1e9).prop_map(Value::from),
            ".{0,12}".prop_map(Value::from),
        ];
        let value = leaf.prop_recursive(3, 24, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map("[a-z_]{1,6}", inner, 0..4).prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        });
        prop::collection::btree_map("[a-z_]{1,6}", value, 0..6).prop_map(|map| Value::Object(map.into_iter().collect()))
    }

    proptest! {
        #[test]
        fn the_streamed_encoding_is_the_canonical_one(settings in settings(), content in any::<[u8; 4]>()) {
            let files = [vec![KeyFile { label: ("format", "jsonl.gz".into()), digest: Digest::of(&content) }], vec![]];
            let settings = settings.into();
            let key = key(&settings, &files);
            prop_assert_eq!(key.digest(), Digest::of(&canonical::to_vec(&key.to_value())));
        }

        #[test]
        fn reading_the_full_key_back_gives_the_same_digest(settings in settings()) {
            let settings = settings.into();
            let key = key(&settings, &[]);
            let read: Value = serde_json::from_slice(&serde_json::to_vec(&key.to_value()).unwrap()).unwrap();
            prop_assert_eq!(Digest::of(&canonical::to_vec(&read)), key.digest());
        }
    }

    #[test]
    fn every_field_changes_the_key() {
        let (settings, other) = (json!({ "beta": 0.1 }).into(), json!({ "beta": 0.2 }).into());
        let file = KeyFile { label: ("format", "csv".into()), digest: Digest::of(b"x") };
        let files = [vec![file.clone()]];
        let base = key(&settings, &files);
        let renamed = [vec![KeyFile { label: ("format", "jsonl".into()), ..file.clone() }]];
        let moved = [vec![], vec![file]];
        let mut swapped = base.clone();
        swapped.inputs.get_mut("data").unwrap().reverse();
        let mut moved_port = base.clone();
        let model = moved_port.inputs.remove("model").unwrap();
        moved_port.inputs.insert("policy", model);
        let all = [
            base.clone(),
            FullKey { kind: "dpo", ..base.clone() },
            FullKey { version: 4, ..base.clone() },
            FullKey { settings: &other, ..base.clone() },
            FullKey { seed: Some(43), ..base.clone() },
            FullKey { seed: None, ..base.clone() },
            FullKey { files: &renamed, ..base.clone() },
            FullKey { files: &moved, ..base.clone() },
            swapped,
            moved_port,
        ];
        let digests: std::collections::BTreeSet<Digest> = all.iter().map(FullKey::digest).collect();
        assert_eq!(digests.len(), all.len());
    }

    #[test]
    fn the_prefix_key_is_the_canonical_digest_of_what_is_left() {
        let settings = json!({ "train": { "steps": 10, "lr": 0.1 }, "beta": 1 }).into();
        let key = key(&settings, &[]);
        let mut value = key.to_value();
        value["settings"] = json!({ "train": { "lr": 0.1 }, "beta": 1 });
        value["horizon"] = json!(["train.steps"]);
        assert_eq!(key.prefix(&["train.steps"]), Digest::of(&canonical::to_vec(&value)));
    }

    #[test]
    fn the_prefix_key_forgets_the_horizon_and_nothing_else() {
        let short = json!({ "train": { "steps": 10, "lr": 0.1 } }).into();
        let long = json!({ "train": { "steps": 20, "lr": 0.1 } }).into();
        let other = json!({ "train": { "steps": 10, "lr": 0.2 } }).into();
        let prefix = |settings, horizon: &[&str]| key(settings, &[]).prefix(horizon);
        assert_eq!(prefix(&short, &["train.steps"]), prefix(&long, &["train.steps"]));
        assert_ne!(prefix(&short, &["train.steps"]), prefix(&other, &["train.steps"]));
        assert_ne!(prefix(&short, &[]), prefix(&long, &[]));
        assert_ne!(prefix(&short, &["train.steps"]), prefix(&short, &[]));
        assert_eq!(prefix(&short, &["train.missing", "nothing.here"]), prefix(&short, &["train.missing", "nothing.here"]));
    }
}
