//! What all trainers share: settings, the order of rows, the loop with its snapshots.

mod composed;
mod execution;
mod memory;
mod needs;
mod order;
mod settings;
mod trainer;

pub use execution::{Precision, SnapshotSettings, TrainExecution, burn_device};
pub use memory::Memory;
pub use needs::{Pass, Rollout, Sharding, frozen_needs, sampling_bytes, tokens_of_rows, training_needs};
pub use order::RowOrder;
pub use settings::{TrainDefaults, TrainPlan, TrainSettings};
pub use trainer::{Sums, Task, train};
