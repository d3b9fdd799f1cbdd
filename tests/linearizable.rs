//! Many threads use one store at once, and there must be an order in which a store that does one thing at a time would have
//! answered the same.
//!
//! What is asked for, of the handles of one open store: a put, a delete, a batch and a get of one key or of many take effect at one
//! moment between their call and their return; a scan, a snapshot and a backup show one state, which was the store's at a
//! moment of the call that made them; what is refused because the store is closed has no effect. Of a reader beside it: each view is one
//! state, with every commit that was acknowledged before the refresh (or the opening) was called and none that was begun after it
//! returned, and views only move forward. A reader may see a commit a moment before the writer's own threads do: it finds it
//! on the disk, where they wait for the sync. So its views are judged by the commits, and not by what others read.
//!
//! Each round makes a store whose rare paths are common, and lets seven threads at it; `tests/common/history.rs` judges.
//! `ALIGHT_ROUNDS=N` runs N rounds on the simulated disk and a tenth as many on the real one, `ALIGHT_SEED=N` begins with that
//! seed. A seed fixes what each thread asks for and how the disk dawdles; the order in which threads meet is the system's.

mod common;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use alight::storage::sim::SimStorage;
use alight::storage::{FileStorage, Storage};
use alight::{CompactOptions, Device, Durability, Error, Maintenance, Store};
use common::bytes;
use common::history::{Clock, Model, Operation, Seen, Value, order_of};
use common::interposed::Interposed;
use common::tiny::{sound, tiny};

const KEYS: [&str; 5] = ["a/0", "a/1", "b/0", "b/1", "b/2"];
const ROUNDS: u64 = 300;
/// Operations of each of the threads that put, delete and get.
const OPERATIONS: usize = 9;

struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0xD1B5_4A32_D192_ED03)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 33) % n
    }

    fn key(&mut self) -> &'static str {
        KEYS[self.below(KEYS.len() as u64) as usize]
    }

    fn keys(&mut self) -> Vec<&'static str> {
        let chosen = 1 + self.below((1 << KEYS.len()) - 1);
        (0..KEYS.len()).filter(|n| chosen >> n & 1 == 1).map(|n| KEYS[n]).collect()
    }
}

/// From here on a value is long enough for a commit with a sync of its own.
const LONG: u64 = 9000;

/// A value is known by its length alone, so that a scan tells which it is. Every fourth is long.
fn length_of(value: Value) -> u64 {
    u64::from(value) + if value % 4 == 3 { LONG } else { 100 }
}

fn value_of(length: u64) -> Value {
    let value = if length >= LONG { length - LONG } else { length - 100 };
    Value::try_from(value).expect("a length that was put")
}

fn content_of(value: Value) -> Vec<u8> {
    bytes(u64::from(value), length_of(value) as usize)
}

/// The value that these bytes are, every one of them.
fn known(content: &[u8]) -> Value {
    let value = value_of(content.len() as u64);
    assert!(content == content_of(value), "value {value} has other bytes than were put");
    value
}

/// What was answered, unless the store is closed.
fn unless_closed<T>(answer: Result<T, Error>) -> Option<T> {
    match answer {
        Ok(answer) => Some(answer),
        Err(Error::Closed) => None,
        Err(error) => panic!("{error:?}"),
    }
}

/// All keys with a prefix, given those that were found.
fn sees_with_prefix(prefix: &str, found: &Model) -> Vec<(&'static str, Seen)> {
    assert!(found.keys().all(|key| key.starts_with(prefix)));
    let asked = KEYS.into_iter().filter(|key| key.starts_with(prefix));
    asked.map(|key| (key, found.get(key).map_or(Seen::Absent, |&value| Seen::Value(value)))).collect()
}

/// What a scan tells, as it goes through the keys in order.
fn scanned(scan: alight::Scan) -> Option<Model> {
    let mut found = Model::new();
    for info in scan {
        let info = unless_closed(info)?;
        let key = KEYS.into_iter().find(|key| key.as_bytes() == info.key.as_bytes()).expect("a key that was put");
        assert!(found.last_key_value().is_none_or(|(last, _)| *last < key), "keys come in order, each once");
        found.insert(key, value_of(info.len_bytes));
    }
    Some(found)
}

/// Everything a store holds, every byte of it compared.
fn whole(store: &Store) -> Model {
    let snapshot = store.snapshot();
    let found = scanned(snapshot.scan("")).expect("the store is open");
    for (key, &value) in &found {
        let content = snapshot.get(key, &Device::host()).unwrap().to_host().unwrap();
        assert_eq!(known(&content), value, "{key}");
    }
    found
}

/// One store and the threads that use it.
struct Round<'a> {
    seed: u64,
    storage: Arc<dyn Storage>,
    folder: &'a Path,
    clock: Clock,
    values: AtomicU32,
    /// Whether nobody changes anything any more.
    done: AtomicBool,
}

impl Round<'_> {
    fn value(&self) -> Value {
        self.values.fetch_add(1, Ordering::Relaxed)
    }

    fn open(&self, create: bool) -> Store {
        let maintenance = if self.seed.is_multiple_of(2) { Maintenance::Background } else { Maintenance::Inline };
        let options = tiny().storage(Arc::clone(&self.storage)).maintenance(maintenance).background_slack_bytes(0);
        options.create_new(create).open(self.folder.join("store")).unwrap()
    }

    /// An operation that a caller of `call` made of its answer; none where the store is closed.
    fn record(
        &self,
        what: &'static str,
        writes: Vec<(&'static str, Option<Value>)>,
        call: impl FnOnce() -> Option<Vec<(&'static str, Seen)>>,
    ) -> Option<Operation> {
        let (start, sees, end) = self.clock.during(call);
        Some(Operation { what, start, end, sees: sees?, writes })
    }

    fn put(&self, store: &Store, random: &mut Random) -> Option<Operation> {
        let (key, value) = (random.key(), self.value());
        let content = content_of(value);
        self.record("put", vec![(key, Some(value))], || {
            unless_closed(store.put(key, &content))?;
            Some(Vec::new())
        })
    }

    fn delete(&self, store: &Store, random: &mut Random) -> Option<Operation> {
        let key = random.key();
        let (start, was_there, end) = self.clock.during(|| unless_closed(store.delete(key)));
        let was_there = was_there?;
        let sees = vec![(key, if was_there { Seen::Present } else { Seen::Absent })];
        let writes = if was_there { vec![(key, None)] } else { Vec::new() };
        Some(Operation { what: "delete", start, end, sees, writes })
    }

    fn batch(&self, store: &Store, random: &mut Random) -> Option<Operation> {
        let writes: Vec<(&'static str, Option<Value>)> =
            random.keys().into_iter().map(|key| (key, (random.below(3) > 0).then(|| self.value()))).collect();
        let contents: Vec<Option<Vec<u8>>> = writes.iter().map(|(_, value)| value.map(content_of)).collect();
        let mut batch = store.batch();
        for ((key, _), content) in writes.iter().zip(&contents) {
            match content {
                Some(content) => batch.put(key, content).unwrap(),
                None => batch.delete(key).unwrap(),
            }
        }
        if random.below(3) == 0 {
            batch.durability(Durability::Eventual);
        }
        self.record("batch", writes, || {
            unless_closed(batch.commit())?;
            Some(Vec::new())
        })
    }

    fn get(&self, store: &Store, random: &mut Random) -> Option<Operation> {
        let key = random.key();
        let look_only = random.below(3) == 0;
        self.record("get", Vec::new(), || {
            if look_only {
                let info = unless_closed(store.info(key))?;
                return Some(vec![(key, info.map_or(Seen::Absent, |info| Seen::Value(value_of(info.len_bytes))))]);
            }
            let seen = match store.get(key, &Device::host()) {
                Err(Error::NotFound(_)) => Seen::Absent,
                got => Seen::Value(known(&unless_closed(got)?.to_host().unwrap())),
            };
            Some(vec![(key, seen)])
        })
    }

    fn get_many(&self, store: &Store, random: &mut Random) -> Option<Operation> {
        let keys = random.keys();
        self.record("get_many", Vec::new(), || match store.get_many(&keys, &Device::host()) {
            // Keys are looked up in their order.
            Err(Error::NotFound(absent)) => {
                let place = keys.iter().position(|key| key.as_bytes() == absent.0).expect("a key that was asked for");
                let present = keys[..place].iter().map(|&key| (key, Seen::Present));
                Some(present.chain([(keys[place], Seen::Absent)]).collect())
            }
            got => {
                let values = unless_closed(got)?.into_iter().map(|tensor| known(&tensor.to_host().unwrap()));
                Some(keys.iter().copied().zip(values.map(Seen::Value)).collect())
            }
        })
    }

    fn scan(&self, store: &Store, random: &mut Random) -> Option<Operation> {
        let prefix = ["", "a/", "b/"][random.below(3) as usize];
        // What is seen is decided by the call; the keys may be asked for later.
        let (start, scan, end) = self.clock.during(|| store.scan(prefix));
        std::thread::yield_now();
        let sees = sees_with_prefix(prefix, &scanned(scan)?);
        Some(Operation { what: "scan", start, end, sees, writes: Vec::new() })
    }

    fn snapshot(&self, store: &Store, random: &mut Random) -> Option<Operation> {
        let (start, snapshot, end) = self.clock.during(|| store.snapshot());
        std::thread::sleep(Duration::from_micros(random.below(400)));
        let found = scanned(snapshot.scan(""))?;
        for (key, &value) in &found {
            let content = unless_closed(snapshot.get(key, &Device::host()))?.to_host().unwrap();
            assert_eq!(known(&content), value, "{key} in a snapshot");
        }
        Some(Operation { what: "snapshot", start, end, sees: sees_with_prefix("", &found), writes: Vec::new() })
    }

    /// A thread that puts, deletes and gets until it has done its share, or the store is closed.
    fn client(&self, store: &Store, number: u64) -> Vec<Operation> {
        let mut random = Random::new(self.seed * 8 + number);
        let next = || match random.below(100) {
            0..30 => self.put(store, &mut random),
            30..45 => self.batch(store, &mut random),
            45..60 => self.delete(store, &mut random),
            60..75 => self.get(store, &mut random),
            75..83 => self.get_many(store, &mut random),
            83..92 => self.scan(store, &mut random),
            _ => self.snapshot(store, &mut random),
        };
        std::iter::from_fn(next).take(OPERATIONS).collect()
    }

    /// A thread that makes backups, and answers where.
    fn keeper(&self, store: &Store) -> Vec<(String, u64, u64)> {
        let mut made = Vec::new();
        while made.len() < 3 && !self.done.load(Ordering::Acquire) {
            let name = format!("backup-{}", made.len());
            let (start, report, end) = self.clock.during(|| unless_closed(store.backup(self.folder.join(&name))));
            if report.is_none() {
                break;
            }
            made.push((name, start, end));
            std::thread::sleep(Duration::from_micros(300));
        }
        made
    }

    fn compactor(&self, store: &Store) {
        while !self.done.load(Ordering::Acquire) {
            if unless_closed(store.compact(&CompactOptions::default(), |_| {})).is_none() {
                return;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// A reader beside the writer, as another process would be, and the views that it had.
    fn reader(&self) -> Vec<Operation> {
        let view = |start, store: &Store, end| {
            let found = whole(store);
            std::thread::yield_now();
            assert_eq!(whole(store), found, "a view does not change");
            Operation { what: "view", start, end, sees: sees_with_prefix("", &found), writes: Vec::new() }
        };
        let options = tiny().storage(Arc::clone(&self.storage)).read_only(true);
        let (start, reader, end) = self.clock.during(|| options.open(self.folder.join("store")).unwrap());
        let mut views = vec![view(start, &reader, end)];
        let mut last = false;
        while !last && views.len() < 40 {
            last = self.done.load(Ordering::Acquire);
            // Where it says that nothing is new, that is a view too.
            let (start, moved, end) = self.clock.during(|| reader.refresh().unwrap());
            let seen = view(start, &reader, end);
            assert!(moved || seen.sees == views[views.len() - 1].sees, "nothing was new");
            views.push(seen);
        }
        reader.close().unwrap();
        views
    }

    fn run(&self) -> Rounds {
        let store = self.open(true);
        let closes = self.seed.is_multiple_of(3);
        let mut history: Vec<Operation> = Vec::new();
        let (mut views, mut backups, mut closing) = (Vec::new(), Vec::new(), None);
        std::thread::scope(|scope| {
            let store = &store;
            let clients: Vec<_> = (0..4).map(|number| scope.spawn(move || self.client(store, number))).collect();
            let keeper = scope.spawn(move || self.keeper(store));
            let compactor = scope.spawn(move || self.compactor(store));
            let reader = scope.spawn(move || self.reader());
            if closes {
                let enough = Random::new(self.seed).below(60);
                while self.clock.now() < enough {
                    std::thread::sleep(Duration::from_micros(20));
                }
                closing = Some(self.clock.during(|| store.clone().close().unwrap()));
            }
            history.extend(clients.into_iter().flat_map(|client| client.join().unwrap()));
            self.done.store(true, Ordering::Release);
            compactor.join().unwrap();
            backups = keeper.join().unwrap();
            views = reader.join().unwrap();
        });
        if let Some((_, (), end)) = closing {
            let late = history.iter().find(|operation| operation.start > end);
            assert!(late.is_none(), "answered by a store that was closed: {late:?}");
        } else {
            store.clone().close().unwrap();
        }
        let state = |what, start, store: &Store, end| {
            sound(store);
            Operation { what, start, end, sees: sees_with_prefix("", &whole(store)), writes: Vec::new() }
        };
        for (name, start, end) in &backups {
            let options = tiny().storage(Arc::clone(&self.storage)).read_only(true);
            history.push(state("backup", *start, &options.open(self.folder.join(name)).unwrap(), *end));
        }
        let (start, again, end) = self.clock.during(|| self.open(false));
        history.push(state("opened again", start, &again, end));
        again.close().unwrap();

        let writes = history.iter().filter(|operation| !operation.writes.is_empty());
        // Whether a key was there is what a thread of the writer saw.
        let blind = writes.map(|operation| Operation { sees: Vec::new(), ..operation.clone() });
        let beside: Vec<Operation> = blind.chain(views).collect();
        for (judged, what) in [(&history, "the store"), (&beside, "a reader beside it")] {
            if let Err(impossible) = order_of(&Model::new(), judged) {
                panic!("seed {}, {what}: {impossible:?}", self.seed);
            }
        }
        let metrics = store.metrics();
        Rounds {
            operations: (history.len() + beside.len()) as u64,
            backups: backups.len() as u64,
            flushes: metrics.index_flushes,
            compacted: metrics.bytes_compacted,
            removed: metrics.segments_removed,
        }
    }
}

/// What rounds came to.
#[derive(Debug, Default)]
struct Rounds {
    operations: u64,
    backups: u64,
    flushes: u64,
    compacted: u64,
    removed: u64,
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().expect("a number"))
}

fn rounds(count: u64, folder: impl Fn() -> Box<dyn AsRef<Path>>, storage: impl Fn(u64) -> Arc<dyn Storage>) {
    let first = number("ALIGHT_SEED").unwrap_or(1);
    let began = Instant::now();
    let mut all = Rounds::default();
    for seed in first..first + count {
        let folder = folder();
        let round = Round {
            seed,
            storage: storage(seed),
            folder: (*folder).as_ref(),
            clock: Clock::default(),
            values: AtomicU32::new(0),
            done: AtomicBool::new(false),
        };
        let outcome = round.run();
        all.operations += outcome.operations;
        all.backups += outcome.backups;
        all.flushes += outcome.flushes;
        all.compacted += outcome.compacted;
        all.removed += outcome.removed;
    }
    println!("seeds {first} to {}: {all:?}, {:.1} s", first + count - 1, began.elapsed().as_secs_f64());
    let met = all.backups.min(all.flushes).min(all.compacted).min(all.removed) > 0;
    assert!(met || count < 20, "something did not take place at all: {all:?}");
}

/// A disk that lets others go first now and then, so that threads meet between any two of its calls.
fn dawdling(seed: u64) -> Arc<dyn Storage> {
    let calls = AtomicU64::new(seed << 20);
    Arc::new(Interposed::new(&SimStorage::new(), move |_, _| {
        match Random::new(calls.fetch_add(1, Ordering::Relaxed)).below(64) {
            0..16 => std::thread::yield_now(),
            16..20 => std::thread::sleep(Duration::from_micros(50)),
            _ => {}
        }
        Ok(())
    }))
}

#[test]
fn a_store_on_a_simulated_disk_answers_as_if_it_did_one_thing_at_a_time() {
    rounds(number("ALIGHT_ROUNDS").unwrap_or(ROUNDS), || Box::new("/"), dawdling);
}

#[test]
fn a_store_on_a_real_disk_answers_as_if_it_did_one_thing_at_a_time() {
    struct Folder(tempfile::TempDir);
    impl AsRef<Path> for Folder {
        fn as_ref(&self) -> &Path {
            self.0.path()
        }
    }
    let count = number("ALIGHT_ROUNDS").unwrap_or(ROUNDS).div_ceil(10);
    rounds(count, || Box::new(Folder(tempfile::tempdir().unwrap())), |_| Arc::new(FileStorage::new()));
}

/// Histories that no right store could have had, each beside one that is right and differs in one thing.
mod judged {
    use super::*;

    fn put(start: u64, end: u64, key: &'static str, value: Value) -> Operation {
        Operation { what: "put", start, end, sees: Vec::new(), writes: vec![(key, Some(value))] }
    }

    fn delete(start: u64, end: u64, key: &'static str, seen: Seen) -> Operation {
        Operation { what: "delete", start, end, sees: vec![(key, seen)], writes: vec![(key, None)] }
    }

    fn sees(start: u64, end: u64, sees: &[(&'static str, Seen)]) -> Operation {
        Operation { what: "get", start, end, sees: sees.to_vec(), writes: Vec::new() }
    }

    fn is_right(operations: &[Operation]) -> bool {
        order_of(&Model::from([("k", 1), ("l", 2)]), operations).is_ok()
    }

    use Seen::{Absent, Present, Value as Is};

    #[test]
    fn a_stale_read_is_found() {
        assert!(is_right(&[put(0, 5, "k", 9), sees(1, 2, &[("k", Is(1))]), sees(3, 4, &[("k", Is(9))])]));
        assert!(!is_right(&[put(0, 5, "k", 9), sees(1, 2, &[("k", Is(9))]), sees(3, 4, &[("k", Is(1))])]));
        assert!(!is_right(&[put(0, 1, "k", 9), sees(2, 3, &[("k", Is(1))])]));
    }

    #[test]
    fn a_read_of_what_is_put_later_is_found() {
        assert!(is_right(&[sees(0, 2, &[("k", Is(9))]), put(1, 3, "k", 9)]));
        assert!(!is_right(&[sees(0, 1, &[("k", Is(9))]), put(2, 3, "k", 9)]));
    }

    #[test]
    fn a_torn_batch_is_found() {
        let batch =
            Operation { what: "batch", start: 0, end: 9, sees: Vec::new(), writes: vec![("k", Some(8)), ("l", None)] };
        assert!(is_right(&[batch.clone(), sees(1, 2, &[("k", Is(8)), ("l", Absent)])]));
        assert!(is_right(&[batch.clone(), sees(1, 2, &[("k", Is(1)), ("l", Is(2))])]));
        assert!(!is_right(&[batch.clone(), sees(1, 2, &[("k", Is(8)), ("l", Is(2))])]));
        // Key for key nothing is wrong here; together they are.
        assert!(!is_right(&[batch, sees(1, 2, &[("k", Is(8))]), sees(3, 4, &[("l", Present)])]));
    }

    #[test]
    fn a_lost_update_is_found() {
        let after = |value| sees(6, 7, &[("k", Is(value))]);
        assert!(is_right(&[put(0, 3, "k", 8), put(1, 2, "k", 9), after(8)]));
        assert!(is_right(&[put(0, 3, "k", 8), put(1, 2, "k", 9), after(9)]));
        assert!(!is_right(&[put(0, 1, "k", 8), put(2, 3, "k", 9), after(8)]));
        assert!(!is_right(&[put(0, 3, "k", 8), put(1, 2, "k", 9), after(1)]));
    }

    #[test]
    fn a_delete_that_comes_undone_or_counts_twice_is_found() {
        assert!(!is_right(&[delete(0, 1, "k", Present), sees(2, 3, &[("k", Is(1))])]));
        assert!(is_right(&[delete(0, 2, "k", Present), delete(1, 3, "k", Absent)]));
        assert!(!is_right(&[delete(0, 2, "k", Present), delete(1, 3, "k", Present)]));
        let between = put(1, 3, "k", 9);
        assert!(is_right(&[delete(0, 2, "k", Present), between, delete(1, 3, "k", Present)]));
    }

    #[test]
    fn a_state_that_never_was_is_found() {
        let puts = [put(0, 1, "k", 8), put(2, 3, "l", 9)];
        let with = |scan: Operation| is_right(&[puts[0].clone(), puts[1].clone(), scan]);
        assert!(with(sees(0, 3, &[("k", Is(1)), ("l", Is(2))])));
        assert!(with(sees(0, 3, &[("k", Is(8)), ("l", Is(2))])));
        assert!(!with(sees(0, 3, &[("k", Is(1)), ("l", Is(9))])), "the second was put after the first");
        assert!(!with(sees(2, 3, &[("k", Is(1)), ("l", Is(2))])), "it was so before, and is no more");
    }

    #[test]
    fn two_scans_that_saw_two_puts_in_two_orders_are_found() {
        let puts = [put(0, 9, "k", 8), put(0, 9, "l", 9)];
        let [first, second] = [[("k", Is(8)), ("l", Is(2))], [("k", Is(1)), ("l", Is(9))]];
        assert!(is_right(&[puts[0].clone(), puts[1].clone(), sees(1, 2, &first)]));
        assert!(is_right(&[puts[0].clone(), puts[1].clone(), sees(1, 2, &second)]));
        assert!(!is_right(&[puts[0].clone(), puts[1].clone(), sees(1, 2, &first), sees(1, 2, &second)]));
    }
}
