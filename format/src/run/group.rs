//! A group: up to eight neighbouring entries, which can be believed by themselves. A lookup reads one, and nothing else of
//! its block.
//!
//! ```text
//! group = [ crc, 4 ][ length, 2 ][ prefix length, 2 ][ prefix ][ entry ]…
//! entry = [ length of suffix, LEB128 ][ length of what follows the key, LEB128 ][ suffix ][ what follows the key ]
//! ```
//! `prefix` is what all keys of the group begin with; a suffix is the rest of a key. The checksum ([sealed](super::seal))
//! covers everything from byte 4 to `length`. Groups begin at multiples of 16 bytes.
//!
//! # Invariants
//! - Whoever has a group whose checksum holds has entries that this run's builder put at this place. So an entry under the
//!   key that was asked for is the right one, whatever led there.

use std::cmp::Ordering;

use super::entry::{IndexEntry, put_number, take_number};
use super::seal::Seal;
use super::{common_prefix, damaged};
use crate::error::FormatError;
use crate::layout::{Field, tiles};

/// The entries of every group but a block's last.
pub(super) const GROUP_ENTRIES: usize = 8;

/// Groups begin at multiples of this, so that 32 bits are enough to say where in 64 GiB one lies.
pub(super) const GROUP_ALIGN_BYTES: usize = 16;

const CRC: Field<4> = Field::at(0);
const LENGTH: Field<2> = Field::at(4);
const PREFIX_LEN: Field<2> = Field::at(6);
pub(super) const GROUP_HEAD_BYTES: usize = 8;

const _: () = assert!(tiles(&[CRC.span(), LENGTH.span(), PREFIX_LEN.span()], 0, GROUP_HEAD_BYTES));

/// The bytes of a number in LEB128, of those that a length in a block can be.
const fn number_len(number: usize) -> usize {
    if number < 1 << 7 { 1 } else { 2 }
}

/// What the keys of a group begin with. They are in rising order, so it is what the first and the last begin with.
pub(super) fn prefix_len<'e>(mut entries: impl Iterator<Item = (&'e [u8], &'e [u8])>) -> usize {
    let Some((first, _)) = entries.next() else { return 0 };
    entries.last().map_or(first.len(), |(last, _)| common_prefix(first, last))
}

/// The length of a group of these keys and what follows each.
pub(super) fn encoded_len<'e>(entries: impl Iterator<Item = (&'e [u8], &'e [u8])> + Clone) -> usize {
    let prefix_len = prefix_len(entries.clone());
    let entry_len = |(key, rest): (&[u8], &[u8])| {
        let suffix_len = key.len() - prefix_len;
        number_len(suffix_len) + number_len(rest.len()) + suffix_len + rest.len()
    };
    GROUP_HEAD_BYTES + prefix_len + entries.map(entry_len).sum::<usize>()
}

/// Appends the group of these keys and what follows each, which will lie at `at`, to `out`.
pub(super) fn encode<'e>(
    entries: impl Iterator<Item = (&'e [u8], &'e [u8])> + Clone,
    seal: Seal,
    at: u64,
    out: &mut Vec<u8>,
) {
    let as_u16 = |value| u16::try_from(value).expect("a group is shorter than a block");
    let prefix_len = prefix_len(entries.clone());
    let start = out.len();
    out.resize(start + GROUP_HEAD_BYTES, 0);
    out.extend_from_slice(entries.clone().next().map_or(&[], |(key, _)| &key[..prefix_len]));
    for (key, rest) in entries {
        let suffix = &key[prefix_len..];
        put_number(out, suffix.len() as u64);
        put_number(out, rest.len() as u64);
        out.extend_from_slice(suffix);
        out.extend_from_slice(rest);
    }
    let group = &mut out[start..];
    let length = group.len();
    LENGTH.write(group, as_u16(length));
    PREFIX_LEN.write(group, as_u16(prefix_len));
    let crc = seal.crc(at, &group[CRC.span().1..]);
    CRC.write(group, crc);
}

/// A group whose checksum holds.
#[derive(Clone, Copy)]
pub(super) struct Group<'b> {
    pub(super) prefix: &'b [u8],
    pub(super) entries: Entries<'b>,
    pub(super) len: usize,
    at: u64,
}

impl<'b> Group<'b> {
    /// The group that `bytes`, which lie at `at`, begin with; its checksum verified.
    #[inline]
    pub(super) fn decode(bytes: &'b [u8], seal: Seal, at: u64) -> Result<Self, FormatError> {
        let group =
            Self::again(bytes, at).ok_or_else(|| damaged("a group of index entries that does not decode", at))?;
        if CRC.read(bytes) == seal.crc(at, &bytes[CRC.span().1..group.len]) {
            Ok(group)
        } else {
            Err(damaged("a group of index entries with a wrong checksum", at))
        }
    }

    /// The group again, once its checksum was verified.
    #[inline]
    pub(super) fn again(bytes: &'b [u8], at: u64) -> Option<Self> {
        let head: &[u8; GROUP_HEAD_BYTES] = bytes.first_chunk()?;
        let len = usize::from(LENGTH.read(head));
        let body = bytes.get(GROUP_HEAD_BYTES..len)?;
        let (prefix, entries) = body.split_at_checked(usize::from(PREFIX_LEN.read(head)))?;
        Some(Self { prefix, entries: Entries { bytes: entries }, len, at })
    }

    /// What follows this key, if the group has it.
    #[inline]
    pub(super) fn find(&self, key: &[u8]) -> Result<Option<&'b [u8]>, FormatError> {
        Ok(if key.starts_with(self.prefix) { self.search(key)?.1 } else { None })
    }

    /// How many of the group's keys are below `key`, and what follows the next one if that equals it.
    #[inline]
    pub(super) fn search(&self, key: &[u8]) -> Result<(usize, Option<&'b [u8]>), FormatError> {
        let (start, suffix) = key.split_at(key.len().min(self.prefix.len()));
        let whole = start.cmp(self.prefix);
        let mut entries = self.entries;
        let mut below = 0;
        while !entries.is_empty() {
            let (found, rest) = entries.next().ok_or_else(|| self.unreadable())?;
            match whole.reverse().then_with(|| found.cmp(suffix)) {
                Ordering::Less => below += 1,
                Ordering::Equal => return Ok((below, Some(rest))),
                Ordering::Greater => break,
            }
        }
        Ok((below, None))
    }

    pub(super) fn unreadable(&self) -> FormatError {
        damaged("an index entry that does not decode", self.at)
    }

    /// The entry of a key, from what follows it in this group.
    #[inline]
    pub(super) fn entry(&self, key: Vec<u8>, rest: &[u8]) -> Result<IndexEntry, FormatError> {
        IndexEntry::decode(key, rest).map_err(|refusal| refusal.found_at(self.at))
    }
}

/// The entries of a group that are still to be read.
#[derive(Clone, Copy)]
pub(super) struct Entries<'b> {
    pub(super) bytes: &'b [u8],
}

impl<'b> Entries<'b> {
    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The next entry: the suffix of its key, and what follows the key. None also where the bytes are none.
    #[inline]
    pub(super) fn next(&mut self) -> Option<(&'b [u8], &'b [u8])> {
        let suffix_len = usize::try_from(take_number(&mut self.bytes)?).ok()?;
        let rest_len = usize::try_from(take_number(&mut self.bytes)?).ok()?;
        let (suffix, rest) = self.bytes.split_at_checked(suffix_len)?;
        let (rest, left) = rest.split_at_checked(rest_len)?;
        self.bytes = left;
        Some((suffix, rest))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{RunId, StoreId};

    fn seal() -> Seal {
        Seal::new(StoreId([1; 16]), RunId(1))
    }

    fn encoded(keys: &[&[u8]]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let entries = keys.iter().map(|key| (*key, *key));
        encode(entries.clone(), seal(), 4096, &mut bytes);
        assert_eq!(bytes.len(), encoded_len(entries));
        bytes
    }

    #[test]
    fn a_group_finds_its_keys_and_no_other() {
        let long = [b'm'; 300];
        for keys in
            [&[b"a".as_slice()][..], &[b"layers.1", b"layers.10", b"layers.2", &long], &[b"m", &long[..290], &long]]
        {
            let bytes = encoded(keys);
            let group = Group::decode(&bytes, seal(), 4096).unwrap();
            for (index, key) in keys.iter().enumerate() {
                assert_eq!(group.find(key), Ok(Some(*key)));
                assert_eq!(group.search(key), Ok((index, Some(*key))));
            }
            for key in [b"".as_slice(), b"0", b"layers.", b"layers.11", b"layers.20", &[b'm'; 301], b"z"] {
                let below = keys.iter().filter(|other| **other < key).count();
                assert_eq!(group.find(key), Ok(None), "{key:?}");
                assert_eq!(group.search(key), Ok((below, None)), "{key:?}");
            }
        }
    }

    #[test]
    fn a_group_is_believed_only_whole_and_where_it_was_put() {
        let bytes = encoded(&[b"layers.1", b"layers.2"]);
        assert!(Group::decode(&bytes, seal(), 4112).is_err());
        assert!(Group::decode(&bytes, Seal::new(StoreId([1; 16]), RunId(2)), 4096).is_err());
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << (at % 8);
            assert!(Group::decode(&damaged, seal(), 4096).is_err(), "byte {at}");
            assert!(Group::decode(&bytes[..at], seal(), 4096).is_err(), "cut at {at}");
        }
    }
}
