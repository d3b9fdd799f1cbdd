//! The fixed part that a frame begins with, under a digest of its own, so that recovery can judge a frame's place and
//! length before it reads the rest.

use super::entry::Entry;
use super::{COUNT_BYTES, frame_len};
use crate::checksum::crc32;
use crate::error::{FormatError, require, within};
use crate::header::SEGMENT_HEADER_BYTES;
use crate::ids::{Salt, Seq};
use crate::layout::{Field, tiles};
use crate::limits::{BLOCK_BYTES, ENTRIES_PER_COMMIT_MAX, FRAME_BYTES_MAX, SEGMENT_BYTES_MAX};

/// The length of a prelude.
pub const PRELUDE_BYTES: usize = 96;

/// A bit of [`Prelude::flags`]: the payload was on the disk before the frame was written, so recovery need not read it.
pub const PAYLOAD_SYNCED: u32 = 1;

const FLAGS_KNOWN: u32 = PAYLOAD_SYNCED;

const MAGIC_BYTES: [u8; 8] = *b"ALIGHTfr";

const MAGIC: Field<8> = Field::at(0);
const SALT: Field<8> = Field::at(8);
const OFFSET: Field<8> = Field::at(16);
const SEQ: Field<8> = Field::at(24);
const FRAME_LEN: Field<8> = Field::at(32);
const PAYLOAD_LEN: Field<8> = Field::at(40);
const SYNCED_THROUGH: Field<8> = Field::at(48);
const BODY_LEN: Field<8> = Field::at(56);
const ENTRY_COUNT: Field<4> = Field::at(64);
const FLAGS: Field<4> = Field::at(68);
const PREVIOUS_DIGEST: Field<4> = Field::at(72);
const PART: Field<2> = Field::at(76);
const PARTS: Field<2> = Field::at(78);
const RESERVED: Field<12> = Field::at(80);
const DIGEST: Field<4> = Field::at(92);

const _: () = assert!(tiles(
    &[
        MAGIC.span(),
        SALT.span(),
        OFFSET.span(),
        SEQ.span(),
        FRAME_LEN.span(),
        PAYLOAD_LEN.span(),
        SYNCED_THROUGH.span(),
        BODY_LEN.span(),
        ENTRY_COUNT.span(),
        FLAGS.span(),
        PREVIOUS_DIGEST.span(),
        PART.span(),
        PARTS.span(),
        RESERVED.span(),
        DIGEST.span(),
    ],
    0,
    PRELUDE_BYTES
));

/// What the writer of a frame decides; the rest of a prelude follows from the body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PreludeFields {
    /// The segment's salt.
    pub salt: Salt,
    /// Where in the segment the frame begins.
    pub offset: u64,
    /// The commit's sequence number, from 1.
    pub seq: Seq,
    /// The bytes of the payload that follows the frame: whole blocks.
    pub payload_len: u64,
    /// Every commit up to this one, in whichever segment, was on the disk when this frame was written.
    pub synced_through: Seq,
    /// The digest of the segment's previous frame; 0 for its first.
    pub previous_digest: u32,
    /// Which part of a striped commit this is, from 0.
    pub part: u16,
    /// The parts of the commit; 1 when it is not striped.
    pub parts: u16,
    /// [`PAYLOAD_SYNCED`], or 0.
    pub flags: u32,
}

/// The fixed part of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prelude {
    /// The segment's salt.
    pub salt: Salt,
    /// Where in the segment the frame begins.
    pub offset: u64,
    /// The commit's sequence number, from 1.
    pub seq: Seq,
    /// The frame's bytes: whole blocks.
    pub frame_len: u64,
    /// The bytes of the payload that follows the frame: whole blocks.
    pub payload_len: u64,
    /// Every commit up to this one, in whichever segment, was on the disk when this frame was written.
    pub synced_through: Seq,
    /// The digest of the segment's previous frame; 0 for its first.
    pub previous_digest: u32,
    /// Which part of a striped commit this is, from 0.
    pub part: u16,
    /// The parts of the commit; 1 when it is not striped.
    pub parts: u16,
    /// [`PAYLOAD_SYNCED`], or 0.
    pub flags: u32,
    /// The entries in the body.
    pub entry_count: u32,
    /// The bytes of the body.
    pub body_len: u64,
}

impl Prelude {
    /// Reads the prelude that a frame begins with, and judges its magic, its digest and whether its numbers can belong
    /// together; bytes after it are not looked at. Where no frame was ever written, the answer is
    /// [`FormatError::NotAlight`].
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let Some(bytes) = bytes.get(..PRELUDE_BYTES) else {
            return Err(FormatError::Damaged { what: "a frame that is cut short", offset: bytes.len() as u64 });
        };
        if MAGIC.get(bytes) != MAGIC_BYTES {
            return Err(FormatError::NotAlight { expected: "a commit frame" });
        }
        if DIGEST.read(bytes) != crc32(&bytes[..DIGEST.span().0]) {
            return Err(FormatError::Damaged { what: "a frame's prelude with a wrong checksum", offset: 0 });
        }
        let prelude = Self {
            salt: Salt(SALT.read(bytes)),
            offset: OFFSET.read(bytes),
            seq: Seq(SEQ.read(bytes)),
            frame_len: FRAME_LEN.read(bytes),
            payload_len: PAYLOAD_LEN.read(bytes),
            synced_through: Seq(SYNCED_THROUGH.read(bytes)),
            previous_digest: PREVIOUS_DIGEST.read(bytes),
            part: PART.read(bytes),
            parts: PARTS.read(bytes),
            flags: FLAGS.read(bytes),
            entry_count: ENTRY_COUNT.read(bytes),
            body_len: BODY_LEN.read(bytes),
        };
        prelude.judge().map_err(|refusal| refusal.found_at(0))?;
        Ok(prelude)
    }

    /// Whether the frame was written into this segment, at this place.
    pub fn belongs(&self, salt: Salt, offset: u64) -> bool {
        self.salt == salt && self.offset == offset
    }

    /// Where in the segment the payload begins.
    pub fn payload_offset(&self) -> u64 {
        self.offset + self.frame_len
    }

    /// Where in the segment the next frame begins.
    pub fn next_offset(&self) -> u64 {
        self.offset + self.frame_len + self.payload_len
    }

    /// Whether the payload was on the disk before the frame was written.
    pub fn payload_synced(&self) -> bool {
        self.flags & PAYLOAD_SYNCED != 0
    }

    /// What the writer decided.
    pub fn fields(&self) -> PreludeFields {
        PreludeFields {
            salt: self.salt,
            offset: self.offset,
            seq: self.seq,
            payload_len: self.payload_len,
            synced_through: self.synced_through,
            previous_digest: self.previous_digest,
            part: self.part,
            parts: self.parts,
            flags: self.flags,
        }
    }

    pub(super) fn around(fields: &PreludeFields, frame_len: u64, body_len: u64, entry_count: u32) -> Self {
        let PreludeFields { salt, offset, seq, payload_len, synced_through, previous_digest, part, parts, flags } =
            *fields;
        Self {
            salt,
            offset,
            seq,
            frame_len,
            payload_len,
            synced_through,
            previous_digest,
            part,
            parts,
            flags,
            entry_count,
            body_len,
        }
    }

    pub(super) fn encode(&self) -> [u8; PRELUDE_BYTES] {
        assert_eq!(self.judge(), Ok(()), "only a valid frame is written");
        let mut bytes = [0; PRELUDE_BYTES];
        MAGIC.set(&mut bytes, MAGIC_BYTES);
        SALT.write(&mut bytes, self.salt.0);
        OFFSET.write(&mut bytes, self.offset);
        SEQ.write(&mut bytes, self.seq.0);
        FRAME_LEN.write(&mut bytes, self.frame_len);
        PAYLOAD_LEN.write(&mut bytes, self.payload_len);
        SYNCED_THROUGH.write(&mut bytes, self.synced_through.0);
        BODY_LEN.write(&mut bytes, self.body_len);
        ENTRY_COUNT.write(&mut bytes, self.entry_count);
        FLAGS.write(&mut bytes, self.flags);
        PREVIOUS_DIGEST.write(&mut bytes, self.previous_digest);
        PART.write(&mut bytes, self.part);
        PARTS.write(&mut bytes, self.parts);
        let digest = crc32(&bytes[..DIGEST.span().0]);
        DIGEST.write(&mut bytes, digest);
        bytes
    }

    /// What both sides of the disk hold true of a prelude.
    fn judge(&self) -> Result<(), FormatError> {
        let place_is_possible = self.offset.is_multiple_of(BLOCK_BYTES) && self.offset >= SEGMENT_HEADER_BYTES as u64;
        require(place_is_possible, "a frame at a place where none can be")?;
        within("a frame's offset", self.offset, SEGMENT_BYTES_MAX)?;
        require(self.seq > Seq::ZERO, "a frame with the sequence number 0")?;
        require(self.synced_through < self.seq, "a frame that vouches for itself")?;
        require(self.part < self.parts, "a part beyond a commit's parts")?;
        require(self.flags & !FLAGS_KNOWN == 0, "a frame with unknown flags")?;
        within("a body's length", self.body_len, FRAME_BYTES_MAX)?;
        require(self.frame_len == frame_len(self.body_len), "a frame whose length is not that of its body")?;
        within("a frame's length", self.frame_len, FRAME_BYTES_MAX)?;
        within("the number of entries in one commit", u64::from(self.entry_count), ENTRIES_PER_COMMIT_MAX as u64)?;
        let body_bytes_min = COUNT_BYTES + u64::from(self.entry_count) * Entry::ENCODED_BYTES_MIN;
        require(self.body_len >= body_bytes_min, "a body too short for its entries")?;
        require(self.payload_len.is_multiple_of(BLOCK_BYTES), "a payload that is not whole blocks")?;
        within("a payload's length", self.payload_len, SEGMENT_BYTES_MAX)?;
        within("a commit's end", self.next_offset(), SEGMENT_BYTES_MAX)
    }
}

/// For tests: another payload length, with the prelude's digest made right again.
#[cfg(test)]
pub(super) fn change_payload_len(frame: &mut [u8], payload_len: u64) {
    PAYLOAD_LEN.write(frame, payload_len);
    let digest = crc32(&frame[..DIGEST.span().0]);
    DIGEST.write(frame, digest);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Prelude {
        Prelude {
            salt: Salt(1),
            offset: 4096,
            seq: Seq(9),
            frame_len: 4096,
            payload_len: 8192,
            synced_through: Seq(8),
            previous_digest: 3,
            part: 0,
            parts: 1,
            flags: 0,
            entry_count: 1,
            body_len: 200,
        }
    }

    #[test]
    fn a_prelude_comes_back_as_it_was_written() {
        assert_eq!(Prelude::decode(&sample().encode()), Ok(sample()));
    }

    #[test]
    fn numbers_that_cannot_belong_together_are_refused_on_both_sides() {
        let good = sample();
        for bad in [
            Prelude { offset: 0, ..good },
            Prelude { offset: 4097, ..good },
            Prelude { offset: u64::MAX - 4095, ..good },
            Prelude { seq: Seq(0), synced_through: Seq(0), ..good },
            Prelude { synced_through: Seq(9), ..good },
            Prelude { part: 1, ..good },
            Prelude { parts: 0, ..good },
            Prelude { flags: 2, ..good },
            Prelude { frame_len: 8192, ..good },
            Prelude { frame_len: 0, ..good },
            Prelude { body_len: u64::MAX, ..good },
            Prelude { body_len: 4096, ..good },
            Prelude { body_len: 70, ..good },
            Prelude { entry_count: u32::MAX, ..good },
            Prelude { entry_count: 4, ..good },
            Prelude { payload_len: 1, ..good },
            Prelude { payload_len: u64::MAX - 4095, ..good },
            Prelude { payload_len: 1 << 60, ..good },
        ] {
            assert!(bad.judge().is_err(), "{bad:?}");
            // What no encoder would write, resealed by hand.
            let mut bytes = good.encode();
            OFFSET.write(&mut bytes, bad.offset);
            SEQ.write(&mut bytes, bad.seq.0);
            SYNCED_THROUGH.write(&mut bytes, bad.synced_through.0);
            PART.write(&mut bytes, bad.part);
            PARTS.write(&mut bytes, bad.parts);
            FLAGS.write(&mut bytes, bad.flags);
            FRAME_LEN.write(&mut bytes, bad.frame_len);
            BODY_LEN.write(&mut bytes, bad.body_len);
            ENTRY_COUNT.write(&mut bytes, bad.entry_count);
            change_payload_len(&mut bytes, bad.payload_len);
            assert!(matches!(Prelude::decode(&bytes), Err(FormatError::Damaged { .. })), "{bad:?}");
        }
    }

    #[test]
    fn blocks_never_written_are_no_frame() {
        assert!(matches!(Prelude::decode(&[0; 4096]), Err(FormatError::NotAlight { .. })));
        assert!(matches!(Prelude::decode(&[0; 95]), Err(FormatError::Damaged { .. })));
    }
}
