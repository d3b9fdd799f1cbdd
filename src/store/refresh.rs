//! Moves a store that is open for reading to what its writer has made durable since.
//!
//! A view is a [`Core`]: segments and a version that belong together. A refresh makes another one beside it and puts it in
//! its place; snapshots keep the one they were taken from, and with it the pin that keeps the writer from giving back what
//! they see.
//!
//! # Invariants
//! - A view never changes. Until the new one is whole, the old one answers; where the new one cannot be had, it goes on
//!   answering.
//! - Bytes that were given back are never a value: a checksum that does not match, or a file that is gone, is told as damage,
//!   or as [`Error::Outdated`] where the writer has gone on and could not know of this reader.
//! - One at a time makes a new view and puts it in place, so that no older one comes after a newer one. What is stuck keeps its
//!   turn; nobody waits for it any longer than for the disk itself.

use std::io;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use alight_format::{Manifest, SegmentId};

use crate::error::{Error, Result};
use crate::io::Steps;
use crate::storage::OpenMode;
use crate::store::core::Core;
use crate::store::manifest;
use crate::store::open::open_reading;
use crate::store::readers::ReaderPin;
use crate::store::recover::read_frame;
use crate::store::segment::{FIRST_FRAME, read_header};
use crate::store::watch::go_on;
use crate::sync::{Condvar, Mutex, MutexGuard};

/// Who looks for a newer view, one at a time.
#[derive(Default)]
pub(crate) struct Turns {
    /// The steps of who does.
    holder: Mutex<Option<Arc<Steps>>>,
    free: Condvar,
}

/// A turn; the next one begins when it is dropped.
pub(crate) struct Turn(Arc<Turns>);

impl Turns {
    /// Waits for a turn, for work with these steps: as long as it takes, or while whoever has it makes one at least once in the
    /// deadline, which is answered where it does not.
    pub(crate) fn take(self: &Arc<Self>, steps: &Arc<Steps>, deadline: Option<Duration>) -> Result<Turn, Duration> {
        let mut holder = self.lock();
        while let Some(held) = holder.clone() {
            let mut patience = deadline.map(|deadline| (held.patience(deadline), deadline));
            while holder.as_ref().is_some_and(|holder| Arc::ptr_eq(holder, &held)) {
                let Some((patience, deadline)) = &mut patience else {
                    holder = self.free.wait(holder).unwrap_or_else(PoisonError::into_inner);
                    continue;
                };
                let (woken, waited) =
                    self.free.wait_timeout(holder, patience.pause()).unwrap_or_else(PoisonError::into_inner);
                if waited.timed_out() && woken.is_some() && patience.is_over() {
                    return Err(*deadline);
                }
                holder = woken;
            }
        }
        *holder = Some(Arc::clone(steps));
        Ok(Turn(Arc::clone(self)))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<Steps>>> {
        self.holder.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        *self.0.lock() = None;
        self.0.free.notify_one();
    }
}

impl Core {
    /// The view of now, if it is another than this one.
    pub(crate) fn renewed(&self) -> Result<Option<Core>> {
        let manifest = manifest::read(&*self.storage, &self.layout)?;
        // What fails while the writer cuts and renames is looked at again by whoever opens, who knows of that.
        if !self.has_news(&manifest).unwrap_or(true) {
            return Ok(None);
        }
        let current = self.version();
        let opened = open_reading(&self.storage, self.layout.clone(), &current.runs)?;
        let moved = opened.manifest.generation != self.generation || opened.version.seq != current.seq;
        Ok(moved.then(|| self.moved_to(opened)))
    }

    /// Whether there may be anything that this view does not have: a newer manifest, a new segment, or a frame where the
    /// last one of a segment ends. Reads a block for each segment that commits may go to.
    fn has_news(&self, manifest: &Manifest) -> Result<bool> {
        if manifest.generation != self.generation || manifest.store != self.segments.store() {
            return Ok(true);
        }
        let folder = self.layout.segments();
        for entry in self.storage.list(&folder).map_err(Error::io("list", &folder))? {
            if SegmentId::from_file_name(&entry.name)
                .is_some_and(|id| id >= manifest.next_segment && self.segments.get(id).is_none())
            {
                return Ok(true);
            }
        }
        for segment in self.segments.all() {
            if segment.sealed_end().is_some() {
                continue;
            }
            let path = &segment.path;
            go_on("refresh", path)?;
            let file = match self.storage.open(path, OpenMode::Read) {
                // One that nothing was ever committed to may go.
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
                opened => opened.map_err(Error::io("open", path))?,
            };
            let len_bytes = file.facts().map_err(Error::io("measure", path))?.len_bytes;
            let end = segment.accounting.lock().end;
            // One without commits may have gone, and its number to another.
            let became_another =
                || Ok::<_, Error>(end == FIRST_FRAME && read_header(&*file, path)?.salt != segment.salt);
            if len_bytes < end || became_another()? || read_frame(&segment, &*file, end, len_bytes)?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Tells a reader that it sees what is no more, where that is why a read failed.
    ///
    /// A writer sees to it that nothing goes that a pinned reader has; a reader without a pin (no such locks here, or a
    /// directory that it may not write to) is not seen, and learns of it by what it finds.
    pub(crate) fn explain(&self, error: Error) -> Error {
        if !self.is_read_only() || !error.is_damage() || self.is_pinned() {
            return error;
        }
        match manifest::read(&*self.storage, &self.layout) {
            Ok(manifest) if manifest.generation != self.generation => {
                Error::Outdated { path: self.layout.root().to_path_buf() }
            }
            _ => error,
        }
    }

    fn is_pinned(&self) -> bool {
        self.version().hold.downcast_ref::<Option<ReaderPin>>().is_some_and(Option::is_some)
    }
}
