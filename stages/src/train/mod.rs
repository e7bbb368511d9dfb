//! What all trainers share: settings, the order of rows, the loop with its snapshots.

mod execution;
mod memory;
mod order;
mod settings;
mod trainer;

pub use execution::{Precision, SnapshotSettings, TrainExecution, burn_device};
pub use memory::{Memory, Pass, Sharding, frozen_needs, sampling_bytes, training_needs};
pub use order::RowOrder;
pub use settings::{TrainDefaults, TrainPlan, TrainSettings};
pub use trainer::{Sums, Task, train};
