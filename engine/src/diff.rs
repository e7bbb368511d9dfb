use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use rlflow_store::{ActionRecord, Digest, Store};

use crate::{
    Host, Result,
    history::PastRun,
    metrics::results,
    settings::{Change, changes},
    workflow::Workflow,
};

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
    /// Everything that may differ: kind, seed, settings, inputs, files.
    pub facts: Value,
    /// Final metrics and measured values; empty if it never ran.
    pub metrics: BTreeMap<String, f64>,
}

impl Part {
    /// Of a stored result.
    pub fn of_record(record: &ActionRecord) -> Self {
        let made = &record.provenance;
        let inputs: BTreeMap<&str, Vec<String>> =
            made.inputs.iter().map(|(port, inputs)| (port.as_str(), inputs.iter().map(|(stage, _)| stage.clone()).collect())).collect();
        let files: BTreeMap<&str, String> = made.files.iter().map(|(name, digest)| (name.as_str(), digest.short())).collect();
        let facts =
            facts(&record.full_key["kind"], &record.full_key["version"], &record.full_key["seed"], &made.settings, json!(inputs), files);
        Self { key: Some(record.key), facts, metrics: metrics(record) }
    }
}

fn metrics(record: &ActionRecord) -> BTreeMap<String, f64> {
    let mut metrics = record.metrics.clone();
    metrics.extend(record.provenance.measurements.clone());
    metrics
}

/// Names with dots (of files) are not opened into paths, so files are a list of `name digest`.
fn facts(kind: &Value, version: &Value, seed: &Value, settings: &Value, inputs: Value, files: BTreeMap<&str, String>) -> Value {
    let files: Vec<String> = files.into_iter().map(|(name, digest)| format!("{name} {digest}")).collect();
    let mut facts = settings.clone();
    if !facts.is_object() {
        facts = json!({});
    }
    for (name, value) in [("kind", kind), ("implementation version", version), ("seed", seed), ("inputs", &inputs)] {
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
            let inputs: BTreeMap<&str, Vec<String>> = stage
                .inputs
                .iter()
                .map(|(port, edges)| (port.as_str(), edges.iter().map(|edge| workflow.stages[edge.stage].name.clone()).collect()))
                .collect();
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
                facts: facts(&kind, &version, &seed, stage.config.settings(), json!(inputs), files),
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
    StageDiff { name: name.to_owned(), only_in: None, changes: Vec::new(), metrics: Vec::new(), keys: [None, None] }
}

fn compare(name: String, a: &Part, b: &Part) -> StageDiff {
    let names: BTreeSet<&String> = a.metrics.keys().chain(b.metrics.keys()).collect();
    let metric = |name: &&String| ((*name).clone(), a.metrics.get(*name).copied(), b.metrics.get(*name).copied());
    let metrics = names.iter().map(metric).filter(|(_, a, b)| a != b).collect();
    StageDiff { name, only_in: None, changes: changes(&a.facts, &b.facts), metrics, keys: [a.key, b.key] }
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
                "settings": stage.changes.iter().map(|change| json!({ "setting": change.setting, "from": change.from, "to": change.to })).collect::<Vec<_>>(),
                "metrics": stage.metrics.iter().map(|(name, from, to)| json!({ "name": name, "from": from, "to": to })).collect::<Vec<_>>(),
            })
        })
        .collect();
    json!({ "a": a.label, "b": b.label, "stages": stages })
}
