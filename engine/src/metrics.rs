use std::collections::BTreeMap;

use serde_json::{Value, json};

use rlflow_store::{ActionRecord, Digest, Store};

use crate::{
    Host, Plan, Request, Result, Status,
    action::workflow_name,
    record::{Series, StageRecord},
    workflow::Workflow,
};

/// What a stage measured.
#[derive(Debug)]
pub struct StageMetrics {
    /// Index in the workflow.
    pub stage: usize,
    /// Whether the result is of other settings or inputs than today's.
    pub stale: bool,
    /// The action that they come from.
    pub record: ActionRecord,
    /// Metrics by step.
    pub series: Series,
}

impl StageMetrics {
    /// The last value of every metric, and measured values such as `tokens_per_s`.
    pub fn finals(&self) -> BTreeMap<String, f64> {
        let mut finals = self.record.metrics.clone();
        finals.extend(self.record.provenance.measurements.clone());
        finals
    }
}

/// The metrics of the stages called `stages`, or of all: of today's result where there is one, else of the last.
pub fn metrics(workflow: &Workflow, store: &Store, host: &Host, stages: &[String]) -> Result<Vec<StageMetrics>> {
    let wanted: Vec<usize> = match stages {
        [] => (0..workflow.stages.len()).collect(),
        names => {
            let found = names.iter().map(|name| crate::action::find_stages(workflow, name, "STAGE"));
            found.collect::<Result<Vec<_>, _>>()?.concat()
        }
    };
    let records = results(workflow, store, host, &wanted)?;
    let mut all = Vec::new();
    for (stage, stale, record) in records {
        let series = StageRecord::load(store, &record.records)?.series;
        all.push(StageMetrics { stage, stale, record, series });
    }
    Ok(all)
}

/// The results of `wanted` stages: (stage, whether stale, action). Stages that never ran are left out.
pub fn results(workflow: &Workflow, store: &Store, host: &Host, wanted: &[usize]) -> Result<Vec<(usize, bool, ActionRecord)>> {
    let plan = Plan::new(workflow, store, host, &Request::default())?;
    let cached = plan.stages.iter().filter(|planned| planned.status == Status::Cached);
    let current: BTreeMap<usize, Digest> = cached.filter_map(|planned| Some((planned.stage, planned.key?))).collect();
    let name = workflow_name(workflow, store);
    let mut found = Vec::new();
    for index in wanted {
        let stage = &workflow.stages[*index];
        let record = match current.get(index) {
            Some(key) => store.action(*key)?,
            None => store.last_action(&name, &stage.name, stage.kind.name())?,
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
            let value = json!({ "final": stage.finals(), "series": stage.series, "stale": stage.stale, "key": stage.record.key });
            (workflow.stages[stage.stage].name.clone(), value)
        })
        .collect();
    json!({ "stages": stages })
}
