//! Where bytes live: the host or a GPU. Allocates, copies, and moves bytes through pinned memory; knows nothing of keys
//! or files, and starts no transfer by itself.
//!
//! The host device is the reference: whatever works on a GPU works on it, with the same results.
//!
//! # Invariants
//! - A copy in flight owns its memory, on both sides, until the hardware is done with it.
//! - Pinned memory is bounded per device; its shortage makes callers wait and is never a failure.

mod buffer;
#[expect(unsafe_code, reason = "the CUDA driver is a C library")]
mod cuda;
mod foreign;
mod host;
#[expect(unsafe_code, reason = "one pinned mapping is cut into slots that have an owner each")]
pub(crate) mod slab;
pub(crate) mod staging;
#[cfg(test)]
mod tests;
pub(crate) mod transfer;

use std::fmt;
use std::hash::{Hash, Hasher};
use std::io;
use std::ops::Range;
use std::ptr;
use std::str::FromStr;
use std::sync::Arc;

use parking_lot::Mutex;

pub use buffer::DeviceBuffer;
pub(crate) use cuda::PinnedMap;
#[cfg(test)]
pub(crate) use cuda::simulated;
pub(crate) use foreign::{Current, ForeignStream, Mark};

use crate::error::{Error, Result};
use crate::storage::StorageMap;
use buffer::Memory;
use cuda::CudaDevice;
use host::HostMemory;
use staging::{SLOT_BYTES, SLOTS, Staging};

/// A device that holds tensors: the host, or one GPU.
///
/// A handle: cloning it is free, and it may be used from every thread. Two handles are equal when they mean the same
/// device. It holds no stream and no memory of its own.
///
/// ```
/// use alight::Device;
///
/// let device: Device = "host".parse()?;
/// let mut buffer = device.allocate(4)?;
/// buffer.copy_from_host(0, &[1, 2, 3, 4])?;
/// assert_eq!(buffer.as_host(), Some(&[1, 2, 3, 4][..]));
/// # Ok::<(), alight::Error>(())
/// ```
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Device(Kind);

#[derive(Clone, Copy)]
enum Kind {
    Host,
    /// One per GPU and process, kept to the end.
    Cuda(&'static CudaDevice),
}

/// How much memory a device has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    /// The bytes that nobody uses now. Another process may take them at any time.
    pub free: u64,
    /// All bytes of the device.
    pub total: u64,
}

impl Device {
    /// The host: plain memory, no GPU needed.
    pub fn host() -> Device {
        Device(Kind::Host)
    }

    /// The GPU with this number among those that the process sees (`CUDA_VISIBLE_DEVICES` chooses and orders them).
    ///
    /// The first call for a GPU makes its primary context, the one that the CUDA runtime and torch use too: a fraction of a
    /// second, and some hundred MiB of its memory, until the process ends. Later calls are cheap. It neither changes the
    /// calling thread's current context nor resets anything.
    ///
    /// # Errors
    /// [`Error::Device`] where there is no driver, no such GPU, or the driver refuses it, each with its remedy.
    pub fn cuda(ordinal: u32) -> Result<Device> {
        CudaDevice::open(ordinal).map(|device| Device(Kind::Cuda(device)))
    }

    /// The first GPU where it can be used, else the host. Never fails; why there is no GPU is logged (`tracing`, debug)
    /// and told by [`cuda_unavailable_reason`](Self::cuda_unavailable_reason).
    pub fn best() -> Device {
        Device::cuda(0).unwrap_or_else(|error| {
            tracing::debug!(%error, "no GPU, using the host");
            Device::host()
        })
    }

    /// How many GPUs the process sees.
    ///
    /// # Errors
    /// [`Error::Device`] where there is none, or none can be asked for: why, and what to do.
    pub fn cuda_count() -> Result<u32> {
        let failed = |why| Error::Device { device: "cuda".to_string(), action: "look for GPUs", why };
        cuda::device_count().map_err(failed)
    }

    /// Why no GPU can be used and what to do about it; `None` where the driver shows one. It makes no context, so a GPU
    /// that it finds may still refuse to be opened.
    pub fn cuda_unavailable_reason() -> Option<String> {
        cuda::device_count().err()
    }

    /// Whether this is the host.
    pub fn is_host(&self) -> bool {
        matches!(self.0, Kind::Host)
    }

    /// The GPU's number among those that the process sees; `None` for the host.
    pub fn ordinal(&self) -> Option<u32> {
        match self.0 {
            Kind::Host => None,
            Kind::Cuda(gpu) => Some(gpu.ordinal()),
        }
    }

    /// What people call it: `host`, or the maker's name of the GPU (`NVIDIA H100 80GB HBM3`).
    pub fn name(&self) -> &str {
        match self.0 {
            Kind::Host => "host",
            Kind::Cuda(gpu) => gpu.name(),
        }
    }

    /// The memory of a GPU; `None` for the host, which alight does not count.
    ///
    /// # Errors
    /// [`Error::Device`] where the driver failed.
    pub fn memory_bytes(&self) -> Result<Option<DeviceMemory>> {
        match self.0 {
            Kind::Host => Ok(None),
            Kind::Cuda(gpu) => gpu.memory_bytes().map(|(free, total)| Some(DeviceMemory { free, total })),
        }
    }

    /// Memory of `len_bytes` bytes on this device. No bytes are allowed and take no memory of a GPU.
    ///
    /// On a GPU this may wait for the driver (some µs to ms), and freeing it may wait for the GPU's other work: take few and
    /// large ones.
    ///
    /// # Errors
    /// [`Error::DeviceMemory`] where a GPU has too little free; [`Error::Device`] for any other failure.
    pub fn allocate(&self, len_bytes: u64) -> Result<DeviceBuffer> {
        match self.0 {
            Kind::Host => self.host_buffer(len_bytes, HostMemory::zeroed),
            Kind::Cuda(gpu) => Ok(DeviceBuffer::new(self.clone(), Memory::Cuda(gpu.allocate(len_bytes)?))),
        }
    }

    /// [`allocate`](Device::allocate), for who fills the memory or never shows what was not filled: on the host its
    /// contents are whatever an earlier user left there, which saves the page faults of new memory; on a GPU small runs are
    /// cut from slabs of 2 MiB, which saves two calls of the driver, and used again as soon as they are freed.
    pub(crate) fn allocate_to_be_filled(&self, len_bytes: u64) -> Result<DeviceBuffer> {
        match self.0 {
            Kind::Host => self.host_buffer(len_bytes, HostMemory::to_be_filled),
            Kind::Cuda(gpu) => Ok(DeviceBuffer::new(self.clone(), Memory::Cuda(gpu.allocate_small(len_bytes)?))),
        }
    }

    fn host_buffer(&self, len_bytes: u64, take: impl FnOnce(u64) -> io::Result<HostMemory>) -> Result<DeviceBuffer> {
        let memory = take(len_bytes).map_err(|error| Error::Device {
            device: self.to_string(),
            action: "allocate",
            why: format!("{len_bytes} bytes: {error}"),
        })?;
        Ok(DeviceBuffer::new(self.clone(), Memory::Host(memory)))
    }

    /// Whether this device takes checksums and gathers by itself: a GPU that its kernels could be loaded on. The first call
    /// loads them (see [`DeviceBuffer::crc32`]); why it failed is logged.
    pub(crate) fn has_kernels(&self) -> bool {
        match self.0 {
            Kind::Host => false,
            Kind::Cuda(gpu) => gpu
                .has_kernels()
                .inspect_err(|error| tracing::warn!("{error}; checksums are taken on the host"))
                .is_ok(),
        }
    }

    /// Pins a range of a mapped file for copies to this device. Pages that are not in the page cache are read from the disk.
    ///
    /// # Errors
    /// [`Error::Device`] where the driver refuses, and on the host, which needs no pinning.
    pub(crate) fn pin_map(&self, map: Arc<dyn StorageMap>, range: Range<usize>) -> Result<PinnedMap> {
        match self.0 {
            Kind::Host => Err(Error::Device {
                device: self.to_string(),
                action: "pin pages of the page cache",
                why: "only a GPU needs them pinned".to_string(),
            }),
            Kind::Cuda(gpu) => PinnedMap::new(gpu, map, range),
        }
    }

    /// The ring of [`SLOTS`] slots of [`SLOT_BYTES`] that every transfer of this device goes through. The first call makes
    /// it: for a GPU that pins 64 MiB of host memory, some 10 ms. It lives as long as the process.
    ///
    /// # Errors
    /// [`Error::Device`] where the memory cannot be had or pinned; a later call tries again.
    pub(crate) fn staging(&self) -> Result<Staging> {
        static HOST: Mutex<Option<Staging>> = Mutex::new(None);
        let mut staging = match self.0 {
            Kind::Host => HOST.lock(),
            Kind::Cuda(gpu) => gpu.staging().lock(),
        };
        if let Some(staging) = &*staging {
            return Ok(staging.clone());
        }
        Ok(staging.insert(Staging::new(self, SLOTS, SLOT_BYTES)?).clone())
    }
}

/// A simulated GPU of its own, so that the layers above are tested on one everywhere.
#[cfg(test)]
pub(crate) fn simulated_gpu() -> Device {
    Device(Kind::Cuda(cuda::simulated::Simulated::new().device))
}

/// The range of `len` bytes at `offset`, if all of it lies inside a buffer of `total` bytes.
fn check_range(device: &Device, action: &'static str, offset: u64, len: u64, total: u64) -> Result<Range<u64>> {
    match offset.checked_add(len) {
        Some(end) if end <= total => Ok(offset..end),
        _ => {
            let why = format!("{len} bytes at offset {offset} of a buffer of {total} bytes");
            Err(Error::Device { device: device.to_string(), action, why })
        }
    }
}

impl PartialEq for Kind {
    fn eq(&self, other: &Kind) -> bool {
        match (self, other) {
            (Kind::Host, Kind::Host) => true,
            (Kind::Cuda(a), Kind::Cuda(b)) => ptr::eq(*a, *b),
            _ => false,
        }
    }
}

impl Eq for Kind {}

impl Hash for Kind {
    fn hash<H: Hasher>(&self, state: &mut H) {
        match self {
            Kind::Host => None,
            Kind::Cuda(gpu) => Some(gpu.ordinal()),
        }
        .hash(state);
    }
}

/// `host`, or `cuda:0`: what [`FromStr`] reads back.
impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Kind::Host => f.write_str("host"),
            Kind::Cuda(gpu) => write!(f, "cuda:{}", gpu.ordinal()),
        }
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Kind::Host => f.write_str("Device(host)"),
            Kind::Cuda(gpu) => write!(f, "Device(cuda:{}, {})", gpu.ordinal(), gpu.name()),
        }
    }
}

/// Reads `auto` ([`Device::best`]), `host` or `cpu`, `cuda` (the first GPU) and `cuda:N`.
///
/// What is none of these is [`Error::InvalidOption`]; a GPU that cannot be used is what [`Device::cuda`] says.
impl FromStr for Device {
    type Err = Error;

    fn from_str(text: &str) -> Result<Device> {
        match text {
            "auto" => return Ok(Device::best()),
            "host" | "cpu" => return Ok(Device::host()),
            "cuda" => return Device::cuda(0),
            _ => {}
        }
        let digits = text.strip_prefix("cuda:").filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()));
        match digits.and_then(|digits| digits.parse().ok()) {
            Some(ordinal) => Device::cuda(ordinal),
            None => {
                let why = format!("{text:?} is no device; use auto, host, cuda or cuda:N");
                Err(Error::InvalidOption { option: "device", why })
            }
        }
    }
}
