//! What a store answers to input that cannot be right: a typed error each time, and nothing lost.

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use alight::storage::sim::SimStorage;
use alight::{Device, Dtype, Error, Store, StoreOptions, TensorRef};
use alight_format::{FeatureFlags, Manifest};
use common::bytes;
use tempfile::TempDir;

/// A closed store with a few keys in several segments and an index run.
fn made(folder: &TempDir, name: &str) -> PathBuf {
    let path = folder.path().join(name);
    let store = Store::options().create_new(true).segment_bytes(64 << 10).open(&path).unwrap();
    for n in 0..12u64 {
        store.put(format!("k{n:02}"), &bytes(n, 9000)).unwrap();
    }
    store.close().unwrap();
    path
}

fn is_as_made(path: &Path) {
    let store = Store::open(path).unwrap();
    for n in 0..12u64 {
        assert_eq!(store.get(format!("k{n:02}"), &Device::host()).unwrap().as_host().unwrap(), bytes(n, 9000));
    }
    assert_eq!(store.scan("").count(), 12);
    assert!(store.verify(|_| {}).unwrap().is_sound());
}

fn segments(path: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(path.join("segments")).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

/// Both ways of opening refuse, with damage that names the file.
fn is_refused_as_damaged(path: &Path, file: &Path) {
    for options in [Store::options(), Store::options().read_only(true)] {
        let error = read_all(options, path).unwrap_err();
        let Error::Damaged(damage) = &error else { panic!("{error}") };
        assert_eq!(damage.path, file, "{error}");
    }
}

/// Opens a store and reads every value.
fn read_all(options: StoreOptions, path: &Path) -> alight::Result<()> {
    let store = options.open(path)?;
    for info in store.scan("") {
        store.get(&info?.key, &Device::host())?;
    }
    Ok(())
}

#[test]
fn keys_are_one_to_a_thousand_and_twenty_four_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let path = made(&folder, "s");
    let store = Store::open(&path).unwrap();
    for key in [vec![], vec![b'k'; 1025]] {
        assert!(matches!(store.put(&key, b"x"), Err(Error::InvalidKey { len_bytes }) if len_bytes == key.len()));
        assert!(matches!(store.get(&key, &Device::host()), Err(Error::InvalidKey { .. })));
        assert!(matches!(store.delete(&key), Err(Error::InvalidKey { .. })));
        assert!(matches!(store.info(&key), Err(Error::InvalidKey { .. })));
    }
    let longest = vec![0xff; 1024];
    store.put(&longest, b"x").unwrap();
    assert!(store.contains(&longest).unwrap());
    store.delete(&longest).unwrap();
    store.close().unwrap();
    is_as_made(&path);
}

#[test]
fn a_batch_with_one_bad_change_keeps_the_good_ones() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::create(folder.path().join("s")).unwrap();
    let mut batch = store.batch();
    batch.put("good", b"1").unwrap();
    assert!(matches!(batch.put("", b"2"), Err(Error::InvalidKey { .. })));
    let attributes = vec![("name".to_owned(), vec![0; 65 << 10])];
    assert!(matches!(batch.put_with_attributes("a", b"3", attributes), Err(Error::LimitExceeded { .. })));
    assert_eq!(batch.len(), 1);
    batch.commit().unwrap();
    assert_eq!(store.scan("").count(), 1);
}

#[test]
fn shapes_belong_to_their_bytes() {
    let twelve = [1u8; 12];
    for (dtype, shape) in
        [(Dtype::F32, vec![4]), (Dtype::F32, vec![]), (Dtype::U8, vec![u64::MAX, u64::MAX]), (Dtype::F4, vec![3])]
    {
        let error = TensorRef::new(dtype, &shape, &twelve).unwrap_err();
        assert!(matches!(error, Error::ShapeMismatch { actual: 12, .. }), "{error}");
    }
    let error = TensorRef::new(Dtype::U8, &vec![1; 10_000], &twelve[..1]).unwrap_err();
    assert!(matches!(error, Error::LimitExceeded { value: 10_000, .. }), "{error}");
}

#[test]
fn values_of_no_bytes_are_values() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let store = Store::create(&path).unwrap();
    store.put("none", TensorRef::new(Dtype::F16, &[0, 7], &[]).unwrap()).unwrap();
    store.close().unwrap();
    let tensor = Store::open(&path).unwrap().get("none", &Device::host()).unwrap();
    assert_eq!((tensor.dtype(), tensor.shape(), tensor.len_bytes()), (Dtype::F16, &[0u64, 7][..], 0));
}

#[test]
fn a_reader_that_fails_stores_nothing() {
    struct Short;
    impl alight::ReadAt for Short {
        fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
            buf.fill(7);
            if offset + buf.len() as u64 > 5_000_000 { Err(std::io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let path = made(&folder, "s");
    let store = Store::open(&path).unwrap();
    for len in [5_000_001u64, 100 << 20] {
        let value = TensorRef::from_reader(Dtype::U8, &[len], &Short, 0).unwrap();
        assert!(matches!(store.put("new", value), Err(Error::Source { .. })));
        assert!(!store.contains("new").unwrap());
    }
    store.put("new", TensorRef::from_reader(Dtype::U8, &[4_000_000], &Short, 100).unwrap()).unwrap();
    assert!(store.get("new", &Device::host()).unwrap().as_host().unwrap().iter().all(|&byte| byte == 7));
    store.delete("new").unwrap();
    store.close().unwrap();
    is_as_made(&path);
}

#[test]
fn a_path_that_holds_no_store_is_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let absent = Store::open(at("absent")).unwrap_err();
    assert!(matches!(&absent, Error::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound), "{absent}");
    std::fs::create_dir(at("empty")).unwrap();
    assert!(matches!(Store::open(at("empty")), Err(Error::NotAStore { .. })));
    std::fs::write(at("file"), b"hello").unwrap();
    assert!(matches!(Store::open(at("file")), Err(Error::NotAStore { .. })));
    assert!(matches!(Store::create(at("file")), Err(Error::NotAStore { .. })));
    std::fs::create_dir(at("foreign")).unwrap();
    std::fs::write(at("foreign").join("photo.jpg"), b"jpeg").unwrap();
    for error in [Store::open(at("foreign")).unwrap_err(), Store::create(at("foreign")).unwrap_err()] {
        assert!(matches!(&error, Error::NotAStore { why, .. } if why.contains("photo.jpg")), "{error}");
    }
    assert_eq!(std::fs::read_dir(at("foreign")).unwrap().count(), 1, "nothing was written there");
    let path = made(&folder, "s");
    assert!(matches!(Store::create(&path), Err(Error::AlreadyExists { .. })));
    Store::create(at("empty")).unwrap();
    is_as_made(&path);
}

#[test]
fn options_out_of_range_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    for options in [
        Store::options().create(true).segment_bytes(4096),
        Store::options().create(true).segment_bytes(100_001),
        Store::options().create(true).segment_bytes(u64::MAX),
        Store::options().create(true).overlay_entries_max(0),
        Store::options().create(true).read_only(true),
    ] {
        assert!(matches!(options.open(&path), Err(Error::InvalidOption { .. })));
    }
    assert!(!path.exists());
}

#[test]
fn a_store_of_a_newer_format_is_refused_before_anything_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = made(&folder, "s");
    let file = path.join("MANIFEST");
    let sound = std::fs::read(&file).unwrap();
    let manifest = Manifest::decode(&sound).unwrap();
    let flagged = |flags| Manifest { flags, ..manifest.clone() }.encode().unwrap();

    std::fs::remove_file(path.join("LOCK")).unwrap();
    // The version is in the head, under the head's digest and the whole's.
    let mut newer = sound.clone();
    newer[8..12].copy_from_slice(&9u32.to_le_bytes());
    let head = alight_format::crc32(&newer[..60]).to_le_bytes();
    newer[60..64].copy_from_slice(&head);
    let end = newer.len() - 4;
    let whole = alight_format::crc32(&newer[..end]).to_le_bytes();
    newer[end..].copy_from_slice(&whole);
    std::fs::write(&file, &newer).unwrap();
    for options in [Store::options(), Store::options().read_only(true)] {
        assert!(matches!(options.open(&path), Err(Error::Newer { .. })));
    }
    assert!(!path.join("LOCK").exists(), "nothing was written");

    std::fs::write(&file, flagged(FeatureFlags { read_only_compatible: 4, ..FeatureFlags::default() })).unwrap();
    assert!(matches!(Store::open(&path), Err(Error::Newer { .. })));
    read_all(Store::options().read_only(true), &path).unwrap();

    std::fs::write(&file, flagged(FeatureFlags { compatible: 1 << 40, ..FeatureFlags::default() })).unwrap();
    is_as_made(&path);
    let kept = Manifest::decode(&std::fs::read(&file).unwrap()).unwrap();
    assert_eq!(kept.flags.compatible, 1 << 40, "a compatible flag is kept");
}

#[test]
fn segments_that_are_missing_truncated_swapped_or_foreign_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let (path, other) = (made(&folder, "s"), made(&folder, "other"));
    let files = segments(&path);
    assert!(files.len() >= 2, "{files:?}");
    let (first, second) = (&files[0], &files[1]);
    let (one, two) = (std::fs::read(first).unwrap(), std::fs::read(second).unwrap());

    std::fs::remove_file(first).unwrap();
    is_refused_as_damaged(&path, first);
    std::fs::write(first, &one[..one.len() - 4096]).unwrap();
    is_refused_as_damaged(&path, first);
    std::fs::write(first, &two).unwrap();
    is_refused_as_damaged(&path, first);
    std::fs::write(first, std::fs::read(&segments(&other)[0]).unwrap()).unwrap();
    is_refused_as_damaged(&path, first);
    std::fs::write(first, &one).unwrap();

    // A foreign segment under a number that is still to come.
    let strange = path.join("segments/00000099.seg");
    std::fs::write(&strange, std::fs::read(&segments(&other)[0]).unwrap()).unwrap();
    is_refused_as_damaged(&path, &strange);
    std::fs::remove_file(&strange).unwrap();
    is_as_made(&path);
}

#[test]
fn an_index_run_or_a_manifest_that_is_missing_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = made(&folder, "s");
    let run = std::fs::read_dir(path.join("index")).unwrap().next().unwrap().unwrap().path();
    for (file, whole) in [(run.clone(), std::fs::read(&run).unwrap()), {
        let manifest = path.join("MANIFEST");
        let bytes = std::fs::read(&manifest).unwrap();
        (manifest, bytes)
    }] {
        std::fs::remove_file(&file).unwrap();
        is_refused_as_damaged(&path, &file);
        std::fs::write(&file, &whole[..whole.len() / 2]).unwrap();
        is_refused_as_damaged(&path, &file);
        std::fs::write(&file, &whole).unwrap();
        is_as_made(&path);
    }
}

fn tiny(sim: &SimStorage) -> StoreOptions {
    Store::options().storage(Arc::new(sim.clone())).segment_bytes(64 << 10).create(true)
}

#[test]
fn a_read_only_file_system_is_read() {
    let sim = SimStorage::new();
    let store = tiny(&sim).open("/s").unwrap();
    store.put("a", b"1").unwrap();
    store.close().unwrap();
    sim.set_read_only(true);
    assert!(matches!(tiny(&sim).open("/s"), Err(Error::Io { .. })));
    let store = Store::options().storage(Arc::new(sim.clone())).read_only(true).open("/s").unwrap();
    assert_eq!(store.get("a", &Device::host()).unwrap().as_host().unwrap(), b"1");
    sim.set_read_only(false);
    assert!(tiny(&sim).open("/s").unwrap().contains("a").unwrap());
}

#[test]
fn a_full_disk_refuses_what_has_no_room_and_goes_on_when_there_is_some() {
    let sim = SimStorage::new();
    let store = tiny(&sim).open("/s").unwrap();
    store.put("kept", &bytes(1, 5000)).unwrap();
    sim.set_capacity(Some(200 << 10));
    let mut stored = Vec::new();
    let error = (0..100u64)
        .find_map(|n| match store.put(format!("k{n:03}"), &bytes(n, 9000)) {
            Ok(()) => {
                stored.push(n);
                None
            }
            Err(error) => Some(error),
        })
        .expect("the disk is full at some point");
    assert!(error.is_no_space(), "{error}");
    assert!(stored.len() > 3);
    let large = store.put("large", &bytes(9, 300_000)).unwrap_err();
    assert!(large.is_no_space(), "{large}");
    for &n in &stored {
        assert_eq!(store.get(format!("k{n:03}"), &Device::host()).unwrap().as_host().unwrap(), bytes(n, 9000));
    }
    // Room again, without opening the store anew.
    sim.set_capacity(None);
    store.put("after", b"2").unwrap();
    store.put("large", &bytes(9, 300_000)).unwrap();
    store.close().unwrap();
    let store = tiny(&sim).open("/s").unwrap();
    assert_eq!(store.scan("").count(), stored.len() + 3);
    assert!(store.verify(|_| {}).unwrap().is_sound());
}
