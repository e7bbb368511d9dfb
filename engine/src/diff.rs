use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use rlflow_store::{ActionRecord, Digest, Store};

use crate::{
    Host, Result,
    history::PastRun,
    metrics::results,
    settings::{Change, changes, flatten},
    workflow::{Edge, Workflow},
};

/// How a kind's implementation version is called here.
const VERSION: &str = "implementation version";

/// One side of a comparison: stages by name.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Side {
    /// How it is called in the output.
    pub label: String,
    /// Its stages.
    pub stages: BTreeMap<String, Part>,
}

/// What is compared of a stage.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Part {
    /// Action key, where known.
    pub key: Option<Digest>,
    /// What may differ beside inputs: kind, implementation version, seed, settings, files.
    pub facts: Value,
    /// Port to stages, with the digests of what they gave where that is known.
    pub inputs: BTreeMap<String, Vec<(String, Option<Digest>)>>,
    /// Settings in the key, by path.
    pub identity: BTreeSet<String>,
    /// Final metrics and measured values; empty if it never ran.
    pub metrics: BTreeMap<String, f64>,
}

impl Part {
    /// Of a stored result.
    pub fn of_record(record: &ActionRecord) -> Self {
        let made = &record.provenance;
        let files: BTreeMap<&str, String> = made.files.iter().map(|(name, digest)| (name.as_str(), digest.short())).collect();
        let key = &record.full_key;
        Self {
            key: Some(record.key),
            facts: facts(&key["kind"], &key["version"], &key["seed"], &made.settings, files),
            inputs: (made.inputs.iter())
                .map(|(port, made)| (port.clone(), made.iter().map(|(stage, digest)| (stage.clone(), Some(*digest))).collect()))
                .collect(),
            identity: flatten(&key["settings"]).into_keys().collect(),
            metrics: metrics(record),
        }
    }
}

fn metrics(record: &ActionRecord) -> BTreeMap<String, f64> {
    let mut metrics = record.metrics.clone();
    metrics.extend(record.provenance.measurements.clone());
    metrics
}

/// Names with dots (of files) are not opened into paths, so files are a list of `name digest`.
fn facts(kind: &Value, version: &Value, seed: &Value, settings: &Value, files: BTreeMap<&str, String>) -> Value {
    let files: Vec<String> = files.into_iter().map(|(name, digest)| format!("{name} {digest}")).collect();
    let mut facts = settings.clone();
    if !facts.is_object() {
        facts = json!({});
    }
    for (name, value) in [("kind", kind), (VERSION, version), ("seed", seed)] {
        facts[name] = value.clone();
    }
    if !files.is_empty() {
        facts["files"] = json!(files);
    }
    facts
}

impl Side {
    /// A workflow as it stands, with the metrics of today's results (or the last ones) where there are any.
    pub fn of_workflow(label: &str, workflow: &Workflow, store: &Store, host: &Host, only: Option<&[usize]>) -> Result<Self> {
        let all: Vec<usize> = (0..workflow.stages.len()).collect();
        let wanted = only.unwrap_or(&all);
        let mut found: BTreeMap<usize, (bool, ActionRecord)> =
            results(workflow, store, host, wanted)?.into_iter().map(|(stage, stale, record)| (stage, (stale, record))).collect();
        let mut stages = BTreeMap::new();
        for index in wanted {
            let stage = &workflow.stages[*index];
            let current = found.remove(index).filter(|(stale, _)| !stale).map(|(_, record)| record);
            let input = |(port, edges): (&String, &Vec<Edge>)| {
                let made = current.as_ref().and_then(|record| record.provenance.inputs.get(port));
                let digest = |at: usize| made.and_then(|made| made.get(at)).map(|(_, digest)| *digest);
                let edges = edges.iter().enumerate();
                (port.clone(), edges.map(|(at, edge)| (workflow.stages[edge.stage].name.clone(), digest(at))).collect())
            };
            let inputs = stage.inputs.iter().map(input).collect();
            let mut files = BTreeMap::new();
            let names: Vec<(String, String)> = stage
                .files
                .iter()
                .flatten()
                .map(|path| {
                    let name = path.strip_prefix(&workflow.folder).unwrap_or(path).to_string_lossy().into_owned();
                    Ok((name, store.file_digest(path)?.digest.short()))
                })
                .collect::<Result<_>>()?;
            files.extend(names.iter().map(|(name, digest)| (name.as_str(), digest.clone())));
            let seed = if stage.kind.draws() { json!(stage.seed) } else { Value::Null };
            let (kind, version) = (json!(stage.kind.name()), json!(stage.kind.version()));
            let part = Part {
                key: current.as_ref().map(|record| record.key),
                facts: facts(&kind, &version, &seed, stage.config.settings(), files),
                inputs,
                identity: flatten(&stage.identity_settings).into_keys().collect(),
                metrics: current.as_ref().map(metrics).unwrap_or_default(),
            };
            stages.insert(stage.name.clone(), part);
        }
        Ok(Self { label: label.to_owned(), stages })
    }

    /// A past run, by the results that it made or found.
    pub fn of_run(run: &PastRun, store: &Store) -> Result<Self> {
        let mut stages = BTreeMap::new();
        for (name, key) in &run.keys {
            if let Some(record) = store.action(*key)? {
                stages.insert(name.clone(), Part::of_record(&record));
            }
        }
        Ok(Self { label: format!("run {}", run.id), stages })
    }

    /// One stored result under a name.
    pub fn of_record(label: &str, name: &str, record: &ActionRecord) -> Self {
        Self { label: label.to_owned(), stages: BTreeMap::from([(name.to_owned(), Part::of_record(record))]) }
    }
}

/// What differs in one stage.
#[derive(Debug, Clone, PartialEq)]
pub struct StageDiff {
    /// Stage name, or both names where two different stages are compared.
    pub name: String,
    /// `a` or `b` if only that side has it.
    pub only_in: Option<&'static str>,
    /// Settings, inputs and files that differ.
    pub changes: Vec<Change>,
    /// Those of them that are in neither key: where and how fast a stage ran.
    pub outside_key: BTreeSet<String>,
    /// Metrics that differ: name, value in a, value in b.
    pub metrics: Vec<(String, Option<f64>, Option<f64>)>,
    /// Action keys, where known.
    pub keys: [Option<Digest>; 2],
}

/// Compares two sides, stage by stage. Two sides of one stage each are compared whatever their names.
pub fn diff(a: &Side, b: &Side) -> Vec<StageDiff> {
    if let ([(name_a, part_a)], [(name_b, part_b)]) = (&a.stages.iter().collect::<Vec<_>>()[..], &b.stages.iter().collect::<Vec<_>>()[..]) {
        let name = if name_a == name_b { (*name_a).clone() } else { format!("{name_a} -> {name_b}") };
        return vec![compare(name, part_a, part_b)];
    }
    let names: BTreeSet<&String> = a.stages.keys().chain(b.stages.keys()).collect();
    let mut found = Vec::new();
    for name in names {
        let stage = match (a.stages.get(name), b.stages.get(name)) {
            (Some(a), Some(b)) => compare(name.clone(), a, b),
            (Some(part), None) => StageDiff { only_in: Some("a"), keys: [part.key, None], ..empty(name) },
            (None, Some(part)) => StageDiff { only_in: Some("b"), keys: [None, part.key], ..empty(name) },
            (None, None) => continue,
        };
        if stage.only_in.is_some() || !stage.changes.is_empty() || !stage.metrics.is_empty() {
            found.push(stage);
        }
    }
    found
}

fn empty(name: &str) -> StageDiff {
    StageDiff {
        name: name.to_owned(),
        only_in: None,
        changes: Vec::new(),
        outside_key: BTreeSet::new(),
        metrics: Vec::new(),
        keys: [None, None],
    }
}

fn compare(name: String, a: &Part, b: &Part) -> StageDiff {
    let names: BTreeSet<&String> = a.metrics.keys().chain(b.metrics.keys()).collect();
    let metric = |name: &&String| ((*name).clone(), a.metrics.get(*name).copied(), b.metrics.get(*name).copied());
    let metrics = names.iter().map(metric).filter(|(_, a, b)| a != b).collect();
    let mut differ = changes(&a.facts, &b.facts);
    let in_key = |setting: &str| {
        let named = |path: &String| path == setting || setting.starts_with(path.as_str()) && setting[path.len()..].starts_with(['.', '[']);
        ["kind", VERSION, "seed", "files"].contains(&setting) || [a, b].iter().any(|part| part.identity.iter().any(named))
    };
    let outside_key = differ.iter().map(|change| change.setting.clone()).filter(|setting| !in_key(setting)).collect();
    differ.extend(compare_inputs(a, b));
    StageDiff { name, only_in: None, changes: differ, outside_key, metrics, keys: [a.key, b.key] }
}

/// Ports whose stages differ, or what these gave: where both sides know that.
fn compare_inputs(a: &Part, b: &Part) -> Vec<Change> {
    let ports: BTreeSet<&String> = a.inputs.keys().chain(b.inputs.keys()).collect();
    let mut differ = Vec::new();
    for port in ports {
        let side = |part: &'_ Part| part.inputs.get(port).cloned().unwrap_or_default();
        let (a, b) = (side(a), side(b));
        let names = |side: &[(String, Option<Digest>)]| side.iter().map(|(stage, _)| stage.clone()).collect::<Vec<_>>();
        let other = |((_, a), (_, b)): (&(String, Option<Digest>), &(String, Option<Digest>))| a.is_some() && b.is_some() && a != b;
        let digests_differ = a.iter().zip(&b).any(other);
        if names(&a) == names(&b) && !digests_differ {
            continue;
        }
        let told = |(stage, digest): &(String, Option<Digest>)| match digest {
            Some(digest) if digests_differ => format!("{stage} {}", digest.short()),
            _ => stage.clone(),
        };
        let value = |side: &[(String, Option<Digest>)]| match side {
            [] => Value::Null,
            side => json!(side.iter().map(told).collect::<Vec<_>>()),
        };
        differ.push(Change { setting: format!("inputs.{port}"), from: value(&a), to: value(&b) });
    }
    differ
}

/// A comparison as scripts see it.
pub fn to_json(a: &Side, b: &Side, stages: &[StageDiff]) -> Value {
    let stages: Vec<Value> = stages
        .iter()
        .map(|stage| {
            json!({
                "name": stage.name,
                "only_in": stage.only_in,
                "keys": stage.keys,
                "settings": stage.changes.iter().map(|change| json!({
                    "setting": change.setting, "from": change.from, "to": change.to, "in_key": !stage.outside_key.contains(&change.setting),
                })).collect::<Vec<_>>(),
                "metrics": stage.metrics.iter().map(|(name, from, to)| json!({ "name": name, "from": from, "to": to })).collect::<Vec<_>>(),
            })
        })
        .collect();
    json!({ "a": a.label, "b": b.label, "stages": stages })
}
