use clap::Args;
use serde_json::json;

use rlflow_api::CancelToken;
use rlflow_engine::{
    EngineError, Request, RunOptions,
    event::{JsonLines, Sink},
    report::run_report,
    watch::{Watch as Watcher, Watched},
    workflow::{LoadOptions, load},
};

use crate::{
    common::{Common, WorkflowArgs, command_line, registry},
    failure::{Failure, Outcome, Stdout, print_line, print_text},
    host::host,
    progress,
    run::stop_on_signals,
};

/// Run again whenever the workflow or its data change
#[derive(Args)]
pub struct Watch {
    #[command(flatten)]
    pub workflow: WorkflowArgs,
    /// Only these stages and what they need
    #[arg(value_name = "STAGE")]
    pub stages: Vec<String>,
    /// Stages at once
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    pub jobs: u16,
    /// Go on with stages that do not need a failed one
    #[arg(long)]
    pub keep_going: bool,
}

impl Watch {
    pub fn run(self, common: &Common) -> Result<Outcome, Failure> {
        let (first, store) = self.workflow.open(common)?;
        let path = first.path.clone();
        drop(first);
        let registry = registry();
        let load_options = LoadOptions { sets: self.workflow.sets.clone() };
        let stop = CancelToken::default();
        stop_on_signals(&stop);
        let options = RunOptions {
            request: Request { stages: self.stages.clone(), ..Request::default() },
            jobs: self.jobs.into(),
            keep_going: self.keep_going,
            command: command_line(),
            cached_metrics: common.json,
        };
        let (json, quiet, verbose) = (common.json, common.quiet, common.verbose > 0);
        let sinks = move || -> Vec<Box<dyn Sink>> {
            let mut sinks: Vec<Box<dyn Sink>> = Vec::new();
            if json {
                sinks.push(Box::new(JsonLines::new(Stdout)));
            }
            if !quiet {
                sinks.push(progress::sink(verbose));
            }
            sinks
        };
        let next = |command: &str, rest: &[&str]| self.workflow.command(common, command, rest);
        let resume = next("watch", &self.stages.iter().map(String::as_str).collect::<Vec<_>>());
        let tell = |event: Watched<'_>| match event {
            Watched::Broken(error) => {
                Failure::Engine(clone_error(error)).report(json);
                say(quiet, "waiting for a change");
            }
            Watched::Ran(workflow, summary) => {
                if !json {
                    print_text(&run_report(workflow, &store, summary, &resume, &next).unwrap_or_else(|error| format!("{error}\n")));
                }
                say(quiet, "waiting for a change");
            }
            Watched::Changed(path) if json => {
                print_line(&json!({ "event": "changed", "path": path, "time": rlflow_engine::event::now() }).to_string())
            }
            Watched::Changed(path) => say(quiet, &format!("{} changed", path.display())),
            Watched::Cancelling(stage) => say(quiet, &format!("{stage}: stopping, because what it reads changed")),
        };
        let watch = Watcher {
            load: &|| load(&path, &load_options, &registry),
            sinks: &sinks,
            tell: &tell,
            store: &store,
            host: &host(),
            options: &options,
            stop: &stop,
        };
        watch.run(&path)?;
        Ok(Outcome::Interrupted)
    }
}

fn say(quiet: bool, text: &str) {
    if !quiet {
        eprintln!("{}", crate::terminal::visible(text));
    }
}

/// The same error to report while the watch goes on.
fn clone_error(error: &EngineError) -> EngineError {
    match error {
        EngineError::Workflow(errors) => EngineError::Workflow(errors.clone()),
        other => EngineError::Io { operation: other.to_string(), source: std::io::Error::other("the watch goes on") },
    }
}
