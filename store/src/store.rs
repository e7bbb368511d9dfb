use std::{
    fs::{self, File, OpenOptions},
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde_json::Value;

use crate::{
    ActionRecord, Artifact, ArtifactBuilder, Blob, Digest, FileDigest, LeaseHolder, LeaseOutcome, Manifest, Result, RunLog, SnapshotSet,
    StoreError,
    action_folder::ActionFolders,
    blob::VerifiedBlobs,
    damage::Damage,
    durable::{WritePoints, create_folder, sync_folder, write_durably},
    file_digest::FileMemory,
    index::Index,
    layout::{Family, Layout},
    lease::is_unsupported,
    lookup::Latest,
    presence::Presence,
    sealed::is_absent,
    superseded::ManifestBlobs,
};

/// An open store. Cheap to clone; safe to share between threads and with other processes.
#[derive(Clone)]
pub struct Store(Arc<Inner>);

struct Inner {
    layout: Layout,
    read_only: bool,
    on_network: bool,
    file_memory: FileMemory,
    presence: Presence,
    verified_blobs: VerifiedBlobs,
    damage: Damage,
    action_folders: ActionFolders,
    latest: Latest,
    manifest_blobs: ManifestBlobs,
    index: Index,
    /// Dropped last: takes the folder of [`Store::empty`] away.
    _temporary: Option<tempfile::TempDir>,
}

/// Version of the layout on disk.
const FORMAT: u32 = 1;

const VERSION_POINTS: WritePoints = WritePoints { written: "temp.written", renamed: "temp.written", folder_synced: "temp.written" };

impl Store {
    /// Opens the store in `folder`, creating it if absent.
    ///
    /// Cheap: reads one small file. Whatever else is needed is made or opened when it is.
    pub fn open(folder: &Path) -> Result<Self> {
        Self::open_with(folder, None)
    }

    /// A store in which nothing is, and that leaves nothing behind: what a question about a store that does not exist
    /// is answered from.
    pub fn empty() -> Result<Self> {
        let temporary = tempfile::tempdir().map_err(StoreError::io("make", std::env::temp_dir()))?;
        let folder = temporary.path().to_owned();
        Self::open_with(&folder, Some(temporary))
    }

    fn open_with(folder: &Path, temporary: Option<tempfile::TempDir>) -> Result<Self> {
        let root = std::path::absolute(folder).map_err(StoreError::io("find", folder))?;
        let layout = Layout { root };
        if !check_version(&layout)? {
            create(&layout)?;
        }
        let read_only = rustix::fs::access(&layout.root, rustix::fs::Access::WRITE_OK).is_err();
        let on_network = is_on_network(&layout.root);
        Ok(Self(Arc::new(Inner {
            layout,
            read_only,
            on_network,
            file_memory: FileMemory::default(),
            presence: Presence::default(),
            verified_blobs: VerifiedBlobs::default(),
            damage: Damage::default(),
            action_folders: ActionFolders::default(),
            latest: Latest::default(),
            manifest_blobs: ManifestBlobs::default(),
            index: Index::default(),
            _temporary: temporary,
        })))
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.0.layout.root
    }

    /// Whether nothing can be written here. Results can still be read and hit.
    pub fn is_read_only(&self) -> bool {
        self.0.read_only
    }

    /// What was wrong with the index, if it had to be set aside since this store object was made. Nothing is lost by that.
    pub fn index_damage(&self) -> Option<&str> {
        self.index().damage()
    }

    pub(crate) fn layout(&self) -> &Layout {
        &self.0.layout
    }

    pub(crate) fn file_memory(&self) -> &FileMemory {
        &self.0.file_memory
    }

    pub(crate) fn presence(&self) -> &Presence {
        &self.0.presence
    }

    pub(crate) fn verified_blobs(&self) -> &VerifiedBlobs {
        &self.0.verified_blobs
    }

    pub(crate) fn damage(&self) -> &Damage {
        &self.0.damage
    }

    pub(crate) fn action_folders(&self) -> &ActionFolders {
        &self.0.action_folders
    }

    pub(crate) fn latest(&self) -> &Latest {
        &self.0.latest
    }

    pub(crate) fn manifest_blobs(&self) -> &ManifestBlobs {
        &self.0.manifest_blobs
    }

    pub(crate) fn index(&self) -> &Index {
        &self.0.index
    }

    /// Whether other hosts may write to the same files without seeing this host's locks.
    pub(crate) fn is_on_network(&self) -> bool {
        self.0.on_network
    }

    /// The same as it would be on a network file system.
    #[cfg(test)]
    pub(crate) fn into_networked(mut self) -> Self {
        Arc::get_mut(&mut self.0).expect("nobody else has it yet").on_network = true;
        self
    }

    /// Starts an artifact of the given type.
    pub fn artifact(&self, artifact_type: &str) -> ArtifactBuilder {
        ArtifactBuilder::new(self.clone(), artifact_type.to_owned())
    }

    /// A builder that lets go of all that it is given: for whoever makes the same as another process, which publishes it.
    pub fn no_artifact(&self, artifact_type: &str) -> ArtifactBuilder {
        self.artifact(artifact_type).keeps_nothing()
    }

    /// Opens an artifact by its manifest's digest, to be read: what is seen to be damaged is set aside. `None` if it or one of
    /// its blobs is not there.
    pub fn open_artifact(&self, digest: Digest) -> Result<Option<Artifact>> {
        let Some(manifest) = self.load_manifest(digest)? else { return Ok(None) };
        for entry in &manifest.entries {
            match fs::metadata(self.layout().file(Family::Blob, entry.digest)) {
                Ok(metadata) if metadata.len() == entry.size_bytes => {}
                // A power cut may leave less than was written, and seldom of one file only.
                Ok(_) => self.verify_entries(digest, &manifest)?,
                Err(error) if is_absent(&error) => return Ok(None),
                Err(error) => return Err(StoreError::io("examine", self.layout().file(Family::Blob, entry.digest))(error)),
            }
        }
        Ok(Some(Artifact::new(self.clone(), digest, Arc::new(manifest))))
    }

    /// Stores a loose blob (metric series, samples) and returns its digest.
    pub fn put_blob(&self, content: &[u8]) -> Result<Digest> {
        self.write_blob(content)
    }

    /// Reads and verifies a blob. `None` if absent.
    pub fn blob(&self, digest: Digest) -> Result<Option<Blob>> {
        self.load_verified(Family::Blob, digest)
    }

    /// The action recorded under `key`, if any. Touches nothing: a damaged record counts as none, with a warning, until the action is
    /// recorded again.
    pub fn action(&self, key: Digest) -> Result<Option<ActionRecord>> {
        self.or_absent(key, self.examine_action(key))
    }

    /// Records an action durably, after its outputs are.
    pub fn put_action(&self, record: &ActionRecord) -> Result<()> {
        self.write_action(record)?;
        self.note_action(record);
        Ok(())
    }

    /// Newest action of a stage of this kind and name, whatever its key: what rerun reasons compare with.
    /// Prefers records of the same workflow file.
    pub fn last_action(&self, workflow: &str, stage: &str, kind: &str) -> Result<Option<ActionRecord>> {
        self.newest_action(workflow, stage, kind)
    }

    /// Every action record (for `log`, `gc`, `lineage`).
    pub fn actions(&self) -> Result<Vec<ActionRecord>> {
        let mut records = Vec::new();
        for key in self.list_family(Family::Action)? {
            match self.action(key) {
                Ok(record) => records.extend(record),
                Err(error @ StoreError::Format { .. }) => self.tell_once(key, &error),
                Err(error) => return Err(error),
            }
        }
        Ok(records)
    }

    /// Digest of a data file, from memory when size, modification time, inode and change time are as remembered
    /// and old enough to be trusted.
    pub fn file_digest(&self, path: &Path) -> Result<FileDigest> {
        self.digest_of_file(path)
    }

    /// Bytes of data files that this store object and its clones had to hash.
    pub fn hashed_bytes(&self) -> u64 {
        self.count_hashed_bytes()
    }

    /// Asks for the right to work on `key`.
    pub fn lease(&self, key: Digest, holder: &LeaseHolder) -> Result<LeaseOutcome> {
        let outcome = self.take_lease(key, holder);
        // Its last owner may have published since the folder was looked at: whoever has the right must see that.
        self.action_folders().forget(key);
        outcome
    }

    /// Who works on `key` now, without asking for the right.
    pub fn lease_holder(&self, key: Digest) -> Result<Option<LeaseHolder>> {
        self.find_lease_holder(key)
    }

    /// Snapshots of the stage with this prefix key.
    pub fn snapshots(&self, prefix_key: Digest) -> SnapshotSet {
        SnapshotSet { store: self.clone(), prefix_key }
    }

    /// Starts the record of a run.
    pub fn begin_run(&self, header: &Value) -> Result<RunLog> {
        self.start_run(header)
    }

    /// Folders of past runs, newest first.
    pub fn runs(&self) -> Result<Vec<PathBuf>> {
        self.list_runs()
    }

    /// The manifest named `digest`, verified. `None` if absent. Touches nothing.
    pub fn manifest(&self, digest: Digest) -> Result<Option<Manifest>> {
        let Some((path, bytes)) = self.examine(Family::Manifest, digest)? else { return Ok(None) };
        Manifest::decode(&path, &bytes).map(Some)
    }

    /// Like [`Store::manifest`], but sets a damaged one aside.
    pub(crate) fn load_manifest(&self, digest: Digest) -> Result<Option<Manifest>> {
        let found = self.manifest(digest);
        if matches!(found, Err(StoreError::Damaged { .. })) {
            self.set_aside(Family::Manifest, digest);
        }
        found
    }

    /// Held while content becomes visible, so that a collection in another process does not take it at once.
    pub(crate) fn share_collect_lock(&self) -> Result<CollectLock> {
        let file = self.open_collect_lock()?;
        match file.lock_shared() {
            Err(error) if !is_unsupported(&error) => Err(StoreError::io("lock", self.layout().collect_lock())(error)),
            _ => Ok(CollectLock { _file: file }),
        }
    }

    pub(crate) fn open_collect_lock(&self) -> Result<File> {
        let path = self.layout().collect_lock();
        OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).map_err(StoreError::io("create", path))
    }
}

/// Lets collections wait, or writers, until dropped.
pub(crate) struct CollectLock {
    pub _file: File,
}

/// Whether there is a store of a version that we know; `false` if there is none yet.
fn check_version(layout: &Layout) -> Result<bool> {
    let path = layout.version();
    let found = match fs::read(&path) {
        Ok(bytes) => String::from_utf8_lossy(&bytes[..bytes.len().min(40)]).trim().to_owned(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(StoreError::io("open store", path)(error)),
    };
    match found.parse() {
        Ok(FORMAT) => Ok(true),
        _ => Err(StoreError::Version { path: layout.root.clone(), found, expected: FORMAT }),
    }
}

fn create(layout: &Layout) -> Result<()> {
    /// What a creation that was cut short may have left, and what hosts put into any folder.
    const KNOWN: [&str; 3] = ["tmp", ".gitignore", "lost+found"];
    create_folder(&layout.root)?;
    let entries = fs::read_dir(&layout.root).map_err(StoreError::io("list", &layout.root))?;
    for entry in entries {
        let name = entry.map_err(StoreError::io("list", &layout.root))?.file_name();
        if !KNOWN.iter().any(|known| name == **known) {
            // Another process may have finished creating it meanwhile.
            if check_version(layout)? {
                return Ok(());
            }
            let message = format!(
                "the folder holds `{}` but no VERSION file, so it is not an rlflow store; name an empty or a new folder",
                name.to_string_lossy()
            );
            return Err(StoreError::Format { path: layout.root.clone(), message });
        }
    }
    let ignore = layout.root.join(".gitignore");
    fs::write(&ignore, "*\n").map_err(StoreError::io("write", &ignore))?;
    write_durably(layout, &layout.version(), format!("{FORMAT}\n").as_bytes(), &VERSION_POINTS)?;
    layout.root.parent().map_or(Ok(()), sync_folder)
}

#[cfg(target_os = "linux")]
pub(crate) fn is_on_network(path: &Path) -> bool {
    /// `f_type` of NFS, SMB, CIFS, SMB2, Lustre, GPFS, BeeGFS, Ceph, AFS, OCFS2, 9p, FUSE.
    const NETWORK: [u32; 12] = [
        0x6969,
        0x517b,
        0xff53_4d42,
        0xfe53_4d42,
        0x0bd0_0bd0,
        0x4750_4653,
        0x1983_0326,
        0x00c3_6400,
        0x5346_414f,
        0x7461_636f,
        0x0102_1997,
        0x6573_5546,
    ];
    rustix::fs::statfs(path).is_ok_and(|found| NETWORK.contains(&(found.f_type as u32)))
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn is_on_network(_: &Path) -> bool {
    false
}
