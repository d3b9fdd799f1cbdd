//! What several threads did with a store, and whether a store that does one thing at a time could have answered so.
//!
//! An operation is what it saw and what it changed, with the moment before it was called and the moment after it returned, on
//! one clock. [`order_of`] looks for an order of all of them in which an operation that ended before another began comes before
//! it, and each sees exactly what those before it left: the search of Wing and Gong, with the memory of Lowe for
//! configurations that led nowhere. The model is one map for the whole store, so it judges batches and scans as
//! well as single keys.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

/// The number of a value: every value that is put in a history has its own.
pub type Value = u32;

/// A store that does one thing at a time.
pub type Model = BTreeMap<&'static str, Value>;

/// What an operation learned of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    Absent,
    Present,
    Value(Value),
}

/// An operation that was carried out.
#[derive(Clone)]
pub struct Operation {
    pub what: &'static str,
    pub start: u64,
    pub end: u64,
    pub sees: Vec<(&'static str, Seen)>,
    /// `None` deletes.
    pub writes: Vec<(&'static str, Option<Value>)>,
}

impl fmt::Debug for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:5}..{:5} {}", self.start, self.end, self.what)?;
        if !self.sees.is_empty() {
            write!(f, ", sees {:?}", self.sees)?;
        }
        if !self.writes.is_empty() {
            write!(f, ", writes {:?}", self.writes)?;
        }
        Ok(())
    }
}

impl Operation {
    /// What of it does not fit a model.
    fn contradicts(&self, model: &Model) -> bool {
        self.sees.iter().any(|&(key, seen)| match (seen, model.get(key)) {
            (Seen::Absent, now) => now.is_some(),
            (Seen::Present, now) => now.is_none(),
            (Seen::Value(value), now) => now != Some(&value),
        })
    }

    fn apply(&self, model: &mut Model) {
        for &(key, value) in &self.writes {
            match value {
                Some(value) => model.insert(key, value),
                None => model.remove(key),
            };
        }
    }
}

/// The one clock of a history.
#[derive(Default)]
pub struct Clock(AtomicU64);

impl Clock {
    /// A moment after all that were told before.
    pub fn now(&self) -> u64 {
        self.0.fetch_add(1, Ordering::SeqCst)
    }

    /// Calls, and answers between which moments it was.
    pub fn during<T>(&self, call: impl FnOnce() -> T) -> (u64, T, u64) {
        let start = self.now();
        let answer = call();
        (start, answer, self.now())
    }
}

/// How far the search for an order came at best.
pub struct Impossible {
    placed: Vec<Operation>,
    left: Model,
    none_fits: Vec<Operation>,
}

impl fmt::Debug for Impossible {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "no order explains what was seen. The longest that does:")?;
        self.placed.iter().try_for_each(|operation| writeln!(f, "  {operation:?}"))?;
        writeln!(f, "leaves {:?}, and what could come next does not fit:", self.left)?;
        self.none_fits.iter().try_for_each(|operation| writeln!(f, "  {operation:?}"))
    }
}

/// An order of `operations` on a store that held `before`, in which every one of them is right; their places in the slice.
/// At most 128 operations.
pub fn order_of(before: &Model, operations: &[Operation]) -> Result<Vec<usize>, Impossible> {
    assert!(operations.len() <= 128, "a set of operations is 128 bits");
    assert!(operations.iter().all(|operation| operation.start < operation.end));
    let mut search = Search { operations, led_nowhere: HashSet::new(), order: Vec::new(), best: None };
    if search.complete(0, before) {
        return Ok(search.order);
    }
    let (order, left, next) = search.best.expect("some configuration was the last");
    let named = |places: Vec<usize>| places.into_iter().map(|place| operations[place].clone()).collect();
    Err(Impossible { placed: named(order), left, none_fits: named(next) })
}

struct Search<'a> {
    operations: &'a [Operation],
    /// Which operations were placed, and what they left.
    led_nowhere: HashSet<(u128, Model)>,
    order: Vec<usize>,
    /// The longest order so far after which nothing fitted, what it left, and what could have been next.
    best: Option<(Vec<usize>, Model, Vec<usize>)>,
}

impl Search<'_> {
    /// Places all that `placed` has not.
    fn complete(&mut self, placed: u128, model: &Model) -> bool {
        let left = || (0..self.operations.len()).filter(move |place| placed >> place & 1 == 0);
        // Whatever begins after another of them ended is not the next.
        let Some(first_end) = left().map(|place| self.operations[place].end).min() else { return true };
        let next: Vec<usize> = left().filter(|&place| self.operations[place].start < first_end).collect();
        for &place in &next {
            let operation = &self.operations[place];
            if operation.contradicts(model) {
                continue;
            }
            let mut after = model.clone();
            operation.apply(&mut after);
            let placed = placed | 1 << place;
            if self.led_nowhere.contains(&(placed, after.clone())) {
                continue;
            }
            self.order.push(place);
            if self.complete(placed, &after) {
                return true;
            }
            self.order.pop();
            self.led_nowhere.insert((placed, after));
        }
        if self.best.as_ref().is_none_or(|(longest, ..)| longest.len() < self.order.len()) {
            self.best = Some((self.order.clone(), model.clone(), next));
        }
        false
    }
}
