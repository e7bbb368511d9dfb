//! The operations of a decoder on more rows than a block has and more columns than a part: against the same in float64, whose
//! gradients are differences of its values, and with other numbers of threads.

use half::bf16;
use rlflow_kernels::{
    Affine, AttentionParts, AttentionShape, LowRank, MlpParts, Positional, Projection, SequenceLayout, Weight,
    attention::Heads,
    attention_block,
    matmul::Arithmetic,
    mlp_block,
    rope::RopeTable,
    token_head::{self, TokenStatistics},
};

const EPS: f32 = 1e-5;
/// No multiples of what kernels compute at once.
const LENGTHS: [usize; 3] = [67, 1, 63];
const TOKENS: usize = 131;
const HIDDEN: usize = 72;
const WIDTH: usize = 424;
const HEADS: Heads = Heads { heads: 3, kv_heads: 3, head_dim: 24 };
const VOCAB: usize = 1100;

fn values(len: usize, seed: u64, scale: f64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let draw = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // Exact in f32, so that both sides see the same numbers.
        f64::from(((state >> 40) as f32 / (1 << 24) as f32 - 0.5) * scale as f32)
    };
    (0..len).map(draw).collect()
}

fn narrow(wide: &[f64]) -> Vec<f32> {
    wide.iter().map(|value| *value as f32).collect()
}

/// `x weight^T`, `[rows, out]`.
fn project(x: &[f64], weight: &[f64], columns: usize) -> Vec<f64> {
    let dot = |row: &[f64], line: &[f64]| row.iter().zip(line).map(|(a, b)| a * b).sum::<f64>();
    x.chunks(columns).flat_map(|row| weight.chunks(columns).map(move |line| dot(row, line))).collect()
}

fn add(a: Vec<f64>, b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

fn rms_norm(x: &[f64], weight: &[f64]) -> Vec<f64> {
    let norm = |row: &[f64]| {
        let inverse = (row.iter().map(|value| value * value).sum::<f64>() / row.len() as f64 + f64::from(EPS)).sqrt().recip();
        row.iter().zip(weight).map(|(value, weight)| value * inverse * weight).collect::<Vec<_>>()
    };
    x.chunks(weight.len()).flat_map(norm).collect()
}

/// A projection with a low-rank addition: inputs `weight`, `a`, `b`.
fn adapted(x: &[f64], [weight, a, b]: [&[f64]; 3], columns: usize, scale: f64) -> Vec<f64> {
    let plain = project(x, weight, columns);
    if a.is_empty() {
        return plain;
    }
    let down: Vec<f64> = project(x, a, columns).iter().map(|value| value * scale).collect();
    add(plain, &project(&down, b, a.len() / columns))
}

/// What an operation computes, in float64, of its inputs.
type Exact = Box<dyn Fn(&[Vec<f64>]) -> Vec<f64>>;

/// Result and gradients of the inputs (in their order) for a gradient of the result.
type Kernel = Box<dyn Fn(&[Held], &[f32], Arithmetic) -> (Vec<f32>, Vec<Vec<f32>>) + Sync>;

struct Case {
    name: &'static str,
    inputs: Vec<Vec<f64>>,
    /// Which inputs are projections' weights.
    weights: &'static [usize],
    exact: Exact,
    kernel: Kernel,
}

/// An input, which a model may hold in bfloat16.
struct Held {
    wide: Vec<f32>,
    narrow: Option<Vec<bf16>>,
}

impl Held {
    fn weight(&self) -> Weight<'_> {
        self.narrow.as_deref().map_or(Weight::F32(&self.wide), Weight::Bf16)
    }
}

fn held(inputs: &[Vec<f64>]) -> Vec<Held> {
    inputs.iter().map(|input| Held { wide: narrow(input), narrow: None }).collect()
}

fn mlp(gated: bool, rank: usize) -> Case {
    let (down, up) = (WIDTH * HIDDEN, WIDTH * HIDDEN);
    // x, norm, then weight, a, b of gate, up and down.
    let mut inputs = vec![values(TOKENS * HIDDEN, 1, 2.0), values(HIDDEN, 2, 2.0)];
    for (seed, [weight, a, b]) in [
        [if gated { up } else { 0 }, if gated { rank * HIDDEN } else { 0 }, if gated { WIDTH * rank } else { 0 }],
        [up, rank * HIDDEN, WIDTH * rank],
        [down, rank * WIDTH, HIDDEN * rank],
    ]
    .into_iter()
    .enumerate()
    {
        let seed = 10 * (seed as u64 + 1);
        inputs.extend([values(weight, seed, 0.5), values(a, seed + 1, 0.5), values(b, seed + 2, 0.5)]);
    }
    let exact = move |inputs: &[Vec<f64>]| {
        let part = |first: usize| [&inputs[first][..], &inputs[first + 1], &inputs[first + 2]];
        let normed = rms_norm(&inputs[0], &inputs[1]);
        let up = adapted(&normed, part(5), HIDDEN, 0.5);
        let activated: Vec<f64> = if gated {
            let gate = adapted(&normed, part(2), HIDDEN, 0.5);
            gate.iter().zip(&up).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect()
        } else {
            let scale = (2.0 / std::f64::consts::PI).sqrt();
            up.iter().map(|x| 0.5 * x * (1.0 + (scale * (x + 0.044_715 * x * x * x)).tanh())).collect()
        };
        add(adapted(&activated, part(8), WIDTH, 0.5), &inputs[0])
    };
    let kernel = move |inputs: &[Held], dy: &[f32], arithmetic: Arithmetic| {
        let part = |first: usize| affine(inputs, first);
        let weights = MlpParts { norm: Affine::plain(inputs[1].weight()), gate: gated.then(|| part(2)), up: part(5), down: part(8) };
        let (y, saved) = mlp_block::forward(&inputs[0].wide, weights, EPS, arithmetic, None);
        let grads = mlp_block::backward(dy, &inputs[0].wide, &saved, weights, EPS, arithmetic, None, false);
        let empty = || Affine::plain(Vec::new());
        let parts = [grads.weights.gate.unwrap_or_else(empty), grads.weights.up, grads.weights.down];
        (y, [grads.x, grads.weights.norm.weight].into_iter().chain(parts.into_iter().flat_map(gradients)).collect())
    };
    let name = if rank > 0 { "feed-forward with adapters" } else { "feed-forward" };
    Case { name, inputs, weights: &[2, 5, 8], exact: Box::new(exact), kernel: Box::new(kernel) }
}

fn affine(inputs: &[Held], first: usize) -> Affine<Weight<'_>> {
    Affine::of_slices(inputs[first].weight(), &[], [&inputs[first + 1].wide, &inputs[first + 2].wide], 0.5)
}

fn gradients(part: Affine<Vec<f32>>) -> [Vec<f32>; 3] {
    let LowRank { a, b, .. } = part.low_rank.unwrap_or(LowRank { a: Vec::new(), b: Vec::new(), scale: 1.0 });
    [part.weight, a, b]
}

fn attention(rank: usize) -> Case {
    let width = HEADS.query_width();
    let mut inputs = vec![values(TOKENS * HIDDEN, 1, 2.0), values(HIDDEN, 2, 2.0)];
    for seed in [10, 20, 30, 40] {
        inputs.extend([values(width * HIDDEN, seed, 0.5), values(rank * HIDDEN, seed + 1, 0.5), values(width * rank, seed + 2, 0.5)]);
    }
    let exact = move |inputs: &[Vec<f64>]| {
        let part = |first: usize| [&inputs[first][..], &inputs[first + 1], &inputs[first + 2]];
        let normed = rms_norm(&inputs[0], &inputs[1]);
        let [q, k, v] = [2, 5, 8].map(|first| adapted(&normed, part(first), HIDDEN, 0.5));
        let (mut out, mut start) = (vec![0.0; TOKENS * width], 0);
        for length in LENGTHS {
            for head in 0..HEADS.heads {
                let row = |of: &[f64], at: usize| of[(start + at) * width + head * HEADS.head_dim..][..HEADS.head_dim].to_vec();
                for at in 0..length {
                    let dot = |a: Vec<f64>, b: Vec<f64>| a.iter().zip(&b).map(|(a, b)| a * b).sum::<f64>();
                    let scores: Vec<f64> = (0..=at)
                        .map(|key| (dot(rotated(row(&q, at), at), rotated(row(&k, key), key)) / (HEADS.head_dim as f64).sqrt()).exp())
                        .collect();
                    let total: f64 = scores.iter().sum();
                    for (key, score) in scores.iter().enumerate() {
                        for (column, value) in row(&v, key).into_iter().enumerate() {
                            out[(start + at) * width + head * HEADS.head_dim + column] += score / total * value;
                        }
                    }
                }
            }
            start += length;
        }
        add(adapted(&out, part(11), width, 0.5), &inputs[0])
    };
    let kernel = |inputs: &[Held], dy: &[f32], arithmetic: Arithmetic| {
        let part = |first: usize| affine(inputs, first);
        let norm = Affine::plain(inputs[1].weight());
        let weights = AttentionParts { norm, q: part(2), k: part(5), v: part(8), o: part(11), q_norm: None, k_norm: None };
        let shape = AttentionShape { hidden: HIDDEN, heads: HEADS, eps: EPS, window: None, arithmetic };
        let (rope, layout) = (RopeTable::new(128, HEADS.head_dim, 10_000.0, None), SequenceLayout::from_lengths(LENGTHS));
        let (y, saved) = attention_block::forward(&inputs[0].wide, weights, Positional::Rope(&rope), shape, &layout, None);
        let grads = attention_block::backward(dy, &inputs[0].wide, &saved, weights, Positional::Rope(&rope), shape, &layout, None, false);
        let parts = [grads.weights.q, grads.weights.k, grads.weights.v, grads.weights.o];
        (y, [grads.x, grads.weights.norm.weight].into_iter().chain(parts.into_iter().flat_map(gradients)).collect())
    };
    let name = if rank > 0 { "attention with adapters" } else { "attention" };
    Case { name, inputs, weights: &[2, 5, 8, 11], exact: Box::new(exact), kernel: Box::new(kernel) }
}

/// Rotary embedding in the half-split layout.
fn rotated(row: Vec<f64>, position: usize) -> Vec<f64> {
    let half = row.len() / 2;
    let turned = |column: usize| {
        let pair = column % half;
        let angle = position as f64 * 10_000_f64.powf(-2.0 * pair as f64 / row.len() as f64);
        let other = if column < half { -row[column + half] } else { row[column - half] };
        row[column] * angle.cos() + other * angle.sin()
    };
    (0..row.len()).map(turned).collect()
}

fn head() -> Case {
    let targets: Vec<u32> = (0..TOKENS).map(|row| (row * 389 % VOCAB) as u32).collect();
    let inputs = vec![values(TOKENS * HIDDEN, 1, 2.0), values(VOCAB * HIDDEN, 2, 1.0)];
    let of = targets.clone();
    let exact = move |inputs: &[Vec<f64>]| {
        let logits = project(&inputs[0], &inputs[1], HIDDEN);
        let statistics = logits.chunks(VOCAB).zip(&of).map(|(logits, target)| {
            let total: f64 = logits.iter().map(|logit| logit.exp()).sum();
            let entropy = total.ln() - logits.iter().map(|logit| logit.exp() / total * logit).sum::<f64>();
            (logits[*target as usize] - total.ln(), entropy)
        });
        let (logprobs, entropies): (Vec<f64>, Vec<f64>) = statistics.unzip();
        [logprobs, entropies].concat()
    };
    let kernel = move |inputs: &[Held], dy: &[f32], arithmetic: Arithmetic| {
        let mut results = [(); 5].map(|()| vec![0.0; TOKENS]);
        let [logprobs, entropies, lse, correct, mean_logits] = &mut results;
        let (hidden, weight) = (&inputs[0].wide, inputs[1].weight());
        let statistics = TokenStatistics { logprobs, entropies, log_sum_exp: lse, correct, mean_logits };
        token_head::forward(statistics, hidden, weight, &targets, 1.0, arithmetic);
        let [_, entropies, lse, ..] = &results;
        let (mut dhidden, mut dweight) = (vec![f32::NAN; hidden.len()], vec![0.0; weight.len()]);
        let (dlogprobs, dentropies) = dy.split_at(TOKENS);
        let dweight_to = Some(&mut dweight[..]);
        token_head::backward(&mut dhidden, dweight_to, dlogprobs, dentropies, entropies, lse, hidden, weight, &targets, 1.0, arithmetic);
        let [logprobs, entropies, ..] = results;
        ([logprobs, entropies].concat(), vec![dhidden, dweight])
    };
    Case { name: "head", inputs, weights: &[1], exact: Box::new(exact), kernel: Box::new(kernel) }
}

fn distance(a: &[f64], b: &[f64]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
    norm(&mut a.iter().zip(b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied())
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|value| f64::from(*value)).collect()
}

#[test]
fn operations_and_their_gradients_are_those_of_float64() {
    for case in [mlp(true, 0), mlp(true, 3), mlp(false, 0), attention(0), attention(3), head()] {
        let inputs = held(&case.inputs);
        let expected = (case.exact)(&case.inputs);
        let upstream = values(expected.len(), 99, 2.0);
        let (result, grads) = (case.kernel)(&inputs, &narrow(&upstream), Arithmetic::F32);
        let off = distance(&wide(&result), &expected);
        assert!(off < 1e-6, "{}: {off}", case.name);
        for (index, (grad, input)) in grads.iter().zip(&case.inputs).enumerate().filter(|(_, (_, input))| !input.is_empty()) {
            // Along a direction the gradient is a difference of values; some change every element, some every 89th.
            for stripe in [1, 89] {
                let mut direction = values(input.len(), 7 + index as u64, 2.0);
                direction.iter_mut().enumerate().filter(|(at, _)| !at.is_multiple_of(stripe)).for_each(|(_, along)| *along = 0.0);
                let step = 1e-5;
                let moved = |by: f64| {
                    let mut inputs = case.inputs.clone();
                    inputs[index].iter_mut().zip(&direction).for_each(|(value, along)| *value += by * along);
                    (case.exact)(&inputs).iter().zip(&upstream).map(|(result, upstream)| result * upstream).sum::<f64>()
                };
                let slope = (moved(step) - moved(-step)) / (2.0 * step);
                let terms: Vec<f64> = grad.iter().zip(&direction).map(|(grad, along)| f64::from(*grad) * along).collect();
                // The error of a sum of many rounded terms, against the size that such a sum has.
                let size = terms.iter().map(|term| term * term).sum::<f64>().sqrt();
                let off = (terms.iter().sum::<f64>() - slope).abs() / size;
                assert!(off < 1e-5, "{}, gradient {index}: {} for {slope}, {off}", case.name, terms.iter().sum::<f64>());
            }
        }
        let (rounded, rounded_grads) = (case.kernel)(&inputs, &narrow(&upstream), Arithmetic::Bf16);
        let off = distance(&wide(&rounded), &expected);
        assert!(off > 1e-6 && off < 1e-2, "{} in bfloat16: {off}", case.name);
        for (index, (rounded, grad)) in rounded_grads.iter().zip(&grads).enumerate().filter(|(_, (_, grad))| !grad.is_empty()) {
            let off = distance(&wide(rounded), &wide(grad));
            assert!(off > 1e-6 && off < 2e-2, "{} in bfloat16, gradient {index}: {off}", case.name);
        }
    }
}

/// The most probable token and the mean of the logits are found over all parts of the vocabulary.
#[test]
fn the_head_tells_what_is_most_probable() {
    let (hidden, weight) = (values(TOKENS * HIDDEN, 1, 2.0), values(VOCAB * HIDDEN, 2, 1.0));
    let logits = project(&hidden, &weight, HIDDEN);
    let rows = || logits.chunks(VOCAB);
    let best = rows().map(|row| row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0 as u32);
    // Every third row asks for another token than the most probable one.
    let targets: Vec<u32> = best.enumerate().map(|(row, best)| if row % 3 == 0 { (best + 1) % VOCAB as u32 } else { best }).collect();
    assert!(targets.iter().any(|target| *target > 1024), "no target in the second part of the vocabulary");
    let mut results = [(); 5].map(|()| vec![0.0; TOKENS]);
    let [logprobs, entropies, log_sum_exp, correct, mean_logits] = &mut results;
    let statistics = TokenStatistics { logprobs, entropies, log_sum_exp, correct, mean_logits };
    token_head::forward(statistics, &narrow(&hidden), Weight::F32(&narrow(&weight)), &targets, 0.5, Arithmetic::F32);
    let expected: Vec<f32> = (0..TOKENS).map(|row| f32::from(row % 3 != 0)).collect();
    assert_eq!(*correct, expected);
    let means: Vec<f64> = rows().map(|row| 0.5 * row.iter().sum::<f64>() / VOCAB as f64).collect();
    let off = distance(&wide(mean_logits), &means);
    assert!(off < 1e-5, "{off}");
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    for case in [mlp(true, 0), mlp(true, 3), attention(0), head()] {
        let inputs = held(&case.inputs);
        let len = (case.exact)(&case.inputs).len();
        let upstream = narrow(&values(len, 99, 2.0));
        for arithmetic in [Arithmetic::F32, Arithmetic::Bf16] {
            let with = |threads: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| (case.kernel)(&inputs, &upstream, arithmetic))
            };
            assert!(with(1) == with(3), "{} in {arithmetic:?}", case.name);
        }
    }
}

/// A weight in bfloat16 is read as what it is widened to, by units that take it as it is and by those that do not.
#[test]
fn weights_in_bfloat16_are_what_they_are_widened_to() {
    for case in [mlp(true, 0), mlp(false, 3), attention(0), attention(3), head()] {
        let mut inputs = held(&case.inputs);
        for at in case.weights {
            let rounded: Vec<bf16> = inputs[*at].wide.iter().map(|value| bf16::from_f32(*value)).collect();
            inputs[*at] = Held { wide: rounded.iter().map(|value| value.to_f32()).collect(), narrow: Some(rounded) };
        }
        let upstream = narrow(&values((case.exact)(&case.inputs).len(), 99, 2.0));
        for arithmetic in [Arithmetic::F32, Arithmetic::Bf16] {
            let as_held = (case.kernel)(&inputs, &upstream, arithmetic);
            let widened: Vec<Held> = inputs.iter().map(|input| Held { wide: input.wide.clone(), narrow: None }).collect();
            assert!(as_held == (case.kernel)(&widened, &upstream, arithmetic), "{} in {arithmetic:?}", case.name);
        }
    }
}

/// Adapters that add nothing leave every bit as it is: a fresh adapter's reference is the base.
#[test]
fn adapters_of_zeros_change_no_bit() {
    for (plain, mut adapted) in [(mlp(true, 0), mlp(true, 3)), (attention(0), attention(3))] {
        for index in (4..adapted.inputs.len()).step_by(3) {
            adapted.inputs[index].fill(0.0);
        }
        let result = |case: &Case, arithmetic| {
            let inputs = held(&case.inputs);
            (case.kernel)(&inputs, &vec![1.0; TOKENS * HIDDEN], arithmetic).0
        };
        for arithmetic in [Arithmetic::F32, Arithmetic::Bf16] {
            assert!(result(&plain, arithmetic) == result(&adapted, arithmetic), "{} in {arithmetic:?}", plain.name);
        }
    }
}

/// What is dropped is dropped in both directions, wherever blocks and parts are cut.
#[test]
fn dropout_of_adapters_is_a_change_of_their_input() {
    let case = mlp(true, 3);
    let inputs = held(&case.inputs);
    let part = |first: usize| affine(&inputs, first);
    let weights = MlpParts { norm: Affine::plain(inputs[1].weight()), gate: Some(part(2)), up: part(5), down: part(8) };
    let kept = |element: usize| if element.is_multiple_of(3) { 0.0 } else { 1.5 };
    let drop = |projection: Projection, rows: &mut [f32]| {
        if projection == Projection::Down {
            rows.iter_mut().enumerate().for_each(|(element, value)| *value *= kept(element));
        }
    };
    let (y, _) = mlp_block::forward(&inputs[0].wide, weights, EPS, Arithmetic::F32, Some(&drop));
    // The same by hand: y without down's addition, and the addition of what is left of its input.
    let normed = rms_norm(&case.inputs[0], &case.inputs[1]);
    let of = |first: usize| adapted(&normed, [&case.inputs[first], &case.inputs[first + 1], &case.inputs[first + 2]], HIDDEN, 0.5);
    let activated: Vec<f64> = of(2).iter().zip(of(5)).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect();
    let left: Vec<f64> = activated.iter().enumerate().map(|(element, value)| value * f64::from(kept(element)) * 0.5).collect();
    let addition = project(&project(&left, &case.inputs[9], WIDTH), &case.inputs[10], 3);
    let expected = add(add(project(&activated, &case.inputs[8], WIDTH), &addition), &case.inputs[0]);
    let off = distance(&wide(&y), &expected);
    assert!(off < 1e-6, "{off}");
}
