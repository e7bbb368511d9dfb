//! What a forward and backward pass holds at most, counted by the allocator. One test: nothing else may allocate beside it.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicUsize, Ordering},
};

use burn::tensor::Device;
use rlflow_api::{Architecture, ModelConfig, Positions};
use rlflow_kernels::matmul::Arithmetic;
use rlflow_model::{Decoder, Head, LoraSettings, PackedBatch, Parameters, TokenTargets, lora, parameters};

/// The system's allocator, counting bytes.
struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is the system allocator's; counters are beside it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let held = HELD.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(held, Ordering::Relaxed);
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Ordering::Relaxed);
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn held() -> usize {
    HELD.load(Ordering::Relaxed)
}

/// Bytes that `work` holds at most beyond what was held before it, and what it gives.
fn peak<T>(work: impl FnOnce() -> T) -> (usize, T) {
    let before = held();
    PEAK.store(before, Ordering::Relaxed);
    let result = work();
    (PEAK.load(Ordering::Relaxed) - before, result)
}

fn config(vocab_size: usize, hidden_size: usize, layers: usize, tie_embeddings: bool) -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Llama,
        vocab_size,
        hidden_size,
        intermediate_size: 2 * hidden_size,
        layers,
        heads: 4,
        kv_heads: 2,
        head_dim: hidden_size / 4,
        context: 512,
        positions: Positions::Rope,
        rope_theta: 10_000.0,
        rope_scaling: None,
        norm_eps: 1e-5,
        tie_embeddings,
        style: Architecture::Llama.style(),
    }
}

fn decoder(config: &ModelConfig) -> Decoder {
    let device = Device::flex();
    let fresh = parameters::initial(config, 1, 0.02);
    let Ok(parameters) =
        Parameters::from_data(parameters::specs(config, Head::Language).0, &device, |spec| Ok::<_, std::convert::Infallible>(fresh(spec)));
    Decoder::new(config.clone(), Head::Language, parameters, device)
}

/// Four sequences of `length` tokens, each of which predicts the next.
fn batch(vocab: usize, length: usize) -> (PackedBatch, TokenTargets) {
    let ids: Vec<u32> = (0..4 * length).map(|at| (at * 7 % vocab) as u32).collect();
    let rows: Vec<u32> = (0..ids.len()).filter(|row| (row + 1) % length != 0).map(|row| row as u32).collect();
    let targets: Vec<u32> = rows.iter().map(|row| ids[*row as usize + 1]).collect();
    (PackedBatch::new(ids.chunks(length)), TokenTargets { rows: rows.into(), targets: targets.into(), scale: 1.0 })
}

/// A training pass with the given decoder; returns the number of gradients.
fn train(decoder: &Decoder, batch: &PackedBatch, targets: &TokenTargets) -> usize {
    let mut gradients = Vec::new();
    decoder.backward(
        batch,
        false,
        |head| (head.token_stats(targets.clone()).logprobs.sum().neg(), ()),
        |slot, gradient| gradients.extend(gradient.map(|gradient| (slot, gradient))),
    );
    gradients.len()
}

#[test]
fn logits_are_never_held_whole_and_adapters_need_no_second_base() {
    let vocab = 32_768;
    let (batch, targets) = batch(vocab, 512);
    // A first pass starts threads and fills their buffers.
    let (small, next) = self::batch(512, 512);
    train(&decoder(&config(512, 32, 1, true)), &small, &next);
    let logits = 4 * targets.rows.len() * vocab;
    for (tied, arithmetic) in [(true, Arithmetic::F32), (false, Arithmetic::F32), (false, Arithmetic::Bf16)] {
        let config = config(vocab, 32, 1, tied);
        let mut decoder = decoder(&config);
        decoder.set_arithmetic(arithmetic);
        let weights = 4 * decoder.parameters().count();
        let (training, _) = peak(|| train(&decoder, &batch, &targets));
        let (evaluating, _) = peak(|| drop(decoder.evaluate(&batch, |head| head.token_stats(targets.clone()))));
        assert!(logits > 250_000_000, "the logits of the whole batch would take {logits} bytes");
        // Gradients are as large as the weights; bfloat16 copies of operands come to no more.
        assert!(training < 4 * weights + logits / 16, "tied {tied}, {arithmetic:?}: training held {training} bytes");
        assert!(evaluating < 2 * weights + logits / 16, "tied {tied}, {arithmetic:?}: evaluating held {evaluating} bytes");
    }

    // An adapter on all projections: neither a second copy of the base for a reference without it, nor gradients of the base.
    let config = config(4_096, 512, 2, true);
    let (batch, targets) = self::batch(4_096, 32);
    let base = decoder(&config);
    let weights = 4 * base.parameters().count();
    let (full, gradients) = peak(|| train(&base, &batch, &targets));
    assert_eq!(gradients, base.parameters().specs().len());
    let before = held();
    let settings = LoraSettings { target_modules: lora::TargetModules::ALL, ..LoraSettings::default() };
    let mut adapted = base.clone();
    adapted.adapt(&settings, |spec| lora::initial(spec, 1));
    let reference = adapted.without_adapter();
    let added = held() - before;
    assert!(added < weights / 4, "an adapter and a reference took {added} bytes beside a base of {weights}");
    let (with_adapter, gradients) = peak(|| train(&adapted, &batch, &targets));
    assert_eq!(gradients, 2 * 7 * 2, "two factors for each projection of each block");
    assert!(with_adapter + weights / 2 < full, "{with_adapter} bytes against {full} of full training");
    // B is zero: the model is the base to the bit.
    let logprobs = |decoder: &Decoder| parameters::host(&decoder.evaluate(&batch, |head| head.token_stats(targets.clone()).logprobs));
    assert_eq!(logprobs(&adapted), logprobs(&reference));
}
