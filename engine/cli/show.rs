use clap::Args;
use serde_json::{Value, json};

use rlflow_engine::{
    action::find_stages,
    metrics::results,
    record::{StageRecord, missing_text},
    report::render,
    text, thousands,
};
use rlflow_store::{ActionRecord, Artifact, Digest, Store};

use crate::{
    artifact,
    common::{Common, WorkflowArgs},
    failure::{Failure, Outcome, print_as_it_is, print_line, print_text, takes_color},
    host::host,
    rows::Rows,
    terminal::visible,
};

/// Show a stage's result: what it holds, how it was made, rows as the model sees them
#[derive(Args)]
pub struct Show {
    #[command(flatten)]
    pub workflow: WorkflowArgs,
    /// A stage, one output of it (STAGE.PORT), or an artifact's digest
    #[arg(value_name = "STAGE")]
    pub stage: String,
    /// Rows, samples and entries to print
    #[arg(short = 'n', long, default_value_t = 5)]
    pub limit: usize,
}

impl Show {
    pub fn run(self, common: &Common) -> Result<Outcome, Failure> {
        let (workflow, store) = self.workflow.look(common)?;
        if let Some(digest) = artifact::by_digest(&workflow, &store, &self.stage)? {
            let artifact = open(&store, digest)?;
            if common.json {
                print_line(&json!({ "artifacts": { "artifact": self.describe(&store, &artifact)? } }).to_string());
            } else {
                print_as_it_is(&self.artifact(&store, "artifact", &artifact)?);
            }
            return Ok(Outcome::Done);
        }
        let (name, port) = artifact::split(&workflow, &self.stage);
        let stages = find_stages(&workflow, name, "STAGE")?;
        let found = results(&workflow, &store, &host(), &stages)?;
        if found.is_empty() {
            let hint = self.workflow.command(common, "run", &[name]);
            return Err(Failure::request("no_result", format!("stage `{name}` has no result yet"), hint));
        }
        for (stage, stale, record) in found {
            let mut outputs = Vec::new();
            for (output, digest) in &record.outputs {
                if port.is_none_or(|port| port == output) {
                    outputs.push((output.clone(), store.open_artifact(*digest)?, *digest));
                }
            }
            if let Some(port) = port.filter(|_| outputs.is_empty()) {
                let ports: Vec<&str> = record.outputs.keys().map(String::as_str).collect();
                return Err(Failure::request(
                    "unknown_port",
                    format!("`{name}` has no output `{port}`"),
                    format!("it has: {}", ports.join(", ")),
                ));
            }
            let reported = StageRecord::load(&store, &record);
            let stage = &workflow.stages[stage];
            if common.json {
                let mut artifacts = serde_json::Map::new();
                for (port, artifact, _) in &outputs {
                    let described = artifact.as_ref().map(|artifact| self.describe(&store, artifact)).transpose()?;
                    artifacts.insert(port.clone(), described.unwrap_or_default());
                }
                print_line(
                    &json!({
                        "name": stage.name, "kind": stage.kind.name(), "stale": stale, "key": record.key, "full_key": record.full_key,
                        "outputs": record.outputs, "artifacts": artifacts, "metrics": record.metrics, "provenance": record.provenance,
                        "samples": reported.samples, "tables": reported.tables, "values": reported.values,
                        "missing": reported.missing,
                    })
                    .to_string(),
                );
                continue;
            }
            print_text(&made(&stage.name, stale, &record));
            for (port, artifact, digest) in &outputs {
                match artifact {
                    Some(artifact) => print_as_it_is(&self.artifact(&store, port, artifact)?),
                    None => print_text(&format!("\n{port}: {digest} is not in the store any more; a run that needs it makes it again\n")),
                }
            }
            if let Some(missing) = missing_text(&workflow, &stage.name, &reported.missing) {
                print_text(&format!("\n{missing}\n"));
            }
            reported.tables.iter().for_each(|table| print_text(&format!("\n{}", render(table))));
            print_text(&self.samples(&reported));
        }
        Ok(Outcome::Done)
    }

    fn samples(&self, reported: &StageRecord) -> String {
        let from = reported.samples.len().saturating_sub(self.limit);
        let mut out = String::new();
        for sample in &reported.samples[from..] {
            let scores: Vec<String> = sample.scores.iter().map(|(name, value)| format!("{name} {}", text::number(*value))).collect();
            out += &format!("\nstep {}  {}\n  prompt:   {}\n", thousands(sample.step), scores.join("  "), text::clip(&sample.prompt, 160));
            out += &format!("  response: {}\n", text::clip(&sample.response, 400));
        }
        out
    }

    fn artifact(&self, store: &Store, port: &str, artifact: &Artifact) -> Result<String, Failure> {
        let manifest = artifact.manifest();
        let size = text::bytes(manifest.size_bytes());
        let mut out = format!("\n{port}: {} {}\n  {} entries, {size}\n", manifest.artifact_type, artifact.digest(), manifest.entries.len());
        if manifest.metadata.as_object().is_some_and(|metadata| !metadata.is_empty()) {
            let metadata = serde_json::to_string_pretty(&manifest.metadata).unwrap_or_default();
            metadata.lines().for_each(|line| out += &format!("  {}\n", text::clip(line, 160)));
        }
        let rows: Vec<Vec<String>> = manifest
            .entries
            .iter()
            .take(self.limit.max(20))
            .map(|entry| {
                let dtype = entry.dtype.map(|dtype| format!("{dtype:?}").to_lowercase()).unwrap_or_default();
                let shape = if entry.dtype.is_some() { format!("{:?}", entry.shape) } else { String::new() };
                vec![format!("  {}", visible(&entry.name)), text::bytes(entry.size_bytes), dtype, shape, entry.digest.short()]
            })
            .collect();
        out += &text::table(&["  entry", "size", "dtype", "shape", "digest"], &rows);
        if manifest.entries.len() > rows.len() {
            out += &format!("  ... and {} more\n", manifest.entries.len() - rows.len());
        }
        let shown = Rows::read(store, artifact, self.limit)?;
        out += &shown.render(takes_color(&std::io::stdout()));
        if !matches!(shown, Rows::None) {
            return Ok(out);
        }
        for entry in manifest.entries.iter().filter(|entry| entry.dtype.is_none() && is_text(&entry.name)) {
            let content = artifact.read(&entry.name)?;
            let head = String::from_utf8_lossy(&content[..content.len().min(1 << 16)]);
            out += &format!("\n  {}:\n", entry.name);
            head.lines().take(self.limit).for_each(|line| out += &format!("    {}\n", text::clip(line, 160)));
        }
        Ok(out)
    }

    /// An artifact for scripts: its manifest and, of datasets, the first rows, token by token.
    fn describe(&self, store: &Store, artifact: &Artifact) -> Result<Value, Failure> {
        let manifest = artifact.manifest();
        let mut described = json!({ "digest": artifact.digest(), "size_bytes": manifest.size_bytes(), "manifest": manifest });
        match Rows::read(store, artifact, self.limit)? {
            Rows::None => {}
            Rows::WithoutTokenizer => described["rows"] = Value::Null,
            Rows::Shown(rows) => described["rows"] = json!(rows),
        }
        Ok(described)
    }
}

/// Whether an entry's first lines are worth printing.
fn is_text(name: &str) -> bool {
    [".jsonl", ".txt", ".jinja"].iter().any(|ending| name.ends_with(ending))
}

fn open(store: &Store, digest: Digest) -> Result<Artifact, Failure> {
    store.open_artifact(digest)?.ok_or_else(|| {
        let message = format!("there is no artifact {digest} in {}", store.folder().display());
        Failure::request("unknown_artifact", message, "`rlflow show WORKFLOW STAGE` prints a stage's digests")
    })
}

fn made(name: &str, stale: bool, record: &ActionRecord) -> String {
    let made = &record.provenance;
    let mut out = format!("{name} ({}){}\n", made.kind, if stale { ", of other settings or inputs than today's" } else { "" });
    let mut line = |name: &str, value: String| {
        if !value.is_empty() {
            out += &format!("  {name:<9} {value}\n");
        }
    };
    line("key", record.key.to_string());
    line("made", format!("{} in {} by run {}", crate::log::local_time(made.started_at), text::seconds(made.duration_seconds), made.run_id));
    line("on", format!("{}: {} ({})", made.host, made.devices.join(", "), made.numerics));
    line("resumed", made.resumed_from_step.map(|step| format!("from step {}", thousands(step))).unwrap_or_default());
    line("adopted", if made.adopted { "yes: an older result was accepted under this key".to_owned() } else { String::new() });
    for (port, inputs) in &made.inputs {
        let inputs: Vec<String> = inputs.iter().map(|(stage, digest)| format!("{stage} {}", digest.short())).collect();
        line("input", format!("{port}: {}", inputs.join(", ")));
    }
    for (file, digest) in &made.files {
        line("file", format!("{file} {}", digest.short()));
    }
    for (setting, value) in rlflow_engine::settings::flatten(&made.settings) {
        line("setting", format!("{setting} = {}", text::clip(&rlflow_engine::settings::display(value), 100)));
    }
    for (metric, value) in record.metrics.iter().chain(&made.measurements) {
        line("metric", format!("{metric} = {}", text::number(*value)));
    }
    out
}
