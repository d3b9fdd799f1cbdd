//! Two buffers on a device: while one is processed, the other is filled; or while one is filled, the other is written out.
//!
//! # Invariants
//! - One worker, kept for the manager's life, does all transfers in the order in which they were asked for. A buffer on its
//!   way is the worker's alone: it is passed to it and back by value.
//! - A stream hands every byte of its range to the caller exactly once, in order, and none after a failure.
//! - When a call returns no transfer is in flight, unless one missed its deadline; that one keeps its buffer until it ends,
//!   and the next call waits for it.
//! - Dropping the manager waits for nothing.

use std::fmt;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use super::pipeline::{Execute, Memory, words};
use super::transport::{IoOperation, OpenFile, Piece, Progress, Transfer};
use crate::device::{Device, DeviceBuffer};
use crate::error::{Error, Result};

/// What a buffer is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum BufferState {
    /// Nothing; it can be used.
    Idle,
    /// It is being filled, or waits to be: from the file in a stream that reads, by the caller in one that writes.
    Filling,
    /// It holds bytes that nobody has taken yet.
    Ready,
    /// The caller has its bytes.
    Processing,
    /// It is being written to the file, or waits to be.
    Flushing,
}

/// Shows what the buffers of a manager are doing, from any thread.
#[derive(Debug, Clone)]
pub struct BufferStates(Arc<[AtomicU8]>);

impl BufferStates {
    /// The state of every buffer.
    pub fn get(&self) -> Vec<BufferState> {
        let decode = |state: &AtomicU8| match state.load(Ordering::Acquire) {
            0 => BufferState::Idle,
            1 => BufferState::Filling,
            2 => BufferState::Ready,
            3 => BufferState::Processing,
            _ => BufferState::Flushing,
        };
        self.0.iter().map(decode).collect()
    }

    fn set(&self, index: usize, state: BufferState) {
        self.0[index].store(state as u8, Ordering::Release);
    }
}

/// A stretch of a stream, in memory of the device.
#[derive(Debug, Clone, Copy)]
pub struct StreamChunk<'b> {
    /// The buffer; the stretch is its first [`len_bytes`](Self::len_bytes) bytes.
    pub buffer: &'b DeviceBuffer,
    /// Where the stretch begins in the file.
    pub file_offset: u64,
    /// How long it is.
    pub len_bytes: u64,
}

impl<'b> StreamChunk<'b> {
    /// The bytes, where the device is the host.
    pub fn as_host(&self) -> Option<&'b [u8]> {
        // A stretch lies in its buffer, so on the host its length fits.
        self.buffer.as_host().map(|bytes| &bytes[..self.len_bytes as usize])
    }
}

/// A transfer for the worker, with the buffer that it owns meanwhile.
struct Job {
    operation: IoOperation,
    transfer: Transfer,
    index: usize,
    memory: DeviceBuffer,
}

struct Done {
    job: Job,
    result: Result<u64>,
}

/// A pair of device buffers, or a single one, and the worker that fills and flushes them.
pub struct DoubleBufferManager {
    /// `None` while the worker has it.
    buffers: Vec<Option<DeviceBuffer>>,
    /// Of the transfers that the worker has.
    in_flight: Vec<(usize, Transfer)>,
    states: BufferStates,
    buffer_bytes: u64,
    deadline: Option<Duration>,
    lanes: usize,
    executor: Arc<dyn Execute>,
    jobs: Sender<Job>,
    done: Receiver<Done>,
}

impl DoubleBufferManager {
    /// Takes `count` buffers of `buffer_bytes` from a device and starts the worker. Each transfer may use `lanes` threads
    /// and, where there is a deadline, that long.
    ///
    /// # Errors
    /// As [`Device::allocate`]; [`Error::Device`] where the system gives no thread.
    ///
    /// # Panics
    /// If there are no buffers, or they have no bytes.
    pub fn new(
        device: &Device,
        executor: Arc<dyn Execute>,
        (count, buffer_bytes): (usize, u64),
        lanes: usize,
        deadline: Option<Duration>,
    ) -> Result<Self> {
        assert!(count > 0 && buffer_bytes > 0, "a stream needs a buffer");
        let buffers = (0..count).map(|_| device.allocate(buffer_bytes).map(Some)).collect::<Result<Vec<_>>>()?;
        let (jobs, take) = channel();
        let (give, done) = channel();
        let worker = {
            let executor = Arc::clone(&executor);
            move || work(&*executor, &take, &give)
        };
        thread::Builder::new().name("alight-stream".into()).spawn(worker).map_err(|error| Error::Device {
            device: device.to_string(),
            action: "start a thread for a stream",
            why: error.to_string(),
        })?;
        let states = BufferStates((0..count).map(|_| AtomicU8::new(BufferState::Idle as u8)).collect());
        let in_flight = Vec::with_capacity(count);
        Ok(Self { buffers, in_flight, states, buffer_bytes, deadline, lanes, executor, jobs, done })
    }

    /// What the buffers are doing.
    pub fn states(&self) -> BufferStates {
        self.states.clone()
    }

    /// Reads a range of a file through the buffers and hands each stretch to `process`, in order; with two buffers the next
    /// one is read meanwhile. Answers the bytes that it handed over: all of them.
    ///
    /// # Errors
    /// Those of the route and of `process`, the first in the order of the file; [`Error::Timeout`].
    pub fn overlapped_read(
        &mut self,
        file: &OpenFile,
        range: Range<u64>,
        mut process: impl FnMut(StreamChunk<'_>) -> Result<()>,
    ) -> Result<u64> {
        self.settle()?;
        let mut next = range.start;
        for index in 0..self.buffers.len() {
            next = self.send(IoOperation::Read, file, next..range.end, index);
        }
        let mut outcome = Ok(());
        // The worker answers in the order in which it was asked: that of the file.
        while outcome.is_ok() && !self.in_flight.is_empty() {
            outcome = self.receive().and_then(|(index, piece)| {
                self.states.set(index, BufferState::Processing);
                let buffer = self.buffers[index].as_ref().expect("it has just come back");
                let len_bytes = piece.len_bytes;
                let processed = process(StreamChunk { buffer, file_offset: piece.file_offset, len_bytes });
                self.states.set(index, BufferState::Idle);
                processed?;
                next = self.send(IoOperation::Read, file, next..range.end, index);
                Ok(())
            });
        }
        self.end(outcome)?;
        Ok(range.end.saturating_sub(range.start))
    }

    /// Writes a range of a file from the buffers: `fill` puts the bytes of each stretch into a buffer, in order; with two
    /// buffers the one before is written meanwhile. `fill` gets the buffer, the stretch's place in the file and its length.
    /// Answers the bytes written: all of them.
    ///
    /// # Errors
    /// Those of the route and of `fill`; [`Error::Timeout`]. How much was written is then unknown.
    pub fn overlapped_write(
        &mut self,
        file: &OpenFile,
        range: Range<u64>,
        mut fill: impl FnMut(&mut DeviceBuffer, u64, u64) -> Result<()>,
    ) -> Result<u64> {
        self.settle()?;
        let mut next = range.start;
        let mut outcome = Ok(());
        while outcome.is_ok() && next < range.end {
            outcome = (|| {
                let index = match self.buffers.iter().position(Option::is_some) {
                    Some(index) => index,
                    None => self.receive()?.0,
                };
                self.states.set(index, BufferState::Filling);
                let len = self.buffer_bytes.min(range.end - next);
                let buffer = self.buffers[index].as_mut().expect("it is here");
                let filled = fill(buffer, next, len);
                self.states.set(index, BufferState::Idle);
                filled?;
                next = self.send(IoOperation::Write, file, next..range.end, index);
                Ok(())
            })();
        }
        self.end(outcome)?;
        Ok(range.end.saturating_sub(range.start))
    }

    /// Passes a buffer to the worker for the next stretch of a range, where there is one; answers where the rest begins.
    fn send(&mut self, operation: IoOperation, file: &OpenFile, range: Range<u64>, index: usize) -> u64 {
        if range.start >= range.end {
            return range.start;
        }
        let len_bytes = self.buffer_bytes.min(range.end - range.start);
        let piece = Piece { file_offset: range.start, buffer_offset: 0, len_bytes };
        let transfer = Transfer::new(file.clone(), piece).with_lanes(self.lanes);
        let memory = self.buffers[index].take().expect("only a buffer that is here is sent");
        self.states.set(
            index,
            match operation {
                IoOperation::Read => BufferState::Filling,
                IoOperation::Write => BufferState::Flushing,
            },
        );
        self.in_flight.push((index, transfer.clone()));
        self.jobs.send(Job { operation, transfer, index, memory }).expect("the worker lives as long as the sender");
        range.start + len_bytes
    }

    /// Takes the next buffer back from the worker: which one, and what it was sent for.
    fn receive(&mut self) -> Result<(usize, Piece)> {
        let done = match self.deadline {
            None => self.done.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(deadline) => self.done.recv_timeout(deadline),
        };
        match done {
            Ok(Done { job, result }) => {
                self.in_flight.retain(|(index, _)| *index != job.index);
                self.buffers[job.index] = Some(job.memory);
                let read = result.is_ok() && job.operation == IoOperation::Read;
                self.states.set(job.index, if read { BufferState::Ready } else { BufferState::Idle });
                result.map(|_| (job.index, job.transfer.pieces[0]))
            }
            Err(RecvTimeoutError::Timeout) => {
                let (_, transfer) = self.in_flight.first().expect("only who has sent a buffer waits for one");
                self.executor.missed_deadline(transfer);
                Err(Error::Timeout {
                    operation: "stream",
                    path: transfer.file.path.to_path_buf(),
                    after_ms: self.deadline.map_or(0, |time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX)),
                })
            }
            Err(RecvTimeoutError::Disconnected) => {
                Err(Error::Panicked { operation: "stream", why: "its worker is gone".into() })
            }
        }
    }

    /// Takes every buffer back. What came of them is of no interest any more.
    fn settle(&mut self) -> Result<()> {
        while !self.in_flight.is_empty() {
            match self.receive() {
                Err(error @ (Error::Timeout { .. } | Error::Panicked { operation: "stream", .. })) => {
                    return Err(error);
                }
                Ok((index, _)) => self.states.set(index, BufferState::Idle),
                Err(_) => {}
            }
        }
        Ok(())
    }

    /// The end of a stream. After a failure what has not begun is given up, and what has is waited for; a write that
    /// succeeded so far is waited for and its failure reported.
    fn end(&mut self, mut outcome: Result<()>) -> Result<()> {
        if outcome.is_err() {
            self.abandon();
        }
        let timed_out = matches!(outcome, Err(Error::Timeout { .. }));
        while !timed_out && !self.in_flight.is_empty() {
            let received = self.receive();
            let stuck = matches!(received, Err(Error::Timeout { .. } | Error::Panicked { operation: "stream", .. }));
            match received {
                Ok((index, _)) => self.states.set(index, BufferState::Idle),
                Err(error) => outcome = outcome.and(Err(error)),
            }
            if outcome.is_err() {
                self.abandon();
            }
            if stuck {
                break;
            }
        }
        outcome
    }

    fn abandon(&self) {
        self.in_flight
            .iter()
            .map(|(_, transfer)| &transfer.progress)
            .for_each(|progress: &Arc<Progress>| progress.abandon());
    }
}

impl Drop for DoubleBufferManager {
    /// The worker ends with what it is at, and keeps that buffer until then.
    fn drop(&mut self) {
        self.abandon();
    }
}

impl fmt::Debug for DoubleBufferManager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DoubleBufferManager({:?} of {} bytes)", self.states.get(), self.buffer_bytes)
    }
}

/// The worker: does what it is asked, in order, until nobody asks any more.
fn work(executor: &dyn Execute, jobs: &Receiver<Job>, done: &Sender<Done>) {
    while let Ok(Job { operation, transfer, index, memory }) = jobs.recv() {
        let mut memory = Memory::Owned(memory);
        let run =
            || transfer.check_wanted(operation).and_then(|()| executor.execute(operation, &transfer, &mut memory));
        let result = catch_unwind(AssertUnwindSafe(run))
            .unwrap_or_else(|panic| Err(Error::Panicked { operation: operation.verb(), why: words(&*panic) }));
        let Some(memory) = memory.into_owned() else { return };
        if done.send(Done { job: Job { operation, transfer, index, memory }, result }).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests;
