//! The place where a store is to lie: what is there, and how a store is made in it, durably.
//!
//! # Invariants
//! - A name that a failed sync may have lost becomes durable by no later sync: what a making that failed may have left is made
//!   anew. A manifest takes its name when those of the directories beside it are durable.
//! - What is not ours is not touched.

use std::io;
use std::path::Path;

use alight_format::{Manifest, StoreId};

use crate::config::SEGMENT_BYTES_DEFAULT;
use crate::error::{Error, Result};
use crate::storage::{OpenMode, Storage, StorageLock};
use crate::store::entropy;
use crate::store::layout::Layout;
use crate::store::manifest;
use crate::store::options::{Create, StoreOptions};
use crate::store::watch::go_on;

/// What lies at a path.
pub(crate) enum Place {
    Absent,
    Empty,
    Store,
    HalfMade,
    /// A repair into it has not come to its end.
    Unfinished,
    Foreign(String),
    File,
}

pub(crate) fn look(storage: &dyn Storage, layout: &Layout) -> Result<Place> {
    let entries = match storage.list(layout.root()) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Place::Absent),
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => return Ok(Place::File),
        Err(error) => return Err(Error::io("list", layout.root())(error)),
    };
    if entries.is_empty() {
        return Ok(Place::Empty);
    }
    if entries.iter().any(|entry| entry.name == "UNFINISHED") {
        return Ok(Place::Unfinished);
    }
    if entries.iter().any(|entry| entry.name == "MANIFEST" && !entry.is_dir) {
        return Ok(Place::Store);
    }
    let ours = ["LOCK", "READERS", "MANIFEST.tmp", "DISTRUST", "UNSETTLED", "UNFINISHED", "segments", "index"];
    if let Some(foreign) = entries.iter().find(|entry| !ours.contains(&entry.name.as_str())) {
        return Ok(Place::Foreign(foreign.name.clone()));
    }
    // A store whose manifest was lost is no half-made one: its segments hold commits.
    let segments = if entries.iter().any(|entry| entry.name == "segments" && entry.is_dir) {
        storage.list(&layout.segments()).map_err(Error::io("list", &layout.segments()))?
    } else {
        Vec::new()
    };
    match segments.first() {
        Some(segment) => Err(Error::damaged(
            &layout.manifest(),
            None,
            format!("it is missing, but the store has segments ({})", segment.name),
        )),
        None => Ok(Place::HalfMade),
    }
}

/// Makes a store; whether it was still to be made. It is durable when this returns.
pub(crate) fn create(storage: &dyn Storage, layout: &Layout, options: &StoreOptions) -> Result<bool> {
    let root = layout.root();
    make_root(storage, root)?;
    let _lock = take_lock(storage, layout)?;
    go_on("open", root)?;
    // Another process may have made it since it was looked for, and filled it.
    match look(storage, layout)? {
        Place::Store if options.create == Create::New => {
            return Err(Error::AlreadyExists { path: root.to_path_buf() });
        }
        Place::Store => return Ok(false),
        _ => {}
    }
    make_parts(storage, layout)?;
    let segment_bytes = options.segment_bytes.unwrap_or(SEGMENT_BYTES_DEFAULT);
    let manifest = Manifest::new(StoreId(entropy::random_16()), segment_bytes);
    manifest::write(storage, layout, &manifest)?;
    Ok(true)
}

/// Makes a directory, unless it is there; whether it was made.
pub(crate) fn make_dir(storage: &dyn Storage, path: &Path) -> Result<bool> {
    match storage.create_dir(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(Error::io("create", path)(error)),
    }
}

/// Makes the directory that a store is to lie in, unless it is there, and its name durable. Where that fails, whoever made the
/// directory takes it away: the next attempt could not tell that its name is in doubt. One that was there before is left as
/// it is, since it is not ours.
pub(crate) fn make_root(storage: &dyn Storage, root: &Path) -> Result<()> {
    let made = make_dir(storage, root)?;
    let Some(parent) = root.parent() else { return Ok(()) };
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    let Err(error) = storage.sync_dir(parent) else { return Ok(()) };
    let removed = made && storage.remove_dir(root).is_ok();
    let source = if removed {
        error
    } else {
        let remedy = "its name may not be durable: remove the directory before a store is made there";
        io::Error::new(error.kind(), format!("{error}; {} stays, and {remedy}", root.display()))
    };
    Err(Error::io("sync", parent)(source))
}

/// Makes a directory anew where an empty one is there: the sync that was to make its name durable may have failed. One that
/// holds something, or that a user put there (a symbolic link, a mounted disk), stays as it is.
fn make_anew(storage: &dyn Storage, path: &Path) -> Result<()> {
    if make_dir(storage, path)? {
        return Ok(());
    }
    let stays = [
        io::ErrorKind::DirectoryNotEmpty,
        io::ErrorKind::NotADirectory,
        io::ErrorKind::ResourceBusy,
        io::ErrorKind::PermissionDenied,
    ];
    match storage.remove_dir(path) {
        Ok(()) => make_dir(storage, path).map(drop),
        Err(error) if stays.contains(&error.kind()) => Ok(()),
        Err(error) => Err(Error::io("remove", path)(error)),
    }
}

/// Makes what a store's directory has beside its manifest and its lock, durably. There must be no manifest yet.
pub(crate) fn make_parts(storage: &dyn Storage, layout: &Layout) -> Result<()> {
    make_anew(storage, &layout.segments())?;
    make_anew(storage, &layout.index())?;
    // Made here, so that a reader who may not write finds it. Nothing rests on it.
    let readers = layout.readers();
    match storage.open(&readers, OpenMode::CreateNew) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(Error::io("create", &readers)(error)),
        _ => {}
    }
    storage.sync_dir(layout.root()).map_err(Error::io("sync", layout.root()))
}

pub(crate) fn take_lock(storage: &dyn Storage, layout: &Layout) -> Result<Box<dyn StorageLock>> {
    let path = layout.lock();
    storage.lock(&path, &holder()).map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock => Error::Locked {
            path: layout.root().to_path_buf(),
            holder: storage
                .lock_holder(&path)
                .ok()
                .map(|holder| holder.trim().to_owned())
                .filter(|holder| !holder.is_empty())
                .unwrap_or_else(|| "a process that did not say who it is".to_owned()),
        },
        _ => Error::io("lock", &path)(error),
    })
}

/// What the lock says about its holder: enough to find the process.
fn holder() -> String {
    let name = std::env::args_os().next().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    format!("process {} ({name})", std::process::id())
}
