//! The store of rlflow: content-addressed blobs, manifests that name them, actions that
//! say what made what, snapshots of unfinished stages, leases, and an index over all of it.
//!
//! In the order of a result's life:
//! [`Digest`] names content; [`Blob`] is verified content; [`ArtifactBuilder`] collects entries into a
//! [`Manifest`] and publishes an [`Artifact`]; an [`ActionRecord`] binds an action key to output artifacts;
//! [`Lease`] keeps two processes from doing the same work; [`SnapshotSet`] holds what an
//! unfinished stage needs to continue; [`RunLog`] keeps what happened.
//!
//! Files are the truth and the index (sled) only makes lookups fast: it is rebuilt when lost or damaged.
//! The layout and the order of writes are specified in `store/DESIGN.md`.

mod action;
mod action_folder;
mod artifact;
mod blob;
mod canonical;
mod check;
mod collect;
mod damage;
mod digest;
mod durable;
mod entry_name;
mod envelope;
mod error;
mod fault;
mod file_digest;
mod import;
mod index;
mod index_seal;
mod layout;
mod lease;
mod lineage;
mod lookup;
mod manifest;
mod prefix;
mod presence;
mod root;
mod run_log;
mod sealed;
mod settled;
mod snapshot;
mod store;
mod superseded;
mod sweep;
mod tree_hash;
mod usage;

pub use action::{ActionRecord, Provenance};
pub use artifact::{Artifact, ArtifactBuilder};
pub use blob::Blob;
pub use canonical::canonical_json;
pub use check::{FsckReport, Problem};
pub use collect::{GcOptions, GcReport, Removed};
pub use digest::{Digest, Hasher, ParseDigestError};
pub use error::{Result, StoreError};
#[doc(hidden)]
pub use fault::FAULT_POINTS;
pub use file_digest::FileDigest;
pub use lease::{Lease, LeaseHolder, LeaseOutcome};
pub use lineage::{LineageEdge, LineageNode, Maker};
pub use manifest::{Dtype, Entry, Manifest};
pub use root::{Pin, Use};
pub use run_log::RunLog;
pub use settled::SettledNote;
pub use snapshot::{Retain, Snapshot, SnapshotLimit, SnapshotSet};
pub use store::Store;
pub use usage::{StageUsage, Usage};
