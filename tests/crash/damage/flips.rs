//! One bit turned over, anywhere: never wrong data, never a key missing in silence, never a panic.
//!
//! `ALIGHT_FLIPS=all` turns over all eight bits of every byte instead of one, `ALIGHT_FLIPS_SEED=N` others.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use alight::storage::sim::SimStorage;
use alight::{Device, Error, Maintenance, Store, StoreOptions};
use parking_lot::Mutex;

use super::ask::{Answer, Ask, Subject};
use super::atlas::{Region, Span, atlas};
use crate::harness::words_of;
use crate::oracle::PATH;
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
const WORKERS: usize = 2;

/// Of so many flips that are judged by what rests on them, one is judged by everything as well.
const CROSS_CHECKED: u64 = 211;

fn seed() -> u64 {
    std::env::var("ALIGHT_FLIPS_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1)
}

fn mixed(a: u64, b: u64) -> u64 {
    let mut z = a.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ b.wrapping_add(0x2545_F491_4F6C_DD1D);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// The bits of a byte that are turned over.
fn bits(file: usize, offset: u64) -> Range<u8> {
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

fn told(ask: &Ask, answer: &Answer, expected: &Answer) -> String {
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
    let jobs: Vec<(usize, &Span, Range<u64>, super::ask::Resting)> = spans
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
                            let judged = catch_unwind(AssertUnwindSafe(|| {
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
                            }));
                            let judged =
                                judged.unwrap_or_else(|panic| Err(format!("the store panics: {}", words_of(&*panic))));
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
    let regions: std::collections::BTreeSet<Region> = counts.keys().map(|(region, _)| *region).collect();
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

fn options(sim: &SimStorage) -> StoreOptions {
    Store::options()
        .storage(std::sync::Arc::new(sim.clone()))
        .maintenance(Maintenance::Inline)
        .segment_bytes(96 << 10)
        .small_commit_bytes_max(16 << 10)
        .overlay_entries_max(40)
}

/// Fills a store with batches of values of many lengths, overwrites and deletes some, gives some attributes. Returns the
/// keys that were ever put.
fn fill(store: &Store, batches: u64, puts: u64, shrink: usize) -> Vec<Vec<u8>> {
    let mut keys = Vec::new();
    for n in 0..batches {
        let mut batch = store.batch();
        let lengths = [0, 1, 77, 255, 1024, 3000, 4095, 4096, 5000, 5500, 2222, 900];
        let values: Vec<(Vec<u8>, Vec<u8>)> = (0..puts)
            .map(|i| {
                let key = format!("layers.{:03}.{}", (n * 7 + i * 13) % 211, ["w", "b"][(i % 2) as usize]);
                let len = lengths[((n * 5 + i * 7) % 12) as usize];
                // Too large together for a segment that is shared with others.
                let len = if n == 11 { 5400 } else { len / shrink };
                (key.into_bytes(), value(n * 8 + i, len))
            })
            .collect();
        for (i, (key, value)) in values.iter().enumerate() {
            let attributes = if i == 2 { vec![("step".to_owned(), vec![n as u8; 40])] } else { Vec::new() };
            batch.put_with_attributes(key, value, attributes).unwrap();
            keys.push(key.clone());
        }
        if n % 3 == 2 {
            batch.delete(format!("layers.{:03}.w", (n * 7 - 14) % 211)).unwrap();
        }
        batch.commit().unwrap();
    }
    keys.sort();
    keys.dedup();
    keys
}

fn asks(keys: &[Vec<u8>]) -> Vec<Ask> {
    let values = keys.iter().cloned().map(Ask::Value);
    let attributes = keys.iter().step_by(3).cloned().map(Ask::Attributes);
    [Ask::Scan].into_iter().chain(values).chain(attributes).chain([Ask::Value(b"never put".to_vec())]).collect()
}

/// A store of 1 MiB and more, closed.
fn closed() -> Subject {
    let sim = SimStorage::new();
    sim.stop_recording();
    let store = options(&sim).create_new(true).open(PATH).unwrap();
    let keys = fill(&store, 36, 8, 1);
    store.close().unwrap();
    // A third index run, with a newer value and a delete.
    let store = options(&sim).open(PATH).unwrap();
    store.put(&keys[3], &value(1, 600)).unwrap();
    store.delete(&keys[5]).unwrap();
    store.close().unwrap();
    Subject::new(sim, options, asks(&keys), Vec::new())
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

/// Smaller segments: of a store that was not closed, every byte behind its last commit counts for an open too.
fn small_options(sim: &SimStorage) -> StoreOptions {
    options(sim).segment_bytes(32 << 10).small_commit_bytes_max(4 << 10).overlay_entries_max(18)
}

/// What the last commit of a store is that nobody closes.
#[derive(Debug, Clone, Copy)]
enum Last {
    Small,
    /// Its payload was synced before its frame.
    Large,
    /// In a segment of its own.
    Huge,
    Delete,
}

/// A store whose process was killed after its last commit was acknowledged; the number of that commit; what it answers,
/// and what it answered one commit before.
fn killed(last: Last) -> (Subject, u64) {
    let build = |with_last: bool| {
        let sim = SimStorage::new();
        sim.stop_recording();
        let store = small_options(&sim).create_new(true).open(PATH).unwrap();
        let mut keys = fill(&store, 7, 4, 6);
        let fresh = b"last".to_vec();
        if with_last {
            let mut batch = store.batch();
            let (one, two) = match last {
                Last::Small => (value(1, 700), value(2, 300)),
                Last::Large => (value(1, 3800), value(2, 400)),
                Last::Huge => (value(1, 6000), value(2, 3000)),
                Last::Delete => (Vec::new(), Vec::new()),
            };
            if !matches!(last, Last::Delete) {
                batch.put(&fresh, &one).unwrap();
                batch.put(&keys[2], &two).unwrap();
            }
            batch.delete(&keys[4]).unwrap();
            batch.commit().unwrap();
        }
        let last_commit = store.stat().unwrap().last_commit;
        keys.push(fresh);
        let asks = asks(&keys);
        let answers = asks.iter().map(|ask| ask.of(&store).unwrap()).collect::<Vec<_>>();
        store.abandon();
        (sim, asks, answers, last_commit)
    };
    let (_, _, before_last, _) = build(false);
    let (sim, asks, now, last_commit) = build(true);
    assert!(before_last != now);
    (Subject::new(sim, small_options, asks, before_last), last_commit)
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

/// Bytes that a verification can tell apart from all others: of each such unit, one is flipped at a time.
struct Unit {
    path: PathBuf,
    ranges: Vec<(Range<u64>, Region)>,
    /// Where the damage is reported, where that is known to the byte.
    offset: Option<u64>,
}

impl Unit {
    fn len(&self) -> u64 {
        self.ranges.iter().map(|(range, _)| range.end - range.start).sum()
    }

    fn byte(&self, mut nth: u64) -> Option<(u64, Region)> {
        for (range, region) in &self.ranges {
            let len = range.end - range.start;
            if nth < len {
                return Some((range.start + nth, *region));
            }
            nth -= len;
        }
        None
    }
}

/// Flips the first byte of every unit, then the second, and so on, and verifies each time: every unit must be reported.
/// Returns how many flips were reported, by region.
fn verify_reports_each(subject: &Subject, units: &[Unit]) -> BTreeMap<Region, u64> {
    let rounds = units.iter().map(Unit::len).max().unwrap_or_default();
    let files: Vec<PathBuf> = subject.sim.files();
    let (next, counts) = (AtomicU64::new(0), Mutex::new(BTreeMap::new()));
    let worker = || {
        let mut own: BTreeMap<Region, u64> = BTreeMap::new();
        loop {
            let round = next.fetch_add(1, Ordering::Relaxed);
            if round >= rounds {
                break;
            }
            let disk = subject.disk();
            let mut flipped = Vec::new();
            for unit in units {
                let Some((offset, region)) = unit.byte(round) else { continue };
                let file = files.iter().position(|path| *path == unit.path).expect("a unit is of a file");
                disk.flip_bit(&unit.path, offset, bits(file, offset).start);
                flipped.push((unit, offset, region));
            }
            let store = subject.open(&disk).unwrap_or_else(|error| panic!("round {round}: {error}"));
            let report = store.verify(|_| {}).unwrap_or_else(|error| panic!("round {round}: {error}"));
            store.abandon();
            for (unit, offset, region) in flipped {
                let named = report
                    .damages
                    .iter()
                    .any(|damage| damage.path == unit.path && (unit.offset.is_none() || damage.offset == unit.offset));
                let path = unit.path.display();
                assert!(named, "ALIGHT_FLIPS_SEED={}: not reported: byte {offset} of {path} ({region})", seed());
                *own.entry(region).or_default() += 1;
            }
        }
        let mut counts = counts.lock();
        own.into_iter().for_each(|(region, count)| *counts.entry(region).or_default() += count);
    };
    std::thread::scope(|scope| (0..WORKERS).map(|_| scope.spawn(worker)).for_each(drop));
    counts.into_inner()
}

#[test]
fn verification_reports_every_flipped_bit_but_those_between_values() {
    let started = Instant::now();
    let subject = closed();
    let spans = atlas(&subject.sim);
    // Values first: each is reported by its place, so all can be hit at once.
    let value = |span: &Span| Unit {
        path: span.path.clone(),
        offset: Some(span.range.start),
        ranges: vec![(span.range.clone(), span.region)],
    };
    let is_value = |span: &&Span| matches!(span.region, Region::Value | Region::DeadValue);
    let values: Vec<Unit> = spans.iter().filter(is_value).map(value).collect();
    let mut reported = verify_reports_each(&subject, &values);

    // Of each file then, everything else that an open does not refuse by itself: one byte at a time.
    let mut rest: BTreeMap<&PathBuf, Unit> = BTreeMap::new();
    let mut refused: BTreeMap<Region, u64> = BTreeMap::new();
    let mut unused: Vec<&Span> = Vec::new();
    for span in &spans {
        let opens = subject.resting_on(&span.path, span.range.clone()).iter().any(|(_, resting)| resting.open);
        match span.region {
            Region::Value | Region::DeadValue => {}
            Region::Padding | Region::Lock => unused.push(span),
            // `no_flipped_bit_is_believed` has shown that the open is refused.
            region if opens => *refused.entry(region).or_default() += span.range.end - span.range.start,
            region => {
                let unit = || Unit { path: span.path.clone(), ranges: Vec::new(), offset: None };
                rest.entry(&span.path).or_insert_with(unit).ranges.push((span.range.clone(), region));
            }
        }
    }
    let rest: Vec<Unit> = rest.into_values().collect();
    for (region, count) in verify_reports_each(&subject, &rest) {
        *reported.entry(region).or_default() += count;
    }

    // What is left is what no verification reports, and no reader reads: all of it at once.
    let disk = subject.disk();
    let mut between = 0;
    for span in &unused {
        for offset in span.range.clone() {
            disk.flip_bit(&span.path, offset, 0);
            between += 1;
        }
    }
    let store = subject.open(&disk).unwrap();
    assert!(store.verify(|_| {}).unwrap().is_sound());
    for (ask, expected) in subject.asks.iter().zip(&subject.now) {
        assert_eq!(ask.of(&store).unwrap(), *expected);
    }
    store.abandon();
    println!("verification, {:.1} s, ALIGHT_FLIPS_SEED={}", started.elapsed().as_secs_f64(), seed());
    for (region, count) in &reported {
        println!("{region:34} {count:>10} reported");
    }
    for (region, count) in &refused {
        println!("{region:34} {count:>10} refused by the open");
    }
    println!("{:34} {between:>10} not reported: padding between values, and the lock's words", "unused");
}
