//! What a rank will hold, predicted before a stage runs.

use rlflow_api::{DescribeContext, DeviceSpec, ModelConfig, Needs, Placement};
use rlflow_kernels::{AttentionShape, attention::Heads, attention_block, mlp_block, reads_narrow_weights, token_head};
use rlflow_model::{
    Gathering, Head, LoraSettings,
    ranks::{Shares, largest_shares},
};

use super::{Precision, composed};

/// Bytes of a number.
const F32: u64 = 4;

/// Passes over the micro-batches of a step, as far as their memory goes.
#[derive(Debug, Clone, Copy)]
pub struct Pass {
    /// What stands on top of the model.
    pub head: Head,
    /// Tokens of a micro-batch.
    pub tokens: u64,
    /// Micro-batches of a step.
    pub micro_batches: u64,
    /// Whether blocks keep their inputs only.
    pub checkpointing: bool,
    /// Number format.
    pub precision: Precision,
}

/// Answers that are sampled at once.
#[derive(Debug, Clone, Copy)]
pub struct Rollout {
    /// How many.
    pub sequences: u64,
    /// Tokens of all prompts.
    pub prompt_tokens: u64,
    /// Tokens of the longest answer.
    pub new_tokens: u64,
    /// How shares of weights come together for it.
    pub gathering: Gathering,
}

/// Tokens that `rows` rows on `port` take together, each cut to `limit`: likely ones where the rows are there and their order is drawn, else
/// as many as can be.
pub fn tokens_of_rows(context: &DescribeContext<'_>, port: &str, rows: usize, limit: usize, is_drawn: bool) -> usize {
    let known = context.input(port).and_then(|input| input.meta.row_tokens);
    known.map_or(rows * limit, |known| known.of_group(rows, limit, is_drawn))
}

/// On how many ranks a model lives, at which ZeRO level, and how these compute.
#[derive(Debug, Clone, Copy)]
pub struct Sharding {
    /// Ranks.
    pub ranks: usize,
    /// ZeRO level.
    pub zero: u8,
    /// Whether operations are fused, as on the CPU; elsewhere they are composed of plain ones.
    pub fused: bool,
}

impl Sharding {
    /// Of the stage that is described.
    pub fn of(context: &DescribeContext<'_>) -> Self {
        Self::in_place(context.placement)
    }

    /// Of a stage that is placed there.
    pub fn in_place(placement: &Placement) -> Self {
        let fused = placement.devices.iter().all(|device| *device == DeviceSpec::Cpu);
        Self { ranks: placement.ranks().max(1), zero: placement.zero, fused }
    }

    /// The level that has an effect.
    fn level(self) -> u8 {
        if self.ranks > 1 { self.zero } else { 0 }
    }

    /// Ranks that work on a step of `micro_batches`; 0 for all.
    fn working(self, micro_batches: u64) -> u64 {
        if micro_batches < self.ranks as u64 { micro_batches } else { 0 }
    }
}

/// Elements by part of a model.
#[derive(Clone, Copy)]
struct Sizes {
    all: u64,
    block: u64,
    /// The feed-forward half of a block.
    mlp: u64,
    /// The embedding, and learned positions.
    tables: u64,
    /// What the head reads.
    head: u64,
    /// Gradient of tied embeddings, which waits through the backward pass.
    tied: u64,
}

impl Sizes {
    fn of(model: &ModelConfig, head: Head) -> Self {
        let hidden = model.hidden_size as u64;
        let embed = model.vocab_size as u64 * hidden;
        let score = if head.has_score() { hidden } else { 0 };
        let untied = !model.tie_embeddings;
        let unused = if untied && !head.has_language() { embed } else { 0 };
        let norm = if model.style.layer_norm { 2 * hidden } else { hidden };
        let learned = if model.positions == rlflow_api::Positions::Learned { model.context as u64 * hidden } else { 0 };
        let all = model.parameter_count() + score - unused;
        let outside = embed * (1 + u64::from(untied)) + learned + norm;
        let language = if head.has_language() { embed } else { 0 };
        Self {
            all,
            block: (model.parameter_count() - outside) / model.layers.max(1) as u64,
            mlp: if model.style.plain_mlp { 2 } else { 3 } * hidden * model.intermediate_size as u64,
            tables: embed + learned,
            head: norm + score + language,
            tied: if untied { 0 } else { language },
        }
    }

    /// Elements that are trained: of these parts without an adapter; else of the adapter and the scalar head.
    fn trained(self, model: &ModelConfig, head: Head, lora: Option<&LoraSettings>) -> Self {
        let Some(lora) = lora else { return self };
        let score = if head.has_score() { model.hidden_size as u64 } else { 0 };
        let factors = lora.parameter_count(model);
        Self { all: factors + score, block: factors / model.layers.max(1) as u64, mlp: 0, tables: 0, head: score, tied: 0 }
    }
}

/// What a half of a block holds, in elements.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Half {
    /// Of a recorded pass until its backward pass, with its result.
    pub kept: u64,
    /// While a pass runs that is not recorded, with its result.
    pub forward: u64,
    /// While its backward pass runs, beside what is kept.
    pub backward: u64,
}

/// The halves of a block.
struct Halves {
    attention: Half,
    mlp: Half,
}

impl Halves {
    fn of(model: &ModelConfig, sizes: &Sizes, pass: Pass, lora: Option<&LoraSettings>, fused: bool) -> Self {
        if fused {
            return Self::fused(model, sizes, pass, lora.is_some());
        }
        let has_dropout = lora.is_some_and(|lora| lora.dropout > 0.0);
        Self { attention: composed::attention(model, pass, has_dropout), mlp: composed::mlp(model, pass, has_dropout) }
    }

    /// See `AttentionSaved`, `MlpSaved` and the workspace of the blocks.
    fn fused(model: &ModelConfig, sizes: &Sizes, pass: Pass, has_adapter: bool) -> Self {
        let (hidden, intermediate, heads) = (model.hidden_size as u64, model.intermediate_size as u64, model.heads as u64);
        let (query, kv) = ((model.heads * model.head_dim) as u64, (model.kv_heads * model.head_dim) as u64);
        let head_norms = if model.style.qk_norm { query + kv + heads + model.kv_heads as u64 } else { 0 };
        let inner = if model.style.plain_mlp { 1 } else { 2 } * intermediate;
        let (gated, arithmetic) = (!model.style.plain_mlp, pass.precision.arithmetic());
        let attention_rows = has_adapter || model.style.qkv_bias || model.style.output_bias;
        let mlp_rows = has_adapter || model.style.mlp_bias;
        let heads_of = Heads { heads: model.heads, kv_heads: model.kv_heads, head_dim: model.head_dim };
        let shape = AttentionShape { hidden: model.hidden_size, heads: heads_of, eps: 0.0, window: None, arithmetic };
        let attention_workspace = attention_block::workspace(pass.tokens as usize, shape, attention_rows);
        let mlp_workspace =
            mlp_block::workspace(pass.tokens as usize, model.hidden_size, model.intermediate_size, gated, mlp_rows, arithmetic);
        let half = |per_token: u64, workspace: [usize; 2], weights: u64| {
            let (kept, widened) = (pass.tokens * per_token, widened(pass, true, weights));
            let [forward, backward] = workspace.map(|elements| elements as u64 + widened);
            Half { kept, forward: kept + forward, backward }
        };
        let of_mlp = hidden + if pass.precision == Precision::Bf16 { inner / 2 } else { inner };
        Self {
            attention: half(hidden + 2 * query + 2 * kv + heads + head_norms, attention_workspace, sizes.block - sizes.mlp),
            mlp: half(of_mlp, mlp_workspace, sizes.mlp),
        }
    }

    fn kept(&self) -> u64 {
        self.attention.kept + self.mlp.kept
    }
}

/// Of weights that fused operations read, what they widen while they run.
fn widened(pass: Pass, fused: bool, weights: u64) -> u64 {
    let is_narrow = pass.precision == Precision::Bf16;
    if fused && is_narrow && !reads_narrow_weights(pass.precision.arithmetic()) { weights } else { 0 }
}

/// Memory of each rank that trains `model`, or with `lora` an adapter on it, at its peak.
pub fn training_needs(model: &ModelConfig, lora: Option<&LoraSettings>, pass: Pass, sharding: Sharding, total_tokens: u64) -> Needs {
    let (ranks, zero) = (sharding.ranks as u64, sharding.level());
    let bf16 = pass.precision == Precision::Bf16;
    let narrow = |elements: u64| elements / if bf16 { 2 } else { 1 };
    let sizes = Sizes::of(model, pass.head);
    let halves = Halves::of(model, &sizes, pass, lora, sharding.fused);
    let trained = sizes.trained(model, pass.head, lora);
    let whole = largest_shares(model, pass.head, lora, 1);
    let share = largest_shares(model, pass.head, lora, sharding.ranks);
    let held = |from: u8, of: fn(&Shares) -> u64| of(if zero >= from { &share } else { &whole });
    // With bfloat16 weights the optimizer keeps an f32 master of them; adapters are f32.
    let parameters = narrow(held(3, |all| all.weights)) + held(3, |all| all.factors);
    let gradients = held(2, |all| all.trained);
    let optimizer = held(1, |all| all.trained) * if bf16 && lora.is_none() { 3 } else { 2 };
    let checkpointing = pass.checkpointing || zero == 3;
    // Weights that are gathered for a block and dropped after it.
    let gathered = |weights: u64, factors: u64| if zero == 3 { narrow(weights) + factors } else { 0 };
    let gathered_block = gathered(sizes.block, if lora.is_some() { trained.block } else { 0 });
    let (layers, tokens) = (model.layers as u64, pass.tokens);
    let states = tokens * model.hidden_size as u64;
    // Activations of the first `blocks` blocks, and of one that is being computed again.
    let kept = |blocks: u64| states + blocks * if checkpointing { states } else { halves.kept() };
    let again = if checkpointing { halves.kept() } else { 0 };
    let logits = match (pass.head.has_language(), sharding.fused) {
        (true, true) => token_head::held_logits(tokens as usize, model.vocab_size) as u64 + 2 * states,
        (true, false) => composed::logits(model, pass, true) + 2 * states,
        (false, _) => 0,
    };
    // Sums of gradients are there from the second micro-batch on; in the first they come block by block.
    let more = pass.micro_batches.div_ceil(ranks) > 1;
    let sums = |part: u64| match more {
        true => gradients,
        false => (u128::from(gradients) * u128::from(part.min(trained.all)) / u128::from(trained.all.max(1))) as u64,
    };
    let head = trained.head + 2 * states + logits + gathered(sizes.head, 0) + widened(pass, sharding.fused, sizes.head);
    let mut phases = vec![(sums(0), kept(layers) + states + 7 * tokens, head)];
    for blocks in [layers, 1] {
        let done = trained.head + (layers - blocks) * trained.block;
        let working = halves.attention.backward.max(halves.mlp.backward);
        // The next block's weights come meanwhile.
        let ahead = if blocks > 1 { gathered_block } else { 0 };
        let buffers = trained.tied + trained.block + 2 * states + working + gathered_block + ahead;
        phases.push((sums(done), kept(blocks) - if checkpointing { states } else { 0 } + again, buffers));
    }
    if trained.tables > 0 {
        phases.push((sums(trained.all - trained.tables.min(trained.all)), 0, trained.tied + trained.tables + states));
    }
    let largest = phases.into_iter().max_by_key(|(gradients, activations, buffers)| gradients + activations + buffers);
    let (gradient_sums, activations, buffers) = largest.unwrap_or_default();
    Needs {
        parameter_bytes: F32 * parameters,
        gradient_bytes: F32 * gradient_sums,
        optimizer_bytes: F32 * optimizer,
        activation_bytes: F32 * activations,
        buffer_bytes: F32 * buffers,
        working_ranks: sharding.working(pass.micro_batches),
        // What others found is added up by all, and what they gather comes by.
        idle_bytes: F32 * (gradients + gathered_block.max(gathered(sizes.tables, 0))),
        tokens: total_tokens,
        ..Needs::default()
    }
}

/// Memory of each rank that holds a frozen `model` and runs forward passes like `pass`.
pub fn frozen_needs(model: &ModelConfig, pass: Pass, sharding: Sharding) -> Needs {
    let Pass { head, tokens, micro_batches, precision, .. } = pass;
    let shared = sharding.level() == 3;
    let bf16 = precision == Precision::Bf16;
    let narrow = |elements: u64| elements / if bf16 { 2 } else { 1 };
    let sizes = Sizes::of(model, head);
    let halves = Halves::of(model, &sizes, pass, None, sharding.fused);
    let states = tokens * model.hidden_size as u64;
    let gathered = |weights: u64| if shared { narrow(weights) } else { 0 };
    let logits = match (head.has_language(), sharding.fused) {
        (true, true) => token_head::held_logits(tokens as usize, model.vocab_size) as u64 + states + 6 * tokens,
        (true, false) => composed::logits(model, pass, false) + states,
        (false, _) => 0,
    };
    // A block's weights come with those of the next.
    let block = halves.attention.forward.max(halves.mlp.forward) + gathered(2 * sizes.block);
    let of_head = logits + gathered(sizes.head) + widened(pass, sharding.fused, sizes.head);
    let passing = block.max(of_head).max(gathered(sizes.tables));
    let share = largest_shares(model, head, None, if shared { sharding.ranks } else { 1 });
    Needs {
        parameter_bytes: F32 * narrow(share.weights),
        buffer_bytes: F32 * (states + passing),
        working_ranks: sharding.working(micro_batches),
        idle_bytes: F32 * gathered(sizes.block.max(sizes.tables)),
        ..Needs::default()
    }
}

/// Bytes that sampling takes: keys and values, the prompts' pass through a block, weights that are gathered where the model holds
/// shares of them, and those of a block as f32 where they are bfloat16.
pub fn sampling_bytes(model: &ModelConfig, rollout: Rollout, sharding: Sharding, precision: Precision) -> u64 {
    let Rollout { sequences, prompt_tokens, new_tokens, gathering } = rollout;
    let kv = (model.kv_heads * model.head_dim) as u64;
    let capacities = (prompt_tokens + sequences * new_tokens).min(sequences * model.context as u64);
    let caches = 2 * capacities * model.layers as u64 * kv + sequences * (model.vocab_size + model.hidden_size) as u64;
    let block = (3 * model.hidden_size + 2 * model.heads * model.head_dim + 3 * model.intermediate_size) as u64 + 2 * kv;
    let sizes = Sizes::of(model, Head::Language);
    let bf16 = precision == Precision::Bf16;
    let widened = if bf16 { sizes.block } else { 0 };
    let gathered = match (sharding.level(), gathering) {
        (3, Gathering::Once) => sizes.all,
        // What is outside of the blocks stays; a block's weights come with those of the next.
        (3, Gathering::ByBlock) => sizes.all - sizes.block * (model.layers as u64).saturating_sub(2),
        _ => 0,
    };
    F32 * (caches + prompt_tokens * block + widened + gathered / if bf16 { 2 } else { 1 })
}
