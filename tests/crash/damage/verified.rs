//! A verification reports every flipped bit, but those between values, where no reader looks.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use parking_lot::Mutex;

use super::ask::Subject;
use super::atlas::{Region, Span, atlas};
use super::flips::{WORKERS, bits, seed};
use super::stores::closed;

/// Bytes that a verification can tell apart from all others: of each such unit, one is flipped at a time.
struct Unit {
    path: PathBuf,
    ranges: Vec<(Range<u64>, Region)>,
    /// Where the damage is reported, where that is known to the byte.
    offset: Option<u64>,
}

impl Unit {
    fn len(&self) -> u64 {
        self.ranges.iter().map(|(range, _)| range.end - range.start).sum()
    }

    fn byte(&self, mut nth: u64) -> Option<(u64, Region)> {
        for (range, region) in &self.ranges {
            let len = range.end - range.start;
            if nth < len {
                return Some((range.start + nth, *region));
            }
            nth -= len;
        }
        None
    }
}

/// Flips the first byte of every unit, then the second, and so on, and verifies each time: every unit must be reported.
/// Returns how many flips were reported, by region.
fn verify_reports_each(subject: &Subject, units: &[Unit]) -> BTreeMap<Region, u64> {
    let rounds = units.iter().map(Unit::len).max().unwrap_or_default();
    let files: Vec<PathBuf> = subject.sim.files();
    let (next, counts) = (AtomicU64::new(0), Mutex::new(BTreeMap::new()));
    let worker = || {
        let mut own: BTreeMap<Region, u64> = BTreeMap::new();
        loop {
            let round = next.fetch_add(1, Ordering::Relaxed);
            if round >= rounds {
                break;
            }
            let disk = subject.disk();
            let mut flipped = Vec::new();
            for unit in units {
                let Some((offset, region)) = unit.byte(round) else { continue };
                let file = files.iter().position(|path| *path == unit.path).expect("a unit is of a file");
                disk.flip_bit(&unit.path, offset, bits(file, offset).start);
                flipped.push((unit, offset, region));
            }
            let store = subject.open(&disk).unwrap_or_else(|error| panic!("round {round}: {error}"));
            let report = store.verify(|_| {}).unwrap_or_else(|error| panic!("round {round}: {error}"));
            store.abandon();
            for (unit, offset, region) in flipped {
                let named = report
                    .damages
                    .iter()
                    .any(|damage| damage.path == unit.path && (unit.offset.is_none() || damage.offset == unit.offset));
                let path = unit.path.display();
                assert!(named, "ALIGHT_FLIPS_SEED={}: not reported: byte {offset} of {path} ({region})", seed());
                *own.entry(region).or_default() += 1;
            }
        }
        let mut counts = counts.lock();
        own.into_iter().for_each(|(region, count)| *counts.entry(region).or_default() += count);
    };
    std::thread::scope(|scope| (0..WORKERS).map(|_| scope.spawn(worker)).for_each(drop));
    counts.into_inner()
}

#[test]
fn verification_reports_every_flipped_bit_but_those_between_values() {
    let started = Instant::now();
    let subject = closed();
    let spans = atlas(&subject.sim);
    // Values first: each is reported by its place, so all can be hit at once.
    let value = |span: &Span| Unit {
        path: span.path.clone(),
        offset: Some(span.range.start),
        ranges: vec![(span.range.clone(), span.region)],
    };
    let is_value = |span: &&Span| matches!(span.region, Region::Value | Region::DeadValue);
    let values: Vec<Unit> = spans.iter().filter(is_value).map(value).collect();
    let mut reported = verify_reports_each(&subject, &values);

    // Of each file then, everything else that an open does not refuse by itself: one byte at a time.
    let mut rest: BTreeMap<&PathBuf, Unit> = BTreeMap::new();
    let mut refused: BTreeMap<Region, u64> = BTreeMap::new();
    let mut unused: Vec<&Span> = Vec::new();
    for span in &spans {
        let opens = subject.resting_on(&span.path, span.range.clone()).iter().any(|(_, resting)| resting.open);
        match span.region {
            Region::Value | Region::DeadValue => {}
            Region::Padding | Region::Lock => unused.push(span),
            // `no_flipped_bit_is_believed` has shown that the open is refused.
            region if opens => *refused.entry(region).or_default() += span.range.end - span.range.start,
            region => {
                let unit = || Unit { path: span.path.clone(), ranges: Vec::new(), offset: None };
                rest.entry(&span.path).or_insert_with(unit).ranges.push((span.range.clone(), region));
            }
        }
    }
    let rest: Vec<Unit> = rest.into_values().collect();
    for (region, count) in verify_reports_each(&subject, &rest) {
        *reported.entry(region).or_default() += count;
    }

    // What is left is what no verification reports, and no reader reads: all of it at once.
    let disk = subject.disk();
    let mut between = 0;
    for span in &unused {
        for offset in span.range.clone() {
            disk.flip_bit(&span.path, offset, 0);
            between += 1;
        }
    }
    let store = subject.open(&disk).unwrap();
    assert!(store.verify(|_| {}).unwrap().is_sound());
    for (ask, expected) in subject.asks.iter().zip(&subject.now) {
        assert_eq!(ask.of(&store).unwrap(), *expected);
    }
    store.abandon();
    println!("verification, {:.1} s, ALIGHT_FLIPS_SEED={}", started.elapsed().as_secs_f64(), seed());
    for (region, count) in &reported {
        println!("{region:34} {count:>10} reported");
    }
    for (region, count) in &refused {
        println!("{region:34} {count:>10} refused by the open");
    }
    println!("{:34} {between:>10} not reported: padding between values, and the lock's words", "unused");
}
