//! The bare disk: appends with one sync each, and reads, past the page cache. The ceiling that a store is measured by.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;

use rustix::fs::{Advice, FallocateFlags, OFlags};

use super::MIB;
use crate::failure::Failure;

/// What direct transfers are aligned to.
const PAGE: usize = 4096;

/// What one large transfer is cut into, and by how many threads it is carried: where a single disk reaches its rate.
const WRITE_PIECE_BYTES: usize = 4 * MIB as usize;
const READ_PIECE_BYTES: usize = MIB as usize;
const THREADS: usize = 4;

/// Memory that begins on a page.
pub(super) struct Aligned {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    pub(super) fn zeroed(len: usize) -> Self {
        let memory = vec![0; len + PAGE];
        let start = memory.as_ptr().align_offset(PAGE);
        assert!(start < PAGE, "bytes can be aligned to anything");
        Self { memory, start, len }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.len]
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

/// A file that is appended to and read as fast as the disk allows.
pub(super) struct RawFile {
    path: PathBuf,
    file: File,
    direct: bool,
    end: u64,
    len: u64,
}

impl RawFile {
    /// Makes the file and takes all its space ahead, as a store does: an append then changes no length.
    pub(super) fn create(path: &Path, len: u64) -> Result<Self, Failure> {
        let open = |flags: OFlags| {
            let flags = flags.bits() as i32;
            File::options().read(true).write(true).create(true).truncate(true).custom_flags(flags).open(path)
        };
        let (file, direct) = match open(OFlags::DIRECT) {
            Ok(file) => (file, true),
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                (open(OFlags::empty()).map_err(|error| Failure::io("create", path, error))?, false)
            }
            Err(error) => return Err(Failure::io("create", path, error)),
        };
        match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, len) {
            // Without it, writes take space as they go.
            Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => {}
            Err(error) => return Err(Failure::io("take space for", path, error.into())),
        }
        file.sync_all().map_err(|error| Failure::io("sync", path, error))?;
        Ok(Self { path: path.to_owned(), file, direct, end: 0, len })
    }

    pub(super) fn is_direct(&self) -> bool {
        self.direct
    }

    /// The bytes that were appended.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// Appends whole pages, as one sync.
    pub(super) fn append(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        let at = self.reserve(bytes.len() as u64);
        self.write(bytes, at).map_err(|error| Failure::io("write", &self.path, error))
    }

    /// Takes the next place; starts over at the end, which overwrites.
    pub(super) fn reserve(&mut self, len: u64) -> u64 {
        if self.end + len > self.len {
            self.end = 0;
        }
        let at = self.end;
        self.end += len;
        at
    }

    /// Writes to a place that was reserved, and syncs.
    pub(super) fn write(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        if bytes.len() <= WRITE_PIECE_BYTES {
            self.file.write_all_at(bytes, at)?;
        } else {
            thread::scope(|scope| {
                let carriers: Vec<_> = (0..THREADS)
                    .map(|carrier| {
                        scope.spawn(move || {
                            let mut mine = bytes.chunks(WRITE_PIECE_BYTES).enumerate().skip(carrier).step_by(THREADS);
                            mine.try_for_each(|(number, piece)| {
                                self.file.write_all_at(piece, at + (number * WRITE_PIECE_BYTES) as u64)
                            })
                        })
                    })
                    .collect();
                carriers.into_iter().try_for_each(|carrier| carrier.join().expect("a carrier does not panic"))
            })?;
        }
        self.file.sync_data()
    }

    /// Reads from one place, with one thread.
    pub(super) fn read(&self, buf: &mut [u8], at: u64) -> Result<(), Failure> {
        self.file.read_exact_at(buf, at).map_err(|error| Failure::io("read", &self.path, error))
    }

    /// Reads a long run with several threads.
    pub(super) fn read_run(&self, buf: &mut [u8], at: u64) -> Result<(), Failure> {
        let mut mine: Vec<Vec<(u64, &mut [u8])>> = (0..THREADS).map(|_| Vec::new()).collect();
        for (number, piece) in buf.chunks_mut(READ_PIECE_BYTES).enumerate() {
            mine[number % THREADS].push((at + (number * READ_PIECE_BYTES) as u64, piece));
        }
        let outcome = thread::scope(|scope| {
            let carriers: Vec<_> = mine
                .into_iter()
                .map(|pieces| {
                    scope.spawn(|| pieces.into_iter().try_for_each(|(at, piece)| self.file.read_exact_at(piece, at)))
                })
                .collect();
            carriers.into_iter().try_for_each(|carrier| carrier.join().expect("a carrier does not panic"))
        });
        outcome.map_err(|error| Failure::io("read", &self.path, error))
    }

    /// Drops what the page cache has of the file.
    pub(super) fn forget(&self) {
        forget(&self.file);
    }
}

/// Drops what the page cache has of a file. Advice: where it is not taken, a get is warm and the route says so.
pub(super) fn forget(file: &File) {
    let _ = rustix::fs::fadvise(file, 0, None, Advice::DontNeed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_appended_is_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let mut file = RawFile::create(&folder.path().join("raw"), 40 * MIB).unwrap();
        let mut long = Aligned::zeroed(17 * MIB as usize);
        crate::pattern::Pattern::new(3).fill(0, long.bytes_mut());
        file.append(&long.bytes()[..PAGE]).unwrap();
        file.append(long.bytes()).unwrap();
        file.forget();
        let mut back = Aligned::zeroed(17 * MIB as usize);
        file.read_run(back.bytes_mut(), PAGE as u64).unwrap();
        assert!(back.bytes() == long.bytes());
        file.read(&mut back.bytes_mut()[..PAGE], 0).unwrap();
        assert_eq!(back.bytes()[..PAGE], long.bytes()[..PAGE]);
        assert_eq!(file.end(), 17 * MIB + PAGE as u64);
        file.reserve(17 * MIB);
        assert_eq!(file.reserve(17 * MIB), 0, "it starts over");
    }
}
