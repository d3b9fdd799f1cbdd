//! Changes that no sync has covered, and how one of them lands on a disk.
//!
//! # Invariants
//! - A kept write brings whole sectors, as they were right after it.
//! - Whatever is kept of a change, no byte appears that was not in the file at some moment since its last sync: it is
//!   an old byte, a new one, or a zero. Noise is the exception, and is asked for by name.

use std::fmt;
use std::ops::Range;
use std::path::Path;

use super::choice::{Fate, Keep, Unit};
use super::content::Content;
use super::image::{DirId, FileId, NameChange};
use super::rng::Rng;
use super::trace::{Call, Edit, OpKind};

/// One change that a crash may show, or not.
#[derive(Debug, Clone)]
pub struct PendingChange {
    pub(super) call: Call,
    pub(super) what: What,
    pub(super) standing: Standing,
}

#[derive(Debug, Clone)]
pub(super) enum What {
    Bytes {
        file: FileId,
        edit: Edit,
        after: Content,
    },
    Names {
        change: NameChange,
        /// Of two directories, the one that was synced.
        synced: Option<DirId>,
    },
}

/// What stands between a change and the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// The next sync.
    Unsynced,
    /// Nothing will make it durable any more: its sync failed, and the kernel took it for written.
    Orphaned,
    /// It is durable; it stays in the list since an orphaned change before it may or may not be there.
    Durable,
}

impl PendingChange {
    /// The number of the call that made it.
    pub fn call(&self) -> u64 {
        self.call.index
    }

    /// The kind of the call that made it.
    pub fn op(&self) -> OpKind {
        self.call.op
    }

    /// The path that the call was given, or that its file was opened by.
    pub fn path(&self) -> &Path {
        &self.call.path
    }

    /// Whether a crash may lose it. Durable changes are listed where they rest on one that may be lost.
    pub fn in_doubt(&self) -> bool {
        self.standing != Standing::Durable
    }

    /// Whether it is a write that can be torn.
    pub fn is_write(&self) -> bool {
        self.written().is_some()
    }

    fn written(&self) -> Option<&Range<u64>> {
        match &self.what {
            What::Bytes { edit: Edit::Write(range), .. } => Some(range),
            _ => None,
        }
    }

    /// How many sectors and how many pages a write touches.
    pub(super) fn units(&self) -> Option<(u64, u64)> {
        let range = self.written()?;
        let count = |unit| units_touching(range, unit).count() as u64;
        Some((count(Unit::Sector), count(Unit::Page)))
    }

    pub(super) fn file(&self) -> Option<FileId> {
        match self.what {
            What::Bytes { file, .. } => Some(file),
            What::Names { .. } => None,
        }
    }

    pub(super) fn touches_dir(&self, dir: DirId) -> bool {
        match &self.what {
            What::Bytes { .. } => false,
            What::Names { change, .. } => change.places().any(|place| place.dir == dir),
        }
    }
}

impl fmt::Display for PendingChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.call.fmt(f)?;
        match self.standing {
            Standing::Unsynced => Ok(()),
            Standing::Orphaned => f.write_str(" (its sync failed)"),
            Standing::Durable => f.write_str(" (durable)"),
        }
    }
}

/// The whole units that a range touches, by number.
fn units_touching(range: &Range<u64>, unit: Unit) -> Range<u64> {
    if range.is_empty() {
        return 0..0;
    }
    range.start / unit.bytes()..range.end.div_ceil(unit.bytes())
}

/// Lets an edit land on a file, as far as its fate has it.
pub(super) fn land(edit: &Edit, after: &Content, fate: Fate, on: &mut Content) {
    match (edit, fate) {
        (_, Fate::Dropped) => {}
        (Edit::Write(range), Fate::Kept) => {
            on.grow(range.end);
            on.adopt(after, bytes_of(&units_touching(range, Unit::Sector), Unit::Sector));
        }
        (Edit::Write(range), Fate::Torn(unit, keep)) => land_torn(range, after, unit, keep, on),
        (Edit::Punch(range), _) => on.adopt(after, bytes_of(&units_touching(range, Unit::Sector), Unit::Sector)),
        (Edit::Allocate(range), _) => on.allocate(range.clone()),
        (Edit::Truncate(len), _) => on.truncate(*len),
    }
}

fn land_torn(range: &Range<u64>, after: &Content, unit: Unit, keep: Keep, on: &mut Content) {
    let units = units_touching(range, unit);
    let count = units.end - units.start;
    let end = match keep {
        Keep::Prefix(kept) => range.end.min((units.start + kept) * unit.bytes()),
        _ => range.end,
    };
    if let Keep::Prefix(0) = keep {
        return;
    }
    on.grow(end);
    if let Keep::Noise(seed) = keep {
        return make_noise(bytes_of(&units, unit), seed, on);
    }
    // Runs of kept units, so that a long prefix is one step.
    let mut run = units.start..units.start;
    for number in units.clone() {
        if keep.keeps(number - units.start, count) {
            run.end = number + 1;
        } else {
            on.adopt(after, bytes_of(&run, unit));
            run = number + 1..number + 1;
        }
    }
    on.adopt(after, bytes_of(&run, unit));
}

fn make_noise(bytes: Range<u64>, seed: u64, on: &mut Content) {
    let mut rng = Rng::new(seed);
    let len = bytes.end.min(on.len()).saturating_sub(bytes.start);
    let mut noise: Vec<u8> = (0..len.div_ceil(8)).flat_map(|_| rng.next().to_le_bytes()).collect();
    noise.truncate(usize::try_from(len).unwrap_or(usize::MAX));
    on.write(&noise, bytes.start);
}

fn bytes_of(units: &Range<u64>, unit: Unit) -> Range<u64> {
    units.start * unit.bytes()..units.end * unit.bytes()
}
