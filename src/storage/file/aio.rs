//! Several transfers of one file at once from one thread: through the kernel's own queue of asynchronous transfers (`io_submit`,
//! `io_getevents`). Of the ways to do that, it is the one that containers allow; past the page cache it waits for nothing when
//! it submits.
//!
//! # Invariants
//! - Memory that was submitted is nobody's until the kernel has answered for it: a flight that is dropped waits.
//! - A queue is used by one flight at a time, and lent again only with nothing in it.
//! - An answer is reported as it is: short counts and refusals are the caller's to continue.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use parking_lot::Mutex;

use super::super::{Part, PartBytes, is_direct_aligned};
use super::sys::{check, signed};

/// How many transfers a queue holds. What is moved in parts has fewer of them, mostly.
const DEPTH: usize = 16;

/// Queues that are kept for the next flight: making one takes the system longer than a write of 64 KiB.
const KEPT: usize = 4;

/// `IOCB_CMD_PREAD` and `IOCB_CMD_PWRITE` of the kernel's `linux/aio_abi.h`.
const PREAD: u16 = 0;
const PWRITE: u16 = 1;

/// A transfer that is begun without waiting for anything, or refused (`EAGAIN`).
const NOWAIT: u32 = libc::RWF_NOWAIT as u32;

/// `struct iocb` of `linux/aio_abi.h`, where the lesser half of a number comes first.
#[repr(C)]
#[derive(Default)]
struct Request {
    data: u64,
    #[cfg(target_endian = "little")]
    key: u32,
    transfer_flags: u32,
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

    /// Submits the transfer of all of `memory` at `offset`, to be known by `data`.
    ///
    /// # Safety
    /// The memory is the kernel's until the queue has answered for `data`, or is no more. What is written may be others' by
    /// then: the kernel has its pages.
    #[expect(unsafe_code, reason = "the kernel uses the memory after this returns")]
    unsafe fn submit(
        &self,
        file: &File,
        (operation, transfer_flags): (u16, u32),
        memory: *mut [u8],
        offset: u64,
        data: u64,
    ) -> io::Result<()> {
        let mut request = Request {
            data,
            operation,
            transfer_flags,
            // An open descriptor is not negative.
            descriptor: file.as_raw_fd() as u32,
            address: memory.cast::<u8>().expose_provenance() as u64,
            len: memory.len() as u64,
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
        // SAFETY: the call takes a number. It returns when nothing of the queue is under way any more.
        unsafe {
            libc::syscall(libc::SYS_io_destroy, self.0);
        }
    }
}

/// Transfers of one file that are under way, each known by a number below [`DEPTH`].
struct Flight<'f> {
    file: &'f File,
    queue: Option<Queue>,
    /// How many are under way.
    count: usize,
}

/// What became of a transfer: its number, and how many bytes were moved.
type Landed = (usize, io::Result<usize>);

impl<'f> Flight<'f> {
    /// Of a file that is open for direct transfers: through the page cache the kernel would not return before they are done.
    /// `None` where the system has no such queues, or none left.
    fn new(file: &'f File) -> Option<Self> {
        let queue = Queue::lend().inspect_err(|error| tracing::trace!(%error, "no queue of the kernel's")).ok()?;
        Some(Self { file, queue: Some(queue), count: 0 })
    }

    /// Begins a transfer; whether the queue takes it.
    ///
    /// # Safety
    /// Nobody else touches the memory until [`land`](Self::land) has answered for the transfer or the flight has been dropped,
    /// and it is not leaked. For a write, others may read; who writes to it meanwhile, or frees it, gets what he deserves into the
    /// file, and nothing else.
    #[expect(unsafe_code, reason = "the kernel uses the memory after this returns")]
    unsafe fn begin(&mut self, operation: (u16, u32), memory: *mut [u8], offset: u64, number: usize) -> bool {
        let Some(queue) = self.queue.as_ref().filter(|_| self.count < DEPTH) else { return false };
        // SAFETY: as the caller promises.
        match unsafe { queue.submit(self.file, operation, memory, offset, number as u64) } {
            Ok(()) => {
                self.count += 1;
                true
            }
            Err(error) => {
                tracing::trace!(%error, "the kernel's queue does not take a transfer");
                false
            }
        }
    }

    /// Waits until some transfers have landed; none where none is under way.
    ///
    /// # Errors
    /// The queue does not answer. Nothing is under way any more then.
    fn land(&mut self) -> io::Result<Vec<Landed>> {
        let mut events = [Event::default(); DEPTH];
        let Some(queue) = self.queue.as_ref().filter(|_| self.count > 0) else { return Ok(Vec::new()) };
        let count = loop {
            match queue.wait(&mut events) {
                Ok(count) => break count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    // The end of a queue waits for what is in it.
                    self.queue = None;
                    self.count = 0;
                    return Err(error);
                }
            }
        };
        self.count -= count;
        let landed = events[..count].iter().map(|event| {
            let moved = match event.result {
                // No count is larger than the memory.
                0.. => Ok(event.result as usize),
                error => Err(io::Error::from_raw_os_error(i32::try_from(-error).unwrap_or(libc::EIO))),
            };
            // The numbers are those that were submitted.
            (event.data as usize, moved)
        });
        Ok(landed.collect())
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        while self.count > 0 {
            // What became of them nobody asks any more.
            let _ = self.land();
        }
        if let Some(queue) = self.queue.take() {
            queue.give_back();
        }
    }
}

/// How many bytes of a transfer the kernel's queue has moved, the rest being for a plain call: that one also knows what to do where
/// direct transfers are refused.
fn moved(answer: io::Result<usize>) -> io::Result<usize> {
    answer.or_else(|error| match error.raw_os_error() {
        Some(libc::EINVAL | libc::EAGAIN | libc::EINTR | libc::EOPNOTSUPP) => Ok(0),
        _ => Err(error),
    })
}

/// Writes parts as they come, several at a time where there is a file for direct transfers; `plainly` writes all of some bytes by a
/// call of its own. Where it fails, nothing is on its way any more.
pub(super) fn write_parts(
    file: Option<&File>,
    parts: &mut dyn Iterator<Item = Part>,
    plainly: impl Fn(&[u8], u64) -> io::Result<()>,
) -> io::Result<()> {
    // Dropped after the flight: what is in it is written from.
    let mut under_way: [Option<Part>; DEPTH] = [const { None }; DEPTH];
    let Some(mut flight) = file.and_then(Flight::new) else {
        for part in parts {
            plainly(&part.bytes.into_owned()?, part.offset)?;
        }
        return Ok(());
    };
    let land = |flight: &mut Flight<'_>, under_way: &mut [Option<Part>; DEPTH]| {
        for (number, answer) in flight.land()? {
            let Some(part) = under_way.get_mut(number).and_then(Option::take) else { continue };
            let done = moved(answer)?;
            if done < part.bytes.len() {
                let rest = &part.bytes.into_owned()?[done..];
                plainly(rest, part.offset + done as u64)?;
            }
        }
        Ok::<_, io::Error>(())
    };
    for Part { offset, bytes } in parts {
        let number = loop {
            match under_way.iter().position(Option::is_none) {
                Some(free) => break free,
                None => land(&mut flight, &mut under_way)?,
            }
        };
        let owned = match bytes {
            PartBytes::Owned(owned) => owned,
            PartBytes::Lent(lent) => {
                let begun = lent.name(|memory| {
                    let aligned = is_direct_aligned(memory.addr() as u64, offset, memory.len());
                    #[expect(unsafe_code, reason = "the kernel reads the memory after the call returns")]
                    // SAFETY: the lender has the memory now, and only reads it. Should he take it back while the kernel has its
                    // pages, the commit has been given up.
                    let begun = aligned && unsafe { flight.begin((PWRITE, NOWAIT), memory.cast_mut(), offset, number) };
                    begun
                });
                if begun == Some(true) {
                    under_way[number] = Some(Part { offset, bytes: PartBytes::Lent(lent) });
                    continue;
                }
                lent.copied()?
            }
        };
        if !is_direct_aligned(owned.as_ptr().addr() as u64, offset, owned.len()) {
            plainly(&owned, offset)?;
            continue;
        }
        let memory = std::ptr::from_ref::<[u8]>(&owned).cast_mut();
        #[expect(unsafe_code, reason = "the kernel reads the memory after the call returns")]
        // SAFETY: the part is kept in `under_way`, untouched, until the flight has answered for its number or, where this ends
        // early, has been dropped; its memory does not move with it.
        let begun = unsafe { flight.begin((PWRITE, 0), memory, offset, number) };
        if begun {
            under_way[number] = Some(Part { offset, bytes: owned.into() });
        } else {
            plainly(&owned, offset)?;
        }
    }
    while flight.count > 0 {
        land(&mut flight, &mut under_way)?;
    }
    Ok(())
}

/// Fills `buf` from `offset` on, in parts of `part_bytes`, and tells of each part once its bytes are there, while the next is on
/// its way; `plainly` fills all of some bytes by a call of its own.
///
/// One part is on its way at a time: a virtual disk answers for all that it was given at once when the last of it is done.
pub(super) fn read_parts(
    file: &File,
    buf: &mut [u8],
    offset: u64,
    part_bytes: usize,
    landed: &mut dyn FnMut(&[u8]),
    plainly: impl Fn(&mut [u8], u64) -> io::Result<()>,
) -> io::Result<()> {
    // Dropped after the flight, which fills them.
    let mut parts: Vec<&mut [u8]> = buf.chunks_mut(part_bytes).collect();
    let offset_of = |number: usize| offset + (number * part_bytes) as u64;
    let mut flight = Flight::new(file);
    // Whether a part was begun: none where there is none.
    let begin = |flight: &mut Option<Flight<'_>>, parts: &mut [&mut [u8]], number: usize| {
        let (Some(flight), Some(part)) = (flight, parts.get_mut(number)) else { return false };
        let aligned = is_direct_aligned(part.as_ptr().addr() as u64, offset_of(number), part.len());
        #[expect(unsafe_code, reason = "the kernel fills the memory after the call returns")]
        // SAFETY: the part is borrowed by `parts` longer than the flight lives, and not touched before the flight has
        // answered for its number.
        let begun = aligned && unsafe { flight.begin((PREAD, 0), *part, offset_of(number), number) };
        begun
    };
    let mut begun = begin(&mut flight, &mut parts, 0);
    for number in 0..parts.len() {
        let mut done = 0;
        if let Some(flight) = flight.as_mut().filter(|_| begun) {
            for (_, answer) in flight.land()? {
                done = moved(answer)?;
            }
        }
        begun = begin(&mut flight, &mut parts, number + 1);
        let part = &mut *parts[number];
        if done < part.len() {
            plainly(&mut part[done..], offset_of(number) + done as u64)?;
        }
        landed(part);
    }
    Ok(())
}
