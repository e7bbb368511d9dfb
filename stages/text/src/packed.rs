//! Arrays of little-endian numbers in blobs, read in place where alignment allows.

use std::ops::{Deref, Range};

use bytemuck::Pod;
use rlflow_api::{Artifact, ArtifactType, Blob, StageError, StageResult};

/// A number that can stand in an array.
pub(crate) trait Element: Pod {
    /// From its little-endian bytes.
    fn from_le(bytes: &[u8]) -> Self;
}

macro_rules! element {
    ($($number:ty),*) => {
        $(impl Element for $number {
            fn from_le(bytes: &[u8]) -> Self {
                Self::from_le_bytes(bytes.try_into().expect("chunks have the size of the number"))
            }
        })*
    };
}
element!(u32, u64, f32);

/// An array in a blob. Small blobs are not memory-mapped and may lie at any address: those are copied.
pub(crate) struct Array<T> {
    blob: Blob,
    copy: Option<Vec<T>>,
}

impl<T: Element> Array<T> {
    /// The entry `name` of `artifact`.
    pub fn read(artifact: &Artifact, name: &str) -> StageResult<Self> {
        let blob = artifact.read(name)?;
        let size = size_of::<T>();
        if blob.len() % size != 0 {
            return Err(malformed(artifact, format!("`{name}` has {} bytes, not a multiple of {size}", blob.len())));
        }
        Ok(Self::new(blob))
    }

    /// Lets the system read these elements ahead ([`Blob::read_ahead`]).
    pub fn read_ahead(&self, elements: Range<usize>) {
        if self.copy.is_none() {
            self.blob.read_ahead(elements.start * size_of::<T>()..elements.end * size_of::<T>());
        }
    }

    fn new(blob: Blob) -> Self {
        let in_place = cfg!(target_endian = "little") && bytemuck::try_cast_slice::<u8, T>(&blob).is_ok();
        let copy = (!in_place).then(|| blob.chunks_exact(size_of::<T>()).map(T::from_le).collect());
        Self { blob, copy }
    }
}

impl<T: Element> Deref for Array<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match &self.copy {
            Some(copy) => copy,
            None => bytemuck::cast_slice(&self.blob),
        }
    }
}

/// Bounds of rows in an array of `end` elements: one more than there are rows, rising from 0 to `end`.
pub(crate) fn read_bounds(artifact: &Artifact, name: &str, end: usize) -> StageResult<Array<u64>> {
    let bounds = Array::<u64>::read(artifact, name)?;
    let ordered = bounds.first() == Some(&0) && bounds.last() == Some(&(end as u64)) && bounds.windows(2).all(|pair| pair[0] <= pair[1]);
    if ordered { Ok(bounds) } else { Err(malformed(artifact, format!("`{name}` does not rise from 0 to {end}"))) }
}

/// Row numbers, each below `rows`.
pub(crate) fn read_selection(artifact: &Artifact, name: &str, rows: usize) -> StageResult<Array<u64>> {
    let selection = Array::<u64>::read(artifact, name)?;
    match selection.iter().find(|row| **row >= rows as u64) {
        None => Ok(selection),
        Some(row) => Err(malformed(artifact, format!("`{name}` names row {row} of {rows}"))),
    }
}

/// The elements of row `row`.
pub(crate) fn row_range(bounds: &[u64], row: u64) -> Range<usize> {
    bounds[row as usize] as usize..bounds[row as usize + 1] as usize
}

/// Fails unless `artifact` is of the wanted type.
pub(crate) fn expect_type(artifact: &Artifact, wanted: ArtifactType) -> StageResult<()> {
    let found = &artifact.manifest().artifact_type;
    if found == wanted.name() {
        Ok(())
    } else {
        Err(StageError::invalid(format!("artifact {} is of type `{found}`, expected `{wanted}`", artifact.digest().short())))
    }
}

/// An artifact that is not what its type promises.
pub(crate) fn malformed(artifact: &Artifact, message: impl std::fmt::Display) -> StageError {
    let manifest = artifact.manifest();
    StageError::invalid_with_hint(
        format!("artifact {} of type `{}` cannot be used: {message}", artifact.digest().short(), manifest.artifact_type),
        "it was written by another version of rlflow; run the stage that made it again with --force",
    )
}

/// Little-endian bytes of `numbers`.
pub(crate) fn u64_bytes(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrays_read_the_same_at_any_address() {
        let numbers = [1u32, 0xdead_beef, u32::MAX, 7];
        let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        assert_eq!(&*Array::<u32>::new(Blob::from(bytes.clone())), &numbers);
        // A copy is taken exactly where the bytes are not aligned; both ways must agree.
        let copied = Array { blob: Blob::from(Vec::new()), copy: Some(bytes.chunks_exact(4).map(<u32 as Element>::from_le).collect()) };
        assert_eq!(&*copied, &numbers);
        assert!(Array::<u64>::new(Blob::from(Vec::new())).is_empty());
    }
}
