//! What can be asked of a store, and which bytes of its files each answer rests on.
//!
//! An answer is a function of the bytes that were read for it. So a byte that neither the open nor the asking read, on
//! the store as it was, cannot change the answer: the same bytes lead down the same path. The twin's trace says what was
//! read; that spares most of the work of flipping a million bytes, and leaves none of the proof out.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::PathBuf;

use alight::storage::sim::{Abilities, Event, OpKind, SimStorage};
use alight::{Device, Error, Store, StoreOptions};

use crate::oracle::PATH;

/// A question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Ask {
    /// All keys with what is known of them.
    Scan,
    /// A key's value.
    Value(Vec<u8>),
    /// A key's attributes.
    Attributes(Vec<u8>),
}

/// What a store said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Answer {
    Keys(Vec<(Vec<u8>, String)>),
    Value(Vec<u8>),
    Attributes(Vec<(String, Vec<u8>)>),
    NoSuchKey,
}

impl Ask {
    pub(crate) fn of(&self, store: &Store) -> Result<Answer, Error> {
        let answer = match self {
            Ask::Scan => store
                .scan("")
                .map(|info| {
                    info.map(|info| (info.key.as_bytes().to_vec(), format!("{:?} {:?}", info.dtype, info.shape)))
                })
                .collect::<Result<_, _>>()
                .map(Answer::Keys),
            Ask::Value(key) => store.get(key, &Device::host()).and_then(|value| value.to_host()).map(Answer::Value),
            Ask::Attributes(key) => store.attributes(key).map(Answer::Attributes),
        };
        match answer {
            Err(Error::NotFound(_)) => Ok(Answer::NoSuchKey),
            answer => answer,
        }
    }
}

/// A store that is whole, what it answers, and what each answer rests on.
pub(crate) struct Subject {
    pub sim: SimStorage,
    pub options: fn(&SimStorage) -> StoreOptions,
    pub asks: Vec<Ask>,
    /// What it answers.
    pub now: Vec<Answer>,
    /// What it answered before its last commit.
    pub before_last: Vec<Answer>,
    /// Of each file, which ranges an open reads (`None`) or a question (its place in `asks`), after an open of its own.
    reads: BTreeMap<PathBuf, Vec<Read>>,
}

/// A range of a file, and who read it.
type Read = (Range<u64>, Option<usize>);

impl Subject {
    pub(crate) fn new(
        sim: SimStorage,
        options: fn(&SimStorage) -> StoreOptions,
        asks: Vec<Ask>,
        before_last: Vec<Answer>,
    ) -> Self {
        let (mut reads, mut now) = (BTreeMap::<PathBuf, Vec<Read>>::new(), Vec::new());
        for (index, ask) in asks.iter().enumerate() {
            // Where nothing is mapped, the trace has every byte of an index run that is looked at.
            let disk = sim.clone_disk();
            disk.set_abilities(Abilities { map: false, ..Abilities::default() });
            disk.start_recording();
            let store = options(&disk).open(PATH).expect("the store is whole");
            disk.marker(0);
            now.push(ask.of(&store).expect("the store is whole"));
            disk.stop_recording();
            store.abandon();
            let mut reader = None;
            for event in disk.trace().events() {
                let Event::Call(call) = event else {
                    reader = Some(index);
                    continue;
                };
                let range = match call.op {
                    OpKind::Read => call.offset..call.offset + call.outcome.unwrap_or(0),
                    // The answer is the first byte that is not in a hole, wherever that is.
                    OpKind::NextData => call.offset..u64::MAX,
                    OpKind::LockHolder => 0..u64::MAX,
                    _ => continue,
                };
                reads.entry(call.path.to_path_buf()).or_default().push((range, reader));
            }
        }
        for ranges in reads.values_mut() {
            ranges.sort_by_key(|(range, reader)| (range.start, range.end, *reader));
            ranges.dedup();
        }
        Self { sim, options, asks, now, before_last, reads }
    }

    /// A disk of its own with the same store.
    pub(crate) fn disk(&self) -> SimStorage {
        self.sim.clone_disk()
    }

    /// Opens the store on a disk.
    pub(crate) fn open(&self, disk: &SimStorage) -> Result<Store, Error> {
        (self.options)(disk).open(PATH)
    }

    /// What rests on the bytes of a file, over ranges that all bytes of one share: whether an open does, and which
    /// questions.
    pub(crate) fn resting_on(&self, path: &PathBuf, range: Range<u64>) -> Vec<(Range<u64>, Resting)> {
        let none = Vec::new();
        let reads = self.reads.get(path).unwrap_or(&none);
        let mut cuts: Vec<u64> = reads.iter().flat_map(|(range, _)| [range.start, range.end]).collect();
        cuts.retain(|cut| range.contains(cut));
        cuts.extend([range.start, range.end]);
        cuts.sort_unstable();
        cuts.dedup();
        let resting = |start: u64| {
            let readers = reads.iter().filter(|(range, _)| range.contains(&start)).map(|(_, reader)| *reader);
            let (asks, opens): (Vec<_>, Vec<_>) = readers.partition(Option::is_some);
            let asks: BTreeSet<usize> = asks.into_iter().flatten().collect();
            Resting { open: !opens.is_empty(), asks: asks.into_iter().collect() }
        };
        cuts.windows(2).map(|pair| (pair[0]..pair[1], resting(pair[0]))).collect()
    }
}

/// What rests on a byte.
#[derive(Debug, Clone)]
pub(crate) struct Resting {
    pub open: bool,
    pub asks: Vec<usize>,
}
