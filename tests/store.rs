//! What a store does, on the real file system and the host device.

use std::collections::BTreeMap;

use alight::{Device, Dtype, Durability, Error, Maintenance, Store, StoreOptions, TensorRef};
use tempfile::TempDir;

mod common;

use common::bytes;

fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn small() -> StoreOptions {
    Store::options().create(true).segment_bytes(256 << 10).overlay_entries_max(64)
}

/// Everything a store holds.
fn contents(store: &Store) -> BTreeMap<Vec<u8>, Vec<u8>> {
    store
        .scan("")
        .map(|info| {
            let info = info.unwrap();
            let tensor = store.get(&info.key, &Device::host()).unwrap();
            assert_eq!((tensor.dtype(), tensor.shape()), (info.dtype, info.shape.as_slice()));
            (info.key.as_bytes().to_vec(), tensor.to_host().unwrap())
        })
        .collect()
}

#[test]
fn what_is_put_is_got_before_and_after_reopening() {
    let folder = folder();
    let path = folder.path().join("s");
    let values: Vec<(String, Vec<u8>)> = [0, 1, 255, 256, 4095, 4096, 4097, 65536, 1 << 20, (1 << 20) + 1, 5 << 20]
        .iter()
        .enumerate()
        .map(|(n, &len)| (format!("k{n:02}"), bytes(n as u64, len)))
        .collect();
    let store = Store::create(&path).unwrap();
    for (key, value) in &values {
        store.put(key, value).unwrap();
        assert_eq!(store.get(key, &Device::host()).unwrap().as_host().unwrap(), value);
    }
    let expected: BTreeMap<Vec<u8>, Vec<u8>> =
        values.iter().map(|(key, value)| (key.clone().into_bytes(), value.clone())).collect();
    assert_eq!(contents(&store), expected);
    store.close().unwrap();

    for options in [Store::options(), Store::options().read_only(true)] {
        let store = options.open(&path).unwrap();
        assert_eq!(contents(&store), expected);
        let report = store.verify(|_| {}).unwrap();
        assert!(report.is_sound(), "{:?}", report.damages);
        assert_eq!(report.keys, values.len() as u64);
        store.close().unwrap();
    }
}

#[test]
fn values_are_read_into_memory_that_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::create(folder.path().join("s")).unwrap();
    let values: Vec<Vec<u8>> = [5000, 0, 10, 700_000, 3 << 20].iter().map(|&len| bytes(len as u64, len)).collect();
    let mut batch = store.batch();
    values.iter().enumerate().for_each(|(n, value)| batch.put(format!("{n}"), value).unwrap());
    batch.commit().unwrap();
    let mut devices = vec![Device::host()];
    devices.extend(Device::cuda(0).ok());
    for device in devices {
        let picks = [4, 0, 0, 1, 3, 2];
        let keys = || picks.iter().map(|n| format!("{n}"));
        let mut arena = device.allocate(100).unwrap();
        let Err(Error::ArenaTooSmall { needed, available: 100 }) = store.get_many_into(keys(), &mut arena) else {
            panic!("{device}: too small an arena")
        };
        for room in [needed, needed + 12_345] {
            let mut arena = device.allocate(room).unwrap();
            let places = store.get_many_into(keys(), &mut arena).unwrap();
            for (&pick, place) in picks.iter().zip(places) {
                let mut found = vec![0; values[pick].len()];
                assert_eq!(place.end - place.start, found.len() as u64);
                arena.copy_to_host(place.start, &mut found).unwrap();
                assert!(found == values[pick], "{device}: value {pick}");
            }
        }
        assert!(matches!(store.get_many_into(["absent"], &mut arena), Err(Error::NotFound(_))));
    }
}

#[test]
fn get_many_returns_views_of_one_arena_in_the_order_of_the_keys() {
    let folder = folder();
    let store = Store::create(folder.path().join("s")).unwrap();
    let mut batch = store.batch();
    let values: Vec<Vec<u8>> = (0..40).map(|n| bytes(n, 1 + (n as usize * 7919) % 70_000)).collect();
    for (n, value) in values.iter().enumerate() {
        batch.put(format!("t{n}"), value).unwrap();
    }
    batch.commit().unwrap();
    let order: Vec<usize> = (0..40).map(|n| n * 17 % 40).collect();
    let tensors = store.get_many(order.iter().map(|n| format!("t{n}")), &Device::host()).unwrap();
    for (&n, tensor) in order.iter().zip(&tensors) {
        assert_eq!(tensor.as_host().unwrap(), values[n]);
    }
    let error = store.get_many(["t1", "absent"], &Device::host()).unwrap_err();
    assert!(matches!(&error, Error::NotFound(key) if key.to_string() == "\"absent\""), "{error}");
}

#[test]
fn ranges_and_writers_give_the_same_bytes_across_chunks() {
    let folder = folder();
    let store = Store::create(folder.path().join("s")).unwrap();
    let chunk = 1 << 20;
    for (key, len) in [("empty", 0), ("small", 5000), ("one", chunk), ("many", 3 * chunk + 12345)] {
        let value = bytes(len as u64, len);
        store.put(key, &value).unwrap();
        let mut out = Vec::new();
        assert_eq!(store.get_to_writer(key, &mut out).unwrap().len_bytes, len as u64);
        assert!(out == value);
        let mut destination = vec![0; len + 3];
        store.get_into(key, &mut destination).unwrap();
        assert!(destination[..len] == value);
        for (start, end) in
            [(0, 0), (0, 1), (1, 4096), (chunk - 1, chunk + 1), (chunk, 2 * chunk), (5, len), (len, len)]
        {
            if start <= end && end <= len {
                let range = store.get_range(key, start as u64..end as u64, &Device::host()).unwrap();
                assert!(range.as_host().unwrap() == &value[start..end], "{key} {start}..{end}");
            }
        }
        let error = store.get_range(key, 0..len as u64 + 1, &Device::host()).unwrap_err();
        assert!(matches!(error, Error::RangeOutOfBounds { .. }), "{error}");
    }
    let error = store.get_into("many", &mut [0; 10]).unwrap_err();
    assert!(matches!(error, Error::DestinationTooSmall { available: 10, .. }), "{error}");
}

#[test]
fn a_batch_is_seen_whole_and_its_last_word_on_a_key_counts() {
    let folder = folder();
    let store = Store::create(folder.path().join("s")).unwrap();
    store.put("old", b"old").unwrap();
    let mut batch = store.batch();
    batch.put("a", b"first").unwrap();
    batch.put("a", b"second").unwrap();
    batch.delete("old").unwrap();
    batch.delete("b").unwrap();
    batch.put("b", b"back").unwrap();
    assert!(store.contains("old").unwrap() && !store.contains("a").unwrap());
    batch.commit().unwrap();
    let expected = BTreeMap::from([(b"a".to_vec(), b"second".to_vec()), (b"b".to_vec(), b"back".to_vec())]);
    assert_eq!(contents(&store), expected);
    assert!(store.delete("a").unwrap());
    assert!(!store.delete("a").unwrap());
    store.batch().commit().unwrap();
}

#[test]
fn a_snapshot_does_not_move() {
    let folder = folder();
    let store = small().open(folder.path().join("s")).unwrap();
    for n in 0..300u64 {
        store.put(format!("k{n:03}"), &bytes(n, 100)).unwrap();
    }
    let snapshot = store.snapshot();
    for n in 0..300u64 {
        if n % 3 == 0 {
            store.delete(format!("k{n:03}")).unwrap();
        } else {
            store.put(format!("k{n:03}"), &bytes(n + 1000, 200)).unwrap();
        }
    }
    assert_eq!(snapshot.scan("").count(), 300);
    assert_eq!(store.scan("").count(), 200);
    assert_eq!(store.scan("k1").count(), 67);
    for n in 0..300u64 {
        let then = snapshot.get(format!("k{n:03}"), &Device::host()).unwrap();
        assert_eq!(then.as_host().unwrap(), bytes(n, 100));
    }
}

#[test]
fn random_operations_agree_with_a_map_over_reopenings_and_flushes() {
    let folder = folder();
    let path = folder.path().join("s");
    for maintenance in [Maintenance::Inline, Maintenance::Background] {
        let mut model: BTreeMap<Vec<u8>, Vec<u8>> = BTreeMap::new();
        let mut random = 12345u64;
        let mut next = |below: u64| {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (random >> 33) % below
        };
        let _ = std::fs::remove_dir_all(&path);
        let options = || small().maintenance(maintenance);
        let mut store = options().open(&path).unwrap();
        for step in 0..1500 {
            match next(20) {
                0 => {
                    if next(2) == 0 {
                        store.close().unwrap();
                    } else {
                        drop(store);
                    }
                    store = options().open(&path).unwrap();
                    assert_eq!(contents(&store), model, "after step {step}");
                }
                1..5 => {
                    let mut batch = store.batch();
                    let values: Vec<_> = (0..next(8))
                        .map(|_| (format!("{}", next(400)).into_bytes(), bytes(next(1 << 40), next(20_000) as usize)))
                        .collect();
                    if next(2) == 0 {
                        batch.durability(Durability::Eventual);
                    }
                    for (key, value) in &values {
                        batch.put(key, value).unwrap();
                        model.insert(key.clone(), value.clone());
                    }
                    let gone = format!("{}", next(400)).into_bytes();
                    batch.delete(&gone).unwrap();
                    model.remove(&gone);
                    batch.commit().unwrap();
                }
                5..8 => {
                    let key = format!("{}", next(400)).into_bytes();
                    assert_eq!(store.delete(&key).unwrap(), model.remove(&key).is_some());
                }
                _ => {
                    let len = if next(50) == 0 { 90_000 } else { 3000 };
                    let (key, value) = (format!("{}", next(400)).into_bytes(), bytes(step, next(len) as usize));
                    store.put(&key, &value).unwrap();
                    model.insert(key, value);
                }
            }
        }
        assert_eq!(contents(&store), model);
        let live: u64 = model.values().map(|value| value.len() as u64).sum();
        assert_eq!(store.stat().unwrap().live_bytes, live);
        let report = store.verify(|_| {}).unwrap();
        assert!(report.is_sound(), "{:?}", report.damages);
        assert_eq!(report.keys, model.len() as u64);
        store.close().unwrap();
    }
}

#[test]
fn threads_share_a_store_and_their_syncs() {
    let folder = folder();
    let path = folder.path().join("s");
    let store = small().open(&path).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..8u64 {
            let store = store.clone();
            scope.spawn(move || {
                for n in 0..60u64 {
                    let value = bytes(thread << 32 | n, if n % 20 == 7 { 150_000 } else { 2000 });
                    store.put(format!("{thread}-{n}"), &value).unwrap();
                    let got = store.get(format!("{thread}-{n}"), &Device::host()).unwrap();
                    assert_eq!(got.as_host().unwrap(), value);
                }
            });
        }
    });
    let metrics = store.metrics();
    assert_eq!(metrics.commits, 480);
    drop(store);
    let store = Store::open(&path).unwrap();
    assert_eq!(store.scan("").count(), 480);
    assert!(store.verify(|_| {}).unwrap().is_sound());
}

#[test]
fn one_writer_and_any_number_of_readers() {
    let folder = folder();
    let path = folder.path().join("s");
    let store = Store::create(&path).unwrap();
    store.put("a", b"1").unwrap();
    let error = Store::open(&path).unwrap_err();
    let Error::Locked { holder, .. } = &error else { panic!("{error}") };
    assert!(holder.contains(&std::process::id().to_string()), "{holder}");
    let reader = Store::options().read_only(true).open(&path).unwrap();
    assert_eq!(reader.get("a", &Device::host()).unwrap().as_host().unwrap(), b"1");
    assert!(matches!(reader.put("b", b"2"), Err(Error::ReadOnly { .. })));
    assert!(matches!(reader.delete("a"), Err(Error::ReadOnly { .. })));
    store.put("b", b"2").unwrap();
    assert!(!reader.contains("b").unwrap(), "a reader sees the state it opened");
    let later = Store::options().read_only(true).open(&path).unwrap();
    assert!(later.contains("b").unwrap());
    drop(store);
    Store::open(&path).unwrap();
}

#[test]
fn a_closed_store_says_so_to_every_clone() {
    let folder = folder();
    let store = Store::create(folder.path().join("s")).unwrap();
    store.put("a", b"1").unwrap();
    let (clone, snapshot, mut scan) = (store.clone(), store.snapshot(), store.scan(""));
    store.close().unwrap();
    assert!(matches!(clone.put("b", b"2"), Err(Error::Closed)));
    assert!(matches!(clone.get("a", &Device::host()), Err(Error::Closed)));
    assert!(matches!(snapshot.contains("a"), Err(Error::Closed)));
    assert!(matches!(scan.next(), Some(Err(Error::Closed))));
    assert!(matches!(clone.sync(), Err(Error::Closed)));
    assert!(matches!(clone.stat(), Err(Error::Closed)));
    assert!(matches!(clone.close(), Err(Error::Closed)));
}

#[test]
fn attributes_come_back() {
    let folder = folder();
    let path = folder.path().join("s");
    let store = Store::create(&path).unwrap();
    let attributes = vec![("step".to_owned(), b"100".to_vec()), ("".to_owned(), vec![0, 255])];
    let mut batch = store.batch();
    let value = bytes(1, 3 << 20);
    batch
        .put_with_attributes("w", TensorRef::new(Dtype::BF16, &[3 << 19], &value).unwrap(), attributes.clone())
        .unwrap();
    batch.put("plain", b"x").unwrap();
    batch.commit().unwrap();
    store.close().unwrap();
    let store = Store::open(&path).unwrap();
    assert_eq!(store.attributes("w").unwrap(), attributes);
    assert_eq!(store.attributes("plain").unwrap(), vec![]);
    assert!(matches!(store.attributes("absent"), Err(Error::NotFound(_))));
}

#[test]
fn a_closed_store_takes_little_more_space_than_its_values() {
    let folder = folder();
    // (value length, values in a batch, values, the most that may come on top)
    for (len, batch_len, count, overhead) in [(16 << 10, 64, 4096, 0.03), (1 << 20, 1, 64, 0.005)] {
        let path = folder.path().join(format!("{len}"));
        let store = Store::options().create(true).durability(Durability::Eventual).open(&path).unwrap();
        let values: Vec<Vec<u8>> = (0..8).map(|seed| bytes(seed, len)).collect();
        for first in (0..count).step_by(batch_len) {
            let mut batch = store.batch();
            for n in first..first + batch_len {
                batch.put(format!("model.layers.{}.mlp.experts.{n}.weight", n % 61), &values[n % 8]).unwrap();
            }
            batch.commit().unwrap();
        }
        store.close().unwrap();
        let store = Store::options().read_only(true).open(&path).unwrap();
        let stat = store.stat().unwrap();
        let payload = (len * count) as f64;
        assert_eq!(stat.live_bytes as f64, payload);
        let on_top = stat.disk_bytes.max(stat.file_bytes) as f64 / payload - 1.0;
        println!("{count} values of {len} bytes: {:.2} % on top", on_top * 100.0);
        assert!(on_top <= overhead, "{len}: {on_top:.4} over {overhead}");
    }
}
