//! Group commit: threads that commit at the same time share one write and one sync.
//!
//! Whoever finds nobody at work leads: it takes what is queued, its own commit among it, carries it through all stages,
//! and wakes everybody at once. The others sleep meanwhile and take no lock that the leader needs. (A first form let
//! each thread pass through the log's and the sync's mutex in turn; waking sixteen of them one after another cost more
//! than the disk.)
//!
//! # Invariants
//! - One leader at a time, and one whenever something is queued and nobody is done with it.
//! - Every commit is carried out once, in the order in which it was queued.

use std::collections::VecDeque;
use std::sync::PoisonError;

use crate::error::{Error, Result};
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

/// What became of a commit, once its leader knows.
type Outcome = Arc<Mutex<Option<Result<()>>>>;

impl<C> Default for Group<C> {
    fn default() -> Self {
        Self { state: Mutex::new(State { queue: VecDeque::new(), leading: false }), done: Condvar::new() }
    }
}

/// The leader's part. However it ends, the lead is given up and every commit it took has an outcome: a panic must not
/// leave the others asleep.
struct Lead<'a, C> {
    group: &'a Group<C>,
    outcomes: Vec<Outcome>,
}

impl<C> Drop for Lead<'_, C> {
    fn drop(&mut self) {
        for outcome in self.outcomes.drain(..) {
            locked(&outcome).get_or_insert_with(|| {
                Err(Error::WritesRefused { cause: "the thread that wrote for others panicked".into() })
            });
        }
        self.group.lock().leading = false;
        self.group.done.notify_all();
    }
}

impl<C> Group<C> {
    /// Has a commit carried out, by this thread or another, and returns its outcome. `carry_out` gets commits of at most
    /// `group_bytes` together, or one, and answers for each.
    pub(crate) fn commit(
        &self,
        commit: C,
        size_bytes: u64,
        group_bytes: u64,
        carry_out: impl Fn(Vec<C>) -> Vec<Result<()>>,
    ) -> Result<()> {
        let outcome = Outcome::default();
        let mut state = self.lock();
        state.queue.push_back(Ticket { commit, size_bytes, outcome: Arc::clone(&outcome) });
        loop {
            if let Some(outcome) = locked(&outcome).take() {
                return outcome;
            }
            if state.leading {
                state = self.done.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            state.leading = true;
            let tickets = take(&mut state.queue, group_bytes);
            drop(state);
            let (commits, outcomes) = tickets.into_iter().map(|ticket| (ticket.commit, ticket.outcome)).unzip();
            let lead = Lead { group: self, outcomes };
            let results = carry_out(commits);
            assert_eq!(results.len(), lead.outcomes.len(), "every commit has one outcome");
            for (outcome, result) in lead.outcomes.iter().zip(results) {
                *locked(outcome) = Some(result);
            }
            drop(lead);
            state = self.lock();
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
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    #[test]
    fn every_commit_is_carried_out_once_by_one_leader_at_a_time() {
        let group = Group::default();
        let (working, groups) = (AtomicBool::new(false), AtomicUsize::new(0));
        let done = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for thread in 0..8usize {
                let (group, working, groups, done) = (&group, &working, &groups, &done);
                scope.spawn(move || {
                    for n in 0..300usize {
                        let outcome = group.commit((thread, n), 1 + n as u64 % 5, 7, |commits| {
                            assert!(!working.swap(true, Ordering::SeqCst), "two leaders");
                            assert!(!commits.is_empty());
                            groups.fetch_add(1, Ordering::Relaxed);
                            let fail = |n: usize| if n % 10 == 3 { Err(Error::Closed) } else { Ok(()) };
                            let results = commits.iter().map(|&(_, n)| fail(n)).collect();
                            done.lock().unwrap().extend(commits);
                            working.store(false, Ordering::SeqCst);
                            results
                        });
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
        assert_eq!(done.len(), 2400);
        assert!(groups.into_inner() <= 2400);
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
                            group.commit((), 1, 100, |commits| {
                                assert!(!(thread == 0 && n == 20), "a planted panic");
                                commits.iter().map(|()| Ok(())).collect()
                            })
                        });
                        if !matches!(std::panic::catch_unwind(run), Ok(Ok(()))) {
                            failed.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        assert!(failed.into_inner() <= 6);
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
                    let outcome = group.commit(n, 1, 2, |commits| {
                        assert!(!std::mem::replace(&mut done.lock().unwrap().0, true), "two leaders");
                        assert!((1..=2).contains(&commits.len()));
                        // Others come while this one is at work.
                        thread::yield_now();
                        let mut done = done.lock().unwrap();
                        done.0 = false;
                        done.1.extend(&commits);
                        commits.iter().map(|&n| if n == 1 { Err(Error::Closed) } else { Ok(()) }).collect()
                    });
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
}
