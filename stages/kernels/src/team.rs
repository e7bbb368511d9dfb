//! Threads that go through many short phases together.
//!
//! A phase of a decoding step takes some microseconds, less than it takes to wake a thread. So the threads of a team stay awake: one leads
//! and opens phases, the others take tasks of whatever phase is open. The leader waits for tasks that were taken and never for threads:
//! where all others are busy elsewhere, it does everything itself. Who finds nothing to do for a while leaves, and is called again; and
//! now and then a helper does what others have for the pool, so that they do not wait for the end of a long rollout.
//!
//! A task must not start parallel work of the pool: what waits there may take up other work, and the phase would wait for that.

use std::{
    any::Any,
    cell::{Cell, UnsafeCell},
    hint::spin_loop,
    marker::PhantomData,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

/// Looks for a task before a thread lets others run: some microseconds.
const LOOKS: usize = 1 << 9;
/// A helper that finds nothing to do for so long leaves. Between the phases of a step there is less.
const PATIENCE: Duration = Duration::from_millis(1);
/// After so long a helper looks for other work of the pool.
const SLICE: Duration = Duration::from_millis(5);

/// Who opens the phases. There is one, so that phases come one after the other.
pub struct Team<'a, 'scope> {
    phases: &'scope Phases,
    scope: &'a rayon::Scope<'scope>,
    /// It stays on its thread.
    thread: PhantomData<*const ()>,
}

/// What a leader and its helpers share.
struct Phases {
    /// Of the newest phase: its number (32 bits), its tasks (16), and those that were taken (16).
    phase: AtomicU64,
    /// Its tasks that are done.
    done: AtomicUsize,
    /// What a task is. Only the leader changes it, and only while no task is taken that is not done.
    work: UnsafeCell<Option<Work>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    is_over: AtomicBool,
    /// Whether helpers are to be called: nobody was yet, or somebody left.
    has_left: AtomicBool,
}

/// A closure whose lifetime ends with its phase.
type Work = *const (dyn Fn(usize) + Sync);

// SAFETY: `work` is read by those who have taken a task of the phase that it was set for, and not changed before they are done.
unsafe impl Sync for Phases {}

/// Where items begin.
struct Start<T>(*mut T);

// SAFETY: tasks get items of their own, which may be sent to them.
unsafe impl<T: Send> Sync for Start<T> {}

impl<T> Start<T> {
    fn get(&self) -> *mut T {
        self.0
    }
}

thread_local! {
    /// Whether this thread leads a team or helps one: it helps no other meanwhile.
    static IS_TAKEN: Cell<bool> = const { Cell::new(false) };
}

impl Team<'_, '_> {
    /// Runs `lead` with all threads of the pool that are free as helpers.
    pub fn with<R>(lead: impl FnOnce(&mut Team<'_, '_>) -> R) -> R {
        let phases = Phases {
            phase: AtomicU64::new(0),
            done: AtomicUsize::new(0),
            work: UnsafeCell::new(None),
            panic: Mutex::new(None),
            is_over: AtomicBool::new(false),
            has_left: AtomicBool::new(true),
        };
        rayon::in_place_scope(|scope| {
            // Helpers end however the leader does.
            let _end = End { is_over: &phases.is_over, was_taken: IS_TAKEN.replace(true) };
            lead(&mut Team { phases: &phases, scope, thread: PhantomData })
        })
    }

    /// Runs `work` with every number below `tasks`, on all threads; a panic of one is the caller's.
    pub fn each(&mut self, tasks: usize, work: impl Fn(usize) + Sync) {
        for first in (0..tasks).step_by(usize::from(u16::MAX)) {
            self.phase((tasks - first).min(usize::from(u16::MAX)), &|task| work(first + task));
        }
    }

    /// The same with every item.
    pub fn each_item<T: Send>(&mut self, items: &mut [T], work: impl Fn(&mut T) + Sync) {
        let (start, len) = (Start(items.as_mut_ptr()), items.len());
        self.each(len, |item| {
            // SAFETY: the number is below the length, and each is asked for once.
            work(unsafe { &mut *start.get().add(item) });
        });
    }

    fn phase<'a>(&mut self, tasks: usize, work: &'a (dyn Fn(usize) + Sync + 'a)) {
        if tasks == 1 {
            return work(0);
        }
        let phases = self.phases;
        if phases.has_left.swap(false, Ordering::Relaxed) {
            self.call();
        }
        // SAFETY: the closure outlives the phase, which this function does not leave before all of its tasks are done; the lifetime is
        // left out of the type because it has no name there.
        let work: Work = unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync + 'a), Work>(work) };
        // SAFETY: there is one leader, the last phase's tasks are done, and no task is open, so nobody reads this.
        unsafe { *phases.work.get() = Some(work) };
        phases.done.store(0, Ordering::Relaxed);
        let number = (phases.phase.load(Ordering::Relaxed) >> 32) + 1;
        phases.phase.store(number << 32 | (tasks as u64) << 16, Ordering::Release);
        while phases.take() {}
        let mut looks = 0;
        while phases.done.load(Ordering::Acquire) < tasks {
            wait(&mut looks);
        }
        if let Some(panic) = phases.panic.lock().unwrap_or_else(PoisonError::into_inner).take() {
            resume_unwind(panic);
        }
    }

    /// Calls every thread of the pool, each by itself: nobody else can take its call.
    fn call(&self) {
        let phases = self.phases;
        self.scope.spawn_broadcast(move |_, _| {
            // The leader, while it waits for something else, and who works for a team already.
            if !IS_TAKEN.replace(true) {
                phases.help();
                IS_TAKEN.set(false);
            }
        });
    }
}

impl Phases {
    /// Takes a task and does it, if one is open.
    fn take(&self) -> bool {
        let mut phase = self.phase.load(Ordering::Acquire);
        loop {
            let (tasks, taken) = (phase >> 16 & 0xffff, phase & 0xffff);
            if taken >= tasks {
                return false;
            }
            match self.phase.compare_exchange_weak(phase, phase + 1, Ordering::Acquire, Ordering::Acquire) {
                Ok(_) => {
                    // SAFETY: a task of this phase is taken and not done, so that the leader leaves the closure as it is.
                    let work = unsafe { (*self.work.get()).map(|work| &*work) };
                    if let Some(work) = work
                        && let Err(panic) = catch_unwind(AssertUnwindSafe(|| work(taken as usize)))
                    {
                        self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
                    }
                    self.done.fetch_add(1, Ordering::Release);
                    return true;
                }
                Err(now) => phase = now,
            }
        }
    }

    fn help(&self) {
        let (mut looks, mut idle_since, mut slice) = (0, None, Instant::now());
        while !self.is_over.load(Ordering::Relaxed) {
            if self.take() {
                (looks, idle_since) = (0, None);
                continue;
            }
            if looks == 0 && slice.elapsed() > SLICE {
                rayon::yield_now();
                slice = Instant::now();
            }
            if looks == LOOKS && idle_since.get_or_insert_with(Instant::now).elapsed() > PATIENCE {
                self.has_left.store(true, Ordering::Relaxed);
                return;
            }
            wait(&mut looks);
        }
    }
}

/// Waits a moment: awake at first, then giving way to other threads.
fn wait(looks: &mut usize) {
    if *looks < LOOKS {
        *looks += 1;
        spin_loop();
    } else {
        std::thread::yield_now();
    }
}

/// Tells the helpers that it is over.
struct End<'a> {
    is_over: &'a AtomicBool,
    was_taken: bool,
}

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        IS_TAKEN.set(self.was_taken);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_of_every_phase_runs_once() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(4).build().unwrap();
        let counts: Vec<AtomicUsize> = (0..100).map(|_| AtomicUsize::new(0)).collect();
        pool.install(|| {
            Team::with(|team| {
                for phase in 0..20_000 {
                    let tasks = phase % 101;
                    team.each(tasks, |task| _ = counts[task].fetch_add(1, Ordering::Relaxed));
                    // What a phase did can be seen after it.
                    let expected = |task: usize| (0..=phase).filter(|phase| phase % 101 > task).count();
                    if phase % 997 == 0 {
                        (0..100).for_each(|task| assert_eq!(counts[task].load(Ordering::Relaxed), expected(task)));
                    }
                }
            });
        });
    }

    #[test]
    fn more_tasks_than_a_phase_can_have_are_several_phases() {
        let (sum, many) = (AtomicUsize::new(0), 200_000);
        Team::with(|team| team.each(many, |task| _ = sum.fetch_add(task, Ordering::Relaxed)));
        assert_eq!(sum.into_inner(), many * (many - 1) / 2);
    }

    #[test]
    fn a_team_works_where_all_other_threads_are_busy() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        let sum = AtomicUsize::new(0);
        let add = |team: &mut Team<'_, '_>| (0..100).for_each(|_| team.each(10, |task| _ = sum.fetch_add(task, Ordering::Relaxed)));
        // Two leaders on two threads, parallel work of the pool within one of them, and a pause in which helpers leave.
        pool.join(
            || Team::with(add),
            || {
                Team::with(|team| {
                    add(team);
                    rayon::join(|| sum.fetch_add(1, Ordering::Relaxed), || sum.fetch_add(2, Ordering::Relaxed));
                    std::thread::sleep(20 * PATIENCE);
                    add(team);
                });
            },
        );
        assert_eq!(sum.into_inner(), 3 * 100 * 45 + 3);
    }

    #[test]
    fn a_panic_reaches_the_caller_after_all_tasks() {
        let ran = AtomicUsize::new(0);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            Team::with(|team| {
                team.each(50, |task| {
                    ran.fetch_add(1, Ordering::Relaxed);
                    assert!(task != 7, "task seven");
                });
            });
        }));
        assert!(outcome.unwrap_err().downcast_ref::<&str>().is_some_and(|text| text.contains("seven")));
        assert_eq!(ran.into_inner(), 50);
    }
}
