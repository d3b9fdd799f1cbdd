//! What one file holds: pages shared between every version and every copy of it.
//!
//! # Invariants
//! - A clone costs the same for a page and for a gibibyte; a change copies the pages that it touches, and no others.
//! - The bytes of the last page past the length are zeros, so lengthening a file shows zeros.
//! - Every page that holds data lies in an extent; an extent without a page is space taken ahead, and reads as zeros.
//! - `sum` is the sum of every page's hash mixed with its place, so that a fingerprint reads no page.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use imbl::OrdMap;

use super::rng::{fold, hash_page};

/// The unit in which contents are shared, and space is taken and given back.
pub(super) const PAGE_BYTES: u64 = 4096;

const PAGE: usize = PAGE_BYTES as usize;

/// One page, with its hash.
#[derive(Clone)]
struct Page {
    bytes: Arc<[u8; PAGE]>,
    hash: u64,
}

impl Page {
    fn new(bytes: &[u8; PAGE]) -> Self {
        Self { hash: hash_page(bytes), bytes: Arc::new(*bytes) }
    }
}

/// The bytes of a file, at one moment.
#[derive(Clone, Default)]
pub(super) struct Content {
    len: u64,
    pages: OrdMap<u64, Page>,
    extents: Extents,
    sum: u64,
}

impl Content {
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    pub(super) fn allocated_bytes(&self) -> u64 {
        self.extents.pages() * PAGE_BYTES
    }

    /// What a write of this range would take beside what is taken already.
    pub(super) fn allocation_missing(&self, range: Range<u64>) -> u64 {
        let pages = pages_touching(&range);
        (pages.end - pages.start - self.extents.pages_in(&pages)) * PAGE_BYTES
    }

    /// A hash of the length, of the bytes, and of where the holes are.
    pub(super) fn fingerprint(&self) -> u64 {
        fold(self.len, self.sum)
    }

    /// Reads what there is of the range; answers how much that was.
    pub(super) fn read(&self, buf: &mut [u8], offset: u64) -> usize {
        let end = offset.saturating_add(buf.len() as u64).min(self.len);
        if offset >= end {
            return 0;
        }
        let len = index(end - offset);
        let mut at = 0;
        for (&number, page) in self.pages.range(pages_touching(&(offset..end))) {
            let start = (number * PAGE_BYTES).max(offset);
            let stop = ((number + 1) * PAGE_BYTES).min(end);
            let (from, to) = (index(start - offset), index(stop - offset));
            buf[at..from].fill(0);
            buf[from..to].copy_from_slice(&page.bytes[within_page(start)..][..to - from]);
            at = to;
        }
        buf[at..len].fill(0);
        len
    }

    pub(super) fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; index(self.len)];
        self.read(&mut bytes, 0);
        bytes
    }

    /// Writes, lengthening the file to hold what was written.
    pub(super) fn write(&mut self, mut bytes: &[u8], offset: u64) {
        if bytes.is_empty() {
            return;
        }
        let mut at = offset;
        while !bytes.is_empty() {
            let from = within_page(at);
            let (now, later) = bytes.split_at(bytes.len().min(PAGE - from));
            match <&[u8; PAGE]>::try_from(now) {
                Ok(whole) => self.set_page(at / PAGE_BYTES, Some(Page::new(whole))),
                Err(_) => self.edit_page(at / PAGE_BYTES, |page| page[from..][..now.len()].copy_from_slice(now)),
            }
            at += now.len() as u64;
            bytes = later;
        }
        self.extents.add(pages_touching(&(offset..at)));
        self.len = self.len.max(at);
    }

    pub(super) fn allocate(&mut self, range: Range<u64>) {
        self.extents.add(pages_touching(&range));
        self.len = self.len.max(range.end);
    }

    /// Zeros a range, and gives back the pages that lie wholly inside it.
    pub(super) fn punch(&mut self, range: Range<u64>) {
        let whole = pages_inside(&range);
        self.drop_pages(&whole);
        self.extents.remove(whole.clone());
        for edge in edges(&range, &whole) {
            self.zero_in_page(edge);
        }
    }

    pub(super) fn truncate(&mut self, len: u64) {
        if len < self.len {
            let kept = len.div_ceil(PAGE_BYTES);
            self.drop_pages(&(kept..u64::MAX));
            self.extents.remove(kept..u64::MAX);
            self.zero_in_page(len..kept * PAGE_BYTES);
        }
        self.len = len;
    }

    /// Lengthens the file to `len`, if it is shorter.
    pub(super) fn grow(&mut self, len: u64) {
        self.len = self.len.max(len);
    }

    /// The first offset at or after `offset`, inside the file, whose page holds data.
    pub(super) fn next_data(&self, offset: u64) -> Option<u64> {
        let (&number, _) = self.pages.range(offset / PAGE_BYTES..).next()?;
        Some(offset.max(number * PAGE_BYTES)).filter(|&at| at < self.len)
    }

    /// Takes over a range as it is in another version of the file: bytes, holes and space taken. The length stays;
    /// what lies past it is not taken over.
    pub(super) fn adopt(&mut self, from: &Content, range: Range<u64>) {
        let range = range.start..range.end.min(self.len);
        if range.start >= range.end {
            return;
        }
        let mut whole = pages_inside(&range);
        // A last page that neither version fills is the same page with the same zeros behind the end.
        if range.end >= self.len.max(from.len) && range.end > whole.end * PAGE_BYTES {
            whole.end = range.end.div_ceil(PAGE_BYTES);
        }
        self.drop_pages(&whole);
        for (&number, page) in from.pages.range(whole.clone()) {
            self.set_page(number, Some(page.clone()));
        }
        for edge in edges(&range, &whole) {
            let (number, start) = (edge.start / PAGE_BYTES, within_page(edge.start));
            let len = index(edge.end - edge.start);
            match from.pages.get(&number) {
                Some(page) => self.edit_page(number, |own| {
                    own[start..][..len].copy_from_slice(&page.bytes[start..][..len]);
                }),
                None => self.zero_in_page(edge),
            }
        }
        self.extents.remove(whole.clone());
        for extent in from.extents.within(&pages_touching(&range)) {
            self.extents.add(extent);
        }
    }

    fn set_page(&mut self, number: u64, page: Option<Page>) {
        let after = page.as_ref().map_or(0, |page| fold(number, page.hash));
        let before = match page {
            Some(page) => self.pages.insert(number, page),
            None => self.pages.remove(&number),
        };
        let before = before.map_or(0, |page| fold(number, page.hash));
        self.sum = self.sum.wrapping_sub(before).wrapping_add(after);
    }

    /// Changes a page, or makes it of zeros first.
    fn edit_page(&mut self, number: u64, change: impl FnOnce(&mut [u8; PAGE])) {
        let mut bytes = self.pages.get(&number).map_or([0; PAGE], |page| *page.bytes);
        change(&mut bytes);
        self.extents.add(number..number + 1);
        self.set_page(number, Some(Page::new(&bytes)));
    }

    /// Zeros a range inside one page, if the page is there.
    fn zero_in_page(&mut self, range: Range<u64>) {
        let number = range.start / PAGE_BYTES;
        if range.start < range.end && self.pages.contains_key(&number) {
            let (start, len) = (within_page(range.start), index(range.end - range.start));
            self.edit_page(number, |page| page[start..][..len].fill(0));
        }
    }

    fn drop_pages(&mut self, numbers: &Range<u64>) {
        let dropped: Vec<u64> = self.pages.range(numbers.clone()).map(|(&number, _)| number).collect();
        for number in dropped {
            self.set_page(number, None);
        }
    }
}

#[cfg(test)]
impl Content {
    /// The module's invariants, page by page.
    pub(super) fn assert_invariants(&self) {
        let mut sum = 0u64;
        for (&number, page) in &self.pages {
            let used = self.len.saturating_sub(number * PAGE_BYTES).min(PAGE_BYTES);
            assert!(used > 0, "a page past the end");
            assert!(page.bytes[index(used)..].iter().all(|&byte| byte == 0), "bytes past the end");
            assert_eq!(self.extents.pages_in(&(number..number + 1)), 1, "a page outside of every extent");
            sum = sum.wrapping_add(fold(number, hash_page(&page.bytes)));
        }
        assert_eq!(sum, self.sum);
        assert!(self.extents.0.windows(2).all(|pair| pair[0].end < pair[1].start));
    }
}

impl fmt::Debug for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Content({} bytes, {} pages)", self.len, self.pages.len())
    }
}

/// A length or a distance inside a buffer of this process.
fn index(value: u64) -> usize {
    usize::try_from(value).expect("the twin keeps whole files in memory, so their lengths fit it")
}

fn within_page(offset: u64) -> usize {
    index(offset % PAGE_BYTES)
}

fn pages_touching(range: &Range<u64>) -> Range<u64> {
    range.start / PAGE_BYTES..range.end.div_ceil(PAGE_BYTES)
}

/// The pages that lie wholly inside a range; empty, and at the range's start, when there is none.
fn pages_inside(range: &Range<u64>) -> Range<u64> {
    let start = range.start.div_ceil(PAGE_BYTES);
    start..(range.end / PAGE_BYTES).max(start)
}

/// What of a byte range lies outside of the whole pages inside it: at most a piece of one page at either end.
fn edges(range: &Range<u64>, whole: &Range<u64>) -> impl Iterator<Item = Range<u64>> + use<> {
    let head = range.start..(whole.start * PAGE_BYTES).min(range.end);
    let tail = (whole.end * PAGE_BYTES).max(head.end)..range.end;
    [head, tail].into_iter().filter(|edge| edge.start < edge.end)
}

/// Which pages a file takes on its disk: sorted ranges that neither overlap nor touch.
#[derive(Clone, Default)]
struct Extents(Arc<Vec<Range<u64>>>);

impl Extents {
    fn pages(&self) -> u64 {
        self.0.iter().map(|extent| extent.end - extent.start).sum()
    }

    fn within(&self, pages: &Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let first = self.0.partition_point(|extent| extent.end <= pages.start);
        let overlapping = self.0[first..].iter().take_while(|extent| extent.start < pages.end);
        overlapping.map(|extent| extent.start.max(pages.start)..extent.end.min(pages.end))
    }

    fn pages_in(&self, pages: &Range<u64>) -> u64 {
        self.within(pages).map(|extent| extent.end - extent.start).sum()
    }

    fn add(&mut self, pages: Range<u64>) {
        if pages.is_empty() || self.pages_in(&pages) == pages.end - pages.start {
            return;
        }
        let extents = Arc::make_mut(&mut self.0);
        let first = extents.partition_point(|extent| extent.end < pages.start);
        let last = extents.partition_point(|extent| extent.start <= pages.end);
        let merged = match extents.get(first..last) {
            Some([only]) => only.start.min(pages.start)..only.end.max(pages.end),
            Some([head, .., tail]) => head.start.min(pages.start)..tail.end.max(pages.end),
            _ => pages,
        };
        extents.splice(first..last, [merged]);
    }

    fn remove(&mut self, pages: Range<u64>) {
        if self.pages_in(&pages) == 0 {
            return;
        }
        let extents = Arc::make_mut(&mut self.0);
        let first = extents.partition_point(|extent| extent.end <= pages.start);
        let last = extents.partition_point(|extent| extent.start < pages.end);
        let left = extents[first].start..pages.start;
        let right = pages.end..extents[last - 1].end;
        extents.splice(first..last, [left, right].into_iter().filter(|piece| !piece.is_empty()));
    }
}
