//! Pages of the page cache, pinned for a GPU: a mapped range of a file that copies start from without staging.
//!
//! # Invariants
//! - The range is unpinned before its mapping can go, and neither goes while a copy uses them: whoever enqueues one holds a
//!   share until it is done.
//! - The processor never reads through the mapping here: a file that was cut meanwhile cannot kill the process.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use super::CudaDevice;
use super::memory::Pinned;
use crate::error::Result;
use crate::storage::StorageMap;

/// A range of a mapped file, pinned. Unpinned on drop.
pub(crate) struct PinnedMap {
    // Dropped in this order.
    _pinned: Pinned,
    map: Arc<dyn StorageMap>,
    range: Range<usize>,
}

impl PinnedMap {
    /// Pins the pages of a range of a mapping, reading those from the disk that are not in the page cache.
    ///
    /// # Panics
    /// If the range lies outside the mapping.
    pub(in crate::device) fn new(
        device: &'static CudaDevice,
        map: Arc<dyn StorageMap>,
        range: Range<usize>,
    ) -> Result<PinnedMap> {
        let bytes = &map.bytes()[range.clone()];
        let (address, len) = (bytes.as_ptr().cast_mut(), bytes.len());
        // SAFETY: the mapping is held beside the answer, which is dropped first. It is pinned for reading alone.
        let pinned = unsafe { device.pin_to_read(address, len) }?;
        Ok(PinnedMap { _pinned: pinned, map, range })
    }

    /// The bytes that are pinned.
    pub(crate) fn len(&self) -> usize {
        self.range.len()
    }

    /// Where a range of them begins in host memory.
    ///
    /// # Panics
    /// If it lies outside of what is pinned.
    pub(super) fn address(&self, range: &Range<usize>) -> *const u8 {
        assert!(range.start <= range.end && range.end <= self.len(), "a range outside of what is pinned");
        self.map.bytes().as_ptr().wrapping_add(self.range.start + range.start)
    }
}

impl fmt::Debug for PinnedMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PinnedMap({:?})", self.range)
    }
}
