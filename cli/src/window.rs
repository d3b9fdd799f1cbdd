//! Cuts what is to be got into windows, so that neither a device nor the host has to hold it all.

use alight::{Device, Snapshot, TensorInfo};

use crate::failure::Failure;

/// A window of host memory when nothing else is asked for.
const HOST_BYTES: u64 = 128 << 20;

/// A GPU's window at most when nothing else is asked for: a larger one is no faster.
const GPU_BYTES_MAX: u64 = 16 << 30;

/// The keys in one window at most, so that small tensors take bounded memory too.
const KEYS_MAX: usize = 64 << 10;

/// What one tensor takes of an arena is a multiple of this at most.
const ALIGN_BYTES: u64 = 4096;

/// How many bytes to get at once onto a device: what was asked for, else half of what a GPU has free, or 128 MiB of the
/// host's memory.
pub(crate) fn window_bytes(device: &Device, asked: Option<u64>) -> Result<u64, Failure> {
    if let Some(bytes) = asked {
        return Ok(bytes);
    }
    Ok(match device.memory_bytes()? {
        None => HOST_BYTES,
        Some(memory) => (memory.free / 2).clamp(1, GPU_BYTES_MAX),
    })
}

/// Tensors in the order in which they come, a window at a time: as many as fit, and always at least one.
pub(crate) fn cut<I: Iterator<Item = alight::Result<TensorInfo>>>(infos: I, bytes_max: u64) -> Windows<I> {
    Windows { infos, bytes_max, held_over: None }
}

/// Made by [`cut`].
pub(crate) struct Windows<I> {
    infos: I,
    bytes_max: u64,
    held_over: Option<TensorInfo>,
}

impl<I: Iterator<Item = alight::Result<TensorInfo>>> Iterator for Windows<I> {
    type Item = alight::Result<Vec<TensorInfo>>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut window: Vec<TensorInfo> = Vec::new();
        let mut bytes = 0u64;
        loop {
            let info = match self.held_over.take().map_or_else(|| self.infos.next(), |info| Some(Ok(info))) {
                None => break,
                Some(Err(error)) => return Some(Err(error)),
                Some(Ok(info)) => info,
            };
            bytes = bytes.saturating_add(info.len_bytes.next_multiple_of(ALIGN_BYTES));
            if !window.is_empty() && (bytes > self.bytes_max || window.len() >= KEYS_MAX) {
                self.held_over = Some(info);
                break;
            }
            window.push(info);
        }
        (!window.is_empty()).then_some(Ok(window))
    }
}

/// How much there is under a prefix.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Totals {
    pub(crate) keys: u64,
    pub(crate) bytes: u64,
}

/// Counts what is under a prefix, reading no values.
pub(crate) fn totals(snapshot: &Snapshot, prefix: &[u8]) -> Result<Totals, Failure> {
    let mut totals = Totals::default();
    for info in snapshot.scan(prefix) {
        totals.keys += 1;
        totals.bytes += info?.len_bytes;
    }
    Ok(totals)
}

#[cfg(test)]
mod tests {
    use super::*;
    use alight::{Dtype, Key};

    #[test]
    fn windows_hold_what_fits_and_at_least_one() {
        let info = |len_bytes| {
            let key = Key::new("k").unwrap();
            Ok(TensorInfo { key, dtype: Dtype::U8, shape: vec![len_bytes], len_bytes })
        };
        let cut_to = |lengths: &[u64], bytes_max| -> Vec<Vec<u64>> {
            cut(lengths.iter().map(|&length| info(length)), bytes_max)
                .map(|window| window.unwrap().iter().map(|info| info.len_bytes).collect())
                .collect()
        };
        assert_eq!(cut_to(&[], 10), Vec::<Vec<u64>>::new());
        assert_eq!(cut_to(&[4096, 1, 4096], 8192), [vec![4096, 1], vec![4096]]);
        assert_eq!(cut_to(&[100_000, 1, 1], 8192), [vec![100_000], vec![1, 1]]);
        assert_eq!(cut_to(&[5000, 5000], 1), [vec![5000], vec![5000]]);
        assert_eq!(cut_to(&vec![0; KEYS_MAX + 1], 1).len(), 2);
    }
}
