use std::path::Path;

use toml::de::DeValue;

use super::{
    WorkflowError,
    error::Collector,
    node::{Data, Entry, MAX_STEPS, Node, Step, Table, split_path},
    source::{Source, Sources, Span},
};
use crate::suggest::did_you_mean;

/// What may be set at the top of a file.
const ROOT_KEYS: [&str; 6] = ["name", "edition", "seed", "devices", "defaults", "stage"];

/// Applies one `--set` argument to a merged workflow file. What it may be set to is checked with the rest of the file,
/// since the value remembers that it came from here.
pub(crate) fn apply(argument: &str, root: &mut Table, folder: &Path, sources: &mut Sources, errors: &mut Collector) {
    let source = sources.add(Source::new(format!("--set {argument}"), folder.to_owned(), argument.to_owned()));
    let whole = Span::new(source, 0..argument.len());
    let Some((path, value)) = argument.split_once('=') else {
        let error = WorkflowError::new("bad_set", format!("`--set {argument}` has no value"));
        return errors.add(whole, error.with_hint("write `--set stage.STAGE.SETTING=VALUE`"));
    };
    let steps = split_path(path.trim());
    let key = Span::new(source, 0..path.len());
    if steps.len() > MAX_STEPS {
        return errors.add(key, WorkflowError::new("bad_set", format!("`--set` names a place more than {MAX_STEPS} tables deep")));
    }
    let Some(value) = parse_value(value, source, path.len() + 1) else {
        let error = WorkflowError::new("bad_set", format!("`--set {argument}`: the value cannot be read"));
        return errors.add(Span::new(source, path.len()..argument.len()), error.with_hint("values are written as in TOML"));
    };
    if let Some(error) = check_target(&steps, root, argument) {
        return errors.add(key, error);
    }
    if !insert(root, &steps, Entry { key, node: value }) {
        let error = WorkflowError::new("bad_set", format!("`{}` names an item that the list does not have", path.trim()));
        errors.add(key, error.with_hint("items are counted from 0; set the whole list to change its length"));
    }
}

/// Whether there is such a place.
fn check_target(steps: &[Step], root: &Table, argument: &str) -> Option<WorkflowError> {
    let usage = "write `--set stage.STAGE.SETTING=VALUE`";
    let known_root = matches!(steps.first(), Some(Step::Key(first)) if ROOT_KEYS.contains(&first.as_str()));
    match steps {
        [Step::Key(stage), Step::Key(name), Step::Key(_), ..] if stage == "stage" => {
            let stages = root.get("stage").and_then(|entry| entry.node.as_table());
            if stages.is_some_and(|stages| stages.contains_key(name)) {
                return None;
            }
            let error = WorkflowError::new("unknown_stage", format!("there is no stage `{name}` to set anything of"));
            let names = stages.into_iter().flat_map(|stages| stages.keys()).map(String::as_str);
            Some(match did_you_mean(name, names) {
                Some(hint) => error.with_hint(hint),
                None => error,
            })
        }
        [Step::Key(first), ..] if first == "stage" => {
            Some(WorkflowError::new("bad_set", format!("`--set {argument}` names no setting of a stage")).with_hint(usage))
        }
        [Step::Key(first)] if first == "defaults" => Some(
            WorkflowError::new("bad_set", format!("`--set {argument}` names no setting")).with_hint("write `--set defaults.SETTING=VALUE`"),
        ),
        _ if known_root => None,
        [Step::Key(first), ..] => {
            let stages = root.get("stage").and_then(|entry| entry.node.as_table());
            let hint = if stages.is_some_and(|stages| stages.contains_key(first)) {
                Some(format!("did you mean `stage.{}`?", argument.split('=').next().unwrap_or("")))
            } else {
                did_you_mean(first, ROOT_KEYS)
            };
            let error = WorkflowError::new("bad_set", format!("`{first}` cannot be set: a workflow has no such part"));
            Some(error.with_hint(hint.unwrap_or_else(|| usage.into())))
        }
        _ => Some(WorkflowError::new("bad_set", format!("`--set {argument}` names nothing")).with_hint(usage)),
    }
}

/// TOML, or a bare word as text.
fn parse_value(text: &str, source: u32, offset: usize) -> Option<Node> {
    let trimmed = text.trim();
    let offset = offset + (text.len() - text.trim_start().len());
    if trimmed.is_empty() {
        return None;
    }
    match DeValue::parse(trimmed) {
        Ok(value) => {
            let mut node = Node::from_toml(&value, source);
            shift(&mut node, offset as u32);
            Some(node)
        }
        Err(_) if !trimmed.starts_with(['[', '{', '"', '\'']) => {
            Some(Node { data: Data::String(trimmed.to_owned()), span: Span::new(source, offset..offset + trimmed.len()) })
        }
        Err(_) => None,
    }
}

fn shift(node: &mut Node, by: u32) {
    let moved = |span: &mut Span| {
        span.start += by;
        span.end += by;
    };
    moved(&mut node.span);
    match &mut node.data {
        Data::Array(items) => items.iter_mut().for_each(|item| shift(item, by)),
        Data::Table(table) => table.values_mut().for_each(|entry| {
            moved(&mut entry.key);
            shift(&mut entry.node, by);
        }),
        _ => {}
    }
}

/// Puts `entry` at `steps`, making tables on the way. False if an index on the way does not exist.
pub(crate) fn insert(table: &mut Table, steps: &[Step], entry: Entry) -> bool {
    let Some((Step::Key(first), rest)) = steps.split_first() else { return false };
    if rest.is_empty() {
        table.insert(first.clone(), entry);
        return true;
    }
    let key = entry.key;
    let empty = || Entry { key, node: Node::table(Table::default(), key) };
    let mut node = &mut table.entry(first.clone()).or_insert_with(empty).node;
    let mut rest = rest;
    while let [Step::Index(index), after @ ..] = rest {
        let Data::Array(items) = &mut node.data else { return false };
        let Some(item) = items.get_mut(*index) else { return false };
        if after.is_empty() {
            *item = entry.node;
            return true;
        }
        node = item;
        rest = after;
    }
    if node.as_table().is_none() {
        *node = Node::table(Table::default(), key);
    }
    match &mut node.data {
        Data::Table(inner) => insert(inner, rest, entry),
        _ => false,
    }
}
