//! Tensors one after another in the order of their keys, read ahead in windows while the caller works on those before.
//!
//! A window is what a `get_many` reads: neighbours are merged, it lands in one arena, and tensors are views of that. Keys are
//! looked up on the caller's thread; one other thread reads window after window.
//!
//! # Invariants
//! - Every key is answered once, in its place: with its tensor, or with what is wrong with it.
//! - Arenas that hold a tensor which was not handed out yet, and the one that may be used again, are together no longer than
//!   the lookahead; but one window is always under way, if only of a single tensor that is longer.
//! - The thread keeps no store open: it ends after the read that it is at when the stream is dropped.

use std::collections::VecDeque;
use std::fmt;
use std::iter::Fuse;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use alight_format::IndexEntry;

use crate::config::{STREAM_KEYS_MAX, STREAM_LOOKAHEAD_BYTES, STREAM_WINDOWS};
use crate::device::{Device, DeviceBuffer};
use crate::error::{Error, Result};
use crate::index::Version;
use crate::io::Steps;
use crate::store::core::Core;
use crate::store::read::Planned;
use crate::store::snapshot::Snapshot;
use crate::tensor::Tensor;

/// An iterator over the tensors of some keys in the order of the keys, read ahead; made by [`Store::stream`](crate::Store::stream).
///
/// A key that is not there, a value that is damaged and a read that fails are errors in their place, and what follows comes all
/// the same. After [`Error::Timeout`] and [`Error::Closed`] it ends. Dropping it ends the reading ahead, and waits for nothing.
///
/// # Memory
/// What was read and not handed out yet takes at most [`lookahead`](Stream::lookahead) bytes of the device, or one tensor where
/// that is longer. A tensor that is held keeps its window: up to a quarter of the lookahead, or itself. Who keeps a few of
/// many copies them. On the host, small values that lie apart take a block (4 KiB) each.
///
/// Host memory: some hundred bytes for each key of the windows, of at most 16,384 keys each, and the ring of slots for a GPU.
#[must_use = "a stream reads nothing until it is asked for a tensor"]
pub struct Stream<I> {
    // Dropped first: the thread reads no more, and then the snapshot lets the store go.
    worker: Option<Worker>,
    keys: Fuse<I>,
    snapshot: Snapshot,
    device: Device,
    lookahead_bytes: u64,
    /// Keys that were looked up for a window to come, and the bytes of their values.
    pending: VecDeque<Item>,
    pending_bytes: u64,
    /// What was found to be the next window, and had no room yet.
    next: Option<Window>,
    /// In the order of the keys; tensors are handed out of the first.
    windows: VecDeque<Window>,
    /// The arena of the last window that was handed out whole: used again when the caller holds none of its tensors.
    spent: Option<Arc<DeviceBuffer>>,
    ended: bool,
}

/// What a key led to.
enum Item {
    Value(Arc<IndexEntry>),
    Failed(Error),
}

/// Keys whose values are read together.
struct Window {
    items: VecDeque<Item>,
    /// How many of its values were handed out.
    values_out: usize,
    /// Nothing where there is no value among the items.
    planned: Option<Arc<Planned>>,
    arena: Arena,
}

/// Where the bytes of a window are.
enum Arena {
    /// Nowhere: they are to be read one by one.
    None,
    OnItsWay {
        bytes: u64,
        outcome: Receiver<Result<DeviceBuffer>>,
    },
    There(Arc<DeviceBuffer>),
}

impl Arena {
    fn bytes(&self) -> u64 {
        match self {
            Arena::None => 0,
            Arena::OnItsWay { bytes, .. } => *bytes,
            Arena::There(arena) => arena.len_bytes(),
        }
    }
}

impl<I: Iterator> Stream<I>
where
    I::Item: AsRef<[u8]>,
{
    pub(crate) fn new(keys: I, snapshot: Snapshot, device: &Device) -> Self {
        Self {
            worker: None,
            keys: keys.fuse(),
            snapshot,
            device: device.clone(),
            lookahead_bytes: STREAM_LOOKAHEAD_BYTES,
            pending: VecDeque::new(),
            pending_bytes: 0,
            next: None,
            windows: VecDeque::new(),
            spent: None,
            ended: false,
        }
    }

    /// How many bytes of the device to fill ahead at most; 128 MiB at first. It is read in windows of a quarter of them: from 32
    /// MiB on each goes at the rate of a large `get_many`. With 0 each tensor is read when it is asked for.
    pub fn lookahead(mut self, bytes: u64) -> Self {
        self.lookahead_bytes = bytes;
        self
    }

    /// Has read what there is room for.
    fn read_ahead(&mut self) {
        while self.windows.len() < STREAM_WINDOWS {
            let Some(window) = self.next.take().or_else(|| self.gather()) else { return };
            let Some(planned) = &window.planned else {
                self.windows.push_back(window);
                continue;
            };
            let needed = planned.arena_bytes();
            // One that the caller still has tensors of is his alone from here on.
            let spent = self.spent.take().and_then(|spent| Arc::try_unwrap(spent).ok());
            let usable = needed..=needed.max(self.window_bytes());
            let spent = spent.filter(|spent| usable.contains(&spent.len_bytes()));
            let bytes = match &spent {
                Some(spent) => spent.len_bytes(),
                // The same length for all but the last, so that one serves for the next.
                None if self.pending.is_empty() => needed,
                None => needed.max(self.window_bytes()),
            };
            let taken: u64 = self.windows.iter().map(|window| window.arena.bytes()).sum();
            if taken > 0 && taken.saturating_add(bytes) > self.lookahead_bytes {
                self.spent = spent.map(Arc::new);
                self.next = Some(window);
                return;
            }
            let window = self.begin(window, spent, bytes);
            self.windows.push_back(window);
        }
    }

    /// The next window: as many keys as fit, and one at least; `None` after the last key.
    fn gather(&mut self) -> Option<Window> {
        let window_bytes = self.window_bytes();
        // One more than fits, so that the last window is known for it.
        while self.pending.len() <= STREAM_KEYS_MAX && self.pending_bytes <= window_bytes {
            let Some(key) = self.keys.next() else { break };
            let found = self.snapshot.core().and_then(|core| core.entry(self.snapshot.version(), key.as_ref()));
            let item = found.map_or_else(Item::Failed, Item::Value);
            self.pending_bytes += item.len_bytes();
            self.pending.push_back(item);
        }
        let (mut count, mut bytes) = (0, 0);
        for item in self.pending.iter().take(STREAM_KEYS_MAX) {
            bytes += item.len_bytes();
            if count > 0 && bytes > window_bytes {
                break;
            }
            count += 1;
        }
        let planned = loop {
            let entries: Vec<_> = self.pending.iter().take(count).filter_map(Item::entry).cloned().collect();
            let planned = (!entries.is_empty()).then(|| Planned::new(&entries, &self.device));
            // What lies between the values takes room too: then fewer of them.
            match &planned {
                Some(planned) if planned.arena_bytes() > window_bytes && count > 1 => count /= 2,
                _ => break planned,
            }
        };
        let items: VecDeque<Item> = self.pending.drain(..count).collect();
        self.pending_bytes -= items.iter().map(Item::len_bytes).sum::<u64>();
        (!items.is_empty()).then_some(Window { items, values_out: 0, planned, arena: Arena::None })
    }

    /// Has a window read into an arena of so many bytes.
    fn begin(&mut self, mut window: Window, arena: Option<DeviceBuffer>, bytes: u64) -> Window {
        let Some(planned) = &window.planned else { return window };
        let (sender, outcome) = channel();
        let entries = window.items.iter().filter_map(Item::entry).cloned().collect();
        let job = Job { entries, planned: Arc::clone(planned), arena, bytes, outcome: sender };
        let (snapshot, device) = (&self.snapshot, &self.device);
        self.worker.get_or_insert_with(|| Worker::start(snapshot, device)).take(job);
        window.arena = Arena::OnItsWay { bytes, outcome };
        window
    }

    fn window_bytes(&self) -> u64 {
        self.lookahead_bytes / STREAM_WINDOWS as u64
    }

    /// The tensor of an entry, which is the next value of the first window.
    fn hand_out(&mut self, entry: &Arc<IndexEntry>) -> Result<Tensor> {
        let window = self.windows.front_mut().expect("the entry is of the first window");
        let index = window.values_out;
        window.values_out += 1;
        if let Arena::OnItsWay { outcome, .. } = &window.arena {
            window.arena = match outcome.recv() {
                Ok(Ok(arena)) => Arena::There(Arc::new(arena)),
                Ok(Err(error @ Error::Timeout { .. })) => return Err(error),
                Ok(Err(error)) => {
                    // Which of its values is to blame shows when each is read by itself.
                    tracing::debug!(%error, "a window could not be read; its values are read one by one");
                    Arena::None
                }
                Err(_) => Arena::None,
            };
        }
        if let (Arena::There(arena), Some(planned)) = (&window.arena, &window.planned) {
            return Tensor::from_arena(entry.dtype, &entry.shape, arena, planned.arena_offset(index), entry.length);
        }
        let core = self.snapshot.core()?;
        let mut tensors =
            core.read_many(std::slice::from_ref(entry), &self.device).map_err(|error| core.explain(error))?;
        Ok(tensors.pop().expect("one entry makes one tensor"))
    }

    /// The answer to the next key.
    fn answer(&mut self) -> Option<Result<Tensor>> {
        if let Err(error) = self.snapshot.core() {
            return Some(Err(error));
        }
        loop {
            self.read_ahead();
            match self.windows.front_mut()?.items.pop_front() {
                Some(Item::Value(entry)) => return Some(self.hand_out(&entry)),
                Some(Item::Failed(error)) => return Some(Err(error)),
                None => {
                    if let Some(Window { arena: Arena::There(arena), .. }) = self.windows.pop_front() {
                        self.spent = Some(arena);
                    }
                }
            }
        }
    }
}

impl<I: Iterator> Iterator for Stream<I>
where
    I::Item: AsRef<[u8]>,
{
    type Item = Result<Tensor>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let answer = self.answer();
        if matches!(answer, None | Some(Err(Error::Timeout { .. } | Error::Closed))) {
            // Nothing more is read, and nothing kept.
            self.ended = true;
            self.worker = None;
            self.windows.clear();
            (self.next, self.spent) = (None, None);
        }
        answer
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        if self.ended {
            return (0, Some(0));
        }
        let looked_up = self.windows.iter().chain(&self.next).map(|window| window.items.len()).sum::<usize>();
        let ahead = looked_up + self.pending.len();
        // It may end before its time.
        (0, self.keys.size_hint().1.and_then(|most| most.checked_add(ahead)))
    }
}

impl Item {
    fn entry(&self) -> Option<&Arc<IndexEntry>> {
        match self {
            Item::Value(entry) => Some(entry),
            Item::Failed(_) => None,
        }
    }

    fn len_bytes(&self) -> u64 {
        self.entry().map_or(0, |entry| entry.length)
    }
}

/// A window to be read.
struct Job {
    entries: Vec<Arc<IndexEntry>>,
    planned: Arc<Planned>,
    /// One that was used before; else one of `bytes` bytes is taken.
    arena: Option<DeviceBuffer>,
    bytes: u64,
    outcome: Sender<Result<DeviceBuffer>>,
}

/// The thread that reads for one stream. Dropping it ends the read that it is at, and waits for nothing.
struct Worker {
    reads: Reads,
    /// `None` where the system gave no thread: then who asks reads.
    jobs: Option<Sender<Job>>,
}

/// What windows are read from, and whether they are wanted.
#[derive(Clone)]
struct Reads {
    core: Arc<Core>,
    /// Keeps what it shows from being given back, as the stream's snapshot does while that lives.
    _version: Arc<Version>,
    device: Device,
    steps: Arc<Steps>,
}

impl Worker {
    fn start(snapshot: &Snapshot, device: &Device) -> Self {
        let (core, version) = snapshot.parts();
        let reads = Reads { core, _version: version, device: device.clone(), steps: Arc::default() };
        let (sender, jobs) = channel::<Job>();
        let own = reads.clone();
        let spawned = thread::Builder::new().name("alight-stream".into()).spawn(move || {
            // Ends when the stream is gone.
            jobs.into_iter().for_each(|job| own.read(job));
        });
        let jobs = spawned
            .inspect_err(|error| tracing::warn!(%error, "no thread for a stream; it does not read ahead"))
            .map(|_| sender)
            .ok();
        Self { reads, jobs }
    }

    fn take(&self, job: Job) {
        let left = match &self.jobs {
            Some(jobs) => jobs.send(job).err().map(|refused| refused.0),
            None => Some(job),
        };
        if let Some(job) = left {
            self.reads.read(job);
        }
    }
}

impl Reads {
    fn read(&self, job: Job) {
        let Job { entries, planned, arena, bytes, outcome } = job;
        if !self.steps.is_wanted() {
            return;
        }
        // On a GPU never a run of a slab, which takes more than was asked for; there are few of them, used again and again.
        let take = if self.device.is_host() { Device::allocate_to_be_filled } else { Device::allocate };
        let arena = arena.map_or_else(|| take(&self.device, bytes), Ok);
        let read = arena.and_then(|mut arena| {
            self.core.read_planned(&entries, &planned, &mut arena, Some(&self.steps))?;
            Ok(arena)
        });
        // Who is gone wants nothing any more.
        let _ = outcome.send(read);
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.reads.steps.abandon();
    }
}

impl<I> fmt::Debug for Stream<I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (bytes, windows) = (self.lookahead_bytes, self.windows.len());
        write!(f, "Stream({:?} to {}, {bytes} bytes ahead, {windows} windows)", self.snapshot, self.device)
    }
}

#[cfg(test)]
mod tests;
