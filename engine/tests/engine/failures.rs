//! How stages fail, and what is left.

use rlflow_engine::{Request, RunOptions, Status, action::workflow_name, event::StageStatus, history};

use crate::world::{CHAIN, World, outcomes};

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
    let mut plan = world.plan();
    history::mark_failures(&mut plan, &world.store(), &workflow_name(&world.load(), &world.store())).unwrap();
    assert_eq!((plan.stages[2].status, plan.stages[2].error.as_deref()), (Status::Failed, Some("step 3 was told to fail")));
    assert_eq!(plan.stages[3].status, Status::Cached);
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

#[test]
fn a_damaged_input_is_made_again_in_the_same_run() {
    let world = World::new(CHAIN);
    let first = world.run();
    world.ran();
    let store = world.store();
    let artifact = store.open_artifact(first.stages[1].outputs["model"]).unwrap().unwrap();
    let name = artifact.manifest().entries[0].digest.to_string();
    let path = store.folder().join("blobs").join(&name[..2]).join(&name);
    let mut content = std::fs::read(&path).unwrap();
    content[3] ^= 1;
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, content).unwrap();
    world.edit("beta = 0.2", "beta = 0.3");
    let summary = world.run();
    assert!(summary.ok(), "{:?}", outcomes(&summary));
    assert_eq!(summary.stages[1].outputs, first.stages[1].outputs);
    assert_eq!(outcomes(&summary)[1], "base ran (same output): its result model is damaged and b must read it");
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
    let without = Request { stages: vec!["b".into()], ..Request::default() };
    assert!(plan(&without).is_ok());
}
