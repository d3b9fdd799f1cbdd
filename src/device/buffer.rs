//! Memory on one device, owned and freed on drop. It refuses ranges that reach past its end.
//!
//! # Invariants
//! - The memory stays where it is from allocation to drop, so its address may be given to hardware.
//! - Hardware that still uses the memory owns a share of it: dropping the buffer frees nothing that is being copied.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use super::cuda::{Copies, CudaMemory};
use super::host::HostMemory;
use super::{Device, check_range};
use crate::error::Result;

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
    /// Shared with the copies that are in flight.
    Cuda(Arc<CudaMemory>),
}

impl DeviceBuffer {
    pub(super) fn new(device: Device, memory: Memory) -> Self {
        Self { device, memory }
    }

    /// The length in bytes, as it was asked for.
    pub fn len_bytes(&self) -> u64 {
        match &self.memory {
            Memory::Host(memory) => memory.len() as u64,
            Memory::Cuda(memory) => memory.len_bytes(),
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
            Memory::Cuda(memory) => Some(memory.address()),
        }
    }

    /// The bytes, where they are in host memory.
    pub fn as_host(&self) -> Option<&[u8]> {
        match &self.memory {
            Memory::Host(memory) => Some(memory.bytes()),
            Memory::Cuda(_) => None,
        }
    }

    /// The bytes to write, where they are in host memory.
    pub fn as_host_mut(&mut self) -> Option<&mut [u8]> {
        match &mut self.memory {
            Memory::Host(memory) => Some(memory.bytes_mut()),
            Memory::Cuda(_) => None,
        }
    }

    /// The bytes and the rest of their last 4 KiB page, where they are in host memory: room for a direct read that ends
    /// in whole blocks. What such a read leaves past [`len_bytes`](Self::len_bytes) is never shown.
    pub(crate) fn as_host_pages_mut(&mut self) -> Option<&mut [u8]> {
        match &mut self.memory {
            Memory::Host(memory) => Some(memory.pages_mut()),
            Memory::Cuda(_) => None,
        }
    }

    /// Copies host bytes to `offset`. Blocks until they are there: a later read on any stream sees them.
    ///
    /// On a GPU the source is pageable memory, which the driver copies through a buffer of its own, at about a tenth of
    /// the bus's speed. It needs no slot of the pinned ring, so it never waits for a transfer.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) where the range reaches past the end (nothing was copied) or the driver failed.
    pub fn copy_from_host(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        let range = check_range(&self.device, "copy from host memory", offset, bytes.len() as u64, self.len_bytes())?;
        match &mut self.memory {
            Memory::Host(memory) => {
                memory.bytes_mut()[to_host_range(range)].copy_from_slice(bytes);
                Ok(())
            }
            Memory::Cuda(_) if bytes.is_empty() => Ok(()),
            Memory::Cuda(memory) => Copies::new(memory)?.write(offset, bytes),
        }
    }

    /// Copies bytes from `offset` on into host memory. Blocks until they are there.
    ///
    /// Its cost on a GPU is that of [`copy_from_host`](Self::copy_from_host).
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) where the range reaches past the end (nothing was copied) or the driver failed.
    pub fn copy_to_host(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let range = check_range(&self.device, "copy to host memory", offset, bytes.len() as u64, self.len_bytes())?;
        match &self.memory {
            Memory::Host(memory) => {
                bytes.copy_from_slice(&memory.bytes()[to_host_range(range)]);
                Ok(())
            }
            Memory::Cuda(_) if bytes.is_empty() => Ok(()),
            Memory::Cuda(memory) => Copies::new(memory)?.read(offset, bytes),
        }
    }

    pub(super) fn memory(&self) -> &Memory {
        &self.memory
    }

    pub(super) fn memory_mut(&mut self) -> &mut Memory {
        &mut self.memory
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
