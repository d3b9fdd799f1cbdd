//! Readers beside a writer, in this process and in others: a view that does not change, and moves on when it is asked to.
//!
//! `ALIGHT_READERS_SECONDS=N` lets four processes read beside a busy writer for N seconds instead of 3.

mod common;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use alight::storage::sim::{Abilities, Call, Event, Fault, FaultKind, OpKind, SimStorage};
use alight::storage::{FileStorage, Storage};
use alight::{CompactOptions, Device, Durability, Error, Store};
use common::bytes;
use common::tiny::{contents, tiny_on as on};

const PATH: &str = "/store";

#[test]
fn a_refresh_moves_a_reader_and_its_clones_on_and_leaves_snapshots_as_they_were() {
    let sim = SimStorage::new();
    let writer = on(&sim).create_new(true).open(PATH).unwrap();
    writer.put("a", b"first").unwrap();
    let reader = on(&sim).read_only(true).open(PATH).unwrap();
    let (clone, snapshot) = (reader.clone(), reader.snapshot());
    assert!(!reader.refresh().unwrap(), "nothing is new");
    let before = contents(&reader).unwrap();
    for n in 0..40u64 {
        // Single commits that no manifest knows of, segments that no manifest names, runs that replace others.
        writer.put(format!("k{}", n % 7), &bytes(n, [300, 5000, 9000, 30_000][(n % 4) as usize])).unwrap();
        if n % 6 == 5 {
            writer.delete("a").unwrap();
        }
        assert_eq!(contents(&clone).unwrap().contains_key(&b"a"[..]), n <= 5, "as of the last refresh");
        assert!(reader.refresh().unwrap(), "commit {n}");
        assert_eq!(contents(&clone).unwrap(), contents(&writer).unwrap(), "commit {n}");
        assert_eq!(reader.stat().unwrap().last_commit, writer.stat().unwrap().last_commit);
        assert!(!reader.refresh().unwrap());
        assert_eq!(snapshot.get("a", &Device::host()).unwrap().to_host().unwrap(), b"first");
    }
    assert_eq!(snapshot.scan("").count(), before.len());
    writer.close().unwrap();
    reader.refresh().unwrap();
    let writer = on(&sim).open(PATH).unwrap();
    assert!(!writer.refresh().unwrap(), "a writer is at its newest");
    assert_eq!(contents(&reader).unwrap(), contents(&writer).unwrap());
    reader.close().unwrap();
    assert!(matches!(clone.refresh(), Err(Error::Closed)));
    assert!(matches!(snapshot.contains("a"), Err(Error::Closed)));
}

/// The story: a segment without commits was taken away by the next process and its number given anew by the one after that, and
/// a reader looked for news in the new file as if it were the old one.
#[test]
fn a_reader_sees_that_a_segment_without_commits_became_another() {
    let sim = SimStorage::new();
    let writer = on(&sim).create_new(true).open(PATH).unwrap();
    // The header is written, and no commit.
    sim.inject(Fault::new(FaultKind::Eio, 1).on(OpKind::Write).path_ending(".seg"));
    writer.put("a", b"none").unwrap_err();
    let reader = on(&sim).read_only(true).open(PATH).unwrap();
    writer.abandon();
    on(&sim).open(PATH).unwrap().abandon();
    assert!(!sim.has_file("/store/segments/00000001.seg"));
    let writer = on(&sim).open(PATH).unwrap();
    writer.put("a", b"some").unwrap();
    assert!(sim.has_file("/store/segments/00000001.seg"));
    assert!(reader.refresh().unwrap());
    assert_eq!(contents(&reader).unwrap(), contents(&writer).unwrap());
}

#[test]
fn a_refresh_with_no_news_touches_little() {
    let sim = SimStorage::new();
    let writer = on(&sim).create_new(true).open(PATH).unwrap();
    for n in 0..200u64 {
        writer.put(format!("k{n}"), &bytes(n, 3000)).unwrap();
    }
    let reader = on(&sim).read_only(true).open(PATH).unwrap();
    sim.start_recording();
    assert!(!reader.refresh().unwrap());
    let trace = sim.trace();
    let calls: Vec<&Call> =
        trace.events().filter_map(|event| if let Event::Call(call) = event { Some(call) } else { None }).collect();
    assert!(calls.len() < 20, "{trace}");
    assert!(calls.iter().all(|call| !call.path.to_str().unwrap().contains("index")), "{trace}");
    // And where there are news, runs that are open already are not opened again.
    writer.put("one more", b"value").unwrap();
    sim.start_recording();
    assert!(reader.refresh().unwrap());
    let opens = |event: &Event| matches!(event, Event::Call(call) if call.op == OpKind::Open && call.path.extension().is_some_and(|kind| kind == "idx"));
    assert!(!sim.trace().events().any(opens), "{}", sim.trace());
}

#[test]
fn a_refresh_that_fails_at_any_call_leaves_the_old_view() {
    let kinds = [FaultKind::Eio, FaultKind::EioAfter, FaultKind::Enospc, FaultKind::Eintr, FaultKind::Short];
    let mut failed = 0;
    for nth in 0.. {
        let mut struck = 0;
        for kind in kinds {
            for from_then_on in [false, true] {
                if from_then_on && kind == FaultKind::Eintr {
                    continue;
                }
                let sim = SimStorage::new();
                let writer = on(&sim).create_new(true).open(PATH).unwrap();
                (0..9u64).for_each(|n| writer.put(format!("k{n}"), &bytes(n, 4000)).unwrap());
                let reader = on(&sim).read_only(true).open(PATH).unwrap();
                let (old, handle) = (contents(&reader).unwrap(), reader.snapshot());
                (0..20u64).for_each(|n| writer.put(format!("k{}", n % 12), &bytes(50 + n, 4000)).unwrap());
                let new = contents(&writer).unwrap();
                let fault = Fault::new(kind, nth);
                sim.inject(if from_then_on { fault.from_then_on() } else { fault });
                let outcome = reader.refresh();
                struck += sim.faults_struck();
                sim.clear_faults();
                let told = format!("{kind:?} of call {nth}, from then on: {from_then_on}");
                match outcome {
                    Ok(true) => assert_eq!(contents(&reader).unwrap(), new, "{told}"),
                    Ok(false) => panic!("{told}: news are overlooked"),
                    Err(Error::Io { .. } | Error::Damaged(_)) => {
                        failed += 1;
                        assert_eq!(contents(&reader).unwrap(), old, "{told}");
                        assert!(reader.refresh().unwrap(), "{told}");
                        assert_eq!(contents(&reader).unwrap(), new, "{told}");
                    }
                    Err(error) => panic!("{told}: an error of no fitting kind: {error}"),
                }
                let then = handle.get("k3", &Device::host()).unwrap().to_host().unwrap();
                assert_eq!(then, old[&b"k3"[..]], "{told}");
            }
        }
        if struck == 0 {
            assert!(nth > 15 && failed > 50, "{nth} calls, {failed} failed");
            return;
        }
    }
}

/// The story of a reader that no writer can see: it has no lock, since there are none here.
#[test]
fn a_reader_that_is_not_seen_is_told_that_its_view_is_gone_and_never_gets_wrong_bytes() {
    let sim = SimStorage::new();
    sim.set_abilities(Abilities { share_bytes: false, ..Abilities::default() });
    let writer = on(&sim).create_new(true).open(PATH).unwrap();
    for n in 0..30u64 {
        writer.put(format!("k{n}"), &bytes(n, 5000)).unwrap();
    }
    let open = || on(&sim).read_only(true).open(PATH).unwrap();
    let (unlinked, punched, damaged) = (open(), open(), open());
    // What a writer would give back: here it is done behind everybody's back.
    let mut segment = sim.read_file("/store/segments/00000001.seg");
    let zeros = vec![0; segment.len() - 8192];
    segment.splice(8192.., zeros);
    sim.write_file("/store/segments/00000001.seg", &segment);
    let get = |store: &Store| store.get("k0", &Device::host()).map(drop);
    assert!(matches!(get(&damaged), Err(Error::Damaged(_))), "the manifest is the same: that is damage");
    for n in 0..30u64 {
        writer.put(format!("k{n}"), &bytes(100 + n, 5000)).unwrap();
    }
    assert!(matches!(get(&punched), Err(Error::Outdated { .. })), "{:?}", get(&punched));
    assert!(matches!(punched.get_range("k0", 0..10, &Device::host()), Err(Error::Outdated { .. })));
    assert!(matches!(punched.get_into("k0", &mut [0; 5000]), Err(Error::Outdated { .. })));
    assert!(matches!(punched.get_to_writer("k0", &mut Vec::new()), Err(Error::Outdated { .. })));
    sim.remove_file("/store/segments/00000001.seg");
    assert!(matches!(get(&unlinked), Err(Error::Outdated { .. })), "{:?}", get(&unlinked));
}

// Readers in other processes.

const PAIRS: u64 = 40;

/// The value of one side of a pair as of its `round`: whoever reads it knows what it has to be.
fn value(pair: u64, side: u64, round: u64) -> Vec<u8> {
    let mut value = bytes(pair << 40 | side << 32 | round, 100 + ((pair * 13 + round * 7) % 9000) as usize);
    value[..8].copy_from_slice(&round.to_le_bytes());
    value
}

/// What a reader does until the key `done` is there: moves on, and compares. Both sides of a pair are committed together.
fn read_until_done(path: &Path) {
    let open = || Store::options().read_only(true).open(path).unwrap();
    let (mut store, mut last) = (open(), vec![0u64; PAIRS as usize]);
    let (mut reads, mut refreshes, mut slowest) = (0u64, 0u64, Duration::ZERO);
    for turn in 0u64.. {
        // Now and then from the beginning, as a process that was just started.
        if turn % 50 == 49 {
            store = open();
        }
        refreshes += u64::from(store.refresh().unwrap());
        let snapshot = store.snapshot();
        for pair in (0..PAIRS).filter(|pair| (pair + turn) % 3 == 0) {
            let started = Instant::now();
            let keys = [format!("{pair}-0"), format!("{pair}-1")];
            let sides = match snapshot.get_many(&keys, &Device::host()) {
                Ok(sides) => sides,
                Err(Error::NotFound(_)) => {
                    assert!(!snapshot.contains(&keys[0]).unwrap() && !snapshot.contains(&keys[1]).unwrap());
                    continue;
                }
                Err(error) => panic!("{error}"),
            };
            slowest = slowest.max(started.elapsed());
            let round = u64::from_le_bytes(sides[0].as_host().unwrap()[..8].try_into().unwrap());
            for (side, tensor) in sides.iter().enumerate() {
                assert!(tensor.as_host().unwrap() == value(pair, side as u64, round), "pair {pair}, round {round}");
            }
            assert!(round >= last[pair as usize], "pair {pair} went from round {} to {round}", last[pair as usize]);
            last[pair as usize] = round;
            reads += 1;
        }
        if store.contains("done").unwrap() {
            break;
        }
        // Once: nobody reads more of the pipe before the end, and whoever fills it waits for ever.
        if turn == 0 {
            println!("turn {turn}");
        }
    }
    println!("{reads} pairs read, {refreshes} refreshes, the slowest read took {slowest:?}");
}

/// The child's entry: an ordinary test that does nothing unless it is told to.
#[test]
fn child() {
    let Ok(path) = std::env::var("ALIGHT_READERS_STORE") else { return };
    read_until_done(Path::new(&path));
}

fn spawn_reader(path: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--nocapture", "--test-threads", "1"])
        .env("ALIGHT_READERS_STORE", path)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Whether any reader, wherever it runs, holds a generation of the store.
fn is_held(path: &Path) -> bool {
    match FileStorage::new().lowest_shared_byte(&path.join("READERS"), u64::MAX >> 2) {
        Ok(held) => held.is_some(),
        Err(error) => {
            eprintln!("SKIPPED in part: readers cannot be seen here: {error}");
            false
        }
    }
}

#[test]
fn readers_in_four_processes_see_every_value_right_while_the_store_changes() {
    let seconds = std::env::var("ALIGHT_READERS_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(3);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let options = || Store::options().create(true).segment_bytes(256 << 10).overlay_entries_max(64);
    let mut store = options().open(&path).unwrap();
    let mut rounds = vec![0u64; PAIRS as usize];
    let mut commit = |store: &Store, n: u64| {
        let pair = n * 7 % PAIRS;
        let round = rounds[pair as usize] + 1;
        let sides = [value(pair, 0, round), value(pair, 1, round)];
        let mut batch = store.batch();
        for (side, bytes) in sides.iter().enumerate() {
            let key = format!("{pair}-{side}");
            if n % 29 == 13 { batch.delete(key).unwrap() } else { batch.put(key, bytes).unwrap() }
        }
        batch.durability(if n.is_multiple_of(3) { Durability::Eventual } else { Durability::Immediate });
        batch.commit().unwrap();
        rounds[pair as usize] = round;
    };
    (0..PAIRS).for_each(|n| commit(&store, n));
    let mut readers: Vec<Child> = (0..4).map(|_| spawn_reader(&path)).collect();
    let started = Instant::now();
    let (mut n, mut rewritten) = (PAIRS, 0);
    while started.elapsed() < Duration::from_secs(seconds) || n < 600 {
        commit(&store, n);
        n += 1;
        if n.is_multiple_of(200) {
            let report = store.compact(&CompactOptions::default(), |_| {}).unwrap();
            rewritten += report.segments_rewritten;
        }
        if n.is_multiple_of(500) {
            // A new writer: it recovers, settles, and writes manifests.
            store.close().unwrap();
            store = options().open(&path).unwrap();
        }
    }
    store.put("done", b"").unwrap();
    for reader in &mut readers {
        let lines: Vec<String> = BufReader::new(reader.stdout.take().unwrap()).lines().map_while(Result::ok).collect();
        assert!(reader.wait().unwrap().success(), "{lines:?}");
        let told = lines.iter().find(|line| line.contains("pairs read")).unwrap();
        println!("{told}");
        assert!(!told.starts_with("0 pairs"), "{told}");
    }
    println!("beside {n} commits and the rewriting of {rewritten} segments");
    assert!(rewritten > 0);
    assert!(!is_held(&path), "readers that ended hold nothing");
    assert!(store.verify(|_| {}).unwrap().is_sound());
    // What was kept for them goes now.
    store.compact(&CompactOptions::default(), |_| {}).unwrap();
    assert_eq!(store.stat().unwrap().pinned_bytes, 0);
    store.close().unwrap();
}

#[test]
fn a_reader_that_is_killed_holds_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let store = Store::options().create(true).open(&path).unwrap();
    store.put("0-0", &value(0, 0, 1)).unwrap();
    store.put("0-1", &value(0, 1, 1)).unwrap();
    let mut reader = spawn_reader(&path);
    let mut lines = BufReader::new(reader.stdout.take().unwrap()).lines();
    while !lines.next().unwrap().unwrap().contains("turn") {}
    let held = is_held(&path);
    reader.kill().unwrap();
    reader.wait().unwrap();
    if !held {
        return eprintln!("SKIPPED: readers cannot be seen here");
    }
    assert!(!is_held(&path));
}
