//! Makes commits visible, and keeps the count of what lives where.

use std::sync::Arc;

use alight_format::{Entry, EntryKind, IndexEntry, IndexKind, SegmentId, Seq};

use crate::index::Version;
use crate::store::commit::Written;
use crate::store::segment::Segments;

/// Adds one commit to a version that nobody else sees yet, and to the accounts of the segments it touches.
///
/// Looks up what each key led to before, less than a microsecond a key. Where that part of the index is damaged the commit
/// counts all the same: it is on the disk; only the count of live bytes misses what the key led to.
pub(crate) fn publish(version: &mut Version, segments: &Segments, commit: Written) {
    for entry in commit.entries {
        match version.get(&entry.key) {
            Ok(Some(old)) => {
                if let Some(segment) = segments.get(old.segment) {
                    let mut accounting = segment.accounting.lock();
                    accounting.live_bytes = accounting.live_bytes.saturating_sub(old.length);
                }
            }
            Ok(None) => {}
            Err(error) => tracing::warn!(%error, "live bytes are counted too high: an index block cannot be read"),
        }
        if entry.kind == IndexKind::Put
            && let Some(segment) = segments.get(entry.segment)
        {
            let mut accounting = segment.accounting.lock();
            accounting.live_bytes += entry.length;
            accounting.blob_bytes += entry.length;
        }
        version.overlay.insert(Arc::new(entry));
    }
    let mut accounting = commit.segment.accounting.lock();
    accounting.end = commit.end;
    accounting.previous_digest = commit.digest;
    drop(accounting);
    debug_assert_eq!(version.seq.next(), commit.seq, "commits are published in order, none left out");
    version.seq = commit.seq;
}

/// The index's view of a frame's entry, in a commit whose payload begins at `payload` of `segment`.
pub(crate) fn index_entry(entry: Entry, seq: Seq, segment: SegmentId, frame_offset: u64, payload: u64) -> IndexEntry {
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
