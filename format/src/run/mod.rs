//! The index run: an immutable sorted list of keys and where their values lie, in one file.
//!
//! ```text
//! run = [ header, 4096 ][ data blocks ][ table lines ][ fence nodes, leaves first, root last ]
//! ```
//! Each section begins on a multiple of 4096 and is followed by zeros up to the next. A lookup of one key reads a line of
//! the table and the group of entries that it leads to, so it waits for memory twice. An iteration walks from the root node
//! to its first data block, and so does the rare lookup of which the table knows nothing. Nothing is read at opening but the
//! header.
//!
//! # Invariants
//! - Data blocks hold the truth, and each says which range of keys is its own, under its checksum. Fences only lead to a
//!   block: a damaged fence can lead to a wrong one, which the block's range betrays. It can never hide or change a key.
//! - The table only leads to a group, which has the keys under its own checksum. It may say "absent" only after the
//!   checksums of the lines that say so were verified.
//! - Checksums are bound to the run and to the place in it: what was right elsewhere, or once, is not right here.
//! - The ranges of the blocks tile the space of all keys, in order: an iteration that skips a block is found out.
//! - A builder streams: what it holds does not grow with keys, but for the table (9.85 bytes a key expected) and the fences
//!   (about 20 bytes a block and the bytes by which neighbouring blocks differ).

mod block;
mod builder;
mod entry;
mod fences;
mod group;
mod header;
mod reader;
mod seal;
mod table;
mod verify;

use std::borrow::Cow;

pub use builder::{FinishedRun, RunBuilder};
pub use entry::{IndexEntry, IndexKind};
pub use header::{RUN_HEADER_BYTES, RunHeader};
pub use reader::{RunRange, RunReader, RunView};
pub use table::{HashedKey, key_hash};

use crate::error::FormatError;

/// Where the bytes of a run come from: memory, a mapping, or reads of a file where mapping is unsafe.
pub trait RunBytes {
    /// What reading can fail with, beside damage.
    type Error: From<FormatError>;

    /// The length of the run's file.
    fn len_bytes(&self) -> u64;

    /// Exactly `len` bytes from `offset` on. Memory lends them, at no cost; a file copies them.
    fn read(&self, offset: u64, len: usize) -> Result<Cow<'_, [u8]>, Self::Error>;

    /// Has the processor fetch the byte at `offset`, if it lies in memory that can be lent. Does nothing otherwise.
    #[inline]
    fn fetch(&self, _offset: u64) {}
}

impl RunBytes for [u8] {
    type Error = FormatError;

    fn len_bytes(&self) -> u64 {
        self.len() as u64
    }

    #[inline]
    fn read(&self, offset: u64, len: usize) -> Result<Cow<'_, [u8]>, FormatError> {
        let bytes = usize::try_from(offset).ok().and_then(|start| self.get(start..start.checked_add(len)?));
        bytes.map(Cow::Borrowed).ok_or(FormatError::Damaged { what: "an index run that is cut short", offset })
    }

    #[inline]
    fn fetch(&self, offset: u64) {
        // A load that nothing waits for: the processor goes on while it is under way.
        let _ = std::hint::black_box(usize::try_from(offset).ok().and_then(|at| self.get(at).copied()));
    }
}

impl<B: RunBytes + ?Sized> RunBytes for &B {
    type Error = B::Error;

    fn len_bytes(&self) -> u64 {
        (**self).len_bytes()
    }

    #[inline]
    fn read(&self, offset: u64, len: usize) -> Result<Cow<'_, [u8]>, B::Error> {
        (**self).read(offset, len)
    }

    #[inline]
    fn fetch(&self, offset: u64) {
        (**self).fetch(offset);
    }
}

/// An error for sinks and sources that can fail on their own: what they said, or what is wrong with the bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RunError<E> {
    /// The bytes, or the entries that were to become bytes, are wrong.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The sink or the source failed.
    #[error("{0}")]
    Io(E),
}

fn damaged(what: &'static str, offset: u64) -> FormatError {
    FormatError::Damaged { what, offset }
}

/// The length of the longest common prefix.
fn common_prefix(a: &[u8], b: &[u8]) -> usize {
    // Eight bytes at a time: keys of one model begin alike, and may be long.
    let words = a.as_chunks::<8>().0.iter().zip(b.as_chunks::<8>().0).take_while(|(a, b)| a == b).count();
    let (a, b) = (&a[8 * words..], &b[8 * words..]);
    8 * words + a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// The shortest key that is above `last` and not above `next`: what separates the block that `last` ends from the one that
/// `next` begins.
fn separator<'n>(last: &[u8], next: &'n [u8]) -> &'n [u8] {
    debug_assert!(last < next);
    &next[..common_prefix(last, next) + 1]
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_common_prefix_ends_where_the_first_byte_differs_or_the_shorter_ends() {
        let a: Vec<u8> = (0..40).collect();
        for len in 0..=a.len() {
            assert_eq!((common_prefix(&a, &a[..len]), common_prefix(&a[..len], &a)), (len, len));
            let mut b = a.clone();
            b[len..].iter_mut().for_each(|byte| *byte ^= 1);
            assert_eq!(common_prefix(&a, &b), len);
        }
    }

    #[test]
    fn a_separator_is_above_the_last_key_and_not_above_the_next() {
        for (last, next, expected) in
            [("a", "b", "b"), ("a", "ab", "ab"), ("a.1", "a.20", "a.2"), ("abc", "abdz", "abd")]
        {
            let found = separator(last.as_bytes(), next.as_bytes());
            assert_eq!(found, expected.as_bytes());
            assert!(last.as_bytes() < found && found <= next.as_bytes());
        }
    }
}
