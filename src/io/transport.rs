//! The seam between what moves bytes and who wants them moved: *where* (a file, a device buffer) × *how* (a [`Route`]) ×
//! *what* (the pieces of a [`Transfer`]).
//!
//! # Invariants
//! - A transfer brings every byte of every piece, or is an error: a short count is never passed on.
//! - A transport returns only when the hardware is done with the buffer that it was lent.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use crate::device::{Device, DeviceBuffer};
use crate::error::{Error, Result};
use crate::storage::StorageFile;

/// A way between a file and a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Route {
    /// NVIDIA's cuFile: straight between the disk and the GPU where the machine can.
    CuFile,
    /// Through the ring of pinned host memory, past the page cache where that is faster.
    Staged,
    /// Through ordinary memory and the page cache: slow, and always there.
    Buffered,
}

impl Route {
    /// Every route, the fastest first.
    pub const ALL: [Route; 3] = [Route::CuFile, Route::Staged, Route::Buffered];

    /// Its name in errors and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Route::CuFile => "cufile",
            Route::Staged => "staged",
            Route::Buffered => "buffered",
        }
    }

    pub(crate) fn index(self) -> usize {
        match self {
            Route::CuFile => 0,
            Route::Staged => 1,
            Route::Buffered => 2,
        }
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IoOperation {
    /// From the file to the device.
    Read,
    /// From the device to the file.
    Write,
}

impl IoOperation {
    /// The verb, for errors.
    pub fn verb(self) -> &'static str {
        match self {
            IoOperation::Read => "read",
            IoOperation::Write => "write",
        }
    }
}

/// An open file, and its name for errors. A clone is the same file.
#[derive(Debug, Clone)]
pub struct OpenFile {
    /// The file.
    pub file: Arc<dyn StorageFile>,
    /// Where it was opened.
    pub path: Arc<Path>,
}

/// A run of bytes, in the file and in the buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Where it begins in the file.
    pub file_offset: u64,
    /// Where it begins in the buffer.
    pub buffer_offset: u64,
    /// How long it is.
    pub len_bytes: u64,
}

impl Piece {
    fn follows(&self, before: &Piece) -> bool {
        before.file_offset.checked_add(before.len_bytes) == Some(self.file_offset)
            && before.buffer_offset.checked_add(before.len_bytes) == Some(self.buffer_offset)
    }
}

/// Bytes to be moved between one file and one buffer.
#[derive(Debug, Clone)]
pub struct Transfer {
    /// The file.
    pub file: OpenFile,
    /// Which bytes go where. Pieces of one transfer that is read do not overlap in the buffer, nor in the file where it
    /// is written.
    pub pieces: Vec<Piece>,
    /// How many threads may work on it, the caller's own included.
    pub lanes: usize,
    /// What is known of it while it runs.
    pub progress: Arc<Progress>,
}

impl Transfer {
    /// A transfer of one piece on the caller's thread alone.
    pub fn new(file: OpenFile, piece: Piece) -> Self {
        Self::of_pieces(file, vec![piece])
    }

    /// A transfer of several pieces on the caller's thread alone. Neighbours become one piece; empty ones go.
    pub fn of_pieces(file: OpenFile, mut pieces: Vec<Piece>) -> Self {
        pieces.retain(|piece| piece.len_bytes > 0);
        pieces.dedup_by(|next, piece| {
            let one = next.follows(piece);
            if one {
                piece.len_bytes += next.len_bytes;
            }
            one
        });
        Self { file, pieces, lanes: 1, progress: Arc::default() }
    }

    /// Lets up to this many threads work on it.
    #[must_use]
    pub fn with_lanes(mut self, lanes: usize) -> Self {
        self.lanes = lanes.max(1);
        self
    }

    /// All bytes together.
    pub fn len_bytes(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.len_bytes).fold(0, u64::saturating_add)
    }

    /// Whether every piece lies in a buffer of this length, and in what a file can hold.
    ///
    /// # Errors
    /// [`Error::Device`] that names the piece.
    pub fn check(&self, buffer: &DeviceBuffer) -> Result<()> {
        let ends =
            |start: u64, piece: &Piece, limit: u64| start.checked_add(piece.len_bytes).is_some_and(|end| end <= limit);
        let len = buffer.len_bytes();
        let bad = self.pieces.iter().find(|piece| {
            !ends(piece.buffer_offset, piece, len) || !ends(piece.file_offset, piece, i64::MAX.unsigned_abs())
        });
        match bad {
            None => Ok(()),
            Some(Piece { file_offset, buffer_offset, len_bytes }) => Err(Error::Device {
                device: buffer.device().to_string(),
                action: "transfer",
                why: format!(
                    "{len_bytes} bytes at {file_offset} of {} and {buffer_offset} of a buffer of {len} bytes",
                    self.file.path.display()
                ),
            }),
        }
    }

    /// An error where nobody waits for the transfer any more; asked between its parts.
    ///
    /// # Errors
    /// [`Error::Cancelled`].
    pub fn check_wanted(&self, operation: IoOperation) -> Result<()> {
        if self.progress.abandoned.load(Ordering::Relaxed) {
            return Err(Error::Cancelled { operation: operation.verb(), path: self.file.path.to_path_buf() });
        }
        Ok(())
    }
}

/// What is known of a transfer while it runs: told by who runs it, read by who waits for it.
#[derive(Debug, Default)]
pub struct Progress {
    /// Whether who waited has gone.
    abandoned: AtomicBool,
    /// One more than the index of the route in use; 0 before the first.
    route: AtomicU8,
}

impl Progress {
    /// Nobody waits any more: what has not begun need not begin.
    pub fn abandon(&self) {
        self.abandoned.store(true, Ordering::Relaxed);
    }

    /// The transfer is on this route from here on.
    pub fn take_route(&self, route: Route) {
        // Three routes.
        self.route.store(route.index() as u8 + 1, Ordering::Relaxed);
    }

    /// The route that the transfer is on; `None` before it began.
    pub fn route(&self) -> Option<Route> {
        let index = usize::from(self.route.load(Ordering::Relaxed)).checked_sub(1)?;
        Route::ALL.get(index).copied()
    }
}

/// One way of moving bytes. Both calls block the calling thread until every byte is where it belongs: after `read`, any
/// stream of the device sees it; after `write`, any reader of the file does, though a crash may lose it until the file is
/// synced.
///
/// A transport loops on short counts and interrupted calls; it tries nothing again that failed, and takes no other route.
pub trait Transport: Send + Sync + fmt::Debug {
    /// The route that this is.
    fn route(&self) -> Route;

    /// Whether it is the best way to this file on this device, and so comes before routes that would otherwise be tried first.
    /// Asked before every transfer, so it must be cheap; only a route that knows says yes.
    fn is_preferred(&self, _file: &OpenFile, _device: &Device) -> bool {
        false
    }

    /// Whether it can serve this file on this device; asked before every transfer, so it must be cheap.
    ///
    /// # Errors
    /// [`Error::RouteUnavailable`] with what is missing.
    fn serves(&self, file: &OpenFile, device: &Device) -> Result<()>;

    /// Reads every piece of the transfer into the buffer. On failure the pieces' contents are unspecified.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::FileTooShort`], [`Error::Device`], [`Error::RouteUnavailable`] where it turns out that the
    /// route cannot serve after all, [`Error::Cancelled`] once nobody waits.
    fn read(&self, transfer: &Transfer, target: &mut DeviceBuffer) -> Result<()>;

    /// Writes every piece of the transfer from the buffer. On failure some of it may have been written.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    fn write(&self, transfer: &Transfer, source: &DeviceBuffer) -> Result<()>;
}
