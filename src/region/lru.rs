//! Values in the order of their last use: a doubly linked list through a slab. Every operation is O(1) and takes no memory
//! but the slab's.
//!
//! # Invariants
//! - `coldest` to `hottest` and back is every value, once.
//! - A key is good until its value is removed, and never means another value afterwards.

/// Where no entry is.
const NONE: usize = usize::MAX;

/// Names a value of an [`Lru`] until it is removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LruKey {
    index: usize,
    generation: u64,
}

#[derive(Debug)]
struct Entry<T> {
    /// `None` where the place is free; `hotter` then leads to the next free place.
    value: Option<T>,
    generation: u64,
    colder: usize,
    hotter: usize,
}

/// Values in the order of their last use.
#[derive(Debug)]
pub struct Lru<T> {
    entries: Vec<Entry<T>>,
    coldest: usize,
    hottest: usize,
    free: usize,
    len: usize,
}

impl<T> Default for Lru<T> {
    fn default() -> Self {
        Self { entries: Vec::new(), coldest: NONE, hottest: NONE, free: NONE, len: 0 }
    }
}

impl<T> Lru<T> {
    /// No values.
    pub fn new() -> Self {
        Self::default()
    }

    /// How many values there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Adds a value as the one used last.
    pub fn insert(&mut self, value: T) -> LruKey {
        let index = if self.free == NONE {
            self.entries.push(Entry { value: None, generation: 0, colder: NONE, hotter: NONE });
            self.entries.len() - 1
        } else {
            let index = self.free;
            self.free = self.entries[index].hotter;
            index
        };
        self.entries[index].value = Some(value);
        self.link_hottest(index);
        self.len += 1;
        LruKey { index, generation: self.entries[index].generation }
    }

    /// Makes a value the one used last; `false` where the key names none.
    pub fn touch(&mut self, key: LruKey) -> bool {
        if self.get(key).is_none() {
            return false;
        }
        if self.hottest != key.index {
            self.unlink(key.index);
            self.link_hottest(key.index);
        }
        true
    }

    /// Takes a value out.
    pub fn remove(&mut self, key: LruKey) -> Option<T> {
        self.get(key)?;
        self.unlink(key.index);
        let entry = &mut self.entries[key.index];
        let value = entry.value.take();
        entry.generation += 1;
        entry.hotter = self.free;
        self.free = key.index;
        self.len -= 1;
        value
    }

    /// A value; it stays where it is in the order.
    pub fn get(&self, key: LruKey) -> Option<&T> {
        let entry = self.entries.get(key.index).filter(|entry| entry.generation == key.generation)?;
        entry.value.as_ref()
    }

    /// A value, to change; it stays where it is in the order.
    pub fn get_mut(&mut self, key: LruKey) -> Option<&mut T> {
        let entry = self.entries.get_mut(key.index).filter(|entry| entry.generation == key.generation)?;
        entry.value.as_mut()
    }

    /// All values, the one unused for longest first.
    pub fn iter(&self) -> impl Iterator<Item = (LruKey, &T)> {
        let mut at = self.coldest;
        std::iter::from_fn(move || {
            let index = at;
            let entry = self.entries.get(index)?;
            at = entry.hotter;
            let value = entry.value.as_ref().expect("an entry of the list has a value");
            Some((LruKey { index, generation: entry.generation }, value))
        })
    }

    fn link_hottest(&mut self, index: usize) {
        (self.entries[index].colder, self.entries[index].hotter) = (self.hottest, NONE);
        match self.entries.get_mut(self.hottest) {
            Some(hottest) => hottest.hotter = index,
            None => self.coldest = index,
        }
        self.hottest = index;
    }

    fn unlink(&mut self, index: usize) {
        let (colder, hotter) = (self.entries[index].colder, self.entries[index].hotter);
        match self.entries.get_mut(colder) {
            Some(entry) => entry.hotter = hotter,
            None => self.coldest = hotter,
        }
        match self.entries.get_mut(hotter) {
            Some(entry) => entry.colder = colder,
            None => self.hottest = colder,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_key_never_means_a_later_value() {
        let mut lru = Lru::new();
        let first = lru.insert('a');
        assert_eq!(lru.remove(first), Some('a'));
        let second = lru.insert('b');
        assert_eq!((lru.get(first).copied(), lru.touch(first), lru.remove(first)), (None, false, None));
        assert_eq!((lru.get(second), lru.len()), (Some(&'b'), 1));
    }

    proptest! {
        #[test]
        fn any_calls_leave_the_order_of_a_plain_list(steps in prop::collection::vec((0u8..4, 0usize..40), 0..400)) {
            let mut lru = Lru::new();
            let mut model: Vec<(LruKey, usize)> = vec![];
            let mut keys = vec![];
            for (n, (kind, pick)) in steps.into_iter().enumerate() {
                let key = keys.get(pick % keys.len().max(1)).copied();
                match (kind, key) {
                    (1, Some(key)) => {
                        let known = model.iter().position(|entry| entry.0 == key);
                        prop_assert_eq!(lru.touch(key), known.is_some());
                        if let Some(at) = known {
                            let entry = model.remove(at);
                            model.push(entry);
                        }
                    }
                    (2, Some(key)) => {
                        let known = model.iter().position(|entry| entry.0 == key);
                        prop_assert_eq!(lru.remove(key), known.map(|at| model.remove(at).1));
                    }
                    (3, Some(key)) => {
                        let known = model.iter_mut().find(|entry| entry.0 == key);
                        prop_assert_eq!(lru.get_mut(key), known.map(|entry| &mut entry.1));
                    }
                    _ => {
                        let key = lru.insert(n);
                        keys.push(key);
                        model.push((key, n));
                    }
                }
                let order: Vec<_> = lru.iter().map(|(key, &value)| (key, value)).collect();
                prop_assert_eq!(&order, &model);
                prop_assert_eq!((lru.len(), lru.is_empty()), (model.len(), model.is_empty()));
            }
        }
    }
}
