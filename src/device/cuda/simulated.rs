//! A CUDA driver that is not there: the same table of functions over host memory, so that every rule of this layer is
//! tested on machines without a GPU. It is as late as a GPU may be: a copy from or to pinned memory happens when somebody
//! waits for it, or on a whim when its event is asked after. Who reuses, unpins or frees memory too early is found out.
//!
//! What no caller may do, whatever the driver answers, ends the test process: freeing or unpinning memory that a copy will
//! use, destroying a stream that has work, copying out of bounds. What a caller may get wrong is answered as the driver
//! does: a call without the right context current, a foreign handle.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ops::Range;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use cudarc::driver::sys::CUresult;
use parking_lot::Mutex;

use super::CudaDevice;
use super::driver::{CUcontext, CUdevice, CUdeviceptr, CUevent, CUfunction, CUmodule, CUstream, Code, Driver};
use super::kernels::{self, RawCopy, RawRange};

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
static HANDLES: AtomicUsize = AtomicUsize::new(1);

thread_local! {
    /// This thread's contexts, the current one last: the ordinals of their GPUs.
    static CONTEXTS: RefCell<Vec<u32>> = const { RefCell::new(Vec::new()) };
}

#[derive(Default)]
pub(crate) struct Gpu {
    allocations: BTreeMap<u64, Vec<u8>>,
    next_address: u64,
    /// The most that was ever allocated at once.
    peak_bytes: u64,
    pinned: BTreeMap<usize, usize>,
    streams: BTreeMap<usize, Queue>,
    /// What each event was last recorded behind: a stream and the number of its last job.
    events: BTreeMap<usize, Option<(usize, u64)>>,
    whim: u64,
    calls: u64,
    fail: Option<Failure>,
    lost: Option<Code>,
}

#[derive(Clone, Copy)]
struct Failure {
    call: u64,
    code: Code,
    loses_gpu: bool,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    enqueued: u64,
    done: u64,
}

enum Job {
    ToDevice {
        target: u64,
        source: Source,
    },
    ToHost {
        target: Range<usize>,
        source: u64,
    },
    OnDevice {
        target: u64,
        source: u64,
        len: usize,
    },
    Fill {
        target: u64,
        words: usize,
        word: u32,
    },
    /// What `crc32_ranges` does.
    Checksums {
        ranges: u64,
        crcs: u64,
        count: usize,
        parts: u64,
    },
    /// What `gather` does, out of pinned memory.
    Gather {
        copies: Range<usize>,
    },
    /// Work of another library on device memory: the first byte of what it uses, and what it does.
    Foreign {
        device: u64,
        work: Box<dyn FnOnce(&mut Gpu) + Send>,
    },
}

enum Source {
    Pinned(Range<usize>),
    /// Pageable memory is copied by the driver before the call returns.
    Taken(Vec<u8>),
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

impl Gpu {
    /// Whether the call may go ahead.
    fn begin(&mut self) -> Result<(), Code> {
        self.calls += 1;
        if let Some(failure) = self.fail.take_if(|failure| failure.call == self.calls) {
            self.lost = failure.loses_gpu.then_some(failure.code);
            if failure.loses_gpu {
                // The hardware stops where it is.
                self.streams.values_mut().for_each(|queue| queue.jobs.clear());
            }
            return Err(failure.code);
        }
        self.lost.map_or(Ok(()), Err)
    }

    fn is_pinned(&self, range: &Range<usize>) -> bool {
        let before = self.pinned.range(..=range.start).next_back();
        before.is_some_and(|(start, len)| range.end <= start + len)
    }

    /// Whether a copy in flight uses any of this host memory.
    fn host_in_use(&self, range: &Range<usize>) -> bool {
        self.streams.values().flat_map(|queue| &queue.jobs).any(|job| match job {
            Job::ToDevice { source: Source::Pinned(host), .. } | Job::ToHost { target: host, .. } => {
                host.start < range.end && range.start < host.end
            }
            Job::Gather { copies } => {
                let table = std::iter::once(copies.clone());
                table
                    .chain(gathered(copies).iter().map(|copy| host_range(copy.source, copy.len)))
                    .any(|used| used.start < range.end && range.start < used.end)
            }
            Job::ToDevice { .. }
            | Job::OnDevice { .. }
            | Job::Foreign { .. }
            | Job::Fill { .. }
            | Job::Checksums { .. } => false,
        })
    }

    /// The bytes of device memory, where all of them are in one allocation.
    pub(crate) fn memory(&mut self, address: u64, len: usize) -> Option<&mut [u8]> {
        let (start, bytes) = self.allocations.range_mut(..=address).next_back()?;
        let offset = usize::try_from(address - start).ok()?;
        bytes.get_mut(offset..offset.checked_add(len)?)
    }

    /// The bytes of device memory; out of bounds is the end of the test process.
    fn device_bytes(&mut self, address: u64, len: usize) -> &mut [u8] {
        let (start, bytes) = self.allocations.range_mut(..=address).next_back().expect("an address of device memory");
        let offset = usize::try_from(address - start).expect("offsets are small");
        &mut bytes[offset..offset + len]
    }

    fn enqueue(&mut self, stream: usize, job: Job) -> Result<(), Code> {
        let queue = self.streams.get_mut(&stream).ok_or(INVALID_HANDLE)?;
        queue.jobs.push_back(job);
        queue.enqueued += 1;
        Ok(())
    }

    /// Runs a stream's jobs up to a number.
    fn run(&mut self, stream: usize, last: u64) -> Result<(), Code> {
        loop {
            let queue = self.streams.get_mut(&stream).ok_or(INVALID_HANDLE)?;
            if queue.done >= last {
                return Ok(());
            }
            queue.done += 1;
            let job = queue.jobs.pop_front().expect("what is not done is queued");
            self.execute(job);
        }
    }

    fn execute(&mut self, job: Job) {
        match job {
            Job::OnDevice { target, source, len } => {
                let bytes = self.device_bytes(source, len).to_vec();
                self.device_bytes(target, len).copy_from_slice(&bytes);
            }
            Job::Fill { target, words, word } => {
                let bytes = self.device_bytes(target, words * 4);
                bytes.as_chunks_mut().0.iter_mut().for_each(|place| *place = word.to_le_bytes());
            }
            Job::Checksums { ranges, crcs, count, parts } => {
                for index in 0..count as u64 {
                    let range = self.device_bytes(ranges + 16 * index, 16).to_vec();
                    let number = |at: usize| u64::from_le_bytes(*range[at..].first_chunk().expect("16 bytes"));
                    let range = RawRange { address: number(0), len: number(8) };
                    assert!(kernels::parts(&range) <= parts, "a launch without blocks for all of a range");
                    let crc = if range.len == 0 {
                        0
                    } else {
                        crc32fast::hash(self.device_bytes(range.address, range.len as usize))
                    };
                    // The kernel adds to what is there.
                    for (place, byte) in self.device_bytes(crcs + 4 * index, 4).iter_mut().zip(crc.to_le_bytes()) {
                        *place ^= byte;
                    }
                }
            }
            Job::Gather { copies } => {
                assert!(self.is_pinned(&copies), "a table that is no longer pinned");
                for copy in gathered(&copies) {
                    let source = host_range(copy.source, copy.len);
                    assert!(self.is_pinned(&source), "a gather from memory that is no longer pinned");
                    let bytes = self.device_bytes(copy.target, source.len());
                    // SAFETY: pinned, so mapped, as below.
                    unsafe { ptr::copy_nonoverlapping(source.start as *const u8, bytes.as_mut_ptr(), bytes.len()) };
                }
            }
            Job::Foreign { work, .. } => work(self),
            Job::ToDevice { target, source: Source::Taken(bytes) } => {
                self.device_bytes(target, bytes.len()).copy_from_slice(&bytes);
            }
            Job::ToDevice { target, source: Source::Pinned(host) } => {
                assert!(self.is_pinned(&host), "a copy from memory that is no longer pinned");
                let bytes = self.device_bytes(target, host.len());
                // SAFETY: pinned, so mapped; a caller who writes to it now breaks the rule that this driver is here to test.
                unsafe { ptr::copy_nonoverlapping(host.start as *const u8, bytes.as_mut_ptr(), bytes.len()) };
            }
            Job::ToHost { target, source } => {
                assert!(self.is_pinned(&target), "a copy to memory that is no longer pinned");
                let bytes = self.device_bytes(source, target.len());
                // SAFETY: as above.
                unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), target.start as *mut u8, bytes.len()) };
            }
        }
    }
}

/// The first bytes of the device memory that a job uses.
fn device_addresses(job: &Job) -> Vec<u64> {
    match job {
        Job::ToDevice { target: device, .. }
        | Job::ToHost { source: device, .. }
        | Job::Fill { target: device, .. }
        | Job::Foreign { device, .. } => vec![*device],
        Job::OnDevice { target, source, .. } => vec![*target, *source],
        Job::Checksums { ranges, crcs, .. } => vec![*ranges, *crcs],
        Job::Gather { copies } => gathered(copies).iter().map(|copy| copy.target).collect(),
    }
}

/// The table of a gather, which lies in pinned memory.
fn gathered(table: &Range<usize>) -> Vec<RawCopy> {
    let count = table.len() / size_of::<RawCopy>();
    // SAFETY: the table is pinned, so mapped; who changes it while it is in use breaks the rule that is tested here.
    (0..count).map(|index| unsafe { ptr::read_unaligned((table.start as *const RawCopy).add(index)) }).collect()
}

/// Host memory by the address at which the device sees it: the same, here.
fn host_range(address: u64, len: u64) -> Range<usize> {
    address as usize..(address + len) as usize
}

fn code(result: Result<(), Code>) -> Code {
    result.err().unwrap_or(OK)
}

/// Runs a call on the GPU whose context is current.
fn on_current(call: impl FnOnce(&mut Gpu) -> Result<(), Code>) -> Code {
    let Some(ordinal) = CONTEXTS.with_borrow(|contexts| contexts.last().copied()) else { return INVALID_CONTEXT };
    let gpu = Arc::clone(&GPUS.lock()[&ordinal]);
    let mut gpu = gpu.lock();
    code(gpu.begin().and_then(|()| call(&mut gpu)))
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

fn handle<T>() -> *mut T {
    ptr::without_provenance_mut(HANDLES.fetch_add(1, Ordering::Relaxed))
}

static DRIVER: Driver = Driver {
    init,
    device_get_count,
    device_get,
    device_get_name,
    primary_context_retain,
    context_current,
    context_push,
    context_pop,
    memory_info,
    memory_allocate,
    memory_free,
    host_register,
    host_unregister,
    host_device_address,
    copy_to_device,
    copy_to_host,
    copy_on_device,
    fill_words,
    module_load,
    module_function,
    launch,
    stream_create,
    stream_synchronize,
    stream_destroy,
    event_create,
    event_record,
    event_query,
    event_synchronize,
    event_destroy,
    error_name,
    error_text,
};

extern "C" fn init(_flags: c_uint) -> Code {
    OK
}

unsafe extern "C" fn device_get_count(count: *mut c_int) -> Code {
    // SAFETY: this and every place for an answer below is valid, as the real driver demands.
    unsafe { *count = 1 };
    OK
}

unsafe extern "C" fn device_get(device: *mut CUdevice, ordinal: c_int) -> Code {
    if !GPUS.lock().contains_key(&u32::try_from(ordinal).unwrap_or(u32::MAX)) {
        return INVALID_DEVICE;
    }
    // SAFETY: a place for the answer.
    unsafe { *device = ordinal };
    OK
}

unsafe extern "C" fn device_get_name(name: *mut c_char, len: c_int, _device: CUdevice) -> Code {
    let text = c"Simulated GPU";
    assert!(len as usize > text.count_bytes());
    // SAFETY: a place for `len` characters, and the text is shorter.
    unsafe { ptr::copy_nonoverlapping(text.as_ptr(), name, text.count_bytes() + 1) };
    OK
}

unsafe extern "C" fn primary_context_retain(context: *mut CUcontext, device: CUdevice) -> Code {
    // SAFETY: a place for the answer.
    unsafe { *context = ptr::without_provenance_mut(device as usize) };
    OK
}

unsafe extern "C" fn context_current(context: *mut CUcontext) -> Code {
    let current = CONTEXTS.with_borrow(|contexts| contexts.last().map_or(0, |&ordinal| ordinal as usize));
    // SAFETY: a place for the answer.
    unsafe { *context = ptr::without_provenance_mut(current) };
    OK
}

unsafe extern "C" fn context_push(context: CUcontext) -> Code {
    CONTEXTS.with_borrow_mut(|contexts| contexts.push(context.addr() as u32));
    OK
}

unsafe extern "C" fn context_pop(context: *mut CUcontext) -> Code {
    let Some(popped) = CONTEXTS.with_borrow_mut(Vec::pop) else { return INVALID_CONTEXT };
    // SAFETY: a place for the answer.
    unsafe { *context = ptr::without_provenance_mut(popped as usize) };
    OK
}

unsafe extern "C" fn memory_info(free: *mut usize, total: *mut usize) -> Code {
    on_current(|gpu| {
        let used: usize = gpu.allocations.values().map(Vec::len).sum();
        // SAFETY: places for the answers.
        unsafe { (*free, *total) = (MEMORY_BYTES as usize - used, MEMORY_BYTES as usize) };
        Ok(())
    })
}

unsafe extern "C" fn memory_allocate(address: *mut CUdeviceptr, len: usize) -> Code {
    on_current(|gpu| {
        if len == 0 {
            return Err(INVALID_VALUE);
        }
        let used: usize = gpu.allocations.values().map(Vec::len).sum();
        if len > MEMORY_BYTES as usize - used {
            return Err(OUT_OF_MEMORY);
        }
        // SAFETY: a place for the answer.
        unsafe { *address = gpu.next_address };
        // Not zeros: new device memory holds anything.
        gpu.allocations.insert(gpu.next_address, vec![0xa5; len]);
        gpu.peak_bytes = gpu.peak_bytes.max((used + len) as u64);
        gpu.next_address += (len as u64).next_multiple_of(512) + 512;
        Ok(())
    })
}

unsafe extern "C" fn memory_free(address: CUdeviceptr) -> Code {
    on_current(|gpu| {
        let bytes = gpu.allocations.remove(&address).ok_or(INVALID_VALUE)?;
        let range = address..address + bytes.len() as u64;
        let jobs = gpu.streams.values().flat_map(|queue| &queue.jobs);
        let used = jobs.flat_map(device_addresses).any(|address| range.contains(&address));
        assert!(!used, "device memory was freed under a copy");
        Ok(())
    })
}

unsafe extern "C" fn host_register(address: *mut c_void, len: usize, _flags: c_uint) -> Code {
    on_current(|gpu| {
        gpu.pinned.insert(address.addr(), len);
        Ok(())
    })
}

unsafe extern "C" fn host_unregister(address: *mut c_void) -> Code {
    on_current(|gpu| {
        let len = gpu.pinned.remove(&address.addr()).ok_or(INVALID_VALUE)?;
        assert!(!gpu.host_in_use(&(address.addr()..address.addr() + len)), "host memory was unpinned under a copy");
        Ok(())
    })
}

unsafe extern "C" fn copy_to_device(target: CUdeviceptr, source: *const c_void, len: usize, stream: CUstream) -> Code {
    on_current(|gpu| {
        let host = source.expose_provenance()..source.addr() + len;
        gpu.device_bytes(target, len);
        let source = if gpu.is_pinned(&host) {
            Source::Pinned(host)
        } else {
            // SAFETY: the caller's range is valid during the call.
            Source::Taken(unsafe { std::slice::from_raw_parts(source.cast::<u8>(), len) }.to_vec())
        };
        gpu.enqueue(stream.addr(), Job::ToDevice { target, source })
    })
}

unsafe extern "C" fn copy_to_host(target: *mut c_void, source: CUdeviceptr, len: usize, stream: CUstream) -> Code {
    on_current(|gpu| {
        let host = target.expose_provenance()..target.addr() + len;
        gpu.device_bytes(source, len);
        if gpu.is_pinned(&host) {
            return gpu.enqueue(stream.addr(), Job::ToHost { target: host, source });
        }
        // Into pageable memory the driver copies before it returns.
        let last = gpu.streams.get(&stream.addr()).ok_or(INVALID_HANDLE)?.enqueued;
        gpu.run(stream.addr(), last)?;
        let bytes = gpu.device_bytes(source, len);
        // SAFETY: the caller's range is valid during the call.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), target.cast::<u8>(), len) };
        Ok(())
    })
}

unsafe extern "C" fn copy_on_device(target: CUdeviceptr, source: CUdeviceptr, len: usize, stream: CUstream) -> Code {
    on_current(|gpu| {
        gpu.device_bytes(target, len);
        gpu.device_bytes(source, len);
        gpu.enqueue(stream.addr(), Job::OnDevice { target, source, len })
    })
}

unsafe extern "C" fn host_device_address(address: *mut CUdeviceptr, host: *mut c_void, _flags: c_uint) -> Code {
    on_current(|gpu| {
        let start = host.expose_provenance();
        if !gpu.is_pinned(&(start..start + 1)) {
            return Err(INVALID_VALUE);
        }
        // SAFETY: a place for the answer.
        unsafe { *address = start as u64 };
        Ok(())
    })
}

unsafe extern "C" fn fill_words(target: CUdeviceptr, word: c_uint, count: usize, stream: CUstream) -> Code {
    on_current(|gpu| {
        gpu.device_bytes(target, count * 4);
        gpu.enqueue(stream.addr(), Job::Fill { target, words: count, word })
    })
}

/// The handles of the kernels.
const CRC32_RANGES: usize = 1;
const GATHER: usize = 2;

unsafe extern "C" fn module_load(module: *mut CUmodule, image: *const c_void) -> Code {
    on_current(|_| {
        // SAFETY: the image ends in a zero, and `module` is a place for the answer.
        let text = unsafe { CStr::from_ptr(image.cast()) };
        assert!(text.to_bytes().windows(7).any(|word| word == b".target"), "an image that is no PTX");
        // SAFETY: as above.
        unsafe { *module = handle() };
        Ok(())
    })
}

unsafe extern "C" fn module_function(function: *mut CUfunction, _module: CUmodule, name: *const c_char) -> Code {
    on_current(|_| {
        // SAFETY: the name ends in a zero.
        let known = match unsafe { CStr::from_ptr(name) }.to_bytes() {
            b"crc32_ranges" => CRC32_RANGES,
            b"gather" => GATHER,
            _ => return Err(INVALID_VALUE),
        };
        // SAFETY: a place for the answer.
        unsafe { *function = ptr::without_provenance_mut(known) };
        Ok(())
    })
}

unsafe extern "C" fn launch(
    function: CUfunction,
    blocks: c_uint,
    _grid_y: c_uint,
    _grid_z: c_uint,
    threads: c_uint,
    _block_y: c_uint,
    _block_z: c_uint,
    _shared_bytes: c_uint,
    stream: CUstream,
    params: *mut *mut c_void,
    _extra: *mut *mut c_void,
) -> Code {
    on_current(|gpu| {
        assert_eq!(threads, 256, "the kernels count on it");
        // SAFETY: each parameter points to a value of the kernel's type.
        let number = |index: usize| unsafe { *(*params.add(index)).cast::<u64>() };
        // SAFETY: as above.
        let short = |index: usize| unsafe { *(*params.add(index)).cast::<u32>() };
        let job = match function.addr() {
            CRC32_RANGES => {
                let (ranges, crcs, parts) = (number(0), number(1), short(2));
                assert!(blocks.is_multiple_of(parts), "whole ranges");
                let count = (blocks / parts) as usize;
                gpu.device_bytes(ranges, count * 16);
                gpu.device_bytes(crcs, count * 4);
                Job::Checksums { ranges, crcs, count, parts: u64::from(parts) }
            }
            GATHER => {
                let (table, count) = (number(0) as usize, short(1));
                assert!(u64::from(blocks) * 8 >= u64::from(count), "a warp for each copy");
                Job::Gather { copies: table..table + count as usize * size_of::<RawCopy>() }
            }
            _ => return Err(INVALID_HANDLE),
        };
        gpu.enqueue(stream.addr(), job)
    })
}

unsafe extern "C" fn stream_create(stream: *mut CUstream, _flags: c_uint) -> Code {
    on_current(|gpu| {
        let new: CUstream = handle();
        gpu.streams.insert(new.addr(), Queue::default());
        // SAFETY: a place for the answer.
        unsafe { *stream = new };
        Ok(())
    })
}

unsafe extern "C" fn stream_synchronize(stream: CUstream) -> Code {
    on_current(|gpu| {
        let last = gpu.streams.get(&stream.addr()).ok_or(INVALID_HANDLE)?.enqueued;
        gpu.run(stream.addr(), last)
    })
}

unsafe extern "C" fn stream_destroy(stream: CUstream) -> Code {
    on_current(|gpu| {
        let queue = gpu.streams.remove(&stream.addr()).ok_or(INVALID_HANDLE)?;
        assert!(queue.jobs.is_empty(), "a stream was destroyed that had work");
        Ok(())
    })
}

unsafe extern "C" fn event_create(event: *mut CUevent, _flags: c_uint) -> Code {
    on_current(|gpu| {
        let new: CUevent = handle();
        gpu.events.insert(new.addr(), None);
        // SAFETY: a place for the answer.
        unsafe { *event = new };
        Ok(())
    })
}

unsafe extern "C" fn event_record(event: CUevent, stream: CUstream) -> Code {
    on_current(|gpu| {
        let last = gpu.streams.get(&stream.addr()).ok_or(INVALID_HANDLE)?.enqueued;
        *gpu.events.get_mut(&event.addr()).ok_or(INVALID_HANDLE)? = Some((stream.addr(), last));
        Ok(())
    })
}

unsafe extern "C" fn event_query(event: CUevent) -> Code {
    on_current(|gpu| {
        let Some((stream, last)) = *gpu.events.get(&event.addr()).ok_or(INVALID_HANDLE)? else { return Ok(()) };
        // A stream that was destroyed had no work left.
        let Some(done) = gpu.streams.get(&stream).map(|queue| queue.done) else { return Ok(()) };
        gpu.whim = gpu.whim.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        if done < last && gpu.whim >> 63 == 0 {
            gpu.run(stream, done + 1)?;
        }
        if gpu.streams[&stream].done < last { Err(NOT_READY) } else { Ok(()) }
    })
}

unsafe extern "C" fn event_synchronize(event: CUevent) -> Code {
    on_current(|gpu| match *gpu.events.get(&event.addr()).ok_or(INVALID_HANDLE)? {
        Some((stream, last)) if gpu.streams.contains_key(&stream) => gpu.run(stream, last),
        _ => Ok(()),
    })
}

unsafe extern "C" fn event_destroy(event: CUevent) -> Code {
    on_current(|gpu| gpu.events.remove(&event.addr()).map(drop).ok_or(INVALID_HANDLE))
}

unsafe extern "C" fn error_name(code: Code, name: *mut *const c_char) -> Code {
    let text = match code {
        OUT_OF_MEMORY => c"CUDA_ERROR_OUT_OF_MEMORY",
        700 => c"CUDA_ERROR_ILLEGAL_ADDRESS",
        code if code < 1000 => c"CUDA_ERROR_OF_SOME_KIND",
        _ => return INVALID_VALUE,
    };
    // SAFETY: a place for the answer.
    unsafe { *name = text.as_ptr() };
    OK
}

unsafe extern "C" fn error_text(code: Code, text: *mut *const c_char) -> Code {
    if code >= 1000 {
        return INVALID_VALUE;
    }
    // SAFETY: a place for the answer.
    unsafe { *text = c"the simulated driver says no".as_ptr() };
    OK
}

#[cfg(test)]
mod tests {
    use super::super::error::CudaError;
    use super::*;

    #[test]
    fn an_answer_that_nobody_knows_stays_a_number() {
        assert_eq!(CudaError::check(123_456).unwrap_err().describe(&DRIVER), "unknown CUDA error 123456");
        let lost = CudaError::check(700).unwrap_err().describe(&DRIVER);
        assert!(
            lost.starts_with("CUDA_ERROR_ILLEGAL_ADDRESS (700): ") && lost.contains("restart the process"),
            "{lost}"
        );
    }
}
