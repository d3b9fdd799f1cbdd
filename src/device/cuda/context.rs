//! A device's primary context: what every call to the driver happens in. It is made once, never released, and is the one
//! that the CUDA runtime, and so torch, uses on that device.
//!
//! # Invariants
//! - A call runs with the context current on its thread, and leaves the thread with the context that it had: the caller's
//!   own CUDA code must not find itself on another GPU.

use std::ffi::{CStr, c_char, c_int};
use std::marker::PhantomData;
use std::ptr;

use super::driver::{CUcontext, CUdevice, Driver};
use super::error::CudaError;
use crate::error::Error;

/// The longest device name that is read; the driver cuts a longer one.
const NAME_BYTES_MAX: usize = 256;

/// The primary context of one device.
pub(super) struct Context {
    driver: &'static Driver,
    raw: CUcontext,
    ordinal: u32,
    name: String,
}

// SAFETY: a context is a handle that the driver allows every thread to use at the same time.
unsafe impl Send for Context {}
// SAFETY: as above; nothing here changes after it is made.
unsafe impl Sync for Context {}

/// How many devices this process sees.
pub(super) fn device_count(driver: &Driver) -> Result<u32, CudaError> {
    let mut count: c_int = 0;
    // SAFETY: `count` is a valid place for the answer.
    unsafe { driver.device_get_count(&mut count) }?;
    Ok(u32::try_from(count).unwrap_or(0))
}

impl Context {
    /// Retains the device's primary context, made when this process has none: that takes a fraction of a second and some
    /// hundred MiB of the GPU's memory.
    pub(super) fn retain(driver: &'static Driver, ordinal: u32) -> Result<Context, CudaError> {
        let mut device: CUdevice = 0;
        let mut name = [0; NAME_BYTES_MAX];
        let mut raw: CUcontext = ptr::null_mut();
        // An ordinal too large for the driver's type is one that it does not know.
        let index = c_int::try_from(ordinal).unwrap_or(c_int::MAX);
        // SAFETY: `device` is a valid place for the answer.
        unsafe { driver.device_get(&mut device, index) }?;
        // SAFETY: `name` has the stated length, and `device` is the driver's own answer.
        unsafe { driver.device_get_name(name.as_mut_ptr().cast::<c_char>(), NAME_BYTES_MAX as c_int, device) }?;
        // SAFETY: `raw` is a valid place for the answer, and `device` is the driver's own.
        unsafe { driver.primary_context_retain(&mut raw, device) }?;
        let name =
            CStr::from_bytes_until_nul(&name).map_or_else(|_| String::new(), |name| name.to_string_lossy().into());
        Ok(Context { driver, raw, ordinal, name })
    }

    /// The device's ordinal.
    pub(super) fn ordinal(&self) -> u32 {
        self.ordinal
    }

    /// The device's name.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Makes the context current on this thread until the guard is dropped, and gives the functions to call in it.
    pub(super) fn enter(&self) -> Result<Entered<'_>, CudaError> {
        let mut current: CUcontext = ptr::null_mut();
        // SAFETY: `current` is a valid place for the answer.
        unsafe { self.driver.context_current(&mut current) }?;
        let pushed = current != self.raw;
        if pushed {
            // SAFETY: the context was retained and is never released.
            unsafe { self.driver.context_push(self.raw) }?;
        }
        Ok(Entered { driver: self.driver, pushed, this_thread: PhantomData })
    }

    /// The driver's refusal of an action on this device.
    pub(super) fn error(&self, action: &'static str, error: CudaError) -> Error {
        Error::Device { device: format!("cuda:{}", self.ordinal), action, why: error.describe(self.driver) }
    }

    /// Logs a failure that nobody is there to be told of: one inside a drop. At the process's end the driver may be gone
    /// already, and everything with it.
    pub(super) fn log(&self, action: &'static str, error: CudaError) {
        if error != CudaError::DEINITIALIZED {
            tracing::warn!("{}", self.error(action, error));
        }
    }
}

/// The context is current on this thread while this lives.
pub(super) struct Entered<'c> {
    pub(super) driver: &'c Driver,
    pushed: bool,
    /// The guard must be dropped on the thread that made it.
    this_thread: PhantomData<*const ()>,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        if self.pushed {
            let mut popped: CUcontext = ptr::null_mut();
            // SAFETY: `popped` is a valid place for the answer; `enter` pushed on this thread, and guards nest.
            if let Err(error) = unsafe { self.driver.context_pop(&mut popped) }
                && error != CudaError::DEINITIALIZED
            {
                tracing::warn!("give a thread its CUDA context back: {}", error.describe(self.driver));
            }
        }
    }
}
