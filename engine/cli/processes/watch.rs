use std::{
    fs,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use super::mpi_wire::MpiWire;

/// How often control messages are looked for.
const LISTEN_EVERY: Duration = Duration::from_millis(5);
/// How often the other processes are looked at.
pub const LOOK_EVERY: Duration = Duration::from_millis(50);

/// A process of the run on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    /// How messages call it.
    pub name: String,
    /// Its id.
    pub pid: u32,
    /// When it started, so that another one with its id is not taken for it.
    started: String,
}

impl Neighbour {
    /// The process, if it can be seen.
    pub fn find(name: String, pid: u32) -> Option<Self> {
        Some(Self { name, pid, started: started(pid)? })
    }

    fn lives(&self) -> bool {
        started(self.pid).is_some_and(|started| started == self.started)
    }
}

/// When a process that lives started: in ticks since the machine did.
fn started(pid: u32) -> Option<String> {
    let status = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may hold anything.
    let mut fields = status.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X") { None } else { fields.nth(18).map(str::to_owned) }
}

/// Listens to what other processes say of attempts, and looks whether `neighbours` live. MPI says nothing of a process that was
/// killed; `mpirun` ends the others a second later.
pub fn start(wire: Arc<MpiWire>, neighbours: Vec<Neighbour>) -> std::io::Result<()> {
    let watch = move || {
        let mut looked = Instant::now();
        while wire.control().is_ok() {
            if looked.elapsed() >= LOOK_EVERY {
                looked = Instant::now();
                if let Some(gone) = neighbours.iter().find(|neighbour| !neighbour.lives()) {
                    wire.lose(format!("{} is gone: it was killed, or it crashed", gone.name));
                }
            }
            thread::sleep(LISTEN_EVERY);
        }
    };
    thread::Builder::new().name("watch".into()).spawn(watch).map(|_| ())
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_process_that_was_killed_does_not_live() {
        let mut child = Command::new("sleep").arg("100").stdin(Stdio::null()).spawn().unwrap();
        let neighbour = Neighbour::find("worker 1".into(), child.id()).unwrap();
        assert!(neighbour.lives());
        child.kill().unwrap();
        // Nobody has waited for it yet.
        let deadline = Instant::now() + Duration::from_secs(10);
        while neighbour.lives() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(5));
        }
        assert!(!neighbour.lives());
        child.wait().unwrap();
        assert!(!neighbour.lives());
    }
}
