//! One open file: a descriptor through the page cache, and a second one past it from the first direct transfer on.
//!
//! # Invariants
//! - Both descriptors are of the same inode, whatever has been renamed or removed since.
//! - Syncs go through the buffered descriptor: one descriptor learns of every failed write-back.
//! - Direct transfers are tried until the file system refuses one (`EINVAL`), and never again after that.
//! - No call uses a descriptor's cursor, so calls from several threads do not meet.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::super::{
    Arrival, Caching, FileFacts, Landing, Part, Parts, StorageFile, StorageMap, is_direct_aligned, read_each_part_at,
    read_exact_at, write_all_at,
};
use super::map::FileMap;
use super::{aio, sys};

/// `mincore` is asked about this many bytes at a time, which bounds its answer (one byte a page) to 16 KiB.
const MINCORE_WINDOW_BYTES: u64 = 64 << 20;

/// What `st_blocks` counts, on every file system.
const STAT_BLOCK_BYTES: u64 = 512;

/// File systems on which a mapped page can vanish with a server, or differ from what another client wrote: a touch of it
/// then kills the process. Numbers from the kernel's `linux/magic.h` and the file systems' own sources.
const MAGIC_UNSAFE_TO_MAP: [u32; 12] = [
    0x0000_6969, // NFS
    0x0000_517B, // SMB
    0xFF53_4D42, // CIFS
    0xFE53_4D42, // SMB2
    0x6573_5546, // FUSE
    0x0102_1997, // 9p
    0x0BD0_0BD0, // Lustre
    0x00C3_6400, // Ceph
    0x5346_414F, // AFS
    0x4750_4653, // GPFS
    0x1983_0326, // BeeGFS
    0x7375_7245, // Coda
];

/// An open file of the real file system.
#[derive(Debug)]
pub(super) struct FileHandle {
    buffered: File,
    /// The second descriptor, once it was wanted; `None` in it where the file system has no direct transfers.
    direct: OnceLock<Option<File>>,
    /// Set when a direct transfer was refused although the descriptor opened.
    direct_refused: AtomicBool,
    /// Set when the file system had no reads that wait for nothing.
    cached_refused: AtomicBool,
    /// Where the file was opened. It may bear another name by now.
    path: PathBuf,
    writable: bool,
}

impl FileHandle {
    pub(super) fn new(buffered: File, path: &Path, writable: bool) -> Self {
        let (direct, direct_refused, cached_refused) = Default::default();
        Self { buffered, direct, direct_refused, cached_refused, path: path.to_path_buf(), writable }
    }

    /// The descriptor for direct transfers, opened by the first call.
    fn direct_file(&self) -> Option<&File> {
        if self.direct_refused.load(Ordering::Relaxed) {
            return None;
        }
        let open = || match self.open_direct() {
            Ok(file) => Some(file),
            Err(error) => {
                self.say_direct_refused(&error);
                None
            }
        };
        self.direct.get_or_init(open).as_ref()
    }

    /// Opens the same inode again. Through `/proc` it is found whatever its name is now; where that is not mounted, by
    /// the path, if the same inode still bears it.
    fn open_direct(&self) -> io::Result<File> {
        let mut options = OpenOptions::new();
        options.read(true).write(self.writable).custom_flags(libc::O_DIRECT);
        match options.open(format!("/proc/self/fd/{}", self.buffered.as_raw_fd())) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            answer => return answer,
        }
        let file = options.open(&self.path)?;
        let (ours, theirs) = (self.buffered.metadata()?, file.metadata()?);
        if (ours.dev(), ours.ino()) != (theirs.dev(), theirs.ino()) {
            return Err(io::Error::new(io::ErrorKind::NotFound, "the file bears another name by now"));
        }
        Ok(file)
    }

    fn say_direct_refused(&self, error: &io::Error) {
        let path = self.path.display();
        tracing::info!(%path, %error, "no direct transfers on this file; it is read and written through the page cache");
    }

    /// Tries a transfer past the page cache; `None` when it has to go through it.
    fn try_direct(&self, transfer: impl FnOnce(&File) -> io::Result<usize>) -> Option<io::Result<usize>> {
        match transfer(self.direct_file()?) {
            // Some file systems take the flag and refuse the transfer, or want a larger alignment than ours.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                if !self.direct_refused.swap(true, Ordering::Relaxed) {
                    self.say_direct_refused(&error);
                }
                None
            }
            answer => Some(answer),
        }
    }

    /// Tries a read that waits for nothing; `None` where the file system has no such thing.
    fn try_cached(&self, buf: &mut [u8], offset: u64) -> Option<io::Result<usize>> {
        if self.cached_refused.load(Ordering::Relaxed) {
            return None;
        }
        match sys::read_cached_at(&self.buffered, buf, offset) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                self.cached_refused.store(true, Ordering::Relaxed);
                None
            }
            answer => Some(answer),
        }
    }

    /// Whether the kernel tells this process what of the file is cached. Of a file that it could not write, `mincore`
    /// says that all of it is, so as to give nothing away.
    fn may_ask_for_residency(&self) -> io::Result<bool> {
        Ok(self.writable || self.buffered.metadata()?.uid() == sys::effective_user())
    }
}

impl StorageFile for FileHandle {
    fn read_at(&self, buf: &mut [u8], offset: u64, caching: Caching) -> io::Result<usize> {
        if caching == Caching::Direct
            && is_direct_aligned(buf.as_ptr().addr() as u64, offset, buf.len())
            && let Some(answer) = self.try_direct(|file| file.read_at(buf, offset))
        {
            return answer;
        }
        if caching == Caching::Cached
            && let Some(answer) = self.try_cached(buf, offset)
        {
            return answer;
        }
        self.buffered.read_at(buf, offset)
    }

    fn write_vectored_at(&self, bufs: &[io::IoSlice<'_>], offset: u64, caching: Caching) -> io::Result<usize> {
        if caching == Caching::Direct
            && bufs.iter().all(|buf| is_direct_aligned(buf.as_ptr().addr() as u64, offset, buf.len()))
            && let Some(answer) = self.try_direct(|file| sys::write_vectored_at(file, bufs, offset))
        {
            return answer;
        }
        sys::write_vectored_at(&self.buffered, bufs, offset)
    }

    fn read_parts_at(
        &self,
        memory: &mut dyn Landing,
        parts: Parts,
        patience: Option<Duration>,
        landed: &mut dyn FnMut(&[u8]),
    ) -> io::Result<Arrival> {
        match self.direct_file() {
            Some(file) => {
                let plainly = |buf: &mut [u8], offset| read_exact_at(self, buf, offset, Caching::Direct);
                aio::read_parts(file, memory, parts, patience, landed, plainly)
            }
            None if patience.is_some() => Ok(Arrival::WouldWait),
            None => read_each_part_at(self, memory, parts, landed),
        }
    }

    fn write_parts_at(&self, parts: &mut dyn Iterator<Item = Part>) -> io::Result<()> {
        let plainly = |bytes: &[u8], offset| write_all_at(self, bytes, offset, Caching::Direct);
        aio::write_parts(self.direct_file(), parts, plainly)
    }

    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        sys::allocate(&self.buffered, offset, len)
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        sys::punch(&self.buffered, offset, len)
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        self.buffered.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        sys::sync_data(&self.buffered)
    }

    fn facts(&self) -> io::Result<FileFacts> {
        let facts = self.buffered.metadata()?;
        let allocated_bytes = facts.blocks() * STAT_BLOCK_BYTES;
        Ok(FileFacts { len_bytes: facts.len(), allocated_bytes, links: facts.nlink() })
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        match sys::seek_data(&self.buffered, offset) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP | libc::ENOSYS)) => {
                Ok((offset < self.buffered.metadata()?.len()).then_some(offset))
            }
            answer => answer,
        }
    }

    fn map(&self, len: usize) -> io::Result<Box<dyn StorageMap>> {
        if len as u64 > self.buffered.metadata()?.len() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a mapping longer than its file"));
        }
        if MAGIC_UNSAFE_TO_MAP.contains(&sys::filesystem_magic(&self.buffered)?) {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "mapping is unsafe on this file system"));
        }
        // The system maps no empty range.
        let map = if len == 0 { None } else { Some(sys::map(&self.buffered, len)?) };
        Ok(Box::new(FileMap::new(map)))
    }

    fn resident(&self, offset: u64, len: u64) -> io::Result<Option<bool>> {
        // What lies past the end takes no reading.
        let end = offset.saturating_add(len).min(self.buffered.metadata()?.len());
        if offset >= end {
            return Ok(Some(true));
        }
        let page = sys::page_bytes();
        let start = offset - offset % page;
        if let Some(cached) = sys::cached_pages(&self.buffered, start, end - start)? {
            return Ok(Some(cached >= (end - start).div_ceil(page)));
        }
        if !self.may_ask_for_residency()? {
            return Ok(None);
        }
        let mut at = start;
        while at < end {
            let len = (end - at).min(MINCORE_WINDOW_BYTES);
            // A window of 64 MiB fits `usize` on every machine.
            match sys::all_pages_in_core(&self.buffered, at, len as usize) {
                Ok(true) => at += len,
                Ok(false) => return Ok(Some(false)),
                // A file that cannot be mapped: nobody can tell.
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
        Ok(Some(true))
    }

    fn direct(&self) -> bool {
        self.direct_file().is_some()
    }

    /// The descriptor past the page cache where there is one, since that is what a GPU's storage driver transfers
    /// through; else the buffered one. Valid as long as this file is open.
    fn raw_fd(&self) -> Option<RawFd> {
        Some(self.direct_file().unwrap_or(&self.buffered).as_raw_fd())
    }
}
