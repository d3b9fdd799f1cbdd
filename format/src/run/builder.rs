//! Builds an index run from entries in rising order of their keys, as a stream.
//!
//! # Invariants
//! - The sink is given the bytes from offset 4096 on, in order, in pieces that are multiples of 4096 bytes. The header, which
//!   goes to offset 0, is known last; a file without it is no run.
//! - Memory: the table (9.85 bytes for each entry expected), the fence leaves (about 20 bytes a block, which is under a byte an
//!   entry), and one piece. Nothing else grows.

use super::block::{BLOCK_BYTES as RUN_BLOCK_BYTES, BlockBuilder};
use super::entry::IndexEntry;
use super::fences::{Fences, FencesBuilder};
use super::header::{RUN_HEADER_BYTES, RunHeader};
use super::seal::Seal;
use super::separator;
use super::table::{LINE_BYTES, TableBuilder};
use crate::error::{FormatError, require};
use crate::ids::{RunId, Seq, StoreId};
use crate::limits::{BLOCK_BYTES, FORMAT_VERSION};
use crate::manifest::RunRecord;

/// The sink is called when this much has gathered.
const PIECE_BYTES: usize = 1 << 20;

/// A run whose header is still to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FinishedRun {
    /// What is to be written at offset 0.
    pub header: Box<[u8; RUN_HEADER_BYTES]>,
    /// What the manifest keeps of the run.
    pub record: RunRecord,
    /// The lowest sequence number of an entry; 0 without entries.
    pub min_seq: Seq,
    /// The highest sequence number of an entry; 0 without entries.
    pub max_seq: Seq,
}

/// Builds an index run. Does not sort and does not merge: entries come in strictly rising order of their keys.
///
/// ```
/// use alight_format::{Dtype, IndexEntry, IndexKind, RunBuilder, RunId, RunView, SegmentId, Seq, StoreId};
///
/// let mut file = vec![0; 4096]; // the header's place
/// let mut builder = RunBuilder::new(StoreId([7; 16]), RunId(1), 1, |piece: &[u8]| {
///     file.extend_from_slice(piece);
///     Ok::<_, alight_format::FormatError>(())
/// });
/// let entry = IndexEntry {
///     key: b"layers.0.w".to_vec(),
///     kind: IndexKind::Put,
///     seq: Seq(1),
///     segment: SegmentId(1),
///     frame_offset: 4096,
///     offset: 8192,
///     length: 48,
///     crc: 0,
///     dtype: Dtype::F32,
///     shape: vec![3, 4],
///     has_attributes: false,
/// };
/// builder.push(&entry)?;
/// let finished = builder.finish()?;
/// file[..4096].copy_from_slice(&finished.header[..]);
///
/// let run = RunView::new(&file)?;
/// assert_eq!(run.get(b"layers.0.w")?, Some(entry));
/// assert_eq!(run.get(b"layers.0.b")?, None);
/// # Ok::<_, alight_format::FormatError>(())
/// ```
pub struct RunBuilder<S> {
    store: StoreId,
    run: RunId,
    seal: Seal,
    sink: S,
    /// Bytes not yet given to the sink.
    pending: Vec<u8>,
    /// Where in the file the next byte of `pending` goes.
    cursor: u64,
    rest: Vec<u8>,
    block: BlockBuilder,
    fences: FencesBuilder,
    table: TableBuilder,
    entries: u64,
    min_seq: Seq,
    max_seq: Seq,
}

impl<S> std::fmt::Debug for RunBuilder<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RunBuilder {{ run: {}, entries: {} }}", self.run, self.entries)
    }
}

impl<S, E> RunBuilder<S>
where
    S: FnMut(&[u8]) -> Result<(), E>,
    E: From<FormatError>,
{
    /// Begins a run. `entries_expected` sizes the table, and nothing else: for a merge, the sum of what is merged. It takes
    /// 9.85 bytes of memory for each until the run is finished, and as many in the file. With more entries, lookups of those
    /// that the table has no room for go by the fences and take longer; with fewer it is larger than need be.
    pub fn new(store: StoreId, run: RunId, entries_expected: u64, sink: S) -> Self {
        assert!(run.0 != 0, "runs are counted from 1");
        Self {
            store,
            run,
            seal: Seal::new(store, run),
            sink,
            pending: Vec::new(),
            cursor: RunHeader::BLOCKS_OFFSET,
            rest: Vec::new(),
            block: BlockBuilder::default(),
            fences: FencesBuilder::default(),
            table: TableBuilder::new(entries_expected),
            entries: 0,
            min_seq: Seq::ZERO,
            max_seq: Seq::ZERO,
        }
    }

    /// Adds an entry, whose key must be above the last one's. An entry that is refused leaves the builder as it was; after an
    /// error of the sink it is of no more use.
    pub fn push(&mut self, entry: &IndexEntry) -> Result<(), E> {
        entry.judge()?;
        let in_order = self.block.is_empty() || self.block.last_key() < entry.key.as_slice();
        require(in_order, "a key that is not above the one before it")?;
        self.rest.clear();
        entry.encode_rest(&mut self.rest);
        if !self.block.try_push(&entry.key, &self.rest) {
            let upper = separator(self.block.last_key(), &entry.key);
            self.close_block(Some(upper))?;
            let fits = self.block.try_push(&entry.key, &self.rest);
            assert!(fits, "an empty block takes any entry");
        }
        self.min_seq = if self.entries == 0 { entry.seq } else { self.min_seq.min(entry.seq) };
        self.max_seq = self.max_seq.max(entry.seq);
        self.entries += 1;
        Ok(())
    }

    /// Ends the run: the last pieces go to the sink, the header comes back.
    pub fn finish(mut self) -> Result<FinishedRun, E> {
        if !self.block.is_empty() {
            self.close_block(None)?;
        }
        let blocks_bytes = self.cursor - RunHeader::BLOCKS_OFFSET;
        self.pad()?;

        let table_offset = self.cursor;
        let table_lines = self.table.line_count();
        let lines = std::mem::replace(&mut self.table, TableBuilder::new(0)).finish(self.seal, table_offset);
        for lines in lines.chunks(PIECE_BYTES / LINE_BYTES) {
            self.write(lines.as_flattened())?;
        }
        drop(lines);
        self.pad()?;

        let fences_offset = self.cursor;
        let Fences { bytes, root_bytes, height } = std::mem::take(&mut self.fences).finish(self.seal, fences_offset);
        for bytes in bytes.chunks(PIECE_BYTES) {
            self.write(bytes)?;
        }
        self.pad()?;
        if !self.pending.is_empty() {
            (self.sink)(&self.pending)?;
        }

        let header = RunHeader {
            version: FORMAT_VERSION,
            store: self.store,
            run: self.run,
            entries: self.entries,
            min_seq: self.min_seq,
            max_seq: self.max_seq,
            blocks_bytes,
            table_offset,
            table_lines,
            fences_offset,
            fences_bytes: bytes.len() as u64,
            root_bytes,
            height,
            file_bytes: self.cursor,
        };
        let header = Box::new(header.encode());
        let header_crc = RunHeader::digest_of(&header[..]);
        let record = RunRecord { id: self.run, entries: self.entries, bytes: self.cursor, header_crc };
        Ok(FinishedRun { header, record, min_seq: self.min_seq, max_seq: self.max_seq })
    }

    fn close_block(&mut self, upper: Option<&[u8]>) -> Result<(), E> {
        let lower = self.block.lower().to_vec();
        self.block.finish(upper, self.seal, self.cursor, &mut self.pending, &mut self.table);
        self.fences.push(&lower, self.cursor, RUN_BLOCK_BYTES);
        self.cursor += RUN_BLOCK_BYTES as u64;
        self.drain()
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), E> {
        self.pending.extend_from_slice(bytes);
        self.cursor += bytes.len() as u64;
        self.drain()
    }

    /// Zeros up to the next block of the file.
    fn pad(&mut self) -> Result<(), E> {
        let zeros = self.cursor.next_multiple_of(BLOCK_BYTES) - self.cursor;
        self.pending.resize(self.pending.len() + zeros as usize, 0);
        self.cursor += zeros;
        self.drain()
    }

    /// Gives the sink what has gathered, once it is enough, in whole blocks.
    fn drain(&mut self) -> Result<(), E> {
        if self.pending.len() >= PIECE_BYTES {
            let whole = self.pending.len() - self.pending.len() % BLOCK_BYTES as usize;
            (self.sink)(&self.pending[..whole])?;
            self.pending.drain(..whole);
        }
        Ok(())
    }
}
