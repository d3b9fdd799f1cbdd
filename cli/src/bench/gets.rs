//! Gets, and reads from the bare disk's file, both with nothing in the page cache; and lookups in the index.

use std::fs::{self, File};
use std::hint::black_box;
use std::time::{Duration, Instant};

use alight::Store;

use super::median::{Medians, Side, in_turns, median};
use super::puts::{batch_key, put_batch};
use super::raw::{Aligned, forget};
use super::{BATCH_VALUES, Bench, MIB};
use crate::failure::Failure;
use crate::interrupt;
use crate::pattern::Pattern;

/// Keys that the lookups choose from, and lookups in one round.
const LOOKUP_KEYS: u64 = 200_000;
pub(super) const LOOKUPS_PER_ROUND: u64 = 10_000;

impl Bench<'_> {
    /// One value at a time, none twice, none in the page cache.
    pub(super) fn get_random(&mut self, rounds: u64) -> Result<Medians, Failure> {
        self.prepare_gets(rounds.div_ceil(BATCH_VALUES))?;
        let values = self.batches * BATCH_VALUES;
        let order = shuffled(values);
        let raw_places = shuffled(self.raw.end() / MIB);
        let mut buffer = Aligned::zeroed(MIB as usize);
        in_turns(rounds, |side, number| {
            let began = Instant::now();
            match side {
                Side::Store => {
                    let value = order[(number % values) as usize];
                    let key = batch_key(value / BATCH_VALUES, value % BATCH_VALUES);
                    black_box(self.store.get(key, self.device)?);
                }
                Side::Disk => {
                    let place = raw_places[number as usize % raw_places.len()];
                    self.raw.read(black_box(buffer.bytes_mut()), place * MIB)?;
                }
            }
            let time = began.elapsed();
            self.tick(side);
            Ok(time)
        })
    }

    /// A batch's values with one call; the bare disk reads as long a run.
    pub(super) fn get_many(&mut self, rounds: u64) -> Result<Medians, Failure> {
        self.prepare_gets(rounds)?;
        let batches = shuffled(self.batches);
        let runs = shuffled(self.raw.end() / (BATCH_VALUES * MIB));
        let mut buffer = Aligned::zeroed((BATCH_VALUES * MIB) as usize);
        in_turns(rounds, |side, number| {
            let began = Instant::now();
            match side {
                Side::Store => {
                    let batch = batches[number as usize % batches.len()];
                    let keys = (0..BATCH_VALUES).map(|value| batch_key(batch, value));
                    black_box(self.store.get_many(keys, self.device)?);
                }
                Side::Disk => {
                    let run = runs[number as usize % runs.len()];
                    self.raw.read_run(black_box(buffer.bytes_mut()), run * BATCH_VALUES * MIB)?;
                }
            }
            let time = began.elapsed();
            self.tick(side);
            Ok(time)
        })
    }

    /// Ten thousand lookups a round, of random keys, in an index that was written out.
    pub(super) fn look_up(&mut self, rounds: u64) -> Result<Duration, Failure> {
        let key = |number: u64| format!("lookup.{:016x}", number.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let mut batch = self.store.batch();
        for number in 0..LOOKUP_KEYS {
            batch.put(key(number), &[])?;
        }
        batch.commit()?;
        let path = self.store.path().to_owned();
        self.store.clone().close()?;
        self.store = Store::open(path)?;
        let keys: Vec<String> = shuffled(LOOKUP_KEYS).into_iter().map(key).collect();
        let snapshot = self.store.snapshot();
        let mut times = Vec::new();
        for round in 0..rounds {
            interrupt::check()?;
            let from = (round * LOOKUPS_PER_ROUND % LOOKUP_KEYS) as usize;
            let began = Instant::now();
            for key in &keys[from..from + LOOKUPS_PER_ROUND as usize] {
                if black_box(snapshot.info(key)?).is_none() {
                    return Err(Failure::other("different", format!("key {key} was put and is not there")));
                }
            }
            times.push(began.elapsed());
            self.progress.add(1);
        }
        Ok(median(times))
    }

    /// Sees to it that there are batches to get from, of which the page cache has nothing.
    fn prepare_gets(&mut self, batches: u64) -> Result<(), Failure> {
        while self.batches < batches {
            interrupt::check()?;
            let cut = self.next_cut(BATCH_VALUES * MIB);
            let bytes = &self.pool.bytes()[cut];
            put_batch(&self.store, self.batches, bytes)?;
            self.raw.append(bytes)?;
            self.batches += 1;
        }
        self.raw.forget();
        let segments = self.store.path().join("segments");
        let failed = |error| Failure::io("list", &segments, error);
        for entry in fs::read_dir(&segments).map_err(failed)? {
            if let Ok(file) = File::open(entry.map_err(failed)?.path()) {
                forget(&file);
            }
        }
        Ok(())
    }
}

/// The numbers below `count` in an order that has none (Fisher and Yates), the same every time.
fn shuffled(count: u64) -> Vec<u64> {
    let mut numbers: Vec<u64> = (0..count).collect();
    let mut random = [0; 8];
    for last in (1..numbers.len()).rev() {
        Pattern::new(5).fill(last as u64 * 8, &mut random);
        numbers.swap(last, (u64::from_le_bytes(random) % (last as u64 + 1)) as usize);
    }
    numbers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shuffle_keeps_every_number() {
        let mut numbers = shuffled(1000);
        assert_ne!(numbers[..10], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
        numbers.sort_unstable();
        assert!(numbers.into_iter().eq(0..1000));
        assert!(shuffled(0).is_empty());
    }
}
