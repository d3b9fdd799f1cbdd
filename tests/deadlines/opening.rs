//! A disk that does not come back while a store is opened, moved to what its writer has written, or made anew: at every call
//! of it in turn.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Weak;
use std::sync::atomic::{AtomicUsize, Ordering};

use alight::storage::sim::{Fault, FaultKind};

use super::*;
use crate::common::tiny::Contents;

/// Longer than the disk in memory takes for anything, and short enough for a hundred of them. Where a machine is busy it is
/// over earlier than at the call that is stuck, and the same is asked.
const SHORT: Duration = Duration::from_millis(150);

/// How many disks are stuck at a time: who waits for one needs no processor.
const AT_A_TIME: usize = 8;

/// Options on a disk, which nothing holds any more once the other has gone.
fn options_on(disk: &Disk, deadline: Option<Duration>) -> (StoreOptions, Weak<Interposed>) {
    let storage = Arc::new(disk.storage());
    let held = Arc::downgrade(&storage);
    let options = disk.options().overlay_entries_max(4).deadline(deadline).write_deadline(deadline);
    (options.storage(storage), held)
}

/// What was given up has come to its end.
fn await_end(held: &Weak<Interposed>) {
    let began = Instant::now();
    while held.strong_count() > 0 {
        assert!(began.elapsed() < LONG, "something is held for ever");
        thread::yield_now();
    }
}

fn told_in_time<T>(outcome: &Result<T, Error>, what: &str) {
    let told = outcome.as_ref().err();
    assert!(matches!(told, Some(Error::Timeout { after_ms: 150, .. })), "{what}: {told:?}");
}

/// Does the same for each of some calls.
fn for_each_call(calls: usize, what: impl Fn(usize) + Sync) {
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..AT_A_TIME {
            scope.spawn(|| {
                loop {
                    let call = next.fetch_add(1, Ordering::Relaxed);
                    if call >= calls {
                        return;
                    }
                    what(call);
                }
            });
        }
    });
}

/// A store whose writer died: with index runs, commits that no manifest covers, a segment that a reader kept, and files that
/// nothing names.
fn left() -> SimStorage {
    let disk = Disk::new();
    let (options, _) = options_on(&disk, None);
    let store = options.clone().create_new(true).durability(Durability::Eventual).open(PATH).unwrap();
    let put = |keys: std::ops::Range<u64>, len: usize| {
        keys.for_each(|n| store.put(format!("{n}"), &bytes(n, len + n as usize)).unwrap());
    };
    put(0..9, 400_000);
    let reader = options.read_only(true).open(PATH).unwrap();
    put(0..9, 2000);
    put(9..11, 100_000);
    store.delete("3").unwrap();
    drop(reader);
    disk.sim.write_file("/store/index/00000099.idx.tmp", b"begun");
    store.abandon();
    disk.sim
}

/// The same after a failed sync, of which the writer left word.
fn distrusted() -> SimStorage {
    let disk = Disk::of(left());
    let store = options_on(&disk, None).0.open(PATH).unwrap();
    store.put("synced", b"yes").unwrap();
    disk.sim.inject(Fault::new(FaultKind::Eio, 0).on(OpKind::Sync).path_ending(".seg"));
    store.put("unsynced", b"no").unwrap_err();
    store.abandon();
    disk.sim.clear_faults();
    assert!(disk.sim.has_file("/store/DISTRUST"));
    disk.sim
}

/// The same after a failed sync of an opening's own.
fn unsettled() -> SimStorage {
    let disk = Disk::of(left());
    disk.sim.inject(Fault::new(FaultKind::Eio, 0).on(OpKind::Sync).path_ending(".seg"));
    options_on(&disk, None).0.open(PATH).unwrap_err();
    disk.sim.clear_faults();
    assert!(disk.sim.has_file("/store/UNSETTLED"));
    disk.sim
}

/// Everything that a sound store on a disk holds.
fn all_on(sim: &SimStorage, path: &str) -> Contents {
    let (options, _) = options_on(&Disk::of(sim.clone()), None);
    let store = options.read_only(true).open(path).unwrap();
    sound(&store);
    contents(&store).unwrap()
}

/// Opens a store on copies of a disk that are stuck at one call after another; answers which kinds of calls those were.
fn stuck_while_opened(made: &SimStorage, how: impl Fn(StoreOptions) -> StoreOptions + Sync) -> BTreeSet<OpKind> {
    let disk = Disk::of(made.clone_disk());
    let open = how(options_on(&disk, Some(LONG)).0);
    let (store, calls) = disk.calls_of(|| open.open(PATH).unwrap());
    let expected = contents(&store).unwrap();
    for_each_call(calls.len(), |nth| {
        let what = format!("call {nth}, {:?}", calls[nth]);
        let disk = Disk::of(made.clone_disk());
        disk.stick_one(nth);
        let (options, held) = options_on(&disk, Some(SHORT));
        // With a thread of the store's own, too, which nobody waits for.
        let maintenance = [Maintenance::Inline, Maintenance::Background][nth % 2];
        let open = how(options).maintenance(maintenance);
        told_in_time(&soon(move || open.open(PATH).map(drop)), &what);
        disk.go_on();
        // Nobody has the store, nor its lock.
        await_end(&held);
        let again = how(options_on(&disk, None).0).open(PATH).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert!(contents(&again).unwrap() == expected, "{what}");
        sound(&again);
        if !again.is_read_only() {
            again.put("after", b"written").unwrap();
        }
        again.close().unwrap();
        all_on(&disk.sim, PATH);
    });
    calls.into_iter().collect()
}

#[test]
fn an_opening_that_is_stuck_at_any_call_is_given_up_and_leaves_a_store_that_opens() {
    use OpKind::{
        CreateDir, Facts, List, Lock, LowestSharedByte, Map, Open, Read, Remove, Rename, ShareByte, Sync, SyncDir,
        Truncate, Write,
    };
    let (left, distrusted, unsettled) = (left(), distrusted(), unsettled());
    let mut stuck = stuck_while_opened(&SimStorage::new(), |options| options.create(true));
    assert!(stuck.is_superset(&[CreateDir, List, Lock, Open, Write, Sync, Rename, SyncDir].into()), "{stuck:?}");
    for made in [&left, &distrusted, &unsettled] {
        stuck.extend(stuck_while_opened(made, |options| options));
        let reading = stuck_while_opened(made, |options| options.read_only(true));
        assert!(reading.is_superset(&[List, Open, Read, Facts, Map, ShareByte].into()), "{reading:?}");
    }
    let writing =
        [List, Lock, Open, Read, Facts, Map, Write, Sync, Rename, SyncDir, Remove, Truncate, LowestSharedByte];
    assert!(stuck.is_superset(&writing.into()), "{stuck:?}");
}

/// A reader, with what its writer has written since.
fn reader_with_news(disk: &Disk, deadline: Option<Duration>) -> (Store, Store) {
    let options = options_on(disk, deadline).0;
    let writer = options_on(disk, None).0.create_new(true).open(PATH).unwrap();
    (0..9).for_each(|n| writer.put(format!("{n}"), &bytes(n, 5000)).unwrap());
    let reader = options.read_only(true).open(PATH).unwrap();
    (0..9).for_each(|n| writer.put(format!("{}", n * 2), &bytes(n, 90_000)).unwrap());
    (writer, reader)
}

#[test]
fn a_refresh_that_is_stuck_at_any_call_is_given_up_like_those_behind_it_and_gets_go_on() {
    let disk = Disk::new();
    let (_writer, reader) = reader_with_news(&disk, Some(LONG));
    let (news, calls) = disk.calls_of(|| reader.refresh().unwrap());
    assert!(news && calls.len() > 15, "{calls:?}");
    for_each_call(calls.len(), |nth| {
        let what = format!("call {nth}, {:?}", calls[nth]);
        let disk = Disk::new();
        let (writer, reader) = reader_with_news(&disk, Some(SHORT));
        let (old, new) = (contents(&reader).unwrap(), contents(&writer).unwrap());
        disk.stick_one(nth);
        let beside = reader.clone();
        let beside = thread::spawn(move || beside.refresh());
        told_in_time(&reader.refresh(), &what);
        told_in_time(&beside.join().unwrap(), &what);
        if disk.is_stuck() {
            // No other one gets stuck as well.
            let (later, calls) = disk.calls_of(|| reader.refresh());
            told_in_time(&later, &what);
            assert_eq!((calls.len(), reader.metrics().timeouts), (0, 3), "{what}");
        }
        assert!(contents(&reader).unwrap() == old, "{what}");
        disk.go_on();
        // What was given up changes nothing.
        let began = Instant::now();
        while !reader.refresh().unwrap_or(false) {
            assert!(began.elapsed() < LONG, "{what}");
        }
        assert!(contents(&reader).unwrap() == new, "{what}");
        assert!(!reader.refresh().unwrap(), "{what}");
    });
}

#[test]
fn a_reader_with_a_refresh_that_is_stuck_is_closed_at_once_and_let_go_of_when_that_has_ended() {
    let disk = Disk::new();
    let (writer, reader) = reader_with_news(&disk, None);
    drop(reader);
    let (options, held) = options_on(&disk, Some(SHORT));
    let reader = options.read_only(true).open(PATH).unwrap();
    writer.put("more", b"news").unwrap();
    disk.stick_one(3);
    told_in_time(&reader.refresh(), "a refresh");
    soon(move || reader.close()).unwrap();
    assert!(held.strong_count() > 0, "what is stuck uses it");
    disk.go_on();
    await_end(&held);
    assert_eq!(writer.stat().unwrap().oldest_reader, None);
}

#[test]
fn a_rebuilding_that_is_stuck_at_any_call_is_given_up_and_the_index_is_the_old_one_or_the_new() {
    let made = left();
    let without_manifest = made.clone_disk();
    without_manifest.remove_file("/store/MANIFEST");
    for made in [made, without_manifest] {
        let disk = Disk::of(made.clone_disk());
        let options = options_on(&disk, Some(LONG)).0;
        let (report, calls) = disk.calls_of(|| options.rebuild_index(PATH, |_| {}).unwrap());
        let expected = all_on(&disk.sim, PATH);
        assert!(report.keys > 0 && calls.len() > 30, "{calls:?}");
        for_each_call(calls.len(), |nth| {
            let what = format!("call {nth}, {:?}", calls[nth]);
            let disk = Disk::of(made.clone_disk());
            disk.stick_one(nth);
            let (options, held) = options_on(&disk, Some(SHORT));
            told_in_time(&soon(move || options.rebuild_index(PATH, |_| {})), &what);
            disk.go_on();
            await_end(&held);
            let again = options_on(&disk, None).0.rebuild_index(PATH, |_| {});
            assert_eq!(again.unwrap_or_else(|error| panic!("{what}: {error}")).keys, report.keys, "{what}");
            let store = options_on(&disk, None).0.open(PATH).unwrap();
            assert!(contents(&store).unwrap() == expected, "{what}");
            sound(&store);
        });
    }
}

/// Where some bytes lie.
fn find(sim: &SimStorage, bytes: &[u8]) -> (PathBuf, u64) {
    let place = |path: PathBuf| {
        let at = sim.read_file(&path).windows(bytes.len()).position(|window| window == bytes)?;
        Some((path, at as u64))
    };
    sim.files().into_iter().find_map(place).expect("they lie somewhere")
}

#[test]
fn a_repair_that_is_stuck_at_any_call_is_given_up_and_what_is_unfinished_does_not_open() {
    let made = left();
    let (path, at) = find(&made, &bytes(10, 1000));
    made.flip_bit(path, at, 3);
    let disk = Disk::of(made.clone_disk());
    let options = options_on(&disk, Some(LONG)).0;
    let (report, calls) = disk.calls_of(|| options.repair(PATH, "/target", |_| {}).unwrap());
    let expected = all_on(&disk.sim, "/target");
    assert!(report.keys == expected.len() as u64 && !report.is_complete() && calls.len() > 60, "{calls:?}");
    for_each_call(calls.len(), |nth| {
        let what = format!("call {nth}, {:?}", calls[nth]);
        let disk = Disk::of(made.clone_disk());
        disk.stick_one(nth);
        let (options, held) = options_on(&disk, Some(SHORT));
        told_in_time(&soon(move || options.repair(PATH, "/target", |_| {})), &what);
        disk.go_on();
        await_end(&held);
        let options = options_on(&disk, None).0;
        match options.clone().open("/target") {
            Ok(store) => assert!(contents(&store).unwrap() == expected, "{what}"),
            Err(Error::NotAStore { .. } | Error::Io { .. }) => {}
            Err(error) => panic!("{what}: {error}"),
        }
        let again = options.repair(PATH, "/another", |_| {}).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!((again.keys, again.damages), (report.keys, report.damages.clone()), "{what}");
        assert!(all_on(&disk.sim, "/another") == expected, "{what}");
    });
}
