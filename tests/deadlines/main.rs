//! A disk that does not come back: whoever waits for it is told in time, nobody else waits for ever, and nothing that was
//! acknowledged is lost or written over, whenever the disk goes on.

#[path = "../common/mod.rs"]
mod common;

mod opening;

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use alight::storage::AlignedBuf;
use alight::storage::sim::{Abilities, OpKind, SimStorage};
use alight::{CompactOptions, Device, Durability, Error, Maintenance, Store, StoreOptions};
use common::bytes;
use common::interposed::Interposed;
use common::tiny::{contents, sound};
use parking_lot::{Condvar, Mutex};

const PATH: &str = "/store";

/// Far longer than the disk in memory takes for anything.
const DEADLINE: Duration = Duration::from_millis(400);

/// Nothing here takes as long, or it would have waited for what is stuck.
const LONG: Duration = Duration::from_secs(60);

/// A disk on which calls get stuck and go on as a test says.
#[derive(Clone)]
struct Disk {
    sim: SimStorage,
    state: Arc<(Mutex<State>, Condvar)>,
}

#[derive(Default)]
struct State {
    stuck: Option<Stuck>,
    waiting: usize,
    /// The kinds of all calls so far.
    calls: Vec<OpKind>,
}

/// Which calls get stuck.
enum Stuck {
    /// Those of a kind, on paths that end so, after so many others.
    All { op: OpKind, suffix: &'static str, after: usize },
    /// One of any kind, after so many others.
    One { after: usize },
    /// No further ones.
    Caught,
}

impl Stuck {
    fn catches(&mut self, op: OpKind, path: &Path) -> bool {
        let after = match self {
            Self::All { op: kind, suffix, after } if *kind == op && path.to_string_lossy().ends_with(*suffix) => after,
            Self::One { after } => after,
            _ => return false,
        };
        if *after > 0 {
            *after -= 1;
            return false;
        }
        if matches!(self, Self::One { .. }) {
            *self = Self::Caught;
        }
        true
    }
}

impl Disk {
    fn new() -> Self {
        Self::of(SimStorage::new())
    }

    fn of(sim: SimStorage) -> Self {
        Self { sim, state: Arc::default() }
    }

    fn storage(&self) -> Interposed {
        let state = Arc::clone(&self.state);
        Interposed::new(&self.sim, move |op, path| {
            pass(&state, op, path);
            io::Result::Ok(())
        })
    }

    fn options(&self) -> StoreOptions {
        Store::options()
            .storage(Arc::new(self.storage()))
            .maintenance(Maintenance::Inline)
            .segment_bytes(1 << 20)
            .small_commit_bytes_max(64 << 10)
            .deadline(Some(DEADLINE))
            .write_deadline(Some(DEADLINE))
    }

    /// From now on calls of a kind get stuck, but for the first few.
    fn stick(&self, op: OpKind, suffix: &'static str, after: usize) {
        self.state.0.lock().stuck = Some(Stuck::All { op, suffix, after });
    }

    /// One call from now on gets stuck, after so many others.
    fn stick_one(&self, after: usize) {
        self.state.0.lock().stuck = Some(Stuck::One { after });
    }

    /// The kinds of the calls that are made meanwhile.
    fn calls_of<T>(&self, what: impl FnOnce() -> T) -> (T, Vec<OpKind>) {
        let before = self.state.0.lock().calls.len();
        let outcome = what();
        (outcome, self.state.0.lock().calls.split_off(before))
    }

    /// What is stuck goes on, and has ended when this returns.
    fn go_on(&self) {
        let (state, changed) = &*self.state;
        let mut state = state.lock();
        state.stuck = None;
        changed.notify_all();
        while state.waiting > 0 {
            changed.wait(&mut state);
        }
    }

    fn is_stuck(&self) -> bool {
        self.state.0.lock().waiting > 0
    }

    fn await_stuck(&self) {
        let (state, changed) = &*self.state;
        let mut state = state.lock();
        while state.waiting == 0 {
            changed.wait(&mut state);
        }
    }

    /// Opens the store once whoever was stuck in it has let go of it.
    fn reopen(&self) -> Store {
        let began = Instant::now();
        loop {
            match self.options().open(PATH) {
                Err(Error::Locked { .. }) if began.elapsed() < LONG => thread::yield_now(),
                opened => return opened.unwrap(),
            }
        }
    }
}

fn pass((state, changed): &(Mutex<State>, Condvar), op: OpKind, path: &Path) {
    let mut state = state.lock();
    state.calls.push(op);
    if !state.stuck.as_mut().is_some_and(|stuck| stuck.catches(op, path)) {
        return;
    }
    state.waiting += 1;
    changed.notify_all();
    while state.stuck.is_some() {
        changed.wait(&mut state);
    }
    state.waiting -= 1;
    changed.notify_all();
}

/// Runs something that must not wait for what is stuck.
fn soon<T: Send + 'static>(what: impl FnOnce() -> T + Send + 'static) -> T {
    let (tell, told) = mpsc::channel();
    thread::spawn(move || tell.send(what()));
    told.recv_timeout(LONG).expect("it hangs, or panicked")
}

fn timed_out<T: std::fmt::Debug>(outcome: Result<T, Error>) -> bool {
    matches!(outcome, Err(Error::Timeout { after_ms: 400, .. }))
}

/// What a commit is stuck in.
struct Stage {
    name: &'static str,
    op: OpKind,
    after: usize,
    len: usize,
    /// Whether its outcome is unknown then.
    refuses: bool,
}

const STAGES: [Stage; 6] = [
    Stage { name: "a small commit's write", op: OpKind::Write, after: 0, len: 1000, refuses: true },
    Stage { name: "a small commit's sync", op: OpKind::Sync, after: 0, len: 1000, refuses: true },
    Stage { name: "a payload", op: OpKind::Write, after: 0, len: 100_000, refuses: false },
    Stage { name: "a payload's sync", op: OpKind::Sync, after: 0, len: 100_000, refuses: true },
    Stage { name: "a frame", op: OpKind::Write, after: 1, len: 100_000, refuses: true },
    Stage { name: "a frame's sync", op: OpKind::Sync, after: 1, len: 100_000, refuses: true },
];

#[test]
fn a_commit_that_gets_stuck_is_given_up_and_nothing_acknowledged_is_lost() {
    for Stage { name, op, after, len, refuses } in STAGES {
        let disk = Disk::new();
        let store = disk.options().create_new(true).open(PATH).unwrap();
        let mut expected = BTreeMap::new();
        // A segment for small commits and one for large ones.
        for (key, len) in [("small", 100), ("large", 100_000)] {
            store.put(key, &bytes(1, len)).unwrap();
            expected.insert(key.as_bytes().to_vec(), bytes(1, len));
        }
        disk.stick(op, ".seg", after);
        let stuck = store.clone();
        let outcome = soon(move || stuck.put("stuck", &bytes(2, len)));
        assert!(timed_out(outcome), "{name}");
        assert_eq!(store.metrics().timeouts, 1, "{name}");
        let (writing, reading) = (store.clone(), store.clone());
        if refuses {
            let next = soon(move || (writing.put("next", b"value"), writing.sync()));
            assert!(
                matches!(next, (Err(Error::WritesRefused { .. }), Err(Error::WritesRefused { .. }))),
                "{name}: {next:?}"
            );
            assert!(disk.sim.files().iter().any(|path| path.ends_with("DISTRUST")), "{name}");
        } else {
            // Only that commit's own segment is concerned.
            disk.stick(op, "none", 0);
            soon(move || writing.put("next", b"value")).unwrap();
            expected.insert(b"next".to_vec(), b"value".to_vec());
        }
        assert_eq!(soon(move || contents(&reading)).unwrap(), expected, "{name}");
        // What is stuck may still land: nobody else may write to the store meanwhile.
        let closed = soon(move || store.close());
        assert_eq!(closed.is_err(), refuses, "{name}: {closed:?}");
        assert!(matches!(disk.options().open(PATH), Err(Error::Locked { .. })) || !refuses, "{name}");
        disk.go_on();
        let store = disk.reopen();
        let mut found = contents(&store).unwrap();
        // Unknown is unknown: it is there whole, or not at all.
        if let Some(value) = found.remove(&b"stuck"[..]) {
            assert!(refuses && value == bytes(2, len), "{name}");
        }
        assert_eq!(found, expected, "{name}");
        store.put("after", b"written").unwrap();
        sound(&store);
        store.close().unwrap();
        sound(&disk.reopen());
    }
}

#[test]
fn who_lent_the_bytes_of_a_commit_that_is_given_up_has_them_back() {
    // Stuck before anybody has reached for them, while they are written, and behind them.
    let stages = [(OpKind::Open, 0), (OpKind::Allocate, 0), (OpKind::Write, 1), (OpKind::Write, 2), (OpKind::Sync, 1)];
    for (op, after) in stages {
        let disk = Disk::new();
        let store = disk.options().create_new(true).open(PATH).unwrap();
        disk.stick(op, ".seg", after);
        let stuck = store.clone();
        let value = bytes(3, 50_000);
        let outcome = soon(move || {
            // Whole pages, which are not copied by the caller.
            let mut lent = AlignedBuf::zeroed(50_000);
            lent[..50_000].copy_from_slice(&bytes(3, 50_000));
            let outcome = stuck.put("stuck", &lent[..50_000]);
            // They are the caller's again.
            lent.fill(0xEE);
            outcome
        });
        assert!(timed_out(outcome), "{op:?}");
        soon(move || drop(store));
        disk.go_on();
        let store = disk.reopen();
        if let Ok(found) = store.get("stuck", &Device::host()) {
            assert!(found.as_host() == Some(&value[..]), "{op:?}");
        }
        store.put("after", b"written").unwrap();
        sound(&store);
    }
}

#[test]
fn who_shares_a_commit_or_comes_later_does_not_wait_for_ever() {
    for op in [OpKind::Write, OpKind::Sync] {
        let disk = Disk::new();
        let store = disk.options().create_new(true).open(PATH).unwrap();
        store.put("first", b"acknowledged").unwrap();
        disk.stick(op, ".seg", 0);
        let writers: Vec<_> = (0..8)
            .map(|writer| {
                let store = store.clone();
                thread::spawn(move || {
                    let key = format!("writer {writer}");
                    match writer % 3 {
                        0 => store.put(key, &bytes(writer, 500)),
                        1 => store.put(key, &bytes(writer, 90_000)),
                        _ => {
                            let (value, mut batch) = (bytes(writer, 500), store.batch());
                            batch.durability(Durability::Eventual).put(key, &value)?;
                            batch.commit()
                        }
                    }
                })
            })
            .collect();
        let outcomes = soon(|| writers.into_iter().map(|writer| writer.join().unwrap()).collect::<Vec<_>>());
        // An eventual commit needs no sync.
        let told =
            |outcome: &Result<(), Error>| matches!(outcome, Err(Error::Timeout { .. } | Error::WritesRefused { .. }));
        assert!(outcomes.iter().enumerate().all(|(n, outcome)| told(outcome) || n % 3 == 2), "{outcomes:?}");
        assert!(outcomes.iter().any(|outcome| matches!(outcome, Err(Error::Timeout { .. }))), "{outcomes:?}");
        assert_eq!(store.get("first", &Device::host()).unwrap().as_host(), Some(&b"acknowledged"[..]));
        soon(move || drop(store));
        disk.go_on();
        let store = disk.reopen();
        assert!(store.contains("first").unwrap());
        sound(&store);
    }
}

#[test]
fn a_sync_that_gets_stuck_is_given_up_and_the_eventual_commits_are_not_believed() {
    let disk = Disk::new();
    let store = disk.options().durability(Durability::Eventual).create_new(true).open(PATH).unwrap();
    store.put("synced", b"1").unwrap();
    store.sync().unwrap();
    store.put("written", b"2").unwrap();
    disk.stick(OpKind::Sync, ".seg", 0);
    let syncing = store.clone();
    assert!(timed_out(soon(move || syncing.sync())));
    assert!(store.contains("written").unwrap());
    assert!(matches!(store.put("next", b"3"), Err(Error::WritesRefused { .. })));
    soon(move || store.close()).unwrap_err();
    disk.go_on();
    let store = disk.reopen();
    assert!(store.contains("synced").unwrap() && !store.contains("written").unwrap());
}

/// Reads of host memory that the caller lends, and those that hand values on.
#[test]
fn a_read_into_the_callers_memory_that_gets_stuck_is_given_up() {
    let disk = Disk::new();
    let store = disk.options().segment_bytes(64 << 20).create_new(true).open(PATH).unwrap();
    let (large, small) = (bytes(1, 6 << 20), bytes(2, 5000));
    store.put("large", &large).unwrap();
    store.put("small", &small).unwrap();
    let mut destination = vec![0; 6 << 20];
    let read = |store: &Store, destination: &mut Vec<u8>| {
        let mut written = Vec::new();
        let into = store.get_into("large", destination).map(drop);
        let range = store.get_range("large", 5..(6 << 20) - 5, &Device::host());
        let to_writer = store.get_to_writer("large", &mut written).map(drop);
        (into, range.map(|range| range.as_host().unwrap().to_vec()), to_writer.map(|()| written))
    };
    let (into, range, written) = read(&store, &mut destination);
    into.unwrap();
    assert!(destination == large && range.unwrap() == large[5..(6 << 20) - 5] && written.unwrap() == large);
    for after in [0, 3] {
        disk.stick(OpKind::Read, ".seg", after);
        let (into, range, written) = read(&store, &mut destination);
        assert!(timed_out(into) && timed_out(range) && timed_out(written), "after {after}");
        disk.go_on();
    }
    assert_eq!(store.metrics().timeouts, 6);
    destination.fill(0);
    store.get_into("large", &mut destination).unwrap();
    assert!(destination == large);
    store.get_into("small", &mut destination).unwrap();
    assert_eq!(destination[..5000], small);
}

/// A read of one key, by one of the store's methods.
type ReadOne<'a> = (&'a str, &'a mut dyn FnMut(&Store) -> Result<Vec<u8>, Error>);

/// Reads of less than what another thread reads: the caller's own waits for the disk.
#[test]
fn small_reads_that_get_stuck_are_given_up_whether_or_not_the_segment_was_read_before() {
    let disk = Disk::new();
    let store = disk.options().segment_bytes(64 << 20).create_new(true).open(PATH).unwrap();
    let lens = [100, 1 << 20, 3 << 20];
    let values: Vec<Vec<u8>> = lens.iter().enumerate().map(|(n, &len)| bytes(n as u64, len)).collect();
    for (n, value) in values.iter().enumerate() {
        let mut batch = store.batch();
        batch.put_with_attributes(format!("{n}"), value, vec![("n".into(), vec![n as u8])]).unwrap();
        batch.commit().unwrap();
    }
    store.close().unwrap();
    let mut timeouts = 0;
    for (direct, warm) in [(true, false), (true, true), (false, true)] {
        disk.sim.set_abilities(Abilities { direct, ..Abilities::default() });
        for (n, value) in values.iter().enumerate() {
            let (key, len) = (format!("{n}"), value.len());
            let mut destination = vec![0; len];
            let reads: [ReadOne<'_>; 6] = [
                ("get", &mut |store| Ok(store.get(&key, &Device::host())?.as_host().unwrap().to_vec())),
                ("get_many", &mut |store| {
                    let tensors = store.get_many([key.as_str(), "0"], &Device::host())?;
                    Ok(tensors[0].as_host().unwrap().to_vec())
                }),
                ("get_into", &mut |store| store.get_into(&key, &mut destination).map(|_| destination.clone())),
                ("get_range", &mut |store| {
                    let range = store.get_range(&key, 0..len as u64, &Device::host())?;
                    Ok(range.as_host().unwrap().to_vec())
                }),
                ("get_to_writer", &mut |store| {
                    let mut written = Vec::new();
                    store.get_to_writer(&key, &mut written).map(|_| written)
                }),
                ("attributes", &mut |store| store.attributes(&key).map(|found| found[0].1.clone())),
            ];
            for (name, read) in reads {
                let expected = if name == "attributes" { &vec![n as u8] } else { value };
                let store = disk.options().read_only(true).open(PATH).unwrap();
                if warm {
                    assert!(read(&store).unwrap() == *expected, "{name} of {len}");
                }
                disk.stick(OpKind::Read, ".seg", 0);
                assert!(timed_out(read(&store)), "{name} of {len}, direct: {direct}, warm: {warm}");
                assert_eq!(store.metrics().timeouts, 1, "{name} of {len}, direct: {direct}, warm: {warm}");
                timeouts += 1;
                disk.go_on();
                assert!(read(&store).unwrap() == *expected, "{name} of {len}");
            }
        }
    }
    assert_eq!(timeouts, 3 * 3 * 6);
}

/// A question that a store answers from its index, and whether it answered right.
type Ask<'a> = (&'a str, fn(&Store) -> Result<bool, Error>);

#[test]
fn a_lookup_that_gets_stuck_is_given_up_whether_the_index_is_mapped_or_read() {
    for mapped in [true, false] {
        let sim = SimStorage::new();
        sim.set_abilities(Abilities { map: mapped, ..Abilities::default() });
        let disk = Disk::of(sim);
        let store = disk.options().create_new(true).open(PATH).unwrap();
        let values: Vec<[u8; 8]> = (0..2000u64).map(u64::to_le_bytes).collect();
        let mut batch = store.batch();
        for (n, value) in values.iter().enumerate() {
            batch.put(format!("{n:04}"), value).unwrap();
        }
        batch.commit().unwrap();
        store.close().unwrap();
        let open = || disk.options().read_only(true).open(PATH).unwrap();
        let asks: [Ask<'_>; 6] = [
            ("contains", |store| store.contains("0777")),
            ("contains not", |store| Ok(!store.contains("none")?)),
            ("info", |store| Ok(store.info("0777")?.is_some_and(|info| info.len_bytes == 8))),
            ("get", |store| Ok(store.get("0777", &Device::host())?.as_host() == Some(&777u64.to_le_bytes()[..]))),
            ("get_many", |store| Ok(store.get_many(["0001", "1999"], &Device::host())?.len() == 2)),
            ("scan", |store| {
                let keys = store.scan("1").collect::<Result<Vec<_>, _>>()?;
                Ok(keys.len() == 1000 && keys[999].key.as_ref() == b"1999")
            }),
        ];
        for (name, ask) in asks {
            let store = open();
            disk.stick(OpKind::Read, ".idx", 0);
            let asking = store.clone();
            assert!(timed_out(soon(move || ask(&asking))), "{name}, mapped: {mapped}");
            assert!(disk.is_stuck());
            assert_eq!(store.metrics().timeouts, 1);
            disk.go_on();
            assert!(ask(&store).unwrap(), "{name}, mapped: {mapped}");
            // What is in memory by now is found while the disk is stuck.
            disk.stick(OpKind::Read, ".idx", 0);
            if mapped {
                assert!(ask(&store).unwrap(), "{name}");
            }
            disk.go_on();
        }
    }
}

#[test]
fn looking_through_a_store_and_backing_it_up_are_given_up_and_the_store_goes_on() {
    let disk = Disk::new();
    let store = disk.options().create_new(true).open(PATH).unwrap();
    for n in 0..20 {
        store.put(format!("{}", n % 7), &bytes(n, 90_000)).unwrap();
    }
    let expected = contents(&store).unwrap();
    disk.stick(OpKind::Read, ".seg", 2);
    let verifying = store.clone();
    assert!(timed_out(soon(move || verifying.verify(|_| {}))));
    disk.go_on();
    disk.stick(OpKind::Write, "MANIFEST.tmp", 0);
    let backing_up = store.clone();
    assert!(timed_out(soon(move || backing_up.backup("/backup"))));
    store.put("beside", b"written").unwrap();
    disk.go_on();
    // Nobody waits for it any more: it takes away what it made, once it gets to it.
    let began = Instant::now();
    while disk.sim.files().iter().any(|path| path.starts_with("/backup/segments")) && began.elapsed() < LONG {
        thread::yield_now();
    }
    assert!(matches!(disk.options().open("/backup"), Err(Error::NotAStore { .. })));
    disk.stick(OpKind::Read, ".seg", 2);
    let compacting = store.clone();
    let compacted = soon(move || compacting.compact(&CompactOptions::default(), |_| {}));
    assert!(timed_out(compacted));
    store.put("beside", b"written again").unwrap();
    disk.go_on();
    store.compact(&CompactOptions::default(), |_| {}).unwrap();
    let mut found = contents(&store).unwrap();
    assert_eq!(found.remove(&b"beside"[..]).unwrap(), b"written again");
    assert_eq!(found, expected);
    sound(&store);
    store.backup("/backup").unwrap();
}

#[test]
fn closing_does_not_wait_for_a_flush_that_is_stuck_and_the_lock_stays_until_it_ends() {
    let disk = Disk::new();
    let background = |disk: &Disk| {
        disk.options().maintenance(Maintenance::Background).overlay_entries_max(3).background_compaction(None)
    };
    let store = background(&disk).create_new(true).open(PATH).unwrap();
    disk.stick(OpKind::Sync, ".tmp", 0);
    for n in 0..4 {
        store.put(format!("{n}"), &bytes(n, 100)).unwrap();
    }
    disk.await_stuck();
    let closed = soon(move || store.close());
    assert!(timed_out(closed));
    assert!(matches!(disk.options().open(PATH), Err(Error::Locked { .. })));
    let reader = disk.options().read_only(true).open(PATH).unwrap();
    assert_eq!(reader.get("3", &Device::host()).unwrap().as_host(), Some(&bytes(3, 100)[..]));
    disk.go_on();
    let store = disk.reopen();
    assert_eq!(contents(&store).unwrap().len(), 4);
    sound(&store);
}

#[test]
fn without_deadlines_everything_is_done_by_the_callers_thread() {
    let disk = Disk::new();
    let caller = thread::current().id();
    let storage = Interposed::new(&disk.sim, move |op, path| {
        let payload = op == OpKind::Write && path.extension().is_some_and(|kind| kind == "seg");
        assert!(thread::current().id() == caller || payload, "{op:?} {}", path.display());
        Ok(())
    });
    let options = disk.options().storage(Arc::new(storage)).deadline(None).write_deadline(None);
    let store = options.clone().create_new(true).open(PATH).unwrap();
    let reader = options.clone().read_only(true).open(PATH).unwrap();
    for n in 0..9 {
        store.put(format!("{n}"), &bytes(n, 1 + 40_000 * n as usize)).unwrap();
    }
    assert!(reader.refresh().unwrap());
    store.compact(&CompactOptions::default(), |_| {}).unwrap();
    store.backup("/backup").unwrap();
    let mut destination = vec![0; 1 << 20];
    store.get_into("8", &mut destination).unwrap();
    sound(&store);
    store.close().unwrap();
    drop(reader);
    options.clone().rebuild_index(PATH, |_| {}).unwrap();
    options.repair(PATH, "/repaired", |_| {}).unwrap();
    for option in
        [Store::options().deadline(Some(Duration::ZERO)), Store::options().write_deadline(Some(Duration::ZERO))]
    {
        assert!(matches!(option.open("/none"), Err(Error::InvalidOption { .. })));
    }
}
