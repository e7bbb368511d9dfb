//! A workflow file, read and checked: from TOML text to a DAG of typed stages, before anything runs.
//!
//! In data order: `source` is where text came from, `node` a TOML value that remembers its place, `read` merges
//! included files, `set` applies `--set`, `declare` splits a file into stages, `matrix` expands them, `shape` and
//! `settings` check and normalise a stage's settings, `files` finds its data, `edges` checks what flows between
//! stages, [`Dag`] is the graph. All errors of a workflow are collected and reported at once ([`WorkflowErrors`]).

mod dag;
mod declare;
mod described;
mod devices;
mod edges;
mod error;
mod files;
mod identity;
mod load;
mod matrix;
pub(crate) mod node;
mod read;
mod reference;
mod set;
mod settings;
pub(crate) mod shape;
pub(crate) mod source;
pub(crate) mod validate;

use std::{collections::BTreeMap, path::PathBuf};

use rlflow_api::{
    ArtifactMeta, DataSource, DescribeContext, Description, ErasedStage, InputMeta, Kind, Origin, Placement, Problem, RowTokens,
};
use serde_json::Value;

pub use dag::Dag;
pub use described::Described;
pub use error::{WorkflowError, WorkflowErrors};
pub(crate) use files::Lookup;
pub use identity::IdentitySettings;
pub use load::load;
use node::Table;
use source::{Sources, Span};

use crate::DeviceInfo;

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
    /// Devices that it may plan with, whatever this machine has.
    pub devices: Vec<DeviceInfo>,
    /// The workflow file.
    pub path: PathBuf,
    /// Folder of the workflow file.
    pub folder: PathBuf,
    /// Every file it was read from: itself and what it includes.
    pub sources: Vec<PathBuf>,
    /// What was laid over it ([`LoadOptions::sets`]).
    pub sets: Vec<String>,
    /// Every data source that was looked for.
    pub(crate) lookups: Vec<Lookup>,
    /// Stages in file order, expanded.
    pub stages: Vec<Stage>,
    /// Indices of `stages` such that each comes after its inputs; file order where that leaves a choice.
    pub order: Vec<usize>,
    /// The edges between stages.
    pub dag: Dag,
    places: Places,
}

/// Where things are written, for errors that are found after loading.
struct Places {
    sources: Sources,
    /// Stages as in the file, without their settings.
    declared: Vec<declare::Declared>,
    /// By stage.
    stages: Vec<Place>,
}

struct Place {
    /// Index of the declared stage.
    base: usize,
    /// Settings over what lies under them.
    written: Table,
    edges: Vec<matrix::ExpandedEdge>,
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
    pub described: Described,
    /// Settings that can change the result: all, normalised, less those marked as execution or as paths.
    pub identity_settings: IdentitySettings,
}

/// An output of a stage, as an input of another.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Edge {
    /// Index of the stage that makes it.
    pub stage: usize,
    /// Output port of that stage.
    pub port: String,
}

/// Tokens of the rows that a stage's result holds, where that is known.
pub(crate) type RowsOf<'a> = &'a dyn Fn(usize) -> Option<RowTokens>;

impl Workflow {
    /// Index of the stage called `name` (with its matrix point).
    pub fn find(&self, name: &str) -> Option<usize> {
        self.stages.iter().position(|stage| stage.name == name)
    }

    /// Indices of the stages that `names` mean, ascending: one stage, every point of a matrix by the name before the
    /// bracket or by `[*]`, or the points that a bracket selects.
    pub fn select(&self, names: &[String]) -> Result<Vec<usize>, WorkflowErrors> {
        let (mut selected, mut errors) = (std::collections::BTreeSet::new(), Vec::new());
        for name in names {
            let found: Vec<usize> = match reference::Reference::parse(name, Span::NOWHERE) {
                Some(reference) if reference.port.is_none() => {
                    (0..self.stages.len()).filter(|index| reference.selects(&self.stages[*index])).collect()
                }
                _ => self.find(name).into_iter().collect(),
            };
            if found.is_empty() {
                let known = self.stages.iter().flat_map(|stage| [stage.name.as_str(), stage.base_name.as_str()]);
                let error = WorkflowError::new("unknown_stage", format!("the workflow has no stage `{name}`"));
                errors.push(match crate::suggest::did_you_mean(name, known) {
                    Some(hint) => error.with_hint(hint),
                    None => error,
                });
            }
            selected.extend(found);
        }
        if errors.is_empty() { Ok(selected.into_iter().collect()) } else { Err(WorkflowErrors::new(errors)) }
    }

    /// What planning knows of the inputs of a stage, with the places that `placed` gives their stages, and the rows that results hold.
    fn inputs(&self, stage: usize, placed: &dyn Fn(usize) -> Placement, rows: RowsOf<'_>) -> BTreeMap<String, Vec<InputMeta>> {
        let found = &self.stages[stage];
        let meta = |edge: &Edge, knows_makers: bool| {
            let source = &self.stages[edge.stage];
            let meta = source.described.output(&edge.port)?.clone();
            let origin = |above: &Edge| Origin { stage: self.stages[above.stage].name.clone(), port: above.port.clone() };
            let (placement, settings, made_of) = match knows_makers {
                true => (placed(edge.stage), source.config.settings().clone(), source.inputs.values().flatten().map(origin).collect()),
                false => (Placement::default(), Value::Null, Vec::new()),
            };
            Some(InputMeta {
                stage: source.name.clone(),
                port: edge.port.clone(),
                kind: source.kind.name().to_owned(),
                meta: ArtifactMeta { row_tokens: rows(edge.stage), ..meta },
                placement,
                settings,
                made_of,
            })
        };
        let of_port = |(port, edges): (&String, &Vec<Edge>)| {
            let knows_makers = edges::knows_makers(found.kind, port);
            (port.clone(), edges.iter().filter_map(|edge| meta(edge, knows_makers)).collect::<Vec<_>>())
        };
        found.inputs.iter().map(of_port).collect()
    }

    /// The text of every file that it was read from, in the order of `sources`.
    pub(crate) fn source_texts(&self) -> impl Iterator<Item = &str> {
        // What `--set` says comes after all files.
        (0..self.sources.len() as u32).filter_map(|index| Some(&*self.places.sources.get(index)?.text))
    }

    /// Where a stage asks to run: on the CPU and at level 0 where that is decided later. It was described for this when loading.
    pub(crate) fn asked_placement(&self, stage: usize) -> Placement {
        edges::asked_placement(self.stages[stage].kind, &self.stages[stage].config)
    }

    /// Describes a stage again, for another place.
    pub fn describe(&self, stage: usize, placement: &Placement) -> Result<Description, WorkflowErrors> {
        self.describe_as(stage, &self.stages[stage].config, placement, &|_| None)
    }

    /// Describes a stage that holds models of others under `config`, with these where `placed` says.
    pub fn describe_holding(
        &self,
        stage: usize,
        config: &ErasedStage,
        placed: &dyn Fn(usize) -> Placement,
        rows: RowsOf<'_>,
    ) -> Option<Description> {
        let (inputs, found) = (self.inputs(stage, placed, rows), &self.stages[stage]);
        let placement = Placement::default();
        let context = DescribeContext { stage: &found.name, inputs: &inputs, files: &found.files, placement: &placement };
        edges::describe(found.kind, config, &context).ok()
    }

    /// The same under another config, with the rows that results hold.
    pub fn describe_as(
        &self,
        stage: usize,
        config: &ErasedStage,
        placement: &Placement,
        rows: RowsOf<'_>,
    ) -> Result<Description, WorkflowErrors> {
        let inputs = self.inputs(stage, &|source| self.asked_placement(source), rows);
        let found = &self.stages[stage];
        let context = DescribeContext { stage: &found.name, inputs: &inputs, files: &found.files, placement };
        let told = |problems: Vec<Problem>| WorkflowErrors::new(problems.iter().map(|problem| self.error(stage, problem)).collect());
        edges::describe(found.kind, config, &context).map_err(told)
    }

    /// Whether a setting of a stage is written somewhere, rather than a default.
    pub(crate) fn is_written(&self, stage: usize, setting: &str) -> bool {
        node::is_written(&self.places.stages[stage].written, setting)
    }

    /// The error for a problem with a stage, placed where its setting or input is written.
    pub fn error(&self, stage: usize, problem: &Problem) -> WorkflowError {
        let place = &self.places.stages[stage];
        let declared = &self.places.declared[place.base];
        let inputs = load::input_spans(declared, &place.edges);
        let (span, error) = settings::problem_error(&self.stages[stage].name, declared.span, &place.written, &inputs, problem);
        error.at(&self.places.sources, span)
    }
}

#[cfg(test)]
mod tests;
