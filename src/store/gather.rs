//! Gathers what the frames of many segments say of each key, in no order of the commits, and gives the newest of each.
//!
//! # Invariants
//! - Memory does not grow with the keys: what does not fit is spilled as sorted runs, and merged at the end.
//! - Of two entries of one key the one of the later commit stands; of two that count as of the same commit, that whose frame
//!   was written later, since compaction wrote it; of two in one frame, the later.
//! - A spilled run is no part of any store: no manifest names it, and it is removed when the gathering ends.

use std::collections::BTreeMap;
use std::iter::Peekable;
use std::ops::Bound;
use std::path::PathBuf;
use std::sync::Arc;

use alight_format::{IndexEntry, IndexKind, RunId, Seq, StoreId};

use crate::error::{Error, Result};
use crate::index::{NewRun, Run, write_run};
use crate::storage::Storage;
use crate::store::publish::index_entry;
use crate::store::recover::{Found, read_frame};
use crate::store::segment::Segments;

/// Tells the number of the commit whose frame an entry was read from.
pub(crate) type CommitOf<'a> = dyn Fn(&IndexEntry) -> Result<Seq> + 'a;

/// [`CommitOf`] by reading the frame that the entry names.
pub(crate) fn commit_of(segments: &Segments) -> impl Fn(&IndexEntry) -> Result<Seq> + '_ {
    |entry| {
        let (segment, file) = segments.file_of(entry.segment)?;
        let len_bytes = file.facts().map_err(Error::io("measure", &segment.path))?.len_bytes;
        // A frame that is broken by now loses against one that is not.
        Ok(read_frame(&segment, &*file, entry.frame_offset, len_bytes)?.map_or(Seq::ZERO, |found| found.prelude.seq))
    }
}

/// Offers everything that a commit did, and counts it in its segment's account.
pub(crate) fn offer(found: Found, gatherer: &mut Gatherer<'_>) -> Result<()> {
    let payload = found.payload();
    let Found { segment, prelude, entries, .. } = found;
    for entry in entries {
        let entry = index_entry(entry, prelude.seq, segment.id, prelude.offset, payload);
        let mut accounting = segment.accounting.lock();
        if entry.kind == IndexKind::Delete {
            accounting.newest_delete = accounting.newest_delete.max(entry.seq);
        } else if entry.segment == segment.id {
            accounting.put(entry.seq, entry.length);
        } else {
            // An alias: its key is told here alone, so this segment stays.
            accounting.newest_delete = Seq(u64::MAX);
        }
        drop(accounting);
        gatherer.offer(entry)?;
    }
    Ok(())
}

/// Where runs are spilled to.
pub(crate) struct Spill {
    pub(crate) storage: Arc<dyn Storage>,
    pub(crate) directory: PathBuf,
    pub(crate) store: StoreId,
    /// The first number of a run that nothing bears yet.
    pub(crate) next: RunId,
}

/// What was gathered so far.
pub(crate) struct Gatherer<'a> {
    spill: Spill,
    limit: usize,
    commit_of: &'a CommitOf<'a>,
    entries: BTreeMap<Vec<u8>, Arc<IndexEntry>>,
    runs: Vec<Run>,
    spilled: Vec<PathBuf>,
    offered: u64,
}

impl<'a> Gatherer<'a> {
    pub(crate) fn new(spill: Spill, limit: usize, commit_of: &'a CommitOf<'a>) -> Self {
        let (entries, runs, spilled) = (BTreeMap::new(), Vec::new(), Vec::new());
        Self { spill, limit, commit_of, entries, runs, spilled, offered: 0 }
    }

    /// Takes note of an entry, of which the index knows the place.
    pub(crate) fn offer(&mut self, entry: IndexEntry) -> Result<()> {
        self.offered += 1;
        let stands = match self.entries.get(&entry.key) {
            Some(known) => !is_later(known, &entry, self.commit_of)?,
            None => true,
        };
        if stands {
            self.entries.insert(entry.key.clone(), Arc::new(entry));
        }
        if self.entries.len() >= self.limit { self.spill() } else { Ok(()) }
    }

    /// How many entries the newest of all keys can be at most.
    pub(crate) fn keys_at_most(&self) -> u64 {
        self.entries.len() as u64 + self.runs.iter().map(Run::entries).sum::<u64>()
    }

    /// The next number that no spilled run bears.
    pub(crate) fn next_run(&self) -> RunId {
        self.spill.next
    }

    fn spill(&mut self) -> Result<()> {
        let id = self.spill.next;
        self.spill.next = RunId(id.get() + 1);
        let path = self.spill.directory.join(id.file_name());
        let unfinished = self.spill.directory.join(format!("{}.tmp", id.file_name()));
        self.spilled.extend([unfinished.clone(), path.clone()]);
        let directory = self.spill.directory.clone();
        let new = NewRun { store: self.spill.store, id, unfinished: &unfinished, path: &path, directory: &directory };
        let entries = std::mem::take(&mut self.entries);
        let expected = entries.len() as u64;
        let record = write_run(&*self.spill.storage, &new, expected, entries.into_values().map(Ok))?;
        if let Some(record) = record {
            self.runs.push(Run::open(&*self.spill.storage, &path, self.spill.store, &record)?);
        }
        Ok(())
    }

    /// The newest entry of every key, deletes included, in order.
    pub(crate) fn newest(&self) -> Newest<'_> {
        let memory: Layer<'_> = Box::new(self.entries.values().map(|entry| Ok(Arc::clone(entry))));
        let runs = self
            .runs
            .iter()
            .map(|run| -> Layer<'_> { Box::new(run.range(Bound::Unbounded).map(|entry| entry.map(Arc::new))) });
        let layers = runs.chain([memory]).map(Iterator::peekable).collect();
        Newest { layers, commit_of: self.commit_of }
    }
}

impl Drop for Gatherer<'_> {
    fn drop(&mut self) {
        self.runs.clear();
        for path in &self.spilled {
            match self.spill.storage.remove(path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    tracing::warn!(path = %path.display(), %error, "a spilled run could not be removed");
                }
                _ => {}
            }
        }
    }
}

/// Whether `a` stands though `b` came after it.
fn is_later(a: &IndexEntry, b: &IndexEntry, commit_of: &CommitOf<'_>) -> Result<bool> {
    if a.seq != b.seq {
        return Ok(a.seq > b.seq);
    }
    // The same entry told twice, by its frame and by an index run; or two of one frame.
    if (a.segment, a.frame_offset) == (b.segment, b.frame_offset) {
        return Ok(a.offset == b.offset);
    }
    Ok(commit_of(a)? > commit_of(b)?)
}

type Layer<'a> = Box<dyn Iterator<Item = Result<Arc<IndexEntry>>> + 'a>;

/// The iterator of [`Gatherer::newest`].
pub(crate) struct Newest<'a> {
    layers: Vec<Peekable<Layer<'a>>>,
    commit_of: &'a CommitOf<'a>,
}

impl Newest<'_> {
    fn advance(&mut self) -> Result<Option<Arc<IndexEntry>>> {
        let mut lowest: Option<Vec<u8>> = None;
        for layer in &mut self.layers {
            match layer.peek() {
                Some(Ok(entry)) if lowest.as_ref().is_none_or(|lowest| entry.key < *lowest) => {
                    lowest = Some(entry.key.clone());
                }
                Some(Err(_)) => return layer.next().transpose(),
                _ => {}
            }
        }
        let Some(key) = lowest else { return Ok(None) };
        let mut newest: Option<Arc<IndexEntry>> = None;
        for layer in &mut self.layers {
            let Some(entry) = layer.next_if(|entry| entry.as_ref().is_ok_and(|entry| entry.key == key)) else {
                continue;
            };
            let entry = entry?;
            let stands = match &newest {
                Some(known) => !is_later(known, &entry, self.commit_of)?,
                None => true,
            };
            if stands {
                newest = Some(entry);
            }
        }
        Ok(newest)
    }
}

impl Iterator for Newest<'_> {
    type Item = Result<Arc<IndexEntry>>;

    fn next(&mut self) -> Option<Self::Item> {
        self.advance().transpose()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use alight_format::{Dtype, SegmentId};

    use super::*;
    use crate::storage::sim::SimStorage;

    fn entry(key: u64, seq: u64, segment: u64) -> IndexEntry {
        let put = IndexEntry {
            key: format!("key {key:03}").into_bytes(),
            kind: IndexKind::Put,
            seq: Seq(seq),
            segment: SegmentId(segment),
            frame_offset: 4096,
            offset: 8192,
            length: 3,
            crc: 0,
            dtype: Dtype::U8,
            shape: vec![3],
            has_attributes: false,
        };
        if seq.is_multiple_of(5) { IndexEntry::tombstone(&put.key, put.seq, put.segment, 4096) } else { put }
    }

    /// Every limit from everything spilled at once to nothing spilled, entries in any order.
    #[test]
    fn the_newest_of_each_key_is_found_however_little_memory_there_is() {
        for limit in [1, 2, 7, 100, 10_000] {
            let sim = SimStorage::new();
            sim.create_dir(Path::new("/index")).unwrap();
            let spill = Spill {
                storage: Arc::new(sim.clone()),
                directory: "/index".into(),
                store: StoreId([1; 16]),
                next: RunId(4),
            };
            // Two entries that count as of the same commit differ by the commit that wrote them: here, by their segment.
            let commit_of = |entry: &IndexEntry| Ok(Seq(entry.segment.get() * 100));
            let mut gatherer = Gatherer::new(spill, limit, &commit_of);
            let mut expected: BTreeMap<Vec<u8>, (u64, u64)> = BTreeMap::new();
            for n in 0..600u64 {
                let (key, seq, segment) = (n * 7 % 41, 1 + n * 31 % 23, 1 + n * 13 % 5);
                let entry = entry(key, seq, segment);
                let newest = expected.entry(entry.key.clone()).or_default();
                *newest = (*newest).max((seq, segment));
                gatherer.offer(entry).unwrap();
            }
            let found: BTreeMap<Vec<u8>, (u64, u64)> = gatherer
                .newest()
                .map(|entry| entry.map(|entry| (entry.key.clone(), (entry.seq.get(), entry.segment.get()))).unwrap())
                .collect();
            assert_eq!(found, expected, "limit {limit}");
            assert!(gatherer.keys_at_most() >= 41);
            assert_eq!(!sim.files().is_empty(), limit <= 41, "limit {limit}");
            drop(gatherer);
            assert!(sim.files().is_empty(), "what was spilled is gone");
        }
    }
}
