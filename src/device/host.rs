//! Host memory as a device's memory: page-aligned, zeroed, given back on drop. It refuses nothing but what the system
//! refuses, and never aborts the process for a large request: that is an error.
//!
//! # Invariants
//! - The address is a multiple of 4 KiB and the room behind it is whole 4 KiB pages, so that a direct transfer may end
//!   in a partly used page.
//! - Bytes past the length are never shown as value bytes.

use std::io;

use memmap2::{Advice, MmapMut};

use crate::storage::{AlignedBuf, DIRECT_ALIGN_BYTES};

/// From this length on, memory is mapped and huge pages are asked for; below, it comes from the heap.
///
/// A huge page is 2 MiB. Filling 2 to 16 MiB of new memory took 109 µs to 1.7 ms mapped with huge pages, 0.6 to 5.8 ms
/// from the heap (x86-64, Linux, madvise mode); below 2 MiB the heap was as fast or, under 128 KiB, ten times faster.
const MAPPED_BYTES_MIN: usize = 2 << 20;

/// A page-aligned, zeroed run of host memory.
#[derive(Debug)]
pub(crate) struct HostMemory {
    pages: Pages,
    len: usize,
}

#[derive(Debug)]
enum Pages {
    Heap(AlignedBuf),
    Mapped(MmapMut),
}

impl HostMemory {
    /// Zeroed memory of `len` bytes; the room behind it is whole pages.
    ///
    /// A large one costs nothing until it is touched.
    pub(crate) fn zeroed(len: u64) -> io::Result<Self> {
        let too_large = || io::Error::from(io::ErrorKind::OutOfMemory);
        let len = usize::try_from(len).map_err(|_| too_large())?;
        let padded = len.checked_next_multiple_of(DIRECT_ALIGN_BYTES as usize).ok_or_else(too_large)?;
        if padded < MAPPED_BYTES_MIN {
            return Ok(Self { pages: Pages::Heap(AlignedBuf::zeroed(padded)), len });
        }
        if isize::try_from(padded).is_err() {
            return Err(too_large());
        }
        let map = MmapMut::map_anon(padded)?;
        #[cfg(target_os = "linux")]
        if let Err(error) = map.advise(Advice::HugePage) {
            tracing::trace!(%error, "no huge pages for host memory");
        }
        Ok(Self { pages: Pages::Mapped(map), len })
    }

    /// The length that was asked for.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        match &self.pages {
            Pages::Heap(buf) => &buf[..self.len],
            Pages::Mapped(map) => &map[..self.len],
        }
    }

    /// The bytes, to write.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        let len = self.len;
        &mut self.pages_mut()[..len]
    }

    /// The bytes and the rest of the last page behind them: room for a direct transfer that ends in whole blocks.
    pub(crate) fn pages_mut(&mut self) -> &mut [u8] {
        match &mut self.pages {
            Pages::Heap(buf) => buf,
            Pages::Mapped(map) => map,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_aligned_zeroed_and_padded_to_whole_pages() {
        for len in [0, 1, 4095, 4096, 4097, MAPPED_BYTES_MIN - 1, MAPPED_BYTES_MIN, MAPPED_BYTES_MIN + 1] {
            let mut memory = HostMemory::zeroed(len as u64).unwrap();
            assert_eq!(memory.bytes().len(), len);
            assert_eq!(memory.pages_mut().len(), len.next_multiple_of(4096));
            assert_eq!(memory.pages_mut().as_ptr() as usize % 4096, 0);
            assert!(memory.pages_mut().iter().all(|&byte| byte == 0));
            memory.bytes_mut().fill(7);
            assert!(memory.bytes().iter().all(|&byte| byte == 7));
        }
    }

    #[test]
    fn memory_that_nobody_has_is_an_error_not_an_abort() {
        for len in [u64::MAX, u64::MAX - 4096, i64::MAX as u64, 1 << 62, 1 << 50] {
            assert!(HostMemory::zeroed(len).is_err(), "{len}");
        }
    }
}
