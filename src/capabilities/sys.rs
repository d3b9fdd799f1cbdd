//! Questions that only a system call answers, one safe function each. None of them changes anything.

use std::fs::File;
use std::io;
use std::mem::offset_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

/// `cachestat` has this number on every architecture that Rust's standard library runs on.
const SYS_CACHESTAT: libc::c_long = 451;

/// `STATX_DIOALIGN` of the kernel's `linux/stat.h`, since Linux 6.1.
const STATX_DIOALIGN: u32 = 0x2000;

/// `struct statx` of the kernel's `linux/stat.h`, the fields that are asked for here.
#[repr(C)]
struct Statx {
    mask: u32,
    _before: [u32; 37],
    dio_mem_align: u32,
    dio_offset_align: u32,
    _after: [u64; 12],
}

const _: () = assert!(size_of::<Statx>() == 256 && offset_of!(Statx, dio_mem_align) == 0x98);

/// Whether the kernel gives this process an io_uring.
pub(super) fn io_uring() -> io::Result<()> {
    // `struct io_uring_params` has 120 bytes, zeros for the defaults.
    let mut params = [0u64; 15];
    // SAFETY: the parameters have the size that the kernel reads and writes, and live through the call.
    let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, params.as_mut_ptr()) };
    if ring < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us, a small number; it is closed here.
    drop(unsafe { OwnedFd::from_raw_fd(ring as i32) });
    Ok(())
}

/// Whether the kernel tells this process what is in the page cache, by the example of its own program.
pub(super) fn cachestat() -> io::Result<()> {
    let file = File::open("/proc/self/exe")?;
    let (range, mut facts) = ([0u64, 4096], [0u64; 5]);
    // SAFETY: both have the kernel's layout (`struct cachestat_range`, `struct cachestat`) and live through the call.
    let answer = unsafe { libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), range.as_ptr(), facts.as_mut_ptr(), 0) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The steps of addresses and offsets of a direct transfer; `None` where the kernel does not tell.
pub(super) fn direct_alignment(file: &File) -> io::Result<Option<(u32, u32)>> {
    let mut facts = Statx { mask: 0, _before: [0; 37], dio_mem_align: 0, dio_offset_align: 0, _after: [0; 12] };
    // SAFETY: the path is an empty string, which with this flag means the descriptor; `facts` has the kernel's layout and
    // size (asserted above) and lives through the call.
    let answer = unsafe {
        let facts = (&raw mut facts).cast::<libc::c_void>();
        libc::syscall(libc::SYS_statx, file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, STATX_DIOALIGN, facts)
    };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((facts.mask & STATX_DIOALIGN != 0).then_some((facts.dio_mem_align, facts.dio_offset_align)))
}

/// The magic number of the file system that holds a path.
pub(super) fn filesystem_magic(path: &Path) -> io::Result<u32> {
    let file = File::open(path)?;
    let mut facts = std::mem::MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: the descriptor is open, and `facts` is memory of the type that the call fills.
    if unsafe { libc::fstatfs(file.as_raw_fd(), facts.as_mut_ptr()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call answered without an error, so it has filled `facts`. Magic numbers have 32 bits.
    Ok(unsafe { facts.assume_init() }.f_type as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_answers_or_says_why_not() {
        for answer in [io_uring(), cachestat()] {
            assert!(answer.is_ok() || answer.unwrap_err().raw_os_error().is_some());
        }
        let file = tempfile::tempfile().unwrap();
        if let Ok(Some((memory, offset))) = direct_alignment(&file) {
            assert!(offset == 0 || (memory.is_power_of_two() && offset.is_power_of_two()), "{memory} {offset}");
        }
        assert!(filesystem_magic(Path::new("/proc")).unwrap() == 0x9fa0);
    }
}
