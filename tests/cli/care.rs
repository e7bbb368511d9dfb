//! Living with a store: sweeps compared, results adopted, pinned, measured and collected, and a workflow watched.

use std::{
    fs::{self, File},
    process::{Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::{WORKFLOW, World, statuses, stderr, stdout};

/// The small workflow with a tokenizer of each size.
fn sweep(sizes: &str) -> String {
    WORKFLOW.replace("vocab_size = 300", &format!("matrix = {{ vocab_size = {sizes} }}"))
}

#[test]
fn points_of_a_sweep_are_compared_and_an_older_result_is_adopted() {
    let world = World::new();
    fs::write(world.path("flow.toml"), sweep("[270, 280]")).unwrap();
    let output = world.rlflow(&["run", "flow.toml", "-q", "--jobs", "2"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let [first, second] = [270, 280].map(|size| format!("tokenizer[vocab_size={size}]"));
    let stages = &world.json(&["status", "flow.toml", "--json"])["stages"];
    assert_eq!([&stages[1]["name"], &stages[2]["name"]], [&json!(first), &json!(second)]);
    assert!(stdout(&world.rlflow(&["graph", "flow.toml"])).contains("tokenizer ×2"));

    let sides = [format!("flow.toml:{first}"), format!(":{second}")];
    let told = world.json(&["diff", &sides[0], &sides[1], "--json"]);
    let point = &told["stages"][0];
    assert_eq!(point["settings"], json!([{ "setting": "vocab_size", "from": 270, "to": 280, "in_key": true }]), "{told}");
    let metric = |name: &str| point["metrics"].as_array().unwrap().iter().find(|metric| metric["name"] == name).unwrap().clone();
    assert_eq!((metric("vocab_size")["from"].as_f64(), metric("vocab_size")["to"].as_f64()), (Some(270.0), Some(280.0)));
    let table = stdout(&world.rlflow(&["diff", &sides[0], &sides[1]]));
    let row = |name: &str| {
        table.lines().find(|line| line.trim_start().starts_with(name)).unwrap_or_default().split_whitespace().collect::<Vec<_>>()
    };
    assert_eq!(row("vocab_size"), ["vocab_size", "270", "280"], "{table}");
    assert_eq!(row("bytes_per_token").len(), 3, "{table}");

    // A run is told whole: what ran, why, how long, on what.
    let log = stdout(&world.rlflow(&["log", "flow.toml"]));
    let run = log.lines().nth(1).unwrap().split_whitespace().next().unwrap().to_owned();
    let one = stdout(&world.rlflow(&["log", &run]));
    assert!(one.contains(&format!("{run} on ")) && one.contains("rlflow run flow.toml"), "{one}");
    assert!(
        one.lines()
            .any(|line| line.starts_with(&first) && line.contains(" ran ") && line.contains("depends") != line.contains("never ran")),
        "{one}"
    );

    // Accepted under another key, and recorded so.
    let sets = ["--set", "stage.tokenizer.min_frequency=1"];
    let with = |arguments: &[&str]| world.json(&[arguments, &sets, &["--json"]].concat());
    assert_eq!(statuses(&with(&["plan", "flow.toml"])), ["cached", "run", "run"]);
    let adopted = with(&["adopt", "flow.toml", &first]);
    assert_eq!((&adopted["adopted"], &adopted["stage"]), (&json!(true), &json!(first)));
    assert_eq!(statuses(&with(&["plan", "flow.toml"])), ["cached", "cached", "run"]);
    let shown = stdout(&world.rlflow(&[&["show", "flow.toml", &first], &sets[..]].concat()));
    assert!(shown.contains("adopted") && shown.contains("an older result was accepted"), "{shown}");
    let lineage = stdout(&world.rlflow(&["lineage", "flow.toml", &second, "--format", "mermaid"]));
    assert!(lineage.starts_with("flowchart") && lineage.contains("texts/a.txt<br/>"), "{lineage}");
}

#[test]
fn a_collection_obeys_pins_grace_size_and_what_runs_used_last() {
    let world = World::new();
    let run = |sizes: &str| {
        fs::write(world.path("flow.toml"), sweep(sizes)).unwrap();
        let output = world.rlflow(&["run", "flow.toml", "-q"]);
        assert!(output.status.success(), "{}", stderr(&output));
    };
    run("[270, 280]");
    let used = world.json(&["du", "--json"]);
    let stages: Vec<(&str, u64)> = used["stages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|stage| (stage["stage"].as_str().unwrap(), stage["physical_bytes"].as_u64().unwrap()))
        .collect();
    assert_eq!(
        stages.iter().map(|(name, _)| *name).collect::<Vec<_>>(),
        ["corpus", "tokenizer[vocab_size=270]", "tokenizer[vocab_size=280]"]
    );
    let table = stdout(&world.rlflow(&["du"]));
    assert!(["logical", "physical", "shared"].iter().all(|column| table.lines().next().unwrap().contains(column)), "{table}");

    run("[270]");
    let collect = |more: &[&str]| {
        let report = world.json(&[&["gc", "flow.toml", "--json"], more].concat());
        report["removed"].as_array().unwrap().iter().filter(|removed| removed["what"] == "action").count()
    };
    let now = ["--grace", "0s"];
    assert_eq!(collect(&[]), 0, "all of it is younger than a day");
    assert_eq!(collect(&[&now[..], &["--keep-last", "2"]].concat()), 0, "the run before used it");
    fs::write(world.path("flow.toml"), sweep("[270, 280]")).unwrap();
    assert_eq!(world.json(&["pin", "flow.toml", "tokenizer[vocab_size=280]", "--note", "for the paper", "--json"])["pinned"], true);
    assert_eq!(world.json(&["pin", "flow.toml", "--json"])["pins"][0]["note"], "for the paper");
    assert_eq!(collect(&now), 0, "it is pinned");
    world.rlflow(&["pin", "flow.toml", "tokenizer[vocab_size=280]", "--remove"]);
    assert_eq!(world.json(&["pin", "flow.toml", "--json"])["pins"], json!([]));
    assert_eq!(collect(&[&now[..], &["--dry-run"]].concat()), 1);
    assert_eq!(collect(&now), 1, "a dry run removed it");
    assert_eq!(statuses(&world.json(&["plan", "flow.toml", "--json"])), ["cached", "cached", "run"]);

    // Down to nothing: what was made is still known, and made again where somebody asks for it.
    fs::write(world.path("flow.toml"), sweep("[270]")).unwrap();
    world.rlflow(&["gc", "--grace", "0s", "--max-size", "1kB"]);
    assert!(world.json(&["du", "--json"])["physical_bytes"].as_u64().unwrap() <= 1000);
    assert_eq!(statuses(&world.json(&["plan", "flow.toml", "--json"])), ["cached", "cached"]);
    let again = stdout(&world.rlflow(&["run", "flow.toml", "tokenizer"]));
    assert!(again.contains("ran, same output") && again.contains("is missing from the store"), "{again}");
    assert_eq!(world.json(&["fsck", "--json"])["ok"], true);
}

#[test]
fn a_watch_runs_again_until_it_is_stopped() {
    let world = World::new();
    let out = world.path("out");
    let mut command = Command::new(env!("CARGO_BIN_EXE_rlflow"));
    command.current_dir(world.path("")).args(["watch", "flow.toml", "--json"]).env_remove("RLFLOW_STORE");
    let mut watch = command.stdout(File::create(&out).unwrap()).stderr(Stdio::null()).spawn().unwrap();
    let mut runs = |count: usize| -> Value {
        let begun = Instant::now();
        loop {
            let told = fs::read_to_string(&out).unwrap();
            let events = told.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
            let mut finished: Vec<Value> = events.filter(|event| event["event"] == "finished").collect();
            if finished.len() >= count {
                return finished.swap_remove(count - 1);
            }
            assert!(watch.try_wait().unwrap().is_none() && begun.elapsed() < Duration::from_secs(120), "{told}");
            sleep(Duration::from_millis(10));
        }
    };
    assert_eq!(runs(1)["stages"][1]["status"], "ran");
    fs::write(world.path("texts/b.txt"), "Another text.\n").unwrap();
    let second = runs(2);
    assert_eq!(
        (&second["stages"][0]["status"], &second["stages"][0]["reason"]["kind"]),
        (&json!("ran"), &json!("file_changed")),
        "{second}"
    );
    fs::write(world.path("flow.toml"), WORKFLOW.replace("vocab_size = 300", "vocab_size = 290")).unwrap();
    let third = runs(3);
    assert_eq!((&third["stages"][0]["status"], &third["stages"][1]["reason"]["to"]), (&json!("cached"), &json!(290)), "{third}");
    assert!(Command::new("kill").args(["-INT", &watch.id().to_string()]).status().unwrap().success());
    assert_eq!(watch.wait().unwrap().code(), Some(130));
}

#[test]
fn the_command_that_a_failure_prints_goes_on() {
    let world = World::new();
    fs::write(world.path("flow.toml"), WORKFLOW.replace("texts/*.txt", "rows.jsonl")).unwrap();
    fs::write(world.path("rows.jsonl"), "{\"other\": 1}\n").unwrap();
    let kept = ["--set", "stage.tokenizer.vocab_size=301", "--store", "kept here"];
    let more = ["--jobs", "2", "--keep-going", "--force", "corpus", "--no-cache"];
    let failed = world.rlflow(&[&["run", "flow.toml", "tokenizer"], &kept[..], &more].concat());
    assert_eq!(failed.status.code(), Some(1), "{}", stderr(&failed));
    let told = stdout(&failed);
    let command = told.split_once("to continue from here:\n  ").unwrap().1.trim_end();
    // What would start over is left out.
    let expected = "rlflow run flow.toml --set stage.tokenizer.vocab_size=301 --store 'kept here' tokenizer --jobs 2 --keep-going";
    assert_eq!(command, expected);
    let row = |line: usize| format!("{{\"text\": \"Line {line} of a small text that tells of the sea and of ships.\"}}\n");
    fs::write(world.path("rows.jsonl"), (0..200).map(row).collect::<String>()).unwrap();
    let mut shell = Command::new("sh");
    shell.args(["-c", &command.replacen("rlflow", "\"$0\"", 1), env!("CARGO_BIN_EXE_rlflow")]);
    let went_on = shell.current_dir(world.path("")).env_remove("RLFLOW_STORE").output().unwrap();
    assert!(went_on.status.success(), "{}", stderr(&went_on));
    assert_eq!(statuses(&world.json(&[&["status", "flow.toml", "--json"], &kept[..]].concat())), ["cached", "cached"]);
}
