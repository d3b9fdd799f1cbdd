//! What happens when the driver fails, shown on a simulated GPU: errors, never wrong bytes, never a wait without end.

use std::mem;
use std::thread;

use super::*;
use crate::device::cuda::simulated::MEMORY_BYTES;
use crate::device::staging::Staging;
use crate::device::transfer::{Download, Upload};
use crate::error::{Error, Result};

const SLOT: usize = 4096;
const LOST: u32 = 700;
const INVALID_VALUE: u32 = 1;

/// Sixteen slots' worth of bytes to the device and back, through a ring of three.
fn round_trip(device: &Device, ring: &Staging, bytes: &[u8]) -> Result<Vec<u8>> {
    let mut buffer = device.allocate(bytes.len() as u64)?;
    let upload = Upload::new(&mut buffer)?;
    thread::scope(|scope| {
        let halves = bytes.split_at(bytes.len() / 2);
        let part = |start: usize, half: &[u8]| {
            for (index, piece) in half.chunks(SLOT).enumerate() {
                let mut slot = ring.acquire()?;
                slot[..piece.len()].copy_from_slice(piece);
                upload.copy(slot, 0..piece.len(), (start + index * SLOT) as u64)?;
            }
            Ok(())
        };
        let second = scope.spawn(move || part(halves.0.len(), halves.1));
        part(0, halves.0).and(second.join().expect("no panic"))
    })?;
    upload.finish()?;
    buffer.copy_from_host(0, &bytes[..10])?;
    let download = Download::new(&buffer)?;
    let mut copy = Vec::new();
    let mut ahead = None;
    for start in (0..bytes.len()).step_by(SLOT) {
        let next = download.start(ring.acquire()?, start as u64, SLOT)?;
        if let Some(pending) = ahead.replace(next) {
            copy.extend_from_slice(&pending.wait()?);
        }
    }
    if let Some(pending) = ahead {
        copy.extend_from_slice(&pending.wait()?);
    }
    buffer.copy_to_host(0, &mut copy[..10])?;
    Ok(copy)
}

#[test]
fn any_call_that_fails_is_an_error_and_never_wrong_bytes() {
    let bytes = Random::new(11).bytes(16 * SLOT);
    for loses_gpu in [false, true] {
        let mut failures = 0;
        for failing in 0.. {
            let gpu = Simulated::new();
            let device = gpu.handle();
            let ring = Staging::new(&device, 3, SLOT).unwrap();
            gpu.fail_after(failing, if loses_gpu { LOST } else { INVALID_VALUE }, loses_gpu);
            let calls = gpu.calls();
            match round_trip(&device, &ring, &bytes) {
                Ok(copy) => assert!(copy == bytes, "call {failing}, lost: {loses_gpu}"),
                Err(error) => {
                    assert!(matches!(error, Error::Device { .. }), "call {failing}: {error}");
                    failures += 1;
                }
            }
            if gpu.calls() - calls <= failing {
                assert!(failing > 100, "the whole of it was tried");
                break;
            }
            gpu.fail_no_more();
            // The ring has lost no slot, or says that it is lost. It never makes anyone wait for what will not come.
            let held: Result<Vec<_>> = (0..3).map(|_| ring.acquire()).collect();
            match held {
                Ok(slots) => drop(slots),
                Err(error) => assert!(error.to_string().contains("simulated driver says no"), "{error}"),
            }
            assert_eq!(Simulated::contexts(), [], "call {failing}: the thread's context is its own again");
        }
        assert!(failures > 80, "only {failures} calls were seen to fail");
    }
}

#[test]
fn a_failed_ring_wakes_who_waits() {
    let gpu = Simulated::new();
    let device = gpu.handle();
    let ring = Staging::new(&device, 1, SLOT).unwrap();
    let mut buffer = device.allocate(SLOT as u64).unwrap();
    let upload = Upload::new(&mut buffer).unwrap();
    let slot = ring.acquire().unwrap();
    thread::scope(|scope| {
        let waiters: Vec<_> = (0..3).map(|_| scope.spawn(|| ring.acquire().map(drop))).collect();
        gpu.fail_after(0, LOST, true);
        assert!(upload.copy(slot, 0..SLOT, 0).is_err());
        for waiter in waiters {
            let error = waiter.join().unwrap().unwrap_err().to_string();
            assert!(error.contains("restart the process"), "{error}");
        }
    });
    assert!(upload.finish().is_err());
    assert!(ring.try_acquire().is_err());
}

#[test]
fn nothing_is_left_behind() {
    let gpu = Simulated::new();
    let device = gpu.handle();
    let bytes = Random::new(12).bytes(16 * SLOT);
    let ring = Staging::new(&device, 3, SLOT).unwrap();
    assert_eq!(gpu.pinned_bytes(), 3 * SLOT);
    for _ in 0..10 {
        assert!(round_trip(&device, &ring, &bytes).unwrap() == bytes);
    }
    assert_eq!((gpu.allocated_bytes(), gpu.copies_in_flight()), (0, 0));
    assert!(gpu.streams() <= 2, "{} streams for one transfer at a time", gpu.streams());

    // The ring goes while a copy from it is in flight and nobody will wait: its memory is waited for, then unpinned.
    let mut buffer = device.allocate(SLOT as u64).unwrap();
    let upload = Upload::new(&mut buffer).unwrap();
    upload.copy(ring.acquire().unwrap(), 0..SLOT, 0).unwrap();
    assert_eq!(gpu.copies_in_flight(), 1);
    mem::forget(upload);
    drop(ring);
    assert_eq!((gpu.pinned_bytes(), gpu.copies_in_flight()), (0, 0));
}

#[test]
fn more_memory_than_there_is_says_how_much_is_free() {
    let device = Simulated::new().handle();
    let _held = device.allocate(1 << 20).unwrap();
    let memory = device.memory_bytes().unwrap().unwrap();
    assert_eq!((memory.free, memory.total), (MEMORY_BYTES - (1 << 20), MEMORY_BYTES));
    for needed in [MEMORY_BYTES, u64::MAX] {
        let error = device.allocate(needed).unwrap_err();
        assert!(
            matches!(error, Error::DeviceMemory { needed: n, free, .. } if n == needed && free == memory.free),
            "{error}"
        );
    }
}

#[test]
fn a_callers_own_context_is_left_as_it_was() {
    let (theirs, ours) = (Simulated::new(), Simulated::new());
    thread::scope(|scope| {
        scope.spawn(|| {
            theirs.make_current();
            let before = Simulated::contexts();
            let device = ours.handle();
            let ring = Staging::new(&device, 3, SLOT).unwrap();
            let bytes = Random::new(13).bytes(16 * SLOT);
            assert!(round_trip(&device, &ring, &bytes).unwrap() == bytes);
            drop(ring);
            assert_eq!(Simulated::contexts(), before);
        });
    });
}

#[test]
fn devices_are_told_apart() {
    let (a, b) = (Simulated::new(), Simulated::new());
    assert_eq!(a.handle(), a.handle());
    assert_ne!(a.handle(), b.handle());
    assert_ne!(a.handle(), Device::host());
    let ordinal = a.handle().ordinal().unwrap();
    assert_eq!(a.handle().to_string(), format!("cuda:{ordinal}"));
    assert_eq!((a.handle().name(), a.handle().is_host()), ("Simulated GPU", false));
}

#[test]
fn a_copy_on_the_device_that_fails_is_an_error_and_frees_nothing_in_use() {
    for loses_gpu in [false, true] {
        for failing in 0..12 {
            let gpu = Simulated::new();
            let device = gpu.handle();
            let (mut source, mut target) = (device.allocate(5000).unwrap(), device.allocate(5000).unwrap());
            source.copy_from_host(0, &[3; 5000]).unwrap();
            gpu.fail_after(failing, if loses_gpu { LOST } else { INVALID_VALUE }, loses_gpu);
            let outcome = target.copy_from(1, &[(&source, 0..2000), (&source, 7..1007)]);
            // The simulation ends the process where memory goes under a copy.
            drop(source);
            if outcome.is_ok() && !loses_gpu {
                gpu.fail_no_more();
                assert_eq!(contents(&target)[1..3001], [3; 3000]);
            }
        }
    }
}
