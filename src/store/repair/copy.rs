//! Carries values from a damaged store into a new one, each compared with its checksum on the way.
//!
//! # Invariants
//! - What is not what was put is not committed, and is named in the source's report.
//! - Memory: the small values of one commit, or the windows of a large one.

use std::io;
use std::sync::Arc;

use alight_format::IndexEntry;
use parking_lot::Mutex;

use super::{Source, damage_of};
use crate::error::{Error, Result};
use crate::io::{Extent, SegmentFile, read_chunks};
use crate::metrics::Counters;
use crate::store::Store;
use crate::store::options::Durability;
use crate::store::read::extent_of;
use crate::tensor::{ReadAt, TensorRef};

/// Values up to this length are copied many to a commit.
const SMALL_BYTES_MAX: u64 = 4 << 20;
/// A commit is made once it has this many bytes, or keys.
const BATCH_BYTES: u64 = 8 << 20;
const BATCH_KEYS: usize = 4096;

/// A value that waits for its commit.
struct Waiting {
    entry: Arc<IndexEntry>,
    attributes: Vec<(String, Vec<u8>)>,
    value: Vec<u8>,
}

/// Carries values over.
pub(super) struct Copy<'a> {
    source: &'a mut Source,
    store: &'a Store,
    /// Small values that wait for their commit.
    pending: Vec<Waiting>,
    pending_bytes: u64,
}

impl<'a> Copy<'a> {
    pub(super) fn new(source: &'a mut Source, store: &'a Store) -> Self {
        Self { source, store, pending: Vec::new(), pending_bytes: 0 }
    }

    /// How much damage was found so far.
    pub(super) fn damages(&self) -> u64 {
        self.source.report.damages.len() as u64
    }

    /// Carries a value over, now or with the next commit.
    pub(super) fn value(&mut self, entry: &Arc<IndexEntry>) -> Result<()> {
        let Some(file) = self.source.segments.get(entry.segment).and_then(|segment| self.source.file(segment.id))
        else {
            self.lose(entry, "the segment that holds the value is missing");
            return Ok(());
        };
        let attributes = self.source.attributes(entry).unwrap_or_else(|| {
            let damage =
                damage_of(&self.source.layout, entry, "its attributes are lost; the value is salvaged if it is whole");
            self.source.report.damages.push(damage);
            Vec::new()
        });
        if entry.length > SMALL_BYTES_MAX {
            self.large(entry, attributes, file)
        } else {
            self.small(entry, attributes, &file)
        }
    }

    fn small(&mut self, entry: &Arc<IndexEntry>, attributes: Vec<(String, Vec<u8>)>, file: &SegmentFile) -> Result<()> {
        let mut value = Vec::with_capacity(entry.length as usize);
        let read = read_chunks(file, &extent_of(entry), 0..entry.length, &self.source.counters, |_, bytes| {
            value.extend_from_slice(bytes);
            Ok(())
        });
        match read {
            Ok(()) if alight_format::crc32(&value) == entry.crc => {
                self.pending_bytes += entry.length;
                self.pending.push(Waiting { entry: Arc::clone(entry), attributes, value });
                if self.pending_bytes >= BATCH_BYTES || self.pending.len() >= BATCH_KEYS {
                    self.commit()
                } else {
                    Ok(())
                }
            }
            Ok(()) => {
                self.lose(entry, "its bytes do not have the checksum they were put with");
                Ok(())
            }
            Err(error) => {
                self.lose(entry, &format!("its bytes cannot be read: {error}"));
                Ok(())
            }
        }
    }

    /// A large value is one commit, and never in memory as a whole. It is compared while it is put: one that turns out
    /// damaged at its end is not committed.
    fn large(&mut self, entry: &Arc<IndexEntry>, attributes: Vec<(String, Vec<u8>)>, file: SegmentFile) -> Result<()> {
        let reader =
            CheckedReader { file, extent: extent_of(entry), counters: &self.source.counters, so_far: Mutex::default() };
        let mut batch = self.store.batch();
        let tensor = TensorRef::from_reader(entry.dtype, &entry.shape, &reader, 0)?;
        batch.put_with_attributes(&entry.key, tensor, attributes)?;
        batch.durability(Durability::Eventual);
        match batch.commit() {
            Ok(()) => self.gain(1, entry.length),
            Err(Error::Source { source }) => self.lose(entry, &source.to_string()),
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Commits the small values that wait for it.
    pub(super) fn commit(&mut self) -> Result<()> {
        let pending = std::mem::take(&mut self.pending);
        let mut batch = self.store.batch();
        for Waiting { entry, attributes, value } in &pending {
            batch.put_with_attributes(
                &entry.key,
                TensorRef::new(entry.dtype, &entry.shape, value)?,
                attributes.clone(),
            )?;
        }
        batch.durability(Durability::Eventual);
        batch.commit()?;
        self.gain(pending.len() as u64, self.pending_bytes);
        self.pending_bytes = 0;
        Ok(())
    }

    fn gain(&mut self, keys: u64, bytes: u64) {
        self.source.report.keys += keys;
        self.source.report.bytes += bytes;
    }

    fn lose(&mut self, entry: &IndexEntry, what: &str) {
        self.source.report.keys_lost += 1;
        let damage = damage_of(&self.source.layout, entry, what);
        self.source.report.damages.push(damage);
    }
}

/// Reads a value's bytes in order, and fails at the last of them if they are not those that were put.
struct CheckedReader<'a> {
    file: SegmentFile,
    extent: Extent,
    counters: &'a Counters,
    /// How many bytes were read in order, and their checksum so far.
    so_far: Mutex<(u64, crc32fast::Hasher)>,
}

impl ReadAt for CheckedReader<'_> {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let (start, length) = (self.extent.offset + offset, buf.len() as u64);
        let part = Extent { segment: self.extent.segment, offset: start, length, crc: 0 };
        read_chunks(&self.file, &part, 0..length, self.counters, |at, bytes| {
            buf[at as usize..][..bytes.len()].copy_from_slice(bytes);
            Ok(())
        })
        .map_err(|error| io::Error::other(format!("its bytes cannot be read: {error}")))?;
        let mut so_far = self.so_far.lock();
        if so_far.0 != offset {
            return Err(io::Error::other("its bytes were not read in order, and cannot be compared"));
        }
        so_far.0 += length;
        so_far.1.update(buf);
        if so_far.0 == self.extent.length && so_far.1.clone().finalize() != self.extent.crc {
            return Err(io::Error::other("its bytes do not have the checksum they were put with"));
        }
        Ok(())
    }
}
