//! Decides which extents of one file to fetch next, and keeps count of how that went. It moves nothing: the caller takes
//! a plan from [`PrefetchScheduler::next`], reads, and says [`filled`](PrefetchScheduler::filled) or
//! [`failed`](PrefetchScheduler::failed).
//!
//! # Invariants
//! - Extents that wait, are being filled or are ready never overlap: no byte is scheduled twice.
//! - A slot goes Idle → Filling → Ready → Idle, and comes back from every state; waiting and occupied extents together
//!   are never more than the slots.
//! - Nothing is scheduled past the end of the file, nor past the prefetch distance.
//! - A call that does not fit a slot's state changes nothing and answers `false`.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::ops::{AddAssign, Range};
use std::time::{Duration, Instant};

use super::pattern::{AccessPattern, PatternDetector};

/// Priorities of the nearest extent, by how sure the guess is; each further one is worth ten less.
const PRIORITY_SEQUENTIAL: u32 = 100;
const PRIORITY_STRIDED: u32 = 80;
const PRIORITY_GUESS: u32 = 50;
const PRIORITY_STEP: u32 = 10;

/// How long a request may wait for a slot before it is too late to be of use, when nothing else is asked for.
const DEADLINE: Duration = Duration::from_millis(100);

/// What a [`PrefetchScheduler`] may use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PrefetchOptions {
    /// Extents that may be waiting, on their way or ready at once.
    pub slots: usize,
    /// The most bytes of one extent.
    pub extent_bytes: u64,
    /// How many bytes past an access to fetch at most; 0 fetches nothing.
    pub distance_bytes: u64,
    /// Where extents begin and end, but for the end of the file: multiples of this. A power of two.
    pub alignment: u64,
    /// How long a request may wait for a slot.
    pub deadline: Duration,
    /// Whether the next extent is worth fetching while no pattern is known.
    pub guess: bool,
}

impl PrefetchOptions {
    /// Options with the deadline of the specification, 100 ms, and its guess of the next extent.
    pub fn new(slots: usize, extent_bytes: u64, distance_bytes: u64, alignment: u64) -> Self {
        Self { slots, extent_bytes, distance_bytes, alignment, deadline: DEADLINE, guess: true }
    }
}

/// One slot, by its number: an index into whatever the caller keeps for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotId(usize);

impl SlotId {
    /// The number, below the number of slots.
    pub fn index(self) -> usize {
        self.0
    }
}

/// What a slot is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SlotState {
    /// It can take an extent.
    #[default]
    Idle,
    /// Its extent is being read.
    Filling,
    /// Its extent is there.
    Ready,
}

/// An extent to be read into a slot, which is Filling from here on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prefetch {
    /// Where to read it to.
    pub slot: SlotId,
    /// Which bytes of the file.
    pub range: Range<u64>,
}

/// What the scheduler has of a byte.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lookup {
    /// It is in a slot.
    Hit(Prefetch),
    /// It is on its way to a slot.
    Late(Prefetch),
    /// It has to be read.
    Miss,
}

/// What the scheduler has of a whole range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RangeLookup {
    /// All of it is in slots.
    Hit,
    /// All of it is in slots or on its way to them.
    Late,
    /// Some of it has to be read.
    Miss,
}

/// What came of the prefetching so far. Counters only rise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct PrefetchStats {
    /// Lookups of a byte that was ready.
    pub hits: u64,
    /// Lookups of a byte that was not even on its way.
    pub misses: u64,
    /// Lookups of a byte that was on its way.
    pub late: u64,
    /// Extents that were fetched and never looked up.
    pub wasted: u64,
    /// Requests that found no slot within their deadline and were dropped.
    pub expired: u64,
    /// Requests that were made.
    pub scheduled: u64,
    /// Extents whose reading failed.
    pub failed: u64,
}

impl AddAssign for PrefetchStats {
    fn add_assign(&mut self, other: Self) {
        self.hits += other.hits;
        self.misses += other.misses;
        self.late += other.late;
        self.wasted += other.wasted;
        self.expired += other.expired;
        self.scheduled += other.scheduled;
        self.failed += other.failed;
    }
}

impl PrefetchStats {
    /// The share of lookups that were hits, 0 before the first.
    pub fn hit_rate(&self) -> f64 {
        let total = self.hits + self.misses + self.late;
        if total == 0 { 0.0 } else { self.hits as f64 / total as f64 }
    }
}

#[derive(Debug, Clone, Default)]
struct Slot {
    state: SlotState,
    /// Its extent, unless it is idle.
    range: Range<u64>,
    used: bool,
}

/// The most urgent first: highest priority, then earliest deadline, then the one that was asked for first.
type Urgency = (Reverse<u32>, Instant, u64);

/// Where an extent is.
#[derive(Debug, Clone, Copy)]
enum Holder {
    Waiting(Urgency),
    Slot(usize),
}

/// Decides what to prefetch for one reader of one file.
#[derive(Debug)]
pub struct PrefetchScheduler {
    options: PrefetchOptions,
    detector: PatternDetector,
    slots: Vec<Slot>,
    waiting: BTreeMap<Urgency, Range<u64>>,
    /// Every extent that waits or has a slot, by its first byte: its end and its holder.
    extents: BTreeMap<u64, (u64, Holder)>,
    requests_made: u64,
    stats: PrefetchStats,
}

impl PrefetchScheduler {
    /// A scheduler whose slots are idle.
    ///
    /// # Panics
    /// If there are no slots, an extent has no bytes, or the alignment is no power of two.
    pub fn new(options: PrefetchOptions) -> Self {
        assert!(options.slots > 0 && options.extent_bytes > 0, "prefetching needs a slot and an extent: {options:?}");
        assert!(options.alignment.is_power_of_two(), "{} is no alignment", options.alignment);
        Self {
            detector: PatternDetector::new(options.extent_bytes),
            slots: vec![Slot::default(); options.slots],
            waiting: BTreeMap::new(),
            extents: BTreeMap::new(),
            requests_made: 0,
            stats: PrefetchStats::default(),
            options,
        }
    }

    /// Takes note of a read of `range` in a file of `file_len` bytes, drops what is no longer expected to be read, and makes
    /// requests for what is. Answers how many it made.
    pub fn access(&mut self, range: Range<u64>, file_len: u64, now: Instant) -> usize {
        self.access_within(range, 0..file_len, now)
    }

    /// [`access`](Self::access) in a file that takes up these numbers, and not those from 0 on: so that one scheduler can
    /// follow a reader from file to file. Only what lies in them is expected to be read.
    pub fn access_within(&mut self, range: Range<u64>, file: Range<u64>, now: Instant) -> usize {
        self.detector.record(range.start, range.end.saturating_sub(range.start));
        let (wanted, priority) = self.predict(&range, file);
        self.drop_unwanted(&range, &wanted);
        self.request(&wanted, priority, now)
    }

    /// How the file is being read.
    pub fn pattern(&self) -> AccessPattern {
        self.detector.pattern()
    }

    /// What there is of the byte at `offset`. Counts as a hit, a late prefetch or a miss.
    pub fn lookup(&mut self, offset: u64) -> Lookup {
        if let Some((start, end, Holder::Slot(index))) = self.extent_at(offset) {
            let prefetch = Prefetch { slot: SlotId(index), range: start..end };
            let slot = &mut self.slots[index];
            slot.used = true;
            if slot.state == SlotState::Ready {
                self.stats.hits += 1;
                return Lookup::Hit(prefetch);
            }
            self.stats.late += 1;
            return Lookup::Late(prefetch);
        }
        self.stats.misses += 1;
        Lookup::Miss
    }

    /// What there is of all the bytes of a range. Counts as one hit, late prefetch or miss, and its extents as looked up,
    /// unless it is a miss.
    pub fn lookup_range(&mut self, range: Range<u64>) -> RangeLookup {
        let Some(held) = self.held(range) else {
            self.stats.misses += 1;
            return RangeLookup::Miss;
        };
        let mut ready = true;
        for prefetch in held {
            let slot = &mut self.slots[prefetch.slot.0];
            slot.used = true;
            ready &= slot.state == SlotState::Ready;
        }
        if ready {
            self.stats.hits += 1;
            return RangeLookup::Hit;
        }
        self.stats.late += 1;
        RangeLookup::Late
    }

    /// The extents that hold a range between them, in order, ready or on their way; `None` where a byte has none. Counts
    /// nothing.
    pub fn held(&self, range: Range<u64>) -> Option<Vec<Prefetch>> {
        let mut held = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let (start, end, Holder::Slot(index)) = self.extent_at(at)? else { return None };
            held.push(Prefetch { slot: SlotId(index), range: start..end });
            at = end;
        }
        Some(held)
    }

    /// The most urgent request that is in time and has a slot, which is Filling from here on; `None` where there is no such
    /// request, or no idle slot. Drops requests whose deadline has passed.
    pub fn next(&mut self, now: Instant) -> Option<Prefetch> {
        let expired: Vec<Urgency> = self.waiting.keys().filter(|(_, deadline, _)| *deadline < now).copied().collect();
        self.stats.expired += expired.len() as u64;
        expired.into_iter().for_each(|urgency| self.drop_waiting(urgency));
        let index = self.slots.iter().position(|slot| slot.state == SlotState::Idle)?;
        let (_, range) = self.waiting.pop_first()?;
        Some(self.occupy(index, range, false))
    }

    /// A slot for bytes that are needed now: an idle one, else one whose extent was used already, else the one furthest
    /// ahead. The range is cut short where it meets an extent that is ready or on its way. `None` while every slot is being
    /// filled, or where the first byte is in a slot.
    pub fn demand(&mut self, range: Range<u64>) -> Option<Prefetch> {
        let end = range.end.min(range.start.saturating_add(self.options.extent_bytes));
        // A wait for a slot that is being filled will end; a second slot for the same byte would break the invariant.
        if range.start >= end || matches!(self.extent_at(range.start), Some((.., Holder::Slot(_)))) {
            return None;
        }
        let slots = &self.slots;
        let of_state = |state| (0..slots.len()).filter(move |&index| slots[index].state == state);
        let best = |&index: &usize| (slots[index].used, slots[index].range.start);
        let index = of_state(SlotState::Idle).next().or_else(|| of_state(SlotState::Ready).max_by_key(best))?;
        self.release(SlotId(index));
        let waiting = self.overlapping(range.start..end, |holder| matches!(holder, Holder::Waiting(_)));
        for (_, holder) in waiting {
            if let Holder::Waiting(urgency) = holder {
                self.drop_waiting(urgency);
            }
        }
        let end = self.extents.range(range.start..end).next().map_or(end, |(&start, _)| start);
        let prefetch = self.occupy(index, range.start..end, true);
        if self.extents.len() > self.slots.len()
            && let Some((&least_urgent, _)) = self.waiting.last_key_value()
        {
            self.drop_waiting(least_urgent);
        }
        Some(prefetch)
    }

    /// A slot's extent is there: Filling → Ready.
    pub fn filled(&mut self, slot: SlotId) -> bool {
        match self.slots.get_mut(slot.0) {
            Some(slot) if slot.state == SlotState::Filling => slot.state = SlotState::Ready,
            _ => return false,
        }
        true
    }

    /// A slot's extent could not be read: Filling → Idle.
    pub fn failed(&mut self, slot: SlotId) -> bool {
        if self.state(slot) != Some(SlotState::Filling) {
            return false;
        }
        self.stats.failed += 1;
        self.vacate(slot.0);
        true
    }

    /// Nobody needs a slot's extent any more: Ready → Idle. One that was never looked up counts as wasted.
    pub fn release(&mut self, slot: SlotId) -> bool {
        if self.state(slot) != Some(SlotState::Ready) {
            return false;
        }
        self.stats.wasted += u64::from(!self.slots[slot.0].used);
        self.vacate(slot.0);
        true
    }

    /// Forgets the accesses, drops all requests and gives every ready slot back. What is on its way stays.
    pub fn reset(&mut self) {
        self.detector.reset();
        let waiting: Vec<Urgency> = self.waiting.keys().copied().collect();
        waiting.into_iter().for_each(|urgency| self.drop_waiting(urgency));
        for index in 0..self.slots.len() {
            self.release(SlotId(index));
        }
    }

    /// What a slot is doing; `None` where there is no such slot.
    pub fn state(&self, slot: SlotId) -> Option<SlotState> {
        self.slots.get(slot.0).map(|slot| slot.state)
    }

    /// How many slots are in this state.
    pub fn slots_in(&self, state: SlotState) -> usize {
        self.slots.iter().filter(|slot| slot.state == state).count()
    }

    /// What came of it so far.
    pub fn stats(&self) -> PrefetchStats {
        self.stats
    }

    /// Which ranges are expected to be read after this one, the nearest first, and what the first is worth.
    fn predict(&self, access: &Range<u64>, file: Range<u64>) -> (Vec<Range<u64>>, u32) {
        let PrefetchOptions { extent_bytes, distance_bytes, alignment, guess, .. } = self.options;
        let align_down = |offset: u64| offset & !(alignment - 1);
        let until = |end: u64| end.checked_next_multiple_of(alignment).map_or(file.end, |end| end.min(file.end));
        let next = align_down(access.end);
        let ahead = |bytes: u64| next..next.saturating_add(bytes).min(file.end);
        let (mut wanted, priority) = match self.detector.pattern() {
            AccessPattern::Sequential => (vec![ahead(distance_bytes)], PRIORITY_SEQUENTIAL),
            AccessPattern::Strided { stride } => {
                let len = (access.end - access.start).clamp(1, extent_bytes);
                let count = (distance_bytes / len).min(self.options.slots as u64);
                let steps = 1..=i64::try_from(count).unwrap_or(i64::MAX);
                let targets = steps.map_while(|step| access.start.checked_add_signed(stride.checked_mul(step)?));
                let targets = targets.take_while(|start| file.contains(start));
                (targets.map(|start| align_down(start)..until(start.saturating_add(len))).collect(), PRIORITY_STRIDED)
            }
            AccessPattern::Unknown if guess => (vec![ahead(extent_bytes.min(distance_bytes))], PRIORITY_GUESS),
            AccessPattern::Unknown | AccessPattern::Random => (Vec::new(), PRIORITY_GUESS),
        };
        wanted.retain(|range| range.start < range.end && distance_bytes > 0);
        (wanted, priority)
    }

    /// Drops requests for none of the wanted bytes, and ready extents that hold none of them nor of the access's.
    fn drop_unwanted(&mut self, access: &Range<u64>, wanted: &[Range<u64>]) {
        // A range of no bytes, somebody's read of nothing, shares none with an extent around it.
        let meets = |start: u64, end: u64, range: &Range<u64>| start.max(range.start) < end.min(range.end);
        let unwanted: Vec<Holder> = self
            .extents
            .iter()
            .filter(|&(&start, &(end, holder))| {
                let in_use = matches!(holder, Holder::Slot(_)) && meets(start, end, access);
                !in_use && !wanted.iter().any(|range| meets(start, end, range))
            })
            .map(|(_, &(_, holder))| holder)
            .collect();
        for holder in unwanted {
            match holder {
                Holder::Waiting(urgency) => self.drop_waiting(urgency),
                // One that is on its way stays; it is dropped once it is ready.
                Holder::Slot(index) => {
                    self.release(SlotId(index));
                }
            }
        }
    }

    /// Makes requests for what of these ranges is not scheduled yet, as far as there are slots.
    fn request(&mut self, wanted: &[Range<u64>], priority: u32, now: Instant) -> usize {
        let before = self.requests_made;
        let mut rank = 0u32;
        for range in wanted {
            let mut at = range.start;
            while at < range.end && self.extents.len() < self.slots.len() {
                if let Some((_, end, _)) = self.extent_at(at) {
                    at = end;
                } else {
                    let end = range.end.min(at.saturating_add(self.options.extent_bytes));
                    let end = self.extents.range(at..end).next().map_or(end, |(&start, _)| start);
                    let worth = priority.saturating_sub(rank.saturating_mul(PRIORITY_STEP));
                    let urgency = (Reverse(worth), now + self.options.deadline, self.requests_made);
                    self.requests_made += 1;
                    self.waiting.insert(urgency, at..end);
                    self.extents.insert(at, (end, Holder::Waiting(urgency)));
                    at = end;
                }
                rank = rank.saturating_add(1);
            }
        }
        let made = self.requests_made - before;
        self.stats.scheduled += made;
        // At most one for each slot.
        made as usize
    }

    /// The extent that holds the byte at `offset`.
    fn extent_at(&self, offset: u64) -> Option<(u64, u64, Holder)> {
        let (&start, &(end, holder)) = self.extents.range(..=offset).next_back()?;
        (offset < end).then_some((start, end, holder))
    }

    /// The extents that share a byte with a range, as far as their holder is wanted.
    fn overlapping(&self, range: Range<u64>, want: impl Fn(&Holder) -> bool) -> Vec<(u64, Holder)> {
        let first = self.extent_at(range.start).map_or(range.start, |(start, ..)| start);
        let inside = self.extents.range(first..range.end);
        inside.map(|(&start, &(_, holder))| (start, holder)).filter(|(_, holder)| want(holder)).collect()
    }

    fn occupy(&mut self, index: usize, range: Range<u64>, used: bool) -> Prefetch {
        self.extents.insert(range.start, (range.end, Holder::Slot(index)));
        self.slots[index] = Slot { state: SlotState::Filling, range: range.clone(), used };
        Prefetch { slot: SlotId(index), range }
    }

    fn vacate(&mut self, index: usize) {
        let slot = std::mem::take(&mut self.slots[index]);
        self.extents.remove(&slot.range.start);
    }

    fn drop_waiting(&mut self, urgency: Urgency) {
        if let Some(range) = self.waiting.remove(&urgency) {
            self.extents.remove(&range.start);
        }
    }
}

#[cfg(test)]
mod tests;
