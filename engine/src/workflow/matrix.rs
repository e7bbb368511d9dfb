use std::collections::{HashMap, HashSet};

use rlflow_api::Arity;

use super::{
    WorkflowError,
    declare::{Declared, Input},
    error::Collector,
    node::{Data, Entry, MAX_STEPS, Node, Step, Table, split_path},
    reference::{Points, Reference, same_value},
    source::Span,
};
use crate::suggest::did_you_mean;

/// Most stages that all matrices of a workflow may expand to.
const MAX_POINTS: usize = 10_000;
/// Most edges that collecting matrix points may make.
const MAX_EDGES: usize = 1_000_000;

/// One list of values, with the stage that declares it.
pub(crate) struct Axis {
    pub base: usize,
    pub path: String,
    key: Span,
    pub values: Vec<Node>,
    labels: Vec<String>,
}

/// A stage at one point of the matrices above it.
pub(crate) struct Expanded {
    /// Index of the declared stage.
    pub base: usize,
    pub name: String,
    /// Axis name and value, as in the stage's name.
    pub point: Vec<(String, String)>,
    /// Axis and index of its value: the declared stage's own axes, which change its settings.
    pub own: Vec<(usize, usize)>,
    pub edges: Vec<ExpandedEdge>,
}

/// An input of an expanded stage.
#[derive(Clone, Copy)]
pub(crate) struct ExpandedEdge {
    /// Index into [`Declared::inputs`].
    pub input: usize,
    /// Index into [`Input::references`].
    pub reference: usize,
    /// Index of the expanded stage that it comes from.
    pub stage: usize,
}

/// The points of one declared stage: every combination of its axes' values, the last axis fastest.
#[derive(Default, Clone)]
struct Grid {
    axes: Vec<usize>,
    /// Names of the axes in names of this stage.
    names: Vec<String>,
    first: usize,
    points: usize,
}

/// The result of expanding.
pub(crate) struct Expansion {
    pub axes: Vec<Axis>,
    pub stages: Vec<Expanded>,
    /// Broken by what was reported here, by declared stage.
    pub broken: Vec<bool>,
}

/// Expands every declared stage. `order` is a topological order of those that stand on no cycle.
pub(crate) fn expand(declared: &[Declared], by_name: &HashMap<&str, usize>, order: &[usize], errors: &mut Collector) -> Expansion {
    let mut axes = Vec::new();
    let mut broken = vec![false; declared.len()];
    let mut own = Vec::with_capacity(declared.len());
    for (base, stage) in declared.iter().enumerate() {
        let (axes, wrong) = own_axes(base, stage, &mut axes, errors);
        own.push(axes);
        broken[base] |= wrong;
    }
    let mut grids: Vec<Grid> = vec![Grid::default(); declared.len()];
    let mut total = 0_usize;
    let rest = (0..declared.len()).filter({
        let ordered: HashSet<usize> = order.iter().copied().collect();
        move |base| !ordered.contains(base)
    });
    for base in order.iter().copied().chain(rest) {
        let stage = &declared[base];
        let mut found: Vec<usize> = Vec::new();
        for (port, input) in &stage.inputs {
            if takes_many(stage, port, input) {
                continue;
            }
            for reference in &input.references {
                let Some(source) = by_name.get(reference.stage.as_str()) else { continue };
                let pinned: Vec<&str> = match &reference.points {
                    Points::All => continue,
                    Points::Same => Vec::new(),
                    Points::At(pairs) => pairs.iter().map(|(axis, _)| axis.as_str()).collect(),
                };
                let grid = &grids[*source];
                let free = grid.axes.iter().zip(&grid.names).filter(|(_, name)| !pinned.contains(&name.as_str())).map(|(axis, _)| *axis);
                free.for_each(|axis| {
                    if !found.contains(&axis) {
                        found.push(axis);
                    }
                });
            }
        }
        found.extend(&own[base]);
        let points = found.iter().try_fold(1_usize, |product, axis| product.checked_mul(axes[*axis].values.len())).unwrap_or(usize::MAX);
        if !found.is_empty() {
            total = total.saturating_add(points);
        }
        if points > MAX_POINTS || total > MAX_POINTS {
            let message = format!("the matrices of this workflow expand to more than {MAX_POINTS} stages, at stage `{}`", stage.name);
            let span = stage.matrix.first().map_or(stage.span, |axis| axis.key);
            errors.add(span, WorkflowError::new("bad_matrix", message).with_hint("take values out, or split the workflow"));
            return Expansion { axes, stages: Vec::new(), broken: vec![true; declared.len()] };
        }
        grids[base] = Grid { names: axis_names(&found, base, &axes, declared), axes: found, first: 0, points };
    }
    let mut first = 0;
    for grid in &mut grids {
        grid.first = first;
        first += grid.points;
    }
    let mut stages = Vec::with_capacity(first);
    let mut edges = 0;
    for (base, stage) in declared.iter().enumerate() {
        let inputs = resolve_inputs(stage, by_name, &grids, &axes, declared, errors, &mut broken[base]);
        for point in 0..grids[base].points {
            stages.push(expanded(base, stage, point, &grids, &axes, &inputs));
            edges += stages.last().map_or(0, |stage| stage.edges.len());
            if edges > MAX_EDGES {
                let message = format!("collecting matrix points makes more than {MAX_EDGES} edges, at stage `{}`", stage.name);
                errors.add(stage.span, WorkflowError::new("bad_matrix", message));
                return Expansion { axes, stages: Vec::new(), broken: vec![true; declared.len()] };
            }
        }
    }
    Expansion { axes, stages, broken }
}

/// Whether a port takes a list. Of unknown kinds and ports only what is written can tell.
fn takes_many(stage: &Declared, port: &str, input: &Input) -> bool {
    let known = stage.kind.and_then(|kind| kind.inputs().iter().find(|known| known.name == port));
    known.map_or(input.references.len() > 1, |known| known.arity == Arity::Many)
}

/// The axes that a stage declares, and whether some of them are wrong.
fn own_axes(base: usize, stage: &Declared, axes: &mut Vec<Axis>, errors: &mut Collector) -> (Vec<usize>, bool) {
    let mut own = Vec::new();
    let mut broken = false;
    for axis in &stage.matrix {
        let labels: Vec<String> = axis.values.iter().enumerate().map(|(index, value)| label(value, index)).collect();
        let mut refuse = |span, error: WorkflowError| {
            errors.add(span, error);
            broken = true;
        };
        if axis.path == "inputs" || axis.path.starts_with("inputs.") {
            let error = WorkflowError::new("bad_matrix", format!("inputs of stage `{}` cannot be a matrix axis", stage.name));
            refuse(axis.key, error.with_hint("a matrix above this stage expands it; `dpo[beta=0.1]` names one point"));
            continue;
        }
        if axis.path.split(['.', '[']).count() > MAX_STEPS {
            refuse(axis.key, WorkflowError::new("bad_matrix", format!("a matrix axis of stage `{}` is nested too deeply", stage.name)));
            continue;
        }
        if let Some(set) = entry_at(&stage.settings, &axis.path).or(stage.seed.filter(|_| axis.path == "seed").map(|_| axis.key)) {
            let error =
                WorkflowError::new("bad_matrix", format!("`{}` of stage `{}` is set and is a matrix axis too", axis.path, stage.name));
            refuse(set, error.with_hint(format!("take one of the two out: `{0}`, or `matrix.{0}`", axis.path)));
            continue;
        }
        for value in axis.values.iter().filter(|_| axis.path == "seed") {
            if !matches!(value.data, Data::Integer(seed) if u64::try_from(seed).is_ok()) {
                let message = format!("`seed` must be an integer from 0 to {}, found {}", u64::MAX, value.found());
                refuse(value.span, WorkflowError::new("wrong_type", message));
            }
        }
        let mut seen = HashSet::new();
        if let Some(twice) = labels.iter().position(|label| !seen.insert(label)) {
            let message = format!("matrix axis `{}` of stage `{}` has the value {} twice", axis.path, stage.name, labels[twice]);
            refuse(axis.values[twice].span, WorkflowError::new("bad_matrix", message).with_hint("remove one of the two"));
            continue;
        }
        axes.push(Axis { base, key: axis.key, path: axis.path.clone(), values: axis.values.clone(), labels });
        own.push(axes.len() - 1);
    }
    (own, broken)
}

/// Where `path` is set, if it is.
fn entry_at(table: &Table, path: &str) -> Option<Span> {
    let (first, rest) = path.split_once('.').map_or((path, None), |(first, rest)| (first, Some(rest)));
    let entry = table.get(first)?;
    match rest {
        None => Some(entry.key),
        Some(rest) => entry_at(entry.node.as_table()?, rest),
    }
}

/// A value as part of a name. What is no short scalar is counted instead.
fn label(value: &Node, index: usize) -> String {
    match &value.data {
        Data::Bool(flag) => flag.to_string(),
        Data::Integer(integer) => integer.to_string(),
        Data::Float(float) => number_label(*float),
        Data::String(text) if text.len() <= 60 && !text.is_empty() => text
            .chars()
            .map(|c| if c.is_control() || c.is_whitespace() || matches!(c, '[' | ']' | ',' | '=' | '*') { '_' } else { c })
            .collect(),
        _ => format!("#{}", index + 1),
    }
}

fn number_label(float: f64) -> String {
    if float != 0.0 && !(1e-6..1e15).contains(&float.abs()) { format!("{float:e}") } else { float.to_string() }
}

/// Names of axes within one stage: the setting, with the stage before it where two settings have one name.
fn axis_names(found: &[usize], base: usize, axes: &[Axis], declared: &[Declared]) -> Vec<String> {
    let name = |axis: &usize| {
        let shared = found.iter().filter(|other| axes[**other].path == axes[*axis].path).count() > 1;
        let axis = &axes[*axis];
        if shared && axis.base != base { format!("{}.{}", declared[axis.base].name, axis.path) } else { axis.path.clone() }
    };
    found.iter().map(name).collect()
}

/// One reference with what is known of it before any point is chosen.
struct Resolved {
    input: usize,
    reference: usize,
    source: usize,
    many: bool,
    /// For each axis of the source the value that the reference names.
    pinned: Vec<Option<usize>>,
    all: bool,
}

fn resolve_inputs(
    stage: &Declared,
    by_name: &HashMap<&str, usize>,
    grids: &[Grid],
    axes: &[Axis],
    declared: &[Declared],
    errors: &mut Collector,
    broken: &mut bool,
) -> Vec<Resolved> {
    let mut resolved = Vec::new();
    for (input_index, (port, input)) in stage.inputs.iter().enumerate() {
        let many = takes_many(stage, port, input);
        for (reference_index, reference) in input.references.iter().enumerate() {
            let Some(&source) = by_name.get(reference.stage.as_str()) else { continue };
            let grid = &grids[source];
            let all = reference.points == Points::All;
            if all && !many && grid.points > 1 {
                let message =
                    format!("input `{port}` of stage `{}` takes one stage, but `{}[*]` is {}", stage.name, reference.stage, grid.points);
                let hint = format!("name one of them, or write \"{}\" to expand `{}` too", reference.stage, stage.name);
                errors.add(reference.span, WorkflowError::new("too_many_inputs", message).with_hint(hint));
                *broken = true;
                continue;
            }
            match pin(reference, grid, axes, &declared[source].name) {
                Ok(pinned) => resolved.push(Resolved { input: input_index, reference: reference_index, source, many, pinned, all }),
                Err(error) => {
                    errors.add(reference.span, error);
                    *broken = true;
                }
            }
        }
    }
    resolved
}

/// Finds the values that a reference names.
fn pin(reference: &Reference, grid: &Grid, axes: &[Axis], source: &str) -> Result<Vec<Option<usize>>, WorkflowError> {
    let mut pinned = vec![None; grid.axes.len()];
    let Points::At(pairs) = &reference.points else { return Ok(pinned) };
    for (axis_name, value) in pairs {
        let Some(at) = grid.names.iter().position(|name| name == axis_name) else {
            let error = WorkflowError::new("unknown_stage", format!("stage `{source}` is not expanded over `{axis_name}`"));
            let hint = if grid.names.is_empty() {
                format!("no matrix expands it: write \"{source}\"")
            } else {
                did_you_mean(axis_name, grid.names.iter().map(String::as_str))
                    .unwrap_or_else(|| format!("it is expanded over: {}", grid.names.join(", ")))
            };
            return Err(error.with_hint(hint));
        };
        let labels = &axes[grid.axes[at]].labels;
        let Some(found) = labels.iter().position(|label| same_value(label, value)) else {
            let error = WorkflowError::new("unknown_stage", format!("stage `{source}` has no point `{axis_name}={value}`"));
            let shown: Vec<_> = labels.iter().take(20).map(String::as_str).collect();
            return Err(error.with_hint(format!("values of `{axis_name}`: {}", shown.join(", "))));
        };
        pinned[at] = Some(found);
    }
    Ok(pinned)
}

fn expanded(base: usize, stage: &Declared, point: usize, grids: &[Grid], axes: &[Axis], inputs: &[Resolved]) -> Expanded {
    let grid = &grids[base];
    if grid.axes.is_empty() && inputs.iter().all(|resolved| grids[resolved.source].axes.is_empty()) {
        // No matrix above: nothing to choose.
        let edge = |resolved: &Resolved| ExpandedEdge {
            input: resolved.input,
            reference: resolved.reference,
            stage: grids[resolved.source].first,
        };
        return Expanded { base, name: stage.name.clone(), point: Vec::new(), own: Vec::new(), edges: inputs.iter().map(edge).collect() };
    }
    let values = coordinates(point, &grid.axes, axes);
    let pairs: Vec<(String, String)> = grid
        .names
        .iter()
        .zip(&grid.axes)
        .zip(&values)
        .map(|((name, axis), value)| (name.clone(), axes[*axis].labels[*value].clone()))
        .collect();
    let name = match &pairs[..] {
        [] => stage.name.clone(),
        pairs => {
            let inside: Vec<_> = pairs.iter().map(|(axis, value)| format!("{axis}={value}")).collect();
            format!("{}[{}]", stage.name, inside.join(","))
        }
    };
    let mut edges = Vec::with_capacity(inputs.len());
    for resolved in inputs {
        let source = &grids[resolved.source];
        // Per axis of the source either one value or all of them.
        let chosen: Vec<Option<usize>> = source
            .axes
            .iter()
            .zip(&resolved.pinned)
            .map(|(axis, pinned)| match pinned {
                Some(value) => Some(*value),
                None if resolved.all => None,
                None => grid.axes.iter().position(|own| own == axis).map(|at| values[at]),
            })
            .collect();
        for at in matching_points(&chosen, &source.axes, axes) {
            edges.push(ExpandedEdge { input: resolved.input, reference: resolved.reference, stage: source.first + at });
            if !resolved.many {
                break;
            }
        }
    }
    let own = grid.axes.iter().zip(values).filter(|(axis, _)| axes[**axis].base == base).map(|(axis, value)| (*axis, value)).collect();
    Expanded { base, name, point: pairs, own, edges }
}

/// Index of the value of each axis at a point.
fn coordinates(mut point: usize, grid: &[usize], axes: &[Axis]) -> Vec<usize> {
    let mut values = vec![0; grid.len()];
    for (value, axis) in values.iter_mut().zip(grid).rev() {
        let length = axes[*axis].values.len();
        *value = point % length;
        point /= length;
    }
    values
}

/// Every point that agrees with `chosen`, in order.
fn matching_points(chosen: &[Option<usize>], grid: &[usize], axes: &[Axis]) -> Vec<usize> {
    let mut points = vec![0];
    for (choice, axis) in chosen.iter().zip(grid) {
        let length = axes[*axis].values.len();
        points = match choice {
            Some(value) => points.into_iter().map(|point| point * length + value).collect(),
            None => points.into_iter().flat_map(|point| (0..length).map(move |value| point * length + value)).collect(),
        };
    }
    points
}

/// Puts a stage's own matrix values into its settings. Returns the seed, if that is one of them.
pub(crate) fn apply(expanded: &Expanded, axes: &[Axis], settings: &mut Table) -> Option<u64> {
    let mut seed = None;
    for (axis, value) in &expanded.own {
        let axis = &axes[*axis];
        let value = &axis.values[*value];
        if axis.path == "seed" {
            seed = match value.data {
                Data::Integer(integer) => u64::try_from(integer).ok(),
                _ => None,
            };
            continue;
        }
        let steps: Vec<Step> = split_path(&axis.path);
        super::set::insert(settings, &steps, Entry { key: axis.key, node: value.clone() });
    }
    seed
}
