//! Walks a recorded run from cut to cut, and opens the store on every state that the disk could be in.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use alight::storage::sim::{Choice, CrashWalker, Sabotage, SimStorage, Trace};
use alight::{Error, Store};
use parking_lot::Mutex;

use crate::oracle::{
    Asked, PATH, Promised, check_backups, check_one_thread, check_threads, contents, histories, untimed,
};
use crate::panics::caught;
use crate::rebuild::rebuilt_keys;

/// How many random states are drawn at each cut where nothing else is said.
const RANDOM_PER_CUT: u64 = 1000;

/// How many threads look at states.
const LOOKERS: usize = 2;

/// A run of a workload: what was asked, and what it made of the disk.
pub(crate) struct Run {
    pub name: &'static str,
    pub trace: Trace,
    pub asked: Asked,
    pub threads: bool,
    sim: SimStorage,
}

impl Run {
    /// Lets the disk break promises: those that a crash of this run finds it in are others from here on.
    pub(crate) fn sabotage(&mut self, sabotage: Sabotage) {
        self.sim.set_sabotage(sabotage);
        self.trace = self.sim.trace();
    }
}

/// What a look does to a state of the disk before the store is opened on it.
pub(crate) type Alter<'a> = dyn Fn(&SimStorage) + Sync + 'a;

/// How closely to look.
pub(crate) struct Look<'a> {
    /// Random states at each cut.
    pub random: u64,
    /// Only what singles out the changes of the last call, or loses one earlier change.
    pub fresh_only: bool,
    /// Of every so many states, one whose recovery is cut off at every call too.
    pub deeper_every: u64,
    /// How many events to pass before the first cut.
    pub from: usize,
    pub alter: &'a Alter<'a>,
}

impl Look<'_> {
    /// As closely as the time for tests allows.
    fn close() -> Self {
        let random = number("ALIGHT_CRASH_RANDOM").unwrap_or(RANDOM_PER_CUT);
        Self { random, fresh_only: false, deeper_every: 40, from: 0, alter: &|_| {} }
    }

    /// Few states at each cut: enough to see a store that is broken.
    pub(crate) fn quick() -> Self {
        Self { random: 12, fresh_only: true, deeper_every: 500, from: 0, alter: &|_| {} }
    }

    fn choices(&self, walker: &CrashWalker, seed: u64) -> Vec<Choice> {
        let mut choices = if self.fresh_only { walker.fresh_choices() } else { walker.choices() };
        if self.fresh_only {
            let in_doubt = walker.pending().iter().enumerate().filter(|(_, change)| change.in_doubt());
            choices.extend(in_doubt.map(|(op, _)| Choice::DropOne(op)));
        }
        choices.extend((0..self.random).map(|n| Choice::Random(seed + n)));
        choices
    }
}

/// What a look at all states of a run came to.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub states: u64,
    pub repeated: u64,
    pub deeper: u64,
    pub cuts: u64,
    pub violation: Option<String>,
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

/// Looks at the states of a run; ends at the first violation.
pub(crate) fn look(run: &Run, closely: &Look<'_>) -> Tally {
    let seed = number("ALIGHT_CRASH_SEED").unwrap_or(1);
    let judge = Judge::new(run, closely.deeper_every);
    let seen = Mutex::new(HashSet::new());
    let violation = Mutex::new(None);
    let (states, repeated, deeper, cuts) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for looker in 0..LOOKERS {
            let (judge, seen, violation) = (&judge, &seen, &violation);
            let (states, repeated, deeper, cuts) = (&states, &repeated, &deeper, &cuts);
            scope.spawn(move || {
                let mut walker = run.trace.walk_to(closely.from);
                let mut cut = 0;
                while walker.next_cut() {
                    cut += 1;
                    if cut % LOOKERS != looker {
                        continue;
                    }
                    cuts.fetch_add(1, Ordering::Relaxed);
                    let promised = Promised::by(walker.markers());
                    for choice in closely.choices(&walker, seed) {
                        let state = walker.materialize(&choice);
                        (closely.alter)(&state);
                        // The same disk with the same promises needs one look.
                        if !seen.lock().insert((state.fingerprint(), walker.markers().len())) {
                            repeated.fetch_add(1, Ordering::Relaxed);
                            continue;
                        }
                        let nth = states.fetch_add(1, Ordering::Relaxed);
                        let outcome = judge.judge_or_catch(&state, &promised, nth).map(|more| {
                            deeper.fetch_add(more, Ordering::Relaxed);
                        });
                        if let Err(wrong) = outcome {
                            let told = tell(run, &walker, &choice, seed, &wrong);
                            violation.lock().get_or_insert(told);
                        }
                        if violation.lock().is_some() {
                            return;
                        }
                    }
                }
            });
        }
    });
    Tally {
        states: states.into_inner() + deeper.load(Ordering::Relaxed),
        repeated: repeated.into_inner(),
        deeper: deeper.into_inner(),
        cuts: cuts.into_inner(),
        violation: violation.into_inner(),
    }
}

fn tell(run: &Run, walker: &CrashWalker, choice: &Choice, seed: u64, wrong: &str) -> String {
    format!(
        "workload {}, ALIGHT_CRASH_SEED={seed}, event {}: {wrong}\n{}",
        run.name,
        walker.position(),
        walker.explain(choice)
    )
}

/// Knows what may be on the disk after a run that was cut off.
struct Judge<'a> {
    run: &'a Run,
    histories: Vec<crate::oracle::Contents>,
    deeper_every: u64,
}

impl<'a> Judge<'a> {
    fn new(run: &'a Run, deeper_every: u64) -> Self {
        let threads = run.asked.threads.lock();
        let histories = histories(threads.get(&0).map_or(&[], Vec::as_slice));
        Self { run, histories, deeper_every }
    }

    /// [`judge`](Self::judge), to which a panic of the store is a violation like others.
    fn judge_or_catch(&self, state: &SimStorage, promised: &Promised, nth: u64) -> Result<u64, String> {
        caught(|| self.judge(state, promised, nth))
    }

    /// Opens the store on a state and compares it with the promises. Of some states also: recovers with the power cut
    /// again during recovery, and goes on writing afterwards. Returns how many deeper states were looked at.
    fn judge(&self, state: &SimStorage, promised: &Promised, nth: u64) -> Result<u64, String> {
        let untouched = state.clone_disk();
        check_backups(state, &self.histories, promised)?;
        match untimed(state).open(PATH) {
            Ok(store) => self.check(&store, promised)?,
            Err(Error::NotAStore { .. } | Error::Io { .. }) if !promised.created => return Ok(0),
            Err(error) => return Err(format!("the store does not open: {error}")),
        }
        if nth.is_multiple_of(7) {
            self.goes_on(state, promised)?;
        }
        if nth.is_multiple_of(self.deeper_every) { self.recovery_may_crash(&untouched, promised, nth) } else { Ok(0) }
    }

    fn check(&self, store: &Store, promised: &Promised) -> Result<(), String> {
        if self.run.threads {
            check_threads(store, &self.run.asked.threads.lock(), promised)
        } else {
            check_one_thread(store, &self.histories, promised)
        }
    }

    /// A recovered store takes commits, keeps them over a further opening, and is sound.
    fn goes_on(&self, state: &SimStorage, promised: &Promised) -> Result<(), String> {
        let failed = |what: &'static str| move |error: Error| format!("after recovery, {what}: {error}");
        let store = untimed(state).open(PATH).map_err(failed("a second open"))?;
        self.check(&store, promised)?;
        let mut expected = contents(&store).map_err(failed("a read"))?;
        for n in 0..9u8 {
            let (key, value) = (vec![b'z', n], vec![n ^ 0x5A; 1 + usize::from(n) * 1500]);
            store.put(&key, &value).map_err(failed("a put"))?;
            expected.insert(key, value);
        }
        store.close().map_err(failed("close"))?;
        if rebuilt_keys(state) != expected.keys().cloned().collect::<Vec<_>>() {
            return Err("after recovery and more commits, the segments alone give other keys".into());
        }
        let store = untimed(state).open(PATH).map_err(failed("an open after more commits"))?;
        if contents(&store).map_err(failed("a read after more commits"))? != expected {
            return Err("after recovery and more commits, the contents are wrong".into());
        }
        let report = store.verify(|_| {}).map_err(failed("verify"))?;
        if report.is_sound() { Ok(()) } else { Err(format!("after recovery, verify finds {:?}", report.damages)) }
    }

    /// Recovery itself is cut off at every call, and what it leaves is recovered.
    fn recovery_may_crash(&self, state: &SimStorage, promised: &Promised, nth: u64) -> Result<u64, String> {
        state.start_recording();
        let store = untimed(state).open(PATH).map_err(|error| format!("the store does not open: {error}"))?;
        // Further promises: a commit on the recovered store.
        let last = store.stat().map_err(|error| error.to_string())?.last_commit;
        store.put("zz", b"after recovery").map_err(|error| format!("a put after recovery: {error}"))?;
        state.marker(1);
        store.abandon();
        let mut walker = state.trace().walk();
        let mut looked = 0;
        while walker.next_cut() {
            let choices = walker.fresh_choices().into_iter().chain((0..4).map(|n| Choice::Random(nth * 4 + n)));
            for choice in choices {
                let after = walker.materialize(&choice);
                looked += 1;
                let wrong =
                    |what: String| format!("power cut again during recovery: {what}\n{}", walker.explain(&choice));
                let store = untimed(&after).open(PATH).map_err(|error| wrong(format!("it does not open: {error}")))?;
                let now = store.stat().map_err(|error| wrong(error.to_string()))?.last_commit;
                if store.contains("zz").map_err(|error| wrong(error.to_string()))? {
                    if now != last + 1 {
                        return Err(wrong(format!("commit {now} instead of {}", last + 1)));
                    }
                    let store_without = store;
                    store_without.delete("zz").map_err(|error| wrong(error.to_string()))?;
                    let found = contents(&store_without).map_err(|error| wrong(error.to_string()))?;
                    if !self.run.threads && found != self.histories[last as usize] {
                        return Err(wrong("the contents are wrong".into()));
                    }
                } else if !walker.markers().is_empty() {
                    return Err(wrong("a durable commit on the recovered store is lost".into()));
                } else {
                    self.check(&store, promised).map_err(wrong)?;
                }
            }
        }
        Ok(looked)
    }
}

/// Runs a workload on a fresh disk and writes down its calls.
pub(crate) fn record(name: &'static str, threads: bool, work: impl FnOnce(&SimStorage, &Asked)) -> Run {
    record_on(SimStorage::new(), name, threads, work)
}

/// [`record`], on a disk that was prepared.
pub(crate) fn record_on(
    sim: SimStorage,
    name: &'static str,
    threads: bool,
    work: impl FnOnce(&SimStorage, &Asked),
) -> Run {
    let asked = Asked::default();
    work(&sim, &asked);
    Run { name, trace: sim.trace(), asked, threads, sim }
}

/// Looks at a run and fails on a violation; says how many states it saw.
pub(crate) fn expect_sound(run: &Run) -> u64 {
    if std::env::var("ALIGHT_CRASH_ONLY").is_ok_and(|only| only != run.name) {
        return 0;
    }
    let started = Instant::now();
    let tally = look(run, &Look::close());
    println!(
        "{:28} {:7} states ({} during recovery) at {} cuts of {} events, {} met before, {:.1} s",
        run.name,
        tally.states,
        tally.deeper,
        tally.cuts,
        run.trace.len(),
        tally.repeated,
        started.elapsed().as_secs_f64()
    );
    if let Some(violation) = tally.violation {
        panic!("{violation}");
    }
    tally.states
}
