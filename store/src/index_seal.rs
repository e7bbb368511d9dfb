//! The seal of the index: what its files hashed to when they were closed, so that damage is found before sled reads them.

use std::{
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
};

use crate::{Digest, Hasher, file_digest::FileStamp};

/// File that says what the index's files hashed to when they were closed.
pub(crate) const SEAL: &str = "SEAL";
/// An index larger than this is not checked as a whole before it is opened; sled's own checks and the envelopes remain.
const MAX_SEALED_BYTES: u64 = 64 << 20;

/// All files in the index but the seal, sorted.
fn files_of(folder: &Path) -> Option<Vec<PathBuf>> {
    fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> std::io::Result<()> {
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                collect(&entry.path(), files)?;
            } else if entry.file_name() != SEAL {
                files.push(entry.path());
            }
        }
        Ok(())
    }
    let mut files = Vec::new();
    collect(folder, &mut files).ok()?;
    files.sort();
    Some(files)
}

/// What all of these files are recognised by.
pub(crate) fn stamps(folder: &Path) -> Option<Vec<(PathBuf, FileStamp)>> {
    let stamp = |path: PathBuf| Some((path.clone(), FileStamp::of(&fs::metadata(path).ok()?)));
    files_of(folder)?.into_iter().map(stamp).collect()
}

/// Digest over names and contents of all files in the index. `None` if they cannot be read or are too many bytes to check.
pub(crate) fn seal_of(folder: &Path) -> Option<Digest> {
    let mut hasher = Hasher::new();
    let mut buffer = vec![0; 128 << 10];
    let mut total = 0;
    for path in files_of(folder)? {
        total += fs::metadata(&path).ok()?.len();
        if total > MAX_SEALED_BYTES {
            return None;
        }
        let mut file = File::open(&path).ok()?;
        let length = file.metadata().ok()?.len();
        let name = path.strip_prefix(folder).ok()?.as_os_str().as_encoded_bytes();
        hasher.update(&(name.len() as u64).to_be_bytes()).update(name).update(&length.to_be_bytes());
        loop {
            match file.read(&mut buffer).ok()? {
                0 => break,
                read => _ = hasher.update(&buffer[..read]),
            }
        }
    }
    Some(hasher.finish())
}

/// Whether sled has let go of its file, so that nothing writes to it any more.
pub(crate) fn is_closed(folder: &Path) -> bool {
    let Ok(file) = File::open(folder.join("db")) else { return false };
    (0..20).any(|_| {
        let free = file.try_lock().is_ok();
        if !free {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        free
    })
}
