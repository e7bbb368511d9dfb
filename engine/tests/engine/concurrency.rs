//! Several stages at once, and several runs on one store: threads of one process, and processes.

use std::{
    collections::BTreeMap,
    env,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use rlflow_api::CancelToken;
use rlflow_engine::{
    RunOptions,
    event::{Event, Events, StageStatus},
};

use rlflow_store::GcOptions;

use crate::world::{CHAIN, Recorder, World, load_file};

#[test]
fn independent_stages_overlap_when_jobs_allow() {
    let slow = CHAIN.replace("beta = 0.1", "beta = 0.1\nstep_ms = 20").replace("beta = 0.2", "beta = 0.2\nstep_ms = 20");
    for jobs in [1, 2] {
        let world = World::new(&slow);
        let recorder = Recorder::default();
        let options = RunOptions { jobs, ..RunOptions::default() };
        assert!(world.run_watched(&[], &options, &CancelToken::default(), vec![Box::new(recorder.clone())]).ok());
        let mut running = 0;
        let mut most = 0;
        for event in recorder.0.lock().unwrap().iter() {
            match event {
                Event::StageStarted { .. } => running += 1,
                Event::StageFinished(_) => running -= 1,
                _ => {}
            }
            most = most.max(running);
        }
        assert_eq!(most, jobs);
    }
}

#[test]
fn two_runs_on_one_store_share_the_work() {
    let world = World::new(&CHAIN.replace("train = { steps = 20 }", "train = { steps = 20 }\nstep_ms = 5"));
    let (first, second) = thread::scope(|scope| {
        let runs = [scope.spawn(|| world.run()), scope.spawn(|| world.run())];
        let [first, second] = runs.map(|run| run.join().unwrap());
        (first, second)
    });
    assert!(first.ok() && second.ok());
    let mut counts = BTreeMap::new();
    for stage in world.ran() {
        *counts.entry(stage).or_insert(0) += 1;
    }
    assert!(counts.len() == 5 && counts.values().all(|count| *count == 1), "{counts:?}");
    for (first, second) in first.stages.iter().zip(&second.stages) {
        assert_eq!(first.outputs, second.outputs);
        let cached = [first, second].iter().filter(|stage| stage.status == StageStatus::Cached).count();
        assert_eq!(cached, 1, "{}", first.name);
    }
}

/// Different workflows that begin alike: what they share runs once, whoever comes first.
#[test]
fn workflows_that_overlap_share_what_is_alike() {
    let slow = CHAIN.replace("train = { steps = 20 }", "train = { steps = 20 }\nstep_ms = 5");
    let world = World::new(&slow);
    let other = slow.replace("name = \"chain\"", "name = \"other\"").replace("[stage.base]", "[stage.trunk]");
    world.write("other.toml", &other.replace("model = \"base\"", "model = \"trunk\"").replace("beta = 0.2", "beta = 0.3"));
    let run = |file: &str| {
        let workflow = load_file(&world.path(file), &[]);
        let run =
            rlflow_engine::run(&workflow, &world.store(), &world.host, &RunOptions::default(), &Events::default(), &CancelToken::default());
        run.unwrap()
    };
    let (first, second) = thread::scope(|scope| {
        let runs = ["flow.toml", "other.toml"].map(|file| scope.spawn(move || run(file)));
        let [first, second] = runs.map(|run| run.join().unwrap());
        (first, second)
    });
    assert!(first.ok() && second.ok());
    for (index, (first, second)) in first.stages.iter().zip(&second.stages).enumerate() {
        let cached = [first, second].iter().filter(|stage| stage.status == StageStatus::Cached).count();
        // data, base and a are alike; b differs, and so does what collects it.
        assert_eq!((cached, first.outputs == second.outputs), if index < 3 { (1, true) } else { (0, false) }, "{}", first.name);
    }
    let mut ran = world.ran();
    ran.sort_unstable();
    assert_eq!(ran.iter().filter(|stage| ["data", "base", "trunk", "a"].contains(&stage.as_str())).count(), 3, "{ran:?}");
}

#[test]
fn who_waits_says_for_whom_and_plans_say_who_runs() {
    let slow = CHAIN.replace("train = { steps = 20 }", "train = { steps = 20 }\nstep_ms = 20");
    let world = World::new(&slow);
    let recorder = Recorder::default();
    thread::scope(|scope| {
        let owner = scope.spawn(|| world.run());
        while !world.path("ran.txt").exists() || world.plan().stages[1].status != rlflow_engine::Status::Running {
            assert!(!owner.is_finished());
            thread::yield_now();
        }
        let holder = world.plan().stages[1].holder.clone().unwrap();
        assert_eq!((holder.pid, holder.stage.as_str()), (std::process::id(), "base"));
        let waiting = world.run_watched(&[], &RunOptions::default(), &CancelToken::default(), vec![Box::new(recorder.clone())]);
        assert!(waiting.ok() && owner.join().unwrap().ok());
    });
    let events = recorder.0.lock().unwrap();
    assert!(events.iter().any(|event| matches!(event, Event::Waiting { stage, .. } if stage == "base")));
    assert!(events.iter().any(|event| matches!(event, Event::Cached { stage, waited: true, .. } if stage == "base")));
}

#[test]
fn many_stages_are_decided_on_several_threads_as_on_one() {
    let mut text = String::from("edition = 1\n");
    for at in 0..300 {
        text += &format!("[stage.s{at}]\nkind = \"lines\"\nkeep = {at}\nsources = [{{ path = \"data.txt\" }}]\n");
    }
    text += "[stage.first]\nkind = \"trainer\"\ninputs = { data = \"s7\" }\n";
    let world = World::new(&text);
    let planned = world.planned();
    assert_eq!((planned.len(), planned[7].as_str()), (301, "s7 run: never ran"));
    assert_eq!(planned[300], "first pending: depends on the result of s7 (never ran)");
    assert!(world.run_with(&[], &RunOptions { jobs: 8, ..RunOptions::default() }).ok());
    assert!(world.run().is_all_cached() && world.plan().is_all_cached());
    // A result that is gone sends a stage back while others of its wave are decided.
    let lost = world.store().action(world.plan().stages[7].key.unwrap()).unwrap().unwrap().outputs["text"].to_string();
    std::fs::remove_file(world.store().folder().join("manifests").join(&lost[..2]).join(&lost)).unwrap();
    world.edit("keep = 3\n", "keep = 333\n");
    world.edit("inputs = { data = \"s7\" }", "inputs = { data = \"s7\" }\nbeta = 0.5");
    world.ran();
    assert!(world.run().ok());
    assert_eq!(world.ran(), ["s3", "s7", "first"]);
}

/// Names the world of a child process.
const WORLD: &str = "RLFLOW_TEST_WORLD";

/// Not a test: what child processes of the tests below do.
#[test]
#[ignore = "run by other tests"]
fn child() {
    if let Some(folder) = env::var_os(WORLD) {
        assert!(World::at(Path::new(&folder)).run().ok());
    }
}

fn run_in_process(world: &World) -> Child {
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["--exact", "concurrency::child", "--ignored"]).env(WORLD, world.path(""));
    command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

#[test]
fn two_processes_on_one_store_share_the_work() {
    let world = World::new(&CHAIN.replace("train = { steps = 20 }", "train = { steps = 20 }\nstep_ms = 5"));
    let children = [run_in_process(&world), run_in_process(&world)];
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    let mut ran = world.ran();
    ran.sort_unstable();
    assert_eq!(ran, ["a", "all", "b", "base", "data"]);
    assert!(world.run().is_all_cached());
}

#[test]
fn a_collection_keeps_intermediate_results_of_a_run_that_was_killed() {
    let world = World::new(&CHAIN.replace("beta = 0.1", "beta = 0.1\nmemo = true").replace("beta = 0.2", "beta = 0.2\nstep_ms = 50"));
    let mut run = run_in_process(&world);
    let has_begun = |stage: &str| std::fs::read_to_string(world.path("ran.txt")).is_ok_and(|ran| ran.lines().any(|line| line == stage));
    while !has_begun("b") {
        assert!(run.try_wait().unwrap().is_none(), "the run ended before it could be killed");
        thread::yield_now();
    }
    run.kill().unwrap();
    run.wait().unwrap();
    let collect = || world.store().gc(&GcOptions { grace: Duration::ZERO, ..GcOptions::default() }).unwrap();
    collect();
    // The next run does not ask for it, as its stage is cached.
    world.edit("step_ms = 50", "step_ms = 0");
    assert_eq!(world.run().stages[2].status, StageStatus::Cached);
    collect();
    world.ran();
    world.edit("memo = true", "memo = true\ntrain = { lr = 0.25 }");
    world.run();
    assert_eq!(world.ran(), ["a", "all"], "the intermediate result of `a` was collected");
}

#[test]
fn who_waits_for_a_process_that_is_killed_takes_over_where_it_stopped() {
    let slow = CHAIN.replace("train = { steps = 20 }", "train = { steps = 20 }\nstep_ms = 50\nsnapshot_every = 1");
    let whole = World::new(&slow.replace("step_ms = 50", "step_ms = 0")).run();
    let world = World::new(&slow);
    let mut owner = run_in_process(&world);
    let at = || {
        let plan = world.plan();
        (plan.stages[1].status == rlflow_engine::Status::Running).then_some(plan.stages[1].continues_from_step).flatten()
    };
    while at().is_none_or(|step| step < 3) {
        assert!(owner.try_wait().unwrap().is_none(), "the owner ended before it could be killed");
        thread::yield_now();
    }
    let recorder = Recorder::default();
    let pid = owner.id();
    let waits = |event: &Event| matches!(event, Event::Waiting { stage, holder } if stage == "base" && holder.pid == pid);
    thread::scope(|scope| {
        let waiting =
            scope.spawn(|| world.run_watched(&[], &RunOptions::default(), &CancelToken::default(), vec![Box::new(recorder.clone())]));
        while !recorder.0.lock().unwrap().iter().any(waits) {
            assert!(!waiting.is_finished());
            thread::yield_now();
        }
        // SIGKILL: nothing of the process runs any more.
        owner.kill().unwrap();
        owner.wait().unwrap();
        let taken = waiting.join().unwrap();
        assert_eq!(taken.stages[1].status, StageStatus::Resumed);
        for (taken, whole) in taken.stages.iter().zip(&whole.stages) {
            assert_eq!((&taken.name, &taken.outputs, &taken.metrics), (&whole.name, &whole.outputs, &whole.metrics));
        }
    });
}
