//! The JSON Schema of workflow files, for editors: `rlflow schema`.

use std::collections::{BTreeMap, BTreeSet};

use rlflow_api::{Arity, InputPort, Kind};
use serde_json::{Map, Value, json};

use crate::Registry;

const REFERENCE: &str = "#/$defs/reference";

/// The JSON Schema (draft 2020-12) of a workflow file with the kinds of `registry`.
///
/// Settings that a kind requires are not required here: `[defaults]`, `matrix` and included files may give them.
pub fn workflow_schema(registry: &Registry) -> Value {
    let kinds: Vec<(&'static dyn Kind, Value)> = registry.iter().map(|kind| (kind, kind.schema().to_value())).collect();
    let mut definitions = Map::new();
    definitions.insert("reference".into(), reference());
    definitions.insert("matrix".into(), matrix());
    let shared = shared_definitions(&kinds);
    let mut branches = Vec::new();
    let mut settings: BTreeMap<String, Vec<Value>> = BTreeMap::new();
    for (kind, schema) in &kinds {
        let mut schema = schema.clone();
        rename_references(&mut schema, kind.name(), &shared);
        if let Some(Value::Object(own)) = schema.as_object_mut().and_then(|schema| schema.remove("$defs")) {
            for (name, mut definition) in own {
                close(&mut definition);
                definitions.insert(definition_name(&name, kind.name(), &shared), definition);
            }
        }
        for (name, setting) in schema.get("properties").and_then(Value::as_object).into_iter().flatten() {
            let known = settings.entry(name.clone()).or_default();
            if !known.contains(setting) {
                known.push(setting.clone());
            }
        }
        let name = format!("kind.{}", kind.name());
        branches.push(json!({ "$ref": format!("#/$defs/{name}") }));
        definitions.insert(name, stage(*kind, schema));
    }
    // A file that includes others may say a part of a stage only.
    branches.push(json!({ "type": "object", "not": { "required": ["kind"] } }));
    definitions.insert("stage".into(), json!({ "oneOf": branches }));
    definitions.insert("defaults".into(), defaults(settings));
    let size = json!({ "type": ["string", "integer"], "description": "A size: \"80 GB\", \"80 GiB\" or a number of bytes." });
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "rlflow workflow",
        "description": "A DAG of typed stages, from raw text to an aligned, evaluated model.",
        "type": "object",
        "properties": {
            "name": { "type": "string", "minLength": 1, "description": "Name of the workflow; the file's name unless said otherwise." },
            "edition": {
                "type": "integer", "minimum": 1, "maximum": registry.newest_edition(),
                "description": "Fixes the defaults of every setting, so that an upgrade reruns nothing. The newest by default."
            },
            "seed": { "type": "integer", "minimum": 0, "default": 0, "description": "Seed of every stage without one of its own." },
            "include": {
                "anyOf": [{ "type": "string" }, { "type": "array", "items": { "type": "string" } }],
                "description": "Workflow files to lay under this one, relative to it."
            },
            "devices": {
                "type": "object",
                "description": "Devices to plan with, whatever this machine has, and how much memory stages may take of them.",
                "properties": {
                    "cpu": { "type": "object", "properties": { "memory": size }, "additionalProperties": false },
                    "cuda": {
                        "type": "object",
                        "properties": { "count": { "type": "integer", "minimum": 1, "default": 1 }, "memory": size },
                        "additionalProperties": false
                    }
                },
                "additionalProperties": false
            },
            "defaults": { "$ref": "#/$defs/defaults" },
            "stage": {
                "type": "object",
                "minProperties": 1,
                "propertyNames": { "pattern": "^[A-Za-z0-9_-]+$" },
                "additionalProperties": { "$ref": "#/$defs/stage" },
                "description": "The stages, by name."
            }
        },
        "additionalProperties": false,
        "if": { "not": { "required": ["include"] } },
        "then": { "required": ["stage"], "properties": { "stage": { "additionalProperties": { "required": ["kind"] } } } },
        "$defs": definitions,
    })
}

fn reference() -> Value {
    json!({
        "type": "string",
        "pattern": "^[A-Za-z0-9_-]+(\\[.+\\])?(\\.[A-Za-z0-9_-]+)?$",
        "description": "A stage (`sft`), one of its outputs (`sft.model`), a matrix point (`dpo[beta=0.1]`) or all of them (`dpo[*]`)."
    })
}

fn matrix() -> Value {
    json!({
        "type": "object",
        "minProperties": 1,
        "additionalProperties": { "anyOf": [{ "type": "array", "minItems": 1 }, { "$ref": "#/$defs/matrix" }] },
        "description": "Settings with a list of values each: the stage, and what is below it, is expanded into one node per combination."
    })
}

/// One stage of a kind: its settings beside the structure that every stage has.
fn stage(kind: &dyn Kind, mut schema: Value) -> Value {
    let Some(object) = schema.as_object_mut() else { return schema };
    for keyword in ["$schema", "title", "required", "default"] {
        object.shift_remove(keyword);
    }
    object.insert("type".into(), "object".into());
    object.insert("description".into(), kind.summary().into());
    let settings = match object.shift_remove("properties") {
        Some(Value::Object(settings)) => settings,
        _ => Map::new(),
    };
    let mut properties = Map::new();
    properties.insert("kind".into(), json!({ "const": kind.name(), "description": kind.summary() }));
    properties.insert("inputs".into(), inputs(kind.inputs()));
    properties
        .insert("seed".into(), json!({ "type": "integer", "minimum": 0, "description": "Seed of this stage; the workflow's by default." }));
    properties.insert("matrix".into(), json!({ "$ref": "#/$defs/matrix" }));
    properties.extend(settings);
    object.insert("properties".into(), properties.into());
    object.insert("required".into(), json!(["kind"]));
    close(&mut schema);
    schema
}

fn inputs(ports: &[InputPort]) -> Value {
    let port = |port: &InputPort| {
        let types: Vec<_> = port.types.iter().map(|kind| kind.name()).collect();
        let from = if port.kinds.is_empty() { String::new() } else { format!(" from a stage of kind {}", port.kinds.join(" or ")) };
        let description = format!("{} Takes {}{from}.", port.doc, types.join(" or "));
        let schema = match port.arity {
            Arity::Many => json!({
                "anyOf": [{ "$ref": REFERENCE }, { "type": "array", "minItems": 1, "items": { "$ref": REFERENCE } }],
                "description": description
            }),
            Arity::One | Arity::Optional => json!({ "$ref": REFERENCE, "description": description }),
        };
        (port.name.to_owned(), schema)
    };
    let properties: Map<String, Value> = ports.iter().map(port).collect();
    json!({ "type": "object", "properties": properties, "additionalProperties": false, "description": "Where each input comes from." })
}

/// Any setting of any kind.
fn defaults(settings: BTreeMap<String, Vec<Value>>) -> Value {
    let one = |(name, mut schemas): (String, Vec<Value>)| {
        let schema = match schemas.len() {
            1 => schemas.remove(0),
            // Tables of several kinds merge, so that a key of one may stand beside a key of another.
            _ => json!({ "anyOf": schemas.into_iter().chain([json!({ "type": "object" })]).collect::<Vec<_>>() }),
        };
        (name, schema)
    };
    let properties: Map<String, Value> = settings.into_iter().map(one).collect();
    json!({
        "type": "object",
        "properties": properties,
        "additionalProperties": false,
        "description": "Settings laid under every stage whose kind has them. A stage's own value wins; tables merge deeply."
    })
}

/// Names of definitions that mean the same in every kind that has them.
fn shared_definitions(kinds: &[(&'static dyn Kind, Value)]) -> BTreeSet<String> {
    let mut found: BTreeMap<&str, Vec<&Value>> = BTreeMap::new();
    for (_, schema) in kinds {
        for (name, definition) in schema.get("$defs").and_then(Value::as_object).into_iter().flatten() {
            found.entry(name).or_default().push(definition);
        }
    }
    let mut shared: BTreeSet<String> =
        found.iter().filter(|(_, all)| all.windows(2).all(|pair| pair[0] == pair[1])).map(|(name, _)| (*name).to_owned()).collect();
    // What refers to something that differs differs too.
    loop {
        let differing: Vec<String> = shared
            .iter()
            .filter(|name| {
                found[name.as_str()].iter().any(|definition| references(definition).iter().any(|other| !shared.contains(*other)))
            })
            .cloned()
            .collect();
        if differing.is_empty() {
            return shared;
        }
        differing.iter().for_each(|name| {
            shared.remove(name);
        });
    }
}

fn references(schema: &Value) -> Vec<&str> {
    match schema {
        Value::Object(object) => object
            .iter()
            .flat_map(|(key, value)| match value {
                Value::String(pointer) if key == "$ref" => pointer.strip_prefix("#/$defs/").into_iter().collect(),
                value => references(value),
            })
            .collect(),
        Value::Array(items) => items.iter().flat_map(references).collect(),
        _ => Vec::new(),
    }
}

fn definition_name(name: &str, kind: &str, shared: &BTreeSet<String>) -> String {
    if shared.contains(name) { name.to_owned() } else { format!("{kind}.{name}") }
}

fn rename_references(schema: &mut Value, kind: &str, shared: &BTreeSet<String>) {
    match schema {
        Value::Object(object) => {
            for (key, value) in object {
                match value {
                    Value::String(pointer) if key == "$ref" => {
                        if let Some(name) = pointer.strip_prefix("#/$defs/") {
                            *pointer = format!("#/$defs/{}", definition_name(name, kind, shared));
                        }
                    }
                    value => rename_references(value, kind, shared),
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| rename_references(item, kind, shared)),
        _ => {}
    }
}

/// Forbids keys that a table does not name, which `#[serde(flatten)]` keeps schemars from doing.
fn close(schema: &mut Value) {
    match schema {
        Value::Object(object) => {
            let composed = ["allOf", "anyOf", "oneOf", "$ref"].iter().any(|keyword| object.contains_key(*keyword));
            let is_table = object.get("properties").is_some_and(Value::is_object);
            for (key, value) in object.iter_mut() {
                match (key.as_str(), value) {
                    // Parts of one table leave closing to their whole.
                    ("allOf" | "anyOf" | "oneOf", _) if is_table => {}
                    ("default" | "const" | "enum", _) => {}
                    (_, value) => close(value),
                }
            }
            let said = object.contains_key("additionalProperties") || object.contains_key("unevaluatedProperties");
            if is_table && !said {
                let keyword = if composed { "unevaluatedProperties" } else { "additionalProperties" };
                object.insert(keyword.into(), false.into());
            }
        }
        Value::Array(items) => items.iter_mut().for_each(close),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        testing::registry,
        workflow::{shape::SettingsShape, source::Span, validate::validate},
    };

    /// Every reference leads somewhere.
    #[test]
    fn references_resolve() {
        let schema = workflow_schema(&registry());
        let definitions = schema["$defs"].as_object().unwrap();
        for name in references(&schema) {
            assert!(definitions.contains_key(name), "{name}");
        }
        assert!(definitions.contains_key("Execution") || !references(&schema).contains(&"Execution"));
        assert!(definitions.contains_key("Train"), "the same type of two kinds is defined once");
    }

    /// What loads fits the schema, and what does not name its settings rightly does not.
    #[test]
    fn schema_agrees_with_loading() {
        let mut schema = workflow_schema(&registry());
        // Without the branch for parts of stages, whose `not` the engine's own checker does not know.
        schema["$defs"]["stage"]["oneOf"].as_array_mut().unwrap().pop();
        let shape = SettingsShape::compile(&schema);
        let found = |text: &str| {
            let table = toml::de::DeTable::parse(text).unwrap();
            validate(&shape, &crate::workflow::node::table_from_toml(table.get_ref(), 0), Span::NOWHERE)
        };
        let good = "seed = 3\n[defaults]\ndevice = \"cpu\"\n[stage.a]\nkind = \"ppo.actor\"\nzero = \"auto\"\ninputs = { model = \"b\" }\n";
        assert!(found(good).is_empty(), "{:?}", found(good));
        for (from, to) in
            [("zero", "zeroo"), ("\"auto\"", "7"), ("ppo.actor", "ppo.actr"), ("model", "modle"), ("seed", "sed"), ("device", "devic")]
        {
            assert!(!found(&good.replace(from, to)).is_empty(), "{from} -> {to}");
        }
    }
}
