//! Work that somebody waits for only while it makes progress. It runs on a thread of its own and owns all that it uses, so
//! that whoever stops waiting frees nothing.
//!
//! # Invariants
//! - Work that was given up goes on until it ends, and what it owns lives as long.
//! - Threads are started as they are needed, lent again, and end when nobody has needed them for [`IDLE`].

use std::any::Any;
use std::collections::VecDeque;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

/// How long a thread waits for more work.
const IDLE: Duration = Duration::from_secs(10);

/// How often, in the time that work may take without progress, it is looked at.
const LOOKS: u32 = 8;

/// How far some work has come: told by the work, read by who waits.
#[derive(Debug, Default)]
pub(crate) struct Steps {
    taken: AtomicU64,
    /// A number that says where the work is: whatever the two agree on.
    place: AtomicU64,
    abandoned: AtomicBool,
}

impl Steps {
    /// The work goes on, at a place; whether anybody waits for it.
    pub(crate) fn take(&self, place: u64) -> bool {
        self.place.store(place, Ordering::Relaxed);
        self.taken.fetch_add(1, Ordering::Relaxed);
        self.is_wanted()
    }

    /// Nobody waits any more: what has not begun need not begin.
    pub(crate) fn abandon(&self) {
        self.abandoned.store(true, Ordering::Relaxed);
    }

    /// Whether anybody waits.
    pub(crate) fn is_wanted(&self) -> bool {
        !self.abandoned.load(Ordering::Relaxed)
    }

    /// Where the work was last.
    pub(crate) fn place(&self) -> u64 {
        self.place.load(Ordering::Relaxed)
    }
}

/// Threads for work that is watched.
#[derive(Default)]
pub(crate) struct Watched {
    shared: Arc<Shared>,
}

type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    work: Condvar,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    idle: usize,
    closed: bool,
}

/// Where work leaves what became of it.
struct Letterbox<T> {
    outcome: Mutex<Option<Result<T, Box<dyn Any + Send>>>>,
    arrived: Condvar,
}

impl Watched {
    /// Does some work on another thread and waits for it, while `steps` shows progress at least once in `patience`; `None`
    /// where it did not. Where the system gives no thread, the caller's does it, and waits as long as it takes. A panic of the
    /// work is the caller's.
    pub(crate) fn run<T: Send + 'static>(
        &self,
        patience: Duration,
        steps: &Steps,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Option<T> {
        let letterbox = Arc::new(Letterbox { outcome: Mutex::new(None), arrived: Condvar::new() });
        let job = {
            let letterbox = Arc::clone(&letterbox);
            move || {
                let outcome = catch_unwind(AssertUnwindSafe(work));
                *letterbox.outcome.lock() = Some(outcome);
                letterbox.arrived.notify_one();
            }
        };
        if let Err(job) = self.hand_over(Box::new(job)) {
            job();
        }
        let outcome = letterbox.wait(patience, steps)?;
        Some(outcome.unwrap_or_else(|panic| resume_unwind(panic)))
    }

    /// Hands work to a thread that waits for some, or to a new one; gives it back where there is neither.
    fn hand_over(&self, job: Job) -> Result<(), Job> {
        let mut state = self.shared.state.lock();
        state.jobs.push_back(job);
        if state.idle >= state.jobs.len() {
            drop(state);
            self.shared.work.notify_one();
            return Ok(());
        }
        let shared = Arc::clone(&self.shared);
        match thread::Builder::new().name("alight-read".into()).spawn(move || shared.work()) {
            Ok(_) => Ok(()),
            Err(error) => {
                tracing::warn!(%error, "no thread for a read; it has no deadline");
                // Nobody has taken it: the lock was held since it was put there.
                state.jobs.pop_back().map_or(Ok(()), Err)
            }
        }
    }
}

impl Shared {
    /// One thread's life.
    fn work(&self) {
        let mut state = self.state.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                job();
                state = self.state.lock();
                continue;
            }
            if state.closed {
                return;
            }
            state.idle += 1;
            let idle = self.work.wait_for(&mut state, IDLE).timed_out();
            state.idle -= 1;
            if idle && state.jobs.is_empty() {
                return;
            }
        }
    }
}

impl<T> Letterbox<T> {
    fn wait(&self, patience: Duration, steps: &Steps) -> Option<Result<T, Box<dyn Any + Send>>> {
        let taken = || steps.taken.load(Ordering::Relaxed);
        let (mut seen, mut since) = (taken(), Instant::now());
        let look = (patience / LOOKS).max(Duration::from_millis(1));
        let mut outcome = self.outcome.lock();
        loop {
            if let Some(outcome) = outcome.take() {
                return Some(outcome);
            }
            if self.arrived.wait_for(&mut outcome, look).timed_out() && outcome.is_none() {
                let now = taken();
                if now != seen {
                    (seen, since) = (now, Instant::now());
                } else if since.elapsed() >= patience {
                    steps.abandon();
                    return None;
                }
            }
        }
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.shared.state.lock().closed = true;
        self.shared.work.notify_all();
    }
}

impl fmt::Debug for Watched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.shared.state.lock();
        write!(f, "Watched({} waiting, {} idle threads)", state.jobs.len(), state.idle)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::fixtures::Gate;

    const PATIENCE: Duration = Duration::from_millis(80);

    #[test]
    fn work_is_waited_for_while_it_goes_on_and_no_longer() {
        let watched = Watched::default();
        let steps = Arc::new(Steps::default());
        let walking = Arc::clone(&steps);
        let slow = watched.run(PATIENCE, &steps, move || {
            // Longer than the patience in all.
            for place in 0..15 {
                thread::sleep(PATIENCE / 8);
                assert!(walking.take(place));
            }
            7
        });
        assert_eq!((slow, steps.place()), (Some(7), 14));
        let (gate, owned) = (Gate::default(), Arc::new(()));
        gate.close();
        let steps = Arc::new(Steps::default());
        let (stuck, walking, share) = (gate.clone(), Arc::clone(&steps), Arc::clone(&owned));
        let began = Instant::now();
        let outcome = watched.run(PATIENCE, &steps, move || {
            walking.take(3);
            stuck.pass();
            assert!(!walking.take(4), "nobody waits any more");
            drop(share);
        });
        assert!(outcome.is_none() && began.elapsed() >= PATIENCE && steps.place() == 3);
        assert_eq!(Arc::strong_count(&owned), 2, "the work has what it uses");
        gate.open();
        while Arc::strong_count(&owned) > 1 {
            thread::yield_now();
        }
    }

    #[test]
    fn threads_are_lent_again_and_a_panic_is_the_callers() {
        let watched = Watched::default();
        let steps = Steps::default();
        let id = || watched.run(Duration::from_secs(60), &steps, || thread::current().id()).unwrap();
        let first = id();
        while watched.shared.state.lock().idle == 0 {
            thread::yield_now();
        }
        assert_eq!(id(), first);
        let panicked =
            catch_unwind(AssertUnwindSafe(|| watched.run(Duration::from_secs(60), &steps, || panic!("of the work"))));
        assert_eq!(panicked.unwrap_err().downcast_ref::<&str>(), Some(&"of the work"));
        let together: Vec<u64> = thread::scope(|scope| {
            let watched = &watched;
            let run = move |n| watched.run(Duration::from_secs(60), &Steps::default(), move || n).unwrap();
            let threads: Vec<_> = (0..20u64).map(|n| scope.spawn(move || run(n))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(together, (0..20).collect::<Vec<_>>());
    }
}
