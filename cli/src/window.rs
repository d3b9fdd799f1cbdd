//! Cuts what is to be got into windows, so that neither a device nor the host has to hold it all.

use alight::{Device, Scan, Snapshot, TensorInfo};

use crate::failure::Failure;

/// A window of host memory when nothing else is asked for.
const HOST_BYTES: u64 = 128 << 20;

/// A GPU's window at most: a larger one is no faster.
const GPU_BYTES_MAX: u64 = 16 << 30;

/// The keys in one window at most, so that small tensors take bounded memory too.
const KEYS_MAX: usize = 64 << 10;

/// What one tensor takes of an arena at least.
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

/// The tensors under a prefix in order, a window at a time: as many as fit, and always at least one.
pub(crate) struct Windows {
    scan: Scan,
    bytes_max: u64,
    held_over: Option<TensorInfo>,
}

impl Windows {
    pub(crate) fn new(snapshot: &Snapshot, prefix: &[u8], bytes_max: u64) -> Self {
        Self { scan: snapshot.scan(prefix), bytes_max, held_over: None }
    }
}

impl Iterator for Windows {
    type Item = alight::Result<Vec<TensorInfo>>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut window = Vec::new();
        let mut bytes = 0;
        loop {
            let info = match self.held_over.take().map_or_else(|| self.scan.next(), |info| Some(Ok(info))) {
                None => break,
                Some(Err(error)) => return Some(Err(error)),
                Some(Ok(info)) => info,
            };
            bytes += info.len_bytes.next_multiple_of(ALIGN_BYTES);
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
