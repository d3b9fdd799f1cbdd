//! The staged route: file ↔ pinned slots of the device's ring ↔ device, on as many threads as the transfer has lanes.
//!
//! Reads go past the page cache where the bytes are not in it. Writes go past it where they are whole blocks.
//!
//! # Invariants
//! - A lane holds one slot at a time, so lanes never wait for each other's slots.
//! - Host memory: the slots of the ring, whatever is moved.

use std::io::{self, IoSlice};
use std::thread;

use parking_lot::Mutex;

use super::transport::{IoOperation, OpenFile, Piece, Route, Transfer, Transport};
use crate::device::staging::SLOT_BYTES;
use crate::device::transfer::{Download, Upload};
use crate::device::{Device, DeviceBuffer};
use crate::error::{Error, Result};
use crate::storage::{Caching, DIRECT_ALIGN_BYTES, StorageFile, is_direct_aligned};

/// Moves bytes through the pinned ring of the buffer's device.
#[derive(Debug, Clone, Default)]
pub struct StagedTransport(());

impl StagedTransport {
    /// The staged route, of every device. It has no state of its own.
    pub fn new() -> Self {
        Self(())
    }
}

impl Transport for StagedTransport {
    fn route(&self) -> Route {
        Route::Staged
    }

    fn serves(&self, _file: &OpenFile, device: &Device) -> Result<()> {
        device
            .staging()
            .map(drop)
            .map_err(|error| Error::RouteUnavailable { route: Route::Staged.name(), why: error.to_string() })
    }

    fn read(&self, transfer: &Transfer, target: &mut DeviceBuffer) -> Result<()> {
        transfer.check(target)?;
        let staging = target.device().staging()?;
        let upload = Upload::new(target)?;
        in_lanes(transfer, |chunk| {
            transfer.check_wanted(IoOperation::Read)?;
            let mut slot = staging.acquire()?;
            // Whole blocks around the chunk: it lies between two multiples of the slot, so they fit.
            let start = chunk.file_offset - chunk.file_offset % DIRECT_ALIGN_BYTES;
            let lead = (chunk.file_offset - start) as usize;
            let wanted = lead + chunk.len_bytes as usize;
            let window = &mut slot[..wanted.next_multiple_of(DIRECT_ALIGN_BYTES as usize)];
            read_window(&transfer.file, window, start, wanted)?;
            upload.copy(slot, lead..wanted, chunk.buffer_offset)
        })?;
        upload.finish()
    }

    fn write(&self, transfer: &Transfer, source: &DeviceBuffer) -> Result<()> {
        transfer.check(source)?;
        let staging = source.device().staging()?;
        let download = Download::new(source)?;
        in_lanes(transfer, |chunk| {
            transfer.check_wanted(IoOperation::Write)?;
            let len = chunk.len_bytes as usize;
            let slot = download.start(staging.acquire()?, chunk.buffer_offset, len)?.wait()?;
            // Who waited may have gone while the copy ran.
            transfer.check_wanted(IoOperation::Write)?;
            let caching = caching(&*transfer.file.file, &slot[..len], chunk.file_offset);
            write_all(&transfer.file, &slot[..len], chunk.file_offset, caching)
        })
    }
}

/// Past the page cache where file, address, offset and length allow it.
fn caching(file: &dyn StorageFile, bytes: &[u8], offset: u64) -> Caching {
    let aligned = is_direct_aligned(bytes.as_ptr().addr() as u64, offset, bytes.len());
    if aligned && file.direct() { Caching::Direct } else { Caching::Buffered }
}

/// Reads at least the first `wanted` bytes of a window; the rest of it is only there so that the read is whole blocks.
fn read_window(file: &OpenFile, window: &mut [u8], offset: u64, wanted: usize) -> Result<()> {
    let mut caching = caching(&*file.file, window, offset);
    // A question that the system cannot answer counts as not resident: then the disk is asked, which is right either way.
    if caching == Caching::Direct && file.file.resident(offset, wanted as u64).unwrap_or_default().unwrap_or(false) {
        caching = Caching::Buffered;
    }
    let mut done = 0;
    while done < wanted {
        let at = offset + done as u64;
        if !is_direct_aligned(window[done..].as_ptr().addr() as u64, at, window.len() - done) {
            caching = Caching::Buffered;
        }
        match file.file.read_at(&mut window[done..], at, caching) {
            Ok(0) => return Err(too_short(file, offset + wanted as u64, at)),
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Error::io("read", &file.path)(error)),
        }
    }
    Ok(())
}

/// The file ended before the bytes that were promised.
pub(super) fn too_short(file: &OpenFile, needed_bytes: u64, len_bytes: u64) -> Error {
    Error::FileTooShort { path: file.path.to_path_buf(), needed_bytes, len_bytes }
}

/// Writes all bytes, continuing short counts and interrupted calls.
pub(super) fn write_all(file: &OpenFile, mut bytes: &[u8], mut offset: u64, mut caching: Caching) -> Result<()> {
    while !bytes.is_empty() {
        match file.file.write_vectored_at(&[IoSlice::new(bytes)], offset, caching) {
            Ok(0) => return Err(Error::io("write", &file.path)(io::ErrorKind::WriteZero.into())),
            Ok(count) => {
                bytes = &bytes[count..];
                offset += count as u64;
                if !is_direct_aligned(bytes.as_ptr().addr() as u64, offset, bytes.len()) {
                    caching = Caching::Buffered;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Error::io("write", &file.path)(error)),
        }
    }
    Ok(())
}

/// The pieces, cut at every multiple of a slot's length in the file: each part fits a slot, with its first and last block.
pub(super) fn chunks(pieces: &[Piece]) -> impl Iterator<Item = Piece> {
    pieces.iter().flat_map(|piece| {
        let mut done = 0;
        std::iter::from_fn(move || {
            let left = piece.len_bytes.checked_sub(done).filter(|&left| left > 0)?;
            let file_offset = piece.file_offset + done;
            let len_bytes = left.min(SLOT_BYTES as u64 - file_offset % SLOT_BYTES as u64);
            let buffer_offset = piece.buffer_offset + done;
            done += len_bytes;
            Some(Piece { file_offset, buffer_offset, len_bytes })
        })
    })
}

/// Calls `work` for every chunk of a transfer, on this thread and up to `lanes - 1` others; ends at the first failure.
fn in_lanes(transfer: &Transfer, work: impl Fn(Piece) -> Result<()> + Sync) -> Result<()> {
    let mut chunks = chunks(&transfer.pieces).peekable();
    // One chunk for each lane at least.
    let parts = transfer.len_bytes().div_ceil(SLOT_BYTES as u64).max(transfer.pieces.len() as u64);
    let lanes = transfer.lanes.min(usize::try_from(parts).unwrap_or(usize::MAX)).max(1);
    if lanes == 1 {
        return chunks.try_for_each(work);
    }
    let (queue, failure) = (Mutex::new(chunks), Mutex::new(None));
    let lane = || {
        while failure.lock().is_none() {
            // The queue is let go of before the work begins.
            let Some(chunk) = ({ queue.lock().next() }) else { return };
            if let Err(error) = work(chunk) {
                failure.lock().get_or_insert(error);
            }
        }
    };
    thread::scope(|scope| {
        for _ in 1..lanes {
            // Without a thread the others do its part.
            let _ = thread::Builder::new().name("alight-lane".into()).spawn_scoped(scope, lane);
        }
        lane();
    });
    failure.into_inner().map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn chunks_are_the_pieces_and_fit_a_slot(
            pieces in prop::collection::vec((0u64..1 << 40, 0u64..5 << 20), 0..5),
        ) {
            let pieces: Vec<Piece> = pieces.into_iter().map(|(file_offset, len_bytes)| Piece {
                file_offset, buffer_offset: file_offset ^ 77, len_bytes,
            }).collect();
            let mut found = chunks(&pieces);
            for piece in &pieces {
                let mut done = 0;
                while done < piece.len_bytes {
                    let chunk = found.next().unwrap();
                    prop_assert_eq!(chunk.file_offset, piece.file_offset + done);
                    prop_assert_eq!(chunk.buffer_offset, piece.buffer_offset + done);
                    let start = chunk.file_offset / 4096 * 4096;
                    let end = (chunk.file_offset + chunk.len_bytes).next_multiple_of(4096);
                    prop_assert!(chunk.len_bytes > 0 && end - start <= SLOT_BYTES as u64);
                    done += chunk.len_bytes;
                }
                prop_assert_eq!(done, piece.len_bytes);
            }
            prop_assert!(found.next().is_none());
        }
    }
}
