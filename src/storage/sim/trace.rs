//! What was asked of the twin, in order, and what each call did to the disk.
//!
//! # Invariants
//! - Calls stand in the order in which they took effect; a marker stands after every call that had returned to its
//!   thread by then.
//! - An effect carries the file as it was after the call, so that replaying one costs the same however large it was.

use std::fmt;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::thread::ThreadId;

use super::content::Content;
use super::crash::CrashWalker;
use super::image::{DirId, FileId, Image, NameChange};
use super::sabotage::Sabotage;

/// Which method of the storage was called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[expect(missing_docs, reason = "each is named after the method that it stands for")]
pub enum OpKind {
    Open,
    CreateDir,
    List,
    Rename,
    Link,
    Reflink,
    Remove,
    RemoveDir,
    SyncDir,
    Lock,
    LockHolder,
    ShareByte,
    LowestSharedByte,
    FreeBytes,
    Read,
    Write,
    Allocate,
    Punch,
    Truncate,
    Sync,
    Facts,
    NextData,
    Map,
    Resident,
}

/// One call, and how it went.
#[derive(Debug, Clone)]
pub struct Call {
    /// How many calls the disk had answered before, since it was made.
    pub index: u64,
    /// The method.
    pub op: OpKind,
    /// The path that was given, or that the file was opened by.
    pub path: Arc<Path>,
    /// The path that a rename, a link or a reflink leads to.
    pub to: Option<Arc<Path>>,
    /// Where in the file; zero where that means nothing.
    pub offset: u64,
    /// How many bytes were asked for; zero where that means nothing.
    pub len: u64,
    /// How many bytes were moved, or why the call failed.
    pub outcome: Result<u64, io::ErrorKind>,
    /// The thread that called.
    pub thread: ThreadId,
}

/// One line of a trace.
#[derive(Debug, Clone)]
pub enum Event {
    /// A call of the storage or of one of its files.
    Call(Call),
    /// A number that the test left here: "commit 7 was acknowledged".
    Marker(u64),
    /// A word that the test left here for whoever reads the trace.
    Note(String),
    /// The test changed the disk behind the store's back; the change is durable.
    Tampered,
}

/// What a call does to a file's bytes, beside what they were after it.
#[derive(Debug, Clone)]
pub(super) enum Edit {
    Write(Range<u64>),
    Allocate(Range<u64>),
    Punch(Range<u64>),
    Truncate(u64),
}

/// What a call did, as far as a crash can show it.
#[derive(Debug, Clone)]
pub(super) enum Effect {
    Edited { file: FileId, edit: Edit, after: Content },
    Renamed(NameChange),
    Synced(FileId),
    SyncFailed(FileId),
    DirSynced(DirId),
    DirSyncFailed(DirId),
    Replaced(Image),
}

#[derive(Debug, Clone)]
pub(super) struct Step {
    pub(super) event: Event,
    pub(super) effects: Vec<Effect>,
}

/// A recorded run: the disk as it was, and everything that was asked of it since. A clone is the same trace.
#[derive(Debug, Clone)]
pub struct Trace {
    pub(super) base: Image,
    pub(super) steps: Arc<Vec<Step>>,
    pub(super) sabotage: Sabotage,
    /// No file or directory of this trace has an id as high.
    pub(super) next_id: u64,
}

impl Trace {
    /// How many events were recorded.
    pub fn len(&self) -> usize {
        self.steps.len()
    }

    /// Whether nothing was recorded.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// The events in order.
    pub fn events(&self) -> impl ExactSizeIterator<Item = &Event> {
        self.steps.iter().map(|step| &step.event)
    }

    /// A walk from the beginning over everything that a crash during this run could leave behind.
    pub fn walk(&self) -> CrashWalker {
        CrashWalker::new(self.clone())
    }

    /// [`Trace::walk`], with the first `events` events done.
    pub fn walk_to(&self, events: usize) -> CrashWalker {
        let mut walker = self.walk();
        while walker.position() < events && walker.advance() {}
        walker
    }
}

impl fmt::Display for OpKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Open => "open",
            Self::CreateDir => "create_dir",
            Self::List => "list",
            Self::Rename => "rename",
            Self::Link => "link",
            Self::Reflink => "reflink",
            Self::Remove => "remove",
            Self::RemoveDir => "remove_dir",
            Self::SyncDir => "sync_dir",
            Self::Lock => "lock",
            Self::LockHolder => "lock_holder",
            Self::ShareByte => "share_byte",
            Self::LowestSharedByte => "lowest_shared_byte",
            Self::FreeBytes => "free_bytes",
            Self::Read => "read",
            Self::Write => "write",
            Self::Allocate => "allocate",
            Self::Punch => "punch",
            Self::Truncate => "truncate",
            Self::Sync => "sync",
            Self::Facts => "facts",
            Self::NextData => "next_data",
            Self::Map => "map",
            Self::Resident => "resident",
        })
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{:<5} {:<11} {}", self.index, self.op, self.path.display())?;
        if let Some(to) = &self.to {
            write!(f, " -> {}", to.display())?;
        }
        if self.offset != 0 || self.len != 0 {
            write!(f, " [{} +{}]", self.offset, self.len)?;
        }
        match self.outcome {
            Ok(moved) if moved != self.len => write!(f, " = {moved}"),
            Ok(_) => Ok(()),
            Err(kind) => write!(f, " = {kind}"),
        }
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Call(call) => call.fmt(f),
            Self::Marker(number) => write!(f, "------ marker {number}"),
            Self::Note(words) => write!(f, "------ {words}"),
            Self::Tampered => f.write_str("------ changed behind the store's back"),
        }
    }
}

/// One event a line, each with its position: the number of events done once it is.
impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, event) in self.events().enumerate() {
            writeln!(f, "{:>6}  {event}", i + 1)?;
        }
        Ok(())
    }
}
