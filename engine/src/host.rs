use std::sync::Arc;

use rlflow_api::{DeviceChoice, DeviceSpec, Execution, Placement, ZeroSetting};

use crate::Crew;

/// What this machine can run on. Given by the binary, since only the stages know their backends.
#[derive(Debug, Clone, PartialEq)]
pub struct Host {
    /// Devices, the CPU among them.
    pub devices: Vec<DeviceInfo>,
    /// Numerics profile: SIMD level, kernel version, math library. Recorded with results, never in a key.
    pub numerics: String,
    /// Why it has no GPU, where that is known.
    pub no_gpu: Option<String>,
    /// The processes that run stages together, if there are several. Each has these devices.
    pub crew: Option<Arc<Crew>>,
}

/// One device of this machine.
#[derive(Debug, Clone, PartialEq)]
pub struct DeviceInfo {
    /// How workflows name it.
    pub spec: DeviceSpec,
    /// How its maker names it.
    pub name: String,
    /// Its memory.
    pub memory_bytes: u64,
}

/// A `device` setting that this machine cannot serve.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct PlacementError {
    /// Dotted path of the setting that says so.
    pub setting: String,
    /// What is wrong.
    pub message: String,
    /// What to do.
    pub hint: String,
}

impl Host {
    /// The machine as a workflow declares it: `declared` devices stand in for those of the same name.
    pub fn with_devices(&self, declared: &[DeviceInfo]) -> Self {
        let mut devices = self.devices.clone();
        for device in declared {
            match devices.iter_mut().find(|known| known.spec == device.spec) {
                Some(known) => known.memory_bytes = device.memory_bytes,
                None => devices.push(device.clone()),
            }
        }
        Self { devices, ..self.clone() }
    }

    /// How many processes run a stage on ranks together.
    pub fn processes(&self) -> usize {
        self.crew.as_ref().map_or(1, |crew| crew.count())
    }

    /// The device called `spec`, if the machine has it.
    pub fn device(&self, spec: DeviceSpec) -> Option<&DeviceInfo> {
        self.devices.iter().find(|device| device.spec == spec)
    }

    /// Where a stage with these settings runs. `peak_bytes` says what it needs per rank in a place, for `zero = "auto"`.
    pub fn place(
        &self,
        execution: Option<&Execution>,
        peak_bytes: impl Fn(&Placement) -> Option<u64>,
    ) -> Result<Placement, PlacementError> {
        let Some(execution) = execution else { return Ok(Placement::default()) };
        let devices = self.devices_of(&execution.device)?;
        let placement = Placement { devices, processes: self.processes(), zero: 0, offload: execution.offload };
        let zero = match execution.zero {
            ZeroSetting::Level(level) => level,
            // With one rank nothing is sharded, so a higher level cannot help.
            ZeroSetting::Auto(_) if placement.ranks() == 1 => 0,
            ZeroSetting::Auto(_) => {
                // Ranks on one device share its memory.
                let devices = &placement.devices;
                let ranks_on = |spec: &DeviceSpec| devices.iter().filter(|device| *device == spec).count() as u64;
                let of_rank = |spec: &DeviceSpec| Some(self.device(*spec)?.memory_bytes / ranks_on(spec));
                let memory = devices.iter().filter_map(of_rank).min();
                let fits = |zero: u8| match (memory, peak_bytes(&Placement { zero, ..placement.clone() })) {
                    (Some(memory), Some(peak)) => peak <= memory,
                    _ => true,
                };
                (0..3).find(|level| fits(*level)).unwrap_or(3)
            }
        };
        Ok(Placement { zero, ..placement })
    }

    fn devices_of(&self, choice: &DeviceChoice) -> Result<Vec<DeviceSpec>, PlacementError> {
        match choice {
            DeviceChoice::One(name) if name == "auto" => {
                let cuda = self.devices.iter().map(|device| device.spec).find(|spec| *spec != DeviceSpec::Cpu);
                Ok(vec![cuda.unwrap_or(DeviceSpec::Cpu)])
            }
            DeviceChoice::One(name) => Ok(vec![self.named(name, || "device".into())?]),
            DeviceChoice::List(names) if names.is_empty() => {
                let hint = "name at least one device, or use \"auto\"".into();
                Err(PlacementError { setting: "device".into(), message: "`device` is an empty list".into(), hint })
            }
            DeviceChoice::List(names) => names.iter().enumerate().map(|(at, name)| self.named(name, || format!("device[{at}]"))).collect(),
            DeviceChoice::CudaRanks { cuda } => {
                let name = |index: usize| DeviceSpec::Cuda(index).to_string();
                (0..(*cuda).max(1)).map(|index| self.named(&name(index), || "device".into())).collect()
            }
            DeviceChoice::CpuRanks { cpu } => Ok(vec![DeviceSpec::Cpu; (*cpu).max(1)]),
        }
    }

    /// Why it has no GPU, to be said behind that it has not.
    pub(crate) fn why_no_gpu(&self) -> String {
        self.no_gpu.as_ref().map(|why| format!(": {why}")).unwrap_or_default()
    }

    fn named(&self, name: &str, setting: impl FnOnce() -> String) -> Result<DeviceSpec, PlacementError> {
        let message = match name.parse::<DeviceSpec>() {
            Ok(spec) if self.device(spec).is_some() => return Ok(spec),
            Ok(_) => format!("device `{name}` is not available here{}", self.why_no_gpu()),
            Err(message) => message,
        };
        let known = self.devices.iter().map(|device| device.spec.to_string()).collect::<Vec<_>>().join(", ");
        let hint = format!("this machine has: {known} (see `rlflow devices`); \"auto\" picks one");
        Err(PlacementError { setting: setting(), message, hint })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn host(cuda: usize) -> Host {
        let mut devices = vec![DeviceInfo { spec: DeviceSpec::Cpu, name: "cpu".into(), memory_bytes: 100 }];
        devices.extend((0..cuda).map(|at| DeviceInfo { spec: DeviceSpec::Cuda(at), name: "gpu".into(), memory_bytes: 40 }));
        Host { devices, numerics: "test".into(), no_gpu: None, crew: None }
    }

    fn place(
        host: &Host,
        settings: serde_json::Value,
        peak: impl Fn(&Placement) -> Option<u64>,
    ) -> Result<(Vec<String>, u8), PlacementError> {
        let execution: Execution = serde_json::from_value(settings).unwrap();
        let placement = host.place(Some(&execution), peak)?;
        Ok((placement.devices.iter().map(ToString::to_string).collect(), placement.zero))
    }

    #[test]
    fn devices_resolve_against_the_machine() {
        let devices = |host: &Host, choice| place(host, json!({ "device": choice }), |_| None).map(|(devices, _)| devices.join(" "));
        assert_eq!(devices(&host(0), json!("auto")).unwrap(), "cpu");
        assert_eq!(devices(&host(2), json!("auto")).unwrap(), "cuda:0");
        assert_eq!(devices(&host(2), json!(["cuda:1", "cuda"])).unwrap(), "cuda:1 cuda:0");
        assert_eq!(devices(&host(0), json!({ "cpu": 3 })).unwrap(), "cpu cpu cpu");
        assert_eq!(devices(&host(0), json!("cuda:0")).unwrap_err().message, "device `cuda:0` is not available here");
        assert_eq!(
            devices(&host(0), json!("tpu")).unwrap_err().message,
            "`tpu` is not a device: expected `auto`, `cpu`, `cuda` or `cuda:N`"
        );
        assert!(devices(&host(0), json!([])).is_err());
    }

    #[test]
    fn a_gpu_that_is_asked_for_and_missing_is_said_with_the_reason() {
        let without = Host { no_gpu: Some("the NVIDIA driver (libcuda) is not installed".into()), ..host(0) };
        let place = |choice| place(&without, json!({ "device": choice }), |_| None).map(|(devices, _)| devices);
        let expected = "device `cuda:1` is not available here: the NVIDIA driver (libcuda) is not installed";
        assert_eq!(place(json!(["cpu", "cuda:1"])).unwrap_err().message, expected);
        assert_eq!(place(json!("auto")).unwrap(), ["cpu"]);
    }

    #[test]
    fn auto_zero_is_the_lowest_level_that_fits() {
        let peak = |placed: &Placement| Some([90, 60, 40, 20][usize::from(placed.zero)]);
        let zero = |device| place(&host(2), json!({ "device": device, "zero": "auto" }), peak).unwrap().1;
        assert_eq!(zero(json!(["cuda:0", "cuda:1"])), 2);
        assert_eq!(zero(json!({ "cpu": 2 })), 2, "two ranks share the 100 bytes of one CPU");
        assert_eq!(zero(json!("cuda:0")), 0);
    }
}
