use std::{
    fs,
    io::{BufWriter, Write},
    path::Path,
};

use rlflow_api::{ArtifactBuilder, StageResult, Store, StoreError};
use tempfile::NamedTempFile;

/// A file in the store's scratch folder that grows by appending and then becomes an entry. It disappears when dropped.
pub(crate) struct Scratch {
    writer: BufWriter<NamedTempFile>,
    len: u64,
}

impl Scratch {
    /// An empty file.
    pub fn new(store: &Store) -> StageResult<Self> {
        let folder = store.folder().join("tmp");
        fs::create_dir_all(&folder).map_err(StoreError::io("create folder", &folder))?;
        let file = NamedTempFile::new_in(&folder).map_err(StoreError::io("create a file in", &folder))?;
        Ok(Self { writer: BufWriter::with_capacity(1 << 18, file), len: 0 })
    }

    /// Appends `bytes`.
    pub fn append(&mut self, bytes: &[u8]) -> StageResult<()> {
        self.writer.write_all(bytes).map_err(|source| StoreError::io("write", self.path())(source))?;
        self.len += bytes.len() as u64;
        Ok(())
    }

    /// Bytes so far.
    pub fn len(&self) -> u64 {
        self.len
    }

    fn path(&self) -> &Path {
        self.writer.get_ref().path()
    }

    /// Makes it the entry `name`.
    pub fn finish(mut self, builder: &mut ArtifactBuilder, name: &str) -> StageResult<()> {
        self.writer.flush().map_err(|source| StoreError::io("write", self.path())(source))?;
        builder.put_file(name, self.path())?;
        Ok(())
    }
}
