use clap::Args;

use rlflow_engine::{Request, report::plan_report};

use crate::{
    common::{Common, WorkflowArgs},
    failure::{Failure, Outcome, print_line, print_text},
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
        let (workflow, store) = self.workflow.look(common)?;
        let request = Request { stages: self.stages, force: self.force, no_cache: self.no_cache };
        let plan = rlflow_engine::Plan::new(&workflow, &store, &host(), &request)?;
        if common.json {
            print_line(&plan.to_json(&workflow).to_string());
        } else if plan.is_all_cached() {
            print_text(&format!("everything is cached: nothing of {} stages would run\n", plan.stages.len()));
        } else {
            print_text(&plan_report(&workflow, &plan, true));
        }
        // The process ends here: taking ten thousand stages apart first would only take time.
        std::mem::forget((workflow, plan));
        Ok(Outcome::Done)
    }
}
