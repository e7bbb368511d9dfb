//! How long `run` and `plan` take when everything is cached, process start included, for 7, 300, 1,000 and
//! 10,000 stages; and the same for ninja, Snakemake and DVC where they are installed, on graphs of the same form: half of the
//! stages read a file, and half read what one of those made. Beyond 1,000 stages Snakemake, and beyond 300 DVC, take minutes.
//!
//! `cargo bench --bench noop` (the first run of 10,000 stages fills a store, which takes minutes; `-- 7 1000` leaves it out).

use std::{
    env, fs,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use tempfile::TempDir;

/// Most runs of each command; the median is told.
const REPEATS: usize = 15;
/// A command that takes long is run less often.
const LONGEST: Duration = Duration::from_secs(20);

fn main() {
    let sizes: Vec<usize> = env::args().skip(1).filter_map(|argument| argument.parse().ok()).collect();
    let sizes = if sizes.is_empty() { vec![7, 300, 1000, 10_000] } else { sizes };
    println!("{:<10} {:>8} {:>12} {:>12} {:>12}", "tool", "stages", "first", "run", "plan");
    for stages in sizes {
        let folder = TempDir::new().expect("a temporary folder");
        rlflow(folder.path(), stages);
        other(folder.path(), stages, "ninja", ninja, &["ninja"], Some(&["ninja", "-n"]));
        if stages <= 1000 {
            let snakemake = ["snakemake", "--cores", "2", "--quiet", "all"];
            other(folder.path(), stages, "snakemake", snakefile, &snakemake, Some(&["snakemake", "-n", "--quiet", "all"]));
        }
        if stages <= 300 {
            other(folder.path(), stages, "dvc", dvc, &["dvc", "repro", "--quiet"], Some(&["dvc", "status", "--quiet"]));
        }
    }
}

/// Corpora and tokenizers over them: half of the stages read a file, half an artifact.
fn rlflow(folder: &Path, stages: usize) {
    let mut workflow = String::from("name = \"noop\"\nedition = 1\nseed = 1\n");
    for index in 0..stages {
        let pair = index / 2;
        if index % 2 == 0 {
            workflow += &format!("[stage.c{pair}]\nkind = \"corpus\"\nseed = {pair}\nsources = [{{ path = \"text.txt\" }}]\n");
        } else {
            workflow += &format!("[stage.t{pair}]\nkind = \"tokenizer\"\ninputs = {{ corpus = \"c{pair}\" }}\nvocab_size = 300\n");
        }
    }
    let text: String = (0..50).map(|line| format!("Line {line} of a text.\n\n")).collect();
    fs::write(folder.join("text.txt"), text).expect("the text is written");
    fs::write(folder.join("noop.toml"), workflow).expect("the workflow is written");
    let binary = env!("CARGO_BIN_EXE_rlflow");
    let first = time(folder, &[binary, "run", "noop.toml", "--quiet", "--jobs", "8"]);
    let run = median(folder, &[binary, "run", "noop.toml"]);
    let plan = median(folder, &[binary, "plan", "noop.toml"]);
    tell("rlflow", stages, first, run, Some(plan));
}

fn other(folder: &Path, stages: usize, tool: &str, write: fn(&Path, usize), run: &[&str], plan: Option<&[&str]>) {
    if !Command::new(tool).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success()) {
        println!("{tool:<10} {stages:>8}  not installed");
        return;
    }
    let folder = folder.join(tool);
    fs::create_dir(&folder).expect("a folder for the tool");
    fs::write(folder.join("text.txt"), "text\n").expect("the text is written");
    write(&folder, stages);
    let first = time(&folder, run);
    let again = median(&folder, run);
    tell(tool, stages, first, again, plan.map(|plan| median(&folder, plan)));
}

/// What a stage reads: the text, or what the stage before it made of that.
fn input(stage: usize) -> String {
    if stage.is_multiple_of(2) { "text.txt".to_owned() } else { format!("out{}", stage - 1) }
}

fn ninja(folder: &Path, stages: usize) {
    let mut rules = String::from("rule copy\n  command = cp $in $out\n");
    (0..stages).for_each(|index| rules += &format!("build out{index}: copy {}\n", input(index)));
    fs::write(folder.join("build.ninja"), rules).expect("the build file is written");
}

fn snakefile(folder: &Path, stages: usize) {
    let mut rules = format!("rule all:\n    input: expand(\"out{{n}}\", n=range({stages}))\n");
    (0..stages).for_each(|n| {
        rules += &format!("rule r{n}:\n    input: \"{}\"\n    output: \"out{n}\"\n    shell: \"cp {{input}} {{output}}\"\n", input(n))
    });
    fs::write(folder.join("Snakefile"), rules).expect("the Snakefile is written");
}

fn dvc(folder: &Path, stages: usize) {
    let mut file = String::from("stages:\n");
    (0..stages).for_each(|n| file += &format!("  s{n}:\n    cmd: cp {0} out{n}\n    deps: [{0}]\n    outs: [out{n}]\n", input(n)));
    fs::write(folder.join("dvc.yaml"), file).expect("dvc.yaml is written");
    time(folder, &["dvc", "init", "--no-scm", "--quiet"]);
}

fn tell(tool: &str, stages: usize, first: Duration, run: Duration, plan: Option<Duration>) {
    let milliseconds = |time: Duration| format!("{:.1} ms", time.as_secs_f64() * 1e3);
    let plan = plan.map_or_else(String::new, milliseconds);
    println!("{tool:<10} {stages:>8} {:>12} {:>12} {plan:>12}", milliseconds(first), milliseconds(run));
}

fn time(folder: &Path, command: &[&str]) -> Duration {
    let started = Instant::now();
    let status = Command::new(command[0]).args(&command[1..]).current_dir(folder).stdout(Stdio::null()).stderr(Stdio::null()).status();
    let elapsed = started.elapsed();
    assert!(status.is_ok_and(|status| status.success()), "{} failed", command.join(" "));
    elapsed
}

fn median(folder: &Path, command: &[&str]) -> Duration {
    let mut times = Vec::new();
    while times.len() < REPEATS && times.iter().sum::<Duration>() < LONGEST {
        times.push(time(folder, command));
    }
    times.sort_unstable();
    times[times.len() / 2]
}
