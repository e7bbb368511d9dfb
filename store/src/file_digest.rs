use std::{
    collections::HashMap,
    fs::{self, File, Metadata, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use crate::{Digest, Hasher, Result, Store, StoreError, blob, digest::hash_parallel, durable::TempFile};

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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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

    /// Whether the file was left alone long enough before `now` that a later write must show in its times.
    /// Times from the future (the clock was set back) are not trusted.
    pub fn is_settled(&self, now: SystemTime) -> bool {
        /// Coarsest time stamps in use (FAT), with room for clock ticks.
        const SETTLED: Duration = Duration::from_secs(2);
        let now = now.duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as i128);
        now - self.modified_ns.max(self.changed_ns) >= SETTLED.as_nanos() as i128
    }
}

/// Digests of data files hashed by this process, shared by all clones of a store.
#[derive(Default)]
pub(crate) struct FileMemory(Mutex<HashMap<PathBuf, (FileStamp, FileDigest)>>);

impl FileMemory {
    fn get(&self, path: &Path, stamp: &FileStamp) -> Option<FileDigest> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(path).filter(|(known, _)| known == stamp).map(|(_, digest)| *digest)
    }

    fn put(&self, path: PathBuf, stamp: FileStamp, digest: FileDigest) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(path, (stamp, digest));
    }
}

impl Store {
    pub(crate) fn digest_of_file(&self, path: &Path) -> Result<FileDigest> {
        let path = std::path::absolute(path).map_err(StoreError::io("find", path))?;
        let metadata = fs::metadata(&path).map_err(StoreError::io("examine", &path))?;
        check_is_file(&path, &metadata)?;
        let stamp = FileStamp::of(&metadata);
        if let Some(digest) = self.file_memory().get(&path, &stamp) {
            return Ok(digest);
        }
        // Hashing a little is cheaper than opening the index; a lot is not.
        self.index().expect(self, metadata.len() / HASHED_PER_LOOKUP);
        if let Some(digest) = self.indexed_file(&path, &stamp) {
            self.file_memory().put(path, stamp, digest);
            return Ok(digest);
        }
        let hashed_at = SystemTime::now();
        let mut hasher = Hasher::new();
        let read = read_steadily(&path, |bytes| {
            hasher.update_parallel(bytes);
            Ok(())
        })?;
        let digest = FileDigest { digest: hasher.finish(), size_bytes: read.size_bytes };
        if read.is_settled(hashed_at) {
            self.index_file(&path, &read, &digest);
            self.file_memory().put(path, read, digest);
        }
        Ok(digest)
    }
}

/// Passes a file's content to `take`, piece by piece, and fails if it changed meanwhile. Returns what it is recognised by.
fn read_steadily(path: &Path, mut take: impl FnMut(&[u8]) -> Result<()>) -> Result<FileStamp> {
    const PIECE_BYTES: usize = 4 << 20;
    let mut file = File::open(path).map_err(StoreError::io("open", path))?;
    let before = file.metadata().map_err(StoreError::io("examine", path))?;
    check_is_file(path, &before)?;
    let stamp = FileStamp::of(&before);
    let mut piece = vec![0; PIECE_BYTES.min(before.len() as usize + 1)];
    let mut total = 0_u64;
    loop {
        let length = fill(&mut file, &mut piece).map_err(StoreError::io("read", path))?;
        if length == 0 {
            break;
        }
        take(&piece[..length])?;
        total += length as u64;
    }
    let after = file.metadata().map_err(StoreError::io("examine", path))?;
    if FileStamp::of(&after) != stamp || total != stamp.size_bytes {
        return Err(StoreError::ChangedWhileRead { path: path.to_owned() });
    }
    Ok(stamp)
}

/// Reads until the buffer is full or the file ends.
fn fill(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(length) => filled += length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

fn check_is_file(path: &Path, metadata: &Metadata) -> Result<()> {
    if metadata.is_file() {
        return Ok(());
    }
    let kind = if metadata.is_dir() { io::ErrorKind::IsADirectory } else { io::ErrorKind::InvalidInput };
    Err(StoreError::Io { operation: "read", path: path.to_owned(), source: io::Error::from(kind) })
}

/// Brings a file's content under `tmp/`, hashing it once on the way: by reflink, by hard link where nobody may write to
/// it, else by copying.
pub(crate) fn import_file(store: &Store, path: &Path) -> Result<(Digest, u64, TempFile)> {
    let metadata = fs::metadata(path).map_err(StoreError::io("examine", path))?;
    check_is_file(path, &metadata)?;
    let temp = match clone_file(store, path)? {
        Some(temp) => Some(temp),
        None if is_immutable(store, path, &metadata) => TempFile::link(store.layout(), path).ok(),
        None => None,
    };
    if let Some(temp) = temp {
        let content = blob::load(temp.path())?.ok_or_else(|| StoreError::ChangedWhileRead { path: path.to_owned() })?;
        return Ok((hash_parallel(&content), content.len() as u64, temp));
    }
    let (temp, mut target) = TempFile::create(store.layout())?;
    let mut hasher = Hasher::new();
    let stamp = read_steadily(path, |bytes| {
        // Writing and hashing overlap: neither needs the other's result.
        std::thread::scope(|scope| {
            let written = scope.spawn(|| target.write_all(bytes));
            hasher.update_parallel(bytes);
            written.join().unwrap_or_else(|_| Err(io::Error::other("the writing thread panicked")))
        })
        .map_err(StoreError::io("write", temp.path()))
    })?;
    Ok((hasher.finish(), stamp.size_bytes, temp))
}

/// Whether nobody is expected to write to the file: it is ours, under `tmp/`, or read-only for everyone.
fn is_immutable(store: &Store, path: &Path, metadata: &Metadata) -> bool {
    let ours = || Some(fs::canonicalize(path).ok()?.starts_with(fs::canonicalize(store.layout().temp()).ok()?));
    metadata.mode() & 0o222 == 0 || ours() == Some(true)
}

/// A copy that shares the source's extents, if the file system can make one.
#[cfg(target_os = "linux")]
fn clone_file(store: &Store, path: &Path) -> Result<Option<TempFile>> {
    let source = File::open(path).map_err(StoreError::io("open", path))?;
    let (temp, target) = TempFile::create(store.layout())?;
    Ok(rustix::fs::ioctl_ficlone(&target, &source).is_ok().then_some(temp))
}

#[cfg(not(target_os = "linux"))]
fn clone_file(_: &Store, _: &Path) -> Result<Option<TempFile>> {
    Ok(None)
}

impl Store {
    /// A new empty file in the store's scratch folder, to write something large and then [`crate::ArtifactBuilder::put_file`] it
    /// without a copy. Remove it afterwards; `gc` takes what a crash leaves.
    pub fn scratch(&self) -> Result<(PathBuf, File)> {
        crate::durable::create_folder(&self.layout().temp())?;
        let nanos = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos());
        for count in 0_u32.. {
            let path = self.layout().temp().join(format!("scratch-{}-{nanos:x}-{count}", std::process::id()));
            match OpenOptions::new().read(true).write(true).create_new(true).mode(0o644).open(&path) {
                Ok(file) => return Ok((path, file)),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(StoreError::io("create", path)(error)),
            }
        }
        unreachable!("some number is free")
    }
}
