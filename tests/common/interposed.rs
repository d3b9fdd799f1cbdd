//! A disk whose calls a test can hold up, and fail, one by one: it decides in which order threads come to them.

use std::any::Any;
use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use alight::storage::sim::{OpKind, SimStorage};
use alight::storage::{
    Arrival, Caching, DirEntry, FileFacts, Landing, OpenMode, Parts, Storage, StorageFile, StorageLock, StorageMap,
};
use parking_lot::Mutex;

/// Told of every call before it is made; may block, and may answer in its place.
pub type Hook = dyn Fn(OpKind, &Path) -> io::Result<()> + Send + Sync;

/// A [`SimStorage`] with a hook before its calls.
#[derive(Clone)]
pub struct Interposed {
    sim: SimStorage,
    hook: Arc<Hook>,
}

impl Interposed {
    pub fn new(sim: &SimStorage, hook: impl Fn(OpKind, &Path) -> io::Result<()> + Send + Sync + 'static) -> Self {
        Self { sim: sim.clone(), hook: Arc::new(hook) }
    }
}

impl fmt::Debug for Interposed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Interposed")
    }
}

impl Storage for Interposed {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn StorageFile>> {
        (self.hook)(OpKind::Open, path)?;
        let file = self.sim.open(path, mode)?;
        Ok(Arc::new(InterposedFile { file, path: path.into(), hook: Arc::clone(&self.hook) }))
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        (self.hook)(OpKind::CreateDir, path)?;
        self.sim.create_dir(path)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<DirEntry>> {
        (self.hook)(OpKind::List, path)?;
        self.sim.list(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        (self.hook)(OpKind::Rename, to)?;
        self.sim.rename(from, to)
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        (self.hook)(OpKind::Link, to)?;
        self.sim.link(from, to)
    }

    fn reflink(&self, from: &Path, to: &Path) -> io::Result<()> {
        (self.hook)(OpKind::Reflink, to)?;
        self.sim.reflink(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        (self.hook)(OpKind::Remove, path)?;
        self.sim.remove(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        (self.hook)(OpKind::RemoveDir, path)?;
        self.sim.remove_dir(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        (self.hook)(OpKind::SyncDir, path)?;
        self.sim.sync_dir(path)
    }

    fn lock(&self, path: &Path, holder: &str) -> io::Result<Box<dyn StorageLock>> {
        (self.hook)(OpKind::Lock, path)?;
        self.sim.lock(path, holder)
    }

    fn lock_holder(&self, path: &Path) -> io::Result<String> {
        (self.hook)(OpKind::LockHolder, path)?;
        self.sim.lock_holder(path)
    }

    fn share_byte(&self, path: &Path, byte: u64) -> io::Result<Box<dyn StorageLock>> {
        (self.hook)(OpKind::ShareByte, path)?;
        self.sim.share_byte(path, byte)
    }

    fn lowest_shared_byte(&self, path: &Path, through: u64) -> io::Result<Option<u64>> {
        (self.hook)(OpKind::LowestSharedByte, path)?;
        self.sim.lowest_shared_byte(path, through)
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        (self.hook)(OpKind::FreeBytes, path)?;
        self.sim.free_bytes(path)
    }
}

struct InterposedFile {
    file: Arc<dyn StorageFile>,
    path: Box<Path>,
    hook: Arc<Hook>,
}

impl InterposedFile {
    fn before(&self, op: OpKind) -> io::Result<&dyn StorageFile> {
        (self.hook)(op, &self.path)?;
        Ok(&*self.file)
    }
}

impl fmt::Debug for InterposedFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "InterposedFile({})", self.path.display())
    }
}

impl StorageFile for InterposedFile {
    fn read_at(&self, buf: &mut [u8], offset: u64, caching: Caching) -> io::Result<usize> {
        self.before(OpKind::Read)?.read_at(buf, offset, caching)
    }

    fn write_vectored_at(&self, bufs: &[io::IoSlice<'_>], offset: u64, caching: Caching) -> io::Result<usize> {
        self.before(OpKind::Write)?.write_vectored_at(bufs, offset, caching)
    }

    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        self.before(OpKind::Allocate)?.allocate(offset, len)
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.before(OpKind::Punch)?.punch(offset, len)
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        self.before(OpKind::Truncate)?.truncate(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.before(OpKind::Sync)?.sync()
    }

    fn facts(&self) -> io::Result<FileFacts> {
        self.before(OpKind::Facts)?.facts()
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        self.before(OpKind::NextData)?.next_data(offset)
    }

    fn map(&self, len: usize) -> io::Result<Box<dyn StorageMap>> {
        let map = self.before(OpKind::Map)?.map(len)?;
        let (path, hook) = (self.path.clone(), Arc::clone(&self.hook));
        Ok(Box::new(InterposedMap { map, path, hook, brought: Mutex::default() }))
    }

    fn resident(&self, offset: u64, len: u64) -> io::Result<Option<bool>> {
        self.before(OpKind::Resident)?.resident(offset, len)
    }

    fn direct(&self) -> bool {
        self.file.direct()
    }

    /// The hook is called by a thread of its own where it may take too long.
    fn read_parts_at(
        &self,
        memory: &mut dyn Landing,
        parts: Parts,
        patience: Option<Duration>,
        landed: &mut dyn FnMut(&[u8]),
    ) -> io::Result<Arrival> {
        match patience {
            None => (self.hook)(OpKind::Read, &self.path)?,
            Some(patience) => {
                let (hook, path) = (Arc::clone(&self.hook), self.path.clone());
                let (passed, pass) = mpsc::channel();
                let (leave, left) = mpsc::channel::<Box<dyn Any + Send>>();
                thread::spawn(move || {
                    let _ = passed.send(hook(OpKind::Read, &path));
                    // What is left, if anything is, is freed once the call is over.
                    left.into_iter().for_each(drop);
                });
                match pass.recv_timeout(patience) {
                    Ok(outcome) => outcome?,
                    Err(_) => {
                        let _ = leave.send(memory.leave());
                        return Ok(Arrival::Overdue);
                    }
                }
            }
        }
        self.file.read_parts_at(memory, parts, patience, landed)
    }

    fn raw_fd(&self) -> Option<std::os::fd::RawFd> {
        self.file.raw_fd()
    }
}

/// A mapping of which a byte is in memory once it was brought there, for which the hook is called, as for a read.
struct InterposedMap {
    map: Box<dyn StorageMap>,
    path: Box<Path>,
    hook: Arc<Hook>,
    brought: Mutex<BTreeSet<usize>>,
}

/// What is brought at once.
const BROUGHT_BYTES: usize = 4096;

impl fmt::Debug for InterposedMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "InterposedMap({})", self.path.display())
    }
}

impl StorageMap for InterposedMap {
    fn bytes(&self) -> &[u8] {
        self.map.bytes()
    }

    fn is_present(&self, range: Range<usize>) -> bool {
        let brought = self.brought.lock();
        (range.start / BROUGHT_BYTES..range.end.min(self.bytes().len()).div_ceil(BROUGHT_BYTES))
            .all(|page| brought.contains(&page))
    }

    /// A failure of the hook is told to nobody: a disk that fails kills who touches what is mapped.
    fn bring(&self, range: Range<usize>) {
        let _ = (self.hook)(OpKind::Read, &self.path);
        self.brought.lock().extend(range.start / BROUGHT_BYTES..range.end.div_ceil(BROUGHT_BYTES));
    }
}
