use super::*;
use crate::device::simulated_gpu;
use crate::io::fixtures::{Gate, bytes, disk, open};
use crate::io::staged::StagedTransport;
use crate::io::transport::Transport;
use crate::storage::sim::SimStorage;
use parking_lot::Mutex;
use std::sync::atomic::AtomicUsize;
use std::time::Instant;

const BUFFER: u64 = 64 << 10;

/// Passes a gate, then goes through the staged route; the n-th operation can be told to fail.
#[derive(Default)]
struct Gated {
    gate: Gate,
    calls: AtomicUsize,
    fails: Mutex<Option<usize>>,
    late: AtomicUsize,
}

impl Execute for Gated {
    fn execute(&self, operation: IoOperation, transfer: &Transfer, memory: &mut Memory) -> Result<u64> {
        self.gate.pass();
        let call = self.calls.fetch_add(1, Ordering::SeqCst);
        if *self.fails.lock() == Some(call) {
            return Err(Error::Closed);
        }
        let Memory::Owned(buffer) = memory else { panic!("a stream owns its buffers") };
        match operation {
            IoOperation::Read => StagedTransport::new().read(transfer, buffer)?,
            IoOperation::Write => StagedTransport::new().write(transfer, buffer)?,
        }
        Ok(transfer.len_bytes())
    }

    fn missed_deadline(&self, _: &Transfer) {
        self.late.fetch_add(1, Ordering::SeqCst);
    }
}

fn manager(device: &Device, count: usize, deadline: Option<Duration>) -> (Arc<Gated>, DoubleBufferManager) {
    let gated = Arc::new(Gated::default());
    let executor = Arc::clone(&gated) as Arc<dyn Execute>;
    (gated, DoubleBufferManager::new(device, executor, (count, BUFFER), 2, deadline).unwrap())
}

fn read_all(manager: &mut DoubleBufferManager, disk: &SimStorage, range: Range<u64>) -> Result<Vec<u8>> {
    let mut found = vec![];
    let len = manager.overlapped_read(&open(disk), range.clone(), |chunk| {
        assert_eq!(chunk.file_offset, range.start + found.len() as u64, "in order, nothing twice");
        let mut bytes = vec![0; chunk.len_bytes as usize];
        chunk.buffer.copy_to_host(0, &mut bytes)?;
        found.extend(bytes);
        Ok(())
    })?;
    assert_eq!(len, found.len() as u64);
    Ok(found)
}

#[test]
fn every_byte_is_handed_over_once_and_in_order() {
    for device in [Device::host(), simulated_gpu()] {
        let disk = disk(6 * BUFFER + 99);
        for count in [1, 2] {
            let (_, mut manager) = manager(&device, count, None);
            for range in [0..0, 5..6, 0..BUFFER, 1..BUFFER + 2, 77..6 * BUFFER + 99, 4096..5 * BUFFER] {
                assert!(read_all(&mut manager, &disk, range.clone()).unwrap() == bytes(range));
                assert_eq!(manager.states().get(), vec![BufferState::Idle; count]);
            }
        }
    }
}

#[test]
fn every_byte_is_written_once_and_in_order() {
    for device in [Device::host(), simulated_gpu()] {
        for count in [1, 2] {
            let disk = disk(0);
            let (_, mut manager) = manager(&device, count, None);
            let (end, mut next) = (5 * BUFFER + 99, 3);
            let written = manager.overlapped_write(&open(&disk), 3..end, |buffer, offset, len| {
                assert_eq!(offset, next);
                next += len;
                buffer.copy_from_host(0, &bytes(offset..offset + len))
            });
            assert_eq!((written.unwrap(), next), (end - 3, end));
            assert!(read_all(&mut manager, &disk, 3..end).unwrap() == bytes(3..end));
        }
    }
}

#[test]
fn the_next_buffer_is_filled_while_one_is_processed() {
    let (gated, mut double) = manager(&Device::host(), 2, None);
    let states = double.states();
    let disk = disk(4 * BUFFER);
    let mut seen = 0;
    let process = |_: StreamChunk<'_>| {
        seen += 1;
        // The other one arrives while this one is held: it would never, were it not filled meanwhile.
        while seen < 4 && gated.calls.load(Ordering::SeqCst) <= seen {
            thread::yield_now();
        }
        assert_eq!(states.get().iter().filter(|&&state| state == BufferState::Processing).count(), 1);
        Ok(())
    };
    double.overlapped_read(&open(&disk), 0..4 * BUFFER, process).unwrap();

    let (gated, mut single) = manager(&Device::host(), 1, None);
    let mut seen = 0;
    let process = |_: StreamChunk<'_>| {
        seen += 1;
        assert_eq!(gated.calls.load(Ordering::SeqCst), seen, "with one buffer nothing is ahead");
        Ok(())
    };
    single.overlapped_read(&open(&disk), 0..4 * BUFFER, process).unwrap();
}

#[test]
fn a_failure_in_either_half_ends_the_stream_and_leaves_it_usable() {
    let disk = disk(6 * BUFFER);
    let file = open(&disk);
    for count in [1, 2] {
        let (gated, mut manager) = manager(&Device::host(), count, None);
        for failing in 0..6 {
            // In the caller's half.
            let mut calls = 0;
            let error = manager.overlapped_read(&file, 0..6 * BUFFER, |_| {
                calls += 1;
                if calls > failing { Err(Error::Closed) } else { Ok(()) }
            });
            assert!(matches!(error, Err(Error::Closed)) && calls == failing + 1);
            let mut calls = 0;
            let error = manager.overlapped_write(&file, 0..6 * BUFFER, |buffer, offset, len| {
                calls += 1;
                buffer.copy_from_host(0, &bytes(offset..offset + len))?;
                if calls > failing { Err(Error::Closed) } else { Ok(()) }
            });
            assert!(matches!(error, Err(Error::Closed)) && calls == failing + 1);
            // In the worker's.
            *gated.fails.lock() = Some(gated.calls.load(Ordering::SeqCst) + failing);
            let mut calls = 0;
            let error = manager.overlapped_read(&file, 0..6 * BUFFER, |_| {
                calls += 1;
                Ok(())
            });
            assert!(matches!(error, Err(Error::Closed)), "{error:?}");
            assert_eq!(calls, failing, "what came before the failure was handed over, and nothing after");
            *gated.fails.lock() = Some(gated.calls.load(Ordering::SeqCst) + failing);
            let error = manager.overlapped_write(&file, 0..6 * BUFFER, |buffer, offset, len| {
                buffer.copy_from_host(0, &bytes(offset..offset + len))
            });
            assert!(matches!(error, Err(Error::Closed)), "{error:?}");
            *gated.fails.lock() = None;
            assert_eq!(manager.states().get(), vec![BufferState::Idle; count]);
            assert!(read_all(&mut manager, &disk, 0..6 * BUFFER).unwrap() == bytes(0..6 * BUFFER));
        }
    }
}

#[test]
fn a_stuck_transfer_is_reported_and_keeps_its_buffer() {
    let disk = disk(6 * BUFFER);
    let (gated, mut manager) = manager(&Device::host(), 2, Some(Duration::from_millis(30)));
    gated.gate.close();
    let error = read_all(&mut manager, &disk, 0..6 * BUFFER).unwrap_err();
    assert!(matches!(error, Error::Timeout { operation: "stream", after_ms: 30, .. }), "{error}");
    let error = read_all(&mut manager, &disk, 0..1).unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "it is stuck still: {error}");
    assert_eq!(gated.late.load(Ordering::SeqCst), 2);
    gated.gate.open();
    assert!(read_all(&mut manager, &disk, 0..6 * BUFFER).unwrap() == bytes(0..6 * BUFFER));
    assert!(gated.calls.load(Ordering::SeqCst) < 6 + 2, "what had not begun was given up");
}

#[test]
fn dropping_it_in_flight_waits_for_nothing() {
    let disk = disk(6 * BUFFER);
    for device in [Device::host(), simulated_gpu()] {
        let (gated, mut manager) = manager(&device, 2, Some(Duration::from_millis(10)));
        gated.gate.close();
        assert!(read_all(&mut manager, &disk, 0..6 * BUFFER).is_err());
        let began = Instant::now();
        drop(manager);
        assert!(began.elapsed() < Duration::from_secs(5));
        gated.gate.open();
        // The worker ends, and with it its share of the executor.
        while Arc::strong_count(&gated) > 1 {
            thread::yield_now();
        }
    }
}

#[test]
fn a_panic_of_the_caller_costs_no_buffer() {
    let disk = disk(6 * BUFFER);
    let (_, mut manager) = manager(&Device::host(), 2, None);
    for _ in 0..3 {
        let panicked = catch_unwind(AssertUnwindSafe(|| {
            let _ = manager.overlapped_read(&open(&disk), 0..6 * BUFFER, |_| panic!("on purpose"));
        }));
        assert!(panicked.is_err());
        assert!(read_all(&mut manager, &disk, 0..6 * BUFFER).unwrap() == bytes(0..6 * BUFFER));
    }
}
