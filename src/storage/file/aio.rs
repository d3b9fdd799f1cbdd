//! Several transfers of one file at once from one thread: through the kernel's own queue of asynchronous transfers (`io_submit`,
//! `io_getevents`). Of the ways to do that, it is the one that containers allow; past the page cache it waits for nothing when
//! it submits.
//!
//! # Invariants
//! - Memory that was submitted is nobody's until the kernel has answered for it: a flight that is dropped waits, and one that
//!   somebody waits for no longer is left to a thread of its own, together with its memory.
//! - A queue is used by one flight at a time, and lent again only with nothing in it.
//! - An answer is reported as it is: short counts and refusals are the caller's to continue.

use std::any::Any;
use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::AsRawFd;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::super::{Arrival, Landing, Part, PartBytes, Parts, is_direct_aligned};
use super::sys::{check, signed};

/// How many transfers a queue holds. What is moved in parts has fewer of them, mostly.
const DEPTH: usize = 16;

/// The most queues of a process. They are kept: making one takes the system longer than a write of 64 KiB, and giving one back
/// takes it up to 40 ms. On 16 processors each takes it some 8 KiB; it has room for 4,096 of this depth where nobody says otherwise.
const QUEUES_MAX: usize = 256;

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

/// Those that nobody uses, and how many there are in all.
static QUEUES: Mutex<(Vec<Queue>, usize)> = Mutex::new((Vec::new(), 0));

impl Queue {
    /// One that is idle, or a new one; none where every one is in use.
    fn lend() -> io::Result<Self> {
        {
            let (idle, made) = &mut *QUEUES.lock();
            if let Some(queue) = idle.pop() {
                return Ok(queue);
            }
            if *made >= QUEUES_MAX {
                return Err(io::ErrorKind::ResourceBusy.into());
            }
            *made += 1;
        }
        Self::new().inspect_err(|_| QUEUES.lock().1 -= 1)
    }

    fn new() -> io::Result<Self> {
        let mut number: libc::c_ulong = 0;
        #[expect(unsafe_code, reason = "the kernel's queues have no wrapper")]
        // SAFETY: the call writes the queue's number to `number`, which must be zero before and lives through the call.
        let answer = unsafe { libc::syscall(libc::SYS_io_setup, DEPTH as libc::c_uint, &raw mut number) };
        check(answer)?;
        Ok(Self(number))
    }

    fn give_back(self) {
        QUEUES.lock().0.push(self);
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

    /// Waits for one answer at least, or as long as it is told; how many of `events` were filled.
    fn wait(&self, events: &mut [Event], longest: Option<Duration>) -> io::Result<usize> {
        let mut longest = longest.map(|longest| libc::timespec {
            // 292 billion years are long enough, and a second has fewer nanoseconds than any `long` can count.
            tv_sec: libc::time_t::try_from(longest.as_secs()).unwrap_or(libc::time_t::MAX),
            tv_nsec: longest.subsec_nanos() as libc::c_long,
        });
        let longest = longest.as_mut().map_or(std::ptr::null_mut(), std::ptr::from_mut);
        #[expect(unsafe_code, reason = "the kernel's queues have no wrapper")]
        // SAFETY: the call fills at most as many events as it is told, all of which live through it, as does the time; without
        // a time it waits for the first.
        let answer = unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                self.0,
                1 as libc::c_long,
                events.len() as libc::c_long,
                events.as_mut_ptr(),
                longest,
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
        QUEUES.lock().1 -= 1;
    }
}

/// Transfers that are under way, each known by a number below [`DEPTH`].
struct Flight {
    queue: Option<Queue>,
    /// How many are under way.
    count: usize,
}

/// What became of a transfer: its number, and how many bytes were moved.
type Landed = (usize, io::Result<usize>);

impl Flight {
    /// `None` where the system has no such queues, or none left.
    fn new() -> Option<Self> {
        let queue = Queue::lend().inspect_err(|error| tracing::trace!(%error, "no queue of the kernel's")).ok()?;
        Some(Self { queue: Some(queue), count: 0 })
    }

    /// Begins a transfer of a file that is open for direct ones: through the page cache the kernel would not return before it
    /// is done. Whether the queue takes it.
    ///
    /// # Safety
    /// Nobody else touches the memory until [`land`](Self::land) has answered for the transfer or the flight has been dropped,
    /// and it is not leaked. For a write, others may read; who writes to it meanwhile, or frees it, gets what he deserves into the
    /// file, and nothing else.
    #[expect(unsafe_code, reason = "the kernel uses the memory after this returns")]
    unsafe fn begin(
        &mut self,
        file: &File,
        operation: (u16, u32),
        memory: *mut [u8],
        offset: u64,
        number: usize,
    ) -> bool {
        let Some(queue) = self.queue.as_ref().filter(|_| self.count < DEPTH) else { return false };
        // SAFETY: as the caller promises.
        match unsafe { queue.submit(file, operation, memory, offset, number as u64) } {
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

    /// Waits until some transfers have landed, or for as long as it is told; none where none is under way.
    ///
    /// # Errors
    /// The queue does not answer. Nothing is under way any more then.
    fn land(&mut self, longest: Option<Duration>) -> io::Result<Vec<Landed>> {
        let mut events = [Event::default(); DEPTH];
        let Some(queue) = self.queue.as_ref().filter(|_| self.count > 0) else { return Ok(Vec::new()) };
        let until = longest.and_then(|longest| Instant::now().checked_add(longest));
        let count = loop {
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            match queue.wait(&mut events, left) {
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

impl Flight {
    /// Leaves what is under way to a thread that waits for its end, and then frees the memory. Where the system gives no such
    /// thread nobody ever does.
    fn leave(self, memory: Box<dyn Any + Send>) {
        let left = ManuallyDrop::new((self, memory));
        let wait = move || {
            let (flight, memory) = ManuallyDrop::into_inner(left);
            drop(flight);
            drop(memory);
        };
        if let Err(error) = thread::Builder::new().name("alight-overdue".into()).spawn(wait) {
            tracing::warn!(%error, "no thread to wait for a read that is overdue; its memory is lost");
        }
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        while self.count > 0 {
            // What became of them nobody asks any more.
            let _ = self.land(None);
        }
        if let Some(queue) = self.queue.take() {
            queue.give_back();
        }
    }
}

/// How many bytes of a transfer the kernel's queue has moved, the rest being for a plain call; `None` where it refused the
/// transfer. A plain call also knows what to do where direct ones are refused.
fn moved(answer: io::Result<usize>) -> io::Result<Option<usize>> {
    match answer {
        Ok(count) => Ok(Some(count)),
        Err(error) => match error.raw_os_error() {
            Some(libc::EINVAL | libc::EAGAIN | libc::EINTR | libc::EOPNOTSUPP) => Ok(None),
            _ => Err(error),
        },
    }
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
    let Some((file, mut flight)) = file.and_then(|file| Some((file, Flight::new()?))) else {
        for part in parts {
            plainly(&part.bytes.into_owned()?, part.offset)?;
        }
        return Ok(());
    };
    let land = |flight: &mut Flight, under_way: &mut [Option<Part>; DEPTH]| {
        for (number, answer) in flight.land(None)? {
            let Some(part) = under_way.get_mut(number).and_then(Option::take) else { continue };
            let done = moved(answer)?.unwrap_or(0);
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
                    let begun =
                        aligned && unsafe { flight.begin(file, (PWRITE, NOWAIT), memory.cast_mut(), offset, number) };
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
        let begun = unsafe { flight.begin(file, (PWRITE, 0), memory, offset, number) };
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

/// Fills memory from a file in parts, and tells of each part once its bytes are there, while the next is on its way; `plainly` fills
/// all of some bytes by a call of its own, however long that takes. With `patience` there are no such calls, but for what is left
/// of a short count, which is nothing where the file ends; nothing is begun that would make the system wait for a lock, or for
/// room in the disk's queue; and a part that has not come within it is waited for no longer.
///
/// One part is on its way at a time: a virtual disk answers for all that it was given at once when the last of it is done.
pub(super) fn read_parts(
    file: &File,
    memory: &mut dyn Landing,
    parts: Parts,
    patience: Option<Duration>,
    landed: &mut dyn FnMut(&[u8]),
    plainly: impl Fn(&mut [u8], u64) -> io::Result<()>,
) -> io::Result<Arrival> {
    let operation = (PREAD, if patience.is_some() { NOWAIT } else { 0 });
    let offset_of = |number: usize| parts.offset + (number * parts.part_bytes) as u64;
    // Dropped after the flight, which fills them.
    let mut pieces: Vec<&mut [u8]> = parts.of(memory.bytes())?.chunks_mut(parts.part_bytes).collect();
    let mut flight = Flight::new();
    // Whether a part was begun: none where there is none.
    let begin = |flight: &mut Option<Flight>, pieces: &mut [&mut [u8]], number: usize| {
        let (Some(flight), Some(piece)) = (flight, pieces.get_mut(number)) else { return false };
        let aligned = is_direct_aligned(piece.as_ptr().addr() as u64, offset_of(number), piece.len());
        #[expect(unsafe_code, reason = "the kernel fills the memory after the call returns")]
        // SAFETY: the piece is borrowed by `pieces` longer than the flight lives, and not touched before the flight has
        // answered for its number; where the flight is left, so is the memory, which stays where it is.
        let begun = aligned && unsafe { flight.begin(file, operation, *piece, offset_of(number), number) };
        begun
    };
    let mut begun = begin(&mut flight, &mut pieces, 0);
    for number in 0..pieces.len() {
        let mut moved_bytes = None;
        if let Some(flying) = flight.as_mut().filter(|_| begun) {
            let answers = flying.land(patience)?;
            if answers.is_empty()
                && let Some(flight) = flight.take()
            {
                flight.leave(memory.leave());
                return Ok(Arrival::Overdue);
            }
            for (_, answer) in answers {
                moved_bytes = moved(answer)?;
            }
        }
        if moved_bytes.is_none() && patience.is_some() {
            return Ok(Arrival::WouldWait);
        }
        let rest = &mut pieces[number][moved_bytes.unwrap_or(0)..];
        if !rest.is_empty() {
            // Before the next is begun: should this fail, nothing has to be waited for.
            let at = offset_of(number + 1).min(parts.offset + parts.len as u64) - rest.len() as u64;
            plainly(rest, at)?;
        }
        begun = begin(&mut flight, &mut pieces, number + 1);
        landed(pieces[number]);
    }
    Ok(Arrival::Landed)
}
