//! Torn or damaged: both leave bytes behind that are no commit. What tells them apart is whether a later commit says that
//! a sync had covered them. A torn tail of any shape is cut, and the store opens; damage of any shape to what a sync had
//! covered refuses the open, and every file is left as it is.
//!
//! `ALIGHT_TORN=N` looks at N states of each kind, `ALIGHT_TORN_SEED=N` at others.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use alight::storage::sim::SimStorage;
use alight::{Device, Durability, Error, Store, StoreOptions};
use alight_format::{Frame, Prelude, SegmentHeader};

use crate::oracle::{Asked, Contents, PATH, Scribe, contents, histories, tiny};
use crate::workloads::value;

fn number(variable: &str, otherwise: u64) -> u64 {
    std::env::var(variable).ok().and_then(|number| number.parse().ok()).unwrap_or(otherwise)
}

/// Numbers that a seed determines.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let mixed = self.0 ^ (self.0 >> 33);
        mixed.wrapping_mul(0xBF58_476D_1CE4_E5B9) >> 16
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }

    fn within(&mut self, start: u64, end: u64) -> u64 {
        start + self.below(end - start)
    }
}

/// A frame as it lies in a file.
#[derive(Debug, Clone)]
struct Placed {
    path: PathBuf,
    at: u64,
    prelude: Prelude,
}

impl Placed {
    fn payload(&self) -> u64 {
        self.at + self.prelude.frame_len
    }

    fn end(&self) -> u64 {
        self.payload() + self.prelude.payload_len
    }

    fn seq(&self) -> u64 {
        self.prelude.seq.get()
    }
}

/// Every whole frame of every segment whose header is whole.
fn frames(sim: &SimStorage) -> Vec<Placed> {
    let mut found = Vec::new();
    for path in segments(sim) {
        let bytes = sim.read_file(&path);
        let Some(header) = own_header(&path, &bytes) else { continue };
        for at in (4096..bytes.len() as u64).step_by(4096) {
            let Ok(prelude) = Prelude::decode(&bytes[at as usize..]) else { continue };
            let placed = Placed { path: path.clone(), at, prelude };
            let inside = prelude.belongs(header.salt, at) && placed.end() <= bytes.len() as u64;
            if inside && Frame::decode(&bytes[at as usize..placed.payload() as usize]).is_ok() {
                found.push(placed);
            }
        }
    }
    found
}

/// The header of a segment that is whole, and bears its own name.
fn own_header(path: &Path, bytes: &[u8]) -> Option<SegmentHeader> {
    let header = SegmentHeader::decode(bytes).ok()?;
    path.ends_with(header.segment.file_name()).then_some(header)
}

fn segments(sim: &SimStorage) -> Vec<PathBuf> {
    sim.files().into_iter().filter(|path| path.extension().is_some_and(|kind| kind == "seg")).collect()
}

/// Every file but the lock, whose holder writes his name into it before he looks.
fn everything(sim: &SimStorage) -> BTreeMap<PathBuf, Vec<u8>> {
    let files = sim.files().into_iter().filter(|path| !path.ends_with("LOCK"));
    files.map(|path| (path.clone(), sim.read_file(&path))).collect()
}

/// A disk after a process was killed: commits up to `acknowledged` are durable, some after it are written.
struct Subject {
    sim: SimStorage,
    /// The disk some commits earlier.
    earlier: SimStorage,
    histories: Vec<Contents>,
    acknowledged: u64,
    /// The manifest covers commits up to this one.
    covered: u64,
    frames: Vec<Placed>,
}

fn options(sim: &SimStorage) -> StoreOptions {
    tiny(sim).overlay_entries_max(1000)
}

fn subject() -> Subject {
    let (sim, asked) = (SimStorage::new(), Asked::default());
    sim.stop_recording();
    let scribe = Scribe { sim: &sim, asked: &asked, thread: 0 };
    let store = options(&sim).create_new(true).open(PATH).unwrap();
    let commit = |store: &Store, n: u64, durability| {
        // Shared segments, some of which small commits fill and others large ones; and segments of their own.
        let len = [400, 3000, 1500, 9000, 700, 18_000, 5000, 0][(n % 8) as usize];
        let mut commit = vec![(format!("k{}", n % 19).into_bytes(), Some(value(n, len)))];
        if n % 5 == 4 {
            commit.push((format!("k{}", (n + 7) % 19).into_bytes(), None));
        }
        scribe.commit(store, commit, durability).unwrap();
    };
    (0..9).for_each(|n| commit(&store, n, Durability::Immediate));
    store.close().unwrap();
    let store = options(&sim).open(PATH).unwrap();
    (9..22).for_each(|n| commit(&store, n, Durability::Immediate));
    let earlier = sim.clone_disk();
    (22..30).for_each(|n| commit(&store, n, Durability::Immediate));
    (30..38).for_each(|n| commit(&store, n, Durability::Eventual));
    store.abandon();
    let histories = histories(&asked.threads.lock()[&0]);
    let frames = frames(&sim);
    assert_eq!(frames.len(), 38);
    Subject { sim, earlier, histories, acknowledged: 30, covered: 9, frames }
}

/// Writes over a stretch of a file in one of many ways; says in which.
fn spoil(disk: &SimStorage, dice: &mut Dice, path: &Path, start: u64, end: u64) -> &'static str {
    let mut bytes = disk.read_file(path);
    let end = end.min(bytes.len() as u64);
    if start >= end {
        return "nothing";
    }
    let noise = |dice: &mut Dice, bytes: &mut [u8]| bytes.iter_mut().for_each(|byte| *byte = dice.next() as u8);
    let pick = |dice: &mut Dice, unit: u64| {
        let first = dice.within(start, end) / unit * unit;
        first.max(start) as usize..(first + unit * dice.within(1, 4)).min(end) as usize
    };
    let shape = match dice.below(9) {
        0 => {
            bytes[start as usize..end as usize].fill(0);
            "all zeros"
        }
        1 => {
            noise(dice, &mut bytes[start as usize..end as usize]);
            "all noise"
        }
        2 => {
            for _ in 0..dice.within(1, 6) {
                let hit = pick(dice, 512);
                bytes[hit].fill(0);
            }
            "sectors of zeros"
        }
        3 => {
            for _ in 0..dice.within(1, 6) {
                let hit = pick(dice, 512);
                noise(dice, &mut bytes[hit]);
            }
            "sectors of noise"
        }
        4 => {
            let hit = pick(dice, 4096);
            bytes[hit].fill(0);
            "pages of zeros"
        }
        5 => {
            let at = dice.within(start, end);
            bytes[at as usize..end as usize].fill(0);
            "its end zeros"
        }
        6 => {
            let at = dice.within(start, end);
            bytes[start as usize..at as usize + 1].fill(0);
            "its beginning zeros"
        }
        7 => {
            for _ in 0..dice.within(1, 10) {
                bytes[dice.within(start, end) as usize] ^= 1 << dice.below(8);
            }
            "some bits"
        }
        _ => {
            // A sector where its neighbour belongs.
            let (from, to) = (pick(dice, 512).start, pick(dice, 512).start);
            let len = 512.min(end as usize - from.max(to));
            bytes.copy_within(from..from + len, to);
            "a sector in another's place"
        }
    };
    disk.write_file(path, &bytes);
    shape
}

fn seeds(count: u64) -> impl Iterator<Item = u64> {
    let first = number("ALIGHT_TORN_SEED", 1) << 32;
    (0..number("ALIGHT_TORN", count)).map(move |n| first + n)
}

fn tally(counts: &mut BTreeMap<&'static str, u64>, shape: &'static str) {
    *counts.entry(shape).or_default() += 1;
}

#[test]
fn a_torn_tail_of_any_shape_is_cut_and_the_store_opens() {
    let started = Instant::now();
    let subject = subject();
    let (mut shapes, mut kept) = (BTreeMap::new(), BTreeMap::<u64, u64>::new());
    // Of each segment, where what nobody was told of begins.
    let mut tails: BTreeMap<PathBuf, u64> = BTreeMap::new();
    for path in segments(&subject.sim) {
        let told = subject.frames.iter().filter(|frame| frame.path == path && frame.seq() <= subject.acknowledged);
        let end = told.map(Placed::end).max().unwrap_or(4096);
        if end < subject.sim.read_file(&path).len() as u64 {
            tails.insert(path, end);
        }
    }
    assert!(tails.len() >= 3 && tails.values().any(|&end| end == 4096), "{tails:?}");
    for seed in seeds(4000) {
        let mut dice = Dice(seed);
        let disk = subject.sim.clone_disk();
        for (path, &start) in &tails {
            let len = disk.read_file(path).len() as u64;
            match dice.below(8) {
                0 => tally(&mut shapes, "whole"),
                1 => {
                    disk.truncate_file(path, dice.within(start, len + 1));
                    tally(&mut shapes, "cut short");
                }
                2 if start == 4096 => {
                    // The segment's making was cut off: its header may be anything, and nothing follows.
                    disk.truncate_file(path, dice.below(4097));
                    let len = disk.read_file(path).len() as u64;
                    spoil(&disk, &mut dice, path, 0, len);
                    tally(&mut shapes, "a segment half made");
                }
                3 if start == 4096 => {
                    disk.remove_file(path);
                    tally(&mut shapes, "no segment");
                }
                _ => {
                    for _ in 0..dice.within(1, 4) {
                        let shape = spoil(&disk, &mut dice, path, start, len);
                        tally(&mut shapes, shape);
                    }
                }
            }
            // The payload of a large commit was synced before its frame was written: where the frame is there, so is
            // the payload.
            let large = |frame: &&Placed| frame.path == *path && frame.at >= start && frame.prelude.payload_synced();
            for large in subject.frames.iter().filter(large) {
                // Nor was the payload there before the segment's header.
                if !disk.has_file(path) || disk.read_file(path).len() <= 4096 {
                    continue;
                }
                let (whole, mut torn) = (subject.sim.read_file(path), disk.read_file(path));
                let (at, payload, end) = (large.at as usize, large.payload() as usize, large.end() as usize);
                if torn.len() < end || torn[..payload] == whole[..payload] || dice.below(2) == 0 {
                    torn.resize(torn.len().max(end), 0);
                    torn[payload..end].copy_from_slice(&whole[payload..end]);
                    tally(&mut shapes, "(a large payload kept)");
                } else {
                    torn[at..payload].fill(0);
                    tally(&mut shapes, "(a large frame not begun)");
                }
                disk.write_file(path, &torn);
            }
        }
        let wrong = |what: String| format!("ALIGHT_TORN_SEED: state {seed:#x}: {what}");
        let store = options(&disk).open(PATH).unwrap_or_else(|error| panic!("{}", wrong(error.to_string())));
        let last = store.stat().unwrap().last_commit;
        assert!((subject.acknowledged..=38).contains(&last), "{}", wrong(format!("commit {last}")));
        let found = contents(&store).unwrap_or_else(|error| panic!("{}", wrong(error.to_string())));
        assert!(found == subject.histories[last as usize], "{}", wrong(format!("not what commit {last} left")));
        *kept.entry(last - subject.acknowledged).or_default() += 1;
        if seed % 8 == 0 {
            store.put("after", b"the tear").unwrap();
            store.abandon();
            let store = options(&disk).open(PATH).unwrap_or_else(|error| panic!("{}", wrong(error.to_string())));
            assert_eq!(store.stat().unwrap().last_commit, last + 1);
            let report = store.verify(|_| {}).unwrap();
            assert!(report.is_sound(), "{}", wrong(format!("{:?}", report.damages)));
            store.close().unwrap();
        } else {
            store.abandon();
        }
    }
    println!("torn tails, {:.1} s: {shapes:?}", started.elapsed().as_secs_f64());
    println!("commits that nobody was told of and that were there all the same: {kept:?}");
    assert!(kept.len() > 3);
}

#[test]
fn damage_of_any_shape_to_what_a_sync_had_covered_refuses_the_open_and_changes_nothing() {
    let started = Instant::now();
    let subject = subject();
    let mut refused = BTreeMap::new();
    let (mut untold, mut unhurt) = (0, 0);
    // Those that recovery reads, and whose place it must find.
    let targets: Vec<&Placed> = subject
        .frames
        .iter()
        .filter(|frame| (subject.covered + 1..=subject.acknowledged).contains(&frame.seq()))
        .collect();
    for seed in seeds(4000) {
        let mut dice = Dice(seed);
        let disk = subject.sim.clone_disk();
        let target = targets[dice.below(targets.len() as u64) as usize];
        let path = &target.path;
        let shape = match dice.below(12) {
            0 => {
                disk.truncate_file(path, dice.within(4096, target.end()));
                "cut short"
            }
            1 => {
                disk.remove_file(path);
                "the segment is gone"
            }
            2 if subject.earlier.has_file(path) => {
                disk.write_file(path, &subject.earlier.read_file(path));
                "the segment as it was earlier"
            }
            3 => {
                let other = targets[dice.below(targets.len() as u64) as usize];
                let (one, two) = (disk.read_file(path), disk.read_file(&other.path));
                disk.write_file(path, &two);
                disk.write_file(&other.path, &one);
                "two segments in each other's place"
            }
            4 => {
                let other = targets[dice.below(targets.len() as u64) as usize];
                let mut bytes = disk.read_file(path);
                let frame = disk.read_file(&other.path)[other.at as usize..other.payload() as usize].to_vec();
                bytes[target.at as usize..target.at as usize + frame.len()].copy_from_slice(&frame);
                disk.write_file(path, &bytes);
                "another commit's frame in its place"
            }
            5 => spoil(&disk, &mut dice, path, 0, target.end()),
            _ => spoil(&disk, &mut dice, path, target.at, target.payload()),
        };
        let left = frames(&disk);
        if subject.frames.iter().all(|frame| left.iter().any(|left| (&left.path, left.at) == (&frame.path, frame.at)))
            && segments(&disk).iter().all(|path| own_header(path, &disk.read_file(path)).is_some())
        {
            // Zeros over zeros, a segment in its own place, a payload that recovery does not read.
            unhurt += 1;
            continue;
        }
        // What the surviving frames say was durable, and is there no more.
        let through = left.iter().map(|frame| frame.prelude.synced_through.get()).max().unwrap_or_default();
        let missing = (subject.covered + 1..=through).find(|&seq| !left.iter().any(|frame| frame.seq() == seq));
        let headless = segments(&disk).into_iter().find(|path| own_header(path, &disk.read_file(path)).is_none());
        if missing.is_none() && headless.is_none() {
            untold += 1;
            continue;
        }
        let before = everything(&disk);
        let wrong = |what: String| format!("ALIGHT_TORN_SEED: state {seed:#x}, {shape}, {target:?}: {what}");
        match options(&disk).open(PATH) {
            Err(Error::Damaged(_)) => tally(&mut refused, shape),
            Err(error) => panic!("{}", wrong(format!("refused, and not as damage: {error}"))),
            Ok(_) => panic!("{}", wrong(format!("opened, without commit {missing:?} of {through}, {headless:?}"))),
        }
        assert!(everything(&disk) == before, "{}", wrong("a refused open changed a file".into()));
        // Looking is no more than looking.
        match tiny(&disk).read_only(true).open(PATH) {
            Err(Error::Damaged(_)) => {}
            other => panic!("{}", wrong(format!("opened for reading: {other:?}"))),
        }
    }
    println!("damage that was refused, {:.1} s: {refused:?}", started.elapsed().as_secs_f64());
    println!("{unhurt} times nothing was hurt, {untold} times no surviving commit could testify");
    assert!(refused.len() >= 12 && refused.values().sum::<u64>() >= number("ALIGHT_TORN", 4000) / 2);
}

/// Recovery does not read what a sync had covered: a spoilt value opens, and is refused when it is read.
#[test]
fn damage_of_any_shape_to_a_value_is_refused_when_it_is_read() {
    let started = Instant::now();
    let subject = subject();
    let (mut refused, mut untouched) = (0, 0);
    let payloads: Vec<&Placed> = subject
        .frames
        .iter()
        .filter(|frame| frame.seq() <= subject.acknowledged && frame.prelude.payload_len > 0)
        .collect();
    for seed in seeds(2000) {
        let mut dice = Dice(seed);
        let disk = subject.sim.clone_disk();
        let target = payloads[dice.below(payloads.len() as u64) as usize];
        let shape = spoil(&disk, &mut dice, &target.path, target.payload(), target.end());
        let wrong = |what: String| format!("ALIGHT_TORN_SEED: state {seed:#x}, {shape}, {target:?}: {what}");
        let before = everything(&disk);
        let store = options(&disk).open(PATH).unwrap_or_else(|error| panic!("{}", wrong(error.to_string())));
        assert!(everything(&disk) == before, "{}", wrong("the open changed a file".into()));
        for (key, value) in &subject.histories[38] {
            match store.get(key, &Device::host()) {
                Ok(found) if found.as_host().unwrap() == value => untouched += 1,
                Err(Error::Damaged(damage)) => {
                    assert_eq!(damage.path, target.path, "{}", wrong("another file is named".into()));
                    assert!(
                        damage.key.is_some_and(|named| named.0 == *key),
                        "{}",
                        wrong("another key is named".into())
                    );
                    refused += 1;
                }
                other => panic!("{}", wrong(format!("{other:?}"))),
            }
        }
        store.abandon();
    }
    println!("spoilt values, {:.1} s: {refused} refused, {untouched} others right", started.elapsed().as_secs_f64());
    assert!(refused > 500);
}
