//! Values that are read from files while they are put, so that a file of any length takes no memory.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use alight::ReadAt;

use crate::progress::Progress;

/// A run of a file's bytes.
pub(crate) struct FilePart<'a> {
    pub(crate) file: &'a File,
    /// Where the run begins in the file.
    pub(crate) start: u64,
    pub(crate) progress: &'a Progress,
}

impl ReadAt for FilePart<'_> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buf, self.start + offset).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => io::Error::new(error.kind(), "the file became shorter while it was read"),
            _ => error,
        })?;
        self.progress.add(buf.len() as u64);
        Ok(())
    }
}
