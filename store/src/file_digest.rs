use std::{
    collections::HashMap,
    fs::{self, File, Metadata},
    io,
    os::unix::fs::MetadataExt,
    path::Path,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};

use crate::{Digest, Result, Store, StoreError, store::is_on_network, tree_hash::hash_file};

/// A data file's content digest and size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileDigest {
    /// Digest of the content.
    pub digest: Digest,
    /// Length.
    pub size_bytes: u64,
}

/// Bytes that are hashed in the time that one lookup without the index takes.
const HASHED_PER_LOOKUP: u64 = 16 << 10;

/// What a file's content is recognised by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "(u64, i128, i128, u64)", from = "(u64, i128, i128, u64)")]
pub(crate) struct FileStamp {
    pub size_bytes: u64,
    pub modified_ns: i128,
    pub changed_ns: i128,
    pub inode: u64,
}

impl FileStamp {
    pub fn of(metadata: &Metadata) -> Self {
        let nanos = |seconds: i64, nanos: i64| i128::from(seconds) * 1_000_000_000 + i128::from(nanos);
        Self {
            size_bytes: metadata.len(),
            modified_ns: nanos(metadata.mtime(), metadata.mtime_nsec()),
            changed_ns: nanos(metadata.ctime(), metadata.ctime_nsec()),
            inode: metadata.ino(),
        }
    }

    /// How long to wait from `now` until a later write must show in the file's times; zero if it must already. `None` for
    /// times from the future (the clock was set back): these are not trusted.
    ///
    /// Where times have more digits than milliseconds they come from the kernel's clock, which ticks every 10 ms at the
    /// slowest. Else, and where another machine's clock sets them, allow for the coarsest in use (two seconds on FAT).
    pub fn settles_in(&self, now: SystemTime, on_network: bool) -> Option<Duration> {
        let coarse = on_network || self.changed_ns % 1_000_000 == 0;
        let resolution = if coarse { COARSE } else { Duration::from_millis(50) }.as_nanos() as i128;
        let now = now.duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as i128);
        let left = self.modified_ns.max(self.changed_ns) + resolution - now;
        (left <= resolution).then(|| Duration::from_nanos(left.max(0) as u64))
    }
}

impl From<FileStamp> for (u64, i128, i128, u64) {
    fn from(stamp: FileStamp) -> Self {
        (stamp.size_bytes, stamp.modified_ns, stamp.changed_ns, stamp.inode)
    }
}

impl From<(u64, i128, i128, u64)> for FileStamp {
    fn from((size_bytes, modified_ns, changed_ns, inode): (u64, i128, i128, u64)) -> Self {
        Self { size_bytes, modified_ns, changed_ns, inode }
    }
}

/// See [`FileStamp::settles_in`].
const COARSE: Duration = Duration::from_secs(2);
/// A file larger than this is worth waiting for: hashed before its times have settled, it would be hashed again next time.
const WORTH_WAITING_BYTES: u64 = 32 << 20;
/// Longest wait for that.
const LONGEST_WAIT: Duration = Duration::from_millis(50);

/// Digests of data files hashed by this process, shared by all clones of a store.
#[derive(Default)]
pub(crate) struct FileMemory {
    /// By digest of the path.
    known: Mutex<HashMap<Digest, (FileStamp, FileDigest)>>,
    hashed_bytes: AtomicU64,
}

impl FileMemory {
    fn get(&self, path: Digest, stamp: &FileStamp) -> Option<FileDigest> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(&path).filter(|(known, _)| known == stamp).map(|(_, digest)| *digest)
    }

    fn put(&self, path: Digest, stamp: FileStamp, digest: FileDigest) {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).insert(path, (stamp, digest));
    }
}

impl Store {
    pub(crate) fn digest_of_file(&self, path: &Path) -> Result<FileDigest> {
        let path = std::path::absolute(path).map_err(StoreError::io("find", path))?;
        let metadata = fs::metadata(&path).map_err(StoreError::io("examine", &path))?;
        check_is_file(&path, &metadata)?;
        let stamp = FileStamp::of(&metadata);
        let name = Digest::of(path.as_os_str().as_encoded_bytes());
        if let Some(digest) = self.file_memory().get(name, &stamp) {
            return Ok(digest);
        }
        // Hashing a little is cheaper than opening the index; a lot is not.
        self.index().expect(self, metadata.len() / HASHED_PER_LOOKUP);
        if let Some(digest) = self.indexed_file(name, &stamp) {
            self.file_memory().put(name, stamp, digest);
            return Ok(digest);
        }
        // Times that settled by the coarsest measure need no look at the file system.
        let settles_in = |stamp: &FileStamp, at: SystemTime| match stamp.settles_in(at, true) {
            Some(Duration::ZERO) => Some(Duration::ZERO),
            _ => stamp.settles_in(at, is_on_network(&path)),
        };
        let wait = settles_in(&stamp, SystemTime::now()).filter(|wait| *wait <= LONGEST_WAIT && stamp.size_bytes >= WORTH_WAITING_BYTES);
        wait.into_iter().for_each(std::thread::sleep);
        let file = File::open(&path).map_err(StoreError::io("open", &path))?;
        let hashed_at = SystemTime::now();
        let (digest, read) = read_steadily(&path, &file, |_, _| Ok(()))?;
        self.file_memory().hashed_bytes.fetch_add(read.size_bytes, Ordering::Relaxed);
        let digest = FileDigest { digest, size_bytes: read.size_bytes };
        if settles_in(&read, hashed_at) == Some(Duration::ZERO) {
            self.index_file(name, &read, &digest);
            self.file_memory().put(name, read, digest);
        }
        Ok(digest)
    }

    /// Whether this store object found a data file to have `digest` when it looked like `stamp`.
    pub(crate) fn remembers(&self, path: &Path, stamp: &FileStamp, digest: Digest) -> bool {
        let Ok(path) = std::path::absolute(path) else { return false };
        let name = Digest::of(path.as_os_str().as_encoded_bytes());
        self.file_memory().get(name, stamp).is_some_and(|known| known.digest == digest)
    }

    pub(crate) fn count_hashed_bytes(&self) -> u64 {
        self.file_memory().hashed_bytes.load(Ordering::Relaxed)
    }
}

/// Digest of an open file's content, read once and passed to `take` piece by piece; fails if it changed meanwhile.
pub(crate) fn read_steadily(path: &Path, file: &File, take: impl Fn(&[u8], u64) -> Result<()> + Sync) -> Result<(Digest, FileStamp)> {
    let examine = || file.metadata().map_err(StoreError::io("examine", path));
    let before = examine()?;
    check_is_file(path, &before)?;
    let stamp = FileStamp::of(&before);
    let digest = hash_file(path, file, stamp.size_bytes, take)?;
    if FileStamp::of(&examine()?) != stamp {
        return Err(StoreError::ChangedWhileRead { path: path.to_owned() });
    }
    Ok((digest, stamp))
}

pub(crate) fn check_is_file(path: &Path, metadata: &Metadata) -> Result<()> {
    if metadata.is_file() {
        return Ok(());
    }
    let kind = if metadata.is_dir() { io::ErrorKind::IsADirectory } else { io::ErrorKind::InvalidInput };
    Err(StoreError::Io { operation: "read", path: path.to_owned(), source: io::Error::from(kind) })
}
