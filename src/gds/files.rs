//! Open files, kept: opening and registering one costs more than a small read.
//!
//! # Invariants
//! - At most [`OPEN_FILES_MAX`] are kept; who uses one holds it, kept or not.
//! - A file that was kept for reading is opened anew when it is to be written.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

use crate::error::{Error, Result};
use crate::io::transport::OpenFile;
use crate::region::{Lru, LruKey};
use crate::storage::{OpenMode, Storage};

/// Files kept open. A process has 1024 descriptors by default, and a file may take two.
const OPEN_FILES_MAX: usize = 128;

/// The open files of a context.
#[derive(Debug)]
pub(super) struct Files {
    storage: Arc<dyn Storage>,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    files: Lru<KeptFile>,
    by_path: HashMap<PathBuf, LruKey>,
}

#[derive(Debug)]
struct KeptFile {
    file: OpenFile,
    writable: bool,
}

impl Files {
    pub(super) fn new(storage: Arc<dyn Storage>) -> Self {
        Self { storage, kept: Mutex::default() }
    }

    /// A file for reading.
    pub(super) fn to_read(&self, path: &Path) -> Result<OpenFile> {
        if let Some(file) = self.kept(path, false) {
            return Ok(file);
        }
        let file = self.storage.open(path, OpenMode::Read).map_err(Error::io("open", path))?;
        Ok(self.keep(path, file, false))
    }

    /// A file for writing; it is made where it does not exist, and keeps what it has where it does.
    pub(super) fn to_write(&self, path: &Path) -> Result<OpenFile> {
        if let Some(file) = self.kept(path, true) {
            return Ok(file);
        }
        let file = match self.storage.open(path, OpenMode::ReadWrite) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                match self.storage.open(path, OpenMode::CreateNew) {
                    // Somebody else made it meanwhile.
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                        self.storage.open(path, OpenMode::ReadWrite)
                    }
                    answer => answer,
                }
            }
            answer => answer,
        };
        Ok(self.keep(path, file.map_err(Error::io("open", path))?, true))
    }

    /// A file that exists, for writing where that is allowed, else for reading; and which it is.
    pub(super) fn to_change(&self, path: &Path) -> Result<(OpenFile, bool)> {
        if let Some(file) = self.kept(path, true) {
            return Ok((file, true));
        }
        match self.storage.open(path, OpenMode::ReadWrite) {
            Ok(file) => Ok((self.keep(path, file, true), true)),
            Err(error)
                if matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem) =>
            {
                Ok((self.to_read(path)?, false))
            }
            Err(error) => Err(Error::io("open", path)(error)),
        }
    }

    /// Keeps a file no longer: it is opened anew when it is used again.
    pub(super) fn forget(&self, path: &Path) {
        let mut kept = self.kept.lock();
        let file = kept.by_path.remove(path).and_then(|key| kept.files.remove(key));
        drop(kept);
        // Closed outside the lock: closing may take its time.
        drop(file);
    }

    /// Makes a file's bytes and its name durable.
    pub(super) fn sync(&self, file: &OpenFile) -> Result<()> {
        file.file.sync().map_err(Error::io("sync", &file.path))
    }

    /// Makes the name of a file durable.
    pub(super) fn sync_name(&self, path: &Path) -> Result<()> {
        let parent = match path.parent() {
            None => return Ok(()),
            Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
            Some(parent) => parent,
        };
        self.storage.sync_dir(parent).map_err(Error::io("sync the directory", parent))
    }

    fn kept(&self, path: &Path, to_write: bool) -> Option<OpenFile> {
        let kept = &mut *self.kept.lock();
        let key = *kept.by_path.get(path)?;
        let file = kept.files.get(key).filter(|file| file.writable || !to_write)?.file.clone();
        kept.files.touch(key);
        Some(file)
    }

    fn keep(&self, path: &Path, file: Arc<dyn crate::storage::StorageFile>, writable: bool) -> OpenFile {
        let open = OpenFile { file, path: path.into() };
        let mut kept = self.kept.lock();
        let key = kept.files.insert(KeptFile { file: open.clone(), writable });
        let mut gone = Vec::new();
        gone.extend(kept.by_path.insert(path.to_path_buf(), key).and_then(|before| kept.files.remove(before)));
        while kept.files.len() > OPEN_FILES_MAX {
            let coldest = kept.files.iter().next().map(|(key, file)| (key, Arc::clone(&file.file.path)));
            let Some((key, path)) = coldest else { break };
            kept.by_path.remove(&*path);
            gone.extend(kept.files.remove(key));
        }
        drop(kept);
        drop(gone);
        open
    }
}
