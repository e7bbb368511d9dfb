//! Collection: removes what no root reaches. Runs beside writers: content is removed only under a lock that publishing
//! shares, and nothing younger than the grace period is touched.

use std::{
    collections::{HashMap, HashSet},
    fs,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use serde::Serialize;

use crate::{
    ActionRecord, Digest, Manifest, Result, Snapshot, Store, StoreError,
    fault::fault_point,
    layout::{Family, digest_of_name},
    lease::is_unsupported,
    root::list,
    snapshot::read_snapshots,
    store::CollectLock,
};

/// What to keep.
#[derive(Debug, Clone, PartialEq)]
pub struct GcOptions {
    /// Only say what would be removed.
    pub dry_run: bool,
    /// For each workflow, how many of its last different states are kept.
    pub keep_last: usize,
    /// Remove results, oldest first, until this much is left. Pins and what is in its grace period stay.
    pub max_size_bytes: Option<u64>,
    /// Whatever is younger stays.
    pub grace: Duration,
}

impl Default for GcOptions {
    fn default() -> Self {
        Self { dry_run: false, keep_last: 1, max_size_bytes: None, grace: Duration::from_secs(24 * 3600) }
    }
}

/// One thing that was, or would be, removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Removed {
    /// `blob`, `manifest`, `action`, `snapshot`, `run`, `temporary file`, `damaged file`, `index`, `lease`, `use`.
    pub what: &'static str,
    /// Its digest or file name.
    pub name: String,
    /// Bytes that it held.
    pub size_bytes: u64,
}

/// What a collection did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct GcReport {
    /// Whether nothing was really removed.
    pub dry_run: bool,
    /// What was removed.
    pub removed: Vec<Removed>,
    /// Sum of its bytes.
    pub freed_bytes: u64,
    /// Bytes of blobs that are left.
    pub kept_bytes: u64,
    /// Blobs that are left.
    pub kept_blobs: usize,
}

/// What a snapshot's folder holds.
pub(crate) struct PartialFolder {
    pub path: PathBuf,
    pub snapshots: Vec<Snapshot>,
    pub reached: bool,
}

/// State of one collection.
pub(crate) struct Collection<'a> {
    pub store: &'a Store,
    pub options: &'a GcOptions,
    pub now: SystemTime,
    pub actions: HashMap<Digest, ActionRecord>,
    pub manifests: HashMap<Digest, Manifest>,
    pub kept_actions: HashSet<Digest>,
    pub kept_manifests: HashSet<Digest>,
    /// Manifests that a pin or the grace period protects even from `max_size_bytes`.
    pub firm_manifests: HashSet<Digest>,
    pub kept_blobs: HashSet<Digest>,
    pub partials: Vec<PartialFolder>,
    pub report: GcReport,
}

impl Store {
    /// Removes what no pin, no kept workflow and nothing recent reaches, and the records of old runs.
    pub fn gc(&self, options: &GcOptions) -> Result<GcReport> {
        // Writers wait: a manifest must not appear between marking and removing.
        let guard = if options.dry_run { None } else { Some(self.exclude_writers()?) };
        let mut collection = Collection::read(self, options)?;
        collection.mark()?;
        fault_point("gc.marked").map_err(StoreError::io("remove", self.folder()))?;
        collection.shrink();
        collection.sweep()?;
        drop(guard);
        Ok(collection.report)
    }

    fn exclude_writers(&self) -> Result<CollectLock> {
        let file = self.open_collect_lock()?;
        match file.lock() {
            Err(error) if !is_unsupported(&error) => Err(StoreError::io("lock", self.layout().collect_lock())(error)),
            _ => Ok(CollectLock { _file: file }),
        }
    }
}

impl<'a> Collection<'a> {
    fn read(store: &'a Store, options: &'a GcOptions) -> Result<Self> {
        // What a damaged record names is not kept for it, so it does not stay either.
        let damaged = |family, digest, error: StoreError| {
            tracing::warn!(%error, "found by gc");
            if !options.dry_run {
                store.set_aside(family, digest);
            }
        };
        let mut manifests = HashMap::new();
        for digest in store.list_family(Family::Manifest)? {
            match store.manifest(digest) {
                Ok(manifest) => manifests.extend(manifest.map(|manifest| (digest, manifest))),
                Err(error @ StoreError::Damaged { .. }) => damaged(Family::Manifest, digest, error),
                // Made by a newer rlflow: we cannot know what it needs.
                Err(error) => return Err(error),
            }
        }
        let mut actions = HashMap::new();
        for key in store.list_family(Family::Action)? {
            match store.examine_action(key) {
                Ok(record) => actions.extend(record.map(|record| (key, record))),
                Err(error @ StoreError::Damaged { .. }) => damaged(Family::Action, key, error),
                Err(error) => return Err(error),
            }
        }
        let mut partials = Vec::new();
        for path in list(&store.layout().partials())? {
            partials.push(PartialFolder { snapshots: read_snapshots(&path)?, path, reached: false });
        }
        Ok(Self {
            store,
            options,
            now: SystemTime::now(),
            actions,
            manifests,
            kept_actions: HashSet::new(),
            kept_manifests: HashSet::new(),
            firm_manifests: HashSet::new(),
            kept_blobs: HashSet::new(),
            partials,
            report: GcReport { dry_run: options.dry_run, ..GcReport::default() },
        })
    }

    /// Whether a file is in its grace period. Times from the future (the clock was set back) count as young.
    pub(crate) fn is_young(&self, path: &Path) -> bool {
        let modified = fs::metadata(path).and_then(|metadata| metadata.modified());
        modified.is_ok_and(|modified| self.now.duration_since(modified).map_or(true, |age| age < self.options.grace))
    }

    fn is_young_file(&self, family: Family, digest: Digest) -> bool {
        self.is_young(&self.store.layout().file(family, digest))
    }

    fn mark(&mut self) -> Result<()> {
        let mut roots: HashSet<Digest> = HashSet::new();
        for states in self.store.uses()? {
            let kept = states.first().is_some_and(|used| is_kept_workflow(&used.workflow));
            let kept_states = states.into_iter().take(if kept { self.options.keep_last.max(1) } else { 0 });
            roots.extend(kept_states.flat_map(|used| used.keys));
        }
        let pins: HashSet<Digest> = self.store.pins()?.into_iter().map(|pin| pin.digest).collect();
        let young_actions: Vec<Digest> = self.actions.keys().copied().filter(|&key| self.is_young_file(Family::Action, key)).collect();

        for &key in roots.iter().chain(&pins).chain(&young_actions) {
            let firm = pins.contains(&key);
            self.keep_result(key, firm);
        }
        for &digest in &young_actions {
            let outputs: Vec<Digest> = self.actions[&digest].outputs.values().copied().collect();
            self.firm_manifests.extend(outputs);
        }
        let young_manifests = self.manifests.keys().copied().filter(|&digest| self.is_young_file(Family::Manifest, digest));
        let firm: Vec<Digest> = young_manifests.chain(pins.iter().copied().filter(|pin| self.manifests.contains_key(pin))).collect();
        self.kept_manifests.extend(&firm);
        self.firm_manifests.extend(&firm);

        let young_partials: Vec<bool> = self
            .partials
            .iter()
            .map(|partial| partial.snapshots.iter().any(|snapshot| self.is_young(&partial.path.join(format!("{}.json", snapshot.step)))))
            .collect();
        for (partial, young) in self.partials.iter_mut().zip(young_partials) {
            let key = digest_of_name(&partial.path);
            partial.reached = young || key.is_some_and(|key| roots.contains(&key) || pins.contains(&key));
            if partial.reached {
                let digests = partial.snapshots.iter().map(|snapshot| snapshot.digest);
                self.kept_manifests.extend(digests.filter(|digest| self.manifests.contains_key(digest)));
            }
        }
        self.keep_ancestors();
        self.mark_blobs();
        Ok(())
    }

    fn keep_result(&mut self, key: Digest, firm: bool) {
        let Some(record) = self.actions.get(&key) else { return };
        self.kept_actions.insert(key);
        for &digest in record.outputs.values().filter(|digest| self.manifests.contains_key(digest)) {
            self.kept_manifests.insert(digest);
            if firm {
                self.firm_manifests.insert(digest);
            }
        }
    }

    /// Keeps the records, though not the artifacts, of everything that kept artifacts were made from: lineage needs them.
    fn keep_ancestors(&mut self) {
        let mut makers: HashMap<Digest, Vec<Digest>> = HashMap::new();
        for (key, record) in &self.actions {
            record.outputs.values().for_each(|output| makers.entry(*output).or_default().push(*key));
        }
        let mut open: Vec<Digest> = self.kept_manifests.iter().copied().collect();
        open.extend(self.kept_actions.iter().flat_map(|key| self.actions[key].outputs.values().copied()));
        let mut seen: HashSet<Digest> = HashSet::new();
        while let Some(artifact) = open.pop() {
            if !seen.insert(artifact) {
                continue;
            }
            for key in makers.get(&artifact).into_iter().flatten() {
                self.kept_actions.insert(*key);
                open.extend(self.actions[key].provenance.inputs.values().flatten().map(|(_, digest)| *digest));
            }
        }
    }

    fn mark_blobs(&mut self) {
        let entries = self.kept_manifests.iter().filter_map(|digest| self.manifests.get(digest)).flat_map(|manifest| &manifest.entries);
        self.kept_blobs = entries.map(|entry| entry.digest).collect();
        self.kept_blobs.extend(self.kept_actions.iter().flat_map(|key| self.actions[key].records.values().copied()));
    }

    /// Gives up results, oldest first, until the kept blobs fit `max_size_bytes`. Records of actions stay: a result whose
    /// artifact is gone is made again only when something must read it.
    fn shrink(&mut self) {
        let Some(limit) = self.options.max_size_bytes else { return };
        let mut references: HashMap<Digest, (usize, u64)> = HashMap::new();
        let mut total = 0;
        for entry in self.kept_manifests.iter().filter_map(|digest| self.manifests.get(digest)).flat_map(|manifest| &manifest.entries) {
            let counted = references.entry(entry.digest).or_insert((0, entry.size_bytes));
            if counted.0 == 0 {
                total += entry.size_bytes;
            }
            counted.0 += 1;
        }
        for digest in self.candidates() {
            if total <= limit {
                break;
            }
            self.kept_manifests.remove(&digest);
            for entry in self.manifests.get(&digest).into_iter().flat_map(|manifest| &manifest.entries) {
                if let Some(counted) = references.get_mut(&entry.digest) {
                    counted.0 -= 1;
                    if counted.0 == 0 {
                        total -= entry.size_bytes;
                    }
                }
            }
        }
        self.mark_blobs();
    }

    /// Kept manifests in the order in which they may be given up: snapshots, then results by age.
    fn candidates(&self) -> Vec<Digest> {
        let mut made_at: HashMap<Digest, f64> = HashMap::new();
        for record in self.actions.values() {
            for output in record.outputs.values() {
                let time = made_at.entry(*output).or_insert(f64::MIN);
                *time = time.max(record.provenance.started_at);
            }
        }
        let kept = self.kept_manifests.iter().copied().filter(|digest| !self.firm_manifests.contains(digest));
        let mut order: Vec<(f64, Digest)> = kept.map(|digest| (made_at.get(&digest).copied().unwrap_or(f64::MIN), digest)).collect();
        order.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        order.into_iter().map(|(_, digest)| digest).collect()
    }
}

/// Whether a workflow is still there. One named by a relative path cannot be looked for, and counts as kept.
pub(crate) fn is_kept_workflow(workflow: &str) -> bool {
    let path = Path::new(workflow);
    !path.is_absolute() || path.exists()
}
