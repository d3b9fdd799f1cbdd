//! Walks a recorded run from cut to cut, and opens the store on every state that the disk could be in.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use alight::storage::sim::{Choice, CrashWalker, SimStorage, Trace};
use alight::{Error, Store};
use parking_lot::Mutex;

use crate::oracle::{Asked, PATH, Promised, check_one_thread, check_threads, contents, histories, tiny};

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

/// Looks at every state of a run; ends at the first violation.
pub(crate) fn look(run: &Run) -> Tally {
    let random = number("ALIGHT_CRASH_RANDOM").unwrap_or(RANDOM_PER_CUT);
    let seed = number("ALIGHT_CRASH_SEED").unwrap_or(1);
    let judge = Judge::new(run);
    let seen = Mutex::new(HashSet::new());
    let violation = Mutex::new(None);
    let (states, repeated, deeper, cuts) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for looker in 0..LOOKERS {
            let (judge, seen, violation) = (&judge, &seen, &violation);
            let (states, repeated, deeper, cuts) = (&states, &repeated, &deeper, &cuts);
            scope.spawn(move || {
                let mut walker = run.trace.walk();
                let mut cut = 0;
                while walker.next_cut() {
                    cut += 1;
                    if cut % LOOKERS != looker {
                        continue;
                    }
                    cuts.fetch_add(1, Ordering::Relaxed);
                    let promised = Promised::by(walker.markers());
                    let choices = walker.choices().into_iter().chain((0..random).map(|n| Choice::Random(seed + n)));
                    for choice in choices {
                        let state = walker.materialize(&choice);
                        // The same disk with the same promises needs one look.
                        if !seen.lock().insert((state.fingerprint(), walker.markers().len())) {
                            repeated.fetch_add(1, Ordering::Relaxed);
                            continue;
                        }
                        let nth = states.fetch_add(1, Ordering::Relaxed);
                        let outcome = judge.judge(&state, &promised, nth).map(|more| {
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
}

impl<'a> Judge<'a> {
    fn new(run: &'a Run) -> Self {
        let threads = run.asked.threads.lock();
        let histories = histories(threads.get(&0).map_or(&[], Vec::as_slice));
        Self { run, histories }
    }

    /// Opens the store on a state and compares it with the promises. Of some states also: recovers with the power cut
    /// again during recovery, and goes on writing afterwards. Returns how many deeper states were looked at.
    fn judge(&self, state: &SimStorage, promised: &Promised, nth: u64) -> Result<u64, String> {
        let untouched = state.clone_disk();
        match tiny(state).open(PATH) {
            Ok(store) => self.check(&store, promised)?,
            Err(Error::NotAStore { .. } | Error::Io { .. }) if !promised.created => return Ok(0),
            Err(error) => return Err(format!("the store does not open: {error}")),
        }
        if nth % 7 == 0 {
            self.goes_on(state, promised)?;
        }
        if nth % 40 == 0 { self.recovery_may_crash(&untouched, promised, nth) } else { Ok(0) }
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
        let store = tiny(state).open(PATH).map_err(failed("a second open"))?;
        self.check(&store, promised)?;
        let mut expected = contents(&store).map_err(failed("a read"))?;
        for n in 0..9u8 {
            let (key, value) = (vec![b'z', n], vec![n ^ 0x5A; 1 + usize::from(n) * 1500]);
            store.put(&key, &value).map_err(failed("a put"))?;
            expected.insert(key, value);
        }
        store.close().map_err(failed("close"))?;
        let store = tiny(state).open(PATH).map_err(failed("an open after more commits"))?;
        if contents(&store).map_err(failed("a read after more commits"))? != expected {
            return Err("after recovery and more commits, the contents are wrong".into());
        }
        let report = store.verify(|_| {}).map_err(failed("verify"))?;
        if report.is_sound() { Ok(()) } else { Err(format!("after recovery, verify finds {:?}", report.damages)) }
    }

    /// Recovery itself is cut off at every call, and what it leaves is recovered.
    fn recovery_may_crash(&self, state: &SimStorage, promised: &Promised, nth: u64) -> Result<u64, String> {
        state.start_recording();
        let store = tiny(state).open(PATH).map_err(|error| format!("the store does not open: {error}"))?;
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
                let store = tiny(&after).open(PATH).map_err(|error| wrong(format!("it does not open: {error}")))?;
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
    Run { name, trace: sim.trace(), asked, threads }
}

/// Looks at a run and fails on a violation; says how many states it saw.
pub(crate) fn expect_sound(run: &Run) -> u64 {
    if std::env::var("ALIGHT_CRASH_ONLY").is_ok_and(|only| only != run.name) {
        return 0;
    }
    let started = Instant::now();
    let tally = look(run);
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
