//! What all trainers share: settings, the order of rows, the loop with its snapshots.

mod execution;
mod order;
mod settings;
mod trainer;

pub use execution::{Precision, SnapshotSettings, TrainExecution, burn_device, layout};
pub use order::RowOrder;
pub use settings::{TrainDefaults, TrainPlan, TrainSettings};
pub use trainer::{Sums, Task, needs, train};
