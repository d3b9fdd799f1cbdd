//! Many files laid end to end on one line of numbers, each on a stretch of its own, so that one scheduler sees all reads of
//! a reader that goes from file to file. Passive: it opens no file, and knows no length.
//!
//! # Invariants
//! - A file keeps its stretch for as long as the line lasts, and no two share one.
//! - Stretches begin at multiples of every alignment that a disk has.

use std::collections::HashMap;
use std::hash::Hash;

/// The longest file that has room on its stretch: twice the longest value.
pub(crate) const STRETCH_BYTES: u64 = 1 << 49;

/// How many files fit: numbers are 64 bits wide, and the end of the last stretch is one too.
const FILES_MAX: usize = ((u64::MAX / STRETCH_BYTES) - 1) as usize;

/// Files on a line, by whatever tells them apart.
#[derive(Debug)]
pub(crate) struct Line<F> {
    starts: HashMap<F, u64>,
    files: Vec<F>,
}

impl<F: Copy + Eq + Hash> Line<F> {
    pub(crate) fn new() -> Self {
        Self { starts: HashMap::new(), files: Vec::new() }
    }

    /// Where a file's first byte is; a file that comes for the first time gets the next stretch. `None` where the line is
    /// full.
    pub(crate) fn start_of(&mut self, file: F) -> Option<u64> {
        if let Some(&start) = self.starts.get(&file) {
            return Some(start);
        }
        if self.files.len() >= FILES_MAX {
            return None;
        }
        let start = self.files.len() as u64 * STRETCH_BYTES;
        self.files.push(file);
        self.starts.insert(file, start);
        Some(start)
    }

    /// The file that a number is on, and its offset there.
    pub(crate) fn file_at(&self, at: u64) -> Option<(F, u64)> {
        let file = self.files.get((at / STRETCH_BYTES) as usize)?;
        Some((*file, at % STRETCH_BYTES))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_has_a_stretch_of_its_own_until_the_line_is_full() {
        assert_eq!(Line::<u32>::new().file_at(0), None);
        // Miri takes minutes for all of them, so there it begins with a line that is nearly full.
        let first = if cfg!(miri) { FILES_MAX as u32 - 50 } else { 0 };
        let mut line = Line { starts: HashMap::new(), files: (0..first).collect() };
        for file in first..FILES_MAX as u32 {
            let start = line.start_of(file).unwrap();
            assert!(start.checked_add(STRETCH_BYTES).is_some() && start.is_multiple_of(1 << 30));
            assert_eq!(line.file_at(start), Some((file, 0)));
            assert_eq!(line.file_at(start + STRETCH_BYTES - 1), Some((file, STRETCH_BYTES - 1)));
            assert_eq!(line.start_of(file), Some(start));
        }
        assert_eq!(line.start_of(u32::MAX), None);
        assert_eq!(line.start_of(first + 7), Some(u64::from(first + 7) * STRETCH_BYTES));
        assert_eq!(line.file_at(u64::MAX), None);
    }
}
