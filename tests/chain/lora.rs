//! Adapters through the whole chain: every trainer has one, on the result of the one before.

use std::process::Command;

use serde_json::Value;

use crate::fixture::{Finished, Fixture};

const SETS: [&str; 5] = [
    "stage.sft.lora={ rank = 4, alpha = 8, target_modules = \"all-linear\" }",
    "stage.reward_model.lora={ rank = 2, dropout = 0.1 }",
    "stage.actor.lora={ rank = 2, dropout = 0.1 }",
    "stage.critic.lora={ rank = 2 }",
    "stage.dpo.lora={ rank = 2, target_modules = [\"o_proj\", \"down_proj\"] }",
];

fn run(fixture: &Fixture, store: &str, more: &[&str]) -> Finished {
    fixture.run(store, &[&SETS[..], more].concat()).succeeded()
}

fn json(mut command: Command) -> Value {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stdout)))
}

#[test]
fn every_trainer_takes_adapters_and_nothing_of_the_base_is_stored_twice() {
    let fixture = Fixture::new();
    let first = run(&fixture, "store", &[]);
    let series = json({
        let mut command = fixture.rlflow("store", &["metrics", "--json"], &SETS);
        command.arg("ppo");
        command
    });
    let first_ratio = &series["stages"]["ppo"]["series"]["policy/first_ratio_error"];
    // Dropout is the same when old log-probabilities are taken and in the first update.
    assert!(first_ratio.as_array().unwrap().iter().all(|point| point[1] == 0.0), "{first_ratio}");
    assert!(run(&fixture, "store", &[]).ran().is_empty());

    // Ranks and levels change nothing, nor does the number of threads.
    for more in [["defaults.device={ cpu = 2 }", "defaults.zero=3"], ["defaults.device={ cpu = 3 }", "defaults.zero=1"]] {
        assert_eq!(run(&fixture, more[0], &more).outputs(), first.outputs(), "{more:?}");
    }
    let mut threads = fixture.command("threads", &SETS);
    threads.env("RAYON_NUM_THREADS", "3");
    assert_eq!(Finished::of(threads.output().unwrap()).succeeded().outputs(), first.outputs());
    // Other settings, other results.
    for more in ["stage.dpo.lora.alpha=16", "stage.actor.lora.dropout=0.2"] {
        assert!(!run(&fixture, "store", &[more]).ran().is_empty(), "{more}");
    }
    // The sampler's cached decoding has the adapters too: without dropout it gives the log-probabilities of the training pass.
    run(&fixture, "store", &["stage.actor.lora.dropout=0", "stage.actor.train.lr=1e-2"]);
    let series = json({
        let sets = [&SETS[..], &["stage.actor.lora.dropout=0", "stage.actor.train.lr=1e-2"]].concat();
        let mut command = fixture.rlflow("store", &["metrics", "--json"], &sets);
        command.arg("ppo");
        command
    });
    let gaps = series["stages"]["ppo"]["series"]["sampler/logprob_gap_max"].as_array().unwrap().clone();
    assert!(gaps.iter().all(|point| point[1].as_f64().unwrap() < 1e-4), "{gaps:?}");
    let shared = run(&fixture, "store", &["stage.ppo.share_backbone=true", "stage.ppo.ema_decay=0.9"]);
    assert!(shared.ran().contains("ppo"));

    // What a stage adds to the store is its adapter.
    let weights = |stage: &str, only_new: bool| -> u64 {
        let mut command = fixture.rlflow("store", &["show", "--json"], &SETS);
        command.arg(stage);
        let entries = json(command)["artifacts"]["model"]["manifest"]["entries"].as_array().unwrap().clone();
        let wanted = |entry: &&Value| !entry["dtype"].is_null() && (!only_new || entry["name"].as_str().unwrap().contains("lora_"));
        entries.iter().filter(wanted).map(|entry| entry["size_bytes"].as_u64().unwrap()).sum()
    };
    for stage in ["sft", "ppo", "dpo"] {
        let (all, new) = (weights(stage, false), weights(stage, true));
        assert!(new > 0 && all - new == weights("pretrain", false), "{stage}: {new} of {all}");
    }

    // Two adapters as one, and merged; both from the same stage.
    let export = |folder: &str, more: &[&str]| {
        let mut command = fixture.rlflow("store", &["export", "--json"], &SETS);
        command.arg("dpo").arg(fixture.path(folder)).args(more);
        json(command)
    };
    assert_eq!(export("adapter", &["--adapter"])["files"], serde_json::json!(["adapter_config.json", "adapter_model.safetensors"]));
    assert!(export("merged", &[])["files"].as_array().unwrap().contains(&"model.safetensors".into()));
    // A model with adapters answers.
    let mut generate = fixture.rlflow("store", &["generate", "--json"], &SETS);
    generate.args(["dpo", "--prompt", "Hello", "--max-new-tokens", "4"]);
    assert!(json(generate)["text"].is_string());
    // One that was trained whole has none.
    let mut plain = fixture.rlflow("store", &["export", "--json"], &SETS);
    plain.arg("pretrain").arg(fixture.path("none")).arg("--adapter");
    let output = plain.output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stdout).contains("has no adapter"));
}

/// Snapshots hold what is trained and no more; what goes on from one ends as if it had never stopped, also on other ranks and in bfloat16.
#[test]
fn training_of_adapters_goes_on_from_snapshots() {
    let fixture = Fixture::new();
    let sets = |steps: u32| {
        let train = format!("{{ steps = {steps}, batch_size = 4, lr = 1e-3, schedule = \"constant\" }}");
        let mut sets: Vec<String> = ["sft", "reward_model", "dpo"].map(|stage| format!("stage.{stage}.train={train}")).into();
        sets.extend(["actor", "critic"].map(|role| format!("stage.{role}.train.schedule=\"constant\"")));
        sets.extend([format!("stage.ppo.steps={steps}"), "defaults.precision=\"bf16\"".into(), "stage.ppo.ema_decay=0.9".into()]);
        sets.extend(SETS.map(str::to_owned));
        sets
    };
    let run = |store: &str, sets: &[String]| fixture.run(store, &sets.iter().map(String::as_str).collect::<Vec<_>>()).succeeded();
    run("short", &sets(2));
    let elsewhere = [&sets(4)[..], &["defaults.device={ cpu = 2 }".into(), "defaults.zero=2".into()]].concat();
    let extended = run("short", &elsewhere);
    assert!(extended.with_status(&["extended"]).contains("sft"), "{}", extended.event);
    assert_eq!(extended.outputs(), run("long", &sets(4)).outputs());
}

#[test]
fn wrong_adapters_are_told_when_planning() {
    let fixture = Fixture::new();
    for (set, expected) in [
        ("stage.sft.lora={ target_modules = [\"q_prj\"] }", "q_proj"),
        ("stage.sft.lora={ target_modules = \"all\" }", "all-linear"),
        ("stage.sft.lora={ target_modules = [] }", "nothing would be trained"),
        ("stage.sft.lora={ rank = 0 }", "rank"),
        ("stage.sft.lora={ dropout = 1.0 }", "dropout"),
        ("stage.actor.lora={ r = 8 }", "rank"),
        ("stage.ref.lora={ rank = 8 }", "lora"),
    ] {
        let output = fixture.rlflow("store", &["plan", "--json"], &[set]).output().unwrap();
        let told = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.code() == Some(2) && told.contains(expected), "{set}: {told}");
    }
    let gpt2 = "stage.pretrain.model={ architecture = \"gpt2\", hidden_size = 32, layers = 1, heads = 4, context = 128 }";
    let output =
        fixture.rlflow("store", &["plan", "--json"], &[gpt2, "stage.sft.lora={ target_modules = [\"gate_proj\"] }"]).output().unwrap();
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(told.contains("the model has no `gate_proj`") && told.contains("up_proj"), "{told}");
}

/// An empty table asks for an adapter with all defaults, wherever it stands.
#[test]
fn an_empty_table_is_an_adapter() {
    let fixture = Fixture::new();
    let optimizer = |sets: &[&str]| {
        let plan = fixture.json("store", &["plan"], sets);
        let stage = plan["stages"].as_array().unwrap().iter().find(|stage| stage["name"] == "sft").unwrap().clone();
        stage["rank_bytes"]["optimizer"].as_u64().unwrap()
    };
    let adapter = optimizer(&["stage.sft.lora={}"]);
    assert_eq!(optimizer(&["defaults.lora={}"]), adapter);
    assert!(adapter > 0 && adapter < optimizer(&[]), "{adapter}");
}

/// A reference and a reward model that lie below adapters are held once, and planned once; elsewhere they are models of their own.
#[test]
fn what_lies_below_an_adapter_is_planned_once() {
    let fixture = Fixture::new();
    let of_stage = |sets: &[&str], name: &str| {
        let plan = fixture.json("store", &["plan"], sets);
        let stages = plan["stages"].as_array().unwrap_or_else(|| panic!("{plan}"));
        stages.iter().find(|stage| stage["name"] == name).unwrap()["rank_bytes"]["parameters"].as_u64().unwrap()
    };
    let held = |sets: &[&str]| {
        let output = fixture.command("store", sets).args(["--force", "ppo", "ppo"]).output().unwrap();
        Finished::of(output).succeeded();
        fixture.json("store", &["metrics"], sets)["stages"]["ppo"]["final"]["memory/cpu/rank0/parameters_bytes"].as_f64().unwrap()
    };
    let sets = ["stage.actor.lora={ rank = 2 }", "stage.critic.lora={ rank = 2 }"];
    let [elsewhere, averaged] = ["stage.ref.zero=1", "stage.ppo.ema_decay=0.9"].map(|more| [sets[0], sets[1], more]);
    // One place, in other words.
    let spelled = [sets[0], sets[1], "stage.actor.device=\"cpu\"", "stage.ref.device={ cpu = 1 }", "stage.reward.device=[\"cpu\"]"];
    for sets in [&sets[..], &elsewhere, &averaged, &spelled] {
        assert_eq!(held(sets), of_stage(sets, "ppo") as f64, "{sets:?}");
    }
    assert_eq!(of_stage(&spelled, "ppo"), of_stage(&sets, "ppo"));
    let model = of_stage(&sets, "pretrain");
    let parameters = |more: &str| of_stage(&[sets[0], sets[1], more], "ppo");
    let once = of_stage(&sets, "ppo");
    assert_eq!(parameters("stage.ref.zero=1"), once + model);
    assert_eq!(parameters("stage.ref.inputs.model=\"pretrain\""), once + model);
    let average = parameters(averaged[2]) - once;
    assert!(0 < average && average < model / 4, "of an adapter only its own weights are averaged: {average} of {model}");

    // The reference of DPO is the model itself, unless it is named.
    let dpo = |more: &[&str]| of_stage(&[&["stage.dpo.lora={ rank = 2 }"][..], more].concat(), "dpo");
    let named = "stage.dpo.inputs.ref=\"pretrain\"";
    let kto = "stage.dpo.loss=\"kto\"";
    assert_eq!(dpo(&[kto]), dpo(&[]));
    assert_eq!(dpo(&[kto, named]), dpo(&[kto]) + model);
    assert_eq!(dpo(&[kto, "stage.dpo.inputs.ref=\"sft\""]), dpo(&[kto]));
}
