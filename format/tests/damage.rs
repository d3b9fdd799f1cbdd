//! Damage is found out, or harmless: every bit flipped, every cut, every part moved elsewhere.

mod common;

use std::ops::Bound::{Included, Unbounded};

use alight_format::{
    Dtype, Entry, Frame, HashedKey, IndexEntry, IndexKind, Manifest, PreludeFields, RunId, RunView, Salt,
    SegmentHeader, SegmentId, Seq,
};
use common::{
    EVERY, Oracle, STORE, build, build_with, entry, few, frame, neighbours, oracle, run_record, segment_record,
};
use proptest::prelude::*;

/// Calls `check` with `bytes` after each bit of them was flipped, in turn.
fn with_each_bit_flipped(bytes: &[u8], mut check: impl FnMut(&[u8], usize)) {
    let mut bytes = bytes.to_vec();
    for at in (0..bytes.len()).step_by(EVERY) {
        for bit in (0..8).step_by(few(1, 7)) {
            bytes[at] ^= 1 << bit;
            check(&bytes, at);
            bytes[at] ^= 1 << bit;
        }
    }
}

fn some_frame() -> Vec<u8> {
    let entries = [
        Entry { crc: 9, attributes: vec![("step".into(), b"7".to_vec())], ..Entry::put(b"a", Dtype::F32, &[2, 3]) },
        Entry::delete(b"b"),
    ];
    let fields = PreludeFields {
        salt: Salt(5),
        offset: 4096,
        seq: Seq(2),
        payload_len: 4096,
        synced_through: Seq(1),
        previous_digest: 0,
        part: 0,
        parts: 1,
        flags: 0,
    };
    frame(&entries, &fields)
}

fn some_manifest() -> Vec<u8> {
    let manifest = Manifest {
        next_segment: SegmentId(2),
        next_run: RunId(2),
        segments: vec![segment_record(1, 8192, 6, true)],
        runs: vec![run_record(1)],
        ..Manifest::new(STORE, 1 << 30)
    };
    manifest.encode().unwrap()
}

#[test]
fn a_flipped_bit_or_a_cut_of_a_segment_header_is_found_out() {
    let header = SegmentHeader::new(STORE, SegmentId(1), Salt(5)).encode();
    with_each_bit_flipped(&header, |bytes, at| assert!(SegmentHeader::decode(bytes).is_err(), "byte {at}"));
    (0..header.len())
        .step_by(EVERY)
        .for_each(|cut| assert!(SegmentHeader::decode(&header[..cut]).is_err(), "cut at {cut}"));
}

#[test]
fn a_flipped_bit_or_a_cut_of_a_frame_is_found_out() {
    let frame = some_frame();
    with_each_bit_flipped(&frame, |bytes, at| assert!(Frame::decode(bytes).is_err(), "byte {at}"));
    (0..frame.len()).step_by(EVERY).for_each(|cut| assert!(Frame::decode(&frame[..cut]).is_err(), "cut at {cut}"));
}

#[test]
fn a_flipped_bit_or_a_cut_of_a_manifest_is_found_out() {
    let manifest = some_manifest();
    with_each_bit_flipped(&manifest, |bytes, at| assert!(Manifest::decode(bytes).is_err(), "byte {at}"));
    (0..manifest.len())
        .step_by(EVERY)
        .for_each(|cut| assert!(Manifest::decode(&manifest[..cut]).is_err(), "cut at {cut}"));
}

/// Some keys of an oracle and their neighbours, spread over it.
fn questions(oracle: &Oracle, count: usize) -> Vec<Vec<u8>> {
    let keys = oracle.keys().step_by(oracle.len().div_ceil(few(count, 2)).max(1));
    keys.flat_map(|key| neighbours(key).into_iter().take(3)).collect()
}

/// Asserts that a damaged run gives right answers and errors, and no wrong answer.
fn assert_never_wrong(bytes: &[u8], oracle: &Oracle, questions: &[Vec<u8>], context: impl Fn() -> String) {
    let Ok(run) = RunView::new(bytes) else { return };
    for key in questions {
        if let Ok(found) = run.get(key) {
            assert_eq!(found.as_ref(), oracle.get(key), "{}: {key:?}", context());
        }
        if let Ok(kind) = run.kind(&HashedKey::new(key)) {
            assert_eq!(kind, oracle.get(key).map(|entry| entry.kind), "{}: {key:?}", context());
        }
        let mut right = oracle.range::<[u8], _>((Included(key.as_slice()), Unbounded)).map(|(_, entry)| entry);
        let mut found = run.range(Included(key)).take(2);
        match found.next() {
            Some(Ok(first)) => {
                assert_eq!(Some(&first), right.next(), "{}: from {key:?}", context());
                match found.next() {
                    Some(Ok(second)) => assert_eq!(Some(&second), right.next(), "{}: after {key:?}", context()),
                    Some(Err(_)) => {}
                    None => assert_eq!(right.next(), None, "{}: after {key:?}", context()),
                }
            }
            Some(Err(_)) => {}
            None => assert_eq!(right.next(), None, "{}: from {key:?}", context()),
        }
    }
}

#[test]
fn a_flipped_bit_of_a_run_is_found_out_by_verify_and_never_makes_a_lookup_wrong() {
    let count = few(250, 10);
    let oracle = oracle((0..count).map(|number| format!("model.layers.{}.{}", number % 9, number * number)));
    let (bytes, _) = build(&oracle);
    let questions = questions(&oracle, 5);
    with_each_bit_flipped(&bytes, |bytes, at| {
        let found_out = RunView::new(bytes).and_then(|run| run.verify()).is_err();
        assert!(found_out, "byte {at}");
    });
    // With a table that has every key, with one that is full, and with one that has hardly any.
    for expected in [count, count * 4 / 5, 0] {
        let (bytes, _) = build_with(&oracle, expected);
        for at in (0..bytes.len()).step_by(EVERY) {
            let mut bytes = bytes.clone();
            bytes[at] ^= 1 << (at % 8);
            assert_never_wrong(&bytes, &oracle, &questions, || format!("byte {at}, {expected} expected"));
        }
    }
}

#[test]
fn a_lookup_asks_for_every_line_and_group_that_its_answer_rests_on() {
    let oracle = oracle((0..few(250u32, 20)).map(|number| format!("model.layers.{}.{}", number % 9, number * number)));
    let (bytes, _) = build(&oracle);
    let header = *RunView::new(&bytes).unwrap().header();
    let lines = header.table_offset as usize..(header.table_offset + 64 * header.table_lines) as usize;
    // Every line broken: nobody is told that a key is absent, and who is told of an entry is told right.
    let mut broken = bytes.clone();
    broken[lines.clone()].as_chunks_mut::<64>().0.iter_mut().for_each(|line| line[0] ^= 1);
    let run = RunView::new(&broken).unwrap();
    for key in oracle.keys() {
        assert!(run.get(key).is_ok_and(|found| found.as_ref() == oracle.get(key)) || run.get(key).is_err());
        assert!(run.get(&[key, b"?".as_slice()].concat()).is_err());
    }
    // Every line empty, as if it had been written so: only the checksum is against it.
    let mut empty = bytes.clone();
    empty[lines].as_chunks_mut::<64>().0.iter_mut().for_each(|line| line[4..].fill(0));
    let run = RunView::new(&empty).unwrap();
    assert!(oracle.keys().all(|key| run.get(key).is_err()));
    // Every block broken: no entry is handed out.
    let mut broken = bytes.clone();
    (4096..header.table_offset as usize).for_each(|at| broken[at] ^= 1);
    let run = RunView::new(&broken).unwrap();
    assert!(oracle.keys().all(|key| run.get(key).is_err()));
}

#[test]
fn a_wrong_fence_never_makes_a_lookup_wrong() {
    // Two long keys at a time share all but their end, and three fit a block: so many separators are long, nodes have few
    // children, and there are several levels.
    let key = |number: u32| [(number / 2).to_be_bytes().to_vec(), vec![9; 1000], vec![(number % 2) as u8 * 2]].concat();
    let oracle: Oracle = (0..120u32).map(|number| (key(number), entry(&key(number), 2))).collect();
    // With a table that leaves most keys to the fences.
    let (mut bytes, _) = build_with(&oracle, 0);
    let header = *RunView::new(&bytes).unwrap().header();
    assert!(header.height >= 3);
    let questions = questions(&oracle, 5);
    let fences = header.fences_offset as usize..(header.fences_offset + header.fences_bytes) as usize;
    for at in fences.step_by(few(1, 20_011)) {
        let whole = bytes[at];
        for wrong in [whole ^ 1, whole ^ 0x80, 0] {
            bytes[at] = wrong;
            assert_never_wrong(&bytes, &oracle, &questions, || format!("fence byte {at} was {whole} and is {wrong}"));
        }
        bytes[at] = whole;
    }
}

#[test]
fn a_part_that_was_right_elsewhere_is_not_right_here() {
    let oracle = oracle((0..few(3000, 120)).map(|number| format!("model.layers.{number:05}")));
    let (bytes, _) = build(&oracle);
    // The same keys with other values, as a run that was deleted would have left them on the disk.
    let changed = |entry: &IndexEntry| match entry.kind {
        IndexKind::Put => IndexEntry { crc: !entry.crc, ..entry.clone() },
        IndexKind::Delete => entry.clone(),
    };
    let changed: Oracle = oracle.iter().map(|(key, entry)| (key.clone(), changed(entry))).collect();
    let (other, _) = common::build_as(&changed, RunId(4));
    assert_eq!(bytes.len(), other.len());
    let questions = questions(&oracle, 100);
    let blocks = bytes.len() / 4096;
    for to in 1..blocks {
        let place = to * 4096..(to + 1) * 4096;
        let mut damaged = bytes.clone();
        for from in 1..blocks {
            damaged[place.clone()].copy_from_slice(&bytes[from * 4096..(from + 1) * 4096]);
            assert_never_wrong(&damaged, &oracle, &questions, || format!("block {from} lies at {to}"));
        }
        damaged[place.clone()].copy_from_slice(&other[place]);
        assert_never_wrong(&damaged, &oracle, &questions, || format!("another run's block {to}"));
        assert!(RunView::new(&damaged).unwrap().verify().is_err());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(few(200, 3)))]

    #[test]
    fn fences_of_noise_never_make_a_lookup_wrong(
        noise in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..200),
    ) {
        let oracle = oracle((0..few(4000, 20)).map(|number| format!("model.layers.{}.{}", number % 9, number * number)));
        let (mut bytes, _) = build_with(&oracle, 0);
        let header = *RunView::new(&bytes).unwrap().header();
        let fences = &mut bytes[header.fences_offset as usize..(header.fences_offset + header.fences_bytes) as usize];
        for (at, byte) in noise {
            fences[at.index(fences.len())] = byte;
        }
        assert_never_wrong(&bytes, &oracle, &questions(&oracle, 50), || "noise".into());
    }

    #[test]
    fn no_bytes_make_a_decoder_panic(bytes in proptest::collection::vec(any::<u8>(), 0..few(9000, 5000))) {
        let _ = SegmentHeader::decode(&bytes);
        let _ = Frame::decode(&bytes);
        let _ = Manifest::decode(&bytes);
        let _ = RunView::new(&bytes).map(|run| run.verify());
    }
}
