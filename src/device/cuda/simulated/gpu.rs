//! A simulated GPU: its memory, what is pinned for it, and its streams, each a queue of jobs that somebody makes it do.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::ptr;

use super::super::driver::Code;
use super::super::kernels::{self, RawCopy, RawRange};
use super::INVALID_HANDLE;

#[derive(Default)]
pub(crate) struct Gpu {
    pub(super) allocations: BTreeMap<u64, Vec<u8>>,
    pub(super) next_address: u64,
    /// The most that was ever allocated at once.
    pub(super) peak_bytes: u64,
    pub(super) pinned: BTreeMap<usize, usize>,
    pub(super) streams: BTreeMap<usize, Queue>,
    /// What each event was last recorded behind: a stream and the number of its last job.
    pub(super) events: BTreeMap<usize, Option<(usize, u64)>>,
    pub(super) whim: u64,
    pub(super) calls: u64,
    pub(super) fail: Option<Failure>,
    pub(super) lost: Option<Code>,
}

#[derive(Clone, Copy)]
pub(super) struct Failure {
    pub(super) call: u64,
    pub(super) code: Code,
    pub(super) loses_gpu: bool,
}

#[derive(Default)]
pub(super) struct Queue {
    pub(super) jobs: VecDeque<Job>,
    pub(super) enqueued: u64,
    pub(super) done: u64,
}

pub(super) enum Job {
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

pub(super) enum Source {
    Pinned(Range<usize>),
    /// Pageable memory is copied by the driver before the call returns.
    Taken(Vec<u8>),
}

impl Gpu {
    /// Whether the call may go ahead.
    pub(super) fn begin(&mut self) -> Result<(), Code> {
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

    pub(super) fn is_pinned(&self, range: &Range<usize>) -> bool {
        let before = self.pinned.range(..=range.start).next_back();
        before.is_some_and(|(start, len)| range.end <= start + len)
    }

    /// Whether a copy in flight uses any of this host memory.
    pub(super) fn host_in_use(&self, range: &Range<usize>) -> bool {
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
    pub(super) fn device_bytes(&mut self, address: u64, len: usize) -> &mut [u8] {
        let (start, bytes) = self.allocations.range_mut(..=address).next_back().expect("an address of device memory");
        let offset = usize::try_from(address - start).expect("offsets are small");
        &mut bytes[offset..offset + len]
    }

    pub(super) fn enqueue(&mut self, stream: usize, job: Job) -> Result<(), Code> {
        let queue = self.streams.get_mut(&stream).ok_or(INVALID_HANDLE)?;
        queue.jobs.push_back(job);
        queue.enqueued += 1;
        Ok(())
    }

    /// Runs a stream's jobs up to a number.
    pub(super) fn run(&mut self, stream: usize, last: u64) -> Result<(), Code> {
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
pub(super) fn device_addresses(job: &Job) -> Vec<u64> {
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
