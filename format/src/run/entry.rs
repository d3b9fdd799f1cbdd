//! One entry of an index run: a key, and where its value lies, or that it has none.
//!
//! ```text
//! entry     = … [ tag, 1 ][ value | tombstone ]       what precedes it is the group's: lengths, and the key
//! value     = [ dtype, 1 ][ crc, 4 ][ seq ][ segment ][ frame offset ][ offset ][ dimensions, 1 ][ dimension ]…
//! tombstone = [ seq ][ segment ][ frame offset ]
//! ```
//! Numbers without a width are LEB128: seven bits a byte, the lowest first, the eighth bit set in all but the last; in as
//! few bytes as they need. The length of a value is not stored: its dtype and shape make it.

use crate::dtype::Dtype;
use crate::error::{FormatError, require, within};
use crate::ids::{SegmentId, Seq};
use crate::limits::{BLOB_BYTES_MAX, DIMS_MAX, KEY_BYTES_MAX, SEGMENT_BYTES_MAX};

/// Whether a key has a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IndexKind {
    /// It has.
    Put,
    /// It has none since this commit; older runs may hold older values.
    Delete,
}

/// What an index run knows of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IndexEntry {
    /// The key, 1 to [`KEY_BYTES_MAX`] bytes.
    pub key: Vec<u8>,
    /// Whether it has a value.
    pub kind: IndexKind,
    /// The commit that says so.
    pub seq: Seq,
    /// The segment that holds the value and the frame; for a tombstone, the frame.
    pub segment: SegmentId,
    /// Where in the segment the frame begins that has the rest: attributes and chunk checksums.
    pub frame_offset: u64,
    /// Where in the segment the value begins.
    pub offset: u64,
    /// The value's bytes: what its dtype and shape make.
    pub length: u64,
    /// The CRC-32 of all of them.
    pub crc: u32,
    /// The type of its elements.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<u64>,
    /// Whether the frame has attributes of it.
    pub has_attributes: bool,
}

/// The tag's bits.
const TAG_PUT: u8 = 1;
const TAG_DELETE: u8 = 2;
const TAG_ATTRIBUTES: u8 = 4;

/// The longest LEB128 of 64 bits.
const NUMBER_BYTES_MAX: usize = 10;

/// The most bytes of an entry, its key and the key's length aside.
pub(super) const REST_BYTES_MAX: usize = 1 + 1 + 4 + 4 * NUMBER_BYTES_MAX + 1 + DIMS_MAX * NUMBER_BYTES_MAX;

impl IndexEntry {
    /// What says that a key has no value: the delete that `seq` committed, in the frame at `frame_offset`.
    pub fn tombstone(key: &[u8], seq: Seq, segment: SegmentId, frame_offset: u64) -> Self {
        Self {
            key: key.to_vec(),
            kind: IndexKind::Delete,
            seq,
            segment,
            frame_offset,
            offset: 0,
            length: 0,
            crc: 0,
            dtype: Dtype::U8,
            shape: Vec::new(),
            has_attributes: false,
        }
    }

    /// What both sides of the disk hold true of an entry's key, and of the places that it names.
    #[inline]
    fn judge_place(&self) -> Result<(), FormatError> {
        require(!self.key.is_empty(), "an empty key")?;
        within("the length of a key", self.key.len() as u64, KEY_BYTES_MAX as u64)?;
        require(self.seq > Seq::ZERO, "an entry of no commit")?;
        require(self.segment.0 != 0, "an entry of no segment")?;
        within("a frame's offset", self.frame_offset, SEGMENT_BYTES_MAX)?;
        within("the offset of a value", self.offset, SEGMENT_BYTES_MAX)?;
        within("the length of a value", self.length, BLOB_BYTES_MAX)
    }

    /// What both sides of the disk hold true of an entry.
    pub(super) fn judge(&self) -> Result<(), FormatError> {
        self.judge_place()?;
        if self.kind == IndexKind::Delete {
            let bare = self.offset == 0 && self.length == 0 && self.crc == 0 && !self.has_attributes;
            return require(bare && self.shape.is_empty() && self.dtype == Dtype::U8, "a tombstone that holds a value");
        }
        within("the number of dimensions", self.shape.len() as u64, DIMS_MAX as u64)?;
        let right = self.dtype.byte_len(&self.shape) == Some(self.length);
        require(right, "a value whose type and shape make another length")
    }

    /// Appends everything but the key to `out`. Only for judged entries.
    pub(super) fn encode_rest(&self, out: &mut Vec<u8>) {
        let place = [self.seq.0, self.segment.0, self.frame_offset];
        if self.kind == IndexKind::Delete {
            out.push(TAG_DELETE);
            place.into_iter().for_each(|number| put_number(out, number));
            return;
        }
        out.push(if self.has_attributes { TAG_PUT | TAG_ATTRIBUTES } else { TAG_PUT });
        out.push(self.dtype.code());
        out.extend_from_slice(&self.crc.to_le_bytes());
        place.into_iter().for_each(|number| put_number(out, number));
        put_number(out, self.offset);
        out.push(u8::try_from(self.shape.len()).expect("the number of dimensions was judged"));
        self.shape.iter().for_each(|dim| put_number(out, *dim));
    }

    /// Reads an entry from its key and exactly the bytes that [`encode_rest`](Self::encode_rest) wrote.
    pub(super) fn decode(key: Vec<u8>, rest: &[u8]) -> Result<Self, FormatError> {
        let unreadable = FormatError::Invalid { what: "an entry that does not decode" };
        let entry = Self::parse(key, rest).ok_or(unreadable)?;
        // The rest holds by the way it was parsed: a tombstone is bare, a value as long as its dtype and shape say.
        entry.judge_place()?;
        Ok(entry)
    }

    /// Whether a key has a value, by the bytes that [`encode_rest`](Self::encode_rest) wrote: without taking memory for them.
    #[inline]
    pub(super) fn kind_of(rest: &[u8]) -> Result<IndexKind, FormatError> {
        match rest.first() {
            Some(&TAG_DELETE) => Ok(IndexKind::Delete),
            Some(tag) if tag & !TAG_ATTRIBUTES == TAG_PUT => Ok(IndexKind::Put),
            _ => Err(FormatError::Invalid { what: "an entry that does not decode" }),
        }
    }

    fn parse(key: Vec<u8>, mut rest: &[u8]) -> Option<Self> {
        let rest = &mut rest;
        let tag = take::<1>(rest)?[0];
        let entry = if tag == TAG_DELETE {
            Self::tombstone(&key, Seq(take_number(rest)?), SegmentId(take_number(rest)?), take_number(rest)?)
        } else {
            let [dtype] = take::<1>(rest)?;
            let dtype = Dtype::from_code(dtype)?;
            let crc = u32::from_le_bytes(take(rest)?);
            let (seq, segment) = (Seq(take_number(rest)?), SegmentId(take_number(rest)?));
            let (frame_offset, offset) = (take_number(rest)?, take_number(rest)?);
            let [dims] = take::<1>(rest)?;
            let dims = Some(usize::from(dims)).filter(|dims| *dims <= DIMS_MAX)?;
            let mut shape = Vec::with_capacity(dims);
            for _ in 0..dims {
                shape.push(take_number(rest)?);
            }
            let length = dtype.byte_len(&shape)?;
            let has_attributes = match tag {
                TAG_PUT => false,
                tag if tag == TAG_PUT | TAG_ATTRIBUTES => true,
                _ => return None,
            };
            let kind = IndexKind::Put;
            Self { key, kind, seq, segment, frame_offset, offset, length, crc, dtype, shape, has_attributes }
        };
        rest.is_empty().then_some(entry)
    }
}

pub(super) fn put_number(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push((number & 0x7f) as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

/// Reads a LEB128 number; only the shortest form of a number is one.
#[inline]
pub(super) fn take_number(bytes: &mut &[u8]) -> Option<u64> {
    // Most numbers are small.
    if let [byte @ ..0x80, left @ ..] = *bytes {
        *bytes = left;
        return Some(u64::from(*byte));
    }
    let mut number = 0u64;
    for place in 0..NUMBER_BYTES_MAX {
        let [byte] = take::<1>(bytes)?;
        let part = u64::from(byte & 0x7f);
        let shifted = part << (7 * place);
        if shifted >> (7 * place) != part {
            return None;
        }
        number |= shifted;
        if byte & 0x80 == 0 {
            return (place == 0 || byte != 0).then_some(number);
        }
    }
    None
}

fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (taken, left) = bytes.split_first_chunk()?;
    *bytes = left;
    Some(*taken)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put() -> IndexEntry {
        IndexEntry {
            key: b"layers.0.w".to_vec(),
            kind: IndexKind::Put,
            seq: Seq(300),
            segment: SegmentId(7),
            frame_offset: 4096,
            offset: 1 << 40,
            length: 48,
            crc: 0xdead_beef,
            dtype: Dtype::F32,
            shape: vec![3, 4],
            has_attributes: true,
        }
    }

    fn round_trip(entry: &IndexEntry) -> IndexEntry {
        let mut rest = Vec::new();
        entry.encode_rest(&mut rest);
        assert!(rest.len() <= REST_BYTES_MAX);
        for cut in (0..rest.len()).step_by(if cfg!(miri) { 23 } else { 1 }) {
            assert!(IndexEntry::decode(entry.key.clone(), &rest[..cut]).is_err(), "cut at {cut}");
        }
        assert_eq!(IndexEntry::kind_of(&rest), Ok(entry.kind));
        IndexEntry::decode(entry.key.clone(), &rest).unwrap()
    }

    #[test]
    fn an_entry_comes_back_as_it_was_written() {
        let tombstone = IndexEntry::tombstone(b"k", Seq(u64::MAX), SegmentId(u64::MAX), 1 << 60);
        let scalar = IndexEntry { shape: vec![], length: 4, has_attributes: false, ..put() };
        let deep = IndexEntry { shape: [vec![0], vec![u64::MAX; 63]].concat(), length: 0, ..put() };
        for entry in [put(), tombstone, scalar, deep] {
            assert_eq!(round_trip(&entry), entry);
        }
    }

    #[test]
    fn only_the_shortest_form_of_a_number_is_one() {
        for number in [0, 1, 127, 128, 16_383, 16_384, u64::MAX >> 1, u64::MAX] {
            let mut bytes = Vec::new();
            put_number(&mut bytes, number);
            assert_eq!(take_number(&mut bytes.as_slice()), Some(number));
        }
        for bytes in [[0x80, 0].as_slice(), &[0xff, 0x80, 0], &[0xff; 9], &[0x80], &[]] {
            assert_eq!(take_number(&mut &*bytes), None, "{bytes:?}");
        }
        let over = [[0xff; 9].as_slice(), &[2]].concat();
        assert_eq!(take_number(&mut over.as_slice()), None);
    }

    #[test]
    fn what_contradicts_itself_is_refused() {
        let tombstone = IndexEntry::tombstone(b"k", Seq(1), SegmentId(1), 4096);
        for entry in [
            IndexEntry { key: vec![], ..put() },
            IndexEntry { key: vec![0; 1025], ..put() },
            IndexEntry { seq: Seq(0), ..put() },
            IndexEntry { segment: SegmentId(0), ..put() },
            IndexEntry { offset: u64::MAX, ..put() },
            IndexEntry { frame_offset: u64::MAX, ..put() },
            IndexEntry { length: 49, ..put() },
            IndexEntry { shape: vec![1; 65], length: 4, ..put() },
            IndexEntry { length: 1, ..tombstone.clone() },
            IndexEntry { dtype: Dtype::F32, ..tombstone.clone() },
            IndexEntry { has_attributes: true, ..tombstone },
        ] {
            assert!(entry.judge().is_err(), "{entry:?}");
        }
    }
}
