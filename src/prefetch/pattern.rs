//! How a file is being read, told from where the last reads began.
//!
//! Shares and the history's length are those of the module's specification: more than 80 % of the steps short and
//! forward is sequential, more than 70 % near the median step is strided, more than 80 % different steps is random.

use std::collections::VecDeque;

/// Accesses that are remembered.
const HISTORY: usize = 64;

/// Accesses before anything is said: three steps.
const ACCESSES_MIN: usize = 4;

/// A step matches the median one when it differs by no more than an eighth of it.
const TOLERANCE: u64 = 8;

/// How a file is being read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AccessPattern {
    /// Front to back: short steps forward.
    Sequential,
    /// In steps of about the same length, longer than a buffer or backwards.
    Strided {
        /// The median step in bytes; negative when it goes backwards.
        stride: i64,
    },
    /// In steps of which hardly two are alike.
    Random,
    /// Too little was read to tell, or it is none of the others.
    Unknown,
}

/// Tells the pattern of one reader's accesses. Costs a sort of at most 63 numbers an access.
#[derive(Debug, Clone)]
pub struct PatternDetector {
    /// Where each access began, and how long it was.
    history: VecDeque<(u64, u64)>,
    /// The longest step forward that still counts as reading on.
    sequential_step_max: u64,
    pattern: AccessPattern,
}

impl PatternDetector {
    /// A detector that takes steps forward of up to `sequential_step_max` bytes for reading on: the size of a buffer.
    pub fn new(sequential_step_max: u64) -> Self {
        Self {
            history: VecDeque::with_capacity(HISTORY),
            sequential_step_max: sequential_step_max.max(1),
            pattern: AccessPattern::Unknown,
        }
    }

    /// Takes note of a read of `len` bytes at `offset`; answers the pattern from here on. Reading on where the last read
    /// ended, or up to an eighth of it further, is a short step however long that was.
    pub fn record(&mut self, offset: u64, len: u64) -> AccessPattern {
        if self.history.len() == HISTORY {
            self.history.pop_front();
        }
        self.history.push_back((offset, len));
        self.pattern = detect(self.history.make_contiguous(), self.sequential_step_max);
        self.pattern
    }

    /// The pattern as of the last access.
    pub fn pattern(&self) -> AccessPattern {
        self.pattern
    }

    /// Forgets all accesses.
    pub fn reset(&mut self) {
        self.history.clear();
        self.pattern = AccessPattern::Unknown;
    }
}

/// The pattern of reads that began at these offsets and were so long, the oldest first.
fn detect(reads: &[(u64, u64)], sequential_step_max: u64) -> AccessPattern {
    if reads.len() < ACCESSES_MIN {
        return AccessPattern::Unknown;
    }
    // One that does not fit is taken for the longest: of any three, not two can be so long and alike.
    let step = |pair: &[(u64, u64)]| {
        let longest = if pair[1].0 < pair[0].0 { i64::MIN } else { i64::MAX };
        i64::try_from(i128::from(pair[1].0) - i128::from(pair[0].0)).unwrap_or(longest)
    };
    let mut steps: Vec<i64> = reads.windows(2).map(step).collect();
    // `count / steps > percent / 100`, in whole numbers.
    let all = steps.len();
    let more_than = |count: usize, percent: usize| count * 100 > all * percent;

    let short = |(step, read): &(&i64, &(u64, u64))| {
        let on = read.1.saturating_add(read.1 / TOLERANCE).max(sequential_step_max);
        **step > 0 && step.unsigned_abs() <= on
    };
    let forward = steps.iter().zip(reads).filter(short).count();
    if more_than(forward, 80) {
        return AccessPattern::Sequential;
    }
    steps.sort_unstable();
    let different = steps.chunk_by(|one, next| one == next).count();
    // Of an even number the lower middle one: a step that was really taken.
    let median = steps[(all - 1) / 2];
    let within = median.unsigned_abs() / TOLERANCE;
    let near = steps.iter().filter(|step| step.abs_diff(median) <= within).count();
    if median != 0 && more_than(near, 70) {
        return AccessPattern::Strided { stride: median };
    }
    if more_than(different, 80) { AccessPattern::Random } else { AccessPattern::Unknown }
}

#[cfg(test)]
mod tests {
    use super::*;
    use AccessPattern::{Random, Sequential, Strided, Unknown};
    use proptest::prelude::*;

    const BUFFER: u64 = 1 << 20;

    fn pattern(offsets: impl IntoIterator<Item = u64>) -> AccessPattern {
        let mut detector = PatternDetector::new(BUFFER);
        offsets.into_iter().map(|offset| detector.record(offset, 4096)).last().unwrap_or(Unknown)
    }

    #[test]
    fn three_accesses_say_nothing() {
        assert_eq!(pattern([]), Unknown);
        assert_eq!(pattern([0, 4096, 8192]), Unknown);
        assert_eq!(pattern([0, 4096, 8192, 12288]), Sequential);
    }

    #[test]
    fn the_pattern_is_seen_through_noise() {
        // One seek among ten reads.
        assert_eq!(pattern((0..5).map(|n| n * 4096).chain((0..6).map(|n| (100 << 20) + n * 4096))), Sequential);
        // Strides of ten buffers, one of eleven read elsewhere.
        let mut offsets: Vec<u64> = (0..20).map(|n| n * 10 * BUFFER).collect();
        offsets[7] += 5 * BUFFER;
        assert_eq!(pattern(offsets), Strided { stride: 10 << 20 });
    }

    #[test]
    fn small_steps_that_differ_are_not_a_stride() {
        // The specification compared with a tenth of a buffer: backward noise within 100 KB counted as strided.
        let noise = [500_000u64, 490_000, 420_000, 419_000, 350_000, 349_000, 348_500, 270_000, 200_000, 199_000];
        assert!(!matches!(pattern(noise), Strided { .. }));
    }

    #[test]
    fn reading_on_in_pieces_longer_than_a_buffer_is_sequential() {
        let mut detector = PatternDetector::new(BUFFER);
        let mut at = 0;
        for len in [3 * BUFFER, 1, 7 * BUFFER, 2 * BUFFER, 100, 9 * BUFFER, 4 * BUFFER] {
            detector.record(at, len);
            // A little is left out.
            at += len + len / 16;
        }
        assert_eq!(detector.pattern(), Sequential);
    }

    #[test]
    fn the_same_place_again_and_again_is_no_stride() {
        assert_eq!(pattern([4096; 20]), Unknown);
    }

    #[test]
    fn the_ends_of_the_number_line_are_no_trouble() {
        let offsets: Vec<u64> = (0..20).map(|n| if n % 2 == 0 { 0 } else { u64::MAX }).collect();
        assert_eq!(pattern(offsets), Unknown);
    }

    proptest! {
        #[test]
        fn reading_on_is_sequential(start in 0u64..1 << 50, steps in prop::collection::vec(1..=BUFFER, 3..100)) {
            let offsets = steps.iter().scan(start, |at, step| { *at += step; Some(*at) });
            prop_assert_eq!(pattern(std::iter::once(start).chain(offsets)), Sequential);
        }

        #[test]
        fn equal_steps_are_a_stride_both_ways(
            stride in (BUFFER + 1)..1 << 40, count in 4usize..100, backwards: bool,
        ) {
            let up = (0..count as u64).map(|n| n * stride);
            if backwards {
                prop_assert_eq!(pattern(up.rev()), Strided { stride: -(stride as i64) });
            } else {
                prop_assert_eq!(pattern(up), Strided { stride: stride as i64 });
            }
        }

        #[test]
        fn steps_within_the_tolerance_are_a_stride_near_their_middle(
            stride in (2 * BUFFER)..1 << 40, wobble in prop::collection::vec(-30i64..=30, 8..63),
        ) {
            let mut at = 0u64;
            let mut offsets = vec![0];
            for wobble in wobble {
                at += (stride as i64 + stride as i64 * wobble / 1000) as u64;
                offsets.push(at);
            }
            match pattern(offsets) {
                Strided { stride: found } => prop_assert!((found - stride as i64).unsigned_abs() <= stride * 31 / 1000),
                other => prop_assert!(false, "{other:?}"),
            }
        }

        #[test]
        fn offsets_by_chance_are_random(offsets in prop::collection::vec(0u64..1 << 50, 64)) {
            prop_assert_eq!(pattern(offsets), Random);
        }

        #[test]
        fn any_offsets_are_answered(offsets in prop::collection::vec(any::<u64>(), 0..100)) {
            pattern(offsets);
        }
    }
}
