//! By which route large values leave a GPU's memory, and what becomes of a write that fails there or gets stuck.

use std::path::Path;
use std::thread;
use std::time::Duration;

use super::*;
use crate::cufile::simulated as library;
use crate::device::simulated::Simulated;
use crate::device::{Device, simulated_gpu};
use crate::io::direct::CuFileTransport;
use crate::store::fixtures::value;
use crate::{Dtype, RouteChoice, Store, StoreOptions, Tensor};

fn tensor(value: &[u8], device: &Device) -> Tensor {
    Tensor::from_host(Dtype::U8, &[value.len() as u64], value, device).unwrap()
}

fn options(route: RouteChoice, cufile: CuFileTransport) -> StoreOptions {
    let mut options = Store::options().create(true).route(route);
    options.cufile = cufile;
    options
}

/// Large ones that end in a block and inside one, with small ones between that share the block.
const LENGTHS: [usize; 8] = [9 << 20, 300, (8 << 20) + 777, 77, 5 << 20, (8 << 20) + 4096, 8 << 20, 100];

/// The bytes of those that cuFile may write: their whole blocks.
const WHOLE: u64 = (9 << 20) + (8 << 20) + (8 << 20) + 4096 + (8 << 20);

/// Puts the values from a GPU's memory, together and each by itself; the bytes that cuFile wrote of them.
fn put_all(path: &Path, options: StoreOptions, gpu: &Device) -> u64 {
    let values: Vec<Vec<u8>> = LENGTHS.iter().zip(1..).map(|(&len, seed)| value(seed, len)).collect();
    let tensors: Vec<Tensor> = values.iter().map(|value| tensor(value, gpu)).collect();
    let store = options.open(path).unwrap();
    let mut batch = store.batch();
    tensors.iter().enumerate().for_each(|(n, tensor)| batch.put(format!("batch {n}"), tensor).unwrap());
    batch.commit().unwrap();
    tensors.iter().enumerate().for_each(|(n, tensor)| store.put(format!("single {n}"), tensor).unwrap());
    let written = store.metrics().bytes_put_cufile;
    store.close().unwrap();
    let store = Store::open(path).unwrap();
    for (n, value) in values.iter().enumerate() {
        for key in [format!("batch {n}"), format!("single {n}")] {
            assert!(store.get(&key, &Device::host()).unwrap().as_host().unwrap() == value, "{key}");
            let mut handed_on = Vec::new();
            // By the checksums of the chunks.
            store.get_to_writer(&key, &mut handed_on).unwrap();
            assert!(handed_on == *value, "{key}");
        }
    }
    let report = store.verify(|_| {}).unwrap();
    assert!(report.is_sound(), "{:?}", report.damages);
    written
}

#[test]
fn large_values_of_a_gpu_are_put_by_cufile_where_it_is_asked_for_or_direct() {
    let folder = tempfile::tempdir().unwrap();
    let gpu = simulated_gpu();
    let cufile = || CuFileTransport::over(library::cufile());
    let direct = || CuFileTransport::over(library::cufile_with_direct_path());
    let put =
        |name: &str, route, cufile, device: &Device| put_all(&folder.path().join(name), options(route, cufile), device);
    assert_eq!(put("asked for", RouteChoice::CuFile, cufile(), &gpu), 2 * WHOLE);
    assert_eq!(put("compatible", RouteChoice::Auto, cufile(), &gpu), 0);
    assert_eq!(put("ring", RouteChoice::Staged, direct(), &gpu), 0);
    assert_eq!(put("host", RouteChoice::CuFile, cufile(), &Device::host()), 0);
    let written = put("direct", RouteChoice::Auto, direct(), &gpu);
    // Where the temporary directory is in memory nothing goes past the page cache.
    assert!(written == 2 * WHOLE || written == 0, "{written}");
    // The segments hold the same commits at the same places, whatever the route.
    let segments = |name: &str| {
        let mut segments: Vec<_> = std::fs::read_dir(folder.path().join(name).join("segments"))
            .unwrap()
            .map(|entry| std::fs::read(entry.unwrap().path()).unwrap())
            .collect();
        segments.sort_by_key(Vec::len);
        segments
    };
    let (one, other) = (segments("asked for"), segments("ring"));
    assert_eq!(one.len(), other.len());
    for (one, other) in one.iter().zip(&other) {
        assert_eq!(one.len(), other.len());
        let blocks = one.chunks(4096).zip(other.chunks(4096));
        let different = blocks.filter(|(one, other)| one != other).count();
        // Headers and frames bear salts and ids: of each a block or two.
        assert!(different < 40, "{different} blocks of {}", one.len() / 4096);
    }
}

#[test]
fn a_cufile_that_fails_is_stepped_down_from_and_the_value_is_put_all_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let gpu = simulated_gpu();
    let failing = CuFileTransport::over(library::cufile_that_moves_nothing());
    let store = options(RouteChoice::CuFile, failing).open(folder.path().join("s")).unwrap();
    let value = value(3, (9 << 20) + 5);
    let source = tensor(&value, &gpu);
    for round in 1..4 {
        store.put("v", &source).unwrap();
        let metrics = store.metrics();
        assert_eq!((metrics.step_downs, metrics.bytes_put_cufile), (round, 0));
    }
    assert!(store.get("v", &Device::host()).unwrap().as_host().unwrap() == value);
    assert!(store.verify(|_| {}).unwrap().is_sound());
}

#[test]
fn a_full_disk_fails_that_put_alone() {
    let folder = tempfile::tempdir().unwrap();
    let gpu = simulated_gpu();
    let full = CuFileTransport::over(library::cufile_on_a_full_disk());
    let store = options(RouteChoice::CuFile, full).open(folder.path().join("s")).unwrap();
    let error = store.put("v", &tensor(&value(3, 9 << 20), &gpu)).unwrap_err();
    assert!(error.is_no_space(), "{error}");
    store.put("w", &value(4, 9 << 20)).unwrap();
    assert!(!store.contains("v").unwrap() && store.metrics().step_downs == 0);
    assert!(store.verify(|_| {}).unwrap().is_sound());
}

#[test]
fn a_write_that_gets_stuck_in_cufile_keeps_the_memory_and_the_store_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let simulated = Simulated::new();
    let gpu = simulated.handle();
    let before = simulated.allocated_bytes();
    let stuck = CuFileTransport::over(library::cufile_that_gets_stuck());
    let options = options(RouteChoice::CuFile, stuck).write_deadline(Some(Duration::from_secs(3)));
    let store = options.open(folder.path().join("s")).unwrap();
    let source = tensor(&value(3, 9 << 20), &gpu);
    let error = store.put("v", &source).unwrap_err();
    assert!(matches!(error, Error::Timeout { operation: "write", .. }), "{error}");
    drop(source);
    assert!(simulated.allocated_bytes() >= before + (9 << 20), "cuFile has it");
    store.put("w", &value(4, 9 << 20)).unwrap();
    store.put("x", b"small").unwrap();
    assert!(!store.contains("v").unwrap());
    library::let_writes_go_on();
    while simulated.allocated_bytes() >= before + (9 << 20) {
        thread::yield_now();
    }
    assert!(store.verify(|_| {}).unwrap().is_sound());
    store.close().unwrap();
}

#[test]
fn what_lies_between_ranges_is_all_that_they_leave() {
    assert!(between(&[], 0).is_empty() && between(&[0..4, 4..10], 10).is_empty());
    assert_eq!(between(&[2..4, 4..6], 10), [0..2, 6..10]);
    assert_eq!(between(&[2..4, 8..10], 10), [0..2, 4..8]);
}
