//! The trainers against TRL's, step by step: the stages themselves, from stored rows and weights to the stored model, run
//! on the rows that TRL was given in the same order (`tests/fixtures/make/training_parity.py`).

mod fixtures;
#[path = "training/lora.rs"]
mod lora;

use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor, TensorData};
use fixtures::{Fixture, close, number, numbers};
use rlflow_api::{Artifact, ArtifactType, ModelConfig, RunContext, StageEvent, testing};
use rlflow_model::{
    CheckpointInfo, Decoder, Gradients, Group, Head, HeadView, Optimizer, OptimizerSettings, PackedBatch, Parameters, checkpoint,
    parameters::{self, host},
};
use rlflow_stages::{
    losses::{KlEstimator, clipped_policy_loss, clipped_value_loss, gae, whiten},
    pairs::{Answered, AnsweredBatch},
    reward_model::ScoredBatch,
};
use rlflow_text::{ConversationRow, ConversationWriter, PreferenceRow, PreferenceWriter, Split};
use serde_json::{Value, json};

/// What TRL's own float32 differs by from float64 is some 2e-5 (`float32_error_of_trl`).
const RELATIVE: f64 = 1e-4;
const ABSOLUTE: f64 = 1e-5;
const WEIGHTS: f64 = 2e-5;

/// A store with a fixture's rows and weights in it.
struct Bench {
    _folder: tempfile::TempDir,
    stage: testing::Bench,
    fixture: Fixture,
    config: ModelConfig,
}

struct Trained {
    model: Artifact,
    series: BTreeMap<String, Vec<f64>>,
}

impl Bench {
    fn new(fixture: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let stage = testing::Bench::new(folder.path()).unwrap();
        let config = serde_json::from_value(Fixture::open("llama_tiny_gqa").json["config"].clone()).unwrap();
        Self { _folder: folder, stage, fixture: Fixture::open(fixture), config }
    }

    /// A model; `weight` says which fixture and which tensor of it a weight is.
    fn decoder<'a>(&self, head: Head, weight: impl Fn(&str) -> (&'a Fixture, String)) -> Decoder {
        let (specs, _) = parameters::specs(&self.config, head);
        let device = Device::flex();
        let data = |spec: &rlflow_model::ParameterSpec| {
            let (fixture, name) = weight(&spec.name);
            Ok::<_, std::convert::Infallible>(fixture.floats(&name).into_iter().map(|value| value as f32).collect())
        };
        let Ok(parameters) = Parameters::from_data(specs, &device, data);
        Decoder::new(self.config.clone(), head, parameters, device)
    }

    /// The same, stored.
    fn model<'a>(&self, artifact_type: ArtifactType, head: Head, weight: impl Fn(&str) -> (&'a Fixture, String)) -> Artifact {
        let decoder = self.decoder(head, weight);
        let info = CheckpointInfo { model: self.config.clone(), head, tokenizer: "fixture".into(), adapters: Vec::new(), role: None };
        let mut builder = self.stage.store.artifact(artifact_type.name());
        checkpoint::save(&Group::of(decoder), head, &mut builder, &info).unwrap();
        builder.publish().unwrap()
    }

    /// The recorded rows of one side: token ids without padding, and the length of the prompt.
    fn recorded(&self, side: &str) -> Vec<(Vec<u32>, usize)> {
        let ids = self.fixture.integers(&format!("{side}.input_ids"));
        let mask = self.fixture.mask(&format!("{side}.completion_mask"));
        let width = self.fixture.width(&format!("{side}.input_ids"));
        let lengths = self.fixture.integers(&format!("{side}.lengths"));
        let rows = lengths.iter().zip(ids.chunks(width).zip(mask.chunks(width)));
        rows.map(|(len, (ids, mask))| {
            let prompt_len = mask.iter().position(|counts| *counts).unwrap();
            assert!(mask[prompt_len..*len as usize].iter().all(|counts| *counts), "a completion reaches to the end of its row");
            (ids[..*len as usize].iter().map(|id| *id as u32).collect(), prompt_len)
        })
        .collect()
    }

    fn conversations(&self) -> Artifact {
        let mut writer = ConversationWriter::new(&self.stage.store).unwrap();
        for (ids, prompt_len) in self.recorded("chosen") {
            let mask = (0..ids.len()).map(|at| at >= prompt_len).collect();
            writer.push(Split::Train, &ConversationRow { ids, mask }).unwrap();
        }
        let mut builder = self.stage.store.artifact(ArtifactType::Conversations.name());
        writer.finish(&mut builder).unwrap();
        builder.publish().unwrap()
    }

    fn preferences(&self) -> Artifact {
        let mut writer = PreferenceWriter::new(&self.stage.store).unwrap();
        for ((chosen, prompt_len), (rejected, other_len)) in self.recorded("chosen").into_iter().zip(self.recorded("rejected")) {
            assert_eq!(chosen[..prompt_len], rejected[..other_len]);
            let answers = vec![chosen[prompt_len..].to_vec(), rejected[prompt_len..].to_vec()];
            writer.push(Split::Train, &PreferenceRow { prompt: chosen[..prompt_len].to_vec(), answers, margin: None }).unwrap();
        }
        let mut builder = self.stage.store.artifact(ArtifactType::Preferences.name());
        writer.finish(&mut builder).unwrap();
        builder.publish().unwrap()
    }

    /// Runs a trainer with the fixture's settings.
    fn train(&self, kind: &str, inputs: &[(&str, &Artifact)], micro_batch_size: usize, more: Value) -> Trained {
        let mut settings = json!({ "train": { "micro_batch_size": micro_batch_size, "shuffle": false } });
        for name in ["steps", "batch_size", "lr", "schedule", "warmup_steps", "weight_decay", "betas", "eps", "grad_clip"] {
            settings["train"][name] = self.fixture.json[name].clone();
        }
        settings.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let kind = rlflow_stages::kinds().into_iter().find(|known| known.name() == kind).unwrap();
        let stage = kind.parse(&settings).unwrap();
        assert!(kind.check(&stage).is_empty(), "{:?}", kind.check(&stage));
        // Everything is made anew.
        self.stage.clear_memos();
        let run = |context: &RunContext<'_>| kind.run(&stage, context);
        let mut outputs = self.stage.with_context(&settings.to_string(), 1, inputs, &[], run).unwrap();
        let mut series: BTreeMap<String, Vec<f64>> = BTreeMap::new();
        for event in self.stage.take_events() {
            let StageEvent::Metrics { step: 1.., values } = event else { continue };
            values.into_iter().for_each(|(name, value)| series.entry(name).or_default().push(value));
        }
        Trained { model: outputs.remove("model").unwrap(), series }
    }

    /// Compares metrics (ours and TRL's name) of every step, and the weights at the end.
    fn check(&self, trained: &Trained, metrics: &[(&str, &str)]) {
        for (ours, theirs) in metrics {
            let expected = numbers(&self.fixture.json["series"][theirs]);
            assert_eq!(expected.len(), 50);
            close(ours, &trained.series[*ours], &expected, RELATIVE, ABSOLUTE);
        }
        // TRL counts from the beginning.
        let so_far = trained.series["num_tokens"].iter().scan(0.0, |sum, tokens| {
            *sum += tokens;
            Some(*sum)
        });
        assert_eq!(so_far.collect::<Vec<f64>>(), numbers(&self.fixture.json["series"]["num_tokens"]));
        let head = CheckpointInfo::of(&trained.model).unwrap().head;
        let (decoder, _) = checkpoint::load(&trained.model, head, 1, &Device::flex()).unwrap();
        self.check_weights("final.", &decoder);
    }

    fn check_weights(&self, prefix: &str, decoder: &Decoder) {
        for (slot, spec) in decoder.parameters().specs().iter().enumerate() {
            let weights: Vec<f64> = decoder.parameters().host(slot).into_iter().map(f64::from).collect();
            close(&spec.name, &weights, &self.fixture.floats(&format!("{prefix}{}", spec.name)), 0.0, WEIGHTS);
        }
    }
}

const COMMON: [(&str, &str); 3] = [("loss", "loss"), ("grad_norm", "grad_norm"), ("learning_rate", "learning_rate")];

#[test]
fn fifty_steps_of_sft_are_those_of_trl() {
    let bench = Bench::new("training_parity_sft");
    let initial = Fixture::open("llama_tiny_gqa");
    let model = bench.model(ArtifactType::Policy, Head::Language, |name| (&initial, name.into()));
    let data = bench.conversations();
    let inputs = [("model", &model), ("data", &data)];
    let trained = bench.train("sft", &inputs, 2, json!({}));
    bench.check(&trained, &COMMON);
    // What TRL measured in a pass over two rows, weighted by their counted tokens.
    let counts: Vec<f64> =
        bench.recorded("chosen").chunks(2).map(|rows| rows.iter().map(|(ids, start)| (ids.len() - start) as f64).sum()).collect();
    for name in ["entropy", "mean_token_accuracy"] {
        let passes: Vec<(f64, f64)> = numbers(&bench.fixture.json["passes"][name]).into_iter().zip(counts.clone()).collect();
        let mean = |passes: &[(f64, f64)]| {
            passes.iter().map(|(value, count)| value * count).sum::<f64>() / passes.iter().map(|(_, count)| count).sum::<f64>()
        };
        close(name, &trained.series[name], &passes.chunks(2).map(mean).collect::<Vec<_>>(), RELATIVE, ABSOLUTE);
    }
    // A step's loss is over its counted tokens, however they are spread over micro-batches of unequal counts.
    bench.check(&bench.train("sft", &inputs, 3, json!({})), &COMMON);
    // Computing blocks again instead of keeping them changes no bit.
    let checkpointing = bench.train("sft", &inputs, 2, json!({ "gradient_checkpointing": true }));
    assert_eq!(checkpointing.model.digest(), trained.model.digest());
}

#[test]
fn fifty_steps_of_the_reward_model_are_those_of_trl() {
    let bench = Bench::new("training_parity_reward_model");
    let initial = Fixture::open("llama_tiny_gqa");
    let weight = |name: &str| (if name == parameters::SCORE_WEIGHT { &bench.fixture } else { &initial }, name.to_owned());
    let model = bench.model(ArtifactType::Reward, Head::Score, weight);
    let data = bench.preferences();
    let metrics = [&COMMON[..], &["accuracy", "margin", "min_reward", "mean_reward", "max_reward"].map(|name| (name, name))].concat();
    for micro_batch_size in [4, 1] {
        bench.check(&bench.train("reward_model", &[("model", &model), ("data", &data)], micro_batch_size, json!({})), &metrics);
    }
}

#[test]
fn fifty_steps_of_dpo_are_those_of_trl() {
    let bench = Bench::new("training_parity_dpo");
    let initial = Fixture::open("training_parity_sft");
    let model = bench.model(ArtifactType::Policy, Head::Language, |name| (&initial, format!("final.{name}")));
    let data = bench.preferences();
    let settings = json!({ "beta": bench.fixture.json["beta"], "label_smoothing": bench.fixture.json["label_smoothing"] });
    let logged = ["rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"];
    let more = ["logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy"];
    let metrics = [&COMMON[..], &logged.map(|name| (name, name)), &more.map(|name| (name, name))].concat();
    for micro_batch_size in [4, 1] {
        let trained = bench.train("dpo", &[("model", &model), ("ref", &model), ("data", &data)], micro_batch_size, settings.clone());
        bench.check(&trained, &metrics);
        // The first update has learning rate 0, so that in two steps every pair is a tie, which rounding may break.
        let (name, expected) = ("rewards/accuracies", numbers(&bench.fixture.json["series"]["rewards/accuracies"]));
        close(name, &trained.series[name][2..], &expected[2..], 0.0, 1e-6);
    }
}

/// The other losses of `dpo`, each from the same weights on the same rows. Only the series are recorded, not the weights.
#[test]
fn fifty_steps_of_each_loss_of_the_dpo_family_are_those_of_trl() {
    let bench = Bench::new("training_parity_dpo");
    let initial = Fixture::open("training_parity_sft");
    let model = bench.model(ArtifactType::Policy, Head::Language, |name| (&initial, format!("final.{name}")));
    let data = bench.preferences();
    let bench = Bench { fixture: Fixture::open("training_parity_dpo_losses"), ..bench };
    let cases = bench.fixture.json["cases"].as_object().unwrap();
    assert_eq!(cases.len(), 11);
    for (name, case) in cases {
        let mut settings = case["settings"].clone();
        settings["beta"] = bench.fixture.json["beta"].clone();
        // A step is a step however it is cut, KTO's estimate of the divergence and SimPO's mean over tokens included.
        for micro_batch_size in [4, 3] {
            let trained = bench.train("dpo", &[("model", &model), ("data", &data)], micro_batch_size, settings.clone());
            for (metric, expected) in case["series"].as_object().unwrap() {
                let expected = numbers(expected);
                assert_eq!(expected.len(), 50);
                close(&format!("{name} {metric}"), &trained.series[metric], &expected, RELATIVE, ABSOLUTE);
            }
        }
    }
}

/// One recorded response of PPO; `with_value` positions have a value, TRL's extra one after the last token included.
struct Response {
    answered: Answered,
    with_value: usize,
    advantages: Vec<f64>,
    old_logprobs: Vec<f64>,
    old_values: Vec<f64>,
    returns: Vec<f64>,
}

/// Rows of whole sequences at which values are read: from the prompt's last token on.
fn value_rows(responses: &[&Response]) -> (PackedBatch, Vec<u32>) {
    let (mut rows, mut start) = (Vec::new(), 0);
    for response in responses {
        let first = start + response.answered.prompt_len - 1;
        rows.extend((first..first + response.with_value).map(|row| row as u32));
        start += response.answered.ids.len();
    }
    (PackedBatch::new(responses.iter().map(|response| response.answered.ids.as_slice())), rows)
}

fn wide(tensor: &Tensor<1>) -> Vec<f64> {
    host(tensor).into_iter().map(f64::from).collect()
}

fn constant(values: impl Iterator<Item = f64>) -> Tensor<1> {
    let values: Vec<f32> = values.map(|value| value as f32).collect();
    let count = values.len();
    Tensor::from_data(TensorData::new(values, [count]), &Device::flex())
}

/// One update from the sum of a minibatch's losses; returns their mean.
fn update(
    model: &mut Decoder,
    optimizer: &mut Optimizer,
    batch: &PackedBatch,
    lr: f64,
    weight: f64,
    losses: impl FnOnce(&HeadView<'_>) -> Tensor<1>,
) -> f64 {
    let mut gradients = Gradients::new(model.parameters().specs().len());
    let loss = |head: &HeadView<'_>| {
        let losses = losses(head);
        let each = wide(&losses);
        (losses.sum() * weight, each)
    };
    let losses = model.backward(batch, false, loss, |slot, gradient| gradients.add(slot, gradient));
    let count = losses.len() as f64;
    optimizer.step(model.parameters_mut(), &gradients, count, lr);
    losses.iter().sum::<f64>() / count
}

/// One iteration of TRL's PPO on recorded responses, from the fixture's four models. TRL gives the critic one position more than the
/// response has tokens, and the score stands there; this follows it, so that everything else can be compared. Returns policy and
/// critic after the updates.
fn ppo_iteration(bench: &Bench, mut policy: Decoder, reference: Decoder) -> [Decoder; 2] {
    let (initial, reward_model) = (Fixture::open("llama_tiny_gqa"), Fixture::open("training_parity_reward_model"));
    let reward = bench.decoder(Head::Score, |name| (&reward_model, format!("final.{name}")));
    let score_of = |name: &str| if name == parameters::SCORE_WEIGHT { &reward_model } else { &initial };
    let mut critic = bench.decoder(Head::Score, |name| (score_of(name), name.into()));

    let (fixture, settings) = (&bench.fixture, &bench.fixture.json["settings"]);
    let setting = |name: &str| number(&settings[name]);
    let ids = |row: &[i64]| row.iter().map(|id| *id as u32).collect::<Vec<u32>>();
    let (queries, answers, width) = (fixture.integers("queries"), fixture.integers("responses"), fixture.width("responses"));
    let mut responses: Vec<Response> = queries
        .chunks(fixture.width("queries"))
        .zip(answers.chunks(width))
        .zip(fixture.integers("rollout.sequence_lengths"))
        .map(|((query, answer), last)| {
            let prompt: Vec<u32> = ids(query).into_iter().skip_while(|id| *id == 0).collect();
            let count = last as usize + 1;
            let answered = Answered { ids: [&prompt[..], &ids(&answer[..count])].concat(), prompt_len: prompt.len() };
            let with_value = (count + 1).min(width);
            Response { answered, with_value, advantages: vec![], old_logprobs: vec![], old_values: vec![], returns: vec![] }
        })
        .collect();
    // Of a recorded [rows, width] matrix, what counts: tokens, or positions with a value.
    let counted = |name: &str, len: &dyn Fn(&Response) -> usize, responses: &[Response]| -> Vec<f64> {
        let values = fixture.floats(&format!("rollout.{name}"));
        values.chunks(width).zip(responses).flat_map(|(row, response)| row[..len(response)].to_vec()).collect()
    };
    let tokens = |response: &Response| response.answered.answer_len();
    let positions = |response: &Response| response.with_value;

    // The rollout, from the models to whitened advantages.
    let temperature = setting("temperature");
    let batch = AnsweredBatch::new(responses.iter().map(|response| &response.answered), temperature);
    let logprobs_by = |model: &Decoder| wide(&model.evaluate(&batch.batch, |head| head.token_stats(batch.targets.clone()).logprobs));
    let (logprobs, ref_logprobs) = (logprobs_by(&policy), logprobs_by(&reference));
    close("logprobs", &logprobs, &counted("logprobs", &tokens, &responses), RELATIVE, ABSOLUTE);
    close("ref_logprobs", &ref_logprobs, &counted("ref_logprobs", &tokens, &responses), RELATIVE, ABSOLUTE);
    let (whole, rows) = value_rows(&responses.iter().collect::<Vec<_>>());
    let values = wide(&critic.evaluate(&whole, |head| head.scores(rows.into())));
    close("values", &values, &counted("values", &positions, &responses), RELATIVE, ABSOLUTE);
    let scores: Vec<f64> = ScoredBatch::new(responses.iter().map(|response| response.answered.ids.as_slice()))
        .scores(&reward)
        .into_iter()
        .zip(&responses)
        .map(|(score, response)| {
            let ended = response.answered.ids.last() == Some(&(setting("eos_id") as u32));
            if ended { score } else { score - setting("missing_eos_penalty") }
        })
        .collect();
    close("scores", &scores, &fixture.floats("rollout.scores"), RELATIVE, ABSOLUTE);
    let (mut token, mut position) = (0, 0);
    for (response, score) in responses.iter_mut().zip(&scores) {
        let range = token..token + response.answered.answer_len();
        token = range.end;
        response.old_logprobs = logprobs[range.clone()].to_vec();
        response.old_values = values[position..position + response.with_value].to_vec();
        position += response.with_value;
        let mut rewards = vec![0.0; response.with_value];
        for (reward, at) in rewards.iter_mut().zip(range) {
            *reward = -setting("kl_coef") * KlEstimator::K1.estimate(logprobs[at], ref_logprobs[at]);
        }
        *rewards.last_mut().unwrap() += score;
        response.advantages = gae(&rewards, &response.old_values, setting("gamma"), setting("gae_lambda"));
        response.returns = response.advantages.iter().zip(&response.old_values).map(|(advantage, value)| advantage + value).collect();
    }
    let returns: Vec<f64> = responses.iter().flat_map(|response| response.returns.clone()).collect();
    close("returns", &returns, &counted("returns", &positions, &responses), RELATIVE, ABSOLUTE);
    let mut advantages: Vec<f64> = responses.iter().flat_map(|response| response.advantages[..tokens(response)].to_vec()).collect();
    whiten(&mut advantages);
    close("advantages", &advantages, &counted("advantages", &tokens, &responses), RELATIVE, ABSOLUTE);
    let mut rest = advantages.into_iter();
    for response in &mut responses {
        response.advantages = rest.by_ref().take(response.answered.answer_len()).collect();
    }

    // The updates, in TRL's order of rows. It has one optimizer over both networks, which is two that know nothing of each other.
    let betas = [0, 1].map(|at| number(&settings["betas"][at]));
    let optimizer = OptimizerSettings { betas, eps: setting("eps"), weight_decay: 0.0, grad_clip: 0.0 };
    let (mut policy_optimizer, mut critic_optimizer) =
        (Optimizer::new(policy.parameters(), optimizer), Optimizer::new(critic.parameters(), optimizer));
    let updates = fixture.json["updates"].as_array().unwrap();
    assert_eq!(updates.len(), 4);
    for expected in updates {
        let chosen: Vec<&Response> = numbers(&expected["rows"]).into_iter().map(|row| &responses[row as usize]).collect();
        let all = |values: fn(&Response) -> &Vec<f64>| constant(chosen.iter().flat_map(|response| values(response).clone()));
        let batch = AnsweredBatch::new(chosen.iter().map(|response| &response.answered), temperature);
        let policy_loss = update(&mut policy, &mut policy_optimizer, &batch.batch, setting("lr"), 1.0, |head| {
            let logprobs = head.token_stats(batch.targets.clone()).logprobs;
            clipped_policy_loss(
                logprobs,
                all(|response| &response.old_logprobs),
                all(|response| &response.advantages),
                setting("clip_range"),
            )
        });
        close("policy loss", &[policy_loss], &numbers(&expected["loss/policy"]), RELATIVE, ABSOLUTE);
        let (whole, rows) = value_rows(&chosen);
        let value_loss = update(&mut critic, &mut critic_optimizer, &whole, setting("lr"), setting("vf_coef"), |head| {
            let (old, returns) = (all(|response| &response.old_values), all(|response| &response.returns));
            clipped_value_loss(head.scores(rows.into()), old, returns, setting("value_clip_range"))
        });
        close("value loss", &[value_loss], &numbers(&expected["loss/value"]), RELATIVE, ABSOLUTE);
    }
    [policy, critic]
}

#[test]
fn one_iteration_of_ppo_is_that_of_trl() {
    let bench = Bench::new("training_parity_ppo");
    let (initial, sft) = (Fixture::open("llama_tiny_gqa"), Fixture::open("training_parity_sft"));
    let policy = bench.decoder(Head::Language, |name| (&initial, name.into()));
    let reference = bench.decoder(Head::Language, |name| (&sft, format!("final.{name}")));
    let [policy, critic] = ppo_iteration(&bench, policy, reference);
    bench.check_weights("final.policy.", &policy);
    bench.check_weights("final.value.", &critic);
}
