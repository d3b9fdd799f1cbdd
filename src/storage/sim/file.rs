//! The twin's open files, mappings and locks.

use std::fmt;
use std::io;
use std::os::fd::RawFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::super::{
    Arrival, Caching, FileFacts, Landing, Parts, StorageFile, StorageLock, StorageMap, is_direct_aligned,
    read_each_part_at,
};
use super::image::{FileId, errno};
use super::trace::OpKind;
use super::{Request, Shared};

/// An open file of the twin.
pub(super) struct SimFile {
    pub(super) disk: Arc<Shared>,
    pub(super) file: FileId,
    /// The path that it was opened by.
    pub(super) path: Arc<Path>,
    pub(super) writable: bool,
}

impl SimFile {
    fn request(&self, op: OpKind, offset: u64, len: u64) -> Request {
        Request { op, path: Arc::clone(&self.path), to: None, offset, len }
    }

    fn may_write(&self, refusal: i32) -> io::Result<()> {
        if self.writable { Ok(()) } else { Err(errno(refusal)) }
    }

    /// The real file system would go through the page cache, slower and unseen. No caller of ours means that.
    fn assert_aligned(&self, buf: &[u8], offset: u64, caching: Caching) {
        let (address, len) = (buf.as_ptr().addr() as u64, buf.len());
        assert!(
            caching != Caching::Direct || is_direct_aligned(address, offset, len),
            "a direct transfer that is not aligned: {} at {offset}, {len} bytes at address {address:#x}",
            self.path.display(),
        );
    }
}

impl StorageFile for SimFile {
    fn read_at(&self, buf: &mut [u8], offset: u64, caching: Caching) -> io::Result<usize> {
        self.assert_aligned(buf, offset, caching);
        let request = self.request(OpKind::Read, offset, buf.len() as u64);
        self.disk.call_moving(request, |live| Ok(live.read(self.file, buf, offset, caching)))
    }

    fn write_vectored_at(&self, bufs: &[io::IoSlice<'_>], offset: u64, caching: Caching) -> io::Result<usize> {
        for buf in bufs {
            self.assert_aligned(buf, offset, caching);
        }
        let len: usize = bufs.iter().map(|buf| buf.len()).sum();
        let request = self.request(OpKind::Write, offset, len as u64);
        self.disk.call_moving(request, |live| {
            self.may_write(libc::EBADF)?;
            live.write(self.file, bufs, offset, caching)
        })
    }

    /// Nothing takes it long, where it has something to wait for: as the real one, past the page cache.
    fn read_parts_at(
        &self,
        memory: &mut dyn Landing,
        parts: Parts,
        patience: Option<Duration>,
        landed: &mut dyn FnMut(&[u8]),
    ) -> io::Result<Arrival> {
        if patience.is_some() && !self.direct() {
            return Ok(Arrival::WouldWait);
        }
        read_each_part_at(self, memory, parts, landed)
    }

    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        self.disk.call(self.request(OpKind::Allocate, offset, len), |live| {
            self.may_write(libc::EBADF)?;
            live.allocate(self.file, offset, len)
        })
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.disk.call(self.request(OpKind::Punch, offset, len), |live| {
            self.may_write(libc::EBADF)?;
            live.punch(self.file, offset, len)
        })
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        self.disk.call(self.request(OpKind::Truncate, len, 0), |live| {
            self.may_write(libc::EINVAL)?;
            live.truncate(self.file, len)
        })
    }

    fn sync(&self) -> io::Result<()> {
        self.disk.call(self.request(OpKind::Sync, 0, 0), |live| live.sync(self.file))
    }

    fn facts(&self) -> io::Result<FileFacts> {
        self.disk.call(self.request(OpKind::Facts, 0, 0), |live| Ok(live.facts(self.file)))
    }

    /// Exact, page by page: space that was only allocated is no data.
    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        let request = self.request(OpKind::NextData, offset, 0);
        self.disk.call(request, |live| Ok(live.image.content(self.file).next_data(offset)))
    }

    /// The bytes as they are now. A change of them while the mapping lives is a mistake of ours, and panics there.
    fn map(&self, len: usize) -> io::Result<Box<dyn StorageMap>> {
        let bytes = self.disk.call(self.request(OpKind::Map, 0, len as u64), |live| live.map(self.file, len))?;
        Ok(Box::new(SimMap { disk: Arc::clone(&self.disk), file: self.file, bytes }))
    }

    fn resident(&self, offset: u64, len: u64) -> io::Result<Option<bool>> {
        self.disk.call(self.request(OpKind::Resident, offset, len), |live| Ok(live.abilities.resident))
    }

    fn direct(&self) -> bool {
        self.disk.state.lock().live.abilities.direct
    }

    fn raw_fd(&self) -> Option<RawFd> {
        None
    }
}

impl Drop for SimFile {
    fn drop(&mut self) {
        self.disk.state.lock().live.release(self.file);
    }
}

impl fmt::Debug for SimFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SimFile({})", self.path.display())
    }
}

struct SimMap {
    disk: Arc<Shared>,
    file: FileId,
    bytes: Vec<u8>,
}

impl StorageMap for SimMap {
    fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for SimMap {
    fn drop(&mut self) {
        self.disk.state.lock().live.unmap(self.file);
    }
}

impl fmt::Debug for SimMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SimMap({} bytes)", self.bytes.len())
    }
}

pub(super) struct SimLock {
    pub(super) disk: Arc<Shared>,
    pub(super) file: FileId,
}

impl StorageLock for SimLock {}

impl Drop for SimLock {
    fn drop(&mut self) {
        self.disk.state.lock().live.unlock(self.file);
    }
}

impl fmt::Debug for SimLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SimLock({})", self.file.0)
    }
}

pub(super) struct SimSharedByte {
    pub(super) disk: Arc<Shared>,
    pub(super) file: FileId,
    pub(super) byte: u64,
}

impl StorageLock for SimSharedByte {}

impl Drop for SimSharedByte {
    fn drop(&mut self) {
        self.disk.state.lock().live.unshare_byte(self.file, self.byte);
    }
}

impl fmt::Debug for SimSharedByte {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SimSharedByte({} of {})", self.byte, self.file.0)
    }
}
