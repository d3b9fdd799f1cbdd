//! Sequences of operations of a store, with faults and power cuts between them, drawn at random and judged by a model: the
//! fuzz target `store_ops` in `fuzz/` is this with a fuzzer's bytes.
//!
//! `ALIGHT_OPS=N` plays N scripts instead of a few thousand, `ALIGHT_OPS_SEED=N` others. What two failures in a row come to is
//! tried out in [`pairs`].

#[path = "../common/mod.rs"]
mod common;

mod ask;
mod pairs;
mod play;
mod script;

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use alight::storage::sim::Sabotage;
use common::bytes;
use common::panics::caught;
use common::sabotages::sabotages;
use parking_lot::Mutex;
use play::{Tally, play};
use script::{STEPS_MAX, Script};

fn number(variable: &str, otherwise: u64) -> u64 {
    std::env::var(variable).ok().and_then(|number| number.parse().ok()).unwrap_or(otherwise)
}

/// The bytes of a script, of some length.
fn input(seed: u64) -> Vec<u8> {
    let seed = number("ALIGHT_OPS_SEED", 1) << 32 | seed;
    bytes(seed, 4 + 4 * (1 + seed as usize % STEPS_MAX))
}

/// Plays the script that some bytes are.
fn judge(input: &[u8], sabotage: &Sabotage) -> Result<Tally, String> {
    let script = Script::decode(input);
    caught(|| play(&script, sabotage))
}

/// Leaves out of a script that breaks a promise all steps without which it is still broken, and tells of it.
fn shrink(mut input: Vec<u8>) -> String {
    let wrong = |input: &[u8]| judge(input, &Sabotage::default()).err();
    loop {
        let without = |step: usize| [&input[..4 * step], &input[4 * step + 4..]].concat();
        let shorter = (1..input.len() / 4).rev().map(without).find(|shorter| wrong(shorter).is_some());
        match shorter {
            Some(shorter) => input = shorter,
            None => break,
        }
    }
    let wrong = wrong(&input).unwrap_or_else(|| "not every time".into());
    format!("{}\n{input:02x?}\n{wrong}", Script::decode(&input))
}

#[test]
fn whatever_a_store_is_put_through_it_keeps_its_promises() {
    let started = Instant::now();
    let scripts = number("ALIGHT_OPS", 8000);
    let (next, sum, wrong) = (AtomicU64::new(0), Mutex::new(Tally::default()), Mutex::new(None));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= scripts || wrong.lock().is_some() {
                        break;
                    }
                    match judge(&input(seed), &Sabotage::default()) {
                        Ok(tally) => sum.lock().add(tally),
                        Err(what) => drop(wrong.lock().get_or_insert((seed, what))),
                    }
                }
            });
        }
    });
    if let Some((seed, wrong)) = wrong.into_inner() {
        panic!("script {seed}: {wrong}\nshrunk: {}", shrink(input(seed)));
    }
    let sum = sum.into_inner();
    println!("{scripts} scripts, {:.1} s: {sum:?}", started.elapsed().as_secs_f64());
    // What the scripts are there for did happen.
    assert!(sum.acknowledged > scripts && sum.failed > scripts / 20 && sum.power_cuts > scripts / 2, "{sum:?}");
    assert!(sum.faults_struck > scripts / 2 && sum.refused > scripts / 100, "{sum:?}");
}

/// Scripts that broke a promise once, and some with every step.
#[test]
fn the_fuzzers_seeds_keep_the_promises() {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds/store_ops");
    let mut played = 0;
    for seed in fs::read_dir(seeds).unwrap() {
        let path = seed.unwrap().path();
        let mut script = fs::read(&path).unwrap();
        // With every end: the process dies, all is lost, and each kind of a loss.
        for end in [0, 2].into_iter().chain((0..8).map(|kind| 4 | kind << 3)) {
            script[1] = script[1] & 3 | end << 2;
            judge(&script, &Sabotage::default()).unwrap_or_else(|wrong| panic!("{}: {wrong}", path.display()));
        }
        played += 1;
    }
    assert!(played >= 10, "{played}");
}

/// A script that fails the fifth call fails the same one the next time: what a run has found can be shrunk, and told. The story:
/// whether a value is lent to the disk, in one call, or copied, in two, was left to where it happened to lie in memory.
#[test]
fn a_script_makes_the_same_calls_every_time() {
    for mut script in (0..number("ALIGHT_OPS_TWICE", 600)).map(input) {
        // Nothing is lent but to a thread of the store's own, which there are for deadlines.
        script[0] |= 0xF0;
        let play = || judge(&script, &Sabotage::default()).unwrap();
        assert_eq!(play(), play(), "{}", Script::decode(&script));
    }
}

/// The harness can see: with any one kind of sync taken away, a few scripts are enough to find a promise broken.
#[test]
fn on_a_disk_that_forgets_syncs_a_broken_promise_is_found() {
    for (removed, sabotage) in sabotages() {
        let found = (0..5000).find_map(|seed| judge(&input(seed), &sabotage).err().map(|wrong| (seed, wrong)));
        let (seed, wrong) = found.unwrap_or_else(|| panic!("without {removed} no script finds anything"));
        println!("without {removed}, script {seed}: {}", wrong.lines().next().unwrap_or_default());
    }
}

impl Tally {
    fn add(&mut self, other: Self) {
        self.steps += other.steps;
        self.acknowledged += other.acknowledged;
        self.failed += other.failed;
        self.refused += other.refused;
        self.faults_struck += other.faults_struck;
        self.calls += other.calls;
        self.power_cuts += other.power_cuts;
        self.opens += other.opens;
    }
}
