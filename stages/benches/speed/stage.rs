//! The real `ppo` and `dpo` stages, timed by what they report.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
    time::Instant,
};

use burn::tensor::Device;
use rlflow_api::{Artifact, ArtifactType, Reporter, RunContext, StageEvent, StageResult, testing::Bench};
use rlflow_model::{CheckpointInfo, Group, Head, Layout, Use, checkpoint, parameters::initial};
use rlflow_stages::train::Precision;
use rlflow_text::{ChatContext, ChatTokenizer, PreferenceRow, PreferenceWriter, PromptRow, PromptWriter, Split};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::size::{Size, random_ids};

/// Keeps what a stage reports, and when.
#[derive(Default)]
struct Clock(Mutex<Vec<(Instant, StageEvent)>>);

impl Reporter for Clock {
    fn report(&self, event: StageEvent) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push((Instant::now(), event));
    }
}

/// Seconds of each step but the first, and means by phase over the same steps.
#[derive(Debug, Default, Clone)]
pub struct Steps {
    /// Of each step.
    pub seconds: Vec<f64>,
    /// Of each phase, per step.
    pub phases: BTreeMap<String, f64>,
}

/// A stage with all that goes into it.
pub struct TimedStage {
    _folder: TempDir,
    bench: Bench,
    kind: &'static str,
    inputs: Vec<(&'static str, Artifact)>,
    settings: Value,
    runs: usize,
}

impl TimedStage {
    fn new(kind: &'static str, settings: Value) -> StageResult<Self> {
        let folder = TempDir::new().expect("a temporary folder");
        let bench = Bench::new(folder.path())?;
        Ok(Self { _folder: folder, bench, kind, inputs: Vec::new(), settings, runs: 0 })
    }

    /// `ppo` with four models; no token of the vocabulary ends an answer.
    pub fn ppo(
        size: &Size,
        precision: Precision,
        batch: usize,
        prompt_len: usize,
        max_new_tokens: usize,
        epochs: usize,
    ) -> StageResult<Self> {
        let mut stage = Self::new(
            "ppo",
            json!({
                "batch_size": batch, "num_mini_batches": 1, "num_ppo_epochs": epochs, "max_new_tokens": max_new_tokens,
                "temperature": 1.0, "precision": precision, "sample_every": NEVER, "snapshot_every": NEVER,
            }),
        )?;
        // Ids beyond the vocabulary of the model: they are never drawn.
        let tokenizer = tokenizer(size.config.vocab_size, [size.config.vocab_size, size.config.vocab_size + 1])?;
        let role = json!({ "micro_batch_size": batch, "schedule": "constant" });
        let roles = [
            ("actor", ArtifactType::Policy, Head::Language),
            ("critic", ArtifactType::Critic, Head::Score),
            ("ref", ArtifactType::Policy, Head::Language),
            ("reward", ArtifactType::Reward, Head::Score),
        ];
        for (seed, (port, artifact_type, head)) in (1..).zip(roles) {
            stage.model(size, port, artifact_type, head, seed, &tokenizer, Some(role.clone()))?;
        }
        let mut writer = PromptWriter::new(&stage.bench.store)?;
        for ids in random_ids("ppo", size.config.vocab_size, batch, prompt_len) {
            let row = PromptRow { ids, text: String::new(), answer: None, messages: Vec::new(), context: ChatContext::default() };
            writer.push(Split::Train, &row)?;
        }
        let mut builder = stage.bench.store.artifact(ArtifactType::Prompts.name());
        writer.finish(&mut builder)?;
        stage.inputs.push(("prompts", builder.publish()?));
        Ok(stage)
    }

    /// `dpo` on enough pairs for `steps` steps, so that the reference, which the stage computes before the first step, sees
    /// as many pairs as are learnt from. An answer ends with token 1.
    pub fn dpo(size: &Size, precision: Precision, batch: usize, prompt_len: usize, length: usize, steps: usize) -> StageResult<Self> {
        let train = json!({
            "steps": steps, "batch_size": batch, "micro_batch_size": batch, "shuffle": false, "lr": 1e-6, "schedule": "constant",
        });
        let settings = json!({ "train": train, "beta": 0.1, "precision": precision, "log_every": 1, "snapshot_every": NEVER });
        let mut stage = Self::new("dpo", settings)?;
        let tokenizer = tokenizer(size.config.vocab_size, [0, 1])?;
        stage.model(size, "model", ArtifactType::Policy, Head::Language, 1, &tokenizer, None)?;
        stage.model(size, "ref", ArtifactType::Policy, Head::Language, 2, &tokenizer, None)?;
        let mut writer = PreferenceWriter::new(&stage.bench.store)?;
        let answer_len = length - prompt_len - 1;
        for ids in random_ids("dpo", size.config.vocab_size, batch * steps, prompt_len + 2 * answer_len) {
            let (prompt, answers) = ids.split_at(prompt_len);
            let answers = answers.chunks(answer_len).map(|answer| [answer, &[1]].concat()).collect();
            writer.push(Split::Train, &PreferenceRow { prompt: prompt.to_vec(), answers, margin: None })?;
        }
        let mut builder = stage.bench.store.artifact(ArtifactType::Preferences.name());
        writer.finish(&mut builder)?;
        stage.inputs.push(("data", builder.publish()?));
        Ok(stage)
    }

    /// Stores a model with fresh weights for `port`.
    fn model(
        &mut self,
        size: &Size,
        port: &'static str,
        artifact_type: ArtifactType,
        head: Head,
        seed: u64,
        tokenizer: &ChatTokenizer,
        role: Option<Value>,
    ) -> StageResult<()> {
        let weight = initial(&size.config, seed, 0.02);
        let layout = Layout::one(Device::flex());
        let group = Group::new(&size.config, head, &layout, Precision::Fp32.arithmetic(), Use::Frozen, |spec| Ok(weight(spec)))?;
        let info =
            CheckpointInfo { model: size.config.clone(), head, tokenizer: tokenizer.digest().to_string(), adapters: Vec::new(), role };
        let mut builder = self.bench.store.artifact(artifact_type.name());
        checkpoint::save(&group, head, &mut builder, &info)?;
        tokenizer.store(&mut builder)?;
        self.inputs.push((port, builder.publish()?));
        Ok(())
    }

    /// Runs it for `steps` steps of PPO, or for as many as it was made for.
    pub fn run(&mut self, steps: usize) -> StageResult<Steps> {
        let kind = rlflow_stages::kinds().into_iter().find(|kind| kind.name() == self.kind).expect("a stage kind");
        if self.kind == "ppo" {
            self.settings["steps"] = json!(steps);
        }
        let stage = kind.parse(&self.settings).unwrap_or_else(|problems| panic!("{problems:?}"));
        self.runs += 1;
        // Nothing is left of the run before: neither its snapshot nor the reference's log-probabilities.
        self.bench.clear_memos();
        let inputs: Vec<(&str, &Artifact)> = self.inputs.iter().map(|(port, artifact)| (*port, artifact)).collect();
        let clock = Clock::default();
        self.bench.with_context(&format!("run {}", self.runs), 1, &inputs, &[], |context| {
            kind.run(&stage, &RunContext { reporter: &clock, ..*context })
        })?;
        Ok(if self.kind == "ppo" { rollouts(&clock) } else { trained(&clock) })
    }
}

/// More steps than any run has.
const NEVER: u64 = 1_000_000;

/// A step of PPO is three phases; the first step is the warm-up.
fn rollouts(clock: &Clock) -> Steps {
    let (mut steps, mut ends) = (Steps::default(), Vec::new());
    let mut phase: Option<(Instant, String)> = None;
    let events = clock.0.lock().unwrap_or_else(PoisonError::into_inner);
    let last = events.iter().rfind(|(_, event)| matches!(event, StageEvent::Progress { .. })).map(|(at, _)| *at);
    for (at, event) in events.iter() {
        let ended = match event {
            StageEvent::Phase { name } => phase.replace((*at, name.clone())),
            StageEvent::Progress { .. } => {
                ends.push(*at);
                phase.take()
            }
            _ => None,
        };
        // Not those of the first step, nor what comes after the last.
        if let Some((start, name)) = ended
            && ends.first().is_some_and(|first| start >= *first)
            && Some(*at) <= last
        {
            *steps.phases.entry(name).or_default() += (*at - start).as_secs_f64();
        }
    }
    steps.seconds = ends.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect();
    let count = steps.seconds.len().max(1) as f64;
    steps.phases.values_mut().for_each(|seconds| *seconds /= count);
    steps
}

/// A step of DPO and its share of the reference's pass, which stands before all of them; the first step is the warm-up.
fn trained(clock: &Clock) -> Steps {
    let events = clock.0.lock().unwrap_or_else(PoisonError::into_inner);
    let phase =
        |wanted: &str| events.iter().find(|(_, event)| matches!(event, StageEvent::Phase { name } if name == wanted)).map(|(at, _)| *at);
    let ends: Vec<Instant> = events.iter().filter(|(_, event)| matches!(event, StageEvent::Progress { .. })).map(|(at, _)| *at).collect();
    let (Some(before), Some(after)) = (phase("reference log-probabilities"), phase("training")) else { return Steps::default() };
    let reference = (after - before).as_secs_f64() / ends.len().max(1) as f64;
    let updates: Vec<f64> = ends.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect();
    let mean = updates.iter().sum::<f64>() / updates.len().max(1) as f64;
    let phases = BTreeMap::from([("reference".to_owned(), reference), ("training".to_owned(), mean)]);
    Steps { seconds: updates.into_iter().map(|seconds| seconds + reference).collect(), phases }
}

/// One word, one token: "t17" is 17. `[pad, eos]` are the ids of the tokens that are no words.
fn tokenizer(vocab_size: usize, [pad, eos]: [usize; 2]) -> StageResult<ChatTokenizer> {
    let mut vocab: BTreeMap<String, usize> =
        (0..vocab_size).filter(|id| ![pad, eos].contains(id)).map(|id| (format!("t{id}"), id)).collect();
    vocab.extend([("<pad>".to_owned(), pad), ("<eos>".to_owned(), eos)]);
    let added = |id: usize, content: &str| json!({ "id": id, "content": content, "special": true, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false });
    let model = json!({ "type": "WordLevel", "vocab": vocab, "unk_token": "<pad>" });
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [added(pad, "<pad>"), added(eos, "<eos>")],
        "normalizer": null, "pre_tokenizer": { "type": "WhitespaceSplit" }, "post_processor": null, "decoder": null, "model": model,
    });
    let config = json!({ "pad_token": "<pad>", "eos_token": "<eos>" });
    Ok(ChatTokenizer::from_json(tokenizer.to_string().as_bytes(), config.to_string().as_bytes())?)
}
