//! Memory that CUDA knows: on the device, taken and freed; on the host, pinned and unpinned. It copies nothing.
//!
//! # Invariants
//! - Whoever enqueues a copy holds a share of the device memory until the copy is done, so the last share frees it with no
//!   copy in flight.

use std::ffi::{c_uint, c_void};

use super::CudaDevice;
use super::context::Context;
use super::driver::{CUdeviceptr, HOST_REGISTER_PORTABLE};
use super::error::CudaError;
use super::small::{SLAB_BYTES, SMALL_BYTES_MAX};
use crate::error::{Error, Result};

/// A run of device memory.
pub(in crate::device) struct CudaMemory {
    device: &'static CudaDevice,
    /// 0 for no bytes.
    address: CUdeviceptr,
    len_bytes: u64,
    /// Whether it is a run of one of the device's slabs.
    from_slab: bool,
}

impl CudaMemory {
    /// Takes `len_bytes` bytes; the contents are whatever was there. No bytes take nothing.
    pub(super) fn allocate(device: &'static CudaDevice, len_bytes: u64) -> Result<CudaMemory> {
        let address = if len_bytes > 0 { take(device.context(), len_bytes)? } else { 0 };
        Ok(CudaMemory { device, address, len_bytes, from_slab: false })
    }

    /// As [`allocate`](Self::allocate); a small run is cut from a slab, which takes no call of the driver but for the first of
    /// many. It is used again as soon as it is freed: nobody may work on it then who does not hold a share.
    pub(super) fn allocate_small(device: &'static CudaDevice, len_bytes: u64) -> Result<CudaMemory> {
        if len_bytes == 0 || len_bytes > SMALL_BYTES_MAX {
            return Self::allocate(device, len_bytes);
        }
        let mut slabs = device.slabs().lock();
        let address = match slabs.take(len_bytes) {
            Some(address) => address,
            None => {
                let slab = take(device.context(), SLAB_BYTES)?;
                let second = slabs.add(slab);
                debug_assert_eq!(second, None, "a spare slab would have been cut");
                slabs.take(len_bytes).expect("a slab was just added")
            }
        };
        Ok(CudaMemory { device, address, len_bytes, from_slab: true })
    }

    /// The device that the memory is on.
    pub(in crate::device) fn device(&self) -> &'static CudaDevice {
        self.device
    }

    /// The address of the first byte; 0 for no bytes.
    pub(in crate::device) fn address(&self) -> CUdeviceptr {
        self.address
    }

    /// The length in bytes.
    pub(in crate::device) fn len_bytes(&self) -> u64 {
        self.len_bytes
    }
}

impl Drop for CudaMemory {
    fn drop(&mut self) {
        let to_free = match self.len_bytes {
            0 => None,
            _ if self.from_slab => self.device.slabs().lock().give_back(self.address),
            _ => Some(self.address),
        };
        let Some(address) = to_free else { return };
        // SAFETY: the address came from `take`, is freed once, and no copy uses it (see the invariant).
        let freed = self.device.context().enter().and_then(|entered| unsafe { entered.driver.memory_free(address) });
        if let Err(error) = freed {
            self.device.context().log("free memory", error);
        }
    }
}

/// Takes memory from the driver.
fn take(context: &Context, len_bytes: u64) -> Result<CUdeviceptr> {
    let mut address: CUdeviceptr = 0;
    // A length that no address space has is refused like one that the device has not.
    let len = usize::try_from(len_bytes).unwrap_or(usize::MAX);
    context
        .enter()
        // SAFETY: `address` is a valid place for the answer, and the context is current.
        .and_then(|entered| unsafe { entered.driver.memory_allocate(&mut address, len) })
        .map_err(|error| match (error, memory_info(context)) {
            (CudaError::OUT_OF_MEMORY, Ok((free, _))) => {
                Error::DeviceMemory { device: format!("cuda:{}", context.ordinal()), needed: len_bytes, free }
            }
            _ => context.error("allocate", error),
        })?;
    Ok(address)
}

/// The free and the total bytes of the device.
pub(super) fn memory_info(context: &Context) -> Result<(u64, u64), CudaError> {
    let (mut free, mut total) = (0, 0);
    let entered = context.enter()?;
    // SAFETY: both are valid places for the answers, and the context is current.
    unsafe { entered.driver.memory_info(&mut free, &mut total) }?;
    Ok((free as u64, total as u64))
}

/// Host memory is pinned while this lives.
pub(in crate::device) struct Pinned {
    context: &'static Context,
    address: *mut c_void,
    /// Where the device sees it, where it says so.
    device_address: Option<CUdeviceptr>,
}

// SAFETY: the address is only given back to the driver, which any thread may do.
unsafe impl Send for Pinned {}
// SAFETY: nothing can be done with a shared one.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// Pins host memory for every context of the process; `flags` are more than that.
    ///
    /// Memory of our own is registered, rather than taken from the driver (`cuMemHostAlloc`), because it is then ordinary
    /// anonymous memory: in huge pages, touched by several threads at once, and a place for direct I/O on any kernel.
    ///
    /// # Safety
    /// The memory stays mapped until the answer is dropped.
    pub(super) unsafe fn register(
        context: &'static Context,
        address: *mut u8,
        len: usize,
        flags: c_uint,
    ) -> Result<Pinned, CudaError> {
        let address = address.cast::<c_void>();
        let entered = context.enter()?;
        // SAFETY: the caller answers for the memory; the context is current.
        unsafe { entered.driver.host_register(address, len, HOST_REGISTER_PORTABLE | flags) }?;
        let mut seen: CUdeviceptr = 0;
        // SAFETY: `seen` is a place for the answer, and the memory was just pinned.
        let asked = unsafe { entered.driver.host_device_address(&mut seen, address, 0) };
        Ok(Pinned { context, address, device_address: asked.is_ok().then_some(seen) })
    }

    /// Where kernels of the device find the first byte; `None` where the device cannot reach host memory.
    pub(in crate::device) fn device_address(&self) -> Option<CUdeviceptr> {
        self.device_address
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: the address came from `host_register` and is given back once.
        let unpinned = self.context.enter().and_then(|entered| unsafe { entered.driver.host_unregister(self.address) });
        if let Err(error) = unpinned {
            self.context.log("unpin host memory", error);
        }
    }
}
