//! A process that runs stages together with the one that leads: it is sent what to run, computes what its ranks compute, and leaves
//! nothing behind. See [`Processes`].

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use rlflow_api::{
    Artifact, CancelToken, Input, MemoStore, Order, Peer, Processes, Reporter, RunContext, Snapshots, StageError, StageEvent, StageResult,
    Wire, Work, panics,
};
use rlflow_store::Store;
use serde_json::Value;

use crate::{Registry, crew::ORDERS, execute::panicked, run::STACK_BYTES};

/// How long the others may take to find by themselves what this process failed of: an error of the settings or the data is the
/// same in all, and best told by the one that leads.
const PATIENCE: Duration = Duration::from_secs(2);

/// Runs what the leader sends until it says that there is nothing more to do. `name` is how errors call this process.
///
/// # Errors
/// That the leader is gone.
pub fn serve(wire: &Arc<dyn Wire>, registry: &Registry, name: &str) -> Result<(), String> {
    let stores = Stores::default();
    thread::scope(|scope| {
        loop {
            let order = wire.exchange(ORDERS, Vec::new(), &[Peer { process: 0, lane: 0 }])?;
            let order = order.first().map(|order| serde_json::from_slice(order.bytes()));
            let Some(Ok(order)) = order else { return Err("process 0 sent what is no order: do all run the same rlflow?".into()) };
            let work = match order {
                Order::Run(work) => work,
                Order::Leave => return Ok(()),
            };
            let (attempt, stores) = (work.attempt, &stores);
            let run = move || {
                let done = panics::catch(|| run(wire, registry, stores, *work));
                let failed = match done {
                    Ok(Ok(_)) => return,
                    Ok(Err(error)) => error,
                    Err(panic) => panicked(&panic),
                };
                // Whoever was ended by another has nothing to say of its own.
                if wire.aborted(attempt).is_none() {
                    wire.abort(attempt, &format!("{name}: {failed}"), PATIENCE);
                }
            };
            let spawned = thread::Builder::new().name(format!("stage {attempt}")).stack_size(STACK_BYTES).spawn_scoped(scope, run);
            if let Err(error) = spawned {
                wire.abort(attempt, &format!("{name}: no thread could be started: {error}"), Duration::ZERO);
            }
        }
    })
}

/// The stores that stages were in: opened once.
#[derive(Default)]
struct Stores(Mutex<BTreeMap<std::path::PathBuf, Store>>);

impl Stores {
    fn open(&self, folder: &std::path::Path) -> StageResult<Store> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(store) = known.get(folder) {
            return Ok(store.clone());
        }
        if !folder.is_dir() {
            return Err(StageError::invalid_with_hint(
                format!("there is no store at {}", folder.display()),
                "all processes must see one store: is its folder on a file system that they share?",
            ));
        }
        let store = Store::open(folder)?;
        known.insert(folder.to_owned(), store.clone());
        Ok(store)
    }
}

fn run(wire: &Arc<dyn Wire>, registry: &Registry, stores: &Stores, work: Work) -> StageResult<BTreeMap<String, Artifact>> {
    let kind = registry.get(&work.kind).ok_or_else(|| StageError::invalid(format!("this rlflow has no kind `{}`", work.kind)))?;
    let stage = kind.parse(&work.settings).map_err(StageError::invalid)?;
    let store = stores.open(&work.store)?;
    let mut inputs: BTreeMap<String, Vec<Input>> = BTreeMap::new();
    for input in work.inputs {
        let port = input.port.clone();
        inputs.entry(port).or_default().push(input.open(&store)?);
    }
    let context = RunContext {
        stage: &work.stage,
        store: &store,
        seed: work.seed,
        inputs: &inputs,
        files: &work.files,
        placement: &work.placement.placement()?,
        processes: &Processes::joint(wire.clone(), work.attempt),
        snapshots: &Snapshots::new(store.snapshots(work.prefix_key), Vec::new()),
        reporter: &Silent,
        cancel: &CancelToken::default(),
        memos: &NoMemos,
    };
    let span = tracing::info_span!("stage", name = %work.stage, kind = work.kind);
    span.in_scope(|| kind.run(&stage, &context))
}

/// The leader reports.
struct Silent;

impl Reporter for Silent {
    fn report(&self, _: StageEvent) {}
}

/// The leader looks intermediate results up, and stores them.
struct NoMemos;

impl MemoStore for NoMemos {
    fn get(&self, _: &Value) -> StageResult<Option<Artifact>> {
        Ok(None)
    }

    fn put(&self, _: &Value, _: &Artifact) -> StageResult<()> {
        Ok(())
    }
}
