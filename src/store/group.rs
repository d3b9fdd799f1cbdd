//! Group commit: threads that commit at the same time share one write and one sync.
//!
//! Whoever finds nobody at work sees to it that somebody leads: takes what is queued, carries it through all stages,
//! and wakes everybody at once. The others sleep meanwhile and take no lock that the leader needs. (A first form let
//! each thread pass through the log's and the sync's mutex in turn; waking sixteen of them one after another cost more
//! than the disk.) A leader with a thread of its own goes on with what was queued meanwhile, and nobody need be woken for that.
//!
//! # Invariants
//! - One leader at a time, and one whenever something is queued and nobody is done with it.
//! - Every commit is carried out once, in the order in which it was queued.
//! - Who waits no longer leaves its commit to the leader.

use std::collections::VecDeque;
use std::sync::PoisonError;

use crate::error::{Error, Result};
use crate::io::Patience;
use crate::sync::{Arc, Condvar, Mutex, MutexGuard};

/// The queue of commits of type `C`.
pub(crate) struct Group<C> {
    state: Mutex<State<C>>,
    /// Told when a leader is done.
    done: Condvar,
}

struct State<C> {
    queue: VecDeque<Ticket<C>>,
    leading: bool,
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
type Outcome = Arc<Mutex<Option<Result<()>>>>;

impl<C> Default for Group<C> {
    fn default() -> Self {
        Self { state: Mutex::new(State { queue: VecDeque::new(), leading: false }), done: Condvar::new() }
    }
}

/// The leader's part in one group. However it ends, every commit it took has an outcome: a panic must not leave the others
/// asleep, nor the lead taken.
struct Lead<'a, C> {
    group: &'a Group<C>,
    outcomes: Vec<Outcome>,
    goes_on: bool,
}

impl<C> Drop for Lead<'_, C> {
    fn drop(&mut self) {
        for outcome in self.outcomes.drain(..) {
            locked(&outcome).get_or_insert_with(|| {
                Err(Error::WritesRefused { cause: "the thread that wrote for others panicked".into() })
            });
        }
        // Under the lock, so that nobody looks at its outcome before and sleeps after.
        self.group.lock().leading = self.goes_on;
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
        mut patience: Option<Patience<'_>>,
    ) -> Option<Result<()>> {
        let outcome = Outcome::default();
        let mut state = self.lock();
        state.queue.push_back(Ticket { commit, size_bytes, outcome: Arc::clone(&outcome) });
        loop {
            if let Some(outcome) = locked(&outcome).take() {
                return Some(outcome);
            }
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
            if waited.timed_out() && locked(&outcome).is_none() && patience.is_over() {
                return None;
            }
            state = woken;
        }
    }

    /// Leads, for who was told to by [`commit`](Group::commit): until nothing is queued, or through one group. `carry_out` gets
    /// commits of at most `group_bytes` together, or one, and answers for each.
    pub(crate) fn carry_on(&self, extent: Extent, group_bytes: u64, carry_out: impl Fn(Vec<C>) -> Vec<Result<()>>) {
        loop {
            let tickets = {
                let mut state = self.lock();
                let tickets = take(&mut state.queue, group_bytes);
                // Under the same lock: whoever queues later finds nobody at work.
                state.leading = !tickets.is_empty();
                tickets
            };
            if tickets.is_empty() {
                return;
            }
            let (commits, outcomes) = tickets.into_iter().map(|ticket| (ticket.commit, ticket.outcome)).unzip();
            let mut lead = Lead { group: self, outcomes, goes_on: false };
            let results = carry_out(commits);
            assert_eq!(results.len(), lead.outcomes.len(), "every commit has one outcome");
            for (outcome, result) in lead.outcomes.iter().zip(results) {
                *locked(outcome) = Some(result);
            }
            lead.goes_on = extent == Extent::All;
            drop(lead);
            if extent == Extent::OneGroup {
                return;
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<C>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn locked(outcome: &Outcome) -> MutexGuard<'_, Option<Result<()>>> {
    outcome.lock().unwrap_or_else(PoisonError::into_inner)
}

fn take<C>(queue: &mut VecDeque<Ticket<C>>, group_bytes: u64) -> Vec<Ticket<C>> {
    let mut total = 0;
    let mut count = 0;
    for ticket in queue.iter() {
        total += ticket.size_bytes;
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
