//! A Hugging Face checkpoint comes in, is trained for a step, and goes out, through the binary.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use serde_json::Value;
use tempfile::TempDir;

const TRAIN: &str = r#"
[stage.data]
kind = "instructions"
inputs = { tokenizer = "base.tokenizer" }
sources = [{ path = "rows.jsonl" }]

[stage.sft]
kind = "sft"
inputs = { model = "base", data = "data" }
train = { steps = 1, batch_size = 2, lr = 1e-3 }

[stage.tuned]
kind = "sft"
inputs = { model = "base", data = "data" }
train = { steps = 4, batch_size = 2, lr = 3e-2, schedule = "constant" }
lora = { rank = 2, alpha = 16 }
"#;

struct World(TempDir);

impl World {
    fn new() -> Self {
        let world = Self(TempDir::new().unwrap());
        let row = |at: usize| format!("{{\"instruction\": \"Say {at}.\", \"output\": \"{at} it is.\"}}\n");
        fs::write(world.path("rows.jsonl"), (0..8).map(row).collect::<String>()).unwrap();
        world
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn rlflow(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_rlflow"));
        command.current_dir(self.0.path()).args(arguments).env_remove("RLFLOW_STORE").env_remove("RUST_LOG").output().unwrap()
    }

    fn succeeds(&self, arguments: &[&str]) -> String {
        let output = self.rlflow(arguments);
        let (stdout, stderr) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8_lossy(&output.stderr).into_owned());
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {stdout}{stderr}");
        stdout
    }

    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    fn json(&self, name: &str) -> Value {
        serde_json::from_slice(&self.read(name)).unwrap()
    }
}

fn fixture(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/hf_models").join(name).display().to_string()
}

fn fixture_json(name: &str) -> Value {
    serde_json::from_slice(&fs::read(fixture(name)).unwrap()).unwrap()
}

#[test]
fn a_checkpoint_comes_in_is_trained_and_goes_out() {
    let world = World::new();
    world.succeeds(&["import", "flow.toml", "base", &fixture("llama3")]);
    let text = fs::read_to_string(world.path("flow.toml")).unwrap();
    assert!(text.starts_with("[stage.base]\nkind = \"import\"\npath = "), "{text}");
    // Once more changes nothing, and another checkpoint does not take its name.
    assert!(world.succeeds(&["import", "flow.toml", "base", &fixture("llama3")]).contains("cached"));
    assert_eq!(fs::read_to_string(world.path("flow.toml")).unwrap(), text);
    assert_eq!(world.rlflow(&["import", "flow.toml", "base", &fixture("qwen2")]).status.code(), Some(2));
    assert_eq!(world.rlflow(&["import", "flow.toml", "none", "nowhere"]).status.code(), Some(2));
    assert_eq!(fs::read_to_string(world.path("flow.toml")).unwrap(), text);

    fs::write(world.path("flow.toml"), text + TRAIN).unwrap();
    world.succeeds(&["run", "flow.toml"]);
    let told: Value = serde_json::from_str(&world.succeeds(&["export", "flow.toml", "sft", "out/sft", "--json"])).unwrap();
    assert_eq!(told["size_bytes"], 38_136 * 4);
    assert_eq!(world.json("out/sft/config.json"), fixture_json("llama3/config.json"));
    assert_eq!(world.read("out/sft/tokenizer.json"), fs::read(fixture("llama3/tokenizer.json")).unwrap());
    assert_eq!(world.rlflow(&["export", "flow.toml", "sft", "out/sft"]).status.code(), Some(2), "what is there is not overwritten");
    assert_eq!(world.rlflow(&["export", "flow.toml", "data", "out/data"]).status.code(), Some(2), "rows are not a model");

    // What went out is the trained model: it comes back in as the same weights, which are others than before.
    world.succeeds(&["import", "flow.toml", "back", "out/sft"]);
    assert!(fs::read_to_string(world.path("flow.toml")).unwrap().contains("path = \"out/sft\""));
    world.succeeds(&["export", "flow.toml", "back", "out/back"]);
    assert_eq!(world.read("out/back/model.safetensors"), world.read("out/sft/model.safetensors"));
    world.succeeds(&["export", "flow.toml", "base", "out/base", "--max-shard-size", "60kB"]);
    assert!(world.path("out/base/model.safetensors.index.json").exists());
    world.succeeds(&["import", "flow.toml", "again", "out/base"]);
    let digest = |stage: &str| {
        let shown: Value = serde_json::from_str(world.succeeds(&["run", "flow.toml", stage, "--json"]).lines().last().unwrap()).unwrap();
        shown["stages"].as_array().unwrap().iter().find(|found| found["name"] == stage).unwrap()["outputs"]["model"].clone()
    };
    assert_eq!(digest("again"), digest("base"), "shards and order are not part of a model");
    assert_ne!(digest("back"), digest("base"));
    let answer = |stage: &str| {
        world.succeeds(&["generate", "flow.toml", stage, "--prompt", "Say 3.", "--max-new-tokens", "6", "--temperature", "0"])
    };
    assert_eq!(answer("back"), answer("sft"));

    // An adapter goes out by itself, and comes back in on the model that it was trained on.
    world.succeeds(&["export", "flow.toml", "tuned", "out/adapter", "--adapter"]);
    let alone = world.rlflow(&["import", "flow.toml", "alone", "out/adapter"]);
    assert!(alone.status.code() == Some(2) && String::from_utf8_lossy(&alone.stderr).contains("inputs = { model ="), "{alone:?}");
    world.succeeds(&["import", "flow.toml", "peft", "out/adapter", "--model", "base"]);
    assert_eq!(answer("peft"), answer("tuned"));
    assert!(world.succeeds(&["import", "flow.toml", "peft", "out/adapter", "--model", "base"]).contains("cached"));
    assert_eq!(
        world.rlflow(&["import", "flow.toml", "peft", "out/adapter", "--model", "sft"]).status.code(),
        Some(2),
        "another model below"
    );
    assert_ne!(answer("peft"), answer("base"));
    world.succeeds(&["export", "flow.toml", "peft", "out/adapter-again", "--adapter"]);
    assert_eq!(world.read("out/adapter-again/adapter_model.safetensors"), world.read("out/adapter/adapter_model.safetensors"));
    world.succeeds(&["export", "flow.toml", "peft", "out/merged"]);
}

/// bf16 weights, a window, GPT-2's parts and a reward model: everything that trains, trains on imports.
#[test]
fn imports_of_every_family_train() {
    let world = World::new();
    for name in ["mistral", "qwen2", "qwen3", "gpt2"] {
        let flow = format!("{name}.toml");
        let stage = format!("[stage.base]\nkind = \"import\"\npath = {:?}\n{TRAIN}", fixture(name));
        fs::write(world.path(&flow), stage).unwrap();
        world.succeeds(&["run", &flow]);
        world.succeeds(&["export", &flow, "sft", name]);
        let config = world.json(&format!("{name}/config.json"));
        assert_eq!(config["dtype"], "float32", "training widens");
        assert_eq!(config["architectures"], fixture_json(&format!("{name}/config.json"))["architectures"]);
    }
}
