use std::fs;

use rlflow_api::DeviceSpec;
use rlflow_engine::{DeviceInfo, Host};

use crate::processes;

/// This machine, as each process of a run that shares it may use it.
pub fn host() -> Host {
    let share = processes::on_this_host();
    let mut devices = vec![DeviceInfo { spec: DeviceSpec::Cpu, name: cpu_name(), memory_bytes: memory_bytes() / share }];
    match rlflow_stages::accelerators() {
        Ok(found) => {
            if found.len() > 1
                && let Err(reason) = rlflow_stages::nccl()
            {
                tracing::warn!("{reason}: ranks on several GPUs exchange through host memory");
            }
            devices.extend(found.into_iter().map(|device| DeviceInfo {
                spec: device.spec,
                name: device.name,
                memory_bytes: device.memory_bytes / share,
            }))
        }
        Err(reason) => tracing::warn!("no CUDA device: {reason}; `device = \"auto\"` is the CPU"),
    }
    Host { devices, numerics: rlflow_model::numerics(), crew: processes::crew() }
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
