//! Small JSON files that carry the digest of their own content, for records that are not named by it (actions, snapshots).
//! First line: `rlflow-<kind> 1 <digest>`; then the JSON, to the end.

use std::{fs::File, io::Read, path::Path};

use serde_json::Value;

use crate::{Digest, Result, StoreError};

/// Longest JSON record (manifest, action, snapshot) that is written or read. Bounds what a hostile file can make us allocate.
pub(crate) const MAX_RECORD_BYTES: usize = 8 << 20;

/// What a sealed file turned out to be.
pub(crate) enum Unsealed<'a> {
    Intact(&'a [u8]),
    /// The seal does not fit; the digest is the content's.
    Broken(Digest),
}

pub(crate) fn seal(kind: &str, body: &[u8]) -> Vec<u8> {
    let mut bytes = format!("rlflow-{kind} 1 {}\n", Digest::of(body)).into_bytes();
    bytes.extend_from_slice(body);
    bytes
}

pub(crate) fn unseal<'a>(kind: &str, bytes: &'a [u8]) -> Unsealed<'a> {
    let intact = || {
        let at = bytes.iter().take(120).position(|&byte| byte == b'\n')?;
        let head = std::str::from_utf8(&bytes[..at]).ok()?;
        let digest: Digest = head.strip_prefix("rlflow-")?.strip_prefix(kind)?.strip_prefix(" 1 ")?.parse().ok()?;
        let body = &bytes[at + 1..];
        (Digest::of(body) == digest).then_some(body)
    };
    intact().map_or_else(|| Unsealed::Broken(Digest::of(bytes)), Unsealed::Intact)
}

/// Content of a record file, `None` if absent. Never reads more than the limit.
pub(crate) fn read_record(path: &Path) -> Result<Option<Vec<u8>>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if is_absent(&error) => return Ok(None),
        Err(error) => return Err(StoreError::io("open", path)(error)),
    };
    let mut bytes = Vec::with_capacity(4096);
    file.take(MAX_RECORD_BYTES as u64 + 200).read_to_end(&mut bytes).map_err(StoreError::io("read", path))?;
    Ok(Some(bytes))
}

/// Whether an error says that nothing has this name.
pub(crate) fn is_absent(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory)
}

/// Parses JSON of a bounded record. Depth is bounded by serde_json.
pub(crate) fn parse<'a, T: serde::Deserialize<'a>>(path: &Path, body: &'a [u8]) -> Result<T> {
    if body.len() > MAX_RECORD_BYTES {
        return Err(too_long(path, body.len()));
    }
    serde_json::from_slice(body).map_err(|error| StoreError::Format { path: path.to_owned(), message: error.to_string() })
}

/// Checks a record's size before it is written.
pub(crate) fn check_length(path: &Path, body: &[u8]) -> Result<()> {
    if body.len() > MAX_RECORD_BYTES { Err(too_long(path, body.len())) } else { Ok(()) }
}

fn too_long(path: &Path, length: usize) -> StoreError {
    let message = format!("the record has {length} bytes; at most {MAX_RECORD_BYTES} are allowed");
    StoreError::Format { path: path.to_owned(), message }
}

/// Depth of a JSON value; what is written must be readable again.
pub(crate) fn check_depth(path: &Path, value: &Value) -> Result<()> {
    /// serde_json reads 127 levels; records add a few of their own.
    const MAX_DEPTH: usize = 100;
    fn fits(value: &Value, left: usize) -> bool {
        match value {
            Value::Array(items) => left > 0 && items.iter().all(|item| fits(item, left - 1)),
            Value::Object(map) => left > 0 && map.values().all(|item| fits(item, left - 1)),
            _ => true,
        }
    }
    if fits(value, MAX_DEPTH) {
        return Ok(());
    }
    Err(StoreError::Format { path: path.to_owned(), message: format!("values are nested more than {MAX_DEPTH} deep") })
}
