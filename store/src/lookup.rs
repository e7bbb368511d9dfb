//! Lookups that planning makes for every stage, answered from the index where it is open, agreeing with the files.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use crate::{
    ActionRecord, Digest, FileDigest, Manifest, Result, Store, StoreError, action_folder::Summary, envelope::Reader,
    file_digest::FileStamp, index::Tree, layout::Family,
};

/// Manifests with more entries are read from their files: values in the index stay small.
const MAX_INDEXED_ENTRIES: usize = 64;

impl Store {
    /// Announces that about `stages` stages will be looked up, so that the index is opened if that many pay for it.
    pub fn expect_lookups(&self, stages: usize) {
        self.index().expect(self, stages as u64);
    }

    /// Outputs of the action recorded under `key`: port to artifact. Like [`Store::action`], for a fraction of the price.
    pub fn outputs(&self, key: Digest) -> Result<Option<Arc<BTreeMap<String, Digest>>>> {
        Ok(self.action_summary(key)?.map(|summary| summary.outputs))
    }

    fn action_summary(&self, key: Digest) -> Result<Option<Summary>> {
        self.index().expect(self, 1);
        if self.index().is_open()
            && let Some(summary) = self.action_folders().find(self, key)
        {
            return Ok(Some(summary));
        }
        Ok(self.or_absent(key, self.examine_action_head(key))?.map(Summary::from))
    }

    /// Whether an artifact is there with all its blobs. Content is not verified; that happens when it is read. Touches nothing.
    pub fn contains_artifact(&self, digest: Digest) -> bool {
        self.index().expect(self, 1);
        let path = self.layout().file(Family::Manifest, digest);
        if self.index().is_open() {
            if fs::metadata(&path).is_err() {
                return false;
            }
            if let Some(blobs) = self.index().get(Tree::Manifests, digest).and_then(|payload| decode_blobs(&payload)) {
                return blobs.into_iter().all(|(digest, size_bytes)| self.sees_blob(digest, size_bytes));
            }
        }
        let manifest = match self.manifest(digest) {
            Ok(Some(manifest)) => manifest,
            Ok(None) => return false,
            Err(error) => {
                self.tell_once(digest, &error);
                return false;
            }
        };
        if manifest.entries.len() <= MAX_INDEXED_ENTRIES {
            self.index().put(Tree::Manifests, digest, &encode_blobs(&manifest));
        }
        manifest.entries.iter().all(|entry| self.sees_blob(entry.digest, entry.size_bytes))
    }

    pub(crate) fn newest_action(&self, workflow: &str, stage: &str, kind: &str) -> Result<Option<ActionRecord>> {
        let (stage_hash, workflow_hash) = (hash_texts(&[stage, kind]), hash_texts(&[workflow]));
        let key = {
            let mut latest = self.latest().0.lock().unwrap_or_else(PoisonError::into_inner);
            let map = match latest.take() {
                Some(map) if map.made.elapsed() < Latest::BELIEVED => map,
                _ => self.read_latest()?,
            };
            let map = latest.insert(map);
            map.in_workflow.get(&(stage_hash, workflow_hash)).or_else(|| map.anywhere.get(&stage_hash)).map(|newest| newest.key)
        };
        let Some(key) = key else { return Ok(None) };
        Ok(self.action(key)?.filter(|record| record.provenance.stage == stage && record.provenance.kind == kind))
    }

    fn read_latest(&self) -> Result<LatestMap> {
        let keys = self.list_family(Family::Action)?;
        self.index().expect(self, keys.len() as u64);
        let mut map = LatestMap { made: Instant::now(), in_workflow: HashMap::new(), anywhere: HashMap::new() };
        for key in keys {
            match self.action_summary(key) {
                Ok(Some(summary)) => map.add(key, &summary),
                Ok(None) => {}
                Err(error @ StoreError::Format { .. }) => self.tell_once(key, &error),
                Err(error) => return Err(error),
            }
        }
        Ok(map)
    }

    /// Tells the memory of newest actions about one that was just written.
    pub(crate) fn note_action(&self, record: &ActionRecord) {
        self.action_folders().forget(record.key);
        if let Some(map) = &mut *self.latest().0.lock().unwrap_or_else(PoisonError::into_inner) {
            let provenance = &record.provenance;
            let summary = Summary {
                outputs: record.outputs.clone().into(),
                stage_hash: hash_texts(&[&provenance.stage, &provenance.kind]),
                workflow_hash: hash_texts(&[&provenance.workflow]),
                started_at: provenance.started_at,
            };
            map.add(record.key, &summary);
        }
    }

    pub(crate) fn indexed_file(&self, path: Digest, stamp: &FileStamp) -> Option<FileDigest> {
        let payload = self.index().get(Tree::Files, path)?;
        let mut reader = Reader(&payload);
        let known = FileStamp::decode(&mut reader)?;
        let digest = reader.digest()?;
        (known == *stamp && reader.is_empty()).then_some(FileDigest { digest, size_bytes: known.size_bytes })
    }

    pub(crate) fn index_file(&self, path: Digest, stamp: &FileStamp, digest: &FileDigest) {
        let mut payload = Vec::with_capacity(80);
        stamp.encode(&mut payload);
        payload.extend_from_slice(digest.digest.as_bytes());
        self.index().put(Tree::Files, path, &payload);
    }
}

impl FileStamp {
    pub(crate) fn encode(&self, bytes: &mut Vec<u8>) {
        bytes.extend_from_slice(&self.size_bytes.to_be_bytes());
        bytes.extend_from_slice(&self.modified_ns.to_be_bytes());
        bytes.extend_from_slice(&self.changed_ns.to_be_bytes());
        bytes.extend_from_slice(&self.inode.to_be_bytes());
    }

    pub(crate) fn decode(reader: &mut Reader<'_>) -> Option<Self> {
        let (size_bytes, modified_ns, changed_ns) = (reader.u64()?, reader.i128()?, reader.i128()?);
        Some(Self { size_bytes, modified_ns, changed_ns, inode: reader.u64()? })
    }
}

fn encode_blobs(manifest: &Manifest) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(40 * manifest.entries.len());
    for entry in &manifest.entries {
        bytes.extend_from_slice(entry.digest.as_bytes());
        bytes.extend_from_slice(&entry.size_bytes.to_be_bytes());
    }
    bytes
}

fn decode_blobs(bytes: &[u8]) -> Option<Vec<(Digest, u64)>> {
    let mut reader = Reader(bytes);
    let mut blobs = Vec::with_capacity(bytes.len() / 40);
    while !reader.is_empty() {
        blobs.push((reader.digest()?, reader.u64()?));
    }
    Some(blobs)
}

/// The first 8 bytes of a digest over texts, told apart by their lengths. Whoever finds something by it compares the texts.
pub(crate) fn hash_texts(texts: &[&str]) -> u64 {
    let mut hasher = crate::Hasher::new();
    for text in texts {
        hasher.update(&(text.len() as u64).to_be_bytes()).update(text.as_bytes());
    }
    let digest = hasher.finish();
    u64::from_be_bytes(digest.as_bytes()[..8].try_into().expect("a digest has more than 8 bytes"))
}

/// Newest action of every stage, remembered for a moment: a plan asks for many in a row.
#[derive(Default)]
pub(crate) struct Latest(Mutex<Option<LatestMap>>);

impl Latest {
    /// Other processes' actions are seen at the latest after this.
    const BELIEVED: Duration = Duration::from_secs(1);
}

struct LatestMap {
    made: Instant,
    in_workflow: HashMap<(u64, u64), Newest>,
    anywhere: HashMap<u64, Newest>,
}

#[derive(Clone, Copy)]
struct Newest {
    started_at: f64,
    key: Digest,
}

impl LatestMap {
    fn add(&mut self, key: Digest, summary: &Summary) {
        let found = Newest { started_at: summary.started_at, key };
        // Of two that started together any will do, but always the same one.
        let replace = |newest: &mut Newest| {
            if (found.started_at, found.key) > (newest.started_at, newest.key) || found.key == newest.key {
                *newest = found;
            }
        };
        self.in_workflow.entry((summary.stage_hash, summary.workflow_hash)).and_modify(replace).or_insert(found);
        self.anywhere.entry(summary.stage_hash).and_modify(replace).or_insert(found);
    }
}
