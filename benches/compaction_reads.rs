//! How long gets take while compaction runs beside them, and while it does not.
//!
//! `cargo bench --bench compaction_reads [-- PAIRS [MIB]]`: five pairs of phases for each length of value, each with 384 MiB to
//! be copied, where nothing is said. The store lies in a temporary folder (`TMPDIR`) of some 2.5 GiB, and is removed at the end.
//! While it is measured its options are those that a store has when nothing is asked for.
//!
//! Two threads get values in random order, one after another: of 4 KiB, out of the page cache; and of 1 MiB, which were put past
//! the page cache and are read past it, from the disk. Phases without compaction and with it take turns on the same store. For
//! each pair, other values are put of which every second is deleted: half of their segments is dead, in places too short
//! for holes. A large value that dies then wakes the store's own thread, which rewrites them at its usual pace. Only gets
//! during which it was copying are counted.
//!
//! Exits with 1 where the 99th percentile with compaction is more than twice that without.

mod common;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use alight::{Device, Store};
use common::Random;

const MIB: usize = 1 << 20;
const READERS: u64 = 2;
/// The values that are got: how many, and how long.
const SMALL: (usize, usize) = (20_000, 4 << 10);
const LARGE: (usize, usize) = (512, 1 << 20);
/// Shorter than a hole that is punched.
const COPIED: usize = 12 << 10;
/// What dies so that the store's thread looks for work: more than an eighth of what lives.
const DYING: usize = 320 * MIB;
/// A phase without compaction.
const ALONE: Duration = Duration::from_secs(3);
const AT_MOST: f64 = 2.0;

fn below(random: &mut Random, n: usize) -> usize {
    (random.next() >> 16) as usize % n
}

fn noise(bytes: usize) -> Vec<u8> {
    let mut random = Random(0x9E37_79B9_7F4A_7C15);
    (0..bytes / 8).flat_map(|_| random.next().to_le_bytes()).collect()
}

/// Puts `count` values of `len` bytes, under `name` and their numbers.
fn put(store: &Store, name: &str, count: usize, len: usize, source: &[u8]) {
    let per_batch = (8 * MIB / len).max(1);
    for first in (0..count).step_by(per_batch) {
        let mut batch = store.batch();
        for n in first..(first + per_batch).min(count) {
            let from = n * 64 % (source.len() - len);
            batch.put(format!("{name}.{n}"), &source[from..from + len]).expect("put");
        }
        batch.commit().expect("commit");
    }
}

/// Deletes those of the values whose number `dies`.
fn delete(store: &Store, name: &str, count: usize, dies: impl Fn(usize) -> bool) {
    let numbers: Vec<usize> = (0..count).filter(|&n| dies(n)).collect();
    for some in numbers.chunks(4096) {
        let mut batch = store.batch();
        some.iter().for_each(|n| batch.delete(format!("{name}.{n}")).expect("delete"));
        batch.commit().expect("commit");
    }
}

/// Has the page cache take in what the store's files hold now.
fn warm(path: &Path) {
    for entry in std::fs::read_dir(path.join("segments")).expect("a store").flatten() {
        std::fs::read(entry.path()).expect("a segment");
    }
}

/// How long single gets took, those that began and ended while `during` was true.
fn gets(
    store: &Store,
    name: &str,
    (count, len): (usize, usize),
    during: &AtomicBool,
    done: &AtomicBool,
) -> Vec<Duration> {
    let reader = |number: u64| {
        let (mut random, mut times) = (Random(number * 7919 + 1), Vec::new());
        let host = Device::host();
        while !done.load(Ordering::Acquire) {
            let key = format!("{name}.{}", below(&mut random, count));
            let counts = during.load(Ordering::Acquire);
            let began = Instant::now();
            let got = store.get(&key, &host).expect("every value is there");
            let took = began.elapsed();
            assert_eq!(got.len_bytes(), len as u64);
            if counts && during.load(Ordering::Acquire) {
                times.push(took);
            }
        }
        times
    };
    std::thread::scope(|scope| {
        let readers: Vec<_> = (1..=READERS).map(|number| scope.spawn(move || reader(number))).collect();
        readers.into_iter().flat_map(|reader| reader.join().expect("a reader")).collect()
    })
}

/// Gets with no compaction beside them.
fn alone(store: &Store, name: &str, values: (usize, usize)) -> Vec<Duration> {
    let (during, done) = (AtomicBool::new(true), AtomicBool::new(false));
    let before = store.metrics().bytes_compacted;
    let times = std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(ALONE);
            done.store(true, Ordering::Release);
        });
        gets(store, name, values, &during, &done)
    });
    assert_eq!(store.metrics().bytes_compacted, before, "nothing was copied meanwhile");
    times
}

/// Gets while compaction is copying; and how much it copied, in what time.
fn beside(store: &Store, name: &str, values: (usize, usize)) -> (Vec<Duration>, u64, Duration) {
    let (during, done) = (AtomicBool::new(false), AtomicBool::new(false));
    let copied = || store.metrics().bytes_compacted;
    std::thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let before = copied();
            let patience = Instant::now();
            while copied() == before {
                assert!(patience.elapsed() < Duration::from_secs(30), "compaction does not begin");
                std::thread::sleep(Duration::from_millis(1));
            }
            during.store(true, Ordering::Release);
            let (began, first) = (Instant::now(), copied());
            let (mut latest, mut at) = (first, began);
            // At its usual pace it copies something every quarter of a second.
            while at.elapsed() < Duration::from_millis(600) {
                std::thread::sleep(Duration::from_millis(5));
                if copied() > latest {
                    (latest, at) = (copied(), Instant::now());
                }
                during.store(at.elapsed() < Duration::from_millis(300), Ordering::Release);
            }
            during.store(false, Ordering::Release);
            done.store(true, Ordering::Release);
            (latest - first, at - began)
        });
        let times = gets(store, name, values, &during, &done);
        let (bytes, time) = watch.join().expect("the watch");
        (times, bytes, time)
    })
}

fn percentile(times: &mut [Duration], percent: usize) -> Duration {
    times.sort_unstable();
    times[(times.len() - 1) * percent / 100]
}

fn main() {
    let numbers: Vec<usize> = std::env::args().skip(1).filter_map(|argument| argument.parse().ok()).collect();
    let (pairs, copied_mib) = (numbers.first().copied().unwrap_or(5), numbers.get(1).copied().unwrap_or(384));
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("store");
    let source = noise(DYING + MIB);
    let store = Store::options().create_new(true).background_compaction(None).open(&path).expect("create");
    put(&store, "small", SMALL.0, SMALL.1, &source);
    store.close().expect("close");
    warm(&path);
    let store = Store::options().background_compaction(None).open(&path).expect("open");
    put(&store, "large", LARGE.0, LARGE.1, &source);
    store.put("dying", &source[..DYING]).expect("put");
    store.close().expect("close");

    let count = 2 * copied_mib * MIB / COPIED;
    println!("                  alone                  beside compaction");
    println!("  get of        p50        p99        p50        p99   p99's ratio   copied at");
    let mut missed = false;
    for (name, values) in [("small", SMALL), ("large", LARGE)] {
        let (mut without, mut with, mut bytes, mut time) = (Vec::new(), Vec::new(), 0, Duration::ZERO);
        for pair in 0..pairs {
            let store = Store::options().background_compaction(None).open(&path).expect("open");
            let copied = format!("{name}.{pair}");
            put(&store, &copied, count, COPIED, &source);
            delete(&store, &copied, count, |n| n % 2 == 0);
            store.close().expect("close");
            let store = Store::open(&path).expect("open");
            without.extend(alone(&store, name, values));
            store.put("dying", &source[..DYING]).expect("put");
            let (times, copied_bytes, copied_time) = beside(&store, name, values);
            with.extend(times);
            bytes += copied_bytes;
            time += copied_time;
            delete(&store, &copied, count, |n| n % 2 == 1);
            store.close().expect("close");
        }
        let [p50, p99] = [50, 99].map(|percent| percentile(&mut without, percent));
        let [p50_beside, p99_beside] = [50, 99].map(|percent| percentile(&mut with, percent));
        let ratio = p99_beside.as_secs_f64() / p99.as_secs_f64();
        missed |= ratio > AT_MOST;
        let rate = bytes as f64 / MIB as f64 / time.as_secs_f64();
        let len = values.1 >> 10;
        println!(
            "{len:5} KiB {p50:>10.1?} {p99:>10.1?} {p50_beside:>10.1?} {p99_beside:>10.1?} {ratio:13.2}   {rate:.0} MiB/s  ({} and {} gets)",
            without.len(),
            with.len()
        );
    }
    std::process::exit(i32::from(missed));
}
