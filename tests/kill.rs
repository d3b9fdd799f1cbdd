//! A process that writes from eight threads, compacts and reads is killed at any moment, on the real file system; the next one finds every
//! commit that was acknowledged, and no key that was deleted.
//!
//! `ALIGHT_KILL_ROUNDS=N` kills N processes instead of 50.

mod common;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use alight::{CompactOptions, Device, Store, StoreOptions};
use common::bytes;

const THREADS: u64 = 8;
/// How many of a thread's keys live at a time: each commit deletes the one that falls out.
const LIVING: u64 = 5;

fn options() -> StoreOptions {
    // Small, so that segments roll and the index is written out many times in a round.
    Store::options().create(true).segment_bytes(1 << 20).overlay_entries_max(64)
}

fn value(thread: u64, n: u64) -> Vec<u8> {
    // Every seventh is a large commit, with two syncs.
    bytes(thread << 32 | n, if n % 7 == 3 { 300_000 } else { 1 + (n as usize * 97) % 6000 })
}

/// What the child does until it is killed: commits, and tells of each that was acknowledged.
fn write_until_killed(path: &Path, from: &[u64]) {
    let store = options().open(path).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            loop {
                // What a snapshot sees stays, whatever goes meanwhile.
                let snapshot = store.snapshot();
                store.compact(&CompactOptions::default(), |_| {}).unwrap();
                for info in snapshot.scan("") {
                    snapshot.get(info.unwrap().key, &Device::host()).unwrap();
                }
            }
        });
        for thread in 0..THREADS {
            let store = store.clone();
            let first = from[thread as usize];
            scope.spawn(move || {
                for n in first.. {
                    let value = value(thread, n);
                    let mut batch = store.batch();
                    batch.put(format!("{thread}-{n}"), &value).unwrap();
                    if n >= LIVING {
                        batch.delete(format!("{thread}-{}", n - LIVING)).unwrap();
                    }
                    batch.commit().unwrap();
                    // One write of one line: the pipe takes it whole.
                    let mut out = std::io::stdout().lock();
                    out.write_all(format!("ack {thread} {n}\n").as_bytes()).unwrap();
                    out.flush().unwrap();
                }
            });
        }
    });
}

/// The child's entry: an ordinary test that does nothing unless it is told to.
#[test]
fn child() {
    let Ok(path) = std::env::var("ALIGHT_KILL_STORE") else { return };
    let from: Vec<u64> =
        std::env::var("ALIGHT_KILL_FROM").unwrap().split(',').map(|number| number.parse().unwrap()).collect();
    write_until_killed(Path::new(&path), &from);
}

#[test]
fn nothing_acknowledged_is_lost_and_nothing_deleted_comes_back() {
    let rounds: u64 = std::env::var("ALIGHT_KILL_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(50);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let mut next = vec![0u64; THREADS as usize];
    let mut commits = 0;
    for round in 0..rounds {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--nocapture", "--test-threads", "1"])
            .env("ALIGHT_KILL_STORE", &path)
            .env("ALIGHT_KILL_FROM", next.iter().map(u64::to_string).collect::<Vec<_>>().join(","))
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut acknowledged: BTreeMap<u64, u64> = BTreeMap::new();
        // It is killed a little after some number of acknowledgements, another in each round, in the middle of others.
        let enough = 20 + round * 37 % 150;
        let mut killed = false;
        let mut seen = 0;
        while let Some(Ok(line)) = lines.next() {
            // What it said before it died counts, also what is read after.
            let mut words = line.split(' ').skip_while(|word| *word != "ack").skip(1);
            let (Some(thread), Some(n)) = (words.next(), words.next()) else { continue };
            acknowledged.insert(thread.parse().unwrap(), n.parse().unwrap());
            seen += 1;
            if seen >= enough && !killed {
                std::thread::sleep(Duration::from_micros(round * 311 % 4000));
                child.kill().unwrap();
                killed = true;
            }
        }
        child.wait().unwrap();
        assert!(killed, "round {round}: the child ended by itself after {seen} commits");
        commits += seen;

        let store = options().open(&path).unwrap_or_else(|error| panic!("round {round}: {error}"));
        for thread in 0..THREADS {
            let prefix = format!("{thread}-");
            let mut there: Vec<u64> = store
                .scan(&prefix)
                .map(|info| info.unwrap().key.as_str().unwrap()[prefix.len()..].parse().unwrap())
                .collect();
            there.sort_unstable();
            let last = there.last().copied();
            let promised = acknowledged.get(&thread).copied().or(next[thread as usize].checked_sub(1));
            assert!(last >= promised, "round {round}, thread {thread}: {promised:?} was promised, {last:?} is there");
            if let Some(last) = last {
                let expected: Vec<u64> = ((last + 1).saturating_sub(LIVING)..=last).collect();
                assert_eq!(there, expected, "round {round}, thread {thread}");
                for &n in &there {
                    let got = store.get(format!("{thread}-{n}"), &Device::host()).unwrap();
                    assert!(got.as_host().unwrap() == value(thread, n), "round {round}: {thread}-{n}");
                }
                next[thread as usize] = last + 1;
            }
        }
        // Sometimes the next process finds a store that was closed, mostly one that was not.
        if round % 5 == 4 { store.close().unwrap() } else { store.abandon() }
    }
    let store = options().open(&path).unwrap();
    assert!(store.verify(|_| {}).unwrap().is_sound());
    println!("{rounds} processes killed after {commits} commits that were acknowledged");
}
