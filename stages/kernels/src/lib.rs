//! CPU kernels of rlflow: forward and backward of the fused operations, on plain slices.
//!
//! Two promises hold in every function here, and the tests assert them:
//! - **Fixed summation orders.** Every float reduction runs in an order that depends on shapes alone: rows are
//!   cut into blocks of constant size, partial sums are added in block order, lanes are added as a fixed tree. The
//!   number of threads never changes a bit.
//! - **No talk between sequences.** What a token's attention gets depends on its own sequence only.
//!
//! Bits may differ between SIMD levels ([`simd::level`]), which is part of the numerics profile.
//!
//! In data order: [`layout`] says where sequences start, [`embedding`] looks rows up, [`affine`] names a block's weights, [`low_rank`]
//! what LoRA adds to them, [`attention_block`] and [`mlp_block`] are the two halves of a decoder block, [`norm`] the final norm, [`token_head`] the output projection with
//! log-probabilities, [`optim`] the update. [`decode`] runs the same model one token at a time over a key-value cache, with products of [`few_rows`], by a [`Team`].

// On other processors than x86 the kernels for its units, and what only they use, rest.
#![cfg_attr(not(target_arch = "x86_64"), allow(dead_code, unreachable_code, unused_unsafe, unused_variables))]

pub mod affine;
mod allocator;
pub mod attention;
pub mod attention_block;
pub mod bf16;
pub mod decode;
pub mod embedding;
pub mod few_rows;
pub mod layout;
pub mod low_rank;
pub mod matmul;
pub mod memory;
pub mod mlp_block;
pub mod norm;
mod operand;
pub mod optim;
#[cfg(target_arch = "x86_64")]
mod panels;
#[cfg(not(target_arch = "x86_64"))]
#[path = "no_panels.rs"]
mod panels;
pub mod rope;
mod saved;
mod scratch;
mod shared;
pub mod simd;
mod small;
mod team;
#[cfg(target_arch = "x86_64")]
mod tiles;
#[cfg(not(target_arch = "x86_64"))]
#[path = "no_tiles.rs"]
mod tiles;
pub mod token_head;
mod weight;

pub use affine::{Affine, AttentionParts, MlpParts};
pub use allocator::Allocator;
pub use attention_block::{AttentionGrads, AttentionSaved, AttentionShape, AttentionWeights, Positional};
pub use layout::SequenceLayout;
pub use low_rank::{Dropout, LowRank, Projection};
pub use mlp_block::{MlpGrads, MlpSaved, MlpWeights};
pub use team::Team;
pub use weight::{Weight, reads_narrow_weights};

/// Changes whenever the same inputs may give other bits.
const VERSION: u32 = 3;

/// What the bits of a result depend on besides its inputs: processor family, SIMD level, unit of bfloat16 products, version.
pub fn numerics() -> String {
    format!("{}-{}, bf16 by {}, kernels {VERSION}", std::env::consts::ARCH, simd::level().name(), bf16::unit().name())
}
