//! The reader that fetches ahead.

use super::*;
use crate::error::Error;
use crate::gds::{AccessPattern, SlotState};
use crate::io::fixtures::{bytes, disk};
use crate::storage::sim::{Fault, FaultKind, OpKind};
use proptest::prelude::*;

#[test]
fn a_reader_in_order_is_served_by_what_was_fetched_ahead() {
    for device in devices() {
        let disk = disk(MIB + 777);
        let gds = context(&device, &disk);
        let mut reader = gds.reader("/f").unwrap();
        let mut found = vec![];
        while let Some(chunk) = reader.read(10_000).unwrap() {
            assert_eq!(chunk.range().start, found.len() as u64);
            assert!(chunk.as_host().is_none_or(|host| host.len() as u64 == chunk.len_bytes()));
            assert_eq!(chunk.device_ptr().is_some(), !device.is_host());
            found.extend(chunk.to_host().unwrap());
        }
        assert!(found == bytes(0..MIB + 777));
        assert_eq!((reader.position(), reader.pattern()), (MIB + 777, AccessPattern::Sequential));
        let stats = reader.stats();
        assert_eq!((stats.misses, stats.failed, stats.wasted), (1, 0, 0), "only the first was not foreseen: {stats:?}");
        assert!(stats.hits > 100 || stats.late > 0, "{stats:?}");
        let metrics = gds.metrics();
        assert_eq!((metrics.prefetch_hits(), metrics.prefetch_misses()), (stats.hits, 1));
        assert_eq!(metrics.prefetch_late(), stats.late);
        assert!(metrics.bytes_read() < MIB + 777 + 20_000, "nothing was read twice: {}", metrics.bytes_read());
    }
}

#[test]
fn a_reader_backwards_in_strides_is_served_ahead_too() {
    let disk = disk(4 * MIB);
    let gds = context(&Device::host(), &disk);
    let mut reader = gds.reader("/f").unwrap();
    for n in (0..38u64).rev() {
        let (offset, len) = (n * 100_000, 5000);
        let chunk = reader.read_at(offset, len).unwrap().unwrap();
        assert!(chunk.to_host().unwrap() == bytes(offset..offset + len)[..chunk.len_bytes() as usize]);
    }
    assert_eq!(reader.pattern(), AccessPattern::Strided { stride: -100_000 });
    let stats = reader.stats();
    assert!(stats.hits + stats.late >= 30, "{stats:?}");
}

#[test]
fn a_prefetch_that_fails_is_read_again_when_it_is_asked_for() {
    for device in devices() {
        for nth in 0..12 {
            let disk = disk(MIB);
            // No retries: every fault is seen.
            let recovery = ErrorRecovery::new(0, true);
            let gds = builder(&device, disk.clone(), config()).recovery(recovery).build().unwrap();
            let mut reader = gds.reader("/f").unwrap();
            disk.inject(Fault::new(FaultKind::Eio, nth).on(OpKind::Read));
            let (mut found, mut failures) = (vec![], 0);
            loop {
                match reader.read(30_000) {
                    Ok(Some(chunk)) => found.extend(chunk.to_host().unwrap()),
                    Ok(None) => break,
                    Err(error) => {
                        assert!(matches!(error, Error::Io { .. }), "{error}");
                        failures += 1;
                    }
                }
            }
            assert!(found == bytes(0..MIB), "fault {nth}");
            assert!(failures <= 1 && failures + reader.stats().failed >= disk.faults_struck());
        }
    }
}

#[test]
fn a_stuck_prefetch_is_reported_and_the_reader_goes_on_later() {
    let stuck = StuckStorage::new(disk(MIB));
    let gds = impatient(&Device::host(), &stuck);
    let mut reader = gds.reader("/f").unwrap();
    assert!(reader.read(1000).unwrap().is_some());
    stuck.gate.close();
    let mut error = None;
    while error.is_none() {
        error = reader.read(1000).err();
    }
    assert!(matches!(error, Some(Error::Timeout { .. })), "{error:?}");
    stuck.gate.open();
    let mut at = reader.position();
    while at < MIB {
        match reader.read(50_000) {
            Ok(chunk) => {
                let chunk = chunk.unwrap();
                assert!(chunk.to_host().unwrap() == bytes(chunk.range()));
                at = chunk.range().end;
            }
            // What was stuck may still be on its way for a moment.
            Err(error) => assert!(matches!(error, Error::Timeout { .. } | Error::Cancelled { .. }), "{error}"),
        }
    }
}

#[test]
fn a_dropped_reader_leaves_what_is_in_flight_to_itself() {
    let stuck = StuckStorage::new(disk(MIB));
    let gds = impatient(&simulated(), &stuck);
    let mut reader = gds.reader("/f").unwrap();
    while reader.read(64 * KIB).unwrap().is_some_and(|chunk| chunk.range().end < 300_000) {}
    stuck.gate.close();
    let _ = reader.read(64 * KIB);
    drop(reader);
    stuck.gate.open();
    let mut again = gds.reader("/f").unwrap();
    assert!(again.read(100).unwrap().unwrap().to_host().unwrap() == bytes(0..100));
}

#[test]
fn an_empty_file_and_the_end_are_none() {
    let gds = context(&Device::host(), &disk(0));
    let mut reader = gds.reader("/f").unwrap();
    assert!(reader.read(10).unwrap().is_none() && reader.read_at(5, 10).unwrap().is_none());
    assert!(gds.reader("/none").is_err());
    assert_eq!(SlotState::default(), SlotState::Idle);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn any_reads_show_the_bytes_of_the_file(
        slots in 1usize..5,
        outstanding in 1usize..4,
        distance in 0u64..5,
        len in 1u64..600_000,
        reads in prop::collection::vec((0u8..3, 0u64..700_000, 1u64..150_000), 1..40),
    ) {
        let config = GdsConfig {
            prefetch_slots: slots, max_outstanding_io: outstanding, prefetch_distance: distance * 64 * KIB, ..config()
        };
        let gds = builder(&Device::host(), disk(len), config).build().unwrap();
        let mut reader = gds.reader("/f").unwrap();
        let mut last = 0u64;
        for (kind, offset, want) in reads {
            let (offset, chunk) = match kind {
                0 => (offset, reader.read_at(offset, want).unwrap()),
                1 => {
                    last = last.saturating_sub(70_000);
                    (last, reader.read_at(last, want).unwrap())
                }
                _ => (reader.position(), reader.read(want).unwrap()),
            };
            match chunk {
                None => prop_assert!(offset >= len),
                Some(chunk) => {
                    last = offset;
                    let range = chunk.range();
                    prop_assert!(range.start == offset && range.end <= (offset + want).min(len) && range.end > offset);
                    prop_assert!(chunk.to_host().unwrap() == bytes(range));
                }
            }
        }
    }
}
