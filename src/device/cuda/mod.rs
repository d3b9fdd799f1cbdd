//! NVIDIA GPUs through the CUDA driver, loaded at run time: the same binary runs where there is none. Everything unsafe of
//! the device layer is in this folder and in the slab of pinned memory beside it.
//!
//! `driver` names the functions, `error` tells their answers, `context`, `memory` and `stream` give the handles an owner,
//! `copies` hands memory to the hardware. Nothing above sees a raw handle.
//!
//! # Invariants
//! - One [`CudaDevice`] per ordinal and process, made on first use and kept to the end: what belongs to it may outlive
//!   every handle that a caller holds.
//! - Every answer of the driver is checked; what fails where nobody can be told is logged.

mod context;
mod copies;
mod driver;
mod error;
mod foreign;
mod kernels;
mod mapped;
mod memory;
#[cfg(test)]
pub(crate) mod simulated;
mod small;
mod stream;

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

pub(super) use copies::{Copies, GATHER_MIN, TABLE_ENTRY_BYTES};
pub(super) use foreign::{Current, ForeignStream};
pub(crate) use mapped::PinnedMap;
pub(super) use memory::{CudaMemory, Pinned};
pub(super) use stream::Event;

use super::staging::Staging;
use crate::error::{Error, Result};
use context::Context;
use driver::Driver;
use kernels::Kernels;
use small::Slabs;
use stream::Stream;

/// The most idle streams that a device keeps; a stream takes some 10 µs to make, and a few KiB.
const STREAMS_KEPT_MAX: usize = 16;

/// One GPU.
pub(super) struct CudaDevice {
    context: Context,
    /// Idle streams, to be lent.
    streams: Mutex<Vec<Stream>>,
    /// The pinned ring that all transfers of this device share, once one was needed.
    staging: Mutex<Option<Staging>>,
    /// What small arenas are cut from.
    slabs: Mutex<Slabs>,
    /// The kernels, once they were needed. A failure is not remembered.
    kernels: OnceLock<Kernels>,
}

/// How many GPUs this process can use; none is an error that says why, and what to do.
pub(super) fn device_count() -> Result<u32, String> {
    let driver = driver::load()?;
    match context::device_count(driver) {
        Ok(0) => Err("the driver shows no CUDA device; see nvidia-smi and CUDA_VISIBLE_DEVICES".to_string()),
        Ok(count) => Ok(count),
        Err(error) => Err(error.describe(driver)),
    }
}

impl CudaDevice {
    /// The GPU with an ordinal, its context made on first use.
    pub(super) fn open(ordinal: u32) -> Result<&'static CudaDevice> {
        static DEVICES: Mutex<Vec<&'static CudaDevice>> = Mutex::new(Vec::new());
        let failed = |why| Error::Device { device: format!("cuda:{ordinal}"), action: "open", why };
        // Held while the context is made, so that two threads do not make two.
        let mut devices = DEVICES.lock();
        if let Some(device) = devices.iter().find(|device| device.context.ordinal() == ordinal) {
            return Ok(device);
        }
        let count = device_count().map_err(failed)?;
        if ordinal >= count {
            return Err(failed(format!(
                "this process sees {count} CUDA devices, the first is cuda:0; see nvidia-smi -L"
            )));
        }
        let device = CudaDevice::new(driver::load().map_err(failed)?, ordinal)?;
        devices.push(device);
        Ok(device)
    }

    /// A device of a driver. It is never freed.
    fn new(driver: &'static Driver, ordinal: u32) -> Result<&'static CudaDevice> {
        let context = Context::retain(driver, ordinal).map_err(|error| {
            let (device, why) = (format!("cuda:{ordinal}"), error.describe(driver));
            Error::Device { device, action: "open", why }
        })?;
        let device = CudaDevice {
            context,
            streams: Mutex::default(),
            staging: Mutex::default(),
            slabs: Mutex::default(),
            kernels: OnceLock::new(),
        };
        Ok(Box::leak(Box::new(device)))
    }

    /// Its number among the devices that this process sees.
    pub(super) fn ordinal(&self) -> u32 {
        self.context.ordinal()
    }

    /// What its maker calls it.
    pub(super) fn name(&self) -> &str {
        self.context.name()
    }

    /// Free and total memory, in bytes.
    pub(super) fn memory_bytes(&self) -> Result<(u64, u64)> {
        memory::memory_info(&self.context).map_err(|error| self.context.error("ask for free memory", error))
    }

    /// Takes memory.
    pub(super) fn allocate(&'static self, len_bytes: u64) -> Result<Arc<CudaMemory>> {
        CudaMemory::allocate(self, len_bytes).map(Arc::new)
    }

    /// Takes memory, a small run of it from a slab (see `small`).
    pub(super) fn allocate_small(&'static self, len_bytes: u64) -> Result<Arc<CudaMemory>> {
        CudaMemory::allocate_small(self, len_bytes).map(Arc::new)
    }

    fn slabs(&self) -> &Mutex<Slabs> {
        &self.slabs
    }

    /// The place for the pinned ring of this device.
    pub(super) fn staging(&self) -> &Mutex<Option<Staging>> {
        &self.staging
    }

    /// Loads the kernels, where they are not loaded yet.
    pub(super) fn has_kernels(&'static self) -> Result<()> {
        self.kernels().map(drop)
    }

    /// The kernels, loaded by the first call.
    fn kernels(&'static self) -> Result<&'static Kernels> {
        if let Some(kernels) = self.kernels.get() {
            return Ok(kernels);
        }
        let loaded = Kernels::load(self)?;
        // Who loaded at the same time: either's will do.
        Ok(self.kernels.get_or_init(|| loaded))
    }

    /// The CRC-32 of ranges of some memory of this device, by a kernel. Blocks until they are there.
    ///
    /// # Panics
    /// If a range lies outside the memory.
    pub(super) fn crc32(&'static self, memory: &Arc<CudaMemory>, ranges: &[Range<u64>]) -> Result<Vec<u32>> {
        self.kernels()?.crc32(memory, ranges)
    }

    /// An event for copies of this device.
    pub(super) fn event(&'static self) -> Result<Event> {
        Event::new(&self.context).map_err(|error| self.context.error("make an event", error))
    }

    /// Pins host memory.
    ///
    /// # Safety
    /// The memory stays mapped until the answer is dropped.
    pub(super) unsafe fn pin(&'static self, address: *mut u8, len: usize) -> Result<Pinned> {
        // SAFETY: the caller's promise is the one that is asked for.
        unsafe { Pinned::register(&self.context, address, len, 0) }
            .map_err(|error| self.context.error("pin host memory", error))
    }

    /// Pins host memory that copies only start from. It may be memory that this process cannot write.
    ///
    /// # Safety
    /// As for [`pin`](Self::pin).
    unsafe fn pin_to_read(&'static self, address: *mut u8, len: usize) -> Result<Pinned> {
        // SAFETY: the caller's promise is the one that is asked for.
        unsafe { Pinned::register(&self.context, address, len, driver::HOST_REGISTER_READ_ONLY) }
            .map_err(|error| self.context.error("pin pages of the page cache", error))
    }

    fn context(&'static self) -> &'static Context {
        &self.context
    }

    fn lend_stream(&'static self) -> Result<Stream> {
        if let Some(stream) = self.streams.lock().pop() {
            return Ok(stream);
        }
        Stream::new(&self.context).map_err(|error| self.context.error("make a stream", error))
    }

    /// Takes an idle stream back.
    fn take_stream_back(&self, stream: Stream) {
        let mut streams = self.streams.lock();
        if streams.len() < STREAMS_KEPT_MAX {
            streams.push(stream);
        }
    }
}
