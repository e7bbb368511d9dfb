use std::{io, path::PathBuf};

use crate::Digest;

/// Result of a store operation.
pub type Result<T, E = StoreError> = std::result::Result<T, E>;

/// What can go wrong in the store. Every variant names the operation and the path or digest.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The operating system refused.
    #[error("cannot {operation} {}: {source}", path.display())]
    Io {
        /// What was tried, as a verb: "write", "create folder".
        operation: &'static str,
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Content is not what its name says. Who was to read it set it aside; who only looked left it where it is.
    #[error("{what} {digest} is damaged (its content hashes to {actual}); the next run that needs it makes it again")]
    Damaged {
        /// Blob, manifest or action.
        what: &'static str,
        /// The name.
        digest: Digest,
        /// The content's digest.
        actual: Digest,
    },
    /// Something that a record names is not there.
    #[error("{what} {digest} is missing from the store")]
    Missing {
        /// Blob, manifest or action.
        what: &'static str,
        /// Its name.
        digest: Digest,
    },
    /// A record cannot be read.
    #[error("cannot read {}: {message}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// The store was made by a newer or unknown version.
    #[error("{} holds a store of format `{found}`; this rlflow reads format {expected}", path.display())]
    Version {
        /// The store.
        path: PathBuf,
        /// What VERSION says.
        found: String,
        /// What we can read.
        expected: u32,
    },
    /// An entry name that would leave its artifact.
    #[error("`{name}` is not a valid entry name: {message}")]
    EntryName {
        /// The name.
        name: String,
        /// What is wrong with it.
        message: &'static str,
    },
    /// A file changed while it was being read.
    #[error("{} changed while it was being read; run again when nothing writes to it", path.display())]
    ChangedWhileRead {
        /// The file.
        path: PathBuf,
    },
}

impl StoreError {
    /// For `map_err` on I/O results.
    pub fn io(operation: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { operation, path, source }
    }
}
