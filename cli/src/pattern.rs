//! Pseudo-random bytes that can be made again, from any offset, out of a seed: what `demo` and `bench` put, and what
//! `demo` compares against. Never zeros, which a disk or a file system might not write at all.

use std::io;

use alight::ReadAt;

use crate::interrupt;
use crate::progress::Progress;

/// The 64-bit golden ratio: the step of SplitMix64 (Steele, Lea and Flood, 2014).
const STEP: u64 = 0x9E37_79B9_7F4A_7C15;

/// An endless run of bytes; equal seeds make equal runs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pattern {
    seed: u64,
}

impl Pattern {
    pub(crate) fn new(seed: u64) -> Self {
        // Neighbouring seeds would make runs that are shifted copies of each other.
        Self { seed: mix(seed) }
    }

    /// The eight bytes of word `index`.
    fn word(self, index: u64) -> [u8; 8] {
        mix(self.seed.wrapping_add(index.wrapping_mul(STEP))).to_le_bytes()
    }

    /// Writes the bytes from `offset` on into `out`.
    pub(crate) fn fill(self, offset: u64, out: &mut [u8]) {
        let mut index = offset / 8;
        let skip = (offset % 8) as usize;
        let mut rest = out;
        if skip > 0 {
            let head = rest.len().min(8 - skip);
            let (first, others) = rest.split_at_mut(head);
            first.copy_from_slice(&self.word(index)[skip..skip + head]);
            rest = others;
            index += 1;
        }
        let (words, tail) = rest.as_chunks_mut::<8>();
        for word in &mut *words {
            *word = self.word(index);
            index += 1;
        }
        tail.copy_from_slice(&self.word(index)[..tail.len()]);
    }

    /// The first offset at which `found` differs from the bytes from the beginning of the run.
    pub(crate) fn first_difference(self, found: &[u8]) -> Option<u64> {
        let mut expected = [0; 16 << 10];
        for (chunk, at) in found.chunks(expected.len()).zip((0u64..).step_by(expected.len())) {
            let expected = &mut expected[..chunk.len()];
            self.fill(at, expected);
            if expected != chunk {
                let within = expected.iter().zip(chunk).take_while(|(expected, found)| expected == found).count();
                return Some(at + within as u64);
            }
        }
        None
    }
}

/// SplitMix64's finalizer.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// A pattern as the value of a put: made while it is written, so it takes no memory. Stops when a signal came.
pub(crate) struct PatternSource<'a> {
    pub(crate) pattern: Pattern,
    pub(crate) progress: &'a Progress,
}

impl ReadAt for PatternSource<'_> {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        interrupt::check_io()?;
        self.pattern.fill(offset, buf);
        self.progress.add(buf.len() as u64);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_part_of_a_run_is_the_same_however_it_is_asked_for() {
        let pattern = Pattern::new(7);
        let mut whole = vec![0; 1000];
        pattern.fill(0, &mut whole);
        for (from, to) in [(0, 1000), (1, 1000), (7, 9), (8, 16), (3, 5), (999, 1000), (5, 5), (17, 400)] {
            let mut part = vec![0; to - from];
            pattern.fill(from as u64, &mut part);
            assert_eq!(part, whole[from..to], "{from}..{to}");
        }
        assert!(whole.iter().filter(|&&byte| byte == 0).count() < 20);
    }

    #[test]
    fn a_difference_is_found_where_it_is() {
        let pattern = Pattern::new(1);
        let mut bytes = vec![0; 100_000];
        pattern.fill(0, &mut bytes);
        assert_eq!(pattern.first_difference(&bytes), None);
        for at in [0, 1, 16_383, 16_384, 99_999] {
            bytes[at] ^= 0x40;
            assert_eq!(pattern.first_difference(&bytes), Some(at as u64));
            bytes[at] ^= 0x40;
        }
        assert!(Pattern::new(2).first_difference(&bytes).is_some());
    }
}
