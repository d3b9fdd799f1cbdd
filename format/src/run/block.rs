//! A data block: some neighbouring entries, and the range of keys that is theirs. Every block is [`BLOCK_BYTES`] long.
//!
//! ```text
//! block = [ crc, 4 ][ entries, 2 ][ prefix length, 2 ][ lower shared, 2 ][ lower rest, 2 ][ upper shared, 2 ][ upper rest, 2 ]
//!         [ directory end, 2 ][ used, 2 ]
//!         ([ end of group, 2 ][ separator end, 2 ])…
//!         [ prefix ][ rest of lower ][ rest of upper ][ rest of each group's separator ][ zeros ]
//!         ([ group ][ zeros ])…
//! ```
//! `prefix` is what all keys of the block begin with. `lower` is the first "shared" bytes of the prefix and then its rest,
//! and so is `upper`. Each eight entries are a [group](super::group), the last one of fewer. A group begins at the first
//! multiple of 16 after what is before it, and lies up to its `end`, from the block's start. A group's separator is above
//! all keys before the group and not above the group's first key; it begins with the prefix, and its rest lies up to
//! `separator end`, from the first separator's start. The first group's is empty.
//!
//! The block's checksum ([sealed](super::seal)) covers everything from byte 4 to `directory end`; each group has its own. So
//! whoever comes by the fences reads and verifies the directory and one group, and who comes by the table the group alone.
//!
//! # Invariants
//! - Every key `k` of the block has `lower <= k < upper`. The first block of a run has an empty `lower`, the last has no
//!   `upper` (its rest's length is 0xffff); each other block's `upper` is the next one's `lower`.
//! - So a key outside a block's range was led there wrongly, and a key inside it that is not in the block is in no block.

use std::cmp::Ordering;
use std::ops::Range;

use super::entry::{IndexEntry, REST_BYTES_MAX};
use super::group::{self, Entries, GROUP_ALIGN_BYTES, GROUP_ENTRIES, GROUP_HEAD_BYTES, Group};
use super::seal::Seal;
use super::table::{TableBuilder, key_hash};
use super::{common_prefix, damaged};
use crate::error::FormatError;
use crate::layout::{Field, tiles};
use crate::limits::KEY_BYTES_MAX;
use crate::zeros::is_zero;

/// The length of every block.
pub(super) const BLOCK_BYTES: usize = 4096;

const CRC: Field<4> = Field::at(0);
const COUNT: Field<2> = Field::at(4);
const PREFIX_LEN: Field<2> = Field::at(6);
const LOWER_SHARED: Field<2> = Field::at(8);
const LOWER_REST: Field<2> = Field::at(10);
const UPPER_SHARED: Field<2> = Field::at(12);
const UPPER_REST: Field<2> = Field::at(14);
const DIRECTORY_END: Field<2> = Field::at(16);
const USED: Field<2> = Field::at(18);
const HEAD_BYTES: usize = 20;

const _: () = assert!(tiles(
    &[
        CRC.span(),
        COUNT.span(),
        PREFIX_LEN.span(),
        LOWER_SHARED.span(),
        LOWER_REST.span(),
        UPPER_SHARED.span(),
        UPPER_REST.span(),
        DIRECTORY_END.span(),
        USED.span(),
    ],
    0,
    HEAD_BYTES
));

const GROUP_END: Field<2> = Field::at(0);
const GROUP_SEPARATOR_END: Field<2> = Field::at(2);
/// What the directory has of each group.
const GROUP_BYTES: usize = 4;

const _: () = assert!(tiles(&[GROUP_END.span(), GROUP_SEPARATOR_END.span()], 0, GROUP_BYTES));

/// The length of the last block's rest of `upper`.
const NO_UPPER: u16 = u16::MAX;

/// The longest encoding of a length in an entry.
const LENGTH_BYTES_MAX: usize = 2;

/// The largest entry fits an empty block: its key is the block's prefix, which its range shares, and the group's.
const _: () = assert!(
    HEAD_BYTES
        + GROUP_BYTES
        + KEY_BYTES_MAX
        + 1
        + GROUP_ALIGN_BYTES
        + (GROUP_HEAD_BYTES + KEY_BYTES_MAX + 2 * LENGTH_BYTES_MAX + REST_BYTES_MAX)
        <= BLOCK_BYTES
        && KEY_BYTES_MAX < 1 << (7 * LENGTH_BYTES_MAX)
        && REST_BYTES_MAX < 1 << (7 * LENGTH_BYTES_MAX)
);

fn as_u16(value: usize) -> u16 {
    u16::try_from(value).expect("lengths in a block are below its limit")
}

/// A block being filled.
#[derive(Default)]
pub(super) struct BlockBuilder {
    /// Where the block's range begins: nothing, or what the first key begins with.
    lower: Vec<u8>,
    /// The keys, end to end.
    keys: Vec<u8>,
    /// What follows each key, end to end.
    rests: Vec<u8>,
    /// Where each entry's key and rest end.
    ends: Vec<(usize, usize)>,
    /// The bytes that all keys begin with.
    prefix_len: usize,
    /// The bytes of all groups' separators.
    separators_len: usize,
    /// The bytes of all groups but the last, with the zeros between them.
    groups_len: usize,
    /// The bytes of the last group.
    last_group_len: usize,
}

/// The bytes of a separator, or a bound, that are not in the prefix.
fn rest_len(len: usize, prefix_len: usize) -> usize {
    len.saturating_sub(prefix_len)
}

/// Where a group begins that comes after so many bytes.
const fn aligned(len: usize) -> usize {
    len.next_multiple_of(GROUP_ALIGN_BYTES)
}

impl BlockBuilder {
    pub(super) fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    pub(super) fn lower(&self) -> &[u8] {
        &self.lower
    }

    pub(super) fn last_key(&self) -> &[u8] {
        self.ends.len().checked_sub(1).map_or(&[], |last| self.key(last))
    }

    fn key(&self, index: usize) -> &[u8] {
        let start = index.checked_sub(1).map_or(0, |before| self.ends[before].0);
        &self.keys[start..self.ends[index].0]
    }

    fn rest(&self, index: usize) -> &[u8] {
        let start = index.checked_sub(1).map_or(0, |before| self.ends[before].1);
        &self.rests[start..self.ends[index].1]
    }

    /// The keys of a group and what follows each, of this block's entries and perhaps one more.
    fn group<'e>(
        &'e self,
        group: usize,
        more: Option<(&'e [u8], &'e [u8])>,
    ) -> impl Iterator<Item = (&'e [u8], &'e [u8])> + Clone {
        let first = group * GROUP_ENTRIES;
        let indexes = first..self.ends.len().min(first + GROUP_ENTRIES);
        indexes.map(|index| (self.key(index), self.rest(index))).chain(more)
    }

    /// Adds an entry, unless the block is full; then it is left as it was, and the answer is false. An empty block takes any
    /// entry.
    pub(super) fn try_push(&mut self, key: &[u8], rest: &[u8]) -> bool {
        let count = self.ends.len() + 1;
        let groups = count.div_ceil(GROUP_ENTRIES);
        let begins_group = (count - 1).is_multiple_of(GROUP_ENTRIES);
        let (prefix_len, separator_len) = if self.is_empty() {
            (key.len(), 0)
        } else {
            let separator_len = if begins_group { common_prefix(self.last_key(), key) + 1 } else { 0 };
            (common_prefix(&self.key(0)[..self.prefix_len], key), separator_len)
        };
        // The next block's first key is not known yet, but what separates it from this key is at most one byte longer, and
        // has one byte of its own at least.
        let upper_rest_max = rest_len(key.len() + 1, prefix_len).max(1);
        let directory_len = HEAD_BYTES
            + GROUP_BYTES * groups
            + prefix_len
            + rest_len(self.lower.len(), prefix_len)
            + upper_rest_max
            + (self.separators_len + separator_len)
            - (groups - 1) * prefix_len;
        let groups_len = self.groups_len + if begins_group { aligned(self.last_group_len) } else { 0 };
        let last_group_len = group::encoded_len(self.group(groups - 1, Some((key, rest))));
        if aligned(directory_len) + groups_len + last_group_len > BLOCK_BYTES && !self.is_empty() {
            return false;
        }
        (self.groups_len, self.last_group_len) = (groups_len, last_group_len);
        self.prefix_len = prefix_len;
        self.separators_len += separator_len;
        self.keys.extend_from_slice(key);
        self.rests.extend_from_slice(rest);
        self.ends.push((self.keys.len(), self.rests.len()));
        true
    }

    /// Appends the block, which will lie at `at`, to `out`, tells the table where its keys are, and begins the next block,
    /// whose range begins where this one's ends.
    pub(super) fn finish(
        &mut self,
        upper: Option<&[u8]>,
        seal: Seal,
        at: u64,
        out: &mut Vec<u8>,
        table: &mut TableBuilder,
    ) {
        let count = self.ends.len();
        let groups = count.div_ceil(GROUP_ENTRIES);
        let prefix = &self.key(0)[..self.prefix_len];
        let lower_shared = common_prefix(prefix, &self.lower);
        let lower_rest = &self.lower[lower_shared..];
        let upper_shared = upper.map_or(0, |upper| common_prefix(prefix, upper));
        let upper_rest = upper.map(|upper| &upper[upper_shared..]);

        let start = out.len();
        out.resize(start + HEAD_BYTES + GROUP_BYTES * groups, 0);
        out.extend_from_slice(prefix);
        out.extend_from_slice(lower_rest);
        out.extend_from_slice(upper_rest.unwrap_or_default());
        let separators_at = out.len();
        for group in 0..groups {
            if group > 0 {
                let first = group * GROUP_ENTRIES;
                let separator = super::separator(self.key(first - 1), self.key(first));
                out.extend_from_slice(&separator[prefix.len()..]);
            }
            let separator_end = as_u16(out.len() - separators_at);
            GROUP_SEPARATOR_END.write(&mut out[start + HEAD_BYTES + GROUP_BYTES * group..], separator_end);
        }
        let directory_end = out.len() - start;
        for group in 0..groups {
            out.resize(start + aligned(out.len() - start), 0);
            let group_at = at + (out.len() - start) as u64;
            group::encode(self.group(group, None), seal, group_at, out);
            self.group(group, None).for_each(|(key, _)| table.insert(key_hash(key), group_at));
            let end = as_u16(out.len() - start);
            GROUP_END.write(&mut out[start + HEAD_BYTES + GROUP_BYTES * group..], end);
        }
        let used = out.len() - start;
        assert!(used <= BLOCK_BYTES, "a block's entries were counted before they were let in");
        out.resize(start + BLOCK_BYTES, 0);

        let block = &mut out[start..];
        COUNT.write(block, as_u16(count));
        PREFIX_LEN.write(block, as_u16(prefix.len()));
        LOWER_SHARED.write(block, as_u16(lower_shared));
        LOWER_REST.write(block, as_u16(lower_rest.len()));
        UPPER_SHARED.write(block, as_u16(upper_shared));
        UPPER_REST.write(block, upper_rest.map_or(NO_UPPER, |rest| as_u16(rest.len())));
        DIRECTORY_END.write(block, as_u16(directory_end));
        USED.write(block, as_u16(used));
        let crc = seal.crc(at, &block[CRC.span().1..directory_end]);
        CRC.write(block, crc);

        *self = Self { lower: upper.unwrap_or_default().to_vec(), ..Self::default() };
    }
}

/// Where a block's range begins or ends: what it shares with the prefix, and the rest.
#[derive(Clone, Copy)]
pub(super) struct Edge<'b> {
    shared: &'b [u8],
    rest: &'b [u8],
}

impl Edge<'_> {
    #[inline]
    fn cmp(&self, key: &[u8]) -> Ordering {
        match key.split_at_checked(self.shared.len()) {
            Some((start, end)) => self.shared.cmp(start).then_with(|| self.rest.cmp(end)),
            // The key is shorter than the shared part: less or greater within it, or the start of it and so less.
            None => self.shared.cmp(key),
        }
    }

    pub(super) fn to_vec(self) -> Vec<u8> {
        [self.shared, self.rest].concat()
    }
}

/// A block whose directory's checksum holds, and where in the file it lies.
#[derive(Clone, Copy)]
pub(super) struct Block<'b> {
    bytes: &'b [u8; BLOCK_BYTES],
    seal: Seal,
    at: u64,
    pub(super) count: usize,
    groups: &'b [[u8; GROUP_BYTES]],
    prefix: &'b [u8],
    pub(super) lower: Edge<'b>,
    pub(super) upper: Option<Edge<'b>>,
    separators: &'b [u8],
}

impl<'b> Block<'b> {
    /// The block that `bytes`, which lie at `at`, are; its directory's checksum verified.
    #[inline]
    pub(super) fn decode(bytes: &'b [u8], seal: Seal, at: u64) -> Result<Self, FormatError> {
        let bytes: &[u8; BLOCK_BYTES] =
            bytes.try_into().map_err(|_| damaged("an index block that is cut short", at))?;
        let directory_end = usize::from(DIRECTORY_END.read(bytes));
        if !(HEAD_BYTES..=BLOCK_BYTES).contains(&directory_end) {
            return Err(damaged("an index block of impossible length", at));
        }
        if CRC.read(bytes) != seal.crc(at, &bytes[CRC.span().1..directory_end]) {
            return Err(damaged("an index block with a wrong checksum", at));
        }
        Self::parse(bytes, seal, at).ok_or_else(|| damaged("an index block that does not decode", at))
    }

    /// The block again, once its directory's checksum was verified.
    #[inline]
    pub(super) fn again(bytes: &'b [u8], seal: Seal, at: u64) -> Option<Self> {
        Self::parse(bytes.try_into().ok()?, seal, at)
    }

    #[inline]
    fn parse(bytes: &'b [u8; BLOCK_BYTES], seal: Seal, at: u64) -> Option<Self> {
        let count = usize::from(COUNT.read(bytes));
        let directory = bytes.get(HEAD_BYTES..usize::from(DIRECTORY_END.read(bytes)))?;
        let (groups, mut rest) = directory.split_at_checked(GROUP_BYTES * count.div_ceil(GROUP_ENTRIES))?;
        let mut take = |len: u16| {
            let (taken, left) = rest.split_at_checked(usize::from(len))?;
            rest = left;
            Some(taken)
        };
        let prefix = take(PREFIX_LEN.read(bytes))?;
        let shared = |len: u16| prefix.get(..usize::from(len));
        let lower = Edge { shared: shared(LOWER_SHARED.read(bytes))?, rest: take(LOWER_REST.read(bytes))? };
        let upper = match UPPER_REST.read(bytes) {
            NO_UPPER => None,
            len => Some(Edge { shared: shared(UPPER_SHARED.read(bytes))?, rest: take(len)? }),
        };
        let groups = groups.as_chunks().0;
        (count > 0).then_some(Self { bytes, seal, at, count, groups, prefix, lower, upper, separators: rest })
    }

    /// Whether this key can only be in this block.
    #[inline]
    pub(super) fn owns(&self, key: &[u8]) -> bool {
        // Most often the key begins with the prefix, the lower edge is the start of that, and the upper edge goes on from it.
        if let Some(suffix) = key.strip_prefix(self.prefix) {
            let above = self.lower.rest.is_empty() || self.lower.cmp(key).is_le();
            return above
                && match self.upper {
                    Some(upper) if upper.shared.len() == self.prefix.len() => suffix < upper.rest,
                    Some(upper) => upper.cmp(key).is_gt(),
                    None => true,
                };
        }
        self.lower.cmp(key).is_le() && self.upper.is_none_or(|upper| upper.cmp(key).is_gt())
    }

    fn unreadable(&self) -> FormatError {
        damaged("an index block's entry that does not decode", self.at)
    }

    #[inline]
    fn separator(&self, group: usize) -> Option<&'b [u8]> {
        let start = group.checked_sub(1).map_or(0, |before| GROUP_SEPARATOR_END.read(&self.groups[before]));
        self.separators.get(usize::from(start)..usize::from(GROUP_SEPARATOR_END.read(&self.groups[group])))
    }

    /// Where a group lies in the block.
    #[inline]
    fn range_of(&self, group: usize) -> Option<Range<usize>> {
        let before = match group.checked_sub(1) {
            None => DIRECTORY_END.read(self.bytes),
            Some(before) => GROUP_END.read(self.groups.get(before)?),
        };
        Some(aligned(usize::from(before))..usize::from(GROUP_END.read(self.groups.get(group)?)))
    }

    /// A group, its checksum verified, and where it begins.
    #[inline]
    fn group(&self, group: usize) -> Result<(Group<'b>, usize), FormatError> {
        let range = self.range_of(group).ok_or_else(|| self.unreadable())?;
        let bytes = self.bytes.get(range.clone()).ok_or_else(|| self.unreadable())?;
        let group = Group::decode(bytes, self.seal, self.at + range.start as u64)?;
        if group.len == bytes.len() { Ok((group, range.start)) } else { Err(self.unreadable()) }
    }

    /// How many of the block's keys are below `key`, and what follows it if the block has it.
    #[inline]
    pub(super) fn search(&self, key: &[u8]) -> Result<(usize, Option<&'b [u8]>), FormatError> {
        let start = &key[..key.len().min(self.prefix.len())];
        let suffix = match start.cmp(self.prefix) {
            Ordering::Less => return Ok((0, None)),
            Ordering::Greater => return Ok((self.count, None)),
            Ordering::Equal => &key[start.len()..],
        };
        let (mut low, mut high) = (1, self.groups.len());
        while low < high {
            let middle = low.midpoint(high);
            let separator = self.separator(middle).ok_or_else(|| self.unreadable())?;
            if separator <= suffix { low = middle + 1 } else { high = middle }
        }
        let (group, _) = self.group(low - 1)?;
        let (below, found) = group.search(key)?;
        Ok(((low - 1) * GROUP_ENTRIES + below, found))
    }

    /// Where the entry at this index begins in the block. Verifies the checksum of its group, and so of those that follow it
    /// in the group.
    pub(super) fn locate(&self, index: usize) -> Result<usize, FormatError> {
        let (group, start) = self.group(index / GROUP_ENTRIES)?;
        let mut entries = group.entries;
        for _ in 0..index % GROUP_ENTRIES {
            entries.next().ok_or_else(|| self.unreadable())?;
        }
        Ok(start + group.len - entries.bytes.len())
    }

    /// The entry at this index, and where the next one begins. `begin` is where this one does, as [`locate`](Self::locate) or
    /// this gave it; a group's first entry is located anew, and its group verified.
    pub(super) fn entry(&self, index: usize, begin: usize) -> Result<(IndexEntry, usize), FormatError> {
        let begin = if index.is_multiple_of(GROUP_ENTRIES) { self.locate(index)? } else { begin };
        let parts = || {
            let range = self.range_of(index / GROUP_ENTRIES)?;
            let entries = Entries { bytes: self.bytes.get(begin..range.end)? };
            Some((Group::again(self.bytes.get(range.clone())?, self.at + range.start as u64)?, entries, range.end))
        };
        let (group, mut entries, end) = parts().ok_or_else(|| self.unreadable())?;
        let (suffix, rest) = entries.next().ok_or_else(|| self.unreadable())?;
        Ok((group.entry([group.prefix, suffix].concat(), rest)?, end - entries.bytes.len()))
    }

    /// Where in the file the group lies that holds the entry at this index.
    pub(super) fn group_of(&self, index: usize) -> Option<u64> {
        Some(self.at + self.range_of(index / GROUP_ENTRIES)?.start as u64)
    }

    /// Whether every byte after the directory is an entry's, up to `used`, or zero. Expects that every entry was read, the
    /// last of each group up to `ends`, in order.
    pub(super) fn is_filled(&self, ends: &[usize]) -> bool {
        let zeros = |range: Range<usize>| self.bytes.get(range).is_some_and(is_zero);
        let mut before = usize::from(DIRECTORY_END.read(self.bytes));
        let right = ends.iter().enumerate().all(|(group, end)| {
            let lies_there = self.range_of(group).is_some_and(|range| range.end == *end && zeros(before..range.start));
            before = *end;
            lies_there
        });
        let used = usize::from(USED.read(self.bytes));
        let separators_end = self.groups.last().map_or(0, |last| GROUP_SEPARATOR_END.read(last));
        right
            && ends.len() == self.groups.len()
            && ends.last() == Some(&used)
            && self.separators.len() == usize::from(separators_end)
            && zeros(used..BLOCK_BYTES)
    }
}
