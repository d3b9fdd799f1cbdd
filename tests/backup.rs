//! Backups of a store that goes on: each opens, holds what was acknowledged before it was asked for, and never changes.
//!
//! `ALIGHT_BACKUPS=N` takes N backups under load instead of 10.

mod common;

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hasher};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use alight::storage::Storage;
use alight::storage::sim::{Abilities, Choice, Fault, FaultKind, OpKind, SimStorage};
use alight::{CompactOptions, Device, Durability, Error, Store};
use common::bytes;
use common::tiny::{contents, sound, tiny, tiny_on as on};

const SOURCE: &str = "/store";
const TARGET: &str = "/backup";

/// Commits that fill segments, large ones that have one of their own, deletes, and some that no run covers yet.
fn fill(store: &Store) {
    for n in 0..23u64 {
        let value = bytes(n, [300, 5000, 9000, 20_000][(n % 4) as usize]);
        let mut batch = store.batch();
        batch.put_with_attributes(format!("k{}", n % 9), &value, vec![("n".into(), vec![n as u8])]).unwrap();
        if n % 5 == 4 {
            batch.delete(format!("k{}", (n + 3) % 9)).unwrap();
        }
        batch.durability(if n % 3 == 0 { Durability::Eventual } else { Durability::Immediate });
        batch.commit().unwrap();
    }
}

/// Every file below a folder: its length and a hash of its bytes.
fn files_of(folder: &Path) -> BTreeMap<PathBuf, (usize, u64)> {
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(files_of(&path));
        } else {
            let bytes = std::fs::read(&path).unwrap();
            let mut hasher = DefaultHasher::new();
            hasher.write(&bytes);
            files.insert(path, (bytes.len(), hasher.finish()));
        }
    }
    files
}

/// The story: a copy was sparse where whole mebibytes were holes; smaller holes, where dead values had lain, became zeros, and
/// verification of the backup took them for damage.
#[test]
fn a_copied_backup_has_the_holes_of_the_store() {
    let sim = SimStorage::new();
    sim.set_abilities(Abilities { link: false, reflink: false, ..Abilities::default() });
    let store = on(&sim).create_new(true).open(SOURCE).unwrap();
    for n in 0..4 {
        let mut batch = store.batch();
        let (large, small) = (bytes(n, 40_000), bytes(n, 300));
        batch.put("large", &large).unwrap();
        batch.put(format!("small {n}"), &small).unwrap();
        batch.commit().unwrap();
    }
    let report = store.compact(&CompactOptions::default(), |_| {}).unwrap();
    assert!(report.bytes_punched > 0, "{report:?}");
    store.backup(TARGET).unwrap();
    let backup = on(&sim).read_only(true).open(TARGET).unwrap();
    sound(&backup);
    assert_eq!(contents(&backup).unwrap(), contents(&store).unwrap());
}

#[test]
fn a_backup_holds_what_was_there_by_links_by_shares_and_by_copies() {
    for (link, reflink) in [(true, true), (true, false), (false, true), (false, false)] {
        let sim = SimStorage::new();
        sim.set_abilities(Abilities { link, reflink, ..Abilities::default() });
        let store = on(&sim).create_new(true).open(SOURCE).unwrap();
        fill(&store);
        let expected = contents(&store).unwrap();
        let mut last = 0;
        let report = store
            .backup_with_progress(TARGET, |progress| {
                assert!(last <= progress.bytes_done && progress.bytes_done <= progress.bytes_total, "{progress:?}");
                last = progress.bytes_done;
            })
            .unwrap();
        assert_eq!((report.linked_bytes > 0, report.shared_bytes > 0), (link, reflink), "{report:?}");
        assert!(report.copied_bytes > 0 && last > 0, "{report:?}");
        assert_eq!(report.last_commit, store.stat().unwrap().last_commit);

        let backup = on(&sim).read_only(true).open(TARGET).unwrap();
        assert_eq!(contents(&backup).unwrap(), expected);
        assert_eq!(backup.attributes("k0").unwrap(), store.attributes("k0").unwrap());
        assert_eq!(backup.stat().unwrap().store_id, store.stat().unwrap().store_id);
        assert_eq!(backup.stat().unwrap().live_bytes, store.stat().unwrap().live_bytes);
        sound(&backup);
    }
}

#[test]
fn an_empty_store_and_one_that_was_just_opened_can_be_backed_up() {
    let sim = SimStorage::new();
    let store = on(&sim).create_new(true).open(SOURCE).unwrap();
    store.backup("/empty").unwrap();
    let empty = on(&sim).open("/empty").unwrap();
    assert_eq!(empty.scan("").count(), 0);
    empty.put("a", b"first").unwrap();
    fill(&store);
    store.close().unwrap();
    let store = on(&sim).open(SOURCE).unwrap();
    store.backup(TARGET).unwrap();
    assert_eq!(contents(&on(&sim).open(TARGET).unwrap()).unwrap(), contents(&store).unwrap());
}

#[test]
fn a_store_and_its_backup_go_their_own_ways() {
    let folder = tempfile::tempdir().unwrap();
    let (source, target) = (folder.path().join("s"), folder.path().join("b"));
    let store = tiny().create(true).open(&source).unwrap();
    fill(&store);
    let expected = contents(&store).unwrap();
    let report = store.backup(&target).unwrap();
    assert!(report.linked_bytes > 0, "the test means files with two names: {report:?}");
    let files = files_of(&target);

    for n in 0..40u64 {
        store.put(format!("k{}", n % 9), &bytes(100 + n, 7000)).unwrap();
        store.delete(format!("k{}", (n + 1) % 9)).unwrap();
    }
    // What the backup has a name of loses that name here, and no byte.
    store.compact(&CompactOptions::default(), |_| {}).unwrap();
    let after = contents(&store).unwrap();
    // Killed, opened, closed: whatever recovery cuts and closing trims, it is not the backup's.
    store.abandon();
    let store = tiny().open(&source).unwrap();
    store.put("more", &bytes(1, 50_000)).unwrap();
    store.close().unwrap();
    assert!(files_of(&target) == files, "the backup changed with the store");

    let source_files = files_of(&source);
    let backup = tiny().open(&target).unwrap();
    assert_eq!(contents(&backup).unwrap(), expected);
    for n in 0..40u64 {
        backup.put(format!("k{}", n % 9), &bytes(200 + n, 7000)).unwrap();
        backup.delete(format!("k{}", (n + 1) % 9)).unwrap();
    }
    backup.compact(&CompactOptions::default(), |_| {}).unwrap();
    sound(&backup);
    backup.close().unwrap();
    assert!(files_of(&source) == source_files, "the store changed with its backup");
    let store = tiny().open(&source).unwrap();
    assert!(after.iter().all(|(key, value)| store.get(key, &Device::host()).unwrap().to_host().unwrap() == *value));
    sound(&store);
}

#[test]
fn what_is_in_the_way_is_left_as_it_is() {
    let sim = SimStorage::new();
    let store = on(&sim).create_new(true).open(SOURCE).unwrap();
    fill(&store);
    store.backup(TARGET).unwrap();
    sim.create_dir(Path::new("/other")).unwrap();
    sim.write_file("/other/notes.txt", b"mine");
    sim.create_dir(Path::new("/half")).unwrap();
    sim.create_dir(Path::new("/half/segments")).unwrap();
    sim.copy_file("/store/segments/00000001.seg", "/half/segments/00000001.seg");
    let before = sim.fingerprint();
    for path in [TARGET, "/other", "/half", SOURCE] {
        let error = store.backup(path).unwrap_err();
        let right = matches!(error, Error::AlreadyExists { .. } | Error::InvalidOption { .. });
        assert!(right, "{path}: {error}");
    }
    assert!(matches!(store.backup("/other/notes.txt"), Err(Error::AlreadyExists { .. })));
    assert!(matches!(store.backup("/store/inside"), Err(Error::InvalidOption { .. })));
    assert!(matches!(store.backup("/no/such/folder"), Err(Error::Io { .. })));
    assert_eq!(sim.fingerprint(), before);
}

#[test]
fn a_reader_beside_a_writer_makes_backups_too() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("s");
    let store = tiny().create(true).open(&source).unwrap();
    fill(&store);
    let reader = tiny().read_only(true).open(&source).unwrap();
    let expected = contents(&reader).unwrap();
    for n in 0..10u64 {
        store.put(format!("k{n}"), &bytes(n, 3000)).unwrap();
        let target = folder.path().join(format!("b{n}"));
        reader.backup(&target).unwrap();
        let backup = tiny().open(&target).unwrap();
        assert_eq!(contents(&backup).unwrap(), expected);
        sound(&backup);
    }
}

/// What the threads below do to their keys: thread, commit → value.
fn value(thread: u64, n: u64) -> Vec<u8> {
    bytes(thread << 32 | n, if n % 11 == 5 { 90_000 } else { 1 + (n as usize * 97) % 6000 })
}

const THREADS: u64 = 3;
/// How many of a thread's keys live at a time: each commit deletes the one that falls out.
const LIVING: u64 = 6;

/// A backup under load has of each thread a state between two of its commits, none older than the last that was
/// acknowledged before.
fn check_load(store: &Store, acknowledged: &[u64]) {
    for thread in 0..THREADS {
        let prefix = format!("{thread}-");
        let mut there: Vec<u64> = store
            .scan(&prefix)
            .map(|info| info.unwrap().key.as_str().unwrap()[prefix.len()..].parse().unwrap())
            .collect();
        there.sort_unstable();
        let count = there.last().map_or(0, |last| last + 1);
        assert!(count >= acknowledged[thread as usize], "{count} of {acknowledged:?}");
        assert_eq!(there, (count.saturating_sub(LIVING)..count).collect::<Vec<_>>());
        for n in there {
            let got = store.get(format!("{thread}-{n}"), &Device::host()).unwrap();
            assert!(got.as_host().unwrap() == value(thread, n), "{thread}-{n}");
        }
    }
}

#[test]
fn backups_under_load_open_verify_and_never_change() {
    let count: u64 = std::env::var("ALIGHT_BACKUPS").ok().and_then(|count| count.parse().ok()).unwrap_or(10);
    let folder = tempfile::tempdir().unwrap();
    // Small, so that segments roll and the index is written out many times meanwhile.
    let options = || Store::options().segment_bytes(256 << 10).overlay_entries_max(32);
    let store = options().create(true).open(folder.path().join("s")).unwrap();
    let (done, counts) = (AtomicBool::new(false), [const { AtomicU64::new(0) }; THREADS as usize]);
    // Commits go on as fast as they can while a backup is made; between two of them only so many do, or the store would
    // grow with the time that the checks take.
    let (busy, quota) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut kept = Vec::new();
    let (mut linked, mut copied, mut removed) = (0, 0, 0);
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (store, done, counts) = (&store, &done, &counts);
            let (busy, quota) = (&busy, &quota);
            scope.spawn(move || {
                for n in 0.. {
                    while n >= quota.load(Ordering::Relaxed) && !busy.load(Ordering::Relaxed) {
                        if done.load(Ordering::Relaxed) {
                            return;
                        }
                        std::thread::sleep(Duration::from_micros(100));
                    }
                    if done.load(Ordering::Relaxed) {
                        return;
                    }
                    let value = value(thread, n);
                    let mut batch = store.batch();
                    batch.put(format!("{thread}-{n}"), &value).unwrap();
                    if n >= LIVING {
                        batch.delete(format!("{thread}-{}", n - LIVING)).unwrap();
                    }
                    batch.durability(if n % 4 == 1 { Durability::Eventual } else { Durability::Immediate });
                    batch.commit().unwrap();
                    counts[thread as usize].store(n + 1, Ordering::Release);
                }
            });
        }
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for n in 0..count {
                quota.store(counts[0].load(Ordering::Relaxed) + 40, Ordering::Relaxed);
                busy.store(true, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(n % 7 * 3));
                let acknowledged: Vec<u64> = counts.iter().map(|count| count.load(Ordering::Acquire)).collect();
                let target = folder.path().join(format!("b{n}"));
                let report = store.backup(&target).unwrap();
                busy.store(false, Ordering::Relaxed);
                if n % 5 == 4 {
                    // Segments go, and are punched where the backups have no part in them.
                    let report = store.compact(&CompactOptions::default(), |_| {}).unwrap();
                    removed += report.segments_removed;
                }
                linked += report.linked_bytes;
                copied += report.copied_bytes + report.shared_bytes;
                let files = files_of(&target);
                let backup = options().read_only(true).open(&target).unwrap();
                assert_eq!(backup.stat().unwrap().last_commit, report.last_commit);
                check_load(&backup, &acknowledged);
                sound(&backup);
                drop(backup);
                kept.push((target, files, acknowledged));
            }
        }));
        done.store(true, Ordering::Relaxed);
        ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
    let commits = store.stat().unwrap().last_commit;
    store.close().unwrap();
    assert!(count < 10 || linked > 0, "no segment was linked");
    for (target, files, acknowledged) in kept {
        assert!(files_of(&target) == files, "{} changed", target.display());
        let backup = options().open(&target).unwrap();
        check_load(&backup, &acknowledged);
        backup.put("goes on", b"here").unwrap();
        backup.close().unwrap();
    }
    let store = options().open(folder.path().join("s")).unwrap();
    sound(&store);
    println!(
        "{count} backups beside {commits} commits: {linked} bytes linked, {copied} copied, {removed} segments removed meanwhile"
    );
}

/// How a storage can bring files over.
fn abilities() -> [Abilities; 2] {
    [Abilities::default(), Abilities { link: false, reflink: false, ..Abilities::default() }]
}

#[test]
fn a_backup_that_fails_at_any_call_harms_nothing_and_is_no_store() {
    let kinds = [
        FaultKind::Eio,
        FaultKind::EioAfter,
        FaultKind::Enospc,
        FaultKind::Edquot,
        FaultKind::Eintr,
        FaultKind::Short,
        FaultKind::FailedSync,
    ];
    let (mut runs, mut failed) = (0, 0);
    for abilities in abilities() {
        let prepared = || {
            let sim = SimStorage::new();
            sim.set_abilities(abilities);
            let store = on(&sim).create_new(true).open(SOURCE).unwrap();
            fill(&store);
            (sim, store)
        };
        let (sim, store) = prepared();
        let before = sim.calls_made();
        store.backup(TARGET).unwrap();
        let calls = sim.calls_made() - before;
        assert!(calls > 40, "{calls}");
        for nth in 0..calls {
            for kind in kinds {
                for from_then_on in [false, true] {
                    if from_then_on && kind == FaultKind::Eintr {
                        continue;
                    }
                    let told =
                        format!("{kind:?} of call {nth}, from then on: {from_then_on}, links: {}", abilities.link);
                    let (sim, store) = prepared();
                    let expected = contents(&store).unwrap();
                    let fault = Fault::new(kind, nth);
                    sim.inject(if from_then_on { fault.from_then_on() } else { fault });
                    let outcome = store.backup(TARGET);
                    sim.clear_faults();
                    runs += 1;
                    match outcome {
                        Ok(_) => {
                            let backup = on(&sim).open(TARGET).unwrap_or_else(|error| panic!("{told}: {error}"));
                            assert_eq!(contents(&backup).unwrap(), expected, "{told}");
                            sound(&backup);
                        }
                        Err(Error::Io { .. } | Error::WritesRefused { .. } | Error::Damaged(_)) => {
                            failed += 1;
                            // Where nothing could be removed either, what is there is whole.
                            match on(&sim).read_only(true).open(TARGET) {
                                Ok(backup) if from_then_on => {
                                    assert_eq!(contents(&backup).unwrap(), expected, "{told}");
                                    sound(&backup);
                                }
                                Ok(_) => panic!("{told}: what failed opens as a store"),
                                Err(_) if from_then_on => {}
                                Err(_) => match store.backup(TARGET) {
                                    Ok(_) => {
                                        let backup = on(&sim).open(TARGET).unwrap();
                                        assert_eq!(contents(&backup).unwrap(), expected, "{told}: the second try");
                                    }
                                    // The sync that failed was the store's own.
                                    Err(Error::WritesRefused { .. }) => {}
                                    // What could not be removed, since the call that was to remove it was struck.
                                    Err(error) => panic!("{told}: the second try: {error}"),
                                },
                            }
                        }
                        Err(error) => panic!("{told}: an error of no fitting kind: {error}"),
                    }
                    assert_eq!(contents(&store).unwrap(), expected, "{told}: the store's own contents");
                    store.abandon();
                    let store = on(&sim).open(SOURCE).unwrap_or_else(|error| panic!("{told}: {error}"));
                    assert_eq!(contents(&store).unwrap(), expected, "{told}: the store opened again");
                    sound(&store);
                }
            }
        }
    }
    println!("{runs} faults, of which {failed} failed the backup");
    assert!(failed > 500);
}

#[test]
fn power_that_fails_during_a_backup_leaves_the_store_whole_and_the_backup_whole_or_no_store() {
    let (mut states, mut whole) = (0, 0);
    for abilities in abilities() {
        let sim = SimStorage::new();
        sim.set_abilities(abilities);
        let store = on(&sim).create_new(true).open(SOURCE).unwrap();
        fill(&store);
        let expected = contents(&store).unwrap();
        store.sync().unwrap();
        sim.start_recording();
        // The disk as it was promised to be: what was synced and nothing more would be a durable start; the recording
        // takes what is live for durable, which it is.
        store.backup(TARGET).unwrap();
        sim.marker(1);
        for n in 0..6u64 {
            store.put(format!("later{n}"), &bytes(n, 9000)).unwrap();
        }
        store.abandon();
        let mut walker = sim.trace().walk();
        while walker.next_cut() {
            let random = (0..20).map(|n| Choice::Random(n + walker.position() as u64 * 100));
            for choice in walker.fresh_choices().into_iter().chain(random) {
                let state = walker.materialize(&choice);
                states += 1;
                let told = || format!("links: {}\n{}", abilities.link, walker.explain(&choice));
                match on(&state).open(TARGET) {
                    Ok(backup) => {
                        whole += 1;
                        assert_eq!(contents(&backup).unwrap(), expected, "{}", told());
                        if states % 9 == 0 {
                            sound(&backup);
                        }
                        // Whoever goes on in it leaves the store alone.
                        backup.put("goes on", &bytes(1, 3000)).unwrap();
                        backup.close().unwrap();
                    }
                    Err(error) => assert!(walker.markers().is_empty(), "{error}: {}", told()),
                }
                let store = on(&state).open(SOURCE).unwrap_or_else(|error| panic!("{error}: {}", told()));
                let mut found = contents(&store).unwrap();
                found.retain(|key, _| !key.starts_with(b"later"));
                assert_eq!(found, expected, "{}", told());
            }
        }
    }
    println!("{states} states, the backup whole in {whole}");
    assert!(whole > 100 && whole < states);
}

/// The story: a backup failed at the sync of a directory, and a second one was made in what the first had left. The kernel took
/// its names for written by then: the backup was acknowledged, and a power cut took it away.
#[test]
fn a_backup_where_another_failed_at_a_sync_outlives_a_power_cut() {
    let mut failed = 0;
    for abilities in abilities() {
        for nth in 0.. {
            let sim = SimStorage::new();
            sim.set_abilities(abilities);
            let store = on(&sim).create_new(true).open(SOURCE).unwrap();
            fill(&store);
            let expected = contents(&store).unwrap();
            sim.inject(Fault::new(FaultKind::FailedSync, nth).on(OpKind::SyncDir));
            if store.backup(TARGET).is_ok() {
                break;
            }
            failed += 1;
            store.backup(TARGET).unwrap();
            let trace = sim.trace();
            let walker = trace.walk_to(trace.len());
            for choice in [Choice::None, Choice::All].into_iter().chain((0..30).map(Choice::Random)) {
                let told = || format!("sync {nth} failed: {}", walker.explain(&choice));
                let state = walker.materialize(&choice);
                let backup = on(&state).open(TARGET).unwrap_or_else(|error| panic!("{error}: {}", told()));
                assert_eq!(contents(&backup).unwrap(), expected, "{}", told());
            }
        }
    }
    assert!(failed > 4, "{failed}");
}

#[test]
fn a_backup_of_a_store_that_refuses_writes_says_so_and_reads_go_on() {
    let sim = SimStorage::new();
    let store = on(&sim).create_new(true).open(SOURCE).unwrap();
    fill(&store);
    let expected = contents(&store).unwrap();
    sim.inject(Fault::new(FaultKind::FailedSync, 0).on(OpKind::Sync));
    store.put("unlucky", &bytes(1, 300)).unwrap_err();
    sim.clear_faults();
    // What was synced before can still be brought to safety, by a reader in any case.
    match store.backup(TARGET) {
        Ok(_) | Err(Error::WritesRefused { .. }) => {}
        Err(error) => panic!("{error}"),
    }
    assert_eq!(contents(&store).unwrap(), expected);
    let reader = on(&sim).read_only(true).open(SOURCE).unwrap();
    reader.backup("/by-a-reader").unwrap();
    let backup = contents(&on(&sim).open("/by-a-reader").unwrap()).unwrap();
    assert!(expected.iter().all(|(key, value)| backup.get(key) == Some(value)));
}
