use std::fs;

use rlflow_api::{DataFile, Digest};

use super::folder::FOLDER;

/// A data file of the folder as planning sees it.
pub fn data_file(name: &str, content: &[u8]) -> DataFile {
    let path = FOLDER.path().join(name);
    fs::write(&path, content).expect("a file can be written");
    DataFile { name: name.to_owned(), path, digest: Digest::of(content), size_bytes: content.len() as u64 }
}
