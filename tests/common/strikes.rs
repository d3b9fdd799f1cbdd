//! What failed calls have the store at a path do until it is opened again: after some it must refuse writes, after some it
//! may.

use std::collections::HashSet;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;

use alight::storage::sim::{Event, OpKind, SimStorage};

/// Behind a segment's header lie its commits.
const HEADER_BYTES: u64 = 4096;

/// Reads the calls of a disk as they come.
#[derive(Debug, Default)]
pub struct Strikes {
    /// How many events of the trace were read.
    events_read: usize,
    /// Segments of which more than the header was touched.
    in_use: HashSet<Arc<Path>>,
    /// Whether a sync failed since the store was opened: then eventual commits may be gone at the next opening.
    pub sync_failed: bool,
    /// Whether a failed sync must have the store refuse writes from here on.
    pub must_refuse: bool,
    /// Whether the store may refuse them: what was to be cut, after a write that failed, could not be.
    pub may_refuse: bool,
    /// Whether a note for the next opening could not be left, since a call for it failed.
    pub note_failed: bool,
}

impl Strikes {
    /// Reads the calls since the last look; whether a sync of the store at `path` failed among them.
    pub fn look(&mut self, sim: &SimStorage, path: &str) -> bool {
        let mut any = false;
        sim.events_after(self.events_read, |event| {
            self.events_read += 1;
            let Event::Call(call) = event else { return };
            self.may_refuse |= call.outcome.is_err() && call.op == OpKind::Truncate;
            let is_note = ["DISTRUST", "UNSETTLED"].iter().any(|note| call.path.ends_with(note));
            let is_left = matches!(call.op, OpKind::Open | OpKind::Write);
            // Who looks for one mostly finds none.
            self.note_failed |= is_note && is_left && call.outcome.is_err_and(|error| error != ErrorKind::NotFound);
            let failed = call.outcome.is_err() && matches!(call.op, OpKind::Sync | OpKind::SyncDir);
            // What fails of a backup fails the backup.
            if failed && call.path.starts_with(path) {
                any = true;
                self.may_refuse = true;
                self.sync_failed = true;
                // A segment that is being made has nothing in it that counts: it is thrown away, and another one made.
                let is_segment = call.path.extension().is_some_and(|kind| kind == "seg");
                let header_only = is_segment && !self.in_use.contains(&call.path);
                let making = header_only || call.op == OpKind::SyncDir && call.path.ends_with("segments");
                self.must_refuse |= !making;
            }
            if call.op == OpKind::Remove && call.outcome.is_ok() {
                self.in_use.remove(&call.path);
            }
            if call.offset >= HEADER_BYTES && !self.in_use.contains(&call.path) {
                self.in_use.insert(Arc::clone(&call.path));
            }
        });
        any
    }

    /// The store was opened again; what failed of the opening was overcome.
    pub fn opened_again(&mut self, sim: &SimStorage, path: &str) {
        (self.sync_failed, self.may_refuse, self.note_failed) = (false, false, false);
        self.look(sim, path);
        self.must_refuse = false;
    }

    /// The disk is another now, whose recording has just begun.
    pub fn another_disk(&mut self) {
        self.events_read = 0;
    }
}
