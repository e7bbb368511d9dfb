use clap::{Args, ValueEnum};
use serde_json::json;

use rlflow_engine::lineage;

use crate::{
    artifact,
    common::{Common, WorkflowArgs},
    failure::{Failure, Outcome, print_line, print_text},
};

/// Everything that an artifact was made from, back to the raw files' digests
#[derive(Args)]
pub struct Lineage {
    #[command(flatten)]
    pub workflow: WorkflowArgs,
    /// A stage, one output of it (STAGE.PORT), or an artifact's digest
    #[arg(value_name = "STAGE")]
    pub artifact: String,
    /// How to show it
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub format: Format,
}

/// Formats of a lineage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// A tree
    Text,
    /// A flowchart for Markdown
    Mermaid,
}

impl Lineage {
    pub fn run(self, common: &Common) -> Result<Outcome, Failure> {
        let (workflow, store) = self.workflow.look(common)?;
        let digest = artifact::find(&workflow, &store, &self.artifact)?;
        let nodes = store.lineage(digest)?;
        if common.json {
            print_line(&json!({ "artifact": digest, "nodes": nodes }).to_string());
        } else {
            print_text(&match self.format {
                Format::Text => lineage::tree(&nodes),
                Format::Mermaid => lineage::mermaid(&nodes),
            });
        }
        Ok(Outcome::Done)
    }
}
