//! By which route values come, and what becomes of a read that gets stuck.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::cufile::simulated as library;
use crate::device::simulated::Simulated;
use crate::device::staging::{SLOTS, Slot};
use crate::device::{Device, simulated_gpu};
use crate::io::direct::CuFileTransport;
use crate::io::fixtures::StuckStorage;
use crate::metrics::{LastRead, ReadRoute, RouteReason};
use crate::storage::sim::{Abilities, SimStorage};
use crate::store::fixtures::value;
use crate::{Error, Maintenance, RouteChoice, Store, StoreOptions};

/// A closed store of three values, two of them large.
fn store(folder: &Path) -> (PathBuf, [Vec<u8>; 3]) {
    let (path, values) = (folder.join("s"), [value(1, 9 << 20), value(2, 5000), value(3, (17 << 20) + 5)]);
    let store = Store::create(&path).unwrap();
    values.iter().enumerate().for_each(|(n, value)| store.put(format!("{n}"), value).unwrap());
    store.close().unwrap();
    (path, values)
}

fn options(route: RouteChoice, cufile: CuFileTransport) -> StoreOptions {
    let mut options = Store::options().read_only(true).route(route);
    options.cufile = cufile;
    options
}

fn check(store: &Store, gpu: &Device, values: &[Vec<u8>]) {
    for (tensor, value) in store.get_many(["0", "1", "2"], gpu).unwrap().iter().zip(values) {
        assert!(tensor.to_host().unwrap() == *value, "{} bytes", value.len());
    }
}

fn last(store: &Store) -> (ReadRoute, RouteReason) {
    let LastRead { route, why } = store.metrics().last_read.unwrap();
    (route, why)
}

#[test]
fn large_values_come_by_cufile_where_it_is_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let (path, values) = store(folder.path());
    let gpu = simulated_gpu();
    let cufile = || CuFileTransport::over(library::cufile());
    let store = options(RouteChoice::CuFile, cufile()).open(&path).unwrap();
    check(&store, &gpu, &values);
    assert_eq!(last(&store), (ReadRoute::CuFile, RouteReason::Asked));
    let metrics = store.metrics();
    assert!(metrics.bytes_cufile >= 26 << 20 && metrics.bytes_direct + metrics.bytes_buffered == 0, "{metrics:?}");
    assert_eq!((metrics.step_downs, metrics.read_times(ReadRoute::CuFile).count), (0, 1));
    assert!(store.get("1", &gpu).unwrap().to_host().unwrap() == values[1]);
    assert_eq!(last(&store), (ReadRoute::Staged, RouteReason::Small));
    store.get("0", &Device::host()).unwrap();
    assert_eq!(last(&store), (ReadRoute::Host, RouteReason::OnTheHost));
    // Who does not ask for it does not get its compatibility mode, and who asks for the ring gets the ring.
    let store = options(RouteChoice::Auto, cufile()).open(&path).unwrap();
    check(&store, &gpu, &values);
    assert_eq!(last(&store), (ReadRoute::Staged, RouteReason::NoDirectPath));
    let store = options(RouteChoice::Staged, CuFileTransport::over(library::cufile_with_direct_path()));
    let store = store.open(&path).unwrap();
    check(&store, &gpu, &values);
    assert_eq!(last(&store), (ReadRoute::Staged, RouteReason::Asked));
}

#[test]
fn with_a_direct_path_cufile_brings_what_is_not_in_the_page_cache() {
    let folder = tempfile::tempdir().unwrap();
    let (path, values) = store(folder.path());
    let direct = CuFileTransport::over(library::cufile_with_direct_path());
    let store = options(RouteChoice::Auto, direct).open(&path).unwrap();
    let gpu = simulated_gpu();
    check(&store, &gpu, &values);
    match last(&store) {
        (ReadRoute::CuFile, RouteReason::DirectPath) => assert!(store.metrics().bytes_cufile > 0),
        // Where the temporary directory is in memory.
        (ReadRoute::Staged, RouteReason::NoDirectPath | RouteReason::Cached) => {
            assert_eq!(store.metrics().bytes_cufile, 0);
        }
        other => panic!("{other:?}"),
    }
    for entry in fs::read_dir(path.join("segments")).unwrap() {
        fs::read(entry.unwrap().path()).unwrap();
    }
    check(&store, &gpu, &values);
    let (route, why) = last(&store);
    assert!(route == ReadRoute::Staged && why != RouteReason::DirectPath, "now it is in the page cache: {why:?}");
}

#[test]
fn a_cufile_that_fails_is_stepped_down_from_and_that_is_counted() {
    let folder = tempfile::tempdir().unwrap();
    let (path, values) = store(folder.path());
    let gpu = simulated_gpu();
    let failing = CuFileTransport::over(library::cufile_that_moves_nothing());
    let store = options(RouteChoice::CuFile, failing).open(&path).unwrap();
    for round in 1..4 {
        check(&store, &gpu, &values);
        assert_eq!(last(&store), (ReadRoute::Staged, RouteReason::SteppedDown));
        let metrics = store.metrics();
        assert_eq!((metrics.step_downs, metrics.bytes_cufile), (round, 0), "round {round}");
    }
}

#[test]
fn damage_that_cufile_brings_is_damage_and_no_step_down() {
    let folder = tempfile::tempdir().unwrap();
    let (path, _) = store(folder.path());
    let gpu = simulated_gpu();
    let cufile = || CuFileTransport::over(library::cufile());
    let largest = fs::read_dir(path.join("segments"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .max_by_key(|path| fs::metadata(path).unwrap().len())
        .unwrap();
    let store = options(RouteChoice::CuFile, cufile()).open(&path).unwrap();
    let mut bytes = fs::read(&largest).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&largest, &bytes).unwrap();
    let error = store.get_many(["0", "2"], &gpu).unwrap_err();
    assert!(error.is_damage(), "{error}");
    fs::OpenOptions::new().write(true).open(&largest).unwrap().set_len(middle as u64).unwrap();
    let error = store.get_many(["0", "2"], &gpu).unwrap_err();
    assert!(error.is_damage() && error.to_string().contains("truncated"), "{error}");
    assert_eq!(store.metrics().step_downs, 0);
}

#[test]
fn a_read_that_gets_stuck_is_a_timeout_and_keeps_its_memory() {
    let simulated = Simulated::new();
    for device in [Device::host(), simulated.handle()] {
        // Made before the clock runs: touching the ring's memory takes longer than the deadline.
        device.staging().unwrap();
        let kept = simulated.allocated_bytes();
        let stuck = StuckStorage::new(SimStorage::new());
        stuck.disk.stop_recording();
        let options = Store::options().create(true).storage(Arc::new(stuck.clone())).maintenance(Maintenance::Inline);
        let store = options.deadline(Some(Duration::from_millis(200))).open("/s").unwrap();
        let (large, small) = (value(1, 5 << 20), value(2, 100));
        store.put("large", &large).unwrap();
        store.put("small", &small).unwrap();
        assert!(store.get("large", &device).unwrap().to_host().unwrap() == large);
        stuck.gate.close();
        let error = store.get("large", &device).unwrap_err();
        let Error::Timeout { operation: "read", path, after_ms: 200 } = &error else { panic!("{error}") };
        assert!(path.starts_with("/s/segments"), "{error}");
        let mut arena = device.allocate(6 << 20).unwrap();
        assert!(matches!(store.get_many_into(["large"], &mut arena), Err(Error::Timeout { .. })));
        assert_eq!(arena.len_bytes(), 0, "the read has it");
        assert_eq!(store.metrics().timeouts, 2);
        if !device.is_host() {
            assert!(simulated.allocated_bytes() >= kept + (11 << 20), "what is stuck has its memory");
        }
        stuck.gate.open();
        assert!(store.get("small", &device).unwrap().to_host().unwrap() == small);
        while stuck.gate.waiting() > 0 || (!device.is_host() && simulated.allocated_bytes() >= kept + (5 << 20)) {
            std::thread::yield_now();
        }
        assert!(store.get("large", &device).unwrap().to_host().unwrap() == large);
        assert!(Store::options().deadline(Some(Duration::ZERO)).open("/none").is_err());
    }
}

#[test]
fn a_small_read_that_gets_stuck_is_given_up_by_the_callers_own_thread() {
    let simulated = Simulated::new();
    for device in [Device::host(), simulated.handle()] {
        device.staging().unwrap();
        let stuck = StuckStorage::new(SimStorage::new());
        stuck.disk.stop_recording();
        let options = Store::options().create(true).storage(Arc::new(stuck.clone())).maintenance(Maintenance::Inline);
        let store = options.deadline(Some(Duration::from_millis(500))).open("/s").unwrap();
        let values = [value(1, 100), value(2, 1 << 20), value(3, (1 << 20) - 5000)];
        values.iter().enumerate().for_each(|(n, value)| store.put(format!("{n}"), value).unwrap());
        store.put("other", &value(4, 60_000)).unwrap();
        let check = || {
            for (n, value) in values.iter().enumerate() {
                assert!(store.get(format!("{n}"), &device).unwrap().to_host().unwrap() == *value);
            }
            let tensors = store.get_many(["0", "other"], &device).unwrap();
            assert!(tensors[1].to_host().unwrap() == value(4, 60_000));
        };
        check();
        stuck.gate.close();
        for (n, _) in values.iter().enumerate() {
            let error = store.get(format!("{n}"), &device).unwrap_err();
            let Error::Timeout { operation: "read", path, after_ms: 500 } = &error else { panic!("{error}") };
            assert!(path.starts_with("/s/segments"), "{error}");
        }
        let scattered = store.get_many(["0", "other"], &device);
        assert!(matches!(scattered, Err(Error::Timeout { .. })), "by a thread of the store's own");
        let mut arena = device.allocate(1 << 20).unwrap();
        assert!(matches!(store.get_many_into(["1"], &mut arena), Err(Error::Timeout { .. })));
        // On the host the read has it; what is for a GPU is stuck in a slot.
        assert_eq!(arena.len_bytes(), if device.is_host() { 0 } else { 1 << 20 });
        assert_eq!(store.metrics().timeouts, 5);
        // Who gets no slot, since all are with what is stuck, is told as well.
        let staging = device.staging().unwrap();
        let held: Vec<Slot> = std::iter::from_fn(|| staging.try_acquire().unwrap()).collect();
        assert!(device.is_host() || held.len() == SLOTS - 5, "{} were left", held.len());
        assert!(matches!(store.get("0", &device), Err(Error::Timeout { .. })));
        drop(held);
        stuck.gate.open();
        // The slots come back, and with them the gets.
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(60) && store.get("0", &device).is_err() {}
        check();
    }
}

#[test]
fn what_is_in_the_page_cache_is_there_while_the_disk_is_stuck() {
    let stuck = StuckStorage::new(SimStorage::new());
    stuck.disk.set_abilities(Abilities { resident: Some(true), ..Abilities::default() });
    let options = Store::options().create(true).storage(Arc::new(stuck.clone())).maintenance(Maintenance::Inline);
    let store = options.deadline(Some(Duration::from_secs(600))).open("/s").unwrap();
    // Apart from one another, so that they are as many reads.
    let values: Vec<Vec<u8>> = (0..40).map(|n| value(n, 20_000)).collect();
    values.iter().enumerate().for_each(|(n, value)| store.put(format!("{n}"), value).unwrap());
    stuck.gate.close();
    let before = store.metrics();
    for count in [1, 2, 5, 40] {
        let tensors = store.get_many((0..count).map(|n| format!("{n}")), &Device::host()).unwrap();
        assert!(tensors.iter().zip(&values).all(|(tensor, value)| tensor.as_host() == Some(&value[..])), "{count}");
    }
    let mut destination = vec![0; 20_000];
    store.get_into("7", &mut destination).unwrap();
    assert!(destination == values[7]);
    let after = store.metrics();
    assert!(after.bytes_direct == before.bytes_direct && after.bytes_buffered >= before.bytes_buffered + 49 * 20_000);
    assert_eq!((after.gets - before.gets, after.timeouts), (49, 0));
    stuck.gate.open();
    // What it cannot tell of comes from the disk, by other threads.
    stuck.disk.set_abilities(Abilities::default());
    assert!(store.get_many(["3", "33"], &Device::host()).unwrap()[1].as_host() == Some(&values[33][..]));
    assert!(store.metrics().bytes_direct >= after.bytes_direct + 40_000);
    // Damage is damage.
    stuck.disk.set_abilities(Abilities { resident: Some(true), ..Abilities::default() });
    let place = |path: &PathBuf| stuck.disk.read_file(path).windows(20_000).position(|bytes| bytes == values[5]);
    let (segment, at) = stuck.disk.files().into_iter().find_map(|path| place(&path).map(|at| (path, at))).unwrap();
    stuck.disk.flip_bit(&segment, at as u64 + 9, 1);
    let damaged = store.get_many(["4", "5"], &Device::host()).unwrap_err();
    assert!(damaged.is_damage(), "{damaged}");
}

#[test]
fn what_is_loaded_again_comes_out_of_pinned_pages() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let value = |n: u64, len: u64| -> Vec<u8> { (0..len).map(|at| (at * 31 + at / 255 + n) as u8).collect() };
    let values = [value(1, 150 << 20), value(2, 5000), value(3, 9 << 20)];
    let store = Store::create(&path).unwrap();
    values.iter().enumerate().for_each(|(n, value)| store.put(format!("{n}"), value).unwrap());
    store.close().unwrap();
    let store = Store::options().read_only(true).pinned_bytes_max(1 << 30).open(&path).unwrap();
    let gpu = simulated_gpu();
    for round in 0..4 {
        let before = store.metrics().bytes_pinned;
        for (tensor, value) in store.get_many(["0", "1", "2"], &gpu).unwrap().iter().zip(&values) {
            assert!(tensor.to_host().unwrap() == *value, "round {round}, {} bytes", value.len());
        }
        let pinned = store.metrics().bytes_pinned - before;
        assert!(round < 2 || pinned > 140 << 20, "round {round}: {pinned} bytes");
    }
    // A bound that is too small for a window pins nothing, and is no failure.
    let store = Store::options().read_only(true).pinned_bytes_max(1000).open(&path).unwrap();
    assert!(store.get("0", &gpu).unwrap().to_host().unwrap() == values[0]);
    assert_eq!(store.metrics().bytes_pinned, 0);
}
