//! A view of the store as it was at one moment.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Write;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use crate::device::{Device, DeviceBuffer};
use crate::error::{DisplayKey, Error, Result};
use crate::index::Version;
use crate::store::Store;
use crate::store::core::Core;
use crate::store::read::{check_range, info_of};
use crate::store::reclaim::Epoch;
use crate::store::scan::Scan;
use crate::store::stream::Stream;
use crate::tensor::{Tensor, TensorInfo, check_key};
use alight_format::{Dtype, Seq};
use parking_lot::Mutex;

/// The store as it was when the snapshot was taken: commits that came later are not in it.
///
/// Cloning it is cheap; it may be used from any number of threads, and keeps the store open. What it shows takes up disk
/// space for as long as it lives.
#[derive(Clone)]
pub struct Snapshot {
    version: Arc<Version>,
    /// Nothing for the view of a single call.
    _listed: Option<Arc<Listed>>,
    /// What was seen when the snapshot was taken: a reader's store may have moved on.
    core: Arc<Core>,
    /// Keeps the store open.
    store: Store,
}

/// The snapshots that callers hold, for whoever asks what keeps space from being given back.
pub(crate) type Snapshots = Arc<Mutex<BTreeMap<u64, Taken>>>;

/// When a snapshot was taken, and of what.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Taken {
    pub(crate) at: Instant,
    pub(crate) commit: Seq,
    /// Of a writer: what was dead before this epoch is not in the snapshot.
    pub(crate) epoch: u64,
}

/// A line in the list, for as long as a clone of the snapshot lives.
struct Listed {
    snapshots: Snapshots,
    number: u64,
}

impl Listed {
    fn new(snapshots: &Snapshots, version: &Version) -> Arc<Self> {
        let epoch = version.hold.downcast_ref::<Epoch>().map_or(0, |epoch| epoch.0);
        let mut list = snapshots.lock();
        let number = list.last_key_value().map_or(0, |(last, _)| last + 1);
        list.insert(number, Taken { at: Instant::now(), commit: version.seq, epoch });
        drop(list);
        Arc::new(Self { snapshots: Arc::clone(snapshots), number })
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.snapshots.lock().remove(&self.number);
    }
}

impl Snapshot {
    /// A snapshot for a caller to hold.
    pub(crate) fn new(store: Store, core: Arc<Core>) -> Self {
        let version = core.version();
        Self { _listed: Some(Listed::new(&core.snapshots, &version)), version, core, store }
    }

    /// What a single call sees: the same, and in no list.
    pub(crate) fn of_a_call(store: Store, core: Arc<Core>) -> Self {
        Self { _listed: None, version: core.version(), core, store }
    }

    pub(crate) fn version(&self) -> &Arc<Version> {
        &self.version
    }

    /// The parts, unless the store was closed.
    pub(crate) fn core(&self) -> Result<&Core> {
        self.core.check_open()?;
        Ok(&self.core)
    }

    /// The parts, for who goes on reading when the store may be gone.
    pub(crate) fn parts(&self) -> (Arc<Core>, Arc<Version>) {
        (Arc::clone(&self.core), Arc::clone(&self.version))
    }

    /// The number of the last commit that it sees; commits are counted from 1, those of compaction too.
    pub fn last_commit(&self) -> u64 {
        self.version.seq.get()
    }

    /// As [`Store::get`].
    ///
    /// # Errors
    /// As [`Store::get`].
    pub fn get(&self, key: impl AsRef<[u8]>, device: &Device) -> Result<Tensor> {
        let core = self.core()?;
        let entry = core.entry(&self.version, key.as_ref())?;
        core.read_one(&entry, device).map_err(|error| core.explain(error))
    }

    /// As [`Store::get_many`].
    ///
    /// # Errors
    /// As [`Store::get_many`].
    pub fn get_many<K: AsRef<[u8]>>(&self, keys: impl IntoIterator<Item = K>, device: &Device) -> Result<Vec<Tensor>> {
        let core = self.core()?;
        let entries =
            keys.into_iter().map(|key| core.entry(&self.version, key.as_ref())).collect::<Result<Vec<_>>>()?;
        core.read_many(&entries, device).map_err(|error| core.explain(error))
    }

    /// As [`Store::get_many_into`].
    ///
    /// # Errors
    /// As [`Store::get_many_into`].
    pub fn get_many_into<K: AsRef<[u8]>>(
        &self,
        keys: impl IntoIterator<Item = K>,
        arena: &mut DeviceBuffer,
    ) -> Result<Vec<Range<u64>>> {
        let core = self.store.core()?;
        let entries =
            keys.into_iter().map(|key| core.entry(&self.version, key.as_ref())).collect::<Result<Vec<_>>>()?;
        core.read_many_into(&entries, arena)
    }

    /// As [`Store::stream`].
    pub fn stream<I: IntoIterator>(&self, keys: I, device: &Device) -> Stream<I::IntoIter>
    where
        I::Item: AsRef<[u8]>,
    {
        Stream::new(keys.into_iter(), self.clone(), device)
    }

    /// As [`Store::get_into`].
    ///
    /// # Errors
    /// As [`Store::get_into`].
    pub fn get_into(&self, key: impl AsRef<[u8]>, destination: &mut [u8]) -> Result<TensorInfo> {
        let core = self.core()?;
        let entry = core.entry(&self.version, key.as_ref())?;
        let available = destination.len() as u64;
        if entry.length > available {
            let key = DisplayKey::from(key.as_ref());
            return Err(Error::DestinationTooSmall { key, needed: entry.length, available });
        }
        core.read_one_into(&entry, destination).map_err(|error| core.explain(error))?;
        info_of(&entry)
    }

    /// As [`Store::get_range`].
    ///
    /// # Errors
    /// As [`Store::get_range`].
    pub fn get_range(&self, key: impl AsRef<[u8]>, range: Range<u64>, device: &Device) -> Result<Tensor> {
        let core = self.core()?;
        let entry = core.entry(&self.version, key.as_ref())?;
        check_range(&entry, &range)?;
        let bytes = core.read_range(&entry, range).map_err(|error| core.explain(error))?;
        Tensor::from_host(Dtype::U8, &[bytes.len() as u64], &bytes, device)
    }

    /// As [`Store::get_to_writer`].
    ///
    /// # Errors
    /// As [`Store::get_to_writer`].
    pub fn get_to_writer(&self, key: impl AsRef<[u8]>, out: &mut dyn Write) -> Result<TensorInfo> {
        let core = self.core()?;
        let entry = core.entry(&self.version, key.as_ref())?;
        core.read_to_writer(&entry, out).map_err(|error| core.explain(error))?;
        info_of(&entry)
    }

    /// As [`Store::info`].
    ///
    /// # Errors
    /// As [`Store::info`].
    pub fn info(&self, key: impl AsRef<[u8]>) -> Result<Option<TensorInfo>> {
        let core = self.core()?;
        check_key(key.as_ref())?;
        let found = core.look_up(&self.version, key.as_ref(), Version::get)?;
        found.map(|entry| info_of(&entry)).transpose()
    }

    /// As [`Store::attributes`].
    ///
    /// # Errors
    /// As [`Store::attributes`].
    pub fn attributes(&self, key: impl AsRef<[u8]>) -> Result<Vec<(String, Vec<u8>)>> {
        let core = self.core()?;
        let entry = core.entry(&self.version, key.as_ref())?;
        if !entry.has_attributes {
            return Ok(Vec::new());
        }
        Ok(core.frame_entry(&entry).map_err(|error| core.explain(error))?.attributes)
    }

    /// As [`Store::contains`].
    ///
    /// # Errors
    /// As [`Store::contains`].
    pub fn contains(&self, key: impl AsRef<[u8]>) -> Result<bool> {
        let core = self.core()?;
        check_key(key.as_ref())?;
        core.look_up(&self.version, key.as_ref(), Version::contains)
    }

    /// As [`Store::scan`].
    pub fn scan(&self, prefix: impl AsRef<[u8]>) -> Scan {
        Scan::new(self.clone(), prefix.as_ref())
    }
}

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Snapshot({} at commit {})", self.store.path().display(), self.version.seq)
    }
}
