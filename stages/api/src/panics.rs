//! Panics that somebody catches and tells as an error: told once and with their place, and not printed into what else is on the screen.
//!
//! What works for a stage catches with [`catch`]. Once a program has called [`install`], such panics print nothing, unless
//! `RUST_BACKTRACE` asks for backtraces; all others are printed as ever.

use std::{
    any::Any,
    cell::Cell,
    env, fmt,
    io::{self, Write as _},
    panic::{self, AssertUnwindSafe, PanicHookInfo, catch_unwind},
    sync::{Mutex, MutexGuard, Once, PoisonError},
};

/// A panic that was caught. Shown with its place, where that is known.
pub struct Panic {
    payload: Box<dyn Any + Send>,
    location: Option<String>,
}

impl Panic {
    fn of(payload: Box<dyn Any + Send>) -> Self {
        let location = seen().take(said(payload.as_ref()));
        Self { payload, location }
    }

    /// What it said.
    pub fn message(&self) -> &str {
        said(self.payload.as_ref())
    }

    /// Whether it was unwound with a value of this type.
    pub fn is<T: Any>(&self) -> bool {
        self.payload.is::<T>()
    }
}

impl fmt::Display for Panic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.message())?;
        self.location.as_ref().map_or(Ok(()), |location| write!(f, " (at {location})"))
    }
}

impl fmt::Debug for Panic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Panic({self})")
    }
}

fn said(payload: &(dyn Any + Send)) -> &str {
    payload.downcast_ref::<String>().map(String::as_str).or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("no message")
}

thread_local! {
    /// Calls of [`catch`] that this thread is in.
    static CALLS: Cell<u32> = const { Cell::new(0) };
}

static SEEN: Mutex<Seen> = Mutex::new(Seen { calls: 0, untold: Vec::new() });

/// What all threads' calls of [`catch`] share.
struct Seen {
    /// How many there are.
    calls: usize,
    /// Panics that nobody has caught yet.
    untold: Vec<Untold>,
}

struct Untold {
    message: String,
    location: String,
    /// Whether it needs no more be printed: it was, or another of its place was told.
    printed: bool,
}

fn seen() -> MutexGuard<'static, Seen> {
    SEEN.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Seen {
    /// Where the panic that said this was. Others of the same place are the same fault: several threads may meet it at once.
    fn take(&mut self, message: &str) -> Option<String> {
        let location = self.untold.iter().find(|untold| untold.message == message)?.location.clone();
        self.untold.iter_mut().filter(|untold| untold.location == location).for_each(|untold| untold.printed = true);
        Some(location)
    }

    /// Prints what nobody caught.
    fn tell(&mut self) {
        for untold in self.untold.drain(..).filter(|untold| !untold.printed) {
            // There is nobody to tell when stderr is gone.
            let _ = writeln!(io::stderr(), "panicked at {}:\n{}", untold.location, untold.message);
        }
    }
}

/// Runs `work`: that it panics is an error like others, which the caller tells.
///
/// # Errors
/// The panic.
pub fn catch<T>(work: impl FnOnce() -> T) -> Result<T, Panic> {
    struct Call;
    impl Drop for Call {
        fn drop(&mut self) {
            CALLS.set(CALLS.get() - 1);
            let mut seen = seen();
            seen.calls -= 1;
            if seen.calls == 0 {
                seen.tell();
            }
        }
    }
    CALLS.set(CALLS.get() + 1);
    seen().calls += 1;
    let _call = Call;
    catch_unwind(AssertUnwindSafe(work)).map_err(Panic::of)
}

/// Has panics that are caught with [`catch`] print nothing, from now on and in the whole program. `is_in_pool` says whether the calling
/// thread works for others: what it panics with goes on where it is waited for.
pub fn install(is_in_pool: fn() -> bool) {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let previous = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !note(info, is_in_pool) {
                previous(info);
            }
        }));
    });
}

/// Notes a panic that will be caught. Whether that is all.
fn note(info: &PanicHookInfo<'_>, is_in_pool: fn() -> bool) -> bool {
    let mut seen = seen();
    if CALLS.get() == 0 && (seen.calls == 0 || !is_in_pool()) {
        return false;
    }
    let message = said(info.payload()).to_owned();
    // The program ends here: nobody catches these, nor what came before them.
    if message.starts_with("panic in a function that cannot unwind") || message.starts_with("panic in a destructor") {
        seen.tell();
        return false;
    }
    let printed = env::var_os("RUST_BACKTRACE").is_some_and(|value| value != "0");
    let location = info.location().map_or_else(|| "an unknown place".to_owned(), ToString::to_string);
    seen.untold.push(Untold { message, location, printed });
    !printed
}

#[cfg(test)]
mod tests {
    use std::{panic::resume_unwind, thread};

    use super::*;

    fn is_untold(message: &str) -> bool {
        seen().untold.iter().any(|untold| untold.message == message)
    }

    /// One test, since hooks are the process's.
    #[test]
    fn a_panic_is_told_with_its_place_by_who_caught_it() {
        install(|| thread::current().name() == Some("pool"));
        let here = |panic: &Panic, message: &str| panic.to_string().starts_with(&format!("{message} (at {}:", file!()));
        let panic = catch::<()>(|| panic!("item {} is bad", 3)).unwrap_err();
        assert!(here(&panic, "item 3 is bad") && panic.message() == "item 3 is bad", "{panic}");
        assert!(!is_untold("item 3 is bad"));

        // Two threads of a pool meet the same fault; what one of them died of goes on where it is waited for.
        let work = |item: u32| {
            let thread = thread::Builder::new().name("pool".into());
            thread.spawn(move || -> u32 { panic!("item {item} of the pool is bad") }).unwrap().join().unwrap_err()
        };
        let panic = catch::<()>(|| resume_unwind([work(1), work(2)].into_iter().next_back().unwrap())).unwrap_err();
        assert!(here(&panic, "item 2 of the pool is bad"), "{panic}");
        assert!(!is_untold("item 1 of the pool is bad") && !is_untold("item 2 of the pool is bad"));

        // What unwinds without a panic has no place; what nobody catches so is printed, and not noted.
        struct Stopped;
        let stopped = catch::<()>(|| resume_unwind(Box::new(Stopped))).unwrap_err();
        assert!(stopped.is::<Stopped>() && stopped.to_string() == "no message");
        assert!(catch_unwind(|| -> u32 { panic!("nobody's") }).is_err());
        assert!(!is_untold("nobody's"));
        assert_eq!(catch(|| 3).unwrap(), 3);
    }
}
