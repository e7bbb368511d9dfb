//! A run context without an engine: what tests of kinds, and of what kinds are made of, run in.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use serde_json::{Value, json};

use crate::{
    Artifact, CancelToken, DataFile, Digest, Input, MemoStore, Placement, Reporter, RunContext, Snapshots, StageEvent, StageResult, Store,
};

/// A folder with data files and a store, and what a stage that runs in it reports.
pub struct Bench {
    folder: PathBuf,
    /// The store, in the folder.
    pub store: Store,
    /// Stops what runs.
    pub cancel: CancelToken,
    events: Events,
    memos: Memos,
}

impl Bench {
    /// In `folder`, which outlives it.
    ///
    /// # Errors
    /// If no store can be made there.
    pub fn new(folder: &Path) -> StageResult<Self> {
        let store = Store::open(&folder.join("store"))?;
        Ok(Self { folder: folder.to_owned(), store, cancel: CancelToken::default(), events: Events::default(), memos: Memos::default() })
    }

    /// Where a file of the folder is.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Writes a file into the folder.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> DataFile {
        fs::write(self.path(name), content).unwrap_or_else(|error| panic!("{name}: {error}"));
        data_file(&self.path(name))
    }

    /// Calls `work` with a context of these inputs (port and artifact; the stages are called like their ports) and files. Snapshots are kept
    /// under `snapshots`.
    pub fn with_context<T>(
        &self,
        snapshots: &str,
        seed: u64,
        inputs: &[(&str, &Artifact)],
        files: &[Vec<DataFile>],
        work: impl FnOnce(&RunContext<'_>) -> T,
    ) -> T {
        let input = |(port, artifact): &(&str, &Artifact)| {
            let (stage, kind, artifact) = ((*port).to_owned(), (*port).to_owned(), (*artifact).clone());
            ((*port).to_owned(), vec![Input { stage, port: None, kind, artifact, settings: json!({}), placement: Placement::default() }])
        };
        let inputs: BTreeMap<String, Vec<Input>> = inputs.iter().map(input).collect();
        work(&RunContext {
            stage: "test",
            store: &self.store,
            seed,
            inputs: &inputs,
            files,
            placement: &Placement::default(),
            snapshots: &Snapshots::new(self.store.snapshots(Digest::of(snapshots.as_bytes())), Vec::new()),
            reporter: &self.events,
            cancel: &self.cancel,
            memos: &self.memos,
        })
    }

    /// What was reported since the last call.
    pub fn take_events(&self) -> Vec<StageEvent> {
        std::mem::take(&mut locked(&self.events.0))
    }

    /// Warnings among what was reported; nothing is taken.
    pub fn warnings(&self) -> Vec<String> {
        let warning = |event: &StageEvent| if let StageEvent::Warning { text } = event { Some(text.clone()) } else { None };
        locked(&self.events.0).iter().filter_map(warning).collect()
    }

    /// How many intermediate results are kept.
    pub fn memos(&self) -> usize {
        locked(&self.memos.0).len()
    }

    /// Forgets intermediate results.
    pub fn clear_memos(&self) {
        locked(&self.memos.0).clear();
    }
}

/// A file as the engine hands it to a stage.
///
/// # Panics
/// If it cannot be read.
pub fn data_file(path: &Path) -> DataFile {
    let content = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    DataFile { name, path: path.to_owned(), digest: Digest::of(&content), size_bytes: content.len() as u64 }
}

/// Keeps what is reported.
#[derive(Default)]
struct Events(Mutex<Vec<StageEvent>>);

impl Reporter for Events {
    fn report(&self, event: StageEvent) {
        locked(&self.0).push(event);
    }
}

/// Keeps intermediate results.
#[derive(Default)]
struct Memos(Mutex<Vec<(Value, Artifact)>>);

impl MemoStore for Memos {
    fn get(&self, key: &Value) -> StageResult<Option<Artifact>> {
        Ok(locked(&self.0).iter().find(|(known, _)| known == key).map(|(_, artifact)| artifact.clone()))
    }

    fn put(&self, key: &Value, artifact: &Artifact) -> StageResult<()> {
        locked(&self.0).push((key.clone(), artifact.clone()));
        Ok(())
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
