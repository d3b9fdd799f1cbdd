//! Regions of files mapped into the device's memory: read when they are mapped, written back when they are flushed.
//!
//! The bookkeeping is [`RegionMap`]'s; here its plans are carried out.
//!
//! # Invariants
//! - A dirty region is in its file, synced, before it is evicted; where that fails it stays mapped and dirty.
//! - A region that somebody holds is never evicted.
//! - No lock that a lookup needs is held while a byte is moved.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use parking_lot::{Mutex, RwLock};

use super::config::{align_down, align_up};
use super::engine::Engine;
use crate::device::DeviceBuffer;
use crate::error::{Error, Result};
use crate::io::pipeline::Memory;
use crate::io::transport::{OpenFile, Piece, Transfer};
use crate::region::{FileId, RegionId, RegionMap, RegionPlan, RegionRefusal};

/// How often mapping plans anew because others changed the regions meanwhile.
const ATTEMPTS: usize = 16;

/// What the mapped regions are and did. The counters only rise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct MappingStats {
    /// Regions that are mapped.
    pub regions: usize,
    /// Regions that were changed since they were last flushed.
    pub dirty: usize,
    /// The bytes of all regions.
    pub mapped_bytes: u64,
    /// The bytes of those that somebody holds.
    pub pinned_bytes: u64,
    /// Requests that a region served.
    pub hits: u64,
    /// Requests for which a region was read.
    pub misses: u64,
    /// Regions that were evicted.
    pub evictions: u64,
    /// Bytes that were written back.
    pub flushed_bytes: u64,
}

/// The mapped regions of a context. They take no more of the device's memory together than the configuration's
/// [`total_gpu_memory`](super::GdsConfig::total_gpu_memory); those unused for longest go first.
///
/// A file is known by its path as it is given: two names of one file are two files.
pub struct MemoryMapManager(Arc<Inner>);

struct Inner {
    engine: Arc<Engine>,
    state: Mutex<State>,
    /// Held while regions are read or flushed: one at a time, so that none is read twice.
    moving: Mutex<()>,
}

struct State {
    regions: RegionMap<Mapped>,
    files: HashMap<PathBuf, FileId>,
    stats: MappingStats,
}

/// What a region is made of.
#[derive(Debug, Clone)]
struct Mapped {
    file: OpenFile,
    writable: bool,
    memory: Arc<RwLock<DeviceBuffer>>,
}

/// A range of a file in the device's memory. While it lives the region stays mapped; clones share it.
///
/// Changes reach the file when the region is flushed or evicted. [`write`](Self::write) notes them by itself; who changes
/// the memory through its address says so with [`mark_dirty`](Self::mark_dirty), once the change is done.
pub struct MappedRegion {
    manager: Arc<Inner>,
    id: RegionId,
    mapped: Mapped,
    /// What was asked for, in the file.
    range: Range<u64>,
    /// Where that begins in the region.
    lead: u64,
}

impl MemoryMapManager {
    pub(super) fn new(engine: Arc<Engine>) -> Self {
        let regions = RegionMap::new(engine.config.total_gpu_memory());
        let state = State { regions, files: HashMap::new(), stats: MappingStats::default() };
        Self(Arc::new(Inner { engine, state: Mutex::new(state), moving: Mutex::new(()) }))
    }

    /// Maps a range of a file: a region that has all of it serves it, else the range, rounded outwards to `alignment`, is
    /// read. Regions that it overlaps are flushed and evicted first, then as many as it takes to make room.
    ///
    /// # Errors
    /// [`Error::FileTooShort`] where the range reaches past the end of the file, [`Error::InvalidOption`] where it has no
    /// bytes; [`Error::RegionInUse`] where it overlaps a
    /// region that is held; [`Error::RegionMemory`] where held regions leave too little; those of reading, and of flushing
    /// what was to be evicted.
    pub fn map_region(&self, path: impl AsRef<Path>, range: Range<u64>) -> Result<MappedRegion> {
        self.0.map(path.as_ref(), range)
    }

    /// Writes every dirty region of a file back and syncs the file. Answers the bytes written.
    ///
    /// # Errors
    /// The first of writing or syncing; regions that are not surely on disk stay dirty.
    pub fn flush(&self, path: impl AsRef<Path>) -> Result<u64> {
        self.0.flush_where(Some(path.as_ref()))
    }

    /// [`flush`](Self::flush) for every file.
    ///
    /// # Errors
    /// As [`flush`](Self::flush).
    pub fn flush_all(&self) -> Result<u64> {
        self.0.flush_where(None)
    }

    /// Flushes everything, then unmaps every region that nobody holds. Answers how many are still mapped.
    ///
    /// # Errors
    /// As [`flush`](Self::flush); nothing is unmapped then.
    pub fn unmap_all(&self) -> Result<usize> {
        self.flush_all()?;
        let mut state = self.0.state.lock();
        let ids: Vec<RegionId> = state.regions.iter().map(|(id, _)| id).collect();
        let evicted: Vec<Mapped> = ids.into_iter().filter_map(|id| state.regions.evict(id).ok()).collect();
        state.stats.evictions += evicted.len() as u64;
        let left = state.regions.len();
        drop(state);
        // Memory of a GPU is freed outside the lock: the driver may take its time.
        drop(evicted);
        Ok(left)
    }

    /// What is mapped and what was done.
    pub fn stats(&self) -> MappingStats {
        let state = self.0.state.lock();
        MappingStats {
            regions: state.regions.len(),
            dirty: state.regions.iter().filter(|(_, region)| region.is_dirty()).count(),
            mapped_bytes: state.regions.mapped_bytes(),
            pinned_bytes: state.regions.pinned_bytes(),
            ..state.stats
        }
    }
}

impl Inner {
    fn map(self: &Arc<Self>, path: &Path, range: Range<u64>) -> Result<MappedRegion> {
        let engine = &self.engine;
        let (file, writable) = engine.files.to_change(path)?;
        let len_bytes = engine.len_bytes(&file)?;
        if range.start >= range.end {
            return Err(Error::InvalidOption { option: "range", why: format!("{range:?} has no bytes to map") });
        }
        if range.end > len_bytes {
            let path = path.to_path_buf();
            return Err(Error::FileTooShort { path, needed_bytes: range.end, len_bytes });
        }
        let alignment = engine.config.alignment;
        let start = align_down(range.start, alignment).expect("the alignment was validated");
        let end = align_up(range.end, alignment).map_or(len_bytes, |end| end.min(len_bytes));
        let whole = start..end;
        let file_id = self.state.lock().file_id(path);
        if let Some(region) = self.hit(file_id, &range) {
            return Ok(region);
        }
        let _moving = self.moving.lock();
        for _ in 0..ATTEMPTS {
            if let Some(region) = self.hit(file_id, &range) {
                return Ok(region);
            }
            let plan = self.state.lock().regions.plan(file_id, &whole);
            let evict = match plan {
                Ok(RegionPlan::Hit(_)) => continue,
                Ok(RegionPlan::Admit { evict }) => evict,
                Err(RegionRefusal::InUse(region)) => return Err(in_use(path, &range, region)),
                Err(RegionRefusal::Memory { needed, available }) => {
                    return Err(Error::RegionMemory { needed, available });
                }
            };
            self.flush_regions(&evict)?;
            // Between the flush and here somebody may have taken or changed one: then all is planned anew.
            if !self.evict(&evict) {
                continue;
            }
            let len = whole.end - whole.start;
            let mut buffer = engine.device.allocate_to_be_filled(len)?;
            let piece = Piece { file_offset: whole.start, buffer_offset: 0, len_bytes: len };
            engine.read(Transfer::new(file.clone(), piece).with_lanes(engine.lanes), &mut buffer)?;
            let mapped = Mapped { file, writable, memory: Arc::new(RwLock::new(buffer)) };
            let mut state = self.state.lock();
            state.stats.misses += 1;
            let id = state.regions.admit(file_id, whole.clone(), mapped.clone(), Instant::now());
            state.regions.pin(id);
            let lead = range.start - whole.start;
            return Ok(MappedRegion { manager: Arc::clone(self), id, mapped, range, lead });
        }
        let overlapped = self.state.lock().regions.overlapping(file_id, &whole);
        let region = overlapped.first().and_then(|&id| self.state.lock().regions.get(id).map(|region| region.range()));
        Err(in_use(path, &range, region.unwrap_or(whole)))
    }

    /// The region that has all of a range, if there is one.
    fn hit(self: &Arc<Self>, file: FileId, range: &Range<u64>) -> Option<MappedRegion> {
        let state = &mut *self.state.lock();
        let id = state.regions.lookup(file, range)?;
        state.regions.pin(id);
        state.regions.touch(id, Instant::now());
        state.stats.hits += 1;
        let region = state.regions.get(id)?;
        let (mapped, lead) = (region.payload().clone(), range.start - region.range().start);
        Some(MappedRegion { manager: Arc::clone(self), id, mapped, range: range.clone(), lead })
    }

    /// Evicts all of them, or as many as came before one that cannot go.
    fn evict(&self, ids: &[RegionId]) -> bool {
        let mut state = self.state.lock();
        let mut evicted = Vec::with_capacity(ids.len());
        let all = ids.iter().all(|&id| state.regions.evict(id).map(|mapped| evicted.push(mapped)).is_ok());
        state.stats.evictions += evicted.len() as u64;
        drop(state);
        all
    }

    fn flush_where(&self, path: Option<&Path>) -> Result<u64> {
        let _moving = self.moving.lock();
        let ids: Vec<RegionId> = {
            let state = self.state.lock();
            let of_path = |mapped: &Mapped| path.is_none_or(|path| &*mapped.file.path == path);
            state.regions.iter().filter(|(_, region)| of_path(region.payload())).map(|(id, _)| id).collect()
        };
        self.flush_regions(&ids)
    }

    /// Writes the dirty ones of these regions back, then syncs each of their files once. The caller holds `moving`.
    fn flush_regions(&self, ids: &[RegionId]) -> Result<u64> {
        let mut written: Vec<(RegionId, u64, OpenFile)> = Vec::new();
        let mut bytes = 0;
        for &id in ids {
            let dirty = {
                let state = self.state.lock();
                let region = state.regions.get(id).filter(|region| region.is_dirty());
                // Changes from here on leave it dirty, whether this flush brings them or not.
                region.map(|region| (region.payload().clone(), region.range(), region.changes()))
            };
            let Some((mapped, range, changes)) = dirty else { continue };
            let piece = Piece { file_offset: range.start, buffer_offset: 0, len_bytes: range.end - range.start };
            let transfer = Transfer::new(mapped.file.clone(), piece).with_lanes(self.engine.lanes);
            bytes += self.engine.write(transfer, Memory::Locked(mapped.memory))?;
            written.push((id, changes, mapped.file));
        }
        let mut synced: Vec<&Path> = Vec::new();
        for (_, _, file) in &written {
            if !synced.contains(&&*file.path) {
                self.engine.files.sync(file)?;
                synced.push(&file.path);
            }
        }
        let mut state = self.state.lock();
        for (id, changes, _) in &written {
            state.regions.cleaned(*id, *changes);
        }
        state.stats.flushed_bytes += bytes;
        Ok(bytes)
    }
}

impl State {
    fn file_id(&mut self, path: &Path) -> FileId {
        if let Some(&id) = self.files.get(path) {
            return id;
        }
        let id = FileId(self.files.len() as u64);
        self.files.insert(path.to_path_buf(), id);
        id
    }
}

fn in_use(path: &Path, range: &Range<u64>, region: Range<u64>) -> Error {
    Error::RegionInUse {
        path: path.to_path_buf(),
        start: range.start,
        end: range.end,
        region_start: region.start,
        region_end: region.end,
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let dirty = self.state.get_mut().regions.iter().filter(|(_, region)| region.is_dirty()).count();
        if dirty > 0 {
            tracing::warn!(dirty, "mapped regions were dropped without a flush; their changes are lost");
        }
    }
}

impl MappedRegion {
    /// Which bytes of the file it shows: those that were asked for.
    pub fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    /// How many they are.
    pub fn len_bytes(&self) -> u64 {
        self.range.end - self.range.start
    }

    /// The address of the first of them in the GPU's memory; `None` on the host. It stays while the region is held.
    pub fn device_ptr(&self) -> Option<u64> {
        self.mapped.memory.read().device_ptr().map(|address| address + self.lead)
    }

    /// Copies bytes from `offset` on, counted from the first byte asked for, to the host.
    ///
    /// # Errors
    /// [`Error::Device`] where the range reaches past what was asked for, or the driver failed.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let at = self.check("read a mapped region", offset, bytes.len())?;
        self.mapped.memory.read().copy_to_host(at, bytes)
    }

    /// Copies host bytes to `offset`, counted from the first byte asked for. They reach the file with the next flush. Waits
    /// while the region is being flushed.
    ///
    /// # Errors
    /// As [`read`](Self::read), [`Error::ReadOnly`] where the file cannot be written, and [`Error::Timeout`] where a flush
    /// holds the region for longer than a deadline.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let at = self.check("write a mapped region", offset, bytes.len())?;
        self.check_writable()?;
        let mut memory = match self.manager.engine.deadline {
            None => self.mapped.memory.write(),
            Some(deadline) => self.mapped.memory.try_write_for(deadline).ok_or_else(|| Error::Timeout {
                operation: "write a mapped region of",
                path: self.mapped.file.path.to_path_buf(),
                after_ms: u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX),
            })?,
        };
        let copied = memory.copy_from_host(at, bytes);
        drop(memory);
        // After the bytes: a flush that began before them does not count as theirs. Also where it failed half-way.
        self.manager.state.lock().regions.mark_dirty(self.id);
        copied
    }

    /// Says that the memory was changed through its address; call it when the change is done.
    ///
    /// # Errors
    /// [`Error::ReadOnly`] where the file cannot be written: the change will never reach it.
    pub fn mark_dirty(&self) -> Result<()> {
        self.check_writable()?;
        self.manager.state.lock().regions.mark_dirty(self.id);
        Ok(())
    }

    /// Makes the region the one used last, so that it is evicted late once nobody holds it.
    pub fn touch(&self) {
        self.manager.state.lock().regions.touch(self.id, Instant::now());
    }

    fn check_writable(&self) -> Result<()> {
        if self.mapped.writable {
            return Ok(());
        }
        Err(Error::ReadOnly { path: self.mapped.file.path.to_path_buf() })
    }

    /// Where in the region's memory `len` bytes at `offset` of what was asked for lie.
    fn check(&self, action: &'static str, offset: u64, len: usize) -> Result<u64> {
        if offset.checked_add(len as u64).is_some_and(|end| end <= self.len_bytes()) {
            return Ok(self.lead + offset);
        }
        let why = format!("{len} bytes at offset {offset} of {}", self.len_bytes());
        Err(Error::Device { device: self.manager.engine.device.to_string(), action, why })
    }
}

impl Clone for MappedRegion {
    fn clone(&self) -> Self {
        let Self { manager, id, mapped, range, lead } = self;
        manager.state.lock().regions.pin(*id);
        Self { manager: Arc::clone(manager), id: *id, mapped: mapped.clone(), range: range.clone(), lead: *lead }
    }
}

impl Drop for MappedRegion {
    fn drop(&mut self) {
        self.manager.state.lock().regions.unpin(self.id);
    }
}

impl fmt::Debug for MappedRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MappedRegion({:?} of {})", self.range, self.mapped.file.path.display())
    }
}

impl fmt::Debug for MemoryMapManager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MemoryMapManager({:?})", self.stats())
    }
}
