//! Device memory for transfers, owned, and pinned for direct ones where it was asked for.
//!
//! # Invariants
//! - Memory is unpinned before it is freed, and neither happens while an operation has a share of the buffer.

use std::ffi::c_void;
use std::fmt;
use std::ptr;
use std::sync::Arc;

use super::driver::CuFile;
use super::error::{self, Error, ErrorKind, Result};
use super::transfer::device_error;
use crate::device::{Device, DeviceBuffer};

/// Device memory for transfers. A handle: cloning it is free, and operations in flight hold clones of their own.
#[derive(Clone)]
pub struct Buffer(Arc<Shared>);

struct Shared {
    // Dropped in this order: unpinned, then freed.
    registered: Option<Registered>,
    memory: DeviceBuffer,
}

/// Memory that cuFile has pinned.
struct Registered {
    cufile: CuFile,
    device: Device,
    address: u64,
}

impl Buffer {
    /// Memory as it is. cuFile moves bytes to it through buffers of its own, or directly where it is on a direct path.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] where the memory is on the host.
    pub fn new(memory: DeviceBuffer) -> Result<Buffer> {
        address(&memory)?;
        Ok(Buffer(Arc::new(Shared { registered: None, memory })))
    }

    /// Memory pinned for direct transfers. That takes milliseconds and the GPU's BAR1 space: it pays where the buffer is
    /// used many times, on a machine with a direct path.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] where the memory is on the host or empty; [`ErrorKind::Status`] where cuFile refuses it. The
    /// memory is freed then.
    pub fn registered(cufile: CuFile, memory: DeviceBuffer) -> Result<Buffer> {
        let (address, len) = (address(&memory)?, memory.len_bytes());
        let device = memory.device().clone();
        let failed = |kind| Error::new("register", format!("{len} bytes on {device}"), kind);
        if len == 0 {
            return Err(failed(ErrorKind::Invalid("no bytes to register".to_string())));
        }
        let current = device.make_current().map_err(|error| device_error("register", &error))?;
        // SAFETY: the memory is a whole allocation, which lives until `Registered` is dropped.
        let answer = unsafe { (cufile.functions().buffer_register)(pointer(address), len as usize, 0) };
        error::check(answer).map_err(failed)?;
        drop(current);
        let registered = Some(Registered { cufile, device, address });
        Ok(Buffer(Arc::new(Shared { registered, memory })))
    }

    /// The memory.
    pub fn memory(&self) -> &DeviceBuffer {
        &self.0.memory
    }

    /// The memory, to write to; `None` while a clone or an operation in flight has a share of it.
    pub fn memory_mut(&mut self) -> Option<&mut DeviceBuffer> {
        Arc::get_mut(&mut self.0).map(|shared| &mut shared.memory)
    }

    /// Whether it is pinned for direct transfers.
    pub fn is_registered(&self) -> bool {
        self.0.registered.is_some()
    }

    /// The memory, unpinned; the buffer itself while a clone or an operation in flight has a share of it.
    ///
    /// # Errors
    /// The buffer, unchanged.
    pub fn into_memory(self) -> std::result::Result<DeviceBuffer, Buffer> {
        let Shared { registered, memory } = Arc::try_unwrap(self.0).map_err(Buffer)?;
        drop(registered);
        Ok(memory)
    }
}

fn address(memory: &DeviceBuffer) -> Result<u64> {
    memory.device_ptr().ok_or_else(|| {
        let why = "it is host memory; cuFile moves bytes to and from a GPU".to_string();
        Error::new("use", format!("{memory:?}"), ErrorKind::Invalid(why))
    })
}

/// A device address as C takes it.
fn pointer(address: u64) -> *const c_void {
    ptr::with_exposed_provenance(address as usize)
}

impl Drop for Registered {
    fn drop(&mut self) {
        let answer =
            self.device.make_current().map_err(|error| device_error("deregister", &error)).and_then(|_current| {
                // SAFETY: the address was registered, is deregistered once, and no operation uses the memory.
                let answer = unsafe { (self.cufile.functions().buffer_deregister)(pointer(self.address)) };
                error::check(answer)
                    .map_err(|kind| Error::new("deregister", format!("memory on {}", self.device), kind))
            });
        if let Err(error) = answer {
            tracing::warn!("{error}");
        }
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let registered = if self.is_registered() { ", registered" } else { "" };
        write!(f, "Buffer({:?}{registered})", self.memory())
    }
}
