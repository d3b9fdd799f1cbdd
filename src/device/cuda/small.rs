//! Small runs of device memory, cut from slabs: taking and freeing one from the driver costs 75 µs, more than a small value
//! takes to be read from a fast disk. It decides which bytes of which slab; `memory` takes slabs from the driver and gives
//! them back.
//!
//! # Invariants
//! - Runs do not overlap: a run is handed out once until it comes back.
//! - What is kept beyond what is handed out: the rest of each slab in use, and one empty slab.

use std::collections::BTreeMap;

use super::driver::CUdeviceptr;

/// The memory that is taken from the driver at once: the unit in which it hands memory out by itself.
pub(super) const SLAB_BYTES: u64 = 2 << 20;

/// The longest run that is cut from a slab: two of them, or one, take what the driver would for as many allocations.
pub(super) const SMALL_BYTES_MAX: u64 = SLAB_BYTES;

/// The shortest: what an allocation of the driver is aligned to.
const CLASS_BYTES_MIN: u64 = 512;

/// Which runs of which slabs are free. Every slab is cut into runs of one length, a power of two.
#[derive(Debug, Default)]
pub(super) struct Slabs {
    /// By the first address.
    slabs: BTreeMap<CUdeviceptr, Slab>,
    /// For each class, the slabs that have a free run.
    with_room: [Vec<CUdeviceptr>; CLASSES],
    /// A slab in which nothing is.
    spare: Option<CUdeviceptr>,
}

#[derive(Debug)]
struct Slab {
    class: usize,
    /// The offsets of the free runs.
    free: Vec<u32>,
}

const CLASSES: usize = (SMALL_BYTES_MAX / CLASS_BYTES_MIN).ilog2() as usize + 1;

/// The class of a length, which is at most [`SMALL_BYTES_MAX`].
fn class_of(len_bytes: u64) -> usize {
    len_bytes.max(CLASS_BYTES_MIN).next_power_of_two().ilog2() as usize - CLASS_BYTES_MIN.ilog2() as usize
}

fn class_bytes(class: usize) -> u64 {
    CLASS_BYTES_MIN << class
}

impl Slabs {
    /// A free run for so many bytes; `None` where a slab has to be [added](Self::add) first.
    pub(super) fn take(&mut self, len_bytes: u64) -> Option<CUdeviceptr> {
        let class = class_of(len_bytes);
        if self.with_room[class].is_empty() {
            let spare = self.spare.take()?;
            self.cut(spare, class);
        }
        let &address = self.with_room[class].last()?;
        let slab = self.slabs.get_mut(&address).expect("a slab with room is known");
        let offset = slab.free.pop().expect("a slab with room has a free run");
        if slab.free.is_empty() {
            self.with_room[class].pop();
        }
        Some(address + u64::from(offset))
    }

    /// Takes a slab in, in which nothing is. A second spare one is handed back.
    pub(super) fn add(&mut self, address: CUdeviceptr) -> Option<CUdeviceptr> {
        self.spare.replace(address)
    }

    /// A run of that many bytes comes back. Answers a slab to be freed: it is empty, and another one is spare.
    pub(super) fn give_back(&mut self, run: CUdeviceptr) -> Option<CUdeviceptr> {
        let (&address, slab) = self.slabs.range_mut(..=run).next_back().expect("a run lies in a slab");
        let (class, runs) = (slab.class, SLAB_BYTES / class_bytes(slab.class));
        slab.free.push(u32::try_from(run - address).expect("a slab is short"));
        let free = slab.free.len() as u64;
        if free == 1 {
            self.with_room[class].push(address);
        }
        if free < runs {
            return None;
        }
        self.slabs.remove(&address);
        self.with_room[class].retain(|&slab| slab != address);
        self.add(address)
    }

    fn cut(&mut self, address: CUdeviceptr, class: usize) {
        let step = class_bytes(class) as usize;
        // The first to go out is the first in memory.
        let free = (0..SLAB_BYTES as u32).step_by(step).rev().collect();
        self.slabs.insert(address, Slab { class, free });
        self.with_room[class].push(address);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn runs_never_overlap_and_empty_slabs_are_freed(
            calls in prop::collection::vec((any::<bool>(), 0..=SMALL_BYTES_MAX, any::<prop::sample::Index>()), 1..400),
        ) {
            let mut slabs = Slabs::default();
            let mut held: Vec<(u64, u64)> = Vec::new();
            let mut owned: Vec<u64> = Vec::new();
            let mut next = 1 << 40;
            let mut ever = 0;
            for (take, len, which) in calls {
                if take || held.is_empty() {
                    let run = slabs.take(len).unwrap_or_else(|| {
                        owned.push(next);
                        assert_eq!(slabs.add(next), None);
                        next += 3 * SLAB_BYTES;
                        slabs.take(len).expect("there is a spare slab")
                    });
                    prop_assert!(owned.iter().any(|&slab| run >= slab && run + len <= slab + SLAB_BYTES));
                    prop_assert!(held.iter().all(|&(start, end)| run + len.max(1) <= start || end <= run));
                    prop_assert_eq!(run % CLASS_BYTES_MIN, 0);
                    held.push((run, run + len.max(1)));
                } else {
                    let (run, _) = held.swap_remove(which.index(held.len()));
                    if let Some(freed) = slabs.give_back(run) {
                        prop_assert!(held.iter().all(|&(start, _)| start < freed || start >= freed + SLAB_BYTES));
                        owned.retain(|&slab| slab != freed);
                    }
                }
                ever = ever.max(owned.len());
            }
            for (run, _) in held.drain(..) {
                if let Some(freed) = slabs.give_back(run) {
                    owned.retain(|&slab| slab != freed);
                }
            }
            prop_assert!(owned.len() == 1, "one spare slab is all that is left of {ever}");
        }
    }
}
