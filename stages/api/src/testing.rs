//! A run context without an engine: what tests of kinds, and of what kinds are made of, run in.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use serde_json::{Value, json};

use crate::{
    Artifact, CancelToken, Channel, DataFile, Digest, Input, MemoStore, Message, Peer, Placement, Processes, Reporter, RunContext,
    Snapshots, StageEvent, StageResult, Store, Wire,
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
            processes: &Processes::alone(),
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

/// Ends of a wire between threads that stand in for processes.
pub fn wires(processes: usize) -> Vec<Arc<dyn Wire>> {
    let post = Arc::new(Post { letters: Mutex::default(), changed: Condvar::new() });
    (0..processes).map(|process| Arc::new(Thread { process, processes, post: post.clone() }) as Arc<dyn Wire>).collect()
}

/// From, to, channel, lane.
type Way = (usize, usize, Channel, u32);

#[derive(Debug, Default)]
struct Letters {
    waiting: HashMap<Way, VecDeque<Arc<Message>>>,
    aborted: HashMap<u32, String>,
}

#[derive(Debug)]
struct Post {
    letters: Mutex<Letters>,
    changed: Condvar,
}

#[derive(Debug)]
struct Thread {
    process: usize,
    processes: usize,
    post: Arc<Post>,
}

impl Wire for Thread {
    fn process(&self) -> usize {
        self.process
    }

    fn processes(&self) -> usize {
        self.processes
    }

    fn exchange(&self, channel: Channel, outgoing: Vec<(Peer, Arc<Message>)>, incoming: &[Peer]) -> Result<Vec<Message>, String> {
        let mut letters = locked(&self.post.letters);
        for (peer, message) in outgoing {
            letters.waiting.entry((self.process, peer.process, channel, peer.lane)).or_default().push_back(message);
        }
        self.post.changed.notify_all();
        let mut received = Vec::with_capacity(incoming.len());
        for peer in incoming {
            let way = (peer.process, self.process, channel, peer.lane);
            let message = loop {
                if let Some(message) = letters.waiting.get_mut(&way).and_then(VecDeque::pop_front) {
                    break message;
                }
                if let Some(why) = letters.aborted.get(&channel.attempt) {
                    return Err(why.clone());
                }
                letters = self.post.changed.wait(letters).unwrap_or_else(PoisonError::into_inner);
            };
            received.push(Message::of(&[message.bytes()]));
        }
        Ok(received)
    }

    fn abort(&self, attempt: u32, why: &str, _: Duration) {
        locked(&self.post.letters).aborted.entry(attempt).or_insert_with(|| why.to_owned());
        self.post.changed.notify_all();
    }

    fn aborted(&self, attempt: u32) -> Option<String> {
        locked(&self.post.letters).aborted.get(&attempt).cloned()
    }
}
