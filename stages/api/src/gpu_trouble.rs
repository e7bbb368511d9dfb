//! What CUDA's libraries say when a GPU cannot be used, and what that means for a user.

use crate::panics;

/// Why a GPU cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GpuTrouble {
    /// The program has no code for it.
    #[error("this rlflow was built without CUDA")]
    NotBuilt,
    /// `libcuda`, which comes with the driver, cannot be opened, or is the toolkit's stand-in for it.
    #[error("the NVIDIA driver (libcuda) is not installed")]
    NoDriver,
    /// Kernels are compiled at run time.
    #[error("NVRTC (libnvrtc), which compiles kernels, is not installed")]
    NoNvrtc,
    /// Another library cannot be opened.
    #[error("the library `lib{0}` is not installed")]
    NoLibrary(String),
    /// A library was opened, and is of another version than this program needs.
    #[error("the installed NVIDIA driver or CUDA library is too old: it has no function `{0}`")]
    TooOld(String),
    /// The driver works, and there is nothing to drive.
    #[error("the NVIDIA driver finds no GPU")]
    NoDevice,
    /// There are fewer GPUs.
    #[error("the NVIDIA driver has no GPU of this number")]
    NoSuchDevice,
    /// The kernel's part of the driver and its libraries are not of one version, or it is not running.
    #[error("the NVIDIA driver is not ready, or its parts do not fit each other")]
    NotReady,
    /// All else, in the words of who said it.
    #[error("CUDA says: {0}")]
    Other(String),
}

impl GpuTrouble {
    /// What `text` means, which quotes a panic or an error of `cudarc` 0.19: it panics where a library cannot be opened or lacks a
    /// function, and its driver errors read `DriverError(CUDA_ERROR_NO_DEVICE, "no CUDA-capable device is detected")`. None where it
    /// quotes nothing that an installation is to blame for.
    pub fn quoted(text: &str) -> Option<Self> {
        let after = |words: &str| text.split_once(words).map(|(_, rest)| rest);
        if let Some(library) = after("Unable to dynamically load the \"").and_then(|rest| rest.split('"').next()) {
            return Some(match library {
                "cuda" | "nvcuda" => Self::NoDriver,
                "nvrtc" => Self::NoNvrtc,
                other => Self::NoLibrary(other.to_owned()),
            });
        }
        if let Some(symbol) = after("Missing symbol ").and_then(|rest| rest.split(':').next()) {
            return Some(Self::TooOld(symbol.to_owned()));
        }
        match after("DriverError(")?.split([',', ')']).next()? {
            "CUDA_ERROR_STUB_LIBRARY" => Some(Self::NoDriver),
            "CUDA_ERROR_NO_DEVICE" => Some(Self::NoDevice),
            "CUDA_ERROR_INVALID_DEVICE" => Some(Self::NoSuchDevice),
            "CUDA_ERROR_SYSTEM_NOT_READY" | "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH" | "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE" => {
                Some(Self::NotReady)
            }
            _ => None,
        }
    }

    /// The same of a text that is about nothing else.
    pub fn of(text: &str) -> Self {
        // Backtraces follow.
        Self::quoted(text).unwrap_or_else(|| Self::Other(text.lines().next().unwrap_or_default().to_owned()))
    }

    /// `work` that calls CUDA's libraries, which may not be there: that they panic then is an error like others.
    ///
    /// # Errors
    /// That of `work`, or what its panic means.
    pub fn guard<T>(work: impl FnOnce() -> Result<T, Self>) -> Result<T, Self> {
        panics::catch(work).unwrap_or_else(|panic| Err(Self::of(panic.message())))
    }

    /// What to do.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::NotBuilt => "build with `--features cuda`, or set `device = \"cpu\"`",
            Self::NoDriver | Self::NotReady => {
                "`nvidia-smi` must work first: install the driver, or restart after an update; or set `device = \"cpu\"`"
            }
            Self::NoNvrtc | Self::NoLibrary(_) => {
                "install the CUDA toolkit, or name the folder of its libraries in `LD_LIBRARY_PATH`; or set `device = \"cpu\"`"
            }
            Self::TooOld(_) => "install a newer NVIDIA driver and CUDA toolkit, or set `device = \"cpu\"`",
            Self::NoDevice | Self::NoSuchDevice => {
                "`rlflow devices` lists what can be used; `CUDA_VISIBLE_DEVICES` may hide some; or set `device = \"cpu\"`"
            }
            Self::Other(_) => "`nvidia-smi` shows the state of the GPUs; or set `device = \"cpu\"`",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Texts of cudarc 0.19.10 (`panic_no_lib_found`, `load`, `Debug` of `DriverError`), plain and in what quotes them.
    #[test]
    fn what_libraries_say_is_understood() {
        let missing = |name: &str| {
            format!(
                "Unable to dynamically load the \"{name}\" shared library - searched for library names: [\"lib{name}.so\", \"lib{name}64.so\"]. \
                 Ensure that `LD_LIBRARY_PATH` has the correct path to the installed library. If the shared library is present on the system \
                 under a different name than one of those listed above, please open a GitHub issue."
            )
        };
        let driver = |code: &str, words: &str| format!("DriverError({code}, \"{words}\")");
        let unwrapped = |error: &str| format!("called `Result::unwrap()` on an `Err` value: {error}");
        let cases = [
            (missing("cuda"), Some(GpuTrouble::NoDriver)),
            (format!("rank 1 failed: {}", missing("nvrtc")), Some(GpuTrouble::NoNvrtc)),
            (missing("nccl"), Some(GpuTrouble::NoLibrary("nccl".into()))),
            (
                "Missing symbol cuTensorMapEncodeTiled: /lib/libcuda.so.1: undefined symbol: cuTensorMapEncodeTiled".into(),
                Some(GpuTrouble::TooOld("cuTensorMapEncodeTiled".into())),
            ),
            (driver("CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"), Some(GpuTrouble::NoDevice)),
            (unwrapped(&driver("CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal")), Some(GpuTrouble::NoSuchDevice)),
            (driver("CUDA_ERROR_STUB_LIBRARY", "CUDA driver is a stub library"), Some(GpuTrouble::NoDriver)),
            (
                driver("CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "system has unsupported display driver / cuda driver combination"),
                Some(GpuTrouble::NotReady),
            ),
            // A kernel that went wrong is no matter of installation, nor is what has nothing to do with GPUs.
            (unwrapped(&driver("CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered")), None),
            ("index out of bounds: the len is 3 but the index is 3".into(), None),
        ];
        for (text, expected) in cases {
            assert_eq!(GpuTrouble::quoted(&text), expected, "{text}");
        }
        let unknown = driver("CUDA_ERROR_UNKNOWN", "<Failure when calling cuGetErrorString()>");
        let other = GpuTrouble::of(&format!("{unknown}\n   0: backtrace"));
        assert_eq!(other.to_string(), format!("CUDA says: {unknown}"));
    }

    #[test]
    fn a_library_that_panics_is_an_error() {
        let missing = || -> Result<(), GpuTrouble> { panic!("Unable to dynamically load the \"{}\" shared library", "nvrtc") };
        assert_eq!(GpuTrouble::guard(missing), Err(GpuTrouble::NoNvrtc));
        assert_eq!(
            GpuTrouble::guard(|| -> Result<(), GpuTrouble> { panic!("no words of ours") }),
            Err(GpuTrouble::Other("no words of ours".into()))
        );
        assert_eq!(GpuTrouble::guard(|| Err::<(), _>(GpuTrouble::NoDevice)), Err(GpuTrouble::NoDevice));
        assert_eq!(GpuTrouble::guard(|| Ok(3)), Ok(3));
    }

    #[test]
    fn all_are_said_in_one_line_with_what_to_do() {
        let all = [
            GpuTrouble::NotBuilt,
            GpuTrouble::NoDriver,
            GpuTrouble::NoNvrtc,
            GpuTrouble::NoLibrary("nccl".into()),
            GpuTrouble::TooOld("cuInit".into()),
            GpuTrouble::NoDevice,
            GpuTrouble::NoSuchDevice,
            GpuTrouble::NotReady,
            GpuTrouble::of("one line\nand another"),
        ];
        for trouble in all {
            assert!(trouble.to_string().lines().count() == 1 && trouble.hint().contains('`'), "{trouble}");
        }
    }
}
