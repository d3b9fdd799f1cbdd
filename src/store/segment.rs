//! The segments of one store: which exist, how much lives in each, and their files, opened when first read.
//!
//! # Invariants
//! - A segment is listed here before a frame is written into it, and its header and its name are durable before that
//!   too, so a frame never lies in a file that a crash could lose.
//! - `Accounting` describes exactly the commits that are published; it changes under the publisher's lock alone.
//! - At most [`OPEN_SEGMENTS_MAX`] files stay open for reading; a transfer in flight keeps its own.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use alight_format::{Salt, SegmentHeader, SegmentId, SegmentRecord, Seq, StoreId, limits};

use crate::config::OPEN_SEGMENTS_MAX;
use crate::error::{Error, Result};
use crate::storage::{AlignedBuf, Caching, OpenMode, Storage, StorageFile, read_exact_at, write_all_at};
use crate::store::layout::Layout;
use crate::store::{distrust, entropy};
use crate::sync::lock::{Mutex, RwLock};

/// Where the first frame of a segment lies: after the header's block.
pub(crate) const FIRST_FRAME: u64 = limits::BLOCK_BYTES;

/// What the published commits made of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Accounting {
    /// Where the last published frame's commit ends.
    pub(crate) end: u64,
    /// That frame's digest; zero before the first.
    pub(crate) previous_digest: u32,
    /// Bytes of blobs that a key leads to.
    pub(crate) live_bytes: u64,
    /// Bytes of blobs ever put, dead ones included.
    pub(crate) blob_bytes: u64,
    /// Keys that lead here.
    pub(crate) live_values: u64,
    /// The room that their values take, each rounded up to its alignment.
    pub(crate) live_room: u64,
    /// Puts in its frames.
    pub(crate) values: u64,
    /// As of which commit the oldest of them counts; zero without one.
    pub(crate) oldest_put: Seq,
    /// As of which commit the newest delete in its frames counts; zero without one.
    pub(crate) newest_delete: Seq,
}

impl Accounting {
    fn empty() -> Self {
        Self {
            end: FIRST_FRAME,
            previous_digest: 0,
            live_bytes: 0,
            blob_bytes: 0,
            live_values: 0,
            live_room: 0,
            values: 0,
            oldest_put: Seq::ZERO,
            newest_delete: Seq::ZERO,
        }
    }

    /// A value was put that counts as of commit `seq`.
    pub(crate) fn put(&mut self, seq: Seq, length: u64) {
        self.values += 1;
        self.blob_bytes += length;
        self.oldest_put = if self.oldest_put == Seq::ZERO { seq } else { self.oldest_put.min(seq) };
    }

    /// A key leads to a value here from now on.
    pub(crate) fn lives(&mut self, length: u64) {
        self.live_values += 1;
        self.live_bytes += length;
        self.live_room += room(length);
    }

    /// A key that led here leads elsewhere, or nowhere.
    pub(crate) fn dies(&mut self, length: u64) {
        debug_assert!(self.live_values > 0 && self.live_bytes >= length, "only what lived dies: {self:?}");
        self.live_values = self.live_values.saturating_sub(1);
        self.live_bytes = self.live_bytes.saturating_sub(length);
        self.live_room = self.live_room.saturating_sub(room(length));
    }
}

/// The room that a value of this length takes.
fn room(length: u64) -> u64 {
    length.next_multiple_of(limits::blob_align_bytes(length))
}

/// One segment.
#[derive(Debug)]
pub(crate) struct Segment {
    pub(crate) id: SegmentId,
    pub(crate) salt: Salt,
    pub(crate) path: PathBuf,
    pub(crate) accounting: Mutex<Accounting>,
    /// Where the segment ends for good; `OPEN` while commits may still be appended.
    sealed_end: AtomicU64,
    /// Whether a manifest may name it.
    named: AtomicBool,
    /// Whether the manifest on the disk names it no more: its file goes once nobody sees it.
    pub(crate) condemned: AtomicBool,
    /// Whether every delete in it that still matters is repeated in another segment.
    pub(crate) deletes_carried: AtomicBool,
    /// Whether compaction met damage in it, and leaves it alone.
    pub(crate) has_damage: AtomicBool,
    /// How many bytes were alive when it was last looked through for holes to punch; `u64::MAX` before.
    pub(crate) alive_when_punched: AtomicU64,
}

const OPEN: u64 = u64::MAX;

impl Segment {
    fn new(id: SegmentId, salt: Salt, path: PathBuf, accounting: Accounting, sealed_end: Option<u64>) -> Arc<Self> {
        Arc::new(Self {
            id,
            salt,
            path,
            accounting: Mutex::new(accounting),
            sealed_end: AtomicU64::new(sealed_end.unwrap_or(OPEN)),
            named: AtomicBool::new(false),
            condemned: AtomicBool::new(false),
            deletes_carried: AtomicBool::new(false),
            has_damage: AtomicBool::new(false),
            alive_when_punched: AtomicU64::new(u64::MAX),
        })
    }

    /// Ends the segment: nothing is appended after `end` any more.
    pub(crate) fn seal(&self, end: u64) {
        self.sealed_end.store(end, Ordering::Release);
    }

    /// Where the segment ends for good, once it does.
    pub(crate) fn sealed_end(&self) -> Option<u64> {
        Some(self.sealed_end.load(Ordering::Acquire)).filter(|&end| end != OPEN)
    }

    /// The manifest's line about this segment, as of what is published.
    pub(crate) fn record(&self) -> SegmentRecord {
        let accounting = *self.accounting.lock();
        SegmentRecord {
            id: self.id,
            salt: self.salt,
            end: accounting.end,
            previous_digest: accounting.previous_digest,
            sealed: self.sealed_end() == Some(accounting.end),
            live_bytes: accounting.live_bytes,
            blob_bytes: accounting.blob_bytes,
            live_values: accounting.live_values,
            live_room: accounting.live_room,
            values: accounting.values,
            oldest_put: accounting.oldest_put,
            newest_delete: accounting.newest_delete,
        }
    }

    pub(crate) fn is_condemned(&self) -> bool {
        self.condemned.load(Ordering::Acquire)
    }
}

/// All segments of a store.
#[derive(Debug)]
pub(crate) struct Segments {
    storage: Arc<dyn Storage>,
    layout: Layout,
    store: StoreId,
    known: RwLock<BTreeMap<SegmentId, Arc<Segment>>>,
    /// The next id. Held while a segment is made, so that whoever holds it sees no half-made one.
    roster: Mutex<SegmentId>,
    open: Mutex<OpenFiles>,
}

impl Segments {
    pub(crate) fn new(storage: Arc<dyn Storage>, layout: Layout, store: StoreId, next: SegmentId) -> Self {
        Self {
            storage,
            layout,
            store,
            known: RwLock::default(),
            roster: Mutex::new(next),
            open: Mutex::new(OpenFiles::default()),
        }
    }

    pub(crate) fn store(&self) -> StoreId {
        self.store
    }

    /// Leaves word of a failed sync for the next open.
    pub(crate) fn leave_distrust(&self, generation: u64, synced: Seq) {
        distrust::leave(&*self.storage, &self.layout, generation, synced);
    }

    /// Lists a segment that the manifest names.
    pub(crate) fn adopt(&self, record: &SegmentRecord) -> Arc<Segment> {
        let accounting = Accounting {
            end: record.end,
            previous_digest: record.previous_digest,
            live_bytes: record.live_bytes,
            blob_bytes: record.blob_bytes,
            live_values: record.live_values,
            live_room: record.live_room,
            values: record.values,
            oldest_put: record.oldest_put,
            newest_delete: record.newest_delete,
        };
        let sealed_end = record.sealed.then_some(record.end);
        let segment = Segment::new(record.id, record.salt, self.layout.segment(record.id), accounting, sealed_end);
        segment.named.store(true, Ordering::Release);
        self.insert(segment)
    }

    /// Lists a segment that was found in the directory and is younger than the manifest.
    pub(crate) fn adopt_found(&self, id: SegmentId, salt: Salt) -> Arc<Segment> {
        let mut next = self.roster.lock();
        *next = (*next).max(SegmentId(id.get() + 1));
        self.insert(Segment::new(id, salt, self.layout.segment(id), Accounting::empty(), None))
    }

    /// Keeps ids from being given out again up to and including `id`.
    pub(crate) fn skip(&self, id: SegmentId) {
        let mut next = self.roster.lock();
        *next = (*next).max(SegmentId(id.get() + 1));
    }

    fn insert(&self, segment: Arc<Segment>) -> Arc<Segment> {
        self.known.write().insert(segment.id, Arc::clone(&segment));
        segment
    }

    /// Makes a new segment: its header and its name are durable when this returns.
    pub(crate) fn create(&self, single_commit: bool) -> Result<(Arc<Segment>, Arc<dyn StorageFile>)> {
        let mut next = self.roster.lock();
        let id = *next;
        // The id is spent whether or not the making succeeds: what a failure leaves behind must not be mistaken for
        // the next segment.
        *next = SegmentId(id.get() + 1);
        let salt = Salt(entropy::random_u64());
        let path = self.layout.segment(id);
        let header = SegmentHeader { single_commit, ..SegmentHeader::new(self.store, id, salt) };
        let file = self.storage.open(&path, OpenMode::CreateNew).map_err(Error::io("create", &path))?;
        let made = (|| {
            let mut block = AlignedBuf::zeroed(FIRST_FRAME as usize);
            block.copy_from_slice(&header.encode());
            write_all_at(&*file, &block, 0, Caching::Direct).map_err(Error::io("write the header of", &path))?;
            file.sync().map_err(Error::io("sync", &path))?;
            self.storage.sync_dir(&self.layout.segments()).map_err(Error::io("sync", &self.layout.segments()))
        })();
        if let Err(error) = made {
            // The header may or may not be there; recovery takes an empty segment for what it is.
            let _ = self.storage.remove(&path);
            return Err(error);
        }
        let segment = self.insert(Segment::new(id, salt, path, Accounting::empty(), None));
        self.open.lock().put(id, Arc::clone(&file));
        Ok((segment, file))
    }

    /// Takes a segment in which nothing was committed off the list, and its file away; where a manifest may name it, only
    /// its space. The next manifest does not name it then, and the next open removes the file.
    pub(crate) fn discard(&self, segment: &Segment, file: &dyn StorageFile) {
        let _no_manifest_begins = self.roster.lock();
        self.known.write().remove(&segment.id);
        self.open.lock().files.remove(&segment.id);
        let gone = if segment.named.load(Ordering::Acquire) {
            file.truncate(FIRST_FRAME)
        } else {
            self.storage.remove(&segment.path)
        };
        if let Err(error) = gone {
            tracing::warn!(path = %segment.path.display(), %error, "an unused segment could not be removed");
        }
    }

    /// Takes a segment that nobody sees any more off the list. Its file is the caller's to remove.
    pub(crate) fn forget(&self, id: SegmentId) {
        self.known.write().remove(&id);
        self.open.lock().files.remove(&id);
    }

    pub(crate) fn get(&self, id: SegmentId) -> Option<Arc<Segment>> {
        self.known.read().get(&id).cloned()
    }

    pub(crate) fn all(&self) -> Vec<Arc<Segment>> {
        self.known.read().values().cloned().collect()
    }

    /// The manifest's lines about all segments but the condemned, and the next id, with no segment half-made or half-discarded in between.
    pub(crate) fn records(&self) -> (Vec<SegmentRecord>, SegmentId) {
        let next = self.roster.lock();
        let known = self.known.read();
        let kept = || known.values().filter(|segment| !segment.is_condemned());
        kept().for_each(|segment| segment.named.store(true, Ordering::Release));
        (kept().map(|segment| segment.record()).collect(), *next)
    }

    /// Where a segment lies.
    pub(crate) fn path_of(&self, id: SegmentId) -> PathBuf {
        self.layout.segment(id)
    }

    /// The file of a segment that an index entry names, open for reading.
    pub(crate) fn file_of(&self, id: SegmentId) -> Result<(Arc<Segment>, Arc<dyn StorageFile>)> {
        let segment = self.get(id).ok_or_else(|| {
            Error::damaged(&self.layout.segment(id), None, "the index names a segment that the store does not have")
        })?;
        let file = self.file(&segment)?;
        Ok((segment, file))
    }

    /// [`file_of`](Self::file_of) of a segment whose file is open already; asks the disk for nothing.
    pub(crate) fn open_file_of(&self, id: SegmentId) -> Option<(Arc<Segment>, Arc<dyn StorageFile>)> {
        let segment = self.get(id)?;
        let file = self.open.lock().get(id)?;
        Some((segment, file))
    }

    /// A segment's file, open for reading and proven to be that segment's.
    pub(crate) fn file(&self, segment: &Segment) -> Result<Arc<dyn StorageFile>> {
        if let Some(file) = self.open.lock().get(segment.id) {
            return Ok(file);
        }
        let file = self.storage.open(&segment.path, OpenMode::Read).map_err(|source| {
            if source.kind() == std::io::ErrorKind::NotFound {
                Error::damaged(&segment.path, None, "the segment's file is missing")
            } else {
                Error::Io { action: "open", path: segment.path.clone(), source }
            }
        })?;
        self.check_header(segment, &*file)?;
        self.open.lock().put(segment.id, Arc::clone(&file));
        Ok(file)
    }

    /// A segment's file, open for appending.
    pub(crate) fn file_for_append(&self, segment: &Segment) -> Result<Arc<dyn StorageFile>> {
        let file = self.storage.open(&segment.path, OpenMode::ReadWrite).map_err(Error::io("open", &segment.path))?;
        self.check_header(segment, &*file)?;
        self.open.lock().put(segment.id, Arc::clone(&file));
        Ok(file)
    }

    fn check_header(&self, segment: &Segment, file: &dyn StorageFile) -> Result<()> {
        let path = &segment.path;
        let length = file.facts().map_err(Error::io("measure", path))?.len_bytes;
        let end = segment.accounting.lock().end;
        if length < end {
            let what = format!("the file has {length} bytes, and commits reach to byte {end}: it was truncated");
            return Err(Error::damaged(path, length, what));
        }
        let header = read_header(file, path)?;
        if header.store != self.store {
            return Err(Error::damaged(path, 0, format!("it belongs to another store, {}", header.store)));
        }
        if header.segment != segment.id || header.salt != segment.salt {
            let what = format!("it is segment {} with salt {}, in another's place", header.segment, header.salt);
            return Err(Error::damaged(path, 0, what));
        }
        Ok(())
    }
}

/// Reads and judges a segment's header.
pub(crate) fn read_header(file: &dyn StorageFile, path: &std::path::Path) -> Result<SegmentHeader> {
    let mut block = AlignedBuf::zeroed(FIRST_FRAME as usize);
    read_exact_at(file, &mut block, 0, Caching::Buffered).map_err(|source| {
        if source.kind() == std::io::ErrorKind::UnexpectedEof {
            Error::damaged(path, 0, "the file ends before its header does")
        } else {
            Error::Io { action: "read the header of", path: path.to_path_buf(), source }
        }
    })?;
    SegmentHeader::decode(&block).map_err(|error| Error::format(path, error))
}

/// The files that are open, with the least recently used closed first.
#[derive(Debug, Default)]
struct OpenFiles {
    files: HashMap<SegmentId, (Arc<dyn StorageFile>, u64)>,
    clock: u64,
}

impl OpenFiles {
    fn get(&mut self, id: SegmentId) -> Option<Arc<dyn StorageFile>> {
        self.clock += 1;
        let (file, used) = self.files.get_mut(&id)?;
        *used = self.clock;
        Some(Arc::clone(file))
    }

    fn put(&mut self, id: SegmentId, file: Arc<dyn StorageFile>) {
        self.clock += 1;
        self.files.insert(id, (file, self.clock));
        if self.files.len() > OPEN_SEGMENTS_MAX
            && let Some(oldest) = self.files.iter().min_by_key(|(_, (_, used))| *used).map(|(&id, _)| id)
        {
            self.files.remove(&oldest);
        }
    }
}
