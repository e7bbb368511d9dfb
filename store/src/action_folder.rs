//! What lookups need of all actions in one folder (`actions/ab`), so that one look at the folder answers for all of them.
//!
//! Files in it are never changed, only renamed into place or removed, and that shows in the folder's times.

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, Metadata},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use crate::{
    Digest, Store,
    action::ActionHead,
    envelope::Reader,
    file_digest::FileStamp,
    index::Tree,
    layout::{Family, digest_of_name},
    lookup::hash_texts,
    sealed::is_absent,
};

/// For how long a folder's times are believed before they are looked at again.
const BELIEVED: Duration = Duration::from_millis(20);
/// Larger folders are left to their files: values in the index stay small.
const MAX_ACTIONS: usize = 512;

/// What lookups need of an action.
#[derive(Clone)]
pub(crate) struct Summary {
    /// Shared, because a lookup hands it on.
    pub outputs: Arc<BTreeMap<String, Digest>>,
    pub stage_hash: u64,
    pub workflow_hash: u64,
    pub started_at: f64,
}

/// All folders of actions.
pub(crate) struct ActionFolders(Vec<Mutex<Folder>>);

#[derive(Default)]
struct Folder {
    known: Option<Known>,
    /// When `known` was last seen to be what is there.
    checked: Option<Instant>,
}

struct Known {
    /// The folder's; `None` if there is no such folder.
    stamp: Option<FileStamp>,
    /// Every file with what it was recognised by; `None` if it could not be read.
    actions: HashMap<Digest, (FileStamp, Option<Summary>)>,
}

impl Default for ActionFolders {
    fn default() -> Self {
        Self((0..256).map(|_| Mutex::default()).collect())
    }
}

impl ActionFolders {
    /// Notes that an action was written.
    pub fn forget(&self, key: Digest) {
        self.folder(key).checked = None;
    }

    /// What the folder of `key` says about it. `None` if that is nothing: then the file itself must tell, as it may have come
    /// just now, and two processes must not both do the work.
    pub fn find(&self, store: &Store, key: Digest) -> Option<Summary> {
        let mut folder = self.folder(key);
        if folder.checked.is_none_or(|checked| checked.elapsed() >= BELIEVED) && !folder.refresh(store, key.as_bytes()[0]) {
            return None;
        }
        folder.known.as_ref()?.actions.get(&key)?.1.clone()
    }

    fn folder(&self, key: Digest) -> MutexGuard<'_, Folder> {
        self.0[usize::from(key.as_bytes()[0])].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Folder {
    /// Makes `known` what is there. False while the folder changes, or if it is too large.
    fn refresh(&mut self, store: &Store, prefix: u8) -> bool {
        let (at, now) = (Instant::now(), SystemTime::now());
        self.checked = None;
        let stamp = match fs::metadata(store.layout().shard(Family::Action, prefix)) {
            Ok(metadata) => Some(FileStamp::of(&metadata)),
            Err(error) if is_absent(&error) => None,
            Err(_) => return false,
        };
        if self.known.is_none() {
            self.known = store.index().get(Tree::Folders, index_key(prefix)).and_then(|payload| Known::decode(&payload));
        }
        if self.known.as_ref().is_none_or(|known| known.stamp != stamp) {
            // A further change within one tick of the clock would not show in the folder's times.
            let settled = stamp.is_none_or(|stamp| stamp.settles_in(now, store.is_on_network()) == Some(Duration::ZERO));
            let before = self.known.take();
            let read = if settled { Known::read(store, prefix, stamp, before.as_ref()) } else { None };
            let is_new = read.is_some();
            self.known = read.or(before);
            if !is_new {
                return false;
            }
            if let Some(payload) = self.known.as_ref().and_then(Known::encode) {
                store.index().put(Tree::Folders, index_key(prefix), &payload);
            }
        }
        self.checked = Some(at);
        true
    }
}

impl Known {
    /// Lists a folder and reads those of its files that `before` does not know.
    fn read(store: &Store, prefix: u8, stamp: Option<FileStamp>, before: Option<&Self>) -> Option<Self> {
        let mut actions = HashMap::new();
        if stamp.is_none() {
            return Some(Self { stamp, actions });
        }
        for entry in fs::read_dir(store.layout().shard(Family::Action, prefix)).ok()? {
            let entry = entry.ok()?;
            let Some(key) = digest_of_name(entry.file_name().as_ref()).filter(|key| key.as_bytes()[0] == prefix) else { continue };
            let file: Metadata = fs::metadata(entry.path()).ok()?;
            let found = FileStamp::of(&file);
            let known = before.and_then(|before| before.actions.get(&key)).filter(|(known, _)| *known == found);
            let summary = match known {
                Some((_, summary)) => summary.clone(),
                None => store.examine_action_head(key).ok().flatten().map(Summary::from),
            };
            actions.insert(key, (found, summary));
            if actions.len() > MAX_ACTIONS {
                return None;
            }
        }
        Some(Self { stamp, actions })
    }

    /// `None` if something cannot be said in the index: a file that could not be read, a port with an endless name.
    fn encode(&self) -> Option<Vec<u8>> {
        let mut bytes = Vec::with_capacity(64 + 192 * self.actions.len());
        self.stamp?.encode(&mut bytes);
        for (key, (stamp, summary)) in &self.actions {
            bytes.extend_from_slice(key.as_bytes());
            stamp.encode(&mut bytes);
            summary.as_ref()?.encode(&mut bytes)?;
        }
        Some(bytes)
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader(bytes);
        let stamp = Some(FileStamp::decode(&mut reader)?);
        let mut actions = HashMap::new();
        while !reader.is_empty() {
            let key = reader.digest()?;
            actions.insert(key, (FileStamp::decode(&mut reader)?, Some(Summary::decode(&mut reader)?)));
        }
        Some(Self { stamp, actions })
    }
}

/// Keys in the index have 32 bytes.
fn index_key(prefix: u8) -> Digest {
    let mut bytes = [0; 32];
    bytes[31] = prefix;
    Digest::from_bytes(bytes)
}

impl From<ActionHead> for Summary {
    fn from(head: ActionHead) -> Self {
        let ActionHead { outputs, provenance, .. } = head;
        Self {
            outputs: outputs.into(),
            stage_hash: hash_texts(&[&provenance.stage, &provenance.kind]),
            workflow_hash: hash_texts(&[&provenance.workflow]),
            started_at: provenance.started_at,
        }
    }
}

impl Summary {
    fn encode(&self, bytes: &mut Vec<u8>) -> Option<()> {
        bytes.extend_from_slice(&self.stage_hash.to_be_bytes());
        bytes.extend_from_slice(&self.workflow_hash.to_be_bytes());
        bytes.extend_from_slice(&self.started_at.to_bits().to_be_bytes());
        bytes.push(u8::try_from(self.outputs.len()).ok()?);
        for (port, digest) in &*self.outputs {
            bytes.push(u8::try_from(port.len()).ok()?);
            bytes.extend_from_slice(port.as_bytes());
            bytes.extend_from_slice(digest.as_bytes());
        }
        Some(())
    }

    fn decode(reader: &mut Reader<'_>) -> Option<Self> {
        let (stage_hash, workflow_hash) = (reader.u64()?, reader.u64()?);
        let started_at = f64::from_bits(reader.u64()?);
        let mut outputs = BTreeMap::new();
        for _ in 0..reader.bytes(1)?[0] {
            let length = reader.bytes(1)?[0];
            let port = std::str::from_utf8(reader.bytes(usize::from(length))?).ok()?;
            outputs.insert(port.to_owned(), reader.digest()?);
        }
        Some(Self { outputs: outputs.into(), stage_hash, workflow_hash, started_at })
    }
}
