//! Collection: removes what no root reaches. Runs beside writers: content is removed only under a lock that publishing
//! shares, and nothing younger than the grace period is touched.

use std::{
    collections::{BTreeSet, HashMap, HashSet, hash_map::Entry},
    fs::{self, TryLockError},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use serde::Serialize;

use crate::{
    ActionRecord, Digest, Manifest, Result, Retain, Snapshot, Store, StoreError,
    fault::fault_point,
    layout::{Family, digest_of_name},
    lease::{is_alive, is_unsupported},
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
    /// `blob`, `manifest`, `action`, `snapshot`, `temporary file`, `damaged file`, `index`, `lease`, `use`.
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
struct PartialFolder {
    path: PathBuf,
    snapshots: Vec<Snapshot>,
    reached: bool,
}

/// State of one collection.
struct Collection<'a> {
    store: &'a Store,
    options: &'a GcOptions,
    now: SystemTime,
    actions: HashMap<Digest, ActionRecord>,
    manifests: HashMap<Digest, Manifest>,
    kept_actions: HashSet<Digest>,
    kept_manifests: HashSet<Digest>,
    /// Manifests that a pin or the grace period protects even from `max_size_bytes`.
    firm_manifests: HashSet<Digest>,
    kept_blobs: HashSet<Digest>,
    partials: Vec<PartialFolder>,
    report: GcReport,
}

impl Store {
    /// Removes what no pin, no kept workflow and nothing recent reaches.
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

    /// Removes artifacts that were just superseded, at once: snapshots come every few seconds and are large. Blobs that
    /// another manifest names stay. Gives up, leaving it to [`Store::gc`], while another process publishes.
    pub(crate) fn discard_snapshots(&self, digests: &[Digest]) -> Result<()> {
        let mut superseded = self.manifest_blobs().superseded.lock().unwrap_or_else(PoisonError::into_inner);
        superseded.extend(digests);
        let file = self.open_collect_lock()?;
        match file.try_lock() {
            Ok(()) => {}
            // The next call takes these too.
            Err(TryLockError::WouldBlock) => return Ok(()),
            Err(TryLockError::Error(error)) => return Err(StoreError::io("lock", self.layout().collect_lock())(error)),
        }
        let mut gone = std::mem::take(&mut *superseded);
        for folder in list(&self.layout().partials())? {
            for snapshot in read_snapshots(&folder)? {
                gone.remove(&snapshot.digest);
            }
        }
        // Only tensors: small files may also be records of an action that is about to be written.
        let mut blobs = HashSet::new();
        for digest in &gone {
            if let Ok(Some(manifest)) = self.manifest(*digest) {
                blobs.extend(manifest.entries.iter().filter(|entry| entry.dtype.is_some()).map(|entry| entry.digest));
            }
        }
        for digest in self.list_family(Family::Manifest)? {
            if !blobs.is_empty() && !gone.contains(&digest) {
                self.manifest_blobs().with(self, digest, |named| blobs.retain(|blob| !named.contains(blob)))?;
            }
        }
        for digest in gone {
            remove(&self.layout().file(Family::Manifest, digest))?;
        }
        for digest in blobs {
            remove(&self.layout().file(Family::Blob, digest))?;
        }
        Ok(())
    }
}

/// Blobs of manifests that were looked at before. Manifests never change.
#[derive(Default)]
pub(crate) struct ManifestBlobs {
    known: Mutex<HashMap<Digest, Box<[Digest]>>>,
    /// Snapshots that are forgotten but could not be removed yet.
    superseded: Mutex<BTreeSet<Digest>>,
}

impl ManifestBlobs {
    fn with(&self, store: &Store, digest: Digest, use_blobs: impl FnOnce(&[Digest])) -> Result<()> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let blobs = match known.entry(digest) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(unknown) => {
                let Some(manifest) = store.manifest(digest)? else { return Ok(()) };
                unknown.insert(manifest.entries.iter().map(|entry| entry.digest).collect())
            }
        };
        use_blobs(blobs);
        Ok(())
    }
}

impl<'a> Collection<'a> {
    fn read(store: &'a Store, options: &'a GcOptions) -> Result<Self> {
        let mut manifests = HashMap::new();
        for digest in store.list_family(Family::Manifest)? {
            match store.manifest(digest) {
                Ok(manifest) => manifests.extend(manifest.map(|manifest| (digest, manifest))),
                Err(error @ StoreError::Damaged { .. }) => tracing::warn!(%error, "found by gc"),
                // Made by a newer rlflow: we cannot know what it needs.
                Err(error) => return Err(error),
            }
        }
        let mut actions = HashMap::new();
        for key in store.list_family(Family::Action)? {
            match store.read_action(key) {
                Ok(record) => actions.extend(record.map(|record| (key, record))),
                Err(error @ StoreError::Damaged { .. }) => tracing::warn!(%error, "found by gc"),
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
    fn is_young(&self, path: &Path) -> bool {
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

    fn sweep(&mut self) -> Result<()> {
        // Those that name others go first, so that a crash half-way leaves garbage rather than dangling names.
        for key in sorted(self.actions.keys().filter(|key| !self.kept_actions.contains(key))) {
            self.remove_file(Family::Action, key)?;
        }
        let partials = std::mem::take(&mut self.partials);
        for partial in &partials {
            for snapshot in &partial.snapshots {
                if partial.reached && self.kept_manifests.contains(&snapshot.digest) {
                    continue;
                }
                let kept = if snapshot.retain == Retain::Keep { " (kept)" } else { "" };
                let path = partial.path.join(format!("{}.json", snapshot.step));
                self.remove_path("snapshot", format!("step {}{kept} of {}", snapshot.step, name_of(&partial.path)), &path)?;
            }
            if !self.options.dry_run {
                // Only succeeds when nothing is left in it.
                let _ = fs::remove_dir(&partial.path);
            }
        }
        for digest in sorted(self.manifests.keys().filter(|digest| !self.kept_manifests.contains(digest))) {
            self.remove_file(Family::Manifest, digest)?;
        }
        fault_point("gc.removed").map_err(StoreError::io("remove", self.store.folder()))?;
        for digest in self.store.list_family(Family::Blob)? {
            let path = self.store.layout().file(Family::Blob, digest);
            if self.kept_blobs.contains(&digest) || self.is_young(&path) {
                self.report.kept_blobs += 1;
                self.report.kept_bytes += fs::metadata(&path).map_or(0, |metadata| metadata.len());
            } else {
                self.remove_file(Family::Blob, digest)?;
            }
        }
        self.sweep_scratch()
    }

    /// Removes what crashes, repairs and dead processes left.
    fn sweep_scratch(&mut self) -> Result<()> {
        let layout = self.store.layout().clone();
        for path in list(&layout.temp())? {
            if !self.is_young(&path) && !is_in_use(&path, self.now, self.store.is_on_network()) {
                self.remove_path("temporary file", name_of(&path), &path)?;
            }
        }
        for path in list(&layout.damaged())? {
            if !self.is_young(&path) {
                self.remove_path("damaged file", name_of(&path), &path)?;
            }
        }
        for path in list(&layout.root)? {
            if name_of(&path).starts_with("index.bad-") && !self.is_young(&path) {
                self.remove_path("index", name_of(&path), &path)?;
            }
        }
        for path in list(&layout.leases())? {
            let is_lock = path.extension().is_some_and(|extension| extension == "lock");
            if is_lock && !self.options.dry_run && !self.is_young(&path) && self.store.remove_dead_lease(&path)? {
                self.report.removed.push(Removed { what: "lease", name: name_of(&path), size_bytes: 0 });
            }
        }
        for path in list(&layout.uses())? {
            let gone = self.store.uses_in(&path)?.first().is_none_or(|used| !is_kept_workflow(&used.workflow));
            if gone && !self.is_young(&path) {
                self.remove_path("use", name_of(&path), &path)?;
            }
        }
        Ok(())
    }

    fn remove_file(&mut self, family: Family, digest: Digest) -> Result<()> {
        let path = self.store.layout().file(family, digest);
        self.store.presence().forget(digest);
        self.remove_path(family.name(), digest.to_string(), &path)
    }

    fn remove_path(&mut self, what: &'static str, name: String, path: &Path) -> Result<()> {
        let metadata = fs::symlink_metadata(path);
        let size_bytes = metadata.as_ref().map_or(0, fs::Metadata::len);
        if !self.options.dry_run {
            if metadata.is_ok_and(|metadata| metadata.is_dir()) {
                fs::remove_dir_all(path).map_err(StoreError::io("remove", path))?;
            } else {
                remove(path)?;
            }
        }
        self.report.freed_bytes += size_bytes;
        self.report.removed.push(Removed { what, name, size_bytes });
        Ok(())
    }
}

/// Whether a workflow is still there. One named by a relative path cannot be looked for, and counts as kept.
fn is_kept_workflow(workflow: &str) -> bool {
    let path = Path::new(workflow);
    !path.is_absolute() || path.exists()
}

/// Whether the process that a temporary file is named after may still need it.
fn is_in_use(path: &Path, now: SystemTime, on_network: bool) -> bool {
    /// No process holds a temporary file for longer.
    const LONGEST: Duration = Duration::from_secs(7 * 24 * 3600);
    let modified = fs::metadata(path).and_then(|metadata| metadata.modified());
    if modified.is_ok_and(|modified| now.duration_since(modified).unwrap_or_default() >= LONGEST) {
        return false;
    }
    let name = name_of(path);
    let pid = name.strip_prefix("scratch-").unwrap_or(&name).split('-').next().and_then(|pid| pid.parse().ok());
    pid.is_some_and(is_alive) || on_network
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if !crate::sealed::is_absent(&error) => Err(StoreError::io("remove", path)(error)),
        _ => Ok(()),
    }
}

fn name_of(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

fn sorted<'d>(digests: impl Iterator<Item = &'d Digest>) -> Vec<Digest> {
    let mut digests: Vec<Digest> = digests.copied().collect();
    digests.sort_unstable();
    digests
}
