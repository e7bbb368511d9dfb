use clap::{Args, ValueEnum};
use serde_json::json;

use rlflow_engine::{Plan, Request, graph as draw};

use crate::{
    common::{Common, WorkflowArgs},
    failure::{Failure, Outcome, print_line, print_text},
    host::host,
};

/// Draw the workflow
#[derive(Args)]
pub struct Graph {
    #[command(flatten)]
    pub workflow: WorkflowArgs,
    /// How to draw it
    #[arg(long, value_enum, default_value_t = Format::Mermaid)]
    pub format: Format,
    /// Leave out where each stage stands
    #[arg(long)]
    pub plain: bool,
}

/// Formats of drawings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For Markdown
    Mermaid,
    /// For Graphviz
    Dot,
    /// A picture
    Svg,
}

impl Graph {
    pub fn run(self, common: &Common) -> Result<Outcome, Failure> {
        let (workflow, store) = self.workflow.look(common)?;
        let mut statuses = Vec::new();
        if !self.plain {
            statuses = vec!["run"; workflow.stages.len()];
            for planned in Plan::new(&workflow, &store, &host(), &Request::default())?.stages {
                statuses[planned.stage] = planned.status.name();
            }
        }
        let text = match self.format {
            Format::Mermaid => draw::mermaid(&workflow, &statuses),
            Format::Dot => draw::dot(&workflow, &statuses),
            Format::Svg => draw::svg(&workflow, &statuses),
        };
        if common.json {
            let nodes = workflow
                .stages
                .iter()
                .enumerate()
                .map(|(at, stage)| json!({ "name": stage.name, "kind": stage.kind.name(), "status": statuses.get(at) }));
            let nodes: Vec<_> = nodes.collect();
            let edges: Vec<_> = workflow
                .stages
                .iter()
                .flat_map(|stage| {
                    let edge = |port: &str, edge: &rlflow_engine::workflow::Edge| {
                        json!({ "from": workflow.stages[edge.stage].name, "output": edge.port, "to": stage.name, "input": port })
                    };
                    stage.inputs.iter().flat_map(move |(port, edges)| edges.iter().map(move |one| edge(port, one))).collect::<Vec<_>>()
                })
                .collect();
            print_line(&json!({ "stages": nodes, "edges": edges, "drawing": text }).to_string());
        } else {
            print_text(&text);
        }
        Ok(Outcome::Done)
    }
}
