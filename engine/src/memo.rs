use std::{collections::BTreeMap, sync::Mutex};

use serde_json::{Value, json};

use rlflow_api::{Artifact, MemoStore, StageResult};
use rlflow_store::{ActionRecord, Digest, Provenance, Store};

use crate::{action_key::SCHEMA, canonical, event::now};

/// Kind under which memos are recorded.
pub const MEMO: &str = "memo";
/// Their only output port.
const PORT: &str = "memo";

/// Keeps intermediate results as actions of the kind `memo`, keyed by the canonical JSON of what they depend on.
pub struct Memos<'a> {
    /// The store.
    pub store: &'a Store,
    /// Stage that asks, for provenance.
    pub stage: &'a str,
    /// Workflow, for provenance.
    pub workflow: &'a str,
    /// Run, for provenance.
    pub run_id: &'a str,
    /// Whether stored results are left aside.
    pub ignore: bool,
    /// Keys of what was found or stored.
    pub used: &'a Mutex<Vec<Digest>>,
}

impl Memos<'_> {
    fn note(&self, key: Digest) {
        self.used.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(key);
    }
}

fn full_key(key: &Value) -> (Value, Digest) {
    let full = json!({ "schema": SCHEMA, "kind": MEMO, "memo": key });
    let digest = Digest::of(&canonical::to_vec(&full));
    (full, digest)
}

impl MemoStore for Memos<'_> {
    fn get(&self, key: &Value) -> StageResult<Option<Artifact>> {
        if self.ignore {
            return Ok(None);
        }
        let (_, key) = full_key(key);
        let Some(record) = self.store.action(key)? else { return Ok(None) };
        let Some(digest) = record.outputs.get(PORT) else { return Ok(None) };
        match self.store.open_artifact(*digest) {
            Ok(artifact) => {
                self.note(key);
                Ok(artifact)
            }
            // It can be made again, so damage costs time and nothing else.
            Err(error) => {
                tracing::warn!(stage = self.stage, %error, "intermediate result cannot be used and is made again");
                Ok(None)
            }
        }
    }

    fn put(&self, key: &Value, artifact: &Artifact) -> StageResult<()> {
        let (full_key, key) = full_key(key);
        let provenance = Provenance {
            stage: self.stage.into(),
            kind: MEMO.into(),
            workflow: self.workflow.into(),
            run_id: self.run_id.into(),
            started_at: now(),
            rlflow_version: env!("CARGO_PKG_VERSION").into(),
            ..Provenance::default()
        };
        let outputs = BTreeMap::from([(PORT.to_owned(), artifact.digest())]);
        let record = ActionRecord {
            format: ActionRecord::FORMAT,
            key,
            full_key,
            outputs,
            metrics: BTreeMap::new(),
            records: BTreeMap::new(),
            provenance,
        };
        self.store.put_action(&record)?;
        self.note(key);
        Ok(())
    }
}
