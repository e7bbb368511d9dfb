use std::path::{Path, PathBuf};

use clap::{
    ArgAction, Args,
    builder::{OsStringValueParser, TypedValueParser},
};
use tracing_subscriber::EnvFilter;

use rlflow_engine::{
    Host, Registry,
    settled::Settled,
    workflow::{LoadOptions, Workflow, load},
};
use rlflow_store::{Store, StoreError};

use crate::failure::Failure;

/// Options that every command takes.
#[derive(Args)]
pub struct Common {
    /// The store's folder [default: .rlflow beside the workflow]
    #[arg(long, global = true, value_name = "DIR", env = "RLFLOW_STORE", value_parser = OsStringValueParser::new().map(PathBuf::from))]
    pub store: Option<PathBuf>,
    /// Print JSON: one object, or JSON lines for streams
    #[arg(long, global = true)]
    pub json: bool,
    /// Say less on stderr
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// Say more on stderr (repeat for more)
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub verbose: u8,
}

/// A workflow file with what changes it from outside.
#[derive(Args)]
pub struct WorkflowArgs {
    /// The workflow file
    #[arg(value_name = "WORKFLOW")]
    pub workflow: PathBuf,
    /// Override a value of the workflow: stage.dpo.beta=0.2
    #[arg(long = "set", value_name = "PATH=VALUE")]
    pub sets: Vec<String>,
}

/// Every stage kind.
pub fn registry() -> Registry {
    Registry::new(rlflow_stages::kinds())
}

impl WorkflowArgs {
    /// Reads and checks the workflow.
    pub fn load(&self) -> Result<Workflow, Failure> {
        Ok(load(&self.workflow, &LoadOptions { sets: self.sets.clone() }, &registry())?)
    }

    /// The workflow with its store, if it was found before that all of its stages are cached, and nothing has changed.
    pub fn settled(&self, common: &Common, host: &Host) -> Option<Settled> {
        let folder = common.store_folder(self.workflow.parent().unwrap_or(Path::new("")));
        // Whatever is wrong is found, and told, on the long way.
        let store = if folder.is_dir() { Store::open(&folder).ok()? } else { return None };
        Settled::find(&self.workflow, &self.sets, &store, host)
    }

    /// Reads the workflow and opens its store.
    pub fn open(&self, common: &Common) -> Result<(Workflow, Store), Failure> {
        let workflow = self.load()?;
        let store = common.store_beside(&workflow)?;
        Ok((workflow, store))
    }

    /// Reads the workflow and opens its store to look at: if there is none, none is made.
    pub fn look(&self, common: &Common) -> Result<(Workflow, Store), Failure> {
        let workflow = self.load()?;
        let folder = common.store_folder(&workflow.folder);
        let store = if folder.exists() { open_store(&folder)? } else { Store::empty()? };
        Ok((workflow, store))
    }

    /// A command on the same workflow and store, to be printed. `rest` follows these.
    pub fn command(&self, common: &Common, command: &str, rest: &[&str]) -> String {
        let (file, store) = (self.workflow.to_string_lossy(), common.store.as_ref().map(|store| store.to_string_lossy()));
        let mut arguments = vec!["rlflow", command, &*file];
        arguments.extend(self.sets.iter().flat_map(|set| ["--set", set.as_str()]));
        if let Some(store) = &store {
            arguments.extend(["--store", &**store]);
        }
        arguments.extend_from_slice(rest);
        arguments.into_iter().map(shell_quote).collect::<Vec<_>>().join(" ")
    }
}

impl Common {
    /// The store's folder: as asked for, or beside `folder`. An empty name (`RLFLOW_STORE=`) asks for nothing.
    fn store_folder(&self, folder: &Path) -> PathBuf {
        self.store.clone().filter(|asked| !asked.as_os_str().is_empty()).unwrap_or_else(|| folder.join(".rlflow"))
    }

    /// The store of a workflow.
    pub fn store_beside(&self, workflow: &Workflow) -> Result<Store, Failure> {
        open_store(&self.store_folder(&workflow.folder))
    }

    /// The store for commands without a workflow: `--store`, or `.rlflow` here. It must exist.
    pub fn store_here(&self) -> Result<Store, Failure> {
        self.existing_store(Path::new(""))
    }

    /// The store for commands that need of a workflow only its folder: the file may be broken. It must exist.
    pub fn store_of_file(&self, file: &Path) -> Result<Store, Failure> {
        self.existing_store(file.parent().unwrap_or(Path::new("")))
    }

    fn existing_store(&self, beside: &Path) -> Result<Store, Failure> {
        let folder = self.store_folder(beside);
        if !folder.is_dir() {
            let message = format!("there is no store at {}", folder.display());
            return Err(Failure::request("no_store", message, "name it with --store DIR, or go to the folder that holds .rlflow"));
        }
        open_store(&folder)
    }
}

/// A folder that cannot be a store is a wrong request; what breaks in one that can is not.
fn open_store(folder: &Path) -> Result<Store, Failure> {
    Store::open(folder).map_err(|error| match error {
        StoreError::Io { .. } if !folder.is_dir() => {
            Failure::request("bad_store", format!("{} cannot be a store: {error}", folder.display()), "name a folder with --store DIR")
        }
        error => error.into(),
    })
}

/// `RUST_LOG` decides; without it warnings, or more with `-v`.
pub fn init_logging(common: &Common) {
    let default = match (common.quiet, common.verbose) {
        (true, _) => "error",
        (false, 0) => "warn",
        (false, 1) => "info",
        (false, _) => "debug",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(crate::failure::use_color())
        .with_target(false)
        .without_time()
        .init();
}

/// How this program was called, for a run's log.
pub fn command_line() -> Vec<String> {
    std::env::args_os().map(|argument| argument.to_string_lossy().into_owned()).collect()
}

/// Quotes an argument for a POSIX shell where it needs it.
pub fn shell_quote(argument: &str) -> String {
    let plain = |character: char| character.is_ascii_alphanumeric() || "-_./=:,@%+".contains(character);
    if !argument.is_empty() && argument.chars().all(plain) { argument.to_owned() } else { format!("'{}'", argument.replace('\'', r"'\''")) }
}
