use std::{
    collections::HashSet,
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde_json::Value;

use crate::{
    Result, Store, StoreError,
    durable::{create_folder, sync_folder},
    fault::fault_point,
    sealed::is_absent,
};

/// Append-only record of one run: `runs/<id>/events.jsonl`.
pub struct RunLog {
    id: String,
    folder: PathBuf,
    /// Absent when the store is read-only: then nothing is kept. Locked, so that `gc` sees that the run is not over.
    file: Option<Mutex<File>>,
}

/// Name of the file of events.
const EVENTS: &str = "events.jsonl";

impl RunLog {
    /// The run's name: sortable by time, unique.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Folder of the run, for logs and event files.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Appends one event as a line of JSON. Durable at the next [`RunLog::sync`].
    pub fn append(&self, event: &Value) -> Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        let mut line = event.to_string().into_bytes();
        line.push(b'\n');
        // One write, so that lines of two threads never mix.
        let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
        file.write_all(&line).map_err(StoreError::io("write", self.folder.join(EVENTS)))
    }

    /// Makes what was appended durable.
    pub fn sync(&self) -> Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        let file = file.lock().unwrap_or_else(PoisonError::into_inner);
        file.sync_data().map_err(StoreError::io("sync", self.folder.join(EVENTS)))?;
        sync_folder(&self.folder)?;
        self.folder.parent().map_or(Ok(()), sync_folder)
    }
}

impl Store {
    pub(crate) fn start_run(&self, header: &Value) -> Result<RunLog> {
        let runs = self.layout().runs();
        let mut time = SystemTime::now();
        if self.is_read_only() {
            tracing::warn!("{} is read-only: this run is not recorded", self.folder().display());
            let id = run_id(time);
            return Ok(RunLog { folder: runs.join(&id), id, file: None });
        }
        create_folder(&runs)?;
        // Run names must sort by time even when the clock was set back.
        let names = run_names(&runs)?;
        let newest_time = names.iter().max().and_then(|newest| time_of_run(newest));
        if let Some(newest_time) = newest_time.filter(|&newest_time| newest_time >= time) {
            time = newest_time + Duration::from_micros(1);
        }
        loop {
            let id = run_id(time);
            let folder = runs.join(&id);
            match fs::create_dir(&folder) {
                Ok(()) => {
                    fault_point("run.begun").map_err(StoreError::io("create", &folder))?;
                    let path = folder.join(EVENTS);
                    let file = OpenOptions::new().append(true).create(true).open(&path).map_err(StoreError::io("create", &path))?;
                    // Without locks on this file system the grace period alone protects the run.
                    let _ = file.try_lock_shared();
                    let log = RunLog { id, folder, file: Some(Mutex::new(file)) };
                    log.append(header)?;
                    return Ok(log);
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => time += Duration::from_micros(1),
                Err(error) => return Err(StoreError::io("create folder", folder)(error)),
            }
        }
    }

    /// Whether the process that began a run still has it open.
    pub fn is_run_live(&self, id: &str) -> bool {
        is_live(&self.layout().runs().join(id))
    }

    pub(crate) fn list_runs(&self) -> Result<Vec<PathBuf>> {
        let runs = self.layout().runs();
        let mut names = run_names(&runs)?;
        names.sort_unstable_by(|a, b| b.cmp(a));
        Ok(names.into_iter().map(|name| runs.join(name)).collect())
    }

    /// Folders of runs that nobody needs any more, newest first: beyond the newest [`RUNS_KEPT`] or older than [`RUN_AGE`],
    /// unless they made a result in `needed` or are not over.
    pub(crate) fn spent_runs(&self, needed: &HashSet<&str>, now: SystemTime) -> Result<Vec<PathBuf>> {
        let is_old = |name: &str| {
            let begun = time_of_run(name);
            begun.and_then(|begun| now.duration_since(begun).ok()).is_some_and(|age| age >= RUN_AGE)
        };
        let mut runs = self.list_runs()?.into_iter().enumerate().collect::<Vec<_>>();
        runs.retain(|(at, folder)| {
            let name = folder.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            (*at >= RUNS_KEPT || is_old(name)) && !needed.contains(name) && !is_live(folder)
        });
        Ok(runs.into_iter().map(|(_, folder)| folder).collect())
    }
}

/// Most runs whose records are kept though no kept result came from them.
pub(crate) const RUNS_KEPT: usize = 1000;
/// For how long they are kept.
pub(crate) const RUN_AGE: Duration = Duration::from_secs(90 * 24 * 3600);

/// Whether the process that began a run still has its log open.
fn is_live(folder: &Path) -> bool {
    let Ok(file) = File::open(folder.join(EVENTS)) else { return false };
    matches!(file.try_lock(), Err(TryLockError::WouldBlock))
}

/// Names of the folders under `runs/`, in no order.
fn run_names(runs: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(runs) {
        Ok(entries) => entries,
        Err(error) if is_absent(&error) => return Ok(Vec::new()),
        Err(error) => return Err(StoreError::io("list", runs)(error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(StoreError::io("list", runs))?;
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            names.extend(entry.file_name().into_string());
        }
    }
    Ok(names)
}

/// Length of a run's name: `20260131T235959.123456Z`.
const ID_LENGTH: usize = 23;

fn run_id(time: SystemTime) -> String {
    let micros = time.duration_since(UNIX_EPOCH).map_or(0, |time| time.as_micros());
    let stamp = jiff::Timestamp::from_microsecond(i64::try_from(micros).unwrap_or(0)).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
    stamp.strftime("%Y%m%dT%H%M%S.%6fZ").to_string()
}

fn time_of_run(id: &str) -> Option<SystemTime> {
    let id = id.get(..ID_LENGTH)?;
    let time = jiff::civil::DateTime::strptime("%Y%m%dT%H%M%S.%fZ", id).ok()?;
    let micros = time.to_zoned(jiff::tz::TimeZone::UTC).ok()?.timestamp().as_microsecond();
    Some(UNIX_EPOCH + Duration::from_micros(u64::try_from(micros).ok()?))
}
