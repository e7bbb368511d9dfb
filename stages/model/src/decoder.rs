//! The decoder: forward without recording, and forward with backward, one autodiff segment per block.
//!
//! A block's graph ends at its own detached input, so that its gradients can be handed over (reduced, sharded, added) as
//! soon as its backward pass is done, and so that it can be computed again instead of kept (`checkpointing`).

use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};
use rlflow_api::{ModelConfig, Positions, RopeScaling};
use rlflow_kernels::{
    Affine, AttentionShape, Positional, SequenceLayout,
    attention::{Heads, alibi_slopes},
    matmul::Arithmetic,
    rope::{FrequencyScaling, RopeTable},
};

use crate::{
    composed,
    dropout::{BlockDropout, DropoutDraws},
    fused::{AttentionContext, MlpContext, TokenTargets, flex},
    ledger::{Held, Purpose, hold},
    lora::{self, LoraSettings},
    optimizer::accumulate,
    parameters::{BlockSlots, Head, Parameters, Slots, specs},
};

/// Tokens of one micro-batch: sequences laid end to end.
#[derive(Debug, Clone)]
pub struct PackedBatch {
    /// Token ids, `[tokens]`.
    pub ids: Arc<[u32]>,
    /// Where sequences start.
    pub layout: Arc<SequenceLayout>,
    /// Which draws dropout makes; without them nothing is dropped.
    pub draws: Option<DropoutDraws>,
}

impl PackedBatch {
    /// From sequences, each of at least one token.
    pub fn new<'a>(sequences: impl IntoIterator<Item = &'a [u32]>) -> Self {
        let mut ids = Vec::new();
        let mut lengths = Vec::new();
        for sequence in sequences {
            ids.extend_from_slice(sequence);
            lengths.push(sequence.len());
        }
        Self { ids: ids.into(), layout: Arc::new(SequenceLayout::from_lengths(lengths)), draws: None }
    }

    /// The same with dropout, where the decoder has any.
    pub fn with_dropout(self, draws: DropoutDraws) -> Self {
        Self { draws: Some(draws), ..self }
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }
}

/// A decoder with its weights on a device.
#[derive(Debug, Clone)]
pub struct Decoder {
    config: ModelConfig,
    head: Head,
    parameters: Parameters,
    slots: Slots,
    device: Device,
    fused: bool,
    rope: Option<Arc<RopeTable>>,
    slopes: Arc<[f32]>,
    arithmetic: Arithmetic,
    /// The adapter that is trained; then everything but it and the scalar head is frozen.
    adapter: Option<Arc<LoraSettings>>,
}

/// The end of a forward pass, on which losses and statistics are built.
pub struct HeadView<'a> {
    decoder: &'a Decoder,
    normed: Tensor<2>,
    lm_head: Option<Tensor<2>>,
    score: Option<Tensor<2>>,
}

/// Log-probabilities of tokens, and what is known of the distributions they were taken from; each `[rows]`. Gradients go through
/// the first two.
pub struct TokenStats {
    /// Natural logarithm of the probability.
    pub logprobs: Tensor<1>,
    /// Entropy in nats.
    pub entropies: Tensor<1>,
    /// 1 where no token is more probable, else 0.
    pub correct: Tensor<1>,
    /// Logits, the mean over the vocabulary.
    pub mean_logits: Tensor<1>,
}

impl HeadView<'_> {
    /// For each of `rows` of the batch, statistics of the prediction of `targets` at that row.
    ///
    /// # Panics
    /// Without a language head.
    pub fn token_stats(&self, targets: TokenTargets) -> TokenStats {
        let count = targets.rows.len();
        let weight = self.lm_head.clone().expect("the model has a language head");
        let head = if self.decoder.fused { flex::token_head } else { composed::token_head };
        let stats = head(self.normed.clone(), weight, targets, self.decoder.arithmetic);
        let row = |index: usize| stats.clone().narrow(0, index, 1).reshape([count]);
        TokenStats { logprobs: row(0), entropies: row(1), correct: row(2), mean_logits: row(3) }
    }

    /// Values of the scalar head at `rows` of the batch, `[rows]`.
    ///
    /// # Panics
    /// Without a scalar head.
    pub fn scores(&self, rows: Arc<[u32]>) -> Tensor<1> {
        let count = rows.len();
        let weight = self.score.clone().expect("the model has a scalar head");
        let head = if self.decoder.fused { flex::score } else { composed::score };
        head(self.normed.clone(), weight, rows).reshape([count])
    }
}

impl Decoder {
    /// A decoder around `parameters`, which must be those of [`specs`] for `config` and `head`.
    pub fn new(config: ModelConfig, head: Head, parameters: Parameters, device: Device) -> Self {
        let (_, slots) = specs(&config, head);
        let rope = (config.positions == Positions::Rope).then(|| {
            let scaling = config.rope_scaling.map(|scaling| match scaling {
                RopeScaling::Linear { factor } => FrequencyScaling::Linear { factor },
                RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                    let original_context = original_max_position_embeddings as f64;
                    FrequencyScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context }
                }
                RopeScaling::Yarn { factor, attention_factor, beta_fast, beta_slow, original_max_position_embeddings, truncate } => {
                    let original_context = original_max_position_embeddings as f64;
                    FrequencyScaling::Yarn { factor, attention_factor, beta_fast, beta_slow, original_context, truncate }
                }
            });
            Arc::new(RopeTable::new(config.context, config.head_dim, config.rope_theta, scaling))
        });
        let slopes = if config.positions == Positions::Alibi { alibi_slopes(config.heads).into() } else { Arc::from([]) };
        let fused = parameters.tensors().first().is_none_or(crate::parameters::is_flex);
        Self { config, head, parameters, slots, device, fused, rope, slopes, arithmetic: Arithmetic::F32, adapter: None }
    }

    /// The same decoder computing with plain tensor operations, for comparisons.
    pub fn without_fused_operations(self) -> Self {
        Self { fused: false, ..self }
    }

    /// Adds an adapter to weights that are here whole: what it adds is trained from now on, and the weights are not. `data` gives
    /// each factor's elements.
    pub fn adapt(&mut self, lora: &LoraSettings, mut data: impl FnMut(&crate::ParameterSpec) -> Vec<f32>) {
        let count = self.parameters.specs().len();
        let mut specs = self.parameters.specs().to_vec();
        lora.extend(&mut specs, &mut self.slots);
        let mut tensors = self.parameters.tensors().to_vec();
        let device = &self.device;
        tensors.extend(specs[count..].iter().map(|spec| Tensor::from_data(TensorData::new(data(spec), spec.dims()), device)));
        self.parameters = Parameters::from_tensors(specs, tensors, None);
        self.adapter = Some(Arc::new(lora.clone()));
    }

    /// Says that the parameters end with the factors of an adapter.
    pub(crate) fn with_adapter(mut self, lora: &LoraSettings) -> Self {
        let (mut specs, _) = specs(&self.config, self.head);
        lora.extend(&mut specs, &mut self.slots);
        debug_assert_eq!(specs, self.parameters.specs());
        Self { adapter: Some(Arc::new(lora.clone())), ..self }
    }

    /// The model below the adapter, with the same tensors: nothing is copied.
    pub fn without_adapter(&self) -> Self {
        let (specs, slots) = specs(&self.config, self.head);
        Self { parameters: self.parameters.truncated(specs.len()), slots, adapter: None, ..self.clone() }
    }

    /// The adapter that is trained, if one is.
    pub fn adapter(&self) -> Option<&LoraSettings> {
        self.adapter.as_deref()
    }

    /// Whether a weight stays as it is: with an adapter all but its factors and the scalar head.
    pub fn is_frozen(&self, slot: usize) -> bool {
        self.adapter.is_some() && !lora::is_trained(&self.parameters.specs()[slot].name)
    }

    /// The same weights under another head; those that it does not need are left out.
    ///
    /// # Panics
    /// If a weight of that head is not there.
    pub fn with_head(&self, head: Head) -> Self {
        let (specs, _) = specs(&self.config, head);
        let by_name = self.parameters.by_name();
        let data = |spec: &crate::ParameterSpec| Ok::<_, std::convert::Infallible>(self.parameters.host(by_name[spec.name.as_str()]));
        let Ok(parameters) = Parameters::from_data(specs, &self.device, data);
        Self { arithmetic: self.arithmetic, ..Self::new(self.config.clone(), head, parameters, self.device.clone()) }
    }

    /// Computes products of weights, activations and their gradients, attention's among them, in another format; f32 unless set.
    /// Sums, norms, softmax and the optimizer are f32 in any case, and so is the arithmetic of generation.
    pub fn set_arithmetic(&mut self, arithmetic: Arithmetic) {
        self.arithmetic = arithmetic;
    }

    /// The format of the products' operands.
    pub fn arithmetic(&self) -> Arithmetic {
        self.arithmetic
    }

    /// Shape of the network.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// What stands on top.
    pub fn head(&self) -> Head {
        self.head
    }

    /// The weights.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// The weights, to be updated.
    pub fn parameters_mut(&mut self) -> &mut Parameters {
        &mut self.parameters
    }

    /// Where each weight stands.
    pub fn slots(&self) -> &Slots {
        &self.slots
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    pub(crate) fn positional(&self) -> Positional<'_> {
        match (self.config.positions, &self.rope) {
            (Positions::Rope, Some(table)) => Positional::Rope(table),
            (Positions::Alibi, _) => Positional::Alibi(&self.slopes),
            _ => Positional::Embedded,
        }
    }

    pub(crate) fn attention_shape(&self) -> AttentionShape {
        let ModelConfig { heads, kv_heads, head_dim, .. } = self.config;
        let window = self.config.style.sliding_window;
        let heads = Heads { heads, kv_heads, head_dim };
        AttentionShape { hidden: self.config.hidden_size, heads, eps: self.eps(), window, arithmetic: self.arithmetic }
    }

    fn eps(&self) -> f32 {
        self.config.norm_eps as f32
    }

    /// Tables, and the rows of them that a batch reads.
    fn table_rows(&self, batch: &PackedBatch) -> impl Iterator<Item = (usize, Arc<[u32]>)> + use<> {
        let positions = self.slots.positions.map(|slot| (slot, batch.layout.positions().into()));
        std::iter::once((self.slots.embed, batch.ids.clone())).chain(positions)
    }

    /// Rows of the embedding, and those of learned positions added.
    fn embed(&self, batch: &PackedBatch, weight: &mut dyn FnMut(usize) -> Tensor<2>) -> Tensor<2> {
        let embed = if self.fused { flex::embed } else { composed::embed };
        let tokens = embed(weight(self.slots.embed), batch.ids.clone());
        match self.slots.positions {
            Some(positions) => tokens + embed(weight(positions), batch.layout.positions().into()),
            None => tokens,
        }
    }

    fn norm(&self, x: Tensor<2>, part: Affine<Tensor<2>>) -> Tensor<2> {
        let norm = if self.fused { flex::norm } else { composed::norm };
        norm(x, part, self.eps())
    }

    /// What is dropped in a block: something where the adapter has dropout and the batch says which draws.
    fn dropout(&self, slots: &BlockSlots, batch: &PackedBatch) -> Option<BlockDropout> {
        let probability = self.adapter()?.dropout;
        let draws = batch.draws.clone().filter(|_| probability > 0.0)?;
        Some(BlockDropout { probability, block: slots.index, draws, layout: batch.layout.clone() })
    }

    /// Runs block weights given by `weight`, which says how each is seen (recorded or not); those of `next` may come meanwhile.
    fn block(
        &self,
        x: Tensor<2>,
        slots: &BlockSlots,
        next: Option<&BlockSlots>,
        batch: &PackedBatch,
        weight: &mut dyn FnMut(usize) -> Tensor<2>,
    ) -> Tensor<2> {
        let BlockSlots { attention, mlp, .. } = slots;
        let attention_context = AttentionContext {
            shape: self.attention_shape(),
            rope: self.rope.clone(),
            slopes: self.slopes.clone(),
            layout: batch.layout.clone(),
            dropout: self.dropout(slots, batch),
        };
        let mlp_context = MlpContext { eps: self.eps(), arithmetic: self.arithmetic, dropout: self.dropout(slots, batch) };
        let (attention, mlp) = (attention.map(|slot| weight(*slot)), mlp.map(|slot| weight(*slot)));
        self.parameters.prefetch(next.into_iter().flat_map(BlockSlots::all));
        let (attend, feed) = if self.fused {
            (flex::attention as fn(_, _, _) -> _, flex::mlp as fn(_, _, _) -> _)
        } else {
            (composed::attention as _, composed::mlp as _)
        };
        let x: Tensor<2> = attend(x, attention, attention_context);
        feed(x, mlp, mlp_context)
    }

    /// Forward pass without recording; `read` gets the end of it.
    pub fn evaluate<T>(&self, batch: &PackedBatch, read: impl FnOnce(&HeadView<'_>) -> T) -> T {
        let weight = |slot: usize| self.parameters.get(slot);
        let _passing = hold(Purpose::Buffers, batch.tokens() * self.config.hidden_size);
        let mut x = self.embed_gathered(batch);
        for number in 0..self.slots.blocks.len() {
            x = self.block_gathered(x, number, batch);
        }
        let _gathered = self.parameters.hold_gathered(self.head_slots());
        let normed = self.norm(x, self.slots.norm.map(|slot| weight(*slot)));
        read(&HeadView { decoder: self, normed, lm_head: self.slots.lm_head.map(weight), score: self.slots.score.map(weight) })
    }

    /// All weights on this device: a copy of them where ranks hold shares (all must call it), else the same decoder.
    pub fn whole(&self) -> Self {
        if !self.parameters.is_shared() {
            return self.clone();
        }
        let specs = self.parameters.specs().to_vec();
        let tensors = (0..specs.len()).map(|slot| self.parameters.get(slot)).collect();
        Self { parameters: Parameters::from_tensors(specs, tensors, None), ..self.clone() }
    }

    /// Takes part in [`Decoder::whole`] of another rank.
    pub(crate) fn attend_whole(&self) {
        if self.parameters.is_shared() {
            self.attend(0..self.parameters.specs().len());
        }
    }

    /// Takes part in [`crate::generate::generate`] of the first rank, which says when it ends.
    pub(crate) fn attend_generate(&self) {
        if !self.parameters.is_shared() {
            return;
        }
        self.attend(self.outer_slots());
        loop {
            self.attend_blocks();
            if !self.parameters.goes_on(None) {
                return;
            }
        }
    }

    /// Takes part in a forward pass of the other ranks without a batch of its own.
    pub(crate) fn attend_evaluate(&self) {
        if self.parameters.is_shared() {
            self.attend_forward();
            self.attend(self.head_slots());
        }
    }

    /// Takes part in a forward and backward pass of the other ranks: gathers what they gather and hands over no gradient
    /// wherever they hand over one.
    pub(crate) fn attend_backward(&self, take: &mut dyn FnMut(usize, Option<Tensor<2>>)) {
        let shared = self.parameters.is_shared();
        if shared {
            self.attend_forward();
            self.attend(self.head_slots());
        }
        self.head_gradients().for_each(|slot| take(slot, None));
        for (number, block) in self.slots.blocks.iter().enumerate().rev() {
            if shared {
                self.attend(block.all());
                self.parameters.prefetch(number.checked_sub(1).into_iter().flat_map(|next| self.slots.blocks[next].all()));
            }
            block.all().for_each(|slot| take(slot, None));
        }
        for slot in self.tables() {
            if shared && !self.fused && !self.are_tables_frozen() {
                self.attend(std::iter::once(slot));
            }
            take(slot, None);
        }
    }

    /// Whether nothing below the blocks is trained: then the backward pass ends with them.
    fn are_tables_frozen(&self) -> bool {
        self.tables().all(|slot| self.is_frozen(slot))
    }

    fn attend(&self, slots: impl Iterator<Item = usize>) {
        slots.for_each(|slot| self.parameters.attend(slot));
    }

    fn attend_forward(&self) {
        self.attend(self.tables());
        self.attend_blocks();
    }

    fn attend_blocks(&self) {
        for block in &self.slots.blocks {
            self.attend(block.all());
            self.prefetch_after(block);
        }
    }

    /// Starts to gather the weights of the block above.
    pub(crate) fn prefetch_after(&self, block: &BlockSlots) {
        self.parameters.prefetch(self.slots.blocks.get(block.index + 1).into_iter().flat_map(BlockSlots::all));
    }

    /// Slots outside of the blocks, each once, in an order.
    pub(crate) fn outer_slots(&self) -> impl Iterator<Item = usize> + Clone + use<> {
        self.tables().chain(self.head_gradients())
    }

    /// Slots that the embedding reads, in order.
    fn tables(&self) -> impl Iterator<Item = usize> + Clone + use<> {
        std::iter::once(self.slots.embed).chain(self.slots.positions)
    }

    /// Slots that the head reads, in order.
    fn head_slots(&self) -> impl Iterator<Item = usize> + Clone + use<> {
        let Affine { weight, bias, .. } = self.slots.norm;
        std::iter::once(weight).chain(bias).chain(self.slots.lm_head).chain(self.slots.score)
    }

    /// Slots whose gradients the head hands over, in order. That of tied embeddings waits for the embedding's.
    fn head_gradients(&self) -> impl Iterator<Item = usize> + Clone + use<> {
        let embed = self.slots.embed;
        self.head_slots().filter(move |slot| *slot != embed)
    }

    /// Forward and backward pass. `loss` builds a scalar `[1]` on the end of the forward pass; `take` receives each
    /// weight's gradient, if it has one, last block first, each weight once and always in the same order. Returns what
    /// `loss` returned beside the scalar.
    ///
    /// With `checkpointing` a block keeps its input only and is computed again when its turn comes: the same bits,
    /// less memory, a third more work. Where ranks hold shares of the weights it is always so, because a block's weights
    /// are dropped after its forward pass.
    pub fn backward<T>(
        &self,
        batch: &PackedBatch,
        checkpointing: bool,
        loss: impl FnOnce(&HeadView<'_>) -> (Tensor<1>, T),
        mut take: impl FnMut(usize, Option<Tensor<2>>),
    ) -> T {
        let checkpointing = checkpointing || self.parameters.is_shared();
        let constant = |slot: usize| self.parameters.get(slot);
        let states = batch.tokens() * self.config.hidden_size;
        let mut segments = Vec::with_capacity(self.slots.blocks.len());
        let mut x = self.embed_gathered(batch);
        let mut held = hold(Purpose::Activations, states);
        for number in 0..self.slots.blocks.len() {
            if checkpointing {
                let input = x;
                x = self.block_gathered(input.clone(), number, batch);
                segments.push((input, None, held.take()));
                held = hold(Purpose::Activations, states);
            } else {
                let segment = self.record(x.clone(), number, batch);
                let output = segment.output.clone().inner();
                segments.push((x, Some(segment), held.take()));
                x = output;
            }
        }

        let recorded = |slot: usize| self.recorded(slot);
        let trained = self.head_slots().filter(|slot| !self.is_frozen(*slot));
        let of_head: usize = trained.map(|slot| self.parameters.specs()[slot].len()).sum();
        let gathered = self.parameters.hold_gathered(self.head_slots());
        let hidden = x.autodiff().require_grad();
        let norm = self.slots.norm.map(|slot| recorded(*slot));
        let lm_head = self.slots.lm_head.map(recorded);
        let score = self.slots.score.map(recorded);
        let normed = self.norm(hidden.clone(), norm.clone());
        let view = HeadView { decoder: self, normed, lm_head: lm_head.clone(), score: score.clone() };
        let (loss, result) = loss(&view);
        drop(view);
        let passing = hold(Purpose::Buffers, of_head + 2 * states);
        let mut gradients = loss.backward();
        let mut upstream = hidden.grad_remove(&mut gradients).unwrap_or_else(|| hidden.clone().inner().zeros_like());
        // With tied embeddings the head's gradient waits for the embedding's, so that each weight is taken once.
        let mut head_gradient = None;
        let head_weights = [Some(norm.weight), norm.bias, lm_head, score].into_iter().flatten();
        for (slot, weight) in self.head_slots().zip(head_weights) {
            let gradient = weight.grad_remove(&mut gradients);
            if slot == self.slots.embed { head_gradient = gradient } else { take(slot, gradient) }
        }
        drop((hidden, held, gathered, passing));
        let waiting = head_gradient.as_ref().and_then(|_| hold(Purpose::Buffers, self.parameters.specs()[self.slots.embed].len()));
        drop(gradients);

        for (number, (input, segment, held)) in segments.into_iter().enumerate().rev() {
            let segment = segment.unwrap_or_else(|| self.record(input, number, batch));
            let _passing = hold(Purpose::Buffers, segment.gradient_elements(self) + 2 * states);
            upstream = segment.backward(self, upstream, &mut take);
            drop(held);
        }

        if self.are_tables_frozen() {
            self.tables().for_each(|slot| take(slot, None));
            return result;
        }
        for (slot, ids) in self.table_rows(batch) {
            let dims = self.parameters.specs()[slot].dims();
            let _passing = hold(Purpose::Buffers, dims[0] * dims[1] + states);
            let gradient = if self.fused {
                flex::embed_gradient(&upstream, &ids, dims)
            } else {
                let table = constant(slot).autodiff().require_grad();
                let mut gradients = self.backward_from(composed::embed(table.clone(), ids), upstream.clone());
                table.grad_remove(&mut gradients).unwrap_or_else(|| Tensor::zeros(dims, &self.device))
            };
            let head = head_gradient.take_if(|_| slot == self.slots.embed);
            take(slot, Some(head.map_or_else(|| gradient.clone(), |head| accumulate(head, gradient.clone()))));
        }
        drop(waiting);
        result
    }

    /// Backward pass of `output` with the given gradient: that of `sum(output * gradient)`.
    fn backward_from(&self, output: Tensor<2>, gradient: Tensor<2>) -> burn::tensor::Gradients {
        let root = if self.fused { flex::root } else { composed::root };
        root(output, gradient).backward()
    }

    /// [`Decoder::embed`] with weights that are dropped after it.
    fn embed_gathered(&self, batch: &PackedBatch) -> Tensor<2> {
        let _gathered = self.parameters.hold_gathered(self.tables());
        self.embed(batch, &mut |slot| self.parameters.get(slot))
    }

    /// [`Decoder::block`] with weights that are dropped after it.
    fn block_gathered(&self, x: Tensor<2>, number: usize, batch: &PackedBatch) -> Tensor<2> {
        let slots = &self.slots.blocks[number];
        let _gathered = self.parameters.hold_gathered(slots.all());
        self.block(x, slots, self.slots.blocks.get(number + 1), batch, &mut |slot| self.parameters.get(slot))
    }

    /// A weight as the graph of a backward pass sees it.
    fn recorded(&self, slot: usize) -> Tensor<2> {
        let weight = self.parameters.get(slot).autodiff();
        if self.is_frozen(slot) { weight } else { weight.require_grad() }
    }

    fn record(&self, input: Tensor<2>, number: usize, batch: &PackedBatch) -> Segment {
        let slots = &self.slots.blocks[number];
        let gathered = self.parameters.hold_gathered(slots.all());
        let input = input.autodiff().require_grad();
        let mut weights = Vec::with_capacity(9);
        // The backward pass goes down.
        let next = number.checked_sub(1).map(|next| &self.slots.blocks[next]);
        let output = self.block(input.clone(), slots, next, batch, &mut |slot| {
            let weight = self.recorded(slot);
            weights.push((slot, weight.clone()));
            weight
        });
        Segment { input, weights, output, gathered }
    }
}

/// A block's own graph, from its detached input to its output.
struct Segment {
    input: Tensor<2>,
    weights: Vec<(usize, Tensor<2>)>,
    output: Tensor<2>,
    /// Weights that are here for this block only.
    gathered: Option<Held>,
}

impl Segment {
    /// Elements of its weights' gradients, which are there together until they are handed over.
    fn gradient_elements(&self, decoder: &Decoder) -> usize {
        let trained = self.weights.iter().filter(|(slot, _)| !decoder.is_frozen(*slot));
        trained.map(|(slot, _)| decoder.parameters.specs()[*slot].len()).sum()
    }

    /// Hands over the weights' gradients and returns the input's.
    fn backward(self, decoder: &Decoder, upstream: Tensor<2>, take: &mut impl FnMut(usize, Option<Tensor<2>>)) -> Tensor<2> {
        let mut gradients = decoder.backward_from(self.output, upstream);
        for (slot, weight) in self.weights {
            take(slot, weight.grad_remove(&mut gradients));
        }
        drop(self.gathered);
        let input = self.input;
        input.grad_remove(&mut gradients).unwrap_or_else(|| input.inner().zeros_like())
    }
}
