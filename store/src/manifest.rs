use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::Digest;

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

    /// Sum of the entries' sizes.
    pub fn size_bytes(&self) -> u64 {
        self.entries.iter().map(|entry| entry.size_bytes).sum()
    }
}
