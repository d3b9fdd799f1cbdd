//! What the CUDA driver answers when it refuses: a number, told in words with the remedy where one is known. It judges
//! nothing, and a number that nobody knows stays one.

use std::ffi::{CStr, c_char};
use std::ptr;

use cudarc::driver::sys::CUresult;

use super::driver::{Code, Driver};

/// An answer of the driver other than success.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CudaError(Code);

impl CudaError {
    /// Device memory is used up.
    pub(super) const OUT_OF_MEMORY: CudaError = CudaError(CUresult::CUDA_ERROR_OUT_OF_MEMORY as Code);
    /// The process is ending and the driver is gone.
    pub(super) const DEINITIALIZED: CudaError = CudaError(CUresult::CUDA_ERROR_DEINITIALIZED as Code);
    /// The event has not passed yet.
    pub(super) const NOT_READY: CudaError = CudaError(CUresult::CUDA_ERROR_NOT_READY as Code);

    /// Success, or the error.
    pub(super) fn check(code: Code) -> Result<(), CudaError> {
        if code == CUresult::CUDA_SUCCESS as Code { Ok(()) } else { Err(CudaError(code)) }
    }

    /// The driver's name and text for the answer, and what to do about it.
    pub(super) fn describe(self, driver: &Driver) -> String {
        let mut words = match text(|out| {
            // SAFETY: `out` is a valid place for one pointer.
            unsafe { driver.error_name(self.0, out) }
        }) {
            Some(name) => format!("{name} ({})", self.0),
            None => format!("unknown CUDA error {}", self.0),
        };
        if let Some(meaning) = text(|out| {
            // SAFETY: as above.
            unsafe { driver.error_text(self.0, out) }
        }) {
            words = format!("{words}: {meaning}");
        }
        if let Some(remedy) = self.remedy() {
            words = format!("{words}; {remedy}");
        }
        words
    }

    /// What the caller can do, where it is known.
    fn remedy(self) -> Option<&'static str> {
        const INIT: Code = CUresult::CUDA_ERROR_NOT_INITIALIZED as Code;
        const STUB: Code = CUresult::CUDA_ERROR_STUB_LIBRARY as Code;
        const BUSY: Code = CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE as Code;
        const NONE: Code = CUresult::CUDA_ERROR_NO_DEVICE as Code;
        const NOT_READY: Code = CUresult::CUDA_ERROR_SYSTEM_NOT_READY as Code;
        const MISMATCH: Code = CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH as Code;
        const COMPAT: Code = CUresult::CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE as Code;
        const UNKNOWN: Code = CUresult::CUDA_ERROR_UNKNOWN as Code;
        const LOST: [Code; 7] = [
            CUresult::CUDA_ERROR_ECC_UNCORRECTABLE as Code,
            CUresult::CUDA_ERROR_ILLEGAL_ADDRESS as Code,
            CUresult::CUDA_ERROR_LAUNCH_TIMEOUT as Code,
            CUresult::CUDA_ERROR_ASSERT as Code,
            CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR as Code,
            CUresult::CUDA_ERROR_MISALIGNED_ADDRESS as Code,
            CUresult::CUDA_ERROR_LAUNCH_FAILED as Code,
        ];
        Some(match self.0 {
            INIT => "a process that was forked after CUDA started cannot use it: start the child by exec or spawn",
            STUB => "take the CUDA toolkit's stubs directory out of LD_LIBRARY_PATH",
            BUSY => "another process may hold the GPU in exclusive mode: see nvidia-smi -q -d COMPUTE",
            NONE => "see nvidia-smi and CUDA_VISIBLE_DEVICES",
            NOT_READY => "start the NVIDIA fabric manager, or wait until it is up",
            MISMATCH => {
                "the kernel module and the library are of different versions: restart after the driver's update"
            }
            COMPAT => "take the CUDA compatibility package's directory out of LD_LIBRARY_PATH",
            UNKNOWN => "see that the NVIDIA kernel module is loaded and /dev/nvidia* can be opened",
            code if LOST.contains(&code) => {
                "the process has lost the GPU: some kernel or the hardware failed; restart the process"
            }
            _ => return None,
        })
    }
}

/// A text that the driver keeps.
fn text(get: impl FnOnce(*mut *const c_char) -> Result<(), CudaError>) -> Option<String> {
    let mut text: *const c_char = ptr::null();
    get(&mut text).ok()?;
    if text.is_null() {
        return None;
    }
    // SAFETY: the driver answered with success, so this is a string of its own, ended by a zero, that is never freed.
    Some(unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
}
