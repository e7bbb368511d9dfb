use clap::Args;

use rlflow_engine::{docs, schema};

use crate::{
    common::{Common, registry},
    failure::{Failure, Outcome, print_line, print_text},
};

/// Print the JSON Schema of workflow files, so that editors complete and check them
#[derive(Args)]
pub struct Schema {
    /// Every stage kind as Markdown instead: ports, settings with defaults and units, metrics
    #[arg(long, conflicts_with = "json")]
    pub markdown: bool,
}

impl Schema {
    pub fn run(self, common: &Common) -> Result<Outcome, Failure> {
        let registry = registry();
        if self.markdown {
            print_text(&docs::kinds_markdown(&registry));
        } else {
            let schema = schema::workflow_schema(&registry);
            let text = if common.json { serde_json::to_string(&schema) } else { serde_json::to_string_pretty(&schema) };
            print_line(&text.map_err(crate::failure::other)?);
        }
        Ok(Outcome::Done)
    }
}
