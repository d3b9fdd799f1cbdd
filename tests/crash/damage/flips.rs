//! One bit turned over, anywhere: never wrong data, never a key missing in silence, never a panic.
//!
//! `ALIGHT_FLIPS=all` turns over all eight bits of every byte instead of one, `ALIGHT_FLIPS_SEED=N` others.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use alight::storage::sim::SimStorage;
use alight::{Device, Error, Store};
use parking_lot::Mutex;

use super::ask::{Answer, Ask, Resting, Subject};
use super::atlas::{Region, Span, atlas};
use super::stores::{Last, closed, compacted, killed, options};
use crate::oracle::PATH;
use crate::panics::caught;
use crate::sabotage::{bless, bless_payloads};
use crate::workloads::value;

/// What a flipped bit did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    /// Everything reads as it was written.
    Harmless,
    /// The store does not open, says why, and every file is as it was.
    Refused,
    /// Some answer is an error that names the damage; all others are right.
    Reported,
    /// The last commit is gone, and nothing else.
    LastCommitLost,
}

/// How many threads flip.
pub(crate) const WORKERS: usize = 2;

/// Of so many flips that are judged by what rests on them, one is judged by everything as well.
const CROSS_CHECKED: u64 = 211;

pub(crate) fn seed() -> u64 {
    std::env::var("ALIGHT_FLIPS_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1)
}

fn mixed(a: u64, b: u64) -> u64 {
    let mut z = a.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ b.wrapping_add(0x2545_F491_4F6C_DD1D);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// The bits of a byte that are turned over.
pub(crate) fn bits(file: usize, offset: u64) -> Range<u8> {
    if std::env::var("ALIGHT_FLIPS").is_ok_and(|which| which == "all") {
        return 0..8;
    }
    let bit = (mixed(seed() << 16 | file as u64, offset) % 8) as u8;
    bit..bit + 1
}

/// One bit of one file.
#[derive(Clone, Copy)]
struct Flip<'a> {
    path: &'a PathBuf,
    offset: u64,
    bit: u8,
    region: Region,
    seq: u64,
}

impl fmt::Display for Flip<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "bit {} of byte {} of {} ({})", self.bit, self.offset, self.path.display(), self.region)
    }
}

/// Judges flips of one store.
struct Judge<'a> {
    subject: &'a Subject,
    last_commit: u64,
}

impl Judge<'_> {
    /// Turns the bit over on a disk of its own, opens the store there and asks some questions.
    fn judge(&self, flip: Flip<'_>, asks: &[usize]) -> Result<Outcome, String> {
        let disk = self.subject.disk();
        disk.flip_bit(flip.path, flip.offset, flip.bit);
        let before = disk.fingerprint();
        match self.subject.open(&disk) {
            Ok(store) => {
                let outcome = self.ask(&store, flip, asks);
                store.abandon();
                outcome
            }
            Err(Error::Damaged(_) | Error::NotAStore { .. } | Error::Newer { .. }) => {
                // The lock says the same of its holder as before: it is the same process.
                if disk.fingerprint() == before { Ok(Outcome::Refused) } else { Err("a refused open wrote".into()) }
            }
            Err(error) => Err(format!("the open fails with an error of no fitting kind: {error:?}")),
        }
    }

    /// Asks an open store, with the bit turned over.
    fn ask(&self, store: &Store, flip: Flip<'_>, asks: &[usize]) -> Result<Outcome, String> {
        let Subject { asks: all, now, before_last, .. } = self.subject;
        let mut outcome = Outcome::Harmless;
        for &index in asks {
            match all[index].of(store) {
                Ok(answer) if answer == now[index] => {}
                // No later commit says that the last one was whole: a tear and a flipped bit look alike there.
                Ok(answer) if flip.seq == self.last_commit && answer == before_last[index] => {
                    outcome = Outcome::LastCommitLost;
                }
                Ok(answer) => return Err(told(&all[index], &answer, &now[index])),
                Err(Error::Damaged(_)) if outcome == Outcome::LastCommitLost => {
                    return Err("the last commit is lost, and yet something is damaged".into());
                }
                Err(Error::Damaged(_)) => outcome = Outcome::Reported,
                Err(error) => {
                    return Err(format!("{:?} fails with an error of no fitting kind: {error:?}", all[index]));
                }
            }
        }
        if outcome == Outcome::LastCommitLost {
            // Gone as a whole, and nothing else with it.
            for (ask, before) in all.iter().zip(before_last) {
                let answer = ask.of(store).map_err(|error| format!("with the last commit lost: {error}"))?;
                if answer != *before {
                    return Err(format!("with the last commit lost, {}", told(ask, &answer, before)));
                }
            }
        }
        Ok(outcome)
    }
}

pub(crate) fn told(ask: &Ask, answer: &Answer, expected: &Answer) -> String {
    match (answer, expected) {
        (Answer::NoSuchKey, _) => format!("{ask:?}: the key is missing, and nobody says why"),
        (Answer::Keys(keys), Answer::Keys(expected)) => {
            format!("{ask:?}: {} keys instead of {}, and no error", keys.len(), expected.len())
        }
        _ => format!("{ask:?}: wrong data"),
    }
}

/// How many flips of each region came to what.
type Counts = BTreeMap<(Region, Outcome), u64>;

/// Flips every byte of every file. What rests on the byte is asked; what is read past any cache is asked of a store that
/// is open already.
fn flip_everything(subject: &Subject, last_commit: u64) -> Result<Counts, String> {
    let spans = atlas(&subject.sim);
    let files: Vec<PathBuf> = subject.sim.files();
    let jobs: Vec<(usize, &Span, Range<u64>, Resting)> = spans
        .iter()
        .flat_map(|span| {
            let file = files.iter().position(|path| *path == span.path).expect("a span is of a file");
            let resting = subject.resting_on(&span.path, span.range.clone());
            resting.into_iter().map(move |(range, on)| (file, span, range, on))
        })
        .collect();
    let all: Vec<usize> = (0..subject.asks.len()).collect();
    let judge = Judge { subject, last_commit };
    let (next, counts, wrong) = (AtomicUsize::new(0), Mutex::new(Counts::new()), Mutex::new(None));
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                let mut own = Counts::new();
                let disk = subject.disk();
                let store = subject.open(&disk).expect("the store is whole");
                // Files are open from here on, and their headers known.
                all.iter().for_each(|&ask| drop(subject.asks[ask].of(&store)));
                while let Some((file, span, range, on)) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let read_anew = matches!(span.region, Region::Value | Region::DeadValue | Region::Padding);
                    let asks = if on.open { &all } else { &on.asks };
                    for offset in range.clone() {
                        for bit in bits(*file, offset) {
                            let flip = Flip { path: &span.path, offset, bit, region: span.region, seq: span.seq };
                            let judged = caught(|| {
                                let outcome = if !on.open && read_anew {
                                    disk.flip_bit(flip.path, offset, bit);
                                    let outcome = judge.ask(&store, flip, asks)?;
                                    disk.flip_bit(flip.path, offset, bit);
                                    outcome
                                } else {
                                    judge.judge(flip, asks)?
                                };
                                if mixed(seed(), offset ^ (*file as u64) << 40).is_multiple_of(CROSS_CHECKED) {
                                    let by_everything = judge.judge(flip, &all)?;
                                    if by_everything != outcome {
                                        return Err(format!(
                                            "{outcome:?} by what rests on it, {by_everything:?} by all"
                                        ));
                                    }
                                }
                                Ok(outcome)
                            });
                            match judged {
                                Ok(outcome) => *own.entry((span.region, outcome)).or_default() += 1,
                                Err(what) => {
                                    let told = format!("ALIGHT_FLIPS_SEED={}, {flip}: {what}", seed());
                                    wrong.lock().get_or_insert(told);
                                }
                            }
                        }
                    }
                    if wrong.lock().is_some() {
                        break;
                    }
                }
                store.abandon();
                let mut counts = counts.lock();
                own.into_iter().for_each(|(what, count)| *counts.entry(what).or_default() += count);
            });
        }
    });
    wrong.into_inner().map_or(Ok(counts.into_inner()), Err)
}

fn print(title: &str, counts: &Counts) {
    println!("{title}, ALIGHT_FLIPS_SEED={}", seed());
    println!("{:34} {:>10} {:>10} {:>10} {:>12}", "flips of", "harmless", "refused", "reported", "last commit");
    let regions: BTreeSet<Region> = counts.keys().map(|(region, _)| *region).collect();
    for region in regions {
        let of = |outcome| counts.get(&(region, outcome)).copied().unwrap_or_default();
        println!(
            "{region:34} {:>10} {:>10} {:>10} {:>12}",
            of(Outcome::Harmless),
            of(Outcome::Refused),
            of(Outcome::Reported),
            of(Outcome::LastCommitLost)
        );
    }
}

#[test]
fn of_a_closed_store_no_flipped_bit_is_believed() {
    let started = Instant::now();
    let subject = closed();
    let bytes: usize = subject.sim.files().iter().map(|path| subject.sim.read_file(path).len()).sum();
    assert!(bytes >= 1 << 20, "{bytes}");
    let runs = subject.sim.files().iter().filter(|path| path.extension().is_some_and(|kind| kind == "idx")).count();
    assert!(runs >= 3, "{runs}");
    let counts = flip_everything(&subject, u64::MAX).unwrap_or_else(|wrong| panic!("{wrong}"));
    print(&format!("a closed store of {bytes} bytes, {:.1} s", started.elapsed().as_secs_f64()), &counts);
}

#[test]
fn of_a_compacted_store_no_flipped_bit_is_believed() {
    let started = Instant::now();
    let (subject, _) = compacted();
    let bytes: usize = subject.sim.files().iter().map(|path| subject.sim.read_file(path).len()).sum();
    let counts = flip_everything(&subject, u64::MAX).unwrap_or_else(|wrong| panic!("{wrong}"));
    print(&format!("a compacted store of {bytes} bytes, {:.1} s", started.elapsed().as_secs_f64()), &counts);
}

/// The limit of what a flipped bit can hide: a commit for which no later one can testify. That is the last one alone,
/// here, where each was synced before the next was begun; of commits that one sync served, all of the last group. A flip
/// in its frame, or in its payload where its frame did not wait for that, makes it look like a commit that a power cut
/// tore before it was acknowledged; it is then gone as a whole, and everything before it is there.
#[test]
fn of_a_store_that_nobody_closed_a_flipped_bit_hides_the_last_commit_at_most() {
    for last in [Last::Small, Last::Large, Last::Huge, Last::Delete] {
        let started = Instant::now();
        let (subject, last_commit) = killed(last);
        let counts = flip_everything(&subject, last_commit).unwrap_or_else(|wrong| panic!("{last:?}: {wrong}"));
        let lost_in = |region| counts.get(&(region, Outcome::LastCommitLost)).copied().unwrap_or_default();
        // A frame is believed or not as a whole, the zeros in it included.
        assert_eq!(lost_in(Region::Frame), 4096, "{last:?}");
        match last {
            Last::Small => assert_eq!(lost_in(Region::Value), 700 + 300),
            // The payload was durable before there was a frame to speak for it, so recovery does not look at it.
            Last::Large | Last::Huge | Last::Delete => assert_eq!(lost_in(Region::Value), 0, "{last:?}"),
        }
        let title = format!("a store killed after a last commit, {last:?}, {:.1} s", started.elapsed().as_secs_f64());
        print(&title, &counts);
    }
}

/// The harness can see: bytes that are wrong under checksums that are right, and commits that are gone, are told.
#[test]
fn a_store_that_believed_a_flipped_bit_would_be_told() {
    let (subject, last_commit) = killed(Last::Small);
    let judge = Judge { subject: &subject, last_commit };
    let all: Vec<usize> = (0..subject.asks.len()).collect();
    let spans = atlas(&subject.sim);
    let recovered = |span: &&Span| subject.resting_on(&span.path, span.range.clone()).iter().any(|(_, on)| on.open);
    // A commit that recovery reads, and that is not the last.
    let frame = spans.iter().filter(recovered).find(|span| span.region == Region::Frame && span.seq + 2 == last_commit);
    let frame = frame.expect("several commits are to be recovered");
    let live = spans.iter().find(|span| span.region == Region::Value && span.seq == frame.seq).expect("it put values");
    let flip = Flip { path: &live.path, offset: live.range.start, bit: 3, region: live.region, seq: live.seq };
    let open = |disk: &SimStorage| subject.open(disk).unwrap();

    let disk = subject.disk();
    disk.flip_bit(flip.path, flip.offset, flip.bit);
    let store = open(&disk);
    assert_eq!(judge.ask(&store, flip, &all), Ok(Outcome::Reported));
    store.abandon();
    bless(&disk, bless_payloads);
    let store = open(&disk);
    let told = judge.ask(&store, flip, &all).expect_err("its checksums agree with the flipped bit");
    assert!(told.contains("wrong data"), "{told}");
    store.abandon();

    // The last commit, lost for a flip that is not in it; and the last two.
    let cut = |disk: &SimStorage, seq: u64| {
        let frame = spans.iter().find(|span| span.region == Region::Frame && span.seq == seq).unwrap();
        frame.range.clone().for_each(|offset| disk.flip_bit(&frame.path, offset, 0));
    };
    let disk = subject.disk();
    cut(&disk, last_commit);
    let store = open(&disk);
    let told = judge.ask(&store, flip, &all).expect_err("a commit is missing");
    assert!(told.contains("instead of") || told.contains("missing"), "{told}");
    store.abandon();
    let disk = subject.disk();
    cut(&disk, last_commit);
    cut(&disk, last_commit - 1);
    let in_last = Flip { seq: last_commit, ..flip };
    let store = open(&disk);
    judge.ask(&store, in_last, &all).expect_err("two commits are missing");
    store.abandon();
}

/// Values with a checksum for each MiB: whole, by ranges and as a stream.
#[test]
fn a_flipped_bit_in_one_chunk_of_a_long_value_spoils_that_chunk_alone() {
    const CHUNK: u64 = 1 << 20;
    let options = |sim: &SimStorage| options(sim).small_commit_bytes_max(1 << 20);
    let sim = SimStorage::new();
    sim.stop_recording();
    let store = options(&sim).create_new(true).open(PATH).unwrap();
    let long = value(7, 2 * CHUNK as usize + 5000);
    store.put("long", &long).unwrap();
    store.close().unwrap();
    let store = options(&sim).open(PATH).unwrap();
    let range = |chunk: u64| chunk * CHUNK + 10..chunk * CHUNK + 20;
    let read_all = |store: &Store| {
        let whole = store.get("long", &Device::host()).and_then(|tensor| tensor.to_host());
        let mut into = vec![0; long.len()];
        let into = store.get_into("long", &mut into).map(|_| into);
        let mut out = Vec::new();
        let streamed = store.get_to_writer("long", &mut out).map(|_| out.clone());
        assert!(long.starts_with(&out), "what was handed on is right");
        let ranges: Vec<Result<Vec<u8>, Error>> = (0..3)
            .map(|chunk| store.get_range("long", range(chunk), &Device::host()).and_then(|range| range.to_host()))
            .collect();
        ([whole, into, streamed], ranges)
    };
    let (whole, ranges) = read_all(&store);
    assert!(whole.into_iter().all(|bytes| bytes.unwrap() == long));
    assert!((0..3).all(|chunk| ranges[chunk as usize].as_ref().unwrap()[..] == long[range_of(range(chunk))]));

    let spans = atlas(&sim);
    let extent = spans.iter().find(|span| span.region == Region::Value).unwrap();
    let frame = spans.iter().find(|span| span.region == Region::Frame).unwrap();
    let mut flips = 0;
    for at in (0..long.len() as u64).step_by(20_011).chain([CHUNK - 1, CHUNK, 2 * CHUNK + 4999]) {
        sim.flip_bit(&extent.path, extent.range.start + at, (mixed(seed(), at) % 8) as u8);
        let (whole, ranges) = read_all(&store);
        for answer in whole {
            assert!(answer.as_ref().is_err_and(Error::is_damage), "byte {at}: {answer:?}");
        }
        for (chunk, answer) in (0..3).zip(ranges) {
            if at / CHUNK == chunk {
                assert!(answer.as_ref().is_err_and(Error::is_damage), "byte {at}, chunk {chunk}");
            } else {
                assert_eq!(answer.unwrap(), long[range_of(range(chunk))], "byte {at}, chunk {chunk}");
            }
        }
        sim.flip_bit(&extent.path, extent.range.start + at, (mixed(seed(), at) % 8) as u8);
        flips += 1;
    }
    // The chunks' checksums lie in the frame; the whole value's in the index too.
    for at in frame.range.clone().step_by(7) {
        sim.flip_bit(&frame.path, at, (mixed(seed(), at) % 8) as u8);
        let answer = store.get_range("long", range(2), &Device::host());
        assert!(answer.as_ref().is_err_and(Error::is_damage), "byte {at} of the frame: {answer:?}");
        if at % 49 == 0 {
            assert!(store.get("long", &Device::host()).unwrap().to_host().unwrap() == long);
        }
        sim.flip_bit(&frame.path, at, (mixed(seed(), at) % 8) as u8);
        flips += 1;
    }
    println!("{flips} flips of a value of {} bytes and of its frame", long.len());
    store.abandon();
}

fn range_of(range: Range<u64>) -> Range<usize> {
    range.start as usize..range.end as usize
}
