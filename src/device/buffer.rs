//! Memory on one device, owned and freed on drop. It refuses ranges that reach past its end.
//!
//! # Invariants
//! - The memory stays where it is from allocation to drop, so its address may be given to hardware.
//! - Hardware that still uses the memory owns a share of it: dropping the buffer frees nothing that is being copied.

use std::fmt;
use std::ops::Range;

use super::Device;
use super::host::HostMemory;
use crate::error::{Error, Result};

/// Memory on one device, freed on drop.
///
/// It never moves, and its contents are plain bytes: alight gives them meaning only through
/// [`Tensor`](crate::Tensor). Made by [`Device::allocate`]. Host memory starts at a multiple of 4096 and is zeroed;
/// memory of a GPU holds whatever was there before.
pub struct DeviceBuffer {
    device: Device,
    memory: Memory,
}

/// Where the bytes are.
pub(super) enum Memory {
    Host(HostMemory),
}

impl DeviceBuffer {
    pub(super) fn new(device: Device, memory: Memory) -> Self {
        Self { device, memory }
    }

    /// The length in bytes, as it was asked for.
    pub fn len_bytes(&self) -> u64 {
        match &self.memory {
            Memory::Host(memory) => memory.len() as u64,
        }
    }

    /// The device that holds the memory.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The address in the GPU's memory, for other libraries; `None` on the host, 0 for a buffer of no bytes.
    ///
    /// Valid while the buffer lives. Whoever writes through it must have finished (a stream synchronised, an event
    /// waited for) before alight reads the bytes: alight's copies wait for no stream but their own.
    pub fn device_ptr(&self) -> Option<u64> {
        match &self.memory {
            Memory::Host(_) => None,
        }
    }

    /// The bytes, where they are in host memory.
    pub fn as_host(&self) -> Option<&[u8]> {
        match &self.memory {
            Memory::Host(memory) => Some(memory.bytes()),
        }
    }

    /// The bytes to write, where they are in host memory.
    pub fn as_host_mut(&mut self) -> Option<&mut [u8]> {
        match &mut self.memory {
            Memory::Host(memory) => Some(memory.bytes_mut()),
        }
    }

    /// The bytes and the rest of their last 4 KiB page, where they are in host memory: room for a direct read that ends
    /// in whole blocks. What such a read leaves past [`len_bytes`](Self::len_bytes) is never shown.
    pub(crate) fn as_host_pages_mut(&mut self) -> Option<&mut [u8]> {
        match &mut self.memory {
            Memory::Host(memory) => Some(memory.pages_mut()),
        }
    }

    /// Copies host bytes to `offset`. Blocks until they are there: a later read on any stream sees them.
    ///
    /// On a GPU the source is pageable memory, which the driver copies through a buffer of its own, at about a tenth of
    /// the bus's speed. It needs no slot of the pinned ring, so it never waits for a transfer.
    ///
    /// # Errors
    /// [`Error::Device`] where the range reaches past the end (nothing was copied) or the driver failed.
    pub fn copy_from_host(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        let range = self.check_range("copy from host memory", offset, bytes.len() as u64)?;
        match &mut self.memory {
            Memory::Host(memory) => {
                memory.bytes_mut()[to_host_range(range)].copy_from_slice(bytes);
                Ok(())
            }
        }
    }

    /// Copies bytes from `offset` on into host memory. Blocks until they are there.
    ///
    /// Its cost on a GPU is that of [`copy_from_host`](Self::copy_from_host).
    ///
    /// # Errors
    /// [`Error::Device`] where the range reaches past the end (nothing was copied) or the driver failed.
    pub fn copy_to_host(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let range = self.check_range("copy to host memory", offset, bytes.len() as u64)?;
        match &self.memory {
            Memory::Host(memory) => {
                bytes.copy_from_slice(&memory.bytes()[to_host_range(range)]);
                Ok(())
            }
        }
    }

    /// The range, if all of it lies inside the buffer.
    pub(super) fn check_range(&self, action: &'static str, offset: u64, len: u64) -> Result<Range<u64>> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len_bytes() => Ok(offset..end),
            _ => {
                let why = format!("{len} bytes at offset {offset} of a buffer of {} bytes", self.len_bytes());
                Err(Error::Device { device: self.device.to_string(), action, why })
            }
        }
    }
}

/// A checked range of a host buffer, as indices: its ends are at most the length of memory that exists.
fn to_host_range(range: Range<u64>) -> Range<usize> {
    range.start as usize..range.end as usize
}

impl fmt::Debug for DeviceBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceBuffer({} bytes on {})", self.len_bytes(), self.device)
    }
}
