//! CUDA devices of this machine.

use rlflow_api::DeviceSpec;

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

/// What this build finds, in the driver's order. None in a build without CUDA.
///
/// # Errors
/// With CUDA built in: that and why no device can be used.
#[cfg(not(feature = "cuda"))]
pub fn accelerators() -> Result<Vec<Accelerator>, String> {
    Ok(Vec::new())
}

/// What this build finds, in the driver's order.
///
/// # Errors
/// That and why no device can be used: no driver, no NVRTC to compile kernels with, or what the driver says.
#[cfg(feature = "cuda")]
pub fn accelerators() -> Result<Vec<Accelerator>, String> {
    use cudarc::driver::result::{device, init};

    // SAFETY: these two only try to open a library.
    if !unsafe { cudarc::driver::sys::is_culib_present() } {
        return Err("the NVIDIA driver's library (libcuda) is not installed".into());
    }
    if !unsafe { cudarc::nvrtc::sys::is_culib_present() } {
        return Err("NVRTC, which compiles kernels, is not installed (CUDA toolkit, libnvrtc)".into());
    }
    let told = |error: cudarc::driver::DriverError| format!("the NVIDIA driver says: {error}");
    init().map_err(told)?;
    let count = device::get_count().map_err(told)?;
    let examine = |index| -> Result<Accelerator, cudarc::driver::DriverError> {
        let found = device::get(index)?;
        // SAFETY: `found` comes from `get`.
        let memory_bytes = unsafe { device::total_mem(found) }? as u64;
        Ok(Accelerator { spec: DeviceSpec::Cuda(index as usize), name: device::get_name(found)?, memory_bytes })
    };
    (0..count).map(|index| examine(index).map_err(told)).collect()
}

/// Version of NCCL, over which the ranks of one process exchange between GPUs.
///
/// # Errors
/// Why there is none: then they exchange through host memory.
#[cfg(not(feature = "cuda"))]
pub fn nccl() -> Result<String, String> {
    Err("this rlflow was built without CUDA".into())
}

/// Version of NCCL, over which the ranks of one process exchange between GPUs.
///
/// # Errors
/// Why there is none: then they exchange through host memory.
#[cfg(feature = "cuda")]
pub fn nccl() -> Result<String, String> {
    // SAFETY: this only tries to open a library.
    if !unsafe { cudarc::nccl::sys::is_culib_present() } {
        return Err("NCCL's library (libnccl) is not installed".into());
    }
    // Since 2.9 its numbers have two digits each.
    let told = |version: i32| format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100);
    cudarc::nccl::result::get_nccl_version().map(told).map_err(|error| format!("NCCL does not say its version: {:?}", error.0))
}
