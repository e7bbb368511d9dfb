//! Several processes that run stages together: here threads stand in for them, each with its own end of a wire. What MPI adds to that is
//! tested by `tests/mpi.rs`, where there is an MPI.

#[path = "chain/fixture.rs"]
#[allow(dead_code)]
mod fixture;

use std::{collections::BTreeMap, path::Path, sync::Arc, thread};

use fixture::{Fixture, SHRINK};
use rlflow_api::{CancelToken, DeviceSpec, Kind, StageEvent, testing::wires};
use rlflow_engine::{
    Crew, DeviceInfo, Host, Registry, RunOptions, Summary,
    event::{Event, Events, Sink, StageStatus},
    run, worker,
    workflow::{LoadOptions, load},
};
use rlflow_store::Store;

fn host(crew: Option<Arc<Crew>>) -> Host {
    let cpu = DeviceInfo { spec: DeviceSpec::Cpu, name: "cpu".into(), memory_bytes: 1 << 34 };
    Host { devices: vec![cpu], numerics: "test".into(), no_gpu: None, crew }
}

/// Asks for a stop at the first snapshot.
struct StopAtSnapshot(CancelToken);

impl Sink for StopAtSnapshot {
    fn event(&mut self, _: f64, event: &Event) {
        if let Event::Stage { event: StageEvent::Snapshot { .. }, .. } = event {
            self.0.cancel();
        }
    }
}

fn lead(fixture: &Fixture, store: &Path, sets: &[&str], crew: Option<Arc<Crew>>, stop_at_snapshot: bool) -> Summary {
    let sets = SHRINK.iter().chain(sets).map(|set| (*set).to_owned()).collect();
    let workflow = load(&fixture.path("quickstart.toml"), &LoadOptions { sets }, &Registry::new(rlflow_stages::kinds())).unwrap();
    let cancel = CancelToken::default();
    let sinks: Vec<Box<dyn Sink>> = if stop_at_snapshot { vec![Box::new(StopAtSnapshot(cancel.clone()))] } else { Vec::new() };
    let store = Store::open(store).unwrap();
    run(&workflow, &store, &host(crew), &RunOptions::default(), &Events::new(sinks), &cancel).unwrap()
}

/// A run by one process and `workers` that have these kinds.
fn together(fixture: &Fixture, store: &str, sets: &[&str], workers: usize, kinds: &[&'static dyn Kind], stop_at_snapshot: bool) -> Summary {
    let wires = wires(1 + workers);
    thread::scope(|scope| {
        for (number, wire) in wires.iter().enumerate().skip(1) {
            let registry = Registry::new(kinds.to_vec());
            scope.spawn(move || worker::serve(wire, &registry, &format!("worker {number}")).unwrap());
        }
        let crew = Arc::new(Crew::new(wires[0].clone()));
        let summary = lead(fixture, &fixture.path(store), sets, Some(crew.clone()), stop_at_snapshot);
        crew.leave().unwrap();
        summary
    })
}

fn outputs(summary: &Summary) -> BTreeMap<String, String> {
    summary.stages.iter().map(|stage| (stage.name.clone(), format!("{:?} {:?}", stage.outputs, stage.error))).collect()
}

/// Three processes of one rank (some have nothing to do in a round, shares are uneven), and two of two; at every level; with bfloat16
/// weights, adapters and a moving average, which are read and written whole.
#[test]
fn processes_give_the_digests_of_one() {
    let fixture = Fixture::new();
    let more = [
        "stage.sft.precision=\"bf16\"",
        "stage.dpo.lora={ rank = 2 }",
        "stage.dpo.loss=\"kto\"",
        "stage.ppo.ema_decay=0.9",
        "stage.ppo.share_backbone=true",
    ];
    let expected = [&[][..], &more[..]].map(|sets| outputs(&lead(&fixture, &fixture.path("one"), sets, None, false)));
    for (workers, ranks, zero, is_more) in [(2, 1, 0, 0), (2, 1, 3, 1), (1, 2, 2, 0), (1, 1, 1, 1)] {
        let sets = [format!("defaults.device={{ cpu = {ranks} }}"), format!("defaults.zero={zero}")];
        let sets: Vec<&str> = sets.iter().map(String::as_str).chain(if is_more == 1 { &more[..] } else { &[] }.iter().copied()).collect();
        let store = format!("{workers}-{ranks}-{zero}");
        let summary = together(&fixture, &store, &sets, workers, &rlflow_stages::kinds(), false);
        assert_eq!(outputs(&summary), expected[is_more], "{workers} workers, {ranks} ranks each, ZeRO {zero}");
        // Every rank was at work, and is reported.
        let pretrain = summary.stages.iter().find(|stage| stage.name == "pretrain").unwrap();
        let peak = |rank: usize| pretrain.metrics.get(&format!("memory/cpu/rank{rank}/peak_bytes")).copied();
        let last = (1 + workers) * ranks - 1;
        assert!(peak(last).is_some_and(|bytes| bytes > 0.0) && peak(last + 1).is_none(), "{:?}", pretrain.metrics);
    }
}

/// Stopped while three processes trained, and finished by one.
#[test]
fn a_run_of_processes_is_resumed_by_one() {
    let fixture = Fixture::new();
    let sets = ["defaults.snapshot_every=2", "defaults.zero=3"];
    let expected = outputs(&lead(&fixture, &fixture.path("one"), &sets, None, false));
    let stopped = together(&fixture, "torn", &sets, 2, &rlflow_stages::kinds(), true);
    assert!(stopped.interrupted && !stopped.ok());
    let resumed = lead(&fixture, &fixture.path("torn"), &sets, None, false);
    assert!(resumed.stages.iter().any(|stage| stage.status == StageStatus::Resumed));
    assert_eq!(outputs(&resumed), expected);
}

/// What a worker fails of is the stage's error, with the worker's name; the next run has nothing of it.
#[test]
fn a_worker_that_fails_ends_the_stage() {
    let fixture = Fixture::new();
    let without: Vec<&'static dyn Kind> = rlflow_stages::kinds().into_iter().filter(|kind| kind.name() != "pretrain").collect();
    let failed = together(&fixture, "store", &[], 2, &without, false);
    let pretrain = failed.stages.iter().find(|stage| stage.name == "pretrain").unwrap();
    let error = pretrain.error.as_deref().unwrap_or_default();
    assert!(error.starts_with("worker ") && error.ends_with("this rlflow has no kind `pretrain`"), "{error}");
    assert!(lead(&fixture, &fixture.path("store"), &[], None, false).ok());
}
