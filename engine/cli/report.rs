use std::{fs, path::PathBuf};

use clap::Args;
use serde_json::json;

use rlflow_engine::{EngineError, event::now, html::html_report};

use crate::{
    common::{Common, WorkflowArgs},
    failure::{Failure, Outcome, print_as_it_is, print_line, print_text},
    host::host,
};

/// Write one self-contained HTML file: DAG, curves, samples side by side, tables
#[derive(Args)]
pub struct Report {
    #[command(flatten)]
    pub workflow: WorkflowArgs,
    /// Where to write it [default: NAME.html beside the workflow]; `-` for stdout
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

impl Report {
    pub fn run(self, common: &Common) -> Result<Outcome, Failure> {
        let (workflow, store) = self.workflow.look(common)?;
        let html = html_report(&workflow, &store, &host(), &format!("written {}", crate::log::local_time(now())))?;
        let path = self.output.unwrap_or_else(|| workflow.path.with_extension("html"));
        if path.as_os_str() == "-" {
            print_as_it_is(&html);
            return Ok(Outcome::Done);
        }
        fs::write(&path, html).map_err(EngineError::io(format!("write {}", path.display())))?;
        if common.json {
            print_line(&json!({ "report": path }).to_string());
        } else {
            print_text(&format!("{}\n", path.display()));
        }
        Ok(Outcome::Done)
    }
}
