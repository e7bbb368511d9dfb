//! Engine of rlflow: workflow, plan, action key, rerun reason, schedule, run, event, report.
