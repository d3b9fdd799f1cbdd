//! Rewrites segments in which much is dead: what lives in them is copied into another, and they go.
//!
//! # How a copy stays right
//! A copy is an ordinary large commit, with a sequence number of its own: it is there whole or not at all, and recovery needs
//! to know nothing more of it. But its entries repeat what earlier commits did, and say which: each counts as of that commit
//! (`origin`). A put that was overtaken while it was copied loses, whoever decides: `publish` under the publisher's lock and
//! recovery, by comparing with what the key leads to when the copy's turn comes; a rebuild from the segments, by the numbers.
//! So between a copy's commit and the manifest that names the old segment no more, both are there, and it does not matter
//! which is read.
//!
//! # Invariants
//! - A value is compared with its checksum on the way, and a damaged one is never copied: it stays where it is and fails
//!   whoever reads it there.
//! - The old segment is not touched. It goes when nothing in it lives, by [`space`](super::space)'s rule and in
//!   [`reclaim`](super::reclaim)'s order.
//! - Deletes of which a put may lie in another segment are repeated as of the commit that they are from.

use std::cell::RefCell;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use alight_format::{Entry, EntryKind, IndexKind, SegmentId, SegmentRecord, Seq};

use crate::config::{
    BACKGROUND_EXCESS_PERCENT, BACKGROUND_PERCENT, COMPACTION_BATCH_BYTES, COMPACTION_BATCH_ENTRIES,
    COMPACTION_BATCH_ENTRY_BYTES, COMPACTION_PERCENT,
};
use crate::error::{Damage, DisplayKey, Error, Result};
use crate::index::Version;
use crate::io::{Blob, lay_out, step};
use crate::metrics::Counters;
use crate::storage::{Caching, StorageFile, is_direct_aligned, read_exact_at};
use crate::store::batch::{encode, finish, index_entries};
use crate::store::core::Core;
use crate::store::flush::Occasion;
use crate::store::payload::{stream_payload, take_back};
use crate::store::reclaim::frame_at;
use crate::store::segment::{FIRST_FRAME, Segment};
use crate::store::space::{Candidate, oldest_put, worth_rewriting};
use crate::sync::lock::RwLockReadGuard;
use crate::tensor::{ReadAt, TensorRef};

/// How [`Store::compact`](crate::Store::compact) goes about it.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct CompactOptions {
    /// The most bytes to copy per second; as fast as it goes without.
    pub bytes_per_second: Option<u64>,
}

impl CompactOptions {
    /// Limits the bytes that are copied per second; 0 counts as 1.
    #[must_use]
    pub fn bytes_per_second(mut self, bytes: u64) -> Self {
        self.bytes_per_second = Some(bytes.max(1));
        self
    }
}

/// How far a compaction has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct CompactProgress {
    /// Bytes of values copied so far.
    pub bytes_done: u64,
    /// Bytes of values to copy in all, as far as is known.
    pub bytes_total: u64,
}

/// What a compaction did; made by [`Store::compact`](crate::Store::compact).
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct CompactReport {
    /// Segments that were rewritten.
    pub segments_rewritten: u64,
    /// Files of segments that were removed, those included in which nothing lived before.
    pub segments_removed: u64,
    /// Bytes of values that were copied.
    pub bytes_copied: u64,
    /// Bytes that were given back in segments that stay.
    pub bytes_punched: u64,
    /// Values that were not copied, because they are damaged; and frames that cannot be read. Their segments stay.
    pub damages: Vec<Damage>,
}

/// One entry to repeat.
struct Moved {
    entry: Entry,
    /// Where its value lies now.
    from: Arc<From>,
    offset: u64,
}

/// A segment that is being rewritten.
struct From {
    segment: Arc<Segment>,
    file: Arc<dyn StorageFile>,
    /// What was found alive in it is copied later, and may have died by then: held, this keeps it from being punched.
    version: Arc<Version>,
}

/// What is collected for one commit.
#[derive(Default)]
struct Load {
    entries: Vec<Moved>,
    value_bytes: u64,
    entry_bytes: usize,
}

impl Load {
    fn add(&mut self, entry: Entry, from: &Arc<From>, offset: u64) {
        self.value_bytes += entry.length;
        let attributes = entry.attributes.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>();
        self.entry_bytes += entry.key.len() + attributes;
        self.entries.push(Moved { entry, from: Arc::clone(from), offset });
    }

    fn is_full(&self, bytes_max: u64) -> bool {
        self.value_bytes >= bytes_max
            || self.entries.len() >= COMPACTION_BATCH_ENTRIES
            || self.entry_bytes >= COMPACTION_BATCH_ENTRY_BYTES
    }
}

/// The one compaction that is under way.
struct Compaction<'a> {
    core: &'a Arc<Core>,
    rate: Option<u64>,
    report: CompactReport,
    progress: &'a mut dyn FnMut(CompactProgress),
    bytes_total: u64,
    /// What is to be copied with the next commit: segments share one, or their frames would waste what they give back.
    load: Load,
    /// Segments that are copied once the load is.
    read_through: Vec<Arc<From>>,
    /// Whether to give up at the next chance.
    stop: &'a dyn Fn() -> bool,
}

impl Core {
    /// Gives back all the space that can be: ends segments that waste some, rewrites those that waste much.
    pub(crate) fn compact(
        self: &Arc<Self>,
        options: &CompactOptions,
        progress: &mut dyn FnMut(CompactProgress),
    ) -> Result<CompactReport> {
        let writer = self.writer()?;
        let _one = writer.compacting.lock();
        let before = self.counters.snapshot();
        writer.committer.seal_tails(|segment| {
            let record = segment.record();
            Candidate::new(&record, record.end).wastes(COMPACTION_PERCENT)
        });
        self.flush_passing(Occasion::Space)?;
        let victims = worth_rewriting(self.candidates()?, COMPACTION_PERCENT);
        let mut compaction = Compaction {
            core: self,
            rate: options.bytes_per_second,
            report: CompactReport::default(),
            progress,
            bytes_total: victims.iter().map(|victim| victim.rewritten).sum(),
            load: Load::default(),
            read_through: Vec::new(),
            // Also after every nap: what keeps its pace makes progress.
            stop: &|| !step(),
        };
        for victim in victims {
            compaction.rewrite(victim.id)?;
        }
        compaction.unload()?;
        let mut report = compaction.report;
        self.flush_passing(Occasion::Space)?;
        writer.committer.give_back_ahead()?;
        let after = self.counters.snapshot();
        report.segments_removed = after.segments_removed - before.segments_removed;
        report.bytes_punched = after.bytes_punched - before.bytes_punched;
        Ok(report)
    }

    /// Rewrites what is worth it while the segments together take too much, at the pace that was asked for.
    pub(crate) fn compact_in_background(self: &Arc<Self>) {
        let Ok(writer) = self.writer() else { return };
        let Some(rate) = writer.background_bytes_per_second else { return };
        // Whoever asked for a compaction is at it.
        let Some(_one) = writer.compacting.try_lock() else { return };
        // What died meanwhile is given back without copying, and comes first; what is not copied yet is found again.
        let stop = || {
            let wanted = writer.wanted.lock();
            wanted.shutdown || wanted.flush
        };
        let mut rewritten = false;
        let outcome = self.candidates().and_then(|candidates| {
            let live: u64 = candidates.iter().map(|candidate| candidate.rewritten).sum();
            let mut taken: u64 = candidates.iter().map(|candidate| candidate.taken).sum();
            let mut compaction = Compaction {
                core: self,
                rate: Some(rate),
                report: CompactReport::default(),
                progress: &mut |_| {},
                bytes_total: 0,
                load: Load::default(),
                read_through: Vec::new(),
                stop: &stop,
            };
            for victim in worth_rewriting(candidates, BACKGROUND_PERCENT) {
                let excess = live / 100 * BACKGROUND_EXCESS_PERCENT + writer.background_slack_bytes;
                if taken <= live + excess || stop() {
                    break;
                }
                compaction.rewrite(victim.id)?;
                taken -= victim.waste();
            }
            compaction.unload()?;
            rewritten = compaction.report.segments_rewritten > 0;
            Ok(())
        });
        let outcome = if rewritten && !stop() { outcome.and(self.flush_counted(Occasion::Space)) } else { outcome };
        if let Err(error) = outcome
            && !stop()
        {
            tracing::warn!(%error, "compaction ended early; it is tried again");
        }
    }

    /// Every segment that may be rewritten, with what it takes on the disk.
    fn candidates(&self) -> Result<Vec<Candidate>> {
        let mut candidates = Vec::new();
        for segment in self.segments.all() {
            let record = segment.record();
            if !record.sealed || segment.is_condemned() || segment.has_damage.load(Ordering::Acquire) {
                continue;
            }
            // Deletes alone: a rewrite would only repeat them.
            if record.values == 0 {
                continue;
            }
            let file = self.segments.file(&segment)?;
            let facts = file.facts().map_err(Error::io("measure", &segment.path))?;
            // Where the file system cannot tell, the length.
            let taken = if facts.allocated_bytes == 0 { facts.len_bytes } else { facts.allocated_bytes };
            candidates.push(Candidate::new(&record, taken));
        }
        Ok(candidates)
    }

    /// A flush beside which the store cannot be closed.
    fn flush_passing(&self, occasion: Occasion) -> Result<()> {
        let _passing = self.gate.read();
        self.check_open()?;
        self.flush_counted(occasion)
    }
}

impl Compaction<'_> {
    /// Collects what lives in a segment, and copies it load by load.
    fn rewrite(&mut self, id: SegmentId) -> Result<()> {
        let core = self.core;
        let Some(segment) = core.segments.get(id) else { return Ok(()) };
        let version = core.version();
        let oldest_elsewhere = oldest_put_beside(core, id);
        let from = Arc::new(From { file: core.segments.file(&segment)?, segment, version });
        let (segment, version) = (&from.segment, &*from.version);
        let end = segment.accounting.lock().end;
        let mut offset = FIRST_FRAME;
        while offset < end {
            let found = match frame_at(segment, &*from.file, offset, end) {
                Ok(found) => found,
                Err(Error::Damaged(damage)) => {
                    self.leave(segment, damage);
                    return Ok(());
                }
                Err(error) => return Err(error),
            };
            offset = found.end();
            let (seq, payload) = (found.prelude.seq, found.payload());
            for mut entry in found.entries {
                entry.origin = entry.counts_from(seq);
                let at = payload + entry.offset;
                let matters = match entry.kind {
                    EntryKind::Put => leads_here(version, &entry, id, at),
                    EntryKind::Delete if entry.origin > oldest_elsewhere => still_deleted(version, &entry),
                    EntryKind::Delete => Ok(false),
                    // It would have to be repeated as what it is. No writer of this version makes one.
                    EntryKind::Alias => return Ok(()),
                };
                match matters {
                    Ok(true) => self.load.add(entry, &from, at),
                    Ok(false) => continue,
                    // Nobody can tell whether it lives.
                    Err(Error::Damaged(damage)) => {
                        self.leave(segment, damage);
                        return Ok(());
                    }
                    Err(error) => return Err(error),
                }
                if self.load.is_full(self.load_bytes_max()?) {
                    self.unload()?;
                    if (self.stop)() {
                        return Ok(());
                    }
                }
            }
        }
        self.read_through.push(from);
        Ok(())
    }

    /// Of large values one makes a load; a slow pace makes small ones, so that closing does not wait.
    fn load_bytes_max(&self) -> Result<u64> {
        let group_bytes = self.core.writer()?.committer.group_bytes();
        Ok(COMPACTION_BATCH_BYTES.min(self.rate.unwrap_or(u64::MAX)).min(group_bytes))
    }

    /// Copies what was collected; what was read through is rewritten then.
    fn unload(&mut self) -> Result<()> {
        let load = std::mem::take(&mut self.load);
        if !load.entries.is_empty() {
            self.copy(load.entries)?;
        }
        for from in std::mem::take(&mut self.read_through) {
            if !from.segment.has_damage.load(Ordering::Acquire) {
                from.segment.deletes_carried.store(true, Ordering::Release);
                self.report.segments_rewritten += 1;
            }
        }
        Ok(())
    }

    /// Leaves a damaged segment as it is from now on.
    fn leave(&mut self, segment: &Segment, damage: Damage) {
        tracing::warn!(%damage, "a damaged segment is not rewritten");
        segment.has_damage.store(true, Ordering::Release);
        self.report.damages.push(damage);
    }

    /// Repeats entries with one commit, and leaves out those whose values are damaged.
    fn copy(&mut self, mut entries: Vec<Moved>) -> Result<()> {
        let started = Instant::now();
        let core = self.core;
        let bytes: u64 = loop {
            let damaged = {
                let _passing = self.pass()?;
                if core.version().overlay.len() + entries.len() > core.writer()?.overlay_entries_max {
                    core.flush_counted(Occasion::Full)?;
                }
                repeat(core, &entries)?
            };
            if damaged.is_empty() {
                break entries.iter().map(|moved| moved.entry.length).sum();
            }
            for &index in damaged.iter().rev() {
                let Moved { entry, from, offset } = entries.remove(index);
                let what = format!("{} bytes do not have the checksum they were put with", entry.length);
                let (path, key) = (from.segment.path.clone(), Some(DisplayKey(entry.key)));
                self.leave(&from.segment, Damage { path, offset: Some(offset), key, what });
            }
            if entries.is_empty() {
                return Ok(());
            }
        };
        Counters::add(&core.counters.bytes_compacted, bytes);
        self.report.bytes_copied += bytes;
        (self.progress)(CompactProgress {
            bytes_done: self.report.bytes_copied,
            bytes_total: self.bytes_total.max(self.report.bytes_copied),
        });
        if let Some(rate) = self.rate {
            let due = Duration::from_secs_f64(bytes as f64 / rate as f64);
            self.sleep(due.saturating_sub(started.elapsed()));
        }
        Ok(())
    }

    /// Keeps the store from being closed. Whoever closes it waits for the background to end, and must not be waited for.
    fn pass(&self) -> Result<RwLockReadGuard<'_, ()>> {
        loop {
            if let Some(passing) = self.core.gate.try_read_for(Duration::from_millis(20)) {
                self.core.check_open()?;
                return Ok(passing);
            }
            if (self.stop)() {
                return Err(Error::Closed);
            }
        }
    }

    fn sleep(&self, mut left: Duration) {
        while !left.is_zero() && !(self.stop)() && self.core.check_open().is_ok() {
            let nap = left.min(Duration::from_millis(50));
            std::thread::sleep(nap);
            left -= nap;
        }
    }
}

/// Writes, syncs and publishes one commit that repeats these entries. Where values are damaged, their places in
/// the list, and nothing is committed.
fn repeat(core: &Arc<Core>, moved: &[Moved]) -> Result<Vec<usize>> {
    let committer = &core.writer()?.committer;
    let failed = RefCell::new(None);
    let sources: Vec<Source<'_>> = moved.iter().map(|moved| Source { from: &moved.from, failed: &failed }).collect();
    let mut entries: Vec<Entry> = moved.iter().map(|moved| moved.entry.clone()).collect();
    let puts: Vec<usize> = (0..entries.len()).filter(|&index| entries[index].kind == EntryKind::Put).collect();
    let (offsets, payload_len) = lay_out(puts.iter().map(|&index| entries[index].length));
    let mut blobs = Vec::with_capacity(puts.len());
    for (&index, &offset) in puts.iter().zip(&offsets) {
        let entry = &mut entries[index];
        entry.offset = offset;
        let dtype = entry.dtype().expect("entries are judged when they are read");
        blobs.push(Blob::new(
            TensorRef::from_reader(dtype, &entry.shape, &sources[index], moved[index].offset)?,
            offset,
        ));
    }
    let body = encode(core, &entries)?;
    let frame_len = body.frame_len();
    let tail = committer.lease(frame_len + payload_len)?;
    if let Err(error) = stream_payload(core, &tail, frame_len, payload_len, &mut blobs) {
        return Err(match take_back(core, tail, error) {
            Error::Source { source } => Error::Io { action: "read", path: failed.take().unwrap_or_default(), source },
            error => error,
        });
    }
    let is_whole = |(&index, blob): (&usize, &Blob<'_>)| {
        blob.crc == entries[index].crc && blob.chunk_crcs == entries[index].chunk_crcs
    };
    let damaged: Vec<usize> =
        puts.iter().zip(&blobs).filter(|&pair| !is_whole(pair)).map(|(&index, _)| index).collect();
    if !damaged.is_empty() {
        committer.give_back(tail);
        return Ok(damaged);
    }
    committer.sync_payload(&tail)?;
    let seq = committer.write_large(tail, &body, payload_len, index_entries(entries), true, None)?;
    finish(core, seq, true)?;
    Ok(Vec::new())
}

/// Whether a put is what its key leads to.
fn leads_here(version: &Version, entry: &Entry, segment: SegmentId, at: u64) -> Result<bool> {
    Ok(version.lookup(&entry.key)?.is_some_and(|now| {
        now.kind == IndexKind::Put && now.segment == segment && now.offset == at && now.seq == entry.origin
    }))
}

/// Whether a delete is the last that was done to its key, as far as is known: an index that has nothing of the key may have
/// forgotten this one or a later one.
fn still_deleted(version: &Version, entry: &Entry) -> Result<bool> {
    Ok(version.lookup(&entry.key)?.is_none_or(|now| now.kind == IndexKind::Delete && now.seq <= entry.origin))
}

/// As of which commit the oldest put counts in any segment but this one that a manifest may name.
fn oldest_put_beside(core: &Core, id: SegmentId) -> Seq {
    let segments = core.segments.all();
    let records: Vec<SegmentRecord> = segments
        .iter()
        .filter(|segment| segment.id != id && !segment.is_condemned())
        .map(|segment| segment.record())
        .collect();
    oldest_put(records.iter())
}

/// A value as it lies in a segment.
struct Source<'a> {
    from: &'a From,
    /// The file that could not be read.
    failed: &'a RefCell<Option<PathBuf>>,
}

impl ReadAt for Source<'_> {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let file = &*self.from.file;
        let direct = file.direct() && is_direct_aligned(buf.as_ptr().addr() as u64, offset, buf.len());
        // What is read once is not worth a place in the page cache.
        let caching = if direct { Caching::Direct } else { Caching::Buffered };
        read_exact_at(file, buf, offset, caching).inspect_err(|_| {
            self.failed.replace(Some(self.from.segment.path.clone()));
        })
    }
}
