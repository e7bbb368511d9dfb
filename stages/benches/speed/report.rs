use std::fmt::Write;

use serde_json::{Value, json};

use super::{operations::Operation, turns::Measured};

/// What a task's seconds are told as.
#[derive(Debug, Clone, Copy)]
pub enum Unit {
    /// This many tokens per task.
    TokensPerSecond(usize),
    /// This many bytes per task.
    MegabytesPerSecond(u64),
    /// Milliseconds per task.
    Milliseconds,
}

impl Unit {
    fn name(self) -> &'static str {
        match self {
            Self::TokensPerSecond(_) => "tokens/s",
            Self::MegabytesPerSecond(_) => "MB/s",
            Self::Milliseconds => "ms",
        }
    }

    fn of(self, seconds: f64) -> f64 {
        match self {
            Self::TokensPerSecond(tokens) => tokens as f64 / seconds,
            Self::MegabytesPerSecond(bytes) => bytes as f64 / seconds / 1e6,
            Self::Milliseconds => 1e3 * seconds,
        }
    }

    fn cell(self, measured: &Measured) -> String {
        match &measured.seconds {
            Ok(seconds) => {
                let [fastest, slowest] = measured.range.map(|seconds| thousands(self.of(seconds)));
                format!("{}: {} ({fastest} to {slowest})", measured.name, thousands(self.of(*seconds)))
            }
            Err(_) => format!("{}: failed", measured.name),
        }
    }
}

/// One of ours beside one of theirs.
#[derive(Debug, Clone)]
pub struct Comparison {
    /// What is done, and what of it is counted.
    pub task: String,
    /// On which network.
    pub size: String,
    /// How times are told.
    pub unit: Unit,
    /// rlflow.
    pub ours: Measured,
    /// Whom it is compared with.
    pub theirs: Option<Measured>,
    /// By how much it should be faster.
    pub target: Option<f64>,
}

impl Comparison {
    /// How many times faster ours is.
    fn ratio(&self) -> Option<f64> {
        let (Ok(ours), Ok(theirs)) = (&self.ours.seconds, &self.theirs.as_ref()?.seconds) else { return None };
        Some(theirs / ours)
    }
}

/// A training step taken apart.
#[derive(Debug, Clone)]
pub struct Anatomy {
    /// Which network.
    pub size: String,
    /// Number format.
    pub precision: &'static str,
    /// Tokens of a step.
    pub tokens: usize,
    /// Seconds of a step.
    pub step: f64,
    /// Seconds of its matrix products by themselves.
    pub products: f64,
    /// Its operations by themselves.
    pub operations: Vec<Operation>,
}

/// Peak resident memory of two processes that do the same.
#[derive(Debug, Clone)]
pub struct PeakMemory {
    /// What they do.
    pub task: String,
    /// Ours, in bytes.
    pub ours: Option<u64>,
    /// Theirs, in bytes.
    pub theirs: Option<Result<u64, String>>,
}

/// All that was measured, and on what.
#[derive(Debug, Default)]
pub struct Report {
    /// Facts about machine and programs.
    pub machine: Vec<(String, String)>,
    /// Speeds.
    pub comparisons: Vec<Comparison>,
    /// Phases of a stage: its name, and seconds per step by phase.
    pub phases: Vec<(String, Vec<(String, f64)>)>,
    /// Training steps taken apart.
    pub anatomies: Vec<Anatomy>,
    /// Memory.
    pub memory: Vec<PeakMemory>,
}

impl Report {
    /// For the documentation.
    pub fn markdown(&self) -> String {
        let mut text = String::new();
        for (name, value) in &self.machine {
            line(&mut text, &format!("- {name}: {value}"));
        }
        if !self.comparisons.is_empty() {
            line(&mut text, "\nMedians, fastest and slowest in parentheses; a ratio above 1 means that rlflow is faster.\n");
            line(&mut text, "| task | model | unit | rlflow | compared with | ratio | target |\n|---|---|---|---|---|---|---|");
            for row in &self.comparisons {
                let theirs = row.theirs.as_ref().map_or_else(|| "-".to_owned(), |theirs| row.unit.cell(theirs));
                let [ratio, target] = [row.ratio(), row.target].map(|value| value.map_or_else(|| "-".to_owned(), times));
                let cells = [&row.task, &row.size, row.unit.name(), &row.unit.cell(&row.ours), &theirs, &ratio, &target];
                line(&mut text, &format!("| {} |", cells.join(" | ")));
            }
            let failures = self.comparisons.iter().flat_map(|row| [Some(&row.ours), row.theirs.as_ref()]).flatten();
            for failed in failures {
                if let Err(error) = &failed.seconds {
                    line(&mut text, &format!("\n{} failed: {}", failed.name, error.lines().next().unwrap_or_default()));
                }
            }
        }
        for (name, phases) in &self.phases {
            let phases: Vec<String> = phases.iter().map(|(phase, seconds)| format!("{phase} {} ms", milliseconds(*seconds))).collect();
            line(&mut text, &format!("\n{name}: {}", phases.join(", ")));
        }
        if !self.memory.is_empty() {
            line(&mut text, "\n| peak resident memory | rlflow | PyTorch | ratio |\n|---|---|---|---|");
            for row in &self.memory {
                let mebibytes = |bytes: u64| format!("{:.0} MiB", bytes as f64 / f64::from(1 << 20));
                let ours = row.ours.map_or_else(|| "-".to_owned(), mebibytes);
                let (theirs, ratio) = match (&row.theirs, row.ours) {
                    (Some(Ok(theirs)), Some(ours)) => (mebibytes(*theirs), times(ours as f64 / *theirs as f64)),
                    (Some(Err(_)), _) => ("failed".to_owned(), "-".to_owned()),
                    _ => ("-".to_owned(), "-".to_owned()),
                };
                line(&mut text, &format!("| {} | {ours} | {theirs} | {ratio} |", row.task));
            }
        }
        if !self.anatomies.is_empty() {
            line(&mut text, "\n| matrix products by themselves | | tokens/s | training reaches |\n|---|---|---|---|");
            for row in &self.anatomies {
                let ceiling = thousands(row.tokens as f64 / row.products);
                line(&mut text, &format!("| {} | {} | {ceiling} | {:.0}% |", row.size, row.precision, 100.0 * row.products / row.step));
            }
        }
        self.anatomies.iter().for_each(|row| row.write(&mut text));
        text
    }

    /// For programs: seconds and bytes.
    pub fn json(&self) -> Value {
        let measured = |measured: &Measured| match &measured.seconds {
            Ok(seconds) => json!({ "name": measured.name, "median_s": seconds, "range_s": measured.range }),
            Err(error) => json!({ "name": measured.name, "error": error }),
        };
        let comparison = |row: &Comparison| {
            let tokens = if let Unit::TokensPerSecond(tokens) = row.unit { Some(tokens) } else { None };
            json!({
                "task": row.task, "model": row.size, "tokens": tokens, "ours": measured(&row.ours),
                "theirs": row.theirs.as_ref().map(measured), "ratio": row.ratio(), "target": row.target,
            })
        };
        let operation = |operation: &Operation| {
            json!({
                "name": operation.name, "times": operation.times, "forward_s": operation.forward, "backward_s": operation.backward,
            })
        };
        let anatomy = |row: &Anatomy| {
            json!({
                "model": row.size, "precision": row.precision, "tokens": row.tokens, "step_s": row.step, "matrix_products_s": row.products,
                "share_of_ceiling": row.products / row.step, "operations": row.operations.iter().map(operation).collect::<Vec<_>>(),
            })
        };
        let memory = |row: &PeakMemory| {
            let theirs =
                row.theirs.as_ref().map(|theirs| theirs.as_ref().map_or_else(|error| json!({ "error": error }), |bytes| json!(bytes)));
            json!({ "task": row.task, "ours_bytes": row.ours, "theirs_bytes": theirs })
        };
        let named =
            |pairs: &[(String, f64)]| pairs.iter().map(|(name, value)| (name.clone(), json!(value))).collect::<serde_json::Map<_, _>>();
        json!({
            "machine": self.machine.iter().map(|(name, value)| (name.clone(), json!(value))).collect::<serde_json::Map<_, _>>(),
            "comparisons": self.comparisons.iter().map(comparison).collect::<Vec<_>>(),
            "phases_s": self.phases.iter().map(|(name, phases)| (name.clone(), Value::Object(named(phases)))).collect::<serde_json::Map<_, _>>(),
            "training_steps": self.anatomies.iter().map(anatomy).collect::<Vec<_>>(),
            "peak_memory": self.memory.iter().map(memory).collect::<Vec<_>>(),
        })
    }
}

impl Anatomy {
    fn write(&self, text: &mut String) {
        line(
            text,
            &format!(
                "\nWhere a training step of {} in {} goes ({:.0} ms for {} tokens), each operation by itself:\n",
                self.size,
                self.precision,
                1e3 * self.step,
                self.tokens
            ),
        );
        line(text, "| operation | times | forward, ms | backward, ms | share |\n|---|---|---|---|---|");
        let share = |seconds: f64| format!("{:.1}%", 100.0 * seconds / self.step);
        for Operation { name, times, forward, backward } in &self.operations {
            let count = *times as f64;
            let backward = if *backward == 0.0 { "-".to_owned() } else { format!("{:.2}", 1e3 * count * backward) };
            let forward_ms = 1e3 * count * forward;
            let seconds = self.operations.iter().find(|known| known.name == *name).map_or(0.0, Operation::seconds);
            line(text, &format!("| {name} | {times} | {forward_ms:.2} | {backward} | {} |", share(seconds)));
        }
        let rest = self.step - self.operations.iter().map(Operation::seconds).sum::<f64>();
        line(text, &format!("| the rest | | {:.2} | | {} |", 1e3 * rest, share(rest)));
    }
}

fn line(text: &mut String, line: &str) {
    let _ = writeln!(text, "{line}");
}

/// Whole ones, but where those would say little.
fn milliseconds(seconds: f64) -> String {
    if seconds < 0.01 { format!("{:.3}", 1e3 * seconds) } else { format!("{:.0}", 1e3 * seconds) }
}

fn times(ratio: f64) -> String {
    format!("{ratio:.2}x")
}

/// `12,345`, and `9.8` where whole numbers would say little.
fn thousands(value: f64) -> String {
    if value < 100.0 {
        return format!("{value:.1}");
    }
    let digits = format!("{value:.0}");
    let groups: Vec<&str> = digits.as_bytes().rchunks(3).rev().map(|group| std::str::from_utf8(group).unwrap_or_default()).collect();
    groups.join(",")
}
