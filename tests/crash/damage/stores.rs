//! Stores to damage: one that was closed, and some that nobody closed.

use alight::storage::sim::SimStorage;
use alight::{CompactOptions, Maintenance, Store, StoreOptions};

use super::ask::{Ask, Subject};
use crate::oracle::PATH;
use crate::workloads::value;

pub(crate) fn options(sim: &SimStorage) -> StoreOptions {
    Store::options()
        .storage(std::sync::Arc::new(sim.clone()))
        .maintenance(Maintenance::Inline)
        .segment_bytes(96 << 10)
        .small_commit_bytes_max(16 << 10)
        .overlay_entries_max(40)
}

/// Fills a store with batches of values of many lengths, overwrites and deletes some, gives some attributes. Returns the
/// keys that were ever put.
pub(crate) fn fill(store: &Store, batches: u64, puts: u64, shrink: usize) -> Vec<Vec<u8>> {
    let mut keys = Vec::new();
    for n in 0..batches {
        let mut batch = store.batch();
        let lengths = [0, 1, 77, 255, 1024, 3000, 4095, 4096, 5000, 5500, 2222, 900];
        let values: Vec<(Vec<u8>, Vec<u8>)> = (0..puts)
            .map(|i| {
                let key = format!("layers.{:03}.{}", (n * 7 + i * 13) % 211, ["w", "b"][(i % 2) as usize]);
                let len = lengths[((n * 5 + i * 7) % 12) as usize];
                // Too large together for a segment that is shared with others.
                let len = if n == 11 { 5400 } else { len / shrink };
                (key.into_bytes(), value(n * 8 + i, len))
            })
            .collect();
        for (i, (key, value)) in values.iter().enumerate() {
            let attributes = if i == 2 { vec![("step".to_owned(), vec![n as u8; 40])] } else { Vec::new() };
            batch.put_with_attributes(key, value, attributes).unwrap();
            keys.push(key.clone());
        }
        if n % 3 == 2 {
            batch.delete(format!("layers.{:03}.w", (n * 7 - 14) % 211)).unwrap();
        }
        batch.commit().unwrap();
    }
    keys.sort();
    keys.dedup();
    keys
}

pub(crate) fn asks(keys: &[Vec<u8>]) -> Vec<Ask> {
    let values = keys.iter().cloned().map(Ask::Value);
    let attributes = keys.iter().step_by(3).cloned().map(Ask::Attributes);
    [Ask::Scan].into_iter().chain(values).chain(attributes).chain([Ask::Value(b"never put".to_vec())]).collect()
}

/// A store of 1 MiB and more, closed.
pub(crate) fn closed() -> Subject {
    let sim = SimStorage::new();
    sim.stop_recording();
    let store = options(&sim).create_new(true).open(PATH).unwrap();
    let keys = fill(&store, 36, 8, 1);
    store.close().unwrap();
    // Two index runs more, with newer values and deletes; the last close has nothing to merge them with.
    for news in [30, 5] {
        let store = options(&sim).overlay_entries_max(news).open(PATH).unwrap();
        let mut batch = store.batch();
        let newer = value(news as u64, 600);
        for (n, key) in keys.iter().step_by(7).chain(&keys[1..]).take(news).enumerate() {
            if n % 4 == 3 { batch.delete(key).unwrap() } else { batch.put(key, &newer).unwrap() }
        }
        batch.commit().unwrap();
        store.abandon();
    }
    options(&sim).open(PATH).unwrap().close().unwrap();
    Subject::new(sim, options, asks(&keys), Vec::new())
}

/// A store that was compacted, written to again and closed: several segments, some with holes, and many index runs; and the
/// disk as it was earlier: before it was compacted, and after.
pub(crate) fn compacted() -> (Subject, [SimStorage; 2]) {
    let sim = SimStorage::new();
    sim.stop_recording();
    let store = options(&sim).create_new(true).open(PATH).unwrap();
    let mut keys = fill(&store, 30, 8, 1);
    let large = b"large".to_vec();
    for n in 0..3 {
        store.put(&large, &value(90 + n, 30_000)).unwrap();
        store.put(format!("beside {n}"), &value(95 + n, 3000)).unwrap();
    }
    // Most of the first segments dies.
    let newer = value(99, 500);
    let mut batch = store.batch();
    for (n, key) in keys.iter().enumerate().filter(|(n, _)| n % 3 > 0) {
        if n % 5 == 0 { batch.delete(key).unwrap() } else { batch.put(key, &newer).unwrap() }
    }
    batch.commit().unwrap();
    store.close().unwrap();
    let before = sim.clone_disk();
    let store = options(&sim).open(PATH).unwrap();
    let report = store.compact(&CompactOptions::default(), |_| {}).unwrap();
    assert!(report.segments_removed > 0 && report.segments_rewritten > 0, "{report:?}");
    store.close().unwrap();
    let after = sim.clone_disk();
    // Each run smaller than the one before: nothing is worth merging.
    for news in [40, 9, 2] {
        let store = options(&sim).overlay_entries_max(news).open(PATH).unwrap();
        let mut batch = store.batch();
        let newer = value(news as u64, 700);
        for (n, key) in keys.iter().step_by(5).chain(&keys[3..]).take(news).enumerate() {
            if n % 4 == 3 { batch.delete(key).unwrap() } else { batch.put(key, &newer).unwrap() }
        }
        batch.commit().unwrap();
        store.abandon();
    }
    options(&sim).open(PATH).unwrap().close().unwrap();
    keys.push(large);
    keys.extend((0..3).map(|n| format!("beside {n}").into_bytes()));
    let subject = Subject::new(sim, options, asks(&keys), Vec::new());
    let of_kind =
        |kind: &str| subject.sim.files().iter().filter(|path| path.extension().is_some_and(|is| is == kind)).count();
    assert!(of_kind("idx") >= 4 && of_kind("seg") >= 4, "{:?}", subject.sim.files());
    (subject, [before, after])
}

/// Smaller segments: of a store that was not closed, every byte behind its last commit counts for an open too.
pub(crate) fn small_options(sim: &SimStorage) -> StoreOptions {
    options(sim).segment_bytes(32 << 10).small_commit_bytes_max(4 << 10).overlay_entries_max(18)
}

/// What the last commit of a store is that nobody closes.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Last {
    Small,
    /// Its payload was synced before its frame.
    Large,
    /// In a segment of its own.
    Huge,
    Delete,
}

/// A store whose process was killed after its last commit was acknowledged; the number of that commit; what it answers,
/// and what it answered one commit before.
pub(crate) fn killed(last: Last) -> (Subject, u64) {
    let build = |with_last: bool| {
        let sim = SimStorage::new();
        sim.stop_recording();
        let store = small_options(&sim).create_new(true).open(PATH).unwrap();
        let mut keys = fill(&store, 7, 4, 6);
        let fresh = b"last".to_vec();
        if with_last {
            let mut batch = store.batch();
            let (one, two) = match last {
                Last::Small => (value(1, 700), value(2, 300)),
                Last::Large => (value(1, 3800), value(2, 400)),
                Last::Huge => (value(1, 6000), value(2, 3000)),
                Last::Delete => (Vec::new(), Vec::new()),
            };
            if !matches!(last, Last::Delete) {
                batch.put(&fresh, &one).unwrap();
                batch.put(&keys[2], &two).unwrap();
            }
            batch.delete(&keys[4]).unwrap();
            batch.commit().unwrap();
        }
        let last_commit = store.stat().unwrap().last_commit;
        keys.push(fresh);
        let asks = asks(&keys);
        let answers = asks.iter().map(|ask| ask.of(&store).unwrap()).collect::<Vec<_>>();
        store.abandon();
        (sim, asks, answers, last_commit)
    };
    let (_, _, before_last, _) = build(false);
    let (sim, asks, now, last_commit) = build(true);
    assert!(before_last != now);
    (Subject::new(sim, small_options, asks, before_last), last_commit)
}
