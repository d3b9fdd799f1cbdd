//! Every call of the disk fails, one at a time and from then on, in every way that it can: whatever a store did before,
//! nothing that was acknowledged is lost, nothing hangs, nothing panics, and no success is reported that is none.
//!
//! `ALIGHT_FAULTS_STEP=N` strikes every Nth call instead of each; `ALIGHT_FAULTS_ONLY=SCRIPT` runs one script.

#[path = "../common/mod.rs"]
mod common;

mod index;
mod room;
mod run;
mod scripts;
mod syncs;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use alight::storage::sim::{Choice, Fault, FaultKind, SimStorage};
use alight::{Durability, Error, Maintenance};
use common::model::{Commit, Model, make};
use common::panics::caught;
use common::tiny::{contents, tiny_on as options};
use parking_lot::Mutex;
use run::{Often, Struck, Tally, run};
use scripts::{put, scripts};

const PATH: &str = "/store";

/// How long one run may take before it counts as hanging: thousands of times as long as it should.
const PATIENCE: Duration = Duration::from_secs(60);

/// Fails the process when `work` does not say often enough that it goes on.
fn watched<T: Send>(work: impl FnOnce(&dyn Fn(String)) -> T + Send) -> T {
    let (say, heard) = mpsc::channel::<String>();
    std::thread::scope(|scope| {
        let worker = scope.spawn(move || work(&|what| drop(say.send(what))));
        let mut last = String::new();
        loop {
            match heard.recv_timeout(PATIENCE) {
                Ok(what) => last = what,
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    eprintln!("hangs: {last}");
                    std::process::abort();
                }
            }
        }
        worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

#[test]
fn whatever_call_fails_in_whatever_way_nothing_acknowledged_is_lost() {
    let started = Instant::now();
    let step = std::env::var("ALIGHT_FAULTS_STEP").ok().and_then(|step| step.parse().ok()).unwrap_or(1);
    let only = std::env::var("ALIGHT_FAULTS_ONLY").ok();
    let tally = Mutex::new(Tally::default());
    for script in scripts().iter().filter(|script| only.as_ref().is_none_or(|only| script.name == only)) {
        let ops = run(script, None, &tally).unwrap_or_else(|wrong| panic!("{}, without a fault: {wrong}", script.name));
        let mut jobs = Vec::new();
        for (nth, &op) in ops.iter().enumerate().step_by(step) {
            for kind in FaultKind::ALL.into_iter().filter(|kind| kind.can_strike(op)) {
                // No system interrupts every call for ever, and who waits for that may wait for ever.
                let often = if kind == FaultKind::Eintr { Often::Thrice } else { Often::FromThenOn };
                jobs.extend([Often::Once, often].map(|often| Struck { kind, nth: nth as u64, often }));
            }
        }
        let next = AtomicUsize::new(0);
        let wrong: Mutex<Option<String>> = Mutex::new(None);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    watched(|say| {
                        while let Some(&job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                            let Struck { kind, nth, often } = job;
                            let op = ops[nth as usize];
                            let told = format!("{}: {kind:?} of call {nth} ({op}), {often:?}", script.name);
                            say(told.clone());
                            let outcome = caught(|| run(script, Some(job), &tally));
                            if let Err(what) = outcome {
                                wrong.lock().get_or_insert(format!("{told}: {what}"));
                            }
                            if wrong.lock().is_some() {
                                return;
                            }
                        }
                    });
                });
            }
        });
        println!("{:50} {:5} calls, {:6} faults", script.name, ops.len(), jobs.len());
        if let Some(wrong) = wrong.into_inner() {
            panic!("{wrong}");
        }
    }
    println!("{:.1} s: {:?}", started.elapsed().as_secs_f64(), tally.into_inner());
}

/// Threads that commit beside each other, and beside the flush of the index, while a call fails: calls come in another
/// order each time, so what is struck differs from run to run; what must hold does not.
#[test]
fn threads_that_share_a_failure_lose_nothing_that_was_acknowledged() {
    let started = Instant::now();
    let (mut runs, mut acknowledged, mut failed, mut states) = (0, 0, 0, 0);
    watched(|say| {
        for kind in [FaultKind::Eio, FaultKind::EioAfter, FaultKind::Enospc, FaultKind::FailedSync, FaultKind::Short] {
            for nth in (13..160).step_by(3) {
                for from_then_on in [false, true] {
                    say(format!("{kind:?} from call {nth} on: {from_then_on}"));
                    let sim = SimStorage::new();
                    let store = options(&sim).maintenance(Maintenance::Background).create_new(true).open(PATH).unwrap();
                    let fault = Fault::new(kind, nth);
                    sim.inject(if from_then_on { fault.from_then_on() } else { fault });
                    let answers: Vec<(Commit, bool)> = std::thread::scope(|scope| {
                        let threads: Vec<_> = (0..3u64)
                            .map(|thread| {
                                scope.spawn({
                                    let store = &store;
                                    move || {
                                        (0..8u64)
                                            .map(|n| {
                                                let (key, len) =
                                                    (thread * 100 + n, [300, 4000, 9000, 100][(n % 4) as usize]);
                                                let commit = vec![put(key, key, len), put(key + 50, key, 40)];
                                                let answer = make(store, &commit, Durability::Immediate);
                                                if let Err(Error::Io { .. } | Error::WritesRefused { .. }) | Ok(()) =
                                                    &answer
                                                {
                                                    return (commit, answer.is_ok());
                                                }
                                                panic!("{kind:?} of call {nth}: {answer:?}")
                                            })
                                            .collect::<Vec<_>>()
                                    }
                                })
                            })
                            .collect();
                        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
                    });
                    sim.clear_faults();
                    let (good, bad): (Vec<_>, Vec<_>) =
                        answers.into_iter().partition(|(_, acknowledged)| *acknowledged);
                    let good = Model::contents(good.iter().map(|(commit, _)| commit));
                    let bad = Model::contents(bad.iter().map(|(commit, _)| commit));
                    let told = format!("{kind:?} of call {nth}, from then on: {from_then_on}");
                    assert_eq!(contents(&store).unwrap(), good, "{told}: what is visible is what was acknowledged");
                    store.abandon();
                    let holds = |sim: &SimStorage, what: &str| {
                        let store = options(sim).open(PATH).unwrap_or_else(|error| panic!("{told}, {what}: {error}"));
                        let found = contents(&store).unwrap();
                        assert!(good.iter().all(|(key, value)| found.get(key) == Some(value)), "{told}, {what}: lost");
                        let others = found.iter().filter(|(key, _)| !good.contains_key(*key));
                        assert!(others.into_iter().all(|(key, value)| bad.get(key) == Some(value)), "{told}, {what}");
                        store.abandon();
                    };
                    let trace = sim.trace();
                    let walker = trace.walk_to(trace.len());
                    for choice in [Choice::None, Choice::All].into_iter().chain((0..4).map(Choice::Random)) {
                        holds(&walker.materialize(&choice), &walker.explain(&choice));
                        states += 1;
                    }
                    holds(&sim, "with no power cut");
                    runs += 1;
                    acknowledged += good.len() / 2;
                    failed += bad.len() / 2;
                }
            }
        }
    });
    println!(
        "{runs} runs of three threads, {acknowledged} commits acknowledged, {failed} failed, {states} power cuts, {:.1} s",
        started.elapsed().as_secs_f64()
    );
}
