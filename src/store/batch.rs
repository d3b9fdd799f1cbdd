//! Several changes as one commit: all of them or none.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use alight_format::{EncodedBody, Entry, EntryKind, IndexEntry, SegmentId, Seq, crc32, limits};

use crate::config::STREAMED_PART_OF_SMALL;
use crate::error::{Error, Result};
use crate::io::{Blob, PayloadStream, lay_out, step};
use crate::metrics::Counters;
use crate::storage::{is_direct_aligned, lend};
use crate::store::Store;
use crate::store::commit::{Deleted, Queued, Rest, SmallCommit, Stream, duplicate};
use crate::store::core::Core;
use crate::store::limit::Room;
use crate::store::options::Durability;
use crate::store::payload::{stream_payload, take_back};
use crate::store::publish::index_entry;
use crate::store::watch::Begun;
use crate::tensor::{TensorRef, check_key};
use crate::trace::scope;

/// A set of changes that become visible together and survive together, or not at all; made by [`Store::batch`].
///
/// It borrows the tensors that are put and copies none of them; nothing happens before [`commit`](Batch::commit), and
/// dropping it changes nothing. Where a key is named twice, the last change counts.
#[must_use = "a batch changes nothing until it is committed"]
pub struct Batch<'a> {
    store: Store,
    durability: Durability,
    changes: Vec<Change<'a>>,
    payload_bytes: u64,
}

struct Change<'a> {
    key: Vec<u8>,
    /// `None` deletes.
    value: Option<TensorRef<'a>>,
    attributes: Vec<(String, Vec<u8>)>,
}

impl<'a> Batch<'a> {
    pub(crate) fn new(store: Store, durability: Durability) -> Self {
        Self { store, durability, changes: Vec::new(), payload_bytes: 0 }
    }

    /// Puts a tensor under a key, in place of whatever is there.
    ///
    /// # Errors
    /// [`Error::InvalidKey`] and [`Error::LimitExceeded`]; the batch is as it was.
    pub fn put(&mut self, key: impl AsRef<[u8]>, tensor: impl Into<TensorRef<'a>>) -> Result<()> {
        self.put_with_attributes(key, tensor, Vec::new())
    }

    /// [`put`](Batch::put) with named bytes of the user's own beside the tensor, at most 64 KiB in all; read them with
    /// [`Store::attributes`].
    ///
    /// # Errors
    /// As [`put`](Batch::put).
    pub fn put_with_attributes(
        &mut self,
        key: impl AsRef<[u8]>,
        tensor: impl Into<TensorRef<'a>>,
        attributes: Vec<(String, Vec<u8>)>,
    ) -> Result<()> {
        let tensor = tensor.into();
        let attribute_bytes: u64 = attributes.iter().map(|(name, value)| (name.len() + value.len()) as u64).sum();
        within("the size of a value's attributes", attribute_bytes, limits::ATTRIBUTES_BYTES_MAX as u64)?;
        within("the length of a value", tensor.len_bytes(), limits::BLOB_BYTES_MAX)?;
        let len_bytes = tensor.len_bytes();
        self.push(key.as_ref(), Some(tensor), attributes)?;
        self.payload_bytes += len_bytes;
        Ok(())
    }

    /// Deletes a key; one that is not there may be deleted too.
    ///
    /// # Errors
    /// As [`put`](Batch::put).
    pub fn delete(&mut self, key: impl AsRef<[u8]>) -> Result<()> {
        self.push(key.as_ref(), None, Vec::new())
    }

    fn push(&mut self, key: &[u8], value: Option<TensorRef<'a>>, attributes: Vec<(String, Vec<u8>)>) -> Result<()> {
        check_key(key)?;
        within(
            "the number of changes in a batch",
            self.changes.len() as u64 + 1,
            limits::ENTRIES_PER_COMMIT_MAX as u64,
        )?;
        self.changes.push(Change { key: key.to_vec(), value, attributes });
        Ok(())
    }

    /// When the commit counts as done; what the store was opened with at first.
    pub fn durability(&mut self, durability: Durability) -> &mut Self {
        self.durability = durability;
        self
    }

    /// How many changes were made, keys named twice counted twice.
    pub fn len(&self) -> usize {
        self.changes.len()
    }

    /// Whether nothing was changed.
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    /// The bytes of the tensors that were put.
    pub fn payload_bytes(&self) -> u64 {
        self.payload_bytes
    }

    /// Makes the changes. When this returns `Ok` they are all visible, and as durable as [`Durability`] says; when it
    /// returns an error, none of them is visible; after a power cut each batch is there whole or not at all.
    ///
    /// Blocks for one write and one sync up to 1 MiB of payload, shared with the commits of other threads, and for the
    /// stream of the payload and two syncs above. Takes 32 MiB of memory at most for
    /// the payload, whatever its length, and under 1 KiB for each change.
    ///
    /// A tensor's bytes must not change meanwhile: on a GPU, who writes to its memory through another library must have
    /// finished before (see [`DeviceBuffer::device_ptr`](crate::DeviceBuffer::device_ptr)). Values of 8 MiB and more in a GPU's
    /// memory may go straight to the disk from there (see [`StoreOptions::route`](crate::StoreOptions::route)): they are read
    /// once for the checksum and once to be written.
    ///
    /// # Errors
    /// [`Error::ReadOnly`], [`Error::Closed`], [`Error::WritesRefused`], [`Error::Io`] from the disk, and whatever
    /// reading a tensor from its device says. [`Error::Timeout`] where the disk does not come back (see
    /// [`StoreOptions::write_deadline`](crate::StoreOptions::write_deadline)): the changes may still become visible, now or with
    /// the next open, all of them or none.
    pub fn commit(self) -> Result<()> {
        self.commit_telling(None)
    }

    /// [`commit`](Batch::commit), which tells whether what it deletes was there.
    pub(crate) fn commit_telling(self, deleted: Option<Deleted>) -> Result<()> {
        let core = self.store.core()?;
        let _passing = core.gate.read();
        core.check_open()?;
        // The last change of a key counts, in the place of its last mention.
        let mut last: HashMap<&[u8], usize> = HashMap::with_capacity(self.changes.len());
        for (index, change) in self.changes.iter().enumerate() {
            last.insert(&change.key, index);
        }
        let keep: Vec<bool> =
            self.changes.iter().enumerate().map(|(index, change)| last[change.key.as_slice()] == index).collect();
        let mut keep = keep.into_iter();
        let mut changes = self.changes;
        changes.retain(|_| keep.next().unwrap_or(false));
        commit(&core, changes, self.durability, deleted)
    }
}

fn within(what: &'static str, value: u64, limit: u64) -> Result<()> {
    if value > limit { Err(Error::LimitExceeded { what, value, limit }) } else { Ok(()) }
}

/// Writes changes, of which no two have the same key, as one commit.
fn commit(
    core: &Arc<Core>,
    mut changes: Vec<Change<'_>>,
    durability: Durability,
    deleted: Option<Deleted>,
) -> Result<()> {
    let writer = core.writer()?;
    writer.committer.check()?;
    if changes.is_empty() {
        return Ok(());
    }
    let payload = || changes.iter().filter_map(|change| change.value.as_ref()).map(TensorRef::len_bytes).sum::<u64>();
    let _scope = scope!("commit", keys = changes.len(), bytes = payload());
    core.await_room()?;
    let sizes =
        changes.iter().map(|change| (change.key.as_slice(), change.value.as_ref().map_or(0, TensorRef::len_bytes)));
    // Held until the commit is published.
    let room = make_room(core, sizes)?;
    for key in room.iter().flat_map(|room| &room.evicted) {
        changes.push(Change { key: key.clone(), value: None, attributes: Vec::new() });
    }
    let durable = durability == Durability::Immediate;
    let (mut entries, mut blobs, payload_len) = lay_out_changes(changes);
    // The frame is as long with checksums as without, so its length is known before the payload is read.
    let frame_len = encode(core, &entries)?.frame_len();
    let total = frame_len + payload_len;

    if payload_len <= core.small_commit_bytes_max && writer.committer.shares_a_segment(total) {
        let small = Small { frame_len, payload_len, durable, deleted };
        commit_small(core, small, entries, &mut blobs)?;
    } else {
        let tail = core.watch_write("commit", move |core| core.writer()?.committer.lease(total))?;
        if let Err(error) = stream_payload(core, &tail, frame_len, payload_len, &mut blobs) {
            return Err(take_back(core, tail, error));
        }
        fill_in_checksums(&mut entries, &mut blobs);
        let body = encode(core, &entries)?;
        let index = index_entries(entries);
        core.watch_commit("commit", move |core| {
            let committer = &core.writer()?.committer;
            // The payload is on the disk before the frame that speaks for it is written.
            committer.sync_payload(&tail)?;
            let seq = committer.write_large(tail, &body, payload_len, index, durable, deleted)?;
            finish(core, seq, durable)
        })?;
    }
    drop(room);
    Counters::add(&core.counters.commits, 1);
    Counters::add(&core.counters.bytes_put, blobs.iter().map(|blob| blob.source.len_bytes()).sum());
    core.maintain_when_due()
}

/// What is known of a small commit before its payload is read.
struct Small {
    frame_len: u64,
    payload_len: u64,
    durable: bool,
    deleted: Option<Deleted>,
}

/// Has a small commit carried out: begun at once and written while its bytes are copied, or as they lie, where that is worth it
/// and nobody else is at work; or copied first.
fn commit_small(core: &Arc<Core>, small: Small, mut entries: Vec<Entry>, blobs: &mut [Blob<'_>]) -> Result<()> {
    // A GPU, or a reader, may have to be waited for.
    let is_at_hand = blobs.iter().all(|blob| blob.source.as_host().is_some());
    if is_at_hand && small.payload_len >= core.small_commit_bytes_max / STREAMED_PART_OF_SMALL {
        let lent = lendable(core, blobs);
        let lent_len = lent.map_or(0, |bytes| bytes.len() as u64);
        let buffer = core.buffers.take((small.frame_len + small.payload_len - lent_len) as usize);
        if let Some((begun, stream)) = core.begin_in_group(buffer, small.frame_len, lent_len, small.durable)? {
            return commit_streamed(core, begun, stream, lent, entries, blobs, small.deleted);
        }
    }
    let Small { frame_len, payload_len, durable, deleted } = small;
    let mut bytes = core.buffers.take((frame_len + payload_len) as usize);
    let wait = core.wait_for_device();
    let mut payload = PayloadStream::new(blobs, 0, &wait);
    payload.fill(&mut bytes[frame_len as usize..])?;
    payload.finish();
    fill_in_checksums(&mut entries, blobs);
    let body = encode(core, &entries)?;
    core.commit_in_group(SmallCommit { body, bytes, entries: index_entries(entries), durable, deleted })
}

/// What the disk can have of a commit as it lies: the whole blocks of its only value, where that begins on a page.
fn lendable<'b>(core: &Core, blobs: &[Blob<'b>]) -> Option<&'b [u8]> {
    let [blob] = blobs else { return None };
    let bytes = blob.source.as_host()?;
    let whole = &bytes[..bytes.len() / limits::BLOCK_BYTES as usize * limits::BLOCK_BYTES as usize];
    // Relaxed: a hint.
    let is_wanted = core.lends.load(Ordering::Relaxed) && !whole.is_empty();
    (is_wanted && is_direct_aligned(whole.as_ptr().addr() as u64, 0, whole.len())).then_some(whole)
}

/// Carries a commit through that was begun: hands on what is lent, and the rest as it is copied.
fn commit_streamed(
    core: &Core,
    begun: Begun<'_>,
    mut stream: Stream,
    lent: Option<&[u8]>,
    mut entries: Vec<Entry>,
    blobs: &mut [Blob<'_>],
    deleted: Option<Deleted>,
) -> Result<()> {
    let lender = lent.map(|bytes| {
        #[expect(unsafe_code, reason = "the thread that writes does not borrow")]
        // SAFETY: the lender is dropped in this function, however that ends, and the bytes are borrowed longer.
        let (lender, lent) = unsafe { lend(bytes, &core.buffers) };
        stream.lend(lent);
        lender
    });
    if let (Some(_), [blob]) = (lent, &mut *blobs)
        && let Some(all) = blob.source.as_host()
    {
        blob.set_checksums(all.chunks(limits::CHUNK_BYTES as usize).map(crc32).collect());
    }
    let wait = core.wait_for_device();
    let mut payload = PayloadStream::new(blobs, 0, &wait);
    payload.pass(lent.map_or(0, |bytes| bytes.len() as u64));
    let filled = stream.fill(|part| payload.fill(part)).map(|()| payload.finish());
    let rest = filled.and_then(|()| {
        fill_in_checksums(&mut entries, blobs);
        encode(core, &entries).map(|body| Rest { body, entries: index_entries(entries), deleted })
    });
    let outcome = match rest {
        Ok(rest) => {
            stream.finish(rest);
            begun.wait()
        }
        Err(error) => {
            drop(stream);
            // It was taken back, which is no news.
            let _ = begun.wait();
            Err(error)
        }
    };
    if lender.is_some_and(|lender| lender.was_copied()) {
        // Copied by whoever writes, after which nothing is left to do meanwhile.
        core.lends.store(false, Ordering::Relaxed);
    }
    outcome
}

/// Finds room for a commit where the store has a limit. To find what to evict, frames are read.
fn make_room<'k>(core: &Arc<Core>, sizes: impl Iterator<Item = (&'k [u8], u64)>) -> Result<Option<Room>> {
    if core.writer()?.limit.is_none() {
        return Ok(None);
    }
    let sizes: BTreeMap<Vec<u8>, u64> = sizes.map(|(key, len)| (key.to_vec(), len)).collect();
    core.watch_write("make room", move |core| core.make_room(&sizes))
}

/// Writes, syncs and publishes a group of small commits. They share their fate: what fails one fails all.
pub(crate) fn carry_out(core: &Core, group: Vec<Queued>) -> Vec<Result<()>> {
    // Let go before anybody is told.
    let _lock = core.lock();
    let count = group.len();
    let durable = group.iter().any(Queued::is_durable);
    // Whoever copied the bytes has slept since, and can wake while the disk syncs.
    let announced = matches!(group[..], [Queued::Streamed(_)]);
    let outcome = core.writer().and_then(|writer| {
        let last = writer.committer.write_queued(group)?;
        if announced {
            writer.group.announce();
        }
        finish(core, last, durable)
    });
    match outcome {
        Ok(()) => (0..count).map(|_| Ok(())).collect(),
        Err(error) => {
            let copies = (1..count).map(|_| Err(duplicate(&error))).collect::<Vec<_>>();
            std::iter::once(Err(error)).chain(copies).collect()
        }
    }
}

/// Syncs and publishes a commit that is written.
pub(crate) fn finish(core: &Core, seq: Seq, durable: bool) -> Result<()> {
    step();
    let committer = &core.writer()?.committer;
    if durable {
        committer.sync_through(seq)?;
    }
    core.publish();
    // An eventual commit behind a durable one that is still being synced becomes visible with it.
    if core.version().seq < seq {
        committer.sync_through(seq)?;
        core.publish();
    }
    Ok(())
}

pub(crate) fn encode(core: &Core, entries: &[Entry]) -> Result<EncodedBody> {
    EncodedBody::new(entries).map_err(|error| match error {
        alight_format::FormatError::LimitExceeded { what, value, limit } => Error::LimitExceeded { what, value, limit },
        error => Error::format(core.layout.root(), error),
    })
}

fn lay_out_changes(changes: Vec<Change<'_>>) -> (Vec<Entry>, Vec<Blob<'_>>, u64) {
    let (offsets, payload_len) =
        lay_out(changes.iter().filter_map(|change| change.value.as_ref()).map(TensorRef::len_bytes));
    let mut offsets = offsets.into_iter();
    let mut blobs = Vec::with_capacity(offsets.len());
    let entries = changes
        .into_iter()
        .map(|change| match change.value {
            None => Entry::delete(&change.key),
            Some(value) => {
                let offset = offsets.next().expect("one offset was made for each value");
                let length = value.len_bytes();
                let entry = Entry {
                    key: change.key,
                    kind: EntryKind::Put,
                    dtype: value.dtype().code(),
                    shape: value.shape().to_vec(),
                    attributes: change.attributes,
                    segment: 0,
                    frame_offset: 0,
                    offset,
                    length,
                    crc: 0,
                    chunk_crcs: vec![0; limits::chunk_count(length) as usize],
                    origin: Seq::ZERO,
                };
                blobs.push(Blob::new(value, offset));
                entry
            }
        })
        .collect();
    (entries, blobs, payload_len)
}

fn fill_in_checksums(entries: &mut [Entry], blobs: &mut [Blob<'_>]) {
    for (entry, blob) in entries.iter_mut().filter(|entry| entry.kind == EntryKind::Put).zip(blobs) {
        entry.crc = blob.crc;
        entry.chunk_crcs = std::mem::take(&mut blob.chunk_crcs);
    }
}

/// The index's view of a commit that has no place yet.
pub(crate) fn index_entries(entries: Vec<Entry>) -> Vec<IndexEntry> {
    entries.into_iter().map(|entry| index_entry(entry, Seq::ZERO, SegmentId(0), 0, 0)).collect()
}
