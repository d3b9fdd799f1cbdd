//! Makes the index anew from the segments, and the manifest where it is lost: the segments alone say what every key holds.
//!
//! # Invariants
//! - Nobody writes to the store meanwhile: the lock is held, and taken before anything is believed.
//! - The old files stay until the new manifest is durable in their place: whatever fails before changes nothing.
//! - A store is not made smaller in silence. Where a commit that the manifest covers cannot be read, or one may be missing
//!   that was durable once, the answer is damage, and nothing is changed: salvaging is [`repair`](super::repair)'s.
//! - What follows the part that the manifest covers is left to the next opening, which recovers it as ever, and heeds the note
//!   of a failed sync where one lies. Without a manifest that falls to the rebuilding, which is the same for it as an opening
//!   ([`unsettled`]).

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;
use std::sync::Arc;

use alight_format::{IndexKind, Manifest, RunId, RunRecord, SegmentId, Seq};

use crate::config::SEGMENT_BYTES_DEFAULT;
use crate::error::{Error, Result};
use crate::index::{NewRun, write_run};
use crate::io::step;
use crate::storage::{OpenMode, Storage, StorageFile};
use crate::store::distrust;
use crate::store::gather::{Gatherer, Spill, commit_of, offer};
use crate::store::layout::Layout;
use crate::store::making::{Place, look, take_lock};
use crate::store::manifest;
use crate::store::open::judge_writable;
use crate::store::options::StoreOptions;
use crate::store::recover::{self, Evidence, Found, TailScan, Verdict, read_frame};
use crate::store::segment::{FIRST_FRAME, Segment, Segments, read_header};
use crate::store::unsettled;
use crate::store::watch::go_on;

/// How far a rebuilding has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct RebuildProgress {
    /// Bytes of segments whose frames were read so far. Payloads are passed by.
    pub bytes_done: u64,
    /// Bytes of segments in all.
    pub bytes_total: u64,
}

/// What a rebuilding came to; made by [`StoreOptions::rebuild_index`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct RebuildReport {
    /// Keys in the new index. Commits that the manifest does not cover are not counted; the next opening adds them.
    pub keys: u64,
    /// Commits whose frames were read.
    pub commits: u64,
    /// Segments that were read.
    pub segments: u64,
    /// Whether the manifest was lost, and made anew.
    pub manifest_was_lost: bool,
}

/// What generations go on from where the last one is not known: above any that a store comes to by itself, at one a
/// millisecond for thirty years.
const GENERATION_AFTER_LOSS: u64 = 1 << 40;

/// What it is called where it was given up.
pub(crate) const OPERATION: &str = "rebuild the index of";

/// A rebuilding under way.
struct Rebuild<'a> {
    storage: &'a Arc<dyn Storage>,
    layout: &'a Layout,
    /// How many entries are kept in memory.
    limit: usize,
    bytes_done: u64,
    bytes_total: u64,
    progress: &'a mut dyn FnMut(RebuildProgress),
    report: RebuildReport,
}

/// Rebuilds the index of the store at `path`.
pub(crate) fn rebuild(
    path: &Path,
    options: &StoreOptions,
    progress: &mut dyn FnMut(RebuildProgress),
) -> Result<RebuildReport> {
    let (storage, layout) = (&options.storage, Layout::new(path));
    judge_place(&**storage, &layout)?;
    // Judged before the lock's file is touched: a store of a newer format is refused with nothing written.
    read_manifest(&**storage, &layout)?;
    let _lock = take_lock(&**storage, &layout)?;
    let known = read_manifest(&**storage, &layout)?;
    let listed = list_segments(&**storage, &layout)?;
    let mut rebuild = Rebuild {
        storage,
        layout: &layout,
        limit: options.gathered_max(),
        bytes_done: 0,
        bytes_total: listed.values().sum(),
        progress,
        report: RebuildReport { manifest_was_lost: known.is_none(), ..RebuildReport::default() },
    };
    match known {
        Some(manifest) => rebuild.with_manifest(&manifest)?,
        None => rebuild.without_manifest(&listed, options.segment_bytes.unwrap_or(SEGMENT_BYTES_DEFAULT))?,
    }
    Ok(rebuild.report)
}

/// Refuses a place that holds no store, or none that could be rebuilt.
fn judge_place(storage: &dyn Storage, layout: &Layout) -> Result<()> {
    let path = layout.root().to_path_buf();
    match look(storage, layout) {
        // A store, or one whose manifest is missing.
        Ok(Place::Store) | Err(Error::Damaged(_)) => Ok(()),
        Ok(Place::Absent) => Err(Error::Io { action: "open", path, source: io::ErrorKind::NotFound.into() }),
        Ok(_) => Err(Error::NotAStore { path, why: "it holds no segments to rebuild an index from".into() }),
        Err(error) => Err(error),
    }
}

/// The manifest, or `None` where it is missing or damaged. One that this build must not write beside is an error.
fn read_manifest(storage: &dyn Storage, layout: &Layout) -> Result<Option<Manifest>> {
    match manifest::read(storage, layout) {
        Ok(manifest) => judge_writable(layout, &manifest).map(|()| Some(manifest)),
        Err(Error::Damaged(_)) => Ok(None),
        Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The segments' files and their lengths.
pub(crate) fn list_segments(storage: &dyn Storage, layout: &Layout) -> Result<BTreeMap<SegmentId, u64>> {
    let folder = layout.segments();
    let listed = storage.list(&folder).map_err(Error::io("list", &folder))?;
    let of_segment =
        |entry: &crate::storage::DirEntry| Some((SegmentId::from_file_name(&entry.name)?, entry.len_bytes));
    Ok(listed.iter().filter_map(of_segment).collect())
}

/// A place in the chain of a segment's frames, each of which names the one before it.
#[derive(Debug, Clone, Copy)]
struct Link {
    offset: u64,
    digest: u32,
    seq: Seq,
}

impl Link {
    const FIRST: Link = Link { offset: FIRST_FRAME, digest: 0, seq: Seq::ZERO };

    /// Goes on to the next commit, if the chain has one that ends by `end`.
    fn follow(&mut self, segment: &Arc<Segment>, file: &dyn StorageFile, end: u64) -> Result<Option<Found>> {
        let found = read_frame(segment, file, self.offset, end)?
            .filter(|found| found.prelude.previous_digest == self.digest && found.prelude.seq > self.seq);
        if let Some(found) = &found {
            *self = Link { offset: found.end(), digest: found.digest, seq: found.prelude.seq };
        }
        Ok(found)
    }
}

/// A segment of a store whose manifest is lost.
struct Surveyed {
    segment: Arc<Segment>,
    file: Arc<dyn StorageFile>,
    len_bytes: u64,
    /// Where the commits end that lie back to back from its beginning.
    end: Link,
    /// Whether anything but zeros follows.
    litter: bool,
    /// Whether it holds one commit alone.
    single: bool,
}

impl Rebuild<'_> {
    /// The index is lost, the manifest is not: it says exactly which frames the index has to cover.
    fn with_manifest(&mut self, old: &Manifest) -> Result<()> {
        let segments = Segments::new(Arc::clone(self.storage), self.layout.clone(), old.store, old.next_segment);
        let commit_of = commit_of(&segments);
        let mut gatherer = self.gatherer(&segments, old.next_run, &commit_of)?;
        for record in &old.segments {
            let segment = segments.adopt_found(record.id, record.salt);
            let file = segments.file(&segment)?;
            let mut link = Link::FIRST;
            while link.offset < record.end {
                let at = link.offset;
                let Some(found) = link.follow(&segment, &*file, record.end)? else {
                    return Err(lost(&segment, at, "a commit that the index has to cover is broken or missing"));
                };
                self.go_on()?;
                offer(found, &mut gatherer)?;
                self.report.commits += 1;
            }
            if link.digest != record.previous_digest {
                return Err(lost(&segment, record.end, "its last commit is not the one that the manifest names"));
            }
            settle(&segment, &link, record.sealed);
            self.advance(record.end);
        }
        let note = distrust::read(&**self.storage, self.layout)?;
        if let Some(synced) = note.and_then(|note| note.about(old.generation)) {
            // The note counts for the generation that it names and the next: for the one that comes now, too.
            distrust::leave(&**self.storage, self.layout, old.generation, synced);
        }
        let unsettled = unsettled::is_left(&**self.storage, self.layout)?;
        self.replace(&segments, gatherer, Manifest { generation: old.generation + 1, ..old.clone() })?;
        // What lies behind the manifest is still to be copied.
        if unsettled { Ok(()) } else { unsettled::clear(&**self.storage, self.layout) }
    }

    /// Everything but the segments is lost.
    fn without_manifest(&mut self, listed: &BTreeMap<SegmentId, u64>, segment_bytes: u64) -> Result<()> {
        if distrust::read(&**self.storage, self.layout)?.is_some() {
            let what = "it is lost, and DISTRUST, the note of a failed sync, may be about it: restart the machine, remove \
                        the note, and try again";
            return Err(Error::damaged(&self.layout.manifest(), None, what));
        }
        let unsettled = unsettled::is_left(&**self.storage, self.layout)?;
        let (segments, surveyed, proven) = self.survey(listed)?;
        let commit_of = commit_of(&segments);
        let mut gatherer = self.gatherer(&segments, RunId(1), &commit_of)?;
        // Behind a broken place lies what may have been durable: then its number is missing.
        let floor = surveyed.iter().filter(|one| one.litter).map(|one| one.end.seq).min().unwrap_or(proven);
        let mut above_floor = BTreeSet::new();
        let mut tail: BTreeMap<Seq, Found> = BTreeMap::new();
        for one in &surveyed {
            let mut link = Link::FIRST;
            while link.offset < one.end.offset {
                let at = link.offset;
                let Some(found) = link.follow(&one.segment, &*one.file, one.len_bytes)? else {
                    return Err(lost(&one.segment, at, "a commit cannot be read a second time"));
                };
                self.go_on()?;
                self.report.commits += 1;
                let seq = found.prelude.seq;
                if seq > floor && !above_floor.insert(seq) || tail.contains_key(&seq) {
                    return Err(lost(&one.segment, at, &format!("commit {seq} lies here and in another place too")));
                }
                if seq <= proven {
                    offer(found, &mut gatherer)?;
                } else {
                    tail.insert(seq, found);
                }
            }
            self.advance(one.end.offset);
        }
        let through_proven = above_floor.range(..=proven).count() as u64;
        if through_proven < proven.get().saturating_sub(floor.get())
            && let Some(broken) = surveyed.iter().find(|one| one.litter)
        {
            return Err(lost(&broken.segment, broken.end.offset, "a commit here is broken that may have been durable"));
        }

        let last = self.accept(proven, &tail, &surveyed, unsettled)?;
        let mut ends: BTreeMap<SegmentId, Link> = surveyed.iter().map(|one| (one.segment.id, one.end)).collect();
        let mut refused = BTreeSet::new();
        for (seq, found) in tail.into_iter().rev() {
            if seq <= last {
                offer(found, &mut gatherer)?;
            } else {
                let (offset, digest) = (found.prelude.offset, found.prelude.previous_digest);
                ends.insert(found.segment.id, Link { offset, digest, seq });
                refused.insert(found.segment.id);
            }
        }
        for one in &surveyed {
            let id = one.segment.id;
            if ends[&id].offset == FIRST_FRAME {
                // Its making may have failed at a sync: nothing is to be committed there. The next opening takes it away.
                segments.forget(id);
            }
            settle(&one.segment, &ends[&id], one.litter || refused.contains(&id) || one.single);
        }
        let next_segment = SegmentId(listed.keys().next_back().map_or(0, |id| id.get()) + 1);
        let new = Manifest {
            generation: GENERATION_AFTER_LOSS + last.get(),
            covered: last,
            next_segment,
            ..Manifest::new(segments.store(), segment_bytes)
        };
        self.replace(&segments, gatherer, new)?;
        unsettled::clear(&**self.storage, self.layout)
    }

    /// Looks how far the commits of every segment reach, and up to which number any of them says that all were durable.
    fn survey(&mut self, listed: &BTreeMap<SegmentId, u64>) -> Result<(Segments, Vec<Surveyed>, Seq)> {
        let mut headers = Vec::new();
        for (&id, &len_bytes) in listed {
            self.go_on()?;
            let path = self.layout.segment(id);
            let file = self.storage.open(&path, OpenMode::Read).map_err(Error::io("open", &path))?;
            match read_header(&*file, &path) {
                Ok(header) if header.segment == id => headers.push((header, file, len_bytes)),
                Ok(header) => {
                    return Err(Error::damaged(
                        &path,
                        0,
                        format!("it is segment {}, in another's place", header.segment),
                    ));
                }
                Err(error @ Error::Damaged(_)) if recover::holds_a_frame(&*file, &path)? => return Err(error),
                // Its making was interrupted; the next opening takes it away.
                Err(Error::Damaged(_)) => {}
                Err(error) => return Err(error),
            }
        }
        let Some((first, ..)) = headers.first() else {
            let what = "it is lost, and no segment says which store this is";
            return Err(Error::damaged(&self.layout.manifest(), None, what));
        };
        let store = first.store;
        let segments = Segments::new(Arc::clone(self.storage), self.layout.clone(), store, SegmentId(1));
        let (mut surveyed, mut proven) = (Vec::with_capacity(headers.len()), Seq::ZERO);
        for (header, file, len_bytes) in headers {
            let segment = segments.adopt_found(header.segment, header.salt);
            if header.store != store {
                return Err(lost(&segment, 0, "it belongs to another store than the first segment"));
            }
            let mut end = Link::FIRST;
            while let Some(found) = end.follow(&segment, &*file, len_bytes)? {
                self.go_on()?;
                proven = proven.max(found.prelude.synced_through);
            }
            let mut past = TailScan {
                segment: Arc::clone(&segment),
                frames: Vec::new(),
                synced_through: proven,
                end_of_frames: end.offset,
                litter: false,
                single: header.single_commit,
                len_bytes,
            };
            recover::look_past(&segment, &*file, &mut past)?;
            proven = past.synced_through;
            let (litter, single) = (past.litter, header.single_commit);
            surveyed.push(Surveyed { segment, file, len_bytes, end, litter, single });
        }
        Ok((segments, surveyed, proven))
    }

    /// Decides as every opening does about commits that no sync is known to have reached, and makes durable what is accepted:
    /// by a sync, or where one may have failed before by a copy.
    fn accept(&self, proven: Seq, tail: &BTreeMap<Seq, Found>, surveyed: &[Surveyed], unsettled: bool) -> Result<Seq> {
        let file_of = |found: &Found| {
            let one = surveyed.iter().find(|one| one.segment.id == found.segment.id);
            Arc::clone(&one.expect("every commit was found in a segment that was surveyed").file)
        };
        let mut evidence = BTreeMap::new();
        for (&seq, found) in tail {
            let believed = found.payload_synced() || recover::payload_is_whole(found, &*file_of(found))?;
            evidence.insert(seq, Evidence { believed });
        }
        let Verdict::Accept(last) = recover::decide(proven, &evidence, proven) else {
            unreachable!("nothing is asked for but what lies behind what is proven")
        };
        let accepted: BTreeSet<SegmentId> = tail.range(..=last).map(|(_, found)| found.segment.id).collect();
        let unproven = || surveyed.iter().filter(|one| accepted.contains(&one.segment.id));
        if unsettled {
            let ends = unproven().map(|one| (one.segment.id, one.end.offset));
            unsettled::renew(&**self.storage, self.layout, ends)?;
            return Ok(last);
        }
        let folder = self.layout.segments();
        let synced = unproven()
            .try_for_each(|one| {
                one.file.sync().map_err(Error::io("sync", &one.segment.path))?;
                step();
                Ok(())
            })
            .and_then(|()| self.storage.sync_dir(&folder).map_err(Error::io("sync", &folder)));
        synced.inspect_err(|_| unsettled::leave(&**self.storage, self.layout))?;
        Ok(last)
    }

    fn gatherer<'g>(
        &self,
        segments: &Segments,
        next: RunId,
        commit_of: &'g crate::store::gather::CommitOf<'g>,
    ) -> Result<Gatherer<'g>>
    where
        Self: 'g,
    {
        let directory = self.layout.index();
        // A name that anything bears, or bore before it was renamed, is not used again.
        let mut free = next;
        for entry in self.storage.list(&directory).map_err(Error::io("list", &directory))? {
            if let Some(id) = RunId::from_file_name(entry.name.strip_suffix(".tmp").unwrap_or(&entry.name)) {
                free = free.max(RunId(id.get() + 1));
            }
        }
        let spill = Spill { storage: Arc::clone(self.storage), directory, store: segments.store(), next: free };
        Ok(Gatherer::new(spill, self.limit, commit_of))
    }

    /// Writes the run and the manifest that names it, and puts them in the place of the old ones. The note for the next opening
    /// lies there when this returns, and is the caller's to clear.
    fn replace(&mut self, segments: &Segments, gatherer: Gatherer<'_>, mut new: Manifest) -> Result<()> {
        let id = gatherer.next_run();
        new.next_run = RunId(id.get() + 1);
        let written = self.write_index(segments, &gatherer, id);
        drop(gatherer);
        let staged = written.and_then(|record| {
            new.runs = record.into_iter().collect();
            new.segments = segments.all().iter().map(|segment| segment.record()).collect();
            manifest::stage(&**self.storage, self.layout, &new)?;
            // Who was told that it failed finds the old one.
            self.go_on()
        });
        if let Err(error) = staged {
            self.remove_runs(|run| run == id);
            return Err(error);
        }
        // From here on the new manifest may be in place, even if this fails, and its name not be durable: then nothing tells the
        // next opening so but the note, which has it write another one.
        unsettled::leave(&**self.storage, self.layout);
        manifest::install(&**self.storage, self.layout)?;
        self.report.segments = new.segments.len() as u64;
        self.remove_runs(|run| run != id);
        Ok(())
    }

    fn write_index(&mut self, segments: &Segments, gatherer: &Gatherer<'_>, id: RunId) -> Result<Option<RunRecord>> {
        let new = NewRun {
            store: segments.store(),
            id,
            unfinished: &self.layout.run_new(id),
            path: &self.layout.run(id),
            directory: &self.layout.index(),
        };
        let (report, root) = (&mut self.report, self.layout.root());
        // A delete has nothing to hide: this is the only run.
        let alive = gatherer.newest().filter(|entry| entry.as_ref().map_or(true, |entry| entry.kind == IndexKind::Put));
        let counted = alive.map(|entry| {
            let entry = entry?;
            go_on(OPERATION, root)?;
            let segment = segments.get(entry.segment).ok_or_else(|| {
                Error::damaged(
                    &self.layout.segment(entry.segment),
                    None,
                    "a commit leads to this segment, which is missing",
                )
            })?;
            segment.accounting.lock().lives(entry.length);
            report.keys += 1;
            Ok(entry)
        });
        write_run(&**self.storage, &new, gatherer.keys_at_most(), counted)
    }

    /// Removes index runs that the manifest does not name. What cannot be removed now goes at the next opening.
    fn remove_runs(&self, which: impl Fn(RunId) -> bool) {
        let directory = self.layout.index();
        for entry in self.storage.list(&directory).unwrap_or_default() {
            let named = entry.name.strip_suffix(".tmp").unwrap_or(&entry.name);
            if !RunId::from_file_name(named).is_some_and(&which) {
                continue;
            }
            let path = directory.join(&entry.name);
            if let Err(error) = self.storage.remove(&path) {
                tracing::warn!(path = %path.display(), %error, "an index run that nothing names could not be removed");
            }
        }
    }

    /// An error where nobody waits for it any more.
    fn go_on(&self) -> Result<()> {
        go_on(OPERATION, self.layout.root())
    }

    fn advance(&mut self, bytes: u64) {
        self.bytes_done += bytes;
        let bytes_done = self.bytes_done.min(self.bytes_total);
        (self.progress)(RebuildProgress { bytes_done, bytes_total: self.bytes_total });
    }
}

/// Ends a segment's account where its commits do.
fn settle(segment: &Segment, end: &Link, sealed: bool) {
    let mut accounting = segment.accounting.lock();
    (accounting.end, accounting.previous_digest) = (end.offset, end.digest);
    if sealed {
        segment.seal(end.offset);
    }
}

fn lost(segment: &Segment, offset: u64, what: &str) -> Error {
    Error::damaged(&segment.path, offset, format!("{what}; nothing was changed. `repair` salvages what is whole"))
}
