//! Which settings belong to a result's identity, for every setting of the small kinds. The same is tested for the real
//! kinds in the workspace's `tests/keys.rs`.

use rlflow_engine::{Plan, Registry, Request};

use crate::{
    kinds,
    vary::{Mark, spell_out, vary, write_and_load},
    world::{CHAIN, World},
};

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
    for varied in vary(&workflow, &world.path("varied.toml"), &Registry::new(kinds::kinds())) {
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
