//! Many transfers started with one call, and polled for. It starts nothing by itself.
//!
//! # Invariants
//! - Everything that an operation uses is held until cuFile has reported it done, or has destroyed the batch after it was
//!   cancelled; a batch that is dropped waits for what is in flight, and keeps for ever what never ends.
//! - Every operation that was accepted is reported once.

use std::collections::HashMap;
use std::ffi::c_uint;
use std::fmt;
use std::mem;
use std::ptr;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::driver::CuFile;
use super::error::{self, Error, ErrorKind, Result, Status};
use super::params::Owned;
use super::sys::{self, IoEvent, IoParams, batch_status};
use super::transfer::{Checked, device_error};
use super::{Buffer, Direction, File, Transfer};
use crate::device::{Current, Device};

/// How long a batch that is dropped waits for what is in flight.
const DRAIN_TIME_MAX: Duration = Duration::from_secs(30);

/// The same, after a refusal that leaves open whether anything is.
const DRAIN_TIME_MAX_BROKEN: Duration = Duration::from_secs(1);

/// Cancelling waits for the hardware, up to five seconds (measured on 1.15 and 1.20: `io_cancel`, which the kernel does not
/// do, then `io_getevents`). One that took about as long may have given up.
const CANCEL_TIME_TRUSTED: Duration = Duration::from_secs(4);

/// The longest nap between two looks at a batch; the first is a fiftieth of it.
const NAP_MAX: Duration = Duration::from_millis(1);

/// One operation for a batch.
#[derive(Debug, Clone)]
pub struct Operation {
    /// Which way the bytes go.
    pub direction: Direction,
    /// The file.
    pub file: File,
    /// The buffer, on the batch's GPU.
    pub buffer: Buffer,
    /// Which bytes.
    pub transfer: Transfer,
}

/// An operation that a batch has accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OperationId(usize);

/// What became of an operation.
#[derive(Debug)]
pub struct Completion {
    /// Which one.
    pub id: OperationId,
    /// Success: every byte is where it belongs.
    pub result: Result<()>,
}

/// A place for operations in flight, on one GPU.
///
/// Dropping it waits for what is in flight.
pub struct Batch {
    cufile: CuFile,
    device: Device,
    raw: sys::BatchHandle,
    entries: usize,
    last_id: usize,
    in_flight: HashMap<usize, InFlight>,
    /// Reported by cuFile and not yet by us.
    done: Vec<Completion>,
    /// What cancelled operations use, until the batch is destroyed.
    cancelled: Vec<InFlight>,
    /// Why it takes no more: it was cancelled, or cuFile has refused a submission in a way that leaves open whether some of
    /// it was started.
    broken: Option<Error>,
}

// SAFETY: a batch is a handle that any thread may use; `&mut self` keeps it to one at a time.
unsafe impl Send for Batch {}

struct InFlight {
    checked: Checked,
    file: File,
    buffer: Buffer,
    /// Shared with the others of its submission.
    _params: Arc<Owned<[IoParams]>>,
}

impl Batch {
    /// Sets up a batch for as many operations in flight as `entries`, on one GPU.
    ///
    /// # Errors
    /// [`ErrorKind::Status`] where cuFile refuses: more than
    /// [`batch_entries_max`](super::Properties::batch_entries_max), for one.
    pub fn new(cufile: CuFile, device: &Device, entries: u32) -> Result<Batch> {
        let current = device.make_current().map_err(|error| device_error("set up a batch", &error))?;
        let mut raw = ptr::null_mut();
        // SAFETY: `raw` is a place for the answer.
        let answer = unsafe { (cufile.functions().batch_set_up)(&raw mut raw, entries) };
        error::check(answer).map_err(|kind| Error::new("set up", format!("a batch of {entries}"), kind))?;
        drop(current);
        Ok(Batch {
            cufile,
            device: device.clone(),
            raw,
            // A `u32` fits on every machine that has a GPU.
            entries: entries as usize,
            last_id: 0,
            in_flight: HashMap::new(),
            done: Vec::new(),
            cancelled: Vec::new(),
            broken: None,
        })
    }

    /// How many operations are in flight.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Starts operations, all or none, and names them in their order. It does not wait.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] where an operation does not fit its buffer or the batch; [`ErrorKind::Status`] where cuFile
    /// refuses. After a refusal that leaves open whether some were started, the batch takes no more.
    pub fn submit(&mut self, operations: impl IntoIterator<Item = Operation>) -> Result<Vec<OperationId>> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        let mut checked = Vec::new();
        for operation in operations {
            let Operation { direction, file, buffer, transfer } = operation;
            if buffer.memory().device() != &self.device {
                let why = format!("the buffer is on {}, the batch on {}", buffer.memory().device(), self.device);
                return Err(file.error(direction.verb(), ErrorKind::Invalid(why)));
            }
            checked.push((Checked::new(&file, buffer.memory(), direction, transfer)?, file, buffer));
        }
        if self.in_flight.len() + checked.len() > self.entries {
            let (held, more, entries) = (self.in_flight.len(), checked.len(), self.entries);
            let why = format!("{more} operations more than the {held} in flight, in a batch of {entries}");
            return Err(self.error("submit", ErrorKind::Invalid(why)));
        }
        let first = self.last_id + 1;
        self.last_id += checked.len();
        let ids: Vec<OperationId> = (first..=self.last_id).map(OperationId).collect();
        let mut params = Vec::new();
        let mut started = Vec::new();
        for (&id, (checked, file, buffer)) in ids.iter().zip(checked) {
            if checked.len == 0 {
                self.done.push(Completion { id, result: Ok(()) });
                continue;
            }
            params.push(io_params(id, checked, &file));
            started.push((id, checked, file, buffer));
        }
        if started.is_empty() {
            return Ok(ids);
        }
        let params = Arc::new(Owned::new(params.into_boxed_slice()));
        let current = self.enter("submit")?;
        // No more than `entries`, which is a `c_uint`.
        let count = started.len() as c_uint;
        // SAFETY: the batch is set up; `params` has `count` entries, each with a handle that is registered and a range of
        // memory that is there, and all three are kept in `in_flight` until cuFile has reported the operation.
        let answer =
            unsafe { (self.cufile.functions().batch_submit)(self.raw, count, params.as_ptr().cast::<IoParams>(), 0) };
        drop(current);
        let refused = error::check(answer).err().map(|kind| self.error("submit", kind));
        let nothing_started = refused.as_ref().is_some_and(|error| error.status().is_some_and(refuses_before_starting));
        if !nothing_started {
            for (id, checked, file, buffer) in started {
                let _params = Arc::clone(&params);
                self.in_flight.insert(id.0, InFlight { checked, file, buffer, _params });
            }
        }
        match refused {
            None => Ok(ids),
            Some(error) => {
                // Those of no bytes were not started either.
                self.done.retain(|completion| completion.id.0 < first);
                if !nothing_started {
                    self.broken = Some(error.clone());
                }
                Err(error)
            }
        }
    }

    /// What is done since the last call, in no particular order. It does not wait, but for the rest of an operation that
    /// cuFile did only in part.
    ///
    /// # Errors
    /// [`ErrorKind::Status`] where cuFile does not say how the batch stands. What became of a single operation is in its
    /// [`Completion`].
    pub fn poll(&mut self) -> Result<Vec<Completion>> {
        if !self.in_flight.is_empty() {
            let blank = IoEvent { cookie: ptr::null_mut(), status: 0, ret: 0 };
            let mut events = vec![blank; self.in_flight.len()];
            let mut count = events.len() as c_uint;
            let current = self.enter("poll")?;
            // SAFETY: the batch is set up; `events` has room for `count`; no time to wait is given, and none is asked for.
            let answer = unsafe {
                (self.cufile.functions().batch_status)(
                    self.raw,
                    0,
                    &raw mut count,
                    events.as_mut_ptr(),
                    ptr::null_mut(),
                )
            };
            drop(current);
            error::check(answer).map_err(|kind| self.error("poll", kind))?;
            for event in events.into_iter().take(count as usize) {
                self.judge(event);
            }
        }
        Ok(mem::take(&mut self.done))
    }

    /// Waits until all operations are done, but not longer than `time_max`; what is done since the last call.
    ///
    /// # Errors
    /// [`ErrorKind::TimedOut`] where some are still in flight then; they stay so, and a later call reports them and those
    /// that are done. Else as [`poll`](Self::poll).
    pub fn wait(&mut self, time_max: Duration) -> Result<Vec<Completion>> {
        let started = Instant::now();
        let mut all = Vec::new();
        let mut nap = NAP_MAX / 50;
        loop {
            let polled = self.poll();
            let failed = match polled {
                Ok(done) => {
                    all.extend(done);
                    (!self.in_flight.is_empty() && started.elapsed() >= time_max)
                        .then(|| self.error("wait for", ErrorKind::TimedOut(time_max)))
                }
                Err(error) => Some(error),
            };
            if let Some(error) = failed {
                self.done.extend(all);
                return Err(error);
            }
            if self.in_flight.is_empty() {
                return Ok(all);
            }
            thread::sleep(nap);
            nap = (nap * 2).min(NAP_MAX);
        }
    }

    /// Ends everything in flight: each operation is reported as cancelled, also one that was done already and not yet
    /// reported, and which of its bytes were moved is unknown. Blocks until the hardware is done, up to 5 s. The batch takes
    /// no more operations: set up another.
    ///
    /// cuFile reports nothing of a batch that was cancelled (seen on 1.15 and 1.20), so alight does.
    ///
    /// # Errors
    /// [`ErrorKind::Status`] where cuFile does not cancel; what is in flight goes on then.
    pub fn cancel(&mut self) -> Result<()> {
        let started = Instant::now();
        let current = self.enter("cancel")?;
        // SAFETY: the batch is set up.
        let answer = unsafe { (self.cufile.functions().batch_cancel)(self.raw) };
        drop(current);
        error::check(answer).map_err(|kind| self.error("cancel", kind))?;
        let trusted = started.elapsed() < CANCEL_TIME_TRUSTED;
        for (id, operation) in mem::take(&mut self.in_flight) {
            let error = operation.file.error(operation.checked.direction.verb(), ErrorKind::Canceled);
            self.done.push(Completion { id: OperationId(id), result: Err(error) });
            match trusted {
                true => self.cancelled.push(operation),
                false => mem::forget(operation),
            }
        }
        if !trusted {
            tracing::warn!("cancelling took {:?}; the memory of the operations is kept for ever", started.elapsed());
        }
        self.broken.get_or_insert_with(|| Error::new("submit", "a batch", ErrorKind::Canceled));
        Ok(())
    }

    /// Takes one report of cuFile.
    fn judge(&mut self, event: IoEvent) {
        let id = event.cookie.addr();
        // Two's complement, as C's `ssize_t`.
        let count = error::check_count(event.ret as isize, libc::EIO);
        let outcome = match event.status {
            batch_status::COMPLETE => count,
            batch_status::CANCELED => Err(ErrorKind::Canceled),
            batch_status::FAILED | batch_status::INVALID | batch_status::TIMEOUT => {
                // A code where there is one; a count says nothing here.
                Err(count.err().unwrap_or(ErrorKind::Os(libc::EIO)))
            }
            // Still on its way.
            _ => return,
        };
        let Some(InFlight { checked, file, buffer, _params }) = self.in_flight.remove(&id) else {
            tracing::warn!(id, "cuFile reports an operation that is not in flight");
            return;
        };
        let result = match outcome {
            Ok(count) => checked.continue_after(&file, &buffer, count),
            Err(kind) => Err(file.error(checked.direction.verb(), kind)),
        };
        self.done.push(Completion { id: OperationId(id), result });
    }

    fn enter(&self, action: &'static str) -> Result<Current> {
        self.device.make_current().map_err(|error| device_error(action, &error))
    }

    fn error(&self, action: &'static str, kind: ErrorKind) -> Error {
        Error::new(action, format!("a batch of {} on {}", self.entries, self.device), kind)
    }
}

fn io_params(id: OperationId, checked: Checked, file: &File) -> IoParams {
    IoParams {
        mode: sys::MODE_BATCH,
        base: checked.pointer(),
        file_offset: checked.file_offset,
        base_offset: checked.base_offset,
        size: checked.len,
        handle: file.raw(),
        opcode: match checked.direction {
            Direction::Read => sys::OPCODE_READ,
            Direction::Write => sys::OPCODE_WRITE,
        },
        cookie: ptr::without_provenance_mut(id.0),
    }
}

/// Codes of a check of the arguments, before which nothing is started.
fn refuses_before_starting(status: Status) -> bool {
    matches!(
        status,
        Status::DriverNotInitialized
            | Status::DriverClosing
            | Status::IoNotSupported
            | Status::CudaPointerInvalid
            | Status::CudaMemoryTypeInvalid
            | Status::CudaPointerRangeError
            | Status::CudaContextMismatch
            | Status::InvalidFileType
            | Status::InvalidFileOpenFlag
            | Status::DioNotSet
            | Status::InvalidValue
            | Status::HandleNotRegistered
            | Status::IoDisabled
            | Status::BatchFull
            | Status::BatchNoCompat
    )
}

impl Drop for Batch {
    fn drop(&mut self) {
        if !self.in_flight.is_empty() {
            let time_max = if self.broken.is_some() { DRAIN_TIME_MAX_BROKEN } else { DRAIN_TIME_MAX };
            let drained = self.wait(time_max);
            if let Err(error) = drained {
                tracing::warn!(operations = self.in_flight.len(), "{error}; their memory is kept for ever");
                mem::forget(mem::take(&mut self.in_flight));
                mem::forget(mem::take(&mut self.cancelled));
                return;
            }
        }
        match self.enter("destroy") {
            // SAFETY: the batch was set up, is destroyed once, and nothing is in flight. What was cancelled is freed after
            // this, with the other fields.
            Ok(_current) => unsafe { (self.cufile.functions().batch_destroy)(self.raw) },
            Err(error) => {
                tracing::warn!("{error}; what was cancelled is kept for ever");
                mem::forget(mem::take(&mut self.cancelled));
            }
        }
    }
}

impl fmt::Debug for Batch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Batch({} of {} in flight on {})", self.in_flight.len(), self.entries, self.device)
    }
}
