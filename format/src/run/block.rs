//! A data block: some neighbouring entries, and the range of keys that is theirs.
//!
//! ```text
//! block = [ crc, 4 ][ length, 2 ][ count, 2 ][ prefix length, 2 ][ lower length, 2 ][ upper length, 2 ][ used, 2 ]
//!         [ where each entry begins, 2 each ][ prefix ][ lower ][ upper ][ entry ]… [ zeros ]
//! ```
//! The checksum covers everything after it. `prefix` is what all keys of the block begin with; the entries hold the rest of
//! each key. `used` is where the entries end.
//!
//! # Invariants
//! - Every key `k` of the block has `lower <= k < upper`. The first block of a run has an empty `lower`, the last has no
//!   `upper` (length 0xffff); each other block's `upper` is the next one's `lower`.
//! - So a key outside a block's range was led there wrongly, and a key inside it that is not in the block is in no block.

use super::entry::{IndexEntry, REST_BYTES_MAX};
use super::{common_prefix, damaged, u16_at};
use crate::checksum::crc32;
use crate::error::FormatError;
use crate::layout::{Field, tiles};
use crate::limits::KEY_BYTES_MAX;

/// The length that a builder gives a block, unless one entry alone needs more. Half a page: a lookup in a run that no cache
/// holds costs about what fetching the block from memory costs (`examples/lookup.rs` measures it).
pub(super) const BLOCK_BYTES_TARGET: usize = 2048;

/// Blocks are multiples of this.
pub(super) const BLOCK_BYTES_MIN: u64 = 1024;

/// No block is longer. Enough for the largest entry with the largest range, as asserted below.
pub(super) const BLOCK_BYTES_MAX: usize = 4096;

const CRC: Field<4> = Field::at(0);
const LENGTH: Field<2> = Field::at(4);
const COUNT: Field<2> = Field::at(6);
const PREFIX_LEN: Field<2> = Field::at(8);
const LOWER_LEN: Field<2> = Field::at(10);
const UPPER_LEN: Field<2> = Field::at(12);
const USED: Field<2> = Field::at(14);
const HEAD_BYTES: usize = 16;

const _: () = assert!(tiles(
    &[CRC.span(), LENGTH.span(), COUNT.span(), PREFIX_LEN.span(), LOWER_LEN.span(), UPPER_LEN.span(), USED.span()],
    0,
    HEAD_BYTES
));

/// The upper length of the last block.
const NO_UPPER: u16 = u16::MAX;

/// One entry whose key, lower and upper have 1024 bytes each (the key as the prefix) fits a block.
const _: () = assert!(HEAD_BYTES + 2 + 3 * KEY_BYTES_MAX + 2 + REST_BYTES_MAX <= BLOCK_BYTES_MAX);

fn as_u16(value: usize) -> u16 {
    u16::try_from(value).expect("lengths in a block are below its limit")
}

/// A block being filled.
#[derive(Default)]
pub(super) struct BlockBuilder {
    /// Where the block's range begins.
    lower: Vec<u8>,
    /// The keys, end to end.
    keys: Vec<u8>,
    /// What follows each key, end to end.
    rests: Vec<u8>,
    /// Where each entry's key and rest end.
    ends: Vec<(usize, usize)>,
    /// The bytes that all keys begin with.
    prefix_len: usize,
}

impl BlockBuilder {
    pub(super) fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    pub(super) fn lower(&self) -> &[u8] {
        &self.lower
    }

    pub(super) fn last_key(&self) -> &[u8] {
        let start = self.ends.iter().rev().nth(1).map_or(0, |(key_end, _)| *key_end);
        &self.keys[start..]
    }

    fn first_key(&self) -> &[u8] {
        &self.keys[..self.ends.first().map_or(0, |(key_end, _)| *key_end)]
    }

    /// Adds an entry, unless the block is full; then it is left as it was, and the answer is false. An empty block takes any
    /// entry.
    pub(super) fn try_push(&mut self, key: &[u8], rest: &[u8]) -> bool {
        let prefix_len =
            if self.is_empty() { key.len() } else { common_prefix(&self.first_key()[..self.prefix_len], key) };
        let count = self.ends.len() + 1;
        let keys_len = self.keys.len() + key.len() - count * prefix_len;
        // The next block's first key is not known yet, but what separates it from this key is at most one byte longer.
        let upper_len_max = (key.len() + 1).min(KEY_BYTES_MAX);
        let range_len = self.lower.len() + upper_len_max;
        let len = HEAD_BYTES + 4 * count + prefix_len + range_len + keys_len + self.rests.len() + rest.len();
        if len > BLOCK_BYTES_TARGET && !self.is_empty() {
            return false;
        }
        self.prefix_len = prefix_len;
        self.keys.extend_from_slice(key);
        self.rests.extend_from_slice(rest);
        self.ends.push((self.keys.len(), self.rests.len()));
        true
    }

    /// Appends the block to `out`, returns its length, and begins the next block, whose range begins where this one's ends.
    pub(super) fn finish(&mut self, upper: Option<&[u8]>, out: &mut Vec<u8>) -> usize {
        let start = out.len();
        let prefix = &self.first_key()[..self.prefix_len];
        let entries_at =
            HEAD_BYTES + 2 * self.ends.len() + prefix.len() + self.lower.len() + upper.map_or(0, <[u8]>::len);
        out.resize(start + HEAD_BYTES, 0);
        let (mut key_start, mut rest_start, mut entry_at) = (0, 0, entries_at);
        for (key_end, rest_end) in &self.ends {
            out.extend_from_slice(&as_u16(entry_at).to_le_bytes());
            entry_at += 2 + (key_end - key_start - prefix.len()) + (rest_end - rest_start);
            (key_start, rest_start) = (*key_end, *rest_end);
        }
        let used = entry_at;
        out.extend_from_slice(prefix);
        out.extend_from_slice(&self.lower);
        out.extend_from_slice(upper.unwrap_or_default());
        (key_start, rest_start) = (0, 0);
        for (key_end, rest_end) in &self.ends {
            let suffix = &self.keys[key_start + prefix.len()..*key_end];
            out.extend_from_slice(&as_u16(suffix.len()).to_le_bytes());
            out.extend_from_slice(suffix);
            out.extend_from_slice(&self.rests[rest_start..*rest_end]);
            (key_start, rest_start) = (*key_end, *rest_end);
        }
        assert_eq!(out.len() - start, used, "a block is as long as it was counted");
        let len = used.next_multiple_of(BLOCK_BYTES_MIN as usize);
        assert!(len <= BLOCK_BYTES_MAX, "every block fits its limit");
        out.resize(start + len, 0);

        let block = &mut out[start..];
        LENGTH.write(block, as_u16(len));
        COUNT.write(block, as_u16(self.ends.len()));
        PREFIX_LEN.write(block, as_u16(prefix.len()));
        LOWER_LEN.write(block, as_u16(self.lower.len()));
        UPPER_LEN.write(block, upper.map_or(NO_UPPER, |upper| as_u16(upper.len())));
        USED.write(block, as_u16(used));
        let crc = crc32(&block[CRC.span().1..]);
        CRC.write(block, crc);

        *self = Self { lower: upper.unwrap_or_default().to_vec(), ..Self::default() };
        len
    }
}

/// A block whose checksum holds, and where in the file it lies.
#[derive(Clone, Copy)]
pub(super) struct Block<'b> {
    bytes: &'b [u8],
    at: u64,
    pub(super) count: usize,
    pub(super) prefix: &'b [u8],
    pub(super) lower: &'b [u8],
    pub(super) upper: Option<&'b [u8]>,
    used: usize,
}

impl<'b> Block<'b> {
    /// The block that `bytes` begin with, its checksum verified. `bytes` may go on after it.
    #[inline]
    pub(super) fn decode(bytes: &'b [u8], at: u64) -> Result<Self, FormatError> {
        let cut = damaged("an index block that is cut short", at);
        if bytes.len() < HEAD_BYTES {
            return Err(cut);
        }
        let len = usize::from(LENGTH.read(bytes));
        if !(HEAD_BYTES..=BLOCK_BYTES_MAX).contains(&len) {
            return Err(damaged("an index block of impossible length", at));
        }
        let bytes = bytes.get(..len).ok_or(cut)?;
        if CRC.read(bytes) != crc32(&bytes[CRC.span().1..]) {
            return Err(damaged("an index block with a wrong checksum", at));
        }
        Self::parse(bytes, at).ok_or_else(|| damaged("an index block that does not decode", at))
    }

    /// The block again, once its checksum was verified.
    #[inline]
    pub(super) fn again(bytes: &'b [u8], at: u64) -> Option<Self> {
        let len = usize::from(u16_at(bytes, LENGTH.span().0)?);
        Self::parse(bytes.get(..len)?, at)
    }

    #[inline]
    fn parse(bytes: &'b [u8], at: u64) -> Option<Self> {
        let count = usize::from(COUNT.read(bytes));
        let used = usize::from(USED.read(bytes));
        let mut rest = bytes.get(..used)?.get(HEAD_BYTES + 2 * count..)?;
        let mut take = |len: u16| {
            let (taken, left) = rest.split_at_checked(usize::from(len))?;
            rest = left;
            Some(taken)
        };
        let prefix = take(PREFIX_LEN.read(bytes))?;
        let lower = take(LOWER_LEN.read(bytes))?;
        let upper = match UPPER_LEN.read(bytes) {
            NO_UPPER => None,
            len => Some(take(len)?),
        };
        (count > 0).then_some(Self { bytes, at, count, prefix, lower, upper, used })
    }

    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether this key can only be in this block.
    #[inline]
    pub(super) fn owns(&self, key: &[u8]) -> bool {
        self.lower <= key && self.upper.is_none_or(|upper| key < upper)
    }

    fn unreadable(&self) -> FormatError {
        damaged("an index block's entry that does not decode", self.at)
    }

    /// The suffix of the entry's key, and the rest of the bytes up to the next entry.
    #[inline]
    fn split(&self, index: usize) -> Option<(&'b [u8], &'b [u8])> {
        let start = usize::from(u16_at(self.bytes, HEAD_BYTES + 2 * index)?);
        let end = if index + 1 < self.count {
            usize::from(u16_at(self.bytes, HEAD_BYTES + 2 * (index + 1))?)
        } else {
            self.used
        };
        let entry = self.bytes.get(start..end)?;
        entry.get(2..)?.split_at_checked(usize::from(u16_at(entry, 0)?))
    }

    /// How many of the block's keys are below `key`, and whether the next one equals it.
    #[inline]
    pub(super) fn search(&self, key: &[u8]) -> Result<(usize, bool), FormatError> {
        let head = &key[..key.len().min(self.prefix.len())];
        let suffix = match head.cmp(self.prefix) {
            std::cmp::Ordering::Less => return Ok((0, false)),
            std::cmp::Ordering::Greater => return Ok((self.count, false)),
            std::cmp::Ordering::Equal => &key[head.len()..],
        };
        let (mut low, mut high) = (0, self.count);
        while low < high {
            let middle = low.midpoint(high);
            let (found, _) = self.split(middle).ok_or_else(|| self.unreadable())?;
            match found.cmp(suffix) {
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
                std::cmp::Ordering::Equal => return Ok((middle, true)),
            }
        }
        Ok((low, false))
    }

    /// The entry at this place.
    #[inline]
    pub(super) fn entry(&self, index: usize) -> Result<IndexEntry, FormatError> {
        let (suffix, rest) = self.split(index).ok_or_else(|| self.unreadable())?;
        let mut key = Vec::with_capacity(self.prefix.len() + suffix.len());
        key.extend_from_slice(self.prefix);
        key.extend_from_slice(suffix);
        IndexEntry::decode(key, rest).map_err(|refusal| refusal.found_at(self.at))
    }

    /// Whether every byte that has no meaning is zero, and the entries lie end to end.
    pub(super) fn is_canonical(&self) -> bool {
        let entries_at = HEAD_BYTES + 2 * self.count + self.prefix.len() + self.lower.len();
        let entries_at = entries_at + self.upper.map_or(0, <[u8]>::len);
        u16_at(self.bytes, HEAD_BYTES).map(usize::from) == Some(entries_at)
            && (self.bytes.len() as u64).is_multiple_of(BLOCK_BYTES_MIN)
            && self.bytes[self.used..].iter().all(|byte| *byte == 0)
    }
}
