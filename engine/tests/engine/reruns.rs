//! What runs again, what does not, and why.

use rlflow_api::{CancelToken, StageEvent};
use rlflow_engine::{Request, RunOptions, event::Event, history, report};
use rlflow_store::Digest;

use crate::world::{CHAIN, CancelAt, Recorder, World, load_file, only, outcomes};

fn force(stage: &str) -> RunOptions {
    RunOptions { request: Request { force: vec![stage.into()], ..Request::default() }, ..RunOptions::default() }
}

#[test]
fn everything_runs_once_and_then_is_cached() {
    let world = World::new(CHAIN);
    assert_eq!(
        world.planned(),
        [
            "data run: never ran",
            "base pending: depends on the result of data (never ran)",
            "a pending: depends on the result of base (data: never ran)",
            "b pending: depends on the result of base (data: never ran)",
            "all pending: depends on the result of a (data: never ran)",
        ]
    );
    let first = world.run();
    assert!(first.ok());
    assert_eq!(world.ran(), ["data", "base", "a", "b", "all"]);
    assert!(world.plan().is_all_cached());
    let second = world.run();
    assert!(second.is_all_cached());
    assert_eq!(world.ran(), [] as [&str; 0]);
    let outputs = |summary: &rlflow_engine::Summary| summary.stages.iter().map(|stage| stage.outputs.clone()).collect::<Vec<_>>();
    assert_eq!(outputs(&first), outputs(&second));
}

#[test]
fn a_setting_reruns_its_stage_and_what_reads_it() {
    let world = World::new(CHAIN);
    world.run();
    world.ran();
    world.edit("beta = 0.2", "beta = 0.3");
    assert_eq!(world.planned(), ["b run: beta changed: 0.2 -> 0.3", "all pending: depends on the result of b (beta changed: 0.2 -> 0.3)"]);
    let summary = world.run();
    assert_eq!(world.ran(), ["b", "all"]);
    let [data, base, a, b, all] = outcomes(&summary).try_into().unwrap();
    assert_eq!([data, base, a], ["data cached", "base cached", "a cached"]);
    assert_eq!([b, all], ["b ran: beta changed: 0.2 -> 0.3", "all ran: input models[1] changed (because b changed)"]);
    // Going back costs nothing.
    world.edit("beta = 0.3", "beta = 0.2");
    assert!(world.run().is_all_cached());
}

#[test]
fn a_rerun_is_compared_with_the_result_that_was_used_last() {
    let world = World::new(CHAIN);
    world.run();
    world.edit("beta = 0.2", "beta = 0.3");
    world.run();
    world.edit("beta = 0.3", "beta = 0.2");
    assert!(world.run().is_all_cached());
    world.edit("beta = 0.2", "beta = 0.4");
    assert_eq!(world.planned()[0], "b run: beta changed: 0.2 -> 0.4");
    assert_eq!(outcomes(&world.run())[3], "b ran: beta changed: 0.2 -> 0.4");
    // A run of a part says nothing about the rest.
    world.run_with(&["stage.a.beta=0.7"], &only(&["a"]));
    world.edit("beta = 0.4", "beta = 0.5");
    assert_eq!(world.planned()[0], "b run: beta changed: 0.4 -> 0.5");
    // What a killed run made is the last result, although no run says that it reached it.
    world.run();
    let uses = world.store().folder().join("uses");
    std::fs::remove_dir_all(&uses).unwrap();
    world.edit("beta = 0.5", "beta = 0.6");
    assert_eq!(world.planned()[0], "b run: beta changed: 0.5 -> 0.6");
}

#[test]
fn another_input_is_said_to_be_another() {
    let other = "[stage.base2]\nkind = \"trainer\"\ninputs = { data = \"data\" }\ntrain = { steps = 5 }\n";
    let world = World::new(&format!("{CHAIN}\n{other}"));
    world.run();
    world.edit("inputs = { model = \"base\" }\nbeta = 0.2", "inputs = { model = \"base2\" }\nbeta = 0.2");
    assert_eq!(world.planned()[0], "b run: input model now comes from base2 instead of base");
    let workflow = world.load();
    let json = serde_json::json!(world.plan().to_json(&workflow));
    let reason = &json["stages"][workflow.find("b").unwrap()]["reason"];
    assert_eq!([&reason["kind"], &reason["stage"], &reason["from_stage"]], ["input_changed", "base2", "base"]);
    assert_ne!(reason["from"], reason["to"]);
    // Both know a stage by a new name as the one that changed, if the old name is gone.
    world.edit("base2", "trunk");
    world.run();
    world.edit("[stage.trunk]", "[stage.renamed]");
    world.edit("\"trunk\"", "\"renamed\"");
    world.edit("steps = 5", "steps = 6");
    world.run();
    assert_eq!(outcomes(&world.run_with(&["stage.b.seed=9"], &RunOptions::default()))[3], "b ran: seed changed: 7 -> 9");
}

#[test]
fn a_result_that_is_asked_for_by_name_can_be_read() {
    let world = World::new(CHAIN);
    let first = world.run();
    world.ran();
    collect(&world, first.stages[1].outputs["model"]);
    collect(&world, first.stages[2].outputs["model"]);
    // Nothing must read them: all is cached, and so is what another stage needs of itself only.
    assert!(world.run().is_all_cached());
    assert!(world.run_with(&[], &only(&["b", "data"])).is_all_cached());
    let needed = "its result model is missing from the store and it was asked for by name";
    let plan = world.plan_of(&only(&["a"]).request);
    let planned: Vec<String> = plan.stages.iter().filter_map(|stage| stage.rerun.as_ref()).map(|rerun| rerun.text()).collect();
    assert_eq!(planned, ["its result model is missing from the store and a must read it".to_owned(), needed.to_owned()]);
    let summary = world.run_with(&[], &only(&["a"]));
    assert_eq!(world.ran(), ["base", "a"]);
    assert_eq!(outcomes(&summary)[2], format!("a ran (same output): {needed}"));
    assert_eq!(summary.stages[2].to_json()["reason"]["needed_by"], "the request");
    assert!(world.run_with(&[], &only(&["a"])).is_all_cached());
}

#[test]
fn what_cannot_change_a_result_reruns_nothing() {
    let world = World::new(CHAIN);
    world.run();
    world.ran();
    // Another name, another order, comments, defaults spelled out, execution settings.
    let other = r#"
        name = "other"       # renamed
        [stage.collected]
        inputs = { models = ["first", "b"] }
        kind = "collect"
        [stage.first]
        seed = 7
        beta = 0.1
        inputs = { model = "trunk" }
        kind = "trainer"
        step_ms = 1
        snapshot_every = 3
        device = { cpu = 4 }
        zero = 2
        offload = "cpu"
        train = { steps = 10, lr = 0.5, constant = true }
        [stage.b]
        kind = "trainer"
        seed = 7
        inputs = { model = "trunk.model" }
        beta = 0.2
        [stage.trunk]
        kind = "trainer"
        seed = 7
        inputs = { data = "lines" }
        train.steps = 20
        [stage.lines]
        kind = "lines"
        keep = 2
        seed = 99
        sources = [{ path = "moved.txt" }]
    "#;
    world.write("flow.toml", other);
    std::fs::rename(world.path("data.txt"), world.path("moved.txt")).unwrap();
    assert_eq!(world.planned(), [] as [&str; 0]);
    assert!(world.run_with(&[], &RunOptions { jobs: 3, ..RunOptions::default() }).is_all_cached());
}

/// The first stage that runs, with its reason, which is the same, to the last member, in what `plan`, `run`, its events and `log` tell
/// scripts. (`status` is a plan of everything; that the commands agree is tested in the workspace's `tests/cli`.)
fn reason_of(world: &World, options: &RunOptions) -> String {
    let workflow = world.load();
    let planned = serde_json::json!(world.plan_of(&options.request).to_json(&workflow));
    let stages = planned["stages"].as_array().unwrap();
    assert!(stages.iter().all(|stage| stage["reason"].is_null() == (stage["status"] == "cached")), "{planned}");
    let first = stages.iter().find(|stage| !stage["reason"].is_null()).unwrap();
    let (name, reason) = (first["name"].as_str().unwrap(), &first["reason"]);
    let kind = reason["kind"].as_str().unwrap();
    let has_values = kind.ends_with("_changed") || kind == "files_rearranged";
    assert_eq!(reason.get("from").is_some() && reason.get("to").is_some(), has_values, "{reason}");
    let recorder = Recorder::default();
    let summary = world.run_watched(&[], options, &CancelToken::default(), vec![Box::new(recorder.clone())]);
    assert_eq!(summary.stages.iter().find(|stage| stage.name == name).unwrap().to_json()["reason"], *reason);
    let events: Vec<serde_json::Value> = recorder.0.lock().unwrap().iter().map(|event| event.to_json(0.0)).collect();
    for event in ["stage_started", "stage_finished"] {
        let told = events.iter().find(|told| told["event"] == event && told["stage"] == name).unwrap();
        assert_eq!(told["reason"], *reason, "{event}");
    }
    let run = &history::past_runs(&world.store(), 1).unwrap()[0];
    assert_eq!(run.stages.iter().find(|stage| stage["stage"] == name).unwrap()["reason"], *reason);
    format!("{name} {}: {}", first["status"].as_str().unwrap(), reason["text"].as_str().unwrap())
}

fn reason_of_a_run(world: &World) -> String {
    reason_of(world, &RunOptions::default())
}

#[test]
fn every_kind_of_change_has_its_reason() {
    let world = World::new(&CHAIN.replace("data.txt", "d*.txt"));
    let mut reasons = vec![reason_of_a_run(&world)];
    let mut with = |from: &str, to: &str| {
        world.edit(from, to);
        reasons.push(reason_of_a_run(&world));
        world.edit(to, from);
        assert!(world.run().is_all_cached());
    };
    with("seed = 7", "seed = 8");
    with("steps = 20", "steps = 19");
    with("steps = 20", "steps = 30");
    with("models = [\"a\", \"b\"]", "models = [\"a\"]");
    with("models = [\"a\", \"b\"]", "models = [\"b\", \"a\"]");
    with("keep = 2", "keep = 1");
    let mut after = |change: &dyn Fn()| {
        change();
        reasons.push(reason_of_a_run(&world));
    };
    after(&|| world.write("data.txt", "one\ntwo\n3\n"));
    after(&|| world.write("data2.txt", "four\n"));
    after(&|| {
        std::fs::rename(world.path("data.txt"), world.path("other")).unwrap();
        std::fs::rename(world.path("data2.txt"), world.path("data.txt")).unwrap();
        std::fs::rename(world.path("other"), world.path("data2.txt")).unwrap();
    });
    // Names are in no key, so what is left must not have been the data before.
    after(&|| std::fs::remove_file(world.path("data2.txt")).unwrap());
    assert_eq!(
        reasons,
        [
            "data run: never ran",
            "base run: seed changed: 7 -> 8",
            "base run: train.steps changed: 20 -> 19",
            "base extend: train.steps changed: 20 -> 30",
            "all run: input models[1] no longer comes from b",
            "all run: input models[0] now comes from b instead of a, and input models[1] now comes from a instead of b",
            "data run: keep changed: 2 -> 1",
            "data run: data file data.txt changed",
            "data run: data file data2.txt was added",
            "data run: its data files are read in another order or as another format",
            "data run: data file data2.txt was removed",
        ]
    );
}

#[test]
fn what_runs_for_another_reason_than_a_change_says_so_everywhere() {
    let world = World::new(CHAIN);
    let cancel = CancelToken::default();
    let at = CancelAt { stage: "base", step: 7, cancel: cancel.clone() };
    world.run_watched(&[], &RunOptions::default(), &cancel, vec![Box::new(at)]);
    assert_eq!(reason_of_a_run(&world), "base resume: was interrupted after step 7");
    assert_eq!(reason_of(&world, &force("base")), "base run: forced by --force base");
    // Of two that need what is gone, the plan names the one that the run names.
    let whole = world.run();
    collect(&world, whole.stages[1].outputs["model"]);
    world.edit("beta = 0.", "beta = 1.");
    assert_eq!(reason_of_a_run(&world), "base run: its result model is missing from the store and a must read it");
    collect(&world, world.run().stages[2].outputs["model"]);
    let asked = "a run: its result model is missing from the store and it was asked for by name";
    assert_eq!(reason_of(&world, &only(&["a"])), asked);
    crate::failures::damage(&world.store(), *world.run().stages[4].outputs.values().next().unwrap());
    assert!(!world.store().fsck(true).unwrap().problems.is_empty());
    assert_eq!(reason_of_a_run(&world), "all run: its result results was found damaged and set aside");
    assert!(world.run().is_all_cached());
    world.edit("beta = 1.1", "beta = 1.1\nfail_at = 3");
    let changed = reason_of_a_run(&world);
    assert_eq!(reason_of_a_run(&world), changed.replacen("a run", "a failed", 1));
}

#[test]
fn the_wave_stops_at_an_equal_output() {
    let world = World::new(CHAIN);
    world.run();
    world.ran();
    world.write("data.txt", "one\ntwo\nchanged after what is kept\n");
    let summary = world.run();
    assert_eq!(world.ran(), ["data"]);
    assert_eq!(outcomes(&summary)[..2], ["data ran (same output): data file data.txt changed", "base cached"]);
    world.write("data.txt", "ONE\ntwo\n");
    world.run();
    assert_eq!(world.ran(), ["data", "base", "a", "b", "all"]);
}

#[test]
fn a_forced_stage_runs_and_nothing_below_it() {
    let world = World::new(CHAIN);
    world.run();
    world.ran();
    let plan = world.plan_of(&force("base").request);
    let statuses: Vec<&str> = plan.stages.iter().map(|stage| stage.status.name()).collect();
    assert_eq!(statuses, ["cached", "run", "pending", "pending", "pending"]);
    let summary = world.run_with(&[], &force("base"));
    assert_eq!(world.ran(), ["base"]);
    assert_eq!(outcomes(&summary)[1], "base ran (same output): forced by --force base");
    let all = RunOptions { request: Request { no_cache: true, ..Request::default() }, ..RunOptions::default() };
    world.run_with(&[], &all);
    assert_eq!(world.ran(), ["data", "base", "a", "b", "all"]);
}

#[test]
fn only_named_stages_and_what_they_need_run() {
    let world = World::new(CHAIN);
    let summary = world.run_with(&[], &only(&["a"]));
    assert_eq!(world.ran(), ["data", "base", "a"]);
    assert_eq!(summary.stages.len(), 3);
    let wrong = Request { stages: vec!["bse".into()], force: vec!["nothing_like_it".into()], ..Request::default() };
    let error = rlflow_engine::Plan::new(&world.load(), &world.store(), &world.host, &wrong).unwrap_err().to_json();
    let errors = error["errors"].as_array().unwrap();
    assert_eq!(errors.len(), 2);
    assert_eq!(errors[0]["hint"], "did you mean `base`?");
    assert_eq!(errors[1]["code"], "unknown_stage");
}

/// Removes every blob and manifest of a stage's outputs.
fn collect(world: &World, digest: Digest) {
    let store = world.store();
    let artifact = store.open_artifact(digest).unwrap().unwrap();
    let blobs = artifact.manifest().entries.iter().map(|entry| ("blobs", entry.digest));
    for (family, digest) in blobs.chain([("manifests", digest)]) {
        let name = digest.to_string();
        let path = store.folder().join(family).join(&name[..2]).join(&name);
        std::fs::remove_file(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
}

#[test]
fn a_collected_result_is_made_again_only_when_something_must_read_it() {
    let world = World::new(CHAIN);
    let first = world.run();
    world.ran();
    collect(&world, first.stages[1].outputs["model"]);
    collect(&world, first.stages[0].outputs["text"]);
    assert!(world.run().is_all_cached());
    world.edit("beta = 0.2", "beta = 0.3");
    let missing = |port: &str, needed_by: &str| format!("its result {port} is missing from the store and {needed_by} must read it");
    let expected = [
        format!("data run: {}", missing("text", "base")),
        // The final snapshot shares the blob that was lost, so this starts over.
        format!("base run: {}", missing("model", "b")),
        "b run: beta changed: 0.2 -> 0.3".into(),
        "all pending: depends on the result of b (beta changed: 0.2 -> 0.3)".into(),
    ];
    assert_eq!(world.planned(), expected);
    let summary = world.run();
    assert!(summary.ok());
    assert_eq!(world.ran(), ["data", "base", "b", "all"]);
    assert_eq!(summary.stages[1].outputs, first.stages[1].outputs);
    assert_eq!(outcomes(&summary)[2], "a cached");
}

/// A reader that waits for one result that is gone has not yet met another: whoever meets that first is named for it, in a plan too.
#[test]
fn plan_and_run_name_the_same_readers_of_several_results_that_are_gone() {
    let trainer =
        |name: &str, inputs: &str, beta: f64| format!("[stage.{name}]\nkind = \"trainer\"\ninputs = {{ {inputs} }}\nbeta = {beta}\n");
    let world = World::new(
        &[
            "name = \"lost\"\nedition = 1\nseed = 7\n[stage.data]\nkind = \"lines\"\nsources = [{ path = \"data.txt\" }]\n".to_owned(),
            trainer("s", "data = \"data\"", 0.1),
            trainer("t", "data = \"data\"", 0.2),
            trainer("first", "model = \"s\"", 0.3),
            "[stage.both]\nkind = \"collect\"\ninputs = { models = [\"s\", \"t\"] }\n".to_owned(),
            trainer("last", "model = \"t\"", 0.4),
        ]
        .concat(),
    );
    let whole = world.run();
    assert!(whole.ok(), "{:?}", outcomes(&whole));
    for (stage, port) in [(0, "text"), (1, "model"), (2, "model")] {
        collect(&world, whole.stages[stage].outputs[port]);
    }
    world.edit("beta = 0.3", "beta = 0.5");
    world.edit("[\"s\", \"t\"]", "[\"t\", \"s\"]");
    world.edit("beta = 0.4", "beta = 0.6");
    let missing = |port: &str, needed_by: &str| format!("its result {port} is missing from the store and {needed_by} must read it");
    let expected = [
        format!("data run: {}", missing("text", "s")),
        format!("s run: {}", missing("model", "first")),
        // Not for `both`, which waits for `s` when `last` is looked at.
        format!("t run: {}", missing("model", "last")),
        "first run: beta changed: 0.3 -> 0.5".to_owned(),
        "both run: input models[0] now comes from t instead of s, and input models[1] now comes from s instead of t".to_owned(),
        "last run: beta changed: 0.4 -> 0.6".to_owned(),
    ];
    assert_eq!(world.planned(), expected);
    let ran: Vec<String> = outcomes(&world.run()).iter().map(|outcome| outcome.replace(" (same output)", "")).collect();
    assert_eq!(ran, expected.map(|planned| planned.replacen(" run: ", " ran: ", 1)));
}

#[test]
fn an_interrupted_stage_continues_and_ends_like_an_uninterrupted_one() {
    let whole = World::new(CHAIN).run();
    for step in [1, 7, 13] {
        let world = World::new(CHAIN);
        let cancel = CancelToken::default();
        let at = CancelAt { stage: "base", step, cancel: cancel.clone() };
        let stopped = world.run_watched(&[], &RunOptions::default(), &cancel, vec![Box::new(at)]);
        assert!(stopped.interrupted && !stopped.ok());
        assert_eq!(outcomes(&stopped)[1..3], ["base interrupted: never ran", "a skipped: base was interrupted"]);
        assert_eq!(stopped.stages[1].to_json()["interrupted"], true);
        let told = report::run_report(&world.load(), &world.store(), &stopped, "rlflow run", &|_, _| String::new()).unwrap();
        assert!(told.contains("interrupted: 1 ran, 1 interrupted, 3 skipped in "), "{told}");
        assert_eq!(world.plan().stages[1].error, None);
        assert_eq!(world.planned()[0], format!("base resume: was interrupted after step {step}"));
        world.ran();
        let resumed = world.run();
        assert_eq!(world.ran(), ["base", "a", "b", "all"]);
        assert_eq!(outcomes(&resumed)[1], format!("base resumed: was interrupted after step {step}"));
        for (resumed, whole) in resumed.stages.iter().zip(&whole.stages) {
            assert_eq!((&resumed.name, &resumed.outputs, &resumed.metrics), (&whole.name, &whole.outputs, &whole.metrics));
        }
        let records = |world: &World, summary: &rlflow_engine::Summary| {
            world.store().action(summary.stages[1].key.unwrap()).unwrap().unwrap().records
        };
        let other = World::new(CHAIN);
        let other_whole = other.run();
        assert_eq!(records(&world, &resumed), records(&other, &other_whole), "series and samples are equal bit by bit");
    }
}

#[test]
fn more_steps_continue_from_a_finished_shorter_run() {
    let world = World::new(CHAIN);
    world.run();
    world.edit("steps = 20", "steps = 30");
    assert_eq!(world.planned()[0], "base extend: train.steps changed: 20 -> 30");
    assert_eq!(world.plan().stages[1].continues_from_step, Some(20));
    let recorder = Recorder::default();
    let extended = world.run_watched(&[], &RunOptions::default(), &CancelToken::default(), vec![Box::new(recorder.clone())]);
    assert_eq!(outcomes(&extended)[1], "base extended: train.steps changed: 20 -> 30");
    let events = recorder.0.lock().unwrap();
    let trained =
        events.iter().filter(|event| matches!(event, Event::Stage { stage, event: StageEvent::Metrics { .. } } if stage == "base"));
    assert_eq!(trained.count(), 10);
    let scratch = World::new(&CHAIN.replace("steps = 20", "steps = 30")).run();
    assert_eq!(extended.stages[1].outputs, scratch.stages[1].outputs);
    assert_eq!(extended.stages[1].metrics, scratch.stages[1].metrics);
    let long = World::new(&CHAIN.replace("steps = 20", "steps = 1000"));
    long.run();
    long.edit("steps = 1000", "steps = 2000");
    let told = report::plan_report(&long.load(), &long.plan(), true);
    assert!(told.contains("train.steps changed: 1000 -> 2000; continues from step 1,000"), "{told}");
    let json = serde_json::json!(long.plan().to_json(&long.load()));
    assert_eq!((&json["stages"][1]["status"], &json["stages"][1]["continues_from_step"]), (&"extend".into(), &1000.into()));
}

#[test]
fn a_schedule_that_depends_on_its_end_starts_over() {
    let world = World::new(&CHAIN.replace("steps = 20", "steps = 20, constant = false"));
    world.run();
    world.edit("steps = 20", "steps = 30");
    assert_eq!(world.planned()[0], "base run: train.steps changed: 20 -> 30");
}

#[test]
fn intermediate_results_outlive_other_settings() {
    let world = World::new(&CHAIN.replace("beta = 0.1", "beta = 0.1\nmemo = true"));
    world.run();
    assert_eq!(world.ran(), ["data", "base", "a", "memo", "b", "all"]);
    world.edit("memo = true", "memo = true\ntrain = { lr = 0.25 }");
    world.run();
    assert_eq!(world.ran(), ["a", "all"]);
}

#[test]
fn a_stage_of_another_workflow_is_another_stage_until_that_file_is_gone() {
    let world = World::new(CHAIN);
    world.run();
    world.write("other.toml", &CHAIN.replace("beta = 0.2", "beta = 0.3"));
    let other = || load_file(&world.path("other.toml"), &[]);
    let reason = || {
        let plan = rlflow_engine::Plan::new(&other(), &world.store(), &world.host, &Request::default()).unwrap();
        plan.stages[3].rerun.as_ref().unwrap().text()
    };
    assert_eq!(reason(), "never ran");
    assert_eq!(rlflow_engine::metrics::results(&other(), &world.store(), &world.host, &[3]).unwrap().len(), 0);
    std::fs::remove_file(world.path("flow.toml")).unwrap();
    assert_eq!(reason(), "beta changed: 0.2 -> 0.3");
}

#[test]
fn a_run_that_was_killed_before_it_published_is_resumed_and_not_extended() {
    let world = World::new(CHAIN);
    let whole = world.run();
    std::fs::remove_dir_all(world.path(".rlflow/actions")).unwrap();
    std::fs::create_dir(world.path(".rlflow/actions")).unwrap();
    let _ = std::fs::remove_dir_all(world.path(".rlflow/index"));
    let resumed = world.run();
    assert_eq!(outcomes(&resumed)[1], "base resumed: was interrupted after step 20");
    assert_eq!(resumed.stages[1].outputs, whole.stages[1].outputs);
}

#[test]
fn a_summary_for_scripts_has_the_metrics_of_cached_stages_and_events_name_their_stage_once() {
    let world = World::new(CHAIN);
    let recorder = Recorder::default();
    let first = world.run_watched(&[], &RunOptions::default(), &CancelToken::default(), vec![Box::new(recorder.clone())]);
    let again = world.run_with(&[], &RunOptions { cached_metrics: true, ..RunOptions::default() });
    assert!(again.is_all_cached() && !again.stages[1].metrics.is_empty());
    assert_eq!(again.stages[1].metrics, first.stages[1].metrics);
    let events = recorder.0.lock().unwrap();
    let ended: Vec<_> = events.iter().filter(|event| matches!(event, Event::StageFinished(_))).map(|event| event.to_json(0.0)).collect();
    assert_eq!((&ended[0]["stage"], ended[0].get("name")), (&"data".into(), None));
}

#[test]
fn estimates_grow_with_the_steps_and_say_what_they_leave_out() {
    let world = World::new(&CHAIN.replace("edition = 1", "edition = 1\n[defaults.train]\nsteps = 10\n").replace("seed = 7", ""));
    world.run();
    let seconds = |world: &World, stage: usize| world.plan().stages[stage].estimated_seconds.unwrap();
    world.edit("beta = 0.2", "beta = 0.3");
    let before = seconds(&world, 3);
    world.edit("beta = 0.3", "beta = 0.3\ntrain = { steps = 1000 }");
    assert!((seconds(&world, 3) / before - 100.0).abs() < 1e-6);
    let told = |world: &World| report::plan_report(&world.load(), &world.plan(), true);
    assert!(told(&world).contains(", about "), "{}", told(&world));
    assert!(seconds(&world, 4) > 0.0, "pending stages count");
    let more = "[stage.c]\nkind = \"trainer\"\ninputs = { model = \"base\" }\nbeta = 0.9\n[stage.all]";
    world.edit("[stage.all]", more);
    assert!(told(&world).contains(", at least "), "{}", told(&world));
}
