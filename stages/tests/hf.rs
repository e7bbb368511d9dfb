//! Hugging Face checkpoints in and out, against transformers (`tests/fixtures/make/hf_models.py`).

mod fixtures;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use burn::tensor::Device;
use fixtures::{Fixture, close};
use rlflow_api::{
    Architecture, Artifact, ArtifactType, DataFile, DescribeContext, Dtype, ModelConfig, Placement, Positions, Problem, StageResult,
    testing,
};
use rlflow_hf::{
    HfConfig, Role, WantedTensor,
    config::{self, TokenIds},
    names::file_tensors,
};
use rlflow_model::{
    CheckpointInfo, Decoder, Draws, Group, Head, PackedBatch, Parameters, Sampling, TokenTargets, checkpoint,
    generate::generate,
    parameters::{self, host},
};
use rlflow_stages::export::{ExportOptions, export};
use safetensors::SafeTensors;
use serde_json::{Value, json};

const POLICIES: [&str; 5] = ["llama3", "mistral", "qwen2", "qwen3", "gpt2"];
const AS_STORED: ExportOptions = ExportOptions { dtype: None, max_shard_bytes: u64::MAX, adapter: false };

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/hf_models")
}

struct World {
    bench: testing::Bench,
    _folder: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self { bench: testing::Bench::new(folder.path()).unwrap(), _folder: folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.bench.path(name)
    }

    /// A copy of a fixture's directory, to be broken.
    fn copy(&self, fixture: &str, name: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir(&path).unwrap();
        for file in files(&folder().join(fixture)) {
            fs::copy(&file, path.join(file.file_name().unwrap())).unwrap();
        }
        path
    }

    /// What planning says of a directory.
    fn describe(&self, directory: &Path, settings: Value) -> Result<rlflow_api::Description, Vec<Problem>> {
        let (kind, stage) = import_stage(directory, settings);
        let files = [files(directory)];
        let context = DescribeContext { stage: "base", inputs: &BTreeMap::new(), files: &files, placement: &Placement::default() };
        kind.describe(&stage, &context)
    }

    fn import(&self, directory: &Path, settings: Value) -> StageResult<BTreeMap<String, Artifact>> {
        self.import_files(directory, settings, files(directory).iter().map(|path| testing::data_file(path)).collect())
    }

    fn import_files(&self, directory: &Path, settings: Value, files: Vec<DataFile>) -> StageResult<BTreeMap<String, Artifact>> {
        let (kind, stage) = import_stage(directory, settings);
        self.bench.with_context("import", 1, &[], &[files], |context| kind.run(&stage, context))
    }

    fn model(&self, fixture: &str) -> Artifact {
        self.import(&folder().join(fixture), json!({})).unwrap_or_else(|error| panic!("{fixture}: {error}")).remove("model").unwrap()
    }

    fn decoder(&self, fixture: &str) -> Decoder {
        let model = self.model(fixture);
        let head = CheckpointInfo::of(&model).unwrap().head;
        checkpoint::load(&model, head, 1, &Device::flex()).unwrap().0
    }
}

fn import_stage(directory: &Path, mut settings: Value) -> (&'static dyn rlflow_api::Kind, rlflow_api::ErasedStage) {
    let kind = rlflow_stages::kinds().into_iter().find(|kind| kind.name() == "import").unwrap();
    settings["path"] = directory.display().to_string().into();
    let stage = kind.parse(&settings).unwrap();
    assert_eq!(kind.check(&stage), []);
    (kind, stage)
}

/// The files of a directory that planning would find.
fn files(directory: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    let wanted = |path: &PathBuf| rlflow_stages::import::ENDINGS.iter().any(|ending| path.to_string_lossy().ends_with(ending));
    files.retain(wanted);
    files.sort();
    files
}

/// Names, types, shapes and bytes of all tensors of a directory, as the format's own library reads them.
fn tensors(directory: &Path) -> BTreeMap<String, (String, Vec<usize>, Vec<u8>)> {
    let mut all = BTreeMap::new();
    for file in files(directory).iter().filter(|file| file.extension().is_some_and(|extension| extension == "safetensors")) {
        let content = fs::read(file).unwrap();
        for (name, view) in SafeTensors::deserialize(&content).unwrap().tensors() {
            all.insert(name, (format!("{:?}", view.dtype()), view.shape().to_vec(), view.data().to_vec()));
        }
    }
    all
}

struct Reference {
    fixture: Fixture,
    sequences: Vec<Vec<u32>>,
}

fn reference(name: &str) -> Reference {
    let mut fixture = Fixture::open("hf_models/reference");
    fixture.tensors = fs::read(folder().join(format!("{name}.reference.safetensors"))).unwrap();
    let width = fixture.width("input_ids");
    let ids: Vec<u32> = fixture.integers("input_ids").into_iter().map(|id| id as u32).collect();
    Reference { sequences: ids.chunks(width).map(<[u32]>::to_vec).collect(), fixture }
}

fn batch(sequences: &[Vec<u32>]) -> PackedBatch {
    PackedBatch::new(sequences.iter().map(Vec::as_slice))
}

/// Log-probabilities of the whole vocabulary after each of `rows`.
fn distributions(decoder: &Decoder, batch: &PackedBatch, rows: &[u32]) -> Vec<f64> {
    let vocab = decoder.config().vocab_size as u32;
    let repeated: Arc<[u32]> = rows.iter().flat_map(|row| std::iter::repeat_n(*row, vocab as usize)).collect();
    let targets: Arc<[u32]> = rows.iter().flat_map(|_| 0..vocab).collect();
    let stats = decoder.evaluate(batch, |head| head.token_stats(TokenTargets { rows: repeated, targets, scale: 1.0 }).logprobs);
    host(&stats).into_iter().map(f64::from).collect()
}

fn log_softmax(logits: &[f64]) -> impl Iterator<Item = f64> + '_ {
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let total = logits.iter().map(|logit| (logit - largest).exp()).sum::<f64>().ln();
    logits.iter().map(move |logit| logit - largest - total)
}

#[test]
fn logits_agree_with_transformers() {
    let world = World::new();
    for name in POLICIES {
        let Reference { fixture, sequences } = reference(name);
        let first = fixture.json["first_logit_position"].as_u64().unwrap() as u32;
        let (length, vocab) = (sequences[0].len() as u32, 600);
        let rows: Vec<u32> = (0..sequences.len() as u32).flat_map(|row| (row * length + first..(row + 1) * length).step_by(5)).collect();
        let logits = fixture.floats("logits");
        let largest = logits.iter().fold(0.0, |max: f64, logit| max.max(logit.abs()));
        let expected: Vec<f64> = logits.chunks(vocab).step_by(5).flat_map(log_softmax).collect();
        let decoder = world.decoder(name);
        assert_eq!(decoder.parameters().count() as u64, fixture.json["models"][name]["parameters"].as_u64().unwrap(), "{name}");
        assert_eq!(decoder.config().parameter_count(), decoder.parameters().count() as u64, "{name}");
        for decoder in [decoder.clone(), decoder.without_fused_operations()] {
            close(name, &distributions(&decoder, &batch(&sequences), &rows), &expected, 0.0, 1e-4 * largest);
        }
    }
}

/// YaRN with its defaults, bounds between pairs, and each way to say how much attention is sharpened; dynamic scaling, which does nothing
/// within the context (`tests/fixtures/make/rope_scaling.py`).
#[test]
fn rotary_scaling_is_that_of_transformers() {
    let world = World::new();
    let fixture = Fixture::open("hf_models/qwen3.rope_scaling");
    let width = fixture.width("input_ids");
    let ids: Vec<u32> = fixture.integers("input_ids").into_iter().map(|id| id as u32).collect();
    let sequences: Vec<Vec<u32>> = ids.chunks(width).map(<[u32]>::to_vec).collect();
    let rows: Vec<u32> = (1..=sequences.len()).flat_map(|row| [row * width - 2, row * width - 1]).map(|row| row as u32).collect();
    let cases = fixture.json["cases"].as_object().unwrap();
    assert_eq!(cases.len(), 6);
    for (name, case) in cases {
        let directory = world.copy("qwen3", name);
        let path = directory.join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config.as_object_mut().unwrap().extend(case["config"].as_object().unwrap().clone());
        fs::write(&path, config.to_string()).unwrap();
        let model = world.import(&directory, json!({})).unwrap()["model"].clone();
        let decoder = checkpoint::load(&model, Head::Language, 1, &Device::flex()).unwrap().0;
        let logits = fixture.floats(&format!("{name}.logits"));
        let largest = logits.iter().fold(0.0, |max: f64, logit| max.max(logit.abs()));
        let expected: Vec<f64> = logits.chunks(600).flat_map(log_softmax).collect();
        close(name, &distributions(&decoder, &batch(&sequences), &rows), &expected, 0.0, 1e-4 * largest);
        assert!(world.describe(&directory, json!({ "context": decoder.config().context + 1 })).is_err(), "{name}");
        // What is written says the same, also where nothing is carried through.
        let written = world.path(&format!("{name}-out"));
        export(&model, &written, &AS_STORED).unwrap();
        let again = HfConfig::parse(&fs::read(written.join("config.json")).unwrap(), None).unwrap().model;
        assert_eq!(&again, decoder.config(), "{name}");
        let generated = config::write(decoder.config(), Role::Policy, Dtype::F32, &TokenIds::default(), None).unwrap();
        assert_eq!(&HfConfig::parse(&generated, None).unwrap().model, decoder.config(), "{name}");
    }
}

#[test]
fn scores_of_a_reward_model_agree_with_transformers() {
    let world = World::new();
    let Reference { fixture, sequences } = reference("reward");
    let (model, batch) = (world.model("reward"), batch(&sequences));
    assert_eq!(model.manifest().artifact_type, ArtifactType::Reward.name());
    let (decoder, _) = checkpoint::load(&model, Head::Score, 1, &Device::flex()).unwrap();
    let ends: Arc<[u32]> = (0..sequences.len()).map(|row| batch.layout.range(row).end as u32 - 1).collect();
    for decoder in [decoder.clone(), decoder.without_fused_operations()] {
        let scores: Vec<f64> = host(&decoder.evaluate(&batch, |head| head.scores(ends.clone()))).into_iter().map(f64::from).collect();
        close("scores", &scores, &fixture.floats("scores"), 1e-4, 1e-6);
    }
}

fn gradients(decoder: &Decoder, batch: &PackedBatch, targets: &TokenTargets, checkpointing: bool) -> (f64, BTreeMap<String, Vec<f64>>) {
    let mut gradients = BTreeMap::new();
    let count = targets.rows.len() as f32;
    let loss = decoder.backward(
        batch,
        checkpointing,
        |head| {
            let loss = head.token_stats(targets.clone()).logprobs.sum().neg() / count;
            let value: f32 = loss.clone().inner().into_scalar();
            (loss, f64::from(value))
        },
        |slot, gradient| {
            let values = host(&gradient.unwrap()).into_iter().map(f64::from).collect();
            assert!(gradients.insert(decoder.parameters().specs()[slot].name.clone(), values).is_none(), "gradient {slot} came twice");
        },
    );
    assert_eq!(gradients.len(), decoder.parameters().specs().len());
    (loss, gradients)
}

#[test]
fn losses_and_gradients_agree_with_transformers_and_between_kernels() {
    let world = World::new();
    for name in POLICIES {
        let Reference { fixture, sequences } = reference(name);
        let labels = fixture.integers("labels");
        let width = sequences[0].len();
        let rows: Vec<u32> =
            (0..labels.len() as u32).filter(|row| !((row + 1) as usize).is_multiple_of(width) && labels[*row as usize + 1] >= 0).collect();
        let next: Arc<[u32]> = rows.iter().map(|row| labels[*row as usize + 1] as u32).collect();
        let targets = TokenTargets { rows: rows.into(), targets: next, scale: 1.0 };
        let (decoder, batch) = (world.decoder(name), batch(&sequences));
        let (loss, fused) = gradients(&decoder, &batch, &targets, false);
        close(name, &[loss], &[fixture.json["models"][name]["loss"].as_f64().unwrap()], 1e-5, 0.0);
        assert_eq!(gradients(&decoder, &batch, &targets, true).1, fused, "{name}: checkpointing changes no bit");
        let (_, composed) = gradients(&decoder.clone().without_fused_operations(), &batch, &targets, false);
        let relative = |what: &str, actual: &[f64], expected: &[f64]| {
            let scale = expected.iter().fold(0.0, |max: f64, value| max.max(value.abs()));
            close(what, actual, expected, 0.0, 1e-4 * scale + 1e-8);
        };
        for (weight, gradient) in &fused {
            // Keys' biases add the same to all scores of a query: no gradient but rounding.
            if !(weight.ends_with("k_proj.bias")) {
                relative(&format!("{name} {weight}"), gradient, &composed[weight]);
            }
        }
        let bytes = |values: &[f64]| -> Vec<u8> { values.iter().flat_map(|value| (*value as f32).to_le_bytes()).collect() };
        let specs = decoder.parameters().specs();
        let wanted: Vec<WantedTensor> = specs
            .iter()
            .map(|spec| WantedTensor { name: spec.name.clone(), shape: spec.shape.iter().map(|size| *size as u64).collect() })
            .collect();
        let mut compared = 0;
        for tensor in
            file_tensors(decoder.config().architecture, &wanted).iter().filter(|tensor| tensor.parts[0].name.contains(".layers.0."))
        {
            let ours = tensor.join(tensor.parts.iter().map(|part| bytes(&fused[&part.name])).collect(), 4);
            let ours: Vec<f64> = ours.chunks_exact(4).map(|value| f64::from(f32::from_le_bytes(value.try_into().unwrap()))).collect();
            let theirs = fixture.floats(&format!("grad.{}", tensor.name));
            match tensor.name.ends_with("k_proj.bias") {
                true => close(&tensor.name, &ours, &theirs, 0.0, 1e-6),
                false => relative(&format!("{name} {}", tensor.name), &ours, &theirs),
            }
            compared += 1;
        }
        assert!(compared >= 9, "{name}: only {compared} gradients compared");
    }
}

/// Greedy decoding over the cache: each token's log-probability is the full pass's, also where a window has moved on.
#[test]
fn cached_decoding_agrees_with_the_full_pass() {
    let world = World::new();
    for name in POLICIES {
        let Reference { sequences, .. } = reference(name);
        let decoder = world.decoder(name);
        let prompts = [&sequences[0][..], &sequences[1][..5], &sequences[1][..20]];
        let sampling = Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, max_new_tokens: 16, stop_ids: vec![] };
        let completions = generate(&decoder, &prompts, &sampling, Draws { seed: 0, purpose: "test", step: 0 }, |_, _| true);
        for (prompt, completion) in prompts.iter().zip(&completions) {
            assert_eq!(completion.ids.len(), 16);
            let whole = [prompt, completion.ids.as_slice()].concat();
            let rows: Arc<[u32]> = (prompt.len() as u32 - 1..whole.len() as u32 - 1).collect();
            let targets: Arc<[u32]> = completion.ids.clone().into();
            let targets = TokenTargets { rows, targets, scale: 1.0 };
            let full = host(&decoder.evaluate(&batch(&[whole]), |head| head.token_stats(targets).logprobs));
            for (cached, full) in completion.logprobs.iter().zip(&full) {
                assert!((cached - full).abs() < 2e-4, "{name}: {cached} against {full}");
            }
        }
    }
}

#[test]
fn what_comes_in_goes_out_byte_for_byte() {
    let world = World::new();
    for name in POLICIES.into_iter().chain(["reward"]) {
        let (source, target) = (folder().join(name), world.path(name));
        let model = world.model(name);
        let exported = export(&model, &target, &AS_STORED).unwrap();
        assert_eq!(exported.notes, [] as [&str; 0]);
        assert_eq!(tensors(&target), tensors(&source), "{name}");
        let json = |folder: &Path, file: &str| -> Value { serde_json::from_slice(&fs::read(folder.join(file)).unwrap()).unwrap() };
        let mut same = vec!["config.json", "tokenizer.json", "chat_template.jinja"];
        same.extend((name != "reward").then_some("generation_config.json"));
        for file in same {
            assert_eq!(fs::read(target.join(file)).unwrap(), fs::read(source.join(file)).unwrap(), "{name}/{file}");
        }
        for (key, value) in json(&source, "tokenizer_config.json").as_object().unwrap() {
            assert_eq!(&json(&target, "tokenizer_config.json")[key], value, "{name}: {key}");
        }
        // In shards, and back in: the same artifact.
        let shards = world.path(&format!("{name}-shards"));
        let exported = export(&model, &shards, &ExportOptions { max_shard_bytes: 30_000, ..AS_STORED }).unwrap();
        assert!(exported.files.contains(&"model.safetensors.index.json".to_owned()), "{:?}", exported.files);
        assert_eq!(tensors(&shards), tensors(&source), "{name}");
        assert_eq!(
            world.import(&shards, json!({})).unwrap()["model"].digest(),
            world.import(&target, json!({})).unwrap()["model"].digest()
        );
        assert!(export(&model, &shards, &AS_STORED).unwrap_err().to_string().contains("is not empty"));
    }
}

/// A directory as transformers 4 wrote it, names without the trunk's prefix, old buffers, tied weights twice: the same model.
#[test]
fn older_spellings_give_the_same_model() {
    let world = World::new();
    let of = |directory: &Path| world.import(directory, json!({})).unwrap()["model"].clone();
    let tensors_of =
        |model: &Artifact| -> Vec<_> { model.manifest().entries.iter().filter(|entry| entry.dtype.is_some()).cloned().collect() };
    let older = world.copy("llama3", "v4");
    fs::copy(folder().join("llama3.config_v4.json"), older.join("config.json")).unwrap();
    let model = of(&older);
    assert_eq!(CheckpointInfo::of(&model).unwrap(), CheckpointInfo::of(&world.model("llama3")).unwrap());
    assert_eq!(tensors_of(&model), tensors_of(&world.model("llama3")));

    let bare = world.copy("gpt2", "bare");
    rewrite(&bare, |tensors| {
        let renamed = std::mem::take(tensors).into_iter().map(|(name, tensor)| (name.replace("transformer.", ""), tensor));
        tensors.extend(renamed);
        let embedding = tensors["wte.weight"].clone();
        tensors.insert("lm_head.weight".into(), embedding);
        tensors.insert("h.0.attn.bias".into(), ("F32".into(), vec![1, 1, 2, 2], vec![0; 16]));
    });
    assert_eq!(tensors_of(&of(&bare)), tensors_of(&world.model("gpt2")));

    rewrite(&bare, |tensors| tensors.get_mut("lm_head.weight").unwrap().2[0] ^= 1);
    let error = world.import(&bare, json!({})).unwrap_err().to_string();
    assert!(error.contains("tie_word_embeddings") && error.contains("lm_head.weight"), "{error}");
}

/// Rewrites `model.safetensors` of a directory.
fn rewrite(directory: &Path, change: impl FnOnce(&mut BTreeMap<String, (String, Vec<usize>, Vec<u8>)>)) {
    let mut all = tensors(directory);
    change(&mut all);
    let mut start = 0;
    let infos: Vec<rlflow_hf::safetensors::TensorInfo> = all
        .iter()
        .map(|(name, (dtype, shape, content))| {
            let size_bytes = content.len() as u64;
            start += size_bytes;
            let shape = shape.iter().map(|size| *size as u64).collect();
            rlflow_hf::safetensors::TensorInfo { name: name.clone(), dtype: dtype.clone(), shape, start: start - size_bytes, size_bytes }
        })
        .collect();
    let mut content = rlflow_hf::safetensors::Header::encode(&infos);
    all.values().for_each(|(_, _, bytes)| content.extend(bytes));
    fs::write(directory.join("model.safetensors"), content).unwrap();
}

#[test]
fn wrong_checkpoints_are_told_when_planning() {
    let world = World::new();
    let edit_config = |directory: &Path, change: &dyn Fn(&mut Value)| {
        let path = directory.join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        change(&mut config);
        fs::write(path, config.to_string()).unwrap();
    };
    type Break<'a> = (&'a str, &'a str, &'a dyn Fn(&Path), &'a [&'a str]);
    let set = |key: &'static str, value: Value| move |directory: &Path| edit_config(directory, &|config| config[key] = value.clone());
    let broken: &[Break] = &[
        ("qwen2", "architecture", &set("architectures", json!(["FooForCausalLM"])), &["`FooForCausalLM` is unknown", "LlamaForCausalLM"]),
        ("qwen2", "longrope", &set("rope_parameters", json!({ "rope_type": "longrope" })), &["rotary scaling of type `longrope`"]),
        (
            "qwen2",
            "yarn",
            &set("rope_parameters", json!({ "rope_type": "yarn", "factor": 4.0, "beta_fast": 1.0, "beta_slow": 2.0 })),
            &["`beta_fast` = 1 is not above `beta_slow` = 2"],
        ),
        ("qwen2", "activation", &set("hidden_act", json!("relu")), &["`hidden_act` is \"relu\"", "\"silu\""]),
        ("qwen2", "size", &set("num_hidden_layers", json!(-1)), &["`num_hidden_layers` must be a whole number, found -1"]),
        ("qwen2", "zero", &set("num_attention_heads", json!(0)), &["`num_attention_heads` is 0"]),
        (
            "qwen2",
            "no_key",
            &|d| edit_config(d, &|config| drop(config.as_object_mut().unwrap().remove("hidden_size"))),
            &["`hidden_size` is missing"],
        ),
        ("qwen2", "quantised", &set("quantization_config", json!({ "quant_method": "gptq" })), &["quantised (gptq)"]),
        ("qwen2", "layers", &set("num_hidden_layers", json!(3)), &["missing: `model.layers.2.input_layernorm.weight`", "and 4 more"]),
        ("qwen2", "extra", &set("num_hidden_layers", json!(1)), &["not part of such a model: `model.layers.1.input_layernorm.weight`"]),
        ("qwen2", "shape", &set("vocab_size", json!(601)), &["`model.embed_tokens.weight` has shape [600, 24], and [601, 24] is expected"]),
        ("gpt2", "exact_gelu", &set("activation_function", json!("gelu")), &["`activation_function` is \"gelu\""]),
        ("reward", "labels", &set("id2label", json!({ "0": "bad", "1": "good" })), &["classifies into 2 labels"]),
        ("qwen3", "no_weights", &|d| fs::remove_file(d.join("model.safetensors")).unwrap(), &["there are no weights"]),
        (
            "qwen3",
            "pickle",
            &|d| fs::rename(d.join("model.safetensors"), d.join("pytorch_model.bin")).unwrap(),
            &["`pytorch_model.bin`", "run any code when they are opened", "save_pretrained"],
        ),
        ("qwen3", "no_config", &|d| fs::remove_file(d.join("config.json")).unwrap(), &["there is no `config.json`"]),
        (
            "qwen3",
            "no_tokenizer",
            &|d| fs::remove_file(d.join("tokenizer.json")).unwrap(),
            &["there is no `tokenizer.json`", "AutoTokenizer"],
        ),
        (
            "llama3",
            "no_shard",
            &|d| fs::remove_file(d.join("model-00002-of-00003.safetensors")).unwrap(),
            &["names `model-00002-of-00003.safetensors`"],
        ),
        (
            "qwen3",
            "truncated",
            &|d| {
                let path = d.join("model.safetensors");
                let content = fs::read(&path).unwrap();
                fs::write(&path, &content[..content.len() - 100]).unwrap();
            },
            &["model.safetensors", "it ends within tensor", "incomplete"],
        ),
        (
            "qwen3",
            "lying",
            &|d| {
                let path = d.join("model.safetensors");
                let mut content = fs::read(&path).unwrap();
                content[..8].copy_from_slice(&u64::MAX.to_le_bytes());
                fs::write(&path, content).unwrap();
            },
            &["not a safetensors file", "announce a header of"],
        ),
        (
            "qwen3",
            "dtype",
            &|d| rewrite(d, |tensors| tensors.get_mut("model.norm.weight").unwrap().0 = "I32".into()),
            &["`model.norm.weight` has elements of type I32"],
        ),
        (
            "qwen3",
            "hole",
            &|d| {
                let path = d.join("model.safetensors");
                let content = fs::read(&path).unwrap();
                let text = String::from_utf8_lossy(&content).into_owned();
                let at = text.find("\"shape\":[600,24]").unwrap();
                let mut content = content.clone();
                content[at + 9..at + 12].copy_from_slice(b"601");
                fs::write(&path, content).unwrap();
            },
            &["is said to be F32 of shape [601, 24]"],
        ),
    ];
    for (fixture, name, damage, expected) in broken {
        let directory = world.copy(fixture, name);
        damage(&directory);
        let problems = world.describe(&directory, json!({})).expect_err(name);
        let told: String =
            problems.iter().map(|problem| format!("{} {}\n", problem.message, problem.hint.as_deref().unwrap_or(""))).collect();
        for part in *expected {
            assert!(told.contains(part), "{name}: `{part}` is not in: {told}");
        }
        assert!(problems.iter().all(|problem| problem.setting == "path"));
        assert!(world.import(&directory, json!({})).is_err(), "{name}: and it does not run");
    }
    // Weights that change after they were hashed.
    let directory = world.copy("qwen3", "changing");
    let hashed = files(&directory).iter().map(|path| testing::data_file(path)).collect();
    rewrite(&directory, |tensors| tensors.get_mut("model.norm.weight").unwrap().2[0] ^= 1);
    let error = world.import_files(&directory, json!({}), hashed).unwrap_err().to_string();
    assert!(error.contains("changed while it was being read") && error.contains("model.safetensors"), "{error}");
}

#[test]
fn planning_knows_type_shape_and_context() {
    let world = World::new();
    for (name, artifact_type) in [("llama3", ArtifactType::Policy), ("gpt2", ArtifactType::Policy), ("reward", ArtifactType::Reward)] {
        let described = world.describe(&folder().join(name), json!({})).unwrap();
        let model = &described.outputs["model"];
        assert_eq!(model.artifact_type, artifact_type);
        assert_eq!(model.tokenizer, described.outputs["tokenizer"].tokenizer);
        assert_eq!(model.vocab_size, Some(600));
        let artifact = world.model(name);
        assert_eq!(model.model, Some(CheckpointInfo::of(&artifact).unwrap().model));
    }
    let shorter = world.describe(&folder().join("mistral"), json!({ "context": 32 })).unwrap();
    assert_eq!(shorter.outputs["model"].context, Some(32));
    // A window as long as the context hides nothing.
    let model = shorter.outputs["model"].model.clone().unwrap();
    assert_eq!(model.style.sliding_window, Some(8));
    let shortest = world.describe(&folder().join("mistral"), json!({ "context": 8 })).unwrap();
    assert_eq!(shortest.outputs["model"].model.clone().unwrap().style.sliding_window, None);
    // Layers that differ in their windows do not within the window.
    let mixed = world.copy("qwen2", "mixed");
    let mut config: Value = serde_json::from_slice(&fs::read(mixed.join("config.json")).unwrap()).unwrap();
    config["use_sliding_window"] = true.into();
    config["sliding_window"] = 16.into();
    config["layer_types"] = json!(["full_attention", "sliding_attention"]);
    fs::write(mixed.join("config.json"), config.to_string()).unwrap();
    let problems = world.describe(&mixed, json!({})).unwrap_err();
    assert!(problems[0].message.contains("1 of its 2 layers see everything and the others 16 tokens"), "{problems:?}");
    assert!(world.describe(&mixed, json!({ "context": 16 })).is_ok());
    for (name, context) in [("mistral", 257), ("gpt2", 32)] {
        assert!(world.describe(&folder().join(name), json!({ "context": context })).is_err(), "{name}");
    }
}

/// Models made here, without a config to carry through: what is written reads back as the same model.
#[test]
fn models_of_every_family_made_here_go_out_and_come_back() {
    let world = World::new();
    let tokenizer = world.model("llama3");
    for architecture in [Architecture::Llama, Architecture::Mistral, Architecture::Qwen2, Architecture::Qwen3, Architecture::Gpt2] {
        let gpt2 = architecture == Architecture::Gpt2;
        let mut config = ModelConfig {
            architecture,
            vocab_size: 540,
            hidden_size: 16,
            intermediate_size: 24,
            layers: 2,
            heads: 4,
            kv_heads: if gpt2 { 4 } else { 2 },
            head_dim: 4,
            context: 64,
            positions: if gpt2 { Positions::Learned } else { Positions::Rope },
            rope_theta: 10_000.0,
            rope_scaling: None,
            norm_eps: 1e-5,
            tie_embeddings: gpt2,
            style: architecture.style(),
        };
        if architecture == Architecture::Mistral {
            config.style.sliding_window = Some(8);
        }
        for (artifact_type, head) in [(ArtifactType::Policy, Head::Language), (ArtifactType::Critic, Head::Score)] {
            let (specs, _) = parameters::specs(&config, head);
            let fresh = parameters::initial(&config, 7, 0.02);
            let Ok(parameters) = Parameters::from_data::<std::convert::Infallible>(specs, &Device::flex(), |spec| Ok(fresh(spec)));
            let decoder = Decoder::new(config.clone(), head, parameters, Device::flex());
            let mut builder = world.bench.store.artifact(artifact_type.name());
            let digest = CheckpointInfo::of(&tokenizer).unwrap().tokenizer;
            let info = CheckpointInfo { model: config.clone(), head, tokenizer: digest, adapters: Vec::new(), role: None };
            checkpoint::save(&Group::of(decoder), head, &mut builder, &info).unwrap();
            for name in ["tokenizer.json", "tokenizer_config.json"] {
                builder.share(tokenizer.manifest().entry(name).unwrap()).unwrap();
            }
            let made = builder.publish().unwrap();
            let target = world.path(&format!("{architecture:?}-{artifact_type}"));
            export(&made, &target, &AS_STORED).unwrap();
            let back = world.import(&target, json!({})).unwrap()["model"].clone();
            assert_eq!(back.manifest().artifact_type, artifact_type.name());
            assert_eq!(CheckpointInfo::of(&back).unwrap(), info);
            for entry in made.manifest().entries.iter().filter(|entry| entry.dtype.is_some()) {
                assert_eq!(back.manifest().entry(&entry.name), Some(entry));
            }
            // Half the bytes, where that is asked for.
            let half = world.path(&format!("{architecture:?}-{artifact_type}-half"));
            export(&made, &half, &ExportOptions { dtype: Some(Dtype::Bf16), ..AS_STORED }).unwrap();
            assert!(tensors(&half).values().all(|(dtype, _, _)| dtype == "BF16"));
            let config: Value = serde_json::from_slice(&fs::read(half.join("config.json")).unwrap()).unwrap();
            assert_eq!(config["torch_dtype"], "bfloat16");
        }
    }
    let config: Value = serde_json::from_slice(&fs::read(folder().join("llama3.config_v4.json")).unwrap()).unwrap();
    let mut alibi = HfConfig::parse(config.to_string().as_bytes(), None).unwrap().model;
    alibi.positions = Positions::Alibi;
    let error = rlflow_hf::config::write(&alibi, rlflow_hf::Role::Policy, Dtype::F32, &Default::default(), None).unwrap_err();
    assert!(error.to_string().contains("has no ALiBi positions"), "{error}");
}
