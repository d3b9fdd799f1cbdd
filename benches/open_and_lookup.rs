//! How long it takes to open a store and to find a key in it, at a million keys and at ten.
//!
//! `cargo bench --bench open_and_lookup [-- KEYS…]`: 1,000,000 and 10,000,000 where nothing is said. The store lies in a
//! temporary folder (`TMPDIR`), about 350 bytes a key, and is removed at the end.

use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

use alight::{Device, Durability, Store};

fn key(n: u64) -> String {
    // The shape of a decoder's names, scattered so that neighbours in time are no neighbours in order.
    let scattered = n.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    format!("model.layers.{}.mlp.up_proj.weight.{:016x}", scattered % 61, scattered)
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

fn percentile_99(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() * 99 / 100]
}

/// Puts the keys of these numbers, in batches.
fn put(store: &Store, numbers: Range<u64>) {
    let mut n = numbers.start;
    while n < numbers.end {
        let mut batch = store.batch();
        let names: Vec<(String, [u8; 8])> = (n..(n + 5000).min(numbers.end))
            .map(|n| (key(n), n.wrapping_add(0x0123_4567_89AB_CDEF).to_le_bytes()))
            .collect();
        for (name, value) in &names {
            batch.put(name, value).expect("put");
        }
        batch.commit().expect("commit");
        n += names.len() as u64;
    }
}

fn fill(path: &Path, keys: u64) -> Duration {
    let started = Instant::now();
    let store = Store::options().create_new(true).durability(Durability::Eventual).open(path).expect("create");
    put(&store, 0..keys);
    store.close().expect("close");
    started.elapsed()
}

/// Opens and gets one key, `rounds` times; the median of the whole.
fn open_to_first_get(path: &Path, keys: u64, rounds: u64) -> (Duration, Duration) {
    let mut opens = Vec::new();
    let mut both = Vec::new();
    for round in 0..rounds {
        let started = Instant::now();
        let store = Store::open(path).expect("open");
        opens.push(started.elapsed());
        store.get(key(round * 7919 % keys), &Device::host()).expect("get");
        both.push(started.elapsed());
        store.close().expect("close");
    }
    (median(opens), median(both))
}

/// Adds keys to a store that is there until the index has four runs: as many as it has while it is written to. The store,
/// and its keys; `None` if a quarter of the keys made no four runs.
fn with_four_runs(path: &Path, keys: u64) -> Option<(Store, u64)> {
    let store = Store::options().durability(Durability::Eventual).open(path).expect("open");
    let mut total = keys;
    while total < keys + keys / 4 {
        put(&store, total..total + 5000);
        total += 5000;
        if store.stat().expect("stat").runs == 4 {
            return Some((store, total));
        }
    }
    None
}

/// The median and the 99th percentile of one kind of lookup.
#[derive(Debug, Clone, Copy)]
struct Times(Duration, Duration);

/// The times of `contains` for keys that are there, for keys that are not, and of `info`; and how many runs were asked.
fn lookups(store: &Store, keys: u64) -> ([Times; 3], u64) {
    let count = 300_000;
    let mut random = 88172645463325252u64;
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    // Warm: every block of the index has been read.
    let mut scanned = 0u64;
    for info in store.scan("") {
        info.expect("scan");
        scanned += 1;
    }
    assert_eq!(scanned, keys);
    let snapshot = store.snapshot();
    let mut times = [const { Vec::new() }; 3];
    for _ in 0..count {
        let name = key(next() % keys);
        let started = Instant::now();
        let found = snapshot.contains(&name).expect("lookup");
        times[0].push(started.elapsed());
        assert!(found);
        let name = key(keys + next() % keys);
        let started = Instant::now();
        let found = snapshot.contains(&name).expect("lookup");
        times[1].push(started.elapsed());
        assert!(!found);
        let name = key(next() % keys);
        let started = Instant::now();
        let found = snapshot.info(&name).expect("lookup");
        times[2].push(started.elapsed());
        assert!(found.is_some());
    }
    (times.map(|times| Times(median(times.clone()), percentile_99(times))), store.stat().expect("stat").runs)
}

/// A process that dies with a full overlay, and the next open.
fn open_after_a_kill(path: &Path) -> Duration {
    let mut times = Vec::new();
    for _ in 0..5 {
        let _ = std::fs::remove_dir_all(path);
        let store = Store::create(path).expect("create");
        let mut n = 0;
        // As many keys as the overlay may hold before it is written out, in commits of one batch of 32.
        while n < 16 * 1024 - 32 {
            let mut batch = store.batch();
            batch.durability(Durability::Eventual);
            let names: Vec<String> = (n..n + 32).map(key).collect();
            for name in &names {
                batch.put(name, b"value").expect("put");
            }
            batch.commit().expect("commit");
            n += 32;
        }
        store.sync().expect("sync");
        store.abandon();
        let started = Instant::now();
        let store = Store::open(path).expect("open after a kill");
        times.push(started.elapsed());
        assert_eq!(store.scan("").count() as u64, n);
        store.close().expect("close");
    }
    median(times)
}

fn report(store: &Store, keys: u64) {
    let (times, runs) = lookups(store, keys);
    print!("  {keys} keys in {runs} runs:");
    for (name, Times(median, high)) in ["contains", "contains, absent", "info"].iter().zip(times) {
        print!("  {name} p50 {} ns p99 {} ns", median.as_nanos(), high.as_nanos());
    }
    println!();
}

fn main() {
    let asked: Vec<u64> = std::env::args().skip(1).filter_map(|argument| argument.parse().ok()).collect();
    let sizes = if asked.is_empty() { vec![1_000_000, 10_000_000] } else { asked };
    let folder = tempfile::tempdir().expect("a temporary folder");
    for keys in sizes {
        let path = folder.path().join(format!("{keys}"));
        let filled = fill(&path, keys);
        let (open, both) = open_to_first_get(&path, keys, 31);
        println!("{keys} keys: filled in {filled:.1?}; open {open:.1?}, open and the first get {both:.1?}");
        report(&Store::options().read_only(true).open(&path).expect("open"), keys);
        if let Some((store, keys)) = with_four_runs(&path, keys) {
            report(&store, keys);
            store.close().expect("close");
        }
        std::fs::remove_dir_all(&path).expect("remove");
    }
    println!("open after a kill with a full overlay: {:.1?}", open_after_a_kill(&folder.path().join("killed")));
}
