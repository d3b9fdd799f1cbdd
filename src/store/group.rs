//! Group commit: threads that commit at the same time share one write and one sync.
//!
//! Whoever finds nobody at work sees to it that somebody leads: takes what is queued, carries it through all stages,
//! and wakes everybody at once. The others sleep meanwhile and take no lock that the leader needs. (A first form let
//! each thread pass through the log's and the sync's mutex in turn; waking sixteen of them one after another cost more
//! than the disk.) A leader with a thread of its own goes on with what was queued meanwhile, and nobody need be woken for that.
//!
//! # Invariants
//! - One leader at a time, and one whenever something is queued and nobody is done with it.
//! - A leader gives the lead up, or goes on, in the moment in which it tells what became of a group: whoever was told and
//!   comes again finds nobody at work, if nobody is.
//! - Every commit is carried out once, in the order in which it was queued.
//! - Who waits no longer leaves its commit to the leader.

use std::collections::VecDeque;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::io::{Patience, processors};
use crate::sync::{Arc, Condvar, Mutex, MutexGuard};

/// How long an outcome that was announced is looked out for without sleeping: a fast disk's sync. A thread that sleeps takes 30 µs
/// to wake on a virtual machine.
const SPIN: Duration = Duration::from_micros(300);

/// How often a processor is told that it spins before the clock is asked again.
const SPINS_A_LOOK: u32 = 16;

/// With fewer processors somebody else has use for the one.
const SPINNING_PROCESSORS_MIN: usize = 4;

/// The queue of commits of type `C`.
pub(crate) struct Group<C> {
    state: Mutex<State<C>>,
    /// Told when a leader is done.
    done: Condvar,
}

struct State<C> {
    queue: VecDeque<Ticket<C>>,
    leading: bool,
    /// Whether the leader is about to tell.
    ending: bool,
}

struct Ticket<C> {
    commit: C,
    size_bytes: u64,
    outcome: Outcome,
}

/// How much a leader does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Extent {
    /// One group: the leader has a commit of its own to return with.
    OneGroup,
    /// Whatever is queued.
    All,
}

/// What became of a commit, once its leader knows.
type Outcome = Arc<Told>;

#[derive(Default)]
struct Told {
    outcome: Mutex<Option<Result<()>>>,
    /// Whether there is one, for who looks without the lock.
    is_told: AtomicBool,
}

impl<C> Default for Group<C> {
    fn default() -> Self {
        Self {
            state: Mutex::new(State { queue: VecDeque::new(), leading: false, ending: false }),
            done: Condvar::new(),
        }
    }
}

/// A commit in the queue, for who waits for it.
pub(crate) struct Awaited(Outcome);

/// The leader's part in one group. However it ends, every commit it took has an outcome: a panic must not leave the others
/// asleep, nor the lead taken.
struct Lead<'a, C> {
    group: &'a Group<C>,
    outcomes: Vec<Outcome>,
}

impl<C> Lead<'_, C> {
    /// Tells what became of each commit, and answers what comes next; where that is nothing, the lead is given up.
    fn tell(
        mut self,
        results: Vec<Result<()>>,
        next: impl FnOnce(&mut VecDeque<Ticket<C>>) -> Vec<Ticket<C>>,
    ) -> Vec<Ticket<C>> {
        assert_eq!(results.len(), self.outcomes.len(), "every commit has one outcome");
        // Under the lock, so that nobody looks at its outcome before and sleeps after.
        let mut state = self.group.lock();
        for (outcome, result) in self.outcomes.drain(..).zip(results) {
            outcome.tell(result);
        }
        let next = next(&mut state.queue);
        (state.leading, state.ending) = (!next.is_empty(), false);
        drop(state);
        self.group.done.notify_all();
        next
    }
}

impl<C> Drop for Lead<'_, C> {
    fn drop(&mut self) {
        if self.outcomes.is_empty() {
            return;
        }
        let mut state = self.group.lock();
        for outcome in self.outcomes.drain(..) {
            outcome.tell(Err(Error::WritesRefused { cause: "the thread that wrote for others panicked".into() }));
        }
        (state.leading, state.ending) = (false, false);
        drop(state);
        self.group.done.notify_all();
    }
}

impl<C> Group<C> {
    /// Has a commit carried out, and returns its outcome. Where nobody leads it calls `lead`, which has
    /// [`carry_on`](Group::carry_on) called, by this thread or another. `None` once its patience is over.
    pub(crate) fn commit(
        &self,
        commit: C,
        size_bytes: u64,
        lead: impl Fn(),
        patience: Option<Patience<'_>>,
    ) -> Option<Result<()>> {
        let outcome = self.lock().push(commit, size_bytes);
        self.wait(&Awaited(outcome), lead, patience)
    }

    /// Queues a commit where nobody is at work and nothing is queued; the caller sees to it that somebody leads, and then
    /// [waits](Self::wait). `make` makes the commit, and what the caller needs for it.
    pub(crate) fn begin<T>(&self, size_bytes: u64, make: impl FnOnce() -> (C, T)) -> Option<(Awaited, T)> {
        let mut state = self.lock();
        if state.leading || !state.queue.is_empty() {
            return None;
        }
        let (commit, kept) = make();
        let outcome = state.push(commit, size_bytes);
        state.leading = true;
        Some((Awaited(outcome), kept))
    }

    /// Waits for the outcome of a commit in the queue, as [`commit`](Self::commit) does.
    pub(crate) fn wait(
        &self,
        Awaited(outcome): &Awaited,
        lead: impl Fn(),
        mut patience: Option<Patience<'_>>,
    ) -> Option<Result<()>> {
        let mut state = self.lock();
        let mut may_spin = true;
        loop {
            if let Some(outcome) = outcome.take() {
                return Some(outcome);
            }
            // What is still queued is not what the leader is about to tell of.
            let is_due = state.ending && !state.queue.iter().any(|ticket| Arc::ptr_eq(&ticket.outcome, outcome));
            if std::mem::take(&mut may_spin) && is_due {
                drop(state);
                outcome.spin();
                state = self.lock();
                continue;
            }
            may_spin = !is_due;
            if !state.leading {
                state.leading = true;
                drop(state);
                lead();
                state = self.lock();
                continue;
            }
            let Some(patience) = &mut patience else {
                state = self.done.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let (woken, waited) =
                self.done.wait_timeout(state, patience.pause()).unwrap_or_else(PoisonError::into_inner);
            if waited.timed_out() && !outcome.is_told() && patience.is_over() {
                return None;
            }
            state = woken;
        }
    }

    /// Leads, for who was told to by [`commit`](Group::commit): until nothing is queued, or through one group. `carry_out` gets
    /// commits of at most `group_bytes` together, or one, and answers for each.
    pub(crate) fn carry_on(&self, extent: Extent, group_bytes: u64, carry_out: impl Fn(Vec<C>) -> Vec<Result<()>>) {
        let mut tickets = {
            let mut state = self.lock();
            let tickets = take(&mut state.queue, group_bytes);
            // Under the same lock: whoever queues later finds nobody at work.
            state.leading = !tickets.is_empty();
            tickets
        };
        while !tickets.is_empty() {
            let (commits, outcomes) = tickets.into_iter().map(|ticket| (ticket.commit, ticket.outcome)).unzip();
            let lead = Lead { group: self, outcomes };
            let results = carry_out(commits);
            tickets = lead.tell(results, |queue| match extent {
                Extent::OneGroup => Vec::new(),
                Extent::All => take(queue, group_bytes),
            });
        }
    }

    /// The leader is about to tell what became of its group: who sleeps wakes up meanwhile and looks out for it. Not where
    /// others sleep too, whom that would wake for nothing, nor where the machine has few processors.
    pub(crate) fn announce(&self) {
        let mut state = self.lock();
        if state.queue.is_empty() && processors() >= SPINNING_PROCESSORS_MIN {
            state.ending = true;
            drop(state);
            self.done.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<C>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<C> State<C> {
    fn push(&mut self, commit: C, size_bytes: u64) -> Outcome {
        let outcome = Outcome::default();
        self.queue.push_back(Ticket { commit, size_bytes, outcome: Arc::clone(&outcome) });
        outcome
    }
}

impl Told {
    fn tell(&self, outcome: Result<()>) {
        *self.outcome.lock().unwrap_or_else(PoisonError::into_inner) = Some(outcome);
        self.is_told.store(true, Ordering::Release);
    }

    fn take(&self) -> Option<Result<()>> {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn is_told(&self) -> bool {
        self.is_told.load(Ordering::Acquire)
    }

    /// Looks out for an outcome that is due, for a while.
    fn spin(&self) {
        let until = Instant::now() + SPIN;
        while !self.is_told() && Instant::now() < until {
            (0..SPINS_A_LOOK).for_each(|_| std::hint::spin_loop());
        }
    }
}

fn take<C>(queue: &mut VecDeque<Ticket<C>>, group_bytes: u64) -> Vec<Ticket<C>> {
    let mut total = 0u64;
    let mut count = 0;
    for ticket in queue.iter() {
        total = total.saturating_add(ticket.size_bytes);
        if count > 0 && total > group_bytes {
            break;
        }
        count += 1;
    }
    queue.drain(..count).collect()
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::io::Watched;
    use crate::io::fixtures::Gate;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::time::Duration;

    #[test]
    fn every_commit_is_carried_out_once_by_one_leader_at_a_time() {
        const EACH: usize = if cfg!(miri) { 20 } else { 300 };
        let group = Group::default();
        let (working, groups) = (AtomicBool::new(false), AtomicUsize::new(0));
        let done = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for thread in 0..8usize {
                let (group, working, groups, done) = (&group, &working, &groups, &done);
                scope.spawn(move || {
                    for n in 0..EACH {
                        let carry_out = |commits: Vec<(usize, usize)>| {
                            assert!(!working.swap(true, Ordering::SeqCst), "two leaders");
                            assert!(!commits.is_empty());
                            groups.fetch_add(1, Ordering::Relaxed);
                            let fail = |n: usize| if n % 10 == 3 { Err(Error::Closed) } else { Ok(()) };
                            let results = commits.iter().map(|&(_, n)| fail(n)).collect();
                            done.lock().unwrap().extend(commits);
                            working.store(false, Ordering::SeqCst);
                            results
                        };
                        // By itself, or by a thread of its own.
                        let lead = || match thread % 2 {
                            0 => group.carry_on(Extent::OneGroup, 7, carry_out),
                            _ => {
                                scope.spawn(move || group.carry_on(Extent::All, 7, carry_out));
                            }
                        };
                        let outcome = group.commit((thread, n), 1 + n as u64 % 5, lead, None).unwrap();
                        assert_eq!(outcome.is_err(), n % 10 == 3, "each gets its own outcome");
                    }
                });
            }
        });
        let mut done = done.into_inner().unwrap();
        for thread in 0..8 {
            let own: Vec<usize> = done.iter().filter(|(t, _)| *t == thread).map(|&(_, n)| n).collect();
            assert!(own.is_sorted(), "a thread's commits keep their order");
        }
        done.sort_unstable();
        done.dedup();
        assert_eq!(done.len(), 8 * EACH);
        assert!(groups.into_inner() <= 8 * EACH);
    }

    #[test]
    fn a_commit_is_begun_only_where_nobody_is_at_work() {
        let group = Group::default();
        let carry_out = |commits: Vec<u32>| commits.iter().map(|_| Ok(())).collect();
        let (awaited, kept) = group.begin(u64::MAX, || (1, "kept")).expect("nobody is at work");
        assert_eq!(kept, "kept");
        assert!(group.begin(1, || -> (u32, ()) { panic!("somebody is") }).is_none());
        std::thread::scope(|scope| {
            let other = scope.spawn(|| group.commit(2, u64::MAX, || panic!("somebody leads"), None));
            while group.lock().queue.len() < 2 {
                std::thread::yield_now();
            }
            group.carry_on(Extent::All, 100, |commits: Vec<u32>| {
                assert_eq!(commits.len(), 1, "each is as large as a group");
                carry_out(commits)
            });
            assert!(matches!(other.join().unwrap(), Some(Ok(()))));
        });
        assert!(matches!(group.wait(&awaited, || panic!("it is done"), None), Some(Ok(()))));
        for n in 0..1000 {
            let group = &group;
            std::thread::scope(|scope| {
                let (awaited, ()) = group.begin(1, || (n, ())).expect("whoever was told finds nobody at work");
                scope.spawn(move || group.carry_on(Extent::All, 1, carry_out));
                assert!(matches!(group.wait(&awaited, || panic!("somebody leads"), None), Some(Ok(()))));
                assert!(!group.lock().leading);
            });
        }
    }

    #[test]
    fn who_spins_for_an_outcome_that_is_late_sleeps_again() {
        let group = Group::default();
        let (awaited, ()) = group.begin(1, || (1, ())).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                group.carry_on(Extent::All, 1, |commits: Vec<u32>| {
                    // Announced whatever the machine.
                    group.lock().ending = true;
                    group.done.notify_all();
                    std::thread::sleep(SPIN * 20);
                    commits.iter().map(|_| Ok(())).collect()
                });
            });
            assert!(matches!(group.wait(&awaited, || panic!("somebody leads"), None), Some(Ok(()))));
            assert!(!group.lock().ending);
        });
    }

    #[test]
    fn a_leader_that_panics_leaves_nobody_asleep() {
        let group = Group::default();
        let failed = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for thread in 0..6usize {
                let (group, failed) = (&group, &failed);
                scope.spawn(move || {
                    for n in 0..50usize {
                        let run = std::panic::AssertUnwindSafe(|| {
                            let lead = || {
                                group.carry_on(Extent::OneGroup, 100, |commits| {
                                    assert!(!(thread == 0 && n == 20), "a planted panic");
                                    commits.iter().map(|()| Ok(())).collect()
                                });
                            };
                            group.commit((), 1, lead, None)
                        });
                        if !matches!(std::panic::catch_unwind(run), Ok(Some(Ok(())))) {
                            failed.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        assert!(failed.into_inner() <= 6);
    }

    #[test]
    fn who_waits_no_longer_leaves_its_commit_to_the_leader() {
        let (watched, group, carried) = (Watched::default(), Group::default(), AtomicUsize::new(0));
        let gate = Gate::default();
        gate.close();
        let steps = watched.steps();
        std::thread::scope(|scope| {
            let (group, gate, carried) = (&group, &gate, &carried);
            let lead = || {
                scope.spawn(move || {
                    group.carry_on(Extent::All, 1, |commits: Vec<u32>| {
                        gate.pass();
                        carried.fetch_add(commits.len(), Ordering::Relaxed);
                        commits.iter().map(|_| Ok(())).collect()
                    });
                });
            };
            let patience = || Some(steps.patience(Duration::from_millis(50)));
            assert!(group.commit(1, 1, lead, patience()).is_none());
            assert!(group.commit(2, 1, || panic!("somebody leads"), patience()).is_none());
            gate.open();
            assert!(matches!(group.commit(3, 1, lead, None), Some(Ok(()))));
        });
        assert_eq!(carried.into_inner(), 3);
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::thread;

    /// Three threads and four commits, of which two fit a group: every way in which they can meet.
    #[test]
    fn whoever_leads_every_commit_is_carried_out_once_and_nobody_sleeps_for_ever() {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(2);
        model.check(|| {
            let group: Arc<Group<usize>> = Arc::new(Group::default());
            let done: Arc<Mutex<(bool, Vec<usize>)>> = Arc::new(Mutex::new((false, Vec::new())));
            let commit = |n: usize| {
                let (group, done) = (Arc::clone(&group), Arc::clone(&done));
                move || {
                    let lead = || group.carry_on(Extent::OneGroup, 2, |commits| carry_out(&done, &commits));
                    let outcome = group.commit(n, 1, lead, None).unwrap();
                    assert_eq!(outcome.is_err(), n == 1, "each gets its own outcome");
                }
            };
            let threads = [thread::spawn(commit(1)), thread::spawn(commit(2))];
            commit(0)();
            commit(3)();
            threads.into_iter().for_each(|thread| thread.join().unwrap());
            let mut done = std::mem::take(&mut done.lock().unwrap().1);
            done.sort_unstable();
            assert_eq!(done, [0, 1, 2, 3]);
        });
    }

    type Done = Mutex<(bool, Vec<usize>)>;

    fn carry_out(done: &Done, commits: &[usize]) -> Vec<Result<()>> {
        assert!(!std::mem::replace(&mut done.lock().unwrap().0, true), "two leaders");
        assert!((1..=2).contains(&commits.len()));
        // Others come while this one is at work.
        thread::yield_now();
        let mut done = done.lock().unwrap();
        done.0 = false;
        done.1.extend(commits);
        commits.iter().map(|&n| if n == 1 { Err(Error::Closed) } else { Ok(()) }).collect()
    }

    /// Two threads, and those that lead for them.
    #[test]
    fn threads_that_lead_for_others_leave_nobody_asleep() {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(2);
        model.check(|| {
            let group: Arc<Group<usize>> = Arc::new(Group::default());
            let done: Arc<Done> = Arc::new(Mutex::new((false, Vec::new())));
            let commit = |n: usize| {
                let (group, done) = (Arc::clone(&group), Arc::clone(&done));
                move || {
                    let lead = || {
                        let (group, done) = (Arc::clone(&group), Arc::clone(&done));
                        thread::spawn(move || {
                            group.carry_on(Extent::All, 2, |commits| carry_out(&done, &commits));
                        });
                    };
                    let outcome = group.commit(n, 1, lead, None).unwrap();
                    assert_eq!(outcome.is_err(), n == 1, "each gets its own outcome");
                }
            };
            let other = thread::spawn(commit(1));
            commit(0)();
            other.join().unwrap();
            let mut done = std::mem::take(&mut done.lock().unwrap().1);
            done.sort_unstable();
            assert_eq!(done, [0, 1]);
        });
    }
}
