//! Placement never changes a result: the whole chain on several ranks, at every ZeRO level.

use std::{collections::BTreeMap, process::Stdio, thread, time::Duration};

use serde_json::Value;

use crate::fixture::{Finished, Fixture};

fn on(ranks: usize, zero: u8, offload: &str) -> [String; 3] {
    [format!("defaults.device={{ cpu = {ranks} }}"), format!("defaults.zero={zero}"), format!("defaults.offload=\"{offload}\"")]
}

fn run(fixture: &Fixture, store: &str, sets: &[String]) -> BTreeMap<String, Value> {
    fixture.run(store, &sets.iter().map(String::as_str).collect::<Vec<_>>()).succeeded().outputs()
}

/// How much of a model is there at once: at ZeRO 3 its blocks come one by one while it samples, and are computed again in updates.
fn sparing(by_block: bool) -> [String; 3] {
    [
        format!("stage.ppo.gather_for_generation={}", !by_block),
        format!("stage.eval.gather_for_generation={}", !by_block),
        format!("stage.ppo.gradient_checkpointing={by_block}"),
    ]
}

/// Rows shorter than the context, once their lengths are known: what a rank held, within a tenth.
fn the_plan_says_what_was_held(fixture: &Fixture) {
    let plan = fixture.json("one", &["plan"], &[]);
    let measured = fixture.json("one", &["metrics"], &[]);
    for name in ["pretrain", "sft", "reward_model", "ppo", "dpo", "eval"] {
        let stage = plan["stages"].as_array().unwrap().iter().find(|stage| stage["name"] == name).unwrap();
        let planned: f64 = stage["rank_bytes"].as_object().unwrap().values().map(|bytes| bytes.as_f64().unwrap()).sum();
        let held = measured["stages"][name]["final"]["memory/peak_bytes"].as_f64().unwrap();
        assert!((planned / held - 1.0).abs() <= 0.1, "{name}: {held} held, {planned} planned: {}", stage["rank_bytes"]);
    }
}

/// Four micro-batches a step: with three ranks some have nothing to do in a round, and weights have uneven shares.
#[test]
fn any_ranks_at_any_level_give_the_same_digests() {
    let fixture = Fixture::new();
    let expected = run(&fixture, "one", &[]);
    the_plan_says_what_was_held(&fixture);
    for ranks in [2, 3, 4] {
        for zero in 0..=3 {
            let offload = if (ranks + usize::from(zero)).is_multiple_of(2) { "cpu" } else { "none" };
            let sets = [on(ranks, zero, offload), sparing(ranks != 3)].concat();
            let outputs = run(&fixture, &format!("{ranks}-{zero}"), &sets);
            assert_eq!(outputs, expected, "{sets:?}");
        }
    }
    // Placement is no part of a key either: all of it is cached for one rank.
    assert!(fixture.run("4-3", &[]).ran().is_empty());
}

/// Killed on four ranks at ZeRO 3, resumed on one, and the other way round.
#[test]
fn a_run_killed_on_four_ranks_resumes_on_one() {
    let fixture = Fixture::new();
    let more = ["stage.pretrain.train.steps=40", "stage.ppo.steps=4", "defaults.snapshot_every=1"].map(str::to_owned);
    let expected = run(&fixture, "whole", &more);
    let [many, one] = [on(4, 3, "none"), on(1, 0, "none")].map(|place| [&more[..], &place[..]].concat());
    let mut resumed = 0;
    for turn in 0..40 {
        let sets = if turn % 2 == 0 { &many } else { &one };
        let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
        if turn == 39 {
            break;
        }
        let mut child = fixture.command("torn", &sets).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        thread::sleep(Duration::from_millis(700 + 150 * turn));
        child.kill().unwrap();
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        resumed += text.matches("\"event\":\"resumed\"").count();
        if text.contains("\"event\":\"finished\"") {
            break;
        }
    }
    let finished: Finished = fixture.run("torn", &more.iter().map(String::as_str).collect::<Vec<_>>()).succeeded();
    assert_eq!(finished.outputs(), expected);
    assert!(resumed + finished.with_status(&["resumed"]).len() > 0, "no stage was resumed: the kills came too early or too late");
}
