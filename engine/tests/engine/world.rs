//! A folder with a workflow, its data and its store.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use rlflow_api::{CancelToken, DeviceSpec, StageEvent};
use rlflow_engine::{
    DeviceInfo, Host, Plan, Registry, Request, RunOptions, Summary,
    event::{Event, Events, Sink},
    workflow::{LoadOptions, Workflow, load},
};
use rlflow_store::Store;
use tempfile::TempDir;

use crate::kinds;

/// The usual chain: lines -> base -> tuned -> (a, b) -> all.
pub const CHAIN: &str = r#"
name = "chain"
edition = 1
seed = 7

[stage.data]
kind = "lines"
sources = [{ path = "data.txt" }]
keep = 2

[stage.base]
kind = "trainer"
inputs = { data = "data" }
train = { steps = 20 }

[stage.a]
kind = "trainer"
inputs = { model = "base" }
beta = 0.1

[stage.b]
kind = "trainer"
inputs = { model = "base" }
beta = 0.2

[stage.all]
kind = "collect"
inputs = { models = ["a", "b"] }
"#;

pub struct World {
    folder: PathBuf,
    /// Removes the folder, in the process that made it.
    _owned: Option<TempDir>,
    pub host: Host,
}

impl World {
    pub fn new(workflow: &str) -> Self {
        let owned = TempDir::new().unwrap();
        let mut world = Self::at(owned.path());
        world._owned = Some(owned);
        world.write("flow.toml", workflow);
        world.write("data.txt", "one\ntwo\nthree\n");
        world
    }

    /// The world that another process made.
    pub fn at(folder: &Path) -> Self {
        let cpu = DeviceInfo { spec: DeviceSpec::Cpu, name: "test".into(), memory_bytes: 1 << 30 };
        Self {
            folder: folder.to_owned(),
            _owned: None,
            host: Host { devices: vec![cpu], numerics: "test".into(), no_gpu: None, crew: None },
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    pub fn write(&self, name: &str, content: &str) {
        fs::write(self.path(name), content).unwrap();
    }

    /// Replaces text in the workflow file, which must be there.
    pub fn edit(&self, from: &str, to: &str) {
        let old = fs::read_to_string(self.path("flow.toml")).unwrap();
        assert!(old.contains(from), "`{from}` is not in the workflow");
        self.write("flow.toml", &old.replace(from, to));
    }

    /// The store, as a command opens it. `RLFLOW_TEST_WITHOUT_INDEX` takes the index away between any two commands:
    /// every test must pass all the same.
    pub fn store(&self) -> Store {
        if std::env::var_os("RLFLOW_TEST_WITHOUT_INDEX").is_some() {
            let _ = fs::remove_dir_all(self.path(".rlflow/index"));
        }
        Store::open(&self.path(".rlflow")).unwrap()
    }

    pub fn load(&self) -> Workflow {
        self.load_with(&[])
    }

    pub fn load_with(&self, sets: &[&str]) -> Workflow {
        load_file(&self.path("flow.toml"), sets)
    }

    pub fn plan(&self) -> Plan {
        self.plan_of(&Request::default())
    }

    pub fn plan_of(&self, request: &Request) -> Plan {
        Plan::new(&self.load(), &self.store(), &self.host, request).unwrap()
    }

    /// `stage status: reason` of every stage that is not cached.
    pub fn planned(&self) -> Vec<String> {
        let workflow = self.load();
        let plan = self.plan();
        let open = plan.stages.iter().filter_map(|stage| {
            let rerun = stage.rerun.as_ref()?;
            Some(format!("{} {}: {}", workflow.stages[stage.stage].name, stage.status.name(), rerun.text()))
        });
        open.collect()
    }

    pub fn run(&self) -> Summary {
        self.run_with(&[], &RunOptions::default())
    }

    pub fn run_with(&self, sets: &[&str], options: &RunOptions) -> Summary {
        self.run_watched(sets, options, &CancelToken::default(), Vec::new())
    }

    pub fn run_watched(&self, sets: &[&str], options: &RunOptions, cancel: &CancelToken, sinks: Vec<Box<dyn Sink>>) -> Summary {
        rlflow_engine::run(&self.load_with(sets), &self.store(), &self.host, options, &Events::new(sinks), cancel).unwrap()
    }

    /// What ran since the last call, in order.
    pub fn ran(&self) -> Vec<String> {
        let ran = fs::read_to_string(self.path("ran.txt")).unwrap_or_default();
        let _ = fs::remove_file(self.path("ran.txt"));
        ran.lines().map(str::to_owned).collect()
    }
}

pub fn load_file(path: &Path, sets: &[&str]) -> Workflow {
    let options = LoadOptions { sets: sets.iter().map(|set| (*set).to_owned()).collect() };
    load(path, &options, &Registry::new(kinds::kinds())).unwrap_or_else(|errors| panic!("{errors}"))
}

/// `stage status: reason` of every stage of a run.
pub fn outcomes(summary: &Summary) -> Vec<String> {
    let line = |stage: &rlflow_engine::event::StageOutcome| {
        let why = stage.rerun.as_ref().map(rlflow_engine::Rerun::text).or_else(|| stage.error.clone());
        let same = if stage.same_output { " (same output)" } else { "" };
        format!("{} {}{same}{}", stage.name, stage.word(), why.map(|why| format!(": {why}")).unwrap_or_default())
    };
    summary.stages.iter().map(line).collect()
}

/// A run of these stages.
pub fn only(stages: &[&str]) -> RunOptions {
    let stages = stages.iter().map(|stage| (*stage).to_owned()).collect();
    RunOptions { request: Request { stages, ..Request::default() }, ..RunOptions::default() }
}

/// Keeps every event.
#[derive(Clone, Default)]
pub struct Recorder(pub Arc<Mutex<Vec<Event>>>);

impl Sink for Recorder {
    fn event(&mut self, _time: f64, event: &Event) {
        self.0.lock().unwrap().push(event.clone());
    }
}

/// Cancels at a step of a stage.
pub struct CancelAt {
    pub stage: &'static str,
    pub step: u64,
    pub cancel: CancelToken,
}

impl Sink for CancelAt {
    fn event(&mut self, _time: f64, event: &Event) {
        if let Event::Stage { stage, event: StageEvent::Progress { done, .. } } = event
            && stage == self.stage
            && *done == self.step
        {
            self.cancel.cancel();
        }
    }
}
