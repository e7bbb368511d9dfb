//! Documentation of every kind, generated from what the kinds say of themselves.

use std::fmt::Write;

use rlflow_api::{Arity, Kind};
use serde_json::Value;

use crate::{
    Registry,
    workflow::{
        shape::{Mark, SettingsShape, ShapeId},
        validate::type_text,
    },
};

/// Deepest table of settings that is written out.
const MAX_DEPTH: usize = 6;

/// Where a setting belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In the action key: it can change the result.
    Key,
    /// Never in a key: where a stage runs, how fast, what it logs and keeps.
    Execution,
    /// Never in a key: it names data files, whose contents are in the key instead.
    Path,
}

impl Place {
    /// As the documentation calls it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Key => "key",
            Self::Execution => "execution",
            Self::Path => "path",
        }
    }
}

/// One setting of a kind in the table of what enters a key and what does not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyEntry {
    /// Kind.
    pub kind: &'static str,
    /// Dotted path; `[]` stands for every item of a list.
    pub setting: String,
    /// Where it belongs.
    pub place: Place,
}

/// The table of every setting of every kind with its place, from the kinds' schemas: the part of the table in
/// [`crate::action_key`] that differs from kind to kind. [`kinds_markdown`] writes it out.
pub fn key_table(registry: &Registry) -> Vec<KeyEntry> {
    let mut table = Vec::new();
    for kind in registry.iter() {
        let Some(shape) = registry.shape(kind.name()) else { continue };
        let mut rows = Vec::new();
        settings_rows(&shape, shape.root, "", None, None, 0, &mut rows);
        table.extend(rows.into_iter().map(|row| KeyEntry { kind: kind.name(), setting: row.setting, place: row.place }));
    }
    table
}

/// A row of a kind's table of settings.
struct Row {
    setting: String,
    place: Place,
    text: String,
}

/// Every kind of `registry` as Markdown: ports, settings, metrics.
pub fn kinds_markdown(registry: &Registry) -> String {
    let mut text = String::from(
        "# Stage kinds\n\n\
         Settings marked *key* are part of a result's identity: changing one reruns the stage. *execution* settings only say where or\n\
         how fast, and *path* settings name data files, whose contents are in the key instead. Beside its settings every stage has\n\
         `kind`, `inputs`, `seed` (the workflow's unless it says otherwise) and `matrix`. A key holds the kind with its version, the\n\
         settings marked *key*, the seed where results depend on it, and the digests of inputs and data files; nothing else.\n",
    );
    for kind in registry.iter() {
        let Some(shape) = registry.shape(kind.name()) else { continue };
        write_kind(&mut text, kind, &shape);
    }
    text
}

fn write_kind(text: &mut String, kind: &dyn Kind, shape: &SettingsShape) {
    let seed = if kind.draws() { "Its results depend on the seed." } else { "Its results do not depend on the seed." };
    let _ = writeln!(text, "\n## `{}`\n\n{} {seed} Version {}.", kind.name(), kind.summary(), kind.version());
    if !kind.inputs().is_empty() {
        let _ = writeln!(text, "\n| input | takes | how many | |\n|---|---|---|---|");
        for port in kind.inputs() {
            let types: Vec<_> = port.types.iter().map(|kind| format!("`{kind}`")).collect();
            let from: Vec<_> = port.kinds.iter().map(|kind| format!("`{kind}`")).collect();
            let from = if from.is_empty() { String::new() } else { format!(" of {}", from.join(" or ")) };
            let arity = match port.arity {
                Arity::One => "one",
                Arity::Optional => "optional",
                Arity::Many => "one or more",
            };
            let _ = writeln!(text, "| `{}` | {}{from} | {arity} | {} |", port.name, types.join(" or "), cell(port.doc));
        }
    }
    if !kind.outputs().is_empty() {
        let _ = writeln!(text, "\n| output | makes | |\n|---|---|---|");
        for port in kind.outputs() {
            let types: Vec<_> = port.types.iter().map(|kind| format!("`{kind}`")).collect();
            let _ = writeln!(text, "| `{}` | {} | {} |", port.name, types.join(" or "), cell(port.doc));
        }
    }
    let mut rows = Vec::new();
    settings_rows(shape, shape.root, "", None, None, 0, &mut rows);
    if !rows.is_empty() {
        let _ = writeln!(text, "\n| setting | takes | default | unit | in | |\n|---|---|---|---|---|---|");
        rows.iter().for_each(|row| {
            let _ = writeln!(text, "{}", row.text);
        });
    }
    if !kind.metrics().is_empty() {
        let _ = writeln!(text, "\n| metric | |\n|---|---|");
        for (name, doc) in kind.metrics() {
            let _ = writeln!(text, "| `{name}` | {} |", cell(doc));
        }
    }
}

/// One row per setting, tables after themselves. `defaults` is what the table above says of its content.
fn settings_rows(
    shape: &SettingsShape,
    id: ShapeId,
    prefix: &str,
    defaults: Option<&Value>,
    mark: Option<Mark>,
    depth: usize,
    rows: &mut Vec<Row>,
) {
    for (name, &field) in &shape[id].fields {
        let path = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
        let setting = &shape[field];
        let mark = mark.or(setting.mark);
        let default = setting.default.as_ref().or_else(|| defaults?.get(name));
        let required = default.is_none() && requires(shape, id, name, 0);
        // A table that has rows of its own needs no default: its rows have them.
        let has_rows = depth < MAX_DEPTH && !setting.fields.is_empty();
        let shown = match default {
            _ if required => "required".to_owned(),
            None | Some(Value::Null) => String::new(),
            Some(Value::Object(_)) if has_rows => String::new(),
            Some(value) => format!("`{}`", toml_text(value)),
        };
        let place = match mark {
            None => Place::Key,
            Some(Mark::Execution) => Place::Execution,
            Some(Mark::Path) => Place::Path,
        };
        let text = format!(
            "| `{path}` | {} | {shown} | {} | {} | {} |",
            cell(&type_text(shape, field)),
            setting.unit.as_deref().unwrap_or(""),
            place.name(),
            cell(setting.doc.as_deref().unwrap_or(""))
        );
        rows.push(Row { setting: path.clone(), place, text });
        if has_rows {
            settings_rows(shape, field, &path, default, mark, depth + 1, rows);
        }
        if let Some(element) = setting.element.filter(|element| depth < MAX_DEPTH && !shape[*element].fields.is_empty()) {
            settings_rows(shape, element, &format!("{path}[]"), None, mark, depth + 1, rows);
        }
    }
}

/// Whether a table, or what it refers to, requires `name`.
fn requires(shape: &SettingsShape, id: ShapeId, name: &str, depth: usize) -> bool {
    let table = &shape[id];
    table.required.iter().any(|required| required == name)
        || depth < MAX_DEPTH && table.all_of.iter().any(|part| requires(shape, *part, name, depth + 1))
}

/// A default as it would be written in a workflow.
fn toml_text(value: &Value) -> String {
    match value {
        Value::Object(object) => {
            let entries: Vec<_> = object.iter().map(|(key, value)| format!("{key} = {}", toml_text(value))).collect();
            format!("{{ {} }}", entries.join(", "))
        }
        Value::Array(items) => format!("[{}]", items.iter().map(toml_text).collect::<Vec<_>>().join(", ")),
        value => value.to_string(),
    }
}

/// Text that fits into one cell of a table.
fn cell(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::registry;

    #[test]
    fn every_setting_port_and_metric_is_listed() {
        insta::assert_snapshot!("kinds", kinds_markdown(&registry()));
    }
}
