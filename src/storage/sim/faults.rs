//! Calls that fail on purpose: which one, and how.
//!
//! # Invariants
//! - A fault shows only what the real file system can answer: a kind that a call cannot show passes it by.
//! - A call that fails has no effect, but where the kind says that it has.

use std::io;
use std::path::Path;

use super::image::errno;
use super::sabotage::ends_with;
use super::trace::OpKind;

/// How a call fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FaultKind {
    /// The device failed (`EIO`); nothing was done. A sync that fails so leaves the writes to a later sync.
    Eio,
    /// The device failed, and yet the call was done. Passes locks and mappings by.
    EioAfter,
    /// The disk is full. Passes by calls that take no space.
    Enospc,
    /// The user's quota is used up. Passes by calls that take no space.
    Edquot,
    /// A signal came first. Passes by calls that the standard library repeats by itself.
    Eintr,
    /// Half of the bytes are moved, at least one, and whole sectors past the page cache. Reads and writes alone.
    Short,
    /// The sync fails (`EIO`), and the kernel then takes the changes that it covered for written: they stay readable,
    /// a crash may or may not show them, and no later sync makes them durable. Syncs of files and directories alone.
    FailedSync,
}

impl FaultKind {
    /// Every kind.
    pub const ALL: [FaultKind; 7] =
        [Self::Eio, Self::EioAfter, Self::Enospc, Self::Edquot, Self::Eintr, Self::Short, Self::FailedSync];

    /// Whether a call can fail like this.
    pub fn can_strike(self, op: OpKind) -> bool {
        match self {
            Self::Eio => true,
            Self::EioAfter => !matches!(op, OpKind::Lock | OpKind::ShareByte | OpKind::Map),
            Self::Enospc | Self::Edquot => matches!(
                op,
                OpKind::Open
                    | OpKind::CreateDir
                    | OpKind::Rename
                    | OpKind::Link
                    | OpKind::Reflink
                    | OpKind::Lock
                    | OpKind::ShareByte
                    | OpKind::Write
                    | OpKind::Allocate
                    | OpKind::Punch
                    | OpKind::Sync
                    | OpKind::SyncDir
            ),
            Self::Eintr => matches!(
                op,
                OpKind::Read | OpKind::Write | OpKind::Allocate | OpKind::Punch | OpKind::Sync | OpKind::SyncDir
            ),
            Self::Short => matches!(op, OpKind::Read | OpKind::Write),
            Self::FailedSync => matches!(op, OpKind::Sync | OpKind::SyncDir),
        }
    }

    /// The error that a call is answered with instead of being made; `None` where it is made all the same.
    pub(super) fn refusal(self) -> Option<io::Error> {
        match self {
            Self::Eio => Some(errno(libc::EIO)),
            Self::Enospc => Some(errno(libc::ENOSPC)),
            Self::Edquot => Some(errno(libc::EDQUOT)),
            Self::Eintr => Some(errno(libc::EINTR)),
            Self::EioAfter | Self::Short | Self::FailedSync => None,
        }
    }
}

/// A failure to come: of the `nth` call that matches, counted from zero since it was injected.
#[derive(Debug, Clone)]
pub struct Fault {
    kind: FaultKind,
    nth: u64,
    op: Option<OpKind>,
    path_suffix: Option<String>,
    from_then_on: bool,
    matched: u64,
}

impl Fault {
    /// The `nth` call of any kind on any path fails, once.
    pub fn new(kind: FaultKind, nth: u64) -> Self {
        Self { kind, nth, op: None, path_suffix: None, from_then_on: false, matched: 0 }
    }

    /// Counts only calls of this kind.
    pub fn on(mut self, op: OpKind) -> Self {
        self.op = Some(op);
        self
    }

    /// Counts only calls whose path ends like this; of two paths, either.
    pub fn path_ending(mut self, suffix: impl Into<String>) -> Self {
        self.path_suffix = Some(suffix.into());
        self
    }

    /// Fails every later match as well.
    pub fn from_then_on(mut self) -> Self {
        self.from_then_on = true;
        self
    }

    /// Counts the call if it matches, and answers how it fails if it is its turn.
    pub(super) fn strike(&mut self, op: OpKind, path: &Path, to: Option<&Path>) -> Option<FaultKind> {
        let on_path = self
            .path_suffix
            .as_deref()
            .is_none_or(|suffix| ends_with(path, suffix) || to.is_some_and(|to| ends_with(to, suffix)));
        if !on_path || self.op.is_some_and(|only| only != op) {
            return None;
        }
        let turn = self.matched == self.nth || self.from_then_on && self.matched > self.nth;
        self.matched += 1;
        (turn && self.kind.can_strike(op)).then_some(self.kind)
    }
}
