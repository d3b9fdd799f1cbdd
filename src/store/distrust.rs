//! The note that a failed sync leaves for the next open.
//!
//! After a failed sync, the kernel may show bytes that the disk does not have, and call them synced from then on. Whoever
//! opens the store next, with no reboot in between, would believe commits that a power cut takes away. The note says up
//! to which commit syncs had succeeded: what lies behind was never acknowledged as durable, and is cut.
//!
//! A failed write that could not be taken back leaves the note too: then everything before it may be believed. And so does a
//! commit that did not come back within its deadline, as if its sync had failed.
//!
//! The note itself is not synced. If the power is cut, what it warns of is over: the next open reads the disk itself.
//! It names the manifest's generation, and counts for that one and the next, which may have been about to take its place;
//! the open that heeds it writes one beyond those, so it counts once. Where one lies that is about an earlier generation, that
//! open may have failed when it synced the name of its manifest, which nothing makes durable any more: the next one writes
//! another manifest before it goes on.
//!
//! A note that is not whole warns as well, though not of what: on a full disk its name may be all there was room for. What
//! the next open does then is told in [`unsettled`](super::unsettled).

use std::io;

use alight_format::{Seq, crc32};

use crate::error::{Error, Result};
use crate::storage::{Caching, OpenMode, Storage, read_exact_at, write_all_at};
use crate::store::layout::Layout;

const MAGIC: [u8; 8] = *b"ALIGHTns";
const NOTE_BYTES: usize = 28;

/// Leaves the note. Best effort: on a disk that takes no writes there is nobody to warn.
pub(crate) fn leave(storage: &dyn Storage, layout: &Layout, generation: u64, synced: Seq) {
    let mut note = [0; NOTE_BYTES];
    note[..8].copy_from_slice(&MAGIC);
    note[8..16].copy_from_slice(&generation.to_le_bytes());
    note[16..24].copy_from_slice(&synced.get().to_le_bytes());
    let digest = crc32(&note[..24]);
    note[24..].copy_from_slice(&digest.to_le_bytes());
    let path = layout.distrust();
    let written = storage
        .open(&path, OpenMode::CreateTruncate)
        .and_then(|file| write_all_at(&*file, &note, 0, Caching::Buffered));
    if let Err(error) = written {
        tracing::error!(path = %path.display(), %error, "the note about a failed sync could not be left");
    }
}

/// A note that was found.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Note {
    Whole {
        generation: u64,
        synced: Seq,
    },
    /// It could not be written, or a power cut broke it: nothing tells which.
    Torn,
}

impl Note {
    /// Up to which commit the store may be believed, if the note says that it is about this generation of the manifest.
    pub(crate) fn about(self, generation: u64) -> Option<Seq> {
        match self {
            Self::Whole { generation: noted, synced } => {
                (noted == generation || noted.checked_add(1) == Some(generation)).then_some(synced)
            }
            Self::Torn => None,
        }
    }

    pub(crate) fn is_torn(self) -> bool {
        matches!(self, Self::Torn)
    }
}

/// The note, where there is one.
pub(crate) fn read(storage: &dyn Storage, layout: &Layout) -> Result<Option<Note>> {
    let path = layout.distrust();
    let file = match storage.open(&path, OpenMode::Read) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io("open", &path)(error)),
    };
    let mut note = [0; NOTE_BYTES];
    match read_exact_at(&*file, &mut note, 0, Caching::Buffered) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(Some(Note::Torn)),
        Err(error) => return Err(Error::io("read", &path)(error)),
    }
    let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| note[at + i]));
    let whole = note[..8] == MAGIC && note[24..] == crc32(&note[..24]).to_le_bytes();
    Ok(Some(if whole { Note::Whole { generation: number(8), synced: Seq(number(16)) } } else { Note::Torn }))
}

/// Takes the note away, once a manifest of a later generation is in place.
pub(crate) fn clear(storage: &dyn Storage, layout: &Layout) -> Result<()> {
    let path = layout.distrust();
    match storage.remove(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", &path)(error)),
        _ => Ok(()),
    }
}
