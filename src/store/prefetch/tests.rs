//! What is fetched ahead of gets, on the host and a simulated GPU, over a disk in memory: what serves, what is counted, and
//! what becomes of it when something goes wrong.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use super::*;
use crate::device::simulated::Simulated;
use crate::io::fixtures::StuckStorage;
use crate::metrics::{LastRead, ReadRoute, RouteReason};
use crate::storage::Storage;
use crate::storage::sim::{Abilities, Fault, FaultKind, OpKind};
use crate::store::fixtures::{self, disk, value};
use crate::{CompactOptions, Error, Store, StoreOptions, Tensor};

const LEN: usize = 16 << 10;
/// Four values.
const SLOT: u64 = 64 << 10;
const CONFIG: PrefetchConfig = PrefetchConfig { slots: 4, slot_bytes: SLOT, distance_bytes: 3 * SLOT };

fn options(disk: impl Storage + 'static) -> StoreOptions {
    fixtures::options(disk).segment_bytes(16 << 20).prefetch(CONFIG)
}

/// `count` values of [`LEN`] bytes side by side, from key `first` on.
fn fill(store: &Store, first: usize, count: usize) {
    let values: Vec<Vec<u8>> = (first..first + count).map(|n| value(n, LEN)).collect();
    let mut batch = store.batch();
    values.iter().enumerate().for_each(|(n, value)| batch.put(format!("{}", first + n), value).unwrap());
    batch.commit().unwrap();
}

fn get(store: &Store, n: usize, device: &Device) -> Tensor {
    let tensor = store.get(format!("{n}"), device).unwrap();
    assert!(tensor.to_host().unwrap() == value(n, LEN), "value {n} on {device}");
    tensor
}

/// Waits until all is fetched that is to be.
fn settle(store: &Store) {
    store.core().unwrap().prefetcher.as_ref().unwrap().wait_until_idle();
}

fn get_and_settle(store: &Store, keys: impl IntoIterator<Item = usize>, device: &Device) {
    for n in keys {
        get(store, n, device);
        settle(store);
    }
}

/// Hits, late ones, misses, wasted, failed.
fn counts(store: &Store) -> [u64; 5] {
    let stats = store.metrics().prefetch;
    [stats.hits, stats.late, stats.misses, stats.wasted, stats.failed]
}

/// A simulated GPU whose staging ring, kernels and slab of small memory are there, and what they take of its memory.
fn gpu(store: &Store) -> (Simulated, Device, u64) {
    let gpu = Simulated::new();
    let device = gpu.handle();
    assert!(device.has_kernels());
    store.get_many(["0"], &device).unwrap();
    let taken = gpu.allocated_bytes();
    (gpu, device, taken)
}

#[test]
fn gets_in_the_order_of_the_disk_are_served_from_the_fifth_on() {
    let store = options(disk()).open("/s").unwrap();
    fill(&store, 0, 40);
    let (simulated, gpu, taken) = gpu(&store);
    for (round, device) in [gpu, Device::host()].into_iter().enumerate() {
        let before = store.metrics();
        get_and_settle(&store, 0..40, &device);
        let metrics = store.metrics();
        assert_eq!(counts(&store), [36, 0, 4, 0, 0].map(|count| count * (round as u64 + 1)), "{device}");
        assert_eq!((metrics.gets - before.gets, metrics.bytes_got - before.bytes_got), (40, 40 * LEN as u64));
        let read = LastRead { route: ReadRoute::Prefetched, why: RouteReason::FetchedAhead };
        assert_eq!(metrics.last_read, Some(read));
        let read = metrics.bytes_direct + metrics.bytes_buffered - before.bytes_direct - before.bytes_buffered;
        assert_eq!(read, 40 * LEN as u64, "every byte was read once");
    }
    assert_eq!(simulated.allocated_bytes(), taken + CONFIG.memory_bytes(), "the slots, and nothing that gets left");
    drop(store);
    assert_eq!(simulated.allocated_bytes(), taken, "and they come back");
}

#[test]
fn the_order_may_be_backwards_or_leave_values_out() {
    let orders: [Vec<usize>; 2] = [(0..40).rev().collect(), (0..40).step_by(5).collect()];
    for order in orders {
        let store = options(disk()).open("/s").unwrap();
        fill(&store, 0, 40);
        get_and_settle(&store, order.iter().copied(), &Device::host());
        assert_eq!(counts(&store), [order.len() as u64 - 4, 0, 4, 0, 0], "{order:?}");
    }
}

#[test]
fn values_of_any_length_and_across_slots_and_segments_are_right() {
    let simulated = Simulated::new();
    for device in [Device::host(), simulated.handle()] {
        // Less than a page, more than a slot, none at all.
        let lens = [10_000, 1, 300, 65_536, 0, 40_000, 70_000, 4096, 4097, 255, 30_001];
        let store = options(disk()).segment_bytes(1 << 20).open("/s").unwrap();
        let values: Vec<Vec<u8>> = (0..120).map(|n| value(n, lens[n * 7 % lens.len()])).collect();
        for (n, value) in values.iter().enumerate() {
            store.put(format!("{n}"), value).unwrap();
        }
        let mut host = vec![0; 70_000];
        for (n, value) in values.iter().enumerate() {
            if n % 2 == 0 || !device.is_host() {
                assert!(store.get(format!("{n}"), &device).unwrap().to_host().unwrap() == *value, "{n} on {device}");
            } else {
                store.get_into(format!("{n}"), &mut host).unwrap();
                assert!(host[..value.len()] == *value, "{n}");
            }
            settle(&store);
        }
        let [hits, late, misses, _, failed] = counts(&store);
        assert!(hits > 4 * misses && (late, failed) == (0, 0), "{hits} {late} {misses} {failed}");
        assert_eq!(store.metrics().checksum_failures, 0);
    }
}

#[test]
fn gets_into_host_memory_are_served_too() {
    let store = options(disk()).open("/s").unwrap();
    fill(&store, 0, 12);
    let mut bytes = vec![0; LEN + 1];
    for n in 0..12 {
        assert_eq!(store.get_into(format!("{n}"), &mut bytes).unwrap().len_bytes, LEN as u64);
        assert!(bytes[..LEN] == value(n, LEN) && bytes[LEN] == 0);
        settle(&store);
    }
    assert_eq!((counts(&store), store.metrics().gets), ([8, 0, 4, 0, 0], 12));
}

#[test]
fn nothing_is_fetched_for_keys_at_random_nor_where_it_is_off() {
    let store = options(disk()).open("/s").unwrap();
    fill(&store, 0, 40);
    let places: Vec<usize> = (0..40).map(|n| (n * n * 17 + n * 29 + 3) % 40).collect();
    places.iter().for_each(|&n| drop(get(&store, n, &Device::host())));
    let stats = store.metrics().prefetch;
    assert_eq!((stats.scheduled, stats.misses), (0, 40));
    let prefetcher = store.core().unwrap().prefetcher.clone().unwrap();
    assert_eq!(prefetcher.shared.state.lock().thread, Thread::Unborn);
    let calls = options(disk()).prefetch(None).open("/s").unwrap();
    fill(&calls, 0, 12);
    (0..12).for_each(|n| drop(get(&calls, n, &Device::host())));
    assert!(calls.core().unwrap().prefetcher.is_none());
    assert_eq!(counts(&calls), [0; 5]);
}

#[test]
fn short_values_in_the_page_cache_are_read_from_there() {
    let disk = disk();
    let store = options(disk.clone()).open("/s").unwrap();
    fill(&store, 0, 12);
    disk.set_abilities(Abilities { resident: Some(true), ..Abilities::default() });
    (0..6).for_each(|n| drop(get(&store, n, &Device::host())));
    assert_eq!(counts(&store), [0; 5]);
    disk.set_abilities(Abilities { resident: Some(false), ..Abilities::default() });
    get_and_settle(&store, 6..12, &Device::host());
    assert_eq!(counts(&store), [2, 0, 4, 0, 0]);
}

#[test]
fn what_was_fetched_and_not_asked_for_is_counted() {
    let store = options(disk()).open("/s").unwrap();
    fill(&store, 0, 40);
    get_and_settle(&store, 0..4, &Device::host());
    // Three slots ahead, none of them needed any more.
    get_and_settle(&store, [30], &Device::host());
    assert_eq!(counts(&store), [0, 0, 5, 3, 0]);
}

#[test]
fn each_device_has_slots_of_its_own() {
    let store = options(disk()).open("/s").unwrap();
    fill(&store, 0, 20);
    let gpus = [gpu(&store), gpu(&store)];
    for n in 0..20 {
        for (_, device, _) in &gpus {
            get_and_settle(&store, [n], device);
        }
        get_and_settle(&store, [19 - n], &Device::host());
    }
    assert_eq!(counts(&store), [48, 0, 12, 0, 0]);
    for (simulated, _, taken) in &gpus {
        assert_eq!(simulated.allocated_bytes(), taken + CONFIG.memory_bytes());
    }
}

/// A store of which three values were got, and whose disk gives nothing from now on.
fn stuck(deadline: Option<Duration>) -> (StuckStorage, Store) {
    let disk = StuckStorage::new(disk());
    let store = options(disk.clone()).deadline(deadline).open("/s").unwrap();
    fill(&store, 0, 40);
    (0..3).for_each(|n| drop(get(&store, n, &Device::host())));
    disk.gate.close();
    (disk, store)
}

/// The fourth get reads for itself, the fifth asked for what was on its way, and later ones find everything.
fn goes_on(store: &Store) {
    settle(store);
    get_and_settle(store, 5..10, &Device::host());
    let [hits, late, misses, _, failed] = counts(store);
    assert_eq!((hits, late, misses, failed), (5, 1, 4, 0));
}

#[test]
fn a_get_waits_for_what_is_on_its_way() {
    for deadline in [None, Some(Duration::from_secs(600))] {
        let (disk, store) = stuck(deadline);
        thread::scope(|scope| {
            scope.spawn(|| get(&store, 3, &Device::host()));
            disk.gate.wait_for(2);
            scope.spawn(|| get(&store, 4, &Device::host()));
            while counts(&store)[1] == 0 {
                thread::yield_now();
            }
            thread::sleep(Duration::from_millis(30));
            assert_eq!(disk.gate.waiting(), 2, "it reads nothing for itself");
            disk.gate.open();
        });
        goes_on(&store);
    }
}

#[test]
fn what_is_stuck_is_waited_for_no_longer_than_the_deadline() {
    let deadline = Duration::from_millis(200);
    let (disk, store) = stuck(Some(deadline));
    let times_out = |n: usize| {
        let began = Instant::now();
        assert!(matches!(store.get(format!("{n}"), &Device::host()), Err(Error::Timeout { .. })));
        began.elapsed()
    };
    assert!(times_out(3) >= deadline, "its own read");
    assert!(times_out(4) >= 2 * deadline, "what is fetched ahead, and then its own");
    times_out(5);
    assert_eq!(counts(&store)[1], 1, "nobody waits again while it lasts");
    disk.gate.open();
    goes_on(&store);
}

#[test]
fn a_store_is_closed_with_extents_on_their_way() {
    for close in [true, false] {
        let disk = StuckStorage::new(disk());
        let store = options(disk.clone()).open("/s").unwrap();
        fill(&store, 0, 40);
        let (simulated, gpu, taken) = gpu(&store);
        (0..3).for_each(|n| drop(get(&store, n, &gpu)));
        disk.gate.close();
        thread::scope(|scope| {
            scope.spawn(|| get(&store, 3, &gpu));
            disk.gate.wait_for(2);
            // The get that is under way may come to its end: let its read pass alone.
            disk.gate.open();
        });
        settle(&store);
        disk.gate.close();
        // A hit, and the next extent on its way.
        get(&store, 4, &gpu);
        get(&store, 8, &gpu);
        disk.gate.wait_for(1);
        let prefetcher = store.core().unwrap().prefetcher.clone().unwrap();
        prefetcher.close();
        assert_eq!(prefetcher.shared.state.lock().tracks.len(), 0);
        assert!(simulated.allocated_bytes() <= taken + SLOT, "only what is being read has its memory");
        disk.gate.open();
        if close {
            store.close().unwrap();
        } else {
            drop(store);
        }
        while simulated.allocated_bytes() > taken || Arc::strong_count(&prefetcher.shared) > 1 {
            thread::yield_now();
        }
    }
}

#[test]
fn a_read_that_fails_ahead_is_nobodys_failure() {
    let sim = disk();
    let store = options(sim.clone()).open("/s").unwrap();
    fill(&store, 0, 40);
    get_and_settle(&store, 0..4, &Device::host());
    sim.inject(Fault::new(FaultKind::Eio, 0).on(OpKind::Read));
    // The eighth has the fourth extent fetched, and that fails.
    get_and_settle(&store, 4..40, &Device::host());
    let [hits, late, misses, _, failed] = counts(&store);
    assert_eq!((sim.faults_struck(), failed, late, hits + misses), (1, 1, 0, 40));
    assert!(misses <= 8, "four gets, and it goes on: {misses}");
    // A disk that is gone is told by the get, after everything that is there already.
    sim.inject(Fault::new(FaultKind::Eio, 0).on(OpKind::Read).from_then_on());
    assert!(matches!(store.get("0", &Device::host()), Err(Error::Io { .. })));
}

#[test]
fn whichever_read_fails_gets_are_right_or_say_so() {
    for kind in [FaultKind::Eio, FaultKind::Short, FaultKind::Eintr] {
        for nth in (0..60).step_by(3) {
            let sim = disk();
            let store = options(sim.clone()).open("/s").unwrap();
            fill(&store, 0, 40);
            sim.inject(Fault::new(kind, nth).on(OpKind::Read));
            let mut errors = 0;
            for n in 0..40 {
                match store.get(format!("{n}"), &Device::host()) {
                    Ok(tensor) => assert!(tensor.as_host() == Some(&value(n, LEN)[..]), "{n}, read {nth} {kind:?}"),
                    Err(Error::Io { .. }) => errors += 1,
                    Err(error) => panic!("{error}"),
                }
            }
            settle(&store);
            let told = errors + counts(&store)[4];
            assert_eq!(told, if kind == FaultKind::Eio { sim.faults_struck() } else { 0 }, "read {nth} {kind:?}");
        }
    }
}

#[test]
fn whichever_call_of_the_driver_fails_gets_are_right_or_say_so() {
    for loses_gpu in [false, true] {
        for failing in (0..400).step_by(37) {
            let store = options(disk()).open("/s").unwrap();
            fill(&store, 0, 24);
            let (simulated, gpu, _) = gpu(&store);
            simulated.fail_after(failing, 700, loses_gpu);
            for n in 0..24 {
                if let Ok(tensor) = store.get(format!("{n}"), &gpu)
                    && let Ok(bytes) = tensor.to_host()
                {
                    assert!(bytes == value(n, LEN), "{n}, call {failing}");
                }
            }
            settle(&store);
        }
    }
}

#[test]
fn a_gpu_without_room_for_slots_is_read_to_as_without_them() {
    let config = PrefetchConfig { slots: 2, slot_bytes: 2 << 30, distance_bytes: 4 << 30 };
    let store = options(disk()).prefetch(config).open("/s").unwrap();
    fill(&store, 0, 12);
    let (_simulated, gpu, _) = gpu(&store);
    get_and_settle(&store, 0..12, &gpu);
    let [hits, _, misses, _, failed] = counts(&store);
    assert!(hits == 0 && misses == 12 && failed > 0, "{hits} {misses} {failed}");
}

#[test]
fn a_damaged_byte_is_found_whenever_it_broke() {
    let segment = "/s/segments/00000001.seg";
    for ahead in [false, true] {
        let sim = disk();
        let store = options(sim.clone()).open("/s").unwrap();
        fill(&store, 0, 40);
        let file = sim.read_file(segment);
        let whole = value(9, LEN);
        let place = (0..file.len() - LEN).step_by(4096).find(|&at| file[at..at + LEN] == whole).unwrap() as u64 + 5000;
        let (_simulated, gpu, _) = gpu(&store);
        if ahead {
            // It is in a slot already: what was whole then is handed out.
            get_and_settle(&store, 0..6, &gpu);
            sim.flip_bit(segment, place, 3);
            get_and_settle(&store, 6..40, &gpu);
            assert_eq!((counts(&store)[0], store.metrics().checksum_failures), (36, 0));
        } else {
            sim.flip_bit(segment, place, 3);
            for n in 0..40 {
                match store.get(format!("{n}"), &gpu) {
                    Ok(tensor) => assert!(tensor.to_host().unwrap() == value(n, LEN)),
                    Err(error) => {
                        assert!(n == 9 && error.is_damage() && error.to_string().contains("\"9\""), "{error}")
                    }
                }
                settle(&store);
            }
            assert_eq!(store.metrics().checksum_failures, 1, "told once, by the read of the get");
        }
    }
}

#[test]
fn what_is_put_deleted_and_moved_meanwhile_is_as_the_index_says() {
    for device in [Device::host(), Simulated::new().handle()] {
        let store = options(disk()).segment_bytes(256 << 10).background_compaction(None).open("/s").unwrap();
        for first in (0..40).step_by(4) {
            fill(&store, first, 4);
        }
        get_and_settle(&store, 0..6, &device);
        let snapshot = store.snapshot();
        // All of these lie in slots now.
        store.put("8", &value(80, LEN)).unwrap();
        store.delete("9").unwrap();
        assert!(store.get("8", &device).unwrap().to_host().unwrap() == value(80, LEN));
        assert!(matches!(store.get("9", &device), Err(Error::NotFound(_))));
        for n in 6..12 {
            let tensor = snapshot.get(format!("{n}"), &device).unwrap();
            assert!(tensor.to_host().unwrap() == value(n, LEN), "{n} of the snapshot");
        }
        drop(snapshot);
        for n in (10..40).filter(|n| n % 4 != 0) {
            store.delete(format!("{n}")).unwrap();
        }
        get_and_settle(&store, 0..4, &device);
        let report = store.compact(&CompactOptions::default(), |_| {}).unwrap();
        assert!(report.segments_removed > 0, "{report:?}");
        get_and_settle(&store, (0..8).chain((12..40).step_by(4)), &device);
        // The place of what was removed is taken by other segments.
        fill(&store, 100, 40);
        get_and_settle(&store, 100..140, &device);
        assert_eq!(store.metrics().checksum_failures, 0);
    }
}

#[test]
fn what_is_appended_later_is_not_taken_from_what_was_fetched_before() {
    let sim = disk();
    let writer = options(sim.clone()).open("/s").unwrap();
    fill(&writer, 0, 7);
    let reader = options(sim).create(false).read_only(true).open("/s").unwrap();
    for store in [&writer, &reader] {
        get_and_settle(store, 0..7, &Device::host());
    }
    for first in (7..28).step_by(7) {
        fill(&writer, first, 7);
        assert!(reader.refresh().unwrap());
        for store in [&writer, &reader] {
            get_and_settle(store, first..first + 7, &Device::host());
            let [hits, _, misses, _, failed] = counts(store);
            assert_eq!((hits + misses, failed, store.metrics().checksum_failures), (first as u64 + 7, 0, 0));
            assert!(misses <= 4 + first as u64 / 7, "the first of each commit alone: {misses}");
        }
    }
}

#[test]
fn readers_in_many_threads_get_what_they_ask_for() {
    let store = options(disk()).open("/s").unwrap();
    fill(&store, 0, 60);
    let simulated = Simulated::new();
    let devices = [Device::host(), simulated.handle()];
    thread::scope(|scope| {
        for reader in 0..6 {
            let (store, device) = (&store, &devices[reader % 2]);
            scope.spawn(move || {
                for round in 0..4 {
                    for n in 0..60 {
                        let n = if (reader + round) % 3 == 0 { 59 - n } else { n };
                        get(store, n, device);
                    }
                }
            });
        }
    });
    assert_eq!(store.metrics().gets, 6 * 4 * 60);
    assert_eq!((store.metrics().checksum_failures, counts(&store)[4]), (0, 0));
}
