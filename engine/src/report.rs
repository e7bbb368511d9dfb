use std::{collections::BTreeMap, fmt::Write as _};

use rlflow_api::{ArtifactType, DeviceSpec, Kind, Offload, Table};
use rlflow_store::Store;

use crate::{
    Plan, Result, Summary,
    event::{StageOutcome, StageStatus},
    record::StageRecord,
    text,
    workflow::{Stage, Workflow},
};

/// Metrics that are shown beside a stage.
const MAIN_METRICS: usize = 3;

/// The end of a run as people read it: one line if everything was cached; else a table of stages, the tables of
/// evaluations that ran, what failed, and where to look next. `resume` is the command that goes on; `next` spells out a command
/// on this workflow and store, with what follows these.
pub fn run_report(
    workflow: &Workflow,
    store: &Store,
    summary: &Summary,
    resume: &str,
    next: &dyn Fn(&str, &[&str]) -> String,
) -> Result<String> {
    if summary.is_all_cached() {
        return Ok(nothing_ran(summary.stages.len(), summary.seconds));
    }
    let mut out = text::table(&["stage", "result", "time", "metrics", "why"], &rows(workflow, summary));
    for (stage, outcome) in ran(workflow, summary) {
        if !stage.described.outputs().any(|(_, meta)| meta.artifact_type == ArtifactType::Evaluation) {
            continue;
        }
        let Some(record) = outcome.key.map(|key| store.action(key)).transpose()?.flatten() else { continue };
        for table in StageRecord::load(store, &record).tables {
            let _ = write!(out, "\n{}", render(&table));
        }
    }
    let failed: Vec<&StageOutcome> =
        summary.stages.iter().filter(|stage| stage.status == StageStatus::Failed && !stage.was_interrupted()).collect();
    for stage in &failed {
        let _ = writeln!(out, "\n{} failed: {}", stage.name, stage.error.as_deref().unwrap_or("no message"));
        if let Some(hint) = &stage.hint {
            let _ = writeln!(out, "  hint: {hint}");
        }
    }
    let _ = writeln!(out, "\n{} in {}", outcome_line(summary), text::seconds(summary.seconds));
    if summary.ok() {
        let _ = writeln!(out, "\nnext:\n  {}", next("metrics", &[]));
        if let Some((stage, _)) = ran(workflow, summary).last() {
            let _ = writeln!(out, "  {}", next("show", &[&stage.name]));
        }
        if let Some(policy) = last_policy(workflow, summary) {
            let _ = writeln!(out, "  {}", next("chat", &[&policy.name]));
        }
    } else {
        let _ = writeln!(out, "\nto continue from here:\n  {resume}");
    }
    Ok(out)
}

/// The end of a run of `stages` stages that were all cached.
pub fn nothing_ran(stages: usize, seconds: f64) -> String {
    let what = if stages == 1 { "the stage is".to_owned() } else { format!("all {stages} stages are") };
    format!("everything is cached: {what} up to date ({})\n", text::seconds(seconds))
}

/// A plan of `stages` stages that are all cached.
pub fn nothing_to_run(stages: usize) -> String {
    format!("everything is cached: nothing of {stages} stages would run\n")
}

fn outcome_line(summary: &Summary) -> String {
    let mut counts: Vec<(&str, usize)> = Vec::new();
    for stage in &summary.stages {
        match counts.iter_mut().find(|(name, _)| *name == stage.word()) {
            Some((_, count)) => *count += 1,
            None => counts.push((stage.word(), 1)),
        }
    }
    let counts: Vec<String> = counts.into_iter().map(|(name, count)| format!("{count} {name}")).collect();
    let what = if summary.interrupted { "interrupted: " } else { "" };
    format!("{what}{}", counts.join(", "))
}

fn stages<'a>(workflow: &'a Workflow, summary: &'a Summary) -> impl DoubleEndedIterator<Item = (&'a Stage, &'a StageOutcome)> {
    let by_name: BTreeMap<&str, &Stage> = workflow.stages.iter().map(|stage| (stage.name.as_str(), stage)).collect();
    summary.stages.iter().filter_map(move |outcome| Some((*by_name.get(outcome.name.as_str())?, outcome)))
}

fn ran<'a>(workflow: &'a Workflow, summary: &'a Summary) -> impl DoubleEndedIterator<Item = (&'a Stage, &'a StageOutcome)> {
    let ran = |status| matches!(status, StageStatus::Ran | StageStatus::Resumed | StageStatus::Extended);
    stages(workflow, summary).filter(move |(_, outcome)| ran(outcome.status))
}

/// The policy that most was done for: the last one that no other stage makes into a policy.
fn last_policy<'a>(workflow: &'a Workflow, summary: &'a Summary) -> Option<&'a Stage> {
    let makes_policy = |stage: &Stage| {
        let main = stage.kind.outputs().first().and_then(|port| stage.described.output(port.name));
        main.is_some_and(|meta| meta.artifact_type == ArtifactType::Policy)
    };
    stages(workflow, summary).rev().map(|(stage, _)| stage).find(|stage| makes_policy(stage))
}

fn rows(workflow: &Workflow, summary: &Summary) -> Vec<Vec<String>> {
    stages(workflow, summary)
        .map(|(stage, outcome)| {
            let result = if outcome.same_output { format!("{}, same output", outcome.word()) } else { outcome.word().to_owned() };
            let did_nothing = matches!(outcome.status, StageStatus::Cached | StageStatus::Skipped);
            let why = match (&outcome.rerun, &outcome.error) {
                (Some(rerun), _) => rerun.text(),
                (None, Some(error)) => error.clone(),
                (None, None) => String::new(),
            };
            let time = if did_nothing { String::new() } else { text::seconds(outcome.seconds) };
            vec![outcome.name.clone(), result, time, main_metrics(stage.kind, &outcome.metrics), one_line(&why)]
        })
        .collect()
}

/// On one line, however long: it stands last.
fn one_line(text: &str) -> String {
    text::clip(text, usize::MAX)
}

/// The first metrics that the kind documents, with their final values. Of a name with a part in angle brackets
/// (`<model>/rule_score`) all that are there.
pub fn main_metrics(kind: &dyn Kind, metrics: &BTreeMap<String, f64>) -> String {
    let mut shown: Vec<(&str, f64)> = Vec::new();
    for (name, _) in kind.metrics() {
        let tail = name.strip_prefix('<').and_then(|rest| Some(rest.split_once('>')?.1));
        let is_meant = |metric: &str| tail.map_or(metric == *name, |tail| metric.ends_with(tail));
        shown.extend(metrics.iter().filter(|(metric, _)| is_meant(metric)).map(|(metric, value)| (metric.as_str(), *value)));
        if shown.len() >= MAIN_METRICS {
            break;
        }
    }
    if shown.is_empty() {
        shown.extend(metrics.iter().take(MAIN_METRICS).map(|(metric, value)| (metric.as_str(), *value)));
    }
    shown.into_iter().map(|(metric, value)| format!("{metric} {}", text::number(value))).collect::<Vec<_>>().join("  ")
}

/// A stage's table as people read it.
pub fn render(table: &Table) -> String {
    let columns: Vec<&str> = table.columns.iter().map(String::as_str).collect();
    let rows: Vec<Vec<String>> = table.rows.iter().map(|row| row.iter().map(|cell| text::clip(cell, 72)).collect()).collect();
    format!("{}\n{}", table.title, text::table(&columns, &rows))
}

/// A plan or a status as people read it.
pub fn plan_report(workflow: &Workflow, plan: &Plan, estimates: bool) -> String {
    let mut out = String::new();
    let rows: Vec<Vec<String>> = plan
        .stages
        .iter()
        .map(|planned| {
            let why = match (&planned.error, &planned.rerun) {
                (Some(error), Some(rerun)) => format!("{error} ({})", rerun.text()),
                (Some(error), None) => error.clone(),
                (None, Some(rerun)) => rerun.text(),
                (None, None) => String::new(),
            };
            let why = match (planned.continues_from_step, &planned.holder) {
                (_, Some(holder)) => format!("running in process {} on {} (run {})", holder.pid, holder.host, holder.run_id),
                (Some(step), None) => format!("{why}; continues from step {}", crate::thousands(step)),
                (None, None) => why,
            };
            let placement = &planned.placement;
            let zero = if placement.zero > 0 { format!(" ZeRO {}", placement.zero) } else { String::new() };
            let offload = if placement.offload == Offload::Cpu { " offloaded" } else { "" };
            // A stage that holds models of others works where those are.
            let elsewhere: Vec<DeviceSpec> = planned.usage.keys().copied().collect();
            let devices = if planned.holds_others { &elsewhere } else { &placement.devices };
            let place = format!("{}{zero}{offload}", device_list(devices));
            let memory = if planned.peak_bytes > 0 { text::bytes(planned.peak_bytes) } else { String::new() };
            let name = workflow.stages[planned.stage].name.clone();
            if estimates {
                let time = planned.estimated_seconds.map(|time| format!("~{}", text::seconds(time))).unwrap_or_default();
                vec![name, planned.status.name().into(), place, memory, time, why]
            } else {
                vec![name, planned.status.name().into(), why]
            }
        })
        .collect();
    let columns: &[&str] = if estimates { &["stage", "status", "devices", "memory", "time", "why"] } else { &["stage", "status", "why"] };
    out.push_str(&text::table(columns, &rows));
    let cached = plan.stages.iter().filter(|stage| stage.status == crate::Status::Cached).count();
    let known: f64 = plan.stages.iter().filter_map(|stage| stage.estimated_seconds).sum();
    let runs = |stage: &&crate::plan::PlannedStage| stage.status != crate::Status::Cached;
    let about = if plan.stages.iter().filter(runs).all(|stage| stage.estimated_seconds.is_some()) { "about" } else { "at least" };
    let about = if estimates && known > 0.0 { format!(", {about} {} by what past runs took", text::seconds(known)) } else { String::new() };
    let _ = writeln!(out, "\n{} of {} stages cached{about}", cached, plan.stages.len());
    out
}
/// Devices of ranks in short: `cpu x4`, `cuda:0-7`.
fn device_list(devices: &[DeviceSpec]) -> String {
    let mut runs: Vec<(DeviceSpec, DeviceSpec, usize)> = Vec::new();
    for device in devices {
        match (runs.last_mut(), device) {
            (Some((_, last, count)), _) if last == device => *count += 1,
            (Some((_, last @ DeviceSpec::Cuda(_), 1)), DeviceSpec::Cuda(index)) if *last == DeviceSpec::Cuda(index.wrapping_sub(1)) => {
                *last = *device
            }
            _ => runs.push((*device, *device, 1)),
        }
    }
    let of = |(first, last, count): (DeviceSpec, DeviceSpec, usize)| match (first, last, count) {
        (DeviceSpec::Cuda(from), DeviceSpec::Cuda(to), _) if from != to => format!("cuda:{from}-{to}"),
        (device, _, 1) => device.to_string(),
        (device, _, count) => format!("{device} x{count}"),
    };
    runs.into_iter().map(of).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_listed_in_short() {
        let list = |names: &[&str]| device_list(&names.iter().map(|name| name.parse().unwrap()).collect::<Vec<_>>());
        assert_eq!(list(&["cpu"]), "cpu");
        assert_eq!(list(&["cpu", "cpu", "cpu"]), "cpu x3");
        assert_eq!(list(&["cuda:0", "cuda:1", "cuda:2", "cuda:5"]), "cuda:0-2 cuda:5");
        assert_eq!(list(&["cuda:0", "cuda:0", "cuda:1"]), "cuda:0 x2 cuda:1");
    }
}
