//! What the suites share: builders of values, and runs in memory.

#![allow(dead_code, reason = "each suite uses some of it")]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use alight_format::{
    Dtype, EncodedBody, Entry, FinishedRun, FormatError, HashedKey, IndexEntry, IndexKind, PreludeFields, RunBuilder,
    RunId, RunRecord, RunView, Salt, SegmentId, SegmentRecord, Seq, StoreId,
};

/// So many; under Miri, which is some thousand times slower, as few as the second number says.
pub(crate) const fn few<N: Copy>(count: N, under_miri: N) -> N {
    if cfg!(miri) { under_miri } else { count }
}

/// Of damages to every byte, every so many-th.
pub(crate) const EVERY: usize = few(1, 4001);

pub(crate) const STORE: StoreId = StoreId(*b"a store's 16 IDs");

/// Asserts that a file below this crate has these bytes. Writes it first where `ALIGHT_BLESS` asks for that.
pub(crate) fn assert_file(name: &str, bytes: &[u8]) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    if std::env::var_os("ALIGHT_BLESS").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
    }
    let expected = fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    if expected != bytes {
        let differs = expected.iter().zip(bytes).take_while(|(a, b)| a == b).count();
        panic!("{name} differs from byte {differs} on");
    }
}

/// The bytes of a frame.
pub(crate) fn frame(entries: &[Entry], fields: &PreludeFields) -> Vec<u8> {
    let body = EncodedBody::new(entries).unwrap();
    let mut bytes = vec![0; usize::try_from(body.frame_len()).unwrap()];
    body.write_frame(fields, &mut bytes);
    bytes
}

/// A segment as a manifest has it, all of whose accounts follow from its number.
pub(crate) fn segment_record(id: u64, end: u64, previous_digest: u32, sealed: bool) -> SegmentRecord {
    SegmentRecord {
        id: SegmentId(id),
        salt: Salt(id * 11),
        end,
        previous_digest,
        sealed,
        live_bytes: 1000 * id,
        blob_bytes: 2000 * id,
        live_values: 3 * id,
        live_room: 1024 * id,
        values: 4 * id,
        oldest_put: Seq(5 * id),
        newest_delete: Seq(6 * id),
    }
}

/// An index run, likewise.
pub(crate) fn run_record(id: u64) -> RunRecord {
    RunRecord { id: RunId(id), entries: 10 * id, bytes: 16_384, header_crc: 0xdead_beef }
}

/// Entries by key, which is what a run must behave like.
pub(crate) type Oracle = BTreeMap<Vec<u8>, IndexEntry>;

/// An entry whose fields all follow from a number; each third is a tombstone.
pub(crate) fn entry(key: &[u8], number: u64) -> IndexEntry {
    let seq = Seq(1 + number % 1000);
    if number % 3 == 2 {
        return IndexEntry::tombstone(key, seq, SegmentId(1 + number % 7), 4096 * (1 + number % 50));
    }
    let dtype = [Dtype::F32, Dtype::BF16, Dtype::U8, Dtype::F8E4M3][number as usize % 4];
    let shape: Vec<u64> = (0..number % 5).map(|dim| (number >> (7 * dim)) % 300).collect();
    IndexEntry {
        key: key.to_vec(),
        kind: IndexKind::Put,
        seq,
        segment: SegmentId(1 + number % 7),
        frame_offset: 4096 * (1 + number % 50),
        offset: 256 * number,
        length: dtype.byte_len(&shape).unwrap(),
        crc: number.wrapping_mul(0x9e37_79b9) as u32,
        dtype,
        shape,
        has_attributes: number.is_multiple_of(2),
    }
}

/// An oracle of these keys.
pub(crate) fn oracle<K: AsRef<[u8]>>(keys: impl IntoIterator<Item = K>) -> Oracle {
    keys.into_iter()
        .enumerate()
        .map(|(number, key)| (key.as_ref().to_vec(), entry(key.as_ref(), number as u64 * 7919)))
        .collect()
}

/// A run of these entries, and what its builder said of it.
pub(crate) fn build(entries: &Oracle) -> (Vec<u8>, FinishedRun) {
    build_with(entries, entries.len() as u64)
}

/// The same, with another number of entries expected.
pub(crate) fn build_with(entries: &Oracle, expected: u64) -> (Vec<u8>, FinishedRun) {
    build_run(entries, RunId(3), expected)
}

/// The same, with another number of the run.
pub(crate) fn build_as(entries: &Oracle, run: RunId) -> (Vec<u8>, FinishedRun) {
    build_run(entries, run, entries.len() as u64)
}

fn build_run(entries: &Oracle, run: RunId, expected: u64) -> (Vec<u8>, FinishedRun) {
    let mut bytes = vec![0; 4096];
    let mut builder = RunBuilder::new(STORE, run, expected, |piece: &[u8]| {
        assert!(piece.len().is_multiple_of(4096) && !piece.is_empty());
        bytes.extend_from_slice(piece);
        Ok::<_, FormatError>(())
    });
    entries.values().for_each(|entry| builder.push(entry).unwrap());
    let finished = builder.finish().unwrap();
    bytes[..4096].copy_from_slice(&finished.header[..]);
    (bytes, finished)
}

/// Keys near a key: those that a wrong comparison would confuse with it.
pub(crate) fn neighbours(key: &[u8]) -> Vec<Vec<u8>> {
    let mut near = vec![key.to_vec(), [key, b"\0"].concat(), [key, b"\xff"].concat(), [key, b"0"].concat()];
    if let Some((last, start)) = key.split_last() {
        near.push(start.to_vec());
        near.extend(last.checked_sub(1).map(|last| [start, &[last]].concat()));
        near.extend(last.checked_add(1).map(|last| [start, &[last]].concat()));
    }
    if let Some((first, end)) = key.split_first() {
        near.extend(first.checked_add(1).map(|first| [&[first], end].concat()));
        near.push(end.to_vec());
    }
    near
}

/// Asserts that a run answers every question as its oracle does.
pub(crate) fn assert_like_oracle(bytes: &[u8], oracle: &Oracle) {
    use std::ops::Bound::{Excluded, Included, Unbounded};
    let run = RunView::new(bytes).unwrap();
    run.verify().unwrap();
    assert_eq!(run.entry_count(), oracle.len() as u64);
    assert_eq!(run.min_seq(), oracle.values().map(|entry| entry.seq).min().unwrap_or(Seq::ZERO));
    assert_eq!(run.max_seq(), oracle.values().map(|entry| entry.seq).max().unwrap_or(Seq::ZERO));
    let all: Vec<IndexEntry> = run.range(Unbounded).map(Result::unwrap).collect();
    assert!(all.iter().eq(oracle.values()));
    let questions = oracle.len().div_ceil(few(500, 2)).max(1);
    for key in oracle.keys().step_by(questions).flat_map(|key| neighbours(key)).chain([vec![], vec![255; 1024]]) {
        assert_eq!(run.get(&key).unwrap().as_ref(), oracle.get(&key), "{key:?}");
        let kind = run.kind(&HashedKey::new(&key)).unwrap();
        assert_eq!(kind, oracle.get(&key).map(|entry| entry.kind), "{key:?}");
        for from in [Included(key.as_slice()), Excluded(key.as_slice())] {
            let found = run.range(from).take(3).map(Result::unwrap);
            assert!(found.eq(oracle.range::<[u8], _>((from, Unbounded)).map(|(_, entry)| entry.clone()).take(3)));
        }
    }
}
