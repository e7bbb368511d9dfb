use std::time::Instant;

use clap::Args;

use rlflow_api::CancelToken;
use rlflow_engine::{
    Request, RunOptions,
    event::{Events, JsonLines, Sink, StageStatus},
    report::{nothing_ran, run_report},
};

use crate::{
    common::{Common, WorkflowArgs, command_line},
    failure::{Failure, Outcome, Stdout, print_text},
    host::host,
    progress,
    terminal::visible,
};

/// Run what is not cached
#[derive(Args)]
pub struct Run {
    #[command(flatten)]
    pub workflow: WorkflowArgs,
    /// Only these stages and what they need
    #[arg(value_name = "STAGE")]
    pub stages: Vec<String>,
    /// Stages at once
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    pub jobs: u16,
    /// Run this stage whether it is cached or not
    #[arg(long, value_name = "STAGE")]
    pub force: Vec<String>,
    /// Go on with stages that do not need a failed one
    #[arg(long)]
    pub keep_going: bool,
    /// Run everything that was asked for, cached or not
    #[arg(long)]
    pub no_cache: bool,
}

impl Run {
    pub fn run(self, common: &Common) -> Result<Outcome, Failure> {
        let (started, host) = (Instant::now(), host());
        let request = Request { stages: self.stages.clone(), force: self.force.clone(), no_cache: self.no_cache };
        // Scripts and who wants to read more are told about every stage.
        let is_short = request == Request::default() && !common.json && common.verbose == 0;
        if is_short
            && let Some(settled) = self.workflow.settled(common, &host)
            && let Some(seconds) = settled.run(&command_line(), self.jobs.into(), started)
        {
            print_text(&nothing_ran(settled.stages(), seconds));
            return Ok(Outcome::Done);
        }
        let (workflow, store) = self.workflow.open(common)?;
        let mut sinks: Vec<Box<dyn Sink>> = Vec::new();
        if common.json {
            sinks.push(Box::new(JsonLines::new(Stdout)));
        }
        if !common.quiet {
            sinks.push(progress::sink(common.verbose > 0));
        }
        let events = Events::new(sinks);
        let cancel = CancelToken::default();
        stop_on_signals(&cancel);
        let options = RunOptions {
            request,
            jobs: self.jobs.into(),
            keep_going: self.keep_going,
            command: command_line(),
            cached_metrics: common.json,
        };
        let summary = rlflow_engine::run(&workflow, &store, &host, &options, &events, &cancel)?;
        if common.quiet {
            // Progress is what nobody wants to read; why it failed is not.
            let failed = summary.stages.iter().filter(|stage| stage.status == StageStatus::Failed && !stage.was_interrupted());
            failed.for_each(|stage| eprintln!("error: {}: {}", stage.name, visible(stage.error.as_deref().unwrap_or("no message"))));
        }
        if !common.json {
            print_text(&run_report(&workflow, &store, &summary, &self.resume_command(common), &|command, rest| {
                self.workflow.command(common, command, rest)
            })?);
        }
        let outcome = match (summary.interrupted && !summary.ok(), summary.ok()) {
            (true, _) => Outcome::Interrupted,
            (false, true) => Outcome::Done,
            (false, false) => Outcome::Failed,
        };
        // The process ends here: taking ten thousand stages apart first would only take time.
        std::mem::forget((workflow, summary));
        Ok(outcome)
    }

    /// The command that goes on where this one stopped: the same without what would start over.
    fn resume_command(&self, common: &Common) -> String {
        let jobs = self.jobs.to_string();
        let mut rest: Vec<&str> = self.stages.iter().map(String::as_str).collect();
        if self.jobs > 1 {
            rest.extend(["--jobs", &jobs]);
        }
        if self.keep_going {
            rest.push("--keep-going");
        }
        self.workflow.command(common, "run", &rest)
    }
}

/// The first Ctrl-C (or SIGTERM, SIGHUP) asks stages to stop after a snapshot; the second ends the process.
pub fn stop_on_signals(cancel: &CancelToken) {
    let cancel = cancel.clone();
    let handler = move || {
        // A launcher that lost a process ends the others; the stage that runs says which it was.
        if crate::processes::is_one_lost() {
            return;
        }
        if cancel.is_cancelled() {
            std::process::exit(130);
        }
        cancel.cancel();
        eprintln!("stopping after a snapshot; once more to stop at once");
    };
    if let Err(error) = ctrlc::set_handler(handler) {
        tracing::warn!(%error, "Ctrl-C will stop the run at once, without a snapshot");
    }
}
