use rlflow_store::StoreError;

use crate::GpuTrouble;

/// Result of a stage's work.
pub type StageResult<T> = Result<T, StageError>;

/// How a stage fails.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StageError {
    /// The user (or the engine) asked it to stop; a snapshot was written if the stage has any.
    #[error("interrupted")]
    Interrupted,
    /// Training produced NaN or infinity.
    #[error("step {step}: {tensor} is not finite ({value}){}", last_snapshot.map(|step| format!("; the last good snapshot is of step {step}")).unwrap_or_default())]
    NonFinite {
        /// Step at which it was seen, counted from 1.
        step: u64,
        /// Name of the tensor or metric.
        tensor: String,
        /// The offending value.
        value: f32,
        /// Last snapshot before it.
        last_snapshot: Option<u64>,
    },
    /// A data file cannot be used.
    #[error("{}{}: {message}", path, line.map(|line| format!(":{line}")).unwrap_or_default())]
    Data {
        /// The file.
        path: String,
        /// Line, counted from 1.
        line: Option<u64>,
        /// What is wrong, with the offending text.
        message: String,
        /// What to do.
        hint: Option<String>,
    },
    /// Inputs or settings that cannot work together, found only when running.
    #[error("{message}")]
    Invalid {
        /// What is wrong.
        message: String,
        /// What to do.
        hint: Option<String>,
    },
    /// A device has no memory left.
    #[error("{message}")]
    OutOfMemory {
        /// Who says so, and what; from the engine also when, and what was planned.
        message: String,
        /// What would need less.
        hint: Option<String>,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The operating system failed.
    #[error("{operation}: {source}")]
    Io {
        /// What was tried, with the path.
        operation: String,
        /// Why it failed.
        source: std::io::Error,
    },
}

impl StageError {
    /// An [`StageError::Invalid`] without a hint.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::Invalid { message: message.into(), hint: None }
    }

    /// An [`StageError::Invalid`] with a hint.
    pub fn invalid_with_hint(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Invalid { message: message.into(), hint: Some(hint.into()) }
    }

    /// The same as what it means for a user, if it quotes a backend that panicked: it ran out of memory, or a GPU, its driver or a library
    /// is not there.
    pub fn or_device_trouble(self) -> Self {
        match self.or_out_of_memory() {
            Self::Invalid { message, hint } => match GpuTrouble::quoted(&message) {
                // Who failed stands before what it said.
                Some(trouble) => {
                    let who =
                        message.split_once(": ").map(|(who, _)| who).filter(|who| GpuTrouble::quoted(who).is_none()).unwrap_or("CUDA");
                    Self::invalid_with_hint(format!("{who}: {trouble}"), trouble.hint())
                }
                None => Self::Invalid { message, hint },
            },
            other => other,
        }
    }

    /// The same as an [`StageError::OutOfMemory`] if it quotes a backend that ran out of memory: those only panic, and say it in their
    /// words (cubecl's `IoError` and `LaunchError`, and the driver's).
    fn or_out_of_memory(self) -> Self {
        const WORDS: [&str; 5] =
            ["out of device memory", "out-of-memory", "out of memory", "cuda_error_out_of_memory", "can't allocate buffer of size"];
        let Self::Invalid { message, hint } = self else { return self };
        let said = message.to_lowercase();
        if !WORDS.iter().any(|words| said.contains(words)) {
            return Self::Invalid { message, hint };
        }
        // Backtraces follow.
        Self::OutOfMemory { message: message.lines().next().unwrap_or_default().to_owned(), hint: None }
    }

    /// What the user can do, where known.
    pub fn hint(&self) -> Option<&str> {
        match self {
            Self::Data { hint, .. } | Self::Invalid { hint, .. } | Self::OutOfMemory { hint, .. } => hint.as_deref(),
            Self::Store(StoreError::Damaged { .. }) => Some("`rlflow fsck --repair` sets all damage aside at once; then run again"),
            Self::NonFinite { .. } => Some(
                "a lower `lr`, a longer `warmup_steps` or gradient clipping (`grad_clip`) usually helps; nothing of this stage was cached",
            ),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backend_that_panicked_is_understood() {
        let said = |message: &str| match StageError::invalid_with_hint(message, "report it").or_device_trouble() {
            error @ StageError::Invalid { .. } => (error.to_string(), error.hint().unwrap_or_default().to_owned()),
            error => (format!("{error:?}"), String::new()),
        };
        let (message, hint) =
            said("the stage panicked: Unable to dynamically load the \"nvrtc\" shared library - searched for ...\n 0: trace");
        assert_eq!(message, "the stage panicked: NVRTC (libnvrtc), which compiles kernels, is not installed");
        assert!(hint.contains("CUDA toolkit"), "{hint}");
        let error = "called `Result::unwrap()` on an `Err` value: DriverError(CUDA_ERROR_INVALID_DEVICE, \"invalid device ordinal\")";
        assert_eq!(said(&format!("rank 2 failed: {error}")).0, "rank 2 failed: the NVIDIA driver has no GPU of this number");
        let memory = said("rank 0 failed: DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")").0;
        assert!(memory.starts_with("OutOfMemory") && memory.contains("rank 0 failed"), "{memory}");
        let bug = "the stage panicked: index out of bounds";
        assert_eq!(said(bug), (bug.into(), "report it".into()));
    }
}
