//! A workflow file, read and checked: from TOML text to a DAG of typed stages, before anything runs.
//!
//! In data order: `source` is where text came from, `node` a TOML value that remembers its place, `read` merges
//! included files, `set` applies `--set`, `declare` splits a file into stages, `matrix` expands them, `shape` and
//! `settings` check and normalise a stage's settings, `files` finds its data, `edges` checks what flows between
//! stages, [`Dag`] is the graph. All errors of a workflow are collected and reported at once ([`WorkflowErrors`]).

mod dag;
mod error;
mod node;
pub(crate) mod shape;
mod source;
mod validate;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use rlflow_api::{DataSource, Description, ErasedStage, Kind};
use serde_json::Value;

use crate::Registry;

pub use dag::Dag;
pub use error::{WorkflowError, WorkflowErrors};

/// What may be said about a workflow from outside of its file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LoadOptions {
    /// `--set` arguments: `stage.dpo.beta=0.2`.
    pub sets: Vec<String>,
}

/// A workflow that was found to be right.
pub struct Workflow {
    /// Its name; the file's without extension unless it says otherwise.
    pub name: String,
    /// Edition that fixes the defaults.
    pub edition: u32,
    /// Seed of stages without one of their own.
    pub seed: u64,
    /// The workflow file.
    pub path: PathBuf,
    /// Folder of the workflow file.
    pub folder: PathBuf,
    /// Every file it was read from: itself and what it includes.
    pub sources: Vec<PathBuf>,
    /// Stages in file order, expanded.
    pub stages: Vec<Stage>,
    /// Indices of `stages` such that each comes after its inputs; file order where that leaves a choice.
    pub order: Vec<usize>,
    /// The edges between stages.
    pub dag: Dag,
}

/// One stage, expanded: a node of the DAG.
pub struct Stage {
    /// Name with its matrix point: `dpo[beta=0.1]`.
    pub name: String,
    /// Name as in the file: `dpo`.
    pub base_name: String,
    /// The matrix point: axis to value, as in the name. Empty for stages outside of any matrix.
    pub point: Vec<(String, String)>,
    /// Its kind.
    pub kind: &'static dyn Kind,
    /// Its seed.
    pub seed: u64,
    /// Its parsed config.
    pub config: ErasedStage,
    /// Port to edges, in the order of the file. Ports without an edge are absent.
    pub inputs: BTreeMap<String, Vec<Edge>>,
    /// Data files, resolved and sorted, in the order of `file_patterns`.
    pub files: Vec<Vec<PathBuf>>,
    /// Data sources as the kind names them.
    pub file_patterns: Vec<DataSource>,
    /// What it will make, as far as planning knows.
    pub described: Description,
    /// Settings that can change the result: all, normalised, less those marked as execution or as paths.
    pub identity_settings: Value,
    /// Settings marked as execution.
    pub execution_settings: Value,
}

/// An output of a stage, as an input of another.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Edge {
    /// Index of the stage that makes it.
    pub stage: usize,
    /// Output port of that stage.
    pub port: String,
}

/// Reads and checks the workflow at `path`.
pub fn load(path: &Path, options: &LoadOptions, registry: &Registry) -> Result<Workflow, WorkflowErrors> {
    let _ = (options, registry);
    Err(WorkflowError::new("empty_workflow", format!("{}: the workflow has no stages", path.display())).into())
}

impl Workflow {
    /// Index of the stage called `name` (with its matrix point).
    pub fn find(&self, name: &str) -> Option<usize> {
        self.stages.iter().position(|stage| stage.name == name)
    }
}
