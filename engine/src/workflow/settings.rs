use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
};

use rlflow_api::{DeviceChoice, DeviceSpec, ErasedStage, Kind, Problem};
use serde_json::Value;

use super::{
    WorkflowError,
    declare::{Declared, Header, STRUCTURE},
    error::Collector,
    identity::IdentitySettings,
    node::{Data, Node, Table, merge, span_of_path, split_path, table_to_json},
    shape::{SettingsShape, ShapeId},
    source::Span,
    validate::{Finding, validate},
};
use crate::{Registry, suggest::did_you_mean};

/// What lies under the settings of every stage of one kind: defaults of the edition, then `[defaults]`.
pub(crate) struct Layer {
    pub shape: Arc<SettingsShape>,
    under: Table,
}

/// Prepares what lies under the stages, and reports defaults that no stage has a use for.
pub(crate) fn layers(header: &Header, declared: &[Declared], registry: &Registry, errors: &mut Collector) -> HashMap<&'static str, Layer> {
    let mut layers = HashMap::new();
    let mut used = HashSet::new();
    for kind in declared.iter().filter_map(|stage| stage.kind) {
        if layers.contains_key(kind.name()) {
            continue;
        }
        let Some(shape) = registry.shape(kind.name()) else { continue };
        let mut under = match Node::from_json(&kind.edition_defaults(header.edition)).data {
            Data::Table(table) => table,
            _ => Table::default(),
        };
        merge(&mut under, applicable(&shape, shape.root, &header.defaults, &mut used));
        layers.insert(kind.name(), Layer { shape, under });
    }
    // A stage of an unknown kind may be the one that a default is for; that kind was reported already.
    let unsure = declared.iter().any(|stage| stage.kind.is_none());
    let shapes: Vec<Arc<SettingsShape>> = if unsure {
        registry.iter().filter_map(|kind| registry.shape(kind.name())).collect()
    } else {
        layers.values().map(|layer| layer.shape.clone()).collect()
    };
    if unsure {
        shapes.iter().for_each(|shape| {
            applicable(shape, shape.root, &header.defaults, &mut used);
        });
    }
    if !declared.is_empty() {
        let at: Vec<(&SettingsShape, ShapeId)> = shapes.iter().map(|shape| (shape.as_ref(), shape.root)).collect();
        report_unused(&header.defaults, "", &at, &used, registry, errors);
    }
    layers
}

/// The part of `defaults` that `id` has settings for.
fn applicable(shape: &SettingsShape, id: ShapeId, defaults: &Table, used: &mut HashSet<Span>) -> Table {
    let mut found = Table::default();
    for (key, entry) in defaults {
        let Some(field) = shape[id].fields.get(key) else { continue };
        // An empty table says that the setting is there (`lora = {}`): there is nothing in it to choose from.
        match entry.node.as_table().filter(|table| !table.is_empty() && !shape[*field].fields.is_empty()) {
            Some(inner) => {
                let inner = applicable(shape, *field, inner, used);
                if !inner.is_empty() {
                    let node = Node::table(inner, entry.node.span);
                    found.insert(key.clone(), super::node::Entry { key: entry.key, node });
                }
            }
            None => {
                used.insert(entry.key);
                found.insert(key.clone(), entry.clone());
            }
        }
    }
    found
}

fn report_unused(
    defaults: &Table,
    prefix: &str,
    at: &[(&SettingsShape, ShapeId)],
    used: &HashSet<Span>,
    registry: &Registry,
    errors: &mut Collector,
) {
    for (key, entry) in defaults.iter().filter(|(_, entry)| !used.contains(&entry.key)) {
        let path = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
        let inner: Vec<_> = at.iter().filter_map(|(shape, id)| Some((*shape, *shape[*id].fields.get(key)?))).collect();
        if let (Some(table), false) = (entry.node.as_table(), inner.is_empty()) {
            report_unused(table, &path, &inner, used, registry, errors);
            continue;
        }
        let error = WorkflowError::new("unknown_key", format!("no stage of this workflow has a setting `{path}`"));
        let mut known: Vec<&str> = at.iter().flat_map(|(shape, id)| shape[*id].fields.keys()).map(String::as_str).collect();
        known.sort_unstable();
        known.dedup();
        let hint = match key.as_str() {
            "seed" if prefix.is_empty() => Some("`seed` stands at the top of the file, outside of `[defaults]`".to_owned()),
            _ => did_you_mean(key, known),
        };
        let hint = hint.or_else(|| {
            let having = registry.iter().filter(|kind| {
                registry.shape(kind.name()).is_some_and(|shape| prefix.is_empty() && shape[shape.root].fields.contains_key(key))
            });
            let names: Vec<_> = having.map(|kind| format!("`{}`", kind.name())).collect();
            (!names.is_empty()).then(|| format!("kinds that have it: {}", names.join(", ")))
        });
        errors.add(
            entry.key,
            match hint {
                Some(hint) => error.with_hint(hint),
                None => error,
            },
        );
    }
}

/// Settings of one expanded stage, checked.
pub(crate) struct Checked {
    /// Made of what is right in settings that are not, if there are errors: good for finding its files only.
    pub config: Option<ErasedStage>,
    pub identity: IdentitySettings,
    /// Settings as written, over what lies under them: to find the place of a problem.
    pub written: Table,
    pub errors: Vec<(Span, WorkflowError)>,
}

impl Checked {
    /// Whether anything was wrong.
    pub fn is_broken(&self) -> bool {
        !self.errors.is_empty()
    }
}

/// Checks one stage's own settings over `layer`.
pub(crate) fn check(stage: &str, span: Span, own: Table, kind: &'static dyn Kind, layer: &Layer) -> Checked {
    let written = if layer.under.is_empty() {
        own
    } else {
        let mut all = layer.under.clone();
        merge(&mut all, own);
        all
    };
    let findings = validate(&layer.shape, &written, span);
    let mut errors: Vec<_> = findings.iter().map(|finding| (place(finding, span), refused(stage, kind, finding))).collect();
    let mut usable = Value::Object(table_to_json(&written));
    let mut bounded = if findings.is_empty() { Value::Null } else { usable.clone() };
    findings.iter().rev().for_each(|finding| {
        remove(&mut usable, finding);
        match &finding.nearest {
            Some(nearest) => replace(&mut bounded, finding, nearest),
            None => remove(&mut bounded, finding),
        }
    });
    // Unknown keys change nothing about the rest; a wrong value leaves a gap.
    let wrong: Vec<&Finding> = findings.iter().filter(|finding| finding.code != "unknown_key").collect();
    let mut config = match kind.parse(&usable) {
        Ok(config) => Some(config),
        Err(_) if !findings.is_empty() => None,
        Err(message) => {
            let at = quoted_names(&message).iter().find_map(|name| span_of_path(&written, name)).unwrap_or(span);
            errors.push((at, WorkflowError::new("wrong_type", format!("stage `{stage}`: {message}"))));
            None
        }
    };
    let mut identity = IdentitySettings::default();
    if let Some(config) = &mut config {
        if errors.is_empty() {
            identity = IdentitySettings::of(&layer.shape, config.settings(), &kind.horizon(config));
        }
        config.forget_settings();
        let config = &*config;
        let mut between = kind.check(config);
        if !wrong.is_empty() {
            // Nobody knows what was meant instead: what is told must be so whatever that is, and not about it.
            let at_bounds = kind.parse(&bounded).map(|config| kind.check(&config)).unwrap_or_default();
            between.retain(|problem| at_bounds.contains(problem) && !wrong.iter().any(|finding| concerns(problem, finding)));
        }
        for problem in between.iter().chain(&device_problems(kind, config)) {
            errors.push(problem_error(stage, span, &written, &BTreeMap::new(), problem));
        }
    }
    Checked { config, identity, written, errors }
}

/// Where a finding is shown: where it is written, or at the stage where nobody wrote it.
fn place(finding: &Finding, stage: Span) -> Span {
    if finding.span == Span::NOWHERE { stage } else { finding.span }
}

fn refused(stage: &str, kind: &dyn Kind, finding: &Finding) -> WorkflowError {
    let about = if finding.code == "unknown_key" { format!(" (kind `{}`)", kind.name()) } else { String::new() };
    let colon = if matches!(finding.code, "unknown_key" | "missing_setting") { "" } else { ":" };
    let message = format!("stage `{stage}`{about}{colon} {}", finding.message);
    let hint = match finding.path.as_str() {
        path if finding.code == "unknown_key" && kind.inputs().iter().any(|port| port.name == path) => {
            Some(format!("`{path}` is an input: `inputs = {{ {path} = ... }}`"))
        }
        path if finding.code == "unknown_key" => finding.hint.clone().or_else(|| did_you_mean(path, STRUCTURE)),
        _ => finding.hint.clone(),
    };
    match hint {
        Some(hint) => WorkflowError::new(finding.code, message).with_hint(hint),
        None => WorkflowError::new(finding.code, message),
    }
}

/// Takes what a finding is about out of `settings`.
fn remove(settings: &mut Value, finding: &Finding) {
    if finding.code == "missing_setting" {
        return;
    }
    let (parent, last) = finding.path.rsplit_once('.').unwrap_or(("", &finding.path));
    let mut at = Some(settings);
    for step in split_path(parent) {
        at = at.and_then(|value| match step {
            super::node::Step::Key(key) => value.get_mut(key),
            super::node::Step::Index(index) => value.get_mut(index),
        });
    }
    if let Some(Value::Object(object)) = at {
        object.shift_remove(last.split('[').next().unwrap_or(last));
    }
}

/// Puts `value` where a finding is.
fn replace(settings: &mut Value, finding: &Finding, value: &Value) {
    let mut at = Some(settings);
    for step in split_path(&finding.path) {
        at = at.and_then(|inner| match step {
            super::node::Step::Key(key) => inner.get_mut(key),
            super::node::Step::Index(index) => inner.get_mut(index),
        });
    }
    if let Some(at) = at {
        *at = value.clone();
    }
}

/// Whether a problem is about the setting of a finding, or mentions it.
fn concerns(problem: &Problem, finding: &Finding) -> bool {
    let name = finding.path.rsplit('.').next().and_then(|name| name.split('[').next()).unwrap_or_default();
    let mentions = |text: &str| text.split(|character: char| !character.is_alphanumeric() && character != '_').any(|word| word == name);
    let inside = |path: &str, of: &str| path.strip_prefix(of).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']));
    inside(&problem.setting, &finding.path)
        || inside(&finding.path, &problem.setting)
        || mentions(&problem.setting)
        || mentions(&problem.message)
}

/// Names in backquotes: what serde's messages say about fields.
fn quoted_names(message: &str) -> Vec<&str> {
    message.split('`').skip(1).step_by(2).collect()
}

/// The error for something that a kind reports, at the setting or input that it names.
pub(crate) fn problem_error(
    stage: &str,
    span: Span,
    written: &Table,
    inputs: &BTreeMap<&str, Vec<Span>>,
    problem: &Problem,
) -> (Span, WorkflowError) {
    let at = match problem.setting.strip_prefix("inputs.") {
        Some(port) => {
            let (name, index) = port.split_once('[').unwrap_or((port, "0"));
            let index = index.trim_end_matches(']').parse().unwrap_or(0);
            inputs.get(name).and_then(|spans| spans.get(index).or(spans.first())).copied()
        }
        None => span_of_path(written, &problem.setting),
    };
    let error = WorkflowError::new(problem.code, format!("stage `{stage}`: {}", problem.message));
    let error = match &problem.hint {
        Some(hint) => error.with_hint(hint.clone()),
        None => error,
    };
    (at.unwrap_or(span), error)
}

/// Device names, which are texts to the schema.
fn device_problems(kind: &dyn Kind, config: &ErasedStage) -> Vec<Problem> {
    let Some(execution) = kind.execution(config) else { return Vec::new() };
    let wrong = |name: &String| name != "auto" && name.parse::<DeviceSpec>().is_err();
    let hint = "devices are \"auto\", \"cpu\", \"cuda\", \"cuda:N\", a list of those, { cpu = RANKS } or { cuda = RANKS }";
    let problem = |setting: String, message: String| Problem::new("unknown_value", setting, message).hint(hint);
    match &execution.device {
        DeviceChoice::One(name) if wrong(name) => {
            vec![problem("device".into(), format!("`device` must name a device, found {}", super::node::quoted(name)))]
        }
        DeviceChoice::List(names) if names.is_empty() => vec![problem("device".into(), "`device` lists no device".into())],
        DeviceChoice::List(names) => names
            .iter()
            .enumerate()
            .filter(|(_, name)| wrong(name) || *name == "auto")
            .map(|(index, name)| {
                problem(format!("device[{index}]"), format!("`device` must list devices, found {}", super::node::quoted(name)))
            })
            .collect(),
        _ => Vec::new(),
    }
}
