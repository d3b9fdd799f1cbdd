//! The real file system, through the standard library and libc.
//!
//! # Invariants
//! - Nothing is cached between calls but descriptors and the fact that a file system refused direct transfers.
//! - Every descriptor is closed on `exec`, and closed when the last [`StorageFile`] that uses it is dropped.
//! - Unsafe code and libc stay in [`sys`] and [`aio`]; everything else here is plain Rust.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{DirEntry, OpenMode, Storage, StorageFile, StorageLock};

mod aio;
mod handle;
mod map;
mod sys;

use handle::FileHandle;

/// What a lock's holder writes about itself is read up to here; a longer text is cut.
const HOLDER_BYTES_MAX: u64 = 4096;

/// The real file system. It has no state of its own: every value is as good as any other.
#[derive(Debug, Clone, Default)]
pub struct FileStorage(());

impl FileStorage {
    /// The file system of this machine.
    pub fn new() -> Self {
        Self(())
    }
}

impl Storage for FileStorage {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn StorageFile>> {
        let mut options = OpenOptions::new();
        options.read(true);
        match mode {
            OpenMode::Read => {}
            OpenMode::ReadWrite => {
                options.write(true);
            }
            OpenMode::CreateNew => {
                options.write(true).create_new(true);
            }
            OpenMode::CreateTruncate => {
                options.write(true).create(true).truncate(true);
            }
        }
        let file = options.open(path)?;
        // A directory opens for reading, and only its reads fail: say so here.
        if file.metadata()?.is_dir() {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        Ok(Arc::new(FileHandle::new(file, path, mode != OpenMode::Read)))
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        fs::create_dir(path)
    }

    /// A name that is not UTF-8 is given with replacement characters, so it equals no name that the store ever made.
    fn list(&self, path: &Path) -> io::Result<Vec<DirEntry>> {
        let mut entries = Vec::new();
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            // Through a symbolic link, so that a segment may lie elsewhere. A file that was removed since its name was
            // read is not in the directory any more; a dangling link still is.
            let facts = match fs::metadata(entry.path()).or_else(|_| entry.metadata()) {
                Ok(facts) => facts,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            entries.push(DirEntry {
                name: entry.file_name().to_string_lossy().into_owned(),
                is_dir: facts.is_dir(),
                len_bytes: if facts.is_file() { facts.len() } else { 0 },
            });
        }
        Ok(entries)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        // A segment may lie elsewhere, behind a symbolic link: a second name of the link would be no copy of the file.
        if fs::symlink_metadata(from)?.is_symlink() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        fs::hard_link(from, to).map_err(|error| match error.raw_os_error() {
            // Another file system; one without links, or a policy against them; too many of them.
            Some(libc::EXDEV | libc::EPERM | libc::EMLINK | libc::EOPNOTSUPP | libc::ENOSYS) => {
                io::Error::new(io::ErrorKind::Unsupported, error)
            }
            _ => error,
        })
    }

    fn reflink(&self, from: &Path, to: &Path) -> io::Result<()> {
        let source = File::open(from)?;
        let target = OpenOptions::new().write(true).create_new(true).open(to)?;
        sys::clone_file(&source, &target).inspect_err(|_| {
            if let Err(error) = fs::remove_file(to) {
                tracing::warn!(path = %to.display(), %error, "an empty file is left of a copy that was not made");
            }
        })
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let directory = File::open(path)?;
        if !directory.metadata()?.is_dir() {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        sys::sync_all(&directory)
    }

    fn lock(&self, path: &Path, holder: &str) -> io::Result<Box<dyn StorageLock>> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => return Err(io::ErrorKind::WouldBlock.into()),
            Err(fs::TryLockError::Error(error)) => return Err(error),
        }
        // The text helps a person who finds the store locked; the lock does not depend on it. A full disk, which a
        // store must be opened on to delete from it, does not refuse the lock.
        if let Err(error) = write_holder(&file, holder) {
            tracing::warn!(path = %path.display(), %error, "the lock is held, but its holder could not be written into it");
        }
        Ok(Box::new(FileLock { path: path.to_path_buf(), _file: file }))
    }

    fn lock_holder(&self, path: &Path) -> io::Result<String> {
        let mut bytes = Vec::new();
        File::open(path)?.take(HOLDER_BYTES_MAX).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn share_byte(&self, path: &Path, byte: u64) -> io::Result<Box<dyn StorageLock>> {
        let file = match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)
            }
            opened => opened,
        }?;
        sys::share_byte(&file, byte)?;
        Ok(Box::new(FileLock { path: path.to_path_buf(), _file: file }))
    }

    fn lowest_shared_byte(&self, path: &Path, through: u64) -> io::Result<Option<u64>> {
        let file = match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened?,
        };
        let mut lowest = None;
        let mut through = through;
        // The system names one that it finds, not the lowest: what lies below it is asked about again.
        while let Some(found) = sys::shared_byte(&file, through)? {
            lowest = Some(found);
            match found.checked_sub(1) {
                Some(below) => through = below,
                None => break,
            }
        }
        Ok(lowest)
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        sys::free_bytes(path)
    }
}

fn write_holder(file: &File, holder: &str) -> io::Result<()> {
    file.write_all_at(holder.as_bytes(), 0)?;
    file.set_len(holder.len() as u64)
}

/// A lock is on the open file description, which this descriptor alone refers to: closing it releases the lock, and so
/// does the end of the process.
#[derive(Debug)]
struct FileLock {
    #[expect(dead_code, reason = "shown by Debug")]
    path: PathBuf,
    _file: File,
}

impl StorageLock for FileLock {}

#[cfg(test)]
mod tests;
