//! Entries are built into a run and some of its bytes are changed: every answer is right, or an error.
#![no_main]

use std::collections::BTreeMap;
use std::ops::Bound;

use alight_format::{
    Dtype, FormatError, HashedKey, IndexEntry, IndexKind, RunBuilder, RunId, RunView, SegmentId, Seq, StoreId,
};
use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Input {
    /// Keys: one of a few beginnings, a number of times, and an end of its own.
    keys: Vec<(u8, u8, Vec<u8>)>,
    /// Keys that follow one another: up to a thousand where it is a multiple of three, else a few, which take far less time.
    numbered: u8,
    expected: u8,
    questions: Vec<(u8, u8, Vec<u8>)>,
    changes: Vec<(u16, u8)>,
}

fn key((start, times, end): &(u8, u8, Vec<u8>)) -> Vec<u8> {
    let start: &[u8] = [b"".as_slice(), b"k", b"layers.", &[0], &[255]][usize::from(*start) % 5];
    let mut key = start.repeat(usize::from(*times));
    key.extend_from_slice(end);
    key.truncate(1024);
    key
}

fn entry(key: &[u8], number: usize) -> IndexEntry {
    let (seq, segment) = (Seq(1 + number as u64), SegmentId(1 + number as u64 % 3));
    if number % 4 == 3 {
        return IndexEntry::tombstone(key, seq, segment, 4096);
    }
    let shape = vec![number as u64, 3];
    IndexEntry {
        key: key.to_vec(),
        kind: IndexKind::Put,
        seq,
        segment,
        frame_offset: 4096,
        offset: 8192,
        length: Dtype::F32.byte_len(&shape).unwrap(),
        crc: number as u32,
        dtype: Dtype::F32,
        shape,
        has_attributes: number % 5 == 0,
    }
}

/// Changes some bytes; whether they are what they were.
fn damage(bytes: &mut [u8], changes: &[(u16, u8)]) -> bool {
    let mut before = BTreeMap::new();
    for (at, change) in changes {
        let at = usize::from(*at) * bytes.len() / 65_536;
        before.entry(at).or_insert(bytes[at]);
        bytes[at] ^= change;
    }
    before.into_iter().all(|(at, byte)| bytes[at] == byte)
}

fuzz_target!(|input: Input| {
    let keys = input.keys.iter().map(key).filter(|key| !key.is_empty());
    let count = u32::from(input.numbered);
    let count = if count % 3 == 0 { count * 4 } else { count / 3 };
    let numbered = (0..count).map(|number| format!("model.layers.{number:04}").into_bytes());
    // Collected, and so sorted at once: most of them are in order. Of two with the same key the later one stays.
    let entries = keys.chain(numbered).enumerate().map(|(number, key)| (key.clone(), entry(&key, number)));
    let oracle: BTreeMap<Vec<u8>, IndexEntry> = entries.collect();
    let mut bytes = vec![0; 4096];
    let mut builder = RunBuilder::new(StoreId([1; 16]), RunId(1), u64::from(input.expected), |piece: &[u8]| {
        bytes.extend_from_slice(piece);
        Ok::<_, FormatError>(())
    });
    oracle.values().for_each(|entry| builder.push(entry).unwrap());
    let finished = builder.finish().unwrap();
    bytes[..4096].copy_from_slice(&finished.header[..]);
    let whole = damage(&mut bytes, &input.changes);
    let run = match RunView::new(&bytes) {
        Err(_) if !whole => return,
        run => run.unwrap(),
    };
    if whole {
        run.verify().unwrap();
        assert!(run.range(Bound::Unbounded).map(Result::unwrap).eq(oracle.values().cloned()));
    } else {
        assert!(run.verify().is_err());
    }
    for key in input.questions.iter().map(key).chain(oracle.keys().take(20).cloned()) {
        if let Ok(found) = run.get(&key) {
            assert_eq!(found.as_ref(), oracle.get(&key));
        }
        if let Ok(kind) = run.kind(&HashedKey::new(&key)) {
            assert_eq!(kind, oracle.get(&key).map(|entry| entry.kind));
        }
        let mut right = oracle.range::<[u8], _>((Bound::Included(key.as_slice()), Bound::Unbounded));
        for found in run.range(Bound::Included(&key)).take(30) {
            match found {
                Ok(found) => assert_eq!(Some(&found), right.next().map(|(_, entry)| entry)),
                Err(_) => return,
            }
        }
    }
});
