//! Several sorted layers read as one, and the decision which of them to make into one.

use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::ops::Bound;
use std::sync::Arc;

use alight_format::IndexEntry;

use crate::error::Result;
use crate::index::overlay::Overlay;
use crate::index::run::Run;

type Layer<'a> = Box<dyn Iterator<Item = Result<Arc<IndexEntry>>> + 'a>;

/// The newest entry of every key from `from` on, deletes included, in key order. Layers are given newest first.
pub(crate) fn merge_layers<'a>(
    overlays: &[&'a Overlay],
    runs: &'a [Arc<Run>],
    from: Bound<&[u8]>,
) -> Result<MergedLayers<'a>> {
    let owned = (from.map(Arc::<[u8]>::from), Bound::Unbounded);
    let mut layers: Vec<Layer<'a>> = Vec::with_capacity(overlays.len() + runs.len());
    for overlay in overlays {
        layers.push(Box::new(overlay.range(owned.clone()).map(|entry| Ok(Arc::clone(entry)))));
    }
    for run in runs {
        layers.push(Box::new(run.range(from).map(|entry| entry.map(Arc::new))));
    }
    let mut merged = MergedLayers { layers, heads: BinaryHeap::new() };
    for age in 0..merged.layers.len() {
        merged.advance(age)?;
    }
    Ok(merged)
}

/// The iterator of [`merge_layers`].
pub(crate) struct MergedLayers<'a> {
    layers: Vec<Layer<'a>>,
    heads: BinaryHeap<Head>,
}

/// The next entry of one layer.
struct Head {
    entry: Arc<IndexEntry>,
    /// Which layer it came from; zero is the newest.
    age: usize,
}

impl MergedLayers<'_> {
    fn advance(&mut self, age: usize) -> Result<()> {
        if let Some(entry) = self.layers[age].next().transpose()? {
            self.heads.push(Head { entry, age });
        }
        Ok(())
    }
}

impl Iterator for MergedLayers<'_> {
    type Item = Result<Arc<IndexEntry>>;

    fn next(&mut self) -> Option<Self::Item> {
        let newest = self.heads.pop()?;
        let mut stepped = self.advance(newest.age);
        while stepped.is_ok()
            && let Some(older) = self.heads.peek()
            && older.entry.key == newest.entry.key
        {
            let age = older.age;
            self.heads.pop();
            stepped = self.advance(age);
        }
        Some(stepped.map(|()| newest.entry))
    }
}

// The heap pops its greatest: the smallest key, and of equal keys the newest.
impl Ord for Head {
    fn cmp(&self, other: &Self) -> Ordering {
        other.entry.key.cmp(&self.entry.key).then(other.age.cmp(&self.age))
    }
}

impl PartialOrd for Head {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Head {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Head {}

/// How many of the newest runs to merge into a new one of `fresh` entries, given the runs' entries, newest first.
///
/// A run stays alone once it holds `growth` times what everything newer holds together. With [`RUN_GROWTH`](crate::config::RUN_GROWTH) there are at
/// most six runs after five thousand flushes, and an entry was written again twelve times.
pub(crate) fn merge_count(fresh: u64, runs: impl IntoIterator<Item = u64>, growth: u64) -> usize {
    let mut together = fresh;
    let mut count = 0;
    for entries in runs {
        if entries >= together.saturating_mul(growth) {
            break;
        }
        together = together.saturating_add(entries);
        count += 1;
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::RUN_GROWTH;

    #[test]
    fn the_number_of_runs_grows_with_the_logarithm_of_the_flushes() {
        let mut runs: Vec<u64> = Vec::new();
        let mut written = 0u64;
        let flushes = if cfg!(miri) { 500 } else { 100_000u64 };
        for _ in 0..flushes {
            let count = merge_count(1, runs.iter().copied(), RUN_GROWTH);
            let merged = 1 + runs.drain(..count).sum::<u64>();
            written += merged;
            runs.insert(0, merged);
            assert!(runs.windows(2).all(|pair| pair[1] >= pair[0] * RUN_GROWTH));
        }
        assert_eq!(runs.iter().sum::<u64>(), flushes);
        assert!(runs.len() <= 10, "{runs:?}");
        assert!(written <= flushes * 40, "each entry was written {} times", written / flushes);
    }
}
