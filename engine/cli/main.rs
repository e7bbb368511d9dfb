//! The rlflow command. One file per command; each prints data to stdout and everything else to stderr.

mod common;
mod devices;
mod failure;
mod host;
mod log;
mod metrics;
mod plan;
mod progress;
mod run;
mod show;
mod status;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use common::Common;
use failure::{Failure, Outcome};

/// A declarative RLHF workflow engine: one TOML file from raw text to an aligned, evaluated model.
#[derive(Parser)]
#[command(name = "rlflow", version, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Run(run::Run),
    Plan(plan::Plan),
    Status(status::Status),
    Metrics(metrics::Metrics),
    Show(show::Show),
    Log(log::Log),
    Devices(devices::Devices),
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

fn main() -> ExitCode {
    let wants_json = std::env::args_os().any(|argument| argument == "--json");
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return failure::usage(&error, wants_json),
    };
    common::init_logging(&cli.common);
    let done = match cli.command {
        Command::Run(command) => command.run(&cli.common),
        Command::Plan(command) => command.run(&cli.common),
        Command::Status(command) => command.run(&cli.common),
        Command::Metrics(command) => command.run(&cli.common),
        Command::Show(command) => command.run(&cli.common),
        Command::Log(command) => command.run(&cli.common),
        Command::Devices(command) => command.run(&cli.common),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "rlflow", &mut std::io::stdout());
            Ok(Outcome::Done)
        }
    };
    match done {
        Ok(outcome) => outcome.into(),
        Err(failure) => failure.report(cli.common.json),
    }
}
