//! CUDA devices of this machine.

use rlflow_api::{DeviceSpec, GpuTrouble};

/// A device that stages can run on beside the CPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accelerator {
    /// How workflows name it.
    pub spec: DeviceSpec,
    /// How its maker names it.
    pub name: String,
    /// Its memory.
    pub memory_bytes: u64,
}

/// What this build finds, in the driver's order.
///
/// # Errors
/// [`GpuTrouble::NotBuilt`].
#[cfg(not(feature = "cuda"))]
pub fn accelerators() -> Result<Vec<Accelerator>, GpuTrouble> {
    Err(GpuTrouble::NotBuilt)
}

/// What this build finds, in the driver's order: one at least.
///
/// # Errors
/// Why no device can be used: no driver, no NVRTC to compile kernels with, no GPU, or what the driver says.
#[cfg(feature = "cuda")]
pub fn accelerators() -> Result<Vec<Accelerator>, GpuTrouble> {
    use cudarc::driver::{
        DriverError,
        result::{device, init},
    };

    let told = |error: DriverError| GpuTrouble::of(&error.to_string());
    let examine = |index| -> Result<Accelerator, DriverError> {
        let found = device::get(index)?;
        // SAFETY: `found` comes from `get`.
        let memory_bytes = unsafe { device::total_mem(found) }? as u64;
        Ok(Accelerator { spec: DeviceSpec::Cuda(index as usize), name: device::get_name(found)?, memory_bytes })
    };
    GpuTrouble::guard(|| {
        // Asked first, since a panic is said on stderr before it is caught.
        // SAFETY: these two only try to open a library.
        if !unsafe { cudarc::driver::sys::is_culib_present() } {
            return Err(GpuTrouble::NoDriver);
        }
        if !unsafe { cudarc::nvrtc::sys::is_culib_present() } {
            return Err(GpuTrouble::NoNvrtc);
        }
        init().map_err(told)?;
        match device::get_count().map_err(told)? {
            0 => Err(GpuTrouble::NoDevice),
            count => (0..count).map(|index| examine(index).map_err(told)).collect(),
        }
    })
}

/// Version of NCCL, over which the ranks of one process exchange between GPUs.
///
/// # Errors
/// Why there is none: then they exchange through host memory.
#[cfg(not(feature = "cuda"))]
pub fn nccl() -> Result<String, GpuTrouble> {
    Err(GpuTrouble::NotBuilt)
}

/// Version of NCCL, over which the ranks of one process exchange between GPUs.
///
/// # Errors
/// Why there is none: then they exchange through host memory.
#[cfg(feature = "cuda")]
pub fn nccl() -> Result<String, GpuTrouble> {
    GpuTrouble::guard(|| {
        // SAFETY: this only tries to open a library.
        if !unsafe { cudarc::nccl::sys::is_culib_present() } {
            return Err(GpuTrouble::NoLibrary("nccl".into()));
        }
        // Since 2.9 its numbers have two digits each.
        let told = |version: i32| format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100);
        let version = cudarc::nccl::result::get_nccl_version();
        version.map(told).map_err(|error| GpuTrouble::Other(format!("NCCL does not say its version: {:?}", error.0)))
    })
}
