//! The kernels of `kernels.cu`: loaded once for a device, on first use, and launched here. What they compute is written
//! beside them; here is what they are handed, and who keeps it alive.
//!
//! # Invariants
//! - A launch covers what it was asked for: the grid is counted from the same sizes as the kernel's own loops.
//! - Nothing that a kernel uses is freed before its stream was waited for; where that cannot be, it is never freed.

use std::ffi::{CStr, c_uint, c_void};
use std::ops::Range;
use std::sync::Arc;
use std::{mem, ptr};

use parking_lot::Mutex;

use super::CudaDevice;
use super::driver::{CUdeviceptr, CUfunction, CUmodule};
use super::error::CudaError;
use super::memory::CudaMemory;
use super::stream::Stream;
use crate::error::Result;

/// What `build.rs` found beside the source, with a zero at its end.
static PTX: &str = include_str!(concat!(env!("OUT_DIR"), "/kernels.ptx"));

/// Threads of a block, and what each block takes of a range: those of `kernels.cu`.
const THREADS: c_uint = 256;
const GRANULE_BYTES: u64 = 16;
const PART_GRANULES: u64 = (128 << 10) / GRANULE_BYTES;
const WARP: c_uint = 32;

/// Ranges whose checksums are taken at once: their places and their answers take 80 KiB of the device's memory.
const RANGES_MAX: usize = 4096;
/// Blocks of one launch, far under the hardware's 2^31: more are launched again.
const BLOCKS_MAX: u64 = 1 << 28;

/// A range whose checksum is wanted, as `kernels.cu` reads it.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct RawRange {
    pub(super) address: u64,
    pub(super) len: u64,
}

/// A copy of a few bytes, as `kernels.cu` reads it.
#[repr(C)]
pub(super) struct RawCopy {
    pub(super) source: u64,
    pub(super) target: u64,
    pub(super) len: u64,
}

const _: () = assert!(size_of::<RawRange>() == 16 && size_of::<RawCopy>() == 24);

/// The kernels of one device, and what they work in.
pub(in crate::device) struct Kernels {
    crc32_ranges: Function,
    gather: Function,
    /// [`RANGES_MAX`] ranges, then as many answers.
    workspace: Mutex<Arc<CudaMemory>>,
}

#[derive(Clone, Copy)]
struct Function(CUfunction);

// SAFETY: a function is a handle that the driver allows every thread to launch at the same time.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

impl Kernels {
    /// Loads the kernels. Where the driver has not compiled them on this machine before, that takes 0.2 s; else 1 ms. The
    /// code stays on the device until the process ends.
    pub(super) fn load(device: &'static CudaDevice) -> Result<Kernels> {
        let loaded = || {
            let entered = device.context().enter()?;
            let mut module: CUmodule = ptr::null_mut();
            // SAFETY: `module` is a place for the answer, and the text ends in a zero.
            unsafe { entered.driver.module_load(&mut module, PTX.as_ptr().cast::<c_void>()) }?;
            let function = |name: &CStr| {
                let mut function: CUfunction = ptr::null_mut();
                // SAFETY: `function` is a place for the answer; the module is loaded and the name ends in a zero.
                unsafe { entered.driver.module_function(&mut function, module, name.as_ptr()) }?;
                Ok(Function(function))
            };
            Ok((function(c"crc32_ranges")?, function(c"gather")?))
        };
        let (crc32_ranges, gather) = loaded().map_err(|error| device.context().error("load its kernels", error))?;
        let workspace = CudaMemory::allocate(device, (RANGES_MAX * (size_of::<RawRange>() + size_of::<u32>())) as u64)?;
        Ok(Kernels { crc32_ranges, gather, workspace: Mutex::new(Arc::new(workspace)) })
    }

    /// The CRC-32 of ranges of some memory. Blocks until they are there. Takes turns with other callers.
    ///
    /// # Panics
    /// If a range lies outside the memory: our own mistake.
    pub(super) fn crc32(&self, memory: &Arc<CudaMemory>, ranges: &[Range<u64>]) -> Result<Vec<u32>> {
        // Ranges of like length share a launch: its blocks are counted by the longest.
        let mut order: Vec<usize> = (0..ranges.len()).collect();
        order.sort_unstable_by_key(|&index| ranges[index].end - ranges[index].start);
        let mut crcs = vec![0; ranges.len()];
        for batch in order.chunks(RANGES_MAX) {
            let raw: Vec<RawRange> = batch.iter().map(|&index| raw_range(memory, &ranges[index])).collect();
            let workspace = self.workspace.lock();
            let stream = memory.device().lend_stream()?;
            let mut answers = vec![0u32; raw.len()];
            let outcome = self.crc32_batch(&stream, &workspace, &raw, &mut answers);
            let settled = stream.synchronize();
            match settled {
                Ok(()) => memory.device().take_stream_back(stream),
                // The kernels may still run: what they use is kept for ever.
                Err(_) => mem::forget((stream, Arc::clone(&workspace), Arc::clone(memory))),
            }
            outcome.and(settled).map_err(|error| memory.device().context().error("take checksums", error))?;
            for (&index, crc) in batch.iter().zip(answers) {
                crcs[index] = crc;
            }
        }
        Ok(crcs)
    }

    /// Enqueues the work for a batch, and has the answers copied to where they belong.
    fn crc32_batch(
        &self,
        stream: &Stream,
        workspace: &CudaMemory,
        ranges: &[RawRange],
        answers: &mut [u32],
    ) -> Result<(), CudaError> {
        let places = workspace.address();
        let results = places + (RANGES_MAX * size_of::<RawRange>()) as u64;
        // SAFETY: both ends of both copies are valid and as long as is said; the host's are pageable, so the driver is done
        // with them when it answers. The fill lies in the workspace, which is this caller's until the stream was waited for.
        unsafe {
            stream.copy_to_device(places, ranges.as_ptr().cast::<u8>(), size_of_val(ranges))?;
            stream.fill_words(results, 0, answers.len())?;
        }
        let mut first = 0;
        while first < ranges.len() {
            let (count, parts) = launch_of(&ranges[first..]);
            let (mut at, mut to) = (places + (first * size_of::<RawRange>()) as u64, results + (first * 4) as u64);
            let mut parts = parts;
            let mut params = [(&raw mut at).cast(), (&raw mut to).cast(), (&raw mut parts).cast::<c_void>()];
            // SAFETY: the parameters are those of the kernel, which reads the ranges (checked by `raw_range`) and writes
            // into the workspace.
            unsafe { stream.launch(self.crc32_ranges.0, count * parts, THREADS, &mut params) }?;
            first += count as usize;
        }
        // SAFETY: as above.
        unsafe { stream.copy_to_host(answers.as_mut_ptr().cast::<u8>(), results, size_of_val(answers)) }
    }

    /// Enqueues copies of a few bytes each. The table of them lies at `copies`, where the device sees it.
    ///
    /// # Safety
    /// Until the stream has passed the kernel, the table holds `count` copies, their sources are memory that the device
    /// may read, and their targets memory that nobody else uses.
    pub(super) unsafe fn gather(&self, stream: &Stream, copies: CUdeviceptr, count: u32) -> Result<(), CudaError> {
        let (mut copies, mut count) = (copies, count);
        let blocks = count.div_ceil(THREADS / WARP);
        let mut params = [(&raw mut copies).cast(), (&raw mut count).cast::<c_void>()];
        // SAFETY: the parameters are those of the kernel; the caller answers for what they name.
        unsafe { stream.launch(self.gather.0, blocks, THREADS, &mut params) }
    }
}

/// A checked range of some memory.
fn raw_range(memory: &CudaMemory, range: &Range<u64>) -> RawRange {
    assert!(range.start <= range.end && range.end <= memory.len_bytes(), "a range outside of device memory");
    RawRange { address: memory.address() + range.start, len: range.end - range.start }
}

/// The blocks that a range needs.
pub(super) fn parts(range: &RawRange) -> u64 {
    let granules = (range.address + range.len).div_ceil(GRANULE_BYTES) - range.address / GRANULE_BYTES;
    granules.div_ceil(PART_GRANULES).max(1)
}

/// How many ranges of a rising order make one launch, and the blocks of each: few blocks find nothing to do.
fn launch_of(ranges: &[RawRange]) -> (u32, u32) {
    let least = parts(&ranges[0]);
    let mut most = least;
    let mut count = 0u64;
    for range in ranges {
        let parts = parts(range);
        if parts > least * 2 || (count + 1) * parts.max(most) > BLOCKS_MAX.max(parts) {
            break;
        }
        (count, most) = (count + 1, most.max(parts));
    }
    let parts = u32::try_from(most).expect("device memory has fewer parts");
    (u32::try_from(count).expect("a batch has fewer"), parts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::simulated::Simulated;
    use crate::device::{Device, Kind};
    use proptest::prelude::*;

    const LEN: u64 = 3 << 20;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn every_range_is_in_one_launch_that_has_blocks_for_it(
            ranges in prop::collection::vec((0..LEN, prop_oneof![0..LEN, 0u64..3000]), 0..300),
        ) {
            let device = Device(Kind::Cuda(Simulated::new().device));
            let bytes: Vec<u8> = (0..LEN).map(|at| (at * 31 + at / 255) as u8).collect();
            let mut buffer = device.allocate(LEN).unwrap();
            buffer.copy_from_host(0, &bytes).unwrap();
            let ranges: Vec<Range<u64>> = ranges.into_iter().map(|(start, len)| start..(start + len).min(LEN)).collect();
            // The simulated launch checks its blocks.
            let crcs = buffer.crc32(&ranges).unwrap();
            for (range, crc) in ranges.iter().zip(crcs) {
                prop_assert_eq!(crc, crc32fast::hash(&bytes[range.start as usize..range.end as usize]));
            }
        }
    }

    #[test]
    fn a_failure_at_any_call_is_an_error_and_frees_nothing_in_use() {
        for loses_gpu in [false, true] {
            for failing in 0..40 {
                let gpu = Simulated::new();
                let mut buffer = Device(Kind::Cuda(gpu.device)).allocate(5000).unwrap();
                buffer.copy_from_host(0, &[3; 5000]).unwrap();
                gpu.fail_after(failing, 700, loses_gpu);
                let outcome = buffer.crc32(&[0..5000, 7..9]);
                if let Ok(crcs) = &outcome {
                    assert_eq!(*crcs, [crc32fast::hash(&[3; 5000]), crc32fast::hash(&[3; 2])]);
                }
                if !loses_gpu {
                    gpu.fail_no_more();
                    let crcs = buffer.crc32(&[7..9, 1..1]).unwrap();
                    assert_eq!(crcs, [crc32fast::hash(&[3; 2]), 0], "{outcome:?}");
                }
            }
        }
    }
}
