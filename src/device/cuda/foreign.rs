//! What another of NVIDIA's libraries is lent of a GPU: its context on the calling thread, and a stream. It knows nothing
//! of that library.

use std::ffi::c_void;

use super::CudaDevice;
use super::context::Entered;
use super::stream::{Event, Stream};
use crate::error::Result;

/// The GPU's context is current on this thread while this lives.
pub(in crate::device) struct Current {
    _entered: Entered<'static>,
}

/// A stream of its own: what another library keeps for a stream must not stay on one that is lent to others.
pub(in crate::device) struct ForeignStream {
    device: &'static CudaDevice,
    stream: Stream,
}

impl CudaDevice {
    /// Makes the GPU's context current on this thread.
    pub(in crate::device) fn make_current(&'static self) -> Result<Current> {
        let entered = self.context.enter().map_err(|error| self.context.error("make its context current", error))?;
        Ok(Current { _entered: entered })
    }

    /// Makes a stream.
    pub(in crate::device) fn foreign_stream(&'static self) -> Result<ForeignStream> {
        let stream = Stream::new(&self.context).map_err(|error| self.context.error("make a stream", error))?;
        Ok(ForeignStream { device: self, stream })
    }
}

impl ForeignStream {
    /// The driver's handle. Valid as long as this lives.
    pub(in crate::device) fn raw(&self) -> *mut c_void {
        self.stream.raw().cast()
    }

    /// Marks what was enqueued until now.
    pub(in crate::device) fn mark(&self) -> Result<Event> {
        let event = self.device.event()?;
        self.stream.record(&event).map_err(|error| self.device.context.error("mark a stream", error))?;
        Ok(event)
    }

    /// Waits for all that was enqueued.
    pub(in crate::device) fn synchronize(&self) -> Result<()> {
        self.stream.synchronize().map_err(|error| self.device.context.error("wait for a stream", error))
    }
}
