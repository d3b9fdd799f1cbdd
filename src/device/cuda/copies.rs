//! Copies between device memory and host memory on a stream of their own. It knows no file and no key; it is where slots
//! are handed to the hardware, and where it is made true that nothing is touched or freed under it.
//!
//! # Invariants
//! - A slot whose copy was enqueued is busy until its event has passed; nobody reads, writes or reuses it before.
//! - The device memory is shared by the copies, and kept for ever if the driver cannot say that they are done.
//! - A stream goes back to its device only when it is idle and healthy.

use std::any::Any;
use std::mem;
use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;

use super::error::CudaError;
use super::kernels::{Kernels, RawCopy};
use super::mapped::PinnedMap;
use super::memory::CudaMemory;
use super::stream::Stream;
use crate::device::staging::{BusySlot, Slot};
use crate::error::Result;

/// From this many copies on, one kernel is faster than the copy engine: each copy costs it, and the caller, some 2 µs.
pub(in crate::device) const GATHER_MIN: usize = 8;

/// What each copy of a gather takes of the slot.
pub(in crate::device) const TABLE_ENTRY_BYTES: usize = size_of::<RawCopy>();

/// A stream lent to the copies of one run of device memory. Several threads may enqueue at the same time; the copies run
/// one after another. Dropping it waits for them.
pub(in crate::device) struct Copies {
    memory: Arc<CudaMemory>,
    /// Taken at the end, when it goes back to the device.
    stream: Option<Stream>,
    /// What copies start from beside slots, kept until they are done.
    sources: Mutex<Vec<Arc<dyn Any + Send + Sync>>>,
}

impl Copies {
    /// Lends a stream for copies to and from `memory`.
    pub(in crate::device) fn new(memory: &Arc<CudaMemory>) -> Result<Copies> {
        let stream = memory.device().lend_stream()?;
        Ok(Copies { memory: Arc::clone(memory), stream: Some(stream), sources: Mutex::default() })
    }

    /// Enqueues copies of several ranges of a slot, each to an offset of the memory. The slot returns to its ring when they
    /// are done. Where there are many, a kernel makes them, told by a table at the slot's end: it needs
    /// [`TABLE_ENTRY_BYTES`] for each there, in bytes that no range covers.
    ///
    /// # Panics
    /// If a range lies outside the slot, or its bytes outside the memory.
    pub(in crate::device) fn upload_all(&self, mut slot: Slot, copies: &[(Range<usize>, u64)]) -> Result<()> {
        let enqueued = match self.gather_table(&mut slot, copies) {
            // SAFETY: the table lies in the slot, which `handed_over` keeps from everyone until the kernel is done, as do the
            // ranges that it names; the targets lie in memory that `self` shares.
            Some((kernels, table)) => unsafe { kernels.gather(self.stream(), table, copies.len() as u32) },
            // SAFETY: `handed_over` keeps the slot from everyone until the copies are done.
            None => unsafe { self.enqueue(&slot, copies) },
        };
        self.handed_over("copy to the device", slot, enqueued).map(drop)
    }

    /// Copies several ranges of a slot, each to an offset of the memory, calls `meanwhile` with the slot, and waits until they
    /// are there.
    ///
    /// # Panics
    /// As [`upload_all`](Self::upload_all).
    pub(in crate::device) fn upload_and_finish(
        self,
        slot: Slot,
        copies: &[(Range<usize>, u64)],
        meanwhile: impl FnOnce(&[u8]),
    ) -> Result<()> {
        // A local: should `meanwhile` panic, it goes before the slot, and waits for the stream.
        let mut copier = self;
        // SAFETY: the slot is held until the stream was waited for, or lost.
        let enqueued = unsafe { copier.enqueue(&slot, copies) };
        meanwhile(&slot);
        let settled = copier.settle();
        let outcome =
            enqueued.and(settled).map_err(|error| copier.memory.device().context().error("copy to the device", error));
        if let (Err(error), Err(_)) = (&outcome, settled) {
            slot.abandon(error);
        }
        outcome
    }

    /// Enqueues a copy of each range of a slot.
    ///
    /// # Safety
    /// Nobody touches the slot until the stream has passed the copies.
    unsafe fn enqueue(&self, slot: &Slot, copies: &[(Range<usize>, u64)]) -> Result<(), CudaError> {
        copies.iter().filter(|(range, _)| !range.is_empty()).try_for_each(|(range, offset)| {
            let bytes = &slot[range.clone()];
            let target = self.address(*offset, bytes.len());
            // SAFETY: the target lies in memory that `self` shares until the copies are done, the source in the slot, for
            // which the caller answers. Both ranges were just checked.
            unsafe { self.stream().copy_to_device(target, bytes.as_ptr(), bytes.len()) }
        })
    }

    /// Enqueues a copy of a range of pinned pages to `offset` of the memory. They stay pinned until it is done.
    ///
    /// # Panics
    /// If the range lies outside what is pinned, or the bytes outside the memory.
    pub(in crate::device) fn upload_pinned(
        &self,
        source: &Arc<PinnedMap>,
        range: &Range<usize>,
        offset: u64,
    ) -> Result<()> {
        let (bytes, target) = (source.address(range), self.address(offset, range.len()));
        self.sources.lock().push(Arc::<PinnedMap>::clone(source));
        // SAFETY: the target lies in memory that `self` shares until the copies are done, the source in pages that stay
        // mapped and pinned as long; both ranges were just checked. Nobody writes to a mapping for reading.
        unsafe { self.stream().copy_to_device(target, bytes, range.len()) }
            .map_err(|error| self.memory.device().context().error("copy to the device", error))
    }

    /// Enqueues a copy of a range of other memory of the same device to `offset` of this one's.
    ///
    /// # Panics
    /// If the memory is another device's, or a range lies outside of its memory.
    pub(in crate::device) fn bring(&self, source: &Arc<CudaMemory>, range: &Range<u64>, offset: u64) -> Result<()> {
        assert!(std::ptr::eq(source.device(), self.memory.device()), "a copy between two devices");
        let len = usize::try_from(range.end - range.start).expect("device memory fits the address space");
        let (from, target) = (address_in(source, range.start, len), self.address(offset, len));
        self.sources.lock().push(Arc::<CudaMemory>::clone(source));
        // SAFETY: both ranges were just checked, and lie in memory that is shared until the copies are done. The caller
        // borrows the source, so nobody writes to it, and has the target to himself.
        unsafe { self.stream().copy_on_device(target, from, len) }
            .map_err(|error| self.memory.device().context().error("copy on the device", error))
    }

    /// Writes the table of a gather to the end of a slot; `None` where copies are better, or all that is to be had.
    fn gather_table(&self, slot: &mut Slot, copies: &[(Range<usize>, u64)]) -> Option<(&'static Kernels, u64)> {
        let start = slot.len().checked_sub(copies.len() * TABLE_ENTRY_BYTES)? / 8 * 8;
        if copies.len() < GATHER_MIN || copies.iter().any(|(range, _)| range.end > start) {
            return None;
        }
        let base = slot.device_address()?;
        // Why they are not there was logged when the transfer was planned.
        let kernels = self.memory.device().kernels().ok()?;
        let table = copies.iter().flat_map(|(range, offset)| {
            let target = self.address(*offset, range.len());
            [base + range.start as u64, target, range.len() as u64]
        });
        for (place, number) in slot[start..].as_chunks_mut().0.iter_mut().zip(table) {
            *place = number.to_le_bytes();
        }
        Some((kernels, base + start as u64))
    }

    /// Enqueues a copy of `len` bytes at `offset` of the memory to the start of a slot.
    ///
    /// # Panics
    /// If `len` is more than the slot holds, or the bytes lie outside the memory.
    pub(in crate::device) fn download(&self, mut slot: Slot, offset: u64, len: usize) -> Result<BusySlot> {
        let bytes = &mut slot[..len];
        let source = self.address(offset, bytes.len());
        // SAFETY: the source lies in memory that `self` shares until the copies are done, the target in `slot`, which
        // `handed_over` keeps from everyone until then. Both ranges were just checked.
        let enqueued = unsafe { self.stream().copy_to_host(bytes.as_mut_ptr(), source, bytes.len()) };
        self.handed_over("copy from the device", slot, enqueued)
    }

    /// Copies any host bytes to `offset` of the memory and waits until they are there.
    pub(in crate::device) fn write(self, offset: u64, bytes: &[u8]) -> Result<()> {
        let target = self.address(offset, bytes.len());
        // SAFETY: both ranges are valid (the one checked, the other a slice) and `finish` waits for the copy before the
        // borrow of `bytes` ends. If it cannot, the driver has lost the device, and with it the copy.
        let enqueued = unsafe { self.stream().copy_to_device(target, bytes.as_ptr(), bytes.len()) };
        self.finish_one("copy to the device", enqueued)
    }

    /// Copies from `offset` of the memory into any host memory and waits until the bytes are there.
    pub(in crate::device) fn read(self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let source = self.address(offset, bytes.len());
        // SAFETY: as in `write`.
        let enqueued = unsafe { self.stream().copy_to_host(bytes.as_mut_ptr(), source, bytes.len()) };
        self.finish_one("copy from the device", enqueued)
    }

    /// Waits until every copy is done; any that failed is the error.
    pub(in crate::device) fn finish(mut self) -> Result<()> {
        self.settle().map_err(|error| self.memory.device().context().error("wait for copies", error))
    }

    /// The end of a blocking copy: what failed first, the enqueuing or the copy.
    fn finish_one(mut self, action: &'static str, enqueued: Result<(), CudaError>) -> Result<()> {
        let settled = self.settle();
        enqueued.and(settled).map_err(|error| self.memory.device().context().error(action, error))
    }

    /// Marks the end of an enqueued copy and makes the slot busy until then. Where the copy was refused, or cannot be
    /// marked, waits until the hardware is surely done with the slot; where not even that can be known, the slot is lost.
    fn handed_over(&self, action: &'static str, slot: Slot, enqueued: Result<(), CudaError>) -> Result<BusySlot> {
        match enqueued.and_then(|()| self.stream().record(slot.event())) {
            Ok(()) => Ok(slot.into_busy()),
            Err(error) => {
                let error = self.memory.device().context().error(action, error);
                if self.stream().synchronize().is_err() {
                    slot.abandon(&error);
                }
                Err(error)
            }
        }
    }

    /// Waits for every copy, then gives the stream back. Where the driver cannot say that they are done, the stream and the
    /// memory are never freed.
    fn settle(&mut self) -> Result<(), CudaError> {
        let Some(stream) = self.stream.take() else { return Ok(()) };
        match stream.synchronize() {
            Ok(()) => self.memory.device().take_stream_back(stream),
            Err(error) => {
                mem::forget(stream);
                mem::forget(Arc::clone(&self.memory));
                mem::forget(mem::take(self.sources.get_mut()));
                return Err(error);
            }
        }
        Ok(())
    }

    fn stream(&self) -> &Stream {
        self.stream.as_ref().expect("the stream is taken only by the last use of the copies")
    }

    /// The address of `len` bytes at `offset`, which lie in the memory.
    fn address(&self, offset: u64, len: usize) -> u64 {
        address_in(&self.memory, offset, len)
    }
}

/// The address of `len` bytes at `offset` of some memory, which lie in it.
fn address_in(memory: &CudaMemory, offset: u64, len: usize) -> u64 {
    let end = offset.checked_add(len as u64);
    assert!(end.is_some_and(|end| end <= memory.len_bytes()), "a copy past the end of device memory");
    memory.address() + offset
}

impl Drop for Copies {
    fn drop(&mut self) {
        if let Err(error) = self.settle() {
            self.memory.device().context().log("wait for copies", error);
        }
    }
}
