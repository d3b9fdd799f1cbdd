//! A value read in order by a thread of its own, and handed to the caller window by window: into memory that the caller lent, and
//! that nobody stuck may have, bytes are brought by the caller's own thread.
//!
//! # Invariants
//! - A window is the reading thread's or the caller's, never both: it is passed by value, there and back.
//! - There are at most [`HANDED_WINDOWS`], however long the value is.
//! - Dropping the caller's side waits for nothing; the thread ends with the read that it is at.

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::time::Duration;

use super::plan::Extent;
use super::read::{SegmentFile, chunk_buffer, chunks_of, read_chunk, read_chunks};
use super::watched::{Waited, Watched, step};
use crate::config::HANDED_WINDOWS;
use crate::error::{Error, Result};
use crate::metrics::Counters;
use crate::storage::AlignedBuf;

/// A chunk that was read.
struct Window {
    at: u64,
    buffer: AlignedBuf,
    bytes: Range<usize>,
}

/// As [`read_chunks`], with the file found and read by another thread, which is waited for no longer than `deadline` for each
/// chunk. While the caller is handed one the next are read. Where the system gives no thread, the caller's does it, and waits
/// as long as it takes.
pub(crate) fn hand_chunks(
    threads: &Watched,
    deadline: Duration,
    find: impl Fn() -> Result<SegmentFile> + Send + Sync + 'static,
    extent: &Extent,
    range: Range<u64>,
    counters: &Arc<Counters>,
    mut hand_on: impl FnMut(u64, &[u8]) -> Result<()>,
) -> Result<Waited> {
    let (give, free) = mpsc::channel();
    let (full, take) = mpsc::channel();
    let find = Arc::new(find);
    let reader = {
        let (find, extent, range, counters) = (Arc::clone(&find), *extent, range.clone(), Arc::clone(counters));
        move || {
            if let Err(error) = read_windows(&*find, &extent, range, &counters, &free, &full) {
                // Nobody is left to be told where the caller has gone.
                let _ = full.send(Err(error));
            }
        }
    };
    if threads.start(Box::new(reader)).is_err() {
        return read_chunks(&find()?, extent, range, counters, hand_on).map(|()| Waited::Done);
    }
    for _ in chunks_of(extent, range) {
        match take.recv_timeout(deadline) {
            Ok(window) => {
                let Window { at, buffer, bytes } = window?;
                step();
                hand_on(at, &buffer[bytes])?;
                // After the last one nobody takes it.
                let _ = give.send(buffer);
            }
            Err(RecvTimeoutError::Timeout) => return Ok(Waited::Stuck),
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Error::Panicked { operation: "read", why: "its thread is gone".into() });
            }
        }
    }
    Ok(Waited::Done)
}

/// Reads windows until there are no more, or the caller has gone.
fn read_windows(
    find: &impl Fn() -> Result<SegmentFile>,
    extent: &Extent,
    range: Range<u64>,
    counters: &Counters,
    free: &Receiver<AlignedBuf>,
    full: &Sender<Result<Window>>,
) -> Result<()> {
    let file = find()?;
    let mut made = 0;
    for chunk in chunks_of(extent, range.clone()) {
        let mut buffer = match free.try_recv() {
            Ok(buffer) => buffer,
            Err(TryRecvError::Empty) if made < HANDED_WINDOWS => {
                made += 1;
                chunk_buffer(&range)
            }
            Err(_) => match free.recv() {
                Ok(buffer) => buffer,
                Err(_) => return Ok(()),
            },
        };
        // Without patience it has landed.
        let (_, bytes) = read_chunk(&file, extent, chunk, &mut buffer, None, counters)?;
        if full.send(Ok(Window { at: chunk.0, buffer, bytes })).is_err() {
            return Ok(());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use alight_format::SegmentId;

    use super::*;
    use crate::io::fixtures::{self, StuckStorage};
    use crate::storage::{OpenMode, Storage};

    const LONG: Duration = Duration::from_secs(60);

    fn finder(storage: impl Storage + Clone + 'static) -> impl Fn() -> Result<SegmentFile> + Send + Sync {
        move || {
            let file = storage.open(Path::new("/f"), OpenMode::Read).map_err(Error::io("open", Path::new("/f")))?;
            Ok(SegmentFile { file, path: Arc::new(PathBuf::from("/f")), sealed_end: None })
        }
    }

    fn extent(offset: u64, length: u64) -> Extent {
        Extent { segment: SegmentId(0), offset, length, crc: 0 }
    }

    #[test]
    fn every_chunk_is_handed_over_once_and_in_order() {
        let disk = fixtures::disk(12 << 20);
        let (threads, counters) = (Watched::default(), Arc::default());
        for (offset, length, range) in
            [(4096, 11 << 20, 0..11 << 20), (777, (9 << 20) + 5, 2 << 20..(9 << 20) + 5), (0, 0, 0..0)]
        {
            let mut next = range.start;
            let extent = extent(offset, length);
            let outcome =
                hand_chunks(&threads, LONG, finder(disk.clone()), &extent, range.clone(), &counters, |at, bytes| {
                    assert_eq!(at, next);
                    next += bytes.len() as u64;
                    assert!(*bytes == fixtures::bytes(offset + at..offset + next));
                    Ok(())
                });
            assert_eq!((outcome.unwrap(), next), (Waited::Done, range.end));
        }
        let past = extent(8 << 20, 8 << 20);
        let damaged = hand_chunks(&threads, LONG, finder(disk.clone()), &past, 0..8 << 20, &counters, |_, _| Ok(()));
        assert!(damaged.unwrap_err().is_damage(), "the file ends before");
        let mut handed = 0;
        let whole = extent(0, 12 << 20);
        let refused = hand_chunks(&threads, LONG, finder(disk), &whole, 0..12 << 20, &counters, |_, _| {
            handed += 1;
            if handed == 3 { Err(Error::Closed) } else { Ok(()) }
        });
        assert!(matches!(refused, Err(Error::Closed)) && handed == 3);
    }

    #[test]
    fn a_read_that_gets_stuck_has_no_memory_of_the_callers() {
        let stuck = StuckStorage::new(fixtures::disk(8 << 20));
        let (threads, counters) = (Watched::default(), Arc::default());
        let mut destination = vec![0; 8 << 20];
        let outcome = hand_chunks(
            &threads,
            Duration::from_millis(100),
            finder(stuck.clone()),
            &extent(0, 8 << 20),
            0..8 << 20,
            &counters,
            |at, bytes| {
                destination[at as usize..][..bytes.len()].copy_from_slice(bytes);
                stuck.gate.close();
                Ok(())
            },
        );
        assert_eq!(outcome.unwrap(), Waited::Stuck);
        assert_eq!(stuck.gate.waiting(), 1);
        drop(destination);
        stuck.gate.open();
        stuck.gate.wait_for(0);
    }
}
