//! The latest commits by key, in memory: a persistent map, so that a snapshot is a clone that shares everything, and in
//! front of it a filter.
//!
//! The map alone takes a third of a microsecond to say that a key is not in it, as most are not; the filter is one load.
//!
//! # Invariants
//! - Overlays that were cloned from one another share one filter, in which bits are set and never taken back: before the
//!   overlay that needs them is handed on. So an older clone may look a newer key up in vain, and none ever misses one.

use std::ops::RangeBounds;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use alight_format::{HashedKey, IndexEntry};

use crate::config::OVERLAY_FILTER_BYTES;

/// Entries by key, the newest of each. Cloning it is cheap.
#[derive(Debug, Clone, Default)]
pub(crate) struct Overlay {
    entries: imbl::OrdMap<Arc<[u8]>, Arc<IndexEntry>>,
    /// None while there are no entries, so that a store that is only read has none.
    filter: Option<Arc<Filter>>,
}

impl Overlay {
    /// What is known of a key: a put, a delete, or nothing.
    #[inline]
    pub(crate) fn get(&self, key: &HashedKey<'_>) -> Option<&Arc<IndexEntry>> {
        if self.filter.as_ref()?.may_have(key) { self.entries.get(key.bytes()) } else { None }
    }

    /// Puts an entry in the place of what is known of its key.
    pub(crate) fn insert(&mut self, entry: Arc<IndexEntry>) {
        self.filter.get_or_insert_default().add(&HashedKey::new(&entry.key));
        self.entries.insert(Arc::from(entry.key.as_slice()), entry);
    }

    /// Puts all entries of a newer overlay in the place of what is known of their keys.
    pub(crate) fn insert_newer(&mut self, newer: &Overlay) {
        newer.entries.values().for_each(|entry| self.insert(Arc::clone(entry)));
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The entries of a range of keys, in order.
    pub(crate) fn range<'a>(
        &'a self,
        keys: impl RangeBounds<Arc<[u8]>> + 'a,
    ) -> impl Iterator<Item = &'a Arc<IndexEntry>> + 'a {
        self.entries.range(keys).map(|(_, entry)| entry)
    }
}

/// Two bits of one word for each key, chosen by its hash.
#[derive(Debug)]
struct Filter {
    words: Box<[AtomicU64]>,
}

impl Default for Filter {
    fn default() -> Self {
        Self { words: (0..OVERLAY_FILTER_BYTES / size_of::<u64>()).map(|_| AtomicU64::new(0)).collect() }
    }
}

impl Filter {
    /// The word and the bits in it of a key.
    #[inline]
    fn place(&self, key: &HashedKey<'_>) -> (&AtomicU64, u64) {
        let hash = key.hash();
        let word = (hash >> 12) as usize % self.words.len();
        (&self.words[word], 1 << (hash % 64) | 1 << ((hash >> 6) % 64))
    }

    // No ordering: whoever is handed an overlay is handed all that came before it.
    fn add(&self, key: &HashedKey<'_>) {
        let (word, bits) = self.place(key);
        word.fetch_or(bits, Ordering::Relaxed);
    }

    #[inline]
    fn may_have(&self, key: &HashedKey<'_>) -> bool {
        let (word, bits) = self.place(key);
        word.load(Ordering::Relaxed) & bits == bits
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use alight_format::{SegmentId, Seq};

    use super::*;
    use crate::config::OVERLAY_ENTRIES_MAX;

    fn entry(key: &str, seq: u64) -> Arc<IndexEntry> {
        Arc::new(IndexEntry::tombstone(key.as_bytes(), Seq(seq), SegmentId(1), 4096))
    }

    fn seq(overlay: &Overlay, key: &str) -> Option<u64> {
        overlay.get(&HashedKey::new(key.as_bytes())).map(|entry| entry.seq.get())
    }

    #[test]
    fn every_clone_knows_its_own_keys_and_no_later_ones() {
        let mut overlay = Overlay::default();
        let mut oracle: BTreeMap<String, u64> = BTreeMap::new();
        let mut clones = Vec::new();
        let (puts, keys, apart) = if cfg!(miri) { (150, 110, 30) } else { (20_000u64, 15_000, 4000) };
        for n in 0..puts {
            let key = format!("layers.{}", n.wrapping_mul(0x9e37_79b9) % keys);
            overlay.insert(entry(&key, n + 1));
            oracle.insert(key, n + 1);
            if n % apart == 0 {
                clones.push((overlay.clone(), oracle.clone()));
            }
        }
        clones.push((overlay, oracle));
        for (overlay, oracle) in &clones {
            assert_eq!(overlay.len(), oracle.len());
            for n in 0..keys {
                let key = format!("layers.{n}");
                assert_eq!(seq(overlay, &key), oracle.get(&key).copied());
            }
            assert!(overlay.range(..).map(|entry| entry.seq.get()).eq(oracle.values().copied()));
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "statistics of 32,000 keys take minutes")]
    fn few_absent_keys_are_looked_up_in_vain() {
        let filter = Filter::default();
        let key = |n: usize| format!("model.layers.{}.weight.{n}", n % 60);
        (0..OVERLAY_ENTRIES_MAX).for_each(|n| filter.add(&HashedKey::new(key(n).as_bytes())));
        let absent = OVERLAY_ENTRIES_MAX..2 * OVERLAY_ENTRIES_MAX;
        let in_vain = absent.filter(|n| filter.may_have(&HashedKey::new(key(*n).as_bytes()))).count();
        assert!(in_vain < OVERLAY_ENTRIES_MAX / 100, "{in_vain}");
    }

    #[test]
    fn of_two_overlays_the_newer_one_wins() {
        let (mut older, mut newer) = (Overlay::default(), Overlay::default());
        ["a", "b"].iter().for_each(|key| older.insert(entry(key, 1)));
        ["b", "c"].iter().for_each(|key| newer.insert(entry(key, 2)));
        older.insert_newer(&newer);
        assert_eq!(["a", "b", "c", "d"].map(|key| seq(&older, key)), [Some(1), Some(2), Some(2), None]);
        assert_eq!(["a", "b", "c", "d"].map(|key| seq(&newer, key)), [None, Some(2), Some(2), None]);
    }
}
