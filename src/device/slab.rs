//! The memory behind the slots of a ring: one mapping, cut into slots of equal size, pinned for a GPU. It hands every slot
//! out once and knows nothing of who uses it when. A slot that one holds can be cut, for several threads to fill.
//!
//! # Invariants
//! - A slot's bytes are reached through its one [`SlabSlot`] alone, so borrowing is as with any owned memory.
//! - The parts of a cut slot do not overlap, and the slot itself is reached by nobody until the last part is done with.
//! - The mapping is unpinned, then unmapped, after the last of its slots is dropped; a slot that is leaked keeps it.

use std::io;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::thread;

use memmap2::{MmapMut, MmapRaw};

use super::cuda::Pinned;
use super::staging::Slot;
use super::{Device, Kind, host};
use crate::error::{Error, Result};

/// Threads that touch new memory before it is pinned: the system clears about 2 GiB a second on each.
const TOUCH_THREADS: usize = 4;

/// One mapping of host memory, pinned where its device is a GPU.
struct Slab {
    // Dropped in this order: unpinned, then unmapped.
    pinned: Option<Pinned>,
    /// Never borrowed as a whole: that would be a borrow of every slot.
    map: MmapRaw,
    slot_bytes: usize,
}

/// One slot of a slab: page-aligned bytes, owned.
pub(super) struct SlabSlot {
    slab: Arc<Slab>,
    index: usize,
}

/// Maps `slots` times `slot_bytes` bytes, pins them where the device is a GPU, and hands out every slot.
pub(super) fn slots(device: &Device, slots: usize, slot_bytes: usize) -> Result<Vec<SlabSlot>> {
    let failed = |error: io::Error| Error::Device {
        device: device.to_string(),
        action: "take host memory for the staging ring",
        why: format!("{slots} slots of {slot_bytes} bytes: {error}"),
    };
    assert!(slot_bytes > 0 && slot_bytes.is_multiple_of(host::PAGE_BYTES), "slots are whole pages");
    let len = slots.checked_mul(slot_bytes).ok_or_else(|| failed(io::ErrorKind::OutOfMemory.into()))?;
    let mut map = host::map(len).map_err(failed)?;
    let pinned = match device.0 {
        // Touched when it is used, if ever.
        Kind::Host => None,
        Kind::Cuda(gpu) => {
            touch(&mut map);
            // SAFETY: the mapping stays until the slab is dropped, which unpins it first.
            Some(unsafe { gpu.pin(map.as_mut_ptr(), len) }?)
        }
    };
    let slab = Arc::new(Slab { pinned, map: map.into(), slot_bytes });
    Ok((0..slots).map(|index| SlabSlot { slab: Arc::clone(&slab), index }).collect())
}

/// Makes the system supply every page now, on several threads: pinning would have it done on one.
fn touch(map: &mut MmapMut) {
    let part = map.len().div_ceil(TOUCH_THREADS).next_multiple_of(host::PAGE_BYTES).max(host::PAGE_BYTES);
    thread::scope(|scope| {
        for bytes in map.chunks_mut(part) {
            let touch = move || bytes.iter_mut().step_by(host::PAGE_BYTES).for_each(|byte| *byte = 0);
            // Without a thread the pages come when they are pinned.
            let _ = thread::Builder::new().spawn_scoped(scope, touch);
        }
    });
}

impl SlabSlot {
    /// Where the GPU sees the slot's first byte, where it is pinned for one that says so.
    pub(super) fn device_address(&self) -> Option<u64> {
        let base = self.slab.pinned.as_ref()?.device_address()?;
        Some(base + (self.index * self.slab.slot_bytes) as u64)
    }

    fn bytes(&self) -> *mut [u8] {
        let start = self.slab.map.as_mut_ptr().wrapping_add(self.index * self.slab.slot_bytes);
        std::ptr::slice_from_raw_parts_mut(start, self.slab.slot_bytes)
    }
}

impl Deref for SlabSlot {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the slot lies in the mapping (`slots` made as many as fit), is initialised (zeroed by the system), and is
        // reached through `self` alone: `slots` handed the index out once, and nothing borrows the mapping itself.
        unsafe { &*self.bytes() }
    }
}

impl DerefMut for SlabSlot {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `&mut self` makes the borrow unique.
        unsafe { &mut *self.bytes() }
    }
}

/// A part of a slot, owned: one of several threads fills it while others fill the rest.
pub(crate) struct SlotPart {
    slot: Arc<Slot>,
    bytes: *mut [u8],
}

// SAFETY: a part is reached through its one owner, as a slot is, and a slot may be sent.
unsafe impl Send for SlotPart {}

/// Cuts a slot into parts of these lengths, from its start on. What is left over is in none of them.
///
/// # Panics
/// If the slot is shorter.
pub(crate) fn cut(mut slot: Slot, lens: impl IntoIterator<Item = usize>) -> Vec<SlotPart> {
    let (start, len) = (slot.as_mut_ptr(), slot.len());
    let slot = Arc::new(slot);
    let mut end = 0;
    lens.into_iter()
        .map(|part| {
            let at = end;
            end += part;
            assert!(end <= len, "parts longer than their slot");
            let bytes = std::ptr::slice_from_raw_parts_mut(start.wrapping_add(at), part);
            SlotPart { slot: Arc::clone(&slot), bytes }
        })
        .collect()
}

impl SlotPart {
    /// The part is done with. Whoever gives the last one back gets the slot.
    pub(crate) fn finish(self) -> Option<Slot> {
        Arc::into_inner(self.slot)
    }
}

impl Deref for SlotPart {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the bytes lie in the slot (`cut` counted them), whose memory stays where it is; nobody reaches the slot
        // while a part holds it, and no two parts overlap.
        unsafe { &*self.bytes }
    }
}

impl DerefMut for SlotPart {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `&mut self` makes the borrow unique.
        unsafe { &mut *self.bytes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_apart_aligned_and_outlive_each_other() {
        let mut slots = slots(&Device::host(), 3, 8192).unwrap();
        for (index, slot) in slots.iter_mut().enumerate() {
            assert_eq!((slot.len(), slot.as_ptr() as usize % 4096), (8192, 0));
            slot.fill(index as u8 + 1);
        }
        let last = slots.pop().unwrap();
        assert!(slots[0].iter().all(|&byte| byte == 1) && slots[1].iter().all(|&byte| byte == 2));
        drop(slots);
        assert!(last.iter().all(|&byte| byte == 3));
    }

    #[test]
    fn parts_are_filled_apart_and_the_last_one_gives_the_slot_back() {
        let ring = crate::device::staging::Staging::new(&Device::host(), 1, 16384).unwrap();
        let mut parts = cut(ring.acquire().unwrap(), [4096, 0, 8192]);
        assert!(ring.try_acquire().unwrap().is_none());
        thread::scope(|scope| {
            for (index, part) in parts.iter_mut().enumerate() {
                scope.spawn(move || part.fill(index as u8 + 1));
            }
        });
        let last = parts.pop().unwrap();
        assert!(parts.into_iter().all(|part| part.finish().is_none()));
        let slot = last.finish().expect("the last part is the slot");
        assert!(slot[..4096].iter().all(|&byte| byte == 1) && slot[4096..12288].iter().all(|&byte| byte == 3));
        // Dropped parts give it back too.
        drop(cut(slot, [1, 2]));
        assert!(ring.try_acquire().unwrap().is_some());
    }
}
