//! Group commit: threads that commit at the same time share writes and syncs.
//!
//! A commit passes two stages, and each has one leader at a time. Who comes while nobody writes takes what is queued and writes it;
//! who has written while nobody finishes takes all that was written meanwhile and finishes it: one sync, and all of it becomes
//! visible. So one group is written while another is synced, and the slower of the two makes the groups as large as they need to
//! be. A leader hands its stage on, to the first of those who wait for it, before it does anything else; each waits on a word of
//! its own, so that waking one disturbs no other. (A first form let each thread pass through the log's and the sync's mutex in
//! turn, a second woke everybody at once onto one mutex; waking sixteen cost more than the disk.)
//!
//! # Invariants
//! - Each stage has one leader at a time, and one whenever something waits for it.
//! - Every commit is written once, in the order in which it was queued, and what was written is finished once, in that order.

use std::collections::VecDeque;
use std::mem;
use std::sync::PoisonError;

use crate::error::{Error, Result};
use crate::store::commit::duplicate;
use crate::sync::{Arc, Condvar, Mutex, MutexGuard};

/// Commits of type `C`, and what writing some of them leaves to be finished, `W`.
pub(crate) struct Group<C, W> {
    state: Mutex<State<C, W>>,
}

struct State<C, W> {
    queue: VecDeque<Ticket<C>>,
    writing: bool,
    written: VecDeque<Batch<W>>,
    finishing: bool,
}

struct Ticket<C> {
    commit: C,
    size_bytes: u64,
    seat: Arc<Seat>,
}

/// Commits that were written with one call.
struct Batch<W> {
    written: W,
    /// Those whose commits they are; first who wrote.
    seats: Vec<Arc<Seat>>,
}

/// Where a thread waits for word of its commit.
#[derive(Default)]
struct Seat {
    word: Mutex<Option<Word>>,
    told: Condvar,
}

/// What a waiting thread is told.
enum Word {
    /// To write: its commit is the first of the queue.
    Write,
    /// To finish: what it wrote is the first that waits for that.
    Finish,
    /// What became of its commit.
    Done(Result<()>),
}

impl Seat {
    fn tell(&self, word: Word) {
        *locked(&self.word) = Some(word);
        self.told.notify_one();
    }

    fn wait(&self) -> Word {
        let mut word = locked(&self.word);
        loop {
            match word.take() {
                Some(word) => return word,
                None => word = self.told.wait(word).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

/// Threads that wait for an outcome. However their leader ends they get one: a panic must not leave them asleep.
struct Waiting {
    seats: Vec<Arc<Seat>>,
    outcome: Result<()>,
}

impl Waiting {
    fn new(seats: Vec<Arc<Seat>>) -> Self {
        Self { seats, outcome: Err(Error::WritesRefused { cause: "the thread that wrote for others panicked".into() }) }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let mut seats = self.seats.drain(..);
        let first = seats.next();
        for seat in seats {
            seat.tell(Word::Done(self.outcome.as_ref().map_err(duplicate).copied()));
        }
        // The error itself goes to one of them.
        if let Some(first) = first {
            first.tell(Word::Done(mem::replace(&mut self.outcome, Ok(()))));
        }
    }
}

/// Who leads next, and the word for it.
type Next = Option<(Arc<Seat>, Word)>;

/// A stage's lead, which is handed on however its leader ends.
struct Lead<'a, C, W> {
    group: &'a Group<C, W>,
    /// Whom the stage waits for next; marks it as free where there is nobody.
    next: fn(&mut State<C, W>) -> Next,
}

impl<C, W> Drop for Lead<'_, C, W> {
    fn drop(&mut self) {
        let next = (self.next)(&mut self.group.lock());
        if let Some((seat, word)) = next {
            seat.tell(word);
        }
    }
}

impl<C, W> Default for Group<C, W> {
    fn default() -> Self {
        let (queue, written) = (VecDeque::new(), VecDeque::new());
        Self { state: Mutex::new(State { queue, writing: false, written, finishing: false }) }
    }
}

impl<C, W> Group<C, W> {
    /// Has a commit carried out, by this thread or others, and returns its outcome. `write` gets commits of at most
    /// `group_bytes` together, or one; `finish` what some calls of `write` left, in their order. What fails either fails
    /// every commit of that call.
    pub(crate) fn commit(
        &self,
        commit: C,
        size_bytes: u64,
        group_bytes: u64,
        write: impl Fn(Vec<C>) -> Result<W>,
        finish: impl Fn(Vec<W>) -> Result<()>,
    ) -> Result<()> {
        let seat = Arc::new(Seat::default());
        let mut state = self.lock();
        state.queue.push_back(Ticket { commit, size_bytes, seat: Arc::clone(&seat) });
        let first = !mem::replace(&mut state.writing, true);
        drop(state);
        let mut word = if first { Word::Write } else { seat.wait() };
        loop {
            match word {
                Word::Done(outcome) => return outcome,
                Word::Finish => self.finish(&finish),
                Word::Write => {
                    if self.write(group_bytes, &write) {
                        self.finish(&finish);
                    }
                }
            }
            word = seat.wait();
        }
    }

    /// Writes what is queued. Whether this thread is to finish it.
    fn write(&self, group_bytes: u64, write: impl Fn(Vec<C>) -> Result<W>) -> bool {
        let lead = Lead {
            group: self,
            next: |state| {
                let next = state.queue.front().map(|ticket| (Arc::clone(&ticket.seat), Word::Write));
                state.writing = next.is_some();
                next
            },
        };
        let (commits, seats) = take(&mut self.lock().queue, group_bytes);
        let mut waiting = Waiting::new(seats);
        match write(commits) {
            Ok(written) => {
                let mut state = self.lock();
                state.written.push_back(Batch { written, seats: mem::take(&mut waiting.seats) });
                let finishes = !mem::replace(&mut state.finishing, true);
                drop(state);
                drop(lead);
                finishes
            }
            Err(error) => {
                drop(lead);
                waiting.outcome = Err(error);
                false
            }
        }
    }

    /// Finishes all that is written.
    fn finish(&self, finish: impl Fn(Vec<W>) -> Result<()>) {
        let lead = Lead {
            group: self,
            next: |state| {
                let next = state.written.front().map(|batch| (Arc::clone(&batch.seats[0]), Word::Finish));
                state.finishing = next.is_some();
                next
            },
        };
        let batches = mem::take(&mut self.lock().written);
        let (mut written, mut waiting) = (Vec::with_capacity(batches.len()), Waiting::new(Vec::new()));
        for batch in batches {
            written.push(batch.written);
            waiting.seats.extend(batch.seats);
        }
        let outcome = finish(written);
        waiting.outcome = outcome;
        drop(lead);
    }

    fn lock(&self) -> MutexGuard<'_, State<C, W>> {
        locked(&self.state)
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The first commits of the queue, of at most `group_bytes` together, or one.
fn take<C>(queue: &mut VecDeque<Ticket<C>>, group_bytes: u64) -> (Vec<C>, Vec<Arc<Seat>>) {
    let mut total = 0;
    let mut count = 0;
    for ticket in queue.iter() {
        total += ticket.size_bytes;
        if count > 0 && total > group_bytes {
            break;
        }
        count += 1;
    }
    queue.drain(..count).map(|ticket| (ticket.commit, ticket.seat)).unzip()
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    /// Enters a stage that nobody else is in.
    fn alone(stage: &AtomicBool) -> impl Drop + '_ {
        struct Entered<'a>(&'a AtomicBool);
        impl Drop for Entered<'_> {
            fn drop(&mut self) {
                self.0.store(false, Ordering::SeqCst);
            }
        }
        assert!(!stage.swap(true, Ordering::SeqCst), "two leaders of one stage");
        Entered(stage)
    }

    #[test]
    fn every_commit_passes_both_stages_once_in_order() {
        let group = Group::default();
        let (writing, finishing) = (AtomicBool::new(false), AtomicBool::new(false));
        let (written, done) = (Mutex::new(Vec::<(usize, usize)>::new()), Mutex::new(Vec::new()));
        std::thread::scope(|scope| {
            for thread in 0..8usize {
                let (group, writing, finishing, written, done) = (&group, &writing, &finishing, &written, &done);
                scope.spawn(move || {
                    for n in 0..300usize {
                        let write = |commits: Vec<(usize, usize)>| {
                            let _alone = alone(writing);
                            assert!(!commits.is_empty());
                            if commits.iter().any(|&(_, n)| n % 10 == 3) {
                                assert_eq!(commits.len(), 1, "one that is as long as a group is alone in it");
                                return Err(Error::Closed);
                            }
                            written.lock().unwrap().extend(&commits);
                            Ok(commits)
                        };
                        let finish = |batches: Vec<Vec<(usize, usize)>>| {
                            let _alone = alone(finishing);
                            assert!(!batches.is_empty());
                            done.lock().unwrap().extend(batches.into_iter().flatten());
                            Ok(())
                        };
                        let size = if n % 10 == 3 { 7 } else { 1 + n as u64 % 5 };
                        let outcome = group.commit((thread, n), size, 7, write, finish);
                        assert_eq!(outcome.is_err(), n % 10 == 3, "each gets its own outcome");
                        assert!(outcome.is_err() || done.lock().unwrap().contains(&(thread, n)));
                    }
                });
            }
        });
        let (written, mut done) = (written.into_inner().unwrap(), done.into_inner().unwrap());
        assert_eq!(written, done, "what is written first is finished first");
        for thread in 0..8 {
            let own: Vec<usize> = done.iter().filter(|(t, _)| *t == thread).map(|&(_, n)| n).collect();
            assert!(own.is_sorted(), "a thread's commits keep their order");
        }
        done.sort_unstable();
        done.dedup();
        assert_eq!(done.len(), 8 * 270);
    }

    #[test]
    fn what_fails_in_the_second_stage_fails_all_that_it_was_to_finish() {
        let group = Group::default();
        let failed = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..6 {
                let (group, failed) = (&group, &failed);
                scope.spawn(move || {
                    for _ in 0..100 {
                        let finish = |batches: Vec<usize>| {
                            failed.fetch_add(batches.iter().sum(), Ordering::Relaxed);
                            Err(Error::WritesRefused { cause: "the disk is gone".into() })
                        };
                        let outcome = group.commit((), 1, 3, |commits| Ok(commits.len()), finish);
                        assert!(matches!(outcome, Err(Error::WritesRefused { cause }) if cause == "the disk is gone"));
                    }
                });
            }
        });
        assert_eq!(failed.into_inner(), 600);
    }

    #[test]
    fn a_leader_that_panics_leaves_nobody_asleep() {
        for planted in ["write", "finish"] {
            let group = Group::default();
            let failed = AtomicUsize::new(0);
            std::thread::scope(|scope| {
                for thread in 0..6usize {
                    let (group, failed) = (&group, &failed);
                    scope.spawn(move || {
                        for n in 0..50usize {
                            let panics = |stage| assert!(!(planted == stage && thread == 0 && n == 20), "planted");
                            let run = std::panic::AssertUnwindSafe(|| {
                                let write = |commits: Vec<()>| {
                                    panics("write");
                                    Ok(commits.len())
                                };
                                group.commit((), 1, 100, write, |_| {
                                    panics("finish");
                                    Ok(())
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
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::thread;

    /// Three threads, whose commits fit a group but for one: every way in which they can meet.
    #[test]
    fn whoever_leads_every_commit_is_carried_out_once_and_nobody_sleeps_for_ever() {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(2);
        model.check(|| {
            let group: Arc<Group<usize, Vec<usize>>> = Arc::new(Group::default());
            let done: Arc<Mutex<(bool, bool, Vec<usize>)>> = Arc::new(Mutex::new((false, false, Vec::new())));
            let commit = |n: usize| {
                let (group, done) = (Arc::clone(&group), Arc::clone(&done));
                move || {
                    let write = |commits: Vec<usize>| {
                        assert!(!mem::replace(&mut done.lock().unwrap().0, true), "two write");
                        assert!((1..=2).contains(&commits.len()));
                        // Others come while this one is at work.
                        thread::yield_now();
                        done.lock().unwrap().0 = false;
                        if commits == [1] { Err(Error::Closed) } else { Ok(commits) }
                    };
                    let finish = |batches: Vec<Vec<usize>>| {
                        assert!(!mem::replace(&mut done.lock().unwrap().1, true), "two finish");
                        assert!(!batches.is_empty());
                        thread::yield_now();
                        let mut done = done.lock().unwrap();
                        done.1 = false;
                        done.2.extend(batches.into_iter().flatten());
                        Ok(())
                    };
                    // The one that fails has a group of its own.
                    let outcome = group.commit(n, if n == 1 { 2 } else { 1 }, 2, write, finish);
                    assert_eq!(outcome.is_err(), n == 1, "each gets its own outcome");
                }
            };
            let threads = [thread::spawn(commit(1)), thread::spawn(commit(2))];
            commit(0)();
            threads.into_iter().for_each(|thread| thread.join().unwrap());
            let mut done = mem::take(&mut done.lock().unwrap().2);
            done.sort_unstable();
            assert_eq!(done, [0, 2]);
        });
    }
}
