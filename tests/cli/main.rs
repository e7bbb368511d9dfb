//! The command line from outside: what it prints where, exit codes, and the JSON that scripts rely on.

mod care;
mod placement;
mod reasons;
mod terminal;

use std::{
    fs,
    path::PathBuf,
    process::{Command, Output},
    thread::sleep,
    time::Duration,
};

use serde_json::Value;
use tempfile::TempDir;

const WORKFLOW: &str = r#"
name = "small"
edition = 1
seed = 1

[stage.corpus]
kind = "corpus"
sources = [{ path = "texts/*.txt" }]

[stage.tokenizer]
kind = "tokenizer"
inputs = { corpus = "corpus" }
vocab_size = 300
"#;

struct World(TempDir);

impl World {
    fn new() -> Self {
        let world = Self(TempDir::new().unwrap());
        fs::create_dir(world.path("texts")).unwrap();
        let text: String = (0..200).map(|line| format!("Line {line} of a small text that tells of the sea and of ships.\n\n")).collect();
        fs::write(world.path("texts/a.txt"), text).unwrap();
        fs::write(world.path("flow.toml"), WORKFLOW).unwrap();
        world
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn rlflow(&self, arguments: &[&str]) -> Output {
        if std::env::var_os("RLFLOW_TEST_WITHOUT_INDEX").is_some() {
            let _ = fs::remove_dir_all(self.path(".rlflow/index"));
        }
        let mut command = Command::new(env!("CARGO_BIN_EXE_rlflow"));
        command.current_dir(self.0.path()).args(arguments).env_remove("RLFLOW_STORE").env_remove("RUST_LOG");
        command.output().unwrap()
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let output = self.rlflow(arguments);
        let text = stdout(&output);
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}\n{}", stderr(&output)))
    }
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn statuses(plan: &Value) -> Vec<&str> {
    plan["stages"].as_array().unwrap().iter().map(|stage| stage["status"].as_str().unwrap()).collect()
}

#[test]
fn a_run_prints_a_table_and_a_second_one_a_line() {
    let world = World::new();
    let plan = world.json(&["plan", "flow.toml", "--json"]);
    assert_eq!(statuses(&plan), ["run", "pending"]);
    let corpus = &plan["stages"][0];
    assert_eq!((&corpus["name"], &corpus["kind"]), (&"corpus".into(), &"corpus".into()));
    assert_eq!(corpus["key"].as_str().unwrap().len(), 64);
    assert_eq!((&corpus["reason"]["kind"], &corpus["reason"]["text"]), (&"never_ran".into(), &"never ran".into()));
    assert_eq!((&corpus["devices"][0], &corpus["ranks"], &corpus["zero"]), (&"cpu".into(), &1.into(), &0.into()));
    assert!(corpus["peak_bytes"].is_u64());
    assert_eq!((&plan["stages"][1]["key"], &plan["stages"][1]["reason"]["kind"]), (&Value::Null, &"depends_on_result_of".into()));

    let first = world.rlflow(&["run", "flow.toml"]);
    assert_eq!(first.status.code(), Some(0), "{}", stderr(&first));
    let table = stdout(&first);
    assert!(table.starts_with("stage ") && table.contains("corpus     ran") && table.contains("never ran"), "{table}");
    assert!(table.contains("next:\n  rlflow metrics flow.toml"), "{table}");
    assert!(stderr(&first).contains("corpus: running (never ran)"), "progress goes to stderr");

    let second = world.rlflow(&["run", "flow.toml"]);
    assert!(stdout(&second).starts_with("everything is cached: all 2 stages are up to date"));
    assert_eq!((stdout(&second).lines().count(), stderr(&second).as_str()), (1, ""));
    assert_eq!(statuses(&world.json(&["status", "flow.toml", "--json"])), ["cached", "cached"]);
    assert_eq!(world.json(&["plan", "flow.toml", "--json"])["stages"][0]["reason"], Value::Null);

    // Later ones are answered from a note, once a change of what they depend on would show.
    while fs::read_dir(world.path(".rlflow/settled")).map_or(0, |notes| notes.count()) == 0 {
        sleep(Duration::from_millis(20));
        world.rlflow(&["run", "flow.toml"]);
    }
    let noted = world.rlflow(&["run", "flow.toml"]);
    assert!(stdout(&noted).starts_with("everything is cached: all 2 stages are up to date"), "{}", stderr(&noted));
    assert_eq!((stdout(&noted).lines().count(), stderr(&noted).as_str()), (1, ""));
    assert_eq!(stdout(&world.rlflow(&["plan", "flow.toml"])), "everything is cached: nothing of 2 stages would run\n");
    assert!(stderr(&world.rlflow(&["run", "flow.toml", "-v"])).contains("tokenizer: cached"));
    fs::write(world.path("texts/b.txt"), "More of it.\n").unwrap();
    assert!(stdout(&world.rlflow(&["plan", "flow.toml"])).contains("0 of 2 stages cached"));
    assert!(stdout(&world.rlflow(&["run", "flow.toml"])).contains("corpus     ran"));
}

#[test]
fn run_json_is_a_stream_that_ends_with_the_outcome() {
    let world = World::new();
    let lines = |output: &Output| -> Vec<Value> { stdout(output).lines().map(|line| serde_json::from_str(line).unwrap()).collect() };
    let first = lines(&world.rlflow(&["run", "flow.toml", "--json"]));
    assert!(first.iter().all(|line| line["event"].is_string() && line["time"].is_f64()));
    let last = first.last().unwrap();
    assert_eq!((&last["event"], &last["ok"]), (&"finished".into(), &true.into()));
    assert!(last["seconds"].is_f64());
    let stages = last["stages"].as_array().unwrap();
    assert_eq!(stages.iter().map(|stage| stage["name"].as_str().unwrap()).collect::<Vec<_>>(), ["corpus", "tokenizer"]);
    assert!(stages.iter().all(|stage| stage["status"] == "ran" && stage["reason"]["text"].is_string() && stage["seconds"].is_f64()));
    let second = lines(&world.rlflow(&["run", "flow.toml", "--json"]));
    let cached = second.last().unwrap()["stages"].as_array().unwrap();
    for (ran, cached) in stages.iter().zip(cached) {
        assert_eq!((&cached["status"], &cached["reason"], &cached["outputs"]), (&"cached".into(), &Value::Null, &ran["outputs"]));
        assert_eq!(cached["outputs"].as_object().unwrap().values().next().unwrap().as_str().unwrap().len(), 64);
    }
}

#[test]
fn changes_are_explained_and_renames_rerun_nothing() {
    let world = World::new();
    world.rlflow(&["run", "flow.toml", "-q"]);
    let plan = world.json(&["plan", "flow.toml", "--set", "stage.tokenizer.vocab_size=310", "--json"]);
    assert_eq!(statuses(&plan), ["cached", "run"]);
    let reason = &plan["stages"][1]["reason"];
    assert_eq!((&reason["kind"], &reason["from"], &reason["to"]), (&"setting_changed".into(), &300.into(), &310.into()));
    assert_eq!(reason["text"], "vocab_size changed: 300 -> 310");
    // The same everywhere, before and after.
    assert_eq!(world.json(&["status", "flow.toml", "--set", "stage.tokenizer.vocab_size=310", "--json"])["stages"][1]["reason"], *reason);
    let ran = stdout(&world.rlflow(&["run", "flow.toml", "--set", "stage.tokenizer.vocab_size=310", "--json"]));
    let finished: Value = serde_json::from_str(ran.lines().last().unwrap()).unwrap();
    assert_eq!(finished["stages"][1]["reason"], *reason);
    fs::write(world.path("flow.toml"), WORKFLOW.replace("stage.corpus", "stage.texts").replace("= \"corpus\" }", "= \"texts\" }")).unwrap();
    assert_eq!(statuses(&world.json(&["plan", "flow.toml", "--json"])), ["cached", "cached"]);
    let forced = world.rlflow(&["run", "flow.toml", "--force", "texts"]);
    assert!(stdout(&forced).contains("ran, same output"), "{}", stdout(&forced));
}

#[test]
fn wrong_requests_exit_with_2_before_anything_runs() {
    let world = World::new();
    let errors = |arguments: &[&str], codes: &[&str]| {
        let output = world.rlflow(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert_eq!(stdout(&output).lines().count(), 1);
        let value: Value = serde_json::from_str(&stdout(&output)).unwrap();
        let found: Vec<&str> = value["errors"].as_array().unwrap().iter().map(|error| error["code"].as_str().unwrap()).collect();
        assert_eq!(found, codes, "{value}");
        value
    };
    errors(&["run", "missing.toml", "--json"], &["missing_file"]);
    let value = errors(&["run", "flow.toml", "tokeniser", "--json"], &["unknown_stage"]);
    assert_eq!(value["errors"][0]["hint"], "did you mean `tokenizer`?");
    errors(&["run", "flow.toml", "--no-such-option", "--json"], &["usage"]);
    errors(&["show", "flow.toml", "tokenizer", "--json"], &["no_result"]);
    errors(&["gc", "--store", "nowhere", "--json"], &["no_store"]);
    fs::write(world.path("flow.toml"), WORKFLOW.replace("vocab_size = 300", "vocab_sizes = 300\nseed = \"x\"")).unwrap();
    let output = world.rlflow(&["run", "flow.toml"]);
    assert_eq!((output.status.code(), stdout(&output).as_str()), (Some(2), ""));
    let report = stderr(&output);
    assert!(report.contains("vocab_sizes") && report.contains("flow.toml") && report.contains("2 errors"), "{report}");
    assert!(!world.path(".rlflow/actions").exists());
}

#[test]
fn results_can_be_looked_at() {
    let world = World::new();
    world.rlflow(&["run", "flow.toml", "-q"]);
    let metrics = world.json(&["metrics", "flow.toml", "--json"]);
    assert!(metrics["stages"]["corpus"]["final"].is_object() && metrics["stages"]["corpus"]["series"].is_object());
    let show = world.json(&["show", "flow.toml", "tokenizer", "--json"]);
    assert_eq!((&show["name"], &show["stale"]), (&"tokenizer".into(), &false.into()));
    let digest = show["outputs"].as_object().unwrap().values().next().unwrap().as_str().unwrap();
    let lineage = world.json(&["lineage", "flow.toml", digest, "--json"]);
    assert_eq!(lineage["nodes"].as_array().unwrap().len(), 2);
    assert!(stdout(&world.rlflow(&["lineage", "flow.toml", "tokenizer"])).contains("file texts/a.txt"));
    let log = world.json(&["log", "--json"]);
    assert_eq!((log["runs"].as_array().unwrap().len(), &log["runs"][0]["ok"]), (1, &true.into()));
    assert!(stdout(&world.rlflow(&["graph", "flow.toml", "--format", "mermaid"])).starts_with("flowchart"));
    assert!(stdout(&world.rlflow(&["graph", "flow.toml", "--format", "dot"])).contains("digraph"));
    assert_eq!(world.json(&["devices", "--json"])["devices"][0]["device"], "cpu");
    assert!(world.json(&["schema"])["properties"].is_object());
    assert_eq!(world.json(&["fsck", "--json"])["ok"], true);
    assert!(world.json(&["du", "--json"])["physical_bytes"].as_u64().unwrap() > 0);
    assert_eq!(world.json(&["pin", "flow.toml", "tokenizer", "--json"])["pinned"], true);
    assert_eq!(world.json(&["gc", "--dry-run", "--json"])["dry_run"], true);
    assert!(stdout(&world.rlflow(&["completions", "bash"])).contains("rlflow"));
}

/// Rows of data sets as the model sees them: calls of tools included, what counts in the loss between marks.
#[test]
fn show_tells_what_counts() {
    let world = World::new();
    let stages = "\n[stage.chats]\nkind = \"instructions\"\ninputs = { tokenizer = \"tokenizer\" }\nsources = [{ path = \"chats.jsonl\" }]\nheldout = 0\n\
                  [stage.pairs]\nkind = \"preferences\"\ninputs = { tokenizer = \"tokenizer\" }\nsources = [{ path = \"pairs.csv\" }]\nheldout = 0\n\
                  [stage.asks]\nkind = \"prompts\"\ninputs = { tokenizer = \"tokenizer\" }\nsources = [{ path = \"asks.txt\" }]\nheldout = 0\n";
    let template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}\
                    {% for call in m.tool_calls %}{{ call.function | tojson }}{% endfor %}{{ '<|im_end|>' }}{% endgeneration %}{% else %}\
                    {{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
    fs::write(world.path("chat.jinja"), template).unwrap();
    let special = "chat_template_file = \"chat.jinja\"\nspecial_tokens = [\"<|im_start|>\"]\n";
    fs::write(world.path("flow.toml"), format!("{WORKFLOW}{special}{stages}")).unwrap();
    let call = r#"{"type": "function", "function": {"name": "add", "arguments": "{\"a\": 1}"}}"#;
    let row = format!(
        r#"{{"messages": [{{"role": "user", "content": "Sum?\u001b[2J"}}, {{"role": "assistant", "content": null, "tool_calls": [{call}]}},
        {{"role": "tool", "content": "3"}}, {{"role": "assistant", "content": "Three"}}]}}"#
    );
    fs::write(world.path("chats.jsonl"), row.replace('\n', " ")).unwrap();
    fs::write(world.path("pairs.csv"), "prompt,chosen,rejected,margin\nHi,Hello,No,0.5\n").unwrap();
    fs::write(world.path("asks.txt"), "Who?\n").unwrap();
    let output = world.rlflow(&["run", "flow.toml", "-q"]);
    assert!(output.status.success(), "{}", stderr(&output));

    let chats = stdout(&world.rlflow(&["show", "flow.toml", "chats"]));
    let call = "⟦{\"name\": \"add\", \"arguments\": {\"a\": 1}}<|im_end|>⟧";
    let expected = format!(
        "       <|im_start|>user\n       Sum?␛[2J<|im_end|><|im_start|>assistant\n       {call}<|im_start|>tool\n       \
         3<|im_end|><|im_start|>assistant\n       ⟦Three<|im_end|>⟧\n"
    );
    assert!(chats.contains(&expected) && !chats.contains('\u{1b}'), "{chats}");
    let chats = &world.json(&["show", "flow.toml", "chats", "--json"])["artifacts"]["conversations"]["rows"][0]["parts"][0];
    let list = |name: &str| chats[name].as_array().unwrap().clone();
    let (tokens, ids, counted) = (list("tokens"), list("ids"), list("counted"));
    assert!(tokens.len() == ids.len() && ids.len() == counted.len() && tokens[0] == "<|im_start|>");
    assert_eq!(counted.iter().zip(&tokens).rfind(|(counts, _)| **counts == true).unwrap().1, "<|im_end|>");
    assert_eq!(chats["name"], "conversation");

    let pairs = &world.json(&["show", "flow.toml", "pairs", "--json"])["artifacts"]["preferences"]["rows"][0];
    let part = |at: usize| (pairs["parts"][at]["name"].as_str().unwrap(), pairs["parts"][at]["text"].as_str().unwrap());
    assert_eq!(part(0), ("prompt", "<|im_start|>user\nHi<|im_end|><|im_start|>assistant\n"));
    assert_eq!((part(1), part(2), &pairs["margin"]), (("chosen", "Hello<|im_end|>"), ("rejected", "No<|im_end|>"), &0.5.into()));
    assert_eq!(pairs["parts"][0]["counted"][0], false);
    let asks = stdout(&world.rlflow(&["show", "flow.toml", "asks"]));
    assert!(asks.contains("1. train\n     prompt, ") && asks.contains("Who?<|im_end|>") && !asks.contains('⟦'), "{asks}");
    let corpus = stdout(&world.rlflow(&["show", "flow.toml", "corpus", "-n", "1"]));
    assert!(corpus.contains("1. train\n     document\n       Line "), "{corpus}");
}

#[test]
fn the_store_can_be_elsewhere() {
    let world = World::new();
    world.rlflow(&["run", "flow.toml", "-q", "--store", "kept here"]);
    assert!(world.path("kept here/VERSION").exists() && !world.path(".rlflow").exists());
    let mut command = Command::new(env!("CARGO_BIN_EXE_rlflow"));
    let output =
        command.current_dir(world.0.path()).args(["plan", "flow.toml", "--json"]).env("RLFLOW_STORE", "kept here").output().unwrap();
    assert_eq!(statuses(&serde_json::from_str(&stdout(&output)).unwrap()), ["cached", "cached"]);
}

#[test]
fn what_is_printed_to_look_at_results_keeps_settings_and_store() {
    let world = World::new();
    let set = "stage.tokenizer.vocab_size=301";
    let table = stdout(&world.rlflow(&["run", "flow.toml", "-q", "--set", set, "--store", "kept here"]));
    let show = format!("  rlflow show flow.toml --set {set} --store 'kept here' tokenizer\n");
    assert!(table.contains(&show), "{table}");
}

#[cfg(target_os = "linux")]
#[test]
fn data_that_cannot_be_written_fail_the_command() {
    for arguments in [&["completions", "bash"][..], &["schema", "--json"], &["--help"]] {
        let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let output = Command::new(env!("CARGO_BIN_EXE_rlflow")).args(arguments).stdout(full).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        assert!(stderr(&output).starts_with("error: cannot write to standard output: "), "{}", stderr(&output));
    }
}

/// The example that nobody has the machine for: planned, refused where it does not fit, and never begun.
#[test]
fn a_plan_counts_the_memory_of_devices_that_are_not_here() {
    let world = World::new();
    let workflow = concat!(env!("CARGO_MANIFEST_DIR"), "/workflows/ppo-7b.toml");
    let plan = |sets: &[&str]| {
        let sets = sets.iter().flat_map(|set| ["--set", set]);
        world.json(&["plan", workflow, "--store", "store", "--json"].into_iter().chain(sets).collect::<Vec<_>>())
    };
    let stage = |plan: &Value, name: &str| plan["stages"].as_array().unwrap().iter().find(|stage| stage["name"] == name).unwrap().clone();
    let planned = plan(&[]);
    for found in planned["stages"].as_array().unwrap() {
        assert!(found["peak_bytes"].as_u64().unwrap() <= 1_000_000_000_000, "{found}");
    }
    // The same on any processor.
    let mut elsewhere = Command::new(env!("CARGO_BIN_EXE_rlflow"));
    elsewhere.current_dir(world.0.path()).args(["plan", workflow, "--store", "store", "--json"]);
    elsewhere.env_remove("RLFLOW_STORE").env("RLFLOW_SIMD", "baseline");
    assert_eq!(serde_json::from_slice::<Value>(&elsewhere.output().unwrap().stdout).unwrap(), planned);
    let (pretrain, ppo) = (stage(&planned, "pretrain"), stage(&planned, "ppo"));
    assert_eq!((&pretrain["ranks"], &pretrain["zero"], &pretrain["devices"][7]), (&8.into(), &3.into(), &"cuda:7".into()));
    // bf16 with fp32 masters at ZeRO 3 on eight ranks: 2/8 bytes of each parameter, 12/8 of optimizer state.
    let parts = &pretrain["rank_bytes"];
    let ratio = parts["optimizer"].as_f64().unwrap() / parts["parameters"].as_f64().unwrap();
    assert!((ratio - 6.0).abs() < 1e-6, "{parts}");
    // Two frozen models wait in host memory; four models share eight devices.
    assert!(ppo["memory"]["cpu"].as_u64().unwrap() > 10_000_000_000, "{}", ppo["memory"]);
    assert!((0..8).all(|index| ppo["memory"][format!("cuda:{index}")].as_u64().unwrap() < 80_000_000_000), "{}", ppo["memory"]);

    // At level 0 every GPU would hold all of the optimizer's state.
    let refused = plan(&["defaults.zero=0"]);
    let errors = refused["errors"].as_array().unwrap();
    let of = |name: &str| errors.iter().find(|error| error["message"].as_str().unwrap().contains(&format!("`{name}`"))).unwrap();
    assert!(errors.iter().all(|error| error["code"] == "does_not_fit"), "{refused}");
    assert!(of("pretrain")["message"].as_str().unwrap().contains("on cuda:0, which has 74.5 GiB"), "{}", of("pretrain"));
    assert!(of("pretrain")["hint"].as_str().unwrap().starts_with("zero = "), "{}", of("pretrain"));
    assert!(of("ppo")["hint"].as_str().unwrap().contains("zero = 3 for all of them: "), "{}", of("ppo"));
    // With all that can wait on the host there, what sampling gathers is too much.
    let tight = |sets: &[&str]| {
        let refused = plan(&[&["devices.cuda.memory=\"36 GB\"", "stage.ppo.batch_size=32", "defaults.offload=\"cpu\""], sets].concat());
        let errors = refused["errors"].as_array().cloned().unwrap_or_default();
        let of_ppo = errors.into_iter().find(|error| error["message"].as_str().unwrap().contains("`ppo`"));
        of_ppo.map(|error| error["hint"].as_str().unwrap().to_owned())
    };
    let hint = tight(&[]).unwrap();
    assert!(hint.starts_with("gather_for_generation = false: "), "{hint}");
    // What a hint says is so.
    assert_eq!(tight(&["stage.ppo.gather_for_generation=false"]), None);
    // The lowest level that fits is found, too.
    let auto = stage(&plan(&["defaults.zero=\"auto\""]), "pretrain");
    let lowest = auto["zero"].as_u64().unwrap();
    assert!((1..3).contains(&lowest), "{auto}");
    assert!(of("pretrain")["hint"].as_str().unwrap().starts_with(&format!("zero = {lowest} on 8 devices")), "{}", of("pretrain"));

    // What a rank of PPO holds is what its roles hold there; most while it samples, when there are no gradients.
    let parts = &ppo["rank_bytes"];
    assert!(["parameters", "optimizer", "buffers"].iter().all(|part| parts[part].as_u64() > Some(0)), "{parts}");

    let output = world.rlflow(&["run", workflow, "--store", "store"]);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(stderr(&output).contains("`cuda:0` is declared in `[devices]`, but this machine has none"), "{}", stderr(&output));
}

/// Who leaves the device to rlflow plans with what is declared, and runs on what is here.
#[cfg(not(feature = "cuda"))]
#[test]
fn what_leaves_its_device_open_runs_here() {
    let world = World::new();
    let more = r#"
[stage.base]
kind = "pretrain"
inputs = { corpus = "corpus", tokenizer = "tokenizer" }
model = { hidden_size = 8, layers = 1, heads = 1, context = 16 }
train = { steps = 1, batch_size = 1 }

[devices]
cuda = { count = 2, memory = "80 GB" }
"#;
    fs::write(world.path("flow.toml"), format!("{WORKFLOW}{more}")).unwrap();
    let planned = world.json(&["plan", "flow.toml", "--json"]);
    assert_eq!(planned["stages"][2]["devices"][0], "cuda:0", "{planned}");
    let output = world.rlflow(&["run", "flow.toml"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(stderr(&output).contains("`device = \"auto\"` runs on what it has"), "{}", stderr(&output));
}
