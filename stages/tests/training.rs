//! The trainers against TRL's, step by step: the stages themselves, from stored rows and weights to the stored model, run
//! on the rows that TRL was given in the same order (`tests/fixtures/make/training_parity.py`).

mod fixtures;

use std::{collections::BTreeMap, sync::Mutex};

use burn::tensor::Device;
use fixtures::{Fixture, close, numbers};
use rlflow_api::{
    Artifact, ArtifactType, CancelToken, Digest, Input, MemoStore, ModelConfig, Placement, Reporter, RunContext, Snapshots, StageEvent,
    StageResult, Store,
};
use rlflow_model::{CheckpointInfo, Decoder, Head, Parameters, checkpoint, parameters};
use rlflow_text::{ConversationRow, ConversationWriter, PreferenceRow, PreferenceWriter, Split};
use serde_json::{Value, json};

/// What TRL's own float32 differs by from float64 is some 2e-5 (`float32_error_of_trl`).
const RELATIVE: f64 = 1e-4;
const ABSOLUTE: f64 = 1e-5;
const WEIGHTS: f64 = 2e-5;

/// Keeps the metrics that a stage reports: name to one value per step.
#[derive(Default)]
struct Series(Mutex<BTreeMap<String, Vec<f64>>>);

impl Reporter for Series {
    fn report(&self, event: StageEvent) {
        let StageEvent::Metrics { step, values } = event else { return };
        let mut series = self.0.lock().unwrap();
        for (name, value) in values.into_iter().filter(|_| step > 0) {
            series.entry(name).or_default().push(value);
        }
    }
}

/// Makes everything anew.
struct NoMemos;

impl MemoStore for NoMemos {
    fn get(&self, _: &Value) -> StageResult<Option<Artifact>> {
        Ok(None)
    }

    fn put(&self, _: &Value, _: &Artifact) -> StageResult<()> {
        Ok(())
    }
}

/// A store with a fixture's rows and weights in it.
struct Bench {
    _folder: tempfile::TempDir,
    store: Store,
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
        let store = Store::open(&folder.path().join("store")).unwrap();
        let config = serde_json::from_value(Fixture::open("llama_tiny_gqa").json["config"].clone()).unwrap();
        Self { _folder: folder, store, fixture: Fixture::open(fixture), config }
    }

    /// Stores a model; `weight` says which fixture and which tensor of it a weight is.
    fn model<'a>(&self, artifact_type: ArtifactType, head: Head, weight: impl Fn(&str) -> (&'a Fixture, String)) -> Artifact {
        let (specs, _) = parameters::specs(&self.config, head);
        let device = Device::flex();
        let data = |spec: &rlflow_model::ParameterSpec| {
            let (fixture, name) = weight(&spec.name);
            Ok::<_, std::convert::Infallible>(fixture.floats(&name).into_iter().map(|value| value as f32).collect())
        };
        let Ok(parameters) = Parameters::from_data(specs, &device, data);
        let decoder = Decoder::new(self.config.clone(), head, parameters, device);
        let info = CheckpointInfo { model: self.config.clone(), head, tokenizer: "fixture".into(), role: None };
        let mut builder = self.store.artifact(artifact_type.name());
        checkpoint::save(&decoder, &mut builder, &info).unwrap();
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
        let mut writer = ConversationWriter::new(&self.store).unwrap();
        for (ids, prompt_len) in self.recorded("chosen") {
            let mask = (0..ids.len()).map(|at| at >= prompt_len).collect();
            writer.push(Split::Train, &ConversationRow { ids, mask }).unwrap();
        }
        let mut builder = self.store.artifact(ArtifactType::Conversations.name());
        writer.finish(&mut builder).unwrap();
        builder.publish().unwrap()
    }

    fn preferences(&self) -> Artifact {
        let mut writer = PreferenceWriter::new(&self.store).unwrap();
        for ((chosen, prompt_len), (rejected, other_len)) in self.recorded("chosen").into_iter().zip(self.recorded("rejected")) {
            assert_eq!(chosen[..prompt_len], rejected[..other_len]);
            let answers = vec![chosen[prompt_len..].to_vec(), rejected[prompt_len..].to_vec()];
            writer.push(Split::Train, &PreferenceRow { prompt: chosen[..prompt_len].to_vec(), answers, margin: None }).unwrap();
        }
        let mut builder = self.store.artifact(ArtifactType::Preferences.name());
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
        let input = |artifact: &Artifact| {
            let artifact = artifact.clone();
            vec![Input { stage: "made".into(), kind: "made".into(), artifact, settings: json!({}), placement: Placement::default() }]
        };
        let series = Series::default();
        let context = RunContext {
            stage: "test",
            store: &self.store,
            seed: 1,
            inputs: &inputs.iter().map(|(port, artifact)| ((*port).into(), input(artifact))).collect(),
            files: &[],
            placement: &Placement::default(),
            snapshots: &Snapshots::new(self.store.snapshots(Digest::of(settings.to_string().as_bytes())), Vec::new()),
            reporter: &series,
            cancel: &CancelToken::default(),
            memos: &NoMemos,
        };
        let mut outputs = kind.run(&stage, &context).unwrap();
        Trained { model: outputs.remove("model").unwrap(), series: series.0.into_inner().unwrap() }
    }

    /// Compares metrics (ours and TRL's name) of every step, and the weights at the end.
    fn check(&self, trained: &Trained, metrics: &[(&str, &str)]) {
        for (ours, theirs) in metrics {
            let expected = numbers(&self.fixture.json["series"][theirs]);
            assert_eq!(expected.len(), 50);
            close(ours, &trained.series[*ours], &expected, RELATIVE, ABSOLUTE);
        }
        let mut compared = 0;
        for entry in trained.model.manifest().entries.iter().filter(|entry| entry.dtype.is_some()) {
            let weights = checkpoint::floats(&trained.model.read(&entry.name).unwrap());
            let weights: Vec<f64> = weights.into_iter().map(f64::from).collect();
            close(&entry.name, &weights, &self.fixture.floats(&format!("final.{}", entry.name)), 0.0, WEIGHTS);
            compared += weights.len();
        }
        assert!(compared as u64 >= self.config.parameter_count(), "{compared} weights compared");
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
    let metrics = [&COMMON[..], &["accuracy", "margin", "mean_reward"].map(|name| (name, name))].concat();
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
    let metrics = [&COMMON[..], &logged.map(|name| (name, name))].concat();
    for micro_batch_size in [4, 1] {
        let trained = bench.train("dpo", &[("model", &model), ("ref", &model), ("data", &data)], micro_batch_size, settings.clone());
        bench.check(&trained, &metrics);
        // The first update has learning rate 0, so that in two steps every pair is a tie, which rounding may break.
        let (name, expected) = ("rewards/accuracies", numbers(&bench.fixture.json["series"]["rewards/accuracies"]));
        close(name, &trained.series[name][2..], &expected[2..], 0.0, 1e-6);
    }
}
