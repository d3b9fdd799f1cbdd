//! A live backup: another directory that is a store of its own, with one version of this one in it.
//!
//! A segment that nobody writes to any more gets a second name there; where that cannot be, and for the segments that
//! commits still go to, its bytes are shared or copied up to the end of the last commit of that version. Index runs get a
//! second name too, and what is in memory of the index becomes one more run. The manifest comes last.
//!
//! # Invariants
//! - A file is linked only when it is sealed, ends where its commits end, and all of it is durable: nothing appends to it,
//!   cuts it or fills it again. Holes may be punched into it only while it has one name.
//! - The manifest of the backup is written when everything it names is durable under its name: until then the place is no
//!   store, whatever happens.
//! - The store itself is not changed: a backup reads, and gives second names.
//! - The version is held until the backup is done, so that nothing it leads to is given back meanwhile.

use std::io;
use std::ops::{Bound, Range};
use std::path::{Path, PathBuf};

use alight_format::{FeatureFlags, IndexKind, Manifest, RunId, RunRecord, SegmentId, SegmentRecord, is_zero, limits};

use crate::config::READ_BYTES;
use crate::error::{Error, Result};
use crate::index::{NewRun, Run, Version, merge_layers, write_run};
use crate::storage::{AlignedBuf, Caching, OpenMode, Storage, StorageFile, StorageLock, read_exact_at, write_all_at};
use crate::store::core::Core;
use crate::store::layout::Layout;
use crate::store::making::{Place, look, make_parts, make_root, take_lock};
use crate::store::manifest;
use crate::store::segment::FIRST_FRAME;
use crate::store::watch::go_on;

/// What holes are made of.
const BLOCK: usize = limits::BLOCK_BYTES as usize;

/// How far a backup has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct BackupProgress {
    /// Bytes that are in the backup so far, linked ones included.
    pub bytes_done: u64,
    /// Bytes that will be in it.
    pub bytes_total: u64,
}

/// What a backup came to; made by [`Store::backup`](crate::Store::backup).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct BackupReport {
    /// The number of the last commit in it.
    pub last_commit: u64,
    /// Segments and index runs in it.
    pub files: u64,
    /// Bytes of files that got a second name, and take no space of their own.
    pub linked_bytes: u64,
    /// Bytes of files that share their space with the store's until one of the two is changed.
    pub shared_bytes: u64,
    /// Bytes that were copied.
    pub copied_bytes: u64,
}

/// Makes a backup of the latest version at `path`.
pub(crate) fn back_up(core: &Core, path: &Path, progress: &mut dyn FnMut(BackupProgress)) -> Result<BackupReport> {
    let (version, records) = core.view()?;
    if let Ok(writer) = core.writer() {
        // What is linked must be durable; what is copied is synced there.
        writer.committer.sync_through(version.seq)?;
    }
    if path.starts_with(core.layout.root()) {
        let why = format!("{} lies in the store itself", path.display());
        return Err(Error::InvalidOption { option: "the backup's path", why });
    }
    let mut backup = Backup {
        storage: &*core.storage,
        source: &core.layout,
        target: Layout::new(path),
        made: Vec::new(),
        report: BackupReport { last_commit: version.seq.get(), ..BackupReport::default() },
        bytes_total: records.iter().map(|record| record.end).sum::<u64>()
            + version.runs.iter().map(|run| run.len_bytes()).sum::<u64>(),
        progress,
    };
    let lock = backup.claim()?;
    let outcome = backup.fill(core, &version, &records);
    if outcome.is_err() {
        backup.undo();
    }
    drop(lock);
    outcome.map(|()| backup.report)
}

struct Backup<'a> {
    storage: &'a dyn Storage,
    source: &'a Layout,
    target: Layout,
    /// What is to be removed when the backup fails.
    made: Vec<PathBuf>,
    report: BackupReport,
    bytes_total: u64,
    progress: &'a mut dyn FnMut(BackupProgress),
}

impl Backup<'_> {
    /// Makes the directories, and sees to it that nobody else fills them.
    fn claim(&mut self) -> Result<Box<dyn StorageLock>> {
        self.free()?;
        make_root(self.storage, self.target.root())?;
        let lock = take_lock(self.storage, &self.target)?;
        // Another process may have come between.
        self.free()?;
        make_parts(self.storage, &self.target)?;
        Ok(lock)
    }

    /// An error where something is there. What a failed backup leaves, empty directories, is nothing.
    fn free(&self) -> Result<()> {
        let root = self.target.root();
        let taken = || Error::AlreadyExists { path: root.to_path_buf() };
        match look(self.storage, &self.target) {
            Ok(Place::Absent | Place::Empty) => Ok(()),
            Ok(Place::HalfMade) => match self.storage.list(&self.target.index()) {
                Ok(names) if !names.is_empty() => Err(taken()),
                Ok(_) => Ok(()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                Err(error) => Err(Error::io("list", &self.target.index())(error)),
            },
            Ok(_) | Err(Error::Damaged(_)) => Err(taken()),
            Err(error) => Err(error),
        }
    }

    fn fill(&mut self, core: &Core, version: &Version, records: &[SegmentRecord]) -> Result<()> {
        let mut segments = Vec::with_capacity(records.len());
        for record in records.iter().filter(|record| record.end > FIRST_FRAME) {
            self.segment(core, record)?;
            segments.push(*record);
        }
        let mut runs = Vec::with_capacity(version.runs.len() + 1);
        for run in version.runs.iter() {
            self.run(run)?;
            runs.push(*run.record());
        }
        // Its number is above all that are there, and so are those of whatever the backup becomes.
        let id = RunId(runs.iter().map(|run| run.id.get()).max().unwrap_or(0) + 1);
        let sync_names = |directory: PathBuf| self.storage.sync_dir(&directory).map_err(Error::io("sync", &directory));
        match self.newest_run(core, version, id)? {
            // Whoever wrote it has synced the directory, with the names of the others in it.
            Some(newest) => runs.insert(0, newest),
            None => sync_names(self.target.index())?,
        }
        sync_names(self.target.segments())?;
        let settings = manifest::read(self.storage, self.source)?;
        let next_segment = SegmentId(segments.last().map_or(0, |last: &SegmentRecord| last.id.get()) + 1);
        let manifest = Manifest {
            // An unknown compatible feature is kept; others would not have let the store be opened.
            flags: FeatureFlags { incompatible: 0, ..settings.flags },
            generation: settings.generation,
            covered: version.seq,
            next_segment: next_segment.max(settings.next_segment),
            next_run: RunId(id.get() + 1),
            segments,
            runs,
            ..Manifest::new(core.segments.store(), settings.segment_bytes)
        };
        self.made.extend([self.target.manifest_new(), self.target.manifest()]);
        self.check_wanted()?;
        manifest::write(self.storage, &self.target, &manifest)?;
        // Who was told that it failed must not find a store.
        self.check_wanted()
    }

    /// An error where nobody waits for the backup any more.
    fn check_wanted(&self) -> Result<()> {
        go_on("backup", self.target.root())
    }

    /// Brings a segment over, by the cheapest way there is.
    fn segment(&mut self, core: &Core, record: &SegmentRecord) -> Result<()> {
        let (from, to) = (self.source.segment(record.id), self.target.segment(record.id));
        let file = self.storage.open(&from, OpenMode::Read).map_err(Error::io("open", &from))?;
        let len_bytes = file.facts().map_err(Error::io("measure", &from))?.len_bytes;
        if len_bytes < record.end {
            let what = format!("the file has {len_bytes} bytes, and commits reach to byte {}", record.end);
            return Err(Error::damaged(&from, len_bytes, what));
        }
        self.made.push(to.clone());
        self.report.files += 1;
        // One that is longer than its commits may still be cut.
        let linked = record.sealed && len_bytes == record.end && {
            // Whoever punches holes looks at the number of names first: not between that look and the holes.
            let _none_is_punched = core.writer().ok().map(|writer| writer.reclaim.lock());
            self.may(self.storage.link(&from, &to), "link", &to)?
        };
        if linked {
            self.report.linked_bytes += record.end;
        } else if self.may(self.storage.reflink(&from, &to), "clone", &to)? {
            let target = self.storage.open(&to, OpenMode::ReadWrite).map_err(Error::io("open", &to))?;
            target.truncate(record.end).map_err(Error::io("cut", &to))?;
            target.sync().map_err(Error::io("sync", &to))?;
            self.report.shared_bytes += record.end;
        } else {
            self.copy(&*file, &from, &to, record.end)?;
            self.report.copied_bytes += record.end;
        }
        self.tell();
        self.check_wanted()
    }

    /// Whether a way of bringing a file over can be had here; a failure that is none of the way's is an error.
    fn may(&self, answer: io::Result<()>, action: &'static str, to: &Path) -> Result<bool> {
        match answer {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(false),
            Err(error) => Err(Error::io(action, to)(error)),
        }
    }

    /// Copies the first `end` bytes, whole blocks, and leaves holes where they are. The bytes are those on the disk: what
    /// is damaged there is damaged in the copy, and found by whoever reads it.
    fn copy(&mut self, source: &dyn StorageFile, from: &Path, to: &Path, end: u64) -> Result<()> {
        let target = self.storage.open(to, OpenMode::CreateNew).map_err(Error::io("create", to))?;
        target.truncate(end).map_err(Error::io("lengthen", to))?;
        let mut window = AlignedBuf::zeroed(READ_BYTES.min(end as usize));
        let mut at = 0;
        while let Some(data) = source.next_data(at).map_err(Error::io("search", from))? {
            at = at.max(data / limits::BLOCK_BYTES * limits::BLOCK_BYTES);
            if at >= end {
                break;
            }
            let piece = &mut window[..(end - at).min(READ_BYTES as u64) as usize];
            read_exact_at(source, piece, at, Caching::Direct).map_err(Error::io("read", from))?;
            for data in data_in(source, piece, at).map_err(Error::io("search", from))? {
                let offset = at + data.start as u64;
                write_all_at(&*target, &piece[data], offset, Caching::Direct).map_err(Error::io("write", to))?;
            }
            at += piece.len() as u64;
            let before = self.report;
            self.report.copied_bytes += at;
            self.tell();
            self.check_wanted()?;
            self.report = before;
        }
        target.sync().map_err(Error::io("sync", to))
    }

    /// Brings an index run over. The writer may have replaced it since: then its bytes are still held open.
    fn run(&mut self, run: &Run) -> Result<()> {
        let (from, to) = (self.source.run(run.id()), self.target.run(run.id()));
        self.made.push(to.clone());
        self.report.files += 1;
        let linked = match self.storage.link(&from, &to) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            answer => self.may(answer, "link", &to)?,
        };
        if linked {
            self.report.linked_bytes += run.len_bytes();
        } else {
            let target = self.storage.open(&to, OpenMode::CreateNew).map_err(Error::io("create", &to))?;
            run.copy_to(&*target, &to)?;
            target.sync().map_err(Error::io("sync", &to))?;
            self.report.copied_bytes += run.len_bytes();
        }
        self.tell();
        self.check_wanted()
    }

    /// Writes what the store has in memory of its index as the backup's newest run; `None` where there is nothing.
    fn newest_run(&mut self, core: &Core, version: &Version, id: RunId) -> Result<Option<RunRecord>> {
        let (unfinished, path, directory) = (self.target.run_new(id), self.target.run(id), self.target.index());
        self.made.extend([unfinished.clone(), path.clone()]);
        let new =
            NewRun { store: core.segments.store(), id, unfinished: &unfinished, path: &path, directory: &directory };
        let overlays = [&version.overlay, &version.frozen];
        // A delete has nothing to hide where there is no older run.
        let keep_deletes = !version.runs.is_empty();
        let entries = merge_layers(&overlays, &[], Bound::Unbounded)?
            .filter(|entry| entry.as_ref().map_or(true, |entry| keep_deletes || entry.kind == IndexKind::Put));
        let expected = (version.overlay.len() + version.frozen.len()) as u64;
        let record = write_run(self.storage, &new, expected, entries)?;
        if let Some(record) = &record {
            self.report.files += 1;
            self.report.copied_bytes += record.bytes;
        }
        Ok(record)
    }

    fn tell(&mut self) {
        let BackupReport { linked_bytes, shared_bytes, copied_bytes, .. } = self.report;
        let bytes_done = (linked_bytes + shared_bytes + copied_bytes).min(self.bytes_total);
        (self.progress)(BackupProgress { bytes_done, bytes_total: self.bytes_total });
    }

    /// Takes away what was made, the manifest first.
    fn undo(&mut self) {
        for path in self.made.drain(..).rev() {
            match self.storage.remove(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(path = %path.display(), %error, "a part of a failed backup could not be removed");
                }
                _ => {}
            }
        }
        // A power cut should not bring the manifest back; without one there is nothing to be opened either way.
        if let Err(error) = self.storage.sync_dir(self.target.root()) {
            tracing::warn!(path = %self.target.root().display(), %error, "a failed backup's removal is not durable");
        }
    }
}

/// Which blocks of `piece`, as it was read at `at`, are no holes: stretches of neighbours. A hole reads as zeros, so only
/// blocks of zeros are asked about.
fn data_in(source: &dyn StorageFile, piece: &[u8], at: u64) -> io::Result<Vec<Range<usize>>> {
    let mut stretches: Vec<Range<usize>> = Vec::new();
    for start in (0..piece.len()).step_by(BLOCK) {
        let end = (start + BLOCK).min(piece.len());
        let offset = at + start as u64;
        let is_hole =
            is_zero(&piece[start..end]) && source.next_data(offset)?.is_none_or(|data| data >= offset + BLOCK as u64);
        match stretches.last_mut() {
            _ if is_hole => {}
            Some(last) if last.end == start => last.end = end,
            _ => stretches.push(start..end),
        }
    }
    Ok(stretches)
}
