//! `eval`: several checkpoints on the same held-out prompts, side by side.

mod rule;

use std::collections::BTreeMap;

use rlflow_api::{
    Artifact, ArtifactMeta, ArtifactType, DescribeContext, Description, Execution, Input, InputPort, ModelConfig, Needs, OutputPort,
    Problem, RunContext, Sample, StageError, StageEvent, StageKind, StageResult, Table,
};
use rlflow_model::{Completion, Decoder, Draws, Gathering, Group, Head, Layout, Sampling, Use, parameters::host};
use rlflow_text::{ChatTokenizer, PromptDataset, PromptRow, Split, TokenDataset, tokenize_corpus};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

pub use rule::{AnswerMatch, Rule};

use crate::{
    language::{self, LanguageBatch},
    losses::mean,
    models,
    pairs::{Answered, AnsweredBatch},
    pretrain::{self, Windows},
    reward_model::ScoredBatch,
    train::{Memory, Pass, Precision, Rollout, Sharding, frozen_needs, sampling_bytes, tokens_of_rows},
};

/// See the module.
pub struct Eval;

/// Settings of `eval`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct EvalConfig {
    /// Held-out prompts used, the first ones; without it, all.
    #[serde(default)]
    #[schemars(extend("x-unit" = "prompts"), range(min = 1))]
    pub max_prompts: Option<usize>,
    /// Answers sampled per prompt.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 1_000))]
    pub samples_per_prompt: usize,
    /// Longest answer.
    #[serde(default = "max_new_tokens")]
    #[schemars(extend("x-unit" = "tokens"), range(min = 1))]
    pub max_new_tokens: usize,
    /// Divides the logits; 0 takes the likeliest token.
    #[serde(default = "temperature")]
    #[schemars(range(min = 0.0))]
    pub temperature: f64,
    /// Samples from this many of the likeliest tokens only; 0 for all.
    #[serde(default)]
    pub top_k: usize,
    /// Samples from the likeliest tokens that together have this probability; 1 for all.
    #[serde(default = "unit")]
    #[schemars(extend("exclusiveMinimum" = 0.0), range(max = 1.0))]
    pub top_p: f64,
    /// What makes an answer right, where it can be said; without it there is no rule score.
    #[serde(default)]
    pub rule: Option<Rule>,
    /// Prompts whose answers are shown side by side.
    #[serde(default = "show")]
    #[schemars(extend("x-unit" = "prompts"))]
    pub show: usize,
    /// Sequences per forward pass.
    #[serde(default = "batch_size")]
    #[schemars(extend("x-unit" = "sequences"), range(min = 1))]
    pub batch_size: usize,
    /// Whether a model at ZeRO 3 gathers all its weights once to answer. `false` gathers each block just before it runs, at every token:
    /// slower, for models that would not fit. At other levels, and for the answers, it makes no difference.
    #[serde(default = "yes")]
    #[schemars(extend("x-setting" = "execution"))]
    pub gather_for_generation: bool,
    /// Where it runs.
    #[serde(flatten)]
    pub execution: Execution,
}

fn one() -> usize {
    1
}

fn max_new_tokens() -> usize {
    64
}

fn temperature() -> f64 {
    0.7
}

fn unit() -> f64 {
    1.0
}

fn show() -> usize {
    3
}

fn batch_size() -> usize {
    32
}

fn yes() -> bool {
    true
}

impl StageKind for Eval {
    type Config = EvalConfig;

    const NAME: &'static str = "eval";
    const VERSION: u32 = 2;
    const SUMMARY: &'static str =
        "Compares checkpoints on held-out prompts: rule score, reward, win rate, KL, and perplexity, with answers side by side.";
    const INPUTS: &'static [InputPort] = &[
        InputPort::one("models", &[ArtifactType::Policy], "Checkpoints to compare.").many(),
        InputPort::one("prompts", &[ArtifactType::Prompts], "Prompts; the held-out split is used, or all where nothing is held out."),
        InputPort::one("judge", &[ArtifactType::Reward], "Reward model for rewards and win rates.").optional(),
        InputPort::one("corpus", &[ArtifactType::Text], "Corpus whose held-out documents give the perplexity.").optional(),
        InputPort::one("baseline", &[ArtifactType::Policy], "Checkpoint that the others must beat; the first model unless connected.")
            .optional(),
        InputPort::one("ref", &[ArtifactType::Policy], "Checkpoint that the KL is taken to; the first model unless connected.").optional(),
    ];
    const OUTPUTS: &'static [OutputPort] =
        &[OutputPort { name: "evaluation", types: &[ArtifactType::Evaluation], doc: "All numbers and answers." }];
    const METRICS: &'static [(&'static str, &'static str)] = &[
        (
            "<model>/rule_score",
            "share of answers that are right by the rule, over the prompts that it can judge: with `answer` other than `ignore` those that carry a reference answer",
        ),
        ("<model>/reward", "mean score by the judge"),
        ("<model>/win_rate", "share of prompts whose answer the judge scores above the baseline's; ties count half"),
        ("<model>/kl", "mean over answers of the summed log-ratio to the reference, in nats"),
        ("<model>/perplexity", "exp of the mean cross-entropy per token on held-out documents"),
        ("<model>/response_length", "mean length of the answers, in tokens"),
        ("<model>/ended", "share of answers that ended by themselves"),
        ("memory/peak_bytes", "bytes of the rank that held most, at its peak"),
        (
            "memory/<device>/<rank>/peak_bytes",
            "bytes of each rank at its peak; likewise parameters_bytes, gradients_bytes, optimizer_bytes, activations_bytes and buffers_bytes then, and now_bytes at the end",
        ),
    ];
    const DRAWS: bool = true;
    const ON_RANKS: bool = true;

    fn check(config: &EvalConfig) -> Vec<Problem> {
        let problems = config.rule.iter().flat_map(|rule| rule.check("rule"));
        problems.collect()
    }

    fn describe(config: &EvalConfig, context: &DescribeContext<'_>) -> Result<Description, Vec<Problem>> {
        let mut problems = Vec::new();
        for input in context.inputs.get("models").into_iter().flatten() {
            if let Some(model) = &input.meta.model
                && config.max_new_tokens >= model.context
            {
                let message = format!(
                    "max_new_tokens = {} leaves no room for a prompt in the context of `{}`, {} tokens",
                    config.max_new_tokens, input.stage, model.context
                );
                problems.push(Problem::new("context_too_long", "max_new_tokens", message));
                break;
            }
        }
        if !problems.is_empty() {
            return Err(problems);
        }
        let outputs = BTreeMap::from([("evaluation".into(), ArtifactMeta::new(ArtifactType::Evaluation))]);
        Ok(Description::new(outputs, needs(config, context)))
    }

    fn execution(config: &EvalConfig) -> Option<&Execution> {
        Some(&config.execution)
    }

    fn run(config: &EvalConfig, context: &RunContext<'_>) -> StageResult<BTreeMap<String, Artifact>> {
        Evaluation::load(config, context)?.run()
    }
}

/// A model, the reference and the judge are there at once and work in turn; answers are sampled and scored in groups.
fn needs(config: &EvalConfig, context: &DescribeContext<'_>) -> Needs {
    let sharding = Sharding::of(context);
    let answers = config.max_prompts.map_or(config.batch_size, |prompts| config.batch_size.min(prompts * config.samples_per_prompt));
    let prompt_tokens =
        |model: &ModelConfig| tokens_of_rows(context, "prompts", answers, model.context.saturating_sub(config.max_new_tokens), false);
    let frozen = |port: &str, head: Head| -> Vec<(&ModelConfig, Needs)> {
        let models = context.inputs.get(port).into_iter().flatten().filter_map(|input| input.meta.model.as_ref());
        let of = |model: &ModelConfig| {
            // Held-out text comes in rows that fill the context.
            let answered = prompt_tokens(model) + answers * config.max_new_tokens;
            let tokens = if context.input("corpus").is_some() { config.batch_size * model.context } else { answered };
            // How many groups there are depends on the prompts: no rank is taken to be idle.
            let (micro_batches, checkpointing, precision) = (sharding.ranks as u64, false, Precision::Fp32);
            frozen_needs(model, Pass { head, tokens: tokens as u64, micro_batches, checkpointing, precision }, sharding)
        };
        models.map(|model| (model, of(model))).collect()
    };
    let compared = frozen("models", Head::Language);
    let Some((model, evaluated)) = compared.iter().max_by_key(|(_, needs)| needs.peak_bytes()).copied() else { return Needs::default() };
    let reference = frozen("ref", Head::Language).first().map_or(compared[0].1, |(_, needs)| *needs);
    let all = [Some(evaluated), Some(reference), frozen("judge", Head::Score).first().map(|(_, needs)| *needs)];
    let all = all.into_iter().flatten();
    let parameter_bytes = all.clone().map(|needs| needs.parameter_bytes).sum();
    let working = all.clone().map(|needs| needs.parameter_bytes).max().unwrap_or(0);
    let passes = all.map(|needs| needs.buffer_bytes).max().unwrap_or(0);
    let rollout = Rollout {
        sequences: answers as u64,
        prompt_tokens: prompt_tokens(model) as u64,
        new_tokens: config.max_new_tokens as u64,
        gathering: Gathering::of(config.gather_for_generation),
    };
    let sampling = sampling_bytes(model, rollout, sharding, Precision::Fp32);
    // Sampling is the first rank's work.
    Needs {
        parameter_bytes,
        resting_bytes: parameter_bytes - working,
        buffer_bytes: passes.max(sampling),
        working_ranks: u64::from(sampling > passes),
        idle_bytes: passes,
        ..Needs::default()
    }
}

/// What is known of one model's answers. Vectors have one entry per (prompt, sample).
struct ModelResult {
    name: String,
    texts: Vec<String>,
    lengths: Vec<f64>,
    ended: Vec<f64>,
    right: Vec<f64>,
    rewards: Vec<f64>,
    kl: Vec<f64>,
    perplexity: Option<f64>,
}

struct Evaluation<'a> {
    config: &'a EvalConfig,
    context: &'a RunContext<'a>,
    rows: Vec<PromptRow>,
    held_out: bool,
    tokenizer: ChatTokenizer,
    rule: Option<rule::CompiledRule>,
    memory: Memory,
    layout: Layout,
    judge: Option<Group>,
    reference: Group,
    heldout_text: Vec<LanguageBatch>,
}

impl<'a> Evaluation<'a> {
    fn load(config: &'a EvalConfig, context: &'a RunContext<'a>) -> StageResult<Self> {
        models::check_same_tokenizer(context, &["models", "prompts", "judge", "baseline", "ref"])?;
        let memory = Memory::of(context.processes);
        let layout = memory.layout(context.placement)?;
        let load = |artifact, head| models::load_artifact(artifact, head, context.seed, &layout, Precision::Fp32, Use::Frozen);
        let prompts = &context.input("prompts")?.artifact;
        let mut rows = PromptDataset::load(prompts, Split::HeldOut)?;
        let held_out = !rows.is_empty();
        if !held_out {
            rows = PromptDataset::load(prompts, Split::Train)?;
        }
        if rows.is_empty() {
            return Err(StageError::invalid_with_hint("there is no prompt at all", "look at the prompts with `rlflow show`"));
        }
        let first = &context.input("models")?.artifact;
        let tokenizer = models::tokenizer(first)?;
        let reference = context.optional_input("ref").map_or(first, |input| &input.artifact);
        let reference = load(reference, Head::Language)?.model;
        let length = reference.config().context;
        let limit = config.max_prompts.unwrap_or(usize::MAX);
        let fits = |row: &&PromptRow| row.ids.len() + config.max_new_tokens <= length;
        let rows: Vec<PromptRow> = rows.rows().iter().filter(fits).take(limit).cloned().collect();
        if rows.is_empty() {
            return Err(StageError::invalid_with_hint(
                format!("no prompt leaves room for {} new tokens in a context of {length}", config.max_new_tokens),
                "a smaller `max_new_tokens`",
            ));
        }
        if !held_out {
            context.warning("no prompt is held out: all prompts are used, those that models were trained on too");
        }
        let judge = match context.optional_input("judge") {
            Some(input) => Some(load(&input.artifact, Head::Score)?.model),
            None => None,
        };
        let heldout_text = match context.optional_input("corpus") {
            Some(corpus) => heldout_batches(context, &corpus.artifact, &tokenizer, length, config.batch_size)?,
            None => Vec::new(),
        };
        let rule = config.rule.as_ref().map(Rule::compile).transpose().map_err(StageError::invalid)?;
        if let Some(rule) = &rule {
            let judged = rows.iter().filter(|row| rule.judges(row.answer.as_deref())).count();
            if judged < rows.len() {
                let of = rows.len();
                context.warning(format!("{judged} of {of} prompts carry a reference answer: rule_score is over those"));
            }
        }
        Ok(Self { config, context, rows, held_out, tokenizer, rule, memory, layout, judge, reference, heldout_text })
    }

    fn run(self) -> StageResult<BTreeMap<String, Artifact>> {
        let context = self.context;
        let inputs: &[Input] = context.inputs.get("models").map_or(&[], Vec::as_slice);
        let mut results = Vec::with_capacity(inputs.len());
        for input in inputs {
            results.push(self.evaluate(&input.name(), &input.artifact)?);
            context.reporter.report(StageEvent::Progress {
                done: results.len() as u64,
                total: inputs.len() as u64,
                unit: "models".into(),
                rate: None,
                tokens_per_s: None,
                detail: input.name(),
            });
        }
        let baseline = context.optional_input("baseline").unwrap_or(context.input("models")?);
        let known = inputs.iter().position(|input| input.artifact.digest() == baseline.artifact.digest());
        let baseline_rewards = match known {
            Some(index) => results[index].rewards.clone(),
            None => self.evaluate(&baseline.name(), &baseline.artifact)?.rewards,
        };
        let numbers: Vec<Vec<(&str, f64)>> = results.iter().map(|result| result.numbers(&baseline_rewards)).collect();
        self.report(&results, &numbers, &baseline.name());
        self.memory.report(context)?;

        let mut builder = context.output(ArtifactType::Evaluation);
        // By position, not by name: a renamed stage gives the same evaluation.
        let models: Vec<serde_json::Value> =
            numbers.iter().map(|numbers| numbers.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect()).collect();
        let answers: Vec<serde_json::Value> = self
            .rows
            .iter()
            .enumerate()
            .map(|(row, prompt)| {
                let samples = self.config.samples_per_prompt;
                let texts: Vec<&[String]> = results.iter().map(|result| &result.texts[row * samples..(row + 1) * samples]).collect();
                json!({ "prompt": prompt.text, "answer": prompt.answer, "models": texts })
            })
            .collect();
        builder.put("results.json", &to_json(&models)?)?;
        builder.put("answers.json", &to_json(&answers)?)?;
        builder.metadata(json!({ "models": models.len(), "prompts": self.rows.len() }));
        Ok(BTreeMap::from([("evaluation".into(), context.publish(builder)?)]))
    }

    fn evaluate(&self, name: &str, artifact: &Artifact) -> StageResult<ModelResult> {
        let (config, context) = (self.config, self.context);
        context.phase(&format!("answers of {name}"));
        let model = models::load_artifact(artifact, Head::Language, context.seed, &self.layout, Precision::Fp32, Use::Frozen)?.model;
        let sampling = Sampling {
            temperature: config.temperature,
            top_k: config.top_k,
            top_p: config.top_p,
            max_new_tokens: config.max_new_tokens,
            stop_ids: self.tokenizer.stop_ids(),
        };
        let prompts: Vec<&PromptRow> = self.rows.iter().flat_map(|row| std::iter::repeat_n(row, config.samples_per_prompt)).collect();
        let mut completions: Vec<Completion> = Vec::with_capacity(prompts.len());
        let gathering = Gathering::of(config.gather_for_generation);
        for (group, rows) in prompts.chunks(config.batch_size).enumerate() {
            let ids: Vec<&[u32]> = rows.iter().map(|row| row.ids.as_slice()).collect();
            // The same draws for every model: what differs between answers is the model.
            let draws = Draws { seed: context.seed, purpose: "eval/answers", step: group as u64 };
            completions.extend(model.generate(&ids, &sampling, draws, gathering, |_, _| !context.cancel.is_cancelled())?);
            context.check_cancelled()?;
        }
        let answered: Vec<Answered> = (prompts.iter().zip(&completions))
            .map(|(prompt, completion)| Answered { ids: [prompt.ids.as_slice(), &completion.ids].concat(), prompt_len: prompt.ids.len() })
            .collect();
        let texts: Vec<String> = completions.iter().map(|completion| self.tokenizer.decode(&completion.ids).trim().to_owned()).collect();
        let right = match &self.rule {
            Some(rule) => (prompts.iter().zip(&texts))
                .filter(|(prompt, _)| rule.judges(prompt.answer.as_deref()))
                .map(|(prompt, text)| f64::from(u8::from(rule.holds(text, prompt.answer.as_deref()))))
                .collect(),
            None => Vec::new(),
        };
        let groups: Vec<&[Answered]> = answered.chunks(config.batch_size).collect();
        let rewards = match &self.judge {
            Some(judge) => judge
                .map(&groups, |decoder, group| ScoredBatch::new(group.iter().map(|answered| answered.ids.as_slice())).scores(decoder))?,
            None => Vec::new(),
        };
        let temperature = if config.temperature > 0.0 { config.temperature } else { 1.0 };
        let batches: Vec<AnsweredBatch> = groups.iter().map(|group| AnsweredBatch::new(*group, temperature)).collect();
        let logprobs = |decoder: &Decoder, batch: &AnsweredBatch| {
            host(&decoder.evaluate(&batch.batch, |head| head.token_stats(batch.targets.clone()).logprobs))
        };
        let [ours, theirs] = [&model, &self.reference].map(|model| model.map(&batches, logprobs));
        let mut kl = Vec::with_capacity(answered.len());
        for ((batch, ours), theirs) in batches.iter().zip(ours?).zip(theirs?) {
            let mut start = 0;
            for len in &batch.answer_lens {
                kl.push((start..start + len).map(|at| f64::from(ours[at]) - f64::from(theirs[at])).sum());
                start += len;
            }
        }
        let perplexity = language::mean_loss(&model, &self.heldout_text)?.map(f64::exp);
        let lengths = completions.iter().map(|completion| completion.ids.len() as f64).collect();
        let ended = completions.iter().map(|completion| f64::from(u8::from(completion.ended))).collect();
        Ok(ModelResult { name: name.to_owned(), texts, lengths, ended, right, rewards: rewards.concat(), kl, perplexity })
    }

    fn report(&self, results: &[ModelResult], numbers: &[Vec<(&str, f64)>], baseline: &str) {
        let context = self.context;
        for (result, numbers) in results.iter().zip(numbers) {
            let named: Vec<(String, f64)> = numbers.iter().map(|(metric, value)| (format!("{}/{metric}", result.name), *value)).collect();
            context.metrics(0, &named.iter().map(|(name, value)| (name.as_str(), *value)).collect::<Vec<_>>());
        }
        let metrics: Vec<&str> = numbers.first().map(|numbers| numbers.iter().map(|(name, _)| *name).collect()).unwrap_or_default();
        let columns = std::iter::once("model".to_owned()).chain(metrics.iter().map(|name| (*name).to_owned())).collect();
        let format = |name: &str, value: f64| match name {
            "rule_score" | "win_rate" | "ended" => format!("{:.1}%", 100.0 * value),
            _ => format!("{value:.2}"),
        };
        let row = |(result, numbers): (&ModelResult, &Vec<(&str, f64)>)| {
            std::iter::once(result.name.clone()).chain(numbers.iter().map(|(name, value)| format(name, *value))).collect()
        };
        let held_out = if self.held_out { "held-out prompts" } else { "prompts, none of them held out" };
        let against = if self.judge.is_some() { format!("; win rate against {baseline}") } else { String::new() };
        let title = format!("{} {held_out}{against}", self.rows.len());
        context.reporter.report(StageEvent::Table(Table { title, columns, rows: results.iter().zip(numbers).map(row).collect() }));
        let samples = self.config.samples_per_prompt;
        for (row, prompt) in self.rows.iter().take(self.config.show).enumerate() {
            let rows = results.iter().map(|result| vec![result.name.clone(), result.texts[row * samples].clone()]).collect();
            let table = Table { title: prompt.text.clone(), columns: vec!["model".into(), "answer".into()], rows };
            context.reporter.report(StageEvent::Table(table));
            for result in results {
                let mut scores = Vec::new();
                if let Some(reward) = result.rewards.get(row * samples) {
                    scores.push(("reward".to_owned(), *reward));
                }
                let response = format!("{}: {}", result.name, result.texts[row * samples]);
                context.sample(Sample { step: 0, prompt: prompt.text.clone(), response, scores });
            }
        }
    }
}

impl ModelResult {
    fn numbers(&self, baseline_rewards: &[f64]) -> Vec<(&'static str, f64)> {
        let mut numbers = Vec::new();
        if !self.right.is_empty() {
            numbers.push(("rule_score", mean(&self.right)));
        }
        if !self.rewards.is_empty() {
            numbers.push(("reward", mean(&self.rewards)));
            let wins: Vec<f64> = (self.rewards.iter().zip(baseline_rewards))
                .map(|(ours, theirs)| match ours.total_cmp(theirs) {
                    std::cmp::Ordering::Greater => 1.0,
                    std::cmp::Ordering::Equal => 0.5,
                    std::cmp::Ordering::Less => 0.0,
                })
                .collect();
            numbers.push(("win_rate", mean(&wins)));
        }
        numbers.push(("kl", mean(&self.kl)));
        if let Some(perplexity) = self.perplexity {
            numbers.push(("perplexity", perplexity));
        }
        numbers.push(("response_length", mean(&self.lengths)));
        numbers.push(("ended", mean(&self.ended)));
        numbers
    }
}

fn to_json(value: &impl Serialize) -> StageResult<Vec<u8>> {
    serde_json::to_vec_pretty(value).map_err(|error| StageError::invalid(error.to_string()))
}

fn heldout_batches(
    context: &RunContext<'_>,
    corpus: &Artifact,
    tokenizer: &ChatTokenizer,
    length: usize,
    batch_size: usize,
) -> StageResult<Vec<LanguageBatch>> {
    let tokens = tokenize_corpus(context, corpus, tokenizer)?;
    let heldout = TokenDataset::load(&tokens, Split::HeldOut)?;
    if heldout.total_tokens() == 0 {
        context.note("the corpus holds nothing out: no perplexity");
        return Ok(Vec::new());
    }
    let mut windows = Windows::new(heldout, length, context.seed, false);
    let rows = windows.rows() as u64;
    let mut batches = Vec::new();
    for first in (0..rows).step_by(batch_size) {
        batches.push(pretrain::batch(&mut windows, first..(first + batch_size as u64).min(rows)));
    }
    Ok(batches)
}
