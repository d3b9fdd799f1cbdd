//! What the tests of this layer and the one above share: files in memory, and files that get stuck.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::transport::OpenFile;
use crate::storage::sim::SimStorage;
use crate::storage::{
    Arrival, Caching, DirEntry, FileFacts, Landing, OpenMode, Parts, Storage, StorageFile, StorageLock, StorageMap,
    write_all_at,
};

/// The byte of a test file at an offset: different in every block.
pub(crate) fn byte(at: u64) -> u8 {
    (at.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8
}

/// The bytes of a test file in a range.
pub(crate) fn bytes(range: std::ops::Range<u64>) -> Vec<u8> {
    range.map(byte).collect()
}

/// A disk in memory with one file, `/f`, of test bytes.
pub(crate) fn disk(len: u64) -> SimStorage {
    let disk = SimStorage::new();
    disk.stop_recording();
    let file = disk.open(Path::new("/f"), OpenMode::CreateNew).unwrap();
    write_all_at(&*file, &bytes(0..len), 0, Caching::Buffered).unwrap();
    disk
}

/// `/f` of a disk.
pub(crate) fn open(disk: &dyn Storage) -> OpenFile {
    let path = Path::new("/f");
    OpenFile { file: disk.open(path, OpenMode::ReadWrite).unwrap(), path: path.into() }
}

/// A gate that whoever passes waits at while it is closed.
#[derive(Debug, Clone, Default)]
pub(crate) struct Gate(Arc<(Mutex<GateState>, Condvar)>);

#[derive(Debug, Default)]
struct GateState {
    closed: bool,
    waiting: usize,
}

impl Gate {
    pub(crate) fn close(&self) {
        self.0.0.lock().closed = true;
    }

    pub(crate) fn open(&self) {
        self.0.0.lock().closed = false;
        self.0.1.notify_all();
    }

    /// How many wait at it now.
    pub(crate) fn waiting(&self) -> usize {
        self.0.0.lock().waiting
    }

    /// Waits until so many wait at it.
    pub(crate) fn wait_for(&self, waiting: usize) {
        let (state, changed) = &*self.0;
        let mut state = state.lock();
        while state.waiting < waiting {
            changed.wait(&mut state);
        }
    }

    /// Passes it, or waits as long as that in vain.
    fn pass_within(&self, patience: Duration) -> bool {
        let (state, changed) = &*self.0;
        let mut state = state.lock();
        state.waiting += 1;
        changed.notify_all();
        let timed_out = changed.wait_while_for(&mut state, |state| state.closed, patience).timed_out();
        state.waiting -= 1;
        !timed_out
    }

    pub(crate) fn pass(&self) {
        self.pass_within(Duration::MAX);
    }
}

/// A disk whose reads and writes pass a gate.
#[derive(Debug, Clone)]
pub(crate) struct StuckStorage {
    pub(crate) disk: SimStorage,
    pub(crate) gate: Gate,
}

#[derive(Debug)]
struct StuckFile {
    file: Arc<dyn StorageFile>,
    gate: Gate,
}

impl StuckStorage {
    pub(crate) fn new(disk: SimStorage) -> Self {
        Self { disk, gate: Gate::default() }
    }
}

impl Storage for StuckStorage {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn StorageFile>> {
        Ok(Arc::new(StuckFile { file: self.disk.open(path, mode)?, gate: self.gate.clone() }))
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.disk.create_dir(path)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<DirEntry>> {
        self.disk.list(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.disk.rename(from, to)
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.disk.link(from, to)
    }

    fn reflink(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.disk.reflink(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.disk.remove(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.disk.remove_dir(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.disk.sync_dir(path)
    }

    fn lock(&self, path: &Path, holder: &str) -> io::Result<Box<dyn StorageLock>> {
        self.disk.lock(path, holder)
    }

    fn lock_holder(&self, path: &Path) -> io::Result<String> {
        self.disk.lock_holder(path)
    }

    fn share_byte(&self, path: &Path, byte: u64) -> io::Result<Box<dyn StorageLock>> {
        self.disk.share_byte(path, byte)
    }

    fn lowest_shared_byte(&self, path: &Path, through: u64) -> io::Result<Option<u64>> {
        self.disk.lowest_shared_byte(path, through)
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        self.disk.free_bytes(path)
    }
}

impl StorageFile for StuckFile {
    /// What is in the page cache comes from no disk.
    fn read_at(&self, buf: &mut [u8], offset: u64, caching: Caching) -> io::Result<usize> {
        if caching != Caching::Cached {
            self.gate.pass();
        }
        self.file.read_at(buf, offset, caching)
    }

    fn write_vectored_at(&self, bufs: &[io::IoSlice<'_>], offset: u64, caching: Caching) -> io::Result<usize> {
        self.gate.pass();
        self.file.write_vectored_at(bufs, offset, caching)
    }

    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        self.file.allocate(offset, len)
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.file.punch(offset, len)
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        self.file.truncate(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }

    fn facts(&self) -> io::Result<FileFacts> {
        self.file.facts()
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        self.file.next_data(offset)
    }

    fn map(&self, len: usize) -> io::Result<Box<dyn StorageMap>> {
        self.file.map(len)
    }

    fn resident(&self, offset: u64, len: u64) -> io::Result<Option<bool>> {
        self.file.resident(offset, len)
    }

    fn direct(&self) -> bool {
        self.file.direct()
    }

    fn read_parts_at(
        &self,
        memory: &mut dyn Landing,
        parts: Parts,
        patience: Option<Duration>,
        landed: &mut dyn FnMut(&[u8]),
    ) -> io::Result<Arrival> {
        match patience {
            None => self.gate.pass(),
            Some(patience) if self.gate.pass_within(patience) => {}
            Some(_) => {
                let (gate, left) = (self.gate.clone(), memory.leave());
                thread::spawn(move || {
                    gate.pass();
                    drop(left);
                });
                return Ok(Arrival::Overdue);
            }
        }
        self.file.read_parts_at(memory, parts, patience, landed)
    }

    fn raw_fd(&self) -> Option<std::os::fd::RawFd> {
        None
    }
}
