//! Stores for years: what version 1 of the format wrote is read, written to, backed up and mended by every later build,
//! and features of later builds are met as the format says.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use alight::{Device, Dtype, Error, FeatureFlags, Store};
use alight_format::Manifest;
use tempfile::TempDir;

/// A copy of the store that is kept with the format, to be opened and written to.
fn golden() -> (TempDir, PathBuf) {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("format/golden/store");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("golden");
    std::fs::create_dir_all(path.join("index")).unwrap();
    std::fs::create_dir(path.join("segments")).unwrap();
    std::fs::copy(from.join("MANIFEST"), path.join("MANIFEST")).unwrap();
    for segment in std::fs::read_dir(from.join("segments")).unwrap() {
        let segment = segment.unwrap();
        std::fs::copy(segment.path(), path.join("segments").join(segment.file_name())).unwrap();
    }
    (folder, path)
}

type Contents = BTreeMap<String, (Dtype, Vec<u64>, Vec<u8>)>;

fn contents(store: &Store) -> Contents {
    let infos: Vec<_> = store.scan("").map(Result::unwrap).collect();
    let value = |info: &alight::TensorInfo| {
        let bytes = store.get(&info.key, &Device::host()).unwrap().to_host().unwrap();
        (info.key.as_str().unwrap().to_owned(), (info.dtype, info.shape.clone(), bytes))
    };
    infos.iter().map(value).collect()
}

/// What it holds, as the format's own tests have put it there: by puts, a delete, an alias, a replacement, commits of
/// compaction, beside a torn tail and a tail that was cut.
fn expected() -> Contents {
    let block: Vec<u8> = (0..5000u32).map(|at| (at % 251) as u8).collect();
    [
        ("again", (Dtype::U8, vec![5000], block.clone())),
        ("block", (Dtype::U8, vec![5000], block)),
        ("empty", (Dtype::I8, vec![0, 7], vec![])),
        ("layers.0.b", (Dtype::F64, vec![], 1.5f64.to_le_bytes().to_vec())),
        ("layers.0.w", (Dtype::BF16, vec![3], vec![1, 2, 3, 4, 5, 6])),
    ]
    .map(|(key, value)| (key.to_owned(), value))
    .into()
}

#[test]
fn a_store_of_version_1_is_read_and_written_to() {
    let (_folder, path) = golden();
    let reader = Store::options().read_only(true).open(&path).unwrap();
    assert_eq!(contents(&reader), expected());
    let stat = reader.stat().unwrap();
    assert_eq!((stat.format_version, stat.flags, stat.last_commit), (1, FeatureFlags::default(), 5));
    for round in 0..3u8 {
        let store = Store::open(&path).unwrap();
        let mut found = contents(&store);
        found.retain(|key, _| !key.starts_with("new"));
        assert_eq!(found, expected(), "round {round}");
        store.put(format!("new{round}"), &[round; 9000]).unwrap();
        assert!(reader.refresh().unwrap());
        assert_eq!(contents(&reader), contents(&store));
        store.close().unwrap();
    }
}

#[test]
fn a_store_of_version_1_is_backed_up_and_salvaged() {
    let (folder, path) = golden();
    let (backup, salvaged) = (folder.path().join("backup"), folder.path().join("salvaged"));
    let store = Store::open(&path).unwrap();
    store.backup(&backup).unwrap();
    store.close().unwrap();
    assert_eq!(contents(&Store::open(&backup).unwrap()), expected());
    let (_folder, path) = golden();
    let report = Store::options().repair(&path, &salvaged, |_| {}).unwrap();
    assert_eq!(contents(&Store::open(&salvaged).unwrap()), expected());
    // The torn commit is the one thing that is not there.
    let named: Vec<_> = report.damages.iter().filter_map(|damage| damage.key.as_ref()).collect();
    assert_eq!(named, [&alight::DisplayKey(b"torn".to_vec())], "{:?}", report.damages);
    assert_eq!((report.keys, report.keys_lost), (5, 0));
}

#[test]
fn the_index_of_a_store_of_version_1_is_made_anew() {
    let (_folder, path) = golden();
    Store::options().rebuild_index(&path, |_| {}).unwrap();
    assert_eq!(contents(&Store::open(&path).unwrap()), expected());
    assert!(Store::open(&path).unwrap().verify(|_| {}).unwrap().is_sound());
}

/// Every file with its bytes.
fn image(path: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(path).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(image(&path))
        } else {
            drop(files.insert(path.clone(), std::fs::read(&path).unwrap()))
        }
    }
    files
}

fn set_flags(path: &Path, flags: [u64; 3]) {
    let file = path.join("MANIFEST");
    let mut bytes = std::fs::read(&file).unwrap();
    // The three words of the head, under the head's digest and the whole's: SPEC.md, section 5.
    for (word, at) in flags.into_iter().zip([16, 24, 32]) {
        bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
    }
    let head = alight_format::crc32(&bytes[..60]).to_le_bytes();
    bytes[60..64].copy_from_slice(&head);
    let end = bytes.len() - 4;
    let whole = alight_format::crc32(&bytes[..end]).to_le_bytes();
    bytes[end..].copy_from_slice(&whole);
    std::fs::write(file, bytes).unwrap();
}

#[test]
fn an_incompatible_feature_is_refused_before_anything_is_written() {
    let (folder, path) = golden();
    set_flags(&path, [0, 0, 1 << 7]);
    let before = image(&path);
    let target = folder.path().join("target");
    let refusals = [
        Store::open(&path).map(drop),
        Store::options().read_only(true).open(&path).map(drop),
        Store::options().create(true).open(&path).map(drop),
        Store::options().rebuild_index(&path, |_| {}).map(drop),
        Store::options().repair(&path, &target, |_| {}).map(drop),
    ];
    for refusal in refusals {
        let error = refusal.unwrap_err();
        assert!(matches!(&error, Error::Newer { what, .. } if what.contains("0x80")), "{error}");
    }
    assert!(image(&path) == before && !target.exists());
}

#[test]
fn a_read_only_compatible_feature_lets_the_store_be_read_backed_up_and_salvaged() {
    let (folder, path) = golden();
    set_flags(&path, [0, 1 << 3, 0]);
    let before = image(&path);
    for refusal in [Store::open(&path).map(drop), Store::options().rebuild_index(&path, |_| {}).map(drop)] {
        assert!(matches!(refusal, Err(Error::Newer { .. })));
    }
    assert!(image(&path) == before, "nothing is written");
    let reader = Store::options().read_only(true).open(&path).unwrap();
    assert_eq!(contents(&reader), expected());
    assert_eq!(reader.stat().unwrap().flags.read_only_compatible, 1 << 3);
    let salvaged = folder.path().join("salvaged");
    Store::options().repair(&path, &salvaged, |_| {}).unwrap();
    assert_eq!(contents(&Store::open(&salvaged).unwrap()), expected());
    // A backup keeps the feature: its segments have it.
    let backup = folder.path().join("backup");
    reader.backup(&backup).unwrap();
    assert!(matches!(Store::open(&backup), Err(Error::Newer { .. })));
    assert_eq!(contents(&Store::options().read_only(true).open(&backup).unwrap()), expected());
}

#[test]
fn a_compatible_feature_is_kept_through_every_kind_of_writing() {
    let (folder, path) = golden();
    set_flags(&path, [1 << 63 | 1, 0, 0]);
    let flags =
        |path: &Path| Manifest::decode(&std::fs::read(path.join("MANIFEST")).unwrap()).unwrap().flags.compatible;
    let store = Store::open(&path).unwrap();
    store.put("k", b"v").unwrap();
    let backup = folder.path().join("backup");
    store.backup(&backup).unwrap();
    store.close().unwrap();
    Store::options().rebuild_index(&path, |_| {}).unwrap();
    for path in [&path, &backup] {
        assert_eq!(flags(path), 1 << 63 | 1);
        assert_eq!(Store::open(path).unwrap().stat().unwrap().flags.compatible, 1 << 63 | 1);
    }
}
