use std::{fs, path::Path};

use serde::Serialize;

use crate::{
    Digest, Result, Store, StoreError,
    layout::{Family, digest_of_name},
    root::list,
    sealed::is_absent,
    snapshot::check_record,
};

/// One thing that `fsck` found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// `blob`, `manifest`, `action`, `snapshot` or `file`.
    pub what: &'static str,
    /// Digest, or path within the store.
    pub name: String,
    /// What is wrong.
    pub message: String,
    /// Whether it was set aside, so that the next run makes it again.
    pub repaired: bool,
}

/// What `fsck` checked and found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct FsckReport {
    /// Blobs verified.
    pub blobs: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Manifests verified.
    pub manifests: usize,
    /// Actions verified.
    pub actions: usize,
    /// Snapshot records verified.
    pub snapshots: usize,
    /// Actions whose artifacts are not there. No damage: `gc` may have taken them, and they are made again when something needs them.
    pub actions_without_artifacts: usize,
    /// What is wrong.
    pub problems: Vec<Problem>,
}

impl FsckReport {
    /// Whether nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.problems.is_empty()
    }
}

struct Check<'a> {
    store: &'a Store,
    repair: bool,
    report: FsckReport,
}

impl Store {
    /// Verifies every blob, manifest, action and snapshot record. With `repair`, what is damaged is moved to `damaged/`.
    pub fn fsck(&self, repair: bool) -> Result<FsckReport> {
        let mut check = Check { store: self, repair: repair && !self.is_read_only(), report: FsckReport::default() };
        for family in Family::ALL {
            check.names(family)?;
        }
        // Blobs first: what is set aside here is what manifests then lack.
        check.blobs()?;
        check.manifests()?;
        check.actions()?;
        check.snapshots()?;
        Ok(check.report)
    }
}

impl Check<'_> {
    /// Files that are not where their name says.
    fn names(&mut self, family: Family) -> Result<()> {
        let root = self.store.layout().family(family);
        for shard in list(&root)? {
            let prefix = shard.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            if !shard.is_dir() {
                self.stray(&shard);
                continue;
            }
            for path in list(&shard)? {
                if digest_of_name(&path).is_none_or(|digest| digest.to_string()[..2] != prefix) || !path.is_file() {
                    self.stray(&path);
                }
            }
        }
        Ok(())
    }

    fn stray(&mut self, path: &Path) {
        let name = path.strip_prefix(&self.store.layout().root).unwrap_or(path).display().to_string();
        let aside = name.replace('/', "-");
        let repaired = self.repair && self.store.move_to_damaged(path, &aside).is_ok();
        self.report.problems.push(Problem { what: "file", name, message: "does not belong here".into(), repaired });
    }

    fn damaged(&mut self, family: Family, digest: Digest, message: String) {
        if self.repair {
            self.store.set_aside(family, digest);
        }
        let repaired = self.repair && !self.store.layout().file(family, digest).exists();
        self.report.problems.push(Problem { what: family.name(), name: digest.to_string(), message, repaired });
    }

    fn blobs(&mut self) -> Result<()> {
        for digest in self.store.list_family(Family::Blob)? {
            match self.store.examine(Family::Blob, digest) {
                Ok(Some((_, content))) => {
                    self.report.blobs += 1;
                    self.report.bytes += content.len() as u64;
                }
                Ok(None) => {}
                Err(error) => self.damaged(Family::Blob, digest, message(error)),
            }
        }
        Ok(())
    }

    fn manifests(&mut self) -> Result<()> {
        for digest in self.store.list_family(Family::Manifest)? {
            let manifest = match self.store.manifest(digest) {
                Ok(Some(manifest)) => manifest,
                Ok(None) => continue,
                Err(error) => {
                    self.damaged(Family::Manifest, digest, message(error));
                    continue;
                }
            };
            self.report.manifests += 1;
            for entry in manifest.entries {
                let path = self.store.layout().file(Family::Blob, entry.digest);
                let problem = match fs::metadata(&path) {
                    Ok(metadata) if metadata.len() == entry.size_bytes => continue,
                    Ok(metadata) => format!("entry `{}` has {} bytes, not {}", entry.name, metadata.len(), entry.size_bytes),
                    Err(error) if is_absent(&error) => format!("entry `{}`: blob {} is missing", entry.name, entry.digest),
                    Err(error) => error.to_string(),
                };
                self.damaged(Family::Manifest, digest, problem);
                break;
            }
        }
        Ok(())
    }

    fn actions(&mut self) -> Result<()> {
        for key in self.store.list_family(Family::Action)? {
            match self.store.examine_action(key) {
                Ok(Some(record)) => {
                    self.report.actions += 1;
                    let present = |digest: &Digest| self.store.layout().file(Family::Manifest, *digest).exists();
                    self.report.actions_without_artifacts += usize::from(!record.outputs.values().all(present));
                    let missing = |digest: &&Digest| !self.store.layout().file(Family::Blob, **digest).exists();
                    if let Some(digest) = record.records.values().find(missing) {
                        self.damaged(Family::Action, key, format!("its record {digest} is missing"));
                    }
                }
                Ok(None) => {}
                Err(error) => self.damaged(Family::Action, key, message(error)),
            }
        }
        Ok(())
    }

    /// Whether an artifact is there with all its blobs, asked of the files and not of the index.
    fn is_whole(&self, digest: Digest) -> bool {
        let manifest = self.store.manifest(digest).ok().flatten();
        manifest.is_some_and(|manifest| manifest.entries.iter().all(|entry| self.store.has_blob(entry.digest, entry.size_bytes)))
    }

    fn snapshots(&mut self) -> Result<()> {
        for folder in list(&self.store.layout().partials())? {
            for path in list(&folder)? {
                let problem = match check_record(&path)? {
                    Ok(snapshot) if self.is_whole(snapshot.digest) => {
                        self.report.snapshots += 1;
                        continue;
                    }
                    Ok(_) => "its state is missing or damaged".into(),
                    Err(problem) => problem,
                };
                let name = path.strip_prefix(&self.store.layout().root).unwrap_or(&path).display().to_string();
                let aside = name.replace('/', "-");
                let repaired = self.repair && self.store.move_to_damaged(&path, &aside).is_ok();
                self.report.problems.push(Problem { what: "snapshot", name, message: problem, repaired });
            }
        }
        Ok(())
    }
}

/// What is wrong, without the promise to set it aside, which only a repair keeps.
fn message(error: StoreError) -> String {
    match error {
        StoreError::Damaged { actual, .. } => format!("its content hashes to {actual}"),
        StoreError::Format { message, .. } => message,
        other => other.to_string(),
    }
}
