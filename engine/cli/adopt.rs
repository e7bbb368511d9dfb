use clap::Args;
use serde_json::json;

use rlflow_engine::{Request, action::Actions};

use crate::{
    common::{Common, WorkflowArgs},
    failure::{Failure, Outcome, print_line, print_text},
    host::host,
};

/// Accept an existing result under today's key (after an upgrade, say)
#[derive(Args)]
pub struct Adopt {
    #[command(flatten)]
    pub workflow: WorkflowArgs,
    /// The stage
    #[arg(value_name = "STAGE")]
    pub stage: String,
}

impl Adopt {
    pub fn run(self, common: &Common) -> Result<Outcome, Failure> {
        let (workflow, store) = self.workflow.open(common)?;
        let host = host();
        let actions = Actions::new(&workflow, &store, &host, &Request::default())?;
        let record = rlflow_engine::adopt(&actions, &self.stage)?;
        if common.json {
            print_line(
                &json!({ "stage": record.provenance.stage, "key": record.key, "outputs": record.outputs, "adopted": true }).to_string(),
            );
        } else {
            let outputs: Vec<String> = record.outputs.iter().map(|(port, digest)| format!("{port} {}", digest.short())).collect();
            print_text(&format!("adopted: {} now stands for {} under key {}\n", outputs.join(", "), self.stage, record.key.short()));
        }
        Ok(Outcome::Done)
    }
}
