//! The first 4 KiB of an index run: whose it is, and where its sections lie.
//!
//! Written last, when everything after it is known. Bytes without a meaning are written as zero, are covered by the digest
//! and are otherwise ignored.

use super::block::BLOCK_BYTES as RUN_BLOCK_BYTES;
use super::fences::{HEIGHT_MAX, NODE_ALIGN_BYTES, NODE_BYTES_MAX};
use super::table::LINE_BYTES;
use crate::checksum::crc32;
use crate::error::{FormatError, require};
use crate::ids::{RunId, Seq, StoreId};
use crate::layout::{Field, tiles};
use crate::limits::{BLOCK_BYTES, FORMAT_VERSION, SEGMENT_BYTES_MAX};

/// The length of a run's header, and the offset of its first data block.
pub const RUN_HEADER_BYTES: usize = 4096;

const MAGIC_BYTES: [u8; 8] = *b"ALIGHTix";

const MAGIC: Field<8> = Field::at(0);
const VERSION: Field<4> = Field::at(8);
const HEIGHT: Field<4> = Field::at(12);
const STORE: Field<16> = Field::at(16);
const RUN: Field<8> = Field::at(32);
const ENTRIES: Field<8> = Field::at(40);
const MIN_SEQ: Field<8> = Field::at(48);
const MAX_SEQ: Field<8> = Field::at(56);
const BLOCKS_BYTES: Field<8> = Field::at(64);
const TABLE_OFFSET: Field<8> = Field::at(72);
const TABLE_LINES: Field<8> = Field::at(80);
const FENCES_OFFSET: Field<8> = Field::at(88);
const FENCES_BYTES: Field<8> = Field::at(96);
const ROOT_BYTES: Field<8> = Field::at(104);
const FILE_BYTES: Field<8> = Field::at(112);
const RESERVED: Field<3972> = Field::at(120);
const DIGEST: Field<4> = Field::at(4092);

const _: () = assert!(tiles(
    &[
        MAGIC.span(),
        VERSION.span(),
        HEIGHT.span(),
        STORE.span(),
        RUN.span(),
        ENTRIES.span(),
        MIN_SEQ.span(),
        MAX_SEQ.span(),
        BLOCKS_BYTES.span(),
        TABLE_OFFSET.span(),
        TABLE_LINES.span(),
        FENCES_OFFSET.span(),
        FENCES_BYTES.span(),
        ROOT_BYTES.span(),
        FILE_BYTES.span(),
        RESERVED.span(),
        DIGEST.span(),
    ],
    0,
    RUN_HEADER_BYTES
));

/// What an index run says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunHeader {
    /// The format's version that the run was written in.
    pub version: u32,
    /// The store that it belongs to.
    pub store: StoreId,
    /// Its number, from 1.
    pub run: RunId,
    /// Its entries, tombstones included.
    pub entries: u64,
    /// The lowest sequence number of an entry; 0 without entries.
    pub min_seq: Seq,
    /// The highest sequence number of an entry; 0 without entries.
    pub max_seq: Seq,
    /// The bytes of all data blocks, which follow the header.
    pub blocks_bytes: u64,
    /// Where the table begins.
    pub table_offset: u64,
    /// The lines of the table.
    pub table_lines: u64,
    /// Where the fence nodes begin.
    pub fences_offset: u64,
    /// The bytes of all fence nodes.
    pub fences_bytes: u64,
    /// The bytes of the root node, which is the last; 0 without entries.
    pub root_bytes: u64,
    /// The levels of fence nodes; 0 without entries.
    pub height: u32,
    /// The length of the file.
    pub file_bytes: u64,
}

impl RunHeader {
    /// Where the data blocks begin.
    pub(super) const BLOCKS_OFFSET: u64 = RUN_HEADER_BYTES as u64;

    /// Where the data blocks end.
    pub(super) fn blocks_end(&self) -> u64 {
        Self::BLOCKS_OFFSET + self.blocks_bytes
    }

    /// Where the fence nodes end.
    pub(super) fn fences_end(&self) -> u64 {
        self.fences_offset + self.fences_bytes
    }

    pub(super) fn encode(&self) -> [u8; RUN_HEADER_BYTES] {
        assert_eq!(self.judge(), Ok(()), "only a valid header is written");
        let mut bytes = [0; RUN_HEADER_BYTES];
        MAGIC.set(&mut bytes, MAGIC_BYTES);
        VERSION.write(&mut bytes, self.version);
        HEIGHT.write(&mut bytes, self.height);
        STORE.set(&mut bytes, self.store.0);
        RUN.write(&mut bytes, self.run.0);
        ENTRIES.write(&mut bytes, self.entries);
        MIN_SEQ.write(&mut bytes, self.min_seq.0);
        MAX_SEQ.write(&mut bytes, self.max_seq.0);
        BLOCKS_BYTES.write(&mut bytes, self.blocks_bytes);
        TABLE_OFFSET.write(&mut bytes, self.table_offset);
        TABLE_LINES.write(&mut bytes, self.table_lines);
        FENCES_OFFSET.write(&mut bytes, self.fences_offset);
        FENCES_BYTES.write(&mut bytes, self.fences_bytes);
        ROOT_BYTES.write(&mut bytes, self.root_bytes);
        FILE_BYTES.write(&mut bytes, self.file_bytes);
        let digest = crc32(&bytes[..DIGEST.span().0]);
        DIGEST.write(&mut bytes, digest);
        bytes
    }

    /// The header that a run begins with; bytes after it are not looked at.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let Some(bytes) = bytes.get(..RUN_HEADER_BYTES) else {
            return Err(FormatError::Damaged { what: "an index run that is cut short", offset: bytes.len() as u64 });
        };
        if MAGIC.get(bytes) != MAGIC_BYTES {
            return Err(FormatError::NotAlight { expected: "an index run" });
        }
        if DIGEST.read(bytes) != crc32(&bytes[..DIGEST.span().0]) {
            return Err(FormatError::Damaged { what: "an index run's header with a wrong checksum", offset: 0 });
        }
        let header = Self {
            version: VERSION.read(bytes),
            store: StoreId(STORE.get(bytes)),
            run: RunId(RUN.read(bytes)),
            entries: ENTRIES.read(bytes),
            min_seq: Seq(MIN_SEQ.read(bytes)),
            max_seq: Seq(MAX_SEQ.read(bytes)),
            blocks_bytes: BLOCKS_BYTES.read(bytes),
            table_offset: TABLE_OFFSET.read(bytes),
            table_lines: TABLE_LINES.read(bytes),
            fences_offset: FENCES_OFFSET.read(bytes),
            fences_bytes: FENCES_BYTES.read(bytes),
            root_bytes: ROOT_BYTES.read(bytes),
            height: HEIGHT.read(bytes),
            file_bytes: FILE_BYTES.read(bytes),
        };
        header.judge().map_err(|refusal| refusal.found_at(0))?;
        Ok(header)
    }

    /// The CRC-32 that a whole header, as it lies in the file, ends with.
    pub(super) fn digest_of(header: &[u8]) -> u32 {
        DIGEST.read(header)
    }

    /// What both sides of the disk hold true of a header.
    fn judge(&self) -> Result<(), FormatError> {
        if self.version > FORMAT_VERSION {
            return Err(FormatError::NewerVersion { found: self.version, known: FORMAT_VERSION });
        }
        require(self.version != 0, "an index run of version 0")?;
        require(self.run.0 != 0, "an index run with the number 0")?;
        // Sections follow one another, each padded to whole blocks; so none can reach outside the file or into another.
        let small = |value| value <= SEGMENT_BYTES_MAX;
        let possible = small(self.blocks_bytes) && small(self.table_lines) && small(self.fences_bytes);
        require(possible, "an index run of impossible size")?;
        let table_offset = self.blocks_end().next_multiple_of(BLOCK_BYTES);
        require(self.table_offset == table_offset, "an index run whose table is elsewhere")?;
        let fences_offset =
            self.table_lines.checked_mul(LINE_BYTES as u64).and_then(|bytes| table_offset.checked_add(bytes));
        let fences_offset = fences_offset.and_then(|end| end.checked_next_multiple_of(BLOCK_BYTES));
        require(Some(self.fences_offset) == fences_offset, "an index run whose fences are elsewhere")?;
        let file_bytes = self.fences_offset.checked_add(self.fences_bytes);
        let file_bytes = file_bytes.and_then(|end| end.checked_next_multiple_of(BLOCK_BYTES));
        require(Some(self.file_bytes) == file_bytes, "an index run of another length than its sections")?;
        require(self.table_lines > 0, "an index run without a table")?;

        let aligned =
            self.fences_bytes.is_multiple_of(NODE_ALIGN_BYTES) && self.root_bytes.is_multiple_of(NODE_ALIGN_BYTES);
        require(aligned, "an index run with fences of impossible length")?;
        if self.entries == 0 {
            let empty = self.blocks_bytes == 0 && self.fences_bytes == 0 && self.root_bytes == 0 && self.height == 0;
            require(empty, "an index run without entries that has blocks")?;
            return require(self.min_seq == Seq::ZERO && self.max_seq == Seq::ZERO, "commits without entries");
        }
        require(
            self.blocks_bytes > 0 && self.blocks_bytes.is_multiple_of(RUN_BLOCK_BYTES as u64),
            "an index run with entries and no blocks",
        )?;
        require((1..=HEIGHT_MAX).contains(&self.height), "an index run of impossible height")?;
        let root_is_possible = self.root_bytes > 0 && self.root_bytes <= NODE_BYTES_MAX.min(self.fences_bytes);
        require(root_is_possible, "an index run whose root is of impossible length")?;
        require(Seq::ZERO < self.min_seq && self.min_seq <= self.max_seq, "an index run of impossible commits")
    }
}
