//! Adopting, comparing, tracing, watching.

use std::{
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};

use rlflow_api::CancelToken;
use rlflow_engine::{
    EngineError, Registry, Request, RunOptions, Summary,
    action::Actions,
    adopt,
    diff::{Side, diff},
    history, lineage,
    watch::{Watch, Watched},
    workflow::{LoadOptions, load},
};
use rlflow_store::GcOptions;

use crate::{
    kinds,
    world::{CHAIN, World, outcomes},
};

#[test]
fn an_adopted_result_is_cached_under_todays_key() {
    let world = World::new(CHAIN);
    let first = world.run();
    world.ran();
    world.edit("beta = 0.1", "beta = 0.15");
    let workflow = world.load();
    let store = world.store();
    let actions = Actions::new(&workflow, &store, &world.host, &Request::default()).unwrap();
    let code = |error: EngineError| error.to_json()["errors"][0]["code"].as_str().unwrap().to_owned();
    assert_eq!(code(adopt(&actions, "all").unwrap_err()), "input_not_cached");
    assert_eq!(code(adopt(&actions, "b").unwrap_err()), "nothing_to_adopt");
    let adopted = adopt(&actions, "a").unwrap();
    assert!(adopted.provenance.adopted);
    assert_eq!(adopted.outputs, *first.stages[2].outputs);
    assert_eq!(adopted.full_key["settings"]["beta"], 0.15);
    assert!(world.run().is_all_cached());
    assert_eq!(world.ran(), [] as [&str; 0]);
}

#[test]
fn a_diff_names_settings_inputs_and_metrics() {
    let world = World::new(CHAIN);
    world.run();
    let workflow = world.load();
    let side = |name: &str| {
        let stage = workflow.find(name).unwrap();
        Side::of_workflow(name, &workflow, &world.store(), &world.host, Some(&[stage])).unwrap()
    };
    let stages = diff(&side("a"), &side("b"));
    let names = |stage: &rlflow_engine::diff::StageDiff| stage.changes.iter().map(|change| change.setting.clone()).collect::<Vec<_>>();
    assert_eq!((stages.len(), stages[0].name.as_str(), names(&stages[0])), (1, "a -> b", vec!["beta".to_owned()]));
    assert_eq!(stages[0].metrics.iter().map(|metric| metric.0.as_str()).collect::<Vec<_>>(), ["loss"]);
    assert!(diff(&side("a"), &side("a"))[0].changes.is_empty());

    world.edit("keep = 2", "keep = 1");
    world.write("data.txt", "1\n2\n");
    world.run();
    let runs = history::past_runs(&world.store(), 10).unwrap();
    let sides: Vec<Side> = runs.iter().rev().map(|run| Side::of_run(run, &world.store()).unwrap()).collect();
    let stages = diff(&sides[0], &sides[1]);
    assert_eq!(stages.iter().map(|stage| stage.name.as_str()).collect::<Vec<_>>(), ["a", "b", "base", "data"]);
    assert_eq!(names(&stages[3]), ["files", "keep"]);
}

#[test]
fn lineage_reaches_the_raw_files() {
    let world = World::new(CHAIN);
    let summary = world.run();
    let nodes = world.store().lineage(summary.stages[4].outputs["results"]).unwrap();
    let tree = lineage::tree(&nodes);
    let digest = rlflow_store::Digest::of(b"one\ntwo\nthree\n");
    assert!(tree.contains(&format!("file data.txt {digest}")), "{tree}");
    assert!(tree.starts_with("evaluation "));
    assert_eq!(tree.matches("as above").count(), 1, "the shared base is told once: {tree}");
    let mermaid = lineage::mermaid(&nodes);
    assert_eq!(mermaid.matches("-->").count(), 6, "{mermaid}");
}

#[test]
fn a_collection_keeps_what_the_workflow_uses() {
    let world = World::new(CHAIN);
    world.run();
    world.edit("beta = 0.2", "beta = 0.3");
    world.run();
    let options = GcOptions { grace: Duration::ZERO, ..GcOptions::default() };
    assert!(!world.store().gc(&options).unwrap().removed.is_empty());
    world.ran();
    assert!(world.run().is_all_cached());
    // What longer runs extend from is part of what is used.
    world.edit("steps = 20", "steps = 25");
    assert_eq!(world.plan().stages[1].continues_from_step, Some(20));
    world.edit("steps = 25", "steps = 20");
    world.edit("beta = 0.3", "beta = 0.2");
    world.run();
    assert_eq!(world.ran(), ["b", "all"]);
}

/// Watches a world until `enough` of what was told, with edits made by `edit` after each run.
fn watched(world: &World, edit: impl Fn(usize) + Sync, enough: usize) -> Vec<String> {
    let told = Mutex::new(Vec::new());
    let runs = Mutex::new(0);
    let stop = CancelToken::default();
    let registry = Registry::new(kinds::kinds());
    let path = world.path("flow.toml");
    let (store, options) = (world.store(), RunOptions::default());
    let note = |summary: &Summary| told.lock().unwrap().push(outcomes(summary).join(", "));
    let tell = |event: Watched<'_>| {
        match event {
            Watched::Broken(error) => told.lock().unwrap().push(format!("broken: {}", error.to_json()["errors"][0]["code"])),
            Watched::Ran(_, summary) => note(summary),
            Watched::Cancelling(stage) => told.lock().unwrap().push(format!("cancelling {stage}")),
            Watched::Changed(_) => return,
        }
        let mut runs = runs.lock().unwrap();
        *runs += 1;
        if *runs >= enough {
            stop.cancel();
        } else {
            edit(*runs);
        }
    };
    let watch = Watch {
        load: &|| load(&path, &LoadOptions::default(), &registry),
        sinks: &Vec::new,
        tell: &tell,
        store: &store,
        host: &world.host,
        options: &options,
        stop: &stop,
    };
    thread::scope(|scope| {
        // A watch that never sees its edit must not hang the tests.
        scope.spawn(|| {
            let started = Instant::now();
            while !stop.is_cancelled() && started.elapsed() < Duration::from_secs(60) {
                thread::sleep(Duration::from_millis(20));
            }
            stop.cancel();
        });
        watch.run(&path).unwrap();
    });
    told.into_inner().unwrap()
}

#[test]
fn a_watch_reruns_what_changed_and_survives_a_broken_file() {
    let world = World::new(CHAIN);
    let told = watched(
        &world,
        |run| match run {
            1 => world.write("data.txt", "ONE\ntwo\n"),
            2 => world.write("flow.toml", "name = 3"),
            _ => world.write("flow.toml", &CHAIN.replace("beta = 0.2", "beta = 0.3")),
        },
        4,
    );
    assert_eq!(told.len(), 4, "{told:?}");
    assert!(told[0].starts_with("data ran: never ran"));
    assert!(told[1].starts_with("data ran: data file data.txt changed, base ran: input data changed (because data changed)"));
    assert!(told[2].starts_with("broken: "));
    assert!(told[3].contains("a cached, b ran: beta changed: 0.2 -> 0.3"), "{told:?}");
}

#[test]
fn a_watch_stops_a_stage_whose_inputs_changed() {
    let world = World::new(&CHAIN.replace("steps = 20 }", "steps = 20 }\nstep_ms = 100"));
    let editor = thread::scope(|scope| {
        scope.spawn(|| {
            while !world.path("ran.txt").exists() || std::fs::read_to_string(world.path("ran.txt")).unwrap().lines().count() < 2 {
                thread::sleep(Duration::from_millis(10));
            }
            world.write("data.txt", "ONE\ntwo\n");
        });
        watched(&world, |_| (), 3)
    });
    assert_eq!(editor[0], "cancelling base");
    assert!(editor[1].contains("base failed"), "{editor:?}");
    assert!(editor[2].starts_with("data ran: data file data.txt changed, base ran"), "{editor:?}");
}
