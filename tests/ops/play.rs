//! Plays a script on a store over the fault-injecting twin, and judges every answer by a model: what may be visible, what
//! must survive, and which errors fit.
//!
//! # Invariants
//! - An answer that is no error is right, whatever failed before.
//! - An error needs a reason: a call that was struck while it was being answered, or an earlier failure after which the
//!   store may refuse writes.
//! - Everything runs on the caller's thread, so that the same script makes the same calls.

use alight::storage::Storage;
use alight::storage::sim::{Event, Fault, OpKind, Sabotage, SimStorage};
use alight::{CompactOptions, Durability, Error, Eviction, Maintenance, Snapshot, Store, StoreOptions};

use super::ask::{View, ask};
use super::script::{Closed, Limit, Loss, MAX_BYTES, Often, Question, Script, Setting, Step};
use crate::common::bytes;
use crate::common::model::{Commit, Model, differ, make};
use crate::common::strikes::Strikes;
use crate::common::tiny::{Contents, contents, tiny_on};

/// Where the store lies.
const PATH: &str = "/store";

/// How many snapshots are held at most.
const SNAPSHOTS_MAX: usize = 3;

/// How many backups are made at most.
const BACKUPS_MAX: usize = 2;

/// How often an opening is tried while calls fail, before the faults are over.
const OPENINGS_MAX: usize = 3;

/// After so many commits that failed in a row the machine is started again: which of them are there is tried out.
const FAILED_MAX: usize = 5;

/// What a script came to.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tally {
    pub steps: u64,
    pub acknowledged: u64,
    pub failed: u64,
    pub refused: u64,
    pub faults_struck: u64,
    /// Of the disk.
    pub calls: u64,
    pub power_cuts: u64,
    pub opens: u64,
}

/// Another process that reads.
struct Reader {
    store: Store,
    sees: Contents,
    last: usize,
    /// Whether it saw what its writer may take back, or was hit itself: then it may learn that what it sees is no more.
    doubtful: bool,
}

/// A store that is being put through a script.
struct Player {
    sim: SimStorage,
    setting: Setting,
    sabotage: Sabotage,
    model: Model,
    strikes: Strikes,
    store: Option<Store>,
    snapshots: Vec<(Snapshot, Contents)>,
    reader: Option<Reader>,
    backups: Vec<(String, Contents)>,
    /// How many places were used up by backups and repairs.
    places: usize,
    /// Faults to come: on the disk of that number, counted from its first power cut on.
    faults: Vec<(usize, Fault)>,
    /// The calls that each disk answered so far, the current one's aside.
    calls: Vec<Vec<OpKind>>,
    /// How many calls the current one had answered when its faults were armed.
    armed_at: usize,
    /// Calls struck before this step began, or this opening.
    struck_before: u64,
    full: bool,
    tally: Tally,
}

/// Plays a script, on a disk that may break its promises; an error is a promise that the store broke.
///
/// With `ALIGHT_OPS_TRACE` in the environment every call of the disk is printed with it.
pub(crate) fn play(script: &Script, sabotage: &Sabotage) -> Result<Tally, String> {
    let mut player = Player::new(script.setting, sabotage, Vec::new())?;
    let outcome = player.play(script).and_then(|()| player.end());
    if outcome.is_err() {
        print_trace(&player.sim);
    }
    outcome
}

/// Plays a script with faults that strike the calls of its disks, the first one's or those after so many power cuts; ends it with
/// each of some losses. Answers the calls that were made of each disk.
pub(crate) fn play_struck(
    script: &Script,
    faults: &[(usize, Fault)],
    losses: &[Loss],
) -> Result<Vec<Vec<OpKind>>, String> {
    let mut player = Player::new(script.setting, &Sabotage::default(), faults.to_vec())?;
    let outcome = player.play(script).and_then(|()| player.end_in_many_ways(losses));
    if outcome.is_err() {
        print_trace(&player.sim);
    }
    outcome?;
    Ok(player.calls)
}

/// Prints every call of a disk, for who asked for it.
fn print_trace(sim: &SimStorage) {
    if std::env::var_os("ALIGHT_OPS_TRACE").is_some() {
        eprintln!("{}", sim.trace());
    }
}

impl Player {
    fn play(&mut self, script: &Script) -> Result<(), String> {
        for (number, step) in (1..).zip(&script.steps) {
            self.sim.note(format!("step {number}, {step}"));
            self.begin_step();
            self.step(step).map_err(|wrong| format!("step {number}, {step}: {wrong}"))?;
            if self.model.failed.len() >= FAILED_MAX {
                self.begin_step();
                let tried = self.cut_the_power(Loss::Nothing);
                tried.map_err(|wrong| format!("when it went on after step {number}: {wrong}"))?;
            }
        }
        Ok(())
    }

    /// A player of a disk, before anything is on it that the player knows of.
    fn of(sim: SimStorage, setting: Setting, sabotage: &Sabotage, faults: Vec<(usize, Fault)>) -> Self {
        Self {
            sim,
            setting,
            sabotage: sabotage.clone(),
            model: Model::default(),
            strikes: Strikes::default(),
            store: None,
            snapshots: Vec::new(),
            reader: None,
            backups: Vec::new(),
            places: 0,
            faults,
            calls: Vec::new(),
            armed_at: 0,
            struck_before: 0,
            full: false,
            tally: Tally::default(),
        }
    }

    fn new(setting: Setting, sabotage: &Sabotage, faults: Vec<(usize, Fault)>) -> Result<Self, String> {
        let mut player = Self::of(SimStorage::new(), setting, sabotage, faults);
        player.furnish();
        let made =
            player.options().create_new(true).open(PATH).map_err(|error| format!("making the store: {error}"))?;
        player.store = Some(made);
        player.strikes.look(&player.sim, PATH);
        player.arm();
        Ok(player)
    }

    fn options(&self) -> StoreOptions {
        let Setting { overlay_entries_max, segment_bytes, limit, deadlines, .. } = self.setting;
        let mut options = tiny_on(&self.sim);
        if !deadlines {
            options = options.deadline(None).write_deadline(None);
        }
        let options = options
            .maintenance(Maintenance::Inline)
            .overlay_entries_max(overlay_entries_max)
            .segment_bytes(segment_bytes);
        match limit {
            Limit::None => options,
            Limit::Refuses => options.max_bytes(MAX_BYTES),
            Limit::EvictsFirst => options.max_bytes(MAX_BYTES).eviction(Eviction::Fifo),
            Limit::EvictsUnread => options.max_bytes(MAX_BYTES).eviction(Eviction::Lru),
        }
    }

    fn evicts(&self) -> bool {
        matches!(self.setting.limit, Limit::EvictsFirst | Limit::EvictsUnread)
    }

    /// Tells a new disk what it can do, and which promises it breaks.
    fn furnish(&self) {
        self.sim.set_abilities(self.setting.abilities);
        self.sim.set_sabotage(self.sabotage.clone());
    }

    /// Arms the faults that are to strike this disk from here on.
    fn arm(&mut self) {
        self.armed_at = self.sim.calls_made() as usize;
        let here = self.faults.iter().filter(|(disk, _)| *disk == self.calls.len());
        here.for_each(|(_, fault)| self.sim.inject(fault.clone()));
    }

    /// Takes down which calls this disk has answered since, and turns to the next.
    fn leave_disk(&mut self) {
        let trace = self.sim.trace();
        let calls = trace.events().filter_map(|event| if let Event::Call(call) = event { Some(call.op) } else { None });
        self.calls.push(calls.skip(self.armed_at).collect());
    }

    fn begin_step(&mut self) {
        self.tally.steps += 1;
        self.struck_before = self.sim.faults_struck();
    }

    /// Whether a call of this step failed.
    fn struck(&self) -> bool {
        self.full || self.sim.faults_struck() > self.struck_before
    }

    fn heal(&mut self) {
        self.sim.clear_faults();
        self.sim.set_capacity(None);
        self.full = false;
    }

    fn store(&self) -> Store {
        self.store.clone().expect("a store is open between steps")
    }

    fn step(&mut self, step: &Step) -> Result<(), String> {
        match step {
            Step::Commit(commit, durability) => self.commit(commit, *durability),
            Step::Ask(question) => self.ask(question),
            Step::TakeSnapshot => {
                if self.snapshots.len() == SNAPSHOTS_MAX {
                    self.snapshots.remove(0);
                }
                self.snapshots.push((self.store().snapshot(), self.model.visible()));
                Ok(())
            }
            Step::AskSnapshot(number, question) => {
                let Some((snapshot, sees)) = self.snapshots.get(usize::from(*number) % SNAPSHOTS_MAX) else {
                    return Ok(());
                };
                let view = View::of_snapshot(snapshot);
                ask(&view, question, sees, &|error| self.excuse("a snapshot", error))
            }
            Step::DropSnapshot(number) => {
                let number = usize::from(*number) % SNAPSHOTS_MAX;
                if number < self.snapshots.len() {
                    self.snapshots.remove(number);
                }
                Ok(())
            }
            Step::OpenReader => self.open_reader(),
            Step::AskReader(question) => self.ask_reader(question),
            Step::RefreshReader => self.refresh_reader(),
            Step::DropReader => {
                self.reader = None;
                Ok(())
            }
            Step::Sync => self.sync(),
            Step::Compact => self.compact(),
            Step::Backup => self.back_up(),
            Step::Verify => self.verify(),
            Step::Close(then) => self.close(*then),
            Step::Kill => self.kill(),
            Step::PowerCut(loss) => self.cut_the_power(*loss),
            Step::Fault { kind, nth, often, on } => {
                let fault = |nth| {
                    let fault = Fault::new(*kind, nth);
                    on.map_or(fault.clone(), |op| fault.on(op))
                };
                match often {
                    Often::Once => self.sim.inject(fault(*nth)),
                    Often::Thrice => (*nth..*nth + 3).for_each(|nth| self.sim.inject(fault(nth))),
                    Often::FromThenOn => self.sim.inject(fault(*nth).from_then_on()),
                }
                Ok(())
            }
            Step::FillUp(left) => {
                self.sim.set_capacity(None);
                let free = self.sim.free_bytes("/".as_ref());
                if let Ok(free) = free {
                    // What is taken is what is missing from a disk without a limit.
                    self.sim.set_capacity(Some((1 << 50) - free + left));
                    self.full = true;
                }
                Ok(())
            }
            Step::Heal => {
                self.heal();
                Ok(())
            }
        }
    }

    /// An error that a call was struck for; every other is a violation.
    fn excuse(&self, what: &str, error: Error) -> Result<(), String> {
        match error {
            Error::Io { .. } | Error::Damaged(_) if self.struck() => Ok(()),
            error => Err(format!("{what} fails, and no call was struck that could be why: {error:?}")),
        }
    }

    /// An error that a write may end with.
    fn excuse_write(&self, what: &str, error: &Error) -> Result<(), String> {
        match error {
            Error::Io { .. } | Error::WritesRefused { .. } | Error::Damaged(_) if self.struck() => Ok(()),
            Error::WritesRefused { .. } if self.strikes.may_refuse => Ok(()),
            // It could not for so long that commits have to wait.
            Error::WritesRefused { cause } if cause.contains("the index cannot be written out") => Ok(()),
            error => Err(format!("{what} fails, and nothing failed before that could be why: {error:?}")),
        }
    }

    // Writes.

    fn commit(&mut self, commit: &Commit, durability: Durability) -> Result<(), String> {
        let store = self.store();
        let evicted = self.evicts().then(|| store.metrics().keys_evicted);
        let answer = make(&store, commit, durability);
        let refused_before = self.strikes.must_refuse;
        let sync_failed = self.strikes.look(&self.sim, PATH);
        match answer {
            Ok(()) if refused_before => return Err("it is taken after a failed sync".into()),
            Ok(()) => {
                self.tally.acknowledged += 1;
                self.model.accept(commit.clone(), durability);
                if let Some(before) = evicted {
                    let evicted = store.metrics().keys_evicted - before;
                    if evicted > 0 {
                        self.learn_evicted(&store, commit, evicted)?;
                    }
                }
                if self.setting.limit != Limit::None {
                    let held = bytes_of(&self.model.visible());
                    if held > MAX_BYTES {
                        return Err(format!("{held} bytes are held, of {MAX_BYTES} at most"));
                    }
                }
            }
            Err(Error::Full { .. }) => {
                let coming = Model::contents([commit]);
                let after = Model::contents(self.model.accepted.iter().chain([commit]));
                let too_much = match self.setting.limit {
                    Limit::None => false,
                    Limit::Refuses => bytes_of(&after) > MAX_BYTES,
                    Limit::EvictsFirst | Limit::EvictsUnread => bytes_of(&coming) > MAX_BYTES,
                };
                if !too_much {
                    return Err(format!("there is room for it: {} bytes", bytes_of(&after)));
                }
            }
            Err(error) => {
                self.excuse_write("a commit", &error)?;
                // One that was refused did not get as far as the disk.
                if !matches!(error, Error::WritesRefused { .. }) || sync_failed {
                    self.model.failed.push(commit.clone());
                    self.tally.failed += 1;
                } else {
                    self.tally.refused += 1;
                }
            }
        }
        Ok(())
    }

    /// A commit deleted others to make room: asks which, and takes them for a part of it.
    fn learn_evicted(&mut self, store: &Store, commit: &Commit, count: u64) -> Result<(), String> {
        // To be told of every key, nothing must fail now.
        self.heal();
        let mut gone = self.model.visible();
        for info in store.scan("") {
            let key = info.map_err(|error| format!("a scan with nothing failing: {error}"))?.key;
            gone.remove(key.as_bytes());
        }
        let own = Model::contents([commit]);
        if gone.len() as u64 != count || gone.keys().any(|key| own.contains_key(key)) {
            return Err(format!("{count} keys were evicted, and these are gone: {:?}", differ(0, &gone)));
        }
        let last = self.model.accepted.last_mut().expect("a commit was accepted a moment ago");
        last.extend(gone.into_keys().map(|key| (key, None)));
        Ok(())
    }

    fn sync(&mut self) -> Result<(), String> {
        let answer = self.store().sync();
        self.strikes.look(&self.sim, PATH);
        match answer {
            // After a failed one too, where everything was durable before: power cuts tell.
            Ok(()) => {
                self.model.all_durable();
                Ok(())
            }
            Err(error) => self.excuse_write("a sync", &error),
        }
    }

    fn compact(&mut self) -> Result<(), String> {
        let store = self.store();
        let answer = store.compact(&CompactOptions::default(), |_| {});
        let refused_before = self.strikes.must_refuse;
        self.strikes.look(&self.sim, PATH);
        self.model.repeat_through(store.snapshot().last_commit() as usize)?;
        match answer {
            Ok(_) if refused_before => Err("it succeeds after a failed sync".into()),
            Ok(report) if !report.damages.is_empty() => Err(format!("it finds damage: {:?}", report.damages)),
            Ok(_) => Ok(()),
            Err(error) => {
                self.excuse_write("a compaction", &error)?;
                // What it repeated last may come to light later.
                self.model.failed.push(Commit::new());
                Ok(())
            }
        }
    }

    // Reads.

    fn ask(&self, question: &Question) -> Result<(), String> {
        let (store, visible) = (self.store(), self.model.visible());
        ask(&View::of_store(&store), question, &visible, &|error| self.excuse("a read", error))?;
        if *question == Question::Everything
            && let Ok(stat) = store.stat()
            && (stat.live_bytes, stat.last_commit) != (bytes_of(&visible), self.model.accepted.len() as u64)
        {
            let (live, last) = (bytes_of(&visible), self.model.accepted.len());
            return Err(format!("{live} bytes live at commit {last}, and it says {stat:?}"));
        }
        Ok(())
    }

    fn verify(&self) -> Result<(), String> {
        match self.store().verify(|_| {}) {
            Ok(report) if self.struck() => {
                let other = report.damages.into_iter().find(|damage| !damage.what.contains("it cannot be read"));
                other.map_or(Ok(()), |damage| Err(format!("it finds damage where a call failed: {damage}")))
            }
            Ok(report) if report.is_sound() => Ok(()),
            Ok(report) => Err(format!("it finds damage: {:?}", report.damages)),
            Err(error) => self.excuse("a verification", error),
        }
    }

    // Other processes that read.

    fn open_reader(&mut self) -> Result<(), String> {
        self.reader = None;
        match self.options().read_only(true).open(PATH) {
            Ok(store) => self.reader_sees(store, 0),
            Err(error) => self.excuse("a reader's opening", error),
        }
    }

    /// A reader shows a state that its writer has, or has had since `least`.
    fn reader_sees(&mut self, store: Store, least: usize) -> Result<(), String> {
        let last = store.snapshot().last_commit() as usize;
        let sees = match contents(&store) {
            Ok(sees) => sees,
            // What a writer may take back is not protected.
            Err(Error::Damaged(_) | Error::Outdated { .. } | Error::Io { .. }) if last > self.model.durable => {
                return Ok(());
            }
            Err(error) => return self.excuse("a reader's first look", error),
        };
        let least = least.min(self.model.accepted.len()).max(self.model.durable);
        self.commits_of(last, &sees, least).map_err(|wrong| format!("a reader: {wrong}"))?;
        let doubtful = last > self.model.durable || self.struck();
        self.reader = Some(Reader { store, sees, last, doubtful });
        Ok(())
    }

    fn ask_reader(&self, question: &Question) -> Result<(), String> {
        let Some(reader) = &self.reader else { return Ok(()) };
        ask(&View::of_store(&reader.store), question, &reader.sees, &|error| match error {
            Error::Outdated { .. } | Error::Damaged(_) | Error::Io { .. } if reader.doubtful => Ok(()),
            error => self.excuse("a reader's read", error),
        })
    }

    fn refresh_reader(&mut self) -> Result<(), String> {
        let Some(reader) = self.reader.take() else { return Ok(()) };
        match reader.store.refresh() {
            Ok(true) => {
                let least = if reader.doubtful { 0 } else { reader.last };
                self.reader_sees(reader.store, least)
            }
            Ok(false) => {
                // Nothing is durable that it does not see.
                let behind = self.model.durable > reader.last && !reader.doubtful;
                let (durable, last) = (self.model.durable, reader.last);
                self.reader = Some(reader);
                if behind { Err(format!("nothing is new at commit {last}, and {durable} are durable")) } else { Ok(()) }
            }
            Err(error) => {
                let answer = self.excuse("a refresh", error);
                self.reader = Some(Reader { doubtful: true, ..reader });
                answer
            }
        }
    }

    // Copies.

    fn back_up(&mut self) -> Result<(), String> {
        if self.backups.len() == BACKUPS_MAX {
            return Ok(());
        }
        self.places += 1;
        let path = format!("/backup{}", self.places);
        let answer = self.store().backup(&path);
        self.strikes.look(&self.sim, PATH);
        match answer {
            Ok(report) if report.last_commit != self.model.accepted.len() as u64 => {
                Err(format!("it ends at commit {} of {}", report.last_commit, self.model.accepted.len()))
            }
            Ok(_) => {
                self.model.all_durable();
                self.backups.push((path, self.model.visible()));
                Ok(())
            }
            Err(error) => self.excuse_write("a backup", &error),
        }
    }

    /// Every backup that was acknowledged is whole, and none has changed.
    fn check_backups(&self) -> Result<(), String> {
        for (path, expected) in &self.backups {
            let failed = |error: Error| format!("{path}: {error}");
            let backup = self.options().read_only(true).open(path).map_err(failed)?;
            let found = contents(&backup).map_err(failed)?;
            if found != *expected {
                return Err(format!("{path}: {}", differ(0, &found)));
            }
            let report = backup.verify(|_| {}).map_err(failed)?;
            if !report.is_sound() {
                return Err(format!("{path}: verification finds {:?}", report.damages));
            }
        }
        Ok(())
    }

    /// Salvages the store, which is whole and closed, and looks whether everything came over.
    fn repair(&mut self) -> Result<(), String> {
        self.places += 1;
        let (path, failed) = (format!("/repaired{}", self.places), |error: Error| format!("a repair: {error}"));
        let report = self.options().repair(PATH, &path, |_| {}).map_err(failed)?;
        if !report.is_complete() {
            return Err(format!("a repair of a whole store finds {:?}", report.damages));
        }
        let repaired = self.options().read_only(true).open(&path).map_err(failed)?;
        let found = contents(&repaired).map_err(failed)?;
        if found == self.model.visible() { Ok(()) } else { Err(format!("repaired: {}", differ(0, &found))) }
    }

    // Ends and beginnings.

    fn let_go(&mut self) -> Option<Store> {
        self.snapshots.clear();
        self.store.take()
    }

    fn close(&mut self, then: Closed) -> Result<(), String> {
        let answer = self.let_go().map_or(Ok(()), Store::close);
        let refused_before = self.strikes.must_refuse;
        self.strikes.look(&self.sim, PATH);
        match answer {
            Ok(()) if refused_before => return Err("it succeeds after a failed sync".into()),
            Ok(()) => {
                self.model.all_durable();
                self.model.failed.clear();
                match then {
                    Closed::Nothing => {}
                    Closed::Repair => {
                        self.heal();
                        self.repair()?;
                    }
                    // Where it fails, all is as it was.
                    Closed::RebuildIndex => {
                        if let Err(error) = self.options().rebuild_index(PATH, |_| {}) {
                            self.excuse_write("the index made anew", &error)?;
                        }
                        self.strikes.look(&self.sim, PATH);
                    }
                }
            }
            Err(error) => self.excuse_write("a close", &error)?,
        }
        if self.is_unwarned() {
            return self.cut_the_power(Loss::Nothing);
        }
        self.open_again()
    }

    fn kill(&mut self) -> Result<(), String> {
        if self.is_unwarned() {
            return self.cut_the_power(Loss::Nothing);
        }
        if let Some(store) = self.let_go() {
            store.abandon();
        }
        self.open_again()
    }

    fn cut_the_power(&mut self, loss: Loss) -> Result<(), String> {
        self.reader = None;
        if let Some(store) = self.let_go() {
            store.abandon();
        }
        self.tally.faults_struck += self.sim.faults_struck();
        self.tally.calls += self.sim.calls_made();
        self.tally.power_cuts += 1;
        let trace = self.sim.trace();
        let walker = trace.walk_to(trace.len());
        let choice = loss.choice(walker.pending().len());
        self.leave_disk();
        let before = std::mem::replace(&mut self.sim, walker.materialize(&choice));
        self.sim.start_recording();
        self.furnish();
        self.full = false;
        self.struck_before = 0;
        self.strikes.another_disk();
        // What was not durable is gone, or not, as the choice has it: as after a failed sync.
        self.strikes.sync_failed = true;
        let checked = self.check_backups();
        self.arm();
        let opened = checked.and_then(|()| self.open_again());
        // What is not there now is nowhere.
        self.model.failed.clear();
        opened.map_err(|wrong| {
            print_trace(&before);
            format!("after a power cut: {wrong}\n{}", walker.explain(&choice))
        })
    }

    /// Whether a sync failed of which the next opening learns nothing, since the calls for a note failed as well: only a
    /// machine that starts again can be trusted then.
    fn is_unwarned(&self) -> bool {
        let noted = ["DISTRUST", "UNSETTLED"].iter().any(|note| self.sim.has_file(format!("{PATH}/{note}")));
        self.strikes.sync_failed && self.strikes.note_failed && !noted
    }

    /// Another process opens the store, while calls fail; where that is why it does not open, another one tries, and in the end
    /// none fails.
    fn open_again(&mut self) -> Result<(), String> {
        let mut openings = 1;
        let store = loop {
            match self.options().open(PATH) {
                Ok(store) => break store,
                Err(error) => self.excuse_opening(&error)?,
            }
            if openings == OPENINGS_MAX {
                self.heal();
            }
            openings += 1;
            self.struck_before = self.sim.faults_struck();
            self.strikes.look(&self.sim, PATH);
            if self.is_unwarned() {
                return self.cut_the_power(Loss::Nothing);
            }
        };
        self.tally.opens += 1;
        self.strikes.look(&self.sim, PATH);
        let fewest = if self.strikes.sync_failed { self.model.durable } else { self.model.accepted.len() };
        let found = contents(&store).or_else(|error| {
            self.excuse("a read", error)?;
            self.heal();
            contents(&store).map_err(|error| format!("a read with nothing failing: {error}"))
        })?;
        let last = store.snapshot().last_commit() as usize;
        let commits = self.commits_of(last, &found, fewest)?;
        if let Some(reader) = &mut self.reader {
            // What it sees may have been cut, and written over.
            reader.doubtful |= reader.last > commits.len().min(self.model.durable);
        }
        // One that failed, and was cut off when the process died, may be there again after a power cut; until this process
        // writes.
        let all_accepted = commits.len() == self.model.accepted.len();
        let failed = if all_accepted { std::mem::take(&mut self.model.failed) } else { Vec::new() };
        self.model.begin_again(commits);
        self.model.failed = failed;
        self.strikes.opened_again(&self.sim, PATH);
        self.store = Some(store);
        Ok(())
    }

    fn excuse_opening(&self, error: &Error) -> Result<(), String> {
        match error {
            Error::Io { .. } | Error::WritesRefused { .. } if self.struck() => Ok(()),
            error => Err(format!("the store does not open: {error:?}")),
        }
    }

    /// Which commits make what was found. Where commits evict, one that failed may have deleted what nobody was told of.
    fn commits_of(&self, last: usize, found: &Contents, fewest: usize) -> Result<Vec<Commit>, String> {
        let explained = self.model.explain(last, found, fewest);
        if explained.is_ok() || !self.evicts() || last <= self.model.accepted.len() {
            return explained;
        }
        for mut commits in self.model.candidates(last) {
            let mut missing = Model::contents(&commits);
            let all_right = found.iter().all(|(key, value)| missing.remove(key).is_some_and(|right| right == *value));
            let newest = commits.last_mut().expect("more commits than were accepted");
            if all_right && missing.keys().all(|key| newest.iter().all(|(put, _)| put != key)) {
                newest.extend(missing.into_keys().map(|key| (key, None)));
                return Ok(commits);
            }
        }
        explained
    }

    /// The faults are over: reads go on, and writes where nothing hinders them.
    fn go_on(&mut self) -> Result<(), String> {
        self.begin_step();
        self.heal();
        self.ask(&Question::Everything)?;
        for (number, len) in [(1 << 32, 300), (1 << 33, 9000)] {
            self.commit(&vec![(format!("end{number}").into_bytes(), Some(bytes(number, len)))], Durability::Immediate)?;
        }
        self.check_backups()
    }

    /// The store is sound when it was opened for the last time, and is closed.
    fn be_closed(&mut self) -> Result<(), String> {
        self.verify()?;
        self.let_go().map_or(Ok(()), Store::close).map_err(|error| format!("the last close: {error}"))
    }

    /// Goes on; then the store is left, and opened on what was written or on what a power cut leaves.
    fn end(&mut self) -> Result<Tally, String> {
        let ended = self.go_on().and_then(|()| match self.setting.last_loss {
            None => self.kill(),
            Some(loss) => self.cut_the_power(loss),
        });
        ended.and_then(|()| self.be_closed()).map_err(|wrong| format!("at the end: {wrong}"))?;
        self.tally.faults_struck += self.sim.faults_struck();
        self.tally.calls += self.sim.calls_made();
        Ok(self.tally)
    }

    /// Goes on; then the store is left, and opened on what each of some losses leaves.
    fn end_in_many_ways(&mut self, losses: &[Loss]) -> Result<(), String> {
        self.go_on().map_err(|wrong| format!("at the end: {wrong}"))?;
        if let Some(store) = self.let_go() {
            store.abandon();
        }
        self.leave_disk();
        for &loss in losses {
            let mut one = Player {
                model: self.model.clone(),
                backups: self.backups.clone(),
                places: self.places,
                ..Self::of(self.sim.clone(), self.setting, &self.sabotage, Vec::new())
            };
            let ended = one.cut_the_power(loss).and_then(|()| one.be_closed());
            ended.map_err(|wrong| format!("at the end, with {loss:?} lost: {wrong}"))?;
        }
        Ok(())
    }
}

fn bytes_of(contents: &Contents) -> u64 {
    contents.values().map(|value| value.len() as u64).sum()
}
