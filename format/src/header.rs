//! The first 4 KiB of a segment: whose it is, and the salt that its frames carry.
//!
//! Written once, before the first frame, and never changed. Bytes without a meaning are written as zero, are covered by the
//! digest and are otherwise ignored, so that a later version may give them one that earlier readers need not know.

use crate::checksum::crc32;
use crate::error::FormatError;
use crate::ids::{Salt, SegmentId, StoreId};
use crate::layout::{Field, tiles};
use crate::limits::{BLOCK_BYTES, FORMAT_VERSION};

/// The length of a segment header, and the offset of a segment's first frame.
pub const SEGMENT_HEADER_BYTES: usize = 4096;

const MAGIC_BYTES: [u8; 8] = *b"ALIGHTsg";

const MAGIC: Field<8> = Field::at(0);
const VERSION: Field<4> = Field::at(8);
const BLOCK: Field<4> = Field::at(12);
const STORE: Field<16> = Field::at(16);
const SEGMENT: Field<8> = Field::at(32);
const SALT: Field<8> = Field::at(40);
const FLAGS: Field<4> = Field::at(48);
const RESERVED: Field<4040> = Field::at(52);
const DIGEST: Field<4> = Field::at(4092);

const _: () = assert!(tiles(
    &[
        MAGIC.span(),
        VERSION.span(),
        BLOCK.span(),
        STORE.span(),
        SEGMENT.span(),
        SALT.span(),
        FLAGS.span(),
        RESERVED.span(),
        DIGEST.span()
    ],
    0,
    SEGMENT_HEADER_BYTES
));
const _: () = assert!(SEGMENT_HEADER_BYTES as u64 == BLOCK_BYTES);

/// The segment holds one commit alone.
const SINGLE_COMMIT: u32 = 1;

/// What a segment says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentHeader {
    /// The format's version that the segment was written in.
    pub version: u32,
    /// The store that it belongs to.
    pub store: StoreId,
    /// Its number, from 1.
    pub segment: SegmentId,
    /// What every frame in it carries.
    pub salt: Salt,
    /// What its frames and payloads are multiples of; [`BLOCK_BYTES`] in this version.
    pub block_bytes: u32,
    /// Whether it holds one commit alone: nothing follows it, and recovery looks for nothing in its payload.
    pub single_commit: bool,
}

impl SegmentHeader {
    /// The header of a new segment, in this version.
    pub fn new(store: StoreId, segment: SegmentId, salt: Salt) -> Self {
        Self { version: FORMAT_VERSION, store, segment, salt, block_bytes: BLOCK_BYTES as u32, single_commit: false }
    }

    /// The header's bytes.
    ///
    /// # Panics
    /// When a field is none that [`decode`](Self::decode) accepts: our own mistake.
    pub fn encode(&self) -> [u8; SEGMENT_HEADER_BYTES] {
        assert_eq!(self.judge(), Ok(()), "only a valid header is written");
        let mut bytes = [0; SEGMENT_HEADER_BYTES];
        MAGIC.set(&mut bytes, MAGIC_BYTES);
        VERSION.write(&mut bytes, self.version);
        BLOCK.write(&mut bytes, self.block_bytes);
        STORE.set(&mut bytes, self.store.0);
        SEGMENT.write(&mut bytes, self.segment.0);
        SALT.write(&mut bytes, self.salt.0);
        FLAGS.write(&mut bytes, if self.single_commit { SINGLE_COMMIT } else { 0 });
        let digest = crc32(&bytes[..DIGEST.span().0]);
        DIGEST.write(&mut bytes, digest);
        bytes
    }

    /// The header that a segment begins with; bytes after it are not looked at.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let Some(bytes) = bytes.get(..SEGMENT_HEADER_BYTES) else {
            return Err(FormatError::Damaged {
                what: "a segment header that is cut short",
                offset: bytes.len() as u64,
            });
        };
        if MAGIC.get(bytes) != MAGIC_BYTES {
            return Err(FormatError::NotAlight { expected: "a segment header" });
        }
        if DIGEST.read(bytes) != crc32(&bytes[..DIGEST.span().0]) {
            return Err(FormatError::Damaged { what: "a segment header with a wrong checksum", offset: 0 });
        }
        let header = Self {
            version: VERSION.read(bytes),
            store: StoreId(STORE.get(bytes)),
            segment: SegmentId(SEGMENT.read(bytes)),
            salt: Salt(SALT.read(bytes)),
            block_bytes: BLOCK.read(bytes),
            // Flags that a later version may add mean nothing to this one.
            single_commit: FLAGS.read(bytes) & SINGLE_COMMIT != 0,
        };
        header.judge()?;
        Ok(header)
    }

    /// What both sides of the disk hold true of a header.
    fn judge(&self) -> Result<(), FormatError> {
        if self.version > FORMAT_VERSION {
            return Err(FormatError::NewerVersion { found: self.version, known: FORMAT_VERSION });
        }
        if self.version == 0 {
            return Err(FormatError::Damaged { what: "a segment header of version 0", offset: VERSION.offset() });
        }
        if u64::from(self.block_bytes) != BLOCK_BYTES {
            return Err(FormatError::Damaged {
                what: "a segment header with another block size",
                offset: BLOCK.offset(),
            });
        }
        if self.segment.0 == 0 {
            return Err(FormatError::Damaged { what: "a segment header with the number 0", offset: SEGMENT.offset() });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> SegmentHeader {
        SegmentHeader::new(StoreId([7; 16]), SegmentId(42), Salt(0x0123_4567_89ab_cdef))
    }

    fn resealed(change: impl FnOnce(&mut [u8])) -> [u8; SEGMENT_HEADER_BYTES] {
        let mut bytes = sample().encode();
        change(&mut bytes);
        let digest = crc32(&bytes[..DIGEST.span().0]);
        DIGEST.write(&mut bytes, digest);
        bytes
    }

    #[test]
    fn a_header_comes_back_as_it_was_written() {
        assert_eq!(SegmentHeader::decode(&sample().encode()), Ok(sample()));
    }

    #[test]
    fn a_newer_version_is_told_apart_from_damage() {
        let bytes = resealed(|bytes| VERSION.write(bytes, 9));
        assert_eq!(SegmentHeader::decode(&bytes), Err(FormatError::NewerVersion { found: 9, known: FORMAT_VERSION }));
        let mut bytes = sample().encode();
        VERSION.write(&mut bytes, 9);
        assert!(matches!(SegmentHeader::decode(&bytes), Err(FormatError::Damaged { .. })));
    }

    #[test]
    fn a_header_that_contradicts_itself_is_refused_though_its_checksum_holds() {
        for bytes in [
            resealed(|bytes| VERSION.write(bytes, 0)),
            resealed(|bytes| BLOCK.write(bytes, 512)),
            resealed(|bytes| SEGMENT.write(bytes, 0)),
        ] {
            assert!(matches!(SegmentHeader::decode(&bytes), Err(FormatError::Damaged { .. })));
        }
    }

    #[test]
    fn blocks_never_written_are_no_header() {
        assert!(matches!(SegmentHeader::decode(&[0; 4096]), Err(FormatError::NotAlight { .. })));
        assert!(matches!(SegmentHeader::decode(&[]), Err(FormatError::Damaged { .. })));
    }

    #[test]
    fn bytes_without_a_meaning_are_left_to_later_versions() {
        assert_eq!(SegmentHeader::decode(&resealed(|bytes| bytes[2000] = 1)), Ok(sample()));
    }
}
