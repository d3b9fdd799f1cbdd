//! What another of NVIDIA's libraries is lent of a GPU, for the layers above: its context on the calling thread, and a
//! stream with marks in it. The host has neither.

use std::ffi::c_void;

use super::cuda::{self, Event};
use super::{Device, Kind};
use crate::error::{Error, Result};

/// The device's context is current on this thread while this lives.
pub(crate) struct Current {
    _current: cuda::Current,
}

/// A stream of a GPU, not shared with alight's own copies.
pub(crate) struct ForeignStream(cuda::ForeignStream);

/// A moment of a stream, past which everything is done that was enqueued before.
pub(crate) struct Mark(Event);

impl Device {
    /// Makes this GPU's context current on the calling thread.
    ///
    /// # Errors
    /// [`Error::Device`] for the host, and where the driver failed.
    pub(crate) fn make_current(&self) -> Result<Current> {
        Ok(Current { _current: self.gpu()?.make_current()? })
    }

    /// Makes a stream.
    ///
    /// # Errors
    /// As [`make_current`](Self::make_current).
    pub(crate) fn foreign_stream(&self) -> Result<ForeignStream> {
        Ok(ForeignStream(self.gpu()?.foreign_stream()?))
    }

    fn gpu(&self) -> Result<&'static cuda::CudaDevice> {
        match self.0 {
            Kind::Cuda(gpu) => Ok(gpu),
            Kind::Host => Err(Error::Device {
                device: self.to_string(),
                action: "use as a GPU",
                why: "the host has no CUDA context; use Device::cuda".to_string(),
            }),
        }
    }
}

impl ForeignStream {
    /// The driver's handle. Valid as long as this lives.
    pub(crate) fn raw(&self) -> *mut c_void {
        self.0.raw()
    }

    /// Marks what was enqueued until now.
    pub(crate) fn mark(&self) -> Result<Mark> {
        self.0.mark().map(Mark)
    }

    /// Waits for all that was enqueued.
    pub(crate) fn synchronize(&self) -> Result<()> {
        self.0.synchronize()
    }
}

impl Mark {
    /// Whether the stream has passed it.
    pub(crate) fn has_passed(&self) -> Result<bool> {
        self.0.has_passed()
    }

    /// Waits until the stream has passed it.
    pub(crate) fn wait(&self) -> Result<()> {
        self.0.wait()
    }
}
