//! Which settings belong to a result's identity, for every setting of the small kinds. The same is tested for the real
//! kinds in the workspace's `tests/keys.rs`.

use std::{collections::BTreeMap, path::Path};

use rlflow_api::{CancelToken, StageEvent};
use rlflow_engine::{
    Plan, Registry, Request, RunOptions,
    action::Actions,
    adopt,
    docs::Place,
    event::Event,
    workflow::{LoadOptions, load},
};

use crate::{
    kinds,
    vary::{Mark, check_key_table, spell_out, vary, write_and_load},
    world::{CHAIN, CancelAt, Recorder, World, outcomes},
};

#[test]
fn the_table_of_what_enters_a_key_has_every_setting_of_every_kind() {
    let table = check_key_table(&Registry::new(kinds::kinds()));
    assert!(table.iter().any(|entry| entry.setting == "sources[].path" && entry.place == Place::Path));
}

#[test]
fn an_edition_keeps_the_keys_of_old_files() {
    let old = CHAIN.replace("keep = 2\n", "");
    let world = World::new(&old);
    world.run();
    let newer = || Registry::new(vec![&kinds::NewerLines::<1>, &kinds::Trainer, &kinds::Collect]).with_newest_edition(2);
    let planned = |text: &str| {
        world.write("newer.toml", text);
        // Under the old name, so that it is the same workflow.
        std::fs::rename(world.path("newer.toml"), world.path("flow.toml")).unwrap();
        let workflow =
            load(Path::new(&world.path("flow.toml")), &LoadOptions::default(), &newer()).unwrap_or_else(|errors| panic!("{errors}"));
        let plan = Plan::new(&workflow, &world.store(), &world.host, &Request::default()).unwrap();
        plan.stages.iter().filter_map(|stage| Some(stage.rerun.as_ref()?.text())).next()
    };
    // The newer program keeps ten lines by default, and this file a hundred, as when it was written.
    assert_eq!(planned(&old), None);
    let changed = Some("keep changed: 100 -> 10".to_owned());
    assert_eq!(planned(&old.replace("edition = 1", "edition = 2")), changed);
    assert_eq!(planned(&old.replace("edition = 1\n", "")), changed);
    // The edition itself is in no key.
    assert_eq!(planned(&old.replace("edition = 1", "edition = 2").replace("kind = \"lines\"", "kind = \"lines\"\nkeep = 100")), None);
}

/// After an upgrade, results of the older program are made again, or taken over if the user says so.
#[test]
fn another_implementation_has_another_key_under_which_results_can_be_adopted() {
    let world = World::new(CHAIN);
    world.run();
    let upgraded = Registry::new(vec![&kinds::NewerLines::<2>, &kinds::Trainer, &kinds::Collect]);
    let workflow = load(&world.path("flow.toml"), &LoadOptions::default(), &upgraded).unwrap_or_else(|errors| panic!("{errors}"));
    let store = world.store();
    let plan = || Plan::new(&workflow, &store, &world.host, &Request::default()).unwrap();
    let planned = serde_json::json!(plan().to_json(&workflow));
    let reason = serde_json::json!({
        "kind": "implementation_changed", "text": "implementation changed: version 1 -> 2", "from": 1, "to": 2
    });
    assert_eq!(planned["stages"][0]["reason"], reason);
    let actions = Actions::new(&workflow, &store, &world.host, &Request::default()).unwrap();
    let adopted = adopt(&actions, "data").unwrap();
    assert!(adopted.provenance.adopted && adopted.full_key["version"] == 2);
    assert!(plan().is_all_cached());
}

#[test]
fn spelling_every_default_out_reruns_nothing() {
    let world = World::new(CHAIN);
    world.run();
    let spelled = write_and_load(&spell_out(&world.load()), &world.path("spelled.toml"), &Registry::new(kinds::kinds())).unwrap();
    assert!(Plan::new(&spelled, &world.store(), &world.host, &Request::default()).unwrap().is_all_cached());
}

#[test]
fn every_identity_setting_changes_the_key_and_no_other_does() {
    let world = World::new(CHAIN);
    world.run();
    let workflow = world.load();
    let key = |plan: &Plan, stage: usize| plan.stages.iter().find(|planned| planned.stage == stage).unwrap().key.unwrap();
    let base = world.plan();
    let mut seen = Vec::new();
    for varied in vary(&workflow, &world.path("varied.toml"), &Registry::new(kinds::kinds()), |_| true) {
        let name = format!("{}.{}", workflow.stages[varied.stage].name, varied.setting);
        let Some(changed) = varied.workflow else {
            assert_eq!(varied.mark, Mark::Path, "{name} cannot be changed");
            continue;
        };
        let plan = Plan::new(&changed, &world.store(), &world.host, &Request::default()).unwrap();
        let same_key = key(&plan, varied.stage) == key(&base, varied.stage);
        assert_eq!(same_key, varied.mark == Mark::Execution, "{name} is marked {:?}", varied.mark);
        seen.push(name);
    }
    for name in ["data.keep", "base.train.steps", "base.fail_at", "base.device", "base.zero", "base.offload", "a.snapshot_every"] {
        assert!(seen.iter().any(|seen| seen == name), "{name} was not varied: {seen:?}");
    }
}

#[test]
fn every_byte_read_and_the_seed_of_kinds_that_draw_change_the_key() {
    let world = World::new(CHAIN);
    world.run();
    let keys = || {
        let workflow = world.load();
        let mut plan = world.plan().stages;
        plan.sort_unstable_by_key(|planned| planned.stage);
        plan.into_iter().map(|planned| (workflow.stages[planned.stage].name.clone(), planned.key)).collect::<BTreeMap<_, _>>()
    };
    let base = keys();
    let content = std::fs::read(world.path("data.txt")).unwrap();
    for at in 0..content.len() {
        let mut flipped = content.clone();
        flipped[at] ^= 1;
        std::fs::write(world.path("data.txt"), flipped).unwrap();
        assert_ne!(keys()["data"], base["data"], "byte {at}");
    }
    std::fs::write(world.path("data.txt"), content).unwrap();
    assert_eq!(keys(), base);
    for stage in world.load().stages {
        let kind = format!("[stage.{}]\nkind = \"{}\"", stage.name, stage.kind.name());
        let seeded = format!("{kind}\nseed = 8");
        world.edit(&kind, &seeded);
        assert_eq!(keys()[&stage.name] != base[&stage.name], stage.kind.draws(), "{}", stage.name);
        world.edit(&seeded, &kind);
    }
}

#[test]
fn a_folder_can_be_moved() {
    let world = World::new(CHAIN);
    world.run();
    let elsewhere = tempfile::tempdir().unwrap();
    let moved = elsewhere.path().join("another name");
    std::fs::rename(world.path(""), &moved).unwrap();
    let moved = World::at(&moved);
    assert!(moved.run().is_all_cached());
    moved.edit("beta = 0.2", "beta = 0.3");
    assert_eq!(moved.planned()[0], "b run: beta changed: 0.2 -> 0.3");
}

/// Another machine's rounding is no reason to run again; what was made partly here and partly there says so.
#[test]
fn results_of_another_numerics_profile_count_and_mixed_ones_are_marked() {
    let mut world = World::new(CHAIN);
    for (profile, step) in [("first", 5), ("second", 11)] {
        world.host.numerics = profile.to_owned();
        let cancel = CancelToken::default();
        let at = CancelAt { stage: "base", step, cancel: cancel.clone() };
        assert!(world.run_watched(&[], &RunOptions::default(), &cancel, vec![Box::new(at)]).interrupted);
    }
    world.host.numerics = "first".to_owned();
    let recorder = Recorder::default();
    let ended = world.run_watched(&[], &RunOptions::default(), &CancelToken::default(), vec![Box::new(recorder.clone())]);
    assert_eq!(outcomes(&ended)[1], "base resumed: was interrupted after step 11");
    let events = recorder.0.lock().unwrap();
    let warnings: Vec<&str> = events
        .iter()
        .filter_map(|event| match event {
            Event::Stage { stage, event: StageEvent::Warning { text } } if stage == "base" => Some(text.as_str()),
            _ => None,
        })
        .collect();
    assert!(warnings.len() == 1 && warnings[0].contains("`first then second`"), "{warnings:?}");
    let made_under = |stage: usize| world.store().action(ended.stages[stage].key.unwrap()).unwrap().unwrap().provenance.numerics;
    assert_eq!([made_under(0), made_under(1), made_under(2)], ["first", "first (continued from first then second)", "first"]);
    world.host.numerics = "third".to_owned();
    assert!(world.plan().is_all_cached() && world.run().is_all_cached());
}
