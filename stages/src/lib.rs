//! Stage kinds of rlflow: data, trainers, PPO, DPO, evaluation.

use rlflow_api::Kind;

/// Every stage kind. A new one is a folder beside the others and a line here.
pub fn kinds() -> Vec<&'static dyn Kind> {
    vec![]
}
