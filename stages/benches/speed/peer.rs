use std::{
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    thread,
    time::Duration,
};

use serde_json::{Value, json};

/// For how long threads of the other side may still spin after an answer.
const SETTLE: Duration = Duration::from_millis(300);

/// peers.py, one process for all measurements. It is idle unless it is asked.
pub struct Peer {
    child: Child,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
    /// Names and versions of what it measures.
    pub versions: Vec<(String, String)>,
}

fn command(python: &Path, threads: usize) -> Command {
    let mut command = Command::new(python);
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/benches/speed/peers.py")).arg("--threads").arg(threads.to_string());
    command
}

impl Peer {
    /// Starts it; libraries are loaded when this returns.
    ///
    /// # Errors
    /// If Python does not start or lacks a library, which it says on stderr.
    pub fn start(python: &Path, threads: usize) -> Result<Self, String> {
        let mut command = command(python, threads);
        let failed = |error: std::io::Error| format!("{}: {error}", python.display());
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().map_err(failed)?;
        let (Some(requests), Some(answers)) = (child.stdin.take(), child.stdout.take()) else { return Err("no pipes".into()) };
        let mut peer = Self { child, requests, answers: BufReader::new(answers), versions: Vec::new() };
        let hello = peer.answer()?;
        if hello["threads"] != json!(threads) {
            return Err(format!("the peers have {} threads instead of {threads}", hello["threads"]));
        }
        let versions = hello["versions"].as_object().into_iter().flatten();
        peer.versions = versions.map(|(name, version)| (name.clone(), version.as_str().unwrap_or_default().to_owned())).collect();
        Ok(peer)
    }

    fn answer(&mut self) -> Result<Value, String> {
        let mut line = String::new();
        self.answers.read_line(&mut line).map_err(|error| error.to_string())?;
        serde_json::from_str(&line).map_err(|_| "peers.py has ended; what it said is above".to_owned())
    }

    /// Seconds of `steps` steps of a task, which is done on as many `parameters`, or makes as many `tokens`, as ours.
    ///
    /// # Errors
    /// If it fails there, or if they are not as many.
    pub fn measure(&mut self, request: &Value, steps: usize, (counted, count): (&str, u64)) -> Result<Vec<f64>, String> {
        let mut request = request.clone();
        request["steps"] = json!(steps);
        writeln!(self.requests, "{request}").and_then(|()| self.requests.flush()).map_err(|error| error.to_string())?;
        let answer = self.answer()?;
        thread::sleep(SETTLE);
        if let Some(error) = answer["error"].as_str() {
            return Err(error.to_owned());
        }
        if answer[counted] != json!(count) {
            return Err(format!("{} {counted} instead of {count}", answer[counted]));
        }
        answer["seconds"].as_array().map(|all| all.iter().filter_map(Value::as_f64).collect()).ok_or_else(|| answer.to_string())
    }

    /// Peak resident bytes of a process that does nothing but train.
    ///
    /// # Errors
    /// If it fails.
    pub fn peak_memory(python: &Path, threads: usize, request: &Value) -> Result<u64, String> {
        let output = command(python, threads).arg("--peak-memory").arg(request.to_string()).output().map_err(|error| error.to_string())?;
        let answer: Value = serde_json::from_slice(&output.stdout).map_err(|_| String::from_utf8_lossy(&output.stderr).into_owned())?;
        answer["bytes"].as_u64().ok_or_else(|| answer.to_string())
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It ends by itself when its stdin does; this is for one that hangs.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
