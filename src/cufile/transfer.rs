//! One transfer between a file and device memory, and the blocking way to do it. It waits for nothing but cuFile.

use std::ffi::c_void;
use std::io;
use std::marker::PhantomData;
use std::ptr;

use super::Buffer;
use super::error::{self, Error, ErrorKind, Result};
use super::handle::File;
use super::sys::Off;
use crate::device::DeviceBuffer;

/// What goes where: a range of a file and a range of a buffer of the same length. Any byte is a good beginning and a good
/// end; transfers in whole blocks of 4 KiB go without a detour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transfer {
    /// Where it begins in the file.
    pub file_offset: u64,
    /// Where it begins in the buffer.
    pub buffer_offset: u64,
    /// How long it is.
    pub len_bytes: u64,
}

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the file to the GPU.
    Read,
    /// From the GPU to the file.
    Write,
}

impl Direction {
    pub(super) fn verb(self) -> &'static str {
        match self {
            Direction::Read => "read",
            Direction::Write => "write",
        }
    }
}

/// A transfer that was judged: its ranges lie inside the buffer and inside what C's types hold.
#[derive(Debug, Clone, Copy)]
pub(super) struct Checked {
    pub(super) direction: Direction,
    /// The address of the buffer, not of the range.
    pub(super) base: u64,
    pub(super) file_offset: Off,
    pub(super) base_offset: Off,
    pub(super) len: usize,
}

impl Checked {
    /// Judges a transfer.
    pub(super) fn new(file: &File, memory: &DeviceBuffer, direction: Direction, transfer: Transfer) -> Result<Checked> {
        let invalid = |why: String| file.error(direction.verb(), ErrorKind::Invalid(why));
        let Some(address) = memory.device_ptr() else {
            return Err(invalid("the buffer is on the host; cuFile moves bytes to and from a GPU".to_string()));
        };
        if direction == Direction::Write && !file.is_writable() {
            return Err(invalid("the file is registered for reading".to_string()));
        }
        let Transfer { file_offset, buffer_offset, len_bytes } = transfer;
        if buffer_offset.checked_add(len_bytes).is_none_or(|end| end > memory.len_bytes()) {
            let len = memory.len_bytes();
            return Err(invalid(format!("{len_bytes} bytes at {buffer_offset} of a buffer of {len} bytes")));
        }
        let end = file_offset.checked_add(len_bytes).and_then(|end| Off::try_from(end).ok());
        if end.is_none() {
            return Err(invalid(format!("{len_bytes} bytes at {file_offset} reach past any file")));
        }
        // The file's end fits `Off`, and a buffer that exists is shorter: none of these loses anything.
        let (file_offset, base_offset) = (file_offset as Off, buffer_offset as Off);
        Ok(Checked { direction, base: address, file_offset, base_offset, len: len_bytes as usize })
    }

    /// The address of the buffer, as C takes it.
    pub(super) fn pointer(self) -> *mut c_void {
        ptr::with_exposed_provenance_mut(self.base as usize)
    }

    /// The same, with the range's own address and no offset into the buffer.
    pub(super) fn at_its_range(self) -> Checked {
        // Both were checked to lie in one buffer: neither is negative, and the sum is an address.
        Checked { base: self.base + self.base_offset as u64, base_offset: 0, ..self }
    }

    /// What is left after `done` bytes.
    pub(super) fn after(self, done: usize) -> Checked {
        let moved = done as Off;
        Checked {
            file_offset: self.file_offset + moved,
            base_offset: self.base_offset + moved,
            len: self.len - done,
            ..self
        }
    }

    /// Moves all of it; blocks. The context of the memory's device is current.
    ///
    /// # Safety
    /// The memory lives through the call.
    unsafe fn run(self, file: &File) -> Result<()> {
        let failed = |kind| file.error(self.direction.verb(), kind);
        let functions = file.cufile().functions();
        let mut done = 0;
        while done < self.len {
            let Checked { file_offset, base_offset, len, .. } = self.after(done);
            let base = self.pointer();
            // SAFETY: the handle is registered as long as `file` lives; the range lies in memory that the caller keeps.
            let count = unsafe {
                match self.direction {
                    Direction::Read => (functions.read)(file.raw(), base, len, file_offset, base_offset),
                    Direction::Write => (functions.write)(file.raw(), base, len, file_offset, base_offset),
                }
            };
            // Read before anything else can change it.
            let errno = io::Error::last_os_error().raw_os_error().unwrap_or(0);
            match error::check_count(count, errno) {
                Err(ErrorKind::Os(libc::EINTR)) => {}
                Err(kind) => return Err(failed(kind)),
                Ok(count) => done += self.progress(done, count).map_err(failed)?,
            }
        }
        Ok(())
    }

    /// How far a call that was asked for all after `done` bytes has come; a count of nothing, or of too much, is an error.
    pub(super) fn progress(self, done: usize, count: u64) -> std::result::Result<usize, ErrorKind> {
        let left = self.len - done;
        match usize::try_from(count) {
            Ok(0) if self.direction == Direction::Read => {
                Err(ErrorKind::EndOfFile { wanted: self.len as u64, got: done as u64 })
            }
            Ok(0) => Err(ErrorKind::Os(libc::ENOSPC)),
            Ok(count) if count <= left => Ok(count),
            _ => Err(ErrorKind::Invalid(format!("cuFile says that it moved {count} of {left} bytes"))),
        }
    }

    /// Goes on where an operation that was not waited for ended after `count` bytes: moves the rest, blocking.
    pub(super) fn continue_after(self, file: &File, buffer: &Buffer, count: u64) -> Result<()> {
        if self.len == 0 {
            return Ok(());
        }
        let done = self.progress(0, count).map_err(|kind| file.error(self.direction.verb(), kind))?;
        let rest = self.after(done);
        if rest.len == 0 {
            return Ok(());
        }
        let _current = file.enter(self.direction.verb(), buffer.memory().device())?;
        // SAFETY: `buffer` lives through the call.
        unsafe { rest.run(file) }
    }
}

/// A buffer on its way to be filled from files: several threads may read into it at once.
pub(crate) struct Landing<'b> {
    memory: &'b DeviceBuffer,
    /// Nobody else has the buffer meanwhile.
    _alone: PhantomData<&'b mut DeviceBuffer>,
}

impl<'b> Landing<'b> {
    /// Lends a buffer to several threads.
    pub(crate) fn new(memory: &'b mut DeviceBuffer) -> Self {
        Self { memory, _alone: PhantomData }
    }

    /// [`File::read_into`]. Where ranges of several threads overlap, either's bytes win.
    ///
    /// # Errors
    /// As [`File::read`].
    pub(crate) fn read(&self, file: &File, transfer: Transfer) -> Result<()> {
        file.blocking(self.memory, Direction::Read, transfer)
    }
}

impl File {
    /// Reads from the file into a buffer; blocks until the bytes are there. Other threads may read and write through the
    /// same file and the same buffer meanwhile; where ranges overlap, either's bytes win.
    ///
    /// # Errors
    /// [`ErrorKind::EndOfFile`] where the file ends before; [`ErrorKind::Invalid`] where the transfer does not fit the
    /// buffer; [`ErrorKind::Status`] and [`ErrorKind::Os`] where cuFile or the system failed. The range of the buffer is
    /// then unspecified.
    pub fn read(&self, buffer: &Buffer, transfer: Transfer) -> Result<()> {
        self.blocking(buffer.memory(), Direction::Read, transfer)
    }

    /// [`read`](Self::read) into memory that is not wrapped in a [`Buffer`].
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn read_into(&self, memory: &mut DeviceBuffer, transfer: Transfer) -> Result<()> {
        self.blocking(memory, Direction::Read, transfer)
    }

    /// Writes from a buffer to the file; blocks until the bytes have left the GPU. They are durable only after a sync of
    /// the file.
    ///
    /// # Errors
    /// As [`read`](Self::read); how much of the file was written is then unknown.
    pub fn write(&self, buffer: &Buffer, transfer: Transfer) -> Result<()> {
        self.blocking(buffer.memory(), Direction::Write, transfer)
    }

    /// [`write`](Self::write) from memory that is not wrapped in a [`Buffer`].
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn write_from(&self, memory: &DeviceBuffer, transfer: Transfer) -> Result<()> {
        self.blocking(memory, Direction::Write, transfer)
    }

    fn blocking(&self, memory: &DeviceBuffer, direction: Direction, transfer: Transfer) -> Result<()> {
        let checked = Checked::new(self, memory, direction, transfer)?;
        if checked.len == 0 {
            return Ok(());
        }
        let _current = self.enter(direction.verb(), memory.device())?;
        // SAFETY: `memory` is borrowed through the call, which blocks until cuFile is done.
        unsafe { checked.run(self) }
    }
}

/// The device's refusal, as an error of cuFile.
pub(super) fn device_error(action: &'static str, error: &crate::error::Error) -> Error {
    Error::new(action, "device memory", ErrorKind::Device(error.to_string()))
}
