use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use rlflow_store::{ActionRecord, Digest, Store};

use crate::{
    Host, Plan, Request, Result, Status,
    action::Actions,
    attempt::{Unfinished, unfinished},
    record::{Series, StageRecord},
    workflow::Workflow,
};

/// What a stage measured.
#[derive(Debug)]
pub struct StageMetrics {
    /// Index in the workflow.
    pub stage: usize,
    /// Whether they are of other settings or inputs than today's.
    pub stale: bool,
    /// The result that they come from; none while the stage runs, or if it was interrupted or failed.
    pub record: Option<ActionRecord>,
    /// The attempt that they come from where there is no result of it.
    pub unfinished: Option<Unfinished>,
    /// Metrics by step.
    pub series: Series,
    /// Parts of the result's record that are lost or damaged.
    pub missing: Vec<&'static str>,
}

impl StageMetrics {
    /// The last value of every metric, and measured values such as `tokens_per_s`.
    pub fn finals(&self) -> BTreeMap<String, f64> {
        if let Some(record) = &self.record {
            let mut finals = record.metrics.clone();
            finals.extend(record.provenance.measurements.clone());
            return finals;
        }
        let mut finals: BTreeMap<String, f64> =
            self.series.iter().filter_map(|(name, points)| Some((name.clone(), points.last()?.1))).collect();
        finals.extend(self.unfinished.iter().flat_map(|unfinished| unfinished.measurements.clone()));
        finals
    }

    /// Action key of the result or the attempt.
    pub fn key(&self) -> Option<Digest> {
        self.record.as_ref().map(|record| record.key).or(self.unfinished.as_ref().map(|unfinished| unfinished.key))
    }
}

/// The metrics of the stages called `stages`, or of all: of today's result where there is one, else of what came last,
/// a result or an attempt that has not ended or gave none.
pub fn metrics(workflow: &Workflow, store: &Store, host: &Host, stages: &[String]) -> Result<Vec<StageMetrics>> {
    let wanted: Vec<usize> = match stages {
        [] => (0..workflow.stages.len()).collect(),
        names => {
            let found = names.iter().map(|name| crate::action::find_stages(workflow, name, "STAGE"));
            found.collect::<Result<Vec<_>, _>>()?.concat()
        }
    };
    let actions = Actions::new(workflow, store, host, &Request::default())?;
    let plan = Plan::of(&actions)?;
    let keys: BTreeMap<usize, Digest> = plan.stages.iter().filter_map(|planned| Some((planned.stage, planned.key?))).collect();
    let mut records: BTreeMap<usize, (bool, ActionRecord)> =
        results_of(&actions, &plan, &wanted)?.into_iter().map(|(stage, stale, record)| (stage, (stale, record))).collect();
    let is_open = |stage: &usize| records.get(stage).is_none_or(|(stale, _)| *stale);
    let open: BTreeSet<&str> = wanted.iter().filter(|stage| is_open(stage)).map(|stage| workflow.stages[*stage].name.as_str()).collect();
    let mut attempts = unfinished(store, &actions.workflow_name, &open)?;
    let mut all = Vec::new();
    for stage in wanted {
        let (record, attempt) = (records.remove(&stage), attempts.remove(&workflow.stages[stage].name));
        let attempt = attempt.filter(|(attempt, _)| record.as_ref().is_none_or(|(_, record)| record.provenance.started_at < attempt.began));
        if let Some((attempt, series)) = attempt {
            let stale = keys.get(&stage).is_some_and(|key| *key != attempt.key);
            all.push(StageMetrics { stage, stale, record: None, unfinished: Some(attempt), series, missing: Vec::new() });
        } else if let Some((stale, record)) = record {
            let StageRecord { series, missing, .. } = StageRecord::load(store, &record);
            all.push(StageMetrics { stage, stale, record: Some(record), unfinished: None, series, missing });
        }
    }
    Ok(all)
}

/// The results of `wanted` stages: (stage, whether stale, action). Stages that never ran are left out.
pub fn results(workflow: &Workflow, store: &Store, host: &Host, wanted: &[usize]) -> Result<Vec<(usize, bool, ActionRecord)>> {
    let actions = Actions::new(workflow, store, host, &Request::default())?;
    results_of(&actions, &Plan::of(&actions)?, wanted)
}

fn results_of(actions: &Actions<'_>, plan: &Plan, wanted: &[usize]) -> Result<Vec<(usize, bool, ActionRecord)>> {
    let cached = plan.stages.iter().filter(|planned| planned.status == Status::Cached);
    let current: BTreeMap<usize, Digest> = cached.filter_map(|planned| Some((planned.stage, planned.key?))).collect();
    let mut found = Vec::new();
    for index in wanted {
        let stage = &actions.workflow.stages[*index];
        let record = match current.get(index) {
            Some(key) => actions.store.action(*key)?,
            None => actions.reach.last_result(&actions.workflow_name, &stage.name, stage.kind.name())?,
        };
        found.extend(record.map(|record| (*index, !current.contains_key(index), record)));
    }
    Ok(found)
}

/// Metrics as scripts see them.
pub fn to_json(workflow: &Workflow, metrics: &[StageMetrics]) -> Value {
    let stages: serde_json::Map<String, Value> = metrics
        .iter()
        .map(|stage| {
            let value = json!({
                "final": stage.finals(), "series": stage.series, "stale": stage.stale, "key": stage.key(), "unfinished": stage.unfinished,
                "missing": stage.missing,
            });
            (workflow.stages[stage.stage].name.clone(), value)
        })
        .collect();
    json!({ "stages": stages })
}
