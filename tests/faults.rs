//! Every call of the disk fails, one at a time and from then on, in every way that it can: whatever a store did before,
//! nothing that was acknowledged is lost, nothing hangs, nothing panics, and no success is reported that is none.
//!
//! `ALIGHT_FAULTS_STEP=N` strikes every Nth call instead of each; `ALIGHT_FAULTS_ONLY=SCRIPT` runs one script.

mod common;

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use alight::storage::Storage;
use alight::storage::sim::{Abilities, Choice, Event, Fault, FaultKind, OpKind, SimStorage};
use alight::{CompactOptions, Durability, Error, Eviction, Maintenance, Store};
use common::bytes;
use common::model::{Commit, Model, differ, make};
use common::strikes::Strikes;
use common::tiny::{Contents, contents, sound, tiny_on as options};
use parking_lot::Mutex;

const PATH: &str = "/store";

/// One step of a script.
#[derive(Debug, Clone)]
enum Step {
    Commit(Commit, Durability),
    Sync,
    /// Closes the store and opens it again.
    Close,
    /// Lets go of the store as a killed process does, and opens it again.
    Kill,
    /// Makes a backup, and opens it.
    Backup(&'static str),
    /// Reads, lists, measures and verifies.
    Read,
    /// Gives back all the space that can be.
    Compact,
}

fn put(key: u64, seed: u64, len: usize) -> (Vec<u8>, Option<Vec<u8>>) {
    (format!("k{key}").into_bytes(), Some(bytes(seed, len)))
}

fn delete(key: u64) -> (Vec<u8>, Option<Vec<u8>>) {
    (format!("k{key}").into_bytes(), None)
}

fn durable(commit: Commit) -> Step {
    Step::Commit(commit, Durability::Immediate)
}

fn eventual(commit: Commit) -> Step {
    Step::Commit(commit, Durability::Eventual)
}

/// A script, and whether it begins with a torn tail.
struct Script {
    name: &'static str,
    torn: bool,
    steps: Vec<Step>,
}

fn scripts() -> Vec<Script> {
    let script = |name, steps| Script { name, torn: false, steps };
    vec![
        script("puts", (0..4).map(|n| durable(vec![put(n, n, 300 + 1500 * n as usize)])).chain([Step::Read]).collect()),
        script(
            "batches and deletes, and the index written out",
            (0..5)
                .map(|n| durable(vec![put(n, n, 400), put(n + 3, n + 9, 5000), delete(n + 1)]))
                .chain([Step::Read, durable(vec![delete(2)])])
                .collect(),
        ),
        script(
            "large values",
            vec![
                durable(vec![put(1, 1, 9000)]),
                durable(vec![put(2, 2, 400), put(3, 3, 20_000)]),
                durable(vec![put(1, 4, 12_000), delete(2)]),
                Step::Read,
                durable(vec![put(4, 5, 100)]),
            ],
        ),
        script("segments that fill", (0..9).map(|n| durable(vec![put(n % 4, n, 7000)])).chain([Step::Read]).collect()),
        script(
            "index runs that are merged",
            (0..6).map(|n| durable((0..5).map(|i| put((n * 5 + i * 3) % 13, n * 5 + i, 30)).collect())).collect(),
        ),
        script(
            "eventual commits",
            vec![
                eventual(vec![put(1, 1, 500)]),
                eventual(vec![put(2, 2, 9000)]),
                durable(vec![put(3, 3, 500)]),
                eventual(vec![put(1, 4, 20_000)]),
                eventual(vec![delete(2)]),
                Step::Sync,
                eventual(vec![put(5, 5, 500)]),
                Step::Read,
            ],
        ),
        script(
            "close and open",
            (0..3)
                .flat_map(|n| [durable(vec![put(n, n, 600)]), eventual(vec![put(n + 1, n + 9, 9000)]), Step::Close])
                .chain([durable(vec![delete(1)]), Step::Read])
                .collect(),
        ),
        script(
            "killed and opened",
            (0..4)
                .flat_map(|n| [durable(vec![put(n, n, 600)]), eventual(vec![put(n + 1, n + 9, 9000)]), Step::Kill])
                .chain([durable(vec![delete(1)]), Step::Read])
                .collect(),
        ),
        script(
            "compaction",
            (0..7)
                .map(|n| durable(vec![put(n % 2, n, 4000), put(10 + n, n, 300)]))
                .chain([durable(vec![delete(10), delete(11), put(3, 30, 20_000)]), durable(vec![delete(3)])])
                .chain([
                    Step::Compact,
                    Step::Read,
                    durable(vec![put(1, 40, 500), delete(12)]),
                    Step::Compact,
                    Step::Read,
                ])
                .collect(),
        ),
        script(
            "holes in segments that stay, and a kill",
            (0..3)
                .map(|n| durable(vec![put(0, n, 40_000), put(10 + n, n, 300)]))
                .chain([Step::Compact, Step::Kill, durable(vec![delete(0)]), Step::Compact, Step::Close, Step::Read])
                .collect(),
        ),
        script(
            "backups of a store that goes on",
            vec![
                durable(vec![put(1, 1, 40_000), put(2, 2, 300)]),
                durable(vec![put(1, 3, 40_000), delete(2)]),
                eventual(vec![put(3, 3, 700)]),
                Step::Backup("/backup1"),
                durable(vec![put(1, 4, 9000), put(4, 4, 300)]),
                Step::Compact,
                Step::Backup("/backup2"),
                Step::Kill,
                durable(vec![delete(1)]),
                Step::Read,
            ],
        ),
        Script {
            name: "a torn tail",
            torn: true,
            steps: vec![Step::Read, durable(vec![put(9, 9, 600)]), durable(vec![put(8, 8, 9000)]), Step::Close],
        },
    ]
}

/// Which call is struck, and how.
#[derive(Debug, Clone, Copy)]
struct Struck {
    kind: FaultKind,
    nth: u64,
    often: Often,
}

/// How often calls are struck.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Often {
    Once,
    Thrice,
    FromThenOn,
}

/// One run of a script with one fault.
struct Run<'a> {
    sim: SimStorage,
    script: &'a Script,
    model: Model,
    store: Option<Store>,
    strikes: Strikes,
    failed_commits: u64,
}

/// What the runs came to, together.
#[derive(Debug, Default)]
struct Tally {
    runs: u64,
    struck: u64,
    refused: u64,
    failed_commits: u64,
    crash_states: u64,
}

impl Run<'_> {
    /// Makes a step; whether the script goes on.
    fn step(&mut self, step: &Step) -> Result<bool, String> {
        let store = self.store.as_ref().expect("the script ends when there is none");
        match step {
            Step::Commit(commit, durability) => {
                let answer = make(store, commit, *durability);
                let refused_before = self.strikes.must_refuse;
                let syncs = self.strikes.look(&self.sim, PATH);
                match answer {
                    Ok(()) if refused_before => return Err("a commit was taken after a failed sync".into()),
                    Ok(()) => {
                        // A sync that failed afterwards, for the index, does not undo this.
                        self.model.accept(commit.clone(), *durability);
                    }
                    // It did not get as far as the disk.
                    Err(Error::WritesRefused { .. }) if !syncs => {}
                    Err(Error::Io { .. } | Error::WritesRefused { .. } | Error::Damaged(_)) => {
                        self.model.failed.push(commit.clone());
                        self.failed_commits += 1;
                    }
                    Err(error) => return Err(format!("a commit fails with an error of no fitting kind: {error:?}")),
                }
            }
            Step::Sync => {
                let answer = store.sync();
                let refused_before = self.strikes.must_refuse;
                self.strikes.look(&self.sim, PATH);
                match answer {
                    // It may say so where everything was durable before.
                    Ok(()) if refused_before && self.model.durable < self.model.accepted.len() => {
                        return Err("a sync succeeds after a failed one".into());
                    }
                    Ok(()) => self.model.all_durable(),
                    Err(Error::Io { .. } | Error::WritesRefused { .. }) => {}
                    Err(error) => return Err(format!("a sync fails with an error of no fitting kind: {error:?}")),
                }
            }
            Step::Close => {
                let answer = self.store.take().map(Store::close);
                let refused_before = self.strikes.must_refuse;
                self.strikes.look(&self.sim, PATH);
                match answer {
                    Some(Ok(())) if refused_before => return Err("a close succeeds after a failed sync".into()),
                    Some(Ok(())) => {
                        self.model.all_durable();
                        self.model.failed.clear();
                    }
                    _ => {}
                }
                return self.open_again();
            }
            Step::Kill => {
                if let Some(store) = self.store.take() {
                    store.abandon();
                }
                return self.open_again();
            }
            Step::Compact => {
                let answer = store.compact(&CompactOptions::default(), |_| {});
                let last = store.snapshot().last_commit() as usize;
                let refused_before = self.strikes.must_refuse;
                self.strikes.look(&self.sim, PATH);
                self.model.repeat_through(last)?;
                match answer {
                    Ok(_) if refused_before => return Err("a compaction succeeds after a failed sync".into()),
                    Ok(report) if !report.damages.is_empty() => {
                        return Err(format!("compaction finds damage where a call failed: {:?}", report.damages));
                    }
                    Ok(_) => {}
                    // One that failed may come to light later.
                    Err(Error::Io { .. } | Error::WritesRefused { .. } | Error::Damaged(_)) => {
                        self.model.failed.push(Commit::new());
                    }
                    Err(error) => {
                        return Err(format!("a compaction fails with an error of no fitting kind: {error:?}"));
                    }
                }
            }
            Step::Backup(path) => {
                let visible = self.model.visible();
                let answer = store.backup(path);
                self.strikes.look(&self.sim, PATH);
                match answer {
                    // After a failed sync too, where everything visible was synced before.
                    Ok(_) => {
                        // A call that is struck now is one of opening it; what it shows is right.
                        if let Ok(backup) = options(&self.sim).read_only(true).open(path)
                            && let Ok(found) = contents(&backup)
                            && found != visible
                        {
                            return Err(format!("in the backup, {}", differ(self.model.accepted.len(), &found)));
                        }
                    }
                    Err(Error::Io { .. } | Error::WritesRefused { .. }) => {}
                    Err(error) => return Err(format!("a backup fails with an error of no fitting kind: {error:?}")),
                }
            }
            Step::Read => {
                // A read that fails says so; one that answers, answers right.
                if let Ok(found) = contents(store)
                    && found != self.model.visible()
                {
                    return Err(differ(self.model.accepted.len(), &found));
                }
                let _ = store.stat();
                if let Ok(report) = store.verify(|_| {})
                    && let Some(damage) =
                        report.damages.iter().find(|damage| !damage.what.contains("it cannot be read"))
                {
                    return Err(format!("verification finds damage where a call failed: {damage}"));
                }
            }
        }
        Ok(true)
    }

    /// Opens the store again; a second time when the first failed. Where that fails too, the script ends.
    fn open_again(&mut self) -> Result<bool, String> {
        for _ in 0..2 {
            match options(&self.sim).open(PATH) {
                Ok(store) => {
                    let fewest = if self.strikes.sync_failed { self.model.durable } else { self.model.accepted.len() };
                    // What fails here is a call that was struck; the answer to the second asking counts.
                    let commits =
                        self.model.check_opened(&store, fewest).or_else(|_| self.model.check_opened(&store, fewest));
                    match commits {
                        Ok(commits) => self.model.begin_again(commits),
                        Err(what) if what.contains("input/output") || what.contains("os error") => {
                            store.abandon();
                            return Ok(false);
                        }
                        Err(what) => return Err(format!("opened again: {what}")),
                    }
                    self.strikes.opened_again(&self.sim, PATH);
                    self.store = Some(store);
                    return Ok(true);
                }
                Err(Error::Io { .. } | Error::WritesRefused { .. }) => {}
                Err(error) => return Err(format!("the store does not open again: {error}")),
            }
        }
        Ok(false)
    }
}

/// A disk on which an earlier crash tore the first of three commits that nobody was told of; and what was there before.
fn torn_disk() -> (SimStorage, Vec<Commit>) {
    let sim = SimStorage::new();
    let store = options(&sim).create_new(true).open(PATH).unwrap();
    let commits: Vec<Commit> = (0..5).map(|n| vec![put(n, n, 3000)]).collect();
    for (n, commit) in commits.iter().enumerate() {
        make(&store, commit, if n < 2 { Durability::Immediate } else { Durability::Eventual }).unwrap();
    }
    store.abandon();
    let mut walker = sim.trace().walk();
    while walker.next_cut() {}
    let of_segment = |path: &std::path::Path| path.extension().is_some_and(|kind| kind == "seg");
    let first = walker.pending().iter().position(|change| change.is_write() && of_segment(change.path())).unwrap();
    (walker.materialize(&Choice::DropOne(first)), commits[..2].to_vec())
}

/// Runs a script with a fault, and looks at what is left: as it is, and as a power cut would leave it.
fn run(script: &Script, fault: Option<Struck>, tally: &Mutex<Tally>) -> Result<Vec<OpKind>, String> {
    let (sim, before) = if script.torn { torn_disk() } else { (SimStorage::new(), Vec::new()) };
    sim.start_recording();
    let mut run = Run {
        sim: sim.clone(),
        script,
        model: Model::default(),
        store: None,
        strikes: Strikes::default(),
        failed_commits: 0,
    };
    run.model.accepted = before;
    run.model.durable = run.model.accepted.len();
    if let Some(Struck { kind, nth, often }) = fault {
        match often {
            Often::Once => sim.inject(Fault::new(kind, nth)),
            Often::Thrice => (nth..nth + 3).for_each(|nth| sim.inject(Fault::new(kind, nth))),
            Often::FromThenOn => sim.inject(Fault::new(kind, nth).from_then_on()),
        }
    }

    let mut goes_on = if script.torn {
        run.open_again()?
    } else {
        match options(&sim).create_new(true).open(PATH) {
            Ok(store) => {
                run.store = Some(store);
                true
            }
            Err(Error::Io { .. } | Error::WritesRefused { .. }) => false,
            Err(error) => return Err(format!("the making of the store fails with {error:?}")),
        }
    };
    let created = goes_on;
    run.strikes.look(&sim, PATH);
    run.strikes.must_refuse &= !goes_on;
    let mut steps = run.script.steps.iter();
    while goes_on && let Some(step) = steps.next() {
        goes_on = run.step(step)?;
    }
    let ops: Vec<OpKind> = sim
        .trace()
        .events()
        .filter_map(|event| if let Event::Call(call) = event { Some(call.op) } else { None })
        .collect();
    let struck = sim.faults_struck();
    sim.clear_faults();

    // The fault is over, and the store that went through it is still open: reads go on, and writes where no sync failed.
    let mut refused = 0;
    if let Some(store) = run.store.take() {
        let found = contents(&store).map_err(|error| format!("reads do not go on: {error}"))?;
        if found != run.model.visible() {
            return Err(format!("in the open store, {}", differ(run.model.accepted.len(), &found)));
        }
        for (n, len) in [(70, 300), (71, 9000)] {
            let probe = vec![put(n, n, len)];
            match make(&store, &probe, Durability::Immediate) {
                Ok(()) if run.strikes.must_refuse => return Err("a commit was taken after a failed sync".into()),
                Ok(()) => run.model.accept(probe, Durability::Immediate),
                Err(Error::WritesRefused { .. }) if run.strikes.may_refuse => refused = 1,
                Err(error) => {
                    return Err(format!("the fault is over, no sync and no cut had failed, and yet: {error}"));
                }
            }
        }
        if fault.is_some_and(|fault| fault.nth.is_multiple_of(2)) {
            match store.close() {
                Ok(()) if run.strikes.must_refuse => return Err("a close succeeds after a failed sync".into()),
                Ok(()) => {
                    run.model.failed.clear();
                    run.model.all_durable();
                }
                Err(Error::WritesRefused { .. }) if refused == 1 => {}
                Err(error) => return Err(format!("the fault is over, and the close fails: {error}")),
            }
        } else {
            store.abandon();
        }
    }
    let mut states = cut_the_power(&sim, &run.model, created)?;

    // Another process opens it, with no reboot in between, and goes on; then the power is cut.
    let store =
        options(&sim).create(true).open(PATH).map_err(|error| format!("with no fault, it does not open: {error}"))?;
    let fewest = if run.strikes.sync_failed { run.model.durable } else { run.model.accepted.len() };
    let commits =
        run.model.check_opened(&store, fewest).map_err(|what| format!("opened again with no fault: {what}"))?;
    run.model.begin_again(commits);
    for (n, len) in [(80, 300), (81, 9000), (82, 20_000), (83, 300)] {
        let more = vec![put(n, n, len)];
        make(&store, &more, Durability::Immediate)
            .map_err(|error| format!("with no fault, a commit fails: {error}"))?;
        run.model.accept(more, Durability::Immediate);
    }
    store.abandon();
    states += cut_the_power(&sim, &run.model, true)?;

    let mut tally = tally.lock();
    tally.runs += 1;
    tally.struck += u64::from(struck > 0);
    tally.refused += refused;
    tally.failed_commits += run.failed_commits;
    tally.crash_states += states;
    Ok(ops)
}

/// Opens the store on some of the states that a power cut would leave now.
fn cut_the_power(sim: &SimStorage, model: &Model, created: bool) -> Result<u64, String> {
    let trace = sim.trace();
    let walker = trace.walk_to(trace.len());
    let lost = (0..walker.pending().len()).map(Choice::DropOne);
    let choices = [Choice::None, Choice::All].into_iter().chain((0..6).map(Choice::Random)).chain(lost.take(12));
    let mut states = 0;
    for choice in choices {
        let state = walker.materialize(&choice);
        let wrong = |what: String| format!("after a power cut, {what}\n{}", walker.explain(&choice));
        states += 1;
        match options(&state).open(PATH) {
            Ok(store) => drop(model.check_opened(&store, model.durable).map_err(wrong)?),
            Err(Error::NotAStore { .. } | Error::Io { .. }) if !created => {}
            Err(error) => return Err(wrong(format!("the store does not open: {error}"))),
        }
    }
    Ok(states)
}

fn words_of(panic: &(dyn Any + Send)) -> String {
    let words = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    words.unwrap_or("without words").to_owned()
}

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
                            let outcome = catch_unwind(AssertUnwindSafe(|| run(script, Some(job), &tally)))
                                .unwrap_or_else(|panic| Err(format!("a panic: {}", words_of(&*panic))));
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

/// A disk with room for so much more than it holds.
fn with_room(sim: &SimStorage, bytes: u64) {
    sim.set_capacity(None);
    let free = sim.free_bytes(std::path::Path::new("/")).unwrap();
    // What is taken is what is missing from a disk without a limit.
    sim.set_capacity(Some((1 << 50) - free + bytes));
}

#[test]
fn a_full_disk_refuses_commits_and_takes_them_again_when_there_is_room() {
    for maintenance in [Maintenance::Inline, Maintenance::Background] {
        for room in (0..40).map(|n| n * 9000) {
            let sim = SimStorage::new();
            sim.stop_recording();
            let options = || options(&sim).maintenance(maintenance);
            let store = options().create_new(true).open(PATH).unwrap();
            let mut model = Contents::new();
            let mut refused = 0;
            with_room(&sim, room);
            for n in 0..60u64 {
                let (key, value) = put(n % 23, n, [300, 5000, 9000, 20_000][(n % 4) as usize]);
                match store.put(&key, value.as_deref().unwrap()) {
                    Ok(()) => drop(model.insert(key, value.unwrap())),
                    Err(error) if n <= 40 && error.is_no_space() => refused += 1,
                    // The index could not be written out for so long that commits have to wait.
                    Err(Error::WritesRefused { cause })
                        if n <= 40 && cause.contains("the index cannot be written out") =>
                    {
                        refused += 1
                    }
                    Err(error) => panic!("room for {room} bytes, commit {n}: {error}"),
                }
                if n == 40 {
                    assert_eq!(contents(&store).unwrap(), model, "reads go on");
                    sim.set_capacity(None);
                }
                assert!(
                    n <= 40 || store.contains(format!("k{}", n % 23)).unwrap(),
                    "room for {room} bytes, commit {n}"
                );
            }
            assert!(room > 200_000 || refused > 0, "room for {room} bytes");
            assert_eq!(contents(&store).unwrap(), model);
            store.close().unwrap();
            let store = options().open(PATH).unwrap();
            assert_eq!(contents(&store).unwrap(), model);
            assert!(store.verify(|_| {}).unwrap().is_sound());
            store.close().unwrap();
        }
    }
}

/// The story: on a full disk every commit tries to write the index out, and each attempt left its unfinished run behind.
/// What little room there was went to those.
#[test]
fn an_index_that_cannot_be_written_out_leaves_nothing_behind() {
    for (op, kind) in
        [(OpKind::Write, FaultKind::Enospc), (OpKind::Rename, FaultKind::Eio), (OpKind::Map, FaultKind::Eio)]
    {
        let sim = SimStorage::new();
        let store = options(&sim).create_new(true).open(PATH).unwrap();
        sim.inject(Fault::new(kind, 0).on(op).path_ending(".idx.tmp").from_then_on());
        sim.inject(Fault::new(kind, 0).on(op).path_ending(".idx").from_then_on());
        // As many as may gather in memory.
        for n in 0..20 {
            store.put(format!("k{n}"), &bytes(n, 100)).unwrap();
        }
        assert!(store.metrics().index_flush_failures > 5);
        let left: Vec<_> = sim.files().into_iter().filter(|path| path.parent().unwrap().ends_with("index")).collect();
        assert!(left.is_empty(), "{op}: {left:?}");
        sim.clear_faults();
        store.close().unwrap();
        let store = options(&sim).open(PATH).unwrap();
        assert_eq!(store.scan("").count(), 20);
    }
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

/// The states that a power cut would leave now, some of them.
fn power_cuts(sim: &SimStorage) -> impl Iterator<Item = (SimStorage, String)> {
    let trace = sim.trace();
    let walker = trace.walk_to(trace.len());
    let choices = [Choice::None, Choice::All].into_iter().chain((0..60).map(Choice::Random));
    choices.map(move |choice| (walker.materialize(&choice), walker.explain(&choice)))
}

fn eventually(store: &Store, key: u64) -> Result<(), Error> {
    make(store, &vec![put(key, key, 300)], Durability::Eventual)
}

/// The story: a frame could not be written, nor cut off again. The note for the next open named the last commit that a sync
/// had covered, and eventual ones behind it were cut, though no sync had failed and the machine had gone on.
#[test]
fn eventual_commits_outlive_a_process_that_could_not_take_a_frame_back() {
    for kind in [FaultKind::Eio, FaultKind::EioAfter] {
        let sim = SimStorage::new();
        let store = options(&sim).create_new(true).open(PATH).unwrap();
        eventually(&store, 1).unwrap();
        sim.inject(Fault::new(kind, 0).on(OpKind::Write).path_ending(".seg"));
        sim.inject(Fault::new(FaultKind::Eio, 0).on(OpKind::Truncate).path_ending(".seg"));
        eventually(&store, 2).unwrap_err();
        assert!(matches!(eventually(&store, 3), Err(Error::WritesRefused { .. })));
        store.abandon();
        let store = options(&sim).open(PATH).unwrap();
        assert_eq!(contents(&store).unwrap(), Model::contents([&vec![put(1, 1, 300)]]), "{kind:?}");
        store.abandon();
    }
}

/// The story: a process died with eventual commits in the page cache, and the sync of the next one's opening failed. The
/// opening after that believed a second sync, and acknowledged a commit; a power cut took the eventual ones away, and the
/// store was refused as damaged.
#[test]
fn what_an_opening_could_not_sync_the_next_one_does_not_take_for_synced() {
    for on_directory in [false, true] {
        let sim = SimStorage::new();
        let store = options(&sim).create_new(true).open(PATH).unwrap();
        eventually(&store, 1).unwrap();
        store.abandon();
        let (op, path) = if on_directory { (OpKind::SyncDir, PATH) } else { (OpKind::Sync, ".seg") };
        sim.inject(Fault::new(FaultKind::FailedSync, 0).on(op).path_ending(path));
        let refused = options(&sim).open(PATH).unwrap_err();
        assert!(matches!(refused, Error::Io { action: "sync", .. }), "{refused:?}");
        let store = options(&sim).open(PATH).unwrap();
        make(&store, &vec![put(2, 2, 300)], Durability::Immediate).unwrap();
        store.abandon();
        let expected = Model::contents([&vec![put(1, 1, 300)], &vec![put(2, 2, 300)]]);
        every_cut_leaves(&sim, &expected, "");
        let left = |name: &str| sim.files().iter().any(|path| path.to_string_lossy().contains(name));
        assert!(!left("UNSETTLED") && !left(".seg.tmp"), "{:?}", sim.files());
    }
}

/// Whatever a power cut takes away, the store opens and holds what is expected.
fn every_cut_leaves(sim: &SimStorage, expected: &Contents, case: &str) {
    for (state, told) in power_cuts(sim) {
        let store = options(&state).open(PATH).unwrap_or_else(|error| panic!("{case}: {error}\n{told}"));
        assert_eq!(contents(&store).unwrap(), *expected, "{case}: {told}");
        store.abandon();
    }
}

/// The ways in which the name that an opening gave its manifest may not be durable when the opening fails: it had no time to
/// sync it, or the sync failed, after which the kernel takes the name for written and no later sync makes it so. (The first
/// sync of that directory comes before there is a new manifest.)
fn manifest_names_lost() -> [Fault; 3] {
    let sync = |nth| Fault::new(FaultKind::FailedSync, nth).on(OpKind::SyncDir).path_ending(PATH);
    [Fault::new(FaultKind::EioAfter, 0).on(OpKind::Rename).path_ending("MANIFEST"), sync(0), sync(1)]
}

/// The story: an opening heeded the note of a failed sync, and died when its new manifest had its name and that name was not
/// durable. The next one took the note for outlived, and acknowledged a commit; a power cut brought the old manifest back,
/// and the note about it, and the commit was cut. Where it had been the sync of the name that failed, a second sync did not
/// help: it needs another manifest.
#[test]
fn a_note_that_was_outlived_does_not_come_back() {
    for fault in manifest_names_lost() {
        let sim = SimStorage::new();
        let store = options(&sim).create_new(true).open(PATH).unwrap();
        make(&store, &vec![put(1, 1, 300)], Durability::Immediate).unwrap();
        sim.inject(Fault::new(FaultKind::FailedSync, 0).on(OpKind::Sync).path_ending(".seg"));
        make(&store, &vec![put(2, 2, 300)], Durability::Immediate).unwrap_err();
        store.abandon();
        sim.inject(fault.clone());
        options(&sim).open(PATH).unwrap_err();
        let store = options(&sim).open(PATH).unwrap();
        make(&store, &vec![put(3, 3, 300)], Durability::Immediate).unwrap();
        store.abandon();
        let expected = Model::contents([&vec![put(1, 1, 300)], &vec![put(3, 3, 300)]]);
        every_cut_leaves(&sim, &expected, &format!("{fault:?}"));
    }
}

/// The story: an opening cut what a crash had torn, and died when the manifest that says so had its name and that name was
/// not durable. The next one took it for durable and acknowledged commits; a power cut brought the old manifest back, and
/// with it what had been cut, beside commits of the same numbers.
#[test]
fn what_was_cut_does_not_come_back_beside_what_was_committed_since() {
    for fault in manifest_names_lost() {
        let (sim, before) = torn_disk();
        sim.start_recording();
        sim.inject(fault.clone());
        options(&sim).open(PATH).unwrap_err();
        let store = options(&sim).open(PATH).unwrap();
        let after = vec![put(9, 9, 300)];
        make(&store, &after, Durability::Immediate).unwrap();
        store.abandon();
        let expected = Model::contents(before.iter().chain([&after]));
        every_cut_leaves(&sim, &expected, &format!("{fault:?}"));
    }
}

/// The story: the making of a store failed at the sync of a directory, and was begun again in what the first attempt had left.
/// The kernel took its names for written by then, so that the second sync proved nothing: commits were acknowledged, and a
/// power cut took them away with the directory they were in.
#[test]
fn a_store_whose_making_failed_at_a_sync_is_made_anew() {
    let syncs_failing = |nths: &[u64]| {
        let sim = SimStorage::new();
        for &nth in nths {
            sim.inject(Fault::new(FaultKind::FailedSync, nth).on(OpKind::SyncDir));
            let made = options(&sim).create(true).open(PATH);
            let Err(error) = made else { return None };
            assert!(matches!(error, Error::Io { action: "sync", .. }), "{nths:?}: {error:?}");
        }
        let store = options(&sim).create(true).open(PATH).unwrap();
        let commit = vec![put(1, 1, 300), put(2, 2, 9000)];
        make(&store, &commit, Durability::Immediate).unwrap();
        store.abandon();
        every_cut_leaves(&sim, &Model::contents([&commit]), &format!("syncs {nths:?} fail"));
        Some(())
    };
    let syncs = (0..).take_while(|&nth| syncs_failing(&[nth]).is_some()).count() as u64;
    assert!(syncs >= 2, "{syncs} directories are synced while a store is made");
    let mut twice = 0;
    for first in 0..syncs {
        twice += (0..9).filter(|&second| syncs_failing(&[first, second]).is_some()).count();
    }
    assert!(twice as u64 >= syncs, "{twice} times the second attempt failed as well");
}

/// What can't be helped is told: a directory that was there before belongs to whoever made it, and one that can't be removed
/// stays.
#[test]
fn a_directory_that_stays_though_its_name_is_in_doubt_is_told_of() {
    for was_there in [false, true] {
        let sim = SimStorage::new();
        if was_there {
            sim.create_dir(PATH.as_ref()).unwrap();
        } else {
            sim.inject(Fault::new(FaultKind::Eio, 0).on(OpKind::RemoveDir));
        }
        sim.inject(Fault::new(FaultKind::FailedSync, 0).on(OpKind::SyncDir).path_ending("/"));
        let error = options(&sim).create(true).open(PATH).unwrap_err();
        let told = error.to_string();
        assert!(matches!(error, Error::Io { action: "sync", .. }), "{error:?}");
        assert!(told.contains(PATH) && told.contains("remove the directory"), "{told}");
        assert_eq!(sim.list(PATH.as_ref()).unwrap(), [], "nothing was made in it");
    }
}

/// The story: a segment was being made, its sync failed, and it could not be removed again. It held nothing, so the store went
/// on with another one; but the process died, and the next one found a segment without commits, put some there and
/// acknowledged them. A power cut took the header away, or the name, and the commits with it.
#[test]
fn a_segment_that_was_not_made_is_not_used_by_the_next_process() {
    for (op, path) in [(OpKind::Sync, ".seg"), (OpKind::SyncDir, "segments")] {
        let sim = SimStorage::new();
        let store = options(&sim).create_new(true).open(PATH).unwrap();
        sim.inject(Fault::new(FaultKind::FailedSync, 0).on(op).path_ending(path));
        sim.inject(Fault::new(FaultKind::Eio, 0).on(OpKind::Remove).path_ending(".seg"));
        make(&store, &vec![put(1, 1, 300)], Durability::Immediate).unwrap_err();
        store.abandon();
        assert!(sim.has_file(format!("{PATH}/segments/00000001.seg")));
        let store = options(&sim).open(PATH).unwrap();
        make(&store, &vec![put(2, 2, 300)], Durability::Immediate).unwrap();
        store.abandon();
        let expected = Model::contents([&vec![put(2, 2, 300)]]);
        every_cut_leaves(&sim, &expected, &format!("{op}"));
    }
}

/// The story: a rebuilding failed, or died, when its manifest had its name and that name was not durable. The next opening took
/// it for durable, removed the runs of the one before and acknowledged a commit; a power cut brought that one back, or none.
#[test]
fn what_rests_on_a_manifest_that_a_rebuilding_made_outlives_a_power_cut() {
    for fault in manifest_names_lost() {
        for (manifest_is_lost, index_was_written) in [(false, true), (true, true), (true, false)] {
            let told = format!("{fault:?}, {manifest_is_lost}, {index_was_written}");
            let sim = SimStorage::new();
            let store = options(&sim).create_new(true).open(PATH).unwrap();
            make(&store, &vec![put(1, 1, 300)], Durability::Immediate).unwrap();
            if index_was_written {
                store.close().unwrap();
            } else {
                store.abandon();
            }
            if manifest_is_lost {
                sim.remove(format!("{PATH}/MANIFEST").as_ref()).unwrap();
                sim.start_recording();
            }
            sim.inject(fault.clone());
            let _ = options(&sim).rebuild_index(PATH, |_| {});
            sim.clear_faults();
            let store = options(&sim).open(PATH).unwrap();
            make(&store, &vec![put(2, 2, 300)], Durability::Immediate).unwrap();
            // It comes as far as to make the removals durable.
            sim.inject(Fault::new(FaultKind::Eio, 0).on(OpKind::Write).path_ending("MANIFEST.tmp"));
            store.close().unwrap_err();
            let expected = Model::contents([&vec![put(1, 1, 300)], &vec![put(2, 2, 300)]]);
            every_cut_leaves(&sim, &expected, &told);
        }
    }
}

/// What may not be on the disk is copied before it is built on, which takes room. Without any the store opens for reading, and
/// says so.
#[test]
fn without_room_for_copies_a_store_opens_read_only_and_says_what_to_do() {
    for note in ["DISTRUST", "UNSETTLED"] {
        for left in [0, 5000, 30_000] {
            let sim = SimStorage::new();
            let store = options(&sim).create_new(true).open(PATH).unwrap();
            (0..9).for_each(|n| eventually(&store, n).unwrap());
            make(&store, &vec![put(10, 10, 60_000)], Durability::Eventual).unwrap();
            let expected = contents(&store).unwrap();
            store.abandon();
            sim.write_file(format!("{PATH}/{note}"), b"");
            let files = sim.files();
            let told = format!("{note}, {left} bytes left");

            let free = sim.free_bytes("/".as_ref()).unwrap();
            sim.set_capacity(Some((1 << 50) - free + left));
            for _ in 0..2 {
                let refused = options(&sim).open(PATH).unwrap_err();
                assert!(refused.is_no_space(), "{told}: {refused}");
                assert!(
                    refused.to_string().contains("make room and open the store again, or open it read-only"),
                    "{refused}"
                );
                assert_eq!(sim.files(), files, "{told}: nothing is left that takes room");
                let reader = options(&sim).read_only(true).open(PATH).unwrap();
                assert_eq!(contents(&reader).unwrap(), expected, "{told}");
            }
            sim.set_capacity(None);
            let store = options(&sim).open(PATH).unwrap();
            assert_eq!(contents(&store).unwrap(), expected, "{told}");
            assert!(!sim.has_file(format!("{PATH}/{note}")), "{told}");
        }
    }
}

/// The story: looking for something to evict failed half-way. What had been chosen by then was never chosen again, and in
/// the end nothing was left to choose.
#[test]
fn a_failed_look_for_something_to_evict_is_made_anew() {
    for nth in 0..12 {
        let sim = SimStorage::new();
        let options = options(&sim).max_bytes(45_000).eviction(Eviction::Fifo);
        let store = options.create_new(true).open(PATH).unwrap();
        (0..4).for_each(|n| store.put(format!("k{n}"), &bytes(n, 10_000)).unwrap());
        sim.inject(Fault::new(FaultKind::Eio, nth).on(OpKind::Read).path_ending(".seg"));
        let _ = store.put("large", &bytes(9, 40_000));
        sim.clear_faults();
        store.put("all", &bytes(10, 45_000)).unwrap_or_else(|error| panic!("read {nth} failed: {error}"));
        assert_eq!(store.scan("").count(), 1, "read {nth} failed");
    }
}

/// The story: index runs were not mapped, and one could not be read when a commit was published. What the commit's keys had
/// led to was counted as alive for good, and verification called the sound store damaged.
#[test]
fn what_dies_while_the_index_cannot_be_read_is_counted_later() {
    let unread = || Fault::new(FaultKind::Eio, 0).on(OpKind::Read).path_ending(".idx").from_then_on();
    let written = || {
        let sim = SimStorage::new();
        sim.set_abilities(Abilities { map: false, ..Abilities::default() });
        let store = options(&sim).create_new(true).open(PATH).unwrap();
        make(&store, &vec![put(1, 1, 300), put(2, 2, 9000), put(3, 3, 700)], Durability::Immediate).unwrap();
        store.close().unwrap();
        let store = options(&sim).open(PATH).unwrap();
        sim.inject(unread());
        make(&store, &vec![put(1, 4, 500), delete(2)], Durability::Immediate).unwrap();
        (sim, store)
    };
    let live = |store: &Store| store.stat().map(|stat| stat.live_bytes);

    // It is counted by whoever needs it, and who needs it while it cannot be read is told that.
    let (sim, store) = written();
    assert!(matches!(live(&store), Err(Error::Io { action: "read", .. })), "{:?}", live(&store));
    let cannot = |damage: &alight::Damage| damage.what.contains("it cannot be read");
    let report = store.verify(|_| {}).unwrap();
    assert!(!report.is_sound() && report.damages.iter().all(cannot), "{:?}", report.damages);
    assert!(matches!(store.backup("/backup"), Err(Error::Io { .. })));
    sim.clear_faults();
    sound(&store);
    assert_eq!(live(&store).unwrap(), 1200);

    // What is written with the index is right, after a process that died too, whose commits are published anew.
    for dies in [false, true] {
        let (sim, store) = written();
        if dies {
            store.abandon();
        } else {
            assert!(matches!(store.close(), Err(Error::Io { .. })), "no count that is too high is written");
        }
        for read_only in [true, false] {
            // The run's head can be read, and then nothing more.
            let opened = (0..20).find_map(|nth| {
                sim.clear_faults();
                sim.inject(Fault::new(FaultKind::Eio, nth).on(OpKind::Read).path_ending(".idx").from_then_on());
                options(&sim).read_only(read_only).open(PATH).ok()
            });
            let store = opened.unwrap();
            assert!(live(&store).is_err());
            sim.clear_faults();
            sound(&store);
            assert_eq!(live(&store).unwrap(), 1200);
            store.close().unwrap();
        }
        let store = options(&sim).open(PATH).unwrap();
        sound(&store);
        assert_eq!(live(&store).unwrap(), 1200);
    }
}

/// The story: the same, in a store that may hold so many bytes: it was full with what nobody could get any more.
#[test]
fn what_could_not_be_counted_does_not_fill_a_store() {
    let sim = SimStorage::new();
    sim.set_abilities(Abilities { map: false, ..Abilities::default() });
    let options = options(&sim).max_bytes(10_000);
    let store = options.clone().create_new(true).open(PATH).unwrap();
    store.put("k1", &bytes(1, 9000)).unwrap();
    store.close().unwrap();
    let mut counted_later = 0;
    for nth in 0..9 {
        let sim = sim.clone_disk();
        sim.set_abilities(Abilities { map: false, ..Abilities::default() });
        let store = options.clone().storage(Arc::new(sim.clone())).open(PATH).unwrap();
        sim.inject(Fault::new(FaultKind::Eio, nth).on(OpKind::Read).path_ending(".idx").from_then_on());
        let deleted = make(&store, &vec![delete(1)], Durability::Immediate).is_ok();
        counted_later += u32::from(deleted && store.stat().is_err());
        sim.clear_faults();
        assert_eq!(store.put("k2", &bytes(2, 8000)).is_ok(), deleted, "read {nth} failed");
        sound(&store);
    }
    assert!(counted_later > 0);
}
