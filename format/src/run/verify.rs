//! Verifies a whole run: every bit of the file that has a meaning, and that the rest is zero.
//!
//! A lookup proves only what it touches. This proves that every lookup would be right: the blocks tile their section and the
//! space of keys, the entries rise, the fences are exactly what the blocks say, the table knows every key, and no more.

use super::block::{Block, Edge};
use super::fences::{Child, Node};
use super::group::GROUP_ENTRIES;
use super::header::{RUN_HEADER_BYTES, RunHeader};
use super::reader::RunReader;
use super::table::{LINE_BYTES, Line, key_hash};
use super::{RunBytes, damaged};
use crate::ids::Seq;
use crate::limits::BLOCK_BYTES;
use crate::zeros::is_zero;

/// How much of the table and of padding is read at a time.
const PIECE_BYTES: u64 = 256 << 10;

impl<B: RunBytes> RunReader<B> {
    /// Verifies every byte of the run but the zeros of its header. Reads the whole file once; takes memory for one node of
    /// each level and one block.
    pub fn verify(&self) -> Result<(), B::Error> {
        let header = *self.header();
        // The header as it lies there now, should the file have changed since it was opened.
        if RunHeader::decode(&self.read(0, RUN_HEADER_BYTES)?)? != header {
            return Err(damaged("a header that changed since the run was opened", 0).into());
        }
        let lines_end = header.table_offset + header.table_lines * LINE_BYTES as u64;
        self.verify_zeros(header.blocks_end(), header.table_offset)?;
        let slots_used = self.verify_lines(header.table_offset, lines_end)?;
        self.verify_zeros(lines_end, header.fences_offset)?;
        self.verify_zeros(header.fences_end(), header.file_bytes)?;
        if header.entries == 0 {
            return Ok(());
        }
        let mut walk = Walk {
            reader: self,
            next_block: RunHeader::BLOCKS_OFFSET,
            next_node: vec![None; header.height as usize],
            upper: Some(Vec::new()),
            last_key: Vec::new(),
            entries: 0,
            entries_in_table: 0,
            seqs: None,
        };
        walk.node(self.root(), header.height - 1, &[])?;
        let counted = (walk.entries, walk.seqs) == (header.entries, Some((header.min_seq, header.max_seq)));
        if walk.entries_in_table != slots_used {
            return Err(damaged("an index table with slots of no entry", header.table_offset).into());
        }
        let whole = walk.upper.is_none() && walk.next_block == header.blocks_end();
        if !counted || !whole {
            return Err(damaged("an index run whose blocks are not what its header says", 0).into());
        }
        // Nodes lie level by level, the leaves first; each level ends where the next begins.
        let mut end = header.fences_offset;
        for level in walk.next_node {
            match level {
                Some((start, past)) if start == end => end = past,
                _ => return Err(damaged("fence nodes that do not lie end to end", end).into()),
            }
        }
        if end == header.fences_end() {
            Ok(())
        } else {
            Err(damaged("fence nodes that do not fill their section", end).into())
        }
    }

    /// How many slots of the table are in use.
    fn verify_lines(&self, start: u64, end: u64) -> Result<u64, B::Error> {
        let mut used = 0;
        for_pieces(start, end, |at, len| {
            for (index, line) in self.read(at, len)?.chunks(LINE_BYTES).enumerate() {
                let at = at + (index * LINE_BYTES) as u64;
                let line = Line::new(line, at)?;
                line.judge(self.seal())?;
                if !line.is_clean() {
                    return Err(damaged("a line of the index table with bytes of no meaning", at).into());
                }
                used += line.used() as u64;
            }
            Ok::<_, B::Error>(())
        })?;
        Ok(used)
    }

    fn verify_zeros(&self, start: u64, end: u64) -> Result<(), B::Error> {
        for_pieces(start, end, |at, len| {
            let zero = is_zero(&self.read(at, len)?);
            if zero { Ok(()) } else { Err(damaged("padding that is not zero", at).into()) }
        })
    }
}

fn for_pieces<E>(start: u64, end: u64, mut each: impl FnMut(u64, usize) -> Result<(), E>) -> Result<(), E> {
    let mut at = start;
    while at < end {
        let len = PIECE_BYTES.min(end - at);
        each(at, usize::try_from(len).expect("a piece is small"))?;
        at += len;
    }
    Ok(())
}

// Every piece but the last holds whole lines, and the last ends with one.
const _: () = assert!(PIECE_BYTES.is_multiple_of(LINE_BYTES as u64) && BLOCK_BYTES.is_multiple_of(LINE_BYTES as u64));

/// A walk over the tree, in order, and what the next part must be.
struct Walk<'r, B> {
    reader: &'r RunReader<B>,
    /// Where the next block must begin.
    next_block: u64,
    /// For each level, where its first node begins and where its next one must.
    next_node: Vec<Option<(u64, u64)>>,
    /// Where the next block's range must begin; none after the last block.
    upper: Option<Vec<u8>>,
    last_key: Vec<u8>,
    entries: u64,
    /// Those that are in a slot; the others are found by the fences alone.
    entries_in_table: u64,
    seqs: Option<(Seq, Seq)>,
}

impl<B: RunBytes> Walk<'_, B> {
    fn node(&mut self, place: Child, level: u32, lower: &[u8]) -> Result<(), B::Error> {
        let expected = &mut self.next_node[level as usize];
        let (start, next) = expected.unwrap_or((place.at, place.at));
        if next != place.at {
            return Err(damaged("fence nodes that do not lie end to end", place.at).into());
        }
        *expected = Some((start, place.at + place.len as u64));

        let bytes = self.reader.read(place.at, place.len)?;
        let node = Node::decode(&bytes, place.at, level)?;
        node.judge(self.reader.seal())?;
        for index in 0..node.count {
            let nowhere = || damaged("a fence node that leads nowhere", place.at);
            let child = self.reader.judge_child(node.child(index).ok_or_else(nowhere)?, level)?;
            let lower = if index == 0 { lower.to_vec() } else { node.separator(index).ok_or_else(nowhere)? };
            if level == 0 { self.block(child, &lower)? } else { self.node(child, level - 1, &lower)? }
        }
        Ok(())
    }

    fn block(&mut self, place: Child, lower: &[u8]) -> Result<(), B::Error> {
        let at = place.at;
        let bytes = self.reader.read(at, place.len)?;
        let block = Block::decode(&bytes, self.reader.seal(), at)?;
        let follows = at == self.next_block && self.upper.as_ref() == Some(&block.lower.to_vec());
        if !follows || block.lower.to_vec() != lower {
            return Err(damaged("an index block that does not begin where the one before it ends", at).into());
        }
        let (mut begin, mut group_ends) = (0, Vec::new());
        for index in 0..block.count {
            let (entry, end) = block.entry(index, begin)?;
            begin = end;
            if (index + 1).is_multiple_of(GROUP_ENTRIES) || index + 1 == block.count {
                group_ends.push(end);
            }
            let rises = self.last_key < entry.key;
            if !rises || !block.owns(&entry.key) {
                return Err(damaged("an index block whose keys are out of order", at).into());
            }
            let (found, rest) = block.search(&entry.key)?;
            let group_at = block.group_of(index).ok_or_else(|| damaged("an index block that does not decode", at))?;
            let in_table = self.reader.table_leads_to(key_hash(&entry.key), group_at)?;
            if (found, rest.is_some()) != (index, true) || in_table.is_none() {
                return Err(damaged("an index entry that a lookup would miss", at).into());
            }
            self.entries_in_table += u64::from(in_table == Some(true));
            let (min, max) = self.seqs.unwrap_or((entry.seq, entry.seq));
            self.seqs = Some((min.min(entry.seq), max.max(entry.seq)));
            self.last_key = entry.key;
            self.entries += 1;
        }
        if !block.is_filled(&group_ends) {
            return Err(damaged("an index block with bytes of no meaning", at).into());
        }
        self.next_block = at + place.len as u64;
        self.upper = block.upper.map(Edge::to_vec);
        Ok(())
    }
}
