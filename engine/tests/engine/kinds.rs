//! Small stage kinds that do what real ones do: read files, train step by step with snapshots, and collect.
//! Every run of a stage appends its name to `ran.txt` beside the store, so that tests can count.

use std::{collections::BTreeMap, fs::OpenOptions, io::Write as _, thread::sleep, time::Duration};

use rlflow_api::{
    Artifact, ArtifactMeta, ArtifactType, DataSource, DescribeContext, Description, Execution, InputPort, Kind, Needs, OutputPort, Problem,
    Retain, RunContext, Sample, Snapshot, SnapshotPolicy, StageError, StageEvent, StageKind, StageResult, Table,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Every kind of this file.
pub fn kinds() -> Vec<&'static dyn Kind> {
    vec![&Lines, &Trainer, &Collect]
}

fn note_run(context: &RunContext<'_>, what: &str) {
    let path = context.store.folder().parent().expect("a store is in a folder").join("ran.txt");
    let mut file = OpenOptions::new().create(true).append(true).open(path).expect("ran.txt can be written");
    writeln!(file, "{what}").expect("ran.txt can be written");
}

fn described(port: &str, artifact_type: ArtifactType) -> Description {
    let needs = Needs { parameter_bytes: 1000, ..Needs::default() };
    Description::new(BTreeMap::from([(port.to_owned(), ArtifactMeta::new(artifact_type))]), needs)
}

/// Reads files and keeps their first lines.
pub struct Lines;

/// Settings of `lines`.
#[derive(Serialize, Deserialize, JsonSchema)]
pub struct LinesConfig {
    /// Files.
    pub sources: Vec<LinesSource>,
    /// Lines kept of each file: what comes after them cannot change the result.
    #[serde(default = "hundred")]
    pub keep: usize,
}

/// A file.
#[derive(Serialize, Deserialize, JsonSchema)]
pub struct LinesSource {
    /// Path or glob.
    #[schemars(extend("x-setting" = "path"))]
    pub path: String,
}

fn hundred() -> usize {
    100
}

impl StageKind for Lines {
    type Config = LinesConfig;
    const NAME: &'static str = "lines";
    const VERSION: u32 = 1;
    const SUMMARY: &'static str = "First lines of files.";
    const INPUTS: &'static [InputPort] = &[];
    const OUTPUTS: &'static [OutputPort] = &[OutputPort { name: "text", types: &[ArtifactType::Text], doc: "The lines." }];
    const METRICS: &'static [(&'static str, &'static str)] = &[("lines", "lines kept")];
    const DRAWS: bool = false;

    fn data_sources(config: &LinesConfig) -> Vec<DataSource> {
        let source = |(at, source): (usize, &LinesSource)| DataSource {
            setting: format!("sources[{at}].path"),
            pattern: source.path.clone(),
            directory: false,
            endings: &[],
        };
        config.sources.iter().enumerate().map(source).collect()
    }

    fn describe(_: &LinesConfig, _: &DescribeContext<'_>) -> Result<Description, Vec<Problem>> {
        Ok(described("text", ArtifactType::Text))
    }

    fn run(config: &LinesConfig, context: &RunContext<'_>) -> StageResult<BTreeMap<String, Artifact>> {
        note_run(context, context.stage);
        let mut kept = Vec::new();
        for file in context.files.iter().flatten() {
            let operation = format!("read {}", file.name);
            let content = std::fs::read_to_string(&file.path).map_err(|source| StageError::Io { operation, source })?;
            kept.extend(content.lines().take(config.keep).map(str::to_owned));
        }
        context.metrics(0, &[("lines", kept.len() as f64)]);
        let mut output = context.output(ArtifactType::Text);
        output.put("lines.txt", kept.join("\n").as_bytes())?;
        Ok(BTreeMap::from([("text".into(), output.publish()?)]))
    }
}

/// `lines` as a newer program has it: since edition 2 it keeps ten lines unless told otherwise. `IMPLEMENTATION` is its version.
pub struct NewerLines<const IMPLEMENTATION: u32>;

/// Settings of the newer `lines`.
#[derive(Serialize, Deserialize, JsonSchema)]
pub struct NewerLinesConfig {
    /// Files.
    pub sources: Vec<LinesSource>,
    /// Lines kept of each file.
    #[serde(default = "ten")]
    pub keep: usize,
}

fn ten() -> usize {
    10
}

impl<const IMPLEMENTATION: u32> StageKind for NewerLines<IMPLEMENTATION> {
    type Config = NewerLinesConfig;
    const NAME: &'static str = Lines::NAME;
    const VERSION: u32 = IMPLEMENTATION;
    const SUMMARY: &'static str = Lines::SUMMARY;
    const INPUTS: &'static [InputPort] = Lines::INPUTS;
    const OUTPUTS: &'static [OutputPort] = Lines::OUTPUTS;
    const METRICS: &'static [(&'static str, &'static str)] = Lines::METRICS;
    const DRAWS: bool = Lines::DRAWS;

    fn edition_defaults(edition: u32) -> Value {
        if edition == 1 { json!({ "keep": 100 }) } else { Value::Null }
    }

    fn data_sources(config: &NewerLinesConfig) -> Vec<DataSource> {
        let source = |(at, source): (usize, &LinesSource)| DataSource {
            setting: format!("sources[{at}].path"),
            pattern: source.path.clone(),
            directory: false,
            endings: &[],
        };
        config.sources.iter().enumerate().map(source).collect()
    }

    fn describe(_: &NewerLinesConfig, _: &DescribeContext<'_>) -> Result<Description, Vec<Problem>> {
        Ok(described("text", ArtifactType::Text))
    }

    fn run(_: &NewerLinesConfig, _: &RunContext<'_>) -> StageResult<BTreeMap<String, Artifact>> {
        Err(StageError::invalid("only planned"))
    }
}

/// "Trains": its state goes through a fixed number of steps, with snapshots.
pub struct Trainer;

/// Settings of `trainer`.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct TrainerConfig {
    /// Steps.
    pub train: TrainerSteps,
    /// Strength.
    pub beta: f64,
    /// Step at which it fails.
    pub fail_at: Option<u64>,
    /// Step at which its loss is NaN.
    pub nan_at: Option<u64>,
    /// Step at which it panics.
    pub panic_at: Option<u64>,
    /// Step at which it finds no memory, as a backend says it.
    pub no_memory_at: Option<u64>,
    /// Whether an intermediate result is kept.
    pub memo: bool,
    /// Time per step.
    #[schemars(extend("x-setting" = "execution"))]
    pub step_ms: u64,
    /// Steps between snapshots.
    #[schemars(extend("x-setting" = "execution"))]
    pub snapshot_every: u64,
    /// Placement.
    #[serde(flatten)]
    pub execution: Execution,
}

/// How long to train, and how fast.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct TrainerSteps {
    /// Steps.
    pub steps: u64,
    /// Rate.
    pub lr: f64,
    /// Whether the rate does not depend on the number of steps.
    pub constant: bool,
}

impl Default for TrainerSteps {
    fn default() -> Self {
        Self { steps: 10, lr: 0.5, constant: true }
    }
}

impl Default for TrainerConfig {
    fn default() -> Self {
        let (train, execution) = (TrainerSteps::default(), Execution::default());
        Self {
            train,
            beta: 0.1,
            fail_at: None,
            nan_at: None,
            panic_at: None,
            no_memory_at: None,
            memo: false,
            step_ms: 0,
            snapshot_every: 1000,
            execution,
        }
    }
}

impl StageKind for Trainer {
    type Config = TrainerConfig;
    const NAME: &'static str = "trainer";
    const VERSION: u32 = 1;
    const SUMMARY: &'static str = "Takes steps.";
    const INPUTS: &'static [InputPort] = &[
        InputPort::one("data", &[ArtifactType::Text], "What to train on.").optional(),
        InputPort::one("model", &[ArtifactType::Policy], "Where to start.").optional(),
    ];
    const OUTPUTS: &'static [OutputPort] = &[OutputPort { name: "model", types: &[ArtifactType::Policy], doc: "The state." }];
    const METRICS: &'static [(&'static str, &'static str)] = &[("loss", "the state"), ("start", "where it started")];
    const DRAWS: bool = true;

    fn describe(_: &TrainerConfig, context: &DescribeContext<'_>) -> Result<Description, Vec<Problem>> {
        let mut description = described("model", ArtifactType::Policy);
        if context.placement.zero == 3 {
            description.needs.parameter_bytes /= context.placement.ranks() as u64;
        }
        Ok(description)
    }

    fn execution(config: &TrainerConfig) -> Option<&Execution> {
        Some(&config.execution)
    }

    fn horizon(config: &TrainerConfig) -> Vec<&'static str> {
        if config.train.constant { vec!["train.steps"] } else { Vec::new() }
    }

    fn can_continue(config: &TrainerConfig, snapshot: &Snapshot) -> bool {
        snapshot.step <= config.train.steps
    }

    fn run(config: &TrainerConfig, context: &RunContext<'_>) -> StageResult<BTreeMap<String, Artifact>> {
        note_run(context, context.stage);
        context.snapshots.set_policy(SnapshotPolicy { every_steps: Some(config.snapshot_every), every: None, ..SnapshotPolicy::default() });
        let mut start = context.seed as f64 + config.beta;
        for input in context.inputs.values().flatten() {
            for entry in &input.artifact.manifest().entries {
                start += input.artifact.read(&entry.name)?.iter().map(|byte| f64::from(*byte)).sum::<f64>();
            }
        }
        if config.memo {
            let memo = context.memo(&json!({ "start": start }), || {
                note_run(context, "memo");
                let mut builder = context.output(ArtifactType::Text);
                builder.put("memo.txt", b"memo")?;
                Ok(builder.publish()?)
            })?;
            start += memo.read("memo.txt")?.len() as f64;
        }
        let (mut step, mut state) = match context.resume()? {
            Some((snapshot, artifact)) => {
                let bytes = artifact.read("state")?;
                (snapshot.step, f64::from_le_bytes(bytes[..8].try_into().expect("the state has eight bytes")))
            }
            None => (0, start),
        };
        let steps = config.train.steps;
        let save = |step: u64, state: f64, retain| {
            let mut builder = context.snapshots.builder();
            builder.put("state", &state.to_le_bytes())?;
            context.save_snapshot(step, retain, json!({ "steps": steps }), builder)
        };
        while step < steps {
            sleep(Duration::from_millis(config.step_ms));
            if context.cancel.is_cancelled() {
                save(step, state, Retain::Latest)?;
                return Err(StageError::Interrupted);
            }
            step += 1;
            let lr = if config.train.constant { config.train.lr } else { config.train.lr * (1.0 - step as f64 / steps as f64) };
            state = state * (1.0 - lr / 100.0) + lr;
            if config.fail_at == Some(step) {
                return Err(StageError::invalid_with_hint(format!("step {step} was told to fail"), "unset fail_at"));
            }
            assert!(config.panic_at != Some(step), "step {step} was told to panic");
            if config.no_memory_at == Some(step) {
                context.phase("training");
                panic!("out of device memory allocating 4096 bytes\n   0: a frame");
            }
            let loss = if config.nan_at == Some(step) { f64::NAN } else { state };
            context.metrics(step, &[("loss", loss)]);
            let progress = StageEvent::Progress {
                done: step,
                total: steps,
                unit: "step".into(),
                rate: None,
                tokens_per_s: Some(1000.0),
                detail: String::new(),
            };
            context.reporter.report(progress);
            if step.is_multiple_of(5) {
                context.sample(Sample { step, prompt: "p".into(), response: format!("r{step}"), scores: vec![("score".into(), state)] });
            }
            if context.snapshots.is_due(step) && step < steps {
                save(step, state, Retain::Latest)?;
            }
        }
        if config.train.constant {
            save(steps, state, Retain::Keep)?;
        }
        context.measurement("tokens_per_s", 1000.0);
        let mut output = context.output(ArtifactType::Policy);
        output.put("state", &state.to_le_bytes())?;
        Ok(BTreeMap::from([("model".into(), output.publish()?)]))
    }
}

/// Collects models.
pub struct Collect;

/// Settings of `collect`.
#[derive(Serialize, Deserialize, JsonSchema)]
pub struct CollectConfig {}

impl StageKind for Collect {
    type Config = CollectConfig;
    const NAME: &'static str = "collect";
    const VERSION: u32 = 1;
    const SUMMARY: &'static str = "Lists models.";
    const INPUTS: &'static [InputPort] = &[InputPort::one("models", &[ArtifactType::Policy], "The models.").many()];
    const OUTPUTS: &'static [OutputPort] = &[OutputPort { name: "results", types: &[ArtifactType::Evaluation], doc: "The list." }];
    const METRICS: &'static [(&'static str, &'static str)] = &[("models", "how many")];
    const DRAWS: bool = false;

    fn describe(_: &CollectConfig, _: &DescribeContext<'_>) -> Result<Description, Vec<Problem>> {
        Ok(described("results", ArtifactType::Evaluation))
    }

    fn run(_: &CollectConfig, context: &RunContext<'_>) -> StageResult<BTreeMap<String, Artifact>> {
        note_run(context, context.stage);
        let models = &context.inputs["models"];
        let rows: Vec<Vec<String>> = models.iter().map(|input| vec![input.stage.clone(), input.artifact.digest().short()]).collect();
        context.reporter.report(StageEvent::Table(Table { title: "models".into(), columns: vec!["stage".into(), "digest".into()], rows }));
        context.metrics(0, &[("models", models.len() as f64)]);
        let digests: Vec<String> = models.iter().map(|input| input.artifact.digest().to_string()).collect();
        let mut output = context.output(ArtifactType::Evaluation);
        output.put("models.json", json!(digests).to_string().as_bytes())?;
        Ok(BTreeMap::from([("results".into(), output.publish()?)]))
    }
}
