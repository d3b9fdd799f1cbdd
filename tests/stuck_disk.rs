//! A disk that really does not come back: what `tests/deadlines` has a simulated one do, on the kernel's own paths. The kernel
//! holds back the reads and the writes of this process; every call is told in time, nothing acknowledged is lost, and all goes on
//! once they are let go.
//!
//! `scripts/stuck.sh` makes such a disk and runs this. Without one it is skipped. What holds the disk up are two commands:
//! `ALIGHT_STUCK_BEGIN` and `ALIGHT_STUCK_END`; the store is made in `ALIGHT_STUCK_FOLDER`.

mod common;

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use alight::{Device, Error, Store};
use common::bytes;

const DEADLINE: Duration = Duration::from_secs(2);

/// A deadline may pass twice in a call that looks something up and then reads it, and a watcher looks eight times in one.
const LATEST: Duration = Duration::from_secs(6);

/// So many that the index is written out, and most of it is not in memory after an opening.
const SMALL: u64 = 300_000;

struct Disk {
    folder: PathBuf,
    begin: String,
    end: String,
}

impl Disk {
    fn given() -> Option<Self> {
        let given = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
        Some(Self {
            folder: given("ALIGHT_STUCK_FOLDER")?.into(),
            begin: given("ALIGHT_STUCK_BEGIN")?,
            end: given("ALIGHT_STUCK_END")?,
        })
    }

    fn gets_stuck(&self) {
        run(&self.begin);
    }

    fn goes_on(&self) {
        run(&self.end);
    }
}

fn run(command: &str) {
    let status = Command::new("bash").args(["-c", command]).status().unwrap();
    assert!(status.success(), "{command}");
}

fn small(n: u64) -> [u8; 40] {
    bytes(n, 40).try_into().unwrap()
}

fn large(n: u64) -> Vec<u8> {
    bytes(n, n as usize * 1_000_003)
}

fn fill(path: &Path) {
    let store = Store::create(path).unwrap();
    let values: Vec<[u8; 40]> = (0..SMALL).map(small).collect();
    for (numbers, values) in (0..SMALL).collect::<Vec<_>>().chunks(5000).zip(values.chunks(5000)) {
        let mut batch = store.batch();
        for (n, value) in numbers.iter().zip(values) {
            batch.put(format!("small/{n:06}"), value).unwrap();
        }
        batch.commit().unwrap();
    }
    for n in 1..10 {
        store.put(format!("large/{n}"), &large(n)).unwrap();
    }
    store.close().unwrap();
}

/// A call of a store, and whether it answered right.
type Call<'a> = (&'a str, &'a dyn Fn(&Store) -> Result<bool, Error>);

fn into(store: &Store, n: u64) -> Result<bool, Error> {
    let expected = large(n);
    let mut destination = vec![0; expected.len()];
    store.get_into(format!("large/{n}"), &mut destination)?;
    Ok(destination == expected)
}

fn get(store: &Store, key: &str, expected: &[u8]) -> Result<bool, Error> {
    Ok(store.get(key, &Device::host())?.as_host() == Some(expected))
}

const CALLS: [Call<'_>; 9] = [
    ("get of 1 MB", &|store| get(store, "large/1", &large(1))),
    ("get of 9 MB", &|store| get(store, "large/9", &large(9))),
    ("get of 40 bytes", &|store| get(store, "small/012345", &small(12_345))),
    ("get_many", &|store| {
        let tensors = store.get_many(["small/000001", "small/299999", "large/2"], &Device::host())?;
        Ok(tensors[1].as_host() == Some(&small(299_999)[..]) && tensors[2].as_host() == Some(&large(2)[..]))
    }),
    ("get_into of 1 MB", &|store| into(store, 1)),
    ("get_into of 8 MB", &|store| into(store, 8)),
    ("get_range", &|store| {
        let range = store.get_range("large/7", 5_000_000..5_000_100, &Device::host())?;
        Ok(range.as_host() == Some(&large(7)[5_000_000..5_000_100]))
    }),
    ("contains", &|store| Ok(store.contains("small/222222")? && !store.contains("none")?)),
    ("scan", &|store| Ok(store.scan("small/1").collect::<Result<Vec<_>, _>>()?.len() == 100_000)),
];

#[test]
fn a_real_disk_that_does_not_come_back_is_told_of_in_time_and_nothing_is_lost() {
    let Some(disk) = Disk::given() else {
        eprintln!("SKIPPED: no disk that can be held up: run scripts/stuck.sh, as root");
        return;
    };
    let path = disk.folder.join("store");
    fill(&path);
    let open = || Store::options().deadline(Some(DEADLINE)).write_deadline(Some(DEADLINE));

    for (name, call) in CALLS {
        // Nothing of the store is in the page cache but what an opening reads, and the files of two reads.
        std::fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
        let store = open().read_only(true).open(&path).unwrap();
        store.get("large/3", &Device::host()).unwrap();
        disk.gets_stuck();
        let began = Instant::now();
        let outcome = call(&store);
        let took = began.elapsed();
        disk.goes_on();
        println!("{name}: {:.2} s, {outcome:?}", took.as_secs_f64());
        match outcome {
            Err(Error::Timeout { .. }) => assert!((DEADLINE..LATEST).contains(&took), "{name}: {took:?}"),
            other => panic!("{name}: {other:?}"),
        }
        assert!(call(&store).unwrap(), "{name}, afterwards");
    }

    let store = open().open(&path).unwrap();
    store.put("before", b"acknowledged").unwrap();
    disk.gets_stuck();
    let began = Instant::now();
    let put = store.put("stuck", &large(1));
    let took = began.elapsed();
    println!("put: {:.2} s, {put:?}", took.as_secs_f64());
    assert!(matches!(put, Err(Error::Timeout { .. })) && (DEADLINE..LATEST).contains(&took), "{took:?}");
    let closed = store.close();
    println!("close: {closed:?}");
    disk.goes_on();
    // The lock is kept until what was stuck has ended.
    let began = Instant::now();
    let store = loop {
        match open().open(&path) {
            Err(Error::Locked { .. }) if began.elapsed() < Duration::from_secs(60) => {
                thread::sleep(Duration::from_millis(10));
            }
            opened => break opened.unwrap(),
        }
    };
    assert!(get(&store, "before", b"acknowledged").unwrap());
    for (name, call) in CALLS {
        assert!(call(&store).unwrap(), "{name}");
    }
    let found = store.contains("stuck").unwrap();
    assert!(!found || get(&store, "stuck", &large(1)).unwrap(), "whole or not at all");
    store.put("stuck", b"again").unwrap();
    assert!(store.verify(|_| {}).unwrap().is_sound());
}
