//! Host memory that a direct transfer may use: page-aligned, a whole number of pages, zeroed when made.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use memmap2::MmapMut;
use parking_lot::Mutex;

use crate::config::{WRITE_BUFFER_BYTES, WRITE_BUFFERS};

/// The alignment that a direct transfer keeps: of address, offset and length. Every common disk's logical block is 512
/// or 4096 bytes; the format's block is 4096, so nothing is lost by always taking the larger.
pub const DIRECT_ALIGN_BYTES: u64 = 4096;

const PAGE: usize = DIRECT_ALIGN_BYTES as usize;

#[repr(C, align(4096))]
#[derive(Clone, Copy)]
struct Page([u8; PAGE]);

/// From this length on, a buffer is mapped with huge pages asked for: one page fault for 2 MiB instead of 512, and a
/// direct transfer of it is one piece for the disk instead of 256. On a virtual disk, 1 MiB in 4 KiB pages became two
/// requests, and a write of it took a third longer.
const MAPPED_BYTES_MIN: usize = 512 << 10;

/// The size of a huge page.
const HUGE: usize = 2 << 20;

/// A page-aligned buffer whose length is a whole number of 4 KiB pages.
pub struct AlignedBuf {
    memory: Memory,
    len: usize,
}

enum Memory {
    Heap(Box<[Page]>),
    Mapped(MmapMut),
}

impl AlignedBuf {
    /// A zeroed buffer of at least `len` bytes, rounded up to whole pages. Who needs large ones often takes them from a
    /// [`BufferPool`]: the first touch of new memory costs about a tenth of a millisecond a MiB.
    pub fn zeroed(len: usize) -> Self {
        let len = len.next_multiple_of(PAGE);
        let memory = match mapped(len) {
            Some(map) => Memory::Mapped(map),
            None => Memory::Heap(heap(len)),
        };
        Self { memory, len }
    }
}

/// Huge pages, where that is worth it and the system gives them.
fn mapped(len: usize) -> Option<MmapMut> {
    if len < MAPPED_BYTES_MIN {
        return None;
    }
    let map = MmapMut::map_anon(len.next_multiple_of(HUGE)).ok()?;
    #[cfg(target_os = "linux")]
    if let Err(error) = map.advise(memmap2::Advice::HugePage) {
        tracing::trace!(%error, "no huge pages for a buffer");
    }
    Some(map)
}

fn heap(len: usize) -> Box<[Page]> {
    let pages = Box::<[Page]>::new_zeroed_slice(len / PAGE);
    #[expect(
        unsafe_code,
        reason = "zeroed memory is a valid page of bytes; writing them out by hand would touch them twice"
    )]
    // SAFETY: `Page` is an array of `u8`, for which all-zero bytes are a valid value.
    unsafe {
        pages.assume_init()
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.memory {
            Memory::Mapped(map) => &map[..self.len],
            Memory::Heap(pages) => {
                #[expect(
                    unsafe_code,
                    reason = "pages are bytes; the standard library has no safe flattening of a newtype"
                )]
                // SAFETY: `Page` is `repr(C)` over `[u8; 4096]` with size 4096 (asserted below), so the slice of pages
                // is one run of initialised bytes of this length, borrowed as long as `self` is.
                unsafe {
                    std::slice::from_raw_parts(pages.as_ptr().cast(), pages.len() * PAGE)
                }
            }
        }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        match &mut self.memory {
            Memory::Mapped(map) => &mut map[..self.len],
            Memory::Heap(pages) => {
                #[expect(
                    unsafe_code,
                    reason = "pages are bytes; the standard library has no safe flattening of a newtype"
                )]
                // SAFETY: as in `deref`, and `&mut self` makes the borrow unique.
                unsafe {
                    std::slice::from_raw_parts_mut(pages.as_mut_ptr().cast(), pages.len() * PAGE)
                }
            }
        }
    }
}

const _: () = assert!(size_of::<Page>() == PAGE && align_of::<Page>() == PAGE);

impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBuf({} bytes)", self.len)
    }
}

/// Buffers that are used again and again, so that a large one costs its page faults once.
///
/// Keeps at most 24 MiB between uses, however many are out at a time.
#[derive(Debug, Default)]
pub struct BufferPool {
    free: Mutex<Vec<AlignedBuf>>,
}

/// The most that a pool keeps: all buffers of a large commit, and a few of small ones.
const KEPT_BYTES: usize = WRITE_BUFFERS * WRITE_BUFFER_BYTES + (4 << 20);

impl BufferPool {
    /// A buffer of `len` bytes, whose contents are whatever its last user left there.
    pub fn take(self: &Arc<Self>, len: usize) -> PooledBuf {
        let mut free = self.free.lock();
        // The smallest that is large enough, and not so large that it would be missed elsewhere.
        let fitting = (0..free.len())
            .filter(|&index| (len..=len.saturating_mul(4).max(1 << 16)).contains(&free[index].len()))
            .min_by_key(|&index| free[index].len());
        let buffer = fitting.map(|index| free.swap_remove(index));
        drop(free);
        let buffer = buffer.unwrap_or_else(|| AlignedBuf::zeroed(len));
        PooledBuf { pool: Arc::clone(self), buffer: Some(buffer), len }
    }

    fn give_back(&self, buffer: AlignedBuf) {
        let mut free = self.free.lock();
        let kept: usize = free.iter().map(|buffer| buffer.len()).sum();
        if kept + buffer.len() <= KEPT_BYTES {
            free.push(buffer);
        }
    }
}

/// A buffer on loan from a [`BufferPool`]; page-aligned, and exactly as long as was asked for.
#[derive(Debug)]
pub struct PooledBuf {
    pool: Arc<BufferPool>,
    /// Taken when it is dropped.
    buffer: Option<AlignedBuf>,
    len: usize,
}

impl Deref for PooledBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.buffer.as_ref().expect("there until it is dropped")[..self.len]
    }
}

impl DerefMut for PooledBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.buffer.as_mut().expect("there until it is dropped")[..self.len]
    }
}

impl Drop for PooledBuf {
    fn drop(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            self.pool.give_back(buffer);
        }
    }
}

/// A part of a buffer on loan, owned: one thread fills it while another writes out its neighbours. The buffer goes back to
/// its pool with the last of its parts.
#[derive(Debug)]
pub struct PooledPart {
    bytes: *mut [u8],
    /// Reached by nobody while there are parts.
    _whole: Arc<PooledBuf>,
}

impl PooledBuf {
    /// Cuts the buffer into parts of these lengths, from its start on. What is left over is in none of them.
    ///
    /// # Panics
    /// If the buffer is shorter.
    pub fn cut(self, lens: impl IntoIterator<Item = usize>) -> Vec<PooledPart> {
        let mut whole = Arc::new(self);
        // Only now, where the buffer stays: moving a box says that nobody else has a pointer into it.
        let buffer = Arc::get_mut(&mut whole).expect("nobody else has it yet");
        let (start, len) = (buffer.as_mut_ptr(), buffer.len());
        let mut end = 0;
        let parts = lens.into_iter().map(|part| {
            let at = end;
            end += part;
            assert!(end <= len, "parts longer than their buffer");
            let bytes = std::ptr::slice_from_raw_parts_mut(start.wrapping_add(at), part);
            PooledPart { bytes, _whole: Arc::clone(&whole) }
        });
        parts.collect()
    }
}

#[expect(unsafe_code, reason = "a raw pointer is not Send by itself")]
// SAFETY: a part is reached through its one owner, like any bytes that are owned.
unsafe impl Send for PooledPart {}

#[expect(unsafe_code, reason = "a raw pointer is not Sync by itself")]
// SAFETY: through a shared part its bytes are only read.
unsafe impl Sync for PooledPart {}

impl Deref for PooledPart {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        #[expect(unsafe_code, reason = "parts of one buffer have several owners")]
        // SAFETY: the bytes lie in the buffer (`cut` counted them), whose memory stays where it is while a part holds it;
        // nobody reaches the buffer itself meanwhile, and no two parts overlap.
        unsafe {
            &*self.bytes
        }
    }
}

impl DerefMut for PooledPart {
    fn deref_mut(&mut self) -> &mut [u8] {
        #[expect(unsafe_code, reason = "parts of one buffer have several owners")]
        // SAFETY: as in `deref`, and `&mut self` makes the borrow unique.
        unsafe {
            &mut *self.bytes
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "its buffers have huge pages, which Miri does not know")]
    fn a_pool_lends_the_same_memory_again_and_keeps_no_more_than_its_bound() {
        let pool = Arc::new(BufferPool::default());
        let mut first = pool.take(100_000);
        assert_eq!((first.len(), first.as_ptr() as usize % PAGE), (100_000, 0));
        first.fill(7);
        let place = first.as_ptr();
        drop(first);
        let again = pool.take(90_000);
        assert_eq!((again.as_ptr(), again.len(), again[89_999]), (place, 90_000, 7));
        let other = pool.take(90_000);
        assert_ne!(other.as_ptr(), place);
        drop((again, other));
        let many: Vec<PooledBuf> = (0..20).map(|_| pool.take(4 << 20)).collect();
        drop(many);
        assert!(pool.free.lock().iter().map(|buffer| buffer.len()).sum::<usize>() <= KEPT_BYTES);
    }

    #[test]
    fn parts_are_filled_apart_and_the_last_one_gives_the_buffer_back() {
        let pool = Arc::new(BufferPool::default());
        let whole = pool.take(3 * PAGE);
        let place = whole.as_ptr();
        let mut parts = whole.cut([PAGE, 0, 2 * PAGE]);
        std::thread::scope(|scope| {
            for (index, part) in parts.iter_mut().enumerate() {
                scope.spawn(move || part.fill(index as u8 + 1));
            }
        });
        assert!(parts[0].iter().all(|&byte| byte == 1) && parts[2].iter().all(|&byte| byte == 3));
        let last = parts.pop().unwrap();
        drop(parts);
        assert!(pool.free.lock().is_empty() && last.len() == 2 * PAGE);
        drop(last);
        let again = pool.take(3 * PAGE);
        assert_eq!((again.as_ptr(), again[0], again[PAGE]), (place, 1, 3));
    }

    #[test]
    fn a_buffer_is_page_aligned_zeroed_and_rounded_up() {
        // The longest has huge pages, which Miri does not know.
        for len in [0, 1, 4095, 4096, 4097, if cfg!(miri) { 5 * PAGE } else { 1 << 20 }] {
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
