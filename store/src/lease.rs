use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::mpsc,
    thread::JoinHandle,
    time::{Duration, SystemTime},
};

use rustix::fs::{Timespec, Timestamps, UTIME_NOW, futimens};
use serde::{Deserialize, Serialize};

use crate::{
    Digest, Result, Store, StoreError,
    durable::{create_folder, write_lightly},
    fault::fault_point,
    sealed::read_record,
};

/// Who works on an action.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LeaseHolder {
    /// Host name.
    pub host: String,
    /// Process.
    pub pid: u32,
    /// Run.
    pub run_id: String,
    /// Stage name.
    pub stage: String,
    /// Seconds since the Unix epoch.
    pub since: f64,
}

/// Outcome of asking for a lease.
pub enum LeaseOutcome {
    /// It is ours until dropped.
    Acquired(Lease),
    /// Another living process has it.
    Held(LeaseHolder),
}

/// How often a holder's file is renewed.
const HEARTBEAT: Duration = Duration::from_secs(5);
/// A holder on another host that was not renewed for so long is dead.
const EXPIRY: Duration = Duration::from_secs(30);

/// The right to work on one action, until dropped. Renewed in the background; taken over when its process is gone.
///
/// A lock held by the process says on one host who lives; where the file system does not carry locks between hosts, the
/// holder file's time does.
pub struct Lease {
    lock_path: PathBuf,
    holder_path: PathBuf,
    /// Held for as long as the lease; the kernel lets go of it when the process dies.
    lock: Option<File>,
    heart: Option<(mpsc::Sender<()>, JoinHandle<()>)>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.heart.take() {
            drop(stop);
            let _ = thread.join();
        }
        // Removed while the lock is held; whoever opened the file before sees that it is no longer the one at its path.
        let _ = fs::remove_file(&self.holder_path);
        let _ = fs::remove_file(&self.lock_path);
        drop(self.lock.take());
    }
}

impl Store {
    fn lease_paths(&self, key: Digest) -> (PathBuf, PathBuf) {
        let folder = self.layout().leases();
        (folder.join(format!("{key}.lock")), folder.join(format!("{key}.json")))
    }

    pub(crate) fn take_lease(&self, key: Digest, holder: &LeaseHolder) -> Result<LeaseOutcome> {
        let (lock_path, holder_path) = self.lease_paths(key);
        create_folder(&self.layout().leases())?;
        // Someone who only looks holds the lock for a moment; so a refusal without a living holder is asked again.
        for attempt in 0_u32.. {
            match lock(&lock_path)? {
                Locked::Ours { file, locks_work } => {
                    fault_point("lease.locked").map_err(StoreError::io("write", &holder_path))?;
                    if let Some(other) = self.living_elsewhere(&holder_path, &lock_path, locks_work)? {
                        return Ok(LeaseOutcome::Held(other));
                    }
                    let content = serde_json::to_vec(holder).map_err(|error| format_error(&holder_path, &error))?;
                    write_lightly(self.layout(), &holder_path, &content)?;
                    fault_point("lease.written").map_err(StoreError::io("write", &holder_path))?;
                    let heart = Some(start_heart(&holder_path, HEARTBEAT)?);
                    return Ok(LeaseOutcome::Acquired(Lease { lock_path, holder_path, lock: Some(file), heart }));
                }
                Locked::Others => match read_holder(&holder_path)? {
                    Some(other) if attempt >= 3 => return Ok(LeaseOutcome::Held(other)),
                    None if attempt >= 50 => return Ok(LeaseOutcome::Held(unknown_holder())),
                    _ => std::thread::sleep(Duration::from_millis(5)),
                },
                Locked::Replaced => {}
            }
        }
        unreachable!("the loop ends by returning")
    }

    pub(crate) fn find_lease_holder(&self, key: Digest) -> Result<Option<LeaseHolder>> {
        let (lock_path, holder_path) = self.lease_paths(key);
        // Whoever has just locked it writes its name next: that is waited for.
        for _ in 0..20 {
            let file = match File::open(&lock_path) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(StoreError::io("open", lock_path)(error)),
            };
            match file.try_lock_shared() {
                // Nobody on this host.
                Ok(()) => return self.living_elsewhere(&holder_path, &lock_path, true),
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(_)) => return self.living_elsewhere(&holder_path, &lock_path, false),
            }
            if let Some(holder) = read_holder(&holder_path)? {
                return Ok(Some(holder));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(Some(unknown_holder()))
    }

    /// Removes the files of a lease whose owner was killed. False if somebody has it.
    pub(crate) fn remove_dead_lease(&self, lock_path: &Path) -> Result<bool> {
        if self.is_on_network() {
            return Ok(false);
        }
        let Locked::Ours { file, locks_work: true } = lock(lock_path)? else { return Ok(false) };
        let _ = fs::remove_file(lock_path.with_extension("json"));
        fs::remove_file(lock_path).map_err(StoreError::io("remove", lock_path))?;
        drop(file);
        Ok(true)
    }

    /// The holder, if it lives though the lock is free: on another host of a file system that keeps locks to itself, or
    /// anywhere if the file system has no locks.
    fn living_elsewhere(&self, holder_path: &Path, lock_path: &Path, locks_work: bool) -> Result<Option<LeaseHolder>> {
        if locks_work && !self.is_on_network() {
            return Ok(None);
        }
        let Some(holder) = read_holder(holder_path)? else { return Ok(None) };
        if holder.host == host_name() && (locks_work || !is_alive(holder.pid)) {
            return Ok(None);
        }
        // Both times come from the file server, so that clocks need not agree. Ours must do where it cannot be asked.
        let now = File::open(lock_path).and_then(|file| {
            touch(&file)?;
            file.metadata()?.modified()
        });
        let now = now.unwrap_or_else(|_| SystemTime::now());
        let beat = fs::metadata(holder_path).and_then(|metadata| metadata.modified());
        let alive = beat.is_ok_and(|beat| now.duration_since(beat).unwrap_or_default() < EXPIRY);
        Ok(alive.then_some(holder))
    }
}

enum Locked {
    Ours {
        file: File,
        /// Whether the file system has locks at all.
        locks_work: bool,
    },
    Others,
    /// Its last owner removed the file between our opening and locking it.
    Replaced,
}

fn lock(path: &Path) -> Result<Locked> {
    let options = || OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
    let file = options().map_err(StoreError::io("create", path))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(Locked::Others),
        // Without locks the holder file alone decides.
        Err(TryLockError::Error(error)) if is_unsupported(&error) => return Ok(Locked::Ours { file, locks_work: false }),
        Err(TryLockError::Error(error)) => return Err(StoreError::io("lock", path)(error)),
    }
    let ours = file.metadata().map_err(StoreError::io("examine", path))?;
    match fs::metadata(path) {
        Ok(current) if (current.dev(), current.ino()) == (ours.dev(), ours.ino()) => Ok(Locked::Ours { file, locks_work: true }),
        _ => Ok(Locked::Replaced),
    }
}

pub(crate) fn is_unsupported(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::Unsupported || error.raw_os_error() == Some(rustix::io::Errno::NOLCK.raw_os_error())
}

fn start_heart(path: &Path, every: Duration) -> Result<(mpsc::Sender<()>, JoinHandle<()>)> {
    let file = File::open(path).map_err(StoreError::io("open", path))?;
    // Some file systems let the writer's clock say when a file was written.
    let _ = touch(&file);
    let (stop, stopped) = mpsc::channel::<()>();
    let beat = move || {
        while stopped.recv_timeout(every) == Err(mpsc::RecvTimeoutError::Timeout) {
            let _ = touch(&file);
        }
    };
    let thread = std::thread::Builder::new().name("rlflow-lease".into()).spawn(beat).map_err(StoreError::io("renew", path))?;
    Ok((stop, thread))
}

/// Sets a file's times to now by the clock of whoever keeps the file, which may be another machine's. Both of them: then who may write
/// to the file may do so, and not only its owner.
fn touch(file: &File) -> io::Result<()> {
    let now = || Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
    futimens(file, &Timestamps { last_access: now(), last_modification: now() })?;
    #[cfg(test)]
    tests::set_by_the_server(file)?;
    Ok(())
}

/// What the holder file says. `None` if absent or half-written.
fn read_holder(path: &Path) -> Result<Option<LeaseHolder>> {
    Ok(read_record(path)?.and_then(|bytes| serde_json::from_slice(&bytes).ok()))
}

pub(crate) fn is_alive(pid: u32) -> bool {
    let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
    // Not being allowed to signal it proves that it is there.
    pid.is_some_and(|pid| rustix::process::test_kill_process(pid) != Err(rustix::io::Errno::SRCH))
}

/// Stands for a process that has locked the lease but not yet said who it is.
fn unknown_holder() -> LeaseHolder {
    LeaseHolder { host: host_name(), pid: 0, run_id: String::new(), stage: String::new(), since: 0.0 }
}

pub(crate) fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

fn format_error(path: &Path, error: &serde_json::Error) -> StoreError {
    StoreError::Format { path: path.to_owned(), message: error.to_string() }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicI64, Ordering},
    };

    use super::*;

    /// Seconds by which the clock of the server that keeps the files is ahead of this machine's.
    static AHEAD: AtomicI64 = AtomicI64::new(0);

    /// Turns a file's time, which this machine has just set, into what the server would have set.
    pub(super) fn set_by_the_server(file: &File) -> io::Result<()> {
        file.set_modified(shifted(file.metadata()?.modified()?))
    }

    fn shifted(time: SystemTime) -> SystemTime {
        let ahead = AHEAD.load(Ordering::Relaxed);
        let by = Duration::from_secs(ahead.unsigned_abs());
        if ahead < 0 { time - by } else { time + by }
    }

    /// For a test that sets [`AHEAD`], alone.
    fn alone() -> MutexGuard<'static, ()> {
        static ALONE: Mutex<()> = Mutex::new(());
        ALONE.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Seven minutes, this way and that way.
    const CLOCKS: [i64; 3] = [0, 420, -420];
    /// Above all numbers that Linux gives to processes.
    const NOBODY: u32 = (1 << 22) + 1;

    /// Where locks say nothing, as between hosts, the holder file does: whose it is, and when it was renewed.
    #[test]
    fn without_locks_a_heartbeat_tells_who_lives() {
        let _alone = alone();
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        let (lock_path, holder_path) = store.lease_paths(Digest::of(b"key"));
        create_folder(&store.layout().leases()).unwrap();
        File::create(&lock_path).unwrap();
        let is_held = || store.living_elsewhere(&holder_path, &lock_path, false).unwrap().is_some();
        let found = |host: &str, pid: u32, renewed: Duration| {
            let holder = LeaseHolder { host: host.to_owned(), pid, ..unknown_holder() };
            fs::write(&holder_path, serde_json::to_vec(&holder).unwrap()).unwrap();
            File::open(&holder_path).unwrap().set_modified(shifted(SystemTime::now()) - renewed).unwrap();
            is_held()
        };
        for ahead in CLOCKS {
            AHEAD.store(ahead, Ordering::Relaxed);
            assert!(found("elsewhere", NOBODY, Duration::ZERO), "{ahead}");
            assert!(found(&host_name(), std::process::id(), Duration::ZERO), "{ahead}");
            assert!(!found(&host_name(), NOBODY, Duration::ZERO), "{ahead}");
            assert!(!found("elsewhere", NOBODY, 2 * EXPIRY), "{ahead}");
            let (stop, heart) = start_heart(&holder_path, Duration::from_secs(3600)).unwrap();
            assert!(is_held(), "{ahead}: a heart did not beat when it began");
            drop(stop);
            heart.join().unwrap();
            assert!(!found("elsewhere", NOBODY, 2 * EXPIRY), "{ahead}");
            let (stop, heart) = start_heart(&holder_path, Duration::from_millis(1)).unwrap();
            File::open(&holder_path).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
            while !is_held() {
                assert!(!heart.is_finished(), "{ahead}: no beat was noticed");
                std::thread::yield_now();
            }
            drop(stop);
            heart.join().unwrap();
        }
        AHEAD.store(0, Ordering::Relaxed);
    }

    /// Two hosts on one store that do not see each other's locks; their clocks and the server's are minutes apart.
    #[test]
    fn hosts_with_other_clocks_wait_for_the_living_and_take_over_from_the_dead() {
        let _alone = alone();
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap().into_networked();
        let key = Digest::of(b"key");
        for ahead in CLOCKS {
            AHEAD.store(ahead, Ordering::Relaxed);
            let holder = |host: &str, since: f64| LeaseHolder { host: host.to_owned(), pid: NOBODY, since, ..unknown_holder() };
            // What a host thinks that the time is decides nothing.
            let (first, second) = (holder("first", 1e9), holder("second", 1e10));
            let LeaseOutcome::Acquired(mut owned) = store.take_lease(key, &first).unwrap() else { panic!("{ahead}: nobody has it") };
            fs::remove_file(&owned.lock_path).unwrap();
            let waits = || matches!(store.take_lease(key, &second).unwrap(), LeaseOutcome::Held(other) if other == first);
            assert!(waits(), "{ahead}: a living owner was taken for dead");
            assert_eq!(store.find_lease_holder(key).unwrap().as_ref(), Some(&first));
            // Its host dies: no beat any more, and nothing is tidied up.
            let (stop, heart) = owned.heart.take().unwrap();
            drop(stop);
            heart.join().unwrap();
            std::mem::forget(owned);
            AHEAD.store(ahead + 15, Ordering::Relaxed);
            assert!(waits(), "{ahead}: beats may be late");
            AHEAD.store(ahead + 31, Ordering::Relaxed);
            assert_eq!(store.find_lease_holder(key).unwrap(), None);
            let LeaseOutcome::Acquired(taken) = store.take_lease(key, &second).unwrap() else { panic!("{ahead}: the dead keep it") };
            drop(taken);
            assert_eq!(store.find_lease_holder(key).unwrap(), None);
        }
        AHEAD.store(0, Ordering::Relaxed);
    }
}
