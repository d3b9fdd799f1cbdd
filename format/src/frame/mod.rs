//! The commit frame: what one commit did, and where its payload lies.
//!
//! ```text
//! frame = [ prelude, 96 bytes ][ body ][ zeros ][ digest, 4 bytes ]     whole blocks
//! ```
//! The frame's digest is the CRC-32 of every byte before it; the next frame of the segment names it.
//!
//! # Invariants
//! - A body is encoded once, before the commit's place and sequence number are known ([`EncodedBody`]); the length of the
//!   frame is known from then on.
//! - What [`EncodedBody::new`] and [`EncodedBody::write_frame`] let through, [`Frame::decode`] accepts, and nothing else.

mod entry;
mod prelude;

pub use entry::{Entry, EntryKind};
pub use prelude::{PAYLOAD_SYNCED, PRELUDE_BYTES, Prelude, PreludeFields};

use crate::checksum::crc32;
use crate::codec;
use crate::error::{FormatError, require, within};
use crate::ids::Seq;
use crate::limits::{BLOCK_BYTES, ENTRIES_PER_COMMIT_MAX, FRAME_BYTES_MAX};
use crate::zeros::is_zero;

/// The bytes of a frame's digest, which ends it.
const DIGEST_BYTES: usize = 4;

/// The bytes of the count that begins a body.
const COUNT_BYTES: u64 = 8;

/// The length of the frame around a body of this length.
const fn frame_len(body_len: u64) -> u64 {
    (PRELUDE_BYTES as u64 + body_len + DIGEST_BYTES as u64).next_multiple_of(BLOCK_BYTES)
}

/// The entries of a commit as bytes, waiting for a place and a sequence number.
#[derive(Clone, PartialEq, Eq)]
pub struct EncodedBody {
    bytes: Vec<u8>,
    entry_count: u32,
    /// Where the last payload byte that a put names ends, relative to the payload's first.
    payload_end: u64,
    /// The highest number of a commit whose entry is repeated.
    origin_max: Seq,
}

impl std::fmt::Debug for EncodedBody {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "EncodedBody {{ entries: {}, bytes: {} }}", self.entry_count, self.bytes.len())
    }
}

impl EncodedBody {
    /// Encodes the entries of one commit. Refuses what no reader would accept: an entry over a limit, or one that contradicts
    /// itself. Where two entries have one key, the later one stands.
    pub fn new(entries: &[Entry]) -> Result<Self, FormatError> {
        within("the number of entries in one commit", entries.len() as u64, ENTRIES_PER_COMMIT_MAX as u64)?;
        let mut len = COUNT_BYTES;
        let mut payload_end = 0;
        judge_origins(entries)?;
        let origin_max = entries.iter().map(|entry| entry.origin).fold(Seq::ZERO, Seq::max);
        for entry in entries {
            entry.judge()?;
            len += entry.encoded_len();
            within("the length of a commit's frame", frame_len(len), FRAME_BYTES_MAX)?;
            payload_end = payload_end.max(entry.payload_end());
        }
        let len = usize::try_from(len).expect("a frame's limit is below any address space's");
        let entry_count = u32::try_from(entries.len()).expect("the number of entries was judged");
        Ok(Self { bytes: codec::encode(&entries, len), entry_count, payload_end, origin_max })
    }

    /// The length of the frame that [`write_frame`](Self::write_frame) writes: whole blocks.
    pub fn frame_len(&self) -> u64 {
        frame_len(self.bytes.len() as u64)
    }

    /// Writes the frame into `out`, all of it, and returns the frame's digest.
    ///
    /// # Panics
    /// When `out` is not exactly [`frame_len`](Self::frame_len) bytes, or `fields` are none that a reader would accept, or
    /// an entry reaches past the payload: our own mistakes, each of which would write a commit that cannot be read.
    pub fn write_frame(&self, fields: &PreludeFields, out: &mut [u8]) -> u32 {
        assert_eq!(out.len() as u64, self.frame_len(), "a frame fills its place");
        assert!(self.payload_end <= fields.payload_len, "every extent lies inside the payload");
        assert!(self.origin_max < fields.seq, "only what was committed before is repeated");
        let prelude = Prelude::around(fields, self.frame_len(), self.bytes.len() as u64, self.entry_count);
        let body_end = PRELUDE_BYTES + self.bytes.len();
        let digest_at = out.len() - DIGEST_BYTES;
        out[..PRELUDE_BYTES].copy_from_slice(&prelude.encode());
        out[PRELUDE_BYTES..body_end].copy_from_slice(&self.bytes);
        out[body_end..digest_at].fill(0);
        let digest = crc32(&out[..digest_at]);
        out[digest_at..].copy_from_slice(&digest.to_le_bytes());
        digest
    }
}

/// One commit, read back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// The fixed part.
    pub prelude: Prelude,
    /// What the commit did, in order.
    pub entries: Vec<Entry>,
    /// The frame's CRC-32, which the segment's next frame names.
    pub digest: u32,
}

impl Frame {
    /// Reads a frame from exactly its own bytes ([`Prelude::frame_len`] says how many), and judges everything in it but the
    /// payload, which lies elsewhere. Whether the frame belongs where it was found is [`Prelude::belongs`]'s to say.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let prelude = Prelude::decode(bytes)?;
        if bytes.len() as u64 != prelude.frame_len {
            return Err(FormatError::Damaged { what: "a frame of another length than it says", offset: 0 });
        }
        let digest_at = bytes.len() - DIGEST_BYTES;
        let digest = crc32(&bytes[..digest_at]);
        if bytes[digest_at..] != digest.to_le_bytes() {
            return Err(FormatError::Damaged { what: "a frame with a wrong checksum", offset: 0 });
        }
        let body_len = usize::try_from(prelude.body_len).expect("a body is shorter than the frame in memory");
        let (body, padding) = bytes[PRELUDE_BYTES..digest_at].split_at(body_len);
        if !is_zero(padding) {
            let offset = (PRELUDE_BYTES + body_len) as u64;
            return Err(FormatError::Damaged { what: "a frame's padding that is not zero", offset });
        }
        let entries = decode_body(body, &prelude).map_err(|refusal| refusal.found_at(PRELUDE_BYTES as u64))?;
        Ok(Self { prelude, entries, digest })
    }
}

fn decode_body(body: &[u8], prelude: &Prelude) -> Result<Vec<Entry>, FormatError> {
    let invalid = |what| FormatError::Invalid { what };
    // The count is judged before the entries are read, so that they are reserved for at most once.
    if body[..8] != u64::from(prelude.entry_count).to_le_bytes() {
        return Err(invalid("a commit's body that counts other entries than its prelude"));
    }
    let entries: Vec<Entry> =
        codec::decode(body).map_err(|codec::Undecodable| invalid("a commit's body that does not decode"))?;
    judge_origins(&entries)?;
    for entry in &entries {
        entry.judge()?;
        if entry.origin >= prelude.seq {
            return Err(invalid("an entry that repeats one of a later commit"));
        }
        if entry.payload_end() > prelude.payload_len {
            return Err(invalid("an extent outside its commit's payload"));
        }
    }
    Ok(entries)
}

/// A commit is compaction's own, with nothing but what it repeats, or repeats nothing.
fn judge_origins(entries: &[Entry]) -> Result<(), FormatError> {
    let repeated = entries.iter().filter(|entry| entry.origin != Seq::ZERO).count();
    require(repeated == 0 || repeated == entries.len(), "a commit that repeats some entries and makes others")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::Salt;
    use crate::{Dtype, limits};

    fn put(key: &[u8], offset: u64, length: u64) -> Entry {
        Entry { offset, crc: 7, ..Entry::put(key, Dtype::U8, &[length]) }
    }

    fn fields() -> PreludeFields {
        PreludeFields {
            salt: Salt(77),
            offset: 8192,
            seq: Seq(5),
            payload_len: 3 * 4096,
            synced_through: Seq(4),
            previous_digest: 99,
            part: 0,
            parts: 1,
            flags: PAYLOAD_SYNCED,
        }
    }

    fn framed(entries: &[Entry]) -> Vec<u8> {
        let body = EncodedBody::new(entries).unwrap();
        let mut bytes = vec![0xaa; body.frame_len() as usize];
        body.write_frame(&fields(), &mut bytes);
        bytes
    }

    fn reseal(bytes: &mut [u8]) {
        let at = bytes.len() - 4;
        let digest = crc32(&bytes[..at]);
        bytes[at..].copy_from_slice(&digest.to_le_bytes());
    }

    #[test]
    fn a_commit_comes_back_as_it_was_written() {
        let attributes = vec![("step".to_owned(), b"100".to_vec()), (String::new(), vec![])];
        let entries = [
            Entry { attributes, ..put(b"a", 0, 5) },
            Entry { chunk_crcs: vec![], ..Entry::put(b"scalar", Dtype::F32, &[]) },
            Entry::delete(b"b"),
            Entry { segment: 3, offset: 12288, frame_offset: 4096, crc: 1, ..Entry::alias(b"c", Dtype::BF16, &[2, 3]) },
        ];
        let bytes = framed(&entries);
        assert_eq!(bytes.len(), 4096);
        let frame = Frame::decode(&bytes).unwrap();
        assert_eq!(frame.entries, entries);
        assert_eq!(frame.digest.to_le_bytes(), bytes[4092..]);
        assert_eq!(frame.prelude.fields(), fields());
        assert_eq!(frame.prelude.next_offset(), 8192 + 4096 + 3 * 4096);
        assert!(frame.prelude.belongs(Salt(77), 8192));
        assert!(!frame.prelude.belongs(Salt(77), 4096) && !frame.prelude.belongs(Salt(78), 8192));
    }

    #[test]
    fn the_length_counted_is_the_length_written_for_every_part_of_an_entry() {
        let length = 3 * limits::CHUNK_BYTES + 1;
        let entry = Entry {
            attributes: vec![("name".into(), vec![1; 100]), ("x".into(), vec![])],
            chunk_crcs: vec![1, 2, 3, 4],
            ..Entry::put(&[3; 1024], Dtype::U8, &[length])
        };
        // `codec::encode` asserts it.
        EncodedBody::new(&[entry.clone(), Entry::delete(b"k"), entry]).unwrap();
    }

    #[test]
    fn a_commit_of_compaction_comes_back_with_what_it_repeats() {
        let entries = [Entry { origin: Seq(2), ..put(b"a", 0, 5) }, Entry { origin: Seq(4), ..Entry::delete(b"b") }];
        let frame = Frame::decode(&framed(&entries)).unwrap();
        assert_eq!(frame.entries, entries);
        assert_eq!(frame.entries[0].counts_from(Seq(5)), Seq(2));
        assert_eq!(put(b"a", 0, 5).counts_from(Seq(5)), Seq(5));
    }

    #[test]
    fn repeated_entries_and_new_ones_are_not_mixed_and_come_from_earlier_commits() {
        let repeated = Entry { origin: Seq(2), ..put(b"a", 0, 5) };
        assert!(EncodedBody::new(&[repeated.clone(), put(b"b", 0, 5)]).is_err());
        let alias = Entry { segment: 3, offset: 12288, frame_offset: 4096, ..Entry::alias(b"c", Dtype::U8, &[2]) };
        assert!(EncodedBody::new(&[Entry { origin: Seq(2), ..alias }]).is_err());
        // What no encoder would write, resealed by hand: the origin is the last number of the body.
        let body_end = PRELUDE_BYTES + EncodedBody::new(std::slice::from_ref(&repeated)).unwrap().bytes.len();
        let mut bytes = framed(&[repeated]);
        bytes[body_end - 8] = 5;
        reseal(&mut bytes);
        let error = Frame::decode(&bytes).unwrap_err();
        assert_eq!(error, FormatError::Damaged { what: "an entry that repeats one of a later commit", offset: 96 });
    }

    #[test]
    fn an_empty_commit_is_a_commit() {
        assert_eq!(Frame::decode(&framed(&[])).unwrap().entries, []);
    }

    #[test]
    fn a_body_spills_into_the_next_block_at_the_last_byte() {
        let longest = |bytes: usize| {
            let entry = Entry { attributes: vec![(String::new(), vec![1; bytes])], ..put(b"k", 0, 1) };
            EncodedBody::new(&[entry]).unwrap()
        };
        let fixed = longest(0).bytes.len();
        let room = 4096 - PRELUDE_BYTES - 4 - fixed;
        assert_eq!(longest(room).frame_len(), 4096);
        assert_eq!(longest(room + 1).frame_len(), 8192);
        for body in [longest(room), longest(room + 1)] {
            let mut bytes = vec![0; body.frame_len() as usize];
            body.write_frame(&fields(), &mut bytes);
            Frame::decode(&bytes).unwrap();
        }
    }

    #[test]
    #[should_panic(expected = "inside the payload")]
    fn an_extent_past_the_payload_is_never_written() {
        framed(&[put(b"k", 2 * 4096, 8192)]);
    }

    #[test]
    fn an_extent_past_the_payload_is_refused_though_the_checksum_holds() {
        let mut bytes = framed(&[put(b"k", 4096, 8192)]);
        prelude::change_payload_len(&mut bytes, 2 * 4096);
        reseal(&mut bytes);
        let error = Frame::decode(&bytes).unwrap_err();
        assert_eq!(error, FormatError::Damaged { what: "an extent outside its commit's payload", offset: 96 });
    }

    #[test]
    fn a_body_that_lies_about_its_counts_is_refused() {
        let whole = framed(&[put(b"key", 0, 5)]);
        for (at, value) in [(96, 2u8), (96 + 7, 0x40), (104, 200), (104 + 6, 1), (104 + 8 + 3, 9)] {
            let mut bytes = whole.clone();
            bytes[at] = value;
            reseal(&mut bytes);
            assert!(matches!(Frame::decode(&bytes), Err(FormatError::Damaged { .. })), "byte {at}");
        }
    }

    #[test]
    fn padding_is_zero() {
        let mut bytes = framed(&[put(b"key", 0, 5)]);
        bytes[4000] = 1;
        reseal(&mut bytes);
        assert!(matches!(Frame::decode(&bytes), Err(FormatError::Damaged { .. })));
    }
}
