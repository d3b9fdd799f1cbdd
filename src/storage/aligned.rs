//! Host memory that a direct transfer may use: page-aligned, a whole number of pages, zeroed when made.

use std::fmt;
use std::ops::{Deref, DerefMut};

/// The alignment that a direct transfer keeps: of address, offset and length. Every common disk's logical block is 512
/// or 4096 bytes; the format's block is 4096, so nothing is lost by always taking the larger.
pub const DIRECT_ALIGN_BYTES: u64 = 4096;

const PAGE: usize = DIRECT_ALIGN_BYTES as usize;

#[repr(C, align(4096))]
#[derive(Clone, Copy)]
struct Page([u8; PAGE]);

/// A page-aligned buffer whose length is a whole number of 4 KiB pages.
pub struct AlignedBuf {
    pages: Box<[Page]>,
}

impl AlignedBuf {
    /// A zeroed buffer of at least `len` bytes, rounded up to whole pages.
    ///
    /// Takes the memory as zeros from the system, so a large one costs nothing until it is touched.
    pub fn zeroed(len: usize) -> Self {
        let pages = Box::<[Page]>::new_zeroed_slice(len.div_ceil(PAGE));
        #[expect(
            unsafe_code,
            reason = "zeroed memory is a valid page of bytes; writing them out by hand would touch them"
        )]
        // SAFETY: `Page` is an array of `u8`, for which all-zero bytes are a valid value.
        let pages = unsafe { pages.assume_init() };
        Self { pages }
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        #[expect(unsafe_code, reason = "pages are bytes; the standard library has no safe flattening of a newtype")]
        // SAFETY: `Page` is `repr(C)` over `[u8; 4096]` with size 4096 (asserted below), so the slice of pages is one
        // run of initialised bytes of this length, borrowed as long as `self` is.
        unsafe {
            std::slice::from_raw_parts(self.pages.as_ptr().cast(), self.pages.len() * PAGE)
        }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        #[expect(unsafe_code, reason = "pages are bytes; the standard library has no safe flattening of a newtype")]
        // SAFETY: as in `deref`, and `&mut self` makes the borrow unique.
        unsafe {
            std::slice::from_raw_parts_mut(self.pages.as_mut_ptr().cast(), self.pages.len() * PAGE)
        }
    }
}

const _: () = assert!(size_of::<Page>() == PAGE && align_of::<Page>() == PAGE);

impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBuf({} bytes)", self.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_page_aligned_zeroed_and_rounded_up() {
        for len in [0, 1, 4095, 4096, 4097, 1 << 20] {
            let mut buf = AlignedBuf::zeroed(len);
            assert_eq!(buf.len(), len.next_multiple_of(PAGE));
            assert_eq!(buf.as_ptr() as usize % PAGE, 0);
            assert!(buf.iter().all(|&b| b == 0));
            if let Some(last) = buf.last_mut() {
                *last = 7;
                assert_eq!(buf[buf.len() - 1], 7);
            }
        }
    }
}
