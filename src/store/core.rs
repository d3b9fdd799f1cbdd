//! What all handles of one open store share.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use alight_format::{Manifest, SegmentRecord};
use parking_lot::Condvar;

use crate::config::{DEAD_BYTES_STEP, FLUSH_PATIENCE, OVERLAY_BACKLOG_FACTOR};
use crate::error::{Error, Result};
use crate::index::Version;
use crate::io::{Routes, Steps, Watched};
use crate::metrics::Counters;
use crate::storage::{BufferPool, Storage, StorageLock};
use crate::store::commit::{Committer, Queued};
use crate::store::distrust;
use crate::store::flush::Occasion;
use crate::store::group::Group;
use crate::store::layout::Layout;
use crate::store::limit::{self, Limit};
use crate::store::open::Opened;
use crate::store::options::{Durability, Maintenance, StoreOptions};
use crate::store::prefetch::Prefetcher;
use crate::store::publish::{Change, count_late, publish};
use crate::store::reclaim::Reclaim;
use crate::store::segment::{Accounting, Segment, Segments};
use crate::store::snapshot::Snapshots;
use crate::store::unsettled;
use crate::store::watch::go_on;
use crate::sync::lock::{Mutex, RwLock};

/// An open store's parts.
pub(crate) struct Core {
    pub(crate) layout: Layout,
    pub(crate) storage: Arc<dyn Storage>,
    pub(crate) segments: Arc<Segments>,
    /// Shared, like the segments and the routes, with reads in flight, which may outlive the store.
    pub(crate) counters: Arc<Counters>,
    pub(crate) routes: Arc<Routes>,
    /// What fetches ahead, where that was asked for.
    pub(crate) prefetcher: Option<Arc<Prefetcher>>,
    /// The threads of what has a deadline, and the deadlines of reads and of writes.
    pub(crate) watched: Arc<Watched>,
    pub(crate) deadline: Option<Duration>,
    pub(crate) write_deadline: Option<Duration>,
    /// Of those who lead groups of commits.
    pub(crate) commit_steps: Arc<Steps>,
    pub(crate) buffers: Arc<BufferPool>,
    /// Whether what lies on whole pages is lent to whoever writes it; not any more once it was copied all the same.
    pub(crate) lends: AtomicBool,
    pub(crate) durability: Durability,
    pub(crate) small_commit_bytes_max: u64,
    pub(crate) closed: Arc<AtomicBool>,
    /// The generation of the manifest that a reader's view began with.
    pub(crate) generation: u64,
    /// Shared by commits in flight; taken alone by whoever closes the store, so that it waits for them.
    pub(crate) gate: RwLock<()>,
    /// Snapshots that callers hold.
    pub(crate) snapshots: Snapshots,
    version: RwLock<Arc<Version>>,
    /// Held while commits are made visible: they are taken and published under one lock, so they keep their order. So is
    /// whatever else changes the version or the accounts.
    publishing: Mutex<()>,
    writer: Option<Writer>,
}

/// What only a writer has.
pub(crate) struct Writer {
    pub(crate) committer: Committer,
    /// Where small commits gather.
    pub(crate) group: Group<Queued>,
    /// The manifest as it is on the disk. Held through every flush, so there is one at a time.
    pub(crate) manifest: Mutex<Manifest>,
    /// The highest generation of a manifest that was ever to be put in place.
    pub(crate) attempted: AtomicU64,
    pub(crate) maintenance: Maintenance,
    pub(crate) overlay_entries_max: usize,
    /// What waits to be given back. Taken after the manifest's lock, before the publisher's.
    pub(crate) reclaim: Mutex<Reclaim>,
    /// Held by the one compaction at a time.
    pub(crate) compacting: Mutex<()>,
    /// How fast compaction copies in the background; not at all without.
    pub(crate) background_bytes_per_second: Option<u64>,
    /// How much may be wasted before it does.
    pub(crate) background_slack_bytes: u64,
    /// How many bytes the store may hold, where that is limited.
    pub(crate) limit: Option<Arc<Limit>>,
    /// Bytes of values that keys lead to.
    pub(crate) live: AtomicU64,
    /// Bytes of values that died since the index was last written out.
    pub(crate) died: AtomicU64,
    /// After how many of them space is given back.
    dead_step: AtomicU64,
    /// What the maintenance thread waits for, and what those wait for who wait for it.
    pub(crate) wanted: parking_lot::Mutex<Wanted>,
    pub(crate) signal: Condvar,
    /// Shared with what is under way: it is let go when all of that has ended.
    pub(crate) lock: Mutex<Option<Arc<dyn StorageLock>>>,
}

/// The state of the maintenance thread's work.
#[derive(Debug, Default)]
pub(crate) struct Wanted {
    pub(crate) flush: bool,
    pub(crate) shutdown: bool,
    /// Whether it has ended.
    pub(crate) ended: bool,
    /// Flushes done since the store was opened, failed ones included.
    pub(crate) flushes: u64,
    pub(crate) last_failure: Option<String>,
}

impl Core {
    pub(crate) fn new(
        opened_layout: Layout,
        options: &StoreOptions,
        watched: Arc<Watched>,
        segments: Arc<Segments>,
        version: Version,
        generation: u64,
        writer: Option<Writer>,
    ) -> Self {
        let counters = Arc::default();
        let routes = Arc::new(Routes::new(options.route, options.pinned_bytes_max, options.cufile.clone()));
        let prefetcher = options.prefetch.map(|config| {
            Arc::new(Prefetcher::new(config, Arc::clone(&routes), Arc::clone(&counters), options.deadline))
        });
        Self {
            layout: opened_layout,
            storage: Arc::clone(&options.storage),
            segments,
            counters,
            routes,
            prefetcher,
            commit_steps: watched.steps(),
            watched,
            deadline: options.deadline,
            write_deadline: options.write_deadline,
            buffers: Arc::default(),
            lends: AtomicBool::new(true),
            durability: options.durability,
            small_commit_bytes_max: options.small_commit_bytes_max,
            closed: Arc::default(),
            generation,
            gate: RwLock::default(),
            snapshots: Snapshots::default(),
            version: RwLock::new(Arc::new(version)),
            publishing: Mutex::default(),
            writer,
        }
    }

    /// A reader's view of another moment, of the same open store.
    pub(crate) fn moved_to(&self, opened: Opened) -> Core {
        Core {
            layout: opened.layout,
            storage: Arc::clone(&self.storage),
            segments: opened.segments,
            counters: Arc::clone(&self.counters),
            routes: Arc::clone(&self.routes),
            prefetcher: self.prefetcher.clone(),
            commit_steps: Arc::clone(&self.commit_steps),
            watched: Arc::clone(&self.watched),
            deadline: self.deadline,
            write_deadline: self.write_deadline,
            snapshots: Arc::clone(&self.snapshots),
            buffers: Arc::clone(&self.buffers),
            lends: AtomicBool::new(true),
            durability: self.durability,
            small_commit_bytes_max: self.small_commit_bytes_max,
            closed: Arc::clone(&self.closed),
            generation: opened.manifest.generation,
            gate: RwLock::default(),
            version: RwLock::new(Arc::new(opened.version)),
            publishing: Mutex::default(),
            writer: None,
        }
    }

    /// The latest published state.
    pub(crate) fn version(&self) -> Arc<Version> {
        Arc::clone(&self.version.read())
    }

    /// The latest published state with the accounts of its segments, but for those that no manifest names any more.
    pub(crate) fn version_and_accounts(&self) -> (Arc<Version>, Vec<(Arc<Segment>, Accounting)>) {
        let _turn = self.publishing.lock();
        let kept = self.segments.all().into_iter().filter(|segment| !segment.is_condemned());
        let accounts = kept.map(|segment| (Arc::clone(&segment), *segment.accounting.lock())).collect();
        (self.version(), accounts)
    }

    /// The write side.
    pub(crate) fn writer(&self) -> Result<&Writer> {
        self.writer.as_ref().ok_or_else(|| Error::ReadOnly { path: self.layout.root().to_path_buf() })
    }

    pub(crate) fn is_read_only(&self) -> bool {
        self.writer.is_none()
    }

    pub(crate) fn check_open(&self) -> Result<()> {
        if self.closed.load(Ordering::Acquire) { Err(Error::Closed) } else { Ok(()) }
    }

    /// Makes visible what may be.
    pub(crate) fn publish(&self) {
        let Some(writer) = &self.writer else { return };
        let _turn = self.publishing.lock();
        let commits = writer.committer.take_publishable();
        if commits.is_empty() {
            return;
        }
        let mut version = Version::clone(&self.version());
        let mut all = Change::default();
        for commit in commits {
            all += publish(&mut version, &self.segments, commit);
        }
        *self.version.write() = Arc::new(version);
        writer.died.fetch_add(all.died + all.overtaken, Ordering::Relaxed);
        // After the version: who reads this and then a version never counts twice what died.
        writer.live.fetch_add(all.born, Ordering::AcqRel);
        writer.live.fetch_sub(all.died, Ordering::AcqRel);
    }

    /// The latest published state, and the segments as of that very state: all that a manifest about it would name.
    pub(crate) fn view(&self) -> Result<(Arc<Version>, Vec<SegmentRecord>)> {
        // Segments are condemned together or not at all: of two, one may hold the deletes of what the other puts.
        let _none_is_condemned = self.writer.as_ref().map(|writer| writer.reclaim.lock());
        self.change_version(|version| {
            self.count_late_in(version)?;
            let segments = self.segments.all();
            let kept = segments.iter().filter(|segment| !segment.is_condemned());
            Ok((Arc::new(version.clone()), kept.map(|segment| segment.record()).collect()))
        })
    }

    /// Has the accounts of the segments tell what every commit made die, where the index could not be read when one was
    /// published. Reads only then; fails where it cannot be read now either.
    pub(crate) fn count_late(&self) -> Result<()> {
        if self.version().uncounted.is_empty() {
            return Ok(());
        }
        self.change_version(|version| self.count_late_in(version))
    }

    /// The same within a [`change`](Core::change_version) of the version.
    pub(crate) fn count_late_in(&self, version: &mut Version) -> Result<()> {
        let mut died = 0;
        let outcome = count_late(version, &self.segments, &mut died);
        if let Some(writer) = &self.writer {
            writer.died.fetch_add(died, Ordering::Relaxed);
            writer.live.fetch_sub(died, Ordering::AcqRel);
        }
        outcome
    }

    /// Replaces the version by what `change` makes of it, with no commit published in between.
    pub(crate) fn change_version<T>(&self, change: impl FnOnce(&mut Version) -> T) -> T {
        let _turn = self.publishing.lock();
        let mut version = Version::clone(&self.version());
        let outcome = change(&mut version);
        *self.version.write() = Arc::new(version);
        outcome
    }

    /// Whether so much died that space is to be given back.
    pub(crate) fn much_died(&self) -> bool {
        self.writer
            .as_ref()
            .is_some_and(|writer| writer.died.load(Ordering::Relaxed) >= writer.dead_step.load(Ordering::Relaxed))
    }

    /// Counts anew what dies, from the state that these lines describe.
    pub(crate) fn set_dead_step(&self, records: &[SegmentRecord]) {
        let Some(writer) = &self.writer else { return };
        let live: u64 = records.iter().map(|record| record.live_bytes).sum();
        writer.dead_step.store(DEAD_BYTES_STEP.max(live / 8), Ordering::Relaxed);
        writer.died.store(0, Ordering::Relaxed);
    }

    /// Has the index written out when enough has gathered in memory, or died on the disk.
    pub(crate) fn maintain_when_due(self: &Arc<Self>) -> Result<()> {
        let writer = self.writer()?;
        if self.version().overlay.len() < writer.overlay_entries_max && !self.much_died() {
            return Ok(());
        }
        match writer.maintenance {
            // The commit that brought this about is done and durable; a failed flush is not its failure. It is
            // counted, and `await_room` refuses commits should it last.
            Maintenance::Inline => {
                let _ = self.watch_write("flush", |core| core.flush_counted(Occasion::Full));
            }
            Maintenance::Background => {
                writer.wanted.lock().flush = true;
                writer.signal.notify_all();
            }
        }
        Ok(())
    }

    /// Waits while more keys are in memory than there should be, for as long as they are being written out.
    pub(crate) fn await_room(self: &Arc<Self>) -> Result<()> {
        let writer = self.writer()?;
        let limit = writer.overlay_entries_max.saturating_mul(OVERLAY_BACKLOG_FACTOR);
        let crowded = || {
            let version = self.version();
            version.overlay.len() + version.frozen.len() >= limit
        };
        if !crowded() {
            return Ok(());
        }
        if writer.maintenance == Maintenance::Inline {
            return self.watch_write("flush", |core| core.flush_counted(Occasion::Full));
        }
        let started = Instant::now();
        let mut wanted = writer.wanted.lock();
        let before = wanted.flushes;
        while crowded() {
            if let Some(cause) = wanted.last_failure.as_ref().filter(|_| wanted.flushes > before) {
                return Err(Error::WritesRefused { cause: format!("the index cannot be written out: {cause}") });
            }
            if started.elapsed() > FLUSH_PATIENCE {
                return Err(Error::WritesRefused { cause: "the index is not written out in time".into() });
            }
            wanted.flush = true;
            writer.signal.notify_all();
            writer.signal.wait_for(&mut wanted, std::time::Duration::from_millis(50));
        }
        Ok(())
    }
}

impl Writer {
    pub(crate) fn new(
        committer: Committer,
        manifest: Manifest,
        options: &StoreOptions,
        lock: Box<dyn StorageLock>,
        live_bytes: u64,
    ) -> Self {
        Self {
            committer,
            group: Group::default(),
            attempted: AtomicU64::new(manifest.generation),
            manifest: Mutex::new(manifest),
            maintenance: options.maintenance,
            overlay_entries_max: options.overlay_entries_max,
            reclaim: Mutex::default(),
            compacting: Mutex::default(),
            background_bytes_per_second: options.background_compaction,
            background_slack_bytes: options.background_slack_bytes,
            limit: limit::of_options(options.max_bytes, options.eviction),
            live: AtomicU64::new(live_bytes),
            died: AtomicU64::new(0),
            dead_step: AtomicU64::new(DEAD_BYTES_STEP),
            wanted: parking_lot::Mutex::default(),
            signal: Condvar::new(),
            lock: Mutex::new(Some(lock.into())),
        }
    }

    pub(crate) fn has_thread(&self) -> bool {
        self.maintenance == Maintenance::Background
    }
}

impl Core {
    /// Ends the life of a writer: everything durable, the index on the disk, no space taken ahead.
    pub(crate) fn settle_and_trim(&self) -> Result<()> {
        let writer = self.writer()?;
        writer.committer.check()?;
        writer.committer.sync_through(writer.committer.last_written())?;
        self.publish();
        // First the space that was taken ahead, so that on a full disk the index has room.
        writer.committer.trim()?;
        self.flush_counted(Occasion::Closing)
    }

    /// Removes files that a crash left behind and no manifest names.
    pub(crate) fn remove_leftovers(&self, leftovers: &[PathBuf]) -> Result<()> {
        for path in leftovers {
            go_on("open", path)?;
            self.storage.remove(path).map_err(Error::io("remove", path))?;
        }
        Ok(())
    }

    /// Removes segments that an earlier process condemned, or leaves them to later where somebody may see them.
    pub(crate) fn take_over_condemned(&self, files: Vec<(PathBuf, u64)>, generation: u64) -> Result<()> {
        self.writer()?.reclaim.lock().take_over(files, generation);
        self.reclaim()
    }

    /// After recovery cut torn commits: writes the manifest that says where the cut segments end, and only then gives
    /// back what lay behind.
    pub(crate) fn forget_cut_tails(&self, cut: &[Arc<Segment>]) -> Result<()> {
        self.flush(Occasion::Recovered)?;
        distrust::clear(&*self.storage, &self.layout)?;
        unsettled::clear(&*self.storage, &self.layout)?;
        for segment in cut {
            go_on("open", &segment.path)?;
            let end = segment.accounting.lock().end;
            let file = self.segments.file_for_append(segment)?;
            file.truncate(end).map_err(Error::io("trim", &segment.path))?;
        }
        Ok(())
    }
}
