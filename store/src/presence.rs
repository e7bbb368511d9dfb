use std::{
    collections::HashSet,
    fs,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use crate::{
    Digest, Store,
    file_digest::FileStamp,
    layout::{Family, digest_of_name},
};

/// Lookups in one folder that are answered one by one, sizes included; after these the folder is listed.
const SINGLE_LOOKUPS: u32 = 16;
/// For how long a listing is believed before the folder's times are looked at again.
const BELIEVED: Duration = Duration::from_millis(100);

/// Which blobs are there, remembered per folder, so that checking thousands does not cost a system call each.
pub(crate) struct Presence(Vec<Mutex<Shard>>);

#[derive(Default)]
struct Shard {
    lookups: u32,
    listing: Option<Listing>,
}

struct Listing {
    /// Any file that comes or goes changes the folder's times.
    stamp: FileStamp,
    checked: Instant,
    digests: HashSet<Digest>,
}

impl Default for Presence {
    fn default() -> Self {
        Self((0..256).map(|_| Mutex::default()).collect())
    }
}

impl Presence {
    /// Forgets what is known of the folder of `digest`.
    pub fn forget(&self, digest: Digest) {
        self.shard(digest).listing = None;
    }

    fn shard(&self, digest: Digest) -> std::sync::MutexGuard<'_, Shard> {
        self.0[usize::from(digest.as_bytes()[0])].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store {
    /// Whether a blob is there. Its size is compared too, except where thousands are asked for: then folders are listed.
    pub(crate) fn sees_blob(&self, digest: Digest, size_bytes: u64) -> bool {
        let mut shard = self.presence().shard(digest);
        shard.lookups = shard.lookups.saturating_add(1);
        if shard.lookups > SINGLE_LOOKUPS && shard.refresh(self, digest.as_bytes()[0]).is_some_and(|digests| digests.contains(&digest)) {
            return true;
        }
        drop(shard);
        // What a listing lacks may have come since.
        self.has_blob(digest, size_bytes)
    }
}

impl Shard {
    /// The folder's listing, made again if the folder changed. `None` while it changes.
    fn refresh(&mut self, store: &Store, prefix: u8) -> Option<&HashSet<Digest>> {
        if self.listing.as_ref().is_none_or(|listing| listing.checked.elapsed() >= BELIEVED) {
            let folder = store.layout().shard(Family::Blob, prefix);
            let checked = Instant::now();
            let now = SystemTime::now();
            let stamp = FileStamp::of(&fs::metadata(&folder).ok()?);
            match self.listing.take() {
                Some(listing) if listing.stamp == stamp => self.listing = Some(Listing { checked, ..listing }),
                _ => {
                    // A change within one tick of the clock would not show in the folder's times.
                    if stamp.settles_in(now, store.is_on_network()) != Some(Duration::ZERO) {
                        return None;
                    }
                    let entries = fs::read_dir(&folder).ok()?;
                    let digests = entries.filter_map(|entry| digest_of_name(entry.ok()?.file_name().as_ref())).collect();
                    self.listing = Some(Listing { stamp, checked, digests });
                }
            }
        }
        self.listing.as_ref().map(|listing| &listing.digests)
    }
}
