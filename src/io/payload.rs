//! A commit's payload: where each blob lies in it, and its bytes as one stream with the checksums taken on the way.

use alight_format::{combine, limits};

use crate::device::transfer::Wait;
use crate::error::Result;
use crate::tensor::TensorRef;

/// Where each blob lies in a payload, and how long the payload is, in whole blocks.
///
/// Blobs of a block and more start on a block, so that a direct read can land in place; smaller ones are packed. They
/// keep their order.
pub(crate) fn lay_out(lengths: impl IntoIterator<Item = u64>) -> (Vec<u64>, u64) {
    let mut end = 0u64;
    let offsets = lengths
        .into_iter()
        .map(|length| {
            let offset = end.next_multiple_of(limits::blob_align_bytes(length));
            end = offset + length;
            offset
        })
        .collect();
    (offsets, end.next_multiple_of(limits::BLOCK_BYTES))
}

/// One blob of a payload.
pub(crate) struct Blob<'a> {
    pub(crate) source: TensorRef<'a>,
    /// Its place in the payload.
    pub(crate) offset: u64,
    /// Checksums of each whole chunk, once the stream has passed them.
    pub(crate) chunk_crcs: Vec<u32>,
    /// The checksum of all of it, once the stream has passed it.
    pub(crate) crc: u32,
    /// Whether both were taken already, by the device that holds the bytes.
    pub(crate) checked: bool,
}

impl<'a> Blob<'a> {
    pub(crate) fn new(source: TensorRef<'a>, offset: u64) -> Self {
        Self { source, offset, chunk_crcs: Vec::new(), crc: 0, checked: false }
    }

    /// Takes the checksums of its chunks from who brings the bytes by another way than a stream.
    pub(crate) fn set_checksums(&mut self, chunks: Vec<u32>) {
        let length = self.source.len_bytes();
        let starts = (0..length).step_by(limits::CHUNK_BYTES as usize);
        let lens = starts.map(|start| (length - start).min(limits::CHUNK_BYTES));
        self.crc = chunks.iter().zip(lens).fold(0, |so_far, (&crc, len)| combine(so_far, crc, len));
        if limits::chunk_count(length) > 0 {
            self.chunk_crcs = chunks;
        }
        self.checked = true;
    }

    fn end(&self) -> u64 {
        self.offset + self.source.len_bytes()
    }
}

/// Reads blobs as the payload they make, front to back, once.
pub(crate) struct PayloadStream<'a, 'b> {
    blobs: &'b mut [Blob<'a>],
    /// How a GPU is waited for.
    wait: &'b Wait<'b>,
    next: usize,
    position: u64,
    /// Zeros that are still to come before the payload begins.
    lead: u64,
    /// The checksum of the current chunk so far.
    chunk: crc32fast::Hasher,
}

impl<'a, 'b> PayloadStream<'a, 'b> {
    /// The blobs lie in rising order. `lead` zeros come before the payload.
    pub(crate) fn new(blobs: &'b mut [Blob<'a>], lead: u64, wait: &'b Wait<'b>) -> Self {
        Self { blobs, wait, next: 0, position: 0, lead, chunk: crc32fast::Hasher::new() }
    }

    /// Fills the next bytes of the payload; the gaps between blobs are zeros.
    pub(crate) fn fill(&mut self, window: &mut [u8]) -> Result<()> {
        let lead = self.lead.min(window.len() as u64);
        self.lead -= lead;
        let (zeros, mut rest) = window.split_at_mut(lead as usize);
        zeros.fill(0);
        while !rest.is_empty() {
            let Some(blob) = self.blobs.get_mut(self.next) else {
                rest.fill(0);
                self.position += rest.len() as u64;
                return Ok(());
            };
            if self.position < blob.offset {
                let gap = (blob.offset - self.position).min(rest.len() as u64) as usize;
                let (zeros, after) = rest.split_at_mut(gap);
                zeros.fill(0);
                self.position += gap as u64;
                rest = after;
                continue;
            }
            let done = self.position - blob.offset;
            // To the end of the chunk, of the blob or of the window, whichever comes first.
            let to_chunk = limits::CHUNK_BYTES - done % limits::CHUNK_BYTES;
            let take = to_chunk.min(blob.end() - self.position).min(rest.len() as u64) as usize;
            let (piece, after) = rest.split_at_mut(take);
            blob.source.read_at(done, piece, self.wait)?;
            if !blob.checked {
                self.chunk.update(piece);
            }
            self.position += take as u64;
            rest = after;
            self.close_chunk();
        }
        Ok(())
    }

    /// Passes bytes over that another route brings, of blobs whose checksums are taken already, up to an offset of the
    /// payload.
    pub(crate) fn pass(&mut self, to: u64) {
        while self.position < to {
            match self.blobs.get(self.next) {
                None => self.position = to,
                Some(blob) if self.position < blob.offset => self.position = blob.offset.min(to),
                Some(blob) => {
                    debug_assert!(blob.checked, "nobody takes the checksum of what is passed over");
                    self.position = blob.end().min(to);
                    self.close_chunk();
                }
            }
        }
    }

    /// Settles the checksums of a chunk or a blob that ends here. A blob of no bytes ends where it begins.
    fn close_chunk(&mut self) {
        while let Some(blob) = self.blobs.get_mut(self.next) {
            if self.position < blob.offset {
                return;
            }
            let (done, length) = (self.position - blob.offset, blob.source.len_bytes());
            if done < length && (done == 0 || done % limits::CHUNK_BYTES != 0) {
                return;
            }
            if length > 0 && !blob.checked {
                let crc = std::mem::take(&mut self.chunk).finalize();
                let chunk_len = done - (done - 1) / limits::CHUNK_BYTES * limits::CHUNK_BYTES;
                blob.crc = combine(blob.crc, crc, chunk_len);
                if limits::chunk_count(length) > 0 {
                    blob.chunk_crcs.push(crc);
                }
            }
            if done < length {
                return;
            }
            self.next += 1;
        }
    }

    /// To be called once every byte was filled: all checksums are settled from here on.
    pub(crate) fn finish(mut self) {
        self.close_chunk();
        debug_assert_eq!(self.next, self.blobs.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blobs_keep_their_order_and_their_alignment() {
        let lengths = [10u64, 0, 256, 4095, 4096, 1, 5000, 300];
        let (offsets, payload) = lay_out(lengths);
        assert_eq!(offsets, [0, 256, 256, 512, 8192, 12288, 16384, 21504]);
        assert_eq!(payload, 24576);
        assert_eq!(lay_out([]), (vec![], 0));
        assert_eq!(lay_out([0, 0]), (vec![0, 0], 0));
    }

    #[test]
    #[cfg_attr(miri, ignore = "ten mebibytes, five times over, take hours")]
    fn the_stream_is_the_payload_whatever_the_windows_and_its_checksums_are_right() {
        let chunk = limits::CHUNK_BYTES as usize;
        let lengths = [0, 1, 5000, 0, chunk - 1, chunk, chunk + 1, 3 * chunk, 77, 2 * chunk + 5, 0];
        let bytes: Vec<Vec<u8>> = lengths
            .iter()
            .enumerate()
            .map(|(n, &length)| (0..length).map(|at| (at * 31 + at / 255 + n * 7) as u8).collect())
            .collect();
        let (offsets, payload_len) = lay_out(lengths.iter().map(|&length| length as u64));
        let mut expected = vec![0; payload_len as usize];
        for (bytes, &offset) in bytes.iter().zip(&offsets) {
            expected[offset as usize..][..bytes.len()].copy_from_slice(bytes);
        }
        for window in [1 << 12, 12345, chunk, 4 * chunk, 64 * chunk] {
            let mut blobs: Vec<Blob<'_>> =
                bytes.iter().zip(&offsets).map(|(bytes, &offset)| Blob::new(bytes.into(), offset)).collect();
            let lead = window as u64 / 3;
            let mut filled = vec![0xAA; (lead + payload_len) as usize];
            let mut stream = PayloadStream::new(&mut blobs, lead, &|wait| wait());
            filled.chunks_mut(window).for_each(|window| stream.fill(window).unwrap());
            stream.finish();
            let (zeros, payload) = filled.split_at(lead as usize);
            assert!(zeros.iter().all(|&byte| byte == 0));
            assert!(payload == expected, "window {window}");
            for (blob, bytes) in blobs.iter().zip(&bytes) {
                assert_eq!(blob.crc, alight_format::crc32(bytes));
                assert_eq!(blob.chunk_crcs.len(), limits::chunk_count(bytes.len() as u64) as usize);
                for (crc, chunk) in blob.chunk_crcs.iter().zip(bytes.chunks(chunk)) {
                    assert_eq!(*crc, alight_format::crc32(chunk));
                }
            }
        }
    }
}
