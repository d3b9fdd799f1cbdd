//! Threads and processes that meet at the worst moment: a disk that holds up and fails calls makes them meet there.

mod common;

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use alight::storage::sim::{OpKind, SimStorage};
use alight::{CompactOptions, Device, Durability, Error, Maintenance, Store, StoreOptions};
use common::bytes;
use common::interposed::Interposed;

const PATH: &str = "/store";

/// Something that happens once, and that others wait for.
#[derive(Default)]
struct Moment {
    come: Mutex<bool>,
    told: Condvar,
}

impl Moment {
    fn comes(&self) {
        *self.come.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.told.notify_all();
    }

    fn wait(&self) {
        let mut come = self.come.lock().unwrap_or_else(PoisonError::into_inner);
        while !*come {
            come = self.told.wait(come).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

fn options(storage: impl alight::storage::Storage + 'static) -> StoreOptions {
    Store::options()
        .storage(Arc::new(storage))
        .maintenance(Maintenance::Inline)
        // Calls are made by the threads that the hooks know by their names.
        .write_deadline(None)
        .segment_bytes(64 << 10)
        .small_commit_bytes_max(8 << 10)
        .overlay_entries_max(4)
}

fn is_segment(path: &Path) -> bool {
    path.extension().is_some_and(|kind| kind == "seg")
}

fn failure() -> io::Error {
    io::Error::from_raw_os_error(5)
}

/// The story: the index was being written out, and the sync of its directory failed; the store refused writes and left a
/// note that commits up to the last synced one may be believed. A commit whose sync was under way just then was
/// acknowledged all the same, and the next open, heeding the note, cut it.
#[test]
fn no_commit_is_acknowledged_once_the_note_about_a_failed_sync_is_left() {
    let sim = SimStorage::new();
    let (in_sync, note_left) = (Arc::new(Moment::default()), Arc::new(Moment::default()));
    let armed = Arc::new(AtomicBool::new(false));
    let flushing = Arc::new(Moment::default());
    let hook = {
        let (in_sync, note_left, armed, flushing) =
            (Arc::clone(&in_sync), Arc::clone(&note_left), Arc::clone(&armed), Arc::clone(&flushing));
        move |op: OpKind, path: &Path| {
            match op {
                OpKind::SyncDir if path.ends_with("index") && armed.load(Ordering::Acquire) => {
                    flushing.comes();
                    in_sync.wait();
                    return Err(failure());
                }
                OpKind::Sync if is_segment(path) && std::thread::current().name() == Some("committer") => {
                    in_sync.comes();
                    note_left.wait();
                }
                _ => {}
            }
            Ok(())
        }
    };
    let store = options(Interposed::new(&sim, hook)).create_new(true).open(PATH).unwrap();
    for n in 0..3 {
        store.put(format!("before {n}"), &bytes(n, 100)).unwrap();
    }
    armed.store(true, Ordering::Release);
    let acknowledged = std::thread::scope(|scope| {
        let committer = std::thread::Builder::new().name("committer".into()).spawn_scoped(scope, || {
            flushing.wait();
            store.put("beside", b"acknowledged, or not")
        });
        // The fourth key has the index written out.
        store.put("before 3", &bytes(3, 100)).unwrap();
        note_left.comes();
        committer.unwrap().join().unwrap()
    });
    assert!(matches!(store.put("after", b"refused"), Err(Error::WritesRefused { .. })));
    store.abandon();
    let store = options(sim).open(PATH).unwrap();
    assert!((0..4).all(|n| store.contains(format!("before {n}")).unwrap()));
    match acknowledged {
        Ok(()) => assert!(store.contains("beside").unwrap(), "it was acknowledged as durable"),
        Err(error) => assert!(matches!(error, Error::WritesRefused { .. }), "{error}"),
    }
}

/// The story: a large put was under way into a fresh segment when the index was written out, so the manifest named the
/// segment. The put failed, the segment was removed, and the process died: the store did not open any more, for a missing
/// segment in which nothing had ever been.
#[test]
fn a_segment_that_a_manifest_names_stays_when_the_put_that_made_it_fails() {
    let sim = SimStorage::new();
    for len in [9000, 30_000] {
        let path = format!("/store-{len}");
        let (in_write, flushed) = (Arc::new(Moment::default()), Arc::new(Moment::default()));
        let hook = {
            let (in_write, flushed) = (Arc::clone(&in_write), Arc::clone(&flushed));
            let header_written = AtomicBool::new(false);
            move |op: OpKind, path: &Path| {
                let committer = std::thread::current().name() == Some("committer");
                if op == OpKind::Write && is_segment(path) && committer && header_written.swap(true, Ordering::AcqRel) {
                    in_write.comes();
                    flushed.wait();
                    return Err(failure());
                }
                Ok(())
            }
        };
        let store = options(Interposed::new(&sim, hook)).create_new(true).open(&path).unwrap();
        store.put("first", b"fills the small segment").unwrap();
        std::thread::scope(|scope| {
            let committer = std::thread::Builder::new().name("committer".into());
            let committer = committer.spawn_scoped(scope, || store.put("large", &bytes(1, len)));
            in_write.wait();
            for n in 0..4 {
                store.put(format!("small {n}"), &bytes(n, 100)).unwrap();
            }
            assert_eq!(store.metrics().index_flushes, 1);
            flushed.comes();
            assert!(matches!(committer.unwrap().join().unwrap(), Err(Error::Io { .. })));
        });
        store.abandon();
        let store = options(sim.clone()).open(&path).unwrap();
        assert_eq!(store.scan("").count(), 5);
        // Nor is it a burden: the space is free, and the file goes when no manifest names it.
        for round in 0..2 {
            for n in 0..5 {
                store.put(format!("more {round} {n}"), &bytes(n, 100)).unwrap();
            }
        }
        store.close().unwrap();
        let store = options(sim.clone()).open(&path).unwrap();
        assert!(store.verify(|_| {}).unwrap().is_sound());
        let files = sim.files().into_iter().filter(|file| file.starts_with(&path) && is_segment(file)).count();
        assert_eq!(files as u64, store.stat().unwrap().segments);
        store.close().unwrap();
    }
}

/// The story: two processes made the same store at once. One found an empty directory and was held up; the other made
/// the store there, filled it and closed it; then the first went on, and put an empty manifest in the place of the full
/// one.
#[test]
fn who_makes_a_store_does_not_overwrite_one_that_was_made_meanwhile() {
    for create_new in [false, true] {
        let sim = SimStorage::new();
        let hook = {
            let (sim, other) = (sim.clone(), AtomicBool::new(false));
            move |op: OpKind, _: &Path| {
                if op == OpKind::Lock && !other.swap(true, Ordering::AcqRel) {
                    let store = options(sim.clone()).create(true).open(PATH).unwrap();
                    store.put("theirs", b"acknowledged").unwrap();
                    store.close().unwrap();
                }
                Ok(())
            }
        };
        let held_up = options(Interposed::new(&sim, hook));
        let opened = if create_new { held_up.create_new(true).open(PATH) } else { held_up.create(true).open(PATH) };
        match opened {
            Ok(store) if !create_new => {
                assert!(store.contains("theirs").unwrap());
                store.close().unwrap();
            }
            Err(Error::AlreadyExists { .. }) if create_new => {}
            other => panic!("{other:?}"),
        }
        let store = options(sim).open(PATH).unwrap();
        assert!(store.contains("theirs").unwrap());
    }
}

/// A durable commit makes the eventual ones before it durable, in whichever segment they are, and one that is being
/// written beside it is no part of that.
#[test]
fn an_eventual_commit_that_waits_for_a_durable_one_becomes_visible_with_it() {
    let sim = SimStorage::new();
    let (in_sync, go_on) = (Arc::new(Moment::default()), Arc::new(Moment::default()));
    let hook = {
        let (in_sync, go_on) = (Arc::clone(&in_sync), Arc::clone(&go_on));
        let header_synced = AtomicBool::new(false);
        move |op: OpKind, path: &Path| {
            if op == OpKind::Sync && is_segment(path) && header_synced.swap(true, Ordering::AcqRel) {
                in_sync.comes();
                go_on.wait();
            }
            Ok(())
        }
    };
    let store = options(Interposed::new(&sim, hook)).create_new(true).open(PATH).unwrap();
    std::thread::scope(|scope| {
        let durable = scope.spawn(|| store.put("durable", b"1"));
        in_sync.wait();
        let eventual = scope.spawn(|| {
            let mut batch = store.batch();
            batch.put("eventual", b"2").unwrap();
            batch.durability(Durability::Eventual);
            batch.commit()
        });
        assert!(!store.contains("durable").unwrap(), "it is not durable yet");
        go_on.comes();
        durable.join().unwrap().unwrap();
        eventual.join().unwrap().unwrap();
        assert!(store.contains("durable").unwrap() && store.contains("eventual").unwrap());
    });
    store.close().unwrap();
}

/// The story: two threads deleted a key at once. Each found it there, each committed its delete, and both were told that it was
/// theirs that took the key away.
#[test]
fn of_two_deletes_at_once_one_is_told_that_the_key_was_there() {
    let sim = SimStorage::new();
    let (in_write, go_on) = (Arc::new(Moment::default()), Arc::new(Moment::default()));
    let armed = Arc::new(AtomicBool::new(false));
    let hook = {
        let (in_write, go_on, armed) = (Arc::clone(&in_write), Arc::clone(&go_on), Arc::clone(&armed));
        move |op: OpKind, path: &Path| {
            if op == OpKind::Write && is_segment(path) && armed.swap(false, Ordering::AcqRel) {
                in_write.comes();
                go_on.wait();
            }
            Ok(())
        }
    };
    let store = options(Interposed::new(&sim, hook)).create_new(true).open(PATH).unwrap();
    store.put("k", b"value").unwrap();
    armed.store(true, Ordering::Release);
    std::thread::scope(|scope| {
        let first = scope.spawn(|| store.delete("k").unwrap());
        in_write.wait();
        let second = scope.spawn(|| store.delete("k").unwrap());
        // Time to find the key, which is there until the first is visible. If it does not suffice the answers are right as well.
        std::thread::sleep(std::time::Duration::from_millis(50));
        go_on.comes();
        assert!(first.join().unwrap() && !second.join().unwrap());
    });
    assert!(!store.contains("k").unwrap());
    store.close().unwrap();
}

/// A key is put, another deleted, while compaction has found their values alive and not yet committed its copy of them. The copy's
/// commit is the later one, and must not overturn them: not in the store that is open, and not in one that recovers both.
#[test]
fn what_is_done_to_a_key_while_it_is_copied_stands() {
    for recovered in [false, true] {
        let sim = SimStorage::new();
        let (copied, changed) = (Arc::new(Moment::default()), Arc::new(Moment::default()));
        let (armed, no_manifest) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let hook = {
            let (copied, changed, armed, no_manifest) =
                (Arc::clone(&copied), Arc::clone(&changed), Arc::clone(&armed), Arc::clone(&no_manifest));
            move |op: OpKind, path: &Path| {
                let compacts = std::thread::current().name() == Some("compactor");
                match op {
                    // It takes space for the copy of what it has found alive.
                    OpKind::Allocate if compacts && is_segment(path) && armed.load(Ordering::Acquire) => {
                        copied.comes();
                        changed.wait();
                        armed.store(false, Ordering::Release);
                        no_manifest.store(recovered, Ordering::Release);
                    }
                    OpKind::Rename if path.ends_with("MANIFEST") && no_manifest.load(Ordering::Acquire) => {
                        return Err(failure());
                    }
                    _ => {}
                }
                Ok(())
            }
        };
        let open = |storage| options(storage).overlay_entries_max(100);
        let store = open(Interposed::new(&sim, hook)).create_new(true).open(PATH).unwrap();
        for n in 0..12u64 {
            store.put(format!("k{}", n % 6), &bytes(n, 4000)).unwrap();
        }
        armed.store(true, Ordering::Release);
        std::thread::scope(|scope| {
            let compactor = std::thread::Builder::new().name("compactor".into());
            let compacting =
                compactor.spawn_scoped(scope, || store.compact(&CompactOptions::default(), |_| {})).unwrap();
            copied.wait();
            let before = store.snapshot().last_commit();
            store.put("k1", &bytes(99, 500)).unwrap();
            store.delete("k2").unwrap();
            changed.comes();
            assert_eq!(compacting.join().unwrap().is_err(), recovered);
            assert!(store.snapshot().last_commit() > before + 2, "the copy was committed");
        });
        let check = |store: &Store| {
            let got = store.get("k1", &Device::host()).unwrap();
            assert!(got.as_host().unwrap() == bytes(99, 500), "a put was overturned");
            assert!(!store.contains("k2").unwrap(), "a delete was overturned");
            for n in [0u64, 3, 4, 5] {
                let got = store.get(format!("k{n}"), &Device::host()).unwrap();
                assert!(got.as_host().unwrap() == bytes(n + 6, 4000), "k{n}");
            }
            let report = store.verify(|_| {}).unwrap();
            assert!(report.is_sound(), "{:?}", report.damages);
        };
        check(&store);
        store.abandon();
        let store = open(Interposed::new(&sim, |_, _| Ok(()))).open(PATH).unwrap();
        check(&store);
        store.compact(&CompactOptions::default(), |_| {}).unwrap();
        check(&store);
    }
}
