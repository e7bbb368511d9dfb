use std::{
    fs,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    Artifact, ArtifactBuilder, Digest, Result, Store, StoreError,
    canonical::to_canonical,
    durable::{WritePoints, write_durably},
    fault::fault_point,
    sealed::{Unsealed, check_depth, check_length, is_absent, parse, read_record, seal, unseal},
};

/// Kind in the first line of a snapshot's record.
const SEAL: &str = "snapshot";

const POINTS: WritePoints =
    WritePoints { written: "snapshot.written", renamed: "snapshot.renamed", folder_synced: "snapshot.folder_synced" };

/// How long a snapshot is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Retain {
    /// Until newer ones exist: see [`SnapshotLimit`].
    Latest,
    /// Until `gc`: the final state and the start of a decay, from which longer runs extend.
    Keep,
}

/// How many snapshots with [`Retain::Latest`] are kept. The newest always is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SnapshotLimit {
    /// This many of the newest, so that one that a dying disk damaged is not the only one.
    pub newest: usize,
    /// Of these, as many as together take at most this.
    pub bytes: u64,
}

impl Default for SnapshotLimit {
    fn default() -> Self {
        Self { newest: 2, bytes: u64::MAX }
    }
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
        let mut snapshots = self.recorded()?;
        snapshots.retain(|snapshot| self.store.contains_artifact(snapshot.digest));
        Ok(snapshots)
    }

    /// A builder for the next snapshot's state.
    pub fn builder(&self) -> ArtifactBuilder {
        self.store.artifact("snapshot")
    }

    /// Publishes the state and records it durably; then drops those with [`Retain::Latest`] that are older than the
    /// limit asks for, or all of them behind one that is kept.
    pub fn save(&self, step: u64, retain: Retain, info: Value, state: ArtifactBuilder, limit: SnapshotLimit) -> Result<Snapshot> {
        let path = self.path(step);
        check_depth(&path, &info)?;
        let digest = state.publish()?.digest();
        let snapshot = Snapshot { step, digest, retain, info };
        let body = to_canonical(&snapshot).map_err(|error| StoreError::Format { path: path.clone(), message: error.to_string() })?;
        check_length(&path, &body)?;
        write_durably(self.store.layout(), &path, &seal(SEAL, &body), &POINTS)?;
        let limit = if retain == Retain::Keep { SnapshotLimit { newest: 1, ..limit } } else { limit };
        self.drop_older(&snapshot, limit);
        Ok(snapshot)
    }

    /// Opens a snapshot's state, all of it verified: a stage that starts from it must not stop half-way.
    pub fn open(&self, snapshot: &Snapshot) -> Result<Artifact> {
        let missing = StoreError::Missing { what: "manifest", digest: snapshot.digest };
        let artifact = self.store.open_artifact(snapshot.digest)?.ok_or(missing)?;
        artifact.verify()?;
        Ok(artifact)
    }

    /// What a snapshot's state takes; nothing is known of one that cannot be read.
    fn size_bytes(&self, snapshot: &Snapshot) -> u64 {
        let manifest = self.store.manifest(snapshot.digest).ok().flatten();
        manifest.map_or(0, |manifest| manifest.entries.iter().map(|entry| entry.size_bytes).sum())
    }

    fn folder(&self) -> PathBuf {
        self.store.layout().partial(self.prefix_key)
    }

    fn path(&self, step: u64) -> PathBuf {
        self.folder().join(format!("{step}.json"))
    }

    /// All that the folder's files record, most steps first, whether their artifacts are intact or not.
    fn recorded(&self) -> Result<Vec<Snapshot>> {
        let mut snapshots = read_snapshots(&self.folder())?;
        snapshots.sort_unstable_by_key(|snapshot| std::cmp::Reverse(snapshot.step));
        Ok(snapshots)
    }

    /// Forgets older snapshots that are kept only until newer ones exist. A failure leaves garbage, which `gc` takes.
    fn drop_older(&self, newest: &Snapshot, limit: SnapshotLimit) {
        let mut older = match self.recorded() {
            Ok(snapshots) => snapshots,
            Err(error) => return tracing::debug!(%error, "older snapshots were not dropped"),
        };
        older.retain(|snapshot| snapshot.step < newest.step && snapshot.retain == Retain::Latest);
        let mut bytes = self.size_bytes(newest);
        let kept = older.iter().take(limit.newest.saturating_sub(1)).take_while(|snapshot| {
            bytes = bytes.saturating_add(self.size_bytes(snapshot));
            bytes <= limit.bytes
        });
        older.drain(..kept.count());
        let mut dropped = Vec::new();
        for snapshot in older {
            match fs::remove_file(self.path(snapshot.step)) {
                Ok(()) => dropped.push(snapshot.digest),
                Err(error) => tracing::debug!(%error, "an older snapshot was not dropped"),
            }
        }
        if dropped.is_empty() {
            return;
        }
        let discarded = fault_point("snapshot.dropped").map_err(StoreError::io("remove", self.folder()));
        if let Err(error) = discarded.and_then(|()| self.store.discard_snapshots(&dropped)) {
            tracing::debug!(%error, "the state of older snapshots was not removed");
        }
    }
}

/// Snapshots recorded in one folder under `partial/`. Unreadable ones are left out.
pub(crate) fn read_snapshots(folder: &Path) -> Result<Vec<Snapshot>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if is_absent(&error) => return Ok(Vec::new()),
        Err(error) => return Err(StoreError::io("list", folder)(error)),
    };
    let mut snapshots = Vec::new();
    for entry in entries {
        let path = entry.map_err(StoreError::io("list", folder))?.path();
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        match check_record(&path)? {
            Ok(snapshot) => snapshots.push(snapshot),
            Err(problem) => tracing::warn!("snapshot record {} is not used: {problem}", path.display()),
        }
    }
    Ok(snapshots)
}

/// The snapshot that a file records, or what is wrong with it.
pub(crate) fn check_record(path: &Path) -> Result<Result<Snapshot, String>> {
    let Some(bytes) = read_record(path)? else { return Ok(Err("it is gone".into())) };
    Ok(match unseal(SEAL, &bytes) {
        Unsealed::Intact(body) => parse::<Snapshot>(path, body).map_err(|error| error.to_string()).and_then(|snapshot| {
            // A copy under another name must not pass for another step.
            let named = path.file_stem().is_some_and(|stem| *stem == *snapshot.step.to_string());
            if named { Ok(snapshot) } else { Err(format!("it records step {}", snapshot.step)) }
        }),
        Unsealed::Broken(_) => Err("it is damaged".into()),
    })
}
