//! Counters of what a store did since it was opened.

use std::sync::atomic::{AtomicU64, Ordering};

/// What a store did since it was opened, as of one moment. Counters only rise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Metrics {
    /// Commits acknowledged.
    pub commits: u64,
    /// Bytes of payload committed.
    pub bytes_put: u64,
    /// Values read, each key of a `get_many` counted.
    pub gets: u64,
    /// Bytes of payload read and verified.
    pub bytes_got: u64,
    /// Bytes read past the page cache.
    pub bytes_direct: u64,
    /// Bytes read through the page cache.
    pub bytes_buffered: u64,
    /// Bytes that went to a GPU out of pinned pages of the page cache.
    pub bytes_pinned: u64,
    /// Values whose checksum did not match.
    pub checksum_failures: u64,
    /// Times the index overlay was written out.
    pub index_flushes: u64,
    /// Flushes of the index that failed; they are tried again.
    pub index_flush_failures: u64,
    /// Syncs of segment files.
    pub segment_syncs: u64,
    /// Files of segments removed in which nothing lived.
    pub segments_removed: u64,
    /// Bytes given back where dead values lay in segments that stay.
    pub bytes_punched: u64,
    /// Bytes of values copied by compaction.
    pub bytes_compacted: u64,
    /// Keys evicted to make room.
    pub keys_evicted: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) commits: AtomicU64,
    pub(crate) bytes_put: AtomicU64,
    pub(crate) gets: AtomicU64,
    pub(crate) bytes_got: AtomicU64,
    pub(crate) bytes_direct: AtomicU64,
    pub(crate) bytes_buffered: AtomicU64,
    pub(crate) bytes_pinned: AtomicU64,
    pub(crate) checksum_failures: AtomicU64,
    pub(crate) index_flushes: AtomicU64,
    pub(crate) index_flush_failures: AtomicU64,
    pub(crate) segments_removed: AtomicU64,
    pub(crate) bytes_punched: AtomicU64,
    pub(crate) bytes_compacted: AtomicU64,
    pub(crate) keys_evicted: AtomicU64,
}

impl Counters {
    pub(crate) fn add(counter: &AtomicU64, amount: u64) {
        counter.fetch_add(amount, Ordering::Relaxed);
    }

    pub(crate) fn snapshot(&self) -> Metrics {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Metrics {
            commits: read(&self.commits),
            bytes_put: read(&self.bytes_put),
            gets: read(&self.gets),
            bytes_got: read(&self.bytes_got),
            bytes_direct: read(&self.bytes_direct),
            bytes_buffered: read(&self.bytes_buffered),
            bytes_pinned: read(&self.bytes_pinned),
            checksum_failures: read(&self.checksum_failures),
            index_flushes: read(&self.index_flushes),
            index_flush_failures: read(&self.index_flush_failures),
            segment_syncs: 0,
            segments_removed: read(&self.segments_removed),
            bytes_punched: read(&self.bytes_punched),
            bytes_compacted: read(&self.bytes_compacted),
            keys_evicted: read(&self.keys_evicted),
        }
    }
}
