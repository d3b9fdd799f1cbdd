//! The states that a crash can leave behind, walked cut by cut.
//!
//! # Invariants
//! - `durable` is what survives whatever happens; `live` is what the store saw. Between them stand the pending changes,
//!   in the order in which they were made, and nothing else.
//! - One event costs the same however long the trace is; a state costs what its pending changes touch.

use std::fmt::Write;
use std::sync::Arc;

use super::SimStorage;
use super::choice::{Choice, Fate};
use super::image::{DirId, FileId, Image, NameChange, Place};
use super::pending::{PendingChange, Standing, What, land};
use super::trace::{Call, Effect, Event, Step, Trace};

/// How many events before the cut an explanation shows.
const EXPLAINED_EVENTS: usize = 12;

/// A walk over a trace, from cut to cut. Clone it to hand a cut to another thread, or let each thread walk by itself
/// and look at every so-manieth cut: walking is cheap.
#[derive(Debug, Clone)]
pub struct CrashWalker {
    trace: Trace,
    position: usize,
    started: bool,
    live: Image,
    durable: Image,
    pending: Vec<PendingChange>,
    /// The pending changes from here on were made by the last event that made any.
    fresh: usize,
    markers: Vec<u64>,
}

impl CrashWalker {
    pub(super) fn new(trace: Trace) -> Self {
        let (live, durable) = (trace.base.clone(), trace.base.clone());
        Self { trace, position: 0, started: false, live, durable, pending: Vec::new(), fresh: 0, markers: Vec::new() }
    }

    /// How many events are done. [`Trace::walk_to`] comes back here.
    pub fn position(&self) -> usize {
        self.position
    }

    /// The event that was done last.
    pub fn event(&self) -> Option<&Event> {
        Some(&self.trace.steps[self.position.checked_sub(1)?].event)
    }

    /// The markers that were passed, in order: what must be there after a crash here.
    pub fn markers(&self) -> &[u64] {
        &self.markers
    }

    /// The changes in doubt, in the order in which they were made.
    pub fn pending(&self) -> &[PendingChange] {
        &self.pending
    }

    /// Goes to the next cut; false when there is none. A cut stands before each event that changes what a crash can
    /// show, and at the end: of all the moments with the same disk, the last one, when the most has been promised.
    pub fn next_cut(&mut self) -> bool {
        if self.started && !self.advance() {
            return false;
        }
        self.started = true;
        let steps = Arc::clone(&self.trace.steps);
        while let Some(next) = steps.get(self.position)
            && !self.would_change_states(next)
        {
            self.advance();
        }
        true
    }

    fn would_change_states(&self, step: &Step) -> bool {
        step.effects.iter().any(|effect| match effect {
            Effect::Edited { .. } | Effect::Renamed(_) | Effect::Replaced(_) => true,
            Effect::Synced(file) => self.pending.iter().any(|change| change.file() == Some(*file)),
            Effect::DirSynced(dir) => self.pending.iter().any(|change| change.touches_dir(*dir)),
            Effect::SyncFailed(_) | Effect::DirSyncFailed(_) => false,
        })
    }

    /// Does one event more; false at the end.
    pub fn advance(&mut self) -> bool {
        // A handle on the steps of its own, so that they can be read while the walk changes.
        let steps = Arc::clone(&self.trace.steps);
        let Some(step) = steps.get(self.position) else { return false };
        self.position += 1;
        let pending_before = self.pending.len();
        match &step.event {
            Event::Call(call) => {
                for effect in &step.effects {
                    self.take_effect(call, effect);
                }
            }
            Event::Marker(number) => self.markers.push(*number),
            Event::Note(_) => {}
            Event::Tampered => {
                for effect in &step.effects {
                    if let Effect::Replaced(image) = effect {
                        (self.live, self.durable) = (image.clone(), image.clone());
                        self.pending.clear();
                    }
                }
            }
        }
        if !step.effects.is_empty() {
            self.fresh = pending_before.min(self.pending.len());
        }
        true
    }

    fn take_effect(&mut self, call: &Call, effect: &Effect) {
        match effect {
            Effect::Edited { file, edit, after } => {
                self.live.files.insert(*file, after.clone());
                self.push(call, What::Bytes { file: *file, edit: edit.clone(), after: after.clone() });
            }
            Effect::Renamed(change) => {
                if let NameChange::Rename { to, .. } = change
                    && self.trace.sabotage.rename_not_atomic
                    && let Some(node) = self.live.node(to)
                {
                    let unlink = NameChange::Unlink { at: to.clone(), node };
                    self.push(call, What::Names { change: unlink, synced: None });
                }
                self.live.apply(change);
                self.push(call, What::Names { change: change.clone(), synced: None });
            }
            Effect::Synced(file) if !self.trace.sabotage.loses_file_sync(call) => self.file_synced(*file),
            Effect::DirSynced(dir) if !self.trace.sabotage.loses_dir_sync(call) => self.dir_synced(*dir),
            Effect::SyncFailed(file) => self.orphan(|change| change.file() == Some(*file)),
            Effect::DirSyncFailed(dir) => self.orphan(|change| change.touches_dir(*dir)),
            Effect::Synced(_) | Effect::DirSynced(_) | Effect::Replaced(_) => {}
        }
    }

    fn push(&mut self, call: &Call, what: What) {
        self.pending.push(PendingChange { call: call.clone(), what, standing: Standing::Unsynced });
    }

    fn orphan(&mut self, covered: impl Fn(&PendingChange) -> bool) {
        for change in &mut self.pending {
            if change.standing == Standing::Unsynced && covered(change) {
                change.standing = Standing::Orphaned;
            }
        }
    }

    fn file_synced(&mut self, file: FileId) {
        let (mut any, mut all_unsynced) = (false, true);
        for change in self.pending.iter().filter(|change| change.file() == Some(file)) {
            any = true;
            all_unsynced &= change.standing == Standing::Unsynced;
        }
        if any && all_unsynced {
            self.durable.files.insert(file, self.live.content(file));
            self.pending.retain(|change| change.file() != Some(file));
        } else {
            for change in self.pending.iter_mut().filter(|change| change.file() == Some(file)) {
                if change.standing == Standing::Unsynced {
                    change.standing = Standing::Durable;
                }
            }
        }
    }

    fn dir_synced(&mut self, dir: DirId) {
        let due = self.due(dir);
        // Names that a change in doubt has touched: a durable one after it cannot be settled without it.
        let mut unsettled: Vec<Place> = Vec::new();
        let mut settled = vec![false; self.pending.len()];
        for (i, pending) in self.pending.iter_mut().enumerate() {
            let What::Names { change, .. } = &pending.what else { continue };
            if due[i] && !change.places().any(|place| unsettled.contains(place)) {
                self.durable.apply(change);
                settled[i] = true;
                continue;
            }
            if due[i] {
                pending.standing = Standing::Durable;
            }
            if pending.standing != Standing::Unsynced {
                unsettled.extend(change.places().cloned());
            }
        }
        let mut settled = settled.into_iter();
        self.pending.retain(|_| !settled.next().unwrap_or(false));
    }

    /// Which changes the sync of a directory makes durable: those that every directory they touch was synced after, and
    /// those before them that they rest on.
    fn due(&mut self, dir: DirId) -> Vec<bool> {
        let mut due = vec![false; self.pending.len()];
        let mut rested_on: Vec<Place> = Vec::new();
        for (i, pending) in self.pending.iter_mut().enumerate().rev() {
            let What::Names { change, synced } = &mut pending.what else { continue };
            if pending.standing != Standing::Unsynced {
                continue;
            }
            let all_synced = change.places().all(|place| place.dir == dir || Some(place.dir) == *synced);
            due[i] = all_synced || change.places().any(|place| rested_on.contains(place));
            if due[i] {
                rested_on.extend(change.places().cloned());
            } else if change.places().any(|place| place.dir == dir) {
                *synced = Some(dir);
            }
        }
        due
    }

    /// Every choice about the changes in doubt, random ones excepted: up to some forty for each write.
    pub fn choices(&self) -> Vec<Choice> {
        let in_doubt: Vec<usize> = (0..self.pending.len()).filter(|&i| self.pending[i].in_doubt()).collect();
        Choice::all(&in_doubt, |i| self.pending[i].units())
    }

    /// None, all, and the choices that single out the changes of the last event that made any. Their number over all
    /// cuts is in proportion to the trace, however rarely the store syncs: each change is singled out once, when it is
    /// the last.
    pub fn fresh_choices(&self) -> Vec<Choice> {
        let in_doubt = self.pending.iter().filter(|change| change.in_doubt()).count();
        let mut choices = vec![Choice::None];
        if in_doubt > 0 {
            choices.push(Choice::All);
        }
        for op in self.fresh..self.pending.len() {
            Choice::about(op, in_doubt > 1, self.pending[op].units(), &mut choices);
        }
        choices
    }

    /// The disk that a crash here leaves behind, if the pending changes come out like this: another disk, on which
    /// everything is durable, nothing is locked or open, and nothing is recorded.
    pub fn materialize(&self, choice: &Choice) -> SimStorage {
        SimStorage::from_image(self.state(choice), self.trace.next_id)
    }

    fn fates(&self, choice: &Choice) -> Vec<Fate> {
        let mut fates = choice.fates(self.position, self.pending.len(), |i| self.pending[i].is_write());
        for (fate, change) in fates.iter_mut().zip(&self.pending) {
            if !change.in_doubt() {
                *fate = Fate::Kept;
            }
        }
        fates
    }

    fn state(&self, choice: &Choice) -> Image {
        let fates = self.fates(choice);
        let mut image = self.durable.clone();
        // A file of which everything was kept is as it was live; most are, in most states.
        let mut files: Vec<(FileId, bool)> = Vec::new();
        for (change, fate) in self.pending.iter().zip(&fates) {
            if let Some(file) = change.file() {
                match files.iter_mut().find(|(known, _)| *known == file) {
                    Some((_, whole)) => *whole &= *fate == Fate::Kept,
                    None => files.push((file, *fate == Fate::Kept)),
                }
            }
        }
        for &(file, whole) in &files {
            if whole {
                image.files.insert(file, self.live.content(file));
            }
        }
        for (change, &fate) in self.pending.iter().zip(&fates) {
            match &change.what {
                What::Bytes { file, .. } if files.contains(&(*file, true)) => {}
                What::Bytes { file, edit, after } => land(edit, after, fate, image.files.entry(*file).or_default()),
                What::Names { change, .. } if fate == Fate::Kept => {
                    image.apply(change);
                }
                What::Names { .. } => {}
            }
        }
        image
    }

    /// What a choice means here, for whoever reads a failing test: the events before the cut, and each change's fate.
    pub fn explain(&self, choice: &Choice) -> String {
        let mut text = format!("crash after event {} of {}, {choice:?}\n", self.position, self.trace.len());
        for (i, event) in
            self.trace.events().enumerate().take(self.position).skip(self.position.saturating_sub(EXPLAINED_EVENTS))
        {
            let _ = writeln!(text, "{:>6}  {event}", i + 1);
        }
        let _ = writeln!(text, "  of {} changes in doubt:", self.pending.len());
        for (i, (change, fate)) in self.pending.iter().zip(self.fates(choice)).enumerate() {
            let fate = match fate {
                Fate::Kept => "kept".to_string(),
                Fate::Dropped => "lost".to_string(),
                Fate::Torn(unit, keep) => format!("torn by {} bytes, {keep:?}", unit.bytes()),
            };
            let _ = writeln!(text, "  [{i}] {fate:<8} {change}");
        }
        text
    }
}

#[cfg(test)]
impl CrashWalker {
    /// Every file with changes in doubt, with all of them landed on what is durable, one after another.
    pub(super) fn landed_one_by_one(&self) -> Vec<(FileId, super::content::Content)> {
        let mut files = std::collections::BTreeMap::new();
        for change in &self.pending {
            if let What::Bytes { file, edit, after } = &change.what {
                let content = files.entry(*file).or_insert_with(|| self.durable.content(*file));
                land(edit, after, Fate::Kept, content);
            }
        }
        files.into_iter().collect()
    }

    pub(super) fn live_content(&self, file: FileId) -> super::content::Content {
        self.live.content(file)
    }
}
