use burn::tensor::Device;
use rlflow_api::{DeviceChoice, DeviceSpec, Execution, Problem, SnapshotPolicy, StageError, StageResult};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Number format of a model's arithmetic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Single precision throughout.
    #[default]
    Fp32,
}

/// How every trainer runs. But for `precision`, none of these settings is part of a result's identity.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct TrainExecution {
    /// Number format of the arithmetic: `fp32`.
    pub precision: Precision,
    /// Where it runs.
    #[serde(flatten)]
    pub placement: Execution,
    /// Steps between snapshots, from which an interrupted stage continues; without it, about every 10 seconds.
    #[schemars(extend("x-setting" = "execution", "x-unit" = "steps"), range(min = 1))]
    pub snapshot_every: Option<u64>,
    /// Steps between progress reports; without it, several a second.
    #[schemars(extend("x-setting" = "execution", "x-unit" = "steps"), range(min = 1))]
    pub log_every: Option<u64>,
    /// Keeps only each block's input and computes the block again when its gradient is due: less memory, a third more
    /// work, the same bits.
    #[schemars(extend("x-setting" = "execution"))]
    pub gradient_checkpointing: bool,
}

impl TrainExecution {
    /// When to write snapshots.
    pub fn snapshot_policy(&self) -> SnapshotPolicy {
        match self.snapshot_every {
            Some(steps) => SnapshotPolicy { every_steps: Some(steps), every: None },
            None => SnapshotPolicy::default(),
        }
    }
}

/// Placements that this version cannot run, found before anything does.
pub fn check_placement(execution: &Execution) -> Vec<Problem> {
    let ranks = match &execution.device {
        DeviceChoice::One(_) => 1,
        DeviceChoice::List(devices) => devices.len(),
        DeviceChoice::CpuRanks { cpu } => *cpu,
    };
    if ranks <= 1 {
        return Vec::new();
    }
    let message = format!("{ranks} ranks were asked for; this version runs a stage on one");
    vec![Problem::new("too_many_ranks", "device", message).hint("name a single device: the result is the same")]
}

/// The Burn device of a placement's first rank.
///
/// # Errors
/// If this build has no such device.
pub fn burn_device(devices: &[DeviceSpec]) -> StageResult<Device> {
    if devices.len() > 1 {
        return Err(StageError::invalid_with_hint(
            format!("{} ranks were asked for; this version runs a stage on one", devices.len()),
            "set `device` to a single device",
        ));
    }
    match devices.first() {
        None | Some(DeviceSpec::Cpu) => Ok(Device::flex()),
        #[cfg(feature = "cuda")]
        Some(DeviceSpec::Cuda(index)) => Ok(Device::cuda(*index)),
        #[cfg(not(feature = "cuda"))]
        Some(device) => Err(StageError::invalid_with_hint(
            format!("{device} was asked for, and this rlflow was built without CUDA"),
            "build with `--features cuda`, or set `device = \"cpu\"`",
        )),
    }
}
