//! The first operation of each kind runs alone: while it does, no other thread of this process is in cuFile through alight.
//!
//! cuFile makes what it needs (threads, queues) when an operation first asks for it, and does not look whether another thread
//! is making it too. Seen on 1.15, in compatibility mode: the first operation on a stream fails with `EIO`, and cuFile's log
//! says "cufile must support threadpool in order for posix stream IO to work", when another thread registers its first file,
//! or reads or sets up a batch for the first time, at that moment. Alone it never fails.
//!
//! # Invariants
//! - Once a first of every kind is done, nobody takes a lock here.
//! - Nobody waits for ever: a call that cuFile does not come back from delays others by [`PATIENCE`], and no longer.
//! - Who has a turn asks for no other.

use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use parking_lot::{RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Firsts take milliseconds. What takes longer is a large transfer of somebody else, or is stuck.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// Kinds of operations that are set up apart from one another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Registering a file.
    File,
    /// Registering device memory.
    Memory,
    /// A transfer that blocks.
    Transfer,
    /// Setting up a batch.
    BatchSetUp,
    /// Submitting a batch.
    Batch,
    /// Registering a stream.
    StreamSetUp,
    /// A transfer on a stream, until the stream has passed it.
    Stream,
}

/// All kinds.
const ALL: u8 = (1 << (Kind::Stream as u8 + 1)) - 1;

impl Kind {
    fn bit(self) -> u8 {
        1 << self as u8
    }
}

/// Which firsts are done, and whose turn it is.
#[derive(Debug, Default)]
pub(super) struct Firsts {
    done: AtomicU8,
    turn: RwLock<()>,
}

/// The right to call cuFile; given back when it is dropped.
#[must_use = "a turn that is dropped at once protects nothing"]
pub(super) struct Turn<'f> {
    firsts: &'f Firsts,
    held: Held<'f>,
}

enum Held<'f> {
    /// The first of its kind.
    Alone(Kind, #[expect(dead_code, reason = "held until it is dropped")] RwLockWriteGuard<'f, ()>),
    /// With others, none of which is a first.
    Shared(#[expect(dead_code, reason = "held until it is dropped")] RwLockReadGuard<'f, ()>),
    /// Every first is done, or one is stuck.
    Free,
}

impl Firsts {
    /// Waits for a turn: alone for the first of a kind, with others for the rest.
    pub(super) fn enter(&self, kind: Kind) -> Turn<'_> {
        let turn = |held| Turn { firsts: self, held };
        let stuck = || {
            tracing::warn!(?kind, "a call of cuFile has taken longer than {PATIENCE:?}; others no longer wait for it");
            Held::Free
        };
        if self.done.load(Ordering::Acquire) == ALL {
            return turn(Held::Free);
        }
        if self.is_done(kind) {
            return turn(self.turn.try_read_for(PATIENCE).map_or_else(stuck, Held::Shared));
        }
        match self.turn.try_write_for(PATIENCE) {
            None => turn(stuck()),
            // Somebody else's was the first, while this one waited.
            Some(guard) if self.is_done(kind) => turn(Held::Shared(RwLockWriteGuard::downgrade(guard))),
            Some(guard) => turn(Held::Alone(kind, guard)),
        }
    }

    /// Whether the first of a kind is done.
    pub(super) fn is_done(&self, kind: Kind) -> bool {
        self.done.load(Ordering::Acquire) & kind.bit() != 0
    }

    /// Takes all firsts for done: for tests of what comes after.
    #[cfg(test)]
    pub(super) fn skip(&self) {
        self.done.store(ALL, Ordering::Release);
    }
}

impl Turn<'_> {
    /// Whether this is the first of its kind.
    pub(super) fn is_first(&self) -> bool {
        matches!(self.held, Held::Alone(..))
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if let Held::Alone(kind, _) = &self.held {
            // Before the lock is let go, which is with the fields: whoever gets it next sees this.
            self.firsts.done.fetch_or(kind.bit(), Ordering::AcqRel);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::atomic::AtomicUsize;
    use std::thread;

    use super::*;

    #[test]
    fn firsts_are_alone_and_what_follows_is_not() {
        const KINDS: [Kind; 7] =
            [Kind::File, Kind::Memory, Kind::Transfer, Kind::BatchSetUp, Kind::Batch, Kind::StreamSetUp, Kind::Stream];
        let (firsts, inside, alone) = (Firsts::default(), AtomicUsize::new(0), AtomicUsize::new(0));
        let together = Barrier::new(14);
        thread::scope(|scope| {
            for kind in KINDS.into_iter().chain(KINDS) {
                let (firsts, inside, alone, together) = (&firsts, &inside, &alone, &together);
                scope.spawn(move || {
                    together.wait();
                    let turn = firsts.enter(kind);
                    let others = inside.fetch_add(1, Ordering::SeqCst);
                    if turn.is_first() {
                        alone.fetch_add(1, Ordering::SeqCst);
                        assert_eq!(others, 0, "{kind:?}");
                        thread::sleep(Duration::from_millis(3));
                        assert_eq!(inside.load(Ordering::SeqCst), 1, "{kind:?}");
                    }
                    inside.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        assert_eq!(alone.into_inner(), KINDS.len());
        // Nobody waits for anybody any more.
        let turns: Vec<Turn<'_>> = KINDS.into_iter().map(|kind| firsts.enter(kind)).collect();
        assert!(turns.iter().all(|turn| matches!(turn.held, Held::Free)));
    }
}
