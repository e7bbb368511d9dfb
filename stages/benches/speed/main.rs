//! Speed on the CPU against what users would pick instead: training against PyTorch, generation against transformers, PPO
//! and DPO against TRL, on the same networks, batches, lengths, epochs and threads; and tokenising against `tokenizers`.
//!
//!     cargo bench -p rlflow-stages --bench speed -- --python PATH_TO_PYTHON
//!
//! needs a Python with torch, transformers and trl; without `--python` only rlflow is measured. Both sides take turns, the
//! one that is not asked is idle, and medians are told. Nothing else should run. `--only train` (or `generate`, `ppo`,
//! `dpo`, `data`; may be repeated) does a part, `--quick` only shows that everything works, `--json` prints one object instead of
//! Markdown, `--date` says another date than today's.
//!
//! What is counted:
//! - *training*: forward, backward, clipping by the global norm and AdamW, one batch, every token is a target;
//! - *generation*: 16 prompts of 32 tokens, 96 new tokens each, sampled from the whole vocabulary at temperature 1;
//! - *PPO*: rollout (as above), scoring by four networks, and 4 epochs of one minibatch each: the stage `ppo`, by what it
//!   reports, against `PPOTrainer`;
//! - *DPO*: 8 pairs of 109 tokens (32 of them the prompt), the reference's pass over them included: the stage `dpo`, by
//!   what it reports, against `DPOTrainer`, which does that pass in the step;
//! - *data*: 100 MB of made-up text in documents, from stored text to packed ids in the store, against `encode_batch_fast` of
//!   Python's `tokenizers` with as many threads, whose ids are written to a file.
//!
//! Storing and loading checkpoints and the first step are not counted on either side.

mod data;
mod models;
mod operations;
mod peer;
mod report;
mod size;
mod stage;
mod turns;

use std::{cell::RefCell, env, fs, path::PathBuf, process::Command, thread};

use rlflow_api::StageError;
use rlflow_kernels::{bf16, simd};
use rlflow_stages::train::Precision;
use serde_json::{Value, json};

use self::{
    data::Data,
    models::{Generation, Training, peak_resident_bytes},
    peer::Peer,
    report::{Anatomy, Comparison, PeakMemory, Report, Unit},
    size::Size,
    stage::{Steps, TimedStage},
    turns::{Contender, Measured, in_turn},
};

const PROMPTS: usize = 16;
const PROMPT_LEN: usize = 32;
const NEW_TOKENS: usize = 96;
const PPO_EPOCHS: usize = 4;
const PAIRS: usize = 8;
const PAIR_LEN: usize = 109;
const TEXT_BYTES: u64 = 100_000_000;

const PRECISIONS: [(Precision, &str); 2] = [(Precision::Fp32, "fp32"), (Precision::Bf16, "bf16")];

/// What is asked for.
struct Arguments {
    python: Option<PathBuf>,
    only: Vec<String>,
    quick: bool,
    json: bool,
    date: Option<String>,
}

impl Arguments {
    fn parse(arguments: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut parsed = Self { python: None, only: Vec::new(), quick: false, json: false, date: None };
        let mut arguments = arguments;
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().ok_or_else(|| format!("{argument} needs a value"));
            match argument.as_str() {
                "--python" => parsed.python = Some(value()?.into()),
                "--only" => parsed.only.push(value()?),
                "--date" => parsed.date = Some(value()?),
                "--quick" => parsed.quick = true,
                "--json" => parsed.json = true,
                // Cargo's own.
                "--bench" => {}
                other => return Err(format!("what is `{other}`? There are --python, --only, --quick, --json and --date")),
            }
        }
        match parsed.only.iter().find(|task| !["train", "generate", "ppo", "dpo", "data"].contains(&task.as_str())) {
            Some(task) => Err(format!("--only {task}: there are train, generate, ppo, dpo and data")),
            None => Ok(parsed),
        }
    }

    fn wants(&self, task: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|known| known == task)
    }

    /// `full`, or less if only to show that it works.
    fn count(&self, full: usize) -> usize {
        if self.quick { 1 } else { full }
    }
}

/// As the program has it.
#[global_allocator]
static ALLOCATOR: rlflow_model::Allocator = rlflow_model::Allocator;

fn main() -> Result<(), String> {
    rlflow_model::keep_freed_memory();
    let arguments: Vec<String> = env::args().skip(1).collect();
    if let [flag, size, precision] = arguments.as_slice()
        && flag == "--peak-memory"
    {
        return tell_peak_memory(size, precision);
    }
    let arguments = Arguments::parse(arguments.into_iter())?;
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let peer = arguments.python.as_deref().map(|python| Peer::start(python, threads)).transpose()?;
    let mut report = Report { machine: machine(&arguments, threads, peer.as_ref()), ..Report::default() };
    let speed = Speed { arguments, threads, peer: peer.map(RefCell::new) };
    if speed.arguments.wants("train") {
        for size in [Size::small(), Size::large()] {
            speed.train(&size, &mut report)?;
        }
        // The peer still holds what it has measured, which is no matter to the processes of their own.
        speed.memory(&Size::large(), &mut report);
    }
    if speed.arguments.wants("generate") {
        for size in [Size::small(), Size::large()] {
            speed.generate(&size, &mut report)?;
        }
    }
    if speed.arguments.wants("ppo") {
        speed.ppo(&Size::small(), &mut report)?;
    }
    if speed.arguments.wants("dpo") {
        speed.dpo(&Size::small(), &mut report)?;
    }
    if speed.arguments.wants("data") {
        speed.data(&Size::small(), &mut report)?;
    }
    println!("{}", if speed.arguments.json { report.json().to_string() } else { report.markdown() });
    Ok(())
}

fn text(error: StageError) -> String {
    error.to_string()
}

struct Speed {
    arguments: Arguments,
    threads: usize,
    peer: Option<RefCell<Peer>>,
}

impl Speed {
    /// The peer as a contender, if there is one.
    fn theirs<'a>(&'a self, name: &str, request: Value, steps: usize, size: &Size) -> Option<Contender<'a>> {
        let (peer, parameters) = (self.peer.as_ref()?, size.config.parameter_count());
        Some(Contender::new(name, move || peer.borrow_mut().measure(&request, steps, ("parameters", parameters))))
    }

    fn train(&self, size: &Size, report: &mut Report) -> Result<(), String> {
        eprintln!("training, {}", size.title());
        let steps = self.arguments.count(if size.config.parameter_count() > 10_000_000 { 1 } else { 4 });
        let mut contenders = Vec::new();
        for (precision, name) in PRECISIONS {
            let mut training = Training::new(size, precision).map_err(text)?;
            let (ours, planned) = (training.parameters(), size.config.parameter_count());
            if ours != planned {
                return Err(format!("{ours} parameters instead of {planned}"));
            }
            contenders.push(Contender::new(name, move || (0..steps).map(|_| training.step().map_err(text)).collect()));
        }
        let modes = [("PyTorch fp32", "eager"), ("torch.compile fp32", "compile"), ("PyTorch bf16 autocast", "bf16")];
        contenders.extend(modes.into_iter().filter_map(|(name, mode)| self.theirs(name, size.training_request(mode), steps, size)));
        let measured = in_turn(contenders, self.arguments.count(5));
        // Ours, and which of theirs it is compared with.
        let pairs = [(0, Some(2), Some(2.3)), (0, Some(3), None), (1, Some(4), Some(1.5))];
        let pairs = if measured.len() > 2 { pairs.to_vec() } else { vec![(0, None, None), (1, None, None)] };
        for (ours, theirs, target) in pairs {
            report.comparisons.push(Comparison {
                task: format!("training, {} x {} tokens", size.batch, size.length),
                size: size.title(),
                unit: Unit::TokensPerSecond(size.tokens()),
                ours: measured[ours].clone(),
                theirs: theirs.map(|index| measured[index].clone()),
                target,
            });
        }
        for ((precision, name), measured) in PRECISIONS.into_iter().zip(&measured) {
            let Ok(step) = measured.seconds else { continue };
            let (arithmetic, repeats) = (precision.arithmetic(), self.arguments.count(7));
            report.anatomies.push(Anatomy {
                size: size.title(),
                precision: name,
                tokens: size.tokens(),
                step,
                products: operations::matrix_products(size, arithmetic, repeats),
                operations: operations::operations(size, arithmetic, repeats),
            });
        }
        Ok(())
    }

    /// Peak resident memory of processes that do nothing but train.
    fn memory(&self, size: &Size, report: &mut Report) {
        eprintln!("memory, {}", size.title());
        let ours = |precision: &str| {
            let output = Command::new(env::current_exe().ok()?).args(["--peak-memory", size.name, precision]).output().ok()?;
            String::from_utf8_lossy(&output.stdout).trim().parse().ok()
        };
        let theirs = |mode: &str| Some(Peer::peak_memory(self.arguments.python.as_deref()?, self.threads, &size.training_request(mode)));
        for (precision, mode) in [("fp32", "eager"), ("bf16", "bf16")] {
            let task = format!("training {}, {} x {} tokens, {precision}", size.title(), size.batch, size.length);
            report.memory.push(PeakMemory { task, ours: ours(precision), theirs: theirs(mode) });
        }
    }

    fn generate(&self, size: &Size, report: &mut Report) -> Result<(), String> {
        eprintln!("generation, {}", size.title());
        let mut generation = Generation::new(size, PROMPTS, PROMPT_LEN, NEW_TOKENS).map_err(text)?;
        let request = json!({ "task": "generate", "model": size.config, "batch": PROMPTS, "prompt": PROMPT_LEN, "new": NEW_TOKENS });
        let ours = Contender::new("fp32", move || generation.step().map(|seconds| vec![seconds]).map_err(text));
        let contenders = std::iter::once(ours).chain(self.theirs("transformers generate fp32", request, 1, size)).collect();
        report.comparisons.push(Comparison {
            task: format!("generation, {PROMPTS} x ({PROMPT_LEN} + {NEW_TOKENS}) tokens, new ones counted"),
            unit: Unit::TokensPerSecond(PROMPTS * NEW_TOKENS),
            ..compared(size, &in_turn(contenders, self.arguments.count(5)), 0, Some(5.0))
        });
        Ok(())
    }

    fn ppo(&self, size: &Size, report: &mut Report) -> Result<(), String> {
        let stage = |precision| TimedStage::ppo(size, precision, PROMPTS, PROMPT_LEN, NEW_TOKENS, PPO_EPOCHS);
        let request = json!({
            "task": "ppo", "model": size.config, "batch": PROMPTS, "prompt": PROMPT_LEN, "new": NEW_TOKENS, "epochs": PPO_EPOCHS,
        });
        let task = format!("PPO iteration, {PROMPTS} x ({PROMPT_LEN} + {NEW_TOKENS}) tokens, {PPO_EPOCHS} epochs, four models");
        self.stage(size, &task, "TRL PPOTrainer fp32", stage, request, self.arguments.count(2), report)
    }

    fn dpo(&self, size: &Size, report: &mut Report) -> Result<(), String> {
        let steps = self.arguments.count(8);
        let stage = |precision| TimedStage::dpo(size, precision, PAIRS, PROMPT_LEN, PAIR_LEN, steps + 1);
        let request = json!({ "task": "dpo", "model": size.config, "batch": PAIRS, "prompt": PROMPT_LEN, "length": PAIR_LEN });
        let task = format!("DPO step, {PAIRS} pairs of {PAIR_LEN} tokens, reference included");
        self.stage(size, &task, "TRL DPOTrainer fp32", stage, request, steps, report)
    }

    /// Tokenising; and what a trainer of `size` spends on its batches.
    fn data(&self, size: &Size, report: &mut Report) -> Result<(), String> {
        eprintln!("data");
        let data = Data::new(if self.arguments.quick { TEXT_BYTES / 10 } else { TEXT_BYTES }).map_err(text)?;
        let tokens = data.tokenise().map_err(text)?.1.total_tokens();
        let [lines, tokenizer, ids] = data.files();
        let request = json!({
            "task": "data", "model": null, "text": lines, "tokenizer": tokenizer, "ids": ids, "end": data.document_end_id(), "threads": self.threads,
        });
        let mut contenders = vec![Contender::new("rlflow", || data.tokenise().map(|(seconds, _)| vec![seconds]).map_err(text))];
        if let Some(peer) = &self.peer {
            let measure = move || peer.borrow_mut().measure(&request, 1, ("tokens", tokens));
            contenders.push(Contender::new("tokenizers", measure));
        }
        let measured = in_turn(contenders, self.arguments.count(5));
        report.comparisons.push(Comparison {
            task: format!("tokenising and packing {} MB of text, {} million tokens", data.size_bytes / 1_000_000, tokens / 1_000_000),
            size: "-".into(),
            unit: Unit::MegabytesPerSecond(data.size_bytes),
            ours: measured[0].clone(),
            theirs: measured.get(1).cloned(),
            target: Some(1.0),
        });
        let seconds = data.batch_seconds(size).map_err(text)?;
        report.phases.push((format!("a batch of {} x {} tokens from packed ids", size.batch, size.length), vec![("cut".into(), seconds)]));
        Ok(())
    }

    /// A stage in both precisions against one trainer of TRL.
    fn stage(
        &self,
        size: &Size,
        task: &str,
        trainer: &str,
        stage: impl Fn(Precision) -> Result<TimedStage, StageError>,
        request: Value,
        steps: usize,
        report: &mut Report,
    ) -> Result<(), String> {
        eprintln!("{task}, {}", size.title());
        let newest = PRECISIONS.map(|_| RefCell::new(Steps::default()));
        let mut contenders = Vec::new();
        for ((precision, name), newest) in PRECISIONS.into_iter().zip(&newest) {
            let mut stage = stage(precision).map_err(text)?;
            contenders.push(Contender::new(name, move || {
                let steps = stage.run(steps + 1).map_err(text)?;
                newest.replace(steps.clone());
                Ok(steps.seconds)
            }));
        }
        contenders.extend(self.theirs(trainer, request, steps, size));
        let measured = in_turn(contenders, self.arguments.count(3));
        for (ours, target) in [(0, 2.0), (1, 3.5)] {
            let comparison = compared(size, &[measured[ours].clone()], 0, Some(target));
            report.comparisons.push(Comparison { task: task.to_owned(), theirs: measured.get(2).cloned(), ..comparison });
        }
        for ((_, name), steps) in PRECISIONS.into_iter().zip(newest) {
            let phases = steps.into_inner().phases.into_iter().collect();
            report.phases.push((format!("{task}, {name}"), phases));
        }
        Ok(())
    }
}

/// `measured[ours]` beside the one after it, in milliseconds.
fn compared(size: &Size, measured: &[Measured], ours: usize, target: Option<f64>) -> Comparison {
    Comparison {
        task: String::new(),
        size: size.title(),
        unit: Unit::Milliseconds,
        ours: measured[ours].clone(),
        theirs: measured.get(ours + 1).cloned(),
        target,
    }
}

/// A few steps of training in a process of its own, then its peak.
fn tell_peak_memory(size: &str, precision: &str) -> Result<(), String> {
    let size = Size::named(size).ok_or_else(|| format!("no model is called {size}"))?;
    let precision = PRECISIONS.into_iter().find(|(_, name)| *name == precision).ok_or_else(|| format!("no precision {precision}"))?.0;
    let mut training = Training::new(&size, precision).map_err(text)?;
    for _ in 0..3 {
        training.step().map_err(text)?;
    }
    println!("{}", peak_resident_bytes().ok_or("this system does not say it")?);
    Ok(())
}

/// Facts that the numbers depend on.
fn machine(arguments: &Arguments, threads: usize, peer: Option<&Peer>) -> Vec<(String, String)> {
    let information = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let of = |key: &str| information.lines().find(|line| line.starts_with(key)).and_then(|line| line.split(':').nth(1)).map(str::trim);
    let processor = of("model name").unwrap_or("unknown");
    let numbers = ["cpu family", "model\t", "stepping"].map(|key| of(key).unwrap_or("?")).join("/");
    let units = format!("{}, bf16 by {}", simd::level().name(), bf16::unit().name());
    let mut facts = vec![
        ("processor".to_owned(), format!("{processor} (family/model/stepping {numbers})")),
        ("cores, and threads on both sides".to_owned(), threads.to_string()),
        ("SIMD".to_owned(), units),
        ("date".to_owned(), arguments.date.clone().unwrap_or_else(|| jiff::Zoned::now().date().to_string())),
        ("rlflow".to_owned(), env!("CARGO_PKG_VERSION").to_owned()),
    ];
    facts.extend(peer.into_iter().flat_map(|peer| peer.versions.clone()));
    facts
}
