use std::{fmt, str::FromStr};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// One device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DeviceSpec {
    /// The host's processor.
    Cpu,
    /// A CUDA device by index.
    Cuda(usize),
}

impl fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

impl FromStr for DeviceSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "cpu" => Ok(Self::Cpu),
            None if text == "cuda" => Ok(Self::Cuda(0)),
            Some(("cuda", index)) => {
                index.parse().map(Self::Cuda).map_err(|_| format!("`{text}` is not a device: expected `cuda:` and a number"))
            }
            _ => Err(format!("`{text}` is not a device: expected `auto`, `cpu`, `cuda` or `cuda:N`")),
        }
    }
}

/// The `device` setting: `"auto"`, `"cpu"`, `"cuda:0"`, a list of devices (one rank each), `{ cuda = 8 }` (a rank on each of
/// eight GPUs) or `{ cpu = 4 }` (ranks on the CPU).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum DeviceChoice {
    /// `auto`, `cpu`, `cuda` or `cuda:N`.
    One(String),
    /// One rank per device.
    List(Vec<String>),
    /// Several ranks on as many GPUs.
    CudaRanks {
        /// Number of ranks, on `cuda:0` and those after it.
        #[schemars(range(min = 1, max = 1024))]
        cuda: usize,
    },
    /// Several ranks on the CPU.
    CpuRanks {
        /// Number of ranks.
        #[schemars(range(min = 1, max = 64))]
        cpu: usize,
    },
}

impl Default for DeviceChoice {
    fn default() -> Self {
        Self::One("auto".into())
    }
}

/// ZeRO stage (arXiv:1910.02054): 1 shards optimizer state over ranks, 2 gradients too, 3 parameters too.
pub type ZeroLevel = u8;

/// The `zero` setting: 0 to 3, or `"auto"`, the lowest level that fits.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum ZeroSetting {
    /// A level.
    Level(#[schemars(range(min = 0, max = 3))] ZeroLevel),
    /// The word `auto`.
    Auto(AutoWord),
}

/// The word `auto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum AutoWord {
    /// Chosen when planning.
    Auto,
}

impl Default for ZeroSetting {
    fn default() -> Self {
        Self::Level(0)
    }
}

/// The `offload` setting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Offload {
    /// Everything stays on the device.
    #[default]
    None,
    /// Optimizer state, or a frozen model, lives in host memory.
    Cpu,
}

/// Execution settings shared by every stage that computes on devices. Put into a config with `#[serde(flatten)]`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Execution {
    /// Where the stage runs: `"auto"`, `"cpu"`, `"cuda"`, `"cuda:0"`, a list of devices, `{ cuda = 8 }` for a rank on each of eight GPUs, or `{ cpu = 4 }` for four ranks on the CPU.
    #[schemars(extend("x-setting" = "execution"))]
    pub device: DeviceChoice,
    /// ZeRO level: 0, 1, 2, 3, or `"auto"` for the lowest that fits. On one rank there is nothing to shard and all are the same.
    #[schemars(extend("x-setting" = "execution"))]
    pub zero: ZeroSetting,
    /// `"cpu"` keeps optimizer state, or a frozen model, in host memory; on the CPU it is there anyway.
    #[schemars(extend("x-setting" = "execution"))]
    pub offload: Offload,
}

/// Where a stage runs, resolved by the scheduler.
#[derive(Debug, Clone, PartialEq)]
pub struct Placement {
    /// One device per rank of a process.
    pub devices: Vec<DeviceSpec>,
    /// Processes that each have these devices.
    pub processes: usize,
    /// ZeRO level.
    pub zero: ZeroLevel,
    /// Offload.
    pub offload: Offload,
}

impl Default for Placement {
    fn default() -> Self {
        Self { devices: vec![DeviceSpec::Cpu], processes: 1, zero: 0, offload: Offload::None }
    }
}

impl Placement {
    /// Ranks of all processes.
    pub fn ranks(&self) -> usize {
        self.devices.len() * self.processes
    }
}
