//! Walks through a segment from commit to commit, and past what is broken.
//!
//! Where a frame lies, the next one is behind its payload. Where none can be read, a broken prelude-less stretch is searched
//! block by block for the next frame that carries the segment's salt and its own place.
//!
//! # Invariants
//! - Only whole frames with the right checksum, salt and place are commits; everything else is a stretch not understood.
//! - A part that the disk does not give is such a stretch as well: the walk goes on behind it.

use std::ops::Range;
use std::sync::Arc;

use alight_format::{PRELUDE_BYTES, Prelude, is_zero, limits};

use crate::config::READ_BYTES;
use crate::io::step;
use crate::storage::{AlignedBuf, Caching, StorageFile, read_exact_at};
use crate::store::recover::{Found, read_frame};
use crate::store::segment::{FIRST_FRAME, Segment};

/// What a walk meets, in the order of the file.
pub(crate) enum Met {
    Commit(Found),
    /// Bytes that are no commit, and not all zeros.
    Unknown(Range<u64>),
}

/// Walks through a segment up to `end`, the file's own or where its commits are known to end.
pub(crate) fn walk<E>(
    segment: &Arc<Segment>,
    file: &dyn StorageFile,
    end: u64,
    mut visit: impl FnMut(Met) -> Result<(), E>,
) -> Result<(), E> {
    let mut offset = FIRST_FRAME;
    while offset < end {
        // The payload may reach past the end of a file that was cut: what is left of it counts.
        if let Ok(Some(found)) = read_frame(segment, file, offset, limits::SEGMENT_BYTES_MAX) {
            offset = found.end();
            visit(Met::Commit(found))?;
            continue;
        }
        let gap = search(segment, file, offset, end);
        if gap.has_data {
            visit(Met::Unknown(offset..gap.next))?;
        }
        offset = gap.next;
    }
    Ok(())
}

/// A stretch without a frame.
struct Gap {
    /// Where the next frame begins, or the end.
    next: u64,
    has_data: bool,
}

fn search(segment: &Arc<Segment>, file: &dyn StorageFile, from: u64, end: u64) -> Gap {
    let mut gap = Gap { next: end, has_data: false };
    let mut block = AlignedBuf::zeroed(limits::BLOCK_BYTES as usize);
    // A frame whose prelude is sound says where the next one is, whatever is wrong with the rest.
    if read_exact_at(file, &mut block, from, Caching::Buffered).is_ok()
        && let Some(prelude) = own_prelude(&block, segment, from)
    {
        return Gap { next: prelude.next_offset().min(end), has_data: true };
    }
    let mut window = AlignedBuf::zeroed(READ_BYTES.min((end - from).next_multiple_of(limits::BLOCK_BYTES) as usize));
    let mut at = from;
    while at < end {
        // A file system that cannot tell where data is answers with the offset itself; so does one that fails.
        match file.next_data(at) {
            Ok(None) => return gap,
            Ok(Some(data)) => at = at.max(data / limits::BLOCK_BYTES * limits::BLOCK_BYTES),
            Err(_) => {}
        }
        if at >= end {
            return gap;
        }
        let mut len = (end - at).min(window.len() as u64) as usize;
        if read_exact_at(file, &mut window[..len], at, Caching::Buffered).is_err() {
            // Block by block, so that one that cannot be read hides no others.
            len = len.min(limits::BLOCK_BYTES as usize);
            if read_exact_at(file, &mut window[..len], at, Caching::Buffered).is_err() {
                gap.has_data = true;
                at += limits::BLOCK_BYTES;
                continue;
            }
        }
        step();
        for (index, block) in window[..len].chunks(limits::BLOCK_BYTES as usize).enumerate() {
            let place = at + index as u64 * limits::BLOCK_BYTES;
            if place > from
                && own_prelude(block, segment, place).is_some()
                && matches!(read_frame(segment, file, place, limits::SEGMENT_BYTES_MAX), Ok(Some(_)))
            {
                gap.next = place;
                return gap;
            }
            gap.has_data |= !is_zero(block);
        }
        at += len as u64;
    }
    gap
}

fn own_prelude(block: &[u8], segment: &Segment, offset: u64) -> Option<Prelude> {
    if block.len() < PRELUDE_BYTES {
        return None;
    }
    Prelude::decode(block).ok().filter(|prelude| prelude.belongs(segment.salt, offset))
}
