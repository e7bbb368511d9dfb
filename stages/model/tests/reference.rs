//! The decoder against transformers and float64 formulas (`tests/fixtures/make/llama_tiny.py`).

use std::{collections::BTreeMap, sync::Arc};

use burn::tensor::Device;
use rlflow_api::ModelConfig;
use rlflow_kernels::matmul::Arithmetic;
use rlflow_model::{
    Decoder, Draws, Head, HeadView, LearningRate, Optimizer, OptimizerSettings, PackedBatch, Parameters, Sampling, Schedule, TokenTargets,
    generate::generate, parameters,
};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

fn fixture(name: &str) -> (Vec<u8>, Value) {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures");
    let tensors = std::fs::read(format!("{folder}/{name}.safetensors")).unwrap();
    let json = serde_json::from_slice(&std::fs::read(format!("{folder}/{name}.json")).unwrap()).unwrap();
    (tensors, json)
}

fn floats(tensors: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let view = tensors.tensor(name).unwrap_or_else(|_| panic!("{name}"));
    match view.dtype() {
        Dtype::F32 => view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
        Dtype::F64 => view.data().chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap()) as f32).collect(),
        other => panic!("{name}: {other:?}"),
    }
}

fn integers(tensors: &SafeTensors<'_>, name: &str) -> Vec<i64> {
    tensors.tensor(name).unwrap().data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap())).collect()
}

fn load(weights: &SafeTensors<'_>, config: ModelConfig) -> Decoder {
    let device = Device::flex();
    let (specs, _) = parameters::specs(&config, Head::Language);
    let parameters = Parameters::from_data::<()>(specs, &device, |spec| Ok(floats(weights, &spec.name))).unwrap();
    Decoder::new(config, Head::Language, parameters, device)
}

fn close(what: &str, actual: &[f32], expected: &[f32], relative: f32, absolute: f32) {
    assert_eq!(actual.len(), expected.len(), "{what}");
    let scale = expected.iter().fold(0.0f32, |max, x| max.max(x.abs()));
    for (i, (a, e)) in actual.iter().zip(expected).enumerate() {
        assert!((a - e).abs() <= relative * scale.max(e.abs()) + absolute, "{what}[{i}]: {a} against {e} (scale {scale})");
    }
}

struct Case {
    tensors: Vec<u8>,
    config: ModelConfig,
    sequences: Vec<Vec<u32>>,
    labels: Vec<Vec<i64>>,
}

fn case(name: &str, weights: &str) -> (Case, Vec<u8>) {
    let (tensors, json) = fixture(name);
    let (weight_bytes, weight_json) = fixture(weights);
    let config: ModelConfig = serde_json::from_value(json.get("config").unwrap_or(&weight_json["config"]).clone()).unwrap();
    let view = SafeTensors::deserialize(&tensors).unwrap();
    let ids = integers(&view, "input_ids");
    let labels = integers(&view, "labels");
    let rows = view.tensor("input_ids").unwrap().shape()[0];
    let width = ids.len() / rows;
    // Documents of a packed row become sequences of their own.
    let documents = view.tensor("document_ids").ok().map(|_| integers(&view, "document_ids"));
    let mut starts: Vec<usize> = (0..rows).map(|row| row * width).collect();
    if let Some(documents) = documents {
        starts = (0..ids.len()).filter(|i| *i == 0 || documents[*i] != documents[*i - 1]).collect();
    }
    starts.push(ids.len());
    let cut = |i: usize| starts[i]..starts[i + 1];
    let sequences = (0..starts.len() - 1).map(|i| ids[cut(i)].iter().map(|id| *id as u32).collect()).collect();
    let labels = (0..starts.len() - 1).map(|i| labels[cut(i)].to_vec()).collect();
    (Case { tensors: tensors.clone(), config, sequences, labels }, weight_bytes)
}

/// Rows that predict a counted label, and the labels.
fn targets(case: &Case) -> TokenTargets {
    let (mut rows, mut targets, mut start) = (Vec::new(), Vec::new(), 0);
    for labels in &case.labels {
        for position in 0..labels.len() - 1 {
            if labels[position + 1] >= 0 {
                rows.push((start + position) as u32);
                targets.push(labels[position + 1] as u32);
            }
        }
        start += labels.len();
    }
    TokenTargets { rows: rows.into(), targets: targets.into(), scale: 1.0 }
}

fn check_against_reference(decoder: &Decoder, case: &Case, checkpointing: bool) {
    let view = SafeTensors::deserialize(&case.tensors).unwrap();
    let batch = PackedBatch::new(case.sequences.iter().map(Vec::as_slice));
    let targets = targets(case);
    let count = targets.rows.len() as f32;
    let mut gradients = BTreeMap::new();
    let loss = decoder.backward(
        &batch,
        checkpointing,
        |head| {
            let loss = head.token_stats(targets.clone()).logprobs.sum().neg() / count;
            let value: f32 = loss.clone().inner().into_scalar();
            (loss, value)
        },
        |slot, gradient| assert!(gradients.insert(slot, gradient).is_none(), "gradient {slot} came twice"),
    );
    close("loss", &[loss], &floats(&view, "loss"), 1e-5, 0.0);
    assert_eq!(gradients.len(), decoder.parameters().specs().len());
    for (slot, gradient) in gradients {
        let name = &decoder.parameters().specs()[slot].name;
        close(name, &parameters::host(&gradient.unwrap()), &floats(&view, &format!("grad.{name}")), 2e-5, 1e-7);
    }
}

#[test]
fn forward_and_backward_agree_with_transformers() {
    for (name, weights) in [
        ("llama_tiny_mha", "llama_tiny_mha"),
        ("llama_tiny_gqa", "llama_tiny_gqa"),
        ("llama_tiny_mqa", "llama_tiny_mqa"),
        ("llama_tiny_packed", "llama_tiny_gqa"),
        ("llama_tiny_alibi", "llama_tiny_alibi"),
        ("llama_tiny_alibi_packed", "llama_tiny_alibi"),
    ] {
        let (case, weights) = case(name, weights);
        let weights = SafeTensors::deserialize(&weights).unwrap();
        let decoder = load(&weights, case.config.clone());
        check_against_reference(&decoder, &case, false);
        check_against_reference(&decoder, &case, true);
        check_against_reference(&decoder.without_fused_operations(), &case, false);
    }
}

/// In bfloat16 the products' operands are rounded and nothing else: the fused operations agree with plain tensor operations
/// that round the same operands, and both with float32 as far as 8 bits go.
#[test]
fn bf16_agrees_with_the_composed_version_and_stays_near_fp32() {
    for (name, weights) in
        [("llama_tiny_gqa", "llama_tiny_gqa"), ("llama_tiny_packed", "llama_tiny_gqa"), ("llama_tiny_alibi", "llama_tiny_alibi")]
    {
        let (case, weights) = case(name, weights);
        let batch = PackedBatch::new(case.sequences.iter().map(Vec::as_slice));
        let targets = targets(&case);
        let decoder = |arithmetic: Arithmetic| {
            let mut decoder = load(&SafeTensors::deserialize(&weights).unwrap(), case.config.clone());
            decoder.set_arithmetic(arithmetic);
            decoder
        };
        // Losses, and all gradients end to end.
        let run = |decoder: Decoder| {
            let mut gradients = BTreeMap::new();
            let loss = |head: &HeadView<'_>| {
                let loss = head.token_stats(targets.clone()).logprobs.sum().neg() / targets.rows.len() as f32;
                let value: f32 = loss.clone().inner().into_scalar();
                (loss, value)
            };
            let loss = decoder.backward(&batch, false, loss, |slot, gradient| {
                gradients.insert(slot, parameters::host(&gradient.unwrap()));
            });
            (loss, gradients.into_values().flatten().collect::<Vec<f32>>())
        };
        let (exact, exact_gradients) = run(decoder(Arithmetic::F32));
        let (fused, fused_gradients) = run(decoder(Arithmetic::Bf16));
        let (composed, composed_gradients) = run(decoder(Arithmetic::Bf16).without_fused_operations());
        let distance = |a: &[f32], b: &[f32]| {
            let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
            norm(&mut a.iter().zip(b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied())
        };
        assert!(fused != exact, "{name}: nothing was rounded");
        assert!((fused - composed).abs() < 1e-3 * composed, "{name}: {fused} against {composed}");
        assert!((fused - exact).abs() < 1e-2 * exact, "{name}: {fused} against {exact}");
        assert!(distance(&fused_gradients, &composed_gradients) < 2e-2, "{name}");
        assert!(distance(&fused_gradients, &exact_gradients) < 3e-2, "{name}: {}", distance(&fused_gradients, &exact_gradients));
    }
}

#[test]
fn token_statistics_agree_with_transformers() {
    for name in ["llama_tiny_mha", "llama_tiny_gqa", "llama_tiny_mqa", "llama_tiny_alibi"] {
        let (case, weights) = case(name, name);
        let weights = SafeTensors::deserialize(&weights).unwrap();
        let view = SafeTensors::deserialize(&case.tensors).unwrap();
        let decoder = load(&weights, case.config.clone());
        let batch = PackedBatch::new(case.sequences.iter().map(Vec::as_slice));
        let width = case.sequences[0].len();
        let rows: Vec<u32> = (0..batch.tokens() as u32).filter(|row| !(*row as usize + 1).is_multiple_of(width)).collect();
        let next: Vec<u32> = rows.iter().map(|row| batch.ids[*row as usize + 1]).collect();
        let targets = TokenTargets { rows: rows.clone().into(), targets: next.into(), scale: 1.0 };
        let stats = decoder.evaluate(&batch, |head| head.token_stats(targets.clone()));
        close(name, &parameters::host(&stats.logprobs), &floats(&view, "token_logprobs"), 1e-5, 1e-6);
        let entropy = floats(&view, "entropy");
        let expected: Vec<f32> = rows.iter().map(|row| entropy[*row as usize]).collect();
        close(name, &parameters::host(&stats.entropies), &expected, 1e-5, 1e-6);
        let logits = floats(&view, "logits");
        let of_row = |row: &u32| &logits[*row as usize * case.config.vocab_size..][..case.config.vocab_size];
        let means: Vec<f32> = rows.iter().map(|row| of_row(row).iter().sum::<f32>() / case.config.vocab_size as f32).collect();
        let is_best = |(row, target): (&u32, &u32)| f32::from(of_row(row).iter().all(|logit| *logit <= of_row(row)[*target as usize]));
        let correct: Vec<f32> = rows.iter().zip(&*targets.targets).map(is_best).collect();
        let composed = decoder.clone().without_fused_operations();
        for decoder in [&decoder, &composed] {
            let stats = decoder.evaluate(&batch, |head| head.token_stats(targets.clone()));
            close(name, &parameters::host(&stats.mean_logits), &means, 1e-5, 1e-6);
            assert_eq!(parameters::host(&stats.correct), correct, "{name}");
        }
    }
}

/// Gradients of an entropy bonus, and logits scaled by a temperature, have no fixture: fused against composed.
#[test]
fn entropy_gradients_and_temperature_agree_with_the_composed_version() {
    let (case, weights) = case("llama_tiny_gqa", "llama_tiny_gqa");
    let decoder = load(&SafeTensors::deserialize(&weights).unwrap(), case.config.clone());
    let batch = PackedBatch::new(case.sequences.iter().map(Vec::as_slice));
    let targets = TokenTargets { scale: 1.0 / 0.7, ..targets(&case) };
    let run = |decoder: &Decoder| {
        let mut gradients = BTreeMap::new();
        decoder.backward(
            &batch,
            false,
            |head| {
                let stats = head.token_stats(targets.clone());
                (stats.logprobs.mean() + stats.entropies.mean() * 3.0, ())
            },
            |slot, gradient| drop(gradients.insert(slot, parameters::host(&gradient.unwrap()))),
        );
        gradients
    };
    let (fused, composed) = (run(&decoder), run(&decoder.clone().without_fused_operations()));
    for (slot, gradient) in fused {
        close(&decoder.parameters().specs()[slot].name, &gradient, &composed[&slot], 1e-5, 1e-7);
    }
}

/// Packing others beside a sequence changes nothing for it beyond rounding, and threads change nothing at all.
#[test]
fn neighbours_and_threads_do_not_matter() {
    let (case, weights) = case("llama_tiny_gqa", "llama_tiny_gqa");
    let decoder = load(&SafeTensors::deserialize(&weights).unwrap(), case.config.clone());
    let logprobs = |sequences: &[&[u32]], count: usize| {
        let batch = PackedBatch::new(sequences.iter().copied());
        let rows: Arc<[u32]> = (0..count as u32 - 1).collect();
        let targets: Arc<[u32]> = rows.iter().map(|row| batch.ids[*row as usize + 1]).collect();
        parameters::host(&decoder.evaluate(&batch, |head| head.token_stats(TokenTargets { rows, targets, scale: 1.0 }).logprobs))
    };
    let (first, second) = (case.sequences[0].as_slice(), case.sequences[1].as_slice());
    close("packing", &logprobs(&[first, second, &second[..5]], first.len()), &logprobs(&[first], first.len()), 1e-5, 1e-6);

    let gradients = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let batch = PackedBatch::new(std::iter::repeat_n([first, second], 40).flatten());
        let targets = TokenTargets { rows: (0..200).collect(), targets: (0..200u32).map(|i| i % 97).collect(), scale: 1.0 };
        pool.install(|| {
            let mut bits = BTreeMap::new();
            let loss = |head: &rlflow_model::HeadView<'_>| (head.token_stats(targets.clone()).logprobs.sum(), ());
            decoder.backward(&batch, false, loss, |slot, gradient| {
                let data: Vec<u32> = parameters::host(&gradient.unwrap()).into_iter().map(f32::to_bits).collect();
                bits.insert(slot, data);
            });
            bits
        })
    };
    assert_eq!(gradients(1), gradients(2));
    assert_eq!(gradients(1), gradients(3));
}

/// Torch's AdamW with clipping over 200 steps (`tests/fixtures/make/optim.py`).
#[test]
fn adamw_and_clipping_agree_with_torch() {
    let (bytes, json) = fixture("optim");
    let view = SafeTensors::deserialize(&bytes).unwrap();
    let device = Device::flex();
    for (name, case) in json["adamw"].as_object().unwrap() {
        let number = |key: &str| case[key].as_f64().unwrap_or(0.0);
        let settings = OptimizerSettings {
            betas: [case["betas"][0].as_f64().unwrap(), case["betas"][1].as_f64().unwrap()],
            eps: number("eps"),
            weight_decay: number("weight_decay"),
            grad_clip: number("max_norm"),
        };
        if !case["schedule"].is_null() || settings.weight_decay > 0.0 && case["no_decay"].as_array().is_none_or(|names| names.is_empty()) {
            continue;
        }
        let specs = [("matrix", vec![4, 6]), ("bias", vec![7])];
        let specs = specs.map(|(name, shape)| rlflow_model::ParameterSpec { name: name.into(), shape }).to_vec();
        let mut parameters =
            Parameters::from_data::<()>(specs.clone(), &device, |spec| Ok(floats(&view, &format!("start.{}", spec.name)))).unwrap();
        let mut optimizer = Optimizer::new(&parameters, settings);
        let norms = floats(&view, "grad_norm");
        for step in 0..200 {
            let gradients = Parameters::from_data::<()>(specs.clone(), &device, |spec| {
                let all = floats(&view, &format!("grads.{}", spec.name));
                Ok(all[step * spec.len()..(step + 1) * spec.len()].to_vec())
            });
            let mut sums = rlflow_model::Gradients::new(2);
            for (slot, gradient) in gradients.unwrap().tensors().iter().enumerate() {
                sums.add(slot, Some(gradient.clone()));
            }
            let norm = optimizer.step(&mut parameters, &sums, 1.0, number("lr"));
            close("norm", &[norm as f32], &norms[step..=step], 1e-5, 0.0);
            if [1, 2, 10, 50, 100, 200].contains(&(step + 1)) {
                for (slot, spec) in specs.iter().enumerate() {
                    let expected = floats(&view, &format!("{name}.step_{}.{}", step + 1, spec.name));
                    close(&format!("{name} {} {}", step + 1, spec.name), &parameters.host(slot), &expected, 2e-6, 1e-7);
                }
            }
        }
    }
}

#[test]
fn schedules_agree_with_transformers() {
    let (_, json) = fixture("optim");
    let mut compared = 0;
    for (name, case) in json["schedules"].as_object().unwrap() {
        let schedule = match name.as_str() {
            "constant" | "constant_with_warmup" => Schedule::Constant,
            "linear" => Schedule::Linear,
            "cosine" => Schedule::Cosine,
            "wsd" | "wsd_linear" => Schedule::Wsd,
            _ => continue,
        };
        let warmup_steps = if name == "constant" { 0 } else { 20 };
        let rate = LearningRate { lr: 1.0, schedule, warmup_steps, decay_steps: 40, total_steps: 200, min_lr_ratio: 0.0 };
        for (step, expected) in case["multipliers"].as_array().unwrap().iter().enumerate() {
            assert!(
                (rate.at(step as u64) - expected.as_f64().unwrap()).abs() < 1e-9,
                "{name} at {step}: {} against {expected}",
                rate.at(step as u64)
            );
        }
        compared += 1;
    }
    assert!(compared >= 4, "only {compared} schedules compared");
}

/// Greedy decoding over the cache gives transformers' tokens, and each token's log-probability is the full pass's.
#[test]
fn cached_decoding_agrees_with_transformers_and_with_the_full_pass() {
    for name in ["llama_tiny_mha", "llama_tiny_gqa", "llama_tiny_mqa", "llama_tiny_alibi"] {
        let (case, weights) = case(name, name);
        let weights = SafeTensors::deserialize(&weights).unwrap();
        let view = SafeTensors::deserialize(&case.tensors).unwrap();
        let decoder = load(&weights, case.config.clone());
        // Prompts of different lengths in one batch; the short one must not notice the long one. Two stand twice: their answers
        // share the prompt's keys and values, which for the long one fill more than a block of the cache.
        let long: Vec<u32> = case.sequences.concat().into_iter().take(case.config.context - 16).collect();
        let [first, second] = [case.sequences[0].as_slice(), case.sequences[1].as_slice()];
        let prompts = [first, &second[..5], second, first, &long, &long];
        let sampling = Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, max_new_tokens: 16, stop_ids: vec![] };
        let draws = Draws { seed: 0, purpose: "test", step: 0 };
        let completions = generate(&decoder, &prompts, &sampling, draws, |_, _| true);
        if let Ok(tensor) = view.tensor("greedy_ids") {
            let width = tensor.shape()[1];
            let greedy = integers(&view, "greedy_ids");
            for (row, completion) in [(0, &completions[0]), (1, &completions[2])] {
                let expected: Vec<u32> =
                    greedy[row * width + case.sequences[row].len()..(row + 1) * width].iter().map(|id| *id as u32).collect();
                assert_eq!(completion.ids, expected, "{name} row {row}");
            }
        }
        assert!(long.len() > 16 && completions[3] == completions[0] && completions[5] == completions[4]);
        for (prompt, completion) in prompts.iter().zip(&completions) {
            let whole = [prompt, completion.ids.as_slice()].concat();
            let batch = PackedBatch::new([whole.as_slice()]);
            let rows: Arc<[u32]> = (prompt.len() as u32 - 1..whole.len() as u32 - 1).collect();
            let targets: Arc<[u32]> = completion.ids.clone().into();
            let full = decoder.evaluate(&batch, |head| head.token_stats(TokenTargets { rows, targets, scale: 1.0 }).logprobs);
            close(name, &completion.logprobs, &parameters::host(&full), 0.0, 1e-4);
        }
    }
}

/// Stop tokens end an answer and belong to it; the context's end does too; draws repeat with their coordinates.
#[test]
fn answers_end_where_they_should() {
    let (case, weights) = case("llama_tiny_gqa", "llama_tiny_gqa");
    let decoder = load(&SafeTensors::deserialize(&weights).unwrap(), case.config.clone());
    let prompts = [case.sequences[0].as_slice(), case.sequences[1].as_slice()];
    let draws = |seed| Draws { seed, purpose: "test", step: 0 };
    let long = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, max_new_tokens: 10_000, stop_ids: vec![] };
    let first = generate(&decoder, &prompts, &long, draws(1), |_, _| true);
    for (prompt, completion) in prompts.iter().zip(&first) {
        // The last token needs no position of its own.
        assert_eq!(prompt.len() + completion.ids.len(), case.config.context + 1);
        assert!(!completion.ended);
    }
    assert_eq!(first, generate(&decoder, &prompts, &long, draws(1), |_, _| true));
    assert_ne!(first, generate(&decoder, &prompts, &long, draws(2), |_, _| true));
    let stop = first[0].ids[3];
    let at = first[0].ids.iter().position(|id| *id == stop).unwrap();
    let stopping = Sampling { stop_ids: vec![stop], ..long };
    let stopped = generate(&decoder, &prompts, &stopping, draws(1), |_, _| true);
    assert!(stopped[0].ended);
    assert_eq!(stopped[0].ids, first[0].ids[..=at], "the stop token belongs to the answer");
    let mut seen = 0;
    generate(&decoder, &prompts, &stopping, draws(1), |_, _| {
        seen += 1;
        seen < 4
    });
    assert!(seen <= 5, "a reader can stop everything");
}

/// One batch of eight sequences and two of four, added: the same gradients within 1e-5.
#[test]
fn accumulated_micro_batches_agree_with_the_whole_batch() {
    let (case, weights) = case("llama_tiny_gqa", "llama_tiny_gqa");
    let decoder = load(&SafeTensors::deserialize(&weights).unwrap(), case.config.clone());
    let sequences: Vec<Vec<u32>> = (0..8).map(|i| case.sequences[i % 2].iter().map(|id| (id + i as u32) % 97).collect()).collect();
    let run = |groups: &[&[Vec<u32>]]| {
        let mut sums = rlflow_model::Gradients::new(decoder.parameters().specs().len());
        for group in groups {
            let batch = PackedBatch::new(group.iter().map(Vec::as_slice));
            let rows: Arc<[u32]> = (0..batch.tokens() as u32).filter(|row| !(row + 1).is_multiple_of(12)).collect();
            let targets: Arc<[u32]> = rows.iter().map(|row| batch.ids[*row as usize + 1]).collect();
            let targets = TokenTargets { rows, targets, scale: 1.0 };
            decoder.backward(
                &batch,
                false,
                |head| (head.token_stats(targets.clone()).logprobs.sum(), ()),
                |slot, gradient| sums.add(slot, gradient),
            );
        }
        (0..decoder.parameters().specs().len()).map(|slot| parameters::host(sums.get(slot).unwrap())).collect::<Vec<_>>()
    };
    let (whole, split) = (run(&[&sequences]), run(&[&sequences[..4], &sequences[4..]]));
    for (slot, (whole, split)) in whole.iter().zip(&split).enumerate() {
        close(&decoder.parameters().specs()[slot].name, split, whole, 1e-5, 1e-6);
    }
}
