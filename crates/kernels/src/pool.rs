//! A fork–join pool: one caller, a fixed number of helpers, tasks taken from a counter.
//!
//! A step of a small model forks hundreds of times a second, so a helper spins for a moment before it sleeps. Which
//! thread runs which task never matters to a result: tasks write to places of their own.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

/// Turns of waiting before a helper sleeps: some tens of microseconds.
const SPINS: u32 = 2_000;
/// Most threads of a pool.
pub const THREADS_MAX: usize = 256;

/// Pointers that tasks share; each task touches places of its own.
pub(crate) struct Disjoint<T>(pub(crate) T);
// SAFETY: whoever makes one writes only disjoint parts through it.
unsafe impl<T> Sync for Disjoint<T> {}

type Task<'a> = &'a (dyn Fn(usize, usize) + Sync);

/// One parallel region, on the caller's stack; helpers see it only while it lasts.
#[derive(Clone, Copy)]
struct Region {
    task: *const (dyn Fn(usize, usize) + Sync),
    tasks: usize,
}

// SAFETY: `Pool::run` keeps the task alive until no helper uses it, and the task is `Sync`.
unsafe impl Send for Region {}

struct Shared {
    /// Odd while a region is open; helpers wait for a change.
    sequence: AtomicUsize,
    /// The open region; written under the lock, by the caller alone.
    region: Mutex<Option<Region>>,
    wake: Condvar,
    /// Helpers that sleep, or are about to.
    asleep: AtomicUsize,
    next: AtomicUsize,
    /// Helpers inside the region.
    active: AtomicUsize,
    panicked: AtomicBool,
    stop: AtomicBool,
}

/// The pool. The thread that calls [`Pool::run`] is worker 0.
pub struct Pool {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
}

impl Pool {
    /// Makes a pool of `threads` workers, the caller counted; 1 to 256.
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            sequence: AtomicUsize::new(0),
            region: Mutex::new(None),
            wake: Condvar::new(),
            asleep: AtomicUsize::new(0),
            next: AtomicUsize::new(0),
            active: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        });
        let mut pool = Pool { shared, helpers: Vec::new() };
        for worker in 1..threads.clamp(1, THREADS_MAX) {
            let shared = pool.shared.clone();
            let builder = std::thread::Builder::new().name(format!("kernel-{worker}"));
            pool.helpers.push(builder.spawn(move || help(&shared, worker))?);
        }
        Ok(pool)
    }

    /// Returns the number of workers.
    pub fn threads(&self) -> usize {
        self.helpers.len() + 1
    }

    /// Runs `task(index, worker)` for each index below `tasks`, and returns when all are done.
    ///
    /// # Panics
    /// When a task panics: after all workers have left.
    pub fn run(&mut self, tasks: usize, task: Task<'_>) {
        if tasks <= 1 || self.helpers.is_empty() {
            (0..tasks).for_each(|index| task(index, 0));
            return;
        }
        let shared = &*self.shared;
        shared.next.store(0, Ordering::Relaxed);
        // SAFETY: the lifetime is widened only to store the pointer; below, this call outlasts its last use.
        let task: &'static (dyn Fn(usize, usize) + Sync) =
            unsafe { std::mem::transmute::<Task<'_>, Task<'static>>(task) };
        *lock(&shared.region) = Some(Region { task, tasks });
        shared.sequence.fetch_add(1, Ordering::SeqCst);
        if shared.asleep.load(Ordering::SeqCst) > 0 {
            // Under the lock, so that no helper is between its last look and its sleep.
            drop(lock(&shared.region));
            shared.wake.notify_all();
        }
        let own = catch_unwind(AssertUnwindSafe(|| work(shared, task, tasks, 0)));
        if own.is_err() {
            shared.next.store(tasks, Ordering::Relaxed);
        }
        // Closed first: who comes now stays out. Then all who came in leave.
        shared.sequence.fetch_add(1, Ordering::SeqCst);
        let mut turns = 0;
        while shared.active.load(Ordering::SeqCst) > 0 {
            // A helper that the system has put aside needs this core more than we do.
            turns += 1;
            if turns < SPINS { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
        *lock(&shared.region) = None;
        if let Err(panic) = own {
            resume_unwind(panic);
        }
        assert!(!shared.panicked.swap(false, Ordering::SeqCst), "a task of the pool panicked");
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        drop(lock(&self.shared.region));
        self.shared.wake.notify_all();
        for helper in self.helpers.drain(..) {
            let _ = helper.join();
        }
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Pool of {}", self.threads())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn work(shared: &Shared, task: Task<'_>, tasks: usize, worker: usize) {
    loop {
        let index = shared.next.fetch_add(1, Ordering::Relaxed);
        if index >= tasks {
            return;
        }
        task(index, worker);
    }
}

fn help(shared: &Shared, worker: usize) {
    let mut seen = 0;
    loop {
        let sequence = wait(shared, seen);
        if shared.stop.load(Ordering::SeqCst) {
            return;
        }
        seen = sequence;
        shared.active.fetch_add(1, Ordering::SeqCst);
        // The region can't end while `active` counts this helper, if it is still open now.
        if shared.sequence.load(Ordering::SeqCst) == sequence {
            let region = *lock(&shared.region);
            if let Some(Region { task, tasks }) = region {
                // SAFETY: the caller waits for `active` to fall before the task ends.
                let task = unsafe { &*task };
                if catch_unwind(AssertUnwindSafe(|| work(shared, task, tasks, worker))).is_err() {
                    shared.panicked.store(true, Ordering::SeqCst);
                    shared.next.store(tasks, Ordering::Relaxed);
                }
            }
        }
        shared.active.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Returns the number of an open region other than `seen`, or any when the pool stops.
fn wait(shared: &Shared, seen: usize) -> usize {
    let open = || {
        let sequence = shared.sequence.load(Ordering::SeqCst);
        (sequence % 2 == 1 && sequence != seen).then_some(sequence)
    };
    for _ in 0..SPINS {
        if let Some(sequence) = open() {
            return sequence;
        }
        if shared.stop.load(Ordering::Relaxed) {
            return seen;
        }
        std::hint::spin_loop();
    }
    shared.asleep.fetch_add(1, Ordering::SeqCst);
    let mut guard = lock(&shared.region);
    let sequence = loop {
        if let Some(sequence) = open() {
            break sequence;
        }
        if shared.stop.load(Ordering::SeqCst) {
            break seen;
        }
        guard = shared.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
    };
    drop(guard);
    shared.asleep.fetch_sub(1, Ordering::SeqCst);
    sequence
}
