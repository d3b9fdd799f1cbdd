//! Transfers in line with other work of a GPU: enqueued on a stream, done when the stream comes to them.
//!
//! # Invariants
//! - A transfer owns the file, the buffer and the numbers that cuFile reads and writes until the stream has passed it.
//!   Whoever drops it waits; where the driver cannot say that it is done, all of it is kept for ever.

use std::fmt;
use std::mem::{self, ManuallyDrop};
use std::ptr;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::driver::CuFile;
use super::error::{self, Error, ErrorKind, Result};
use super::params::{AsyncParams, NOT_WRITTEN, Owned};
use super::sys;
use super::transfer::{Checked, device_error};
use super::{Buffer, Direction, File, Transfer};
use crate::device::{Device, ForeignStream, Mark};

/// The longest nap between two looks at a transfer that is waited for with a limit.
const NAP_MAX: Duration = Duration::from_millis(1);

/// A stream of a GPU that cuFile knows. A handle: cloning it is free; transfers in flight hold clones of their own.
#[derive(Clone)]
pub struct Stream(Arc<Registered>);

struct Registered {
    cufile: CuFile,
    device: Device,
    stream: ForeignStream,
}

impl Stream {
    /// Makes a stream and registers it with cuFile.
    ///
    /// # Errors
    /// [`ErrorKind::Device`] where the GPU gives no stream; [`ErrorKind::Status`] where cuFile refuses it.
    pub fn new(cufile: CuFile, device: &Device) -> Result<Stream> {
        let stream = device.foreign_stream().map_err(|error| device_error("make a stream for", &error))?;
        let _current = device.make_current().map_err(|error| device_error("register a stream for", &error))?;
        // SAFETY: the stream is alive, and is deregistered before it is destroyed.
        let answer = unsafe { (cufile.functions().stream_register)(stream.raw(), sys::STREAM_INPUTS_FIXED) };
        error::check(answer).map_err(|kind| Error::new("register", format!("a stream on {device}"), kind))?;
        Ok(Stream(Arc::new(Registered { cufile, device: device.clone(), stream })))
    }

    /// Enqueues a read. It does not wait.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] where the transfer does not fit; [`ErrorKind::Status`] and [`ErrorKind::Device`] where it
    /// could not be enqueued. What goes wrong later is told by [`Pending::wait`].
    pub fn read(&self, file: &File, buffer: &Buffer, transfer: Transfer) -> Result<Pending> {
        self.enqueue(Direction::Read, file, buffer, transfer)
    }

    /// Enqueues a write. It does not wait.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn write(&self, file: &File, buffer: &Buffer, transfer: Transfer) -> Result<Pending> {
        self.enqueue(Direction::Write, file, buffer, transfer)
    }

    fn enqueue(&self, direction: Direction, file: &File, buffer: &Buffer, transfer: Transfer) -> Result<Pending> {
        let Registered { cufile, device, stream } = &*self.0;
        if buffer.memory().device() != device {
            let why = format!("the buffer is on {}, the stream on {device}", buffer.memory().device());
            return Err(file.error(direction.verb(), ErrorKind::Invalid(why)));
        }
        let mut checked = Checked::new(file, buffer.memory(), direction, transfer)?;
        if !buffer.is_registered() {
            // cuFile 1.15 takes the length of the transfer for that of memory it does not know, and refuses an offset into
            // it ("exceeds registered length", then `EIO`): so the address is that of the range.
            checked = checked.at_its_range();
        }
        let params = Owned::new(Box::new(AsyncParams {
            size: checked.len,
            file_offset: checked.file_offset,
            base_offset: checked.base_offset,
            done: NOT_WRITTEN,
        }));
        let held = Held { checked, file: file.clone(), buffer: buffer.clone(), params, stream: self.clone() };
        if checked.len == 0 {
            return Ok(Pending { held: ManuallyDrop::new(held), mark: None });
        }
        let current = file.enter(direction.verb(), device)?;
        let at = held.params.as_ptr();
        let functions = cufile.functions();
        // SAFETY: everything that is named here is in `held`, which is kept until the stream has passed the transfer: by
        // the `Pending` that is returned, or below.
        let answer = unsafe {
            let (size, file_offset, base_offset) =
                (&raw mut (*at).size, &raw mut (*at).file_offset, &raw mut (*at).base_offset);
            let enqueue = match direction {
                Direction::Read => functions.read_async,
                Direction::Write => functions.write_async,
            };
            enqueue(file.raw(), checked.pointer(), size, file_offset, base_offset, &raw mut (*at).done, stream.raw())
        };
        drop(current);
        let enqueued = error::check(answer).map_err(|kind| file.error(direction.verb(), kind));
        let marked = enqueued.and_then(|()| stream.mark().map_err(|error| device_error(direction.verb(), &error)));
        match marked {
            Ok(mark) => Ok(Pending { held: ManuallyDrop::new(held), mark: Some(mark) }),
            Err(error) => {
                // Part of it may be on the stream.
                if let Err(why) = stream.synchronize() {
                    tracing::warn!("{why}; what a transfer used is kept for ever");
                    mem::forget(held);
                }
                Err(error)
            }
        }
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        // Every transfer has a share of this, so none is in flight.
        let answer =
            self.device.make_current().map_err(|error| device_error("deregister", &error)).and_then(|_current| {
                // SAFETY: the stream was registered, is deregistered once, and is destroyed after this.
                let answer = unsafe { (self.cufile.functions().stream_deregister)(self.stream.raw()) };
                error::check(answer)
                    .map_err(|kind| Error::new("deregister", format!("a stream on {}", self.device), kind))
            });
        if let Err(error) = answer {
            tracing::warn!("{error}");
        }
    }
}

/// A transfer that was enqueued. Dropping it waits for it; what became of it is then unknown.
#[must_use = "a dropped transfer blocks until it is done, and hides whether it failed"]
pub struct Pending {
    /// Dropped when the stream has passed the transfer, and never where nobody can tell.
    held: ManuallyDrop<Held>,
    /// The moment after the transfer; none where there was nothing to move.
    mark: Option<Mark>,
}

/// What a transfer uses.
struct Held {
    checked: Checked,
    file: File,
    buffer: Buffer,
    params: Owned<AsyncParams>,
    stream: Stream,
}

impl Pending {
    /// Whether [`wait`](Self::wait) would return at once.
    ///
    /// # Errors
    /// [`ErrorKind::Device`] where the driver failed.
    pub fn is_done(&self) -> Result<bool> {
        let Some(mark) = &self.mark else { return Ok(true) };
        mark.has_passed().map_err(|error| device_error(self.held.checked.direction.verb(), &error))
    }

    /// Waits until the transfer is done, but not longer than `time_max`: whether it is done.
    ///
    /// # Errors
    /// As [`is_done`](Self::is_done).
    pub fn wait_at_most(&self, time_max: Duration) -> Result<bool> {
        let started = Instant::now();
        let mut nap = NAP_MAX / 50;
        while !self.is_done()? {
            if started.elapsed() >= time_max {
                return Ok(false);
            }
            thread::sleep(nap);
            nap = (nap * 2).min(NAP_MAX);
        }
        Ok(true)
    }

    /// Waits until the transfer is done. What cuFile left undone of it is then moved here, blocking.
    ///
    /// # Errors
    /// As [`File::read`]; [`ErrorKind::Device`] where the driver failed, and with it the transfer.
    pub fn wait(mut self) -> Result<()> {
        self.settle()?;
        let Held { checked, file, buffer, params, .. } = &*self.held;
        if checked.len == 0 {
            return Ok(());
        }
        // SAFETY: the stream has passed the transfer, so nobody writes any more.
        let done = unsafe { ptr::read_volatile(&raw const (*params.as_ptr()).done) };
        let count = match done {
            NOT_WRITTEN => Err(ErrorKind::Invalid("cuFile has not said how many bytes it moved".to_string())),
            // The system's code is lost on the way: cuFile moved the bytes on another thread.
            done => error::check_count(done, libc::EIO),
        };
        match count {
            Ok(count) => checked.continue_after(file, buffer, count),
            Err(kind) => Err(file.error(checked.direction.verb(), kind)),
        }
    }

    /// Waits until the stream has passed the transfer.
    fn settle(&mut self) -> Result<()> {
        let Some(mark) = &self.mark else { return Ok(()) };
        let passed = mark.wait().or_else(|_| self.held.stream.0.stream.synchronize());
        passed.map_err(|error| device_error(self.held.checked.direction.verb(), &error))?;
        self.mark = None;
        Ok(())
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        match self.settle() {
            // SAFETY: the stream has passed the transfer, and this is the last use of what it held.
            Ok(()) => unsafe { ManuallyDrop::drop(&mut self.held) },
            Err(error) => tracing::warn!("{error}; what the transfer used is kept for ever"),
        }
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Stream({})", self.0.device)
    }
}

impl fmt::Debug for Pending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Held { checked, file, .. } = &*self.held;
        write!(f, "Pending({} {} bytes, {file:?})", checked.direction.verb(), checked.len)
    }
}
