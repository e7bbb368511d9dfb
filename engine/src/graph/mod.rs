//! A workflow drawn: `rlflow graph`. The points of a matrix are one node with their number.

mod svg;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
};

use crate::workflow::Workflow;

pub use svg::svg;

/// Colour of a status: fill, border.
const COLOURS: [(&str, &str, &str); 8] = [
    ("cached", "#d9f0dd", "#2e7d43"),
    ("run", "#dbe8fb", "#2b5fab"),
    ("resume", "#dbe8fb", "#2b5fab"),
    ("extend", "#dbe8fb", "#2b5fab"),
    ("running", "#fdeec8", "#a06b00"),
    ("failed", "#fadbd8", "#b03a2e"),
    ("pending", "#ececec", "#777777"),
    ("mixed", "#e9e0f5", "#6b4ba1"),
];

/// One node of the drawing: a declared stage with all its points.
struct Node {
    name: String,
    kind: &'static str,
    /// Matrix points; 0 for a stage outside of any matrix.
    points: usize,
    /// Names of the axes.
    axes: Vec<String>,
    /// Number of points by status.
    statuses: BTreeMap<String, usize>,
}

struct Drawing {
    nodes: Vec<Node>,
    /// From, to, port.
    edges: BTreeSet<(usize, usize, String)>,
}

impl Drawing {
    /// Of a workflow; `statuses` says one word for each of its stages, or is empty.
    fn new(workflow: &Workflow, statuses: &[&str]) -> Self {
        let mut nodes: Vec<Node> = Vec::new();
        let mut by_name: BTreeMap<&str, usize> = BTreeMap::new();
        let mut node_of = Vec::with_capacity(workflow.stages.len());
        for (index, stage) in workflow.stages.iter().enumerate() {
            let node = *by_name.entry(&stage.base_name).or_insert_with(|| {
                let axes = stage.point.iter().map(|(axis, _)| axis.clone()).collect();
                nodes.push(Node { name: stage.base_name.clone(), kind: stage.kind.name(), points: 0, axes, statuses: BTreeMap::new() });
                nodes.len() - 1
            });
            nodes[node].points += usize::from(!stage.point.is_empty());
            if let Some(status) = statuses.get(index).filter(|status| !status.is_empty()) {
                *nodes[node].statuses.entry((*status).to_owned()).or_default() += 1;
            }
            node_of.push(node);
        }
        let mut edges = BTreeSet::new();
        for (index, stage) in workflow.stages.iter().enumerate() {
            for (port, inputs) in &stage.inputs {
                edges.extend(inputs.iter().map(|edge| (node_of[edge.stage], node_of[index], port.clone())));
            }
        }
        Self { nodes, edges }
    }
}

impl Node {
    /// `dpo ×3`.
    fn title(&self) -> String {
        if self.points > 0 { format!("{} ×{}", self.name, self.points) } else { self.name.clone() }
    }

    /// What stands below the title: the kind where the name does not say it, the axes, the status.
    fn details(&self) -> Vec<String> {
        let mut lines = Vec::new();
        if self.kind != self.name {
            lines.push(self.kind.to_owned());
        }
        if !self.axes.is_empty() {
            lines.push(format!("over {}", self.axes.join(", ")));
        }
        match self.statuses.len() {
            0 => {}
            1 => lines.extend(self.statuses.keys().cloned()),
            _ => lines.push(self.statuses.iter().map(|(status, count)| format!("{count} {status}")).collect::<Vec<_>>().join(", ")),
        }
        lines
    }

    /// The status that decides the colour.
    fn status(&self) -> Option<&str> {
        match self.statuses.len() {
            0 => None,
            1 => self.statuses.keys().next().map(String::as_str),
            _ => Some("mixed"),
        }
    }

    fn colours(&self) -> Option<(&'static str, &'static str)> {
        let status = self.status()?;
        COLOURS.iter().find(|(name, _, _)| *name == status).map(|(_, fill, border)| (*fill, *border))
    }
}

/// The workflow as a Mermaid flowchart. `statuses` says one word (`cached`, `run`, ...) for each stage, or is empty.
pub fn mermaid(workflow: &Workflow, statuses: &[&str]) -> String {
    let drawing = Drawing::new(workflow, statuses);
    let mut text = String::from("flowchart TD\n");
    for (index, node) in drawing.nodes.iter().enumerate() {
        let lines: Vec<_> = std::iter::once(node.title()).chain(node.details()).map(|line| mermaid_text(&line)).collect();
        let class = node.status().filter(|_| node.colours().is_some()).map(|status| format!(":::{status}")).unwrap_or_default();
        let _ = writeln!(text, "    s{index}[\"{}\"]{class}", lines.join("<br/>"));
    }
    for (from, to, port) in &drawing.edges {
        let _ = writeln!(text, "    s{from} -->|{port}| s{to}");
    }
    let used: BTreeSet<&str> = drawing.nodes.iter().filter_map(Node::status).collect();
    for (status, fill, border) in COLOURS.iter().filter(|(status, _, _)| used.contains(status)) {
        let _ = writeln!(text, "    classDef {status} fill:{fill},stroke:{border},color:#111111");
    }
    text
}

fn mermaid_text(text: &str) -> String {
    text.replace('#', "#35;").replace('"', "#quot;")
}

/// The workflow for Graphviz. `statuses` as for [`mermaid`].
pub fn dot(workflow: &Workflow, statuses: &[&str]) -> String {
    let drawing = Drawing::new(workflow, statuses);
    let mut text = format!(
        "digraph {} {{\n    rankdir=TB;\n    node [shape=box, style=\"rounded,filled\", fillcolor=\"#ffffff\"];\n",
        dot_text(&workflow.name)
    );
    for (index, node) in drawing.nodes.iter().enumerate() {
        let lines: Vec<_> = std::iter::once(node.title()).chain(node.details()).collect();
        let colours = node.colours().map(|(fill, border)| format!(", fillcolor=\"{fill}\", color=\"{border}\"")).unwrap_or_default();
        let _ = writeln!(text, "    s{index} [label={}{colours}];", dot_text(&lines.join("\n")));
    }
    for (from, to, port) in &drawing.edges {
        let _ = writeln!(text, "    s{from} -> s{to} [label={}];", dot_text(port));
    }
    text + "}\n"
}

fn dot_text(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n"))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::{testing::registry, workflow};

    #[test]
    fn drawings_show_points_once_with_their_number() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("checkpoint")).unwrap();
        fs::write(folder.path().join("checkpoint/config.json"), "{}").unwrap();
        let path = folder.path().join("drawn.toml");
        let text = "[stage.sft]\nkind = \"import\"\npath = \"checkpoint\"\n[stage.actor]\nkind = \"ppo.actor\"\nmatrix = { zero = [1, 2] }\n\
             inputs = { model = \"sft\" }\n[stage.ppo]\nkind = \"ppo\"\nsteps = 1\ninputs = { actor = \"actor\" }\n\
             [stage.eval]\nkind = \"eval\"\ninputs = { models = [\"sft\", \"ppo[*]\"] }\n";
        fs::write(&path, text).unwrap();
        let workflow = workflow::load(&path, &Default::default(), &registry()).unwrap();
        let statuses = ["cached", "cached", "run", "pending", "pending", "pending"];
        insta::assert_snapshot!("mermaid", mermaid(&workflow, &statuses));
        insta::assert_snapshot!("dot", dot(&workflow, &[]));
        let drawn = svg(&workflow, &statuses);
        insta::assert_snapshot!("svg", drawn);
        assert_eq!(drawn.matches("<rect").count(), 4);
    }
}
