//! Keys in order.

use std::ops::Bound;
use std::sync::Arc;
use std::vec;

use alight_format::IndexEntry;

use crate::error::Result;
use crate::store::read::info_of;
use crate::store::snapshot::Snapshot;
use crate::tensor::TensorInfo;

/// How many keys are taken from the index at a time.
const PAGE_KEYS: usize = 512;

/// An iterator over keys in order with what is known of their values; made by [`Store::scan`](crate::Store::scan). Reads
/// no payload, and sees one state of the store throughout.
///
/// After an error it ends: keys past a damaged block of the index cannot be told.
pub struct Scan {
    snapshot: Snapshot,
    prefix: Vec<u8>,
    page: vec::IntoIter<Arc<IndexEntry>>,
    /// The last key of the last page; `None` before the first page.
    after: Option<Vec<u8>>,
    done: bool,
}

impl Scan {
    pub(crate) fn new(snapshot: Snapshot, prefix: &[u8]) -> Self {
        Self { snapshot, prefix: prefix.to_vec(), page: Vec::new().into_iter(), after: None, done: false }
    }

    pub(crate) fn next_entry(&mut self) -> Option<Result<Arc<IndexEntry>>> {
        if let Some(entry) = self.page.next() {
            return Some(Ok(entry));
        }
        if self.done {
            return None;
        }
        match self.turn_page() {
            Ok(()) => self.page.next().map(Ok),
            Err(error) => {
                self.done = true;
                Some(Err(error))
            }
        }
    }

    fn turn_page(&mut self) -> Result<()> {
        let after = self.after.clone();
        let page = self.snapshot.core()?.look_up(self.snapshot.version(), &self.prefix, move |version, prefix| {
            version.page(prefix, after.as_deref().map_or(Bound::Unbounded, Bound::Excluded), PAGE_KEYS)
        })?;
        self.done = page.len() < PAGE_KEYS;
        self.after = page.last().map(|entry| entry.key.to_vec());
        self.page = page.into_iter();
        Ok(())
    }
}

impl Iterator for Scan {
    type Item = Result<TensorInfo>;

    fn next(&mut self) -> Option<Self::Item> {
        Some(self.next_entry()?.and_then(|entry| info_of(&entry)))
    }
}
