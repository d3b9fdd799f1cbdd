//! The fences: a static tree of separators that leads from a key to the one block whose range holds it.
//!
//! ```text
//! node = [ crc, 4 ][ length, 2 ][ count, 2 ][ prefix length, 2 ][ level, 1 ][ 0 ][ used, 2 ][ 0, 0 ][ base, 8 ]
//!        [ head, 8 each separator ][ where each child ends, 4 ][ where each separator's suffix ends, 2 ]
//!        [ prefix ][ suffix ]… [ zeros ]
//! ```
//! A node has `count` children, end to end in the file from `base` on, and `count - 1` separators: all keys below a separator
//! are in the children before it, all others in those after it. Level 0's children are data blocks, the others' are nodes of
//! the level below. `prefix` is what all separators of the node begin with, a suffix is what follows it, and a head is the
//! first eight bytes of a suffix as a big-endian number (zeros after a shorter one), stored like every number here: so
//! comparing two numbers settles all but ties. Children end at multiples of 64 bytes, counted from `base`.
//!
//! # Invariants
//! - Nothing here is believed: whatever the bytes say, a search ends, reads inside its section, and returns a child. The
//!   block that it leads to says whether it is the right one. Only `verify` looks at a node's checksum.

use std::cmp::Ordering;

use super::seal::Seal;
use super::{common_prefix, damaged, u16_at};
use crate::error::FormatError;
use crate::layout::{Field, tiles};
use crate::limits::KEY_BYTES_MAX;
use crate::zeros::is_zero;

/// The length that a builder gives a node.
const NODE_BYTES_TARGET: usize = 2048;

/// No node is longer.
pub(super) const NODE_BYTES_MAX: u64 = 4096;

/// Nodes are multiples of this, and so is where children end.
pub(super) const NODE_ALIGN_BYTES: u64 = 64;

/// The most levels: every node but a level's last has two children or more, so this is above what any number of blocks
/// needs.
pub(super) const HEIGHT_MAX: u32 = 64;

const CRC: Field<4> = Field::at(0);
const LENGTH: Field<2> = Field::at(4);
const COUNT: Field<2> = Field::at(6);
const PREFIX_LEN: Field<2> = Field::at(8);
const LEVEL: Field<2> = Field::at(10);
const USED: Field<2> = Field::at(12);
const RESERVED: Field<2> = Field::at(14);
const BASE: Field<8> = Field::at(16);
const HEAD_BYTES: usize = 24;

const _: () = assert!(tiles(
    &[
        CRC.span(),
        LENGTH.span(),
        COUNT.span(),
        PREFIX_LEN.span(),
        LEVEL.span(),
        USED.span(),
        RESERVED.span(),
        BASE.span()
    ],
    0,
    HEAD_BYTES
));

/// A node takes two children always, so that every level is at most half as long as the one below.
const _: () = assert!(node_len(2, KEY_BYTES_MAX, 0) <= NODE_BYTES_TARGET && NODE_BYTES_TARGET as u64 <= NODE_BYTES_MAX);

/// The bytes used by a node of so many children, whose separators have a common prefix and suffixes of so many bytes.
const fn node_len(count: usize, prefix_len: usize, suffixes_len: usize) -> usize {
    HEAD_BYTES + 10 * (count - 1) + 4 * count + prefix_len + suffixes_len
}

#[inline]
fn head_of(suffix: &[u8]) -> u64 {
    let mut head = [0; 8];
    let len = suffix.len().min(8);
    head[..len].copy_from_slice(&suffix[..len]);
    u64::from_be_bytes(head)
}

/// A node being filled.
struct NodeBuilder {
    /// Where the first child begins.
    base: u64,
    /// What separates the node's first child from what is before it: this node's separator one level up.
    lower: Vec<u8>,
    /// The separators, end to end.
    separators: Vec<u8>,
    /// Where each separator ends.
    ends: Vec<usize>,
    /// The bytes that all separators begin with.
    prefix_len: usize,
    /// Where each child ends, in multiples of 64 bytes from `base`.
    children: Vec<u32>,
}

impl NodeBuilder {
    fn new(lower: &[u8], base: u64, child_bytes: u64) -> Self {
        let (separators, ends) = (Vec::new(), Vec::new());
        let mut node = Self { base, lower: lower.to_vec(), separators, ends, prefix_len: 0, children: Vec::new() };
        node.push_child(child_bytes);
        node
    }

    fn push_child(&mut self, child_bytes: u64) {
        assert!(child_bytes.is_multiple_of(NODE_ALIGN_BYTES), "children end at multiples of 64 bytes");
        let end = u64::from(self.children.last().copied().unwrap_or(0)) + child_bytes / NODE_ALIGN_BYTES;
        self.children.push(u32::try_from(end).expect("the few children of one node are short"));
    }

    /// Adds a child and what separates it from the one before, unless the node is full.
    fn try_push(&mut self, separator: &[u8], child_bytes: u64) -> bool {
        let count = self.children.len() + 1;
        let first = &self.separators[..self.ends.first().copied().unwrap_or(0)];
        let prefix_len =
            if self.ends.is_empty() { separator.len() } else { common_prefix(&first[..self.prefix_len], separator) };
        let suffixes_len = self.separators.len() + separator.len() - (count - 1) * prefix_len;
        if node_len(count, prefix_len, suffixes_len) > NODE_BYTES_TARGET {
            return false;
        }
        self.prefix_len = prefix_len;
        self.separators.extend_from_slice(separator);
        self.ends.push(self.separators.len());
        self.push_child(child_bytes);
        true
    }

    fn suffixes(&self) -> impl Iterator<Item = &[u8]> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts.zip(&self.ends).map(|(start, end)| &self.separators[start + self.prefix_len..*end])
    }

    /// Appends the node, without its checksum, to `out` and returns its length.
    fn finish(&self, level: u16, out: &mut Vec<u8>) -> usize {
        let as_u16 = |value| u16::try_from(value).expect("lengths in a node are below its limit");
        let start = out.len();
        out.resize(start + HEAD_BYTES, 0);
        self.suffixes().for_each(|suffix| out.extend_from_slice(&head_of(suffix).to_le_bytes()));
        self.children.iter().for_each(|end| out.extend_from_slice(&end.to_le_bytes()));
        let mut suffixes_end = 0;
        for suffix in self.suffixes() {
            suffixes_end += suffix.len();
            out.extend_from_slice(&as_u16(suffixes_end).to_le_bytes());
        }
        out.extend_from_slice(&self.separators[..self.prefix_len]);
        self.suffixes().for_each(|suffix| out.extend_from_slice(suffix));
        let used = out.len() - start;
        assert_eq!(used, node_len(self.children.len(), self.prefix_len, suffixes_end), "a node is as long as counted");
        let len = used.next_multiple_of(NODE_ALIGN_BYTES as usize);
        out.resize(start + len, 0);

        let node = &mut out[start..];
        LENGTH.write(node, as_u16(len));
        COUNT.write(node, as_u16(self.children.len()));
        PREFIX_LEN.write(node, as_u16(self.prefix_len));
        LEVEL.write(node, level);
        USED.write(node, as_u16(used));
        BASE.write(node, self.base);
        len
    }
}

/// Nodes of one level, as they are made: the bytes of all of them, and for each its separator and its length.
#[derive(Default)]
struct Level {
    bytes: Vec<u8>,
    nodes: Vec<(Vec<u8>, u64)>,
    open: Option<NodeBuilder>,
}

impl Level {
    fn push(&mut self, level: u16, lower: &[u8], base: u64, child_bytes: u64) {
        if let Some(open) = &mut self.open {
            if open.try_push(lower, child_bytes) {
                return;
            }
            self.close(level);
        }
        self.open = Some(NodeBuilder::new(lower, base, child_bytes));
    }

    /// Writes the checksums of all nodes, the first of which will lie at `at`.
    fn seal(&mut self, seal: Seal, mut at: u64) {
        let mut rest = self.bytes.as_mut_slice();
        for (_, len) in &self.nodes {
            let (node, after) = rest.split_at_mut(*len as usize);
            let crc = seal.crc(at, &node[CRC.span().1..]);
            CRC.write(node, crc);
            (rest, at) = (after, at + len);
        }
    }

    fn close(&mut self, level: u16) {
        if let Some(open) = self.open.take() {
            let len = open.finish(level, &mut self.bytes);
            self.nodes.push((open.lower, len as u64));
        }
    }
}

/// The fences of a run being built. Holds the nodes of level 0: about 20 bytes for each block.
#[derive(Default)]
pub(super) struct FencesBuilder {
    leaves: Level,
}

/// The fences of a run, built.
pub(super) struct Fences {
    pub(super) bytes: Vec<u8>,
    pub(super) root_bytes: u64,
    pub(super) height: u32,
}

impl FencesBuilder {
    /// Adds a block: where its range begins, where it lies, its length.
    pub(super) fn push(&mut self, lower: &[u8], at: u64, len: usize) {
        self.leaves.push(0, lower, at, len as u64);
    }

    /// The nodes of all levels, to be written from `at` on.
    pub(super) fn finish(mut self, seal: Seal, at: u64) -> Fences {
        self.leaves.close(0);
        self.leaves.seal(seal, at);
        let Level { mut bytes, mut nodes, .. } = self.leaves;
        let mut height = u32::from(!nodes.is_empty());
        let mut level_at = at;
        while nodes.len() > 1 {
            let mut above = Level::default();
            let level = u16::try_from(height).expect("a height is small");
            let mut child_at = level_at;
            for (lower, len) in &nodes {
                above.push(level, lower, child_at, *len);
                child_at += len;
            }
            above.close(level);
            level_at = child_at;
            above.seal(seal, level_at);
            bytes.append(&mut above.bytes);
            nodes = above.nodes;
            height += 1;
        }
        let root_bytes = nodes.first().map_or(0, |(_, len)| *len);
        Fences { bytes, root_bytes, height }
    }
}

/// Where a child lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Child {
    pub(super) at: u64,
    pub(super) len: usize,
}

/// A node, its checksum not looked at. Where its parts lie is computed when they are asked for: a search needs few of them.
#[derive(Clone, Copy)]
pub(super) struct Node<'b> {
    bytes: &'b [u8],
    at: u64,
    pub(super) count: usize,
    prefix_len: usize,
}

impl<'b> Node<'b> {
    /// The node that lies at `at`, which must be of this level.
    #[inline]
    pub(super) fn decode(bytes: &'b [u8], at: u64, level: u32) -> Result<Self, FormatError> {
        let Some(head) = bytes.first_chunk::<HEAD_BYTES>() else {
            return Err(damaged("a fence node that is cut short", at));
        };
        let (count, prefix_len) = (usize::from(COUNT.read(head)), usize::from(PREFIX_LEN.read(head)));
        if count > 0 && u32::from(LEVEL.read(head)) == level && usize::from(LENGTH.read(head)) == bytes.len() {
            Ok(Self { bytes, at, count, prefix_len })
        } else {
            Err(damaged("a fence node that is none of its level", at))
        }
    }

    /// The child that a key leads to.
    #[inline]
    pub(super) fn search(&self, key: &[u8]) -> Result<Child, FormatError> {
        let child = self.child_of(key).and_then(|child| self.child(child));
        child.ok_or_else(|| damaged("a fence node that leads nowhere", self.at))
    }

    /// Which child a key leads to: how many separators are not above it.
    #[inline]
    fn child_of(&self, key: &[u8]) -> Option<usize> {
        let prefix = self.prefix()?;
        let start = &key[..key.len().min(prefix.len())];
        let suffix = match start.cmp(prefix) {
            Ordering::Less => return Some(0),
            Ordering::Greater => return Some(self.count - 1),
            Ordering::Equal => &key[start.len()..],
        };
        let head = head_of(suffix);
        let heads = self.heads()?;
        let mut low = heads.partition_point(|other| u64::from_le_bytes(*other) < head);
        if heads.get(low).is_none_or(|other| u64::from_le_bytes(*other) != head) {
            return Some(low);
        }
        let mut high = low + heads[low..].partition_point(|other| u64::from_le_bytes(*other) <= head);
        while low < high {
            let middle = low.midpoint(high);
            if self.suffix(middle)? <= suffix { low = middle + 1 } else { high = middle }
        }
        Some(low)
    }

    #[inline]
    fn heads(&self) -> Option<&'b [[u8; 8]]> {
        Some(self.bytes.get(HEAD_BYTES..HEAD_BYTES + 8 * (self.count - 1))?.as_chunks().0)
    }

    #[inline]
    fn prefix(&self) -> Option<&'b [u8]> {
        let at = node_len(self.count, 0, 0);
        self.bytes.get(at..at + self.prefix_len)
    }

    fn suffix(&self, index: usize) -> Option<&'b [u8]> {
        let ends_at = HEAD_BYTES + 8 * (self.count - 1) + 4 * self.count;
        let end = |index: usize| u16_at(self.bytes, ends_at + 2 * index).map(usize::from);
        if index >= self.count - 1 {
            return None;
        }
        let start = if index == 0 { 0 } else { end(index - 1)? };
        let suffixes_at = node_len(self.count, self.prefix_len, 0);
        self.bytes.get(suffixes_at + start..suffixes_at + end(index)?)
    }

    /// Where a child lies.
    #[inline]
    pub(super) fn child(&self, index: usize) -> Option<Child> {
        let ends_at = HEAD_BYTES + 8 * (self.count - 1);
        let end = |index: usize| Some(u32::from_le_bytes(*self.bytes.get(ends_at + 4 * index..)?.first_chunk()?));
        if index >= self.count {
            return None;
        }
        let start = if index == 0 { 0 } else { end(index - 1)? };
        let len = end(index)?.checked_sub(start)?;
        let bytes = |units: u32| u64::from(units) * NODE_ALIGN_BYTES;
        let at = BASE.read(self.bytes).checked_add(bytes(start))?;
        Some(Child { at, len: usize::try_from(bytes(len)).ok()? })
    }

    /// What separates a child, but the first, from the one before it.
    pub(super) fn separator(&self, child: usize) -> Option<Vec<u8>> {
        Some([self.prefix()?, self.suffix(child.checked_sub(1)?)?].concat())
    }

    /// Whether the checksum holds, every byte without a meaning is zero, and the heads are those of the suffixes.
    pub(super) fn judge(&self, seal: Seal) -> Result<(), FormatError> {
        if CRC.read(self.bytes) != seal.crc(self.at, &self.bytes[CRC.span().1..]) {
            return Err(damaged("a fence node with a wrong checksum", self.at));
        }
        let consistent = || {
            let heads = self.heads()?;
            let mut used = node_len(self.count, self.prefix_len, 0);
            for (index, head) in heads.iter().enumerate() {
                let suffix = self.suffix(index)?;
                if head_of(suffix).to_le_bytes() != *head {
                    return None;
                }
                used += suffix.len();
            }
            let zeros = RESERVED.read(self.bytes) == 0 && is_zero(self.bytes.get(used..)?);
            (zeros && usize::from(USED.read(self.bytes)) == used).then_some(())
        };
        consistent().ok_or_else(|| damaged("a fence node that contradicts itself", self.at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_compare_as_the_bytes_they_stand_for() {
        let mut suffixes: Vec<&[u8]> = vec![
            b"",
            b"\0",
            b"a",
            b"a\0",
            b"ab",
            b"abcdefgh",
            b"abcdefghi",
            b"b",
            b"\xff",
            b"\xff\xff\xff\xff\xff\xff\xff\xff",
        ];
        suffixes.sort_unstable();
        assert!(suffixes.is_sorted_by_key(|suffix| head_of(suffix)));
        assert_eq!(head_of(b"abcdefghi"), u64::from_be_bytes(*b"abcdefgh"));
        assert_eq!(head_of(b"ab"), u64::from_be_bytes(*b"ab\0\0\0\0\0\0"));
    }

    #[test]
    fn a_search_finds_the_child_that_a_linear_search_finds() {
        let separators: Vec<&[u8]> =
            vec![b"k", b"k\0", b"k\0\0", b"kaaaaaaaa", b"kaaaaaaaab", b"kaaaaaaaac", b"kaaaaaaaaca", b"kb", b"kbb"];
        let mut node = NodeBuilder::new(b"", 4096, 1024);
        assert!(separators.iter().all(|separator| node.try_push(separator, 2048)));
        let mut bytes = Vec::new();
        node.finish(0, &mut bytes);
        let node = Node::decode(&bytes, 0, 0).unwrap();
        let mut keys: Vec<Vec<u8>> = separators.iter().map(|key| key.to_vec()).collect();
        for separator in &separators {
            keys.push([separator, b"\0".as_slice()].concat());
            keys.push([separator, b"z".as_slice()].concat());
            keys.push(separator[..separator.len() - 1].to_vec());
        }
        keys.extend([vec![], vec![0], b"j".to_vec(), b"l".to_vec(), vec![255; 1024]]);
        for key in keys {
            let expected = separators.iter().filter(|separator| **separator <= key.as_slice()).count();
            assert_eq!(node.child_of(&key), Some(expected), "{key:?}");
            assert_eq!(node.search(&key), Ok(node.child(expected).unwrap()));
        }
        assert_eq!(node.child(0), Some(Child { at: 4096, len: 1024 }));
        assert_eq!(node.child(1), Some(Child { at: 5120, len: 2048 }));
        assert_eq!(node.child(separators.len() + 1), None);
    }
}
