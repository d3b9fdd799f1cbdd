//! Reading, writing and streaming.

use super::*;
use crate::error::{Error, Result};
use crate::gds::{IoOperation, OpenFile, Route, Transfer, Transport};
use crate::io::fixtures::{bytes, disk};
use crate::storage::sim::{Abilities, Fault, FaultKind, OpKind};
use proptest::prelude::*;
use std::path::Path;

#[test]
fn any_piece_of_a_file_lands_where_it_was_asked_for() {
    let disk = disk(3 * MIB + 4321);
    for device in devices() {
        for deadline in [None, Some(Duration::from_secs(60))] {
            let gds = builder(&device, disk.clone(), config()).deadline(deadline).build().unwrap();
            for (offset, at, len) in [
                (0, 0, 4096),
                (1, 2, 3),
                (4095, 5, 2),
                (MIB - 1, 9, 2 * MIB + 7),
                (4096, 4096, 2 * MIB),
                (3 * MIB + 4320, 0, 1),
                (77, 0, 0),
                (0, 0, 3 * MIB + 4321),
            ] {
                let mut target = device.allocate(at + len + 11).unwrap();
                let before = contents(&target);
                assert_eq!(gds.read_to_gpu("/f", piece(offset, at, len), &mut target).unwrap(), len);
                let found = contents(&target);
                let (at, len) = (at as usize, len as usize);
                assert!(found[at..at + len] == bytes(offset..offset + len as u64));
                assert_eq!(
                    (&found[..at], &found[at + len..]),
                    (&before[..at], &before[at + len..]),
                    "and nothing else"
                );
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn what_is_written_is_read_back_as_in_a_plain_vector(
        gpu: bool,
        direct: bool,
        ops in prop::collection::vec((any::<bool>(), 0u64..300_000, 0u64..150_000, 0u64..5000), 1..14),
    ) {
        let device = if gpu { simulated() } else { Device::host() };
        let disk = SimStorage::new();
        disk.stop_recording();
        disk.set_abilities(Abilities { direct, ..Abilities::default() });
        let gds = context(&device, &disk);
        let mut model: Vec<u8> = vec![];
        gds.write_from_gpu("/new", piece(0, 0, 0), &holding(&device, &[])).unwrap();
        for (n, (write, offset, len, at)) in ops.into_iter().enumerate() {
            if write {
                let source = bytes(n as u64 * 999..n as u64 * 999 + at + len);
                gds.write_from_gpu("/new", piece(offset, at, len), &holding(&device, &source)).unwrap();
                if len > 0 {
                    model.resize(model.len().max((offset + len) as usize), 0);
                    model[offset as usize..(offset + len) as usize].copy_from_slice(&source[at as usize..]);
                }
            } else {
                let mut target = device.allocate(at + len).unwrap();
                let read = gds.read_to_gpu("/new", piece(offset, at, len), &mut target);
                match model.get(offset as usize..(offset + len) as usize) {
                    Some(expected) => {
                        prop_assert_eq!(read.unwrap(), len);
                        prop_assert!(&contents(&target)[at as usize..] == expected);
                    }
                    None if len == 0 => prop_assert_eq!(read.unwrap(), 0),
                    None => assert!(matches!(read, Err(Error::FileTooShort { .. })), "{read:?}"),
                }
            }
            prop_assert_eq!(gds.len_bytes("/new").unwrap(), model.len() as u64);
        }
    }
}

#[test]
fn what_the_disk_does_once_is_healed_and_counted() {
    for device in devices() {
        for kind in [FaultKind::Short, FaultKind::Eintr, FaultKind::Eio] {
            for nth in 0..3 {
                let disk = disk(3 * MIB);
                let gds = context(&device, &disk);
                disk.inject(Fault::new(kind, nth).on(OpKind::Read));
                let mut target = device.allocate(3 * MIB).unwrap();
                gds.read_to_gpu("/f", piece(0, 0, 3 * MIB), &mut target).unwrap();
                assert!(contents(&target) == bytes(0..3 * MIB), "{kind:?} {nth}");
                disk.inject(Fault::new(kind, nth).on(OpKind::Write));
                gds.write_from_gpu("/copy", piece(0, 0, 3 * MIB), &Arc::new(target)).unwrap();
                assert_eq!(disk.faults_struck(), 2, "{kind:?}");
                let mut copy = device.allocate(3 * MIB).unwrap();
                gds.read_to_gpu("/copy", piece(0, 0, 3 * MIB), &mut copy).unwrap();
                assert!(contents(&copy) == bytes(0..3 * MIB), "{kind:?} {nth}");
                assert_eq!(gds.metrics().retries(), if kind == FaultKind::Eio { 2 } else { 0 });
            }
        }
    }
}

#[test]
fn what_stays_broken_is_an_error_with_the_attempts_and_the_target_stays() {
    let disk = disk(MIB);
    let gds = context(&Device::host(), &disk);
    let mut target = gds.device().allocate(MIB).unwrap();
    disk.inject(Fault::new(FaultKind::Eio, 0).on(OpKind::Read).from_then_on());
    let error = gds.read_to_gpu("/f", piece(0, 0, MIB), &mut target).unwrap_err();
    assert!(matches!(error, Error::RetriesExhausted { attempts: 4, .. }), "{error}");
    assert_eq!(target.len_bytes(), MIB);
    disk.clear_faults();
    let source = Arc::new(target);
    disk.set_capacity(Some(MIB + 4096));
    let error = gds.write_from_gpu("/copy", piece(0, 0, MIB), &source).unwrap_err();
    assert!(error.is_no_space(), "a full disk is not tried again: {error}");
    let metrics = gds.metrics();
    assert_eq!((metrics.failures(), metrics.retries(), metrics.active_buffers()), (2, 3, 0));
}

#[test]
fn mistakes_are_named() {
    let gds = context(&Device::host(), &disk(100));
    let mut target = gds.device().allocate(100).unwrap();
    let error = gds.read_to_gpu("/f", piece(50, 0, 51), &mut target).unwrap_err();
    assert!(matches!(error, Error::FileTooShort { needed_bytes: 101, len_bytes: 100, .. }), "{error}");
    for bad in [piece(0, 50, 51), piece(0, u64::MAX, 1), piece(u64::MAX, 0, 1), piece(0, 0, u64::MAX)] {
        assert!(matches!(gds.read_to_gpu("/f", bad, &mut target), Err(Error::Device { .. })), "{bad:?}");
        assert!(matches!(gds.write_from_gpu("/f", bad, &holding(gds.device(), &[0])), Err(Error::Device { .. })));
    }
    let error = gds.read_to_gpu("/none", piece(0, 0, 1), &mut target).unwrap_err();
    assert!(matches!(error, Error::Io { action: "open", .. }), "{error}");
    assert!(GdsContext::on(Device::host(), GdsConfig { alignment: 3, ..config() }).is_err());
}

#[test]
fn a_stuck_operation_is_reported_in_time_and_keeps_its_memory() {
    for device in devices() {
        let stuck = StuckStorage::new(disk(MIB));
        let gds = impatient(&device, &stuck);
        let mut target = device.allocate(MIB).unwrap();
        gds.read_to_gpu("/f", piece(0, 0, 10), &mut target).unwrap();
        stuck.gate.close();
        let error = gds.read_to_gpu("/f", piece(0, 0, MIB), &mut target).unwrap_err();
        assert!(matches!(error, Error::Timeout { operation: "read", after_ms: 150.., .. }), "{error}");
        assert_eq!(target.len_bytes(), 0, "the operation has it");
        let source = holding(&device, &[7; 100]);
        let error = gds.write_from_gpu("/f", piece(0, 0, 100), &source).unwrap_err();
        assert!(matches!(error, Error::Timeout { operation: "write", .. }), "{error}");
        assert_eq!(Arc::strong_count(&source), 2, "the operation has a share");
        // The rest of the threads get stuck too: the next one does not even begin in time.
        for _ in 0..8 {
            let mut target = device.allocate(1).unwrap();
            assert!(matches!(gds.read_to_gpu("/f", piece(0, 0, 1), &mut target), Err(Error::Timeout { .. })));
        }
        let routes = gds.routes();
        assert!(routes[0].route == Route::Staged && routes[0].resting && routes[0].late > 0, "{routes:?}");
        assert!(gds.metrics().timeouts() >= 10);
        stuck.gate.open();
        while Arc::strong_count(&source) > 1 {
            std::thread::yield_now();
        }
        let mut target = device.allocate(MIB).unwrap();
        while gds.read_to_gpu("/f", piece(0, 0, MIB), &mut target).is_err() {
            target = device.allocate(MIB).unwrap();
        }
        assert!(contents(&target)[100..] == bytes(100..MIB));
    }
}

#[test]
fn a_route_that_was_late_rests_and_the_next_one_serves() {
    let stuck = StuckStorage::new(disk(MIB));
    let gds = impatient(&Device::host(), &stuck);
    let mut target = gds.device().allocate(10).unwrap();
    stuck.gate.close();
    assert!(gds.read_to_gpu("/f", piece(0, 0, 10), &mut target).is_err());
    stuck.gate.open();
    let mut target = gds.device().allocate(10).unwrap();
    gds.read_to_gpu("/f", piece(5, 0, 10), &mut target).unwrap();
    assert_eq!(contents(&target), bytes(5..15));
    assert_eq!((gds.metrics().route(Route::Buffered).bytes_read(), gds.metrics().fallbacks()), (10, 1));
}

/// A route that is better than all others, and never there.
#[derive(Debug)]
struct Missing {
    serves: bool,
}

impl Missing {
    fn refuse(&self) -> Result<()> {
        Err(Error::RouteUnavailable { route: "cufile", why: "no driver".into() })
    }
}

impl Transport for Missing {
    fn route(&self) -> Route {
        Route::CuFile
    }

    fn serves(&self, _: &OpenFile, _: &Device) -> Result<()> {
        if self.serves { Ok(()) } else { self.refuse() }
    }

    fn read(&self, _: &Transfer, _: &mut DeviceBuffer) -> Result<()> {
        self.refuse()
    }

    fn write(&self, _: &Transfer, _: &DeviceBuffer) -> Result<()> {
        self.refuse()
    }
}

#[test]
fn another_route_serves_what_the_first_cannot_where_that_is_wanted() {
    for device in devices() {
        for serves in [true, false] {
            let disk = disk(MIB);
            let missing = || Arc::new(Missing { serves });
            let gds = builder(&device, disk.clone(), config()).transport(missing()).build().unwrap();
            let mut target = device.allocate(MIB).unwrap();
            gds.read_to_gpu("/f", piece(0, 0, MIB), &mut target).unwrap();
            assert!(contents(&target) == bytes(0..MIB));
            let metrics = gds.metrics();
            assert_eq!((metrics.route(Route::Staged).bytes_read(), metrics.fallbacks()), (MIB, 1));
            let strict = GdsConfig { mmap_fallback: false, ..config() };
            let gds = builder(&device, disk, strict).transport(missing()).build().unwrap();
            let error = gds.read_to_gpu("/f", piece(0, 0, MIB), &mut target).unwrap_err();
            assert!(matches!(error, Error::RouteUnavailable { route: "cufile", .. }), "{error}");
        }
    }
}

#[test]
fn the_buffered_route_moves_the_same_bytes() {
    for device in devices() {
        let disk = disk(2 * MIB + 5);
        let file = crate::io::fixtures::open(&disk);
        let route = crate::gds::BufferedTransport::new();
        let transfer = |offset, at, len| Transfer::new(file.clone(), piece(offset, at, len));
        let mut buffer = device.allocate(2 * MIB + 10).unwrap();
        route.read(&transfer(0, 5, 2 * MIB + 5), &mut buffer).unwrap();
        assert!(contents(&buffer)[5..] == bytes(0..2 * MIB + 5));
        route.write(&transfer(3, 5, 2 * MIB + 5), &buffer).unwrap();
        route.read(&transfer(3, 0, 2 * MIB + 5), &mut buffer).unwrap();
        assert!(contents(&buffer)[..(2 * MIB + 5) as usize] == bytes(0..2 * MIB + 5));
        assert!(matches!(route.read(&transfer(2 * MIB, 0, 9), &mut buffer), Err(Error::FileTooShort { .. })));
    }
}

#[test]
fn a_batch_is_as_its_pieces_and_neighbours_are_one_read() {
    let disk = disk(MIB);
    for batch_mode in [true, false] {
        let gds = builder(&Device::host(), disk.clone(), GdsConfig { batch_mode, ..config() }).build().unwrap();
        let mut target = gds.device().allocate(40_000).unwrap();
        let mut pieces: Vec<Piece> = (0..8).map(|n| piece(4096 * n, 4096 * n, 4096)).collect();
        pieces.push(piece(900_000, 40_000 - 77, 77));
        gds.len_bytes("/f").unwrap();
        disk.start_recording();
        assert_eq!(gds.read_batch("/f", &pieces, &mut target).unwrap(), 8 * 4096 + 77);
        let trace = disk.trace();
        let reads = trace.events().filter(|event| is_call(event, OpKind::Read)).count();
        disk.stop_recording();
        assert_eq!(reads, if batch_mode { 3 } else { 9 }, "batches of four");
        let found = contents(&target);
        assert!(found[..8 * 4096] == bytes(0..8 * 4096) && found[40_000 - 77..] == bytes(900_000..900_077));
        gds.write_batch("/out", &pieces, &Arc::new(target)).unwrap();
        assert_eq!(gds.len_bytes("/out").unwrap(), 900_077);
    }
}

#[test]
fn files_stay_open_until_they_are_forgotten() {
    let disk = disk(MIB);
    let gds = context(&Device::host(), &disk);
    let opens = |disk: &SimStorage| disk.trace().events().filter(|event| is_call(event, OpKind::Open)).count();
    disk.start_recording();
    let mut target = gds.device().allocate(10).unwrap();
    for n in 0..5 {
        gds.read_to_gpu("/f", piece(n, 0, 10), &mut target).unwrap();
    }
    assert_eq!(opens(&disk), 1);
    let source = holding(gds.device(), &[1]);
    gds.write_from_gpu("/f", piece(0, 0, 1), &source).unwrap();
    gds.read_to_gpu("/f", piece(0, 0, 10), &mut target).unwrap();
    assert_eq!(opens(&disk), 2, "once more, for writing");
    disk.rename(Path::new("/f"), Path::new("/g")).unwrap();
    gds.read_to_gpu("/f", piece(0, 0, 10), &mut target).unwrap();
    gds.forget("/f");
    assert!(gds.read_to_gpu("/f", piece(0, 0, 10), &mut target).is_err());
    // More files than are kept.
    for n in 0..200 {
        gds.write_from_gpu(format!("/many{n}"), piece(0, 0, 1), &source).unwrap();
    }
    for n in 0..200 {
        gds.read_to_gpu(format!("/many{n}"), piece(0, 0, 1), &mut target).unwrap();
    }
}

fn is_call(event: &crate::storage::sim::Event, op: OpKind) -> bool {
    matches!(event, crate::storage::sim::Event::Call(call) if call.op == op)
}

#[test]
fn what_is_synced_survives_a_crash() {
    let disk = SimStorage::new();
    let gds = context(&Device::host(), &disk);
    let source = holding(gds.device(), &bytes(0..10_000));
    gds.write_from_gpu("/new", piece(0, 0, 10_000), &source).unwrap();
    gds.sync("/new").unwrap();
    disk.marker(1);
    let mut walker = disk.trace().walk();
    let mut seen = 0;
    while walker.next_cut() {
        for choice in walker.choices() {
            if walker.markers() == [1] {
                let state = walker.materialize(&choice);
                assert!(state.read_file("/new") == bytes(0..10_000));
                seen += 1;
            }
        }
    }
    assert!(seen > 0);
    disk.inject(Fault::new(FaultKind::FailedSync, 0).on(OpKind::Sync));
    gds.write_from_gpu("/new", piece(0, 0, 10), &source).unwrap();
    let error = gds.sync("/new").unwrap_err();
    assert!(matches!(error, Error::Io { action: "sync", .. }), "a failed sync is not tried again: {error}");
}

#[test]
fn streams_go_both_ways_and_a_stream_may_use_the_context() {
    for device in devices() {
        for double_buffering in [true, false] {
            let disk = disk(MIB + 5);
            let config = GdsConfig { double_buffering, ..config() };
            let gds = builder(&device, disk, config).build().unwrap();
            let mut copied = 0;
            let streamed = gds.stream_read("/f", 1..MIB + 5, |chunk| {
                // Each stretch is written to another file by a stream of its own.
                let mut bytes = vec![0; chunk.len_bytes as usize];
                chunk.buffer.copy_to_host(0, &mut bytes)?;
                let end = chunk.file_offset + chunk.len_bytes;
                copied += gds.stream_write("/copy", chunk.file_offset..end, |buffer, offset, len| {
                    let start = (offset - chunk.file_offset) as usize;
                    buffer.copy_from_host(0, &bytes[start..start + len as usize])
                })?;
                Ok(())
            });
            assert_eq!((streamed.unwrap(), copied), (MIB + 4, MIB + 4));
            let mut found = vec![];
            gds.stream_read("/copy", 1..MIB + 5, |chunk| {
                let mut bytes = vec![0; chunk.len_bytes as usize];
                chunk.buffer.copy_to_host(0, &mut bytes)?;
                assert!(chunk.as_host().is_none_or(|host| host == bytes));
                found.extend(bytes);
                Ok(())
            })
            .unwrap();
            assert!(found == bytes(1..MIB + 5));
            let error = gds.stream_read("/f", 0..MIB, |_| Err(Error::Closed));
            assert!(matches!(error, Err(Error::Closed)));
            let error = gds.stream_read("/f", 0..2 * MIB, |_| Ok(()));
            assert!(matches!(error, Err(Error::FileTooShort { .. })), "{error:?}");
        }
    }
}

#[test]
fn a_dropped_context_leaves_what_is_in_flight_alone() {
    for device in devices() {
        let stuck = StuckStorage::new(disk(MIB));
        let gds = impatient(&device, &stuck);
        let source = holding(&device, &[7; 100]);
        stuck.gate.close();
        assert!(gds.write_from_gpu("/f", piece(0, 0, 100), &source).is_err());
        assert!(gds.stream_read("/f", 0..MIB, |_| Ok(())).is_err());
        let mut target = device.allocate(MIB).unwrap();
        assert!(gds.read_to_gpu("/f", piece(0, 0, MIB), &mut target).is_err());
        drop(gds);
        assert!(stuck.gate.waiting() > 0);
        stuck.gate.open();
        while Arc::strong_count(&source) > 1 || stuck.gate.waiting() > 0 {
            std::thread::yield_now();
        }
    }
}

#[test]
fn metrics_say_what_was_moved_and_how_fast() {
    let gds = context(&Device::host(), &disk(MIB));
    let mut target = gds.device().allocate(MIB).unwrap();
    gds.read_to_gpu("/f", piece(0, 0, 4096), &mut target).unwrap();
    gds.read_to_gpu("/f", piece(0, 0, MIB), &mut target).unwrap();
    gds.write_from_gpu("/f", piece(0, 0, 5), &Arc::new(target)).unwrap();
    let metrics = gds.metrics();
    assert_eq!((metrics.bytes_read(), metrics.read_ops(), metrics.bytes_written()), (MIB + 4096, 2, 5));
    let status = gds.performance_status();
    assert!(status.actual_read_bps > 0.0 && status.actual_latency_us.unwrap() > 0.0, "{status:?}");
    let staged = metrics.route(Route::Staged);
    assert_eq!((staged.read_latency().count(), staged.write_latency().count()), (2, 1));
    assert!(metrics.prometheus().contains("alight_gds_written_bytes_total{route=\"staged\"} 5\n"));
    assert_eq!(IoOperation::Read.verb(), "read");
}
