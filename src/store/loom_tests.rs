//! A store whose threads meet in every way: some take the current version and read what it leads to, while another publishes
//! the next, and gives back what that one does not need.
//!
//! The store is the real one, on the simulated disk. What may not happen is that somebody gets an error, or a value that was
//! not there at that moment: that is how a file looks that was removed, or a place that was punched, under a reader.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use loom::thread;

use super::flush::Occasion;
use super::{CompactOptions, Maintenance, Store, StoreOptions};
use crate::Device;
use crate::storage::sim::SimStorage;

fn options(sim: &SimStorage) -> StoreOptions {
    // Without deadlines: their threads are not loom's.
    let options = Store::options().storage(Arc::new(sim.clone())).maintenance(Maintenance::Inline);
    let options = options.deadline(None).write_deadline(None);
    options.segment_bytes(64 << 10).small_commit_bytes_max(8 << 10)
}

/// Runs `scenario` once for each way in which its threads can meet, if they are interrupted at most `preemptions` times while
/// they could go on.
fn every_way(preemptions: usize, scenario: impl Fn() + Send + Sync + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(preemptions);
    model.max_branches = 100_000;
    let (scenario, ways) = (Arc::new(scenario), Arc::new(AtomicU64::new(0)));
    let counted = Arc::clone(&ways);
    model.check(move || {
        counted.fetch_add(1, Ordering::Relaxed);
        let scenario = Arc::clone(&scenario);
        beside(move || scenario()).join().unwrap();
    });
    println!("{} ways", ways.load(Ordering::Relaxed));
}

/// A thread of the model's, with room on its stack for a store: the model's own have 32 KiB.
fn beside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> thread::JoinHandle<T> {
    thread::Builder::new().stack_size(64 << 10).spawn(work).unwrap()
}

fn create(sim: &SimStorage) -> Store {
    options(sim).create_new(true).open(Path::new("/store")).unwrap()
}

fn get(store: &Store, key: &str) -> Vec<u8> {
    store.get(key, &Device::host()).unwrap().to_host().unwrap()
}

/// The same beside what else is done.
fn get_beside(store: &Store, key: &'static str) -> thread::JoinHandle<Vec<u8>> {
    let store = store.clone();
    beside(move || get(&store, key))
}

fn flush(store: &Store, occasion: Occasion) {
    store.core().unwrap().flush_counted(occasion).unwrap();
}

fn put_all(store: &Store, values: &[(&str, &[u8])]) {
    let mut batch = store.batch();
    values.iter().for_each(|&(key, value)| batch.put(key, value).unwrap());
    batch.commit().unwrap();
}

const OLD: &[u8] = &[1; 24_000];
const NEW: &[u8] = &[2; 24_000];
const KEPT: &[u8] = &[3; 16_000];

/// This and the two after it are red where `reclaim` does not ask which versions are held, and where what died is noted without
/// beginning an epoch in the current version.
#[test]
fn what_a_reader_took_stays_while_its_segment_is_given_back() {
    every_way(3, || {
        let store = create(&SimStorage::new());
        store.put("k", OLD).unwrap();
        let reader = get_beside(&store, "k");
        store.put("k", NEW).unwrap();
        flush(&store, Occasion::Space);
        let got = reader.join().unwrap();
        assert!(got == OLD || got == NEW);
        flush(&store, Occasion::Space);
        assert_eq!(store.stat().unwrap().pinned_bytes, 0, "nobody holds what died any more");
        assert_eq!(store.metrics().segments_removed, 1);
        store.abandon();
    });
}

#[test]
fn what_a_reader_took_stays_while_holes_are_punched() {
    every_way(3, || {
        let store = create(&SimStorage::new());
        put_all(&store, &[("k", OLD), ("l", KEPT)]);
        let reader = get_beside(&store, "k");
        store.put("k", NEW).unwrap();
        flush(&store, Occasion::Space);
        let got = reader.join().unwrap();
        assert!(got == OLD || got == NEW);
        store.core().unwrap().reclaim().unwrap();
        assert!(store.metrics().bytes_punched >= 20_480, "nobody holds what died any more");
        assert_eq!((get(&store, "k").as_slice(), get(&store, "l").as_slice()), (NEW, KEPT));
        store.abandon();
    });
}

#[test]
fn what_a_reader_took_stays_while_it_is_moved() {
    every_way(2, || {
        let store = create(&SimStorage::new());
        // What dies of it lies in two places, each too short for a hole.
        put_all(&store, &[("a", &OLD[..12_000]), ("b", &KEPT[..12_000]), ("c", &OLD[..12_000])]);
        put_all(&store, &[("a", &NEW[..100]), ("c", &NEW[..100])]);
        let reader = get_beside(&store, "b");
        let compacted = store.compact(&CompactOptions::default(), |_| {}).unwrap();
        assert_eq!(compacted.bytes_copied, 12_000);
        assert_eq!(reader.join().unwrap(), &KEPT[..12_000]);
        store.core().unwrap().reclaim().unwrap();
        assert_eq!(store.metrics().segments_removed, 1);
        assert_eq!(get(&store, "b"), &KEPT[..12_000]);
        store.abandon();
    });
}

/// Red where a version is made from the current one without the publisher's lock, by a commit or by a flush; and where the
/// overlay goes from the version before the run is in it that was made of it.
#[test]
fn no_commit_is_lost_while_the_index_is_written_out() {
    every_way(3, || {
        let sim = SimStorage::new();
        let store = create(&sim);
        store.put("first", b"0").unwrap();
        let committer = {
            let store = store.clone();
            beside(move || {
                store.put("beside", b"1").unwrap();
                assert_eq!(get(&store, "beside"), b"1", "it returned");
            })
        };
        flush(&store, Occasion::Full);
        store.put("last", b"2").unwrap();
        committer.join().unwrap();
        let check = |store: &Store| ["first", "beside", "last"].map(|key| get(store, key)[0]);
        assert_eq!(check(&store), *b"012");
        store.abandon();
        let again = options(&sim).open(Path::new("/store")).unwrap();
        assert_eq!(check(&again), *b"012");
        again.abandon();
    });
}

/// A reader in another process: its views are made of what is on the disk, and a lock on a byte keeps the writer from taking
/// that away. Red where the writer does not ask for such locks.
#[test]
fn what_a_reader_elsewhere_sees_stays_while_it_moves_on() {
    every_way(2, || {
        let sim = SimStorage::new();
        let store = create(&sim);
        store.put("k", OLD).unwrap();
        flush(&store, Occasion::Full);
        let elsewhere = options(&sim).read_only(true).open(Path::new("/store")).unwrap();
        let reader = get_beside(&elsewhere, "k");
        let refresher = {
            let elsewhere = elsewhere.clone();
            beside(move || elsewhere.refresh().unwrap())
        };
        store.put("k", NEW).unwrap();
        flush(&store, Occasion::Space);
        let got = reader.join().unwrap();
        assert!(got == OLD || got == NEW);
        let moved = refresher.join().unwrap();
        assert_eq!(get(&elsewhere, "k") == NEW, moved);
        elsewhere.refresh().unwrap();
        assert_eq!(get(&elsewhere, "k"), NEW);
        store.core().unwrap().reclaim().unwrap();
        assert_eq!(store.stat().unwrap().pinned_bytes, 0, "the reader has let go of what it saw");
        elsewhere.abandon();
        store.abandon();
    });
}

/// The same from the opening on. Red as that one.
#[test]
fn what_a_reader_elsewhere_sees_stays_from_its_opening_on() {
    every_way(3, || {
        let sim = SimStorage::new();
        let store = create(&sim);
        put_all(&store, &[("k", OLD), ("l", KEPT)]);
        flush(&store, Occasion::Full);
        let writer = beside(move || {
            store.put("k", NEW).unwrap();
            flush(&store, Occasion::Space);
            store.abandon();
        });
        let elsewhere = options(&sim).read_only(true).open(Path::new("/store")).unwrap();
        let got = get(&elsewhere, "k");
        assert!(got == OLD || got == NEW);
        assert_eq!(get(&elsewhere, "l"), KEPT);
        elsewhere.abandon();
        writer.join().unwrap();
    });
}
