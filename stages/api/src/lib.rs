//! The contract between rlflow's engine and its stage kinds.
//!
//! A kind is a type that implements [`StageKind`]: its ports, its config (whose JSON Schema says for every
//! setting whether it is part of the result's identity), a pure `describe` that planning calls before anything
//! has run, and `run`. [`Kind`] is the same without the type parameter, as the engine uses it.
//!
//! In data order: [`ArtifactType`] and [`ArtifactMeta`] are what flows along edges, [`ModelConfig`] the shape of a
//! network, [`setting`] how settings are marked, [`Placement`] where a stage runs, [`RunContext`] what `run`
//! may touch, [`StageEvent`] what it reports, [`StageError`] how it fails, [`GpuTrouble`] why
//! a GPU cannot be used. Where several processes run a stage, [`Processes`] is what each
//! of them knows of the others, [`Wire`] what carries their messages, and [`Work`] what the leader sends them to do. [`panics`] makes
//! errors of panics.

mod artifact;
mod context;
mod counter_rng;
mod error;
mod event;
mod gpu_trouble;
mod kind;
mod model;
pub mod panics;
mod placement;
mod portable;
mod processes;
mod row_tokens;
pub mod setting;
mod snapshot;
#[doc(hidden)]
pub mod testing;
mod wire;
mod work;

pub use artifact::{ArtifactMeta, ArtifactType, Origin};
pub use context::{CancelToken, DataFile, Input, MemoStore, RunContext};
pub use counter_rng::CounterRng;
pub use error::{StageError, StageResult};
pub use event::{Reporter, Sample, StageEvent, Table};
pub use gpu_trouble::GpuTrouble;
pub use kind::{
    Arity, DataSource, DescribeContext, Description, ErasedStage, InputMeta, InputPort, Kind, Needs, OutputPort, Problem, StageKind,
    data_format,
};
pub use model::{Architecture, BlockStyle, ModelConfig, Positions, RopeScaling};
pub use placement::{DeviceChoice, DeviceSpec, Execution, Offload, Placement, ZeroLevel, ZeroSetting};
pub use portable::Portable;
pub use processes::{Line, Processes, ended};
pub use rlflow_store::{
    Artifact, ArtifactBuilder, Blob, Digest, Dtype, Entry, Manifest, Retain, Snapshot, SnapshotLimit, Store, StoreError,
};
pub use row_tokens::{RowLengths, RowTokens};
pub use snapshot::{SnapshotPolicy, Snapshots, extends};
pub use wire::{Channel, Message, Peer, Wire};
pub use work::{Order, PlacedAt, Work, WorkInput};
