use std::{
    fs::{self, File},
    io::{self, Read},
    ops::Deref,
    path::{Path, PathBuf},
};

use crate::{
    Digest, Result, Store, StoreError,
    digest::hash_parallel,
    durable::{TempFile, create_folder},
    layout::Family,
    sealed::is_absent,
};

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

/// From here on content is mapped rather than copied.
const MAP_BYTES: u64 = 256 << 10;

/// Content of a file that nobody changes in place. `None` if absent.
pub(crate) fn load(path: &Path) -> Result<Option<Blob>> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if is_absent(&error) => return Ok(None),
        Err(error) => return Err(StoreError::io("open", path)(error)),
    };
    let length = file.metadata().map_err(StoreError::io("examine", path))?.len();
    if length >= MAP_BYTES {
        // SAFETY: stored content is never written again, only unlinked, which leaves the mapping intact.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(StoreError::io("map", path))?;
        return Ok(Some(map.into()));
    }
    let mut bytes = Vec::with_capacity(length as usize);
    file.read_to_end(&mut bytes).map_err(StoreError::io("read", path))?;
    Ok(Some(bytes.into()))
}

impl Store {
    /// Reads content named by its digest and verifies it; what does not fit its name is set aside.
    pub(crate) fn load_verified(&self, family: Family, digest: Digest) -> Result<Option<Blob>> {
        match self.examine(family, digest) {
            Ok(found) => Ok(found.map(|(_, content)| content)),
            Err(error) => {
                if matches!(error, StoreError::Damaged { .. }) {
                    self.set_aside(family, digest);
                }
                Err(error)
            }
        }
    }

    /// Reads content named by its digest and verifies it. Touches nothing.
    pub(crate) fn examine(&self, family: Family, digest: Digest) -> Result<Option<(PathBuf, Blob)>> {
        let path = self.layout().file(family, digest);
        let Some(content) = load(&path)? else { return Ok(None) };
        let actual = hash_parallel(&content);
        if actual == digest { Ok(Some((path, content))) } else { Err(StoreError::Damaged { what: family.name(), digest, actual }) }
    }

    /// Moves a damaged file to `damaged/`, so that it counts as absent. Best effort: a read-only store keeps it.
    pub(crate) fn set_aside(&self, family: Family, digest: Digest) {
        let path = self.layout().file(family, digest);
        let name = format!("{}-{digest}", family.name());
        self.presence().forget(digest);
        if let Err(error) = self.move_to_damaged(&path, &name) {
            tracing::warn!(%error, "damaged {} {} could not be set aside", family.name(), digest.short());
        }
    }

    pub(crate) fn move_to_damaged(&self, path: &Path, name: &str) -> Result<()> {
        let folder = self.layout().damaged();
        create_folder(&folder)?;
        // An earlier piece of evidence is kept: take the first free number.
        let target = (0..u32::MAX).map(|n| folder.join(format!("{name}.{n}"))).find(|target| !target.exists());
        let target = target.unwrap_or_else(|| folder.join(name));
        match fs::rename(path, &target) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(StoreError::io("set aside", path)(error)),
            // Another process was faster.
            _ => Ok(()),
        }
    }

    /// Whether a blob of this length is there. A shorter one is what a power cut may leave.
    pub(crate) fn has_blob(&self, digest: Digest, size_bytes: u64) -> bool {
        let path = self.layout().file(Family::Blob, digest);
        fs::metadata(path).is_ok_and(|metadata| metadata.len() == size_bytes)
    }

    /// A second name for a blob that is there, if the file system can make one.
    pub(crate) fn hold_blob(&self, digest: Digest) -> io::Result<TempFile> {
        TempFile::link(self.layout(), &self.layout().file(Family::Blob, digest))
    }
}
