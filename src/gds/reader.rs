//! A reader of one file that fetches ahead: it carries out what the scheduler plans.
//!
//! # Invariants
//! - What is handed out lies in a slot that is neither filled nor given away while it is borrowed.
//! - A prefetch that fails is nobody's failure: the bytes are read again when they are asked for.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use super::engine::Engine;
use crate::device::DeviceBuffer;
use crate::error::{Error, Result};
use crate::io::pipeline::{Completion, IoRequest};
use crate::io::transport::{OpenFile, Piece, Progress, Transfer};
use crate::prefetch::{
    AccessPattern, Lookup, Prefetch, PrefetchOptions, PrefetchScheduler, PrefetchStats, SlotId, SlotState,
};

/// Reads one file into buffers of its own on the device, ahead of what is asked for where the reads show a pattern.
///
/// It hands out views of its buffers and copies nothing. One reader follows one pattern: use one for each thread.
pub struct PrefetchReader {
    engine: Arc<Engine>,
    file: OpenFile,
    len_bytes: u64,
    position: u64,
    scheduler: PrefetchScheduler,
    slots: Vec<Slot>,
    sender: Sender<(SlotId, Completion)>,
    completions: Receiver<(SlotId, Completion)>,
    /// What of the scheduler's counts the metrics have.
    counted: PrefetchStats,
}

#[derive(Debug, Default)]
struct Slot {
    /// `None` while an operation has it, and until it is needed.
    buffer: Option<DeviceBuffer>,
    /// Of the operation that has it.
    progress: Option<Arc<Progress>>,
}

/// Bytes of a file in memory of the device, borrowed from a [`PrefetchReader`].
#[derive(Debug, Clone)]
pub struct ReaderChunk<'r> {
    buffer: &'r DeviceBuffer,
    range: Range<u64>,
    buffer_offset: u64,
}

impl<'r> ReaderChunk<'r> {
    /// Which bytes of the file these are.
    pub fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    /// How many they are, at least one.
    pub fn len_bytes(&self) -> u64 {
        self.range.end - self.range.start
    }

    /// The buffer that they lie in, at [`buffer_offset`](Self::buffer_offset).
    pub fn buffer(&self) -> &'r DeviceBuffer {
        self.buffer
    }

    /// Where in the buffer they begin.
    pub fn buffer_offset(&self) -> u64 {
        self.buffer_offset
    }

    /// The address of the first byte in the GPU's memory; `None` on the host.
    pub fn device_ptr(&self) -> Option<u64> {
        self.buffer.device_ptr().map(|address| address + self.buffer_offset)
    }

    /// The bytes, where the device is the host.
    pub fn as_host(&self) -> Option<&'r [u8]> {
        // They lie in the buffer, so on the host both ends fit.
        let (start, len) = (self.buffer_offset as usize, self.len_bytes() as usize);
        self.buffer.as_host().map(|bytes| &bytes[start..start + len])
    }

    /// Copies the bytes to the host.
    ///
    /// # Errors
    /// [`Error::Device`] where the driver failed.
    pub fn to_host(&self) -> Result<Vec<u8>> {
        let len = usize::try_from(self.len_bytes()).expect("a buffer's bytes fit the address space of who reads them");
        let mut bytes = vec![0; len];
        self.buffer.copy_to_host(self.buffer_offset, &mut bytes)?;
        Ok(bytes)
    }
}

impl PrefetchReader {
    pub(super) fn new(engine: Arc<Engine>, file: OpenFile) -> Result<Self> {
        let config = &engine.config;
        let options =
            PrefetchOptions::new(config.prefetch_slots, config.buffer_size, config.prefetch_distance, config.alignment);
        let slots = (0..config.prefetch_slots).map(|_| Slot::default()).collect();
        let (sender, completions) = channel();
        let len_bytes = engine.len_bytes(&file)?;
        let (scheduler, counted) = (PrefetchScheduler::new(options), PrefetchStats::default());
        Ok(Self { engine, file, len_bytes, position: 0, scheduler, slots, sender, completions, counted })
    }

    /// The length of the file when the reader was made.
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// Where the next [`read`](Self::read) begins.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// How the file is being read.
    pub fn pattern(&self) -> AccessPattern {
        self.scheduler.pattern()
    }

    /// What came of the fetching ahead so far.
    pub fn stats(&self) -> PrefetchStats {
        self.scheduler.stats()
    }

    /// The next bytes, up to `len_max` of them: fewer where a fetched extent ends, so call again for the rest. `None` at the
    /// end of the file. Blocks until they are there.
    ///
    /// # Errors
    /// As [`GdsContext::read_to_gpu`](super::GdsContext::read_to_gpu).
    pub fn read(&mut self, len_max: u64) -> Result<Option<ReaderChunk<'_>>> {
        let served = self.fetch(self.position, len_max)?;
        if let Some((_, range)) = &served {
            self.position = range.end;
        }
        Ok(served.map(|(held, range)| self.chunk(&held, range)))
    }

    /// [`read`](Self::read) at any offset; the next [`read`](Self::read) goes on where it did before.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn read_at(&mut self, offset: u64, len_max: u64) -> Result<Option<ReaderChunk<'_>>> {
        let served = self.fetch(offset, len_max)?;
        Ok(served.map(|(held, range)| self.chunk(&held, range)))
    }

    fn chunk(&self, held: &Prefetch, range: Range<u64>) -> ReaderChunk<'_> {
        let buffer = self.slots[held.slot.index()].buffer.as_ref().expect("a ready slot has its buffer");
        ReaderChunk { buffer, buffer_offset: range.start - held.range.start, range }
    }

    /// Gets bytes into a slot: which, and how many of those that were asked for.
    fn fetch(&mut self, offset: u64, len_max: u64) -> Result<Option<(Prefetch, Range<u64>)>> {
        let end = offset.saturating_add(len_max).min(self.len_bytes);
        if offset >= end {
            return Ok(None);
        }
        while let Ok((slot, completion)) = self.completions.try_recv() {
            self.settle(slot, completion);
        }
        let held = match self.scheduler.lookup(offset) {
            Lookup::Hit(held) => Some(held),
            Lookup::Late(held) => self.wait_for(held)?,
            Lookup::Miss => None,
        };
        let held = match held {
            Some(held) => held,
            None => self.demand(offset..end)?,
        };
        let range = offset..end.min(held.range.end);
        self.scheduler.access(range.clone(), self.len_bytes, Instant::now());
        self.prefetch();
        let stats = self.scheduler.stats();
        self.engine.metrics.count_prefetches(&self.counted, &stats);
        self.counted = stats;
        Ok(Some((held, range)))
    }

    /// Reads what nobody foresaw.
    fn demand(&mut self, range: Range<u64>) -> Result<Prefetch> {
        let prefetch = loop {
            if let Some(prefetch) = self.scheduler.demand(range.clone()) {
                break prefetch;
            }
            // Every slot is being filled, or one came to hold the first byte meanwhile: its turn is next.
            self.engine.metrics.count_buffer_wait();
            let (slot, completion) = self.receive()?;
            self.settle(slot, completion);
            if let Lookup::Hit(held) = self.scheduler.lookup(range.start) {
                return Ok(held);
            }
        };
        let index = prefetch.slot.index();
        let read = self.buffer(index).and_then(|mut buffer| {
            let transfer = self.transfer(&prefetch).with_lanes(self.engine.lanes);
            let read = self.engine.read(transfer, &mut buffer);
            // A buffer that came back without bytes is with an operation that missed its deadline.
            self.slots[index].buffer = Some(buffer).filter(|buffer| buffer.len_bytes() > 0);
            read
        });
        match read {
            Ok(_) => self.scheduler.filled(prefetch.slot),
            Err(error) => {
                self.scheduler.failed(prefetch.slot);
                return Err(error);
            }
        };
        Ok(prefetch)
    }

    /// Starts what the scheduler plans, as far as the pipeline has room.
    fn prefetch(&mut self) {
        while let Some(prefetch) = self.scheduler.next(Instant::now()) {
            let (slot, index) = (prefetch.slot, prefetch.slot.index());
            let buffer = match self.buffer(index) {
                Ok(buffer) => buffer,
                Err(error) => {
                    tracing::debug!(%error, "no buffer to prefetch into");
                    self.scheduler.failed(slot);
                    return;
                }
            };
            let transfer = self.transfer(&prefetch);
            self.slots[index].progress = Some(Arc::clone(&transfer.progress));
            let sender = self.sender.clone();
            let request = IoRequest::read(transfer, buffer).with_callback(move |completion| {
                // A reader that is gone wants nothing any more.
                let _ = sender.send((slot, completion));
            });
            // One that finds no room at once completes as failed, and is settled with the others.
            if self.engine.pipeline.submit_until(request, Some(Instant::now())).is_err() {
                return;
            }
        }
    }

    /// Waits for a slot that is being filled; `None` where that failed.
    fn wait_for(&mut self, held: Prefetch) -> Result<Option<Prefetch>> {
        while self.scheduler.state(held.slot) == Some(SlotState::Filling) {
            let (slot, completion) = self.receive()?;
            self.settle(slot, completion);
        }
        Ok((self.scheduler.state(held.slot) == Some(SlotState::Ready)).then_some(held))
    }

    /// The next completion of a prefetch; there is one in flight.
    fn receive(&self) -> Result<(SlotId, Completion)> {
        let deadline = self.engine.deadline.unwrap_or(Duration::MAX);
        self.completions.recv_timeout(deadline).map_err(|_| {
            let after_ms = u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX);
            self.engine.metrics.count_timeout();
            Error::Timeout { operation: "prefetch", path: self.file.path.to_path_buf(), after_ms }
        })
    }

    /// Takes note of the end of a prefetch.
    fn settle(&mut self, slot: SlotId, completion: Completion) {
        let Completion { memory, result, .. } = completion;
        self.slots[slot.index()] = Slot { buffer: memory.into_owned(), progress: None };
        match result {
            Ok(_) => self.scheduler.filled(slot),
            Err(error) => {
                tracing::debug!(%error, "a prefetch failed");
                self.scheduler.failed(slot)
            }
        };
    }

    /// A slot's buffer, taken from the device where it has none yet.
    fn buffer(&mut self, index: usize) -> Result<DeviceBuffer> {
        match self.slots[index].buffer.take() {
            Some(buffer) => Ok(buffer),
            None => self.engine.device.allocate(self.engine.config.buffer_size),
        }
    }

    fn transfer(&self, prefetch: &Prefetch) -> Transfer {
        let Range { start, end } = prefetch.range;
        Transfer::new(self.file.clone(), Piece { file_offset: start, buffer_offset: 0, len_bytes: end - start })
    }
}

impl Drop for PrefetchReader {
    /// Gives up what is in flight and waits for nothing: operations keep their buffers until they end.
    fn drop(&mut self) {
        self.slots.iter().filter_map(|slot| slot.progress.as_ref()).for_each(|progress| progress.abandon());
    }
}

impl fmt::Debug for PrefetchReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PrefetchReader({} at {} of {})", self.file.path.display(), self.position, self.len_bytes)
    }
}
