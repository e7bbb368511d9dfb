use std::{
    process::ExitCode,
    sync::{Arc, OnceLock},
    time::Duration,
};

use mpi::{Threading, environment::Universe, traits::Communicator};
use rlflow_api::{Channel, Message, Peer, Portable, Wire};
use rlflow_engine::{Crew, worker};

use super::{
    mpi_wire::MpiWire,
    watch::{self, Neighbour},
};
use crate::{common::registry, failure::Failure};

/// Who each process is.
const HELLO: Channel = Channel { attempt: 0, number: 2 };
/// That a worker has left.
const BYE: Channel = Channel { attempt: 0, number: 3 };

/// How long the leader waits for workers to leave: those that compute notice when they next wait for somebody.
const FAREWELL: Duration = Duration::from_secs(5);

/// What is known everywhere of the others.
struct Together {
    wire: Arc<MpiWire>,
    crew: Arc<Crew>,
    on_this_host: u64,
}

static TOGETHER: OnceLock<Together> = OnceLock::new();

/// This process among those that a launcher started, or alone.
pub struct World {
    /// MPI ends when it is dropped.
    universe: Option<Universe>,
    name: String,
}

impl World {
    /// Joins the other processes, if a launcher started this one with others.
    pub fn join() -> Result<Self, Failure> {
        let alone = Self { universe: None, name: String::new() };
        // Open MPI's mpirun; srun with PMIx or PMI. Without them MPI is not touched.
        if !["OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK"].iter().any(|name| std::env::var_os(name).is_some()) {
            return Ok(alone);
        }
        let failed = |what: &str| Failure::Other(anyhow::anyhow!("{what}"));
        let Some((universe, threading)) = mpi::initialize_with_threading(Threading::Serialized) else {
            return Err(failed("MPI cannot be initialised"));
        };
        if threading < Threading::Serialized {
            return Err(failed("this MPI allows calls from one thread only; build it with thread support"));
        }
        let world = universe.world();
        let (process, processes) = (world.rank() as usize, world.size() as usize);
        if processes == 1 {
            return Ok(alone);
        }
        let wire = Arc::new(MpiWire::new(process, processes));
        let (pid, host) = (std::process::id(), mpi::environment::processor_name().unwrap_or_default());
        let who = greet(&wire, pid, &host).map_err(|why| failed(&why))?;
        let name = |(process, (pid, host)): (usize, &(u32, String))| {
            let role = if process == 0 { "process 0, which leads the run".to_owned() } else { format!("worker {process}") };
            format!("{role} (process {pid} on {host})")
        };
        let here = who.iter().filter(|(_, other)| *other == host).count() as u64;
        // Workers hear of each other from the leader, which tells the user first.
        let watched = |other: usize| other != process && (process == 0 || other == 0);
        let others = who.iter().enumerate().filter(|(other, (_, their_host))| watched(*other) && *their_host == host);
        let neighbours = others.filter_map(|other| Neighbour::find(name(other), other.1.0)).collect();
        watch::start(wire.clone(), neighbours).map_err(|error| failed(&format!("start a thread: {error}")))?;
        let crew = Arc::new(Crew::new(wire.clone()));
        let _ = TOGETHER.set(Together { wire, crew, on_this_host: here });
        Ok(Self { universe: Some(universe), name: name((process, &(pid, host))) })
    }

    /// A worker serves until the leader leaves, and has nothing more to do then; the leader, and a process alone, have a command to run.
    pub fn serve(&self) -> Option<ExitCode> {
        let together = TOGETHER.get().filter(|together| together.wire.process() > 0)?;
        // Who stops a run, stops its leader, which says when to stop here.
        if let Err(error) = ctrlc::set_handler(|| {}) {
            tracing::warn!(%error, "a signal ends this worker at once");
        }
        let wire: Arc<dyn Wire> = together.wire.clone();
        if worker::serve(&wire, &registry(), &self.name).is_err() {
            // The leader tells why, or is gone: and whoever leaves MPI now would wait for it.
            std::process::exit(1);
        }
        let bye = vec![(Peer { process: 0, lane: 0 }, Arc::new(Message::default()))];
        let _ = together.wire.exchange_within(Some(FAREWELL), BYE, bye, &[]);
        Some(ExitCode::SUCCESS)
    }

    /// The leader lets its workers go. If one of them is gone, or does not answer, all are ended.
    pub fn leave(self) {
        let Some(together) = TOGETHER.get() else { return };
        let wire = &together.wire;
        if wire.process() == 0 {
            let workers: Vec<Peer> = (1..wire.processes()).map(|process| Peer { process, lane: 0 }).collect();
            let gone = together.crew.leave().and_then(|()| wire.exchange_within(Some(FAREWELL), BYE, Vec::new(), &workers));
            if gone.is_err() {
                wire.calls.abort();
            }
        }
        wire.calls.close();
        drop(self.universe);
    }
}

/// Process id and host name of each process.
fn greet(wire: &MpiWire, pid: u32, host: &str) -> Result<Vec<(u32, String)>, String> {
    let mut own = Vec::new();
    (pid, host.to_owned()).put(&mut own);
    let message = Arc::new(Message::of(&[&own]));
    let others: Vec<Peer> =
        (0..wire.processes()).filter(|process| *process != wire.process()).map(|process| Peer { process, lane: 0 }).collect();
    let received = wire.exchange(HELLO, others.iter().map(|peer| (*peer, message.clone())).collect(), &others)?;
    let known = |message: &Message| Portable::take(&mut message.bytes()).ok_or("another process is no rlflow of this version");
    let mut all = received.iter().map(known).collect::<Result<Vec<(u32, String)>, _>>()?;
    all.insert(wire.process(), (pid, host.to_owned()));
    Ok(all)
}

/// The processes that this one leads.
pub fn crew() -> Option<Arc<Crew>> {
    TOGETHER.get().map(|together| together.crew.clone())
}

/// How many processes of the run share this machine.
pub fn on_this_host() -> u64 {
    TOGETHER.get().map_or(1, |together| together.on_this_host.max(1))
}

/// Whether a process that this one leads is gone. Asked when a signal came: the launcher may have noticed before the watch did.
pub fn is_one_lost() -> bool {
    TOGETHER.get().is_some_and(|together| {
        std::thread::sleep(2 * watch::LOOK_EVERY);
        together.wire.is_one_lost()
    })
}
