//! How the payload of a large commit gets to its place: through the double buffer.
//!
//! # Invariants
//! - Nothing speaks for the bytes yet: whatever fails here, or gets stuck, is an error of that commit alone.

use std::slice;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::io::{Blob, PayloadStream, Waited, pump};
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
    // Zeros where the frame will be: the file system then has its blocks in order with the payload's sync, and the
    // frame's own sync, an overwrite, costs no journal commit (0.6 instead of 1.9 ms on a virtual disk with ext4).
    let wait = core.wait_for_device();
    let mut stream = PayloadStream::new(blobs, frame_len, &wait);
    let (file, segment, at, lock) = (Arc::clone(&tail.file), Arc::clone(&tail.segment), tail.offset, core.lock());
    let pumped = pump(
        &core.watched,
        &core.buffers,
        slice::from_ref(&(0..frame_len + payload_len)),
        core.write_deadline,
        |_, window| stream.fill(window),
        move |offset, window| {
            let _lock = &lock;
            write_all_at(&*file, window, at + offset, Caching::Direct)
                .map_err(Error::io("write a payload to", &segment.path))
        },
    )?;
    match (pumped, core.write_deadline) {
        (Waited::Stuck, Some(deadline)) => Err(core.given_up("write", tail.segment.path.clone(), deadline)),
        _ => {
            stream.finish();
            Ok(())
        }
    }
}
