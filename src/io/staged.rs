//! The staged route: file ↔ pinned slots of the device's ring ↔ device, on as many threads as the transfer has lanes.
//!
//! Reads go past the page cache where the bytes are not in it. Writes go past it where they are whole blocks.
//!
//! # Invariants
//! - A lane that holds a slot, or a part of one, waits for no other.
//! - Host memory: the slots of the ring, whatever is moved.

use std::io::{self, IoSlice};
use std::ops::Range;

use super::fill::{SlotRead, fill, places};
use super::lanes::in_lanes;
use super::transport::{IoOperation, OpenFile, Piece, Route, Transfer, Transport};
use crate::config::READ_BYTES;
use crate::device::transfer::Download;
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
        let (offsets, reads): (Vec<u64>, Vec<SlotRead>) = reads(&transfer.pieces).unzip();
        let read = |range: Range<usize>, bytes: &mut [u8]| {
            places(&reads, range).try_for_each(|(index, at)| {
                transfer.check_wanted(IoOperation::Read)?;
                read_window(&transfer.file, &mut bytes[at], offsets[index], reads[index].wanted.end)
            })
        };
        fill(target, &reads, transfer.lanes, read, |_, _| {})
    }

    fn write(&self, transfer: &Transfer, source: &DeviceBuffer) -> Result<()> {
        transfer.check(source)?;
        let staging = source.device().staging()?;
        let download = Download::new(source)?;
        let chunks: Vec<Piece> = chunks(&transfer.pieces, READ_BYTES).collect();
        in_lanes(chunks.len(), transfer.lanes, |index| {
            let chunk = &chunks[index];
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

/// The pieces, cut at every multiple of `unit` in the file: each part, with its first and last block, is no longer.
pub(super) fn chunks(pieces: &[Piece], unit: usize) -> impl Iterator<Item = Piece> {
    let unit = unit as u64;
    pieces.iter().flat_map(move |piece| {
        let mut done = 0;
        std::iter::from_fn(move || {
            let left = piece.len_bytes.checked_sub(done).filter(|&left| left > 0)?;
            let file_offset = piece.file_offset + done;
            let len_bytes = left.min(unit - file_offset % unit);
            let buffer_offset = piece.buffer_offset + done;
            done += len_bytes;
            Some(Piece { file_offset, buffer_offset, len_bytes })
        })
    })
}

/// The reads of whole blocks that bring some pieces, and where each begins in the file.
fn reads(pieces: &[Piece]) -> impl Iterator<Item = (u64, SlotRead)> {
    chunks(pieces, READ_BYTES).map(|chunk| {
        let start = chunk.file_offset - chunk.file_offset % DIRECT_ALIGN_BYTES;
        let lead = (chunk.file_offset - start) as usize;
        let wanted = lead..lead + chunk.len_bytes as usize;
        let len = wanted.end.next_multiple_of(DIRECT_ALIGN_BYTES as usize);
        (start, SlotRead { len, wanted, target: chunk.buffer_offset })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn chunks_are_the_pieces_and_no_longer_than_a_read(
            pieces in prop::collection::vec((0u64..1 << 40, 0u64..5 << 20), 0..5),
        ) {
            let pieces: Vec<Piece> = pieces.into_iter().map(|(file_offset, len_bytes)| Piece {
                file_offset, buffer_offset: file_offset ^ 77, len_bytes,
            }).collect();
            let mut found = chunks(&pieces, READ_BYTES);
            for piece in &pieces {
                let mut done = 0;
                while done < piece.len_bytes {
                    let chunk = found.next().unwrap();
                    prop_assert_eq!(chunk.file_offset, piece.file_offset + done);
                    prop_assert_eq!(chunk.buffer_offset, piece.buffer_offset + done);
                    let start = chunk.file_offset / 4096 * 4096;
                    let end = (chunk.file_offset + chunk.len_bytes).next_multiple_of(4096);
                    prop_assert!(chunk.len_bytes > 0 && end - start <= READ_BYTES as u64);
                    done += chunk.len_bytes;
                }
                prop_assert_eq!(done, piece.len_bytes);
            }
            prop_assert!(found.next().is_none());
        }
    }
}
