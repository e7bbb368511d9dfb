//! Places where tests make a process die or an operating-system call fail.
//!
//! `RLFLOW_FAULT=NAME:COUNT` kills this process, as `kill -9` would, when it reaches the point NAME for the COUNTth time;
//! `RLFLOW_FAULT=NAME:COUNT:full` makes the point answer "no space left on device" instead. Without the variable a point is one load.

use std::{
    io,
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

/// Every fault point, in the order of the write path. Crash tests go through this list.
pub const FAULT_POINTS: &[&str] = &[
    "temp.create",
    "temp.write",
    "temp.written",
    "blob.sync",
    "blob.rename",
    "blob.renamed",
    "blob.folder_synced",
    "manifest.written",
    "manifest.renamed",
    "manifest.folder_synced",
    "action.written",
    "action.renamed",
    "action.folder_synced",
    "snapshot.written",
    "snapshot.renamed",
    "snapshot.folder_synced",
    "snapshot.dropped",
    "lease.locked",
    "lease.written",
    "run.begun",
    "index.write",
    "gc.marked",
    "gc.removed",
];

struct Fault {
    point: String,
    remaining: AtomicU64,
    full: bool,
}

static FAULT: OnceLock<Option<Fault>> = OnceLock::new();

fn parse() -> Option<Fault> {
    let text = std::env::var("RLFLOW_FAULT").ok()?;
    let mut parts = text.split(':');
    let point = parts.next()?.to_owned();
    let remaining = AtomicU64::new(parts.next().and_then(|count| count.parse().ok()).unwrap_or(1));
    Some(Fault { point, remaining, full: parts.next() == Some("full") })
}

/// Marks a place where a test may stop the process.
pub(crate) fn fault_point(point: &'static str) -> io::Result<()> {
    debug_assert!(FAULT_POINTS.contains(&point), "`{point}` is not in FAULT_POINTS");
    match FAULT.get_or_init(parse) {
        None => Ok(()),
        Some(fault) => strike(fault, point),
    }
}

#[cold]
fn strike(fault: &Fault, point: &str) -> io::Result<()> {
    if fault.point != point || fault.remaining.fetch_sub(1, Ordering::SeqCst) != 1 {
        return Ok(());
    }
    if fault.full {
        return Err(io::Error::from(io::ErrorKind::StorageFull));
    }
    // SIGKILL rather than abort: nothing of this process may run any more, and no core is written.
    let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    std::process::abort()
}
