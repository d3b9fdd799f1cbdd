//! Work that somebody waits for only while it makes progress. It runs on a thread of its own and owns all that it uses, so
//! that whoever stops waiting frees nothing.
//!
//! # Invariants
//! - Work that was given up goes on until it ends, and what it owns lives as long. What it comes to is dropped by its own thread.
//! - Threads are started as they are needed, lent again, and end when nobody has needed them for [`IDLE`].
//! - Whoever waits takes no lock that the work holds while it waits for the disk.

use std::any::Any;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

/// How long a thread waits for more work.
const IDLE: Duration = Duration::from_secs(10);

/// How often, in the time that work may take without progress, it is looked at.
const LOOKS: u32 = 8;

/// How far some work has come: told by the work, read by who waits.
#[derive(Debug, Default)]
pub(crate) struct Steps {
    taken: AtomicU64,
    /// Those of all work on the same threads.
    of_all: Arc<AtomicU64>,
    /// A number that says where the work is: whatever the two agree on.
    place: AtomicU64,
    abandoned: AtomicBool,
}

impl Steps {
    /// The work goes on, at a place; whether anybody waits for it.
    pub(crate) fn take(&self, place: u64) -> bool {
        self.place.store(place, Ordering::Relaxed);
        self.go_on()
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

    /// Patience with this work.
    pub(crate) fn patience(&self, lasts: Duration) -> Patience<'_> {
        Patience::new(&self.taken, lasts)
    }

    /// Makes what this thread does this work, while the answer lives.
    pub(crate) fn enter(self: &Arc<Self>) -> Entered {
        Entered(CURRENT.replace(Some(Arc::clone(self))))
    }

    fn go_on(&self) -> bool {
        self.taken.fetch_add(1, Ordering::Relaxed);
        self.of_all.fetch_add(1, Ordering::Relaxed);
        self.is_wanted()
    }
}

thread_local! {
    /// The steps of the work that this thread does.
    static CURRENT: RefCell<Option<Arc<Steps>>> = const { RefCell::new(None) };
}

/// What this thread does goes on; whether anybody waits for it. Where it is no watched work this tells nobody, and somebody
/// waits.
pub(crate) fn step() -> bool {
    CURRENT.with_borrow(|current| current.as_ref().is_none_or(|steps| steps.go_on()))
}

/// The steps of the work that this thread does, for others that do part of it.
pub(crate) fn current() -> Option<Arc<Steps>> {
    CURRENT.with_borrow(Clone::clone)
}

/// Makes the steps of this thread those of some work, while it lives.
pub(crate) struct Entered(Option<Arc<Steps>>);

impl Drop for Entered {
    fn drop(&mut self) {
        CURRENT.set(self.0.take());
    }
}

/// Looks whether a count of steps still rises, for who waits no longer than a while without.
pub(crate) struct Patience<'a> {
    steps: &'a AtomicU64,
    seen: u64,
    since: Instant,
    lasts: Duration,
}

impl<'a> Patience<'a> {
    fn new(steps: &'a AtomicU64, lasts: Duration) -> Self {
        Self { steps, seen: steps.load(Ordering::Relaxed), since: Instant::now(), lasts }
    }

    /// How long to wait between two looks.
    pub(crate) fn pause(&self) -> Duration {
        (self.lasts / LOOKS).max(Duration::from_millis(1))
    }

    /// Whether there was no progress for as long as it lasts.
    pub(crate) fn is_over(&mut self) -> bool {
        let now = self.steps.load(Ordering::Relaxed);
        if now != self.seen {
            (self.seen, self.since) = (now, Instant::now());
        }
        self.since.elapsed() >= self.lasts
    }
}

/// How somebody's waiting for several things ended that did not fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Waited {
    /// All of them came.
    Done,
    /// None came within the deadline: what is in flight stays with the threads that do it.
    Stuck,
}

/// Threads for work that is watched.
#[derive(Default)]
pub(crate) struct Watched {
    shared: Arc<Shared>,
}

/// Something for a thread to do.
pub(crate) type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    work: Condvar,
    /// Steps of all work.
    taken: Arc<AtomicU64>,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    idle: usize,
    closed: bool,
}

/// Where work leaves what became of it, and how far it has come.
struct Letterbox<T, P> {
    letters: Mutex<Letters<T, P>>,
    arrived: Condvar,
}

struct Letters<T, P> {
    /// What was told last and not heard yet: who hears late hears less, and nothing grows.
    told: Option<P>,
    outcome: Option<Result<T, Box<dyn Any + Send>>>,
    /// Whether nobody will ask for it any more.
    unwanted: bool,
}

impl Watched {
    /// Steps of some work to come.
    pub(crate) fn steps(&self) -> Arc<Steps> {
        Arc::new(Steps { of_all: Arc::clone(&self.shared.taken), ..Steps::default() })
    }

    /// Counts what this thread does among the work on these threads, while the answer lives.
    pub(crate) fn enter(&self) -> Entered {
        self.steps().enter()
    }

    /// Patience with all work on these threads: it lasts that long after the last step of any.
    pub(crate) fn patience(&self, lasts: Duration) -> Patience<'_> {
        Patience::new(&self.shared.taken, lasts)
    }

    /// Does some work on another thread and waits for it, while `steps` shows progress at least once in `patience`; `None`
    /// where it did not. Where the system gives no thread, the caller's does it, and waits as long as it takes. A panic of the
    /// work is the caller's.
    pub(crate) fn run<T: Send + 'static>(
        &self,
        patience: Duration,
        steps: &Arc<Steps>,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Option<T> {
        self.run_heard(patience, steps, |()| {}, |_| work())
    }

    /// [`run`](Self::run) of work that tells how far it has come: `hear` is called on this thread, with the latest that was
    /// told.
    pub(crate) fn run_heard<T: Send + 'static, P: Send + 'static>(
        &self,
        patience: Duration,
        steps: &Arc<Steps>,
        hear: impl FnMut(P),
        work: impl FnOnce(&mut dyn FnMut(P)) -> T + Send + 'static,
    ) -> Option<T> {
        let letters = Mutex::new(Letters { told: None, outcome: None, unwanted: false });
        let letterbox = Arc::new(Letterbox { letters, arrived: Condvar::new() });
        let job = {
            let (letterbox, steps, span) = (Arc::clone(&letterbox), Arc::clone(steps), tracing::Span::current());
            move || {
                let outcome = {
                    let (_steps, _span) = (steps.enter(), span.enter());
                    let mut tell = |news| letterbox.tell(news);
                    catch_unwind(AssertUnwindSafe(|| work(&mut tell)))
                };
                letterbox.leave(outcome);
            }
        };
        if let Err(job) = self.start(Box::new(job)) {
            job();
        }
        let outcome = letterbox.wait(steps.patience(patience), hear);
        if outcome.is_none() {
            steps.abandon();
        }
        Some(outcome?.unwrap_or_else(|panic| resume_unwind(panic)))
    }

    /// Hands work to a thread that waits for some, or to a new one; gives it back where there is neither. Nobody learns of its
    /// panic.
    pub(crate) fn start(&self, job: Job) -> Result<(), Job> {
        let mut state = self.shared.state.lock();
        state.jobs.push_back(job);
        if state.idle >= state.jobs.len() {
            drop(state);
            self.shared.work.notify_one();
            return Ok(());
        }
        let shared = Arc::clone(&self.shared);
        match thread::Builder::new().name("alight-io".into()).spawn(move || shared.work()) {
            Ok(_) => Ok(()),
            Err(error) => {
                tracing::warn!(%error, "no thread for an operation; it has no deadline");
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

impl<T, P> Letterbox<T, P> {
    fn tell(&self, news: P) {
        self.letters.lock().told = Some(news);
        self.arrived.notify_one();
    }

    /// Leaves what became of the work, or drops it where nobody asks for it any more: that may take as long as the work itself.
    fn leave(&self, outcome: Result<T, Box<dyn Any + Send>>) {
        let mut letters = self.letters.lock();
        if letters.unwanted {
            drop(letters);
            drop(outcome);
            return;
        }
        letters.outcome = Some(outcome);
        drop(letters);
        self.arrived.notify_one();
    }

    fn wait(&self, mut patience: Patience<'_>, mut hear: impl FnMut(P)) -> Option<Result<T, Box<dyn Any + Send>>> {
        let pause = patience.pause();
        let mut letters = self.letters.lock();
        loop {
            if let Some(news) = letters.told.take() {
                MutexGuard::unlocked(&mut letters, || hear(news));
                continue;
            }
            if let Some(outcome) = letters.outcome.take() {
                return Some(outcome);
            }
            let nothing = self.arrived.wait_for(&mut letters, pause).timed_out();
            if nothing && letters.told.is_none() && letters.outcome.is_none() && patience.is_over() {
                letters.unwanted = true;
                return None;
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
        let steps = watched.steps();
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
        let steps = watched.steps();
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

    /// Sends which thread it was dropped by.
    struct Dropped(std::sync::mpsc::Sender<thread::ThreadId>);

    impl Drop for Dropped {
        fn drop(&mut self) {
            self.0.send(thread::current().id()).unwrap();
        }
    }

    #[test]
    fn what_nobody_waits_for_any_more_is_dropped_by_the_thread_that_made_it() {
        let watched = Watched::default();
        let gate = Gate::default();
        gate.close();
        let (tell, told) = std::sync::mpsc::channel();
        let (stuck, made) = (gate.clone(), tell.clone());
        let outcome = watched.run(PATIENCE, &watched.steps(), move || {
            stuck.pass();
            (Dropped(made), Dropped(tell))
        });
        assert!(outcome.is_none());
        gate.open();
        let by: Vec<_> = told.iter().collect();
        assert!(by.len() == 2 && by.iter().all(|&thread| thread != thread::current().id()), "{by:?}");
    }

    #[test]
    fn threads_are_lent_again_and_a_panic_is_the_callers() {
        let watched = Watched::default();
        let steps = watched.steps();
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
            let run = move |n| watched.run(Duration::from_secs(60), &watched.steps(), move || n).unwrap();
            let threads: Vec<_> = (0..20u64).map(|n| scope.spawn(move || run(n))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(together, (0..20).collect::<Vec<_>>());
    }

    #[test]
    fn who_waits_hears_how_far_it_has_come_and_what_it_calls_counts_as_a_step() {
        let watched = Watched::default();
        let mut heard = Vec::new();
        let outcome = watched.run_heard(
            PATIENCE,
            &watched.steps(),
            |n| heard.push(n),
            |tell| {
                for n in 0..15 {
                    thread::sleep(PATIENCE / 8);
                    assert!(step());
                    tell(n);
                }
                "done"
            },
        );
        assert_eq!(outcome, Some("done"));
        assert!(heard.is_sorted() && heard.last() == Some(&14), "{heard:?}");
        assert!(step(), "nobody watches this thread");
        let (gate, steps) = (Gate::default(), watched.steps());
        gate.close();
        let (stuck, ended) = (gate.clone(), Arc::new(AtomicBool::new(false)));
        let wanted = Arc::clone(&ended);
        let given_up = watched.run(PATIENCE, &steps, move || {
            stuck.pass();
            wanted.store(!step(), Ordering::Release);
        });
        assert!(given_up.is_none());
        let mut patience = watched.patience(PATIENCE);
        while !patience.is_over() {
            thread::sleep(patience.pause());
        }
        gate.open();
        while !ended.load(Ordering::Acquire) {
            thread::yield_now();
        }
        assert!(!patience.is_over(), "it went on");
    }
}
