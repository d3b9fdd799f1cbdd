//! What can go wrong, on what, and what the caller can do about it.
//!
//! Data is in fields, prose in `Display`, the cause in [`std::error::Error::source`]. Nothing here is ever a panic:
//! panics are for broken promises of alight's own code.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use alight_format::FormatError;

/// The result of every call that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Any failure of a call.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file system refused a call, or failed it.
    #[error("{action} {}: {source}", path.display())]
    Io {
        /// What was being done, as a verb: "read", "sync".
        action: &'static str,
        /// On which file or directory.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },

    /// Bytes on disk are not what was written there. Nothing was changed; other keys are still served.
    #[error("damaged: {0}")]
    Damaged(Damage),

    /// No value is stored under this key.
    #[error("no value under key {0}")]
    NotFound(DisplayKey),

    /// The path holds no store.
    #[error("{} is not an alight store: {why}", path.display())]
    NotAStore {
        /// The path that was opened.
        path: PathBuf,
        /// What is missing or foreign there.
        why: String,
    },

    /// A store was to be created where something already is.
    #[error("{} already exists; open it, or choose another path", path.display())]
    AlreadyExists {
        /// The path that was to be created.
        path: PathBuf,
    },

    /// The store was written by a newer alight. Nothing was changed.
    #[error("{} was written by a newer alight ({what}); open it with that version", path.display())]
    Newer {
        /// The store's path.
        path: PathBuf,
        /// The version or the features that this build does not know.
        what: String,
    },

    /// Another handle is writing to this store. Reading beside it is possible with `read_only(true)`.
    #[error("{} is open for writing by {holder}; close that one first, or open read-only", path.display())]
    Locked {
        /// The store's path.
        path: PathBuf,
        /// Who holds it, in the holder's own words: process, host and time.
        holder: String,
    },

    /// A store that is open for reading shows a state of which its writer has given something back since, and could not
    /// know that it was still seen: [`Store::refresh`](crate::Store::refresh) it, or open it again.
    #[error("what was read from {} was given back by its writer meanwhile; refresh the store, or open it again", path.display())]
    Outdated {
        /// The store's path.
        path: PathBuf,
    },

    /// A write was asked of a store that was opened for reading.
    #[error("{} is open read-only", path.display())]
    ReadOnly {
        /// The store's path.
        path: PathBuf,
    },

    /// The store was closed, through this handle or a clone of it.
    #[error("the store is closed; open it again")]
    Closed,

    /// An earlier failure left unknown bytes on the disk, so writes are refused until the store is opened again. Reads go
    /// on. What was acknowledged as durable before is safe.
    #[error("writes are refused since an earlier failure ({cause}); open the store again to go on")]
    WritesRefused {
        /// The failure that stopped the writing.
        cause: String,
    },

    /// The store has a limit ([`max_bytes`](crate::StoreOptions::max_bytes)), and the values do not fit. Nothing was changed;
    /// delete keys, or raise the limit.
    #[error(
        "{needed} bytes do not fit into what the store's limit of {max_bytes} bytes leaves; delete keys, or raise it"
    )]
    Full {
        /// The bytes that were to be put.
        needed: u64,
        /// The limit.
        max_bytes: u64,
    },

    /// A key is empty or longer than [`KEY_BYTES_MAX`](crate::limits::KEY_BYTES_MAX).
    #[error("a key of {len_bytes} bytes; keys are 1 to {max} bytes", max = crate::limits::KEY_BYTES_MAX)]
    InvalidKey {
        /// The length of the key that was given.
        len_bytes: usize,
    },

    /// A shape, a dtype and a number of bytes do not belong together.
    #[error("dtype {dtype} and shape {shape:?} make {expected}, but {actual} bytes were given")]
    ShapeMismatch {
        /// The dtype's name.
        dtype: &'static str,
        /// The shape.
        shape: Vec<u64>,
        /// What they make: a number of bytes, or why there is none.
        expected: String,
        /// The bytes that were given.
        actual: u64,
    },

    /// A destination holds fewer bytes than the value.
    #[error("the value of {key} has {needed} bytes; the destination has {available}")]
    DestinationTooSmall {
        /// The key.
        key: DisplayKey,
        /// The value's length.
        needed: u64,
        /// The destination's length.
        available: u64,
    },

    /// A buffer is shorter than what was to be read into it.
    #[error("the values take {needed} bytes of memory, and the buffer has {available}; make it that long")]
    ArenaTooSmall {
        /// The bytes that the values take, with what lies between them.
        needed: u64,
        /// The buffer's length.
        available: u64,
    },

    /// A range reaches past the end of a value.
    #[error("range {start}..{end} of {key}, whose value has {len_bytes} bytes")]
    RangeOutOfBounds {
        /// The key.
        key: DisplayKey,
        /// The first byte that was asked for.
        start: u64,
        /// One past the last byte that was asked for.
        end: u64,
        /// The value's length.
        len_bytes: u64,
    },

    /// Something is larger than the format allows.
    #[error("{what} is {value}; at most {limit} is possible")]
    LimitExceeded {
        /// What is too large.
        what: &'static str,
        /// Its size.
        value: u64,
        /// The limit.
        limit: u64,
    },

    /// The reader that a value was to be put from failed. Nothing was stored.
    #[error("the value to be put could not be read: {source}")]
    Source {
        /// What the reader said.
        source: io::Error,
    },

    /// An option was given a value that it cannot have.
    #[error("{option}: {why}")]
    InvalidOption {
        /// The option.
        option: &'static str,
        /// What it accepts.
        why: String,
    },

    /// A device could not be used.
    #[error("{device}: {action}: {why}")]
    Device {
        /// The device, as `host` or `cuda:0`.
        device: String,
        /// What was being done.
        action: &'static str,
        /// The driver's answer, and the remedy where there is one.
        why: String,
    },

    /// A device has too little free memory.
    #[error("{device}: {needed} bytes were asked for and {free} are free")]
    DeviceMemory {
        /// The device.
        device: String,
        /// The bytes that were asked for.
        needed: u64,
        /// The bytes that the device had free.
        free: u64,
    },

    /// An operation did not end within its deadline. What it was given stays with it until the hardware is done.
    #[error("{operation} {} took longer than {after_ms} ms; the disk or the route to it may be stuck", path.display())]
    Timeout {
        /// What was being done, as a verb: "read", "write".
        operation: &'static str,
        /// On which file.
        path: PathBuf,
        /// The deadline that was missed.
        after_ms: u64,
    },

    /// An operation was given up before it was done: its pipeline was shut down, or nobody waits for it any more.
    #[error("{operation} {} was given up before it was done", path.display())]
    Cancelled {
        /// What was to be done, as a verb.
        operation: &'static str,
        /// On which file.
        path: PathBuf,
    },

    /// A file ends before the bytes that were asked for.
    #[error("{} has {len_bytes} bytes; {needed_bytes} were needed", path.display())]
    FileTooShort {
        /// The file.
        path: PathBuf,
        /// The length that it would have to have.
        needed_bytes: u64,
        /// The length that it has.
        len_bytes: u64,
    },

    /// A route to the device cannot serve the call, though nothing is wrong with the file; another route may.
    #[error("the {route} route cannot serve this: {why}")]
    RouteUnavailable {
        /// The route's name.
        route: &'static str,
        /// What it lacks, and the remedy where there is one.
        why: String,
    },

    /// An operation failed as often as it was to be tried.
    #[error("{source} ({attempts} attempts)")]
    RetriesExhausted {
        /// How often it was tried.
        attempts: u32,
        /// What the last attempt said.
        source: Box<Error>,
    },

    /// Mapped regions in use leave too little of the memory that is set aside for them.
    #[error("mapping needs {needed} bytes; regions that are in use leave {available}")]
    RegionMemory {
        /// The bytes that the new region takes.
        needed: u64,
        /// The most that evicting every region not in use would leave.
        available: u64,
    },

    /// A range overlaps, without lying in it, a mapped region that is in use.
    #[error("{start}..{end} of {} overlaps the mapped region {region_start}..{region_end}, which is in use", path.display())]
    RegionInUse {
        /// The file.
        path: PathBuf,
        /// The first byte that was asked for.
        start: u64,
        /// One past the last byte that was asked for.
        end: u64,
        /// The first byte of the region in use.
        region_start: u64,
        /// One past its last byte.
        region_end: u64,
    },

    /// A thread of alight's own ended in a panic: a mistake in alight, or in a callback that it was given.
    #[error("{operation} ended in a panic: {why}")]
    Panicked {
        /// What was being done.
        operation: &'static str,
        /// The panic's words.
        why: String,
    },
}

/// Where bytes on disk were found to be wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// The damaged file.
    pub path: PathBuf,
    /// The offset in it, where one is known.
    pub offset: Option<u64>,
    /// The key whose value is hit, where one is known.
    pub key: Option<DisplayKey>,
    /// What was expected and what was found.
    pub what: String,
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path.display())?;
        if let Some(offset) = self.offset {
            write!(f, " at byte {offset}")?;
        }
        if let Some(key) = &self.key {
            write!(f, ", key {key}")?;
        }
        write!(f, ": {}", self.what)
    }
}

/// A key as people read it: quoted, with bytes that are not UTF-8 escaped.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DisplayKey(pub Vec<u8>);

impl fmt::Display for DisplayKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("\"")?;
        for chunk in self.0.utf8_chunks() {
            write!(f, "{}", chunk.valid().escape_debug())?;
            for byte in chunk.invalid() {
                write!(f, "\\x{byte:02x}")?;
            }
        }
        f.write_str("\"")
    }
}

impl fmt::Debug for DisplayKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<&[u8]> for DisplayKey {
    fn from(key: &[u8]) -> Self {
        Self(key.to_vec())
    }
}

impl Error {
    /// Turns the system's answer into an error that names the action and the path.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error + use<> {
        let path = path.to_path_buf();
        move |source| Error::Io { action, path, source }
    }

    /// Damage in a file, at an offset where one is known.
    pub(crate) fn damaged(path: &Path, offset: impl Into<Option<u64>>, what: impl Into<String>) -> Error {
        Error::Damaged(Damage { path: path.to_path_buf(), offset: offset.into(), key: None, what: what.into() })
    }

    /// What a parser said of bytes read from `path`.
    pub(crate) fn format(path: &Path, error: FormatError) -> Error {
        match error {
            FormatError::NewerVersion { .. } | FormatError::UnknownIncompatible { .. } => {
                Error::Newer { path: path.to_path_buf(), what: error.to_string() }
            }
            error => Error::damaged(path, None, error.to_string()),
        }
    }

    /// Whether this says that bytes on disk are damaged.
    pub fn is_damage(&self) -> bool {
        matches!(self, Error::Damaged(_))
    }

    /// Whether the disk is full or a quota is used up.
    pub fn is_no_space(&self) -> bool {
        matches!(self, Error::Io { source, .. }
            if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_that_is_not_text_is_shown_escaped() {
        assert_eq!(DisplayKey(b"a\"\xff\n".to_vec()).to_string(), r#""a\"\xff\n""#);
    }
}
