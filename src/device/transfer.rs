//! Transfers between staging slots and one buffer: [`Upload`] fills it, [`Download`] reads it. They neither read files nor
//! choose slots; who does keeps taking slots from [`Staging`](super::staging::Staging) and handing them over here.
//!
//! On a GPU a handed-over slot is copied while the caller goes on; on the host it is copied at once. Both keep the same
//! rules, so that what works on the host works on a GPU.
//!
//! # Invariants
//! - A transfer borrows its buffer, and on a GPU shares its memory: whatever becomes of the transfer, the memory outlives
//!   the copies.
//! - Only [`Upload::finish`] says that the bytes are there, and it never does after any copy failed.

use std::collections::VecDeque;
use std::fmt;
use std::marker::PhantomData;
use std::mem;
use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;

use super::buffer::Memory;
use super::cuda::{Copies, GATHER_MIN, TABLE_ENTRY_BYTES};
use super::staging::{BusySlot, SLOT_BYTES, Slot, Staging};
use super::{Device, DeviceBuffer, PinnedMap};
use crate::error::{Error, Result};

/// Host buffers are locked in stripes of this length, so that threads that copy to different places seldom meet.
const STRIPE_BYTES: usize = 1 << 20;

/// Bytes on their way into a buffer. Several threads may share it; where their ranges overlap, either's bytes win.
///
/// Dropping it unfinished waits for the copies; how far they got is then unknown.
pub(crate) struct Upload<'b> {
    device: Device,
    len_bytes: u64,
    target: Target<'b>,
    /// The first copy that failed.
    failed: Mutex<Option<String>>,
}

enum Target<'b> {
    Host(Stripes<'b>),
    Cuda(Copies, PhantomData<&'b mut DeviceBuffer>),
}

impl<'b> Upload<'b> {
    /// Begins an upload. Lends one stream of a GPU.
    ///
    /// # Errors
    /// [`Error::Device`] where the driver gives no stream.
    pub(crate) fn new(buffer: &'b mut DeviceBuffer) -> Result<Upload<'b>> {
        let (device, len_bytes) = (buffer.device().clone(), buffer.len_bytes());
        let target = match buffer.memory_mut() {
            Memory::Host(memory) => Target::Host(Stripes::new(memory.bytes_mut())),
            Memory::Cuda(memory) => Target::Cuda(Copies::new(memory)?, PhantomData),
        };
        Ok(Upload { device, len_bytes, target, failed: Mutex::new(None) })
    }

    /// Copies several ranges of a slot, each to an offset of the buffer. On a GPU it only enqueues the copies (some µs), and
    /// the slot returns to its ring when they are done; many of them are faster where the slot has [`table_bytes`] to spare
    /// at its end.
    ///
    /// # Errors
    /// [`Error::Device`] where a range reaches past the buffer's end or the driver failed; the slot returns to its ring,
    /// and [`finish`](Self::finish) will fail too.
    ///
    /// # Panics
    /// If a range lies outside the slot, or the slot is of another device's ring: our own mistakes.
    pub(crate) fn copy_all(&self, slot: Slot, copies: &[(Range<usize>, u64)]) -> Result<()> {
        self.noted(self.check(&slot, copies).and_then(|()| match &self.target {
            _ if copies.iter().all(|(range, _)| range.is_empty()) => Ok(()),
            Target::Host(stripes) => {
                stripes.write_all(&slot, copies);
                Ok(())
            }
            Target::Cuda(copier, _) => copier.upload_all(slot, copies),
        }))
    }

    /// Copies several ranges of a slot like [`copy_all`](Self::copy_all), calls `meanwhile` with the slot, and waits until they
    /// are there: the quickest way for a few bytes, since the slot needs no event, and the hardware and `meanwhile` are at work at once.
    ///
    /// # Errors
    /// As [`copy_all`](Self::copy_all).
    ///
    /// # Panics
    /// As [`copy_all`](Self::copy_all).
    pub(crate) fn copy_and_finish(
        self,
        slot: Slot,
        copies: &[(Range<usize>, u64)],
        meanwhile: impl FnOnce(&[u8]),
    ) -> Result<()> {
        self.check(&slot, copies)?;
        match self.target {
            Target::Host(stripes) => {
                stripes.write_all(&slot, copies);
                meanwhile(&slot);
                Ok(())
            }
            Target::Cuda(copier, _) => copier.upload_and_finish(slot, copies, meanwhile),
        }
    }

    /// [`copy_all`](Self::copy_all) of one range.
    #[cfg(test)]
    pub(crate) fn copy(&self, slot: Slot, range: Range<usize>, offset: u64) -> Result<()> {
        self.copy_all(slot, &[(range, offset)])
    }

    /// Refuses copies that reach past the buffer's end.
    fn check(&self, slot: &Slot, copies: &[(Range<usize>, u64)]) -> Result<()> {
        assert!(slot.device() == &self.device, "a slot of {} for a buffer on {}", slot.device(), self.device);
        copies.iter().try_for_each(|(range, offset)| {
            let len = slot[range.clone()].len() as u64;
            super::check_range(&self.device, "upload", *offset, len, self.len_bytes).map(drop)
        })
    }

    /// Remembers a failure, for [`finish`](Self::finish) to tell.
    fn noted(&self, outcome: Result<()>) -> Result<()> {
        outcome.inspect_err(|error| {
            self.failed.lock().get_or_insert_with(|| error.to_string());
        })
    }

    /// Copies a range of pinned pages to `offset` of the buffer, which is on a GPU. It only enqueues the copy, and the
    /// pages stay pinned until it is done.
    ///
    /// # Errors
    /// As [`copy_all`](Self::copy_all).
    pub(crate) fn copy_pinned(&self, source: &Arc<PinnedMap>, range: &Range<usize>, offset: u64) -> Result<()> {
        let copied = super::check_range(&self.device, "upload", offset, range.len() as u64, self.len_bytes);
        self.noted(copied.and_then(|_| match &self.target {
            Target::Host(_) => unreachable!("nothing is pinned for the host"),
            Target::Cuda(copies, _) => copies.upload_pinned(source, range, offset),
        }))
    }

    /// Waits until every byte is there: a later read on any stream sees it.
    ///
    /// # Errors
    /// [`Error::Device`] where any copy failed, the first if several did. The buffer's contents are then unknown.
    pub(crate) fn finish(self) -> Result<()> {
        match self.target {
            Target::Host(_) => {}
            Target::Cuda(copies, _) => copies.finish()?,
        }
        match self.failed.into_inner() {
            None => Ok(()),
            Some(why) => Err(Error::Device { device: self.device.to_string(), action: "upload", why }),
        }
    }
}

/// What a slot should have to spare at its end for so many copies.
pub(crate) fn table_bytes(copies: usize) -> usize {
    if copies < GATHER_MIN { 0 } else { (copies * TABLE_ENTRY_BYTES).next_multiple_of(8) }
}

/// A host buffer that several threads write to.
struct Stripes<'b>(Vec<Mutex<&'b mut [u8]>>);

impl<'b> Stripes<'b> {
    fn new(bytes: &'b mut [u8]) -> Self {
        Self(bytes.chunks_mut(STRIPE_BYTES).map(Mutex::new).collect())
    }

    /// Copies ranges of a slot, each to an offset; all of them lie inside the buffer.
    fn write_all(&self, slot: &Slot, copies: &[(Range<usize>, u64)]) {
        // The offsets were checked against the length of host memory: they fit.
        copies.iter().for_each(|(range, offset)| self.write(*offset as usize, &slot[range.clone()]));
    }

    /// Copies bytes to `offset`; all of them lie inside the buffer.
    fn write(&self, mut offset: usize, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let within = offset % STRIPE_BYTES;
            let (now, later) = bytes.split_at(bytes.len().min(STRIPE_BYTES - within));
            self.0[offset / STRIPE_BYTES].lock()[within..within + now.len()].copy_from_slice(now);
            offset += now.len();
            bytes = later;
        }
    }
}

/// Bytes on their way out of a buffer.
///
/// Dropping it waits for the copies that it started.
pub(crate) struct Download<'b> {
    buffer: &'b DeviceBuffer,
    /// The stream of the copies, where the buffer is on a GPU.
    copies: Option<Copies>,
}

impl<'b> Download<'b> {
    /// Begins a download. Lends one stream of a GPU.
    ///
    /// # Errors
    /// [`Error::Device`] where the driver gives no stream.
    pub(crate) fn new(buffer: &'b DeviceBuffer) -> Result<Download<'b>> {
        let copies = match buffer.memory() {
            Memory::Host(_) => None,
            Memory::Cuda(memory) => Some(Copies::new(memory)?),
        };
        Ok(Download { buffer, copies })
    }

    /// Starts a copy of `len` bytes at `offset` of the buffer to the start of a slot. On a GPU it only enqueues the copy
    /// (some µs); the copies are done in the order in which they were started.
    ///
    /// # Errors
    /// [`Error::Device`] where the range reaches past the buffer's end or the driver failed; the slot returns to its ring.
    ///
    /// # Panics
    /// If the slot is shorter than `len`, or of another device's ring: our own mistakes.
    pub(crate) fn start(&self, mut slot: Slot, offset: u64, len: usize) -> Result<Pending<'b>> {
        let device = self.buffer.device();
        assert!(slot.device() == device, "a slot of {} for a buffer on {device}", slot.device());
        assert!(len <= slot.len(), "{len} bytes for a slot of {}", slot.len());
        let range = super::check_range(device, "download", offset, len as u64, self.buffer.len_bytes())?;
        let state = match (&self.copies, self.buffer.as_host()) {
            (Some(copies), _) if len > 0 => State::Busy(copies.download(slot, offset, len)?),
            (None, Some(bytes)) => {
                // It was just checked against the length of host memory: it fits.
                slot[..len].copy_from_slice(&bytes[range.start as usize..range.end as usize]);
                State::Done(slot)
            }
            _ => State::Done(slot),
        };
        Ok(Pending { state, buffer: PhantomData })
    }
}

/// Something that waits for the hardware, and answers with the slot that it waited for.
pub(crate) type Waiting = Box<dyn FnOnce() -> Result<Slot> + Send>;

/// How somebody waits for the hardware: by doing what it is given, or by having it done and giving up after a while with
/// [`Error::Timeout`].
pub(crate) type Wait<'w> = dyn Fn(Waiting) -> Result<Slot> + 'w;

/// Copies part of a buffer into host memory, several slots of the ring in flight. Blocks until the bytes are there, or `wait`
/// gives up: then what the copies use is kept for ever.
///
/// # Errors
/// As [`Download::start`], [`Pending::wait`] and `wait`; the target's contents are then unspecified.
pub(crate) fn download_into(buffer: &DeviceBuffer, offset: u64, target: &mut [u8], wait: &Wait<'_>) -> Result<()> {
    if let Some(bytes) = buffer.as_host() {
        let range = super::check_range(buffer.device(), "download", offset, target.len() as u64, buffer.len_bytes())?;
        target.copy_from_slice(&bytes[range.start as usize..range.end as usize]);
        return Ok(());
    }
    let staging = buffer.device().staging()?;
    let download = Download::new(buffer)?;
    let outcome = download_through(&download, &staging, offset, target, wait);
    if matches!(outcome, Err(Error::Timeout { .. })) {
        // Dropping it would wait for the copies.
        mem::forget(download);
    }
    outcome
}

fn download_through(
    download: &Download<'_>,
    staging: &Staging,
    offset: u64,
    target: &mut [u8],
    wait: &Wait<'_>,
) -> Result<()> {
    let mut pending: VecDeque<(Pending<'_>, &mut [u8])> = VecDeque::new();
    let land = |(copy, place): (Pending<'_>, &mut [u8])| -> Result<()> {
        place.copy_from_slice(&copy.wait_by(wait)?[..place.len()]);
        Ok(())
    };
    let mut at = offset;
    for place in target.chunks_mut(SLOT_BYTES) {
        // Whoever holds slots never waits for more: it lets go of its oldest first.
        let slot = loop {
            let free = if pending.len() < DOWNLOADS_IN_FLIGHT { staging.try_acquire()? } else { None };
            match free {
                Some(slot) => break slot,
                None => match pending.pop_front() {
                    Some(oldest) => land(oldest)?,
                    None => {
                        let staging = staging.clone();
                        break wait(Box::new(move || staging.acquire()))?;
                    }
                },
            }
        };
        let len = place.len();
        pending.push_back((download.start(slot, at, len)?, place));
        at += len as u64;
    }
    pending.into_iter().try_for_each(land)
}

/// How many slots one download keeps busy: enough for the bus while one is being emptied.
const DOWNLOADS_IN_FLIGHT: usize = 4;

/// A slot that is being filled from a buffer. Dropping it gives the slot back to its ring, which waits for the hardware
/// before anyone else gets it.
#[must_use = "a dropped download has nothing to show"]
pub(crate) struct Pending<'b> {
    state: State,
    buffer: PhantomData<&'b DeviceBuffer>,
}

enum State {
    Done(Slot),
    Busy(BusySlot),
}

impl Pending<'_> {
    /// Waits until the bytes are in the slot; the thread sleeps meanwhile.
    ///
    /// # Errors
    /// [`Error::Device`] where the copy failed. The ring is then lost with the GPU.
    pub(crate) fn wait(self) -> Result<Slot> {
        match self.state {
            State::Done(slot) => Ok(slot),
            State::Busy(slot) => slot.wait(),
        }
    }

    /// [`wait`](Self::wait) as somebody else does it, unless there is nothing to wait for.
    ///
    /// # Errors
    /// As [`wait`](Self::wait), and those of `wait`.
    fn wait_by(self, wait: &Wait<'_>) -> Result<Slot> {
        match self.state {
            State::Done(slot) => Ok(slot),
            State::Busy(slot) => wait(Box::new(move || slot.wait())),
        }
    }

    /// Whether [`wait`](Self::wait) would return at once.
    ///
    /// # Errors
    /// [`Error::Device`] where the driver failed.
    #[cfg(test)]
    pub(crate) fn is_done(&self) -> Result<bool> {
        match &self.state {
            State::Done(_) => Ok(true),
            State::Busy(slot) => slot.is_idle(),
        }
    }
}

impl fmt::Debug for Upload<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Upload({} bytes to {})", self.len_bytes, self.device)
    }
}

impl fmt::Debug for Download<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Download(from {:?})", self.buffer)
    }
}
