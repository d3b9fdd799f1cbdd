//! Fetches ahead what gets in the order of the disk will ask for next. Gets tell where they read; the scheduler says what to
//! fetch; one thread brings it into slots of device memory, as any read is brought; and a get whose value lies in slots is
//! handed their bytes. It knows segments and extents, and no keys: which extent a key leads to is the index's to say.
//!
//! # Invariants
//! - A slot holds blocks of the published part of one segment, told by number and salt. Nobody writes to those again, so no
//!   version is held while a slot is filled or kept; where blocks are given back, no key leads to them any more.
//! - What a slot holds is a guess until its checksum was compared, by whoever takes it. A get that cannot be served, for
//!   whatever reason, reads for itself and tells its own error.
//! - Device memory: [`PrefetchConfig::memory_bytes`] for each device, whatever is read.
//! - A slot that somebody copies from is not filled; who fills one waits for those who copy. Nobody waits for a slot under
//!   the lock of the state, and who waits for one that is being filled holds nothing.
//! - The thread begins with the first extent to fetch and ends with the store. A fill that is stuck keeps its slot and
//!   whatever else it uses; nobody waits for it longer than the store's deadline.

mod config;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use alight_format::{Salt, SegmentId, limits};
use parking_lot::{Condvar, Mutex, RwLock};

pub use config::PrefetchConfig;

use crate::config::PREFETCHED_CACHED_BYTES_MIN;
use crate::device::{Device, DeviceBuffer};
use crate::error::{Error, Result};
use crate::io::{Extent, ReadPlan, Routes, execute};
use crate::metrics::Counters;
use crate::prefetch::line::{Line, STRETCH_BYTES};
use crate::prefetch::{Prefetch, PrefetchOptions, PrefetchScheduler, PrefetchStats, RangeLookup, SlotId, SlotState};
use crate::store::read::{open_segment_file, segment_file};
use crate::store::segment::Segments;

/// How long what was asked for may wait for the thread. Long: what is not wanted any more is dropped by the next get.
const PATIENCE: Duration = Duration::from_secs(60);

/// The slots of one store, and the thread that fills them.
pub(crate) struct Prefetcher {
    shared: Arc<Shared>,
}

/// What the thread and those who get share.
struct Shared {
    config: PrefetchConfig,
    routes: Arc<Routes>,
    counters: Arc<Counters>,
    deadline: Option<Duration>,
    /// Whether nothing is wanted any more: asked before every read of a fill.
    closed: AtomicBool,
    state: Mutex<State>,
    /// Told to the thread when there is something to fetch, or nothing ever again.
    work: Condvar,
    /// Told to all who wait for a slot whenever one has been filled, or not.
    settled: Condvar,
}

#[derive(Default)]
struct State {
    tracks: Vec<Track>,
    thread: Thread,
    /// Which track is asked first for something to fetch.
    turn: usize,
    /// Tracks made so far.
    tracks_made: u64,
    /// The counts of tracks that are gone.
    past: PrefetchStats,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Thread {
    /// Nothing was ever to be fetched.
    #[default]
    Unborn,
    Idle,
    Busy,
    /// The system gave none; it is not asked again.
    Refused,
}

/// A segment, told from any other that ever had its number.
type Identity = (SegmentId, Salt);

/// What is known of the reads to one device.
struct Track {
    device: Device,
    /// Tells it from an earlier one of the same device.
    number: u64,
    /// Those that the last get read from.
    segments: Arc<Segments>,
    line: Line<Identity>,
    scheduler: PrefetchScheduler,
    slots: Vec<Arc<Slot>>,
    /// Whether a fill is on its way that somebody waited for in vain. Until it ends, nobody asks here.
    is_stuck: bool,
}

/// The memory of a slot: taken when it is first filled, kept until the store is closed.
type Slot = RwLock<Option<DeviceBuffer>>;

/// Bytes in a slot.
pub(crate) type Part<'s> = (&'s DeviceBuffer, Range<u64>);

impl Prefetcher {
    pub(crate) fn new(
        config: PrefetchConfig,
        routes: Arc<Routes>,
        counters: Arc<Counters>,
        deadline: Option<Duration>,
    ) -> Self {
        let (closed, state, work, settled) = Default::default();
        Self { shared: Arc::new(Shared { config, routes, counters, deadline, closed, state, work, settled }) }
    }

    /// Takes note of a get, and has fetched what is expected after it. Where all of the extent is in slots on the device, or
    /// soon will be, hands their parts to `take`, in order; `None` where it has to be read. Waits for what is being filled.
    ///
    /// The bytes are as they came: `take` compares them with their checksum.
    pub(crate) fn serve<T>(
        &self,
        segments: &Arc<Segments>,
        extent: &Extent,
        device: &Device,
        take: impl FnOnce(&[Part<'_>]) -> T,
    ) -> Option<T> {
        let shared = &self.shared;
        if extent.length == 0 || extent.length > shared.config.slot_bytes {
            return None;
        }
        let segment = segments.get(extent.segment)?;
        // Not where it was sealed: the last commits before that may still be on their way to the disk.
        let end = segment.accounting.lock().end;
        if extent.end() > end || end > STRETCH_BYTES {
            return None;
        }
        // Before the lock: where the kernels are not loaded yet, that takes a while.
        if !device.is_host() && !device.has_kernels() {
            return None;
        }
        if extent.length < PREFETCHED_CACHED_BYTES_MIN
            && open_segment_file(segments, extent.segment)
                .is_some_and(|file| file.is_resident(extent.offset, extent.length))
        {
            return None;
        }
        let mut state = shared.state.lock();
        if shared.closed.load(Ordering::Relaxed) {
            return None;
        }
        let (number, range) = {
            let track = state.track(device, &shared.config, segments, (segment.id, segment.salt))?;
            if track.is_stuck {
                return None;
            }
            let start = track.line.start_of((segment.id, segment.salt))?;
            let range = start + extent.offset..start + extent.end();
            let lookup = track.scheduler.lookup_range(range.clone());
            let made = track.scheduler.access_within(range.clone(), start..start + end, Instant::now());
            let number = track.number;
            if made > 0 {
                shared.wake(&mut state);
            }
            if lookup == RangeLookup::Miss {
                return None;
            }
            (number, range)
        };
        let since = Instant::now();
        let held = loop {
            let track = state.tracks.iter_mut().find(|track| track.number == number && !track.is_stuck)?;
            let held = track.scheduler.held(range.clone())?;
            let is_ready = |prefetch: &Prefetch| track.scheduler.state(prefetch.slot) == Some(SlotState::Ready);
            if held.iter().all(is_ready) {
                let part = |prefetch: Prefetch| {
                    let (from, to) = (range.start.max(prefetch.range.start), range.end.min(prefetch.range.end));
                    let slot = Arc::clone(&track.slots[prefetch.slot.index()]);
                    (slot, from - prefetch.range.start..to - prefetch.range.start)
                };
                break held.into_iter().map(part).collect::<Vec<_>>();
            }
            let left = shared.deadline.map(|deadline| deadline.saturating_sub(since.elapsed()));
            match left {
                None => shared.settled.wait(&mut state),
                Some(left) if !left.is_zero() => drop(shared.settled.wait_for(&mut state, left)),
                Some(_) => {
                    tracing::warn!("what is fetched ahead makes no progress; gets read for themselves until it does");
                    track.is_stuck = true;
                    return None;
                }
            }
        };
        // Nobody fills a slot that is ready: these are had at once, and keep it so.
        let guards: Vec<_> = held.iter().map(|(slot, _)| slot.read()).collect();
        drop(state);
        let parts: Option<Vec<Part<'_>>> =
            guards.iter().zip(&held).map(|(guard, (_, range))| Some((guard.as_ref()?, range.clone()))).collect();
        parts.map(|parts| take(&parts))
    }

    /// What came of it since the store was opened.
    pub(crate) fn stats(&self) -> PrefetchStats {
        self.shared.state.lock().stats()
    }

    /// Fetches nothing more, and lets go of every slot. Waits for nothing: what is being read ends by itself, before its next
    /// read of the file, and frees what it uses.
    pub(crate) fn close(&self) {
        let mut state = self.shared.state.lock();
        self.shared.closed.store(true, Ordering::Relaxed);
        state.tracks.iter_mut().for_each(|track| track.scheduler.reset());
        state.past = state.stats();
        state.tracks.clear();
        drop(state);
        self.shared.work.notify_all();
        self.shared.settled.notify_all();
    }

    /// Waits until everything that is to be fetched has been, or has failed.
    #[cfg(test)]
    pub(crate) fn wait_until_idle(&self) {
        let mut state = self.shared.state.lock();
        while state.thread == Thread::Busy {
            self.shared.settled.wait(&mut state);
        }
    }
}

impl State {
    /// The track of a device, with room on its line for a segment; `None` where that segment does not come first.
    fn track(
        &mut self,
        device: &Device,
        config: &PrefetchConfig,
        segments: &Arc<Segments>,
        identity: Identity,
    ) -> Option<&mut Track> {
        let index = match self.tracks.iter().position(|track| track.device == *device) {
            Some(index) => index,
            None => {
                let slots = (0..config.slots).map(|_| Arc::default()).collect();
                self.begin(device, config, segments, slots)
            }
        };
        let index = if self.tracks[index].line.start_of(identity).is_none() {
            // The line is full: a new one, over the same memory.
            let mut gone = self.tracks.swap_remove(index);
            gone.scheduler.reset();
            self.past += gone.scheduler.stats();
            self.begin(device, config, segments, gone.slots)
        } else {
            index
        };
        let track = &mut self.tracks[index];
        if !Arc::ptr_eq(&track.segments, segments) {
            track.segments = Arc::clone(segments);
        }
        Some(track)
    }

    fn begin(
        &mut self,
        device: &Device,
        config: &PrefetchConfig,
        segments: &Arc<Segments>,
        slots: Vec<Arc<Slot>>,
    ) -> usize {
        let (number, scheduler) = (self.tracks_made, PrefetchScheduler::new(config.options()));
        let (device, segments, line) = (device.clone(), Arc::clone(segments), Line::new());
        self.tracks_made += 1;
        self.tracks.push(Track { device, number, segments, line, scheduler, slots, is_stuck: false });
        self.tracks.len() - 1
    }

    /// The next thing to fetch, of each device in turn.
    fn next(&mut self, now: Instant) -> Option<Fill> {
        for _ in 0..self.tracks.len() {
            self.turn = (self.turn + 1) % self.tracks.len();
            let track = &mut self.tracks[self.turn];
            let Some(Prefetch { slot, range }) = track.scheduler.next(now) else { continue };
            let Some((identity, offset)) = track.line.file_at(range.start) else {
                track.scheduler.failed(slot);
                continue;
            };
            return Some(Fill {
                track: track.number,
                id: slot,
                device: track.device.clone(),
                slot: Arc::clone(&track.slots[slot.index()]),
                segments: Arc::clone(&track.segments),
                identity,
                range: offset..offset + (range.end - range.start),
            });
        }
        None
    }

    fn stats(&self) -> PrefetchStats {
        let mut stats = self.past;
        self.tracks.iter().for_each(|track| stats += track.scheduler.stats());
        stats
    }
}

impl Shared {
    /// Has the thread look for something to fetch.
    fn wake(self: &Arc<Self>, state: &mut State) {
        match state.thread {
            Thread::Busy | Thread::Refused => return,
            Thread::Idle => state.thread = Thread::Busy,
            Thread::Unborn => {
                let shared = Arc::clone(self);
                let spawned = thread::Builder::new().name("alight-prefetch".into()).spawn(move || shared.work());
                state.thread = match spawned {
                    Ok(_) => Thread::Busy,
                    Err(error) => {
                        tracing::warn!(%error, "no thread to fetch ahead");
                        Thread::Refused
                    }
                };
            }
        }
        self.work.notify_one();
    }

    /// The thread's life.
    fn work(&self) {
        let mut state = self.state.lock();
        while !self.closed.load(Ordering::Relaxed) {
            let Some(fill) = state.next(Instant::now()) else {
                state.thread = Thread::Idle;
                self.settled.notify_all();
                self.work.wait(&mut state);
                continue;
            };
            drop(state);
            let mut settles = Settles { shared: self, track: fill.track, slot: fill.id, filled: false };
            match fill.run(self) {
                Ok(()) => settles.filled = true,
                Err(error) => tracing::debug!(%error, "could not be fetched ahead"),
            }
            drop(settles);
            state = self.state.lock();
        }
        state.thread = Thread::Idle;
        self.settled.notify_all();
    }
}

/// An extent on its way to a slot.
struct Fill {
    track: u64,
    id: SlotId,
    device: Device,
    slot: Arc<Slot>,
    segments: Arc<Segments>,
    identity: Identity,
    /// Whole blocks of the segment.
    range: Range<u64>,
}

impl Fill {
    /// Reads it. Blocks until it is there.
    fn run(&self, shared: &Shared) -> Result<()> {
        // Who copies from the slot ends by himself.
        let mut slot = self.slot.write();
        let buffer = match &mut *slot {
            Some(buffer) => buffer,
            none => none.insert(self.device.allocate(shared.config.slot_bytes)?),
        };
        let (id, salt) = self.identity;
        let find = |id: SegmentId| {
            if shared.closed.load(Ordering::Relaxed) || self.segments.get(id).is_none_or(|now| now.salt != salt) {
                return Err(Error::Cancelled { operation: "fetch ahead", path: self.segments.path_of(id) });
            }
            segment_file(&self.segments, id)
        };
        let plan = ReadPlan::of_blocks(id, self.range.clone());
        execute(&plan, &[], &find, buffer, &shared.routes, &shared.counters).map(drop)
    }
}

/// Tells how a fill ended, in every way that it can end.
struct Settles<'s> {
    shared: &'s Shared,
    track: u64,
    slot: SlotId,
    filled: bool,
}

impl Drop for Settles<'_> {
    fn drop(&mut self) {
        let mut state = self.shared.state.lock();
        if let Some(track) = state.tracks.iter_mut().find(|track| track.number == self.track) {
            track.is_stuck = false;
            if self.filled {
                track.scheduler.filled(self.slot);
            } else {
                track.scheduler.failed(self.slot);
                // A rest: it takes a few gets for the pattern to show again.
                track.scheduler.reset();
            }
        }
        drop(state);
        self.shared.settled.notify_all();
    }
}

impl Drop for Prefetcher {
    fn drop(&mut self) {
        self.close();
    }
}

impl fmt::Debug for Prefetcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Prefetcher({:?}, {:?})", self.shared.config, self.stats())
    }
}

impl PrefetchConfig {
    /// What the scheduler is told.
    fn options(&self) -> PrefetchOptions {
        let Self { slots, slot_bytes, distance_bytes } = *self;
        let options = PrefetchOptions::new(slots, slot_bytes, distance_bytes, limits::BLOCK_BYTES);
        PrefetchOptions { deadline: PATIENCE, guess: false, ..options }
    }
}

#[cfg(test)]
mod tests;
