//! Answers from a version: finds where values lie, has them read and checked, and hands out views.

use std::io::Write;
use std::ops::Range;
use std::sync::Arc;

use alight_format::{Entry, EntryKind, IndexEntry, SegmentId, crc32, limits};

use crate::device::{Device, DeviceBuffer};
use crate::error::{Damage, DisplayKey, Error, Result};
use crate::index::Version;
use crate::io::{Extent, ReadPlan, SegmentFile, execute, read_chunks};
use crate::metrics::Counters;
use crate::store::core::Core;
use crate::store::recover::read_frame;
use crate::tensor::{Key, Tensor, TensorInfo, check_key};

/// What is known of an index entry's value.
pub(crate) fn info_of(entry: &IndexEntry) -> Result<TensorInfo> {
    Ok(TensorInfo {
        key: Key::new(&entry.key)?,
        dtype: entry.dtype,
        shape: entry.shape.clone(),
        len_bytes: entry.length,
    })
}

fn extent_of(entry: &IndexEntry) -> Extent {
    Extent { segment: entry.segment, offset: entry.offset, length: entry.length, crc: entry.crc }
}

impl Core {
    /// The entry under a key.
    pub(crate) fn entry(&self, version: &Version, key: &[u8]) -> Result<Arc<IndexEntry>> {
        check_key(key)?;
        if let Ok(writer) = self.writer()
            && let Some(limit) = &writer.limit
        {
            limit.touch(key);
        }
        version.get(key)?.ok_or_else(|| Error::NotFound(DisplayKey::from(key)))
    }

    /// Reads the values of `entries` into one new arena on `device`.
    pub(crate) fn read_many(&self, entries: &[Arc<IndexEntry>], device: &Device) -> Result<Vec<Tensor>> {
        let extents: Vec<Extent> = entries.iter().map(|entry| extent_of(entry)).collect();
        let plan = ReadPlan::new(&extents, device.is_host());
        let mut arena = device.allocate_to_be_filled(plan.arena_bytes)?;
        self.read_planned(entries, &extents, &plan, &mut arena)?;
        let arena = Arc::new(arena);
        entries
            .iter()
            .zip(&plan.arena_offsets)
            .map(|(entry, &offset)| Tensor::from_arena(entry.dtype, &entry.shape, &arena, offset, entry.length))
            .collect()
    }

    /// Reads the values of `entries` into memory that is there; answers where each lies.
    pub(crate) fn read_many_into(
        &self,
        entries: &[Arc<IndexEntry>],
        arena: &mut DeviceBuffer,
    ) -> Result<Vec<Range<u64>>> {
        let extents: Vec<Extent> = entries.iter().map(|entry| extent_of(entry)).collect();
        let plan = ReadPlan::new(&extents, arena.device().is_host());
        let (needed, available) = (plan.arena_bytes, arena.len_bytes());
        if needed > available {
            return Err(Error::ArenaTooSmall { needed, available });
        }
        self.read_planned(entries, &extents, &plan, arena)?;
        let place = |(extent, &offset): (&Extent, &u64)| offset..offset + extent.length;
        Ok(extents.iter().zip(&plan.arena_offsets).map(place).collect())
    }

    fn read_planned(
        &self,
        entries: &[Arc<IndexEntry>],
        extents: &[Extent],
        plan: &ReadPlan,
        arena: &mut DeviceBuffer,
    ) -> Result<()> {
        let outcome = execute(plan, extents, &|id| self.segment_file(id), arena, &self.windows, &self.counters)?;
        if let Some(&first) = outcome.damaged.first() {
            Counters::add(&self.counters.checksum_failures, outcome.damaged.len() as u64);
            return Err(self.damaged_value(&entries[first]));
        }
        Counters::add(&self.counters.gets, entries.len() as u64);
        Counters::add(&self.counters.bytes_got, extents.iter().map(|extent| extent.length).sum());
        Ok(())
    }

    /// Reads a value into host memory that is long enough.
    pub(crate) fn read_into(&self, entry: &IndexEntry, destination: &mut [u8]) -> Result<()> {
        let mut hasher = crc32fast::Hasher::new();
        self.read_in_order(entry, |at, bytes| {
            hasher.update(bytes);
            destination[at as usize..][..bytes.len()].copy_from_slice(bytes);
            Ok(())
        })?;
        if hasher.finalize() != entry.crc {
            Counters::add(&self.counters.checksum_failures, 1);
            return Err(self.damaged_value(entry));
        }
        self.count_get(entry.length);
        Ok(())
    }

    /// Reads a value and compares it with its checksum.
    pub(crate) fn check_value(&self, entry: &IndexEntry) -> Result<()> {
        let mut hasher = crc32fast::Hasher::new();
        self.read_in_order(entry, |_, bytes| {
            hasher.update(bytes);
            Ok(())
        })?;
        if hasher.finalize() == entry.crc { Ok(()) } else { Err(self.damaged_value(entry)) }
    }

    /// Hands a value on chunk by chunk, each verified first.
    pub(crate) fn read_to_writer(&self, entry: &IndexEntry, out: &mut dyn Write) -> Result<()> {
        let chunk_crcs = self.chunk_crcs(entry)?;
        self.read_in_order(entry, |at, bytes| {
            self.check_chunk(entry, &chunk_crcs, at, bytes)?;
            out.write_all(bytes).map_err(|source| Error::Io {
                action: "hand on the value of a key of",
                path: self.layout.root().to_path_buf(),
                source,
            })
        })?;
        self.count_get(entry.length);
        Ok(())
    }

    /// Reads the chunks that a range touches, verified, and keeps the range.
    pub(crate) fn read_range(&self, entry: &IndexEntry, range: Range<u64>) -> Result<Vec<u8>> {
        let chunk_crcs = self.chunk_crcs(entry)?;
        let mut bytes = Vec::with_capacity((range.end - range.start) as usize);
        if range.is_empty() {
            return Ok(bytes);
        }
        let chunks = range.start / limits::CHUNK_BYTES * limits::CHUNK_BYTES
            ..range.end.next_multiple_of(limits::CHUNK_BYTES).min(entry.length);
        let file = self.segment_file(entry.segment)?;
        read_chunks(&file, &extent_of(entry), chunks, &self.counters, |at, chunk| {
            self.check_chunk(entry, &chunk_crcs, at, chunk)?;
            let from = range.start.max(at) - at;
            let to = range.end.min(at + chunk.len() as u64) - at;
            bytes.extend_from_slice(&chunk[from as usize..to as usize]);
            Ok(())
        })?;
        self.count_get(bytes.len() as u64);
        Ok(bytes)
    }

    /// The entry as the commit that put the value wrote it.
    pub(crate) fn frame_entry(&self, entry: &IndexEntry) -> Result<Entry> {
        let (segment, file) = self.segments.file_of(entry.segment)?;
        let len_bytes = file.facts().map_err(Error::io("measure", &segment.path))?.len_bytes;
        let damaged = |what: &str| {
            Error::Damaged(Damage {
                path: segment.path.clone(),
                offset: Some(entry.frame_offset),
                key: Some(DisplayKey(entry.key.clone())),
                what: what.to_owned(),
            })
        };
        let frame = read_frame(&segment, &*file, entry.frame_offset, len_bytes)?
            .ok_or_else(|| damaged("the frame of the commit that put it is broken"))?;
        let payload = frame.payload();
        frame
            .entries
            .into_iter()
            .find(|found| {
                found.kind == EntryKind::Put && payload + found.offset == entry.offset && found.crc == entry.crc
            })
            .ok_or_else(|| damaged("the frame that the index names does not hold it"))
    }

    /// The checksums of a value's chunks: the value's own where it is one chunk.
    fn chunk_crcs(&self, entry: &IndexEntry) -> Result<Vec<u32>> {
        if limits::chunk_count(entry.length) == 0 {
            Ok(vec![entry.crc])
        } else {
            Ok(self.frame_entry(entry)?.chunk_crcs)
        }
    }

    fn check_chunk(&self, entry: &IndexEntry, chunk_crcs: &[u32], at: u64, bytes: &[u8]) -> Result<()> {
        if chunk_crcs.get((at / limits::CHUNK_BYTES) as usize) == Some(&crc32(bytes)) {
            return Ok(());
        }
        Counters::add(&self.counters.checksum_failures, 1);
        Err(self.damaged_value(entry))
    }

    fn read_in_order(&self, entry: &IndexEntry, hand_on: impl FnMut(u64, &[u8]) -> Result<()>) -> Result<()> {
        let file = self.segment_file(entry.segment)?;
        read_chunks(&file, &extent_of(entry), 0..entry.length, &self.counters, hand_on)
    }

    fn segment_file(&self, id: SegmentId) -> Result<SegmentFile> {
        let (segment, file) = self.segments.file_of(id)?;
        Ok(SegmentFile { file, path: Arc::new(segment.path.clone()), sealed_end: segment.sealed_end() })
    }

    pub(crate) fn damaged_value(&self, entry: &IndexEntry) -> Error {
        Error::Damaged(Damage {
            path: self.layout.segment(entry.segment),
            offset: Some(entry.offset),
            key: Some(DisplayKey(entry.key.clone())),
            what: format!("{} bytes do not have the checksum they were put with", entry.length),
        })
    }

    fn count_get(&self, bytes: u64) {
        Counters::add(&self.counters.gets, 1);
        Counters::add(&self.counters.bytes_got, bytes);
    }
}

/// Refuses a range that a value does not have.
pub(crate) fn check_range(entry: &IndexEntry, range: &Range<u64>) -> Result<()> {
    if range.start > range.end || range.end > entry.length {
        return Err(Error::RangeOutOfBounds {
            key: DisplayKey(entry.key.clone()),
            start: range.start,
            end: range.end,
            len_bytes: entry.length,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::Store;
    use crate::device::simulated_gpu;

    #[test]
    fn what_is_loaded_again_comes_out_of_pinned_pages() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let value = |n: u64, len: u64| -> Vec<u8> { (0..len).map(|at| (at * 31 + at / 255 + n) as u8).collect() };
        let values = [value(1, 150 << 20), value(2, 5000), value(3, 9 << 20)];
        let store = Store::create(&path).unwrap();
        values.iter().enumerate().for_each(|(n, value)| store.put(format!("{n}"), value).unwrap());
        store.close().unwrap();
        let store = Store::options().read_only(true).pinned_bytes_max(1 << 30).open(&path).unwrap();
        let gpu = simulated_gpu();
        for round in 0..4 {
            let before = store.metrics().bytes_pinned;
            for (tensor, value) in store.get_many(["0", "1", "2"], &gpu).unwrap().iter().zip(&values) {
                assert!(tensor.to_host().unwrap() == *value, "round {round}, {} bytes", value.len());
            }
            let pinned = store.metrics().bytes_pinned - before;
            assert!(round < 2 || pinned > 140 << 20, "round {round}: {pinned} bytes");
        }
        // A bound that is too small for a window pins nothing, and is no failure.
        let store = Store::options().read_only(true).pinned_bytes_max(1000).open(&path).unwrap();
        assert!(store.get("0", &gpu).unwrap().to_host().unwrap() == values[0]);
        assert_eq!(store.metrics().bytes_pinned, 0);
    }
}
