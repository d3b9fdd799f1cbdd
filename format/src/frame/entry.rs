//! One entry of a commit: a put, a delete, or an alias of an extent that an earlier commit wrote.

use serde::{Deserialize, Serialize};

use crate::codec;
use crate::dtype::Dtype;
use crate::error::{FormatError, require, within};
use crate::ids::Seq;
use crate::limits::{
    ATTRIBUTES_BYTES_MAX, ATTRIBUTES_MAX, BLOB_BYTES_MAX, BLOCK_BYTES, DIMS_MAX, KEY_BYTES_MAX, SEGMENT_BYTES_MAX,
    blob_align_bytes, chunk_count,
};

/// What an entry does to its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "u8", try_from = "u8")]
#[repr(u8)]
pub enum EntryKind {
    /// A value, whose bytes lie in this commit's payload.
    Put = 1,
    /// The key has no value from here on.
    Delete = 2,
    /// A value, whose bytes an earlier commit wrote.
    Alias = 3,
}

impl From<EntryKind> for u8 {
    fn from(kind: EntryKind) -> Self {
        kind as u8
    }
}

impl TryFrom<u8> for EntryKind {
    type Error = &'static str;

    fn try_from(code: u8) -> Result<Self, Self::Error> {
        [Self::Put, Self::Delete, Self::Alias].into_iter().find(|kind| *kind as u8 == code).ok_or("an unknown kind")
    }
}

/// One entry of a commit.
///
/// The fields are those on disk, in their order. A delete has a key and nothing else.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The key, 1 to [`KEY_BYTES_MAX`] bytes.
    #[serde(with = "codec::bytes")]
    pub key: Vec<u8>,
    /// What happens to it.
    pub kind: EntryKind,
    /// The code of the value's [`Dtype`]; 0 for a delete.
    pub dtype: u8,
    /// The value's shape; together with the dtype it makes `length`.
    pub shape: Vec<u64>,
    /// The user's own names and values, in the user's order.
    #[serde(with = "codec::attributes")]
    pub attributes: Vec<(String, Vec<u8>)>,
    /// Alias: the segment that holds the extent. Put: 0, this one.
    pub segment: u64,
    /// Put: where the value begins, counted from the payload's first byte; a multiple of
    /// [`blob_align_bytes`]`(length)`. Alias: where it begins in `segment`.
    pub offset: u64,
    /// The value's bytes.
    pub length: u64,
    /// The CRC-32 of all of them.
    pub crc: u32,
    /// The CRC-32 of each chunk of [`CHUNK_BYTES`](crate::limits::CHUNK_BYTES), the last one shorter; none for a value of
    /// up to one chunk. An alias may leave them out: the frame at `frame_offset` has them.
    pub chunk_crcs: Vec<u32>,
    /// Alias: where in `segment` the frame of the commit begins that wrote the extent. Otherwise 0.
    pub frame_offset: u64,
    /// In a commit that compaction wrote, the number of the commit whose put or delete this repeats: the entry counts as of
    /// then, and is overturned by whatever was done to its key since. Otherwise 0, and the entry counts as of its own commit.
    pub origin: Seq,
}

impl Entry {
    /// A put of a value of this type and shape. Its place and checksums are the caller's to fill in.
    ///
    /// A shape that makes no whole number of bytes gives a length of 0, which [`EncodedBody::new`](super::EncodedBody::new)
    /// refuses.
    pub fn put(key: &[u8], dtype: Dtype, shape: &[u64]) -> Self {
        let length = dtype.byte_len(shape).unwrap_or(0);
        Self { dtype: dtype.code(), shape: shape.to_vec(), length, ..Self::bare(key, EntryKind::Put) }
    }

    /// An alias of a value of this type and shape. Its segment, place and checksum are the caller's to fill in.
    pub fn alias(key: &[u8], dtype: Dtype, shape: &[u64]) -> Self {
        Self { kind: EntryKind::Alias, ..Self::put(key, dtype, shape) }
    }

    /// A delete.
    pub fn delete(key: &[u8]) -> Self {
        Self::bare(key, EntryKind::Delete)
    }

    fn bare(key: &[u8], kind: EntryKind) -> Self {
        Self {
            key: key.to_vec(),
            kind,
            dtype: 0,
            shape: Vec::new(),
            attributes: Vec::new(),
            segment: 0,
            offset: 0,
            length: 0,
            crc: 0,
            chunk_crcs: Vec::new(),
            frame_offset: 0,
            origin: Seq::ZERO,
        }
    }

    /// As of which commit the entry counts, in a commit with number `seq`.
    pub fn counts_from(&self, seq: Seq) -> Seq {
        if self.origin == Seq::ZERO { seq } else { self.origin }
    }

    /// The type of the value, where the entry has one.
    pub fn dtype(&self) -> Option<Dtype> {
        Dtype::from_code(self.dtype)
    }

    /// The fewest bytes of an encoded entry: key, shape, attributes and chunk checksums empty.
    pub(super) const ENCODED_BYTES_MIN: u64 = 8 + 1 + 1 + 8 + 8 + 8 + 8 + 8 + 4 + 8 + 8 + 8;

    /// The bytes of the encoded entry.
    pub(super) fn encoded_len(&self) -> u64 {
        let attributes: usize = self.attributes.iter().map(|(name, value)| 16 + name.len() + value.len()).sum();
        let variable = self.key.len() + 8 * self.shape.len() + attributes + 4 * self.chunk_crcs.len();
        Self::ENCODED_BYTES_MIN + variable as u64
    }

    /// Where the entry's bytes end in its own commit's payload. Only for judged entries: the sum cannot overflow then.
    pub(super) fn payload_end(&self) -> u64 {
        if self.kind == EntryKind::Put { self.offset + self.length } else { 0 }
    }

    /// What both sides of the disk hold true of an entry.
    pub(super) fn judge(&self) -> Result<(), FormatError> {
        require(!self.key.is_empty(), "an empty key")?;
        within("the length of a key", self.key.len() as u64, KEY_BYTES_MAX as u64)?;
        match self.kind {
            EntryKind::Delete => {
                let bare = *self == Self { key: self.key.clone(), origin: self.origin, ..Self::delete(&[]) };
                require(bare, "a delete that holds more than its key")
            }
            EntryKind::Put => {
                self.judge_value()?;
                require(self.segment == 0 && self.frame_offset == 0, "a put that names another segment")?;
                within("the offset of a value", self.offset, SEGMENT_BYTES_MAX)?;
                require(self.offset.is_multiple_of(blob_align_bytes(self.length)), "a value that is not aligned")?;
                let chunks = self.chunk_crcs.len() as u64;
                require(chunks == chunk_count(self.length), "a value with another number of chunk checksums")
            }
            EntryKind::Alias => {
                self.judge_value()?;
                require(self.segment != 0, "an alias that names no segment")?;
                require(self.origin == Seq::ZERO, "an alias that compaction wrote")?;
                within("the offset of a value", self.offset, SEGMENT_BYTES_MAX)?;
                let frame_is_possible =
                    self.frame_offset.is_multiple_of(BLOCK_BYTES) && self.frame_offset >= BLOCK_BYTES;
                require(frame_is_possible, "an alias that names no frame")?;
                require(self.offset > self.frame_offset, "an alias of bytes before their frame")?;
                let chunks = self.chunk_crcs.len() as u64;
                let right = chunks == 0 || chunks == chunk_count(self.length);
                require(right, "an alias with another number of chunk checksums")
            }
        }
    }

    fn judge_value(&self) -> Result<(), FormatError> {
        within("the number of dimensions", self.shape.len() as u64, DIMS_MAX as u64)?;
        within("the length of a value", self.length, BLOB_BYTES_MAX)?;
        let dtype = self.dtype().ok_or(FormatError::Invalid { what: "a value of unknown type" })?;
        require(dtype.byte_len(&self.shape) == Some(self.length), "a value whose type and shape make another length")?;
        within("the number of attributes", self.attributes.len() as u64, ATTRIBUTES_MAX as u64)?;
        let bytes: usize = self.attributes.iter().map(|(name, value)| name.len() + value.len()).sum();
        within("the bytes of all attributes", bytes as u64, ATTRIBUTES_BYTES_MAX as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::CHUNK_BYTES;

    fn put() -> Entry {
        Entry::put(b"k", Dtype::F32, &[2, 3])
    }

    fn alias() -> Entry {
        Entry { segment: 1, offset: 8192, frame_offset: 4096, ..Entry::alias(b"k", Dtype::F32, &[2, 3]) }
    }

    #[test]
    fn each_kind_is_accepted_as_it_should_be() {
        for entry in [put(), alias(), Entry::delete(b"k")] {
            assert_eq!(entry.judge(), Ok(()));
        }
    }

    #[test]
    fn what_is_over_a_limit_is_named_with_it() {
        let limit = |entry: Entry| match entry.judge() {
            Err(FormatError::LimitExceeded { what, value, limit }) => (what, value, limit),
            other => panic!("{other:?}"),
        };
        assert_eq!(limit(Entry { key: vec![0; 1025], ..put() }), ("the length of a key", 1025, 1024));
        assert_eq!(limit(Entry::put(b"k", Dtype::U8, &[1; 65])), ("the number of dimensions", 65, 64));
        let long = (1 << 48) + 8;
        assert_eq!(limit(Entry::put(b"k", Dtype::U8, &[long])), ("the length of a value", long, 1 << 48));
        let attributes = vec![("n".into(), vec![0; 65_536])];
        assert_eq!(limit(Entry { attributes, ..put() }), ("the bytes of all attributes", 65_537, 65_536));
        let attributes = vec![(String::new(), vec![]); 1025];
        assert_eq!(limit(Entry { attributes, ..put() }), ("the number of attributes", 1025, 1024));
        assert_eq!(limit(Entry { offset: u64::MAX, ..put() }), ("the offset of a value", u64::MAX, 1 << 60));
    }

    #[test]
    fn what_contradicts_itself_is_refused() {
        let chunked = Entry::put(b"k", Dtype::U8, &[CHUNK_BYTES + 1]);
        for entry in [
            Entry { key: vec![], ..put() },
            Entry { dtype: 0, ..put() },
            Entry { dtype: 200, ..put() },
            Entry { length: 23, ..put() },
            Entry { shape: vec![7], ..put() },
            Entry { segment: 1, ..put() },
            Entry { frame_offset: 4096, ..put() },
            Entry { offset: 128, ..put() },
            Entry { offset: 256, ..Entry::put(b"k", Dtype::U8, &[4096]) },
            Entry { chunk_crcs: vec![1], ..put() },
            Entry { chunk_crcs: vec![1], ..chunked.clone() },
            chunked,
            Entry { crc: 1, ..Entry::delete(b"k") },
            Entry { attributes: vec![(String::new(), vec![])], ..Entry::delete(b"k") },
            Entry { segment: 0, ..alias() },
            Entry { frame_offset: 0, ..alias() },
            Entry { frame_offset: 5000, ..alias() },
            Entry { offset: 4096, ..alias() },
            Entry { chunk_crcs: vec![1], ..alias() },
        ] {
            assert!(matches!(entry.judge(), Err(FormatError::Invalid { .. })), "{entry:?}");
        }
    }

    #[test]
    fn a_large_alias_may_carry_its_chunk_checksums_or_leave_them_out() {
        let large = Entry { segment: 1, offset: 8192, frame_offset: 4096, ..Entry::alias(b"k", Dtype::U8, &[3 << 20]) };
        assert_eq!(large.judge(), Ok(()));
        assert_eq!(Entry { chunk_crcs: vec![1, 2, 3], ..large }.judge(), Ok(()));
    }
}
