//! Engine of rlflow: workflow, plan, action key, rerun reason, schedule, run, event, report.

pub mod workflow;

mod registry;
mod suggest;

pub use registry::{NEWEST_EDITION, Registry};
