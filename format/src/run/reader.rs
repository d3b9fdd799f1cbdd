//! Reads an index run: one key, or all keys from one on.
//!
//! Opening reads the header and nothing else. A lookup reads a line of the table, seldom two, and a group of entries; it
//! takes memory only for the entry that it found. Where the table knows nothing it reads a node of each level and a block.

use std::borrow::Cow;
use std::ops::Bound;

use super::block::{BLOCK_BYTES, Block, Edge};
use super::entry::{IndexEntry, IndexKind};
use super::fences::{Child, NODE_BYTES_MAX, Node};
use super::group::{GROUP_HEAD_BYTES, Group};
use super::header::{RUN_HEADER_BYTES, RunHeader};
use super::seal::Seal;
use super::table::{HashedKey, LINE_BYTES, Line, PROBE_LINES, line_of};
use super::{RunBytes, damaged};
use crate::error::FormatError;
use crate::ids::Seq;
use crate::manifest::RunRecord;

/// A run in memory or in a mapping.
pub type RunView<'a> = RunReader<&'a [u8]>;

/// A run, read through `B`. Whether it is the run that was asked for is the caller's to compare: its
/// [`record`](Self::record) with the manifest's, and its store.
#[derive(Debug, Clone)]
pub struct RunReader<B> {
    bytes: B,
    header: RunHeader,
    header_crc: u32,
    seal: Seal,
}

impl<B: RunBytes> RunReader<B> {
    /// Opens a run: reads its header, and compares the file's length with the one that it names. The cost does not grow with
    /// the number of entries.
    pub fn new(bytes: B) -> Result<Self, B::Error> {
        let header_len = bytes.len_bytes().min(RUN_HEADER_BYTES as u64) as usize;
        let (header, header_crc) = {
            let first = bytes.read(0, header_len)?;
            (RunHeader::decode(&first)?, RunHeader::digest_of(&first))
        };
        if header.file_bytes != bytes.len_bytes() {
            return Err(damaged("an index run of another length than it says", 0).into());
        }
        Ok(Self { bytes, header, header_crc, seal: Seal::new(header.store, header.run) })
    }

    /// What the run says of itself.
    pub fn header(&self) -> &RunHeader {
        &self.header
    }

    /// What the manifest should say of the run.
    pub fn record(&self) -> RunRecord {
        let RunHeader { run, entries, file_bytes, .. } = self.header;
        RunRecord { id: run, entries, bytes: file_bytes, header_crc: self.header_crc }
    }

    /// Its entries, tombstones included.
    pub fn entry_count(&self) -> u64 {
        self.header.entries
    }

    /// The lowest sequence number of an entry; 0 without entries.
    pub fn min_seq(&self) -> Seq {
        self.header.min_seq
    }

    /// The highest sequence number of an entry; 0 without entries.
    pub fn max_seq(&self) -> Seq {
        self.header.max_seq
    }

    pub(super) fn seal(&self) -> Seal {
        self.seal
    }

    /// What the run's bytes are read through.
    pub fn bytes(&self) -> &B {
        &self.bytes
    }

    /// What the run knows of a key: its entry, which may be a tombstone, or nothing.
    #[inline]
    pub fn get(&self, key: &[u8]) -> Result<Option<IndexEntry>, B::Error> {
        self.get_hashed(&HashedKey::new(key))
    }

    /// [`get`](Self::get), for a key whose hash was taken.
    #[inline]
    pub fn get_hashed(&self, key: &HashedKey<'_>) -> Result<Option<IndexEntry>, B::Error> {
        self.find(key, |rest| IndexEntry::decode(key.bytes().to_vec(), rest))
    }

    /// Whether the run knows of a value under a key, or of a delete, or nothing: without taking memory for the entry.
    #[inline]
    pub fn kind(&self, key: &HashedKey<'_>) -> Result<Option<IndexKind>, B::Error> {
        self.find(key, IndexEntry::kind_of)
    }

    /// Has the processor fetch what a lookup of this key begins with. For the runs of a store before they are asked one
    /// after another: so it waits for the memory of all of them at the same time.
    #[inline]
    pub fn fetch(&self, key: &HashedKey<'_>) {
        self.bytes.fetch(self.line_at(key.hash(), 0));
    }

    /// Where the line lies that is looked at after so many others.
    #[inline]
    fn line_at(&self, hash: u64, probe: u64) -> u64 {
        self.header.table_offset + line_of(hash, self.header.table_lines, probe) * LINE_BYTES as u64
    }

    /// What `take` makes of what follows a key, if the run knows it.
    #[inline]
    fn find<T>(
        &self,
        key: &HashedKey<'_>,
        take: impl Fn(&[u8]) -> Result<T, FormatError>,
    ) -> Result<Option<T>, B::Error> {
        if self.header.entries == 0 {
            return Ok(None);
        }
        for probe in 0..PROBE_LINES {
            let at = self.line_at(key.hash(), probe);
            let bytes = self.read(at, LINE_BYTES)?;
            let line = Line::new(&bytes, at)?;
            for group_at in line.groups(key.hash()) {
                match self.find_in_group(key.bytes(), group_at, &take) {
                    Ok(None) => {}
                    Ok(found) => return Ok(found),
                    Err(error) => {
                        // If the line led astray, it is the line that is damaged.
                        line.judge(self.seal)?;
                        return Err(error);
                    }
                }
            }
            line.judge(self.seal)?;
            if !line.is_passed(key.hash()) {
                return Ok(None);
            }
        }
        self.find_by_fences(key.bytes(), take)
    }

    #[inline]
    fn find_in_group<T>(
        &self,
        key: &[u8],
        at: u64,
        take: impl Fn(&[u8]) -> Result<T, FormatError>,
    ) -> Result<Option<T>, B::Error> {
        // Groups lie in a block, whole; where one ends it says itself.
        let len = BLOCK_BYTES - (at % BLOCK_BYTES as u64) as usize;
        if at < RunHeader::BLOCKS_OFFSET || at >= self.header.blocks_end() || len < GROUP_HEAD_BYTES {
            return Err(damaged("a line of the index table that leads where nothing lies", at).into());
        }
        let bytes = self.read(at, len)?;
        match Group::decode(&bytes, self.seal, at)?.find(key)? {
            Some(rest) => Ok(Some(take(rest).map_err(|refusal| refusal.found_at(at))?)),
            None => Ok(None),
        }
    }

    /// For a key of which the table knows nothing.
    #[cold]
    fn find_by_fences<T>(
        &self,
        key: &[u8],
        take: impl Fn(&[u8]) -> Result<T, FormatError>,
    ) -> Result<Option<T>, B::Error> {
        let (place, bytes) = self.block_bytes(key)?;
        let block = judged(Block::decode(&bytes, self.seal, place.at)?, place, key)?;
        match block.search(key)? {
            (_, Some(rest)) => Ok(Some(take(rest).map_err(|refusal| refusal.found_at(place.at))?)),
            (_, None) => Ok(None),
        }
    }

    /// Whether the table leads a key with this hash to the group that lies at `group_at`, or leaves it to the fences; none,
    /// if a lookup would not come there.
    pub(super) fn table_leads_to(&self, hash: u64, group_at: u64) -> Result<Option<bool>, B::Error> {
        for probe in 0..PROBE_LINES {
            let at = self.line_at(hash, probe);
            let bytes = self.read(at, LINE_BYTES)?;
            let line = Line::new(&bytes, at)?;
            if line.groups(hash).any(|group| group == group_at) {
                return Ok(Some(true));
            }
            if !line.is_passed(hash) {
                return Ok(None);
            }
        }
        Ok(Some(false))
    }

    /// The entries from a key on, in order of their keys. Reads nothing before the first is asked for; ends after an error.
    pub fn range(&self, from: Bound<&[u8]>) -> RunRange<'_, B> {
        let seek = match from {
            Bound::Unbounded => (Vec::new(), false),
            Bound::Included(key) => (key.to_vec(), false),
            Bound::Excluded(key) => (key.to_vec(), true),
        };
        let state =
            if self.header.entries == 0 { State::Ended } else { State::Seek { key: seek.0, skip_equal: seek.1 } };
        RunRange { reader: self, state, window: Cow::Borrowed(&[]), window_at: 0 }
    }

    /// The bytes of a section of the run, exactly as many as asked for.
    #[inline]
    pub(super) fn read(&self, at: u64, len: usize) -> Result<Cow<'_, [u8]>, B::Error> {
        let bytes = self.bytes.read(at, len)?;
        if bytes.len() == len { Ok(bytes) } else { Err(damaged("an index run that is cut short", at).into()) }
    }

    /// The root node. Only where there are entries.
    pub(super) fn root(&self) -> Child {
        let len = self.header.root_bytes;
        Child { at: self.header.fences_end() - len, len: usize::try_from(len).expect("the header was judged") }
    }

    /// Refuses a child that does not lie where those of a node of this level lie.
    #[inline]
    pub(super) fn judge_child(&self, child: Child, level: u32) -> Result<Child, FormatError> {
        let (start, end, possible) = match level {
            0 => {
                let start = RunHeader::BLOCKS_OFFSET;
                let whole = child.at.wrapping_sub(start).is_multiple_of(BLOCK_BYTES as u64) && child.len == BLOCK_BYTES;
                (start, self.header.blocks_end(), whole)
            }
            _ => (self.header.fences_offset, self.header.fences_end(), child.len as u64 <= NODE_BYTES_MAX),
        };
        let inside = start <= child.at && child.at.checked_add(child.len as u64).is_some_and(|past| past <= end);
        if inside && possible {
            Ok(child)
        } else {
            Err(damaged("a fence node that leads where nothing lies", self.header.fences_offset))
        }
    }

    /// The block to which the fences lead a key, not judged yet. Only where there are entries.
    #[inline]
    fn block_bytes(&self, key: &[u8]) -> Result<(Child, Cow<'_, [u8]>), B::Error> {
        let mut place = self.root();
        for level in (0..self.header.height).rev() {
            let bytes = self.read(place.at, place.len)?;
            let node = Node::decode(&bytes, place.at, level)?;
            place = self.judge_child(node.search(key)?, level)?;
        }
        Ok((place, self.read(place.at, place.len)?))
    }
}

/// Refuses a block that is none of the key's, or not of the length that the fences gave it.
#[inline]
fn judged<'b>(block: Block<'b>, place: Child, key: &[u8]) -> Result<Block<'b>, FormatError> {
    if block.owns(key) {
        Ok(block)
    } else {
        Err(damaged("an index block that the fences should not lead to", place.at))
    }
}

/// How much an iteration reads at a time.
const WINDOW_BYTES: u64 = 256 << 10;

/// The entries of a run from a key on; what [`RunReader::range`] returns.
#[derive(Debug)]
pub struct RunRange<'r, B> {
    reader: &'r RunReader<B>,
    state: State,
    /// The bytes around the current block, which was verified.
    window: Cow<'r, [u8]>,
    window_at: u64,
}

#[derive(Debug)]
enum State {
    /// The first block is still to be found.
    Seek {
        key: Vec<u8>,
        skip_equal: bool,
    },
    /// The next entry is this one of the verified block that lies at `block_at`, and begins there at `begin`.
    Inside {
        block_at: u64,
        index: usize,
        begin: usize,
    },
    Ended,
}

impl<B: RunBytes> Iterator for RunRange<'_, B> {
    type Item = Result<IndexEntry, B::Error>;

    fn next(&mut self) -> Option<Self::Item> {
        // Whatever goes wrong ends the iteration; what goes right puts the next state in its place.
        let next = match std::mem::replace(&mut self.state, State::Ended) {
            State::Seek { key, skip_equal } => self.seek(&key, skip_equal),
            State::Inside { block_at, index, begin } => self.step(block_at, index, begin),
            State::Ended => Ok(None),
        };
        next.transpose()
    }
}

impl<B: RunBytes> std::iter::FusedIterator for RunRange<'_, B> {}

impl<B: RunBytes> RunRange<'_, B> {
    fn seek(&mut self, key: &[u8], skip_equal: bool) -> Result<Option<IndexEntry>, B::Error> {
        let (place, _) = self.reader.block_bytes(key)?;
        let block = judged(self.load(place.at)?, place, key)?;
        let (index, found) = block.search(key)?;
        let index = index + usize::from(found.is_some() && skip_equal);
        let begin = if index < block.count { block.locate(index)? } else { 0 };
        self.step(place.at, index, begin)
    }

    /// The entry of the verified block at `block_at`, or the first of the next one.
    fn step(&mut self, block_at: u64, index: usize, begin: usize) -> Result<Option<IndexEntry>, B::Error> {
        let lost = || damaged("an index block that was verified and changed", block_at);
        let start = usize::try_from(block_at - self.window_at).map_err(|_| lost())?;
        let bytes = self.window.get(start..start + BLOCK_BYTES);
        let block = bytes.and_then(|bytes| Block::again(bytes, self.reader.seal, block_at)).ok_or_else(lost)?;
        if index < block.count {
            let (entry, begin) = block.entry(index, begin)?;
            self.state = State::Inside { block_at, index: index + 1, begin };
            return Ok(Some(entry));
        }
        let (end, blocks_end) = (block_at + BLOCK_BYTES as u64, self.reader.header.blocks_end());
        match block.upper.map(Edge::to_vec) {
            None if end == blocks_end => Ok(None),
            Some(upper) if end < blocks_end => {
                let next = self.load(end)?;
                if next.lower.to_vec() != upper {
                    return Err(damaged("an index block that does not begin where the one before it ends", end).into());
                }
                let (entry, begin) = next.entry(0, 0)?;
                self.state = State::Inside { block_at: end, index: 1, begin };
                Ok(Some(entry))
            }
            _ => Err(damaged("index blocks that end before their section or after it", end).into()),
        }
    }

    /// Verifies the block at this place, and keeps its bytes in the window.
    fn load(&mut self, at: u64) -> Result<Block<'_>, B::Error> {
        let blocks_end = self.reader.header.blocks_end();
        let window_end = self.window_at + self.window.len() as u64;
        if at < self.window_at || at + BLOCK_BYTES as u64 > window_end {
            let len = WINDOW_BYTES.min(blocks_end - at);
            self.window = self.reader.read(at, usize::try_from(len).expect("a window is small"))?;
            self.window_at = at;
        }
        let start = usize::try_from(at - self.window_at).expect("a window is small");
        Ok(Block::decode(&self.window[start..start + BLOCK_BYTES], self.reader.seal, at)?)
    }
}
