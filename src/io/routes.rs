//! By which route a store's bytes reach a GPU, and large values of its memory the disk: chosen for every read and put, from what
//! the machine can do, where the bytes are now, and what the user asked for.
//!
//! Only what the GPU takes the checksums of may go by cuFile, since nobody else sees the bytes on their way.
//!
//! # Invariants
//! - A step down from cuFile is logged, the first aloud, and counted; what it left undone the staged route does.
//! - cuFile is given up for nothing that is wrong with the file.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use alight_format::SegmentId;
use parking_lot::Mutex;

use super::direct::CuFileTransport;
use super::lanes::lanes_for;
use super::plan::{Read, ReadPlan};
use super::read::FindFile;
use super::transport::{OpenFile, Piece, Transfer};
use super::watched::current;
use super::windows::Windows;
use crate::config::WRITE_BUFFERS;
use crate::device::{Device, DeviceBuffer};
use crate::error::{Error, Result};
use crate::metrics::{Counters, LastRead, ReadRoute, RouteReason};

/// How long cuFile is not tried again after it failed.
const REST: Duration = Duration::from_secs(60);

/// By which route a store's bytes reach a GPU, and the disk from a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum RouteChoice {
    /// cuFile where it has a direct path to the file and the bytes to be read are not in the page cache, else the staged route.
    #[default]
    Auto,
    /// Through the ring of pinned host memory, or pinned pages of the page cache; cuFile is not even opened.
    Staged,
    /// cuFile, in its compatibility mode where it has no direct path. The first read or put opens its driver: 0.2 to 0.5 s.
    CuFile,
}

/// The routes of one store.
#[derive(Debug)]
pub(crate) struct Routes {
    choice: RouteChoice,
    cufile: CuFileTransport,
    /// What is pinned of the segments for a GPU.
    pub(super) windows: Windows,
    rests_until: Mutex<Option<Instant>>,
    told: AtomicBool,
}

/// What is left of a plan for the staged route, and why.
pub(super) struct Left<'p> {
    pub(super) reads: Vec<&'p Read>,
    pub(super) read: LastRead,
}

impl Routes {
    /// Routes as the user asked for them, with at most so many bytes of the page cache pinned.
    pub(crate) fn new(choice: RouteChoice, pinned_bytes_max: u64, cufile: CuFileTransport) -> Self {
        let (rests_until, told) = Default::default();
        Self { choice, cufile, windows: Windows::new(pinned_bytes_max), rests_until, told }
    }

    /// Lets go of what is kept of a segment whose file goes: pinned pages, and what keeps it registered.
    pub(crate) fn forget(&self, segment: SegmentId) {
        self.windows.forget(segment);
        self.cufile.forget_closed();
    }

    /// Brings by cuFile what is to come by it, of a plan whose checksums the GPU takes; answers what is left.
    pub(super) fn bring_by_cufile<'p>(
        &self,
        plan: &'p ReadPlan,
        find: &FindFile<'_>,
        arena: &mut DeviceBuffer,
        lanes: usize,
        counters: &Counters,
    ) -> Result<Left<'p>> {
        let staged =
            |why| Left { reads: plan.reads.iter().collect(), read: LastRead { route: ReadRoute::Staged, why } };
        match self.choice {
            RouteChoice::Staged => return Ok(staged(RouteReason::Asked)),
            RouteChoice::Auto if self.windows.are_wanted() => return Ok(staged(RouteReason::PagesPinned)),
            _ if self.is_resting() => {
                Counters::add(&counters.step_downs, 1);
                return Ok(staged(RouteReason::SteppedDown));
            }
            RouteChoice::Auto | RouteChoice::CuFile => {}
        }
        let (mut left, mut why) = (Vec::new(), RouteReason::Asked);
        let mut transfers = Vec::new();
        // Reads are in the order of the disk.
        for reads in plan.reads.chunk_by(|one, next| one.segment == next.segment) {
            let segment = reads[0].segment;
            let found = find(segment)?;
            let file = OpenFile { file: found.file.clone(), path: found.path.as_path().into() };
            let chosen = match self.choice {
                RouteChoice::CuFile => Ok(()),
                _ => self.is_best(&file, reads, arena.device()),
            };
            match chosen {
                Ok(()) => transfers.push((segment, Transfer::of_pieces(file, reads.iter().map(piece).collect()))),
                Err(reason) => {
                    why = reason;
                    left.extend(reads);
                }
            }
        }
        if transfers.is_empty() {
            return Ok(staged(why));
        }
        let (segments, transfers): (Vec<_>, Vec<Transfer>) = transfers.into_iter().unzip();
        // Asked for again before every call, like before every read of the other routes: whoever watches sees it go on.
        let begin = |index: usize| find(segments[index]).map(drop);
        match self.cufile.read_all(&transfers, arena, lanes, begin) {
            Ok(()) => {
                Counters::add(&counters.bytes_cufile, transfers.iter().map(Transfer::len_bytes).sum());
                let asked = self.choice == RouteChoice::CuFile;
                let why = if asked { RouteReason::Asked } else { RouteReason::DirectPath };
                Ok(Left { reads: left, read: LastRead { route: ReadRoute::CuFile, why } })
            }
            Err(Error::FileTooShort { path, len_bytes, .. }) => {
                Err(Error::damaged(&path, len_bytes, "the file ends inside a value: it was truncated"))
            }
            Err(error @ (Error::RouteUnavailable { .. } | Error::Io { .. })) => {
                self.step_down(&error, counters);
                Ok(staged(RouteReason::SteppedDown))
            }
            Err(error) => Err(error),
        }
    }

    /// Whether what lies in a GPU's memory, and has its checksums taken there, is to be written to a file by cuFile.
    pub(crate) fn may_write_by_cufile(&self, file: &OpenFile, device: &Device, counters: &Counters) -> bool {
        let chosen = match self.choice {
            RouteChoice::Staged => return false,
            RouteChoice::CuFile => true,
            RouteChoice::Auto => self.cufile.check_direct(file, device).is_ok(),
        };
        if chosen && self.is_resting() {
            Counters::add(&counters.step_downs, 1);
            return false;
        }
        chosen && device.has_kernels()
    }

    /// Writes by cuFile, several threads sharing the work; whether it could. Where not, how much was written is unknown.
    ///
    /// # Errors
    /// [`Error::Io`] for a full disk and its like; [`Error::Cancelled`] where nobody waits any more.
    pub(crate) fn write_by_cufile(
        &self,
        transfers: &[(Transfer, Arc<DeviceBuffer>)],
        counters: &Counters,
    ) -> Result<bool> {
        let steps = current();
        let begin = |index: usize| match &steps {
            Some(steps) if !steps.take(index as u64) => {
                let path = transfers[index].0.file.path.to_path_buf();
                Err(Error::Cancelled { operation: "write", path })
            }
            _ => Ok(()),
        };
        match self.cufile.write_all(transfers, lanes_for(WRITE_BUFFERS), begin) {
            Ok(()) => {
                let bytes = transfers.iter().map(|(transfer, _)| transfer.len_bytes()).sum();
                Counters::add(&counters.bytes_put_cufile, bytes);
                Ok(true)
            }
            Err(error @ Error::RouteUnavailable { .. }) => {
                self.step_down(&error, counters);
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// Whether cuFile is the best way to some reads of a file; why not.
    fn is_best(&self, file: &OpenFile, reads: &[Read], device: &Device) -> std::result::Result<(), RouteReason> {
        self.cufile.check_direct(file, device).map_err(|_| RouteReason::NoDirectPath)?;
        let (Some(first), Some(last)) = (reads.first(), reads.last()) else { return Ok(()) };
        let range_len = last.offset + last.len as u64 - first.offset;
        // A question that the system cannot answer counts as not cached.
        match file.file.resident(first.offset, range_len) {
            Ok(Some(true)) => Err(RouteReason::Cached),
            _ => Ok(()),
        }
    }

    fn is_resting(&self) -> bool {
        self.rests_until.lock().is_some_and(|until| Instant::now() < until)
    }

    fn step_down(&self, error: &Error, counters: &Counters) {
        Counters::add(&counters.step_downs, 1);
        *self.rests_until.lock() = Instant::now().checked_add(REST);
        if self.told.swap(true, Ordering::Relaxed) {
            tracing::debug!(%error, "reads and puts go by the staged route for {REST:?}");
        } else {
            tracing::warn!(%error, "reads and puts go by the staged route for {REST:?}; from here on this is counted and not logged");
        }
    }
}

/// The bytes of a read that are wanted.
fn piece(read: &Read) -> Piece {
    Piece {
        file_offset: read.offset + read.wanted.start as u64,
        buffer_offset: read.arena_offset,
        len_bytes: read.wanted.len() as u64,
    }
}
