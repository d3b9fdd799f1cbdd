//! A get of one value: out of what was fetched ahead where it was, else read now. Gets of many at once are not looked for
//! among what was fetched ahead: they know what they want.

use std::slice;
use std::sync::Arc;
use std::time::Instant;

use alight_format::{IndexEntry, crc32};

use crate::device::{Device, DeviceBuffer};
use crate::error::{Error, Result};
use crate::metrics::{LastRead, ReadRoute, RouteReason};
use crate::store::core::Core;
use crate::store::prefetch::{Part, Prefetcher};
use crate::store::read::extent_of;
use crate::tensor::Tensor;
use crate::trace::scope;

impl Core {
    /// Reads one value to a device.
    pub(crate) fn read_one(&self, entry: &Arc<IndexEntry>, device: &Device) -> Result<Tensor> {
        if let Some(prefetcher) = &self.prefetcher
            && let Some(arena) = self.fetched(prefetcher, entry, device)
        {
            return Tensor::from_arena(entry.dtype, &entry.shape, &Arc::new(arena), 0, entry.length);
        }
        let mut tensors = self.read_many(slice::from_ref(entry), device)?;
        Ok(tensors.pop().expect("one entry makes one tensor"))
    }

    /// Reads one value into host memory that is long enough.
    pub(crate) fn read_one_into(&self, entry: &IndexEntry, destination: &mut [u8]) -> Result<()> {
        if let Some(prefetcher) = &self.prefetcher {
            let copied = prefetcher.serve(&self.segments, &extent_of(entry), &Device::host(), |parts| {
                let mut hasher = crc32fast::Hasher::new();
                let mut rest = &mut destination[..entry.length as usize];
                for (buffer, range) in parts {
                    let bytes = &buffer.as_host().expect("host memory")[range.start as usize..range.end as usize];
                    let (target, after) = rest.split_at_mut(bytes.len());
                    target.copy_from_slice(bytes);
                    hasher.update(target);
                    rest = after;
                }
                hasher.finalize() == entry.crc
            });
            if copied == Some(true) {
                self.count_get(entry.length);
                return Ok(());
            }
        }
        self.read_into(entry, destination)
    }

    /// A copy of a value that was fetched ahead, compared with its checksum; `None` where it was not, or cannot be had.
    fn fetched(&self, prefetcher: &Prefetcher, entry: &IndexEntry, device: &Device) -> Option<DeviceBuffer> {
        let began = Instant::now();
        let copied = prefetcher.serve(&self.segments, &extent_of(entry), device, |parts| {
            let _scope = scope!("get_many", keys = 1, bytes = entry.length, route = ReadRoute::Prefetched.name());
            copy(parts, entry, device)
        })?;
        match copied {
            Ok(arena) => {
                let read = LastRead { route: ReadRoute::Prefetched, why: RouteReason::FetchedAhead };
                self.counters.count_read(read, began.elapsed());
                self.count_get(entry.length);
                Some(arena)
            }
            Err(error) => {
                // The read that follows tells what is wrong, if anything is.
                tracing::debug!(%error, "what was fetched ahead does not serve");
                None
            }
        }
    }
}

/// Copies a value out of slots of its device. A GPU takes the checksum where the copy lies, by a kernel: its threads pass over
/// the bytes at the speed of its memory, and no other checksum could be had, since who fills a slot does not know where values
/// begin in it.
fn copy(parts: &[Part<'_>], entry: &IndexEntry, device: &Device) -> Result<DeviceBuffer> {
    // Once for all the calls that this thread makes of the driver.
    let _current = if device.is_host() { None } else { Some(device.make_current()?) };
    let mut arena = device.allocate_to_be_filled(entry.length)?;
    arena.copy_from(0, parts)?;
    let crc = match arena.as_host() {
        Some(bytes) => crc32(bytes),
        None => arena.crc32(slice::from_ref(&(0..entry.length)))?[0],
    };
    if crc == entry.crc {
        return Ok(arena);
    }
    let why = "the bytes in the slots do not have the checksum they were put with".to_string();
    Err(Error::Device { device: device.to_string(), action: "copy what was fetched ahead", why })
}
