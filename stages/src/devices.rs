//! CUDA devices of this machine.

#[cfg(feature = "cuda")]
use std::sync::OnceLock;

#[cfg(any(feature = "cuda", test))]
use rlflow_api::StageResult;
use rlflow_api::{DeviceSpec, GpuTrouble, StageError};

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

/// What this build finds, in the driver's order: one at least. Looked for once.
///
/// # Errors
/// Why no device can be used: no driver, no NVRTC to compile kernels with, no GPU, or what the driver says.
#[cfg(feature = "cuda")]
pub fn accelerators() -> Result<Vec<Accelerator>, GpuTrouble> {
    static FOUND: OnceLock<Result<Vec<Accelerator>, GpuTrouble>> = OnceLock::new();
    FOUND.get_or_init(find).clone()
}

#[cfg(feature = "cuda")]
fn find() -> Result<Vec<Accelerator>, GpuTrouble> {
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

/// The error of who names a device that cannot be used.
pub fn unusable(device: DeviceSpec, trouble: &GpuTrouble) -> StageError {
    StageError::invalid_with_hint(format!("{device} cannot be used: {trouble}"), trouble.hint())
}

/// Whether `device` is one of those that were found. The backend opens it later, and panics if it cannot.
///
/// # Errors
/// If it is not, with the reason.
#[cfg(any(feature = "cuda", test))]
pub fn check(device: DeviceSpec, found: Result<Vec<Accelerator>, GpuTrouble>) -> StageResult<()> {
    match found {
        Ok(found) if found.iter().any(|known| known.spec == device) => Ok(()),
        Ok(_) => Err(unusable(device, &GpuTrouble::NoSuchDevice)),
        Err(trouble) => Err(unusable(device, &trouble)),
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_cannot_be_used_is_said_with_the_reason() {
        let gpu = Accelerator { spec: DeviceSpec::Cuda(0), name: "gpu".into(), memory_bytes: 1 };
        assert!(check(DeviceSpec::Cuda(0), Ok(vec![gpu.clone()])).is_ok());
        let said = |device, found| {
            let error = check(DeviceSpec::Cuda(device), found).unwrap_err();
            (error.to_string(), error.hint().unwrap_or_default().to_owned())
        };
        let (message, hint) = said(3, Ok(vec![gpu]));
        assert_eq!(message, "cuda:3 cannot be used: the NVIDIA driver has no GPU of this number");
        assert!(hint.starts_with("`rlflow devices` lists what can be used"), "{hint}");
        let missing = GpuTrouble::of("Unable to dynamically load the \"nvrtc\" shared library - searched for library names: []");
        let (message, hint) = said(0, Err(missing));
        assert_eq!(message, "cuda:0 cannot be used: NVRTC (libnvrtc), which compiles kernels, is not installed");
        assert!(hint.starts_with("install the CUDA toolkit"), "{hint}");
    }
}
