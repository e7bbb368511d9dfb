//! What a rank holds: counted while a stage runs, and predicted before it does.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use rlflow_api::{DescribeContext, DeviceSpec, ModelConfig, Needs, Offload, Placement, Processes, RunContext, StageResult};
use rlflow_kernels::{AttentionShape, attention::Heads, attention_block, mlp_block, token_head};
use rlflow_model::{Head, Layout, Ledger, ranks::largest_share};

use super::{Precision, burn_device};

/// Bytes of a number.
const F32: u64 = 4;

/// The counts of a stage's ranks. Models on one device share its count, so that the peak is that of the device.
#[derive(Debug, Default)]
pub struct Memory {
    ledgers: Mutex<BTreeMap<(DeviceSpec, usize), Arc<Ledger>>>,
    processes: Processes,
}

impl Memory {
    /// Of a stage that these processes run.
    pub fn of(processes: &Processes) -> Self {
        Self { processes: processes.clone(), ..Self::default() }
    }

    /// The Burn devices of a placement, one per rank.
    ///
    /// # Errors
    /// If this build lacks one of them.
    pub fn layout(&self, placement: &Placement) -> StageResult<Layout> {
        let devices = placement.devices.iter().map(|device| burn_device(*device)).collect::<StageResult<_>>()?;
        let mut known = self.ledgers.lock().unwrap_or_else(PoisonError::into_inner);
        let places = placement.devices.iter().enumerate();
        let ledgers = places.map(|(rank, device)| known.entry((*device, rank)).or_default().clone()).collect();
        let offload = placement.offload == Offload::Cpu;
        Ok(Layout { devices, processes: self.processes.clone(), zero: placement.zero, offload, ledgers })
    }

    /// Reports what each rank held at its peak, and holds now.
    ///
    /// # Errors
    /// If another process fails.
    pub fn report(&self, context: &RunContext<'_>) -> StageResult<()> {
        let of_rank = |((device, rank), ledger): (&(DeviceSpec, usize), &Arc<Ledger>)| {
            let (peak, now) = (ledger.peak(), ledger.now());
            let totals = [("peak", peak.total()), ("now", now.total())].into_iter().chain(peak.parts());
            ((device.to_string(), *rank), totals.map(|(part, bytes)| (part.to_owned(), bytes)).collect::<Vec<_>>())
        };
        let own: Vec<_> = self.ledgers.lock().unwrap_or_else(PoisonError::into_inner).iter().map(of_rank).collect();
        let ranks = own.iter().map(|((_, rank), _)| rank + 1).max().unwrap_or(0);
        let all = self.processes.gather(own)?;
        let peaks = all.iter().flatten().flat_map(|(_, counts)| counts).filter(|(part, _)| part == "peak");
        context.measurement("memory/peak_bytes", peaks.map(|(_, bytes)| *bytes).max().unwrap_or(0) as f64);
        for (process, all) in all.into_iter().enumerate() {
            for ((device, rank), counts) in all {
                for (part, bytes) in counts {
                    context.measurement(&format!("memory/{device}/rank{}/{part}_bytes", process * ranks + rank), bytes as f64);
                }
            }
        }
        Ok(())
    }
}

/// A forward and backward pass, as far as its memory goes.
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

/// On how many ranks a model lives, at which ZeRO level.
#[derive(Debug, Clone, Copy)]
pub struct Sharding {
    /// Ranks.
    pub ranks: usize,
    /// ZeRO level.
    pub zero: u8,
}

impl Sharding {
    /// Of the stage that is described.
    pub fn of(context: &DescribeContext<'_>) -> Self {
        Self { ranks: context.ranks.max(1), zero: context.zero }
    }

    /// The level that has an effect.
    fn level(self) -> u8 {
        if self.ranks > 1 { self.zero } else { 0 }
    }
}

/// Elements by part of a model.
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
}

/// What a block keeps of each pass, per token (see `AttentionSaved`, `MlpSaved`), and what its halves need while they run.
struct Widths {
    hidden: u64,
    block: u64,
    /// Forward and backward.
    attention_workspace: [u64; 2],
    mlp_workspace: [u64; 2],
}

impl Widths {
    fn of(model: &ModelConfig, tokens: u64, precision: Precision) -> Self {
        let (hidden, intermediate, heads) = (model.hidden_size as u64, model.intermediate_size as u64, model.heads as u64);
        let (query, kv) = ((model.heads * model.head_dim) as u64, (model.kv_heads * model.head_dim) as u64);
        let head_norms = if model.style.qk_norm { query + kv + heads + model.kv_heads as u64 } else { 0 };
        let inner = if model.style.plain_mlp { 1 } else { 2 } * intermediate;
        let attention = hidden + 2 * query + 2 * kv + heads + head_norms;
        let mlp = hidden + if precision == Precision::Bf16 { inner / 2 } else { inner };
        let (gated, arithmetic) = (!model.style.plain_mlp, precision.arithmetic());
        let attention_rows = model.style.qkv_bias || model.style.output_bias;
        let heads = Heads { heads: model.heads, kv_heads: model.kv_heads, head_dim: model.head_dim };
        let shape = AttentionShape { hidden: model.hidden_size, heads, eps: 0.0, window: None, arithmetic };
        let attention_workspace = attention_block::workspace(tokens as usize, shape, attention_rows);
        let mlp_workspace =
            mlp_block::workspace(tokens as usize, model.hidden_size, model.intermediate_size, gated, model.style.mlp_bias, arithmetic);
        Self {
            hidden,
            block: attention + mlp,
            attention_workspace: attention_workspace.map(|elements| elements as u64),
            mlp_workspace: mlp_workspace.map(|elements| elements as u64),
        }
    }
}

/// Memory of each rank that trains `model` on `ranks` ranks at a ZeRO level, at its peak. Passes are taken to be as long as
/// they can be; what is shorter needs less.
pub fn training_needs(model: &ModelConfig, pass: Pass, sharding: Sharding, total_tokens: u64) -> Needs {
    let (ranks, zero) = (sharding.ranks, sharding.level());
    let bf16 = pass.precision == Precision::Bf16;
    let (sizes, widths) = (Sizes::of(model, pass.head), Widths::of(model, pass.tokens, pass.precision));
    let share = if ranks > 1 { largest_share(model, pass.head, ranks) } else { sizes.all };
    let held = |from: u8| if zero >= from { share } else { sizes.all };
    // With bfloat16 weights the optimizer keeps an f32 master of them.
    let (parameters, gradients, optimizer) = (held(3) / if bf16 { 2 } else { 1 }, held(2), held(1) * if bf16 { 3 } else { 2 });
    let checkpointing = pass.checkpointing || zero == 3;
    // Weights that are gathered for a block and dropped after it, and those that an operation widens while it runs.
    let gathered = |weights: u64| if zero == 3 { weights / if bf16 { 2 } else { 1 } } else { 0 };
    let widened = |weights: u64| if bf16 { weights } else { 0 };
    let (layers, tokens) = (model.layers as u64, pass.tokens);
    let states = tokens * widths.hidden;
    // Activations of the first `blocks` blocks, and of one that is being computed again.
    let kept = |blocks: u64| states + blocks * if checkpointing { states } else { tokens * widths.block };
    let again = if checkpointing { tokens * widths.block } else { 0 };
    let logits = match pass.head.has_language() {
        true => token_head::held_logits(tokens as usize, model.vocab_size) as u64 + 2 * states,
        false => 0,
    };
    // Sums of gradients are there from the second micro-batch on; in the first they come block by block.
    let more = pass.micro_batches.div_ceil(ranks as u64) > 1;
    let sums = |part: u64| if more { gradients } else { (gradients as u128 * u128::from(part) / u128::from(sizes.all)) as u64 };
    let mut phases =
        vec![(sums(0), kept(layers) + states + 5 * tokens, sizes.head + 2 * states + logits + gathered(sizes.head) + widened(sizes.head))];
    for blocks in [layers, 1] {
        let done = sizes.head + (layers - blocks) * sizes.block;
        let attention = widths.attention_workspace[1] + widened(sizes.block - sizes.mlp);
        let working = attention.max(widths.mlp_workspace[1] + widened(sizes.mlp));
        // The next block's weights come meanwhile.
        let ahead = if blocks > 1 { gathered(sizes.block) } else { 0 };
        let buffers = sizes.tied + sizes.block + 2 * states + working + gathered(sizes.block) + ahead;
        phases.push((sums(done.min(sizes.all)), kept(blocks) - if checkpointing { states } else { 0 } + again, buffers));
    }
    phases.push((sums(sizes.all - sizes.tables.min(sizes.all)), 0, sizes.tied + sizes.tables + states));
    let largest = phases.into_iter().max_by_key(|(gradients, activations, buffers)| gradients + activations + buffers);
    let (gradients, activations, buffers) = largest.unwrap_or_default();
    Needs {
        parameter_bytes: F32 * parameters,
        gradient_bytes: F32 * gradients,
        optimizer_bytes: F32 * optimizer,
        activation_bytes: F32 * activations,
        buffer_bytes: F32 * buffers,
        tokens: total_tokens,
    }
}

/// Memory of each rank that holds a frozen `model` and runs forward passes of `tokens` tokens.
pub fn frozen_needs(model: &ModelConfig, head: Head, tokens: u64, sharding: Sharding, precision: Precision) -> Needs {
    let (ranks, shared) = (sharding.ranks, sharding.level() == 3);
    let bf16 = precision == Precision::Bf16;
    let (sizes, widths) = (Sizes::of(model, head), Widths::of(model, tokens, precision));
    let logits = match head.has_language() {
        true => token_head::held_logits(tokens as usize, model.vocab_size) as u64,
        false => 0,
    };
    let gathered = if shared || bf16 { sizes.head.max(2 * sizes.block) } else { 0 };
    let working = widths.attention_workspace[0].max(widths.mlp_workspace[0]);
    let passing = tokens * (2 * widths.hidden + widths.block.max(widths.hidden)) + working + logits + gathered;
    Needs {
        parameter_bytes: F32 * if shared { largest_share(model, head, ranks) } else { sizes.all } / if bf16 { 2 } else { 1 },
        buffer_bytes: F32 * passing,
        ..Needs::default()
    }
}

/// Bytes that sampling `sequences` answers at once takes, each of at most `tokens` tokens with its prompt: keys and values, the
/// prompts' pass through a block, all weights where the model holds shares of them, and those of a block as f32 where they are
/// bfloat16.
pub fn sampling_bytes(model: &ModelConfig, sequences: u64, tokens: u64, sharding: Sharding, precision: Precision) -> u64 {
    let kv = (model.kv_heads * model.head_dim) as u64;
    let caches = sequences * (2 * tokens * model.layers as u64 * kv + (model.vocab_size + model.hidden_size) as u64);
    let block = (3 * model.hidden_size + 2 * model.heads * model.head_dim + 3 * model.intermediate_size) as u64 + 2 * kv;
    let bf16 = precision == Precision::Bf16;
    let widened = if bf16 { Sizes::of(model, Head::Language).block } else { 0 };
    let gathered = if sharding.level() == 3 { model.parameter_count() / if bf16 { 2 } else { 1 } } else { 0 };
    F32 * (caches + sequences * tokens * block + widened + gathered)
}
