//! Where bytes live: the host or a GPU. Allocates, copies, and moves bytes through pinned memory; knows nothing of keys
//! or files, and starts no transfer by itself.
//!
//! The host device is the reference: whatever works on a GPU works on it, with the same results.
//!
//! # Invariants
//! - A copy in flight owns its memory, on both sides, until the hardware is done with it.
//! - Pinned memory is bounded per device; its shortage makes callers wait and is never a failure.

mod buffer;
mod host;

use std::fmt;
use std::str::FromStr;

pub use buffer::DeviceBuffer;

use crate::error::{Error, Result};
use buffer::Memory;
use host::HostMemory;

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

#[derive(Clone, PartialEq, Eq, Hash)]
enum Kind {
    Host,
}

impl Device {
    /// The host: plain memory, no GPU needed.
    pub fn host() -> Device {
        Device(Kind::Host)
    }

    /// Whether this is the host.
    pub fn is_host(&self) -> bool {
        matches!(self.0, Kind::Host)
    }

    /// Memory of `len_bytes` bytes on this device. No bytes are allowed and take no memory of a GPU.
    ///
    /// # Errors
    /// [`Error::DeviceMemory`] where a GPU has too little free; [`Error::Device`] for any other failure.
    pub fn allocate(&self, len_bytes: u64) -> Result<DeviceBuffer> {
        let memory = match self.0 {
            Kind::Host => Memory::Host(HostMemory::zeroed(len_bytes).map_err(|error| Error::Device {
                device: self.to_string(),
                action: "allocate",
                why: format!("{len_bytes} bytes: {error}"),
            })?),
        };
        Ok(DeviceBuffer::new(self.clone(), memory))
    }
}

/// `host`, or `cuda:0`: what [`FromStr`] reads back.
impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Kind::Host => f.write_str("host"),
        }
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({self})")
    }
}

/// Reads `host` or `cpu`.
impl FromStr for Device {
    type Err = Error;

    fn from_str(text: &str) -> Result<Device> {
        match text {
            "host" | "cpu" => Ok(Device::host()),
            _ => Err(Error::InvalidOption { option: "device", why: format!("{text:?} is no device; use host") }),
        }
    }
}
