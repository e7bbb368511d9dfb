use indexmap::IndexMap;
use rlflow_api::Kind;

use super::{
    WorkflowError,
    error::Collector,
    node::{Data, Entry, Node, Table, quoted},
    reference::Reference,
    source::Span,
};
use crate::{DeviceInfo, Registry, suggest::did_you_mean};

/// What a file says at its top.
pub(crate) struct Header {
    pub name: Option<String>,
    pub edition: u32,
    pub seed: u64,
    pub devices: Vec<DeviceInfo>,
    pub defaults: Table,
}

/// One `[stage.NAME]` of the merged file.
pub(crate) struct Declared {
    pub name: String,
    /// Where the name stands: what errors about the whole stage point at.
    pub span: Span,
    /// Absent if unknown, which was reported.
    pub kind: Option<&'static dyn Kind>,
    pub seed: Option<u64>,
    pub inputs: IndexMap<String, Input>,
    /// Whether `inputs` could not be read at all, which was reported: nothing can be said of what is missing.
    pub inputs_broken: bool,
    pub matrix: Vec<MatrixAxis>,
    /// Everything that is not structure.
    pub settings: Table,
    /// Whether something about it was reported already, so that nothing can be said of what depends on it.
    pub broken: bool,
}

/// What is written at one port.
pub(crate) struct Input {
    /// Where the port's name stands.
    pub key: Span,
    /// Where the value stands.
    pub span: Span,
    pub references: Vec<Reference>,
    /// Whether a reference could not be read, which was reported.
    pub broken: bool,
}

/// One list of values in `matrix`.
pub(crate) struct MatrixAxis {
    /// Dotted path of the setting.
    pub path: String,
    pub key: Span,
    pub values: Vec<Node>,
}

/// Keys of a stage that are not settings of its kind.
pub(crate) const STRUCTURE: [&str; 4] = ["kind", "inputs", "seed", "matrix"];
const ROOT: [&str; 7] = ["name", "edition", "seed", "include", "devices", "defaults", "stage"];

/// Takes the head off a merged file.
pub(crate) fn header(root: &mut Table, registry: &Registry, errors: &mut Collector) -> Header {
    for (key, entry) in root.iter().filter(|(key, _)| !ROOT.contains(&key.as_str())) {
        let error = WorkflowError::new("unknown_key", format!("a workflow has no `{key}`"));
        let hint = did_you_mean(key, ROOT).unwrap_or_else(|| match entry.node.as_table() {
            Some(table) if table.contains_key("kind") => format!("did you mean `[stage.{key}]`?"),
            _ => "known here: `name`, `edition`, `seed`, `include`, `[devices]`, `[defaults]`, `[stage.NAME]`".into(),
        });
        errors.add(entry.key, error.with_hint(hint));
    }
    let name = root.get("name").and_then(|entry| match entry.node.as_str() {
        Some(name) if !name.trim().is_empty() => Some(name.to_owned()),
        _ => {
            let message = format!("`name` must be a text that is not empty, found {}", entry.node.found());
            errors.add(entry.node.span, WorkflowError::new("wrong_type", message));
            None
        }
    });
    let edition = root.get("edition").map_or(registry.newest_edition(), |entry| edition(&entry.node, registry, errors));
    let seed = root.get("seed").and_then(|entry| seed(&entry.node, errors)).unwrap_or(0);
    let defaults = match root.shift_remove("defaults").map(|entry| entry.node) {
        Some(Node { data: Data::Table(table), .. }) => table,
        Some(other) => {
            errors.add(other.span, WorkflowError::new("wrong_type", format!("`defaults` must be a table, found {}", other.found())));
            Table::default()
        }
        None => Table::default(),
    };
    let devices = root.shift_remove("devices").map(|entry| super::devices::devices(&entry.node, errors)).unwrap_or_default();
    Header { name, edition, seed, devices, defaults }
}

fn edition(node: &Node, registry: &Registry, errors: &mut Collector) -> u32 {
    let newest = registry.newest_edition();
    match node.data {
        Data::Integer(edition) if (1..=i128::from(newest)).contains(&edition) => edition as u32,
        Data::Integer(edition) => {
            let error = WorkflowError::new("unknown_edition", format!("this rlflow knows no edition {edition}"));
            let hint = if newest == 1 { "the only edition is 1".to_owned() } else { format!("editions are 1 to {newest}") };
            let upgrade = if edition > i128::from(newest) { "; a newer rlflow may know it" } else { "" };
            errors.add(node.span, error.with_hint(hint + upgrade));
            newest
        }
        _ => {
            errors.add(node.span, WorkflowError::new("wrong_type", format!("`edition` must be an integer, found {}", node.found())));
            newest
        }
    }
}

fn seed(node: &Node, errors: &mut Collector) -> Option<u64> {
    match node.data {
        Data::Integer(seed) => u64::try_from(seed).ok().or_else(|| {
            errors.add(node.span, WorkflowError::new("out_of_range", format!("`seed` must be from 0 to {}, found {seed}", u64::MAX)));
            None
        }),
        _ => {
            errors.add(node.span, WorkflowError::new("wrong_type", format!("`seed` must be an integer, found {}", node.found())));
            None
        }
    }
}

/// Takes the stages out of a merged file, in its order.
pub(crate) fn stages(root: &mut Table, registry: &Registry, errors: &mut Collector) -> Vec<Declared> {
    let hint = "a workflow has at least one stage: `[stage.corpus]` with `kind = \"corpus\"`";
    match root.shift_remove("stage") {
        None => errors
            .add(Span { source: 0, start: 0, end: 0 }, WorkflowError::new("empty_workflow", "the workflow has no stages").with_hint(hint)),
        Some(Entry { key, node: Node { data: Data::Table(table), .. } }) => {
            if table.is_empty() {
                errors.add(key, WorkflowError::new("empty_workflow", "the workflow has no stages").with_hint(hint));
            }
            return table.into_iter().map(|(name, entry)| stage(name, entry, registry, errors)).collect();
        }
        Some(Entry { node, .. }) => {
            let error = WorkflowError::new("wrong_type", format!("`stage` must be a table of stages, found {}", node.found()));
            errors.add(node.span, error.with_hint("write `[stage.NAME]`"));
        }
    }
    Vec::new()
}

fn stage(name: String, entry: Entry, registry: &Registry, errors: &mut Collector) -> Declared {
    let before = errors.len();
    let span = entry.key;
    let mut declared = Declared {
        name,
        span,
        kind: None,
        seed: None,
        inputs: IndexMap::new(),
        inputs_broken: false,
        matrix: Vec::new(),
        settings: Table::default(),
        broken: false,
    };
    let name = &declared.name;
    if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-')) {
        let error = WorkflowError::new("bad_name", format!("{} cannot be the name of a stage", quoted(name)));
        errors.add(span, error.with_hint("names consist of letters, digits, `_` and `-`"));
    }
    let Data::Table(mut table) = entry.node.data else {
        let error = WorkflowError::new("wrong_type", format!("stage `{name}` must be a table, found {}", entry.node.found()));
        errors.add(entry.node.span, error.with_hint(format!("write `[stage.{name}]`")));
        return Declared { broken: true, ..declared };
    };
    declared.kind = kind(name, span, table.shift_remove("kind"), &table, registry, errors);
    declared.seed = table.shift_remove("seed").and_then(|entry| seed(&entry.node, errors));
    if let Some(entry) = table.shift_remove("inputs") {
        match inputs(name, entry, errors) {
            Some(inputs) => declared.inputs = inputs,
            None => declared.inputs_broken = true,
        }
    }
    if let Some(entry) = table.shift_remove("matrix") {
        declared.matrix = matrix(name, entry, errors);
    }
    declared.settings = table;
    declared.broken = errors.len() > before;
    declared
}

fn kind(
    stage: &str,
    span: Span,
    entry: Option<Entry>,
    settings: &Table,
    registry: &Registry,
    errors: &mut Collector,
) -> Option<&'static dyn Kind> {
    let names = || registry.iter().map(|kind| kind.name());
    let all = || format!("kinds are: {}", names().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", "));
    let Some(entry) = entry else {
        let hint = if registry.get(stage).is_some() {
            format!("add `kind = \"{stage}\"`")
        } else if let Some((key, _)) =
            settings.iter().find(|(key, entry)| crate::suggest::closest(key, ["kind"]).is_some() && entry.node.as_str().is_some())
        {
            format!("did you mean `kind` instead of `{key}`?")
        } else {
            all()
        };
        errors.add(span, WorkflowError::new("missing_setting", format!("stage `{stage}` has no `kind`")).with_hint(hint));
        return None;
    };
    let Some(name) = entry.node.as_str() else {
        let message = format!("`kind` of stage `{stage}` must be a text, found {}", entry.node.found());
        errors.add(entry.node.span, WorkflowError::new("wrong_type", message).with_hint(all()));
        return None;
    };
    let found = registry.get(name);
    if found.is_none() {
        let error = WorkflowError::new("unknown_kind", format!("there is no kind {} (stage `{stage}`)", quoted(name)));
        errors.add(entry.node.span, error.with_hint(did_you_mean(name, names()).unwrap_or_else(all)));
    }
    found
}

fn inputs(stage: &str, entry: Entry, errors: &mut Collector) -> Option<IndexMap<String, Input>> {
    let Data::Table(table) = entry.node.data else {
        let error = WorkflowError::new("wrong_type", format!("`inputs` of stage `{stage}` must be a table, found {}", entry.node.found()));
        errors.add(entry.node.span, error.with_hint("write `inputs = { PORT = \"STAGE\" }`"));
        return None;
    };
    let inputs = table.into_iter().map(|(port, Entry { key, node })| {
        let span = node.span;
        let before = errors.len();
        let items = match node.data {
            Data::Array(items) => items,
            data => vec![Node { data, span }],
        };
        let references = items.iter().filter_map(|item| reference(stage, &port, item, errors)).collect();
        (port, Input { key, span, references, broken: errors.len() > before })
    });
    Some(inputs.collect())
}

fn reference(stage: &str, port: &str, item: &Node, errors: &mut Collector) -> Option<Reference> {
    let Some(text) = item.as_str() else {
        let message = format!("input `{port}` of stage `{stage}` must name a stage or list stages, found {}", item.found());
        errors.add(item.span, WorkflowError::new("wrong_type", message));
        return None;
    };
    let reference = Reference::parse(text, item.span);
    if reference.is_none() {
        let error = WorkflowError::new("unknown_stage", format!("{} names no stage (input `{port}` of stage `{stage}`)", quoted(text)));
        errors.add(item.span, error.with_hint("write \"STAGE\", \"STAGE.PORT\", \"STAGE[AXIS=VALUE]\" or \"STAGE[*]\""));
    }
    reference
}

fn matrix(stage: &str, entry: Entry, errors: &mut Collector) -> Vec<MatrixAxis> {
    let hint = "write `matrix = { SETTING = [VALUE, VALUE] }`";
    let mut axes = Vec::new();
    match entry.node.data {
        Data::Table(table) if !table.is_empty() => collect_axes(stage, "", table, &mut axes, errors),
        _ => {
            let message = format!("`matrix` of stage `{stage}` must be a table of lists, found {}", entry.node.found());
            errors.add(entry.node.span, WorkflowError::new("bad_matrix", message).with_hint(hint));
        }
    }
    axes
}

/// Lists may stand under dotted keys (`train.lr = [...]`), which TOML reads as tables.
fn collect_axes(stage: &str, prefix: &str, table: Table, axes: &mut Vec<MatrixAxis>, errors: &mut Collector) {
    for (name, Entry { key, node }) in table {
        let path = if prefix.is_empty() { name } else { format!("{prefix}.{name}") };
        match node.data {
            Data::Array(values) if !values.is_empty() => {
                if path == "kind" || path == "matrix" {
                    errors.add(key, WorkflowError::new("bad_matrix", format!("`{path}` of stage `{stage}` cannot be a matrix axis")));
                } else {
                    axes.push(MatrixAxis { path, key, values });
                }
            }
            Data::Table(inner) if !inner.is_empty() => collect_axes(stage, &path, inner, axes, errors),
            Data::Array(_) => {
                let message = format!("matrix axis `{path}` of stage `{stage}` has no values");
                errors.add(node.span, WorkflowError::new("bad_matrix", message));
            }
            data => {
                let found = Node { data, span: node.span }.found();
                let message = format!("matrix axis `{path}` of stage `{stage}` must be a list of values, found {found}");
                errors.add(node.span, WorkflowError::new("bad_matrix", message).with_hint("put the values into a list: `[...]`"));
            }
        }
    }
}
