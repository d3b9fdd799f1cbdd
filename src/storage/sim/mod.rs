//! The fault-injecting twin of the file system, in memory.
//!
//! [`SimStorage`] answers like a real disk, records what it was asked, fails the calls that it is told to fail, and
//! presents every state that a crash could have left behind. It is for tests; it keeps nothing anywhere.
//!
//! ```
//! # use std::path::Path;
//! # use alight::storage::{Caching, OpenMode, Storage, StorageFile, sim::SimStorage, write_all_at};
//! let sim = SimStorage::new();
//! let file = sim.open(Path::new("/f"), OpenMode::CreateNew)?;
//! write_all_at(&*file, b"kept", 0, Caching::Buffered)?;
//! file.sync()?;
//! sim.sync_dir(Path::new("/"))?;
//! sim.marker(1); // "from here on, it must be there"
//!
//! let mut walker = sim.trace().walk();
//! while walker.next_cut() {
//!     for choice in walker.choices() {
//!         let state = walker.materialize(&choice);
//!         if walker.markers() == [1] {
//!             assert_eq!(state.read_file("/f"), b"kept", "{}", walker.explain(&choice));
//!         }
//!     }
//! }
//! # Ok::<(), std::io::Error>(())
//! ```
//!
//! # What a crash can show
//! - A file's bytes and length are as at its last [`StorageFile::sync`], with any of the changes since: each write,
//!   allocation, punch and truncation on its own, kept or lost; a write also torn, by sectors of 512 bytes or pages of
//!   4 KiB. What a disk writes is sectors as they are then, so a kept write brings whole sectors as they were after it.
//! - A directory's names are as at its last [`Storage::sync_dir`], with any of the changes since, each whole or not at
//!   all; one that rests on another that was lost is lost as well. A rename between two directories is durable once
//!   both are synced. A file with two names has each of them, or not, on its own. A file whose name was lost is lost,
//!   however often the file itself was synced.
//! - Power that fails during a sync leaves what could be there before it; power that fails during any other call leaves
//!   what could be there after it, since the call is pending either way.
//!
//! That is more than most file systems would lose: a journal, for one, keeps the order of truncations. Nothing is
//! shown that no disk could show.
//!
//! # Invariants
//! - The same calls in the same order make the same trace, the same states and the same fingerprints, everywhere.
//! - Each call takes effect at one moment, under one lock.
//! - A clone of a [`SimStorage`] is the same disk. A materialised state and a [`SimStorage::clone_disk`] are others.

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;

use super::{DirEntry, OpenMode, Storage, StorageFile, StorageLock};
use crate::sync::lock::Mutex;

mod choice;
mod content;
mod crash;
mod faults;
mod file;
mod image;
mod live;
mod pending;
mod rng;
mod sabotage;
mod tamper;
mod trace;

pub use choice::{Choice, Keep, Others, Unit};
pub use crash::CrashWalker;
pub use faults::{Fault, FaultKind};
pub use live::Abilities;
pub use pending::PendingChange;
pub use sabotage::Sabotage;
pub use trace::{Call, Event, OpKind, Trace};

use file::{SimFile, SimLock, SimSharedByte};
use image::Image;
use live::Live;
use trace::{Effect, Step};

/// A disk in memory. A clone is the same disk.
#[derive(Clone)]
pub struct SimStorage {
    disk: Arc<Shared>,
}

/// What every handle of one disk refers to.
struct Shared {
    state: Mutex<State>,
}

struct State {
    live: Live,
    recorder: Recorder,
    faults: Vec<Fault>,
    faults_struck: u64,
    calls_made: u64,
    sabotage: Sabotage,
}

struct Recorder {
    base: Image,
    /// Shared with the traces that were taken, and copied when more is recorded while one of them is held.
    steps: Arc<Vec<Step>>,
}

/// A call, as it comes in.
struct Request {
    op: OpKind,
    path: Arc<Path>,
    to: Option<Arc<Path>>,
    offset: u64,
    len: u64,
}

impl Request {
    fn on(op: OpKind, path: &Path) -> Self {
        Self { op, path: path.into(), to: None, offset: 0, len: 0 }
    }
}

impl SimStorage {
    /// An empty disk: a root directory, `/`, and nothing in it. It records from its first call on.
    pub fn new() -> Self {
        let sim = Self::from_image(Image::empty(), 1);
        sim.start_recording();
        sim
    }

    /// A disk whose live and durable states are both this one. It does not record until it is told to.
    fn from_image(image: Image, next_id: u64) -> Self {
        let recorder = Recorder { base: image.clone(), steps: Arc::default() };
        let live = Live::new(image, next_id);
        let (faults, sabotage) = (Vec::new(), Sabotage::default());
        let state = State { live, recorder, faults, faults_struck: 0, calls_made: 0, sabotage };
        Self { disk: Arc::new(Shared { state: Mutex::new(state) }) }
    }

    /// Another disk with what is live here now, durably. Its clock, faults, locks and abilities are those of a new one,
    /// and it does not record.
    pub fn clone_disk(&self) -> Self {
        let state = self.disk.state.lock();
        Self::from_image(state.live.image.clone(), state.live.next_id)
    }

    // The trace.

    /// Forgets the trace and records from here on; all that is live now counts as durable.
    pub fn start_recording(&self) {
        let mut state = self.disk.state.lock();
        state.recorder = Recorder { base: state.live.image.clone(), steps: Arc::default() };
        state.live.recording = true;
    }

    /// Records no more; the trace stays.
    pub fn stop_recording(&self) {
        self.disk.state.lock().live.recording = false;
    }

    /// What was recorded so far.
    pub fn trace(&self) -> Trace {
        let state = self.disk.state.lock();
        Trace {
            base: state.recorder.base.clone(),
            steps: Arc::clone(&state.recorder.steps),
            sabotage: state.sabotage.clone(),
            next_id: state.live.next_id,
        }
    }

    /// What was recorded after the first so many events: for who looks often, and does not want the whole trace each time. The
    /// disk answers no call meanwhile.
    pub fn events_after(&self, position: usize, visit: impl FnMut(&Event)) {
        let state = self.disk.state.lock();
        let steps = state.recorder.steps.get(position..).unwrap_or_default();
        steps.iter().map(|step| &step.event).for_each(visit);
    }

    /// Leaves a number in the trace, after every call that has returned.
    pub fn marker(&self, number: u64) {
        self.disk.state.lock().record(Event::Marker(number), Vec::new());
    }

    /// Leaves a word in the trace, for whoever reads it.
    pub fn note(&self, words: impl Into<String>) {
        self.disk.state.lock().record(Event::Note(words.into()), Vec::new());
    }

    // What goes wrong.

    /// Arms a fault. Several may be armed; the first that strikes a call decides.
    pub fn inject(&self, fault: Fault) {
        self.disk.state.lock().faults.push(fault);
    }

    /// Disarms every fault.
    pub fn clear_faults(&self) {
        self.disk.state.lock().faults.clear();
    }

    /// How many calls the disk has answered, failed ones included.
    pub fn calls_made(&self) -> u64 {
        self.disk.state.lock().calls_made
    }

    /// How many calls were struck by a fault.
    pub fn faults_struck(&self) -> u64 {
        self.disk.state.lock().faults_struck
    }

    /// Lets crashes break promises. It holds for the whole trace, calls already recorded included.
    pub fn set_sabotage(&self, sabotage: Sabotage) {
        self.disk.state.lock().sabotage = sabotage;
    }

    /// Limits the space; `None` lifts the limit. Allocations that would pass it fail with `StorageFull`, and writes
    /// take what fits.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        self.disk.state.lock().live.capacity = bytes;
    }

    /// Refuses every change, as a file system mounted for reading does (`ReadOnlyFilesystem`).
    pub fn set_read_only(&self, read_only: bool) {
        self.disk.state.lock().live.read_only = read_only;
    }

    /// Chooses what the file system can do.
    pub fn set_abilities(&self, abilities: Abilities) {
        self.disk.state.lock().live.abilities = abilities;
    }

    /// A hash of every name, length, byte and hole. Costs as much as there are names, not bytes.
    pub fn fingerprint(&self) -> u64 {
        self.disk.state.lock().live.image.fingerprint()
    }
}

impl Default for SimStorage {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for SimStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimStorage").finish_non_exhaustive()
    }
}

impl State {
    fn record(&mut self, event: Event, effects: Vec<Effect>) {
        if self.live.recording {
            Arc::make_mut(&mut self.recorder.steps).push(Step { event, effects });
        }
    }

    /// Counts a call; answers the fault that strikes it.
    fn strike(&mut self, request: &Request) -> Option<FaultKind> {
        self.calls_made += 1;
        // Every fault counts every call, so that one does not hide calls from another.
        let strikes =
            self.faults.iter_mut().map(|fault| fault.strike(request.op, &request.path, request.to.as_deref()));
        let struck = strikes.fold(None, Option::or);
        self.faults_struck += u64::from(struck.is_some());
        struck
    }
}

impl Shared {
    /// Makes a call: counts it, lets it fail or makes it, and records it.
    fn call<T>(&self, request: Request, make: impl FnOnce(&mut Live) -> io::Result<T>) -> io::Result<T> {
        self.call_counting(request, |_| 0, make)
    }

    /// [`Shared::call`] for one that answers how many bytes it moved.
    fn call_moving(&self, request: Request, make: impl FnOnce(&mut Live) -> io::Result<usize>) -> io::Result<usize> {
        self.call_counting(request, |&moved| moved as u64, make)
    }

    fn call_counting<T>(
        &self,
        request: Request,
        moved: impl FnOnce(&T) -> u64,
        make: impl FnOnce(&mut Live) -> io::Result<T>,
    ) -> io::Result<T> {
        let state = &mut *self.state.lock();
        let index = state.calls_made;
        let struck = state.strike(&request);
        let answer = match struck.and_then(FaultKind::refusal) {
            Some(refusal) => Err(refusal),
            None => {
                state.live.struck = struck;
                let answer = make(&mut state.live);
                state.live.struck = None;
                match struck {
                    Some(FaultKind::EioAfter) => answer.and(Err(image::errno(libc::EIO))),
                    _ => answer,
                }
            }
        };
        if state.live.recording {
            let outcome = answer.as_ref().map(moved).map_err(io::Error::kind);
            let Request { op, path, to, offset, len } = request;
            let thread = std::thread::current().id();
            let effects = std::mem::take(&mut state.live.effects);
            state.record(Event::Call(Call { index, op, path, to, offset, len, outcome, thread }), effects);
        }
        answer
    }
}

impl Storage for SimStorage {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn StorageFile>> {
        let request = Request::on(OpKind::Open, path);
        let path = Arc::clone(&request.path);
        let file = self.disk.call(request, |live| live.open(&path, mode))?;
        Ok(Arc::new(SimFile { disk: Arc::clone(&self.disk), file, path, writable: mode != OpenMode::Read }))
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.disk.call(Request::on(OpKind::CreateDir, path), |live| live.create_dir(path))
    }

    fn list(&self, path: &Path) -> io::Result<Vec<DirEntry>> {
        self.disk.call(Request::on(OpKind::List, path), |live| live.list(path))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let request = Request { to: Some(to.into()), ..Request::on(OpKind::Rename, from) };
        self.disk.call(request, |live| live.rename(from, to))
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        let request = Request { to: Some(to.into()), ..Request::on(OpKind::Link, from) };
        self.disk.call(request, |live| live.link(from, to))
    }

    fn reflink(&self, from: &Path, to: &Path) -> io::Result<()> {
        let request = Request { to: Some(to.into()), ..Request::on(OpKind::Reflink, from) };
        self.disk.call(request, |live| live.reflink(from, to))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.disk.call(Request::on(OpKind::Remove, path), |live| live.remove(path))
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.disk.call(Request::on(OpKind::RemoveDir, path), |live| live.remove_dir(path))
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.disk.call(Request::on(OpKind::SyncDir, path), |live| live.sync_dir(path))
    }

    fn lock(&self, path: &Path, holder: &str) -> io::Result<Box<dyn StorageLock>> {
        let file = self.disk.call(Request::on(OpKind::Lock, path), |live| live.lock(path, holder))?;
        Ok(Box::new(SimLock { disk: Arc::clone(&self.disk), file }))
    }

    fn lock_holder(&self, path: &Path) -> io::Result<String> {
        self.disk.call(Request::on(OpKind::LockHolder, path), |live| {
            let bytes = live.image.content(live.image.file(path)?).to_vec();
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        })
    }

    fn share_byte(&self, path: &Path, byte: u64) -> io::Result<Box<dyn StorageLock>> {
        let request = Request { offset: byte, ..Request::on(OpKind::ShareByte, path) };
        let file = self.disk.call(request, |live| live.share_byte(path, byte))?;
        Ok(Box::new(SimSharedByte { disk: Arc::clone(&self.disk), file, byte }))
    }

    fn lowest_shared_byte(&self, path: &Path, through: u64) -> io::Result<Option<u64>> {
        let request = Request { offset: through, ..Request::on(OpKind::LowestSharedByte, path) };
        self.disk.call(request, |live| live.lowest_shared_byte(path, through))
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        self.disk.call(Request::on(OpKind::FreeBytes, path), |live| {
            match live.image.place(path).map(|place| live.image.node(&place)) {
                Ok(None) => Err(image::errno(libc::ENOENT)),
                // The root has no place of its own.
                Err(error) if error.kind() != io::ErrorKind::IsADirectory => Err(error),
                _ => Ok(live.free_bytes()),
            }
        })
    }
}

#[cfg(test)]
mod tests;
