//! A CUDA driver that is not there: the same table of functions over host memory, so that every rule of this layer is
//! tested on machines without a GPU. It is as late as a GPU may be: a copy from or to pinned memory happens when somebody
//! waits for it, or on a whim when its event is asked after. Who reuses, unpins or frees memory too early is found out.
//!
//! What no caller may do, whatever the driver answers, ends the test process: freeing or unpinning memory that a copy will
//! use, destroying a stream that has work, copying out of bounds. What a caller may get wrong is answered as the driver
//! does: a call without the right context current, a foreign handle.

mod calls;
mod gpu;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use cudarc::driver::sys::CUresult;
use parking_lot::Mutex;

use super::CudaDevice;
use super::driver::Code;
use calls::DRIVER;
pub(crate) use gpu::Gpu;
use gpu::{Failure, Job};

/// The memory of a simulated GPU.
pub(in crate::device) const MEMORY_BYTES: u64 = 1 << 30;

const OK: Code = 0;
const INVALID_VALUE: Code = CUresult::CUDA_ERROR_INVALID_VALUE as Code;
const INVALID_CONTEXT: Code = CUresult::CUDA_ERROR_INVALID_CONTEXT as Code;
const INVALID_HANDLE: Code = CUresult::CUDA_ERROR_INVALID_HANDLE as Code;
const OUT_OF_MEMORY: Code = CUresult::CUDA_ERROR_OUT_OF_MEMORY as Code;
const NOT_READY: Code = CUresult::CUDA_ERROR_NOT_READY as Code;
const INVALID_DEVICE: Code = CUresult::CUDA_ERROR_INVALID_DEVICE as Code;

static GPUS: Mutex<BTreeMap<u32, Arc<Mutex<Gpu>>>> = Mutex::new(BTreeMap::new());

thread_local! {
    /// This thread's contexts, the current one last: the ordinals of their GPUs.
    static CONTEXTS: RefCell<Vec<u32>> = const { RefCell::new(Vec::new()) };
}

/// A handle to a simulated GPU of its own.
pub(crate) struct Simulated {
    pub(in crate::device) device: &'static CudaDevice,
    gpu: Arc<Mutex<Gpu>>,
}

impl Simulated {
    pub(crate) fn new() -> Simulated {
        static ORDINALS: AtomicU32 = AtomicU32::new(1000);
        let ordinal = ORDINALS.fetch_add(1, Ordering::Relaxed);
        let gpu = Arc::new(Mutex::new(Gpu { next_address: 1 << 40, whim: u64::from(ordinal), ..Gpu::default() }));
        GPUS.lock().insert(ordinal, Arc::clone(&gpu));
        let device = CudaDevice::new(&DRIVER, ordinal).expect("a simulated device opens");
        Simulated { device, gpu }
    }

    /// Calls that the GPU has answered so far.
    pub(crate) fn calls(&self) -> u64 {
        self.gpu.lock().calls
    }

    /// Fails the call after the next `calls` ones with a code, once or, where the GPU is lost with it, from then on.
    pub(crate) fn fail_after(&self, calls: u64, code: Code, loses_gpu: bool) {
        let mut gpu = self.gpu.lock();
        gpu.fail = Some(Failure { call: gpu.calls + calls + 1, code, loses_gpu });
    }

    /// Fails nothing more. What is lost stays lost.
    pub(crate) fn fail_no_more(&self) {
        self.gpu.lock().fail = None;
    }

    pub(crate) fn allocated_bytes(&self) -> u64 {
        self.gpu.lock().allocations.values().map(|bytes| bytes.len() as u64).sum()
    }

    /// The most that was allocated at once since it was last asked for.
    pub(crate) fn take_peak_bytes(&self) -> u64 {
        let allocated = self.allocated_bytes();
        std::mem::replace(&mut self.gpu.lock().peak_bytes, allocated)
    }

    pub(crate) fn streams(&self) -> usize {
        self.gpu.lock().streams.len()
    }

    pub(in crate::device) fn pinned_bytes(&self) -> usize {
        self.gpu.lock().pinned.values().sum()
    }

    /// Copies that nobody has waited for yet.
    pub(in crate::device) fn copies_in_flight(&self) -> usize {
        self.gpu.lock().streams.values().map(|queue| queue.jobs.len()).sum()
    }

    /// Makes this GPU's context the thread's own, as a caller's CUDA code does; says which one is current.
    pub(crate) fn make_current(&self) {
        CONTEXTS.with_borrow_mut(|contexts| contexts.push(self.device.ordinal()));
    }

    /// The ordinals of the thread's contexts, the current one last.
    pub(crate) fn contexts() -> Vec<u32> {
        CONTEXTS.with_borrow(Clone::clone)
    }
}

/// Runs a call on the GPU whose context is current.
fn on_current(call: impl FnOnce(&mut Gpu) -> Result<(), Code>) -> Code {
    let Some(ordinal) = CONTEXTS.with_borrow(|contexts| contexts.last().copied()) else { return INVALID_CONTEXT };
    let gpu = Arc::clone(&GPUS.lock()[&ordinal]);
    let mut gpu = gpu.lock();
    gpu.begin().and_then(|()| call(&mut gpu)).err().unwrap_or(OK)
}

/// For a simulation of another library: the GPU whose context is current on this thread, if any is.
pub(crate) fn current<R>(use_it: impl FnOnce(&mut Gpu) -> R) -> Option<R> {
    let ordinal = CONTEXTS.with_borrow(|contexts| contexts.last().copied())?;
    let gpu = Arc::clone(&GPUS.lock()[&ordinal]);
    let mut gpu = gpu.lock();
    Some(use_it(&mut gpu))
}

/// Enqueues work of another library on a stream of the current GPU; false where there is no such stream.
pub(crate) fn enqueue(stream: *mut c_void, device: u64, work: Box<dyn FnOnce(&mut Gpu) + Send>) -> bool {
    current(|gpu| gpu.enqueue(stream.addr(), Job::Foreign { device, work })).is_some_and(|answer| answer.is_ok())
}
