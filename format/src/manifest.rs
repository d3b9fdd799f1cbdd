//! The manifest: the whole state of a store, in one file that is replaced atomically.
//!
//! ```text
//! manifest = [ head, 64 bytes ][ body ][ digest, 4 bytes ]
//! ```
//! The head's layout is the same in every version, so that any alight can say of any store why it cannot open it. The digest
//! is the CRC-32 of every byte before it.

use serde::{Deserialize, Serialize};

use crate::checksum::crc32;
use crate::codec;
use crate::error::{FormatError, require, within};
use crate::ids::{RunId, Salt, SegmentId, Seq, StoreId};
use crate::layout::{Field, tiles};
use crate::limits::{BLOCK_BYTES, FORMAT_VERSION, MANIFEST_BYTES_MAX, RUNS_MAX, SEGMENT_BYTES_MAX, SEGMENTS_MAX};

/// The length of a manifest's head.
const HEAD_BYTES: usize = 64;

/// The length of the digest that ends a manifest.
const DIGEST_BYTES: usize = 4;

const MAGIC_BYTES: [u8; 8] = *b"ALIGHTmf";

const MAGIC: Field<8> = Field::at(0);
const VERSION: Field<4> = Field::at(8);
const RESERVED: Field<4> = Field::at(12);
const COMPATIBLE: Field<8> = Field::at(16);
const READ_ONLY_COMPATIBLE: Field<8> = Field::at(24);
const INCOMPATIBLE: Field<8> = Field::at(32);
const BODY_LEN: Field<8> = Field::at(40);
const GENERATION: Field<8> = Field::at(48);
const RESERVED_END: Field<4> = Field::at(56);
const HEAD_DIGEST: Field<4> = Field::at(60);

const _: () = assert!(tiles(
    &[
        MAGIC.span(),
        VERSION.span(),
        RESERVED.span(),
        COMPATIBLE.span(),
        READ_ONLY_COMPATIBLE.span(),
        INCOMPATIBLE.span(),
        BODY_LEN.span(),
        GENERATION.span(),
        RESERVED_END.span(),
        HEAD_DIGEST.span(),
    ],
    0,
    HEAD_BYTES
));

/// Features that a store uses, by how much a reader must know of them. No bit has a meaning yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FeatureFlags {
    /// A reader or writer that does not know one may go on, and keeps it.
    pub compatible: u64,
    /// A reader that does not know one may read, and must not write.
    pub read_only_compatible: u64,
    /// A reader that does not know one must refuse the store.
    pub incompatible: u64,
}

impl FeatureFlags {
    /// The read-only-compatible features that this build knows.
    pub const READ_ONLY_KNOWN: u64 = 0;
    /// The incompatible features that this build knows.
    pub const INCOMPATIBLE_KNOWN: u64 = 0;

    /// Whether the store uses a feature that this build must not write beside: it may be opened for reading only.
    pub fn unknown_read_only(&self) -> bool {
        self.read_only_compatible & !Self::READ_ONLY_KNOWN != 0
    }
}

/// The whole state of a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// The format's version that it was written in.
    pub version: u32,
    /// The features that the store uses.
    pub flags: FeatureFlags,
    /// Which store this is.
    pub store: StoreId,
    /// How often the manifest was replaced; the higher of two is the newer.
    pub generation: u64,
    /// The index runs hold every commit up to this one.
    pub covered: Seq,
    /// The number that the next new segment gets.
    pub next_segment: SegmentId,
    /// The number that the next new index run gets.
    pub next_run: RunId,
    /// The segments, in rising order of their numbers.
    pub segments: Vec<SegmentRecord>,
    /// The index runs, the one with the newest commits first.
    pub runs: Vec<RunRecord>,
    /// The length at which a segment is full.
    pub segment_bytes: u64,
}

/// What the manifest knows of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SegmentRecord {
    /// Its number.
    pub id: SegmentId,
    /// Its salt.
    pub salt: Salt,
    /// The frames before this offset are covered by the runs; a frame begins here, or none does yet.
    pub end: u64,
    /// The digest of the last frame before `end`; 0 when there is none.
    pub previous_digest: u32,
    /// Whether nothing is appended to it any more and all its frames lie before `end`. What lies behind the end of a sealed
    /// segment is no part of the store: a torn tail that a recovery has cut.
    pub sealed: bool,
    /// The bytes of the blobs in it that are live.
    pub live_bytes: u64,
    /// The bytes of all blobs that were written to it.
    pub blob_bytes: u64,
    /// The keys that lead to a blob in it; a blob may have no bytes.
    pub live_values: u64,
    /// The room that live blobs take: each one's bytes, rounded up to what its place is a multiple of.
    pub live_room: u64,
    /// The puts in its frames.
    pub values: u64,
    /// As of which commit the oldest put in it counts; 0 when there is none.
    pub oldest_put: Seq,
    /// As of which commit the newest delete in it counts; 0 when there is none.
    pub newest_delete: Seq,
}

/// What the manifest knows of an index run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunRecord {
    /// Its number.
    pub id: RunId,
    /// Its entries.
    pub entries: u64,
    /// The length of its file.
    pub bytes: u64,
    /// The CRC-32 that its header ends with.
    pub header_crc: u32,
}

/// The bytes of one encoded [`SegmentRecord`].
const SEGMENT_RECORD_BYTES: usize = 8 + 8 + 8 + 4 + 1 + 8 + 8 + 8 + 8 + 8 + 8 + 8;
/// The bytes of one encoded [`RunRecord`].
const RUN_RECORD_BYTES: usize = 8 + 8 + 8 + 4;
/// The bytes of an encoded body without any record.
const BODY_BYTES_MIN: usize = 16 + 8 + 8 + 8 + 8 + 8 + 8;

// The two limits that a writer can reach make a manifest that a reader accepts.
const _: () = assert!(
    (HEAD_BYTES + BODY_BYTES_MIN + SEGMENTS_MAX * SEGMENT_RECORD_BYTES + RUNS_MAX * RUN_RECORD_BYTES + DIGEST_BYTES)
        as u64
        <= MANIFEST_BYTES_MAX
);

/// The variable part, in the order of the bytes.
#[derive(Serialize, Deserialize)]
struct Body {
    store: StoreId,
    covered: Seq,
    next_segment: SegmentId,
    next_run: RunId,
    segment_bytes: u64,
    segments: Vec<SegmentRecord>,
    runs: Vec<RunRecord>,
}

impl Manifest {
    /// A new store's first manifest: no segments, no runs, in this version.
    pub fn new(store: StoreId, segment_bytes: u64) -> Self {
        Self {
            version: FORMAT_VERSION,
            flags: FeatureFlags::default(),
            store,
            generation: 1,
            covered: Seq::ZERO,
            next_segment: SegmentId(1),
            next_run: RunId(1),
            segments: Vec::new(),
            runs: Vec::new(),
            segment_bytes,
        }
    }

    /// The manifest's bytes: a whole file. Refuses what [`decode`](Self::decode) would refuse.
    pub fn encode(&self) -> Result<Vec<u8>, FormatError> {
        self.judge()?;
        let body = Body {
            store: self.store,
            covered: self.covered,
            next_segment: self.next_segment,
            next_run: self.next_run,
            segment_bytes: self.segment_bytes,
            segments: self.segments.clone(),
            runs: self.runs.clone(),
        };
        let body_len = BODY_BYTES_MIN + SEGMENT_RECORD_BYTES * self.segments.len() + RUN_RECORD_BYTES * self.runs.len();
        let mut head = [0; HEAD_BYTES];
        MAGIC.set(&mut head, MAGIC_BYTES);
        VERSION.write(&mut head, self.version);
        COMPATIBLE.write(&mut head, self.flags.compatible);
        READ_ONLY_COMPATIBLE.write(&mut head, self.flags.read_only_compatible);
        INCOMPATIBLE.write(&mut head, self.flags.incompatible);
        BODY_LEN.write(&mut head, body_len as u64);
        GENERATION.write(&mut head, self.generation);
        let head_digest = crc32(&head[..HEAD_DIGEST.span().0]);
        HEAD_DIGEST.write(&mut head, head_digest);

        let mut bytes = Vec::with_capacity(HEAD_BYTES + body_len + DIGEST_BYTES);
        bytes.extend_from_slice(&head);
        bytes.extend_from_slice(&codec::encode(&body, body_len));
        let digest = crc32(&bytes);
        bytes.extend_from_slice(&digest.to_le_bytes());
        Ok(bytes)
    }

    /// The manifest that a whole file holds. Features and versions that this build cannot read are told apart from damage.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let damaged = |what, offset: usize| FormatError::Damaged { what, offset: offset as u64 };
        let Some(head) = bytes.get(..HEAD_BYTES) else {
            return Err(damaged("a manifest that is cut short", bytes.len()));
        };
        if MAGIC.get(head) != MAGIC_BYTES {
            return Err(FormatError::NotAlight { expected: "a manifest" });
        }
        if HEAD_DIGEST.read(head) != crc32(&head[..HEAD_DIGEST.span().0]) {
            return Err(damaged("a manifest's head with a wrong checksum", 0));
        }
        let version = VERSION.read(head);
        judge_version(version)?;
        let flags = FeatureFlags {
            compatible: COMPATIBLE.read(head),
            read_only_compatible: READ_ONLY_COMPATIBLE.read(head),
            incompatible: INCOMPATIBLE.read(head),
        };
        judge_flags(flags)?;
        let body_bytes_max = MANIFEST_BYTES_MAX - (HEAD_BYTES + DIGEST_BYTES) as u64;
        let body_len = usize::try_from(BODY_LEN.read(head)).ok().filter(|len| *len as u64 <= body_bytes_max);
        let body_len = body_len.ok_or_else(|| damaged("a manifest's length over the limit", BODY_LEN.span().0))?;
        if bytes.len() != HEAD_BYTES + body_len + DIGEST_BYTES {
            return Err(damaged("a manifest of another length than it says", 0));
        }
        let (covered, digest) = bytes.split_at(HEAD_BYTES + body_len);
        if digest != crc32(covered).to_le_bytes() {
            return Err(damaged("a manifest with a wrong checksum", 0));
        }
        let body: Body = codec::decode(&covered[HEAD_BYTES..])
            .map_err(|codec::Undecodable| damaged("a manifest's body that does not decode", HEAD_BYTES))?;
        let manifest = Self {
            version,
            flags,
            store: body.store,
            generation: GENERATION.read(head),
            covered: body.covered,
            next_segment: body.next_segment,
            next_run: body.next_run,
            segments: body.segments,
            runs: body.runs,
            segment_bytes: body.segment_bytes,
        };
        manifest.judge().map_err(|refusal| refusal.found_at(HEAD_BYTES as u64))?;
        Ok(manifest)
    }

    /// What both sides of the disk hold true of a manifest.
    fn judge(&self) -> Result<(), FormatError> {
        judge_version(self.version)?;
        judge_flags(self.flags)?;
        within("the length of a segment", self.segment_bytes, SEGMENT_BYTES_MAX)?;
        within("the number of segments", self.segments.len() as u64, SEGMENTS_MAX as u64)?;
        within("the number of index runs", self.runs.len() as u64, RUNS_MAX as u64)?;

        let mut last = SegmentId(0);
        for segment in &self.segments {
            require(segment.id > last, "segments that are not in rising order")?;
            last = segment.id;
            let end_is_possible = segment.end.is_multiple_of(BLOCK_BYTES) && segment.end >= BLOCK_BYTES;
            require(end_is_possible, "a segment's end where no frame can end")?;
            within("a segment's end", segment.end, SEGMENT_BYTES_MAX)?;
            let digest_is_possible = segment.end > BLOCK_BYTES || segment.previous_digest == 0;
            require(digest_is_possible, "a segment without frames that names the digest of one")?;
            require(segment.live_values <= segment.values, "a segment with more values alive than were put")?;
            require(segment.live_bytes <= segment.blob_bytes, "a segment with more bytes alive than were put")?;
            require(
                segment.live_bytes <= segment.live_room,
                "a segment whose live bytes take less room than they are",
            )?;
        }
        require(last < self.next_segment, "a segment with a number not yet given")?;

        let mut runs: Vec<RunId> = self.runs.iter().map(|run| run.id).collect();
        runs.sort_unstable();
        require(runs.is_sorted_by(|a, b| a < b), "an index run named twice")?;
        require(runs.first().is_none_or(|first| first.0 != 0), "an index run with the number 0")?;
        require(runs.last().is_none_or(|last| *last < self.next_run), "an index run with a number not yet given")
    }
}

fn judge_version(version: u32) -> Result<(), FormatError> {
    if version > FORMAT_VERSION {
        return Err(FormatError::NewerVersion { found: version, known: FORMAT_VERSION });
    }
    if version == 0 {
        return Err(FormatError::Damaged { what: "a manifest of version 0", offset: VERSION.offset() });
    }
    Ok(())
}

fn judge_flags(flags: FeatureFlags) -> Result<(), FormatError> {
    match flags.incompatible & !FeatureFlags::INCOMPATIBLE_KNOWN {
        0 => Ok(()),
        flags => Err(FormatError::UnknownIncompatible { flags }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(id: u64) -> SegmentRecord {
        SegmentRecord {
            id: SegmentId(id),
            salt: Salt(id * 3),
            end: 8192,
            previous_digest: 5,
            sealed: id.is_multiple_of(2),
            live_bytes: 100,
            blob_bytes: 200,
            live_values: 3,
            live_room: 768,
            values: 4,
            oldest_put: Seq(7),
            newest_delete: Seq(70),
        }
    }

    fn run(id: u64) -> RunRecord {
        RunRecord { id: RunId(id), entries: 3, bytes: 16384, header_crc: 1 }
    }

    fn sample() -> Manifest {
        Manifest {
            generation: 12,
            covered: Seq(77),
            next_segment: SegmentId(10),
            next_run: RunId(8),
            segments: vec![segment(2), segment(3), segment(9)],
            runs: vec![run(7), run(2), run(5)],
            ..Manifest::new(StoreId([3; 16]), 1 << 30)
        }
    }

    fn change_head(bytes: &mut [u8], change: impl FnOnce(&mut [u8])) {
        change(bytes);
        let digest = crc32(&bytes[..60]);
        HEAD_DIGEST.write(bytes, digest);
    }

    fn reseal(bytes: &mut [u8]) {
        let at = bytes.len() - 4;
        let digest = crc32(&bytes[..at]);
        bytes[at..].copy_from_slice(&digest.to_le_bytes());
    }

    #[test]
    fn a_manifest_comes_back_as_it_was_written() {
        for manifest in [sample(), Manifest::new(StoreId([0; 16]), 4096)] {
            assert_eq!(Manifest::decode(&manifest.encode().unwrap()), Ok(manifest));
        }
    }

    #[test]
    fn forty_thousand_segments_fit() {
        // Miri takes minutes for as many.
        let count = if cfg!(miri) { 400 } else { 40_000 };
        let segments: Vec<_> = (1..=count).map(segment).collect();
        let manifest = Manifest { segments, next_segment: SegmentId(count + 1), ..sample() };
        assert_eq!(Manifest::decode(&manifest.encode().unwrap()), Ok(manifest));
    }

    #[test]
    fn a_newer_version_and_unknown_features_are_told_apart_from_damage() {
        // Neither the rest of the bytes nor their digest is looked at: a newer version may have changed them.
        let mut bytes = sample().encode().unwrap();
        change_head(&mut bytes, |head| VERSION.write(head, 2));
        assert_eq!(Manifest::decode(&bytes), Err(FormatError::NewerVersion { found: 2, known: FORMAT_VERSION }));
        let mut bytes = sample().encode().unwrap();
        change_head(&mut bytes, |head| INCOMPATIBLE.write(head, 0b101));
        assert_eq!(Manifest::decode(&bytes), Err(FormatError::UnknownIncompatible { flags: 0b101 }));
    }

    #[test]
    fn compatible_features_are_kept_and_read_only_ones_are_told() {
        let flags = FeatureFlags { compatible: 1 << 63, read_only_compatible: 0, incompatible: 0 };
        let read = Manifest::decode(&Manifest { flags, ..sample() }.encode().unwrap()).unwrap();
        assert_eq!(read.flags, flags);
        assert!(!read.flags.unknown_read_only());
        assert!(FeatureFlags { read_only_compatible: 4, ..flags }.unknown_read_only());
    }

    #[test]
    fn what_contradicts_itself_is_refused_on_both_sides() {
        let twice = vec![run(7), run(2), run(7)];
        for bad in [
            Manifest { version: 0, ..sample() },
            Manifest { version: 2, ..sample() },
            Manifest { flags: FeatureFlags { incompatible: 1, ..Default::default() }, ..sample() },
            Manifest { segments: vec![segment(3), segment(2)], ..sample() },
            Manifest { segments: vec![segment(3), segment(3)], ..sample() },
            Manifest { segments: vec![segment(0)], ..sample() },
            Manifest { segments: vec![segment(10)], ..sample() },
            Manifest { segments: vec![SegmentRecord { end: 0, ..segment(1) }], ..sample() },
            Manifest { segments: vec![SegmentRecord { end: 5000, ..segment(1) }], ..sample() },
            Manifest { segments: vec![SegmentRecord { end: u64::MAX - 4095, ..segment(1) }], ..sample() },
            Manifest { segments: vec![SegmentRecord { end: 4096, ..segment(1) }], ..sample() },
            Manifest { runs: twice, ..sample() },
            Manifest { runs: vec![run(0)], ..sample() },
            Manifest { runs: vec![run(8)], ..sample() },
            Manifest { segment_bytes: u64::MAX, ..sample() },
        ] {
            assert!(bad.encode().is_err(), "{bad:?}");
        }
        // The second segment's number, changed to the first's: what an encoder refuses, a decoder finds.
        let mut bytes = sample().encode().unwrap();
        let at = HEAD_BYTES + BODY_BYTES_MIN - 8 + SEGMENT_RECORD_BYTES;
        assert_eq!(bytes[at], 3);
        bytes[at] = 2;
        reseal(&mut bytes);
        let what = "segments that are not in rising order";
        assert_eq!(Manifest::decode(&bytes), Err(FormatError::Damaged { what, offset: 64 }));
    }

    #[test]
    fn a_count_beyond_the_bytes_is_refused() {
        let mut bytes = sample().encode().unwrap();
        let at = HEAD_BYTES + BODY_BYTES_MIN - 16;
        assert_eq!(bytes[at], 3);
        bytes[at..at + 8].copy_from_slice(&(1u64 << 61).to_le_bytes());
        reseal(&mut bytes);
        assert!(matches!(Manifest::decode(&bytes), Err(FormatError::Damaged { offset: 64, .. })));
    }

    #[test]
    fn a_length_beyond_the_limit_is_refused_before_anything_is_read() {
        let mut bytes = sample().encode().unwrap();
        change_head(&mut bytes, |head| BODY_LEN.write(head, u64::MAX - 67));
        assert!(matches!(Manifest::decode(&bytes), Err(FormatError::Damaged { .. })));
        let whole = sample().encode().unwrap();
        for cut in [0, 63, 64, whole.len() - 1] {
            assert!(matches!(Manifest::decode(&whole[..cut]), Err(FormatError::Damaged { .. })), "cut at {cut}");
        }
        assert!(Manifest::decode(&[whole, vec![0]].concat()).is_err());
    }
}
