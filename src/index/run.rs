//! A run on the disk: mapped where that is safe, read where it is not; written whole or not at all.

use std::borrow::Cow;
use std::io;
use std::ops::{Bound, Range};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use alight_format::{
    FormatError, HashedKey, IndexEntry, IndexKind, RunBuilder, RunBytes, RunError, RunId, RunReader, RunRecord, StoreId,
};

use crate::config::READ_BYTES;
use crate::error::{Error, Result};
use crate::index::waiting;
use crate::io::step;
use crate::storage::{Caching, OpenMode, Storage, StorageFile, StorageMap, read_exact_at, write_all_at};

/// One open index run. Its file may be gone from the directory: what is mapped or open stays readable.
pub(crate) struct Run {
    path: PathBuf,
    record: RunRecord,
    reader: RunReader<Source>,
}

/// Where a run's bytes come from.
enum Source {
    Mapped(Box<dyn StorageMap>),
    /// Where mapping is unsafe: a truncated file on a network file system would kill the process.
    Read {
        file: Arc<dyn StorageFile>,
        len_bytes: u64,
    },
}

impl RunBytes for Source {
    type Error = RunError<io::Error>;

    fn len_bytes(&self) -> u64 {
        match self {
            Source::Mapped(map) => map.bytes().len() as u64,
            Source::Read { len_bytes, .. } => *len_bytes,
        }
    }

    #[inline]
    fn read(&self, offset: u64, len: usize) -> Result<Cow<'_, [u8]>, Self::Error> {
        match self {
            Source::Mapped(map) => {
                let range = place(offset, len);
                if !map.is_present(range.clone()) {
                    waiting::check().map_err(RunError::Io)?;
                    map.bring(range);
                }
                Ok(map.bytes().read(offset, len)?)
            }
            Source::Read { file, .. } => {
                if !waiting::is_allowed() && file.resident(offset, len as u64).ok().flatten() != Some(true) {
                    waiting::check().map_err(RunError::Io)?;
                }
                let mut bytes = vec![0; len];
                read_exact_at(&**file, &mut bytes, offset, Caching::Buffered).map_err(RunError::Io)?;
                Ok(Cow::Owned(bytes))
            }
        }
    }

    #[inline]
    fn fetch(&self, offset: u64) {
        if let Source::Mapped(map) = self
            && map.is_present(place(offset, 1))
        {
            map.bytes().fetch(offset);
        }
    }
}

/// A range of a mapping. What no mapping has ends up past the end of all.
#[inline]
fn place(offset: u64, len: usize) -> Range<usize> {
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    start..start.saturating_add(len)
}

impl Run {
    /// Opens the run that a manifest names. Reads its header alone, so the cost does not grow with its entries.
    pub(crate) fn open(storage: &dyn Storage, path: &Path, store: StoreId, record: &RunRecord) -> Result<Run> {
        let file = storage.open(path, OpenMode::Read).map_err(|source| {
            if source.kind() == io::ErrorKind::NotFound {
                Error::damaged(path, None, "the index run's file is missing")
            } else {
                Error::Io { action: "open", path: path.to_path_buf(), source }
            }
        })?;
        let len_bytes = file.facts().map_err(Error::io("measure", path))?.len_bytes;
        if len_bytes != record.bytes {
            let what = format!("the file has {len_bytes} bytes, and {} were written", record.bytes);
            return Err(Error::damaged(path, None, what));
        }
        let mapped =
            usize::try_from(len_bytes).map_err(|_| io::ErrorKind::Unsupported.into()).and_then(|len| file.map(len));
        let source = match mapped {
            Ok(map) => Source::Mapped(map),
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Source::Read { file, len_bytes },
            Err(error) => return Err(Error::io("map", path)(error)),
        };
        let reader = RunReader::new(source).map_err(|error| failure(path, error))?;
        let header = reader.header();
        if header.store != store || header.run != record.id || header.entries != record.entries {
            let what = format!("it is run {} of store {}, in another's place", header.run, header.store);
            return Err(Error::damaged(path, 0, what));
        }
        Ok(Run { path: path.to_path_buf(), record: *record, reader })
    }

    pub(crate) fn id(&self) -> RunId {
        self.record.id
    }

    pub(crate) fn entries(&self) -> u64 {
        self.record.entries
    }

    /// The manifest's line about it.
    pub(crate) fn record(&self) -> &RunRecord {
        &self.record
    }

    /// Writes all of its bytes, as they are, to another file.
    pub(crate) fn copy_to(&self, target: &dyn StorageFile, target_path: &Path) -> Result<()> {
        let mut at = 0;
        while at < self.record.bytes {
            let len = (self.record.bytes - at).min(READ_BYTES as u64) as usize;
            let piece = self.reader.bytes().read(at, len).map_err(|error| failure(&self.path, error))?;
            write_all_at(target, &piece, at, Caching::Buffered).map_err(Error::io("write", target_path))?;
            at += len as u64;
            step();
        }
        Ok(())
    }

    pub(crate) fn len_bytes(&self) -> u64 {
        self.record.bytes
    }

    /// What the run knows of a key: a put, a delete, or nothing.
    pub(crate) fn get(&self, key: &HashedKey<'_>) -> Result<Option<IndexEntry>> {
        self.reader.get_hashed(key).map_err(|error| failure(&self.path, error))
    }

    /// [`get`](Run::get), without taking memory for the entry.
    pub(crate) fn kind(&self, key: &HashedKey<'_>) -> Result<Option<IndexKind>> {
        self.reader.kind(key).map_err(|error| failure(&self.path, error))
    }

    /// Has the processor fetch what a lookup of this key begins with.
    pub(crate) fn fetch(&self, key: &HashedKey<'_>) {
        self.reader.fetch(key);
    }

    /// All entries from a key on, in order.
    pub(crate) fn range(&self, from: Bound<&[u8]>) -> impl Iterator<Item = Result<IndexEntry>> + '_ {
        self.reader.range(from).map(|entry| entry.map_err(|error| failure(&self.path, error)))
    }

    /// Reads and checks all of it.
    pub(crate) fn verify(&self) -> Result<()> {
        self.reader.verify().map_err(|error| failure(&self.path, error))
    }
}

fn failure(path: &Path, error: RunError<io::Error>) -> Error {
    match error {
        RunError::Format(error) => Error::format(path, error),
        RunError::Io(source) => Error::Io { action: "read", path: path.to_path_buf(), source },
    }
}

/// Where a run is written, and which it is.
pub(crate) struct NewRun<'a> {
    pub(crate) store: StoreId,
    pub(crate) id: RunId,
    /// Where it is written before it bears its name.
    pub(crate) unfinished: &'a Path,
    pub(crate) path: &'a Path,
    pub(crate) directory: &'a Path,
}

/// Writes a run of `entries`, in rising order, and gives it its name, durably. `None`, and no file, when there is no
/// entry. `expected` sizes
/// the table, and the memory that it takes while the run is written: 9.85 bytes for each.
pub(crate) fn write_run(
    storage: &dyn Storage,
    new: &NewRun<'_>,
    expected: u64,
    entries: impl Iterator<Item = Result<Arc<IndexEntry>>>,
) -> Result<Option<RunRecord>> {
    let mut entries = entries.peekable();
    if entries.peek().is_none() {
        return Ok(None);
    }
    let path = new.unfinished;
    let file = storage.open(path, OpenMode::CreateTruncate).map_err(Error::io("create", path))?;
    let mut offset = alight_format::RUN_HEADER_BYTES as u64;
    let mut builder = RunBuilder::new(new.store, new.id, expected, |piece: &[u8]| {
        write_all_at(&*file, piece, offset, Caching::Buffered).map_err(RunError::Io)?;
        offset += piece.len() as u64;
        Ok::<_, RunError<io::Error>>(())
    });
    let written = |error| match error {
        RunError::Io(source) => Error::Io { action: "write", path: path.to_path_buf(), source },
        RunError::Format(error @ FormatError::Damaged { .. }) => Error::format(path, error),
        RunError::Format(error) => {
            Error::damaged(path, None, format!("an index entry that cannot be written: {error}"))
        }
    };
    for entry in entries {
        builder.push(&*entry?).map_err(written)?;
        step();
    }
    let finished = builder.finish().map_err(written)?;
    write_all_at(&*file, &finished.header[..], 0, Caching::Buffered).map_err(Error::io("write", path))?;
    file.sync().map_err(Error::io("sync", path))?;
    storage.rename(path, new.path).map_err(Error::io("rename", path))?;
    storage.sync_dir(new.directory).map_err(Error::io("sync", new.directory))?;
    Ok(Some(finished.record))
}
