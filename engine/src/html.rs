//! One self-contained HTML file about a workflow's results: its DAG, what each stage made, curves, samples, tables.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

use rlflow_api::Sample;
use rlflow_store::{ActionRecord, Store};

use crate::{
    Host, Plan, Request, Result, Status, graph,
    metrics::results,
    record::{StageRecord, missing_text},
    report::main_metrics,
    settings, text,
    workflow::Workflow,
};

/// Most points of a curve that are drawn.
const MAX_POINTS: usize = 400;
/// Prompts whose answers are shown side by side.
const MAX_PROMPTS: usize = 24;

/// What is said of a rank's bytes: name in its metrics, and column.
const RANK_BYTES: [(&str, &str); 7] = [
    ("peak", "peak"),
    ("parameters", "parameters"),
    ("gradients", "gradients"),
    ("optimizer", "optimizer"),
    ("activations", "activations"),
    ("buffers", "buffers"),
    ("now", "at the end"),
];

const STYLE: &str = "
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --ink: #2563eb; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid var(--line) } h3 { font-size: 1rem }
table { border-collapse: collapse; width: 100%; margin: .6rem 0 } th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top }
th { font-weight: 600 } td.text { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px } .quiet { opacity: .65; font-size: 13px }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: .8rem } figure { margin: 0; padding: .5rem; background: var(--soft); border-radius: 6px }
figcaption { font-size: 12px; display: flex; justify-content: space-between; gap: .5rem } .dag { overflow-x: auto } .dag svg { max-width: 100%; height: auto }
details { margin: .4rem 0 } polyline { fill: none; stroke: var(--ink); stroke-width: 1.5 }
";

/// A stage's result as the report needs it.
struct Shown {
    name: String,
    index: usize,
    stale: bool,
    action: ActionRecord,
    record: StageRecord,
}

/// The report of a workflow's current results; of the last ones where a stage is out of date.
pub fn html_report(workflow: &Workflow, store: &Store, host: &Host, made_at: &str) -> Result<String> {
    let plan = Plan::new(workflow, store, host, &Request::default())?;
    let mut statuses = vec![Status::Pending.name(); workflow.stages.len()];
    plan.stages.iter().for_each(|planned| statuses[planned.stage] = planned.status.name());
    let all: Vec<usize> = (0..workflow.stages.len()).collect();
    let mut shown = Vec::new();
    for (index, stale, action) in results(workflow, store, host, &all)? {
        let record = StageRecord::load(store, &action);
        shown.push(Shown { name: workflow.stages[index].name.clone(), index, stale, action, record });
    }
    let mut out = String::new();
    let title = escape(&workflow.name);
    let _ = write!(
        out,
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">"
    );
    let _ = write!(out, "<title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1>");
    let file = escape(&workflow.path.display().to_string());
    let _ = write!(out, "<p class=\"quiet\">{file}, edition {}, seed {}; {}</p>", workflow.edition, workflow.seed, escape(made_at));
    let _ = write!(out, "<div class=\"dag\">{}</div>", graph::svg(workflow, &statuses));
    stages(workflow, &statuses, &shown, &mut out);
    tables(&shown, &mut out);
    samples(&shown, &mut out);
    curves(&shown, &mut out);
    memory(&shown, &mut out);
    details(&shown, &mut out);
    out.push_str("</body></html>\n");
    Ok(out)
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn row(cells: &[String], tag: &str, out: &mut String) {
    out.push_str("<tr>");
    cells.iter().for_each(|cell| _ = write!(out, "<{tag}>{}</{tag}>", escape(cell)));
    out.push_str("</tr>");
}

fn stages(workflow: &Workflow, statuses: &[&str], shown: &[Shown], out: &mut String) {
    let by_index: BTreeMap<usize, &Shown> = shown.iter().map(|stage| (stage.index, stage)).collect();
    out.push_str("<h2>Stages</h2><table>");
    row(&["stage", "kind", "status", "time", "metrics"].map(str::to_owned), "th", out);
    for (index, stage) in workflow.stages.iter().enumerate() {
        let made = by_index.get(&index);
        let time = made.map(|made| text::seconds(made.action.provenance.duration_seconds)).unwrap_or_default();
        let metrics = made.map(|made| main_metrics(stage.kind, &made.action.metrics)).unwrap_or_default();
        row(&[stage.name.clone(), stage.kind.name().into(), statuses[index].into(), time, metrics], "td", out);
    }
    out.push_str("</table>");
    for stage in shown {
        if let Some(missing) = missing_text(workflow, &stage.name, &stage.record.missing) {
            let _ = write!(out, "<p>{}: {}</p>", escape(&stage.name), escape(&missing));
        }
    }
}

fn tables(shown: &[Shown], out: &mut String) {
    for stage in shown.iter().filter(|stage| !stage.record.tables.is_empty()) {
        let _ = write!(out, "<h2>{}</h2>", escape(&stage.name));
        for table in &stage.record.tables {
            let _ = write!(out, "<h3>{}</h3><table>", escape(&table.title));
            row(&table.columns, "th", out);
            table.rows.iter().for_each(|cells| row(cells, "td", out));
            out.push_str("</table>");
        }
    }
}

/// For each prompt the last answer of every stage that answered it, side by side.
fn samples(shown: &[Shown], out: &mut String) {
    let with_samples: Vec<&Shown> = shown.iter().filter(|stage| !stage.record.samples.is_empty()).collect();
    if with_samples.is_empty() {
        return;
    }
    let mut by_prompt: BTreeMap<&str, BTreeMap<usize, &Sample>> = BTreeMap::new();
    for stage in &with_samples {
        for sample in &stage.record.samples {
            by_prompt.entry(&sample.prompt).or_default().insert(stage.index, sample);
        }
    }
    let mut prompts: Vec<(&str, BTreeMap<usize, &Sample>)> = by_prompt.into_iter().collect();
    prompts.sort_by_key(|(_, answers)| std::cmp::Reverse(answers.len()));
    prompts.truncate(MAX_PROMPTS);
    let columns: BTreeSet<usize> = prompts.iter().flat_map(|(_, answers)| answers.keys().copied()).collect();
    out.push_str("<h2>Samples</h2><table><tr><th>prompt</th>");
    for stage in with_samples.iter().filter(|stage| columns.contains(&stage.index)) {
        let _ = write!(out, "<th>{}</th>", escape(&stage.name));
    }
    out.push_str("</tr>");
    for (prompt, answers) in prompts {
        let _ = write!(out, "<tr><td class=\"text\">{}</td>", escape(prompt));
        for index in &columns {
            out.push_str("<td class=\"text\">");
            if let Some(sample) = answers.get(index) {
                let scores: Vec<String> = sample.scores.iter().map(|(name, value)| format!("{name} {}", text::number(*value))).collect();
                let about = escape(&format!("step {}  {}", sample.step, scores.join("  ")));
                let _ = write!(out, "{}<div class=\"quiet\">{about}</div>", escape(&sample.response));
            }
            out.push_str("</td>");
        }
        out.push_str("</tr>");
    }
    out.push_str("</table>");
}

fn curves(shown: &[Shown], out: &mut String) {
    for stage in shown {
        let series: Vec<(&String, &Vec<(u64, f64)>)> = stage.record.series.iter().filter(|(_, points)| points.len() > 1).collect();
        if series.is_empty() {
            continue;
        }
        let _ = write!(out, "<h2>{}</h2><div class=\"curves\">", escape(&stage.name));
        for (name, points) in series {
            let last = points.last().map_or(0.0, |point| point.1);
            let _ = write!(
                out,
                "<figure><figcaption><b>{}</b><span>{}</span></figcaption>{}</figure>",
                escape(name),
                text::number(last),
                curve(points)
            );
        }
        out.push_str("</div>");
    }
}

/// A curve over steps, scaled to its own range.
fn curve(points: &[(u64, f64)]) -> String {
    let every = points.len().div_ceil(MAX_POINTS).max(1);
    let kept: Vec<&(u64, f64)> =
        points.iter().step_by(every).chain(points.last().filter(|_| !(points.len() - 1).is_multiple_of(every))).collect();
    let (low, high) = points.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), point| (low.min(point.1), high.max(point.1)));
    let (first, last) = (points.first().map_or(0, |point| point.0), points.last().map_or(1, |point| point.0));
    let (width, height) = (last.saturating_sub(first).max(1) as f64, if high > low { high - low } else { 1.0 });
    let mut line = String::new();
    for (step, value) in kept {
        let _ = write!(line, "{:.1},{:.1} ", step.saturating_sub(first) as f64 / width * 220.0 + 5.0, 65.0 - (value - low) / height * 60.0);
    }
    let (low, high) = (text::number(low), text::number(high));
    let labels = format!("<title>{low} to {high}, steps {first} to {last}</title>");
    format!("<svg viewBox=\"0 0 230 70\" width=\"100%\" role=\"img\">{labels}<polyline points=\"{}\"/></svg>", line.trim_end())
}

/// What each rank held, as it counted.
fn memory(shown: &[Shown], out: &mut String) {
    let mut rows = String::new();
    for stage in shown {
        for ((rank, device), held) in held_by_ranks(&stage.action.provenance.measurements) {
            let _ = write!(rows, "<tr><td>{}</td><td>{}</td><td>{rank}</td>", escape(&stage.name), escape(device));
            for bytes in held {
                let _ = match bytes {
                    Some(bytes) => write!(rows, "<td title=\"{bytes} bytes\">{}</td>", text::bytes(bytes)),
                    None => write!(rows, "<td></td>"),
                };
            }
            rows.push_str("</tr>");
        }
    }
    if rows.is_empty() {
        return;
    }
    out.push_str("<h2>Memory of ranks</h2><table>");
    let columns: Vec<String> =
        ["stage", "device", "rank"].into_iter().chain(RANK_BYTES.map(|(_, column)| column)).map(str::to_owned).collect();
    row(&columns, "th", out);
    let _ = write!(out, "{rows}</table><p class=\"quiet\">The parts are those of the peak.</p>");
}

/// Bytes by rank and device, in the order of [`RANK_BYTES`], from measurements like `memory/cpu/rank0/peak_bytes`.
fn held_by_ranks(measurements: &BTreeMap<String, f64>) -> BTreeMap<(u64, &str), [Option<u64>; RANK_BYTES.len()]> {
    let mut held: BTreeMap<(u64, &str), [Option<u64>; RANK_BYTES.len()]> = BTreeMap::new();
    for (name, bytes) in measurements {
        let mut parts = name.split('/');
        let (Some("memory"), Some(device), Some(rank), Some(part), None) =
            (parts.next(), parts.next(), parts.next(), parts.next(), parts.next())
        else {
            continue;
        };
        let column = part.strip_suffix("_bytes").and_then(|part| RANK_BYTES.iter().position(|(name, _)| *name == part));
        let rank = rank.strip_prefix("rank").and_then(|rank| rank.parse().ok());
        if let (Some(rank), Some(column)) = (rank, column) {
            held.entry((rank, device)).or_default()[column] = Some(*bytes as u64);
        }
    }
    held
}

fn details(shown: &[Shown], out: &mut String) {
    out.push_str("<h2>How it was made</h2>");
    for stage in shown {
        let made = &stage.action.provenance;
        let stale = if stage.stale { " (of other settings or inputs than today's)" } else { "" };
        let _ = write!(out, "<details><summary>{}{stale}</summary><table>", escape(&stage.name));
        let on = format!("{}: {} ({})", made.host, made.devices.join(", "), made.numerics);
        let mut rows = vec![
            vec!["key".to_owned(), stage.action.key.to_string()],
            vec!["run".to_owned(), made.run_id.clone()],
            vec!["on".to_owned(), on],
        ];
        rows.extend(stage.action.outputs.iter().map(|(port, digest)| vec![format!("output {port}"), digest.to_string()]));
        rows.extend(made.files.iter().map(|(name, digest)| vec![format!("file {name}"), digest.to_string()]));
        rows.extend(settings::flatten(&made.settings).into_iter().map(|(name, value)| vec![name, settings::display(value)]));
        rows.iter().for_each(|cells| row(cells, "td", out));
        out.push_str("</table></details>");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_curve_keeps_its_ends_and_few_points() {
        let points: Vec<(u64, f64)> = (0..10_000).map(|step| (step, step as f64)).collect();
        let svg = curve(&points);
        assert!(svg.contains("points=\"5.0,65.0 ") && svg.contains("225.0,5.0\""), "{svg}");
        assert!(svg.matches(',').count() < MAX_POINTS + 10);
    }

    #[test]
    fn ranks_stand_in_the_order_of_their_numbers() {
        let names =
            ["memory/peak_bytes", "memory/cpu/rank10/peak_bytes", "memory/cuda:0/rank2/now_bytes", "memory/cpu/rank2/odd", "tokens_per_s"];
        let measured = names.iter().zip(1..).map(|(name, bytes)| ((*name).to_owned(), f64::from(bytes))).collect();
        let held: Vec<_> = held_by_ranks(&measured).into_iter().map(|(rank, held)| (rank, held[0], held[6])).collect();
        assert_eq!(held, [((2, "cuda:0"), None, Some(3)), ((10, "cpu"), Some(2), None)]);
    }

    #[test]
    fn text_cannot_become_markup() {
        let mut out = String::new();
        row(&["<script>\"&".into()], "td", &mut out);
        assert_eq!(out, "<tr><td>&lt;script&gt;&quot;&amp;</td></tr>");
    }
}
