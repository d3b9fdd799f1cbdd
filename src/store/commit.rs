//! How a commit gets from its parts to the disk, and becomes visible.
//!
//! Three stages, each under its own lock, so that one commit is written while another is synced:
//!
//! 1. **Write.** Small commits gather in a [`group`](super::group); its leader writes everybody's frames and payloads
//!    with one call, and zeros behind them now and then (see [`tail`]). A large commit streams its payload into a
//!    segment of which it has sole use, syncs it, and only then takes its sequence number and writes its frame.
//! 2. **Sync.** One sync of every segment that holds unsynced frames serves all commits written before it began.
//! 3. **Publish.** Commits become visible in the order of their sequence numbers.
//!
//! # Invariants
//! - Sequence numbers are given under the log's lock, and the frame is written before that lock is released: so a frame
//!   with number `n` is on its way to the disk before one with `n + 1` is.
//! - Within a segment, commits lie back to back: a segment is appended to by one commit (or one group) at a time.
//! - A failed write of a frame is undone by cutting the segment there, durably, before any other commit takes its
//!   number. If that fails too, or any sync does, the store refuses writes until it is opened again.
//! - Once writes are refused no commit is acknowledged as durable: the note for the next open says which was the last.
//! - Locks are taken in the order sync, publish, log, unsynced, verdict; none is taken while a later one is held, and the
//!   last is never held while anything waits for the disk.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, IoSlice};
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use alight_format::{EncodedBody, IndexEntry, IndexKind, PAYLOAD_SYNCED, PreludeFields, SegmentId, Seq};

use crate::config::GROUP_BYTES_MAX;
use crate::error::{Error, Result};
use crate::storage::{AlignedBuf, Caching, PooledBuf, StorageFile, write_all_vectored_at};
use crate::store::segment::{FIRST_FRAME, Segment, Segments};
use crate::sync::lock::Mutex;

mod streamed;
mod tail;

pub(crate) use streamed::{Rest, Stream, Streamed, begin};
pub(crate) use tail::Tail;

/// A commit whose bytes are ready but for what depends on its place: the front of `bytes` is room for the frame, the
/// rest is the payload.
pub(crate) struct SmallCommit {
    pub(crate) body: EncodedBody,
    pub(crate) bytes: PooledBuf,
    /// Index entries with `offset` still relative to the payload, and no place or number yet.
    pub(crate) entries: Vec<IndexEntry>,
    pub(crate) durable: bool,
    pub(crate) deleted: Option<Deleted>,
}

/// A commit that waits for its turn in the group.
pub(crate) enum Queued {
    /// Whose bytes are there.
    Whole(SmallCommit),
    /// Whose bytes come as they are written. It is a group by itself.
    Streamed(Streamed),
}

impl Queued {
    pub(crate) fn is_durable(&self) -> bool {
        match self {
            Self::Whole(commit) => commit.durable,
            Self::Streamed(commit) => commit.durable,
        }
    }
}

/// Told when a commit becomes visible: whether a key that it deletes led to a value just before. For whoever asked for the
/// delete: what a look beforehand finds another commit may have taken away since.
pub(crate) type Deleted = Arc<AtomicBool>;

/// A commit that is written and not yet visible.
pub(crate) struct Written {
    pub(crate) seq: Seq,
    pub(crate) durable: bool,
    pub(crate) segment: Arc<Segment>,
    pub(crate) end: u64,
    pub(crate) digest: u32,
    pub(crate) entries: Vec<IndexEntry>,
    /// Whether it is compaction's own, and repeats what earlier commits did.
    pub(crate) repeats: bool,
    pub(crate) deleted: Option<Deleted>,
}

struct Log {
    next: Seq,
    /// Where small commits go.
    small: Option<Tail>,
    /// Segments with room that no large commit is using now.
    spare: Vec<Tail>,
    /// Segments as the opening found them, of which no sync tells that they are so on the disk: an earlier process may have
    /// cut off a frame that failed, and have died before that was durable. The frame's number is given anew.
    found: BTreeMap<SegmentId, Arc<dyn StorageFile>>,
}

/// What is written, and not all of it synced. Apart from the log, whose lock is held while a group is written: a sync need
/// not wait for that.
struct Unsynced {
    /// Every commit up to this one is written.
    through: Seq,
    /// Segments with frames that no sync has covered, each with its file.
    dirty: BTreeMap<SegmentId, Arc<dyn StorageFile>>,
}

/// The write side of a store.
pub(crate) struct Committer {
    segments: Arc<Segments>,
    segment_bytes: u64,
    log: Mutex<Log>,
    unsynced: Mutex<Unsynced>,
    written: Mutex<VecDeque<Written>>,
    sync: Mutex<()>,
    synced: AtomicU64,
    refused: OnceLock<String>,
    /// Held while it is decided which comes first: that a sync counts, or that writes are refused. Up to which commit the
    /// note for the next open says that the disk may be believed, once there is one.
    verdict: Mutex<Option<Seq>>,
    /// Held while the note is written.
    noting: Mutex<()>,
    /// The generation of the manifest that is on the disk.
    pub(crate) generation: AtomicU64,
    pub(crate) syncs: AtomicU64,
}

impl Committer {
    /// Takes up where recovery ended: everything up to `last` is on the disk, durably.
    pub(crate) fn new(
        segments: Arc<Segments>,
        segment_bytes: u64,
        generation: u64,
        last: Seq,
        mut tails: Vec<Tail>,
    ) -> Self {
        let found = tails.iter().filter(|tail| !tail.synced).map(|tail| (tail.segment.id, Arc::clone(&tail.file)));
        let found = found.collect();
        let small = (!tails.is_empty()).then(|| tails.remove(0));
        Self {
            segments,
            segment_bytes,
            log: Mutex::new(Log { next: last.next(), small, spare: tails, found }),
            unsynced: Mutex::new(Unsynced { through: last, dirty: BTreeMap::new() }),
            written: Mutex::default(),
            sync: Mutex::default(),
            synced: AtomicU64::new(last.get()),
            refused: OnceLock::new(),
            verdict: Mutex::default(),
            noting: Mutex::default(),
            generation: AtomicU64::new(generation),
            syncs: AtomicU64::new(0),
        }
    }

    /// The most that commits which are written as one group may have together.
    pub(crate) fn group_bytes(&self) -> u64 {
        GROUP_BYTES_MAX.min(self.segment_bytes / 4)
    }

    /// Whether a commit of this size, frame included, shares a segment with others.
    pub(crate) fn shares_a_segment(&self, total_bytes: u64) -> bool {
        total_bytes <= self.segment_bytes / 4
    }

    /// Everything up to here survives power loss.
    pub(crate) fn synced(&self) -> Seq {
        Seq(self.synced.load(Ordering::Acquire))
    }

    /// An error once an earlier failure has made writing unsafe.
    pub(crate) fn check(&self) -> Result<()> {
        match self.refused.get() {
            None => Ok(()),
            Some(cause) => Err(Error::WritesRefused { cause: cause.clone() }),
        }
    }

    /// Refuses all writes from now on, and leaves word for the next open: a sync failed, so nothing is to be believed that
    /// an earlier one did not cover.
    pub(crate) fn refuse(&self, cause: &Error) {
        self.refuse_beyond(cause, Seq::ZERO);
    }

    /// [`refuse`](Self::refuse), where everything up to `written` is in its place, though no sync has covered it: eventual
    /// commits outlive the process.
    fn refuse_beyond(&self, cause: &Error, written: Seq) {
        if self.stop(cause, written) {
            self.leave_note();
        }
    }

    /// Refuses all writes from now on, where everything up to `written` is in its place; whether there is a note to be left for
    /// the next open. Waits for no disk.
    pub(crate) fn stop(&self, cause: &Error, written: Seq) -> bool {
        // The note names the last commit that was acknowledged: none may be after it was read.
        let mut noted = self.verdict.lock();
        let believed = written.max(self.synced());
        if self.refused.set(cause.to_string()).is_ok() {
            tracing::error!(%cause, "writes are refused until the store is opened again");
        }
        // A sync may fail that was under way when something else was the first cause.
        let is_news = noted.is_none_or(|already| believed < already);
        if is_news {
            *noted = Some(believed);
        }
        is_news
    }

    /// Leaves word for the next open of what was decided by [`stop`](Self::stop).
    pub(crate) fn leave_note(&self) {
        // One after another, and each says the latest: none is written over by one that believes more.
        let _turn = self.noting.lock();
        let believed = *self.verdict.lock();
        if let Some(believed) = believed {
            self.segments.leave_distrust(self.generation.load(Ordering::Acquire), believed);
        }
    }

    /// Writes what was queued as one group. Blocks for the write, not for a sync. Returns the last commit's number.
    pub(crate) fn write_queued(&self, group: Vec<Queued>) -> Result<Seq> {
        let mut whole = Vec::with_capacity(group.len());
        for commit in group {
            match commit {
                Queued::Whole(commit) => whole.push(commit),
                Queued::Streamed(commit) => {
                    debug_assert!(whole.is_empty(), "it is a group by itself");
                    return self.write_streamed(commit);
                }
            }
        }
        self.write_group(whole)
    }

    /// Writes small commits with one call.
    fn write_group(&self, mut commits: Vec<SmallCommit>) -> Result<Seq> {
        let total = commits.iter().map(|commit| commit.bytes.len() as u64).sum();
        let mut log = self.log.lock();
        self.check()?;
        self.settle_found(&mut log)?;
        self.append(&mut log, &mut commits, total)
    }

    /// Before the first frame is written: makes what the opening found durable, so that no number is given twice.
    fn settle_found(&self, log: &mut Log) -> Result<()> {
        for (id, file) in std::mem::take(&mut log.found) {
            self.sync_segment(id, &*file)?;
        }
        Ok(())
    }

    /// Syncs a segment; where that fails, writes are refused from then on.
    fn sync_segment(&self, id: SegmentId, file: &dyn StorageFile) -> Result<()> {
        self.syncs.fetch_add(1, Ordering::Relaxed);
        file.sync().map_err(|source| {
            let path = self.segments.get(id).map(|segment| segment.path.clone()).unwrap_or_default();
            let error = Error::Io { action: "sync", path, source };
            self.refuse(&error);
            error
        })
    }

    fn append(&self, log: &mut Log, commits: &mut [SmallCommit], total: u64) -> Result<Seq> {
        let synced_through = self.synced();
        let mut seq = log.next;
        let tail = self.ready_tail(log, total)?;
        let mut offset = tail.offset;
        let mut previous_digest = tail.previous_digest;
        let mut written = Vec::with_capacity(commits.len());
        for commit in commits.iter_mut() {
            let frame_len = commit.body.frame_len();
            let payload_len = commit.bytes.len() as u64 - frame_len;
            let fields = PreludeFields {
                salt: tail.segment.salt,
                offset,
                seq,
                payload_len,
                synced_through,
                previous_digest,
                flags: 0,
                part: 0,
                parts: 1,
            };
            let digest = commit.body.write_frame(&fields, &mut commit.bytes[..frame_len as usize]);
            place(&mut commit.entries, seq, &tail.segment, offset, offset + frame_len);
            offset += commit.bytes.len() as u64;
            written.push(Written {
                seq,
                durable: commit.durable,
                segment: Arc::clone(&tail.segment),
                end: offset,
                digest,
                entries: std::mem::take(&mut commit.entries),
                repeats: false,
                deleted: commit.deleted.take(),
            });
            previous_digest = digest;
            seq = seq.next();
        }

        let mut slices: Vec<IoSlice<'_>> = commits.iter().map(|commit| IoSlice::new(&commit.bytes)).collect();
        let durable = commits.iter().any(|commit| commit.durable);
        let zeros = if durable { tail.zeros_behind(offset, total) } else { 0 };
        slices.extend(tail::zeros(zeros));
        if let Err(source) = write_all_vectored_at(&*tail.file, &mut slices, tail.offset, Caching::Direct) {
            let error = Error::Io { action: "write a commit to", path: tail.segment.path.clone(), source };
            self.undo_small(log);
            return Err(error);
        }
        tail.note_written_through(offset + zeros);
        self.note_appended(log, written);
        Ok(Seq(seq.get() - 1))
    }

    /// The end of the segment that small commits go to, with room for `total` more bytes.
    fn ready_tail<'l>(&self, log: &'l mut Log, total: u64) -> Result<&'l mut Tail> {
        if log.small.as_ref().is_none_or(|tail| tail.offset + total > self.segment_bytes) {
            if let Some(full) = log.small.take() {
                full.retire();
            }
            log.small = Some(self.open_tail(log, total)?);
        }
        let tail = log.small.as_mut().expect("made above");
        tail.reserve(total, self.segment_bytes)?;
        Ok(tail)
    }

    /// Takes note of small commits, at least one, that are in their place.
    fn note_appended(&self, log: &mut Log, written: Vec<Written>) {
        let (Some(tail), Some(last)) = (&mut log.small, written.last()) else { return };
        (tail.offset, tail.previous_digest) = (last.end, last.digest);
        tail.note_written_through(last.end);
        let seq = last.seq;
        log.next = seq.next();
        self.written.lock().extend(written);
        self.note_written(seq, tail);
    }

    /// [`undo`](Self::undo) of small commits that may have reached the disk in part.
    fn undo_small(&self, log: &mut Log) {
        if let Some(tail) = log.small.take() {
            self.undo(tail, log.next);
        }
    }

    /// A segment to stream a large commit of `total` bytes into, of which the caller has sole use.
    pub(crate) fn lease(&self, total: u64) -> Result<Tail> {
        self.check()?;
        if !self.shares_a_segment(total) {
            let (segment, file) = self.segments.create(true)?;
            let mut tail = Tail::fresh(segment, file, true);
            if let Err(error) = tail.reserve(total, 0) {
                self.segments.discard(&tail.segment, &*tail.file);
                return Err(error);
            }
            return Ok(tail);
        }
        let mut log = self.log.lock();
        let mut tail = match log.spare.iter().position(|tail| tail.offset + total <= self.segment_bytes) {
            Some(index) => log.spare.swap_remove(index),
            None => {
                while let Some(full) = log.spare.pop() {
                    full.retire();
                }
                drop(log);
                let (segment, file) = self.segments.create(false)?;
                Tail::fresh(segment, file, false)
            }
        };
        match tail.reserve(total, self.segment_bytes) {
            Ok(()) => Ok(tail),
            Err(error) => {
                self.give_back(tail);
                Err(error)
            }
        }
    }

    /// Returns a leased segment into which nothing was written, or only bytes that no frame speaks for.
    pub(crate) fn give_back(&self, tail: Tail) {
        if tail.offset == FIRST_FRAME {
            self.segments.discard(&tail.segment, &*tail.file);
        } else {
            // The bytes past the last frame are stale now; the next large commit starts a fresh segment.
            tail.retire();
        }
    }

    /// Leaves a leased segment to a write that does not come back, and asks the disk for nothing: no commit goes there any
    /// more. What the write leaves behind the last commit is of no meaning.
    pub(crate) fn leave(&self, tail: &Tail) {
        tail.segment.seal(tail.offset);
    }

    /// Makes the payload of a large commit durable, before its frame speaks for it. After a failure writes are refused.
    pub(crate) fn sync_payload(&self, tail: &Tail) -> Result<()> {
        tail.file.sync().map_err(Error::io("sync", &tail.segment.path)).inspect_err(|error| self.refuse(error))
    }

    /// Writes the frame of a large commit, or of one of compaction, whose payload is durable in `tail` already.
    pub(crate) fn write_large(
        &self,
        mut tail: Tail,
        body: &EncodedBody,
        payload_len: u64,
        mut entries: Vec<IndexEntry>,
        durable: bool,
        deleted: Option<Deleted>,
    ) -> Result<Seq> {
        let frame_len = body.frame_len();
        let mut frame = AlignedBuf::zeroed(frame_len as usize);
        let mut log = self.log.lock();
        self.check()?;
        self.settle_found(&mut log)?;
        let seq = log.next;
        let fields = PreludeFields {
            salt: tail.segment.salt,
            offset: tail.offset,
            seq,
            payload_len,
            synced_through: self.synced(),
            previous_digest: tail.previous_digest,
            flags: PAYLOAD_SYNCED,
            part: 0,
            parts: 1,
        };
        // Entries that repeat earlier ones have their numbers already.
        let repeats = entries.iter().any(|entry| entry.seq != Seq::ZERO);
        let digest = body.write_frame(&fields, &mut frame);
        let mut slices = [IoSlice::new(&frame)];
        if let Err(source) = write_all_vectored_at(&*tail.file, &mut slices, tail.offset, Caching::Direct) {
            let error = Error::Io { action: "write a frame to", path: tail.segment.path.clone(), source };
            self.undo(tail, log.next);
            return Err(error);
        }
        place(&mut entries, seq, &tail.segment, tail.offset, tail.offset + frame_len);
        tail.offset += frame_len + payload_len;
        tail.previous_digest = digest;
        log.next = seq.next();
        self.written.lock().push_back(Written {
            seq,
            durable,
            segment: Arc::clone(&tail.segment),
            end: tail.offset,
            digest,
            entries,
            repeats,
            deleted,
        });
        self.note_written(seq, &tail);
        if tail.offset < self.segment_bytes && !tail.single {
            log.spare.push(tail);
        } else {
            tail.retire();
        }
        Ok(seq)
    }

    /// Makes everything written so far durable, at least up to `seq`. Blocks for one sync per segment with news.
    pub(crate) fn sync_through(&self, seq: Seq) -> Result<()> {
        if self.synced() >= seq {
            return Ok(());
        }
        let _turn = self.sync.lock();
        if self.synced() >= seq {
            return Ok(());
        }
        self.check()?;
        let (through, dirty) = {
            let mut unsynced = self.unsynced.lock();
            (unsynced.through, std::mem::take(&mut unsynced.dirty))
        };
        for (id, file) in dirty {
            self.sync_segment(id, &*file)?;
        }
        let _verdict = self.verdict.lock();
        self.check()?;
        self.synced.store(through.get(), Ordering::Release);
        Ok(())
    }

    /// The number of the last commit that was written.
    pub(crate) fn last_written(&self) -> Seq {
        self.unsynced.lock().through
    }

    /// Notes that everything up to `seq`, the last of which is in `tail`, is written. Under the log's lock, so in order.
    fn note_written(&self, seq: Seq, tail: &Tail) {
        let mut unsynced = self.unsynced.lock();
        unsynced.dirty.insert(tail.segment.id, Arc::clone(&tail.file));
        unsynced.through = seq;
    }

    /// Takes the commits that may become visible now, in order. The caller publishes them before it asks again.
    pub(crate) fn take_publishable(&self) -> Vec<Written> {
        let synced = self.synced();
        let mut written = self.written.lock();
        let ready = written.iter().take_while(|commit| !commit.durable || commit.seq <= synced).count();
        written.drain(..ready).collect()
    }

    /// Gives back the space that was taken ahead, at the end of a store's life. Nothing may be in flight.
    pub(crate) fn trim(&self) -> Result<()> {
        let log = self.log.lock();
        for tail in log.small.iter().chain(&log.spare) {
            tail.file.truncate(tail.offset).map_err(Error::io("trim", &tail.segment.path))?;
            tail.file.sync().map_err(Error::io("sync", &tail.segment.path))?;
        }
        Ok(())
    }

    /// Gives back the space that was taken ahead in segments that nobody is writing to now. It is taken again when needed.
    pub(crate) fn give_back_ahead(&self) -> Result<()> {
        let mut log = self.log.lock();
        let Log { small, spare, .. } = &mut *log;
        for tail in small.iter_mut().chain(spare) {
            tail.file.truncate(tail.offset).map_err(Error::io("trim", &tail.segment.path))?;
            tail.allocated = tail.offset;
            tail.prewritten = tail.prewritten.map(|_| tail.offset);
        }
        Ok(())
    }

    /// Ends the segments that nobody is writing to now and for which `ripe` says so, so that space in them can be given
    /// back. Later commits begin others.
    pub(crate) fn seal_tails(&self, ripe: impl Fn(&Segment) -> bool) {
        let mut log = self.log.lock();
        // One without a commit has nothing to give back.
        let ends = |tail: &Tail| tail.offset > FIRST_FRAME && ripe(&tail.segment);
        if log.small.as_ref().is_some_and(ends)
            && let Some(full) = log.small.take()
        {
            full.retire();
        }
        let (full, spare) = std::mem::take(&mut log.spare).into_iter().partition(ends);
        log.spare = spare;
        let full: Vec<Tail> = full;
        full.into_iter().for_each(Tail::retire);
    }

    fn open_tail(&self, log: &mut Log, total: u64) -> Result<Tail> {
        // A spare segment of the other kind serves as well as a fresh one.
        if let Some(index) = log.spare.iter().position(|tail| tail.offset + total <= self.segment_bytes) {
            return Ok(log.spare.swap_remove(index));
        }
        let (segment, file) = self.segments.create(false)?;
        Ok(Tail::fresh(segment, file, false))
    }

    /// Takes back frames that may have reached the disk in part, from that of commit `first` on: cuts the segment where
    /// they began, durably.
    fn undo(&self, tail: Tail, first: Seq) {
        let failed = |source| Error::Io { action: "cut", path: tail.segment.path.clone(), source };
        if let Err(source) = tail.file.truncate(tail.offset) {
            // No sync failed: what was written before is as good as it was.
            self.refuse_beyond(&failed(source), Seq(first.get() - 1));
        } else if let Err(source) = tail.file.sync() {
            self.refuse(&failed(source));
        } else {
            tail.segment.seal(tail.offset);
        }
    }
}

/// Fills in what the entries could not know before the commit had its place.
fn place(entries: &mut [IndexEntry], seq: Seq, segment: &Segment, frame_offset: u64, payload: u64) {
    for entry in entries {
        if entry.seq == Seq::ZERO {
            entry.seq = seq;
        }
        entry.segment = segment.id;
        entry.frame_offset = frame_offset;
        if entry.kind == IndexKind::Put {
            entry.offset += payload;
        }
    }
}

/// A second copy of an error that several commits of a group share.
pub(crate) fn duplicate(error: &Error) -> Error {
    match error {
        Error::Io { action, path, source } => Error::Io {
            action,
            path: path.clone(),
            source: source.raw_os_error().map_or_else(|| source.kind().into(), io::Error::from_raw_os_error),
        },
        Error::WritesRefused { cause } => Error::WritesRefused { cause: cause.clone() },
        Error::Timeout { operation, path, after_ms } => {
            Error::Timeout { operation, path: path.clone(), after_ms: *after_ms }
        }
        other => Error::WritesRefused { cause: other.to_string() },
    }
}
