//! What is damaged is moved to `damaged/`, where it is evidence and no longer served, and all that belongs together goes
//! together, so that one run makes all of it again. Who reads content does so, and who makes a result again; lookups (of records,
//! and of whether something is there) touch nothing, so that a plan says the same however often it is asked for.

use std::{
    collections::{BTreeMap, HashSet},
    fs::{self, File},
    io,
    path::Path,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::SystemTime,
};

use crate::{Digest, Manifest, Result, Store, StoreError, durable::create_folder, layout::Family, root::list, sealed::is_absent};

/// What a store object knows of damage.
#[derive(Default)]
pub(crate) struct Damage {
    /// Artifacts that this process has open, for as long as it has them.
    open: Mutex<Vec<(Digest, Weak<Manifest>)>>,
    /// Artifacts whose manifests lie in `damaged/`; read when first asked for.
    set_aside: Mutex<Option<HashSet<Digest>>>,
    /// Records of which was said that they cannot be used.
    told: Mutex<HashSet<Digest>>,
}

impl Damage {
    /// Notes that an artifact is open.
    pub fn watch(&self, digest: Digest, manifest: &Arc<Manifest>) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|(_, known)| known.strong_count() > 0);
        open.push((digest, Arc::downgrade(manifest)));
    }

    fn open(&self) -> BTreeMap<Digest, Arc<Manifest>> {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.iter().filter_map(|(digest, manifest)| Some((*digest, manifest.upgrade()?))).collect()
    }
}

impl Store {
    /// Whether an artifact is not there because damage was found in it, by this process or an earlier one: it should be
    /// made again, while one that `gc` took need not be before something reads it.
    pub fn is_set_aside(&self, artifact: Digest) -> bool {
        let mut known = self.damage().set_aside.lock().unwrap_or_else(PoisonError::into_inner);
        let known = known.get_or_insert_with(|| {
            let files = list(&self.layout().damaged()).unwrap_or_default();
            let digest = |path: &Path| path.file_stem()?.to_str()?.strip_prefix("manifest-")?.parse().ok();
            files.iter().filter_map(|path| digest(path)).collect()
        });
        known.contains(&artifact) && !self.layout().file(Family::Manifest, artifact).exists()
    }

    /// Whether what is there of an artifact is damaged, as far as that shows without reading its content: a manifest that does not
    /// fit its name, a blob of another length. Touches nothing.
    pub fn shows_damage(&self, artifact: Digest) -> Result<bool> {
        let manifest = match self.manifest(artifact) {
            Ok(Some(manifest)) => manifest,
            Ok(None) => return Ok(false),
            Err(StoreError::Damaged { .. } | StoreError::Format { .. }) => return Ok(true),
            Err(error) => return Err(error),
        };
        for entry in &manifest.entries {
            let path = self.layout().file(Family::Blob, entry.digest);
            match fs::metadata(&path) {
                Ok(metadata) if metadata.len() == entry.size_bytes => {}
                Ok(_) => return Ok(true),
                Err(error) if is_absent(&error) => {}
                Err(error) => return Err(StoreError::io("examine", path)(error)),
            }
        }
        Ok(false)
    }

    /// Sets aside what is damaged of an artifact, all of whose content is read for that: for whoever makes it again, since publishing
    /// would replace the evidence.
    pub fn set_aside_damage(&self, artifact: Digest) {
        let found = self.load_manifest(artifact).and_then(|manifest| match manifest {
            Some(manifest) => self.verify_entries(artifact, &manifest),
            None => Ok(()),
        });
        if let Err(error) = found {
            tracing::debug!(%error, "found in what is made again");
        }
    }

    /// What a lookup makes of a damaged record: it counts as absent.
    pub(crate) fn or_absent<T>(&self, digest: Digest, found: Result<Option<T>>) -> Result<Option<T>> {
        match found {
            Err(error @ StoreError::Damaged { .. }) => {
                self.tell_once(digest, &error);
                Ok(None)
            }
            found => found,
        }
    }

    /// Says that a record cannot be used, once per store object: a plan may come to it from several sides.
    pub(crate) fn tell_once(&self, digest: Digest, error: &StoreError) {
        if self.damage().told.lock().unwrap_or_else(PoisonError::into_inner).insert(digest) {
            tracing::warn!(%error, "a record in the store is not used");
        }
    }

    /// Verifies the content of all of an artifact's entries. All that is damaged is set aside, and then the manifest too;
    /// the error is about the first.
    pub(crate) fn verify_entries(&self, artifact: Digest, manifest: &Manifest) -> Result<()> {
        let blobs: BTreeMap<Digest, u64> = manifest.entries.iter().map(|entry| (entry.digest, entry.size_bytes)).collect();
        let verify = |digest| match self.load_verified(Family::Blob, digest)? {
            Some(_) => Ok(()),
            None => Err(StoreError::Missing { what: "blob", digest }),
        };
        let found = blobs.keys().copied().map(verify).fold(Ok(()), Result::and);
        // Another process may have made all of it again meanwhile.
        if found.is_err() && !blobs.iter().all(|(digest, size_bytes)| self.has_blob(*digest, *size_bytes)) {
            self.set_aside(Family::Manifest, artifact);
        }
        found
    }

    /// Sets aside whatever is damaged in the artifacts that are open: a stage that met damage in one of its inputs runs
    /// again when all of them were made again, not once for each.
    pub(crate) fn verify_open_artifacts(&self) {
        for (digest, manifest) in self.damage().open() {
            if let Err(error) = self.verify_entries(digest, &manifest) {
                tracing::debug!(%error, "found while damage was looked for");
            }
        }
    }

    /// Moves a damaged file to `damaged/`, so that it counts as absent. Best effort: a read-only store keeps it.
    pub(crate) fn set_aside(&self, family: Family, digest: Digest) {
        let path = self.layout().file(family, digest);
        let name = format!("{}-{digest}", family.name());
        self.presence().forget(digest);
        self.verified_blobs().forget(digest);
        match self.move_to_damaged(&path, &name) {
            Ok(true) if family == Family::Manifest => {
                if let Some(known) = &mut *self.damage().set_aside.lock().unwrap_or_else(PoisonError::into_inner) {
                    known.insert(digest);
                }
            }
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "damaged {} {} could not be set aside", family.name(), digest.short()),
        }
    }

    /// Moves a file to `damaged/`. False if it was not there: another process was faster.
    pub(crate) fn move_to_damaged(&self, path: &Path, name: &str) -> Result<bool> {
        let folder = self.layout().damaged();
        create_folder(&folder)?;
        // An earlier piece of evidence is kept: take the first free number.
        let target = (0..u32::MAX).map(|n| folder.join(format!("{name}.{n}"))).find(|target| !target.exists());
        let target = target.unwrap_or_else(|| folder.join(name));
        match fs::rename(path, &target) {
            Ok(()) => {
                // Its grace period begins now, not when it was written.
                let _ = File::open(&target).and_then(|file| file.set_modified(SystemTime::now()));
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(StoreError::io("set aside", path)(error)),
        }
    }
}
