//! The index: copies of what files say, in sled, so that thousands of lookups are fast. Never the truth.
//!
//! It is opened only when it pays (opening costs as much as reading one or two thousand files), by one process at a time, behind
//! a guard: damage of any kind sets it aside, and it fills again from the files. See `store/DESIGN.md`.

use std::{
    fs::{self, File, OpenOptions},
    io::Read,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{
        Mutex, MutexGuard, Once, OnceLock, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use crate::{
    Digest, Store,
    envelope::{ENVELOPE, unwrap_envelope, wrap_envelope},
    fault::fault_point,
    file_digest::FileStamp,
    index_seal::{SEAL, is_closed, seal_of, stamps},
    layout::Layout,
};

/// Lookups answered from files before the index is opened: about where that begins to pay.
const LOOKUPS_BEFORE_OPENING: u64 = 2048;

/// One of the index's trees. Keys have 32 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tree {
    /// Folder of actions to what their files say of outputs and origin.
    Folders,
    /// Manifest digest to its blobs.
    Manifests,
    /// Digest of a data file's path to what it is recognised by, and its digest.
    Files,
}

pub(crate) struct Index {
    state: RwLock<State>,
    lookups: AtomicU64,
    /// What was wrong with an index that was set aside. Said once per store object.
    damage: OnceLock<String>,
    opening: Mutex<()>,
}

enum State {
    /// Not needed so far.
    Waiting,
    /// Not to be had: another process has it, or it cannot be opened.
    Off,
    Open(Box<OpenIndex>),
}

/// Seal that the index was opened with, and its files as they were then.
struct Sealed {
    seal: Vec<u8>,
    stamps: Vec<(PathBuf, FileStamp)>,
}

struct OpenIndex {
    sealed: Option<Sealed>,
    written: AtomicBool,
    db: sled::Db,
    trees: [sled::Tree; 3],
    folder: PathBuf,
    /// Held until everything else is closed.
    lock: File,
}

impl Default for Index {
    fn default() -> Self {
        Self { state: RwLock::new(State::Waiting), lookups: AtomicU64::new(0), damage: OnceLock::new(), opening: Mutex::new(()) }
    }
}

impl Index {
    /// Announces `lookups` lookups, of which one costs about a file read without the index. Opens the index if that many pay for it.
    pub fn expect(&self, store: &Store, lookups: u64) {
        let before = self.lookups.fetch_add(lookups, Ordering::Relaxed);
        if before + lookups >= LOOKUPS_BEFORE_OPENING && before < u64::MAX / 2 {
            self.open(store);
        }
    }

    fn open(&self, store: &Store) {
        let waiting = |state: &State| matches!(state, State::Waiting);
        if !waiting(&self.state.read().unwrap_or_else(PoisonError::into_inner)) {
            return;
        }
        let _opening: MutexGuard<'_, ()> = self.opening.lock().unwrap_or_else(PoisonError::into_inner);
        if !waiting(&self.state.read().unwrap_or_else(PoisonError::into_inner)) {
            return;
        }
        let opened = match place(store) {
            Some(place) => OpenIndex::open(&place, |trouble| self.dismiss(&place.folder, trouble)),
            None => None,
        };
        *self.state.write().unwrap_or_else(PoisonError::into_inner) = opened.map_or(State::Off, |open| State::Open(Box::new(open)));
    }

    /// The value under `key`, if the index is open, has it and it is whole.
    pub fn get(&self, tree: Tree, key: Digest) -> Option<Vec<u8>> {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        let State::Open(open) = &*state else { return None };
        let found = guard(|| Ok(open.trees[tree as usize].get(key.as_bytes())?));
        match found {
            Ok(None) => None,
            // Another version's value is as good as none.
            Ok(Some(bytes)) if bytes.first() != Some(&ENVELOPE) => None,
            Ok(Some(bytes)) => {
                let payload = unwrap_envelope(key, &bytes);
                if payload.is_none() {
                    drop(state);
                    self.give_up(&Trouble::Damaged("a value is damaged".into()));
                }
                payload
            }
            Err(trouble) => {
                drop(state);
                self.give_up(&trouble);
                None
            }
        }
    }

    /// Remembers `payload` under `key`, if the index is open.
    pub fn put(&self, tree: Tree, key: Digest, payload: &[u8]) {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        let State::Open(open) = &*state else { return };
        let bytes = wrap_envelope(key, payload);
        open.written.store(true, Ordering::Relaxed);
        let written = guard(|| {
            fault_point("index.write").map_err(sled::Error::from)?;
            open.trees[tree as usize].insert(key.as_bytes(), bytes)?;
            Ok(())
        });
        if let Err(trouble) = written {
            drop(state);
            self.give_up(&trouble);
        }
    }

    /// Whether lookups go to the index.
    pub fn is_open(&self) -> bool {
        matches!(&*self.state.read().unwrap_or_else(PoisonError::into_inner), State::Open(_))
    }

    /// What was wrong with the index, if it was set aside since the store was opened.
    pub fn damage(&self) -> Option<&str> {
        self.damage.get().map(String::as_str)
    }

    /// Closes an index that cannot be used and works from files until the store is opened again.
    fn give_up(&self, trouble: &Trouble) {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        if let State::Open(open) = std::mem::replace(&mut *state, State::Off) {
            let OpenIndex { db, trees, folder, lock, .. } = *open;
            let _ = guard(move || {
                drop(trees);
                drop(db);
                Ok(())
            });
            self.dismiss(&folder, trouble);
            drop(lock);
        }
    }

    /// Gets an index out of the way. On a full disk it is removed, which makes room; damage is set aside and reported once.
    fn dismiss(&self, folder: &Path, trouble: &Trouble) {
        match trouble {
            Trouble::Full => {
                tracing::debug!("the disk is full: {} is removed, and files answer everything", folder.display());
                let _ = fs::remove_dir_all(folder);
            }
            Trouble::Damaged(reason) => {
                set_aside(folder);
                if self.damage.set(reason.clone()).is_ok() {
                    tracing::warn!(
                        "index was rebuilt: {} was damaged ({reason}); nothing is lost, files hold all that it held",
                        folder.display()
                    );
                }
            }
        }
    }
}

/// Why an index cannot be used.
enum Trouble {
    /// There is no room to write it. No damage.
    Full,
    Damaged(String),
}

impl From<sled::Error> for Trouble {
    fn from(error: sled::Error) -> Self {
        match error {
            sled::Error::Io(error) if is_full(&error) => Self::Full,
            error => Self::Damaged(error.to_string()),
        }
    }
}

fn is_full(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{QuotaExceeded, ReadOnlyFilesystem, StorageFull};
    matches!(error.kind(), StorageFull | QuotaExceeded | ReadOnlyFilesystem)
}

impl Drop for Index {
    fn drop(&mut self) {
        let state = std::mem::replace(&mut *self.state.write().unwrap_or_else(PoisonError::into_inner), State::Off);
        if let State::Open(open) = state {
            open.close();
        }
    }
}

/// Where an index lives.
struct Place {
    folder: PathBuf,
    lock: PathBuf,
}

/// Beside the files, or on a local disk when those are on a network file system. Nowhere if the store is read-only.
fn place(store: &Store) -> Option<Place> {
    if store.is_read_only() {
        return None;
    }
    let Layout { root } = store.layout();
    if !store.is_on_network() {
        return Some(Place { folder: root.join("index"), lock: root.join("index.lock") });
    }
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = cache.or_else(|| std::env::home_dir().map(|home| home.join(".cache")))?.join("rlflow");
    fs::create_dir_all(&cache).ok()?;
    let name = Digest::of(root.as_os_str().as_encoded_bytes()).short();
    Some(Place { folder: cache.join(format!("index-{name}")), lock: cache.join(format!("index-{name}.lock")) })
}

impl OpenIndex {
    fn open(place: &Place, dismiss: impl Fn(&Trouble)) -> Option<Self> {
        let mut lock = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&place.lock).ok()?;
        // Another process has it: files answer everything.
        lock.try_lock().ok()?;
        let sealed = check(&mut lock, &place.folder).unwrap_or_else(|reason| {
            dismiss(&Trouble::Damaged(reason.into()));
            None
        });
        mark(&mut lock, OPENING).ok()?;
        let opened = guard(|| open_sled(&place.folder)).or_else(|trouble| {
            dismiss(&trouble);
            match trouble {
                Trouble::Full => Err(trouble),
                Trouble::Damaged(_) => guard(|| open_sled(&place.folder)),
            }
        });
        mark(&mut lock, b' ').ok()?;
        match opened {
            Ok((db, trees)) => Some(Self { sealed, written: AtomicBool::new(false), db, trees, folder: place.folder.clone(), lock }),
            Err(Trouble::Full) => None,
            Err(Trouble::Damaged(reason)) => {
                tracing::debug!(reason, "the index cannot be opened; files answer everything");
                None
            }
        }
    }

    /// Closes sled and says what its files hash to, so that damage is found before sled reads them again.
    fn close(self) {
        let Self { sealed, written, db, trees, folder, lock } = self;
        let written = written.into_inner();
        let closed = guard(move || {
            let flushed = if written { db.flush().map(drop) } else { Ok(()) };
            drop(trees);
            drop(db);
            Ok(flushed?)
        });
        if closed.is_ok() && is_closed(&folder) {
            // Reading leaves the files as they were, and then the old seal is still good.
            let unchanged = sealed.filter(|sealed| !written && stamps(&folder).is_some_and(|stamps| stamps == sealed.stamps));
            let seal = unchanged.map(|sealed| sealed.seal).or_else(|| Some(seal_of(&folder)?.to_string().into_bytes()));
            if let Some(seal) = seal {
                let _ = fs::write(folder.join(SEAL), seal);
            }
        }
        drop(lock);
    }
}

/// Content of the lock file while sled opens. Whoever finds it knows that the process died there.
const OPENING: u8 = b'o';

fn mark(lock: &mut File, mark: u8) -> std::io::Result<()> {
    use std::os::unix::fs::FileExt;
    lock.write_all_at(&[mark], 0)
}

/// What can be known of the index's files without sled. A missing seal is no damage: a killed process leaves none.
fn check(lock: &mut File, folder: &Path) -> Result<Option<Sealed>, &'static str> {
    let mut content = [0];
    if lock.read(&mut content).is_ok_and(|length| length == 1) && content[0] == OPENING {
        return Err("a process died while opening it");
    }
    let path = folder.join(SEAL);
    let Ok(seal) = fs::read(&path) else { return Ok(None) };
    let is_removed = fs::remove_file(&path).is_ok();
    // Half a seal is none: a full disk or a power cut leaves that.
    if std::str::from_utf8(&seal).ok().and_then(|text| text.parse::<Digest>().ok()).is_none() {
        return Ok(None);
    }
    if !is_removed || seal != seal_of(folder).map(|seal| seal.to_string()).unwrap_or_default().into_bytes() {
        return Err("its files are not as they were left");
    }
    Ok(stamps(folder).map(|stamps| Sealed { seal, stamps }))
}

fn open_sled(folder: &Path) -> Result<(sled::Db, [sled::Tree; 3]), Trouble> {
    // No flushing thread: what is lost with a killed process is filled in again.
    let db = sled::Config::new().path(folder).flush_every_ms(None).cache_capacity(64 << 20).open()?;
    let trees = [db.open_tree("folders")?, db.open_tree("manifests")?, db.open_tree("files")?];
    Ok((db, trees))
}

/// Moves the index out of the way. If even that fails it is removed: it holds nothing that files do not.
fn set_aside(folder: &Path) {
    if !folder.exists() {
        return;
    }
    let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis());
    let mut target = folder.as_os_str().to_owned();
    target.push(format!(".bad-{time}"));
    if fs::rename(folder, &target).is_err() {
        let _ = fs::remove_dir_all(folder);
    }
}

/// Runs `work` on sled, turning panics into errors: sled panics on some kinds of damage.
fn guard<T>(work: impl FnOnce() -> Result<T, Trouble>) -> Result<T, Trouble> {
    silence_sled_panics();
    IN_SLED.with(|flag| flag.set(true));
    let result = catch_unwind(AssertUnwindSafe(work));
    IN_SLED.with(|flag| flag.set(false));
    result.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
        let text = text.unwrap_or("no message");
        // sled unwraps some results of writing.
        let full = text.contains("StorageFull") || text.contains("QuotaExceeded");
        Err(if full { Trouble::Full } else { Trouble::Damaged(format!("sled panicked: {}", text.lines().next().unwrap_or_default())) })
    })
}

thread_local! {
    static IN_SLED: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// A damaged cache is no reason to show people a panic; all other panics go to whoever handled them before.
fn silence_sled_panics() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let previous = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let in_sled = IN_SLED.with(std::cell::Cell::get) || std::thread::current().name().is_some_and(|name| name.starts_with("sled-"));
            if !in_sled {
                previous(info);
            }
        }));
    });
}
