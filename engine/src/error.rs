use rlflow_store::StoreError;
use serde_json::Value;

use crate::workflow::{WorkflowError, WorkflowErrors};

/// Result of an engine operation.
pub type Result<T, E = EngineError> = std::result::Result<T, E>;

/// Why the engine cannot do what was asked. A stage that fails is not such an error: it is an outcome of the run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// The workflow, or what was asked of it, is wrong.
    #[error("{0}")]
    Workflow(WorkflowErrors),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The operating system failed.
    #[error("cannot {operation}: {source}")]
    Io {
        /// What was tried, with the path.
        operation: String,
        /// Why it failed.
        source: std::io::Error,
    },
}

impl From<WorkflowErrors> for EngineError {
    fn from(errors: WorkflowErrors) -> Self {
        Self::Workflow(errors)
    }
}

impl From<WorkflowError> for EngineError {
    fn from(error: WorkflowError) -> Self {
        Self::Workflow(error.into())
    }
}

impl EngineError {
    /// For `map_err` on I/O results: `operation` is a verb with its object.
    pub fn io(operation: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let operation = operation.into();
        move |source| Self::Io { operation, source }
    }

    /// `{"errors": [...]}`, as `--json` prints it.
    pub fn to_json(&self) -> Value {
        match self {
            Self::Workflow(errors) => errors.to_json(),
            // With the same keys as every other error, null where these have nothing to say.
            Self::Store(_) => WorkflowErrors::from(WorkflowError::new("store", self.to_string())).to_json(),
            Self::Io { .. } => WorkflowErrors::from(WorkflowError::new("io", self.to_string())).to_json(),
        }
    }
}
