//! One run of a script with one fault, judged by the model at every step, and at the states that a power cut would leave.

use alight::storage::sim::{Choice, Event, Fault, FaultKind, OpKind, SimStorage};
use alight::{CompactOptions, Durability, Error, Store};
use parking_lot::Mutex;

use crate::PATH;
use crate::common::model::{Commit, Model, differ, make};
use crate::common::strikes::Strikes;
use crate::common::tiny::{contents, tiny_on as options};
use crate::scripts::{Script, Step, put, torn_disk};

/// Which call is struck, and how.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Struck {
    pub(crate) kind: FaultKind,
    pub(crate) nth: u64,
    pub(crate) often: Often,
}

/// How often calls are struck.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Often {
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
pub(crate) struct Tally {
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

/// Runs a script with a fault, and looks at what is left: as it is, and as a power cut would leave it.
pub(crate) fn run(script: &Script, fault: Option<Struck>, tally: &Mutex<Tally>) -> Result<Vec<OpKind>, String> {
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
