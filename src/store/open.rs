//! From a directory to a store: the manifest, recovery, and what a writer tidies up first.
//!
//! # Invariants
//! - Nothing is written before everything that could refuse the open has been looked at.
//! - What recovery cut is out of every later recovery's sight before the first new commit is written: either nothing
//!   was cut, or a new manifest names where the cut segments end.
//! - What recovery believed is synced before anything is built on it; where that fails, the next opening is told
//!   ([`unsettled`]). Nothing is ever written over: a power cut could break what was whole.
//! - The first manifest is written again by whoever opens the store, until there is a segment: the sync of its name may have
//!   failed when it was made ([`making`](super::making)).

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;
use std::sync::Arc;

use alight_format::{Manifest, RunId, SegmentId, Seq};
use tracing::field::Empty;

use crate::config::OPEN_ATTEMPTS;
use crate::error::{Error, Result};
use crate::index::{Run, Version};
use crate::io::step;
use crate::storage::{DirEntry, OpenMode, Storage, StorageFile, StorageLock};
use crate::store::commit::{Tail, Written};
use crate::store::distrust::{self, Note};
use crate::store::layout::Layout;
use crate::store::making::{Place, create, look, take_lock};
use crate::store::manifest;
use crate::store::options::{Create, StoreOptions};
use crate::store::publish::{index_entry, publish};
use crate::store::readers::ReaderPin;
use crate::store::recover::{self, Found, Recovery, TailScan};
use crate::store::segment::{FIRST_FRAME, Segment, Segments, read_header};
use crate::store::unsettled;
use crate::store::watch::go_on;
use crate::trace::scope;

/// The generation of the manifest that a store is made with.
const FIRST_GENERATION: u64 = 1;

/// A store's parts as recovery found them.
pub(crate) struct Opened {
    pub(crate) layout: Layout,
    pub(crate) manifest: Manifest,
    pub(crate) version: Version,
    pub(crate) segments: Arc<Segments>,
    /// What a writer has besides.
    pub(crate) writing: Option<Writing>,
}

/// What only a writer gets.
pub(crate) struct Writing {
    pub(crate) lock: Box<dyn StorageLock>,
    pub(crate) tails: Vec<Tail>,
    /// Segments whose ends recovery cut: they are out of danger only once a manifest says where they end.
    pub(crate) cut: Vec<Arc<Segment>>,
    /// Files that a crash left behind and no manifest names.
    pub(crate) leftovers: Vec<std::path::PathBuf>,
    /// Segments that a manifest named once, and that readers may still see; with the lengths of their files.
    pub(crate) condemned: Vec<(std::path::PathBuf, u64)>,
    /// Whether a failed sync left word, of a process or of an opening: it counts until the next manifest.
    pub(crate) distrusted: bool,
}

/// Opens or makes the store at `path`.
pub(crate) fn open(path: &Path, options: &StoreOptions) -> Result<Opened> {
    let layout = Layout::new(path);
    let storage = &options.storage;
    let mut made = false;
    match look(&**storage, &layout)? {
        Place::Store if options.create == Create::New => {
            return Err(Error::AlreadyExists { path: path.to_path_buf() });
        }
        Place::Store => {}
        Place::Unfinished if options.unfinished => made = create(&**storage, &layout, options)?,
        Place::Unfinished => {
            return Err(not_a_store(path, "a repair into it was interrupted; remove it, and repair again"));
        }
        Place::Absent | Place::Empty | Place::HalfMade if options.create != Create::Never => {
            made = create(&**storage, &layout, options)?;
        }
        Place::Absent => {
            return Err(Error::Io {
                action: "open",
                path: path.to_path_buf(),
                source: io::Error::new(io::ErrorKind::NotFound, "no such directory; create the store first"),
            });
        }
        Place::Empty => return Err(not_a_store(path, "the directory is empty; create the store first")),
        Place::HalfMade => return Err(not_a_store(path, "its creation was interrupted; create it again")),
        Place::Foreign(name) => {
            return Err(not_a_store(path, &format!("it has no MANIFEST, and holds {name}, which is not alight's")));
        }
        Place::File => return Err(not_a_store(path, "it is a file, and a store is a directory")),
    }
    if options.read_only { open_reading(storage, layout, &[]) } else { open_writing(storage, layout, options, made) }
}

fn not_a_store(path: &Path, why: &str) -> Error {
    Error::NotAStore { path: path.to_path_buf(), why: why.to_owned() }
}

/// Refuses to write where a feature allows this build to read only.
pub(crate) fn judge_writable(layout: &Layout, manifest: &Manifest) -> Result<()> {
    if !manifest.flags.unknown_read_only() {
        return Ok(());
    }
    Err(Error::Newer {
        path: layout.root().to_path_buf(),
        what: format!("its features {:#x} allow this build to read only", manifest.flags.read_only_compatible),
    })
}

/// Opens for writing, a store that this call has `made` or one that was there.
fn open_writing(storage: &Arc<dyn Storage>, layout: Layout, options: &StoreOptions, made: bool) -> Result<Opened> {
    // Judged before the lock's file is touched: a store of a newer format is refused with nothing written.
    judge_writable(&layout, &manifest::read(&**storage, &layout)?)?;
    go_on("open", layout.root())?;
    let lock = take_lock(&**storage, &layout)?;
    let mut manifest = manifest::read(&**storage, &layout)?;
    judge_writable(&layout, &manifest)?;
    // There is no older manifest to fall back on, should the name of the first one be lost.
    let first_manifest = (manifest.generation == FIRST_GENERATION).then(|| manifest.clone());
    if let Some(bytes) = options.segment_bytes {
        manifest.segment_bytes = bytes;
    }
    let mut loaded = load(storage, &layout, &manifest, &[])?;
    let (mut recovery, mut scans) = loaded.recover()?;
    let unsettled = loaded.torn_note || unsettled::is_left(&**storage, &layout)?;
    if unsettled {
        let ends = scans.iter().map(|scan| (scan.segment.id, scan.end_of_frames));
        unsettled::renew(&**storage, &layout, ends)?;
        // The same commits, in other files.
        loaded = load(storage, &layout, &manifest, &[])?;
        (recovery, scans) = loaded.recover()?;
    }
    let Loaded { segments, mut version, leftovers, condemned, next_run, trusted, found, outlived, cut_before, .. } =
        loaded;
    manifest.next_run = next_run;

    // From here on the store is known to be sound, and is written to.
    go_on("open", layout.root())?;
    let mut files = BTreeMap::new();
    for scan in &scans {
        let file = segments.file_for_append(&scan.segment)?;
        step();
        files.insert(scan.segment.id, file);
    }
    // With the name of this manifest lost, an older one would be there again, and what was cut.
    let manifest_counts = first_manifest.is_some() || cut_before;
    let names_count = !leftovers.is_empty() || !condemned.is_empty() || manifest_counts;
    let names = match first_manifest {
        // It is durable.
        Some(_) if made && segments.all().is_empty() => Ok(()),
        // Its making may have failed at the last sync. The generation stays, so that the next one tries again if this fails.
        Some(as_made) if segments.all().is_empty() => manifest::write(&**storage, &layout, &as_made),
        _ if names_count => settle_names(&**storage, &layout),
        _ => Ok(()),
    };
    let settled = names.and_then(|()| settle(&recovery, &files));
    let settled = settled.inspect_err(|_| unsettled::leave(&**storage, &layout))?;
    replay(&mut version, &segments, recovery);

    let mut tails = Vec::new();
    let mut cut = Vec::new();
    for scan in scans {
        let segment = scan.segment;
        let synced = settled.contains(&segment.id);
        let end = *segment.accounting.lock();
        // A commit that was found but not accepted is litter as well.
        let refused = scan.end_of_frames > end.end;
        if scan.litter || refused {
            segment.seal(end.end);
            cut.push(segment);
        } else if let Some(file) = files.remove(&segment.id) {
            if end.end == FIRST_FRAME && found.contains(&segment.id) {
                // It may be one whose making failed at a sync, and that could not be removed: nothing makes its header and
                // its name durable any more, and no commit may rest on them.
                segments.discard(&segment, &*file);
                continue;
            }
            if scan.single {
                segment.seal(end.end);
                continue;
            }
            tails.push(Tail {
                segment,
                file,
                offset: end.end,
                previous_digest: end.previous_digest,
                allocated: scan.len_bytes.max(end.end),
                prewritten: Some(end.end),
                single: false,
                synced,
            });
        }
    }
    // A note that this manifest outlived: an opening may have left it whose manifest this is, and whose sync of its name
    // failed. No later sync tells that the name is on the disk; the manifest before it would bring back what was cut.
    let distrusted = trusted.is_some() || unsettled || outlived;
    Ok(Opened {
        layout,
        manifest,
        version,
        segments,
        writing: Some(Writing { lock, tails, cut, leftovers, condemned, distrusted }),
    })
}

/// Opens for reading. Runs that are open already are not opened again.
pub(crate) fn open_reading(storage: &Arc<dyn Storage>, layout: Layout, known: &[Arc<Run>]) -> Result<Opened> {
    let mut last_error: Option<String> = None;
    for attempt in 1.. {
        let (manifest, pin) = pin_manifest(&**storage, &layout)?;
        let outcome = load(storage, &layout, &manifest, known).and_then(|mut loaded| {
            let (recovery, _) = loaded.recover()?;
            let Loaded { segments, mut version, .. } = loaded;
            replay(&mut version, &segments, recovery);
            version.hold = Arc::new(pin);
            Ok((segments, version))
        });
        match outcome {
            Ok((segments, version)) => return Ok(Opened { layout, manifest, version, segments, writing: None }),
            // A writer at work replaces files and appends while this looks: what is missing from one look and there in
            // the next was never missing. What two looks in a row agree on is so.
            Err(error) => {
                let said = error.to_string();
                let agreed = last_error.as_deref() == Some(&said) && !was_cut_meanwhile(&error);
                if attempt >= OPEN_ATTEMPTS || agreed {
                    return Err(error);
                }
                last_error = Some(said);
            }
        }
    }
    unreachable!("the loop above has no other end")
}

/// Whether a file was shorter when it was read than when it was measured: the writer gave back space that it had taken
/// ahead, and does so often.
fn was_cut_meanwhile(error: &Error) -> bool {
    matches!(error, Error::Io { source, .. } if source.kind() == io::ErrorKind::UnexpectedEof)
}

/// The manifest, and the pin that keeps a writer from taking away what it leads to.
fn pin_manifest(storage: &dyn Storage, layout: &Layout) -> Result<(Manifest, Option<ReaderPin>)> {
    let mut manifest = manifest::read(storage, layout)?;
    for _ in 0..OPEN_ATTEMPTS {
        step();
        let Some(pin) = ReaderPin::take(storage, layout, manifest.generation) else { return Ok((manifest, None)) };
        let now = manifest::read(storage, layout)?;
        if now.generation == pin.generation() {
            return Ok((now, Some(pin)));
        }
        manifest = now;
    }
    let path = layout.manifest();
    let source = io::Error::new(io::ErrorKind::ResourceBusy, "it was replaced each time before it could be held");
    Err(Error::Io { action: "hold", path, source })
}

/// What the manifest and the directories say, before any tail is looked at.
struct Loaded {
    segments: Arc<Segments>,
    version: Version,
    /// Segments whose tails are to be scanned, with whether they hold one commit alone.
    open: Vec<Arc<Segment>>,
    /// Files that a crash left behind and no manifest names.
    leftovers: Vec<std::path::PathBuf>,
    /// Segments that a manifest named once, and that readers may still see; with the lengths of their files.
    condemned: Vec<(std::path::PathBuf, u64)>,
    next_run: RunId,
    /// Segments that the manifest does not name yet.
    found: Vec<SegmentId>,
    covered: Seq,
    /// The last commit to believe, where a failed sync left word.
    trusted: Option<Seq>,
    /// Whether such word was left that is not about this manifest.
    outlived: bool,
    /// Whether such word was left that does not say what it is about.
    torn_note: bool,
    /// Whether something lies behind the end of a segment: an earlier opening cut it, and did not come to giving back its
    /// space, which it does when the manifest that says so is durable.
    cut_before: bool,
}

fn load(storage: &Arc<dyn Storage>, layout: &Layout, manifest: &Manifest, known: &[Arc<Run>]) -> Result<Loaded> {
    let segments = Arc::new(Segments::new(Arc::clone(storage), layout.clone(), manifest.store, manifest.next_segment));
    let mut open = Vec::new();
    let mut leftovers = Vec::new();
    let mut condemned = Vec::new();
    let mut found = Vec::new();
    let mut cut_before = false;

    let listed = storage.list(&layout.segments()).map_err(Error::io("list", &layout.segments()))?;
    let mut present: BTreeMap<SegmentId, DirEntry> = BTreeMap::new();
    for entry in listed {
        // A copy that was not finished.
        if entry.name.ends_with(".seg.tmp") {
            leftovers.push(layout.segments().join(&entry.name));
        }
        if let Some(id) = SegmentId::from_file_name(&entry.name) {
            present.insert(id, entry);
        }
    }
    for record in &manifest.segments {
        let path = layout.segment(record.id);
        let Some(entry) = present.remove(&record.id) else {
            return Err(Error::damaged(&path, None, "the segment's file is missing"));
        };
        if entry.len_bytes < record.end {
            let what = format!("the file has {} bytes of {}: it was truncated", entry.len_bytes, record.end);
            return Err(Error::damaged(&path, entry.len_bytes, what));
        }
        let segment = segments.adopt(record);
        if record.sealed {
            cut_before |= entry.len_bytes > record.end;
        } else {
            open.push(segment);
        }
    }
    for (id, entry) in present {
        let path = layout.segment(id);
        if id < manifest.next_segment {
            condemned.push((path, entry.len_bytes));
            continue;
        }
        go_on("open", &path)?;
        let file = storage.open(&path, OpenMode::Read).map_err(Error::io("open", &path))?;
        match read_header(&*file, &path) {
            Ok(header) if header.store == manifest.store && header.segment == id => {
                open.push(segments.adopt_found(id, header.salt));
                found.push(id);
            }
            Ok(header) => {
                let what = format!("it is segment {} of store {}, in another's place", header.segment, header.store);
                return Err(Error::damaged(&path, 0, what));
            }
            Err(error @ Error::Io { .. }) => return Err(error),
            // Its creation was interrupted, unless something was committed into it.
            Err(error) => {
                if recover::holds_a_frame(&*file, &path)? {
                    return Err(error);
                }
                segments.skip(id);
                leftovers.push(path);
            }
        }
    }

    let mut runs = Vec::with_capacity(manifest.runs.len());
    for record in &manifest.runs {
        go_on("open", layout.root())?;
        runs.push(match known.iter().find(|run| run.record() == record) {
            Some(run) => Arc::clone(run),
            None => Arc::new(Run::open(&**storage, &layout.run(record.id), manifest.store, record)?),
        });
    }
    let mut next_run = manifest.next_run;
    for entry in storage.list(&layout.index()).map_err(Error::io("list", &layout.index()))? {
        // A name that a crash left behind is not used again: its file is still to be removed.
        if let Some(id) = RunId::from_file_name(entry.name.strip_suffix(".tmp").unwrap_or(&entry.name)) {
            next_run = next_run.max(RunId(id.get() + 1));
            if entry.name.ends_with(".tmp") || manifest.runs.iter().all(|record| record.id != id) {
                leftovers.push(layout.index().join(&entry.name));
            }
        }
    }
    let version = Version::of_runs(manifest.covered, runs);
    let note = distrust::read(&**storage, layout)?;
    let trusted = note.and_then(|note| note.about(manifest.generation));
    let torn_note = note.is_some_and(Note::is_torn);
    let outlived = note.is_some() && trusted.is_none() && !torn_note;
    let covered = manifest.covered;
    Ok(Loaded {
        segments,
        version,
        open,
        leftovers,
        condemned,
        next_run,
        found,
        covered,
        trusted,
        outlived,
        torn_note,
        cut_before,
    })
}

impl Loaded {
    fn recover(&mut self) -> Result<(Recovery, Vec<TailScan>)> {
        let scope = scope!("recovery", segments = self.open.len(), commits = Empty);
        let files = |segment: &Segment| self.segments.file(segment);
        let mut scans = Vec::with_capacity(self.open.len());
        for segment in &self.open {
            go_on("open", &segment.path)?;
            scans.push(recover::scan_tail(segment, &*files(segment)?)?);
        }
        let recovery = recover::judge(self.covered, self.trusted, &mut scans, &files)?;
        scope.record("commits", recovery.commits.len());
        Ok((recovery, scans))
    }
}

/// Makes the names in the store's directories durable, where a process that was killed may not have come to it: what the
/// manifest names must not be taken away before that. Of segments, who made one with commits in it has done so.
fn settle_names(storage: &dyn Storage, layout: &Layout) -> Result<()> {
    for directory in [layout.root().to_path_buf(), layout.index()] {
        storage.sync_dir(&directory).map_err(Error::io("sync", &directory))?;
        step();
    }
    Ok(())
}

/// Makes durable what recovery accepted, so that a new commit may say so; answers which segments it synced.
fn settle(recovery: &Recovery, files: &BTreeMap<SegmentId, Arc<dyn StorageFile>>) -> Result<BTreeSet<SegmentId>> {
    let mut touched = BTreeMap::new();
    for found in &recovery.commits {
        let segment = &found.segment;
        let Some(file) = files.get(&segment.id) else { continue };
        touched.insert(segment.id, (segment, file));
    }
    for (segment, file) in touched.values() {
        file.sync().map_err(Error::io("sync", &segment.path))?;
        step();
    }
    Ok(touched.into_keys().collect())
}

fn replay(version: &mut Version, segments: &Segments, recovery: Recovery) {
    let last = recovery.last;
    for found in recovery.commits {
        let (end, payload) = (found.end(), found.payload());
        let Found { segment, prelude, entries, digest } = found;
        let repeats = entries.iter().any(|entry| entry.origin != Seq::ZERO);
        let entries = entries
            .into_iter()
            .map(|entry| index_entry(entry, prelude.seq, segment.id, prelude.offset, payload))
            .collect();
        publish(
            version,
            segments,
            Written { seq: prelude.seq, durable: true, segment, end, digest, entries, repeats, deleted: None },
        );
    }
    debug_assert_eq!(version.seq, last);
}
