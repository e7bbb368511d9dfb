use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt::Write as _,
};

use rlflow_store::{Digest, LineageNode, Maker};

use crate::{settings, text};

/// Widest line of settings.
const SETTINGS_COLUMNS: usize = 110;

/// Where an artifact comes from, as a tree: every artifact once, what it was made of below it.
pub fn tree(nodes: &[LineageNode]) -> String {
    let by_digest: HashMap<Digest, &LineageNode> = nodes.iter().map(|node| (node.artifact, node)).collect();
    let mut out = String::new();
    let mut seen = HashSet::new();
    // What is still to be told, next last: chains may be longer than a stack is deep.
    let mut open: Vec<(usize, &str, &str, Digest)> = nodes.first().map(|root| (0, "", "", root.artifact)).into_iter().collect();
    while let Some((depth, port, stage, artifact)) = open.pop() {
        let indent = "  ".repeat(depth);
        let port = if port.is_empty() { String::new() } else { format!("{port}: ") };
        let Some(node) = by_digest.get(&artifact) else {
            let _ = writeln!(out, "{indent}{port}{stage} {}", artifact.short());
            continue;
        };
        let kind = node.artifact_type.as_deref().unwrap_or("artifact (no longer stored)");
        let Some(maker) = &node.maker else {
            let _ = writeln!(out, "{indent}{port}{kind} {}, made by an action that is no longer recorded", artifact.short());
            continue;
        };
        let is_new = seen.insert(artifact);
        let adopted = if maker.adopted { ", adopted" } else { "" };
        let again = if is_new { "" } else { ", as above" };
        let by = format!("{} ({}{adopted})", maker.stage, versions(maker));
        let _ = writeln!(out, "{indent}{port}{kind} {} by {by}{again}", artifact.short());
        if is_new {
            details(maker, &indent, &mut out);
            let edges = maker.inputs.iter().rev();
            open.extend(edges.map(|edge| (depth + 1, edge.port.as_str(), edge.stage.as_str(), edge.artifact)));
        }
    }
    out
}

/// Kind and program that made an artifact, each with its version.
fn versions(maker: &Maker) -> String {
    let version = maker.kind_version.map(|version| format!(" {version}")).unwrap_or_default();
    format!("{}{version}, rlflow {}", maker.kind, maker.rlflow_version)
}

/// Settings that are set, as `name=value`.
fn written(maker: &Maker) -> Vec<String> {
    let settings = settings::flatten(&maker.settings).into_iter().filter(|(_, value)| !value.is_null());
    settings.map(|(name, value)| format!("{name}={}", settings::display(value))).collect()
}

/// Settings, numerics and files behind an artifact.
fn details(maker: &Maker, indent: &str, out: &mut String) {
    let mut line = String::new();
    for setting in written(maker) {
        if !line.is_empty() && text::width(&line) + text::width(&setting) >= SETTINGS_COLUMNS {
            let _ = writeln!(out, "{indent}   {line}");
            line.clear();
        }
        line = line + " " + &setting;
    }
    if !line.is_empty() {
        let _ = writeln!(out, "{indent}   {line}");
    }
    if !maker.numerics.is_empty() {
        let _ = writeln!(out, "{indent}    numerics {}", maker.numerics);
    }
    for (file, digest) in &maker.files {
        let _ = writeln!(out, "{indent}    file {file} {digest}");
    }
}

/// Where an artifact comes from, as a Mermaid flowchart. Settings stand in comments: in the boxes nothing else could be read.
pub fn mermaid(nodes: &[LineageNode]) -> String {
    let mut out = String::from("flowchart TD\n");
    let label = |text: &str| text.replace('#', "#35;").replace('"', "#quot;");
    let mut files: BTreeMap<(&str, Digest), usize> = BTreeMap::new();
    for node in nodes {
        let id = node.artifact.short();
        let title = match &node.maker {
            Some(maker) => {
                let made = label(node.artifact_type.as_deref().unwrap_or(&maker.port));
                format!("{}<br/>{made} {id}<br/>{}", label(&maker.stage), label(&versions(maker)))
            }
            None => id.clone(),
        };
        let _ = writeln!(out, "  a{id}[\"{title}\"]");
        let Some(maker) = &node.maker else { continue };
        // A value may hold line breaks, which would end the comment.
        let _ = writeln!(out, "  %% a{id}: {}", written(maker).join(" ").replace(['\n', '\r'], " "));
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
