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
use crate::error::{Error, Result};
use crate::storage::Landing;

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

    /// The same room, as what a read fills. Where it is left to the read this buffer is an empty one from then on.
    pub(crate) fn as_host_landing(&mut self) -> Option<impl Landing> {
        match &mut self.memory {
            Memory::Host(memory) => Some(memory),
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

    /// Copies pieces of other buffers of the same device to `offset`, one behind the other. Blocks until they are there.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) where a range reaches past an end or a piece is on another device (nothing was
    /// copied), or the driver failed: then the bytes are unspecified.
    pub(crate) fn copy_from(&mut self, mut offset: u64, pieces: &[(&DeviceBuffer, Range<u64>)]) -> Result<()> {
        const ACTION: &str = "copy on one device";
        let mut end = offset;
        for (source, range) in pieces {
            let len = range.end.checked_sub(range.start).unwrap_or(u64::MAX);
            check_range(&self.device, ACTION, range.start, len, source.len_bytes())?;
            end = check_range(&self.device, ACTION, end, len, self.len_bytes())?.end;
            if source.device != self.device {
                let why = format!("the source is on {}", source.device);
                return Err(Error::Device { device: self.device.to_string(), action: ACTION, why });
            }
        }
        match &mut self.memory {
            Memory::Host(memory) => {
                for (source, range) in pieces {
                    let bytes = &source.as_host().expect("it is on the host")[to_host_range(range.clone())];
                    let target = to_host_range(offset..offset + bytes.len() as u64);
                    memory.bytes_mut()[target].copy_from_slice(bytes);
                    offset += bytes.len() as u64;
                }
                Ok(())
            }
            Memory::Cuda(_) if end == offset => Ok(()),
            Memory::Cuda(memory) => {
                let copies = Copies::new(memory)?;
                for (source, range) in pieces.iter().filter(|(_, range)| !range.is_empty()) {
                    if let Memory::Cuda(source) = &source.memory {
                        copies.bring(source, range, offset)?;
                    }
                    offset += range.end - range.start;
                }
                copies.finish()
            }
        }
    }

    /// The CRC-32 (IEEE, as crc32fast's) of each range. Blocks until they are there. An empty range has 0.
    ///
    /// On a GPU a kernel takes them where the bytes lie, at a large part of its memory's bandwidth; they need not be
    /// aligned. The first call on a GPU loads the kernels: 1 ms, and 0.2 s where the driver compiles them for the first time
    /// on this machine. It keeps 80 KiB of the GPU's memory. On the host it is this thread's work.
    ///
    /// Who writes to the memory from another stream must have finished, as for [`device_ptr`](Self::device_ptr).
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) where a range reaches past the end, or the driver failed.
    pub fn crc32(&self, ranges: &[Range<u64>]) -> Result<Vec<u32>> {
        for range in ranges {
            let len = range.end.checked_sub(range.start).unwrap_or(u64::MAX);
            check_range(&self.device, "take the checksum of", range.start, len, self.len_bytes())?;
        }
        match &self.memory {
            Memory::Host(memory) => {
                let crc = |range: &Range<u64>| crc32fast::hash(&memory.bytes()[to_host_range(range.clone())]);
                Ok(ranges.iter().map(crc).collect())
            }
            Memory::Cuda(memory) => memory.device().crc32(memory, ranges),
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
