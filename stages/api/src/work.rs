use std::path::PathBuf;

use rlflow_store::Digest;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{DataFile, DeviceSpec, Input, Offload, Placement, StageError, StageResult, Store, ZeroLevel};

/// What the leader tells the other processes between stages.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// Run a stage with the others.
    Run(Box<Work>),
    /// There is nothing more to do.
    Leave,
}

/// A stage that all processes run: all that they need to know of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Work {
    /// Counts the stages that they run together, from 1.
    pub attempt: u32,
    /// Name of the stage, for messages only.
    pub stage: String,
    /// Its kind.
    pub kind: String,
    /// All its settings.
    pub settings: Value,
    /// Its seed.
    pub seed: u64,
    /// Where each process runs it.
    pub placement: PlacedAt,
    /// The store's folder, which all processes see.
    pub store: PathBuf,
    /// What its snapshots are stored under.
    pub prefix_key: Digest,
    /// Its inputs, in order.
    pub inputs: Vec<WorkInput>,
    /// Its data files.
    pub files: Vec<Vec<DataFile>>,
}

/// An input of [`Work`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WorkInput {
    /// The port that takes it.
    pub port: String,
    /// See [`Input::stage`].
    pub stage: String,
    /// See [`Input::port`].
    pub output: Option<String>,
    /// See [`Input::kind`].
    pub kind: String,
    /// Digest of the artifact.
    pub digest: Digest,
    /// See [`Input::settings`].
    pub settings: Value,
    /// See [`Input::placement`].
    pub placement: PlacedAt,
}

impl WorkInput {
    /// Of the input on `port`.
    pub fn new(port: &str, input: &Input) -> Self {
        Self {
            port: port.to_owned(),
            stage: input.stage.clone(),
            output: input.port.clone(),
            kind: input.kind.clone(),
            digest: input.artifact.digest(),
            settings: input.settings.clone(),
            placement: PlacedAt::from(&input.placement),
        }
    }

    /// The input, opened.
    ///
    /// # Errors
    /// If the store does not have it.
    pub fn open(self, store: &Store) -> StageResult<Input> {
        let artifact = store.open_artifact(self.digest)?.ok_or_else(|| {
            StageError::invalid_with_hint(
                format!("{} has no artifact {}", store.folder().display(), self.digest.short()),
                "all processes must see one store: is its folder on a file system that they share?",
            )
        })?;
        let placement = self.placement.placement()?;
        Ok(Input { stage: self.stage, port: self.output, kind: self.kind, artifact, settings: self.settings, placement })
    }
}

/// A [`Placement`] as it is sent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlacedAt {
    devices: Vec<String>,
    processes: usize,
    zero: ZeroLevel,
    offload: Offload,
}

impl From<&Placement> for PlacedAt {
    fn from(placement: &Placement) -> Self {
        let devices = placement.devices.iter().map(ToString::to_string).collect();
        Self { devices, processes: placement.processes, zero: placement.zero, offload: placement.offload }
    }
}

impl PlacedAt {
    /// The placement.
    ///
    /// # Errors
    /// If a device is none.
    pub fn placement(&self) -> StageResult<Placement> {
        let devices = self.devices.iter().map(|device| device.parse::<DeviceSpec>().map_err(StageError::invalid));
        Ok(Placement { devices: devices.collect::<StageResult<_>>()?, processes: self.processes, zero: self.zero, offload: self.offload })
    }
}
