//! What collection starts from: pins, and what the last runs of each workflow reached.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};

use crate::{
    Digest, Result, Store, StoreError,
    canonical::to_canonical,
    durable::{WritePoints, write_durably, write_lightly},
    sealed::{check_length, is_absent, parse, read_record},
};

/// How many different key sets of one workflow are remembered at most.
const MAX_USES: usize = 32;

const PIN_POINTS: WritePoints = WritePoints { written: "temp.written", renamed: "temp.written", folder_synced: "temp.written" };

/// Something kept until it is unpinned.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Pin {
    /// An artifact, an action key or a snapshot's prefix key.
    pub digest: Digest,
    /// Why, for people.
    #[serde(default)]
    pub note: String,
    /// Seconds since the Unix epoch.
    #[serde(default)]
    pub since: f64,
}

/// Keys that one state of a workflow reached.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Use {
    /// Action keys, memo keys and prefix keys, sorted.
    pub keys: Vec<Digest>,
    /// The workflow file.
    pub workflow: String,
}

impl Store {
    /// Keeps an artifact, an action's result or a stage's snapshots until [`Store::unpin`].
    pub fn pin(&self, digest: Digest, note: &str) -> Result<()> {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64());
        let path = self.layout().pins().join(digest.to_string());
        let body = encode(&path, &Pin { digest, note: note.to_owned(), since })?;
        write_durably(self.layout(), &path, &body, &PIN_POINTS)
    }

    /// Removes a pin. False if there was none.
    pub fn unpin(&self, digest: Digest) -> Result<bool> {
        let path = self.layout().pins().join(digest.to_string());
        match fs::remove_file(&path) {
            Ok(()) => Ok(true),
            Err(error) if is_absent(&error) => Ok(false),
            Err(error) => Err(StoreError::io("remove", path)(error)),
        }
    }

    /// All pins. A damaged pin still pins what its file is named after.
    pub fn pins(&self) -> Result<Vec<Pin>> {
        let mut pins = Vec::new();
        for path in list(&self.layout().pins())? {
            let Some(digest) = crate::layout::digest_of_name(&path) else { continue };
            let read = read_record(&path)?.and_then(|bytes| parse::<Pin>(&path, &bytes).ok());
            pins.push(Pin { digest, ..read.unwrap_or(Pin { digest, note: String::new(), since: 0.0 }) });
        }
        pins.sort_unstable_by_key(|pin| pin.digest);
        Ok(pins)
    }

    /// Remembers which keys a workflow's run reached: what `gc` keeps for it. Best made before stages run and again
    /// when all keys are known. Does nothing in a read-only store. The digest is what [`Store::is_newest_use`] knows it by.
    pub fn record_use(&self, workflow: &str, keys: &[Digest]) -> Result<Option<Digest>> {
        if self.is_read_only() {
            return Ok(None);
        }
        let mut keys = keys.to_vec();
        keys.sort_unstable();
        keys.dedup();
        let folder = self.uses_of(workflow);
        let used = Use { workflow: workflow.to_owned(), keys };
        // Its fields stand in canonical order, so this is canonical JSON, in a fraction of the time for thousands of keys.
        let body = serde_json::to_vec(&used).map_err(|error| StoreError::Format { path: folder.clone(), message: error.to_string() })?;
        check_length(&folder, &body)?;
        let name = Digest::of(&body);
        let known = newest_first(&folder)?;
        let path = folder.join(name.to_string());
        if known.first().is_some_and(|newest| *newest == path) {
            return Ok(Some(name));
        }
        // Written anew even when it is known: its number makes it the newest. Losing it in a power cut costs a
        // recollection at worst, so it is not synced.
        write_lightly(self.layout(), &path, &body)?;
        let next = known.first().and_then(|newest| number(newest)).unwrap_or(0) + 1;
        write_lightly(self.layout(), &folder.join(format!("{name}.number")), next.to_string().as_bytes())?;
        for old in known.into_iter().filter(|old| *old != path).skip(MAX_USES - 1) {
            let _ = fs::remove_file(number_path(&old));
            let _ = fs::remove_file(old);
        }
        Ok(Some(name))
    }

    /// Whether what a workflow reached last is what [`Store::record_use`] called `used`.
    pub fn is_newest_use(&self, workflow: &str, used: Digest) -> bool {
        let folder = self.uses_of(workflow);
        newest_first(&folder).is_ok_and(|known| known.first() == Some(&folder.join(used.to_string())))
    }

    fn uses_of(&self, workflow: &str) -> PathBuf {
        self.layout().uses().join(Digest::of(workflow.as_bytes()).to_string())
    }

    /// What the workflows of this store reached: for each workflow its newest state first.
    pub fn uses(&self) -> Result<Vec<Vec<Use>>> {
        let mut workflows = Vec::new();
        for folder in list(&self.layout().uses())? {
            let states = self.uses_in(&folder)?;
            if !states.is_empty() {
                workflows.push(states);
            }
        }
        Ok(workflows)
    }

    /// States of one workflow, newest first.
    pub(crate) fn uses_in(&self, folder: &Path) -> Result<Vec<Use>> {
        let mut states = Vec::new();
        for path in newest_first(folder)? {
            match read_record(&path)?.map(|bytes| parse::<Use>(&path, &bytes)) {
                Some(Ok(used)) => states.push(used),
                Some(Err(error)) => tracing::warn!(%error, "a workflow's use is left out"),
                None => {}
            }
        }
        Ok(states)
    }
}

fn number_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".number");
    name.into()
}

/// Place of a use in the order in which they were recorded. Counted, because clocks go back.
fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(number_path(path)).ok()?.trim().parse().ok()
}

fn newest_first(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = list(folder)?;
    paths.retain(|path| crate::layout::digest_of_name(path).is_some());
    paths.sort_by_cached_key(|path| std::cmp::Reverse(number(path)));
    Ok(paths)
}

/// Paths in a folder; none if it is not there.
pub(crate) fn list(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if is_absent(&error) => return Ok(Vec::new()),
        Err(error) => return Err(StoreError::io("list", folder)(error)),
    };
    let mut paths = Vec::new();
    for entry in entries {
        paths.push(entry.map_err(StoreError::io("list", folder))?.path());
    }
    paths.sort_unstable();
    Ok(paths)
}

fn encode<T: Serialize>(path: &Path, value: &T) -> Result<Vec<u8>> {
    let body = to_canonical(value).map_err(|error| StoreError::Format { path: path.to_owned(), message: error.to_string() })?;
    check_length(path, &body)?;
    Ok(body)
}
