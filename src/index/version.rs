//! One state of the whole index, immutable once published.

use std::any::Any;
use std::ops::Bound;
use std::sync::Arc;

use alight_format::{IndexEntry, IndexKind, Seq};

use crate::error::Result;
use crate::index::merge::merge_layers;
use crate::index::run::Run;

/// The latest commits by key: a persistent map, so that a snapshot is a clone that shares everything.
pub(crate) type Overlay = imbl::OrdMap<Arc<[u8]>, Arc<IndexEntry>>;

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
}

impl Version {
    /// What the runs alone hold: every commit up to `seq`.
    pub(crate) fn of_runs(seq: Seq, runs: Vec<Arc<Run>>) -> Self {
        Self { hold: Arc::new(()), seq, overlay: Overlay::default(), frozen: Overlay::default(), runs: runs.into() }
    }

    /// The latest entry of a key: a put, a delete, or nothing at all. Reads at most one block of each run.
    pub(crate) fn lookup(&self, key: &[u8]) -> Result<Option<Arc<IndexEntry>>> {
        if let Some(entry) = self.overlay.get(key).or_else(|| self.frozen.get(key)) {
            return Ok(Some(Arc::clone(entry)));
        }
        let Some((oldest, newer)) = self.runs.split_last() else { return Ok(None) };
        for run in newer {
            if let Some(entry) = run.get(key)? {
                return Ok(Some(Arc::new(entry)));
            }
        }
        // The oldest run is the largest by far, and what no newer one knows is most likely there.
        Ok(oldest.get_likely(key)?.map(Arc::new))
    }

    /// The entry under a key, if it leads to a value.
    pub(crate) fn get(&self, key: &[u8]) -> Result<Option<Arc<IndexEntry>>> {
        Ok(self.lookup(key)?.filter(|entry| entry.kind == IndexKind::Put))
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
