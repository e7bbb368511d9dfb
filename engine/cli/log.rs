use clap::Args;
use jiff::{Timestamp, tz::TimeZone};
use serde_json::json;

use rlflow_engine::{history::past_runs, text};

use crate::{
    common::Common,
    failure::{Failure, Outcome, print_line, print_text},
};

/// List past runs: what ran, why, how long, on what
#[derive(Args)]
pub struct Log {
    /// A workflow file, to find its store; or the name of one run, to see its stages
    #[arg(value_name = "WORKFLOW|RUN")]
    pub of: Option<String>,
    /// How many runs, newest first
    #[arg(short = 'n', long, default_value_t = 20)]
    pub limit: usize,
}

impl Log {
    pub fn run(self, common: &Common) -> Result<Outcome, Failure> {
        let file = self.of.as_deref().map(std::path::Path::new).filter(|path| path.is_file());
        let store = match file {
            Some(file) => common.store_of_file(file)?,
            None => common.store_here()?,
        };
        let one = self.of.as_deref().filter(|_| file.is_none());
        let mut runs = past_runs(&store, if one.is_some() { usize::MAX } else { self.limit })?;
        if let Some(id) = one {
            runs.retain(|run| run.id.starts_with(id));
            if runs.is_empty() {
                return Err(Failure::request(
                    "unknown_run",
                    format!("there is no run `{id}` in {}", store.folder().display()),
                    "`rlflow log` lists them",
                ));
            }
        }
        if common.json {
            print_line(&json!({ "runs": runs }).to_string());
            return Ok(Outcome::Done);
        }
        let rows: Vec<Vec<String>> = runs
            .iter()
            .map(|run| {
                let ended = match (run.ok, run.interrupted) {
                    (Some(true), _) => "ok",
                    (Some(false), true) => "interrupted",
                    (Some(false), false) => "failed",
                    (None, _) if run.running => "running",
                    (None, _) => "did not end",
                };
                let ran = run.stages.iter().filter(|stage| stage["status"] != "skipped");
                let ran: Vec<&str> = ran.filter_map(|stage| stage["stage"].as_str()).collect();
                let what = if ran.is_empty() && run.ok.is_some() { format!("all {} cached", run.cached) } else { ran.join(", ") };
                let time = run.seconds.map(text::seconds).unwrap_or_default();
                vec![run.id.clone(), local_time(run.time), ended.into(), time, run.workflow.clone(), text::clip(&what, 60)]
            })
            .collect();
        print_text(&text::table(&["run", "began", "ended", "time", "workflow", "what ran"], &rows));
        if one.is_some() {
            for run in &runs {
                print_text(&format!("\n{} on {}: {}\n", run.id, run.host, run.command.join(" ")));
                let rows: Vec<Vec<String>> = run
                    .stages
                    .iter()
                    .map(|stage| {
                        let text = |name: &str| stage[name].as_str().unwrap_or_default().to_owned();
                        let why = stage["reason"]["text"].as_str().or(stage["error"].as_str()).unwrap_or_default().to_owned();
                        vec![text("stage"), text("status"), text::seconds(stage["seconds"].as_f64().unwrap_or(0.0)), why]
                    })
                    .collect();
                print_text(&text::table(&["stage", "result", "time", "why"], &rows));
            }
        }
        Ok(Outcome::Done)
    }
}

/// A time as the user's clock shows it.
pub fn local_time(seconds: f64) -> String {
    let zoned = Timestamp::from_microsecond((seconds * 1e6) as i64).map(|time| time.to_zoned(TimeZone::system()));
    zoned.map_or_else(|_| String::new(), |time| time.strftime("%Y-%m-%d %H:%M:%S").to_string())
}
