use std::ops::Deref;

/// Verified content of one blob, read-only: memory-mapped when large.
pub struct Blob(Content);

enum Content {
    Owned(Vec<u8>),
    Mapped(memmap2::Mmap),
}

impl Deref for Blob {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.0 {
            Content::Owned(bytes) => bytes,
            Content::Mapped(map) => map,
        }
    }
}

impl From<Vec<u8>> for Blob {
    fn from(bytes: Vec<u8>) -> Self {
        Self(Content::Owned(bytes))
    }
}

impl From<memmap2::Mmap> for Blob {
    fn from(map: memmap2::Mmap) -> Self {
        Self(Content::Mapped(map))
    }
}
