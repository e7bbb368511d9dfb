//! Between fork and exec a new process holds every lock that this one holds, so a lock that was just let go may still be taken.
//! Rarely: on a busy machine with many tests at once. So processes do not start while a test looks at who has a lock.

use std::{
    io,
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::{PoisonError, RwLock, RwLockReadGuard},
};

static FORKS: RwLock<()> = RwLock::new(());

/// While this is held no process starts. Whoever holds it must not start one.
#[allow(dead_code)]
pub fn no_forks() -> RwLockReadGuard<'static, ()> {
    FORKS.read().unwrap_or_else(PoisonError::into_inner)
}

/// Starts a process. Returns when it runs its own program.
pub fn spawn(command: &mut Command) -> io::Result<Child> {
    let _alone = FORKS.write().unwrap_or_else(PoisonError::into_inner);
    command.spawn()
}

/// Runs a process to its end.
#[allow(dead_code)]
pub fn output(command: &mut Command) -> io::Result<Output> {
    spawn(command.stdout(Stdio::piped()).stderr(Stdio::piped()))?.wait_with_output()
}

/// Runs a process to its end, without its words.
pub fn quiet_status(command: &mut Command) -> io::Result<ExitStatus> {
    spawn(command.stdout(Stdio::null()).stderr(Stdio::null()))?.wait()
}
