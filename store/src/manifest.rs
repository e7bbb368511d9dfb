use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    Digest, Result, StoreError, canonical,
    entry_name::check_entry_name,
    sealed::{check_depth, check_length, parse},
};

/// Element type of a tensor entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Dtype {
    F32,
    F16,
    Bf16,
    I64,
    I32,
    U32,
    U16,
    U8,
}

impl Dtype {
    /// Bytes per element.
    pub const fn size_bytes(self) -> u64 {
        match self {
            Self::I64 => 8,
            Self::F32 | Self::I32 | Self::U32 => 4,
            Self::F16 | Self::Bf16 | Self::U16 => 2,
            Self::U8 => 1,
        }
    }
}

/// One named piece of an artifact: a tensor, or a file when `dtype` is absent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Name within the artifact, such as `model.norm.weight` or `tokenizer.json`. Never a path out of it.
    pub name: String,
    /// Digest of the content.
    pub digest: Digest,
    /// Length of the content.
    pub size_bytes: u64,
    /// Element type, for tensors.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dtype: Option<Dtype>,
    /// Dimensions, outermost first, for tensors.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shape: Vec<u64>,
}

impl Entry {
    /// Whether dtype, shape and size agree.
    pub(crate) fn check_shape(&self) -> Result<(), String> {
        let Some(dtype) = self.dtype else {
            return if self.shape.is_empty() { Ok(()) } else { Err(format!("entry `{}` has a shape but no dtype", self.name)) };
        };
        let expected = self.shape.iter().try_fold(dtype.size_bytes(), |product, &size| product.checked_mul(size));
        if expected == Some(self.size_bytes) {
            return Ok(());
        }
        Err(format!("entry `{}` has {} bytes, which is not {dtype:?} of shape {:?}", self.name, self.size_bytes, self.shape))
    }
}

fn format_error(path: &Path, message: String) -> StoreError {
    StoreError::Format { path: path.to_owned(), message }
}

/// What an artifact is: its type, its entries and a little metadata. Holds nothing about who made it, when or
/// where, so that equal results have equal digests.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of this format.
    pub format: u32,
    /// Artifact type, such as `policy`.
    pub artifact_type: String,
    /// Entries, sorted by name, names unique.
    pub entries: Vec<Entry>,
    /// Model config, digests of tokenizer and template, counts: whatever readers of the artifact must know.
    pub metadata: Value,
}

impl Manifest {
    /// Current version of the format.
    pub const FORMAT: u32 = 1;

    /// The entry called `name`.
    pub fn entry(&self, name: &str) -> Option<&Entry> {
        let at = self.entries.binary_search_by(|entry| entry.name.as_str().cmp(name));
        at.ok().map(|at| &self.entries[at])
    }

    /// The canonical bytes, whose digest names the artifact. `path` is for messages.
    pub(crate) fn encode(&self, path: &Path) -> Result<Vec<u8>> {
        self.check().map_err(|message| format_error(path, message))?;
        check_depth(path, &self.metadata)?;
        let bytes = canonical::to_canonical(self).map_err(|error| format_error(path, error.to_string()))?;
        check_length(path, &bytes)?;
        Ok(bytes)
    }

    /// Reads canonical bytes, whoever wrote them.
    pub(crate) fn decode(path: &Path, bytes: &[u8]) -> Result<Self> {
        let manifest: Self = parse(path, bytes)?;
        manifest.check().map_err(|message| format_error(path, message))?;
        Ok(manifest)
    }

    fn check(&self) -> Result<(), String> {
        if self.format == 0 || self.format > Self::FORMAT {
            return Err(format!("manifest format {} is not known to this rlflow (at most {})", self.format, Self::FORMAT));
        }
        if let Some(pair) = self.entries.windows(2).find(|pair| pair[0].name >= pair[1].name) {
            return Err(format!("entries `{}` and `{}` are not in order", pair[0].name, pair[1].name));
        }
        let mut total = 0_u64;
        for entry in &self.entries {
            check_entry_name(&entry.name).map_err(|error| error.to_string())?;
            entry.check_shape()?;
            total = total.checked_add(entry.size_bytes).ok_or("the entries' sizes overflow")?;
        }
        Ok(())
    }

    /// Sum of the entries' sizes.
    pub fn size_bytes(&self) -> u64 {
        self.entries.iter().map(|entry| entry.size_bytes).sum()
    }
}
