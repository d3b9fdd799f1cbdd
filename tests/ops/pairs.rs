//! Two failures in one short life after another: what the first leaves behind is there when the second strikes, in the same
//! process, in its close, in the opening of the next or in that of the one after. Random scripts seldom come upon such pairs; here
//! every pair of a few lives is tried, and each ends with several power cuts.
//!
//! Every pair of failed syncs is tried, and of the other pairs some: one in N with `ALIGHT_PAIRS=N`. `ALIGHT_FAILED_SYNCS=3` has
//! three syncs fail as well, one after another; `ALIGHT_PAIRS_ONLY=NAME` tries one life. `ALIGHT_LIVES=N` takes N random lives instead of
//! a dozen, `ALIGHT_OPS_SEED=N` others.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use alight::Durability;
use alight::storage::sim::{Abilities, Fault, FaultKind, OpKind};
use parking_lot::Mutex;

use crate::common::bytes;
use crate::common::panics::caught;
use crate::play::play_struck;
use crate::script::{Closed, Limit, Loss, Script, Setting, Step};
use crate::{input, number};

/// What the last power cut takes away, one after another.
const LOSSES: [Loss; 8] = [
    Loss::All,
    Loss::Nothing,
    Loss::OnlyOf(0),
    Loss::OnlyOf(1),
    Loss::AllBut(0),
    Loss::From(1),
    Loss::Random(1),
    Loss::Random(2),
];

/// One in so many pairs of calls that are not both syncs is tried, where nothing else is asked for.
const EVERY: u64 = 97;

/// How many steps of a random script are a life.
const RANDOM_STEPS_MAX: usize = 8;

/// Puts bytes that no other key has, and no other length of this one.
fn put(key: u64, len: usize, durability: Durability) -> Step {
    Step::Commit(vec![(format!("k{key}").into_bytes(), Some(bytes(key << 32 | len as u64, len)))], durability)
}

fn durable(key: u64, len: usize) -> Step {
    put(key, len, Durability::Immediate)
}

fn eventual(key: u64, len: usize) -> Step {
    put(key, len, Durability::Eventual)
}

fn delete(key: u64) -> Step {
    Step::Commit(vec![(format!("k{key}").into_bytes(), None)], Durability::Immediate)
}

/// Lives of a store: several openings each, and something durable behind the last one.
fn lives() -> Vec<(&'static str, Script)> {
    let setting = Setting {
        overlay_entries_max: 3,
        segment_bytes: 16 << 10,
        limit: Limit::None,
        abilities: Abilities::default(),
        deadlines: false,
        last_loss: None,
    };
    let life = |name, overlay_entries_max, steps| {
        (name, Script { setting: Setting { overlay_entries_max, ..setting }, steps })
    };
    let bare =
        Abilities { link: false, reflink: false, allocate: false, punch: false, direct: false, ..setting.abilities };
    vec![
        life(
            "killed",
            30,
            vec![
                durable(1, 300),
                eventual(2, 300),
                Step::Kill,
                durable(3, 300),
                eventual(1, 301),
                Step::Kill,
                durable(4, 300),
            ],
        ),
        life(
            "closed",
            30,
            vec![
                durable(1, 300),
                eventual(2, 5000),
                Step::Close(Closed::Nothing),
                durable(3, 300),
                delete(1),
                Step::Close(Closed::Nothing),
                durable(4, 300),
            ],
        ),
        life(
            "large values, killed",
            30,
            vec![durable(1, 20_000), eventual(2, 12_000), Step::Kill, durable(1, 12_000), Step::Kill, durable(4, 300)],
        ),
        life(
            "the index written out",
            1,
            vec![
                durable(1, 300),
                delete(1),
                eventual(2, 300),
                Step::Kill,
                durable(3, 300),
                Step::Kill,
                durable(4, 300),
            ],
        ),
        life(
            "a torn tail",
            30,
            vec![
                durable(1, 300),
                eventual(2, 300),
                eventual(3, 5000),
                eventual(4, 300),
                Step::PowerCut(Loss::OnlyOf(1)),
                durable(5, 300),
                Step::Kill,
                durable(6, 300),
            ],
        ),
        life(
            "compaction",
            3,
            vec![
                durable(1, 7000),
                durable(2, 300),
                durable(1, 300),
                delete(2),
                Step::Compact,
                Step::Kill,
                durable(3, 300),
                Step::Compact,
                Step::Kill,
                durable(4, 300),
            ],
        ),
        life(
            "segments that fill",
            30,
            vec![
                durable(1, 7000),
                durable(2, 7000),
                durable(3, 7000),
                Step::Kill,
                durable(4, 7000),
                Step::Kill,
                durable(5, 300),
            ],
        ),
        life(
            "the index made anew",
            3,
            vec![
                durable(1, 300),
                delete(1),
                durable(2, 5000),
                Step::Close(Closed::RebuildIndex),
                durable(3, 300),
                Step::Kill,
                durable(4, 300),
            ],
        ),
        life(
            "holes, and a backup",
            30,
            vec![
                durable(1, 40_000),
                durable(2, 300),
                durable(1, 300),
                Step::Backup,
                Step::Compact,
                Step::Kill,
                Step::Compact,
                durable(3, 300),
            ],
        ),
        (
            "a file system that can little",
            Script {
                setting: Setting { abilities: bare, ..setting },
                steps: vec![
                    durable(1, 9000),
                    durable(1, 300),
                    Step::Backup,
                    Step::Compact,
                    Step::Kill,
                    eventual(2, 300),
                    Step::Kill,
                    durable(3, 300),
                ],
            },
        ),
        (
            "a cache",
            Script {
                setting: Setting { limit: Limit::EvictsFirst, ..setting },
                steps: vec![
                    durable(1, 20_000),
                    durable(2, 20_000),
                    durable(3, 20_000),
                    Step::Kill,
                    durable(4, 20_000),
                    Step::Kill,
                    durable(5, 300),
                ],
            },
        ),
    ]
}

/// A call that is to be struck: that of a disk, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Struck {
    disk: usize,
    nth: usize,
    op: OpKind,
    kind: FaultKind,
}

impl Struck {
    fn fault(self) -> (usize, Fault) {
        (self.disk, Fault::new(self.kind, self.nth as u64))
    }
}

/// The ways in which calls can be struck so that something is left behind.
fn strikes(calls: &[Vec<OpKind>]) -> impl Iterator<Item = Struck> {
    let of = |op| {
        let changes = !matches!(op, OpKind::Read | OpKind::List | OpKind::Facts | OpKind::Map | OpKind::Lock);
        let kinds = [FaultKind::FailedSync, FaultKind::Eio, FaultKind::EioAfter];
        kinds.into_iter().filter(move |kind| changes && kind.can_strike(op))
    };
    let calls =
        calls.iter().enumerate().flat_map(|(disk, ops)| ops.iter().enumerate().map(move |(nth, &op)| (disk, nth, op)));
    calls.flat_map(move |(disk, nth, op)| of(op).map(move |kind| Struck { disk, nth, op, kind }))
}

/// Plays a life with some calls struck; answers the calls that were made.
fn judge(life: &Script, struck: &[Struck]) -> Result<Vec<Vec<OpKind>>, String> {
    let faults: Vec<_> = struck.iter().map(|struck| struck.fault()).collect();
    let outcome = caught(|| play_struck(life, &faults, &LOSSES));
    outcome.map_err(|wrong| format!("{struck:?}: {wrong}"))
}

/// How much is tried.
#[derive(Debug, Clone, Copy)]
struct Effort {
    /// One in so many pairs that are not two failed syncs.
    every: u64,
    /// How many syncs fail, one after another, at most.
    syncs: usize,
}

/// Tries what may fail behind some failures, of which `calls` were made; adds to `tried` how many those were.
fn try_behind(
    life: &Script,
    before: &[Struck],
    calls: &[Vec<OpKind>],
    effort: Effort,
    tried: &AtomicUsize,
) -> Result<(), String> {
    let Some(last) = before.last() else { return Ok(()) };
    let behind = strikes(calls).filter(|next| (next.disk, next.nth) > (last.disk, last.nth));
    for (number, next) in behind.enumerate() {
        let syncs = before.iter().chain([&next]).all(|struck| struck.kind == FaultKind::FailedSync);
        let in_turn = (number as u64 + last.nth as u64).is_multiple_of(effort.every);
        if !(syncs && before.len() < effort.syncs || before.len() == 1 && in_turn) {
            continue;
        }
        tried.fetch_add(1, Ordering::Relaxed);
        let struck = [before, &[next]].concat();
        // What comes behind depends on what was struck.
        let calls = judge(life, &struck)?;
        if syncs {
            try_behind(life, &struck, &calls, effort, tried)?;
        }
    }
    Ok(())
}

/// Tries every single failure of a life, and what may fail behind it; how many of either there were.
fn try_all(life: &Script, effort: Effort) -> Result<(usize, usize), String> {
    let calls = judge(life, &[]).map_err(|wrong| format!("without a failure: {wrong}"))?;
    let firsts: Vec<Struck> = strikes(&calls).collect();
    let (next, tried) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let wrong: Mutex<Option<String>> = Mutex::new(None);
    let work = || {
        while let Some(&first) = firsts.get(next.fetch_add(1, Ordering::Relaxed)) {
            let outcome = judge(life, &[first]).and_then(|calls| try_behind(life, &[first], &calls, effort, &tried));
            if let Err(what) = outcome {
                wrong.lock().get_or_insert(what);
            }
            if wrong.lock().is_some() {
                return;
            }
        }
    };
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
    wrong.into_inner().map_or(Ok((firsts.len(), tried.into_inner())), Err)
}

fn syncs_that_fail() -> usize {
    number("ALIGHT_FAILED_SYNCS", 2) as usize
}

#[test]
fn failures_one_after_another_lose_nothing_that_was_acknowledged() {
    let started = Instant::now();
    let effort = Effort { every: number("ALIGHT_PAIRS", EVERY).max(1), syncs: syncs_that_fail() };
    let only = std::env::var("ALIGHT_PAIRS_ONLY").ok();
    for (name, life) in lives().iter().filter(|(name, _)| only.as_ref().is_none_or(|only| name == only)) {
        let (firsts, tried) = try_all(life, effort).unwrap_or_else(|wrong| panic!("{name}: {wrong}"));
        assert!(tried > firsts, "{name}: {firsts} and {tried}");
        println!("{name:30} {firsts:4} single failures, {tried:6} more, {:.1} s", started.elapsed().as_secs_f64());
    }
}

/// The first steps of a random script, without what fails in it, and with another opening and commit behind them.
fn random_life(seed: u64) -> Script {
    let mut script = Script::decode(&input(seed));
    script.setting.deadlines = false;
    script.steps.retain(|step| !matches!(step, Step::Fault { .. } | Step::FillUp(_) | Step::Heal));
    script.steps.truncate(RANDOM_STEPS_MAX);
    script.steps.extend([Step::Kill, durable(9, 300)]);
    script
}

#[test]
fn syncs_that_fail_one_after_another_in_random_lives_lose_nothing_either() {
    let started = Instant::now();
    let effort = Effort { every: u64::MAX, syncs: syncs_that_fail() };
    let lives = number("ALIGHT_LIVES", 12);
    let (mut all_firsts, mut all_tried) = (0, 0);
    for seed in 0..lives {
        let life = random_life(seed);
        let (firsts, tried) = try_all(&life, effort).unwrap_or_else(|wrong| panic!("life {seed}: {wrong}\n{life}"));
        (all_firsts, all_tried) = (all_firsts + firsts, all_tried + tried);
    }
    assert!(all_tried as u64 > 20 * lives, "{all_tried}");
    println!(
        "{lives} random lives, {all_firsts} single failures, {all_tried} more, {:.1} s",
        started.elapsed().as_secs_f64()
    );
}
