//! Disks that are full, and stores that are.

use std::path::Path;

use alight::storage::Storage;
use alight::storage::sim::{Fault, FaultKind, OpKind, SimStorage};
use alight::{Durability, Error, Eviction, Maintenance};

use crate::PATH;
use crate::common::bytes;
use crate::common::model::make;
use crate::common::tiny::{Contents, contents, tiny_on as options};
use crate::scripts::put;
use crate::syncs::eventually;

/// A disk with room for so much more than it holds.
fn with_room(sim: &SimStorage, bytes: u64) {
    sim.set_capacity(None);
    let free = sim.free_bytes(Path::new("/")).unwrap();
    // What is taken is what is missing from a disk without a limit.
    sim.set_capacity(Some((1 << 50) - free + bytes));
}

#[test]
fn a_full_disk_refuses_commits_and_takes_them_again_when_there_is_room() {
    for maintenance in [Maintenance::Inline, Maintenance::Background] {
        for room in (0..40).map(|n| n * 9000) {
            let sim = SimStorage::new();
            sim.stop_recording();
            let options = || options(&sim).maintenance(maintenance);
            let store = options().create_new(true).open(PATH).unwrap();
            let mut model = Contents::new();
            let mut refused = 0;
            with_room(&sim, room);
            for n in 0..60u64 {
                let (key, value) = put(n % 23, n, [300, 5000, 9000, 20_000][(n % 4) as usize]);
                match store.put(&key, value.as_deref().unwrap()) {
                    Ok(()) => drop(model.insert(key, value.unwrap())),
                    Err(error) if n <= 40 && error.is_no_space() => refused += 1,
                    // The index could not be written out for so long that commits have to wait.
                    Err(Error::WritesRefused { cause })
                        if n <= 40 && cause.contains("the index cannot be written out") =>
                    {
                        refused += 1
                    }
                    Err(error) => panic!("room for {room} bytes, commit {n}: {error}"),
                }
                if n == 40 {
                    assert_eq!(contents(&store).unwrap(), model, "reads go on");
                    sim.set_capacity(None);
                }
                assert!(
                    n <= 40 || store.contains(format!("k{}", n % 23)).unwrap(),
                    "room for {room} bytes, commit {n}"
                );
            }
            assert!(room > 200_000 || refused > 0, "room for {room} bytes");
            assert_eq!(contents(&store).unwrap(), model);
            store.close().unwrap();
            let store = options().open(PATH).unwrap();
            assert_eq!(contents(&store).unwrap(), model);
            assert!(store.verify(|_| {}).unwrap().is_sound());
            store.close().unwrap();
        }
    }
}

/// The story: on a full disk every commit tries to write the index out, and each attempt left its unfinished run behind.
/// What little room there was went to those.
#[test]
fn an_index_that_cannot_be_written_out_leaves_nothing_behind() {
    for (op, kind) in
        [(OpKind::Write, FaultKind::Enospc), (OpKind::Rename, FaultKind::Eio), (OpKind::Map, FaultKind::Eio)]
    {
        let sim = SimStorage::new();
        let store = options(&sim).create_new(true).open(PATH).unwrap();
        sim.inject(Fault::new(kind, 0).on(op).path_ending(".idx.tmp").from_then_on());
        sim.inject(Fault::new(kind, 0).on(op).path_ending(".idx").from_then_on());
        // As many as may gather in memory.
        for n in 0..20 {
            store.put(format!("k{n}"), &bytes(n, 100)).unwrap();
        }
        assert!(store.metrics().index_flush_failures > 5);
        let left: Vec<_> = sim.files().into_iter().filter(|path| path.parent().unwrap().ends_with("index")).collect();
        assert!(left.is_empty(), "{op}: {left:?}");
        sim.clear_faults();
        store.close().unwrap();
        let store = options(&sim).open(PATH).unwrap();
        assert_eq!(store.scan("").count(), 20);
    }
}

/// What may not be on the disk is copied before it is built on, which takes room. Without any the store opens for reading, and
/// says so.
#[test]
fn without_room_for_copies_a_store_opens_read_only_and_says_what_to_do() {
    for note in ["DISTRUST", "UNSETTLED"] {
        for left in [0, 5000, 30_000] {
            let sim = SimStorage::new();
            let store = options(&sim).create_new(true).open(PATH).unwrap();
            (0..9).for_each(|n| eventually(&store, n).unwrap());
            make(&store, &vec![put(10, 10, 60_000)], Durability::Eventual).unwrap();
            let expected = contents(&store).unwrap();
            store.abandon();
            sim.write_file(format!("{PATH}/{note}"), b"");
            let files = sim.files();
            let told = format!("{note}, {left} bytes left");

            let free = sim.free_bytes("/".as_ref()).unwrap();
            sim.set_capacity(Some((1 << 50) - free + left));
            for _ in 0..2 {
                let refused = options(&sim).open(PATH).unwrap_err();
                assert!(refused.is_no_space(), "{told}: {refused}");
                assert!(
                    refused.to_string().contains("make room and open the store again, or open it read-only"),
                    "{refused}"
                );
                assert_eq!(sim.files(), files, "{told}: nothing is left that takes room");
                let reader = options(&sim).read_only(true).open(PATH).unwrap();
                assert_eq!(contents(&reader).unwrap(), expected, "{told}");
            }
            sim.set_capacity(None);
            let store = options(&sim).open(PATH).unwrap();
            assert_eq!(contents(&store).unwrap(), expected, "{told}");
            assert!(!sim.has_file(format!("{PATH}/{note}")), "{told}");
        }
    }
}

/// The story: looking for something to evict failed half-way. What had been chosen by then was never chosen again, and in
/// the end nothing was left to choose.
#[test]
fn a_failed_look_for_something_to_evict_is_made_anew() {
    for nth in 0..12 {
        let sim = SimStorage::new();
        let options = options(&sim).max_bytes(45_000).eviction(Eviction::Fifo);
        let store = options.create_new(true).open(PATH).unwrap();
        (0..4).for_each(|n| store.put(format!("k{n}"), &bytes(n, 10_000)).unwrap());
        sim.inject(Fault::new(FaultKind::Eio, nth).on(OpKind::Read).path_ending(".seg"));
        let _ = store.put("large", &bytes(9, 40_000));
        sim.clear_faults();
        store.put("all", &bytes(10, 45_000)).unwrap_or_else(|error| panic!("read {nth} failed: {error}"));
        assert_eq!(store.scan("").count(), 1, "read {nth} failed");
    }
}
