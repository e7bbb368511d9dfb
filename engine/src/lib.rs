//! Engine of rlflow: workflow, plan, action key, rerun reason, schedule, run, event, report.

pub mod workflow;

pub mod action;
pub mod action_key;
/// What stages without a result have measured so far.
pub mod attempt;
/// Canonical JSON: equal values, equal bytes.
pub mod canonical;
/// Differences between two workflows, runs or results.
pub mod diff;
pub mod event;
pub mod history;
pub mod html;
/// Where an artifact comes from, drawn.
pub mod lineage;
pub mod memory;
/// What stages measured.
pub mod metrics;
/// What a stage reported that belongs to its result.
pub mod record;
/// What a run, a plan or a status looks like to people.
pub mod report;
/// Settings by dotted path, and what differs between two sets of them.
pub mod settings;
pub mod settled;
pub mod text;
pub mod watch;
pub mod worker;

mod adopt;
mod crew;
mod decider;
mod error;
mod execute;
mod host;
mod interest;
mod memo;
mod plan;
mod reach;
mod reason;
mod run;
mod schedule;
mod tensorboard;

pub mod docs;
pub mod graph;
pub mod schema;

mod registry;
mod suggest;
#[cfg(test)]
mod testing;

pub use action::Request;
pub use adopt::adopt;
pub use crew::Crew;
pub use error::{EngineError, Result};
pub use host::{DeviceInfo, Host, PlacementError};
pub use plan::{Plan, PlannedStage, Status};
pub use reason::{REQUEST, Rerun, RerunReason, thousands};
pub use registry::{NEWEST_EDITION, Registry};
pub use run::{RunOptions, Summary, run};
