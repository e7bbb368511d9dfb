use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    thread,
};

use rlflow_api::{DataSource, DescribeContext, InputMeta, Origin, Placement};

use super::{
    Dag, Described, Edge, LoadOptions, Place, Places, Stage, Workflow, WorkflowError, WorkflowErrors,
    declare::{self, Declared, Header},
    edges::{self, Wiring},
    error::Collector,
    files::{Finder, Lookup},
    matrix::{self, Expanded, ExpandedEdge, Expansion},
    node::{Table, span_of_path},
    read::Reader,
    set,
    settings::{self, Checked, Layer, problem_error},
    source::{Sources, Span},
};
use crate::Registry;

/// From this many stages on, settings are checked on several threads.
const PARALLEL_FROM: usize = 512;

/// Reads and checks the workflow at `path`. Everything wrong with it is reported at once.
pub fn load(path: &Path, options: &LoadOptions, registry: &Registry) -> Result<Workflow, WorkflowErrors> {
    let (mut sources, mut errors) = (Sources::default(), Collector::default());
    let mut reader = Reader::new(&mut sources, &mut errors);
    let Some(mut root) = reader.file(path, None) else { return Err(errors.finish(&sources)) };
    let files = reader.files;
    let folder = path.parent().unwrap_or(Path::new("")).to_owned();
    for argument in &options.sets {
        set::apply(argument, &mut root, &folder, &mut sources, &mut errors);
    }
    let header = declare::header(&mut root, registry, &mut errors);
    let declared = declare::stages(&mut root, registry, &mut errors);
    let sets = options.sets.clone();
    let mut loading = Loading { path, folder, sources, errors, registry, files, sets, lookups: Vec::new() };
    loading.stages(header, declared)
}

struct Loading<'a> {
    path: &'a Path,
    folder: PathBuf,
    sources: Sources,
    errors: Collector,
    registry: &'a Registry,
    files: Vec<PathBuf>,
    sets: Vec<String>,
    lookups: Vec<Lookup>,
}

/// What is found out about an expanded stage before anything flows.
struct Found {
    checked: Checked,
    file_patterns: Vec<DataSource>,
    files: Vec<Vec<PathBuf>>,
    broken: bool,
}

impl Loading<'_> {
    fn stages(&mut self, header: Header, mut declared: Vec<Declared>) -> Result<Workflow, WorkflowErrors> {
        // A copy of the names, so that the stages can be taken apart while they are looked up.
        let names: Vec<String> = declared.iter().map(|stage| stage.name.clone()).collect();
        let by_name: HashMap<&str, usize> = names.iter().enumerate().map(|(index, name)| (name.as_str(), index)).collect();
        let mut wiring = Wiring { declared: &declared, by_name: &by_name, errors: &mut self.errors };
        let base_dag = wiring.dag();
        wiring.cycles(&base_dag);
        let broken = wiring.check();
        let expansion = matrix::expand(&declared, &by_name, &base_dag.order(), &mut self.errors);
        for (index, stage) in declared.iter_mut().enumerate() {
            stage.broken |= broken[index] || expansion.broken[index];
        }
        edges::duplicates(&declared, &expansion.stages, &mut self.errors);
        let layers = settings::layers(&header, &declared, self.registry, &mut self.errors);
        let seeds: Vec<u64>;
        let found: Vec<Option<Found>>;
        (seeds, found) = self.check_settings(&header, &mut declared, &expansion, &layers);
        let stages = &expansion.stages;
        let edges = stages.iter().enumerate().flat_map(|(index, stage)| stage.edges.iter().map(move |edge| (edge.stage, index)));
        let dag = Dag::new(stages.len(), edges);
        let order = dag.order();
        let descriptions = self.describe(&declared, stages, &found, &order);
        if let Some(silent) = descriptions.iter().position(Option::is_none).filter(|_| self.errors.is_empty()) {
            let message = format!("stage `{}` cannot be described, and nothing says why", stages[silent].name);
            self.errors.add(declared[stages[silent].base].span, WorkflowError::new("internal", message));
        }
        if !self.errors.is_empty() {
            return Err(std::mem::take(&mut self.errors).finish(&self.sources));
        }
        Ok(self.workflow(header, declared, expansion, seeds, found, descriptions, dag, order))
    }

    /// Checks every stage's settings and finds its data files. Nothing for stages of unknown kinds.
    fn check_settings(
        &mut self,
        header: &Header,
        declared: &mut [Declared],
        expansion: &Expansion,
        layers: &HashMap<&'static str, Layer>,
    ) -> (Vec<u64>, Vec<Option<Found>>) {
        let mut seeds = Vec::with_capacity(expansion.stages.len());
        let mut work: Vec<(Option<Table>, Option<Checked>)> = Vec::with_capacity(expansion.stages.len());
        for (index, expanded) in expansion.stages.iter().enumerate() {
            let stage = &mut declared[expanded.base];
            // Only the last point of a stage may take its settings; those before it need copies.
            let is_last = expansion.stages.get(index + 1).is_none_or(|next| next.base != expanded.base);
            let mut own = if is_last { std::mem::take(&mut stage.settings) } else { stage.settings.clone() };
            let seed = matrix::apply(expanded, &expansion.axes, &mut own);
            seeds.push(seed.or(stage.seed).unwrap_or(header.seed));
            work.push((Some(own), None));
        }
        let check = |(expanded, (own, checked)): (&Expanded, &mut (Option<Table>, Option<Checked>))| {
            let stage = &declared[expanded.base];
            if let (Some(kind), Some(own)) = (stage.kind, own.take())
                && let Some(layer) = layers.get(kind.name())
            {
                *checked = Some(settings::check(&expanded.name, stage.span, own, kind, layer));
            }
        };
        let threads = if work.len() < PARALLEL_FROM { 1 } else { thread::available_parallelism().map_or(1, usize::from).min(8) };
        let share = work.len().div_ceil(threads).max(1);
        if threads == 1 {
            expansion.stages.iter().zip(&mut work).for_each(check);
        } else {
            thread::scope(|scope| {
                for (stages, work) in expansion.stages.chunks(share).zip(work.chunks_mut(share)) {
                    scope.spawn(|| stages.iter().zip(work).for_each(check));
                }
            });
        }
        let mut finder = Finder::default();
        let found = work
            .into_iter()
            .zip(&expansion.stages)
            .map(|((_, checked), expanded)| checked.map(|checked| self.found(&declared[expanded.base], checked, &mut finder)));
        let found: Vec<Option<Found>> = found.collect();
        self.lookups = finder.into_lookups();
        (seeds, found)
    }

    /// Finds the data files of a stage.
    fn found(&mut self, stage: &Declared, mut checked: Checked, finder: &mut Finder) -> Found {
        let kind = stage.kind;
        let mut broken = stage.broken || checked.is_broken();
        for (span, error) in std::mem::take(&mut checked.errors) {
            self.errors.add(span, error);
        }
        let file_patterns = match (kind, &checked.config) {
            (Some(kind), Some(config)) => kind.data_sources(config),
            _ => Vec::new(),
        };
        let mut files = Vec::with_capacity(file_patterns.len());
        for source in &file_patterns {
            let span = span_of_path(&checked.written, &source.setting).unwrap_or(stage.span);
            // A path is relative to the file that it is written in, also where that is included from elsewhere.
            let folder = self.sources.get(span.source).map_or(self.folder.as_path(), |source| source.folder.as_path());
            match finder.find(source, folder) {
                Ok(found) => files.push(found),
                Err(error) => {
                    self.errors.add(span, error.about(&stage.name));
                    broken = true;
                }
            }
        }
        Found { checked, file_patterns, files, broken }
    }

    /// Describes every stage. Where a stage is wrong, what follows it is checked against the little that is known of
    /// its outputs, so that all errors are found at once and one cause gives one error.
    fn describe(&mut self, declared: &[Declared], stages: &[Expanded], found: &[Option<Found>], order: &[usize]) -> Vec<Option<Described>> {
        let mut descriptions: Vec<Option<Described>> = (0..stages.len()).map(|_| None).collect();
        for &index in order {
            let (expanded, stage) = (&stages[index], &declared[stages[index].base]);
            let Some(kind) = stage.kind else { continue };
            let found_here = found[index].as_ref().filter(|found| !found.broken);
            let Some((found_here, config)) = found_here.and_then(|found| Some((found, found.checked.config.as_ref()?))) else {
                descriptions[index] = Some(edges::vague(kind, &expanded.name).into());
                continue;
            };
            let mut inputs: BTreeMap<String, Vec<InputMeta>> = BTreeMap::new();
            let known = expanded.edges.iter().all(|edge| {
                let Some((port, source)) = port_of(stage, declared, stages, edge) else { return false };
                let Some(description) = &descriptions[edge.stage] else { return false };
                let Some(meta) = description.output(port) else { return false };
                let Some((name, _)) = stage.inputs.get_index(edge.input) else { return false };
                let (settings, placement, made_of) = if edges::knows_makers(kind, name) {
                    let Some(config) = found[edge.stage].as_ref().and_then(|found| found.checked.config.as_ref()) else { return false };
                    let maker = declared[stages[edge.stage].base].kind;
                    let placement = maker.map_or_else(Placement::default, |maker| edges::asked_placement(maker, config));
                    let made_of = stages[edge.stage].edges.iter().filter_map(|above| {
                        let (port, _) = port_of(&declared[stages[edge.stage].base], declared, stages, above)?;
                        Some(Origin { stage: stages[above.stage].name.clone(), port: port.to_owned() })
                    });
                    (config.settings().clone(), placement, made_of.collect())
                } else {
                    (serde_json::Value::Null, Placement::default(), Vec::new())
                };
                let (stage, port, kind) = (stages[edge.stage].name.clone(), port.to_owned(), source.to_owned());
                let meta = InputMeta { stage, port, kind, meta: meta.clone(), placement, settings, made_of };
                match inputs.get_mut(name) {
                    Some(metas) => metas.push(meta),
                    None => drop(inputs.insert(name.clone(), vec![meta])),
                }
                true
            });
            if !known {
                descriptions[index] = Some(edges::vague(kind, &expanded.name).into());
                continue;
            }
            let spans = input_spans(stage, &expanded.edges);
            if !edges::check_metas(&expanded.name, kind, &inputs, &spans, &mut self.errors) {
                descriptions[index] = Some(edges::vague(kind, &expanded.name).into());
                continue;
            }
            let placement = edges::asked_placement(kind, config);
            let context = DescribeContext { stage: &expanded.name, inputs: &inputs, files: &found_here.files, placement: &placement };
            match edges::describe(kind, config, &context) {
                Ok(description) => descriptions[index] = Some(description.into()),
                Err(problems) => {
                    for problem in &problems {
                        let (span, error) = problem_error(&expanded.name, stage.span, &found_here.checked.written, &spans, problem);
                        self.errors.add(span, error);
                    }
                    descriptions[index] = Some(edges::vague(kind, &expanded.name).into());
                }
            }
        }
        descriptions
    }

    #[allow(clippy::too_many_arguments)]
    fn workflow(
        &mut self,
        header: Header,
        declared: Vec<Declared>,
        expansion: Expansion,
        seeds: Vec<u64>,
        found: Vec<Option<Found>>,
        descriptions: Vec<Option<Described>>,
        dag: Dag,
        order: Vec<usize>,
    ) -> Workflow {
        let mut stages = Vec::with_capacity(found.len());
        let mut places = Vec::with_capacity(found.len());
        let bases: Vec<usize> = expansion.stages.iter().map(|stage| stage.base).collect();
        let parts = expansion.stages.into_iter().zip(seeds).zip(found).zip(descriptions);
        for (((expanded, seed), found), described) in parts {
            let stage = &declared[expanded.base];
            let (Some(kind), Some(found), Some(described)) = (stage.kind, found, described) else { continue };
            let Some(config) = found.checked.config else { continue };
            let inputs = input_edges(stage, &declared, &bases, &expanded);
            places.push(Place { base: expanded.base, written: found.checked.written, edges: expanded.edges });
            stages.push(Stage {
                name: expanded.name,
                base_name: stage.name.clone(),
                point: expanded.point,
                kind,
                seed,
                config,
                inputs,
                files: found.files,
                file_patterns: found.file_patterns,
                described,
                identity_settings: found.checked.identity,
            });
        }
        let stem = || self.path.file_stem().map_or_else(|| "workflow".into(), |stem| stem.to_string_lossy().into_owned());
        Workflow {
            name: header.name.unwrap_or_else(stem),
            edition: header.edition,
            seed: header.seed,
            devices: header.devices,
            path: self.path.to_owned(),
            folder: self.folder.clone(),
            sources: std::mem::take(&mut self.files),
            sets: std::mem::take(&mut self.sets),
            lookups: std::mem::take(&mut self.lookups),
            stages,
            order,
            dag,
            places: Places { sources: std::mem::take(&mut self.sources), declared, stages: places },
        }
    }
}

/// Output port that an edge comes from, and kind of its stage.
fn port_of(stage: &Declared, declared: &[Declared], stages: &[Expanded], edge: &ExpandedEdge) -> Option<(&'static str, &'static str)> {
    let (_, input) = stage.inputs.get_index(edge.input)?;
    let kind = declared[stages[edge.stage].base].kind?;
    let port = edges::output_port(kind, input.references.get(edge.reference)?.port.as_deref())?;
    Some((port.name, kind.name()))
}

/// Where each edge of a stage is written.
pub(super) fn input_spans<'a>(stage: &'a Declared, edges: &[ExpandedEdge]) -> BTreeMap<&'a str, Vec<Span>> {
    let mut spans: BTreeMap<&str, Vec<Span>> = BTreeMap::new();
    for edge in edges {
        if let Some((name, input)) = stage.inputs.get_index(edge.input) {
            spans.entry(name).or_default().push(input.references[edge.reference].span);
        }
    }
    spans
}

fn input_edges(stage: &Declared, declared: &[Declared], bases: &[usize], expanded: &Expanded) -> BTreeMap<String, Vec<Edge>> {
    let mut inputs: BTreeMap<String, Vec<Edge>> = BTreeMap::new();
    for edge in &expanded.edges {
        let Some((name, input)) = stage.inputs.get_index(edge.input) else { continue };
        let output =
            declared[bases[edge.stage]].kind.and_then(|kind| edges::output_port(kind, input.references[edge.reference].port.as_deref()));
        let port = output.map_or("", |output| output.name).to_owned();
        let edge = Edge { stage: edge.stage, port };
        match inputs.get_mut(name) {
            Some(edges) => edges.push(edge),
            None => drop(inputs.insert(name.clone(), vec![edge])),
        }
    }
    inputs
}
