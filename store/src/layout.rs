use std::path::{Path, PathBuf};

use crate::Digest;

/// Where things lie in a store. See `store/DESIGN.md`.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    pub root: PathBuf,
}

/// Kinds of content named by a digest, each with a folder of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Family {
    Blob,
    Manifest,
    Action,
}

impl Family {
    pub const ALL: [Self; 3] = [Self::Blob, Self::Manifest, Self::Action];

    pub const fn folder(self) -> &'static str {
        match self {
            Self::Blob => "blobs",
            Self::Manifest => "manifests",
            Self::Action => "actions",
        }
    }

    /// What messages call one of them.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Blob => "blob",
            Self::Manifest => "manifest",
            Self::Action => "action",
        }
    }
}

impl Layout {
    /// Folder of a family: `blobs`, `manifests`, `actions`.
    pub fn family(&self, family: Family) -> PathBuf {
        self.root.join(family.folder())
    }

    /// Folder of those that start with the byte `prefix`.
    pub fn shard(&self, family: Family, prefix: u8) -> PathBuf {
        self.root.join(format!("{}/{prefix:02x}", family.folder()))
    }

    /// File of one.
    pub fn file(&self, family: Family, digest: Digest) -> PathBuf {
        self.root.join(format!("{}/{:02x}/{digest}", family.folder(), digest.as_bytes()[0]))
    }

    pub fn version(&self) -> PathBuf {
        self.root.join("VERSION")
    }

    pub fn temp(&self) -> PathBuf {
        self.root.join("tmp")
    }

    pub fn damaged(&self) -> PathBuf {
        self.root.join("damaged")
    }

    pub fn leases(&self) -> PathBuf {
        self.root.join("leases")
    }

    pub fn runs(&self) -> PathBuf {
        self.root.join("runs")
    }

    pub fn partial(&self, prefix_key: Digest) -> PathBuf {
        self.root.join(format!("partial/{prefix_key}"))
    }

    pub fn partials(&self) -> PathBuf {
        self.root.join("partial")
    }

    pub fn pins(&self) -> PathBuf {
        self.root.join("pins")
    }

    /// Notes that workflows had nothing to do.
    pub fn settled(&self) -> PathBuf {
        self.root.join("settled")
    }

    pub fn uses(&self) -> PathBuf {
        self.root.join("uses")
    }

    /// Held shared while content is made visible, exclusively while it is removed.
    pub fn collect_lock(&self) -> PathBuf {
        self.root.join("collect.lock")
    }
}

/// The digest that a file of a family is named by, if it is named by one.
pub(crate) fn digest_of_name(path: &Path) -> Option<Digest> {
    path.file_name()?.to_str()?.parse().ok()
}
