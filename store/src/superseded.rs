//! Snapshots that a newer one replaces are removed at once: they come every few seconds and are large.

use std::{
    collections::{BTreeSet, HashMap, HashSet, hash_map::Entry},
    fs::TryLockError,
    sync::{Mutex, PoisonError},
};

use crate::{Digest, Result, Store, StoreError, layout::Family, root::list, snapshot::read_snapshots, sweep::remove};

impl Store {
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
                let Some(manifest) = store.load_manifest(digest)? else { return Ok(()) };
                unknown.insert(manifest.entries.iter().map(|entry| entry.digest).collect())
            }
        };
        use_blobs(blobs);
        Ok(())
    }
}
