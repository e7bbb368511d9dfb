use rlflow_engine::{action::find_stages, metrics::results, workflow::Workflow};
use rlflow_store::{Digest, Store};

use crate::{common::shell_quote, failure::Failure, host::host};

/// The artifact that `text` names: `STAGE` (its main output), `STAGE.PORT`, or a digest or its first digits.
pub fn find(workflow: &Workflow, store: &Store, text: &str) -> Result<Digest, Failure> {
    if let Some(digest) = by_digest(workflow, store, text)? {
        return Ok(digest);
    }
    let (name, port) = split(workflow, text);
    let stages = find_stages(workflow, name, "STAGE")?;
    let [stage] = stages[..] else {
        let points: Vec<&str> = stages.iter().map(|stage| workflow.stages[*stage].name.as_str()).collect();
        return Err(Failure::request("ambiguous_stage", format!("`{name}` stands for {} stages", points.len()), points.join(", ")));
    };
    let Some((_, _, record)) = results(workflow, store, &host(), &[stage])?.into_iter().next() else {
        let folder = store.folder();
        let beside = folder == workflow.folder.join(".rlflow");
        let store = if beside { String::new() } else { format!(" --store {}", shell_quote(&folder.to_string_lossy())) };
        let hint = format!("rlflow run {}{store} {}", shell_quote(&workflow.path.to_string_lossy()), shell_quote(name));
        return Err(Failure::request("no_result", format!("stage `{name}` has no result yet"), hint));
    };
    let main = || workflow.stages[stage].kind.outputs().first().map(|port| port.name);
    let port = port.or_else(main).unwrap_or_default();
    record.outputs.get(port).copied().ok_or_else(|| {
        let ports: Vec<&str> = record.outputs.keys().map(String::as_str).collect();
        Failure::request("unknown_port", format!("`{name}` has no output `{port}`"), format!("it has: {}", ports.join(", ")))
    })
}

/// The artifact that `text` is the digest of, whole or its first digits, unless it names a stage.
pub fn by_digest(workflow: &Workflow, store: &Store, text: &str) -> Result<Option<Digest>, Failure> {
    if let Ok(digest) = text.parse() {
        return Ok(Some(digest));
    }
    if find_stages(workflow, text, "STAGE").is_ok() {
        return Ok(None);
    }
    one(text, store.artifacts_beginning(text)?)
}

/// The only one of the digests that begin with `text`, if any does.
pub fn one(text: &str, found: Vec<Digest>) -> Result<Option<Digest>, Failure> {
    match found[..] {
        [] => Ok(None),
        [digest] => Ok(Some(digest)),
        _ => {
            let message = format!("`{text}` is the beginning of {} digests", found.len());
            Err(Failure::request("ambiguous_digest", message, "write more of it"))
        }
    }
}

/// Whether what [`find`] gives for `text` is of other settings or inputs than today's.
pub fn is_stale(workflow: &Workflow, store: &Store, text: &str) -> Result<bool, Failure> {
    if by_digest(workflow, store, text)?.is_some() {
        return Ok(false);
    }
    let stages = find_stages(workflow, split(workflow, text).0, "STAGE")?;
    Ok(results(workflow, store, &host(), &stages)?.iter().any(|(_, stale, _)| *stale))
}

/// Stage and output port of `STAGE.PORT`; the whole text is the stage if there is one of that name.
pub fn split<'a>(workflow: &Workflow, text: &'a str) -> (&'a str, Option<&'a str>) {
    match (find_stages(workflow, text, "STAGE"), text.rsplit_once('.')) {
        (Err(_), Some((stage, port))) => (stage, Some(port)),
        _ => (text, None),
    }
}
