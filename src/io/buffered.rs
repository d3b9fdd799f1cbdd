//! The buffered route: through ordinary memory and the page cache, one thread, one buffer. It needs no pinned memory and no
//! direct transfers, so it serves where nothing else does: a container that may lock no memory, for one.

use std::io;
use std::sync::Arc;

use super::staged::{chunks, too_short, write_all};
use super::transport::{IoOperation, OpenFile, Route, Transfer, Transport};
use crate::config::READ_BYTES;
use crate::device::{Device, DeviceBuffer};
use crate::error::{Error, Result};
use crate::storage::{BufferPool, Caching};

/// Moves bytes through ordinary memory.
#[derive(Debug, Default)]
pub struct BufferedTransport {
    pool: Arc<BufferPool>,
}

impl BufferedTransport {
    /// The buffered route, of every device. It keeps a few buffers of 1 MiB between uses.
    pub fn new() -> Self {
        Self::default()
    }
}

impl Transport for BufferedTransport {
    fn route(&self) -> Route {
        Route::Buffered
    }

    fn serves(&self, _file: &OpenFile, _device: &Device) -> Result<()> {
        Ok(())
    }

    fn read(&self, transfer: &Transfer, target: &mut DeviceBuffer) -> Result<()> {
        transfer.check(target)?;
        let mut memory = self.pool.take(scratch_bytes(transfer));
        for chunk in chunks(&transfer.pieces, READ_BYTES) {
            transfer.check_wanted(IoOperation::Read)?;
            let bytes = &mut memory[..chunk.len_bytes as usize];
            read_all(&transfer.file, bytes, chunk.file_offset)?;
            target.copy_from_host(chunk.buffer_offset, bytes)?;
        }
        Ok(())
    }

    fn write(&self, transfer: &Transfer, source: &DeviceBuffer) -> Result<()> {
        transfer.check(source)?;
        let mut memory = self.pool.take(scratch_bytes(transfer));
        for chunk in chunks(&transfer.pieces, READ_BYTES) {
            transfer.check_wanted(IoOperation::Write)?;
            let bytes = &mut memory[..chunk.len_bytes as usize];
            source.copy_to_host(chunk.buffer_offset, bytes)?;
            write_all(&transfer.file, bytes, chunk.file_offset, Caching::Buffered)?;
        }
        Ok(())
    }
}

fn scratch_bytes(transfer: &Transfer) -> usize {
    // No chunk is longer.
    transfer.len_bytes().min(READ_BYTES as u64) as usize
}

/// Reads all bytes, continuing short counts and interrupted calls.
fn read_all(file: &OpenFile, bytes: &mut [u8], offset: u64) -> Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        let at = offset + done as u64;
        match file.file.read_at(&mut bytes[done..], at, Caching::Buffered) {
            Ok(0) => return Err(too_short(file, offset + bytes.len() as u64, at)),
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Error::io("read", &file.path)(error)),
        }
    }
    Ok(())
}
