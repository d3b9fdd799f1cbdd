//! The plan of a read: which ranges of which files to read, and where every byte lands. A function of values.

use std::ops::Range;

use alight_format::{SegmentId, limits};

use crate::config::{READ_BYTES, READ_FIRST_PART};

/// The bytes of one value on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) segment: SegmentId,
    pub(crate) offset: u64,
    pub(crate) length: u64,
    /// The checksum of all of it.
    pub(crate) crc: u32,
}

impl Extent {
    pub(crate) fn end(&self) -> u64 {
        self.offset + self.length
    }
}

/// One read of at most [`READ_BYTES`]: whole blocks of one file, to one place in the arena.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Read {
    pub(crate) segment: SegmentId,
    /// A multiple of the block, like `len`.
    pub(crate) offset: u64,
    pub(crate) len: usize,
    /// Which bytes of the read go to the arena: all of them, but for what lies before the first value and after the
    /// last where the arena keeps no blocks.
    pub(crate) wanted: Range<usize>,
    /// Where the first wanted byte lands.
    pub(crate) arena_offset: u64,
    /// Which of the plan's pieces lie in it.
    pub(crate) pieces: Range<usize>,
}

/// The part of one extent that one read brings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) extent: usize,
    /// Its bytes in the read.
    pub(crate) range: Range<usize>,
}

/// What to read, and where each extent will be. Reads are in the order of the disk and of the arena; neighbouring
/// extents keep their distance, so a whole commit arrives as the payload that was written.
#[derive(Debug, Default)]
pub(crate) struct ReadPlan {
    pub(crate) reads: Vec<Read>,
    pub(crate) pieces: Vec<Piece>,
    /// Where each extent begins in the arena, in the order they were given.
    pub(crate) arena_offsets: Vec<u64>,
    pub(crate) arena_bytes: u64,
    /// Where the reads are [parts](READ_FIRST_PART) of one range, which one thread reads in place: how long each is but the last.
    /// While one is being checked, the next is on its way. More threads would take longer to start than they save.
    pub(crate) part_bytes: Option<usize>,
}

impl ReadPlan {
    /// Plans to read `extents` into one arena. With `whole_blocks` the arena has room for every block that is read, at
    /// an offset that is a multiple of the block, so that direct reads can land in place; else only the values and what
    /// lies between neighbours take room.
    pub(crate) fn new(extents: &[Extent], whole_blocks: bool) -> Self {
        let mut order: Vec<usize> = (0..extents.len()).collect();
        order.sort_by_key(|&index| (extents[index].segment, extents[index].offset, extents[index].length));
        let wanted: u64 = extents.iter().map(|extent| extent.length).sum();
        let mut plan = Self { arena_offsets: vec![0; extents.len()], ..Self::default() };
        let mut rest = &order[..];
        while let Some(&first) = rest.first() {
            if extents[first].length == 0 {
                rest = &rest[1..];
                continue;
            }
            let span = span_len(extents, rest);
            let about_one_read = READ_BYTES as u64 / 2..=READ_BYTES as u64;
            let is_one = whole_blocks && span == order.len() && about_one_read.contains(&wanted);
            plan.part_bytes = is_one.then(|| first_part_bytes(wanted));
            plan.add_span(extents, &rest[..span], whole_blocks, plan.part_bytes.unwrap_or(READ_BYTES) as u64);
            rest = &rest[span..];
        }
        plan
    }

    /// Plans to read whole blocks of one segment, whatever lies in them, to the front of an arena. There are no extents in
    /// it, and so nothing to compare with a checksum.
    pub(crate) fn of_blocks(segment: SegmentId, range: Range<u64>) -> Self {
        let whole = Extent { segment, offset: range.start, length: range.end - range.start, crc: 0 };
        debug_assert!((whole.offset | whole.length).is_multiple_of(limits::BLOCK_BYTES), "whole blocks: {range:?}");
        let mut plan = Self::new(&[whole], true);
        plan.pieces.clear();
        plan.reads.iter_mut().for_each(|read| read.pieces = 0..0);
        plan
    }

    /// Whether one thread carries it out, by one read, or by parts of one.
    pub(crate) fn is_one_read(&self) -> bool {
        self.reads.len() == 1 || self.part_bytes.is_some()
    }

    /// Adds neighbours that are read as one range.
    fn add_span(&mut self, extents: &[Extent], span: &[usize], whole_blocks: bool, unit: u64) {
        let segment = extents[span[0]].segment;
        let start = extents[span[0]].offset;
        let end = span.iter().map(|&index| extents[index].end()).max().expect("a span has an extent");
        let read_start = start / limits::BLOCK_BYTES * limits::BLOCK_BYTES;
        let read_end = end.next_multiple_of(limits::BLOCK_BYTES);
        let (kept_start, kept_end, align) = if whole_blocks {
            (read_start, read_end, limits::BLOCK_BYTES)
        } else {
            (start, end, limits::SMALL_ALIGN_BYTES)
        };
        let base = self.arena_bytes.next_multiple_of(align);
        self.arena_bytes = base + (kept_end - kept_start);
        for &index in span {
            self.arena_offsets[index] = base + (extents[index].offset - kept_start);
        }

        let mut first = 0;
        let mut offset = read_start;
        while offset < read_end {
            let len = (read_end - offset).min(unit);
            let to = offset + len;
            // Extents are sorted by offset; those that end before this read are done with, but for a later, longer
            // twin of the same offset, which sorts after.
            while first < span.len() && extents[span[first]].end() <= offset {
                first += 1;
            }
            let pieces = self.pieces.len();
            for &index in &span[first..] {
                let extent = &extents[index];
                if extent.offset >= to {
                    break;
                }
                let (from, until) = (extent.offset.max(offset), extent.end().min(to));
                if from < until {
                    let range = (from - offset) as usize..(until - offset) as usize;
                    self.pieces.push(Piece { extent: index, range });
                }
            }
            let wanted = offset.max(kept_start)..to.min(kept_end);
            self.reads.push(Read {
                segment,
                offset,
                len: len as usize,
                wanted: (wanted.start - offset) as usize..(wanted.end - offset) as usize,
                arena_offset: base + (wanted.start - kept_start),
                pieces: pieces..self.pieces.len(),
            });
            offset = to;
        }
    }
}

/// How long the first part of a read of so many bytes is: whole blocks.
fn first_part_bytes(wanted: u64) -> usize {
    let (numerator, denominator) = READ_FIRST_PART;
    // About one read, which is in memory.
    (wanted * numerator / denominator / limits::BLOCK_BYTES * limits::BLOCK_BYTES) as usize
}

/// How many of the sorted extents lie close enough to be read as one range: with less than a block between one and the
/// next, so that nothing is read that does not share a block with what was asked for.
fn span_len(extents: &[Extent], order: &[usize]) -> usize {
    let mut end = extents[order[0]].end();
    let mut len = 1;
    for &index in &order[1..] {
        let next = &extents[index];
        if next.segment != extents[order[0]].segment || next.offset >= end + limits::BLOCK_BYTES {
            break;
        }
        end = end.max(next.end());
        len += 1;
    }
    len
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Extents as a store lays them out, some asked for, some of them twice.
    fn asked() -> impl Strategy<Value = Vec<Extent>> {
        let lengths = prop::collection::vec(prop_oneof![0u64..9000, Just(4096), 1u64..4_000_000], 1..40);
        (lengths, prop::collection::vec(any::<prop::sample::Index>(), 1..60), any::<bool>()).prop_map(
            |(lengths, picks, two_segments)| {
                let (offsets, _) = crate::io::lay_out(lengths.iter().copied());
                picks
                    .iter()
                    .map(|pick| {
                        let at = pick.index(lengths.len());
                        let segment = SegmentId(1 + u64::from(two_segments && at % 3 == 0));
                        Extent { segment, offset: 8192 + offsets[at], length: lengths[at], crc: at as u32 }
                    })
                    .collect()
            },
        )
    }

    #[test]
    fn whole_blocks_are_read_as_they_lie_and_compared_with_nothing() {
        let plan = ReadPlan::of_blocks(SegmentId(3), 8192..(5 << 20) + 4096);
        let mut at = 8192;
        for read in &plan.reads {
            assert_eq!((read.segment, read.offset, read.arena_offset), (SegmentId(3), at, at - 8192));
            assert_eq!((read.wanted.clone(), read.pieces.is_empty()), (0..read.len, true));
            at += read.len as u64;
        }
        assert_eq!((at, plan.arena_bytes, plan.pieces.len()), ((5 << 20) + 4096, (5 << 20) - 4096, 0));
    }

    proptest! {
        #[test]
        fn every_byte_of_every_extent_is_brought_once_to_its_place(extents in asked(), whole_blocks: bool) {
            let plan = ReadPlan::new(&extents, whole_blocks);
            let mut brought = vec![0u64; extents.len()];
            let mut arena_end = 0;
            for read in &plan.reads {
                prop_assert!(read.len <= READ_BYTES && read.len > 0);
                prop_assert!(read.offset.is_multiple_of(4096) && read.len.is_multiple_of(4096));
                prop_assert!(read.arena_offset >= arena_end, "reads land one after another");
                arena_end = read.arena_offset + read.wanted.len() as u64;
                prop_assert!(arena_end <= plan.arena_bytes);
                if whole_blocks {
                    prop_assert_eq!(&read.wanted, &(0..read.len));
                    prop_assert!(read.arena_offset.is_multiple_of(4096));
                }
                for piece in &plan.pieces[read.pieces.clone()] {
                    let extent = &extents[piece.extent];
                    prop_assert_eq!(extent.segment, read.segment);
                    prop_assert!(piece.range.start >= read.wanted.start && piece.range.end <= read.wanted.end);
                    // Pieces come in order: this one goes on where the last one of the extent ended.
                    let in_extent = read.offset + piece.range.start as u64 - extent.offset;
                    prop_assert_eq!(in_extent, brought[piece.extent]);
                    let lands = read.arena_offset + (piece.range.start - read.wanted.start) as u64;
                    prop_assert_eq!(lands, plan.arena_offsets[piece.extent] + in_extent);
                    brought[piece.extent] += piece.range.len() as u64;
                }
            }
            for (extent, brought) in extents.iter().zip(brought) {
                prop_assert_eq!(extent.length, brought);
            }
            let asked: u64 = extents.iter().map(|extent| extent.length).sum();
            prop_assert!(plan.arena_bytes <= asked + 4096 * 2 * extents.len() as u64);
        }
    }
}
