//! Several writes of one file at once from one thread: through the kernel's own queue of asynchronous transfers (`io_submit`,
//! `io_getevents`). Of the ways to do that, it is the one that containers allow; past the page cache it waits for nothing when
//! it submits.
//!
//! # Invariants
//! - Memory that was submitted is owned by its [`Flight`] until the kernel has answered for it: dropping a flight waits.
//! - A queue is used by one flight at a time, and lent again only with nothing in it.
//! - An answer is reported as it is: short counts and refusals are the caller's to continue.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use parking_lot::Mutex;

use super::super::PooledPart;
use super::sys::{check, signed};

/// How many transfers a queue holds. A commit that is written part by part has fewer.
const DEPTH: usize = 16;

/// Queues that are kept for the next flight: making one takes the system longer than a write of 64 KiB.
const KEPT: usize = 4;

/// `IOCB_CMD_PWRITE` of the kernel's `linux/aio_abi.h`.
const PWRITE: u16 = 1;

/// `struct iocb` of `linux/aio_abi.h`, where the lesser half of a number comes first.
#[repr(C)]
#[derive(Default)]
struct Request {
    data: u64,
    #[cfg(target_endian = "little")]
    key: u32,
    flags: u32,
    #[cfg(target_endian = "big")]
    key: u32,
    operation: u16,
    priority: i16,
    descriptor: u32,
    address: u64,
    len: u64,
    offset: i64,
    reserved: u64,
    more_flags: u32,
    event_descriptor: u32,
}

/// `struct io_event` of `linux/aio_abi.h`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Event {
    data: u64,
    request: u64,
    result: i64,
    second_result: i64,
}

const _: () = assert!(size_of::<Request>() == 64 && size_of::<Event>() == 32);

/// A queue of the kernel's, by the number that it has in this process.
struct Queue(libc::c_ulong);

static IDLE: Mutex<Vec<Queue>> = Mutex::new(Vec::new());

impl Queue {
    /// One that is idle, or a new one.
    fn lend() -> io::Result<Self> {
        if let Some(idle) = IDLE.lock().pop() {
            return Ok(idle);
        }
        let mut number: libc::c_ulong = 0;
        #[expect(unsafe_code, reason = "the kernel's queues have no wrapper")]
        // SAFETY: the call writes the queue's number to `number`, which must be zero before and lives through the call.
        let answer = unsafe { libc::syscall(libc::SYS_io_setup, DEPTH as libc::c_uint, &raw mut number) };
        check(answer)?;
        Ok(Self(number))
    }

    fn give_back(self) {
        let mut idle = IDLE.lock();
        if idle.len() < KEPT {
            idle.push(self);
        }
    }

    /// Submits the write of all of `bytes` at `offset`, to be known by `data`.
    ///
    /// # Safety
    /// The memory stays where it is, and nobody writes to it, until the queue has answered for `data`.
    #[expect(unsafe_code, reason = "the kernel reads the memory after this returns")]
    unsafe fn submit(&self, file: &File, bytes: &[u8], offset: u64, data: u64) -> io::Result<()> {
        let mut request = Request {
            data,
            operation: PWRITE,
            // An open descriptor is not negative.
            descriptor: file.as_raw_fd() as u32,
            address: bytes.as_ptr().expose_provenance() as u64,
            len: bytes.len() as u64,
            offset: signed(offset)?,
            ..Request::default()
        };
        let mut requests = [&raw mut request];
        // SAFETY: the call copies the one request that the array names, both of which live through it; the memory that the
        // request names is the caller's promise.
        let answer = unsafe { libc::syscall(libc::SYS_io_submit, self.0, 1 as libc::c_long, requests.as_mut_ptr()) };
        check(answer).map(drop)
    }

    /// Waits for one answer at least; how many of `events` were filled.
    fn wait(&self, events: &mut [Event]) -> io::Result<usize> {
        #[expect(unsafe_code, reason = "the kernel's queues have no wrapper")]
        // SAFETY: the call fills at most as many events as it is told, all of which live through it; without a time it waits
        // for the first.
        let answer = unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                self.0,
                1 as libc::c_long,
                events.len() as libc::c_long,
                events.as_mut_ptr(),
                std::ptr::null_mut::<libc::timespec>(),
            )
        };
        // `check` made it non-negative.
        Ok(check(answer)? as usize)
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        #[expect(unsafe_code, reason = "the kernel's queues have no wrapper")]
        // SAFETY: the call takes a number; it waits for what is in the queue, of which there is nothing here.
        unsafe {
            libc::syscall(libc::SYS_io_destroy, self.0);
        }
    }
}

/// What became of a write.
pub(super) struct Landed {
    pub(super) bytes: PooledPart,
    pub(super) offset: u64,
    /// How many of the bytes were taken.
    pub(super) count: io::Result<usize>,
}

/// Writes that are under way.
pub(super) struct Flight<'f> {
    file: &'f File,
    /// Given back when everything has landed.
    queue: Option<Queue>,
    /// By the number under which each was submitted.
    under_way: [Option<(PooledPart, u64)>; DEPTH],
}

impl<'f> Flight<'f> {
    /// A flight of writes to a file, which is open for direct transfers: through the page cache the kernel would not return
    /// before they are done.
    ///
    /// # Errors
    /// Those of `io_setup`: the system has no such queues, or none left.
    pub(super) fn new(file: &'f File) -> io::Result<Self> {
        Ok(Self { file, queue: Some(Queue::lend()?), under_way: [const { None }; DEPTH] })
    }

    /// Begins to write; gives the bytes back where the queue does not take them.
    pub(super) fn begin(&mut self, bytes: PooledPart, offset: u64) -> Result<(), PooledPart> {
        let free = self.under_way.iter().position(Option::is_none);
        let (Some(queue), Some(place)) = (&self.queue, free) else { return Err(bytes) };
        #[expect(unsafe_code, reason = "the kernel reads the memory after the call returns")]
        // SAFETY: the part is kept in `under_way`, untouched, until the queue answers for its place; its memory does not move
        // with it.
        let submitted = unsafe { queue.submit(self.file, &bytes, offset, place as u64) };
        match submitted {
            Ok(()) => {
                self.under_way[place] = Some((bytes, offset));
                Ok(())
            }
            Err(error) => {
                tracing::trace!(%error, "the kernel's queue does not take a write");
                Err(bytes)
            }
        }
    }

    /// Waits until some have landed; nothing where none is under way.
    ///
    /// # Errors
    /// The queue does not answer: the memory of what is under way is left to the kernel for good.
    pub(super) fn land(&mut self) -> Option<io::Result<Vec<Landed>>> {
        let queue = self.queue.as_ref().filter(|_| self.under_way.iter().any(Option::is_some))?;
        let mut events = [Event::default(); DEPTH];
        let count = loop {
            match queue.wait(&mut events) {
                Ok(count) => break count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    std::mem::forget(self.queue.take());
                    self.under_way.iter_mut().for_each(|part| std::mem::forget(part.take()));
                    return Some(Err(error));
                }
            }
        };
        let landed = events[..count].iter().filter_map(|event| {
            let (bytes, offset) = self.under_way.get_mut(event.data as usize)?.take()?;
            let count = match event.result {
                // No count is larger than the memory.
                0.. => Ok(event.result as usize),
                error => Err(io::Error::from_raw_os_error(i32::try_from(-error).unwrap_or(libc::EIO))),
            };
            Some(Landed { bytes, offset, count })
        });
        Some(Ok(landed.collect()))
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        while self.land().is_some() {}
        if let Some(queue) = self.queue.take() {
            queue.give_back();
        }
    }
}
