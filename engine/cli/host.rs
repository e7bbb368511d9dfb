use std::fs;

use rlflow_api::{DeviceSpec, GpuTrouble};
use rlflow_engine::{DeviceInfo, Host};
use rlflow_stages::Accelerator;

use crate::processes;

/// This machine, as each process of a run that shares it may use it.
pub fn host() -> Host {
    let share = processes::on_this_host();
    let cpu = DeviceInfo { spec: DeviceSpec::Cpu, name: cpu_name(), memory_bytes: memory_bytes() / share };
    let found = rlflow_stages::accelerators();
    if let Some(line) = without_gpu(&found) {
        tracing::warn!("{line}");
    }
    if found.as_ref().is_ok_and(|found| found.len() > 1)
        && let Err(trouble) = rlflow_stages::nccl()
    {
        tracing::warn!("{trouble}: ranks on several GPUs exchange through host memory");
    }
    let (devices, no_gpu) = devices(cpu, found, share);
    Host { devices, numerics: rlflow_model::numerics(), no_gpu, crew: processes::crew() }
}

/// What is to be said where this program can use GPUs and finds none that it could.
fn without_gpu(found: &Result<Vec<Accelerator>, GpuTrouble>) -> Option<String> {
    let trouble = found.as_ref().err().filter(|trouble| **trouble != GpuTrouble::NotBuilt)?;
    Some(format!("no CUDA device: {trouble}; `device = \"auto\"` is the CPU"))
}

/// The CPU and the GPUs that were found, of whose memory each of `share` processes has its part; or why there is none.
fn devices(cpu: DeviceInfo, found: Result<Vec<Accelerator>, GpuTrouble>, share: u64) -> (Vec<DeviceInfo>, Option<String>) {
    let gpu = |device: Accelerator| DeviceInfo { spec: device.spec, name: device.name, memory_bytes: device.memory_bytes / share };
    match found {
        Ok(found) => (std::iter::once(cpu).chain(found.into_iter().map(gpu)).collect(), None),
        Err(trouble) => (vec![cpu], Some(trouble.to_string())),
    }
}

fn cpu_name() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned())
}

/// What this process may use: the machine's memory, or the control group's limit if that is less.
fn memory_bytes() -> u64 {
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = info.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    let limit = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"];
    let limit = limit.iter().find_map(|path| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok());
    [total.map(|kib| kib * 1024), limit].into_iter().flatten().min().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use rlflow_api::Execution;

    use super::*;

    fn cpu() -> DeviceInfo {
        DeviceInfo { spec: DeviceSpec::Cpu, name: "cpu".into(), memory_bytes: 8 }
    }

    fn placed(found: Result<Vec<Accelerator>, GpuTrouble>, device: &str) -> Result<Vec<DeviceSpec>, String> {
        let (devices, no_gpu) = devices(cpu(), found, 2);
        let host = Host { devices, numerics: "test".into(), no_gpu, crew: None };
        let execution: Execution = serde_json::from_value(serde_json::json!({ "device": device })).unwrap();
        host.place(Some(&execution), |_| None).map(|placement| placement.devices).map_err(|error| error.to_string())
    }

    /// Whatever keeps GPUs from being used, a stage that leaves its device open runs on the CPU, with one line.
    #[test]
    fn without_a_gpu_auto_is_the_cpu() {
        for said in
            ["Unable to dynamically load the \"cuda\" shared library", "DriverError(CUDA_ERROR_UNKNOWN, \"unknown error\")\n 0: trace"]
        {
            let found = || Err(GpuTrouble::of(said));
            let line = without_gpu(&found()).unwrap();
            assert!(line.starts_with("no CUDA device: ") && line.lines().count() == 1, "{line}");
            assert_eq!(placed(found(), "auto"), Ok(vec![DeviceSpec::Cpu]));
            assert_eq!(placed(found(), "cuda:0"), Err(format!("device `cuda:0` is not available here: {}", GpuTrouble::of(said))));
        }
        // Who built it without CUDA knows.
        assert_eq!(without_gpu(&Err(GpuTrouble::NotBuilt)), None);
    }

    #[test]
    fn with_a_gpu_auto_is_that() {
        let gpu = Accelerator { spec: DeviceSpec::Cuda(0), name: "gpu".into(), memory_bytes: 100 };
        let found = || Ok(vec![gpu.clone()]);
        assert_eq!(without_gpu(&found()), None);
        assert_eq!(placed(found(), "auto"), Ok(vec![DeviceSpec::Cuda(0)]));
        assert_eq!(placed(found(), "cuda:1"), Err("device `cuda:1` is not available here".into()));
        assert_eq!(devices(cpu(), found(), 2).0[1].memory_bytes, 50, "two processes share it");
    }
}
