//! How large a store is, and what of it lives.

use std::time::Duration;

use alight_format::{FeatureFlags, StoreId};

use crate::error::{Error, Result};
use crate::metrics::prometheus;
use crate::store::core::Core;
use crate::store::manifest;
use crate::store::readers::oldest_reader;
use crate::store::snapshot::Taken;

/// The size of a store as of one moment; made by [`Store::stat`](crate::Store::stat).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stat {
    /// The version of the format on disk.
    pub format_version: u32,
    /// The features of the format that the store uses.
    pub flags: FeatureFlags,
    /// Which store this is.
    pub store_id: StoreId,
    /// The number of the last commit.
    pub last_commit: u64,
    /// Entries of the index, older versions and deletes of a key counted until they are merged away: at least the number
    /// of keys.
    pub index_entries: u64,
    /// Keys in memory that the next flush of the index writes out.
    pub overlay_entries: u64,
    /// Index runs.
    pub runs: u64,
    /// Segments.
    pub segments: u64,
    /// Bytes of values that a key leads to.
    pub live_bytes: u64,
    /// Bytes of values that were ever put into the segments that are there.
    pub blob_bytes: u64,
    /// Bytes of values that no key leads to any more and that are kept for snapshots and for readers in other processes,
    /// which may still see them. Zero when the store is open for reading only, which cannot tell.
    pub pinned_bytes: u64,
    /// The oldest generation of the manifest that a store open for reading holds, in this process or another; what it sees
    /// is kept. Nothing where nobody reads or nobody can tell, and in a store that is itself open for reading only.
    pub oldest_reader: Option<u64>,
    /// The generation of the manifest that is on the disk.
    pub generation: u64,
    /// The snapshots that are held in this process, the oldest first.
    pub snapshots: Vec<SnapshotStat>,
    /// Why space that nobody sees was not given back the last time, where that is so: the file system cannot punch holes,
    /// nobody can tell whether other processes read, a file has a second name.
    pub not_given_back: Option<String>,
    /// The lengths of all files.
    pub file_bytes: u64,
    /// What the files take on the disk, space taken ahead included: what `du` says.
    pub disk_bytes: u64,
}

/// A snapshot that is held, and what is kept for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct SnapshotStat {
    /// The last commit that it sees.
    pub commit: u64,
    /// How long it has been held.
    pub age: Duration,
    /// The bytes that are kept for it; other snapshots may keep the same ones.
    pub pinned_bytes: u64,
}

impl Stat {
    /// The sizes in the text format of Prometheus, as gauges; [`Metrics::prometheus`](crate::Metrics::prometheus) has the
    /// counters.
    pub fn prometheus(&self) -> String {
        let mut text = prometheus::Text::new("alight_store_");
        let sizes = [
            ("format_version", "The version of the format on disk.", u64::from(self.format_version)),
            ("last_commit", "The number of the last commit.", self.last_commit),
            ("index_entries", "Entries of the index, old ones counted.", self.index_entries),
            ("overlay_entries", "Keys in memory.", self.overlay_entries),
            ("index_runs", "Index runs.", self.runs),
            ("segments", "Segments.", self.segments),
            ("live_bytes", "Bytes of values that a key leads to.", self.live_bytes),
            ("blob_bytes", "Bytes of values that the segments hold.", self.blob_bytes),
            ("pinned_bytes", "Bytes that only snapshots and readers see.", self.pinned_bytes),
            ("snapshots", "Snapshots that are held in this process.", self.snapshots.len() as u64),
            ("file_bytes", "The lengths of all files.", self.file_bytes),
            ("disk_bytes", "What the files take on the disk.", self.disk_bytes),
        ];
        text.put_all("gauge", sizes);
        text.finish()
    }

    pub(crate) fn of(core: &Core) -> Result<Stat> {
        core.count_late()?;
        let (version, accounts) = core.version_and_accounts();
        let manifest = manifest::read(&*core.storage, &core.layout)?;
        let (mut live_bytes, mut blob_bytes) = (0, 0);
        for (_, accounting) in &accounts {
            live_bytes += accounting.live_bytes;
            blob_bytes += accounting.blob_bytes;
        }
        let (mut pinned_bytes, mut not_given_back) = (0, None);
        let taken: Vec<Taken> = core.snapshots.lock().values().copied().collect();
        let mut snapshots: Vec<SnapshotStat> = taken
            .iter()
            .map(|taken| SnapshotStat { commit: taken.commit.get(), age: taken.at.elapsed(), pinned_bytes: 0 })
            .collect();
        if let Ok(writer) = core.writer() {
            let reclaim = writer.reclaim.lock();
            pinned_bytes = reclaim.waiting_bytes(None);
            not_given_back = reclaim.hindrance().map(str::to_owned);
            for (snapshot, taken) in snapshots.iter_mut().zip(&taken) {
                snapshot.pinned_bytes = reclaim.waiting_bytes(Some(taken.epoch));
            }
        }
        let oldest_reader = if core.is_read_only() {
            None
        } else {
            oldest_reader(&*core.storage, &core.layout, manifest.generation).ok().flatten()
        };
        let (file_bytes, disk_bytes) = sizes(core)?;
        Ok(Stat {
            format_version: manifest.version,
            flags: manifest.flags,
            store_id: manifest.store,
            last_commit: version.seq.get(),
            index_entries: version.entries_at_most(),
            overlay_entries: (version.overlay.len() + version.frozen.len()) as u64,
            runs: version.runs.len() as u64,
            segments: accounts.len() as u64,
            live_bytes,
            blob_bytes,
            pinned_bytes,
            oldest_reader,
            generation: manifest.generation,
            snapshots,
            not_given_back,
            file_bytes,
            disk_bytes,
        })
    }
}

/// The lengths of a store's files, and the space that they take.
fn sizes(core: &Core) -> Result<(u64, u64)> {
    let layout = &core.layout;
    let (mut length, mut allocated) = (0, 0);
    for directory in [layout.root().to_path_buf(), layout.segments(), layout.index()] {
        for entry in core.storage.list(&directory).map_err(Error::io("list", &directory))? {
            if entry.is_dir {
                continue;
            }
            let path = directory.join(&entry.name);
            let file = match core.storage.open(&path, crate::storage::OpenMode::Read) {
                Ok(file) => file,
                // A flush beside this replaces files.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(error) => return Err(Error::io("open", &path)(error)),
            };
            let facts = file.facts().map_err(Error::io("measure", &path))?;
            length += facts.len_bytes;
            allocated += facts.allocated_bytes;
        }
    }
    Ok((length, allocated))
}
