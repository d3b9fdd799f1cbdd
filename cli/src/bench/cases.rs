//! The measurements, each with its like on the bare disk.

use std::fs::{self, File};
use std::hint::black_box;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use alight::Store;
use clap::ValueEnum;

use super::median::{Medians, Side, in_turns, median};
use super::raw::{Aligned, forget};
use super::{Bench, Effort, KIB, MIB, Row, Unit};
use crate::failure::Failure;
use crate::pattern::Pattern;
use crate::units::gb_per_s;

/// Threads of the measurement with many, and how often each of them puts in one round.
const WRITERS: u64 = 16;
const PUTS_PER_WRITER: u64 = 16;

/// Values of 1 MiB in one batch, and in one `get_many`.
const BATCH_VALUES: u64 = 64;

/// Keys that the lookups choose from, and lookups in one round.
const LOOKUP_KEYS: u64 = 200_000;
const LOOKUPS_PER_ROUND: u64 = 10_000;

/// One measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Case {
    /// Durable single puts of 1 MiB.
    #[value(name = "put-1m")]
    Put1M,
    /// Durable single puts of 16 MiB.
    #[value(name = "put-16m")]
    Put16M,
    /// Durable batches of 64 values of 1 MiB.
    #[value(name = "batch-64m")]
    Batch64M,
    /// Durable single puts of 4 KiB.
    #[value(name = "put-4k")]
    Put4K,
    /// The same from 16 threads at once.
    #[value(name = "put-4k-16")]
    Put4K16,
    /// Gets of 1 MiB, cold, in random order.
    #[value(name = "get-1m")]
    Get1M,
    /// 64 values of 1 MiB with one call, cold.
    #[value(name = "get-many-64m")]
    GetMany64M,
    /// Index lookups: what is known of a key, without its value.
    #[value(name = "lookup")]
    Lookup,
}

impl Case {
    pub(crate) const ALL: [Case; 8] = [
        Case::Put1M,
        Case::Put16M,
        Case::Batch64M,
        Case::Put4K,
        Case::Put4K16,
        Case::Get1M,
        Case::GetMany64M,
        Case::Lookup,
    ];

    fn name(self) -> &'static str {
        match self {
            Case::Put1M => "put-1m",
            Case::Put16M => "put-16m",
            Case::Batch64M => "batch-64m",
            Case::Put4K => "put-4k",
            Case::Put4K16 => "put-4k-16",
            Case::Get1M => "get-1m",
            Case::GetMany64M => "get-many-64m",
            Case::Lookup => "lookup",
        }
    }

    fn what(self) -> &'static str {
        match self {
            Case::Put1M => "put 1 MiB, durable",
            Case::Put16M => "put 16 MiB, durable",
            Case::Batch64M => "batch of 64 × 1 MiB, durable",
            Case::Put4K => "put 4 KiB, durable, 1 thread",
            Case::Put4K16 => "put 4 KiB, durable, 16 threads",
            Case::Get1M => "get 1 MiB, cold, random",
            Case::GetMany64M => "get_many 64 × 1 MiB, cold",
            Case::Lookup => "index lookup, 200,000 keys",
        }
    }

    pub(super) fn rounds(self, effort: Effort) -> u64 {
        effort.rounds(match self {
            Case::Put1M => 64,
            Case::Put16M => 16,
            Case::Batch64M => 8,
            Case::Put4K => 256,
            Case::Put4K16 => 12,
            Case::Get1M => 256,
            Case::GetMany64M => 8,
            Case::Lookup => 12,
        })
    }

    /// What the bare disk's side writes.
    pub(super) fn raw_bytes(self, effort: Effort) -> u64 {
        let each = match self {
            Case::Put1M => MIB,
            Case::Put16M => 16 * MIB,
            Case::Batch64M => BATCH_VALUES * MIB,
            Case::Put4K => 4 * KIB,
            Case::Put4K16 => WRITERS * PUTS_PER_WRITER * 4 * KIB,
            Case::Get1M | Case::GetMany64M | Case::Lookup => 0,
        };
        each * self.rounds(effort)
    }
}

impl Bench<'_> {
    /// Does one measurement.
    pub(crate) fn measure(&mut self, case: Case) -> Result<Row, Failure> {
        let rounds = case.rounds(self.effort);
        let rate = |bytes: u64| move |medians: Medians| (gb_per_s(bytes, medians.store), gb_per_s(bytes, medians.disk));
        let per_second = |times: u64| {
            move |medians: Medians| {
                (times as f64 / medians.store.as_secs_f64(), times as f64 / medians.disk.as_secs_f64())
            }
        };
        let (unit, (alight, raw)) = match case {
            Case::Put1M => (Unit::GbPerSecond, rate(MIB)(self.put_single(case, MIB)?)),
            Case::Put16M => (Unit::GbPerSecond, rate(16 * MIB)(self.put_single(case, 16 * MIB)?)),
            Case::Batch64M => (Unit::GbPerSecond, rate(BATCH_VALUES * MIB)(self.put_batches(rounds)?)),
            Case::Put4K => (Unit::PerSecond, per_second(1)(self.put_single(case, 4 * KIB)?)),
            Case::Put4K16 => (Unit::PerSecond, per_second(WRITERS * PUTS_PER_WRITER)(self.put_by_many(rounds)?)),
            Case::Get1M => (Unit::GbPerSecond, rate(MIB)(self.get_random(rounds)?)),
            Case::GetMany64M => (Unit::GbPerSecond, rate(BATCH_VALUES * MIB)(self.get_many(rounds)?)),
            Case::Lookup => {
                let time = self.look_up(rounds)?;
                let alight = time.as_secs_f64() * 1e6 / LOOKUPS_PER_ROUND as f64;
                return Ok(Row {
                    name: case.name(),
                    what: case.what(),
                    unit: Unit::Microseconds,
                    rounds,
                    alight,
                    raw: None,
                    ratio: None,
                });
            }
        };
        let ratio = (raw > 0.0).then(|| alight / raw);
        Ok(Row { name: case.name(), what: case.what(), unit, rounds, alight, raw: Some(raw), ratio })
    }

    /// One value a commit.
    fn put_single(&mut self, case: Case, len: u64) -> Result<Medians, Failure> {
        in_turns(case.rounds(self.effort), |side, number| {
            let cut = self.next_cut(len);
            let bytes = &self.pool.bytes()[cut];
            let began = Instant::now();
            match side {
                Side::Store => self.store.put(format!("{}.{number:06}", case.name()), bytes)?,
                Side::Disk => self.raw.append(bytes)?,
            }
            let time = began.elapsed();
            self.tick(side);
            Ok(time)
        })
    }

    /// Sixty-four values a commit.
    fn put_batches(&mut self, rounds: u64) -> Result<Medians, Failure> {
        let first = self.batches;
        let medians = in_turns(rounds, |side, number| {
            let cut = self.next_cut(BATCH_VALUES * MIB);
            let bytes = &self.pool.bytes()[cut];
            let began = Instant::now();
            match side {
                Side::Store => put_batch(&self.store, first + number, bytes)?,
                Side::Disk => self.raw.append(bytes)?,
            }
            let time = began.elapsed();
            self.tick(side);
            Ok(time)
        })?;
        self.batches += rounds;
        Ok(medians)
    }

    /// Sixteen threads, each with its own values; the bare disk's with a sync each, to the same file.
    fn put_by_many(&mut self, rounds: u64) -> Result<Medians, Failure> {
        in_turns(rounds, |side, number| {
            let cuts: Vec<_> = (0..WRITERS).map(|_| self.next_cut(4 * KIB)).collect();
            let places: Vec<u64> = (0..WRITERS).map(|_| self.raw.reserve(PUTS_PER_WRITER * 4 * KIB)).collect();
            let start = Barrier::new(WRITERS as usize + 1);
            let (store, raw, pool) = (&self.store, &self.raw, &self.pool);
            let time = thread::scope(|scope| {
                let writers: Vec<_> = cuts
                    .into_iter()
                    .zip(places)
                    .enumerate()
                    .map(|(writer, (cut, place))| {
                        let start = &start;
                        scope.spawn(move || -> Result<(), Failure> {
                            let bytes = &pool.bytes()[cut];
                            start.wait();
                            for put in 0..PUTS_PER_WRITER {
                                match side {
                                    Side::Store => {
                                        store.put(format!("many.{number:04}.{writer:02}.{put:02}"), bytes)?
                                    }
                                    Side::Disk => raw
                                        .write(bytes, place + put * 4 * KIB)
                                        .map_err(|error| Failure::io("write", "the bare disk's file", error))?,
                                }
                            }
                            Ok(())
                        })
                    })
                    .collect();
                start.wait();
                let began = Instant::now();
                writers.into_iter().try_for_each(|writer| writer.join().expect("a writer does not panic"))?;
                Ok::<_, Failure>(began.elapsed())
            })?;
            self.tick(side);
            Ok(time)
        })
    }

    /// One value at a time, none twice, none in the page cache.
    fn get_random(&mut self, rounds: u64) -> Result<Medians, Failure> {
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
    fn get_many(&mut self, rounds: u64) -> Result<Medians, Failure> {
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
    fn look_up(&mut self, rounds: u64) -> Result<Duration, Failure> {
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
            crate::interrupt::check()?;
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
            crate::interrupt::check()?;
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

    /// A round counts as done with the store's side.
    fn tick(&self, side: Side) {
        if side == Side::Store {
            self.progress.add(1);
        }
    }
}

fn put_batch(store: &Store, number: u64, bytes: &[u8]) -> Result<(), Failure> {
    let mut batch = store.batch();
    for (value, bytes) in bytes.chunks(MIB as usize).enumerate() {
        batch.put(batch_key(number, value as u64), bytes)?;
    }
    Ok(batch.commit()?)
}

fn batch_key(batch: u64, value: u64) -> String {
    format!("batch.{batch:04}.{value:02}")
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

    #[test]
    fn names_are_those_of_the_command_line() {
        for case in Case::ALL {
            assert_eq!(Case::from_str(case.name(), false), Ok(case));
        }
        assert_eq!(Case::ALL.len(), Case::value_variants().len());
    }
}
