//! Makes commits visible, and keeps the count of what lives where.
//!
//! # Invariants
//! - A commit that is on the disk becomes visible, whether or not the index can be read at that moment. What it made die is
//!   counted later then ([`count_late`]): before its keys are in a run themselves, and before anybody compares.

use std::ops::AddAssign;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use alight_format::{Entry, EntryKind, IndexEntry, IndexKind, SegmentId, Seq};

use crate::error::{Error, Result};
use crate::index::Version;
use crate::store::commit::Written;
use crate::store::segment::Segments;

/// What a commit changed, in bytes of values.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Change {
    /// Keys lead to them now.
    pub(crate) born: u64,
    /// Keys led to them before.
    pub(crate) died: u64,
    /// They were dead on arrival.
    pub(crate) overtaken: u64,
}

impl AddAssign for Change {
    fn add_assign(&mut self, other: Self) {
        self.born += other.born;
        self.died += other.died;
        self.overtaken += other.overtaken;
    }
}

/// Adds one commit to a version that nobody else sees yet, and to the accounts of the segments it touches.
///
/// Looks up what each key led to before, less than a microsecond a key. Where that part of the index cannot be read the commit
/// counts all the same: it is on the disk; only what the key led to is counted later.
///
/// A commit of compaction repeats entries, and each counts as of the commit that it is from: a put takes effect only where
/// the key still leads to that very put. Whatever was done to the key since stands, and what was moved is dead on arrival. A
/// repeated delete changes nothing here: the index knows it, or has nothing older left to hide.
pub(crate) fn publish(version: &mut Version, segments: &Segments, commit: Written) -> Change {
    let mut change = Change::default();
    let mut own = *commit.segment.accounting.lock();
    for entry in commit.entries {
        if entry.kind == IndexKind::Delete {
            own.newest_delete = own.newest_delete.max(entry.seq);
        } else if entry.segment == commit.segment.id {
            own.put(entry.seq, entry.length);
        } else {
            // An alias: its key is told here alone, so this segment stays.
            own.newest_delete = Seq(u64::MAX);
        }
        let before = version.lookup(&entry.key);
        let stands = match (&before, entry.kind) {
            _ if !commit.repeats => true,
            (Ok(Some(now)), IndexKind::Put) => now.kind == IndexKind::Put && now.seq == entry.seq,
            _ => false,
        };
        if !stands {
            change.overtaken += entry.length;
            continue;
        }
        if entry.kind == IndexKind::Delete
            && let Some(deleted) = &commit.deleted
        {
            // Of a damaged index nothing better is known than what a look beforehand found.
            let was_there =
                before.as_ref().map_or(true, |now| now.as_ref().is_some_and(|now| now.kind == IndexKind::Put));
            deleted.store(was_there, Ordering::Release);
        }
        let mut uncounted = false;
        match before {
            Ok(Some(old)) if old.kind == IndexKind::Put => {
                change.died += old.length;
                if old.segment == commit.segment.id {
                    own.dies(old.length);
                } else if let Some(segment) = segments.get(old.segment) {
                    segment.accounting.lock().dies(old.length);
                }
            }
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(%error, "the index cannot be read: what a commit made die is counted later");
                uncounted = true;
            }
        }
        if entry.kind == IndexKind::Put {
            change.born += entry.length;
            if entry.segment == commit.segment.id {
                own.lives(entry.length);
            } else if let Some(segment) = segments.get(entry.segment) {
                let mut accounting = segment.accounting.lock();
                accounting.put(entry.seq, entry.length);
                accounting.lives(entry.length);
            }
        }
        let entry = Arc::new(entry);
        if uncounted {
            version.uncounted.insert(Arc::clone(&entry));
        }
        version.overlay.insert(entry);
    }
    own.end = commit.end;
    own.previous_digest = commit.digest;
    *commit.segment.accounting.lock() = own;
    debug_assert_eq!(version.seq.next(), commit.seq, "commits are published in order, none left out");
    version.seq = commit.seq;
    change
}

/// Counts what commits made die whose keys could not be looked up when they were published: into the accounts, and into
/// `died`, in bytes of values. Fails with the first key that cannot be looked up now either; those stay to be counted.
///
/// A key whose part of the index is damaged is given up: the count stays too high by what it led to until the index is made
/// anew, which it has to be anyway.
pub(crate) fn count_late(version: &mut Version, segments: &Segments, died: &mut u64) -> Result<()> {
    let mut outcome = Ok(());
    for entry in std::mem::take(&mut version.uncounted).range(..) {
        match version.lookup_in_runs(&entry.key) {
            Ok(Some(old)) if old.kind == IndexKind::Put => {
                *died += old.length;
                if let Some(segment) = segments.get(old.segment) {
                    segment.accounting.lock().dies(old.length);
                }
            }
            Ok(_) => {}
            Err(error @ Error::Damaged(_)) => {
                tracing::warn!(%error, "live bytes are counted too high: a part of the index is damaged");
            }
            Err(error) => {
                version.uncounted.insert(Arc::clone(entry));
                outcome = outcome.and(Err(error));
            }
        }
    }
    outcome
}

/// The index's view of a frame's entry, in a commit with number `seq` whose payload begins at `payload` of `segment`.
pub(crate) fn index_entry(entry: Entry, seq: Seq, segment: SegmentId, frame_offset: u64, payload: u64) -> IndexEntry {
    let seq = entry.counts_from(seq);
    let (segment, frame_offset, offset) = match entry.kind {
        EntryKind::Put => (segment, frame_offset, payload + entry.offset),
        EntryKind::Delete => return IndexEntry::tombstone(&entry.key, seq, segment, frame_offset),
        EntryKind::Alias => (SegmentId(entry.segment), entry.frame_offset, entry.offset),
    };
    IndexEntry {
        dtype: entry.dtype().expect("entries are judged when they are made and when they are read"),
        has_attributes: !entry.attributes.is_empty(),
        key: entry.key,
        kind: IndexKind::Put,
        seq,
        segment,
        frame_offset,
        offset,
        length: entry.length,
        crc: entry.crc,
        shape: entry.shape,
    }
}
