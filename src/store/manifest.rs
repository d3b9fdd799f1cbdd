//! The manifest on the disk: read whole, replaced whole.

use std::io;

use alight_format::{Manifest, limits};

use crate::error::{Error, Result};
use crate::io::step;
use crate::storage::{Caching, OpenMode, Storage, read_exact_at, write_all_at};
use crate::store::layout::Layout;

/// Reads and judges the manifest.
pub(crate) fn read(storage: &dyn Storage, layout: &Layout) -> Result<Manifest> {
    let path = layout.manifest();
    let file = storage.open(&path, OpenMode::Read).map_err(Error::io("open", &path))?;
    let length = file.facts().map_err(Error::io("measure", &path))?.len_bytes;
    if length > limits::MANIFEST_BYTES_MAX {
        return Err(Error::damaged(&path, None, format!("{length} bytes are more than a manifest can have")));
    }
    let mut bytes = vec![0; length as usize];
    read_exact_at(&*file, &mut bytes, 0, Caching::Buffered).map_err(Error::io("read", &path))?;
    Manifest::decode(&bytes).map_err(|error| Error::format(&path, error))
}

/// Puts a manifest in the place of the last one. When this returns it is durable; when it fails, either the old or the
/// new one is in place, whole.
pub(crate) fn write(storage: &dyn Storage, layout: &Layout, manifest: &Manifest) -> Result<()> {
    stage(storage, layout, manifest)?;
    install(storage, layout)
}

/// The first half of [`write`]: writes the manifest, durably, beside the last one. When it fails, that one is in place.
pub(crate) fn stage(storage: &dyn Storage, layout: &Layout, manifest: &Manifest) -> Result<()> {
    let new = layout.manifest_new();
    let bytes = manifest.encode().map_err(|error| Error::format(&layout.manifest(), error))?;
    // A file of its own each time: one that a failed attempt left may have a name that its directory's failed sync lost,
    // and that no later sync makes durable.
    let file = match storage.open(&new, OpenMode::CreateNew) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            storage.remove(&new).map_err(Error::io("remove", &new))?;
            storage.open(&new, OpenMode::CreateNew)
        }
        opened => opened,
    };
    let file = file.map_err(Error::io("create", &new))?;
    write_all_at(&*file, &bytes, 0, Caching::Buffered).map_err(Error::io("write", &new))?;
    step();
    file.sync().map_err(Error::io("sync", &new))
}

/// The second half: puts what was staged in place.
pub(crate) fn install(storage: &dyn Storage, layout: &Layout) -> Result<()> {
    let (new, path) = (layout.manifest_new(), layout.manifest());
    storage.rename(&new, &path).map_err(Error::io("rename", &new))?;
    storage.sync_dir(layout.root()).map_err(Error::io("sync", layout.root()))
}

/// Whether a failure of [`write`] or of a run's writing was one of a sync, after which nothing more may be written.
pub(crate) fn was_a_sync(error: &Error) -> bool {
    matches!(error, Error::Io { action: "sync", .. })
}
