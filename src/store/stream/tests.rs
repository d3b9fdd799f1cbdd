//! What a stream hands out, in which order, what of the device it takes meanwhile, and what becomes of it when something goes
//! wrong: on the host and a simulated GPU, over a disk in memory.

use std::time::Duration;

use super::*;
use crate::config::READ_THREADS_MAX;
use crate::device::simulated::Simulated;
use crate::io::fixtures::StuckStorage;
use crate::io::lanes::lanes_for;
use crate::storage::Storage;
use crate::storage::sim::{Fault, FaultKind, OpKind};
use crate::store::fixtures::{self, disk, value};
use crate::{CompactOptions, Store, StoreOptions};

fn options(disk: impl Storage + 'static) -> StoreOptions {
    fixtures::options(disk).segment_bytes(1 << 20)
}

/// Values of these lengths, some in one commit.
fn filled(disk: impl Storage + 'static, lens: &[usize]) -> Store {
    let store = options(disk).open("/s").unwrap();
    let values: Vec<Vec<u8>> = lens.iter().enumerate().map(|(n, &len)| value(n, len)).collect();
    for (at, chunk) in values.chunks(7).enumerate() {
        let mut batch = store.batch();
        chunk.iter().enumerate().for_each(|(n, value)| batch.put(format!("{}", at * 7 + n), value).unwrap());
        batch.commit().unwrap();
    }
    store
}

fn names(order: impl IntoIterator<Item = usize>) -> Vec<String> {
    order.into_iter().map(|n| n.to_string()).collect()
}

const LENS: [usize; 11] = [10_000, 0, 1, 300, 65_536, 40_000, 150_000, 4096, 4097, 255, 30_001];

fn lens(count: usize) -> Vec<usize> {
    (0..count).map(|n| LENS[n * 7 % LENS.len()]).collect()
}

#[test]
fn every_key_is_answered_once_in_its_place_whatever_the_lookahead() {
    let lens = lens(90);
    let store = filled(disk(), &lens);
    let gpu = Simulated::new().handle();
    let in_order: Vec<usize> = (0..90).collect();
    let scattered: Vec<usize> = (0..200).map(|n| n * n * 13 % 100).collect();
    for device in [Device::host(), gpu] {
        for lookahead in [0, 1, 20_000, 100_000, 1 << 20, 1 << 30] {
            for order in [&in_order, &scattered] {
                let mut stream = store.stream(names(order.iter().copied()), &device).lookahead(lookahead);
                for &n in order {
                    match stream.next().unwrap() {
                        Ok(tensor) => {
                            let right = tensor.device() == &device && tensor.to_host().unwrap() == value(n, lens[n]);
                            assert!(n < 90 && right, "{n} with {lookahead} on {device}");
                        }
                        Err(Error::NotFound(key)) => assert!(n >= 90 && key.to_string() == format!("\"{n}\"")),
                        Err(error) => panic!("{error}"),
                    }
                    assert!(stream.size_hint().1.unwrap() < order.len());
                }
                assert!(stream.next().is_none() && stream.next().is_none());
                assert_eq!(stream.size_hint(), (0, Some(0)));
            }
        }
        let bad = [&b""[..], b"3", &[b'k'; 2000]];
        let answers: Vec<_> = store.stream(bad, &device).collect();
        assert!(matches!(&answers[..], [Err(Error::InvalidKey { .. }), Ok(_), Err(Error::InvalidKey { .. })]));
        assert!(store.stream(Vec::<String>::new(), &device).next().is_none());
    }
}

#[test]
fn keys_of_nothing_are_not_gathered_without_end() {
    let store = filled(disk(), &[10]);
    let looked_up = std::cell::Cell::new(0usize);
    let keys = (0..1_000_000).inspect(|_| looked_up.set(looked_up.get() + 1)).map(|n| format!("none{n}"));
    let mut stream = store.stream(keys, &Device::host());
    for _ in 0..10 {
        assert!(matches!(stream.next(), Some(Err(Error::NotFound(_)))));
    }
    assert!(looked_up.get() <= (STREAM_WINDOWS + 1) * (STREAM_KEYS_MAX + 1), "{}", looked_up.get());
}

#[test]
fn neighbours_are_read_together_and_everything_once() {
    let store = filled(disk(), &[16_384; 140]);
    let before = store.metrics();
    let tensors = store.stream(names(0..140), &Device::host()).lookahead(2 << 20);
    assert_eq!(tensors.map(|tensor| tensor.unwrap().len_bytes()).sum::<u64>(), 140 * 16_384);
    let metrics = store.metrics();
    let read = metrics.bytes_direct + metrics.bytes_buffered - before.bytes_direct - before.bytes_buffered;
    assert_eq!((read, metrics.gets - before.gets), (140 * 16_384, 140));
    let reads: u64 = metrics.reads.iter().map(|times| times.count).sum();
    assert_eq!(reads, 5, "windows of half a mebibyte: thirty-two, or thirty-one with frames between");
}

/// Has a GPU load the kernels, which take some memory for good.
fn take_checksums(gpu: &Simulated) {
    let buffer = gpu.handle().allocate(1).unwrap();
    buffer.crc32(std::slice::from_ref(&(0..1))).unwrap();
}

#[test]
fn what_is_read_ahead_takes_no_more_than_the_lookahead() {
    let lens = lens(120);
    let longest = 150_000;
    let store = filled(disk(), &lens);
    let gpu = Simulated::new();
    store.get_many(["0"], &gpu.handle()).unwrap();
    take_checksums(&gpu);
    let base = gpu.allocated_bytes();
    for lookahead in [0, 200_000, 1 << 20, 4 << 20] {
        gpu.take_peak_bytes();
        for (n, tensor) in store.stream(names(0..120), &gpu.handle()).lookahead(lookahead).enumerate() {
            tensor.unwrap();
            // It does read ahead, without being asked again.
            while n == 0 && lookahead >= 1 << 20 && gpu.allocated_bytes() - base <= lookahead / 2 {
                std::thread::yield_now();
            }
        }
        let peak = gpu.take_peak_bytes() - base;
        assert!(peak <= lookahead.max(longest + 4096), "{peak} of {lookahead}");
        // Who keeps every tensor has them, and no more than the lookahead besides.
        let mut held = Vec::new();
        for tensor in store.stream(names(0..120), &gpu.handle()).lookahead(lookahead) {
            held.push(tensor.unwrap());
            let mut arenas: Vec<_> = held.iter().map(|tensor| tensor.buffer()).collect();
            arenas.dedup_by(|one, next| Arc::ptr_eq(one, next));
            let kept: u64 = arenas.iter().map(|arena| arena.len_bytes()).sum();
            let taken = gpu.allocated_bytes() - base;
            assert!(taken <= kept + lookahead.max(longest + 4096), "{taken} with {kept} held");
        }
        // Who keeps one keeps its window.
        held.truncate(1);
        let window = gpu.allocated_bytes() - base;
        assert!(window <= (lookahead / 4).max(longest + 4096), "{window} of {lookahead}");
        drop(held);
        assert_eq!(gpu.allocated_bytes(), base);
    }
}

#[test]
fn a_stream_is_of_one_moment() {
    let lens = [20_000; 60];
    let store = filled(disk(), &lens);
    let snapshot = store.snapshot();
    let mut streams = [store.stream(names(0..60), &Device::host()), snapshot.stream(names(0..60), &Device::host())]
        .map(|stream| stream.lookahead(200_000));
    drop(snapshot);
    let mut answered = 0;
    let mut check = |count: usize| {
        for n in answered..answered + count {
            for stream in &mut streams {
                assert!(stream.next().unwrap().unwrap().as_host() == Some(&value(n, 20_000)[..]), "{n}");
            }
        }
        answered += count;
    };
    check(3);
    for n in 0..60 {
        if n % 2 == 0 {
            store.delete(format!("{n}")).unwrap();
        } else {
            store.put(format!("{n}"), &value(n + 100, 20_000)).unwrap();
        }
    }
    check(20);
    store.compact(&CompactOptions::default(), |_| {}).unwrap();
    check(37);
    drop(streams);
    assert!(store.get("1", &Device::host()).unwrap().as_host() == Some(&value(101, 20_000)[..]));
}

#[test]
fn whichever_read_fails_the_tensor_says_so_in_its_place_and_the_rest_come() {
    let gpu = Simulated::new().handle();
    for device in [Device::host(), gpu] {
        for nth in 0..12 {
            let sim = disk();
            let store = filled(sim.clone(), &[30_000; 40]);
            // A window's read fails, and then the read of one of its tensors.
            for faults in 1..3 {
                sim.clear_faults();
                let before = sim.faults_struck();
                let faulty = (0..faults).map(|fault| Fault::new(FaultKind::Eio, nth + fault).on(OpKind::Read));
                faulty.for_each(|fault| sim.inject(fault));
                let mut failed = 0;
                let stream = store.stream(names(0..40), &device).lookahead(600_000);
                for (n, tensor) in stream.enumerate() {
                    match tensor {
                        Ok(tensor) => assert!(tensor.to_host().unwrap() == value(n, 30_000), "{n}"),
                        Err(Error::Io { .. }) => failed += 1,
                        Err(error) => panic!("{error}"),
                    }
                }
                assert!(failed < sim.faults_struck() - before || sim.faults_struck() == before, "{failed} of {faults}");
            }
            // A disk that is gone is the failure of every one, each in its place.
            sim.clear_faults();
            sim.inject(Fault::new(FaultKind::Eio, 0).on(OpKind::Read).from_then_on());
            let answers: Vec<_> = store.stream(names(0..40), &device).collect();
            assert!(answers.len() == 40 && answers.iter().all(|answer| matches!(answer, Err(Error::Io { .. }))));
        }
    }
}

#[test]
fn whichever_call_of_the_driver_fails_tensors_are_right_or_say_so() {
    for loses_gpu in [false, true] {
        for failing in (0..120).step_by(17) {
            let gpu = Simulated::new();
            let store = filled(disk(), &[30_000; 40]);
            store.get("0", &gpu.handle()).unwrap();
            gpu.fail_after(failing, 700, loses_gpu);
            let mut answered = 0;
            for (n, tensor) in store.stream(names(0..40), &gpu.handle()).lookahead(400_000).enumerate() {
                if let Ok(bytes) = tensor.and_then(|tensor| tensor.to_host()) {
                    assert!(bytes == value(n, 30_000), "{n}, call {failing}");
                }
                answered += 1;
            }
            assert_eq!(answered, 40);
        }
    }
}

#[test]
fn a_damaged_value_is_an_error_in_its_place_and_its_neighbours_come() {
    let sim = disk();
    let store = filled(sim.clone(), &[30_000; 28]);
    let files: Vec<_> = sim.files().into_iter().filter(|path| path.starts_with("/s/segments")).collect();
    let place = files.iter().find_map(|path| {
        let (bytes, whole) = (sim.read_file(path), value(9, 30_000));
        let at = (0..bytes.len().saturating_sub(30_000)).step_by(4096).find(|&at| bytes[at..at + 30_000] == whole)?;
        Some((path, at as u64 + 12_345))
    });
    let (path, at) = place.unwrap();
    sim.flip_bit(path, at, 5);
    for device in [Device::host(), Simulated::new().handle()] {
        for (n, tensor) in store.stream(names(0..28), &device).enumerate() {
            match tensor {
                Ok(tensor) => assert!(n != 9 && tensor.to_host().unwrap() == value(n, 30_000)),
                Err(error) => assert!(n == 9 && error.is_damage() && error.to_string().contains("\"9\""), "{error}"),
            }
        }
    }
}

#[test]
fn a_stream_that_is_dropped_reads_nothing_more_and_leaves_nothing() {
    let disk = StuckStorage::new(disk());
    let store = filled(disk.clone(), &[30_000; 100]);
    let gpu = Simulated::new();
    store.get("0", &gpu.handle()).unwrap();
    take_checksums(&gpu);
    let base = gpu.allocated_bytes();
    for take in [1, 7] {
        let mut stream = store.stream(names(0..100), &gpu.handle()).lookahead(1 << 20);
        for _ in 0..take {
            stream.next().unwrap().unwrap();
        }
        while gpu.allocated_bytes() < base + (3 << 18) {
            std::thread::yield_now();
        }
        drop(stream);
        while gpu.allocated_bytes() > base {
            std::thread::yield_now();
        }
    }
    // With a read that hangs: nobody waits for it, and nothing is read after it.
    disk.gate.close();
    let mut stream = store.stream(names(0..100), &gpu.handle()).lookahead(16 << 20);
    stream.read_ahead();
    disk.gate.wait_for(1);
    let calls = disk.disk.calls_made();
    drop(stream);
    disk.gate.open();
    while gpu.allocated_bytes() > base {
        std::thread::yield_now();
    }
    let (read, lanes) = (disk.disk.calls_made() - calls, lanes_for(READ_THREADS_MAX) as u64);
    // Each asks first whether the page cache has it.
    assert!(read <= 2 * lanes, "{read} calls by {lanes} threads");
    // A writer is closed with the last handle, whatever the stream's thread still does.
    drop(store);
    let store = options(disk).open("/s").unwrap();
    assert!(store.get("99", &gpu.handle()).unwrap().to_host().unwrap() == value(99, 30_000));
}

#[test]
fn a_read_that_gets_stuck_ends_the_stream_with_a_timeout() {
    let disk = StuckStorage::new(disk());
    let options = options(disk.clone()).segment_bytes(64 << 20).deadline(Some(Duration::from_millis(100)));
    let store = options.open("/s").unwrap();
    for n in 0..4 {
        store.put(format!("{n}"), &value(n, 5 << 20)).unwrap();
    }
    let mut stream = store.stream(names(0..4), &Device::host()).lookahead(5 << 20);
    assert!(stream.next().unwrap().unwrap().as_host() == Some(&value(0, 5 << 20)[..]));
    disk.gate.close();
    // One may have been read already.
    let mut answers: Vec<_> = stream.by_ref().collect();
    assert!(matches!(answers.pop(), Some(Err(Error::Timeout { operation: "read", .. }))));
    assert!(answers.len() < 3 && answers.iter().all(Result::is_ok) && stream.next().is_none());
    disk.gate.open();
}

#[test]
fn a_store_that_is_closed_ends_its_streams() {
    let store = filled(disk(), &[30_000; 40]);
    let mut stream = store.stream(names(0..40), &Device::host()).lookahead(100_000);
    stream.next().unwrap().unwrap();
    store.close().unwrap();
    assert!(matches!(stream.next(), Some(Err(Error::Closed))));
    assert!(stream.next().is_none());
}
