//! Models of rlflow on Burn.
//!
//! In data order: [`fused`] are the operations, [`composed`] the same from plain tensors; [`parameters`] names and holds
//! weights; [`lora`] says what adapters add to them; [`Decoder`] runs forward and backward, one autodiff segment per block;
//! [`checkpoint`] stores and loads, with [`adapter`]s; [`Optimizer`] updates at the rate of [`schedule`]; [`ranks`] do all that on several devices at a ZeRO level; [`generate`]
//! samples over a key-value cache.

pub mod adapter;
pub mod checkpoint;
pub mod composed;
mod decoder;
mod dropout;
pub mod fused;
pub mod generate;
pub mod ledger;
pub mod lora;
mod optimizer;
pub mod parameters;
pub mod ranks;
pub mod schedule;

pub use checkpoint::CheckpointInfo;
pub use decoder::{Decoder, HeadView, PackedBatch, TokenStats};
pub use dropout::{BlockDropout, DropoutDraws};
pub use fused::TokenTargets;
pub use generate::{Completion, Draws, Sampling};
pub use ledger::{Bytes, Ledger};
pub use lora::LoraSettings;
pub use optimizer::{Gradients, Optimizer, OptimizerSettings};
pub use parameters::{Head, ParameterSpec, Parameters};
pub use ranks::{Gathering, Group, Layout, Use};
pub use rlflow_kernels::{Allocator, memory::keep_freed_memory, numerics};
pub use schedule::{LearningRate, Schedule};

/// Whether the calling thread is one of those that share operations out among them.
pub fn is_pool_thread() -> bool {
    rayon::current_thread_index().is_some()
}
