//! Keeps a store within a number of bytes: refuses what is over it, or evicts what was put first.
//!
//! # Invariants
//! - What is evicted is deleted by the very commit that needs the room: both happen, or neither does.
//! - Counted are the bytes of values that keys lead to, and what commits under way will add. What those will take counts for
//!   themselves alone: another may be published before. The space on the disk follows, as it does for whatever dies.
//! - A commit that is too large for the store when it is empty is refused, and evicts nothing.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use alight_format::{EntryKind, SegmentId, Seq};
use parking_lot::Mutex;

use crate::config::TOUCHED_KEYS_MAX;
use crate::error::{Error, Result};
use crate::index::Version;
use crate::metrics::Counters;
use crate::store::core::Core;
use crate::store::reclaim::{frame_at, leads_to};
use crate::store::segment::FIRST_FRAME;

/// What goes first when a store with [`max_bytes`](crate::StoreOptions::max_bytes) is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Eviction {
    /// What was put first. What compaction moved may go a little early or late.
    Fifo,
    /// What was put first and not read since it was last passed over (a second chance, as in CLOCK). That something was
    /// read is known for some million keys, and forgotten when the store is closed.
    Lru,
}

/// What a store may hold, and what commits under way will change.
pub(crate) struct Limit {
    max_bytes: u64,
    eviction: Option<Eviction>,
    state: Mutex<State>,
    /// Hashes of keys that were read since they were last passed over.
    touched: Mutex<HashSet<u64>>,
}

#[derive(Default)]
struct State {
    /// Bytes that commits under way will add.
    coming: u64,
    /// Keys that they evict.
    evicted: HashSet<Vec<u8>>,
    /// How far each segment was passed over.
    passed: HashMap<SegmentId, Passed>,
}

/// What follows the last frame of a segment that was passed over.
#[derive(Default)]
struct Passed {
    offset: u64,
    /// The next frame's values that were not passed over, in reverse, and as of which commit the first counts.
    next: Vec<(Vec<u8>, u64, u64, Seq)>,
}

/// Room that a commit has; let go once it is published, or failed.
pub(crate) struct Room {
    limit: Arc<Limit>,
    coming: u64,
    /// Keys that the commit is to delete for it.
    pub(crate) evicted: Vec<Vec<u8>>,
}

impl Drop for Room {
    fn drop(&mut self) {
        let mut state = self.limit.state.lock();
        state.coming -= self.coming;
        self.evicted.iter().for_each(|key| {
            state.evicted.remove(key);
        });
    }
}

fn hash_of(key: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    key.hash(&mut hasher);
    hasher.finish()
}

impl Limit {
    pub(crate) fn new(max_bytes: u64, eviction: Option<Eviction>) -> Self {
        Self { max_bytes, eviction, state: Mutex::default(), touched: Mutex::default() }
    }

    /// A key was read.
    pub(crate) fn touch(&self, key: &[u8]) {
        if self.eviction == Some(Eviction::Lru) {
            let mut touched = self.touched.lock();
            if touched.len() >= TOUCHED_KEYS_MAX {
                touched.clear();
            }
            touched.insert(hash_of(key));
        }
    }

    /// Whether a key was read since this was last asked.
    fn was_touched(&self, key: &[u8]) -> bool {
        self.eviction == Some(Eviction::Lru) && self.touched.lock().remove(&hash_of(key))
    }
}

impl Core {
    /// Finds room for a commit that puts and deletes these keys, each with the bytes that are put.
    pub(crate) fn make_room(&self, changes: &BTreeMap<Vec<u8>, u64>) -> Result<Option<Room>> {
        let writer = self.writer()?;
        let Some(limit) = &writer.limit else { return Ok(None) };
        let coming: u64 = changes.values().sum();
        if coming > limit.max_bytes {
            return Err(Error::Full { needed: coming, max_bytes: limit.max_bytes });
        }
        self.count_late()?;
        let mut state = limit.state.lock();
        let live = writer.live.load(Ordering::Acquire);
        let version = self.version();
        let mut going = 0;
        for key in changes.keys().filter(|key| !state.evicted.contains(*key)) {
            going += version.get(key)?.map_or(0, |entry| entry.length);
        }
        let held = (live + state.coming + coming).saturating_sub(going);
        let over = held.saturating_sub(limit.max_bytes);
        let mut evicted = Vec::new();
        // Deletes alone are always taken.
        if over > 0 && coming > 0 {
            if limit.eviction.is_none() {
                return Err(Error::Full { needed: coming, max_bytes: limit.max_bytes });
            }
            let full = Error::Full { needed: coming, max_bytes: limit.max_bytes };
            let outcome = self.evict(&version, limit, &mut state, changes, over, &mut evicted);
            if let Err(error) = outcome.and_then(|enough| if enough { Ok(()) } else { Err(full) }) {
                evicted.iter().for_each(|key| {
                    state.evicted.remove(key);
                });
                return Err(error);
            }
        }
        state.coming += coming;
        Counters::add(&self.counters.keys_evicted, evicted.len() as u64);
        Ok(Some(Room { limit: Arc::clone(limit), coming, evicted }))
    }

    /// Finds keys to evict, of `over` bytes together, and lists them; whether there were enough. Where it fails, those that
    /// were found are listed all the same.
    fn evict(
        &self,
        version: &Version,
        limit: &Limit,
        state: &mut State,
        changes: &BTreeMap<Vec<u8>, u64>,
        mut over: u64,
        evicted: &mut Vec<Vec<u8>>,
    ) -> Result<bool> {
        // Twice round: what was read has its second chance, what a failed commit passed over is found again.
        let mut rounds = 0;
        while over > 0 {
            match self.next_to_evict(version, limit, state)? {
                Some((key, length)) => {
                    if changes.contains_key(&key) || state.evicted.contains(&key) {
                        continue;
                    }
                    over = over.saturating_sub(length);
                    state.evicted.insert(key.clone());
                    evicted.push(key);
                }
                None if rounds < 2 => {
                    rounds += 1;
                    state.passed.clear();
                }
                None => return Ok(false),
            }
        }
        Ok(true)
    }

    /// The oldest value that lives and was not passed over yet.
    fn next_to_evict(&self, version: &Version, limit: &Limit, state: &mut State) -> Result<Option<(Vec<u8>, u64)>> {
        loop {
            let mut oldest: Option<(Seq, SegmentId)> = None;
            for segment in self.segments.all() {
                let end = segment.accounting.lock().end;
                if segment.is_condemned() {
                    continue;
                }
                let passed = state.passed.entry(segment.id).or_default();
                passed.offset = passed.offset.max(FIRST_FRAME);
                if passed.next.is_empty() && passed.offset < end {
                    let file = self.segments.file(&segment)?;
                    while passed.next.is_empty() && passed.offset < end {
                        let found = frame_at(&segment, &*file, passed.offset, end)?;
                        passed.offset = found.end();
                        let (seq, payload) = (found.prelude.seq, found.payload());
                        let puts = found.entries.into_iter().filter(|entry| entry.kind == EntryKind::Put).rev();
                        passed.next = puts
                            .map(|entry| {
                                let counts_from = entry.counts_from(seq);
                                (entry.key, payload + entry.offset, entry.length, counts_from)
                            })
                            .collect();
                    }
                }
                if let Some((_, _, _, seq)) = passed.next.last()
                    && oldest.is_none_or(|(least, _)| *seq < least)
                {
                    oldest = Some((*seq, segment.id));
                }
            }
            let Some((_, id)) = oldest else { return Ok(None) };
            let next = state.passed.get_mut(&id).and_then(|passed| passed.next.pop());
            let Some((key, offset, length, _)) = next else { return Ok(None) };
            if leads_to(version, &key, id, offset)? && !limit.was_touched(&key) {
                return Ok(Some((key, length)));
            }
        }
    }
}

/// The limit that options ask for.
pub(crate) fn of_options(max_bytes: Option<u64>, eviction: Option<Eviction>) -> Option<Arc<Limit>> {
    max_bytes.map(|max_bytes| Arc::new(Limit::new(max_bytes, eviction)))
}
