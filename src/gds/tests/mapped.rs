//! Mapped regions.

use super::*;
use crate::error::Error;
use crate::gds::MappedRegion;
use crate::io::fixtures::{bytes, disk};
use crate::storage::Caching;
use crate::storage::OpenMode;
use crate::storage::sim::{Fault, FaultKind, OpKind};
use proptest::prelude::*;
use std::path::Path;

/// Room for four regions of 64 KiB.
fn small(device: &Device, disk: &SimStorage) -> GdsContext {
    let config = GdsConfig { prefetch_slots: 2, ..config() };
    assert_eq!(config.total_gpu_memory(), 256 * KIB);
    builder(device, disk.clone(), config).build().unwrap()
}

fn shown(region: &MappedRegion) -> Vec<u8> {
    let mut bytes = vec![0; region.len_bytes() as usize];
    region.read(0, &mut bytes).unwrap();
    bytes
}

fn on_disk(disk: &SimStorage) -> Vec<u8> {
    let file = disk.open(Path::new("/f"), OpenMode::Read).unwrap();
    let mut bytes = vec![0; file.facts().unwrap().len_bytes as usize];
    crate::storage::read_exact_at(&*file, &mut bytes, 0, Caching::Buffered).unwrap();
    bytes
}

#[test]
fn a_region_shows_the_file_and_changes_reach_it_with_a_flush() {
    for device in devices() {
        let disk = disk(MIB);
        let gds = small(&device, &disk);
        let region = gds.regions().map_region("/f", 5000..9000).unwrap();
        assert!(shown(&region) == bytes(5000..9000));
        assert_eq!(region.device_ptr().is_some(), !device.is_host());
        let same = gds.regions().map_region("/f", 4096..8192).unwrap();
        region.write(100, b"changed").unwrap();
        let mut seen = [0; 7];
        same.read(5100 - 4096, &mut seen).unwrap();
        assert_eq!(&seen, b"changed", "both show one region");
        assert!(on_disk(&disk) == bytes(0..MIB));
        assert_eq!(gds.regions().flush("/other").unwrap(), 0);
        assert_eq!(gds.regions().flush("/f").unwrap(), 8192, "the region, from block to block");
        assert_eq!(gds.regions().flush_all().unwrap(), 0);
        let mut expected = bytes(0..MIB);
        expected[5100..5107].copy_from_slice(b"changed");
        assert!(on_disk(&disk) == expected);
        let stats = gds.regions().stats();
        assert_eq!((stats.regions, stats.hits, stats.misses, stats.mapped_bytes), (1, 1, 1, 8192));
    }
}

#[test]
fn the_region_unused_for_longest_goes_first_and_is_flushed_before() {
    let disk = disk(MIB);
    let gds = small(&Device::host(), &disk);
    let map = |n: u64| gds.regions().map_region("/f", n * 64 * KIB..(n + 1) * 64 * KIB).unwrap();
    for n in 0..4 {
        map(n).write(0, &[0xAB; 10]).unwrap();
    }
    map(0).touch();
    map(4);
    let stats = gds.regions().stats();
    assert_eq!((stats.regions, stats.evictions, stats.flushed_bytes, stats.dirty), (4, 1, 64 * KIB, 3));
    let found = on_disk(&disk);
    assert_eq!(found[64 << 10..][..10], [0xAB; 10], "the second region was the coldest");
    assert!(found[..10] == bytes(0..10), "the first was touched");
    assert_eq!(gds.regions().unmap_all().unwrap(), 0);
    assert_eq!(gds.regions().stats().mapped_bytes, 0);
    assert_eq!(on_disk(&disk)[..10], [0xAB; 10]);
}

#[test]
fn a_flush_that_fails_keeps_the_region_and_its_changes() {
    for (kind, op) in [(FaultKind::Eio, OpKind::Write), (FaultKind::FailedSync, OpKind::Sync)] {
        let disk = disk(MIB);
        let gds = small(&Device::host(), &disk);
        let map = |n: u64| gds.regions().map_region("/f", n * 64 * KIB..(n + 1) * 64 * KIB);
        for n in 0..4 {
            map(n).unwrap().write(3, b"precious").unwrap();
        }
        disk.inject(Fault::new(kind, 0).on(op).from_then_on());
        assert!(map(4).is_err(), "no room can be made");
        assert!(gds.regions().flush_all().is_err() && gds.regions().unmap_all().is_err());
        let stats = gds.regions().stats();
        assert_eq!((stats.regions, stats.dirty, stats.evictions), (4, 4, 0));
        assert_eq!(shown(&map(0).unwrap())[3..11], *b"precious");
        disk.clear_faults();
        map(4).unwrap();
        assert_eq!(gds.regions().unmap_all().unwrap(), 0);
        for n in 0..4 {
            assert_eq!(on_disk(&disk)[n * (64 << 10) + 3..][..8], *b"precious");
        }
    }
}

#[test]
fn what_is_held_stays_mapped() {
    let disk = disk(MIB);
    let gds = small(&Device::host(), &disk);
    let held: Vec<_> =
        (0..3).map(|n| gds.regions().map_region("/f", n * 64 * KIB..(n + 1) * 64 * KIB).unwrap()).collect();
    let error = gds.regions().map_region("/f", 512 * KIB..641 * KIB).unwrap_err();
    assert!(matches!(error, Error::RegionMemory { needed, available } if needed > available), "{error}");
    let error = gds.regions().map_region("/f", 0..65 * KIB).unwrap_err();
    assert!(matches!(error, Error::RegionInUse { region_start: 0, region_end: 65_536, .. }), "{error}");
    assert_eq!(gds.regions().unmap_all().unwrap(), 3);
    let clone = held[0].clone();
    drop(held);
    assert_eq!(gds.regions().unmap_all().unwrap(), 1);
    assert!(shown(&clone) == bytes(0..64 * KIB));
    drop(clone);
    // A longer request than the region at the same offset gets all of its bytes.
    let longer = gds.regions().map_region("/f", 0..100 * KIB).unwrap();
    assert!(shown(&longer) == bytes(0..100 * KIB));
}

#[test]
fn what_cannot_be_mapped_is_refused() {
    let disk = disk(10_000);
    let gds = small(&Device::host(), &disk);
    let error = gds.regions().map_region("/f", 9000..10_001).unwrap_err();
    assert!(matches!(error, Error::FileTooShort { needed_bytes: 10_001, len_bytes: 10_000, .. }), "{error}");
    #[expect(clippy::reversed_empty_ranges, reason = "that is what is refused")]
    for range in [5..5, 9..5] {
        assert!(matches!(gds.regions().map_region("/f", range), Err(Error::InvalidOption { .. })));
    }
    assert!(gds.regions().map_region("/none", 0..1).is_err());
    let region = gds.regions().map_region("/f", 9000..10_000).unwrap();
    assert!(region.read(999, &mut [0; 2]).is_err() && region.write(u64::MAX, &[1]).is_err());
    region.write(999, &[42]).unwrap();
    drop(region);
    gds.regions().flush_all().unwrap();
    assert_eq!(gds.len_bytes("/f").unwrap(), 10_000, "a flush never makes a file longer");
    assert_eq!(on_disk(&disk)[9999], 42);
}

#[test]
fn a_stuck_flush_does_not_hang_who_writes() {
    let stuck = StuckStorage::new(disk(MIB));
    let gds = impatient(&Device::host(), &stuck);
    let region = gds.regions().map_region("/f", 0..4096).unwrap();
    region.write(0, b"first").unwrap();
    stuck.gate.close();
    assert!(matches!(gds.regions().flush_all(), Err(Error::Timeout { .. })));
    assert!(matches!(region.write(0, b"later"), Err(Error::Timeout { .. })));
    assert_eq!(gds.regions().stats().dirty, 1);
    stuck.gate.open();
    while region.write(0, b"later").is_err() {}
    while gds.regions().flush_all().is_err() {}
    assert_eq!(on_disk(&stuck.disk)[..5], *b"later");
}

#[test]
fn threads_that_map_the_same_range_share_one_region() {
    let disk = disk(MIB);
    let gds = context(&simulated(), &disk);
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let gds = gds.clone();
            scope.spawn(move || {
                for n in 0..40u64 {
                    let start = (n * 7 + thread) % 12 * 64 * KIB;
                    let region = gds.regions().map_region("/f", start..start + 64 * KIB).unwrap();
                    assert!(shown(&region) == bytes(start..start + 64 * KIB));
                }
            });
        }
    });
    let stats = gds.regions().stats();
    assert_eq!((stats.hits + stats.misses, stats.pinned_bytes), (160, 0));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn any_calls_keep_the_file_as_a_plain_vector(
        gpu: bool,
        len in 1u64..200_000,
        steps in prop::collection::vec((0u8..8, 0u64..200_000, 1u64..90_000, any::<u8>()), 1..40),
    ) {
        let disk = disk(len);
        let device = if gpu { simulated() } else { Device::host() };
        let gds = small(&device, &disk);
        let mut model = bytes(0..len);
        let mut held: Option<MappedRegion> = None;
        for (kind, start, want, value) in steps {
            let range = start..start + want;
            match kind {
                0 => drop(gds.regions().flush_all().unwrap()),
                1 => drop(gds.regions().unmap_all().unwrap()),
                2 => held = None,
                _ => match gds.regions().map_region("/f", range.clone()) {
                    Ok(region) => {
                        let bounds = range.start as usize..range.end as usize;
                        prop_assert!(shown(&region) == model[bounds.clone()]);
                        if kind > 4 {
                            region.write(0, &vec![value; want as usize]).unwrap();
                            model[bounds].fill(value);
                        }
                        if kind == 7 { held = Some(region); }
                    }
                    Err(Error::FileTooShort { .. }) => prop_assert!(range.end > len),
                    Err(Error::RegionInUse { .. } | Error::RegionMemory { .. }) => prop_assert!(held.is_some()),
                    Err(error) => prop_assert!(false, "{error}"),
                },
            }
            if let Some(held) = &held {
                let range = held.range();
                prop_assert!(shown(held) == model[range.start as usize..range.end as usize]);
            }
            prop_assert!(gds.regions().stats().mapped_bytes <= 256 * KIB);
        }
        gds.regions().unmap_all().unwrap();
        prop_assert!(on_disk(&disk) == model);
    }
}
