use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{Artifact, ArtifactBuilder, Digest, Result, Store};

/// How long a snapshot is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Retain {
    /// Until a newer one exists.
    Latest,
    /// Until `gc`: the final state and the start of a decay, from which longer runs extend.
    Keep,
}

/// A stored snapshot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Steps done.
    pub step: u64,
    /// Digest of the artifact (type `snapshot`) that holds the state.
    pub digest: Digest,
    /// How long it is kept.
    pub retain: Retain,
    /// What the trainer says about it: total steps planned, end of the common prefix. For [`SnapshotSet::list`]'s readers.
    pub info: Value,
}

/// The snapshots of one unfinished (or extendable) stage, under `partial/<prefix key>/`.
pub struct SnapshotSet {
    pub(crate) store: Store,
    pub(crate) prefix_key: Digest,
}

impl SnapshotSet {
    /// Intact snapshots, most steps first. Damaged and half-written ones are left out.
    pub fn list(&self) -> Result<Vec<Snapshot>> {
        let _ = (&self.store, self.prefix_key);
        todo!()
    }

    /// A builder for the next snapshot's state.
    pub fn builder(&self) -> ArtifactBuilder {
        self.store.artifact("snapshot")
    }

    /// Publishes the state and records it durably; then drops older ones with [`Retain::Latest`].
    pub fn save(&self, step: u64, retain: Retain, info: Value, state: ArtifactBuilder) -> Result<Snapshot> {
        let _ = (step, retain, info, state);
        todo!()
    }

    /// Opens a snapshot's state.
    pub fn open(&self, snapshot: &Snapshot) -> Result<Artifact> {
        let _ = snapshot;
        todo!()
    }
}
