//! NVIDIA's cuFile (GPUDirect Storage), loaded at run time: bytes between plain files and GPU memory, directly where the
//! machine can, through cuFile's own threads (its compatibility mode) where it cannot. It chooses no route: who calls it
//! wants cuFile, and gets an error where cuFile will not do.
//!
//! ```no_run
//! use alight::Device;
//! use alight::cufile::{Access, Buffer, CuFile, Transfer};
//!
//! let gpu = Device::cuda(0)?;
//! let cufile = CuFile::get()?; // opens the driver, once in a process
//! let file = cufile.open("weights.bin", Access::Read)?;
//! let buffer = Buffer::new(gpu.allocate(1 << 20)?)?;
//! file.read(&buffer, Transfer { file_offset: 4096, buffer_offset: 0, len_bytes: 1 << 20 })?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! [`File::read`] and [`File::write`] block and may be called from many threads at once; [`Batch`] starts many operations
//! with one call and polls for them; [`Stream`] puts them in line with other work of a GPU.
//!
//! # Invariants
//! - An operation owns what it uses (file, buffer, the numbers that cuFile reads and writes) until cuFile is done with it.
//!   Where that cannot be known, it is kept for ever.
//! - A file is deregistered before its descriptor closes, memory before it is freed.
//! - The driver is opened once and never closed: other libraries of the process (torch) use the same one.
//! - Every count that cuFile returns is compared with the one that was asked for: a short one is continued, and a file
//!   that ends before the bytes that were promised is an error.
//! - Every call runs with the context of the buffer's GPU current, and leaves the thread with the context it had.
//!
//! # Known trouble
//! On 1.15, in compatibility mode, transfers on a [`Stream`] fail with `EIO` in some processes whose other threads use cuFile
//! at the same time; its log then says "cufile must support threadpool in order for posix stream IO to work". Nothing was
//! moved then, and the error is the transfer's own. Used by one thread they have never failed. Letting the first call of each
//! kind run alone did not help. Blocking transfers and batches are not touched; alight itself uses no streams of cuFile.

mod batch;
mod buffer;
mod driver;
mod error;
mod handle;
mod log;
mod params;
#[cfg(test)]
pub(crate) mod simulated;
mod stream;
mod sys;
#[cfg(test)]
mod tests;
mod transfer;
pub(crate) mod udev;

pub use batch::{Batch, Completion, Operation, OperationId};
pub use buffer::Buffer;
pub use driver::{CuFile, Properties};
pub use error::{Error, ErrorKind, Result, Status};
pub use handle::{Access, File};
pub use stream::{Pending, Stream};
pub(crate) use transfer::Landing;
pub use transfer::{Direction, Transfer};

/// An answer of the library with a code: for tests of the layers above.
#[cfg(test)]
pub(crate) fn sys_error(err: std::ffi::c_int) -> sys::RawError {
    sys::RawError { err, cu_err: 0 }
}
