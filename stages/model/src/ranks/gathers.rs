//! When a model of which ranks hold shares asks for its weights: counted by a rank that is alone.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
        mpsc::channel,
    },
};

use burn::tensor::{Device, Tensor, TensorData};
use rlflow_api::{Architecture, BlockStyle, ModelConfig, Positions};

use super::{Collective, Pending};
use crate::{
    Decoder, Draws, Head, PackedBatch, Parameters, Sampling, TokenTargets,
    generate::generate,
    parameters::{initial, specs},
};

/// Blocks of the model.
const LAYERS: usize = 3;
/// Weights of a block: two norms, four projections of attention, three of the inner layer.
const OF_BLOCK: usize = 9;

/// The only rank, which holds all of every weight and counts how it is asked for them.
#[derive(Debug, Default)]
struct Alone {
    /// Weights that are waited for.
    at_once: AtomicUsize,
    /// Weights that are on their way while something else is computed.
    ahead: AtomicUsize,
}

impl Alone {
    /// Both counts, from 0 again.
    fn counted(&self) -> (usize, usize) {
        (self.at_once.swap(0, Relaxed), self.ahead.swap(0, Relaxed))
    }
}

impl Collective for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn ranks(&self) -> usize {
        1
    }

    fn reduce_scatter(&self, _: Option<Tensor<2>>, part: Option<Tensor<2>>, _: &[Range<usize>]) -> Option<Tensor<2>> {
        part
    }

    fn all_reduce(&self, _: Option<Tensor<2>>, part: Option<Tensor<2>>) -> Option<Tensor<2>> {
        part
    }

    fn all_gather(&self, piece: Tensor<2>) -> Vec<Tensor<2>> {
        self.at_once.fetch_add(1, Relaxed);
        vec![piece]
    }

    fn start_all_gather(&self, piece: Tensor<2>) -> Pending {
        self.ahead.fetch_add(1, Relaxed);
        let (answer, pieces) = channel();
        answer.send(Ok(vec![piece])).unwrap();
        Pending::later(pieces)
    }

    fn all_gather_values(&self, values: Vec<f64>) -> Vec<Vec<f64>> {
        vec![values]
    }

    fn broadcast(&self, _: usize, value: Option<Tensor<2>>) -> Option<Tensor<2>> {
        value
    }

    fn barrier(&self) {}

    fn abort(&self, _: &str) {}
}

fn decoder(world: Arc<dyn Collective>) -> Decoder {
    let config = ModelConfig {
        architecture: Architecture::Llama,
        vocab_size: 11,
        hidden_size: 8,
        intermediate_size: 12,
        layers: LAYERS,
        heads: 2,
        kv_heads: 1,
        head_dim: 4,
        context: 16,
        positions: Positions::Rope,
        rope_theta: 10_000.0,
        rope_scaling: None,
        norm_eps: 1e-5,
        tie_embeddings: false,
        style: BlockStyle::default(),
    };
    let fresh = initial(&config, 1, 0.02);
    let specs = specs(&config, Head::Language).0;
    let share = |values: Vec<f32>| {
        let dims = [1, values.len()];
        Tensor::<2>::from_data(TensorData::new(values, dims), &Device::flex())
    };
    let shares = specs.iter().map(|spec| share(fresh(spec))).collect();
    Decoder::new(config, Head::Language, Parameters::from_tensors(specs, shares, Some(world)), Device::flex())
}

/// Of every pass through the blocks, forwards, backwards and while answers are sampled, only the first block's weights are waited for;
/// sampling from a copy gathers each weight once.
#[test]
fn weights_of_the_next_block_are_on_their_way() {
    let world = Arc::new(Alone::default());
    let decoder = decoder(world.clone());
    let ids = [1_u32, 2, 3, 4];
    let batch = PackedBatch::new([ids.as_slice()]);
    decoder.evaluate(&batch, |_| ());
    // Beside the first block: embedding, last norm, output projection.
    assert_eq!(world.counted(), (OF_BLOCK + 3, OF_BLOCK * (LAYERS - 1)));

    let targets = TokenTargets { rows: vec![0, 1, 2].into(), targets: vec![2, 3, 4].into(), scale: 1.0 };
    let mut gradients = 0;
    let loss = |head: &crate::HeadView<'_>| (head.token_stats(targets.clone()).logprobs.sum().neg(), ());
    decoder.backward(&batch, false, loss, |_, gradient| gradients += usize::from(gradient.is_some()));
    assert_eq!(gradients, decoder.parameters().specs().len());
    assert_eq!(world.counted().1, 2 * OF_BLOCK * (LAYERS - 1));

    let sampling = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, max_new_tokens: 3, stop_ids: vec![] };
    let draws = || Draws { seed: 1, purpose: "gathers", step: 0 };
    let by_block = generate(&decoder, &[ids.as_slice()], &sampling, draws(), |_, _| true);
    // The prompt, and two of the three tokens.
    assert_eq!(world.counted(), (3 * OF_BLOCK + 3, 3 * OF_BLOCK * (LAYERS - 1)));
    let once = generate(&decoder.whole(), &[ids.as_slice()], &sampling, draws(), |_, _| true);
    assert_eq!(world.counted(), (decoder.parameters().specs().len(), 0));
    assert_eq!(by_block, once);
}
