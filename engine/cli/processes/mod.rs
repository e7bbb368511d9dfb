//! The processes of a run: this one alone, or those that `mpirun` or `srun` started (feature `mpi`).
//!
//! The first leads: it does what the command says. The others are its workers, and serve it until it leaves.

#[cfg(feature = "mpi")]
mod calls;
#[cfg(feature = "mpi")]
mod mpi_wire;
#[cfg(feature = "mpi")]
mod watch;
#[cfg(feature = "mpi")]
mod world;

#[cfg(not(feature = "mpi"))]
mod alone;

#[cfg(not(feature = "mpi"))]
pub use alone::{World, crew, is_one_lost, on_this_host};
#[cfg(feature = "mpi")]
pub use world::{World, crew, is_one_lost, on_this_host};
