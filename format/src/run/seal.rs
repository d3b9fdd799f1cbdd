//! The checksum of a run's parts, bound to the run and to the part's place in it.
//!
//! A disk that lost a write, or wrote it elsewhere, shows bytes that are whole and were right once: a block of a deleted run
//! whose place the file took over, a line of the table of another part of the file. So the checksum of a part begins with whose it
//! is and where it lies, as a frame's does in a segment.

use crate::checksum::{crc32, crc32_after};
use crate::ids::{RunId, StoreId};

/// What every checksum of a run begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Seal(u32);

impl Seal {
    pub(super) fn new(store: StoreId, run: RunId) -> Self {
        Self(crc32_after(crc32(&store.0), &run.0.to_le_bytes()))
    }

    /// The CRC-32 of the store's id, the run's number, the part's offset in the file, and the part's bytes.
    #[inline]
    pub(super) fn crc(self, at: u64, bytes: &[u8]) -> u32 {
        crc32_after(crc32_after(self.0, &at.to_le_bytes()), bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seal_is_the_checksum_of_everything_end_to_end() {
        let bytes = [[7; 16].as_slice(), &3u64.to_le_bytes(), &4096u64.to_le_bytes(), b"the bytes"].concat();
        assert_eq!(Seal::new(StoreId([7; 16]), RunId(3)).crc(4096, b"the bytes"), crc32(&bytes));
    }
}
