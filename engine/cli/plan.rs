use clap::Args;

use rlflow_engine::{
    Request,
    report::{nothing_to_run, plan_report},
};

use crate::{
    common::{Common, WorkflowArgs},
    failure::{Failure, Outcome, print_json, print_text},
    host::host,
};

/// Show what would run, why, where, and how long it may take
#[derive(Args)]
pub struct Plan {
    #[command(flatten)]
    pub workflow: WorkflowArgs,
    /// Only these stages and what they need
    #[arg(value_name = "STAGE")]
    pub stages: Vec<String>,
    /// As if this stage were to run whether it is cached or not
    #[arg(long, value_name = "STAGE")]
    pub force: Vec<String>,
    /// As if nothing were cached
    #[arg(long)]
    pub no_cache: bool,
}

impl Plan {
    pub fn run(self, common: &Common) -> Result<Outcome, Failure> {
        let request = Request { stages: self.stages, force: self.force, no_cache: self.no_cache };
        let host = host();
        if request == Request::default()
            && !common.json
            && let Some(settled) = self.workflow.settled(common, &host)
        {
            print_text(&nothing_to_run(settled.stages()));
            return Ok(Outcome::Done);
        }
        let (workflow, store) = self.workflow.look(common)?;
        let plan = rlflow_engine::Plan::new(&workflow, &store, &host, &request)?;
        if common.json {
            print_json(&plan.to_json(&workflow));
        } else if plan.is_all_cached() {
            print_text(&nothing_to_run(plan.stages.len()));
        } else {
            print_text(&plan_report(&workflow, &plan, true));
        }
        // The process ends here: taking ten thousand stages apart first would only take time.
        std::mem::forget((workflow, plan));
        Ok(Outcome::Done)
    }
}
