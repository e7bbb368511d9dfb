//! The second half of a collection: removing what was not marked, and what crashes left.

use std::{
    collections::HashSet,
    fs,
    path::Path,
    time::{Duration, SystemTime},
};

use crate::{
    Digest, Removed, Result, Retain, StoreError,
    collect::{Collection, is_kept_workflow},
    fault::fault_point,
    layout::Family,
    lease::is_alive,
    root::list,
    sealed::is_absent,
    usage::folder_bytes,
};

impl Collection<'_> {
    pub(crate) fn sweep(&mut self) -> Result<()> {
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
        self.sweep_runs()?;
        self.sweep_scratch()
    }

    /// Removes the records of old runs, but of none that made a kept result.
    fn sweep_runs(&mut self) -> Result<()> {
        let needed: HashSet<&str> = self.kept_actions.iter().map(|key| self.actions[key].provenance.run_id.as_str()).collect();
        for folder in self.store.spent_runs(&needed, self.now)? {
            // A folder's own time is that of its last new file; a log grows without that.
            if !self.is_young(&folder) && !list(&folder)?.iter().any(|file| self.is_young(file)) {
                self.remove_path("run", name_of(&folder), &folder)?;
            }
        }
        Ok(())
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
        let size_bytes = match &metadata {
            Ok(metadata) if metadata.is_dir() => folder_bytes(path)?,
            Ok(metadata) => metadata.len(),
            Err(_) => 0,
        };
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

pub(crate) fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if !is_absent(&error) => Err(StoreError::io("remove", path)(error)),
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
