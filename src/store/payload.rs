//! How the payload of a large commit gets to its place: through the double buffer, and what lies in a GPU's memory by cuFile where
//! that is the better way.
//!
//! # Invariants
//! - Nothing speaks for the bytes yet: whatever fails here, or gets stuck, is an error of that commit alone.
//! - By cuFile go whole blocks of the file, from the memory that the caller put; the GPU has taken their checksums before. What
//!   cuFile did not write the double buffer does.

use std::ops::Range;
use std::sync::Arc;

use alight_format::limits;

use crate::device::DeviceBuffer;
use crate::error::{Error, Result};
use crate::io::transport::{OpenFile, Piece, Transfer};
use crate::io::{Blob, LARGE_BYTES_MIN, PayloadStream, Waited, pump};
use crate::storage::{Caching, write_all_at};
use crate::store::commit::Tail;
use crate::store::core::Core;

/// Gives a leased segment back after its payload could not be written, unless a write that does not come back has it.
pub(crate) fn take_back(core: &Arc<Core>, tail: Tail, error: Error) -> Error {
    if matches!(error, Error::Timeout { .. }) {
        if let Ok(writer) = core.writer() {
            writer.committer.leave(&tail);
        }
        return error;
    }
    // Told in the log; what the caller is to know is the error.
    let _ = core.watch_write("give back a segment", move |core| {
        core.writer()?.committer.give_back(tail);
        Ok(())
    });
    error
}

/// Writes a payload where its commit will be, in a segment of which the caller has sole use. Where it is given up, the
/// segment is what is stuck's.
pub(crate) fn stream_payload(
    core: &Arc<Core>,
    tail: &Tail,
    frame_len: u64,
    payload_len: u64,
    blobs: &mut [Blob<'_>],
) -> Result<()> {
    let direct = write_direct(core, tail, frame_len, blobs)?;
    // Zeros where the frame will be: the file system then has its blocks in order with the payload's sync, and the
    // frame's own sync, an overwrite, costs no journal commit (0.6 instead of 1.9 ms on a virtual disk with ext4).
    let wait = core.wait_for_device();
    let mut stream = PayloadStream::new(blobs, frame_len, &wait);
    let (file, segment, at, lock) = (Arc::clone(&tail.file), Arc::clone(&tail.segment), tail.offset, core.lock());
    let pumped = pump(
        &core.watched,
        &core.buffers,
        &between(&direct, frame_len + payload_len),
        core.write_deadline,
        |offset, window| {
            stream.pass(offset.saturating_sub(frame_len));
            stream.fill(window)
        },
        move |offset, window| {
            let _lock = &lock;
            write_all_at(&*file, window, at + offset, Caching::Direct)
                .map_err(Error::io("write a payload to", &segment.path))
        },
    )?;
    match (pumped, core.write_deadline) {
        (Waited::Stuck, Some(deadline)) => Err(core.given_up("write", tail.segment.path.clone(), deadline)),
        _ => {
            stream.pass(payload_len);
            stream.finish();
            Ok(())
        }
    }
}

/// What lies between some ranges below `end`, which are in rising order.
fn between(ranges: &[Range<u64>], end: u64) -> Vec<Range<u64>> {
    let starts = std::iter::once(0).chain(ranges.iter().map(|range| range.end));
    let ends = ranges.iter().map(|range| range.start).chain(std::iter::once(end));
    starts.zip(ends).map(|(start, end)| start..end).filter(|range| !range.is_empty()).collect()
}

/// A blob that cuFile is to write.
struct Direct {
    /// Its place among the blobs.
    index: usize,
    buffer: Arc<DeviceBuffer>,
    /// Where it lies in the buffer.
    range: Range<u64>,
    /// Where it lies in the file.
    file_offset: u64,
}

impl Direct {
    /// The bytes of it that are whole blocks: it begins on one.
    fn whole_bytes(&self) -> u64 {
        let len = self.range.end - self.range.start;
        len - len % limits::BLOCK_BYTES
    }

    fn chunks(&self) -> Vec<Range<u64>> {
        let starts = self.range.clone().step_by(limits::CHUNK_BYTES as usize);
        starts.map(|start| start..(start + limits::CHUNK_BYTES).min(self.range.end)).collect()
    }

    fn transfer(&self, file: &OpenFile) -> Transfer {
        let (file_offset, buffer_offset) = (self.file_offset, self.range.start);
        Transfer::new(file.clone(), Piece { file_offset, buffer_offset, len_bytes: self.whole_bytes() })
    }
}

/// Writes by cuFile what is to go by it, and takes the checksums of that; answers which ranges of the commit were written, in
/// rising order. Where cuFile fails these are none.
fn write_direct(core: &Arc<Core>, tail: &Tail, frame_len: u64, blobs: &mut [Blob<'_>]) -> Result<Vec<Range<u64>>> {
    let file = OpenFile { file: Arc::clone(&tail.file), path: tail.segment.path.as_path().into() };
    let payload = tail.offset + frame_len;
    let chosen = blobs.iter().enumerate().filter_map(|(index, blob)| {
        let (buffer, range) = blob.source.on_device().filter(|_| blob.source.len_bytes() >= LARGE_BYTES_MIN)?;
        Some(Direct { index, buffer: Arc::clone(buffer), range, file_offset: payload + blob.offset })
    });
    let mut chosen: Vec<Direct> = chosen.collect();
    // A batch is of one GPU, mostly.
    let Some(device) = chosen.first().map(|first| first.buffer.device().clone()) else { return Ok(Vec::new()) };
    chosen.retain(|direct| *direct.buffer.device() == device);
    if !core.routes.may_write_by_cufile(&file, &device, &core.counters) {
        return Ok(Vec::new());
    }
    let written = core.watch_write("write", move |core| {
        let crcs = chosen.iter().map(|direct| direct.buffer.crc32(&direct.chunks())).collect::<Result<Vec<_>>>()?;
        let transfers: Vec<_> =
            chosen.iter().map(|direct| (direct.transfer(&file), Arc::clone(&direct.buffer))).collect();
        let done = core.routes.write_by_cufile(&transfers, &core.counters)?;
        Ok(done.then_some((chosen, crcs)))
    })?;
    let Some((direct, crcs)) = written else { return Ok(Vec::new()) };
    for (direct, crcs) in direct.iter().zip(crcs) {
        blobs[direct.index].set_checksums(crcs);
    }
    let in_commit = |direct: &Direct| {
        let start = direct.file_offset - tail.offset;
        start..start + direct.whole_bytes()
    };
    Ok(direct.iter().map(in_commit).collect())
}

#[cfg(test)]
mod tests;
