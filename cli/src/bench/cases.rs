//! The measurements, each with its like on the bare disk.

use clap::ValueEnum;

use super::gets::LOOKUPS_PER_ROUND;
use super::median::{Medians, Side};
use super::puts::{PUTS_PER_WRITER, WRITERS};
use super::{BATCH_VALUES, Bench, Effort, KIB, MIB, Row, Unit};
use crate::failure::Failure;
use crate::units::gb_per_s;

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

    pub(super) fn name(self) -> &'static str {
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

    /// A round counts as done with the store's side.
    pub(super) fn tick(&self, side: Side) {
        if side == Side::Store {
            self.progress.add(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_command_line() {
        for case in Case::ALL {
            assert_eq!(Case::from_str(case.name(), false), Ok(case));
        }
        assert_eq!(Case::ALL.len(), Case::value_variants().len());
    }
}
