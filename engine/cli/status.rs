use clap::Args;

use rlflow_engine::{Request, report::plan_report};

use crate::{
    common::{Common, WorkflowArgs},
    failure::{Failure, Outcome, print_json, print_text},
    host::host,
};

/// Show where each stage stands: cached, run, resume, extend, pending, running or failed, and why
#[derive(Args)]
pub struct Status {
    #[command(flatten)]
    pub workflow: WorkflowArgs,
}

impl Status {
    pub fn run(self, common: &Common) -> Result<Outcome, Failure> {
        let (workflow, store) = self.workflow.look(common)?;
        let plan = rlflow_engine::Plan::new(&workflow, &store, &host(), &Request::default())?;
        if common.json {
            print_json(&plan.to_json(&workflow));
        } else {
            print_text(&plan_report(&workflow, &plan, false));
        }
        // The process ends here: taking ten thousand stages apart first would only take time.
        std::mem::forget((workflow, plan));
        Ok(Outcome::Done)
    }
}
