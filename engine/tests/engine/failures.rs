//! How stages fail, and what is left.

use rlflow_api::CancelToken;
use rlflow_engine::{Request, RunOptions, Status, event::StageStatus, history, metrics, report};
use rlflow_store::{Digest, Store};

use crate::world::{CHAIN, CancelAt, World, outcomes};

fn failing(setting: &str) -> String {
    CHAIN.replace("beta = 0.1", &format!("beta = 0.1\n{setting}"))
}

#[test]
fn a_failure_is_not_cached_and_skips_what_needs_it() {
    let world = World::new(&failing("fail_at = 3"));
    let summary = world.run();
    assert!(!summary.ok() && !summary.interrupted);
    assert_eq!(summary.stages[2].error.as_deref(), Some("step 3 was told to fail"));
    assert_eq!(summary.stages[2].hint.as_deref(), Some("unset fail_at"));
    // Without --keep-going nothing new is started.
    let statuses: Vec<StageStatus> = summary.stages.iter().map(|stage| stage.status).collect();
    use StageStatus::{Failed, Ran, Skipped};
    assert_eq!(statuses, [Ran, Ran, Failed, Skipped, Skipped]);
    world.ran();
    let keep_going = RunOptions { keep_going: true, ..RunOptions::default() };
    let summary = world.run_with(&[], &keep_going);
    assert_eq!(world.ran(), ["a", "b"]);
    assert_eq!(outcomes(&summary)[4], "all skipped: a failed");
    let plan = world.plan();
    assert_eq!((plan.stages[2].status, plan.stages[2].error.as_deref()), (Status::Failed, Some("step 3 was told to fail")));
    assert_eq!(plan.stages[3].status, Status::Cached);
    let told = report::plan_report(&world.load(), &plan, true);
    assert!(told.contains("step 3 was told to fail (never ran)"), "{told}");
    // The failure was of these settings.
    world.edit("fail_at = 3", "fail_at = 4");
    assert_eq!((world.plan().stages[2].status, world.plan().stages[2].error.as_deref()), (Status::Run, None));
}

#[test]
fn what_ended_last_is_what_counts() {
    let world = World::new(&failing("fail_at = 3\nstep_ms = 5\nsnapshot_every = 1"));
    world.run();
    assert_eq!(world.plan().stages[2].status, Status::Failed);
    // Interrupted before it could fail again, it is no failure any more.
    let cancel = CancelToken::default();
    let forced = RunOptions { request: Request { force: vec!["a".into()], ..Request::default() }, ..RunOptions::default() };
    let at = CancelAt { stage: "a", step: 1, cancel: cancel.clone() };
    let stopped = world.run_watched(&[], &forced, &cancel, vec![Box::new(at)]);
    assert!(stopped.stages[2].was_interrupted());
    // The first attempt left the snapshot of the step before it failed.
    let plan = world.plan();
    assert_eq!((plan.stages[2].status, plan.stages[2].continues_from_step, &plan.stages[2].error), (Status::Resume, Some(2), &None));
}

#[test]
fn the_log_tells_what_ran_why_and_on_what() {
    let world = World::new(&failing("fail_at = 3"));
    world.run();
    let run = &history::past_runs(&world.store(), 1).unwrap()[0];
    assert_eq!((run.ok, run.workflow.as_str(), run.cached), (Some(false), "flow.toml", 0));
    let told =
        |stage: &serde_json::Value| format!("{} {} on {}: {}", stage["stage"], stage["status"], stage["devices"], stage["reason"]["text"]);
    let told: Vec<String> = run.stages.iter().map(|stage| told(stage).replace('"', "")).collect();
    assert_eq!(told[..2], ["data ran on [cpu]: never ran", "base ran on [cpu]: never ran"]);
    // Of a run that was killed the log tells what was running.
    let log = world.store().runs().unwrap()[0].join("events.jsonl");
    let text = std::fs::read_to_string(&log).unwrap();
    let cut = text.lines().position(|line| line.contains("\"stage_started\"") && line.contains("\"base\"")).unwrap();
    std::fs::write(&log, text.lines().take(cut + 1).map(|line| format!("{line}\n")).collect::<String>() + "{\"event\":\"stage_fin")
        .unwrap();
    let run = &history::past_runs(&world.store(), 1).unwrap()[0];
    let told: Vec<(&str, &str)> =
        run.stages.iter().map(|stage| (stage["stage"].as_str().unwrap(), stage["status"].as_str().unwrap())).collect();
    assert_eq!((run.ok, told), (None, vec![("data", "ran"), ("base", "started")]));
    // What it did not come to has not failed.
    assert_eq!(world.plan().stages[2].status, Status::Run);
}

#[test]
fn a_stage_without_a_result_shows_what_it_measured() {
    let world = World::new(&CHAIN.replace("steps = 20 }", "steps = 20 }\nsnapshot_every = 1"));
    let store = world.store();
    let metrics = |stages: &[&str]| {
        let names: Vec<String> = stages.iter().map(|stage| (*stage).to_owned()).collect();
        metrics::metrics(&world.load(), &store, &world.host, &names).unwrap()
    };
    for step in [7, 13] {
        let cancel = CancelToken::default();
        let at = CancelAt { stage: "base", step, cancel: cancel.clone() };
        world.run_watched(&[], &RunOptions::default(), &cancel, vec![Box::new(at)]);
        let [base] = &metrics(&["base"])[..] else { panic!("one stage was asked for") };
        let unfinished = base.unfinished.as_ref().unwrap();
        assert_eq!((unfinished.step, unfinished.ended, base.stale), (step, true, false));
        // Each session's part of the series, joined.
        let steps: Vec<u64> = base.series["loss"].iter().map(|point| point.0).collect();
        assert_eq!(steps, (1..=step).collect::<Vec<u64>>());
        assert_eq!(base.finals()["loss"], base.series["loss"].last().unwrap().1);
    }
    assert_eq!(metrics(&["a", "b"]).len(), 0);
    assert_eq!(metrics::to_json(&world.load(), &metrics(&[]))["stages"]["base"]["unfinished"]["step"], 13);
    let before = metrics(&["base"])[0].series.clone();
    world.run();
    let after = metrics(&["base"]);
    assert!(after[0].unfinished.is_none() && after[0].record.is_some());
    assert_eq!(after[0].series["loss"][..13], before["loss"]);
    // A newer attempt at something else is shown as what it is.
    let cancel = CancelToken::default();
    let at = CancelAt { stage: "base", step: 2, cancel: cancel.clone() };
    world.run_watched(&["stage.base.beta=0.9"], &RunOptions::default(), &cancel, vec![Box::new(at)]);
    assert!(metrics(&["base"])[0].unfinished.is_none(), "today's settings have a result");
    world.edit("steps = 20", "steps = 30");
    let base = &metrics(&["base"])[0];
    assert_eq!((base.stale, base.unfinished.as_ref().unwrap().step), (true, 2));
}

#[test]
fn a_loss_that_is_not_finite_stops_the_stage_with_its_step() {
    let world = World::new(&failing("nan_at = 6\nsnapshot_every = 2"));
    let summary = world.run();
    let error = summary.stages[2].error.as_deref().unwrap();
    assert_eq!(error, "step 6: loss is not finite (NaN); the last good snapshot is of step 4");
    assert!(summary.stages[2].hint.as_deref().unwrap().contains("nothing of this stage was cached"));
    world.ran();
    // The next run takes up the last good snapshot and fails at the same step.
    let again = world.run();
    assert_eq!(again.stages[2].error.as_deref(), Some(error));
}

#[test]
fn a_panic_is_a_failed_stage() {
    let world = World::new(&failing("panic_at = 2"));
    let summary = world.run();
    assert_eq!(summary.stages[2].error.as_deref(), Some("the stage panicked: step 2 was told to panic"));
}

/// Backends panic with their words and a backtrace.
#[test]
fn memory_that_ran_out_is_said_with_what_was_planned_and_what_needs_less() {
    let world = World::new(&failing("no_memory_at = 2\ndevice = { cpu = 2 }"));
    let summary = world.run();
    let failed = &summary.stages[2];
    let error = failed.error.as_deref().unwrap();
    let started = "the stage panicked: out of device memory allocating 4096 bytes in phase `training`; planned were ";
    assert!(error.starts_with(started) && error.contains(" on cpu, which has "), "{error}");
    assert!(failed.hint.as_deref().unwrap().starts_with("zero = "), "{:?}", failed.hint);
}

#[test]
fn a_damaged_input_is_made_again_in_the_same_run() {
    let world = World::new(CHAIN);
    let first = world.run();
    world.ran();
    let store = world.store();
    damage(&store, first.stages[1].outputs["model"]);
    world.edit("beta = 0.2", "beta = 0.3");
    let summary = world.run();
    assert!(summary.ok(), "{:?}", outcomes(&summary));
    assert_eq!(summary.stages[1].outputs, first.stages[1].outputs);
    assert_eq!(outcomes(&summary)[1], "base ran (same output): its result model is damaged and b must read it");
}

/// Flips a bit of an artifact's first blob.
pub fn damage(store: &Store, artifact: Digest) {
    let artifact = store.open_artifact(artifact).unwrap().unwrap();
    damage_blob(store, artifact.manifest().entries[0].digest);
}

fn damage_blob(store: &Store, digest: Digest) {
    let name = digest.to_string();
    let path = store.folder().join("blobs").join(&name[..2]).join(&name);
    let mut content = std::fs::read(&path).unwrap();
    content[3] ^= 1;
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, content).unwrap();
}

/// The last stages too, which nothing reads.
#[test]
fn what_a_repair_sets_aside_is_made_again_by_the_next_run() {
    let world = World::new(CHAIN);
    let first = world.run();
    world.ran();
    let last = first.stages.len() - 1;
    let output = *first.stages[last].outputs.values().next().unwrap();
    damage(&world.store(), output);
    assert!(!world.store().fsck(true).unwrap().problems.is_empty());
    let said = "its result results was found damaged and set aside";
    assert_eq!(world.planned(), [format!("all run: {said}")]);
    let second = world.run();
    assert_eq!(outcomes(&second)[last], format!("all ran (same output): {said}"));
    assert_eq!(second.stages[last].outputs, first.stages[last].outputs);
    assert!(world.store().fsck(false).unwrap().problems.is_empty());
    assert!(world.planned().is_empty());
}

#[test]
fn a_damaged_record_is_told_fails_nothing_and_can_be_made_again() {
    let world = World::new(CHAIN);
    let first = world.run();
    let metrics = || metrics::metrics(&world.load(), &world.store(), &world.host, &["base".into()]).unwrap().remove(0);
    let whole = metrics().series;
    assert!(!whole.is_empty());
    let key = first.stages[1].key.unwrap();
    let blob = || world.store().action(key).unwrap().unwrap().records["series"];
    let is_told = || {
        let found = metrics();
        assert_eq!((&found.missing[..], found.series.len(), found.finals()["loss"]), (&["series"][..], 0, whole["loss"].last().unwrap().1));
        assert_eq!(metrics::to_json(&world.load(), &[found])["stages"]["base"]["missing"], serde_json::json!(["series"]));
        let page = rlflow_engine::html::html_report(&world.load(), &world.store(), &world.host, "now").unwrap();
        assert!(page.contains("lost or damaged: series"));
        assert!(world.run().is_all_cached());
    };
    damage_blob(&world.store(), blob());
    // Damaged when it is met, missing from then on.
    (0..2).for_each(|_| is_told());
    world.ran();
    let forced = RunOptions { request: Request { force: vec!["base".into()], ..Request::default() }, ..RunOptions::default() };
    assert_eq!(world.run_with(&[], &forced).stages[1].outputs, first.stages[1].outputs);
    assert_eq!((metrics().series, metrics().missing.len()), (whole.clone(), 0));
    // A repair finds it too, and then the next run makes it again.
    damage_blob(&world.store(), blob());
    assert!(!world.store().fsck(true).unwrap().is_clean());
    world.ran();
    world.run();
    assert_eq!((world.ran(), metrics().series), (vec!["base".to_owned()], whole));
    assert!(world.store().fsck(false).unwrap().is_clean());
}

#[test]
fn data_that_changes_while_it_is_read_is_noticed() {
    let world = World::new(CHAIN);
    struct Edit(std::path::PathBuf);
    impl rlflow_engine::event::Sink for Edit {
        fn event(&mut self, _: f64, event: &rlflow_engine::event::Event) {
            if matches!(event, rlflow_engine::event::Event::StageStarted { stage, .. } if stage == "data") {
                std::fs::write(&self.0, "changed\n").unwrap();
            }
        }
    }
    let edit = Edit(world.path("data.txt"));
    let summary = world.run_watched(&[], &RunOptions::default(), &rlflow_api::CancelToken::default(), vec![Box::new(edit)]);
    assert_eq!(summary.stages[0].error.as_deref(), Some("data.txt: changed while the stage was reading it; nothing was cached"));
    assert!(world.run().ok());
}

#[test]
fn a_device_that_is_not_there_is_said_before_anything_runs() {
    let world = World::new(&CHAIN.replace("beta = 0.1", "device = \"cuda:3\""));
    let plan = |request: &Request| rlflow_engine::Plan::new(&world.load(), &world.store(), &world.host, request);
    let error = plan(&Request::default()).unwrap_err().to_json();
    assert_eq!(error["errors"][0]["code"], "device_unavailable");
    assert_eq!(error["errors"][0]["message"], "stage `a`: device `cuda:3` is not available here");
    let line = CHAIN.lines().position(|line| line == "beta = 0.1").unwrap() + 1;
    let place = (&error["errors"][0]["line"], &error["errors"][0]["column"], error["errors"][0]["file"].as_str());
    assert_eq!(place, (&line.into(), &10.into(), world.path("flow.toml").to_str()));
    // One wrong default is one error; every error has the same keys.
    world.write("flow.toml", &format!("{}\n[defaults]\ndevice = [\"cpu\", \"cuda:1\"]\n", CHAIN));
    let error = plan(&Request::default()).unwrap_err().to_json();
    assert_eq!(error["errors"].as_array().unwrap().len(), 1);
    let keys = |error: &serde_json::Value| error["errors"][0].as_object().unwrap().keys().cloned().collect::<Vec<String>>();
    assert_eq!(keys(&error), ["code", "message", "file", "line", "column", "hint"]);
    let io = rlflow_engine::EngineError::io("read x")(std::io::Error::other("no")).to_json();
    assert_eq!(keys(&io), keys(&error));
    assert_eq!(io["errors"][0]["file"], serde_json::Value::Null);
    world.write("flow.toml", &CHAIN.replace("beta = 0.1", "device = \"cuda:3\""));
    let without = Request { stages: vec!["b".into()], ..Request::default() };
    assert!(plan(&without).is_ok());
}

#[test]
fn a_plan_tells_the_memory_at_the_level_that_it_chose() {
    let mut world = World::new(&CHAIN.replace("beta = 0.1", "device = { cpu = 2 }\nzero = \"auto\""));
    let planned = |world: &World| (world.plan().stages[2].placement.zero, world.plan().stages[2].peak_bytes);
    // Two ranks of 1,000 bytes on one device; at level 3 of 500.
    assert_eq!(planned(&world), (0, 2000));
    world.host.devices[0].memory_bytes = 1200;
    assert_eq!(planned(&world), (3, 1000));
}
