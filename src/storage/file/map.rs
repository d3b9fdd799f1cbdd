//! A mapping of the real file system, and what of it is known to be in memory.
//!
//! # Invariants
//! - What is said to be present was so at most [`BELIEVED_SECONDS`] ago: the system takes back what nobody has touched for a
//!   while first.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

use memmap2::Mmap;

use super::super::{StorageMap, touch};
use super::sys;

/// The system is asked about this much at a time: what it brings for one touch, about.
const STRETCH_BYTES: usize = 64 << 10;

/// How long its answer is believed.
const BELIEVED_SECONDS: u32 = 10;

/// A mapped file.
#[derive(Debug)]
pub(super) struct FileMap {
    /// Nothing where the range is empty.
    map: Option<Mmap>,
    /// When each stretch was last found to be in memory, by [`clock`]; 0 where it never was.
    seen: Box<[AtomicU32]>,
}

impl FileMap {
    pub(super) fn new(map: Option<Mmap>) -> Self {
        let stretches = map.as_ref().map_or(0, |map| map.len().div_ceil(STRETCH_BYTES));
        Self { map, seen: (0..stretches).map(|_| AtomicU32::new(0)).collect() }
    }

    /// The stretches that a range lies in, with their numbers. What lies past the end is nobody's to touch.
    #[inline]
    fn stretches(&self, range: Range<usize>) -> impl Iterator<Item = (&AtomicU32, usize)> {
        let last = range.end.div_ceil(STRETCH_BYTES).min(self.seen.len());
        let first = (range.start / STRETCH_BYTES).min(last);
        self.seen[first..last].iter().zip(first..last)
    }

    fn range_of(&self, stretch: usize) -> Range<usize> {
        let start = stretch * STRETCH_BYTES;
        start..self.bytes().len().min(start + STRETCH_BYTES)
    }

    /// Asks the system about a stretch. Where it has no answer a touch is all that is left.
    #[cold]
    fn ask(&self, seen: &AtomicU32, stretch: usize, now: u32) -> bool {
        let Some(map) = &self.map else { return true };
        let present = sys::in_core(map, self.range_of(stretch)).unwrap_or(true);
        if present {
            seen.store(now, Ordering::Relaxed);
        }
        present
    }
}

impl StorageMap for FileMap {
    fn bytes(&self) -> &[u8] {
        self.map.as_deref().unwrap_or_default()
    }

    #[inline]
    fn is_present(&self, range: Range<usize>) -> bool {
        let now = clock();
        self.stretches(range).all(|(seen, stretch)| {
            // Relaxed: it speaks of the system's memory, and orders nothing of ours.
            now.wrapping_sub(seen.load(Ordering::Relaxed)) <= BELIEVED_SECONDS || self.ask(seen, stretch, now)
        })
    }

    /// Whole stretches, as they are asked about.
    fn bring(&self, range: Range<usize>) {
        for (seen, stretch) in self.stretches(range) {
            touch(&self.bytes()[self.range_of(stretch)]);
            seen.store(clock(), Ordering::Relaxed);
        }
    }
}

/// Seconds since some moment, never as few as are believed.
fn clock() -> u32 {
    sys::coarse_seconds().wrapping_add(BELIEVED_SECONDS + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{Caching, FileStorage, OpenMode, Storage, read_exact_at, write_all_at};

    const LEN: usize = 1 << 20;

    #[test]
    fn what_was_read_is_present_and_what_was_never_in_the_page_cache_is_not_until_it_is_brought() {
        let folder = tempfile::tempdir().unwrap();
        let file = FileStorage::new().open(&folder.path().join("f"), OpenMode::CreateNew).unwrap();
        let mut bytes = crate::storage::AlignedBuf::zeroed(LEN);
        bytes.iter_mut().enumerate().for_each(|(at, byte)| *byte = (at / 3 % 251) as u8);
        write_all_at(&*file, &bytes, 0, Caching::Direct).unwrap();
        let map = file.map(LEN).unwrap();
        let is_cold = file.resident(0, LEN as u64).unwrap() == Some(false);
        if is_cold {
            assert!(!map.is_present(0..LEN) && !map.is_present(LEN - 1..LEN));
        } else {
            eprintln!("SKIPPED in part: what is written past the page cache is in memory here all the same");
        }
        map.bring(500_000..500_001);
        assert!(map.is_present(500_000..500_001));
        assert!(!is_cold || !map.is_present(0..LEN) || file.resident(0, LEN as u64).unwrap() == Some(true));
        let mut found = vec![0; LEN];
        read_exact_at(&*file, &mut found, 0, Caching::Buffered).unwrap();
        assert!(map.is_present(0..LEN) && map.is_present(7..7) && map.is_present(LEN - 1..LEN));
        assert!(*map.bytes() == *bytes);
        // Ranges that a file does not have are not looked for.
        assert!(map.is_present(LEN..LEN + 1) && map.is_present(10 * LEN..11 * LEN));
        let nothing = file.map(0).unwrap();
        nothing.bring(0..0);
        assert!(nothing.is_present(0..0) && nothing.bytes().is_empty());
    }

    #[test]
    fn an_answer_is_believed_for_a_while_and_none_is_at_first() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("f"), vec![7; 3 * STRETCH_BYTES]).unwrap();
        let file = std::fs::File::open(folder.path().join("f")).unwrap();
        let map = FileMap::new(Some(sys::map(&file, 3 * STRETCH_BYTES).unwrap()));
        let seen = || map.seen.iter().map(|seen| seen.load(Ordering::Relaxed)).collect::<Vec<_>>();
        assert_eq!(seen(), [0, 0, 0]);
        let before = clock();
        map.bring(STRETCH_BYTES + 5..STRETCH_BYTES + 6);
        assert!(map.is_present(STRETCH_BYTES..2 * STRETCH_BYTES));
        assert!(before > BELIEVED_SECONDS && before <= seen()[1] && seen()[1] <= clock());
        assert_eq!((seen()[0], seen()[2]), (0, 0));
        // One that is believed is not asked about again, one that is not is.
        let old = clock() - BELIEVED_SECONDS - 1;
        map.seen[1].store(old + 1, Ordering::Relaxed);
        assert!(map.is_present(STRETCH_BYTES..2 * STRETCH_BYTES));
        map.seen[1].store(old.wrapping_sub(100), Ordering::Relaxed);
        assert!(map.is_present(STRETCH_BYTES..2 * STRETCH_BYTES) && seen()[1] > old);
    }
}
