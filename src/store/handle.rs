//! The handle that callers hold.

use std::fmt;
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

use crate::device::{Device, DeviceBuffer};
use crate::error::{Error, Result};
use crate::io::Watched;
use crate::metrics::Metrics;
use crate::store::backup::{BackupProgress, BackupReport, back_up};
use crate::store::batch::Batch;
use crate::store::commit::{Committer, Deleted};
use crate::store::compact::{CompactOptions, CompactProgress, CompactReport};
use crate::store::core::{Core, Writer};
use crate::store::open;
use crate::store::options::StoreOptions;
use crate::store::refresh::Turns;
use crate::store::scan::Scan;
use crate::store::snapshot::Snapshot;
use crate::store::stat::Stat;
use crate::store::stream::Stream;
use crate::store::verify::{VerifyProgress, VerifyReport};
use crate::store::watch::{close_gate, watch_apart};
use crate::sync::lock::{Mutex, RwLock};
use crate::tensor::{Tensor, TensorInfo, TensorRef};
use crate::trace::scope;

/// An open store: tensors by key, in one directory.
///
/// A handle: cloning it is cheap, and clones may be used from any number of threads at once. The store is closed by
/// [`close`](Store::close), or when the last clone and the last snapshot are dropped; closing explicitly is how to learn
/// of an error.
///
/// Calls of many threads are answered as if the store did one thing at a time: a put, a delete, a batch, and a get of one key or of
/// many take effect at one moment between call and return, whatever else goes on (they are linearisable, also together). A scan,
/// a snapshot and a backup show one state, which was the store's at a moment of the call that made them. What is answered
/// with [`Error::Closed`] changed nothing. A store that was opened for reading only shows one state too: with all that was
/// acknowledged before it was opened or last [refreshed](Store::refresh), and nothing that was begun afterwards.
///
/// ```
/// use alight::{Device, Store};
///
/// let directory = tempfile::tempdir().expect("a temporary folder");
/// let store = Store::create(directory.path().join("model.alight"))?;
/// store.put("greeting", b"hello")?;
/// let tensor = store.get("greeting", &Device::host())?;
/// assert_eq!(tensor.as_host(), Some(&b"hello"[..]));
/// store.close()?;
/// # Ok::<(), alight::Error>(())
/// ```
#[derive(Clone)]
pub struct Store {
    open: Arc<Open>,
}

/// What the last handle closes.
struct Open {
    path: PathBuf,
    /// What is seen now. A writer's is one and the same from beginning to end; a reader's is replaced by a refresh.
    core: RwLock<Arc<Core>>,
    /// Of those who look for a newer one.
    refreshes: Arc<Turns>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Store {
    /// Opens the store at `path` for reading and writing. See [`StoreOptions::open`].
    ///
    /// # Errors
    /// As [`StoreOptions::open`].
    pub fn open(path: impl AsRef<Path>) -> Result<Store> {
        Self::options().open(path)
    }

    /// Makes a new store at `path`, a directory that is absent or empty, and opens it.
    ///
    /// # Errors
    /// [`Error::AlreadyExists`] where a store is already; else as [`StoreOptions::open`].
    pub fn create(path: impl AsRef<Path>) -> Result<Store> {
        Self::options().create_new(true).open(path)
    }

    /// Options to open or create a store with.
    pub fn options() -> StoreOptions {
        StoreOptions::default()
    }

    pub(crate) fn open_with(path: &Path, options: StoreOptions) -> Result<Store> {
        let _scope = scope!("open", path = %path.display());
        let deadline = if options.read_only { options.deadline } else { options.write_deadline };
        let (watched, path) = (Arc::<Watched>::default(), path.to_path_buf());
        let (threads, at) = (Arc::clone(&watched), path.clone());
        watch_apart(&watched, "open", &path, deadline, |()| {}, move |_| Self::assemble(&at, &options, threads))
    }

    /// Opens what lies at `path`, and makes a store of its parts. The threads become the store's.
    fn assemble(path: &Path, options: &StoreOptions, watched: Arc<Watched>) -> Result<Store> {
        let opened = open::open(path, options)?;
        let Some(writing) = opened.writing else {
            let generation = opened.manifest.generation;
            let core = Core::new(opened.layout, options, watched, opened.segments, opened.version, generation, None);
            return Ok(Store { open: Arc::new(Open::new(Arc::new(core), None)) });
        };
        let committer = Committer::new(
            Arc::clone(&opened.segments),
            opened.manifest.segment_bytes,
            opened.manifest.generation,
            opened.version.seq,
            writing.tails,
        );
        let live_bytes = opened.segments.all().iter().map(|segment| segment.accounting.lock().live_bytes).sum();
        let generation = opened.manifest.generation;
        let writer = Writer::new(committer, opened.manifest, options, writing.lock, live_bytes);
        let has_thread = writer.has_thread();
        let (layout, segments, version) = (opened.layout, opened.segments, opened.version);
        let core = Arc::new(Core::new(layout, options, watched, segments, version, generation, Some(writer)));
        if !writing.cut.is_empty() || writing.distrusted {
            core.forget_cut_tails(&writing.cut)?;
        }
        // What no manifest names any more. One that could still come back after a power cut would, by now, not.
        core.remove_leftovers(&writing.leftovers)?;
        core.take_over_condemned(writing.condemned, generation)?;
        let thread = if has_thread {
            let core = Arc::clone(&core);
            let named = std::thread::Builder::new().name("alight-index".into());
            let spawned = named.spawn(move || core.maintenance_loop());
            Some(spawned.map_err(Error::io("start a thread for", path))?)
        } else {
            None
        };
        Ok(Store { open: Arc::new(Open::new(core, thread)) })
    }

    /// The parts, unless the store was closed.
    pub(crate) fn core(&self) -> Result<Arc<Core>> {
        let core = self.open.core();
        core.check_open()?;
        Ok(core)
    }

    /// Moves a store that is open for reading to the newest state that its writer has written out or, as opening does,
    /// written since; says whether there was any. All clones of the handle see it from then on; snapshots and scans that
    /// were begun before stay as they were. A store that is open for writing is always at its newest.
    ///
    /// Where nothing is new it reads the manifest, lists a directory, and reads a block for each segment that commits may go
    /// to. Else it costs what opening costs, less the index runs that are open already. Gets go on beside it, and no writer
    /// waits for it.
    ///
    /// # Errors
    /// As [`StoreOptions::open`], [`Error::Timeout`] included; then everything is as it was, and gets go on from the old state.
    /// While one refresh is stuck, each other one is given up as well.
    pub fn refresh(&self) -> Result<bool> {
        let core = self.core()?;
        if !core.is_read_only() {
            return Ok(false);
        }
        let steps = core.watched.steps();
        // Another thread may be doing it: then this one looks again afterwards.
        let turn = self.open.refreshes.take(&steps, core.deadline);
        let turn = turn.map_err(|deadline| core.given_up("refresh", self.open.path.clone(), deadline))?;
        let core = self.core()?;
        // Who gives up leaves its turn to what is stuck: nobody else need get stuck as well.
        let renew = move |core: &Arc<Core>, _: &mut dyn FnMut(())| Ok((core.renewed()?, turn));
        let (newer, _turn) = core.watch_steps("refresh", core.deadline, &steps, |()| {}, renew)?;
        let moved = newer.is_some();
        if let Some(newer) = newer {
            *self.open.core.write() = Arc::new(newer);
        }
        Ok(moved)
    }

    /// Puts a tensor under a key, in place of whatever is there, as one commit. See [`Batch::commit`] for what it means
    /// to return, and what it costs; many puts are cheaper in one [`batch`](Store::batch).
    ///
    /// The tensor may be in host memory or on a device: a `&[u8]` (stored as `u8[len]`), a [`TensorRef`] or a
    /// [`Tensor`]. From 256 KiB to 1 MiB of host memory that begin on a page of 4 KiB (a `Tensor` on the host does, and pinned
    /// memory) are not copied on their way to the disk, and must not change meanwhile by any hand: 1 MiB is durable a tenth
    /// sooner.
    ///
    /// # Errors
    /// As [`Batch::put`] and [`Batch::commit`].
    pub fn put<'a>(&self, key: impl AsRef<[u8]>, tensor: impl Into<TensorRef<'a>>) -> Result<()> {
        let mut batch = self.batch();
        batch.put(key, tensor)?;
        batch.commit()
    }

    /// Deletes a key as one commit; says whether it was there, so that of several threads that delete it one is told so.
    /// Nothing is written when it was not.
    ///
    /// # Errors
    /// As [`Batch::delete`] and [`Batch::commit`].
    pub fn delete(&self, key: impl AsRef<[u8]>) -> Result<bool> {
        let key = key.as_ref();
        self.core()?.writer()?;
        if !self.contains(key)? {
            return Ok(false);
        }
        let mut batch = self.batch();
        batch.delete(key)?;
        let deleted = Deleted::default();
        batch.commit_telling(Some(Arc::clone(&deleted)))?;
        Ok(deleted.load(Ordering::Acquire))
    }

    /// An empty batch of changes to be made as one commit.
    pub fn batch<'a>(&self) -> Batch<'a> {
        Batch::new(self.clone(), self.open.core().durability)
    }

    /// A view of the store as it is now, which later commits do not change. Costs next to nothing.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot::new(self.clone(), self.open.core())
    }

    /// What a single call sees.
    fn view(&self) -> Snapshot {
        Snapshot::of_a_call(self.clone(), self.open.core())
    }

    /// Reads a tensor to a device, verified. Blocks until it is there.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::Damaged`] when the bytes on the disk are not those that were put; what the device
    /// says when it has no room; [`Error::Timeout`] where the disk makes no progress (see [`StoreOptions::deadline`]).
    pub fn get(&self, key: impl AsRef<[u8]>, device: &Device) -> Result<Tensor> {
        self.view().get(key, device)
    }

    /// Reads a tensor's bytes into host memory of at least its length, verified; says what it read. On an error the
    /// destination's contents are unspecified.
    ///
    /// # Errors
    /// As [`get`](Store::get), and [`Error::DestinationTooSmall`].
    pub fn get_into(&self, key: impl AsRef<[u8]>, destination: &mut [u8]) -> Result<TensorInfo> {
        self.view().get_into(key, destination)
    }

    /// Reads some of a value's bytes, as `u8[len]`. Reads and verifies whole chunks of 1 MiB, and no more of them than
    /// the range touches.
    ///
    /// # Errors
    /// As [`get`](Store::get), and [`Error::RangeOutOfBounds`].
    pub fn get_range(&self, key: impl AsRef<[u8]>, range: Range<u64>, device: &Device) -> Result<Tensor> {
        self.view().get_range(key, range, device)
    }

    /// Reads several tensors, verified, into one piece of device memory of which each is a view. They come back in the
    /// order of the keys, and are read in the order of the disk.
    ///
    /// The memory is freed when the last of them is dropped. Where one key fails, all do.
    ///
    /// # Errors
    /// As [`get`](Store::get), naming the key.
    pub fn get_many<K: AsRef<[u8]>>(&self, keys: impl IntoIterator<Item = K>, device: &Device) -> Result<Vec<Tensor>> {
        self.view().get_many(keys, device)
    }

    /// As [`get_many`](Store::get_many), into memory that is there: for who loads again and again, since taking gigabytes of
    /// a GPU's memory takes longer than the bus needs for some of them. Answers where each value lies, in the order of the
    /// keys. On an error the arena's contents are unspecified.
    ///
    /// The same keys in the same store take the same places, unless a value was put again or compaction moved it.
    ///
    /// # Errors
    /// As [`get`](Store::get); [`Error::ArenaTooSmall`] with the bytes that are needed: those of the values, and up to a block
    /// (4 KiB) between two that are neighbours on the disk. Nothing was read then. After [`Error::Timeout`] a read that is stuck may
    /// have the arena's memory, and the arena is one of no bytes then.
    pub fn get_many_into<K: AsRef<[u8]>>(
        &self,
        keys: impl IntoIterator<Item = K>,
        arena: &mut DeviceBuffer,
    ) -> Result<Vec<Range<u64>>> {
        self.snapshot().get_many_into(keys, arena)
    }

    /// The tensors of some keys one after another, verified, in the order of the keys, from the store as it is now. Another
    /// thread reads ahead while the caller works: for what is used once, and larger than the device's memory.
    ///
    /// What is read ahead takes up to [`lookahead`](Stream::lookahead) bytes of the device; [`Stream`] says what holds them.
    /// Keys are taken from the iterator, and looked up, as far ahead as is read. Keys in the order in which they were put
    /// are read fastest: neighbours are one read.
    ///
    /// ```
    /// use alight::{Device, Store};
    ///
    /// # let directory = tempfile::tempdir().expect("a temporary folder");
    /// let store = Store::create(directory.path().join("features.alight"))?;
    /// store.put("a", b"one")?;
    /// store.put("b", b"two")?;
    /// for tensor in store.stream(["b", "a"], &Device::best()).lookahead(64 << 20) {
    ///     println!("{:?}", tensor?.to_host()?);
    /// }
    /// # Ok::<(), alight::Error>(())
    /// ```
    pub fn stream<I: IntoIterator>(&self, keys: I, device: &Device) -> Stream<I::IntoIter>
    where
        I::Item: AsRef<[u8]>,
    {
        self.snapshot().stream(keys, device)
    }

    /// Writes a value's bytes to `out` in order, each chunk of 1 MiB verified before it is handed on. Takes a few MiB of
    /// memory for a value of any length.
    ///
    /// # Errors
    /// As [`get`](Store::get); [`Error::Io`] when `out` fails.
    pub fn get_to_writer(&self, key: impl AsRef<[u8]>, out: &mut dyn Write) -> Result<TensorInfo> {
        self.view().get_to_writer(key, out)
    }

    /// What is known of a key's value, without reading it: about a microsecond.
    ///
    /// # Errors
    /// [`Error::InvalidKey`]; [`Error::Damaged`] when the index is.
    pub fn info(&self, key: impl AsRef<[u8]>) -> Result<Option<TensorInfo>> {
        self.view().info(key)
    }

    /// The named bytes that were put beside a value. Reads the frame of the commit that put it.
    ///
    /// # Errors
    /// As [`get`](Store::get).
    pub fn attributes(&self, key: impl AsRef<[u8]>) -> Result<Vec<(String, Vec<u8>)>> {
        self.view().attributes(key)
    }

    /// Whether a value is stored under a key.
    ///
    /// # Errors
    /// As [`info`](Store::info).
    pub fn contains(&self, key: impl AsRef<[u8]>) -> Result<bool> {
        self.view().contains(key)
    }

    /// The keys that begin with `prefix`, in order, with what is known of their values; an empty prefix means all. Sees
    /// the store as it is now.
    pub fn scan(&self, prefix: impl AsRef<[u8]>) -> Scan {
        self.view().scan(prefix)
    }

    /// Makes every commit so far survive power loss, the [`Eventual`](crate::Durability::Eventual) ones included.
    ///
    /// # Errors
    /// [`Error::Io`] when a sync fails, [`Error::Timeout`] when it does not come back: then [`Error::WritesRefused`] is the
    /// answer to every write until the store is opened again.
    pub fn sync(&self) -> Result<()> {
        let core = self.core()?;
        let _passing = core.gate.read();
        core.check_open()?;
        core.watch_commit("sync", |core| {
            let committer = &core.writer()?.committer;
            committer.sync_through(committer.last_written())?;
            core.publish();
            Ok(())
        })
    }

    /// Gives back all the space that can be: rewrites segments of which a tenth or more is wasted, removes those in which
    /// nothing lives, and punches holes where dead values lay. What a snapshot or a reader in another process still sees
    /// stays until it is gone. Commits and reads go on meanwhile; a value that is damaged stays where it is and is told.
    ///
    /// Blocks until it is done, and copies at most the bytes that live; takes 10 MiB of memory. One at a time: a second
    /// call waits for the first. What a crash cuts off is begun anew by the next call. `progress` is told the latest, on the
    /// caller's thread.
    ///
    /// # Errors
    /// [`Error::ReadOnly`], [`Error::Closed`], [`Error::WritesRefused`], [`Error::Io`], [`Error::Timeout`]. Nothing is lost by
    /// a failure.
    pub fn compact(&self, options: &CompactOptions, progress: impl FnMut(CompactProgress)) -> Result<CompactReport> {
        let (core, options) = (self.core()?, options.clone());
        core.watch("compact", core.write_deadline, progress, move |core, tell| core.compact(&options, tell))
    }

    /// How large the store is, and what of it lives. Asks the file system about every file.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Timeout`].
    pub fn stat(&self) -> Result<Stat> {
        let core = self.core()?;
        core.watch("measure", core.deadline, |()| {}, |core, _| Stat::of(core))
    }

    /// Reads everything and checks every checksum: frames, payloads, index runs, manifest, and that each key leads to
    /// what was put. Reports all damage that it finds, and changes nothing. `progress` is told the latest, on the caller's
    /// thread.
    ///
    /// # Errors
    /// Only what keeps it from looking, such as [`Error::Closed`] and [`Error::Timeout`]; damage is in the report.
    pub fn verify(&self, progress: impl FnMut(VerifyProgress)) -> Result<VerifyReport> {
        let core = self.core()?;
        core.watch("verify", core.deadline, progress, |core, tell| VerifyReport::of(core, tell))
    }

    /// Makes a backup at `path`, a directory that is absent or empty: a store of its own, with everything that is visible
    /// now, which nothing changes afterwards. See [`backup_with_progress`](Store::backup_with_progress).
    ///
    /// # Errors
    /// As [`backup_with_progress`](Store::backup_with_progress).
    pub fn backup(&self, path: impl AsRef<Path>) -> Result<BackupReport> {
        self.backup_with_progress(path, |_| {})
    }

    /// [`backup`](Store::backup), which tells how far it has come.
    ///
    /// Commits, reads and other backups go on beside it, and none of them waits. On the same file system a segment that is
    /// full gets a second name, which takes no time and no space; the others, at most a few segments, are shared or copied
    /// as far as commits reach. On another one everything is copied. What it holds is durable when this returns. It is
    /// opened like any store, to read or to go on from there: both then go their own ways, and a file with two names is
    /// never written to by either.
    ///
    /// Bytes are copied as they lie on the disk: run [`verify`](Store::verify) on the backup to know that they are sound.
    /// Works on a store that is open for reading too, beside a writer in another process.
    ///
    /// # Errors
    /// [`Error::AlreadyExists`] where something is at `path`, [`Error::Io`], and [`Error::WritesRefused`] where commits
    /// cannot be made durable any more. A backup that failed leaves nothing that opens as a store, and may be tried again
    /// at the same path, unless its parts could not be removed. After [`Error::Timeout`] that is so once the disk goes on, and
    /// what was made is taken away.
    pub fn backup_with_progress(
        &self,
        path: impl AsRef<Path>,
        progress: impl FnMut(BackupProgress),
    ) -> Result<BackupReport> {
        let (core, path) = (self.core()?, path.as_ref().to_path_buf());
        // Whoever closes the store waits: it must not change hands meanwhile.
        let _passing = core.gate.read();
        core.check_open()?;
        core.watch("backup", core.write_deadline, progress, move |core, tell| back_up(core, &path, tell))
    }

    /// What the store did since it was opened.
    pub fn metrics(&self) -> Metrics {
        let core = self.open.core();
        let mut metrics = core.counters.snapshot();
        if let Ok(writer) = core.writer() {
            metrics.segment_syncs = writer.committer.syncs.load(Ordering::Relaxed);
        }
        if let Some(prefetcher) = &core.prefetcher {
            metrics.prefetch = prefetcher.stats();
        }
        metrics
    }

    /// The store's directory.
    pub fn path(&self) -> &Path {
        &self.open.path
    }

    /// Whether the store was opened for reading only.
    pub fn is_read_only(&self) -> bool {
        self.open.core().is_read_only()
    }

    /// Makes every commit durable, writes the index out so that the next open has nothing to recover, gives back space
    /// that was taken ahead, and lets go of the lock. Every clone answers [`Error::Closed`] from then on.
    ///
    /// What the disk has and does not give back is not waited for any longer than [`StoreOptions::write_deadline`]. It keeps
    /// the store's lock, since a write may still land: the store is [`Error::Locked`] until that has ended and the last handle
    /// is dropped, or the process has ended. Dropping the last handle does the same.
    ///
    /// # Errors
    /// [`Error::Closed`] when it already was, [`Error::Timeout`], else what writing says. The store is closed either way, and
    /// nothing that was acknowledged is lost by a failure here: the next open recovers it.
    pub fn close(self) -> Result<()> {
        if self.open.core().closed.swap(true, Ordering::AcqRel) {
            return Err(Error::Closed);
        }
        self.open.shut()
    }
}

#[doc(hidden)]
impl Store {
    /// Leaves the store as a killed process would: nothing is settled, and the lock is let go. For tests.
    pub fn abandon(self) {
        let core = self.open.core();
        core.closed.store(true, Ordering::Release);
        if let Some(prefetcher) = &core.prefetcher {
            prefetcher.close();
        }
        if let Ok(writer) = core.writer() {
            writer.wanted.lock().shutdown = true;
            writer.signal.notify_all();
            if let Some(thread) = self.open.thread.lock().take() {
                let _ = thread.join();
            }
            drop(writer.lock.lock().take());
        }
    }
}

impl Open {
    fn new(core: Arc<Core>, thread: Option<JoinHandle<()>>) -> Self {
        let path = core.layout.root().to_path_buf();
        Self { path, core: RwLock::new(core), refreshes: Arc::default(), thread: Mutex::new(thread) }
    }

    fn core(&self) -> Arc<Core> {
        Arc::clone(&self.core.read())
    }

    fn shut(&self) -> Result<()> {
        let core = self.core();
        if let Some(prefetcher) = &core.prefetcher {
            prefetcher.close();
        }
        let Ok(writer) = core.writer() else { return Ok(()) };
        let stuck = || {
            let deadline = core.write_deadline.unwrap_or_default();
            Err(core.given_up("close", core.layout.root().to_path_buf(), deadline))
        };
        // Commits that are under way come to their end; later ones see that the store is closed.
        let alone = close_gate(&core.gate, &core.watched, core.write_deadline);
        writer.wanted.lock().shutdown = true;
        writer.signal.notify_all();
        let thread = self.thread.lock().take();
        // Whoever is stuck has the parts, and so the store's lock.
        if alone.is_none() || (thread.is_some() && !core.await_maintenance()) {
            return stuck();
        }
        let joined = thread.map(JoinHandle::join);
        let outcome = core.watch_commit("close", |core| core.settle_and_trim());
        // The lock goes last: whoever opens the store next finds it settled. What was given up keeps its share until it ends.
        drop(writer.lock.lock().take());
        match joined {
            Some(Err(_panic)) => Err(Error::WritesRefused { cause: "the index thread panicked".into() }),
            _ => outcome,
        }
    }
}

impl Drop for Open {
    /// Closes what was not closed. A failure is logged: everything acknowledged is on the disk, and the next open
    /// recovers it.
    fn drop(&mut self) {
        if self.core().closed.swap(true, Ordering::AcqRel) {
            return;
        }
        if let Err(error) = self.shut() {
            tracing::warn!(%error, "the store was dropped without close, and could not be settled; it will be recovered");
        }
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Store({})", self.path().display())
    }
}

// A store is opened once and used by many.
const _: () = {
    const fn shared<T: Send + Sync + Clone>() {}
    shared::<Store>();
    shared::<Snapshot>();
};
