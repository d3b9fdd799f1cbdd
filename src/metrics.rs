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
        }
    }
}
