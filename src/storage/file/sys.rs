//! The system calls that the standard library does not offer, one safe function each. With [`aio`](super::aio) the
//! only file of the storage layer that calls libc.
//!
//! # Invariants
//! - Every function issues its call once and reports the answer as it is: no retry, not even after `EINTR`.
//! - Every offset and length is judged before it becomes the signed number that the system takes.
//! - No function takes or returns a pointer; memory is borrowed for the length of the call.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use memmap2::{Mmap, MmapOptions};

/// `struct cachestat_range` of the kernel's `linux/mman.h`.
#[repr(C)]
struct CachestatRange {
    offset: u64,
    len: u64,
}

/// `struct cachestat` of the kernel's `linux/mman.h`.
#[repr(C)]
#[derive(Default)]
struct Cachestat {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

const _: () = assert!(size_of::<CachestatRange>() == 16 && size_of::<Cachestat>() == 40);

/// `cachestat` has this number on every architecture that Rust's standard library runs on; the libc crate does not
/// name it on all of them.
const SYS_CACHESTAT: libc::c_long = 451;

/// The kernel takes at most this many slices in one vectored call.
const IOV_MAX: usize = libc::UIO_MAXIOV as usize;

/// How a call returned: its own error when it answered below zero.
pub(super) fn check<T: PartialOrd + Default>(answer: T) -> io::Result<T> {
    if answer < T::default() { Err(io::Error::last_os_error()) } else { Ok(answer) }
}

pub(super) fn signed(value: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(value)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "an offset past what the system can express"))
}

/// Says `Unsupported` where the system says, in one of its several ways, that it has no such call.
fn unsupported_is_a_kind(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(libc::EOPNOTSUPP | libc::ENOSYS) => io::Error::new(io::ErrorKind::Unsupported, error),
        _ => error,
    }
}

/// `preadv2` with `RWF_NOWAIT`: reads what is in the page cache, `WouldBlock` where nothing of it is.
pub(super) fn read_cached_at(file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    let offset = signed(offset)?;
    let memory = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    #[expect(unsafe_code, reason = "the call has no wrapper")]
    // SAFETY: the one slice names memory that is borrowed, uniquely, through the call, which fills at most all of it.
    let read = unsafe { libc::preadv2(file.as_raw_fd(), &raw const memory, 1, offset, libc::RWF_NOWAIT) };
    // `check` made it non-negative, and no count is larger than the memory that was borrowed.
    Ok(check(read).map_err(unsupported_is_a_kind)? as usize)
}

/// `pwritev`: writes the slices one after another at `offset`, at most `IOV_MAX` of them.
pub(super) fn write_vectored_at(file: &File, bufs: &[io::IoSlice<'_>], offset: u64) -> io::Result<usize> {
    let offset = signed(offset)?;
    let count = bufs.len().min(IOV_MAX);
    #[expect(unsafe_code, reason = "the standard library's vectored write at an offset is not stable")]
    // SAFETY: `IoSlice` is documented to have the layout of `iovec`, the first `count` of them are borrowed during the
    // call, each naming initialised memory that is only read; `count` is at most 1024, so it fits `c_int`.
    let written = unsafe { libc::pwritev(file.as_raw_fd(), bufs.as_ptr().cast(), count as libc::c_int, offset) };
    // `check` made it non-negative, and no count is larger than the memory that was borrowed.
    Ok(check(written)? as usize)
}

/// `fallocate` with no mode: takes space, and lengthens the file to cover it.
pub(super) fn allocate(file: &File, offset: u64, len: u64) -> io::Result<()> {
    fallocate(file, 0, offset, len)
}

/// `fallocate` that gives a range's blocks back and keeps the length.
pub(super) fn punch(file: &File, offset: u64, len: u64) -> io::Result<()> {
    fallocate(file, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, offset, len)
}

fn fallocate(file: &File, mode: libc::c_int, offset: u64, len: u64) -> io::Result<()> {
    let (offset, len) = (signed(offset)?, signed(len)?);
    #[expect(unsafe_code, reason = "fallocate is not in the standard library")]
    // SAFETY: the descriptor is open as long as `file` is borrowed; the call takes no memory of ours.
    let answer = unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, len) };
    check(answer).map(drop).map_err(unsupported_is_a_kind)
}

/// `FICLONE`: makes `target` share all of `source`'s blocks. `Unsupported` where the two cannot share any.
pub(super) fn clone_file(source: &File, target: &File) -> io::Result<()> {
    #[expect(unsafe_code, reason = "FICLONE is not in the standard library")]
    // SAFETY: both descriptors are open as long as the files are borrowed; the request takes a descriptor by value and no
    // memory of ours.
    let answer = unsafe { libc::ioctl(target.as_raw_fd(), libc::FICLONE, source.as_raw_fd()) };
    check(answer).map(drop).map_err(|error| match error.raw_os_error() {
        // Another file system, one that shares nothing, one that does not know the request.
        Some(libc::EXDEV | libc::EOPNOTSUPP | libc::EINVAL | libc::ENOTTY | libc::ENOSYS | libc::EPERM) => {
            io::Error::new(io::ErrorKind::Unsupported, error)
        }
        _ => error,
    })
}

/// `fdatasync`. Unlike `File::sync_data` it does not go round again after `EINTR`.
pub(super) fn sync_data(file: &File) -> io::Result<()> {
    #[expect(unsafe_code, reason = "the standard library's call retries, and a sync must never be retried")]
    // SAFETY: the descriptor is open as long as `file` is borrowed; the call takes no memory of ours.
    let answer = unsafe { libc::fdatasync(file.as_raw_fd()) };
    check(answer).map(drop)
}

/// `fsync`. Unlike `File::sync_all` it does not go round again after `EINTR`.
pub(super) fn sync_all(file: &File) -> io::Result<()> {
    #[expect(unsafe_code, reason = "the standard library's call retries, and a sync must never be retried")]
    // SAFETY: the descriptor is open as long as `file` is borrowed; the call takes no memory of ours.
    let answer = unsafe { libc::fsync(file.as_raw_fd()) };
    check(answer).map(drop)
}

/// `lseek` with `SEEK_DATA`: where the next data is, `None` when only holes follow. Moves the descriptor's cursor,
/// which nobody uses.
pub(super) fn seek_data(file: &File, offset: u64) -> io::Result<Option<u64>> {
    let offset = signed(offset)?;
    #[expect(unsafe_code, reason = "SEEK_DATA is not in the standard library")]
    // SAFETY: the descriptor is open as long as `file` is borrowed; the call takes no memory of ours.
    let answer = unsafe { libc::lseek(file.as_raw_fd(), offset, libc::SEEK_DATA) };
    match check(answer) {
        // `check` made it non-negative.
        Ok(found) => Ok(Some(found as u64)),
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        Err(error) => Err(error),
    }
}

/// `fcntl` with a lock of the open file description on one or more bytes from 0 or `start` on.
fn lock_call(file: &File, command: libc::c_int, kind: libc::c_int, start: u64, len: u64) -> io::Result<libc::flock> {
    #[expect(unsafe_code, reason = "the structure has padding on some systems, and no constructor")]
    // SAFETY: `flock` is a structure of integers, for which zeros are a value.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    // The constants are small numbers; the field is a short.
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    (lock.l_start, lock.l_len) = (signed(start)?, signed(len)?);
    #[expect(unsafe_code, reason = "these locks are not in the standard library")]
    // SAFETY: the descriptor is open as long as `file` is borrowed; the call reads and fills the structure, which lives
    // through it.
    let answer = unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) };
    match check(answer) {
        Ok(_) => Ok(lock),
        Err(error) => Err(match error.raw_os_error() {
            // A kernel, a sandbox or a file system without such locks.
            Some(libc::EINVAL | libc::ENOSYS | libc::EOPNOTSUPP | libc::ENOLCK) => {
                io::Error::new(io::ErrorKind::Unsupported, error)
            }
            _ => error,
        }),
    }
}

/// `F_OFD_SETLK`: takes a shared lock on one byte, which lasts as long as the open file description.
pub(super) fn share_byte(file: &File, byte: u64) -> io::Result<()> {
    lock_call(file, libc::F_OFD_SETLK, libc::F_RDLCK, byte, 1).map(drop)
}

/// `F_OFD_GETLK`: a byte from 0 to `through` that somebody's lock covers, through another open file description.
pub(super) fn shared_byte(file: &File, through: u64) -> io::Result<Option<u64>> {
    let lock = lock_call(file, libc::F_OFD_GETLK, libc::F_WRLCK, 0, through.saturating_add(1))?;
    let held = lock.l_type != libc::F_UNLCK as libc::c_short;
    // The system answers with a place that it was given before, which is not negative.
    Ok(held.then_some(lock.l_start as u64))
}

/// `statvfs`: the bytes that an ordinary user may still take.
pub(super) fn free_bytes(path: &Path) -> io::Result<u64> {
    let directory = File::open(path)?;
    let mut facts = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    #[expect(unsafe_code, reason = "statvfs is not in the standard library")]
    // SAFETY: the descriptor is open during the call, and `facts` is memory of the type that the call fills.
    let answer = unsafe { libc::fstatvfs(directory.as_raw_fd(), facts.as_mut_ptr()) };
    check(answer)?;
    #[expect(unsafe_code, reason = "the call filled the memory")]
    // SAFETY: the call answered without an error, so it has filled `facts`.
    let facts = unsafe { facts.assume_init() };
    Ok(facts.f_bavail.saturating_mul(facts.f_frsize))
}

/// `fstatfs`: the magic number of the file system that holds a file.
pub(super) fn filesystem_magic(file: &File) -> io::Result<u32> {
    let mut facts = std::mem::MaybeUninit::<libc::statfs>::uninit();
    #[expect(unsafe_code, reason = "fstatfs is not in the standard library")]
    // SAFETY: the descriptor is open as long as `file` is borrowed, and `facts` is memory of the type that the call fills.
    let answer = unsafe { libc::fstatfs(file.as_raw_fd(), facts.as_mut_ptr()) };
    check(answer)?;
    #[expect(unsafe_code, reason = "the call filled the memory")]
    // SAFETY: the call answered without an error, so it has filled `facts`.
    let facts = unsafe { facts.assume_init() };
    // Magic numbers have 32 bits; the field is wider, and signed, on some systems only.
    Ok(facts.f_type as u32)
}

/// The user that this process acts as.
pub(super) fn effective_user() -> u32 {
    #[expect(unsafe_code, reason = "geteuid is not in the standard library")]
    // SAFETY: the call takes nothing and cannot fail.
    unsafe {
        libc::geteuid()
    }
}

/// The size of a page of the page cache.
pub(super) fn page_bytes() -> u64 {
    #[expect(unsafe_code, reason = "sysconf is not in the standard library")]
    // SAFETY: the call takes no memory of ours.
    let answer = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    // 4096 is the smallest of any Linux; an error here cannot happen, since the name is one that POSIX requires.
    u64::try_from(answer).unwrap_or(4096).max(4096)
}

/// Maps the first `len` bytes for reading. `len` is at least one and no longer than the file was a moment ago.
pub(super) fn map(file: &File, len: usize) -> io::Result<Mmap> {
    #[expect(unsafe_code, reason = "mapping a file is unsafe, since others may change it")]
    // SAFETY: the caller has compared `len` with the file's length. The contract of `StorageMap` is that the store
    // neither truncates nor writes a file that it maps: index runs are written whole, renamed, and only then mapped.
    // Another process that breaks this breaks the store's lock as well.
    unsafe {
        MmapOptions::new().len(len).map(file)
    }
}

/// `cachestat`: how many pages of the range are in the page cache; `None` where the kernel or its policy has no answer.
pub(super) fn cached_pages(file: &File, offset: u64, len: u64) -> io::Result<Option<u64>> {
    static ABSENT: AtomicBool = AtomicBool::new(false);
    if ABSENT.load(Ordering::Relaxed) {
        return Ok(None);
    }
    let range = CachestatRange { offset, len };
    let mut facts = Cachestat::default();
    #[expect(unsafe_code, reason = "cachestat has no wrapper")]
    // SAFETY: both structures have the kernel's layout (sizes asserted above) and live through the call, which reads
    // the first and fills the second; the descriptor is open as long as `file` is borrowed; no flag is defined but 0.
    let answer =
        unsafe { libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), &raw const range, &raw mut facts, 0 as libc::c_uint) };
    match check(answer) {
        Ok(_) => Ok(Some(facts.cached)),
        Err(error) => match error.raw_os_error() {
            // Older than Linux 6.5, or filtered by a container's policy: so for every file of this process.
            Some(libc::ENOSYS) => {
                ABSENT.store(true, Ordering::Relaxed);
                Ok(None)
            }
            // Not for this file: someone else's, or of a kind that has no page cache.
            Some(libc::EPERM | libc::EACCES | libc::EOPNOTSUPP) => Ok(None),
            _ => Err(error),
        },
    }
}

/// [`in_core`] over a temporary mapping. The mapping is never touched, so nothing is read. `offset` is a multiple of the page
/// size, and the range lies inside the file.
pub(super) fn all_pages_in_core(file: &File, offset: u64, len: usize) -> io::Result<bool> {
    #[expect(unsafe_code, reason = "mapping a file is unsafe, since others may change it")]
    // SAFETY: no byte of this mapping is ever read, so nobody can see it change or be killed for touching it.
    let mapping = unsafe { MmapOptions::new().offset(offset).len(len).map(file)? };
    in_core(&mapping, 0..len)
}

/// `mincore`: whether every page of a range of a mapping is in memory. The range begins on a page.
pub(super) fn in_core(mapping: &Mmap, range: Range<usize>) -> io::Result<bool> {
    let page = usize::try_from(page_bytes()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let bytes = mapping.get(range).ok_or(io::ErrorKind::InvalidInput)?;
    let mut pages = vec![0u8; bytes.len().div_ceil(page)];
    #[expect(unsafe_code, reason = "mincore is not in the standard library")]
    // SAFETY: the range lies in the mapping, which lives through the call; one that does not begin on a page is refused; `pages`
    // has one byte for every page of it, which is what the call fills.
    let answer = unsafe { libc::mincore(bytes.as_ptr().cast_mut().cast(), bytes.len(), pages.as_mut_ptr()) };
    check(answer)?;
    Ok(pages.iter().all(|page| page & 1 == 1))
}

/// `clock_gettime` of the coarse clock: seconds since the machine was started, some nanoseconds to ask for.
pub(super) fn coarse_seconds() -> u32 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    #[expect(unsafe_code, reason = "the standard library's clock is the exact one, which takes five times as long")]
    // SAFETY: the call fills the structure, which lives through it. It fails for no clock that exists.
    unsafe {
        libc::clock_gettime(libc::CLOCK_MONOTONIC_COARSE, &raw mut time);
    }
    // Wraps after 136 years.
    time.tv_sec as u32
}
