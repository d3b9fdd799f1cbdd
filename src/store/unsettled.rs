//! The note that an opening leaves whose own sync failed, and what the next opening does about it.
//!
//! Behind the manifest lie commits that were acknowledged as durable beside others that were not, and nothing tells them
//! apart: so an opening believes them all, and syncs them. When that sync fails, the kernel may show all of them as before
//! and call them synced from then on, and the next sync proves nothing. A commit that was built on them would testify, after
//! a power cut, to what the disk never had, and the store would be refused as damaged.
//!
//! The other note ([`distrust`](super::distrust)) may be torn, which says that a sync failed and no more: then it is the
//! same. And a rebuilding of the index leaves this one while its manifest may have its name and not have it durably: whoever
//! opens the store then writes another manifest before anything is built on that one.
//!
//! So where a note lies, an opening syncs none of those files. It copies what lies in them to new ones, syncs these, and
//! gives them the names of the old ones.
//!
//! # Invariants
//! - Nothing is written over: until a copy has the name, the old file has it, and both say the same.
//! - Where there is no room for a copy the store does not open for writing, and is as it was; it opens read-only.
//! - A note goes only when the copies, their names and a new manifest are durable. One that is left over costs a copy.
//!
//! Like the other note it is not synced: a power cut ends what it warns of.

use std::io;
use std::path::{Path, PathBuf};

use alight_format::SegmentId;

use crate::config::READ_BYTES;
use crate::error::{Error, Result};
use crate::storage::{AlignedBuf, Caching, OpenMode, Storage, read_exact_at, write_all_at};
use crate::store::layout::Layout;
use crate::store::watch::go_on;

/// Leaves the note. Best effort: on a disk that takes no writes there is nobody to warn.
pub(crate) fn leave(storage: &dyn Storage, layout: &Layout) {
    let path = layout.unsettled();
    if let Err(error) = storage.open(&path, OpenMode::CreateTruncate) {
        tracing::error!(path = %path.display(), %error, "the note about a failed sync could not be left");
    }
}

/// Whether the note lies there.
pub(crate) fn is_left(storage: &dyn Storage, layout: &Layout) -> Result<bool> {
    let path = layout.unsettled();
    match storage.open(&path, OpenMode::Read) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::io("open", &path)(error)),
    }
}

/// Puts copies of segments in their place, each up to where its last commit ends; durable when this returns.
pub(crate) fn renew(
    storage: &dyn Storage,
    layout: &Layout,
    ends: impl IntoIterator<Item = (SegmentId, u64)>,
) -> Result<()> {
    for (id, end) in ends {
        let (from, to) = (layout.segment(id), layout.segment_new(id));
        go_on("copy", &from)?;
        let copied = copy(storage, &from, &to, end);
        if let Err(error) = copied {
            // On a full disk it would take the room that the next attempt needs. The next opening removes it else.
            let _ = storage.remove(&to);
            return Err(if error.is_no_space() { no_room(&from, end, error) } else { error });
        }
        storage.rename(&to, &from).map_err(Error::io("rename", &to))?;
    }
    storage.sync_dir(&layout.segments()).map_err(Error::io("sync", &layout.segments()))
}

fn copy(storage: &dyn Storage, from: &Path, to: &Path, end: u64) -> Result<()> {
    let source = storage.open(from, OpenMode::Read).map_err(Error::io("open", from))?;
    // What an earlier attempt left may have a sync that failed behind it as well.
    remove(storage, to.to_path_buf())?;
    let target = storage.open(to, OpenMode::CreateNew).map_err(Error::io("create", to))?;
    let mut window = AlignedBuf::zeroed(READ_BYTES.min(end as usize));
    let mut at = 0;
    while at < end {
        let piece = &mut window[..(end - at).min(READ_BYTES as u64) as usize];
        read_exact_at(&*source, piece, at, Caching::Buffered).map_err(Error::io("read", from))?;
        write_all_at(&*target, piece, at, Caching::Direct).map_err(Error::io("write", to))?;
        go_on("copy", from)?;
        at += piece.len() as u64;
    }
    target.sync().map_err(Error::io("sync", to))
}

/// What to do where there is no room for a copy: reading needs none.
fn no_room(from: &Path, end: u64, error: Error) -> Error {
    let Error::Io { source, .. } = error else { return error };
    let why = format!(
        "{source}; a sync failed earlier, so {end} bytes of it are copied before anything is written: make room and open the \
         store again, or open it read-only"
    );
    Error::Io { action: "copy", path: from.to_path_buf(), source: io::Error::new(source.kind(), why) }
}

/// Takes the note away.
pub(crate) fn clear(storage: &dyn Storage, layout: &Layout) -> Result<()> {
    remove(storage, layout.unsettled())
}

fn remove(storage: &dyn Storage, path: PathBuf) -> Result<()> {
    match storage.remove(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", &path)(error)),
        _ => Ok(()),
    }
}
