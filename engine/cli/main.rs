//! The rlflow command. One file per command; each prints data to stdout and everything else to stderr.

mod adopt;
mod artifact;
mod chat;
mod common;
mod devices;
mod diff;
mod export;
mod failure;
mod generate;
mod graph;
mod host;
mod import;
mod lineage;
mod log;
mod metrics;
mod plan;
mod processes;
mod progress;
mod report;
mod rows;
mod run;
mod schema;
mod show;
mod status;
mod store;
mod terminal;
mod watch;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use common::Common;
use failure::Outcome;

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
    Watch(watch::Watch),
    Graph(graph::Graph),
    Metrics(metrics::Metrics),
    Generate(generate::Generate),
    Chat(chat::Chat),
    Report(report::Report),
    Diff(diff::Diff),
    Show(show::Show),
    Lineage(lineage::Lineage),
    Log(log::Log),
    Adopt(adopt::Adopt),
    Import(import::Import),
    Export(export::Export),
    Gc(store::Gc),
    Fsck(store::Fsck),
    Du(store::Du),
    Pin(store::Pin),
    Schema(schema::Schema),
    Devices(devices::Devices),
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

#[global_allocator]
static ALLOCATOR: rlflow_model::Allocator = rlflow_model::Allocator;

fn main() -> ExitCode {
    let wants_json = std::env::args_os().any(|argument| argument == "--json");
    rlflow_model::keep_freed_memory();
    rlflow_api::panics::install(rlflow_model::is_pool_thread);
    let world = match processes::World::join() {
        Ok(world) => world,
        Err(failure) => return failure.report(wants_json),
    };
    let cli = Cli::try_parse();
    if let Ok(cli) = &cli {
        common::init_logging(&cli.common);
    }
    let code = world.serve().unwrap_or_else(|| match cli {
        Ok(cli) => run_command(cli),
        Err(error) => failure::usage(&error, wants_json),
    });
    world.leave();
    code
}

fn run_command(cli: Cli) -> ExitCode {
    let done = match cli.command {
        Command::Run(command) => command.run(&cli.common),
        Command::Plan(command) => command.run(&cli.common),
        Command::Status(command) => command.run(&cli.common),
        Command::Watch(command) => command.run(&cli.common),
        Command::Graph(command) => command.run(&cli.common),
        Command::Metrics(command) => command.run(&cli.common),
        Command::Generate(command) => command.run(&cli.common),
        Command::Chat(command) => command.run(&cli.common),
        Command::Report(command) => command.run(&cli.common),
        Command::Diff(command) => command.run(&cli.common),
        Command::Show(command) => command.run(&cli.common),
        Command::Lineage(command) => command.run(&cli.common),
        Command::Log(command) => command.run(&cli.common),
        Command::Adopt(command) => command.run(&cli.common),
        Command::Import(command) => command.run(&cli.common),
        Command::Export(command) => command.run(&cli.common),
        Command::Gc(command) => command.run(&cli.common),
        Command::Fsck(command) => command.run(&cli.common),
        Command::Du(command) => command.run(&cli.common),
        Command::Pin(command) => command.run(&cli.common),
        Command::Schema(command) => command.run(&cli.common),
        Command::Devices(command) => command.run(&cli.common),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "rlflow", &mut script);
            failure::print_as_it_is(&String::from_utf8_lossy(&script));
            Ok(Outcome::Done)
        }
    };
    match done {
        Ok(Outcome::Done) if failure::lost_output() => Outcome::Failed.into(),
        Ok(outcome) => outcome.into(),
        Err(failure) => failure.report(cli.common.json),
    }
}
