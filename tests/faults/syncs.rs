//! What a failed sync, or a cut that failed, leaves to the processes after it: a second sync proves nothing.

use alight::storage::Storage;
use alight::storage::sim::{Choice, Fault, FaultKind, OpKind, SimStorage};
use alight::{Durability, Error, Store};

use crate::PATH;
use crate::common::model::{Model, make};
use crate::common::tiny::{Contents, contents, tiny_on as options};
use crate::scripts::{put, torn_disk};

/// The states that a power cut would leave now, some of them.
fn power_cuts(sim: &SimStorage) -> impl Iterator<Item = (SimStorage, String)> {
    let trace = sim.trace();
    let walker = trace.walk_to(trace.len());
    let choices = [Choice::None, Choice::All].into_iter().chain((0..60).map(Choice::Random));
    choices.map(move |choice| (walker.materialize(&choice), walker.explain(&choice)))
}

pub(crate) fn eventually(store: &Store, key: u64) -> Result<(), Error> {
    make(store, &vec![put(key, key, 300)], Durability::Eventual)
}

/// Whatever a power cut takes away, the store opens and holds what is expected.
fn every_cut_leaves(sim: &SimStorage, expected: &Contents, case: &str) {
    for (state, told) in power_cuts(sim) {
        let store = options(&state).open(PATH).unwrap_or_else(|error| panic!("{case}: {error}\n{told}"));
        assert_eq!(contents(&store).unwrap(), *expected, "{case}: {told}");
        store.abandon();
    }
}

/// The story: a frame could not be written, nor cut off again. The note for the next open named the last commit that a sync
/// had covered, and eventual ones behind it were cut, though no sync had failed and the machine had gone on.
#[test]
fn eventual_commits_outlive_a_process_that_could_not_take_a_frame_back() {
    for kind in [FaultKind::Eio, FaultKind::EioAfter] {
        let sim = SimStorage::new();
        let store = options(&sim).create_new(true).open(PATH).unwrap();
        eventually(&store, 1).unwrap();
        sim.inject(Fault::new(kind, 0).on(OpKind::Write).path_ending(".seg"));
        sim.inject(Fault::new(FaultKind::Eio, 0).on(OpKind::Truncate).path_ending(".seg"));
        eventually(&store, 2).unwrap_err();
        assert!(matches!(eventually(&store, 3), Err(Error::WritesRefused { .. })));
        store.abandon();
        let store = options(&sim).open(PATH).unwrap();
        assert_eq!(contents(&store).unwrap(), Model::contents([&vec![put(1, 1, 300)]]), "{kind:?}");
        store.abandon();
    }
}

/// The story: a process died with eventual commits in the page cache, and the sync of the next one's opening failed. The
/// opening after that believed a second sync, and acknowledged a commit; a power cut took the eventual ones away, and the
/// store was refused as damaged.
#[test]
fn what_an_opening_could_not_sync_the_next_one_does_not_take_for_synced() {
    for on_directory in [false, true] {
        let sim = SimStorage::new();
        let store = options(&sim).create_new(true).open(PATH).unwrap();
        eventually(&store, 1).unwrap();
        store.abandon();
        let (op, path) = if on_directory { (OpKind::SyncDir, PATH) } else { (OpKind::Sync, ".seg") };
        sim.inject(Fault::new(FaultKind::FailedSync, 0).on(op).path_ending(path));
        let refused = options(&sim).open(PATH).unwrap_err();
        assert!(matches!(refused, Error::Io { action: "sync", .. }), "{refused:?}");
        let store = options(&sim).open(PATH).unwrap();
        make(&store, &vec![put(2, 2, 300)], Durability::Immediate).unwrap();
        store.abandon();
        let expected = Model::contents([&vec![put(1, 1, 300)], &vec![put(2, 2, 300)]]);
        every_cut_leaves(&sim, &expected, "");
        let left = |name: &str| sim.files().iter().any(|path| path.to_string_lossy().contains(name));
        assert!(!left("UNSETTLED") && !left(".seg.tmp"), "{:?}", sim.files());
    }
}

/// The ways in which the name that an opening gave its manifest may not be durable when the opening fails: it had no time to
/// sync it, or the sync failed, after which the kernel takes the name for written and no later sync makes it so. (The first
/// sync of that directory comes before there is a new manifest.)
fn manifest_names_lost() -> [Fault; 3] {
    let sync = |nth| Fault::new(FaultKind::FailedSync, nth).on(OpKind::SyncDir).path_ending(PATH);
    [Fault::new(FaultKind::EioAfter, 0).on(OpKind::Rename).path_ending("MANIFEST"), sync(0), sync(1)]
}

/// The story: an opening heeded the note of a failed sync, and died when its new manifest had its name and that name was not
/// durable. The next one took the note for outlived, and acknowledged a commit; a power cut brought the old manifest back,
/// and the note about it, and the commit was cut. Where it had been the sync of the name that failed, a second sync did not
/// help: it needs another manifest.
#[test]
fn a_note_that_was_outlived_does_not_come_back() {
    for fault in manifest_names_lost() {
        let sim = SimStorage::new();
        let store = options(&sim).create_new(true).open(PATH).unwrap();
        make(&store, &vec![put(1, 1, 300)], Durability::Immediate).unwrap();
        sim.inject(Fault::new(FaultKind::FailedSync, 0).on(OpKind::Sync).path_ending(".seg"));
        make(&store, &vec![put(2, 2, 300)], Durability::Immediate).unwrap_err();
        store.abandon();
        sim.inject(fault.clone());
        options(&sim).open(PATH).unwrap_err();
        let store = options(&sim).open(PATH).unwrap();
        make(&store, &vec![put(3, 3, 300)], Durability::Immediate).unwrap();
        store.abandon();
        let expected = Model::contents([&vec![put(1, 1, 300)], &vec![put(3, 3, 300)]]);
        every_cut_leaves(&sim, &expected, &format!("{fault:?}"));
    }
}

/// The story: an opening cut what a crash had torn, and died when the manifest that says so had its name and that name was
/// not durable. The next one took it for durable and acknowledged commits; a power cut brought the old manifest back, and
/// with it what had been cut, beside commits of the same numbers.
#[test]
fn what_was_cut_does_not_come_back_beside_what_was_committed_since() {
    for fault in manifest_names_lost() {
        let (sim, before) = torn_disk();
        sim.start_recording();
        sim.inject(fault.clone());
        options(&sim).open(PATH).unwrap_err();
        let store = options(&sim).open(PATH).unwrap();
        let after = vec![put(9, 9, 300)];
        make(&store, &after, Durability::Immediate).unwrap();
        store.abandon();
        let expected = Model::contents(before.iter().chain([&after]));
        every_cut_leaves(&sim, &expected, &format!("{fault:?}"));
    }
}

/// The story: the making of a store failed at the sync of a directory, and was begun again in what the first attempt had left.
/// The kernel took its names for written by then, so that the second sync proved nothing: commits were acknowledged, and a
/// power cut took them away with the directory they were in.
#[test]
fn a_store_whose_making_failed_at_a_sync_is_made_anew() {
    let syncs_failing = |nths: &[u64]| {
        let sim = SimStorage::new();
        for &nth in nths {
            sim.inject(Fault::new(FaultKind::FailedSync, nth).on(OpKind::SyncDir));
            let made = options(&sim).create(true).open(PATH);
            let Err(error) = made else { return None };
            assert!(matches!(error, Error::Io { action: "sync", .. }), "{nths:?}: {error:?}");
        }
        let store = options(&sim).create(true).open(PATH).unwrap();
        let commit = vec![put(1, 1, 300), put(2, 2, 9000)];
        make(&store, &commit, Durability::Immediate).unwrap();
        store.abandon();
        every_cut_leaves(&sim, &Model::contents([&commit]), &format!("syncs {nths:?} fail"));
        Some(())
    };
    let syncs = (0..).take_while(|&nth| syncs_failing(&[nth]).is_some()).count() as u64;
    assert!(syncs >= 2, "{syncs} directories are synced while a store is made");
    let mut twice = 0;
    for first in 0..syncs {
        twice += (0..9).filter(|&second| syncs_failing(&[first, second]).is_some()).count();
    }
    assert!(twice as u64 >= syncs, "{twice} times the second attempt failed as well");
}

/// What can't be helped is told: a directory that was there before belongs to whoever made it, and one that can't be removed
/// stays.
#[test]
fn a_directory_that_stays_though_its_name_is_in_doubt_is_told_of() {
    for was_there in [false, true] {
        let sim = SimStorage::new();
        if was_there {
            sim.create_dir(PATH.as_ref()).unwrap();
        } else {
            sim.inject(Fault::new(FaultKind::Eio, 0).on(OpKind::RemoveDir));
        }
        sim.inject(Fault::new(FaultKind::FailedSync, 0).on(OpKind::SyncDir).path_ending("/"));
        let error = options(&sim).create(true).open(PATH).unwrap_err();
        let told = error.to_string();
        assert!(matches!(error, Error::Io { action: "sync", .. }), "{error:?}");
        assert!(told.contains(PATH) && told.contains("remove the directory"), "{told}");
        assert_eq!(sim.list(PATH.as_ref()).unwrap(), [], "nothing was made in it");
    }
}

/// The story: a segment was being made, its sync failed, and it could not be removed again. It held nothing, so the store went
/// on with another one; but the process died, and the next one found a segment without commits, put some there and
/// acknowledged them. A power cut took the header away, or the name, and the commits with it.
#[test]
fn a_segment_that_was_not_made_is_not_used_by_the_next_process() {
    for (op, path) in [(OpKind::Sync, ".seg"), (OpKind::SyncDir, "segments")] {
        let sim = SimStorage::new();
        let store = options(&sim).create_new(true).open(PATH).unwrap();
        sim.inject(Fault::new(FaultKind::FailedSync, 0).on(op).path_ending(path));
        sim.inject(Fault::new(FaultKind::Eio, 0).on(OpKind::Remove).path_ending(".seg"));
        make(&store, &vec![put(1, 1, 300)], Durability::Immediate).unwrap_err();
        store.abandon();
        assert!(sim.has_file(format!("{PATH}/segments/00000001.seg")));
        let store = options(&sim).open(PATH).unwrap();
        make(&store, &vec![put(2, 2, 300)], Durability::Immediate).unwrap();
        store.abandon();
        let expected = Model::contents([&vec![put(2, 2, 300)]]);
        every_cut_leaves(&sim, &expected, &format!("{op}"));
    }
}

/// The story: a rebuilding failed, or died, when its manifest had its name and that name was not durable. The next opening took
/// it for durable, removed the runs of the one before and acknowledged a commit; a power cut brought that one back, or none.
#[test]
fn what_rests_on_a_manifest_that_a_rebuilding_made_outlives_a_power_cut() {
    for fault in manifest_names_lost() {
        for (manifest_is_lost, index_was_written) in [(false, true), (true, true), (true, false)] {
            let told = format!("{fault:?}, {manifest_is_lost}, {index_was_written}");
            let sim = SimStorage::new();
            let store = options(&sim).create_new(true).open(PATH).unwrap();
            make(&store, &vec![put(1, 1, 300)], Durability::Immediate).unwrap();
            if index_was_written {
                store.close().unwrap();
            } else {
                store.abandon();
            }
            if manifest_is_lost {
                sim.remove(format!("{PATH}/MANIFEST").as_ref()).unwrap();
                sim.start_recording();
            }
            sim.inject(fault.clone());
            let _ = options(&sim).rebuild_index(PATH, |_| {});
            sim.clear_faults();
            let store = options(&sim).open(PATH).unwrap();
            make(&store, &vec![put(2, 2, 300)], Durability::Immediate).unwrap();
            // It comes as far as to make the removals durable.
            sim.inject(Fault::new(FaultKind::Eio, 0).on(OpKind::Write).path_ending("MANIFEST.tmp"));
            store.close().unwrap_err();
            let expected = Model::contents([&vec![put(1, 1, 300)], &vec![put(2, 2, 300)]]);
            every_cut_leaves(&sim, &expected, &told);
        }
    }
}
