//! Notes that a workflow had nothing to do, with what the files looked like that say so: while all of them look the same, it
//! still has nothing to do, and one look at each answers what reading the workflow and thousands of records would.
//!
//! Like the index never the truth: a note that is lost, damaged or no longer fits costs the time that it would have saved.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};

use crate::{
    Digest, Store,
    durable::write_lightly,
    file_digest::FileStamp,
    layout::Family,
    root::list,
    sealed::{MAX_RECORD_BYTES, Unsealed, read_record, seal, unseal},
};

/// What the first line of a note calls it.
const SEAL: &str = "settled";
/// Notes that are kept, newest first: one for each workflow and way to call it that people go back and forth between.
const MAX_NOTES: usize = 32;
/// From this many actions on, several threads look at them.
const PARALLEL_FROM: usize = 2048;

/// What the caller's part of a note depends on, as files looked when it was made.
#[derive(Serialize, Deserialize)]
struct Seen {
    /// Data files.
    files: Vec<(PathBuf, FileStamp)>,
    /// Records by their keys.
    actions: Vec<(Digest, FileStamp)>,
}

/// What was noted by [`Store::note_settled`].
pub struct SettledNote {
    store: Store,
    seen: Seen,
    content: Vec<u8>,
}

impl SettledNote {
    /// The caller's part.
    pub fn content(&self) -> &[u8] {
        &self.content
    }

    /// Whether every file still looks as it did when this was noted.
    pub fn holds(&self) -> bool {
        let same = |path: &Path, stamp: &FileStamp| {
            fs::metadata(path).is_ok_and(|metadata| metadata.is_file() && FileStamp::of(&metadata) == *stamp)
        };
        let layout = self.store.layout();
        !self.store.holds_damage()
            && self.seen.files.iter().all(|(path, stamp)| same(path, stamp))
            && in_parallel(&self.seen.actions, |(key, stamp)| same(&layout.file(Family::Action, *key), stamp))
    }
}

impl Store {
    /// Notes `content` under `name`, good for as long as these data files (with the digests that were found), the records of
    /// `actions` and the absence of damage stay as they were when `began`, before the caller looked at any of them.
    ///
    /// Nothing is noted where a change since then might not show: in a store on a network, read-only or with damage set
    /// aside, or when something was written just before. Whether it was noted.
    pub fn note_settled(&self, name: Digest, content: &[u8], files: &[(PathBuf, Digest)], actions: &[Digest], began: SystemTime) -> bool {
        if self.is_read_only() || self.is_on_network() || self.holds_damage() {
            return false;
        }
        let stamp = |path: &Path| {
            let stamp = FileStamp::of(&fs::metadata(path).ok()?);
            (stamp.settles_in(began, false) == Some(Duration::ZERO)).then_some(stamp)
        };
        let file = |(path, digest): &(PathBuf, Digest)| {
            // A file that changed between the look at its content and this one has another stamp than was remembered.
            let stamp = stamp(path).filter(|stamp| self.remembers(path, stamp, *digest))?;
            Some((path.clone(), stamp))
        };
        let action = |key: &Digest| Some((*key, stamp(&self.layout().file(Family::Action, *key))?));
        let Some(files) = files.iter().map(file).collect::<Option<Vec<_>>>() else { return false };
        let Some(actions) = actions.iter().map(action).collect::<Option<Vec<_>>>() else { return false };
        // JSON without line breaks, one, and the caller's part.
        let Ok(mut body) = serde_json::to_vec(&Seen { files, actions }) else { return false };
        body.push(b'\n');
        body.extend_from_slice(content);
        if body.len() > MAX_RECORD_BYTES {
            return false;
        }
        let written = write_lightly(self.layout(), &self.layout().settled().join(name.to_string()), &seal(SEAL, &body));
        if let Err(error) = &written {
            tracing::debug!(%error, "that nothing is to be done is not noted");
        }
        self.drop_old_notes();
        written.is_ok()
    }

    /// What was noted under `name`. Whether that is still so is for [`SettledNote::holds`] to say.
    pub fn settled(&self, name: Digest) -> Option<SettledNote> {
        let bytes = read_record(&self.layout().settled().join(name.to_string())).ok()??;
        let Unsealed::Intact(body) = unseal(SEAL, &bytes) else { return None };
        let at = body.iter().position(|byte| *byte == b'\n')?;
        Some(SettledNote { seen: serde_json::from_slice(&body[..at]).ok()?, content: body[at + 1..].to_vec(), store: self.clone() })
    }

    /// Whether manifests were set aside as damaged: what was made of them may have to be made again, depending on more than
    /// what is looked at here.
    fn holds_damage(&self) -> bool {
        fs::read_dir(self.layout().damaged()).is_ok_and(|mut entries| entries.next().is_some())
    }

    fn drop_old_notes(&self) {
        let notes = list(&self.layout().settled()).unwrap_or_default();
        if notes.len() <= MAX_NOTES {
            return;
        }
        let modified = |path: &PathBuf| fs::metadata(path).and_then(|metadata| metadata.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
        let mut notes: Vec<(SystemTime, PathBuf)> = notes.into_iter().map(|path| (modified(&path), path)).collect();
        notes.sort_unstable();
        notes.iter().rev().skip(MAX_NOTES).for_each(|(_, path)| _ = fs::remove_file(path));
    }
}

/// Whether `holds` for all items.
fn in_parallel<T: Sync>(items: &[T], holds: impl Fn(&T) -> bool + Sync) -> bool {
    let threads = if items.len() < PARALLEL_FROM { 1 } else { thread::available_parallelism().map_or(1, usize::from).min(8) };
    if threads == 1 {
        return items.iter().all(holds);
    }
    thread::scope(|scope| {
        let parts: Vec<_> = items.chunks(items.len().div_ceil(threads)).map(|part| scope.spawn(|| part.iter().all(&holds))).collect();
        parts.into_iter().all(|part| part.join().unwrap_or(false))
    })
}
