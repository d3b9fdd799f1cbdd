//! What a store may hold after a crash, from what was asked of it and what it answered.

use std::collections::BTreeMap;

use alight::storage::sim::SimStorage;
use alight::{Durability, Error, Store, StoreOptions};
use parking_lot::Mutex;

pub(crate) use crate::tiny::{Contents, contents, tiny_on as tiny};

/// Where every simulated store lies.
pub(crate) const PATH: &str = "/store";

/// [`tiny`] for the many stores that are opened to look at them: without deadlines, since starting their threads would take a
/// tenth of all the time. The workloads have deadlines, as do the openings at whose every call `tests/faults.rs` has one fail.
pub(crate) fn untimed(sim: &SimStorage) -> StoreOptions {
    tiny(sim).deadline(None).write_deadline(None)
}

/// The markers that a workload leaves in the trace, next to the calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mark {
    /// The store's creation was acknowledged.
    Created,
    /// Commit `n` of thread `t` was begun.
    Begun(u64, u64),
    /// It was acknowledged, and everything before it is durable.
    Durable(u64, u64),
    /// Backup `n` of the first so many commits was acknowledged.
    BackedUp(u64, u64),
}

impl Mark {
    pub(crate) fn number(self) -> u64 {
        match self {
            Mark::Created => 1,
            Mark::Begun(thread, n) => 2 << 60 | thread << 40 | n,
            Mark::Durable(thread, n) => 3 << 60 | thread << 40 | n,
            Mark::BackedUp(backup, commits) => 4 << 60 | backup << 40 | commits,
        }
    }

    pub(crate) fn of(number: u64) -> Self {
        let (thread, n) = (number >> 40 & 0xFFFFF, number & 0xFF_FFFF_FFFF);
        match number >> 60 {
            2 => Mark::Begun(thread, n),
            3 => Mark::Durable(thread, n),
            4 => Mark::BackedUp(thread, n),
            _ => Mark::Created,
        }
    }
}

/// The most commits that one compaction of a workload makes.
const REPEATS_MAX: usize = 20;

/// One commit: values to put, or keys to delete.
pub(crate) type Commit = Vec<(Vec<u8>, Option<Vec<u8>>)>;

/// What a run was asked, in the order of each thread.
#[derive(Default)]
pub(crate) struct Asked {
    pub threads: Mutex<BTreeMap<u64, Vec<Commit>>>,
}

/// Runs commits on a store and writes down what was asked and answered.
pub(crate) struct Scribe<'a> {
    pub sim: &'a SimStorage,
    pub asked: &'a Asked,
    pub thread: u64,
}

impl Scribe<'_> {
    /// Makes one commit. Whether it was acknowledged.
    pub(crate) fn commit(&self, store: &Store, commit: Commit, durability: Durability) -> Result<(), Error> {
        self.commit_that_evicts(store, commit, Vec::new(), durability)
    }

    /// Makes one commit, to which the store adds the deletes of these keys.
    pub(crate) fn commit_that_evicts(
        &self,
        store: &Store,
        commit: Commit,
        evicted: Vec<Vec<u8>>,
        durability: Durability,
    ) -> Result<(), Error> {
        let n = {
            let mut threads = self.asked.threads.lock();
            let commits = threads.entry(self.thread).or_default();
            let evicted = evicted.into_iter().map(|key| (key, None));
            commits.push(commit.iter().cloned().chain(evicted).collect());
            commits.len() as u64
        };
        self.sim.marker(Mark::Begun(self.thread, n).number());
        let mut batch = store.batch();
        batch.durability(durability);
        for (key, value) in &commit {
            match value {
                Some(value) => batch.put(key, value)?,
                None => batch.delete(key)?,
            }
        }
        batch.commit()?;
        if durability == Durability::Immediate {
            self.sim.marker(Mark::Durable(self.thread, n).number());
        }
        Ok(())
    }

    /// After a process died: commits that failed and did not reach the disk's cache never were. Their numbers are given
    /// again.
    pub(crate) fn forget_what_was_never_written(&self, recovered: &Store) {
        let last = recovered.stat().expect("a store that was just opened has its files").last_commit as usize;
        let mut threads = self.asked.threads.lock();
        let commits = threads.entry(self.thread).or_default();
        assert!(last <= commits.len() && commits.len() <= last + 1, "one commit was under way");
        commits.truncate(last);
    }

    /// Lets the store make commits of its own that change nothing, such as a compaction's.
    pub(crate) fn repeats(&self, store: &Store, work: impl FnOnce(&Store)) {
        self.repeats_as_far_as_it_gets(|| work(store));
        self.forget_what_was_never_repeated(store);
    }

    /// [`repeats`](Self::repeats), of a process that may die of it.
    pub(crate) fn repeats_as_far_as_it_gets(&self, work: impl FnOnce()) {
        let begun = {
            let mut threads = self.asked.threads.lock();
            let commits = threads.entry(self.thread).or_default();
            commits.resize(commits.len() + REPEATS_MAX, Commit::new());
            commits.len() as u64
        };
        self.sim.marker(Mark::Begun(self.thread, begun).number());
        work();
    }

    /// As many commits were made as the store counts; of those that repeat, fewer than were allowed for.
    pub(crate) fn forget_what_was_never_repeated(&self, store: &Store) {
        let last = store.stat().expect("an open store has its files").last_commit as usize;
        let mut threads = self.asked.threads.lock();
        let commits = threads.entry(self.thread).or_default();
        assert!(last <= commits.len(), "more commits than were allowed for");
        assert!(commits[last..].iter().all(Vec::is_empty), "commits are missing");
        commits.truncate(last);
    }

    /// Makes a backup of everything so far.
    pub(crate) fn back_up(&self, store: &Store, n: u64) {
        store.backup(backup_path(n)).expect("nothing hinders a backup");
        let commits = self.asked.threads.lock().get(&self.thread).map_or(0, |commits| commits.len() as u64);
        self.sim.marker(Mark::BackedUp(n, commits).number());
    }

    /// Everything so far is durable: a sync, or a close, returned.
    pub(crate) fn all_durable(&self) {
        let n = self.asked.threads.lock().get(&self.thread).map_or(0, |commits| commits.len() as u64);
        self.sim.marker(Mark::Durable(self.thread, n).number());
    }
}

/// What the markers before a cut promise.
#[derive(Debug, Default, Clone)]
pub(crate) struct Promised {
    pub created: bool,
    pub begun: BTreeMap<u64, u64>,
    pub durable: BTreeMap<u64, u64>,
    /// The backups, and how many commits each holds.
    pub backups: BTreeMap<u64, u64>,
}

impl Promised {
    pub(crate) fn by(markers: &[u64]) -> Self {
        let mut promised = Self::default();
        for &number in markers {
            match Mark::of(number) {
                Mark::Created => promised.created = true,
                Mark::Begun(thread, n) => drop(promised.begun.insert(thread, n)),
                Mark::Durable(thread, n) => drop(promised.durable.insert(thread, n)),
                Mark::BackedUp(backup, commits) => drop(promised.backups.insert(backup, commits)),
            }
        }
        promised
    }
}

/// Where a workload's backup lies.
pub(crate) fn backup_path(n: u64) -> String {
    format!("/backup{n}")
}

/// Checks that every backup opens, is sound, and holds the commits that it was made of.
pub(crate) fn check_backups(disk: &SimStorage, histories: &[Contents], promised: &Promised) -> Result<(), String> {
    for (&n, &commits) in &promised.backups {
        let failed = |error: Error| format!("backup {n}: {error}");
        let backup = untimed(disk).read_only(true).open(backup_path(n)).map_err(failed)?;
        if contents(&backup).map_err(failed)? != histories[commits as usize] {
            return Err(format!("backup {n} does not hold what was there after commit {commits}"));
        }
        let report = backup.verify(|_| {}).map_err(failed)?;
        if !report.is_sound() {
            return Err(format!("backup {n}: verify finds {:?}", report.damages));
        }
    }
    Ok(())
}

/// The contents after each commit of a single thread, from none to all.
pub(crate) fn histories(commits: &[Commit]) -> Vec<Contents> {
    let mut all = vec![Contents::new()];
    for commit in commits {
        let mut next = all.last().cloned().unwrap_or_default();
        for (key, value) in commit {
            match value {
                Some(value) => drop(next.insert(key.clone(), value.clone())),
                None => drop(next.remove(key)),
            }
        }
        all.push(next);
    }
    all
}

/// Checks a store against what was asked of one thread: its contents are those after some commit, none that was
/// promised is missing, and none is there that was not begun.
pub(crate) fn check_one_thread(store: &Store, histories: &[Contents], promised: &Promised) -> Result<(), String> {
    let last = store.stat().map_err(|error| error.to_string())?.last_commit as usize;
    let found = contents(store).map_err(|error| format!("a value cannot be read: {error}"))?;
    let durable = promised.durable.get(&0).copied().unwrap_or(0) as usize;
    let begun = promised.begun.get(&0).copied().unwrap_or(0) as usize;
    if last < durable {
        return Err(format!("commit {durable} was acknowledged as durable, and the store ends at commit {last}"));
    }
    if last > begun {
        return Err(format!("the store claims commit {last}, and commit {begun} was the last to be begun"));
    }
    if found != histories[last] {
        return Err(format!(
            "the contents are not those after commit {last}: {:?} instead of {:?}",
            found.iter().map(|(k, v)| (String::from_utf8_lossy(k).into_owned(), v.len())).collect::<Vec<_>>(),
            histories[last].iter().map(|(k, v)| (String::from_utf8_lossy(k).into_owned(), v.len())).collect::<Vec<_>>(),
        ));
    }
    Ok(())
}

/// Checks a store against what several threads asked, each of keys of its own that it never deletes: of every thread
/// the first so many commits are there, whole.
pub(crate) fn check_threads(
    store: &Store,
    asked: &BTreeMap<u64, Vec<Commit>>,
    promised: &Promised,
) -> Result<(), String> {
    let found = contents(store).map_err(|error| format!("a value cannot be read: {error}"))?;
    let mut there = 0;
    for (thread, commits) in asked {
        let durable = promised.durable.get(thread).copied().unwrap_or(0) as usize;
        let begun = promised.begun.get(thread).copied().unwrap_or(0) as usize;
        let whole = |commit: &Commit| commit.iter().all(|(key, value)| found.get(key) == value.as_ref());
        let absent = |commit: &Commit| commit.iter().all(|(key, _)| !found.contains_key(key));
        let count = commits.iter().take_while(|commit| whole(commit)).count();
        if !commits[count..].iter().all(absent) {
            return Err(format!("thread {thread}: commits after number {count} are there in part, or out of order"));
        }
        if !(durable..=begun).contains(&count) {
            return Err(format!("thread {thread}: {count} commits are there, of {durable} promised and {begun} begun"));
        }
        there += count;
    }
    let last = store.stat().map_err(|error| error.to_string())?.last_commit as usize;
    if last == there { Ok(()) } else { Err(format!("{there} commits are there, and the store counts {last}")) }
}
