//! Who waits for the disk, and how long: what a caller asks for and that may get stuck is done on a thread of the store's own,
//! and the caller waits for it only while it makes progress.
//!
//! # Invariants
//! - What was given up keeps the store's lock until it ends: nobody opens the store for writing while a write may still land.
//! - A commit or a sync that was given up may have reached the disk or not, so the store refuses writes from then on, as after
//!   a failed sync.
//! - Who was told to wait no longer takes no lock that what is stuck may hold.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::device::staging::Slot;
use crate::device::transfer::Waiting;
use crate::error::{Error, Result};
use crate::io::{Job, Steps, Watched, step};
use crate::metrics::Counters;
use crate::storage::{PooledBuf, StorageLock};
use crate::store::batch::carry_out;
use crate::store::commit::{Queued, SmallCommit, Stream, begin};
use crate::store::core::{Core, Writer};
use crate::store::group::{Awaited, Extent};
use crate::sync::lock::{RwLock, RwLockWriteGuard};
use alight_format::Seq;

/// How long the caller of a commit that was given up waits for the note about it: on a disk that is stuck it is not left
/// before the disk goes on.
const NOTE_PATIENCE: Duration = Duration::from_secs(1);

impl Core {
    /// Does something on a thread of its own, and waits for it while it makes a step at least once in `deadline`; on the
    /// caller's thread where there is none. `hear` is told how far it has come.
    pub(crate) fn watch<T: Send + 'static, P: Send + 'static>(
        self: &Arc<Self>,
        operation: &'static str,
        deadline: Option<Duration>,
        hear: impl FnMut(P),
        work: impl FnOnce(&Arc<Core>, &mut dyn FnMut(P)) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.watch_steps(operation, deadline, &self.watched.steps(), hear, work)
    }

    /// [`watch`](Core::watch) of work whose steps others look at too.
    pub(crate) fn watch_steps<T: Send + 'static, P: Send + 'static>(
        self: &Arc<Self>,
        operation: &'static str,
        deadline: Option<Duration>,
        steps: &Arc<Steps>,
        mut hear: impl FnMut(P),
        work: impl FnOnce(&Arc<Core>, &mut dyn FnMut(P)) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let Some(deadline) = deadline else { return work(self, &mut hear) };
        let (core, lock) = (Arc::clone(self), self.lock());
        let outcome = self.watched.run_heard(deadline, steps, hear, move |tell| {
            let _lock = lock;
            work(&core, tell)
        });
        outcome.unwrap_or_else(|| Err(self.given_up(operation, self.layout.root().to_path_buf(), deadline)))
    }

    /// [`watch`](Core::watch) for what writes: with the deadline of writes, and told nothing.
    pub(crate) fn watch_write<T: Send + 'static>(
        self: &Arc<Self>,
        operation: &'static str,
        work: impl FnOnce(&Arc<Core>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.watch(operation, self.write_deadline, |()| {}, |core, _| work(core))
    }

    /// [`watch_write`](Core::watch_write) for what makes commits durable. Where it is given up writes are refused from then
    /// on.
    pub(crate) fn watch_commit<T: Send + 'static>(
        self: &Arc<Self>,
        operation: &'static str,
        work: impl FnOnce(&Arc<Core>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        // What is stuck has locks that others would wait for as long.
        self.writer()?.committer.check()?;
        self.watch_write(operation, work).inspect_err(|error| {
            if matches!(error, Error::Timeout { .. }) {
                self.refuse_for(error);
            }
        })
    }

    /// Has a small commit carried out together with others: by a thread of the store's own where there is a deadline, else by
    /// this one or another caller's. Where it is given up writes are refused from then on.
    pub(crate) fn commit_in_group(self: &Arc<Self>, commit: SmallCommit) -> Result<()> {
        let Writer { committer, group, .. } = self.writer()?;
        committer.check()?;
        let size_bytes = commit.bytes.len() as u64;
        let outcome = match self.write_deadline {
            None => group.commit(Queued::Whole(commit), size_bytes, || self.lead_one(), None),
            Some(deadline) => {
                let patience = self.commit_steps.patience(deadline);
                group.commit(Queued::Whole(commit), size_bytes, || self.lead_apart(), Some(patience))
            }
        };
        self.judge(outcome)
    }

    /// Begins a commit that is written while its bytes are copied into `buffer`, behind room for the frame and `lent_len` bytes that
    /// are lent instead, by a thread of the store's own. Nothing where there is no such thread, or others are at work, whom it would
    /// keep waiting.
    pub(crate) fn begin_in_group(
        self: &Arc<Self>,
        buffer: PooledBuf,
        frame_len: u64,
        lent_len: u64,
        durable: bool,
    ) -> Result<Option<(Begun<'_>, Stream)>> {
        let Writer { committer, group, .. } = self.writer()?;
        committer.check()?;
        if self.write_deadline.is_none() {
            return Ok(None);
        }
        // As large as a group may be, so that it is one.
        let begun = group.begin(u64::MAX, || {
            let (streamed, stream) = begin(buffer, frame_len, lent_len, durable);
            (Queued::Streamed(streamed), stream)
        });
        Ok(begun.map(|(awaited, stream)| {
            let unled = self.watched.start(self.leading()).err();
            (Begun { core: self, awaited, unled }, stream)
        }))
    }

    /// Carries out one group, for a caller who has a commit of its own in it.
    fn lead_one(&self) {
        if let Ok(Writer { committer, group, .. }) = self.writer() {
            group.carry_on(Extent::OneGroup, committer.group_bytes(), |group| carry_out(self, group));
        }
    }

    /// Has a thread of the store's own carry out what is queued; the caller's where the system gives none.
    fn lead_apart(self: &Arc<Self>) {
        if let Err(work) = self.watched.start(self.leading()) {
            work();
        }
    }

    /// Carries out whatever is queued.
    fn leading(self: &Arc<Self>) -> Job {
        let core = Arc::clone(self);
        Box::new(move || {
            let _steps = core.commit_steps.enter();
            if let Ok(Writer { committer, group, .. }) = core.writer() {
                group.carry_on(Extent::All, committer.group_bytes(), |group| carry_out(&core, group));
            }
        })
    }

    /// What a caller is told of a commit; where it waits no longer, writes are refused from then on.
    fn judge(self: &Arc<Self>, outcome: Option<Result<()>>) -> Result<()> {
        outcome.unwrap_or_else(|| {
            let deadline = self.write_deadline.unwrap_or_default();
            let error = self.given_up("commit", self.layout.root().to_path_buf(), deadline);
            self.refuse_for(&error);
            Err(error)
        })
    }

    /// How a put waits for a GPU's copies: no longer than for a write. Handing the waiting over takes some 6 µs for a mebibyte.
    pub(crate) fn wait_for_device(&self) -> impl Fn(Waiting) -> Result<Slot> + '_ {
        move |waiting| {
            let Some(deadline) = self.write_deadline else { return waiting() };
            let outcome = self.watched.run(deadline, &self.watched.steps(), waiting);
            outcome.unwrap_or_else(|| {
                Err(self.given_up("copy from a GPU for", self.layout.root().to_path_buf(), deadline))
            })
        }
    }

    /// Refuses writes since nobody knows what became of a commit. The note for the next open is left by a thread that may get
    /// stuck as well.
    fn refuse_for(self: &Arc<Self>, error: &Error) {
        let Ok(writer) = self.writer() else { return };
        if !writer.committer.stop(error, Seq::ZERO) {
            return;
        }
        let (core, lock) = (Arc::clone(self), self.lock());
        let _ = self.watched.run(NOTE_PATIENCE, &self.watched.steps(), move || {
            let _lock = lock;
            if let Ok(writer) = core.writer() {
                writer.committer.leave_note();
            }
        });
    }

    /// Waits for the end of the maintenance thread, which was told to end; whether it did, or makes no progress.
    pub(crate) fn await_maintenance(&self) -> bool {
        let Ok(writer) = self.writer() else { return true };
        let mut patience = self.write_deadline.map(|deadline| self.watched.patience(deadline));
        let mut wanted = writer.wanted.lock();
        while !wanted.ended {
            match &mut patience {
                None => writer.signal.wait(&mut wanted),
                Some(patience) => {
                    let timed_out = writer.signal.wait_for(&mut wanted, patience.pause()).timed_out();
                    if timed_out && !wanted.ended && patience.is_over() {
                        return false;
                    }
                }
            }
        }
        true
    }

    /// What a caller is told that waits no longer, and what is counted and logged of it.
    pub(crate) fn given_up(&self, operation: &'static str, path: PathBuf, deadline: Duration) -> Error {
        Counters::add(&self.counters.timeouts, 1);
        given_up(operation, path, deadline)
    }

    /// A share of the store's lock, for what must not be overtaken by another process.
    pub(crate) fn lock(&self) -> Option<Arc<dyn StorageLock>> {
        self.writer().ok()?.lock.lock().clone()
    }
}

/// [`Core::watch`] of what has no open store. `watched` is there for it alone, or becomes the store's.
pub(crate) fn watch_apart<T: Send + 'static, P: Send + 'static>(
    watched: &Watched,
    operation: &'static str,
    path: &Path,
    deadline: Option<Duration>,
    mut hear: impl FnMut(P),
    work: impl FnOnce(&mut dyn FnMut(P)) -> Result<T> + Send + 'static,
) -> Result<T> {
    let Some(deadline) = deadline else { return work(&mut hear) };
    let outcome = watched.run_heard(deadline, &watched.steps(), hear, work);
    outcome.unwrap_or_else(|| Err(given_up(operation, path.to_path_buf(), deadline)))
}

/// What this thread does goes on; an error where nobody waits for it any more.
pub(crate) fn go_on(operation: &'static str, path: &Path) -> Result<()> {
    if step() { Ok(()) } else { Err(Error::Cancelled { operation, path: path.to_path_buf() }) }
}

fn given_up(operation: &'static str, path: PathBuf, deadline: Duration) -> Error {
    let after_ms = u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX);
    tracing::warn!(operation, path = %path.display(), after_ms, "no progress; what it uses stays with it");
    Error::Timeout { operation, path, after_ms }
}

/// A commit whose bytes are on their way.
pub(crate) struct Begun<'c> {
    core: &'c Arc<Core>,
    awaited: Awaited,
    /// What there was no thread for.
    unled: Option<Job>,
}

impl Begun<'_> {
    /// Waits until it is carried out, as [`commit_in_group`](Core::commit_in_group) does. The stream must be finished, or gone.
    pub(crate) fn wait(mut self) -> Result<()> {
        if let Some(work) = self.unled.take() {
            work();
        }
        let core = self.core;
        let patience = core.write_deadline.map(|deadline| core.commit_steps.patience(deadline));
        let outcome = core.writer()?.group.wait(&self.awaited, || core.lead_apart(), patience);
        core.judge(outcome)
    }
}

impl Drop for Begun<'_> {
    fn drop(&mut self) {
        // Whoever has the lead must use it, or nobody commits any more.
        if let Some(work) = self.unled.take() {
            work();
        }
    }
}

/// The gate for whoever closes the store, once nobody passes it any more; nothing where somebody does who makes no progress.
pub(crate) fn close_gate<'g>(
    gate: &'g RwLock<()>,
    watched: &Watched,
    deadline: Option<Duration>,
) -> Option<RwLockWriteGuard<'g, ()>> {
    let Some(deadline) = deadline else { return Some(gate.write()) };
    let mut patience = watched.patience(deadline);
    loop {
        if let Some(alone) = gate.try_write_for(patience.pause()) {
            return Some(alone);
        }
        if patience.is_over() {
            return None;
        }
    }
}
