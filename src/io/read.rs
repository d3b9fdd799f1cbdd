//! Carries out a read plan: several reads at once, each checked while it is hot, straight into host memory or through
//! pinned slots to a GPU.

use std::borrow::Borrow;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use alight_format::limits::BLOCK_BYTES;
use alight_format::{SegmentId, combine, crc32};
use parking_lot::Mutex;

use crate::config::{CACHED_ALONE_BYTES_MAX, DIRECT_READ_THREADS_MAX, LONG_READ_BYTES, READ_BYTES, READ_THREADS_MAX};
use crate::device::transfer::Upload;
use crate::device::{Device, DeviceBuffer, PinnedMap};
use crate::error::{Error, Result};
use crate::io::fill::{SlotRead, fill, fill_through, places};
use crate::io::lanes::{in_lanes, lanes_for};
use crate::io::plan::{Extent, Read, ReadPlan};
use crate::io::routes::{Left, Routes};
use crate::io::watched::step;
use crate::io::windows::{WINDOW_BYTES, Windows};
use crate::metrics::{Counters, LastRead, ReadRoute, RouteReason};
use crate::storage::{AlignedBuf, Arrival, Caching, Landing, Parts, StorageFile, is_direct_aligned, read_exact_at};

/// A file to read from, and its name for errors.
#[derive(Debug, Clone)]
pub(crate) struct SegmentFile {
    pub(crate) file: Arc<dyn StorageFile>,
    pub(crate) path: Arc<PathBuf>,
    /// Where the segment ends, once nobody appends to it any more.
    pub(crate) sealed_end: Option<u64>,
}

/// Finds the file of a segment.
pub(crate) type FindFile<'a> = dyn Fn(SegmentId) -> Result<SegmentFile> + Sync + 'a;

impl SegmentFile {
    /// Whether all of a range is in the page cache. A question that the system cannot answer counts as no: then the disk is
    /// asked, which is right either way.
    pub(crate) fn is_resident(&self, offset: u64, len: u64) -> bool {
        self.file.resident(offset, len).unwrap_or_default().unwrap_or(false)
    }

    /// Reads whole blocks into `buf`: through the page cache when they are in it, past it when not.
    fn read(&self, buf: &mut [u8], offset: u64, counters: &Counters) -> Result<()> {
        self.read_by(buf, offset, self.is_resident(offset, buf.len() as u64), counters)
    }

    /// Reads whole blocks into `buf`, through the page cache or, where it can be done, past it.
    fn read_by(&self, buf: &mut [u8], offset: u64, cached: bool, counters: &Counters) -> Result<()> {
        let direct = !cached && self.file.direct() && is_direct_aligned(buf.as_ptr() as u64, offset, buf.len());
        let (caching, counter) = if direct {
            (Caching::Direct, &counters.bytes_direct)
        } else {
            (Caching::Buffered, &counters.bytes_buffered)
        };
        read_exact_at(&*self.file, buf, offset, caching).map_err(|source| self.read_failed(source, offset))?;
        Counters::add(counter, buf.len() as u64);
        Ok(())
    }

    /// Reads whole blocks into `buf` if all of them are in the page cache; whether they were. Waits for nothing.
    fn read_cached(&self, buf: &mut [u8], offset: u64, counters: &Counters) -> Result<bool> {
        if !self.is_resident(offset, buf.len() as u64) {
            return Ok(false);
        }
        match read_exact_at(&*self.file, buf, offset, Caching::Cached) {
            Ok(()) => {
                Counters::add(&counters.bytes_buffered, buf.len() as u64);
                Ok(true)
            }
            // It has left the page cache since, or is still on its way there.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(self.read_failed(error, offset)),
        }
    }

    /// Reads whole blocks to the front of `memory`: out of the page cache when they are in it, else past it where it can be done.
    /// Tells of each part in order, while the next is on its way. What becomes of `patience`: as with
    /// [`StorageFile::read_parts_at`].
    fn read_parts(
        &self,
        memory: &mut dyn Landing,
        parts: Parts,
        patience: Option<Duration>,
        counters: &Counters,
        landed: &mut dyn FnMut(&[u8]),
    ) -> Result<Arrival> {
        let Parts { offset, len, part_bytes } = parts;
        let failed = |source| self.read_failed(source, offset);
        let buf = parts.of(memory.bytes()).map_err(failed)?;
        if self.read_cached(buf, offset, counters)? {
            buf.chunks(part_bytes).for_each(landed);
            return Ok(Arrival::Landed);
        }
        let direct = self.file.direct() && is_direct_aligned(buf.as_ptr() as u64, offset, len);
        if !direct && patience.is_none() {
            self.read_by(buf, offset, true, counters)?;
            buf.chunks(part_bytes).for_each(landed);
            return Ok(Arrival::Landed);
        }
        if !direct {
            return Ok(Arrival::WouldWait);
        }
        let arrival = self.file.read_parts_at(memory, parts, patience, landed).map_err(failed)?;
        if arrival == Arrival::Landed {
            Counters::add(&counters.bytes_direct, len as u64);
        }
        Ok(arrival)
    }

    fn read_failed(&self, source: std::io::Error, offset: u64) -> Error {
        if source.kind() == std::io::ErrorKind::UnexpectedEof {
            Error::damaged(&self.path, offset, "the file ends inside a value: it was truncated")
        } else {
            Error::Io { action: "read", path: self.path.to_path_buf(), source }
        }
    }
}

/// Finds the files of reads that follow one another: a neighbour's is asked for once.
struct Finder<'a> {
    find: &'a FindFile<'a>,
    last: Option<(SegmentId, SegmentFile)>,
}

impl<'a> Finder<'a> {
    fn new(find: &'a FindFile<'a>) -> Self {
        Self { find, last: None }
    }

    fn of(&mut self, segment: SegmentId) -> Result<&SegmentFile> {
        if self.last.as_ref().is_none_or(|(last, _)| *last != segment) {
            self.last = Some((segment, (self.find)(segment)?));
        }
        Ok(&self.last.as_ref().expect("found just now").1)
    }
}

/// What the reads of a plan found.
pub(crate) struct Outcome {
    /// Extents, by their index, whose bytes are not those that were written; in rising order.
    pub(crate) damaged: Vec<usize>,
    /// By which route they came, and why.
    pub(crate) read: LastRead,
}

/// From this many bytes on a GPU takes the checksums of what comes from the disk, once everything has landed: no processor has seen
/// those bytes, and one takes twice as long to fetch them as the GPU does with its kernel (some 30 µs). What comes out of the page
/// cache a processor has copied, and checks while it is hot, until it is so much that the GPU's memory counts.
const CHECK_ON_DEVICE_BYTES_MIN: u64 = 512 << 10;

/// From this many bytes on, it is worth looking for a way that no processor's memory is part of: cuFile, or pinned pages.
pub(crate) const LARGE_BYTES_MIN: u64 = 8 << 20;

/// Carries out `plan` into `arena`, which is at least as long as the plan says. Blocks until every byte is there and
/// checked. Host memory: nothing but the ring of slots, for a GPU.
pub(crate) fn execute(
    plan: &ReadPlan,
    extents: &[Extent],
    find: &FindFile<'_>,
    arena: &mut DeviceBuffer,
    routes: &Routes,
    counters: &Counters,
) -> Result<Outcome> {
    if plan.is_one_read() {
        return match execute_one(plan, extents, &find(plan.reads[0].segment)?, arena, None, counters)? {
            Attempt::Done(outcome) => Ok(outcome),
            Attempt::Overdue | Attempt::WouldWait => unreachable!("it waits for ever"),
        };
    }
    // Once for all the calls that this thread makes of the driver.
    let _current = if arena.device().is_host() { None } else { Some(arena.device().make_current()?) };
    let on_device = is_checked_on(arena.device(), plan, find);
    let checks = Checks::new(if on_device { 0 } else { plan.pieces.len() });
    let read = match arena.as_host_pages_mut() {
        Some(bytes) => {
            read_to_host(plan, bytes, &checks, lanes_of(&plan.reads, find), |read, target| {
                find(read.segment)?.read(target, read.offset, counters)
            })?;
            LastRead { route: ReadRoute::Host, why: RouteReason::OnTheHost }
        }
        None => read_to_gpu(plan, find, arena, routes, (!on_device).then_some(&checks), counters)?,
    };
    let damaged = if on_device { damaged_on_device(plan, extents, arena)? } else { checks.damaged(plan, extents) };
    Ok(Outcome { damaged, read })
}

/// What became of something that was to take no longer than somebody's patience.
pub(crate) enum Attempt<T> {
    Done(T),
    /// It did, and has the memory that was to be filled.
    Overdue,
    /// It might have, and was not begun: another thread is to do it.
    WouldWait,
}

/// [`execute`] of a plan [of one read](ReadPlan::is_one_read), of this file, by this thread, which waits for the disk no longer than
/// `patience`, and without it for ever. Where that is [`Overdue`](Attempt::Overdue), an arena on the host is empty.
pub(crate) fn execute_one(
    plan: &ReadPlan,
    extents: &[Extent],
    file: &SegmentFile,
    arena: &mut DeviceBuffer,
    patience: Option<Duration>,
    counters: &Counters,
) -> Result<Attempt<Outcome>> {
    let first = &plan.reads[0];
    let len = plan.reads.iter().map(|read| read.len).sum();
    let parts = Parts { offset: first.offset, len, part_bytes: first.len };
    if let Some(mut memory) = arena.as_host_landing() {
        let checks = Checks::new(plan.pieces.len());
        let mut next = plan.reads.iter();
        let mut landed = |part: &[u8]| next.by_ref().take(1).for_each(|read| checks.take(plan, read, part));
        return Ok(match file.read_parts(&mut memory, parts, patience, counters, &mut landed)? {
            Arrival::Landed => {
                let read = LastRead { route: ReadRoute::Host, why: RouteReason::OnTheHost };
                Attempt::Done(Outcome { damaged: checks.damaged(plan, extents), read })
            }
            Arrival::Overdue => Attempt::Overdue,
            Arrival::WouldWait => Attempt::WouldWait,
        });
    }
    // Once for all the calls that this thread makes of the driver.
    let _current = arena.device().make_current()?;
    let on_device = is_checked_on(arena.device(), plan, &|_| Ok(file.clone()));
    let staging = arena.device().staging()?;
    let upload = Upload::new(arena)?;
    let mut slot = staging.acquire_within(patience)?;
    if slot.is_some() && file.read_parts(&mut slot, parts, patience, counters, &mut |_| {})? == Arrival::WouldWait {
        return Ok(Attempt::WouldWait);
    }
    // It was not had, or was left to the read.
    let Some(slot) = slot else { return Ok(Attempt::Overdue) };
    let checks = Checks::new(if on_device { 0 } else { plan.pieces.len() });
    // The check takes no time, since the hardware copies meanwhile.
    upload.copy_and_finish(slot, &[(first.wanted.clone(), first.arena_offset)], |slot| {
        if !on_device {
            checks.take(plan, first, &slot[..len]);
        }
    })?;
    let damaged = if on_device { damaged_on_device(plan, extents, arena)? } else { checks.damaged(plan, extents) };
    let read = LastRead { route: ReadRoute::Staged, why: RouteReason::Small };
    Ok(Attempt::Done(Outcome { damaged, read }))
}

/// [`execute`] into host memory of several reads that come out of the page cache: by this thread alone where they are few bytes,
/// and without waiting for the disk; `None` where one of them does not, or its file is not open.
pub(crate) fn execute_cached(
    plan: &ReadPlan,
    extents: &[Extent],
    find_open: impl Fn(SegmentId) -> Option<SegmentFile> + Sync,
    arena: &mut DeviceBuffer,
    counters: &Counters,
) -> Result<Option<Outcome>> {
    let first = &plan.reads[0];
    let Some(bytes) = arena.as_host_pages_mut() else { return Ok(None) };
    if !find_open(first.segment).is_some_and(|file| file.is_resident(first.offset, first.len as u64)) {
        return Ok(None);
    }
    let alone = plan.arena_bytes <= CACHED_ALONE_BYTES_MAX;
    let lanes = if alone { 1 } else { lanes_for(READ_THREADS_MAX) };
    let (checks, missed) = (Checks::new(plan.pieces.len()), AtomicBool::new(false));
    let outcome = read_to_host(plan, bytes, &checks, lanes, |read, target| {
        let file = find_open(read.segment).filter(|_| !missed.load(Ordering::Relaxed));
        if let Some(file) = file
            && file.read_cached(target, read.offset, counters)?
        {
            return Ok(());
        }
        missed.store(true, Ordering::Relaxed);
        Err(Error::Closed)
    });
    match outcome {
        // Whatever else it was, the read that follows meets it.
        Err(_) if missed.into_inner() => Ok(None),
        Err(error) => Err(error),
        Ok(()) => {
            let read = LastRead { route: ReadRoute::Host, why: RouteReason::OnTheHost };
            Ok(Some(Outcome { damaged: checks.damaged(plan, extents), read }))
        }
    }
}

/// Whether a device takes the checksums of a plan by itself.
fn is_checked_on(device: &Device, plan: &ReadPlan, find: &FindFile<'_>) -> bool {
    let from_disk = || plan.reads.first().is_some_and(|read| !is_cached(read, find));
    let bytes = plan.arena_bytes;
    let is_enough = || bytes >= LARGE_BYTES_MIN || bytes >= CHECK_ON_DEVICE_BYTES_MIN && from_disk();
    !device.is_host() && is_enough() && device.has_kernels()
}

/// Whether a read finds its bytes in the page cache. A file that is not found is told of by who reads it.
fn is_cached(read: &Read, find: &FindFile<'_>) -> bool {
    find(read.segment).is_ok_and(|file| file.is_resident(read.offset, read.len as u64))
}

/// How many threads read: many where the bytes come out of the page cache or are scattered, few where the disk is to give long runs
/// of them. Some of the reads are looked at.
fn lanes_of<R: Borrow<Read>>(reads: &[R], find: &FindFile<'_>) -> usize {
    const LOOKS: usize = 8;
    let bytes: usize = reads.iter().map(|read| read.borrow().len).sum();
    if reads.len() <= DIRECT_READ_THREADS_MAX || bytes / reads.len() < LONG_READ_BYTES {
        return lanes_for(READ_THREADS_MAX);
    }
    let looked_at = reads.iter().map(Borrow::borrow).step_by(reads.len().div_ceil(LOOKS));
    let (cached, not): (Vec<&Read>, Vec<&Read>) = looked_at.partition(|read| is_cached(read, find));
    lanes_for(if cached.len() >= not.len() { READ_THREADS_MAX } else { DIRECT_READ_THREADS_MAX })
}

/// Reads into host memory, in place, by up to `lanes` threads: each read has its own stretch of the arena, which `read` fills.
fn read_to_host(
    plan: &ReadPlan,
    arena: &mut [u8],
    checks: &Checks,
    lanes: usize,
    read: impl Fn(&Read, &mut [u8]) -> Result<()> + Sync,
) -> Result<()> {
    // Reads land in rising order, none over another.
    let mut targets = Vec::with_capacity(plan.reads.len());
    let (mut rest, mut start) = (arena, 0);
    for read in &plan.reads {
        let (_, after) = rest.split_at_mut((read.arena_offset - start) as usize);
        let (target, after) = after.split_at_mut(read.wanted.len());
        targets.push(Mutex::new(Some(target)));
        (rest, start) = (after, read.arena_offset + read.wanted.len() as u64);
    }
    in_lanes(plan.reads.len(), lanes, |index| {
        let planned = &plan.reads[index];
        let target = targets[index].lock().take().expect("every read is carried out once");
        debug_assert_eq!(target.len(), planned.len, "a host arena keeps whole blocks");
        read(planned, target)?;
        checks.take(plan, planned, target);
        Ok(())
    })
}

/// Reads into a GPU's memory, by the route that is best there; which it was. Takes checksums on the way where they are wanted.
fn read_to_gpu(
    plan: &ReadPlan,
    find: &FindFile<'_>,
    arena: &mut DeviceBuffer,
    routes: &Routes,
    checks: Option<&Checks>,
    counters: &Counters,
) -> Result<LastRead> {
    let large = plan.arena_bytes >= LARGE_BYTES_MIN;
    let lanes = lanes_for(READ_THREADS_MAX);
    let Left { reads: left, read: mut taken } = if large && checks.is_none() {
        routes.bring_by_cufile(plan, find, arena, lanes, counters)?
    } else {
        let why = if large { RouteReason::NoKernels } else { RouteReason::Small };
        Left { reads: plan.reads.iter().collect(), read: LastRead { route: ReadRoute::Staged, why } }
    };
    if left.is_empty() {
        return Ok(taken);
    }
    if large && checks.is_none() && routes.windows.are_wanted() {
        if bring(&left, find, &routes.windows, arena, lanes, counters)? {
            taken = LastRead { route: ReadRoute::Pinned, why: RouteReason::PagesPinned };
        }
        return Ok(taken);
    }
    let reads: Vec<SlotRead> = left.iter().map(|read| slot_read(read)).collect();
    let read = |range: Range<usize>, bytes: &mut [u8]| {
        let mut files = Finder::new(find);
        places(&reads, range).try_for_each(|(index, at)| {
            files.of(left[index].segment)?.read(&mut bytes[at], left[index].offset, counters)
        })
    };
    let check = |range: Range<usize>, bytes: &[u8]| {
        let Some(checks) = checks else { return };
        places(&reads, range).for_each(|(index, at)| checks.take(plan, left[index], &bytes[at]));
    };
    fill(arena, &reads, lanes_of(&left, find), read, check)?;
    Ok(taken)
}

/// Brings every byte of some reads to a GPU whose checksums are taken there: out of pinned windows where there are any, else
/// through the ring, and then through the page cache, so that there will be. Whether any came out of windows.
fn bring(
    reads: &[&Read],
    find: &FindFile<'_>,
    windows: &Windows,
    arena: &mut DeviceBuffer,
    lanes: usize,
    counters: &Counters,
) -> Result<bool> {
    let device = arena.device().clone();
    let staging = device.staging()?;
    let upload = Upload::new(arena)?;
    let mut rest: Vec<&Read> = Vec::new();
    let mut window: Option<(SegmentId, u64, Option<Arc<PinnedMap>>)> = None;
    // Neighbours that come out of one window are one copy.
    let mut copy: Option<(Arc<PinnedMap>, Range<usize>, u64)> = None;
    let flush = |copy: &mut Option<(Arc<PinnedMap>, Range<usize>, u64)>| match copy.take() {
        Some((window, range, target)) => {
            Counters::add(&counters.bytes_pinned, range.len() as u64);
            upload.copy_pinned(&window, &range, target)
        }
        None => Ok(()),
    };
    for &read in reads {
        let number = read.offset / WINDOW_BYTES;
        if window.as_ref().is_none_or(|(segment, known, _)| (*segment, *known) != (read.segment, number)) {
            let found = windows.get(&device, read.segment, &find(read.segment)?, number);
            window = Some((read.segment, number, found));
        }
        let start = read.offset % WINDOW_BYTES;
        let range = start as usize + read.wanted.start..start as usize + read.wanted.end;
        let pinned = window.as_ref().and_then(|(.., found)| found.as_ref()).filter(|found| range.end <= found.len());
        // A read over the end of a window is not worth two copies.
        let Some(found) = pinned else {
            rest.push(read);
            continue;
        };
        match &mut copy {
            Some((from, so_far, target))
                if Arc::ptr_eq(from, found)
                    && so_far.end == range.start
                    && *target + so_far.len() as u64 == read.arena_offset =>
            {
                so_far.end = range.end;
            }
            _ => {
                flush(&mut copy)?;
                copy = Some((Arc::clone(found), range, read.arena_offset));
            }
        }
    }
    flush(&mut copy)?;
    let slots: Vec<SlotRead> = rest.iter().map(|read| slot_read(read)).collect();
    fill_through(&upload, &staging, &slots, lanes, |range, bytes| {
        let mut files = Finder::new(find);
        places(&slots, range).try_for_each(|(index, at)| {
            files.of(rest[index].segment)?.read_by(&mut bytes[at], rest[index].offset, true, counters)
        })
    })?;
    upload.finish()?;
    Ok(rest.len() < reads.len())
}

fn slot_read(read: &Read) -> SlotRead {
    SlotRead { len: read.len, wanted: read.wanted.clone(), target: read.arena_offset }
}

/// The extents whose bytes, as they lie on the device, do not have the checksum that was written.
fn damaged_on_device(plan: &ReadPlan, extents: &[Extent], arena: &DeviceBuffer) -> Result<Vec<usize>> {
    let place = |(extent, &offset): (&Extent, &u64)| offset..offset + extent.length;
    let places: Vec<Range<u64>> = extents.iter().zip(&plan.arena_offsets).map(place).collect();
    let found = arena.crc32(&places)?;
    Ok((0..extents.len()).filter(|&index| found[index] != extents[index].crc).collect())
}

/// The checksum of every piece of a plan, put together to those of the extents at the end.
struct Checks {
    pieces: Vec<AtomicU32>,
}

impl Checks {
    fn new(pieces: usize) -> Self {
        Self { pieces: (0..pieces).map(|_| AtomicU32::new(0)).collect() }
    }

    fn take(&self, plan: &ReadPlan, read: &Read, bytes: &[u8]) {
        for (piece, crc) in plan.pieces[read.pieces.clone()].iter().zip(&self.pieces[read.pieces.clone()]) {
            // Relaxed: the threads are joined before anybody looks.
            crc.store(crc32(&bytes[piece.range.clone()]), Ordering::Relaxed);
        }
    }

    /// The extents whose pieces do not make the checksum that was written.
    fn damaged(self, plan: &ReadPlan, extents: &[Extent]) -> Vec<usize> {
        let mut whole = vec![0u32; extents.len()];
        // The pieces of one extent come in the order of its bytes.
        for (piece, crc) in plan.pieces.iter().zip(self.pieces) {
            let crc = crc.into_inner();
            let so_far = &mut whole[piece.extent];
            let extent = &extents[piece.extent];
            *so_far = if piece.range.len() as u64 == extent.length {
                crc
            } else {
                combine(*so_far, crc, piece.range.len() as u64)
            };
        }
        (0..extents.len()).filter(|&index| whole[index] != extents[index].crc).collect()
    }
}

/// Reads an extent in order, in pieces of at most [`READ_BYTES`] that begin at multiples of it in the extent, through a
/// buffer of that size, and hands each on.
pub(crate) fn read_chunks(
    file: &SegmentFile,
    extent: &Extent,
    range: Range<u64>,
    counters: &Counters,
    hand_on: impl FnMut(u64, &[u8]) -> Result<()>,
) -> Result<()> {
    read_chunks_within(file, extent, range, None, counters, hand_on).map(drop)
}

/// [`read_chunks`], which waits for the disk no longer than `patience` for each. How that ended, and up to where they were handed
/// on.
pub(crate) fn read_chunks_within(
    file: &SegmentFile,
    extent: &Extent,
    range: Range<u64>,
    patience: Option<Duration>,
    counters: &Counters,
    mut hand_on: impl FnMut(u64, &[u8]) -> Result<()>,
) -> Result<(Arrival, u64)> {
    let mut buffer = chunk_buffer(&range);
    for (at, len) in chunks_of(extent, range.clone()) {
        let (arrival, bytes) = read_chunk(file, extent, (at, len), &mut buffer, patience, counters)?;
        if arrival != Arrival::Landed {
            return Ok((arrival, at));
        }
        step();
        hand_on(at, &buffer[bytes])?;
    }
    Ok((Arrival::Landed, range.end))
}

/// A buffer for the chunks of a range: a short one takes a short buffer, since 1 MiB of zeros costs more than most extents.
pub(super) fn chunk_buffer(range: &Range<u64>) -> AlignedBuf {
    let longest = (range.end - range.start).min(READ_BYTES as u64);
    AlignedBuf::zeroed((longest + 2 * BLOCK_BYTES) as usize)
}

/// The chunks of a range of an extent: where each begins, and how long it is.
pub(super) fn chunks_of(extent: &Extent, range: Range<u64>) -> impl Iterator<Item = (u64, u64)> + use<> {
    debug_assert!(range.start.is_multiple_of(READ_BYTES as u64) && range.end <= extent.length);
    let end = range.end;
    range.step_by(READ_BYTES).map(move |at| (at, (end - at).min(READ_BYTES as u64)))
}

/// Reads a chunk, in whole blocks, into a [`chunk_buffer`]; answers where in it the chunk is, if it landed. One that is overdue has
/// the buffer.
pub(super) fn read_chunk(
    file: &SegmentFile,
    extent: &Extent,
    (at, len): (u64, u64),
    buffer: &mut AlignedBuf,
    patience: Option<Duration>,
    counters: &Counters,
) -> Result<(Arrival, Range<usize>)> {
    let start = (extent.offset + at) / BLOCK_BYTES * BLOCK_BYTES;
    let end = (extent.offset + at + len).next_multiple_of(BLOCK_BYTES);
    let parts = Parts::one(start, (end - start) as usize);
    let arrival = file.read_parts(buffer, parts, patience, counters, &mut |_| {})?;
    let skip = (extent.offset + at - start) as usize;
    Ok((arrival, skip..skip + len as usize))
}
