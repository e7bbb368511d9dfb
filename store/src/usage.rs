use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs,
    path::Path,
};

use serde::Serialize;

use crate::{Digest, Result, Store, StoreError, layout::Family, root::list, snapshot::read_snapshots};

/// What one stage's results take.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct StageUsage {
    /// Workflow file, as given when it ran.
    pub workflow: String,
    /// Stage name; `(snapshots)` for the snapshots of unfinished and extendable stages.
    pub stage: String,
    /// Stage kind.
    pub kind: String,
    /// Results stored.
    pub results: usize,
    /// Sum of all entries' sizes, as if nothing were shared.
    pub logical_bytes: u64,
    /// Bytes of the different blobs behind them.
    pub physical_bytes: u64,
    /// Of these, bytes that another stage's results use too.
    pub shared_bytes: u64,
}

/// What a store takes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// By workflow and stage.
    pub stages: Vec<StageUsage>,
    /// Sum over all stages of the sizes as if nothing were shared.
    pub logical_bytes: u64,
    /// Bytes of all blobs.
    pub physical_bytes: u64,
    /// Blobs stored.
    pub blobs: usize,
    /// Bytes of blobs that no stage's result uses; `gc` takes them.
    pub unreferenced_bytes: u64,
    /// Bytes of manifests, actions and other small files.
    pub record_bytes: u64,
    /// Bytes of temporary and damaged files, of the index and of notes that nothing was to be done.
    pub scratch_bytes: u64,
}

/// Blobs of one stage: digest to size, and the sum over all entries.
#[derive(Default)]
struct Group {
    results: usize,
    logical_bytes: u64,
    blobs: HashMap<Digest, u64>,
}

impl Store {
    /// Sizes by stage, with what is shared between them.
    pub fn usage(&self) -> Result<Usage> {
        let mut sizes: HashMap<Digest, u64> = HashMap::new();
        for digest in self.list_family(Family::Blob)? {
            let path = self.layout().file(Family::Blob, digest);
            sizes.insert(digest, fs::metadata(&path).map_or(0, |metadata| metadata.len()));
        }
        let mut groups: BTreeMap<(String, String, String), Group> = BTreeMap::new();
        for action in self.actions()? {
            let provenance = action.provenance;
            let group = groups.entry((provenance.workflow, provenance.stage, provenance.kind)).or_default();
            group.results += 1;
            for digest in action.outputs.values() {
                self.add_artifact(group, *digest, &sizes)?;
            }
            for digest in action.records.values() {
                group.add(*digest, &sizes);
            }
        }
        for folder in list(&self.layout().partials())? {
            for snapshot in read_snapshots(&folder)? {
                let group = groups.entry((String::new(), "(snapshots)".into(), "snapshot".into())).or_default();
                group.results += 1;
                self.add_artifact(group, snapshot.digest, &sizes)?;
            }
        }

        let mut users: HashMap<Digest, usize> = HashMap::new();
        groups.values().flat_map(|group| group.blobs.keys()).for_each(|digest| *users.entry(*digest).or_default() += 1);
        let used: HashSet<Digest> = users.keys().copied().collect();
        let stages: Vec<StageUsage> = groups
            .into_iter()
            .map(|((workflow, stage, kind), group)| StageUsage {
                workflow,
                stage,
                kind,
                results: group.results,
                logical_bytes: group.logical_bytes,
                physical_bytes: group.blobs.values().sum(),
                shared_bytes: group.blobs.iter().filter(|(digest, _)| users[digest] > 1).map(|(_, size)| size).sum(),
            })
            .collect();
        let root = self.folder();
        Ok(Usage {
            logical_bytes: stages.iter().map(|stage| stage.logical_bytes).sum(),
            stages,
            physical_bytes: sizes.values().sum(),
            blobs: sizes.len(),
            unreferenced_bytes: sizes.iter().filter(|(digest, _)| !used.contains(digest)).map(|(_, size)| size).sum(),
            record_bytes: sum(root, &["manifests", "actions", "runs", "partial", "pins", "uses", "leases"])?,
            scratch_bytes: sum(root, &["tmp", "damaged", "index", "settled"])?,
        })
    }

    fn add_artifact(&self, group: &mut Group, digest: Digest, sizes: &HashMap<Digest, u64>) -> Result<()> {
        match self.manifest(digest) {
            Ok(Some(manifest)) => manifest.entries.iter().for_each(|entry| group.add(entry.digest, sizes)),
            // Collected, or damaged: it takes nothing.
            Ok(None) | Err(StoreError::Damaged { .. }) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

impl Group {
    fn add(&mut self, digest: Digest, sizes: &HashMap<Digest, u64>) {
        if let Some(&size) = sizes.get(&digest) {
            self.logical_bytes += size;
            self.blobs.insert(digest, size);
        }
    }
}

fn sum(root: &Path, folders: &[&str]) -> Result<u64> {
    folders.iter().map(|folder| folder_bytes(&root.join(folder))).sum()
}

/// Bytes of all files in a folder and its subfolders. Links count as themselves.
pub(crate) fn folder_bytes(folder: &Path) -> Result<u64> {
    let mut total = 0;
    for path in list(folder)? {
        total += match fs::symlink_metadata(&path) {
            Ok(metadata) if metadata.is_dir() => folder_bytes(&path)?,
            Ok(metadata) => metadata.len(),
            // Gone since: a running process cleans up after itself.
            Err(_) => 0,
        };
    }
    Ok(total)
}
