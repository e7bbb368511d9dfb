//! Models on ranks. A rank is a thread with a device; micro-batch `j` of a step runs on rank `j mod N`. Ranks may be spread over
//! several processes, of which each holds a part of a [`Group`] and computes what the others do around it.
//!
//! Whatever the number of ranks and the ZeRO level (arXiv:1910.02054), a result has the same bits on the CPU:
//! gradients of a weight are added in the order of micro-batches by whoever owns the sum, norms add rows of the unsharded
//! weight in order, and the update treats every element alone. What the levels change is what a rank holds:
//!
//! | level | parameters | gradients | optimizer state |
//! |---|---|---|---|
//! | 0 | all | all | all |
//! | 1 | all | all | its share |
//! | 2 | all | its share | its share |
//! | 3 | its share | its share | its share |
//!
//! A share is a run of whole rows of each weight ([`share`]). At level 3 a block's weights are gathered just before the
//! block runs, while the one before it runs, and dropped after it; blocks are computed again in the backward pass.

mod across;
mod by_shares;
mod collective;
#[cfg(test)]
mod gathers;
mod group;
mod in_process;
mod ordered;
mod pieces;
mod rank;
mod share;

pub use across::across;
pub use collective::{Aborted, Collective, Pending};
pub use group::{Gathering, Group, Layout, Take, Use};
pub use in_process::{in_process, in_process_on};
pub(crate) use pieces::{add_range, cut, join, paste};
pub use rank::Rank;
pub use share::{Shares, largest_shares, share};
