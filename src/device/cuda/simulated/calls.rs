//! The driver's functions, as the table has them: each answers for the GPU whose context is current on the thread.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::super::driver::{CUcontext, CUdevice, CUdeviceptr, CUevent, CUfunction, CUmodule, CUstream, Code, Driver};
use super::super::kernels::RawCopy;
use super::gpu::{Job, Queue, Source, device_addresses};
use super::{
    CONTEXTS, GPUS, INVALID_CONTEXT, INVALID_DEVICE, INVALID_HANDLE, INVALID_VALUE, MEMORY_BYTES, NOT_READY, OK,
    OUT_OF_MEMORY, on_current,
};

static HANDLES: AtomicUsize = AtomicUsize::new(1);

fn handle<T>() -> *mut T {
    ptr::without_provenance_mut(HANDLES.fetch_add(1, Ordering::Relaxed))
}

pub(super) static DRIVER: Driver = Driver {
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
    use super::super::super::error::CudaError;
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
