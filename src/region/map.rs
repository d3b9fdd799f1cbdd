//! The mapped regions of files, by file and range, within a budget of bytes.
//!
//! # Overlap
//! A request that lies in a region is served by it. Any other request gets a region of exactly its own range, and every
//! region that it overlaps has to go first, so that no byte of a file is ever in two places. A region in use cannot go:
//! the request is then refused.
//!
//! # Invariants
//! - Regions of one file never overlap.
//! - The regions together are never more than the budget.
//! - A region that is pinned or dirty is never evicted: unpin it, flush it.
//! - A change that was made while a flush ran leaves the region dirty.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Instant;

use super::lru::{Lru, LruKey};

/// A file, by a number that its keeper gave it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId(pub u64);

/// Names a region of a [`RegionMap`] until it is evicted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RegionId(LruKey);

/// A range of a file that is mapped.
#[derive(Debug)]
pub struct Region<T> {
    file: FileId,
    range: Range<u64>,
    payload: T,
    pins: usize,
    /// Counts the changes to the region's bytes, and how many of them a flush brought to the file.
    changes: u64,
    flushed: u64,
    uses: u64,
    last_use: Instant,
}

impl<T> Region<T> {
    /// The file.
    pub fn file(&self) -> FileId {
        self.file
    }

    /// Its bytes in the file.
    pub fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    /// What the caller keeps for it: its memory.
    pub fn payload(&self) -> &T {
        &self.payload
    }

    /// Whether it was changed since it was last flushed.
    pub fn is_dirty(&self) -> bool {
        self.changes != self.flushed
    }

    /// How often it was changed: what [`RegionMap::cleaned`] is told of a flush that began now.
    pub fn changes(&self) -> u64 {
        self.changes
    }

    /// Whether somebody uses it.
    pub fn is_pinned(&self) -> bool {
        self.pins > 0
    }

    /// How often it was mapped or touched.
    pub fn uses(&self) -> u64 {
        self.uses
    }

    /// When it was last mapped or touched.
    pub fn last_use(&self) -> Instant {
        self.last_use
    }

    fn len(&self) -> u64 {
        self.range.end - self.range.start
    }
}

/// How a range comes to be mapped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RegionPlan {
    /// This region has all of it.
    Hit(RegionId),
    /// It is to be admitted once these regions, flushed where they are dirty, have been evicted.
    Admit {
        /// Those that overlap it first, then those unused for longest.
        evict: Vec<RegionId>,
    },
}

/// Why a range cannot be mapped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RegionRefusal {
    /// It overlaps a region that is pinned.
    InUse(Range<u64>),
    /// It is more than evicting everything that is not pinned would leave.
    Memory {
        /// The bytes that it takes.
        needed: u64,
        /// The budget without what is pinned.
        available: u64,
    },
}

/// Why a region was not evicted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EvictRefused {
    /// There is no such region.
    Unknown,
    /// It is pinned.
    Pinned,
    /// It is dirty.
    Dirty,
}

/// The regions that are mapped.
#[derive(Debug)]
pub struct RegionMap<T> {
    regions: Lru<Region<T>>,
    by_start: BTreeMap<(FileId, u64), RegionId>,
    budget_bytes: u64,
    mapped_bytes: u64,
    pinned_bytes: u64,
}

impl<T> RegionMap<T> {
    /// No regions, and room for this many bytes of them.
    pub fn new(budget_bytes: u64) -> Self {
        let (regions, by_start) = (Lru::new(), BTreeMap::new());
        Self { regions, by_start, budget_bytes, mapped_bytes: 0, pinned_bytes: 0 }
    }

    /// How many regions there are.
    pub fn len(&self) -> usize {
        self.regions.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    /// Their bytes together.
    pub fn mapped_bytes(&self) -> u64 {
        self.mapped_bytes
    }

    /// The bytes of those that are pinned.
    pub fn pinned_bytes(&self) -> u64 {
        self.pinned_bytes
    }

    /// A region.
    pub fn get(&self, id: RegionId) -> Option<&Region<T>> {
        self.regions.get(id.0)
    }

    /// All regions, the one unused for longest first.
    pub fn iter(&self) -> impl Iterator<Item = (RegionId, &Region<T>)> {
        self.regions.iter().map(|(key, region)| (RegionId(key), region))
    }

    /// The region that has all of a range.
    pub fn lookup(&self, file: FileId, range: &Range<u64>) -> Option<RegionId> {
        let (_, &id) = self.by_start.range((file, 0)..=(file, range.start)).next_back()?;
        (range.end <= self.region(id).range.end).then_some(id)
    }

    /// The regions that share a byte with a range, in the order of the file.
    pub fn overlapping(&self, file: FileId, range: &Range<u64>) -> Vec<RegionId> {
        if range.start >= range.end {
            return Vec::new();
        }
        let before = self.by_start.range((file, 0)..(file, range.start)).next_back();
        let before = before.map(|(_, &id)| id).filter(|&id| range.start < self.region(id).range.end);
        let inside = self.by_start.range((file, range.start)..(file, range.end)).map(|(_, &id)| id);
        before.into_iter().chain(inside).collect()
    }

    /// How a range comes to be mapped. Changes nothing.
    ///
    /// # Errors
    /// A [`RegionRefusal`] where regions in use stand in the way.
    pub fn plan(&self, file: FileId, range: &Range<u64>) -> Result<RegionPlan, RegionRefusal> {
        if let Some(id) = self.lookup(file, range) {
            return Ok(RegionPlan::Hit(id));
        }
        let mut evict = self.overlapping(file, range);
        if let Some(pinned) = evict.iter().map(|&id| self.region(id)).find(|region| region.is_pinned()) {
            return Err(RegionRefusal::InUse(pinned.range()));
        }
        let needed = range.end.saturating_sub(range.start);
        let available = self.budget_bytes - self.pinned_bytes;
        if needed > available {
            return Err(RegionRefusal::Memory { needed, available });
        }
        let overlapping = evict.len();
        let mut kept = self.mapped_bytes - evict.iter().map(|&id| self.region(id).len()).sum::<u64>();
        for (id, region) in self.iter() {
            if kept <= self.budget_bytes - needed {
                break;
            }
            if !region.is_pinned() && !evict[..overlapping].contains(&id) {
                kept -= region.len();
                evict.push(id);
            }
        }
        Ok(RegionPlan::Admit { evict })
    }

    /// Adds a region, clean and not pinned, as the one used last.
    ///
    /// # Panics
    /// If it has no bytes, overlaps another or does not fit: [`plan`](Self::plan) was not followed.
    pub fn admit(&mut self, file: FileId, range: Range<u64>, payload: T, now: Instant) -> RegionId {
        assert!(range.start < range.end, "a region has bytes");
        assert!(self.overlapping(file, &range).is_empty(), "{range:?} of {file:?} overlaps a region");
        let len = range.end - range.start;
        assert!(len <= self.budget_bytes - self.mapped_bytes, "{len} bytes do not fit");
        self.mapped_bytes += len;
        let start = range.start;
        let region = Region { file, range, payload, pins: 0, changes: 0, flushed: 0, uses: 1, last_use: now };
        let id = RegionId(self.regions.insert(region));
        self.by_start.insert((file, start), id);
        id
    }

    /// Takes a region out and hands its memory back.
    ///
    /// # Errors
    /// [`EvictRefused`] where it is pinned or dirty; nothing has changed then.
    pub fn evict(&mut self, id: RegionId) -> Result<T, EvictRefused> {
        match self.get(id) {
            None => Err(EvictRefused::Unknown),
            Some(region) if region.is_pinned() => Err(EvictRefused::Pinned),
            Some(region) if region.is_dirty() => Err(EvictRefused::Dirty),
            Some(_) => {
                let region = self.regions.remove(id.0).expect("it was just found");
                self.by_start.remove(&(region.file, region.range.start));
                self.mapped_bytes -= region.len();
                Ok(region.payload)
            }
        }
    }

    /// Makes a region the one used last. Like all calls below, `false` where there is no such region.
    pub fn touch(&mut self, id: RegionId, now: Instant) -> bool {
        self.change(id, |region| {
            region.uses += 1;
            region.last_use = now;
        }) && self.regions.touch(id.0)
    }

    /// Keeps a region from being evicted, once more.
    pub fn pin(&mut self, id: RegionId) -> bool {
        let mut newly = 0;
        let known = self.change(id, |region| {
            newly = if region.pins == 0 { region.len() } else { 0 };
            region.pins += 1;
        });
        self.pinned_bytes += newly;
        known
    }

    /// Takes one pin back; `false` where there is none.
    pub fn unpin(&mut self, id: RegionId) -> bool {
        let mut freed = 0;
        let mut was_pinned = false;
        self.change(id, |region| {
            was_pinned = region.pins > 0;
            region.pins = region.pins.saturating_sub(1);
            freed = if was_pinned && region.pins == 0 { region.len() } else { 0 };
        });
        self.pinned_bytes -= freed;
        was_pinned
    }

    /// The region's bytes were changed, or are about to be.
    pub fn mark_dirty(&mut self, id: RegionId) -> bool {
        self.change(id, |region| region.changes += 1)
    }

    /// The region is in its file as it was after this many [`changes`](Region::changes).
    pub fn cleaned(&mut self, id: RegionId, changes: u64) -> bool {
        self.change(id, |region| region.flushed = region.flushed.max(changes.min(region.changes)))
    }

    fn change(&mut self, id: RegionId, change: impl FnOnce(&mut Region<T>)) -> bool {
        self.regions.get_mut(id.0).map(change).is_some()
    }

    fn region(&self, id: RegionId) -> &Region<T> {
        self.get(id).expect("the map by starts names regions that exist")
    }
}

#[cfg(test)]
mod tests;
