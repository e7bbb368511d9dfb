//! LoRA against PEFT and TRL (`tests/fixtures/make/lora.py`), and what it promises: frozen weights, one copy of them, stacks, dropout.

use std::{collections::BTreeMap, fs, path::Path, sync::Arc};

use rlflow_api::{Dtype, StageResult};
use rlflow_kernels::{Projection, SequenceLayout};
use rlflow_model::{
    BlockDropout, DropoutDraws, Layout, LoraSettings, ParameterSpec, TokenTargets, Use, adapter, lora, parameters::flex_view,
};
use rlflow_stages::{
    export::{ExportOptions, export},
    models,
    train::Precision,
};
use safetensors::SafeTensors;

use super::*;

/// A fixture's settings as rlflow's.
fn settings(fixture: &Fixture) -> LoraSettings {
    serde_json::from_value(fixture.json["lora"].clone()).unwrap()
}

fn tensors(artifact: &Artifact) -> BTreeMap<String, rlflow_api::Digest> {
    let entries = artifact.manifest().entries.iter().filter(|entry| entry.dtype.is_some());
    entries.map(|entry| (entry.name.clone(), entry.digest)).collect()
}

/// Everything of `base` is in `trained` under its name and by its digest, but for the scalar head; what is new is small.
fn check_base_is_shared(base: &Artifact, trained: &Artifact, fresh: &[&str]) {
    let (base, trained) = (tensors(base), tensors(trained));
    for (name, digest) in base.iter().filter(|(name, _)| !fresh.contains(&name.as_str())) {
        assert_eq!(trained.get(name), Some(digest), "{name}");
    }
    assert!(trained.keys().all(|name| base.contains_key(name) || lora::is_factor(name) || fresh.contains(&name.as_str())));
}

/// The factors and the head at the end, against PEFT's.
fn check_trained(bench: &Bench, trained: &Trained, lora: &LoraSettings) {
    let info = CheckpointInfo::of(&trained.model).unwrap();
    assert_eq!(info.adapters, std::slice::from_ref(lora));
    let mut compared = 0;
    for spec in parameters::specs(&info.model, info.head).0 {
        let floats =
            |name: &str| -> Vec<f64> { checkpoint::floats(&trained.model.read(name).unwrap()).into_iter().map(f64::from).collect() };
        for factor in lora.factors(&spec).into_iter().flat_map(|factors| [factors.a.name, factors.b.name]) {
            close(&factor, &floats(&adapter::entry_name(0, &factor)), &bench.fixture.floats(&format!("final.{factor}")), 0.0, 1e-4);
            compared += 1;
        }
        if spec.name == parameters::SCORE_WEIGHT {
            close("score", &floats(&spec.name), &bench.fixture.floats("final.score.weight"), 0.0, 1e-4);
        }
    }
    assert!(compared >= 8, "only {compared} factors compared");
}

impl Bench {
    fn check_series(&self, trained: &Trained, metrics: &[&str]) {
        for name in metrics {
            let expected = numbers(&self.fixture.json["series"][name]);
            assert_eq!(expected.len(), 50);
            close(name, &trained.series[*name], &expected, RELATIVE, ABSOLUTE);
        }
    }
}

const LOGGED: [&str; 3] = ["loss", "grad_norm", "learning_rate"];

#[test]
fn fifty_steps_of_sft_with_adapters_are_those_of_trl_with_peft() {
    let bench = Bench::new("lora_training_sft");
    let initial = Fixture::open("llama_tiny_gqa");
    let base = bench.model(ArtifactType::Policy, Head::Language, |name| (&initial, name.into()));
    let data = bench.conversations();
    let (lora, inputs) = (settings(&bench.fixture), [("model", &base), ("data", &data)]);
    let with_lora = json!({ "lora": lora });
    let trained = bench.train("sft", &inputs, 2, with_lora.clone());
    bench.check_series(&trained, &LOGGED);
    check_trained(&bench, &trained, &lora);
    check_base_is_shared(&base, &trained.model, &[]);
    bench.check_series(&bench.train("sft", &inputs, 3, with_lora.clone()), &LOGGED);
    let checkpointing = json!({ "lora": lora, "gradient_checkpointing": true });
    assert_eq!(bench.train("sft", &inputs, 2, checkpointing).model.digest(), trained.model.digest());
    // Weight decay reaches what is trained and nothing else.
    let decayed = bench.train("sft", &inputs, 2, json!({ "lora": { "rank": 2 } }));
    check_base_is_shared(&base, &decayed.model, &[]);

    // Training goes on: the first adapter stays, and another stands beside it.
    let second = LoraSettings { rank: 2, alpha: 4.0, ..LoraSettings::default() };
    let stacked = bench.train("sft", &[("model", &trained.model), ("data", &data)], 2, json!({ "lora": second }));
    assert_eq!(CheckpointInfo::of(&stacked.model).unwrap().adapters, [lora.clone(), second.clone()]);
    check_base_is_shared(&trained.model, &stacked.model, &[]);
    assert!(stacked.series["loss"][0] < trained.series["loss"][0], "it begins where the first one ended");
    // As one adapter in PEFT's format: side by side they add what they add one after the other.
    let folder = bench.stage.path("stacked");
    export(&stacked.model, &folder, &ExportOptions { dtype: None, max_shard_bytes: u64::MAX, adapter: true }).unwrap();
    let file = fs::read(folder.join("adapter_model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&file).unwrap();
    let adapters = [lora, second];
    for spec in parameters::specs(&bench.config, Head::Language).0 {
        let Some(names) = adapters[0].factors(&spec) else { continue };
        let read = |name: &str| checkpoint::floats(file.tensor(&format!("base_model.model.{name}")).unwrap().data());
        let (a, b) = (read(&names.a.name), read(&names.b.name));
        let mut whole = checkpoint::weight(&stacked.model, &spec).unwrap();
        lora::merge(&mut whole, rlflow_kernels::LowRank { a: &a, b: &b, scale: 1.0 }, 6);
        let wide = |values: &[f32]| values.iter().map(|value| f64::from(*value)).collect::<Vec<_>>();
        close(&spec.name, &wide(&whole), &wide(&adapter::merged(&stacked.model, &adapters, &spec).unwrap()), 0.0, 1e-5);
    }
    // Training all weights of a model with adapters makes a plain model of it.
    let plain = bench.train("sft", &[("model", &stacked.model), ("data", &data)], 2, json!({}));
    assert!(
        CheckpointInfo::of(&plain.model).unwrap().adapters.is_empty() && tensors(&plain.model).keys().all(|name| !lora::is_factor(name))
    );
}

#[test]
fn fifty_steps_of_the_reward_model_with_adapters_are_those_of_trl_with_peft() {
    let bench = Bench::new("lora_training_reward_model");
    let initial = Fixture::open("llama_tiny_gqa");
    let weight = |name: &str| (if name == parameters::SCORE_WEIGHT { &bench.fixture } else { &initial }, name.to_owned());
    let base = bench.model(ArtifactType::Reward, Head::Score, weight);
    let (lora, data) = (settings(&bench.fixture), bench.preferences());
    for micro_batch_size in [4, 1] {
        let trained = bench.train("reward_model", &[("model", &base), ("data", &data)], micro_batch_size, json!({ "lora": lora }));
        bench.check_series(&trained, &[&LOGGED[..], &["accuracy", "margin"]].concat());
        check_trained(&bench, &trained, &lora);
        check_base_is_shared(&base, &trained.model, &[parameters::SCORE_WEIGHT]);
    }
}

/// Without a reference of its own: below the adapter.
#[test]
fn fifty_steps_of_dpo_with_adapters_are_those_of_trl_with_peft() {
    let bench = Bench::new("lora_training_dpo");
    let initial = Fixture::open("llama_tiny_gqa");
    let base = bench.model(ArtifactType::Policy, Head::Language, |name| (&initial, name.into()));
    let (lora, data) = (settings(&bench.fixture), bench.preferences());
    let logged = ["rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"];
    for micro_batch_size in [4, 1] {
        let settings = json!({ "lora": lora, "beta": bench.fixture.json["beta"] });
        let trained = bench.train("dpo", &[("model", &base), ("data", &data)], micro_batch_size, settings);
        bench.check_series(&trained, &[&LOGGED[..], &logged].concat());
        check_trained(&bench, &trained, &lora);
        check_base_is_shared(&base, &trained.model, &[]);
    }
    // KTO holds its reference during training.
    bench.train("dpo", &[("model", &base), ("data", &data)], 2, json!({ "lora": lora, "loss": "kto" }));
}

/// The reference is the model below the adapter, with the same tensors.
#[test]
fn one_iteration_of_ppo_with_an_adapter_is_that_of_trl_with_peft() {
    let bench = Bench::new("lora_training_ppo");
    let initial = Fixture::open("llama_tiny_gqa");
    let mut policy = bench.decoder(Head::Language, |name| (&initial, name.into()));
    policy.adapt(&settings(&bench.fixture), |spec| {
        bench.fixture.floats(&format!("start.{}", spec.name)).into_iter().map(|value| value as f32).collect()
    });
    let reference = policy.without_adapter();
    let [policy, critic] = ppo_iteration(&bench, policy, reference);
    let mut compared = 0;
    for (slot, spec) in policy.parameters().specs().iter().enumerate() {
        let weights: Vec<f64> = policy.parameters().host(slot).into_iter().map(f64::from).collect();
        let factor = lora::is_factor(&spec.name);
        let expected = if factor { bench.fixture.floats(&format!("final.policy.{}", spec.name)) } else { initial.floats(&spec.name) };
        close(&spec.name, &weights, &expected, 0.0, if factor { WEIGHTS } else { 0.0 });
        compared += usize::from(factor);
    }
    assert_eq!(compared, 2 * 3 * 2);
    bench.check_weights("final.value.", &critic);
}

/// Imports a directory; an adapter goes onto the model `below`.
fn import(bench: &Bench, directory: &Path, below: Option<&Artifact>) -> StageResult<BTreeMap<String, Artifact>> {
    let kind = rlflow_stages::kinds().into_iter().find(|known| known.name() == "import").unwrap();
    let stage = kind.parse(&json!({ "path": directory.display().to_string() })).unwrap();
    let mut files: Vec<_> = fs::read_dir(directory).unwrap().map(|entry| testing::data_file(&entry.unwrap().path())).collect();
    files.sort_by(|a, b| a.name.cmp(&b.name));
    let inputs: Vec<(&str, &Artifact)> = below.into_iter().map(|below| ("model", below)).collect();
    bench.stage.with_context("import", 1, &inputs, &[files], |context| kind.run(&stage, context))
}

/// `base` with the files of some tokenizer, which models have outside of tests of trainers.
fn with_tokenizer(bench: &Bench, base: &Artifact) -> Artifact {
    let tokenizer = &import(bench, &fixtures("hf_models/llama3"), None).unwrap()["tokenizer"];
    let mut builder = bench.stage.store.artifact(&base.manifest().artifact_type);
    base.manifest().entries.iter().chain(&tokenizer.manifest().entries).for_each(|entry| builder.share(entry).unwrap());
    builder.metadata(base.manifest().metadata.clone());
    builder.publish().unwrap()
}

fn fixtures(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name)
}

/// Recorded logits, shifted to log-probabilities, and the largest of them.
fn recorded_distributions(fixture: &Fixture, vocab_size: usize) -> (Vec<f64>, f64) {
    let logits = fixture.floats("logits");
    let log_softmax = |row: &[f64]| {
        let largest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total = row.iter().map(|logit| (logit - largest).exp()).sum::<f64>().ln();
        row.iter().map(|logit| logit - largest - total).collect::<Vec<_>>()
    };
    (logits.chunks(vocab_size).flat_map(log_softmax).collect(), logits.iter().fold(0.0, |max: f64, logit| max.max(logit.abs())))
}

/// Scores of a batch's sequences.
fn scores(model: &Artifact, batch: &PackedBatch) -> Vec<f64> {
    let (decoder, _) = checkpoint::load(model, Head::Score, 1, &Device::flex()).unwrap();
    let ends: Arc<[u32]> = (0..2).map(|row| batch.layout.range(row).end as u32 - 1).collect();
    wide(&decoder.evaluate(batch, |head| head.scores(ends)))
}

/// Logits of all rows, shifted to log-probabilities.
fn distributions(decoder: &Decoder, batch: &PackedBatch) -> Vec<f64> {
    let vocab = decoder.config().vocab_size as u32;
    let rows: Arc<[u32]> = (0..batch.tokens() as u32).flat_map(|row| std::iter::repeat_n(row, vocab as usize)).collect();
    let targets: Arc<[u32]> = (0..batch.tokens()).flat_map(|_| 0..vocab).collect();
    wide(&decoder.evaluate(batch, |head| head.token_stats(TokenTargets { rows, targets, scale: 1.0 }).logprobs))
}

/// Loss and gradients of what is trained.
fn gradients(decoder: &Decoder, batch: &PackedBatch, targets: &TokenTargets) -> (f64, BTreeMap<String, Vec<f64>>) {
    let mut found = BTreeMap::new();
    let count = targets.rows.len() as f32;
    let loss = decoder.backward(
        batch,
        false,
        |head| {
            let loss = head.token_stats(targets.clone()).logprobs.sum().neg() / count;
            let value: f32 = loss.clone().inner().into_scalar();
            (loss, f64::from(value))
        },
        |slot, gradient| {
            let name = &decoder.parameters().specs()[slot].name;
            assert_eq!(gradient.is_some(), lora::is_factor(name), "{name}");
            found.extend(gradient.map(|gradient| (name.clone(), host(&gradient).into_iter().map(f64::from).collect())));
        },
    );
    (loss, found)
}

#[test]
fn adapters_of_peft_give_its_logits_and_gradients_and_go_out_as_they_were() {
    let mut bench = Bench::new("lora_adapter");
    let initial = Fixture::open("llama_tiny_gqa");
    let base = bench.model(ArtifactType::Policy, Head::Language, |name| (&initial, name.into()));
    let lora = LoraSettings { rank: 3, alpha: 6.0, target_modules: lora::TargetModules::ALL, ..LoraSettings::default() };
    let base = with_tokenizer(&bench, &base);
    let imported = import(&bench, &fixtures("lora_policy"), Some(&base)).unwrap();
    let model = imported["model"].clone();
    assert_eq!(CheckpointInfo::of(&model).unwrap().adapters, std::slice::from_ref(&lora));
    assert_eq!(model.manifest().artifact_type, ArtifactType::Policy.name());
    check_base_is_shared(&base, &model, &[]);

    let width = bench.fixture.width("input_ids");
    let ids: Vec<u32> = bench.fixture.integers("input_ids").into_iter().map(|id| id as u32).collect();
    let batch = PackedBatch::new(ids.chunks(width));
    let (expected, largest) = recorded_distributions(&bench.fixture, bench.config.vocab_size);

    // Merged when loaded; beside the weights when trained; with plain tensor operations.
    let (merged, _) = checkpoint::load(&model, Head::Language, 1, &Device::flex()).unwrap();
    assert!(merged.adapter().is_none());
    let (mut beside, _) = checkpoint::load(&base, Head::Language, 1, &Device::flex()).unwrap();
    beside.adapt(&lora, |spec| checkpoint::floats(&model.read(&adapter::entry_name(0, &spec.name)).unwrap()));
    let composed = beside.clone().without_fused_operations();
    for (what, decoder) in [("merged", &merged), ("beside", &beside), ("composed", &composed)] {
        close(what, &distributions(decoder, &batch), &expected, 0.0, 1e-4 * largest);
    }

    let labels = bench.fixture.integers("labels");
    let rows: Vec<u32> =
        (0..labels.len() as u32).filter(|row| !(*row as usize + 1).is_multiple_of(width) && labels[*row as usize + 1] >= 0).collect();
    let next: Vec<u32> = rows.iter().map(|row| labels[*row as usize + 1] as u32).collect();
    let targets = TokenTargets { rows: rows.into(), targets: next.into(), scale: 1.0 };
    for decoder in [&beside, &composed] {
        let (loss, found) = gradients(decoder, &batch, &targets);
        close("loss", &[loss], &[number(&bench.fixture.json["loss"])], 1e-5, 0.0);
        assert_eq!(found.len(), 2 * 7 * 2);
        for (name, gradient) in &found {
            let expected = bench.fixture.floats(&format!("grad.{name}"));
            let scale = expected.iter().fold(0.0, |max: f64, value| max.max(value.abs()));
            close(name, gradient, &expected, 0.0, 1e-4 * scale + 1e-8);
        }
    }

    // Out again: tensor by tensor what PEFT wrote, and a config that says the same.
    bench.config.tie_embeddings = true;
    check_export(&bench, &model, "lora_policy");
    let weight = |name: &str| (&initial, if name == parameters::SCORE_WEIGHT { "model.norm.weight".into() } else { name.to_owned() });
    let reward = with_tokenizer(&bench, &bench.model(ArtifactType::Reward, Head::Score, weight));
    let modules = serde_json::from_value(json!(["v_proj", "down_proj"])).unwrap();
    let lora = LoraSettings { target_modules: modules, ..lora };
    // The adapter brings the head: a policy below it is as good.
    for below in [&reward, &base] {
        let model = import(&bench, &fixtures("lora_reward"), Some(below)).unwrap()["model"].clone();
        assert_eq!(CheckpointInfo::of(&model).unwrap().adapters, std::slice::from_ref(&lora));
        assert_eq!(model.manifest().artifact_type, ArtifactType::Reward.name());
        close("scores", &scores(&model, &batch), &bench.fixture.floats("scores"), 1e-4, 1e-6);
        if below.digest() == reward.digest() {
            check_export(&bench, &model, "lora_reward");
        }
    }
}

/// `below` with another adapter, of random factors.
fn with_random_adapter(bench: &Bench, below: &Artifact, lora: &LoraSettings) -> Artifact {
    let mut info = CheckpointInfo::of(below).unwrap();
    let mut builder = bench.stage.store.artifact(&below.manifest().artifact_type);
    below.manifest().entries.iter().for_each(|entry| builder.share(entry).unwrap());
    let (specs, _) = parameters::specs(&info.model, info.head);
    for factor in specs.iter().filter_map(|spec| lora.factors(spec)).flat_map(|factors| [factors.a, factors.b]) {
        // B must not be zero, which it is where it begins.
        let values = lora::initial(&ParameterSpec { name: format!("{}.lora_A.weight", factor.name), shape: factor.shape.clone() }, 1);
        let shape: Vec<u64> = factor.shape.iter().map(|size| *size as u64).collect();
        let name = adapter::entry_name(info.adapters.len(), &factor.name);
        builder.put_tensor(&name, Dtype::F32, &shape, &checkpoint::bytes(&values)).unwrap();
    }
    info.adapters.push(lora.clone());
    builder.metadata(serde_json::to_value(&info).unwrap());
    builder.publish().unwrap()
}

/// Its files hold queries, keys and values in one projection, on which PEFT has one adapter and rlflow three.
#[test]
fn adapters_of_gpt2_come_in_from_peft_and_go_out_to_it() {
    let bench = Bench::new("lora_gpt2");
    let base = import(&bench, &fixtures("hf_models/gpt2"), None).unwrap()["model"].clone();
    let width = bench.fixture.width("input_ids");
    let ids: Vec<u32> = bench.fixture.integers("input_ids").into_iter().map(|id| id as u32).collect();
    let batch = PackedBatch::new(ids.chunks(width));
    let (expected, largest) = recorded_distributions(&bench.fixture, CheckpointInfo::of(&base).unwrap().model.vocab_size);
    let settings = |rank: usize, alpha: f64, modules: &[&str]| {
        let target_modules = serde_json::from_value(json!(modules)).unwrap();
        LoraSettings { rank, alpha, target_modules, ..LoraSettings::default() }
    };
    let adapters = |model: &Artifact| CheckpointInfo::of(model).unwrap().adapters;
    let logits = |model: &Artifact| distributions(&checkpoint::load(model, Head::Language, 1, &Device::flex()).unwrap().0, &batch);

    // Both of its `c_proj` are meant by that name.
    let policy = import(&bench, &fixtures("lora_gpt2_policy"), Some(&base)).unwrap()["model"].clone();
    assert_eq!(adapters(&policy), [settings(3, 6.0, &["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"])]);
    check_base_is_shared(&base, &policy, &[]);
    close("policy", &logits(&policy), &expected, 0.0, 1e-4 * largest);
    check_export(&bench, &policy, "lora_gpt2_policy");

    // Adapters that were trained here have an A for each projection: side by side they are wider than the others. 4 is 2 each of queries and
    // values; on top of the other, whose A is one, 3 + 4, and elsewhere 3 + 2 or 3. What comes in again adds the same and goes out as it was.
    let own = settings(2, 3.0, &["q_proj", "v_proj", "o_proj", "up_proj"]);
    let cases: [(&str, &Artifact, Value); 2] = [
        ("alone", &base, json!({ "attn.c_attn": 4 })),
        ("on another", &policy, json!({ "attn.c_attn": 7, "attn.c_proj": 5, "mlp.c_proj": 3 })),
    ];
    for (what, below, ranks) in cases {
        let trained = with_random_adapter(&bench, below, &own);
        let out = |model: &Artifact, folder: &str| {
            let folder = bench.stage.path(folder);
            export(model, &folder, &ExportOptions { dtype: None, max_shard_bytes: u64::MAX, adapter: true }).unwrap();
            let files = ["adapter_config.json", "adapter_model.safetensors"].map(|name| fs::read(folder.join(name)).unwrap());
            (folder, files)
        };
        let (folder, files) = out(&trained, what);
        let config: Value = serde_json::from_slice(&files[0]).unwrap();
        assert_eq!((&config["r"], &config["rank_pattern"]), (&json!(2), &ranks), "{what}");
        let again = import(&bench, &folder, Some(&base)).unwrap()["model"].clone();
        let ours = logits(&trained);
        close(what, &logits(&again), &ours, 0.0, 1e-4 * largest);
        assert!(logits(below).iter().zip(&ours).any(|(one, other)| (one - other).abs() > 0.01), "{what}: the adapter does something");
        assert!(out(&again, &format!("{what} again")).1 == files, "{what}");
    }

    // A rank for some modules, and an alpha for others.
    let reward = import(&bench, &fixtures("lora_gpt2_reward"), Some(&base)).unwrap()["model"].clone();
    assert_eq!(adapters(&reward), [settings(2, 6.0, &["q_proj", "k_proj", "v_proj"]), settings(3, 12.0, &["up_proj"])]);
    close("scores", &scores(&reward, &batch), &bench.fixture.floats("scores"), 1e-4, 1e-6);
    let folder = bench.stage.path("reward");
    export(&reward, &folder, &ExportOptions { dtype: None, max_shard_bytes: u64::MAX, adapter: true }).unwrap();
    let again = import(&bench, &folder, Some(&base)).unwrap()["model"].clone();
    close("scores again", &scores(&again, &batch), &bench.fixture.floats("scores"), 1e-4, 1e-6);
}

/// What PEFT can do and rlflow cannot is told; what is another spelling is understood.
#[test]
fn adapters_of_peft_that_cannot_be_used_are_told() {
    let bench = Bench::new("lora_adapter");
    let initial = Fixture::open("llama_tiny_gqa");
    let base = with_tokenizer(&bench, &bench.model(ArtifactType::Policy, Head::Language, |name| (&initial, name.into())));
    let mut copies = 0;
    let mut copy = |change: &dyn Fn(&mut Value)| {
        copies += 1;
        let directory = bench.stage.path(&format!("adapter-{copies}"));
        fs::create_dir(&directory).unwrap();
        let mut config = serde_json::from_slice(&fs::read(fixtures("lora_policy").join("adapter_config.json")).unwrap()).unwrap();
        change(&mut config);
        fs::write(directory.join("adapter_config.json"), config.to_string()).unwrap();
        fs::copy(fixtures("lora_policy").join("adapter_model.safetensors"), directory.join("adapter_model.safetensors")).unwrap();
        directory
    };
    let lora = |directory: &Path| {
        let model = import(&bench, directory, Some(&base)).unwrap()["model"].clone();
        CheckpointInfo::of(&model).unwrap().adapters[0].clone()
    };
    assert_eq!(lora(&copy(&|config| config["target_modules"] = "all-linear".into())).target_modules, lora::TargetModules::ALL);
    // A regular expression, as PEFT takes one; the file of tensors shows what it means.
    assert_eq!(lora(&copy(&|config| config["target_modules"] = ".*proj".into())).target_modules, lora::TargetModules::ALL);
    // arXiv:2312.03732: alpha over the root of the rank, 6 / sqrt(3).
    assert!((lora(&copy(&|config| config["use_rslora"] = true.into())).scale() - 3.464_101_615_137_754_4).abs() < 1e-12);
    // One adapter for each alpha; the name in a pattern is how a module's path ends.
    let two = copy(&|config| config["alpha_pattern"] = json!({ "self_attn.q_proj": 12 }));
    let two = CheckpointInfo::of(&import(&bench, &two, Some(&base)).unwrap()["model"]).unwrap().adapters;
    let two: Vec<(f64, usize)> = two.iter().map(|lora| (lora.scale(), lora.targets(&bench.config).len())).collect();
    assert_eq!(two, [(4.0, 1), (2.0, 6)]);

    let refused = |directory: &Path, below: Option<&Artifact>, expected: &str| {
        let error = import(&bench, directory, below).map(|_| ()).unwrap_err();
        let told = format!("{error} {}", error.hint().unwrap_or_default());
        assert!(told.contains(expected), "`{expected}` is not in: {told}");
    };
    type Change<'a> = &'a dyn Fn(&mut Value);
    let wrong: &[(Change<'_>, &str)] = &[
        (&|config| config["use_dora"] = true.into(), "`use_dora` is true, which rlflow cannot compute"),
        (&|config| config["peft_type"] = "IA3".into(), "`peft_type` is \"IA3\""),
        (&|config| config["rank_pattern"] = json!({ "q_proj": 4 }), "has shape [3, 32], and [4, 32] is expected"),
        (&|config| config["rank_pattern"] = json!({ ".*proj": 4 }), "`rank_pattern` is {\".*proj\":4}"),
        (&|config| config["alpha_pattern"] = json!({ "q_proj": 4, "self_attn.q_proj": 5 }), "`alpha_pattern` is {\"q_proj\":4"),
        (
            &|config| config["alpha_pattern"] = json!({ "layers.0.self_attn.q_proj": 4 }),
            "its adapters on `q_proj` have another rank or alpha in some blocks",
        ),
        (&|config| config["init_lora_weights"] = "pissa".into(), "`init_lora_weights` is \"pissa\""),
        (&|config| config["a_new_thing"] = 1.into(), "`a_new_thing` is 1, which rlflow cannot compute"),
        (&|config| config["modules_to_save"] = json!(["embed_tokens"]), "it replaces `embed_tokens` of the model below"),
        (&|config| config["target_modules"] = json!(["q_proj", "lm_head"]), "it has adapters on `lm_head`; rlflow's are on q_proj"),
        (
            &|config| config["layers_to_transform"] = json!([1]),
            "not part of such a model: `base_model.model.model.layers.0.mlp.down_proj.lora_A.weight`",
        ),
        (&|config| config["layers_to_transform"] = "all".into(), "`layers_to_transform` is \"all\""),
        (&|config| config["r"] = 0.into(), "`r` is 0"),
        (&|config| config["r"] = 4.into(), "has shape [3, 32], and [4, 32] is expected"),
        (
            &|config| config["task_type"] = "SEQ_CLS".into(),
            "not those that adapter_config.json describes; missing: `base_model.model.score.weight`",
        ),
    ];
    for (change, expected) in wrong {
        refused(&copy(change), Some(&base), expected);
    }
    let plain = fixtures("lora_policy");
    refused(&fixtures("lora_gpt2_policy"), Some(&base), "it has adapters on `c_attn`; rlflow's are on q_proj");
    refused(&plain, None, "give this stage `inputs = { model = ");
    refused(&fixtures("hf_models/llama3"), Some(&base), "there is no `adapter_config.json`");
    let reward = bench.model(ArtifactType::Reward, Head::Score, |name| {
        (&initial, if name == parameters::SCORE_WEIGHT { "model.norm.weight".into() } else { name.to_owned() })
    });
    refused(&plain, Some(&with_tokenizer(&bench, &reward)), "an adapter of a language model, and the model below is a reward");
    let pickled = copy(&|_| {});
    fs::rename(pickled.join("adapter_model.safetensors"), pickled.join("adapter_model.bin")).unwrap();
    refused(&pickled, Some(&base), "run any code when they are opened");
    // An adapter on the second block only: the first stays as it is.
    let partly = copy(&|config| config["layers_to_transform"] = 1.into());
    let file = fs::read(plain.join("adapter_model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&file).unwrap();
    let kept = file.tensors().into_iter().filter(|(name, _)| name.contains(".layers.1."));
    safetensors::serialize_to_file(kept, None, &partly.join("adapter_model.safetensors")).unwrap();
    let whole = import(&bench, &fixtures("lora_policy"), Some(&base)).unwrap()["model"].clone();
    let model = import(&bench, &partly, Some(&base)).unwrap()["model"].clone();
    for spec in parameters::specs(&bench.config, Head::Language).0 {
        let merged = |model: &Artifact| adapter::merged(model, &CheckpointInfo::of(model).unwrap().adapters, &spec).unwrap();
        let expected = if spec.name.contains(".layers.1.") { &whole } else { &base };
        assert_eq!(merged(&model), merged(expected), "{}", spec.name);
    }
    // A tensor too many, and one too few.
    let short = copy(&|_| {});
    let path = short.join("adapter_model.safetensors");
    let content = fs::read(&path).unwrap();
    let at = content.windows(6).position(|bytes| bytes == b"q_proj").unwrap();
    fs::write(&path, [&content[..at], b"r_proj", &content[at + 6..]].concat()).unwrap();
    refused(&short, Some(&base), "missing: `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`");
}

fn check_export(bench: &Bench, model: &Artifact, name: &str) {
    let folder = bench.stage.path(name);
    export(model, &folder, &ExportOptions { dtype: None, max_shard_bytes: u64::MAX, adapter: true }).unwrap();
    let read = |folder: &Path| fs::read(folder.join("adapter_model.safetensors")).unwrap();
    let (ours, theirs) = (read(&folder), read(&fixtures(name)));
    let (ours, theirs) = (SafeTensors::deserialize(&ours).unwrap(), SafeTensors::deserialize(&theirs).unwrap());
    let all = |file: &SafeTensors<'_>| -> BTreeMap<String, (Vec<usize>, Vec<u8>)> {
        file.tensors().into_iter().map(|(name, view)| (name, (view.shape().to_vec(), view.data().to_vec()))).collect()
    };
    assert_eq!(all(&ours), all(&theirs), "{name}");
    let config = |folder: &Path| -> Value { serde_json::from_slice(&fs::read(folder.join("adapter_config.json")).unwrap()).unwrap() };
    let (ours, theirs) = (config(&folder), config(&fixtures(name)));
    for (key, value) in ours.as_object().unwrap().iter().filter(|(key, _)| *key != "target_modules") {
        assert_eq!(value, &theirs[key], "{name}: {key}");
    }
    // PEFT spells `all-linear` out for each block; the endings are ours.
    let endings = |config: &Value| -> std::collections::BTreeSet<String> {
        let names = config["target_modules"].as_array().unwrap().iter().map(|name| name.as_str().unwrap().to_owned());
        names.map(|name| name.rsplit('.').next().unwrap().to_owned()).collect()
    };
    assert_eq!(endings(&ours), endings(&theirs));
}

/// The reference of DPO and PPO, and the reward model of a critic: one copy of the weights serves both.
#[test]
fn what_is_below_an_adapter_is_held_once() {
    let bench = Bench::new("lora_adapter");
    let initial = Fixture::open("llama_tiny_gqa");
    let base = bench.model(ArtifactType::Policy, Head::Language, |name| (&initial, name.into()));
    let load = |lora: Option<&LoraSettings>| {
        models::load_artifact(&base, Head::Language, 1, &Layout::one(Device::flex()), Precision::Fp32, Use::Trained(lora)).unwrap()
    };
    assert!(load(None).base_as(&base).is_none(), "what is trained itself is not its own reference");
    let trained = Fixture::open("training_parity_sft");
    let other = bench.model(ArtifactType::Policy, Head::Language, |name| (&trained, format!("final.{name}")));
    let mut policy = load(Some(&LoraSettings::default()));
    assert!(policy.base_as(&other).is_none(), "another model");
    let reference = policy.base_as(&base).unwrap();
    let count = reference.specs().len();
    assert_eq!(policy.model.specs().len(), count + 2 * 2 * 2);
    let address = |model: &rlflow_model::Group, slot: usize| {
        flex_view(&model.first().parameters().tensors()[slot]).unwrap().as_slice::<f32>().unwrap().as_ptr()
    };
    for slot in 0..count {
        assert_eq!(address(&policy.model, slot), address(&reference, slot), "{}", reference.specs()[slot].name);
    }
    // The bytes of both together are those of one.
    assert_eq!(
        policy.model.ranks()[0].ledger().now().total(),
        4 * policy.model.specs().iter().map(ParameterSpec::len).sum::<usize>() as u64
    );
    // Training changes the adapter only: no gradient, no moments for the rest.
    policy.model.train(OptimizerSettings { betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0.1, grad_clip: 1.0 });
    for (slot, spec) in policy.model.specs().iter().enumerate() {
        let moments = policy.model.moments(slot).unwrap()[0].len();
        assert_eq!(moments, if lora::is_factor(&spec.name) { spec.len() } else { 0 }, "{}", spec.name);
    }
}

#[test]
fn dropout_is_drawn_by_counter_and_is_the_same_in_all_versions() {
    // Statistics, and independence of how the batch is cut.
    let layout = |lengths: &[usize]| Arc::new(SequenceLayout::from_lengths(lengths.iter().copied()));
    let dropout = |probability: f64, block: usize, step: u64, samples: &[u64], lengths: &[usize]| BlockDropout {
        probability,
        block,
        draws: DropoutDraws::new(7, step, samples.iter().copied()),
        layout: layout(lengths),
    };
    let apply = |dropout: &BlockDropout, projection: Projection, width: usize| {
        let mut rows = vec![1.0; dropout.layout.tokens() * width];
        dropout.apply(projection, &mut rows);
        rows
    };
    let whole = apply(&dropout(0.3, 0, 5, &[0, 1, 2], &[40, 30, 50]), Projection::Query, 256);
    let dropped = whole.iter().filter(|value| **value == 0.0).count() as f64 / whole.len() as f64;
    let mean = whole.iter().map(|value| f64::from(*value)).sum::<f64>() / whole.len() as f64;
    // Three standard deviations of 30,720 draws are 0.008.
    assert!((dropped - 0.3).abs() < 0.008 && (mean - 1.0).abs() < 0.012, "{dropped} {mean}");
    assert!(whole.iter().all(|value| *value == 0.0 || *value == (1.0 / 0.7) as f32));
    let second = apply(&dropout(0.3, 0, 5, &[1], &[30]), Projection::Query, 256);
    assert_eq!(second, whole[40 * 256..70 * 256]);
    for (other, projection) in [
        (dropout(0.3, 1, 5, &[1], &[30]), Projection::Query),
        (dropout(0.3, 0, 6, &[1], &[30]), Projection::Query),
        (dropout(0.3, 0, 5, &[2], &[30]), Projection::Query),
        (dropout(0.3, 0, 5, &[1], &[30]), Projection::Key),
    ] {
        let same = apply(&other, projection, 256).iter().zip(&second).filter(|(a, b)| a == b).count() as f64 / second.len() as f64;
        // Two independent masks agree with probability 0.7^2 + 0.3^2.
        assert!((same - 0.58).abs() < 0.02, "{same}");
    }

    // Fused and from plain tensor operations, forward and backward.
    let bench = Bench::new("training_parity_sft");
    let initial = Fixture::open("llama_tiny_gqa");
    let mut decoder = bench.decoder(Head::Language, |name| (&initial, name.into()));
    let lora = LoraSettings { dropout: 0.4, target_modules: lora::TargetModules::ALL, ..LoraSettings::default() };
    // B must not be zero for A to have a gradient.
    let random =
        |spec: &ParameterSpec| lora::initial(&ParameterSpec { name: "lora_A.weight".into(), shape: spec.shape.clone() }, spec.len() as u64);
    decoder.adapt(&lora, random);
    let sequences: Vec<Vec<u32>> = (0..3u32).map(|row| (0..9 + row).map(|at| 3 + (at * 7 + row * 11) % 90).collect()).collect();
    let plain = PackedBatch::new(sequences.iter().map(Vec::as_slice));
    let batch = plain.clone().with_dropout(DropoutDraws::new(1, 2, [4, 5, 6]));
    let targets = TokenTargets { rows: (0..8).collect(), targets: (10..18).collect(), scale: 1.0 };
    let (loss, fused) = gradients(&decoder, &batch, &targets);
    let (composed_loss, composed) = gradients(&decoder.clone().without_fused_operations(), &batch, &targets);
    close("loss", &[loss], &[composed_loss], 1e-5, 0.0);
    for (name, gradient) in &fused {
        let scale = composed[name].iter().fold(0.0, |max: f64, value| max.max(value.abs()));
        close(name, gradient, &composed[name], 0.0, 1e-4 * scale + 1e-8);
    }
    assert!((loss - gradients(&decoder, &plain, &targets).0).abs() > 1e-4, "dropout does something");

    // In a stage: a batch is a batch however it is cut; chance 0 is no dropout; each step drops others.
    let base = bench.model(ArtifactType::Policy, Head::Language, |name| (&initial, name.into()));
    let data = bench.conversations();
    let inputs = [("model", &base), ("data", &data)];
    let run = |micro: usize, dropout: f64| bench.train("sft", &inputs, micro, json!({ "lora": { "alpha": 32, "dropout": dropout } }));
    let (whole, cut) = (run(4, 0.5), run(1, 0.5));
    close("loss", &cut.series["loss"], &whole.series["loss"], 1e-5, 1e-5);
    let (none, without) = (run(2, 0.0), bench.train("sft", &inputs, 2, json!({ "lora": { "alpha": 32 } })));
    assert_eq!(none.model.digest(), without.model.digest());
    assert!(whole.series["loss"][40..] != none.series["loss"][40..]);
}
