use crate::{Result, StoreError};

/// Longest entry name, in bytes.
const MAX_NAME_BYTES: usize = 1024;

/// Checks that an entry name stays within its artifact when it is used as a relative path, on any system.
pub(crate) fn check_entry_name(name: &str) -> Result<()> {
    let message = if name.is_empty() {
        "it is empty"
    } else if name.len() > MAX_NAME_BYTES {
        "it has more than 1024 bytes"
    } else if name.starts_with('/') {
        "it is an absolute path"
    } else if name.contains('\\') {
        "it contains a backslash"
    } else if name.chars().any(char::is_control) {
        "it contains a control character"
    } else if name.as_bytes().get(1) == Some(&b':') && name.as_bytes()[0].is_ascii_alphabetic() {
        "it starts with a drive letter"
    } else if name.split('/').any(|part| part == "..") {
        "it contains `..`"
    } else if name.split('/').any(|part| part.is_empty() || part == ".") {
        "it contains an empty or `.` component"
    } else if name.split('/').any(|part| part.len() > 255) {
        "a component has more than 255 bytes"
    } else {
        return Ok(());
    };
    Err(StoreError::EntryName { name: name.chars().take(200).collect(), message })
}
