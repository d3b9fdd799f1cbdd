//! Whatever an encoder accepts comes back as it was.

mod common;

use alight_format::{
    Dtype, EncodedBody, Entry, EntryKind, FeatureFlags, Frame, Manifest, PAYLOAD_SYNCED, PreludeFields, RunId,
    RunRecord, Salt, SegmentHeader, SegmentId, SegmentRecord, Seq, StoreId, limits,
};
use common::few;
use proptest::collection::vec;
use proptest::prelude::*;

fn dtype() -> impl Strategy<Value = Dtype> {
    (0..Dtype::all().count()).prop_map(|at| Dtype::all().nth(at).unwrap())
}

/// A dtype and a shape that make whole bytes: the last dimension is a multiple of 4, which 4 and 6 bits need.
fn tensor() -> impl Strategy<Value = (Dtype, Vec<u64>)> {
    // Natively, of up to some gigabytes: the checksums of the chunks of one alone would keep Miri busy for minutes.
    (dtype(), vec(0u64..few(50, 3), 0..4), 0u64..few(60_000, 30_000)).prop_map(|(dtype, mut shape, last)| {
        if dtype.bits() < 8 || !shape.is_empty() {
            shape.push(last * 4);
        }
        (dtype, shape)
    })
}

fn attributes() -> impl Strategy<Value = Vec<(String, Vec<u8>)>> {
    vec((".{0,8}", vec(any::<u8>(), 0..20)), 0..4)
}

fn some_entry() -> impl Strategy<Value = Entry> {
    let key = vec(any::<u8>(), 1..=limits::KEY_BYTES_MAX.min(80));
    (key, 0u8..3, tensor(), attributes(), any::<u32>(), 0u64..1000, 1u64..9).prop_map(
        |(key, kind, (dtype, shape), attributes, crc, place, segment)| {
            let put = Entry { attributes, crc, ..Entry::put(&key, dtype, &shape) };
            let chunk_crcs: Vec<u32> = (0..limits::chunk_count(put.length)).map(|chunk| chunk as u32 ^ crc).collect();
            match kind {
                0 => Entry { offset: place * limits::blob_align_bytes(put.length), chunk_crcs, ..put },
                1 => Entry::delete(&key),
                _ => {
                    let frame_offset = (1 + place) * limits::BLOCK_BYTES;
                    let offset = frame_offset + limits::BLOCK_BYTES;
                    let chunk_crcs = if place % 2 == 0 { chunk_crcs } else { vec![] };
                    Entry { kind: EntryKind::Alias, segment, frame_offset, offset, chunk_crcs, ..put }
                }
            }
        },
    )
}

fn fields(payload_len: u64) -> impl Strategy<Value = PreludeFields> {
    (any::<u64>(), 1u64..1 << 40, 31..=u64::MAX, any::<u64>(), any::<u32>(), 1u16.., any::<u16>(), any::<bool>())
        .prop_map(move |(salt, block, seq, synced, previous_digest, parts, part, payload_synced)| PreludeFields {
            salt: Salt(salt),
            offset: block * limits::BLOCK_BYTES,
            seq: Seq(seq),
            payload_len,
            synced_through: Seq(synced % seq),
            previous_digest,
            part: part % parts,
            parts,
            flags: if payload_synced { PAYLOAD_SYNCED } else { 0 },
        })
}

fn commit() -> impl Strategy<Value = (Vec<Entry>, PreludeFields)> {
    (vec(some_entry(), 0..few(30, 8)), any::<bool>()).prop_flat_map(|(mut entries, repeats)| {
        if repeats {
            entries.retain(|entry| entry.kind != EntryKind::Alias);
            entries.iter_mut().zip(1..).for_each(|(entry, origin)| entry.origin = Seq(origin));
        }
        let puts = entries.iter().filter(|entry| entry.kind == EntryKind::Put);
        let end = puts.map(|entry| entry.offset + entry.length).max().unwrap_or(0);
        (Just(entries), fields(end.next_multiple_of(limits::BLOCK_BYTES)))
    })
}

fn some_manifest() -> impl Strategy<Value = Manifest> {
    let segment = (any::<u64>(), 1u64..1 << 40, any::<u32>(), any::<bool>(), any::<[u64; 4]>(), any::<[u64; 2]>());
    let segments = proptest::collection::btree_map(1u64..1000, segment, 0..few(40, 8));
    let runs = proptest::collection::btree_map(1u64..1000, (any::<u64>(), any::<u64>(), any::<u32>()), 0..10);
    (any::<[u8; 16]>(), any::<[u64; 4]>(), segments, runs, 0..=limits::SEGMENT_BYTES_MAX).prop_map(
        |(store, [compatible, read_only_compatible, generation, covered], segments, runs, segment_bytes)| Manifest {
            flags: FeatureFlags { compatible, read_only_compatible, incompatible: 0 },
            generation,
            covered: Seq(covered),
            next_segment: SegmentId(segments.keys().max().map_or(1, |last| last + 1)),
            next_run: RunId(runs.keys().max().map_or(1, |last| last + 1)),
            segments: segments
                .into_iter()
                .map(|(id, (salt, blocks, digest, sealed, [a, b, c, d], [oldest, newest]))| SegmentRecord {
                    id: SegmentId(id),
                    salt: Salt(salt),
                    end: blocks * limits::BLOCK_BYTES,
                    previous_digest: if blocks > 1 { digest } else { 0 },
                    sealed,
                    live_bytes: a.min(b),
                    blob_bytes: a.max(b),
                    live_values: c.min(d),
                    live_room: a.min(b).saturating_add(oldest),
                    values: c.max(d),
                    oldest_put: Seq(oldest),
                    newest_delete: Seq(newest),
                })
                .collect(),
            runs: runs
                .into_iter()
                .rev()
                .map(|(id, (entries, bytes, header_crc))| RunRecord { id: RunId(id), entries, bytes, header_crc })
                .collect(),
            ..Manifest::new(StoreId(store), segment_bytes)
        },
    )
}

proptest! {
    #[test]
    fn a_segment_header_comes_back(store in any::<[u8; 16]>(), segment in 1..=u64::MAX, salt in any::<u64>()) {
        let header = SegmentHeader::new(StoreId(store), SegmentId(segment), Salt(salt));
        prop_assert_eq!(SegmentHeader::decode(&header.encode()), Ok(header));
    }

    #[test]
    fn a_commit_comes_back((entries, fields) in commit(), flip in any::<prop::sample::Index>(), bit in 0u32..8) {
        let body = EncodedBody::new(&entries).unwrap();
        let mut bytes = vec![0xee; usize::try_from(body.frame_len()).unwrap()];
        let digest = body.write_frame(&fields, &mut bytes);
        let frame = Frame::decode(&bytes).unwrap();
        prop_assert_eq!(frame.prelude.fields(), fields);
        prop_assert_eq!(frame.entries, entries);
        prop_assert_eq!(frame.digest, digest);
        let at = flip.index(bytes.len());
        bytes[at] ^= 1u8 << bit;
        prop_assert!(Frame::decode(&bytes).is_err(), "bit {} of byte {}", bit, at);
    }

    #[test]
    fn a_manifest_comes_back(manifest in some_manifest(), flip in any::<prop::sample::Index>(), bit in 0u32..8) {
        let mut bytes = manifest.encode().unwrap();
        prop_assert_eq!(Manifest::decode(&bytes), Ok(manifest));
        let at = flip.index(bytes.len());
        bytes[at] ^= 1u8 << bit;
        prop_assert!(Manifest::decode(&bytes).is_err(), "bit {} of byte {}", bit, at);
    }
}
