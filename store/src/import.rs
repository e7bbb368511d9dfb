use std::{
    fs::{self, File, Metadata, OpenOptions, Permissions},
    io,
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use crate::{
    Digest, Result, Store, StoreError, blob,
    digest::hash_parallel,
    durable::{TempFile, create_folder},
    fault::fault_point,
    file_digest::{check_is_file, read_steadily},
    tree_hash::hash_file,
};

/// Brings a file's content under `tmp/`, reading and hashing it once: by reflink, by hard link where nobody may write to
/// it, else by copying.
pub(crate) fn import_file(store: &Store, path: &Path) -> Result<(Digest, u64, TempFile)> {
    // Of a symbolic link, the file: a link to the link would be content that others can exchange.
    let path = &fs::canonicalize(path).map_err(StoreError::io("find", path))?;
    check_is_file(path, &fs::metadata(path).map_err(StoreError::io("examine", path))?)?;
    let source = File::open(path).map_err(StoreError::io("open", path))?;
    let metadata = source.metadata().map_err(StoreError::io("examine", path))?;

    let (temp, target) = TempFile::create(store.layout())?;
    if reflink(&target, &source) {
        return hash_ours(temp);
    }
    let ours = is_scratch(store, path);
    if (ours || metadata.mode() & 0o222 == 0)
        && let Some(linked) = hard_link(store, path, &metadata)
    {
        if ours {
            // Content is read-only; the empty file shows what the umask leaves of that.
            let mode = target.metadata().map_or(0o400, |made| made.mode() & 0o444);
            let sealed = fs::set_permissions(linked.path(), Permissions::from_mode(mode));
            sealed.map_err(StoreError::io("make read-only", linked.path()))?;
            return hash_ours(linked);
        }
        let digest = hash_file(path, &source, metadata.len(), |_, _| Ok(()))?;
        // Not the change time: every further name for the file, such as another builder's, changes that.
        let content = |metadata: &Metadata| (metadata.len(), metadata.mtime(), metadata.mtime_nsec());
        if content(&source.metadata().map_err(StoreError::io("examine", path))?) != content(&metadata) {
            return Err(StoreError::ChangedWhileRead { path: path.clone() });
        }
        return Ok((digest, metadata.len(), linked));
    }
    let write = |bytes: &[u8], offset: u64| {
        fault_point("temp.write").and_then(|()| target.write_all_at(bytes, offset)).map_err(StoreError::io("write", temp.path()))
    };
    let (digest, stamp) = read_steadily(path, &source, write)?;
    Ok((digest, stamp.size_bytes, temp))
}

/// Hashes a file that nobody else writes to or cuts short: mapping it is the fastest way.
fn hash_ours(temp: TempFile) -> Result<(Digest, u64, TempFile)> {
    let gone = || StoreError::ChangedWhileRead { path: temp.path().to_owned() };
    let content = blob::load(temp.path())?.ok_or_else(gone)?;
    Ok((hash_parallel(&content), content.len() as u64, temp))
}

/// Makes `target` share the source's extents, if the file system can.
#[cfg(target_os = "linux")]
fn reflink(target: &File, source: &File) -> bool {
    rustix::fs::ioctl_ficlone(target, source).is_ok()
}

#[cfg(not(target_os = "linux"))]
fn reflink(_: &File, _: &File) -> bool {
    false
}

/// Whether a file lies under the store's `tmp/`, where only this process's builders write.
fn is_scratch(store: &Store, path: &Path) -> bool {
    fs::canonicalize(store.layout().temp()).is_ok_and(|folder| path.starts_with(folder))
}

/// A second name for the very file that was opened.
fn hard_link(store: &Store, path: &Path, opened: &Metadata) -> Option<TempFile> {
    let linked = TempFile::link(store.layout(), path).ok()?;
    let found = fs::symlink_metadata(linked.path()).ok()?;
    ((found.dev(), found.ino()) == (opened.dev(), opened.ino())).then_some(linked)
}

impl Store {
    /// A new empty file in the store's scratch folder, to write something large and then [`crate::ArtifactBuilder::put_file`] it
    /// without a copy. Remove it afterwards; `gc` takes what a crash leaves.
    pub fn scratch(&self) -> Result<(PathBuf, File)> {
        create_folder(&self.layout().temp())?;
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
