//! The end of a segment that is appended to: where the next commit goes, and what is taken of the disk ahead of it.
//!
//! # Invariants
//! - Nothing is written past what is allocated.
//! - What lies behind the last commit is zeros, or bytes that no frame speaks for.

use std::io::{self, IoSlice};
use std::sync::Arc;

use crate::config::{ALLOCATE_STEP_BYTES, PREWRITE_BYTES, PREWRITTEN_COMMITS_BYTES_MAX};
use crate::error::{Error, Result};
use crate::storage::{DIRECT_ALIGN_BYTES, StorageFile};
use crate::store::segment::{FIRST_FRAME, Segment};

/// The end of a segment that may be appended to.
#[derive(Debug)]
pub(crate) struct Tail {
    pub(crate) segment: Arc<Segment>,
    pub(crate) file: Arc<dyn StorageFile>,
    pub(crate) offset: u64,
    pub(crate) previous_digest: u32,
    /// Space is taken up to here.
    pub(crate) allocated: u64,
    /// Bytes are written up to here: the file system has their blocks, and an overwrite changes none of its records. `None`
    /// where no space is taken ahead, which zeros would take.
    pub(crate) prewritten: Option<u64>,
    /// Whether the segment holds one commit alone.
    pub(crate) single: bool,
    /// Whether it was made, or synced, since the store was opened.
    pub(crate) synced: bool,
}

/// Zeros to write from, where direct writes may begin.
#[repr(align(4096))]
struct Zeros([u8; 64 << 10]);
static ZEROS: Zeros = Zeros([0; 64 << 10]);

impl Tail {
    /// That of a segment that was just made.
    pub(super) fn fresh(segment: Arc<Segment>, file: Arc<dyn StorageFile>, single: bool) -> Self {
        let (offset, allocated, prewritten) = (FIRST_FRAME, FIRST_FRAME, Some(FIRST_FRAME));
        Self { segment, file, offset, previous_digest: 0, allocated, prewritten, single, synced: true }
    }

    /// How many zeros to write behind commits that end at `end`, so that the ones after them cost the file system no
    /// journal commit with their sync.
    pub(super) fn zeros_behind(&self, end: u64, total: u64) -> u64 {
        if total > PREWRITTEN_COMMITS_BYTES_MAX || self.prewritten.is_none_or(|prewritten| end <= prewritten) {
            return 0;
        }
        // Of a segment that a power cut left behind the length may be anything.
        self.allocated.saturating_sub(end).min(PREWRITE_BYTES) / DIRECT_ALIGN_BYTES * DIRECT_ALIGN_BYTES
    }

    /// Takes note that bytes are written up to `end`.
    pub(super) fn note_written_through(&mut self, end: u64) {
        self.prewritten = self.prewritten.map(|prewritten| prewritten.max(end));
    }

    /// Takes space for the next `total` bytes: in big steps where the disk has them, exactly where it has not.
    pub(super) fn reserve(&mut self, total: u64, segment_bytes: u64) -> Result<()> {
        let end = self.offset + total;
        if end <= self.allocated {
            return Ok(());
        }
        let generous = (self.allocated + ALLOCATE_STEP_BYTES).min(segment_bytes).max(end);
        let mut taken = self.file.allocate(self.allocated, generous - self.allocated);
        let mut reached = generous;
        if taken.is_err() && generous > end {
            taken = self.file.allocate(self.allocated, end - self.allocated);
            reached = end;
        }
        match taken {
            Ok(()) => self.allocated = reached,
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                self.allocated = reached;
                self.prewritten = None;
            }
            Err(source) => {
                return Err(Error::Io { action: "take space for", path: self.segment.path.clone(), source });
            }
        }
        Ok(())
    }

    /// Ends the segment where its last commit does, and gives back the space taken ahead.
    pub(super) fn retire(self) {
        // Only space is lost when this fails.
        if let Err(error) = self.file.truncate(self.offset) {
            tracing::warn!(path = %self.segment.path.display(), %error, "space taken ahead could not be given back");
        }
        // Last: a sealed segment may have a second name in a backup, and nothing cuts it any more.
        self.segment.seal(self.offset);
    }
}

/// So many zeros, as slices of a few.
pub(super) fn zeros<'z>(count: u64) -> impl Iterator<Item = IoSlice<'z>> {
    let piece = ZEROS.0.len() as u64;
    // The remainder is shorter than a piece, which is in memory.
    let (whole, rest) = (count / piece, (count % piece) as usize);
    let whole = (0..whole).map(|_| IoSlice::new(&ZEROS.0));
    whole.chain((rest > 0).then(|| IoSlice::new(&ZEROS.0[..rest])))
}
