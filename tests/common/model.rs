//! What may be on a disk, from what a store was asked and what it answered.

use alight::{Durability, Error, Store};

use super::placed::Placed;
use super::tiny::{Contents, contents};

/// Values to put, and keys to delete.
pub type Commit = Vec<(Vec<u8>, Option<Vec<u8>>)>;

/// Makes a commit.
pub fn make(store: &Store, commit: &Commit, durability: Durability) -> Result<(), Error> {
    let values: Vec<Option<Placed>> = commit.iter().map(|(_, value)| value.as_deref().map(Placed::new)).collect();
    let mut batch = store.batch();
    batch.durability(durability);
    for ((key, _), value) in commit.iter().zip(&values) {
        match value {
            Some(value) => batch.put(key, &**value)?,
            None => batch.delete(key)?,
        }
    }
    batch.commit()
}

/// What was asked and answered, and so what may be on the disk.
#[derive(Debug, Default, Clone)]
pub struct Model {
    /// Commits that were acknowledged, in order.
    pub accepted: Vec<Commit>,
    /// How many of them are promised to survive power loss.
    pub durable: usize,
    /// Commits after these that failed: each may be there, or not.
    pub failed: Vec<Commit>,
}

impl Model {
    /// What is there after these commits.
    pub fn contents<'a>(commits: impl IntoIterator<Item = &'a Commit>) -> Contents {
        let mut contents = Contents::new();
        for (key, value) in commits.into_iter().flatten() {
            match value {
                Some(value) => drop(contents.insert(key.clone(), value.clone())),
                None => drop(contents.remove(key)),
            }
        }
        contents
    }

    /// What the open store shows.
    pub fn visible(&self) -> Contents {
        Self::contents(&self.accepted)
    }

    /// A commit was acknowledged; what failed before it is not there.
    pub fn accept(&mut self, commit: Commit, durability: Durability) {
        self.failed.clear();
        self.accepted.push(commit);
        if durability == Durability::Immediate {
            self.durable = self.accepted.len();
        }
    }

    /// A sync or a close was acknowledged.
    pub fn all_durable(&mut self) {
        self.durable = self.accepted.len();
    }

    /// The store has made commits of its own, such as a compaction's, and ends at this one: they count, and change
    /// nothing. What is visible was synced by them.
    pub fn repeat_through(&mut self, last: usize) -> Result<(), String> {
        let accepted = self.accepted.len();
        if last < accepted {
            return Err(format!("{accepted} commits were acknowledged, and the store ends at commit {last}"));
        }
        if last > accepted {
            self.accepted.resize_with(last, Commit::new);
            self.all_durable();
        }
        Ok(())
    }

    /// Compares a store that was opened again: it holds the first of the commits, `fewest` at least; and where it holds
    /// them all, perhaps some that failed. Answers them.
    pub fn check_opened(&self, store: &Store, fewest: usize) -> Result<Vec<Commit>, String> {
        let last = store.stat().map_err(|error| format!("stat: {error}"))?.last_commit as usize;
        let found = contents(store).map_err(|error| format!("a read: {error}"))?;
        self.explain(last, &found, fewest)
    }

    /// Which commits make what was found in a store that ends at commit `last`.
    pub fn explain(&self, last: usize, found: &Contents, fewest: usize) -> Result<Vec<Commit>, String> {
        if last < fewest {
            return Err(format!("commit {fewest} was acknowledged, and the store ends at commit {last}"));
        }
        self.candidates(last).find(|commits| *found == Self::contents(commits)).ok_or_else(|| differ(last, found))
    }

    /// Every list of commits that a store could hold that ends at commit `last`: the first of those that were accepted;
    /// where it holds them all, with any of those that failed, in their order.
    pub fn candidates(&self, last: usize) -> impl Iterator<Item = Vec<Commit>> + '_ {
        let extra = last.saturating_sub(self.accepted.len());
        let chosen = (0..1u32 << self.failed.len()).filter(move |chosen| chosen.count_ones() as usize == extra);
        chosen.map(move |chosen| {
            let some = self.failed.iter().enumerate().filter(|(index, _)| chosen >> index & 1 == 1);
            self.accepted.iter().take(last).chain(some.map(|(_, commit)| commit)).cloned().collect()
        })
    }

    /// The store was opened again with these commits. What an open believes, it syncs.
    pub fn begin_again(&mut self, commits: Vec<Commit>) {
        *self = Self { durable: commits.len(), accepted: commits, failed: Vec::new() };
    }
}

/// Says what was found instead of what should be there.
pub fn differ(last: usize, found: &Contents) -> String {
    let found: Vec<_> = found.iter().map(|(key, value)| (String::from_utf8_lossy(key), value.len())).collect();
    format!("the contents are not those after commit {last}: {found:?}")
}
