//! Where a training step's time goes: every operation by itself in the step's shapes, and what its matrix products
//! would take if nothing else cost anything.

use std::{convert::Infallible, hint::black_box, time::Instant};

use burn::tensor::Device;
use rlflow_kernels::{
    Affine, AttentionParts, AttentionShape, MlpParts, Positional, SequenceLayout, Weight,
    attention::Heads,
    attention_block, embedding,
    matmul::{Arithmetic, MatrixRef},
    mlp_block, norm,
    rope::RopeTable,
    token_head::{self, TokenStatistics},
};
use rlflow_model::{Gradients, Head, Optimizer, OptimizerSettings, ParameterSpec, Parameters, parameters};

use super::{
    size::{Size, random_ids},
    turns::median,
};

/// An operation of a training step.
#[derive(Debug, Clone)]
pub struct Operation {
    /// What it is.
    pub name: &'static str,
    /// How often a step has it.
    pub times: usize,
    /// Seconds of one forward pass.
    pub forward: f64,
    /// Seconds of one backward pass.
    pub backward: f64,
}

impl Operation {
    /// Seconds per step.
    pub fn seconds(&self) -> f64 {
        self.times as f64 * (self.forward + self.backward)
    }
}

/// Median seconds of `work` over `repeats` runs after one that warms up.
fn time<T>(repeats: usize, mut work: impl FnMut() -> T) -> f64 {
    black_box(work());
    let run = |_| {
        let start = Instant::now();
        black_box(work());
        start.elapsed().as_secs_f64()
    };
    median((0..repeats).map(run).collect())
}

/// Numbers of the size of activations, without a pattern that a cache could use.
fn numbers(count: usize, scale: f32) -> Vec<f32> {
    let mut state = 1u32;
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        ((state >> 8) as f32 / (1 << 24) as f32 - 0.5) * scale
    };
    (0..count).map(next).collect()
}

/// Seconds that the matrix products of a training step take by themselves: forward, gradient of the input and of the
/// weight, for the four projections of attention, the three of the feed-forward layer and the output projection, whose
/// logits are taken as one matrix. The scores of attention are not among them.
pub fn matrix_products(size: &Size, arithmetic: Arithmetic, repeats: usize) -> f64 {
    let (config, tokens) = (&size.config, size.tokens());
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let (query, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    let layers = config.layers;
    let projections = [
        (hidden, query, layers),
        (hidden, kv, 2 * layers),
        (query, hidden, layers),
        (hidden, inner, 2 * layers),
        (inner, hidden, layers),
        (hidden, config.vocab_size, 1),
    ];
    let seconds = |(input, output, times): (usize, usize, usize)| {
        let (x, w, y) = (numbers(tokens * input, 1.0), numbers(input * output, 0.1), numbers(tokens * output, 1.0));
        let (mut dx, mut dw, mut out) = (vec![0.0; x.len()], vec![0.0; w.len()], vec![0.0; y.len()]);
        let (x, w, y) = (MatrixRef::new(&x, tokens, input), MatrixRef::new(&w, output, input), MatrixRef::new(&y, tokens, output));
        let forward = time(repeats, || arithmetic.matmul(&mut out, x, w.t()));
        let input_gradient = time(repeats, || arithmetic.matmul(&mut dx, y, w));
        let weight_gradient = time(repeats, || arithmetic.matmul(&mut dw, y.t(), x));
        times as f64 * (forward + input_gradient + weight_gradient)
    };
    projections.into_iter().map(seconds).sum()
}

/// The operations of a training step, first to last.
pub fn operations(size: &Size, arithmetic: Arithmetic, repeats: usize) -> Vec<Operation> {
    let (config, tokens) = (&size.config, size.tokens());
    let (hidden, vocab, eps) = (config.hidden_size, config.vocab_size, config.norm_eps as f32);
    let layout = SequenceLayout::from_lengths(vec![size.length; size.batch]);
    let ids = random_ids("operations", vocab, 1, tokens).concat();
    let (x, dy) = (numbers(tokens * hidden, 1.0), numbers(tokens * hidden, 1e-3));
    let table = numbers(vocab * hidden, 0.1);
    let ones = vec![1.0; hidden];

    let mut dtable = Vec::new();
    let embed = Operation {
        name: "embedding",
        times: 1,
        forward: time(repeats, || embedding::embed(Weight::F32(&table), &ids, hidden)),
        // A gradient begins as zeros, which are part of its cost.
        backward: time(repeats, || {
            dtable = vec![0.0; vocab * hidden];
            embedding::embed_backward(&mut dtable, &dy, &ids, hidden);
        }),
    };
    drop(dtable);

    let heads = Heads { heads: config.heads, kv_heads: config.kv_heads, head_dim: config.head_dim };
    let shape = AttentionShape { hidden, heads, eps, window: None, arithmetic };
    let rope = RopeTable::new(config.context, config.head_dim, config.rope_theta, None);
    let [q, k, v, o] =
        [heads.query_width(), heads.kv_width(), heads.kv_width(), heads.query_width()].map(|width| numbers(width * hidden, 0.1));
    let plain = |weight| Affine::plain(weight);
    let weights = AttentionParts {
        norm: plain(ones.as_slice()),
        q: plain(q.as_slice()),
        k: plain(k.as_slice()),
        v: plain(v.as_slice()),
        o: plain(o.as_slice()),
        q_norm: None,
        k_norm: None,
    };
    let weights = weights.map(|weight| Weight::F32(weight));
    let (_, saved) = attention_block::forward(&x, weights, Positional::Rope(&rope), shape, &layout, None);
    let attention = Operation {
        name: "attention half of a block",
        times: config.layers,
        forward: time(repeats, || attention_block::forward(&x, weights, Positional::Rope(&rope), shape, &layout, None)),
        backward: time(repeats, || {
            attention_block::backward(&dy, &x, &saved, weights, Positional::Rope(&rope), shape, &layout, None, false)
        }),
    };
    drop(saved);

    let [gate, up, down] = [(); 3].map(|()| numbers(hidden * config.intermediate_size, 0.1));
    let weights = MlpParts {
        norm: plain(ones.as_slice()),
        gate: Some(plain(gate.as_slice())),
        up: plain(up.as_slice()),
        down: plain(down.as_slice()),
    };
    let weights = weights.map(|weight| Weight::F32(weight));
    let (_, saved) = mlp_block::forward(&x, weights, eps, arithmetic, None);
    let mlp = Operation {
        name: "feed-forward half of a block",
        times: config.layers,
        forward: time(repeats, || mlp_block::forward(&x, weights, eps, arithmetic, None)),
        backward: time(repeats, || mlp_block::backward(&dy, &x, &saved, weights, eps, arithmetic, None, false)),
    };
    drop(saved);

    let (mut normed, mut inverse) = (vec![0.0; tokens * hidden], vec![0.0; tokens]);
    let last_norm = Operation {
        name: "last norm",
        times: 1,
        forward: time(repeats, || norm::norm(&mut normed, &mut inverse, &x, plain(&ones), eps)),
        backward: time(repeats, || norm::norm_backward(&mut vec![0.0; tokens * hidden], &dy, &x, &inverse, plain(&ones))),
    };

    let [mut logprobs, mut entropies, mut log_sum_exp, mut correct, mut mean_logits] = [(); 5].map(|()| vec![0.0; tokens]);
    let dlogprobs = vec![-1.0; tokens];
    let forward = time(repeats, || {
        let statistics = TokenStatistics {
            logprobs: &mut logprobs,
            entropies: &mut entropies,
            log_sum_exp: &mut log_sum_exp,
            correct: &mut correct,
            mean_logits: &mut mean_logits,
        };
        token_head::forward(statistics, &normed, Weight::F32(&table), &ids, 1.0, arithmetic);
    });
    let head = Operation {
        name: "output projection with loss",
        times: 1,
        forward,
        backward: time(repeats, || {
            let (mut dhidden, mut dweight) = (vec![0.0; tokens * hidden], vec![0.0; vocab * hidden]);
            token_head::backward(
                &mut dhidden,
                Some(&mut dweight),
                &dlogprobs,
                &[],
                &entropies,
                &log_sum_exp,
                &normed,
                Weight::F32(&table),
                &ids,
                1.0,
                arithmetic,
            );
        }),
    };

    let device = Device::flex();
    let specs = parameters::specs(config, Head::Language).0;
    let filled = |value: f32| {
        let values = |spec: &ParameterSpec| Ok::<_, Infallible>(vec![value; spec.len()]);
        let Ok(parameters) = Parameters::from_data(specs.clone(), &device, values);
        parameters
    };
    let mut gradients = Gradients::new(specs.len());
    filled(1e-3).tensors().iter().enumerate().for_each(|(slot, gradient)| gradients.add(slot, Some(gradient.clone())));
    let mut weights = filled(0.1);
    let settings = OptimizerSettings { betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1, grad_clip: 1.0 };
    let mut optimizer = Optimizer::new(&weights, settings);
    let update = Operation {
        name: "gradient norm and AdamW",
        times: 1,
        forward: time(repeats, || optimizer.step(&mut weights, &gradients, 1.0, 1e-4)),
        backward: 0.0,
    };
    vec![embed, attention, mlp, last_norm, head, update]
}
