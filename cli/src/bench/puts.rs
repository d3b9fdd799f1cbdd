//! Puts, and appends to the bare disk's file.

use std::sync::Barrier;
use std::thread;
use std::time::Instant;

use alight::Store;

use super::cases::Case;
use super::median::{Medians, Side, in_turns};
use super::{BATCH_VALUES, Bench, KIB, MIB};
use crate::failure::Failure;

/// Threads of the measurement with many, and how often each of them puts in one round.
pub(super) const WRITERS: u64 = 16;
pub(super) const PUTS_PER_WRITER: u64 = 64;

impl Bench<'_> {
    /// One value a commit.
    pub(super) fn put_single(&mut self, case: Case, len: u64) -> Result<Medians, Failure> {
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
    pub(super) fn put_batches(&mut self, rounds: u64) -> Result<Medians, Failure> {
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
    pub(super) fn put_by_many(&mut self, rounds: u64) -> Result<Medians, Failure> {
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
}

pub(super) fn put_batch(store: &Store, number: u64, bytes: &[u8]) -> Result<(), Failure> {
    let mut batch = store.batch();
    for (value, bytes) in bytes.chunks(MIB as usize).enumerate() {
        batch.put(batch_key(number, value as u64), bytes)?;
    }
    Ok(batch.commit()?)
}

pub(super) fn batch_key(batch: u64, value: u64) -> String {
    format!("batch.{batch:04}.{value:02}")
}
