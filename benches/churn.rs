//! How much space and how many writes a store takes that is overwritten again and again.
//!
//! `cargo bench --bench churn [-- LIVE_MIB [ROUNDS]]`: 2048 MiB that live, overwritten 10 times, where nothing is said.
//! Values are 4 KiB to 16 MiB long, as many in each octave; each round puts every key once, in another order and with
//! another length. The store lies in a temporary folder (`TMPDIR`) of up to three times the size that lives, and is removed
//! at the end. The options are those that a store has when nothing is asked for.
//!
//! Space is what the files take on the disk, looked at every 20 ms; what is written is what the kernel counts for this
//! process (`/proc/self/io`). Exits with 1 where a figure misses what is aimed at.

mod common;

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use alight::{CompactOptions, Device, Durability, Store};
use common::Random;

const MIB: u64 = 1 << 20;
const SHORTEST: u64 = 4 << 10;
const LONGEST: u64 = 16 << 20;

/// At most so much of what lives is taken, after a compaction and at any time; and of what is put, is written.
const AT_REST: f64 = 1.35;
const AT_ANY_TIME: f64 = 2.0;
const WRITTEN: f64 = 2.0;

/// From the shortest to the longest, as likely in each octave.
fn length(random: &mut Random) -> u64 {
    let octaves = (LONGEST / SHORTEST).ilog2() as f64;
    let place = (random.next() >> 11) as f64 / (1u64 << 53) as f64;
    (SHORTEST as f64 * (place * octaves).exp2()) as u64
}

/// Bytes that this process handed to the disk so far.
fn written() -> u64 {
    let counts = std::fs::read_to_string("/proc/self/io").expect("the kernel counts");
    let line = counts.lines().find_map(|line| line.strip_prefix("write_bytes: ")).expect("it counts writes");
    line.trim().parse().expect("a number")
}

fn percentile(times: &mut [Duration], percent: usize) -> Duration {
    times.sort_unstable();
    times[(times.len() - 1) * percent / 100]
}

struct Outcome {
    live: u64,
    put: u64,
    written: u64,
    most: f64,
    before_rest: u64,
    rest: u64,
    puts: Vec<Duration>,
    took: Duration,
}

fn churn(path: &Path, live_target: u64, rounds: u64) -> Outcome {
    let mut random = Random(0x9E37_79B9_7F4A_7C15);
    let source: Vec<u8> = (0..(LONGEST + 4096) / 8).flat_map(|_| random.next().to_le_bytes()).collect();
    let store = Store::options().create_new(true).durability(Durability::Immediate).open(path).expect("create");
    let mut lengths: Vec<u64> = Vec::new();
    while lengths.iter().sum::<u64>() < live_target {
        lengths.push(length(&mut random));
    }
    let done = AtomicBool::new(false);
    // What lives changes with the lengths: the ratio is taken against what lived at that moment.
    let (live, most) = (AtomicU64::new(0), AtomicU64::new(0));
    let (begun, written_before) = (Instant::now(), written());
    let (mut put, mut puts) = (0, Vec::new());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let disk = store.stat().expect("stat").disk_bytes;
                let live = live.load(Ordering::Relaxed);
                // A store that is still being filled has its first segments taken ahead.
                if live >= live_target / 2 {
                    most.fetch_max(disk * 1000 / live, Ordering::Relaxed);
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        for round in 0..=rounds {
            let mut order: Vec<usize> = (0..lengths.len()).collect();
            for at in (1..order.len()).rev() {
                order.swap(at, (random.next() % (at as u64 + 1)) as usize);
            }
            for key in order {
                let length = if round == 0 { lengths[key] } else { length(&mut random) };
                let from = (random.next() % 4096) as usize;
                let started = Instant::now();
                store.put(format!("key.{key:06}"), &source[from..from + length as usize]).expect("put");
                puts.push(started.elapsed());
                put += length;
                if round == 0 {
                    live.fetch_add(length, Ordering::Relaxed);
                } else {
                    live.fetch_add(length, Ordering::Relaxed);
                    live.fetch_sub(lengths[key], Ordering::Relaxed);
                }
                lengths[key] = length;
            }
        }
        done.store(true, Ordering::Relaxed);
    });
    let took = begun.elapsed();
    let before_rest = store.stat().expect("stat").disk_bytes;
    store.compact(&CompactOptions::default(), |_| {}).expect("compact");
    let stat = store.stat().expect("stat");
    assert_eq!(stat.live_bytes, live.load(Ordering::Relaxed), "what lives is what was put last");
    let written = written() - written_before;
    for (key, &length) in lengths.iter().enumerate() {
        let got = store.get(format!("key.{key:06}"), &Device::host()).expect("every value is there");
        assert_eq!(got.len_bytes(), length);
    }
    store.close().expect("close");
    let most = most.load(Ordering::Relaxed) as f64 / 1000.0;
    Outcome { live: stat.live_bytes, put, written, most, before_rest, rest: stat.disk_bytes, puts, took }
}

fn main() {
    let numbers: Vec<u64> = std::env::args().skip(1).filter_map(|argument| argument.parse().ok()).collect();
    let (live_mib, rounds) = (numbers.first().copied().unwrap_or(2048), numbers.get(1).copied().unwrap_or(10));
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut outcome = churn(&folder.path().join("store"), live_mib * MIB, rounds);
    let mib = |bytes: u64| bytes as f64 / MIB as f64;
    let Outcome { live, put, written, most, before_rest, rest, took, .. } = outcome;
    println!("{live_mib} MiB that live, overwritten {rounds} times: {} puts, {:.0} MiB", outcome.puts.len(), mib(put));
    println!(
        "  {:.1} s, {:.0} MiB/s; a put took {:.1?} at the median, {:.1?} at p99",
        took.as_secs_f64(),
        mib(put) / took.as_secs_f64(),
        percentile(&mut outcome.puts, 50),
        percentile(&mut outcome.puts, 99),
    );
    let of_live = |bytes: u64| bytes as f64 / live as f64;
    let mut missed = false;
    let mut line = |what: &str, ratio: f64, aim: f64, bytes: Option<u64>| {
        missed |= ratio > aim;
        let bytes = bytes.map(|bytes| format!("{:.0} MiB", mib(bytes))).unwrap_or_default();
        println!("  {what:42} {ratio:5.2} (at most {aim:.2}) {bytes}");
    };
    line("space at rest, after compaction / live", of_live(rest), AT_REST, Some(rest));
    line("space when the last put returned / live", of_live(before_rest), AT_ANY_TIME, Some(before_rest));
    line("space at any time / live", most, AT_ANY_TIME, None);
    line("bytes written / bytes put", written as f64 / put as f64, WRITTEN, Some(written));
    std::process::exit(i32::from(missed));
}
