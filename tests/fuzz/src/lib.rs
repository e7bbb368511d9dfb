//! What the targets share: a folder in memory that lasts as long as the process, files in it, and stage kinds.

pub mod kinds;

use std::{fs, path::PathBuf, sync::LazyLock};

use rlflow_api::{DataFile, Digest};

/// A folder for one process; on Linux it never touches a disk.
pub static FOLDER: LazyLock<tempfile::TempDir> = LazyLock::new(|| {
    let memory = PathBuf::from("/dev/shm");
    let parent = if memory.is_dir() { memory } else { std::env::temp_dir() };
    tempfile::Builder::new().prefix("rlflow-fuzz").tempdir_in(parent).expect("a folder can be made")
});

/// A data file of the folder as planning sees it.
pub fn data_file(name: &str, content: &[u8]) -> DataFile {
    let path = FOLDER.path().join(name);
    fs::write(&path, content).expect("a file can be written");
    DataFile { name: name.to_owned(), path, digest: Digest::of(content), size_bytes: content.len() as u64 }
}
