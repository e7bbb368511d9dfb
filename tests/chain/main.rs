//! The whole chain through the real binary: `workflows/quickstart.toml`, shrunk by `--set` to seconds. What reruns
//! and what does not, results to the bit over threads, kills and stores, and failures that leave nothing behind.

mod checkpoint;
mod crash;
mod fixture;
#[path = "../../store/tests/store/forks.rs"]
mod forks;
mod full_disk;
mod lora;
#[path = "../../store/tests/store/mounted.rs"]
mod mounted;
mod ppo;
mod ranks;

use std::{
    process::{Command, Output, Stdio},
    thread::sleep,
    time::Duration,
};

use fixture::{ALL, Finished, Fixture, names};
use serde_json::Value;

/// Stages with `train` settings of their own.
const TRAINERS: [&str; 4] = ["pretrain", "sft", "reward_model", "dpo"];

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

/// Half the digits in the products: near the same loss, another result, and the same bits for any number of threads.
#[test]
fn bf16_trains_like_fp32() {
    let fixture = Fixture::new();
    let longer = "stage.pretrain.train={ steps = 60, batch_size = 4, lr = 3e-3, eval_every = 60 }";
    let stages = ["pretrain", "sft", "reward_model", "ppo", "dpo"];
    let bf16: Vec<String> = stages.iter().map(|stage| format!("stage.{stage}.precision=\"bf16\"")).collect();
    let bf16: Vec<&str> = bf16.iter().map(String::as_str).chain([longer]).collect();
    let with_threads = |store: &str, threads: &str, sets: &[&str]| {
        Finished::of(fixture.command(store, sets).env("RAYON_NUM_THREADS", threads).output().unwrap()).succeeded()
    };
    let half = with_threads("half", "1", &bf16);
    assert_eq!(half.outputs(), with_threads("again", "2", &bf16).outputs(), "one thread or two");
    let single = with_threads("single", "2", &[longer]);
    for stage in stages {
        assert_ne!(half.outputs()[stage], single.outputs()[stage], "{stage} does not depend on the precision");
    }
    let loss = |store: &str, sets: &[&str]| {
        let output = fixture.rlflow(store, &["metrics", "--json"], sets).arg("pretrain").output().unwrap();
        let metrics: Value = serde_json::from_slice(&output.stdout).unwrap();
        metrics["stages"]["pretrain"]["final"]["eval/loss"].as_f64().unwrap()
    };
    let (half, single) = (loss("half", &bf16), loss("single", &[longer]));
    assert!((half - single).abs() < 0.01 * single, "{half} against {single}");
    // The first ratio of PPO is 1 in any precision: old log-probabilities come from the same arithmetic.
    let output = fixture.rlflow("half", &["metrics", "--json"], &bf16).arg("ppo").output().unwrap();
    let metrics: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(metrics["stages"]["ppo"]["final"]["policy/first_ratio_error"], 0.0);
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

fn with<'a>(sets: &[&'a str], more: &'a str) -> Vec<&'a str> {
    [sets, &[more]].concat()
}

/// With a schedule whose beginning does not depend on its end, more steps continue from those that are done.
#[test]
fn a_longer_run_continues_a_shorter_one() {
    let fixture = Fixture::new();
    let train = |stage: &str, steps: u64, schedule: &str| {
        format!("stage.{stage}.train={{ steps = {steps}, batch_size = 4, lr = 1e-3, schedule = {schedule} }}")
    };
    let mut sets: Vec<String> = TRAINERS.map(|stage| train(stage, 6, "\"constant\"")).into();
    sets.extend(["actor", "critic"].map(|role| format!("stage.{role}.train.schedule=\"constant\"")));
    let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
    fixture.run("store", &sets).succeeded();
    let continues_from = |more: &str, stage: &str| {
        let plan = fixture.json("store", &["plan"], &with(&sets, more));
        plan["stages"].as_array().unwrap().iter().find(|planned| planned["name"] == stage).unwrap()["continues_from_step"].as_u64()
    };
    // To the bit what a run from the start gives.
    let extends = |stage: &str, more: &str, from: u64| {
        assert_eq!(continues_from(more, stage), Some(from), "{more}");
        let run = |store: &str| Finished::of(fixture.command(store, &with(&sets, more)).arg(stage).output().unwrap()).succeeded();
        let extended = run("store");
        assert!(extended.with_status(&["extended"]).contains(stage), "{}", extended.event);
        assert_eq!(extended.outputs()[stage], run(&format!("scratch {more}")).outputs()[stage], "{more}");
    };
    extends("ppo", "stage.ppo.steps=5", 3);
    for stage in TRAINERS {
        extends(stage, &format!("stage.{stage}.train.steps=9"), 6);
    }
    // From the longest that is not longer.
    assert_eq!(
        ["8", "9", "12"].map(|steps| continues_from(&format!("stage.pretrain.train.steps={steps}"), "pretrain")),
        [Some(6), None, Some(9)]
    );
    // From where the decay began, which is later now.
    let decaying = "\"wsd\", decay_steps = 3";
    Finished::of(fixture.command("store", &with(&sets, &train("pretrain", 8, decaying))).arg("pretrain").output().unwrap()).succeeded();
    extends("pretrain", &train("pretrain", 12, decaying), 5);
    // A falling schedule depends on its end: from the start.
    let falling = ["stage.ppo.steps=5"];
    fixture.run("falling", &[]).succeeded();
    assert!(fixture.run("falling", &falling).succeeded().with_status(&["ran"]).contains("ppo"));
}

/// Questions about a store while a run fills it are answered, and say so.
#[test]
fn a_run_can_be_looked_at() {
    let fixture = Fixture::new();
    let endless = ["stage.pretrain.train={ steps = 1000000, batch_size = 4, lr = 3e-3 }"];
    let mut run = fixture.command("store", &endless).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let status = |stage: &str| {
        let told = fixture.json("store", &["status"], &endless);
        let stages = told["stages"].as_array().unwrap();
        stages.iter().find(|told| told["name"] == stage).unwrap()["status"].as_str().unwrap().to_owned()
    };
    while !fixture.path("store/VERSION").exists() || status("pretrain") != "running" {
        assert!(run.try_wait().unwrap().is_none(), "the run ended by itself");
        sleep(Duration::from_millis(10));
    }
    let log = || serde_json::from_slice::<Value>(&fixture.on_store("store", &["log", "--json"]).stdout).unwrap()["runs"][0].clone();
    let text = |output: Output| String::from_utf8(output.stdout).unwrap();
    let running = log();
    assert_eq!((&running["running"], &running["ok"]), (&true.into(), &Value::Null), "{running}");
    let stages = running["stages"].as_array().unwrap();
    let told: Vec<_> = stages.iter().map(|told| (told["stage"].as_str().unwrap(), told["status"].as_str().unwrap())).collect();
    assert!(told.contains(&("corpus", "ran")) && told.contains(&("pretrain", "started")), "{told:?}");
    assert!(text(fixture.on_store("store", &["log"])).contains(" running "));
    let one = text(fixture.on_store("store", &["log", running["id"].as_str().unwrap()]));
    assert!(one.lines().any(|line| line.starts_with("pretrain") && line.contains("started") && line.contains("never ran")), "{one}");

    let show = |stage: &str| fixture.rlflow("store", &["show", "--json"], &endless).arg(stage).output().unwrap();
    let corpus: Value = serde_json::from_slice(&show("corpus").stdout).unwrap();
    assert_eq!((&corpus["name"], &corpus["stale"]), (&"corpus".into(), &false.into()));
    let unfinished = show("pretrain");
    assert!(unfinished.status.code() == Some(2) && text(unfinished).contains("no_result"));
    let plan = fixture.json("store", &["plan"], &endless);
    assert_eq!((&plan["stages"][0]["status"], &plan["stages"][2]["status"]), (&"cached".into(), &"running".into()));
    assert_eq!(plan["stages"][2]["reason"]["kind"], "never_ran");
    assert!(fixture.on_store("store", &["fsck"]).status.success());

    assert!(Command::new("kill").args(["-INT", &run.id().to_string()]).status().unwrap().success());
    assert_eq!(run.wait().unwrap().code(), Some(130));
    let ended = log();
    assert_eq!((&ended["running"], &ended["ok"], &ended["interrupted"]), (&false.into(), &false.into(), &true.into()));
    assert_eq!(ended["id"], running["id"], "looking is no run");
}
