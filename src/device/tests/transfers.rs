//! What transfers promise, on every backend.

use std::collections::VecDeque;
use std::mem;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use alight_format::Dtype;
use parking_lot::Mutex;

use super::*;
use crate::device::staging::{SLOT_BYTES, SLOTS, Slot, Staging};
use crate::device::transfer::{Download, Upload, Waiting, download_into};
use crate::error::Error;
use crate::tensor::{Source, Tensor, TensorRef};

const SLOT: usize = 8192;

/// How many slots a ring gives before it would make the caller wait. Busy ones are waited for.
fn slots_left(ring: &Staging) -> usize {
    let mut held = Vec::new();
    // Asking moves a simulated GPU on, and a real one needs no asking.
    for _ in 0..10_000 {
        match ring.try_acquire().unwrap() {
            Some(slot) => held.push(slot),
            None if held.len() == ring.slots() => break,
            None => thread::sleep(Duration::from_micros(10)),
        }
    }
    held.len()
}

#[test]
fn blocking_copies_at_any_offset_match_an_oracle() {
    for device in backends() {
        let mut random = Random::new(1);
        let mut oracle = random.bytes(100_000);
        let mut buffer = device.allocate(oracle.len() as u64).unwrap();
        buffer.copy_from_host(0, &oracle).unwrap();
        for _ in 0..200 {
            let start = random.below(oracle.len() + 1);
            let len = random.below((oracle.len() - start).min(9000) + 1);
            if random.next().is_multiple_of(2) {
                let bytes = random.bytes(len);
                buffer.copy_from_host(start as u64, &bytes).unwrap();
                oracle[start..start + len].copy_from_slice(&bytes);
            } else {
                let mut bytes = vec![0; len];
                buffer.copy_to_host(start as u64, &mut bytes).unwrap();
                assert_eq!(bytes, oracle[start..start + len], "{device}");
            }
        }
        assert!(contents(&buffer) == oracle, "{device}");
    }
}

#[test]
fn views_of_an_arena_show_their_own_bytes() {
    for device in backends() {
        let bytes = Random::new(4).bytes(10_000);
        let mut arena = device.allocate(10_000).unwrap();
        arena.copy_from_host(0, &bytes).unwrap();
        let base = arena.device_ptr();
        let arena = Arc::new(arena);
        let view = Tensor::from_arena(Dtype::U8, &[2, 300], &arena, 4096, 600).unwrap();
        drop(arena);
        assert_eq!(view.device_ptr(), base.map(|base| base + 4096));
        assert_eq!(view.to_host().unwrap(), bytes[4096..4696], "{device}");
        match TensorRef::from(&view).source() {
            Source::Host(shown) => assert_eq!((shown, device.is_host()), (&bytes[4096..4696], true)),
            Source::Device(shown) => assert_eq!((shown.range(), device.is_host()), (4096..4696, false)),
            Source::Reader(..) => panic!("a tensor is no reader"),
        }
    }
}

#[test]
fn nothing_is_a_length_like_any_other() {
    for device in backends() {
        let ring = Staging::new(&device, 2, SLOT).unwrap();
        let mut empty = device.allocate(0).unwrap();
        assert_eq!((empty.len_bytes(), empty.device()), (0, &device));
        assert_eq!(empty.device_ptr(), (!device.is_host()).then_some(0));
        empty.copy_from_host(0, &[]).unwrap();
        empty.copy_to_host(0, &mut []).unwrap();
        assert!(empty.copy_from_host(1, &[]).is_err());
        let upload = Upload::new(&mut empty).unwrap();
        upload.copy(ring.acquire().unwrap(), 5..5, 0).unwrap();
        upload.finish().unwrap();
        let download = Download::new(&empty).unwrap();
        drop(download.start(ring.acquire().unwrap(), 0, 0).unwrap().wait().unwrap());
        drop(download);
        assert_eq!(slots_left(&ring), 2, "{device}");
    }
}

#[test]
fn threads_that_upload_disjoint_ranges_match_an_oracle() {
    for device in backends() {
        let mut random = Random::new(2);
        let oracle = random.bytes(3_000_017);
        // Pieces of any length, at any alignment, in any order.
        let mut pieces = Vec::new();
        let mut start = 0;
        while start < oracle.len() {
            let end = (start + 1 + random.below(SLOT)).min(oracle.len());
            pieces.push(start..end);
            start = end;
        }
        for i in (1..pieces.len()).rev() {
            pieces.swap(i, random.below(i + 1));
        }
        let ring = Staging::new(&device, 5, SLOT).unwrap();
        let mut buffer = device.allocate(oracle.len() as u64).unwrap();
        let upload = Upload::new(&mut buffer).unwrap();
        let next = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let mut slot = ring.acquire().unwrap();
                        // Whatever the slot held before must not matter, nor where in it the bytes are.
                        let at = (SLOT - piece.len()).min(piece.start % 700);
                        slot[at..at + piece.len()].copy_from_slice(&oracle[piece.clone()]);
                        upload.copy(slot, at..at + piece.len(), piece.start as u64).unwrap();
                    }
                });
            }
        });
        upload.finish().unwrap();
        assert!(contents(&buffer) == oracle, "{device}");
        assert_eq!(slots_left(&ring), 5, "{device}");
    }
}

#[test]
fn a_download_through_two_slots_matches_an_oracle() {
    for device in backends() {
        let mut random = Random::new(3);
        let oracle = random.bytes(200_003);
        let ring = Staging::new(&device, 2, SLOT).unwrap();
        let mut buffer = device.allocate(oracle.len() as u64).unwrap();
        buffer.copy_from_host(0, &oracle).unwrap();
        let download = Download::new(&buffer).unwrap();
        let mut copy: Vec<u8> = Vec::new();
        let mut pending = VecDeque::new();
        let mut started = 0;
        while copy.len() < oracle.len() {
            while started < oracle.len()
                && let Some(slot) = ring.try_acquire().unwrap()
            {
                let len = SLOT.min(oracle.len() - started);
                pending.push_back((len, download.start(slot, started as u64, len).unwrap()));
                started += len;
            }
            // Nothing may be pending only while the slot of the last round is being asked after.
            if let Some((len, oldest)) = pending.pop_front() {
                let slot = oldest.wait().unwrap();
                copy.extend_from_slice(&slot[..len]);
            }
        }
        assert!(copy == oracle, "{device}");
        drop(download);
        assert_eq!(slots_left(&ring), 2, "{device}");
    }
}

#[test]
fn a_full_ring_makes_callers_wait_and_loses_no_slot() {
    for device in backends() {
        let ring = Staging::new(&device, 3, SLOT).unwrap();
        let mut buffer = device.allocate(SLOT as u64).unwrap();
        let upload = Upload::new(&mut buffer).unwrap();
        let held = AtomicUsize::new(0);
        thread::scope(|scope| {
            for thread in 0..8 {
                let (ring, upload, held) = (&ring, &upload, &held);
                scope.spawn(move || {
                    for round in 0..200 {
                        let mut slot = ring.acquire().unwrap();
                        assert!(held.fetch_add(1, Ordering::SeqCst) < 3, "more slots than there are");
                        slot[0] = thread;
                        if round % 16 == 0 {
                            thread::yield_now();
                        }
                        held.fetch_sub(1, Ordering::SeqCst);
                        if (round + usize::from(thread)) % 3 == 0 {
                            drop(slot);
                        } else {
                            upload.copy(slot, 0..1, u64::from(thread)).unwrap();
                        }
                    }
                });
            }
        });
        upload.finish().unwrap();
        assert_eq!(contents(&buffer)[..8], [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(slots_left(&ring), 3, "{device}");
    }
}

#[test]
fn who_waits_gets_the_slot_that_is_let_go() {
    for device in backends() {
        let ring = Staging::new(&device, 2, SLOT).unwrap();
        let (first, second) = (ring.acquire().unwrap(), ring.acquire().unwrap());
        assert!(ring.try_acquire().unwrap().is_none());
        thread::scope(|scope| {
            let waiters: Vec<_> = (0..3).map(|_| scope.spawn(|| drop(ring.acquire().unwrap()))).collect();
            thread::sleep(Duration::from_millis(20));
            assert!(waiters.iter().all(|waiter| !waiter.is_finished()), "{device}: a slot out of nowhere");
            drop(first);
            waiters.into_iter().for_each(|waiter| waiter.join().unwrap());
        });
        drop(second);
        assert_eq!(slots_left(&ring), 2, "{device}");
    }
}

#[test]
fn transfers_dropped_in_flight_give_everything_back() {
    for device in backends() {
        let mut random = Random::new(5);
        let bytes = random.bytes(SLOT);
        let ring = Staging::new(&device, 4, SLOT).unwrap();
        let mut buffer = device.allocate(4 * SLOT as u64).unwrap();
        let fill = |upload: &Upload<'_>| {
            for place in 0..4 {
                let mut slot = ring.acquire().unwrap();
                slot.copy_from_slice(&bytes);
                upload.copy(slot, 0..SLOT, place * SLOT as u64).unwrap();
            }
        };
        let upload = Upload::new(&mut buffer).unwrap();
        fill(&upload);
        drop(upload);
        assert_eq!(contents(&buffer), bytes.repeat(4), "{device}: dropping waits");

        let download = Download::new(&buffer).unwrap();
        let (a, b) = (ring.acquire().unwrap(), ring.acquire().unwrap());
        let dropped = download.start(a, 0, SLOT).unwrap();
        let kept = download.start(b, 0, SLOT).unwrap();
        drop(dropped);
        drop(download);
        assert!(kept.is_done().unwrap(), "{device}: dropping waits");
        assert_eq!(kept.wait().unwrap()[..], bytes, "{device}: what is pending outlives the download");
        assert_eq!(slots_left(&ring), 4, "{device}");

        // Forgotten, not dropped: nobody waits, so the memory must not be freed. (The simulated driver looks.)
        let upload = Upload::new(&mut buffer).unwrap();
        fill(&upload);
        mem::forget(upload);
        drop(buffer);
        assert_eq!(slots_left(&ring), 4, "{device}");
    }
}

#[test]
fn ranges_past_the_end_are_errors_and_an_upload_remembers_them() {
    for device in backends() {
        let ring = Staging::new(&device, 2, SLOT).unwrap();
        let mut buffer = device.allocate(100).unwrap();
        for (range, offset) in [(0..101, 0), (0..1, 100), (5..10, 96), (0..1, u64::MAX), (0..0, 101)] {
            let upload = Upload::new(&mut buffer).unwrap();
            upload.copy(ring.acquire().unwrap(), 0..10, 0).unwrap();
            let error = upload.copy(ring.acquire().unwrap(), range, offset).unwrap_err();
            assert!(matches!(&error, Error::Device { device: name, .. } if *name == device.to_string()), "{error}");
            let remembered = upload.finish().unwrap_err().to_string();
            assert!(remembered.contains("of a buffer of 100 bytes"), "{remembered}");
        }
        let download = Download::new(&buffer).unwrap();
        for (offset, len) in [(0, 101), (100, 1), (u64::MAX, 1), (101, 0)] {
            assert!(download.start(ring.acquire().unwrap(), offset, len).is_err(), "{device}: {len} at {offset}");
        }
        drop(download);
        assert_eq!(slots_left(&ring), 2, "{device}");
    }
}

#[test]
#[should_panic(expected = "a slot of host for a buffer on cuda:")]
fn a_slot_of_another_device_is_our_own_mistake() {
    let mut buffer = Simulated::new().handle().allocate(1).unwrap();
    let slot = Device::host().staging().unwrap().acquire().unwrap();
    let _ = Upload::new(&mut buffer).unwrap().copy(slot, 0..1, 0);
}

#[test]
fn every_user_of_a_device_shares_one_ring() {
    for device in backends() {
        let ring = device.staging().unwrap();
        assert_eq!((ring.slots(), ring.slot_bytes(), ring.device()), (SLOTS, SLOT_BYTES, &device));
        let held = ring.acquire().unwrap();
        assert_eq!(held.as_ptr() as usize % 4096, 0);
        assert!(device.clone().staging().unwrap().is(&ring));
    }
}

#[test]
fn a_transfer_larger_than_the_ring_goes_through_it_from_four_threads() {
    const LEN: usize = 256 << 20;
    let mut random = Random::new(7);
    let oracle = random.bytes(LEN);
    for device in backends() {
        let ring = device.staging().unwrap();
        let mut buffer = device.allocate(LEN as u64).unwrap();
        let upload = Upload::new(&mut buffer).unwrap();
        let next = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    loop {
                        let start = next.fetch_add(SLOT_BYTES, Ordering::Relaxed);
                        let Some(bytes) = oracle.get(start..start + SLOT_BYTES) else { break };
                        let mut slot = ring.acquire().unwrap();
                        slot.copy_from_slice(bytes);
                        upload.copy(slot, 0..SLOT_BYTES, start as u64).unwrap();
                    }
                });
            }
        });
        upload.finish().unwrap();
        assert!(contents(&buffer) == oracle, "{device}: through the driver's own copy");
        let download = Download::new(&buffer).unwrap();
        let next = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    loop {
                        let start = next.fetch_add(SLOT_BYTES, Ordering::Relaxed);
                        let Some(bytes) = oracle.get(start..start + SLOT_BYTES) else { break };
                        let slot = ring.acquire().unwrap();
                        let slot = download.start(slot, start as u64, SLOT_BYTES).unwrap().wait().unwrap();
                        assert!(slot[..] == *bytes, "{device}: the slot at {start}");
                    }
                });
            }
        });
    }
}

#[test]
fn pieces_of_other_buffers_are_copied_one_behind_the_other() {
    for device in backends() {
        let mut random = Random::new(21);
        let sources: Vec<(Vec<u8>, DeviceBuffer)> = [1, 4096, 300_000]
            .into_iter()
            .map(|len| {
                let bytes = random.bytes(len);
                let mut buffer = device.allocate(len as u64).unwrap();
                buffer.copy_from_host(0, &bytes).unwrap();
                (bytes, buffer)
            })
            .collect();
        for _ in 0..50 {
            let mut expected = random.bytes(700_000);
            let mut target = device.allocate(expected.len() as u64).unwrap();
            target.copy_from_host(0, &expected).unwrap();
            let offset = random.below(1000);
            let mut at = offset;
            let pieces: Vec<(&DeviceBuffer, std::ops::Range<u64>)> = (0..random.below(5))
                .map(|_| {
                    let (bytes, buffer) = &sources[random.below(3)];
                    let start = random.below(bytes.len() + 1);
                    let end = start + random.below((bytes.len() - start + 1).min(150_000));
                    expected[at..at + end - start].copy_from_slice(&bytes[start..end]);
                    at += end - start;
                    (buffer, start as u64..end as u64)
                })
                .collect();
            target.copy_from(offset as u64, &pieces).unwrap();
            assert!(contents(&target) == expected, "{pieces:?} to {offset} on {device}");
        }
        let mut target = device.allocate(10).unwrap();
        target.copy_from_host(0, &[7; 10]).unwrap();
        let whole = &sources[1].1;
        let elsewhere = Simulated::new().handle().allocate(4).unwrap();
        for (offset, pieces) in [
            (0, vec![(whole, 0..8), (whole, 0..3)]),
            (11, vec![(whole, 0..0)]),
            (0, vec![(whole, 4090..4097)]),
            (u64::MAX, vec![(whole, 0..1)]),
            (0, vec![(whole, 0..2), (&elsewhere, 0..2)]),
        ] {
            let error = target.copy_from(offset, &pieces).unwrap_err();
            assert!(matches!(error, Error::Device { .. }), "{error}");
        }
        assert_eq!(contents(&target), [7; 10], "nothing was copied");
    }
}

/// The hardware does not come back: who waits goes, and what the copy uses stays.
#[test]
fn a_download_that_is_given_up_keeps_what_it_uses() {
    let simulated = Simulated::new();
    let device = simulated.handle();
    let staging = device.staging().unwrap();
    let before = simulated.allocated_bytes();
    let buffer = device.allocate(9 << 20).unwrap();
    let stuck = Mutex::new(Vec::new());
    let give_up = |waiting: Waiting| {
        stuck.lock().push(waiting);
        Err(Error::Timeout { operation: "copy", path: "here".into(), after_ms: 1 })
    };
    let mut target = vec![0; 9 << 20];
    let outcome = download_into(&buffer, 0, &mut target, &give_up);
    assert!(matches!(outcome, Err(Error::Timeout { .. })));
    drop((buffer, target));
    assert!(simulated.allocated_bytes() >= before + (9 << 20));
    let waiting: Vec<Waiting> = stuck.into_inner();
    assert_eq!(waiting.len(), 1, "it waits for the first, and then for none");
    let slots = waiting.into_iter().map(|waiting| waiting().unwrap());
    drop(slots.collect::<Vec<_>>());
    let all: Vec<Slot> = (0..SLOTS).map(|_| staging.acquire().unwrap()).collect();
    drop(all);
    assert!(simulated.allocated_bytes() >= before + (9 << 20), "nobody knows when the copies are done");
}
