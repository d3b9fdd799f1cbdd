//! The disk as its user sees it now: every call's meaning, without counting, failing or recording.
//!
//! # Invariants
//! - A method that answers an error has changed nothing.
//! - Whatever a crash could show of a change is pushed to `effects`, when somebody records.
//! - A file lives as long as a name or a handle leads to it.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;
use std::path::Path;

use super::super::{Caching, DirEntry, FileFacts, OpenMode};
use super::content::{Content, PAGE_BYTES};
use super::faults::FaultKind;
use super::image::{DirId, FileId, Image, NameChange, Node, Place, errno};
use super::trace::{Edit, Effect};

/// What a disk without a limit says is free.
const UNLIMITED_BYTES: u64 = 1 << 50;

/// What the twin's file system can do beside what every one can.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Abilities {
    /// Whether [`StorageFile::direct`](crate::storage::StorageFile::direct) is true.
    pub direct: bool,
    /// Whether files can be mapped; `Unsupported` otherwise.
    pub map: bool,
    /// Whether space can be taken ahead; `Unsupported` otherwise.
    pub allocate: bool,
    /// Whether holes can be punched; `Unsupported` otherwise.
    pub punch: bool,
    /// Whether bytes can be locked; `Unsupported` otherwise.
    pub share_bytes: bool,
    /// Whether a file can have a second name; `Unsupported` otherwise.
    pub link: bool,
    /// Whether two files can share their space; `Unsupported` otherwise.
    pub reflink: bool,
    /// What is said of any page when asked whether it is cached.
    pub resident: Option<bool>,
}

impl Default for Abilities {
    /// Everything, and nobody knows what is cached.
    fn default() -> Self {
        Self {
            direct: true,
            map: true,
            allocate: true,
            punch: true,
            share_bytes: true,
            link: true,
            reflink: true,
            resident: None,
        }
    }
}

/// The mappings of one file.
#[derive(Debug, Clone, Copy, Default)]
struct Mapped {
    count: usize,
    /// The longest of them since there was none.
    len: u64,
}

#[derive(Debug)]
pub(super) struct Live {
    pub(super) image: Image,
    pub(super) next_id: u64,
    pub(super) capacity: Option<u64>,
    pub(super) read_only: bool,
    pub(super) abilities: Abilities,
    handles: BTreeMap<FileId, usize>,
    /// Files that handles alone lead to.
    nameless: BTreeSet<FileId>,
    locked: BTreeSet<FileId>,
    /// How many hold a shared lock on a byte.
    shared: BTreeMap<(FileId, u64), usize>,
    mapped: BTreeMap<FileId, Mapped>,
    /// Whether `effects` are wanted.
    pub(super) recording: bool,
    /// What the call that is being made did so far.
    pub(super) effects: Vec<Effect>,
    /// How the call that is being made fails, where it is made all the same.
    pub(super) struck: Option<FaultKind>,
}

impl Live {
    pub(super) fn new(image: Image, next_id: u64) -> Self {
        Self {
            image,
            next_id,
            capacity: None,
            read_only: false,
            abilities: Abilities::default(),
            handles: BTreeMap::new(),
            nameless: BTreeSet::new(),
            locked: BTreeSet::new(),
            shared: BTreeMap::new(),
            mapped: BTreeMap::new(),
            recording: false,
            effects: Vec::new(),
            struck: None,
        }
    }

    fn new_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id - 1
    }

    pub(super) fn writable(&self) -> io::Result<()> {
        if self.read_only { Err(errno(libc::EROFS)) } else { Ok(()) }
    }

    // Names.

    fn change_names(&mut self, change: NameChange) {
        let done = self.image.apply(&change);
        assert!(done, "a change of names was made of names that were not looked up: {change:?}");
        if self.recording {
            self.effects.push(Effect::Renamed(change));
        }
    }

    /// Opens or makes a file, and holds it: [`Live::release`] it once.
    pub(super) fn open(&mut self, path: &Path, mode: OpenMode) -> io::Result<FileId> {
        let at = self.image.place(path)?;
        let found = self.image.node(&at);
        if mode != OpenMode::Read && !(mode == OpenMode::CreateNew && found.is_some()) {
            self.writable()?;
        }
        let file = match (found, mode) {
            (Some(_), OpenMode::CreateNew) => return Err(errno(libc::EEXIST)),
            (Some(Node::Dir(_)), _) => return Err(errno(libc::EISDIR)),
            (None, OpenMode::Read | OpenMode::ReadWrite) => return Err(errno(libc::ENOENT)),
            (Some(Node::File(file)), OpenMode::CreateTruncate) => {
                self.edit(file, Edit::Truncate(0), |content| content.truncate(0));
                file
            }
            (Some(Node::File(file)), _) => file,
            (None, _) => {
                let file = FileId(self.new_id());
                self.image.files.insert(file, Content::default());
                self.change_names(NameChange::Link { at, node: Node::File(file) });
                file
            }
        };
        *self.handles.entry(file).or_default() += 1;
        Ok(file)
    }

    pub(super) fn release(&mut self, file: FileId) {
        let handles = self.handles.get_mut(&file).expect("a handle is counted from its opening to its end");
        *handles -= 1;
        if *handles == 0 {
            self.handles.remove(&file);
            if self.nameless.remove(&file) {
                self.image.files.remove(&file);
            }
        }
    }

    /// After a name of a file went.
    fn lost_a_name(&mut self, node: Node) {
        if let Node::File(file) = node {
            if self.image.linked_files().contains(&file) {
                // It has another one.
            } else if self.handles.contains_key(&file) {
                self.nameless.insert(file);
            } else {
                self.image.files.remove(&file);
            }
        }
    }

    pub(super) fn create_dir(&mut self, path: &Path) -> io::Result<()> {
        let at = match self.image.place(path) {
            // The root, or something that ends in "..": there already.
            Err(error) if error.kind() == io::ErrorKind::IsADirectory => return Err(errno(libc::EEXIST)),
            place => place?,
        };
        if self.image.node(&at).is_some() {
            return Err(errno(libc::EEXIST));
        }
        self.writable()?;
        let node = Node::Dir(DirId(self.new_id()));
        self.change_names(NameChange::Link { at, node });
        Ok(())
    }

    pub(super) fn list(&self, path: &Path) -> io::Result<Vec<DirEntry>> {
        let dir = self.image.dir(path)?;
        let entry = |(name, node): (&std::sync::Arc<str>, Node)| DirEntry {
            name: name.to_string(),
            is_dir: matches!(node, Node::Dir(_)),
            len_bytes: if let Node::File(file) = node { self.image.content(file).len() } else { 0 },
        };
        Ok(self.image.names(dir).map(entry).collect())
    }

    pub(super) fn rename(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        let (from, to) = (self.image.place(from)?, self.image.place(to)?);
        let node = self.image.node(&from).ok_or_else(|| errno(libc::ENOENT))?;
        let replaced = self.image.node(&to);
        if matches!(node, Node::Dir(_)) {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "the twin renames files only"));
        }
        if matches!(replaced, Some(Node::Dir(_))) {
            return Err(errno(libc::EISDIR));
        }
        self.writable()?;
        // Two names of one file are left as they are, as POSIX has it.
        if from != to && replaced != Some(node) {
            self.change_names(NameChange::Rename { from, to, node });
            if let Some(replaced) = replaced {
                self.lost_a_name(replaced);
            }
        }
        Ok(())
    }

    pub(super) fn link(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        let (node, at) = (Node::File(self.image.file(from)?), self.image.place(to)?);
        if self.image.node(&at).is_some() {
            return Err(errno(libc::EEXIST));
        }
        self.writable()?;
        if !self.abilities.link {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.change_names(NameChange::Link { at, node });
        Ok(())
    }

    /// The new file's bytes are as those of one long write: nothing of them is durable before a sync.
    pub(super) fn reflink(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        let (source, at) = (self.image.file(from)?, self.image.place(to)?);
        if self.image.node(&at).is_some() {
            return Err(errno(libc::EEXIST));
        }
        self.writable()?;
        if !self.abilities.reflink {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let content = self.image.content(source);
        // Counted as if nothing were shared: a disk that is fuller than it has to be.
        if self.capacity.is_some() && content.allocated_bytes() > self.free_bytes() {
            return Err(errno(libc::ENOSPC));
        }
        let file = FileId(self.new_id());
        self.image.files.insert(file, Content::default());
        self.change_names(NameChange::Link { at, node: Node::File(file) });
        self.edit(file, Edit::Write(0..content.len()), |target| *target = content);
        Ok(())
    }

    pub(super) fn remove(&mut self, path: &Path) -> io::Result<()> {
        let node = Node::File(self.image.file(path)?);
        let at: Place = self.image.place(path)?;
        self.writable()?;
        self.change_names(NameChange::Unlink { at, node });
        self.lost_a_name(node);
        Ok(())
    }

    pub(super) fn remove_dir(&mut self, path: &Path) -> io::Result<()> {
        let at = match self.image.place(path) {
            // The root, which is always in use.
            Err(error) if error.kind() == io::ErrorKind::IsADirectory => return Err(errno(libc::EBUSY)),
            place => place?,
        };
        let node = self.image.node(&at).ok_or_else(|| errno(libc::ENOENT))?;
        let Node::Dir(dir) = node else { return Err(errno(libc::ENOTDIR)) };
        if self.image.names(dir).next().is_some() {
            return Err(errno(libc::ENOTEMPTY));
        }
        self.writable()?;
        self.change_names(NameChange::Unlink { at, node });
        Ok(())
    }

    pub(super) fn sync_dir(&mut self, path: &Path) -> io::Result<()> {
        let dir = self.image.dir(path)?;
        let failed = self.struck == Some(FaultKind::FailedSync);
        if self.recording {
            self.effects.push(if failed { Effect::DirSyncFailed(dir) } else { Effect::DirSynced(dir) });
        }
        if failed { Err(errno(libc::EIO)) } else { Ok(()) }
    }

    /// Takes a lock on a file, made when absent, and holds the file: [`Live::unlock`] it once.
    pub(super) fn lock(&mut self, path: &Path, holder: &str) -> io::Result<FileId> {
        let made = match self.open(path, OpenMode::ReadWrite) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.open(path, OpenMode::CreateNew),
            answer => answer,
        };
        let file = made?;
        if !self.locked.insert(file) {
            self.release(file);
            return Err(errno(libc::EWOULDBLOCK));
        }
        let len = holder.len() as u64;
        self.edit(file, Edit::Write(0..len), |content| content.write(holder.as_bytes(), 0));
        self.edit(file, Edit::Truncate(len), |content| content.truncate(len));
        Ok(file)
    }

    pub(super) fn unlock(&mut self, file: FileId) {
        self.locked.remove(&file);
        self.release(file);
    }

    /// Takes a shared lock on a byte of a file, made when absent, and holds the file: [`Live::unshare_byte`] it once.
    pub(super) fn share_byte(&mut self, path: &Path, byte: u64) -> io::Result<FileId> {
        if !self.abilities.share_bytes {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let file = match self.open(path, OpenMode::Read) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.open(path, OpenMode::CreateNew),
            answer => answer,
        }?;
        *self.shared.entry((file, byte)).or_default() += 1;
        Ok(file)
    }

    pub(super) fn unshare_byte(&mut self, file: FileId, byte: u64) {
        let holders = self.shared.get_mut(&(file, byte)).expect("a byte is shared until its guard is dropped");
        *holders -= 1;
        if *holders == 0 {
            self.shared.remove(&(file, byte));
        }
        self.release(file);
    }

    pub(super) fn lowest_shared_byte(&self, path: &Path, through: u64) -> io::Result<Option<u64>> {
        if !self.abilities.share_bytes {
            return Err(io::ErrorKind::Unsupported.into());
        }
        match self.image.file(path) {
            Ok(file) => Ok(self.shared.range((file, 0)..=(file, through)).next().map(|(&(_, byte), _)| byte)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    // Space.

    /// The bytes that can still be taken.
    pub(super) fn free_bytes(&self) -> u64 {
        let files = self.image.linked_files();
        let taken = files.union(&self.nameless).map(|&file| self.image.content(file).allocated_bytes());
        self.capacity.unwrap_or(UNLIMITED_BYTES).saturating_sub(taken.sum())
    }

    /// How much of a range there is space for, from its start.
    fn room(&self, file: FileId, range: Range<u64>) -> Range<u64> {
        if self.capacity.is_none() {
            return range;
        }
        let (free, content) = (self.free_bytes(), self.image.content(file));
        let mut end = range.start;
        while end < range.end {
            let next = ((end / PAGE_BYTES + 1) * PAGE_BYTES).min(range.end);
            if content.allocation_missing(range.start..next) > free {
                break;
            }
            end = next;
        }
        range.start..end
    }

    // Bytes.

    fn edit(&mut self, file: FileId, edit: Edit, change: impl FnOnce(&mut Content)) {
        let content = self.image.files.entry(file).or_default();
        if let Some(mapped) = self.mapped.get(&file) {
            let spares_it = match &edit {
                Edit::Write(range) | Edit::Punch(range) => range.start >= mapped.len,
                Edit::Truncate(len) => *len >= mapped.len,
                Edit::Allocate(_) => true,
            };
            assert!(spares_it, "bytes are changed that are mapped: {edit:?}, mapped are {} bytes", mapped.len);
        }
        change(content);
        if self.recording {
            self.effects.push(Effect::Edited { file, edit, after: content.clone() });
        }
    }

    pub(super) fn read(&self, file: FileId, buf: &mut [u8], offset: u64, caching: Caching) -> usize {
        let len = if self.struck == Some(FaultKind::Short) { half(buf.len(), caching) } else { buf.len() };
        self.image.content(file).read(&mut buf[..len], offset)
    }

    pub(super) fn write(
        &mut self,
        file: FileId,
        bufs: &[io::IoSlice<'_>],
        offset: u64,
        caching: Caching,
    ) -> io::Result<usize> {
        self.writable()?;
        let asked: usize = bufs.iter().map(|buf| buf.len()).sum();
        let wanted = if self.struck == Some(FaultKind::Short) { half(asked, caching) } else { asked };
        if wanted == 0 {
            return Ok(0);
        }
        let range = self.room(file, checked(offset, wanted as u64)?);
        let taken = usize::try_from(range.end - range.start).expect("no more than was asked for");
        if taken == 0 {
            return Err(errno(libc::ENOSPC));
        }
        self.edit(file, Edit::Write(range), |content| {
            let (mut at, mut left) = (offset, taken);
            for buf in bufs {
                let now = &buf[..buf.len().min(left)];
                content.write(now, at);
                at += now.len() as u64;
                left -= now.len();
            }
        });
        Ok(taken)
    }

    pub(super) fn allocate(&mut self, file: FileId, offset: u64, len: u64) -> io::Result<()> {
        if !self.abilities.allocate {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.writable()?;
        let range = checked_nonempty(offset, len)?;
        if self.capacity.is_some() && self.image.content(file).allocation_missing(range.clone()) > self.free_bytes() {
            return Err(errno(libc::ENOSPC));
        }
        self.edit(file, Edit::Allocate(range.clone()), |content| content.allocate(range));
        Ok(())
    }

    pub(super) fn punch(&mut self, file: FileId, offset: u64, len: u64) -> io::Result<()> {
        if !self.abilities.punch {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.writable()?;
        let range = checked_nonempty(offset, len)?;
        self.edit(file, Edit::Punch(range.clone()), |content| content.punch(range));
        Ok(())
    }

    pub(super) fn truncate(&mut self, file: FileId, len: u64) -> io::Result<()> {
        self.writable()?;
        checked(len, 0)?;
        self.edit(file, Edit::Truncate(len), |content| content.truncate(len));
        Ok(())
    }

    pub(super) fn sync(&mut self, file: FileId) -> io::Result<()> {
        let failed = self.struck == Some(FaultKind::FailedSync);
        if self.recording {
            self.effects.push(if failed { Effect::SyncFailed(file) } else { Effect::Synced(file) });
        }
        if failed { Err(errno(libc::EIO)) } else { Ok(()) }
    }

    pub(super) fn facts(&self, file: FileId) -> FileFacts {
        let content = self.image.content(file);
        let links = self.image.links(file);
        FileFacts { len_bytes: content.len(), allocated_bytes: content.allocated_bytes(), links }
    }

    /// The first bytes of a file, as they are now, which nobody may change until [`Live::unmap`].
    pub(super) fn map(&mut self, file: FileId, len: usize) -> io::Result<Vec<u8>> {
        let content = self.image.content(file);
        if len as u64 > content.len() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a mapping longer than its file"));
        }
        if !self.abilities.map {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let mut bytes = vec![0; len];
        content.read(&mut bytes, 0);
        let mapped = self.mapped.entry(file).or_default();
        mapped.count += 1;
        mapped.len = mapped.len.max(len as u64);
        Ok(bytes)
    }

    pub(super) fn unmap(&mut self, file: FileId) {
        let mapped = self.mapped.get_mut(&file).expect("a mapping is counted from its making to its end");
        mapped.count -= 1;
        if mapped.count == 0 {
            self.mapped.remove(&file);
        }
    }
}

/// Half of a transfer: at least a byte, and whole sectors past the page cache.
fn half(len: usize, caching: Caching) -> usize {
    let half = (len / 2).max(len.min(1));
    match caching {
        Caching::Buffered | Caching::Cached => half,
        Caching::Direct => half.next_multiple_of(512).min(len),
    }
}

fn checked(offset: u64, len: u64) -> io::Result<Range<u64>> {
    let end = offset.checked_add(len).filter(|&end| i64::try_from(end).is_ok());
    Ok(offset..end.ok_or_else(|| errno(libc::EINVAL))?)
}

fn checked_nonempty(offset: u64, len: u64) -> io::Result<Range<u64>> {
    if len == 0 { Err(errno(libc::EINVAL)) } else { checked(offset, len) }
}
