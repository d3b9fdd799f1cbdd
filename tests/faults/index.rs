//! Index runs that cannot be read: what is not known of them yet is counted later.

use std::sync::Arc;

use alight::storage::sim::{Abilities, Fault, FaultKind, OpKind, SimStorage};
use alight::{Durability, Error, Store};

use crate::PATH;
use crate::common::bytes;
use crate::common::model::make;
use crate::common::tiny::{sound, tiny_on as options};
use crate::scripts::{delete, put};

/// The story: index runs were not mapped, and one could not be read when a commit was published. What the commit's keys had
/// led to was counted as alive for good, and verification called the sound store damaged.
#[test]
fn what_dies_while_the_index_cannot_be_read_is_counted_later() {
    let unread = || Fault::new(FaultKind::Eio, 0).on(OpKind::Read).path_ending(".idx").from_then_on();
    let written = || {
        let sim = SimStorage::new();
        sim.set_abilities(Abilities { map: false, ..Abilities::default() });
        let store = options(&sim).create_new(true).open(PATH).unwrap();
        make(&store, &vec![put(1, 1, 300), put(2, 2, 9000), put(3, 3, 700)], Durability::Immediate).unwrap();
        store.close().unwrap();
        let store = options(&sim).open(PATH).unwrap();
        sim.inject(unread());
        make(&store, &vec![put(1, 4, 500), delete(2)], Durability::Immediate).unwrap();
        (sim, store)
    };
    let live = |store: &Store| store.stat().map(|stat| stat.live_bytes);

    // It is counted by whoever needs it, and who needs it while it cannot be read is told that.
    let (sim, store) = written();
    assert!(matches!(live(&store), Err(Error::Io { action: "read", .. })), "{:?}", live(&store));
    let cannot = |damage: &alight::Damage| damage.what.contains("it cannot be read");
    let report = store.verify(|_| {}).unwrap();
    assert!(!report.is_sound() && report.damages.iter().all(cannot), "{:?}", report.damages);
    assert!(matches!(store.backup("/backup"), Err(Error::Io { .. })));
    sim.clear_faults();
    sound(&store);
    assert_eq!(live(&store).unwrap(), 1200);

    // What is written with the index is right, after a process that died too, whose commits are published anew.
    for dies in [false, true] {
        let (sim, store) = written();
        if dies {
            store.abandon();
        } else {
            assert!(matches!(store.close(), Err(Error::Io { .. })), "no count that is too high is written");
        }
        for read_only in [true, false] {
            // The run's head can be read, and then nothing more.
            let opened = (0..20).find_map(|nth| {
                sim.clear_faults();
                sim.inject(Fault::new(FaultKind::Eio, nth).on(OpKind::Read).path_ending(".idx").from_then_on());
                options(&sim).read_only(read_only).open(PATH).ok()
            });
            let store = opened.unwrap();
            assert!(live(&store).is_err());
            sim.clear_faults();
            sound(&store);
            assert_eq!(live(&store).unwrap(), 1200);
            store.close().unwrap();
        }
        let store = options(&sim).open(PATH).unwrap();
        sound(&store);
        assert_eq!(live(&store).unwrap(), 1200);
    }
}

/// The story: the same, in a store that may hold so many bytes: it was full with what nobody could get any more.
#[test]
fn what_could_not_be_counted_does_not_fill_a_store() {
    let sim = SimStorage::new();
    sim.set_abilities(Abilities { map: false, ..Abilities::default() });
    let options = options(&sim).max_bytes(10_000);
    let store = options.clone().create_new(true).open(PATH).unwrap();
    store.put("k1", &bytes(1, 9000)).unwrap();
    store.close().unwrap();
    let mut counted_later = 0;
    for nth in 0..9 {
        let sim = sim.clone_disk();
        sim.set_abilities(Abilities { map: false, ..Abilities::default() });
        let store = options.clone().storage(Arc::new(sim.clone())).open(PATH).unwrap();
        sim.inject(Fault::new(FaultKind::Eio, nth).on(OpKind::Read).path_ending(".idx").from_then_on());
        let deleted = make(&store, &vec![delete(1)], Durability::Immediate).is_ok();
        counted_later += u32::from(deleted && store.stat().is_err());
        sim.clear_faults();
        assert_eq!(store.put("k2", &bytes(2, 8000)).is_ok(), deleted, "read {nth} failed");
        sound(&store);
    }
    assert!(counted_later > 0);
}
