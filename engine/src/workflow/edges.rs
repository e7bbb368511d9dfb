use std::collections::{BTreeMap, HashMap};

use rlflow_api::{
    Arity, ArtifactMeta, ArtifactType, DescribeContext, Description, DeviceChoice, DeviceSpec, ErasedStage, InputMeta, InputPort, Kind,
    OutputPort, Placement, ZeroSetting,
};

use super::{
    Dag, WorkflowError,
    declare::{Declared, Input},
    error::Collector,
    matrix::Expanded,
    reference::Reference,
    source::Span,
};
use crate::suggest::did_you_mean;

/// After this many errors, looking for the names that were probably meant costs more than it helps.
const MAX_SUGGESTIONS: usize = 200;

/// The stages of a file as their edges are checked.
pub(crate) struct Wiring<'a> {
    pub declared: &'a [Declared],
    pub by_name: &'a HashMap<&'a str, usize>,
    pub errors: &'a mut Collector,
}

impl Wiring<'_> {
    /// The graph of declared stages.
    pub fn dag(&self) -> Dag {
        let edges = self.declared.iter().enumerate().flat_map(|(index, stage)| {
            // What is connected to an input that does not exist leads nowhere.
            let exists = |port: &str| stage.kind.is_none_or(|kind| kind.inputs().iter().any(|known| known.name == port));
            let inputs = stage.inputs.iter().filter(move |(port, _)| exists(port));
            inputs
                .flat_map(|(_, input)| &input.references)
                .filter_map(move |reference| Some((*self.by_name.get(reference.stage.as_str())?, index)))
        });
        Dag::new(self.declared.len(), edges.collect::<Vec<_>>())
    }

    /// Reports stages that need each other, each circle once.
    pub fn cycles(&mut self, dag: &Dag) {
        for cycle in dag.cycles() {
            let names: Vec<&str> = cycle.iter().chain(cycle.first()).map(|index| self.declared[*index].name.as_str()).collect();
            let (first, last) = (&self.declared[cycle[0]], names[cycle.len() - 1]);
            let closing = first.inputs.values().flat_map(|input| &input.references).find(|reference| reference.stage == last);
            let span = closing.map_or(first.span, |reference| reference.span);
            let error = WorkflowError::new("cycle", format!("stages need each other in a circle: {}", names.join(" -> ")));
            self.errors.add(span, error.with_hint(format!("let `{}` take its input from a stage before `{}`", names[0], names[0])));
        }
    }

    /// Checks what is known without any settings: names of stages and ports, types and numbers. Returns the stages that
    /// are wrong.
    pub fn check(&mut self) -> Vec<bool> {
        let mut broken = Vec::with_capacity(self.declared.len());
        for stage in self.declared {
            let before = self.errors.len();
            for (port, input) in &stage.inputs {
                self.input(stage, port, input);
            }
            if let Some(kind) = stage.kind.filter(|_| !stage.inputs_broken) {
                for port in kind.inputs().iter().filter(|port| port.arity != Arity::Optional) {
                    let connected = stage.inputs.get(port.name).is_some_and(|input| input.broken || !input.references.is_empty());
                    if !connected {
                        self.missing(stage, port);
                    }
                }
            }
            broken.push(self.errors.len() > before || stage.inputs.values().any(|input| input.broken));
        }
        broken
    }

    fn input(&mut self, stage: &Declared, name: &str, input: &Input) {
        let port = stage.kind.map(|kind| kind.inputs().iter().find(|port| port.name == name));
        if let (Some(None), Some(kind)) = (port, stage.kind) {
            self.unknown_input(stage, kind, name, input.key);
        }
        let port = port.flatten();
        if port.is_some_and(|port| port.arity != Arity::Many) && input.references.len() > 1 {
            let message = format!("input `{name}` of stage `{}` takes one stage, found {}", stage.name, input.references.len());
            self.errors.add(input.span, WorkflowError::new("too_many_inputs", message).with_hint("keep one of them"));
        }
        for reference in &input.references {
            let Some(&source) = self.by_name.get(reference.stage.as_str()) else {
                self.unknown_stage(stage, name, reference, port);
                continue;
            };
            if let Some(kind) = self.declared[source].kind {
                self.edge(stage, name, port, reference, kind);
            }
        }
    }

    fn edge(&mut self, stage: &Declared, name: &str, port: Option<&InputPort>, reference: &Reference, source: &'static dyn Kind) {
        let source_name = &reference.stage;
        let Some(output) = output_port(source, reference.port.as_deref()) else {
            let wanted = reference.port.as_deref().unwrap_or("");
            let names: Vec<&str> = source.outputs().iter().map(|output| output.name).collect();
            let message = if names.is_empty() {
                format!("stage `{source_name}` (kind `{}`) has no output", source.name())
            } else {
                format!("stage `{source_name}` (kind `{}`) has no output `{wanted}`", source.name())
            };
            let hint = did_you_mean(wanted, names.iter().copied()).unwrap_or_else(|| format!("its outputs: {}", listed(&names)));
            return self.errors.add(reference.span, WorkflowError::new("unknown_port", message).with_hint(hint));
        };
        let Some(port) = port else { return };
        if !port.kinds.is_empty() && !port.kinds.contains(&source.name()) {
            let message = format!(
                "input `{name}` of stage `{}` takes a {} stage, but `{source_name}` is a `{}` stage",
                stage.name,
                alternatives(port.kinds),
                source.name()
            );
            let fitting = self.names_of(|kind| port.kinds.contains(&kind.name()));
            let hint = if fitting.is_empty() {
                format!("add a stage with `kind = \"{}\"` and connect that", port.kinds[0])
            } else {
                format!("stages of that kind: {}", listed(&fitting))
            };
            return self.errors.add(reference.span, WorkflowError::new("wrong_stage_kind", message).with_hint(hint));
        }
        if !output.types.iter().any(|output| port.types.contains(output)) {
            let error = self.wrong_type(&stage.name, name, port, source_name, output.types);
            self.errors.add(reference.span, error);
        }
    }

    fn wrong_type(&self, stage: &str, name: &str, port: &InputPort, source: &str, found: &[ArtifactType]) -> WorkflowError {
        let error = wrong_artifact_type(stage, name, port, source, found);
        match self.makers(port, stage) {
            Some(hint) => error.with_hint(hint),
            None => error,
        }
    }

    /// A hint that names the stages that a port could take.
    fn makers(&self, port: &InputPort, except: &str) -> Option<String> {
        if self.errors.len() > MAX_SUGGESTIONS {
            return None;
        }
        let fits = |kind: &dyn Kind| {
            (port.kinds.is_empty() || port.kinds.contains(&kind.name()))
                && kind.outputs().first().is_some_and(|output| output.types.iter().any(|made| port.types.contains(made)))
        };
        let mut names = self.names_of(fits);
        names.retain(|name| *name != except);
        (!names.is_empty()).then(|| format!("stages that make {}: {}", types_text(port.types), listed(&names)))
    }

    fn names_of(&self, fits: impl Fn(&dyn Kind) -> bool) -> Vec<&str> {
        self.declared.iter().filter(|stage| stage.kind.is_some_and(&fits)).map(|stage| stage.name.as_str()).take(8).collect()
    }

    fn unknown_input(&mut self, stage: &Declared, kind: &dyn Kind, name: &str, span: Span) {
        let known: Vec<&str> = kind.inputs().iter().map(|port| port.name).collect();
        let error = WorkflowError::new("unknown_port", format!("stage `{}` (kind `{}`) has no input `{name}`", stage.name, kind.name()));
        let hint = did_you_mean(name, known.iter().copied()).unwrap_or_else(|| {
            if known.is_empty() { "this kind takes no inputs".into() } else { format!("its inputs: {}", listed(&known)) }
        });
        self.errors.add(span, error.with_hint(hint));
    }

    fn unknown_stage(&mut self, stage: &Declared, name: &str, reference: &Reference, port: Option<&InputPort>) {
        let message = format!("there is no stage `{}` (input `{name}` of stage `{}`)", reference.stage, stage.name);
        let suggestion = (self.errors.len() <= MAX_SUGGESTIONS)
            .then(|| did_you_mean(&reference.stage, self.by_name.keys().copied().filter(|other| *other != stage.name)))
            .flatten();
        let hint = suggestion.or_else(|| port.and_then(|port| self.makers(port, &stage.name)));
        let error = WorkflowError::new("unknown_stage", message);
        self.errors.add(
            reference.span,
            match hint {
                Some(hint) => error.with_hint(hint),
                None => error,
            },
        );
    }

    fn missing(&mut self, stage: &Declared, port: &InputPort) {
        let span = stage.inputs.get(port.name).map_or(stage.span, |input| input.span);
        let message = format!(
            "stage `{}` needs the input `{}` ({}): {}",
            stage.name,
            port.name,
            types_text(port.types),
            port.doc.trim_end_matches('.')
        );
        let makers = self.makers(port, &stage.name).map(|makers| format!("; {makers}")).unwrap_or_default();
        let hint = format!("add `{} = \"STAGE\"` to its `inputs`{makers}", port.name);
        self.errors.add(span, WorkflowError::new("missing_input", message).with_hint(hint));
    }
}

fn wrong_artifact_type(stage: &str, name: &str, port: &InputPort, source: &str, found: &[ArtifactType]) -> WorkflowError {
    let message = format!("input `{name}` of stage `{stage}` takes {}, but `{source}` makes {}", types_text(port.types), types_text(found));
    WorkflowError::new("wrong_artifact_type", message)
}

/// Reports outputs that are connected to one input twice, however they are written.
pub(crate) fn duplicates(declared: &[Declared], stages: &[Expanded], errors: &mut Collector) {
    for expanded in stages {
        let stage = &declared[expanded.base];
        if stage.inputs.values().all(|input| input.references.len() < 2) {
            continue;
        }
        let mut seen: HashMap<(usize, usize, &str), usize> = HashMap::new();
        for edge in &expanded.edges {
            let Some((name, input)) = stage.inputs.get_index(edge.input) else { continue };
            let takes_many = stage.kind.is_some_and(|kind| kind.inputs().iter().any(|port| port.name == name && port.arity == Arity::Many));
            let (Some(reference), Some(source)) = (input.references.get(edge.reference), stages.get(edge.stage)) else { continue };
            let Some(port) = declared[source.base].kind.and_then(|kind| output_port(kind, reference.port.as_deref())) else { continue };
            let first = *seen.entry((edge.input, edge.stage, port.name)).or_insert(edge.reference);
            // A port that takes one is said to have too many.
            if first == edge.reference || !takes_many {
                continue;
            }
            let output = if reference.port.is_some() { format!("{}.{}", source.name, port.name) } else { source.name.clone() };
            let message = format!("input `{name}` of stage `{}` takes `{output}` twice", stage.name);
            errors.add(reference.span, WorkflowError::new("duplicate_input", message).with_hint("remove one of the two"));
        }
    }
}

/// The output of `kind` that a reference means.
pub(crate) fn output_port(kind: &dyn Kind, name: Option<&str>) -> Option<&'static OutputPort> {
    match name {
        None => kind.outputs().first(),
        Some(name) => kind.outputs().iter().find(|output| output.name == name),
    }
}

fn types_text(types: &[ArtifactType]) -> String {
    types.iter().map(|kind| format!("`{kind}`")).collect::<Vec<_>>().join(" or ")
}

fn alternatives(names: &[&str]) -> String {
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(" or ")
}

fn listed(names: &[&str]) -> String {
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

/// Where a stage asks to run: on the CPU and at level 0 where that is decided later.
pub(crate) fn asked_placement(kind: &dyn Kind, config: &ErasedStage) -> Placement {
    let Some(execution) = kind.execution(config) else { return Placement::default() };
    // A name that is none is told when the stage is placed.
    let named = |name: &String| name.parse().unwrap_or(DeviceSpec::Cpu);
    let devices = match &execution.device {
        DeviceChoice::One(name) => vec![named(name)],
        DeviceChoice::List(names) if names.is_empty() => vec![DeviceSpec::Cpu],
        DeviceChoice::List(names) => names.iter().map(named).collect(),
        DeviceChoice::CpuRanks { cpu } => vec![DeviceSpec::Cpu; (*cpu).max(1)],
        DeviceChoice::CudaRanks { cuda } => (0..(*cuda).max(1)).map(DeviceSpec::Cuda).collect(),
    };
    let zero = match execution.zero {
        ZeroSetting::Level(level) => level,
        ZeroSetting::Auto(_) => 0,
    };
    Placement { devices, processes: 1, zero, offload: execution.offload }
}

/// Whether a port names the kinds that it takes: only there is known how the stages are set and placed that are connected.
pub(crate) fn knows_makers(kind: &dyn Kind, port: &str) -> bool {
    kind.inputs().iter().any(|known| known.name == port && !known.kinds.is_empty())
}

/// Calls a kind's `describe` and completes what it says: every output has an entry, and a tokenizer is its own origin.
pub(crate) fn describe(
    kind: &dyn Kind,
    config: &ErasedStage,
    context: &DescribeContext<'_>,
) -> Result<Description, Vec<rlflow_api::Problem>> {
    let mut description = kind.describe(config, context)?;
    for output in kind.outputs() {
        let Some(first) = output.types.first() else { continue };
        let meta = description.outputs.entry(output.name.to_owned()).or_insert_with(|| ArtifactMeta::new(*first));
        if meta.artifact_type == ArtifactType::Tokenizer && meta.tokenizer.is_none() {
            meta.tokenizer = Some(rlflow_api::Origin { stage: context.stage.to_owned(), port: output.name.to_owned() });
        }
    }
    Ok(description)
}

/// What is known of the outputs of a stage that is wrong: types that no setting decides, and that a tokenizer is its
/// own origin. Enough to go on checking what follows it.
pub(crate) fn vague(kind: &dyn Kind, stage: &str) -> Description {
    let mut description = Description::default();
    for output in kind.outputs() {
        let [only] = output.types else { continue };
        let mut meta = ArtifactMeta::new(*only);
        if *only == ArtifactType::Tokenizer {
            meta.tokenizer = Some(rlflow_api::Origin { stage: stage.to_owned(), port: output.name.to_owned() });
        }
        description.outputs.insert(output.name.to_owned(), meta);
    }
    description
}

/// Checks what is known of a stage's inputs once the stages before it are described: types that settings decide, and
/// that one tokenizer is meant. `spans` says where each input is written. Whether the types are right; a stage where
/// two tokenizers meet is reported, and may still be described.
pub(crate) fn check_metas(
    stage: &str,
    kind: &dyn Kind,
    inputs: &BTreeMap<String, Vec<InputMeta>>,
    spans: &BTreeMap<&str, Vec<Span>>,
    errors: &mut Collector,
) -> bool {
    let mut right_types = true;
    let mut first: Option<(&str, &InputMeta, &rlflow_api::Origin)> = None;
    // Per input and tokenizer that is not the first: the edges that bring it.
    let mut others: Vec<(&str, &rlflow_api::Origin, Vec<&str>, Span)> = Vec::new();
    for (name, metas) in inputs {
        let port = kind.inputs().iter().find(|port| port.name == *name);
        for (index, meta) in metas.iter().enumerate() {
            let span = spans.get(name.as_str()).and_then(|spans| spans.get(index)).copied().unwrap_or(Span::NOWHERE);
            if let Some(port) = port.filter(|port| !port.types.contains(&meta.meta.artifact_type)) {
                errors.add(span, wrong_artifact_type(stage, name, port, &meta.stage, &[meta.meta.artifact_type]));
                right_types = false;
            }
            let Some(origin) = &meta.meta.tokenizer else { continue };
            match first {
                None => first = Some((name, meta, origin)),
                Some((_, _, known)) if known == origin => {}
                Some(_) => match others.iter_mut().find(|(input, other, ..)| input == name && *other == origin) {
                    Some((_, _, stages, _)) => stages.push(&meta.stage),
                    None => others.push((name, origin, vec![&meta.stage], span)),
                },
            }
        }
    }
    let Some((first_name, first, known)) = first else { return right_types };
    for (name, origin, stages, span) in others {
        let (listed, use_) = match stages[..] {
            [one] => (format!("`{one}`"), "uses"),
            _ => (stages.iter().map(|stage| format!("`{stage}`")).collect::<Vec<_>>().join(", "), "use"),
        };
        let message = format!(
            "two tokenizers meet in stage `{stage}`: `{}` (input `{first_name}`) uses `{known}`, {listed} (input `{name}`) {use_} `{origin}`",
            first.stage
        );
        let hint = "token ids of one mean nothing to the other: let both sides come from one tokenizer";
        errors.add(span, WorkflowError::new("tokenizer_mismatch", message).with_hint(hint));
    }
    right_types
}
