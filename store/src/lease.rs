use serde::{Deserialize, Serialize};

/// Who works on an action.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LeaseHolder {
    /// Host name.
    pub host: String,
    /// Process.
    pub pid: u32,
    /// Run.
    pub run_id: String,
    /// Stage name.
    pub stage: String,
    /// Seconds since the Unix epoch.
    pub since: f64,
}

/// Outcome of asking for a lease.
pub enum LeaseOutcome {
    /// It is ours until dropped.
    Acquired(Lease),
    /// Another living process has it.
    Held(LeaseHolder),
}

/// The right to work on one action, until dropped. Renewed in the background; taken over when its process is gone.
pub struct Lease {}
