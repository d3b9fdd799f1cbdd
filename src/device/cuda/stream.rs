//! Streams and events: what orders copies and says when they are done. They hold no memory; who enqueues a copy answers
//! for both of its ends.

use std::ffi::{c_uint, c_void};
use std::ptr;

use super::context::Context;
use super::driver::{CUdeviceptr, CUevent, CUfunction, CUstream, EVENT_FLAGS, STREAM_NON_BLOCKING};
use super::error::CudaError;
use crate::error::Result;

/// A queue of copies that run one after another, independent of every other stream.
pub(super) struct Stream {
    context: &'static Context,
    raw: CUstream,
}

// SAFETY: a stream is a handle that the driver allows every thread to use at the same time.
unsafe impl Send for Stream {}
// SAFETY: as above; the driver orders what several threads enqueue.
unsafe impl Sync for Stream {}

impl Stream {
    /// Makes a stream.
    pub(super) fn new(context: &'static Context) -> Result<Stream, CudaError> {
        let mut raw: CUstream = ptr::null_mut();
        let entered = context.enter()?;
        // SAFETY: `raw` is a valid place for the answer, and the context is current.
        unsafe { entered.driver.stream_create(&mut raw, STREAM_NON_BLOCKING) }?;
        Ok(Stream { context, raw })
    }

    /// The driver's handle, for another library of the vendor. Valid as long as the stream lives.
    pub(super) fn raw(&self) -> CUstream {
        self.raw
    }

    /// Enqueues a copy to the device. From pinned memory it returns at once.
    ///
    /// # Safety
    /// Both ranges are valid, and nothing writes or frees them until the stream has passed the copy.
    pub(super) unsafe fn copy_to_device(
        &self,
        target: CUdeviceptr,
        source: *const u8,
        len: usize,
    ) -> Result<(), CudaError> {
        let entered = self.context.enter()?;
        // SAFETY: the caller answers for the ranges; the stream is alive and the context current.
        unsafe { entered.driver.copy_to_device(target, source.cast::<c_void>(), len, self.raw) }
    }

    /// Enqueues a copy to the host. Into pinned memory it returns at once.
    ///
    /// # Safety
    /// Both ranges are valid, nothing reads or writes the target, and nothing frees either, until the stream has passed
    /// the copy.
    pub(super) unsafe fn copy_to_host(
        &self,
        target: *mut u8,
        source: CUdeviceptr,
        len: usize,
    ) -> Result<(), CudaError> {
        let entered = self.context.enter()?;
        // SAFETY: the caller answers for the ranges; the stream is alive and the context current.
        unsafe { entered.driver.copy_to_host(target.cast::<c_void>(), source, len, self.raw) }
    }

    /// Enqueues a copy to other memory of the same device.
    ///
    /// # Safety
    /// Both ranges are valid, nothing writes to either or reads the target, and nothing frees either, until the stream has
    /// passed the copy.
    pub(super) unsafe fn copy_on_device(
        &self,
        target: CUdeviceptr,
        source: CUdeviceptr,
        len: usize,
    ) -> Result<(), CudaError> {
        let entered = self.context.enter()?;
        // SAFETY: the caller answers for the ranges; the stream is alive and the context current.
        unsafe { entered.driver.copy_on_device(target, source, len, self.raw) }
    }

    /// Enqueues the filling of device memory with a word, `count` times.
    ///
    /// # Safety
    /// The memory is valid, and nobody else uses it until the stream has passed this.
    pub(super) unsafe fn fill_words(&self, target: CUdeviceptr, word: u32, count: usize) -> Result<(), CudaError> {
        let entered = self.context.enter()?;
        // SAFETY: the caller answers for the memory; the stream is alive and the context current.
        unsafe { entered.driver.fill_words(target, word, count, self.raw) }
    }

    /// Enqueues a kernel with that many blocks and threads in each. The parameters are read before it returns.
    ///
    /// # Safety
    /// The parameters are those of the kernel, and what they name is valid until the stream has passed it.
    pub(super) unsafe fn launch(
        &self,
        kernel: CUfunction,
        blocks: c_uint,
        threads: c_uint,
        params: &mut [*mut c_void],
    ) -> Result<(), CudaError> {
        let entered = self.context.enter()?;
        let (params, none) = (params.as_mut_ptr(), ptr::null_mut());
        // SAFETY: the caller answers for the kernel and its parameters; the stream is alive and the context current.
        unsafe { entered.driver.launch(kernel, blocks, 1, 1, threads, 1, 1, 0, self.raw, params, none) }
    }

    /// Enqueues an event: it passes when everything before it is done.
    pub(super) fn record(&self, event: &Event) -> Result<(), CudaError> {
        let entered = self.context.enter()?;
        // SAFETY: both are alive; the context is current.
        unsafe { entered.driver.event_record(event.raw, self.raw) }
    }

    /// Waits until everything that was enqueued is done, and reports what failed of it.
    pub(super) fn synchronize(&self) -> Result<(), CudaError> {
        let entered = self.context.enter()?;
        // SAFETY: the stream is alive; the context is current.
        unsafe { entered.driver.stream_synchronize(self.raw) }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: the stream is destroyed once. The driver lets what is enqueued run to its end.
        let destroyed = self.context.enter().and_then(|entered| unsafe { entered.driver.stream_destroy(self.raw) });
        if let Err(error) = destroyed {
            self.context.log("destroy a stream", error);
        }
    }
}

/// A mark in a stream, used again and again: it stands for the last time that it was recorded.
pub(in crate::device) struct Event {
    context: &'static Context,
    raw: CUevent,
}

// SAFETY: an event is a handle that the driver allows every thread to use at the same time.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// Makes an event; until it is recorded it counts as passed.
    pub(super) fn new(context: &'static Context) -> Result<Event, CudaError> {
        let mut raw: CUevent = ptr::null_mut();
        let entered = context.enter()?;
        // SAFETY: `raw` is a valid place for the answer, and the context is current.
        unsafe { entered.driver.event_create(&mut raw, EVENT_FLAGS) }?;
        Ok(Event { context, raw })
    }

    /// Whether it has passed; does not wait.
    pub(in crate::device) fn has_passed(&self) -> Result<bool> {
        let passed = self.context.enter().and_then(|entered| {
            // SAFETY: the event is alive; the context is current.
            match unsafe { entered.driver.event_query(self.raw) } {
                Err(CudaError::NOT_READY) => Ok(false),
                answer => answer.map(|()| true),
            }
        });
        passed.map_err(|error| self.context.error("ask after a copy", error))
    }

    /// Waits until it has passed. The thread sleeps meanwhile.
    pub(in crate::device) fn wait(&self) -> Result<()> {
        // SAFETY: the event is alive; the context is current.
        let passed = self.context.enter().and_then(|entered| unsafe { entered.driver.event_synchronize(self.raw) });
        passed.map_err(|error| self.context.error("wait for a copy", error))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: the event is destroyed once.
        let destroyed = self.context.enter().and_then(|entered| unsafe { entered.driver.event_destroy(self.raw) });
        if let Err(error) = destroyed {
            self.context.log("destroy an event", error);
        }
    }
}
