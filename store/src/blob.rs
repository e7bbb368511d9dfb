use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, Read},
    ops::{Deref, Range},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use crate::{Digest, Result, Store, StoreError, digest::hash_parallel, durable::TempFile, layout::Family, sealed::is_absent};

/// Verified content of one blob, read-only: memory-mapped when large.
pub struct Blob(Content);

enum Content {
    Owned(Vec<u8>),
    Mapped(memmap2::Mmap),
}

impl Blob {
    /// Lets the system read these bytes ahead, where it may not hold them in memory any more: whoever reads them soon does not wait
    /// for the disk then. Returns at once.
    pub fn read_ahead(&self, bytes: Range<usize>) {
        if let Content::Mapped(map) = &self.0
            && bytes.end <= map.len()
            && !bytes.is_empty()
        {
            // Advice: whoever cannot follow it reads later.
            let _ = map.advise_range(memmap2::Advice::WillNeed, bytes.start, bytes.len());
        }
    }
}

impl Deref for Blob {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.0 {
            Content::Owned(bytes) => bytes,
            Content::Mapped(map) => map,
        }
    }
}

impl From<Vec<u8>> for Blob {
    fn from(bytes: Vec<u8>) -> Self {
        Self(Content::Owned(bytes))
    }
}

impl From<memmap2::Mmap> for Blob {
    fn from(map: memmap2::Mmap) -> Self {
        Self(Content::Mapped(map))
    }
}

/// From here on content is mapped rather than copied. Reading a mapping of a file that somebody truncates, or on a disk that
/// fails, ends the process by SIGBUS, which nothing can catch and go on; a copy that is too short does not fit its digest, which is
/// an error like all damage. So only what would take much memory is mapped.
const MAP_BYTES: u64 = 16 << 20;

/// Content of a file that nobody changes in place. `None` if absent.
pub(crate) fn load(path: &Path) -> Result<Option<Blob>> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if is_absent(&error) => return Ok(None),
        Err(error) => return Err(StoreError::io("open", path)(error)),
    };
    let length = file.metadata().map_err(StoreError::io("examine", path))?.len();
    if length >= MAP_BYTES {
        // SAFETY: stored content is never written again, only unlinked, which leaves the mapping intact.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(StoreError::io("map", path))?;
        return Ok(Some(map.into()));
    }
    let mut bytes = Vec::with_capacity(length as usize);
    file.read_to_end(&mut bytes).map_err(StoreError::io("read", path))?;
    Ok(Some(bytes.into()))
}

/// Blobs whose content this process has seen to be right, each with what its file was then.
#[derive(Default)]
pub(crate) struct VerifiedBlobs(Mutex<HashMap<Digest, BlobStamp>>);

/// Size, modification time and inode. Not the change time: every further name for a file, such as a builder's, changes that.
#[derive(Clone, Copy, PartialEq, Eq)]
struct BlobStamp(u64, i64, i64, u64);

impl BlobStamp {
    fn of(path: &Path) -> io::Result<Self> {
        let metadata = fs::metadata(path)?;
        Ok(Self(metadata.len(), metadata.mtime(), metadata.mtime_nsec(), metadata.ino()))
    }
}

impl VerifiedBlobs {
    /// Forgets what was known of a blob.
    pub fn forget(&self, digest: Digest) {
        self.known().remove(&digest);
    }

    fn known(&self) -> std::sync::MutexGuard<'_, HashMap<Digest, BlobStamp>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store {
    /// Reads content named by its digest and verifies it; what does not fit its name is set aside.
    pub(crate) fn load_verified(&self, family: Family, digest: Digest) -> Result<Option<Blob>> {
        match self.examine(family, digest) {
            Ok(found) => Ok(found.map(|(path, content)| {
                if family == Family::Blob {
                    self.note_verified(digest, &path);
                }
                content
            })),
            Err(error) => {
                if matches!(error, StoreError::Damaged { .. }) {
                    self.set_aside(family, digest);
                }
                Err(error)
            }
        }
    }

    /// Reads content named by its digest and verifies it. Touches nothing.
    pub(crate) fn examine(&self, family: Family, digest: Digest) -> Result<Option<(PathBuf, Blob)>> {
        let path = self.layout().file(family, digest);
        let Some(content) = load(&path)? else { return Ok(None) };
        let actual = hash_parallel(&content);
        if actual == digest { Ok(Some((path, content))) } else { Err(StoreError::Damaged { what: family.name(), digest, actual }) }
    }

    /// Whether a blob of this length is there. A shorter one is what a power cut may leave.
    pub(crate) fn has_blob(&self, digest: Digest, size_bytes: u64) -> bool {
        let path = self.layout().file(Family::Blob, digest);
        fs::metadata(path).is_ok_and(|metadata| metadata.len() == size_bytes)
    }

    /// Whether a blob is there and its content is right: hashed now, unless this process did so before. What is published
    /// anew may share such a blob; sharing one that is only said to be there would keep damage alive for ever.
    pub(crate) fn has_intact_blob(&self, digest: Digest, size_bytes: u64) -> bool {
        if !self.has_blob(digest, size_bytes) {
            return false;
        }
        let path = self.layout().file(Family::Blob, digest);
        let known = self.verified_blobs().known().get(&digest).copied();
        if known.is_some() && known == BlobStamp::of(&path).ok() {
            return true;
        }
        match self.load_verified(Family::Blob, digest) {
            Ok(found) => found.is_some(),
            Err(error) => {
                tracing::warn!(%error, "a stored blob is not shared");
                false
            }
        }
    }

    /// Remembers that the file at `path` holds the content of `digest`.
    pub(crate) fn note_verified(&self, digest: Digest, path: &Path) {
        if let Ok(stamp) = BlobStamp::of(path) {
            self.verified_blobs().known().insert(digest, stamp);
        }
    }

    /// A second name for a blob that is there, if the file system can make one.
    pub(crate) fn hold_blob(&self, digest: Digest) -> io::Result<TempFile> {
        TempFile::link(self.layout(), &self.layout().file(Family::Blob, digest))
    }
}
