//! Windows of segments that stay pinned for a GPU, so that what is loaded again and again goes from the page cache's own
//! pages to the device in a few long copies, at the bus's full rate, and no processor touches it.
//!
//! Pinning costs about as much as a copy, so it pays from the second load on; and pinned pages are memory that the system
//! cannot take back. So it is done only where the user gave a bound.
//!
//! # Invariants
//! - What is pinned at once is at most the bound, and what transfers in flight still use of what was let go.
//! - Only segments that nobody appends to are pinned: a write past the page cache beside a pinned page could leave an old copy
//!   of it in the cache.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use alight_format::SegmentId;
use parking_lot::Mutex;

use crate::device::{Device, PinnedMap};
use crate::io::read::SegmentFile;

/// The pages that are pinned together. Measured on an H100: pinning 6 GiB took 215 ms by 64 MiB and 164 ms by 256 MiB.
pub(crate) const WINDOW_BYTES: u64 = 128 << 20;

/// A window that nobody asked for in this time makes room for others. Sooner, loading in turns what does not fit would only
/// pin and unpin.
const KEPT: Duration = Duration::from_secs(30);

/// The pinned windows of one store.
#[derive(Debug)]
pub(crate) struct Windows {
    bytes_max: u64,
    state: Mutex<State>,
}

/// A device, a segment, and the number of a window in it.
type Place = (Device, SegmentId, u64);

#[derive(Debug, Default)]
struct State {
    held: HashMap<Place, Held>,
    bytes: u64,
    /// Pinning failed once: it is not tried again.
    refused: bool,
}

#[derive(Debug)]
struct Held {
    window: Arc<PinnedMap>,
    used: Instant,
}

impl Windows {
    /// Windows of at most so many bytes together; none where it is less than one window.
    pub(crate) fn new(bytes_max: u64) -> Self {
        Self { bytes_max, state: Mutex::default() }
    }

    /// Whether any window may ever be pinned.
    pub(crate) fn are_wanted(&self) -> bool {
        self.bytes_max > 0 && !self.state.lock().refused
    }

    /// The window with this number of a segment, pinned now where it was not, there is room, and all of it is in the page
    /// cache. Blocks while it is being pinned.
    pub(crate) fn get(
        &self,
        device: &Device,
        segment: SegmentId,
        file: &SegmentFile,
        number: u64,
    ) -> Option<Arc<PinnedMap>> {
        let start = number * WINDOW_BYTES;
        let end = (start + WINDOW_BYTES).min(file.sealed_end?);
        let len = end.checked_sub(start).filter(|&len| len > 0)?;
        let mut state = self.state.lock();
        let now = Instant::now();
        if let Some(held) = state.held.get_mut(&(device.clone(), segment, number)) {
            held.used = now;
            return Some(Arc::clone(&held.window));
        }
        if state.refused || !state.make_room(len, self.bytes_max) || !file.is_resident(start, len) {
            return None;
        }
        let map = match file.file.map(usize::try_from(end).ok()?) {
            Ok(map) => Arc::from(map),
            Err(error) => return state.refuse(&format!("map {}: {error}", file.path.display())),
        };
        match device.pin_map(map, start as usize..end as usize) {
            Ok(window) => {
                let window = Arc::new(window);
                state.bytes += len;
                let held = Held { window: Arc::clone(&window), used: now };
                state.held.insert((device.clone(), segment, number), held);
                Some(window)
            }
            Err(error) => state.refuse(&error.to_string()),
        }
    }

    /// Lets go of what is pinned of a segment whose file goes: else its space would stay taken.
    pub(crate) fn forget(&self, segment: SegmentId) {
        self.state.lock().let_go(|&(_, id, _), _| id == segment);
    }
}

impl State {
    fn refuse<T>(&mut self, why: &str) -> Option<T> {
        tracing::warn!("no page of the page cache is pinned: {why}");
        self.refused = true;
        None
    }

    /// Whether so many bytes more fit, once the oldest are gone.
    fn make_room(&mut self, len: u64, bytes_max: u64) -> bool {
        if self.bytes + len > bytes_max {
            self.let_go(|_, held| held.used.elapsed() >= KEPT);
        }
        self.bytes + len <= bytes_max
    }

    fn let_go(&mut self, which: impl Fn(&Place, &Held) -> bool) {
        let mut freed = 0;
        self.held.retain(|place, held| {
            let go = which(place, held);
            freed += if go { held.window.len() as u64 } else { 0 };
            !go
        });
        self.bytes -= freed;
    }
}
