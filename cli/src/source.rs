//! Values that are read from files while they are put, so that a file of any length takes no memory.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use alight::ReadAt;

use crate::progress::Progress;

/// An open file as the source of values; counts what is read.
pub(crate) struct FileSource<'a> {
    pub(crate) file: &'a File,
    pub(crate) progress: &'a Progress,
}

impl ReadAt for FileSource<'_> {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(self.file, buf, offset).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => io::Error::new(error.kind(), "the file became shorter while it was read"),
            _ => error,
        })?;
        self.progress.add(buf.len() as u64);
        Ok(())
    }
}
