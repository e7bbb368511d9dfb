use std::path::Path;

use clap::Args;

use rlflow_engine::{
    action::find_stages,
    diff::{self, Side},
    history::past_runs,
    settings, text,
    workflow::load,
};
use rlflow_store::{Digest, Store};

use crate::{
    artifact::one,
    common::{Common, registry},
    failure::{Failure, Outcome, print_line, print_text},
    host::host,
};

/// Differences in settings and metrics between two workflows, stages, runs or results
#[derive(Args)]
pub struct Diff {
    /// A workflow file, FILE:STAGE, a run's name, or an action key
    #[arg(value_name = "A")]
    pub a: String,
    /// The same; `:STAGE` alone means the file of A
    #[arg(value_name = "B")]
    pub b: String,
}

impl Diff {
    pub fn run(self, common: &Common) -> Result<Outcome, Failure> {
        let file_of_a = self.a.split_once(".toml:").map(|(file, _)| format!("{file}.toml"));
        let b = match (self.b.strip_prefix(':'), file_of_a) {
            (Some(stage), Some(file)) => format!("{file}:{stage}"),
            _ => self.b.clone(),
        };
        let (a, b) = (side(&self.a, common)?, side(&b, common)?);
        let stages = diff::diff(&a, &b);
        if common.json {
            print_line(&diff::to_json(&a, &b, &stages).to_string());
            return Ok(Outcome::Done);
        }
        print_text(&format!("a: {}\nb: {}\n", a.label, b.label));
        if stages.is_empty() {
            print_text("\nno differences\n");
        }
        for stage in &stages {
            match stage.only_in {
                Some(side) => print_text(&format!("\n{}: only in {side}\n", stage.name)),
                None => print_text(&format!("\n{}\n", stage.name)),
            }
            let number = |value: &Option<f64>| value.map(text::number).unwrap_or_default();
            let mut rows: Vec<Vec<String>> = stage
                .changes
                .iter()
                .map(|change| vec![format!("  {}", change.setting), settings::display(&change.from), settings::display(&change.to)])
                .collect();
            rows.extend(stage.metrics.iter().map(|(name, a, b)| vec![format!("  {name}"), number(a), number(b)]));
            if !rows.is_empty() {
                print_text(&text::table(&["  ", "a", "b"], &rows));
            }
        }
        Ok(Outcome::Done)
    }
}

fn side(name: &str, common: &Common) -> Result<Side, Failure> {
    let (file, stage) = match name.split_once(".toml:") {
        Some((file, stage)) => (format!("{file}.toml"), Some(stage)),
        None => (name.to_owned(), None),
    };
    if stage.is_some() || Path::new(&file).exists() {
        let workflow = load(Path::new(&file), &Default::default(), &registry())?;
        let store = common.store_beside(&workflow)?;
        let only = stage.map(|stage| find_stages(&workflow, stage, "STAGE")).transpose()?;
        return Ok(Side::of_workflow(name, &workflow, &store, &host(), only.as_deref())?);
    }
    let store = common.store_here()?;
    if let Ok(key) = name.parse::<Digest>() {
        return by_key(name, key, &store);
    }
    let runs = past_runs(&store, usize::MAX)?;
    match runs.iter().filter(|run| run.id.starts_with(name)).collect::<Vec<_>>()[..] {
        [run] => Ok(Side::of_run(run, &store)?),
        [] => {
            if let Some(key) = one(name, store.actions_beginning(name)?)? {
                return by_key(name, key, &store);
            }
            let message = format!("`{name}` is neither a workflow file nor a run or an action in {}", store.folder().display());
            Err(Failure::request("unknown_side", message, "`rlflow log` lists runs; `rlflow plan --json` prints action keys"))
        }
        _ => Err(Failure::request("ambiguous_run", format!("`{name}` is the beginning of several runs' names"), "write more of it")),
    }
}

fn by_key(name: &str, key: Digest, store: &Store) -> Result<Side, Failure> {
    match store.action(key)? {
        Some(record) => Ok(Side::of_record(name, &record.provenance.stage, &record)),
        None => {
            let message = format!("there is no action {key} in {}", store.folder().display());
            Err(Failure::request("unknown_action", message, "`rlflow plan --json` prints action keys"))
        }
    }
}
