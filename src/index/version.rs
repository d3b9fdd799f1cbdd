//! One state of the whole index, immutable once published.

use std::any::Any;
use std::ops::Bound;
use std::sync::Arc;

use alight_format::{HashedKey, IndexEntry, IndexKind, Seq};

use crate::error::Result;
use crate::index::merge::merge_layers;
use crate::index::overlay::Overlay;
use crate::index::run::Run;

/// Something that lasts as long as a version, and nothing else about it.
pub(crate) type Hold = Arc<dyn Any + Send + Sync>;

/// A state of the index. Cloning shares all its parts.
#[derive(Clone)]
pub(crate) struct Version {
    /// Whatever is to last as long as anybody sees this version: a reader's pin, or the token by which a writer knows.
    pub(crate) hold: Hold,
    /// Every commit up to this one is in here, and none after it.
    pub(crate) seq: Seq,
    /// Commits since the last run was begun.
    pub(crate) overlay: Overlay,
    /// An earlier overlay that is being written out as a run; empty otherwise.
    pub(crate) frozen: Overlay,
    /// The runs, newest first.
    pub(crate) runs: Arc<[Arc<Run>]>,
    /// Of the overlay's entries those of which it is not known what the runs have under their keys, since these could not be
    /// read: the accounts of the segments lag behind by that.
    pub(crate) uncounted: Overlay,
}

impl Version {
    /// What the runs alone hold: every commit up to `seq`.
    pub(crate) fn of_runs(seq: Seq, runs: Vec<Arc<Run>>) -> Self {
        Self {
            hold: Arc::new(()),
            seq,
            overlay: Overlay::default(),
            frozen: Overlay::default(),
            runs: runs.into(),
            uncounted: Overlay::default(),
        }
    }

    /// The latest entry of a key: a put, a delete, or nothing at all.
    pub(crate) fn lookup(&self, key: &[u8]) -> Result<Option<Arc<IndexEntry>>> {
        let key = HashedKey::new(key);
        match self.latest(&key) {
            Some(entry) => Ok(Some(Arc::clone(entry))),
            None => Ok(self.in_runs(&key, Run::get)?.map(Arc::new)),
        }
    }

    /// What the runs alone have under a key.
    pub(crate) fn lookup_in_runs(&self, key: &[u8]) -> Result<Option<IndexEntry>> {
        self.in_runs(&HashedKey::new(key), Run::get)
    }

    /// The entry under a key, if it leads to a value.
    pub(crate) fn get(&self, key: &[u8]) -> Result<Option<Arc<IndexEntry>>> {
        Ok(self.lookup(key)?.filter(|entry| entry.kind == IndexKind::Put))
    }

    /// Whether a key leads to a value. Takes no memory.
    pub(crate) fn contains(&self, key: &[u8]) -> Result<bool> {
        let key = HashedKey::new(key);
        let kind = match self.latest(&key) {
            Some(entry) => Some(entry.kind),
            None => self.in_runs(&key, Run::kind)?,
        };
        Ok(kind == Some(IndexKind::Put))
    }

    /// What the overlays know of a key.
    fn latest(&self, key: &HashedKey<'_>) -> Option<&Arc<IndexEntry>> {
        self.overlay.get(key).or_else(|| self.frozen.get(key))
    }

    /// What the newest run that knows a key says of it. Reads a cache line of each run that does not, and a few of the one
    /// that does.
    fn in_runs<T>(
        &self,
        key: &HashedKey<'_>,
        ask: impl Fn(&Run, &HashedKey<'_>) -> Result<Option<T>>,
    ) -> Result<Option<T>> {
        // Most keys are in the oldest run: so all are needed, and what is fetched at the same time is waited for once.
        if self.runs.len() > 1 {
            self.runs.iter().for_each(|run| run.fetch(key));
        }
        for run in &*self.runs {
            if let Some(found) = ask(run, key)? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// Up to `limit` living entries in key order from `from` on, of keys that begin with `prefix`.
    pub(crate) fn page(&self, prefix: &[u8], from: Bound<&[u8]>, limit: usize) -> Result<Vec<Arc<IndexEntry>>> {
        let start = match from {
            Bound::Unbounded => Bound::Included(prefix),
            Bound::Included(key) | Bound::Excluded(key) if key < prefix => Bound::Included(prefix),
            bound => bound,
        };
        let overlays = [&self.overlay, &self.frozen];
        let mut page = Vec::new();
        for entry in merge_layers(&overlays, &self.runs, start)? {
            let entry = entry?;
            if !entry.key.starts_with(prefix) {
                break;
            }
            if entry.kind == IndexKind::Put {
                page.push(entry);
                if page.len() == limit {
                    break;
                }
            }
        }
        Ok(page)
    }

    /// The latest entry of every key, deletes included, in order.
    pub(crate) fn entries(&self) -> Result<impl Iterator<Item = Result<Arc<IndexEntry>>> + '_> {
        merge_layers(&[&self.overlay, &self.frozen], &self.runs, Bound::Unbounded)
    }

    /// How many entries all layers hold, older versions of a key and deletes counted too: an upper bound of the keys.
    pub(crate) fn entries_at_most(&self) -> u64 {
        (self.overlay.len() + self.frozen.len()) as u64 + self.runs.iter().map(|run| run.entries()).sum::<u64>()
    }
}
