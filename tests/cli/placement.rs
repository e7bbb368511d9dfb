//! Where stages run, seen from outside: which of them at once, and what their ranks held.

use std::{collections::BTreeSet, fs};

use serde_json::Value;

use crate::{WORKFLOW, World, stderr, stdout};

/// Models that are trained independently, by name, width and learning rate.
fn trainers(stages: &[(&str, usize, &str)]) -> String {
    let stage = |(name, hidden, lr): &(&str, usize, &str)| {
        format!(
            "\n[stage.{name}]\nkind = \"pretrain\"\ninputs = {{ corpus = \"corpus\", tokenizer = \"tokenizer\" }}\n\
             model = {{ hidden_size = {hidden}, layers = 1, heads = 2, context = 32 }}\n\
             train = {{ steps = 150, batch_size = 2, micro_batch_size = 1, lr = {lr} }}\n"
        )
    };
    stages.iter().map(stage).collect()
}

/// Of these, what ran beside what, by the order of a run's events; that its declared memory was never exceeded, and that all ran.
fn ran_beside(output: &[Value], names: &[&str], memory: u64, peak: impl Fn(&str) -> u64) -> BTreeSet<(String, String)> {
    let (mut running, mut beside, mut ended) = (BTreeSet::new(), BTreeSet::new(), 0);
    for event in output {
        let Some(stage) = event["stage"].as_str().filter(|stage| names.contains(stage)) else { continue };
        match event["event"].as_str() {
            Some("stage_started") => {
                beside.extend(running.iter().map(|other: &String| {
                    let (first, second) = (other.as_str().min(stage), other.as_str().max(stage));
                    (first.to_owned(), second.to_owned())
                }));
                running.insert(stage.to_owned());
                let taken: u64 = running.iter().map(|stage| peak(stage)).sum();
                assert!(taken <= memory, "{running:?} take {taken} of {memory}");
            }
            Some("stage_finished") => {
                assert_eq!(event["status"], "ran", "{event}");
                assert!(running.remove(stage), "{stage} ended before it began");
                ended += 1;
            }
            _ => {}
        }
    }
    assert_eq!((ended, running.len()), (names.len(), 0));
    beside
}

/// What the plan says that each takes is what the schedule goes by.
#[test]
fn stages_run_side_by_side_where_declared_memory_has_room() {
    let names = ["a", "b", "large"];
    let world = World::new();
    let stages = trainers(&[("a", 16, "1e-3"), ("b", 16, "2e-3"), ("large", 64, "1e-3")]);
    fs::write(world.path("flow.toml"), format!("{WORKFLOW}{stages}\n[devices]\ncpu = {{ memory = \"8 GB\" }}\n")).unwrap();
    // What is known of rows is known from here on.
    let prepared = world.rlflow(&["run", "flow.toml", "-q", "tokenizer"]);
    assert!(prepared.status.success(), "{}", stderr(&prepared));
    let plan = world.json(&["plan", "flow.toml", "--json"]);
    let peak = |name: &str| {
        let stages = plan["stages"].as_array().unwrap();
        stages.iter().find(|stage| stage["name"] == name).unwrap()["memory"]["cpu"].as_u64().unwrap()
    };
    let (small, large) = (peak("a"), peak("large"));
    assert_eq!(peak("b"), small);
    assert!(small + 1 < large, "{small} and {large}");

    let schedule = |memory: u64, jobs: &str| {
        let set = format!("devices.cpu.memory={memory}");
        let output = world.rlflow(&["run", "flow.toml", "--no-cache", "--json", "--jobs", jobs, "--set", &set, "a", "b", "large"]);
        assert!(output.status.success(), "{}{}", stdout(&output), stderr(&output));
        let events: Vec<Value> = stdout(&output).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        ran_beside(&events, &names, memory, peak)
    };
    let pair = |one: &str, other: &str| (one.to_owned(), other.to_owned());
    // One byte less than a small one and the large one need: both small ones fit, the large one only by itself.
    assert_eq!(schedule(small + large - 1, "4"), BTreeSet::from([pair("a", "b")]));
    // Just enough for those two, and not for all three.
    let two = schedule(small + large, "4");
    assert!(two.contains(&pair("a", "b")), "{two:?}");
    assert_eq!(schedule(2 * small + large, "4"), BTreeSet::from([pair("a", "b"), pair("a", "large"), pair("b", "large")]));
    // Room does not make up for jobs.
    assert_eq!(schedule(2 * small + large, "1"), BTreeSet::new());
}

/// Bytes of a checkpoint's tensors, as they are stored.
fn stored_bytes(world: &World, stage: &str) -> u64 {
    let shown = world.json(&["show", "flow.toml", stage, "--json"]);
    let entries = shown["artifacts"]["model"]["manifest"]["entries"].as_array().unwrap_or_else(|| panic!("{shown}")).clone();
    entries.iter().filter(|entry| !entry["dtype"].is_null()).map(|entry| entry["size_bytes"].as_u64().unwrap()).sum()
}

/// What each of two ranks held, at its peak and at the end, as metrics and in the report.
#[test]
fn bytes_of_each_rank_are_metrics_and_in_the_report() {
    const PARTS: [&str; 7] = ["peak", "parameters", "gradients", "optimizer", "activations", "buffers", "now"];
    for zero in [0, 3] {
        let world = World::new();
        fs::write(
            world.path("flow.toml"),
            format!("{WORKFLOW}{}device = {{ cpu = 2 }}\nzero = {zero}\n", trainers(&[("base", 16, "1e-3")])),
        )
        .unwrap();
        let output = world.rlflow(&["run", "flow.toml", "-q"]);
        assert!(output.status.success(), "{}", stderr(&output));
        let metrics = world.json(&["metrics", "flow.toml", "--json"]);
        let metric = |rank: usize, part: &str| {
            let name = format!("memory/cpu/rank{rank}/{part}_bytes");
            metrics["stages"]["base"]["final"][&name].as_f64().unwrap_or_else(|| panic!("{name}: {metrics}")) as u64
        };
        let report = stdout(&world.rlflow(&["report", "flow.toml", "-o", "-"]));
        for rank in 0..2 {
            let begin = format!("<tr><td>base</td><td>cpu</td><td>{rank}</td>");
            let row = report.split_once(&begin).and_then(|(_, rest)| rest.split_once("</tr>")).unwrap_or_else(|| panic!("{report}")).0;
            let told: Vec<u64> =
                row.split("title=\"").skip(1).map(|cell| cell.split_once(" bytes\"").unwrap().0.parse().unwrap()).collect();
            assert_eq!(told, PARTS.map(|part| metric(rank, part)), "ZeRO {zero}, rank {rank}");
            let parts: u64 = PARTS[1..6].iter().map(|part| metric(rank, part)).sum();
            assert_eq!(metric(rank, "peak"), parts, "ZeRO {zero}, rank {rank}");
            // When training is over, weights and moments are left.
            let (now, state) = (metric(rank, "now"), metric(rank, "parameters") + metric(rank, "optimizer"));
            assert!(now == state && now < metric(rank, "peak"), "ZeRO {zero}, rank {rank}: {now} held, {state} of state");
        }
        assert!(!report.contains("<td>base</td><td>cpu</td><td>2</td>"), "a rank that there was not");
        // AdamW in fp32: a weight and two moments, whole on each rank or shared out.
        let copies = if zero == 0 { 2 } else { 1 };
        assert_eq!(metric(0, "now") + metric(1, "now"), copies * 3 * stored_bytes(&world, "base"), "ZeRO {zero}");
    }
}
