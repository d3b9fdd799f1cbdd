//! How a store is opened.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::config;
use crate::error::{Error, Result};
use crate::io::direct::CuFileTransport;
use crate::io::{RouteChoice, Watched};
use crate::storage::{FileStorage, Storage};
use crate::store::Store;
use crate::store::limit::Eviction;
use crate::store::prefetch::PrefetchConfig;
use crate::store::rebuild::{self, RebuildProgress, RebuildReport, rebuild};
use crate::store::repair::{self, RepairProgress, RepairReport, repair};
use crate::store::watch::watch_apart;

/// When a commit counts as done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Durability {
    /// A commit returns when it survives power loss. Costs a sync, shared by all commits that wait for one.
    #[default]
    Immediate,
    /// A commit returns when it is written: it survives the end of the process, and power loss only after the next
    /// sync: an [`Immediate`](Durability::Immediate) commit, [`Store::sync`] or [`Store::close`].
    Eventual,
}

/// Who writes the index out when enough has gathered in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Maintenance {
    /// A thread of the store's own, while commits go on.
    #[default]
    Background,
    /// The commit that made it necessary, before it returns: no thread, and the same calls in the same order every
    /// time.
    Inline,
}

/// Options of a store, and the way to open it with them; made by [`Store::options`].
#[derive(Debug, Clone)]
#[must_use = "options open nothing until `open` is called"]
pub struct StoreOptions {
    pub(crate) create: Create,
    pub(crate) read_only: bool,
    pub(crate) durability: Durability,
    pub(crate) maintenance: Maintenance,
    pub(crate) segment_bytes: Option<u64>,
    pub(crate) overlay_entries_max: usize,
    pub(crate) small_commit_bytes_max: u64,
    pub(crate) pinned_bytes_max: u64,
    pub(crate) background_compaction: Option<u64>,
    pub(crate) background_slack_bytes: u64,
    pub(crate) max_bytes: Option<u64>,
    pub(crate) eviction: Option<Eviction>,
    pub(crate) route: RouteChoice,
    /// The machine's; tests put one over a simulated library here.
    pub(crate) cufile: CuFileTransport,
    pub(crate) deadline: Option<Duration>,
    pub(crate) write_deadline: Option<Duration>,
    pub(crate) prefetch: Option<PrefetchConfig>,
    pub(crate) storage: Arc<dyn Storage>,
    /// Whether it is the caller who makes a store that bears the mark of an unfinished one.
    pub(crate) unfinished: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Create {
    Never,
    IfMissing,
    New,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            create: Create::Never,
            read_only: false,
            durability: Durability::default(),
            maintenance: Maintenance::default(),
            segment_bytes: None,
            overlay_entries_max: config::OVERLAY_ENTRIES_MAX,
            small_commit_bytes_max: config::SMALL_COMMIT_BYTES_MAX,
            pinned_bytes_max: 0,
            background_compaction: Some(config::BACKGROUND_BYTES_PER_SECOND),
            background_slack_bytes: config::BACKGROUND_SLACK_BYTES,
            max_bytes: None,
            eviction: None,
            route: RouteChoice::default(),
            cufile: CuFileTransport::new(),
            deadline: Some(config::READ_DEADLINE),
            write_deadline: Some(config::WRITE_DEADLINE),
            prefetch: None,
            storage: Arc::new(FileStorage::new()),
            unfinished: false,
        }
    }
}

impl StoreOptions {
    /// Makes the store when there is none at the path. Off unless asked for.
    pub fn create(mut self, create: bool) -> Self {
        self.create = if create { Create::IfMissing } else { Create::Never };
        self
    }

    /// Makes the store, and fails when something is at the path already.
    pub fn create_new(mut self, create_new: bool) -> Self {
        self.create = if create_new { Create::New } else { Create::Never };
        self
    }

    /// Opens for reading only: needs no lock, writes nothing, works beside a live writer and on a read-only file
    /// system. What is read is the state at the time of opening, until [`Store::refresh`].
    pub fn read_only(mut self, read_only: bool) -> Self {
        self.read_only = read_only;
        self
    }

    /// Keeps up to so many bytes of the page cache pinned for a GPU, so that loading the same values again goes at the bus's
    /// full rate: on an H100, 55 GB/s instead of some 45. None at first.
    ///
    /// It is host memory that the system cannot take back while the store is open, and counts as this process's. The first load
    /// fills the page cache, the second pins what is in it (6 GiB in some 0.2 s), and every further one only copies. Gets of less
    /// than 8 MiB, and the host device, have no use for it.
    pub fn pinned_bytes_max(mut self, bytes: u64) -> Self {
        self.pinned_bytes_max = bytes;
        self
    }

    /// By which route values reach a GPU, from 8 MiB in one `get` or `get_many` on, and by which values of 8 MiB and more
    /// that are put from a GPU's memory reach the disk; [`RouteChoice::Auto`] at first. What is smaller takes the staged route
    /// always: its checksums are taken on the way. Where cuFile fails or cannot be used, the staged route serves; that is logged
    /// once and counted in [`Metrics::step_downs`](crate::Metrics::step_downs).
    pub fn route(mut self, route: RouteChoice) -> Self {
        self.route = route;
        self
    }

    /// How long a read may go without any progress before its caller gets [`Error::Timeout`]; 60 s at first, `None` for ever.
    /// Each read of up to 1 MiB that comes back, or begins, is progress (4 MiB with cuFile), and each file that is looked at. What
    /// is stuck keeps what it uses until it ends: an arena that was being read into is then left without bytes; a caller's own
    /// memory is only written to by the caller's own thread.
    ///
    /// | call | what may take no longer |
    /// |---|---|
    /// | `contains`, `info`, the lookup before each get; a scan | what of the index is not in memory; of a scan 512 keys |
    /// | `get`, `get_many`, `get_many_into` | a read, copies to the GPU included where there are several reads |
    /// | `get_into`, `get_range`, `get_to_writer`, `attributes` | a read, not the caller's writer, nor the copy of a range to a GPU |
    /// | [`open`](StoreOptions::open) for reading only, [`Store::refresh`] | a step: a file, a mebibyte |
    /// | [`Store::verify`], [`Store::stat`] | the same |
    ///
    /// What needs one read of a file that was read before is done on the caller's own thread, which begins it and waits for it
    /// (`io_submit`, told not to wait), as is a lookup of what is in memory, and several reads of less than 4 MiB into host memory
    /// where the page cache has all of them; everything else is handed to a thread of the store's
    /// own, for some 6 µs. So is a read that the system does not begin at once, as where a file system has no direct transfers.
    /// That thread, or the kernel, keeps the memory that is to be filled until the read ends, and a `get_many_into` that was given
    /// up leaves its arena to it.
    ///
    /// What is mapped can be known to be in memory, and taken back by the system before it is touched: what of the index was found
    /// there is taken to stay for ten seconds.
    ///
    /// An opening that was given up holds nothing but what it is stuck in, and lets go of it when that ends. While a refresh is
    /// stuck others are given up as well, after as long; gets go on from the state that is there.
    ///
    /// A get that is to be served by what is being fetched ahead ([`prefetch`](StoreOptions::prefetch)) waits as long for that,
    /// whatever its length, and then reads for itself.
    pub fn deadline(mut self, deadline: Option<Duration>) -> Self {
        self.deadline = deadline;
        self
    }

    /// How long a write or a sync may take before its caller gets [`Error::Timeout`]; 200 s at first, `None` for ever. That is
    /// longer than Linux takes to give up a request to a disk itself. Raise it where syncs may take as long: where a file
    /// system has no transfers past the page cache, the sync of a large commit writes all of it.
    ///
    /// | call | what may take no longer | then |
    /// |---|---|---|
    /// | [`Batch::commit`](crate::Batch::commit), `put`, `delete`, up to 1 MiB | the write and the sync, together | writes are refused |
    /// | the same, larger | 4 MiB of the payload | an error of that call alone |
    /// | | the payload's sync; the frame, its sync | writes are refused |
    /// | [`Store::sync`] | all of it | writes are refused |
    /// | [`Store::compact`], [`Store::backup`] | a step: a file, a mebibyte | an error of that call alone |
    /// | [`open`](StoreOptions::open) for writing, [`rebuild_index`](StoreOptions::rebuild_index) | the same | the lock is kept until it ends |
    /// | [`repair`](StoreOptions::repair) | the same; the sync of a value | the new store stays unfinished, and does not open |
    /// | [`Store::close`], dropping the store | all that is under way, without any progress | the lock is kept until it ends |
    ///
    /// Of a commit or a sync that was given up nobody knows what became. So the store does what it does after a failed sync: it
    /// answers [`Error::WritesRefused`] until it is opened again, reads go on, and the next open believes what was acknowledged.
    /// Those who share the write of a commit get the same answer; who comes later does not wait.
    ///
    /// Reading the tensors is done before, on the caller's thread. A copy out of a GPU that does not come back is given up as
    /// well: an error of that call alone, and what the copy uses is kept for ever. Nobody can give up a call of NVIDIA's driver
    /// that does not even take a copy; a reader of the caller's own is the caller's. Nor the call that hands the kernel a value
    /// which is put without a copy (see [`Store::put`]), and which is told not to wait for the disk.
    ///
    /// With a deadline a commit is written by a thread of the store's own, and two threads are woken for it: some 6 µs where
    /// processors are awake, up to 50 µs on a virtual machine whose processors sleep.
    pub fn write_deadline(mut self, deadline: Option<Duration>) -> Self {
        self.write_deadline = deadline;
        self
    }

    /// Fetches ahead what single gets ([`Store::get`], [`Store::get_into`]) will ask for next, once they come in the order of
    /// the disk: front to back, or in steps of about the same length, both ways. `None`, nothing, at first.
    ///
    /// From the fourth get on that shows such an order, a thread of the store's own reads on into slots on the device that the
    /// gets land on, and a get of a value that lies in them is a copy on that device, its checksum compared all the same. The
    /// slots take up to [`PrefetchConfig::memory_bytes`] of each such device, until the store is closed. Values longer than a
    /// slot, and calls that name many keys, are read as without; for those in another order, [`Store::stream`] reads ahead.
    ///
    /// It watches the gets to a device as those of one reader: threads that read at several places at once show no order, and
    /// neither do keys at random; then nothing is fetched, and a get takes about a microsecond more. Where the page cache has
    /// everything, gets to the host come sooner without: they are spared a copy. Values under 256 KiB that are in the page cache
    /// are read from there. What fails while it is fetched ahead is
    /// counted ([`Metrics::prefetch`](crate::Metrics::prefetch)), and the get reads for itself.
    pub fn prefetch(mut self, config: impl Into<Option<PrefetchConfig>>) -> Self {
        self.prefetch = config.into();
        self
    }

    /// When a commit counts as done, unless a batch says otherwise. [`Durability::Immediate`] at first.
    pub fn durability(mut self, durability: Durability) -> Self {
        self.durability = durability;
        self
    }

    /// Who writes the index out. [`Maintenance::Background`] at first.
    pub fn maintenance(mut self, maintenance: Maintenance) -> Self {
        self.maintenance = maintenance;
        self
    }

    /// The length of a segment in bytes, 16 KiB to 1 TiB, a multiple of 4096; 256 MiB at first. A commit over a quarter
    /// of it gets a segment of its own. Of an existing store this changes segments to come.
    pub fn segment_bytes(mut self, segment_bytes: u64) -> Self {
        self.segment_bytes = Some(segment_bytes);
        self
    }

    /// How many keys gather in memory before the index is written out, at least 1; 16,384 at first. A process that ends
    /// without [`Store::close`] leaves as many to be read again by the next open.
    pub fn overlay_entries_max(mut self, entries: usize) -> Self {
        self.overlay_entries_max = entries;
        self
    }

    /// How fast the store's own thread rewrites segments in which much is dead, in bytes copied per second; 128 MiB at
    /// first, and not at all with `None`. Other space is given back all the same: segments in which nothing lives, and the
    /// places of dead values of 16 KiB and more. [`Maintenance::Inline`] has no thread; there, [`Store::compact`] rewrites.
    pub fn background_compaction(mut self, bytes_per_second: Option<u64>) -> Self {
        self.background_compaction = bytes_per_second;
        self
    }

    /// The most bytes of values that keys may lead to; none at first. A commit that would pass it is refused with
    /// [`Error::Full`], or evicts others where [`eviction`](StoreOptions::eviction) says so. On the disk the store takes
    /// more for a while, until what died is given back. The limit holds for this opening of the store, and a store that is
    /// over it already takes deletes.
    pub fn max_bytes(mut self, max_bytes: u64) -> Self {
        self.max_bytes = Some(max_bytes);
        self
    }

    /// Makes the store a bounded cache: a commit that would pass [`max_bytes`](StoreOptions::max_bytes) deletes other keys,
    /// in the same commit. Evicting costs a look at the frames of the oldest segments.
    pub fn eviction(mut self, eviction: Eviction) -> Self {
        self.eviction = Some(eviction);
        self
    }

    /// Up to which payload a commit is one write and one sync. For tests, which shrink it until large commits are
    /// common; 1 MiB is what was measured.
    #[doc(hidden)]
    pub fn small_commit_bytes_max(mut self, bytes: u64) -> Self {
        self.small_commit_bytes_max = bytes.min(config::SMALL_COMMIT_BYTES_MAX);
        self
    }

    /// How much a store may waste before its thread begins to rewrite segments. For tests, which shrink it; 64 MiB is the
    /// default.
    #[doc(hidden)]
    pub fn background_slack_bytes(mut self, bytes: u64) -> Self {
        self.background_slack_bytes = bytes;
        self
    }

    /// What the store takes for the file system. The real one at first; tests put a fault-injecting twin here.
    pub fn storage(mut self, storage: Arc<dyn Storage>) -> Self {
        self.storage = storage;
        self
    }

    /// Opens the store at `path`. The work is done by a thread of the store's own, unless there is to be no deadline.
    ///
    /// Blocks while it reads the manifest and whatever was committed since the manifest was written: nothing after
    /// [`Store::close`], at most the overlay's worth of frames after a crash. Its cost does not grow with the number of
    /// keys.
    ///
    /// # Errors
    /// [`Error::NotAStore`] and [`Error::AlreadyExists`] for the wrong path, [`Error::Locked`] while another handle
    /// writes, [`Error::Newer`] for a format that this build does not know, [`Error::Damaged`] when a commit that was
    /// durable is missing: then the files are left exactly as they were. [`Error::Timeout`] where it makes no progress for
    /// [`write_deadline`](StoreOptions::write_deadline), or with [`read_only`](StoreOptions::read_only) for
    /// [`deadline`](StoreOptions::deadline): what is stuck keeps the lock until it ends, and leaves the files as any opening does
    /// that was cut off.
    pub fn open(self, path: impl AsRef<Path>) -> Result<Store> {
        self.validate()?;
        Store::open_with(path.as_ref(), self)
    }

    /// Makes the index of the store at `path` anew from its segments, and the manifest where that is missing or damaged too.
    /// For a store that does not open, or whose [`verify`](Store::verify) names the manifest or index runs.
    ///
    /// Reads every commit's frame, and no values; takes space for the new index beside the old one, which stays until the
    /// new one is durable in its place. Whatever fails, the store is as it was. Refuses while another handle writes. `progress`
    /// is told the latest, on the caller's thread.
    /// A store whose manifest is lost comes back with segments of the default length, or of those of
    /// [`segment_bytes`](StoreOptions::segment_bytes).
    ///
    /// # Errors
    /// [`Error::Locked`]; [`Error::Newer`]; [`Error::NotAStore`] where there are no segments; [`Error::Damaged`] when a
    /// commit cannot be read that counts: then [`repair`](StoreOptions::repair) salvages what is whole; [`Error::Io`];
    /// [`Error::Timeout`], after which the store is [`Error::Locked`] until what is stuck has ended. The new index is in place
    /// then only where it was its last calls that were stuck.
    pub fn rebuild_index(self, path: impl AsRef<Path>, progress: impl FnMut(RebuildProgress)) -> Result<RebuildReport> {
        self.validate()?;
        let (deadline, path) = (self.write_deadline, path.as_ref().to_path_buf());
        let at = path.clone();
        let work = move |tell: &mut dyn FnMut(_)| rebuild(&at, &self, tell);
        watch_apart(&Watched::default(), rebuild::OPERATION, &path, deadline, progress, work)
    }

    /// Salvages what is whole of the store at `source`, which may be damaged in any way, into a new store at `target`, a
    /// directory that is absent or empty. The options are those of the new store.
    ///
    /// Every key's newest value is taken whose bytes have their checksum, deletes counted; the report names the keys whose
    /// newest value is damaged, and the stretches of files that are no commits. Nothing older is put in a damaged one's
    /// place. The source is read alone, and must not be written to meanwhile. Reads every frame twice and every value once;
    /// memory does not grow with the store. The new store counts its commits from one, and does not open before it is whole.
    /// `progress` is told the latest, on the caller's thread.
    ///
    /// # Errors
    /// [`Error::NotAStore`] where the source has no segments, [`Error::Newer`] for one of a newer format,
    /// [`Error::AlreadyExists`] for the target, [`Error::Io`] where the target cannot be written, [`Error::Timeout`] where either
    /// disk is stuck. Damage is in the report.
    pub fn repair(
        self,
        source: impl AsRef<Path>,
        target: impl AsRef<Path>,
        progress: impl FnMut(RepairProgress),
    ) -> Result<RepairReport> {
        self.validate()?;
        let (deadline, source) = (self.write_deadline, source.as_ref().to_path_buf());
        let target = target.as_ref().to_path_buf();
        let at = target.clone();
        let work = move |tell: &mut dyn FnMut(_)| repair(&source, &at, &self, tell);
        watch_apart(&Watched::default(), repair::OPERATION, &target, deadline, progress, work)
    }

    /// How many entries of an index that is made anew are kept in memory before they are spilled: some 60 MiB where
    /// nothing else was asked for.
    pub(crate) fn gathered_max(&self) -> usize {
        self.overlay_entries_max.saturating_mul(16)
    }

    fn validate(&self) -> Result<()> {
        if let Some(bytes) = self.segment_bytes {
            let range = config::SEGMENT_BYTES_MIN..=config::SEGMENT_BYTES_MAX;
            if !range.contains(&bytes) || !bytes.is_multiple_of(alight_format::limits::BLOCK_BYTES) {
                return Err(Error::InvalidOption {
                    option: "segment_bytes",
                    why: format!("{bytes} is not a multiple of 4096 from {} to {}", range.start(), range.end()),
                });
            }
        }
        for (option, deadline) in [("deadline", self.deadline), ("write_deadline", self.write_deadline)] {
            if deadline == Some(Duration::ZERO) {
                return Err(Error::InvalidOption { option, why: "nothing takes no time; None is no deadline".into() });
            }
        }
        self.prefetch.as_ref().map_or(Ok(()), PrefetchConfig::validate)?;
        if self.overlay_entries_max == 0 {
            return Err(Error::InvalidOption { option: "overlay_entries_max", why: "at least 1 is needed".into() });
        }
        if self.eviction.is_some() && self.max_bytes.is_none() {
            return Err(Error::InvalidOption { option: "eviction", why: "it needs a limit, `max_bytes`".into() });
        }
        if self.background_compaction == Some(0) {
            return Err(Error::InvalidOption {
                option: "background_compaction",
                why: "0 bytes per second would never end; `None` is for no compaction".into(),
            });
        }
        if self.read_only && self.create != Create::Never {
            return Err(Error::InvalidOption {
                option: "read_only",
                why: "a store cannot be created and opened read-only at once".into(),
            });
        }
        Ok(())
    }
}
