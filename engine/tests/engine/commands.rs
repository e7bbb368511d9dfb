//! Adopting, comparing, tracing, watching.

use std::{
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};

use rlflow_api::CancelToken;
use rlflow_engine::{
    EngineError, Registry, Request, RunOptions, Status, Summary,
    action::Actions,
    adopt,
    diff::{Side, diff, to_json},
    graph, history, lineage, metrics,
    watch::{Watch, Watched},
    workflow::{LoadOptions, load},
};
use rlflow_store::{ActionRecord, GcOptions};

use crate::{
    kinds,
    world::{CHAIN, CancelAt, World, only, outcomes},
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
    assert_eq!(stages.iter().map(|stage| stage.name.as_str()).collect::<Vec<_>>(), ["a", "all", "b", "base", "data"]);
    assert_eq!(names(&stages[4]), ["files", "keep"]);
    assert_eq!(names(&stages[3]), ["inputs.data"]);
}

#[test]
fn a_diff_of_two_keys_tells_everything_in_them() {
    let world = World::new(CHAIN);
    let summary = world.run();
    let key = |summary: &Summary, stage: usize| world.store().action(summary.stages[stage].key.unwrap()).unwrap().unwrap();
    let compare = |first: &ActionRecord, second: &ActionRecord| {
        let sides = [first, second].map(|record| Side::of_record(&record.key.short(), &record.provenance.stage, record));
        let json = to_json(&sides[0], &sides[1], &diff(&sides[0], &sides[1]));
        let told =
            |change: &serde_json::Value| format!("{} {} -> {} {}", change["setting"], change["from"], change["to"], change["in_key"]);
        let changes: Vec<String> = json["stages"][0]["settings"].as_array().unwrap().iter().map(told).collect();
        changes.join(", ").replace('"', "")
    };
    let (a, b) = (key(&summary, 2), key(&summary, 3));
    assert_eq!(compare(&a, &b), "beta 0.1 -> 0.2 true");
    assert_eq!(compare(&a, &a), "");
    world.edit("beta = 0.1", "beta = 0.1\nseed = 8\nstep_ms = 1");
    let seeded = key(&world.run(), 2);
    assert_eq!(compare(&a, &seeded), "seed 7 -> 8 true, step_ms 0 -> 1 false");
    world.edit("steps = 20", "steps = 19");
    let rebased = key(&world.run(), 2);
    let digest = |record: &ActionRecord| format!("[base {}]", record.provenance.inputs["model"][0].1.short());
    assert_eq!(compare(&seeded, &rebased), format!("inputs.model {} -> {} true", digest(&seeded), digest(&rebased)));
}

#[test]
fn points_of_a_matrix_are_compared_with_their_final_metrics() {
    let swept = CHAIN
        .replace("beta = 0.1", "matrix = { beta = [0.1, 0.5], train.steps = [10, 12] }")
        .replace("[\"a\", \"b\"]", "[\"a[*]\", \"b\"]");
    let world = World::new(&swept);
    world.run();
    let workflow = world.load();
    let side = |name: &str| {
        let stage = workflow.find(name).unwrap();
        Side::of_workflow(name, &workflow, &world.store(), &world.host, Some(&[stage])).unwrap()
    };
    let stages = diff(&side("a[beta=0.1,train.steps=10]"), &side("a[beta=0.5,train.steps=10]"));
    let [point] = &stages[..] else { panic!("two points are one comparison") };
    assert_eq!(
        point.changes.iter().map(|change| (change.setting.as_str(), &change.from, &change.to)).collect::<Vec<_>>(),
        [("beta", &0.1.into(), &0.5.into())]
    );
    let [(name, Some(from), Some(to))] = &point.metrics[..] else { panic!("{:?}", point.metrics) };
    let loss = |name: &str| metrics::metrics(&workflow, &world.store(), &world.host, &[name.to_owned()]).unwrap()[0].finals()["loss"];
    assert_eq!((name.as_str(), *from, *to), ("loss", loss("a[beta=0.1,train.steps=10]"), loss("a[beta=0.5,train.steps=10]")));
    let drawn = graph::mermaid(&workflow, &[]);
    assert!(drawn.contains("\"a ×4<br/>trainer<br/>over beta, train.steps\"") && drawn.matches("-->").count() == 5, "{drawn}");
    for drawn in [graph::dot(&workflow, &[]), graph::svg(&workflow, &[])] {
        assert_eq!((drawn.matches("a ×4").count(), drawn.contains("over beta, train.steps")), (1, true), "{drawn}");
    }
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
    let made_by = format!("by base (trainer 1, rlflow {})", env!("CARGO_PKG_VERSION"));
    let trunk = tree.lines().position(|line| line.contains(&made_by)).unwrap();
    assert!(tree.lines().skip(trunk + 1).take(2).any(|line| line.contains("train.steps=20")), "{tree}");
    assert!(tree.contains("numerics test"));
    let mermaid = lineage::mermaid(&nodes);
    assert_eq!(mermaid.matches("-->").count(), 6, "{mermaid}");
    assert!(mermaid.contains(&format!("data.txt<br/>{}", digest.short())), "{mermaid}");
    assert!(mermaid.contains(&format!("trainer 1, rlflow {}\"]", env!("CARGO_PKG_VERSION"))), "{mermaid}");
    assert!(mermaid.lines().any(|line| line.starts_with("  %% a") && line.contains("train.steps=20")), "{mermaid}");
    let json = serde_json::json!(nodes);
    let raw = json.as_array().unwrap().iter().find(|node| node["maker"]["stage"] == "data").unwrap();
    assert_eq!(raw["maker"]["files"], serde_json::json!([["data.txt", digest]]));
    assert_eq!((&raw["maker"]["settings"]["keep"], &raw["maker"]["kind_version"]), (&2.into(), &1.into()));
}

fn collect(world: &World) -> usize {
    let options = GcOptions { grace: Duration::ZERO, ..GcOptions::default() };
    world.store().gc(&options).unwrap().removed.len()
}

#[test]
fn a_collection_keeps_intermediate_results_of_what_is_cached() {
    let world = World::new(&CHAIN.replace("beta = 0.1", "beta = 0.1\nmemo = true"));
    world.run();
    assert_eq!(world.ran(), ["data", "base", "a", "memo", "b", "all"]);
    // Runs that do not ask for it: one in which nothing runs, and one in which something else does.
    assert!(world.run().is_all_cached());
    collect(&world);
    world.edit("beta = 0.2", "beta = 0.3");
    world.run();
    assert!(collect(&world) > 0, "the older b can go");
    world.ran();
    world.edit("memo = true", "memo = true\ntrain = { lr = 0.25 }");
    world.run();
    assert_eq!(world.ran(), ["a", "all"], "the intermediate result was still there");
    // Nothing uses it any more.
    world.edit("memo = true\n", "");
    world.run();
    let count = || world.store().actions().unwrap().iter().filter(|action| action.provenance.kind == "memo").count();
    assert_eq!(count(), 1);
    collect(&world);
    assert_eq!(count(), 0);
}

#[test]
fn a_collection_keeps_what_a_part_of_a_run_did_not_come_to() {
    let world = World::new(CHAIN);
    world.run();
    world.ran();
    world.run_with(&[], &only(&["a"]));
    collect(&world);
    assert!(world.run().is_all_cached());
    // A run that fails, and one that is interrupted: the results that they did not come to stay, and so does the snapshot.
    world.edit("beta = 0.2", "beta = 0.2\nfail_at = 3");
    assert!(!world.run().ok());
    collect(&world);
    world.edit("\nfail_at = 3", "");
    assert!(world.run().is_all_cached());
    world.edit("steps = 20", "steps = 20, constant = false");
    let cancel = CancelToken::default();
    let at = CancelAt { stage: "base", step: 7, cancel: cancel.clone() };
    assert!(world.run_watched(&[], &RunOptions::default(), &cancel, vec![Box::new(at)]).interrupted);
    collect(&world);
    let plan = world.plan();
    assert_eq!((plan.stages[1].status, plan.stages[1].continues_from_step), (Status::Resume, Some(7)));
    world.edit(", constant = false", "");
    world.ran();
    assert!(world.run().is_all_cached());
}

#[test]
fn a_collection_keeps_what_the_workflow_uses() {
    let world = World::new(CHAIN);
    world.run();
    world.edit("beta = 0.2", "beta = 0.3");
    world.run();
    assert!(collect(&world) > 0);
    // The use of the same results is noted once: a run in which all is cached writes nothing there.
    let uses = || std::fs::read_dir(world.store().folder().join("uses")).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>();
    let stamp = || uses().iter().map(|folder| std::fs::metadata(folder).unwrap().modified().unwrap()).collect::<Vec<_>>();
    let before = stamp();
    world.ran();
    assert!(world.run().is_all_cached());
    assert_eq!(stamp(), before);
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
    assert!(editor[1].contains("base interrupted"), "{editor:?}");
    assert!(editor[2].starts_with("data ran: data file data.txt changed, base ran"), "{editor:?}");
    // What was stopped took a snapshot first: going back goes on from there.
    world.write("data.txt", "one\ntwo\nthree\n");
    let base = &world.plan().stages[1];
    assert!(base.status == Status::Resume && base.continues_from_step.is_some_and(|step| step > 0), "{base:?}");
}

/// A file that is written in parts is read when all of them are there.
#[test]
fn a_watch_waits_until_writing_has_settled() {
    // Where this machine is so busy that parts come far apart, the watch may take one for the whole: that says nothing.
    for _ in 0..5 {
        let world = World::new(CHAIN);
        let slowest = Mutex::new(Duration::ZERO);
        let write_in_parts = || {
            while !std::fs::read_to_string(world.path("ran.txt")).is_ok_and(|ran| ran.lines().any(|stage| stage == "all")) {
                thread::sleep(Duration::from_millis(10));
            }
            for part in 1..=8 {
                let began = Instant::now();
                world.write("data.txt", &"line\n".repeat(part));
                thread::sleep(Duration::from_millis(80));
                let mut slowest = slowest.lock().unwrap();
                *slowest = slowest.max(began.elapsed());
            }
        };
        let told = thread::scope(|scope| {
            scope.spawn(write_in_parts);
            watched(&world, |_| (), 2)
        });
        if slowest.into_inner().unwrap() < Duration::from_millis(200) {
            assert!(told[1].starts_with("data ran: data file data.txt changed"), "{told:?}");
            assert_eq!(world.ran().iter().filter(|stage| *stage == "data").count(), 2, "{told:?}");
            assert!(world.plan().is_all_cached(), "the watch read a part of the file: {:?}", world.planned());
            return;
        }
    }
    println!("skipped: this machine is too busy to write a small file in time");
}

#[test]
fn a_watch_sees_new_files_what_links_lead_to_and_included_files() {
    let part = "[stage.data]\nkind = \"lines\"\nkeep = 2\nsources = [{ path = \"../data/*/x.txt\" }, { path = \"../link.txt\" }]\n";
    let rest = CHAIN.split_once("[stage.base]").unwrap().1;
    let world = World::new(&format!("include = [\"shared/part.toml\"]\n[stage.base]{rest}"));
    for folder in ["shared", "data/a", "elsewhere"] {
        std::fs::create_dir_all(world.path(folder)).unwrap();
    }
    world.write("shared/part.toml", part);
    world.write("data/a/x.txt", "1\n");
    world.write("elsewhere/target.txt", "2\n");
    std::os::unix::fs::symlink(world.path("elsewhere/target.txt"), world.path("link.txt")).unwrap();
    let told = watched(
        &world,
        |run| match run {
            1 => {
                std::fs::create_dir(world.path("data/new")).unwrap();
                world.write("data/new/x.txt", "3\n");
            }
            2 => world.write("elsewhere/target.txt", "4\n"),
            3 => std::fs::rename(world.path("data/a"), world.path("moved")).unwrap(),
            _ => world.write("shared/part.toml", &part.replace("keep = 2", "keep = 1")),
        },
        5,
    );
    let why = |at: usize| told[at].split(", base").next().unwrap().to_owned();
    assert_eq!(told.len(), 5, "{told:?}");
    assert!(why(1).starts_with("data ran: data file") && why(1).ends_with("data/new/x.txt was added"), "{told:?}");
    assert!(why(2).starts_with("data ran: data file") && why(2).ends_with("link.txt changed"), "{told:?}");
    assert!(why(3).starts_with("data ran: data file") && why(3).ends_with("data/a/x.txt was removed"), "{told:?}");
    assert!(why(4).starts_with("data ran") && why(4).ends_with("keep changed: 2 -> 1"), "{told:?}");
}

#[test]
fn a_watch_stops_what_was_decided_before_an_edit_and_started_after_it() {
    let first = "[stage.first]\nkind = \"trainer\"\ntrain = { steps = 10 }\nstep_ms = 100\n";
    let world =
        World::new(&CHAIN.replace("[stage.data]", &format!("{first}[stage.data]")).replace("steps = 20 }", "steps = 20 }\nstep_ms = 50"));
    world.run_with(&[], &only(&["data"]));
    world.ran();
    // `base` is decided at once, and waits for the one job that `first` has.
    let told = thread::scope(|scope| {
        scope.spawn(|| {
            while !world.path("ran.txt").exists() {
                thread::sleep(Duration::from_millis(10));
            }
            world.write("data.txt", "ONE\ntwo\n");
        });
        watched(&world, |_| (), 3)
    });
    assert_eq!(told[0], "cancelling base");
    assert!(told[1].contains("first ran: never ran") && told[1].contains("base interrupted: never ran"), "{told:?}");
    assert!(told[2].contains("first cached, data ran: data file data.txt changed, base ran"), "{told:?}");
}

#[test]
fn a_watch_notices_that_what_was_missing_is_there() {
    let world = World::new(&CHAIN.replace("data.txt", "later/data.txt"));
    let told = watched(
        &world,
        |_| {
            std::fs::create_dir(world.path("later")).unwrap();
            world.write("later/data.txt", "1\n");
        },
        2,
    );
    assert_eq!(told[0], "broken: \"missing_file\"");
    assert!(told[1].starts_with("data ran: never ran"), "{told:?}");
}
