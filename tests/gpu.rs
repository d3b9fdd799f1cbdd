//! The store on a GPU: what is put from its memory and got into it. Skipped, visibly, where there is none; a failure then
//! with `ALIGHT_REQUIRE_GPU=1`.

mod common;

use std::sync::Arc;

use alight::cufile::{Access, CuFile};
use alight::{Device, Dtype, PrefetchConfig, RouteChoice, Store, Tensor, TensorRef};
use common::bytes;
use common::gpu::require;

#[test]
fn tensors_land_in_gpu_memory_as_they_were_put() {
    let Some(gpu) = require(Device::cuda(0)) else { return };
    let folder = tempfile::tempdir().unwrap();
    let store = Store::create(folder.path().join("s")).unwrap();
    let lengths = [0, 1, 255, 4095, 4096, 4097, 70_000, (1 << 20) - 1, 1 << 20, (1 << 20) + 4097, 37 << 20];
    let values: Vec<Vec<u8>> = lengths.iter().enumerate().map(|(n, &len)| bytes(n as u64, len)).collect();
    let mut batch = store.batch();
    for (n, value) in values.iter().enumerate() {
        batch.put(format!("t{n}"), value).unwrap();
    }
    batch.commit().unwrap();
    let tensors = store.get_many((0..values.len()).map(|n| format!("t{n}")), &gpu).unwrap();
    for (tensor, value) in tensors.iter().zip(&values) {
        assert_eq!(tensor.device(), &gpu);
        assert!(tensor.as_host().is_none() && (value.is_empty() || tensor.device_ptr().unwrap() != 0));
        assert!(tensor.to_host().unwrap() == *value, "{} bytes", value.len());
    }
    for (n, value) in values.iter().enumerate() {
        let tensor = store.get(format!("t{n}"), &gpu).unwrap();
        assert!(tensor.to_host().unwrap() == *value);
        if value.len() > 10 {
            let range = store.get_range(format!("t{n}"), 3..value.len() as u64 - 2, &gpu).unwrap();
            assert!(range.to_host().unwrap() == value[3..value.len() - 2]);
        }
    }
}

#[test]
fn tensors_are_put_from_gpu_memory_and_make_the_same_segments_as_from_the_host() {
    let Some(gpu) = require(Device::cuda(0)) else { return };
    let folder = tempfile::tempdir().unwrap();
    let values: Vec<Vec<u8>> =
        [8, 4096, 600_000, 3 << 20, 90 << 20].iter().map(|&len| bytes(len as u64, len)).collect();
    let mut payloads = Vec::new();
    for device in [Device::host(), gpu] {
        let path = folder.path().join(device.to_string());
        let store = Store::create(&path).unwrap();
        let tensors: Vec<Tensor> = values
            .iter()
            .map(|value| Tensor::from_host(Dtype::BF16, &[value.len() as u64 / 2], value, &device).unwrap())
            .collect();
        for (n, tensor) in tensors.iter().enumerate() {
            store.put(format!("single{n}"), tensor).unwrap();
        }
        let mut batch = store.batch();
        for (n, tensor) in tensors.iter().enumerate() {
            batch.put(format!("batch{n}"), TensorRef::from(tensor)).unwrap();
        }
        batch.commit().unwrap();
        for (n, value) in values.iter().enumerate() {
            for key in [format!("single{n}"), format!("batch{n}")] {
                let got = store.get(&key, &Device::host()).unwrap();
                assert!(got.as_host().unwrap() == value, "{key} from {device}");
                assert_eq!(got.dtype(), Dtype::BF16);
            }
        }
        assert!(store.verify(|_| {}).unwrap().is_sound());
        store.close().unwrap();
        let mut segments: Vec<_> =
            std::fs::read_dir(path.join("segments")).unwrap().map(|e| e.unwrap().path()).collect();
        segments.sort();
        // Salts and store ids differ; what lies behind the frames' preludes does not.
        payloads.push(segments.iter().map(|path| std::fs::metadata(path).unwrap().len()).collect::<Vec<_>>());
    }
    assert_eq!(payloads[0], payloads[1]);
}

#[test]
fn many_threads_get_onto_one_gpu_at_once() {
    let Some(gpu) = require(Device::cuda(0)) else { return };
    let folder = tempfile::tempdir().unwrap();
    let store = Store::create(folder.path().join("s")).unwrap();
    let values: Arc<Vec<Vec<u8>>> = Arc::new((0..24).map(|n| bytes(n, 100_000 + n as usize * 333_333)).collect());
    for (n, value) in values.iter().enumerate() {
        store.put(format!("{n}"), value).unwrap();
    }
    std::thread::scope(|scope| {
        for thread in 0..8usize {
            let (store, gpu, values) = (store.clone(), gpu.clone(), Arc::clone(&values));
            scope.spawn(move || {
                for round in 0..6 {
                    let picks: Vec<usize> = (0..5).map(|i| (thread * 7 + round * 5 + i * 3) % values.len()).collect();
                    let tensors = store.get_many(picks.iter().map(|n| format!("{n}")), &gpu).unwrap();
                    for (&n, tensor) in picks.iter().zip(&tensors) {
                        assert!(tensor.to_host().unwrap() == values[n]);
                    }
                }
            });
        }
    });
}

#[test]
fn thousands_of_small_values_are_gathered() {
    let Some(gpu) = require(Device::cuda(0)) else { return };
    let folder = tempfile::tempdir().unwrap();
    let store = Store::create(folder.path().join("s")).unwrap();
    let value = |n: usize| bytes(n as u64 + 1, 1 + n * 37 % 9000);
    for first in (0..6000).step_by(1000) {
        let values: Vec<Vec<u8>> = (first..first + 1000).map(value).collect();
        let mut batch = store.batch();
        for (n, value) in values.iter().enumerate() {
            batch.put(format!("{}", first + n), value).unwrap();
        }
        batch.commit().unwrap();
    }
    // Far from each other, so that none is read with its neighbour; then close, then all.
    for step in [17, 5, 1] {
        let picks: Vec<usize> = (0..6000).step_by(step).collect();
        let tensors = store.get_many(picks.iter().map(|n| format!("{n}")), &gpu).unwrap();
        for (&n, tensor) in picks.iter().zip(&tensors) {
            assert!(tensor.to_host().unwrap() == value(n), "{n} of every {step}");
        }
    }
}

#[test]
fn a_flipped_byte_is_found_on_the_way_to_the_gpu() {
    let Some(gpu) = require(Device::cuda(0)) else { return };
    let folder = tempfile::tempdir().unwrap();
    // The shorter one is checked by who reads it, the longer one by the GPU.
    for (len, flipped) in [(5 << 20, 4 << 20), (40 << 20, 33 << 20)] {
        let path = folder.path().join(len.to_string());
        let store = Store::create(&path).unwrap();
        store.put("v", &bytes(2, 9 << 20)).unwrap();
        store.put("w", &bytes(1, len)).unwrap();
        store.close().unwrap();
        let segment = path.join("segments/00000001.seg");
        let mut file = std::fs::read(&segment).unwrap();
        // Both lie there, the one that stays whole first.
        file[(9 << 20) + flipped] ^= 4;
        std::fs::write(&segment, file).unwrap();
        let store = Store::open(&path).unwrap();
        let error = store.get_many(["v", "w"], &gpu).unwrap_err();
        assert!(error.is_damage() && error.to_string().contains("\"w\""), "{error}");
        store.get("v", &gpu).unwrap();
    }
}

/// In cuFile's compatibility mode where the machine has no direct path.
#[test]
fn the_same_values_come_by_every_route() {
    let Some(gpu) = require(Device::cuda(0)) else { return };
    let Some(cufile) = require(CuFile::get()) else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    let values: Vec<Vec<u8>> =
        [9 << 20, 5000, (33 << 20) + 7, 1, 4096].iter().map(|&len| bytes(len as u64, len)).collect();
    let store = Store::create(&path).unwrap();
    values.iter().enumerate().for_each(|(n, value)| store.put(format!("{n}"), value).unwrap());
    store.close().unwrap();
    let segment = std::fs::read_dir(path.join("segments")).unwrap().next().unwrap().unwrap().path();
    if require(cufile.open(segment, Access::Read)).is_none() {
        return;
    }
    for route in [RouteChoice::Auto, RouteChoice::Staged, RouteChoice::CuFile] {
        let store = Store::options().read_only(true).route(route).open(&path).unwrap();
        let tensors = store.get_many(["0", "1", "2", "3", "4"], &gpu).unwrap();
        for (tensor, value) in tensors.iter().zip(&values) {
            assert!(tensor.to_host().unwrap() == *value, "{} bytes, {route:?}", value.len());
        }
        let metrics = store.metrics();
        println!("{route:?}: {}", metrics.last_read.unwrap());
        assert_eq!(metrics.step_downs, 0, "{route:?}");
        match route {
            RouteChoice::CuFile => assert!(metrics.bytes_cufile > 42 << 20, "{metrics:?}"),
            RouteChoice::Staged => assert_eq!(metrics.bytes_cufile, 0),
            _ => {}
        }
    }
}

#[test]
fn gets_in_the_order_of_the_disk_come_out_of_slots_on_the_gpu() {
    let Some(gpu) = require(Device::cuda(0)) else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let store = Store::create(&path).unwrap();
    let values: Vec<Vec<u8>> = (0..200).map(|n| bytes(n, 500_000 + n as usize % 7 * 100_003)).collect();
    for (n, value) in values.iter().enumerate() {
        store.put(format!("{n}"), value).unwrap();
    }
    store.close().unwrap();
    // Slots whose checksums would be the threads' and such as would be the GPU's, were they values.
    for slot_bytes in [2 << 20, 16 << 20] {
        let prefetch = PrefetchConfig { slots: 4, slot_bytes, distance_bytes: 3 * slot_bytes };
        let store = Store::options().read_only(true).prefetch(prefetch).open(&path).unwrap();
        let free = || gpu.memory_bytes().unwrap().unwrap().free;
        store.get_many(["0"], &gpu).unwrap();
        let before = free();
        let mut order: Vec<usize> = (0..200).collect();
        for round in 0..2 {
            for &n in &order {
                assert!(store.get(format!("{n}"), &gpu).unwrap().to_host().unwrap() == values[n], "{n}, round {round}");
            }
            order.reverse();
        }
        let counts = store.metrics().prefetch;
        println!("slots of {slot_bytes} bytes: {counts:?}, {} bytes taken", before.saturating_sub(free()));
        // How many come out of slots is a matter of who is faster; that some do, and each is told of once, is not.
        assert!(counts.hits + counts.late > 0, "{counts:?}");
        assert_eq!(counts.hits + counts.late + counts.misses, 400, "{counts:?}");
        assert_eq!((counts.failed, store.metrics().checksum_failures), (0, 0));
    }
}

#[test]
fn a_stream_to_the_gpu_brings_every_tensor_in_its_place() {
    let Some(gpu) = require(Device::cuda(0)) else { return };
    let folder = tempfile::tempdir().unwrap();
    let store = Store::create(folder.path().join("s")).unwrap();
    let values: Vec<Vec<u8>> = (0..300).map(|n| bytes(n, n as usize * n as usize * 53 % 1_500_000)).collect();
    for values in values.chunks(50).enumerate() {
        let mut batch = store.batch();
        values.1.iter().enumerate().for_each(|(n, value)| batch.put(format!("{}", values.0 * 50 + n), value).unwrap());
        batch.commit().unwrap();
    }
    for lookahead in [0, 3 << 20, 128 << 20] {
        let mut held = Vec::new();
        for (n, tensor) in store.stream((0..301).map(|n| n.to_string()), &gpu).lookahead(lookahead).enumerate() {
            match tensor {
                Ok(tensor) if n % 10 == 0 => held.push((n, tensor)),
                Ok(tensor) => assert!(tensor.device() == &gpu && tensor.to_host().unwrap() == values[n], "{n}"),
                Err(error) => assert!(n == 300 && error.to_string().contains("\"300\""), "{error}"),
            }
        }
        // What was held was written over by nothing that came later.
        assert_eq!(held.len(), 30);
        for (n, tensor) in held {
            assert!(tensor.to_host().unwrap() == values[n], "{n}, held, {lookahead} ahead");
        }
    }
}

/// In cuFile's compatibility mode where the machine has no direct path.
#[test]
fn the_same_values_leave_a_gpu_by_every_route() {
    let Some(gpu) = require(Device::cuda(0)) else { return };
    let Some(cufile) = require(CuFile::get()) else { return };
    let folder = tempfile::tempdir().unwrap();
    if require(cufile.open(folder.path().join("probe"), Access::ReadWrite)).is_none() {
        return;
    }
    let values: Vec<Vec<u8>> =
        [9 << 20, 5000, (33 << 20) + 7, 1, 4096, 70 << 20].iter().map(|&len| bytes(len as u64, len)).collect();
    let tensors: Vec<Tensor> =
        values.iter().map(|value| Tensor::from_host(Dtype::U8, &[value.len() as u64], value, &gpu).unwrap()).collect();
    for route in [RouteChoice::Auto, RouteChoice::Staged, RouteChoice::CuFile] {
        let path = folder.path().join(format!("{route:?}"));
        let store = Store::options().create(true).route(route).open(&path).unwrap();
        let mut batch = store.batch();
        for (n, tensor) in tensors.iter().enumerate() {
            batch.put(format!("{n}"), tensor).unwrap();
        }
        batch.commit().unwrap();
        store.put("alone", &tensors[2]).unwrap();
        let metrics = store.metrics();
        println!("{route:?}: {} of {} bytes by cuFile", metrics.bytes_put_cufile, metrics.bytes_put);
        assert_eq!(metrics.step_downs, 0, "{route:?}");
        match route {
            RouteChoice::CuFile => assert_eq!(metrics.bytes_put_cufile, (9 + 33 + 70 + 33) << 20),
            RouteChoice::Staged => assert_eq!(metrics.bytes_put_cufile, 0),
            _ => {}
        }
        store.close().unwrap();
        let store = Store::options().read_only(true).open(&path).unwrap();
        for (n, value) in values.iter().enumerate() {
            let got = store.get(format!("{n}"), &Device::host()).unwrap();
            assert!(got.as_host().unwrap() == value, "{} bytes, {route:?}", value.len());
        }
        assert!(store.get("alone", &gpu).unwrap().to_host().unwrap() == values[2], "{route:?}");
        assert!(store.verify(|_| {}).unwrap().is_sound(), "{route:?}");
    }
}
