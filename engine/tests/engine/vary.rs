//! Changes every setting of every stage of a workflow, one at a time, as its schema allows: so that no setting, new
//! ones included, can be forgotten by tests of what belongs to a result's identity.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use rlflow_engine::{
    Registry,
    docs::{KeyEntry, Place, key_table, kinds_markdown},
    settings::flatten,
    workflow::{LoadOptions, Workflow, load},
};
use serde_json::{Map, Value, json};

/// How the schema marks a setting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mark {
    Identity,
    Execution,
    Path,
}

/// A setting that was changed, with the workflow that came of it.
pub struct Varied {
    pub stage: usize,
    pub setting: String,
    pub mark: Mark,
    /// `None` if no other value is allowed together with the rest.
    pub workflow: Option<Workflow>,
}

/// The workflow with every default written out, as a file in `folder`. Data paths are made absolute.
pub fn spell_out(workflow: &Workflow) -> Value {
    let mut stages = Map::new();
    for stage in &workflow.stages {
        let mut table = stage.config.settings().clone();
        absolute_paths(&mut table, &stage.kind.schema().to_value(), &workflow.folder);
        table["kind"] = json!(stage.kind.name());
        table["seed"] = json!(stage.seed);
        let inputs: Map<String, Value> = stage
            .inputs
            .iter()
            .map(|(port, edges)| {
                let name = |edge: &rlflow_engine::workflow::Edge| format!("{}.{}", workflow.stages[edge.stage].name, edge.port);
                let names: Vec<String> = edges.iter().map(name).collect();
                let many = stage.kind.inputs().iter().any(|input| input.name == port && input.arity == rlflow_api::Arity::Many);
                (port.clone(), if many { json!(names) } else { json!(names[0]) })
            })
            .collect();
        table["inputs"] = Value::Object(inputs);
        stages.insert(stage.name.clone(), table);
    }
    json!({ "name": workflow.name, "edition": workflow.edition, "seed": workflow.seed, "stage": stages })
}

/// Writes a workflow and loads it. The error is its report.
pub fn write_and_load(workflow: &Value, file: &Path, registry: &Registry) -> Result<Workflow, String> {
    let text = toml::to_string(&without_nulls(workflow)).map_err(|error| error.to_string())?;
    fs::write(file, text).map_err(|error| error.to_string())?;
    load(file, &LoadOptions::default(), registry).map_err(|errors| errors.to_string())
}

/// Every setting of every stage that `wanted` takes, changed alone.
pub fn vary(workflow: &Workflow, file: &Path, registry: &Registry, wanted: impl Fn(&str) -> bool) -> Vec<Varied> {
    let spelled = spell_out(workflow);
    let mut varied = Vec::new();
    for (index, stage) in workflow.stages.iter().enumerate().filter(|(_, stage)| wanted(&stage.name)) {
        let schema = stage.kind.schema().to_value();
        let mut settings = stage.config.settings().clone();
        absolute_paths(&mut settings, &schema, &workflow.folder);
        let mut leaves = Vec::new();
        list_leaves(&schema, &schema, Some(&settings), String::new(), &mut leaves);
        for (setting, value) in leaves {
            let found = find(&schema, &schema, &setting);
            let others = match found.mark {
                Mark::Path => Vec::new(),
                _ => candidates(&value, &found.schemas),
            };
            let with = |setting: &str, other: Value| {
                let mut changed = spelled.clone();
                *at(&mut changed["stage"][&stage.name], setting)? = other;
                write_and_load(&changed, file, registry).ok()
            };
            let changed = others.into_iter().find_map(|other| with(&setting, other));
            // What names the variant of a union changes with the rest of its table.
            let changed = changed.or_else(|| {
                let (table, tag) = setting.rsplit_once('.')?;
                variants(&schema, table, tag).into_iter().filter(|other| other[tag] != value).find_map(|other| with(table, other))
            });
            varied.push(Varied { stage: index, setting, mark: found.mark, workflow: changed });
        }
    }
    varied
}

/// Checks that the table of what enters a key, and the documentation, have every setting of every kind at its place.
pub fn check_key_table(registry: &Registry) -> Vec<KeyEntry> {
    let table = key_table(registry);
    let documented = kinds_markdown(registry);
    for kind in registry.iter() {
        let place = |mark| match mark {
            Mark::Identity => Place::Key,
            Mark::Execution => Place::Execution,
            Mark::Path => Place::Path,
        };
        let settings = every_setting(&kind.schema().to_value()).into_iter();
        let expected: BTreeMap<String, Place> = settings.map(|(setting, mark)| (setting, place(mark))).collect();
        let entries = table.iter().filter(|entry| entry.kind == kind.name());
        let listed: BTreeMap<String, Place> = entries.map(|entry| (entry.setting.clone(), entry.place)).collect();
        assert_eq!(listed, expected, "{}", kind.name());
        for (setting, place) in listed {
            let is_row = |line: &&str| line.starts_with(&format!("| `{setting}` |")) && line.contains(&format!("| {} |", place.name()));
            assert!(documented.lines().any(|line| is_row(&line)), "{}: `{setting}` is not documented as {}", kind.name(), place.name());
        }
    }
    table
}

/// Every setting that a kind's schema names, tables and lists of tables with what is in them, and its mark.
fn every_setting(schema: &Value) -> BTreeMap<String, Mark> {
    let mut found = BTreeMap::new();
    list_settings(schema, schema, "", None, 0, &mut found);
    found
}

fn list_settings(root: &Value, schema: &Value, path: &str, mark: Option<Mark>, depth: usize, found: &mut BTreeMap<String, Mark>) {
    assert!(depth < 12, "{path}: settings refer to themselves");
    for schema in alternatives(root, schema) {
        for (name, setting) in schema["properties"].as_object().into_iter().flatten() {
            let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
            let mark = mark.or_else(|| alternatives(root, setting).iter().find_map(mark_of));
            found.insert(path.clone(), mark.unwrap_or(Mark::Identity));
            list_settings(root, setting, &path, mark, depth + 1, found);
        }
        if let Some(items) = schema.get("items") {
            list_settings(root, items, &format!("{path}[]"), mark, depth + 1, found);
        }
    }
}

fn without_nulls(value: &Value) -> Value {
    match value {
        Value::Object(object) => Value::Object(
            object.iter().filter(|(_, value)| !value.is_null()).map(|(name, value)| (name.clone(), without_nulls(value))).collect(),
        ),
        Value::Array(items) => items.iter().map(without_nulls).collect(),
        other => other.clone(),
    }
}

/// Steps of a dotted path: `sources[0].path` is `sources`, `0`, `path`.
fn steps(path: &str) -> Vec<&str> {
    path.split(['.', '[', ']']).filter(|step| !step.is_empty()).collect()
}

/// The value at a path; null is put where a table lacks it.
fn at<'a>(value: &'a mut Value, path: &str) -> Option<&'a mut Value> {
    steps(path).into_iter().try_fold(value, |value, step| match value {
        Value::Array(items) => items.get_mut(step.parse::<usize>().ok()?),
        Value::Object(object) => Some(object.entry(step).or_insert(Value::Null)),
        _ => None,
    })
}

/// Every setting with its value, those that are left out (null) too: tables and lists of tables are opened.
fn list_leaves(root: &Value, schema: &Value, value: Option<&Value>, path: String, leaves: &mut Vec<(String, Value)>) {
    let schemas = alternatives(root, schema);
    match value {
        Some(Value::Object(object)) => {
            let named = schemas.iter().filter_map(|schema| schema["properties"].as_object()).flat_map(|properties| properties.keys());
            let names: BTreeSet<&String> = named.chain(object.keys()).collect();
            for name in names {
                let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                let members = schemas.iter().filter_map(|schema| schema["properties"].get(name));
                let member = json!({ "anyOf": members.collect::<Vec<_>>() });
                list_leaves(root, &member, object.get(name), path, leaves);
            }
        }
        Some(Value::Array(items)) if items.iter().any(Value::is_object) => {
            leaves.push((path.clone(), Value::Array(items.clone())));
            for (index, item) in items.iter().enumerate() {
                let member = json!({ "anyOf": schemas.iter().filter_map(|schema| schema.get("items")).collect::<Vec<_>>() });
                list_leaves(root, &member, Some(item), format!("{path}[{index}]"), leaves);
            }
        }
        value => leaves.push((path, value.cloned().unwrap_or(Value::Null))),
    }
}

struct Found {
    mark: Mark,
    /// Every schema that describes the setting: alternatives of `anyOf` and the like apart.
    schemas: Vec<Value>,
}

fn mark_of(schema: &Value) -> Option<Mark> {
    match schema["x-setting"].as_str()? {
        "execution" => Some(Mark::Execution),
        "path" => Some(Mark::Path),
        _ => None,
    }
}

/// A schema with its references followed and its alternatives listed.
fn alternatives(root: &Value, schema: &Value) -> Vec<Value> {
    let mut found = vec![schema.clone()];
    if let Some(name) = schema["$ref"].as_str().and_then(|reference| reference.strip_prefix("#/$defs/")) {
        found.extend(alternatives(root, &root["$defs"][name]));
    }
    for word in ["anyOf", "oneOf", "allOf"] {
        found.extend(schema[word].as_array().into_iter().flatten().flat_map(|schema| alternatives(root, schema)));
    }
    found
}

fn find(root: &Value, schema: &Value, path: &str) -> Found {
    let mut schemas = alternatives(root, schema);
    let mut mark = None;
    for step in steps(path) {
        let member = |schema: &Value| match step.parse::<usize>() {
            Ok(_) => schema["items"].clone(),
            Err(_) => schema["properties"][step].clone(),
        };
        schemas = schemas.iter().map(member).filter(|member| !member.is_null()).flat_map(|member| alternatives(root, &member)).collect();
        mark = mark.or_else(|| schemas.iter().find_map(mark_of));
    }
    Found { mark: mark.unwrap_or(Mark::Identity), schemas }
}

/// Other values of a setting, likely ones first.
fn candidates(value: &Value, schemas: &[Value]) -> Vec<Value> {
    let mut others = Vec::new();
    for schema in schemas {
        others.extend(schema["enum"].as_array().into_iter().flatten().cloned());
        others.extend(schema.get("const").cloned());
    }
    match value {
        Value::Bool(value) => others.push(json!(!value)),
        Value::Number(number) if number.is_f64() => {
            let value = number.as_f64().unwrap_or_default();
            others.extend([value * 0.5, value + 0.125, value + 1.0, value - 0.125].map(Value::from));
        }
        Value::Number(number) => {
            let value = number.as_i64().unwrap_or_default();
            others.extend([value + 1, value - 1, value * 2, value / 2, value * 4, value + 256].map(Value::from));
        }
        Value::String(_) => others.extend(["cpu", "other", "0.5"].map(Value::from)),
        Value::Array(items) if items.iter().any(Value::is_object) => {
            others.push(Value::Array(items.iter().chain(items.first()).cloned().collect()));
            others.push(Value::Array(items[1..].to_vec()));
        }
        Value::Array(items) => {
            for at in 0..items.len() {
                for other in candidates(&items[at], &[]) {
                    let mut items = items.clone();
                    items[at] = other;
                    others.push(Value::Array(items));
                }
            }
            others.extend([json!(["other"]), json!([1])]);
        }
        Value::Null | Value::Object(_) => {}
    }
    let takes = |name: &str| {
        schemas.iter().any(|schema| schema["type"] == name || schema["type"].as_array().is_some_and(|types| types.contains(&json!(name))))
    };
    // What is out of the usual range of counts.
    for bound in ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"] {
        let bounds =
            schemas.iter().filter_map(|schema| schema.get(bound)).filter(|bound| bound.as_f64().is_some_and(|bound| bound.abs() < 1e9));
        for bound in bounds {
            others.push(if takes("integer") { json!(bound.as_f64().unwrap_or_default() as i64) } else { bound.clone() });
        }
    }
    if takes("boolean") {
        others.extend([json!(true), json!(false)]);
    }
    if takes("integer") {
        others.extend([1, 2, 4, 8, 0].map(Value::from));
    }
    if takes("number") {
        others.extend([0.5, 0.25, 1.0, 2.0, 0.0].map(Value::from));
    }
    if takes("string") {
        others.extend(["other", "{{ messages }}"].map(Value::from));
    }
    if takes("array") {
        others.extend([json!(["other"]), json!([])]);
    }
    if takes("object") {
        others.push(json!({}));
    }
    others.retain(|other| other != value);
    others
}

/// The smallest table of each variant of the union at `table`, told apart by `tag`.
fn variants(root: &Value, table: &str, tag: &str) -> Vec<Value> {
    let variants = find(root, root, table).schemas.into_iter().filter(|schema| schema["properties"][tag].get("const").is_some());
    let smallest = |variant: Value| {
        let required = variant["required"].as_array()?.iter().filter_map(Value::as_str);
        let field = |name: &str| {
            let schemas = alternatives(root, &variant["properties"][name]);
            Some((name.to_owned(), candidates(&Value::Null, &schemas).into_iter().next()?))
        };
        required.map(field).collect::<Option<Map<_, _>>>().map(Value::Object)
    };
    variants.filter_map(smallest).collect()
}

/// Makes data paths absolute, so that the file can stand in another folder.
fn absolute_paths(settings: &mut Value, schema: &Value, folder: &Path) {
    let folder = folder.canonicalize().expect("the workflow's folder is there");
    let paths: Vec<String> = flatten(settings).into_keys().filter(|path| find(schema, schema, path).mark == Mark::Path).collect();
    for path in paths {
        if let Some(value) = at(settings, &path)
            && let Some(text) = value.as_str()
        {
            *value = json!(folder.join(text));
        }
    }
}
