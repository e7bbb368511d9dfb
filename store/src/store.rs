use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::{ActionRecord, Artifact, ArtifactBuilder, Blob, Digest, LeaseHolder, LeaseOutcome, Result, RunLog, SnapshotSet};

/// A data file's content digest and size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileDigest {
    /// Digest of the content.
    pub digest: Digest,
    /// Length.
    pub size_bytes: u64,
}

/// An open store. Cheap to clone; safe to share between threads and with other processes.
#[derive(Clone)]
pub struct Store {}

impl Store {
    /// Opens the store in `folder`, creating it if absent.
    pub fn open(folder: &Path) -> Result<Self> {
        let _ = folder;
        todo!()
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        todo!()
    }

    /// Starts an artifact of the given type.
    pub fn artifact(&self, artifact_type: &str) -> ArtifactBuilder {
        ArtifactBuilder::new(self.clone(), artifact_type.to_owned())
    }

    /// Opens an artifact by its manifest's digest. `None` if it or one of its blobs is not there.
    pub fn open_artifact(&self, digest: Digest) -> Result<Option<Artifact>> {
        let _ = digest;
        todo!()
    }

    /// Stores a loose blob (metric series, samples) and returns its digest.
    pub fn put_blob(&self, content: &[u8]) -> Result<Digest> {
        let _ = content;
        todo!()
    }

    /// Reads and verifies a blob. `None` if absent.
    pub fn blob(&self, digest: Digest) -> Result<Option<Blob>> {
        let _ = digest;
        todo!()
    }

    /// The action recorded under `key`, if any.
    pub fn action(&self, key: Digest) -> Result<Option<ActionRecord>> {
        let _ = key;
        todo!()
    }

    /// Records an action durably, after its outputs are.
    pub fn put_action(&self, record: &ActionRecord) -> Result<()> {
        let _ = record;
        todo!()
    }

    /// Newest action of a stage of this kind and name, whatever its key: what rerun reasons compare with.
    /// Prefers records of the same workflow file.
    pub fn last_action(&self, workflow: &str, stage: &str, kind: &str) -> Result<Option<ActionRecord>> {
        let _ = (workflow, stage, kind);
        todo!()
    }

    /// Every action record (for `log`, `gc`, `lineage`).
    pub fn actions(&self) -> Result<Vec<ActionRecord>> {
        todo!()
    }

    /// Digest of a data file, from memory when size, modification time, inode and change time are as remembered
    /// and old enough to be trusted.
    pub fn file_digest(&self, path: &Path) -> Result<FileDigest> {
        let _ = path;
        todo!()
    }

    /// Asks for the right to work on `key`.
    pub fn lease(&self, key: Digest, holder: &LeaseHolder) -> Result<LeaseOutcome> {
        let _ = (key, holder);
        todo!()
    }

    /// Who works on `key` now, without asking for the right.
    pub fn lease_holder(&self, key: Digest) -> Result<Option<LeaseHolder>> {
        let _ = key;
        todo!()
    }

    /// Snapshots of the stage with this prefix key.
    pub fn snapshots(&self, prefix_key: Digest) -> SnapshotSet {
        SnapshotSet { store: self.clone(), prefix_key }
    }

    /// Starts the record of a run.
    pub fn begin_run(&self, header: &Value) -> Result<RunLog> {
        let _ = header;
        todo!()
    }

    /// Folders of past runs, newest first.
    pub fn runs(&self) -> Result<Vec<PathBuf>> {
        todo!()
    }
}
