use std::time::Duration;

use burn::tensor::Device;
#[cfg(not(feature = "cuda"))]
use rlflow_api::GpuTrouble;
use rlflow_api::{DeviceSpec, Execution, SnapshotLimit, SnapshotPolicy, StageResult};
use rlflow_kernels::matmul::Arithmetic;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::devices;

/// Number format of a model's arithmetic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Single precision throughout.
    #[default]
    Fp32,
    /// Products of numbers rounded to bfloat16; weights, sums, norms, logits, losses and the optimizer stay single.
    Bf16,
}

impl Precision {
    /// How a decoder computes.
    pub fn arithmetic(self) -> Arithmetic {
        match self {
            Self::Fp32 => Arithmetic::F32,
            Self::Bf16 => Arithmetic::Bf16,
        }
    }
}

/// How every trainer runs. But for `precision`, none of these settings is part of a result's identity.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct TrainExecution {
    /// Number format of the arithmetic: `fp32`, or `bf16` with fp32 master weights.
    pub precision: Precision,
    /// Where it runs.
    #[serde(flatten)]
    pub placement: Execution,
    /// When and what to keep for an interrupted stage to continue from.
    #[serde(flatten)]
    pub snapshots: SnapshotSettings,
    /// Steps between progress reports; without it, several a second.
    #[schemars(extend("x-setting" = "execution", "x-unit" = "steps"), range(min = 1))]
    pub log_every: Option<u64>,
    /// Keeps only each block's input and computes the block again when its gradient is due: less memory, a third more
    /// work, the same bits.
    #[schemars(extend("x-setting" = "execution"))]
    pub gradient_checkpointing: bool,
}

/// Snapshots of a stage that trains. All of it is execution.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct SnapshotSettings {
    /// Steps between snapshots, from which an interrupted stage continues; without it and `snapshot_minutes`, about every
    /// 10 seconds, or more rarely where writing would take more than a twentieth of the time.
    #[schemars(extend("x-setting" = "execution", "x-unit" = "steps"), range(min = 1))]
    pub snapshot_every: Option<u64>,
    /// Minutes between snapshots, beside `snapshot_every` or instead of it.
    #[schemars(extend("x-setting" = "execution", "x-unit" = "minutes", "exclusiveMinimum" = 0.0), range(max = 100_000.0))]
    pub snapshot_minutes: Option<f64>,
    /// How many of the newest snapshots are kept while the stage is unfinished.
    #[schemars(extend("x-setting" = "execution"), range(min = 1))]
    pub snapshot_keep: usize,
    /// What they may take together; the newest is kept even if it takes more. Without it, no limit.
    #[schemars(extend("x-setting" = "execution", "x-unit" = "bytes"))]
    pub snapshot_max_bytes: Option<u64>,
}

impl Default for SnapshotSettings {
    fn default() -> Self {
        Self { snapshot_every: None, snapshot_minutes: None, snapshot_keep: SnapshotLimit::default().newest, snapshot_max_bytes: None }
    }
}

impl SnapshotSettings {
    /// When to write snapshots, and what of them to keep.
    pub fn policy(&self) -> SnapshotPolicy {
        let limit = SnapshotLimit { newest: self.snapshot_keep, bytes: self.snapshot_max_bytes.unwrap_or(u64::MAX) };
        if (self.snapshot_every, self.snapshot_minutes) == (None, None) {
            return SnapshotPolicy { limit, ..SnapshotPolicy::default() };
        }
        let every = self.snapshot_minutes.map(|minutes| Duration::from_secs_f64(60.0 * minutes));
        SnapshotPolicy { every_steps: self.snapshot_every, every, limit }
    }
}

/// A Burn device.
///
/// # Errors
/// If this build or machine has no such device.
pub fn burn_device(device: DeviceSpec) -> StageResult<Device> {
    match device {
        DeviceSpec::Cpu => Ok(Device::flex()),
        #[cfg(feature = "cuda")]
        DeviceSpec::Cuda(index) => devices::check(device, devices::accelerators()).map(|()| Device::cuda(index)),
        #[cfg(not(feature = "cuda"))]
        device => Err(devices::unusable(device, &GpuTrouble::NotBuilt)),
    }
}

#[cfg(test)]
mod tests {
    use rlflow_api::{Digest, Retain, Snapshots, Store};
    use serde_json::json;

    use super::*;

    #[test]
    fn snapshots_are_written_and_kept_as_the_settings_say() {
        let policy = |change: &dyn Fn(&mut SnapshotSettings)| {
            let mut settings = SnapshotSettings::default();
            change(&mut settings);
            settings.policy()
        };
        // Nothing said: ten seconds of work are lost at most.
        let usual = policy(&|_| ());
        let seconds = Duration::from_secs;
        assert_eq!((usual.every_steps, usual.every, usual.limit.newest, usual.limit.bytes), (None, Some(seconds(10)), 2, u64::MAX));
        let by_steps = policy(&|settings| settings.snapshot_every = Some(4));
        assert_eq!((by_steps.every_steps, by_steps.every), (Some(4), None));
        let all = policy(&|settings| {
            *settings = SnapshotSettings {
                snapshot_every: Some(100),
                snapshot_minutes: Some(0.5),
                snapshot_keep: 3,
                snapshot_max_bytes: Some(1000),
            };
        });
        assert_eq!((all.every_steps, all.every), (Some(100), Some(seconds(30))));
        assert_eq!(all.limit, SnapshotLimit { newest: 3, bytes: 1000 });

        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        let snapshots = Snapshots::new(store.snapshots(Digest::of(b"prefix")), Vec::new());
        let due = |policy: SnapshotPolicy| {
            snapshots.set_policy(policy);
            (1..=9).filter(|step| snapshots.is_due(*step)).collect::<Vec<u64>>()
        };
        assert_eq!(due(by_steps), [4, 5, 6, 7, 8, 9]);
        assert_eq!(due(all), [] as [u64; 0]);
        assert_eq!(due(policy(&|settings| settings.snapshot_minutes = Some(0.0))).len(), 9);
        snapshots.save(4, Retain::Latest, json!({}), snapshots.builder()).unwrap();
        assert_eq!(due(by_steps), [8, 9]);
    }
}
