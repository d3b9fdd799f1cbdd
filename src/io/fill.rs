//! Fills a device buffer from reads of files, through the device's ring of slots: many threads read, several into one slot,
//! and whoever completes a slot hands it to the hardware in as few copies as there are runs of bytes. It knows no files:
//! who calls it reads.
//!
//! What a thread takes at once is a unit: one long read, or several short ones that lie side by side in their slot.
//!
//! # Invariants
//! - A thread that holds part of a slot waits for no slot, so threads never wait for each other's.
//! - A slot is handed on only when each of its units has returned.
//! - Memory: the slots of the ring, and some 100 bytes for each read.

use std::ops::Range;

use parking_lot::Mutex;

use super::lanes::in_lanes;
use crate::device::DeviceBuffer;
use crate::device::slab::{self, SlotPart};
use crate::device::staging::{SLOT_BYTES, Slot, Staging};
use crate::device::transfer::{Upload, table_bytes};
use crate::error::Result;

/// Short reads are taken by threads in units of about this length: taking each by itself cost five times what reading it
/// from the page cache did.
const UNIT_BYTES: usize = 128 << 10;

/// Units are made short enough that each thread gets as many as this.
const UNITS_A_LANE: usize = 4;

/// One read into a slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SlotRead {
    /// The bytes that it takes of a slot: whole blocks, at most a slot.
    pub(crate) len: usize,
    /// Those of them that go to the buffer.
    pub(crate) wanted: Range<usize>,
    /// Where in the buffer the first of those lands.
    pub(crate) target: u64,
}

/// Reads that share a slot, and where the first begins in it is 0, the next behind it, and so on.
#[derive(Debug, PartialEq, Eq)]
struct Load {
    reads: Range<usize>,
    copies: Vec<(Range<usize>, u64)>,
}

/// Reads of one load that one thread carries out, one after another.
struct Unit {
    load: usize,
    /// Its number among those of its load.
    part: usize,
    reads: Range<usize>,
}

/// Each of the reads `range`, and where its bytes are among those of all of them.
pub(crate) fn places(reads: &[SlotRead], range: Range<usize>) -> impl Iterator<Item = (usize, Range<usize>)> {
    let mut end = 0;
    range.map(move |index| {
        let start = end;
        end += reads[index].len;
        (index, start..end)
    })
}

/// Fills a buffer: calls `read` with the numbers of some reads and the bytes to fill, back to back (see [`places`]), and `check` with the
/// same once they are filled; each read once, from up to `lanes` threads. Blocks until every byte is there; a later read on any
/// stream sees it. After a failure the targets are unspecified.
///
/// # Errors
/// The first of `read`; [`Error::Device`](crate::Error::Device).
pub(crate) fn fill(
    buffer: &mut DeviceBuffer,
    reads: &[SlotRead],
    lanes: usize,
    read: impl Fn(Range<usize>, &mut [u8]) -> Result<()> + Sync,
    check: impl Fn(Range<usize>, &[u8]) + Sync,
) -> Result<()> {
    let staging = buffer.device().staging()?;
    let upload = Upload::new(buffer)?;
    if lanes <= 1 || reads.len() == 1 {
        let loads = pack(reads);
        if let [only] = &loads[..] {
            // No thread, no table, nothing to share; and the check takes no time, since the hardware copies meanwhile.
            let len = reads.iter().map(|read| read.len).sum::<usize>();
            let mut slot = staging.acquire()?;
            read(0..reads.len(), &mut slot[..len])?;
            return upload.copy_and_finish(slot, &only.copies, |slot| check(0..reads.len(), &slot[..len]));
        }
    }
    fill_through(&upload, &staging, reads, lanes, |range, bytes| {
        read(range.clone(), bytes)?;
        check(range, bytes);
        Ok(())
    })?;
    upload.finish()
}

/// Fills an upload's buffer as [`fill`] does, but for the check, and blocks only until every byte is on its way.
///
/// # Errors
/// As [`fill`].
pub(crate) fn fill_through(
    upload: &Upload<'_>,
    staging: &Staging,
    reads: &[SlotRead],
    lanes: usize,
    read: impl Fn(Range<usize>, &mut [u8]) -> Result<()> + Sync,
) -> Result<()> {
    let loads = pack(reads);
    let units = units(&loads, reads, lanes);
    // The parts of a load that nobody has taken yet; nothing before its slot was acquired.
    let parts: Vec<Mutex<Vec<Option<SlotPart>>>> = loads.iter().map(|_| Mutex::default()).collect();
    let len_of = |unit: &Unit| reads[unit.reads.clone()].iter().map(|read| read.len).sum::<usize>();
    in_lanes(units.len(), lanes, |index| {
        let unit = &units[index];
        let mut part = {
            let mut parts = parts[unit.load].lock();
            if parts.is_empty() {
                // Units begin in order: whoever comes first waits here for the slot, and the others of this load for it.
                let slot: Slot = staging.acquire()?;
                let lens = units[index - unit.part..].iter().take_while(|other| other.load == unit.load).map(len_of);
                parts.extend(slab::cut(slot, lens).into_iter().map(Some));
            }
            parts[unit.part].take().expect("every unit is taken once")
        };
        read(unit.reads.clone(), &mut part)?;
        match part.finish() {
            Some(slot) => upload.copy_all(slot, &loads[unit.load].copies),
            None => Ok(()),
        }
    })
}

/// Cuts loads into units for so many lanes.
fn units(loads: &[Load], reads: &[SlotRead], lanes: usize) -> Vec<Unit> {
    let total: usize = reads.iter().map(|read| read.len).sum();
    let enough = (total / (lanes.max(1) * UNITS_A_LANE)).min(UNIT_BYTES);
    let mut units: Vec<Unit> = Vec::new();
    for (load, of) in loads.iter().enumerate() {
        let mut part = 0;
        let mut len = 0;
        for index in of.reads.clone() {
            match units.last_mut() {
                Some(unit) if unit.load == load && len + reads[index].len <= enough => unit.reads.end = index + 1,
                _ => {
                    units.push(Unit { load, part, reads: index..index + 1 });
                    part += 1;
                    len = 0;
                }
            }
            len += reads[index].len;
        }
    }
    units
}

/// Puts reads into slots, in their order.
fn pack(reads: &[SlotRead]) -> Vec<Load> {
    let mut loads: Vec<Load> = Vec::new();
    let mut used = 0;
    for (index, read) in reads.iter().enumerate() {
        let fits = |load: &Load| used + read.len + table_bytes(load.copies.len() + 1) <= SLOT_BYTES;
        if !loads.last().is_some_and(fits) {
            loads.push(Load { reads: index..index, copies: Vec::new() });
            used = 0;
        }
        let load = loads.last_mut().expect("one was just there or made");
        let range = used + read.wanted.start..used + read.wanted.end;
        match load.copies.last_mut() {
            Some((last, target)) if last.end == range.start && *target + last.len() as u64 == read.target => {
                last.end = range.end;
            }
            _ if range.is_empty() => {}
            _ => load.copies.push((range, read.target)),
        }
        load.reads.end += 1;
        used += read.len;
    }
    loads
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{Device, simulated_gpu};
    use crate::error::Error;
    use proptest::prelude::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    proptest! {
        #[test]
        fn units_are_the_reads_in_order_and_enough_for_the_threads(
            reads in prop::collection::vec(reads(), 1..4).prop_map(|parts| parts.concat()),
            lanes in 1usize..20,
        ) {
            let loads = pack(&reads);
            let units = units(&loads, &reads, lanes);
            let total: usize = reads.iter().map(|read| read.len).sum();
            let (mut next, mut before): (usize, Option<&Unit>) = (0, None);
            for unit in &units {
                prop_assert_eq!(unit.reads.start, next);
                next = unit.reads.end;
                let within = &loads[unit.load].reads;
                prop_assert!(unit.reads.start >= within.start && unit.reads.end <= within.end);
                let part = before.filter(|before| before.load == unit.load).map_or(0, |before| before.part + 1);
                prop_assert_eq!(unit.part, part);
                let len: usize = reads[unit.reads.clone()].iter().map(|read| read.len).sum();
                prop_assert!(unit.reads.len() == 1 || len <= UNIT_BYTES.min(total / lanes / UNITS_A_LANE));
                before = Some(unit);
            }
            prop_assert_eq!(next, reads.len());
        }
    }

    /// Reads whose targets follow one another, some with a gap.
    fn reads() -> impl Strategy<Value = Vec<SlotRead>> {
        let lens = prop_oneof![3 => 1usize..5, 1 => 200usize..257];
        prop::collection::vec((lens, 0usize..4096, 0usize..4096, prop::bool::weighted(0.4)), 1..60).prop_map(|parts| {
            let mut end = 0;
            parts
                .into_iter()
                .map(|(blocks, lead, trail, joined)| {
                    let len = blocks * 4096;
                    let wanted = if joined { 0..len } else { lead.min(len - 1)..(len - trail).max(lead.min(len - 1)) };
                    let target = if joined { end } else { end + 256 };
                    end = target + wanted.len() as u64;
                    SlotRead { len, wanted, target }
                })
                .collect()
        })
    }

    fn byte(read: usize, at: usize) -> u8 {
        (read * 131 + at + at / 251) as u8
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn every_wanted_byte_is_copied_once_from_where_it_was_read(reads in reads()) {
            let mut expected = 0;
            for load in pack(&reads) {
                prop_assert_eq!(load.reads.start, expected);
                expected = load.reads.end;
                let (mut used, mut from) = (0, Vec::new());
                for read in &reads[load.reads.clone()] {
                    from.extend(read.wanted.clone().map(|at| (used + at, read.target + (at - read.wanted.start) as u64)));
                    used += read.len;
                }
                prop_assert!(used + table_bytes(load.copies.len()) <= SLOT_BYTES);
                let copied: Vec<(usize, u64)> =
                    load.copies.iter().flat_map(|(range, target)| range.clone().zip(*target..)).collect();
                prop_assert!(copied == from);
            }
            prop_assert_eq!(expected, reads.len());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn a_buffer_is_filled_whatever_the_device_and_the_threads(reads in reads(), lanes in 1usize..6, on_gpu: bool) {
            let device = if on_gpu { simulated_gpu() } else { Device::host() };
            let last = reads.last().unwrap();
            let mut expected = vec![7; (last.target as usize) + last.wanted.len() + 9];
            let mut buffer = device.allocate(expected.len() as u64).unwrap();
            buffer.copy_from_host(0, &expected).unwrap();
            let calls = AtomicUsize::new(0);
            let checked = AtomicUsize::new(0);
            fill(&mut buffer, &reads, lanes, |range, bytes| {
                for (index, at) in places(&reads, range) {
                    let bytes = &mut bytes[at];
                    calls.fetch_add(1, Ordering::Relaxed);
                    assert_eq!(bytes.len(), reads[index].len);
                    bytes.iter_mut().enumerate().for_each(|(at, place)| *place = byte(index, at));
                }
                Ok(())
            }, |range, bytes| {
                for (index, at) in places(&reads, range) {
                    let bytes = &bytes[at];
                    checked.fetch_add(1, Ordering::Relaxed);
                    assert!(bytes.iter().enumerate().all(|(at, &found)| found == byte(index, at)));
                }
            }).unwrap();
            prop_assert_eq!(calls.into_inner(), reads.len());
            prop_assert_eq!(checked.into_inner(), reads.len());
            for (index, read) in reads.iter().enumerate() {
                for (at, place) in read.wanted.clone().zip(&mut expected[read.target as usize..]) {
                    *place = byte(index, at);
                }
            }
            let mut found = vec![0; expected.len()];
            buffer.copy_to_host(0, &mut found).unwrap();
            prop_assert!(found == expected);
        }
    }

    #[test]
    fn a_failed_read_ends_it_and_gives_every_slot_back() {
        for device in [Device::host(), simulated_gpu()] {
            let reads: Vec<SlotRead> =
                (0..40).map(|n| SlotRead { len: 1 << 20, wanted: 0..1 << 20, target: n << 20 }).collect();
            let mut buffer = device.allocate(40 << 20).unwrap();
            for failing in [0, 1, 17, 39] {
                let read = |range: Range<usize>, bytes: &mut [u8]| {
                    bytes[0] = 1;
                    if range.contains(&failing) { Err(Error::Closed) } else { Ok(()) }
                };
                let outcome = fill(&mut buffer, &reads, 4, read, |_, _| {});
                assert!(matches!(outcome, Err(Error::Closed)));
            }
            let staging = device.staging().unwrap();
            let slots: Vec<Slot> = (0..crate::device::staging::SLOTS).map(|_| staging.acquire().unwrap()).collect();
            drop(slots);
        }
    }
}
