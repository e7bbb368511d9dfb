use rlflow_store::{ActionRecord, Provenance};

use crate::{
    Result,
    action::{Actions, Decision, Outputs, find_stages},
    event::now,
    workflow::WorkflowError,
};

/// Accepts the last result of the stage called `name` under today's key, recorded as adopted. What it would have been
/// made of today must be known, so the stages above it must be cached. Returns the new record.
pub fn adopt(actions: &Actions<'_>, name: &str) -> Result<ActionRecord> {
    let workflow = actions.workflow;
    let wanted = find_stages(workflow, name, "STAGE")?;
    let [wanted] = wanted[..] else {
        let points: Vec<&str> = wanted.iter().map(|stage| workflow.stages[*stage].name.as_str()).collect();
        let error = WorkflowError::new("ambiguous_stage", format!("`{name}` stands for {} stages", points.len()));
        return Err(error.with_hint(format!("name one of {}", points.join(", "))).into());
    };
    let above = workflow.dag.ancestors(&[wanted]);
    let mut outputs: Vec<Option<Outputs>> = vec![None; workflow.stages.len()];
    for index in workflow.order.iter().copied().filter(|stage| above[*stage]) {
        let stage = &workflow.stages[index];
        match actions.decide(index, &outputs, None)? {
            Decision::Cached { .. } if index == wanted => {
                let error = WorkflowError::new("nothing_to_adopt", format!("stage `{}` is cached: there is nothing to adopt", stage.name));
                return Err(error.into());
            }
            Decision::Cached { outputs: made, .. } => outputs[index] = Some(made),
            Decision::Run(action) if index == wanted => {
                let Some(last) = action.last else {
                    let error =
                        WorkflowError::new("nothing_to_adopt", format!("stage `{}` has no result that could be adopted", stage.name));
                    return Err(error.with_hint("a result is found by stage name, kind and workflow: was the stage renamed?").into());
                };
                let record = ActionRecord {
                    format: ActionRecord::FORMAT,
                    key: action.key,
                    full_key: actions.full_key(index, &action.inputs)?,
                    provenance: Provenance {
                        workflow: actions.workflow_name.clone(),
                        started_at: now(),
                        adopted: true,
                        inputs: actions.named_inputs(&action.inputs),
                        settings: stage.config.settings().clone(),
                        files: actions.data_files(index)?.into_iter().flatten().map(|file| (file.name, file.digest)).collect(),
                        ..last.provenance
                    },
                    ..last
                };
                actions.store.put_action(&record)?;
                return Ok(record);
            }
            Decision::Run(action) => {
                let message = format!("stage `{name}` reads `{}`, which is not cached ({})", stage.name, action.rerun.text());
                let hint = format!("run or adopt `{}` first: what `{name}` would be made of depends on it", stage.name);
                return Err(WorkflowError::new("input_not_cached", message).with_hint(hint).into());
            }
        }
    }
    Err(WorkflowError::new("unknown_stage", format!("there is no stage `{name}`")).into())
}
