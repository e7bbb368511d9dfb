use std::{path::Path, sync::Arc};

use serde_json::Value;

use crate::{Blob, Digest, Dtype, Entry, Manifest, Result, Store};

/// A published artifact: its digest, its manifest, and the means to read its entries.
#[derive(Clone)]
pub struct Artifact {
    store: Store,
    digest: Digest,
    manifest: Arc<Manifest>,
}

impl Artifact {
    pub(crate) fn new(store: Store, digest: Digest, manifest: Arc<Manifest>) -> Self {
        Self { store, digest, manifest }
    }

    /// Digest of the manifest, which is the artifact's name.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// The manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Verified content of the entry called `name`.
    pub fn read(&self, name: &str) -> Result<Blob> {
        let _ = (&self.store, name);
        todo!()
    }

    /// The store that holds it.
    pub fn store(&self) -> &Store {
        &self.store
    }
}

/// Collects entries and publishes them as one artifact. Nothing is visible before [`ArtifactBuilder::publish`].
pub struct ArtifactBuilder {
    store: Store,
    artifact_type: String,
}

impl ArtifactBuilder {
    pub(crate) fn new(store: Store, artifact_type: String) -> Self {
        Self { store, artifact_type }
    }

    /// Adds a file entry.
    pub fn put(&mut self, name: &str, content: &[u8]) -> Result<()> {
        let _ = (name, content, &self.store, &self.artifact_type);
        todo!()
    }

    /// Adds a tensor entry: little-endian elements, row-major.
    pub fn put_tensor(&mut self, name: &str, dtype: Dtype, shape: &[u64], content: &[u8]) -> Result<()> {
        let _ = (name, dtype, shape, content);
        todo!()
    }

    /// Adds the content of a file: reflinked or hard-linked where the file system can, hashed in the same pass.
    pub fn put_file(&mut self, name: &str, path: &Path) -> Result<()> {
        let _ = (name, path);
        todo!()
    }

    /// Adds an entry whose blob is in the store already (a frozen or shared tensor): nothing is copied.
    pub fn share(&mut self, entry: &Entry) -> Result<()> {
        let _ = entry;
        todo!()
    }

    /// Sets the metadata.
    pub fn metadata(&mut self, metadata: Value) {
        let _ = metadata;
        todo!()
    }

    /// Makes all entries durable, then the manifest.
    pub fn publish(self) -> Result<Artifact> {
        todo!()
    }
}
