use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs::File,
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use serde_json::Value;

use crate::{
    Blob, Digest, Dtype, Entry, Manifest, Result, Store, StoreError,
    digest::hash_parallel,
    durable::{TempFile, WritePoints, sync_files, sync_folder, sync_folders, sync_parents, write_durably},
    entry_name::check_entry_name,
    fault::fault_point,
    import::import_file,
    layout::Family,
};

/// A published artifact: its digest, its manifest, and the means to read its entries.
#[derive(Clone)]
pub struct Artifact {
    store: Store,
    digest: Digest,
    manifest: Arc<Manifest>,
}

impl Artifact {
    pub(crate) fn new(store: Store, digest: Digest, manifest: Arc<Manifest>) -> Self {
        store.damage().watch(digest, &manifest);
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
    ///
    /// Damage seldom comes alone: when the entry is damaged, every artifact that this process has open is verified too,
    /// and all that is damaged is set aside, so that one run makes all of it again.
    pub fn read(&self, name: &str) -> Result<Blob> {
        let entry = self.manifest.entry(name).ok_or_else(|| StoreError::EntryName {
            name: name.chars().take(200).collect(),
            message: "the artifact has no entry of this name",
        })?;
        match self.store.load_verified(Family::Blob, entry.digest) {
            Ok(found) => found.ok_or(StoreError::Missing { what: "blob", digest: entry.digest }),
            Err(error) => {
                if matches!(error, StoreError::Damaged { .. }) {
                    self.store.verify_open_artifacts();
                }
                Err(error)
            }
        }
    }

    /// Verifies the content of every entry. All that is damaged is set aside; the error is about the first.
    pub fn verify(&self) -> Result<()> {
        self.store.verify_entries(self.digest, &self.manifest)
    }

    /// The store that holds it.
    pub fn store(&self) -> &Store {
        &self.store
    }
}

impl std::fmt::Debug for Artifact {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Artifact({} {})", self.manifest.artifact_type, self.digest)
    }
}

/// A blob on its way into the store.
struct Staged {
    size_bytes: u64,
    /// Its content under a temporary name.
    temp: TempFile,
    /// Whether this builder wrote it, so that it is not durable yet.
    fresh: bool,
}

/// Collects entries and publishes them as one artifact. Nothing is visible before [`ArtifactBuilder::publish`].
pub struct ArtifactBuilder {
    store: Store,
    artifact_type: String,
    entries: BTreeMap<String, Entry>,
    staged: HashMap<Digest, Staged>,
    metadata: Value,
    /// Whether all that it is given is let go.
    keeps_nothing: bool,
}

const MANIFEST_POINTS: WritePoints =
    WritePoints { written: "manifest.written", renamed: "manifest.renamed", folder_synced: "manifest.folder_synced" };

impl ArtifactBuilder {
    pub(crate) fn new(store: Store, artifact_type: String) -> Self {
        let metadata = Value::Object(serde_json::Map::new());
        Self { store, artifact_type, entries: BTreeMap::new(), staged: HashMap::new(), metadata, keeps_nothing: false }
    }

    pub(crate) fn keeps_nothing(self) -> Self {
        Self { keeps_nothing: true, ..self }
    }

    /// Adds a file entry.
    pub fn put(&mut self, name: &str, content: &[u8]) -> Result<()> {
        self.put_content(name, None, &[], content)
    }

    /// Adds a tensor entry: little-endian elements, row-major.
    pub fn put_tensor(&mut self, name: &str, dtype: Dtype, shape: &[u64], content: &[u8]) -> Result<()> {
        self.put_content(name, Some(dtype), shape, content)
    }

    /// Adds the content of a file: reflinked or hard-linked where the file system can, hashed in the same pass.
    ///
    /// Only files that nobody may write to (those under [`Store::scratch`], and read-only ones) are hard-linked: a later
    /// write to another file would reach into the store.
    pub fn put_file(&mut self, name: &str, path: &Path) -> Result<()> {
        if self.keeps_nothing {
            return Ok(());
        }
        self.check_new(name)?;
        let (digest, size_bytes, temp) = import_file(&self.store, path)?;
        let entry = Entry { name: name.to_owned(), digest, size_bytes, dtype: None, shape: Vec::new() };
        if !self.hold(digest, size_bytes) {
            self.staged.insert(digest, Staged { size_bytes, temp, fresh: true });
        }
        self.entries.insert(entry.name.clone(), entry);
        Ok(())
    }

    /// Adds an entry whose blob is in the store already (a frozen or shared tensor): nothing is copied.
    pub fn share(&mut self, entry: &Entry) -> Result<()> {
        if self.keeps_nothing {
            return Ok(());
        }
        self.check_new(&entry.name)?;
        entry.check_shape().map_err(|message| self.invalid(message))?;
        if !self.hold(entry.digest, entry.size_bytes) {
            // Not there, or on a file system without links: then a copy takes hold of it.
            let missing = StoreError::Missing { what: "blob", digest: entry.digest };
            let content = self.store.load_verified(Family::Blob, entry.digest)?.ok_or(missing)?;
            let temp = TempFile::write(self.store.layout(), &content)?;
            self.staged.insert(entry.digest, Staged { size_bytes: content.len() as u64, temp, fresh: true });
        }
        self.entries.insert(entry.name.clone(), entry.clone());
        Ok(())
    }

    /// Sets the metadata.
    pub fn metadata(&mut self, metadata: Value) {
        self.metadata = metadata;
    }

    /// Makes all entries durable, then the manifest.
    pub fn publish(self) -> Result<Artifact> {
        if self.keeps_nothing {
            return Err(self.invalid("it keeps nothing, so there is nothing to publish".into()));
        }
        let store = self.store.clone();
        let manifest = Manifest {
            format: Manifest::FORMAT,
            artifact_type: self.artifact_type,
            entries: self.entries.into_values().collect(),
            metadata: self.metadata,
        };
        let layout = store.layout();
        let bytes = manifest.encode(&layout.family(Family::Manifest))?;
        let digest = Digest::of(&bytes);

        let fresh: Vec<&Path> = self.staged.values().filter(|staged| staged.fresh).map(|staged| staged.temp.path()).collect();
        sync_files(&fresh)?;
        fault_point("blob.sync").map_err(StoreError::io("sync", layout.temp()))?;

        // From here to the manifest no collection may run: it would see blobs that nothing names.
        let guard = store.share_collect_lock()?;
        let mut touched = BTreeSet::new();
        let mut made_folder = false;
        for (digest, staged) in self.staged {
            made_folder |= store.place_blob(digest, staged)?;
            touched.insert(digest.as_bytes()[0]);
        }
        fault_point("blob.renamed").map_err(StoreError::io("create", layout.family(Family::Blob)))?;
        let touched: Vec<PathBuf> = touched.into_iter().map(|prefix| layout.shard(Family::Blob, prefix)).collect();
        sync_folders(&touched)?;
        if made_folder {
            sync_parents(layout, &layout.shard(Family::Blob, 0))?;
        }
        fault_point("blob.folder_synced").map_err(StoreError::io("sync folder", layout.family(Family::Blob)))?;
        // Written even when it is there: its new time protects it from collection until an action names it.
        write_durably(layout, &layout.file(Family::Manifest, digest), &bytes, &MANIFEST_POINTS)?;
        drop(guard);
        Ok(Artifact::new(store, digest, Arc::new(manifest)))
    }

    fn put_content(&mut self, name: &str, dtype: Option<Dtype>, shape: &[u64], content: &[u8]) -> Result<()> {
        if self.keeps_nothing {
            return Ok(());
        }
        self.check_new(name)?;
        let digest = hash_parallel(content);
        let size_bytes = content.len() as u64;
        let entry = Entry { name: name.to_owned(), digest, size_bytes, dtype, shape: shape.to_vec() };
        entry.check_shape().map_err(|message| self.invalid(message))?;
        if !self.hold(digest, size_bytes) {
            let temp = TempFile::write(self.store.layout(), content)?;
            self.staged.insert(digest, Staged { size_bytes, temp, fresh: true });
        }
        self.entries.insert(entry.name.clone(), entry);
        Ok(())
    }

    /// Takes hold of a blob that is staged or stored intact, so that no collection can take it before it is published.
    /// False if there is none, or no link can be made.
    fn hold(&mut self, digest: Digest, size_bytes: u64) -> bool {
        if self.staged.contains_key(&digest) {
            return true;
        }
        let held = self.store.has_intact_blob(digest, size_bytes).then(|| self.store.hold_blob(digest).ok()).flatten();
        held.is_some_and(|temp| self.staged.insert(digest, Staged { size_bytes, temp, fresh: false }).is_none())
    }

    fn check_new(&self, name: &str) -> Result<()> {
        check_entry_name(name)?;
        if self.entries.contains_key(name) {
            return Err(StoreError::EntryName { name: name.to_owned(), message: "the artifact has an entry of this name already" });
        }
        Ok(())
    }

    fn invalid(&self, message: String) -> StoreError {
        StoreError::Format { path: PathBuf::from(format!("artifact of type {}", self.artifact_type)), message }
    }
}

impl Store {
    /// Gives a staged blob its place. Returns whether a folder was made.
    ///
    /// What was written because the store had no intact blob also replaces one that could not be set aside.
    fn place_blob(&self, digest: Digest, staged: Staged) -> Result<bool> {
        let target = self.layout().file(Family::Blob, digest);
        if !staged.fresh && self.has_blob(digest, staged.size_bytes) {
            return Ok(false);
        }
        fault_point("blob.rename").map_err(StoreError::io("create", &target))?;
        let made_folder = staged.temp.persist(&target)?;
        self.note_verified(digest, &target);
        Ok(made_folder)
    }

    /// Stores one blob durably.
    pub(crate) fn write_blob(&self, content: &[u8]) -> Result<Digest> {
        let digest = hash_parallel(content);
        let size_bytes = content.len() as u64;
        {
            let _guard = self.share_collect_lock()?;
            if self.has_intact_blob(digest, size_bytes) && self.refresh_blob(digest).is_ok() {
                return Ok(digest);
            }
        }
        let (temp, mut file) = TempFile::create(self.layout())?;
        fault_point("temp.write").and_then(|()| file.write_all(content)).map_err(StoreError::io("write", temp.path()))?;
        file.sync_all().map_err(StoreError::io("sync", temp.path()))?;
        let guard = self.share_collect_lock()?;
        let made_folder = self.place_blob(digest, Staged { size_bytes, temp, fresh: true })?;
        let shard = self.layout().shard(Family::Blob, digest.as_bytes()[0]);
        sync_folder(&shard)?;
        if made_folder {
            sync_parents(self.layout(), &shard)?;
        }
        drop(guard);
        Ok(digest)
    }

    /// Gives a loose blob today's time, so that its grace period starts again.
    fn refresh_blob(&self, digest: Digest) -> std::io::Result<()> {
        let path = self.layout().file(Family::Blob, digest);
        File::open(&path)?.set_modified(SystemTime::now())?;
        self.note_verified(digest, &path);
        Ok(())
    }
}
