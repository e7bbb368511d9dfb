//! The whole chain through the real binary: `workflows/quickstart.toml`, shrunk by `--set` to seconds. What reruns
//! and what does not, results to the bit over threads, kills and stores, and failures that leave nothing behind.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;

const SHRINK: &[&str] = &[
    "stage.corpus.max_documents=300",
    "stage.tokenizer.vocab_size=400",
    "stage.pretrain.model={ hidden_size = 32, layers = 2, heads = 4, kv_heads = 2, context = 128, tie_embeddings = true }",
    "stage.pretrain.train={ steps = 6, batch_size = 4, lr = 3e-3 }",
    "stage.sft.train={ steps = 6, batch_size = 4, lr = 1e-3 }",
    // So few rows that every pair is visited: a change of any of them is a change of the result.
    "stage.preferences.max_rows=12",
    "stage.reward_model.train={ steps = 6, batch_size = 8, lr = 1e-3 }",
    "stage.ppo.steps=3",
    "stage.ppo.batch_size=8",
    "stage.ppo.num_mini_batches=2",
    "stage.ppo.max_new_tokens=8",
    "stage.dpo.train={ steps = 6, batch_size = 8, lr = 1e-3 }",
    "stage.eval.max_prompts=6",
    "stage.eval.max_new_tokens=8",
];

const ALL: [&str; 15] = [
    "corpus",
    "tokenizer",
    "pretrain",
    "instructions",
    "preferences",
    "prompts",
    "sft",
    "reward_model",
    "actor",
    "critic",
    "ref",
    "reward",
    "ppo",
    "dpo",
    "eval",
];

/// A copy of the quickstart with a store of its own.
struct Fixture {
    folder: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("workflows");
        fs::create_dir(folder.path().join("quickstart")).unwrap();
        fs::copy(source.join("quickstart.toml"), folder.path().join("quickstart.toml")).unwrap();
        for entry in fs::read_dir(source.join("quickstart")).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "jsonl") {
                fs::copy(&path, folder.path().join("quickstart").join(path.file_name().unwrap())).unwrap();
            }
        }
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn edit(&self, name: &str, change: impl FnOnce(String) -> String) {
        let path = self.path(name);
        fs::write(&path, change(fs::read_to_string(&path).unwrap())).unwrap();
    }

    fn command(&self, store: &str, sets: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_rlflow"));
        command.args(["run", "--json"]).arg(self.path("quickstart.toml")).arg("--store").arg(self.path(store));
        for set in SHRINK.iter().chain(sets) {
            command.args(["--set", set]);
        }
        command.env_remove("RLFLOW_STORE").stdin(Stdio::null());
        command
    }

    fn run(&self, store: &str, sets: &[&str]) -> Finished {
        Finished::of(self.command(store, sets).output().unwrap())
    }
}

/// The last event of a run.
struct Finished {
    code: Option<i32>,
    event: Value,
    output: Output,
}

impl Finished {
    fn of(output: Output) -> Self {
        let last = String::from_utf8_lossy(&output.stdout).lines().last().unwrap_or("null").to_owned();
        let event: Value = serde_json::from_str(&last).unwrap_or(Value::Null);
        if event["event"] != "finished" && event["errors"].is_null() {
            panic!("no finished event: {last}\n{}", String::from_utf8_lossy(&output.stderr));
        }
        Self { code: output.status.code(), event, output }
    }

    fn stages(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.event["stages"].as_array().into_iter().flatten().map(|stage| (stage["name"].as_str().unwrap(), stage))
    }

    fn with_status(&self, statuses: &[&str]) -> BTreeSet<String> {
        let wanted = |stage: &Value| statuses.contains(&stage["status"].as_str().unwrap());
        self.stages().filter(|(_, stage)| wanted(stage)).map(|(name, _)| name.to_owned()).collect()
    }

    fn ran(&self) -> BTreeSet<String> {
        self.with_status(&["ran", "resumed", "extended"])
    }

    fn outputs(&self) -> BTreeMap<String, Value> {
        self.stages().map(|(name, stage)| (name.to_owned(), stage["outputs"].clone())).collect()
    }

    fn succeeded(self) -> Self {
        assert_eq!(self.code, Some(0), "{}\n{}", self.event, String::from_utf8_lossy(&self.output.stderr));
        self
    }
}

fn names(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn only_what_changed_runs_again() {
    let fixture = Fixture::new();
    let first = fixture.run("store", &[]).succeeded();
    assert_eq!(first.ran(), names(&ALL));

    let second = fixture.run("store", &[]).succeeded();
    assert_eq!(second.ran(), names(&[]));
    assert_eq!(second.outputs(), first.outputs(), "cached stages give the same outputs");

    // One number.
    let beta = fixture.run("store", &["stage.dpo.beta=0.3"]).succeeded();
    assert_eq!(beta.ran(), names(&["dpo", "eval"]));
    let reason = beta.stages().find(|(name, _)| *name == "dpo").unwrap().1["reason"].clone();
    assert_eq!((reason["from"].as_f64(), reason["to"].as_f64()), (Some(0.1), Some(0.3)), "{reason}");

    // A default spelled out, execution settings, and stages renamed: nothing.
    let spelled = [
        "stage.dpo.train.eps=1e-8",
        "stage.dpo.label_smoothing=0",
        "stage.ppo.gamma=1",
        "stage.sft.device=\"cpu\"",
        "stage.sft.snapshot_every=2",
    ];
    assert_eq!(fixture.run("store", &spelled).succeeded().ran(), names(&[]));
    fixture.edit("quickstart.toml", |text| text.replace("[stage.ref]", "[stage.anchor]").replace("ref = \"ref\"", "ref = \"anchor\""));
    let renamed = fixture.run("store", &[]).succeeded();
    assert_eq!(renamed.ran(), names(&[]), "a renamed stage keeps its result");

    // One preference row.
    fixture.edit("quickstart/preferences.jsonl", |text| {
        let (first, rest) = text.split_once('\n').unwrap();
        let mut row: Value = serde_json::from_str(first).unwrap();
        row["rejected"] = "Nobody knows.".into();
        format!("{row}\n{rest}")
    });
    let changed = fixture.run("store", &[]).succeeded();
    assert_eq!(changed.ran(), names(&["preferences", "reward_model", "critic", "reward", "ppo", "dpo", "eval"]));
}

#[test]
fn results_depend_on_the_seed_and_on_nothing_around_it() {
    let fixture = Fixture::new();
    let with_threads = |store: &str, threads: &str, sets: &[&str]| {
        let output = fixture.command(store, sets).env("RAYON_NUM_THREADS", threads).output().unwrap();
        Finished::of(output).succeeded().outputs()
    };
    let one = with_threads("one", "1", &[]);
    assert_eq!(one, with_threads("two", "2", &[]), "one thread or two");
    assert_eq!(one, with_threads("three", "3", &["stage.pretrain.gradient_checkpointing=true", "stage.dpo.gradient_checkpointing=true"]));
    let other = with_threads("other", "2", &["seed=2"]);
    for stage in ["pretrain", "sft", "reward_model", "ppo", "dpo"] {
        assert_ne!(one[stage], other[stage], "{stage} does not depend on the seed");
    }
    assert_eq!(one["corpus"], other["corpus"], "every document once: nothing is drawn");
}

/// Kills the process at moments spread over the run; the last run's outputs, metrics and samples must be those of a run
/// that nobody touched.
#[test]
fn a_killed_run_continues_to_the_same_bits() {
    let fixture = Fixture::new();
    let sets = ["pretrain", "sft", "reward_model", "ppo", "dpo"].map(|stage| format!("stage.{stage}.snapshot_every=1"));
    let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
    let start = Instant::now();
    let untouched = fixture.run("untouched", &sets).succeeded();
    let whole = start.elapsed();
    let mut resumed = false;
    for kill in 1..=12u32 {
        let mut child = fixture.command("killed", &sets).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(40) + whole * kill / 30);
        let _ = child.kill();
        let _ = child.wait();
        let log = fixture.path("killed").join("partial");
        resumed |= log.is_dir();
    }
    assert!(resumed, "no snapshot was ever written");
    let last = fixture.run("killed", &sets).succeeded();
    assert_eq!(last.outputs(), untouched.outputs());
    let metrics = |store: &str| {
        let output = Command::new(env!("CARGO_BIN_EXE_rlflow"))
            .args(["metrics", "--json"])
            .arg(fixture.path("quickstart.toml"))
            .arg("--store")
            .arg(fixture.path(store))
            .args(SHRINK.iter().flat_map(|set| ["--set", set]))
            .output()
            .unwrap();
        let mut metrics: Value = serde_json::from_slice(&output.stdout).unwrap();
        for stage in metrics["stages"].as_object_mut().unwrap().values_mut() {
            // Measured, not computed.
            stage["final"].as_object_mut().unwrap().remove("tokens_per_s");
        }
        metrics
    };
    assert_eq!(metrics("killed"), metrics("untouched"));
    // On-policy: the first minibatch of every step has ratio exactly 1.
    let ppo = metrics("untouched")["stages"]["ppo"].clone();
    let errors = ppo["series"]["policy/first_ratio_error"].as_array().unwrap().clone();
    assert_eq!(errors.len(), 3);
    assert!(errors.iter().all(|point| point[1] == 0.0), "{errors:?}");
    assert!(
        ppo["series"]["policy/approxkl_avg"].as_array().unwrap().iter().any(|point| point[1].as_f64().unwrap() > 0.0),
        "nothing was learnt"
    );
}

#[test]
fn divergence_is_an_error_that_leaves_nothing_cached() {
    let fixture = Fixture::new();
    let diverging = ["stage.sft.train={ steps = 30, batch_size = 4, lr = 1e30, grad_clip = 0 }"];
    let failed = fixture.run("store", &diverging);
    assert_eq!(failed.code, Some(1));
    assert_eq!(failed.with_status(&["failed"]), names(&["sft"]));
    let stderr = String::from_utf8_lossy(&failed.output.stderr).into_owned();
    assert!(stderr.contains("not finite") && stderr.contains("step "), "{stderr}");
    let again = fixture.run("store", &diverging);
    assert_eq!(again.with_status(&["failed"]), names(&["sft"]), "a failure is not cached");
    fixture.run("store", &[]).succeeded();
}

/// The shared backbone trains one trunk for both, and top-k, top-p and the adaptive coefficient do something.
#[test]
fn settings_of_ppo_have_their_effect() {
    let fixture = Fixture::new();
    let base = fixture.run("store", &[]).succeeded().outputs()["ppo"].clone();
    for set in [
        "stage.ppo.share_backbone=true",
        "stage.ppo.kl_controller={ type = \"adaptive\", target = 0.5, horizon = 100 }",
        "stage.ppo.top_k=5",
        "stage.ppo.top_p=0.5",
        "stage.ppo.missing_eos_penalty=1",
        "stage.ppo.kl_estimator=\"k3\"",
        "stage.ppo.entropy_coef=0.1",
        "stage.ppo.whiten_rewards=true",
        "stage.ppo.whiten_advantages=false",
        "stage.ppo.gae_lambda=0.5",
        "stage.ppo.clip_range=0.0001",
        "stage.actor.train.lr=1e-3",
    ] {
        let finished = fixture.run("store", &[set]).succeeded();
        assert!(finished.ran().contains("ppo"), "{set}");
        assert_ne!(finished.outputs()["ppo"], base, "{set} changes nothing");
    }
}
