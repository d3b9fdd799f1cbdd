//! Host memory as a device's memory: page-aligned, zeroed, given back on drop. It refuses nothing but what the system
//! refuses, and never aborts the process for a large request: that is an error.
//!
//! # Invariants
//! - The address is a multiple of 4 KiB and the room behind it is whole 4 KiB pages, so that a direct transfer may end
//!   in a partly used page.
//! - Bytes past the length are never shown as value bytes.

use std::any::Any;
use std::io;
use std::mem;
use std::sync::{Arc, LazyLock};

use memmap2::MmapMut;

use crate::storage::{AlignedBuf, BufferPool, DIRECT_ALIGN_BYTES, Landing, PooledBuf};

/// The unit in which host memory is handed out: what a direct transfer needs.
pub(super) const PAGE_BYTES: usize = DIRECT_ALIGN_BYTES as usize;

/// From this length on, memory is mapped and huge pages are asked for; below, it comes from the heap.
///
/// A huge page is 2 MiB. Filling 2 to 16 MiB of new memory took 109 µs to 1.7 ms mapped with huge pages, 0.6 to 5.8 ms
/// from the heap (x86-64, Linux, madvise mode); below 2 MiB the heap was as fast or, under 128 KiB, ten times faster.
const MAPPED_BYTES_MIN: usize = 2 << 20;

/// A page-aligned, zeroed run of host memory.
#[derive(Debug)]
pub(super) struct HostMemory {
    pages: Pages,
    len: usize,
}

#[derive(Debug)]
enum Pages {
    Heap(AlignedBuf),
    Lent(PooledBuf),
    Mapped(MmapMut),
}

/// Memory that was freed a moment ago, for arenas that are about to be filled whole: new memory of 1 MiB costs a third
/// of the time that a fast disk takes to fill it, in page faults. Keeps what a [`BufferPool`] keeps, per process.
static FREED: LazyLock<Arc<BufferPool>> = LazyLock::new(Arc::default);

impl HostMemory {
    /// Zeroed memory of `len` bytes; the room behind it is whole pages.
    ///
    /// A large one costs nothing until it is touched.
    pub(super) fn zeroed(len: u64) -> io::Result<Self> {
        let too_large = || io::Error::from(io::ErrorKind::OutOfMemory);
        let len = usize::try_from(len).map_err(|_| too_large())?;
        let padded = len.checked_next_multiple_of(PAGE_BYTES).ok_or_else(too_large)?;
        if padded < MAPPED_BYTES_MIN {
            return Ok(Self { pages: Pages::Heap(AlignedBuf::zeroed(padded)), len });
        }
        let map = map(padded)?;
        Ok(Self { pages: Pages::Mapped(map), len })
    }

    /// Memory of `len` bytes for a caller who fills it, or never shows what it did not fill: its contents are whatever
    /// an earlier user left there.
    pub(super) fn to_be_filled(len: u64) -> io::Result<Self> {
        match usize::try_from(len) {
            Ok(short) if short < MAPPED_BYTES_MIN => {
                let padded = short.next_multiple_of(PAGE_BYTES);
                Ok(Self { pages: Pages::Lent(FREED.take(padded)), len: short })
            }
            _ => Self::zeroed(len),
        }
    }

    /// The length that was asked for.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The bytes.
    pub(super) fn bytes(&self) -> &[u8] {
        match &self.pages {
            Pages::Heap(buf) => &buf[..self.len],
            Pages::Lent(buf) => &buf[..self.len],
            Pages::Mapped(map) => &map[..self.len],
        }
    }

    /// The bytes, to write.
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        let len = self.len;
        &mut self.pages_mut()[..len]
    }

    /// The bytes and the rest of the last page behind them: room for a direct transfer that ends in whole blocks.
    pub(super) fn pages_mut(&mut self) -> &mut [u8] {
        match &mut self.pages {
            Pages::Heap(buf) => buf,
            Pages::Lent(buf) => buf,
            Pages::Mapped(map) => map,
        }
    }
}

#[expect(unsafe_code, reason = "the trait's promise")]
// SAFETY: the pages are where they were allocated or mapped, wherever their owner is moved to, and are given back when he is
// dropped.
unsafe impl Landing for &mut HostMemory {
    fn bytes(&mut self) -> &mut [u8] {
        self.pages_mut()
    }

    fn leave(&mut self) -> Box<dyn Any + Send> {
        let nothing = HostMemory { pages: Pages::Heap(AlignedBuf::zeroed(0)), len: 0 };
        Box::new(mem::replace(&mut **self, nothing))
    }
}

/// Zeroed pages straight from the system, huge ones where it has them. They cost nothing until they are touched.
pub(super) fn map(len: usize) -> io::Result<MmapMut> {
    if isize::try_from(len).is_err() {
        return Err(io::ErrorKind::OutOfMemory.into());
    }
    let map = MmapMut::map_anon(len)?;
    // Miri does not have the call.
    #[cfg(all(target_os = "linux", not(miri)))]
    if let Err(error) = map.advise(memmap2::Advice::HugePage) {
        tracing::trace!(%error, "no huge pages for host memory");
    }
    Ok(map)
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
            assert!(*memory.pages_mut() == vec![0; len.next_multiple_of(4096)]);
            memory.bytes_mut().fill(7);
            assert!(*memory.bytes() == vec![7; len]);
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri ends where there is no memory for a mapping")]
    fn memory_that_nobody_has_is_an_error_not_an_abort() {
        for len in [u64::MAX, u64::MAX - 4096, i64::MAX as u64, 1 << 62, 1 << 50] {
            assert!(HostMemory::zeroed(len).is_err(), "{len}");
        }
    }
}
