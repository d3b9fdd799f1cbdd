//! The only door to files: everything the store asks of a file system goes through [`Storage`].
//!
//! Two implementations stand behind it. [`FileStorage`] is the real file system. The fault-injecting twin in
//! [`sim`] keeps, in memory, what is live and what a completed sync made durable; it can fail any call and
//! present any state a disk could be in after the power was cut. The store cannot tell them apart, so what the
//! twin proves of the store holds of the real one, as far as the twin is faithful.
//!
//! # Invariants
//! - Nothing above this module opens, reads, writes, syncs, renames or removes a file by any other means.
//! - A method reports what the system call reported: it never retries a failed sync, and never turns a short
//!   count into a whole one. Retrying `EINTR` and continuing short counts is [`read_exact_at`]'s and
//!   [`write_all_at`]'s, once, for every implementation.
//! - A file's name is durable only after [`Storage::sync_dir`] of its directory; its bytes and its length only
//!   after [`StorageFile::sync`].

use std::fmt;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

mod aligned;
mod file;
mod landing;
mod lent;
pub mod sim;
#[cfg(test)]
mod suite;

pub use aligned::{AlignedBuf, BufferPool, DIRECT_ALIGN_BYTES, PooledBuf, PooledPart};
pub use file::FileStorage;
pub use landing::{Arrival, Landing, Parts};
pub use lent::LentBytes;
pub(crate) use lent::lend;

/// How a file is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenMode {
    /// An existing file, for reading.
    Read,
    /// An existing file, for reading and writing.
    ReadWrite,
    /// A new file, for reading and writing; an existing one is an error (`AlreadyExists`).
    CreateNew,
    /// For reading and writing, made when absent, emptied when present.
    CreateTruncate,
}

/// Whether a transfer goes through the page cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Caching {
    /// Through the page cache: any offset, any length, any address.
    Buffered,
    /// Out of the page cache, and nothing else: a read of what is not in it, or is still on its way there, is `WouldBlock`, or
    /// short. As `Buffered` for a write, and where the file system cannot tell.
    Cached,
    /// Past the page cache (`O_DIRECT`), where the file system can; address, offset and length must be multiples of
    /// [`DIRECT_ALIGN_BYTES`]. Where it cannot, the implementation goes through the page cache and says so in
    /// [`StorageFile::direct`].
    Direct,
}

/// One name in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirEntry {
    /// The name, without the directory's path.
    pub name: String,
    /// Whether it is itself a directory.
    pub is_dir: bool,
    /// The length of the file in bytes; zero for a directory.
    pub len_bytes: u64,
}

/// How much of a file's length the disk really holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FileFacts {
    /// The length in bytes.
    pub len_bytes: u64,
    /// The bytes that the file takes on its disk, space allocated ahead included, holes not.
    pub allocated_bytes: u64,
    /// How many names lead to the file, in whatever directories: what is changed in it is changed for all of them.
    pub links: u64,
}

/// Bytes to be written, and where to.
#[derive(Debug)]
pub struct Part {
    /// Where in the file.
    pub offset: u64,
    /// What.
    pub bytes: PartBytes,
}

/// The bytes of a [`Part`].
#[derive(Debug)]
pub enum PartBytes {
    /// In a buffer that is the part's own.
    Owned(PooledPart),
    /// Where whoever waits for the write has them.
    Lent(LentBytes),
}

impl PartBytes {
    /// The bytes in a buffer of their own: copied, where they are lent.
    ///
    /// # Errors
    /// As [`LentBytes::copied`].
    pub fn into_owned(self) -> io::Result<PooledPart> {
        match self {
            PartBytes::Owned(bytes) => Ok(bytes),
            PartBytes::Lent(bytes) => bytes.copied(),
        }
    }

    /// How many they are.
    #[expect(clippy::len_without_is_empty, reason = "a part has some")]
    pub fn len(&self) -> usize {
        match self {
            PartBytes::Owned(bytes) => bytes.len(),
            PartBytes::Lent(bytes) => bytes.len(),
        }
    }
}

impl From<PooledPart> for PartBytes {
    fn from(bytes: PooledPart) -> Self {
        PartBytes::Owned(bytes)
    }
}

/// A file system, as the store needs it. Every method blocks until the system has answered.
pub trait Storage: Send + Sync + fmt::Debug {
    /// Opens or makes a file.
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn StorageFile>>;

    /// Makes one directory; its parent must exist. An existing one is an error (`AlreadyExists`).
    fn create_dir(&self, path: &Path) -> io::Result<()>;

    /// The names in a directory, in no particular order. A path that is no directory is an error (`NotADirectory`).
    fn list(&self, path: &Path) -> io::Result<Vec<DirEntry>>;

    /// Gives a file another name, in place of whatever bore it, atomically. Durable after [`Storage::sync_dir`].
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Gives a file a second name, which must be free (`AlreadyExists`). What is written through one name is read through
    /// the other. Durable after [`Storage::sync_dir`] of the new name's directory. `Unsupported` where the file system has
    /// no such thing, where the new name lies on another one, or where the file has as many names as it can have.
    fn link(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Makes a new file (`AlreadyExists` where the name is taken) with the bytes that another has at this moment, sharing
    /// their space until one of the two is changed. Its name and its bytes are as durable as those of a file that was just
    /// written. `Unsupported` where the file system cannot share, or the two lie on different ones: copy then.
    fn reflink(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file's name. Durable after [`Storage::sync_dir`].
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Removes an empty directory (`DirectoryNotEmpty` otherwise, `NotADirectory` where it is a file). Durable after
    /// [`Storage::sync_dir`] of its parent.
    fn remove_dir(&self, path: &Path) -> io::Result<()>;

    /// Makes the names in a directory durable: creations, renames and removals since the last sync.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;

    /// Takes the exclusive lock on `path` (made when absent) and writes `holder` into it; `Err` of kind `WouldBlock`
    /// when another process, or another handle of this one, holds it. Released when the guard is dropped or the
    /// process ends. [`Storage::lock_holder`] reads who holds it.
    fn lock(&self, path: &Path, holder: &str) -> io::Result<Box<dyn StorageLock>>;

    /// What the lock's last holder wrote about itself.
    fn lock_holder(&self, path: &Path) -> io::Result<String>;

    /// Takes a shared lock on one byte of `path` (made when absent; the byte need not be in it). Any number of handles, in
    /// any process, may hold one on the same byte; released when the guard is dropped or the process ends. `Unsupported`
    /// where the system has no such locks.
    fn share_byte(&self, path: &Path, byte: u64) -> io::Result<Box<dyn StorageLock>>;

    /// The lowest byte of `path` up to and including `through` on which anybody holds a [`Storage::share_byte`], in this
    /// process or another; `None` where nobody does, or where there is no such file. `Unsupported` as there.
    fn lowest_shared_byte(&self, path: &Path, through: u64) -> io::Result<Option<u64>>;

    /// The bytes free to this user on the file system that holds `path`.
    fn free_bytes(&self, path: &Path) -> io::Result<u64>;
}

/// A held lock; dropping it releases the lock.
pub trait StorageLock: Send + Sync + fmt::Debug {}

/// An open file. Methods take `&self` and an offset, so several transfers may be in flight from several threads.
pub trait StorageFile: Send + Sync + fmt::Debug {
    /// Reads up to `buf.len()` bytes at `offset`; fewer at the end of the file, or when the system so chooses.
    fn read_at(&self, buf: &mut [u8], offset: u64, caching: Caching) -> io::Result<usize>;

    /// Writes the slices one after another at `offset`; returns how many bytes were taken, which may be fewer.
    fn write_vectored_at(&self, bufs: &[io::IoSlice<'_>], offset: u64, caching: Caching) -> io::Result<usize>;

    /// Reads exactly the bytes of `parts` to the front of `memory`, past the page cache where the file system can. `landed` is
    /// called with the bytes of each part, in order, once they are there, and while the next are on their way where the system can
    /// do that for one thread. A file that ends before is `UnexpectedEof`.
    ///
    /// Without `patience` it blocks until nothing is on its way any more. With it, no longer than that for a part: then the answer
    /// is [`Arrival::Overdue`], and the memory was left to the read, which frees it when it ends. What cannot keep to that answers
    /// [`Arrival::WouldWait`], whatever it has told of, and the same is to be asked again without, by a thread that may get stuck.
    fn read_parts_at(
        &self,
        memory: &mut dyn Landing,
        parts: Parts,
        patience: Option<Duration>,
        landed: &mut dyn FnMut(&[u8]),
    ) -> io::Result<Arrival> {
        if patience.is_some() {
            return Ok(Arrival::WouldWait);
        }
        read_each_part_at(self, memory, parts, landed)
    }

    /// Writes all of some parts past the page cache, where the file system can: each as soon as it comes, several at a time
    /// where the system can do that for one thread, and in no order. Blocks until all of them are written, or one has failed
    /// and no other is on its way any more.
    fn write_parts_at(&self, parts: &mut dyn Iterator<Item = Part>) -> io::Result<()> {
        for part in parts {
            write_all_at(self, &part.bytes.into_owned()?, part.offset, Caching::Direct)?;
        }
        Ok(())
    }

    /// Takes space for `len` bytes at `offset` ahead of use. The file's length grows to cover them; they read as
    /// zeros. Unsupported where the file system has no such call (`Unsupported`): then writes take space as they go.
    fn allocate(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Gives the blocks of a range back to the file system; the range reads as zeros, the length stays.
    fn punch(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Sets the length; what lies past it is gone, and its space is given back.
    fn truncate(&self, len: u64) -> io::Result<()>;

    /// Makes the bytes and the length durable (`fdatasync`). A failure means that unknown bytes are lost: the caller
    /// must not try again and believe the second answer.
    fn sync(&self) -> io::Result<()>;

    /// Length and space taken.
    fn facts(&self) -> io::Result<FileFacts>;

    /// The first offset at or after `offset` that may hold data (`SEEK_DATA`); `None` when only holes follow. A file
    /// system that cannot tell answers `offset` itself while it lies inside the file.
    fn next_data(&self, offset: u64) -> io::Result<Option<u64>>;

    /// Maps the first `len` bytes for reading. Never longer than the file: that is `InvalidInput`, since touching
    /// such a page kills the process. `Unsupported` where mapping is unsafe, as on a network file system: read then.
    fn map(&self, len: usize) -> io::Result<Box<dyn StorageMap>>;

    /// Whether every page of the range is in the page cache now; `None` where nobody can tell. Reads nothing.
    fn resident(&self, offset: u64, len: u64) -> io::Result<Option<bool>>;

    /// Whether [`Caching::Direct`] really bypasses the page cache on this file.
    fn direct(&self) -> bool;

    /// The descriptor, where there is one: what registers a file with the GPU's storage driver.
    fn raw_fd(&self) -> Option<std::os::fd::RawFd>;
}

/// A file's bytes mapped for reading. The file must not be truncated while it lives; the store never truncates a file
/// that it maps.
pub trait StorageMap: Send + Sync + fmt::Debug {
    /// The bytes. Touching one waits for the disk where it is not in memory.
    fn bytes(&self) -> &[u8];

    /// Whether touching a range waits for no disk: it is in memory, or was some seconds ago. Cheap enough to ask each time; `true`
    /// where nobody can tell.
    fn is_present(&self, range: Range<usize>) -> bool {
        let _ = range;
        true
    }

    /// Touches a range, so that it is in memory. Blocks as long as the disk takes.
    fn bring(&self, range: Range<usize>) {
        touch(self.bytes().get(range).unwrap_or_default());
    }
}

/// Reads one byte of each page that some mapped bytes lie in.
fn touch(bytes: &[u8]) {
    for byte in bytes.iter().step_by(DIRECT_ALIGN_BYTES as usize).chain(bytes.last()) {
        std::hint::black_box(*byte);
    }
}

/// Reads exactly `buf.len()` bytes, continuing short counts and interrupted calls; a file that ends before is
/// `UnexpectedEof`.
pub fn read_exact_at(
    file: &(impl StorageFile + ?Sized),
    mut buf: &mut [u8],
    mut offset: u64,
    caching: Caching,
) -> io::Result<()> {
    let mut caching = caching;
    while !buf.is_empty() {
        match file.read_at(buf, offset, caching) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => {
                buf = &mut buf[n..];
                offset += n as u64;
                // A short count can leave the rest off the alignment that a direct transfer needs.
                if caching == Caching::Direct && !is_direct_aligned(buf.as_ptr() as u64, offset, buf.len()) {
                    caching = Caching::Buffered;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// [`StorageFile::read_parts_at`], one part after another, for as long as that takes.
pub fn read_each_part_at(
    file: &(impl StorageFile + ?Sized),
    memory: &mut dyn Landing,
    parts: Parts,
    landed: &mut dyn FnMut(&[u8]),
) -> io::Result<Arrival> {
    for (index, part) in parts.of(memory.bytes())?.chunks_mut(parts.part_bytes).enumerate() {
        read_exact_at(file, part, parts.offset + (index * parts.part_bytes) as u64, Caching::Direct)?;
        landed(part);
    }
    Ok(Arrival::Landed)
}

/// Writes all of `buf`, continuing short counts and interrupted calls; a write that takes nothing is `WriteZero`.
pub fn write_all_at(file: &(impl StorageFile + ?Sized), buf: &[u8], offset: u64, caching: Caching) -> io::Result<()> {
    write_all_vectored_at(file, &mut [io::IoSlice::new(buf)], offset, caching)
}

/// [`write_all_at`] for several slices in a row, as one call where the system takes them whole.
pub fn write_all_vectored_at(
    file: &(impl StorageFile + ?Sized),
    mut bufs: &mut [io::IoSlice<'_>],
    mut offset: u64,
    caching: Caching,
) -> io::Result<()> {
    let mut caching = caching;
    io::IoSlice::advance_slices(&mut bufs, 0);
    while !bufs.is_empty() {
        // The kernel takes at most IOV_MAX (1024) slices a call.
        match file.write_vectored_at(&bufs[..bufs.len().min(1024)], offset, caching) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => {
                io::IoSlice::advance_slices(&mut bufs, n);
                offset += n as u64;
                if let Some(first) = bufs.first()
                    && !is_direct_aligned(first.as_ptr() as u64, offset, first.len())
                {
                    caching = Caching::Buffered;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Whether a transfer of `len` bytes between `address` and `offset` may go past the page cache.
pub fn is_direct_aligned(address: u64, offset: u64, len: usize) -> bool {
    (address | offset | len as u64).is_multiple_of(DIRECT_ALIGN_BYTES)
}
