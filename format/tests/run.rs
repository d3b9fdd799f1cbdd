//! Index runs against the simplest thing that could be right: a `BTreeMap`.

mod common;

use std::borrow::Cow;
use std::cell::Cell;
use std::ops::Bound::Unbounded;

use alight_format::{
    FormatError, IndexEntry, RunBuilder, RunBytes, RunError, RunId, RunReader, RunView, SegmentId, Seq,
};
use common::{Oracle, STORE, assert_like_oracle, build, build_with, entry, few, oracle};
use proptest::prelude::*;

/// A run in a file, which lends nothing and can fail.
struct Copies {
    file: Vec<u8>,
    reads: Cell<usize>,
    /// After so many reads, what goes wrong.
    trouble: Option<(usize, Trouble)>,
}

#[derive(Clone, Copy)]
enum Trouble {
    Fails,
    IsShort,
}

impl RunBytes for Copies {
    type Error = RunError<&'static str>;

    fn len_bytes(&self) -> u64 {
        self.file.len() as u64
    }

    fn read(&self, offset: u64, len: usize) -> Result<Cow<'_, [u8]>, Self::Error> {
        self.reads.set(self.reads.get() + 1);
        let bytes = &self.file[offset as usize..][..len];
        match self.trouble {
            Some((reads, Trouble::Fails)) if self.reads.get() > reads => Err(RunError::Io("the disk is gone")),
            Some((reads, Trouble::IsShort)) if self.reads.get() > reads => Ok(Cow::Owned(bytes[1..].to_vec())),
            _ => Ok(Cow::Owned(bytes.to_vec())),
        }
    }
}

#[test]
fn a_run_is_read_through_anything_that_reads() {
    let oracle = oracle((0..few(2000, 20)).map(|number| format!("model.layers.{number}")));
    let copies = Copies { file: build(&oracle).0, reads: Cell::new(0), trouble: None };
    let run = RunReader::new(&copies).unwrap();
    run.verify().unwrap();
    assert!(run.range(Unbounded).map(Result::unwrap).eq(oracle.values().cloned()));
    let key = b"model.layers.9".as_slice();
    copies.reads.set(0);
    assert_eq!(run.get(key).unwrap().as_ref(), oracle.get(key));
    assert_eq!(copies.reads.get(), 2, "a line of the table, a group");

    // A table of one line, which knows nothing of most keys.
    let copies = Copies { file: build_with(&oracle, 0).0, reads: Cell::new(0), trouble: None };
    let run = RunReader::new(&copies).unwrap();
    assert_eq!(run.header().table_lines, 1);
    copies.reads.set(0);
    assert_eq!(run.get(key).unwrap().as_ref(), oracle.get(key));
    assert_eq!(copies.reads.get(), 9 + run.header().height as usize, "eight lines, a node of each level, a block");
}

#[test]
fn a_read_that_fails_or_is_short_is_never_an_answer() {
    let oracle = oracle((0..few(2000, 20)).map(|number| format!("model.layers.{number}")));
    let mut copies = Copies { file: build_with(&oracle, 0).0, reads: Cell::new(0), trouble: None };
    for (reads, trouble) in (1..11).flat_map(|reads| [(reads, Trouble::Fails), (reads, Trouble::IsShort)]) {
        (copies.reads, copies.trouble) = (Cell::new(0), Some((reads, trouble)));
        let run = RunReader::new(&copies).unwrap();
        match (run.get(b"model.layers.9").unwrap_err(), trouble) {
            (RunError::Io("the disk is gone"), Trouble::Fails) => {}
            (RunError::Format(FormatError::Damaged { .. }), Trouble::IsShort) => {}
            (error, _) => panic!("{error}"),
        }
        copies.reads = Cell::new(0);
        let run = RunReader::new(&copies).unwrap();
        assert!(run.verify().is_err());
    }
    (copies.reads, copies.trouble) = (Cell::new(0), Some((0, Trouble::IsShort)));
    assert!(RunReader::new(&copies).is_err());
}

fn assert_round_trip(oracle: &Oracle) {
    let (bytes, finished) = build(oracle);
    assert_eq!(finished.record, RunView::new(&bytes).unwrap().record());
    assert_eq!(finished.record.bytes, bytes.len() as u64);
    assert_like_oracle(&bytes, oracle);
}

#[test]
fn an_empty_run_knows_no_key() {
    assert_round_trip(&Oracle::new());
}

#[test]
fn one_entry_is_a_run() {
    for key in [[1].as_slice(), &[0], &[255], b"layers.0.w", &[7; 1024], &[255; 1024]] {
        assert_round_trip(&oracle([key]));
    }
}

#[test]
fn every_key_of_one_byte_is_found() {
    assert_round_trip(&oracle((0..=255u8).step_by(few(1, 15)).map(|byte| [byte])));
}

#[test]
fn keys_that_begin_one_another_are_told_apart() {
    let longest: Vec<u8> = (0..1024u32).map(|at| (at % 3) as u8).collect();
    assert_round_trip(&oracle((1..=1024).step_by(few(1, 93)).map(|len| longest[..len].to_vec())));
    assert_round_trip(&oracle((1..=1024).step_by(few(1, 93)).map(|len| vec![0; len])));
    assert_round_trip(&oracle((1..=1024).step_by(few(1, 93)).map(|len| vec![255; len])));
}

#[test]
fn keys_of_the_longest_length_that_differ_at_their_end_are_told_apart() {
    let key = |number: u16| [vec![b'p'; 1022], number.to_be_bytes().to_vec()].concat();
    assert_round_trip(&oracle((0..few(2000, 16)).map(key)));
}

#[test]
fn keys_of_the_longest_length_that_share_nothing_are_told_apart() {
    let key = |number: u16| [number.to_be_bytes().to_vec(), vec![(number % 251) as u8; 1022]].concat();
    assert_round_trip(&oracle((0..few(2000, 16)).map(key)));
    // Every other one short: separators of every length.
    let key = |number: u16| if number.is_multiple_of(2) { key(number) } else { number.to_be_bytes().to_vec() };
    assert_round_trip(&oracle((0..few(2000, 16)).map(key)));
}

#[test]
fn neighbours_that_share_all_but_the_last_byte_of_long_keys_make_long_separators() {
    // Pairs of long keys that share 1023 bytes, and nothing with the next pair: if a pair is parted, by one byte.
    let key = |number: u16| [(number / 2).to_be_bytes().to_vec(), vec![9; 1021], vec![(number % 2) as u8]].concat();
    assert_round_trip(&oracle((0..few(4000, 16)).map(key)));
}

#[test]
fn the_keys_of_a_decoder_are_found() {
    let modules = ["attn.k", "attn.o", "attn.q", "attn.v", "mlp.down", "mlp.gate", "mlp.up", "norm"];
    let keys = (0..few(40, 3)).flat_map(|layer| {
        modules
            .iter()
            .flat_map(move |module| (0..few(90, 1)).map(move |part| format!("model.layers.{layer}.{module}.{part:06}")))
    });
    assert_round_trip(&oracle(keys));
}

#[test]
fn the_largest_entries_fit() {
    let largest = |number: u8| IndexEntry {
        shape: [vec![0], vec![u64::MAX; 63]].concat(),
        length: 0,
        seq: Seq(u64::MAX),
        segment: SegmentId(u64::MAX),
        offset: 1 << 60,
        frame_offset: 1 << 60,
        ..entry(&[number; 1024], 0)
    };
    assert_round_trip(&(0..few(100, 4)).map(|number| (vec![number; 1024], largest(number))).collect());
}

#[test]
fn a_wrong_expectation_costs_space_or_time_and_no_answer() {
    let count = few(3000, 12);
    let oracle = oracle((0..count).map(|number| format!("k{number}")));
    for expected in [0, 1, count / 30, 10 * count] {
        assert_like_oracle(&build_with(&oracle, expected).0, &oracle);
    }
}

#[test]
fn the_same_entries_make_the_same_bytes() {
    let oracle = oracle((0..few(3000, 30)).map(|number| format!("k{number}")));
    assert_eq!(build(&oracle), build(&oracle));
}

#[test]
fn entries_out_of_order_and_entries_that_contradict_themselves_are_refused_and_leave_no_trace() {
    let mut bytes = vec![0; 4096];
    let mut builder = RunBuilder::new(STORE, RunId(3), 2, |piece: &[u8]| {
        bytes.extend_from_slice(piece);
        Ok::<_, FormatError>(())
    });
    builder.push(&entry(b"b", 0)).unwrap();
    for refused in [entry(b"b", 1), entry(b"a", 1), entry(b"", 1), IndexEntry { length: 1, ..entry(b"c", 2) }] {
        assert!(matches!(builder.push(&refused), Err(FormatError::Invalid { .. })));
    }
    let refused = entry(&[b'c'; 1025], 1);
    assert!(matches!(builder.push(&refused), Err(FormatError::LimitExceeded { value: 1025, limit: 1024, .. })));
    builder.push(&entry(b"ba", 7919)).unwrap();
    let finished = builder.finish().unwrap();
    bytes[..4096].copy_from_slice(&finished.header[..]);
    assert_eq!(bytes, build(&oracle([b"b".as_slice(), b"ba"])).0);
}

#[test]
fn a_failure_of_the_sink_is_handed_on() {
    #[derive(Debug, PartialEq)]
    struct Full;
    impl From<FormatError> for Full {
        fn from(error: FormatError) -> Self {
            panic!("{error}")
        }
    }
    let mut builder = RunBuilder::new(STORE, RunId(3), 2, |_: &[u8]| Err(Full));
    builder.push(&entry(b"b", 0)).unwrap();
    assert_eq!(builder.finish().unwrap_err(), Full);
}

#[test]
fn a_run_of_another_length_than_it_says_is_refused_at_opening() {
    let (bytes, _) = build(&oracle(["a", "b"]));
    for len in [0, 1, 4095, 4096, bytes.len() - 4096, bytes.len() - 1] {
        assert!(RunView::new(&bytes[..len]).is_err(), "cut to {len}");
    }
    assert!(RunView::new(&[bytes, vec![0]].concat()).is_err());
}

fn some_key() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        4 => proptest::collection::vec(prop_oneof![Just(0u8), Just(255), b'a'..=b'c'], 1..12),
        3 => (0u32..40, 0u32..2000).prop_map(|(layer, part)| format!("model.layers.{layer}.w.{part:05}").into_bytes()),
        1 => (proptest::collection::vec(any::<u8>(), 1..6), 1usize..=1018).prop_map(|(end, len)| [vec![b'm'; len], end].concat()),
        1 => proptest::collection::vec(any::<u8>(), 1..=1024),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(few(64, 3)))]

    #[test]
    fn any_run_answers_as_a_map_does(keys in proptest::collection::btree_set(some_key(), 0..few(1500, 9))) {
        assert_round_trip(&oracle(keys));
    }
}
