//! Salvages a damaged store into a new one: every key whose newest value is whole, and a report of the rest.
//!
//! Keys are learnt from the index runs that the manifest names, where all of them are sound, and from the frames of the
//! commits behind them; else from the frames of every segment, broken places passed by, and from as much of the runs as can
//! be read. Of each key the newest is taken, deletes counted, and its bytes compared with their checksum on the way over.
//!
//! # Invariants
//! - The source is read and nothing else: no file of it is made, changed, locked or removed.
//! - No value is put that is not what was put once under this very key, and none in place of a newer one that is known and
//!   damaged: such a key is missing in the new store, and named.
//! - A commit that cannot be read, and that the index does not cover, changes nothing: its keys are as they were before it.
//!   So is one that no sync is known to have reached, as at every opening. Both are told.
//! - Until the new store is whole it bears the file [`UNFINISHED`](Layout::unfinished), and does not open.

use std::collections::BTreeMap;
use std::io;
use std::ops::Bound;
use std::path::Path;
use std::sync::Arc;

use alight_format::{
    EntryKind, IndexEntry, IndexKind, Manifest, Prelude, RunId, Salt, SegmentId, Seq, StoreId, limits,
};

use self::copy::Copy;
use crate::config::READ_BYTES;
use crate::error::{Damage, DisplayKey, Error, Result};
use crate::index::Run;
use crate::io::{SegmentFile, step};
use crate::metrics::Counters;
use crate::storage::{AlignedBuf, Caching, OpenMode, Storage, StorageFile, read_exact_at};
use crate::store::Store;
use crate::store::frames::{Met, walk};
use crate::store::gather::{Gatherer, Spill, offer};
use crate::store::layout::Layout;
use crate::store::making::{Place, look, make_dir};
use crate::store::manifest;
use crate::store::options::{Create, Maintenance, StoreOptions};
use crate::store::rebuild::list_segments;
use crate::store::recover::{Found, payload_is_whole, read_frame};
use crate::store::segment::{FIRST_FRAME, Segment, Segments, read_header};
use crate::store::watch::go_on;

mod copy;

/// How far a repair has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct RepairProgress {
    /// Bytes of values that were read so far, damaged ones included.
    pub bytes_done: u64,
    /// Bytes of values to read. Zero while it is still being looked for them.
    pub bytes_total: u64,
    /// Damages found so far.
    pub damages: u64,
}

/// What a repair came to; made by [`StoreOptions::repair`].
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct RepairReport {
    /// Keys in the new store.
    pub keys: u64,
    /// Bytes of their values.
    pub bytes: u64,
    /// Commits whose frames were read.
    pub commits: u64,
    /// Keys that are known, and whose newest value is not whole: they are not in the new store.
    pub keys_lost: u64,
    /// Everything that is not in the new store, or not as it was: keys, and stretches of files that are no commits.
    pub damages: Vec<Damage>,
}

impl RepairReport {
    /// Whether everything is in the new store, as far as anybody can tell.
    pub fn is_complete(&self) -> bool {
        self.damages.is_empty()
    }
}

/// The first number of the runs that are spilled, far from those that the new store writes meanwhile.
const SPILL_FROM: RunId = RunId(1 << 40);

/// What it is called where it was given up.
pub(crate) const OPERATION: &str = "repair into";

/// How many files are kept open at a time.
const OPEN_MAX: usize = 64;

/// Salvages the store at `source` into a new one at `target`.
pub(crate) fn repair(
    source: &Path,
    target: &Path,
    options: &StoreOptions,
    progress: &mut dyn FnMut(RepairProgress),
) -> Result<RepairReport> {
    let storage = &options.storage;
    let mut source = Source::look(storage, &Layout::new(source))?;
    let layout = Layout::new(target);
    claim(&**storage, &layout)?;
    let making = StoreOptions {
        create: Create::New,
        read_only: false,
        // Everything is salvaged; a limit is for those who go on in it.
        max_bytes: None,
        eviction: None,
        // Whoever waits for the repair looks at this thread's steps.
        deadline: None,
        write_deadline: None,
        maintenance: Maintenance::Inline,
        segment_bytes: options.segment_bytes.or(source.manifest.as_ref().map(|manifest| manifest.segment_bytes)),
        unfinished: true,
        ..options.clone()
    };
    let store = Store::open_with(target, making)?;

    let (segments, folder) = (Arc::clone(&source.segments), source.layout.clone());
    let commit_of = |entry: &IndexEntry| Ok(commit_of(&**storage, &folder, &segments, entry).unwrap_or(Seq::ZERO));
    let spill = Spill {
        storage: Arc::clone(storage),
        directory: layout.index(),
        store: store.stat()?.store_id,
        next: SPILL_FROM,
    };
    let mut gatherer = Gatherer::new(spill, options.gathered_max(), &commit_of);
    source.gather(&mut gatherer)?;

    let mut bytes_total = 0;
    for entry in gatherer.newest() {
        bytes_total += entry?.length;
        go_on(OPERATION, target)?;
    }
    let mut copy = Copy::new(&mut source, &store);
    let mut bytes_done = 0;
    for entry in gatherer.newest() {
        let entry = entry?;
        go_on(OPERATION, target)?;
        if entry.kind == IndexKind::Put {
            copy.value(&entry)?;
            bytes_done += entry.length;
            progress(RepairProgress { bytes_done, bytes_total, damages: copy.damages() });
        }
    }
    copy.commit()?;
    drop(gatherer);
    store.close()?;
    // Who was told that it failed finds no store.
    go_on(OPERATION, target)?;
    finish(&**storage, &layout)?;
    Ok(source.report)
}

/// Makes the new store's directory, with the mark that it is unfinished, durably.
fn claim(storage: &dyn Storage, layout: &Layout) -> Result<()> {
    let root = layout.root();
    match look(storage, layout) {
        Ok(Place::Absent | Place::Empty) => {}
        Ok(_) | Err(Error::Damaged(_)) => return Err(Error::AlreadyExists { path: root.to_path_buf() }),
        Err(error) => return Err(error),
    }
    make_dir(storage, root)?;
    let mark = layout.unfinished();
    storage.open(&mark, OpenMode::CreateNew).map_err(Error::io("create", &mark))?;
    storage.sync_dir(root).map_err(Error::io("sync", root))
}

/// Takes the mark away, durably. Where that fails it is put back: nothing makes its absence durable any more, and a power cut
/// would close a store that has taken commits since.
fn finish(storage: &dyn Storage, layout: &Layout) -> Result<()> {
    let (mark, root) = (layout.unfinished(), layout.root());
    storage.remove(&mark).map_err(Error::io("remove", &mark))?;
    storage.sync_dir(root).map_err(|error| {
        if let Err(error) = storage.open(&mark, OpenMode::CreateNew) {
            tracing::error!(path = %mark.display(), %error, "a power cut may bring back the mark of an unfinished repair");
        }
        Error::io("sync", root)(error)
    })
}

/// The damaged store.
struct Source {
    storage: Arc<dyn Storage>,
    layout: Layout,
    manifest: Option<Manifest>,
    segments: Arc<Segments>,
    /// The segments whose salt is known, each with where its commits end at the latest.
    known: Vec<(Arc<Segment>, u64)>,
    open: BTreeMap<SegmentId, SegmentFile>,
    counters: Counters,
    report: RepairReport,
}

impl Source {
    /// Reads the manifest and the segments' headers, as far as they can be read.
    fn look(storage: &Arc<dyn Storage>, layout: &Layout) -> Result<Source> {
        let mut report = RepairReport::default();
        let manifest = match manifest::read(&**storage, layout) {
            Ok(manifest) => Some(manifest),
            Err(error @ Error::Newer { .. }) => return Err(error),
            Err(error) => {
                report.damages.push(as_damage(error));
                None
            }
        };
        let listed = match list_segments(&**storage, layout) {
            Err(Error::Io { source, .. })
                if matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) =>
            {
                let why = "it has no segments to salvage from".to_owned();
                return Err(Error::NotAStore { path: layout.root().to_path_buf(), why });
            }
            listed => listed?,
        };
        let mut found = Vec::new();
        for (&id, &len_bytes) in &listed {
            go_on(OPERATION, layout.root())?;
            let record = manifest.as_ref().and_then(|manifest| manifest.segments.iter().find(|record| record.id == id));
            if record.is_none() && manifest.as_ref().is_some_and(|manifest| id < manifest.next_segment) {
                // The writer had given it up.
                continue;
            }
            let path = layout.segment(id);
            let end = record.filter(|record| record.sealed).map_or(len_bytes, |record| record.end);
            match (identify(&**storage, &path, id, len_bytes), record) {
                (Ok((store, salt)), _) => found.push((id, store, record.map_or(salt, |record| record.salt), end)),
                (Err(error @ Error::Newer { .. }), _) => return Err(error),
                // The manifest knows the salt.
                (Err(error), Some(record)) => {
                    report.damages.push(as_damage(error));
                    found.push((id, None, record.salt, end));
                }
                (Err(error), None) => report.damages.push(as_damage(error)),
            }
        }
        for record in manifest.iter().flat_map(|manifest| &manifest.segments) {
            if !listed.contains_key(&record.id) {
                report.damages.push(as_damage(Error::damaged(&layout.segment(record.id), None, "the file is missing")));
            }
        }
        let first = found.iter().find_map(|(_, store, ..)| *store);
        let store = manifest.as_ref().map(|manifest| manifest.store).or(first).unwrap_or(StoreId([0; 16]));
        let segments = Arc::new(Segments::new(Arc::clone(storage), layout.clone(), store, SegmentId(1)));
        let mut known = Vec::with_capacity(found.len());
        for (id, its_store, salt, end) in found {
            if its_store.is_some_and(|its_store| its_store != store) {
                let what = "it belongs to another store, and is left out";
                report.damages.push(as_damage(Error::damaged(&layout.segment(id), 0, what)));
                continue;
            }
            known.push((segments.adopt_found(id, salt), end));
        }
        let (storage, layout) = (Arc::clone(storage), layout.clone());
        Ok(Source {
            storage,
            layout,
            manifest,
            segments,
            known,
            open: BTreeMap::new(),
            counters: Counters::default(),
            report,
        })
    }

    /// Learns of every key.
    fn gather(&mut self, gatherer: &mut Gatherer<'_>) -> Result<()> {
        let covered = self.manifest.as_ref().map_or(Seq::ZERO, |manifest| manifest.covered);
        // How far a sync is known to have reached: behind that, a commit of which only the frame arrived was never told of.
        let mut proven = covered;
        for (segment, end) in self.known.clone() {
            let Some(file) = self.file(segment.id) else { continue };
            walk(&segment, &*file.file, end, |met| {
                go_on(OPERATION, self.layout.root())?;
                if let Met::Commit(found) = met {
                    proven = proven.max(found.prelude.synced_through);
                }
                Ok::<_, Error>(())
            })?;
        }
        // What a sound index says of the commits that it covers is exact, whatever their frames are like.
        let indexed = if self.gather_runs(gatherer)? { covered } else { Seq::ZERO };
        for (segment, end) in self.known.clone() {
            let Some(file) = self.file(segment.id) else { continue };
            let report = &mut self.report;
            let root = self.layout.root();
            walk(&segment, &*file.file, end, |met| {
                go_on(OPERATION, root)?;
                match met {
                    Met::Commit(found) => {
                        let told = found.prelude.seq <= proven || found.payload_synced();
                        if !told && !payload_is_whole(&found, &*file.file).unwrap_or(false) {
                            report.damages.extend(unfinished(&found, &file.path));
                            return Ok(());
                        }
                        report.commits += 1;
                        if found.prelude.seq > indexed { offer(found, gatherer) } else { Ok(()) }
                    }
                    Met::Unknown(range) => {
                        let what = format!("{} bytes that are no whole commit", range.end - range.start);
                        report.damages.push(as_damage(Error::damaged(&file.path, range.start, what)));
                        Ok(())
                    }
                }
            })?;
        }
        Ok(())
    }

    /// What the index knows, and whether that is everything that it should. Only with the manifest: an old run by itself
    /// would bring back what was deleted since.
    fn gather_runs(&mut self, gatherer: &mut Gatherer<'_>) -> Result<bool> {
        let Some(manifest) = &self.manifest else { return Ok(false) };
        let mut sound = true;
        for record in &manifest.runs {
            let path = self.layout.run(record.id);
            let run = match Run::open(&*self.storage, &path, manifest.store, record) {
                Ok(run) => run,
                Err(error) => {
                    self.report.damages.push(as_damage(error));
                    sound = false;
                    continue;
                }
            };
            for entry in run.range(Bound::Unbounded) {
                match entry {
                    Ok(entry) => {
                        go_on(OPERATION, self.layout.root())?;
                        gatherer.offer(entry)?;
                    }
                    // What lies behind is learnt from the frames, where those are whole.
                    Err(error) => {
                        self.report.damages.push(as_damage(error));
                        sound = false;
                        break;
                    }
                }
            }
        }
        Ok(sound)
    }

    /// A segment's file, whatever its header is like; `None`, and damage, where it cannot be opened.
    fn file(&mut self, id: SegmentId) -> Option<SegmentFile> {
        if let Some(file) = self.open.get(&id) {
            return Some(file.clone());
        }
        let path = self.layout.segment(id);
        match self.storage.open(&path, OpenMode::Read) {
            Ok(file) => {
                let file = SegmentFile { file, path: Arc::new(path), sealed_end: None };
                if self.open.len() >= OPEN_MAX {
                    self.open.clear();
                }
                self.open.insert(id, file.clone());
                Some(file)
            }
            Err(error) => {
                self.report.damages.push(as_damage(Error::io("open", &path)(error)));
                None
            }
        }
    }

    /// The attributes beside a value, from the frame of the commit that put it.
    fn attributes(&mut self, entry: &IndexEntry) -> Option<Vec<(String, Vec<u8>)>> {
        if !entry.has_attributes {
            return Some(Vec::new());
        }
        let segment = self.segments.get(entry.segment)?;
        let file = self.file(entry.segment)?;
        let frame = read_frame(&segment, &*file.file, entry.frame_offset, limits::SEGMENT_BYTES_MAX).ok()??;
        let payload = frame.payload();
        let of_value = |found: &&alight_format::Entry| {
            found.kind == EntryKind::Put && found.key == entry.key && payload + found.offset == entry.offset
        };
        Some(frame.entries.iter().find(of_value)?.attributes.clone())
    }
}

/// The number of the commit whose frame an entry names, if that is whole.
fn commit_of(storage: &dyn Storage, layout: &Layout, segments: &Segments, entry: &IndexEntry) -> Option<Seq> {
    let segment = segments.get(entry.segment)?;
    let file = storage.open(&layout.segment(entry.segment), OpenMode::Read).ok()?;
    let frame = read_frame(&segment, &*file, entry.frame_offset, limits::SEGMENT_BYTES_MAX).ok()??;
    Some(frame.prelude.seq)
}

/// Which store a segment says that it belongs to, and its salt; of one whose header is broken, the salt alone.
fn identify(storage: &dyn Storage, path: &Path, id: SegmentId, len_bytes: u64) -> Result<(Option<StoreId>, Salt)> {
    let file = storage.open(path, OpenMode::Read).map_err(Error::io("open", path))?;
    let broken = match read_header(&*file, path) {
        Ok(header) if header.segment == id => return Ok((Some(header.store), header.salt)),
        Ok(header) => Error::damaged(path, 0, format!("it is segment {}, in another's place", header.segment)),
        Err(error @ Error::Newer { .. }) => return Err(error),
        Err(error) => error,
    };
    find_salt(&*file, len_bytes).map(|salt| (None, salt)).ok_or(broken)
}

/// The salt of the first frame that lies where it says that it does.
fn find_salt(file: &dyn StorageFile, len_bytes: u64) -> Option<Salt> {
    let block_bytes = limits::BLOCK_BYTES as usize;
    let mut window = AlignedBuf::zeroed(READ_BYTES);
    let mut at = FIRST_FRAME;
    while at < len_bytes {
        let len = (len_bytes - at).min(READ_BYTES as u64) as usize;
        if read_exact_at(file, &mut window[..len], at, Caching::Buffered).is_ok() {
            for (index, block) in window[..len].chunks(block_bytes).enumerate() {
                let place = at + (index * block_bytes) as u64;
                if let Ok(prelude) = Prelude::decode(block)
                    && prelude.offset == place
                {
                    return Some(prelude.salt);
                }
            }
        }
        step();
        at += len as u64;
    }
    None
}

/// Names everything that a commit would have changed.
fn unfinished(found: &Found, path: &Path) -> Vec<Damage> {
    let what = format!("commit {} was never finished; the key is as it was before", found.prelude.seq);
    let damage = |entry: &alight_format::Entry| Damage {
        path: path.to_path_buf(),
        offset: Some(found.prelude.offset),
        key: Some(DisplayKey(entry.key.clone())),
        what: what.clone(),
    };
    found.entries.iter().map(damage).collect()
}

fn damage_of(layout: &Layout, entry: &IndexEntry, what: &str) -> Damage {
    Damage {
        path: layout.segment(entry.segment),
        offset: Some(entry.offset),
        key: Some(DisplayKey(entry.key.clone())),
        what: what.to_owned(),
    }
}

/// An error as one line of the report.
fn as_damage(error: Error) -> Damage {
    match error {
        Error::Damaged(damage) => damage,
        Error::Io { action, path, source } => {
            Damage { path, offset: None, key: None, what: format!("it cannot be read: {action}: {source}") }
        }
        other => Damage { path: Path::new("").to_path_buf(), offset: None, key: None, what: other.to_string() },
    }
}
