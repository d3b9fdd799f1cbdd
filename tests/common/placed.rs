//! Bytes that begin on a page, or off one. Where a vector's do is chance; and what begins on a page is lent to the disk instead
//! of being copied, in other calls: a script would not strike the same call the next time.

use std::ops::{Deref, Range};

use alight::storage::AlignedBuf;

/// A value, put where its own bytes say: one in four begins on a page.
pub struct Placed {
    pages: AlignedBuf,
    range: Range<usize>,
}

impl Placed {
    pub fn new(value: &[u8]) -> Self {
        let on_a_page = value.first().is_some_and(|first| first % 4 == 0);
        let start = if on_a_page { 0 } else { 8 };
        let range = start..start + value.len();
        let mut pages = AlignedBuf::zeroed(range.end);
        pages[range.clone()].copy_from_slice(value);
        Self { pages, range }
    }
}

impl Deref for Placed {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.pages[self.range.clone()]
    }
}
