use std::{collections::BTreeMap, fmt::Write as _};

use rlflow_store::{Digest, LineageNode};

use crate::{settings, text};

/// Where an artifact comes from, as a tree: every artifact once, what it was made of below it.
pub fn tree(nodes: &[LineageNode]) -> String {
    let by_digest: BTreeMap<Digest, &LineageNode> = nodes.iter().map(|node| (node.artifact, node)).collect();
    let mut out = String::new();
    let mut seen = Vec::new();
    if let Some(root) = nodes.first() {
        branch(root, "", &by_digest, 0, &mut seen, &mut out);
    }
    out
}

fn branch(node: &LineageNode, port: &str, nodes: &BTreeMap<Digest, &LineageNode>, depth: usize, seen: &mut Vec<Digest>, out: &mut String) {
    let indent = "  ".repeat(depth);
    let port = if port.is_empty() { String::new() } else { format!("{port}: ") };
    let kind = node.artifact_type.as_deref().unwrap_or("artifact (no longer stored)");
    let Some(maker) = &node.maker else {
        let _ = writeln!(out, "{indent}{port}{kind} {}, made by an action that is no longer recorded", node.artifact.short());
        return;
    };
    let adopted = if maker.adopted { ", adopted" } else { "" };
    let again = seen.contains(&node.artifact);
    let _ = writeln!(
        out,
        "{indent}{port}{kind} {} by {} ({}, rlflow {}{adopted}){}",
        node.artifact.short(),
        maker.stage,
        maker.kind,
        maker.rlflow_version,
        if again { ", as above" } else { "" }
    );
    if again {
        return;
    }
    seen.push(node.artifact);
    let set: Vec<String> = settings::flatten(&maker.settings)
        .into_iter()
        .filter(|(_, value)| !value.is_null())
        .map(|(name, value)| format!("{name}={}", settings::display(value)))
        .collect();
    if !set.is_empty() {
        let _ = writeln!(out, "{indent}    {}", text::clip(&set.join(" "), 150));
    }
    for (file, digest) in &maker.files {
        let _ = writeln!(out, "{indent}    file {file} {digest}");
    }
    for edge in &maker.inputs {
        match nodes.get(&edge.artifact) {
            Some(node) => branch(node, &edge.port, nodes, depth + 1, seen, out),
            None => _ = writeln!(out, "{indent}  {}: {} {}", edge.port, edge.stage, edge.artifact.short()),
        }
    }
}

/// Where an artifact comes from, as a Mermaid flowchart.
pub fn mermaid(nodes: &[LineageNode]) -> String {
    let mut out = String::from("flowchart TD\n");
    let label = |text: &str| text.replace('"', "#quot;");
    let mut files: BTreeMap<(&str, Digest), usize> = BTreeMap::new();
    for node in nodes {
        let id = node.artifact.short();
        let title = match &node.maker {
            Some(maker) => format!("{}<br/>{} {id}", label(&maker.stage), label(node.artifact_type.as_deref().unwrap_or(&maker.port))),
            None => id.clone(),
        };
        let _ = writeln!(out, "  a{id}[\"{title}\"]");
        let Some(maker) = &node.maker else { continue };
        for edge in &maker.inputs {
            let _ = writeln!(out, "  a{} -->|{}| a{id}", edge.artifact.short(), label(&edge.port));
        }
        for (file, digest) in &maker.files {
            let next = files.len();
            let at = *files.entry((file, *digest)).or_insert(next);
            if at == next {
                let _ = writeln!(out, "  f{at}[/\"{}<br/>{}\"/]", label(file), digest.short());
            }
            let _ = writeln!(out, "  f{at} --> a{id}");
        }
    }
    out
}
