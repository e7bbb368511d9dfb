//! Writing so that a crash leaves either the old state or the new one: temp file, fsync, rename, fsync of the folder.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
    time::{SystemTime, UNIX_EPOCH},
};

use crate::{Result, StoreError, fault::fault_point, layout::Layout};

/// Stored content is read-only, less the umask.
const CONTENT_MODE: u32 = 0o444;

/// A file under `tmp/`, removed when dropped unless it was moved to its place.
#[derive(Debug)]
pub(crate) struct TempFile {
    path: Option<PathBuf>,
}

impl TempFile {
    /// A path under `tmp/` that nobody uses.
    fn fresh_path(layout: &Layout) -> PathBuf {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let count = COUNTER.fetch_add(1, Ordering::Relaxed);
        let nanos = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos());
        layout.temp().join(format!("{}-{count}-{:x}", std::process::id(), nanos as u64))
    }

    /// Runs `make` on a fresh path, creating `tmp/` if it is not there yet and trying another path if that one is taken.
    fn make<T>(layout: &Layout, mut make: impl FnMut(&Path) -> io::Result<T>) -> Result<(Self, T)> {
        loop {
            let path = Self::fresh_path(layout);
            match fault_point("temp.create").and_then(|()| make(&path)) {
                Ok(made) => return Ok((Self { path: Some(path) }, made)),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound && !layout.temp().exists() => create_folder(&layout.temp())?,
                Err(source) => return Err(StoreError::Io { operation: "create", path, source }),
            }
        }
    }

    /// An empty file, open for writing.
    pub fn create(layout: &Layout) -> Result<(Self, File)> {
        Self::make(layout, |path| OpenOptions::new().write(true).create_new(true).mode(CONTENT_MODE).open(path))
    }

    /// A file with `content`, not yet synced.
    pub fn write(layout: &Layout, content: &[u8]) -> Result<Self> {
        let (temp, mut file) = Self::create(layout)?;
        fault_point("temp.write").and_then(|()| file.write_all(content)).map_err(StoreError::io("write", temp.path()))?;
        fault_point("temp.written").map_err(StoreError::io("write", temp.path()))?;
        Ok(temp)
    }

    /// A second name for the file at `path`, which keeps its content from vanishing. Fails with the system's error where links cannot be made.
    pub fn link(layout: &Layout, path: &Path) -> io::Result<Self> {
        let linked = Self::make(layout, |temp| match fs::hard_link(path, temp) {
            // A source that is not there must not look like a missing `tmp/`.
            Err(error) if error.kind() == io::ErrorKind::NotFound && layout.temp().exists() => Ok(Err(error)),
            other => other.map(Ok),
        });
        match linked {
            Ok((temp, Ok(()))) => Ok(temp),
            Ok((mut temp, Err(error))) => {
                temp.path = None;
                Err(error)
            }
            Err(StoreError::Io { source, .. }) => Err(source),
            Err(error) => Err(io::Error::other(error)),
        }
    }

    pub fn path(&self) -> &Path {
        self.path.as_deref().expect("a temp file has its path until it is moved")
    }

    /// Moves it to `target`. Returns whether the folder had to be made.
    pub fn persist(mut self, target: &Path) -> Result<bool> {
        let path = self.path().to_owned();
        let made = match fs::rename(&path, target) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && path.exists() => {
                create_folder(target.parent().expect("targets lie in the store"))?;
                fs::rename(&path, target).map(|()| true)
            }
            other => other.map(|()| false),
        };
        let made = made.map_err(StoreError::io("create", target))?;
        // rename(2) does nothing when both names are links to one file; then the temp name is still ours to remove.
        if !path.exists() {
            self.path = None;
        }
        Ok(made)
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            let _ = fs::remove_file(path);
        }
    }
}

/// Creates a folder with its parents.
pub(crate) fn create_folder(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(StoreError::io("create folder", path))
}

/// Makes a folder's entries durable.
pub(crate) fn sync_folder(path: &Path) -> Result<()> {
    let result = File::open(path).and_then(|folder| folder.sync_all());
    match result {
        // Some network file systems cannot sync folders and need not.
        Err(error) if matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) => Ok(()),
        other => other.map_err(StoreError::io("sync folder", path)),
    }
}

/// Makes the content of many files durable.
pub(crate) fn sync_files(paths: &[&Path]) -> Result<()> {
    for_each_in_parallel(paths, |path| File::open(path).and_then(|file| file.sync_all()).map_err(StoreError::io("sync", *path)))
}

/// Makes the entries of many folders durable.
pub(crate) fn sync_folders(paths: &[PathBuf]) -> Result<()> {
    for_each_in_parallel(paths, |path| sync_folder(path))
}

/// Waiting on many fsyncs at once lets the file system commit them together: an artifact has hundreds of tensors.
fn for_each_in_parallel<T: Sync>(items: &[T], work: impl Fn(&T) -> Result<()> + Sync) -> Result<()> {
    const THREADS: usize = 32;
    if items.len() < 4 {
        return items.iter().try_for_each(work);
    }
    let next = AtomicUsize::new(0);
    let worker = || {
        while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
            work(item)?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (1..THREADS.min(items.len())).map(|_| std::thread::Builder::new().spawn_scoped(scope, worker)).collect();
        // This thread works too, so that all is done even where no thread can be started.
        let own = worker();
        threads
            .into_iter()
            .flatten()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .fold(own, Result::and)
    })
}

/// Names of the fault points around one small durable write.
pub(crate) struct WritePoints {
    pub written: &'static str,
    pub renamed: &'static str,
    pub folder_synced: &'static str,
}

/// Writes a small file durably, replacing what is there.
pub(crate) fn write_durably(layout: &Layout, target: &Path, content: &[u8], points: &WritePoints) -> Result<()> {
    let temp = TempFile::write(layout, content)?;
    sync_files(&[temp.path()])?;
    fault_point(points.written).map_err(StoreError::io("write", target))?;
    let made_folder = temp.persist(target)?;
    fault_point(points.renamed).map_err(StoreError::io("write", target))?;
    let folder = target.parent().expect("targets lie in the store");
    sync_folder(folder)?;
    if made_folder {
        sync_parents(layout, folder)?;
    }
    fault_point(points.folder_synced).map_err(StoreError::io("write", target))
}

/// Makes the folders above a new one durable, up to the store's own.
pub(crate) fn sync_parents(layout: &Layout, folder: &Path) -> Result<()> {
    folder.ancestors().skip(1).take_while(|parent| parent.starts_with(&layout.root)).try_for_each(sync_folder)
}

/// Writes a small file in one step, but not durably: after a power cut it may be old, empty or absent.
pub(crate) fn write_lightly(layout: &Layout, target: &Path, content: &[u8]) -> Result<()> {
    TempFile::write(layout, content)?.persist(target).map(drop)
}
