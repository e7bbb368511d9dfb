use std::{process::ExitCode, sync::Arc};

use rlflow_engine::Crew;

use crate::failure::Failure;

/// This process.
pub struct World;

impl World {
    /// Refuses to be one of several: each would do all of the work.
    pub fn join() -> Result<Self, Failure> {
        let number = |name: &str| std::env::var(name).ok().and_then(|value| value.parse::<usize>().ok());
        match number("OMPI_COMM_WORLD_SIZE") {
            Some(processes) if processes > 1 => {
                if number("OMPI_COMM_WORLD_RANK") != Some(0) {
                    // One of them says it.
                    std::process::exit(2);
                }
                let message = format!("mpirun started {processes} processes, and this rlflow was built without MPI");
                Err(Failure::request("no_mpi", message, "build with `--features mpi`, or run it without mpirun"))
            }
            _ => Ok(Self),
        }
    }

    /// Nobody to serve.
    pub fn serve(&self) -> Option<ExitCode> {
        None
    }

    /// Nobody to let go.
    pub fn leave(self) {}
}

/// The processes that this one leads.
pub fn crew() -> Option<Arc<Crew>> {
    None
}

/// How many processes of the run share this machine.
pub fn on_this_host() -> u64 {
    1
}

/// Whether a process that this one leads is gone.
pub fn is_one_lost() -> bool {
    false
}
