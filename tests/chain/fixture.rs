//! The quickstart, shrunk to seconds, in a folder of its own.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use serde_json::Value;

pub const SHRINK: &[&str] = &[
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

pub const ALL: [&str; 15] = [
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

/// A copy of the quickstart with stores of its own.
pub struct Fixture {
    folder: tempfile::TempDir,
    shrink: &'static [&'static str],
}

impl Fixture {
    /// Shrunk.
    pub fn new() -> Self {
        Self::with(SHRINK)
    }

    /// As users have it: minutes.
    pub fn full_size() -> Self {
        Self::with(&[])
    }

    fn with(shrink: &'static [&'static str]) -> Self {
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
        Self { folder, shrink }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn edit(&self, name: &str, change: impl FnOnce(String) -> String) {
        let path = self.path(name);
        fs::write(&path, change(fs::read_to_string(&path).unwrap())).unwrap();
    }

    pub fn command(&self, store: &str, sets: &[&str]) -> Command {
        self.rlflow(store, &["run", "--json"], sets)
    }

    /// `rlflow` with `arguments` on the workflow.
    pub fn rlflow(&self, store: &str, arguments: &[&str], sets: &[&str]) -> Command {
        // The index is never the truth: every test must pass without it, too.
        if std::env::var_os("RLFLOW_TEST_WITHOUT_INDEX").is_some() {
            let _ = fs::remove_dir_all(self.path(store).join("index"));
        }
        let mut command = binary();
        command.args(arguments).arg(self.path("quickstart.toml")).arg("--store").arg(self.path(store));
        for set in self.shrink.iter().chain(sets) {
            command.args(["--set", set]);
        }
        command.env_remove("RLFLOW_STORE").stdin(Stdio::null());
        command
    }

    /// `rlflow` with `arguments` that are about a store, whatever workflow filled it.
    pub fn on_store(&self, store: &str, arguments: &[&str]) -> Output {
        let mut command = binary();
        command.args(arguments).arg("--store").arg(self.path(store)).env_remove("RLFLOW_STORE").output().unwrap()
    }

    /// What `arguments` say of the workflow as JSON.
    pub fn json(&self, store: &str, arguments: &[&str], sets: &[&str]) -> Value {
        let output = self.rlflow(store, arguments, sets).arg("--json").output().unwrap();
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)))
    }

    pub fn run(&self, store: &str, sets: &[&str]) -> Finished {
        Finished::of(self.command(store, sets).output().unwrap())
    }
}

/// The command. Runs of an hour name a copy, which no build replaces meanwhile.
fn binary() -> Command {
    Command::new(std::env::var_os("RLFLOW_TEST_BINARY").unwrap_or_else(|| env!("CARGO_BIN_EXE_rlflow").into()))
}

/// The last event of a run.
pub struct Finished {
    pub code: Option<i32>,
    pub event: Value,
    pub output: Output,
}

impl Finished {
    pub fn of(output: Output) -> Self {
        let last = String::from_utf8_lossy(&output.stdout).lines().last().unwrap_or("null").to_owned();
        let event: Value = serde_json::from_str(&last).unwrap_or(Value::Null);
        if event["event"] != "finished" && event["errors"].is_null() {
            panic!("no finished event: {last}\n{}", String::from_utf8_lossy(&output.stderr));
        }
        Self { code: output.status.code(), event, output }
    }

    pub fn stages(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.event["stages"].as_array().into_iter().flatten().map(|stage| (stage["name"].as_str().unwrap(), stage))
    }

    pub fn with_status(&self, statuses: &[&str]) -> BTreeSet<String> {
        let wanted = |stage: &Value| statuses.contains(&stage["status"].as_str().unwrap());
        self.stages().filter(|(_, stage)| wanted(stage)).map(|(name, _)| name.to_owned()).collect()
    }

    pub fn ran(&self) -> BTreeSet<String> {
        self.with_status(&["ran", "resumed", "extended"])
    }

    pub fn outputs(&self) -> BTreeMap<String, Value> {
        self.stages().map(|(name, stage)| (name.to_owned(), stage["outputs"].clone())).collect()
    }

    pub fn succeeded(self) -> Self {
        assert_eq!(self.code, Some(0), "{}\n{}", self.event, String::from_utf8_lossy(&self.output.stderr));
        self
    }
}

pub fn names(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}
