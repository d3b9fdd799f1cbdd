//! Space is given back, and nothing that anybody sees goes with it.

mod common;

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use alight::storage::sim::{Abilities, SimStorage};
use alight::{CompactOptions, CompactReport, Device, Error, Eviction, Maintenance, Store, StoreOptions};
use common::bytes;
use common::rebuild::rebuilt_keys;

const PATH: &str = "/store";

type Contents = BTreeMap<Vec<u8>, Vec<u8>>;

fn tiny(sim: &SimStorage) -> StoreOptions {
    Store::options()
        .storage(Arc::new(sim.clone()))
        .maintenance(Maintenance::Inline)
        .segment_bytes(256 << 10)
        .small_commit_bytes_max(8 << 10)
        .overlay_entries_max(50)
        .create(true)
}

fn contents(store: &Store) -> Contents {
    let got = |info: alight::TensorInfo| {
        let value = store.get(&info.key, &Device::host()).unwrap().to_host().unwrap();
        (info.key.as_bytes().to_vec(), value)
    };
    store.scan("").map(|info| got(info.unwrap())).collect()
}

fn put(store: &Store, model: &mut Contents, key: u64, seed: u64, len: usize) {
    let (key, value) = (format!("k{key}").into_bytes(), bytes(seed, len));
    store.put(&key, &value).unwrap();
    model.insert(key, value);
}

fn compact(store: &Store) -> CompactReport {
    let report = store.compact(&CompactOptions::default(), |_| {}).unwrap();
    assert!(report.damages.is_empty(), "{:?}", report.damages);
    report
}

#[track_caller]
fn expect(store: &Store, model: &Contents) {
    assert_eq!(contents(store), *model);
    let report = store.verify(|_| {}).unwrap();
    assert!(report.is_sound(), "{:?}", report.damages);
}

fn segments(sim: &SimStorage) -> usize {
    sim.files().iter().filter(|path| path.extension().is_some_and(|kind| kind == "seg")).count()
}

#[test]
fn segments_in_which_nothing_lives_are_removed_without_being_asked() {
    let sim = SimStorage::new();
    let store = tiny(&sim).overlay_entries_max(5).open(PATH).unwrap();
    let mut model = Contents::new();
    for n in 0..600 {
        put(&store, &mut model, n % 7, n, 5000);
    }
    assert!(segments(&sim) < 8, "{} segments", segments(&sim));
    assert!(store.metrics().segments_removed > 10, "{:?}", store.metrics());
    expect(&store, &model);
    store.abandon();
    let store = tiny(&sim).open(PATH).unwrap();
    expect(&store, &model);
}

#[test]
fn compaction_brings_the_space_near_to_what_lives_and_loses_nothing() {
    let sim = SimStorage::new();
    let store = tiny(&sim).open(PATH).unwrap();
    let mut model = Contents::new();
    for n in 0..400 {
        // Some keys are written once, in every segment.
        let key = if n % 9 == 0 { 1000 + n } else { n % 40 };
        put(&store, &mut model, key, n, [100, 3000, 4096, 20_480, 0][(n % 5) as usize]);
    }
    for n in 0..20 {
        store.delete(format!("k{n}")).unwrap();
        model.remove(format!("k{n}").as_bytes());
    }
    let before = store.stat().unwrap();
    let report = compact(&store);
    let after = store.stat().unwrap();
    expect(&store, &model);
    assert!(report.segments_rewritten > 2 && report.bytes_copied > 0, "{report:?}");
    let live: u64 = model.values().map(|value| value.len() as u64).sum();
    assert_eq!((after.live_bytes, before.live_bytes), (live, live));
    assert!(after.disk_bytes < live * 15 / 10, "{live} live, {before:?}, {after:?}");
    assert_eq!(after.pinned_bytes, 0);
    assert_eq!(after.not_given_back, None);
    // A second one finds nothing to do.
    let again = compact(&store);
    assert_eq!((again.segments_rewritten, again.bytes_copied), (0, 0), "{again:?}");
    store.close().unwrap();
    let store = tiny(&sim).open(PATH).unwrap();
    expect(&store, &model);
    let attributes = store.stat().unwrap();
    assert_eq!(attributes.live_bytes, live);
}

#[test]
fn a_snapshot_keeps_its_view_through_removal_punching_and_compaction() {
    let sim = SimStorage::new();
    let store = tiny(&sim).open(PATH).unwrap();
    let mut model = Contents::new();
    let mut held = Vec::new();
    for round in 0..6u64 {
        for n in 0..30 {
            put(&store, &mut model, n, round * 100 + n, [500, 9000, 40_000][(n % 3) as usize]);
        }
        held.push((store.snapshot(), model.clone()));
        compact(&store);
    }
    let stat = store.stat().unwrap();
    assert_eq!(stat.snapshots.len(), 6);
    assert!(stat.pinned_bytes > 5 * 400_000, "{stat:?}");
    assert!(stat.snapshots[0].pinned_bytes >= stat.snapshots[4].pinned_bytes);
    assert!(stat.snapshots[0].pinned_bytes > 0, "{stat:?}");
    while let Some((snapshot, then)) = (!held.is_empty()).then(|| held.remove(0)) {
        for (key, value) in &then {
            assert_eq!(snapshot.get(key, &Device::host()).unwrap().as_host().unwrap(), value);
        }
        drop(snapshot);
        compact(&store);
    }
    let stat = store.stat().unwrap();
    assert_eq!((stat.pinned_bytes, stat.snapshots.len()), (0, 0));
    assert!(stat.disk_bytes < 2 * stat.live_bytes, "{stat:?}");
    expect(&store, &model);
}

#[test]
fn large_values_that_died_are_punched_and_not_copied() {
    let sim = SimStorage::new();
    let store = tiny(&sim).open(PATH).unwrap();
    let mut model = Contents::new();
    // In every segment one value lives on among those that die.
    for n in 0..40 {
        put(&store, &mut model, if n % 5 == 0 { n } else { 1 }, n, 40_000);
    }
    compact(&store);
    let metrics = store.metrics();
    assert!(metrics.bytes_punched > 20 * 32_000, "{metrics:?}");
    expect(&store, &model);
    let stat = store.stat().unwrap();
    assert!(stat.disk_bytes < stat.live_bytes * 14 / 10, "{stat:?}");
    store.close().unwrap();
    expect(&tiny(&sim).open(PATH).unwrap(), &model);
}

#[test]
fn a_reader_elsewhere_keeps_what_it_sees_until_it_goes() {
    let sim = SimStorage::new();
    let store = tiny(&sim).open(PATH).unwrap();
    let mut model = Contents::new();
    for n in 0..30 {
        put(&store, &mut model, n, n, [500, 9000, 40_000][(n % 3) as usize]);
    }
    store.sync().unwrap();
    let read_only = Store::options().storage(Arc::new(sim.clone())).read_only(true);
    let reader = read_only.clone().open(PATH).unwrap();
    let then = model.clone();
    for n in 0..90 {
        put(&store, &mut model, n % 30, 100 + n, [500, 9000, 40_000][(n % 3) as usize]);
    }
    compact(&store);
    assert!(store.stat().unwrap().pinned_bytes > 300_000);
    assert_eq!(contents(&reader), then);
    // The writer goes and comes back; the reader is still there.
    store.close().unwrap();
    let store = tiny(&sim).open(PATH).unwrap();
    compact(&store);
    assert_eq!(contents(&reader), then);
    let newer = read_only.open(PATH).unwrap();
    drop(reader);
    compact(&store);
    assert_eq!(contents(&newer), model);
    let stat = store.stat().unwrap();
    assert!(stat.disk_bytes < stat.live_bytes * 2, "{stat:?}");
    drop(newer);
    expect(&store, &model);
}

#[test]
fn where_readers_cannot_be_seen_nothing_goes_and_stat_says_why() {
    let sim = SimStorage::new();
    sim.set_abilities(Abilities { share_bytes: false, ..Abilities::default() });
    let store = tiny(&sim).open(PATH).unwrap();
    let mut model = Contents::new();
    for n in 0..100 {
        put(&store, &mut model, n % 7, n, 20_000);
    }
    let before = segments(&sim);
    compact(&store);
    assert!(segments(&sim) >= before);
    assert_eq!(store.metrics().bytes_punched, 0);
    let stat = store.stat().unwrap();
    assert!(stat.not_given_back.as_deref().is_some_and(|why| why.contains("other processes")), "{stat:?}");
    assert!(stat.pinned_bytes > 0);
    expect(&store, &model);
}

#[test]
fn without_holes_compaction_copies_instead() {
    let sim = SimStorage::new();
    sim.set_abilities(Abilities { punch: false, ..Abilities::default() });
    let store = tiny(&sim).open(PATH).unwrap();
    let mut model = Contents::new();
    for n in 0..100 {
        put(&store, &mut model, if n % 5 == 0 { n } else { 1 }, n, 40_000);
    }
    compact(&store);
    compact(&store);
    let stat = store.stat().unwrap();
    assert!(stat.disk_bytes < stat.live_bytes * 14 / 10, "{stat:?}");
    expect(&store, &model);
}

/// The story: a delete in a segment in which nothing lives hides an older put in one that stays. Were the segment to go, an
/// index made anew from the segments would have the key again.
#[test]
fn what_is_left_of_the_segments_gives_the_same_keys_at_any_time() {
    let sim = SimStorage::new();
    let store = tiny(&sim).open(PATH).unwrap();
    let mut model = Contents::new();
    // A segment that is never worth a rewrite, with small values that die in it one by one.
    let mut batch = store.batch();
    let (rock, pebble) = (bytes(1, 60_000), bytes(2, 60));
    batch.put("rock", &rock).unwrap();
    (0..15).for_each(|n| batch.put(format!("pebble{n}"), &pebble).unwrap());
    batch.commit().unwrap();
    model.insert(b"rock".to_vec(), rock.clone());
    (0..15).for_each(|n| drop(model.insert(format!("pebble{n}").into_bytes(), pebble.clone())));
    for n in 0..500u64 {
        if n % 40 == 11 {
            store.delete(format!("pebble{}", n / 40)).unwrap();
            model.remove(format!("pebble{}", n / 40).as_bytes());
        }
        let key = n * 7 % 40;
        if n % 3 == 2 {
            store.delete(format!("k{key}")).unwrap();
            model.remove(format!("k{key}").as_bytes());
        } else {
            put(&store, &mut model, key, n, [60, 5000, 9000, 20_000][(n % 4) as usize]);
        }
        // Written once, and alive in the oldest segments for ever.
        if n % 50 == 0 {
            put(&store, &mut model, 1000 + n, n, 3000);
        }
        if n % 60 == 59 {
            compact(&store);
            store.sync().unwrap();
            assert!(sim.files().iter().any(|path| path.ends_with("00000001.seg")), "the rock stays where it is");
            assert_eq!(rebuilt_keys(&sim), model.keys().cloned().collect::<Vec<_>>(), "after {n}");
        }
    }
    assert!(store.metrics().segments_removed > 10);
    expect(&store, &model);
}

#[test]
fn a_damaged_value_stays_where_it_is_and_fails_alone() {
    let sim = SimStorage::new();
    let store = tiny(&sim).open(PATH).unwrap();
    let mut model = Contents::new();
    for n in 0..60 {
        put(&store, &mut model, n % 45, n, 5000);
    }
    let damaged = model[b"k20".as_slice()].clone();
    let mut hit = 0;
    for path in sim.files() {
        let mut bytes = sim.read_file(&path);
        if let Some(at) = bytes.windows(damaged.len()).position(|window| window == damaged) {
            bytes[at + 100] ^= 1;
            sim.write_file(&path, &bytes);
            hit += 1;
        }
    }
    assert_eq!(hit, 1);
    let report = store.compact(&CompactOptions::default(), |_| {}).unwrap();
    assert_eq!(report.damages.len(), 1, "{:?}", report.damages);
    assert!(report.damages[0].to_string().contains("k20"), "{}", report.damages[0]);
    for (key, value) in &model {
        let got = store.get(key, &Device::host());
        if key == b"k20" {
            assert!(got.unwrap_err().is_damage())
        } else {
            assert_eq!(got.unwrap().as_host().unwrap(), value)
        }
    }
    let again = store.compact(&CompactOptions::default(), |_| {}).unwrap();
    assert_eq!(again.bytes_copied, 0, "it is left alone: {again:?}");
}

#[test]
fn attributes_and_shapes_move_along() {
    let sim = SimStorage::new();
    let store = tiny(&sim).open(PATH).unwrap();
    let value = bytes(3, 24);
    let mut batch = store.batch();
    let tensor = alight::TensorRef::new(alight::Dtype::F32, &[2, 3], &value).unwrap();
    batch.put_with_attributes("kept", tensor, vec![("step".into(), b"7".to_vec())]).unwrap();
    let short = bytes(4, 3000);
    for n in 0..12 {
        batch.put(format!("dies{n}"), &short).unwrap();
    }
    batch.commit().unwrap();
    let long = bytes(9, (2 << 20) + 77);
    store.put("long", &long).unwrap();
    for n in 0..12 {
        store.delete(format!("dies{n}")).unwrap();
    }
    let rewritten = compact(&store).segments_rewritten;
    assert!(rewritten >= 1);
    let info = store.info("kept").unwrap().unwrap();
    assert_eq!((info.dtype, info.shape.as_slice()), (alight::Dtype::F32, [2, 3].as_slice()));
    assert_eq!(store.attributes("kept").unwrap(), [("step".to_owned(), b"7".to_vec())]);
    let part = store.get_range("long", (1 << 20) - 5..(1 << 20) + 5, &Device::host()).unwrap().to_host().unwrap();
    assert_eq!(part, long[(1 << 20) - 5..(1 << 20) + 5]);
}

#[test]
fn commits_and_reads_go_on_beside_compaction() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::options()
        .create(true)
        .segment_bytes(1 << 20)
        .overlay_entries_max(64)
        .background_slack_bytes(1 << 20)
        .durability(alight::Durability::Eventual)
        .open(folder.path().join("s"))
        .unwrap();
    let done = AtomicBool::new(false);
    let model = std::thread::scope(|scope| {
        let writers: Vec<_> = (0..3u64)
            .map(|thread| {
                let store = &store;
                scope.spawn(move || {
                    let mut model = Contents::new();
                    for n in 0..400u64 {
                        let (key, len) = (thread * 1000 + n % 50, [200, 6000, 40_000, 4096][(n % 4) as usize]);
                        put(store, &mut model, key, thread << 32 | n, len);
                        if n % 11 == 0 {
                            store.delete(format!("k{key}")).unwrap();
                            model.remove(format!("k{key}").as_bytes());
                        }
                    }
                    model
                })
            })
            .collect();
        let others: Vec<_> = (0..2)
            .map(|which| {
                let (store, done) = (&store, &done);
                scope.spawn(move || {
                    let mut rounds = 0;
                    while !done.load(Ordering::Relaxed) {
                        if which == 0 {
                            compact(store);
                        } else {
                            let snapshot = store.snapshot();
                            for info in snapshot.scan("") {
                                snapshot.get(info.unwrap().key, &Device::host()).unwrap();
                            }
                        }
                        rounds += 1;
                    }
                    rounds
                })
            })
            .collect();
        let model: Contents = writers.into_iter().flat_map(|writer| writer.join().unwrap()).collect();
        done.store(true, Ordering::Relaxed);
        assert!(others.into_iter().all(|other| other.join().unwrap() > 0));
        model
    });
    expect(&store, &model);
    compact(&store);
    expect(&store, &model);
    store.close().unwrap();
    expect(&Store::open(folder.path().join("s")).unwrap(), &model);
}

/// What the files of a folder take, as `du` counts it.
fn du(folder: &Path) -> u64 {
    std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                du(&entry.path())
            } else {
                entry.metadata().unwrap().blocks() * 512
            }
        })
        .sum()
}

#[test]
fn stat_says_what_du_says_on_a_real_file_system() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let store = Store::options().create(true).segment_bytes(1 << 20).open(&path).unwrap();
    let mut model = Contents::new();
    for n in 0..120 {
        put(&store, &mut model, n % 20, n, 40_000);
    }
    compact(&store);
    let stat = store.stat().unwrap();
    assert_eq!(stat.disk_bytes, du(&path));
    assert!(stat.disk_bytes < stat.live_bytes * 3 / 2, "{stat:?}");
    expect(&store, &model);
}

#[test]
fn a_file_with_a_second_name_is_not_punched() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let options = || Store::options().create(true).segment_bytes(1 << 20).maintenance(Maintenance::Inline);
    let store = options().open(&path).unwrap();
    let mut model = Contents::new();
    for n in 0..60 {
        put(&store, &mut model, n, n, 40_000);
    }
    store.close().unwrap();
    let mut links = Vec::new();
    for entry in std::fs::read_dir(path.join("segments")).unwrap() {
        let from = entry.unwrap().path();
        let to = folder.path().join(from.file_name().unwrap());
        std::fs::hard_link(&from, &to).unwrap();
        let before = std::fs::read(&to).unwrap();
        links.push((to, before));
    }
    let store = options().open(&path).unwrap();
    for n in 0..60 {
        if n % 4 != 0 {
            put(&store, &mut model, n, 100 + n, 40_000);
        }
    }
    compact(&store);
    expect(&store, &model);
    for (link, before) in &links {
        // Commits may have been appended.
        let now = std::fs::read(link).unwrap();
        assert!(now[..before.len()] == *before, "{} was changed", link.display());
    }
}

#[test]
fn a_limit_refuses_what_does_not_fit_and_takes_it_when_there_is_room() {
    let sim = SimStorage::new();
    let store = tiny(&sim).max_bytes(100_000).open(PATH).unwrap();
    let mut model = Contents::new();
    for n in 0..9 {
        put(&store, &mut model, n, n, 10_000);
    }
    let refused = store.put("more", &bytes(7, 10_001)).unwrap_err();
    assert!(matches!(refused, Error::Full { needed: 10_001, max_bytes: 100_000 }), "{refused}");
    put(&store, &mut model, 9, 9, 10_000);
    // In place of what is there, as much fits.
    put(&store, &mut model, 3, 33, 10_000);
    assert!(store.put("k3", &bytes(7, 10_001)).is_err());
    store.delete("k0").unwrap();
    model.remove(b"k0".as_slice());
    put(&store, &mut model, 20, 20, 10_000);
    expect(&store, &model);
    store.close().unwrap();
    let store = tiny(&sim).max_bytes(50_000).open(PATH).unwrap();
    assert!(store.put("more", b"1").is_err(), "it is over its limit already");
    assert!(store.delete("k1").unwrap());
    assert!(matches!(tiny(&sim).eviction(Eviction::Fifo).open("/x"), Err(Error::InvalidOption { .. })));
}

#[test]
fn a_cache_lets_go_of_what_was_put_first() {
    let sim = SimStorage::new();
    let options = || tiny(&sim).max_bytes(200_000).eviction(Eviction::Fifo).overlay_entries_max(10);
    let mut store = options().open(PATH).unwrap();
    let mut order: Vec<(u64, usize)> = Vec::new();
    for n in 0..300u64 {
        let len = [300, 5000, 9000, 20_000, 40_000][(n * 7 % 5) as usize];
        store.put(format!("k{n}"), &bytes(n, len)).unwrap();
        order.push((n, len));
        while order.iter().map(|(_, len)| len).sum::<usize>() > 200_000 {
            order.remove(0);
        }
        let mut kept: Vec<String> = order.iter().map(|(n, _)| format!("k{n}")).collect();
        kept.sort();
        let there: Vec<String> = store.scan("").map(|info| info.unwrap().key.as_str().unwrap().to_owned()).collect();
        assert_eq!(there, kept, "after {n}");
        if n % 90 == 89 {
            store.abandon();
            store = options().open(PATH).unwrap();
        }
    }
    assert!(store.metrics().keys_evicted > 10);
    compact(&store);
    let stat = store.stat().unwrap();
    assert!(stat.live_bytes <= 200_000 && stat.disk_bytes < 300_000, "{stat:?}");
    assert!(matches!(store.put("k", &bytes(1, 200_001)), Err(Error::Full { .. })));
    assert!(store.verify(|_| {}).unwrap().is_sound());
}

#[test]
fn a_cache_keeps_what_is_read_the_longest() {
    let sim = SimStorage::new();
    let store = tiny(&sim).max_bytes(200_000).eviction(Eviction::Lru).open(PATH).unwrap();
    for n in 0..200u64 {
        store.put(format!("k{n}"), &bytes(n, 5000)).unwrap();
        for favourite in [0, 3, 7].into_iter().filter(|&favourite| favourite <= n) {
            store.get(format!("k{favourite}"), &Device::host()).unwrap();
        }
    }
    assert!(store.metrics().keys_evicted >= 150);
    assert_eq!(store.scan("").count(), 40);
    assert!(store.verify(|_| {}).unwrap().is_sound());
}

#[test]
fn threads_share_a_cache_and_keep_to_its_limit() {
    let sim = SimStorage::new();
    sim.stop_recording();
    let store = tiny(&sim).max_bytes(300_000).eviction(Eviction::Lru).maintenance(Maintenance::Background);
    let store = store.open(PATH).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let store = &store;
            scope.spawn(move || {
                for n in 0..200u64 {
                    let key = format!("{thread}-{}", n % 60);
                    store.put(&key, &bytes(n, 1000 + 37 * (n as usize % 200))).unwrap();
                    let live = store.stat().unwrap().live_bytes;
                    assert!(live <= 300_000, "{live}");
                    match store.get(format!("{}-{}", (thread + 1) % 4, n % 60), &Device::host()) {
                        Ok(_) | Err(Error::NotFound(_)) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            });
        }
    });
    assert!(store.metrics().keys_evicted > 100);
    assert!(store.verify(|_| {}).unwrap().is_sound());
}
