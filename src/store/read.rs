//! Answers from a version: finds where values lie, has them read and checked, and hands out views.

use std::io::Write;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use alight_format::{Entry, EntryKind, IndexEntry, SegmentId, crc32, limits};
use tracing::field::Empty;

use crate::config::WATCHED_BYTES_MIN;
use crate::device::{Device, DeviceBuffer};
use crate::error::{Damage, DisplayKey, Error, Result};
use crate::index::Version;
use crate::io::{
    Attempt, Extent, Outcome, ReadPlan, Routes, SegmentFile, Steps, Waited, execute, execute_cached, execute_one,
    hand_chunks, read_chunks_within,
};
use crate::metrics::Counters;
use crate::storage::{Arrival, StorageFile};
use crate::store::core::Core;
use crate::store::recover::read_frame;
use crate::store::segment::{Segment, Segments};
use crate::tensor::{Key, Tensor, TensorInfo, check_key};
use crate::trace::scope;

/// What is known of an index entry's value.
pub(crate) fn info_of(entry: &IndexEntry) -> Result<TensorInfo> {
    Ok(TensorInfo {
        key: Key::new(&entry.key)?,
        dtype: entry.dtype,
        shape: entry.shape.clone(),
        len_bytes: entry.length,
    })
}

pub(crate) fn extent_of(entry: &IndexEntry) -> Extent {
    Extent { segment: entry.segment, offset: entry.offset, length: entry.length, crc: entry.crc }
}

impl Core {
    /// The entry under a key.
    pub(crate) fn entry(&self, version: &Arc<Version>, key: &[u8]) -> Result<Arc<IndexEntry>> {
        check_key(key)?;
        if let Ok(writer) = self.writer()
            && let Some(limit) = &writer.limit
        {
            limit.touch(key);
        }
        self.look_up(version, key, Version::get)?.ok_or_else(|| Error::NotFound(DisplayKey::from(key)))
    }

    /// Reads the values of `entries` into one new arena on `device`.
    pub(crate) fn read_many(&self, entries: &[Arc<IndexEntry>], device: &Device) -> Result<Vec<Tensor>> {
        let planned = Planned::new(entries, device);
        let mut arena = device.allocate_to_be_filled(planned.plan.arena_bytes)?;
        self.read_planned(entries, &planned, &mut arena, None)?;
        let arena = Arc::new(arena);
        entries
            .iter()
            .zip(&planned.plan.arena_offsets)
            .map(|(entry, &offset)| Tensor::from_arena(entry.dtype, &entry.shape, &arena, offset, entry.length))
            .collect()
    }

    /// Reads the values of `entries` into memory that is there; answers where each lies.
    pub(crate) fn read_many_into(
        &self,
        entries: &[Arc<IndexEntry>],
        arena: &mut DeviceBuffer,
    ) -> Result<Vec<Range<u64>>> {
        let planned = Planned::new(entries, arena.device());
        let (needed, available) = (planned.plan.arena_bytes, arena.len_bytes());
        if needed > available {
            return Err(Error::ArenaTooSmall { needed, available });
        }
        self.read_planned(entries, &planned, arena, None)?;
        let place = |(extent, &offset): (&Extent, &u64)| offset..offset + extent.length;
        Ok(planned.extents.iter().zip(&planned.plan.arena_offsets).map(place).collect())
    }

    /// Reads what was planned for `entries` into an arena that is long enough, verified. Where somebody else may lose interest,
    /// `steps` says whether he has: asked before each read.
    pub(crate) fn read_planned(
        &self,
        entries: &[Arc<IndexEntry>],
        planned: &Arc<Planned>,
        arena: &mut DeviceBuffer,
        steps: Option<&Arc<Steps>>,
    ) -> Result<()> {
        let bytes = || planned.extents.iter().map(|extent| extent.length).sum::<u64>();
        let scope = scope!("get_many", keys = entries.len(), bytes = bytes(), route = Empty);
        let began = Instant::now();
        // Where there is nothing to read there is nothing to wait for.
        let deadline = self.deadline.filter(|_| !planned.plan.reads.is_empty());
        let outcome = match (self.read_cached(planned, arena, steps)?, deadline) {
            (Some(outcome), _) => outcome,
            (None, Some(deadline)) => self.read_in_time(planned, arena, deadline, steps)?,
            (None, None) => {
                let begin = |id| step(steps, &self.segments, id);
                planned.read(&self.segments, arena, &self.routes, &self.counters, begin)?
            }
        };
        if let Some(&first) = outcome.damaged.first() {
            Counters::add(&self.counters.checksum_failures, outcome.damaged.len() as u64);
            return Err(self.damaged_value(&entries[first]));
        }
        scope.record("route", outcome.read.route.name());
        self.counters.count_read(outcome.read, began.elapsed());
        Counters::add(&self.counters.gets, entries.len() as u64);
        Counters::add(&self.counters.bytes_got, bytes());
        Ok(())
    }

    /// Reads several values, short together, on this thread if they come out of the page cache.
    fn read_cached(
        &self,
        planned: &Planned,
        arena: &mut DeviceBuffer,
        steps: Option<&Arc<Steps>>,
    ) -> Result<Option<Outcome>> {
        let Planned { plan, extents } = planned;
        if plan.is_one_read() || plan.reads.is_empty() || plan.arena_bytes >= WATCHED_BYTES_MIN {
            return Ok(None);
        }
        step(steps, &self.segments, plan.reads[0].segment)?;
        execute_cached(plan, extents, |id| open_segment_file(&self.segments, id), arena, &self.counters)
    }

    /// Reads within the deadline: on this thread where one read brings everything and can be waited for, since another one would
    /// take 6 µs to wake.
    fn read_in_time(
        &self,
        planned: &Arc<Planned>,
        arena: &mut DeviceBuffer,
        deadline: Duration,
        steps: Option<&Arc<Steps>>,
    ) -> Result<Outcome> {
        if let Some((id, file)) = planned.open_file(&self.segments) {
            step(steps, &self.segments, id)?;
            match execute_one(&planned.plan, &planned.extents, &file, arena, Some(deadline), &self.counters)? {
                Attempt::Done(outcome) => return Ok(outcome),
                Attempt::Overdue => return Err(self.stuck_in(id, deadline)),
                Attempt::WouldWait => {}
            }
        }
        self.read_watched(planned, arena, deadline, steps)
    }

    /// Reads on a thread of its own, which has the arena meanwhile, and after the deadline keeps it.
    fn read_watched(
        &self,
        planned: &Arc<Planned>,
        arena: &mut DeviceBuffer,
        deadline: Duration,
        steps: Option<&Arc<Steps>>,
    ) -> Result<Outcome> {
        let steps = steps.map_or_else(|| self.watched.steps(), Arc::clone);
        let nothing = arena.device().allocate(0)?;
        let mut own = std::mem::replace(arena, nothing);
        let work = {
            let (planned, steps) = (Arc::clone(planned), Arc::clone(&steps));
            let (segments, routes, counters) =
                (Arc::clone(&self.segments), Arc::clone(&self.routes), Arc::clone(&self.counters));
            move || {
                let begin = |id| step(Some(&steps), &segments, id);
                let outcome = planned.read(&segments, &mut own, &routes, &counters, begin);
                (own, outcome)
            }
        };
        match self.watched.run(deadline, &steps, work) {
            Some((own, outcome)) => {
                *arena = own;
                outcome
            }
            None => Err(self.stuck_in(SegmentId(steps.place()), deadline)),
        }
    }

    /// Reads a value into host memory that is long enough.
    pub(crate) fn read_into(&self, entry: &IndexEntry, destination: &mut [u8]) -> Result<()> {
        let mut hasher = crc32fast::Hasher::new();
        self.read_in_order(entry, 0..entry.length, |at, bytes| {
            hasher.update(bytes);
            destination[at as usize..][..bytes.len()].copy_from_slice(bytes);
            Ok(())
        })?;
        if hasher.finalize() != entry.crc {
            Counters::add(&self.counters.checksum_failures, 1);
            return Err(self.damaged_value(entry));
        }
        self.count_get(entry.length);
        Ok(())
    }

    /// Reads a value and compares it with its checksum.
    pub(crate) fn check_value(&self, entry: &IndexEntry) -> Result<()> {
        let mut hasher = crc32fast::Hasher::new();
        self.read_in_order(entry, 0..entry.length, |_, bytes| {
            hasher.update(bytes);
            Ok(())
        })?;
        if hasher.finalize() == entry.crc { Ok(()) } else { Err(self.damaged_value(entry)) }
    }

    /// Hands a value on chunk by chunk, each verified first.
    pub(crate) fn read_to_writer(&self, entry: &IndexEntry, out: &mut dyn Write) -> Result<()> {
        let chunk_crcs = self.chunk_crcs(entry)?;
        self.read_in_order(entry, 0..entry.length, |at, bytes| {
            self.check_chunk(entry, &chunk_crcs, at, bytes)?;
            out.write_all(bytes).map_err(|source| Error::Io {
                action: "hand on the value of a key of",
                path: self.layout.root().to_path_buf(),
                source,
            })
        })?;
        self.count_get(entry.length);
        Ok(())
    }

    /// Reads the chunks that a range touches, verified, and keeps the range.
    pub(crate) fn read_range(&self, entry: &IndexEntry, range: Range<u64>) -> Result<Vec<u8>> {
        let chunk_crcs = self.chunk_crcs(entry)?;
        let mut bytes = Vec::with_capacity((range.end - range.start) as usize);
        if range.is_empty() {
            return Ok(bytes);
        }
        let chunks = range.start / limits::CHUNK_BYTES * limits::CHUNK_BYTES
            ..range.end.next_multiple_of(limits::CHUNK_BYTES).min(entry.length);
        self.read_in_order(entry, chunks, |at, chunk| {
            self.check_chunk(entry, &chunk_crcs, at, chunk)?;
            let from = range.start.max(at) - at;
            let to = range.end.min(at + chunk.len() as u64) - at;
            bytes.extend_from_slice(&chunk[from as usize..to as usize]);
            Ok(())
        })?;
        self.count_get(bytes.len() as u64);
        Ok(bytes)
    }

    /// The entry as the commit that put the value wrote it. On this thread where it is in the page cache.
    pub(crate) fn frame_entry(&self, entry: &IndexEntry) -> Result<Entry> {
        // A commit's frame lies before its values.
        let frame_len = entry.offset.saturating_sub(entry.frame_offset);
        let is_cached = || {
            open_segment_file(&self.segments, entry.segment)
                .is_some_and(|file| file.is_resident(entry.frame_offset, frame_len))
        };
        let Some(deadline) = self.deadline.filter(|_| !is_cached()) else {
            return frame_entry(&self.segments, entry);
        };
        let work = {
            let (segments, entry) = (Arc::clone(&self.segments), entry.clone());
            move || frame_entry(&segments, &entry)
        };
        let found = self.watched.run(deadline, &self.watched.steps(), work);
        found.unwrap_or_else(|| Err(self.stuck_in(entry.segment, deadline)))
    }

    /// The checksums of a value's chunks: the value's own where it is one chunk.
    fn chunk_crcs(&self, entry: &IndexEntry) -> Result<Vec<u32>> {
        if limits::chunk_count(entry.length) == 0 {
            return Ok(vec![entry.crc]);
        }
        Ok(self.frame_entry(entry)?.chunk_crcs)
    }

    fn stuck_in(&self, segment: SegmentId, deadline: Duration) -> Error {
        self.given_up("read", self.segments.path_of(segment), deadline)
    }

    fn check_chunk(&self, entry: &IndexEntry, chunk_crcs: &[u32], at: u64, bytes: &[u8]) -> Result<()> {
        if chunk_crcs.get((at / limits::CHUNK_BYTES) as usize) == Some(&crc32(bytes)) {
            return Ok(());
        }
        Counters::add(&self.counters.checksum_failures, 1);
        Err(self.damaged_value(entry))
    }

    /// Reads whole chunks of a value and hands them on in order, on this thread. Where they are many, or cannot be waited for,
    /// another thread reads.
    fn read_in_order(
        &self,
        entry: &IndexEntry,
        range: Range<u64>,
        mut hand_on: impl FnMut(u64, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let extent = extent_of(entry);
        let Some(deadline) = self.deadline else {
            let file = segment_file(&self.segments, entry.segment)?;
            return read_chunks_within(&file, &extent, range, None, &self.counters, hand_on).map(drop);
        };
        let mut range = range;
        if range.end - range.start < WATCHED_BYTES_MIN
            && let Some(file) = open_segment_file(&self.segments, entry.segment)
        {
            let (within, counters) = (Some(deadline), &self.counters);
            match read_chunks_within(&file, &extent, range.clone(), within, counters, &mut hand_on)? {
                (Arrival::Landed, _) => return Ok(()),
                (Arrival::Overdue, _) => return Err(self.stuck_in(entry.segment, deadline)),
                (Arrival::WouldWait, at) => range.start = at,
            }
        }
        let find = {
            let (segments, id) = (Arc::clone(&self.segments), entry.segment);
            move || segment_file(&segments, id)
        };
        match hand_chunks(&self.watched, deadline, find, &extent, range, &self.counters, hand_on)? {
            Waited::Done => Ok(()),
            Waited::Stuck => Err(self.stuck_in(entry.segment, deadline)),
        }
    }

    pub(crate) fn damaged_value(&self, entry: &IndexEntry) -> Error {
        Error::Damaged(Damage {
            path: self.layout.segment(entry.segment),
            offset: Some(entry.offset),
            key: Some(DisplayKey(entry.key.clone())),
            what: format!("{} bytes do not have the checksum they were put with", entry.length),
        })
    }

    pub(crate) fn count_get(&self, bytes: u64) {
        Counters::add(&self.counters.gets, 1);
        Counters::add(&self.counters.bytes_got, bytes);
    }
}

/// The read goes on, in a segment; an error where nobody waits for it, if anybody was to say so.
fn step(steps: Option<&Arc<Steps>>, segments: &Segments, id: SegmentId) -> Result<()> {
    if steps.is_none_or(|steps| steps.take(id.get())) {
        return Ok(());
    }
    Err(Error::Cancelled { operation: "read", path: segments.path_of(id) })
}

/// A read that is planned.
pub(crate) struct Planned {
    extents: Vec<Extent>,
    plan: ReadPlan,
}

impl Planned {
    pub(crate) fn new(entries: &[Arc<IndexEntry>], device: &Device) -> Arc<Planned> {
        let extents: Vec<Extent> = entries.iter().map(|entry| extent_of(entry)).collect();
        let plan = ReadPlan::new(&extents, device.is_host());
        Arc::new(Planned { extents, plan })
    }

    /// The file of the one read that it is, where that is open.
    fn open_file(&self, segments: &Segments) -> Option<(SegmentId, SegmentFile)> {
        let id = self.plan.reads.first().filter(|_| self.plan.is_one_read())?.segment;
        Some((id, open_segment_file(segments, id)?))
    }

    /// How long an arena it needs.
    pub(crate) fn arena_bytes(&self) -> u64 {
        self.plan.arena_bytes
    }

    /// Where in the arena a value begins, by its place among the entries.
    pub(crate) fn arena_offset(&self, index: usize) -> u64 {
        self.plan.arena_offsets[index]
    }

    /// Carries it out; `begin` is called with the segment before each read, or some short ones, and ends it where it fails.
    fn read(
        &self,
        segments: &Segments,
        arena: &mut DeviceBuffer,
        routes: &Routes,
        counters: &Counters,
        begin: impl Fn(SegmentId) -> Result<()> + Sync,
    ) -> Result<Outcome> {
        let find = |id| {
            begin(id)?;
            segment_file(segments, id)
        };
        execute(&self.plan, &self.extents, &find, arena, routes, counters)
    }
}

/// An entry as the commit that put the value wrote it.
fn frame_entry(segments: &Segments, entry: &IndexEntry) -> Result<Entry> {
    let (segment, file) = segments.file_of(entry.segment)?;
    let len_bytes = file.facts().map_err(Error::io("measure", &segment.path))?.len_bytes;
    let damaged = |what: &str| {
        Error::Damaged(Damage {
            path: segment.path.clone(),
            offset: Some(entry.frame_offset),
            key: Some(DisplayKey(entry.key.clone())),
            what: what.to_owned(),
        })
    };
    let frame = read_frame(&segment, &*file, entry.frame_offset, len_bytes)?
        .ok_or_else(|| damaged("the frame of the commit that put it is broken"))?;
    let payload = frame.payload();
    frame
        .entries
        .into_iter()
        .find(|found| found.kind == EntryKind::Put && payload + found.offset == entry.offset && found.crc == entry.crc)
        .ok_or_else(|| damaged("the frame that the index names does not hold it"))
}

/// The file of a segment that an index entry names, and how far it goes.
pub(crate) fn segment_file(segments: &Segments, id: SegmentId) -> Result<SegmentFile> {
    segments.file_of(id).map(|(segment, file)| of_segment(&segment, file))
}

/// [`segment_file`], where it is open already: asks the disk for nothing.
pub(crate) fn open_segment_file(segments: &Segments, id: SegmentId) -> Option<SegmentFile> {
    segments.open_file_of(id).map(|(segment, file)| of_segment(&segment, file))
}

fn of_segment(segment: &Segment, file: Arc<dyn StorageFile>) -> SegmentFile {
    SegmentFile { file, path: Arc::new(segment.path.clone()), sealed_end: segment.sealed_end() }
}

/// Refuses a range that a value does not have.
pub(crate) fn check_range(entry: &IndexEntry, range: &Range<u64>) -> Result<()> {
    if range.start > range.end || range.end > entry.length {
        return Err(Error::RangeOutOfBounds {
            key: DisplayKey(entry.key.clone()),
            start: range.start,
            end: range.end,
            len_bytes: entry.length,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
